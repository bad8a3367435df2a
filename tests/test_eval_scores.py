"""Answers into scores (camopd/eval/scores.py)."""

import json
import time

import pytest
from conftest import make_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from camopd.eval.models import Model, opens_reasoning
from camopd.eval.scores import CUT, after_thinking, items_of, letter_of, options_of, read_answers, score_of
from camopd.eval.tasks import LETTER_PROMPT, TASKS


MEDQA, GSM8K, IFEVAL = (TASKS[name] for name in ("medqa", "gsm8k", "ifeval"))
PROMPT = LETTER_PROMPT.format(question="A) no option, is one of A,B,C,D,E,F?", choices="A) x\nB) y", letters="A,B,C,D")
OVERFLOW = "This model's maximum context length is 4096 tokens. However, your request has 5000 input tokens. (A)"


def row(text, gold="C", scores=None, item=0, repeat=0, stop="stop", prompt=PROMPT):
    return {"item": item, "repeat": repeat, "prompt": prompt, "gold": gold, "text": text, "stop": stop, "tokens": 3,
            "scores": {"accuracy": 1.0} if scores is None else scores}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("Final answer: C", "C"),
        ("... so B is wrong.\n**Final answer: (C)**", "C"),
        ("Final Answer: $\\boxed{C}$.", "C"),
        ("ANSWER: C\n\nThe reason is this.", "C"),
        ("The answer is C.", "C"),
        ("Final answer: B\nNo, wait.\nFinal answer: C", "C"),
        ("C", "C"),
        (" (C)\n", "C"),
        ("C) the third", "C"),
        ("C) the third\n\nStep 1: A", None),  # the beginning of an answer that was cut off
        ("C. the third", None),  # may be a name
        ("A cat sat on the mat.", None),
        ("Final answer: A cat", None),
        ("Final answer: C heat", "C"),
        ("The answer is C because it is.", "C"),
        ("Final answer: Option C", "C"),
        ("The correct answer is option (C).", "C"),
        ("Final answer: A, B, C", None),  # each of them would be right
        ("Final answer: A/B", None),
        ("Final answer: (A) or (C)", None),
        ("Final answer: C D", None),
        ("Final answer: C, as A and B are wrong.", "C"),
        ("Final answer: C, I am confident.", "C"),
        ("Final answer: B\n\nThe correct answer is C. difficile infection", "B"),  # the form that was asked for
        ("Final answer: B. The answer is C-reactive protein.", "B"),
        ("The answer is C-reactive protein.", None),
        ("The answer is A because of that.", "A"),
        ("Answer: B-Paris", "B"),
        ("Final answer: A because x. Wait, the answer is C, since y", "C"),  # it has changed its mind
        ("Final answer: C. A is wrong.", "C"),
        ("Final answer: C. Answer B is wrong since it ignores X.", "C"),
        ("Final answer: B\n\nNote: answer C is tempting but wrong.", "B"),
        ("Final answer: A\n\nThe answer D is also plausible", "A"),
        ("Final answer: A\nAnswer (B) is wrong.", "A"),
        ("Final answer: A\nOops, correct answer B", "B"),
        ("Final answer: A\nCorrection: answer **B**", "B"),
        ("Final answer: A, wait. The answer \\(\\boxed{B}\\)", "B"),
        ("Final answer: A\n\nThe **answer** is D", "D"),
        ("Final answer: A. No: answer: D", "D"),
        ("Final answer: X, where X is one of A,B,C,D", None),
        ("I think it is C", None),
        ("Final answer: E", None),  # there are four
        (OVERFLOW, None),
        ("", None),
    ],
)
def test_letter_is_taken_only_where_it_is_said_to_be_the_answer(text, letter):
    assert letter_of(text, 4) == letter


@given(st.text(), st.sampled_from("ABCD"))
def test_letter_of_a_last_line_is_found_behind_any_text(before, letter):
    assert letter_of(f"{before}\nFinal answer: {letter}", 4) == letter


PAIRS = [("**", "**"), ("_", "_"), ("`", "`"), ("$", "$"), ('"', '"'), ("'", "'"), ("\u201c", "\u201d"), ("(", ")"),
         ("[", "]"), (r"\(", r"\)"), (r"\[ ", r" \]"), (r"\boxed{", "}"), (r"\text{", "}"), (r"\textbf{", "}"),
         (r"\mathrm {", "}")]  # fmt: skip
HEADS = ["Final answer: ", "**Final Answer**: ", "**Final answer:** ", "__Final answer__ : ", "`Final answer`:",
         "Answer\n\n", "The answer is ", "The answer **is** ", "the *answer* is: ", '{"answer": ']  # fmt: skip


def wrapped(text, pairs):
    for left, right in pairs:
        text = f"{left}{text}{right}"
    return text


@given(st.sampled_from(HEADS), st.lists(st.sampled_from(PAIRS), max_size=4), st.sampled_from("ABCD"),
       st.sampled_from(["", ".", "\n\nBecause it is.", " **\n"]))  # fmt: skip
def test_letter_is_found_in_any_dress_and_the_earlier_one_does_not_count(head, pairs, letter, end):
    earlier = "ABCD"["BCDA".index(letter)]
    assert letter_of(f"Final answer: {earlier}\n\n{head}{wrapped(letter, pairs)}{end}", 4) == letter
    assert letter_of(wrapped(letter, pairs) + ".", 4) == letter


@given(
    st.sampled_from(HEADS),
    st.lists(st.sampled_from(PAIRS), max_size=4),
    st.sampled_from(["A cat", "All", "I'm", "B's"]),
)
def test_letter_of_a_word_is_none_in_any_dress(head, pairs, word):
    assert letter_of(head + wrapped(word, pairs), 10) is None
    assert letter_of(wrapped(word, pairs), 10) is None


@pytest.mark.parametrize(
    "text", ["answer" + " " * 10**5, "answer is " * 10**4, "(" * 10**5, "C" + ")" * 10**5 + "\nx"]
)
def test_letter_is_looked_for_in_time_that_grows_with_the_text(text):
    started = time.process_time()
    assert letter_of(text, 4) is None
    assert time.process_time() - started < 5  # minutes, where each start of a run of signs is tried


@given(st.text(), st.integers(2, 10))
def test_letter_is_one_of_the_options_or_none(text, options):
    assert letter_of(text, options) in (None, *"ABCDEFGHIJ"[:options])


def test_options_are_those_of_the_prompt():
    assert options_of(PROMPT) == 4


@pytest.mark.parametrize(
    ("text", "score", "answered"),
    [
        ("<think>maybe ANSWER: C", 0.0, False),  # evalscope takes the C
        ("<think>maybe B</think>Final answer: C", 1.0, True),
        ("maybe B</think>Final answer: C", 1.0, True),  # the template has opened it
        ("Final answer: B</think>", 0.0, False),
        ("Final answer: B", 0.0, True),
        (OVERFLOW, 0.0, False),
    ],
)
def test_reasoning_is_no_answer(text, score, answered):
    assert score_of(MEDQA, row(text)) == (score, answered)


def test_reasoning_that_never_ends_is_wrong_in_every_task():
    assert score_of(IFEVAL, row("<think>Hm", scores={"prompt_level_strict": 1.0})) == (0.0, False)
    assert score_of(IFEVAL, row("Hm", scores={"prompt_level_strict": 1.0})) == (1.0, True)
    assert score_of(GSM8K, row("seven")) == (0.0, False)
    assert score_of(GSM8K, row("7")) == (1.0, True)
    assert after_thinking("<think>a</think>b<think>c") is None


def test_items_have_the_mean_of_their_repeats_and_what_was_cut_off():
    rows = [row("Final answer: C", repeat=0), row("Final answer: B", repeat=1), row("Final", repeat=2, stop="max_tokens"),
            row("Final answer: C", repeat=3)]  # fmt: skip
    (item,) = items_of(MEDQA, rows)
    assert (item.score, item.repeats, item.truncated, item.unparsed) == (0.5, 4, 0.25, 0.25)


def test_items_are_known_by_prompt_and_gold_and_a_row_may_come_twice():
    rows = [row("C"), row("C", gold="B", item=1), row("C", item=2), row("D", prompt="other one of A,B,C,D", item=3)]
    keys = [item.key for item in items_of(MEDQA, rows)]
    assert len(set(keys)) == 4
    assert keys[0].removesuffix("-1") == keys[2].removesuffix("-2")
    assert keys == [item.key for item in items_of(MEDQA, [{**each, "text": "other"} for each in rows])]


def test_reasoning_that_the_template_has_opened_is_no_answer_where_it_is_cut_off(tmp_path):
    """Its beginning is in the prompt: what other answers of the model end with tells it."""

    def scored(rows, opens):
        path = tmp_path / "answers.jsonl"
        path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
        return [(item.score, item.unparsed) for item in items_of(MEDQA, read_answers(path, lambda: opens))]

    rows = [row("so it is B.</think>Final answer: C"), row("the answer: C. But wait", item=1, stop=CUT)]
    assert scored(rows, False) == [(1, 0), (0, 1)]
    assert scored(rows[1:], True) == [(0, 1)]  # where all were cut, the template says it
    assert scored(rows[1:], False) == [(1, 0)]  # of a model that does not think
    stray = [
        row("Final answer: C"),
        rows[1],
        row("a </think> Final answer: C", item=2),
        row("Final answer: C", item=3),
    ]
    assert scored([{**rows[0], "stop": CUT}, rows[1]], False) == [(1, 0), (0, 1)]  # cut behind its reasoning
    assert scored(stray, False) == [(1, 0)] * 4  # one of many tells nothing
    whole = [row("Final answer: C"), row("<think>is it B? </think>C", item=1, stop=CUT)]
    assert scored(whole, True) == [(1, 0), (1, 0)]


def test_template_that_opens_reasoning_is_known_by_its_prompt(tmp_path):
    tokenizer = make_tokenizer()
    for name, end in (("opens", "<think>\n"), ("closes", "<think></think>"), ("plain", "")):
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}" + end
        tokenizer.save_pretrained(tmp_path / name)
        assert opens_reasoning(Model(name, str(tmp_path / name))) == (name == "opens")
    assert not opens_reasoning(Model("url", "http://127.0.0.1:1")) and not opens_reasoning(Model("no", str(tmp_path)))
