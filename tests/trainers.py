"""Trainers of tiny models, as a user makes them, and what their runs write."""

import json

import pytest
import torch
from conftest import make_model, make_prompts, make_tokenizer

from camopd import CaMOPDConfig, CaMOPDTrainer, TokenScores, cli


# Of a tiny run, for a file of the command line
SETTINGS = {
    "dtype": "float32", "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True,
    "gradient_checkpointing": False, "max_prompt_length": 64, "max_completion_length": 64,
}  # fmt: skip
# Weights of 16 bits that are rounded at random
ROUNDED = {"optim": "adamw_torch_8bit", "optim_args": "bf16_stochastic_round=True, block_size=128"}
# A chat template that has a place for tools and for an argument of its own
TEMPLATE = (
    "{% if tools %}{{ tools[0].name }} {% endif %}{% for m in messages %}{{ m.role }} {{ m.content }}."
    "{% endfor %}{% if add_generation_prompt %}a {{ mood }}{% endif %}"
)


def make_args(tmp_path, **kwargs) -> CaMOPDConfig:
    defaults = {
        "output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True,
        "save_strategy": "no", "gradient_checkpointing": False, "learning_rate": 1e-2, "max_steps": 4,
        "prompts_per_step": 4, "per_device_train_batch_size": 2, "max_completion_length": 6, "max_prompt_length": 64,
    }  # fmt: skip
    return CaMOPDConfig(**{**defaults, **kwargs})


def make_trainer(tmp_path, tokenizer, **kwargs) -> CaMOPDTrainer:
    """A tiny run. Keywords of the trainer are taken out, the rest go to the config."""
    names = ("model", "teachers", "train_dataset", "eval_dataset", "peft_config", "tools", "callbacks")
    given = {name: kwargs.pop(name) for name in names if name in kwargs}
    defaults = {
        "model": make_model(1),
        "teachers": {"general": make_model(2), "domain": make_model(1)},
        "train_dataset": {branch: make_prompts(branch) for branch in ("general", "domain")},
    }
    return CaMOPDTrainer(**{**defaults, **given}, args=make_args(tmp_path, **kwargs), processing_class=tokenizer)


def save_models(folder, **seeds) -> None:
    """Models of these seeds as folders with a tokenizer, by name."""
    for name, seed in seeds.items():
        make_model(seed).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)


def worst(trainer, samples) -> float:
    """Largest distance between an engine's log-prob of a token and that of the student's present weights, nats."""
    student = trainer.accelerator.unwrap_model(trainer.model)
    found = 0.0
    for sample in samples:
        ids, start = sample.token_ids, sample.prompt_len
        with torch.no_grad():
            logps = student(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        logps = logps[range(start - 1, len(ids) - 1), ids[start:]]
        found = max(found, (logps - sample.rollout_logps).abs().max().item())
    return found


def refused(capsys, *words) -> str:
    """What `camopd` says of words that it exits with 2 for."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([*words])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def lines(tmp_path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


class BrokenTeacher:
    """Answers with what it is told to."""

    name = "broken"

    def __init__(self, value: float, missing: int = 0):
        self.value, self.missing = value, missing

    def score(self, token_ids, prompt_lens, top_k=0):
        return [
            TokenScores(torch.full((len(ids) - start - self.missing,), self.value))
            for ids, start in zip(token_ids, prompt_lens, strict=True)
        ]


def half(**kwargs):
    return make_model(1, **kwargs).to(torch.bfloat16)
