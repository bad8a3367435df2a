"""A uniform, seeded sample of the distinct texts of a stream, in memory that the sample bounds.

Each text is hashed with the seed, and the rows of the smallest hashes are kept. A duplicate has the hash of its text, so
it changes nothing: this equals removing duplicates from the whole stream and then sampling, in whatever order rows come,
and what is kept after any row is all there is to know of the rows before (so a build can go on from it).
"""

from __future__ import annotations

import hashlib
import heapq
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ..errors import DataError
from ..version import __version__
from ..words import counted
from .output import Build, Part
from .sources import Opened


LIMIT = 10_000  # prompts of each dataset in the paper
SAVE_EVERY = 200_000  # rows between two saves of what is kept; a source with fewer is read again in a minute
MAX_CHARACTERS = (
    14_336  # of a prompt: the 4096 tokens of the paper at 3.5 characters each, so that few are cut in training
)

Messages = list[dict[str, Any]]
Convert = Callable[[dict[str, Any], int], tuple[str, dict[str, Any]] | str]


def normalise(text: str) -> str:
    """A text without the differences that make no other question: Unicode form, case and white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def user_text(messages: Messages) -> str:
    """What the user says in a prompt, by which duplicates are found."""
    return "\n".join(message["content"] for message in messages if message["role"] == "user")


def priority(text: str, seed: int) -> int:
    """A number for a text (normalised) and a seed, as good as drawn at random and as good as its own for every text."""
    digest = hashlib.blake2b(normalise(text).encode(), digest_size=16, key=str(seed).encode())
    return int.from_bytes(digest.digest(), "big")


def largest_remainder(weights: dict[str, int], total: int) -> dict[str, int]:
    """Share `total` whole rows out in proportion to `weights`.

    >>> largest_remainder({"a": 5, "b": 3, "c": 1}, 4)
    {'a': 2, 'b': 1, 'c': 1}
    """
    whole = sum(weights.values())
    shares = {name: total * weight // whole for name, weight in weights.items()}
    by_remainder = sorted(weights, key=lambda name: -(total * weights[name] % whole))
    for name in by_remainder[: total - sum(shares.values())]:
        shares[name] += 1
    return shares


def shorten(messages: Messages, characters: int = MAX_CHARACTERS) -> Messages | None:
    """The prompt without its oldest turns, so that it has at most `characters`: the system message and the longest run of
    last turns that begins with the user. None when even the last such run is too long."""
    first = 1 if messages[0]["role"] == "system" else 0
    starts = [0] + [place for place in range(first + 1, len(messages)) if messages[place]["role"] == "user"]
    for start in starts:
        shorter = messages if start == 0 else messages[:first] + messages[start:]
        if (
            sum(len(str(message["content"])) + len(str(message.get("tool_calls", ""))) for message in shorter)
            <= characters
        ):
            return shorter
    return None


def shuffled(rows: Iterable[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Rows in the order of a hash of seed and id, so that any first N are a mixture of all sources."""
    return sorted(rows, key=lambda row: priority(row["id"], seed))


def progress() -> Progress:
    """A line per source on stderr: how many rows were read."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,} rows"), TimeElapsedColumn(),
        console=Console(stderr=True),
    )  # fmt: skip


def sample(
    build: Build,
    opened: Opened,
    name: str,
    size: int,
    seed: int,
    convert: Convert,
    taken: Iterable[int] = (),
    settings: Any = None,
) -> tuple[Part, list[tuple[int, dict[str, Any]]]]:
    """Draw up to `size` rows with distinct texts of a source, in the order of their priorities.

    Args:
        name: Of the part, in the card and among what an interrupted build keeps.
        convert: Gives text and prompt row of a raw row, or the reason why it is dropped.
        taken: Priorities of texts that other parts have.
        settings: What else the result hangs on. An interrupted build goes on from what it kept if all this is the same.
    """
    part, rows = Part(name), Smallest(size, set(taken))
    digest = hashlib.sha256(repr(sorted(rows.taken)).encode()).hexdigest()
    key = [__version__, opened.source.dataset, opened.path, opened.state, size, seed, digest, settings]
    saved = build.load(name)
    if saved is not None and saved["key"] != key:
        saved = None
    if saved is not None:
        part.read, part.dropped = saved["read"], Counter(saved["dropped"])
        for number, row in saved["rows"]:
            rows.add(int(number, 16), row)
        opened.stream.load_state_dict(saved["stream"])

    def save(done: bool) -> None:
        build.save(name, {
            "done": done, "key": key, "read": part.read, "dropped": part.dropped,
            "rows": [[f"{number:x}", row] for number, row in rows.found.items()], "stream": opened.stream.state_dict(),
        })  # fmt: skip

    if saved is None or not saved["done"]:
        with progress() as line:
            task = line.add_task(f"{name} ({opened.source.dataset})", total=opened.total, completed=part.read)
            for raw in opened.rows():
                found = convert(raw, part.read)
                part.read += 1
                line.update(task, completed=part.read)
                if isinstance(found, str):
                    part.dropped[found] += 1
                elif not rows.add(priority(found[0], seed), found[1]):
                    part.dropped["duplicate of a row that is kept"] += 1
                if part.read % SAVE_EVERY == 0:
                    save(False)
        if part.read >= SAVE_EVERY:
            save(True)
    return part, sorted(rows.found.items(), key=lambda item: item[0])


class Smallest:
    """The rows with the `size` smallest numbers of all that were added, but for those with a number in `taken`."""

    def __init__(self, size: int, taken: set[int]):
        self.size, self.taken = size, taken
        self.found: dict[int, dict[str, Any]] = {}
        self._largest: list[int] = []  # a heap of the negative numbers

    def add(self, number: int, row: dict[str, Any]) -> bool:
        """Take a row in if its number is small enough. False for a number that is there or taken."""
        if number in self.found or number in self.taken:
            return False
        if len(self.found) < self.size or number < -self._largest[0]:
            heapq.heappush(self._largest, -number)
            self.found[number] = row
            if len(self.found) > self.size:
                del self.found[-heapq.heappop(self._largest)]
        return True


def enough(part: Part, wanted: int, found: int) -> None:
    """Raise `DataError` unless a part has the rows that are wanted of it."""
    if found < wanted:
        dropped = "".join(f"\n    {reason}: {count:,}" for reason, count in sorted(part.dropped.items()))
        raise DataError(
            f"{part.name} has {counted(found, 'prompt')}, and {wanted:,} are wanted. Dropped of "
            f"{counted(part.read, 'row')}:{dropped or ' none'}\nGive more rows with --source, or a smaller --limit."
        )
