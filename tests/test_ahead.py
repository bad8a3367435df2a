"""Rollouts that are scored as they are written, and those of a step ahead, held against a plain loop over the steps.

The servers are those of fake_rollouts.py, held back where a test says so.
"""

import json
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_prompts
from fake_rollouts import FakeRollouts
from trainers import lines, make_args, make_trainer
from transformers import TrainerCallback

from camopd import TokenScores
from camopd.errors import GuardError, RolloutError, TeacherError
from camopd.rollout_servers import seed_of
from camopd.signals import RunInterrupted
from camopd.step import StepCallback


END = 2


def write(model, prompt, max_tokens, seed):
    """A completion drawn token by token."""
    generator, ids = torch.Generator().manual_seed(seed), list(prompt)
    while len(ids) < len(prompt) + max_tokens and (len(ids) == len(prompt) or ids[-1] != END):
        with torch.no_grad():
            row = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        ids.append(int(torch.multinomial(row.exp(), 1, generator=generator)))
    return ids


class Remote:
    """A teacher that notes when it was asked for how many, and answers in threads."""

    def __init__(self, name, seed):
        self.name, self.model, self.asked, self.pool = name, make_model(seed), [], ThreadPoolExecutor(2)

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


@pytest.fixture
def run(tokenizer, tmp_path):
    """Make a trainer with rollout servers of its own, `trainer.servers`, the first of which is `trainer.server`.

    What its engine has begun is in `trainer.flights`, the newest last.
    """
    made = []

    def run(folder="run", lag=0, servers=1, **settings):
        started = [FakeRollouts(make_model(9), tokenizer) for _ in range(servers)]
        trainer = make_trainer(
            tmp_path / folder, tokenizer, rollout_servers=[server.url for server in started], rollout_lag=lag, optim="sgd",
            **{"teachers": {"general": Remote("g", 2), "domain": Remote("d", 3)}, **settings},
        )  # fmt: skip
        trainer.servers, trainer.server, trainer.flights = started, started[0], []
        start = trainer.engine.start

        def start_and_note(*args):
            trainer.flights.append(start(*args))
            return trainer.flights[-1]

        trainer.engine.start = start_and_note
        made.append(trainer)
        return trainer

    yield run
    for trainer in made:
        trainer.run.sampler.close()
        for server in trainer.servers:
            server.close()


def asked(trainer):
    """How many completions the server was asked for, by step."""
    seeds = [body["seed"] for body in trainer.server.written]
    names = [
        ("step", number, row["branch"], row["position"])
        for number in range(trainer.args.max_steps) for row in trainer.train_dataset.rows_of(number)
    ]  # fmt: skip
    found = {seed_of(trainer.args.seed, *name): name[1] for name in names}
    return [sum(found.get(seed) == number for seed in seeds) for number in range(trainer.args.max_steps)]


def hold(trainer, number, event):
    """Hold back the completions of one step until the event."""
    seeds = {seed_of(trainer.args.seed, "step", number, row["branch"], row["position"])
             for row in trainer.train_dataset.rows_of(number)}  # fmt: skip
    write = trainer.server.write
    trainer.server.write = lambda body: (body["seed"] not in seeds or event.wait(60)) and write(body)


@pytest.mark.parametrize("lag", [0, 1])
def test_completions_are_of_the_weights_of_so_many_updates_before(run, tmp_path, lag):
    trainer = run(lag=lag)
    seen, take = [], trainer.rollouts.take

    def watch(rows, *limits):
        samples, cut = take(rows, *limits)
        student = deepcopy(trainer.accelerator.unwrap_model(trainer.model)).eval()
        seen.append((student, [sample.token_ids for sample in samples]))
        return samples, cut

    trainer.rollouts.take = watch
    trainer.train()
    assert asked(trainer) == [4, 4, 4, 4]  # each once, and none after the last step
    for number, (_, found) in enumerate(seen):
        rows, (drawn_by, _) = trainer.train_dataset.rows_of(number), seen[max(0, number - lag)]
        for row, prompt, ids in zip(rows, trainer.reader.ids(rows), found, strict=True):
            seed = seed_of(trainer.args.seed, "step", number, row["branch"], row["position"])
            assert ids == write(drawn_by, prompt, 6, seed)
    recorded = lines(tmp_path / "run")
    assert [line["rollout/lag"] for line in recorded] == [0, lag, lag, lag]
    for line in recorded:  # by the weights of now the ratio is 1 to rounding, and else it is not
        assert (line["importance/log_ratio"] < 1e-5) == (line["rollout/lag"] == 0)


def test_each_sample_goes_to_its_teacher_when_it_is_written(run, tmp_path):
    trainer, written, turn = run(max_steps=1), [], threading.Lock()

    def one_by_one():
        with turn:
            time.sleep(1)  # a busy machine has taken two seconds from asking to waiting
            written.append(time.perf_counter())

    trainer.server.before = one_by_one
    trainer.train()
    times = [at for at, _ in trainer.teachers["general"].asked]
    assert [count for _, count in trainer.teachers["general"].asked] == [1, 1, 1, 1]  # one by one, and none twice
    assert times[0] < written[2] and times[1] < written[3]
    (line,) = lines(tmp_path / "run")
    assert line["time/general/teacher_hidden"] > 0.5 * line["time/general/teacher"]
    assert line["time/rollout/writing"] >= 4 and line["time/rollout/hidden"] < 0.5 * line["time/rollout/writing"]


def test_step_ahead_is_written_while_the_step_trains(run, tmp_path):
    """The second step's completions are held back until the first step's update is made."""
    trainer, updated = run(lag=1, max_steps=2), threading.Event()
    hold(trainer, 1, updated)

    class Updated(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            time.sleep(2)  # far longer than a busy machine takes between asking and waiting
            updated.set()

    trainer.add_callback(Updated())
    trainer.train()
    first, second = lines(tmp_path / "run")
    assert second["time/rollout/hidden"] > 2 > first["time/rollout/hidden"]


@pytest.mark.parametrize("lag", [0, 1])
def test_samples_that_are_scored_one_by_one_make_the_losses_of_those_scored_together(run, tmp_path, lag):
    run("one", lag=lag).train()
    together = run("two", lag=lag)
    together.scorer.ask = lambda *args: None  # all at the end
    together.train()
    for one, two in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert one["loss"] == two["loss"]
        assert one[f"selection/{one['branch']}/kept"] == two[f"selection/{two['branch']}/kept"]


def test_prefix_alone_is_scored_of_a_completion_that_is_written_whole(run, tmp_path):
    trainer = run(max_steps=1, loss_prefix_tokens=2)
    lengths, submit = [], trainer.teachers["general"].submit

    def look(token_ids, prompt_lens, top_k=0):
        lengths.extend(len(ids) - start for ids, start in zip(token_ids, prompt_lens, strict=True))
        return submit(token_ids, prompt_lens, top_k)

    trainer.teachers["general"].submit = look
    trainer.train()
    assert len(lengths) == 4 and max(lengths) == 2
    assert lines(tmp_path / "run")[0]["rollout/general/length"] > 2


def wait_before_scoring(trainer):
    """Until the next step's completions are there to be compared."""
    score = trainer.scorer.score

    def wait_and_score(*args, **kwargs):
        trainer.flights[-1].wait()
        return score(*args, **kwargs)

    trainer.scorer.score = wait_and_score


def test_servers_that_did_not_get_the_weights_of_now_stop_the_run_before_the_update(run, tmp_path):
    trainer = run(lag=1, learning_rate=0.3)
    sync = trainer.engine.sync
    trainer.engine.sync = lambda under_way: trainer.state.global_step == 2 or sync(under_way)
    wait_before_scoring(trainer)
    with pytest.raises(GuardError, match=r"step 3 .*: the log-probs of the trainer and of the rollout server at"):
        trainer.train()
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2]


@pytest.mark.parametrize("stale", [0, 1])
def test_one_server_of_two_that_keeps_old_weights_has_its_turn_and_is_named(run, stale, tmp_path):
    trainer = run(lag=1, learning_rate=0.3, servers=2, prompts_per_step=8, max_steps=8)
    server, given = trainer.servers[stale], []
    reload = server.reload
    server.reload = lambda folder: (
        given.append(folder) or (reload(folder) if len(given) < 3 else (200, json.dumps({"results": [None]})))
    )
    wait_before_scoring(trainer)
    with pytest.raises(GuardError, match=rf"step [34] .* of the rollout server at {server.url}, for the same tokens"):
        trainer.train()
    assert len(given) >= 3


def test_student_with_a_device_of_its_own_scores_while_others_are_written(run, tmp_path, monkeypatch):
    run("late", score_tokens=70).train()
    trainer, turn, read = run("early", score_tokens=70), threading.Lock(), []
    monkeypatch.setattr(trainer.rollouts, "student_is_free", lambda rows: True)
    read_student = trainer.scorer.read_student

    def look(samples, prefix):
        done = trainer.flights[-1].done()
        read.append((len(samples), done))
        read_student(samples, prefix)

    def one_by_one():
        with turn:
            time.sleep(0.1)

    trainer.scorer.read_student, trainer.server.before = look, one_by_one
    trainer.train()
    assert [count for count, _ in read] == [1] * 16  # each sample once
    assert sum(not done for _, done in read) >= 8
    for one, two in zip(lines(tmp_path / "late"), lines(tmp_path / "early"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5) and one["entropy"] == pytest.approx(
            two["entropy"], rel=1e-5
        )


def test_run_with_a_step_ahead_goes_on_exactly(run, tmp_path):
    """A checkpoint holds the completions of the step after it: the weights that wrote them are gone."""
    whole = run("whole", lag=1)
    whole.train()
    settings = {"lag": 1, "save_strategy": "steps", "save_steps": 2}
    run("cut", **settings).train()
    second = run("cut", **settings)
    second.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    assert asked(second) == [0, 0, 0, 4]  # those of the third step come from the checkpoint
    keys = ("loss", "grad_norm", "importance/log_ratio", "rollout/lag")
    found = [[[line[key] for key in keys] for line in lines(tmp_path / name)] for name in ("whole", "cut")]
    assert found[0] == found[1]
    for one, two in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_server_that_is_gone_a_step_ahead_costs_no_step(run, tmp_path):
    settings = {"lag": 1, "save_strategy": "steps", "save_steps": 9, "teacher_timeout": 1.0}
    first = run(**settings)

    class Gone(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                first.server.close()

    first.add_callback(Gone())
    with pytest.raises(RolloutError, match=r"Nothing is lost: the weights after step [23]"):
        first.train()
    second = run(**settings)
    second.train(resume_from_checkpoint="auto")
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4]


def test_one_of_two_servers_that_dies_a_step_ahead_changes_no_sample(run, tmp_path, start_server):
    def samples_of(killed):
        replicas = [start_server() for _ in range(2)]
        urls = [server.url for server in replicas]
        trainer = run(killed, lag=1, servers=2, max_steps=3, teachers={"general": urls, "domain": urls})
        seen, dead, begun, turn = [], [], [], threading.Lock()
        begin_next = trainer.rollouts.begin_next
        trainer.rollouts.begin_next = lambda step: begun.append(step.number) or begin_next(step)

        def die(server):
            with turn:
                if begun == [0, 1] and not dead:  # the third step is written
                    dead.append(server)
                    server.close()

        for server in {"rollouts": trainer.servers, "teacher": replicas, "none": ()}[killed]:
            server.before = partial(die, server)

        class Seen(StepCallback):
            def on_step_ready(self, step):
                seen.append([(sample.token_ids, sample.teacher_logps.tolist()) for sample in step.samples])

        trainer.add_callback(Seen())
        trainer.train()
        assert len(dead) == (killed != "none")
        return seen, [line["loss"] for line in lines(tmp_path / killed)]

    calm = samples_of("none")
    assert samples_of("rollouts") == calm and samples_of("teacher") == calm
    assert [line["rollout/lag"] for line in lines(tmp_path / "teacher")] == [0, 1, 1]


def test_evaluation_finds_the_step_ahead_written_and_leaves_it(run, tmp_path):
    trainers = []
    held_out = {
        "eval_dataset": {"general": make_prompts("general", count=2)},
        "eval_strategy": "steps",
        "eval_steps": 1,
    }
    for name, more in (("without", {}), ("with", held_out)):
        trainer = run(name, lag=1, **more)
        done, start = [], trainer.engine.start

        def look(rows, max_tokens, words, *more, start=start, trainer=trainer, done=done):
            if words == ("evaluation",) and trainer.state.global_step < trainer.args.max_steps:
                done.append(all(flight.done() for flight in trainer.flights))
            return start(rows, max_tokens, words, *more)

        trainer.engine.start, trainer.server.before = look, lambda: time.sleep(0.2)  # longer than the rest of a step
        trainer.train()
        assert all(done) and bool(done) == (name == "with")
        trainers.append(trainer)
    one, two = ([line["loss"] for line in lines(tmp_path / name)] for name in ("with", "without"))
    assert one == two
    for one, two in zip(*(trainer.model.parameters() for trainer in trainers), strict=True):
        assert torch.equal(one, two)


def test_signal_does_not_wait_for_the_step_ahead(run, tmp_path):
    settings = {"lag": 1, "save_strategy": "steps", "save_steps": 9}
    trainer, never = run(**settings), threading.Event()
    hold(trainer, 2, never)
    begin_next = trainer.rollouts.begin_next

    def begin_and_hear(step):
        begin_next(step)
        if step.number == 1:
            trainer.stops.heard = "SIGTERM"

    trainer.rollouts.begin_next = begin_and_hear
    started = time.monotonic()
    with pytest.raises(RunInterrupted, match="SIGTERM: stopped"):
        trainer.train()
    assert time.monotonic() - started < 30
    never.set()
    second = run(**settings)
    second.train(resume_from_checkpoint=True)
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4]
    assert asked(second) == [0, 0, 4, 4]  # the second step's were kept


def test_signal_while_a_save_waits_for_the_step_ahead_leaves_the_checkpoint_of_the_save(run, tmp_path):
    settings = {"lag": 1, "save_strategy": "steps", "save_steps": 2}
    trainer, never = run(**settings), threading.Event()
    hold(trainer, 2, never)
    drain = trainer.rollouts.drain

    def drain_and_hear():
        threading.Timer(0.3, lambda: setattr(trainer.stops, "heard", "SIGTERM")).start()
        return drain()

    trainer.rollouts.drain = drain_and_hear
    with pytest.raises(RunInterrupted, match=r"SIGTERM: stopped; the weights after step 2 are in .*checkpoint-2"):
        trainer.train()
    never.set()
    run(**settings).train(resume_from_checkpoint="auto")
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4]


def test_save_whose_step_ahead_has_no_server_left_is_made(run, tmp_path):
    first, gone = run(lag=1, save_strategy="steps", save_steps=2, teacher_timeout=1.0), threading.Event()
    hold(first, 2, gone)

    class Gone(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                first.server.close()
                gone.set()

    first.add_callback(Gone())
    with pytest.raises(RolloutError, match=r"Nothing is lost: the weights after step 2 are in .*checkpoint-2"):
        first.train()


def test_steps_ahead_need_servers_and_the_trainers_log_probs(tmp_path):
    with pytest.raises(ValueError, match=r"rollout_lag=1 .* there are none. Set rollout_servers"):
        make_args(tmp_path, rollout_lag=1)
    with pytest.raises(ValueError, match=r"student_logps='engine' with rollout_lag=1 .* Leave student_logps"):
        make_args(tmp_path, rollout_lag=1, rollout_servers=["http://localhost:1"], student_logps="engine")
    with pytest.raises(ValueError, match="rollout_lag must be 0 or 1"):
        make_args(tmp_path, rollout_lag=2, rollout_servers=["http://localhost:1"])
    assert not (Path(tmp_path) / "metrics.jsonl").exists()


def test_teacher_that_was_gone_while_completions_were_written_is_asked_again(run, tmp_path):
    """As it is where nothing is asked before all are written; one that is still gone stops the run."""
    plain = run("plain")
    plain.train()
    trainer = run()
    teacher, failed = trainer.teachers["general"], []

    def fail(count):
        submit = teacher.submit

        def gone(token_ids, *more):
            if len(failed) == count:
                return submit(token_ids, *more)
            failed.append(token_ids)
            answers = Future()
            answers.set_exception(TeacherError("no replica left"))
            return answers

        teacher.submit = gone

    fail(3)
    trainer.train()
    assert len(failed) == 3
    assert [line["loss"] for line in lines(tmp_path / "run")] == [line["loss"] for line in lines(tmp_path / "plain")]
    stays = run("stays")
    teacher, failed = stays.teachers["general"], []
    fail(1000)
    with pytest.raises(TeacherError, match="no replica left"):
        stays.train()
    assert len(failed) <= 2 * 4  # each sample twice at most


def test_servers_whose_weights_are_never_seen_are_warned_of(run, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("camopd.callbacks.guards.UNSEEN", 2)
    trainer = run(lag=1)
    monkeypatch.setattr(trainer.rollouts, "compare", lambda step: None)  # as where none is finished
    trainer.train()
    assert caplog.text.count("was not seen in 2 steps") == 1 and "log_ratio" in caplog.text
    caplog.clear()
    trainer = run("seen", lag=1)
    compare = trainer.rollouts.compare

    def when_one_is_finished(step):
        next(trainer.flights[-1].samples())
        compare(step)

    monkeypatch.setattr(trainer.rollouts, "compare", when_one_is_finished)
    trainer.train()
    assert "was not seen" not in caplog.text
