"""From what the user wrote for each branch to its teacher."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import get_config_model_id

from ..forward import Forward
from ..tokens import embedding_size, head_size
from .adapters import AdapterTeacher, SelfTeacher
from .address import OWN_TEACHERS, without_secrets
from .base import Teacher
from .check import check_local, check_server, raise_errors
from .local import LocalTeacher, context_length, load_teacher_model
from .vllm.teacher import ServerTeacher


logger = logging.getLogger(__name__)


def resolve_teachers(
    teachers: dict[str, Any],
    student: Any,
    student_forward: Forward,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    device: torch.device,
    autocast: Callable[[], Any],
    batch_size: int,
    padding_free: bool | None,
    init_kwargs: dict[str, Any],
    student_dtype: torch.dtype = torch.float32,
) -> dict[str, Teacher]:
    """Turn what `connect_servers` left for each branch into teachers, servers first: they fail fast, models load slowly.

    `init_kwargs` are those of models that are loaded here; `student_dtype` is that of the student's weights in its forward.

    Branches that name the same model share one teacher. Raises `ValueError`, `TypeError` or `TeacherError` for
    a teacher that cannot be had, does not fit the student's tokenizer, or whose context is shorter than `max_tokens`.
    """
    resolved: dict[str, Teacher] = {}
    made: dict[str, Teacher] = {}  # by what the user wrote
    for branch, spec in sorted(teachers.items(), key=lambda item: not isinstance(item[1], ServerTeacher)):
        teacher: Teacher
        if isinstance(spec, str) and spec in made:
            teacher = made[spec]
        elif isinstance(spec, ServerTeacher):
            raise_errors(check_server(branch, spec, tokenizer, max_tokens), logger.warning)
            teacher = spec
        elif isinstance(spec, str) and spec == "self":
            teacher = SelfTeacher(student, student_forward)
        elif isinstance(spec, str) and spec in OWN_TEACHERS:
            teacher = AdapterTeacher(student, spec, student_forward)
        elif isinstance(spec, str) or _is_model(spec):
            model, name, theirs = _local_model(spec, branch, student_dtype, init_kwargs)
            known, context = min(head_size(model), embedding_size(model)), context_length(model.config)
            found = check_local(branch, name, known, context, head_size(student), max_tokens, tokenizer, theirs)
            raise_errors([found], logger.warning, ValueError)
            _compare_dtypes(model, student_dtype, branch)
            teacher = LocalTeacher(model, name, device, batch_size, autocast, padding_free, student_forward)
        elif isinstance(spec, Teacher):
            if not isinstance(spec.name, str):
                raise TypeError(f"the teacher of branch {branch!r} has the name {spec.name!r}, which must be a text.")
            teacher = spec
        else:
            raise TypeError(
                f"the teacher of branch {branch!r} is {without_secrets(repr(spec))[:200]} ({type(spec).__name__}). It must "
                "be the URL of a vLLM server or a list of URLs, a model id, a path, a loaded model, 'adapter_off', "
                "'adapter_start', 'self', or an object with a `name` and a `score` method (camopd.Teacher)."
            )
        resolved[branch] = teacher
        if isinstance(spec, str):
            made[spec] = teacher
    return {branch: resolved[branch] for branch in teachers}


def _is_model(spec: Any) -> bool:
    return isinstance(spec, PreTrainedModel) or (isinstance(spec, torch.nn.Module) and is_peft_model(spec))


def _local_model(
    spec: Any, branch: str, dtype: torch.dtype, init_kwargs: dict[str, Any]
) -> tuple[PreTrainedModel, str, PreTrainedTokenizerBase | None]:
    """A model for this process, its name, and its tokenizer, which a model that the user has loaded comes without."""
    if not isinstance(spec, str):
        return spec, get_config_model_id(spec.config) or "loaded model", None
    model = load_teacher_model(spec, {"dtype": dtype, **init_kwargs}, branch)
    source = {name: init_kwargs[name] for name in ("trust_remote_code", "revision") if name in init_kwargs}
    try:
        return model, spec, AutoTokenizer.from_pretrained(spec, **source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the teacher of branch {branch!r}, {spec!r}, has no tokenizer to compare with the student's: {error}"
            "\nCopy the tokenizer files it was trained with into its folder."
        ) from error


def _compare_dtypes(teacher: PreTrainedModel, student_dtype: torch.dtype, branch: str) -> None:
    dtype = teacher.get_input_embeddings().weight.dtype
    if dtype != student_dtype:
        logger.warning(
            "teacher %r has weights in %s, the student computes in %s: where they are the same model, their gap is not 0 "
            "but rounding noise. Load it in the student's type; a teacher that is named by its path is, unless "
            "teacher_model_init_kwargs says otherwise.",
            branch,
            str(dtype).removeprefix("torch."),
            str(student_dtype).removeprefix("torch."),
        )
