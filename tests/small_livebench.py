"""A small LiveBench, whose scripts have the flags and the files of the real ones, and what its tests ask of it."""

import json
import subprocess
import sys
from pathlib import Path

from trainers import refused

from camopd import cli
from camopd.eval import cage
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
# As the real one: an answer is a line, and of a server that fails, or says nothing, the line is $ERROR$, which
# --retry-failures asks again.
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
        if not text:
            raise OSError("No message returned from OpenAI")
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


def small_checkout(tmp_path, monkeypatch):
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


def replace_cage(monkeypatch, tmp_path):
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
        said.seek(0)
        last = said.read().decode().strip().splitlines()
        how = "passed" if done.returncode == 0 else last[-1] if last else "left before its end"
        return done.returncode == 0, how

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


def for_nobody(checkout):
    """Make a checkout one that nobody may read, as in root's cage, with the Python of the system."""
    for path in checkout.parents:
        path.chmod(path.stat().st_mode | 0o055)
    python = checkout / scripts.PYTHON
    python.unlink()
    python.symlink_to("/usr/bin/python3")
