"""The `camopd` command. Heavy imports wait until a subcommand needs them, so that `camopd --help` is quick."""

from __future__ import annotations

import argparse
import io
import logging
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
    for name, help in (
        ("demo", "specialise a small real model and recover it, on two CPU cores"),
        ("train", "train as a YAML file says (under `accelerate launch -m camopd.cli` on several GPUs)"),
        ("serve", "start the teachers of a YAML file as vLLM servers"),
        ("check", "see whether the teachers of a YAML file can teach its student"),
        ("report", "figures of one run or several, and which of its branches is hurting"),
        ("sweep", "run configs x seeds one after the other, and make a table of the results"),
        ("data", "build the prompt datasets of the paper: general, medical or role-play"),
    ):
        commands.add_parser(name, add_help=False, help=help)
    options, rest = parser.parse_known_args(argv)
    for stream in (sys.stdout, sys.stderr):  # a machine without UTF-8 still prints names and texts
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # transformers imports torchao where it is installed, which then speaks of kernels that no run here uses.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for place, word in enumerate(
        rest
    ):  # after the command it means the same; with a value it is transformers' setting
        if word == "--debug" and (place + 1 == len(rest) or rest[place + 1].startswith("--")):
            del rest[place]
            options.debug = True
            break
    try:
        {
            "demo": _demo,
            "train": _train,
            "serve": _serve,
            "check": _check,
            "data": _data,
            "report": _report,
            "sweep": _sweep,
        }[options.command](rest)
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
        from .commands.demo import demo
    except ModuleNotFoundError as error:
        raise ImportError(
            f"the demo needs {error.name!r}: pip install -e '.[demo]' in a clone of camopd, or `make demo`."
        ) from error
    demo(argv)


def _train(argv: list[str]) -> None:
    from .commands.train import train
    from .run import config_and_overrides

    train(*config_and_overrides("camopd train", argv))


def _serve(argv: list[str]) -> None:
    from .commands.serve import serve

    serve(argv)


def _check(argv: list[str]) -> None:
    from .run import config_and_overrides

    config, overrides = config_and_overrides("camopd check", argv)  # before torch: --help is quick
    from .commands.check import check

    check(config, overrides)


def _report(argv: list[str]) -> None:
    from .commands.report import report

    report(argv)


def _sweep(argv: list[str]) -> None:
    from .commands.sweep import sweep

    sweep(argv)


def _data(argv: list[str]) -> None:
    from .data.command import main as data

    data(argv)


if __name__ == "__main__":
    main()
