"""A model of an evaluation that is a path, served while its tasks run (camopd/commands/eval_server.py)."""

import sys

import httpx
import pytest

from camopd.commands.eval_server import served
from camopd.errors import CaMOPDError
from camopd.eval.models import Model
from camopd.teachers.vllm.plan import VLLM


SERVER = """#!{python}
import sys, http.server
assert sys.argv[1:3] == ["-m", "vllm.entrypoints.openai.api_server"], sys.argv
print(sys.argv, flush=True)
{before}
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


def make(folder, before=""):
    path = folder / "python"
    path.write_text(SERVER.format(python=sys.executable, before=before), encoding="utf-8")
    path.chmod(0o755)
    return VLLM(str(path), "0.32.0", cpu=True)


def test_server_is_up_inside_on_this_machine_alone_and_gone_after(tmp_path):
    log = tmp_path / "server.txt"
    with served(Model("start", "~/m"), 512, make(tmp_path), log, []) as url:
        assert url.startswith("http://127.0.0.1:")
        assert httpx.get(f"{url}/health").status_code == 200
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")
    words = log.read_text(encoding="utf-8")
    assert "'--max-model-len', '512', '--generation-config', 'vllm'" in words and "'~/m'" not in words


@pytest.mark.parametrize("key", ["own", None])
def test_server_asks_for_the_key_of_the_evaluation_and_no_other(tmp_path, monkeypatch, key):
    for name in ("CAMOPD_TEACHER_API_KEY", "CAMOPD_TEACHER_API_KEY_START", "VLLM_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, "another")
    if key:
        monkeypatch.setenv("CAMOPD_EVAL_API_KEY", f"{key}\n")  # as an env file has it
    log = tmp_path / "server.txt"
    vllm = make(tmp_path, "import os; print({n: v for n, v in os.environ.items() if 'KEY' in n}, flush=True)")
    with served(Model("start", "x"), 512, vllm, log, []):
        pass
    assert str({"VLLM_API_KEY": key} if key else {}) in log.read_text(encoding="utf-8")


def test_server_that_dies_is_told_with_the_first_error_of_its_log(tmp_path):
    vllm = make(tmp_path, "print('ValueError: 9000 is more than 8192'); print('RuntimeError: engine'); sys.exit(1)")
    with (
        pytest.raises(
            CaMOPDError,
            match=r"(?s)cannot serve the model 'start', x \(exit code 1\): ValueError: 9000 is more.*server",
        ),
        served(Model("start", "x"), 512, vllm, tmp_path / "server.txt", []),
    ):
        pass


def test_signal_ends_the_wait(tmp_path):
    with served(
        Model("start", "x"), 512, make(tmp_path, "import time; time.sleep(60)"), tmp_path / "s.txt", [15]
    ) as url:
        assert url is None
