"""Real weights, real vLLM servers on CPU, real text: `make test-vllm`.

Two teachers: the general one, SmolLM2-135M-Instruct on two replicas, and a "domain" one with other weights, which
`camopd serve` starts.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import torch
import yaml
from datasets import Dataset
from fake_vllm import other_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from camopd import CaMOPDConfig, CaMOPDTrainer
from camopd.commands.demo_stages import unpack_base_model
from camopd.demo_data import load_prompts
from camopd.errors import TeacherError
from camopd.step import StepCallback
from camopd.teachers.check import check_server
from camopd.teachers.local import LocalTeacher
from camopd.teachers.vllm.teacher import ServerTeacher


pytestmark = pytest.mark.vllm

TESTS = Path(__file__).parent
MAX_MODEL_LEN = 512
UP_SECONDS = 400  # three servers load at once on two cores


class Server:
    """A plain vLLM process."""

    def __init__(self, python: str, model: str, log: Path, port: int = 0):
        self.model, self.log, self.port = model, log, port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        # The `vllm` command looks for a distribution of that name, which the CPU build is not.
        command = [
            python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "smollm2",
            "--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32", "--max-model-len", str(MAX_MODEL_LEN),
            "--enforce-eager", "--enable-scale-out",
        ]  # fmt: skip
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
        with open(log, "a") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def wait_until_up(self) -> None:
        deadline = time.monotonic() + UP_SECONDS
        while not answers(self.url + "/health"):
            assert self.process.poll() is None, f"vLLM stopped:\n{self.log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"vLLM is not up:\n{self.log.read_text()[-3000:]}"
            time.sleep(1)

    def kill(self) -> None:
        """As the kernel's out-of-memory killer does it."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            while listens(self.port):  # what it has started ends behind it
                time.sleep(0.001)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def base_model(tmp_path_factory):
    return unpack_base_model(tmp_path_factory.mktemp("models") / "general")


@pytest.fixture(scope="module")
def domain_model(base_model, tmp_path_factory):
    """The base model with its weights bent: the student's start, and its domain teacher."""
    model = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.02 * torch.sin(torch.arange(parameter.numel())).view(parameter.shape))
    folder = tmp_path_factory.mktemp("models") / "domain"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base_model).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def config(domain_model, tmp_path_factory):
    """YAML of a run whose domain teacher `camopd serve` is to start."""
    folder = tmp_path_factory.mktemp("run")
    settings = {
        "model_name_or_path": domain_model, "dtype": "float32", "teachers": {"domain": domain_model},
        "schedule": "domain:1", "output_dir": str(folder / "output"), "max_prompt_length": 128,
        "max_completion_length": MAX_MODEL_LEN - 129, "use_cpu": True, "bf16": False, "report_to": "none",
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def servers(base_model, config, vllm_python, tmp_path_factory):
    """The general teacher's two replicas, and the process of `camopd serve` with the domain's teacher."""
    logs = tmp_path_factory.mktemp("logs")
    replicas = [Server(vllm_python, base_model, logs / f"general-{replica}.log") for replica in range(2)]
    command = [sys.executable, "-m", "camopd.cli", "serve", str(config), "--port", str(free_port())]
    environment = {**os.environ, "CAMOPD_VLLM_PYTHON": vllm_python, "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"  # a worker of its own, which has to stop with it
    with open(logs / "serve.log", "w") as output:
        serve = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        for replica in replicas:
            replica.wait_until_up()
        teachers = Path(yaml.safe_load(config.read_text())["output_dir"]) / "_teachers.json"
        deadline = time.monotonic() + UP_SECONDS
        while not teachers.exists():
            assert serve.poll() is None, (logs / "serve.log").read_text()[-3000:]
            assert time.monotonic() < deadline, (logs / "serve.log").read_text()[-3000:]
            time.sleep(1)
        yield replicas, json.loads(teachers.read_text())["domain"][0], serve, logs
    finally:
        for replica in replicas:
            replica.kill()
        if serve.poll() is None:
            serve.send_signal(signal.SIGINT)
            serve.wait(60)


@pytest.fixture
def general(servers):
    """URL of a replica of the general teacher."""
    return servers[0][0].url


@pytest.fixture(scope="module")
def conversations(base_model):
    """Token ids and prompt lengths of 15 real conversations of different lengths, one with an empty answer."""
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    token_ids, prompt_lens = [], []
    for row in load_prompts("domain", "finetune")[:15]:
        messages = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        answer = tokenizer(row["answer"] + "<|im_end|>")["input_ids"]
        token_ids.append(prompt + answer)
        prompt_lens.append(len(prompt))
    token_ids[3] = token_ids[3][: prompt_lens[3]]
    return token_ids, prompt_lens


def test_server_and_in_process_teacher_agree_to_1e_3_per_token(general, base_model, conversations):
    local = LocalTeacher(AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32), "local", "cpu", 4)
    teacher = ServerTeacher([general], "general")
    asked = teacher.submit(*conversations, top_k=5)  # both score at once
    expected, found = local.score(*conversations, top_k=5), asked.result()
    assert len(found) == len(expected) == 15
    assert len(found[3].logps) == 0
    worst = max((f.logps - e.logps).abs().max().item() for f, e in zip(found, expected, strict=True) if len(f.logps))
    tokens = sum(len(f.logps) for f in found)
    print(f"largest difference over {tokens} tokens: {worst:.2e} nats")
    assert tokens > 1000
    assert worst < 1e-3
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f.top_logps, e.top_logps, atol=1e-3, rtol=0)
    some = [part[:5] for part in conversations]
    for f, e in zip(teacher.score(*some), found[:5], strict=True):  # without the top k
        torch.testing.assert_close(f.logps, e.logps, atol=1e-3, rtol=0)


def test_compact_request_is_one_that_vllm_takes_where_its_runner_can(general, vllm_python):
    teacher = ServerTeacher([general], "general")
    assert teacher.transports == {general: "JSON"}  # the CPU build runs vLLM's first model runner
    recorded = json.loads((TESTS / "recorded_generate.json").read_text())
    run = subprocess.run(
        [vllm_python, str(TESTS / "schema_of_vllm.py")],
        input=json.dumps(recorded["request"]),
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert json.loads(run.stdout.splitlines()[-1]) == recorded["answer"]
    body = {**recorded["request"], "model": "smollm2"}
    answer = httpx.post(f"{general}/inference/v1/generate", json=body)
    assert answer.status_code == 400
    assert "requires the V2 model runner" in answer.text  # and finds nothing else wrong with the request


def test_context_that_is_too_short_is_refused_with_the_flag_to_set(general):
    teacher = ServerTeacher([general], "general")
    teacher.check_context(MAX_MODEL_LEN - 1)
    with pytest.raises(TeacherError, match=rf"takes sequences of {MAX_MODEL_LEN} tokens.*--max-model-len 4097"):
        teacher.check_context(4096)


def test_students_tokenizer_and_template_are_recognised_and_others_refused(general, base_model):
    teacher = ServerTeacher([general], "general")
    findings = list(check_server("general", teacher, AutoTokenizer.from_pretrained(base_model), 200))
    assert {finding.subject: finding.level for finding in findings} == {
        "reachable": "ok", "context": "ok", "tokenizer": "ok", "chat template": "ok",
    }  # fmt: skip
    findings = {finding.subject: finding for finding in check_server("general", teacher, other_tokenizer(), 200)}
    assert findings["tokenizer"].level == "error"
    assert "has another tokenizer than the student" in findings["tokenizer"].text


def test_request_the_server_refuses_fails_at_once_with_its_own_words(general):
    started = time.monotonic()
    with pytest.raises(TeacherError, match=rf"answered 400:.*{MAX_MODEL_LEN}"):
        ServerTeacher([general], "general").score([[1] * (MAX_MODEL_LEN + 10)], [5])
    assert time.monotonic() - started < 5


def test_camopd_check_finds_the_served_teacher_and_nothing_wrong_with_it(servers, config, vllm_python):
    command = [vllm_python, "-m", "camopd.cli", "check", str(config)]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "160"})
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr
    assert servers[1] in run.stdout
    for subject in ("reachable", "context", "tokenizer", "chat template", "log-probs", "self-gap", "initial KL"):
        assert subject in run.stdout
    assert "error" not in run.stdout


def make_trainer(folder, student, teachers):
    def shortest(rows):  # three servers share two cores with this
        return sorted((row["prompt"] for row in rows), key=len)[:16]

    prompts = {
        branch: Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in shortest(rows)])
        for branch, rows in (
            ("general", load_prompts("general", "train")),
            ("domain", load_prompts("domain", "train")),
        )
    }
    args = CaMOPDConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", save_strategy="no", max_steps=2,
        gradient_checkpointing=False, prompts_per_step=4, per_device_train_batch_size=2, max_completion_length=8,
        max_prompt_length=128, schedule="general:1,domain:1", learning_rate=1e-5, diagnostics_steps=0,
    )  # fmt: skip
    return CaMOPDTrainer(
        model=AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32), teachers=teachers, args=args,
        train_dataset=prompts, processing_class=AutoTokenizer.from_pretrained(student),
    )  # fmt: skip


def steps_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_steps(found, expected):
    assert len(found) == len(expected) == 2
    for one, other in zip(found, expected, strict=True):
        branch = one["branch"]
        for name in ("loss", "grad_norm", f"gap/{branch}/mean", f"gap/{branch}/abs_mean", f"score/{branch}/max"):
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-4), name
        assert one[f"selection/{branch}/kept"] == other[f"selection/{branch}/kept"]


def test_run_with_its_teachers_on_servers_is_the_one_in_the_process_though_a_replica_is_killed_in_the_middle_of_a_step(
    servers, domain_model, base_model, conversations, vllm_python, tmp_path, caplog
):
    make_trainer(tmp_path / "local", domain_model, {"general": base_model, "domain": domain_model}).train()
    expected_steps = steps_of(tmp_path / "local")
    assert expected_steps[0]["gap/general/abs_mean"] > 0.05
    replicas, domain, _, logs = servers
    trainer = make_trainer(tmp_path, domain_model, {"general": [r.url for r in replicas], "domain": domain})
    teacher = trainer.teachers["general"]
    submit, started, killed = teacher.submit, [], []

    class Started(StepCallback):
        def on_step_started(self, step):  # after the check of the teachers
            started.append(step.number)

    def kill_while_it_scores(*args):
        future = submit(*args)
        while started and not killed and not future.done():
            if teacher.replicas.all[1].requests_in_flight:
                replicas[1].kill()
                killed.append(not future.done())
                # It starts again on its port while the run goes on.
                replicas[1] = Server(vllm_python, base_model, logs / "general-1.log", replicas[1].port)
            time.sleep(0.001)
        return future

    teacher.submit = kill_while_it_scores
    trainer.add_callback(Started())
    trainer.train()
    assert killed == [True]
    steps = steps_of(tmp_path)
    assert_same_steps(steps, expected_steps)
    for line in steps:
        branch = line["branch"]
        assert 0 < line[f"time/{branch}/teacher_hidden"] <= line[f"time/{branch}/teacher"]
        assert line["time/domain/teacher_idle"] > 0
    assert f"replica {replicas[1].url} is out" in caplog.text

    # When it is there again, it is let in; then the other one is killed and it does all the work.
    replicas[1].wait_until_up()
    deadline = time.monotonic() + 30
    while f"replica {replicas[1].url} is back" not in caplog.text:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    some = [part[:8] for part in conversations]
    expected = teacher.score(*some)
    asked = teacher.submit(*some)
    while not teacher.replicas.all[0].requests_in_flight:
        time.sleep(0.001)
    replicas[0].kill()
    assert not asked.done()
    found = asked.result()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.logps, other.logps, atol=1e-3, rtol=0)


def processes_that_print_into(pipe: str) -> int:
    """How many of this machine's processes have it as their standard output."""
    count = 0
    for output in Path("/proc").glob("[0-9]*/fd/1"):
        with contextlib.suppress(OSError):  # it has ended
            count += os.readlink(output) == pipe
    return count


def test_camopd_serve_stops_everything_on_ctrl_c(servers, config):
    _, domain, serve, logs = servers
    (server,) = re.findall(r"Started server process \[(\d+)\]", (logs / "serve.log").read_text())
    pipe = os.readlink(f"/proc/{server}/fd/1")
    assert processes_that_print_into(pipe) >= 3  # the server, its engine and its worker
    serve.send_signal(signal.SIGINT)
    assert serve.wait(60) == 0
    assert not answers(f"{domain}/health")
    assert processes_that_print_into(pipe) == 0
    assert not (Path(yaml.safe_load(config.read_text())["output_dir"]) / "_teachers.json").exists()
    text = (logs / "serve.log").read_text()
    assert f"domain: {domain}" in text
    assert "[domain/0]" in text
    assert text.rstrip().endswith("stopped.")
