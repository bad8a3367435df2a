"""`CaMOPDTrainer`: one optimizer step of CaMOPD on top of TRL's `DistillationTrainer`.

    prompts -> rollout -> score -> select -> loss -> optimizer
    of the     student    teacher  Eq. 6-8   Eq. 9
    branch     T = 1      of the   over all  kept samples only
                          branch   ranks

The methods stand in that order. This is the only file that overrides TRL privates.
"""

from __future__ import annotations

import atexit
import itertools
import json
import logging
import math
import textwrap
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from accelerate.utils import gather_object, is_peft_model
from datasets import Dataset, IterableDataset
from huggingface_hub import snapshot_download
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, PredictionOutput, get_last_checkpoint
from transformers.utils.logging import get_log_levels_dict
from trl import DistillationTrainer
from trl.extras.profiling import profiling_context
from trl.trainer.utils import get_config_model_id

from . import diagnostics, metrics, setting_rules, token_rules
from .best import check_metric
from .card import write_model_card
from .completions import log_completions
from .config import CaMOPDConfig
from .errors import CaMOPDError, ResumeError, TeacherError
from .exchange import Kept, Trained, attention_cost, exchange, in_micro_steps, plan
from .generation import neutral_generation
from .hub import CheckpointPushes, hub_errors, is_hub_id, public_name, why_not
from .learning_rate import check_passed
from .logprobs import (
    SampledLogps,
    architecture,
    check_logps,
    completion_logps,
    completion_top_k,
    in_length_sorted_batches,
    keeps_rows_apart,
    padding_free_for,
    saves_padding,
    settle_padding_free,
)
from .masters import (
    ChangedShare,
    check_masters,
    quantised_adapters,
    restore_adapters,
    round_alike,
    rounds_stochastically,
)
from .messages import read_row, render, tokenize
from .objective import distillation_loss, gap_scores, importance_weights, select_by_mass, token_gaps
from .optimizer import BranchAdamW, local, update_products
from .precision import forward_dtype, keep_outputs_whole
from .processes import let_threads_rest
from .prompts import PromptDealer, PromptStream, fingerprint, held_out, named, rows_to_check
from .rollouts import Rollouts
from .schedule import Schedule
from .teachers.adapters import check_adapters, keep_start_adapter, load_adapter_student
from .teachers.address import ADAPTER_TEACHERS, has_adapter
from .teachers.base import RemoteTeacher, Teacher, TokenScores, by_row
from .teachers.check import Probe, check_scores, has_lost_its_weights, initial_kl, is_student_start, raise_errors
from .teachers.local import LocalTeacher, context_length, shares_weights
from .teachers.resolve import resolve_teachers
from .teachers.vllm.teacher import ServerTeacher, connect_servers
from .tokens import check_known, embedding_size, head_size, need_end, unended_turn


logger = logging.getLogger(__name__)
atexit.register(let_threads_rest)  # or a run that is done may end with SIGABRT

PROBED_PROMPTS = 64  # of a branch, whose lengths are looked at before training
HUB_CHECKPOINT = "last-checkpoint"  # transformers' name for it
RUN_RECORD = "camopd.json"  # in every checkpoint: what the run must still be when it goes on
_RECORDED = (
    "prompts_per_step", "seed", "data_seed", "max_prompt_length", "max_completion_length", "learning_rate",
    "importance_sampling_mode", "importance_sampling_low", "importance_sampling_high", "loss_prefix_tokens",
    "optimizer_moments", "gap_student", "token_rule", "relaxed_mixture", "relaxed_entropy_share",
    "relaxed_exploration_steps", "selectkd_reject_weight", "loss_normalization", "branch_weights",
)  # fmt: skip


class LossTerms(NamedTuple):
    """What all micro-batches of an optimizer step share in the loss."""

    num_kept: int  # samples
    num_tokens: int | None  # None with loss_normalization="sample"
    scale: dict[str, float]  # per branch


class CaMOPDTrainer(DistillationTrainer):
    """
    Trainer for CaMOPD, Counteraction-Aware Multi-Teacher On-Policy Distillation (https://arxiv.org/abs/2605.27115):
    brings general abilities back to a specialised model and keeps its domain.

    What differs from [`~trl.DistillationTrainer`]:

    - the *training set* is one prompt stream per branch, dealt by `args.schedule`, every rank in the same branch;
    - the *teacher* is that of the branch, and gives log-probs of the sampled tokens only;
    - the *loss* is Eq. 9, on the samples that Eq. 8 selects over the whole step and all ranks; the others cost no forward
      or backward;
    - *evaluation* reports gaps per branch, and `metrics.jsonl` in `output_dir` gets a line per optimizer step.

    Generation, vLLM, PEFT, DeepSpeed/FSDP, tools, checkpoints and the Hub are inherited.

    Example:

    ```python
    trainer = CaMOPDTrainer(
        model="Intelligent-Internet/II-Medical-8B",
        teachers={"general": "http://localhost:8001", "domain": "http://localhost:8002"},
        args=CaMOPDConfig(output_dir="ii-medical-8b-camopd"),
        train_dataset={"general": general_prompts, "domain": domain_prompts},
    )
    trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The specialised model to train. The folder of a saved adapter is its base model with that adapter, which is
            trained on.
        teachers (`dict`, *optional*, defaults to `args.teachers`):
            Teacher of each branch of the schedule: URL of a vLLM server or a list of URLs (replicas), model id, path
            or loaded model (in-process), `"adapter_off"` (a LoRA student without its adapter), `"adapter_start"` (with its
            adapter as it was before training), or any [`~camopd.Teacher`].
        args ([`CaMOPDConfig`], *optional*):
            Configuration. Defaults to the paper's.
        train_dataset (`dict[str, Dataset | IterableDataset]`):
            Prompts of each branch, with a column `prompt`: a text or a list of messages.
        eval_dataset (`dict[str, Dataset | IterableDataset]` or `Dataset`, *optional*):
            Held-out prompts of some or all branches; a `Dataset` has them in a column `branch`. Streams are read whole.
        processing_class, callbacks, optimizers, quantization_config, peft_config, tools:
            As in [`~trl.DistillationTrainer`].
    """

    _tag_names: ClassVar[list[str]] = ["camopd", "trl", "on-policy-distillation"]
    _name = "CaMOPD"
    _paper: ClassVar[dict[str, str]] = {
        "title": "Counteraction-Aware Multi-Teacher On-Policy Distillation for General Capability Recovery with "
        "Domain Preservation",
        "id": "2605.27115",
        "citation": textwrap.dedent("""\
            @article{chen2026camopd,
                title   = {{Counteraction-Aware Multi-Teacher On-Policy Distillation for General Capability Recovery with Domain Preservation}},
                author  = {Tianlei Chen and Jiao Ou and Ziyuan Liu and Ruiming Tang and Jian Liang and Han Li},
                year    = 2026,
                eprint  = {arXiv:2605.27115},
            }"""),  # noqa: E501
    }

    args: CaMOPDConfig
    log_completions: bool

    def __init__(
        self,
        model: Any,
        teachers: dict[str, Any] | None = None,
        args: CaMOPDConfig | None = None,
        train_dataset: dict[str, Dataset | IterableDataset] | None = None,
        eval_dataset: dict[str, Dataset | IterableDataset] | Dataset | None = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: list[Callable] | None = None,
        **unknown: Any,
    ):
        if unknown:
            name = next(iter(unknown))
            way = " Each branch has a teacher of its own: teachers={'general': ..., 'domain': ...}."
            raise TypeError(
                f"CaMOPDTrainer has no argument {name!r}.{way if name.startswith('teacher') else ''} See its docstring."
            )
        if args is None:
            model_id = model if isinstance(model, str) else get_config_model_id(model.config)
            args = CaMOPDConfig(f"{model_id.split('/')[-1]}-CaMOPD")
        assert args.gradient_accumulation_steps is not None
        assert args.score_batch_size is not None  # set by the config
        _show_log(args)
        if args.optimizer_moments == "per_branch" and optimizers[0] is not None:
            raise ValueError(
                f"optimizer_moments='per_branch' is an AdamW of its own, but a {type(optimizers[0]).__name__} was passed. "
                "Leave optimizer_moments at 'shared', or pass no optimizer."
            )
        # The data and the names first: they cost nothing to check, the models do.
        self.schedule = Schedule.parse(args.schedule)
        self._score_batch_size = args.score_batch_size
        self._settings = {name: args.per_branch(name) for name in ("mass_target", "scale", "score", "selection")}
        streams = self._make_streams(train_dataset, args)
        held = None if eval_dataset is None else held_out(eval_dataset, self.schedule, "eval_dataset")
        setting_rules.read_streams_in_this_process(args, [stream.dataset for stream in streams.values()])
        check_metric(args, self.schedule.branches, held or {}, callbacks or [])
        check_passed(args, *optimizers)
        teachers = self._teachers_by_branch(teachers, args, model, peft_config)
        check_adapters(model, peft_config, teachers.values())
        if isinstance(processing_class, PreTrainedTokenizerBase):
            need_end(processing_class)
        setting_rules.refuse_arguments(model, quantization_config)
        setting_rules.warn(
            setting_rules.arguments_without_effect(args, teachers, optimizers[0], peft_config, tools), args
        )
        max_tokens = args.max_prompt_length + args.longest_completion
        student_name = model if isinstance(model, str) else ""
        teachers = connect_servers(teachers, max_tokens, args.teacher_patience)
        dealer = PromptDealer(
            streams,
            self.schedule,
            rows_per_step=args.prompts_per_step,
            num_steps=args.max_steps,
            micro_steps=args.gradient_accumulation_steps,
            rank=args.process_index,
            world_size=args.world_size,
        )
        zero3 = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
        if zero3 and args.use_vllm and not args.ds3_gather_for_generation:
            raise ValueError(
                "ds3_gather_for_generation=False leaves the weights of ZeRO-3 in shards, and vLLM needs them whole. Leave "
                "it at True with use_vllm=True."
            )
        if isinstance(model, str) and has_adapter(model) and peft_config is None:
            kwargs = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
            if args.world_size > 1:
                kwargs["device_map"] = None
            if quantization_config is not None:
                kwargs["quantization_config"], quantization_config = quantization_config, None
            model = load_adapter_student(model, kwargs)
        if "adapter_start" in [teacher for teacher in teachers.values() if isinstance(teacher, str)]:
            keep_start_adapter(model)
            if args.use_vllm and model.peft_config["default"].modules_to_save:
                raise ValueError(
                    f"'adapter_start' with use_vllm=True cannot have modules_to_save="
                    f"{sorted(model.peft_config['default'].modules_to_save)}: the copies of them have no place in vLLM. "
                    "Use transformers' generation, or a server for that teacher."
                )
        adapters = quantised_adapters(model)
        super().__init__(
            model=model,
            args=args,
            train_dataset=dealer,
            eval_dataset=held,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            tools=tools,
        )
        need_end(self._tokenizer)
        restore_adapters(self.model, adapters, self.accelerator)
        check_masters(self.model, args, self.accelerator, optimizers[0])
        keep_outputs_whole(self.accelerator)
        setting_rules.refuse_of_accelerator(self.accelerator, self.get_tp_size())
        if optimizers[0] is not None:
            setting_rules.refuse_optimizer(optimizers[0], self.model)
        if args.disable_dropout:
            setting_rules.disable_functional_dropout(self.model)
        if self._is_vlm:
            raise ValueError(
                f"{get_config_model_id(self.model.config)!r} takes images, which no teacher can score yet. Pass its "
                "tokenizer as `processing_class` to train it on text."
            )
        if max_tokens > context_length(self.model.config):
            raise ValueError(
                f"the student takes sequences of {context_length(self.model.config):.0f} tokens, but max_prompt_length + "
                f"max_completion_length is {args.max_prompt_length} + {args.max_completion_length} = {max_tokens}. Lower "
                "max_completion_length."
            )
        student = self.accelerator.unwrap_model(self.model)
        self._head_size, self._known_tokens = head_size(student), embedding_size(student)
        known = {branch: stream.dataset for branch, stream in streams.items() if isinstance(stream.dataset, Dataset)}
        self._check_messages(itertools.starmap(rows_to_check, known.items()))
        self._check_messages((held or {}).values())
        self._check_prompt_lengths(streams)
        unended = unended_turn(self._tokenizer, self.eos_token_ids)
        if unended:
            logger.warning(unended)
        self._padding_free = padding_free_for(student, args.padding_free)
        self._probed = False
        if self._padding_free and not saves_padding(student):
            logger.warning(
                "padding_free=True with attn_implementation=%r masks a square of all tokens of a micro-batch, which costs "
                "more than padding. Load the model with flash attention or flex_attention.",
                student.config.get_text_config()._attn_implementation,
            )
        if zero3 and not args.use_vllm and args.ds3_gather_for_generation and args.device.type == "cuda":
            memory = torch.cuda.get_device_properties(args.device).total_memory
            check_gathered_weights(student, memory)
        self._attention_cost = attention_cost(student)
        self.teachers: dict[str, Teacher] = resolve_teachers(
            teachers,
            student=student,
            student_forward=self._student_forward,
            tokenizer=self._tokenizer,
            max_tokens=max_tokens,
            device=self.accelerator.device,
            autocast=self.accelerator.autocast,
            batch_size=args.score_batch_size,
            padding_free=args.padding_free,
            student_dtype=forward_dtype(self.accelerator, student),
            init_kwargs={
                "attn_implementation": student.config.get_text_config()._attn_implementation,
                "trust_remote_code": args.trust_remote_code,
                **(args.teacher_model_init_kwargs or {}),
            },
        )
        if self.use_vllm:
            # The parent asks the sampler for no log-probs; w_t is the ratio to them. 0 means the sampled token only.
            self.vllm_generation.logprobs = 0

        self._prompts = {branch: stream.dataset for branch, stream in streams.items()}
        self._record = {
            "schedule": str(self.schedule),
            "branches": list(self.schedule.branches),
            # Without folders: a checkpoint may be published, and go on where the same model lies elsewhere.
            "teachers": {branch: public_name(teacher.name) for branch, teacher in self.teachers.items()},
            "prompts": {branch: fingerprint(stream.dataset) for branch, stream in streams.items()},
            **self._settings,
            # learning_rate, too: the optimizer state of a checkpoint would go on at its own
            **{name: getattr(args, name) for name in _RECORDED},
            "completion_lengths": args.completion_lengths and str(args.completion_lengths),
        }
        self._teachers_checked = False
        self._branches_met: set[str] = set()
        # The weights a server may claim to have. A model object may differ from the name in its config.
        self._student_start = student_name
        self._checkpoint: Path | None = None  # the last one written or resumed from
        self._pushes = CheckpointPushes(self, super()._push_from_checkpoint, super()._finish_current_push)
        self._resumed_from: Path | None = None  # the one whose rollouts may be used
        self._last_loaded_step = -1  # step whose weights vLLM has, as in the parent
        self._micro_batches: list[dict[str, Any] | None] = []
        self._turns: list[tuple[list[int], list[int], list[float]]] = []  # of vLLM: prompt, completion, log-probs
        self._empty_rows: set[int] | None = None
        self._prompts_cut = 0
        self._rows: list[dict[str, Any]] = []  # of the rollout
        self._logs["branch"] = deque(maxlen=self._logs["prompt"].maxlen)
        self._step_metrics: dict[str, Any] = {}
        self._update_products: Tensor | None = None
        self._sketch: diagnostics.Sketch | None = None  # of the step's gradient, on this process
        self._branch_sketches: dict[str, tuple[Tensor, float]] = {}  # and its norm, latest step of a branch last
        self._watched = diagnostics.last_block(student)
        if args.diagnostics_steps and not self._watched[1]:
            diagnostics.warn_of_no_layers(student)
        self._best: tuple[int | None, int] = (None, 0)  # step of the checkpoint loaded at the end, log entries then
        self._branch_optimizer: BranchAdamW | None = None
        self._changed: ChangedShare | None = None
        self._observed_optimizer: Any = None
        self._loss_sum = torch.zeros(())
        self._eval_rows: dict[int, dict[str, Any]] = {}  # by position
        self.add_callback(metrics.MetricsFile(self))

    # ------------------------------------------------------------------------------------------ data and teachers

    def _make_streams(self, datasets: Any, args: CaMOPDConfig) -> dict[str, PromptStream]:
        if not isinstance(datasets, dict):
            raise TypeError(
                f"train_dataset must map each branch to its prompts, {{{', '.join(map(repr, self.schedule.branches))}}} "
                f"-> Dataset, got {type(datasets).__name__}."
            )
        self._check_branches(datasets, "train_dataset", "prompts")
        streams = {}
        for branch in self.schedule.branches:
            seed = args.seed if args.data_seed is None else args.data_seed
            streams[branch] = PromptStream(datasets[branch], branch, seed, shuffle=bool(args.shuffle_dataset))
        return streams

    def _teachers_by_branch(
        self, teachers: dict[str, Any] | None, args: CaMOPDConfig, model: Any, peft_config: Any
    ) -> dict[str, Any]:
        given: Any = args.teachers if teachers is None else teachers
        if not isinstance(given, dict):
            raise TypeError(
                f"teachers must map each branch of schedule {str(self.schedule)!r} to its teacher, got {given!r}. "
                "Pass teachers={...} to the trainer or set it in the config."
            )
        self._check_branches(given, "teachers", "teacher")
        for branch, teacher in given.items():
            if shares_weights(teacher, model):
                raise ValueError(
                    f"the teacher of branch {branch!r} is the student object itself, or has weights of it, and would "
                    "change as it trains. Pass the path it was loaded from, a copy.deepcopy of it, or 'adapter_off' if it "
                    "has an adapter: PEFT puts that into the very model that it is given."
                )
            if not (isinstance(teacher, str) and teacher in ADAPTER_TEACHERS):
                continue
            trained = has_adapter(model) if isinstance(model, str) else is_peft_model(model)
            if teacher == "adapter_start" and (not trained or peft_config is not None):
                raise ValueError(
                    f"the teacher of branch {branch!r} is 'adapter_start', the student with its adapter as it was before "
                    "training, but the student comes without one, or gets a new one by peft_config. Pass a PeftModel or "
                    "the folder of a saved adapter as `model`, and no peft_config; for new LoRA weights on a specialised "
                    "model, 'adapter_off' is that model."
                )
            if teacher == "adapter_off" and not trained and peft_config is None:
                raise ValueError(
                    f"the teacher of branch {branch!r} is 'adapter_off', the student without its adapter, but the student "
                    "has none. Pass peft_config=LoraConfig(...) to the trainer, or name a model or server as teacher."
                )
        return {branch: given[branch] for branch in self.schedule.branches}

    def _check_branches(self, mapping: dict[str, Any], argument: str, noun: str) -> None:
        for branch in self.schedule.branches:
            if mapping.get(branch) is None:
                raise ValueError(
                    f"branch {branch!r} of schedule {str(self.schedule)!r} has no {noun}: {argument} has "
                    f"{sorted(mapping)}. Add {argument}[{branch!r}] or take the branch out of the schedule."
                )
        unused = sorted(set(mapping) - set(self.schedule.branches))
        if unused:
            raise ValueError(
                f"{argument} has {unused}, which schedule {str(self.schedule)!r} never visits. Add it to the schedule or "
                f"leave it out."
            )

    def get_train_dataloader(self) -> DataLoader:
        """One item per micro-step, already this rank's own: nothing here is left for accelerate to shard or move."""
        return DataLoader(
            self.train_dataset,
            batch_size=1,
            sampler=SequentialSampler(self.train_dataset),
            collate_fn=_only_item,
            num_workers=self.args.dataloader_num_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            persistent_workers=self.args.dataloader_persistent_workers,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
        )

    def num_examples(self, dataloader: DataLoader) -> int:
        """Prompts of the whole run, for the parent's log lines."""
        if isinstance(dataloader.dataset, PromptDealer):
            return self.args.max_steps * self.args.prompts_per_step
        return super().num_examples(dataloader)

    # ---------------------------------------------------------------------------------------------------- rollout

    def _check_messages(self, datasets: Iterable[Any]) -> None:
        """Raise `ValueError` for messages of prompts, with their names, that the chat template cannot take."""
        for row in itertools.chain.from_iterable(datasets):
            row = named(read_row, row)
            if not isinstance(row["prompt"], str):
                named(partial(self._through_template, render), row)

    def _check_prompt_lengths(self, streams: dict[str, PromptStream]) -> None:
        """Raise `ValueError` when every prompt of a branch, as far as seen, would lose its beginning: a mistaken cap."""
        limit = self.args.max_prompt_length
        for branch, stream in streams.items():
            rows = list(stream.some(PROBED_PROMPTS))
            shortest = min(map(len, self._whole_prompts(rows)))
            if shortest > limit:
                raise ValueError(
                    f"the {len(rows)} prompts of branch {branch!r} that were looked at are all longer than "
                    f"max_prompt_length={limit} tokens; the shortest has {shortest}. They would all lose their beginnings. "
                    "Raise max_prompt_length, or give shorter prompts."
                )

    def _tokenize_prompts(self, prompts: list) -> tuple[list[list[int]], None, dict]:
        rows = self._rows  # of `_roll_out`: what a row has beside its prompt does not come down to here
        if [row["prompt"] for row in rows] != prompts:
            rows = [named(read_row, {"prompt": prompt}) for prompt in prompts]
        prompt_ids = self._whole_prompts(rows)
        limit = self.args.max_prompt_length
        self._prompts_cut = sum(len(ids) > limit for ids in prompt_ids)
        self._turns = []
        self._empty_rows = None
        # The last tokens: the generation prompt must survive.
        return [ids[-limit:] for ids in prompt_ids], None, {}

    def _whole_prompts(self, rows: list[dict[str, Any]]) -> list[list[int]]:
        def read(row: dict[str, Any]) -> list[int]:
            ids = self._through_template(tokenize, row)
            check_known(ids, self._tokenizer, self._known_tokens)
            return ids

        return [named(read, row) for row in rows]

    def _through_template(self, function: Callable[..., Any], row: dict[str, Any]) -> Any:
        return function(row, self.processing_class, self.tools, self.chat_template, self.chat_template_kwargs)

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, has_tool_images=False):
        if self.use_vllm:  # every request names its sampling parameters, so that none is the server's default
            completion_ids = self._generate_with_vllm(prompt_ids)
        else:
            generate = (
                self._generate_and_record if self.args.gap_student == "engine" else super()._generate_single_turn
            )
            with neutral_generation(self.accelerator.unwrap_model(self.model_wrapped)):
                completion_ids = generate(prompt_ids, images, multimodal_fields, has_tool_images)
        if self._empty_rows is None:  # the first turn, the only one that can be a row's whole completion
            # The parent reads the last token of each completion, which an empty one does not have. Stand in one token
            # and take it out again in `_roll_out`.
            self._empty_rows = {row for row, ids in enumerate(completion_ids) if not ids}
            completion_ids = [ids or [self._tokenizer.eos_token_id] for ids in completion_ids]
        return completion_ids

    def _generate_with_vllm(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        """The parent's vLLM branch, keeping the sampler's log-probs, which it throws away."""
        if self.state.global_step != self._last_loaded_step:
            with profiling_context(self, "sync_weights"):
                self.vllm_generation.sync_weights()
            self._last_loaded_step = self.state.global_step
        _, completion_ids, logprobs, _ = self.vllm_generation.generate(
            prompts=prompt_ids, images=None, num_generations=1, profiler=profiling_context(self, "vLLM.generate")
        )
        for ids, completion, row_logprobs in zip(prompt_ids, completion_ids, logprobs, strict=True):
            # The sampled token's own log-prob; vLLM's NaN arrives as None and means: no weight for this token.
            logps = [math.nan if token[0] is None else token[0] for token in row_logprobs]
            self._turns.append((list(ids), list(completion), logps))
        return completion_ids

    def _generate_and_record(self, prompt_ids: list[list[int]], *args: Any) -> list[list[int]]:
        """The parent's transformers branch, keeping the log-prob of each token as it is drawn."""
        recorder = SampledLogps()
        model = self.accelerator.unwrap_model(self.model_wrapped)
        generate = model.generate  # the parent passes no processors through
        own = vars(model).get("generate")  # transformers wraps it under FSDP2

        def generate_and_record(*args: Any, **kwargs: Any) -> Any:
            sequences = generate(*args, logits_processor=[recorder], **kwargs)
            recorder.finish(sequences)
            return sequences

        model.generate = generate_and_record
        try:
            completion_ids = super()._generate_single_turn(prompt_ids, *args)
        finally:
            del model.generate  # of the object; that of its class is there again
            if own is not None:
                model.generate = own
        for ids, completion, logps in zip(prompt_ids, completion_ids, recorder.rows(), strict=True):
            self._turns.append((list(ids), list(completion), logps[: len(completion)]))
        return completion_ids

    def _limit_completions(self, max_tokens: int) -> None:
        """Let completions have so many tokens, with either engine."""
        self.max_completion_length = max_tokens
        self.generation_config.max_new_tokens = self.generation_kwargs["max_new_tokens"] = max_tokens
        if self.use_vllm:
            self.vllm_generation.max_completion_length = max_tokens

    def _roll_out(self, rows: list[dict[str, Any]], max_tokens: int) -> Rollouts:
        """Generate one completion per row, by the parent."""
        self._probe_models()
        self._limit_completions(max_tokens)
        self._rows = [named(read_row, row) for row in rows]  # held-out rows come as they lie in their dataset
        output = super()._generate_and_score_completions([{"prompt": row["prompt"]} for row in self._rows])
        if self.log_completions:
            self._logs["branch"].extend(gather_object([row["branch"] for row in rows]))
        prompt_mask, completion_mask = output["prompt_mask"].bool().cpu(), output["completion_mask"].bool().cpu()
        sampled_mask = completion_mask & output["tool_mask"].bool().cpu() if "tool_mask" in output else completion_mask
        completion_mask[list(self._empty_rows or ())] = False
        prompts, completions = output["prompt_ids"].cpu(), output["completion_ids"].cpu()
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        rollouts = Rollouts(
            branch=[row["branch"] for row in rows],
            position=[row.get("position", place) for place, row in enumerate(rows)],
            token_ids=[],
            prompt_len=[],
            mask=[],
            length=[],
            truncated=[],
            rollout_logps=[] if self._turns else None,
        )
        for row in range(len(rows)):
            prompt = prompts[row][prompt_mask[row]].tolist()
            completion = completions[row][completion_mask[row]].tolist()
            rollouts.token_ids.append(prompt + completion)
            rollouts.prompt_len.append(len(prompt))
            rollouts.mask.append(sampled_mask[row][completion_mask[row]])
            rollouts.length.append(int(rollouts.mask[-1].sum()))
            rollouts.truncated.append(bool(completion) and completion[-1] not in ends)
            if rollouts.rollout_logps is not None:
                rollouts.rollout_logps.append(_logps_of_turns(self._turns, row, len(rows), prompt, completion))
        return rollouts

    # ------------------------------------------------------------------------------------------------------ score

    def _student_forward(
        self, token_ids: list[list[int]], prompt_lens: list[int], with_entropy: bool = False, model: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        """`completion_logps` of the student, inside the DDP/FSDP/DeepSpeed wrapper's forward."""
        model = self.model_wrapped if model is None else model
        unwrapped = self.accelerator.unwrap_model(model)
        with self.accelerator.autocast():
            return self._forward_redirection(
                model, unwrapped, completion_logps, unwrapped, token_ids, prompt_lens,
                self._tokenizer.pad_token_id, with_entropy, self._padding_free,
            )  # fmt: skip

    def _probe_models(self) -> None:
        """See once, before the first rollout, that the log-probs of the student and of teachers in the process are those of
        their own logits, and that rows without padding do not see each other."""
        if self._probed:
            return
        self._probed = True

        def forward(token_ids: list[list[int]], prompt_lens: list[int], padding_free: bool = False) -> Tensor:
            self._padding_free = padding_free
            return self._student_forward(token_ids, prompt_lens)[0]

        packed, student = self._padding_free, self.accelerator.unwrap_model(self.model_wrapped)
        training = self.model.training
        self.model.eval()
        with self.accelerator.autocast():
            check_logps(f"the student ({architecture(student)})", forward, self.model_wrapped, student)
        if packed:
            packed = settle_padding_free(keeps_rows_apart(forward), self.args.padding_free, "the student")
        self._padding_free = packed
        self.model.train(training)
        for teacher in self.teachers.values():
            if isinstance(teacher, LocalTeacher):
                teacher.probe()

    def _student_top_k(self, token_ids: list[list[int]], prompt_lens: list[int]) -> tuple[Tensor, Tensor]:
        """`completion_top_k` of the student, inside the DDP/FSDP/DeepSpeed wrapper's forward."""
        unwrapped = self.accelerator.unwrap_model(self.model_wrapped)
        with self.accelerator.autocast():
            return self._forward_redirection(
                self.model_wrapped, unwrapped, completion_top_k, unwrapped, token_ids, prompt_lens,
                self._tokenizer.pad_token_id, token_rules.SELECTKD_TOP_K,
            )  # fmt: skip

    def _score(
        self, rollouts: Rollouts, branches: list[str], gap_student: str = "trainer", token_rule: str = "none"
    ) -> None:
        """Fill in the teachers' and the student's log-probs, the latter from a forward or from the rollout engine, and what
        a token rule asks for.

        Teachers outside this process score while the student does; those inside it score in the very batches of the
        student, branch by branch. `branches` are those of the step, the same on every rank. Where a rank has fewer rows
        of a branch than another, it adds stand-ins, so that sharded models make the same number of forwards everywhere.

        Raises `CaMOPDError` when a log-prob is missing or not finite, and `TeacherError`, on every rank, when a teacher
        outside has failed one of them.
        """
        self._probe_models()
        size = len(rollouts)
        rollouts.teacher_logps, rollouts.student_logps = ([torch.zeros(0)] * size for _ in range(2))
        rollouts.entropy = [torch.full(mask.shape, math.nan) for mask in rollouts.mask]
        rollouts.teacher_top_ids, rollouts.proposals = ([torch.zeros(0, dtype=torch.long)] * size for _ in range(2))
        top_k = token_rules.SELECTKD_TOP_K if token_rule == "selectkd" else 0
        found: dict[int, TokenScores] = {}
        rows_of = {branch: [row for row, name in enumerate(rollouts.branch) if name == branch] for branch in branches}
        clocks = {branch: _Clock() for branch in branches}
        pending: dict[str, Future[list[TokenScores]]] = {}
        for branch, rows in rows_of.items():
            teacher = self.teachers[branch]
            if isinstance(teacher, RemoteTeacher):
                pending[branch] = teacher.submit(
                    [rollouts.token_ids[row] for row in rows], [rollouts.prompt_len[row] for row in rows], top_k
                )
                pending[branch].add_done_callback(clocks[branch].stop)
        failure: TeacherError | None = None
        training = self.model.training
        self.model.eval()
        for branch, rows in rows_of.items():
            missing = max(gather_object([len(rows)])) - len(rows)
            token_ids = [rollouts.token_ids[row] for row in rows] + [[self._tokenizer.eos_token_id] * 2] * missing
            prompt_lens = [rollouts.prompt_len[row] for row in rows] + [1] * missing
            if branch not in pending:
                clocks[branch] = _Clock()
                try:
                    answers = self.teachers[branch].score(token_ids, prompt_lens, top_k)
                    found.update(by_row(rows, answers, len(token_ids), self.teachers[branch].name))
                except TeacherError as error:
                    failure = failure or error
                clocks[branch].stop()
                clocks[branch].hidden_until = clocks[branch].started
            if token_rule == "selectkd":
                tops = in_length_sorted_batches(self._student_top_k, token_ids, prompt_lens, self._score_batch_size)
                for row, top in zip(rows, tops[: len(rows)], strict=True):
                    rollouts.proposals[row] = token_rules.proposals(*top)
            if gap_student == "engine" and token_rule != "relaxed_opd":  # which needs the entropies
                continue
            own = in_length_sorted_batches(
                lambda ids, lens: self._student_forward(ids, lens, with_entropy=True),
                token_ids,
                prompt_lens,
                self._score_batch_size,
                self._padding_free,
            )
            for row, (logps, entropy) in zip(rows, own[: len(rows)], strict=True):
                rollouts.student_logps[row] = logps
                rollouts.entropy[row] = entropy
        self.model.train(training)
        for branch, future in pending.items():
            clocks[branch].hidden_until = time.perf_counter()
            try:
                rows = rows_of[branch]
                found.update(by_row(rows, future.result(), len(rows), self.teachers[branch].name))
                clocks[branch].stop()  # where the future has not come to its callback yet
            except TeacherError as error:
                failure = failure or error
        self._raise_together(failure)
        for row, answer in found.items():
            rollouts.teacher_logps[row] = answer.logps
            if top_k:
                rollouts.teacher_top_ids[row] = _top_ids(answer, top_k, self.teachers[rollouts.branch[row]].name)
        if gap_student == "engine":
            self._take_engine_logps(rollouts)
        for branch, clock in clocks.items():
            self._step_metrics[f"time/teacher_{branch}"] = clock.seconds
            self._step_metrics[f"time/teacher_{branch}_hidden"] = clock.hidden_seconds
        _check_finite(rollouts, self.teachers)
        self._check_not_uniform(rollouts)

    def _take_engine_logps(self, rollouts: Rollouts) -> None:
        assert rollouts.rollout_logps is not None
        unknown = 0
        for row, (logps, mask) in enumerate(zip(rollouts.rollout_logps, rollouts.mask, strict=True)):
            missing = logps.isnan()
            unknown += int((missing & mask).sum())
            # Tokens that the engine did not sample, or gave no log-prob: no gap there. The loss has its own.
            rollouts.student_logps[row] = torch.where(missing, rollouts.teacher_logps[row], logps)
        if unknown:
            logger.warning(
                "the rollout engine gave no log-prob for %d tokens; their gap counts as 0 at selection", unknown
            )

    def _raise_together(self, error: TeacherError | None) -> None:
        """Raise on every rank what one of them has met; the others would wait for it in the next collective."""
        texts = [text for text in gather_object([None if error is None else str(error)]) if text]
        if texts:
            raise TeacherError(texts[0]) from error

    def _check_teachers(self) -> None:
        """Score a few conversations before the first rollout: a teacher that is wrong in silence costs the whole run."""
        servers = {b: teacher for b, teacher in self.teachers.items() if isinstance(teacher, ServerTeacher)}
        if not servers:
            return
        self._probe_models()
        max_tokens = self.args.max_prompt_length + self.args.longest_completion
        probe = Probe.of(self._tokenizer, max_tokens, self.eos_token_ids)
        training = self.model.training
        self.model.eval()
        own = in_length_sorted_batches(
            self._student_forward, probe.token_ids, probe.prompt_lens, self._score_batch_size, self._padding_free
        )
        self.model.train(training)
        failure = None
        for branch, teacher in servers.items():
            findings = check_scores(
                branch,
                teacher,
                self._tokenizer,
                vocab_size=self._head_size,
                probe=probe,
                student_logps=[row[0] for row in own],
                same_weights=self.state.global_step == 0 and is_student_start(teacher, self._student_start),
            )
            try:
                raise_errors(findings, logger.warning)
            except TeacherError as error:
                failure = failure or error
        self._raise_together(failure)

    def _check_not_uniform(self, rollouts: Rollouts) -> None:
        """A server that lost its weights (a wake-up after sleep, say) finds every token equally likely: -ln V."""
        for branch in dict.fromkeys(rollouts.branch):
            logps = torch.cat(
                [
                    row[mask]
                    for row, mask, name in zip(rollouts.teacher_logps, rollouts.mask, rollouts.branch, strict=True)
                    if name == branch
                ]
            )
            if has_lost_its_weights(logps):
                raise CaMOPDError(
                    f"teacher {branch!r} ({self.teachers[branch].name}) gives every one of {len(logps)} tokens the "
                    f"log-prob {logps.mean():.3f}, as -ln(vocabulary size): it has lost its weights. Restart it; the last "
                    "checkpoint is untouched."
                )

    # ----------------------------------------------------------------------------------------------------- select

    def _apply_token_rule(self, rollouts: Rollouts) -> None:
        """Weights of this rank's tokens by a baseline's rule; the entropy threshold is that of all ranks' tokens."""
        args = self.args
        if args.token_rule == "selectkd":
            rollouts.token_weights = [
                token_rules.acceptance_weights(token_rules.accepted(ids, top_ids), args.selectkd_reject_weight)
                for ids, top_ids in zip(rollouts.proposals, rollouts.teacher_top_ids, strict=True)
            ]
        elif args.token_rule == "relaxed_opd" and self.state.global_step < args.relaxed_exploration_steps:
            rollouts.token_weights = [
                token_rules.above_floor(token_gaps(teacher, student, mask), args.relaxed_mixture).float()
                for teacher, student, mask in zip(
                    rollouts.teacher_logps, rollouts.student_logps, rollouts.mask, strict=True
                )
            ]
        elif args.token_rule == "relaxed_opd":
            own = torch.cat([entropy[mask] for entropy, mask in zip(rollouts.entropy, rollouts.mask, strict=True)])
            threshold = token_rules.entropy_threshold(torch.cat(gather_object([own])), args.relaxed_entropy_share)
            self._step_metrics["token_rule/entropy_threshold"] = threshold
            rollouts.token_weights = [(entropy >= threshold).float() for entropy in rollouts.entropy]

    def _select(self, rollouts: Rollouts) -> tuple[dict[int, int], LossTerms]:
        """Eq. 6-8 over the step's whole batch, per branch: positions that are kept and their tokens, and what their loss is
        divided by.

        Every rank gathers the same table, sorts it by position and so keeps the same samples, however many ranks there
        are. Without selection every non-empty completion is kept.
        """
        table: list[dict[str, Any]] = []
        floor = token_rules.reward_floor(self.args.relaxed_mixture)
        for row, (branch, num_tokens) in enumerate(zip(rollouts.branch, rollouts.num_tokens, strict=True)):
            gaps = token_gaps(rollouts.teacher_logps[row], rollouts.student_logps[row], rollouts.mask[row])[None]
            score = gap_scores(gaps, rollouts.mask[row][None], self._settings["score"][branch])
            weights = None if rollouts.token_weights is None else rollouts.token_weights[row][rollouts.mask[row]]
            table.append(
                {
                    "branch": branch,
                    "position": rollouts.position[row],
                    "score": score.item(),
                    "num_tokens": num_tokens,
                    "length": rollouts.length[row],
                    "truncated": rollouts.truncated[row],
                    "full_weight": num_tokens if weights is None else int((weights == 1).sum()),
                    "below_floor": int((gaps[0][rollouts.mask[row]] < floor).sum()),
                    "category": self._categories.get(rollouts.position[row]),
                    **metrics.row_sums(
                        gaps[0], rollouts.teacher_logps[row], rollouts.entropy[row], rollouts.mask[row]
                    ),
                }
            )
        table = sorted(gather_object(table), key=lambda row: row["position"])
        self._step_metrics["entropy"] = metrics.token_mean(table, "entropy")
        kept: dict[int, int] = {}
        for branch in dict.fromkeys(row["branch"] for row in table):
            rows = [row for row in table if row["branch"] == branch]
            valid = torch.tensor([row["num_tokens"] > 0 for row in rows])
            scores = torch.tensor([row["score"] for row in rows], dtype=torch.float64)
            selection = select_by_mass(scores, self._settings["mass_target"][branch], valid)
            chosen = selection.kept if self._settings["selection"][branch] else valid.nonzero().flatten()
            positions = {rows[index]["position"] for index in chosen.tolist()}
            kept |= {row["position"]: row["num_tokens"] for row in rows if row["position"] in positions}
            kind = self._settings["score"][branch]
            self._step_metrics.update(metrics.of_branch(branch, rows, positions, selection.degenerate, kind))
            self._step_metrics.update(metrics.of_token_rule(self.args.token_rule, branch, rows))
            if branch not in self._branches_met:
                self._branches_met.add(branch)
                if (
                    self.state.global_step < self.schedule.period
                ):  # the student's very first completions of this branch
                    kl = -self._step_metrics[f"gap/{branch}/mean"]
                    raise_errors([initial_kl(branch, kl, sum(row["num_tokens"] for row in rows))], logger.warning)
        return kept, self._loss_terms(table, kept)

    def _loss_terms(self, table: list[dict[str, Any]], kept: dict[int, int]) -> LossTerms:
        """The loss's denominators and the branches' factors, from the table of all ranks' samples."""
        num_tokens = None
        if self.args.loss_normalization == "token":
            # Relaxed OPD divides by the tokens it trains, SelecTKD by all, also those of small weight.
            counted = "full_weight" if self.args.token_rule == "relaxed_opd" else "num_tokens"
            num_tokens = max(1, sum(row[counted] for row in table if row["position"] in kept))
        scale = dict(self._settings["scale"])
        if self.args.branch_weights == "sigma":
            sums = {}
            for branch in dict.fromkeys(row["branch"] for row in table):
                rows = [row for row in table if row["branch"] == branch]
                sums[branch] = tuple(sum(row[name] for row in rows) for name in ("num_tokens", "gap", "gap_square"))
            for branch, weight in token_rules.sigma_weights(sums).items():
                scale[branch] *= weight
                self._step_metrics[f"branch_weight/{branch}"] = weight
        return LossTerms(len(kept), num_tokens, scale)

    def _to_micro_batches(
        self, rollouts: Rollouts, kept: dict[int, int], terms: LossTerms
    ) -> list[dict[str, Any] | None]:
        """The kept samples that this rank trains, as micro-batches of the loss, one entry per micro-step; `None` costs
        nothing.

        The work stands in the *last* micro-steps, because gradients are exchanged in the very last one. Every rank does
        as many as every other, with stand-ins of weight 0 where it has no samples: sharded models need every rank in
        every forward and backward.
        """
        args = self.args
        assert args.gradient_accumulation_steps is not None
        mine = [
            Kept(rollouts.position[row], rollouts.branch[row], rollouts.prompt_len[row], len(ids), args.process_index)
            for row, ids in enumerate(rollouts.token_ids)
            if rollouts.position[row] in kept
        ]
        samples = sorted(gather_object(mine))
        size, max_tokens = self._micro_batch_limits()
        lengths = [sample.length for sample in samples]
        if args.exchange:
            ranks = plan(lengths, args.world_size, size, max_tokens, self._padding_free, self._attention_cost)
        else:  # every rank keeps its own
            ranks = []
            for rank in range(args.world_size):
                own = [index for index, sample in enumerate(samples) if sample.owner == rank]
                (batches,) = plan(
                    [lengths[index] for index in own], 1, size, max_tokens, self._padding_free, self._attention_cost
                )
                ranks.append([[own[place] for place in batch] for batch in batches])
            busy = max(map(len, ranks))
            ranks = [batches + [[]] * (busy - len(batches)) for batches in ranks]
        self._step_metrics.update(metrics.of_micro_batches(ranks, lengths, self._padding_free))
        if args.exchange and args.world_size > 1:
            target = {index: rank for rank, batches in enumerate(ranks) for batch in batches for index in batch}
            rollouts = exchange(
                rollouts, samples, [target[index] for index in range(len(samples))], args.process_index, args.device
            )
        row_of = {position: row for row, position in enumerate(rollouts.position)}
        batches = [[row_of[samples[index].position] for index in batch] for batch in ranks[args.process_index]]
        return in_micro_steps(
            [self._micro_batch(rollouts, batch, terms) for batch in batches], args.gradient_accumulation_steps
        )

    def _micro_batch_limits(self) -> tuple[int | None, int]:
        """Samples that a micro-batch is to have on average, and tokens that it may have, padding included."""
        args = self.args
        if args.max_tokens_per_micro_batch is not None:
            return None, args.max_tokens_per_micro_batch
        size = args.per_device_train_batch_size
        return size, size * (args.max_prompt_length + args.longest_completion)

    def _micro_batch(self, rollouts: Rollouts, rows: list[int], terms: LossTerms) -> dict[str, Any]:
        if not rows:  # a stand-in: two tokens of any rollout, outside the mask
            nothing = torch.zeros(1, 1)
            return {
                "positions": [],
                "token_ids": [[self._tokenizer.eos_token_id] * 2],
                "prompt_lens": [1],
                "mask": nothing.bool(),
                "teacher_logps": nothing,
                "student_logps": nothing,
                "rollout_logps": None,
                "token_weights": None,
                "scale": nothing[:, 0],
                "num_kept": max(1, terms.num_kept),
                "num_tokens": terms.num_tokens,
            }
        return {
            "positions": [rollouts.position[row] for row in rows],
            "token_ids": [rollouts.token_ids[row] for row in rows],
            "prompt_lens": [rollouts.prompt_len[row] for row in rows],
            "mask": _pad([rollouts.mask[row] for row in rows]),
            "teacher_logps": _pad([rollouts.teacher_logps[row] for row in rows]),
            "student_logps": _pad([rollouts.student_logps[row] for row in rows]),
            "rollout_logps": None
            if rollouts.rollout_logps is None
            else _pad([rollouts.rollout_logps[row] for row in rows]),
            "token_weights": None
            if rollouts.token_weights is None
            else _pad([rollouts.token_weights[row] for row in rows]),
            "scale": torch.tensor([terms.scale[rollouts.branch[row]] for row in rows]),
            "num_kept": terms.num_kept,
            "num_tokens": terms.num_tokens,
        }

    # ------------------------------------------------------------------------------------------------------- loss

    def training_step(self, model: Any, inputs: list[dict[str, Any]], num_items_in_batch: Any = None) -> Tensor:
        """One micro-step. The first one of an optimizer step rolls out, scores and selects for all of them."""
        if inputs:
            self._begin_step(inputs)
        started = time.perf_counter()
        batch = self._micro_batches.pop(0)
        if batch is None:  # everything that could be here was dropped by Eq. 8
            self._step += 1
            loss = torch.zeros((), device=self.args.device)
        else:
            loss = super().training_step(model, batch, num_items_in_batch)
        self._step_metrics["time/train"] += time.perf_counter() - started
        self._loss_sum = self._loss_sum + loss
        if not self._micro_batches:
            self._end_step()
        return loss

    def _begin_step(self, rows: list[dict[str, Any]]) -> None:
        expected = set(self.schedule.shares(self.state.global_step))
        found = {row["branch"] for row in rows}
        if not found <= expected:
            # Two computations of one fact, held together by an error instead of hope.
            raise CaMOPDError(
                f"optimizer step {self.state.global_step} got prompts of {sorted(found)}, but schedule "
                f"{str(self.schedule)!r} wants {sorted(expected)}. The data loader and the trainer disagree about the "
                "step; if you replaced either, keep `PromptDealer`'s order."
            )
        started = time.perf_counter()
        self._step_metrics = {"branch": self._label(self.state.global_step), "time/train": 0.0}
        self._loss_sum = torch.zeros((), device=self.args.device)
        self._importance = metrics.ImportanceStats()
        self._update_products = self._sketch = None
        if self._changed is not None:
            self._changed.start()
        self._categories = {row["position"]: row.get("category") for row in rows}
        if self._branch_optimizer is not None:
            self._branch_optimizer.branch = self.schedule.mixture(self.state.global_step)
        self.model.train()  # the parent files its rollout metrics by mode
        if callable(getattr(self.optimizer, "train", None)):  # schedule-free: evaluation has set its weights aside
            self.optimizer.train()
        if not self._teachers_checked:
            self._check_teachers()
            self._teachers_checked = True
        max_tokens = self.args.completion_length_at(self.state.global_step)
        rollouts = self._kept_rollouts(rows)
        if rollouts is None:
            rollouts = self._roll_out(rows, max_tokens)
            if self.args.loss_prefix_tokens is not None:
                rollouts.cut(self.args.loss_prefix_tokens)
        rolled_out = time.perf_counter()
        try:
            branches = list(self.schedule.shares(self.state.global_step))
            self._score(rollouts, branches, self.args.gap_student, self.args.token_rule)
        except TeacherError as error:
            folder = self._keep_step(rollouts)
            raise TeacherError(
                f"{error}\nNothing is lost: the weights before step {self.state.global_step + 1} and its rollouts are in "
                f"{str(folder)!r}. Mend the teacher and resume_from_checkpoint={str(folder)!r}; the step goes on with "
                "scoring."
            ) from None
        self._apply_token_rule(rollouts)
        kept, terms = self._select(rollouts)
        self._trained = Trained(kept)
        self._micro_batches = self._to_micro_batches(rollouts, kept, terms)
        self._step_metrics["time/rollout"] = rolled_out - started
        self._step_metrics["time/score"] = time.perf_counter() - rolled_out
        self._step_metrics["rollout/prompts_cut"] = sum(gather_object([self._prompts_cut]))
        known = self._importance_known = rollouts.rollout_logps is not None
        self._step_metrics["importance/active"] = float(known and self.args.importance_sampling_mode != "none")
        self._step_metrics["rollout/max_length"] = max_tokens
        self._measure_samples(rollouts, kept, terms)

    def _prepare_inputs(self, inputs: Any) -> Any:
        """The micro-batch is made already; the parent would generate here."""
        return inputs

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch=None):
        """Eq. 9 on one micro-batch of kept samples, as this micro-batch's share of the step's loss.

        Times the number of ranks, because data-parallel training averages gradients over ranks and Eq. 9 sums them.
        """
        logps, _ = self._student_forward(inputs["token_ids"], inputs["prompt_lens"], model=model)
        device = logps.device
        mask = inputs["mask"].to(device)
        # Eq. 1 with the student's log-probs of rollout time. They are those of the current parameters, since a rollout
        # serves one update, and were computed in the very batches of an in-process teacher (`_score`): equal weights
        # give a gap of exactly 0 here, while the log-probs of this forward differ from them by rounding.
        # With the engine's log-probs at selection, those of this forward are the ones of the trainer.
        student_logps = inputs["student_logps"].to(device) if self.args.gap_student == "trainer" else logps.detach()
        gaps = token_gaps(inputs["teacher_logps"].to(device), student_logps, mask)
        rollout_logps = (
            inputs["rollout_logps"] if inputs["rollout_logps"] is None else inputs["rollout_logps"].to(device)
        )
        args = self.args
        weights = importance_weights(
            logps, rollout_logps, mask,
            args.importance_sampling_low, args.importance_sampling_high, args.importance_sampling_mode,
        )  # fmt: skip
        self._importance.add(logps.detach(), rollout_logps, weights, mask)
        self._trained.add(inputs["positions"], inputs["mask"])
        if args.token_rule == "relaxed_opd":
            gaps = token_rules.relaxed_rewards(gaps, mask, args.relaxed_mixture)
        if inputs["token_weights"] is not None:
            weights = weights * inputs["token_weights"].to(device)
        scale = inputs["scale"].to(device)
        loss = distillation_loss(logps, gaps, weights, mask, scale, inputs["num_kept"], inputs["num_tokens"])
        loss = loss * self.accelerator.num_processes
        return (loss, None) if return_outputs else loss

    def _end_step(self) -> None:
        """Close the step's metrics: the loss is the mean over ranks, as the parent logs it.

        Raises `CaMOPDError` unless the kept samples are what was trained; the weights are updated after it, or, by
        DeepSpeed, have just been.
        """
        record = self._step_metrics
        busy = {branch: record.get(f"time/teacher_{branch}", 0.0) for branch in self.teachers}
        parts = gather_object([(self._loss_sum.item(), busy, self._trained.rows)])
        self._trained.check([row for *_, rows in parts for row in rows])
        record["loss"] = sum(loss for loss, *_ in parts) / len(parts)
        record["learning_rate"] = self._get_learning_rate()
        if self._importance_known:
            record.update(self._importance.summary(gather_object))
        record["time/step"] = record["time/rollout"] + record["time/score"] + record["time/train"]
        for branch in self.teachers:  # a teacher is busy as long as any rank waits for it
            record[f"time/teacher_{branch}_idle"] = max(
                0.0, record["time/step"] - max(times[branch] for _, times, _ in parts)
            )
        for name, value in record.items():
            # the parent logs the loss and the learning rate itself, `end_update` the time
            if name not in ("branch", "loss", "learning_rate", "time/diagnostics"):
                self._metrics["train"][name].append(float(value))

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, Any]:
        """The parent's, or AdamW with a first moment per branch."""
        if args.optimizer_moments == "shared":
            kind, kwargs = DistillationTrainer.get_optimizer_cls_and_kwargs(args, model)
            if "block_size" in kwargs:
                kwargs["block_size"] = int(kwargs["block_size"])  # of `optim_args`, which transformers leaves a text
            return kind, kwargs
        schedule = Schedule.parse(args.schedule)
        branches = dict.fromkeys(schedule.mixture(step) for step in range(schedule.period))
        return BranchAdamW, {
            "branches": tuple(branches),
            "lr": args.learning_rate,
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
        }

    def create_optimizer(self, model: Any = None) -> Any:
        """The parent's optimizer, which tells after each step what it has done to the weights."""
        given = super().create_optimizer(model)
        optimizer = getattr(given, "optimizer", given)  # under what accelerate wrapped around it in an earlier `train`
        if optimizer is not self._observed_optimizer and isinstance(optimizer, torch.optim.Optimizer):
            self._observed_optimizer = optimizer
            weights = self.accelerator.unwrap_model(self.model).parameters()
            total = sum(getattr(weight, "ds_numel", weight.numel()) for weight in weights if weight.requires_grad)
            self._changed = ChangedShare(optimizer, total)
            if rounds_stochastically(self.args, optimizer):
                round_alike(optimizer, self.args.device, self._rounding_seed)
            if isinstance(optimizer, BranchAdamW):
                self._branch_optimizer = optimizer
            # A hook of the optimizer itself: DeepSpeed steps shards of its own, and clears their gradients.
            optimizer.register_step_post_hook(lambda *_: self._look_at_update(optimizer))
        return given

    def _rounding_seed(self) -> int:
        """Of the step, and where the weights are in shards, of the rank."""
        rank = self.args.process_index if self.is_fsdp_enabled else 0
        return (self.args.seed << 40) + (rank << 24) + self.state.global_step

    def _look_at_update(self, optimizer: torch.optim.Optimizer) -> None:
        if not self._step_metrics:  # on resume FSDP2 takes a step of zeros, to have moments to load into
            return
        started = time.perf_counter()
        if self.args.diagnostics_steps and "+" not in self._label(self.state.global_step):
            for param in (param for group in optimizer.param_groups for param in group["params"]):
                if param.grad is not None:
                    gradient = local(param.grad)
                    self._sketch = self._sketch or diagnostics.Sketch(diagnostics.STEP_WIDTH, gradient.device)
                    self._sketch.add(gradient)
            self._step_metrics["time/diagnostics"] += time.perf_counter() - started
        products = update_products(optimizer)
        if products is not None:  # ZeRO-3 steps its parameters in several groups
            self._update_products = products if self._update_products is None else self._update_products + products

    def end_update(self) -> None:
        """Close the metrics of the optimizer's update, which comes after those of the loss. Called by all ranks."""
        parts = [part for part in gather_object([self._update_products]) if part is not None]
        cosine = math.nan
        if parts:
            both, update, gradient = torch.stack(parts).sum(dim=0).tolist()
            cosine = both / math.sqrt(update * gradient) if update * gradient > 0 else math.nan
        found = {"update/cosine": cosine, "update/changed_share": self._changed_share()}
        if self.args.diagnostics_steps:
            found.update(self._stale_conflict())
            found["time/diagnostics"] = self._step_metrics["time/diagnostics"]
        self._step_metrics.update(found)
        for name, value in found.items():
            self._metrics["train"][name].append(value)

    def _changed_share(self) -> float:
        counts = gather_object([(self._changed.changed, self._changed.compared) if self._changed else (0, 0)])
        changed, compared = (sum(part) for part in zip(*counts, strict=True))
        return changed / compared if compared else math.nan

    # ------------------------------------------------------------------------------------------------ diagnostics

    def _measure_samples(self, rollouts: Rollouts, kept: dict[int, int], terms: LossTerms) -> None:
        """Coherence of all samples of the step, and, where it mixes branches, how these lie to each other.

        Called by all ranks. Each takes the samples that it has rolled out, before the step's own forwards and backwards.
        """
        args, step = self.args, self.state.global_step
        if not args.diagnostics_steps:
            return
        self._step_metrics["time/diagnostics"] = 0.0
        first = step - step % args.diagnostics_steps  # of the interval, in which each branch is measured once
        if self._label(step) in map(self._label, range(first, step)) or not self._watched[1] or not terms.num_kept:
            return
        started = time.perf_counter()
        rows = [row for row, num_tokens in enumerate(rollouts.num_tokens) if num_tokens > 0]
        lengths = [len(rollouts.token_ids[row]) for row in rows]
        (places,) = plan(lengths, 1, *self._micro_batch_limits(), self._padding_free, self._attention_cost)
        batches = [[rows[place] for place in batch] for batch in places]
        batches += [[]] * (max(gather_object([len(batches)])) - len(batches))  # sharded models need all ranks in each
        table = torch.zeros(args.prompts_per_step, diagnostics.SAMPLE_WIDTH, device=args.device)
        # Whose counts are the loss's alone.
        counted = self._importance, self._trained
        self._importance, self._trained = metrics.ImportanceStats(), Trained({})
        self.model.eval()
        for batch in batches:
            inputs = self._micro_batch(rollouts, batch, terms)
            # Around the wrappers of DDP and DeepSpeed, which would take the backward for one of the loss; the hooks that
            # gather the shards of FSDP2 and ZeRO-3 sit on the modules themselves.
            sketches = diagnostics.sample_sketches(
                *self._watched,
                partial(self.compute_loss, self.model, inputs),
                [len(ids) for ids in inputs["token_ids"]],
            )
            if not sketches:
                diagnostics.warn_of_no_layers(self.model)
                self._watched = (None, [])
                break
            for row, sketch in zip(batch, sketches[: len(batch)], strict=True):  # a stand-in's falls away
                table[rollouts.position[row]] = sketch / args.world_size  # `compute_loss` multiplies by it
        self.model.train()
        self._importance, self._trained = counted
        if not self._watched[1]:
            self._step_metrics["time/diagnostics"] += time.perf_counter() - started
            return
        table = self.accelerator.reduce(table, "sum").cpu().double()
        positions: dict[str, list[int]] = {}
        for branch, position in sorted(
            gather_object([(rollouts.branch[row], rollouts.position[row]) for row in rows])
        ):
            positions.setdefault(branch, []).append(position)
        gradients = {}
        for branch, of_branch in positions.items():
            mine = torch.tensor([position in kept for position in of_branch])
            sketches_nk = table[of_branch]
            found = diagnostics.of_coherence(branch, sketches_nk @ sketches_nk.T, mine)
            self._step_metrics.update(found)
            gradients[branch] = sketches_nk[mine].sum(dim=0)
        if len(gradients) > 1:
            one, other = list(gradients)[:2]
            u, v = gradients[one], gradients[other]
            norms = (u.norm().item(), v.norm().item())
            cosine = diagnostics.cosine((u @ v).item(), norms[0] ** 2, norms[1] ** 2)
            self._step_metrics.update(diagnostics.of_conflict((one, other), norms, cosine, stale=False))
        self._step_metrics["time/diagnostics"] += time.perf_counter() - started

    def _stale_conflict(self) -> dict[str, float]:
        """The gradient of the step's one branch against the latest one of another branch. Called by all ranks."""
        branch = self._label(self.state.global_step - 1)
        started = time.perf_counter()
        if "+" in branch:
            return {}
        mine = None if self._sketch is None else self._sketch.values
        others = [name for name in self._branch_sketches if name != branch]
        products = torch.zeros(3, dtype=torch.float64)
        if mine is not None:
            other = self._branch_sketches[others[-1]][0] if others else torch.zeros_like(mine)
            products = torch.stack([mine @ other, mine @ mine, other @ other]).double().cpu()
        # Sharded gradients add up over ranks, and whole ones are on every rank alike, which no cosine sees.
        both, square, other_square = torch.stack(gather_object([products])).sum(dim=0).tolist()
        if square == 0 and mine is None:
            return {}
        norm = self._step_metrics.get("grad_norm", math.sqrt(square))  # before clipping
        self._branch_sketches.pop(branch, None)  # so that it comes last
        if mine is not None:
            self._branch_sketches[branch] = (mine, norm)
        self._sketch = None
        self._step_metrics["time/diagnostics"] += time.perf_counter() - started
        if not others:
            return {}
        norms = (norm, self._branch_sketches[others[-1]][1])
        cosine = diagnostics.cosine(both, square, other_square)
        return diagnostics.of_conflict((branch, others[-1]), norms, cosine, stale=True)

    def _label(self, step: int) -> str:
        """Branches of an optimizer step as one name."""
        return "+".join(self.schedule.shares(step))

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The parent's norm before clipping, noted for the step's line in metrics.jsonl."""
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if grad_norm is not None:
            self._step_metrics["grad_norm"] = float(grad_norm)
        return grad_norm

    # ------------------------------------------------------------------------------------------------- evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As in the parent; `eval_dataset` names a branch of the trainer's own, or is prompts in any form `__init__` takes.

        Prompts of several branches, and a mapping of one, are measured as `eval_<branch>_*`; others as `eval_*`.
        """
        if isinstance(eval_dataset, str) and eval_dataset not in (self.eval_dataset or {}):
            raise ValueError(
                f"eval_dataset={eval_dataset!r} names none of the held-out prompts of this trainer, "
                f"{list(self.eval_dataset or {})}. Name one of them, or pass prompts."
            )
        if eval_dataset is None or isinstance(eval_dataset, str):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        found: dict[str, float] = {}
        for prefix, prompts in self._by_prefix(eval_dataset, "eval_dataset", metric_key_prefix).items():
            found.update(super().evaluate(prompts, ignore_keys, prefix))
        return found

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """The metrics of `evaluate` for other prompts, without logging them. There are no predictions to return."""
        found: dict[str, float] = {}
        for prefix, prompts in self._by_prefix(test_dataset, "test_dataset", metric_key_prefix).items():
            found.update(super().predict(prompts, ignore_keys, prefix).metrics)
        return PredictionOutput(predictions=None, label_ids=None, metrics=found)

    def _by_prefix(self, datasets: Any, argument: str, prefix: str) -> dict[str, Any]:
        by_branch = held_out(datasets, self.schedule, argument)
        self._check_messages(by_branch.values())
        if not isinstance(datasets, dict) and len(by_branch) == 1:
            return {prefix: next(iter(by_branch.values()))}
        return {f"{prefix}_{branch}": prompts for branch, prompts in by_branch.items()}

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The parent's, which with persistent workers would give the loader of the prompts passed before."""
        if not isinstance(eval_dataset, str):
            getattr(self, "_eval_dataloaders", {}).pop("eval", None)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """That of an evaluation."""
        return self.get_eval_dataloader(test_dataset)

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Roll out the held-out prompts and measure their gaps.

        Adds, in nats per token, the mean over prompts of each completion's token mean, with the standard error over
        prompts: `kl` (the sampled reverse KL to the teacher, minus Eq. 1), and Eq. 1's `gap`, `gap_abs`, `gap_positive`.

        With transformers' generation every evaluation draws with the same random numbers, and leaves those of training
        as they were; vLLM has random numbers of its own.
        """
        self._eval_rows = {}
        self._metrics["eval"].clear()  # of a `predict`, which logs nothing
        try:
            with torch.random.fork_rng():
                torch.manual_seed(self.args.seed + self.args.process_index)
                output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        except TeacherError as error:
            if not self.is_in_train:
                raise
            folder = self._keep_step(None)
            raise TeacherError(
                f"{error}\nNothing is lost: the weights after step {self.state.global_step} are in {str(folder)!r}. Mend "
                f"the teacher and resume_from_checkpoint={str(folder)!r}."
            ) from None
        rows = [self._eval_rows[position] for position in sorted(self._eval_rows)]
        expected = len(dataloader.dataset)
        if len(rows) != expected:
            raise CaMOPDError(
                f"{len(rows)} of {expected} held-out prompts were measured. The data loader leaves the others out: set "
                "dataloader_drop_last=False."
            )
        self._metrics["eval"].update({name: [value] for name, value in metrics.of_completions(rows).items()})
        output = output._replace(num_samples=len(rows))
        found = metrics.of_evaluation(rows)
        output.metrics[f"{metric_key_prefix}_loss"] = found["kl"]  # without the empty completions the batches count
        for name, value in found.items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None):
        """One evaluation batch; its loss is the sampled reverse KL."""
        with torch.no_grad():
            rollouts = self._roll_out(inputs, self.args.longest_completion)
            self._score(rollouts, [rollouts.branch[0]])  # an evaluation set is one branch
        rows = []
        for row, (position, mask) in enumerate(zip(rollouts.position, rollouts.mask, strict=True)):
            gaps = token_gaps(rollouts.teacher_logps[row], rollouts.student_logps[row], mask)
            sums = metrics.row_sums(gaps, rollouts.teacher_logps[row], rollouts.entropy[row], mask)
            of_row = {"length": rollouts.length[row], "truncated": rollouts.truncated[row], **sums}
            del of_row["gap_samples"]  # most of what there is to send
            rows.append((position, of_row))
        for position, of_row in gather_object(rows):
            # Data loaders fill up the last batches of the ranks with rows that were there before.
            self._eval_rows.setdefault(position, of_row)
        per_row = torch.tensor([-row["gap"] / max(1, row["num_tokens"]) for _, row in rows], device=self.args.device)
        return per_row.mean(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in the parent; the table of completions has a column `branch`."""
        show, self.log_completions = self.log_completions, False
        try:
            super().log(logs, start_time)
        finally:
            self.log_completions = show
        if show and self.is_world_process_zero():
            log_completions(
                self.args,
                {name: self._logs[name] for name in ("branch", "prompt", "completion")},
                self.state.global_step,
            )

    # -------------------------------------------------------------------------------------- checkpoints and resume

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in the parent, and `resume_from_checkpoint` may be the id of a model of the Hub to which a run with
        `hub_strategy="checkpoint"` has sent its last one.

        Raises `ResumeError` when the checkpoint belongs to a run with another schedule, other teachers, prompts, seed or
        settings of the method, before anything is loaded.
        """
        checkpoint = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = get_last_checkpoint(self.args.output_dir)
            if checkpoint is None:
                raise ResumeError(
                    f"there is no checkpoint in {self.args.output_dir!r} to go on from. Start without "
                    "resume_from_checkpoint, or give the checkpoint's own folder."
                )
        elif isinstance(checkpoint, str) and all(gather_object([is_hub_id(checkpoint)])):
            # Of all machines: where one has such a folder and another lacks it, the other would wait in the fetch.
            checkpoint = self._fetch_checkpoint(checkpoint)
        if checkpoint:
            self._check_record(Path(str(checkpoint)))
            self._checkpoint = self._resumed_from = Path(str(checkpoint))
        output = super().train(checkpoint, *args, **kwargs)
        self._pushes.finish()
        return output

    def _fetch_checkpoint(self, repo: str) -> str:
        """Folder of the last checkpoint that a run with `hub_strategy="checkpoint"` has sent to a model of the Hub.

        Raises `ResumeError` when it cannot be had, or when loading it would unpickle what came over the network, which
        DeepSpeed and FSDP do.
        """
        by_hand = (
            f"hf download {repo} --include '{HUB_CHECKPOINT}/*' --local-dir DIR, and then resume_from_checkpoint="
            f"DIR/{HUB_CHECKPOINT}"
        )
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ResumeError(
                f"the checkpoint of {repo!r} is not fetched from the Hub: DeepSpeed and FSDP unpickle what they load, and "
                f"a pickle can run any code. If you trust the repository: {by_hand}."
            )
        folder, failure = "", None
        try:
            with self.args.main_process_first(desc="fetching the checkpoint"):
                folder = snapshot_download(repo, allow_patterns=f"{HUB_CHECKPOINT}/*")
        except hub_errors() as error:
            failure = (
                f"resume_from_checkpoint={repo!r} is no folder here, and as a model of the Hub it cannot be fetched: "
                f"{why_not(error, repo, 'model')}. Or by hand: {by_hand}."
            )
        failures = [text for text in gather_object([failure]) if text]  # of any machine: the others would wait for it
        if failures:
            raise ResumeError(failures[0])
        if not (Path(folder) / HUB_CHECKPOINT).is_dir():
            raise ResumeError(
                f"{repo!r} on the Hub has no folder {HUB_CHECKPOINT!r}, which a run with hub_strategy='checkpoint' makes. "
                "To start from its weights, pass it as `model`."
            )
        return str(Path(folder) / HUB_CHECKPOINT)

    def _check_record(self, checkpoint: Path) -> None:
        path = checkpoint / RUN_RECORD
        if not path.is_file():
            raise ResumeError(
                f"{str(checkpoint)!r} has no {RUN_RECORD}: it is no checkpoint of CaMOPDTrainer. To start from its "
                "weights, pass it as `model`."
            )
        then = json.loads(path.read_text(encoding="utf-8"))
        differences = [
            f"  {name}: {then.get(name)!r} then, {now!r} now"
            for name, now in self._record.items()
            if then.get(name) != now
        ]
        if differences:
            raise ResumeError(
                f"{str(checkpoint)!r} belongs to another run:\n"
                + "\n".join(differences)
                + "\nRestore these settings to go "
                "on, or pass the checkpoint as `model` to start a new run from its weights."
            )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = self._checkpoint_folder()
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / RUN_RECORD).write_text(json.dumps(self._record, indent=2) + "\n", encoding="utf-8")
            for stale in folder.glob("rollouts-*"):  # of a run that wrote here before
                stale.unlink()
        super()._save_checkpoint(model, trial)
        self._checkpoint = folder

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._pushes.add(checkpoint_folder)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._best = (self.state.best_global_step, len(self.state.log_history))

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write the model card, `README.md` in `output_dir`: teachers, schedule, prompts, and the gaps before and after.

        As in the parent, checkpoints and pushes call it. `dataset_name` is named beside the datasets of the Hub that the
        prompts come from.
        """
        if self.is_world_process_zero():
            name = model_name or Path(self.hub_model_id or self.args.output_dir).name
            all_tags = {*self._tag_names, *([tags] if isinstance(tags, str) else tags or [])}
            write_model_card(self, name, all_tags, dataset_name)

    def _checkpoint_folder(self) -> Path:
        return Path(self._get_output_dir(trial=None)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"

    def _rollouts_file(self, folder: Path) -> Path:
        args = self.args
        return folder / f"rollouts-{args.process_index}-of-{args.world_size}.safetensors"

    def _keep_step(self, rollouts: Rollouts | None) -> Path:
        """Write a checkpoint of where training stands, with the rollouts that could not be scored. Called by all ranks."""
        folder = self._checkpoint_folder()
        only_model, self.args.save_only_model = self.args.save_only_model, False  # this one is there to go on from
        push, self.args.push_to_hub = self.args.push_to_hub, False  # not before it is whole
        if only_model or self._checkpoint is None or self._checkpoint.resolve() != folder.resolve():
            self._save_checkpoint(self.model, trial=None)
        elif rollouts is not None:
            self._save_rng_state(str(folder))  # the weights are there; what has changed is that the step was drawn
        self.args.save_only_model, self.args.push_to_hub = only_model, push
        self.accelerator.wait_for_everyone()
        if rollouts is not None:
            rollouts.prompts_cut = self._prompts_cut
            rollouts.save(self._rollouts_file(folder))
        self.accelerator.wait_for_everyone()
        self._pushes.add(str(folder), last=True)
        self.accelerator.wait_for_everyone()
        return folder

    def _kept_rollouts(self, rows: list[dict[str, Any]]) -> Rollouts | None:
        """The rollouts that a stopped run left for this very step; all ranks have theirs or none uses any."""
        if self._resumed_from is None:
            return None
        folder, self._resumed_from = self._resumed_from, None  # for the first step after resume, and no other
        found = Rollouts.load(self._rollouts_file(folder), rows)
        all_found = all(gather_object([found is not None]))
        if found is None or not all_found:
            return None
        logger.info("the rollouts of step %d come from %s", self.state.global_step + 1, folder)
        self._prompts_cut = found.prompts_cut
        self._load_rng_state(str(folder))  # as it was when these had been drawn; step 0's loader has drawn since
        return found


class _Clock:
    """How long a teacher worked, and how much of it while the trainer did something else. Seconds."""

    def __init__(self) -> None:
        self.started = self.hidden_until = time.perf_counter()
        self.stopped: float | None = None

    def stop(self, _: Any = None) -> None:
        if self.stopped is None:
            self.stopped = time.perf_counter()

    @property
    def seconds(self) -> float:
        return 0.0 if self.stopped is None else self.stopped - self.started

    @property
    def hidden_seconds(self) -> float:
        return max(0.0, min(self.seconds, self.hidden_until - self.started))


def check_gathered_weights(model: Any, memory: int) -> None:
    """Raise `ValueError` when the whole model does not fit into `memory` bytes; ZeRO-3 gathers it there to generate."""
    # ZeRO-3 keeps a parameter's size elsewhere
    sizes = [(getattr(weight, "ds_numel", weight.numel()), weight.element_size()) for weight in model.parameters()]
    weights, needed = sum(number for number, _ in sizes), sum(number * size for number, size in sizes)
    if needed > memory:
        raise ValueError(
            f"to generate, ZeRO-3 gathers all {weights / 1e9:.2f} billion weights on every GPU: {needed / 2**30:.1f} GiB, "
            f"and this one has {memory / 2**30:.1f} GiB. Set use_vllm=True with vllm_mode='server', or "
            "ds3_gather_for_generation=False, which generates with weights in shards, slowly."
        )


def _show_log(args: CaMOPDConfig) -> None:
    """Show what camopd says, once, unless the program has its own logging; `log_level` and `log_level_replica` decide."""
    log = logging.getLogger("camopd")
    if not args.should_log and args.log_level_replica == "warning":  # the default; the others would say the same
        log.setLevel(logging.ERROR)
        return
    level = get_log_levels_dict().get(args.log_level if args.should_log else args.log_level_replica)
    if not log.hasHandlers():
        log.addHandler(logging.StreamHandler())
        level = logging.INFO if level is None else level
    if level is not None:  # "passive" leaves it to the program
        log.setLevel(level)


def _top_ids(answer: TokenScores, top_k: int, name: str) -> Tensor:
    """A teacher's likeliest tokens of a completion (T_i, top_k); raises `CaMOPDError` where it gave others or none."""
    wanted = (len(answer.logps), top_k)
    if answer.top_ids is None or tuple(answer.top_ids.shape) != wanted:
        found = None if answer.top_ids is None else tuple(answer.top_ids.shape)
        raise CaMOPDError(
            f"teacher {name!r} gave top_ids of shape {found} where token_rule='selectkd' needs {wanted}. Its `score` must "
            "return the top_k likeliest tokens at each position, see camopd.Teacher."
        )
    return answer.top_ids


def _only_item(items: list[Any]) -> Any:
    return items[0]


def _pad(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _logps_of_turns(
    turns: list[tuple[list[int], list[int], list[float]]],
    row: int,
    num_rows: int,
    prompt: list[int],
    completion: list[int],
) -> Tensor:
    """The sampler's log-prob of each completion token of a row, NaN on tokens it did not sample (tool results).

    The first turn has the rows in order. Later turns of a tool conversation hold some of the rows, whose prompt is then
    the conversation so far: a turn belongs to the row that its prompt and completion are a piece of.
    """
    logps = torch.full((len(completion),), math.nan)
    sequence = prompt + completion
    for index, (turn_prompt, turn_completion, turn_logps) in enumerate(turns):
        if index < num_rows and index != row:
            continue
        start = len(turn_prompt)
        end = min(start + len(turn_completion), len(sequence))  # the parent cuts the last turn at the length limit
        if sequence[:start] == turn_prompt and sequence[start:end] == turn_completion[: end - start]:
            logps[start - len(prompt) : end - len(prompt)] = torch.tensor(turn_logps[: end - start])
    return logps


def _check_finite(rollouts: Rollouts, teachers: dict[str, Teacher]) -> None:
    for side, all_logps in (("teacher", rollouts.teacher_logps), ("student", rollouts.student_logps)):
        for row, (logps, mask) in enumerate(zip(all_logps, rollouts.mask, strict=True)):
            name = (
                f"teacher {rollouts.branch[row]!r} ({teachers[rollouts.branch[row]].name})"
                if side == "teacher"
                else side
            )
            if len(logps) != len(mask):
                raise CaMOPDError(
                    f"{name} scored {len(logps)} of the {len(mask)} completion tokens of sample {rollouts.position[row]}. "
                    "A teacher must return one log-prob for each token after the prompt."
                )
            broken = int((~torch.isfinite(logps[mask])).sum())
            if broken:
                raise CaMOPDError(
                    f"{name} gave {broken} non-finite log-probs out of {int(mask.sum())} for sample "
                    f"{rollouts.position[row]}. Training on it would turn the weights into NaN; the last checkpoint is "
                    "untouched. Check the model's weights and dtype (float16 overflows where bfloat16 does not)."
                )
