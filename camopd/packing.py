"""Rows without padding: whether a model can be forwarded so, whether it pays, and whether the numbers are the same."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .logprobs import causal_lm_of


logger = logging.getLogger(__name__)


def wants_packing(model: Any, wanted: bool | None) -> bool | None:
    """Whether a model's rows are to be forwarded without padding: as `wanted`, or where its attention gains from it.

    `None` is for `sdpa` on a machine without an accelerator: it masks, and each batch is then forwarded in the way that is
    less work. On a GPU nobody has measured that, and `eager` holds the whole square in memory.

    Raises `ValueError` where it is wanted of a model that cannot.
    """
    if wanted and not supports_packing(model):
        raise ValueError(
            f"padding_free=True, but {type(model).__name__} has layers in which rows of one long sequence would see each "
            "other (linear attention, convolution or a state). Leave padding_free out."
        )
    if wanted is not None:
        return wanted
    if not supports_packing(model):
        return False
    if packing_pays(model):
        return True
    return None if _attention(model) == "sdpa" and not torch.accelerator.is_available() else False


def packing_fault(forward: Callable[[list[list[int]], list[int], bool], Tensor], rounding: float = 0.0) -> str:
    """Why a model's rows without padding do not have the numbers they have with it; "" where they have.

    Not every architecture hands its position ids to the mask (OPT and gpt-oss do not, in transformers 5.23), so this is
    tried and not looked up. `forward(token_ids, prompt_lens, padding_free)` returns the log-probs (B, T); it is called
    four times with two short rows. `rounding` is `logprobs.rounding_of` the model.
    """
    first, other, second = ([1 + (factor * place) % 11 for place in range(9)] for factor in (3, 5, 7))
    with torch.no_grad():
        padded = forward([first, second], [1, 1], False)
        packed = forward([first, second], [1, 1], True)
        beside_another = forward([other, second], [1, 1], True)
        swapped = forward([second, first], [1, 1], True).flip(0)
    if not (packed[1] - beside_another[1]).abs().max() < 1e-4:  # one kernel does not differ from itself
        return "rows of one long sequence see each other: its architecture does not make masks from position ids"
    # These tokens are the special ones of many models: of log-probs of -20 two kernels in bfloat16 round half a nat, and
    # one kernel, which adds up in another order behind another row, less than a tenth of that.
    size = rounding * float(padded.abs().mean())
    for there, least, share in ((swapped, 0.02, 0.1), (padded, 0.05, 1)):
        apart, allowed = float((there - packed).abs().mean()), max(least, share * size)
        if not apart < allowed:
            where = "behind another one" if there is swapped else "with padding"
            return f"a row's log-probs differ by {apart:.2g} nats from those {where}, where {allowed:.2g} is rounding"
    return ""


def settle_packing(packed: bool | None, fault: str, wanted: bool | None, whose: str) -> bool | None:
    """Whether to go without padding, as `wants_packing` has it, after `packing_fault`. Raises `ValueError` where it is
    wanted and cannot be."""
    if fault and wanted:
        raise ValueError(f"padding_free=True, but in {whose} {fault}. Leave padding_free out.")
    if packed and fault:
        logger.warning("%s is forwarded with padding: %s", whose, fault)
    return False if fault else packed


def supports_packing(model: Any) -> bool:
    """Whether the layers of the model can keep rows of one long sequence apart: full and sliding-window attention.

    Layers that carry a state along (linear attention, convolution, Mamba) carry it from one row into the next, and chunked
    attention counts its chunks from the very first token. See also `packing_fault`.
    """
    causal_lm = causal_lm_of(model)
    layers = set(getattr(causal_lm.config.get_text_config(), "layer_types", None) or ())
    return (
        causal_lm._supports_attention_backend
        and not causal_lm._is_stateful
        and layers <= {"full_attention", "sliding_attention"}
    )


def packing_pays(model: Any) -> bool:
    """Whether the model's attention implementation skips what lies between packed rows (flash, flex) instead of masking
    an (N, N) matrix (sdpa, eager)."""
    return "flash" in _attention(model) or _attention(model) == "flex_attention"


def _attention(model: Any) -> str:
    """Name of a model's attention implementation."""
    return causal_lm_of(model).config.get_text_config()._attn_implementation or ""
