"""What a run must still be to go on from a checkpoint: `camopd.json`, made when the run begins and compared on resume.

It is sent to the Hub with a checkpoint: no folder of this machine and no secret is in it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from enum import Enum
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

import torch
from accelerate.utils import gather_object, is_peft_model
from datasets import Dataset, IterableDataset
from transformers import SchedulerType
from transformers.utils import get_json_schema
from trl.trainer.utils import get_config_model_id

from .best import GREATER_IS_BETTER
from .config import CaMOPDConfig
from .errors import ResumeError
from .hub import public_name
from .learning_rate import FOLLOWS_METRIC, of_deepspeed
from .output_dir import RUN_ID, RUN_RECORD
from .prompts import what_the_model_sees
from .schedule import short
from .setting_rules import WITHOUT_EFFECT
from .settings import OLD_NAMES
from .teachers.adapters import START, base_weights
from .teachers.base import Teacher
from .teachers.local import LocalTeacher


logger = logging.getLogger(__name__)

PROBED_VALUES = 16  # of each weight
PROBED_TEXT = "The patient's dose: 2.5 mg/kg.\n\tNaïve Ωmega, 中文, עברית, 👩‍⚕️ def f(x): return x**2"

# Fields of the config that do not change the numbers of a run, by the reason. All others are recorded: what is forgotten
# here is compared, and at worst refuses a resume that could have been.
LEFT_OUT = {
    "where the run lies, and what it keeps and when": "output_dir overwrite_output_dir resume_from_checkpoint "
    "trust_checkpoint save_strategy save_steps save_on_each_node save_total_limit save_only_model enable_jit_checkpoint "
    "load_best_model_at_end restore_callback_states_from_checkpoint",
    "what is told, and to whom": "logging_strategy logging_steps logging_first_step log_on_each_node "
    "logging_nan_inf_filter log_level log_level_replica disable_tqdm verbose report_to run_name project "
    "trackio_space_id trackio_bucket_id trackio_static_space_id log_completions num_completions_to_print "
    "log_unique_prompts skip_memory_metrics",
    "what is sent to the Hub; a token is secret": "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy "
    "hub_always_push hub_revision",
    "a permission, which changes no number": "prefill",
    "measured beside training, with other random numbers": "diagnostics_steps debug",
    "evaluation, which draws random numbers of its own; recorded where the learning rate follows it": "eval_strategy "
    "eval_steps eval_delay eval_on_start per_device_eval_batch_size metric_for_best_model greater_is_better eval_tasks "
    "eval_tasks_items",
    "where servers are, and how long is waited": "vllm_server_base_url vllm_server_host vllm_server_port "
    "vllm_server_timeout vllm_group_port rollout_servers teacher_timeout ddp_timeout",
    "who reads the prompts, whose order follows from the seed": "dataloader_num_workers dataloader_persistent_workers "
    "dataloader_prefetch_factor dataloader_multiprocessing_context",
    "how processes talk and share the weights": "ddp_backend ddp_find_unused_parameters ddp_bucket_cap_mb "
    "ddp_broadcast_buffers fsdp fsdp_config parallelism_config accelerator_config ds3_gather_for_generation",
    "memory: the same numbers are computed a second time, or held elsewhere": "activation_checkpointing "
    "activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs torch_empty_cache_steps "
    "vllm_gpu_memory_utilization vllm_enable_sleep_mode",
    "derived: from prompts_per_step": "gradient_accumulation_steps",
    "recorded as what they name": "teachers deepspeed",
    "old names, whose values the new ones have": " ".join(OLD_NAMES),
    "no effect here": " ".join(name for rule in WITHOUT_EFFECT for name in rule.names.split() if "." not in name),
}
# Recorded, but a run that must make do with other memory or machines may change them, and is told: sums come in another
# order, and a sampler elsewhere draws other tokens of the same distribution. So may one that a guard has stopped.
NOTED = (
    "guards", "use_cpu", "full_determinism", "per_device_train_batch_size", "score_tokens",
    "max_tokens_per_micro_batch", "padding_free", "rebalance",
    "cache_implementation", "vllm_mode", "vllm_model_impl", "vllm_tensor_parallel_size", "vllm_max_model_length",
)  # fmt: skip
_PER_BRANCH = ("mass_target", "scale", "score", "selection")
_ALWAYS = (  # in every record there ever was, or `None` where it is not; another key that an old one lacks says nothing
    "schedule", "branches", "teachers", "prompts", "prompts_per_step", "seed", "max_prompt_length", "max_completion_length",
    "learning_rate", "teacher_prompt", *_PER_BRANCH,
)  # fmt: skip
_ANY_LENGTH = (  # schedules that are the same whenever the run ends
    SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP, SchedulerType.INVERSE_SQRT, *FOLLOWS_METRIC,
)  # fmt: skip
_FOLLOWED = next(names for reason, names in LEFT_OUT.items() if reason.startswith("evaluation")).split()
_OF_ADAPTER_FILE = (
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "runtime_config", "task_type",
)  # fmt: skip
_SECRET = re.compile(r"(^|_)(token|key|secret|password|auth)$|^use_auth_token$", re.IGNORECASE)
_NO_SETTING = re.compile(r"^(cache_dir|device_map|max_memory|offload_\w+|local_files_only|proxies|low_cpu_mem_usage)$")
_PATH = re.compile(r"(/|~|\.{1,2}/|[A-Za-z]:[\\/]).*|.*://.*", re.DOTALL)


def record_of(trainer: Any, run: Any, student: Any, optimizers: tuple[Any, Any]) -> dict[str, Any]:
    """What a run is, as it is written into every checkpoint. Called by all ranks; the same on each, as JSON has it.

    Args:
        trainer: whose settings, teachers by branch, tokenizer and tools are there. Of a teacher in this process its
            starting weights count as well as its public name. A server shows no weights and may be started elsewhere: it
            is the model whose name it serves.
        run: as `setup.prepare` makes it: schedule, prompts by branch, the student's name or "", and whether its adapter is
            a saved one, and so a part of the starting weights.
        student: the model outside wrappers, before training.
        optimizers: optimizer and scheduler that were passed to the trainer.
    """
    args: CaMOPDConfig = trainer.args
    teachers: Mapping[str, Teacher] = trainer.teachers
    left_out = {name for names in LEFT_OUT.values() for name in names.split()}
    if args.lr_scheduler_type in FOLLOWS_METRIC:
        left_out -= set(_FOLLOWED)
    if args.metric_for_best_model is not None:  # a checkpoint has the best value so far
        left_out -= {"metric_for_best_model"}
        left_out -= {"eval_tasks_items"} if "/" in args.metric_for_best_model else set()
    if args.lr_scheduler_type in _ANY_LENGTH and of_deepspeed(args, "scheduler") is None:
        left_out.add("max_steps")
    weights = None
    if args.process_index == 0:  # a launcher may leave the others without weights until training begins
        weights = {
            "student": fingerprint_of(student, run.adapter_loaded),
            **{name: fingerprint_of(each.model) for name, each in teachers.items() if isinstance(each, LocalTeacher)},
        }
    weights = next(each for each in gather_object([weights]) if each is not None)
    record = {
        "branches": list(run.schedule.branches),
        "teachers": {branch: public_name(teacher.name) for branch, teacher in teachers.items()},
        "teacher_weights": {branch: weights.get(branch) for branch in teachers},
        "prompts": {branch: fingerprint(dataset) for branch, dataset in run.prompts.items()},
        "all_prompts": {branch: of_all_rows(dataset) for branch, dataset in run.prompts.items()},
        **_of_metric(args.metric_for_best_model or "", run.held_out or {}),
        "tokens": tokens_of(trainer),
        "rollouts_from_servers": bool(args.rollout_servers),  # wherever they are: w_t counts then
        "student": {
            "name": public_name(run.student_name or get_config_model_id(student.config) or ""), **weights["student"],
        },
        "adapter": _adapter_of(student),
        "optimizers": _passed(*optimizers),
        "deepspeed": {part: of_deepspeed(args, part) for part in ("optimizer", "scheduler", "gradient_clipping")},
        **{each.name: getattr(args, each.name) for each in fields(args) if each.name not in left_out},
        **{name: args.per_branch(name) for name in _PER_BRANCH},
        "warmup_steps": args.get_warmup_steps(args.max_steps),  # which may be a share of max_steps
        "completion_lengths": args.completion_lengths and str(args.completion_lengths),
        "teacher_prompt": _hashes(args.teacher_prompt),  # texts may be long, or nobody else's business
        "schedule": str(run.schedule),  # in place of the field, which is as the user has spelt it
    }  # fmt: skip
    return as_json(record)


def _of_metric(metric: str, held_out: Mapping[str, Any]) -> dict[str, Any]:
    """The prompts on which `metric_for_best_model` is measured."""
    found = {
        branch: of_all_rows(prompts)
        for branch, prompts in held_out.items()
        if metric.removeprefix("eval_") in {f"{branch}_{name}" for name in GREATER_IS_BETTER}
    }
    return {"eval_prompts": found} if found else {}


def as_json(value: Any) -> Any:
    """A value as it is after JSON, so that comparing before and after is comparing equals; paths by their public name.

    Secrets fall away, and so does what says where a model is loaded from or to. Of an object that JSON does not know, its
    own `to_dict` counts, or its type.
    """
    if isinstance(value, Enum):
        return as_json(value.value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return (
            float(value) if math.isfinite(value) else str(float(value))
        )  # JSON has no NaN, which differs from itself
    if isinstance(value, PurePath):
        value = f"./{value}"
    if isinstance(value, str):
        return str(value) if not _PATH.fullmatch(value) else _without_place(value)
    if isinstance(value, Mapping):
        items = {str(as_json(key)): item for key, item in value.items()}
        return {
            key: as_json(item) for key, item in items.items() if not (_SECRET.search(key) or _NO_SETTING.match(key))
        }
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((as_json(item) for item in value), key=repr)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if hasattr(value, "tolist"):  # of torch and numpy
        return as_json(value.tolist())
    return as_json(value.to_dict()) if hasattr(value, "to_dict") else type(value).__name__


def _without_place(text: str) -> str:
    """The last part of a path; of a URL, which may have a key in it, a hash."""
    name = "" if "://" in text else PureWindowsPath(text).name  # which takes both kinds of slashes
    return name or f"sha256:{_hash(text)}"


def fingerprint(dataset: Dataset | IterableDataset) -> str:
    """Tells prompt datasets apart for the checkpoint's record: row count and a hash of the first and last 32 prompts.

    Beside `of_all_rows`, because a checkpoint of an older camopd has this alone.
    """
    if not isinstance(dataset, Dataset):
        return "streamed"
    ends = sorted({*range(min(32, len(dataset))), *range(max(0, len(dataset) - 32), len(dataset))})
    rows = what_the_model_sees(dataset.select(ends))
    text = "\x00".join(str(value) for row in rows for value in row.values())
    return f"{len(dataset)} rows, {_hash(text)}"


def of_all_rows(dataset: Dataset | IterableDataset) -> str | None:
    """A hash of all prompts; `None` of a stream, which is not read before its rows are needed."""
    if not isinstance(dataset, Dataset):
        return None
    digest = hashlib.sha256()
    for batch in what_the_model_sees(dataset).iter(1024):
        digest.update(repr(sorted(batch.items())).encode(errors="surrogatepass"))
    return digest.hexdigest()[:12]


def tokens_of(trainer: Any) -> dict[str, Any]:
    """What makes tokens of a prompt: the tokenizer, by those of a text, the chat template and the tools, each as a hash."""
    template = trainer.chat_template or getattr(trainer.processing_class, "chat_template", None)  # TRL's, for tools
    tools = [get_json_schema(tool) for tool in trainer.tools or ()]
    return {
        "tokenizer": _hash(repr(trainer._tokenizer(PROBED_TEXT)["input_ids"])),
        "chat_template": _hash(repr(template)) if template else None,
        "tools": _hash(json.dumps(tools)) if tools else None,
    }


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:12]


def fingerprint_of(model: Any, with_adapter: bool = False) -> dict[str, str | None]:
    """Tells models apart by their weights: a hash of names and shapes, and one of some values of each, as float32.

    Of a model with adapters those of its base count, and `with_adapter` the trained weights, too: new adapters are drawn
    at random. Without values (`None`) where a weight is not whole on this process, as under ZeRO-3.
    """
    weights = list(base_weights(model) if is_peft_model(model) else model.named_parameters())
    if with_adapter:
        weights += [(name, each) for name, each in model.named_parameters() if each.requires_grad]
        weights = [(name, each) for name, each in weights if START not in name.split(".")]
    shapes, values = hashlib.sha256(), hashlib.sha256()
    whole = not any(
        each.is_meta or hasattr(each, "ds_id") or hasattr(each, "device_mesh") or not each.numel()
        for _, each in weights
    )
    for name, each in weights:
        shapes.update(f"{name} {tuple(getattr(each, 'ds_shape', each.shape))}\n".encode())
        if whole:
            flat, last = each.detach().reshape(-1), each.numel() - 1
            places = [place * last // (PROBED_VALUES - 1) for place in range(PROBED_VALUES)]
            values.update(flat[torch.tensor(places, device=flat.device)].float().cpu().numpy().tobytes())
    return {"shapes": shapes.hexdigest()[:12], "values": values.hexdigest()[:12] if whole else None}


def _adapter_of(student: Any) -> dict[str, Any] | None:
    """What a student's adapter is beyond the defaults of its kind; a later PEFT has more settings at theirs."""
    if not is_peft_model(student):
        return None
    config = student.peft_config[student.active_adapter]
    usual = type(config)().to_dict()
    return {
        "kind": config.peft_type,
        **{
            name: value
            for name, value in config.to_dict().items()
            if name not in _OF_ADAPTER_FILE and value != usual.get(name)
        },
    }


def _hashes(values: Any) -> dict[str, str] | None:
    if not values:
        return None
    return {name: _hash(json.dumps(value)) for name, value in values.items()}


def _passed(optimizer: Any, scheduler: Any) -> dict[str, Any] | None:
    """Kind and settings of what was passed to the trainer."""
    if optimizer is None and scheduler is None:
        return None
    return {
        "optimizer": type(optimizer).__name__,
        "settings": getattr(optimizer, "defaults", None),
        "scheduler": type(scheduler).__name__,
    }


def read(folder: Path) -> dict[str, Any]:
    """The record in the folder of a checkpoint, with today's names of settings. Raises `ResumeError` without one."""
    path = folder / RUN_RECORD
    if not path.is_file():
        raise ResumeError(
            f"{str(folder)!r} has no {RUN_RECORD}: it is not a checkpoint of CaMOPDTrainer. To start from its "
            "weights, pass it as `model`."
        )
    way = "Go on from an earlier checkpoint, or pass this one as `model` to start a new run from its weights."
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: also of UTF-8
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ResumeError(f"{str(path)!r}, which says what run it is, cannot be read: {reason}. {way}") from None
    if not isinstance(found, dict):
        raise ResumeError(
            f"{str(path)!r}, which says what run it is, must hold a JSON object, and holds {str(found)[:80]!r}. {way}"
        )
    return {OLD_NAMES.get(str(name), str(name)): value for name, value in found.items()}


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each difference that makes two records those of two runs, `then` read from a checkpoint."""
    wanted = (name for name in now if name in then or name in _ALWAYS)
    return _lines(then, now, (name for name in wanted if name not in NOTED and name != RUN_ID))


def notes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each difference with which a run may go on, the same up to rounding and the draw of its samples."""
    return _lines(then, now, (name for name in NOTED if name in then and name in now))


def check(folder: Path, now: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a checkpoint. Raises `ResumeError` unless it is that of the run `now`; warns of what may differ."""
    then = read(folder)
    found = differences(then, now)
    if found:
        raise ResumeError(
            f"{str(folder)!r} belongs to another run:\n" + "\n".join(found) + "\nRestore these settings to go "
            "on, or pass the checkpoint as `model` to start a new run from its weights."
            + (_TRAINED if any(line.startswith("  student:") for line in found) else "")
        )
    noted = notes(then, now)
    if noted:
        logger.warning(
            "the run goes on with other settings of how it is computed; its numbers will differ from those of an "
            "undisturbed run by rounding and by what is drawn:\n%s", "\n".join(noted),
        )  # fmt: skip
    return then


_TRAINED = (
    " The student is compared as it was before training; load a model object that has been trained since once more."
)


def _lines(then: Mapping[str, Any], now: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    return [
        f"  {name}: {short(then.get(name))} then, {short(now[name])} now"
        for name in names
        if not _same(name, then.get(name), now[name])
    ]


def _same(name: str, then: Any, now: Any) -> bool:
    if not (isinstance(then, dict) and isinstance(now, dict)):
        return bool(then == now)
    if name == "student":  # the same weights may lie in a folder of another name
        return _same_weights(then, now) if then.get("values") and now["values"] else then.get("name") == now["name"]
    if name == "teacher_weights":
        return all(_same_weights(then.get(branch), each) for branch, each in now.items())
    return then == now


def _same_weights(then: Any, now: Any) -> bool:
    """Of two fingerprints; one without values is that of a run that had the weights in shards."""
    if not (isinstance(then, dict) and isinstance(now, dict)):
        return True  # of a teacher without weights here: its name is compared
    known = then.get("values") and now.get("values")
    return then.get("shapes") == now.get("shapes") and (not known or then["values"] == now["values"])
