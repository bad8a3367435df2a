"""`camopd sweep`: configs x seeds, one run after the other, and a table of what came out.

    output_dir: sweeps/methods
    configs: [camopd, vanilla_mopd]             # names of `--method list`, or YAML files
    seeds: [0, 1]
    set: {max_steps: 40}                        # optional: settings of every run
    columns: [gap/general/abs_mean@5]           # optional: what the table shows
    command: camopd train run.yaml --method {config} --seed {seed} --output_dir {output_dir} {set} {resume}

Every run has the folder `output_dir/CONFIG/seed-SEED`, with its log; a run that has ended well leaves a mark there and is
not run again. There is no queue and nothing runs side by side: `--print` gives the lines for a scheduler that does that.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import math
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import atomic
from ..errors import CaMOPDError
from ..measured import of_run
from ..run import as_words, config_first, methods, read_settings
from . import processes


if TYPE_CHECKING:  # and imported where the results are read: --help is quick, and so are errors
    import pandas as pd

MARK = "sweep.json"  # in the folder of a run that has ended well
LOG = "sweep.log"
LOG_LINES = 12  # of a failed run, shown
DEFAULT_LAST = 5  # values of a metric that the default columns average
TRAIN = "{python} -m camopd.cli train {config} --seed {seed} --output_dir {output_dir} {set} {resume}"


@dataclass(frozen=True)
class Run:
    """One config with one seed."""

    name: str  # of the config: its file without the ending
    config: str
    seed: int
    folder: Path

    @property
    def key(self) -> str:
        """What `--only` takes."""
        return f"{self.name}/seed-{self.seed}"


@dataclass(frozen=True)
class Sweep:
    """A sweep as its YAML file says."""

    runs: tuple[Run, ...]
    settings: dict[str, Any]
    command: str
    columns: tuple[str, ...]
    output_dir: Path

    def words(self, run: Run, resume: bool | str) -> list[str]:
        """The command of a run, as the words that start it; `resume` is a value of `resume_from_checkpoint`."""
        several = {
            "{set}": as_words(self.settings),
            "{resume}": ["--resume_from_checkpoint", "true" if resume is True else resume] if resume else [],
        }
        single = {
            "{python}": sys.executable, "{config}": run.config, "{seed}": str(run.seed), "{output_dir}": str(run.folder),
        }  # fmt: skip
        words = []
        for word in shlex.split(self.command):  # first split, then filled in: a path may have spaces
            for name, value in single.items():
                word = word.replace(name, value)
            words += several.get(word, [word])
        return words


def sweep(argv: list[str]) -> None:
    """The command line. Exits with 1 when a run has failed and with 130 after Ctrl-C.

    Raises what `read_sweep` raises, and `CaMOPDError` for a folder that another command has made.
    """
    parser = argparse.ArgumentParser(
        prog="camopd sweep", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("sweep", help="YAML file of the sweep; also --config FILE")
    parser.add_argument("--print", action="store_true", help="print a command for each run that is to be done")
    parser.add_argument("--only", metavar="CONFIG/seed-SEED", help="do this run alone, and write no table")
    options = parser.parse_args(config_first(argv))
    what = read_sweep(options.sweep)
    runs = [run for run in what.runs if options.only in (None, run.key)]
    if not runs:
        raise ValueError(
            f"--only {options.only!r} is not a run of {options.sweep!r}; there are {[run.key for run in what.runs]}."
        )
    # All of them first: a clash of settings shows before hours of work.
    done = {run: is_done(what, run) for run in runs}
    if options.print:
        for run in runs:
            if not done[run]:
                words = [sys.executable, "-m", "camopd.cli", "sweep", options.sweep, "--only", run.key]
                print(f"cd {shlex.quote(os.getcwd())} && {shlex.join(words)}")
        return
    failed = []
    for number, run in enumerate(runs, start=1):
        label = f"[{number}/{len(runs)}] {run.key}"
        if done[run]:
            print(f"{label}: done before", flush=True)
        elif not _do(what, run, label):
            failed.append(run)
    if options.only is None:
        _write_results(what)
    if failed:
        print(
            f"{len(failed)} of {len(runs)} runs failed: {', '.join(run.key for run in failed)}. Their logs are above; the "
            "same command runs them again and leaves the others alone.",
            file=sys.stderr,
        )
        raise SystemExit(1)


# ----------------------------------------------------------------------------------------------------- the YAML file


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is kind for item in value)


def _is_columns(value: Any) -> bool:
    return value == [] or (_is_list_of(str, value) and all(re.fullmatch("[^@]+(@0*[1-9][0-9]*)?", v) for v in value))


# What a sweep sets: its default, how to tell a right value, and what that is in words.
_SETTINGS: dict[str, tuple[Any, Any, str]] = {
    "configs": (None, lambda value: _is_list_of(str, value), "a list of YAML files"),
    "seeds": (None, lambda value: _is_list_of(int, value), "a list of whole numbers such as [0, 1]"),
    "set": ({}, lambda value: isinstance(value, dict), "a mapping from settings to values"),
    "command": (TRAIN, lambda value: isinstance(value, str), "one line of text"),
    "output_dir": (None, lambda value: isinstance(value, str) and value, "the folder for the runs and the table"),
    "columns": ([], _is_columns, "a list of metrics such as gap/general/abs_mean (its last value), gap/general/abs_mean@5 "
                "(mean of its last five), eval_general_kl or a key of result.json"),
}  # fmt: skip


def read_sweep(path: str) -> Sweep:
    """Read the YAML file of a sweep. Raises `ValueError` that names what is wrong in it."""
    given = {name: value for name, value in read_settings(path, []).items() if value is not None}
    for name in given:
        if name not in _SETTINGS:
            there = f" There are {', '.join(_SETTINGS)}; settings of runs go to `set`."
            raise ValueError(f"{name!r} in {path!r} is not a setting of a sweep.{_meant(name, _SETTINGS) or there}")
    settings = {name: given.get(name, default) for name, (default, _, _) in _SETTINGS.items()}
    for name, (_, is_right, form) in _SETTINGS.items():
        if not is_right(settings[name]):
            raise ValueError(f"{name} in {path!r} must be {form}, got {settings[name]!r}.")
    configs, seeds = settings["configs"], settings["seeds"]
    names = [Path(config).stem for config in configs]
    for what, values, way in (("configs", names, ", or rename a file."), ("seeds", seeds, ".")):
        twice = sorted({str(value) for value in values if values.count(value) > 1})
        if twice:
            raise ValueError(
                f"{what} in {path!r} has {twice[0]!r} twice; its runs would share a folder. Take one out{way}"
            )
    for name in ("seed", "output_dir"):
        if name in settings["set"]:
            raise ValueError(f"set in {path!r} has {name!r}, which the sweep gives each run itself. Take it out.")
    _check_command(path, settings)
    folder = Path(settings["output_dir"]).expanduser()
    runs = [
        Run(name, config, seed, folder / name / f"seed-{seed}")
        for name, config in zip(names, configs, strict=True)
        for seed in seeds
    ]
    return Sweep(tuple(runs), settings["set"], settings["command"], tuple(settings["columns"]), folder)


def _check_command(path: str, settings: Mapping[str, Any]) -> None:
    command, configs, seeds = settings["command"], settings["configs"], settings["seeds"]
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ValueError(
            f"command in {path!r} cannot be split into words: {error}. Fix its quotes: {command!r}."
        ) from None
    for needed, place, why in (
        (True, "{output_dir}", "the table is made from what a run writes there"),
        (len(configs) > 1, "{config}", f"there are {len(configs)} configs"),
        (len(seeds) > 1, "{seed}", f"there are {len(seeds)} seeds"),
    ):
        if needed and not any(place in word for word in words):
            raise ValueError(f"command in {path!r} has no {place}, but {why}. Put it in: {command!r}.")
    if settings["set"] and "{set}" not in words:
        raise ValueError(
            f"command in {path!r} has no {{set}} as a word of its own, where `set` would go: {command!r}."
        )
    if command != TRAIN and "train" not in words:  # a command of another program may make its files itself
        return
    named = [("configs", config) for config in configs if command == TRAIN or config not in methods()]
    named += [("command", word) for word in words if word.endswith((".yaml", ".yml")) and "{" not in word]
    for name, file in named:
        if not Path(file).is_file():
            raise ValueError(
                f"{name} in {path!r} has {file!r}, but there is no such file. Paths start from the folder in which the "
                f"command is given.{_meant(file, methods())}"
            )


def _meant(name: Any, known: Iterable[str]) -> str:
    """The known name that is closest, as a question; "" where none is close."""
    close = difflib.get_close_matches(str(name), known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


# --------------------------------------------------------------------------------------------------------------- a run


def is_done(sweep: Sweep, run: Run) -> bool:
    """Whether a run has ended well before. Raises `CaMOPDError` when it did so with other settings."""
    path = run.folder / MARK
    if not path.is_file():
        return False
    try:
        then = json.loads(path.read_text(encoding="utf-8"))["made_by"]
    except (KeyError, TypeError, ValueError):
        raise CaMOPDError(f"{str(path)!r} cannot be read. Delete it, and the run is done again.") from None
    now = _made_by(sweep, run)
    for what in now:
        if then.get(what) != now[what]:
            raise CaMOPDError(
                f"{str(run.folder)!r} holds a run with another {what}:\n  {then.get(what)} then\n  {now[what]} now\nGive "
                "the sweep another output_dir, or delete that folder."
            )
    return True


def _made_by(sweep: Sweep, run: Run) -> dict[str, str]:
    """What a result depends on. The interpreter's path is left out: the same environment may stand elsewhere."""
    words = sweep.words(run, resume=False)
    files = {"its config": run.config}
    files |= {
        word: word for word in shlex.split(sweep.command) if word.endswith((".yaml", ".yml")) and "{" not in word
    }
    made_by = {"command": shlex.join("python" if word == sys.executable else word for word in words)}
    for what, name in files.items():
        path = Path(methods().get(name, name))
        text = path.read_bytes() if path.is_file() else b""
        made_by[f"content of {what}"] = f"{name}, sha256 {hashlib.sha256(text).hexdigest()[:16]}"
    return made_by


def _do(sweep: Sweep, run: Run, label: str) -> bool:
    """Start a run, or go on with it from its last checkpoint, and wait for its end. Returns whether it ended well."""
    run.folder.mkdir(parents=True, exist_ok=True)
    resume: bool | str = any(run.folder.glob("checkpoint-*"))
    if not resume and (run.folder / "metrics.jsonl").exists():  # stopped before its first checkpoint
        resume = "auto"
    resume = "{resume}" in sweep.command and resume
    words, log = sweep.words(run, resume), run.folder / LOG
    made_by = _made_by(sweep, run)  # of the config that is read now, not of one that is edited meanwhile
    print(f"{label}: {'going on from its checkpoint' if resume is True else 'started'}, log in {log}", flush=True)
    started = time.monotonic()
    with open(log, "ab") as file, processes.noted_signals() as signals:
        file.write(f"$ {shlex.join(words)}\n".encode())
        file.flush()
        try:
            child = processes.start(words, stdout=file)
        except OSError as error:
            print(f"{label}: cannot be started: {error}. See `command`.", flush=True)
            return False
        while child.poll() is None and not signals:
            time.sleep(processes.PAUSE)
        if signals:
            print(f"\n{label}: stopping; it may save a checkpoint first. Ctrl-C again stops it at once.", flush=True)
            processes.end([child], signals, signal.SIGINT)
            print("Stopped. The same command goes on: finished runs stay, this one starts from its last checkpoint.")
            raise SystemExit(130)
    seconds = time.monotonic() - started
    if child.returncode == 0:
        text = json.dumps({"made_by": made_by, "seconds": seconds}, indent=2) + "\n"
        atomic.write(run.folder / MARK, text)
        print(f"{label}: done in {seconds:.0f} s", flush=True)
        return True
    how = processes.how_it_ended(child.returncode)
    print(f"{label}: FAILED with {how} after {seconds:.0f} s; the end of {log}:", flush=True)
    for line in log.read_text(errors="replace", encoding="utf-8").splitlines()[-LOG_LINES:]:
        print(f"    {line}", flush=True)
    return False


# ------------------------------------------------------------------------------------------------------------- results


def results(sweep: Sweep) -> tuple[pd.DataFrame, list[str]]:
    """A row for each run that has ended well, with its values by column, and notes on what is missing.

    Without `columns` these are the mean |gap| of each branch over the last five of its steps, the numbers at the top
    of result.json, and the held-out gaps.
    """
    import pandas as pd

    found, notes = {}, []
    for run in sweep.runs:
        if (run.folder / MARK).is_file():
            try:
                found[run] = (_metrics_of(run), _result_of(run))
            except ValueError as error:
                notes.append(f"{run.key} is not in the table: {error}")
    columns = dict.fromkeys(sweep.columns)
    if not columns:
        for metrics, result in found.values():
            columns |= dict.fromkeys(
                f"{name}@{DEFAULT_LAST}" for name in metrics if re.fullmatch("gap/.*/abs_mean", name)
            )
            columns |= dict.fromkeys(name for name, value in result.items() if _is_number(value))
    rows = [
        {"config": run.name, "seed": run.seed, **{column: _value(column, metrics, result) for column in columns}}
        for run, (metrics, result) in found.items()
    ]
    frame = pd.DataFrame(rows, columns=["config", "seed", *columns])
    known = sorted({name for metrics, result in found.values() for name in (*metrics, *result)})
    for column in columns:
        if len(frame) and frame[column].isna().all():
            notes.append(f"no run has the column {column!r}.{_meant(column.partition('@')[0], known)}")
    return frame, notes


def table(sweep: Sweep, frame: pd.DataFrame) -> pd.DataFrame:
    """A row per config: how many seeds, and of each column mean and standard deviation over them (NaN for one seed)."""
    import pandas as pd

    rows = []
    for name in dict.fromkeys(run.name for run in sweep.runs):
        mine = frame[frame["config"] == name]
        row: dict[str, Any] = {"config": name, "seeds": len(mine)}
        for column in frame.columns[2:]:
            row[f"{column} mean"], row[f"{column} sd"] = mine[column].mean(), mine[column].std(ddof=1)
        rows.append(row)
    return pd.DataFrame(rows)


def _write_results(sweep: Sweep) -> None:
    """runs.csv, results.csv, results.md and results.png in the sweep's folder."""
    from ..report.charts import draw_bars, png
    from ..report.page import table as markdown_table

    frame, notes = results(sweep)
    for note in notes:
        print(note)
    if frame.empty:
        print("No run has ended well; there is no table.")
        return
    means = table(sweep, frame)
    atomic.write(sweep.output_dir / "runs.csv", frame.to_csv(index=False))
    atomic.write(sweep.output_dir / "results.csv", means.to_csv(index=False))
    columns = list(frame.columns[2:])
    lines = [["config", "seeds", *columns]]
    for row in means.to_dict("records"):
        wanted = sum(run.name == row["config"] for run in sweep.runs)
        seeds = f"{row['seeds']} of {wanted}" if row["seeds"] < wanted else str(row["seeds"])
        lines.append([row["config"], seeds, *(_cell(row[f"{name} mean"], row[f"{name} sd"]) for name in columns)])
    text = markdown_table(lines)
    head = (
        "Mean ± standard deviation over seeds. `@5` is the mean of a run's last five values of a metric, without it the "
        "last one."
    )
    image = ""
    bars = {
        column: {row["config"]: (row[f"{column} mean"], row[f"{column} sd"]) for row in means.to_dict("records")}
        for column in columns
        if frame[column].notna().any()
    }
    if bars:
        atomic.write(sweep.output_dir / "results.png", png(draw_bars(bars)))
        image = "\n![Mean and standard deviation over seeds](results.png)\n"
    atomic.write(sweep.output_dir / "results.md", f"{head}\n\n{text}\n{image}")
    print(
        f"\n{text}\n\n{head}\nTable, runs and figure: {sweep.output_dir}/results.md, results.csv, runs.csv, results.png"
    )


def _metrics_of(run: Run) -> pd.DataFrame:
    """The metrics.jsonl in the folder of a run or, when there is only one, below it, where the demo puts it."""
    import pandas as pd

    from ..report.read import read_run

    own = run.folder / "metrics.jsonl"
    files = [own] if own.is_file() else list(run.folder.rglob("metrics.jsonl"))
    return read_run(files[0])[0] if len(files) == 1 else pd.DataFrame()


def _result_of(run: Run) -> dict[str, Any]:
    """The last held-out gaps of the model that a run has left, which the Trainer's state has, and what is in result.json,
    where a run writes one."""
    state, own = (
        json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for path in (run.folder / "trainer_state.json", run.folder / "result.json")
    )
    _, last = of_run(run.folder)  # where the best model was loaded at the end, its step
    held_out = {
        name: value
        for entry in state.get("log_history", [])
        if last is None or entry.get("step", 0) <= last
        for name, value in entry.items()
        if re.fullmatch("eval_.*_kl", name)
    }
    return {**held_out, **own} if isinstance(own, dict) else held_out


def _value(column: str, metrics: pd.DataFrame, result: Mapping[str, Any]) -> float:
    """`name` is the last value of a metric or a key of result.json, with dots for keys below keys; `name@k` is the mean of
    a metric's last k values. NaN where the run has neither."""
    from ..report.read import new_name

    name, _, last = column.partition("@")
    inner: Any = result
    for key in name.split("."):
        inner = inner.get(key) if isinstance(inner, dict) else None
    if _is_number(inner):
        return float(inner)
    name = new_name(name)
    if name not in metrics or name == "branch":
        return math.nan
    return float(metrics[name].dropna().iloc[-int(last or 1) :].mean())


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _cell(mean: float, spread: float) -> str:
    if math.isnan(mean):
        return "-"
    return f"{mean:.4g}" if math.isnan(spread) else f"{mean:.4g} ± {spread:.2g}"
