"""Teachers inside the training process that are models of their own. Those that the student is itself: adapters.py."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import deepspeed as hf_deepspeed
from trl.trainer.utils import create_model_from_path

from ..divergence import Outputs
from ..forward import Forward
from .address import names_missing_model, near_model, refuse_other_model, refuse_secrets
from .base import TokenScores


_FSDP_LOADS_ONCE = "FSDP_CPU_RAM_EFFICIENT_LOADING"  # accelerate's, which transformers reads


class LocalTeacher:
    """A frozen model on the trainer's own device.

    A whole copy lives on every rank. On an accelerator its weights are copied there to score, and the copies dropped
    afterwards, so that only the student takes memory while its own forward and backward run, and a resting branch costs
    nothing.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        name: str,
        device: torch.device | str,
        batch_size: int,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        padding_free: bool | None = None,
        in_batches_of: Forward | None = None,
    ):
        """
        Args:
            model: the loaded teacher; it is put into eval mode and never changes.
            device: where to score.
            batch_size: times the longest row, tokens of a forward.
            autocast: the trainer's autocast, so that teacher and student round alike.
            padding_free: as the config has it.
            in_batches_of: the student's forward; both cut rows into the same batches.
        """
        self.model = model.eval().requires_grad_(False)
        self.name = name
        self.device = torch.device(device)
        self.forward = Forward(
            model,
            run=lambda function, *args: function(model, *args),
            whole=model,
            autocast=autocast,
            batch_size=batch_size,
            pad_token_id=0,
            padding_free=padding_free,
            whose=f"teacher {name}",
            in_batches_of=in_batches_of,
        )
        self.rests_on_cpu = self.device.type != "cpu" and getattr(model, "hf_device_map", None) is None
        if self.rests_on_cpu:
            self.model.to("cpu")

    def score(self, token_ids: list[list[int]], prompt_lens: list[int], top_k: int = 0) -> list[TokenScores]:
        """See [`Teacher.score`]."""
        with self._on_device():
            self.forward.probe()
            return self.forward.token_scores(token_ids, prompt_lens, top_k)

    def outputs(self, token_ids: list[list[int]], prompt_lens: list[int]) -> Outputs:
        """What it predicts the completion tokens of one batch from."""
        with self._on_device():
            return self.forward.outputs(token_ids, prompt_lens)

    def probe(self) -> None:
        """See once, where the teacher scores, that its log-probs are those of its own logits, and that rows without padding
        do not see each other. Raises `ValueError` otherwise."""
        if not self.forward.probed:  # to the device and back costs seconds
            with self._on_device():
                self.forward.probe()

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        if not self.rests_on_cpu:
            yield
            return
        # Nothing changes these weights, so the copies on the device are dropped and not brought back.
        resting = [
            (module, name, weight, weight.data)
            for module in self.model.modules()
            for name, weight in module._parameters.items()
            if type(weight) is torch.nn.Parameter
        ]
        try:
            self.model.to(self.device)
            yield
        finally:
            for module, name, weight, data in resting:
                module._parameters[name], weight.data = weight, data
            self.model.to("cpu")  # the rest: buffers, and weights of a kind of their own


def load_teacher_model(model_id: str, init_kwargs: dict[str, Any], branch: str) -> PreTrainedModel:
    """Load a teacher on the CPU. Raises `ValueError` naming the branch when there is no such model."""
    refuse_secrets(branch, model_id)
    refuse_other_model(branch, model_id, {})
    # Under ZeRO-3 transformers would shard it over the ranks at load time, outside any DeepSpeed engine.
    zero_config = hf_deepspeed.deepspeed_config() and hf_deepspeed._hf_deepspeed_config_weak_ref()
    hf_deepspeed.unset_hf_deepspeed_config()
    # Under FSDP it would load weights on the first rank alone, for FSDP to hand them on, which shards no teacher.
    efficient = os.environ.pop(_FSDP_LOADS_ONCE, None)
    try:
        if names_missing_model(model_id):  # before the Hub is asked for it
            raise OSError("there is no such path on this machine.")
        return create_model_from_path(model_id, **{"device_map": None, **init_kwargs})
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the teacher of branch {branch!r}, {model_id!r}, cannot be loaded{guess_meaning(model_id)}: {error}\n"
            "Give a local folder with weights, a model id of the Hub, the URL of a vLLM server (http://host:port), "
            "or 'adapter_off'."
        ) from error
    finally:
        if efficient is not None:
            os.environ[_FSDP_LOADS_ONCE] = efficient
        if zero_config:
            hf_deepspeed.set_hf_deepspeed_config(zero_config)


def shares_weights(teacher: Any, student: Any) -> bool:
    """Whether a loaded teacher is the student object, or holds any of its weights."""
    if not isinstance(teacher, torch.nn.Module) or not isinstance(student, torch.nn.Module):
        return False
    own = {id(parameter) for parameter in student.parameters()}
    return any(id(parameter) in own for parameter in teacher.parameters())


def guess_meaning(model_id: str) -> str:
    """What a mistyped teacher may have been meant to be."""
    if model_id.replace("-", "_").lower() == "adapter_off":
        return " (did you mean 'adapter_off'?)"
    if re.fullmatch(r"[\w.-]+:\d+(/.*)?", model_id):
        return f" (did you mean 'http://{model_id}'?)"
    near = near_model(model_id)
    if near:
        return f" (did you mean {near!r}?)"
    if model_id.startswith((".", "/", "~")):
        return " (there is no such folder with a model)"
    return ""


BY_LONGEST_ROW = ("longrope", "dynamic")


def on_rope(config: Any) -> str:
    """What to add where `context_length` is less than a user may expect."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    if rope.get("rope_type") not in BY_LONGEST_ROW:
        return ""
    return f" Its rope of type {rope['rope_type']!r} is another one beyond that, for all rows of a batch with a longer one."


def context_length(config: Any) -> float:
    """Tokens a model was made for, rope scaling included; infinite where its config does not say.

    Of ropes that transformers chooses by the longest row of a batch, for all its rows ("longrope", "dynamic"), those up to
    which it does not: beyond, a row's log-probs would follow from its neighbours.
    """
    config = config.get_text_config()
    length = getattr(config, "max_position_embeddings", None)
    if length is None:
        return float("inf")
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    whole = getattr(config, "original_max_position_embeddings", None) or length
    original = rope.get("original_max_position_embeddings") or whole
    if rope.get("rope_type", rope.get("type")) in BY_LONGEST_ROW:
        return float(original)
    return max(length, original * rope.get("factor", 1.0))


def check_same_tokens(student_tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: Any, branch: str) -> None:
    """Raise `ValueError` unless both tokenizers give every token the same id: the teacher scores the student's ids."""
    student, teacher = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    if student == teacher:
        return
    differing = [token for token in student if teacher.get(token) != student[token]]
    differing += [token for token in teacher if token not in student]
    example, known = differing[0], len(student.keys() | teacher.keys())
    raise ValueError(
        f"the teacher of branch {branch!r} has another tokenizer than the student: {len(differing)} of "
        f"{known} tokens differ, for example {example!r} is id {student.get(example)} for the student and "
        f"{teacher.get(example)} for the teacher. Its log-probs would be those of other words. Use a teacher of the "
        "same family, or copy the student's tokenizer files into the teacher's folder if only added tokens differ."
    )
