"""LiveBench's scripts, run (camopd/eval/livebench_scripts.py): small ones in their place, with their flags and files."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fake_openai import serving
from trainers import refused

from camopd import cli
from camopd.errors import CaMOPDError, DataError
from camopd.eval import cage, jobs
from camopd.eval import livebench_scripts as scripts


FLAGS = """
import argparse, glob, json, os, sys
parser = argparse.ArgumentParser()
for name in ("question-source", "livebench-release-option", "model", "model-display-name", "api-base", "parallel",
             "max-tokens", "force-temperature"):
    parser.add_argument("--" + name)
parser.add_argument("--bench-name", nargs="+")
parser.add_argument("--resume", action="store_true")
parser.add_argument("--retry-failures", action="store_true")
args = parser.parse_args()
assert args.question_source == "jsonl" and args.livebench_release_option == "2024-11-25"
def lines(path):
    return [json.loads(line) for line in open(path)] if os.path.exists(path) else []
def questions():
    for bench in args.bench_name:
        for path in sorted(glob.glob("data/" + bench + "/**/question.jsonl", recursive=True)):
            for row in lines(path):
                if row["livebench_release_date"] <= "2024-11-25" < (row["livebench_removal_date"] or "9"):
                    yield os.path.dirname(path), row
"""
# As the real one: an answer is a line, and of a server that fails the line is $ERROR$, which --retry-failures asks again.
ASK = (
    FLAGS
    + """
import urllib.request
import livebench
assert "KEY" not in " ".join(sys.argv) and args.resume and args.retry_failures and args.force_temperature == "0"
for folder, row in questions():
    path = folder + "/model_answer/" + args.model_display_name + ".jsonl"
    os.makedirs(os.path.dirname(path), exist_ok=True)
    done = {line["question_id"]: line["choices"][0]["turns"][0] for line in lines(path)}
    if done.get(row["question_id"], "$ERROR$") != "$ERROR$":
        continue
    body = dict(model=args.model, temperature=0.0, max_tokens=int(args.max_tokens),
                messages=[dict(role="user", content=row["turns"][0])])
    header = {"Authorization": "Bearer " + os.environ["LIVEBENCH_API_KEY"]}
    request = urllib.request.Request(args.api_base + "/chat/completions", json.dumps(body).encode(), header)
    failure = None
    try:
        with urllib.request.urlopen(request) as reply:
            text = json.load(reply)["choices"][0]["message"]["content"]
    except OSError as error:
        failure = f"{error}, with {header}"
        print(f"HTTPError: {failure}")
        text = "$ERROR$"
    with open(path, "a") as file:
        answer = dict(question_id=row["question_id"], answer_id=text, choices=[dict(index=0, turns=[text])],
                      error_msg=failure)
        file.write(json.dumps(answer) + "\\n")
"""
)
# Of the category coding it runs the answer; elsewhere the answer is right or not.
JUDGE = (
    FLAGS
    + """
import livebench
if os.path.exists("/checkout/livebench/broken") or os.environ.get("BROKEN"):
    raise KeyError("a question")
for folder, row in questions():
    answers = {line["question_id"]: line for line in lines(folder + "/model_answer/" + args.model_display_name + ".jsonl")}
    text = answers[row["question_id"]]["choices"][0]["turns"][-1]
    if "coding" in folder:
        space = {}
        try:
            exec(text, space)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
    score = space.get("score", 0) if "coding" in folder else float(text == row["ground_truth"])
    os.makedirs(folder + "/model_judgment", exist_ok=True)
    category, task = folder.split("/")[-2:]
    with open(folder + "/model_judgment/ground_truth_judgment.jsonl", "a") as file:
        judgment = dict(question_id=row["question_id"], model=args.model_display_name, score=score, category=category)
        file.write(json.dumps({**judgment, "task": task}) + "\\n")
"""
)


def question(folder, category, task, name, truth, released="2024-06-24", removed=""):
    path = folder / "livebench" / "data" / "live_bench" / category / task / "question.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    row = {"question_id": name, "turns": [f"ask {name}"], "ground_truth": truth, "livebench_release_date": released}
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({**row, "livebench_removal_date": removed}) + "\n")


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A small LiveBench with five questions of the release, one that came later and one that was gone before."""
    folder = tmp_path / "LiveBench"
    (folder / "livebench" / "model" / "model_configs").mkdir(parents=True)
    for name, text in (("__init__.py", ""), (scripts.ASK, ASK), (scripts.JUDGE, JUDGE)):
        (folder / "livebench" / name).write_text(text, encoding="utf-8")
    (folder / "livebench" / "model" / "model_configs" / "x.yml").write_text(
        "display_name: known-model\naliases:\n  - org/known\n", encoding="utf-8"
    )
    python = folder / scripts.PYTHON
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    question(folder, "math", "aime", "a", "ask a")
    question(folder, "math", "aime", "b", "ask b")
    question(folder, "math", "amps", "c", "ask c")
    question(folder, "language", "typos", "d", "ask d")
    question(folder, "coding", "LCB_generation", "e", "")
    question(folder, "math", "aime", "later", "ask later", released="2025-04-25")
    question(folder, "agentic_coding", "python", "docker", "", released="2025-05-30")
    question(folder, "language", "typos", "gone", "ask gone", removed="2024-11-25")
    git(folder, "init", "-q")
    (folder / ".gitignore").write_text(".venv\ndata\n", encoding="utf-8")
    git(folder, "add", ".")
    git(folder, "-c", "user.name=x", "-c", "user.email=x@example.org", "commit", "-q", "-m", "x")
    monkeypatch.setattr(scripts, "COMMIT", git(folder, "rev-parse", "HEAD"))
    monkeypatch.setattr(scripts, "FOR_ANSWERS", ("json",))
    monkeypatch.chdir(tmp_path)
    return folder


def git(folder, *words):
    return subprocess.run(
        ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture
def no_cage(monkeypatch, tmp_path):
    """In place of the cage a process that sees the same files, elsewhere; it is what `-m eval` has a real one for."""

    def into(said, program, cage_, room, errors=None, look=lambda: None):
        look()
        root = tmp_path / f"cage-{len(list(tmp_path.glob('cage-*')))}"
        (root / "tmp").mkdir(parents=True)
        for inside, path in room.shown.items():
            if inside.startswith("/checkout/"):
                (root / inside[1:]).parent.mkdir(parents=True, exist_ok=True)
                (root / inside[1:]).symlink_to(path)
        for inside, content in room.files.items():
            (root / inside[1:]).parent.mkdir(parents=True, exist_ok=True)
            (root / inside[1:]).write_bytes(content)
        for inside in ("/tmp/work", "/checkout"):
            program = program.replace(inside, f"{root}{inside}")
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=said, stderr=errors or said, check=False, stdin=subprocess.DEVNULL
        )
        return done.returncode == 0, "passed" if done.returncode == 0 else "left before its end"

    monkeypatch.setattr(cage, "find", lambda: ("bwrap", "/usr/bin/python3"))
    monkeypatch.setattr(cage, "into", into)


def echo(body):
    return body["messages"][0]["content"]


def words_of(checkout, *models, **more):
    options = [word for name, value in more.items() for word in (f"--{name.replace('_', '-')}", value)]
    return ["--tasks", "livebench", "--data", f"livebench={checkout}", "--models", *models, *options]


def said_of(capsys, words):
    cli.main(["eval", *words])
    return capsys.readouterr().out


def error_of(capsys, words):
    return " ".join(refused(capsys, "eval", *words).split())


def notes():
    return " ".join(json.loads(Path("eval-output/eval.json").read_text(encoding="utf-8"))["notes"])


def items_of(name="m"):
    kept = json.loads(Path("eval-output/eval.json").read_text(encoding="utf-8"))
    return kept["tasks"][0]["models"][name]


def test_scripts_ask_and_judge_and_make_the_table(checkout, no_cage, capsys, monkeypatch):
    monkeypatch.setenv("CAMOPD_EVAL_API_KEY", "a-secret")
    before = sorted(path for path in checkout.rglob("*") if "__pycache__" not in str(path))
    with serving(lambda body: "no") as start, serving(echo) as result:
        models = [f"start={start.url}", f"result={result.url}"]
        said = said_of(capsys, words_of(checkout, *models, max_tokens="77", paper="medical"))
        said_of(capsys, words_of(checkout, *models, max_tokens="77"))
        assert len(start.requests) == len(result.requests) == 5  # the second call asks nothing again
    assert "| livebench | 0.0 (to 52.2) | 80.0 ± 55.5 | 5 | - / - | - / - |" in said
    assert "| LiveBench 1125 | 52.10 | 34.40 | 42.80 | 49.00 | - | 0.00 | 66.67 |" in said  # of three categories
    assert "2024-11-25 or that of 2025-11-25" in said and "livebench: /" not in said  # no warning
    assert f"livebench: with LiveBench {scripts.COMMIT[:12]}, release 2024-11-25." in notes()
    assert sorted(echo(body) for body in start.requests) == [f"ask {name}" for name in "abcde"]
    assert {(body["temperature"], body["max_tokens"], body["model"]) for body in start.requests} == {(0.0, 77, "tiny")}
    assert set(start.keys) == {"Bearer a-secret"}
    for path in Path("eval-output").rglob("*"):
        assert path.is_dir() or b"secret" not in path.read_bytes(), path
    assert before == sorted(path for path in checkout.rglob("*") if "__pycache__" not in str(path))


def test_evaluation_that_ended_between_answers_and_judgments_goes_on(checkout, no_cage, capsys):
    broken = checkout / "livebench" / "broken"
    with serving(echo) as server:
        words = words_of(checkout, f"m={server.url}")
        own = (checkout / "livebench" / scripts.JUDGE).read_text(encoding="utf-8")
        (checkout / "livebench" / scripts.JUDGE).write_text(
            own.replace('"/checkout/livebench/broken"', repr(str(broken))), encoding="utf-8"
        )
        broken.touch()
        said = error_of(capsys, words)
        assert "has judged 0 of 1 answers of the category coding: KeyError: 'a question'" in said
        assert "Answers and other judgments are kept" in said and len(server.requests) == 5
        broken.unlink()
        said_of(capsys, words)
        assert len(server.requests) == 5 and items_of()["items"] == 5


def test_answers_that_a_kill_has_torn_are_asked_again_and_no_others(checkout, no_cage, capsys):
    with serving(echo) as server:
        words = words_of(checkout, f"m={server.url}")
        said_of(capsys, words)
        folder = Path("eval-output/m/livebench")
        (folder / jobs.ANSWERS).unlink()
        (path,) = folder.glob("work/data/live_bench/math/aime/model_answer/*.jsonl")
        path.write_bytes(path.read_bytes()[:-20])
        said_of(capsys, words)
        assert [echo(body) for body in server.requests[5:]] == ["ask b"] and items_of()["items"] == 5


def test_failure_of_the_server_is_an_item_without_a_score_and_asked_again(checkout, no_cage, capsys):
    down = ["ask a"]
    with serving(lambda body: 500 if echo(body) in down else echo(body)) as server:
        words = words_of(checkout, f"m={server.url}")
        said_of(capsys, words)
        assert "livebench: 1 of 5 questions have no score of m, " in notes() and items_of()["items"] == 4
        assert items_of()["mean"] == 3 / 4  # e is wrong, a is nothing
        down.clear()
        said_of(capsys, words)
        assert "no score" not in notes() and items_of()["mean"] == 4 / 5
        assert [echo(body) for body in server.requests[5:]] == ["ask a"]


def test_server_that_fails_at_all_is_an_error_with_its_words_and_not_its_key(checkout, no_cage, capsys, monkeypatch):
    monkeypatch.setenv("CAMOPD_EVAL_API_KEY", "a-secret")
    with serving(lambda body: 500) as server:
        said = error_of(capsys, words_of(checkout, f"m={server.url}"))
    assert "has answered none of 5 questions: HTTPError: HTTP Error 500" in said and "Bearer ***" in said
    for path in Path("eval-output").rglob("*"):
        assert path.is_dir() or b"secret" not in path.read_bytes(), path


def test_model_that_was_judged_before_is_read_and_another_commit_is_said(checkout, no_cage, capsys):
    rows = [("a", "math", "aime"), ("b", "math", "aime"), ("c", "math", "amps"), ("d", "language", "typos"),
            ("e", "coding", "LCB_generation")]  # fmt: skip
    for name, category, task in rows:
        path = checkout / "livebench" / "data" / "live_bench" / category / task / "model_judgment"
        path.mkdir(exist_ok=True)
        judgment = {"question_id": name, "model": "start", "score": 0, "category": category, "task": task}
        with open(path / "ground_truth_judgment.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(judgment) + "\n")
    with serving(lambda body: pytest.fail("asked")) as start, serving(echo) as result:
        said = said_of(capsys, words_of(checkout, f"start={start.url}", f"result={result.url}"))
    assert "+80.0 [" in said
    assert re.search(
        r"livebench was asked of start as it was judged in the checkout before, .*; result with LiveBench", notes()
    )
    # The judgments are made anew by another commit, and the answers are not.
    (checkout / "livebench" / scripts.JUDGE).write_text(
        JUDGE.replace("float(text ==", "float(text !="), encoding="utf-8"
    )
    assert items_of("result")["mean"] == 4 / 5
    with serving(lambda body: pytest.fail("asked")) as server:
        said = said_of(capsys, words_of(checkout, f"start={server.url}", f"result={server.url}"))
    assert "with changed files, and what was tried here is LiveBench" in said and items_of("result")["mean"] == 0


@pytest.mark.parametrize("served", ["known-model", "Org/Known"])
def test_name_that_livebench_has_settings_for_is_refused_before_it_asks(checkout, no_cage, capsys, served):
    with serving(echo, model=served) as server:
        said = error_of(capsys, words_of(checkout, f"m={server.url}"))
        assert f"served as '{served}', and for that name LiveBench has sampling" in said and not server.requests


def test_what_is_missing_is_said_with_the_lines_that_make_it(checkout, no_cage, capsys, monkeypatch):
    words = words_of(checkout, "m=http://127.0.0.1:9")
    for path in checkout.rglob("question.jsonl"):
        path.unlink()
    assert "no questions of the release 2024-11-25. In " in error_of(capsys, words)
    assert "../.venv/bin/python download_questions.py" in error_of(capsys, words)
    monkeypatch.setattr(cage, "into", lambda *words: (False, "execvp: Permission denied"))
    said = error_of(capsys, words)
    assert "does not do in the cage for code that models have written: execvp" in said and "nobody" in said
    (checkout / scripts.PYTHON).unlink()
    said = error_of(capsys, words)
    assert "python3 -m venv .venv && .venv/bin/pip install -e . matplotlib numpy scipy sortedcontainers" in said
    (checkout / "livebench" / scripts.JUDGE).unlink()
    assert "is no checkout of LiveBench: there is no livebench/gen_api_answer.py" in error_of(capsys, words)
    said = error_of(capsys, ["--tasks", "livebench", "--models", "m=http://127.0.0.1:9"])
    assert f"`git -C CHECKOUT checkout {scripts.COMMIT}`, and add --data livebench=CHECKOUT" in said


def test_without_bubblewrap_nothing_is_asked(checkout, capsys, monkeypatch):
    monkeypatch.setenv("CAMOPD_BWRAP", "/nowhere/bwrap")
    with serving(echo) as server:
        assert "install the package `bubblewrap`" in error_of(capsys, words_of(checkout, f"m={server.url}"))
        assert not server.requests


def test_commit_of_a_checkout_is_read_and_its_changes_seen(checkout, tmp_path):
    assert scripts.commit_of(checkout) == f"LiveBench {scripts.COMMIT[:12]}"
    (checkout / "livebench" / "__init__.py").write_text("1", encoding="utf-8")
    assert scripts.commit_of(checkout) == f"LiveBench {scripts.COMMIT[:12]} with changed files"
    (checkout / "inside").mkdir()
    assert scripts.commit_of(checkout / "inside") == "LiveBench of an unknown commit"  # not that of what it lies in


def test_question_that_is_none_is_named(checkout, no_cage):
    (path,) = checkout.rglob("aime/question.jsonl")
    path.write_text(path.read_text(encoding="utf-8") + '{"question_id": 1}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"line 4 of '.*aime/question.jsonl' is not a question of LiveBench"):
        scripts.questions(scripts.opened(checkout))


@pytest.mark.parametrize(
    ("printed", "said"),
    [("", "has judged 0 of 2"), ('{"question_id": "a", "score": 1}', "has judged 1 of 2"),
     ('{"question_id": "a", "score": NaN}', "has judged 0 of 2 .* is not a judgment"), ("[" * 10**5, "is not a judgment"),
     ("[1]", "is not a judgment"), ("x" * 10**6, "'x{100}' is not a judgment")],
)  # fmt: skip
def test_what_comes_out_of_the_cage_is_looked_at(checkout, no_cage, monkeypatch, tmp_path, printed, said):
    """A program in it may have written it."""
    found = scripts.opened(checkout)
    rows = [{**row, "answer_id": "x", "text": "y"} for row in scripts.questions(found) if row["task"] == "aime"]
    monkeypatch.setattr(cage, "into", lambda file, *rest: (file.write(printed.encode()) >= 0, "passed"))
    (tmp_path / jobs.LOG).touch()
    with pytest.raises(CaMOPDError, match=said):
        scripts.in_cage(found, tmp_path, "math", rows, lambda: None)


def test_judge_sees_neither_the_checkouts_data_nor_its_env_file(checkout, no_cage):
    (checkout / "livebench" / ".env").write_text("OPENAI_API_KEY=x", encoding="utf-8")
    room = scripts.room_of(scripts.opened(checkout), answers=10)
    shown = room.shown
    assert room.seconds - scripts.room_of(scripts.opened(checkout)).seconds == 600  # a minute for each answer
    assert not {"/checkout/livebench/data", "/checkout/livebench/.env", "/checkout/livebench"} & set(shown)
    assert f"/checkout/livebench/{scripts.JUDGE}" in shown


def test_python_outside_of_usr_is_shown_with_what_it_is_made_of(checkout, no_cage):
    (checkout / ".venv" / "pyvenv.cfg").write_text("home = /opt/python/3.12/bin\nversion = 3.12\n", encoding="utf-8")
    shown = scripts.room_of(scripts.opened(checkout)).shown
    assert shown["/opt/python/3.12"] == "/opt/python/3.12"
    (checkout / ".venv" / "pyvenv.cfg").write_text("home = /usr/bin\n", encoding="utf-8")
    assert "/usr" not in scripts.room_of(scripts.opened(checkout)).shown


PROGRAM = """
import multiprocessing, os, socket, sys
sys.stdin.read()
multiprocessing.Queue()
assert os.getuid() != 0 and not os.path.exists({secret!r}), "sees the machine"
assert sorted(os.listdir("/tmp/work/data/live_bench")) == ["coding"], "sees other categories"
for path in ("/checkout/livebench/x", "/checkout/x", "/usr/x"):
    try:
        open(path, "w")
    except OSError:
        continue
    raise ValueError("wrote " + path)
try:
    socket.create_connection(("127.0.0.1", {port}), 1)
except OSError:
    score = 1
"""


def for_nobody(checkout):
    """Make a checkout one that nobody may read, as in root's cage, with the Python of the system."""
    for path in checkout.parents:
        path.chmod(path.stat().st_mode | 0o055)
    python = checkout / scripts.PYTHON
    python.unlink()
    python.symlink_to("/usr/bin/python3")


@pytest.mark.eval
def test_environment_without_what_answers_import_is_refused(checkout, capsys, monkeypatch, tmp_path):
    """Programs that import it would be wrong answers."""
    for_nobody(checkout)
    monkeypatch.setattr(scripts, "FOR_ANSWERS", ("json", "no_such_module"))
    said = error_of(capsys, words_of(checkout, "m=http://127.0.0.1:9"))
    assert "models have written: AssertionError: it has no no_such_module. In " in said


@pytest.mark.eval
def test_code_of_a_model_is_judged_in_a_real_cage(checkout, capsys, tmp_path):
    for_nobody(checkout)
    secret = tmp_path / "secret"
    secret.touch()
    with serving(
        lambda body: (
            PROGRAM.format(secret=str(secret), port=server.server_port) if echo(body) == "ask e" else echo(body)
        )
    ) as server:
        said_of(capsys, words_of(checkout, f"m={server.url}"))
    log = Path("eval-output/m/livebench/log.txt").read_text(encoding="utf-8")
    assert items_of()["mean"] == 1, log
    assert not [path for path in os.listdir("/tmp") if path == "work"]
