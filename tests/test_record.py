"""The record of a run: everything that changes its numbers, nothing that is secret, and what it says of another one."""

import json
import logging
from dataclasses import fields
from enum import Enum
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import later_settings, make_model, make_prompts, make_tokenizer
from datasets import Dataset
from fake_rollouts import FakeRollouts
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tokenizers.normalizers import Lowercase
from trainers import make_args, make_trainer
from transformers import LlamaForCausalLM

from camopd import CaMOPDConfig, CaMOPDTrainer
from camopd.errors import ResumeError
from camopd.record import (
    LEFT_OUT,
    NOTED,
    RUN_RECORD,
    as_json,
    check,
    differences,
    fingerprint_of,
    notes,
    read,
    tokens_of,
)


LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def record_with(tmp_path_factory, tokenizer):
    """The record of a tiny run with some settings changed, as a checkpoint has it."""

    def make(**changes):
        trainer = make_trainer(tmp_path_factory.mktemp("run"), tokenizer, **changes)
        return json.loads(json.dumps(trainer.checkpoints.record))

    return make


@pytest.fixture(scope="module")
def record(record_with):
    return record_with()


def names(lines: list[str]) -> list[str]:
    return [line.split(":")[0].strip() for line in lines]


# ------------------------------------------------------------------------------------------------- what is in the record


def test_record_has_every_field_of_the_config_or_a_reason_to_leave_it_out(record):
    left_out = [name for text in LEFT_OUT.values() for name in text.split()]
    assert len(left_out) == len(set(left_out))
    known = {each.name for each in fields(CaMOPDConfig)}
    assert set(left_out) - later_settings() <= known
    assert known - set(left_out) - {"max_steps"} == known & set(record) - {"teachers", "deepspeed"}
    assert set(NOTED) <= set(record)


@pytest.mark.parametrize(
    ("changes", "names_of_settings"),
    [
        ({"max_grad_norm": 0.5}, ["max_grad_norm"]),
        ({"lr_scheduler_type": "cosine"}, ["lr_scheduler_type"]),
        ({"warmup_steps": 2}, ["lr_scheduler_type", "warmup_steps"]),
        ({"shuffle_dataset": False}, ["shuffle_dataset"]),
        ({"bf16": True}, ["bf16"]),
        ({"weight_decay": 0.1}, ["weight_decay"]),
        ({"adam_beta1": 0.8, "adam_beta2": 0.99, "adam_epsilon": 1e-6}, ["adam_beta1", "adam_beta2", "adam_epsilon"]),
        ({"optim": "sgd"}, ["optim"]),
        ({"optim": "sgd", "optim_args": "momentum=0.9"}, ["optim", "optim_args"]),
        ({"disable_dropout": False}, ["disable_dropout"]),
        ({"chat_template_kwargs": {"enable_thinking": False}}, ["chat_template_kwargs"]),
        ({"generation_kwargs": {"prefill_chunk_size": 8}}, ["generation_kwargs"]),
        ({"max_completion_length": {0: 4, 2: 6}}, ["completion_lengths"]),
        ({"model": make_model(3)}, ["student"]),
        ({"teachers": {"general": make_model(3), "domain": make_model(1)}}, ["teacher_weights"]),
        ({"peft_config": LoraConfig(**LORA)}, ["adapter"]),
    ],
    ids=lambda value: "-".join(value),
)  # fmt: skip
def test_record_of_another_setting_student_or_teacher_is_a_difference(changes, names_of_settings, record, record_with):
    assert sorted(names(differences(record, record_with(**changes)))) == sorted(names_of_settings)


@pytest.mark.parametrize(
    "changes",
    [
        {"output_dir": "elsewhere", "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "max_steps": 9},
        {"logging_steps": 3, "log_completions": True, "diagnostics_steps": 0},
        {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 3},
        {"gradient_checkpointing": True, "teacher_timeout": 3.0, "per_device_eval_batch_size": 3},
    ],
    ids=lambda value: next(iter(value)),
)
def test_record_without_a_change_of_numbers_is_not_a_difference(changes, record, record_with):
    now = record_with(**changes)
    assert differences(record, now) == notes(record, now) == []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"lora_alpha": 8}, {"lora_alpha": 16}),
        ({"lora_alpha": 16}, {"use_rslora": True}),
        ({}, {"target_modules": ["q_proj"]}),
    ],
)
def test_record_of_another_adapter_is_a_difference_and_of_random_weights_is_not(one, other, record_with):
    first, again, changed = (record_with(peft_config=LoraConfig(**{**LORA, **each})) for each in (one, one, other))
    assert differences(first, again) == []
    assert names(differences(first, changed)) == ["adapter"]


def test_record_of_other_prompts_in_the_middle_is_a_difference(record_with):
    rows = [{"prompt": f"a {number}"} for number in range(200)]
    other = [*rows[:90], {"prompt": "b"}, *rows[91:]]
    given = [{"general": Dataset.from_list(each), "domain": make_prompts("domain")} for each in (rows, rows[:], other)]
    first, again, changed = (record_with(train_dataset=each) for each in given)
    assert differences(first, again) == []
    assert names(differences(first, changed)) == ["all_prompts"]


@pytest.mark.parametrize("what", ["template", "tokenizer"])
def test_record_of_other_tokens_for_a_prompt_is_a_difference(what, record, tmp_path):
    changed = make_tokenizer()
    if what == "template":
        changed.chat_template = changed.chat_template.replace("'a '", "'b '")
    else:
        changed.backend_tokenizer.normalizer = Lowercase()
    trainer = make_trainer(tmp_path, changed)
    assert names(differences(record, trainer.checkpoints.record)) == ["tokens"]


def test_record_of_other_tools_is_a_difference(tokenizer):
    def weigh(dose: int) -> int:
        """
        Weighs.

        Args:
            dose: in mg.
        """
        return dose

    def of(*tools):
        return tokens_of(
            SimpleNamespace(chat_template=None, tools=tools, processing_class=tokenizer, _tokenizer=tokenizer)
        )

    before = of(weigh)
    assert before == of(weigh) != of()
    weigh.__doc__ = weigh.__doc__.replace("mg", "g")  # which the student reads
    assert of(weigh) != before


def test_record_of_rollouts_from_servers_is_a_difference_wherever_they_are(record, record_with, tokenizer):
    servers = [FakeRollouts(make_model(9), tokenizer) for _ in range(2)]
    try:
        one, other = (record_with(rollout_servers=[server.url]) for server in servers)
    finally:
        for server in servers:
            server.close()
    assert differences(one, other) == []
    assert names(differences(record, one)) == ["rollouts_from_servers"]


def test_max_steps_counts_where_the_learning_rate_depends_on_it(record, record_with):
    assert "max_steps" not in record
    assert differences(record_with(warmup_steps=1), record_with(warmup_steps=1, max_steps=9)) == []
    cosine = [record_with(lr_scheduler_type="cosine", max_steps=steps) for steps in (4, 9)]
    assert names(differences(*cosine)) == ["max_steps"]
    shares = [record_with(warmup_steps=0.25, max_steps=steps) for steps in (4, 8)]
    assert names(differences(*shares)) == ["warmup_steps"]


def test_evaluation_counts_where_the_learning_rate_follows_it(record_with):
    settings = {
        "lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "eval_general_kl", "eval_strategy": "steps",
        "eval_dataset": {"general": make_prompts("general", 2)},
    }  # fmt: skip
    then, now = (record_with(**settings, eval_steps=steps) for steps in (1, 2))
    assert names(differences(then, now)) == ["eval_steps"]


def test_optimizer_that_is_passed_is_recorded_with_its_settings(tmp_path, tokenizer):
    def record_with_sgd(momentum):
        model = make_model(1)
        sgd = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=momentum)
        trainer = CaMOPDTrainer(
            model=model, teachers={"general": make_model(2), "domain": make_model(1)}, args=make_args(tmp_path),
            train_dataset={branch: make_prompts(branch) for branch in ("general", "domain")},
            processing_class=tokenizer, optimizers=(sgd, None),
        )  # fmt: skip
        return trainer.checkpoints.record

    then, now = record_with_sgd(0.9), record_with_sgd(0.8)
    assert then["optimizers"]["optimizer"] == "SGD" and then["optimizers"]["settings"]["momentum"] == 0.9
    assert names(differences(then, now)) == ["optimizers"]


def test_record_has_no_folder_and_no_secret(tmp_path, tokenizer, record_with):
    for name in ("student", "teacher"):
        make_model(1).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "ds.json").write_text("{}")
    text = json.dumps(
        record_with(
            model=str(tmp_path / "student"),
            teachers={"general": str(tmp_path / "teacher"), "domain": make_model(1)},
            model_init_kwargs={"token": "hf_secret", "cache_dir": str(tmp_path), "attn_implementation": "eager"},
            teacher_model_init_kwargs={"token": "hf_secret", "key_mapping": {"a": str(tmp_path / "map")}},
            chat_template_kwargs={"api_key": "hf_secret", "url": "http://host?key=hf_secret"},
        )
    )
    assert "hf_secret" not in text and str(tmp_path) not in text
    assert '"student"' in text and '"teacher"' in text and "eager" in text


class Color(Enum):
    RED = "red"
    MANY = (1, 2)


leaves = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8), st.sampled_from(Color),
    st.sampled_from([torch.bfloat16, Path("/a/b"), Path("c"), torch.tensor(2.5), torch.arange(3), LORA]),
    st.sampled_from(["/home/me/x", "~", "./", "C:\\me", "http://me:key@host/", "org/name", "/", "//"]),
)  # fmt: skip
hashable = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(Color))
trees = st.recursive(
    leaves,
    lambda each: st.one_of(
        st.lists(each, max_size=3), st.tuples(each, each), st.dictionaries(hashable, each, max_size=3),
        st.sets(hashable, max_size=3), st.frozensets(hashable, max_size=3),
    ),
    max_leaves=12,
)  # fmt: skip


@given(trees)
def test_value_is_the_same_after_json(value):
    found = as_json(value)
    assert json.loads(json.dumps(found)) == found == as_json(found)
    assert "/home/me" not in json.dumps(found) and "key@host" not in json.dumps(found)


# -------------------------------------------------------------------------------------------------- models by their weights


def test_fingerprint_tells_models_apart_and_not_their_dtypes():
    model = make_model(1)
    before = fingerprint_of(model)
    assert before == fingerprint_of(make_model(1))
    assert fingerprint_of(make_model(2)) == {
        "shapes": before["shapes"],
        "values": fingerprint_of(make_model(2))["values"],
    }
    assert fingerprint_of(make_model(2))["values"] != before["values"]
    assert fingerprint_of(make_model(1, vocab_size=50))["shapes"] != before["shapes"]
    rounded = model.bfloat16()
    assert fingerprint_of(rounded) == fingerprint_of(rounded.float())


def with_adapter(model, seed):
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(**LORA, init_lora_weights=False))


def test_fingerprint_of_a_model_with_a_new_adapter_is_that_of_its_base():
    wrapped = [with_adapter(make_model(1), seed) for seed in (3, 4)]
    assert fingerprint_of(wrapped[0]) == fingerprint_of(wrapped[1]) == fingerprint_of(make_model(1))
    assert fingerprint_of(wrapped[0], with_adapter=True) != fingerprint_of(wrapped[1], with_adapter=True)


def test_saved_adapter_is_part_of_the_students_weights(tmp_path, tokenizer, record_with):
    make_model(1).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    for seed, name in enumerate(("one", "two")):
        base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        with_adapter(base, seed).save_pretrained(tmp_path / name / "adapter")
    settings = {"teachers": {"general": "adapter_off", "domain": "adapter_start"}}
    one, again, two = (
        record_with(model=str(tmp_path / name / "adapter"), **settings) for name in ("one", "one", "two")
    )
    assert differences(one, again) == []
    assert names(differences(one, two)) == ["student"]


def test_fingerprint_of_weights_in_shards_is_one_of_names_and_shapes():
    model = make_model(1)
    weight = next(model.parameters())
    weight.ds_id, weight.ds_shape, shape = 0, weight.shape, weight.shape
    weight.data = torch.zeros(0)
    found = fingerprint_of(model)
    assert found == {"shapes": fingerprint_of(make_model(1))["shapes"], "values": None} and shape
    for then, now in ((found, fingerprint_of(make_model(1))), (fingerprint_of(make_model(1)), found)):
        assert differences({"student": {"name": "a", **then}}, {"student": {"name": "a", **now}}) == []
    assert differences({"student": {"name": "b", **found}}, {"student": {"name": "a", **found}})


def test_student_of_the_same_weights_may_lie_elsewhere(tmp_path, tokenizer, record_with):
    for name in ("here", "there"):
        make_model(1).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    here, there = (record_with(model=str(tmp_path / name)) for name in ("here", "there"))
    assert (here["student"]["name"], there["student"]["name"]) == ("here", "there")
    assert differences(here, there) == []


def test_teachers_in_folders_of_one_name_are_told_apart(tmp_path, tokenizer, record_with):
    for seed in (2, 3):
        make_model(seed).save_pretrained(tmp_path / str(seed) / "teacher")
        tokenizer.save_pretrained(tmp_path / str(seed) / "teacher")
    two, three = (
        record_with(teachers={"general": str(tmp_path / name / "teacher"), "domain": make_model(1)}) for name in "23"
    )
    assert two["teachers"] == three["teachers"]
    assert names(differences(two, three)) == ["teacher_weights"]


# ------------------------------------------------------------------------------------------------------------ comparing


OF_AN_OLD_RECORD = (
    "schedule", "branches", "teachers", "prompts", "mass_target", "scale", "score", "selection", "prompts_per_step", "seed",
    "data_seed", "max_prompt_length", "max_completion_length", "learning_rate", "importance_sampling_mode",
    "importance_sampling_low", "importance_sampling_high", "loss_prefix_tokens", "optimizer_moments", "student_logps",
    "token_rule", "relaxed_mixture", "relaxed_entropy_share", "relaxed_exploration_steps", "selectkd_reject_weight",
    "loss_normalization", "branch_weights", "completion_lengths",
)  # fmt: skip


def test_record_that_is_old_may_lack_what_it_did_not_always_have(record):
    old = {name: record[name] for name in OF_AN_OLD_RECORD}
    assert differences(old, record) == notes(old, record) == []
    for name in ("schedule", "seed", "teachers", "scale"):
        without = {other: value for other, value in old.items() if other != name}
        assert names(differences(without, record)) == [name]


def test_record_of_an_old_name_is_read(record, tmp_path):
    old = {"gap_student" if name == "student_logps" else name: value for name, value in record.items()}
    (tmp_path / RUN_RECORD).write_text(json.dumps(old))
    assert check(tmp_path, record) == record


def test_settings_of_memory_and_machines_may_change_and_are_told(record, record_with, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("camopd"), "propagate", True)
    (tmp_path / RUN_RECORD).write_text(json.dumps(record))
    check(tmp_path, record)
    assert not caplog.records
    check(tmp_path, record_with(score_tokens=100, padding_free=True, rebalance=False, per_device_train_batch_size=1))
    for text in (
        "per_device_train_batch_size: 2 then, 1 now",
        "score_tokens: 65536 then, 100 now",
        "padding_free: None then, True now",
        "rebalance: True then, False now",
    ):
        assert text in caplog.text


@given(st.dictionaries(st.sampled_from(["schedule", "student", "teacher_weights", "use_cpu", "seed", "x"]), trees))
def test_record_that_holds_anything_is_compared_without_a_crash(then):
    now = {"schedule": "a", "student": {"name": "", "shapes": "", "values": None}, "teacher_weights": {"a": None}}
    assert all(isinstance(line, str) for line in differences(then, now) + notes(then, now))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"null", "must hold a JSON object, and holds 'None'"),
        (b"[1, 2]", r"must hold a JSON object, and holds '\[1, 2\]'"),
        (b'"text"', "must hold a JSON object"),
        (b"", "cannot be read: Expecting value"),
        (b'{"seed": 4', "cannot be read"),
        (b"\xff\xfe{}", "cannot be read: 'utf-8'"),
        (b"[" * 200_000, "cannot be read"),
    ],
)
def test_record_that_is_not_a_json_object_is_said_so(content, reason, tmp_path):
    (tmp_path / RUN_RECORD).write_bytes(content)
    with pytest.raises(ResumeError, match=f"camopd.json', which says what run it is, {reason}.*earlier checkpoint"):
        read(tmp_path)


def test_student_that_has_been_trained_since_is_explained(record, record_with, tmp_path):
    (tmp_path / RUN_RECORD).write_text(json.dumps(record))
    with pytest.raises(ResumeError, match=r"(?s)belongs to another run:\n  student: .*that has been trained since"):
        check(tmp_path, record_with(model=make_model(3)))


def test_record_of_other_held_out_prompts_is_a_difference_where_the_best_checkpoint_is_that_of_theirs(record_with):
    held = [{"general": make_prompts("general", count)} for count in (2, 3)]
    plain = [record_with(eval_dataset=each, eval_strategy="steps") for each in held]
    assert differences(*plain) == []
    best = [
        record_with(eval_dataset=each, eval_strategy="steps", metric_for_best_model="eval_general_kl") for each in held
    ]
    assert names(differences(*best)) == ["eval_prompts"]
    assert differences(plain[0], best[0]) == differences(best[0], plain[0]) == []  # the metric is new, or gone
    both = record_with(
        eval_dataset={**held[0], "domain": make_prompts("domain", 2)}, eval_strategy="steps",
        metric_for_best_model="eval_general_kl",
    )  # fmt: skip
    assert differences(best[0], both) == []
