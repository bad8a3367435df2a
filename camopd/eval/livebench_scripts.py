"""The scripts of a LiveBench checkout, run: they ask a model, and judge its answers, in an environment of their own.

To judge is to run code that a model has written, so that is done in the cage, one category at a time. What comes out of it
is read as JSON lines, and nothing more. All that is written lies in the folder of the job: the checkout stays as it is.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import atomic
from ..errors import CaMOPDError, DataError
from ..files import json_lines
from . import cage, jobs, verdicts
from .asking import key_of
from .livebench import JUDGMENTS, NAME, score_of
from .runner import cut_torn_line


RELEASE = "2024-11-25"
# The last one that judges all of the release: those after it stop at its instruction following (a set of dicts).
COMMIT = "555b35d4ec1ff0e3830697a0e6049c4f96a6d624"
HEARD = 16384  # tokens that a server started here has for a prompt: articles and tables are among them
ASK, JUDGE = "gen_api_answer.py", "gen_ground_truth_judgment.py"
PYTHON = ".venv/bin/python"
# What answers that are code import. Without it they would be wrong, and LiveBench does not ask for it at this commit.
FOR_ANSWERS = ("matplotlib", "numpy", "scipy", "sortedcontainers")
_SETUP = (
    "In {folder}:\n"
    f"  python3 -m venv .venv && .venv/bin/pip install -e . {' '.join(FOR_ANSWERS)}\n"
    "  .venv/bin/python -m spacy download en_core_web_sm && .venv/bin/python -m nltk.downloader -d .venv/nltk_data punkt "
    "punkt_tab averaged_perceptron_tagger_eng"
)
_PROBE = """
import importlib.util
for name in {names!r}:
    assert importlib.util.find_spec(name), f"it has no {{name}}"
"""
_QUESTIONS = "data/live_bench/*/*/question.jsonl"
# Of each model, in a folder of its own: LiveBench writes all names small, and takes some for models that it knows.
_MODEL = "camopd"
_ERROR = "$ERROR$"  # the answer that LiveBench writes down where a server gave none
_KEY = "LIVEBENCH_API_KEY"
_ROOM = cage.Room(memory=8 << 30, addresses=4 << 30, processes=128, semaphores=True)
_START, _EACH = 300.0, 60.0  # seconds to judge a category, and for each answer: code that never ends has 6 a test
_IN_CAGE = """
import glob, os, subprocess, sys
os.chdir("/tmp/work")
# A program without standard input, as this one, has no sys.stdin, which tests of code are fed through.
done = subprocess.run({words!r}, stdin=subprocess.DEVNULL, stdout=2, env={environment!r})
if done.returncode:
    sys.exit(done.returncode)
for path in sorted(glob.glob({judgments!r}, recursive=True)):
    with open(path) as file:
        sys.stdout.write(file.read() + "\\n")
"""


@dataclass(frozen=True)
class Checkout:
    """A checkout whose scripts can be run, and whose judge has a cage."""

    root: str
    commit: str  # in words
    bwrap: str

    @property
    def folder(self) -> Path:
        return Path(self.root)


def opened(checkout: Path | None) -> Checkout:
    """A checkout that is ready to be run. Raises `CaMOPDError` with the lines that make it so, and without a cage."""
    if checkout is None:
        raise DataError(
            "no checkout of LiveBench is named. `git clone https://github.com/LiveBench/LiveBench CHECKOUT`, `git -C "
            f"CHECKOUT checkout {COMMIT}`, and add --data livebench=CHECKOUT."
        )
    folder = checkout.expanduser().absolute()
    folder = folder.parent if (folder / ASK).is_file() else folder
    if not all((folder / NAME / script).is_file() for script in (ASK, JUDGE)):
        raise DataError(
            f"{str(checkout)!r} is no checkout of LiveBench: there is no livebench/{ASK} with {JUDGE} in it."
        )
    lines = _SETUP.format(folder=folder)
    if not (folder / PYTHON).exists():
        raise CaMOPDError(f"LiveBench runs in its own environment, and there is no {folder / PYTHON}. {lines}")
    bwrap, _ = cage.find()
    found = Checkout(str(folder), commit_of(folder), bwrap)
    with tempfile.TemporaryFile() as said:
        program = _PROBE.format(names=FOR_ANSWERS)
        made, how = cage.into(said, program, (bwrap, f"/checkout/{PYTHON}"), room_of(found))
    if not made:
        raise CaMOPDError(
            f"{folder / PYTHON} does not do in the cage for code that models have written: {how}. {lines}. In the cage of "
            "root all runs as nobody, who must be able to read the checkout and the Python: take one below /usr."
        )
    return found


def commit_of(folder: Path) -> str:
    """Which LiveBench a checkout is, in words."""
    git = ["git", "-c", "safe.directory=*", "--git-dir", str(folder / ".git"), "--work-tree", str(folder)]
    try:
        head, changes = (
            subprocess.run(
                [*git, *words], capture_output=True, encoding="utf-8", check=True, timeout=60
            ).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        return "LiveBench of an unknown commit"
    return f"LiveBench {head[:12]}{' with changed files' if changes else ''}"


def warnings(checkout: Checkout | None) -> list[str]:
    """A line on a checkout that is not the one that was tried here."""
    tried = f"LiveBench {COMMIT[:12]}"
    if checkout is None or checkout.commit == tried:
        return []
    return [
        f"livebench: {checkout.folder} is {checkout.commit}, and what was tried here is {tried} (`git checkout {COMMIT}`). "
        "Another one may judge otherwise, or not at all."
    ]


def checkout_of(folder: Path) -> Checkout:
    """That of a job."""
    return Checkout(**json.loads((folder / jobs.JOB).read_text(encoding="utf-8"))["checkout"])


def questions(checkout: Checkout) -> list[dict[str, Any]]:
    """The questions of the release, without their texts. Raises `DataError` where there are none."""
    found = []
    for path in sorted((checkout.folder / NAME).glob(_QUESTIONS)):
        for number, line in enumerate(json_lines(path.read_text(encoding="utf-8")), start=1):
            try:
                row = json.loads(line)
                if _is_of_release(row):
                    found.append({
                        "question_id": str(row["question_id"]), "category": path.parts[-3], "task": path.parts[-2],
                        "prompt": f"{path.parts[-3]}, {path.parts[-2]}: {row['question_id']}",
                        "gold": hashlib.sha256(line.encode()).hexdigest(),
                    })  # fmt: skip
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(f"line {number} of {str(path)!r} is not a question of LiveBench: {error!r}.") from None
    if not found:
        raise DataError(
            f"{str(checkout.folder)!r} has no questions of the release {RELEASE}. In {checkout.folder / NAME}: "
            f"`../{PYTHON} download_questions.py`. It brings them into data/live_bench/CATEGORY/TASK/question.jsonl."
        )
    return found


def _is_of_release(row: Mapping[str, Any]) -> bool:
    removed = row["livebench_removal_date"]
    return row["livebench_release_date"] <= RELEASE and (removed == "" or removed > RELEASE)


def need_unknown(checkout: Checkout, served: str) -> None:
    """Raise `CaMOPDError` for a name that LiveBench has settings of its own for: they would replace those of the job."""
    known = re.compile(rf"(?im)^\s*(?:-|display_name:)\s*[\"']?{re.escape(served)}[\"']?\s*$")
    for path in sorted((checkout.folder / NAME / "model" / "model_configs").glob("*.yml")):
        if known.search(path.read_text(encoding="utf-8")):
            raise CaMOPDError(
                f"the model is served as {served!r}, and for that name LiveBench has sampling and a provider of its own "
                f"({path.name}). Serve it under another one (vLLM: --served-model-name)."
            )


def lay_out(checkout: Checkout, folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Put the questions into the folder of a job, where the scripts look for them, and mend what a kill has torn."""
    for category, task in sorted({(row["category"], row["task"]) for row in rows}):
        link = folder / "work" / "data" / "live_bench" / category / task / "question.jsonl"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(checkout.folder / NAME / "data" / "live_bench" / category / task / "question.jsonl")
    for path in jobs.files_of_answers(folder):
        cut_torn_line(path)


def words_to_ask(checkout: Checkout, job: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The command line that has a model answer what is not answered yet, in the folder `work` of its job.

    Agentic coding needs docker, and is of later releases: only the categories of the rows are named.
    """
    which = _which(sorted({row["category"] for row in rows}))
    return [
        str(checkout.folder / PYTHON), str(checkout.folder / NAME / ASK), *which, "--model", job["model"],
        "--model-display-name", _MODEL, "--api-base", job["url"], "--force-temperature", "0",
        "--max-tokens", str(job["generation"]["max_tokens"]), "--parallel", str(job["concurrency"]),
        "--resume", "--retry-failures",
    ]  # fmt: skip


def _which(categories: Sequence[str]) -> list[str]:
    names = [f"live_bench/{category}" for category in categories]
    return ["--bench-name", *names, "--question-source", "jsonl", "--livebench-release-option", RELEASE]


def environment(checkout: Checkout) -> dict[str, str]:
    """That of the script which asks: the key where LiveBench reads it, and none from a .env of the checkout."""
    return jobs.environment() | {
        "PYTHONPATH": str(checkout.folder), "PYTHON_DOTENV_DISABLED": "1", _KEY: key_of(jobs.KEY) or "EMPTY",
    }  # fmt: skip


def gather(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Put the answers that the script has written together, in the order of the questions; a failure is one without a text.

    Raises `CaMOPDError` where one is missing, and where all are failures.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in jobs.files_of_answers(folder):
        for line in json_lines(path.read_text(encoding="utf-8")):
            answer = json.loads(line)
            turns = answer["choices"][0]["turns"]
            failed = turns == _ERROR or _ERROR in turns
            found[str(answer["question_id"])] = {
                "answer_id": answer.get("answer_id"), "text": None if failed else turns[-1],
            }  # fmt: skip
    if any(row["question_id"] not in found for row in rows):
        raise jobs.failed(folder, len(rows))
    if all(found[row["question_id"]]["text"] is None for row in rows):
        raise CaMOPDError(
            f"{folder}: the server has answered none of {len(rows)} questions: {jobs.last_error(folder / jobs.LOG)}\nThe "
            f"same command asks again. All that LiveBench said is in {folder / jobs.LOG}."
        )
    lines = [
        json.dumps({"item": number, **row, **found[row["question_id"]]}) + "\n" for number, row in enumerate(rows)
    ]
    atomic.write(folder / jobs.ANSWERS, "".join(lines))


def judge(
    checkout: Checkout,
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    tick: Callable[..., None] = lambda steps=1: None,
) -> list[dict[str, Any]]:
    """The answers of a finished job with their scores, from an earlier call or by judging their category in the cage.

    A failure of the server has no score. Raises `CaMOPDError` where LiveBench's script fails, or leaves an answer out.
    """
    answered = [row for row in rows if row["text"] is not None]

    @functools.cache
    def of(category: str) -> dict[str, verdicts.Verdict]:
        of_category = [row for row in answered if row["category"] == category]
        return in_cage(checkout, folder, category, of_category, lambda: tick(0))

    given = verdicts.collect(
        folder / "work", answered, checkout.commit, lambda row: of(row["category"])[row["question_id"]], 1, tick
    )
    scores = {row["question_id"]: verdict["score"] for row, verdict in zip(answered, given, strict=True)}
    return [
        {**row, "score": scores.get(row["question_id"]), "how": f"with {checkout.commit}, release {RELEASE}"}
        for row in rows
    ]


def room_of(checkout: Checkout, files: Mapping[str, bytes] | None = None, answers: int = 0) -> cage.Room:
    """What the judge has in the cage: the program and its Python, and neither the checkout's data nor its .env."""
    hidden = ("data", ".env")
    package = [path for path in (checkout.folder / NAME).iterdir() if path.name not in hidden]
    shown = {f"/checkout/{NAME}/{path.name}": str(path) for path in package}
    shown["/checkout/.venv"] = str(checkout.folder / ".venv")
    config = checkout.folder / ".venv" / "pyvenv.cfg"
    home = re.search(r"(?m)^home\s*=\s*(.+?)\s*$", config.read_text(encoding="utf-8") if config.is_file() else "")
    base = os.path.dirname(home.group(1)) if home else "/usr"
    if not Path(base).is_relative_to("/usr"):
        shown[base] = base
    return replace(_ROOM, seconds=_START + _EACH * answers, shown=shown, files=files or {})


def in_cage(
    checkout: Checkout, folder: Path, category: str, rows: Sequence[Mapping[str, Any]], look: Callable[[], None]
) -> dict[str, verdicts.Verdict]:
    """Judge the answers of one category; their scores by question.

    What the answers' code does can reach the judgments of its own category, and nothing else.
    """
    words = [f"/checkout/{PYTHON}", f"/checkout/{NAME}/{JUDGE}", *_which([category])]
    words += ["--model", _MODEL, "--model-display-name", _MODEL, "--parallel", "1"]
    inside = {
        "PATH": "/usr/bin", "HOME": "/tmp", "PYTHONPATH": "/checkout", "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),  # threads are processes
    }  # fmt: skip
    program = _IN_CAGE.format(words=words, environment=inside, judgments=JUDGMENTS)
    room = room_of(checkout, _files(checkout, category, rows), len(rows))
    with tempfile.TemporaryFile() as said, open(folder / jobs.LOG, "ab") as log:
        ended, how = cage.into(said, program, (checkout.bwrap, f"/checkout/{PYTHON}"), room, log, look)
        said.seek(0)
        lines = said.read().decode(errors="replace").split("\n") if ended else []
    found: dict[str, verdicts.Verdict] = {}
    wanted = {row["question_id"] for row in rows}
    for line in filter(str.strip, lines):
        try:
            judgment = json.loads(line)
            found[str(judgment["question_id"])] = {"score": score_of(judgment)}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            how = f"{line[:100]!r} is not a judgment ({error!r})"
            break
    if not ended or not wanted <= found.keys():
        said_last = jobs.last_error(folder / jobs.LOG) if how in ("passed", "left before its end") else how
        raise CaMOPDError(
            f"LiveBench's script has judged {len(wanted & found.keys())} of {len(wanted)} answers of the category "
            f"{category}: {said_last}\nAll that it said is in {folder / jobs.LOG}. Answers and other judgments are kept."
        )
    return found


def _files(checkout: Checkout, category: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
    """Questions and answers of a category as the judge reads them, by their paths in the cage; no others are there."""
    found: dict[str, bytes] = {}
    for task in sorted({row["task"] for row in rows}):
        of_task = {row["question_id"]: row for row in rows if row["task"] == task}
        place = f"data/live_bench/{category}/{task}"
        source = checkout.folder / NAME / place
        text = (source / "question.jsonl").read_text(encoding="utf-8")
        asked = [line for line in json_lines(text) if str(json.loads(line)["question_id"]) in of_task]
        answers = [
            json.dumps({
                "question_id": json.loads(line)["question_id"], "answer_id": row["answer_id"], "model_id": _MODEL,
                "choices": [{"index": 0, "turns": [row["text"]]}],
            })
            for line in asked
            for row in [of_task[str(json.loads(line)["question_id"])]]
        ]  # fmt: skip
        found[f"/tmp/work/{place}/question.jsonl"] = "".join(f"{line}\n" for line in asked).encode()
        found[f"/tmp/work/{place}/model_answer/{_MODEL}.jsonl"] = "".join(f"{line}\n" for line in answers).encode()
        for path in sorted(source.glob("test_cases_*.jsonl")):
            found[f"/tmp/work/{place}/{path.name}"] = path.read_bytes()
    return found
