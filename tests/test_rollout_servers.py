"""Rollouts by plain vLLM servers (camopd/rollout_servers.py), those of fake_rollouts.py: weights, seeds, faults, stops."""

import json
import math
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_prompts
from fake_rollouts import FakeRollouts
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from trainers import make_trainer, worst

from camopd.errors import RolloutError
from camopd.rollout_servers import seed_of
from camopd.signals import RunInterrupted
from camopd.watchdog import ROLLOUT_SERVERS, current


ADAPTER = {"r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


@pytest.fixture
def start(tokenizer, start_server):
    """Start rollout servers, with other weights than the student's."""
    servers = []

    def start(model=None, **changes):
        servers.append(FakeRollouts(model or make_model(9), tokenizer, **changes))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def make(tokenizer, tmp_path):
    """A trainer that rolls out with servers."""
    made = []

    def make(*servers, folder="run", **settings):
        urls = [getattr(server, "url", server) for server in servers]
        made.append(make_trainer(tmp_path / folder, tokenizer, rollout_servers=urls, **settings))
        return made[-1]

    yield make
    for trainer in made:
        trainer.run.sampler.close()


def rows(count, branch="general"):
    return [
        {"branch": branch, "prompt": f"{branch} {'b' * (place % 5)}", "position": place, "category": str(place)}
        for place in range(count)
    ]


def watched(trainer):
    """Token ids of each rollout of a run, and the largest distance there."""
    made, roll_out = [], trainer.roll_out

    def watch(rows, max_tokens, *more):
        samples, cut = roll_out(rows, max_tokens, *more)
        made.append((worst(trainer, samples), {sample.position: sample.token_ids for sample in samples}))
        return samples, cut

    trainer.roll_out = watch
    return made


def lines(trainer):
    with open(Path(trainer.args.output_dir) / "metrics.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


# ------------------------------------------------------------------------------------------------------ whole runs


def test_run_draws_from_the_weights_of_each_step_and_leaves_no_file(start, make):
    server = start()
    trainer = make(server, eval_dataset={"general": make_prompts("general", 3)}, eval_strategy="steps", eval_steps=2)
    made = watched(trainer)
    trainer.train()
    assert len(made) == 4 + 2 and max(distance for distance, _ in made) < 1e-5
    assert len(server.loads) == 4 + 2 and len({str(folder) for folder in server.loads}) == 6
    assert all(line["importance/log_ratio"] < 1e-5 and line["importance/active"] for line in lines(trainer))
    assert not (Path(trainer.args.output_dir) / "_rollout_weights").exists()
    before = len(server.loads)
    trainer.evaluate()
    assert len(server.loads) == before + 1 and made[-1][0] < 1e-5


def test_run_gives_an_adapter_alone_and_keeps_two_versions(start, make):
    server = start(make_model(1))
    trainer = make(server, peft_config=LoraConfig(**ADAPTER))
    made, kept = watched(trainer), []
    server.before = lambda: kept.append(len(server.adapters))
    trainer.train()
    assert max(distance for distance, _ in made) < 1e-5 and len(server.loads) == 4
    assert max(kept) == 2 and not server.adapters
    asked = {body["model"] for body in server.written}
    assert len(asked) == 4 and server.name not in asked


def test_run_logs_what_one_with_transformers_logs(start, make, tokenizer, tmp_path):
    trainer, plain = make(start()), make_trainer(tmp_path / "plain", tokenizer)
    trainer.train()
    plain.train()
    ours, theirs = ([entry for entry in each.state.log_history if "loss" in entry] for each in (trainer, plain))
    undefined = {name for name, value in lines(trainer)[0].items() if value is None}
    assert set(theirs[0]) <= set(ours[0]) | undefined and "completions/mean_length" in theirs[0]
    last = trainer.step.samples
    assert ours[-1]["completions/mean_length"] == sum(sample.length for sample in last) / 4
    assert ours[-1]["num_tokens"] - ours[-2]["num_tokens"] == sum(len(sample.token_ids) for sample in last)
    assert [sample.position for sample in last] == list(range(4))


def test_sampler_with_old_weights_is_seen(start, make, monkeypatch):
    """The proof that the numbers above can tell."""
    server = start()
    trainer = make(server)
    made, reload = watched(trainer), server.reload
    monkeypatch.setattr(server, "reload", lambda folder: (200, "{}") if server.loads else reload(folder))
    with pytest.raises(Exception, match=r"step 2 .*the log-probs"):
        trainer.train()
    assert made[-1][0] > 0.01


@pytest.mark.parametrize("servers", [1, 2])
def test_draws_follow_from_seed_step_and_position_alone(start, make, servers):
    def completions(folder, count, **settings):
        trainer = make(*[start() for _ in range(count)], folder=folder, learning_rate=0.0, **settings)
        made = watched(trainer)
        trainer.train()
        return [ids for _, ids in made]

    one = completions("one", 1)
    assert completions("again", servers) == one
    other = completions("other", 1, seed=7, data_seed=42)
    assert len({str(ids) for ids in [*one, *other]}) == 8


def test_evaluation_draws_the_same_every_time(start, make):
    trainer = make(start(), eval_dataset={branch: make_prompts(branch, 3) for branch in ("general", "domain")})
    first, second = (trainer.evaluate() for _ in range(2))
    timed = ("runtime", "per_second")
    assert {k: v for k, v in first.items() if not k.endswith(timed)} == {
        k: v for k, v in second.items() if not k.endswith(timed)
    }


def test_resumed_run_is_the_run(start, make, tmp_path):
    server = start()
    trainer = make(server, save_strategy="steps", save_steps=2)
    trainer.train()
    losses = [line["loss"] for line in lines(trainer)]
    (tmp_path / "again").mkdir()
    (tmp_path / "run" / "checkpoint-2").rename(tmp_path / "again" / "checkpoint-2")
    trainer = make(server, folder="again")
    trainer.train(resume_from_checkpoint=True)
    assert [line["loss"] for line in lines(trainer)][-2:] == losses[2:]


# ------------------------------------------------------------------------------------------------------- a flight


def test_flight_gives_each_sample_once_as_it_finishes_longest_prompts_first(start, make):
    server = start()
    trainer = make(server, max_prompt_length=12)
    engine = trainer.engine
    asked = [*rows(10), {"branch": "domain", "prompt": "b" * 40, "position": 10, "category": "10"}]
    engine.sync(trainer.held_out_results)
    seen, threads = [], set()
    see = lambda sample: (seen.append(sample), threads.add(threading.current_thread()))  # noqa: E731
    flight = engine.start(asked, 6, ("step", 0), see)
    samples = list(flight.samples())
    flight.wait()
    assert flight.done() and [*flight.samples()] == samples and {*map(id, seen)} == {*map(id, samples)}
    ids = trainer.reader.ids(asked)
    by_position = {sample.position: sample for sample in samples}
    assert sorted(by_position) == list(range(11))
    for place, sample in by_position.items():
        assert sample.token_ids[: sample.prompt_len] == ids[place][-12:] and sample.category == str(place)
        assert len(sample.mask) == sample.length == len(sample.rollout_logps) <= 6 and sample.mask.all()
        assert sample.truncated == (sample.token_ids[-1] not in trainer.eos_token_ids)
    assert flight.prompts_cut == sum(len(prompt) > 12 for prompt in ids) > 0
    assert worst(trainer, samples) < 1e-5


def test_flight_starts_before_all_is_finished_and_can_be_given_up(start, make):
    server = start()
    trainer = make(server)
    trainer.engine.sync(trainer.held_out_results)
    gate, asked = threading.Event(), []
    server.before = lambda: gate.wait(10) if len(asked) else asked.append(1)
    flight = trainer.engine.start(rows(4), 6, ("step", 0))
    first = next(flight.samples())
    assert not flight.done() and first.rollout_logps is not None
    flight.cancel()
    gate.set()
    with pytest.raises(RolloutError, match="given up"):
        flight.wait()
    assert flight.done()
    again = list(trainer.engine.start(rows(4), 6, ("step", 0)).samples())
    assert len(again) == 4 and [s.token_ids for s in again if s.position == first.position] == [first.token_ids]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_error_of_a_callback_ends_the_flight(start, make, place):
    trainer, left = make(start()), [1.0, 1.0]
    trainer.engine.sync(trainer.held_out_results)
    left.insert(2 - place, 0.0)
    flight = trainer.engine.start(rows(3), 6, ("step", 0), lambda sample: 1 / left.pop())
    with pytest.raises(ZeroDivisionError):
        flight.wait()


def test_signal_ends_the_wait_and_the_run_is_saved(start, make):
    server = start()
    trainer = make(server)

    def hear():
        if len(server.loads) == 3:
            trainer.stops.heard = "SIGTERM"
            server.released.wait(20)

    server.before = hear
    with pytest.raises(RunInterrupted, match=r"SIGTERM: stopped; the weights after step 2 are in .*checkpoint-2"):
        trainer.train()


def test_signal_ends_the_wait_for_new_weights_and_the_run_is_saved(start, make):
    server = start()
    trainer, load, waits = make(server), server.reload, []

    def slow(folder):
        if len(server.loads) == 2:
            trainer.stops.heard = "SIGTERM"
            waits.append(server.released.wait(20))
        return load(folder)

    server.reload = slow
    with pytest.raises(RunInterrupted, match=r"SIGTERM: stopped; the weights after step 2 are in .*checkpoint-2"):
        trainer.train()
    assert waits == []  # it still reads them


def test_servers_that_are_waited_for_are_in_the_phase_that_the_watchdog_tells(start, make):
    server = start()
    trainer, load, seen = make(server, max_steps=1), server.reload, []
    server.reload = lambda folder: seen.append(current().what) or load(folder)

    def before():  # which may be faster than the trainer
        end = time.monotonic() + 10
        while ROLLOUT_SERVERS not in current().what and time.monotonic() < end:
            time.sleep(0.01)
        seen.append(current().what)

    server.before = before
    trainer.train()
    assert seen[0] == f"step 1: rollout: weights of the student for {server.url}"
    assert f"step 1: rollout: {ROLLOUT_SERVERS} ({server.url})" in seen


@given(
    st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["general", "domain"]), st.integers(0, 999)), unique=True)
)
def test_seeds_are_numbers_that_vllm_takes_and_differ(words):
    seeds = [seed_of(42, "step", *word) for word in words]
    assert len(set(seeds)) == len(words) and all(0 <= seed < 2**63 for seed in seeds)
    assert seeds == [seed_of(42, "step", *word) for word in words]


# --------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("lora", [False, True])
def test_server_that_dies_in_a_step_costs_nothing(start, make, lora):
    settings = {"peft_config": LoraConfig(**ADAPTER)} if lora else {}

    def run(folder, dies):
        one, two = start(make_model(1)), start(make_model(1))
        torch.manual_seed(0)
        trainer = make(one, two, folder=folder, **settings)
        if dies:
            one.before = lambda: len(one.loads) == 2 and one.close()
        made = watched(trainer)
        trainer.train()
        return made

    undisturbed, disturbed = run("calm", False), run("dies", True)
    assert [ids for _, ids in disturbed] == [ids for _, ids in undisturbed]
    assert max(distance for distance, _ in disturbed) < 1e-5


@pytest.mark.parametrize("lora", [False, True])
def test_server_that_is_started_again_gets_the_weights_before_its_first_request(start, make, lora):
    server = start(make_model(1 if lora else 9))
    trainer = make(server, **({"peft_config": LoraConfig(**ADAPTER)} if lora else {}))
    made, again = watched(trainer), []

    def die():
        if len(server.loads) == 2 and not server.closed:
            server.close()
            again.append(start(make_model(1 if lora else 9), port=server.port))

    server.before = die
    trainer.train()
    assert max(distance for distance, _ in made) < 1e-5 and len(again[0].loads) == 3


def test_server_that_was_replaced_unseen_gets_the_weights(start, make):
    """Between two batches of an evaluation, say: no request of this process has failed."""
    server = start()
    trainer = make(server)
    trainer.engine.sync(trainer.held_out_results)
    assert worst(trainer, trainer.engine.start(rows(3), 6, ("step", 0)).samples()) < 1e-5
    server.close()
    start(port=server.port)
    assert worst(trainer, trainer.engine.start(rows(3), 6, ("step", 0)).samples()) < 1e-5


def test_all_servers_gone_saves_a_checkpoint_and_says_so(start, make):
    server = start()
    trainer = make(server, teacher_timeout=0.3)
    server.before = lambda: len(server.loads) == 3 and server.close()
    with pytest.raises(
        RolloutError,
        match=r"rollout server has no replica left: .*did not come back in teacher_timeout=0.3(?s:.*)Nothing is lost: the "
        r"weights after step 2 are in .*checkpoint-2'. Fix the server and resume_from_checkpoint=",
    ):
        trainer.train()


# ------------------------------------------------------------------------------------------------ what is refused


def test_server_that_cannot_be_used_is_refused_before_a_model_is_loaded(start, make, tmp_path):
    """Of the student, who is not there, nothing is said."""
    make = partial(make, model=str(tmp_path / "none"))
    server = start(max_model_len=69)
    with pytest.raises(
        RolloutError, match=rf"at {server.url} takes sequences of 69 tokens, .* is 70: .*--max-model-len 70"
    ):
        make(server)
    other = start(name="another")
    with pytest.raises(RolloutError, match=r"replicas of the rollout server serve different models"):
        make(start(), other)
    server.close()
    with pytest.raises(RolloutError, match=rf"the rollout server at {server.url} does not answer .*vllm serve"):
        make(server)
    with pytest.raises(ValueError, match=r"tools cannot be used with rollout_servers.*colocate"):
        make(start(), tools=[print])


@pytest.mark.parametrize(
    ("changes", "adapter", "message"),
    [
        (
            {"dev": False},
            False,
            r"has no /server_info. It must run with VLLM_SERVER_DEV_MODE=1: start it by `camopd serve",
        ),
        (
            {"lora": False},
            True,
            r"no /v1/load_lora_adapter. It must run with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, --enable",
        ),
    ],
)
def test_server_that_takes_no_weights_is_told_with_its_flags(start, make, changes, adapter, message):
    server = start(make_model(1), **changes)
    trainer = make(server, **({"peft_config": LoraConfig(**ADAPTER)} if adapter else {}))
    with pytest.raises(RolloutError, match=message):
        trainer.train()


def test_weights_that_the_server_cannot_read_are_told_at_once(start, make, monkeypatch):
    server = start()
    trainer = make(server)
    monkeypatch.setattr(server, "reload", lambda folder: (500, f"{folder} is not there"))
    with pytest.raises(
        RolloutError, match=r"cannot take the student's weights: .*500: .*is not there.*on a disk that all"
    ):
        trainer.train()


def test_server_that_computes_in_another_type_than_the_student_is_warned_of(start, make, caplog):
    same, other, silent = start(), start(), start(dev=False)
    other.dtype = "torch.bfloat16"
    make(same, other, silent)
    (text,) = [record.getMessage() for record in caplog.records if "computes in" in record.getMessage()]
    assert text.startswith(f"the rollout server at {other.url} computes in bfloat16, the student in float32: ")
    assert text.endswith("Start it with --dtype float32.")


def test_null_for_a_log_prob_is_no_weight_for_its_token(start, make):
    server = start()

    def edit(answer):
        answer["choices"][0]["logprobs"]["token_logprobs"][0] = None
        return answer

    server.edit_answer = edit
    trainer = make(server, max_steps=1)
    trainer.train()
    assert all(math.isnan(sample.rollout_logps[0]) for sample in trainer.step.samples)
