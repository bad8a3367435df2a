"""Adam's first moment, per branch, and how much of an update is the branch's own gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .schedule import Schedule


CHUNK = 2**24  # numbers of a parameter looked at together, so that a large embedding needs no copy of its size


class BranchAdamW(Optimizer):
    """AdamW (https://arxiv.org/abs/1711.05101) with a first moment per branch and one second moment for all.

    The schedule of Eq. 5 gives each branch its own updates; a first moment that they share mixes them again: with beta1 =
    0.9 and three general steps to one domain step of equal gradient norm and scale 2, only 17 % of it is the domain's
    gradient after a domain step. A branch's moment is corrected for its bias by the branch's own steps. With one branch
    this is `torch.optim.AdamW`.

    Set `branch` before each step. Costs one more tensor of the parameters' size for each branch after the first.
    """

    def __init__(
        self,
        params: Iterable[Any],
        branches: tuple[str, ...],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        """
        Args:
            params: parameters, or groups of them.
            branches: what `branch` will be set to; all moments are made in the first step.
            lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
        """
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.branches = branches
        self.branch = branches[0]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient, with the moment of `branch`."""
        if closure is not None:
            raise ValueError("BranchAdamW takes no closure: a rollout serves one update.")
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["step"] = 0
                    state["exp_avg_sq"] = torch.zeros_like(param)
                    for branch in self.branches:
                        state[f"{branch}/step"] = 0
                        state[f"{branch}/exp_avg"] = torch.zeros_like(param)
                state["step"] += 1
                state[f"{self.branch}/step"] += 1
                first, second = state[f"{self.branch}/exp_avg"], state["exp_avg_sq"]
                first.lerp_(param.grad, 1 - beta1)
                second.mul_(beta2).addcmul_(param.grad, param.grad, value=1 - beta2)
                first_weight = 1 - beta1 ** state[f"{self.branch}/step"]
                second_weight = 1 - beta2 ** state["step"]
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.addcdiv_(
                    first, (second.sqrt() / second_weight**0.5).add_(group["eps"]), value=-group["lr"] / first_weight
                )


def kind_and_settings(args: Any, of_parent: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
    """Class and keywords of a run's optimizer: what `of_parent` gives, or AdamW with a first moment per branch."""
    if args.optimizer_moments == "shared":
        kind, kwargs = of_parent()
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


def update_products(optimizer: Optimizer) -> Tensor | None:
    """<u, g>, <u, u> and <g, g> of Adam's update u and the gradient g it has just been made with, float64, shape (3,).

    u = m / (sqrt(v) + eps), up to the step size and without weight decay, which no cosine sees. Call it after `step` and
    before `zero_grad`. Over the parameters this process holds: whole ones, or its shards under FSDP2 and DeepSpeed, where
    the sum over processes is the whole. `None` where the optimizer keeps no Adam moments, or none that can be read as
    numbers (8-bit).
    """
    total = torch.zeros(3, dtype=torch.float64)
    seen = False
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = optimizer.state.get(param, {})
            first = state.get(f"{getattr(optimizer, 'branch', '')}/exp_avg", state.get("exp_avg"))
            second = state.get("exp_avg_sq")
            if param.grad is None or not isinstance(first, Tensor) or not isinstance(second, Tensor):
                continue
            if not (first.is_floating_point() and second.is_floating_point()) or "betas" not in group:
                return None
            if {type(local(first)), type(local(second))} != {Tensor}:  # 8-bit ones of torchao say they are bfloat16
                return None
            if first.shape != param.grad.shape or second.shape != param.grad.shape:  # low-rank moments
                return None
            seen = True
            correction = (1 - group["betas"][1] ** float(state.get("step", group.get("step", 1)))) ** 0.5
            parts = (local(tensor).reshape(-1).split(CHUNK) for tensor in (param.grad, first, second))
            for grad, moment, square in zip(*parts, strict=True):
                grad = grad.float()
                # In place: new memory takes most of the time.
                scale = square.float().sqrt().div_(correction).add_(group.get("eps", 1e-8))
                update = torch.div(moment.float(), scale, out=scale)
                products = torch.stack([update.dot(grad), update.dot(update), grad.dot(grad)])
                total += products.double().cpu()
    return total if seen else None


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that is on this process."""
    return tensor.to_local() if isinstance(tensor, torch.distributed.tensor.DTensor) else tensor
