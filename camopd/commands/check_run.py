"""What `camopd check` says of a run itself: its folder, its prompts as the model will see them, memory and disk."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..errors import CaMOPDError
from ..memory import Shape, activations
from ..surroundings import check_folder, check_push, folder_of, need_context
from ..teacher_prompts import TeacherPrompts
from ..teachers.address import OWN_TEACHERS
from ..teachers.check import Finding
from ..teachers.local import context_length
from ..words import counted


GIB = 2**30
SHOWN = 700  # characters of a prompt


def check_places(settings: Mapping[str, Any]) -> Iterator[Finding]:
    """Where the run writes: its output_dir, and the Hub."""
    for subject, look, text in (
        ("output_dir", check_folder, f"{folder_of(settings)!r} can be that of this run"),
        ("push_to_hub", check_push, "the Hub takes the token of this machine"),
    ):
        if subject == "push_to_hub" and not settings.get(subject):
            continue
        try:
            look(settings)
            yield Finding("run", subject, "ok", text)
        except (CaMOPDError, ValueError) as error:
            yield Finding("run", subject, "error", str(error))


def check_context(args: Any, config: Any) -> Finding:
    """The longest prompt and completion against what the student can take."""
    length, needed = context_length(config), args.max_prompt_length + args.longest_completion
    try:
        need_context(length, args.max_prompt_length, args.longest_completion)
    except ValueError as error:
        return Finding("student", "context", "error", str(error))
    return Finding("student", "context", "ok", f"{length:.0f} tokens, {needed} needed")


def check_prompts(branch: str, what: str, rows: list[dict[str, Any]], count: int, reader: Any, most: int) -> Finding:
    """Lengths of some of a branch's prompts against `max_prompt_length`. `what` they are: "prompts" or "held-out"."""
    lengths = sorted(map(len, reader.ids(rows)))
    text = (
        f"{counted(count, 'row')}; of the {len(rows)} looked at, {lengths[0]} to {lengths[-1]} tokens, "
        f"{median(lengths):.0f} in the middle; max_prompt_length {most}"
    )
    cut = sum(length > most for length in lengths)
    if not cut:
        return Finding(branch, what, "ok", text)
    level: Any = "error" if cut == len(rows) and what == "prompts" else "warning"
    return Finding(
        branch, what, level, f"{text}: {cut} lose their beginning. Raise max_prompt_length, or leave long prompts out"
    )


def as_seen(
    branch: str, row: dict[str, Any], reader: Any, teacher_prompts: TeacherPrompts, tokenizer: Any, most: int
) -> list[str]:
    """One prompt as the model will see it, special tokens and all, and as its teacher will where that sees another."""
    (ids,) = reader.ids([row])
    own = ids[-most:]
    (other,) = teacher_prompts.ids([row], [own])
    name = str(row.get("row", "a row")).replace(f" of branch {branch!r}", "")
    shown = []
    for who, seen in (("model", own), ("teacher", other)):
        if seen is not None:
            text = str(tokenizer.decode(seen))
            if len(text) > SHOWN:
                text = f"{text[: SHOWN // 2]} [... {len(text) - SHOWN:,} characters ...] {text[-SHOWN // 2 :]}"
            shown += ["", f"{branch}, {name}, as the {who} sees it ({len(seen)} tokens):", text]
    return shown


def check_room(
    args: Any, model_args: Any, config: Any, teachers: Mapping[str, Any], teacher_source: Mapping[str, Any]
) -> list[Finding]:
    """Memory of a step and disk for the checkpoints, estimated from the student's config."""
    try:
        shape = Shape.of(config)
        model = _without_weights(config, args.trust_remote_code)
    except (ValueError, ImportError, AttributeError) as error:  # of an architecture that is new to us
        return [Finding("run", "memory", "warning", f"it cannot be estimated: {error}")]
    weights = sum(weight.numel() for weight in model.parameters())
    size = _bytes_of(model_args, config)
    linear = [
        each for name, each in model.named_modules() if isinstance(each, torch.nn.Linear) and "lm_head" not in name
    ]
    adapter = model_args.lora_r * sum(each.in_features + each.out_features for each in linear)
    trained = adapter if model_args.use_peft else weights
    kind = str(getattr(args.optim, "value", args.optim)).rpartition("_")[2]
    moments = {"8bit": 2.0, "4bit": 1.0}.get(kind, 2 * max(size, 2))
    resting = 0.0
    if args.device.type == "cpu":  # where a teacher stays while the student trains
        local = {each for each in teachers.values() if isinstance(each, str) and each not in OWN_TEACHERS}
        resting = sum(_weights_of(name, teacher_source) * max(size, 2) for name in local)
    cast = 2 if args.bf16 and size == 4 else 0
    static = weights * (size + cast) + trained * (size + moments) + resting
    return [_memory(args, shape, static, size), _disk(args, trained * max(size, 2), trained * moments)]


def _without_weights(config: Any, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def _weights_of(model: str, source: Mapping[str, Any]) -> int:
    from transformers import AutoConfig

    try:
        made = _without_weights(AutoConfig.from_pretrained(model, **source), bool(source.get("trust_remote_code")))
    except (OSError, ValueError):  # said of the teacher itself
        return 0
    return sum(weight.numel() for weight in made.parameters())


def _bytes_of(model_args: Any, config: Any) -> float:
    """Bytes of a weight of the student."""
    if model_args.load_in_4bit or model_args.load_in_8bit:
        return 0.5 if model_args.load_in_4bit else 1.0
    dtype = getattr(torch, str(model_args.dtype), None) or getattr(config, "dtype", None)
    return float(dtype.itemsize) if isinstance(dtype, torch.dtype) else 4.0


def _memory(args: Any, shape: Shape, static: float, size: float) -> Finding:
    tokens = args.max_tokens_per_micro_batch or args.per_device_train_batch_size * (
        args.max_prompt_length + args.longest_completion
    )
    written = min(tokens, args.per_device_train_batch_size * args.longest_completion)
    on_gpu = args.device.type == "cuda"
    whole = args.divergence == "full" or args.baseline == "kl"
    gradient = "whole" if whole else str(args.divergence)
    moving = activations(shape, tokens, written, 2 if size <= 2 else 4, "cuda" if on_gpu else "cpu", gradient)
    free, where = torch.cuda.mem_get_info()[0] if on_gpu else _free_memory(), "the GPU" if on_gpu else "this machine"
    text = (
        f"some {_gib(static + moving)} for a step, by its sizes: {_gib(static)} for weights, gradients and optimizer, "
        f"{_gib(moving)} for micro-batches of {tokens:,} tokens"
    )
    # From transformers 5.23 on its name is activation_checkpointing.
    if not (args.gradient_checkpointing or getattr(args, "activation_checkpointing", False)):
        text += " and more without gradient_checkpointing"
    if free is None:
        return Finding("run", "memory", "ok", f"{text}; what is free here is not known")
    text += f"; {_gib(free)} are free on {where}"
    if static + moving <= free:
        return Finding("run", "memory", "ok", text)
    return Finding(
        "run", "memory", "warning",
        f"{text}. Unless it is sharded over several, set max_tokens_per_micro_batch, lower max_completion_length, or take "
        "bfloat16 weights with 8-bit Adam, or LoRA (docs/scale.md, Memory)",
    )  # fmt: skip


def _free_memory() -> int | None:
    """Bytes of memory that are free, on Linux."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, ValueError, StopIteration):
        return None


def _disk(args: Any, model: float, moments: float) -> Finding:
    """`model` and `moments`: bytes of what is trained, and of the optimizer's state."""
    count = 0
    if str(args.save_strategy.value) == "steps":
        every = args.save_steps if args.save_steps >= 1 else max(1, math.ceil(args.save_steps * args.max_steps))
        count = math.ceil(args.max_steps / every)  # the last step is saved in any case
        count = (
            min(count, args.save_total_limit + 1) if args.save_total_limit else count
        )  # the new one before the old goes
    one = model + (0 if args.save_only_model else moments)
    folder = Path(args.output_dir).expanduser().absolute()
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    needed = count * one + model
    text = f"{counted(count, 'checkpoint')} of {_gib(one)} and the model take {_gib(needed)}; {_gib(free)} are free"
    if needed <= free:
        return Finding("run", "disk", "ok", text)
    return Finding(
        "run", "disk", "error" if one + model > free else "warning",
        f"{text}. Set save_total_limit, a larger save_steps or save_only_model, or give another output_dir",
    )  # fmt: skip


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
