"""Generation by transformers that draws from the model's own distribution, whatever its `generation_config.json` says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.utils import is_peft_model
from transformers import GenerationConfig

from .setting_rules import ON_POLICY


# What neither bends the sampled distribution nor the number of completions per prompt, of vLLM's SamplingParams.
_VLLM_KWARGS = {"stop_token_ids"}
_NOT_FOR_VLLM = {
    "seed": "with it equal prompts get one and the same completion",
    "stop": "a completion that ends so counts as cut off, and would teach the student not to end. Use stop_token_ids",
    "include_stop_str_in_output": "there is no `stop` for it",
}
# The same for generation by transformers: which values may be set, and why no others.
_TRANSFORMERS_KWARGS: dict[str, tuple[Any, str]] = {
    "use_cache": (lambda value: isinstance(value, bool), "it is true or false"),
    "cache_implementation": (
        lambda value: value not in ("quantized", "paged"),
        "a quantized cache draws from another distribution than that of the model, and a paged one is not used here. "
        "Leave it out, or take 'dynamic', 'offloaded', 'static' or 'offloaded_static'",
    ),
    "prefill_chunk_size": (lambda value: isinstance(value, int) and value >= 1, "it is a number of tokens"),
    "max_time": (lambda value: isinstance(value, int | float) and value > 0, "it is a number of seconds"),
}
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


@contextmanager
def neutral_generation(model: Any) -> Iterator[None]:
    """Let `model.generate` take nothing but the ids of special tokens from the model's own generation config.

    `generate` fills what its caller leaves open (`min_p`, `suppress_tokens`, `num_return_sequences`, ...) from
    `model.generation_config`, and only then from transformers' defaults. Checkpoints are published with such values for
    chatting; rollouts must follow the plain softmax of the logits. The model has its own config back afterwards, so that
    it is saved with it.

    Args:
        model: a causal language model or its PEFT wrapper, unwrapped from DDP/FSDP/DeepSpeed.
    """
    # PEFT hands the config that it sees to the model inside, so both may hold one.
    modules = (model, model.get_base_model()) if is_peft_model(model) else (model,)
    own = [(module, module.generation_config) for module in modules if "generation_config" in vars(module)]
    ids = {name: getattr(model.generation_config, name) for name in TOKEN_IDS}
    for module, _ in own:
        module.generation_config = GenerationConfig(**ids)
    try:
        yield
    finally:
        for module, config in own:
            module.generation_config = config


def check_generation_kwargs(args: Any) -> None:
    """Raise `ValueError` for `generation_kwargs` that change the distribution, and for those that the engine ignores."""
    given: dict[str, Any] = dict(args.generation_kwargs or {})  # type: ignore[arg-type]  # a dict since __post_init__
    vllm = bool(args.use_vllm or args.rollout_servers)
    harmless = _VLLM_KWARGS if vllm else set(_TRANSFORMERS_KWARGS)
    engine = "vLLM" if vllm else "transformers"
    elsewhere = {*_VLLM_KWARGS, *_TRANSFORMERS_KWARGS, *_NOT_FOR_VLLM, "stop_strings", "cache_config"}
    of_the_other = sorted(set(given) & elsewhere - harmless)
    clash = sorted(set(given) - elsewhere)
    if clash:
        raise ValueError(
            f"generation_kwargs sets {clash}, which CaMOPD cannot use: {ON_POLICY}. What may be set is "
            f"{sorted(harmless)}."
        )
    if of_the_other:
        reasons = [f"{name}: {_NOT_FOR_VLLM[name]}" for name in of_the_other if vllm and name in _NOT_FOR_VLLM]
        raise ValueError(
            f"generation_kwargs sets {of_the_other}, which generation by {engine} would "
            f"ignore or stop at{' (' + '; '.join(reasons) + ')' if reasons else ''}. Leave it out; what may be set is "
            f"{sorted(harmless)}."
        )
    for name, value in {"cache_implementation": args.cache_implementation, **given}.items():
        check = _TRANSFORMERS_KWARGS.get(name)
        if check is not None and not vllm and value is not None and not check[0](value):
            raise ValueError(f"{name} is {value!r}, which CaMOPD cannot use: {check[1]}.")
