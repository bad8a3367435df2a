"""docs/settings.md against the settings there are, the tests it names, and what each setting does in a tiny run."""

import ast
import copy
import dataclasses
import importlib.machinery
import inspect
import json
import logging
import math
import os
import re
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import ParallelismConfig
from accelerate.utils import FullyShardedDataParallelPlugin
from conftest import later_settings, make_model, make_prompts, make_tokenizer
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from steps import BASELINES, CASES, trainer_step
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from transformers.trainer_callback import ExportableState
from trl import TrlParser

from camopd import CaMOPDConfig, CaMOPDTrainer
from camopd import setting_rules as rules


ROOT = Path(__file__).parents[1]
ROW = re.compile(r"^\| `(\w+)` \| (honoured|in part|refused|no effect) \|(.*?)\|(.*)\|$")
SECTION = re.compile(r"^## (.*)$")
LATER = later_settings()

# For each refused setting a value that is refused, and for one that is refused in part the part.
REFUSED = {
    "num_iterations": 2, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1,
    "vllm_structured_outputs_regex": "a*", "beta": 0.5, "label_smoothing_factor": 0.1, "neftune_noise_alpha": 5.0,
    "teacher_model_name_or_path": "a/b", "teacher_model_revision": "main", "auto_find_batch_size": True,
    "remove_unused_columns": True, "ignore_data_skip": True, "num_train_epochs": 3.0, "save_strategy": "epoch",
    "eval_strategy": "epoch", "logging_strategy": "epoch", "train_sampling_strategy": "group_by_length",
    "dataloader_in_order": False, "dataloader_drop_last": True, "fp16": True, "bf16_full_eval": True,
    "fp16_full_eval": True, "torch_compile": True, "torch_compile_mode": "default", "torch_compile_backend": "eager",
    "use_liger_kernel": True, "liger_kernel_config": {"rope": True}, "pad_to_multiple_of": 8,
    "include_for_metrics": ["loss"], "eval_use_gather_object": True, "include_num_input_tokens_seen": "all",
    "hub_token": "hf_secret", "ddp_static_graph": True, "optim": "adalomo", "debug": "tpu_metrics_debug",
    "model_init_kwargs": {"tp_plan": "auto"}, "parallelism_config": ParallelismConfig(tp_size=2),
    "activation_checkpointing_kwargs": {"every_n_layers": 2}, "gradient_checkpointing_kwargs": {"offload": True},
    "accelerator_config": {"split_batches": True}, "generation_kwargs": {"top_p": 0.9},
    "lr_scheduler_kwargs": {"num_cycles": 2}, "optim_args": "momentum=0.9", "warmup_steps": 500,
    "metric_for_best_model": "eval_perplexity",
    "greater_is_better": True, "cache_implementation": "quantized", "load_best_model_at_end": True,
    "gradient_accumulation_steps": 3, "completion_lengths": {0: 8, 1: 16}, "enable_jit_checkpoint": True,
}  # fmt: skip
PARTS = [
    ("accelerator_config", {"dispatch_batches": True}), ("accelerator_config", {"even_batches": False}),
    ("accelerator_config", {"gradient_accumulation_kwargs": {"num_steps": 4}}),
    ("train_sampling_strategy", "sequential"), ("include_num_input_tokens_seen", True), ("optim", "lomo"),
    ("model_init_kwargs", {"distributed_config": {"tp_size": 2}}),
    ("parallelism_config", ParallelismConfig(cp_size=2)), ("parallelism_config", ParallelismConfig(sp_size=2)),
]  # fmt: skip
NO_EFFECT = {
    "average_tokens_across_devices": False, "use_cache": True, "prediction_loss_only": True, "batch_eval_metrics": True,
    "eval_do_concat_batches": False, "eval_accumulation_steps": 2, "label_names": ["labels"],
    "length_column_name": "n", "do_train": True, "do_eval": True, "do_predict": True, "local_rank": 0,
    "dataloader_pin_memory": False,
}  # fmt: skip
# DeepSpeed configs with sections that are taken instead of settings.
OWN_OPTIMIZER, OWN_SCHEDULER = (
    {
        "deepspeed": {
            "zero_optimization": {"stage": 2}, section: {"type": kind, "params": dict.fromkeys(names.split(), "auto")},
            **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto"),
        }
    }
    for section, kind, names in (
        ("optimizer", "AdamW", "lr betas eps weight_decay"),
        ("scheduler", "WarmupLR", "warmup_min_lr warmup_max_lr warmup_num_steps"),
    )
)  # fmt: skip
# Settings that another one must allow: its value, and the setting without which it has no effect.
NEEDS = {
    "eval_steps": (5, {}), "eval_delay": (2, {}), "save_steps": (7, {"save_strategy": "no"}),
    "logging_steps": (3, {"logging_strategy": "no"}), "hub_strategy": ("end", {}), "hub_always_push": (True, {}),
    "run_name": ("mine", {}), "project": ("mine", {}), "trackio_space_id": ("me/space", {}),
    "trackio_bucket_id": ("me/bucket", {}), "trackio_static_space_id": ("me/static", {}),
    "log_completions": (True, {"logging_strategy": "no"}), "eval_tasks_items": (3, {}),
    "ds3_gather_for_generation": (False, {}),
    "num_completions_to_print": (3, {}), "log_unique_prompts": (True, {"log_completions": True}),
    "activation_checkpointing_kwargs": ({"use_reentrant": True}, {"gradient_checkpointing": False}),
    "gradient_checkpointing_kwargs": ({"use_reentrant": True}, {"gradient_checkpointing": False}),
    "adam_beta1": (0.8, {"optim": "sgd"}), "adam_beta2": (0.8, {"optim": "adafactor"}),
    "adam_epsilon": (1e-6, {"optim": "lion_8bit"}), "optim_args": ("momentum=0.9", {"optim": "lion_8bit"}),
    "optim_target_modules": ("all-linear", {}), "optim": ("sgd", OWN_OPTIMIZER),
    "lr_scheduler_type": ("cosine", OWN_SCHEDULER),
    "lr_scheduler_kwargs": ({"num_cycles": 0.4}, {"lr_scheduler_type": "cosine", **OWN_SCHEDULER}),
    "weight_decay": (0.1, {"optim": "galore_adamw"}),
    "fsdp_config": ({"version": 2}, {}),
    "vllm_mode": ("server", {}), "vllm_model_impl": ("transformers", {}), "vllm_enable_sleep_mode": (True, {}),
    "vllm_gpu_memory_utilization": (0.5, {"use_vllm": True, "vllm_mode": "server"}), "vllm_max_model_length": (512, {}),
    "vllm_tensor_parallel_size": (2, {"use_vllm": True, "vllm_mode": "server"}),
    "vllm_server_base_url": ("http://host:1", {"use_vllm": True}), "vllm_server_timeout": (9.0, {"use_vllm": True}),
    "vllm_group_port": (9, {"use_vllm": True}), "cache_implementation": ("static", {"use_vllm": True}),
    "vllm_server_host": ("host", {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": "http://host:1"}),
    "vllm_server_port": (9, {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": "http://host:1"}),
    "data_seed": (3, {"shuffle_dataset": False}), "importance_sampling_low": (0.1, {"importance_sampling_mode": "none"}),
    "importance_sampling_high": (9.0, {"divergence": "top_k"}), "relaxed_mixture": (0.2, {}),
    "importance_sampling_mode": ("truncate", {}),
    "relaxed_entropy_share": (0.5, {}), "relaxed_exploration_steps": (3, {"token_rule": "selectkd"}),
    "selectkd_reject_weight": (0.5, {"token_rule": "relaxed_opd"}), "mass_target": (0.5, {"selection": False}),
    "score": ("positive", {"selection": False}),
    "divergence_top_k": (5, {}), "optimizer_moments": ("per_branch", {"schedule": "general:1+domain:1"}),
    "max_grad_norm": (0.3, OWN_OPTIMIZER), "loss_prefix_tokens": (64, {"max_completion_length": 64}),
    "student_logps": ("auto", {"disable_dropout": False}),
    "trust_checkpoint": (True, {}),
}  # fmt: skip


def make_config(folder, **values) -> CaMOPDConfig:
    return CaMOPDConfig(**{"output_dir": str(folder), "use_cpu": True, "bf16": False, **values})


def warned(caplog) -> list[str]:
    """The settings that camopd has said to be without effect."""
    records = [record for record in caplog.records if record.name == "camopd.setting_rules"]
    return [record.args[0] for record in records]


# ------------------------------------------------------------------------------------------------------- the table


def table() -> dict[str, dict[str, tuple[str, list[str], str]]]:
    """docs/settings.md: section -> setting -> what happens to it, the tests that show it, the note."""
    found, section = {}, ""
    for line in (ROOT / "docs" / "settings.md").read_text().splitlines():
        if heading := SECTION.match(line):
            section = heading[1]
        elif row := ROW.match(line):
            rows = found.setdefault(section, {})
            assert row[1] not in rows, f"{row[1]} stands twice"
            rows[row[1]] = (row[2], re.findall(r"`(tests/[\w./]+::\w+)`", row[3]), row[4])
        else:
            assert not line.startswith("| `"), line
    return found


def rows_of_config() -> dict[str, tuple[str, list[str], str]]:
    return {name: row for section, rows in table().items() if "arguments" not in section for name, row in rows.items()}


def test_table_has_a_row_for_every_setting_and_argument_and_no_other():
    assert set(rows_of_config()) - LATER == {field.name for field in dataclasses.fields(CaMOPDConfig)}
    arguments = next(rows for section, rows in table().items() if "arguments" in section)
    parameters = inspect.signature(CaMOPDTrainer).parameters.values()
    assert set(arguments) == {parameter.name for parameter in parameters if parameter.kind != parameter.VAR_KEYWORD}
    for name in arguments:
        assert name in CaMOPDTrainer.__doc__


def test_setting_that_is_honoured_names_tests_that_exist_and_know_it():
    functions: dict[str, dict[str, str]] = {}
    for rows in table().values():
        for name, (status, tests, _) in rows.items():
            assert bool(tests) == (status in ("honoured", "in part")), name
            for test in tests:
                file, function = test.split("::")
                if file not in functions:
                    source = (ROOT / file).read_text()
                    functions[file] = {
                        node.name: source for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)
                    }
                assert function in functions[file], f"{name}: {test} does not exist"
                helpers = (ROOT / "tests" / "steps.py").read_text() + (ROOT / "tests" / "train_tiny.py").read_text()
                text = functions[file][function] + helpers
                assert re.search(rf"\b{name}\b", text), f"{name}: {test} is in a file that never names it"


def test_examples_are_those_of_the_table():
    rows = rows_of_config()
    assert set(REFUSED) == {name for name, (status, *_) in rows.items() if status in ("refused", "in part")}
    assert set(NO_EFFECT) == {name for name, (status, *_) in rows.items() if status == "no effect"}
    of_rules = {name for names, *_ in rules.REFUSED for name in names.split()}
    of_rules |= {name for names, *_ in rules.REFUSED_PARTS for name in names.split()}
    assert {name.partition(".")[0] for name in of_rules} <= set(REFUSED)
    assert set(NEEDS) == {name for need in rules.NEEDS for name in need.names.split()}


@pytest.mark.parametrize(
    ("name", "value"), [*[each for each in REFUSED.items() if each[0] not in LATER], *PARTS],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_refused_setting_is_refused(name, value, tmp_path):
    with pytest.raises(ValueError) as refused:
        make_config(tmp_path, **{name: value})
    message = str(refused.value)
    told = {
        "torch_compile_backend": "torch_compile",
        **({} if LATER else {"gradient_checkpointing_kwargs": "activation_checkpointing_kwargs"}),
    }
    assert told.get(name, name) in message
    way_out = (
        r"[Ll]eave .* (out|at)|Leave (the|them)|Lower|Did you mean|Set (both|metric_for)|may be set|give the schedule"
    )
    assert re.search(way_out, message), message


@pytest.mark.parametrize("name", NO_EFFECT)
def test_setting_without_effect_is_warned_of(name, tmp_path, caplog, monkeypatch):
    if name == "dataloader_pin_memory":  # which a CPU does not have at all
        monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    config = make_config(tmp_path, use_cpu=name != "dataloader_pin_memory", **{name: NO_EFFECT[name]})
    assert warned(caplog) == [name]
    caplog.clear()
    again = {"use_cpu": config.use_cpu, name: getattr(CaMOPDConfig, name, None)}
    make_config(tmp_path, **again)
    assert warned(caplog) == []


@pytest.mark.parametrize("name", [name for name in NEEDS if name not in LATER])
def test_setting_that_another_one_must_allow_is_warned_of_without_it(name, tmp_path, caplog):
    value, others = NEEDS[name]
    make_config(tmp_path, **others)
    before = warned(caplog)
    caplog.clear()
    make_config(tmp_path, **others, **{name: value})
    new = set(warned(caplog)) - set(before)
    assert name in new or name in before
    both = {"activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"}
    assert new <= {name} | (both if name in both else set())


def test_guards_that_nothing_is_there_for_are_warned_of_where_they_are_set(tmp_path, caplog):
    for given, settings, names in (
        ({"entropy": 0.5}, {"student_logps": "engine"}, ["guards['entropy']"]),
        ({"entropy": 0.5}, {"student_logps": "engine", "token_rule": "relaxed_opd"}, []),
        ({"entropy": 0.5, "outside_band": None}, {}, []),
        ({"outside_band": 0.2}, {}, ["guards['outside_band']"]),
        ({"outside_band": 0.2}, {"student_logps": "engine"}, []),
        ({"outside_band": 0.2}, {"student_logps": "engine", "divergence": "full"}, ["guards['outside_band']"]),
        ({"outside_band": 0.2}, {"use_vllm": True, "importance_sampling_mode": "none"}, ["guards['outside_band']"]),
    ):
        make_config(tmp_path, guards=given, **settings)
        assert [name for name in warned(caplog) if name.startswith("guards")] == names, (given, settings)
        caplog.clear()


def test_trust_in_a_checkpoint_is_not_warned_of_under_fsdp(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    make_config(tmp_path, trust_checkpoint=True)
    assert "trust_checkpoint" not in warned(caplog)


@pytest.mark.parametrize("optim", ["galore_adamw", "grokadamw"])
def test_adam_settings_that_transformers_passes_on_to_none_are_warned_of(optim, tmp_path, caplog):
    make_config(tmp_path, optim=optim, adam_beta1=0.5, adam_beta2=0.9, adam_epsilon=1e-6)
    assert warned(caplog) == ["adam_beta1", "adam_beta2", "adam_epsilon"]


def test_deepspeeds_own_scheduler_and_optimizer_are_not_spoken_for(tmp_path, caplog):
    assert make_config(tmp_path, warmup_steps=3, **OWN_SCHEDULER).lr_scheduler_type == "constant"  # it warms up itself
    assert warned(caplog) == []
    with pytest.raises(ValueError, match=r"optimizer_moments='per_branch' .*Take 'optimizer' out"):
        make_config(tmp_path, optimizer_moments="per_branch", **OWN_OPTIMIZER)


@pytest.mark.parametrize(
    ("optim", "optim_args", "said"),
    [
        ("sgd", "momentun=0.9", "'momentun', which would not reach optim='sgd'. There are ['momentum'"),
        ("sgd", "momentum=0.9, weight_decay=0.1", "'weight_decay', which .* Set weight_decay itself"),
        ("adamw_torch_8bit", "bf16_stochastic_rounding=True", "There are ['block_size', 'bf16_stochastic_round']"),
        ("apollo_adamw", "rank=3,update_gap=2", "'update_gap'"),
        ("schedule_free_sgd", "momentum=0.9", "There are ['weight_lr_power', 'r']"),
        ("rmsprop", "alpha", "has 'alpha'. Write it as name=value"),
    ],
)
def test_part_of_optim_args_that_reaches_no_optimizer_is_refused(optim, optim_args, said, tmp_path):
    with pytest.raises(ValueError, match=re.escape(said).replace(r"\.\*", ".*")):
        make_config(tmp_path, optim=optim, optim_args=optim_args)


def parts_of_optim_args(folder, caplog, optim) -> set[str] | None:
    """Those that a config takes for an optimizer, by what it says of another one; `None` where it takes any."""
    caplog.clear()
    try:
        make_config(folder, optim=optim, optim_args="no_such_part=1")
    except ValueError as error:
        found = re.search(
            r"There are (\[.*?\])|takes none|^optim='(?:a?d?a?lomo|\w+_layerwise)'", str(error)
        )  # the last is refused itself
        return set(ast.literal_eval(found[1] or "[]"))
    return set() if "optim_args" in warned(caplog) else None


def test_parts_of_optim_args_are_those_that_transformers_reads(tmp_path, caplog):
    """Of its source, for every optimizer that reads any."""
    import transformers.trainer_optimizer as source

    for name, handler in source._OPTIMIZER_HANDLERS.items():
        pattern = r"""(?:get|pop)\("(\w+)|"(\w+)" in ctx\.optim_args|for key in \(([^)]*)\)"""
        read = re.findall(pattern, inspect.getsource(handler))
        if name.value.endswith("_layerwise"):  # refused itself
            continue
        names = {word for found in read for word in re.findall(r"\w+", "".join(found))} - {"weight_decay"}
        allowed = parts_of_optim_args(tmp_path, caplog, name.value)
        if allowed is not None:
            optional = names if "bitsandbytes" in handler.__name__ and not allowed else set()
            assert names - optional == allowed, name


def test_parts_of_the_accelerator_config_without_effect_are_warned_of(tmp_path, caplog):
    make_config(tmp_path, accelerator_config={"non_blocking": True, "use_seedable_sampler": False})
    assert warned(caplog) == ["accelerator_config.non_blocking", "accelerator_config.use_seedable_sampler"]


def test_defaults_and_the_shipped_files_are_not_warned_of(tmp_path, caplog):
    make_config(tmp_path)
    known = {field.name for field in dataclasses.fields(CaMOPDConfig)}
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        if path.parent.name in ("accelerate", "sweeps"):
            continue
        values = {name: value for name, value in yaml.safe_load(path.read_text()).items() if name in known}
        make_config(tmp_path, **values)
        assert warned(caplog) == [], path


def test_defaults_given_by_hand_are_not_warned_of(tmp_path, caplog):
    fields = [field for field in dataclasses.fields(CaMOPDConfig) if field.init]
    values = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
    mine = ("use_cpu", "output_dir", "bf16")
    make_config(tmp_path, **{name: value for name, value in values.items() if name not in mine})
    assert warned(caplog) == []


@pytest.mark.parametrize("way", ["replace", "to_dict", "yaml"])
def test_copy_of_a_config_is_not_refused_and_not_warned_of(way, tmp_path, caplog):
    config = make_config(
        tmp_path, eval_strategy="steps", eval_steps=4, save_strategy="steps", save_steps=4,
        max_completion_length={0: 8, 4: 16}, max_steps=8, prompts_per_step=8, report_to="none", seed=7,
        accelerator_config={"dispatch_batches": False}, gradient_checkpointing_kwargs={"use_reentrant": False},
        teachers={"general": "http://host:1", "domain": "adapter_off"},
    )  # fmt: skip
    if way == "replace":
        again = dataclasses.replace(config)
    elif way == "to_dict":
        again = CaMOPDConfig(**config.to_dict())
    else:
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(json.loads(config.to_json_string())))
        (again,) = TrlParser(CaMOPDConfig).parse_args_and_config(["--config", str(path)])
    assert warned(caplog) == []
    assert again.to_dict() == config.to_dict()


def test_launcher_that_splits_a_replica_or_compiles_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_TP_SIZE", "2")
    with pytest.raises(ValueError, match=r"parallelism_config\.tp_size=2 .*each rank gets prompts of its own"):
        make_config(tmp_path)
    state = types.SimpleNamespace(dynamo_plugin=types.SimpleNamespace(backend=types.SimpleNamespace(value="INDUCTOR")))
    accelerator = types.SimpleNamespace(parallelism_config=None, state=state, mixed_precision="bf16")
    with pytest.raises(ValueError, match=r"dynamo_backend=inductor .*Take dynamo_config out"):
        rules.refuse_of_accelerator(accelerator, 1)
    with pytest.raises(ValueError, match="a student in 2 parts"):
        rules.refuse_of_accelerator(accelerator, 2)


@pytest.mark.parametrize(
    ("launched", "bf16", "says"),
    [
        ("fp16", False, r"mixed_precision=fp16 .*Set bf16=True, or launch with --mixed_precision no"),
        ("bf16", False, r"mixed_precision=bf16 .* would win over bf16=False.*Launch with --mixed_precision no"),
    ],
)
def test_precision_of_a_launcher_that_is_not_the_configs_is_refused(launched, bf16, says, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)  # as `accelerate launch` sets it
    with pytest.raises(ValueError, match=says):
        make_trainer(tmp_path, bf16=bf16)


# ---------------------------------------------------------------------------------------------- one run, many settings


TEMPLATE = (
    "{{ tag }}{% for message in messages %}{{ message['role'][0] + ' ' + message['content'] + '.' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a ' }}{% endif %}"
)
MANY = {
    "max_steps": 6, "prompts_per_step": 4, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 3,
    "max_completion_length": 6, "max_prompt_length": 64, "schedule": "general:1,domain:1",
    "learning_rate": 1e-2, "warmup_steps": 2,
    "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 4e-3},
    "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6, "weight_decay": 0.125,
    "logging_steps": 2, "logging_first_step": True, "save_steps": 2, "save_total_limit": 2,
    "eval_strategy": "steps", "eval_steps": 2, "eval_delay": 3, "eval_on_start": True,
    "load_best_model_at_end": True, "metric_for_best_model": "eval_general_kl", "greater_is_better": False,
    "report_to": ["trackio"], "run_name": "the-run", "project": "the-project", "trackio_space_id": "me/space",
    "trackio_bucket_id": "me/bucket", "trackio_static_space_id": "me/static", "hub_private_repo": True,
    "log_completions": True, "num_completions_to_print": 1, "log_unique_prompts": True,
    **{name.replace("activation", "gradient") if name in LATER else name: value for name, value in (
        ("activation_checkpointing", True), ("activation_checkpointing_kwargs", {"use_reentrant": True}),
    )},
    "torch_empty_cache_steps": 2, "skip_memory_metrics": False, "disable_tqdm": True, "verbose": True, "seed": 7,
    "chat_template_kwargs": {"tag": "zzz"}, "cache_implementation": "static", "max_tool_calling_iterations": 3,
    "dataloader_num_workers": 1, "dataloader_prefetch_factor": 3, "dataloader_persistent_workers": True,
    "dataloader_multiprocessing_context": "fork",
    "accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}},
    "ddp_find_unused_parameters": True, "ddp_bucket_cap_mb": 3, "ddp_broadcast_buffers": False,
}  # fmt: skip


class Counter(TrainerCallback, ExportableState):
    """Counts steps, and travels in checkpoints."""

    def __init__(self, steps=0):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1

    def state(self):
        return {"args": {"steps": self.steps}, "attributes": {}}


class Stage(list):
    """What a fake package is told: (function, arguments)."""

    def teller(self, name):
        def tell(*args, **kwargs):
            self.append((name, args, kwargs))

        return tell

    def of(self, name):
        return [(args, kwargs) for told, args, kwargs in self if told == name]


def fake_trackio(told: Stage):
    """The package, as far as transformers and TRL use it."""
    package = types.ModuleType("trackio")
    package.__spec__ = importlib.machinery.ModuleSpec("trackio", None)
    package.__version__ = "0.99"
    for name in ("init", "log", "finish", "freeze", "sync", "Table"):
        setattr(package, name, told.teller(name))
    package.config = type("Config", (dict,), {"update": lambda self, *args, **kwargs: None})()
    current = lambda value: types.SimpleNamespace(get=lambda: value)  # noqa: E731
    package.context_vars = types.SimpleNamespace(
        current_space_id=current("me/space"), current_project=current("the-project"), current_run=current(None)
    )
    return package


def conversations(branch, count):
    rows = [{"prompt": [{"role": "user", "content": f"{branch} {index}"}]} for index in range(count)]
    return Dataset.from_list(rows)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A run with MANY settings: the trainer, and what was seen of them."""
    folder = tmp_path_factory.mktemp("many")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    seen = types.SimpleNamespace(
        told=Stage(), checkpoints=[], printed=[], emptied=[], eval_rows=[], caches=set(), folder=folder, clips=[]
    )
    with pytest.MonkeyPatch.context() as patch:
        package = fake_trackio(seen.told)
        patch.setitem(sys.modules, "trackio", package)
        patch.setattr("trl.extras.profiling.trackio", package, raising=False)
        checkpoint = torch.utils.checkpoint.checkpoint

        def spy(function, *args, **kwargs):
            seen.checkpoints.append(kwargs.get("use_reentrant"))
            return checkpoint(function, *args, **kwargs)

        patch.setattr("transformers.modeling_utils.checkpoint", spy)
        patch.setattr("transformers.trainer.clear_device_cache", lambda: seen.emptied.append(True))
        patch.setattr(
            "camopd.callbacks.completions.print_prompt_completions_sample",
            lambda *args, **kwargs: seen.printed.append(args),
        )
        measure = CaMOPDTrainer.prediction_step
        patch.setattr(
            CaMOPDTrainer, "prediction_step",
            lambda self, model, inputs, *args, **kwargs: (
                seen.eval_rows.append(len(inputs)), measure(self, model, inputs, *args, **kwargs)
            )[1],
        )  # fmt: skip
        model = make_model(1)
        model.model.register_forward_pre_hook(
            # The latter is its name below transformers 5.24.
            lambda module, args, kwargs: seen.caches.add(
                type(kwargs.get("cache", kwargs.get("past_key_values"))).__name__
            ),
            with_kwargs=True,
        )
        counter = Counter()
        trainer = CaMOPDTrainer(
            model=model,
            teachers={"general": make_model(2), "domain": make_model(3)},
            args=make_config(folder, **MANY),
            train_dataset={branch: conversations(branch, 3) for branch in ("general", "domain")},
            eval_dataset={"general": conversations("general", 4)},
            processing_class=tokenizer,
            callbacks=[counter],
        )
        seen.result = trainer.train()
    return trainer, seen


def logged(trainer, key):
    return {entry["step"]: entry[key] for entry in trainer.state.log_history if key in entry}


def test_adam_and_weight_decay_reach_the_optimizer(many):
    trainer, _ = many
    groups = trainer.optimizer.param_groups
    assert {(group["betas"], group["eps"]) for group in groups} == {((0.8, 0.95), 1e-6)}
    assert sorted({group["weight_decay"] for group in groups}) == [0.0, 0.125]


def test_learning_rate_follows_its_schedule(many):
    trainer, _ = many
    rates = logged(trainer, "learning_rate")
    assert (rates[1], rates[2]) == (0.0, 5e-3)  # warmup_steps
    for step in (4, 6):  # cosine from learning_rate to min_lr over the four steps that are left
        cosine = (1 + math.cos((step - 3) / 4 * math.pi)) / 2
        assert rates[step] == pytest.approx(4e-3 + (1e-2 - 4e-3) * cosine)


def test_logs_evaluations_and_checkpoints_come_when_they_should(many):
    trainer, seen = many
    assert sorted(logged(trainer, "loss")) == [1, 2, 4, 6]  # logging_first_step, logging_steps
    assert sorted(logged(trainer, "eval_general_kl")) == [0, 4, 6]  # eval_on_start, eval_delay, eval_steps
    assert sorted(path.name for path in seen.folder.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert seen.eval_rows == [3, 1] * 3  # per_device_eval_batch_size, of 4 rows
    assert len((seen.folder / "metrics.jsonl").read_text().splitlines()) == 6


def test_best_checkpoint_is_kept(many):
    """`load_best_model_at_end`, by `metric_for_best_model` and `greater_is_better`."""
    trainer, seen = many
    measured = {step: value for step, value in logged(trainer, "eval_general_kl").items() if step > 0}
    best = min(measured, key=measured.get)
    assert trainer.state.best_metric == measured[best]
    weights = load_file(seen.folder / f"checkpoint-{best}" / "model.safetensors")
    assert all(torch.equal(trainer.model.state_dict()[name], value) for name, value in weights.items())


def test_runs_are_reported_as_trackio_is_told(many):
    _, seen = many
    ((_, init),) = seen.told.of("init")
    assert init == {
        "project": "the-project", "name": "the-run", "space_id": "me/space", "resume": "allow", "private": True,
        "bucket_id": "me/bucket",
    }  # fmt: skip
    ((_, freeze),) = seen.told.of("freeze")
    assert freeze["new_space_id"] == "me/static"
    names = {name for args, _ in seen.told.of("log") for name in args[0]}
    assert {"train/gap/general/mean", "eval/general_kl"} <= names


def test_completions_are_logged_and_printed_as_asked(many):
    _, seen = many
    assert (seen.folder / "completions" / "completions_00006.parquet").is_file()
    assert {args[5] for args in seen.printed} == {1}  # num_completions_to_print
    frames = [kwargs["dataframe"] for _, kwargs in seen.told.of("Table")]
    assert frames and all(frame["prompt"].is_unique for frame in frames)  # log_unique_prompts, of 4 from 3 prompts


def test_chat_template_kwargs_reach_the_template(many):
    import pandas as pd

    _, seen = many
    prompts = pd.read_parquet(seen.folder / "completions" / "completions_00006.parquet")["prompt"]
    assert all(prompt.replace(" ", "").startswith("zzz") for prompt in prompts)


def test_activation_checkpointing_is_on_in_every_backward(many):
    _, seen = many
    # Two layers in each of the micro-batches that had samples, after generation has switched it off and on again.
    assert len(seen.checkpoints) >= 2 * 6
    assert set(seen.checkpoints) == {True}


def test_cache_and_its_emptying_are_as_asked(many):
    trainer, seen = many
    assert "StaticCache" in seen.caches  # cache_implementation
    assert 3 <= len(seen.emptied) <= 6  # micro-batches of steps 0, 2 and 4
    assert trainer.max_tool_calling_iterations == 3
    assert CaMOPDTrainer._tool_call_loop is CaMOPDTrainer.__mro__[1]._tool_call_loop


def test_memory_is_measured_and_progress_is_printed_as_asked(many):
    trainer, seen = many
    assert any(name.startswith("train_mem_cpu") for name in seen.result.metrics)  # skip_memory_metrics
    names = {type(callback).__name__ for callback in trainer.callback_handler.callbacks}
    assert "PrinterCallback" in names and "ProgressCallback" not in names  # disable_tqdm, verbose


def test_workers_of_the_data_loaders_are_as_asked(many):
    trainer, _ = many
    for loader in (trainer.get_train_dataloader(), trainer.get_eval_dataloader("general")):
        assert (loader.num_workers, loader.prefetch_factor, loader.persistent_workers) == (1, 3, True)
        assert type(loader.multiprocessing_context).__name__ == "ForkContext"


def test_data_parallel_settings_reach_accelerate(many):
    trainer, _ = many
    handler = trainer.accelerator.ddp_handler
    names = ("find_unused_parameters", "bucket_cap_mb", "broadcast_buffers")
    assert tuple(getattr(handler, name) for name in names) == (True, 3, False)
    assert trainer.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] is True


def test_callback_is_called_and_its_state_is_restored(many, tmp_path):
    """`restore_callback_states_from_checkpoint`, in a run that goes on from a checkpoint of the first."""
    _, seen = many
    for restore, expected in ((True, 6), (False, 2)):
        counter = Counter()
        small = {name: value for name, value in MANY.items() if not name.startswith(("trackio", "dataloader", "log_"))}
        tokenizer = make_tokenizer()
        tokenizer.chat_template = TEMPLATE
        again = CaMOPDTrainer(
            model=make_model(1), teachers={"general": make_model(2), "domain": make_model(3)},
            args=make_config(
                tmp_path / str(restore),
                **{
                    **small, "report_to": "none", "run_name": None, "project": "huggingface", "save_strategy": "no",
                    "save_steps": 500, "num_completions_to_print": None, "eval_on_start": False,
                    "eval_strategy": "no", "load_best_model_at_end": False, "metric_for_best_model": None,
                    "greater_is_better": None, "skip_memory_metrics": True,
                    "restore_callback_states_from_checkpoint": restore,
                },
            ),
            train_dataset={branch: conversations(branch, 3) for branch in ("general", "domain")},
            processing_class=tokenizer, callbacks=[counter],
        )  # fmt: skip
        again.train(resume_from_checkpoint=str(seen.folder / "checkpoint-4"))
        counters = [found for found in again.callback_handler.callbacks if isinstance(found, Counter)]
        assert [found.steps for found in counters] == [expected]


# --------------------------------------------------------------------------------------------------------- small runs


def make_trainer(folder, **given) -> CaMOPDTrainer:
    arguments = {name: given.pop(name) for name in list(given) if name in inspect.signature(CaMOPDTrainer).parameters}
    defaults = {
        "model": make_model(1), "teachers": {"general": make_model(2), "domain": make_model(3)},
        "train_dataset": {branch: make_prompts(branch) for branch in ("general", "domain")},
        "processing_class": make_tokenizer(),
    }  # fmt: skip
    settings = {
        "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "gradient_checkpointing": False,
        "max_steps": 2, "prompts_per_step": 4, "per_device_train_batch_size": 2, "max_completion_length": 6,
        "max_prompt_length": 64, "learning_rate": 1e-2, "schedule": "general:1,domain:1",
    }  # fmt: skip
    return CaMOPDTrainer(**{**defaults, **arguments}, args=make_config(folder, **{**settings, **given}))


def test_log_without_the_filter_shows_that_a_loss_is_no_number(tmp_path, monkeypatch):
    """`logging_nan_inf_filter`, and checkpoints of the model alone."""
    step = CaMOPDTrainer.training_step
    monkeypatch.setattr(CaMOPDTrainer, "training_step", lambda *args, **kwargs: step(*args, **kwargs) * float("nan"))

    class SwitchOff(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            args.logging_nan_inf_filter = False

    trainer = make_trainer(
        tmp_path, callbacks=[SwitchOff()], save_strategy="steps", save_steps=1, save_only_model=True,
        save_on_each_node=True, log_on_each_node=False,
    )  # fmt: skip
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[1] == 0.0 and losses[2] != losses[2]
    files = {path.name for path in (tmp_path / "checkpoint-1").iterdir()}
    assert "model.safetensors" in files and not {"optimizer.pt", "scheduler.pt"} & files
    # Who writes and who logs, on a second machine: the first process of it.
    state = trainer.args.distributed_state
    monkeypatch.setattr(state, "process_index", 8)
    assert (trainer.args.should_save, trainer.args.should_log) == (True, False)


def test_optimizer_that_is_passed_is_observed_as_one_of_the_trainer(tmp_path):
    expected = make_trainer(tmp_path / "own", optim="adamw_torch")
    expected.train()
    model = make_model(1)
    given = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    trainer = make_trainer(tmp_path / "given", model=model, optimizers=(given, None), learning_rate=1e-2)
    trainer.train()
    for folder in ("own", "given"):
        lines = (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        assert all(0 < step["update/cosine"] <= 1 for step in found)
        assert "conflict/general/domain/cosine" in found[1] or any(name.startswith("conflict/") for name in found[1])
    assert trainer.step.metrics["update/cosine"] == pytest.approx(expected.step.metrics["update/cosine"], abs=1e-5)
    own = expected.model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in trainer.model.state_dict().items())


def test_optimizers_that_would_do_nothing_are_refused(tmp_path):
    model, other = make_model(1), make_model(1)
    optimizer = torch.optim.AdamW(other.parameters())
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.raises(ValueError, match="a ConstantLR of an optimizer that is not the run's"):
        make_trainer(tmp_path, optimizers=(None, scheduler))
    with pytest.raises(ValueError, match="AdamW of optimizers= holds none of the student's trained weights"):
        make_trainer(tmp_path, model=model, optimizers=(optimizer, None))
    with pytest.raises(ValueError, match="holds none of the student's trained weights"):
        make_trainer(
            tmp_path, model=model, optimizers=(torch.optim.AdamW(model.lm_head.parameters()), None),
            peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
        )  # fmt: skip
    with pytest.raises(ValueError, match="quantization_config=object would do nothing: the model is loaded already"):
        make_trainer(tmp_path, quantization_config=object())


def test_settings_of_an_optimizer_and_scheduler_that_are_passed_are_warned_of(tmp_path, caplog):
    model = make_model(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = make_trainer(
        tmp_path, model=model, optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer)),
        adam_beta1=0.5, max_tool_calling_iterations=2, teacher_model_init_kwargs={"dtype": "bfloat16"},
    )  # fmt: skip
    assert {"adam_beta1", "max_tool_calling_iterations", "teacher_model_init_kwargs"} == set(warned(caplog))
    assert trainer.optimizer is optimizer


@pytest.mark.parametrize("disable", [True, False])
def test_dropout_of_an_adapter_that_the_student_has_already_is_off_or_on_as_well(disable, tmp_path, caplog):
    config = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False)
    make_trainer(tmp_path, model=get_peft_model(make_model(1), config), disable_dropout=disable)
    assert ("lora_dropout" in warned(caplog)) == disable


@pytest.mark.parametrize("disable", [True, False])
def test_dropout_is_off_or_on_in_the_loss(disable, tmp_path, caplog):
    """Attention's dropout is a rate of its module and no `torch.nn.Dropout`; LoRA's is one."""
    config = LlamaConfig(**{**make_model(1).config.to_dict(), "attention_dropout": 0.5})
    torch.manual_seed(0)
    trainer = make_trainer(
        tmp_path, model=LlamaForCausalLM(config), disable_dropout=disable,
        peft_config=LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False),
    )  # fmt: skip
    assert ("lora_dropout" in warned(caplog)) == disable
    trainer.model.train()
    first, second = (trainer.student.logps([[1, 5, 6, 7, 8, 9]], [2])[0] for _ in range(2))
    assert torch.equal(first, second) == disable
    assert trainer.model.config.attention_dropout == 0.5  # as it will be saved


def test_data_seed_and_shuffling_decide_the_order_of_the_prompts(tmp_path):
    def prompts(**settings):
        trainer = make_trainer(tmp_path, **settings)
        return [row["prompt"] for step in range(2) for row in trainer.train_dataset.rows_of(step)]

    of_files = [make_prompts(branch)[index]["prompt"] for branch in ("general", "domain") for index in range(4)]
    assert prompts(shuffle_dataset=False) == of_files
    assert prompts(seed=3) != prompts(seed=4)
    assert prompts(seed=3, data_seed=4) == prompts(seed=4)


def test_streams_are_read_without_workers_and_it_is_said(tmp_path, caplog):
    streams = {branch: make_prompts(branch).to_iterable_dataset() for branch in ("general", "domain")}
    settings = {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 2, "dataloader_persistent_workers": True}
    trainer = make_trainer(tmp_path, train_dataset=streams, **settings)
    assert "dataloader_num_workers" in warned(caplog)
    loader = trainer.get_train_dataloader()
    assert (loader.num_workers, loader.prefetch_factor) == (0, None)


def test_model_and_teacher_by_name_get_their_arguments(tmp_path, monkeypatch):
    """`model_init_kwargs`, `teacher_model_init_kwargs`, `trust_remote_code`, `quantization_config`."""
    for seed, name in ((1, "student"), (2, "teacher")):
        make_model(seed).save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    from trl.trainer import distillation_trainer as parent

    from camopd.teachers import resolve

    loaded, create, quantized = [], parent.create_model_from_path, object()

    def record(path, **kwargs):
        assert kwargs.pop("quantization_config") is quantized
        loaded.append(kwargs.pop("trust_remote_code"))
        return create(path, **kwargs)

    monkeypatch.setattr(parent, "create_model_from_path", record)
    load_teacher = resolve.load_teacher_model

    def record_teacher(spec, init_kwargs, branch):
        loaded.append(init_kwargs["trust_remote_code"])
        return load_teacher(spec, {**init_kwargs, "trust_remote_code": False}, branch)

    monkeypatch.setattr(resolve, "load_teacher_model", record_teacher)
    trainer = make_trainer(
        tmp_path, model=str(tmp_path / "student"), teachers={"general": str(tmp_path / "teacher"), "domain": make_model(3)},
        model_init_kwargs={"attn_implementation": "eager"}, teacher_model_init_kwargs={"attn_implementation": "sdpa"},
        trust_remote_code=True, quantization_config=quantized,
    )  # fmt: skip
    assert trainer.model.config._attn_implementation == "eager"
    assert trainer.teachers["general"].model.config._attn_implementation == "sdpa"
    assert loaded == [True, True]


def test_optimizers_and_their_arguments_are_those_asked_for(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, optim="sgd", optim_args="momentum=0.5,nesterov=true")
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is torch.optim.SGD
    assert {(group["momentum"], group["nesterov"]) for group in optimizer.param_groups} == {(0.5, True)}
    # A low-rank one, with a dummy for its package.
    package = types.ModuleType("galore_torch")
    package.GaLoreAdafactor = package.GaLoreAdamW8bit = None
    package.GaLoreAdamW = type("GaLoreAdamW", (torch.optim.AdamW,), {})
    monkeypatch.setitem(sys.modules, "galore_torch", package)
    monkeypatch.setattr("transformers.trainer_optimizer.is_galore_torch_available", lambda: True)
    trainer.args = make_config(tmp_path, optim="galore_adamw", optim_target_modules=["q_proj"], optim_args="rank=3")
    trainer.optimizer = None
    groups = trainer.create_optimizer().param_groups
    assert [(group.get("rank"), len(group["params"])) for group in groups] == [(None, 19), (3, 2)]


def test_band_and_the_reject_weight_reach_the_loss(tmp_path):
    uneven, selectkd = CASES[0], next(case for case in BASELINES if case.name == "selectkd")
    for low, high, outside in ((0.0, 1e9, 0.0), (1.0, 1.0, 1.0)):
        band = {"importance_sampling_low": low, "importance_sampling_high": high}
        _, step = trainer_step(uneven, str(tmp_path / f"low-{low}"), 2, **band, diagnostics_steps=0)
        assert step["importance/outside_band"] == outside
        assert (step["loss"] == 0) == (outside == 1.0)
    losses = {
        weight: trainer_step(
            selectkd,
            str(tmp_path / f"weight-{weight}"),
            2,
            loss_normalization="sample",
            selectkd_reject_weight=weight,
            diagnostics_steps=0,
        )[1]["loss"]
        for weight in (0.0, 0.25, 0.5)
    }
    assert losses[0.0] != losses[0.5]
    assert losses[0.25] == pytest.approx(
        (losses[0.0] + losses[0.5]) / 2, rel=1e-5
    )  # it is a factor of the rejected ones


def test_underflow_and_overflow_are_looked_for(tmp_path):
    """`debug`."""
    model = make_model(1)
    torch.nn.init.constant_(model.model.layers[0].mlp.gate_proj.weight, float("inf"))
    with pytest.raises(ValueError, match="DebugUnderflowOverflow: inf/nan detected"):
        make_trainer(tmp_path, model=model, debug="underflow_overflow").train()


def test_full_determinism_is_switched_on(tmp_path, monkeypatch):
    for name in ("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC",
                 "FLASH_ATTENTION_DETERMINISTIC"):  # fmt: skip
        monkeypatch.setenv(name, "0")
    try:
        trainer = make_trainer(tmp_path, full_determinism=True, max_steps=1)
        assert torch.are_deterministic_algorithms_enabled()
        trainer.train()
    finally:
        torch.use_deterministic_algorithms(False)


# ------------------------------------------------------------------------------------------- handed on, and no run


def test_vllm_is_started_as_asked(tmp_path, monkeypatch):
    told = {}
    monkeypatch.setattr("trl.trainer.distillation_trainer.is_vllm_available", lambda: True)
    monkeypatch.setattr(
        "trl.trainer.distillation_trainer.VLLMGeneration",
        lambda **kwargs: told.update(kwargs) or types.SimpleNamespace(_iter_named_params=None),
    )
    given = {
        "mode": "server", "model_impl": "transformers", "enable_sleep_mode": True, "server_base_url": "http://host:1",
        "server_host": "host", "server_port": 9, "server_timeout": 3.0, "group_port": 8,
        "gpu_memory_utilization": 0.5, "max_model_length": 321, "tensor_parallel_size": 2,
    }  # fmt: skip
    named = ("mode vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_server_base_url vllm_server_host "
             "vllm_server_port vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization vllm_max_model_length "
             "vllm_tensor_parallel_size")  # fmt: skip
    assert {f"vllm_{name}" for name in given} | {"mode"} == set(named.split())
    trainer = make_trainer(tmp_path, use_vllm=True, **{f"vllm_{name}": value for name, value in given.items()})
    assert {name: told[name] for name in given} == given
    assert trainer.vllm_generation.logprobs == 0


def test_hub_is_told_as_asked(many, monkeypatch):
    """`hub_private_repo`, `hub_revision`, `hub_always_push`, and the name of a dataset for the card."""
    trainer, seen = many
    told = Stage()

    class Api:
        def create_repo(self, *args, **kwargs):
            told.append(("create", args, kwargs))
            return types.SimpleNamespace(repo_id="me/many")

        def __getattr__(self, name):
            return told.teller(name)

    monkeypatch.setattr("transformers.trainer.hf_api", Api)
    args = copy.copy(trainer.args)
    monkeypatch.setattr(trainer, "args", args)
    monkeypatch.setattr(trainer, "callback_handler", types.SimpleNamespace(on_push_begin=lambda *_: None))
    args.hub_private_repo, args.hub_revision, args.hub_model_id = True, "branch-of-mine", "me/many"
    args.push_to_hub = True
    monkeypatch.setattr(trainer.control, "should_training_stop", False)  # or the push would be the last one
    monkeypatch.setattr(trainer, "hub_model_id", None)
    trainer.init_hf_repo()
    ((_, created),) = told.of("create")
    assert created["private"] is True
    running = types.SimpleNamespace(is_done=lambda: False, jobs=[], wait_until_done=lambda: None)
    for always, pushes in ((False, 0), (True, 1)):
        trainer.push_in_progress, args.hub_always_push = running, always
        trainer.pushes.add(str(seen.folder / "checkpoint-6"))
        assert len(told.of("upload_folder")) == pushes
    assert told.of("upload_folder")[0][1]["revision"] == "branch-of-mine"
    trainer.create_model_card("many", dataset_name="me/a-dataset")
    assert "- me/a-dataset" in (seen.folder / "README.md").read_text()


def test_process_group_is_started_as_asked(tmp_path, monkeypatch):
    from transformers import training_args

    told, start = {}, training_args.PartialState
    monkeypatch.setattr(training_args, "PartialState", lambda **kwargs: told.update(kwargs) or start(cpu=True))
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)  # else use_cpu is on by itself
    make_config(tmp_path, use_cpu=False, ddp_backend="gloo", ddp_timeout=4321)
    assert told["backend"] == "gloo"
    assert told["timeout"].total_seconds() == 4321
    told.clear()
    make_config(tmp_path, use_cpu=True)
    assert told["cpu"] is True


def test_tf32_is_switched_on_and_off(tmp_path, monkeypatch):
    switched = []
    monkeypatch.setattr("transformers.training_args.is_torch_tf32_available", lambda: True)
    monkeypatch.setattr("transformers.training_args.enable_tf32", switched.append)
    make_config(tmp_path, tf32=True)
    make_config(tmp_path, tf32=False)
    assert switched == [True, False]


def test_fsdp_of_a_config_is_that_of_the_launch_file(tmp_path, monkeypatch):
    """The plugin that `fsdp` and `fsdp_config` make equals the one that configs/accelerate/fsdp2.yaml makes."""
    file = yaml.safe_load((ROOT / "configs" / "accelerate" / "fsdp2.yaml").read_text())["fsdp_config"]
    for name in list(os.environ):
        if name.startswith("FSDP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
    given = {name: value for name, value in file.items() if name != "fsdp_activation_checkpointing"}
    config = make_config(tmp_path, fsdp=True, fsdp_config=given, gradient_checkpointing=False)
    of_config = FullyShardedDataParallelPlugin(**config.fsdp_plugin_args)
    for name, value in file.items():
        monkeypatch.setenv(name.upper(), str(value).lower() if isinstance(value, bool) else str(value))
    of_file = FullyShardedDataParallelPlugin()
    for name in (
        "fsdp_version",
        "reshard_after_forward",
        "cpu_offload",
        "state_dict_type",
        "cpu_ram_efficient_loading",
    ):
        assert str(getattr(of_config, name)) == str(getattr(of_file, name)), name


def test_deepspeed_of_a_config_leaves_accumulation_to_the_trainer(tmp_path):
    pytest.importorskip("deepspeed")
    auto = ("gradient_accumulation_steps", "train_micro_batch_size_per_gpu", "train_batch_size", "gradient_clipping")
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, **dict.fromkeys(auto, "auto")}))
    config = make_config(
        tmp_path, deepspeed=str(tmp_path / "ds.json"), prompts_per_step=12, per_device_train_batch_size=2
    )
    assert config.deepspeed_plugin.zero_stage == 2
    found = config.hf_deepspeed_config.config
    assert [found[name] for name in auto] == [6, 2, 12, 1.0]


@pytest.mark.parametrize(
    ("settings", "first", "others"),
    [
        ({}, logging.INFO, logging.ERROR),
        ({"log_level": "error"}, logging.ERROR, logging.ERROR),
        ({"log_level_replica": "info"}, logging.INFO, logging.INFO),
    ],
)
def test_log_of_camopd_has_the_level_asked_for(settings, first, others, tmp_path, monkeypatch):
    from camopd.setup import show_log

    log = logging.getLogger("camopd")
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(log, "propagate", False)
    config = make_config(tmp_path, **settings)
    level = log.level
    try:
        for index, expected in ((0, first), (1, others)):
            log.setLevel(logging.NOTSET)
            log.handlers.clear()
            monkeypatch.setattr(type(config), "local_process_index", property(lambda _, index=index: index))
            show_log(config)
            assert log.level == expected
    finally:
        log.setLevel(level)


def test_values_of_a_branch_that_selects_nothing_are_warned_of(tmp_path, caplog):
    """And neither those of one that selects, nor one value for both, nor a default."""
    make_config(tmp_path, selection={"general": False, "domain": True}, mass_target={"general": 0.3, "domain": 0.3},
                score={"general": "positive", "domain": "absolute"})  # fmt: skip
    assert warned(caplog) == ["mass_target['general']", "score['general']"]
    caplog.clear()
    for values in (
        {"mass_target": 0.3},
        {"mass_target": {"general": 0.8, "domain": 0.3}},
        {"score": {"domain": "absolute"}},
    ):
        make_config(tmp_path, selection={"general": "random", "domain": True}, **values)
        make_config(tmp_path, selection={"general": False, "domain": True}, **values)
    assert not warned(caplog)
