"""The rollouts of one optimizer step, and how they are kept on disk when no teacher is there to score them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


@dataclass
class Rollouts:
    """This rank's rollouts of one optimizer step (or one evaluation batch), row by row; lists all have one item a row.

    `T_i` counts the tokens of a completion. `mask` is False on tokens that the student did not sample (tool results).
    """

    branch: list[str]
    position: list[int]  # place in the step's global batch
    token_ids: list[list[int]]  # prompt + completion
    prompt_len: list[int]
    mask: list[Tensor]  # (T_i,) bool
    length: list[int]  # sampled tokens, those behind `cut` included
    truncated: list[bool]  # cut at max_completion_length, no end of sequence
    rollout_logps: list[Tensor] | None  # (T_i,) float32, log mu of the rollout engine
    prompts_cut: int = 0  # prompts of this rank that were longer than allowed
    teacher_logps: list[Tensor] = field(default_factory=list)  # (T_i,) float32
    student_logps: list[Tensor] = field(default_factory=list)  # (T_i,) float32, at rollout time
    entropy: list[Tensor] = field(default_factory=list)  # (T_i,) nats
    teacher_top_ids: list[Tensor] = field(default_factory=list)  # (T_i, K), where a token rule asks for them
    proposals: list[Tensor] = field(default_factory=list)  # (T_i,) the student's likeliest token, likewise
    token_weights: list[Tensor] | None = None  # (T_i,) float32, of a token rule

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_tokens(self) -> list[int]:
        """T_i that Eq. 6-9 divide by: sampled tokens."""
        return [int(mask.sum()) for mask in self.mask]

    def cut(self, num_tokens: int) -> None:
        """Leave the first `num_tokens` tokens of each completion to score and train."""
        self.token_ids = [
            ids[: start + num_tokens] for ids, start in zip(self.token_ids, self.prompt_len, strict=True)
        ]
        self.mask = [mask[:num_tokens] for mask in self.mask]
        if self.rollout_logps is not None:
            self.rollout_logps = [logps[:num_tokens] for logps in self.rollout_logps]

    def save(self, path: Path) -> None:
        """Write what generation made, without scores, as safetensors."""
        tensors = {
            "token_ids": torch.tensor([token for ids in self.token_ids for token in ids], dtype=torch.int32),
            "lengths": torch.tensor([len(ids) for ids in self.token_ids]),
            "prompt_len": torch.tensor(self.prompt_len),
            "position": torch.tensor(self.position),
            "truncated": torch.tensor(self.truncated),
            "sampled": torch.tensor(self.length),
            "mask": torch.cat(self.mask) if self.mask else torch.zeros(0, dtype=torch.bool),
        }
        if self.rollout_logps is not None:
            tensors["rollout_logps"] = torch.cat(self.rollout_logps)
        save_file(tensors, path, metadata={"branch": json.dumps(self.branch), "prompts_cut": str(self.prompts_cut)})

    @classmethod
    def load(cls, path: Path, rows: list[dict[str, Any]]) -> Rollouts | None:
        """The rollouts of exactly these rows (branch and position); `None` where the file is not there or not theirs."""
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                branch = json.loads(file.metadata()["branch"])
                prompts_cut = int(file.metadata()["prompts_cut"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, KeyError, TypeError, ValueError):  # cut short on a full disk: roll out again
            return None
        position = tensors["position"].tolist()
        if [(row["branch"], row["position"]) for row in rows] != list(zip(branch, position, strict=True)):
            return None
        lengths, prompt_len = tensors["lengths"].tolist(), tensors["prompt_len"].tolist()
        completions = [length - prompt for length, prompt in zip(lengths, prompt_len, strict=True)]
        logps = tensors.get("rollout_logps")
        return cls(
            branch=branch,
            position=position,
            token_ids=[ids.tolist() for ids in tensors["token_ids"].split(lengths)],
            prompt_len=prompt_len,
            mask=list(tensors["mask"].split(completions)),
            length=tensors["sampled"].tolist(),
            truncated=tensors["truncated"].tolist(),
            rollout_logps=None if logps is None else list(logps.split(completions)),
            prompts_cut=prompts_cut,
        )
