"""Launches of train_tiny.py by accelerate, with two processes."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from conftest import make_model, make_tokenizer


TESTS = Path(__file__).parent
CONFIGS = TESTS.parent / "configs" / "accelerate"
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
EXTENSIONS = tempfile.TemporaryDirectory()
# Adam divides by a gradient that may be nothing but rounding; not with an epsilon as large as gradients are.
LEARNING_RATE, ADAM_EPSILON, STEPS = 0.01, 0.01, 3


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
