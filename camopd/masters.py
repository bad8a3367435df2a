"""16-bit weights and their float32 copies (masters): who may step them, how they are rounded, how many a step changes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from torch.optim import Optimizer

from .optimizer import local


logger = logging.getLogger(__name__)

SAMPLED_WEIGHTS = 100_000  # of a process, that are looked at before and after a step
TORCHAO = ("adamw_torch_8bit", "adamw_torch_4bit")
# Packages whose optimizers are known to round a 16-bit weight to the nearest, unless told otherwise.
ROUNDS_TO_NEAREST = ("torch", "transformers", "bitsandbytes", "torchao", "camopd")


def check_masters(student: Any, args: Any, accelerator: Any, optimizer: Optimizer | None = None) -> None:
    """Raise `ValueError` when weights of 16 bits would be stepped without float32 copies (masters) of them.

    A bfloat16 weight w has 8 bits of precision: rounding to the nearest gives w back unless the update is larger than
    |w| / 512 or so. At a learning rate of 2e-6 hardly any is, and the run would end with the student it began with.

    Masters are kept by DeepSpeed (unless its config says `bf16_master_weights_and_grads`) and, under mixed precision, by
    FSDP, whose weights accelerate makes float32. Stochastic rounding (torchao) and Kahan summation do without.

    Args:
        student: the model as it is before accelerate has prepared it.
        args: the `CaMOPDConfig`.
        accelerator: the trainer's.
        optimizer: one that the user has made; else that of `args.optim`. Of an optimizer whose inner workings are not
            known a warning is written instead.
    """
    low = {
        name: param
        for name, param in student.named_parameters()
        if param.requires_grad and param.is_floating_point() and param.element_size() < 4
    }
    if optimizer is not None:
        stepped = {id(param) for group in optimizer.param_groups for param in group["params"]}
        low = {name: param for name, param in low.items() if id(param) in stepped}  # else it has copies of its own
    dtypes = sorted({str(param.dtype) for param in low.values()})
    if (
        rounds_stochastically(args, optimizer)
        and dtypes != ["torch.bfloat16"]
        and not _launcher_keeps_masters(student, accelerator)
    ):
        logger.warning(
            "bf16_stochastic_round=True does nothing for weights that are not bfloat16%s",
            f" ({', '.join(dtypes)})" if dtypes else "; load the student with dtype bfloat16, or leave it out",
        )
    if not low or _launcher_keeps_masters(student, accelerator) or _optimizer_loses_nothing(args, optimizer, dtypes):
        return
    # ZeRO-3 keeps a parameter's size elsewhere
    numbers = sum(getattr(param, "ds_numel", param.numel()) for param in low.values())
    what = (
        f"{numbers / 1e6:.3g} million trainable weights of the student ({next(iter(low))!r} is the first) are "
        f"{' and '.join(dtypes)}"
    )
    # Of a class derived from one of theirs, whose `step` is inherited or its own.
    if optimizer is not None and str(type(optimizer).step.__module__).split(".")[0] not in ROUNDS_TO_NEAREST:
        logger.warning(
            "%s. If %s keeps no float32 copy of them and rounds to the nearest, they do not learn at learning rates like "
            "%g: look at update/changed_share in metrics.jsonl, which is near 1 in a float32 run.",
            what, type(optimizer).__name__, args.learning_rate,
        )  # fmt: skip
        return
    name = type(optimizer).__name__ if optimizer is not None else _name_of_optimizer(args)
    raise ValueError(
        f"{what}, and {name} would step them without float32 copies (masters): an update that is smaller than about 1/512 "
        f"of the weight is rounded away. At learning_rate={args.learning_rate:g} hardly any weight would change, and the "
        f"run would end with the student it began with (docs/scale.md). Do one of these:\n{_ways_out(student)}"
    )


def _ways_out(student: Any) -> str:
    lora = "train a LoRA adapter (peft_config, or use_peft: true), which peft keeps in float32"
    if is_peft_model(student):
        lora = (
            "of the adapter, leave autocast_adapter_dtype at True, which keeps LoRA weights in float32, and "
            "modules_to_save out, which it leaves in 16 bits (trainable_token_indices are float32)"
        )
    return (
        "  - load the student in float32 (dtype: float32); with bf16: true its forward is bfloat16 all the same\n"
        f"  - {lora}\n"
        "  - on several GPUs, launch with ZeRO-2, ZeRO-3 or FSDP2 and bf16: true, which keep float32 weights in shards\n"
        "  - on one GPU, round at random: dtype: bfloat16, optim: adamw_torch_8bit, optim_args: bf16_stochastic_round=True "
        "(pip install torchao)"
    )


def rounds_stochastically(args: Any, optimizer: Optimizer | None = None) -> bool:
    """Whether the optimizer, that of `args.optim` where none is given, rounds bfloat16 weights up or down at random."""
    if optimizer is not None:
        return bool(getattr(optimizer, "bf16_stochastic_round", False))
    return _name_of_optimizer(args) in TORCHAO and _option(args, "bf16_stochastic_round")


def _name_of_optimizer(args: Any) -> str:
    if args.optimizer_moments == "per_branch":
        return "optimizer_moments='per_branch'"
    return str(getattr(args.optim, "value", args.optim))


def _option(args: Any, name: str) -> bool:
    """A truth value in `optim_args`, which transformers reads as `name=value,name=value`."""
    options = dict(part.partition("=")[::2] for part in (args.optim_args or "").replace(" ", "").split(","))
    return options.get(name, "").lower() in ("1", "true", "yes", "y", "t", "on")


def _launcher_keeps_masters(student: Any, accelerator: Any) -> bool:
    deepspeed = getattr(accelerator.state, "deepspeed_plugin", None)
    if deepspeed is not None:
        config = deepspeed.deepspeed_config
        without = any(
            config.get(kind, {}).get(f"{kind}_master_weights_and_grads", False) is True for kind in ("bf16", "fp16")
        )
        # Without ZeRO, DeepSpeed makes them only in its own mixed precision.
        mixed = any(config.get(kind, {}).get("enabled", False) is True for kind in ("bf16", "fp16"))
        return not without and (deepspeed.zero_stage > 0 or mixed or accelerator.mixed_precision in ("bf16", "fp16"))
    if getattr(accelerator.state, "fsdp_plugin", None) is not None:
        # accelerate.utils.fsdp_utils and Accelerator.prepare_model
        return accelerator.mixed_precision != "no" and not any(
            type(param).__name__ == "Params4bit" for param in student.parameters()
        )
    return False


def _optimizer_loses_nothing(args: Any, optimizer: Optimizer | None, dtypes: list[str]) -> bool:
    """Whether what one step rounds away is not lost, on average or until the next one."""
    if rounds_stochastically(args, optimizer):
        return dtypes == ["torch.bfloat16"]
    if optimizer is not None:
        return False
    name = _name_of_optimizer(args)
    # Kahan summation; optimi's default with 16-bit weights, and transformers can only turn it on
    return name == "stable_adamw" or (name == "adamw_anyprecision" and _option(args, "use_kahan_summation"))


class ChangedShare:
    """Counts the weights that steps of an optimizer change, over a random sample of them.

    Of the weights as the optimizer has them: float32 masters where there are some. Each process looks at those it steps,
    whole ones or shards.
    """

    def __init__(self, optimizer: Optimizer, total: int):
        """
        Args:
            optimizer: looked at around each `step`.
            total: trainable weights of the model, of which at most about `SAMPLED_WEIGHTS` are compared.
        """
        self._stride = max(1, -(-total // SAMPLED_WEIGHTS))
        self._before: list[tuple[Tensor, Tensor, Tensor]] = []
        self.changed = self.compared = 0
        optimizer.register_step_pre_hook(lambda *_: self._look(optimizer))
        optimizer.register_step_post_hook(lambda *_: self._compare())

    def start(self) -> None:
        """Count from zero: a training step may take several of the optimizer, as under ZeRO-3."""
        self.changed = self.compared = 0

    def _look(self, optimizer: Optimizer) -> None:
        generator = torch.Generator().manual_seed(0)  # the same sample in every step
        self._before, offset = [], 0
        for param in (param for group in optimizer.param_groups for param in group["params"]):
            weights = local(param.detach()).reshape(-1)  # a view: parameters are contiguous
            number = len(weights)
            if self._stride == 1:
                places = torch.arange(number)
            else:
                wanted = (offset + number) // self._stride - offset // self._stride
                places = torch.randint(number, (wanted,), generator=generator) if wanted else torch.zeros(0).long()
            offset += number
            places = places.to(weights.device)
            self._before.append((param, places, weights[places]))

    def _compare(self) -> None:
        for param, places, before in self._before:
            after = local(param.detach()).reshape(-1)[places]
            self.changed += int((after != before).sum())
            self.compared += len(before)
        self._before = []


def round_by_step(args: Any, optimizer: Optimizer, step: Callable[[], int], sharded: bool) -> None:
    """Let stochastic rounding follow from the seed and the `step`, and where weights are `sharded`, from the rank."""
    if rounds_stochastically(args, optimizer):
        rank = args.process_index if sharded else 0
        round_alike(optimizer, args.device, lambda: (args.seed % 2**23 << 40) + (rank << 24) + step())  # of 63 bits


def round_alike(optimizer: Optimizer, device: torch.device, seed: Callable[[], int]) -> None:
    """Let the optimizer's random numbers, those of stochastic rounding, follow from `seed()` alone at each step.

    The global ones differ between the ranks of a data-parallel run, which would take the copies of the weights apart, and
    how many are drawn would change the rollouts. They are as they were after the step.
    """
    state: list[Any] = []

    def before(*_: Any) -> None:
        state[:] = [torch.random.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None]
        torch.manual_seed(seed())

    def after(*_: Any) -> None:
        torch.random.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], device)

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


def quantised_adapters(model: Any) -> dict[int, Tensor]:
    """The trainable float32 weights of a model whose frozen ones are quantised, by `id` of the parameter."""
    if not is_quantised(model):
        return {}
    return {
        id(param): param.data for param in model.parameters() if param.requires_grad and param.dtype == torch.float32
    }


def restore_adapters(model: Any, kept: dict[int, Tensor], accelerator: Any) -> None:
    """Make adapters of a quantised model float32 again, which TRL casts to bfloat16; `kept` is from before it did.

    Where accelerate or DeepSpeed keeps masters, or wants one dtype for all (FSDP), they stay as they are.
    """
    state = accelerator.state
    if not is_quantised(model) or any(getattr(state, f"{name}_plugin", None) for name in ("deepspeed", "fsdp")):
        return
    for param in model.parameters():
        if param.requires_grad and param.dtype == torch.bfloat16:
            param.data = kept.get(id(param), param.data.float())


def need_trained(optimizer: Any, model: Any) -> None:
    """Raise `ValueError` when an optimizer that was passed holds none of the weights that are trained."""
    held = {id(param) for group in ([] if optimizer is None else optimizer.param_groups) for param in group["params"]}
    if optimizer is not None and not any(id(param) in held for param in model.parameters() if param.requires_grad):
        raise ValueError(
            f"the {type(optimizer).__name__} of optimizers= holds none of the student's trained weights, which would stay "
            "as they are. Make it from the parameters of the model that is passed, after its adapter is added, and with "
            "peft_config leave optimizers out."
        )


def is_quantised(model: Any) -> bool:
    """As TRL's trainer asks it."""
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))
