"""The examples: the plain loop is held to the trainer, the others to their command lines."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_prompts, make_tokenizer
from steps import ROWS, Case, FakeSampler, trainer_step

from camopd.prompts import PromptDealer, PromptStream
from camopd.schedule import Schedule


EXAMPLES = Path(__file__).parent.parent / "examples"


def load_example(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("branch", ["general", "domain"])
def test_minimal_loop_has_the_loss_and_gradient_of_the_trainer(branch, tmp_path):
    loop = load_example("minimal_loop")
    other = "domain" if branch == "general" else "general"
    case = Case("minimal", schedule=f"{branch}:1,{other}:1")
    parameters, metrics = trainer_step(case, str(tmp_path), batch_size=2)

    student, teacher = make_model(1), make_model(2 if branch == "general" else 3)
    streams = {name: PromptStream(make_prompts(name), name, seed=42) for name in ("general", "domain")}
    rows = PromptDealer(streams, Schedule.parse(case.schedule), ROWS, num_steps=1).rows_of(0)
    sequences, prompt_lens, logps = [], [], []
    for row in rows:
        prompt = make_tokenizer()(row["prompt"])["input_ids"]
        completion, rollout = FakeSampler.complete(tuple(prompt))
        sequences.append(prompt + completion)
        prompt_lens.append(len(prompt))
        logps.append(torch.tensor(rollout))
    rollout_logps = torch.nn.utils.rnn.pad_sequence(logps, batch_first=True)
    loss, _ = loop.step_loss(student, teacher, branch, sequences, prompt_lens, rollout_logps)
    assert loss.item() == pytest.approx(metrics["loss"], rel=1e-6)

    loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 0.5)
    torch.optim.SGD(student.parameters(), lr=0.1).step()
    for name, value in student.named_parameters():
        torch.testing.assert_close(value.detach(), parameters[name], atol=1e-6, rtol=0)


def test_minimal_loop_runs_as_a_script(tmp_path):
    tokenizer = make_tokenizer()
    for name, seed in (("student", 1), ("teacher", 2)):
        make_model(seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / "minimal_loop.py"), str(tmp_path / "student"), str(tmp_path / "teacher"),
         "--steps", "4", "--save-to", str(tmp_path / "recovered")],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    assert [line.split()[2] for line in run.stdout.splitlines() if line.startswith("step")] == [
        "general:",
        "general:",
        "general:",
        "domain:",
    ]
    assert (tmp_path / "recovered" / "model.safetensors").is_file()


def test_minimal_loop_is_short_and_uses_no_trl():
    text = (EXAMPLES / "minimal_loop.py").read_text()
    assert "import trl" not in text and "from trl" not in text
    assert len(text.splitlines()) < 170
