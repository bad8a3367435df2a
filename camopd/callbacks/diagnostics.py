"""`diagnostics_steps`: do the branches' gradients work against each other, and do the kept samples agree? See gradients.py.

Looks only: training draws the same random numbers and makes the same updates without it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import gradients
from ..batching import Batcher
from ..config import CaMOPDConfig
from ..optimizer import local
from ..samples import MicroBatch, Sample
from ..schedule import Schedule
from ..step import Step, StepCallback, label


class Diagnostics(StepCallback):
    """Coherence of all samples of a step, once per branch every `diagnostics_steps` steps, and how the branches' gradients
    lie to each other: those of a mixed step, or of one branch and the latest of another."""

    def __init__(
        self,
        args: CaMOPDConfig,
        schedule: Schedule,
        model: Any,
        batcher: Batcher,
        loss_of: Callable[[MicroBatch], Tensor],
        accelerator: Any,
        gather: Callable[[list[Any]], list[Any]],
    ):
        """
        Args:
            args: of the run.
            schedule: that of the run.
            model: the student, outside wrappers of DDP and DeepSpeed, which would take a backward for one of the loss.
                The hooks that gather the shards of FSDP2 and ZeRO-3 sit on the modules themselves.
            batcher: the trainer's.
            loss_of: the loss of a micro-batch by `model`, a sum over its samples.
            accelerator: for sums over ranks.
            gather: of a list over all ranks.
        """
        self._args, self._schedule, self._model, self._batcher = args, schedule, model, batcher
        self._loss_of, self._accelerator, self._gather = loss_of, accelerator, gather
        self._before, self._layers = gradients.last_block(model)
        if not self._layers:
            gradients.warn_of_no_layers(model)
        self._sketch: gradients.Sketch | None = None  # of the step's gradient, on this process
        self._latest: dict[str, tuple[Tensor, float]] = {}  # sketch and norm of each branch's, the latest branch last

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def on_saving(self, folder: Path) -> None:
        """Keep the gradients that the next steps are held against; of sharded ones each process has a part."""
        if self._latest:
            norms = json.dumps([[name, norm] for name, (_, norm) in self._latest.items()])
            sketches = {name: sketch for name, (sketch, _) in self._latest.items()}
            save_file(sketches, self._file(folder), metadata={"norms": norms})

    def on_resumed(self, checkpoint: Path) -> None:
        """Take them up again; with another number or kind of processes, which have other parts, begin anew."""
        self._latest = {}
        if all(self._gather([self._file(checkpoint).is_file()])):
            with safe_open(self._file(checkpoint), framework="pt") as file:
                for name, norm in json.loads(file.metadata()["norms"]):
                    self._latest[name] = (file.get_tensor(name), norm)

    def _file(self, folder: Path) -> Path:
        kind = str(self._args.distributed_state.distributed_type.value).lower()
        return folder / f"gradients-{kind}-{self._args.process_index}-of-{self._args.world_size}.safetensors"

    # ------------------------------------------------------------------------------------------ gradients of samples

    def on_step_started(self, step: Step) -> None:
        """Forget the gradient of the step before."""
        self._sketch = None

    def on_step_ready(self, step: Step) -> None:
        """Coherence of all samples of the step, and where it mixes branches, their conflict. Each rank takes the samples
        that it has rolled out, before the step's own forwards and backwards."""
        step.metrics["time/diagnostics"] = 0.0
        first = step.number - step.number % self._args.diagnostics_steps  # of the interval
        measured = {label(tuple(self._schedule.shares(number))) for number in range(first, step.number)}
        if step.label in measured or not self._layers or not step.kept:
            return
        with step.timed("diagnostics"):
            samples = [sample for sample in step.samples if sample.num_tokens]
            sketches = self._sketches(samples, step)
            if sketches is not None:
                self._note(step, samples, sketches)

    def _sketches(self, samples: Sequence[Sample], step: Step) -> Tensor | None:
        """Sketches of all ranks' samples, by position; `None` where the model's layers are not called as they must be."""
        table = torch.zeros(self._args.prompts_per_step, gradients.SAMPLE_WIDTH, device=self._args.device)
        self._model.eval()
        for batch, inputs in self._batcher.of_this_rank(samples, step):
            lengths = [len(ids) for ids in inputs.token_ids]
            found = gradients.sample_sketches(self._before, self._layers, partial(self._loss_of, inputs), lengths)
            if not found:
                gradients.warn_of_no_layers(self._model)
                self._layers = []
                break
            for sample, sketch in zip(batch, found[: len(batch)], strict=True):  # a dummy's falls away
                table[sample.position] = sketch
        self._model.train()
        return self._accelerator.reduce(table, "sum").cpu().double() if self._layers else None

    def _note(self, step: Step, samples: Sequence[Sample], table: Tensor) -> None:
        positions: dict[str, list[int]] = {}
        for branch, position in sorted(self._gather([(sample.branch, sample.position) for sample in samples])):
            positions.setdefault(branch, []).append(position)
        sums = {}
        for branch, of_branch in positions.items():
            mine = torch.tensor([position in step.kept for position in of_branch])
            sketches_nk = table[of_branch]
            step.metrics.update(gradients.of_coherence(branch, sketches_nk @ sketches_nk.T, mine))
            sums[branch] = sketches_nk[mine].sum(dim=0)
        if len(sums) > 1:
            one, other = list(sums)[:2]
            u, v = sums[one], sums[other]
            norms = (u.norm().item(), v.norm().item())
            cosine = gradients.cosine((u @ v).item(), norms[0] ** 2, norms[1] ** 2)
            step.metrics.update(gradients.of_conflict((one, other), norms, cosine, stale=False))

    # ------------------------------------------------------------------------------------------- gradient of the step

    def on_optimizer_stepped(self, step: Step, optimizer: torch.optim.Optimizer) -> None:
        """Sketch the gradient that the optimizer has just used, of a step of one branch."""
        if len(step.branches) > 1:
            return
        with step.timed("diagnostics"):
            for param in (param for group in optimizer.param_groups for param in group["params"]):
                if param.grad is not None:
                    gradient = local(param.grad)
                    self._sketch = self._sketch or gradients.Sketch(gradients.STEP_WIDTH, gradient.device)
                    self._sketch.add(gradient)

    def on_step_closed(self, step: Step) -> None:
        """The gradient of the step's one branch against the latest one of another branch."""
        if len(step.branches) == 1:
            with step.timed("diagnostics"):
                step.metrics.update(self._stale_conflict(step))

    def _stale_conflict(self, step: Step) -> dict[str, float]:
        mine = None if self._sketch is None else self._sketch.values
        others = [name for name in self._latest if name != step.label]
        products = torch.zeros(3, dtype=torch.float64)
        if mine is not None:
            other = self._latest[others[-1]][0].to(mine.device) if others else torch.zeros_like(mine)
            # A dot product of BLAS takes another order of its sums where memory begins elsewhere, as after a resume.
            pairs = ((mine, other), (mine, mine), (other, other))
            products = torch.stack([(u * v).sum(dtype=torch.float64) for u, v in pairs]).cpu()
        # Sharded gradients add up over ranks, and whole ones are on every rank alike, which no cosine sees.
        both, square, other_square = torch.stack(self._gather([products])).sum(dim=0).tolist()
        if square == 0 and mine is None:
            return {}
        norm = step.metrics.get("grad_norm", math.sqrt(square))  # before clipping
        self._latest.pop(step.label, None)  # so that it comes last
        if mine is not None:
            self._latest[step.label] = (mine, norm)
        if not others:
            return {}
        norms = (norm, self._latest[others[-1]][1])
        cosine = gradients.cosine(both, square, other_square)
        return gradients.of_conflict((step.label, others[-1]), norms, cosine, stale=True)
