"""Whether a checkpoint is whole: a list of its files with sizes and hashes, written last.

A checkpoint is made in a folder beside, `_saving` in `output_dir`, where every file is flushed to disk, then its manifest,
and only then is it renamed to `checkpoint-<step>`. Whatever ends the process before that leaves no such folder; what is cut
short or changed afterwards is found by size and hash.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from . import atomic


SAVING = "_saving"  # in output_dir; transformers sends nothing to the Hub that begins so
MANIFEST = "manifest.json"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")  # a folder's name, and its step
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")  # of a whole model
_OF_MODEL = re.compile(
    r"(adapter_)?config\.json|(adapter_|pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
)
READERS = 4  # files hashed at once by a process; hashing releases the GIL


def files_in(folder: Path) -> list[str]:
    """Names, relative to the folder, of all files of a checkpoint but its manifest, in order."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in found if path != folder / MANIFEST)


def entries(folder: Path, names: Iterable[str], flush: bool = False) -> dict[str, dict[str, Any]]:
    """Size in bytes and SHA-256 of some files of a folder, by name. `flush` sees to it that they are on the disk first."""

    def entry(name: str) -> dict[str, Any]:
        with open(folder / name, "rb") as file:
            if flush:
                os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return {"size": os.fstat(file.fileno()).st_size, "sha256": digest}

    names = list(names)
    with ThreadPoolExecutor(READERS) as pool:
        return dict(zip(names, pool.map(entry, names), strict=True))


def write(folder: Path, found: dict[str, dict[str, Any]], **facts: Any) -> None:
    """Write the manifest of a folder whose files are as `entries` has `found` them; `facts` stand beside them."""
    for inner in {folder, *((folder / name).parent for name in found)}:
        atomic.flush(inner)
    atomic.write(folder / MANIFEST, json.dumps({**facts, "files": found}, indent=2, sort_keys=True))


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a folder. Raises `ValueError` with what is wrong with it."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"it has no {MANIFEST}, which is written last") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"its {MANIFEST} cannot be read ({error})") from None
    if not isinstance(found, dict) or not isinstance(found.get("files"), dict):
        raise ValueError(f"its {MANIFEST} does not list its files")
    return found


def fault(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """What keeps a folder from being a whole checkpoint, or `None`.

    All sizes are looked at, and the hashes of each `parts`-th file from `part` on: processes share that work.
    """
    try:
        listed = read(folder)["files"]
        for name, entry in listed.items():
            # By name: what the Hub's client has fetched are links to elsewhere.
            if Path(name).is_absolute() or ".." in Path(name).parts:
                return f"its {MANIFEST} lists {name!r}, which is not in it"
            size, wanted = (folder / name).stat().st_size, entry["size"]
            if size != wanted:
                return f"{name} has {size} of {wanted} bytes"
        mine = sorted(listed)[part::parts]
        for name, entry in entries(folder, mine).items():
            if entry["sha256"] != listed[name]["sha256"]:
                return f"{name} is not what was saved: its SHA-256 differs"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (ValueError, TypeError, KeyError, OSError) as error:
        return str(error) if isinstance(error, ValueError) else f"its {MANIFEST} is damaged ({error})"
    return None


def step_of(folder: Path) -> int:
    """Of a folder `checkpoint-<step>`, its step; -1 for any other."""
    found = CHECKPOINT.fullmatch(folder.name)
    return int(found[1]) if found and folder.is_dir() else -1


def saved_at(folder: Path) -> float:
    """When a checkpoint was saved, in seconds since 1970; without a manifest that says so, after all others."""
    try:
        at = read(folder).get("saved")
    except ValueError:
        return math.inf
    return float(at) if isinstance(at, int | float) else math.inf


def put_in_place(folder: Path, final: Path) -> None:
    """Rename a whole checkpoint to what it is called; one of that name that is there goes."""
    old = folder.with_name(f"replaced-{final.name}")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    try:
        folder.rename(final)
    except OSError:
        if old.exists():
            old.rename(final)
        raise
    atomic.flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def move_in(folder: Path, final: Path) -> None:
    """Put the files of a model where older ones may be, each in one step; last the configs, by which a model is known.

    Of older weights in other shards none stays: programs that find an index take what it lists.
    """
    for path in folder.rglob("*"):
        atomic.flush(path)
    names = {path.name for path in folder.iterdir()}
    weights, configs = (
        {name for name in names if WEIGHTS.fullmatch(name)},
        names & {"config.json", "adapter_config.json"},
    )
    for name in sorted(weights):
        (folder / name).replace(final / name)
    if weights:  # all of them are there
        for old in final.iterdir():
            if WEIGHTS.fullmatch(old.name) and old.name not in weights:
                old.unlink(missing_ok=True)  # another machine may have
    for name in [*sorted(names - weights - configs), *configs]:
        if (folder / name).is_dir():
            put_in_place(folder / name, final / name)
        else:
            (folder / name).replace(final / name)
    atomic.flush(final)
    leave(folder)


def models_in(folder: Path) -> list[Path]:
    """The files of a model, or an adapter, that lie in a folder itself: weights, and configs by which they are known."""
    return [path for path in folder.glob("*") if _OF_MODEL.fullmatch(path.name)]


def leave(folder: Path) -> None:
    """Remove a folder of `_saving`, and that if nothing else is in it."""
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.parent.rmdir()


def clean_up(output_dir: Path) -> None:
    """Finish what a process that was killed has left in `_saving`: put a whole checkpoint in place, remove the rest."""
    for prefix in ("", "replaced-"):  # the new one before the one that it was to replace
        for folder in (output_dir / SAVING).glob(f"{prefix}checkpoint-*"):
            final = output_dir / folder.name.removeprefix(prefix)
            if not final.exists() and fault(folder) is None:
                put_in_place(folder, final)
    shutil.rmtree(output_dir / SAVING, ignore_errors=True)


def rotate(newest: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints beside the `newest` one until `limit` are left; the best one stays.

    By time and not by step: a run that goes on from an earlier checkpoint counts its steps again. A checkpoint leaves its
    place in one rename, so that none is left in part.
    """
    if not limit or limit < 0:
        return
    folders = [path for path in newest.parent.glob("checkpoint-*") if step_of(path) >= 0 and path != newest]
    staying = [newest, *(path for path in folders if best and path == Path(best))]

    def age(path: Path) -> float:
        at = saved_at(path)
        return at if math.isfinite(at) else path.stat().st_mtime

    others = sorted((path for path in folders if path not in staying), key=age)
    for path in others[: max(0, len(others) + len(staying) - limit)]:
        gone = newest.parent / SAVING / f"removed-{path.name}"
        gone.parent.mkdir(exist_ok=True)
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
