"""Teachers that the student is itself, and whether they are the models that their names say.

Switching an adapter off gives back the model under it only where nothing else was changed. Some settings of PEFT move a
part of the base weights into the adapter, others train weights of the base beside it: such a teacher would be another
model, and would change as the student trains.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from trl.trainer.utils import create_model_from_path, get_config_model_id, use_adapter

from ..divergence import Outputs
from ..forward import Forward, evaluating
from .address import has_adapter
from .base import TokenScores


if TYPE_CHECKING:
    from peft import PeftConfig


START = "start"  # name of the frozen copy of the student's adapter

# What leaves the base as it is, from wrapping to the end of training: tests/test_teachers_adapters.py compares outputs
# before and after, bit by bit. What is not here is refused, also what a later PEFT brings.
_LORA_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")
_LORA_SETTINGS = {
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora",
    "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "trainable_token_indices", "use_dora", "velora_config", "monteclora_config", "lora_bias",
    "target_parameters", "ensure_weight_tying",
    # of initializations, which `init_lora_weights` names
    "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    # of the file and not the weights
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "runtime_config",
}  # fmt: skip
_TYPES = {
    "LORA", "ADALORA", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA", "HIRA", "HRA",
    "IA3", "LN_TUNING", "LOHA", "LOKR", "MISS", "OFT", "OSF", "PEANUT", "PSOFT", "PVERA", "RANDLORA", "ROAD", "SHIRA",
    "SUPERTUNING", "TINYLORA", "UNILORA", "VBLORA", "VERA", "WAVEFT",
}  # fmt: skip
_WHY_NOT = {
    "init_lora_weights": "moves a part of the base weights into the adapter",
    "kasa_config": "cuts the smallest singular values out of the base weights",
    "layer_replication": "makes a model of more layers",
    "bias": "trains biases of the base weights",
}
_UNKNOWN = "is not known to leave the weights under the adapter as they are"


def check_adapters(model: Any, peft_config: PeftConfig | None, teachers: Iterable[Any]) -> None:
    """Raise `ValueError` where the student's adapter cannot be trained, or would not be the adapter teacher that is wanted.

    Args:
        model: the student as the trainer got it: id or path, model, or `PeftModel`.
        peft_config: that of the new adapter, if it gets one.
        teachers: of all branches, as the user wrote them.
    """
    if not isinstance(model, str):
        _check_trainable(model, peft_config)
    elif peft_config is not None and has_adapter(model):
        raise ValueError(
            f"the student {model!r} is a saved adapter, and would get a second one (use_peft, peft_config). Leave that out "
            "to go on training the saved one, or merge it into its base first (PeftModel.merge_and_unload)."
        )
    wanted = {teacher for teacher in teachers if isinstance(teacher, str)}
    for config in configs_of(model, peft_config):
        if getattr(config, "alora_invocation_tokens", None):
            raise ValueError(
                f"alora_invocation_tokens={config.alora_invocation_tokens} (activated LoRA) finds its tokens in "
                "PeftModel.forward, which the loss does not go through: the adapter would take no part in it and never "
                "learn. Use plain LoRA."
            )
        if "adapter_off" in wanted:
            changes = _changes_of_base(config)
            if changes:
                raise ValueError(
                    f"'adapter_off' means the student without its adapter, but {changes}: with the adapter off it would "
                    "not be the model it was. Use a setting that leaves the base alone (init_lora_weights=True, "
                    "bias='none'), or name the specialised model itself as the teacher."
                )
        if "adapter_start" in wanted and _trains_bias(config):
            raise ValueError(
                f"'adapter_start' means the student as it was before training, but bias={config.bias!r} "
                f"{_WHY_NOT['bias']}, which no copy of the adapter keeps. Use bias='none', or name a copy of the student "
                "as the teacher."
            )


def _check_trainable(model: Any, peft_config: PeftConfig | None) -> None:
    if is_peft_model(model):
        layers = [module for module in model.modules() if hasattr(module, "merged_adapters")]
        if any(layer.merged_adapters for layer in layers):
            raise ValueError(
                "the student's adapter is merged into its weights, where it cannot be trained. Call "
                "model.unmerge_adapter(), or merge_and_unload() and pass a peft_config for a new adapter."
            )
        if any(layer.disable_adapters for layer in layers):
            raise ValueError("the student's adapter is switched off. Call model.base_model.enable_adapter_layers().")
        if peft_config is None and (active := list(model.active_adapters)) != ["default"]:
            raise ValueError(
                f"the student's active adapter is {' and '.join(map(repr, active))}: only one of the name "
                "'default' is saved where a model is loaded from. Load it with PeftModel.from_pretrained(base, path, "
                "is_trainable=True), without adapter_name, or pass the adapter's folder as `model`."
            )
    if peft_config is not None or any(parameter.requires_grad for parameter in model.parameters()):
        return
    if is_peft_model(model):
        raise ValueError(
            f"no weight of the student can be trained: its adapter {model.active_adapter!r} was loaded for inference. Load "
            "it with PeftModel.from_pretrained(base, path, is_trainable=True), or pass the adapter's folder as `model`."
        )
    raise ValueError("no weight of the student can be trained: all have requires_grad=False. Call model.train() and "
                     "model.requires_grad_(True), or pass a peft_config.")  # fmt: skip


def configs_of(model: Any, peft_config: PeftConfig | None) -> list[Any]:
    """Those of the adapters that a student has or gets; arguments as those of `check_adapters`."""
    if peft_config is not None:
        return [peft_config]
    if isinstance(model, str):
        from peft import PeftConfig

        return [PeftConfig.from_pretrained(model)] if has_adapter(model) else []
    return list(model.peft_config.values()) if is_peft_model(model) else []


def _trains_bias(config: Any) -> bool:
    return getattr(config, "bias", "none") != "none"


def _changes_of_base(config: Any) -> str | None:
    """What of an adapter's settings makes its base another model, in words; `None` where it stays as it is."""
    from peft import LoraConfig

    if _trains_bias(config):
        return f"bias={config.bias!r} {_WHY_NOT['bias']}"
    kind = config.peft_type.value
    if kind not in _TYPES:
        return f"an adapter of type {kind} {_UNKNOWN}"
    if not isinstance(config, LoraConfig):
        return None
    for field in dataclasses.fields(LoraConfig):
        value = getattr(config, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        known = value in _LORA_INITS if field.name == "init_lora_weights" else field.name in _LORA_SETTINGS
        if not known and value != default:
            return f"{field.name}={value!r} {_WHY_NOT.get(field.name, _UNKNOWN)}"
    return None


def base_weights(model: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """Weights of a `PeftModel` that still stand there when its adapters are switched off, by the names of the base."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    def of_base(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Parameter]]:
        if isinstance(module, BaseTunerLayer):
            yield from of_base(module.get_base_layer(), name)
        elif isinstance(module, AuxiliaryTrainingWrapper):
            yield from of_base(module.original_module, name)
        else:
            for own, parameter in module.named_parameters(recurse=False):
                yield f"{name}.{own}".lstrip("."), parameter
            for child_name, child in module.named_children():
                yield from of_base(child, f"{name}.{child_name}")

    return of_base(model.get_base_model(), "")


def trained_base_weights(model: Any) -> list[str]:
    """Names of the weights of a `PeftModel` that are trained and still stand there when its adapters are switched off."""
    return [name for name, parameter in base_weights(model) if parameter.requires_grad]


class AdapterTeacher:
    """The student with another adapter, or none: its weights are there already.

    `"adapter_off"` is the student without its adapter: with new LoRA weights on the specialised model, the domain teacher
    costs no memory. `"adapter_start"` is the student with its adapter as it was before training: where the specialised
    model is itself a base with LoRA, that is the domain teacher, and `"adapter_off"` the general one.
    """

    def __init__(self, student: Any, which: str, forward: Forward):
        """
        Args:
            student: the `peft.PeftModel` that is trained; for `"adapter_start"` after `keep_start_adapter`.
            which: `"adapter_off"` or `"adapter_start"`.
            forward: the student's own, so that equal weights are batched alike.

        Raises `ValueError` where weights are trained that both models share.
        """
        trained = trained_base_weights(student)
        if trained:
            raise ValueError(
                f"{which!r} cannot be a teacher: {len(trained)} weights of the student are trained and belong to no "
                f"adapter, {trained[0]!r} for example, and the teacher would change with them. Freeze them "
                "(parameter.requires_grad = False), train them as modules_to_save, or name a model as the teacher."
            )
        self.student = student
        self.adapter = START if which == "adapter_start" else None
        self.name = f"{which}:{get_config_model_id(student.config)}"
        self.forward = forward

    def score(self, token_ids: list[list[int]], prompt_lens: list[int], top_k: int = 0) -> list[TokenScores]:
        """See [`Teacher.score`]."""
        # `disable_adapter` leaves dropout on
        with evaluating(self.student), use_adapter(self.student, self.adapter):
            return self.forward.token_scores(token_ids, prompt_lens, top_k)

    def outputs(self, token_ids: list[list[int]], prompt_lens: list[int]) -> Outputs:
        """What it predicts the completion tokens of one batch from."""
        with evaluating(self.student), use_adapter(self.student, self.adapter):
            return self.forward.outputs(token_ids, prompt_lens)


class SelfTeacher:
    """`"self"`: the student with the weights that it has when it is asked, without gradient. What it sees, a
    `teacher_prompt`, makes it know more."""

    def __init__(self, student: Any, forward: Forward):
        """`forward` is the student's own."""
        self.student, self.forward = student, forward
        self.name = f"self:{get_config_model_id(student.config)}"

    def score(self, token_ids: list[list[int]], prompt_lens: list[int], top_k: int = 0) -> list[TokenScores]:
        """See [`Teacher.score`]."""
        with evaluating(self.student):
            return self.forward.token_scores(token_ids, prompt_lens, top_k)

    def outputs(self, token_ids: list[list[int]], prompt_lens: list[int]) -> Outputs:
        """What it predicts the completion tokens of one batch from."""
        with evaluating(self.student):
            return self.forward.outputs(token_ids, prompt_lens)


OWN = (AdapterTeacher, SelfTeacher)


def load_adapter_student(path: str, init_kwargs: dict[str, Any]) -> Any:
    """A base model with the saved adapter in `path` on it, to go on training that adapter."""
    from peft import PeftConfig, PeftModel

    base = PeftConfig.from_pretrained(path).base_model_name_or_path
    try:
        model = create_model_from_path(base, **init_kwargs)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the student {path!r} is an adapter for {base!r}, and that model cannot be loaded: {error}"
        ) from error
    return PeftModel.from_pretrained(model, path, is_trainable=True)


def load_trained_adapter(student: Any, folder: str) -> None:
    """Give a student with a `START` beside its adapter the trained one of a checkpoint.

    A checkpoint has `START` in a folder of its own, and transformers below 5.23 loads nothing else where it finds one.
    """
    if is_peft_model(student) and START in student.peft_config:
        student.load_adapter(folder, "default", is_trainable=True)


@contextmanager
def without_init_kwargs(args: Any, loaded: bool) -> Iterator[None]:
    """Without `model_init_kwargs` where the student is `loaded` with them already: TRL would warn that they are ignored."""
    given = args.model_init_kwargs
    args.model_init_kwargs = None if loaded else given
    try:
        yield
    finally:
        args.model_init_kwargs = given


def keep_start_adapter(student: Any) -> None:
    """Give the student a frozen copy of its adapter, as TRL does for reference models.

    Raises `ValueError` unless it has exactly one adapter, called "default", and the student gives the same logits with the
    copy, and still with its own.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    if START in student.peft_config:
        raise ValueError(
            f"'adapter_start' keeps a copy of the student's adapter under the name {START!r}, and the student has an "
            "adapter of that name, perhaps of a trainer made before. Load the student again."
        )
    if set(student.peft_config) != {"default"}:
        raise ValueError(
            f"'adapter_start' needs a student with one adapter, called 'default', and this one has "
            f"{sorted(student.peft_config)}. Load it with AutoPeftModelForCausalLM.from_pretrained(path, "
            "is_trainable=True)."
        )
    probes = not any(hasattr(parameter, "ds_id") for parameter in student.parameters())  # ZeRO-3 has them in shards
    before = _some_logits(student) if probes else torch.zeros(0)
    config = copy.deepcopy(student.peft_config["default"])
    for name, value in _WITHOUT_SURGERY.items():
        if hasattr(config, name):
            setattr(config, name, value)
    # PEFT makes the weights of adapters float32 unless told otherwise; those of a model that was cast whole are not.
    is_float32 = any(weight.requires_grad and weight.dtype == torch.float32 for weight in student.parameters())
    student.add_adapter(START, config, **({} if is_float32 else {"autocast_adapter_dtype": False}))
    weights = get_peft_model_state_dict(student, adapter_name="default")
    set_peft_model_state_dict(student, weights, adapter_name=START)
    if not probes:
        return
    with use_adapter(student, START):
        copied = _some_logits(student)
    difference = (
        torch.stack([(logits - before).abs().max() for logits in (copied, _some_logits(student))]).max().item()
    )
    if difference != 0:
        raise ValueError(
            f"'adapter_start' cannot be had: no exact copy of the student's adapter ({config.peft_type.value}, "
            f"init_lora_weights={getattr(student.peft_config['default'], 'init_lora_weights', None)!r}) can be made beside "
            f"it; the logits differ by {difference:.2g}. Name a copy of the student as the teacher."
        )


# The copy's first values are overwritten; some initializations would take them out of the base weights once more.
_WITHOUT_SURGERY = {"init_lora_weights": True, "layer_replication": None}


def _some_logits(student: Any) -> Tensor:
    """Logits of eight tokens, (1, 8, V)."""
    embeddings = student.get_input_embeddings().weight
    ids = torch.arange(8, device=embeddings.device)[None] % len(embeddings)
    training = student.training
    student.eval()
    try:
        with torch.no_grad():
            return student(input_ids=ids, use_cache=False).logits
    finally:
        student.train(training)
