"""What `adapter_off` and `adapter_start` score with, for every setting of PEFT: the very model they name, or a refusal.

A teacher that is another model, or becomes one as the student trains, would be wrong in silence.
"""

import dataclasses
import types
import typing
from contextlib import nullcontext

import pytest
import torch
from conftest import LOGP, VOCAB, make_forward, make_model, rounding, student_forward
from fake_vllm import PROMPT_LENS, TOKEN_IDS, assert_same_scores
from peft import IA3Config, LoraConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.config import KasaConfig, MontecloraConfig, VeloraConfig
from trainers import lines, make_trainer
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM
from trl.trainer.utils import use_adapter

from camopd.forward import Forward, in_length_sorted_batches
from camopd.logprobs import completion_logps
from camopd.teachers.adapters import AdapterTeacher, check_adapters, keep_start_adapter, trained_base_weights
from camopd.teachers.local import LocalTeacher


TARGETS = ["q_proj", "v_proj"]


def make_base(tied: bool = False, head_bias: bool = False) -> LlamaForCausalLM:
    """With biases, which `bias=` trains, and weights large enough that each change shows."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCAB), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        initializer_range=0.3, attention_bias=True, tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if head_bias:
        model.lm_head = torch.nn.Linear(32, len(VOCAB))
    return model.eval()


def lora(**settings) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": TARGETS, **settings})


BATCH_SIZE = 8


def logps(model) -> torch.Tensor:
    """In the batches of a teacher: a row beside others, or padded to another length, may round otherwise."""
    model.eval()
    rows = in_length_sorted_batches(
        lambda ids, lens: completion_logps(model, ids, lens, pad_token_id=0)[:1], TOKEN_IDS, PROMPT_LENS, BATCH_SIZE
    )
    return torch.nn.utils.rnn.pad_sequence([row[0] for row in rows], batch_first=True)


def teacher_logps(student, which) -> torch.Tensor:
    teacher = AdapterTeacher(student, which, make_forward(student, BATCH_SIZE, padding_free=False))
    rows = [score.logps for score in teacher.score(TOKEN_IDS, PROMPT_LENS)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def train(student, steps: int = 3) -> None:
    """Large steps, in which all that is trained moves."""
    optimizer = torch.optim.SGD([weight for weight in student.parameters() if weight.requires_grad], lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        student.train()
        (-completion_logps(student, TOKEN_IDS, PROMPT_LENS, pad_token_id=0)[0].sum()).backward()
        optimizer.step()


LORA_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")
ALLOWED_LORA = {
    "exclude_modules": [lora(target_modules="all-linear", exclude_modules=["v_proj"])],
    "lora_dropout": [lora(lora_dropout=0.3)],
    "use_rslora": [lora(use_rslora=True)],
    "modules_to_save": [lora(modules_to_save=[name]) for name in ("embed_tokens", "norm", "lm_head")],
    "init_lora_weights": [lora(init_lora_weights=init) for init in LORA_INITS],
    "layers_to_transform": [lora(layers_to_transform=[1], layers_pattern="layers")],
    "rank_pattern": [lora(rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 2})],
    "trainable_token_indices": [lora(trainable_token_indices=ids) for ids in ([5, 6], {"lm_head": [5, 6, 7]})],
    "use_dora": [lora(use_dora=True)],
    "velora_config": [lora(velora_config=VeloraConfig())],
    "monteclora_config": [lora(monteclora_config=MontecloraConfig(num_samples=2))],
    "lora_bias": [lora(lora_bias=True)],
    "target_modules": [lora(target_modules=["q_proj", "embed_tokens"])],
    "target_parameters": [lora(target_modules=[], target_parameters=["q_proj.weight"])],
    "ensure_weight_tying": [lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True)],
}
# What its own defaults cannot do with a model of 32 numbers.
TYPE_SETTINGS = {
    "ADALORA": {"total_step": 10}, "C3A": {"block_size": 16}, "FOURIERFT": {"n_frequency": 100},
    "IA3": {"feedforward_modules": []}, "LN_TUNING": {"target_modules": ["input_layernorm"]}, "MISS": {"r": 4},
    "PSOFT": {"r": 4}, "ROAD": {"group_size": 4}, "SHIRA": {"r": 4}, "VBLORA": {"vector_length": 16, "num_vectors": 8},
    "WAVEFT": {"n_frequency": 100},
}  # fmt: skip
NOT_INSTALLED = {"ADAMSS"}  # needs scikit-learn


# Those that act outside the backbone, need more than token ids, or could not be tried.
REFUSED_TYPES = {
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE",
    "POLY", "XLORA", "TRAINABLE_TOKENS", "LILY", "SHADOW", "ADAMSS",
}  # fmt: skip
TYPES = {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING} - REFUSED_TYPES


def of_type(name: str):
    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name)](**{"target_modules": TARGETS, **TYPE_SETTINGS.get(name, {})})


ALLOWED = [
    (f"{name}-{place}", config) for name, configs in ALLOWED_LORA.items() for place, config in enumerate(configs)
]
ALLOWED += [(name, of_type(name)) for name in sorted(TYPES - {"LORA"})]


# A tied head can only matter to what adapts embeddings or head, which of these LoRA alone does.
CASES = [
    (name, config, tied)
    for tied in (False, True)
    for name, config in ALLOWED
    if not tied or config.peft_type == PeftType.LORA
]


@pytest.mark.parametrize(
    ("config", "tied"),
    [pytest.param(config, tied, id=f"{name}-{'tied' if tied else 'untied'}") for name, config, tied in CASES],
)
def test_adapter_teachers_keep_their_scores_to_the_bit_while_the_student_learns(config, tied):
    base = make_base(tied)
    specialised = logps(base)
    check_adapters("student", config, ["adapter_off", "adapter_start"])
    student = get_peft_model(base, config)
    assert trained_base_weights(student) == []
    torch.testing.assert_close(teacher_logps(student, "adapter_off"), specialised, rtol=0, atol=0)
    train(student, steps=1)  # the adapter that a run would start from
    start = logps(student)
    assert (start - specialised).abs().max() > 1e-5
    if config.peft_type != PeftType.ADALORA:  # has room for one trained adapter and says so
        keep_start_adapter(student)
    train(student, steps=2)
    assert (logps(student) - start).abs().max() > 1e-5
    torch.testing.assert_close(teacher_logps(student, "adapter_off"), specialised, rtol=0, atol=0)
    if config.peft_type != PeftType.ADALORA:
        torch.testing.assert_close(teacher_logps(student, "adapter_start"), start, rtol=0, atol=0)


REFUSED_LORA = {
    "init_lora_weights": ["olora", "pissa", "pissa_niter_4", "lora_ga", "corda", "loftq"],
    "bias": ["all", "lora_only"],
    "kasa_config": [KasaConfig()],
    "layer_replication": [[(0, 2), (1, 2)]],
    "arrow_config": [object()], "use_bdlora": [object()], "use_qalora": [True], "qalora_group_size": [4],
    "megatron_config": [{"a": 1}], "megatron_core": ["other"],
    "alora_invocation_tokens": [[5, 6]],  # refused with every teacher
}  # fmt: skip
REFUSED = [(name, value) for name, values in REFUSED_LORA.items() for value in values]


@pytest.mark.parametrize(
    ("name", "value"), REFUSED, ids=[f"{name}-{place}" for place, (name, _) in enumerate(REFUSED)]
)
def test_settings_of_lora_that_change_the_base_are_refused_with_the_way_out(name, value):
    config = lora()
    setattr(config, name, value)  # without what PEFT itself asks of such a setting
    with pytest.raises(ValueError) as refusal:
        check_adapters("student", config, ["http://host:1", "adapter_off"])
    assert f"{name}={value!r}" in str(refusal.value) or f"{name}={value}" in str(refusal.value)
    assert "init_lora_weights=True" in str(refusal.value) or "Use plain LoRA" in str(refusal.value)
    if name != "alora_invocation_tokens":
        check_adapters("student", config, ["http://host:1"])


@pytest.mark.parametrize(
    "config",
    [
        lora(init_lora_weights="pissa"), lora(init_lora_weights="olora"), lora(kasa_config=KasaConfig()),
        lora(layer_replication=[(0, 2), (1, 2)]), lora(bias="all"), lora(bias="lora_only"),
    ],
    ids=["pissa", "olora", "kasa", "replication", "bias-all", "bias-lora"],
)  # fmt: skip
def test_settings_that_are_refused_make_indeed_another_model(config):
    base = make_base()
    specialised = logps(base)
    student = get_peft_model(base, config)
    train(student)
    with student.disable_adapter():
        assert (logps(student) - specialised).abs().max() > 0.1


def is_refused(config) -> bool:
    try:
        check_adapters("student", config, ["adapter_off"])
    except ValueError:
        return True
    return False


def test_settings_and_types_of_this_peft_are_all_known():
    """A new version of PEFT may bring settings that change the base: look at them, here and in adapters.py."""
    refused = set(REFUSED_LORA) - {"init_lora_weights", "bias"}  # of which some values are allowed
    for name in {field.name for field in dataclasses.fields(LoraConfig)} - {"init_lora_weights", "bias", "peft_type"}:
        config = lora()
        setattr(config, name, object())  # another value than its default
        assert is_refused(config) is (name in refused), name
    inits = typing.get_type_hints(LoraConfig)["init_lora_weights"]
    names = {name for option in typing.get_args(inits) for name in typing.get_args(option)}
    assert names <= {*LORA_INITS, *REFUSED_LORA["init_lora_weights"], "pissa_niter_[number of iters]"}
    for kind in PEFT_TYPE_TO_CONFIG_MAPPING:
        config = LoraConfig() if kind == PeftType.LORA else types.SimpleNamespace(peft_type=kind)
        assert is_refused(config) is (kind.value in REFUSED_TYPES), kind


def test_type_of_adapter_that_is_not_known_is_refused():
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LILY](target_modules=TARGETS)
    with pytest.raises(ValueError, match="adapter of type LILY is not known to leave the weights under"):
        check_adapters("student", config, ["adapter_off"])


def test_settings_of_a_loaded_or_saved_adapter_count_too(tmp_path):
    student = get_peft_model(make_base(), lora(init_lora_weights="pissa"))
    student.save_pretrained(tmp_path)
    for model in (student, str(tmp_path)):
        with pytest.raises(ValueError, match="init_lora_weights='pissa'"):
            check_adapters(model, None, ["adapter_off"])
        check_adapters(model, None, ["adapter_start"])


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_adapter_start_of_an_adapter_that_has_changed_its_base(tmp_path, init):
    """The copy must not cut into the base once more."""
    get_peft_model(make_base(), lora(init_lora_weights=init)).save_pretrained(tmp_path)
    student = PeftModel.from_pretrained(make_base(), tmp_path, is_trainable=True)
    start = logps(student)
    torch.testing.assert_close(start, logps(make_base()), rtol=0, atol=1e-4)  # as PEFT means it
    keep_start_adapter(student)
    torch.testing.assert_close(logps(student), start, rtol=0, atol=0)
    train(student)
    torch.testing.assert_close(teacher_logps(student, "adapter_start"), start, rtol=0, atol=0)


def test_saved_adapter_as_a_student_is_made_with_its_settings_of_which_nothing_is_said_to_be_ignored(
    tmp_path, tokenizer, caplog
):
    make_model(1).save_pretrained(tmp_path / "base")
    get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "base"), lora()).save_pretrained(tmp_path / "adapter")
    settings = {"attn_implementation": "eager"}
    trainer = make_trainer(
        tmp_path / "out", tokenizer, model=str(tmp_path / "adapter"), model_init_kwargs=settings,
        teachers={"general": make_model(2), "domain": "adapter_off"},
    )  # fmt: skip
    assert trainer.model.config._attn_implementation == "eager" and trainer.args.model_init_kwargs == settings
    assert not [record for record in caplog.records if "model_init_kwargs" in record.getMessage()]


def test_adapter_start_of_replicated_layers(tmp_path):
    get_peft_model(make_base(), lora(layer_replication=[(0, 2), (1, 2)])).save_pretrained(tmp_path)
    student = PeftModel.from_pretrained(make_base(), tmp_path, is_trainable=True)
    keep_start_adapter(student)
    start = logps(student)
    assert len(student.get_base_model().model.layers) == 3
    train(student)
    torch.testing.assert_close(teacher_logps(student, "adapter_start"), start, rtol=0, atol=0)


@pytest.mark.parametrize("cast", ["base", "whole"])
def test_adapter_start_of_a_student_in_bfloat16(cast, tmp_path):
    """DeepSpeed and FSDP2 take one that was cast whole, adapter and all: they keep masters."""
    get_peft_model(make_base(), lora(init_lora_weights=False)).save_pretrained(tmp_path)
    base = make_base().to(torch.bfloat16) if cast == "base" else make_base()
    student = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    if cast == "whole":
        student.to(torch.bfloat16)
    keep_start_adapter(student)
    dtypes = {name.replace(".start.", ".default."): weight.dtype for name, weight in student.named_parameters()}
    assert dtypes == {name: weight.dtype for name, weight in student.named_parameters() if ".start." not in name}
    torch.testing.assert_close(teacher_logps(student, "adapter_start"), logps(student), rtol=0, atol=0)


def test_copy_that_is_not_exact_is_refused():
    student = get_peft_model(make_base(), lora(kasa_config=KasaConfig()))
    train(student)
    with pytest.raises(ValueError, match=r"no exact copy of the student's adapter \(LORA.* the logits differ by"):
        keep_start_adapter(student)


def test_trained_weights_outside_of_adapters_are_refused_with_their_names():
    student = get_peft_model(make_base(), lora())
    student.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"'adapter_off' cannot be a teacher: 1 weights .* 'model.norm.weight'"):
        teacher_logps(student, "adapter_off")
    biased = get_peft_model(make_base(), lora(bias="lora_only"))
    assert trained_base_weights(biased) == [
        f"model.layers.{layer}.self_attn.{name}.bias" for layer in range(2) for name in TARGETS
    ]
    with pytest.raises(ValueError, match=r"'adapter_start' means .*bias='lora_only' trains biases"):
        check_adapters(biased, None, ["adapter_start"])


def test_student_that_cannot_be_trained_is_refused_with_the_way_out(tmp_path):
    get_peft_model(make_base(), lora()).save_pretrained(tmp_path)
    frozen = PeftModel.from_pretrained(make_base(), tmp_path)
    with pytest.raises(ValueError, match=r"'default' was loaded for inference.*is_trainable=True"):
        check_adapters(frozen, None, [])
    with pytest.raises(ValueError, match=r"all have requires_grad=False"):
        check_adapters(make_base().requires_grad_(False), None, [])
    check_adapters(make_base().requires_grad_(False), lora(), [])
    student = PeftModel.from_pretrained(make_base(), tmp_path, is_trainable=True)
    check_adapters(student, None, ["adapter_off", "adapter_start"])
    student.merge_adapter()
    with pytest.raises(ValueError, match=r"merged into its weights.*unmerge_adapter"):
        check_adapters(student, None, [])
    student.unmerge_adapter()
    with pytest.raises(ValueError, match=r"is a saved adapter, and would get a second one.*Leave that out"):
        check_adapters(str(tmp_path), lora(), [])
    check_adapters(str(tmp_path), None, [])
    student.base_model.disable_adapter_layers()
    with pytest.raises(ValueError, match=r"switched off.*enable_adapter_layers"):
        check_adapters(student, None, [])


def test_adapter_that_would_not_be_saved_where_a_model_is_loaded_from_is_refused():
    student = get_peft_model(make_base(), lora())
    student.add_adapter("mine", lora())
    check_adapters(student, None, [])
    student.set_adapter("mine")
    with pytest.raises(ValueError, match=r"active adapter is 'mine'.*'default'.*without adapter_name"):
        check_adapters(student, None, [])
    with pytest.raises(ValueError, match="active adapter is 'only'"):
        check_adapters(get_peft_model(make_base(), lora(), adapter_name="only"), None, [])


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("indices", [[5, 6], {"lm_head": [5, 6]}], ids=["embedding", "head"])
def test_trained_tokens_are_scored_and_trained_as_the_model_itself_has_them(indices, tied):
    base = make_base(tied, head_bias=not tied)
    student = get_peft_model(base, lora(trainable_token_indices=indices))
    with torch.no_grad():
        for weight in student.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn_like(weight))
    for active in (True, False):
        student.base_model.enable_adapter_layers() if active else student.base_model.disable_adapter_layers()
        student.zero_grad()
        found = completion_logps(student, TOKEN_IDS[:1], PROMPT_LENS[:1], pad_token_id=0)[0][0]
        ids = torch.tensor(TOKEN_IDS[:1])
        plain = student(ids).logits[0, PROMPT_LENS[0] - 1 : -1].log_softmax(-1)
        plain = plain.gather(1, ids[0, PROMPT_LENS[0] :, None])[:, 0]
        torch.testing.assert_close(found, plain, rtol=0, atol=LOGP)
        if active:
            weights = [weight for weight in student.parameters() if weight.requires_grad]
            ours, theirs = torch.autograd.grad(found.sum(), weights), torch.autograd.grad(plain.sum(), weights)
            for one, other in zip(ours, theirs, strict=True):
                # Sums of some hundred terms that may cancel: float32's 1.2e-7 of the largest, a hundred times.
                torch.testing.assert_close(one, other, rtol=0, atol=rounding(other.abs().max().item()))


def save_adapter(folder, tokenizer):
    """A specialised model as a base and an adapter on disk; the adapter's folder."""
    base = make_model(1)
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    torch.manual_seed(5)
    config = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = LlamaForCausalLM.from_pretrained(folder / "base")
    get_peft_model(model, config).save_pretrained(folder / "specialised")
    return str(folder / "specialised")


def test_base_and_adapter_are_student_and_both_teachers(tmp_path, tokenizer):
    """One set of weights: the base is the general teacher, the adapter before training the domain teacher."""

    def run(folder, **kwargs):
        trainer = make_trainer(
            folder, tokenizer, model=specialised, teachers={"general": "adapter_off", "domain": "adapter_start"},
            schedule="domain:1,general:1", learning_rate=0.05, save_strategy="steps", save_steps=2, **kwargs,
        )  # fmt: skip
        before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
        trainer.train(**({"resume_from_checkpoint": str(folder / "checkpoint-2")} if folder.name == "again" else {}))
        return before, {name: value.detach() for name, value in trainer.model.named_parameters()}

    specialised = save_adapter(tmp_path, tokenizer)
    before, after = run(tmp_path / "run")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".default." in name for name in changed)
    assert any(".start." in name for name in before)
    written = lines(tmp_path / "run")
    assert (
        written[0]["branch"] == "domain" and written[0]["gap/domain/abs_mean"] == 0
    )  # the student is this teacher yet
    assert written[1]["gap/general/abs_mean"] > 0.01
    assert written[2]["gap/domain/abs_mean"] > 0

    (tmp_path / "again").mkdir()
    (tmp_path / "run" / "checkpoint-2").rename(tmp_path / "again" / "checkpoint-2")
    _, resumed = run(tmp_path / "again")
    for name, value in after.items():
        assert torch.equal(value, resumed[name]), name


def test_lora_student_with_adapter_off_as_domain_teacher(tmp_path, tokenizer):
    from peft import LoraConfig

    trainer = make_trainer(
        tmp_path, tokenizer, teachers={"general": make_model(2), "domain": "adapter_off"}, max_steps=4, learning_rate=0.1,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )  # fmt: skip
    base = {name: value.clone() for name, value in trainer.model.named_parameters() if "lora" not in name}
    trainer.train()
    for name, value in trainer.model.named_parameters():
        if "lora" in name:
            continue
        assert torch.equal(value, base[name]), name
    domain = lines(tmp_path)[3]
    assert domain["branch"] == "domain"
    assert domain["gap/domain/abs_mean"] > 0  # three general steps have moved the adapter away from the base


def adapter_off(student, which="adapter_off"):
    return AdapterTeacher(student, which, make_forward(student, padding_free=False))


def test_adapter_off_scores_equal_those_of_the_base_model(lora_student, model_factory):
    base = LocalTeacher(model_factory(0), "base", "cpu", batch_size=2)
    expected = base.score(TOKEN_IDS, PROMPT_LENS, top_k=3)
    lora_student.train()  # dropout must not disturb the scores
    assert_same_scores(adapter_off(lora_student).score(TOKEN_IDS, PROMPT_LENS, top_k=3), expected)
    lora_student.eval()
    with torch.no_grad():
        with_adapter, _ = student_forward(lora_student)(TOKEN_IDS[:1], PROMPT_LENS[:1])
    assert (with_adapter[0] - expected[0].logps).abs().min() > 1e-3  # the adapter is not zero


@pytest.mark.parametrize("training", [True, False])
def test_adapter_off_leaves_adapter_training_mode_and_gradients_as_they_were(lora_student, training):
    def state():
        lora_student.eval()
        with torch.no_grad():
            logps, _ = student_forward(lora_student)(TOKEN_IDS, PROMPT_LENS)
        trainable = [name for name, parameter in lora_student.named_parameters() if parameter.requires_grad]
        return logps, trainable

    logps, trainable = state()
    lora_student.train(training)
    modes = [module.training for module in lora_student.modules()]
    adapter_off(lora_student).score(TOKEN_IDS, PROMPT_LENS, top_k=2)
    assert [module.training for module in lora_student.modules()] == modes
    logps_after, trainable_after = state()
    torch.testing.assert_close(logps_after, logps, rtol=0, atol=0)
    assert trainable_after == trainable != []


def test_adapter_start_is_the_adapter_before_training(lora_student):
    lora_student.eval()
    with torch.no_grad():
        before, _ = student_forward(lora_student)(TOKEN_IDS, PROMPT_LENS)
    keep_start_adapter(lora_student)
    trainable = {name for name, parameter in lora_student.named_parameters() if parameter.requires_grad}
    assert trainable and all(".default." in name for name in trainable)
    with torch.no_grad():
        for name, parameter in lora_student.named_parameters():
            if name in trainable:
                parameter.add_(0.1)
        after, _ = student_forward(lora_student)(TOKEN_IDS, PROMPT_LENS)
    assert not torch.allclose(before, after)
    teacher = adapter_off(lora_student, "adapter_start")
    for row, score in enumerate(teacher.score(TOKEN_IDS, PROMPT_LENS)):
        torch.testing.assert_close(score.logps, before[row, : len(score.logps)], rtol=0, atol=LOGP)
    with torch.no_grad():
        torch.testing.assert_close(student_forward(lora_student)(TOKEN_IDS, PROMPT_LENS)[0], after, rtol=0, atol=0)
    assert trainable == {name for name, parameter in lora_student.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False),
        LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, init_lora_weights=False),
        LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"], init_lora_weights=False),
        LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[5, 6], init_lora_weights=False),
        IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[], init_ia3_weights=False),
    ],
    ids=["embedding", "dora", "modules_to_save", "tokens", "ia3"],
)
def test_adapter_start_is_a_copy_of_every_kind_of_adapter(config):
    student = get_peft_model(make_model(0), config)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        before = student(torch.tensor([[5, 6, 7, 8]])).logits
        keep_start_adapter(student)
        with use_adapter(student, "start"):
            torch.testing.assert_close(student(torch.tensor([[5, 6, 7, 8]])).logits, before, rtol=0, atol=LOGP)


def test_start_adapter_of_another_trainer_is_not_taken(lora_student):
    keep_start_adapter(lora_student)
    with pytest.raises(ValueError, match=r"has an adapter of that name, perhaps of a trainer made before"):
        keep_start_adapter(lora_student)


def test_adapter_start_needs_a_single_adapter(lora_student):
    lora_student.add_adapter("other", lora_student.peft_config["default"])
    with pytest.raises(ValueError, match=r"one adapter, called 'default', and this one has \['default', 'other'\]"):
        keep_start_adapter(lora_student)


def test_adapter_off_puts_everything_back_when_the_forward_fails(lora_student):
    def fails(ids, lens, with_entropy):
        raise torch.OutOfMemoryError("too long")

    lora_student.train()
    with pytest.raises(torch.OutOfMemoryError):
        forward = make_forward(lora_student, padding_free=False)
        forward.logps = fails
        AdapterTeacher(lora_student, "adapter_off", forward).score(TOKEN_IDS, PROMPT_LENS)
    assert lora_student.training
    lora_student.eval()
    with torch.no_grad():
        with_adapter, _ = student_forward(lora_student)(TOKEN_IDS[:1], PROMPT_LENS[:1])
        with lora_student.disable_adapter():
            without, _ = student_forward(lora_student)(TOKEN_IDS[:1], PROMPT_LENS[:1])
    assert not torch.equal(with_adapter, without)


def test_adapter_teacher_is_batched_as_the_student_whatever_its_probe_has_found(monkeypatch):
    """Equal weights give gaps of exactly 0, also where rows without padding would see each other (OPT)."""
    monkeypatch.setattr("camopd.packing.packing_pays", lambda model: True)
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=40, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, init_std=0.3,
    )  # fmt: skip
    student = get_peft_model(
        OPTForCausalLM(config), LoraConfig(target_modules=["q_proj"])
    ).eval()  # starts as its base
    forward = make_forward(student)
    teacher = AdapterTeacher(student, "adapter_off", forward)
    assert forward.packed
    forward.probe()
    assert not forward.packed
    own = forward.rows(TOKEN_IDS, PROMPT_LENS)
    for scores, (logps, _) in zip(teacher.score(TOKEN_IDS, PROMPT_LENS), own, strict=True):
        assert torch.equal(scores.logps, logps)


def test_adapter_teachers_top_k_goes_through_the_students_wrapper(lora_student):
    """There sharded weights are whole."""
    ran = []

    def run(function, *args):
        ran.append(function.__name__)
        return function(lora_student, *args)

    forward = Forward(lora_student, run, lora_student, nullcontext, 2, 0, None, "the student")
    AdapterTeacher(lora_student, "adapter_off", forward).score(TOKEN_IDS, PROMPT_LENS, top_k=3)
    assert set(ran) == {"completion_logps", "completion_top_k"}
