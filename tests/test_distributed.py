"""The launch files of configs/accelerate, as they are, on two CPU processes: three steps, a checkpoint, a resume, a model.

All of them must give the very run that plain data parallel gives.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from conftest import rounding
from launches import ADAM_EPSILON, CONFIGS, LEARNING_RATE, STEPS, launch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


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


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_launch_files_are_read_by_accelerate_and_leave_accumulation_to_the_trainer(path):
    config = load_config_from_file(str(path))
    assert config.num_processes == {"single_gpu": 1, "multi_node": 32}.get(path.stem, 8)
    assert "gradient_accumulation_steps" not in str(yaml.safe_load(path.read_text()))
    assert f"configs/accelerate/{path.name}" in path.read_text()  # its own launch line
