"""Medical prompts: 10K questions of four datasets in the template of the paper's Figure 7 (appendix A.4).

Only questions and options are put into prompts. Gold answers and explanations are not even read, but for whether m23k has
an answer letter, which says that its question has options.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..words import counted
from .output import building, write_card, write_jsonl
from .sampling import LIMIT, Messages, enough, largest_remainder, normalise, sample, shorten, shuffled, user_text
from .sources import Source, open_source


MIXTURE = {"medmcqa": 4000, "medreason": 3000, "medical_r1_distill": 2000, "m23k": 1000}
SOURCES = {
    "medmcqa": Source("medmcqa", "openlifescienceai/medmcqa", ("id", "question", "opa", "opb", "opc", "opd")),
    "medreason": Source("medreason", "UCSC-VLAA/MedReason", ("question", "options")),
    "medical_r1_distill": Source(
        "medical_r1_distill", "FreedomIntelligence/Medical-R1-Distill-Data", ("question",), config="en"
    ),
    "m23k": Source("m23k", "UCSC-VLAA/m23k-tokenized", ("prompt", "answer_letter")),
}
BENCHMARKS = {
    "medqa": Source("medqa", "GBaker/MedQA-USMLE-4-options", ("question",), "test"),
    "medxpertqa": Source("medxpertqa", "TsinghuaC3I/MedXpertQA", ("question",), "test", config="Text"),
}

SYSTEM = (
    "You are a careful medical reasoning assistant. Provide educational medical information, mention uncertainty when "
    "relevant, and recommend professional medical care for diagnosis or treatment decisions."
)
CLOSING_CHOICE = "Please reason step by step and give the final answer choice at the end."
CLOSING_OPEN = (
    "Please reason step by step and answer clearly. Do not present the answer as a substitute for professional medical "
    "advice."
)

_OPTION = re.compile(
    r"^[ \t]*\(?([A-Z])[.):][ \t]*", re.MULTILINE
)  # "A. ", "(A) ", "A) ", "A: " at the start of a line
_OPTIONS_BEGIN = re.compile(r"\n\s*(?:Answer Choices:|\(?A[.):]\s)", re.IGNORECASE)


def build_medical(
    out: str | Path, limit: int = LIMIT, seed: int = 0, sources: dict[str, str] | None = None, command: str = ""
) -> None:
    """Write `limit` medical prompts to the folder `out`. `sources` names local copies; `"none"` leaves a source out.

    Raises `ValueError` for an `out` that is there or a path without files, `DataError` for data that does not fit.
    """
    sources = sources or {}
    mixture = {name: weight for name, weight in MIXTURE.items() if sources.get(name) != "none"}
    if not mixture:
        raise ValueError(
            f"all of {', '.join(MIXTURE)} are left out (`none`), so there are no questions. Give one of them."
        )
    shares = {name: share for name, share in largest_remainder(mixture, limit).items() if share}
    benchmarks = [name for name in BENCHMARKS if sources.get(name) != "none"]
    with building(out) as build:
        opened = {
            name: open_source(source, sources.get(name))
            for name, source in {**SOURCES, **BENCHMARKS}.items()
            if name in shares or name in benchmarks
        }
        benchmark = {normalise(stem(raw["question"])): name for name in benchmarks for raw in opened[name].rows()}
        rows: dict[int, dict[str, Any]] = {}
        parts = []
        for name, share in shares.items():

            def convert(raw: dict[str, Any], index: int, name: str = name) -> tuple[str, Any] | str:
                return convert_row(raw, index, name, benchmark)

            part, drawn = sample(build, opened[name], name, share, seed, convert, rows)
            enough(part, share, len(drawn))
            part.kept = len(drawn)
            parts.append(part)
            rows.update(drawn)
        write_jsonl(build.data / "prompts.jsonl", shuffled(rows.values(), seed))
        write_card(
            build.data / "README.md",
            "Medical prompts",
            command,
            list(opened.values()),
            parts,
            {"prompts.jsonl": f"{counted(len(rows), 'prompt')}: `prompt` (messages), `category`, `source`, `id`"},
            [
                f"Drawn uniformly from each source, seed {seed}; the shares are "
                f"{', '.join(f'{name} {weight}' for name, weight in mixture.items())} in {sum(mixture.values()):,}.",
                "The template is that of Figure 7 of arXiv 2605.27115. Gold answers, explanations and reasoning are in no "
                "prompt.",
                f"Questions of the test splits of {' and '.join(benchmarks) or 'no benchmark'} ({len(benchmark):,} texts) "
                "are removed, if the text is the same but for case, white space, Unicode form and options.",
                "Duplicates have the same question and options but for case, white space and Unicode form, and are removed "
                "over all sources; those of rows that are not drawn are not counted.",
            ],
        )


def stem(question: str, options: dict[str, str] | None = None) -> str:
    """A question without its own options, which some datasets put behind it as well.

    What it says under letters of its own stays: it asks about that. Where the `options` are not known, they are the lines
    that end the text as a whole list.

    >>> stem("Which one?\\nAnswer Choices: (A) this (B) that", {"A": "this", "B": "that"})
    'Which one?'
    """
    begins = list(_OPTIONS_BEGIN.finditer(question))
    for begin in begins:
        if begin[0].strip().lower() == "answer choices:":
            return question[: begin.start()]
    for begin in reversed(begins):
        rest = question[begin.start() :].strip()
        if len(_OPTION.findall(rest)) > (26 if options is None else len(options)):
            break
        found = [*(parse_options(rest) or {}).values()]
        wanted = [text for text in found if "\n" not in text] if options is None else [*options.values()]
        if found and [*map(normalise, found)] == [*map(normalise, wanted)]:
            return question[: begin.start()]
    return question


def readings(question: str) -> set[str]:
    """A question, and what it is without any lines behind it that may be options: normalised, to be looked up.

    >>> sorted(readings("Which?\\nA. one is wrong\\nB. two is\\nA. both\\nB. neither"))[:2]
    ['which?', 'which? a. one is wrong b. two is']
    """
    # More are not a question, but take time.
    ends = [begin.start() for begin in _OPTIONS_BEGIN.finditer(question)][:20]
    return {normalise(question[:end]) for end in (*ends, len(question))}


def prompt_of(question: str, options: dict[str, str] | None, choice: bool) -> Messages:
    """The prompt of Figure 7: a question, its options by letter where they are not in the question, and a closing line."""
    lines = [question, *(f"{letter}. {text}" for letter, text in (options or {}).items())]
    lines.append(
        CLOSING_CHOICE if choice else CLOSING_OPEN
    )  # "\n" before the open one, too: the figure does not show it
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "\n".join(lines)}]


def to_prompt(row: dict[str, Any]) -> Messages:
    """The prompt of Figure 7 for a row of any dataset with a `question` and, for multiple choice, its options.

    Args:
        row: Options are in `opa`, `opb`, ... as in MedMCQA, or in `options`: a mapping from letters, a list, a text as for
            [`parse_options`], or nothing. Other columns, such as answers, are not looked at.

    Raises `ValueError` for a row without a question, or with options that cannot be told apart.
    """
    question, options = row.get("question"), row.get("options")
    if "opa" in row:
        options = {letter: row.get(f"op{letter.lower()}") for letter in "ABCDE"}
    if not isinstance(question, str) or not question.strip():
        raise ValueError(
            f"a medical row has no text in `question`, only the columns {sorted(row)}: {str(row)[:200]}. Build the prompts "
            "with `camopd data medical`, or give rows with `prompt`, `messages` or `question`."
        )
    if isinstance(options, dict):  # a column of Arrow holds None for the letters that another row has
        options = {letter: text for letter, text in options.items() if text is not None}
    found = parse_options(options if options is None or isinstance(options, str) else json.dumps(options))
    if found is None:
        raise ValueError(
            f"the options {options!r} of the medical question {question[:80]!r} cannot be told apart. They must be a "
            'mapping from letters, {"A": "...", "B": "..."}, a list of texts, or lines "A. ...".'
        )
    # MedXpertQA has its options behind the question, too.
    return prompt_of(stem(question.strip(), found) if found else question.strip(), found, bool(found))


def parse_options(text: str | None) -> dict[str, str] | None:
    """Options by letter, from JSON (a mapping or a list) or from lines that begin with letters; {} for none at all.

    None when there is a text, but no options are found in it: a question must not lose half of its options.

    >>> parse_options('{"A": "this", "B": "that"}') == parse_options("A. this\\nB. that")
    True
    """
    text = (text or "").strip()
    if text in ("", "{}", "[]"):
        return {}
    try:
        found = json.loads(text)
    except ValueError:
        places = list(_OPTION.finditer(text))
        if not places or text[: places[0].start()].strip().lower() not in ("", "answer choices:"):
            return None
        ends = [place.start() for place in places[1:]] + [len(text)]
        found = {place[1]: text[place.end() : end] for place, end in zip(places, ends, strict=True)}
        if len(found) != len(places):  # a letter twice
            return None
    if isinstance(found, list):
        found = {chr(ord("A") + place): option for place, option in enumerate(found)}
    if not isinstance(found, dict) or list(found) != [chr(ord("A") + place) for place in range(len(found))]:
        return None
    if len(found) < 2 or not all(isinstance(option, str) and option.strip() for option in found.values()):
        return None
    return {letter: option.strip() for letter, option in found.items()}


def _medmcqa(raw: dict[str, Any]) -> Messages | str:
    options = {letter: str(raw[f"op{letter.lower()}"] or "").strip() for letter in "ABCD"}
    if not all(options.values()):
        return "an option is empty"
    return prompt_of(raw["question"].strip(), options, True)


def _medreason(raw: dict[str, Any]) -> Messages | str:
    options = parse_options(raw["options"])
    if options is None:
        return "options that cannot be told apart"
    return prompt_of(raw["question"].strip(), options, bool(options))


def _medical_r1_distill(raw: dict[str, Any]) -> Messages | str:
    return prompt_of(raw["question"].strip(), None, False)


def _m23k(raw: dict[str, Any]) -> Messages | str:
    # Its options, if any, are in the question already.
    return prompt_of(raw["prompt"].strip(), None, bool(str(raw["answer_letter"] or "").strip()))


_PROMPTS: dict[str, Callable[[dict[str, Any]], Messages | str]] = {
    "medmcqa": _medmcqa, "medreason": _medreason, "medical_r1_distill": _medical_r1_distill, "m23k": _m23k,
}  # fmt: skip


def convert_row(raw: dict[str, Any], index: int, name: str, benchmark: dict[str, str]) -> tuple[str, Any] | str:
    """Text and prompt row of a raw row, or why it is dropped."""
    question = raw["prompt" if name == "m23k" else "question"]
    if not isinstance(question, str) or not question.strip():
        return "no question"
    if tests := {benchmark[reading] for reading in readings(question.strip()) if reading in benchmark}:
        return f"in the test split of {min(tests)}"
    messages = _PROMPTS[name](raw)
    if isinstance(messages, str):
        return messages
    if shorten(messages) is None:
        return "too long"
    identity = raw["id"] if name == "medmcqa" else index  # the other sources have none that is sure to be unique
    row = {"prompt": messages, "category": "medical", "source": SOURCES[name].dataset, "id": f"{name}-{identity}"}
    return user_text(messages), row
