"""LiveBench's script that judges (camopd/eval/livebench_judge.py), in the cage; a small one in its place."""

import json
import os
from pathlib import Path

import pytest
from fake_openai import serving
from small_livebench import (
    echo,
    error_of,
    for_nobody,
    items_of,
    notes,
    question,
    replace_cage,
    said_of,
    small_checkout,
    words_of,
)

from camopd.errors import CaMOPDError
from camopd.eval import cage, jobs, livebench
from camopd.eval import livebench_judge as judging
from camopd.eval import livebench_scripts as scripts


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    return small_checkout(tmp_path, monkeypatch)


@pytest.fixture
def no_cage(tmp_path, monkeypatch):
    replace_cage(monkeypatch, tmp_path)


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


@pytest.mark.parametrize(
    ("printed", "said"),
    [("", "has judged 0 of 2"), ('{"question_id": "a", "score": 1}', "has judged 1 of 2"),
     ('{"question_id": "a", "score": NaN}', "has judged 0 of 2 .* is not a judgment"), ("[" * 10**5, "is not a judgment"),
     ("[1]", "is not a judgment"), ("x" * 10**6, "'x{100}' is not a judgment")],
    ids=["nothing", "one", "NaN", "deep", "a list", "long"],  # which processes of a test have in their environment
)  # fmt: skip
def test_what_comes_out_of_the_cage_is_looked_at(checkout, no_cage, monkeypatch, tmp_path, printed, said):
    """A program in it may have written it."""
    found = scripts.opened(checkout)
    rows = [{**row, "answer_id": "x", "text": "y"} for row in scripts.questions(found) if row["task"] == "aime"]
    monkeypatch.setattr(cage, "into", lambda file, *rest: (file.write(printed.encode()) >= 0, "passed"))
    (tmp_path / jobs.LOG).touch()
    with pytest.raises(CaMOPDError, match=said):
        judging.in_cage(found, tmp_path, "math", rows, lambda: None)


def rows_of(checkout, category, *texts):
    found = [row for row in scripts.questions(scripts.opened(checkout)) if row["category"] == category]
    return [{**row, "answer_id": "x", "text": text} for row, text in zip(found, texts, strict=True)]


def test_what_is_judged_is_what_follows_the_reasoning(checkout, no_cage, capsys):
    """LiveBench takes out pairs of <think> and </think> alone: of the others it would judge the reasoning."""
    said = {
        "ask a": "It is x.</think>ask a",
        "ask b": "ask b<think>or",
        "ask c": "<think>x</think>ask c",
        "ask d": "ask d",
        "ask e": "<think>never ends",
    }
    with serving(lambda body: said[echo(body)]) as server:
        said_of(capsys, words_of(checkout, f"m={server.url}"))
    assert (items_of()["items"], items_of()["mean"]) == (5, 3 / 5)
    assert {item.key: item.score for item in scored(checkout)} == {"a": 1, "b": 0, "c": 1, "d": 1, "e": 0}


def scored(checkout):
    folder = Path("eval-output/m/livebench")
    kept = [json.loads(line) for line in (folder / jobs.ANSWERS).read_text(encoding="utf-8").splitlines()]
    return livebench.items(judging.judge(scripts.opened(checkout), folder, kept))


@pytest.mark.parametrize(
    ("texts", "tokens", "wanted"),
    [
        (["x</think>A", "ask</think>"], [5, 5], ["A", ""]),
        (["x</think>A", "so it is B"], [5, 9], ["A", ""]),  # cut off before the reasoning's end
        (["x</think>A", "B"], [5, None], ["A", "B"]),
        (["<think>x</think>A", "so it is B"], [5, 9], ["A", "so it is B"]),  # not opened by the template
        ([None, "<think>x"], [None, 3], [None, ""]),
    ],
)
def test_reasoning_that_the_template_opens_may_have_no_end(texts, tokens, wanted):
    rows = [{"text": text, "tokens": count} for text, count in zip(texts, tokens, strict=True)]
    assert judging.after_thinking(rows, 9) == wanted
    cut = {"text": "is it B?", "tokens": 9}
    assert judging.after_thinking([cut], 9, lambda: True) == [""]  # where all were cut, the template says it
    assert judging.after_thinking([cut], 9) == judging.after_thinking([cut], 10, lambda: True) == ["is it B?"]


def test_answer_that_ends_the_judging_is_wrong_and_the_others_are_judged(checkout, no_cage, capsys, tmp_path):
    for name in "fghi":
        question(checkout, "coding", "LCB_generation", name, "")
    with serving(lambda body: "import os; os._exit(3)" if echo(body) == "ask h" else "score = 1") as server:
        words = words_of(checkout, f"m={server.url}")
        said_of(capsys, words)
        cages = len(list(tmp_path.glob("cage-*")))
        said_of(capsys, words)
    assert len(list(tmp_path.glob("cage-*"))) == cages + 1  # a look at the environment, and nothing is judged again
    assert {item.key: item.score for item in scored(checkout)} == dict.fromkeys("abcdh", 0) | dict.fromkeys("efgi", 1)
    assert (
        "livebench: the answer of m to h has ended the judging of its category, and counts as wrong: it ended"
        in notes()
    )
    assert notes().count("has ended the judging") == 1


def test_answer_that_livebench_has_not_judged_is_told_from_a_failure_and_stays_so(checkout, no_cage, capsys, tmp_path):
    said = {"ask a": 500, "ask e": "score = -1"}
    with serving(lambda body: said.get(echo(body), echo(body))) as server:
        words = words_of(checkout, f"m={server.url}")
        said_of(capsys, words)
        assert (
            "1 of 5 questions have no score of m, as its server failed. They count as nothing, and the same" in notes()
        )
        assert "1 of 5 questions have no score of m, as LiveBench has not judged them (-1). They count as " in notes()
        cages = len(list(tmp_path.glob("cage-*")))
        del said["ask a"]
        said_of(capsys, words)
    assert "server failed" not in notes() and "as LiveBench has not judged them (-1)" in notes()
    coding = list(tmp_path.glob("cage-*/tmp/work/data/live_bench/coding"))
    assert len(coding) == 1 and len(list(tmp_path.glob("cage-*"))) > cages


def test_log_is_neither_read_nor_changed_by_what_is_judged(checkout, no_cage, tmp_path):
    """Whatever is the third descriptor of a process, it can open by its name in /proc."""
    program = (
        "import os\nscore = float('of before' not in open('/proc/self/fd/2').read())\nos.truncate('/proc/self/fd/2', 0)\n"
        "os.write(2, b'of the judge' + os.linesep.encode())"
    )
    log = tmp_path / jobs.LOG
    log.write_text("of before\n")
    found = judging.in_cage(
        scripts.opened(checkout), tmp_path, "coding", rows_of(checkout, "coding", program), lambda: None
    )
    assert found == {"e": {"score": 1}} and log.read_text() == "of before\nof the judge\n"


@pytest.mark.eval
def test_long_log_of_before_is_no_limit_of_what_is_judged(checkout, tmp_path):
    for_nobody(checkout)
    log = tmp_path / jobs.LOG
    with open(log, "wb") as file:
        file.truncate(cage.DISK + 1)
    rows = rows_of(checkout, "coding", "score = 1\nimport sys; print('new', file=sys.stderr, flush=True)")
    assert judging.in_cage(scripts.opened(checkout), tmp_path, "coding", rows, lambda: None) == {"e": {"score": 1}}
    assert log.read_bytes()[-4:] == b"new\n"


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
