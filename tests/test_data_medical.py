"""Medical prompts: the template word for word, no gold answer, no benchmark question, one test for each trap."""

import json
from collections import Counter

import pytest
from data_rows import GOLD, distill, m23k, medmcqa, medqa, medreason, medxpertqa

from camopd.data.medical import CLOSING_OPEN, build_medical, parse_options, stem, to_prompt
from camopd.errors import DataError
from camopd.files import json_lines


SYSTEM = (  # Figure 7 of arXiv 2605.27115, typed from the paper
    "You are a careful medical reasoning assistant. Provide educational medical information, mention uncertainty when "
    "relevant, and recommend professional medical care for diagnosis or treatment decisions."
)
CHOICE = "\nPlease reason step by step and give the final answer choice at the end."
OPEN = (
    "\nPlease reason step by step and answer clearly. Do not present the answer as a substitute for professional medical "
    "advice."
)


KINDS = {"medmcqa": medmcqa, "medreason": medreason, "medical_r1_distill": distill, "m23k": m23k}


@pytest.fixture
def make(tmp_path):
    """Write the sources and build from them; a source that is not named has 40 rows."""

    def make(limit=20, seed=0, out="out", **rows):
        default = {name: [kind(n) for n in range(40)] for name, kind in KINDS.items()}
        sources = {}
        for name, content in {**default, "medqa": [medqa()], "medxpertqa": [medxpertqa()], **rows}.items():
            if content != "none":
                sources[name] = str(tmp_path / f"{name}.jsonl")
                (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
            else:
                sources[name] = "none"
        build_medical(tmp_path / out, limit, seed, sources, "camopd data medical")
        found = [json.loads(line) for line in json_lines((tmp_path / out / "prompts.jsonl").read_text())]
        return found, (tmp_path / out / "README.md").read_text()

    return make


@pytest.fixture
def prompt_of(make):
    """The user message of one row of one source."""

    def prompt_of(name, row):
        others = dict.fromkeys(set(KINDS) - {name}, "none")
        found, _ = make(1, **{name: [row]}, **others)
        assert found[0]["prompt"][0] == {"role": "system", "content": SYSTEM}
        assert [message["role"] for message in found[0]["prompt"]] == ["system", "user"]
        return found[0]["prompt"][1]["content"]

    return prompt_of


def test_mixture_is_4_3_2_1(make):
    rows, card = make(20)
    names = {"openlifescienceai/medmcqa": 8, "UCSC-VLAA/MedReason": 6, "FreedomIntelligence/Medical-R1-Distill-Data": 4,
             "UCSC-VLAA/m23k-tokenized": 2}  # fmt: skip
    assert Counter(row["source"] for row in rows) == names
    assert all(list(row) == ["prompt", "category", "source", "id"] for row in rows)
    assert {row["category"] for row in rows} == {"medical"}
    assert "medmcqa 4000, medreason 3000, medical_r1_distill 2000, m23k 1000 in 10,000" in card


def test_gold_answers_are_in_no_prompt(make):
    rows, _ = make(100)
    assert len(rows) == 100
    assert all(GOLD not in json.dumps(row) for row in rows)
    # nor does a right option look other than a wrong one: the same question with another answer is the same prompt
    again, _ = make(100, out="again", medmcqa=[medmcqa(n, cop=(n + 1) % 4, exp="other") for n in range(40)],
                    m23k=[m23k(n, answer_letter="A", answer_idx=7, answer_string="one") for n in range(40)])  # fmt: skip
    assert again == rows


def test_medmcqa_is_a_question_with_four_options(prompt_of):
    row = medmcqa(1, question="Which nerve?", opa="ulnar ", opb="radial", opc="median", opd="axillary")
    assert prompt_of("medmcqa", row) == "Which nerve?\nA. ulnar\nB. radial\nC. median\nD. axillary" + CHOICE


@pytest.mark.parametrize(
    "options",
    [
        '{"A": "one", "B": "two", "C": "three"}', '["one", "two", "three"]', "A. one\nB. two\nC. three",
        "Answer Choices:\nA. one\nB. two\nC. three", "(A) one\n(B) two\n(C) three", "A) one\nB) two\nC: three\n",
    ],
)  # fmt: skip
def test_medreason_options_are_json_or_lines_with_letters(prompt_of, options):
    row = medreason(1, question="Which one?", options=options)
    assert prompt_of("medreason", row) == "Which one?\nA. one\nB. two\nC. three" + CHOICE


@pytest.mark.parametrize("options", ["", " ", None, "{}", "[]"])
def test_medreason_without_options_is_an_open_question(prompt_of, options):
    row = medreason(1, question="Why?", options=options)
    assert prompt_of("medreason", row) == "Why?" + OPEN


@pytest.mark.parametrize(
    "options", ["one, two, three", "A. one", '{"B": "two", "A": "one"}', '{"A": 1, "B": 2}', "A. one\nA. two", "1",
                '["", "b"]', "some words\nA. one\nB. two", "A. one\nC. three"],
)  # fmt: skip
def test_medreason_options_that_cannot_be_told_apart_drop_the_row(make, options):
    rows, card = make(medreason=[medreason(0, options=options), *(medreason(n) for n in range(1, 7))])
    assert "medreason-0" not in {row["id"] for row in rows}
    assert "options that cannot be told apart: 1" in card


def test_options_keep_what_only_looks_like_a_letter():
    assert parse_options("A. vitamin B. complex\nB. vitamin K") == {"A": "vitamin B. complex", "B": "vitamin K"}
    assert parse_options("A. first\n  line two\nB. second") == {"A": "first\n  line two", "B": "second"}


def test_medical_r1_distill_has_columns_with_spaces_and_parentheses_and_open_questions(prompt_of):
    assert prompt_of("medical_r1_distill", distill(1, question="Why?")) == "Why?" + OPEN


def test_m23k_has_its_options_in_the_prompt(prompt_of):
    assert prompt_of("m23k", m23k(1)) == "m23k 1?\nA. one\nB. two" + CHOICE


@pytest.mark.parametrize("letter", [None, "", " "])
def test_m23k_without_an_answer_letter_is_an_open_question(prompt_of, letter):
    assert prompt_of("m23k", m23k(1, prompt="Why?", answer_letter=letter)) == "Why?" + OPEN


def test_questions_of_the_medqa_test_are_removed(make):
    rows, card = make(medmcqa=[medmcqa(99, question=" In  MedQA? "), *(medmcqa(n) for n in range(8))])
    assert "medmcqa-uuid-99" not in {row["id"] for row in rows}
    assert "in the test split of medqa: 1" in card


def test_questions_of_medxpertqa_are_found_without_the_choices_behind_them(make):
    rows, card = make(medreason=[medreason(99, question="In MedXpertQA?"), *(medreason(n) for n in range(6))])
    assert "medreason-0" not in {row["id"] for row in rows}  # its place is in the id
    assert "in the test split of medxpertqa: 1" in card


def test_benchmark_questions_are_found_in_m23k_with_options_behind_them(make):
    rows, card = make(m23k=[m23k(0, prompt="In MedQA?\nA. one\nB. two"), m23k(1), m23k(2)])
    assert "m23k-0" not in {row["id"] for row in rows}
    assert "in the test split of medqa: 1" in card


OPTIONS = {"A": "one", "B": "two"}
STATEMENTS = (
    "Of these findings:\n\nA) Fixed intervals\nB) Longer intervals\n\nwhich comes first?"  # as a row of MedXpertQA
)


@pytest.mark.parametrize(
    "behind", ["A. one\nB. two", "(A) one\n(B)  TWO\n", "\nA) one\nB) two", "Answer Choices: (A) one"]
)
@pytest.mark.parametrize("question", ["What?", STATEMENTS, "Vitamin A. What is it?", "A man.\nA. is no option."])
def test_stem_ends_where_the_options_of_the_row_begin(question, behind):
    assert stem(f"{question}\n{behind}", OPTIONS) == stem(f"{question}\n{behind}") == question


@pytest.mark.parametrize(
    "question", [STATEMENTS, "What?\nA. one\nB. three", "What?\nA. one\nB. two\nC. three", "What?\nA. one"]
)
def test_stem_keeps_what_is_not_the_options_of_the_row(question):
    assert stem(question, OPTIONS) == question
    assert stem(STATEMENTS) == STATEMENTS
    _, user = to_prompt({"question": question, "options": {"A": "A > B", "B": "B > A"}})
    assert user["content"].startswith(f"{question}\nA. A > B\nB. B > A\n")


@pytest.mark.parametrize("behind", ["", "\nA. A > B\nB. B > A", "\nAnswer Choices: (A) A > B (B) B > A"])
def test_benchmark_question_with_statements_under_letters_is_found_whole(make, behind):
    other = STATEMENTS.replace("first", "last")  # of the same findings
    rows, card = make(
        m23k=[m23k(0, prompt=STATEMENTS + behind), m23k(1), m23k(2)],
        medmcqa=[medmcqa(99, question=STATEMENTS), *(medmcqa(n, question=f"{n}: {other}") for n in range(8))],
        medreason=[medreason(n, question=other, options=f'["a", "{n}"]') for n in range(8)],
        medxpertqa=[medxpertqa(STATEMENTS)],
    )
    assert not {"m23k-0", "medmcqa-uuid-99"} & {row["id"] for row in rows}
    assert card.count("in the test split of medxpertqa: 1") == 2


def test_duplicates_are_removed_over_all_sources(make):
    same = {"question": "Same?", "opa": "one", "opb": "two", "opc": "three", "opd": "four"}
    options = json.dumps({letter.upper(): same[f"op{letter}"] for letter in "abcd"})
    rows, card = make(
        10, medmcqa=[medmcqa(0, **same), *(medmcqa(n) for n in range(1, 4))],
        medreason=[medreason(0, question="same? ", options=options), *(medreason(n) for n in range(1, 4))],
    )  # fmt: skip
    assert {"medmcqa-uuid-0", "medreason-0"} & {row["id"] for row in rows} == {"medmcqa-uuid-0"}
    assert "duplicate of a row that is kept: 1" in card


@pytest.mark.parametrize(
    ("row", "reason"),
    [(medmcqa(0, question=None), "no question"), (medmcqa(0, question=" "), "no question"),
     (medmcqa(0, opc=""), "an option is empty"), (medmcqa(0, opc=None), "an option is empty"),
     (medmcqa(0, question="x" * 20_000), "too long")],
)  # fmt: skip
def test_row_that_is_no_question_is_dropped_and_counted(make, row, reason):
    rows, card = make(medmcqa=[row, *(medmcqa(n) for n in range(1, 9))])
    assert "medmcqa-uuid-0" not in {found["id"] for found in rows}
    assert f"{reason}: 1" in card


def test_seed_gives_the_same_bytes_and_another_seed_other_rows(make, tmp_path):
    first, _ = make(out="a")
    make(out="b")
    assert (tmp_path / "a" / "prompts.jsonl").read_bytes() == (tmp_path / "b" / "prompts.jsonl").read_bytes()
    assert (tmp_path / "a" / "README.md").read_bytes() == (tmp_path / "b" / "README.md").read_bytes()
    other, _ = make(out="c", seed=1)
    assert {row["id"] for row in other} != {row["id"] for row in first}


def test_mixture_holds_in_any_first_rows(make):
    rows, _ = make(80)
    assert len({row["source"] for row in rows[:20]}) == 4


def test_source_that_is_none_is_left_out_of_the_mixture(make):
    rows, card = make(10, medreason="none", medxpertqa="none")
    assert Counter(row["id"].split("-")[0] for row in rows) == {"medmcqa": 6, "medical_r1_distill": 3, "m23k": 1}
    assert "MedXpertQA](" not in card
    with pytest.raises(ValueError, match=r"all of medmcqa, medreason, .* are left out"):
        make(10, out="no", **dict.fromkeys(KINDS, "none"))


def test_missing_column_is_an_error_with_its_name(make, tmp_path):
    rows = [{key: value for key, value in distill(n).items() if key != "question"} for n in range(9)]
    with pytest.raises(
        DataError, match=r"R1-Distill-Data'.* has no column 'question' in the first row, only \['reasoning"
    ):
        make(medical_r1_distill=rows)
    assert not (tmp_path / "out").exists()


def test_split_without_rows_is_an_error(make, tmp_path):
    with pytest.raises(
        DataError, match=r"m23k-tokenized', .*the local copy 'm23k\.jsonl', has no rows in split 'train'"
    ):
        make(m23k=[])
    assert not (tmp_path / "out").exists()


def test_id_that_comes_twice_is_an_error(make, tmp_path):
    with pytest.raises(DataError, match=r"the id 'medmcqa-uuid-1' comes twice, .* in row \d+ of prompts\.jsonl"):
        make(medmcqa=[medmcqa(1, question=f"q {n}") for n in range(8)])
    assert not (tmp_path / "out").exists()


# --- rows that no builder knows ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Which?", "options": {"A": "one", "B": "two"}, "answer": "B", "answer_text": "two"},
        {
            "question": "Which?",
            "options": {"A": "one", "B": "two", "C": None},
            "cop": 1,
        },  # from Arrow
        {"question": " Which? ", "options": ["one", "two"]},
        {"question": "Which?", "options": "A. one\nB. two"},
        {
            "question": "Which?",
            "opa": "one",
            "opb": "two",
            "opc": None,
            "opd": None,
            "cop": 1,
            "exp": "two",
        },  # MedMCQA
        {"question": "Which?\nAnswer Choices: (A) one (B) two", "options": {"A": "one", "B": "two"}},
    ],
)
def test_row_with_options_gets_the_template_of_figure_7(row):
    system, user = to_prompt(row)
    assert system == {"role": "system", "content": SYSTEM}
    assert user == {
        "role": "user",
        "content": "Which?\nA. one\nB. two\nPlease reason step by step and give the final answer choice at the end.",
    }


def test_row_without_options_gets_the_open_template_and_no_answer():
    _, user = to_prompt({"question": "What is choking?", "answer": GOLD, "options": None})
    assert user["content"] == f"What is choking?\n{CLOSING_OPEN}"
    assert GOLD not in user["content"]


def test_row_without_a_question_is_an_error_with_its_columns():
    with pytest.raises(
        ValueError, match=r"no text in `question`, only the columns \['answer', 'text'\]: .*`messages` or"
    ):
        to_prompt({"text": "Which?", "answer": "A"})


def test_options_that_cannot_be_told_apart_are_an_error_with_the_question():
    with pytest.raises(
        ValueError, match=r"options \{'A': 'one'\} of the medical question 'Which\?' cannot be told apart"
    ):
        to_prompt({"question": "Which?", "options": {"A": "one"}})
