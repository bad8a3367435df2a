"""Real weights, a real vLLM server on CPU, real text: `make test-vllm`."""

import os
import socket
import subprocess
import time
from pathlib import Path

import httpx
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from camopd import CaMOPDConfig, CaMOPDTrainer
from camopd.demo import load_prompts, unpack_base_model
from camopd.errors import TeacherError
from camopd.teachers.local import LocalTeacher
from camopd.teachers.server import ServerTeacher


pytestmark = pytest.mark.vllm

ROOT = Path(__file__).parent.parent
MODEL_NAME = "smollm2"
MAX_MODEL_LEN = 512


@pytest.fixture(scope="module")
def base_model(tmp_path_factory):
    return unpack_base_model(tmp_path_factory.mktemp("models") / "general")


@pytest.fixture(scope="module")
def server(base_model, tmp_path_factory):
    """URL of a vLLM server with SmolLM2-135M-Instruct in float32."""
    python = Path(os.environ.get("CAMOPD_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
    assert python.exists(), f"{python} does not exist; `make test-vllm` makes it"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The `vllm` command looks for a distribution of that name, which the CPU build is not.
    command = [
        str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", base_model, "--served-model-name", MODEL_NAME,
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", str(MAX_MODEL_LEN),
        "--enforce-eager",
    ]  # fmt: skip
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment = {name: value for name, value in environment.items() if not name.startswith("MALLOC_")}
    with open(log, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 300
        while True:
            assert process.poll() is None, f"vLLM stopped:\n{log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"vLLM is not up after 300 s:\n{log.read_text()[-3000:]}"
            try:
                if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(1)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture(scope="module")
def conversations(base_model):
    """Token ids and prompt lengths of 24 real conversations of different lengths, one with an empty answer."""
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    token_ids, prompt_lens = [], []
    for row in load_prompts("domain", "finetune")[:24]:
        messages = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        answer = tokenizer(row["answer"] + "<|im_end|>")["input_ids"]
        token_ids.append(prompt + answer)
        prompt_lens.append(len(prompt))
    token_ids[3] = token_ids[3][: prompt_lens[3]]
    return token_ids, prompt_lens


def test_server_and_in_process_teacher_agree_to_1e_3_per_token(server, base_model, conversations):
    local = LocalTeacher(AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32), "local", "cpu", 4)
    expected = local.score(*conversations, top_k=5)
    found = ServerTeacher([server], "general").score(*conversations, top_k=5)
    assert len(found) == len(expected) == 24
    assert len(found[3].logps) == 0
    worst = max((f.logps - e.logps).abs().max().item() for f, e in zip(found, expected, strict=True) if len(f.logps))
    tokens = sum(len(f.logps) for f in found)
    print(f"largest difference over {tokens} tokens: {worst:.2e} nats")
    assert tokens > 1000
    assert worst < 1e-3
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f.top_logps, e.top_logps, atol=1e-3, rtol=0)


def test_a_training_step_is_the_same_with_the_teacher_on_a_server(server, base_model, tmp_path):
    prompts = {
        branch: Dataset.from_list([{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows[:8]])
        for branch, rows in (
            ("general", load_prompts("general", "train")),
            ("domain", load_prompts("domain", "train")),
        )
    }
    steps = []
    for teacher in (server, base_model):
        args = CaMOPDConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", save_strategy="no", max_steps=1,
            gradient_checkpointing=False, prompts_per_step=4, per_device_train_batch_size=2, max_completion_length=16,
            max_prompt_length=128, schedule="general:1,domain:1",
        )  # fmt: skip
        student = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
        with torch.no_grad():  # a student that differs from its teacher
            for parameter in student.parameters():
                parameter.mul_(1 + 0.02 * torch.sin(torch.arange(parameter.numel())).view(parameter.shape))
        trainer = CaMOPDTrainer(
            model=student, teachers={"general": teacher, "domain": base_model}, args=args, train_dataset=prompts,
            processing_class=AutoTokenizer.from_pretrained(base_model),
        )  # fmt: skip
        trainer.train()
        steps.append(dict(trainer._step_metrics))
    by_server, in_process = steps
    assert in_process["gap/general/abs_mean"] > 0.05
    for name in ("loss", "grad_norm", "gap/general/mean", "gap/general/abs_mean", "score/general/max"):
        assert by_server[name] == pytest.approx(in_process[name], rel=1e-3, abs=1e-4), name
    assert by_server["selection/general/kept"] == in_process["selection/general/kept"]


def test_a_context_that_is_too_short_is_refused_with_the_flag_to_set(server):
    teacher = ServerTeacher([server], "general")
    teacher.check_context(MAX_MODEL_LEN - 1)
    with pytest.raises(TeacherError, match=rf"takes sequences of {MAX_MODEL_LEN} tokens.*--max-model-len 4097"):
        teacher.check_context(4096)


def test_the_students_tokenizer_is_recognised_and_another_one_refused(server, base_model, tokenizer):
    teacher = ServerTeacher([server], "general")
    teacher.check_tokenizer(AutoTokenizer.from_pretrained(base_model))
    with pytest.raises(TeacherError, match="has another tokenizer than the student"):
        teacher.check_tokenizer(tokenizer)


def test_a_request_the_server_refuses_fails_at_once_with_its_own_words(server):
    started = time.monotonic()
    with pytest.raises(TeacherError, match=rf"answered 400:.*{MAX_MODEL_LEN}"):
        ServerTeacher([server], "general").score([[1] * (MAX_MODEL_LEN + 10)], [5])
    assert time.monotonic() - started < 5
