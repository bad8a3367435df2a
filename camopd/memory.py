"""What a training step needs in memory, by a formula that benchmarks/memory_formula.py holds to measured peaks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


# The head computes logits in tiles, (rows, width), of which there are some copies at once: few in TRL's kernels on a GPU,
# many in the torch code that stands in for these elsewhere.
ROWS = 4096  # of a tile in TRL's kernels
SAMPLED = {"cuda": (32768, 2), "cpu": (4096, 12)}  # width and copies, trl.kernels.chunked_logprob
WHOLE = {"cuda": (32768, 3), "cpu": (32768, 10)}  # trl.kernels.chunked_divergence
TOP_K_ROWS, TOP_K_COPIES = 512, 3  # of tiles as wide as the vocabulary, camopd/divergence.py


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


def activations(
    shape: Shape, tokens: int, completion_tokens: int, number: int, device: str, gradient: str = "sampled"
) -> float:
    """Bytes above weights, gradients and optimizer at the worst moment of forward and backward, with gradient
    checkpointing.

    Args:
        tokens: of a micro-batch, `completion_tokens` of them of completions.
        number: bytes of a number of the forward.
        device: `cuda` or `cpu`.
        gradient: `sampled`, `whole` (a teacher's distribution is there, too) or `top_k`.
    """
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    checkpoints = shape.layers * tokens * shape.hidden * number
    layer = 1.5 * tokens * (7 * shape.hidden + 2 * queries + 4 * keys + 4 * shape.mlp) * number
    head = completion_tokens * shape.hidden * (4 + number) + 8 * shape.vocabulary * shape.hidden
    width, copies = SAMPLED[device]
    tiles = copies * min(completion_tokens, ROWS) * width
    if gradient == "whole":
        head += completion_tokens * shape.hidden * number  # the teacher's hidden states
        width, copies = WHOLE[device]
        tiles = max(tiles, copies * min(completion_tokens, ROWS) * width)
    elif gradient == "top_k":
        tiles = max(tiles, TOP_K_COPIES * min(completion_tokens, TOP_K_ROWS) * shape.vocabulary)
    return checkpoints + max(layer, head + 4 * tiles)
