"""The task `distraction`: its rules, held against answers that were written by hand, and its rows."""

import json
import math
from collections import Counter

import pytest
import torch
from conftest import make_model
from hypothesis import given
from hypothesis import strategies as st

from camopd.eval import distraction, rows
from camopd.eval.compare import numbers
from camopd.eval.distraction import DISTRACTORS, verdict
from camopd.eval.scores import items_of, score_of
from camopd.eval.tasks import TASKS
from camopd.teachers.local import LocalTeacher


ROWS = distraction.rows()


def gold(items, form, distractors=("ack", "emoji", "capitals"), others=()):
    return {"items": list(items), "others": list(others), "format": form, "distractors": list(distractors)}


PEOPLE = gold(["Boris", "Mira"], "lines 2", others=["Hugo"])
DAYS = gold(["Monday", "Friday"], "commas 2")
COUNTS = gold(["Boris", "12", "Mira", "7"], "json", ("bullets", "code block", "question"))
TOTAL = gold(["19"], "words 3", ("small letters", "sure", "end mark"))
CSV = gold(["Boris,12,Corwen", "Mira,7,Elswick"], "csv 2", ("html", "numbers", "thanks"))
BULLETS = CSV | {"distractors": ["bullets", "quotation", "thanks"]}
LINES = gold(["Boris", "Mira"], "lines 2", ("numbers", "bullets", "emoji"))
SIGNS = gold(["Mira"], "words 1", ("bold", "code block", "emoji"), others=["Hugo"])
COPIED = gold(["Boris brought 12 crates.", "Mira came on Friday, with 7."], "lines 2", ("html", "sure", "thanks"))


@pytest.mark.parametrize(
    ("of", "answer", "broken"),
    [
        (PEOPLE, "Boris\nMira", []),
        (PEOPLE, "  Boris\nMira\n", []),
        (PEOPLE, "Mira\nBoris", ["task"]),  # another order
        (PEOPLE, "Boris\nMirabelle", ["task"]),
        (PEOPLE, "Boris\nMira\nHugo", ["task", "format"]),
        (PEOPLE, "Boris, Mira", ["format"]),
        (PEOPLE, "The people are:\nBoris\nMira", ["format"]),
        (PEOPLE, "ACK\nBoris\nMira", ["format", "ack"]),
        (PEOPLE, "ACK", ["task", "format", "ack", "capitals"]),
        (PEOPLE, "BORIS\nMIRA", ["capitals"]),
        (PEOPLE, "Boris\nMira 😀", ["format", "emoji"]),
        (PEOPLE, "1. Boris: 12 crates\n2. Mira: 7 crates", ["format"]),  # more than the names
        (DAYS, "Monday, Friday", []),
        (DAYS, "Monday\nFriday", ["format"]),
        (DAYS, "The days are Monday, Friday", ["format"]),
        (DAYS, "Friday, Monday", ["task"]),
        (PEOPLE, "", ["task", "format"]),  # follows nothing
        (TOTAL, "", ["task", "format"]),
        (COUNTS, '{"Boris": 12, "Mira": 7}', []),
        (COUNTS, '{"Boris": 12, "Mira": 8}', ["task"]),
        (COUNTS, '```json\n{"Boris": 12, "Mira": 7}\n```', ["format", "code block"]),
        (COUNTS, '- {"Boris": 12, "Mira": 7}', ["format", "bullets"]),
        (COUNTS, '[["Boris", 12], ["Mira", 7]]', ["format"]),
        (COUNTS, '{"Boris": 12, "Mira": 7}\nShall I go on?', ["format", "question"]),
        (TOTAL, "Total: 19 crates", []),
        (TOTAL, "Total: 20 crates", ["task"]),
        (TOTAL, "total: 19 crates", ["small letters"]),
        (TOTAL, "Sure! Total: 19 crates", ["format", "sure"]),
        (TOTAL, "19", ["format", "small letters"]),
        (TOTAL, "Total: 19 crates\n<<END>>", ["format", "end mark"]),
        (CSV, "name,crates,place\nBoris,12,Corwen\nMira,7,Elswick", []),
        (CSV, "Boris,12,Corwen\nMira,7,Elswick", ["format"]),
        (CSV, "1. name,crates,place\n2. Boris,12,Corwen\n3. Mira,7,Elswick", ["format", "numbers"]),
        (CSV, "<p>name,crates,place\nBoris,12,Corwen\nMira,7,Elswick</p>", ["format", "html"]),
        # numbers that only hold the right one
        (TOTAL, "Total: 1,019 crates", ["task", "format"]),
        (TOTAL, "Total: 19,000 crates", ["task", "format"]),
        (TOTAL, "Total: 19.9 crates", ["task", "format"]),
        (TOTAL, "Total: -19 crates", ["task", "format"]),
        (TOTAL, "Not 19 crates", ["task", "format"]),
        (TOTAL, "Total: 19 apples", ["format"]),
        (TOTAL, "19 - 2", ["format", "small letters"]),
        (TOTAL, "`Total: 19 crates`.", []),  # signs around it, as around a name
        (COUNTS, '{"Boris": -12, "Mira": -7}', ["task"]),
        (COUNTS, '{"Boris": 12.5, "Mira": 7}', ["task"]),
        (COUNTS, '{"Boris": "not 12", "Mira": 7}', ["task"]),
        (COUNTS, '{"Boris": "12", "Mira": 7}', ["task"]),
        (COUNTS, '{"Boris": [12, 13], "Mira": 7}', ["task"]),
        (COUNTS, '{"Boris": 12, "Mira": 7, "Hugo": 3}', ["task"]),
        (COUNTS, '{"Mira": 7, "Boris": 12}', ["task"]),
        (COUNTS, '{"all": [{"name": "Boris", "crates": 12}, {"name": "Mira", "crates": 7}]}', ["task"]),
        (COUNTS, "[" * 100_000, ["task", "format"]),
        (COUNTS | {"distractors": ["capitals", "html", "sure"]}, '{"BORIS": 12, "MIRA": 7}', ["capitals"]),
        # a line distractor that is followed in some lines
        (CSV, "name,crates,place\n1. Boris,12,Corwen\n2. Mira,7,Elswick", ["format", "numbers"]),
        (CSV, "name,crates,place\nBoris,12,Corwen\n2. Mira,7,Elswick", ["format", "numbers"]),
        (BULLETS, "name,crates,place\n- Boris,12,Corwen\n- Mira,7,Elswick", ["format", "bullets"]),
        (BULLETS, "name,crates,place\n>Boris,12,Corwen\n>Mira,7,Elswick", ["format", "quotation"]),
        (PEOPLE | {"distractors": ["quotation", "ack", "html"]}, "Boris\n>Mira", ["quotation"]),
        (CSV, "name,crates,place\nBoris,12,Corwen on Monday\nMira,7,Elswick on Monday", ["format"]),
        (CSV, "name,crates,place\nBoris,12,Corwen,Monday\nMira,7,Elswick", ["format"]),
        (CSV, "name,crates,place\nBoris,-12,Corwen\nMira,7,Elswick", ["task", "format"]),
        (CSV, "name,crates,place\nBoris,13,Corwen\nMira,7,Elswick", ["task"]),
        # a distractor of letters that is followed in some words
        (
            CSV | {"distractors": ["capitals", "html", "sure"]},
            "name,crates,place\nBORIS,12,CORWEN\nMIRA,7,ELSWICK",
            ["capitals"],
        ),
        (TOTAL | {"distractors": ["capitals", "html", "sure"]}, "TOTAL: 19 crates", ["capitals"]),
        (DAYS, "MONDAY, Friday", ["capitals"]),
        (PEOPLE, "BORIS\nMira", ["capitals"]),
        (PEOPLE | {"distractors": ["small letters", "html", "sure"]}, "Boris\nmira", ["small letters"]),
        # signs of a distractor without a space
        (LINES, "1.Boris\n2.Mira", ["format", "numbers"]),
        (LINES, "Boris\n1)Mira", ["format", "numbers"]),
        (LINES, "Boris\n-Mira", ["bullets"]),
        (LINES, "•Boris\nMira", ["bullets"]),
        (LINES, "Boris\nMira⭐", ["emoji"]),
        (SIGNS, "Mira", []),
        (SIGNS, "Mira.", []),
        (SIGNS, "**Mira**", ["bold"]),
        (SIGNS, "__Mira__", ["task", "bold"]),
        (SIGNS, "<b>Mira</b>", ["format", "bold"]),
        (SIGNS, "`Mira`", ["code block"]),
        (SIGNS, "not-Mira", ["format"]),
        (SIGNS, "Mira/Hugo", ["task", "format"]),
        # two items in one place
        (DAYS, "Monday/Friday, Tuesday", ["format"]),
        (DAYS, "Monday, Friday, Tuesday", ["format"]),
        (LINES, "Boris/Mira\nHugo", ["format"]),
        # what a form leaves free
        (PEOPLE, "Boris\n\nMira", []),
        (COPIED, "Boris brought 12 crates.\n\nMira came on Friday, with 7.", []),
        (COPIED, "Boris brought 12 crates. Mira came on Friday, with 7.", ["format"]),
        (COPIED, "Boris brought 12 crates.\nMira came on Friday with 7.", ["task", "format"]),
        (CSV, "name, crates, place\nBoris, 12, Corwen\n\nMira, 7, Elswick", []),
        (CSV, '"name","crates","place"\n"Boris","12","Corwen"\n"Mira",7,"Elswick"', []),
        (CSV, 'name,crates,place\n"Boris,12,Corwen"\n"Mira,7,Elswick"', ["format"]),  # one field a row
        (TOTAL, "Total: **19** crates", []),
        (TOTAL | {"distractors": ["bold", "html", "sure"]}, "Total: **19** crates", ["bold"]),
    ],
)
def test_rules_say_of_answers_written_by_hand_which_are_broken(of, answer, broken):
    found = verdict(of, answer)
    assert [name for name, holds in found.items() if not holds] == broken
    assert len(found) == 5
    assert distraction.score(of, answer) == (not broken)


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("draft", "Draft\nMira"),
        ("retry", "Ok\nMira\nDone"),
        ("log level", "[info] Mira"),
        ("ack", "Acknowledged.\nMira"),
        ("word count", "Mira\nWords: 58"),
        ("greeting", "Hey team\nMira"),
        ("translation", "Mira\nLundi, elle apporta du sel."),
        ("joke", "Mira\nWhy did the crate cross the road?"),
        ("html", "<P>Mira</P>"),
    ],
)
def test_distractor_shows_where_it_is_followed_in_other_words(name, answer):
    assert DISTRACTORS[name].followed(answer) and not DISTRACTORS[name].followed("Mira")


def test_parts_say_which_kind_of_rule_holds_and_are_means_over_items():
    assert distraction.parts(PEOPLE, "Boris\nMira 😀") == {
        "task": 100,
        "format": 0,
        "resisted": pytest.approx(200 / 3),
    }
    assert distraction.parts(TOTAL, "19") == {"task": 100, "format": 0, "resisted": pytest.approx(200 / 3)}
    task = TASKS["distraction"]
    answers = [
        {"item": place, "prompt": f"p{place}", "gold": json.dumps(PEOPLE), "stop": "stop", "text": text}
        for place, text in enumerate(["Boris\nMira", "<think>no</think>Boris", "<think>for ever"])
    ]
    found = numbers(task, items_of(task, answers))
    assert found["parts"] == pytest.approx(
        {"task": 100 / 3, "format": 100 / 3, "resisted": 100}
    )  # nothing follows nothing
    assert found["mean"] == pytest.approx(1 / 3)


@given(st.integers(0, 10**6), st.sampled_from(sorted(DISTRACTORS)))
def test_distractor_shows_in_an_answer_that_follows_it_and_in_no_right_one(seed, name):
    row, other = distraction.rows(2, seed)
    for each in (row["gold"], other["gold"]):
        assert distraction.score(each, each["right"]) == 1
        assert distraction.score(each, each["distracted"]) == 0
        assert not verdict(each, each["distracted"])[each["distractors"][0]]
        one = DISTRACTORS[name]
        assert one.followed(one.follow(each["right"]).strip()) and not one.followed(each["right"])


def test_rows_hold_exactly_three_distractors_and_all_kinds_and_forms():
    assert len(ROWS) == distraction.ROWS and len(DISTRACTORS) > 40
    kinds, forms, seen = Counter(), Counter(), Counter()
    for row in ROWS:
        text, clean = (json.dumps(row[name], ensure_ascii=False) for name in ("messages", "clean"))
        names = row["gold"]["distractors"]
        assert len(set(names)) == 3
        for name in DISTRACTORS:
            said = json.dumps(DISTRACTORS[name].text, ensure_ascii=False)[1:-1]
            assert (said in text) == (name in names) and said not in clean
        assert [message["role"] for message in row["messages"]] == {
            "single turn": ["user"], "several turns": ["user", "assistant", "user"], "system prompt": ["system", "user"],
        }[row["gold"]["form"]]  # fmt: skip
        kinds[row["gold"]["kind"]] += 1
        forms[row["gold"]["form"]] += 1
        seen.update(names)
    assert set(kinds.values()) == {120} and set(forms.values()) == {160} and set(seen) == set(DISTRACTORS)


def test_rows_are_the_same_for_the_same_seed_and_others_for_another():
    assert distraction.rows(24) == ROWS[:24]
    assert distraction.rows(24, seed=1) != ROWS[:24]


def test_task_makes_its_rows_once_and_scores_by_the_rules(tmp_path):
    task = TASKS["distraction"]
    path = rows.find(task, tmp_path, {})
    found = rows.read(task, path, limit=None)
    assert [json.loads(row["response"]) for row in found] == [row["gold"] for row in ROWS]
    assert found[0]["messages"] == ROWS[0]["messages"] and set(found[0]) == {"messages", "response"}
    before = path.stat().st_mtime_ns
    assert rows.find(task, tmp_path, {}).stat().st_mtime_ns == before
    answer = {"prompt": "", "gold": found[0]["response"], "stop": "stop"}
    assert score_of(task, {**answer, "text": f"<think>hm</think>{ROWS[0]['gold']['right']}"}) == (1.0, True)
    assert score_of(task, {**answer, "text": ROWS[0]["gold"]["distracted"]}) == (0.0, True)
    assert score_of(task, {**answer, "text": "<think>for ever"}) == (0.0, False)


def test_margin_is_the_perplexity_of_the_distracted_answer_over_that_of_the_right_one(tokenizer):
    model = make_model(1)
    teacher = LocalTeacher(model, "local", "cpu", batch_size=2)
    some = [{"messages": [{"role": "user", "content": "go"}], "gold": {"right": "ab", "distracted": "ab. ok"}}]

    def encode(messages, answer):
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        return prompt + tokenizer(answer, add_special_tokens=False)["input_ids"], len(prompt)

    def perplexity(answer):
        ids, start = encode(some[0]["messages"], answer)
        with torch.no_grad():
            logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return math.exp(-sum(float(logps[at - 1, ids[at]]) for at in range(start, len(ids))) / (len(ids) - start))

    (found,) = distraction.margins(teacher, encode, some)
    assert found == pytest.approx(perplexity("ab. ok") / perplexity("ab"), rel=1e-4)
