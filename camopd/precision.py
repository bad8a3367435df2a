"""In what precision a student computes under each launcher: its log-probs must come out whole, and a teacher with the same
weights must round as it does, or gaps that are 0 become noise, which Adam turns into full-sized updates."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from accelerate.utils import DistributedType

from .setting_rules import SCALED


def settle_precision(accelerator: Any, bf16: bool) -> None:
    """Let FSDP2 hand on what a forward returns as it is; call it before the model is prepared.

    accelerate's policy casts it to 16 bits, and the loss's forward returns log-probs: near -8 nats, bfloat16 has one number
    every 0.03 nats.

    Raises `ValueError` where a launcher has the run compute in float16, or in bfloat16 against `bf16` of the config.
    """
    if accelerator.mixed_precision == "fp16":
        raise ValueError(
            f"mixed_precision=fp16 of accelerate's launcher cannot be used with CaMOPD: {SCALED}. Set bf16=True, or launch "
            "with --mixed_precision no for float32."
        )
    if accelerator.mixed_precision == "bf16" and not bf16:
        raise ValueError(
            "mixed_precision=bf16 of accelerate's launcher or of its launch file would win over bf16=False: the run would "
            "compute in bfloat16. Launch with --mixed_precision no for float32, or leave bf16 out."
        )
    policy = _fsdp2_policy(accelerator)
    if policy is not None:
        accelerator.state.fsdp_plugin.mixed_precision_policy = dataclasses.replace(policy, output_dtype=None)


def forward_dtype(accelerator: Any, student: Any) -> torch.dtype:
    """Type of the student's weights in its forward, once it is prepared. DeepSpeed casts them for good, FSDP2 each time."""
    policy = _fsdp2_policy(accelerator)
    if policy is not None and policy.param_dtype is not None:
        return policy.param_dtype
    if accelerator.distributed_type == DistributedType.DEEPSPEED and accelerator.mixed_precision in ("bf16", "fp16"):
        return {"bf16": torch.bfloat16, "fp16": torch.float16}[accelerator.mixed_precision]
    return student.get_input_embeddings().weight.dtype


def compute_dtype(accelerator: Any, student: Any) -> torch.dtype:
    """Type that the student's matrix products are computed in: that of its weights in the forward, or autocast's."""
    autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    return autocast or forward_dtype(accelerator, student)


def _fsdp2_policy(accelerator: Any) -> Any:
    """FSDP2's `MixedPrecisionPolicy`, or `None` where there is none."""
    return accelerator.state.fsdp_plugin.mixed_precision_policy if accelerator.is_fsdp2 else None
