"""Rollouts: how long they are, from which engine, with tools, and on disk."""

import math

import pytest
import torch
from conftest import LOGP, LOSS, make_model, make_prompts
from steps import FakeSampler, use_sampler
from trainers import BrokenTeacher, lines, make_trainer
from trl import DistillationTrainer

from camopd.forward import Forward
from camopd.rollouts import Turn, load_rollouts, logps_of_turns, save_rollouts
from camopd.samples import Sample


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
    assert more_forwards > forwards == 1 + losses  # none but for the loss, and to probe the student once
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
