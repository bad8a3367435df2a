"""Files that are whole or as they were before, whenever the process or the machine stops."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def write(path: str | Path, content: str | bytes) -> None:
    """Write a file in one step: a reader finds the old one or the new one. Text is UTF-8, with its line ends as they are.

    What is beside it meanwhile begins with `_`, so that no push sends it. Raises `OSError`; the old file is as it was.
    """
    path = Path(path)
    beside = path.with_name(f"_{path.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise
    flush(path.parent)


def flush(path: Path) -> None:
    """See to it that a file, or the names in a folder, are on the disk, where the file system has it."""
    with contextlib.suppress(OSError):  # a file that is not there, or folders that cannot: a rename is all there is
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
