"""A LiveBench checkout, looked at, and its script that asks a model, run in an environment of its own.

What the script writes lies in the folder of the job: the checkout stays as it is. livebench_judge.py judges the answers.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import atomic
from ..errors import CaMOPDError, DataError
from ..files import json_lines
from . import cage, jobs
from .asking import Line, Unanswered, key_of
from .livebench import NAME, data_of, judged
from .runner import cut_torn_line
from .together import together


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
import importlib.util, io, os
for name in {names!r}:
    assert importlib.util.find_spec(name), f"it has no {{name}}"
if importlib.util.find_spec("dotenv"):
    import dotenv
    os.environ["PYTHON_DOTENV_DISABLED"] = "1"
    dotenv.load_dotenv(stream=io.StringIO("READ=1"))
    assert "READ" not in os.environ, "its python-dotenv is older than 1.1.1, and would send keys of a .env: update it"
"""
_QUESTIONS = "data/live_bench/*/*/question.jsonl"
_HIDDEN = ("data", ".env")  # of the folder with the program
# Of each model, in a folder of its own: LiveBench writes all names small, and takes some for models that it knows.
MODEL = "camopd"
_ERROR = "$ERROR$"  # the answer that LiveBench writes down where a server gave none, or one without a word
_SECONDS = 2400.0  # for an answer, as LiveBench has
_REFUSED = (400, 413, 422)
_TOO_LONG = re.compile(r"(?i)context (length|size|window)|maximum model length|max_model_len")
_KEY = "LIVEBENCH_API_KEY"
_ROOM = cage.Room(memory=8 << 30, addresses=4 << 30, processes=128, semaphores=True)
_START, _EACH = 300.0, 60.0  # seconds to judge a category, and for each answer: code that never ends has 6 a test


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
            f"{folder / PYTHON} cannot be used in the cage for code that models have written: {how}. {lines}. A cage that "
            "root makes runs as nobody, who must be able to read the checkout and the Python: take one below /usr."
        )
    return found


def room_of(checkout: Checkout, files: Mapping[str, bytes] | None = None, answers: int = 0) -> cage.Room:
    """What the judge has in the cage: the program and its Python, and neither the checkout's data nor its .env."""
    package = [path for path in (checkout.folder / NAME).iterdir() if path.name not in _HIDDEN]
    shown = {f"/checkout/{NAME}/{path.name}": str(path) for path in package}
    shown["/checkout/.venv"] = str(checkout.folder / ".venv")
    home = os.path.expanduser("~")  # which it stays for a user without one: Path.home() raises
    private = (checkout.folder, *(() if home == "~" else (Path(home),)))
    python, links = cage.of_python(checkout.folder / ".venv", private)
    return replace(_ROOM, seconds=_START + _EACH * answers, shown=shown | python, links=links, files=files or {})


def commit_of(folder: Path) -> str:
    """Which LiveBench a checkout is, in words that are others after any change of its program."""
    git = ["git", "-c", "safe.directory=*", "--git-dir", str(folder / ".git"), "--work-tree", str(folder)]
    try:
        head, changes = (
            subprocess.run(
                [*git, *words], capture_output=True, encoding="utf-8", check=True, timeout=60
            ).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        return f"LiveBench of an unknown commit, its files {_digest(folder)}"
    return f"LiveBench {head[:12]}{f' with changed files, {_digest(folder)}' if changes else ''}"


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted((folder / NAME).rglob("*")):
        inside = path.relative_to(folder / NAME)
        if inside.parts[0] not in _HIDDEN and "__pycache__" not in inside.parts and path.is_file():
            digest.update(f"{inside}\0{path.stat().st_size}\0".encode(errors="surrogateescape") + path.read_bytes())
    return f"sha256 {digest.hexdigest()[:12]}"


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
    found = _questions(checkout.folder / NAME)
    if not found:
        raise DataError(
            f"{str(checkout.folder)!r} has no questions of the release {RELEASE}. In {checkout.folder / NAME}: "
            f"`../{PYTHON} download_questions.py`. It brings them into data/live_bench/CATEGORY/TASK/question.jsonl."
        )
    return found


def judged_before(folder: Path | None, model: str, others: bool) -> list[dict[str, Any]]:
    """The judgments that a checkout has of a model, as `livebench.judged`; `how` says where they are not of all questions.

    `others` says that other models are asked. Raises `DataError` where these would be other questions.
    """
    found = judged(folder, model) if folder is not None else []
    if folder is None or not found:
        return []
    wanted = {row["question_id"] for row in _questions(data_of(folder))}
    having = {str(row["question_id"]) for row in found}
    if wanted == having:
        return found
    counts = f"{len(wanted & having)} of the {len(wanted)} questions of the release {RELEASE}"
    counts += f" and of {len(having - wanted)} others" if having - wanted else ""
    if others:
        raise DataError(
            f"{str(folder)!r} has judgments of {model} for {counts}, and other models would be asked all {len(wanted)}: "
            "different questions are not compared. Judge it there for the whole release, or give it another name in "
            "--models, by which the checkout has no judgments: it is asked as well then."
        )
    known = f"for {counts}" if wanted else "and of how many questions is not known, as none are there"
    return [{**row, "how": f"{row['how']}, {known}"} for row in found]


def _questions(folder: Path) -> list[dict[str, Any]]:
    found = []
    for path in sorted(folder.glob(_QUESTIONS)):
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
    benchmarks = which(sorted({row["category"] for row in rows}))
    return [
        str(checkout.folder / PYTHON), str(checkout.folder / NAME / ASK), *benchmarks, "--model", job["model"],
        "--model-display-name", MODEL, "--api-base", job["url"], "--force-temperature", "0",
        "--max-tokens", str(job["generation"]["max_tokens"]), "--parallel", str(job["concurrency"]),
        "--resume", "--retry-failures",
    ]  # fmt: skip


def which(categories: Sequence[str]) -> list[str]:
    """The words that tell both scripts which questions they are for."""
    names = [f"live_bench/{category}" for category in categories]
    return ["--bench-name", *names, "--question-source", "jsonl", "--livebench-release-option", RELEASE]


def environment(checkout: Checkout) -> dict[str, str]:
    """That of the script which asks: the key where LiveBench reads it, and none from a .env of the checkout."""
    return jobs.environment() | {
        "PYTHONPATH": str(checkout.folder), "PYTHON_DOTENV_DISABLED": "1", _KEY: key_of(jobs.KEY) or "EMPTY",
    }  # fmt: skip


def gather(folder: Path, rows: Sequence[Mapping[str, Any]], look: Callable[[], None] = lambda: None) -> None:
    """Put the answers that the script has written together, in the order of the questions; a failure is one without a text.

    Failures are asked once more first: LiveBench takes an answer without a word for one. `look` is called meanwhile, in any
    thread, and what it raises ends the call at once. Raises `CaMOPDError` where an answer is missing, where the server
    refuses prompts as too long, and where all are failures.
    """
    found = answers_of(folder)
    if any(row["question_id"] not in found for row in rows):
        raise jobs.failed(folder, len(rows))
    ask_once_more(folder, [row for row in rows if found[row["question_id"]]["text"] is None], look)
    found = answers_of(folder)
    if all(found[row["question_id"]]["text"] is None for row in rows):
        raise CaMOPDError(
            f"{folder}: the server has answered none of {len(rows)} questions: {jobs.last_error(folder / jobs.LOG)}\nThe "
            f"same command asks again. All that LiveBench said is in {folder / jobs.LOG}."
        )
    lines = [
        json.dumps({"item": number, **row, **found[row["question_id"]]}) + "\n" for number, row in enumerate(rows)
    ]
    atomic.write(folder / jobs.ANSWERS, "".join(lines))


def answers_of(folder: Path) -> dict[str, dict[str, Any]]:
    """The last answer that is written to each question; `text` is `None` for a failure."""
    found = {}
    for path in jobs.files_of_answers(folder):
        for line in json_lines(path.read_text(encoding="utf-8")):
            answer = json.loads(line)
            turns = answer["choices"][0]["turns"]
            failed = turns == _ERROR or _ERROR in turns
            found[str(answer["question_id"])] = {
                "answer_id": answer.get("answer_id"), "text": None if failed else turns[-1],
                "tokens": answer.get("total_output_tokens"),
            }  # fmt: skip
    return found


def ask_once_more(folder: Path, rows: Sequence[Mapping[str, Any]], look: Callable[[], None]) -> None:
    """Ask questions as LiveBench asks them, and write what is answered behind its own answers: also that it is nothing.

    Raises `CaMOPDError` where the server refuses a prompt as too long.
    """
    if not rows:
        return
    job = json.loads((folder / jobs.JOB).read_text(encoding="utf-8"))
    line, lock = Line(key_of(jobs.KEY), _SECONDS), threading.Lock()
    places = {row["question_id"]: folder / "work/data/live_bench" / row["category"] / row["task"] for row in rows}
    asked: dict[str, dict[str, Any]] = {}
    for place in set(places.values()):
        lines = json_lines((place / "question.jsonl").read_text(encoding="utf-8"))
        asked |= {str(question["question_id"]): question for question in map(json.loads, lines)}

    def ask(name: str) -> None:
        question, turns, tokens = asked[name], [], 0
        messages = [{"role": "system", "content": question["system_prompt"]}] if "system_prompt" in question else []
        for turn in question["turns"]:
            messages.append({"role": "user", "content": turn})
            text, count = _reply(line, job, messages, name)
            if text is None:
                return
            turns.append(text)
            tokens += count
            if not text:
                break
            messages.append({"role": "assistant", "content": text})
        answer = {"question_id": question["question_id"], "answer_id": f"{MODEL}-{name}", "model_id": MODEL,
                  "choices": [{"index": 0, "turns": turns}], "total_output_tokens": tokens}  # fmt: skip
        with lock, open(places[name] / "model_answer" / f"{MODEL}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(answer) + "\n")

    try:
        together(ask, places, job["concurrency"], look, line.end)
    finally:
        jobs.hide_key(folder)


def _reply(line: Line, job: Mapping[str, Any], messages: Sequence[Any], name: str) -> tuple[str | None, int]:
    """A model's message, "" where it is empty or all of it is a thought, and its tokens; `None` for a failure."""
    most = job["generation"]["max_tokens"]
    limit = "max_completion_tokens" if "gpt" in job["model"] else "max_tokens"  # LiveBench's rule
    body = {"model": job["model"], "messages": messages, "temperature": 0.0, limit: most}
    try:
        reply = line.send(f"{job['url']}/chat/completions", body)
        if reply.status in _REFUSED and _TOO_LONG.search(reply.text):
            raise CaMOPDError(
                f"the server refuses the question {name} of LiveBench as too long: {line.shown(reply.text)}\nAn answer may "
                f"have {most} tokens beside the prompt. Give the model a longer context (--context, or --max-model-len of "
                "a server of your own): the same command then asks what is missing. Another --max-tokens is another "
                "evaluation, with another --out."
            )
        found = json.loads(reply.text) if reply.status == 200 and not reply.unread else {}
        text = found["choices"][0]["message"].get("content") or ""
        tokens = (found.get("usage") or {}).get("completion_tokens")
    except (Unanswered, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None, 0
    return (text if isinstance(text, str) else None), (tokens if isinstance(tokens, int) else 0)
