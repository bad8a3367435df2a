"""`camopd data`: what the command line says, checked, and handed to a builder."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from pathlib import Path

from ..data import coser, medical, nemotron
from ..data.output import check_push, push
from ..data.sampling import LIMIT


BUILDERS = {
    "general": (nemotron.build_general, nemotron.SOURCES),
    "medical": (medical.build_medical, (*medical.SOURCES, *medical.BENCHMARKS)),
    "roleplay": (coser.build_roleplay, coser.SOURCES),
}


def data(argv: list[str]) -> None:
    """Build a dataset. Raises `ValueError` and `DataError` with what is wrong, before or during the build."""
    parser = argparse.ArgumentParser(
        prog="camopd data",
        description="Build a prompt dataset of the paper from raw datasets of the Hub or local copies.",
    )
    parser.add_argument("builder", choices=BUILDERS, help="which dataset")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; it must not be there")
    parser.add_argument("--limit", type=int, default=LIMIT, metavar="N", help=f"prompts (default {LIMIT})")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draw and the order (default 0)")
    parser.add_argument(
        "--source", action="append", default=[], metavar="NAME=PATH",
        help="read a source from a local file or folder; names: "
        + "; ".join(f"{name}: {', '.join(names)}" for name, (_, names) in BUILDERS.items()),
    )  # fmt: skip
    parser.add_argument(
        "--next-speaker", action="store_true", help="roleplay: next-speaker conversations as prompts, too"
    )
    parser.add_argument("--push-to-hub", metavar="ID", help="send the result to this (private) dataset of the Hub")
    options = parser.parse_args(argv)

    build, names = BUILDERS[options.builder]
    if options.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {options.limit}.")
    if options.next_speaker and options.builder != "roleplay":
        raise ValueError(f"--next-speaker is for roleplay; {options.builder} has no such conversations. Leave it out.")
    sources = _sources(options.source, options.builder, names)
    if options.push_to_hub:
        check_push(options.push_to_hub)
    # With names in place of paths: the card is for others.
    command = ["camopd", "data", options.builder, "--limit", str(options.limit), "--seed", str(options.seed)]
    command += [f"--source={name}={Path(path).name}" for name, path in sources.items()]
    more = {}
    if options.next_speaker:
        command.append("--next-speaker")
        more["next_speaker"] = True
    # A scheduler's SIGTERM ends a build as Ctrl-C does, so that it can tidy up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    build(options.out, options.limit, options.seed, sources, shlex.join(command), **more)
    print(f"built {options.out}: {', '.join(sorted(file.name for file in Path(options.out).iterdir()))}")
    if options.push_to_hub:
        print(f"sent to {push(Path(options.out), options.push_to_hub)}")


def _sources(words: list[str], builder: str, names: tuple[str, ...]) -> dict[str, str]:
    """`NAME=PATH` words as a mapping. Raises `ValueError` for an unknown name or a path that is not there."""
    sources: dict[str, str] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals or name not in names:
            raise ValueError(
                f"--source {word!r} must be NAME=PATH with one of the sources of {builder}: {', '.join(names)}."
            )
        if name in sources:
            raise ValueError(f"--source names {name!r} twice: {sources[name]!r} and {path!r}. Give one of them.")
        if path != "none" and not Path(path).expanduser().exists():
            raise ValueError(f"--source {name}: there is no {path!r} on this machine. Fix the path.")
        sources[name] = path if path == "none" else str(Path(path).expanduser().absolute())
    return sources
