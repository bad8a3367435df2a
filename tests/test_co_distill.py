"""Two students that tutor each other (camopd/co_distill.py)."""

import re
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model, make_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from trainers import make_args

from camopd import CaMOPDConfig
from camopd.co_distill import (
    BRANCH,
    Graded,
    Problem,
    Student,
    Tutoring,
    Wording,
    anchor,
    co_distill,
    grade,
    lessons_of,
)
from camopd.errors import CaMOPDError
from camopd.signals import RunInterrupted


PROBLEMS = [
    Problem("abc?", "cba", ("reverse", "copy")),
    Problem("bca?", "abc", ("sort",)),
    Problem("aab?", "baa", ("reverse",)),
]


class Scripted:
    """A student that says what it is told to: a text for all prompts, or one by prompt."""

    def __init__(self, name, said):
        self.name, self.said, self.asked, self.template_kwargs = name, said, [], {}
        self.model, self.tokenizer = self, None

    def sees(self, prompt):
        return prompt

    def write(self, prompts, count, max_tokens):
        self.asked += prompts
        return [
            [self.said.get(prompt, "?") if isinstance(self.said, dict) else self.said] * count for prompt in prompts
        ]


@given(
    st.text(max_size=60),
    st.text("abcXY 1.", max_size=6),
    st.lists(st.text("abcXY", min_size=1, max_size=4), max_size=3),
)
def test_anchor_names_a_concept_and_never_the_answer(feedback, answer, concepts):
    kept = anchor(feedback, Problem("?", answer, tuple(concepts)))
    if kept is None:
        return
    assert any(re.search(rf"(?<!\w){re.escape(label)}(?!\w)", kept, re.IGNORECASE) for label in concepts)
    words = re.findall(r"\w+", kept.lower())
    one_letter = re.fullmatch("[a-zA-Z]", answer)  # may look like an article: by hand below
    assert not re.fullmatch(r"\w+", answer) or one_letter or answer.lower() not in words
    if one_letter and answer.lower() not in "ai":
        assert not re.search(rf"(?<!\w){answer}(?!['\u2019\w])", kept)


@pytest.mark.parametrize(
    ("feedback", "kept"),
    [
        ("This is reverse, so it is CBA.", "This is reverse, so it is ."),
        ("reverse cba", "reverse"),
        ("It is cba", None),
        ("reversed", None),
        ("Use copycba", None),
        ("a copy: cbas", "a copy: cbas"),  # another word
        ("", None),
    ],
)
def test_anchor_by_hand(feedback, kept):
    assert anchor(feedback, PROBLEMS[0]) == kept


@pytest.mark.parametrize(
    ("answer", "feedback", "kept"),
    [
        ("x^2+1", "copy x^2 + 1.", "copy ."),
        ("x^2 + 1", "copy x^2+1.", "copy ."),
        ("x^2 + 1", "copy x^2+11", "copy x^2+11"),
        ("1000", "copy 1,000 or 1 000 or 1{,}000", "copy  or  or"),
        ("1,000", "copy 1000, not 10,00 or 21,000", "copy , not 10,00 or 21,000"),
        ("12345678", "copy 12,345,678", "copy"),
        ("42\n", "copy: it is 42", "copy: it is"),
        ("New York", "copy new  york", "copy"),
        ("A", "A quick copy is a start. A copy helps", "A quick copy is a start. A copy helps"),
        ("A", "copy: option A, (A), A) and A. It is A", "copy: option , ,  and . It is"),
        ("A", "copy it. A is right, since A fits", "copy it.  is right, since  fits"),
        ("A", "copy option a, or (a), as a rule", "copy option , or , as a rule"),
        (
            "A",
            "copy it to answer a question. The answer is a number",
            "copy it to answer a question. The answer is a number",
        ),
        ("5", "copy 5.0, 5.00 and 5", "copy ,  and"),
        ("(A)", "copy A", "copy"),
        ("B", "copy b and B. The answer is b", "copy b and . The answer is"),
        ("I", "I think of a copy: I.", "I think of a copy: ."),
        ("a", "a copy of option a", "a copy of option"),
    ],
)
def test_anchor_finds_answers_in_other_forms_and_no_articles(answer, feedback, kept):
    assert anchor(feedback, Problem("?", answer, ("copy",))) == kept


@pytest.mark.parametrize(
    "form",
    [
        "A) {}\nB) {}", "A. {}\nB. {}.", " (A) {}\n (B) {}", "A: {}\r\nB: {}\r", "A) {} B) {}",
        "A. {}; B. {}; C. none; D. all", "Is it (A) {}, (B) {}, (C) none, or (D) all?",
        "Is it (A) {} or (B) {}?", "A: {} B: {} C: none",
    ],
)  # fmt: skip
def test_anchor_takes_out_the_text_of_the_right_option(form):
    prompt = f"Which gas is it?\n{form.format('noble gas', 'Carbon dioxide (CO2)')}\nAnswer with a letter."
    said = "A hint on density: it is no noble gas, carbon  dioxide (CO2) is heavier"
    left = "A hint on density: it is no noble gas, "
    assert anchor(said, Problem(prompt, "B", ("density",))) == left + " is heavier"
    assert anchor(said, Problem(prompt, "B", ("dioxide",))) is None
    assert anchor(said, Problem("Which gas is it?", "B", ("dioxide",))) == said
    for more in ("A) or B)", "(A) or (B)", "A. or B.", "A or B"):
        assert anchor(said, Problem(f"{prompt} Answer with {more}.", "B", ("density",))) == left + " is heavier"
    assert anchor(said, Problem(f"Element B. Which gas is it?\n{prompt}", "B", ("density",))) == left + " is heavier"


def test_grade_gives_back_every_answer():
    student = Scripted("a", {"abc?": "cba", "bca?": "abc"})
    found = grade(student, PROBLEMS, lambda problem, text: text == problem.answer, Tutoring(rollouts=3))
    assert [(len(each.right), len(each.wrong), each.rate) for each in found] == [(3, 0, 1.0), (3, 0, 1.0), (0, 3, 0.0)]


WORDING = Wording(ask="{prompt}|{wrong}", correct="({correct})", feedback="<{feedback}>")
OWN = [Graded(["cba"], ["x"] * 3), Graded([], ["y"] * 4), Graded([], ["z"] * 4)]


@pytest.mark.parametrize(
    ("settings", "asked", "seen", "counts"),
    [  # the peer is right in 2, 1 and 4 of 4 answers
        ({}, ["abc?|x", "aab?|z"], ["<reverse>(cba)abc?", "<reverse>aab?"], (3, 2, 2, 2)),
        ({"threshold": 0.0}, ["abc?|x", "bca?|y", "aab?|z"], ["<reverse>(cba)abc?", "<reverse>aab?"], (3, 3, 2, 2)),
        ({"feedback": False}, [], ["(cba)abc?"], (3, 0, 0, 1)),
        ({"threshold": 0.75}, ["aab?|z"], ["(cba)abc?", "<reverse>aab?"], (3, 1, 1, 2)),
        ({"anchored": False}, ["abc?|x", "aab?|z"], ["<reverse cba>(cba)abc?", "<reverse baa>aab?"], (3, 2, 2, 2)),
    ],
)
def test_lessons_follow_gate_and_anchor(settings, asked, seen, counts):
    peer = Scripted("b", {"abc?|x": "reverse cba", "bca?|y": "reverse", "aab?|z": "reverse baa"})
    of_peer = [Graded(["r"] * right, ["w"] * (4 - right)) for right in (2, 1, 4)]
    rows, found = lessons_of(Scripted("a", ""), peer, PROBLEMS, OWN, of_peer, Tutoring(wording=WORDING, **settings))
    assert peer.asked == asked
    assert [row["teacher_prompt"] for row in rows] == seen
    assert all(row["teacher_prompt"].endswith(row["prompt"]) for row in rows)
    assert tuple(found[key] for key in ("need", "open", "kept", "rows")) == counts and found["problems"] == 3


def pair(first, second):
    return Scripted("a", first), Scripted("b", second)


def lessons(*_, **changed):
    """A config that lessons can be learned with, as far as it is looked at before."""
    return SimpleNamespace(**{"schedule": BRANCH, "chat_template_kwargs": None, **changed})


@pytest.mark.parametrize(
    ("students", "tutoring", "match"),
    [
        (pair("?", "!"), Tutoring(), r"accepts nothing: of 3 problems neither 'a' nor 'b'.*'abc\?'.*'cba'.*is_right"),
        (pair({"abc?": "cba"}, "?"), Tutoring(), "'b' passes the gate for none of 3 .* on 2: at most 0%.*50%"),
        (pair({"abc?": "cba"}, "?"), Tutoring(threshold=0.0), "'b' has nothing to learn from in round 0.*kept 0"),
    ],
)
def test_co_distill_says_what_keeps_students_from_learning(students, tutoring, match):
    def is_right(problem, text):
        return text == problem.answer

    with pytest.raises(CaMOPDError, match=match):
        co_distill(students, lambda number: PROBLEMS, is_right, lessons, 1, tutoring)


def test_gate_that_is_closed_where_it_is_needed_leaves_self_distillation(monkeypatch, caplog):
    """In the first round both know two problems of three. Later the second one knows none: of that the first is warned, and
    it is the second that stops the run."""
    learned, number_now = [], [0]

    class Trainer:
        """Notes who learns from what."""

        accelerator = SimpleNamespace(unwrap_model=lambda model, **_: model)

        def __init__(self, model, teachers, train_dataset, **_):
            assert teachers == {BRANCH: "self"}
            self.model, self.rows = model, train_dataset[BRANCH].to_list()

        def train(self):
            learned.append((self.model.name, self.rows))

    monkeypatch.setattr("camopd.co_distill.CaMOPDTrainer", Trainer)

    def problems(number):
        number_now[0] = number
        return PROBLEMS

    def is_right(problem, text):
        return problem is not PROBLEMS[2] and (number_now[0] == 0 or text == "first")

    lines = co_distill(pair("first", "second"), problems, is_right, lessons, 1, Tutoring())
    assert [(line["need"], line["open"], line["rows"]) for line in lines] == [(1, 0, 2), (1, 0, 2)]
    assert [(name, [row["prompt"] for row in rows]) for name, rows in learned] == [
        ("a", ["abc?", "bca?"]), ("b", ["abc?", "bca?"]),
    ]  # fmt: skip
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "'b' passes the gate for none of the 1 problems its peer needs feedback on in round 0" in caplog.text
    caplog.clear()
    with pytest.raises(
        CaMOPDError, match="'b' has nothing to learn from in round 1"
    ):  # the first is told of its peer before
        co_distill(pair("first", "second"), problems, is_right, lessons, 2, Tutoring())
    assert "'b' passes the gate for none of the 1 problems its peer needs feedback on in round 1" in caplog.text


def test_co_distill_moves_both_toward_their_self_teachers(tmp_path, monkeypatch):
    """Whatever ends in an even letter counts as right. After its first round each student, without the lessons, says with a
    probability nearer to before what it said with them; the second has other lessons. Its forward is its own again, not one
    in the precision of training. Tried with four seeds and two instruction sets: 0.26 to 0.86 of the divergence is left."""
    students = tuple(Student(name, make_model(seed), make_tokenizer()) for seed, name in enumerate("ab"))
    torch.manual_seed(0)
    taught = {}

    def recorded(student, *args):
        rows, counts = lessons_of(student, *args)
        if student.name not in taught:
            prompts, with_lessons = (
                [
                    student.tokenizer.apply_chat_template(row[name], tokenize=False, add_generation_prompt=True)
                    for row in rows
                ]
                for name in ("prompt", "teacher_prompt")
            )
            taught[student.name] = prompts, first_token(student, with_lessons)
            before[student.name] = divergence(student)
        else:
            after[student.name] = divergence(student)
        return rows, counts

    def first_token(student, texts):
        """Log-probs of the first token of an answer to each."""
        with torch.no_grad():
            rows = [student.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids for text in texts]
            return torch.cat([student.model(ids).logits[:, -1].log_softmax(-1) for ids in rows])

    def divergence(student):
        """Reverse KL to the self-teacher of before, nats."""
        prompts, target = taught[student.name]
        now = first_token(student, prompts)
        return float((now.exp() * (now - target)).sum(-1).mean())

    before, after = {}, {}
    monkeypatch.setattr("camopd.co_distill.lessons_of", recorded)

    def config(name, number):
        return CaMOPDConfig(
            output_dir=str(tmp_path / f"{name}-{number}"), use_cpu=True, bf16=True, report_to="none", disable_tqdm=True,
            save_strategy="no", gradient_checkpointing=False, max_steps=1 if number else 36, prompts_per_step=12,
            diagnostics_steps=0, per_device_train_batch_size=12, max_completion_length=4, max_prompt_length=400,
            learning_rate=1e-3, schedule=BRANCH, lr_scheduler_type="constant", selection=False,
        )  # fmt: skip

    lines = co_distill(
        students, lambda number: PROBLEMS, lambda problem, text: ord(text[-1]) % 2 == 0, config, 2,
        Tutoring(max_answer=4, max_feedback=4, threshold=0.0, anchored=False),
    )  # fmt: skip
    assert [(line["student"], line["round"]) for line in lines] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    for student in students:
        assert after[student.name] < 0.95 * before[student.name]
        assert not hasattr(student.model.forward, "__wrapped__") and "_original_forward" not in vars(student.model)


def test_co_distill_that_a_signal_stops_says_to_start_again(tmp_path, monkeypatch):
    """Its students are in memory, and the folder of the round is used: nothing goes on with `--resume auto`, or at 75."""

    def stopped(self):
        raise RunInterrupted("SIGTERM: stopped; go on with `--resume auto`")

    monkeypatch.setattr("camopd.co_distill.CaMOPDTrainer.train", stopped)
    students = tuple(Student(name, make_model(seed), make_tokenizer()) for seed, name in enumerate("ab"))

    def config(name, number):
        return make_args(tmp_path / f"{name}-{number}", schedule=BRANCH, max_prompt_length=400)

    with pytest.raises(
        CaMOPDError, match=r"a signal has stopped the training of 'a' in '.*a-0'\. .* Start again with the"
    ):
        co_distill(
            students, lambda number: PROBLEMS, lambda problem, text: True, config, 1, Tutoring(max_answer=2, max_feedback=2)
        )  # fmt: skip


@pytest.mark.parametrize("settings", [{"rollouts": 0}, {"threshold": 1.5}, {"threshold": -0.1}])
def test_tutoring_refuses_numbers_that_mean_nothing(settings):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        Tutoring(**settings)


def test_two_students_of_one_name_are_refused():
    with pytest.raises(ValueError, match="both students are named 'a'"):
        co_distill((Scripted("a", ""), Scripted("a", "")), None, None, None, 1)


def test_co_distill_in_one_of_several_processes_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    students = pair("cba", "cba")
    with pytest.raises(ValueError, match=r"WORLD_SIZE=2: .* Start one process, or write a loop of your own"):
        co_distill(students, lambda number: PROBLEMS, lambda *_: True, lessons, 1)
    assert students[0].asked == []


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"schedule": "general:3,domain:1"}, "'a' has schedule='general:3,domain:1'.*schedule='lessons'"),
        ({"chat_template_kwargs": {"enable_thinking": False}},
         "'a' has chat_template_kwargs={'enable_thinking': False}.*template_kwargs={}.*Give both the same"),
    ],
)  # fmt: skip
def test_config_that_lessons_cannot_be_learned_with_is_refused_before_anything_is_written(changed, match):
    students = pair("cba", "cba")
    with pytest.raises(ValueError, match=match):
        co_distill(students, lambda number: PROBLEMS, lambda *_: True, lambda *_: lessons(**changed), 1)
    assert students[0].asked == []


def test_write_fills_the_template_with_the_students_words_and_needs_no_pad_token():
    tokenizer = make_tokenizer()
    tokenizer.chat_template += "{% if not enable_thinking|default(true) %}..{% endif %}"
    tokenizer.pad_token = None
    seen = []

    class Model(type(make_model(0))):
        def generate(self, input_ids, **kwargs):
            seen.append((input_ids.shape, tokenizer.decode(input_ids[-1], skip_special_tokens=False)))
            return super().generate(input_ids=input_ids, **kwargs)

    model = make_model(0)
    model.__class__ = Model
    written = Student("a", model, tokenizer, {"enable_thinking": False}, batch=2).write(["abc?", "b?", "ab?"], 1, 2)
    assert len(written) == 3 and [shape[0] for shape, _ in seen] == [2, 1]
    assert all(text.replace(" ", "").endswith("?.a..") for _, text in seen)


def test_write_draws_from_the_model_itself():
    """Not by its generation config, which would have drawn the likeliest token each time."""
    model, tokenizer = make_model(0), make_tokenizer()
    model.generation_config.update(do_sample=True, top_k=1)
    torch.manual_seed(0)
    (written,) = Student("a", model, tokenizer).write(["abc?"], 16, 3)
    assert len(written) == 16 and len(set(written)) > 1
    assert SimpleNamespace(**vars(model.generation_config)).top_k == 1


def test_write_ends_at_the_end_of_the_tokenizer_too():
    """As training does: generation_config.json may name the end of a document alone, and the tokenizer that of a turn."""
    model, tokenizer = make_model(0), make_tokenizer()
    model.generation_config.eos_token_id = 9
    ends, rows, generate = {9, tokenizer.eos_token_id}, [], model.generate

    def look(input_ids, **more):
        written = generate(input_ids=input_ids, **more)
        rows.extend(written[:, input_ids.shape[1] :].tolist())
        return written

    model.generate = look
    torch.manual_seed(0)
    Student("a", model, tokenizer).write(["abc?"], 64, 24)
    cut = [next((place for place, token in enumerate(row) if token in ends), len(row)) for row in rows]
    assert {rows[place][end] for place, end in enumerate(cut) if end < 23} == ends  # both, before the limit
    assert all(token == tokenizer.pad_token_id for row, end in zip(rows, cut, strict=True) for token in row[end + 1 :])
