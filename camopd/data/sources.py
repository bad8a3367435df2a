"""Reading raw datasets as streams, from the Hub or from files, and what to say when that does not work."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ..errors import DataError
from ..files import file_type, only
from ..hub import explain_hub_error, hub_errors, without_tokens
from ..unreadable import why_unreadable


@dataclass(frozen=True)
class Source:
    """One split of a raw dataset, and the columns a builder needs of it.

    Args:
        name: What `--source NAME=PATH` calls it.
        dataset: Its id on the Hub.
        columns: The columns that are read; all others are dropped at once.
        files: The word in the names of this split's files (or of their folder) in a local copy; the split, if not given.
    """

    name: str
    dataset: str
    columns: tuple[str, ...]
    split: str = "train"
    config: str | None = None
    files: str | None = None


@dataclass(frozen=True)
class Opened:
    """A source that has been found and has its columns.

    Args:
        path: Of a local copy, or None for the Hub.
        state: The commit of the Hub, or a hash of names and sizes of the local files: other rows, another state.
        total: How many rows it has, where that is known.
    """

    source: Source
    path: str | None
    state: str
    licence: str
    stream: Any = None  # an IterableDataset, where rows are read
    total: int | None = None

    @property
    def origin(self) -> str:
        """Where it is read, for messages and the data card: a name, as a path says nothing on other machines."""
        return "the Hub" if self.path is None else f"the local copy {Path(self.path).name!r}"

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows from where the stream stands, with the columns of the source only.

        Raises `DataError` when the stream breaks, or a row lacks a column.
        """
        try:
            for place, row in enumerate(self.stream):
                if any(column not in row for column in self.source.columns):  # JSON lines may differ
                    raise DataError(_no_columns(self, row, f"row {place} after the start"))
                yield {column: row[column] for column in self.source.columns}
        except _failures() as error:
            raise DataError(explain(error, self)) from error


def open_source(source: Source, path: str | None) -> Opened:
    """Find a source in a local copy, or on the Hub where `path` is None, and look at its first row.

    Raises `ValueError` for a path without its files, `DataError` when it cannot be fetched, is empty or lacks a column.
    """
    from datasets import load_dataset

    opened = Opened(source, path, "", "")
    files = local_files(source, Path(path)) if path is not None else []
    try:
        if path is not None:
            sizes = json.dumps([(file.name, file.stat().st_size) for file in files])
            opened = replace(opened, state=hashlib.sha256(sizes.encode()).hexdigest(), licence=licence_of(Path(path)))
            stream = load_dataset(
                _type(files[0]), data_files=[only(file) for file in files], split="train", streaming=True
            )
        else:
            state, licence = hub_facts(source.dataset)
            stream = load_dataset(source.dataset, source.config, split=source.split, revision=state, streaming=True)
            splits = stream.info.splits or {}
            total = splits[source.split].num_examples if source.split in splits else None
            opened = replace(opened, state=state, licence=licence, total=total)
        first = next(iter(stream), None)
    except StopIteration:  # what datasets makes of an empty JSON file
        first = None
    except _failures() as error:
        raise DataError(explain(error, opened)) from error
    if first is None:
        raise DataError(
            f"{source.dataset!r}, read from {opened.origin}, has no rows in split {source.split!r}. Check the download, or "
            f"the path given with --source {source.name}=PATH."
        )
    if any(column not in first for column in source.columns):
        raise DataError(_no_columns(opened, first, "the first row"))
    if stream.column_names is not None:  # of what no builder reads, nothing is decoded
        stream = stream.select_columns(list(source.columns))
    return replace(opened, stream=stream)


def local_files(source: Source, path: Path) -> list[Path]:
    """The files of a source's split in a local copy, in the order of their names.

    Raises `ValueError` when there are none, or they are of several types.
    """
    if path.is_file():
        files = [path]
    else:
        found = {str(file.relative_to(path)): file for file in sorted(path.rglob("*")) if _type(file)}
        found = {name: file for name, file in found.items() if not any(part[0] == "." for part in Path(name).parts)}
        files = _named(found, source.files or source.split)
        if not files and len(found) == 1 and source.split == "train":  # it need not say so
            files = list(found.values())
        if source.config is not None:
            files = _named({str(file.relative_to(path)): file for file in files}, source.config) or files
        if not files:
            raise ValueError(
                f"--source {source.name}={str(path)!r} must be a file, or a folder with {_TYPES} files of "
                f"{source.dataset!r} that have {source.files or source.split!r} in their names, but there is "
                f"{f'only {list(found)[:8]}' if found else 'none'}."
            )
    if len({_type(file) for file in files}) > 1 or not _type(files[0]):
        raise ValueError(
            f"--source {source.name}={str(path)!r} has files of the types {sorted({file.suffix for file in files})}. Give "
            f"one type of {_TYPES}."
        )
    return files


def _type(file: Path) -> str | None:
    return "arrow" if file.suffix.lower() == ".arrow" else file_type(file)


_TYPES = ".parquet, .jsonl, .json, .csv, .arrow"


def _named(files: dict[str, Path], word: str) -> list[Path]:
    """The files with a word in their names or in those of their folders, as the Hub tells splits apart."""
    pattern = re.compile(rf"(?<![a-z0-9]){re.escape(word.lower())}(?![a-z0-9])")
    return [file for name, file in files.items() if pattern.search(name.lower())]


def hub_facts(dataset: str) -> tuple[str, str]:
    """Commit and licence of a dataset of the Hub: reading that commit, a resumed build sees the same rows."""
    from huggingface_hub import HfApi

    info = HfApi().dataset_info(dataset)
    licence = info.card_data.get("license") if info.card_data else None
    return str(info.sha), ", ".join(licence) if isinstance(licence, list) else str(licence or "")


def explain(error: BaseException, opened: Opened, file: str = "") -> str:
    """Why a source cannot be had, which setting it hangs on, and what to download by hand."""
    dataset, name = opened.source.dataset, opened.source.name
    if opened.path is not None:
        reason = (why_unreadable(error, opened.path) or without_tokens(error)).rstrip(".")
        return f"{dataset!r} cannot be read from {opened.origin}: {reason}. Check --source {name}=PATH."
    return (
        f"{dataset!r} cannot be fetched: {explain_hub_error(error, dataset)}. Or download it by hand where that works, and "
        f"pass it:\n"
        f"    hf download {dataset}{file and f' {file}'} --repo-type dataset --local-dir DIR\n"
        f"    camopd data ... --source {name}=DIR"
    )


def _failures() -> tuple[type[Exception], ...]:
    """What loading and reading raise when a dataset cannot be had."""
    import pyarrow
    from datasets.exceptions import DatasetsError

    return (*hub_errors(), DatasetsError, pyarrow.ArrowException, ValueError)  # ValueError: broken CSV, JSON, UTF-8


def _no_columns(opened: Opened, row: dict[str, Any], where: str) -> str:
    source = opened.source
    missing = [column for column in source.columns if column not in row]
    return (
        f"{source.dataset!r}, read from {opened.origin}, has no column {', '.join(map(repr, missing))} in {where}, only "
        f"{sorted(row)}. Give another copy with --source {source.name}=PATH."
    )


def licence_of(path: Path) -> str:
    """The licence in the card of a local copy, where `hf download` has put one."""
    card = (path if path.is_dir() else path.parent) / "README.md"
    if not card.is_file():
        return ""
    parts = card.read_text(encoding="utf-8", errors="replace").split("---", 2)
    try:
        head = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except yaml.YAMLError:
        return ""
    return str(head.get("license") or "") if isinstance(head, dict) else ""
