"""What a setting of transformers, TRL or accelerate does here: refused where the method cannot use it, named in a warning
where it has no effect. docs/settings.md has every setting, and a test holds that table and this file to each other.

The rules are data, and speak of values that differ from the default: a default is never refused and never warned of.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

from accelerate import ParallelismConfig

from . import guards
from .learning_rate import of_deepspeed, says_where_to_clip
from .schedule import Schedule, short
from .teachers.address import OWN_TEACHERS, is_server


if TYPE_CHECKING:
    from accelerate import Accelerator


logger = logging.getLogger(__name__)

ON_POLICY = (
    "rollouts must be drawn from the very distribution the gaps are measured on (temperature 1, nothing cut off), or "
    "the sampled gap is not a reverse KL and the importance weights are wrong"
)
_NO_EPOCH = "a run is one epoch, whatever its steps, and nothing would happen before its end; say after how many steps"
_COMPILED = "scoring and the loss call the backbone and the head of the model, past what is compiled"
_ONE_RANK_ONE_SHARE = (
    "each rank gets prompts of its own and trains its own samples, so ranks that hold parts of one replica would feed it "
    "different sequences. Shard with FSDP2 or ZeRO (docs/scale.md)"
)
SCALED = (
    "its loss scaling skips optimizer steps, each of which has cost a rollout, and a step without kept samples has no "
    "gradients that it could scale"
)
_NO_PREDICTIONS = "evaluation measures gaps and gathers those alone"
_SHARDING = (
    "held-out prompts are dealt to the ranks in whole batches, as many to each: every rank takes part in every forward"
)


class Rule(NamedTuple):
    """Settings, by the name under `CaMOPDConfig` that a user writes; the values they may have, the usual one first."""

    names: str
    allowed: tuple[Any, ...]
    reason: str


REFUSED = (
    Rule("num_iterations", (1,), "Algorithm 1 makes one update per rollout and defines no ratio clip for more"),
    Rule("temperature top_p repetition_penalty", (1.0,), ON_POLICY),
    Rule("top_k", (0,), ON_POLICY),
    Rule("min_p vllm_structured_outputs_regex", (None,), ON_POLICY),
    Rule("beta", (1.0,), "the loss is Eq. 9, not the generalised Jensen-Shannon divergence that beta bends"),
    Rule("label_smoothing_factor", (0.0,), "Eq. 9 has no labels that could be smoothed"),
    Rule(
        "neftune_noise_alpha", (None,),
        "its noise would be in the loss's forward alone, and not in the rollouts and gaps of the same weights",
    ),
    Rule("teacher_model_name_or_path", (None,), "each branch has its own teacher; name them in `teachers`"),
    Rule("teacher_model_revision", (None,), "put the revision into teacher_model_init_kwargs"),
    Rule("auto_find_batch_size", (False,), "it would change prompts_per_step in the middle of a run"),
    Rule("remove_unused_columns", (False,), "the branch of a row is a column of it"),
    Rule("ignore_data_skip", (False,), "a resumed run would get the prompts and branches of step 0 again"),
    # How long, and when
    Rule("num_train_epochs", (-1.0,), "with a stream per branch there is no epoch to count; set max_steps"),
    Rule("save_strategy", ("steps", "no", "best"), _NO_EPOCH + " (save_steps)"),
    Rule("eval_strategy", ("no", "steps"), _NO_EPOCH + " (eval_strategy: steps, eval_steps)"),
    Rule("logging_strategy", ("steps", "no"), _NO_EPOCH + " (logging_steps)"),
    Rule(
        "enable_jit_checkpoint", (False,),
        "it would end with exit code 0 and save the unfinished model as the finished one. At SIGTERM, SIGINT and SIGUSR1 a "
        "run is saved anyway (docs/reliability.md)",
    ),
    # The order of the prompts, and who gets them
    Rule(
        "train_sampling_strategy", ("random",),
        "each step takes the next prompts of the branches that the schedule names, and balances their lengths itself; "
        "shuffle_dataset=False keeps the order of the files",
    ),
    Rule(
        "ddp_static_graph", (None, False),
        "how many backward passes a step has follows from the samples that are kept, at which PyTorch stops with an error",
    ),
    Rule("dataloader_in_order", (True,), "steps must come in the order of the schedule"),
    Rule("dataloader_drop_last", (False,), "held-out prompts of an incomplete batch would not be measured"),
    Rule("accelerator_config.split_batches", (False,), _SHARDING),
    Rule("accelerator_config.dispatch_batches", (None, False), _SHARDING),
    Rule("accelerator_config.even_batches", (True,), _SHARDING),
    # Numbers and kernels
    Rule("fp16", (False,), f"{SCALED}. Set bf16=True, or bf16=False for float32"),
    Rule(
        "bf16_full_eval fp16_full_eval", (False,),
        "it would convert the student's weights themselves, and measure gaps of another model than the one that is "
        "trained. bf16=True already computes in bfloat16",
    ),
    Rule("torch_compile_mode", (None,), _COMPILED),
    Rule("torch_compile", (False,), _COMPILED),
    Rule(
        "use_liger_kernel", (False,),
        "it would change the student's layers and not those of teachers in the process, so that equal weights would not "
        "give a gap of 0, and its fused loss is not that of Eq. 9. Set model_init_kwargs and teacher_model_init_kwargs "
        "to {'use_kernels': True}",
    ),
    Rule("liger_kernel_config", (None,), "use_liger_kernel cannot be used with CaMOPD either"),
    Rule(
        "pad_to_multiple_of", (None,),
        "only rollouts would be padded so; scoring and the loss pad no further than the longest sample of a micro-batch",
    ),
    # What asks for another trainer
    Rule("include_for_metrics", ([],), "there is no compute_metrics; " + _NO_PREDICTIONS),
    Rule("eval_use_gather_object", (False,), _NO_PREDICTIONS),
    Rule(
        "include_num_input_tokens_seen", ("no",),
        "it counts the input_ids of a data loader, and ours has prompts. metrics.jsonl has `train/tokens` per step",
    ),
)  # fmt: skip

# Parts of a mapping or list that are refused, and the reason.
REFUSED_PARTS = (
    ("model_init_kwargs", ("tp_plan", "tp_size", "device_mesh", "distributed_config"), _ONE_RANK_ONE_SHARE),
    (
        # Which the latter, its old name, becomes from transformers 5.23 on.
        "activation_checkpointing_kwargs gradient_checkpointing_kwargs", ("every_n_layers", "offload"),
        "TRL switches checkpointing off to generate and on again without it, which leaves nothing of it",
    ),
    (
        "accelerator_config.gradient_accumulation_kwargs", ("num_steps",),
        "prompts_per_step says how many micro-steps a step has",
    ),
    ("debug", ("tpu_metrics_debug",), "it needs a TPU, on which this trainer has never run"),
)  # fmt: skip

WITHOUT_EFFECT = (
    Rule("average_tokens_across_devices", (True,), "Eq. 9 is over the samples of all ranks anyway"),
    Rule("use_cache", (False,), "scoring and the loss read no cache, and rollouts have one anyway"),
    Rule("prediction_loss_only batch_eval_metrics", (False,), _NO_PREDICTIONS),
    Rule("eval_do_concat_batches", (True,), _NO_PREDICTIONS),
    Rule("eval_accumulation_steps label_names", (None,), _NO_PREDICTIONS),
    Rule("length_column_name", ("length",), "samples are balanced by the tokens they have, not by a column"),
    Rule("dataloader_pin_memory", (True,), "prompts are text, which cannot be pinned"),
    Rule("accelerator_config.non_blocking", (False,), "prompts are text, which is not moved to a GPU"),
    Rule(
        "accelerator_config.use_seedable_sampler", (True,), "the order of the prompts follows from seed and data_seed"
    ),
    Rule("do_train", (False,), "`camopd train` trains, and so does trainer.train()"),
    Rule("do_eval", (False,), "held-out prompts are measured where eval_strategy or eval_on_start says so"),
    Rule("do_predict", (False,), "nothing is predicted; trainer.evaluate() measures gaps"),
    Rule("local_rank", (-1,), "the launcher's environment says which rank this is"),
)


class Need(NamedTuple):
    """Settings that act only where another one allows it."""

    names: str
    met: Callable[[Any], bool]
    why: str


# What transformers reads of `optim_args`, by a part of the optimizer's name; the first that fits counts. `None`: all of it
# reaches the optimizer, which has its own errors. A `weight_decay` in it is written over by that of the parameter groups.
_LOW_RANK = "rank update_proj_gap scale proj_type"
_READS_OPTIM_ARGS = {
    "rmsprop_bnb": None,
    "schedule_free": "weight_lr_power r",  # before the "sgd" of its name
    "sgd": "momentum dampening nesterov",
    "adagrad": "lr_decay eps",
    "rmsprop": "momentum alpha eps centered",
    "ademamix": "beta1 beta2 beta3 alpha eps t_alpha t_beta3",
    "galore": _LOW_RANK,
    "apollo": _LOW_RANK + " proj scale_type",
    "grokadamw": "alpha_init lamb gamma grokking_signal_decay_rate gradient_clipping",
    "adamw_torch_4bit": "block_size bf16_stochastic_round",
    "adamw_torch_8bit": "block_size bf16_stochastic_round",
    "stable_adamw": "decouple_lr max_lr kahan_sum",
    "adamw_anyprecision": "use_kahan_summation momentum_dtype variance_dtype compensation_buffer_dtype",
}
_BAND = "importance_sampling_low importance_sampling_high"
_VLLM_SERVER = "vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port"
_VLLM_INSIDE = "vllm_gpu_memory_utilization vllm_tensor_parallel_size vllm_enable_sleep_mode vllm_model_impl"

_NAME_RUNS = {"comet_ml", "mlflow", "swanlab", "trackio", "wandb"}  # transformers' callbacks that read run_name

NEEDS = (
    Need("eval_steps eval_delay", lambda a: a.eval_strategy == "steps", "eval_strategy is not 'steps'"),
    Need("save_steps", lambda a: a.save_strategy == "steps", "save_strategy is not 'steps'"),
    Need("logging_steps", lambda a: a.logging_strategy == "steps", "logging_strategy is not 'steps'"),
    Need("hub_strategy hub_always_push", lambda a: a.push_to_hub, "push_to_hub is False"),
    Need("run_name", lambda a: bool(_NAME_RUNS & set(a.report_to)), f"report_to names none of {sorted(_NAME_RUNS)}"),
    Need("log_completions", lambda a: a.logging_strategy != "no", "logging_strategy is 'no'"),
    Need("eval_tasks_items", lambda a: bool(a.eval_tasks), "there are no eval_tasks"),
    Need(
        "ds3_gather_for_generation", lambda a: getattr(a.deepspeed_plugin, "zero_stage", None) == 3,
        "the weights are not those of ZeRO-3",
    ),
    Need(
        "project trackio_space_id trackio_bucket_id trackio_static_space_id", lambda a: "trackio" in a.report_to,
        "report_to does not name trackio",
    ),
    Need("num_completions_to_print", lambda a: a.log_completions, "log_completions is False"),
    Need(
        "log_unique_prompts", lambda a: a.log_completions and bool({"wandb", "trackio"} & set(a.report_to)),
        "it thins out the tables of log_completions in W&B and Trackio, and there are none",
    ),
    Need(
        "activation_checkpointing_kwargs gradient_checkpointing_kwargs",
        lambda a: getattr(a, "activation_checkpointing", a.gradient_checkpointing),  # its old name, below transformers 5.23
        "activation_checkpointing is False",
    ),
    Need(
        "adam_beta1 adam_beta2", lambda a: "lion" in _optim(a) or _is_adam(a),
        "optim has no such moments, or transformers passes it none",
    ),
    Need("adam_epsilon", lambda a: _is_adam(a), "optim has no such epsilon, or transformers passes it none"),
    Need(
        "optim_args", lambda a: a.optimizer_moments == "shared" and any(word in _optim(a) for word in _READS_OPTIM_ARGS),
        "transformers passes none to this optim",
    ),
    Need(
        "optim optim_args optim_target_modules", lambda a: of_deepspeed(a, "optimizer") is None,
        "the DeepSpeed config has an optimizer of its own. Take it out of there",
    ),
    Need(
        "lr_scheduler_type lr_scheduler_kwargs", lambda a: of_deepspeed(a, "scheduler") is None,
        "the DeepSpeed config has a scheduler of its own. Take it out of there",
    ),
    Need(
        "max_grad_norm", says_where_to_clip,
        "the DeepSpeed config has no gradient_clipping, and DeepSpeed has its own default. Write gradient_clipping: auto",
    ),
    Need("weight_decay", lambda a: not any(w in _optim(a) for w in ("galore", "apollo")), "a low-rank optim gets none"),
    Need("optim_target_modules", lambda a: any(w in _optim(a) for w in ("galore", "apollo")), "optim is not low-rank"),
    Need("fsdp_config", lambda a: bool(a.fsdp), "fsdp is not set; a launch file of accelerate has its own fsdp_config"),
    Need("vllm_mode vllm_max_model_length " + _VLLM_SERVER + " " + _VLLM_INSIDE, lambda a: a.use_vllm, "use_vllm is False"),
    Need(_VLLM_SERVER, lambda a: not a.use_vllm or a.vllm_mode == "server", "vllm_mode is not 'server'"),
    Need(
        _VLLM_INSIDE + " vllm_max_model_length", lambda a: not a.use_vllm or a.vllm_mode == "colocate",
        "the vLLM server has its own flags for it",
    ),
    Need(
        "vllm_server_host vllm_server_port", lambda a: a.vllm_server_base_url is None,
        "vllm_server_base_url says where the server is",
    ),
    Need("cache_implementation", lambda a: not (a.use_vllm or a.rollout_servers), "vLLM writes the rollouts"),
    Need("data_seed", lambda a: a.shuffle_dataset, "shuffle_dataset is False"),
    Need(_BAND, lambda a: a.importance_sampling_mode != "none", "importance_sampling_mode is 'none'"),
    Need("importance_sampling_mode " + _BAND, lambda a: a.divergence == "sampled", "divergence samples no token to weigh"),
    Need(
        "importance_sampling_mode " + _BAND, lambda a: a.use_vllm or a.rollout_servers or a.student_logps != "trainer",
        "transformers draws with the weights that are trained, and student_logps='trainer' takes w_t as 1",
    ),
    Need("optimizer_moments", lambda a: Schedule.parse(a.schedule).alternates, "all steps are of the same branches"),
    Need(
        "relaxed_mixture relaxed_entropy_share relaxed_exploration_steps", lambda a: a.token_rule == "relaxed_opd",
        "token_rule is not 'relaxed_opd'",
    ),
    Need("selectkd_reject_weight", lambda a: a.token_rule == "selectkd", "token_rule is not 'selectkd'"),
    Need("divergence_top_k", lambda a: a.divergence == "top_k", "divergence is not 'top_k'"),
    Need(
        "trust_checkpoint",
        lambda a: bool(a.fsdp or a.deepspeed or {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"} & set(os.environ)),
        "only DeepSpeed and FSDP unpickle a checkpoint",
    ),
    Need("loss_prefix_tokens", lambda a: (a.loss_prefix_tokens or 0) < a.longest_completion, "no completion is longer"),
    Need(
        "student_logps",
        lambda a: a.student_logps != "auto" or not (
            a.rollout_lag or not a.disable_dropout or a.token_rule == "relaxed_opd"
        ),
        "with rollout_lag, dropout or Relaxed OPD it is always the trainer's",
    ),
    Need("mass_target", lambda a: any(a.per_branch("selection").values()), "selection is off in every branch"),
    Need(
        "score", lambda a: any(a.per_branch("selection").values()),
        "selection is off in every branch, and but for it only metrics and the guard zero_gap read it",
    ),
)  # fmt: skip

# What an optimizer that is passed to the trainer has of its own, beside the learning rate (learning_rate.py).
OF_OPTIMIZER = "weight_decay optim optim_args optim_target_modules adam_beta1 adam_beta2 adam_epsilon"


def refuse(args: Any) -> None:
    """Raise `ValueError` for a setting that transformers or TRL offer and the method cannot use, instead of ignoring it."""
    for names, allowed, reason in REFUSED:
        for name in names.split():
            value = _value(args, name)
            if value not in allowed and value is not _ABSENT:
                raise ValueError(
                    f"{name}={_shown(value)} cannot be used with CaMOPD: {reason}. Leave it out, or at {allowed[0]!r}."
                )
    written = _value(args, "accelerator_config.gradient_accumulation_kwargs", absent=None) or {}
    if written.get("num_steps") == 1:  # by the trainer of a config that is copied
        del written["num_steps"]
    for names, parts, reason in REFUSED_PARTS:
        for name, part in product(names.split(), parts):
            if part in (_value(args, name, absent=None) or ()):
                raise ValueError(f"{name} with {part!r} cannot be used with CaMOPD: {reason}. Leave it out.")
    _refuse_optim_args(args)
    if args.optimizer_moments == "per_branch" and of_deepspeed(args, "optimizer") is not None:
        raise ValueError(
            "optimizer_moments='per_branch' is an AdamW of its own, and the DeepSpeed config has another optimizer, which "
            "would be taken. Take 'optimizer' out of that config."
        )
    parallel = args.parallelism_config
    if parallel is None and os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "").lower() == "true":
        parallel = ParallelismConfig()  # of accelerate's launcher
    _refuse_split_replicas(parallel)


def _refuse_optim_args(args: Any) -> None:
    """Raise `ValueError` for a part of `optim_args` that transformers would not hand on, as a misspelt one."""
    word = next((word for word in _READS_OPTIM_ARGS if word in _optim(args)), None)
    read = None if word is None else _READS_OPTIM_ARGS[word]
    for part in (args.optim_args or "").replace(" ", "").split(",") if args.optim_args else ():
        name, equals, value = part.partition("=")
        if not equals or "=" in value:
            raise ValueError(f"optim_args={args.optim_args!r} has {part!r}. Write it as name=value,name=value.")
        if read is not None and name not in read.split():
            way = "Set weight_decay itself" if name == "weight_decay" else f"There are {read.split()}"
            raise ValueError(
                f"optim_args={args.optim_args!r} sets {name!r}, which would not reach optim={_optim(args)!r}. {way}."
            )


def refuse_arguments(model: Any, quantization_config: Any) -> None:
    """Raise `ValueError` for an argument of the trainer that would do nothing."""
    if quantization_config is not None and not isinstance(model, str):
        raise ValueError(
            f"quantization_config={type(quantization_config).__name__} would do nothing: the model is loaded already. Pass "
            "its id or path, or load it quantised."
        )


def refuse_of_accelerator(accelerator: Accelerator, tensor_parallel: int) -> None:
    """Raise `ValueError` for what a launcher or a loaded model brings. `tensor_parallel`: ranks per student."""
    _refuse_split_replicas(accelerator.parallelism_config)
    if tensor_parallel > 1:
        raise ValueError(f"a student in {tensor_parallel} parts cannot be trained with CaMOPD: {_ONE_RANK_ONE_SHARE}.")
    backend = accelerator.state.dynamo_plugin.backend.value.lower()
    if backend != "no":
        raise ValueError(
            f"dynamo_backend={backend} cannot be used with CaMOPD: {_COMPILED}. Take dynamo_config out of accelerate's "
            "launch file."
        )


def _refuse_split_replicas(config: ParallelismConfig | None) -> None:
    for name in ("tp_size", "cp_size", "sp_size"):
        if config is not None and getattr(config, name, 1) > 1:
            raise ValueError(
                f"parallelism_config.{name}={getattr(config, name)} cannot be used with CaMOPD: {_ONE_RANK_ONE_SHARE}. "
                "Leave it at 1."
            )


def without_effect(args: Any) -> list[tuple[str, Any, str]]:
    """Settings with another value than the default that nothing reads here: name, value and reason, each once."""
    found: dict[str, str] = {}
    for names, allowed, reason in WITHOUT_EFFECT:
        for name in names.split():
            derived = (name == "do_eval" and args.eval_strategy != "no") or (
                name == "dataloader_pin_memory" and args.use_cpu
            )  # by transformers
            if not derived and _value(args, name) not in (*allowed, _ABSENT):
                found.setdefault(name, reason)
    for names, met, reason in NEEDS:
        if not met(args):
            for name in names.split():
                if is_set(args, name):
                    found.setdefault(name, reason)
    return [(name, _value(args, name), reason) for name, reason in found.items()] + guards.without_effect(args)


def arguments_without_effect(
    args: Any, teachers: Mapping[str, Any], optimizer: Any, adapters: Iterable[Any], tools: Any
) -> list[tuple[str, Any, str]]:
    """As `without_effect`, where it depends on what is passed to the trainer; `adapters` are configs of PEFT."""
    names: list[tuple[str, str]] = []
    if optimizer is not None:
        reason = f"the {type(optimizer).__name__} that was passed has its own"
        names += [(name, reason) for name in OF_OPTIMIZER.split()]
    if not any(map(_is_loaded_here, teachers.values())):
        names.append(("teacher_model_init_kwargs", "no teacher is loaded by its id or path"))
    if not tools:
        names.append(("max_tool_calling_iterations", "the trainer has no tools"))
    found = [(name, getattr(args, name), reason) for name, reason in names if is_set(args, name)]
    dropout = max((getattr(adapter, "lora_dropout", None) or 0.0 for adapter in adapters), default=0.0)
    if dropout and args.disable_dropout:
        reason = (
            "disable_dropout=True, so that gaps measure models and not noise; set that to False to train with dropout"
        )
        found.append(("lora_dropout", dropout, reason))
    return found


def warn(found: Iterable[tuple[str, Any, str]], args: Any) -> None:
    """One line for each setting without effect, on the first process."""
    if args.process_index == 0:
        for name, value, reason in found:
            logger.warning("%s=%s has no effect: %s", name, _shown(value), reason)


def is_set(args: Any, name: str) -> bool:
    """Whether a setting has another value than its default; not, where this version of transformers does not have it."""
    if name not in args.__dataclass_fields__:
        return False
    default = args.__dataclass_fields__[name]
    usual = default.default_factory() if callable(default.default_factory) else default.default
    value = getattr(args, name)
    return getattr(value, "value", value) != usual


def _is_loaded_here(teacher: Any) -> bool:
    return isinstance(teacher, str) and teacher not in OWN_TEACHERS and not is_server(teacher)


_ABSENT = object()


def _value(args: Any, name: str, absent: Any = _ABSENT) -> Any:
    value = args
    for part in name.split("."):
        if value is None:
            return absent
        value = getattr(value, part, absent)
    return value


def _optim(args: Any) -> str:
    return str(getattr(args.optim, "value", args.optim))


def _is_adam(args: Any) -> bool:
    """Whether transformers hands the optimizer `adam_beta1`, `adam_beta2` and `adam_epsilon`."""
    name = _optim(args)
    return ("adam" in name or "ademamix" in name) and not any(word in name for word in ("galore", "grokadamw"))


def _shown(value: Any) -> str:
    return short(getattr(value, "value", value))
