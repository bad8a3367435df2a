"""`CaMOPDTrainer`: one optimizer step of CaMOPD on top of TRL's `DistillationTrainer`.

    rollout    the student answers prompts of the step's branch, at temperature 1
    score      the teacher of the branch and the student give log-probs of its tokens (Eq. 1)
    select     the samples with the largest gaps, over all ranks (Eq. 6-8)
    loss       on these alone (Eq. 9), in micro-batches
    update     by the optimizer

`begin_step` is everything up to the loss. This is the only file that overrides TRL privates.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer_utils import PredictionOutput
from trl import DistillationTrainer

from . import late_settings, setup, vllm_rollouts
from .ahead import Rollouts
from .batching import Batcher
from .card import PAPER, RunFacts, write_model_card
from .checkpoints import RunCheckpoints
from .config import CaMOPDConfig
from .evaluation import HeldOutResults, check_name, of_each
from .forward import Forward
from .hub import CheckpointPushes
from .loss import Loss
from .optimizer import kind_and_settings
from .output_dir import removed_on_error
from .prompts import StepDataset, one_item_per_micro_step
from .record import record_of
from .rejected import saving_rejected
from .rollout_servers import make_engine
from .rollouts import rng_state
from .run_folder import RunFolder
from .samples import MicroBatch, Sample
from .scoring import Scorer
from .selection import Branch, select_samples
from .signals import StopRequests
from .step import Step, StepCallback, of_training
from .teachers.adapters import load_trained_adapter, without_init_kwargs
from .threads import let_threads_rest
from .token_rules import rule_of, weigh
from .watchdog import phase, watching


atexit.register(let_threads_rest)  # or a run that is done may end with SIGABRT


class CaMOPDTrainer(DistillationTrainer):
    """
    Trainer for CaMOPD, Counteraction-Aware Multi-Teacher On-Policy Distillation (https://arxiv.org/abs/2605.27115):
    brings general abilities back to a specialised model and keeps its domain.

    What differs from [`~trl.DistillationTrainer`]:

    - the *training set* is one prompt stream per branch, dealt by `args.schedule`, every rank in the same branch;
    - the *teacher* is that of the branch, and gives log-probs of the sampled tokens only;
    - the *loss* is Eq. 9, on the samples that Eq. 8 selects over the whole step and all ranks; the others cost no forward
      or backward of the loss;
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
    _paper: ClassVar[dict[str, str]] = PAPER

    args: CaMOPDConfig

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
        setup.refuse_unknown(unknown)
        args = args or CaMOPDConfig.for_model(model)
        late_settings.check_again(args)
        run = setup.prepare(
            model, teachers, args, train_dataset, eval_dataset, processing_class, callbacks or [], optimizers,
            quantization_config, peft_config, tools,
        )  # fmt: skip
        with removed_on_error(Path(args.output_dir)):  # which the parent makes
            with vllm_rollouts.starting(self, args), without_init_kwargs(args, run.adapter_loaded):
                super().__init__(
                    model=run.model, args=args, train_dataset=run.dataset, eval_dataset=run.held_out, callbacks=callbacks,
                    processing_class=processing_class, optimizers=optimizers, peft_config=peft_config, tools=tools,
                    quantization_config=run.quantization_config,
                )  # fmt: skip
            self.schedule, self.branches, self.run = run.schedule, Branch.all_of(args), run
            student = self.accelerator.unwrap_model(self.model)
            self.reader, self.teacher_prompts = setup.make_readers(self, student)
            setup.check_ready(self, run, optimizers[0], self._tokenizer)
            self.student = Forward(
                student, self._in_wrapper, lambda **inputs: self.model_wrapped(**inputs), self.accelerator.autocast,
                args.score_rows, self._tokenizer.pad_token_id, args.padding_free, "the student",
            )  # fmt: skip
            self.teachers = setup.load_teachers(self, run)
            self.rule = rule_of(args)
            self.loss = Loss(args, self.student, self.teachers, self.rule)
            self.stops = StopRequests(gather_object, self.is_world_process_zero())
            end = self._tokenizer.eos_token_id
            self.scorer = Scorer(self.student, self.teachers, end, gather_object, args.guards, self.stops)
            self.batcher = Batcher(args, self.student, end, gather_object)
            self.checkpoints = RunCheckpoints(args, record_of(self, run, student, optimizers))
            self.run_folder = RunFolder(args.output_dir, args.process_index == 0)
            self.pushes = CheckpointPushes(self, super()._push_from_checkpoint, super()._finish_current_push)
            self.step: Any = None  # the `Step` under way, or the last one
            self.engine = make_engine(self)
            self.rollouts = Rollouts(self)
            self.log_completions = False  # TRL's table lacks the branches; see callbacks/completions.py
            self.held_out_results = HeldOutResults(args.longest_completion, self.teachers)
            self._best: Any = (None, 0)  # step of the checkpoint that was loaded at the end, and the log's length then
            self.observed_optimizer: Any = None
            self.tasks = setup.make_tasks(self, run)
            setup.add_measures(self, run)
            late_settings.note_of_trainer(self)

    # ------------------------------------------------------------------------------------------- one optimizer step

    @saving_rejected
    def training_step(self, model: Any, inputs: list[dict[str, Any]], num_items_in_batch: Any = None) -> Tensor:
        """One micro-step. The first one of an optimizer step rolls out, scores and selects for all of them.

        The loader gives all rows of the step to the first micro-step, and an empty list to the others.
        """
        if inputs:
            self.begin_step(inputs)
        step = self.step
        batch = step.micro_batches.popleft()
        with step.timed("train"):
            if batch is None:  # no kept sample is left for it, on any rank; the last micro-step, which syncs, has one
                self._step += 1  # TRL's counter, which its own training_step advances
                loss = torch.zeros((), device=self.args.device)
            else:
                loss = super().training_step(model, batch, num_items_in_batch)
        step.loss = step.loss + loss
        if not step.micro_batches:
            step.check_trained(gather_object)
        else:
            self.stop_if_asked(step)
        return loss

    def begin_step(self, rows: list[dict[str, Any]]) -> Step:
        """Algorithm 1 up to the loss, for this rank's rows."""
        args = self.args
        # In place of the step before, whose samples are gone before the next are rolled out.
        step = self.step = Step.at(self.state.global_step, self.schedule, rows)
        step.rng_before = rng_state()
        step.metrics["learning_rate"] = self._get_learning_rate()  # by the step's end the scheduler has moved
        self.model.train()  # the parent files its rollout metrics by mode
        if callable(getattr(self.optimizer, "train", None)):  # schedule-free: evaluation has set its weights aside
            self.optimizer.train()
        self.notify("on_step_started", step)
        self.stop_if_asked(step)
        with step.timed("rollout"), self.checkpoints.keeping(self, step):
            step.metrics["rollout/max_length"] = max_tokens = args.completion_length_at(step.number)
            saved = self.checkpoints.saved_rollouts(self, rows)  # of a run that stopped in this step
            step.samples, step.prompts_cut = saved or self.roll_out(rows, max_tokens, args.loss_prefix_tokens)
            step.rng_after = rng_state()
            self.rollouts.begin_next(step)
        self.stop_if_asked(step)
        with step.timed("score"):
            with self.checkpoints.keeping(self, step):
                step.clocks = self.scorer.score(step.samples, step.branches, self.rule, step.engine_logps)  # Eq. 1
            step.metrics.update(weigh(self.rule, step.samples, step.number, gather_object))  # CaMOPD: nothing
            select_samples(step, self.branches, self.rule, args, gather_object)  # Eq. 6-8, the same on every rank
            step.micro_batches = self.batcher.micro_batches(step)  # kept samples only, balanced over ranks
        step.metrics["rollout/prompts_cut"] = sum(gather_object([step.prompts_cut]))
        weighed = args.importance_sampling_mode != "none" and args.divergence == "sampled"
        step.metrics["importance/active"] = float(step.has_rollout_logps and weighed)
        self.notify("on_step_ready", step)
        return step

    def compute_loss(self, model: Any, inputs: MicroBatch, return_outputs: bool = False, num_items_in_batch=None):
        """Eq. 9 on one micro-batch of kept samples, as this micro-batch's share of the step's loss.

        Times the number of ranks, because data-parallel training averages gradients over ranks and Eq. 9 sums them. Over
        micro-batches they are sums already: TRL's `loss_is_scaled_for_ga` keeps transformers from dividing by
        `gradient_accumulation_steps`.
        """
        loss, logps, importance = self.loss_of(inputs, model=model)
        self.step.add_loss(inputs, loss, logps, importance)
        loss = loss * self.accelerator.num_processes
        return (loss, None) if return_outputs else loss

    def loss_of(self, batch: MicroBatch, model: Any = None) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of a micro-batch by `model`, the student in its wrapper, with its log-probs and w_t, both (B, T).

        The losses of all micro-batches of all ranks add up to Eq. 9. Pure: counts and metrics are `compute_loss`'s.
        """
        return self.loss(batch, model)

    def end_step(self) -> None:
        """Close the metrics of a step after its update. Called on all ranks by the callback `StepEnd` (see `setup`)."""
        step = self.step
        step.close(list(self.teachers), gather_object)
        self.notify("on_step_closed", step)
        for name, value in step.logged().items():
            self._metrics["train"][name].append(value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in the parent, which goes by the mode of the model: a callback may have left it in another one."""
        training, self.model.training = self.model.training, self.model.training or of_training(logs)
        super().log(logs, start_time)
        self.model.training = training

    def stop_if_asked(self, step: Step | None = None) -> None:
        """Save and raise `RunInterrupted` where a signal has asked any rank to stop; with what `step` has rolled out."""
        with self.checkpoints.keeping(self, step):
            self.stops.check()

    def notify(self, event: str, *args: Any) -> None:
        """Call a method of [`StepCallback`] on all callbacks that are one."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, StepCallback):
                getattr(callback, event)(*args)

    def _in_wrapper(self, function: Callable[..., Any], *args: Any, model: Any = None) -> Any:
        """`function(student, *args)` inside the forward of its wrapper, where sharded weights are whole."""
        model = self.model_wrapped if model is None else model
        unwrapped = self.accelerator.unwrap_model(model)
        return self._forward_redirection(model, unwrapped, function, unwrapped, *args)

    def _prepare_inputs(self, inputs: Any) -> Any:
        """The micro-batch is made already; the parent would generate here."""
        return inputs

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The parent's norm before clipping, noted for the step's line in metrics.jsonl."""
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if grad_norm is not None:
            self.step.metrics["grad_norm"] = float(grad_norm)
        return grad_norm

    # ------------------------------------------------------------------------------------------------------ rollouts

    def roll_out(self, rows: list[dict], max_tokens: int, prefix: int | None = None) -> tuple[list[Sample], int]:
        """A completion of each row of at most `max_tokens`, `prefix` of them trained; and how many prompts were cut."""
        self.scorer.probe()
        return self.rollouts.take(rows, max_tokens, prefix)

    def _tokenize_prompts(self, prompts: list) -> tuple[list[list[int]], None, dict]:
        return self.engine.tokenize(prompts), None, {}

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, has_tool_images=False):
        generate = partial(super()._generate_single_turn, prompt_ids, images, multimodal_fields, has_tool_images)
        return self.engine.turn(prompt_ids, generate)

    # ------------------------------------------------------------------------------------------- data and optimizer

    def get_train_dataloader(self) -> DataLoader:
        """One item per micro-step, already this rank's own: nothing here is left for accelerate to shard or move."""
        return one_item_per_micro_step(self.train_dataset, self.args)

    def num_examples(self, dataloader: DataLoader) -> int:
        """Prompts of the whole run, for the parent's log lines."""
        if isinstance(dataloader.dataset, StepDataset):
            return self.args.max_steps * self.args.prompts_per_step
        return super().num_examples(dataloader)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, Any]:
        """The parent's, or AdamW with a first moment per branch."""
        return kind_and_settings(args, partial(DistillationTrainer.get_optimizer_cls_and_kwargs, args, model))

    def create_optimizer(self, model: Any = None) -> Any:
        """The parent's optimizer, which tells after each step what it has done to the weights."""
        given = super().create_optimizer(model)
        setup.observe_optimizer(self, given)
        return given

    # ---------------------------------------------------------------------------------------------------- evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As in the parent; `eval_dataset` names a branch of the trainer's own, or is prompts in any form `__init__` takes.

        Prompts of several branches, and a mapping of one, are measured as `eval_<branch>_*`; others as `eval_*`.
        """
        if eval_dataset is None or isinstance(eval_dataset, str):
            late_settings.check_trainer(self)
            check_name(eval_dataset, self.eval_dataset or {})
            measured = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            return measured if eval_dataset or self.tasks is None else self.tasks.add_to(measured, self)
        measure = partial(super().evaluate, ignore_keys=ignore_keys)
        return of_each(self, eval_dataset, "eval_dataset", metric_key_prefix, measure)

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """The metrics of `evaluate` for other prompts, without logging them. There are no predictions to return."""
        measure = partial(super().predict, ignore_keys=ignore_keys)
        found = of_each(self, test_dataset, "test_dataset", metric_key_prefix, measure)
        return PredictionOutput(predictions=None, label_ids=None, metrics=found)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The parent's, which with persistent workers would give the loader of the prompts passed before."""
        if not isinstance(eval_dataset, str):
            getattr(self, "_eval_dataloaders", {}).pop("eval", None)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """That of an evaluation."""
        return self.get_eval_dataloader(test_dataset)

    @phase("evaluation")
    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Roll out the held-out prompts and measure their gaps.

        Adds, in nats per token, the mean over prompts of each completion's token mean, with the standard error over
        prompts: `kl`, the sampled reverse KL to the teacher (the negative of Eq. 1), and `gap`, `gap_abs`, `gap_positive`
        of Eq. 1.

        Every evaluation draws the same random numbers and leaves those of training alone; with `vllm_mode: server` alone
        the server has its own.
        """
        self.held_out_results = HeldOutResults(self.args.longest_completion, self.teachers)
        self._metrics["eval"].clear()  # of a `predict`, which logs nothing
        self.notify("on_evaluation_started", dataloader.dataset[0]["branch"], len(dataloader.dataset))
        keeping = self.checkpoints.keeping(self) if self.is_in_train else nullcontext()
        with keeping, torch.random.fork_rng():
            self.rollouts.drain()
            torch.manual_seed(self.args.seed + self.args.process_index)
            output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        return self.held_out_results.fill(output, metric_key_prefix, len(dataloader.dataset), self._metrics["eval"])

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None):
        """One evaluation batch; its loss is the sampled reverse KL."""
        with torch.no_grad():
            samples, _ = self.roll_out(inputs, self.args.longest_completion)
            if self.args.metric_for_best_model is None:  # else what it decides would not be decided after resume
                self.stops.check()
            self.scorer.score(samples, [samples[0].branch])  # an evaluation set is one branch
        loss = self.held_out_results.add(samples, self.args.process_index, gather_object)
        self.notify("on_evaluation_scored", self.held_out_results.rows)
        return loss.to(self.args.device), None, None

    # ---------------------------------------------------------------------------------------- checkpoints and card

    @watching()
    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in the parent, and `resume_from_checkpoint` may be the id of a model of the Hub to which a run with
        `hub_strategy="checkpoint"` has sent its last one, or "auto": the newest one in `output_dir`, or a start.

        Raises `ResumeError` for a checkpoint of another run, and `CaMOPDError` for an `output_dir` of another run.
        """
        late_settings.check_trainer(self)
        self.step = None
        self.rollouts.cancel()
        with self.run_folder.entered(self, resume_from_checkpoint) as checkpoint:
            if checkpoint is not None:
                self.notify("on_resumed", Path(checkpoint))
            with self.stops.listening(), self.pushes.only_own():  # a tracker may push the model itself, at the end
                output = super().train(checkpoint, *args, **kwargs)
            self.pushes.finish()
        return output

    @phase("save")
    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.checkpoints.save(self, partial(super()._save_checkpoint, model, trial))

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.checkpoints.staging or super()._get_output_dir(trial))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Not before it is whole, see `checkpoints`."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in the parent, file by file in one step. Raises `CaMOPDError` where the weights are not finite, before it
        writes, and where the disk does not take them."""
        write = partial(super().save_model, _internal_call=True)
        self.checkpoints.save_model(self, output_dir, write, check=not _internal_call)
        if self.args.push_to_hub and not _internal_call:  # as the parent does
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As in the parent, of `output_dir` the files alone that the run has written."""
        with self.pushes.only_own():
            return super().push_to_hub(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not self.is_fsdp_enabled:  # which has all weights in one file of its own
            load_trained_adapter(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self.checkpoints.need_whole(Path(str(self.state.best_model_checkpoint)))
        super()._load_best_model()
        self._best = (self.state.best_global_step, len(self.state.log_history))

    def create_model_card(self, model_name=None, dataset_name=None, tags: Any = None) -> None:
        """Write the model card, `README.md` in `output_dir`; `dataset_name` is named beside the prompts' on the Hub."""
        if self.is_world_process_zero():
            name = model_name or Path(self.hub_model_id or self.args.output_dir).name
            tags = [tags] if isinstance(tags, str) else tags or []
            write_model_card(RunFacts.of(self, self._best), name, {*self._tag_names, *tags}, dataset_name)
