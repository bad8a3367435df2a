"""Generation by transformers that draws from the model's own distribution, whatever its `generation_config.json` says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.utils import is_peft_model
from transformers import GenerationConfig


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
