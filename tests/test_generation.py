import copy
import json

import pytest
import torch
from conftest import VOCAB, make_model
from peft import LoraConfig, get_peft_model
from trainers import make_trainer
from transformers import GenerationConfig, WatermarkingConfig

from camopd.generation import TOKEN_IDS, neutral_generation


# Every field of GenerationConfig. BENDS: a value with which other answers, or none, come out where it is not kept away.
BENDS = {
    "min_length": 12,
    "min_new_tokens": 12,
    "max_time": 1e-9,
    "stop_strings": ["a"],
    "num_beams": 3,
    "use_mtp": True,
    "min_p": 0.9,
    "top_h": 0.1,
    "typical_p": 0.1,
    "epsilon_cutoff": 0.2,
    "eta_cutoff": 0.9,
    "no_repeat_ngram_size": 1,
    "bad_words_ids": [[7], [8], [9], [10]],
    "forced_bos_token_id": 7,
    "forced_eos_token_id": 7,
    "exponential_decay_length_penalty": (0, 20.0),
    "suppress_tokens": list(range(20)),
    "begin_suppress_tokens": list(range(20)),
    "sequence_bias": [[[7], 30.0]],
    "token_healing": True,
    "guidance_scale": 9.0,
    "watermarking_config": WatermarkingConfig(bias=30.0),
    "num_return_sequences": 2,
    "return_dict_in_generate": True,
    "encoder_repetition_penalty": 9.0,
    "encoder_no_repeat_ngram_size": 1,
    "is_assistant": True,
    "prompt_lookup_num_tokens": 3,
    "assistant_early_exit": 1,
    "dola_layers": "low",
    "constraints": [1],
    "force_words_ids": [[7]],
    "cache_implementation": "quantized",
}
# Without effect on sampled sequences, and why. "Given" is a value of the trainer's own config, which wins.
HARMLESS = {
    "max_length": "max_new_tokens is given and wins",
    "max_new_tokens": "given",
    "do_sample": "given",
    "temperature": "given",
    "top_k": "given",
    "top_p": "given",
    "repetition_penalty": "given",
    "output_scores": "of the dict that return_dict_in_generate asks for",
    "speculation_type": "of assisted decoding",
    "penalty_alpha": "of greedy decoding",
    "num_beam_groups": "of beam search, which num_beams asks for",
    "prefill_chunk_size": "memory and speed",
    "early_stopping": "of beam search",
    "use_cache": "the same numbers at twenty times the work; kept away all the same",
    "cache_config": "of the quantized cache",
    "max_cache_len": "of the static cache",
    "length_penalty": "of beam search",
    "renormalize_logits": "the softmax does so anyway",
    "remove_invalid_values": "changes NaN and infinity alone",
    "output_attentions": "of the dict that return_dict_in_generate asks for",
    "output_hidden_states": "of that dict",
    "output_logits": "of that dict",
    "num_assistant_tokens": "of assisted decoding",
    "num_assistant_tokens_schedule": "of assisted decoding",
    "assistant_confidence_threshold": "of assisted decoding",
    "max_matching_ngram_size": "of prompt lookup",
    "assistant_lookbehind": "of assisted decoding",
    "target_lookbehind": "of assisted decoding",
    "assistant_ensemble_weight": "of assisted decoding",
    "compile_config": "speed",
    "disable_compile": "given",
    "continuous_batching_config": "of generate_batch",
    "low_memory": "of beam search",
    "diversity_penalty": "of group beam search",
    "transformers_version": "a note",
}

PROMPTS = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10], [0, 3, 4, 5]])


def draw(model, prompts=PROMPTS, **changes):
    """As TRL generates."""
    given = {
        "max_new_tokens": 8, "do_sample": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": [2, *range(20, 28)],
        "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0,
        "cache_implementation": None, "disable_compile": True,
    }  # fmt: skip
    torch.manual_seed(0)
    return model.generate(
        input_ids=prompts, attention_mask=(prompts != 0).long(), generation_config=GenerationConfig(**given | changes)
    )


def test_fields_of_a_generation_config_are_all_known():
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert fields == {*BENDS, *HARMLESS, *TOKEN_IDS}, "say in this file what the new field does to rollouts"
    assert not set(BENDS) & set(HARMLESS)


@pytest.fixture(scope="module")
def model():
    return make_model(0)


@pytest.mark.parametrize("name", BENDS)
def test_field_of_the_models_generation_config_bends_no_rollout(model, name):
    prompts = PROMPTS[1:2, :1] if name == "forced_bos_token_id" else PROMPTS  # it counts behind one token alone
    plain = draw(model, prompts)
    own = model.generation_config
    model.generation_config = bent = copy.deepcopy(own)
    setattr(bent, name, BENDS[name])
    try:
        with neutral_generation(model):
            neutral = draw(model, prompts)
        assert model.generation_config is bent
        assert getattr(bent, name) == BENDS[name]
        assert torch.equal(neutral, plain)
        try:
            without_care = draw(model, prompts)
        except (ValueError, TypeError, ImportError):
            return
        assert not torch.is_tensor(without_care) or not torch.equal(without_care, plain)  # or the test shows nothing
    finally:
        model.generation_config = own


@pytest.mark.parametrize(
    "allowed",
    [
        {"use_cache": False},
        {"prefill_chunk_size": 1},
        {"max_time": 600.0},
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static"},
    ],
    ids=str,
)
def test_generation_kwargs_that_may_be_set_bend_no_rollout(model, allowed):
    with neutral_generation(model):
        assert torch.equal(draw(model, **allowed), draw(model))


def test_ids_of_the_model_are_kept(model):
    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=[2, 9], pad_token_id=3, bos_token_id=4, min_p=0.5)
    try:
        with neutral_generation(model):
            inside = model.generation_config.to_diff_dict()
    finally:
        model.generation_config = own
    inside.pop("transformers_version", None)
    assert inside == {"eos_token_id": [2, 9], "pad_token_id": 3, "bos_token_id": 4}


def test_adapter_hands_no_config_past_it():
    student = get_peft_model(make_model(0), LoraConfig(r=2, target_modules=["q_proj"]))
    plain = draw(student)
    bent = GenerationConfig(min_p=0.9, eos_token_id=2)
    for holder in (student.get_base_model(), student):  # assigning to the wrapper leaves it there
        holder.generation_config = bent
        with neutral_generation(student):
            assert torch.equal(draw(student), plain)
        assert student.generation_config is student.get_base_model().generation_config is bent


def test_model_has_its_config_back_when_generation_fails(model):
    own = model.generation_config
    with pytest.raises(ZeroDivisionError), neutral_generation(model):
        1 / 0  # noqa: B018
    assert model.generation_config is own


def test_rollouts_evaluation_and_saved_files_of_a_student_with_defaults_of_its_own(tmp_path, tokenizer):
    """Both ways to generate, in training and in evaluation, draw what they draw without the defaults; these are saved."""
    rows = [
        {"prompt": text, "branch": "general", "position": place} for place, text in enumerate(("ab", "c d e", "f"))
    ]
    trainer = make_trainer(tmp_path, tokenizer, max_completion_length=8)
    student, own = trainer.model, trainer.model.generation_config

    def everything():
        seen = []
        for student_logps in ("trainer", "engine"):
            trainer.args.student_logps = student_logps
            torch.manual_seed(0)
            samples, _ = trainer.roll_out(rows, 8)
            logps = [None if sample.rollout_logps is None else sample.rollout_logps.tolist() for sample in samples]
            seen.append(([sample.token_ids for sample in samples], logps))
        torch.manual_seed(0)
        seen.append(trainer.prediction_step(student, rows, prediction_loss_only=True)[0].item())
        return seen

    plain = everything()
    student.generation_config = copy.deepcopy(own)
    defaults = {
        "min_p": 0.9, "typical_p": 0.3, "no_repeat_ngram_size": 2, "suppress_tokens": [5, 6, 7], "num_beams": 2,
        "num_return_sequences": 2, "use_cache": False, "do_sample": True, "temperature": 0.6, "repetition_penalty": 1.3,
    }  # fmt: skip
    student.generation_config.update(**defaults)
    assert everything() == plain
    trainer.save_model(str(tmp_path / "saved"))
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert {name: saved.get(name) for name in defaults} == defaults
    assert len(VOCAB) > max(max(row) for row in plain[0][0])


# --- generation_kwargs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["temperature", "top_p", "top_k", "do_sample", "num_beams", "presence_penalty"])
def test_generation_kwargs_that_change_the_distribution_are_refused(make_config, key):
    with pytest.raises(
        ValueError, match=rf"generation_kwargs sets \['{key}'\], which CaMOPD cannot use: rollouts must be drawn"
    ):
        make_config(generation_kwargs={key: 0.9, "use_cache": True})


@pytest.mark.parametrize("refused", ["stop", "seed", "stop_token_ids", "stop_strings", "cache_config"])
def test_generation_kwargs_are_those_of_the_engine(make_config, refused):
    """`stop_strings` asks for a tokenizer at the first rollout, the others are never read."""
    taken = {"prefill_chunk_size": 2, "cache_implementation": "static", "max_time": 60, "use_cache": True}
    assert make_config(generation_kwargs=taken).generation_kwargs == taken
    with pytest.raises(ValueError, match=rf"\['{refused}'\].* transformers .*Leave it out; what may be set is \["):
        make_config(generation_kwargs={**taken, refused: 1})


@pytest.mark.parametrize(
    ("refused", "reason"),
    [
        ("seed", "seed: with it equal prompts get one and the same completion"), ("stop", "Use stop_token_ids"),
        ("include_stop_str_in_output", "there is no `stop`"), ("use_cache", "vLLM"), ("max_time", "vLLM"),
        ("stop_strings", "vLLM"), ("cache_config", "vLLM"), ("cache_implementation", "vLLM"),
        ("prefill_chunk_size", "vLLM"),
    ],
)  # fmt: skip
def test_generation_kwargs_that_vllm_does_not_have_or_stumbles_over_are_refused(make_config, refused, reason):
    taken = {"stop_token_ids": [7]}
    assert make_config(use_vllm=True, generation_kwargs=taken).generation_kwargs == taken
    with pytest.raises(ValueError, match=rf"\['{refused}'\].* vLLM .*may be set is \['stop_token_ids'\]") as error:
        make_config(use_vllm=True, generation_kwargs={**taken, refused: 1})
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "way_out"),
    [
        ("cache_implementation", "quantized", "Leave it out, or take 'dynamic'"),
        ("cache_implementation", "paged", "Leave it out, or take 'dynamic'"),
        ("prefill_chunk_size", 0, "number of tokens"),
        ("max_time", "soon", "number of seconds"),
        ("use_cache", "no", "true or false"),
    ],
)
def test_generation_value_that_bends_the_distribution_is_refused(make_config, name, value, way_out):
    with pytest.raises(ValueError, match=rf"{name} is {value!r}, which CaMOPD cannot use: .*{way_out}"):
        make_config(generation_kwargs={name: value})
    if name == "cache_implementation":  # which has a field of its own
        with pytest.raises(ValueError, match=way_out):
            make_config(cache_implementation=value)
