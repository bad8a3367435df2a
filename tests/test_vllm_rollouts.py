"""Rollouts by the real vLLM, in the trainer's process and on a server: `make test-vllm`, in .venv-vllm."""

import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import wait
from contextlib import suppress
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import httpx
import numpy as np
import pytest
import requests
import torch
import yaml
from accelerate import Accelerator
from conftest import VOCAB, make_model, make_prompts, make_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from requests.adapters import HTTPAdapter
from trainers import ROUNDED, make_trainer, worst
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from trl.distributed import DistributedBackend
from trl.generation import vllm_generation
from trl.generation.vllm_generation import VLLMGeneration
from urllib3.util.retry import Retry

from camopd import CaMOPDConfig, CaMOPDTrainer
from camopd.errors import CaMOPDError, GuardError, RolloutError
from camopd.evaluation import HeldOutResults
from camopd.step import Step
from camopd.vllm.sampler import Sampler, Sampling, Version
from camopd.vllm_rollouts import VLLMTurns, check_server, in_requests, reach, settle, starting


real = pytest.mark.vllm
ENDS = [2, 5]  # of the student that is made here; that of its folder is 2
CONTEXT = 128  # of the servers
UP_SECONDS = 400  # that they may take to start, beside all other tests


@pytest.fixture(scope="module", autouse=True)
def variables_of_launchers_stay_here():
    """TRL sets MASTER_PORT and RANK in this process, and what a later file starts is no rank of it."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of three tiny models that vLLM's CPU attention takes: heads of 32."""
    folders = []
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(VOCAB), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=32, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            initializer_range=0.15,
        )  # fmt: skip
        folders.append(str(tmp_path_factory.mktemp("models") / f"tiny-{seed}"))
        LlamaForCausalLM(config).save_pretrained(folders[-1])
        make_tokenizer().save_pretrained(folders[-1])
    return folders


@pytest.fixture(scope="module")
def processes(models, vllm_python, tmp_path_factory):
    """Servers of the three models, as they start: that of the student by `camopd serve --student`, and two teachers'."""
    pytest.importorskip("vllm_on_cpu")
    folder = tmp_path_factory.mktemp("servers")
    settings = {
        "model_name_or_path": models[0], "dtype": "float32", "bf16": False, "use_vllm": True, "vllm_mode": "server",
        "max_prompt_length": 64, "max_completion_length": CONTEXT - 65, "output_dir": str(folder),
        "teachers": {"general": "x"},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    # Two of them also take the weights of `rollout_servers`, under one name; the first alone takes adapters: with
    # --enable-lora vLLM's CPU build dies of the prompt log-probs that a teacher is asked for.
    small = ["--kv-cache-memory-bytes", str(16 << 20)]
    name = ["--served-model-name", "student"]
    lora = ["--enable-lora", "--max-lora-rank", "8", "--max-loras", "2"]
    serve = [sys.executable, "-m", "camopd.cli", "serve", str(folder / "run.yaml"), "--student"]
    plain = [vllm_python, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--dtype", "float32",
             "--max-model-len", str(CONTEXT), "--enforce-eager", "--enable-scale-out", *small]  # fmt: skip
    environment = {**os.environ, "CAMOPD_VLLM_PYTHON": vllm_python, "VLLM_SERVER_DEV_MODE": "1"}
    environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    found = []
    for place, model in enumerate(models):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        command = [*plain, "--model", model, "--port", port] if place else [*serve, "--port", port, "--", *small]
        command += [[*name, *lora], name, []][place]
        log = folder / f"{place}.log"
        with open(log, "w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
        found.append((process, f"http://127.0.0.1:{port}", log))
    yield found
    for process, _, _ in found:
        process.send_signal(signal.SIGINT)
    for process, _, _ in found:
        process.wait(60)


@pytest.fixture
def urls(processes):
    deadline = time.monotonic() + UP_SECONDS
    for process, url, log in processes:
        while True:
            try:
                if httpx.get(url + "/health", timeout=2).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
    return [url for _, url, _ in processes]


@pytest.fixture
def make(processes, models, tmp_path):  # the servers start while the tests in this process run
    """A trainer with vLLM's rollouts, in this process unless the settings say otherwise."""

    def make(teachers=None, folder="", model=None, peft_config=None, evaluated=False, **settings):
        values = {
            "output_dir": str(tmp_path / folder), "use_cpu": True, "bf16": False, "report_to": "none",
            "save_strategy": "no", "gradient_checkpointing": False, "disable_tqdm": True,
            "schedule": "general:1,domain:1", "max_steps": 2, "prompts_per_step": 8, "per_device_train_batch_size": 2,
            "max_completion_length": 12, "max_prompt_length": 64, "learning_rate": 1e-2, "use_vllm": True,
            "diagnostics_steps": 0,
        }  # fmt: skip
        return CaMOPDTrainer(
            model=model or AutoModelForCausalLM.from_pretrained(models[0]),
            teachers=teachers or {"general": models[1], "domain": models[2]},
            args=CaMOPDConfig(**{**values, **settings}),
            train_dataset={branch: make_prompts(branch) for branch in ("general", "domain")},
            eval_dataset={"general": make_prompts("general", 5)} if evaluated else None,
            processing_class=make_tokenizer(),
            peft_config=peft_config,
        )

    return make


def lines(trainer):
    with open(os.path.join(trainer.args.output_dir, "metrics.jsonl")) as file:
        return [json.loads(line) for line in file]


def watch(trainer):
    """Record, for each batch of rollouts, the samples, and the largest distance between the sampler's log-prob of a token
    and that of a forward of the student's present weights."""
    made, roll_out = [], trainer.roll_out

    def watched(rows, max_tokens, *more):
        samples, cut = roll_out(rows, max_tokens, *more)
        made.append((worst(trainer, samples), [sample.token_ids for sample in samples]))
        return samples, cut

    trainer.roll_out = watched
    return made


# -------------------------------------------------------------------------------------------------- without vLLM


class Draws:
    """Stands in for TRL's `VLLMGeneration`: completions of torch's random numbers, and a count of its syncs."""

    synced = 0

    def sync_weights(self):
        self.synced += 1

    def generate(self, prompts, images, num_generations, profiler):
        found = torch.rand(len(prompts), 4).tolist()
        return prompts, found, [[[None, None]] * 4 for _ in found], None


def rank(index, parallel=1, mode="colocate", seed=0):
    """What `VLLMTurns` asks of a trainer, on one of several ranks."""
    args = SimpleNamespace(
        seed=seed, process_index=index, vllm_tensor_parallel_size=parallel, vllm_mode=mode, report_to=[]
    )
    return SimpleNamespace(
        args=args, model=torch.nn.Identity(), step=Step(3, ("general",)), held_out_results=HeldOutResults(),
        vllm_generation=Draws(), accelerator=SimpleNamespace(is_main_process=True), state=SimpleNamespace(global_step=3),
    )  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
def test_ranks_that_share_an_engine_draw_the_same_tokens_and_others_do_not(training):
    drawn = []
    for index in range(4):
        trainer = rank(index, parallel=2)
        trainer.model.train(training)
        torch.manual_seed(index)  # as each rank has its own
        turns = VLLMTurns(trainer)
        drawn.append([turns.generate([[1], [1]])[0] for _ in range(2)])
    assert drawn[0] == drawn[1] and drawn[2] == drawn[3] and drawn[0] != drawn[2]
    first, second = drawn[0]
    assert first != second and first[0] != first[1]


def test_random_numbers_are_those_of_seed_and_step_and_leave_others_alone():
    def draw(seed=0, number=3, mode="colocate"):
        trainer = rank(0, seed=seed, mode=mode)
        trainer.step.number = number
        return VLLMTurns(trainer).generate([[1]])[0]

    state = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert draw() == draw() and len({str(draw(seed, number)) for seed in (0, 1) for number in (3, 4)}) == 4
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1:] == (np.random.get_state()[1].tolist(), random.getstate())


def test_weights_are_given_once_for_each_step_and_each_evaluation():
    trainer = rank(0)
    turns, counts = VLLMTurns(trainer), []
    for training, change in (
        (True, "step"), (True, None), (False, "held_out_results"), (False, None), (True, "step"), (True, "step"),
    ):  # fmt: skip
        trainer.model.train(training)
        if change:
            setattr(trainer, change, Step(3, ("general",)) if training else HeldOutResults())
        _, logps = turns.generate([[1]])
        counts.append(trainer.vllm_generation.synced)
    assert counts == [1, 1, 2, 2, 3, 4]
    assert all(math.isnan(value) for row in logps for value in row)


class Experts(torch.nn.Module):
    """Two parameters of one module, as those of a layer with experts: PEFT puts an adapter around an adapter."""

    def __init__(self, config):
        super().__init__()
        self.up_proj, self.down_proj = (
            torch.nn.Parameter(torch.randn(2, config.hidden_size, config.hidden_size)) for _ in range(2)
        )


def make_student(experts):
    model = make_model(1)
    for layer in model.model.layers if experts else ():
        layer.mlp.experts = Experts(model.config)
    return model


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_base_below_an_adapter_is_the_same_to_the_bit_after_its_weights_were_sent(dtype, experts):
    """And what is sent is what TRL sends, whose own way moves the base."""

    def generation():
        more = {"target_parameters": ["experts.up_proj", "experts.down_proj"]} if experts else {}
        config = LoraConfig(
            r=4, target_modules="all-linear", modules_to_save=["lm_head"], init_lora_weights=False, **more
        )
        torch.manual_seed(0)
        model = get_peft_model(make_student(experts).to(dtype), config)
        found = VLLMGeneration.__new__(VLLMGeneration)
        found.accelerator, found.model = Accelerator(cpu=True), model
        found._dist = DistributedBackend(found.accelerator)
        return found, model, {name: weight.clone() for name, weight in model.named_parameters()}

    def sent(generation):
        return {name: weight.clone() for name, weight in generation._iter_named_params()}

    of_trl, moved, before = generation()
    expected = sent(of_trl)
    assert any(not torch.equal(weight, before[name]) for name, weight in moved.named_parameters())
    ours, model, before = generation()
    args = SimpleNamespace(generation_kwargs=None, vllm_mode="colocate")
    settle(SimpleNamespace(vllm_generation=ours, args=args, model=model, eos_token_ids=[2]), 10)
    found = sent(ours)
    assert sum("experts" in name for name in found) == 2 * experts * model.config.num_hidden_layers
    assert list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in expected)
    with suppress(StopIteration):  # and where the one that is sent to fails on its way
        sending = ours._iter_named_params()
        for _ in range(4):
            next(sending)
        sending.close()
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert not any(layer.merged for layer in model.modules() if isinstance(layer, BaseTunerLayer))


@pytest.mark.parametrize("where", ["target_modules", "modules_to_save"])
@pytest.mark.parametrize("ends", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_adapter_on_half_of_a_tie_is_refused(ends, where):
    """vLLM has one weight for both."""
    student = make_model(1)
    student.config.tie_word_embeddings = True
    student.tie_weights()
    model = get_peft_model(student, LoraConfig(r=4, **{"target_modules": ["q_proj"], where: ends}))
    args = SimpleNamespace(generation_kwargs=None, vllm_mode="colocate")
    generation = SimpleNamespace(model=model, _dist=SimpleNamespace(fsdp_version=None))
    with pytest.raises(ValueError, match=r"embed_tokens.*lm_head.*are one weight.*target_modules"):
        settle(SimpleNamespace(vllm_generation=generation, args=args, model=model, eos_token_ids=[2]), 10)


@given(st.integers(0, 5000))
def test_requests_have_no_more_prompts_than_vllm_takes_and_answers_keep_their_order(count):
    sizes = []

    def generate(prompts, max_tokens):
        sizes.append(len(prompts))
        return {"completion_ids": [[*ids, max_tokens] for ids in prompts], "logprobs": [[ids] for ids in prompts]}

    prompts = [[place] for place in range(count)]
    found = in_requests(generate)(prompts=prompts, max_tokens=7)
    assert found == generate(prompts, 7)
    assert max(sizes[:-1]) <= 1024 and sum(sizes[:-1]) == count


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"loads the student from its folder or id, and this LlamaForCausalLM has none\. Save it"),
        (
            {"model_init_kwargs": {"quantization_config": {"load_in_4bit": True}}},
            "quantised weights .* cannot be rolled",
        ),
        ({"vllm_max_model_length": 69}, r"vllm_max_model_length=69 is less than .* = 70: .* Leave it out"),
        ({"vllm_mode": "server", "tools": [print]}, r"tools with vllm_mode='server' cannot be used on 2 ranks"),
    ],
    ids=str,
)
def test_run_that_vllm_could_not_do_is_refused_before_it_is_started(settings, message, tmp_path, monkeypatch):
    tools = settings.pop("tools", None)
    if tools:
        monkeypatch.setattr(CaMOPDConfig, "world_size", 2)
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, make_tokenizer(), use_vllm=True, max_prompt_length=64, tools=tools, **settings)


class Silent:
    """A server that accepts and never answers, or hangs up. There is a password in its URL."""

    def __init__(self):
        self._server = socket.create_server(("127.0.0.1", 0))
        self._server.settimeout(0.05)
        self.url = f"http://me:secret@127.0.0.1:{self._server.getsockname()[1]}"
        self.hang_up, self._open, self._end = False, [], threading.Event()
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def _accept(self):
        while not self._end.is_set():
            with suppress(TimeoutError):
                connection, _ = self._server.accept()
                self._open.append(connection)
                if self.hang_up:
                    connection.close()

    def connections(self):
        time.sleep(0.2)  # those that wait are accepted
        return len(self._open)

    def close(self):
        self._end.set()
        self._thread.join()
        for each in (self._server, *self._open):
            each.close()


@pytest.fixture
def silent(monkeypatch):
    monkeypatch.setattr("camopd.vllm.limits.ANSWER_SECONDS", 0.2)
    monkeypatch.setattr("camopd.vllm.limits.QUESTION_PAUSE", 0.0)
    server = Silent()
    yield server
    server.close()


@pytest.fixture
def session(monkeypatch):
    """As TRL's client has one, with fewer retries, of a server that is well at the start."""
    monkeypatch.setattr("requests.get", lambda *_, **__: SimpleNamespace(status_code=200))
    with requests.Session() as session:
        retries = Retry(total=2, connect=2, read=2, backoff_factor=0, allowed_methods=["POST"])
        session.mount("http://", HTTPAdapter(max_retries=retries))
        yield session


def settings_of(ranks=1, **changes):
    return SimpleNamespace(
        **{"use_vllm": True, "vllm_server_timeout": 0.5, "longest_completion": 1, "world_size": ranks,
           "prompts_per_step": 4, "per_device_eval_batch_size": 1, **changes}
    )  # fmt: skip


def test_server_that_accepts_and_never_answers_is_given_up_at_the_start(silent, monkeypatch):
    """Where the trainer has TRL make its client, which would wait for ever."""
    monkeypatch.setattr(vllm_generation, "LLM", object, raising=False)  # of a vLLM that is installed
    monkeypatch.setattr(vllm_generation, "VLLMClient", lambda **_: pytest.fail("waits for ever"))
    before = vllm_generation.VLLMClient
    with (
        starting(None, settings_of()),
        pytest.raises(CaMOPDError, match=r"not answered for 0\.5 s, which is vllm_server") as e,
    ):
        vllm_generation.VLLMClient(base_url=silent.url)
    assert "secret" not in str(e.value) and vllm_generation.VLLMClient is before


@pytest.mark.parametrize(("ranks", "kind"), [(1, RolloutError), (2, CaMOPDError)])
def test_request_to_a_server_that_has_fallen_silent_ends(ranks, kind, silent, session, monkeypatch):
    """As a `RolloutError`, which all ranks must meet, only where there is no other; and it is not sent again."""
    monkeypatch.setattr("camopd.vllm.limits.WEIGHTS_SECONDS", 0.3)
    monkeypatch.setattr("camopd.vllm.limits.ROLLOUT_SECONDS", 0.1)
    client = reach(lambda **_: SimpleNamespace(session=session), settings_of(ranks), base_url=silent.url)
    with pytest.raises(kind, match=r"not answered within 0 s.*timed out.*resume_from_checkpoint") as error:
        client.session.post(f"{silent.url}/v1/completions", json={})
    assert type(error.value) is kind and "secret" not in str(error.value) and silent.connections() == 1


@pytest.mark.parametrize(
    ("prompts", "held_out", "length", "seconds"),
    [(256, 1, 100, 900), (256, 1, 8192, 300 + 0.2 * 8192), (257, 1, 8192, 2 * (300 + 0.2 * 8192)),
     (4, 300, 8192, 4 * (300 + 0.2 * 8192))],
)  # fmt: skip
def test_server_has_time_for_all_completions_of_a_step(prompts, held_out, length, seconds, silent, session):
    asked = []
    session.request = lambda *_, timeout, **__: asked.append(timeout)
    args = settings_of(3, prompts_per_step=prompts, per_device_eval_batch_size=held_out, longest_completion=length)
    reach(lambda **_: SimpleNamespace(session=session), args, base_url=silent.url).session.post(silent.url)
    assert [read for _, read in asked] == [pytest.approx(seconds)]


def test_request_whose_connection_breaks_is_sent_again(silent, session):
    """As TRL does it."""
    client = reach(lambda **_: SimpleNamespace(session=session), settings_of(), base_url=silent.url)
    silent.hang_up = True
    with pytest.raises(RolloutError, match="Connection"):
        client.session.post(f"{silent.url}/v1/completions", json={})
    assert silent.connections() == 3


def test_server_that_computes_in_another_type_is_warned_of(caplog):
    client = SimpleNamespace(
        base_url="http://host", get_server_info=lambda: {"model_config": {"dtype": "torch.bfloat16"}}
    )
    check_server(client, 10, torch.float32)
    assert "computes in bfloat16, the student in float32" in caplog.text
    caplog.clear()
    check_server(client, 10, torch.bfloat16)
    assert not caplog.text


# ---------------------------------------------------------------------------------------- the sampler is looked at


@real
def test_colocated_sampler_has_the_students_weights_at_every_step_and_a_run_with_old_ones_stops(make):
    trainer = make(max_steps=4)
    made, sync = watch(trainer), trainer.vllm_generation.sync_weights
    trainer.vllm_generation.sync_weights = lambda: trainer.state.global_step == 3 or sync()
    with pytest.raises(
        GuardError, match=r"step 4 \(domain\): the log-probs .* float32 .* weights .*'log_ratio'\]=0\.01"
    ):
        trainer.train()
    *synced, (stale, _) = made
    assert max(worst for worst, _ in synced) < 1e-4 and stale > 0.1
    assert all(line["importance/log_ratio"] < 1e-5 and line["importance/outside_band"] == 0 for line in lines(trainer))
    assert len(lines(trainer)) == trainer.state.global_step == 3


@real
def test_sampler_with_old_weights_is_seen_with_the_engines_log_probs_too(make):
    trainer = make(student_logps="engine")
    sync, before = trainer.vllm_generation.sync_weights, {}

    def sync_once():
        before.update({name: weight.clone() for name, weight in trainer.model.state_dict().items()})
        return trainer.state.global_step == 1 or sync()

    trainer.vllm_generation.sync_weights = sync_once
    with pytest.raises(GuardError, match=r"step 2 \(domain\): the log-probs"):
        trainer.train()
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.model.state_dict().items())


# ----------------------------------------------------------------------------------------------- whose weights it has


@real
def test_colocated_sampler_gets_the_best_checkpoint_and_what_a_user_loads(make, models):
    trainer = make(
        max_steps=4, evaluated=True, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True, metric_for_best_model="eval_general_kl", learning_rate=0.3,
    )  # fmt: skip
    made = watch(trainer)
    trainer.train()
    logged = [entry["eval_general_kl"] for entry in trainer.state.log_history if "eval_general_kl" in entry]
    again = trainer.evaluate()["eval_general_kl"]
    assert again == pytest.approx(min(logged), abs=1e-4) and logged[-1] > min(logged) + 0.01
    trainer.model.load_state_dict(AutoModelForCausalLM.from_pretrained(models[1]).state_dict())
    trainer.evaluate()
    trainer.model.load_state_dict(AutoModelForCausalLM.from_pretrained(models[2]).state_dict())
    trainer.train()
    assert max(worst for worst, _ in made) < 1e-4


@real
@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_sampler_has_the_students_adapter(mode, make, urls):
    where = {"vllm_mode": "server", "vllm_server_base_url": urls[0]} if mode == "server" else {}
    adapter = LoraConfig(r=8, lora_alpha=64, target_modules="all-linear", init_lora_weights=False)
    trainer = make(peft_config=adapter, max_steps=3, **where)
    made = watch(trainer)
    trainer.train()
    assert max(worst for worst, _ in made) < 1e-4


# ------------------------------------------------------------------------------------------------ random numbers


@real
def test_seed_reaches_the_colocated_sampler_and_equal_prompts_draw_different_completions(make):
    def completions(seed, folder):
        trainer = make(seed=seed, data_seed=0, learning_rate=0.0, folder=folder, max_steps=4)
        made = watch(trainer)
        trainer.train()
        return [rows for _, rows in made]

    one, other, again = completions(1, "one"), completions(2, "other"), completions(1, "again")
    assert one == again
    assert not any(row in rows for row, rows in zip(one[0], [other[0]] * 8, strict=True))
    trainer = make(seed=1)
    prompt = {"branch": "general", "prompt": "general 1"}
    samples, _ = trainer.roll_out([{**prompt, "position": place} for place in range(8)], 12)
    assert len({tuple(sample.token_ids) for sample in samples}) == 8


@real
def test_evaluation_draws_the_same_every_time_and_leaves_the_run_as_it_was(make):
    def run(folder, **settings):
        trainer = make(folder=folder, evaluated=True, learning_rate=0.0, max_steps=4, **settings)
        made = watch(trainer)
        trainer.train()
        return trainer, [rows for _, rows in made]

    trainer, with_evaluations = run("with", eval_strategy="steps", eval_steps=1)
    _, without = run("without")
    size = len(without[0])
    steps = [rows for rows in with_evaluations if len(rows) == size and rows in without]
    assert steps == without
    evaluations = [rows for rows in with_evaluations if rows not in without]
    assert len(evaluations) == 4 and all(one == other for one, other in pairwise(evaluations))
    state = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    trainer.evaluate()
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1:] == (np.random.get_state()[1].tolist(), random.getstate())


@real
def test_a_resumed_run_is_the_run(make, tmp_path):
    trainer = make(folder="run", max_steps=4, save_strategy="steps", save_steps=2)
    trainer.train()
    losses = [line["loss"] for line in lines(trainer)]
    (tmp_path / "again").mkdir()
    (tmp_path / "run" / "checkpoint-2").rename(tmp_path / "again" / "checkpoint-2")
    trainer = make(folder="again", max_steps=4)
    trainer.train(resume_from_checkpoint=True)
    assert [line["loss"] for line in lines(trainer)][-2:] == losses[2:]


# --------------------------------------------------------------------------------------- ends, types and limits


@real
@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_completions_end_where_the_trainer_says(mode, make, models, urls):
    model = AutoModelForCausalLM.from_pretrained(models[0])
    model.generation_config.eos_token_id = ENDS
    where = {"vllm_mode": "server", "vllm_server_base_url": urls[0]} if mode == "server" else {}
    trainer = make(model=model, max_completion_length=16, generation_kwargs={"stop_token_ids": [7]}, **where)
    # So many that each kind of end is there for sure: the server draws with a seed of its own.
    prompts = [{"branch": "general", "prompt": f"general {place}", "position": place} for place in range(128)]
    samples, _ = trainer.roll_out(prompts, 16)
    completions = [sample.token_ids[sample.prompt_len :] for sample in samples]
    ends = {*ENDS, 7}
    assert all(not ends & set(ids[:-1]) for ids in completions)
    assert {ids[-1] for ids in completions} > ends
    assert all(sample.truncated == (ids[-1] not in ends) for sample, ids in zip(samples, completions, strict=True))


@real
def test_colocated_sampler_computes_in_the_students_type(make, models):
    trainer = make()
    assert trainer.vllm_generation.llm.llm_engine.model_config.dtype == torch.float32
    model = AutoModelForCausalLM.from_pretrained(models[0], dtype=torch.bfloat16)
    trainer = make(model=model, **ROUNDED)
    assert trainer.vllm_generation.llm.llm_engine.model_config.dtype == torch.bfloat16


@real
def test_more_prompts_than_a_request_takes_are_rolled_out(make, urls):
    trainer = make(vllm_mode="server", vllm_server_base_url=urls[0])
    prompts = [{"branch": "general", "prompt": f"general {place}", "position": place} for place in range(1100)]
    samples, _ = trainer.roll_out(prompts, 2)
    assert [sample.position for sample in samples] == list(range(1100))
    ids = trainer.reader.ids(prompts)
    assert [sample.token_ids[: sample.prompt_len] for sample in samples] == ids


@real
def test_server_with_a_shorter_context_is_refused(make, urls):
    with pytest.raises(
        CaMOPDError, match=rf"{urls[0]} takes sequences of {CONTEXT} tokens, .* is 264: .*--max-model-len 264"
    ):
        make(vllm_mode="server", vllm_server_base_url=urls[0], max_completion_length=200)


@real
def test_type_of_the_server_is_compared_with_the_students(make, models, urls, caplog):
    make(vllm_mode="server", vllm_server_base_url=urls[0])
    assert "rollout server" not in caplog.text
    model = AutoModelForCausalLM.from_pretrained(models[0], dtype=torch.bfloat16)
    make(model=model, vllm_mode="server", vllm_server_base_url=urls[0], **ROUNDED)
    assert "computes in float32, the student in bfloat16" in caplog.text


# ------------------------------------------------------------------------------------------------------ whole runs


@real
def test_gaps_of_the_engine_are_those_of_the_trainer(make):
    runs = []
    for student_logps in ("trainer", "engine"):
        trainer = make(student_logps=student_logps, folder=student_logps, max_steps=4)
        trainer.train()
        runs.append([line["loss"] for line in lines(trainer)])
    assert runs[0] == pytest.approx(runs[1], rel=1e-3)


@real
def test_colocated_rollouts_with_both_teachers_on_servers(make, urls):
    on_servers = make({"general": urls[1], "domain": urls[2]}, "servers")
    on_servers.train()
    here = make(folder="here")
    here.train()
    losses = [[line["loss"] for line in lines(trainer)] for trainer in (on_servers, here)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@real
def test_teacher_on_a_server_sees_a_prompt_of_its_own(make, models, urls):
    trainer = make(
        {"general": urls[1], "domain": urls[2]}, use_vllm=False, max_steps=4,
        teacher_prompt={"domain": "you know it is 7. {prompt}"},
    )  # fmt: skip
    steps, begin = [], trainer.begin_step
    trainer.begin_step = lambda rows: steps.append((rows, begin(rows))) or steps[-1][1]
    trainer.train()
    teachers = {"general": models[1], "domain": models[2]}
    teachers = {branch: AutoModelForCausalLM.from_pretrained(path) for branch, path in teachers.items()}
    apart, tokenizer = [], make_tokenizer()
    for rows, step in steps:
        for row, sample in zip(rows, step.samples, strict=True):
            seen = ("you know it is 7. " if row["branch"] == "domain" else "") + row["prompt"]
            prompt, completion = tokenizer(seen)["input_ids"], sample.token_ids[sample.prompt_len :]
            with torch.no_grad():
                logits = teachers[row["branch"]](torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1)[range(len(completion)), completion]
            apart.append(float((sample.teacher_logps - expected).abs().max()))
    assert [step.label for _, step in steps] == ["general", "domain"] * 2 and len(apart) == 32
    assert max(apart) < 1e-5, max(apart)


@real
def test_rollouts_and_both_teachers_on_servers(make, urls):
    trainer = make(
        {"general": urls[1], "domain": urls[2]}, vllm_mode="server", vllm_server_base_url=urls[0], max_steps=4,
        max_completion_length={0: 6, 2: 12},
    )  # fmt: skip
    made = watch(trainer)
    trainer.train()
    assert max(worst for worst, _ in made) < 1e-4
    assert [line["rollout/max_length"] for line in lines(trainer)] == [6, 6, 12, 12]
    assert all(line["importance/log_ratio"] < 1e-5 for line in lines(trainer))


# --------------------------------------------------------------------------------------------------- plain servers


class Proxy:
    """Passes on what goes to a server and comes back, up to a number of requests for completions: then the server is gone,
    for who asks here, in the middle of writing."""

    def __init__(self, url, requests):
        self.left, self.lock = requests, threading.Lock()
        self.target = ("127.0.0.1", int(url.rpartition(":")[2]))
        self.server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.server.getsockname()[1]}"
        self.sockets = [self.server]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with suppress(OSError):
            while True:
                client = self.server.accept()[0]
                server = socket.create_connection(self.target)
                self.sockets += [client, server]
                for ends in ((client, server), (server, client)):
                    threading.Thread(target=self.copy, args=ends, daemon=True).start()

    def copy(self, source, target):
        with suppress(OSError):
            while data := source.recv(65536):
                with self.lock:
                    self.left -= data.count(b"POST /v1/completions ")
                if self.left < 0:
                    self.close()
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def close(self):
        for each in self.sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


def reload(url, folder):
    """Give a server the weights of a folder."""
    body = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
    for path, content in (("/collective_rpc", body), ("/reset_prefix_cache", {})):
        assert httpx.post(url + path, json=content, timeout=60).status_code == 200


@pytest.fixture
def plain(urls, models):
    """Two servers with the student's base, which take its weights. Afterwards the second is a teacher again."""
    for url in urls[:2]:
        reload(url, models[0])
    yield urls[:2]
    reload(urls[1], models[1])


@pytest.fixture
def on_servers(make):
    """A run on plain servers, and each of its rollouts as `watch` records them."""
    trainers = []

    def run(servers, folder, resume=None, **settings):
        given = {"use_vllm": False, "rollout_servers": servers, "max_steps": 4, **settings}
        trainers.append(make(folder=folder, **given))
        made = watch(trainers[-1])
        trainers[-1].train(resume_from_checkpoint=resume)
        return trainers[-1], made

    yield run
    for trainer in trainers:
        trainer.run.sampler.close()


@real
@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "adapter"])
def test_plain_servers_have_the_students_weights_at_every_step_and_evaluation(lora, plain, on_servers):
    everywhere = [f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")] + ["embed_tokens"]
    adapter = LoraConfig(r=8, lora_alpha=64, target_modules=everywhere, init_lora_weights=False) if lora else None
    more = {"evaluated": True, "eval_strategy": "steps", "eval_steps": 2, "peft_config": adapter}
    trainer, made = on_servers(plain[:1] if lora else plain, "run", **more)
    assert len(made) == 4 + 2 and max(worst for worst, _ in made) < 1e-4
    assert all(line["importance/log_ratio"] < 1e-5 for line in lines(trainer))
    assert not os.path.exists(os.path.join(trainer.args.output_dir, "_rollout_weights"))


@real
@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "adapter"])
def test_plain_server_with_old_weights_stops_the_run(lora, plain, make):
    adapter = LoraConfig(r=8, lora_alpha=64, target_modules="all-linear", init_lora_weights=False) if lora else None
    servers = plain[:1] if lora else plain
    trainer = make(use_vllm=False, rollout_servers=servers, peft_config=adapter, learning_rate=3e-2)
    sync = trainer.engine.sync
    trainer.engine.sync = lambda under_way: trainer.state.global_step == 1 or sync(under_way)
    with pytest.raises(GuardError, match=r"step 2 \(domain\): the log-probs"):
        trainer.train()
    trainer.run.sampler.close()


@real
def test_plain_server_on_a_cpu_is_not_given_a_head_that_is_the_embeddings(plain, make, models):
    student = AutoModelForCausalLM.from_pretrained(models[0], tie_word_embeddings=True)
    trainer = make(use_vllm=False, rollout_servers=plain, model=student)
    assert trainer.run.sampler.types() == dict.fromkeys(plain, "torch.float32")  # and so no warning
    with pytest.raises(RolloutError, match="tie_word_embeddings"):
        trainer.train()
    trainer.run.sampler.close()


@real
def test_plain_server_takes_the_weights_of_another_rank_while_it_writes_and_writes_the_same(plain, models):
    version, sampling = (
        Version("one", Path(models[0]), is_adapter=False),
        Sampling(80, frozenset(), len(VOCAB)),
    )
    first, second = (Sampler(plain[:1]) for _ in range(2))
    try:
        first.hold()
        first.adopt(version, first.give(version).result())
        ask = lambda: [first.submit([1, 7, 8], seed, sampling) for seed in range(2)]  # noqa: E731
        wait(calm := ask())
        second.hold()
        second.adopt(version, {})  # as where the server was started again since
        written = ask()
        time.sleep(0.1)
        assert not any(one.done() for one in written)
        second.begin().result()  # while the first's are under way
        assert [one.result().token_ids for one in written] == [one.result().token_ids for one in calm]
    finally:
        first.close()
        second.close()


@real
def test_plain_servers_draw_by_seed_step_and_position_and_a_dead_one_costs_nothing(plain, on_servers, tmp_path):
    trainer, one = on_servers(plain[:1], "one", save_strategy="steps", save_steps=2)
    _, two = on_servers(plain, "two")
    proxy = Proxy(plain[1], requests=9)  # in the third step, if each server gets half
    _, dead = on_servers([plain[0], proxy.url], "dead")
    assert proxy.left < 0
    assert [rows for _, rows in one] == [rows for _, rows in two] == [rows for _, rows in dead]
    assert max(worst for worst, _ in dead) < 1e-4
    (tmp_path / "again").mkdir()
    (tmp_path / "one" / "checkpoint-2").rename(tmp_path / "again" / "checkpoint-2")
    again, rest = on_servers(plain, "again", resume=True)
    assert [rows for _, rows in rest] == [rows for _, rows in one[2:]]
    assert [line["loss"] for line in lines(again)][-2:] == [line["loss"] for line in lines(trainer)][2:]


@real
@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "adapter"])
def test_plain_servers_write_a_step_ahead_by_the_weights_of_before(lora, plain, urls, make, tmp_path):
    """With a real teacher, which scores each completion as it is written; and a resumed run is the run."""
    adapter = LoraConfig(r=8, lora_alpha=64, target_modules="all-linear", init_lora_weights=False) if lora else None
    runs = []
    for folder, resume in (("whole", None), ("cut", "whole/checkpoint-2")):
        torch.manual_seed(0)  # of the adapter
        trainer = make(
            {"general": urls[2], "domain": urls[2]}, folder, use_vllm=False, rollout_lag=1,
            rollout_servers=plain[: 1 if lora else 2],  # the other one takes no adapters
            max_steps=4, peft_config=adapter, save_strategy="steps", save_steps=2,
        )  # fmt: skip
        seen, take = [], trainer.rollouts.take

        def look(rows, *limits, take=take, seen=seen, trainer=trainer):
            samples, cut = take(rows, *limits)
            student = deepcopy(trainer.accelerator.unwrap_model(trainer.model)).eval()
            seen.append((student, [(sample.token_ids, sample.prompt_len, sample.rollout_logps) for sample in samples]))
            return samples, cut

        trainer.rollouts.take = look
        if resume:
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / resume).rename(tmp_path / folder / "checkpoint-2")
        trainer.train(resume_from_checkpoint=bool(resume))
        trainer.run.sampler.close()
        runs.append((seen, lines(trainer)))
    (seen, recorded), (again, after) = runs
    for number, (_, rows) in enumerate(seen):
        drawn_by, _ = seen[max(0, number - 1)]
        for ids, start, logps in rows:
            with torch.no_grad():
                found = drawn_by(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            assert (found[range(start - 1, len(ids) - 1), ids[start:]] - logps).abs().max() < 1e-4
    assert [line["rollout/lag"] for line in recorded] == [0, 1, 1, 1]
    assert [[ids for ids, *_ in rows] for _, rows in again] == [[ids for ids, *_ in rows] for _, rows in seen[3:]]
    assert [line["loss"] for line in after][-2:] == pytest.approx([line["loss"] for line in recorded][2:], rel=1e-4)


START = """
import sys
import vllm_on_cpu
from conftest import make_prompts, make_tokenizer
from trainers import make_trainer

def make(output, student, general, domain, **settings):
    return make_trainer(output, make_tokenizer(), model=student, teachers={"general": general, "domain": domain},
                        use_vllm=True, diagnostics_steps=0, max_steps=1, **settings)

"""


def run_script(python, text, folder, models, *launcher):
    """In processes of its own, with the folder's name and the models as arguments; returns what it says."""
    path = folder / "run.py"
    path.write_text(START + text)
    of_launchers = ("MASTER_", "RANK", "LOCAL_RANK", "WORLD_SIZE")  # which TRL has set in this process
    environment = {name: value for name, value in os.environ.items() if not name.startswith(of_launchers)}
    places = [os.path.dirname(__file__), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment |= {"PYTHONPATH": os.pathsep.join(places), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    command = [python, *launcher, str(path), str(folder / "output"), *models]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stderr


@real
def test_a_run_in_this_process_ends_without_a_traceback(models, tmp_path, vllm_python):
    text = """
if __name__ == "__main__":
    trainer = make(*sys.argv[1:])
    trainer.train()
    trainer.accelerator.end_training()
"""
    assert "Traceback" not in run_script(vllm_python, text, tmp_path, models)


@real
def test_ranks_that_share_an_engine_roll_out_right_in_training_and_evaluation(models, tmp_path, vllm_python):
    text = """
from test_vllm_rollouts import watch

if __name__ == "__main__":
    held_out = {"general": make_prompts("general", 8)}
    trainer = make(*sys.argv[1:], vllm_tensor_parallel_size=2, prompts_per_step=8, max_completion_length=12,
                   eval_dataset=held_out, ddp_timeout=7200)
    made = watch(trainer)
    trainer.train()
    trainer.evaluate()
    assert len(made) == 2 and max(worst for worst, _ in made) < 1e-4, [worst for worst, _ in made]
"""
    run_script(
        vllm_python, text, tmp_path, models, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"
    )
