"""Fill the disk under a run, at many sizes, and see that it says so and goes on when there is room.

    python tests/faults/disk.py [--sizes 12] [--injected]

For root each disk is a tmpfs, which is made larger before the run goes on. Others cannot mount one: there, and for root
with `--injected`, all that Python sees of the writing fails with ENOSPC from some operation of a save on. `stuck` and
`different` as in kills.py.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from kills import run, same


def on_a_disk(job: dict, reference: dict, folder: Path, kib: int) -> str:
    """What becomes of a run on a disk of so many KiB: "enough", "same", or what is wrong."""
    disk = folder / "disk"
    disk.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(disk)], check=True)

    def make_room() -> None:
        subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)

    try:
        return trial({**job, "folder": str(disk / "run")}, reference, folder, make_room)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def injected(job: dict, reference: dict, folder: Path, operation: int) -> str:
    """What becomes of a run that can write nothing more from this operation of its saves on."""
    job = {**job, "folder": str(folder / "run"), "full": operation}
    try:
        return trial(job, reference, folder, lambda: job.pop("full"))
    finally:
        shutil.rmtree(folder / "run", ignore_errors=True)


def trial(job: dict, reference: dict, folder: Path, make_room: Callable[[], object]) -> str:
    """What becomes of a run whose disk fills up, and which goes on when there is room."""
    (code,), (answer,) = run(job, folder)
    if not code:
        return "enough"
    # torch does not say why it could not write; metrics.jsonl may be what is cut short.
    if "CaMOPDError" not in answer or not ("GiB are free" in answer or "is full" in answer):
        return f"a raw error: {answer[-600:]}"
    make_room()
    (code,), (answer,) = run(job, folder)
    if code:
        return f"stuck: {answer[-600:]}"
    return "same" if same(json.loads(answer), reference) else "different"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", type=int, default=12)
    parser.add_argument("--injected", action="store_true", help="also for root")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="camopd-disk-"))
    job = {"kind": "full", "processes": 1, "used": False, "url": ""}
    (code,), (answer,) = run({**job, "folder": str(folder / "reference")}, folder)
    assert not code, answer
    reference = json.loads(answer)
    if options.injected or os.geteuid() != 0:
        last, what, fill = reference["ticks"], "disks that fill up at one of {} operations of saves", injected
    else:
        files = [path for path in (folder / "reference").rglob("*") if path.is_file()]
        last, what, fill = sum(path.stat().st_size for path in files) // 1024, "disks of up to {} KiB", on_a_disk
    places = [max(8, last * number // options.sizes) for number in range(options.sizes)]
    found = [fill(job, reference, folder, place) for place in places]
    counts = {kind: found.count(kind) for kind in ("same", "enough")}
    wrong = [text for text in found if text not in counts]
    print(f"{options.sizes} {what.format(last)}: {counts['same']} filled up and went on the same, "
          f"{counts['enough']} were large enough, {len(wrong)} wrong")  # fmt: skip
    shutil.rmtree(folder)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
