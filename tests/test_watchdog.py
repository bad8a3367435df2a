"""Who is waited for: by hand with a clock and a store of the test's own, and with two processes of which one is stopped.

As a script for torchrun: tests/test_watchdog.py FOLDER
"""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model, make_prompts, make_tokenizer
from trainers import lines, make_trainer
from transformers import TrainerCallback

from camopd import watchdog
from camopd.teachers.local import LocalTeacher
from camopd.watchdog import Board, Watchdog, current, phase


TESTS = Path(__file__).parent


class Store(dict):
    """A store whose `get` of a missing key is an error, where a real one would wait."""

    extended = True

    def set(self, key, value):
        self[key] = value

    def get(self, key):
        return self[key].encode()

    def check(self, keys):
        return all(key in self for key in keys)

    def has_extended_api(self):
        return self.extended

    def multi_get(self, keys):
        assert self.extended
        return [self.get(key) for key in keys]


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test moves it: `clock.now += seconds`."""
    clock = SimpleNamespace(now=1000.0)
    times = SimpleNamespace(monotonic=lambda: clock.now, time=lambda: 1e9 + clock.now)
    monkeypatch.setattr(watchdog, "time", times)
    return clock


def test_phase_is_what_is_done_now_and_ends_with_its_block(clock):
    before = current().what
    with phase("outer"):
        clock.now += 5
        with contextlib.suppress(ValueError), phase("inner"):
            assert current()[:2] == ("inner", clock.now)
            clock.now += 5
            raise ValueError
        assert current()[:2] == ("outer", clock.now)
    assert current().what == before


def test_phase_with_parts_is_told_from_its_own_beginning(clock):
    """An evaluation asks a teacher after each batch."""
    store = Store()
    dogs = [Watchdog(rank, Board(store, rank, 2)) for rank in range(2)]
    with phase("training"):
        clock.now += 500  # of another phase
        with phase("evaluation"):
            for _ in range(2):
                clock.now += 50
                with phase("evaluation: teacher 'general'"):
                    clock.now += 5
            assert dogs[0].report() == ("", False)
            for _ in range(7):
                clock.now += 10
                dogs[1].beat()
            with phase("evaluation: teacher 'domain'"):
                clock.now += 61
                dogs[0].beat()
                text = dogs[0].report()[0]
                assert text.startswith("evaluation: teacher 'domain', for 61 s so far. rank 1 (")
                assert text.endswith("is in evaluation, for 180 s")
            clock.now += 61
            dogs[1].beat()
            dogs[0].beat()
            assert dogs[0].report()[0] == "evaluation, for 302 s so far, 61 s since its last part ended"
        clock.now += 61
        dogs[1].beat()
        dogs[0].beat()
        assert dogs[0].report()[0] == "training, for 61 s so far"


@pytest.mark.parametrize("seconds_per_look", [1, 7])
def test_phase_of_one_process_is_told_after_1_5_10_20_minutes(clock, seconds_per_look):
    dog = Watchdog()
    with phase("step 12: train"):
        start, told = clock.now, []
        while clock.now < start + 2500:
            clock.now += seconds_per_look
            text, alarm = dog.report()
            assert not alarm
            if text:
                told.append(clock.now - start)
                assert text == f"step 12: train, for {told[-1]:.0f} s so far"
    assert [time // seconds_per_look for time in told] == [
        -(-t // seconds_per_look) for t in (60, 300, 600, 1200, 2400)
    ]


@pytest.mark.parametrize("what", ["step 12: rollout", "step 12: rollout: rollout servers (http://host:1)"])
def test_rollout_of_a_minute_is_not_told(what, clock):
    dog = Watchdog()
    with phase(what):
        for seconds, told in ((61, False), (200, False), (40, True), (100, False), (200, True)):
            clock.now += seconds
            assert bool(dog.report()[0]) is told


def test_rank_that_falls_silent_after_the_first_report_is_told_of_at_once_and_once(clock):
    store = Store()
    dogs = [Watchdog(rank, Board(store, rank, 2)) for rank in range(2)]
    with phase("step 2: rollout"):
        found = []
        for tick in range(20):
            clock.now += 10
            for dog in dogs[: 2 if tick < 7 else 1]:
                dog.beat()
            found.append(dogs[0].report())
    alarms = [place for place, (_, alarm) in enumerate(found) if alarm]
    assert alarms == [10] and "rank 1 (" in found[10][0] and "no sign of life for 40 s" in found[10][0]
    assert all(text == "" for place, (text, _) in enumerate(found) if place != 10)


def test_rank_that_has_left_is_an_alarm_and_silences_no_other(clock):
    store = Store()
    boards = [Board(store, rank, 3) for rank in range(3)]
    dogs = [Watchdog(rank, board) for rank, board in enumerate(boards)]
    boards[0].put(watchdog.Phase(watchdog.ENDED, clock.now))

    def found(what):
        with phase(what):
            for _ in range(7):
                clock.now += 10
                for dog in dogs[1:]:
                    dog.beat()
            return [dog.report() for dog in dogs[1:]]

    (text, alarm), other = found("step 2: train")
    assert alarm and "rank 0 (" in text and text.endswith("has left training")
    assert other == ("", False)
    assert found(watchdog.PUSH)[0][1] is False


def test_store_that_fails_once_ends_no_signs_of_life(monkeypatch):
    monkeypatch.setattr(watchdog, "BEAT", 0.01)
    store, asked = Store(), []

    def fail_once(key, value):
        asked.append(json.loads(value)[1])
        if len(asked) == 2:
            raise RuntimeError("a connection was reset")
        store[key] = value

    store.set = fail_once
    dog = Watchdog(0, Board(store, 0, 2))
    dog.start()
    end = time.monotonic() + 20
    while len(asked) < 5 and time.monotonic() < end:
        time.sleep(0.01)
    dog.stop()
    assert len(asked) >= 5 and asked[-1] == watchdog.ENDED


def test_board_works_with_the_store_of_torch():
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    boards = [Board(store.clone(), rank, 3) for rank in range(3)]
    assert boards[0].read({}) == {}  # and waits for no key
    boards[1].put(watchdog.Phase("step 1: train", time.monotonic()))
    assert [beat.what for beat in boards[0].read({}).values()] == ["step 1: train"]
    boards[2].put(watchdog.Phase(watchdog.ENDED, time.monotonic()))
    found = boards[0].read({})
    assert store.has_extended_api() and {rank: beat.what for rank, beat in found.items()} == {
        1: "step 1: train", 2: watchdog.ENDED,
    }  # fmt: skip
    assert boards[0].read(found) == found  # `seen` as before: the same sign of life
    boards[1].put(watchdog.Phase("step 1: train", time.monotonic()))
    assert boards[0].read(found)[1].number == 2


def test_phase_that_moves_on_is_not_told(clock):
    dog = Watchdog()
    for _ in range(100):
        with phase("step 1: train"):
            clock.now += 50
            assert dog.report() == ("", False)


@pytest.mark.parametrize("extended", [True, False])
def test_ranks_are_told_of_by_their_phases_and_by_their_signs_of_life(clock, extended):
    store = Store()
    store.extended = extended
    boards = [Board(store, rank, 4) for rank in range(4)]
    dog = Watchdog(0, boards[0])
    with phase("step 7: rollout"):
        for rank in (1, 2):  # both threads of a test share one phase: theirs are written here
            boards[rank].put(current())
    with phase("step 7: score"):
        boards[3].put(watchdog.Phase(watchdog.ENDED, clock.now))
        for _ in range(6):
            clock.now += 10
            boards[1].put(watchdog.Phase("step 7: rollout", 1000.0))
            dog.beat()
        text, alarm = dog.report()
    assert alarm
    first, second, *more = text.split(". ")
    assert first == "step 7: score, for 60 s so far"
    assert second.startswith("rank 2 (") and f"pid {os.getpid()}) has given no sign of life for 60 s" in second
    assert more[0] == "Where it stays so, the run ends after ddp_timeout seconds"
    assert "rank 1 (" in more[1] and "is in step 7: rollout, for 60 s" in more[1]
    assert "rank 3 (" in more[2] and more[2].endswith("has left training")


def test_lowest_rank_that_lives_tells_it(clock):
    store = Store()
    dogs = [Watchdog(rank, Board(store, rank, 3)) for rank in range(3)]
    with phase("step 2: train"):
        for dog in dogs:
            dog.beat()
        for _ in range(6):
            clock.now += 10
            for dog in dogs[1:]:  # rank 0 is frozen
                dog.beat()
        found = [dog.report() for dog in dogs[1:]]
    assert found[0][1] and "rank 0 (" in found[0][0] and "no sign of life for 60 s" in found[0][0]
    assert found[1] == ("", False)  # rank 1 says it


def test_store_that_does_not_answer_is_told_of(clock):
    dogs = [Watchdog(rank, Board(Store(), rank, 3)) for rank in range(3)]
    with phase("step 2: train"):
        clock.now += 61
        found = [dog.report() for dog in dogs]
    assert "The store of the process group has not answered for 61 s" in found[0][0] and found[0] == found[1]
    assert found[2] == ("", False)


def test_ranks_in_great_number_are_told_of_in_a_few_words(clock):
    store = Store()
    dogs = [Watchdog(rank, Board(store, rank, 40)) for rank in range(40)]
    with phase("step 2: rollout"):
        for dog in dogs:
            dog.beat()
    with phase("step 2: score"):
        for _ in range(6):
            clock.now += 10
            dogs[0].beat()
        text, _ = dogs[0].report()
    assert text.count("no sign of life") == 8 and text.endswith("and 31 ranks more")


def test_store_is_not_read_while_all_goes_well(clock):
    store = Store()
    dog = Watchdog(0, Board(store, 0, 2))
    store.check = lambda keys: pytest.fail("read")
    for _ in range(10):
        with phase("step 1: train"):
            clock.now += 15
            dog.beat()


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "camopd-watchdog"]


def test_threads_end_with_training_also_where_it_fails(tmp_path, tokenizer):
    seen = []

    class Watches(LocalTeacher):
        def score(self, *args, **kwargs):
            seen.append((len(threads()), current().what))
            if len(seen) == 3:
                raise ValueError("fault")
            return super().score(*args, **kwargs)

    teachers = {"general": Watches(make_model(2), "tiny", "cpu", 2), "domain": make_model(1)}
    trainer = make_trainer(tmp_path, tokenizer, teachers=teachers, max_steps=2)
    trainer.train()
    assert seen == [(1, "step 1: score: teacher 'general' (tiny)"), (1, "step 2: score: teacher 'general' (tiny)")]
    assert threads() == []
    with pytest.raises(ValueError, match="fault"):
        trainer.train()
    assert threads() == []


def test_server_that_takes_long_is_named_with_its_url(tmp_path, tokenizer, monkeypatch, caplog):
    monkeypatch.setattr(watchdog, "REPORTS", (0.3, 1000.0))
    monkeypatch.setattr(watchdog, "LOOK", 0.02)
    caplog.set_level(logging.INFO, logger="camopd")

    class Slow(LocalTeacher):
        urls = ("http://localhost:8001", "http://localhost:8002")

        def submit(self, *args, **kwargs):
            future = Future()
            threading.Timer(0.9, lambda: future.set_result(self.score(*args, **kwargs))).start()
            return future

    teachers = {"general": Slow(make_model(2), "tiny", "cpu", 2), "domain": make_model(1)}
    make_trainer(tmp_path, tokenizer, teachers=teachers, max_steps=1).train()
    found = [record for record in caplog.records if record.name == "camopd.watchdog"]
    wanted = "step 1: score: teacher 'general' (http://localhost:8001, http://localhost:8002), for 0 s so far"
    assert wanted in [record.getMessage() for record in found]
    assert {record.levelname for record in found} == {"INFO"}


def test_first_look_at_a_server_is_a_phase_with_its_url(tmp_path, tokenizer, start_server, monkeypatch):
    seen = []
    server = start_server(model=make_model(2))
    trainer = make_trainer(tmp_path, tokenizer, teachers={"general": server.url, "domain": make_model(1)}, max_steps=1)
    teacher = trainer.teachers["general"]
    ask = teacher.score
    monkeypatch.setattr(teacher, "score", lambda *args, **more: seen.append(current().what) or ask(*args, **more))
    trainer.train()
    assert set(seen[:2]) == {f"first look at teacher 'general' ({server.url})"}


def test_evaluations_and_saves_are_phases(tmp_path, tokenizer):
    seen = []

    class Watches(LocalTeacher):
        def score(self, *args, **kwargs):
            seen.append(current().what)
            return super().score(*args, **kwargs)

    trainer = make_trainer(
        tmp_path, tokenizer, max_steps=1, save_strategy="steps", save_steps=1, eval_on_start=True,
        eval_dataset={"general": make_prompts("general", 2)},
        teachers={"general": Watches(make_model(2), "tiny", "cpu", 2), "domain": make_model(1)},
    )  # fmt: skip
    save = trainer.save_model
    trainer.save_model = lambda *args, **kwargs: seen.append(current().what) or save(*args, **kwargs)
    trainer.train()
    assert seen == ["evaluation: teacher 'general' (tiny)", "step 1: score: teacher 'general' (tiny)", "save"]


# ----------------------------------------------------------------------------------------------------- two processes


@pytest.mark.slow
def test_rank_that_is_stopped_is_named_and_the_run_goes_on_when_it_does(tmp_path, python):
    command = [python, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", __file__]
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}", "OMP_NUM_THREADS": "1"}

    def run(folder, stop):
        folder.mkdir()
        log = folder / "log"
        words = [*command, str(folder), *(["stop"] if stop else [])]
        with open(log, "w") as file:
            process = subprocess.Popen(words, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            if stop:
                pid = int(_wait_for(lambda: (folder / "pid").read_text(), process, log))
                try:
                    said = f"pid {pid}) has given no sign of life"  # a line of the log is wrapped
                    _wait_for(lambda: said in " ".join(log.read_text().split()), process, log)
                finally:
                    os.kill(pid, signal.SIGCONT)
            assert process.wait(120) == 0, log.read_text()[-4000:]
        finally:
            process.kill()
        return [line["loss"] for line in lines(folder / "run")], log.read_text()

    losses, log = run(tmp_path / "straight", stop=False)
    assert "no sign of life" not in " ".join(log.split())
    again, log = run(tmp_path / "stopped", stop=True)
    assert losses == again and len(again) == 4


def _wait_for(what, run, log, seconds=90):
    end = time.monotonic() + seconds
    while time.monotonic() < end and run.poll() is None:
        with contextlib.suppress(OSError, ValueError):
            if found := what():
                return found
        time.sleep(0.05)
    raise AssertionError(log.read_text()[-4000:])


def _on_two_processes(folder: Path, stop: bool) -> None:
    for name, value in (("BEAT", 0.2), ("LOOK", 0.1), ("SILENCE", 2.0), ("REPORTS", (5.0, 1000.0))):
        setattr(watchdog, name, value)

    class AfterTwo(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if stop and state.global_step == 2 and os.environ["RANK"] == "1":
                (folder / "pid.tmp").write_text(str(os.getpid()))
                (folder / "pid.tmp").rename(folder / "pid")
                os.kill(os.getpid(), signal.SIGSTOP)

    settings = {"max_steps": 4, "prompts_per_step": 8, "callbacks": [AfterTwo()]}
    make_trainer(folder / "run", make_tokenizer(), **settings).train()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _on_two_processes(Path(sys.argv[1]), "stop" in sys.argv[2:])
