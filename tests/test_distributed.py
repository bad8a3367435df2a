"""The launch files of configs/accelerate, as they are, on two CPU processes: three steps, a checkpoint, a resume, a model.

All of them must give the very run that plain data parallel gives.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from conftest import make_model, make_tokenizer, rounding
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


TESTS = Path(__file__).parent
CONFIGS = TESTS.parent / "configs" / "accelerate"
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
EXTENSIONS = tempfile.TemporaryDirectory()
# Adam divides by a gradient that may be nothing but rounding; not with an epsilon as large as gradients are.
LEARNING_RATE, ADAM_EPSILON, STEPS = 0.01, 0.01, 3
WEIGHT = STEPS * (LEARNING_RATE * rounding(1) / ADAM_EPSILON + rounding(1, sums=1))  # gradients are clipped to 1
# Gaps, losses and cosines of weights that far apart.
METRIC = 2e-4
FULL = ["--optimizer_moments", "per_branch"]
ENGINE = [*FULL, "--student_logps", "engine", "--importance_sampling_mode", "none"]
LORA = ["--lora", "true"]
COMPARED = (
    "loss", "grad_norm", "update/cosine", "gap/general/mean", "gap/domain/mean",
    "conflict/cosine", "conflict/dot", "conflict/general_norm", "conflict/domain_norm", "coherence/general/coh_full",
    "coherence/general/coh_selected", "coherence/domain/coh_full", "coherence/general/gcg_control",
)  # fmt: skip


def launch(config: str, folder: Path, *settings: str, bf16: bool = False) -> list[dict]:
    """A run of train_tiny.py in `folder`/run; its lines of metrics.jsonl."""
    student = folder / "student"
    if not student.exists():
        make_model(1).save_pretrained(student)
        make_tokenizer().save_pretrained(student)
    command = [
        *ACCELERATE, "--config_file", str(CONFIGS / f"{config}.yaml"), "--num_processes", "2", "--main_process_port", "0",
        "--mixed_precision", "bf16" if bf16 else "no", str(TESTS / "train_tiny.py"), "--output_dir", str(folder / "run"),
        "--use_cpu", "true", "--bf16", str(bf16).lower(),
        "--report_to", "none", "--max_steps", "3", "--schedule", "general:1,domain:1", "--prompts_per_step", "8",
        "--per_device_train_batch_size", "2", "--max_completion_length", "9", "--max_prompt_length", "64",
        "--learning_rate", str(LEARNING_RATE), "--adam_epsilon", str(ADAM_EPSILON), "--save_steps", "2", *settings,
    ]  # fmt: skip
    if config == "fsdp2":
        command += ["--fsdp_on_cpu", "true"]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        # DeepSpeed compiles an extension; a run that was killed while it did leaves a lock that others wait for, for ever.
        "TORCH_EXTENSIONS_DIR": EXTENSIONS.name,
    }
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, f"{run.stdout[-2000:]}\n{run.stderr[-4000:]}"
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("*model.safetensors")  # or adapter_model
    return load_file(path)


@pytest.fixture(scope="module")
def data_parallel(tmp_path_factory):
    """`(lines, weights)` of the run that the others are held to, for full training and for LoRA."""
    runs = {}

    def run(settings):
        if settings[0] not in runs:
            folder = tmp_path_factory.mktemp("ddp")
            runs[settings[0]] = launch("ddp", folder, *settings[:2]), weights(folder / "run" / "final")
            assert json.loads((folder / "run" / "facts.json").read_text())["type"] == "MULTI_CPU"
        return runs[settings[0]]

    return run


@pytest.mark.parametrize(
    ("config", "method", "checkpointing"),
    [
        ("zero2", FULL, "true"),
        ("zero3", FULL, "false"),
        ("fsdp2", ENGINE, "true"),
        ("zero3", LORA, "true"),
        ("fsdp2", LORA, "false"),
    ],
    ids=["zero2", "zero3", "fsdp2", "zero3-lora", "fsdp2-lora"],
)
@pytest.mark.slow
def test_sharded_runs_are_the_data_parallel_run(config, method, checkpointing, data_parallel, tmp_path):
    lines = launch(config, tmp_path, *method, "--gradient_checkpointing", checkpointing)
    facts = json.loads((tmp_path / "run" / "facts.json").read_text())
    assert facts["world_size"] == 2
    expected_kind = {"zero2": ("DEEPSPEED", 2), "zero3": ("DEEPSPEED", 3), "fsdp2": ("FSDP", None)}[config]
    assert (facts["type"], facts["zero_stage"]) == expected_kind
    if config == "fsdp2":
        assert facts["sharded"] == ["DTensor"]

    expected_lines, expected = data_parallel(method)
    assert [line["branch"] for line in lines] == ["general", "domain", "general"]
    for line, other in zip(lines, expected_lines, strict=True):
        for name in COMPARED:
            if name in other:
                assert line[name] == pytest.approx(other[name], rel=METRIC, abs=METRIC), (line["step"], name)
    found = weights(tmp_path / "run" / "final")
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].float(), value.float(), atol=WEIGHT, rtol=0, msg=name)

    # What a user does with it.
    loader = AutoPeftModelForCausalLM if method is LORA else AutoModelForCausalLM
    loaded = loader.from_pretrained(tmp_path / "run" / "final")
    assert torch.isfinite(loaded(torch.tensor([[5, 6, 7]])).logits).all()

    # Stopped after step 2 and resumed, it is the same run.
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")
    shutil.rmtree(tmp_path / "run" / "final")
    again = launch(
        config, tmp_path, *method, "--gradient_checkpointing", checkpointing,
        "--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-2"),
    )  # fmt: skip
    assert [line["step"] for line in again] == [1, 2, 3]
    assert again[-1]["loss"] == pytest.approx(lines[-1]["loss"], rel=METRIC)
    for name, value in weights(tmp_path / "run" / "final").items():
        torch.testing.assert_close(value, found[name], atol=WEIGHT, rtol=0, msg=name)


@pytest.mark.parametrize("config", ["zero2", "fsdp2"])
@pytest.mark.slow
def test_a_teacher_with_the_students_weights_has_gaps_of_exactly_0_in_bfloat16(config, tmp_path):
    """Both launchers cast the float32 weights that were loaded, each in its way, and the teacher's must be cast alike."""
    (line,) = launch(
        config, tmp_path, "--max_steps", "1", "--schedule", "domain:1,general:1", "--save_strategy", "no", bf16=True
    )  # the domain's teacher is the student's own folder
    assert line["branch"] == "domain"
    assert line["gap/domain/abs_mean"] == line["gap/domain/abs_p99"] == line["loss"] == 0


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_launch_files_are_read_by_accelerate_and_leave_accumulation_to_the_trainer(path):
    config = load_config_from_file(str(path))
    assert config.num_processes == {"single_gpu": 1, "multi_node": 32}.get(path.stem, 8)
    assert "gradient_accumulation_steps" not in str(yaml.safe_load(path.read_text()))
    assert f"configs/accelerate/{path.name}" in path.read_text()  # its own launch line
