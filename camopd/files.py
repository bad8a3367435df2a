"""Prompts from files and datasets of the Hub: exactly the one that is named, and texts as they stand there. What is wrong
with one is said with the way out."""

from __future__ import annotations

import csv
import glob
import logging
import math
import os
import sys
from collections.abc import Callable, Container, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import DataError
from .teachers.address import names_missing_folder
from .unreadable import check_encoding, why_unreadable


if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

ToPrompt = Callable[[dict[str, Any]], Any]  # the prompt of a row

FILE_TYPES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")  # by their first bytes `datasets` unpacks them


def load_all(sources: Any, to_prompt: Mapping[str, ToPrompt] | None = None) -> dict[str, Dataset]:
    """The prompts of all branches, each as [`load_prompts`] has them; `to_prompt` may name a function for a branch."""
    return {branch: load_prompts(source, branch, (to_prompt or {}).get(branch)) for branch, source in sources.items()}


def load_prompts(source: Any, branch: str, to_prompt: ToPrompt | None = None) -> Dataset:
    """The prompts of one branch, with a column `prompt`, and `category` where there is one.

    Args:
        source: As in [`~camopd.run.PromptArguments`]; of several files or folders the rows come one after the other. Of a
            conversation in another column than `prompt`, an assistant turn at its end is left out.
        to_prompt: Makes the prompt of a row, where the dataset has no column of prompts.

    Raises `ValueError` when there is no such dataset, or it has no column of prompts.
    """
    spec = specification(source, branch)
    parts: list[Dataset] = []
    for path in spec["path"]:
        left = None if spec.get("limit") is None else spec["limit"] - sum(len(part) for part in parts)
        if left is None or left > 0:
            load = _load_folder if _is_folder_of_files(path) else _load
            parts.append(load({**spec, "path": path, "limit": left}, branch, to_prompt))
    if len(parts) == 1:
        return parts[0]
    dataset = _together(parts)
    dataset.info.homepage = ", ".join(spec["path"])
    return dataset


def _together(parts: list[Dataset]) -> Dataset:
    """The rows of all, one after the other. A column that not all have of one type is JSON in each."""
    import datasets

    types: dict[str, list[Any]] = {}
    for part in parts:
        for column, feature in part.features.items():
            types.setdefault(column, []).append(feature)
    differ = [column for column, found in types.items() if any(feature != found[0] for feature in found)]
    for place, part in enumerate(parts):
        own = {column: datasets.Json() for column in differ if column in part.features}
        if any(part.features[column] != kind for column, kind in own.items()):
            features = datasets.Features({**part.features, **own})
            as_read = partial(_cells, list(own))
            parts[place] = part.map(as_read, features=features, load_from_cache_file=False)
    return datasets.concatenate_datasets(parts)


def _cells(columns: list[str], row: Mapping[str, Any]) -> dict[str, Any]:
    return {column: row[column] for column in columns}


def _load_folder(spec: dict[str, Any], branch: str, to_prompt: ToPrompt | None) -> Dataset:
    """The prompts of a folder of files, each read as a file that is named."""
    path = spec["path"]
    try:
        files = _files_of(path)
        read = {name: [_read({**spec, "path": file, "split": "train"}, branch) for file in found]
                for name, found in files.items()}  # fmt: skip
        bounds = _bounds({name: sum(map(len, found)) for name, found in read.items()}, spec)
    except DataError as error:
        raise ValueError(f"{_named(spec, branch)}, cannot be loaded: {error}") from error
    left, parts = math.inf if spec.get("limit") is None else spec["limit"], []
    for name, first, last in bounds:  # of a split, and so of some of its files
        for file, rows in zip(files[name], read[name], strict=True):
            begin = max(0, first)
            within = range(len(rows))[begin : max(0, int(min(last, begin + left)))]
            if within:
                parts.append(_converted(rows.select(within), {**spec, "path": file, "limit": None}, branch, to_prompt))
                left -= len(within)
            first, last = first - len(rows), last - len(rows)
    dataset = _together(parts or [_converted(rows.select([]), {**spec, "limit": None}, branch, to_prompt)])
    dataset.info.homepage = path
    return dataset


def _load(spec: dict[str, Any], branch: str, to_prompt: ToPrompt | None) -> Dataset:
    return _converted(_read(spec, branch), spec, branch, to_prompt)


def _converted(dataset: Dataset, spec: dict[str, Any], branch: str, to_prompt: ToPrompt | None) -> Dataset:
    from .messages import COLUMNS

    path = spec["path"]
    column = _column_of_prompts(dataset, spec, branch, to_prompt is not None)
    if spec.get("limit") is not None:
        dataset = dataset.select(range(min(spec["limit"], len(dataset))))
    if file_type(path) is None:
        columns = [name for name in dataset.column_names if column is None or name in (column, *COLUMNS, "category")]
        _check_texts(dataset.select_columns(columns), spec, branch)
    if column != "prompt":
        dataset = with_prompts(dataset, column, to_prompt, f"{path!r}, prompts of branch {branch!r}")
    # A category has metrics of its own.
    kept = (*COLUMNS, "category", *_images_in(dataset))  # of which `prompts` says that they cannot be read
    dataset = dataset.select_columns([name for name in kept if name in dataset.column_names])
    # Where the model card finds the data card.
    dataset.info.homepage = path if Path(path).exists() else f"https://huggingface.co/datasets/{path}"
    return dataset


def specification(source: Any, branch: str) -> dict[str, Any]:
    """Where the prompts of a branch are, with `path` as a list and `split`. Imports nothing heavy.

    Raises `ValueError` for another form and for a path that leads nowhere.
    """
    spec: dict[str, Any] = dict(source) if isinstance(source, dict) else {"path": source}
    unknown = set(spec) - {"path", "name", "split", "column", "limit"}
    given = spec.get("path")
    paths: Any = [given] if isinstance(given, str) else given
    if unknown or not isinstance(paths, list) or not paths or not all(isinstance(path, str) for path in paths):
        raise ValueError(
            f"the prompts of branch {branch!r} are {source!r}. Give a file, a dataset of the Hub, a list of them, or a "
            "mapping with `path` and any of `name`, `split`, `column`, `limit`."
        )
    limit = spec.get("limit")
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise ValueError(
            f"limit of the prompts of branch {branch!r} must be a whole number of rows of at least 1, got {limit!r}."
        )
    paths = [os.path.expanduser(path) for path in paths]
    for path in paths:
        if (file_type(path) is not None and not Path(path).is_file()) or names_missing_folder(path):
            raise ValueError(
                f"the prompts of branch {branch!r} are named as {path!r}, but there is no such file. Fix the path, or "
                "build prompts with `camopd data` (docs/data.md). A path is taken as it is written: *, ? and [] stand for "
                "themselves."
            )
        if (
            spec.get("name") not in (None, "default")
            and os.path.exists(path)
            and not os.path.isfile(os.path.join(path, "README.md"))
        ):
            raise ValueError(
                f"the prompts of branch {branch!r}, {path!r}, are on disk, where there is no configuration with the name "
                f"{spec['name']!r}. Leave `name` out."
            )
    return {**spec, "path": paths, "split": spec.get("split", "train")}


def _named(spec: Mapping[str, Any], branch: str) -> str:
    return f"the prompts of branch {branch!r}, {spec['path']!r} (split {spec['split']!r})"


def _read(spec: Mapping[str, Any], branch: str) -> Dataset:
    """The rows of the file, the folder or the dataset of the Hub. Raises `ValueError` where they cannot be had."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetsError
    from pyarrow import ArrowException

    from .hub import explain_hub_error, hub_errors
    from .messages import COLUMNS

    path, is_file = spec["path"], file_type(spec["path"]) is not None
    try:
        if is_file:
            return read_file(path, spec["split"], {"messages", spec.get("column"), *COLUMNS, "category"})
        return _read_saved(spec) or load_dataset(path, spec.get("name"), split=spec["split"])
    except (*hub_errors(), ValueError, RuntimeError, DatasetsError, ArrowException) as error:
        known = str(error) if isinstance(error, DataError) else why_unreadable(error)
        if known is not None:
            raise ValueError(f"{_named(spec, branch)}, cannot be loaded: {known}") from error
        reason = error.__cause__ if isinstance(error, DatasetGenerationError) else error  # what is wrong with the row
        way = ""
        if not is_file and not Path(path).exists() and not isinstance(error, ValueError):  # not a split or a row
            reason = explain_hub_error(error, path)
            way = f" Where it can: hf download {path} --repo-type dataset --local-dir DIR; then {{path: DIR}}."
        raise ValueError(
            f"{_named(spec, branch)}, cannot be loaded: {reason}\nGive the path of a {', '.join(FILE_TYPES)} file or the "
            f"name of a dataset of the Hub that this machine can reach.{way}"
        ) from error


def _column_of_prompts(dataset: Dataset, spec: Mapping[str, Any], branch: str, may_lack: bool) -> str | None:
    """The column that is asked for, `prompt` or `messages`; `None` where there is none and none is needed."""
    path, known = spec["path"], dataset.column_names
    columns = [spec["column"]] if "column" in spec else ["prompt", "messages"]
    column = next((name for name in columns if name in known), None)
    if column is None and ("column" in spec or not may_lack):
        raise ValueError(no_column(path, branch, known, columns))
    if column == "prompt" and "column" not in spec and "messages" in known:
        logger.warning(
            "the prompts of branch %r, %s, have columns 'prompt' and 'messages': 'prompt' is taken. To take the other, "
            "write {path: %s, column: messages}.", branch, path, path,
        )  # fmt: skip
    return column


def no_column(path: str, branch: str, known: list[str], wanted: list[str]) -> str:
    """What to say of prompts without any of the wanted columns."""
    others = [name for name in known if name != "text"]
    texts = " A column 'text' for fine-tuning has prompt and answer in one: the answer would be in the prompt." * (
        "text" in known
    )
    way = (
        f"Name the one with the prompts: {{path: {path}, column: ...}}." if others else "Give a file that has prompts."
    )
    return (
        f"the prompts of branch {branch!r}, {path!r}, have the columns {known}, none of them "
        f"{' or '.join(map(repr, wanted))}.{texts} {way}"
    )


def _check_texts(dataset: Dataset, spec: Mapping[str, Any], branch: str) -> None:
    """Raise `ValueError` for a text that is not UTF-8, which would be found where its row is read, without a name."""
    from pyarrow import ArrowException

    try:
        dataset.data.validate(full=True)
    except ArrowException as error:
        raise ValueError(f"{_named(spec, branch)}, cannot be loaded: {why_unreadable(error) or error}") from error


def with_prompts(dataset: Dataset, column: str | None, to_prompt: ToPrompt | None, where: str) -> Dataset:
    """The dataset with a column `prompt`: what stands before the answer in another one, or what `to_prompt` makes."""
    import datasets

    from .messages import before_answer

    def convert(row: dict[str, Any], index: int) -> dict[str, Any]:
        try:
            return {"prompt": before_answer(row[column]) if column else to_prompt(row)}  # type: ignore[misc]
        except ValueError as error:
            raise ValueError(f"row {index} of {where}: {error}") from None

    # As JSON, messages may differ in their keys. Not from the cache, which does not see what this function calls.
    features = datasets.Features({**dataset.features, "prompt": datasets.Json()})
    return dataset.map(convert, with_indices=True, features=features, load_from_cache_file=False)


def json_lines(text: str) -> list[str]:
    """The lines of a JSON Lines text, without their ends. Only a line feed ends one: `str.splitlines()` would also split at
    U+2028, U+2029 and U+0085, which JSON has in its strings where it is not written in ASCII."""
    lines = text.split("\n")
    return lines if lines[-1] else lines[:-1]


def file_type(path: str | Path) -> str | None:
    """The loader of `datasets` for a file of this name, or None for a name that is of no such file."""
    name = Path(path).name.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return FILE_TYPES.get(Path(name).suffix)


def only(path: str | Path) -> str:
    """A path for `data_files`, which would take `[`, `]`, `*` and `?` in it for a pattern, and read other files."""
    return glob.escape(str(path))


def _images_in(dataset: Dataset) -> list[str]:
    """The columns of images that are not empty."""
    columns = [name for name in ("image", "images") if name in dataset.column_names]
    return [name for name in columns if any(cell.as_py() for cell in dataset.data[name])]  # until the first one


def _read_saved(spec: Mapping[str, Any]) -> Dataset | None:
    """The rows of a folder of `save_to_disk`; `None` for what is none."""
    from datasets import Dataset, concatenate_datasets, load_from_disk

    path = spec["path"]
    if os.path.isfile(path):
        raise DataError(f"it is a file, but of none of the types {', '.join(FILE_TYPES)}. Rename or convert it.")
    if not any(os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json")):
        if os.path.isdir(path) and glob.has_magic(path):
            raise DataError(
                "the path of this folder has one of the characters []*?, with which only a folder without a README.md can "
                "be read. Name the files in it, or rename the folder."
            )
        return None
    saved = load_from_disk(path)
    # A single one is "train", as where no split is said, and what it was when it was saved.
    splits = {"train": saved, str(saved.split or "train"): saved} if isinstance(saved, Dataset) else saved
    if isinstance(saved, Dataset) and spec["split"] == "all":
        return saved
    bounds = _bounds({name: len(rows) for name, rows in splits.items()}, spec)
    return concatenate_datasets([splits[name].select(range(first, last)) for name, first, last in bounds])


def _bounds(lengths: Mapping[str, int], spec: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """Splits with the first row and the one behind the last, of what `split` asks for: one, a part of one, or several, as
    in "train[:40]", "train+test" and "all". Raises `DataError` for one that is not there."""
    from datasets import ReadInstruction

    split = spec["split"]
    if split in lengths or split == "all":
        return [(name, 0, length) for name, length in lengths.items() if split in (name, "all")]
    try:
        parts = ReadInstruction.from_spec(split).to_absolute(lengths)
    except (AssertionError, TypeError, ValueError) as error:
        raise DataError(
            f"it has the splits {sorted(map(str, lengths))}. Name one, or a part of one: {{path: {spec['path']}, "
            "split: 'train[:9]'}."
        ) from error
    slices = ((part.splitname, range(lengths[part.splitname])[part.from_ : part.to]) for part in parts)
    return [(name, rows.start, rows.stop) for name, rows in slices]


def _is_folder_of_files(path: str) -> bool:
    """Whether a path is a folder that is no saved dataset and none with a README.md, which may say how it is read."""
    saved = ("state.json", "dataset_dict.json", "README.md")
    return os.path.isdir(path) and not any(os.path.isfile(os.path.join(path, name)) for name in saved)


def _files_of(path: str) -> dict[str, list[str]]:
    """The files of prompts in a folder by split, as `datasets` sorts them by their names.

    Raises `DataError` where there are none, or some that it leaves out.
    """
    from datasets.data_files import get_data_patterns, resolve_pattern

    base = only(os.path.abspath(path))
    files: dict[str, list[str]] = {}
    with suppress(FileNotFoundError):  # there are none
        for split, patterns in get_data_patterns(base).items():
            for pattern in patterns:
                with suppress(FileNotFoundError):  # another pattern of the split has some
                    found = resolve_pattern(pattern, base)
                    files[split] = list(dict.fromkeys([*files.get(split, ()), *filter(file_type, found)]))
    sorted_in = {file for found in files.values() for file in found}
    every = {file for file in resolve_pattern("**", base) if file_type(file)} if os.listdir(path) else set()
    if not every:
        raise DataError(f"the folder has no file of the types {', '.join(FILE_TYPES)}.")
    others = sorted(os.path.relpath(file, path) for file in every - sorted_in)
    # Where none of them is a .json, one beside them may say something of them.
    lone = any(".json" in Path(file).suffixes for file in sorted_in)
    left = [name for name in others if lone or ".json" not in Path(name).suffixes]
    if others and not left:
        logger.warning("of the folder %s, %s is not read: it is in no split of its files.", path, ", ".join(others))
    if left:
        splits = ", ".join(f"{split}: {os.path.relpath(found[0], path)}" for split, found in files.items() if found)
        raise DataError(
            f"{len(left)} of its files belong to no split, {left[0]!r} for example: by the words train, test, dev and the "
            f"like in names `datasets` has found the splits {splits}, and leaves the other files out. Rename the files, or "
            "name a list of them."
        )
    return {split: found for split, found in files.items() if found}


def read_file(path: str, split: str = "train", texts: Container[str | None] | None = None) -> Dataset:
    """The rows of a JSONL, JSON, Parquet or CSV file. The cells of a CSV file are texts, and texts of a JSON file that look
    like dates stay texts where `texts` has their column, or is `None`.

    Raises `DataError` for a file without rows or of another encoding, rows of a CSV file that do not fit its header, and
    a cache that cannot be written; and what `datasets` raises for a file that is broken otherwise.
    """
    from datasets import Features, Json, load_dataset
    from datasets.exceptions import DatasetsError

    kind = file_type(path)
    assert kind is not None
    if not os.path.getsize(path):
        raise DataError("the file is empty (0 bytes). Check what has written it.")
    try:
        if kind in ("json", "csv"):
            check_encoding(path)
        columns = {} if kind != "csv" else _columns_of_csv(path)
        found = load_dataset(kind, data_files=only(path), split=split, **columns)
        dated = [name for name, feature in found.features.items()
                 if kind == "json" and (texts is None or name in texts) and _has_dates(feature)]  # fmt: skip
        if dated:  # JSON has texts, which Arrow has taken for dates
            columns = {"features": Features({**found.features, **dict.fromkeys(dated, Json())})}
            found = load_dataset(kind, data_files=only(path), split=split, **columns)
        return found
    except (StopIteration, OSError, ValueError, DatasetsError) as error:  # ValueError: also of UTF-8
        reason = why_unreadable(error, path)
        if reason is None:
            raise
        raise DataError(reason) from error


def _has_dates(feature: Any) -> bool:
    """Whether a feature of `datasets` is a date or a time, or has one somewhere in it."""
    if isinstance(feature, dict):
        return any(map(_has_dates, feature.values()))
    if isinstance(feature, list) or hasattr(feature, "feature"):
        return _has_dates(feature[0] if isinstance(feature, list) else feature.feature)
    return str(getattr(feature, "dtype", "")).startswith(("timestamp", "date", "time", "duration"))


def _columns_of_csv(path: str) -> dict[str, Any]:
    """Settings with which a CSV file's cells stay as they are: 007 is not a number, and NA not a missing value.

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
