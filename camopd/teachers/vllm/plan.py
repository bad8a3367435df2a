"""Which vLLM servers a run's teachers need: models, replicas, ports, GPUs and flags. Starts nothing."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import re
import shlex
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ...schedule import number_of
from ..address import (
    OWN_TEACHERS,
    base_of,
    did_you_mean,
    has_adapter,
    is_server,
    key_variables,
    names_missing_model,
    public_url,
    student_revision,
    urls_and_model,
    without_secrets,
)


LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's --max-lora-rank may be
ROLLOUT_KEY = "CAMOPD_ROLLOUT_API_KEY"


@dataclass
class Server:
    """One vLLM process: a replica of one model, which may be the teacher of several branches."""

    branches: list[str]
    replica: int
    model: str
    host: str
    port: int
    gpus: list[str] = field(default_factory=list)  # as CUDA_VISIBLE_DEVICES names them
    student: bool = False  # it writes rollouts, and takes the weights of the trainer
    plain: bool = False  # it is one of `rollout_servers`, and not asked by TRL's client
    lora_rank: int = 0  # of the adapter that it gets in place of all weights

    @property
    def name(self) -> str:
        return f"{'+'.join(self.branches)}/{self.replica}"

    @property
    def url(self) -> str:
        """What the trainer calls. 0.0.0.0 and :: mean this machine only to itself, others need its name."""
        every_address = False
        with contextlib.suppress(ValueError):
            every_address = ipaddress.ip_address(self.host).is_unspecified
        return self._url(socket.gethostname() if every_address else self.host)

    @property
    def health_url(self) -> str:
        here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return self._url(here) + "/health"

    def _url(self, host: str) -> str:
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


@dataclass
class VLLM:
    """A Python that has vLLM."""

    python: str
    version: str
    cpu: bool  # the build that runs without an accelerator

    @property
    def has_scale_out(self) -> bool:
        """Since 0.30 a flag opens the endpoint; an older vLLM stops at a flag it does not know."""
        numbers = re.match(r"(\d+)\.(\d+)", self.version)
        return numbers is None or (int(numbers[1]), int(numbers[2])) >= (0, 30)


def models_of(teachers: dict[str, Any], init_kwargs: Any, notes: list[str]) -> dict[str, list[str]]:
    """The models to start, each with its branches; for every other teacher a line in `notes`.

    Raises `ValueError` for teachers that cannot be served, where `init_kwargs` want a revision of them, and when none of
    them is a model.
    """
    models: dict[str, list[str]] = {}
    for branch, teacher in teachers.items():
        if is_server(teacher):
            urls = ", ".join(map(public_url, urls_and_model(teacher)[0]))
            notes.append(f"{branch}: {urls} is a server already, nothing to start")
        elif isinstance(teacher, str) and teacher in OWN_TEACHERS:
            notes.append(f"{branch}: {teacher} is {OWN_TEACHERS[teacher]}, it needs no server")
        elif isinstance(teacher, str) and teacher:
            models.setdefault(os.path.expanduser(teacher), []).append(str(branch))
        else:
            raise ValueError(
                f"the teacher of branch {branch!r} is {without_secrets(repr(teacher))}. It must be a model id, a "
                "path, the URL of a vLLM server or a list of URLs, 'adapter_off', 'adapter_start' or 'self'."
            )
    if not models:
        raise ValueError(
            f"there is nothing to start: {'; '.join(notes)}. Give a branch of `teachers` a model id or a path."
        )
    revision = init_kwargs.get("revision") if isinstance(init_kwargs, Mapping) else None
    if revision not in (None, "main") and not all(map(os.path.isdir, models)):
        raise ValueError(
            f"teacher_model_init_kwargs has the revision {revision!r}, and servers load a model by its name alone. hf "
            f"download MODEL --revision {revision} --local-dir DIR; then name DIR as the teacher."
        )
    return models


def replicas_of(text: str, models: dict[str, list[str]], branches: Sequence[str]) -> dict[str, int]:
    """Processes of each model, from `2` or `general=2,domain=1`; a model of several branches gets the most of them.

    Raises `ValueError` for what is not a positive number, and for a branch that the config lacks or that is not started.
    """
    how = "Give a number for all of them, or one for each as in general=2,domain=1."
    started = [branch for of_model in models.values() for branch in of_model]
    items = [item.partition("=") for item in text.split(",")]
    if "=" not in text and "," not in text:
        items = [(branch, "=", text) for branch in started]
    counts: dict[str, int] = {}
    for name, equals, number in items:
        branch = name.strip()
        if not equals or not number.strip().isdecimal() or int(number) < 1:
            raise ValueError(f"--replicas must be whole numbers of at least 1, got {text!r}. {how}")
        if branch not in branches:
            raise ValueError(
                f"--replicas names {branch!r}, but the branches of `teachers` are {list(branches)}. {how}"
            )
        if branch not in started:
            raise ValueError(f"--replicas names {branch!r}, whose teacher is not started here. Leave it out.")
        counts[branch] = int(number)
    return {model: max(counts.get(branch, 1) for branch in of_model) for model, of_model in models.items()}


def plan_servers(models: dict[str, list[str]], replicas: dict[str, int], host: str, port: int) -> list[Server]:
    """The processes in the order of the branches, on consecutive ports. Raises `ValueError` when ports run out."""
    planned = [(model, replica) for model in models for replica in range(replicas[model])]
    if not 1 <= port <= 65536 - len(planned):
        raise ValueError(
            f"--port {port} leaves no room for {len(planned)} ports in a row: they go from 1 to 65535. Set another."
        )
    return [
        Server(branches=models[model], replica=replica, model=model, host=host, port=port + place)
        for place, (model, replica) in enumerate(planned)
    ]


def plan_students(settings: Mapping[str, Any], host: str | None, port: int | None) -> list[Server]:
    """The student's rollout servers: one for each of `rollout_servers`, on its host and port; or that of TRL's client.

    `host` and `port`, where they are given, are where they listen, on ports in a row from there.

    Raises `ValueError` for a config without a student, or with a quantised one, or whose runs would ask no such server.
    """
    refuse_quantised(settings.get("load_in_4bit") is True or settings.get("load_in_8bit") is True)
    urls = settings.get("rollout_servers")
    urls = [url.strip() for url in urls.split(",") if url.strip()] if isinstance(urls, str) else urls
    if not urls:
        return [plan_student(settings, host or "127.0.0.1", port)]
    if not is_server(urls) or isinstance(urls, dict):
        raise ValueError(
            f"rollout_servers must be URLs of vLLM servers, got {without_secrets(repr(urls))}. Write rollout_servers: "
            "[http://host:8000]."
        )
    model, rank = _base_and_rank(settings, _student_of(settings))
    planned = []
    for place, url in enumerate(dict.fromkeys(urls)):
        parts = urlsplit(url)
        own = parts.port or (443 if parts.scheme == "https" else 80)
        at = host or parts.hostname or "", own if port is None else port + place
        planned.append(Server(["student"], place, model, *at, student=True, plain=True, lora_rank=rank))
    return planned


def refuse_quantised(quantised: bool) -> None:
    """Raise `ValueError` for a student with `quantised` weights: vLLM would draw from others than are trained."""
    if quantised:
        raise ValueError(
            "a student with quantised weights (load_in_4bit, load_in_8bit, a quantization_config) cannot be rolled out by "
            "vLLM: it gets adapters and weights of an unquantised model. Leave use_vllm and rollout_servers out, or load "
            "the student unquantised."
        )


def is_here(host: str) -> bool:
    """Whether an address is one of this machine's, which can be listened on."""
    with contextlib.suppress(OSError), socket.create_server((host, 0), family=socket.getaddrinfo(host, 0)[0][0]):
        return True
    return False


def plan_student(settings: Mapping[str, Any], host: str, port: int | None) -> Server:
    """The student's rollout server, on the port where TRL's client looks for it unless another one is given.

    Raises `ValueError` for a config without a student, or whose runs would ask no such server.
    """
    model = _student_of(settings)
    if settings.get("use_vllm") is not True or settings.get("vllm_mode") != "server":
        raise ValueError(
            "--student starts a rollout server, and the config has no `use_vllm: true` with `vllm_mode: server`, and no "
            "`rollout_servers`: training would not ask it. Set one of them."
        )
    port = int(settings.get("vllm_server_port") or 8000) if port is None else port
    return Server(["student"], 0, model, host, port, student=True)


def _student_of(settings: Mapping[str, Any]) -> str:
    model = settings.get("model_name_or_path")
    if not isinstance(model, str) or not model:
        raise ValueError(
            "--student starts the rollout server of `model_name_or_path`, which the config does not have."
        )
    if names_missing_model(model):
        raise ValueError(
            f"model_name_or_path names {model!r}, but there is no such path.{did_you_mean(model)} Give the folder of a "
            "model, or its id on the Hub."
        )
    revision = student_revision(settings)
    if revision is not None:
        raise ValueError(
            f"the student's revision {revision!r} reaches no rollout server, which would load another model. hf download "
            f"{model} --revision {revision} --local-dir DIR; then set model_name_or_path: DIR, and take the revision out."
        )
    return os.path.expanduser(model)


def student_dtype(settings: Mapping[str, Any]) -> str:
    """What the student computes in: rollouts are to round as the trainer does."""
    if settings.get("bf16") is not False:  # which is the default
        return "bfloat16"
    kwargs = settings.get("model_init_kwargs") or {}
    kwargs = json.loads(kwargs) if isinstance(kwargs, str) else kwargs
    given = settings.get("dtype") or kwargs.get("dtype") or kwargs.get("torch_dtype") or "float32"
    return str(given).removeprefix("torch.")


def _base_and_rank(settings: Mapping[str, Any], model: str) -> tuple[str, int]:
    """What servers load, and the --max-lora-rank for the adapter that the trainer gives them; 0 for all weights."""
    rank = int(settings.get("lora_r") or 16) if settings.get("use_peft") is True else 0
    if has_adapter(model):
        base = base_of(model)  # which says what is wrong with the file
        config = json.loads((Path(model) / "adapter_config.json").read_text(encoding="utf-8"))
        rank = max(rank, int(config.get("r") or 8), *map(int, (config.get("rank_pattern") or {}).values()))
        model = base
    if rank > LORA_RANKS[-1]:
        raise ValueError(
            f"a LoRA rank of {rank} is more than vLLM takes, {LORA_RANKS[-1]}. Lower it, or use use_vllm."
        )
    return model, next(each for each in LORA_RANKS if each >= rank) if rank else 0


def assign_gpus(servers: Sequence[Server], gpus: list[str], tensor_parallel_size: int) -> None:
    """Give each process the next `tensor_parallel_size` GPUs. Raises `ValueError` when there are too few."""
    needed = len(servers) * tensor_parallel_size
    if len(gpus) < needed:
        listing = f" ({','.join(gpus)})" if gpus else ""
        raise ValueError(
            f"{len(servers)} processes ({', '.join(server.name for server in servers)}) x --tensor-parallel-size "
            f"{tensor_parallel_size} = {needed} GPUs, but there are {len(gpus)}{listing}. Lower --replicas or "
            "--tensor-parallel-size, or name a GPU twice in --gpus to share it."
        )
    for place, server in enumerate(servers):
        server.gpus = gpus[place * tensor_parallel_size : (place + 1) * tensor_parallel_size]
        if len(set(server.gpus)) < tensor_parallel_size:
            raise ValueError(
                f"{server.name} would get the GPUs {','.join(server.gpus)}, one of them twice: a GPU can be shared by two "
                "processes, not by the parts of one. Order --gpus so that a repeated GPU comes in another process."
            )


def key_of(server: Server, environment: Mapping[str, str] = os.environ) -> str | None:
    """The key a server will ask for: from the environment as the trainer reads it, or else what is set for vLLM itself.

    Raises `ValueError` when branches of one server have different keys: it takes one.
    """
    if server.plain:
        return next(filter(None, (environment.get(name, "").strip() for name in (ROLLOUT_KEY, "VLLM_API_KEY"))), None)
    if server.student:
        return None  # TRL's client sends none
    keys = {}
    for branch in server.branches:
        values = [environment.get(name, "").strip() for name in (*key_variables(branch), "VLLM_API_KEY")]
        keys[branch] = next(filter(None, values), None)
    if len(set(keys.values())) > 1:
        raise ValueError(
            f"the branches {' and '.join(keys)} have the same model and so the same servers, but not the same key. Set "
            "CAMOPD_TEACHER_API_KEY alone."
        )
    return keys[server.branches[0]]


def top_k_of(settings: Mapping[str, Any]) -> int:
    """The teacher's likeliest tokens that a run's steps ask for."""
    asked = settings.get("divergence_top_k", 20) if settings.get("divergence") == "top_k" else 0
    with contextlib.suppress(ValueError, OverflowError):  # of no number, and of infinity
        if (number := number_of(str(asked))) == int(number):
            return int(number)
    raise ValueError(
        f"divergence_top_k must be a whole number, got {asked!r}. It is how many tokens a teacher is asked for."
    )


def flags_of(
    server: Server,
    servers: Sequence[Server],
    vllm: VLLM | None,
    max_model_len: int,
    dtype: str | None = None,
    tensor_parallel_size: int = 1,
    top_k: int = 0,
) -> list[str]:
    """vLLM's flags for one of the `servers`; `vllm` is None where it is not known what will run it. `top_k`: the likeliest
    tokens that a run asks of a teacher."""
    cpu = vllm is not None and vllm.cpu
    flags = ["--host", server.host, "--port", str(server.port), "--max-model-len", str(max_model_len)]
    if not server.student:
        # vLLM's V1 runner computes prompt log-probs for a whole batch at once and does not count them when it measures
        # what the cache may take. Logits in bfloat16 and log-probs in float32 are 6 bytes per token and vocabulary entry:
        # 8192 tokens x 152k x 6 are 7.5 GB, 2048 tokens 1.9 GB.
        flags += ["--max-num-batched-tokens", "2048"]
    # Opens /inference/v1/generate, which takes 5 bytes per scored token where JSON takes 82.
    if not server.plain and (vllm is None or vllm.has_scale_out):
        flags += ["--enable-scale-out"]
    if server.lora_rank:  # of a version and the one before, which may be under way
        flags += ["--enable-lora", "--max-lora-rank", str(server.lora_rank), "--max-loras", "2"]
    if server.plain:
        flags += ["--logprobs-mode", "processed_logprobs"]  # of what it draws from
    elif server.student:  # as TRL's documentation has it
        flags += ["--weight-transfer-config", '{"backend": "nccl"}', "--max-logprobs", "-1"]
        flags += ["--logprobs-mode", "processed_logprobs"]  # of what it draws from
    else:
        flags += ["--max-logprobs", str(max(20, top_k))]
        # The model's own distribution, before any sampling setting.
        flags += ["--logprobs-mode", "raw_logprobs"]
    # Without it the model's generation_config.json sets temperature and penalties that no request asked for.
    flags += ["--generation-config", "vllm"]
    if not server.student:  # scoring needs every position computed and so never reads the cache, only fills it
        flags += ["--no-enable-prefix-caching"]
    flags += ["--dtype", dtype or ("float32" if cpu else "auto")]
    flags += ["--tensor-parallel-size", str(tensor_parallel_size)]
    if cpu:  # compiling takes minutes and a C++ compiler
        flags += ["--enforce-eager"]
    # vLLM takes 0.92 of a GPU for itself alone.
    sharing = max((sum(gpu in other.gpus for other in servers) for gpu in server.gpus), default=1)
    if sharing > 1:
        flags += ["--gpu-memory-utilization", f"{0.9 / sharing:.2f}"]
    return flags


def command_line(server: Server, flags: list[str]) -> str:
    """The process as a line for a shell."""
    devices = [f"CUDA_VISIBLE_DEVICES={shlex.quote(','.join(server.gpus))}"] if server.gpus else []
    devices += [f"{name}={value}" for name, value in _switches(server).items()]
    return " ".join([*devices, shlex.join(["vllm", "serve", server.model, *flags])])


def _switches(server: Server) -> dict[str, str]:
    """What opens the requests that weights are sent with."""
    switches = {"VLLM_SERVER_DEV_MODE": "1"} if server.student else {}
    return switches | ({"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"} if server.lora_rank else {})


def environment_of(server: Server, vllm: VLLM, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What a process gets: this environment, its GPUs, and its key, which is never on the command line for `ps` to show."""
    # glibc's MALLOC_* settings, which help a CPU run, make vLLM slow and large. Keys of other branches are not for it.
    dropped = ("MALLOC_", "CAMOPD_TEACHER_API_KEY", ROLLOUT_KEY)
    found = {name: value for name, value in environment.items() if not name.startswith(dropped)}
    found["VLLM_NO_USAGE_STATS"] = "1"
    key = key_of(server, environment)
    if key is not None:
        found["VLLM_API_KEY"] = key
    found |= _switches(server)
    if server.student and not server.plain:
        found.pop("VLLM_API_KEY", None)
    if server.gpus:
        found["CUDA_VISIBLE_DEVICES"] = ",".join(server.gpus)
    if vllm.cpu:  # GiB; scoring keeps no more than the sequences in flight
        found.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    return found
