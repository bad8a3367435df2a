"""Fill the disk under a run, at many sizes, and see that it says so and goes on when there is room.

    python tests/faults/disk.py [--sizes 12]

Needs root: each disk is a tmpfs, which is made larger before the run goes on. `stuck` and `different` as in kills.py.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from kills import run, same


def trial(job: dict, reference: dict, folder: Path, kib: int) -> str:
    """What becomes of a run on a disk of so many KiB: "enough", "same", or what is wrong."""
    disk = folder / "disk"
    disk.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(disk)], check=True)
    try:
        job = {**job, "folder": str(disk / "run")}
        (code,), (answer,) = run(job, folder)
        if not code:
            return "enough"
        # torch does not say why it could not write; metrics.jsonl may be what is cut short.
        if "CaMOPDError" not in answer or not ("GiB are free" in answer or "is full" in answer):
            return f"a raw error: {answer[-600:]}"
        subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        (code,), (answer,) = run(job, folder)
        if code:
            return f"stuck: {answer[-600:]}"
        return "same" if same(json.loads(answer), reference) else "different"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", type=int, default=12)
    options = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("a small disk needs root (mount); tests/test_checkpoints.py fills one by an injected ENOSPC")
    folder = Path(tempfile.mkdtemp(prefix="camopd-disk-"))
    job = {"kind": "full", "processes": 1, "used": False, "url": ""}
    (code,), (answer,) = run({**job, "folder": str(folder / "reference")}, folder)
    assert not code, answer
    reference = json.loads(answer)
    whole = sum(path.stat().st_size for path in (folder / "reference").rglob("*") if path.is_file()) // 1024
    found = [trial(job, reference, folder, max(8, whole * number // options.sizes)) for number in range(options.sizes)]
    counts = {kind: found.count(kind) for kind in ("same", "enough")}
    wrong = [text for text in found if text not in counts]
    print(f"{options.sizes} disks of up to {whole} KiB: {counts['same']} filled up and went on the same, "
          f"{counts['enough']} were large enough, {len(wrong)} wrong")  # fmt: skip
    shutil.rmtree(folder)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
