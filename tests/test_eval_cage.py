"""The cage for code that models have written (camopd/eval/cage.py); what needs bubblewrap is run by `make test-eval`."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from camopd.errors import CaMOPDError
from camopd.eval import cage


real = pytest.mark.eval


def left_behind():
    """Processes with the mark of a test's program."""
    return subprocess.run(
        ["pgrep", "-f", "python3 -I /program"], capture_output=True, text=True, check=False
    ).stdout.split()


def test_cage_that_cannot_be_made_says_what_to_install(monkeypatch):
    monkeypatch.setenv("CAMOPD_BWRAP", "/nowhere/bwrap")
    with pytest.raises(CaMOPDError, match=r"in a cage only, .* install the package `bubblewrap`"):
        cage.find()
    monkeypatch.setattr(cage.shutil, "which", lambda name: None if name == "prlimit" else f"/bin/{name}")
    with pytest.raises(CaMOPDError, match=r"needs prlimit \(package util-linux\)"):
        cage.find()


def test_cage_that_does_not_start_is_refused_before_an_answer_is_wrong(monkeypatch, tmp_path):
    """In many containers bubblewrap is there and may make no namespace."""
    bwrap = tmp_path / "bwrap"
    bwrap.write_text(
        "#!/bin/sh\necho 'bwrap: No permissions to create a new namespace' >&2\nexit 1\n", encoding="utf-8"
    )
    for path in (tmp_path, *tmp_path.parents):
        path.chmod(path.stat().st_mode | 0o055)  # for nobody
    bwrap.chmod(0o755)
    monkeypatch.setenv("CAMOPD_BWRAP", str(bwrap))
    with pytest.raises(CaMOPDError, match=r"cannot be made here: bwrap: No permissions .* user namespaces"):
        cage.find()


@pytest.mark.parametrize("root", [True, False])
def test_cage_has_no_network_no_keys_and_never_root(root, monkeypatch):
    monkeypatch.setattr(cage.os, "geteuid", lambda: 0 if root else 1000)
    words = cage.words("bwrap", "python3")
    assert (words[:2] == ["setpriv", "--reuid=65534"]) == root
    assert {"--unshare-all", "--clearenv", "--die-with-parent"} <= set(words)
    assert not [word for word in words if word.startswith("--bind")]


def test_room_shows_what_it_names_and_nothing_of_it_to_write():
    room = cage.Room(
        processes=7,
        addresses=9,
        shown={"/inside": "/outside"},
        links={"/a": "b"},
        files={"/tmp/a": b"x"},
        semaphores=True,
    )
    words = " ".join(cage.words("bwrap", "python3", room, {"/tmp/a": 5}))
    assert (
        "--ro-bind /outside /inside --symlink b /a --ro-bind-data 5 /tmp/a " in words and "--nproc=7 --as=9 " in words
    )
    assert "--tmpfs /dev/shm" in words and "--tmpfs /dev/shm" not in " ".join(cage.words("bwrap", "python3"))


def environment_of(tmp_path, python, home):
    """A virtual environment as `python -m venv` makes it."""
    folder = tmp_path / "environment"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python3").symlink_to(python)
    (folder / "bin" / "python").symlink_to("python3")
    (folder / "pyvenv.cfg").write_text(f"home = {home}\ninclude-system-site-packages = false\n", encoding="utf-8")
    return folder


def home_of(tmp_path, place, base):
    """A home folder with a link to a Python, and a secret beside it."""
    link = tmp_path / "home" / place
    link.parent.mkdir(parents=True)
    link.symlink_to(base)
    for name in (".ssh", ".local/share"):
        (tmp_path / "home" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "home" / name / "secret").touch()
    return link


@pytest.mark.parametrize("place", ["bin/python3", ".local/bin/python3.11"])
def test_python_that_is_linked_into_a_home_folder_shows_nothing_of_it(tmp_path, place):
    base = Path(sys.base_prefix)
    link = home_of(tmp_path, place, base / "bin" / "python3")
    shown, links = cage.of_python(environment_of(tmp_path, link, link.parent), [tmp_path / "home"])
    assert links[str(link)] == str(base / "bin" / "python3")
    real = str((base / "bin" / "python3").resolve())
    assert set(shown) <= {real, str(base.resolve() / "lib"), str(base.resolve() / "lib64")}


def says(tmp_path, *lines):
    """An environment whose Python says that it is of these paths."""
    folder = environment_of(tmp_path, "nothing", "/nowhere")
    (folder / "bin" / "python3").unlink()
    (folder / "bin" / "python3").write_text("#!/bin/sh\n" + "".join(f"echo \"'{line}'\"\n" for line in lines))
    (folder / "bin" / "python3").chmod(0o755)
    return folder


def test_python_of_bin_is_that_of_usr(tmp_path):
    folder = says(tmp_path, "/usr", "/usr/bin/python3.11")  # as /bin/python3 does where /bin is a link to usr/bin
    (folder / "pyvenv.cfg").write_text("home = /bin\n", encoding="utf-8")
    assert cage.of_python(folder, [tmp_path]) == ({}, {})


@pytest.mark.parametrize("prefix", ["/", "{}", "{}/home", "{}/LiveBench"])
def test_python_whose_files_lie_among_others_is_refused(tmp_path, prefix):
    private = [tmp_path / "LiveBench", tmp_path / "home"]
    with pytest.raises(CaMOPDError, match=r"has its files in .* is in that folder, too: .* that of /usr/bin/python3"):
        cage.of_python(says(tmp_path, prefix.format(tmp_path), "/usr/bin/python3"), private)


def test_python_that_is_installed_in_a_home_folder_shows_its_library_alone(tmp_path):
    (tmp_path / ".local" / "lib").mkdir(parents=True)
    python = f"{tmp_path}/.local/bin/python3.12"
    shown, links = cage.of_python(says(tmp_path, f"{tmp_path}/.local", python), [tmp_path])
    assert shown == {path: path for path in (python, f"{tmp_path}/.local/lib")} and links == {}


def test_python_that_does_not_start_is_an_error(tmp_path):
    with pytest.raises(CaMOPDError, match=r"bin/python does not start: .*No such file"):
        cage.of_python(environment_of(tmp_path, "nothing", "/nowhere"), [])
    (tmp_path / "other").mkdir()
    with pytest.raises(CaMOPDError, match=r"does not start"):
        cage.of_python(says(tmp_path / "other"), [])


@real
@pytest.mark.parametrize("place", ["bin/python3", ".local/bin/python3.11", "/bin/python3"])
def test_environment_of_such_a_python_works_in_the_cage(tmp_path, place):
    link = home_of(tmp_path, place, "/usr/bin/python3") if not place.startswith("/") else Path(place)
    environment = environment_of(tmp_path, link, link.parent)
    for path in (environment, *environment.parents):
        path.chmod(path.stat().st_mode | 0o055)  # for nobody
    shown, links = cage.of_python(environment, [tmp_path / "home"])
    secret = str(tmp_path / "home" / ".ssh")
    program = f"import os, sys; assert sys.prefix == '/environment' and not os.path.exists({secret!r})"
    room = cage.Room(shown={"/environment": str(environment), **shown}, links=links)
    with open(tmp_path / "said", "w+b") as said:
        made = cage.into(said, program, (cage.find()[0], "/environment/bin/python"), room)
    assert made == (True, "passed")


def test_memory_is_that_of_a_process_and_all_below_it():
    assert cage.memory_of(os.getpid()) > 10 << 20
    child = subprocess.Popen(["sh", "-c", "sleep 30 & sleep 30"])
    try:
        time.sleep(0.2)
        assert 0 < cage.memory_of(child.pid) < 100 << 20
    finally:
        subprocess.run(["pkill", "-P", str(child.pid)], check=False)
        child.kill()
        child.wait()
    assert cage.memory_of(child.pid) == 0


@real
@pytest.mark.parametrize(
    ("program", "passed", "how"),
    [
        ("assert 1 + 1 == 2", True, "passed"),
        ("print('é' * 100)", True, "passed"),
        ("assert False", False, "AssertionError"),
        ("x = '\\ud800'; print(x.encode('utf-8', 'replace'))", True, "passed"),
        ("import sys; sys.exit(0)", False, "left before its end"),
        ("import os; os._exit(0)", False, "left before its end"),
        ("while True: pass", False, "out of time"),
        ("import time; time.sleep(60)", False, "out of time"),
        ("b = bytearray(2 << 30)", False, "MemoryError"),
        ("import os\nfor n in range(4): os.fork()\nb = bytearray(b'x') * (400 << 20)\nimport time; time.sleep(60)", False,
         "out of memory"),
        ("import os\nwhile True: os.fork()", False, "BlockingIOError: [Errno 11] Resource temporarily unavailable"),
        ("import os\nif os.fork() == 0:\n    os.setsid()\n    import time; time.sleep(60)", True, "passed"),
        ("for n in range(9): open(f'/tmp/{n}', 'wb').write(bytes(16 << 20))", False,
            "OSError: [Errno 28] No space left on device"),
        ("for path in ('/x', '/usr/x', '/dev/x', '/dev/shm/x', '/program'):\n"
         "    try: open(path, 'w')\n    except OSError: continue\n    raise ValueError(path)", True, "passed"),
        ("import socket\ns = socket.create_connection(('127.0.0.1', 22), 1)", False,
         "ConnectionRefusedError: [Errno 111] Connection refused"),
        ("import os\nassert os.getuid() != 0\n"
         "assert {*os.listdir('/')} <= {*'usr lib lib64 bin proc dev tmp program'.split()}\n"
         "assert {n for n in os.environ if not n.endswith('_NUM_THREADS')} <= {'PWD', 'LC_CTYPE'}, os.environ\n"
         "assert [p for p in os.listdir('/proc') if p.isdigit()] == ['1', '2']", True, "passed"),
        ("import os\nos.kill(1, 9)\nos.kill(-1, 9)", False, "ProcessLookupError: [Errno 3] No such process"),
    ],
)  # fmt: skip
def test_program_does_no_harm_and_nothing_of_it_is_left(program, passed, how):
    before = set(os.listdir("/tmp"))
    seconds = 60 if how == "out of memory" else 3  # on a busy machine to fill it takes longer
    assert cage.run(program, cage.find(), seconds=seconds) == (passed, how)
    deadline = time.monotonic() + 5
    while left_behind() and time.monotonic() < deadline:  # the kernel clears a cage away
        time.sleep(0.05)
    assert not left_behind()
    assert set(os.listdir("/tmp")) <= before | {name for name in os.listdir("/tmp") if not name.isdigit()}


@real
def test_program_sees_no_answer_of_another_task(tmp_path):
    secret = tmp_path / "answers.jsonl"
    secret.write_text("secret", encoding="utf-8")
    passed, how = cage.run(f"open({str(secret)!r})", cage.find())
    assert not passed and how.startswith("FileNotFoundError")


@real
def test_what_a_program_prints_is_apart_from_its_errors_and_looked_at_while_it_runs(tmp_path):
    files = {"/tmp/deep/er/a": b"given"}
    program = (
        "import sys\nprint(open('/tmp/deep/er/a').read())\nprint('error', file=sys.stderr)\nopen('/tmp/deep/b', 'w')"
    )
    with open(tmp_path / "said", "w+b") as said, open(tmp_path / "errors", "w+b") as errors:
        assert cage.into(said, program, cage.find(), cage.Room(files=files), errors) == (True, "passed")
    assert [path.read_bytes() for path in (tmp_path / "said", tmp_path / "errors")] == [b"given\n", b"error\n"]

    program = "import os\nwhile True: os.write(2, bytes(1 << 20))"
    with open(tmp_path / "said", "w+b") as said, open(tmp_path / "errors", "w+b") as errors:
        assert cage.into(said, program, cage.find(), cage.Room(), errors) == (False, "printed too much")

    def look():
        raise KeyboardInterrupt

    with open(tmp_path / "said", "w+b") as said, pytest.raises(KeyboardInterrupt):
        cage.into(said, "import time; time.sleep(60)", cage.find(), cage.Room(), look=look)
    assert not left_behind()


@real
def test_cage_is_made_by_a_user_as_by_root(tmp_path):
    """The command line of a user, by a user: as root through setpriv, or as whoever runs the tests."""
    bwrap, python = cage.find()
    words = cage.words(bwrap, python)
    own = words[words.index(bwrap) :]
    as_user = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups"] if os.geteuid() == 0 else []
    program = b"import os; print(os.getuid()); n = 0\nwhile True:\n    os.fork()"
    done = subprocess.run([*as_user, *own], input=program, capture_output=True, timeout=60, check=False)
    assert done.stdout.split()[0] == (b"12345" if as_user else str(os.getuid()).encode())
    assert b"BlockingIOError" in done.stderr


@real
def test_libraries_in_the_cage_take_one_thread_and_are_named_with_its_python():
    """numpy would make as many as the machine has cores, and each counts as a process."""
    found = cage.find()
    assert re.fullmatch(r"Python 3[.]\d+[.]\d+, numpy (None|\d[.\w]+), 2 GiB", cage.about(found))
    program = "import os; assert [os.environ[f'{x}_NUM_THREADS'] for x in ('OMP', 'MKL', 'OPENBLAS')] == ['1'] * 3"
    assert cage.run(program, found)[0]


@real
def test_program_may_have_the_memory_that_the_docs_say():
    found = cage.find()
    assert cage.run("room = bytearray(1_300_000_000)", found)[0]
    assert not cage.run("room = bytearray(2_200_000_000)", found)[0]
