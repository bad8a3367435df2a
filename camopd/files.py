"""Files of rows, read as they are: exactly the one that is named, and texts as they stand there. What is wrong with one is
said with the way out."""

from __future__ import annotations

import codecs
import csv
import glob
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import DataError


if TYPE_CHECKING:
    from datasets import Dataset

FILE_TYPES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")  # by their first bytes `datasets` unpacks them


def file_type(path: str | Path) -> str | None:
    """The loader of `datasets` for a file of this name, or None for a name that is of no such file."""
    name = Path(path).name.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return FILE_TYPES.get(Path(name).suffix)


def only(path: str | Path) -> str:
    """A path for `data_files`, which would take `[`, `]`, `*` and `?` in it for a pattern, and read other files."""
    return glob.escape(str(path))


def check_local(path: str) -> None:
    """Raise `DataError` for a path that `load_dataset` would read otherwise than it is written."""
    if os.path.isfile(path):
        raise DataError(f"it is a file, but of none of the types {', '.join(FILE_TYPES)}. Rename or convert it.")
    if os.path.isdir(path) and glob.has_magic(path):
        raise DataError(
            "the path of this folder has one of the characters []*?, which `datasets` takes for a pattern; it would read "
            "other files. Name the file in it, or rename the folder."
        )


def read_file(path: str, split: str = "train") -> Dataset:
    """The rows of a JSONL, JSON, Parquet or CSV file; the cells of a CSV file are texts.

    Raises `DataError` for a file without rows or of another encoding, rows of a CSV file that do not fit its header, and
    a cache that cannot be written; and what `datasets` raises for a file that is broken otherwise.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    kind = file_type(path)
    assert kind is not None
    if not os.path.getsize(path):
        raise DataError("the file is empty (0 bytes). Check what has written it.")
    try:
        if kind in ("json", "csv"):
            _check_encoding(path)
        columns = {} if kind != "csv" else _columns_of_csv(path)
        return load_dataset(kind, data_files=only(path), split=split, **columns)
    except (StopIteration, OSError, ValueError, DatasetsError) as error:  # ValueError: also of UTF-8
        reason = why_unreadable(error, path)
        if reason is None:
            raise
        raise DataError(reason) from error


def why_unreadable(error: BaseException, path: str = "") -> str | None:
    """What is wrong and the way out, where an error of `datasets` is about the rows, the encoding or its cache."""
    import datasets
    from huggingface_hub import constants

    chain: list[BaseException] = []  # datasets wraps what pandas and pyarrow raise
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for link in chain:
        text = str(link)
        if isinstance(link, UnicodeDecodeError):
            return (
                f"its text is not UTF-8 (byte 0x{link.object[link.start]:02x}). Convert it, from Latin-1 for example: "
                f"iconv -f LATIN1 -t UTF-8 {path or 'FILE'} > NEW"
            )
        if "Invalid UTF8" in text:  # of Arrow, which names no file
            return "its text is not UTF-8. Convert it, from Latin-1 for example: iconv -f LATIN1 -t UTF-8 FILE > NEW"
        if isinstance(link, StopIteration) or "corresponds to no data" in text or "No columns to parse" in text:
            return "it has no rows. Check what has written it."
        if "Couldn't cast array" in text:
            return (
                f"its rows differ more than `datasets` can hold: {text[:300]}. It settles the columns by the first rows: "
                "move one that has all keys to the top."
            )
        for variable, folder in (
            ("HF_DATASETS_CACHE", datasets.config.HF_DATASETS_CACHE),
            ("HF_HUB_CACHE", constants.HF_HUB_CACHE),
        ):
            file = getattr(link, "filename", None)
            if isinstance(link, OSError) and isinstance(file, str) and _within(file, str(folder)):
                return (
                    f"the cache {str(folder)!r} cannot be written: {link.strerror}. Set {variable} (or HF_HOME) to a "
                    "folder that can."
                )
    return None


def _within(file: str, folder: str) -> bool:
    """Whether a file lies in a folder, or is one of those above it that could not be made."""
    return Path(file).is_relative_to(folder) or (len(Path(file).parts) > 1 and Path(folder).is_relative_to(file))


def _check_encoding(path: str) -> None:
    """Raise `UnicodeDecodeError` for a text that is not UTF-8, which Arrow may find as late as when the row is read."""
    import fsspec

    decoder = codecs.getincrementaldecoder("utf-8")()
    with fsspec.open(path, "rb", compression="infer") as file:
        while chunk := file.read(1 << 20):
            if not decoder.getstate()[0] and chunk[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise DataError(f"its text is UTF-16, not UTF-8. Convert it: iconv -f UTF-16 -t UTF-8 {path} > NEW")
            decoder.decode(chunk)
    decoder.decode(b"", final=True)


def _columns_of_csv(path: str) -> dict[str, Any]:
    """Settings with which a CSV file's cells stay as they are: 007 is no number, and NA no missing value.

    Raises `DataError` for two columns of one name and for a row with more or fewer cells than the header, of which pandas
    would take the first for an index or fill the last in.
    """
    import fsspec
    from datasets import Features, Value

    limit = csv.field_size_limit(sys.maxsize)  # prompts may be long
    try:
        with fsspec.open(path, "rt", compression="infer", encoding="utf-8-sig", newline="") as file:
            rows = (cells for cells in csv.reader(file) if cells)  # as pandas leaves empty lines out
            header = next(rows)
            twice = sorted({name for name in header if header.count(name) > 1})
            if twice:
                raise DataError(f"it has more than one column {', '.join(map(repr, twice))}. Rename or remove one.")
            for index, cells in enumerate(rows):
                if len(cells) != len(header):
                    raise DataError(
                        f"row {index} has {len(cells)} cells, and the header {len(header)}: {str(cells)[:200]}. A cell "
                        'with a comma, a quote or a line break in it needs quotes: "a, b".'
                    )
    finally:
        csv.field_size_limit(limit)
    names = [name or f"Unnamed: {place}" for place, name in enumerate(header)]  # as pandas calls them
    return {"features": Features(dict.fromkeys(names, Value("string"))), "keep_default_na": False}
