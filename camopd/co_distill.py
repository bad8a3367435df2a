"""On-policy co-distillation (OPCoD, arXiv 2606.14368): two students, each stronger in one domain, tutor each other.

Each round, for each student: it answers the problems several times, and a checker says which answers are right. Where one
is wrong and its peer is itself confident, the peer gives feedback. Then the student's **self-teacher**, its own weights
behind a prompt with one of its right answers and the feedback, scores what the student writes without them, and
`CaMOPDTrainer` moves the student toward it: `teachers: self` and a `teacher_prompt` for each row (docs/context.md).

Public of the paper are the abstract and summaries. Known from there: on-policy self-distillation conditioned on the
student's own right rollout and its peer's feedback; feedback only where the tutor is reliable on the problem (the
cognizance gate); feedback that names a concept of the question, matched by rule, without what leaks the answer (anchoring).
Not public, and so ours: the gate is a least share of right rollouts, `threshold`; the prompts of `Wording`; the divergence,
by default the sampled reverse KL of Eq. 1 of CaMOPD (arXiv 2605.27115), with its selection; that a problem without a
right rollout and without feedback is left out, because its self-teacher would see nothing more than the student.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from datasets import Dataset

from .config import CaMOPDConfig
from .errors import CaMOPDError
from .generation import neutral_generation
from .signals import RunInterrupted
from .trainer import CaMOPDTrainer


logger = logging.getLogger(__name__)

BRANCH = "lessons"
_OPTION = re.compile(r"\(?([A-Za-z])[).]?")  # an answer that is one: "A", "A.", "(A)"
# What stands before the letter of one, whatever its case.
_CALLED_OPTION = re.compile(r"\b(?:option|choice|letter)s?\W{1,3}$|\banswer\s*:\W{0,3}$", re.IGNORECASE)
_CALLED_ANSWER = re.compile(r"\b(?:answer|option|choice|letter)\s+(?:is|was)\W{1,3}$", re.IGNORECASE)
_STARTS_SENTENCE = re.compile(r"(?:^|[.!?\n])[\s\"'\u201c]*$")
_IS_ARTICLE = re.compile(
    r"\s+(?!(?:is|was|would|has|had|because|since|as|and|or|follows|fits|holds)\b)[a-z]"
)  # behind "A"
_THOUSANDS = r"(?:,|\{,\}|\\,|\s)"  # what may stand between the groups of a number


@dataclass(frozen=True)
class Problem:
    """What is asked, its right answer, and the labels of concepts that feedback on it may name."""

    prompt: str
    answer: str
    concepts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wording:
    """What models are told, each a format string."""

    ask: str = (  # {prompt}, {wrong}
        "A student was asked:\n{prompt}\n\nThe student answered:\n{wrong}\n\nName the concept that the question is about, "
        "and what the student has overlooked. Do not give the answer."
    )
    correct: str = "A right answer that you have given before:\n{correct}\n\n"
    feedback: str = "What a colleague says about the question:\n{feedback}\n\n"


@dataclass(frozen=True)
class Tutoring:
    """How students are taught. The defaults are ours."""

    rollouts: int = 4  # answers of each student to each problem
    threshold: float = 0.5  # a peer gives feedback where at least this share of its own answers is right; 0: always
    feedback: bool = True  # False: self-distillation alone
    anchored: bool = True  # False: feedback goes to the self-teacher as it was written
    max_answer: int = 1024  # tokens
    max_feedback: int = 256  # tokens
    wording: Wording = field(default_factory=Wording)

    def __post_init__(self) -> None:
        """Raises `ValueError` for numbers that mean nothing."""
        if self.rollouts < 1 or not 0 <= self.threshold <= 1:
            raise ValueError(
                f"rollouts={self.rollouts} and threshold={self.threshold:g}: a student answers each problem at least once, "
                "and the threshold is a share of its answers, from 0 to 1."
            )


@dataclass(frozen=True)
class Student:
    """A model, the tokenizer it reads with, and a name for messages and folders. The model is on its device."""

    name: str
    model: Any
    tokenizer: Any
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # of the chat template, as `enable_thinking`
    batch: int = 64  # texts that are written at once

    def sees(self, prompt: str) -> Any:
        """The prompt as a row of a dataset has it: messages for a chat model."""
        return [{"role": "user", "content": prompt}] if self.tokenizer.chat_template else prompt

    @torch.no_grad()
    def write(self, prompts: Sequence[str], count: int, max_tokens: int) -> list[list[str]]:
        """`count` completions of each prompt, drawn from the model's own distribution; they end where training's do."""
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token  # as the trainer does
        own = self.model.generation_config.eos_token_id
        ends = sorted({self.tokenizer.eos_token_id, *([own] if isinstance(own, int) else own or ())})
        texts = [self._text(prompt) for prompt in prompts for _ in range(count)]
        written: list[str] = []
        training = self.model.training
        self.model.eval()
        with neutral_generation(self.model):
            for start in range(0, len(texts), self.batch):
                inputs = self.tokenizer(
                    texts[start : start + self.batch], return_tensors="pt", padding=True, padding_side="left",
                    add_special_tokens=not self.tokenizer.chat_template, return_token_type_ids=False,
                ).to(self.model.device)  # fmt: skip
                ids = self.model.generate(
                    **inputs, max_new_tokens=max_tokens, do_sample=True, top_k=0, eos_token_id=ends
                )
                written += self.tokenizer.batch_decode(
                    ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
                )
        self.model.train(training)
        return [written[start : start + count] for start in range(0, len(written), count)]

    def _text(self, prompt: str) -> str:
        if not self.tokenizer.chat_template:
            return prompt
        text: str = self.tokenizer.apply_chat_template(
            self.sees(prompt), tokenize=False, add_generation_prompt=True, **self.template_kwargs
        )
        return text


class Graded(NamedTuple):
    """A student's answers to one problem, apart by whether they are right."""

    right: list[str]
    wrong: list[str]

    @property
    def rate(self) -> float:
        """The share that is right."""
        return len(self.right) / (len(self.right) + len(self.wrong))


def grade(
    student: Student, problems: Sequence[Problem], is_right: Callable[[Problem, str], bool], tutoring: Tutoring
) -> list[Graded]:
    """What a student answers to each problem."""
    answers = student.write([problem.prompt for problem in problems], tutoring.rollouts, tutoring.max_answer)
    found = []
    for problem, texts in zip(problems, answers, strict=True):
        marks = [bool(is_right(problem, text)) for text in texts]
        found.append(
            Graded(*([text for text, mark in zip(texts, marks, strict=True) if mark is of] for of in (True, False)))
        )
    return found


def anchor(feedback: str, problem: Problem) -> str | None:
    """What may be passed on of a peer's feedback: the right answer is taken out wherever it stands as a word, and what is
    left has to name one of the problem's concepts. `None` where it does not.

    An answer is found in other white space and with other thousands separators, too. One that is the letter of an option is
    found as a letter in its own case, or as an option in any, and the option's text goes with it, where the prompt lists
    options, each on a line or one behind the other.
    """
    option = _OPTION.fullmatch(problem.answer.strip())
    if option is None:
        kept = _without(problem.answer, feedback)
    else:
        kept = feedback
        for listed in _texts_of(option[1], problem.prompt):
            kept = _without(listed, kept)
        kept = _without_letter(option[1], kept)
    named = any(re.search(rf"(?<!\w){re.escape(label)}(?!\w)", kept, re.IGNORECASE) for label in problem.concepts)
    return kept.strip() if named else None


def _texts_of(letter: str, prompt: str) -> list[str]:
    """What a prompt lists behind an option's letter, each time: up to a question mark, the end of the line, or the next
    letter in the same form."""
    following = re.escape(chr(ord(letter) + 1))
    item = rf"(?m)(?:^|[\s;,])(\(?){letter}([).:])\s*([^?\n]+?)(?=[\s;,]+\1{following}\2|\s*[?\n]|\s*\Z)"
    found = [re.sub(r"[\s;,]+(?:or|and)$", "", match[3]).rstrip(" .;,\r") for match in re.finditer(item, prompt)]
    return [text for text in found if text not in ("", "or", "and")]


def _without(answer: str, text: str) -> str:
    """A text without an answer, whatever white space and thousands separators either has."""
    words = re.findall(r"\d+|[^\W\d]+|[^\w\s]", re.sub(rf"(?<=\d){_THOUSANDS}(?=\d{{3}}(?!\d))", "", answer))
    if not words:
        return text
    patterns = []
    for word in words:
        first = len(word) % 3 or 3
        groups = [word[:first], *(word[at : at + 3] for at in range(first, len(word), 3))]
        patterns.append(f"(?:{_THOUSANDS})?".join(groups) if word.isdecimal() else re.escape(word))
    pattern = r"\s*".join(patterns) + (r"(?:\.0+(?!\w))?" if words[-1].isdecimal() else "")
    return re.sub(rf"(?<!\w){pattern}(?!\w)", "", text, flags=re.IGNORECASE)


def _without_letter(letter: str, text: str) -> str:
    """A text without an option's letter, but with the articles and the pronoun that look like it."""

    def cut(found: re.Match[str]) -> str:
        before, after = text[: found.start()], text[found.end() :]
        if found[0][0] == "(" or found[0][-1] == ")" or _CALLED_OPTION.search(before):
            return ""
        word: Any = re.match(r"\s+[a-z]|['\u2019]", after)
        if found[0] != letter:  # in the other case
            word = word or not _CALLED_ANSWER.search(before)
        elif letter == "A":
            word = _STARTS_SENTENCE.search(before) and _IS_ARTICLE.match(after)
        elif letter not in "aI":
            word = None
        return found[0] if word else ""

    return re.sub(rf"\({letter}\)|(?<!\w){letter}(?!\w)\)?", cut, text, flags=re.IGNORECASE)


def lessons_of(
    student: Student, peer: Student, problems: Sequence[Problem], own: Sequence[Graded], of_peer: Sequence[Graded],
    tutoring: Tutoring,
) -> tuple[list[dict[str, Any]], dict[str, int]]:  # fmt: skip
    """The rows that a student learns from in a round, and what became of the problems.

    Args:
        student: who learns.
        peer: who gives feedback.
        problems: of the round.
        own: the student's answers to each.
        of_peer: the peer's.
        tutoring: how.

    Returns rows with `prompt` and `teacher_prompt`, and counts: `problems`, those with a `right` answer, those that
    `need` feedback because an answer is wrong, those of them whose gate is `open`, the feedback that was `kept`, and the
    `rows`. Problems without a right answer and without feedback have no row.
    """
    need = [place for place, graded in enumerate(own) if graded.wrong]
    open_to = [place for place in need if of_peer[place].rate >= tutoring.threshold] if tutoring.feedback else []
    said = peer.write(
        [tutoring.wording.ask.format(prompt=problems[place].prompt, wrong=own[place].wrong[0]) for place in open_to],
        1, tutoring.max_feedback,
    )  # fmt: skip
    feedback = {
        place: anchor(text, problems[place]) if tutoring.anchored else text.strip()
        for place, (text,) in zip(open_to, said, strict=True)
    }
    rows = []
    for place, (problem, graded) in enumerate(zip(problems, own, strict=True)):
        told = feedback.get(place)
        context = tutoring.wording.feedback.format(feedback=told) if told else ""
        context += tutoring.wording.correct.format(correct=graded.right[0]) if graded.right else ""
        if context:
            rows.append(
                {"prompt": student.sees(problem.prompt), "teacher_prompt": student.sees(context + problem.prompt)}
            )
    counts = {
        "problems": len(problems), "right": sum(bool(graded.right) for graded in own), "need": len(need),
        "open": len(open_to), "kept": sum(bool(text) for text in feedback.values()), "rows": len(rows),
    }  # fmt: skip
    return rows, counts


def co_distill(
    students: tuple[Student, Student],
    problems: Callable[[int], Sequence[Problem]],
    is_right: Callable[[Problem, str], bool],
    config: Callable[[str, int], CaMOPDConfig],
    rounds: int,
    tutoring: Tutoring | None = None,
) -> list[dict[str, Any]]:
    """Let two students tutor each other; their models are trained where they are.

    Args:
        students: both of them.
        problems: those of a round, of both domains. Both students get them all.
        is_right: whether a text answers a problem rightly.
        config: of a student's training in a round, by the student's name and the round, with `schedule=BRANCH`. Each
            training has an optimizer of its own.
        rounds: how many.
        tutoring: how.

    Both answer before either learns, so that neither has the first turn.

    Returns a line for each student and round: `student`, `round`, and the counts of `lessons_of`.

    Raises `CaMOPDError` where the checker accepts no answer of either student in the first round, where a peer that is
    needed passes the gate for no problem at all in it, where a student has nothing to learn from, and where a signal has
    stopped a training: both models are in memory alone. `ValueError` for a config with another schedule or other
    `chat_template_kwargs` than the student writes with, for two students of one name, and in one of several processes. A
    gate that is closed in another round, or for just the problems in need, is warned of.
    """
    tutoring = tutoring or Tutoring()
    _check_pair(students)
    lines = []
    for number in range(rounds):
        configs = [config(student.name, number) for student in students]
        for student, args in zip(students, configs, strict=True):
            _check_config(student, args)
        asked = problems(number)
        graded = [grade(student, asked, is_right, tutoring) for student in students]
        if number == 0:
            _need_right(students, asked, graded)
        made = []
        for at, student in enumerate(students):
            peer = students[1 - at]
            rows, counts = lessons_of(student, peer, asked, graded[at], graded[1 - at], tutoring)
            if tutoring.feedback and counts["need"] and not counts["open"]:
                _closed_gate(peer, counts["need"], graded[1 - at], tutoring, number)
            if not rows:
                raise CaMOPDError(
                    f"{student.name!r} has nothing to learn from in round {number}: it has answered none of "
                    f"{len(asked)} problems rightly, and no feedback of {peer.name!r} was passed on (gate open "
                    f"{counts['open']} times, kept {counts['kept']}). Ask easier problems, or give them the concepts that "
                    "feedback names."
                )
            made.append(rows)
            lines.append({"student": student.name, "round": number, **counts})
        for student, rows, args in zip(students, made, configs, strict=True):
            _learn(student, rows, args)
    return lines


def _check_pair(students: Sequence[Student]) -> None:
    if students[0].name == students[1].name:
        raise ValueError(f"both students are named {students[0].name!r}, and would write into one folder. Rename one.")
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ValueError(
            f"WORLD_SIZE={processes}: each process would draw answers and train on lessons of its own. "
            "Start one process, or write a loop of your own around `lessons_of` and `CaMOPDTrainer`."
        )


def _check_config(student: Student, args: CaMOPDConfig) -> None:
    if args.schedule != BRANCH:
        raise ValueError(
            f"the config of {student.name!r} has schedule={args.schedule!r}, and lessons are one branch. Make it with "
            f"schedule={BRANCH!r}."
        )
    if (args.chat_template_kwargs or {}) != student.template_kwargs:
        raise ValueError(
            f"the config of {student.name!r} has chat_template_kwargs={args.chat_template_kwargs}, and its answers are "
            f"written with template_kwargs={dict(student.template_kwargs)}. Give both the same, or it learns on other "
            "prompts than it is graded on."
        )


def _learn(student: Student, rows: list[dict[str, Any]], args: CaMOPDConfig) -> None:
    trainer = CaMOPDTrainer(
        model=student.model, teachers={BRANCH: "self"}, args=args, train_dataset={BRANCH: Dataset.from_list(rows)},
        processing_class=student.tokenizer,
    )  # fmt: skip
    try:
        trainer.train()
    except RunInterrupted as error:
        # Not its exit code, by which a scheduler would start the same command: that finds the folder used.
        raise CaMOPDError(
            f"a signal has stopped the training of {student.name!r} in {args.output_dir!r}. A co-distillation cannot go on "
            "from there, whatever that run has said: both students and their lessons were in memory. Start again with the "
            "first round, in another folder."
        ) from error
    finally:  # or each round's forward lies around that of the one before, and answers are written in its precision
        trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)


def _need_right(students: Sequence[Student], problems: Sequence[Problem], graded: Sequence[Sequence[Graded]]) -> None:
    if any(each.right for of in graded for each in of):
        return
    raise CaMOPDError(
        f"the answer checker accepts nothing: of {len(problems)} problems neither {students[0].name!r} nor "
        f"{students[1].name!r} has answered one rightly. To {problems[0].prompt[:120]!r}, whose answer is "
        f"{problems[0].answer[:80]!r}, the first has said {graded[0][0].wrong[0][:120]!r}. Look at is_right, or ask "
        "problems that one of them can solve."
    )


def _closed_gate(peer: Student, need: int, of_peer: Sequence[Graded], tutoring: Tutoring, number: int) -> None:
    """Warn of a round without feedback. Raises `CaMOPDError` for the first one where the peer is reliable on no problem."""
    best = max(graded.rate for graded in of_peer)
    if number > 0 or best >= tutoring.threshold:
        logger.warning(
            "%r passes the gate for none of the %d problems its peer needs feedback on in round %d (threshold %.0f%%), "
            "and the peer learns from its own right answers alone",
            peer.name, need, number, 100 * tutoring.threshold,
        )  # fmt: skip
        return
    raise CaMOPDError(
        f"{peer.name!r} passes the gate for none of {len(of_peer)} problems, of which its peer needs it on {need}: at "
        f"most {best:.0%} of its own {tutoring.rollouts} answers to one are right, and the threshold is "
        f"{tutoring.threshold:.0%}. Lower the threshold, draw more rollouts, or ask problems of its domain."
    )
