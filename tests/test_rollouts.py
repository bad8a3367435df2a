"""Rollouts: how long they are, from which engine, with tools, and on disk."""

import logging
import math

import pytest
import torch
from conftest import LOGP, LOSS, make_model, make_prompts
from safetensors import safe_open
from safetensors.torch import save_file
from steps import FakeSampler, use_sampler
from trainers import BrokenTeacher, lines, make_trainer
from trl import DistillationTrainer

from camopd.forward import Forward
from camopd.messages import tokenize
from camopd.rollouts import Turn, load_rollouts, logps_of_turns, save_rollouts
from camopd.samples import Sample
from camopd.step import StepCallback


def test_kept_rollouts_of_other_rows_or_a_broken_file_are_not_used(tmp_path):
    samples = [
        Sample(
            "general", 3, [4, 5, 6], 1, torch.tensor([True, False]), 1, True, "maths", torch.tensor([-1.0, math.nan])
        ),
        Sample("domain", 5, [7, 8], 2, torch.zeros(0, dtype=torch.bool), 0, False, None, torch.zeros(0)),
    ]
    path = tmp_path / "rollouts.safetensors"
    rows = [{"branch": "general", "position": 3, "category": "maths"}, {"branch": "domain", "position": 5}]
    assert load_rollouts(path, rows) is None
    save_rollouts(samples, 1, path)
    found, prompts_cut = load_rollouts(path, rows)
    assert prompts_cut == 1
    for one, other in zip(found, samples, strict=True):
        for name, value in vars(other).items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(getattr(one, name), value, equal_nan=True)
            else:
                assert getattr(one, name) == value, name
    assert load_rollouts(path, rows[::-1]) is None
    assert load_rollouts(path, rows[:1]) is None
    path.write_bytes(path.read_bytes()[:-9])
    assert load_rollouts(path, rows) is None


def test_logps_of_a_tool_conversation_are_put_back_where_they_were_sampled():
    # Row 1 calls a tool: prompt [1], samples [2, 3], reads the tool result [9, 9], samples [4, 5] of which 5 is cut off.
    turns = [Turn([1], [7], [-0.7]), Turn([1], [2, 3], [-0.2, -0.3]), Turn([1, 2, 3, 9, 9], [4, 5], [-0.4, -0.5])]
    logps = logps_of_turns(turns, row=1, num_rows=2, prompt=[1], completion=[2, 3, 9, 9, 4])
    assert logps.isnan().tolist() == [False, False, True, True, False]
    torch.testing.assert_close(logps[[0, 1, 4]], torch.tensor([-0.2, -0.3, -0.4]))
    assert logps_of_turns(turns, row=0, num_rows=2, prompt=[1], completion=[7]).tolist() == pytest.approx([-0.7])


def test_engine_of_transformers_gives_the_log_probs_it_drew_with(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)  # the student is probed without padding, too
    seen = []
    logps = Forward.logps
    monkeypatch.setattr(
        Forward, "logps", lambda self, *args, **kwargs: seen.append(self) or logps(self, *args, **kwargs)
    )

    def run(student_logps):
        seen.clear()
        settings = {"student_logps": student_logps, "importance_sampling_mode": "none", "max_steps": 2, "selection": False,
                    "diagnostics_steps": 0}  # fmt: skip
        trainer = make_trainer(tmp_path / student_logps, tokenizer, **settings)
        trainer.train()
        assert "generate" not in vars(trainer.model)
        return lines(tmp_path / student_logps), seen.count(trainer.student)

    of_engine, forwards = run("engine")
    of_trainer, more_forwards = run("trainer")
    losses = sum(line["train/micro_batches"] for line in of_engine)
    # None but for the loss, and to probe the student: once with padding, four times to compare with none.
    assert more_forwards > forwards == 5 + losses
    for line, other in zip(of_engine, of_trainer, strict=True):
        assert line["importance/log_ratio"] < LOGP  # float32 with a cache and without
        assert line["gap/general/mean"] == pytest.approx(other["gap/general/mean"], abs=LOGP)
        assert line["loss"] == pytest.approx(other["loss"], rel=2 * LOSS)
        assert line["rollout/general/entropy"] is None
        assert "importance/log_ratio" not in other


def test_completion_length_follows_its_schedule(tmp_path, tokenizer):
    steps = {0: 2, 1: 5, 3: 3}
    trainer = make_trainer(
        tmp_path, tokenizer, max_completion_length=steps, max_steps=4, eval_strategy="steps", eval_steps=1,
        eval_dataset={"general": make_prompts("general", count=2)},
    )  # fmt: skip
    lengths, roll_out = [], trainer.roll_out

    def watch(rows, max_tokens, *prefix):
        samples, cut = roll_out(rows, max_tokens, *prefix)
        lengths.append((max_tokens, max(sample.length for sample in samples)))
        return samples, cut

    trainer.roll_out = watch
    trainer.train()
    assert [line["rollout/max_length"] for line in lines(tmp_path)] == [2, 5, 5, 3]
    assert [limit for limit, _ in lengths[::2]] == [2, 5, 5, 3]
    assert [limit for limit, _ in lengths[1::2]] == [5, 5, 5, 5]  # evaluation, comparable at every step
    assert all(longest <= limit for limit, longest in lengths)
    assert max(longest for _, longest in lengths) > 2


def test_completion_length_of_vllm_follows_its_schedule(tmp_path, tokenizer):
    limits = []

    class Watched(FakeSampler):
        def generate(self, prompts, images, num_generations, profiler):
            limits.append(self.max_completion_length)
            return super().generate(prompts, images, num_generations, profiler)

    trainer = make_trainer(tmp_path, tokenizer, max_completion_length={0: 6, 2: 9}, max_steps=3)
    use_sampler(trainer, Watched())
    trainer.train()
    assert limits == [6, 6, 9]


def test_tool_results_are_context_and_nothing_else(tmp_path, tokenizer):
    """Tokens that a tool wrote take no part in gaps, lengths or loss, whatever the teacher says of them."""

    class Opinionated(BrokenTeacher):
        def score(self, token_ids, prompt_lens, top_k=0):
            scores = super().score(token_ids, prompt_lens)
            for score in scores:
                score.logps[2:4] = self.on_tool_tokens
            return scores

    class WithTools:
        """A `RolloutEngine` whose conversations have the result of a tool in them."""

        prompts_cut = 0

        def samples(self, rows, max_tokens):
            for place, row in enumerate(rows):
                prompt, mask = tokenizer(row["prompt"])["input_ids"], torch.tensor([1, 1, 0, 0, 1]).bool()
                ids = [*prompt, 5, 6, 7, 8, 9 + place]
                yield Sample(row["branch"], row["position"], ids, len(prompt), mask, 3, False)

    losses = []
    for on_tool_tokens in (-1.0, float("-inf")):
        teacher = Opinionated(-1.0)
        teacher.on_tool_tokens = on_tool_tokens
        folder = tmp_path / str(on_tool_tokens)
        trainer = make_trainer(folder, tokenizer, teachers={"general": teacher, "domain": make_model(1)}, max_steps=1)
        trainer.engine = WithTools()
        trainer.train()
        (line,) = lines(folder)
        assert line["rollout/general/length"] == 3
        losses.append(line["loss"])
    assert losses[0] == losses[1] != 0


def test_engine_may_give_its_samples_in_any_order(tmp_path, tokenizer):
    """One that has what the protocol says and no more: all that comes after has them in the order of the rows."""

    class Watched(StepCallback):
        def on_rolled_out(self, samples):
            seen.append([sample.position for sample in samples])

    class Engine:
        def __init__(self, turn):
            self.turn = turn

        def samples(self, rows, max_tokens):
            self.prompts_cut = 1
            asked.append([row.get("position", place) for place, row in enumerate(rows)])
            found = []
            for place, row in enumerate(rows):
                prompt, position = tokenizer(row["prompt"])["input_ids"], row.get("position", place)
                ids = [*prompt, *range(5, 7 + position % 3), 9 + position]
                count = len(ids) - len(prompt)
                mask = torch.ones(count, dtype=torch.bool)
                found.append(Sample(row["branch"], position, ids, len(prompt), mask, count, False))
            yield from found[:: self.turn]

    def run(folder, engine):
        trainer = make_trainer(
            tmp_path / folder, tokenizer, max_steps=2, eval_dataset={"general": make_prompts("general", 5)},
            callbacks=[Watched()],
        )  # fmt: skip
        trainer.engine = engine
        trainer.train()
        return lines(tmp_path / folder), trainer.evaluate()["eval_general_kl"]

    asked, seen = [], []
    (found, kl), (expected, other) = (run(str(turn), Engine(turn)) for turn in (1, -1))
    assert kl == other and seen == asked
    for line, known in zip(found, expected, strict=True):
        assert line["loss"] == known["loss"] and line["rollout/prompts_cut"] == 1


def test_engine_of_trl_takes_tokens_that_a_tool_wrote_out_of_the_mask(tmp_path, tokenizer, monkeypatch):
    """What TRL's loop over tool calls gives: 0 in its masks, which may be longer than the completion that it has cut."""
    trainer = make_trainer(tmp_path, tokenizer)
    rows = [{"prompt": text, "branch": "general", "position": place} for place, text in ((3, "ab"), (1, "c"))]
    drawn = [[11, 12], [13]], [[5, 6, 7, 8, 9], [5, 6, 7]], [[1, 1, 0, 0, 1], [1, 0, 0, 1]], None, []
    monkeypatch.setattr(DistillationTrainer, "_generate", lambda self, prompts: drawn)
    one, other = trainer.engine.samples(rows, 5)
    assert (one.position, one.token_ids, one.mask.tolist(), one.length) == (
        3, [11, 12, 5, 6, 7, 8, 9], [True, True, False, False, True], 3,
    )  # fmt: skip
    assert (other.position, other.token_ids, other.mask.tolist(), other.length) == (
        1, [13, 5, 6, 7], [True, False, False], 1,
    )  # fmt: skip


def test_completion_is_truncated_unless_its_last_token_ends_it(tmp_path, tokenizer, monkeypatch):
    """A padding token that the student has drawn ends nothing: neither transformers nor vLLM stops there."""
    model = make_model(0)
    model.generation_config.eos_token_id = [2, 5]
    trainer = make_trainer(tmp_path, tokenizer, model=model)
    completions = [[9, 9, end] for end in (0, 2, 5, 6)] + [[9, 0, 2]]
    rows = [{"prompt": "ab", "branch": "general", "position": place} for place in range(len(completions))]
    drawn = [[11, 12]] * len(completions), completions, None, None, []
    monkeypatch.setattr(DistillationTrainer, "_generate", lambda self, prompts: drawn)
    found = [sample.truncated for sample in trainer.engine.samples(rows, 3)]
    assert tokenizer.pad_token_id == 0 and found == [True, False, False, True, False]


LOGPS = torch.tensor([-1, math.nan, -2])
SAMPLES = [
    Sample("general", 3, [4, 5, 6, 7], 1, torch.tensor([True, False, True]), 2, True, None, LOGPS),
    Sample("domain", 5, [7, 8, 9], 2, torch.tensor([True]), 4, False, None, torch.tensor([-0.5])),  # cut to a prefix
]  # fmt: skip
ROWS = [{"branch": "general", "position": 3}, {"branch": "domain", "position": 5}]


@pytest.fixture
def altered(tmp_path):
    """What `load_rollouts` makes of a file of `SAMPLES` after a change of its tensors and metadata."""

    def altered(change):
        path = tmp_path / "rollouts.safetensors"
        save_rollouts(SAMPLES, 1, path)
        with safe_open(path, framework="pt") as file:
            metadata, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        change(tensors, metadata)
        save_file(tensors, path, metadata=metadata)
        return load_rollouts(path, ROWS)

    return altered


def test_kept_rollouts_that_nobody_has_changed_are_taken(altered):
    found, prompts_cut = altered(lambda tensors, metadata: None)
    assert prompts_cut == 1 and [sample.token_ids for sample in found] == [sample.token_ids for sample in SAMPLES]


TENSORS = ["token_ids", "lengths", "prompt_len", "position", "truncated", "sampled", "mask", "rollout_logps"]
CHANGES = {
    **{f"{name} without": lambda t, m, n=name: t.pop(n) for name in TENSORS if name != "rollout_logps"},
    **{f"{name} shorter": lambda t, m, n=name: t.update({n: t[n][:-1].clone()}) for name in TENSORS},
    **{f"{name} longer": lambda t, m, n=name: t.update({n: torch.cat([t[n], t[n][:1]])}) for name in TENSORS},
    **{f"{name} 2-D": lambda t, m, n=name: t.update({n: t[n][:, None].clone()}) for name in TENSORS},
    **{f"{name} 0-D": lambda t, m, n=name: t.update({n: t[n][0].clone()}) for name in TENSORS},
    **{f"{name} in float64": lambda t, m, n=name: t.update({n: t[n].double()}) for name in TENSORS},
    "a tensor more": lambda t, m: t.update(more=torch.zeros(2)),
    "lengths negative": lambda t, m: t.update(lengths=torch.tensor([-4, 11])),
    "lengths huge": lambda t, m: t.update(lengths=torch.tensor([2**62, 2**62])),
    "prompts longer than all": lambda t, m: t.update(prompt_len=torch.tensor([5, 2])),
    "no prompt": lambda t, m: t.update(prompt_len=torch.tensor([0, 3])),
    "negative tokens": lambda t, m: t.update(token_ids=-t["token_ids"]),
    "nothing sampled": lambda t, m: t.update(mask=torch.zeros(4, dtype=torch.bool)),
    "more marked than sampled": lambda t, m: t.update(sampled=torch.tensor([1, 1])),
    "log-probs infinite": lambda t, m: t.update(rollout_logps=-torch.full((4,), math.inf)),
    "no branches": lambda t, m: m.pop("branch"),
    "branches null": lambda t, m: m.update(branch="null"),
    "branches an object": lambda t, m: m.update(branch="{}"),
    "branches numbers": lambda t, m: m.update(branch="[1, 2]"),
    "branches too deep": lambda t, m: m.update(branch="[" * 10**5),
    "branches of others": lambda t, m: m.update(branch='["domain", "general"]'),
    "one branch": lambda t, m: m.update(branch='["general"]'),
    "cut negative": lambda t, m: m.update(prompts_cut="-1"),
    "cut too many": lambda t, m: m.update(prompts_cut="3"),
    "cut no number": lambda t, m: m.update(prompts_cut="1.5"),
    "cut missing": lambda t, m: m.pop("prompts_cut"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_kept_rollouts_that_were_changed_are_rolled_out_again(altered, change, caplog):
    with caplog.at_level(logging.WARNING, logger="camopd"):
        assert altered(CHANGES[change]) is None
    if change != "branches of others":
        assert "rollouts.safetensors cannot be used (" in caplog.text and "the step is rolled out again" in caplog.text


@pytest.mark.parametrize("content", [b"", b"x", bytes(8), b"\xff" * 16, b"\x02" + bytes(7) + b"{}", bytes(range(256))])
def test_file_that_is_no_safetensors_is_rolled_out_again(tmp_path, content):
    (tmp_path / "rollouts.safetensors").write_bytes(content)
    assert load_rollouts(tmp_path / "rollouts.safetensors", ROWS) is None


def test_prompt_without_a_token_stops_every_rank(tmp_path, tokenizer, monkeypatch):
    """A template may write what the tokenizer drops; only the rank that has the row would see it."""
    trainer = make_trainer(tmp_path, tokenizer)
    told = []
    monkeypatch.setattr("camopd.rollouts.gather_object", lambda mine: (told.extend(mine), mine)[1])
    monkeypatch.setattr(trainer.reader, "ids", lambda rows: tokenize(rows[0], lambda **_: {"input_ids": []}))
    with pytest.raises(ValueError, match="of which the tokenizer makes no token"):
        trainer.train()
    assert told and told[0][0] is ValueError and "makes no token" in told[0][1]
