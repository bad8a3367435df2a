"""Peak memory and time of the role-play builder on a synthetic file as large as CoSER's.

    python benchmarks/coser_stream.py [--gigabytes 2] [--limit 10000] [--folder DIR]

Writes a JSON list of conversations with CoSER's columns and sizes (about 7 kB each, 3 to 23 messages) to a temporary
folder, builds from it in a fresh process, prints the peak of that process's resident memory, and removes both.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path


BUILD = """
import resource, sys
from camopd.data.coser import build_roleplay
build_roleplay(sys.argv[2], int(sys.argv[3]), 0, {"coser": sys.argv[1]})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)  # kB on Linux
"""


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--limit", type=int, default=10_000, help="conversations reserved as prompts")
    parser.add_argument("--folder", help="where the temporary folder goes")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path, out = Path(folder) / "sft_conversations_sharegpt.json", Path(folder) / "out"
        conversations = write(path, int(options.gigabytes * 1e9))
        print(f"{conversations:,} conversations in {path.stat().st_size / 1e9:.2f} GB", flush=True)
        start = time.perf_counter()
        command = [sys.executable, "-c", BUILD, str(path), str(out), str(options.limit)]
        peak = int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, encoding="utf-8").stdout)
        print(f"peak {peak:,} MB, {time.perf_counter() - start:.0f} s")
        for name in ("prompts.jsonl", "sft.jsonl"):
            with (out / name).open("rb") as file:
                print(f"{name}: {sum(1 for _ in file):,} rows, {(out / name).stat().st_size / 1e9:.2f} GB")


def write(path: Path, size: int) -> int:
    """Write conversations until the file has `size` bytes, and return how many they are."""
    rng = random.Random(0)
    words = [" ".join("".join(rng.choices("abcdefghij", k=5)) for _ in range(60)) for _ in range(200)]
    count = 0
    with path.open("w", encoding="utf-8") as file:
        file.write("[")
        while file.tell() < size if count % 1000 == 0 else True:
            turns = [{"from": "system", "value": f"You are {count}. {' '.join(rng.choices(words, k=10))}"}]
            for place in range(rng.randint(2, 22)):
                turns.append(
                    {
                        "from": ("human", "assistant")[place % 2],
                        "value": f"A: {rng.choice(words)} \u2014 [{place}]\n\n",
                    }
                )
            file.write(f"{', ' if count else ''}{json.dumps({'conversations': turns}, ensure_ascii=False)}")
            count += 1
        file.write("]")
    return count


if __name__ == "__main__":
    main(sys.argv[1:])
