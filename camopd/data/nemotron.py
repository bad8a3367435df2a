"""General prompts: 10K of nvidia/Nemotron-Post-Training-Dataset-v1 in its own proportions (paper, appendix A.3)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..words import counted
from .output import Build, Part, building, write_card, write_jsonl
from .sampling import LIMIT, Messages, enough, largest_remainder, priority, sample, shorten, shuffled, user_text
from .sources import Opened, Source, open_source


DATASET = "nvidia/Nemotron-Post-Training-Dataset-v1"
ROWS = {"chat": 746_622, "code": 1_896_395, "math": 2_044_407, "stem": 20_662_167, "tool_calling": 310_051}
SPLITS = {
    # The files of tool_calling are called tool-*.
    split: Source("nemotron", DATASET, ("uuid", "messages", "metadata"), split, files=split.removesuffix("_calling"))
    for split in ROWS
}
# The datasets that code rows point at, by the name they give it (nvidia/OpenCodeReasoning says how to look them up).
QUESTIONS = {
    "code_contests": Source("code_contests", "deepmind/code_contests", ("description",)),
    "open-r1/codeforces": Source(
        "codeforces", "open-r1/codeforces", ("description", "input_format", "output_format", "examples", "note")
    ),
    "taco": Source("taco", "BAAI/TACO", ("question",)),
    "apps": Source("apps", "codeparrot/apps", ("question",)),
}
BY_HAND = ("taco", "apps")  # on the Hub these are loading scripts, which datasets does not run
SOURCES = ("nemotron", *(source.name for source in QUESTIONS.values()))
PLACEHOLDERS = ("", "-")  # in place of user texts that have to be looked up in the dataset they are from
CANDIDATES = 2  # code rows drawn for each one wanted, because some questions are not found


def build_general(
    out: str | Path, limit: int = LIMIT, seed: int = 0, sources: dict[str, str] | None = None, command: str = ""
) -> None:
    """Write `limit` general prompts to the folder `out`.

    `sources` names local copies; of `code_contests`, `codeforces`, `taco` and `apps`, `"none"` leaves the questions out.

    Raises `ValueError` for an `out` that is there or a path without files, `DataError` for data that does not fit.
    """
    sources = sources or {}
    if "nemotron" in sources and not Path(sources["nemotron"]).is_dir():
        raise ValueError(
            f"--source nemotron={sources['nemotron']!r} must be a folder with the files of the splits {list(ROWS)}, as "
            f"`hf download {DATASET} --repo-type dataset --local-dir DIR` makes it."
        )
    shares = {split: share for split, share in largest_remainder(ROWS, limit).items() if share}
    with building(out) as build:
        # All of them first: what cannot be had shows before hours of reading.
        opened = {split: open_source(SPLITS[split], sources.get("nemotron")) for split in shares}
        questions = _open_questions(sources) if "code" in shares else {}
        rows: dict[int, dict[str, Any]] = {}
        parts = []
        for split, share in shares.items():
            part, drawn = _draw(build, opened[split], share, seed, questions, sources, set(rows))
            parts.append(part)
            rows.update(drawn)
        ordered = shuffled(rows.values(), seed)
        # datasets infers the columns from the first 10 MB of a file: a message with tool calls has to be among them.
        with_calls = next((row for row in ordered if any("tool_calls" in message for message in row["prompt"])), None)
        ordered.sort(key=lambda row: row is not with_calls)
        write_jsonl(build.data / "prompts.jsonl", ordered)
        write_card(
            build.data / "README.md",
            "General prompts of Nemotron-Post-Training-Dataset-v1",
            command,
            [*opened.values(), *questions.values()],
            parts,
            {
                "prompts.jsonl": f"{counted(len(rows), 'prompt')}: `prompt` (messages), `category` (split), `source`, "
                "`id` (uuid)"
            },
            [
                f"Rows per category follow the sizes of the splits by largest remainder, seed {seed}.",
                "A prompt is what comes before the last assistant turn. Answers and the flag `reasoning` are not used.",
                "Duplicates have the same user text but for case, white space and Unicode form. They are removed before "
                "sampling, over all categories; those of rows that are not drawn are not counted.",
                'Code rows with the user text "-" get their question from the dataset their metadata names; rows whose '
                "question cannot be had are left out, and others of the category drawn in their place. Chat rows without a "
                "user text (held back for their licence) are left out in the same way.",
                "Tools of the metadata stand in the system message, one JSON schema per line.",
                "Long conversations lose their oldest turns; a prompt that is too long without them is dropped.",
            ],
        )


def _open_questions(sources: dict[str, str]) -> dict[str, Opened]:
    """The datasets of `QUESTIONS` that can be had, by the name that code rows give them."""
    paths = {name: sources.get(source.name, "none" if name in BY_HAND else None) for name, source in QUESTIONS.items()}
    return {name: open_source(QUESTIONS[name], path) for name, path in paths.items() if path != "none"}


def _draw(
    build: Build, opened: Opened, share: int, seed: int, questions: dict[str, Opened], sources: dict[str, str],
    taken: set[int],
) -> tuple[Part, list[tuple[int, dict[str, Any]]]]:  # fmt: skip
    """The part of the card for a split, and `share` rows of it with their priorities."""
    split = opened.source.split

    def convert(raw: dict[str, Any], _: int) -> tuple[str, Any] | str:
        return convert_row(raw, split, questions)

    size = share * CANDIDATES if split == "code" else share
    part, drawn = sample(build, opened, split, size, seed, convert, taken, sorted(questions))
    if split == "code":
        drawn = look_up(drawn, share, seed, questions, sources, part, taken)
    enough(part, share, len(drawn))
    part.changed["oldest turns left out, for length"] = sum(row.pop("shortened", False) for _, row in drawn)
    part.kept = len(drawn)
    return part, drawn


def convert_row(raw: dict[str, Any], split: str, questions: dict[str, Opened]) -> tuple[str, Any] | str:
    """Text and prompt row of a raw row, or why it is dropped."""
    turns = raw["messages"] or []
    last = max((place for place, turn in enumerate(turns) if turn["role"] == "assistant"), default=None)
    if last is None:
        return "no assistant turn"
    messages = [_message(turn) for turn in turns[:last]]
    messages = [message for message in messages if message["role"] != "system" or message["content"].strip()]
    users = [message for message in messages if message["role"] == "user"]
    if not users:
        return "no user turn before the last assistant turn"
    row = {"prompt": messages, "category": split, "source": DATASET, "id": str(raw["uuid"])}
    if any(user["content"].strip() in PLACEHOLDERS for user in users):
        if split != "code" or len(users) > 1:
            return "user text left out of the dataset"
        reference = _reference(raw["metadata"])
        if reference is None:
            return 'user text "-", and no question named in the metadata'
        if reference[0] not in questions:
            return f'user text "-", and no copy of {reference[0]} to look it up'
        return json.dumps(reference), {**row, "reference": reference}
    if split == "tool_calling":
        try:
            tools = json.loads(raw["metadata"])["tools"]
        except (TypeError, ValueError, KeyError):
            tools = None
        if not isinstance(tools, list) or not tools:
            return "no tools in the metadata"
        messages = _with_tools(messages, tools)
    shorter = shorten(messages)
    if shorter is None:
        return "too long"
    return user_text(messages), {**row, "prompt": shorter, "shortened": len(shorter) < len(messages)}


def _message(turn: dict[str, Any]) -> dict[str, Any]:
    """A message with what chat templates read. Arguments of calls stay JSON texts, as the dataset has them."""
    message: dict[str, Any] = {"role": turn["role"], "content": turn["content"] or ""}
    if turn.get("tool_calls"):
        message["tool_calls"] = turn["tool_calls"]
    return message


def _with_tools(messages: Messages, tools: list[Any]) -> Messages:
    schemas = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    system = f"You can call these tools:\n{schemas}"
    if messages[0]["role"] == "system":
        return [{"role": "system", "content": f"{messages[0]['content']}\n\n{system}"}, *messages[1:]]
    return [{"role": "system", "content": system}, *messages]


def _reference(metadata: Any) -> tuple[str, str, int] | None:
    """Dataset, split and row that the metadata (a JSON text) names, or None."""
    try:
        found = json.loads(metadata)
        return str(found["dataset"]), str(found["split"]), int(found["index"])
    except (TypeError, ValueError, KeyError):
        return None


def look_up(
    drawn: list[tuple[int, dict[str, Any]]], share: int, seed: int, questions: dict[str, Opened],
    sources: dict[str, str], part: Part, taken: set[int],
) -> list[tuple[int, dict[str, Any]]]:  # fmt: skip
    """The first `share` drawn rows that have, or get, a user text of their own."""
    wanted: dict[tuple[str, str], set[int]] = {}
    for _, row in drawn:
        if "reference" in row:
            name, split, index = row["reference"]
            wanted.setdefault((name, split), set()).add(index)
    found: dict[tuple[str, str, int], str] = {}
    for (name, split), indices in sorted(wanted.items()):
        source = questions[name].source
        if split != source.split:
            source = Source(source.name, source.dataset, source.columns, split)
        opened = open_source(source, sources.get(source.name))
        for index, raw in enumerate(opened.rows()):
            if index in indices:
                found[name, split, index] = _question(raw)
            if index == max(indices):
                break
    rows: dict[int, dict[str, Any]] = {}
    for number, row in drawn:
        if len(rows) == share:
            break
        reference = row.pop("reference", None)
        if reference is not None:
            question = found.get(tuple(reference), "")
            for message in row["prompt"]:
                if message["role"] == "user":
                    message["content"] = question
            number = priority(user_text(row["prompt"]), seed)
            if not question.strip():
                part.dropped['user text "-", and no such question in the dataset it names'] += 1
                continue
            if shorten(row["prompt"]) is None:
                part.dropped["too long"] += 1
                continue
        if number in rows or number in taken:
            part.dropped["duplicate of a row that is kept"] += 1
            continue
        if reference is not None:
            part.changed['user text "-" looked up'] += 1
        rows[number] = row
    return list(rows.items())


def _question(raw: dict[str, Any]) -> str:
    """The problem statement in a row of one of the datasets of `QUESTIONS`, or an empty text."""
    if "question" in raw:
        return str(raw["question"] or "")
    text = str(raw["description"] or "")
    if not text:
        return ""
    sections = [("Input", raw.get("input_format")), ("Output", raw.get("output_format"))]
    for example in raw.get("examples") or []:
        sections += [("Example input", example.get("input")), ("Example output", example.get("output"))]
    sections.append(("Note", raw.get("note")))
    return text + "".join(f"\n\n{title}\n\n{body}" for title, body in sections if body)
