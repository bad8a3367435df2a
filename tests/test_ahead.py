"""Rollouts that are scored as they are written, and those of a step ahead: held against a plain loop over the steps."""

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy

import pytest
import torch
from conftest import make_model, make_prompts
from trainers import lines, make_trainer
from transformers import TrainerCallback

from camopd import TokenScores
from camopd.errors import TeacherError
from camopd.samples import Sample
from camopd.signals import RunInterrupted


END = 2


def write(model, prompt, max_tokens, seed):
    """A completion drawn token by token, and its log-probs."""
    generator = torch.Generator().manual_seed(seed)
    ids, logps = list(prompt), []
    while len(logps) < max_tokens and (not logps or ids[-1] != END):
        with torch.no_grad():
            row = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        ids.append(int(torch.multinomial(row.exp(), 1, generator=generator)))
        logps.append(float(row[ids[-1]]))
    return ids[len(prompt):], logps  # fmt: skip


class Flight:
    def __init__(self, work, prompts_cut):
        self.work, self.prompts_cut, self.cancelled = work, prompts_cut, False

    def samples(self):
        for future in self.work:
            yield future.result(60)

    def done(self):
        return all(future.done() for future in self.work)

    def cancel(self):
        self.cancelled = True


class Engine:
    """Writes in a thread of its own with a copy of the student's weights as they were when it was asked."""

    def __init__(self, trainer, gate=None):
        self.trainer, self.gate, self.asked = trainer, gate, []
        self.pool = ThreadPoolExecutor(1)

    def start(self, rows, max_tokens, number, finished):
        weights = deepcopy(self.trainer.accelerator.unwrap_model(self.trainer.model)).eval()
        prompts = self.trainer.reader.ids(rows)
        self.asked.append((number, [row.get("position", place) for place, row in enumerate(rows)]))

        def one(place):
            if self.gate is not None:
                self.gate(number)
            row, prompt = rows[place], prompts[place]
            position = row.get("position", place)
            completion, logps = write(weights, prompt, max_tokens, 1000 * (number or 0) + position)
            sample = Sample(
                branch=row["branch"], position=position, token_ids=prompt + completion, prompt_len=len(prompt),
                mask=torch.ones(len(completion), dtype=torch.bool), length=len(completion),
                truncated=completion[-1] != END, rollout_logps=torch.tensor(logps),
            )  # fmt: skip
            finished(sample)
            return sample

        # The longest prompts first, so not in the order of the rows.
        order = sorted(range(len(rows)), key=lambda place: -len(prompts[place]))
        return Flight([self.pool.submit(one, place) for place in order], 0)


class Remote:
    """A teacher that says when it was asked, and answers in threads."""

    def __init__(self, name, seed):
        self.name, self.model, self.asked = name, make_model(seed), []
        self.pool = ThreadPoolExecutor(2)

    def score(self, token_ids, prompt_lens, top_k=0):
        return self.submit(token_ids, prompt_lens, top_k).result()

    def submit(self, token_ids, prompt_lens, top_k=0) -> Future:
        self.asked.append((time.perf_counter(), len(token_ids)))

        def answer():
            found = []
            for ids, start in zip(token_ids, prompt_lens, strict=True):
                with torch.no_grad():
                    logps = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
                found.append(TokenScores(logps[start - 1 : -1].gather(1, torch.tensor(ids[start:])[:, None])[:, 0]))
            return found

        return self.pool.submit(answer)


def streaming(tmp_path, tokenizer, gate=None, lag=0, **kwargs):
    teachers = {"general": Remote("g", 2), "domain": Remote("d", 3)}
    trainer = make_trainer(
        tmp_path, tokenizer, **{"teachers": teachers, "prompts_per_step": 4, "optim": "sgd", **kwargs}
    )
    trainer.args.rollout_lag = lag
    trainer.engine = Engine(trainer, gate)
    return trainer


def watched(trainer):
    """What `take` gave in each step, with the weights then and the branch."""
    seen, take = [], trainer.rollouts.take

    def watch(rows, *limits):
        weights = deepcopy(trainer.accelerator.unwrap_model(trainer.model)).eval()
        samples, cut = take(rows, *limits)
        seen.append((trainer.step.number, weights, [list(sample.token_ids) for sample in samples]))
        return samples, cut

    trainer.rollouts.take = watch
    return seen


@pytest.mark.parametrize("lag", [0, 1])
def test_completions_are_of_the_weights_of_so_many_updates_before(tmp_path, tokenizer, lag):
    trainer = streaming(tmp_path, tokenizer, lag=lag)
    seen = watched(trainer)
    trainer.train()
    assert [number for number, _, _ in seen] == [0, 1, 2, 3]
    assert [number for number, _ in trainer.engine.asked] == [0, 1, 2, 3]  # each once, and none after the last
    weights = [model for _, model, _ in seen]
    for number, _, found in seen:
        rows = trainer.train_dataset.rows_of(number)
        drawn_by = weights[max(0, number - lag)]
        for row, prompt, ids in zip(rows, trainer.reader.ids(rows), found, strict=True):
            completion, _ = write(drawn_by, prompt, 6, 1000 * number + row["position"])
            assert ids == prompt + completion
    recorded = lines(tmp_path)
    assert [line["rollout/lag"] for line in recorded] == [0, *[lag] * 3]
    assert [line["branch"] for line in recorded] == ["general", "general", "general", "domain"]
    # By the weights of now the ratio is 1 to rounding, and else it is not.
    for line in recorded:
        assert (line["importance/log_ratio"] < 1e-5) == (line["rollout/lag"] == 0)


def test_each_sample_goes_to_its_teacher_when_it_is_written(tmp_path, tokenizer):
    written = []
    trainer = streaming(
        tmp_path, tokenizer, max_steps=1, gate=lambda number: (time.sleep(0.1), written.append(time.perf_counter()))
    )
    trainer.train()
    asked = trainer.teachers["general"].asked
    assert [count for _, count in asked] == [1, 1, 1, 1]  # one by one, and none twice
    for place in range(3):  # the first is asked before the third is written, and so on
        assert asked[place][0] < written[place + 1] + 0.05
    (line,) = lines(tmp_path)
    assert line["time/general/teacher_hidden"] > 0.7 * line["time/general/teacher"]
    assert line["time/rollout/writing"] >= 0.4 and line["time/rollout/hidden"] < 0.1


def test_step_ahead_is_written_while_the_step_trains(tmp_path, tokenizer):
    """The second step's completions are held back until the first step's update is made."""
    updated = threading.Event()
    trainer = streaming(tmp_path, tokenizer, lag=1, max_steps=2,
                        gate=lambda number: number == 0 or updated.wait(60))  # fmt: skip

    class Updated(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            updated.set()

    trainer.add_callback(Updated())
    trainer.train()
    assert updated.is_set() and len(lines(tmp_path)) == 2


@pytest.mark.parametrize("lag", [0, 1])
def test_losses_are_those_of_samples_that_are_scored_together(tmp_path, tokenizer, lag):
    """What is scored one by one has the log-probs of the whole batch, to rounding."""
    trainer = streaming(tmp_path / "a", tokenizer, lag=lag)
    trainer.train()
    other = streaming(tmp_path / "b", tokenizer, lag=lag)
    other.scorer.ask = lambda *args: None  # all at the end
    other.train()
    for one, two in zip(lines(tmp_path / "a"), lines(tmp_path / "b"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4, abs=1e-6)
        branch = one["branch"]
        assert one[f"selection/{branch}/kept"] == two[f"selection/{branch}/kept"]


def test_run_with_a_step_ahead_goes_on_exactly(tmp_path, tokenizer):
    """A checkpoint holds the completions of the step after it, whose weights are gone."""
    whole = streaming(tmp_path / "whole", tokenizer, lag=1, max_steps=4)
    whole.train()
    first = streaming(tmp_path / "cut", tokenizer, lag=1, max_steps=4, save_strategy="steps", save_steps=2)

    def stop(number):
        if number == 3:
            raise TeacherError("the rollout server is gone")

    first.engine.gate = stop
    with pytest.raises(TeacherError, match="is gone"):
        first.train()
    second = streaming(tmp_path / "cut", tokenizer, lag=1, max_steps=4, save_strategy="steps", save_steps=2)
    second.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    assert [number for number, _ in second.engine.asked] == [3]  # that of step 2 comes from the checkpoint
    keys = ("loss", "grad_norm", "importance/log_ratio", "rollout/lag")
    assert [[line[key] for key in keys] for line in lines(tmp_path / "whole")][3] == [
        lines(tmp_path / "cut")[3][key] for key in keys
    ]
    for one, two in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_evaluation_finds_the_step_ahead_written_and_leaves_it(tmp_path, tokenizer):
    held_out = {"general": make_prompts("general", count=2)}
    runs = []
    for name, more in (
        ("without", {}),
        ("with", {"eval_dataset": held_out, "eval_strategy": "steps", "eval_steps": 1}),
    ):
        trainer = streaming(tmp_path / name, tokenizer, lag=1, **more)
        done, start = [], trainer.engine.start

        def look(rows, max_tokens, number, finished, start=start, trainer=trainer, done=done):
            if number is None and trainer.rollouts._ahead is not None:
                done.append(trainer.rollouts._ahead.flight.done())
            return start(rows, max_tokens, number, finished)

        trainer.engine.start = look
        trainer.train()
        runs.append(trainer)
        assert all(done) and bool(done) == (name == "with")
    assert [line["loss"] for line in lines(tmp_path / "with")] == [
        line["loss"] for line in lines(tmp_path / "without")
    ]
    for one, two in zip(*(run.model.parameters() for run in runs), strict=True):
        assert torch.equal(one, two)


def test_signal_does_not_wait_for_the_step_ahead(tmp_path, tokenizer):
    never = threading.Event()
    trainer = streaming(
        tmp_path,
        tokenizer,
        lag=1,
        gate=lambda number: number != 2 or never.wait(30),
        save_strategy="steps",
        save_steps=9,
    )
    begin_next = trainer.rollouts.begin_next

    def begin_and_hear(step):
        begin_next(step)
        if step.number == 1:
            trainer.stops.heard = "SIGTERM"

    trainer.rollouts.begin_next = begin_and_hear
    started = time.monotonic()
    with pytest.raises(RunInterrupted, match="SIGTERM: stopped"):
        trainer.train()
    assert time.monotonic() - started < 25
    never.set()
    second = streaming(tmp_path, tokenizer, lag=1, save_strategy="steps", save_steps=9)
    second.train(resume_from_checkpoint=True)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
