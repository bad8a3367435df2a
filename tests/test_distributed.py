"""The launch files of configs/accelerate, as they are, on two CPU processes: three steps, a checkpoint, a resume, a model.

All of them must give the very run that plain data parallel gives.
"""

import json
import os
import shutil
import subprocess
import sys
from contextlib import closing
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from conftest import make_model, make_tokenizer, rounding
from fake_rollouts import FakeRollouts
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


TESTS = Path(__file__).parent
CONFIGS = TESTS.parent / "configs" / "accelerate"
# Adam divides by a gradient that may be nothing but rounding; not with an epsilon as large as gradients are.
LEARNING_RATE, ADAM_EPSILON, STEPS = 0.01, 0.01, 3
WEIGHT = STEPS * (LEARNING_RATE * rounding(1) / ADAM_EPSILON + rounding(1, sums=1))  # gradients are clipped to 1
# Gaps, losses and cosines of weights that far apart.
METRIC = 2e-4
FULL = ["--optimizer_moments", "per_branch"]
ENGINE = [*FULL, "--student_logps", "engine", "--importance_sampling_mode", "none"]
LORA = ["--lora", "true"]
# A step of both branches and one of the teacher that is the student itself; some micro-batches have rows of one alone.
EXACT = [*LORA, "--rebalance", "false", "--max_steps", "2", "--schedule", "general:1+domain:1,domain:1"]
EXACT_RUNS = {
    "full": ["--divergence", "full"], "kl": ["--baseline", "kl"],
    "top_k": ["--divergence", "top_k", "--divergence_top_k", "5"],
}  # fmt: skip
# (launch file, settings, activation checkpointing), by name; the launch files are those that shard.
SHARDED = {
    "zero2": ("zero2", FULL, "true"),
    "zero3": ("zero3", FULL, "false"),
    "fsdp2": ("fsdp2", ENGINE, "true"),
    "zero3-lora": ("zero3", LORA, "true"),
    "fsdp2-lora": ("fsdp2", LORA, "false"),
}
# The domain's teacher is the student's own folder.
BF16 = ["--bf16", "true", "--max_steps", "1", "--schedule", "domain:1,general:1", "--save_strategy", "no"]
COMPARED = (
    "loss", "grad_norm", "update/cosine", "gap/general/mean", "gap/domain/mean",
    "conflict/cosine", "conflict/dot", "conflict/general_norm", "conflict/domain_norm", "coherence/general/coh_full",
    "coherence/general/coh_selected", "coherence/domain/coh_full", "coherence/general/gcg_control",
)  # fmt: skip


pytestmark = pytest.mark.xdist_group("launches")  # on one worker, where they share their launches


def launch(python: str, config: str, folder: Path, runs: dict[str, list[str]]) -> None:
    """Runs of train_tiny.py, one after the other in the same two processes of `python`, each in `folder`/NAME."""
    words = [
        "--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--max_steps", "3", "--schedule",
        "general:1,domain:1", "--prompts_per_step", "8", "--per_device_train_batch_size", "2", "--max_completion_length",
        "9", "--max_prompt_length", "64", "--learning_rate", str(LEARNING_RATE), "--adam_epsilon", str(ADAM_EPSILON),
        "--save_steps", "2", "--fsdp_on_cpu", str(config == "fsdp2").lower(),
    ]  # fmt: skip
    path = folder / "runs.json"
    path.write_text(json.dumps([["--output_dir", str(folder / name), *words, *more] for name, more in runs.items()]))
    command = [
        python, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml"),
        "--num_processes", "2", "--main_process_port", "0", "--mixed_precision", "no",
        str(TESTS / "train_tiny.py"), str(path),
    ]  # fmt: skip
    environment = {
        **os.environ,
        "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
    }
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800)
    assert run.returncode == 0, f"{run.stdout[-2000:]}\n{run.stderr[-4000:]}"


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("*model.safetensors")  # or adapter_model
    return load_file(path)


@pytest.fixture(scope="module")
def launched(tmp_path_factory, python):
    """The folder that has the runs of a launch file by name: of one launch, by fresh interpreters for ZeRO-2 and FSDP2."""

    @cache
    def launched(config):
        folder = tmp_path_factory.mktemp(config)
        make_model(1).save_pretrained(folder / "student")
        make_tokenizer().save_pretrained(folder / "student")
        with closing(FakeRollouts(make_model(1), make_tokenizer())) as server:
            few = ["--rollout_servers", server.url, "--max_steps", "2", "--save_strategy", "no"]
            # The adapter first: after that the server has other weights than those of its folder.
            on_servers = {"servers-lora": [*few, *LORA], "servers": few}
            exact = {f"exact-{name}": [*EXACT, *more, "--save_strategy", "no"] for name, more in EXACT_RUNS.items()}
            # And with all weights, of whose head the gradient is another product.
            exact["exact-whole"] = [*exact["exact-top_k"], "--lora", "false"]
            if config == "ddp":
                launch(python, "ddp", folder, {"full": FULL, "lora": LORA, **exact, **on_servers})
            elif config == "zero2":
                launch(sys.executable, config, folder, {**settings_of(config), "bf16": BF16})
            else:
                # As accelerate has FSDP2 where the launch file says nothing: checkpoints in shards.
                bf16 = {} if config == "zero3" else {"bf16": [*BF16, "--sharded", "true"]}
                fresh = python if config == "zero3" else sys.executable
                launch(fresh, config, folder, {**settings_of(config), **bf16, **exact, **on_servers})
        return folder

    return launched


@pytest.fixture(scope="module")
def resumed(launched, python, tmp_path_factory):
    """The same runs stopped after step 2, and resumed in processes of their own."""

    @cache
    def resumed(config):
        folder = tmp_path_factory.mktemp(f"{config}-resumed")
        shutil.copytree(launched(config) / "student", folder / "student")
        runs = settings_of(config)
        for name in runs:
            left_out = shutil.ignore_patterns("checkpoint-3", "final")
            shutil.copytree(launched(config) / name, folder / name, ignore=left_out)
            runs[name] = [*runs[name], "--resume_from_checkpoint", str(folder / name / "checkpoint-2")]
        launch(python, config, folder, runs)
        return folder

    return resumed


def settings_of(config: str) -> dict[str, list[str]]:
    return {
        name: [*method, "--gradient_checkpointing", checkpointing]
        for name, (of, method, checkpointing) in SHARDED.items()
        if of == config
    }


@pytest.mark.parametrize("name", SHARDED)
@pytest.mark.slow
def test_sharded_runs_are_the_data_parallel_run(name, launched, resumed):
    config, method, _ = SHARDED[name]
    folder = launched(config) / name
    lines = lines_of(folder)
    facts = json.loads((folder / "facts.json").read_text())
    assert facts["world_size"] == 2
    expected_kind = {"zero2": ("DEEPSPEED", 2), "zero3": ("DEEPSPEED", 3), "fsdp2": ("FSDP", None)}[config]
    assert (facts["type"], facts["zero_stage"]) == expected_kind
    if config == "fsdp2":
        assert facts["sharded"] == ["DTensor"]

    alone = launched("ddp") / ("lora" if method is LORA else "full")
    assert json.loads((alone / "facts.json").read_text())["type"] == "MULTI_CPU"
    expected_lines, expected = lines_of(alone), weights(alone / "final")
    assert [line["branch"] for line in lines] == ["general", "domain", "general"]
    for line, other in zip(lines, expected_lines, strict=True):
        for metric in COMPARED:
            if metric in other:
                assert line[metric] == pytest.approx(other[metric], rel=METRIC, abs=METRIC), (line["step"], metric)
    found = weights(folder / "final")
    assert set(found) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(found[key].float(), value.float(), atol=WEIGHT, rtol=0, msg=key)

    # What a user does with it.
    loader = AutoPeftModelForCausalLM if method is LORA else AutoModelForCausalLM
    loaded = loader.from_pretrained(folder / "final")
    assert torch.isfinite(loaded(torch.tensor([[5, 6, 7]])).logits).all()

    # Stopped after step 2 and resumed, it is the same run.
    again = lines_of(resumed(config) / name)
    assert [line["step"] for line in again] == [1, 2, 3]
    assert again[-1]["loss"] == pytest.approx(lines[-1]["loss"], rel=METRIC)
    # The last step is held against the gradient of the one before the stop, of which each rank has kept its part.
    assert again[-1]["conflict/cosine"] == pytest.approx(lines[-1]["conflict/cosine"], rel=METRIC, abs=METRIC)
    for key, value in weights(resumed(config) / name / "final").items():
        torch.testing.assert_close(value, found[key], atol=WEIGHT, rtol=0, msg=key)


@pytest.mark.parametrize("name", [*EXACT_RUNS, "whole"])
@pytest.mark.parametrize("config", ["zero3", "fsdp2"])
@pytest.mark.slow
def test_sharded_runs_with_whole_distributions_are_the_data_parallel_run(config, name, launched):
    """Whose teachers forward in the loss: one inside the student's wrapper, where all ranks must, and heads in shards."""
    lines, expected = (lines_of(launched(each) / f"exact-{name}") for each in (config, "ddp"))
    assert [line["branch"] for line in lines] == ["general+domain", "domain"] and lines[0]["loss"] != 0
    for line, other in zip(lines, expected, strict=True):
        for metric in ("loss", "grad_norm"):
            assert line[metric] == pytest.approx(other[metric], rel=METRIC, abs=METRIC), (line["step"], metric)


@pytest.mark.parametrize("config", ["zero2", "fsdp2"])
@pytest.mark.slow
def test_teacher_with_the_students_weights_has_gaps_of_exactly_0_in_bfloat16(config, launched):
    """Both launchers cast the float32 weights that were loaded, each in its way, and the teacher's must be cast alike."""
    (line,) = lines_of(launched(config) / "bf16")
    assert line["branch"] == "domain"
    assert line["gap/domain/abs_mean"] == line["gap/domain/abs_p99"] == line["loss"] == 0
    whole = AutoModelForCausalLM.from_pretrained(launched(config) / "bf16" / "final").state_dict()
    student = AutoModelForCausalLM.from_pretrained(launched(config) / "student").state_dict()
    for name, weight in student.items():  # a loss of 0 has trained nothing
        torch.testing.assert_close(whole[name].float(), weight.bfloat16().float(), rtol=0, atol=LEARNING_RATE)


@pytest.mark.parametrize("config", ["ddp", "zero3", "fsdp2"])
@pytest.mark.slow
def test_rollout_servers_get_the_whole_weights_whatever_a_rank_has_of_them(config, launched):
    """Their log-probs are those of the trainer at every step, of the adapter alone and of all weights."""
    drawn = {}
    for name in ("servers-lora", "servers"):
        lines = drawn[name] = lines_of(launched(config) / name)
        assert len(lines) == 2 and all(line["importance/active"] == 1 for line in lines)
        assert max(line["importance/log_ratio"] for line in lines) < 1e-5
        assert lines[1]["update/changed_share"] > 0
        alone = lines_of(launched("ddp") / name)  # the same completions, and so the same loss
        assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in alone], rel=METRIC)
    assert drawn["servers"][1]["loss"] != drawn["servers-lora"][1]["loss"]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_launch_files_are_read_by_accelerate_and_leave_accumulation_to_the_trainer(path):
    config = load_config_from_file(str(path))
    assert config.num_processes == {"single_gpu": 1, "multi_node": 32}.get(path.stem, 8)
    assert "gradient_accumulation_steps" not in str(yaml.safe_load(path.read_text()))
    assert f"configs/accelerate/{path.name}" in path.read_text()  # its own launch line
