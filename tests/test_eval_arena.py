"""Arena-Hard v2 (camopd/eval/arena.py): scores by hand, and judges that are good, malformed, refusing and unreachable."""

import json

import pytest
from fake_openai import serving

from camopd.errors import DataError
from camopd.eval import arena, rows
from camopd.eval.compare import compare
from camopd.eval.judge import ATTEMPTS, Judge
from camopd.eval.scores import items_of
from camopd.eval.tasks import TASKS


HARD = TASKS["arena_hard"]
UTILS = """
import os
os.remove("nothing of it runs")
WORDS = "Judge them."
JUDGE_SETTINGS = {
    "hard_prompt": {"baseline": "o3-mini-2025-01-31", "system_prompt": WORDS},
    "creative_writing": {"baseline": "gemini-2.0-flash-001", "system_prompt": "Judge the stories."},
}
"""


@pytest.fixture
def checkout(tmp_path):
    """A checkout in small. Yields its question.jsonl."""
    data = tmp_path / "data" / "arena-hard-v2.0"
    (data / "model_answer").mkdir(parents=True)
    (tmp_path / "utils").mkdir()
    (tmp_path / "utils" / "judge_utils.py").write_text(UTILS, encoding="utf-8")
    questions = [{"uid": f"u{n}", "category": ("hard_prompt", "creative_writing")[n % 2], "subcategory": "s",
                  "prompt": f"Prompt {n}?"} for n in range(6)]  # fmt: skip
    (data / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions), encoding="utf-8")
    for name in ("o3-mini-2025-01-31", "gemini-2.0-flash-001"):
        said = [[{"role": "assistant", "content": {"answer": f"{name} on {row['uid']}"}}] for row in questions]
        answers = [{"uid": row["uid"], "messages": messages} for row, messages in zip(questions, said, strict=True)]
        path = data / "model_answer" / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in answers), encoding="utf-8")
    return data / "question.jsonl"


def test_rows_have_the_baseline_of_their_category_and_the_official_words(checkout):
    hard, creative = (rows.read(TASKS[name], checkout, None) for name in ("arena_hard", "arena_creative"))
    assert [row["query"] for row in hard + creative] == [f"Prompt {n}?" for n in (0, 2, 4, 1, 3, 5)]
    gold = [json.loads(row["response"]) for row in (hard[1], creative[1])]
    assert gold == [{"baseline": "o3-mini-2025-01-31 on u2", "system": "Judge them."},
                    {"baseline": "gemini-2.0-flash-001 on u3", "system": "Judge the stories."}]  # fmt: skip


def test_questions_and_answers_with_line_ends_of_unicode_are_as_many(checkout):
    answers = checkout.parent / "model_answer" / "o3-mini-2025-01-31.jsonl"
    for path in (checkout, answers):
        text = path.read_text(encoding="utf-8").replace("Prompt", "a\u2028b\x85").replace("on u", "on a\u2028b\x85u")
        path.write_text(text, encoding="utf-8")
    found = rows.read(HARD, checkout, None)
    assert [row["query"] for row in found] == [f"a\u2028b\x85 {n}?" for n in (0, 2, 4)]
    assert [json.loads(row["response"])["baseline"][-6:] for row in found] == [f"a\u2028b\x85u{n}" for n in (0, 2, 4)]


def test_what_is_missing_of_a_checkout_is_named(checkout, tmp_path):
    with pytest.raises(
        DataError, match=r"no file 'nowhere/arena_hard.jsonl'\. Arena-Hard v2 is read from a checkout of"
    ):
        rows.find(HARD, tmp_path.__class__("nowhere"), {})
    with open(checkout, "a", encoding="utf-8") as file:
        file.write(json.dumps({"uid": "u9", "category": "hard_prompt", "prompt": "?"}) + "\n")
    with pytest.raises(
        DataError, match=r"line 7 .*the uid 'u9', which the baseline o3-mini-2025-01-31 has not answered"
    ):
        rows.read(HARD, checkout, None)
    answers = checkout.parent / "model_answer" / "o3-mini-2025-01-31.jsonl"
    for line in ('{"uid": "u9"', '{"uid": "u9"}', '{"uid": "u9", "messages": []}', "[]"):
        answers.write_text(f"\n{line}\n", encoding="utf-8")
        with pytest.raises(
            DataError, match=r"line 2 of '.*o3-mini-2025-01-31.jsonl' is not an answer of a baseline: .*Error"
        ):
            rows.read(HARD, checkout, None)
    answers.unlink()
    with pytest.raises(DataError, match=r"there is no '.*o3-mini-2025-01-31.jsonl', the answers of the baseline"):
        rows.read(HARD, checkout, None)
    settings = checkout.parents[2] / "utils" / "judge_utils.py"
    for text in ("JUDGE_SETTINGS = make()", "x = 1", "JUDGE_SETTINGS = {", "JUDGE_SETTINGS = {'hard_prompt': {}}"):
        settings.write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match="the judge's words for hard_prompt cannot be read from"):
            rows.read(HARD, checkout, None)


def row(text="mine", item=0):
    gold = json.dumps({"baseline": "theirs", "system": "Judge them."})
    return {"item": item, "repeat": 0, "prompt": f"user: Prompt {item}?", "gold": gold, "text": text, "stop": "stop",
            "tokens": 3, "scores": {}}  # fmt: skip


def judged(first, second):
    """By a judge that says `first` where the baseline is A, and `second` where the answer is."""

    def answer(body):
        return second if "Assistant A's Answer|>\nmine" in body["messages"][1]["content"] else first

    with serving(answer) as server:
        return arena.compare(Judge(server.url.removesuffix("/v1"), "j", pause=0), row()), server.requests


@pytest.mark.parametrize(
    ("first", "second", "score", "weight"),
    [
        ("B>A", "A>B", 1, 2),
        ("B>>A", "A>B", 1, 4),
        ("A>B", "A>>B", 3 / 4, 4),  # 0 once, 1 three times
        ("A>>B", "A>B", 1 / 4, 4),
        ("A=B", "B>>A", 0.5 / 4, 4),
        ("A=B", "B=A", 0.5, 2),
        ("A<<B", "B<<A", 1, 6),
        ("A>>B", "B>>A", 0, 6),
    ],
)
def test_scores_are_those_of_both_orders_worked_by_hand(first, second, score, weight):
    found, requests = judged(f"A draft says [[A=B]]. Verdict: [[{first}]]", f"[[{second}]]".lower())
    assert (found["score"], found["weight"]) == (pytest.approx(score), weight)
    assert [body["temperature"] for body in requests] == [0, 0]
    assert requests[0]["messages"][0] == {"role": "system", "content": "Judge them."}
    assert requests[0]["messages"][1]["content"].startswith(
        "<|User Prompt|>\nPrompt 0?\n\n<|The Start of Assistant A's"
    )


@pytest.mark.parametrize(
    ("reply", "asked"), [("Both are fine.", ATTEMPTS), ("[[A>C]]", ATTEMPTS), (400, 1), (b"?", ATTEMPTS)]
)
def test_game_without_a_verdict_leaves_the_prompt_out(reply, asked):
    found, requests = judged("[[A>B]]", reply)
    assert "failed" in found and "score" not in found and len(requests) == 1 + asked
    assert "failed" in arena.compare(Judge("http://127.0.0.1:9", "j", pause=0), row())


def test_label_in_single_brackets_counts_where_there_is_no_other():
    assert judged("My verdict is tie: [A=B]", "[A] or [B]: [[A=B]]")[0]["score"] == 0.5


def test_answer_without_text_has_lost_without_a_judge():
    found = arena.compare(Judge("http://127.0.0.1:9", "j"), row("<think>Hm"))
    assert (found["score"], found["weight"]) == (0, 6)


def test_pooled_mean_counts_verdicts_and_the_table_counts_prompts():
    """Two prompts of scores 1 (twice) and 1/4 (of four): 5/8 over prompts, (2 + 1) / 6 over verdicts."""
    verdicts = [{"score": 1.0, "weight": 2}, {"score": 0.25, "weight": 4}, {"failed": "HTTP 500"}]
    found = items_of(HARD, [row(item=n) | {"verdict": verdict} for n, verdict in enumerate(verdicts)])
    (compared,) = compare([HARD], {"m": {"arena_hard": found}})
    numbers = compared["models"]["m"]
    assert (numbers["mean"], numbers["pooled"], numbers["items"]) == (0.625, 0.5, 2)
    assert numbers["unjudged"] == pytest.approx(1 / 3)
