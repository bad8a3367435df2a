"""LiveBench's script that judges, in the cage: to judge is to run code that a model has written.

One category has one cage. What comes out of it is read as JSON lines, and nothing more.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ..errors import CaMOPDError
from ..files import json_lines
from . import cage, jobs, verdicts
from .livebench import JUDGMENTS, NAME, score_of
from .livebench_scripts import JUDGE, MODEL, PYTHON, RELEASE, Checkout, room_of, which


_KEPT = 256 << 10  # bytes of what a cage has said last, for the log
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


def judge(
    checkout: Checkout,
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    tick: Callable[..., None] = lambda steps=1: None,
    opens: Callable[[], bool] = lambda: False,
) -> list[dict[str, Any]]:
    """The answers of a finished job with their scores, from an earlier call or by judging their category in the cage.

    What is judged is what follows a model's reasoning; an answer without that is wrong. A failure of the server has no
    score. Raises `CaMOPDError` where LiveBench's script fails, or leaves an answer out.
    """
    limit = json.loads((folder / jobs.JOB).read_text(encoding="utf-8"))["generation"]["max_tokens"]
    spoken = [{**row, "text": text} for row, text in zip(rows, after_thinking(rows, limit, opens), strict=True)]
    answered = [row for row in spoken if row["text"] is not None and row["text"].strip()]
    wrong: verdicts.Verdict = {"score": 0.0}
    found = {row["question_id"]: wrong for row in spoken if row["text"] is not None}
    tick(len(rows) - len(answered))

    @functools.cache
    def of(category: str) -> dict[str, verdicts.Verdict]:
        of_category = [row for row in answered if row["category"] == category]
        return without_harm(checkout, folder, category, of_category, lambda: tick(0))

    given = verdicts.collect(
        folder / "work", answered, checkout.commit, lambda row: of(row["category"])[row["question_id"]], 1, tick
    )
    found |= {row["question_id"]: verdict for row, verdict in zip(answered, given, strict=True)}
    how = f"with {checkout.commit}, release {RELEASE}"
    nothing: verdicts.Verdict = {"score": None}
    return [
        {**row, "score": verdict["score"], "how": how, "harm": verdict.get("harm", "")}
        for row in rows
        for verdict in [found.get(row["question_id"], nothing)]
    ]


def after_thinking(
    rows: Sequence[Mapping[str, Any]], limit: int, opens: Callable[[], bool] = lambda: False
) -> list[str | None]:
    """What each answer says after its reasoning, "" where that never ends; `None` for a failure. `limit` is in tokens;
    `opens` says whether the chat template opens the reasoning, where no answer shows it.

    LiveBench takes whole pairs of <think> and </think> out, and would judge the reasoning where one of them is missing.
    """
    texts = [row["text"] for row in rows]
    # Where the chat template opens the reasoning, no answer has its beginning, and one that is cut off not its end.
    opened = any("</think>" in text and "<think>" not in text.partition("</think>")[0] for text in texts if text)
    cuts = [(row.get("tokens") or 0) >= limit and "</think>" not in (row["text"] or "") for row in rows]
    opened = opened or (any(cuts) and opens())
    found: list[str | None] = []
    for cut, text in zip(cuts, texts, strict=True):
        cut = opened and cut
        found.append(None if text is None else "" if cut else verdicts.after_thinking(text) or "")
    return found


def without_harm(
    checkout: Checkout, folder: Path, category: str, rows: Sequence[Mapping[str, Any]], look: Callable[[], None]
) -> dict[str, verdicts.Verdict]:
    """`in_cage`, where an answer that ends the judging of its category is a wrong one, and the others are judged.

    It is found by halves, and its `harm` says what it has done. Raises `CaMOPDError` where the judging ends with a harmless
    answer in its place, too.
    """
    try:
        return in_cage(checkout, folder, category, rows, look)
    except CaMOPDError as error:
        if len(rows) > 1:
            halves = rows[: len(rows) // 2], rows[len(rows) // 2 :]
            first, second = (without_harm(checkout, folder, category, half, look) for half in halves)
            return first | second
        try:
            in_cage(checkout, folder, category, [{**rows[0], "text": "no answer"}], look)
        except CaMOPDError:
            raise error from None
        return {rows[0]["question_id"]: {"score": 0.0, "harm": str(error).partition("\n")[0].partition(": ")[2]}}


def in_cage(
    checkout: Checkout, folder: Path, category: str, rows: Sequence[Mapping[str, Any]], look: Callable[[], None]
) -> dict[str, verdicts.Verdict]:
    """Judge the answers of one category; their scores by question.

    What the answers' code does can reach the judgments of its own category, and nothing else: not the log either, which
    gets the end of what the cage has said afterwards.
    """
    words = [f"/checkout/{PYTHON}", f"/checkout/{NAME}/{JUDGE}", *which([category])]
    words += ["--model", MODEL, "--model-display-name", MODEL, "--parallel", "1"]
    inside = {
        "PATH": "/usr/bin", "HOME": "/tmp", "PYTHONPATH": "/checkout", "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),  # threads are processes
    }  # fmt: skip
    program = _IN_CAGE.format(words=words, environment=inside, judgments=JUDGMENTS)
    room = room_of(checkout, _files(checkout, category, rows), len(rows))
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as errors:
        try:
            ended, how = cage.into(said, program, (checkout.bwrap, f"/checkout/{PYTHON}"), room, errors, look)
        finally:
            last = _end_of(errors)
            with open(folder / jobs.LOG, "ab") as log:
                log.write(last)
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
        if how in ("passed", "left before its end"):
            how = jobs.last_exception(last.decode(errors="replace")) or "it ended without their judgments"
        raise CaMOPDError(
            f"LiveBench's script has judged {len(wanted & found.keys())} of {len(wanted)} answers of the category "
            f"{category}: {how}\nAll that it said is in {folder / jobs.LOG}. Answers and other judgments are kept."
        )
    return found


def _end_of(file: IO[bytes]) -> bytes:
    file.seek(max(0, file.seek(0, os.SEEK_END) - _KEPT))
    return file.read()


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
                "question_id": json.loads(line)["question_id"], "answer_id": row["answer_id"], "model_id": MODEL,
                "choices": [{"index": 0, "turns": [row["text"]]}],
            })
            for line in asked
            for row in [of_task[str(json.loads(line)["question_id"])]]
        ]  # fmt: skip
        found[f"/tmp/work/{place}/question.jsonl"] = "".join(f"{line}\n" for line in asked).encode()
        found[f"/tmp/work/{place}/model_answer/{MODEL}.jsonl"] = "".join(f"{line}\n" for line in answers).encode()
        for path in sorted(source.glob("test_cases_*.jsonl")):
            found[f"/tmp/work/{place}/{path.name}"] = path.read_bytes()
    return found
