"""What is compared: each arm is settings of `CaMOPDConfig`, laid over what all runs share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import camopd


METHODS = Path(camopd.__file__).parent / "methods"


def _method(name: str, **changed: Any) -> dict[str, Any]:
    return {**yaml.safe_load((METHODS / f"{name}.yaml").read_text(encoding="utf-8")), **changed}


SFT = "sft"  # the one that does not go through the trainer
ARMS: dict[str, dict[str, Any]] = {
    "camopd": _method("camopd"),
    "vanilla": _method("vanilla_mopd"),
    "mixed_3_1": _method("without_decoupling_3_1"),
    "camopd_mixed": _method("camopd", schedule="general:3+domain:1"),
    "without_selection": _method("without_selection"),
    "random_selection": _method("random_selection"),
    "smallest_gaps": _method("smallest_gaps"),
    "scale_1": _method("camopd", scale=1),
    "vanilla_token": _method("vanilla_mopd_token"),
    "dn_mopd": _method("dn_mopd"),
    "relaxed_opd": _method("relaxed_opd"),
    "selectkd": _method("selectkd"),
    "branch_moments": _method("camopd", optimizer_moments="per_branch"),
    "beta1_0": _method("camopd", adam_beta1=0.0),
    "sgd": _method("camopd", optim="sgd"),
    "teacher_free": _method("teacher_free"),
    SFT: {},
    "full": _method("camopd", divergence="full"),
    "top_k": _method("camopd", divergence="top_k", divergence_top_k=5),
    "baseline_kl": _method("camopd", baseline="kl"),
    "full_without_selection": _method("without_selection", divergence="full"),
}
NAMES = {
    "camopd": "CaMOPD", "vanilla": "vanilla 1:1", "mixed_3_1": "mixed 3:1", "camopd_mixed": "CaMOPD, mixed 3:1",
    "without_selection": "without selection", "random_selection": "random selection", "smallest_gaps": "smallest gaps",
    "scale_1": "CaMOPD, scale 1", "vanilla_token": "vanilla, token mean", "dn_mopd": "DN-MOPD",
    "relaxed_opd": "Relaxed OPD", "selectkd": "SelecTKD", "branch_moments": "CaMOPD, moments per branch",
    "beta1_0": "CaMOPD, beta1 = 0", "sgd": "CaMOPD, SGD", "teacher_free": "teacher-free", SFT: "SFT on teacher's answers",
    "full": "CaMOPD, full KL", "top_k": "CaMOPD, top-5 KL", "baseline_kl": "CaMOPD, KL baseline",
    "full_without_selection": "without selection, full KL",
}  # fmt: skip
RATES = (1e-4, 2e-4, 3e-4, 4.5e-4, 7e-4)
SGD_RATES = (0.02, 0.05, 0.1, 0.2, 0.4)  # an update of SGD has the gradient's norm, at most 1


def rates(arm: str) -> tuple[float, ...]:
    """The grid that an arm's learning rate is chosen from."""
    return SGD_RATES if arm == "sgd" else RATES


@dataclass(frozen=True)
class Comparison:
    """What a protocol compares, and on which seeds. No seed is used in two stages, or in two comparisons."""

    arms: tuple[str, ...]
    tuning_seeds: tuple[int, ...]  # of the learning rates alone
    seeds: tuple[int, ...]


_GRADIENTS = ("full", "top_k", "baseline_kl", "full_without_selection")
FIRST = Comparison(tuple(arm for arm in ARMS if arm not in _GRADIENTS), (101,), tuple(range(1, 13)))  # PROTOCOL.md
SECOND = Comparison(  # PROTOCOL_2.md
    ("camopd", "vanilla", "mixed_3_1", "camopd_mixed", "without_selection", "random_selection", "relaxed_opd", "beta1_0",
     "sgd", *_GRADIENTS),
    tuple(range(102, 106)),
    tuple(range(13, 25)),
)  # fmt: skip
PILOT_SEED = 0  # of the work on the task and the grids; in no table
