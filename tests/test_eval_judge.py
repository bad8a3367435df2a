"""Models that judge (camopd/eval/judge.py): a server that is good, malformed, refusing, busy and unreachable."""

import contextlib
import gzip
import json

import pytest
from fake_openai import Raw, serving
from hypothesis import given
from hypothesis import strategies as st

from camopd.errors import CaMOPDError
from camopd.eval import judge
from camopd.eval.asking import MOST
from camopd.eval.compare import compare
from camopd.eval.judge import ATTEMPTS, GONE, NEUTRAL, Judge
from camopd.eval.scores import items_of
from camopd.eval.tasks import TASKS
from camopd.eval.verdicts import collect


GPQA = TASKS["gpqa"]
NOWHERE = "http://127.0.0.1:9"
YES = "<extracted_answer>C</extracted_answer>\n<decision>yes</decision>"
NO = "<extracted_answer>B</extracted_answer>\n<decision>no</decision>"


def row(text="It is C.", item=0, repeat=0):
    return {"item": item, "repeat": repeat, "prompt": f"Question {item}?", "gold": "C", "text": text, "stop": "stop",
            "tokens": 3, "scores": {"accuracy": 1.0}}  # fmt: skip


def judge_of(server, **options):
    return Judge(server.url.removesuffix("/v1"), "tiny", pause=0, **options)


def of_answers(one, folder, rows):
    return collect(folder, rows, one.model, lambda row: judge.verify(one, row), 1)


def verdict(answer, text="It is C."):
    with serving(answer) as server:
        return judge.verify(judge_of(server), row(text)), server


def test_verifier_is_asked_as_in_the_paper_and_what_it_said_is_kept():
    found, server = verdict(lambda body: YES, "<think>B?</think>It is C.")
    assert found == {"passed": True, "extracted": "C", "said": YES}
    (body,) = server.requests
    assert body["temperature"] == 0.2 and body["model"] == "tiny"
    (message,) = body["messages"]
    for part in ("<prompt>\nQuestion 0?\n</prompt>", "<response>\nIt is C.\n</response>",
                 "<ground_truth_answer>\nC\n</ground_truth_answer>"):  # fmt: skip
        assert part in message["content"]


def test_judge_leaves_no_sampling_to_the_file_of_its_model():
    """Of Qwen2.5-14B-Instruct, the paper's verifier: top_p 0.8, top_k 20, repetition_penalty 1.05."""
    _, server = verdict(lambda body: YES)
    (body,) = server.requests
    assert body["top_p"] == 1 and {"top_k": -1, "repetition_penalty": 1, "min_p": 0}.items() <= body.items()


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (400, "Unrecognized request arguments supplied: min_p, repetition_penalty, top_k"),
        (400, "Unknown parameter: 'top_k'."),
        (422, '[{"type": "extra_forbidden", "loc": ["body", "min_p"], "msg": "Extra inputs are not permitted"}]'),
    ],
)
def test_server_that_refuses_a_name_is_asked_without_from_then_on(status, words, tmp_path):
    """As OpenAI's own API does."""

    def answer(body):
        return Raw(json.dumps({"error": {"message": words}}).encode(), status) if "top_k" in body else YES

    with serving(answer) as server:
        found = of_answers(judge_of(server), tmp_path, [row(item=item) for item in range(3)])
    assert [one["passed"] for one in found] == [True] * 3
    first, *others = server.requests
    assert NEUTRAL.items() <= first.items() and len(others) == 3
    assert all({"temperature", "top_p"} < set(body) and not set(NEUTRAL) & set(body) for body in others)


def test_request_that_is_refused_for_another_reason_takes_no_sampling_away(tmp_path):
    """Here the server repeats the prompt, which has a name in it."""
    words = Raw(b'{"error": "not allowed: what is top_k?"}', 400)
    with serving(lambda body: words if "Question 0?" in str(body) else YES) as server:
        found = of_answers(judge_of(server), tmp_path, [row(item=item) for item in range(2)])
    assert "HTTP 400" in found[0]["failed"] and found[1]["passed"] and "top_k" in server.requests[-1]


@pytest.mark.parametrize(
    ("reply", "why", "asked"),
    [
        ("I would say that it is right.", "0 decisions", ATTEMPTS),
        (f"{YES}{NO}", "2 decisions", ATTEMPTS),
        (f"<think>{YES}", "0 decisions", ATTEMPTS),
        (b"<html>", "not a chat completion", ATTEMPTS),
        (b'{"choices": []}', "not a chat completion", ATTEMPTS),
        (b'{"choices": [{"message": {"content": null}}]}', "a reply without text", ATTEMPTS),
        (400, "HTTP 400", 1),  # refused, and would be again
        (500, "HTTP 500", ATTEMPTS),
        (429, "HTTP 429", ATTEMPTS),
    ],
)
def test_judge_that_gives_no_verdict_is_asked_so_often_and_no_more(reply, why, asked):
    found, server = verdict(lambda body: reply)
    assert why in found["failed"] and "passed" not in found and len(server.requests) == asked


def test_judge_that_comes_to_its_senses_is_believed():
    replies = iter([500, "Hm.", YES])
    found, _ = verdict(lambda body: next(replies))
    assert found["passed"] is True


def test_unreachable_judge_is_no_verdict_and_a_gone_one_stops_the_call(tmp_path):
    one = Judge(NOWHERE, "tiny", pause=0)
    assert "ConnectError" in judge.verify(one, row())["failed"]
    rows = [row(item=item) for item in range(20)]
    with pytest.raises(
        CaMOPDError, match=rf"judge at {NOWHERE} has not answered for {GONE} answers in a row"
    ) as raised:
        of_answers(one, tmp_path, rows)
    assert "Its verdicts so far are kept" in str(raised.value)


def test_judge_that_answers_now_and_then_is_not_gone(tmp_path):
    with serving(lambda body: YES if "Question 7?" in str(body) else 503) as server:
        found = of_answers(judge_of(server), tmp_path, [row(item=item) for item in range(14)])
    assert [found[7].get("passed"), sum("failed" in one for one in found)] == [True, 13]


def test_answer_without_text_is_wrong_without_a_judge():
    for text in ("", "<think>It is C.", "<think>x</think> "):
        assert judge.verify(Judge(NOWHERE, "tiny"), row(text)) == {"passed": False, "extracted": "none", "said": None}


@pytest.mark.parametrize(
    "reply",
    [
        YES,
        *(Raw(b"who is {key}?", status) for status in (200, 401, 500)),
        Raw(b"", 401, {"Content-Encoding": "a-secret"}),
        Raw(b'{"choices": [{"message": {"content": "{key}"}}]}'),
        Raw(
            b'{"choices": [{"message": {"content": "<extracted_answer>{key}</extracted_answer><decision>no</decision>"}}]}'
        ),
    ],
)
def test_key_goes_to_the_judge_and_nowhere_else(tmp_path, reply):
    with serving(lambda body: reply) as server:
        one = judge_of(server, key="a-secret")
        found = of_answers(one, tmp_path, [row()])
        assert "secret" not in repr(one)
    assert set(server.keys) == {"Bearer a-secret"} and "secret" not in json.dumps(found)
    assert "secret" not in (tmp_path / "verdicts.jsonl").read_text(encoding="utf-8")


def test_key_that_is_a_word_of_a_reply_changes_no_verdict():
    with serving(lambda body: YES) as server:
        assert judge.verify(judge_of(server, key="yes"), row())["said"] == YES


def test_answer_of_a_judge_that_is_packed_or_without_end_is_no_verdict():
    packed = Raw(gzip.compress(YES.encode()), headers={"Content-Encoding": "gzip"})
    found, server = verdict(lambda body: packed)
    assert "HTTP 200: in Content-Encoding 'gzip'" in found["failed"] and len(server.requests) == 1
    found, server = verdict(lambda body: b"x" * (MOST + 1))
    assert "HTTP 200: longer than" in found["failed"] and len(server.requests) == 1


def test_judge_has_one_deadline_for_all_of_a_reply():
    with serving(lambda body: Raw(b"x" * 100, pause=0.05)) as server:
        found = judge.verify(judge_of(server, timeout=0.3), row())
    assert found["failed"] == "no answer in 0 seconds" and len(server.requests) == ATTEMPTS


def judged(verdicts):
    """Items of one question per list, with a repeat per verdict: True, False, or None for a judge that failed."""
    rows = []
    for item, repeats in enumerate(verdicts):
        for repeat, passed in enumerate(repeats):
            found = {"failed": "HTTP 500"} if passed is None else {"passed": passed, "extracted": "C"}
            rows.append(row(item=item, repeat=repeat) | {"verdict": found})
    return items_of(GPQA, rows)


def test_judge_that_fails_is_a_missing_item_and_never_a_wrong_answer():
    start = judged([[True, False], [None, True], [None, None], [False, False]])
    result = judged([[True, True], [True, True], [True, True], [None, None]])
    assert [item.score for item in start] == [0.5, 1.0, None, 0.0]
    assert [item.unjudged for item in start] == [0, 0.5, 1, 0]
    (found,) = compare([GPQA], {"start": {"gpqa": start}, "result": {"gpqa": result}})
    numbers = found["models"]["start"]
    assert (numbers["items"], numbers["mean"], numbers["unjudged"]) == (3, 0.5, 0.375)
    assert found["change"]["items"] == 2 and found["change"]["value"] == 0.25  # the first two have both
    assert len(found["change"]["came_back"]) == 1 and not found["change"]["broke"]
    (alone,) = compare([GPQA], {"start": {"gpqa": judged([[None]])}, "result": {"gpqa": result[:1]}})
    assert alone["models"]["start"]["mean"] is None and "change" not in alone


@pytest.mark.parametrize(
    ("passed", "extracted", "answered"),
    [(True, "", True), (False, "", False), (False, "None", False), (False, "B", True)],
)
def test_answer_is_missing_where_the_judge_has_found_none(passed, extracted, answered):
    (item,) = items_of(GPQA, [row() | {"verdict": {"passed": passed, "extracted": extracted}}])
    assert (item.score, item.unparsed) == (float(passed), float(not answered))


@given(st.text(max_size=300))
def test_decision_is_read_from_any_text_or_refused(text):
    with contextlib.suppress(judge.Unusable):
        assert judge.decision_of(text)["passed"] in (True, False)
    assert judge.decision_of(f"{text.replace('<', '')}{YES}")["passed"]
