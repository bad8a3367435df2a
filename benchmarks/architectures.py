"""Are the log-probs of `camopd.logprobs` those of the model's own logits? Asked of every causal architecture.

A tiny model with random weights of each class that `AutoModelForCausalLM` knows is built, its multipliers and soft caps set
to values that show, and two padded rows are scored both ways, as the trainer's own check does before the first rollout.

    python benchmarks/architectures.py | sed -n '/^# /,$p' > docs/architectures.md    # without what libraries print
    python benchmarks/architectures.py llama4_text bert
"""

from __future__ import annotations

import os


os.environ["HF_HUB_OFFLINE"] = "1"  # some configs look for a file of their default checkpoint

import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from camopd.forward import Forward
from camopd.logprobs import check_logps, completion_logps


# What the fields of a config become, by their meaning.
SIZES = {
    64: ("vocab_size", "vocab_size_per_layer_input"),
    32: (
        "hidden_size", "d_model", "n_embd", "embed_dim", "dim", "model_dim", "embedding_size", "n_embed", "emb_dim",
        "hidden_dim", "word_embed_proj_dim", "input_embedding_size", "output_embedding_size", "lru_width",
    ),
    2: (
        "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
        "num_decoder_layers", "num_encoder_layers", "num_key_value_heads", "num_kv_heads", "num_experts_per_tok",
        "num_experts_per_token", "moe_k", "moe_top_k", "top_k_experts", "depth",
    ),
    48: (
        "intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "ffn_hidden_size", "dff",
        "moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp", "dim_ff", "d_ff",
        "shared_intermediate_size", "expert_ffn_hidden_size",
    ),
    4: (
        "num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "encoder_attention_heads", "num_heads",
        "num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts",
    ),
    8: ("head_dim", "dim_head", "attention_head_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim"),
    16: ("q_lora_rank", "kv_lora_rank"),
    128: ("max_position_embeddings", "n_positions", "max_target_positions", "n_ctx"),
}  # fmt: skip
SIZE_OF = {name: size for size, names in SIZES.items() for name in names}
MULTIPLIERS = (
    "logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier", "logits_mup_width_multiplier",
)  # fmt: skip
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap")
# What else a class needs to be tiny, or to be causal.
MLA = {"num_key_value_heads": 4}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2, "mamba_d_state": 8}
ZAMBA = {"num_hidden_layers": 6, "layer_types": ["mamba", "hybrid", "mamba", "hybrid", "mamba", "mamba"]}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
SPECIAL: dict[str, dict[str, Any]] = {
    "AXK1ForCausalLM": {**MLA, "n_group": 1, "topk_group": 1},
    "AXK2ForCausalLM": MLA,
    "BailingHybridForCausalLM": MLA,
    "BambaForCausalLM": MAMBA2,
    "CodeGenForCausalLM": {"rotary_dim": 4},
    "CohereCompassForCausalLM": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "DbrxForCausalLM": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "DeepseekV2ForCausalLM": {**MLA, "num_experts_per_tok": 2},
    "DeepseekV3ForCausalLM": MLA,
    "DeepseekV32ForCausalLM": MLA,
    "Dots1ForCausalLM": {
        "n_routed_experts": 4, "moe_intermediate_size": 16, "n_shared_experts": 1, "num_experts_per_tok": 2,
    },
    "Dots3NoteForCausalLM": {**MLA, "per_layer_config": None, "head_dim": 16},
    "GPTJForCausalLM": {"rotary_dim": 4},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
    # Its text config could have a soft cap, but its own logits have none; the check refuses it then.
    "Gemma3ForConditionalGeneration": {"text_config": {"final_logit_softcapping": None}},
    "Gemma3nForCausalLM": {
        "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0, 0.0], "intermediate_size": 48, "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
    },
    "Glm4MoeLiteForCausalLM": MLA,
    "GlmMoeDsaForCausalLM": MLA,
    "GraniteMoeHybridForCausalLM": MAMBA2,
    "HunYuanDenseV1ForCausalLM": {"head_dim": 8},
    "HunYuanMoEV1ForCausalLM": {"head_dim": 8},
    "KimiLinearForCausalLM": MLA,
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "LongcatFlashForCausalLM": MLA,
    "Mamba2ForCausalLM": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
    "MiniCPM3ForCausalLM": MLA,
    "MinistralForCausalLM": {"head_dim": 8},
    "NemotronForCausalLM": {"head_dim": 8, "num_key_value_heads": 2},
    "Qwen4ExpForCausalLM": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 4, "ngram_vocab_size_base": 64, "hc_lowrank": 8,
    },
    "ReformerModelWithLMHead": {
        "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 16], "attention_head_size": 8,
        "attn_layers": ["local", "local"], "hidden_size": 32,
    },
    "RoCBertForCausalLM": {"pronunciation_vocab_size": 16, "shape_vocab_size": 16},
    "XmodForCausalLM": {"default_language": "en_XX"},
    "YoutuForCausalLM": MLA,
    "Zamba2ForCausalLM": {**ZAMBA, "num_mem_blocks": 1, "hybrid_layer_ids": [1, 3]},
    "ZambaForCausalLM": ZAMBA,
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
}  # fmt: skip
DRAFT = "a draft model that reads the keys and values of the model it writes ahead for"
NOT_TRIED = {
    "BltForCausalLM": "bytes in patches, by four models whose sizes hang together",
    "Gemma3nForConditionalGeneration": "its vision tower needs the package timm; Gemma3nForCausalLM is its text model",
    "Gemma4AssistantForCausalLM": DRAFT,
    "Gemma4UnifiedAssistantForCausalLM": DRAFT,
}


class Verdict(NamedTuple):
    """Of one architecture: "right", "refused" or "not tried", the difference in nats, and why."""

    architecture: str
    word: str
    difference: float | None
    reason: str


def tiny_config(config_class: Any, special: dict[str, Any]) -> Any:
    """A config of that class with small sizes, sub-configs included."""
    default = config_class()
    given: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    aliases = {field: name for name, field in getattr(config_class, "attribute_map", {}).items() if name in SIZE_OF}
    for field, value in vars(default).items():
        name = aliases.get(field, field)
        if isinstance(value, transformers.PretrainedConfig):
            given[field] = tiny_config(type(value), special.get(field, {}))
        elif name in SIZE_OF and isinstance(value, int) and not isinstance(value, bool):
            given[field] = SIZE_OF[name]
        elif field in MULTIPLIERS and value is not None:
            given[field] = 0.4
        elif field in SOFT_CAPS:
            given[field] = 3.0
        elif field == "layer_types" and isinstance(value, list):
            kinds = list(dict.fromkeys(value))
            given[field] = kinds if len(kinds) > 1 else kinds * 2
    if "layer_types" in given and "num_hidden_layers" in given:
        given["num_hidden_layers"] = len(given["layer_types"])
    if getattr(default, "is_decoder", None) is False:
        given["is_decoder"] = True  # BERT and its like attend to both sides without
    given.update(
        {
            name: value
            for name, value in special.items()
            if not isinstance(vars(default).get(name), transformers.PretrainedConfig)
        }
    )
    return config_class(**given)


def tiny_model(name: str, special: dict[str, Any] | None = None) -> Any:
    """A model of that class with random weights, large enough for every logit to matter. Raises what building does."""
    model_class = getattr(transformers, name)
    types = [kind for kind, of in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if of == name]
    classes = [CONFIG_MAPPING[kind] for kind in types]  # of a multimodal model's config the text part may be meant
    config_class = model_class.config_class if model_class.config_class else classes[0]
    config = tiny_config(config_class, {**SPECIAL.get(name, {}), **(special or {})})
    with torch.device("meta"):
        size = sum(weight.numel() for weight in model_class(config).parameters())
    if size > 1e7:
        raise ValueError(f"{size / 1e6:.0f} million weights are left when everything known is small")
    torch.manual_seed(0)
    model = model_class(config).float().eval()
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.data = 0.3 * noise if weight.dim() > 1 else weight.data + 0.1 * noise
    return model


def judge(model: Any) -> Verdict:
    """As the trainer judges a model before its first rollout."""
    name = type(model).__name__
    forward = Forward(model, lambda function, *args: function(model, *args), model, nullcontext, 1, 0, None, name)
    try:
        difference = check_logps(
            name, lambda ids, lens: completion_logps(model, ids, lens, pad_token_id=0)[0], model, model
        )
        forward.probe()  # without padding as well, where that may be
    except ValueError as error:
        return Verdict(name, "refused", None, str(error))
    return Verdict(name, "right", difference, "")


def sweep(kinds: Iterable[str] = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) -> Iterator[Verdict]:
    """A verdict on each class. "broken" is one that can be built, and then neither has its numbers nor is refused."""
    for name in sorted({MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind] for kind in kinds}):
        if name in NOT_TRIED:
            yield Verdict(name, "not tried", None, NOT_TRIED[name])
            continue
        try:
            yield judge(tiny_model(name))
        except Exception as error:
            traceback.print_exc()
            yield Verdict(name, "broken", None, f"{type(error).__name__}: {error}")


def table(verdicts: list[Verdict]) -> Iterator[str]:
    """The page of the documentation, line by line."""
    words = [verdict.word for verdict in verdicts]
    counts = ", ".join(f"{words.count(word)} {word}" for word in ("right", "refused", "not tried", "broken"))
    yield "# Architectures"
    yield ""
    yield (
        f"Printed by `benchmarks/architectures.py` with transformers {transformers.__version__}: a tiny float32 model with "
        "random weights of each of the"
    )
    yield (
        f"{len(verdicts)} classes that `AutoModelForCausalLM` knows, its multipliers and soft caps set to values that show:"
    )
    yield f"{counts}."
    yield ""
    yield "The difference is the largest between the log-probs that CaMOPD computes and those of the model's own logits, in"
    yield "nats. The same comparison is made with your student, and with teachers in the process, before the first rollout."
    yield "Models made from BERT are built with `is_decoder: true`; without, they attend to both sides and are refused."
    yield ""
    yield "| architecture | verdict | difference | why |"
    yield "|---|---|---:|---|"
    for verdict in verdicts:
        difference = "" if verdict.difference is None else f"{verdict.difference:.0e}"
        yield f"| {verdict.architecture} | {verdict.word} | {difference} | {verdict.reason.split('. ')[0]} |"


def main(kinds: list[str]) -> None:
    """Print the table; of some kinds, the verdicts alone."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    if kinds:
        for verdict in sweep(kinds):
            print(*verdict, flush=True)
    else:
        print("\n".join(table(list(sweep()))))


if __name__ == "__main__":
    main(sys.argv[1:])
