"""What is wrong with a file of rows that `datasets` or Arrow cannot read, and the way out."""

from __future__ import annotations

import codecs
from pathlib import Path

from .errors import DataError


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


def check_encoding(path: str) -> None:
    """Raise `UnicodeDecodeError` for a text that is not UTF-8, which Arrow may find as late as when the row is read."""
    import fsspec

    decoder = codecs.getincrementaldecoder("utf-8")()
    with fsspec.open(path, "rb", compression="infer") as file:
        while chunk := file.read(1 << 20):
            if not decoder.getstate()[0] and chunk[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise DataError(f"its text is UTF-16, not UTF-8. Convert it: iconv -f UTF-16 -t UTF-8 {path} > NEW")
            decoder.decode(chunk)
    decoder.decode(b"", final=True)
