"""What a training step needs in memory, by a formula that benchmarks/memory_formula.py holds to measured peaks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


TOKEN_TILE = 4096  # rows of a tile, in trl.kernels.chunked_logprob
GPU_TILE, GPU_COPIES = 32768, 2  # width of a tile, and its copies in the Triton kernel
CPU_TILE, CPU_COPIES = 4096, 12  # those of the torch code that stands in for it


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder."""

    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool

    @classmethod
    def of(cls, config: Any) -> Shape:
        """The shape in a transformers config. Raises `ValueError` for a model that has no such sizes."""
        text = config.get_text_config()
        try:
            hidden, heads = int(text.hidden_size), int(text.num_attention_heads)
            return cls(
                int(text.num_hidden_layers), hidden, int(getattr(text, "intermediate_size", None) or 4 * hidden), heads,
                int(getattr(text, "num_key_value_heads", None) or heads),
                int(getattr(text, "head_dim", None) or hidden // heads), int(text.vocab_size),
                bool(text.tie_word_embeddings),
            )  # fmt: skip
        except (AttributeError, RuntimeError, TypeError, ZeroDivisionError) as error:
            raise ValueError(f"{type(text).__name__} does not have the sizes of a decoder: {error}.") from None

    @property
    def weights(self) -> int:
        """Number of weights of a plain decoder; a mixture of experts has more."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        layer = attention + 3 * self.hidden * self.mlp + 2 * self.hidden
        return self.layers * layer + (1 if self.tied else 2) * self.vocabulary * self.hidden


def activations(shape: Shape, tokens: int, completion_tokens: int, number: int, tile_width: int, copies: int) -> float:
    """Bytes above weights, gradients and optimizer at the worst moment of forward and backward, with gradient
    checkpointing.

    Args:
        tokens: of a micro-batch, `completion_tokens` of them of completions.
        number: bytes of a number of the forward.
        tile_width: of the vocabulary, of which the head computes a tile at a time; `copies` of it are there at once.
    """
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    checkpoints = shape.layers * tokens * shape.hidden * number
    layer = 1.5 * tokens * (7 * shape.hidden + 2 * queries + 4 * keys + 4 * shape.mlp) * number
    head = completion_tokens * shape.hidden * (4 + number) + 8 * shape.vocabulary * shape.hidden
    head += copies * min(completion_tokens, TOKEN_TILE) * tile_width * 4
    return checkpoints + max(layer, head)
