"""The learning rate over the steps of a run: warm-up is taken, and a scheduler gets what it can use."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import SchedulerType, get_scheduler


logger = logging.getLogger(__name__)

FOLLOWS_METRIC = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
WARM_UP_THEMSELVES = (
    "schedule_free_adamw",
    "schedule_free_sgd",
)  # optimizers that get warmup_steps, as a number of steps


def settle_schedule(args: Any) -> None:
    """Make `warmup_steps`, `lr_scheduler_type` and `lr_scheduler_kwargs` of a config one schedule.

    transformers' `constant`, the paper's schedule and our default, ignores warm-up and keywords and does not say so: with
    `warmup_steps` it becomes `constant_with_warmup`, unless the optimizer (schedule-free) or DeepSpeed's own
    schedule does so. Those that follow a metric get its direction.

    Raises `ValueError` for what would be ignored otherwise, and for keywords that the schedule does not have.
    """
    kind, steps, given = args.lr_scheduler_type, args.warmup_steps, dict(args.lr_scheduler_kwargs or {})
    if steps >= 1 and steps != int(steps):
        raise ValueError(
            f"warmup_steps={steps} is neither a whole number of steps nor, below 1, a share of them. Round it."
        )
    warmup = args.get_warmup_steps(args.max_steps)
    if warmup >= args.max_steps:
        raise ValueError(
            f"warmup_steps={steps} is {warmup} of max_steps={args.max_steps} steps, so that learning_rate="
            f"{args.learning_rate:g} is never reached. Lower warmup_steps; below 1 it is a share of the steps."
        )
    optim = str(getattr(args.optim, "value", args.optim))
    if warmup and optim in WARM_UP_THEMSELVES:
        if kind != SchedulerType.CONSTANT:
            raise ValueError(
                f"optim={optim!r} warms up by warmup_steps={steps} itself, and lr_scheduler_type={kind.value!r} "
                "would do so a second time. Leave lr_scheduler_type at 'constant', or warmup_steps out."
            )
        args.warmup_steps = warmup  # it knows no share
    elif kind == SchedulerType.CONSTANT and warmup and not of_deepspeed(args, "scheduler"):
        kind = args.lr_scheduler_type = SchedulerType.CONSTANT_WITH_WARMUP
    elif kind == SchedulerType.CONSTANT_WITH_WARMUP and not warmup:
        logger.warning(
            "lr_scheduler_type='constant_with_warmup' has no warm-up, as warmup_steps is 0: it is 'constant'"
        )
    _settle_keywords(args, kind, given, warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    try:
        made = get_scheduler(kind, optimizer, warmup, args.max_steps, given or None)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"lr_scheduler_type={kind.value!r} cannot be made with warmup_steps={steps}, max_steps={args.max_steps} and "
            f"lr_scheduler_kwargs={given!r}: {error}"
        ) from None
    if kind == SchedulerType.WARMUP_STABLE_DECAY:
        _check_phases(args, [made.lr_lambdas[0](step) for step in range(args.max_steps)])


def _check_phases(args: Any, shares: list[float]) -> None:
    """Raise `ValueError` where the phases of a schedule do not fit into the run. `shares` of the learning rate, by step."""
    zeros = sum(share == 0 for share in shares[1:])
    if max(shares) < 1 - 1e-9 or zeros > 1:
        found = (
            f"its learning rate is 0 in {zeros} of {args.max_steps} steps" if zeros > 1
            else f"learning_rate={args.learning_rate:g} is never reached, but {max(shares):.0%} of it"
        )  # fmt: skip
        raise ValueError(
            f"lr_scheduler_type='warmup_stable_decay' with lr_scheduler_kwargs={args.lr_scheduler_kwargs!r}: {found}. Have "
            f"warmup_steps, num_stable_steps and num_decay_steps add up to max_steps={args.max_steps}."
        )


def _settle_keywords(args: Any, kind: SchedulerType, given: dict[str, Any], warmup: int) -> None:
    """Give a schedule that follows a metric its direction; raise `ValueError` for what a schedule would ignore."""
    if kind in FOLLOWS_METRIC:
        if warmup:
            raise ValueError(
                f"lr_scheduler_type={kind.value!r} has no warm-up in transformers and would ignore "
                f"warmup_steps={args.warmup_steps}. Leave one of them out."
            )
        mode = "max" if args.greater_is_better else "min"
        if given.setdefault("mode", mode) != mode:
            raise ValueError(
                f"lr_scheduler_kwargs sets mode={given['mode']!r}, but of metric_for_best_model="
                f"{args.metric_for_best_model!r} the {'greater' if mode == 'max' else 'smaller'} value is the better one: "
                "the learning rate would fall while the model gets better. Leave mode out."
            )
        _settle_steps(args, kind, given)
        args.lr_scheduler_kwargs = given
    elif given and kind in (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP):
        raise ValueError(
            f"lr_scheduler_kwargs={given!r} would be ignored: lr_scheduler_type={kind.value!r} takes none. Leave it out, "
            "or name a schedule that has them, as 'cosine_with_min_lr'."
        )


def _settle_steps(args: Any, kind: SchedulerType, given: dict[str, Any]) -> None:
    """By how much a metric must change, and how far a schedule that follows it may go. Raises `ValueError`."""
    metric = str(args.metric_for_best_model)
    of_gap = metric.endswith("_gap")
    if of_gap and given.setdefault("threshold_mode", "abs") != "abs":
        raise ValueError(
            f"lr_scheduler_kwargs sets threshold_mode={given['threshold_mode']!r}, and {metric} is negative: of such a "
            "metric PyTorch takes a share the wrong way round, and a worse value for a better one. Leave it out, or name a "
            "metric as eval_general_kl."
        )
    least = given.setdefault("min_lr", 0.0) if kind == SchedulerType.GREEDY else None
    if isinstance(least, (int, float)) and least >= args.learning_rate:
        raise ValueError(
            f"lr_scheduler_kwargs sets min_lr={given['min_lr']!r}, and learning_rate={args.learning_rate:g} is not above "
            "it: it could only rise. Lower min_lr, or leave it out, for 0."
        )


def of_deepspeed(args: Any, section: str) -> Any:
    """A section of the run's DeepSpeed config, or `None`. Its "optimizer" and "scheduler" are taken instead of ours."""
    plugin = getattr(args, "deepspeed_plugin", None)
    return None if plugin is None else (plugin.deepspeed_config or {}).get(section)


def says_where_to_clip(args: Any) -> bool:
    """Whether there is no DeepSpeed config, or one with `gradient_clipping`: accelerate leaves clipping to DeepSpeed."""
    return getattr(args, "deepspeed_plugin", None) is None or of_deepspeed(args, "gradient_clipping") is not None


def check_passed(args: Any, optimizer: Any, scheduler: Any) -> None:
    """Raise `ValueError` when a scheduler was passed that would not drive the run's optimizer.

    Warns where what was passed wins over the config's learning rate or schedule.
    """
    if scheduler is not None and getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ValueError(
            f"optimizers has a {type(scheduler).__name__} of an optimizer that is not the run's, so that the learning rate "
            "would not follow it. Pass that optimizer along with it, optimizers="
            "(optimizer, scheduler), or set lr_scheduler_type, warmup_steps and lr_scheduler_kwargs."
        )
    if scheduler is not None and (args.warmup_steps or args.lr_scheduler_type != SchedulerType.CONSTANT):
        logger.warning(
            "the learning rate follows the %s that was passed, not lr_scheduler_type=%r with warmup_steps=%g",
            type(scheduler).__name__, args.lr_scheduler_type.value, args.warmup_steps,
        )  # fmt: skip
    if optimizer is not None:
        rates = sorted({float(group["lr"]) for group in optimizer.param_groups})
        if any(abs(rate - args.learning_rate) > 1e-6 * args.learning_rate for rate in rates):
            logger.warning(
                "the %s that was passed has learning rate %s, which is taken; the config's is %g",
                type(optimizer).__name__, ", ".join(f"{rate:g}" for rate in rates), args.learning_rate,
            )  # fmt: skip
