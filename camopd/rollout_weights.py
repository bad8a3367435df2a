"""The student's weights as files that rollout servers read: a LoRA adapter alone, or all of them."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, is_peft_model
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from trl.distributed import DistributedBackend
from trl.generation.vllm_generation import VLLMGeneration

from .errors import CaMOPDError, on_all_ranks
from .masters import is_quantised
from .precision import compute_dtype
from .teachers.adapters import trained_base_weights
from .teachers.vllm.plan import refuse_quantised
from .vllm.sampler import Version


FOLDER = "_rollout_weights"  # in output_dir; what begins with _ is never sent to the Hub
FILE_BYTES = 4 << 30  # of a file of weights, which is in memory until it is written
# Settings of a LoRA adapter that vLLM does not apply, and what they are called.
_UNFIT = (
    "modules_to_save", "use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_qalora", "use_bdlora",
    "trainable_token_indices", "target_parameters",
)  # fmt: skip
_INITS = ("gaussian", "eva", "orthogonal")  # that leave the base as it is
_WAY = "Leave it out, or roll out with use_vllm=True, which merges the adapter"


def check_adapter(model: Any) -> None:
    """Raise `ValueError` for a student with an adapter that is not all that is trained, or that vLLM cannot apply."""
    refuse_quantised(is_quantised(model))
    if not is_peft_model(model):
        return
    names = model.active_adapters
    config = model.peft_config[names[0]]
    unfit = [f"{name}={getattr(config, name)!r}" for name in _UNFIT if getattr(config, name, None)]
    if getattr(config, "bias", "none") != "none":
        unfit.append(f"bias={config.bias!r}")
    init = getattr(config, "init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _INITS:
        unfit.append(f"init_lora_weights={init!r}, which changes the base")
    if config.peft_type.value != "LORA":
        unfit.append(f"peft_type={config.peft_type.value}")
    if len(names) > 1:
        unfit.append(f"the adapters {names} together")
    if unfit:
        raise ValueError(
            f"rollout_servers get a student's LoRA adapter alone, and vLLM cannot apply one with {', '.join(unfit)}. "
            f"{_WAY}."
        )
    trained = trained_base_weights(model)
    if trained:
        raise ValueError(
            f"rollout_servers get a student's LoRA adapter alone, and {len(trained)} weights are trained beside it, "
            f"{trained[0]!r} for example. {_WAY}."
        )


class WeightsFolder:
    """`_rollout_weights` in `output_dir`, with a folder for each version. All methods are called by all ranks."""

    def __init__(self, output_dir: str | Path, is_main: bool):
        self._path, self._is_main = Path(output_dir).resolve() / FOLDER, is_main
        self._run = ""  # tells names of this process's adapters from those of an earlier one on the same servers
        self._count = 0

    def write(self, trainer: Any) -> Version:
        """A new version: the student as it is now. Raises `CaMOPDError` on all ranks where it cannot be written."""
        if not self._run:
            self.remove()  # what a run that was killed has left
            self._run = gather_object([uuid.uuid4().hex[:8]])[0]
        self._count += 1
        model = trainer.accelerator.unwrap_model(trainer.model)
        name = f"camopd-{self._run}-{self._count}"
        is_adapter, config = is_peft_model(model), model.config.get_text_config()
        tied = not is_adapter and bool(getattr(config, "tie_word_embeddings", False))
        version = Version(name, self._path / name, is_adapter, tied)
        beside = self._path / f"_{name}"
        error: OSError | SafetensorError | None = None
        writer = _Writer(beside)
        weights = _adapter_weights(trainer, model) if version.is_adapter else _named_weights(trainer)
        dtype = None if version.is_adapter else compute_dtype(trainer.accelerator, model)
        for weight_name, weight in weights:  # all ranks gather; what goes wrong here waits until they have
            if self._is_main and error is None:
                try:
                    writer.add(weight_name, weight, dtype)
                except (OSError, SafetensorError) as raised:
                    error = raised
        with on_all_ranks(gather_object):
            try:
                if error is not None:
                    raise error
                if self._is_main:
                    writer.close(model if version.is_adapter else None)
                    beside.rename(version.folder)
            except (OSError, SafetensorError) as raised:
                raise CaMOPDError(
                    f"the weights for the rollout servers cannot be written to {str(self._path)!r}: {raised}. Give another "
                    "output_dir, or make room."
                ) from raised
        return version

    def drop(self, version: Version) -> None:
        """Remove a version that no server needs any more."""
        if self._is_main:
            shutil.rmtree(version.folder, ignore_errors=True)

    def remove(self) -> None:
        """Remove all of them."""
        if self._is_main:
            shutil.rmtree(self._path, ignore_errors=True)


class _Writer:
    """Files of weights, each as soon as it is full."""

    def __init__(self, folder: Path):
        self._folder, self._tensors = folder, dict[str, Tensor]()
        self._bytes = self._files = 0

    def add(self, name: str, weight: Tensor, dtype: torch.dtype | None) -> None:
        """Take a copy: TRL takes an adapter out of a merged weight again, in place, and gathered ones are shared."""
        dtype = dtype if dtype is not None and weight.is_floating_point() else weight.dtype
        copy = torch.empty(weight.shape, dtype=dtype, device="cpu").copy_(weight.detach())
        if self._tensors and self._bytes + copy.nbytes > FILE_BYTES:
            self._save(f"model-{self._files:05}.safetensors")
        self._tensors[name] = copy
        self._bytes += copy.nbytes

    def close(self, adapted: Any) -> None:
        """Write what is left; of an `adapted` model as PEFT has it."""
        if adapted is None:
            self._save(f"model-{self._files:05}.safetensors")
            return
        from peft import get_peft_model_state_dict

        name = adapted.active_adapters[0]
        self._tensors = get_peft_model_state_dict(
            adapted, state_dict=self._tensors, adapter_name=name, save_embedding_layers=False
        )
        self._save("adapter_model.safetensors")
        adapted.peft_config[name].save_pretrained(self._folder)

    def _save(self, name: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        save_file(self._tensors, self._folder / name, metadata={"format": "pt"})
        self._tensors, self._bytes, self._files = {}, 0, self._files + 1


def _of_trl(trainer: Any) -> Any:
    """What TRL gathers weights for vLLM with, under the names that vLLM knows, without the vLLM that it would start."""
    generation = VLLMGeneration.__new__(VLLMGeneration)
    generation.model, generation.accelerator = trainer.model, trainer.accelerator
    generation._dist = DistributedBackend(trainer.accelerator)
    if generation._dist.fsdp_version == 2:
        for module in trainer.model.modules():
            if isinstance(module, FSDPModule):  # the outermost stays whole after a forward, and TRL wants shards
                module.reshard()
    return generation


def _named_weights(trainer: Any) -> Iterator[tuple[str, Tensor]]:
    """All weights, one after the other; each is whole until the next is asked for. A collective of all ranks."""
    yield from _of_trl(trainer)._iter_named_params()


def _adapter_weights(trainer: Any, model: Any) -> Iterator[tuple[str, Tensor]]:
    """Those of the trained adapter, by PEFT's names, an embedding's with the adapter's last. A collective of all ranks."""
    of_trl, own = _of_trl(trainer), f".{model.active_adapters[0]}."
    if of_trl._dist.fsdp_version == 1:
        pairs = of_trl._iter_fsdp1_params(trainer.model)
        yield from ((name, weight) for name, weight in pairs if model.prefix in name and own in f"{name}.")
        return
    for name, weight in model.named_parameters():
        if model.prefix in name and own in f"{name}.":
            name = of_trl._fix_param_name_to_vllm(name)
            if hasattr(weight, "full_tensor"):  # of FSDP2, which may keep it on the CPU
                yield name, weight.to(trainer.accelerator.device).full_tensor()
                continue
            with of_trl._dist.gather_params([weight]):
                yield name, weight.data
