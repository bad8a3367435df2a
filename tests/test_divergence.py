"""The reverse KL at each token against plain logits and autograd, on a vocabulary that can be enumerated."""

import math

import pytest
import torch
from conftest import VOCAB, make_forward, make_model, rounding
from hypothesis import given
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from trl.kernels import chunked_divergence

from camopd import divergence, logprobs
from camopd.divergence import Likeliest, bucket_kl, logps_and_kl, outputs_of
from camopd.logprobs import completion_logps, completion_top_k, head_logits


IDS = [[5, 6, 7, 8, 9, 2], [5, 9, 11], [6, 6, 12, 13, 2]]
STARTS = [2, 1, 3]
KL = rounding(10)  # nats, of sums whose terms are as large as log-probs


def of_logits(model, row: int) -> torch.Tensor:
    """Log-softmax of the model's own logits at each completion token of a row, (T, V)."""
    logits = model(input_ids=torch.tensor([IDS[row]])).logits[0]
    return logits[STARTS[row] - 1 : -1].log_softmax(dim=-1)


def plain_kl(student, teacher, row: int) -> torch.Tensor:
    own, other = of_logits(student, row), of_logits(teacher, row).detach()
    return (own.exp() * (own - other)).sum(dim=-1)


def gradients(model) -> list[torch.Tensor]:
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    return found


@pytest.mark.parametrize("padding_free", [False, True])
def test_full_kl_and_its_gradient_are_those_of_plain_logits(padding_free):
    student, first, second = make_model(1), make_model(2), make_model(3)
    groups = [(rows, outputs_of(teacher, [IDS[row] for row in rows], [STARTS[row] for row in rows], 0, padding_free))
              for rows, teacher in (([0, 2], first), ([1], second))]  # fmt: skip
    logps, kl = logps_and_kl(student, IDS, STARTS, 0, padding_free, groups)
    weights = torch.tensor([[1.0, 0.5, 2.0, 0.25], [3.0, 1.0, 0.0, 0.0], [1.0, 1.5, 0.0, 0.0]])
    (weights * kl).sum().backward()
    found = gradients(student)
    expected = [plain_kl(student, teacher, row) for row, teacher in ((0, first), (1, second), (2, first))]
    for row, values in enumerate(expected):
        torch.testing.assert_close(kl[row, : len(values)], values, atol=KL, rtol=0)
        assert (kl[row, len(values) :] == 0).all()
        sampled = of_logits(student, row).gather(-1, torch.tensor(IDS[row][STARTS[row] :])[:, None])[:, 0]
        torch.testing.assert_close(logps[row, : len(values)], sampled, atol=KL, rtol=0)
    sum((weights[row, : len(values)] * values).sum() for row, values in enumerate(expected)).backward()
    for ours, theirs in zip(found, gradients(student), strict=True):
        torch.testing.assert_close(ours, theirs, atol=KL, rtol=1e-4)


def likeliest(teacher, k: int) -> Likeliest:
    tops = [of_logits(teacher, row).detach().topk(k, dim=-1) for row in range(len(IDS))]
    return Likeliest(torch.cat([top.indices for top in tops]), torch.cat([top.values for top in tops]))


@pytest.mark.parametrize("k", [1, 5, len(VOCAB) - 1])
def test_top_k_kl_has_all_other_tokens_as_one(k):
    student, teacher = make_model(1), make_model(2)
    _, kl = logps_and_kl(student, IDS, STARTS, 0, False, [([0, 1, 2], likeliest(teacher, k))])
    kl.sum().backward()
    found = gradients(student)
    total = torch.zeros(())
    for row in range(len(IDS)):
        own, other = of_logits(student, row), of_logits(teacher, row).detach()
        ids = other.topk(k, dim=-1).indices
        kept = torch.zeros_like(other, dtype=torch.bool).scatter(-1, ids, True)
        buckets = [torch.cat([each.exp()[place][kept[place]], each.exp()[place][~kept[place]].sum()[None]])
                   for place in range(len(own)) for each in (own, other)]  # fmt: skip
        values = torch.stack([(p * (p / q).log()).sum() for p, q in zip(buckets[::2], buckets[1::2], strict=True)])
        exact = plain_kl(student, teacher, row)
        torch.testing.assert_close(kl[row, : len(values)], values, atol=10 * KL, rtol=0)
        assert (values <= exact + KL).all()
        if k == len(VOCAB) - 1:  # the last outcome is one token
            torch.testing.assert_close(values, exact, atol=10 * KL, rtol=0)
        total = total + values.sum()
    total.backward()
    for ours, theirs in zip(found, gradients(student), strict=True):
        torch.testing.assert_close(ours, theirs, atol=100 * KL, rtol=1e-3)


def test_top_k_kl_in_bfloat16_is_that_of_whole_distributions(monkeypatch):
    """TRL's kernel keeps the head's product in float32. Rounded to bfloat16, logits of 30 are off by up to a sixteenth;
    what is left of that is the rounding of a gradient on its way to the weights."""

    def rounded(*of):
        return head_logits(*of).bfloat16().float()

    student, teacher = make_model(1), make_model(1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for model in (student, teacher):
            model.lm_head.weight.mul_(6)
        teacher.lm_head.weight.add_(0.03 * torch.randn(teacher.lm_head.weight.shape, generator=generator))
    k, found = len(VOCAB) - 1, []  # the last outcome is one token
    with torch.autocast("cpu", torch.bfloat16):
        ids, logps = completion_top_k(teacher, IDS, STARTS, 0, k)
        own = torch.tensor([len(row) - start for row, start in zip(IDS, STARTS, strict=True)])
        own = torch.arange(ids.shape[1]) < own[:, None]
        logits = student(input_ids=torch.tensor([IDS[0]])).logits
        few = Likeliest(ids[own], logps[own])
        for views, logits_of in (
            (outputs_of(teacher, IDS, STARTS, 0, False), head_logits), (few, head_logits), (few, rounded)
        ):  # fmt: skip
            monkeypatch.setattr(divergence, "head_logits", logits_of)
            _, kl = logps_and_kl(student, IDS, STARTS, 0, False, [([0, 1, 2], views)])
            kl.sum().backward()
            found.append((kl.detach(), gradients(student)))
    assert logits.abs().max() > 20
    (full, expected), (top, grads), (off, far) = found
    assert 0.001 < full[own].mean() < 0.01
    torch.testing.assert_close(top, full, atol=2e-5, rtol=0)
    assert (off - full).abs().max() > 1e-3
    assert any((ours - theirs).norm() > 2**-6 * theirs.norm() for ours, theirs in zip(far, expected, strict=True))
    for ours, theirs in zip(grads, expected, strict=True):
        assert (ours - theirs).norm() <= 2**-6 * theirs.norm()


def test_tokens_that_a_teacher_has_more_than_the_student_are_outcomes_that_it_never_draws():
    """As of a padded head: its likeliest token may be one of those rows."""
    student, teacher = make_model(1), make_model(2, vocab_size=len(VOCAB) + 7)
    k = len(VOCAB) + 6
    top = likeliest(teacher, k)
    assert (top.ids >= len(VOCAB)).any()
    _, kl = logps_and_kl(student, IDS, STARTS, 0, False, [([0, 1, 2], top)])
    for row in range(len(IDS)):
        own, other = of_logits(student, row), of_logits(teacher, row).detach()
        other_own = other[:, : len(VOCAB)]
        known = torch.zeros_like(other, dtype=torch.bool).scatter(-1, other.topk(k, dim=-1).indices, True)[
            :, : len(VOCAB)
        ]
        values = []
        for p, q, kept in zip(own, other_own, known, strict=True):
            rest, others = p.exp()[~kept].sum(), 1 - q.exp()[kept].sum()
            values.append((p.exp() * (p - q))[kept].sum() + (rest * (rest / others).log() if rest else 0.0))
        torch.testing.assert_close(kl[row, : len(values)], torch.stack(values), atol=1e-4, rtol=0)
    kl.sum().backward()
    assert all(torch.isfinite(each).all() for each in gradients(student))


@given(st.lists(st.floats(-8, 8), min_size=4, max_size=8), st.lists(st.floats(-8, 8), min_size=8, max_size=8))
def test_lumping_outcomes_never_makes_the_kl_larger(student, teacher):
    own, other = (
        torch.tensor(values, dtype=torch.float64).log_softmax(0) for values in (student, teacher[: len(student)])
    )
    exact = float((own.exp() * (own - other)).sum())
    last = -1e-5  # the tail's floor of 1e-6 on either side
    for k in range(1, len(own)):
        ids = other.topk(k).indices
        assert last <= float(bucket_kl(own[ids][None], other[ids][None])) <= exact + 2e-5


def test_kl_has_no_tail_where_the_likeliest_tokens_hold_all():
    certain = torch.tensor([[0.0, -40.0]])
    assert float(bucket_kl(certain, certain)) == 0
    assert math.isfinite(float(bucket_kl(certain, torch.tensor([[-40.0, 0.0]]))))


class Memory(TorchDispatchMode):
    """Bytes of the largest tensor that any operation gives, and of all that are alive at once."""

    def __init__(self):
        super().__init__()
        self.largest = self.peak = 0
        self.alive = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(each, torch.Tensor):
                reference = StorageWeakRef(each.untyped_storage())
                self.alive[reference.cdata] = reference, each.untyped_storage().nbytes()
        self.alive = {place: of for place, of in self.alive.items() if not of[0].expired()}
        sizes = [size for _, size in self.alive.values()]
        self.largest, self.peak = max(self.largest, *sizes), max(self.peak, sum(sizes))
        return result


def loss_of(kind, student, views, ids):
    """A backward of what the loss takes of each divergence, on completions that fill their rows but for the first token."""
    starts = [1] * len(ids)
    if kind == "sampled":
        return completion_logps(student, ids, starts, 0)[0].sum().backward()
    logps, kl = logps_and_kl(student, ids, starts, 0, False, [(range(len(ids)), views)])
    (logps * kl.detach() if kind == "baseline: kl" else kl).sum().backward()


def memory_of(kind, student, views, ids):
    student.zero_grad()
    with Memory() as memory:
        loss_of(kind, student, views, ids)
    return memory


def test_no_divergence_takes_more_memory_than_the_sampled_gap_but_for_a_tile(monkeypatch):
    """The largest tensor is a tile, and all that lives at once is what the sampled gap takes and some copies of a tile:
    ten in TRL's kernel without Triton, three where whole rows of the vocabulary are a tile. Logits take more."""
    tile = 64 * 4096
    monkeypatch.setattr(chunked_divergence, "TOKEN_CHUNK_SIZE", 64)
    monkeypatch.setattr(chunked_divergence, "VOCAB_CHUNK_SIZE", 4096)
    monkeypatch.setattr(divergence, "TOP_K_TOKENS", 64)
    monkeypatch.setattr(logprobs, "CPU_VOCAB_CHUNK", 256)  # the tiles of the sampled gap, far below the others
    vocabulary, tokens = 40_000, 400
    student, teacher = make_model(1, vocab_size=vocabulary), make_model(2, vocab_size=vocabulary)
    ids = [[5, *(4 + place % 90 for place in range(tokens // 5))] for _ in range(5)]
    outputs = outputs_of(teacher, ids, [1] * 5, 0, False)
    likeliest = Likeliest(torch.arange(20).expand(tokens, 20), torch.full((tokens, 20), -4.0))
    sampled = memory_of("sampled", student, None, ids)
    of = sum(weight.nbytes for weight in student.parameters())  # a second gradient of them, before both are added
    for kind, views, most in (
        ("full", outputs, 10 * tile), ("baseline: kl", outputs, 10 * tile), ("top_k", likeliest, 3 * 64 * vocabulary),
    ):  # fmt: skip
        found = memory_of(kind, student, views, ids)
        assert found.largest <= max(sampled.largest, 4 * tile, 4 * 64 * vocabulary * (kind == "top_k")), kind
        assert found.peak <= sampled.peak + of + 4 * most, (kind, found.peak, sampled.peak)
    with Memory() as plain:
        logits = (
            model(input_ids=torch.tensor(ids)).logits[:, :-1].log_softmax(dim=-1) for model in (student, teacher)
        )
        own, other = logits
        (own.exp() * (own - other.detach())).sum().backward()
    assert plain.peak > sampled.peak + of + 4 * 10 * tile and plain.largest >= 4 * tokens * vocabulary


def test_rows_of_no_teacher_have_a_backward_of_zero():
    student = make_model(1)
    _, kl = logps_and_kl(student, [[4, 4]], [1], 0, False, [])
    kl.sum().backward()
    assert float(kl.abs().sum()) == 0 and all((grad == 0).all() for grad in gradients(student))


def test_forward_of_a_teacher_gives_what_the_function_does():
    teacher = make_model(2)
    ours = make_forward(teacher, padding_free=False).outputs(IDS, STARTS)
    theirs = outputs_of(teacher, IDS, STARTS, 0, False)
    assert torch.equal(ours.hidden, theirs.hidden) and ours.weight.data_ptr() == teacher.lm_head.weight.data_ptr()
    assert not ours.hidden.requires_grad and not ours.weight.requires_grad
