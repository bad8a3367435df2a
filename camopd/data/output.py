"""Writing a dataset so that it appears whole or not at all, with its data card, and sending it to the Hub."""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import yaml

from .. import atomic
from ..errors import DataError
from ..hub import explain_hub_error, hub_errors
from ..version import __version__
from .sources import Opened


@dataclass
class Build:
    """A build under way: `data` becomes the output folder, `saved` holds what an interrupted build can go on from."""

    data: Path
    saved: Path

    def load(self, part: str) -> dict[str, Any] | None:
        """What was saved of a part, or None."""
        path = self.saved / f"{part}.json"
        return orjson.loads(path.read_bytes()) if path.is_file() else None

    def save(self, part: str, state: dict[str, Any]) -> None:
        """Save the state of a part in place of the one before, in one step."""
        atomic.write(self.saved / f"{part}.json", orjson.dumps(state))


@contextmanager
def building(out: str | Path) -> Iterator[Build]:
    """A build into `out`, which is there only when the block has ended well.

    Until then everything is in `OUT.partial`. When the block fails, its half-written data is removed; what was saved
    stays for the next build. Raises `ValueError` when `out` is there already.
    """
    out = Path(out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(
            f"{str(out)!r} is there already, and no build overwrites it. Remove it, or give another --out."
        )
    partial = out.with_name(f"{out.name}.partial")
    build = Build(partial / "data", partial / "saved")
    try:
        shutil.rmtree(build.data, ignore_errors=True)  # of a build that was killed
        build.data.mkdir(parents=True)
        build.saved.mkdir(exist_ok=True)
        yield build
        os.replace(build.data, out)  # an empty folder gives way
        shutil.rmtree(build.saved)
    finally:
        shutil.rmtree(build.data, ignore_errors=True)
        if build.saved.is_dir() and any(build.saved.iterdir()):
            print(f"What was read is kept in {str(partial)!r}: the same command goes on from there.", file=sys.stderr)
        else:
            shutil.rmtree(partial, ignore_errors=True)


@dataclass
class Part:
    """What the data card says of one part of a dataset: rows read, rows kept, and why others were dropped."""

    name: str
    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)  # kept, but not as they were


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows as JSON lines and return how many. Raises `DataError` for an id that comes twice."""
    seen: set[str] = set()
    with path.open("wb") as file:
        for row in rows:
            if row["id"] in seen:
                raise DataError(
                    f"the id {row['id']!r} comes twice, the second time in row {len(seen)} of {path.name}. Every row needs "
                    "an id of its own: fix or remove one of the two in a local copy, and pass it with --source."
                )
            seen.add(row["id"])
            file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
    return len(seen)


def write_card(
    path: Path,
    title: str,
    command: str,
    sources: list[Opened],
    parts: list[Part],
    files: dict[str, str],
    notes: list[str],
) -> None:
    """Write the data card: the Hub shows it, and finds the files by its header.

    Args:
        files: Name of each file, and what it holds; the first one is what `load_dataset` loads unless told otherwise.
        notes: How rows were chosen and what was decided, one sentence or two each.
    """
    from datasets import __version__ as datasets_version

    configs = [
        {"config_name": name.removesuffix(".jsonl"), "data_files": name, **({"default": True} if not place else {})}
        for place, name in enumerate(files)
    ]
    head = {"pretty_name": title, "tags": ["camopd", "on-policy-distillation"], "configs": configs}
    lines = ["---", yaml.safe_dump(head, sort_keys=False).strip(), "---", "", f"# {title}", ""]
    lines += [
        "Made by",
        "",
        "```bash",
        command,
        "```",
        "",
        f"with camopd {__version__} and datasets {datasets_version}.",
        "",
    ]
    lines += ["| file | holds |", "|---|---|", *(f"| `{name}` | {holds} |" for name, holds in files.items()), ""]
    lines += ["## Sources", "", "| dataset | split | read from | licence |", "|---|---|---|---|"]
    lines += [
        f"| [{opened.source.dataset}](https://huggingface.co/datasets/{opened.source.dataset}) | "
        f"{', '.join(filter(None, (opened.source.config, opened.source.split)))} | {opened.origin}"
        f"{f', commit `{opened.state}`' if opened.path is None else ''} | {opened.licence or 'see the dataset'} |"
        for opened in sources
    ]
    lines += [
        "",
        "## Kept and dropped",
        "",
        "| part | rows read | kept | dropped | changed |",
        "|---|---|---|---|---|",
    ]
    for part in parts:
        counts = [
            "<br>".join(f"{reason}: {count:,}" for reason, count in sorted(counter.items()) if count) or "-"
            for counter in (part.dropped, part.changed)
        ]
        lines.append(f"| {part.name} | {part.read:,} | {part.kept:,} | {counts[0]} | {counts[1]} |")
    lines += ["", "## How", "", *(f"- {note}" for note in notes), ""]
    path.write_text("\n".join(lines), encoding="utf-8")


def check_push(repo: str) -> None:
    """Raise `DataError` before a build when its result could not be sent to the Hub."""
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo)
    if constants.HF_HUB_OFFLINE or get_token() is None:
        why, way = (
            ("HF_HUB_OFFLINE is set", "Unset it")
            if constants.HF_HUB_OFFLINE
            else ("this machine has no token", "Set HF_TOKEN or run `hf auth login`")
        )
        raise DataError(
            f"the dataset cannot be sent to {repo!r}: {why}. {way}, or build without --push-to-hub and send it later: "
            f"hf upload {repo} DIR --repo-type dataset"
        )
    try:
        HfApi().whoami()
    except hub_errors() as error:
        raise DataError(f"the dataset cannot be sent to {repo!r}: {explain_hub_error(error, repo)}.") from error


def push(folder: Path, repo: str) -> str:
    """Send a built dataset to a private dataset repository of the Hub, made if need be. Returns its URL.

    Raises `DataError`; the folder stays as it is.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        url = api.create_repo(repo, repo_type="dataset", private=True, exist_ok=True)
        api.upload_folder(repo_id=repo, repo_type="dataset", folder_path=folder, commit_message="Add the dataset")
    except hub_errors() as error:
        raise DataError(
            f"{str(folder)!r} is built, but was not sent to {repo!r}: {explain_hub_error(error, repo)}. "
            f"Then send it: hf upload {repo} {folder} --repo-type dataset"
        ) from error
    return str(url)
