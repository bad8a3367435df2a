"""A signal saves a run and ends it, and the run that goes on is the run that was not stopped."""

import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from conftest import make_model, make_prompts
from trainers import lines, make_trainer
from transformers import TrainerCallback

from camopd.signals import REQUEUE, RunInterrupted, StopAsked, StopRequests


STEPS = 4
KEYS = ("step", "branch", "loss", "grad_norm", "selection/general/kept", "selection/domain/kept")


def requests(**answers):
    return StopRequests(lambda mine: [*mine, *answers.get("others", [])], announces=False)


def test_stop_requests_are_heard_inside_and_handlers_are_put_back():
    stops = requests()
    before = {name: signal.getsignal(getattr(signal, name)) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")}
    with stops.listening():
        stops.check()
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(StopAsked, match="SIGUSR1"):
            stops.check()
    assert {name: signal.getsignal(getattr(signal, name)) for name in before} == before


def test_stop_requests_leave_the_programs_own_handlers_alone():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("own"))
    try:
        with requests().listening():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == ["own"]


def test_stop_requests_of_another_rank_stop_this_one():
    stops = requests(others=[("SIGTERM", True)])
    with pytest.raises(StopAsked, match="SIGTERM") as stopped:
        stops.check()
    assert stopped.value.cut  # its rollouts are not whole, and so those of no rank are used


def test_stop_requests_in_a_thread_set_no_handlers():
    failures = []

    def listen():
        try:
            with requests().listening():
                pass
        except ValueError as error:
            failures.append(error)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert failures == []


@pytest.mark.slow
def test_second_signal_ends_the_process_at_once():
    script = (
        "import os, signal, threading, time\nfrom camopd import signals\n"
        "def send(): os.kill(os.getpid(), signal.SIGINT)\n"
        "with signals.StopRequests(lambda mine: mine, True).listening():\n"
        "    send(); send()\n    print('still here', flush=True)\n    time.sleep(signals.REPEATS + 0.5)\n"
        "    print('and here', flush=True)\n"
        "    threading.Timer(0.5, send).start()\n"
        # As a collective does, this waits in C, without the interpreter's lock and past any signal: no handler runs.
        "    import ctypes\n    lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(128)\n"
        "    lock(mutex)\n    lock(mutex)\n    print('not any more', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 128 + signal.SIGINT and done.stdout == "still here\nand here\n"
    assert "another Ctrl-C stops it at once" in done.stderr and "Traceback" not in done.stderr


def strike(place, trainer, step):
    """Send SIGTERM to this process at a place of a step, once."""
    sent = []

    def send(*_, **__):
        if trainer.state.global_step == step and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))

    def before(owner, name):
        own = getattr(owner, name)
        setattr(owner, name, lambda *args, **kwargs: (send(), own(*args, **kwargs))[1])

    if place in ("begin", "update"):
        event = {"begin": "on_step_begin", "update": "on_pre_optimizer_step"}[place]
        trainer.add_callback(type("Strike", (TrainerCallback,), {event: send})())
    else:
        before(*{
            "rollout": (trainer.engine, "samples"),  # the generation under way ends, and its rollouts are not used
            "score": (trainer.scorer, "score"),
            "loss": (trainer, "compute_loss"),
            "save": (trainer, "save_model"),
        }[place])  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("undisturbed")
    trainer = make_trainer(folder, tokenizer, max_steps=STEPS)
    trainer.train()
    return lines(folder), trainer.model.state_dict()


@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize("place", ["begin", "rollout", "score", "loss", "update"])
def test_run_that_a_signal_has_stopped_goes_on_as_if_it_had_not(place, step, undisturbed, tmp_path, tokenizer):
    stopped = make_trainer(tmp_path, tokenizer, max_steps=STEPS)
    strike(place, stopped, step)
    with pytest.raises(RunInterrupted, match="SIGTERM: stopped") as ended:
        stopped.train()
    assert ended.value.code == REQUEUE == 75
    rolled_out = place in ("score", "loss")
    done = step + (place == "update")
    checkpoints = [path.name for path in tmp_path.glob("checkpoint-*")]
    if done or rolled_out:
        assert checkpoints == [f"checkpoint-{done}"] and "--resume auto" in str(ended.value)
        assert bool(list((tmp_path / checkpoints[0]).glob("rollouts-*"))) == rolled_out
    else:
        assert checkpoints == []  # nothing was there to save
    again = make_trainer(tmp_path, tokenizer, max_steps=STEPS)
    again.train(resume_from_checkpoint="auto")
    expected, weights = undisturbed
    assert [[line.get(key) for key in KEYS] for line in lines(tmp_path)] == [
        [line.get(key) for key in KEYS] for line in expected
    ]
    assert all(torch.equal(weights[name], value) for name, value in again.model.state_dict().items())


def test_signal_during_a_save_lets_it_finish(undisturbed, tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, max_steps=STEPS, save_strategy="steps", save_steps=2)
    strike("save", trainer, 2)
    with pytest.raises(RunInterrupted, match=r"the weights after step 2 are in '.*checkpoint-2'"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_signal_during_an_evaluation_keeps_the_weights(undisturbed, tmp_path, tokenizer):
    held_out = {"general": make_prompts("general", 4)}
    kwargs = {"max_steps": STEPS, "eval_dataset": held_out, "eval_strategy": "steps", "eval_steps": 2}
    trainer = make_trainer(tmp_path, tokenizer, **kwargs)
    measure = trainer.prediction_step
    trainer.prediction_step = lambda *args, **kw: (os.kill(os.getpid(), signal.SIGTERM), measure(*args, **kw))[1]
    with pytest.raises(RunInterrupted, match=r"the weights after step 2 are in '.*checkpoint-2'"):
        trainer.train()
    again = make_trainer(tmp_path, tokenizer, **kwargs)
    again.train(resume_from_checkpoint="auto")
    _, weights = undisturbed
    assert all(torch.equal(weights[name], value) for name, value in again.model.state_dict().items())


def test_signals_of_a_forked_process_are_its_own():
    """As those of a data loader's workers, which live on when training ends: nobody waits for them or hears them."""
    stops = requests()
    ready, go = os.pipe(), os.pipe()
    with stops.listening():
        child = os.fork()
        if not child:
            os.kill(os.getpid(), signal.SIGUSR1)  # nobody handles it here, and it ends the process
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGUSR1
        sleeper = os.fork()
        if not sleeper:
            os.close(go[1])
            os.write(ready[1], b"x")
            os.read(go[0], 1)  # until the end of this test
            os._exit(0)
        os.read(ready[0], 1)
        stops.check()
    assert stops.heard is None
    os.close(go[1])
    os.waitpid(sleeper, 0)


def test_signal_ends_the_wait_for_a_server(undisturbed, start_server, tmp_path, tokenizer):
    """That does not answer; the rollouts are kept, and scored by one that does."""
    server = start_server(model=make_model(2))
    kwargs = {"max_steps": STEPS, "teachers": {"general": server.url, "domain": make_model(1)}}
    trainer = make_trainer(tmp_path, tokenizer, **kwargs)

    def hang():
        if trainer.state.global_step == 1 and trainer.step is not None:
            server.before = lambda: None
            server.answers.append("hang")
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()

    server.before = hang
    with pytest.raises(RunInterrupted, match=r"the weights before step 2 and its rollouts are in '.*checkpoint-1'"):
        trainer.train()
    server.released.set()
    again = make_trainer(tmp_path, tokenizer, **kwargs)
    again.train(resume_from_checkpoint="auto")
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]


def test_signal_in_the_last_update_ends_a_run_that_is_done(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, max_steps=2)
    strike("update", trainer, 1)
    trainer.train()
    assert trainer.state.global_step == 2
