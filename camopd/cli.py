"""The `camopd` command. Heavy imports wait until a subcommand needs them, so that `camopd --help` is quick."""

from __future__ import annotations

import argparse
import os
import sys

from . import __version__


def main(argv: list[str] | None = None) -> None:
    """Run a subcommand. Errors a user can mend are printed as their message alone and exit with 2; `--debug` shows the
    traceback."""
    parser = argparse.ArgumentParser(
        prog="camopd",
        description="Bring back the general abilities a specialised language model has lost, and keep its domain.",
    )
    parser.add_argument("--version", action="version", version=f"camopd {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of errors")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser("demo", add_help=False, help="specialise a small real model and recover it, on two CPU cores")
    options, rest = parser.parse_known_args(argv)
    if "--debug" in rest:  # after the command it means the same
        rest.remove("--debug")
        options.debug = True
    try:
        _demo(rest)
    except Exception as error:
        from .errors import CaMOPDError

        if options.debug or not isinstance(error, (CaMOPDError, ValueError, TypeError, OSError, ImportError)):
            raise
        print(f"camopd: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _demo(argv: list[str]) -> None:
    # Read when the libraries are imported: the demo fetches nothing and reports to nobody.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        from .demo import main as demo
    except ModuleNotFoundError as error:
        raise ImportError(
            f"the demo needs {error.name!r}: pip install -e '.[demo]' in a clone of camopd, or `make demo`."
        ) from error
    demo(argv)


if __name__ == "__main__":
    main()
