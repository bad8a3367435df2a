"""A model of an evaluation that is a path: served by vLLM on this machine while its tasks run."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx

from ..errors import CaMOPDError
from ..eval.asking import key_of
from ..eval.jobs import KEY
from ..eval.models import Model
from ..teachers.vllm.plan import VLLM, Server, environment_of
from . import processes
from .serve import gpus_of_machine


_START = 1800  # seconds until a server must answer; loading a large model takes minutes


@contextlib.contextmanager
def served(model: Model, context: int, vllm: VLLM, log: Path, signals: Sequence[int]) -> Iterator[str | None]:
    """Yields the URL of a server of the model, or `None` where a signal came first; ends it after.

    Every sampling setting is a request's: the model's generation_config.json is not read.

    Raises `CaMOPDError` where the server does not come up, with the last error of its log.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    gpus = [] if vllm.cpu else gpus_of_machine(vllm)
    server = Server(
        branches=[model.name], replica=0, model=os.path.expanduser(model.where), host="127.0.0.1", port=port
    )
    words = [vllm.python, "-m", "vllm.entrypoints.openai.api_server", "--model", server.model, "--host", server.host]
    words += ["--port", str(port), "--max-model-len", str(context), "--generation-config", "vllm"]
    words += ["--enforce-eager", "--dtype", "float32"] if vllm.cpu else ["--data-parallel-size", str(len(gpus))]
    # The key of the evaluation and no other: teachers have theirs.
    environment = {name: value for name, value in os.environ.items() if "API_KEY" not in name}
    if key := key_of(KEY):
        environment["VLLM_API_KEY"] = key
    with open(log, "ab") as file:
        child = processes.start(words, stdout=file, env=environment_of(server, vllm, environment))
    try:
        yield server.url if _up(child, server, model, log, signals) else None
    finally:
        processes.end([child], signals, grace=20)


def _up(child: subprocess.Popen[bytes], server: Server, model: Model, log: Path, signals: Sequence[int]) -> bool:
    deadline = time.monotonic() + _START
    with httpx.Client(timeout=2, trust_env=False) as client:
        while not signals:
            if child.poll() is not None or time.monotonic() > deadline:
                how = "did not answer in time" if child.poll() is None else processes.how_it_ended(child.returncode)
                raise CaMOPDError(
                    f"vLLM cannot serve the model {model.name!r}, {model.where} ({how}): {_cause(log)}\nAll it said is in "
                    f"{log}. A context that is longer than the model's is set by --max-tokens and --context."
                )
            with contextlib.suppress(httpx.TransportError):
                if client.get(server.health_url).status_code == 200:
                    return True
            time.sleep(0.2)
    return False


def _cause(log: Path) -> str:
    """The first error of a server's log: what follows is what it led to."""
    text = log.read_text(encoding="utf-8", errors="replace")
    found = re.findall(r"(?m)((?:[\w.]*Error|Exception): .+|Value error, .+)$", text)
    return found[0][:600] if found else text.strip()[-300:]
