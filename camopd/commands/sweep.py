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
import contextlib
import hashlib
import json
import math
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import atomic
from ..errors import CaMOPDError
from ..exit_codes import REPEATS, REQUEUE
from ..measured import of_run
from ..output_dir import RUN_RECORD
from ..run import config_first, methods
from ..sweep import Run, Sweep, meant, read_sweep
from . import processes


if TYPE_CHECKING:  # and imported where the results are read: --help is quick, and so are errors
    import pandas as pd

MARK = "sweep.json"  # in the folder of a run that has ended well
LOG = "sweep.log"
LOG_LINES = 12  # of a failed run, shown
STOPPED = "Stopped. The same command goes on: finished runs stay, this one starts from its last checkpoint."
DEFAULT_LAST = 5  # values of a metric that the default columns average


def sweep(argv: list[str]) -> None:
    """The command line. Exits with 1 when a run has failed, and with `REQUEUE` when a signal has stopped it or a run: the
    same command goes on.

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
    if options.only is None:
        from ..report import charts  # noqa: F401 - with matplotlib: that it is not there shows before hours of work, too
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
    """Start a run, or go on with it from its last checkpoint, and wait for its end. Returns whether it ended well.

    Raises `SystemExit` where a signal has stopped it, or this process, which then stops the run.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    resume: bool | str = any(run.folder.glob("checkpoint-*"))
    if not resume and (run.folder / "metrics.jsonl").exists():  # stopped before its first checkpoint
        resume = "auto"
    resume = "{resume}" in sweep.command and resume
    words, log = sweep.words(run, resume), run.folder / LOG
    made_by = _made_by(sweep, run)  # of the config that is read now, not of one that is edited meanwhile
    print(f"{label}: {'going on from its checkpoint' if resume is True else 'started'}, log in {log}", flush=True)
    started = time.monotonic()
    with open(log, "ab") as file, processes.noted_signals(REPEATS) as signals:
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
            with contextlib.suppress(OSError):  # of a terminal that is gone
                print(
                    f"\n{label}: stopping; it may save a checkpoint first. Ctrl-C again stops it at once.", flush=True
                )
            processes.end([child], signals, signal.SIGINT)  # whatever has come: every program knows Ctrl-C
            with contextlib.suppress(OSError):
                print(STOPPED, flush=True)
            raise SystemExit(128 + signals[-1] if len(signals) > 1 else REQUEUE)
    seconds = time.monotonic() - started
    if child.returncode == REQUEUE:  # the signal came to it alone
        print(f"{label}: stopped by a signal after {seconds:.0f} s, log in {log}\n{STOPPED}", flush=True)
        raise SystemExit(REQUEUE)
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
                found[run] = (_metrics_of(run), _held_out_of(run), _result_of(run))
            except ValueError as error:
                notes.append(f"{run.key} is not in the table: {error}")
    columns = dict.fromkeys(sweep.columns)
    if not columns:
        for metrics, held_out, result in found.values():
            columns |= dict.fromkeys(
                f"{name}@{DEFAULT_LAST}" for name in metrics if re.fullmatch("gap/.*/abs_mean", name)
            )
            columns |= dict.fromkeys([*held_out, *(name for name, value in result.items() if _is_number(value))])
    rows = [
        {"config": run.name, "seed": run.seed, **{column: _value(column, *values) for column in columns}}
        for run, values in found.items()
    ]
    frame = pd.DataFrame(rows, columns=["config", "seed", *columns])
    known = sorted({name for values in found.values() for names in values for name in names})
    for column in columns:
        if len(frame) and frame[column].isna().all():
            name, _, count = column.partition("@")
            single = count and any(_is_number(_below(result, name)) for _, _, result in found.values())
            way = f" {name!r} is one number of result.json: leave @{count} out." if single else meant(name, known)
            if any(held_out.get(name) for _, held_out, _ in found.values()):
                notes.append(f"{column!r} is not finite in any run.")
                continue
            notes.append(f"no run has the column {column!r}.{way}")
    return frame, notes


def table(sweep: Sweep, frame: pd.DataFrame) -> pd.DataFrame:
    """A row per config: how many seeds, and of each column mean and standard deviation over them (NaN for one seed), and
    how many of them have a value."""
    import pandas as pd

    rows = []
    for name in dict.fromkeys(run.name for run in sweep.runs):
        mine = frame[frame["config"] == name]
        row: dict[str, Any] = {"config": name, "seeds": len(mine)}
        for column in frame.columns[2:]:
            values = mine[column].dropna()
            row |= {f"{column} mean": values.mean(), f"{column} sd": values.std(ddof=1), f"{column} n": len(values)}
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
        lines.append([row["config"], seeds, *(_cell(row, name) for name in columns)])
    text = markdown_table(lines)
    head = (
        "Mean ± standard deviation over seeds. `@5` is the mean of a run's last five values of a metric, without it the "
        "last one. Where not all of the seeds have a value, it says of how many the numbers are."
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
    below = (path for path in run.folder.rglob("metrics.jsonl") if not (path.parent / RUN_RECORD).is_file())
    files = [own] if own.is_file() else list(below)
    return read_run(files[0])[0] if len(files) == 1 else pd.DataFrame()


def _held_out_of(run: Run) -> dict[str, list[float]]:
    """The held-out gaps of the model that a run has left and of its steps before, but not of its start, by name; NaN for
    one that is not finite: the one before it would hide that the run has failed."""
    found, _ = of_run(run.folder)
    return {f"eval_{branch}_kl": [each.kl for each in measured if each.step] for branch, measured in found.items()}


def _result_of(run: Run) -> dict[str, Any]:
    """What is in result.json, where a run writes one."""
    path = run.folder / "result.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def _value(
    column: str, metrics: pd.DataFrame, held_out: Mapping[str, list[float]], result: Mapping[str, Any]
) -> float:
    """`name` is a key of result.json, with dots for keys below keys, or the last value of a held-out gap or of a metric;
    `name@k` is the mean of the last k values of these two. NaN where the run has none."""
    from ..report.read import new_name

    name, _, count = column.partition("@")
    single = _below(result, name)
    if _is_number(single) and not count:
        return float(single)
    values = held_out.get(name, [])
    if not values and new_name(name) in metrics and name != "branch":
        values = metrics[new_name(name)].dropna().tolist()
    last = values[-int(count or 1) :]
    return sum(last) / len(last) if last else math.nan


def _below(result: Any, name: str) -> Any:
    for key in name.split("."):
        result = result.get(key) if isinstance(result, dict) else None
    return result


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _cell(row: Mapping[str, Any], column: str) -> str:
    mean, spread, count = (row[f"{column} {what}"] for what in ("mean", "sd", "n"))
    if not count:
        return "-"
    of = "" if count == row["seeds"] else f" ({count} of {row['seeds']})"
    return f"{mean:.4g}{'' if math.isnan(spread) else f' ± {spread:.2g}'}{of}"
