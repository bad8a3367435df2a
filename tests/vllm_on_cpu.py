"""What TRL's two ways to vLLM need on the CPU build, and nothing of what camopd does. Import it before a trainer is made.

In the process, the CPU build packs each linear layer's weight into a oneDNN handle and leaves an empty parameter, which
nothing can be loaded into: here the weight stays, and is packed again after each sync. On a server, TRL sends weights over
NCCL: here vLLM's own packing goes to a file, which the server loads.
"""

import os
import random
import shutil
import tempfile
from pathlib import Path

import numpy
import torch
import trl.generation.vllm_generation as of_trl
import vllm.model_executor.layers.utils as layers
from safetensors.torch import save_file
from trl.generation.vllm_client import VLLMClient
from vllm.distributed.weight_transfer.packed_tensor import pack_tensors, unpack_tensor


KV_CACHE = 16 << 20  # bytes

pack = layers.dispatch_cpu_unquantized_gemm
load = of_trl.VLLMGeneration.sync_weights
start = of_trl.LLM
engines = {}


def sync_weights(self):
    load(self)
    if self.mode == "colocate":
        for layer in self.llm.llm_engine.model_executor.driver_worker.model_runner.model.modules():
            if hasattr(layer, "cpu_linear"):
                pack(layer, remove_weight=False)


def start_eagerly(**settings):
    """Without torch.compile, which takes a minute, and not with a share of the machine's memory. Who asks for an engine
    like the last one gets that, with the weights that were sent to it last: a start takes longer than most tests."""
    key = repr(sorted(settings.items()))
    if key not in engines:
        engines.clear()
        engines[key] = start(enforce_eager=True, kv_cache_memory_bytes=KV_CACHE, **settings)
    for seed in (random.seed, numpy.random.seed, torch.manual_seed):  # as every start does in its process
        seed(settings["seed"])
    return engines[key]


def join(self, device=0):
    assert self.get_server_info()["weight_transfer_config"] is not None  # what TRL asks before it joins NCCL
    assert self.get_world_size() == 1


def send(self, metadata, named_params):
    """In chunks that vLLM's sender packs as for NCCL: it copies many tensors at once, after it has been given them all."""
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    tensors, named_params = {}, iter(named_params)
    while chunk := pack_tensors(named_params, lambda item: item[1].detach(), 1 << 30):
        parts = unpack_tensor(chunk.packed_tensor, chunk.names, chunk.shapes, chunk.dtypes, chunk.tensor_sizes)
        tensors |= {name: tensor.clone() for name, tensor in parts}
    assert [(n, str(t.dtype).removeprefix("torch."), list(t.shape)) for n, t in tensors.items()] == [
        *map(tuple, metadata)
    ]
    try:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        self._post(
            f"{self.base_url}/collective_rpc",
            json={"method": "reload_weights", "kwargs": {"weights_path": str(folder)}},
        )
    finally:
        shutil.rmtree(folder)


os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
layers.dispatch_cpu_unquantized_gemm = lambda layer, remove_weight: pack(layer, remove_weight=False)
of_trl.VLLMGeneration.sync_weights, of_trl.LLM = sync_weights, start_eagerly
VLLMClient.init_communicator, VLLMClient.update_named_params = join, send
