"""What stands before the first step: checks that cost nothing first, then those of data, models and memory."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object, is_peft_model
from datasets import Dataset, IterableDataset
from transformers import AutoConfig, PreTrainedTokenizerBase, TrainerCallback
from transformers.utils.logging import get_log_levels_dict
from trl.trainer.utils import get_config_model_id

from . import live_tasks, loss, rollout_servers, setting_rules, vllm_rollouts
from .ahead import AheadCheck
from .best import check_metric
from .callbacks.branch_moments import BranchMoments
from .callbacks.completions import CompletionsTable
from .callbacks.console import Console, replace_printers
from .callbacks.diagnostics import Diagnostics
from .callbacks.engine_logps import EngineLogps
from .callbacks.guards import Guards
from .callbacks.metrics_file import MetricsFile
from .callbacks.teacher_watch import TeacherWatch
from .callbacks.update import UpdateMeasures
from .config import CaMOPDConfig
from .evaluation import warn_of_overlap
from .forward import disable_functional_dropout
from .hub import need_weights
from .learning_rate import check_passed
from .masters import check_masters, need_trained, quantised_adapters, restore_adapters, round_by_step
from .messages import BYTES_PER_TOKEN, MOST_BYTES
from .method_rules import check_ddp_timeout
from .packing import packing_pays
from .precision import compute_dtype, forward_dtype, settle_precision
from .prompts import HeldOut, PromptReader, PromptStream, StepDataset, held_out, rows_to_check
from .samples import MicroBatch
from .schedule import Schedule
from .step import StepEnd, label
from .surroundings import need_context
from .teacher_prompts import TeacherPrompts, contexts_of
from .teachers.adapters import OWN, check_adapters, configs_of, keep_start_adapter, load_adapter_student
from .teachers.address import OWN_TEACHERS, did_you_mean, has_adapter, without_secrets
from .teachers.base import Teacher
from .teachers.local import LocalTeacher, context_length, on_rope, shares_weights
from .teachers.resolve import resolve_teachers
from .teachers.vllm.teacher import ServerTeacher, connect_servers
from .tokens import embedding_size, head_size, need_end, unended_turn
from .vllm.sampler import Sampler
from .words import in_lines


logger = logging.getLogger(__name__)

PROBED_PROMPTS = 64  # of a branch, whose lengths are looked at before training


@dataclass
class Run:
    """What the trainer's arguments come to, before any model but the student is loaded."""

    model: Any
    quantization_config: Any
    schedule: Schedule
    streams: dict[str, PromptStream]
    dataset: StepDataset
    held_out: HeldOut | None
    teachers: dict[str, Any]  # by branch; servers are connected
    contexts: dict[str, Any]  # branches whose teachers see another prompt, see `teacher_prompts.contexts_of`
    adapters: dict[int, torch.Tensor]  # weights that TRL would cast to 16 bits
    student_name: str  # empty where the model was passed as an object
    max_tokens: int  # of a prompt and its completion
    adapter_loaded: bool  # whether the student's adapter is a saved one
    sampler: Sampler | None  # its rollout servers, connected
    tasks: live_tasks.Loaded | None

    @property
    def prompts(self) -> dict[str, Any]:
        """Datasets by branch."""
        return {branch: stream.dataset for branch, stream in self.streams.items()}


def refuse_unknown(arguments: dict[str, Any]) -> None:
    """Raise `TypeError` for an argument that the trainer does not have."""
    if arguments:
        name = next(iter(arguments))
        way = " Each branch has a teacher of its own: teachers={'general': ..., 'domain': ...}."
        raise TypeError(
            f"CaMOPDTrainer has no argument {name!r}.{way if name.startswith('teacher') else ''} See its docstring."
        )


def prepare(
    model: Any,
    teachers: dict[str, Any] | None,
    args: CaMOPDConfig,
    train_dataset: Any,
    eval_dataset: Any,
    processing_class: Any,
    callbacks: Iterable[Any],
    optimizers: tuple[Any, Any],
    quantization_config: Any,
    peft_config: Any,
    tools: Any,
) -> Run:
    """Check the arguments of the trainer, data and names first, and connect to servers. Raises what is wrong with them."""
    show_log(args)
    if args.optimizer_moments == "per_branch" and optimizers[0] is not None:
        raise ValueError(
            f"optimizer_moments='per_branch' is an AdamW of its own, but a {type(optimizers[0]).__name__} was passed. "
            "Leave optimizer_moments at 'shared', or pass no optimizer."
        )
    schedule = Schedule.parse(args.schedule)
    streams = _make_streams(train_dataset, args, schedule)
    held = None if eval_dataset is None else held_out(eval_dataset, schedule, "eval_dataset", args.prefill)
    check_metric(args, schedule.branches, held or {}, callbacks)
    tasks = live_tasks.load(args, held)
    check_passed(args, *optimizers)
    specs = _teachers_by_branch(teachers, args, schedule, model, peft_config)
    loss.need_distributions(args, specs)
    contexts = contexts_of(args.teacher_prompt, streams, held or {}, specs)
    check_adapters(model, peft_config, specs.values())
    if isinstance(processing_class, PreTrainedTokenizerBase):
        need_end(processing_class)
    setting_rules.refuse_arguments(model, quantization_config)
    vllm_rollouts.check_length(args, args.max_prompt_length + args.longest_completion)
    vllm_rollouts.check_student(model, args, quantization_config)
    vllm_rollouts.refuse_tools(args, tools)
    adapters = configs_of(model, peft_config)
    setting_rules.warn(setting_rules.arguments_without_effect(args, specs, optimizers[0], adapters, tools), args)
    max_tokens = args.max_prompt_length + args.longest_completion
    specs = connect_servers(specs, max_tokens, args.teacher_timeout)
    check_ddp_timeout(args, any(isinstance(spec, ServerTeacher) for spec in specs.values()))
    sampler = rollout_servers.connect(args, tools, max_tokens)
    dataset = _make_dataset(streams, schedule, args)
    if _is_zero3(args) and (args.use_vllm or sampler) and not args.ds3_gather_for_generation:
        raise ValueError(
            "ds3_gather_for_generation=False leaves the weights of ZeRO-3 in shards, and vLLM needs them whole. Leave it "
            "at True with use_vllm=True or rollout_servers."
        )
    student_name = model if isinstance(model, str) else ""
    adapter_loaded = bool(student_name) and has_adapter(student_name)
    if adapter_loaded:
        model, quantization_config = _load_adapter(student_name, args, quantization_config), None
    elif student_name:
        _need_student(student_name, args)
    if "adapter_start" in [spec for spec in specs.values() if isinstance(spec, str)]:
        _keep_start(model, args)
    return Run(
        model, quantization_config, schedule, streams, dataset, held, specs, contexts, quantised_adapters(model),
        student_name, max_tokens, adapter_loaded, sampler, tasks,
    )  # fmt: skip


def _need_student(model: str, args: CaMOPDConfig) -> None:
    """Raise `ValueError` where the student is neither here nor on the Hub; transformers does not say which model is not."""
    where = ("revision", "subfolder", "cache_dir", "token", "trust_remote_code")
    init_kwargs = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    try:
        need_weights(model)
        AutoConfig.from_pretrained(model, **{name: init_kwargs[name] for name in where if name in init_kwargs})
    except OSError as error:
        raise ValueError(
            f"the student {model!r} cannot be loaded: {error}{did_you_mean(model)}\nGive model_name_or_path the folder of "
            "a model or its id on the Hub, and for a private or gated one set HF_TOKEN or run `hf auth login`."
        ) from error


def check_ready(trainer: Any, run: Run, optimizer: Any, tokenizer: Any) -> None:
    """Check the student that the parent's `__init__` has made, and the prompts with its tokenizer. Raises `ValueError`."""
    args, accelerator, model = trainer.args, trainer.accelerator, trainer.model
    need_end(tokenizer)
    restore_adapters(model, run.adapters, accelerator)
    check_masters(model, args, accelerator, optimizer)
    settle_precision(accelerator, args.bf16)
    setting_rules.refuse_of_accelerator(accelerator, trainer.get_tp_size())
    need_trained(optimizer, model)
    if args.disable_dropout:
        disable_functional_dropout(model)
    if trainer._is_vlm:
        raise ValueError(
            f"{get_config_model_id(model.config)!r} takes images, which no teacher can score yet. Pass its tokenizer as "
            "`processing_class` to train it on text."
        )
    need_context(context_length(model.config), args.max_prompt_length, args.longest_completion, on_rope(model.config))
    maps = {branch: each.dataset for branch, each in run.streams.items() if isinstance(each.dataset, Dataset)}
    for reader in (trainer.reader, trainer.teacher_prompts):
        reader.check({branch: rows_to_check(branch, dataset) for branch, dataset in maps.items()})
        reader.check(run.held_out or {})
    warn_of_overlap(maps, run.held_out or {})
    _check_prompt_lengths(trainer, run.streams)
    if trainer.use_vllm:
        vllm_rollouts.settle(trainer, run.max_tokens)
    run.model, run.adapters = None, {}  # nothing else needs them
    if unended := unended_turn(tokenizer, trainer.eos_token_ids):
        logger.warning(unended)


def make_readers(trainer: Any, student: Any) -> tuple[PromptReader, TeacherPrompts]:
    """They read prompts as the trainer's generation does; `student` is the model outside wrappers."""
    args = trainer.args
    if args.split_special_tokens and trainer.tools:
        raise ValueError(
            "split_special_tokens=True cannot be used with tools: TRL encodes what they answer, with special tokens. Leave "
            "one of them out."
        )
    reader = PromptReader(
        trainer.processing_class, trainer._tokenizer, embedding_size(student), trainer.tools, trainer.chat_template,
        trainer.chat_template_kwargs, args.split_special_tokens,
        max(MOST_BYTES, BYTES_PER_TOKEN * args.max_prompt_length),
    )  # fmt: skip
    return reader, TeacherPrompts(reader, trainer._tokenizer, trainer.run.contexts, args.max_prompt_length)


def load_teachers(trainer: Any, run: Run) -> dict[str, Teacher]:
    """The teacher of each branch, see `resolve_teachers`, after a last check of the student."""
    args, accelerator, student = trainer.args, trainer.accelerator, trainer.student
    _check_student(student.model, args, student.packed)
    return resolve_teachers(
        run.teachers,
        student=student.model,
        student_forward=student,
        tokenizer=trainer._tokenizer,
        max_tokens=run.max_tokens,
        device=accelerator.device,
        autocast=accelerator.autocast,
        batch_size=args.score_rows,
        padding_free=args.padding_free,
        student_dtype=forward_dtype(accelerator, student.model),
        init_kwargs={
            "attn_implementation": student.model.config.get_text_config()._attn_implementation,
            "trust_remote_code": args.trust_remote_code,
            **(args.teacher_model_init_kwargs or {}),
        },
    )


def observe_optimizer(trainer: Any, given: Any) -> None:
    """Have the trainer's callbacks told of an optimizer and of each of its steps, once."""
    optimizer = getattr(given, "optimizer", given)  # under what accelerate wrapped around it in an earlier `train`
    if optimizer is trainer.observed_optimizer or not isinstance(optimizer, torch.optim.Optimizer):
        return

    def stepped(*_: Any) -> None:
        if trainer.step is not None:  # FSDP2 steps once on resume, before any step, to have moments to load into
            trainer.notify("on_optimizer_stepped", trainer.step, optimizer)

    trainer.observed_optimizer = optimizer
    trainer.notify("on_optimizer_created", optimizer)
    round_by_step(trainer.args, optimizer, lambda: trainer.state.global_step, trainer.is_fsdp_enabled)
    # A hook of the optimizer itself: DeepSpeed steps shards of its own, and clears their gradients.
    optimizer.register_step_post_hook(stepped)


def make_tasks(trainer: Any, run: Run) -> live_tasks.LiveTasks | None:
    """What measures `eval_tasks`, if any."""
    sharded = trainer.is_fsdp_enabled or _is_zero3(trainer.args)
    return None if run.tasks is None else live_tasks.make(run.tasks, trainer, sharded, gather_object)


def add_measures(trainer: Any, run: Run) -> None:
    """Give the trainer the callbacks of a run."""
    if not trainer.args.verbose:
        replace_printers(trainer)
    for callback in _measures(trainer, run):
        trainer.add_callback(callback)


def _measures(trainer: Any, run: Run) -> Iterator[TrainerCallback]:
    """Of these all but the first and `StepEnd` can be left out, and the trainer trains as before."""
    args, student = trainer.args, trainer.student.model
    yield BranchMoments(run.schedule)
    dtype = compute_dtype(trainer.accelerator, student)
    if args.rollout_lag:
        yield AheadCheck(trainer.rollouts)
    here = [name for name, each in trainer.teachers.items() if isinstance(each, (LocalTeacher, *OWN))]
    exact = [name for name in here if name not in run.contexts]
    yield Guards(args, args.per_branch("score"), trainer.is_deepspeed_enabled, dtype, exact)
    if args.student_logps != "trainer":
        yield EngineLogps(args, dtype, trainer.rule.needs_entropy)
    if args.diagnostics_steps:

        def loss_of(batch: MicroBatch) -> torch.Tensor:
            return trainer.loss_of(batch, model=trainer.model)[0]

        yield Diagnostics(args, run.schedule, student, trainer.batcher, loss_of, trainer.accelerator, gather_object)
    if args.log_completions:
        yield CompletionsTable(args, trainer.processing_class, gather_object, lambda: trainer.model.training)
    yield UpdateMeasures(student, gather_object)
    yield TeacherWatch(
        trainer.scorer, run.schedule, trainer._tokenizer, run.max_tokens, trainer.eos_token_ids, head_size(student),
        run.student_name, gather_object, run.contexts,
    )  # fmt: skip
    yield StepEnd(trainer.end_step)
    yield MetricsFile(gather_object, lambda: trainer.held_out_results)  # after `StepEnd`, in which all of them measure
    labels = {label(tuple(run.schedule.shares(number))) for number in range(run.schedule.period)}
    yield Console(run.schedule.branches, sorted(labels), lambda: trainer.held_out_results, args.verbose,
                  trainer.is_world_process_zero())  # fmt: skip


def _check_student(student: Any, args: CaMOPDConfig, packed: bool | None) -> None:
    """Warn of a way to forward that costs more, and raise `ValueError` where ZeRO-3 could not generate."""
    if packed and not packing_pays(student):
        logger.warning(
            "padding_free=True with attn_implementation=%r masks a square of all tokens of a micro-batch: of many, it "
            "costs more than padding. Load the model with flash attention or flex_attention, or leave padding_free out.",
            student.config.get_text_config()._attn_implementation,
        )
    here = not (args.use_vllm or args.rollout_servers) and args.ds3_gather_for_generation
    if _is_zero3(args) and here and args.device.type == "cuda":
        check_gathered_weights(student, torch.cuda.get_device_properties(args.device).total_memory)


def check_gathered_weights(model: Any, memory: int) -> None:
    """Raise `ValueError` when the whole model does not fit into `memory` bytes; ZeRO-3 gathers it there to generate."""
    # ZeRO-3 keeps a parameter's size elsewhere
    sizes = [(getattr(weight, "ds_numel", weight.numel()), weight.element_size()) for weight in model.parameters()]
    weights, needed = sum(number for number, _ in sizes), sum(number * size for number, size in sizes)
    if needed > memory:
        raise ValueError(
            f"to generate, ZeRO-3 gathers all {weights / 1e9:.2f} billion weights on every GPU: {needed / 2**30:.1f} GiB, "
            f"and this one has {memory / 2**30:.1f} GiB. Set use_vllm=True with vllm_mode='server', rollout_servers, or "
            "ds3_gather_for_generation=False, which generates with weights in shards, slowly."
        )


def show_log(args: CaMOPDConfig) -> None:
    """Show what camopd says, once, unless the program has its own logging; `log_level` and `log_level_replica` decide."""
    log = logging.getLogger("camopd")
    if not args.should_log and args.log_level_replica == "warning":  # the default; the others would say the same
        log.setLevel(logging.ERROR)
        return
    level = get_log_levels_dict().get(args.log_level if args.should_log else args.log_level_replica)
    if not log.hasHandlers():
        log.addHandler(in_lines(logging.StreamHandler()))
        level = logging.INFO if level is None else level
    if level is not None:  # "passive" leaves it to the program
        log.setLevel(level)


def _is_zero3(args: CaMOPDConfig) -> bool:
    return args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3


def _make_streams(datasets: Any, args: CaMOPDConfig, schedule: Schedule) -> dict[str, PromptStream]:
    if not isinstance(datasets, dict):
        raise TypeError(
            f"train_dataset must map each branch to its prompts, {{{', '.join(map(repr, schedule.branches))}}} -> Dataset, "
            f"got {type(datasets).__name__}."
        )
    for _, text in schedule.mismatches("train_dataset", datasets):
        raise ValueError(text)
    seed = args.seed if args.data_seed is None else args.data_seed
    streams = {
        branch: PromptStream(datasets[branch], branch, seed, bool(args.shuffle_dataset), args.prefill)
        for branch in schedule.branches
    }
    if args.dataloader_num_workers and any(isinstance(each.dataset, IterableDataset) for each in streams.values()):
        reason = "streamed prompts are read in this process"  # several would each see a part of the stream
        setting_rules.warn([("dataloader_num_workers", args.dataloader_num_workers, reason)], args)
        args.dataloader_num_workers, args.dataloader_persistent_workers = 0, False
        args.dataloader_prefetch_factor = args.dataloader_multiprocessing_context = None
    return streams


def _make_dataset(streams: dict[str, PromptStream], schedule: Schedule, args: CaMOPDConfig) -> StepDataset:
    assert args.gradient_accumulation_steps is not None  # set by the config
    return StepDataset(
        streams,
        schedule,
        rows_per_step=args.prompts_per_step,
        num_steps=args.max_steps,
        micro_steps=args.gradient_accumulation_steps,
        rank=args.process_index,
        world_size=args.world_size,
    )


def _teachers_by_branch(
    teachers: dict[str, Any] | None, args: CaMOPDConfig, schedule: Schedule, model: Any, peft_config: Any
) -> dict[str, Any]:
    given: Any = args.teachers if teachers is None else teachers
    if not isinstance(given, dict):
        raise TypeError(
            f"teachers must map each branch of schedule {str(schedule)!r} to its teacher, got "
            f"{without_secrets(repr(given))}. Pass teachers={{...}} to the trainer or set it in the config."
        )
    for _, text in schedule.mismatches("teachers", given):
        raise ValueError(text)
    for branch, teacher in given.items():
        if shares_weights(teacher, model):
            raise ValueError(
                f"the teacher of branch {branch!r} is the student object itself, or has weights of it, and would change as "
                "it trains. Pass the path it was loaded from, a copy.deepcopy of it, or 'adapter_off' if it has an "
                "adapter: PEFT puts that into the very model that it is given."
            )
        if not (isinstance(teacher, str) and teacher in OWN_TEACHERS):
            continue
        trained = has_adapter(model) if isinstance(model, str) else is_peft_model(model)
        if teacher == "adapter_start" and (not trained or peft_config is not None):
            raise ValueError(
                f"the teacher of branch {branch!r} is 'adapter_start', the student with its adapter as it was before "
                "training, but the student comes without one, or gets a new one by peft_config. Pass a PeftModel or the "
                "folder of a saved adapter as `model`, and no peft_config; for new LoRA weights on a specialised model, "
                "'adapter_off' is that model."
            )
        if teacher == "adapter_off" and not trained and peft_config is None:
            raise ValueError(
                f"the teacher of branch {branch!r} is 'adapter_off', the student without its adapter, but the student has "
                "none. Pass peft_config=LoraConfig(...) to the trainer, or name a model or server as teacher."
            )
    return {branch: given[branch] for branch in schedule.branches}


def _load_adapter(path: str, args: CaMOPDConfig, quantization_config: Any) -> Any:
    kwargs = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    if args.world_size > 1:
        kwargs["device_map"] = None
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    return load_adapter_student(path, kwargs)


def _keep_start(model: Any, args: CaMOPDConfig) -> None:
    keep_start_adapter(model)
    saved = model.peft_config["default"].modules_to_save
    if args.use_vllm and saved:
        raise ValueError(
            f"'adapter_start' with use_vllm=True cannot have modules_to_save={sorted(saved)}: the copies of them have no "
            "place in vLLM. Use transformers' generation, or a server for that teacher."
        )


def _check_prompt_lengths(trainer: Any, streams: dict[str, PromptStream]) -> None:
    """Raise `ValueError` when every prompt of a branch, as far as seen, would lose its beginning: a mistaken cap."""
    limit = trainer.args.max_prompt_length
    for branch, stream in streams.items():
        rows = list(stream.some(PROBED_PROMPTS))
        found = trainer.reader.ids(rows)
        trainer.teacher_prompts.ids(rows, found)
        shortest = min(map(len, found))
        if shortest > limit:
            raise ValueError(
                f"the {len(rows)} prompts of branch {branch!r} that were looked at are all longer than "
                f"max_prompt_length={limit} tokens; the shortest has {shortest}. They would all lose their beginnings. "
                "Raise max_prompt_length, or give shorter prompts."
            )
