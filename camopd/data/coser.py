"""Role-play: CoSER's conversations, the longest reserved as prompts and the rest for fine-tuning (paper, appendix A.2).

The source is one JSON list of 2.1 GB. It is read twice, one conversation at a time: first to find the longest ones, then
to write. Nothing is kept of an interrupted build: the two readings take minutes.
"""

from __future__ import annotations

import heapq
from codecs import BOM_UTF8
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ijson

from ..errors import DataError
from ..hub import hub_errors
from ..messages import SHAREGPT_ROLES
from ..words import counted
from .output import Part, building, write_card, write_jsonl
from .sampling import LIMIT, Messages, enough, progress, shorten, shuffled
from .sources import Opened, Source, explain, hub_facts, licence_of


FILE = "train/sft_conversations_sharegpt.json"
SOURCE = Source("coser", "Neph0s/CoSER", ("conversations",))
SOURCES = (SOURCE.name,)
CHUNK = 1 << 20  # bytes read at once
LONGEST = 64 << 20  # bytes; a conversation has some thousands


@dataclass
class Conversation:
    """A conversation of the file, as messages; `category` is who speaks as the assistant."""

    index: int
    category: str
    messages: Messages

    @property
    def turns(self) -> int:
        """Messages that are not the system's: the length by which conversations are ranked."""
        return sum(message["role"] != "system" for message in self.messages)

    def prompt(self) -> Messages | None:
        """The messages up to the last human turn before the last assistant turn, or None if there is no such turn.

        Many conversations end on a human turn, so "all but the last turn" would often ask for no assistant turn.
        """
        last = max(place for place, message in enumerate(self.messages) if message["role"] == "assistant")
        cut = max((place for place in range(last) if self.messages[place]["role"] == "user"), default=None)
        return None if cut is None else self.messages[: cut + 1]


def build_roleplay(
    out: str | Path, limit: int = LIMIT, seed: int = 0, sources: dict[str, str] | None = None, command: str = "",
    next_speaker: bool = False,
) -> None:  # fmt: skip
    """Write the `limit` longest conversations as prompts and the others for fine-tuning to the folder `out`.

    Args:
        seed: Of the order of the prompts; which they are hangs on their lengths alone.
        next_speaker: Also take conversations in which the assistant names who speaks next as prompts.

    Raises `ValueError` for an `out` or a path that will not do, `DataError` for data that does not fit.
    """
    with building(out) as build:
        path, opened = _find((sources or {}).get(SOURCE.name))
        prompts, tuning = Part("prompts"), Part("sft")
        longest = _longest(path, prompts, limit, next_speaker)
        enough(prompts, limit, len(longest))
        rows: list[dict[str, Any]] = []
        others = _others(path, tuning, set(longest), prompts, rows)
        tuning.kept = write_jsonl(build.data / "sft.jsonl", others)
        tuning.dropped["reserved as prompts"] = prompts.kept = len(rows)
        write_jsonl(build.data / "prompts.jsonl", shuffled(rows, seed))
        write_card(
            build.data / "README.md",
            "CoSER conversations: prompts and fine-tuning",
            command,
            [opened],
            [prompts, tuning],
            {
                "prompts.jsonl": f"{counted(prompts.kept, 'prompt')}: `prompt` (messages), `category`, `source`, `id`",
                "sft.jsonl": f"{counted(tuning.kept, 'conversation')}: `messages`, `category`, `source`, `id`",
            },
            [
                f"The prompts are of the longest conversations, with {min(longest.values())} to {max(longest.values())} "
                "messages but the system's; of equally long ones the first in the file. None of them is among those for "
                "fine-tuning. The number in an id is the place in the file.",
                "A prompt ends with the last human turn before the last assistant turn.",
                "`category` is who speaks as the assistant: a character, the environment, or a predictor of who speaks next"
                + ("." if next_speaker else ", which is for fine-tuning only."),
                "Long prompts lose their oldest turns, not the system message.",
                "CoSER has a conversation for each character of a scene, so scenes of prompts can come back, from another "
                "side, among the conversations for fine-tuning.",
            ],
        )


def _longest(path: Path, part: Part, limit: int, next_speaker: bool) -> dict[int, int]:
    """Index and turns of the `limit` longest conversations that can be prompts; ties go to the first in the file."""
    heap: list[tuple[int, int]] = []  # (turns, -index), the shortest first
    for conversation in _conversations(path, part, "lengths"):
        if (why := _no_prompt(conversation, next_speaker)) is not None:
            part.dropped[why] += 1
            continue
        heapq.heappush(heap, (conversation.turns, -conversation.index))
        if len(heap) > limit:
            heapq.heappop(heap)
    return {-index: turns for turns, index in heap}


def _others(
    path: Path, part: Part, reserved: set[int], prompts: Part, rows: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The rows for fine-tuning. Those of the reserved conversations are put into `rows`, as prompts."""
    for conversation in _conversations(path, part, "writing"):
        row = {"category": conversation.category, "source": SOURCE.dataset, "id": f"coser-{conversation.index}"}
        if conversation.index not in reserved:
            yield {"messages": conversation.messages, **row}
            continue
        whole = conversation.prompt()
        shorter = shorten(whole) if whole else None
        if whole is None or shorter is None:  # it was neither in the first reading
            raise DataError(f"{str(path)!r} has changed while it was read. Build again.")
        prompts.changed["oldest turns left out, for length"] += len(shorter) < len(whole)
        rows.append({"prompt": shorter, **row})


def _no_prompt(conversation: Conversation, next_speaker: bool) -> str | None:
    """Why a conversation cannot be a prompt, or None if it can."""
    if conversation.category == "next_speaker" and not next_speaker:
        return "assistant names the next speaker (stays in sft)"
    prompt = conversation.prompt()
    if prompt is None:
        return "no human turn before the last assistant turn (stays in sft)"
    return None if shorten(prompt) else "too long even without its oldest turns (stays in sft)"


def _conversations(path: Path, part: Part, doing: str) -> Iterator[Conversation]:
    """The conversations of the file that have roles and texts; the others are counted as dropped."""
    with progress() as line:
        task = line.add_task(f"coser, {doing}", total=None)
        for index, raw in enumerate(stream_list(path)):
            part.read += 1
            line.update(task, completed=part.read)
            if not isinstance(raw, dict) or "conversations" not in raw:
                raise DataError(
                    f"row {index} of {str(path)!r} has no column 'conversations', only "
                    f"{sorted(raw) if isinstance(raw, dict) else type(raw).__name__}. Give {FILE} of {SOURCE.dataset}."
                )
            found = _read(raw)
            if isinstance(found, str):
                part.dropped[found] += 1
            else:
                yield Conversation(index, _category(found), found)


def _read(raw: dict[str, Any]) -> Messages | str:
    """Messages of a ShareGPT conversation, with what stands in `system` beside it, or why it is dropped."""
    turns, system = raw["conversations"], raw.get("system")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return "no list of turns"
    if any(turn.get("from") not in SHAREGPT_ROLES for turn in turns):
        return f"a role that is none of {', '.join(SHAREGPT_ROLES)}"
    if any(not isinstance(turn.get("value"), str) or not turn["value"].strip() for turn in turns):
        return "a turn without text"
    if raw.get("tools"):
        return "tools, which the messages do not name"
    messages = [{"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]} for turn in turns]
    if system is not None and not isinstance(system, str):
        return "a key 'system' that is not a text"
    if system and system.strip() and messages[:1] != [{"role": "system", "content": system}]:
        messages = [{"role": "system", "content": system}, *messages]
    if any(message["role"] == "system" for message in messages[1:]):
        return "a system message that is not the first"
    if all(message["role"] != "assistant" for message in messages):
        return "no assistant turn"
    return messages


def _category(messages: Messages) -> str:
    """Who speaks as the assistant, by how CoSER's system prompts begin."""
    system = messages[0]["content"][:200].lower() if messages[0]["role"] == "system" else ""
    if "predict the next speaker" in system:
        return "next_speaker"
    return "environment" if "you are a world model" in system else "character"


def _find(local: str | None) -> tuple[Path, Opened]:
    """The file in a local copy, or fetched from the Hub into its cache (a broken download goes on)."""
    if local is not None:
        path = Path(local) / FILE if Path(local).is_dir() else Path(local)
        if not path.is_file():
            raise ValueError(
                f"--source coser={local!r}: there is no file {str(path)!r}. Give {FILE} of {SOURCE.dataset}."
            )
        return path, Opened(SOURCE, local, "", licence_of(Path(local)))
    from huggingface_hub import hf_hub_download

    try:
        revision, licence = hub_facts(SOURCE.dataset)
        path = Path(hf_hub_download(SOURCE.dataset, FILE, repo_type="dataset", revision=revision))
    except hub_errors() as error:
        raise DataError(explain(error, Opened(SOURCE, None, "", ""), FILE)) from error
    return path, Opened(SOURCE, None, revision, licence)


class _Bounded:
    """A file that raises `ijson.JSONError` where more than an element of `LONGEST` bytes is read without one coming out."""

    def __init__(self, file: BinaryIO):
        self._file, self.since = file, 0

    def read(self, size: int) -> bytes:
        if self.since > LONGEST:
            raise ijson.JSONError(f"an element of more than {LONGEST:,} bytes")
        self.since += size
        return self._file.read(size)


def stream_list(path: Path) -> Iterator[Any]:
    """The elements of a file that is one JSON list, one at a time: the memory is that of a chunk and an element.

    Raises `DataError` where the file is not such a list.
    """
    count = 0
    with path.open("rb") as file:
        begin = len(BOM_UTF8) if file.read(len(BOM_UTF8)) == BOM_UTF8 else 0
        file.seek(begin)
        head = b""
        while not head and (chunk := file.read(CHUNK)):
            head = chunk.lstrip()
        head += file.read(20)
        if not head.startswith(b"["):
            raise DataError(
                f"{str(path)!r} is not a JSON list: it begins with {head[:20].decode(errors='replace')!r}. Check the "
                "download."
            )
        file.seek(begin)
        bounded = _Bounded(file)
        try:
            for element in ijson.items(bounded, "item", use_float=True, buf_size=CHUNK):
                bounded.since = 0
                yield element
                count += 1
        except (
            ijson.JSONError
        ) as error:  # a text, or the repr of its bytes; the lines below the first point at the place
            why = str(error).removeprefix("b'").replace("\\n", "\n").partition("\n")[0].rstrip(".")
            raise DataError(
                f"{str(path)!r} is not a JSON list: {why}, after element {count:,}. Check the download."
            ) from None
