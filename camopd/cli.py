"""The `camopd` command. Heavy imports wait until a subcommand needs them, so that `camopd --help` is quick."""

from __future__ import annotations

import argparse
import importlib
import io
import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from .commands.ctrl_c import STOPPED, ends_at_once
from .exit_codes import INTERRUPTED
from .version import __version__
from .words import in_lines


COMMANDS = {  # each a function of its name in a module of its name
    "demo": "specialise a small real model and recover it, on two CPU cores",
    "train": "train as a YAML file says (under `accelerate launch -m camopd.cli` on several GPUs)",
    "serve": "start the teachers of a YAML file as vLLM servers",
    "gaps": "measure a finished model's held-out gaps to the teachers of a YAML file",
    "check": "see whether the teachers of a YAML file can teach its student",
    "report": "figures of one run or several, and which of its branches is hurting",
    "eval": "benchmarks of a run's models: what came back, what broke, and how sure that is",
    "sweep": "run configs x seeds one after the other, and make a table of the results",
    "data": "build the prompt datasets of the paper: general, medical or role-play",
}


def main(argv: list[str] | None = None) -> None:
    """Run a subcommand. Errors a user can fix are printed as their message alone and exit with 2; `--debug` shows the
    traceback. Ctrl-C, where a command does nothing else with it, is one line and exits with 130."""
    try:
        _main(argv)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one ends at once what the exit may wait for
        print(STOPPED, file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


def _main(argv: list[str] | None) -> None:
    parser = argparse.ArgumentParser(
        prog="camopd",
        description="Bring back the general abilities a specialised language model has lost, and keep its domain.",
    )
    parser.add_argument("--version", action="version", version=f"camopd {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of errors")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, help in COMMANDS.items():
        commands.add_parser(name, add_help=False, help=help)
    options, rest = parser.parse_known_args(argv)
    for stream in (sys.stdout, sys.stderr):  # a machine without UTF-8 still prints names and texts
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # transformers imports torchao where it is installed, which then speaks of kernels that no run here uses.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").addFilter(_says_something)
    if logging.lastResort is not None:  # for warnings before a run has a log of its own
        in_lines(logging.lastResort)
    # After the command it means the same; with a value it is transformers' setting.
    for place, word in enumerate(rest):
        if word == "--debug" and (place + 1 == len(rest) or rest[place + 1].startswith("--")):
            del rest[place]
            options.debug = True
            break
    try:
        run(options.command, rest)
    except Exception as error:
        from .errors import CaMOPDError

        if options.debug or not isinstance(error, (CaMOPDError, ValueError, TypeError, OSError, ImportError)):
            raise
        print(f"camopd: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _says_something(record: logging.LogRecord) -> bool:
    """Not that a machine without a GPU computes on its CPU, which DeepSpeed says wherever it is installed."""
    return "Setting accelerator to CPU" not in record.getMessage()


def run(command: str, argv: list[str]) -> None:
    """What a subcommand does with its words. A signal ends `train` so that a scheduler starts it again, from now on."""
    with ends_at_once(requeue=True) if command == "train" else nullcontext():
        _run(command, argv)


def _run(command: str, argv: list[str]) -> None:
    arguments: Sequence[Any] = [argv]
    if command in ("train", "check"):
        from . import early, surroundings
        from .run import config_and_overrides, teachers_of

        arguments = config_and_overrides(f"camopd {command}", argv)  # before torch: --help is quick, and so are errors
        settings = early.check_early(*arguments, training=command == "train")
        served = {**settings, "teachers": teachers_of(settings)}
        if command == "train":
            surroundings.check_folder(served)
        surroundings.check_machine(settings)
        surroundings.check_hub(served)
        if command == "train":
            surroundings.check_push(settings)
    if command == "demo":  # read when the libraries are imported: the demo fetches nothing and reports to nobody
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from .commands import demo_words

        demo_words.parse(argv)  # --help is quick, and so are errors
    try:
        with ends_at_once():
            module = importlib.import_module(f".commands.{command}", __package__)
    except ModuleNotFoundError as error:
        if command != "demo":
            raise
        raise ImportError(
            f"the demo needs {error.name!r}: pip install -e '.[demo]' in a clone of camopd, or `make demo`."
        ) from error
    with ends_at_once() if command in ("check", "report") else nullcontext():  # which leave nothing half done
        getattr(module, command)(*arguments)


if __name__ == "__main__":
    main()
