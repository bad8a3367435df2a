"""Kept samples on their way to the rank that trains them. That gradients are the same is in test_trainer.py."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import make_summary
from hypothesis import given, settings
from hypothesis import strategies as st

from camopd.batching import in_micro_steps, rebalance
from camopd.errors import CaMOPDError
from camopd.samples import Sample


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 4), st.lists(st.sampled_from(["gaps", "rollout_logps", "token_weights"]), unique=True), st.data()
)
def test_rebalance_hands_every_sample_over_whole(world, columns, data):
    drawn = data.draw(
        st.lists(st.tuples(st.integers(1, 5), st.integers(0, 6), st.integers(0, world - 1)), max_size=12)
    )
    targets = data.draw(st.lists(st.integers(0, world - 1), min_size=len(drawn), max_size=len(drawn)))
    kept = [
        make_summary(
            position=3 * place, branch="general", prompt_len=prompt_len, num_ids=prompt_len + length, owner=owner,
            length=length,
        )
        for place, (prompt_len, length, owner) in enumerate(drawn)
    ]  # fmt: skip
    generator = torch.Generator().manual_seed(len(drawn))
    samples = [
        Sample(
            "general", each.position, torch.randint(0, 2**31 - 1, (each.num_ids,), generator=generator).tolist(),
            each.prompt_len, torch.rand(each.length, generator=generator) < 0.5, each.length, False,
            **{name: torch.randn(each.length, generator=generator) for name in columns},
        )
        for each in kept
    ]  # fmt: skip
    meeting, posted, here = threading.Barrier(world), {}, threading.local()

    def all_to_all_single(received, sent, output_split_sizes, input_split_sizes):  # between threads
        posted[here.rank] = sent.split(input_split_sizes)
        meeting.wait()
        parts = [posted[source][here.rank] for source in range(world)]
        meeting.wait()
        assert [len(part) for part in parts] == output_split_sizes
        received.copy_(torch.cat(parts))

    def on_rank(rank):
        here.rank = rank
        mine = {s.position: s for s, each in zip(reversed(samples), reversed(kept), strict=True) if each.owner == rank}
        try:
            return rebalance(mine, kept, targets, rank, columns, torch.device("cpu"))
        except BaseException:
            meeting.abort()  # the others would wait for this one
            raise

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(world) as pool:
        patch.setattr("camopd.batching.dist.get_world_size", lambda: world)
        patch.setattr("camopd.batching.dist.all_to_all_single", all_to_all_single)
        received = list(pool.map(on_rank, range(world)))
    for rank, found in enumerate(received):
        expected = [sample for sample, target in zip(samples, targets, strict=True) if target == rank]
        for one, other in zip(found, expected, strict=True):
            assert (one.position, one.branch, one.prompt_len) == (other.position, other.branch, other.prompt_len)
            assert (one.token_ids, one.mask.tolist()) == (other.token_ids, other.mask.tolist())
            for name in ("gaps", "rollout_logps", "token_weights"):
                if name in columns:
                    assert torch.equal(getattr(one, name), getattr(other, name))
                elif name != "gaps":
                    assert getattr(one, name) is None


def test_micro_batches_that_do_not_fit_into_the_micro_steps_are_an_error():
    assert in_micro_steps(["a", "b"], 3) == [None, "a", "b"]
    assert in_micro_steps(["a", "b"], 2) == ["a", "b"]
    with pytest.raises(CaMOPDError, match=r"2 micro-batches do not fit into the 1 micro-steps.*would not be trained"):
        in_micro_steps(["a", "b"], 1)
