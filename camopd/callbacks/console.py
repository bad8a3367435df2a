"""What a run shows while it trains: a line per step, a bar below it, a table per evaluation, and the verdict at the end.

Everything else is in metrics.jsonl and the trackers.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback

from ..measured import HELD_OUT, lines_of, of_lines, of_run
from ..step import Step, StepCallback
from ..verdict import NOT_MEASURED, Measured, change_of, interval, short, signed, verdicts_of
from ..words import WIDTH, columns_of_terminal, counted


HEAD_EVERY = 20  # lines
NUMBERS = 66  # columns of a row of an evaluation, without the branch: room for the change, which the first one has not
LOGGERS = ("", "camopd", "transformers")  # that may write to it


class Console(PrinterCallback, StepCallback):
    """In place of transformers' printed dictionaries and bars, on the main process. As one of its `PrinterCallback`s it is
    taken out as usual: `trainer.remove_callback(PrinterCallback)`."""

    def __init__(
        self, branches: Sequence[str], labels: Sequence[str], held_out: Any, verbose: bool = False, main: bool = True
    ):
        """
        Args:
            branches: of the run.
            labels: of its steps, such as "general" or "general+domain".
            held_out: gives the results of the latest evaluation.
            verbose: whether transformers prints its dictionaries, too; then only the verdict is shown here.
            main: whether this is the main process.
        """
        self._branches, self._held_out, self._verbose, self._main = branches, held_out, verbose, main
        self._labels, self._layout = labels, layout(labels, WIDTH)
        self._bar = Bar()
        self._step: Step | None = None
        self._started = self._mark = 0.0  # seconds: of training, and since when the step takes its time
        self._first = self._done = self._total = self._lines = 0
        self._evaluated = ("", 0)  # branch and prompts of the evaluation under way
        self._first_of: dict[tuple[str, str], Measured] = {}  # evaluation of a branch's prompts
        self._table: tuple[int, set[str]] = (-1, set())  # step and branches of the one under way

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._bar.begin(not (self._verbose or args.disable_tqdm) and state.is_world_process_zero)
        self._started = self._mark = time.perf_counter()
        self._first = self._done = state.global_step
        self._total, self._lines = state.max_steps, 0
        self._first_of, self._table = {}, (-1, set())
        if state.global_step and state.is_world_process_zero:  # goes on after these
            with contextlib.suppress(OSError, ValueError):
                for branch, found in of_lines(lines_of(Path(args.output_dir) / HELD_OUT)).items():
                    self._first_of.update({(branch, each.of): each for each in reversed(found)})

    def on_step_started(self, step: Step) -> None:
        """Say on the bar what goes on."""
        self._draw(step.number, f"step {step.number + 1}: rollouts")

    def on_step_ready(self, step: Step) -> None:
        """Say on the bar what goes on."""
        self._draw(step.number, f"step {step.number + 1}: training")

    def on_step_closed(self, step: Step) -> None:
        """Its metrics are there."""
        self._step = step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """The line of the latest step, whenever the trainer logs one."""
        step, self._step = self._step, None
        if step is None or self._verbose or not state.is_world_process_zero:
            return
        if self._lines % HEAD_EVERY == 0:
            self._layout = layout(self._labels, columns_of_terminal())
            self._say(head(*self._layout))
        self._lines += 1
        now = time.perf_counter()
        done = max(1, state.global_step - self._first)
        left = (now - self._started) / done * (self._total - state.global_step)
        # Of completions all that were written, also what `loss_prefix_tokens` takes away.
        tokens = sum(row.num_ids - row.num_tokens + row.length for row in step.summaries)
        number = f"{step.number + 1}/{self._total}"
        self._say(line_of(number, step.metrics, tokens, now - self._mark, left, *self._layout))
        self._draw(state.global_step, "")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step that is not logged is not on the screen."""
        self._done = state.global_step
        if not control.should_log:
            self._step, self._mark = None, time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The next step's time begins, after evaluation and checkpoint."""
        self._mark = time.perf_counter()

    def on_evaluation_started(self, name: str, prompts: int) -> None:
        """The first batch may take minutes: say so, on the bar where one is drawn, and else in a line."""
        self._evaluated = (name, prompts)
        if self._bar.drawn:
            self._draw_evaluation()
        elif self._main and not self._verbose:
            self._wrapped(f"evaluating {counted(prompts, 'held-out prompt')} of {name} ...")

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Say on the bar how far it is."""
        self._draw_evaluation()

    def _draw_evaluation(self) -> None:
        name, prompts = self._evaluated
        self._draw(self._done, f"evaluating {name}: {len(self._held_out())} of {counted(prompts, 'prompt')}")

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A row of the table for the branch that was measured."""
        if self._verbose or not state.is_world_process_zero:
            return
        step = state.global_step
        for branch, (now,) in of_lines([{"step": step, **self._held_out().record()}]).items():
            if self._table[0] != step or branch in self._table[1]:
                self._table = (step, set())
                self._wrapped(f"held-out prompts at step {step}: KL to the teacher, nats per token, ± is 95 %")
            self._table[1].add(branch)
            first = self._first_of.setdefault((branch, now.of), now)
            self._say(row_of(branch, now, first, max(map(len, self._branches)), columns_of_terminal()))
        self._lines = 0  # the head of the steps again

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The answer: has it recovered, and what is kept?"""
        self._bar.end()
        if state.is_world_process_zero:
            try:
                lines = answer(*of_run(Path(args.output_dir)), self._branches, columns_of_terminal())
            except (OSError, ValueError) as error:  # the model is trained, and has yet to be saved
                lines = [f"Did it recover? Not known: {error}"]
            for line in lines:
                self._say(line)

    def _draw(self, done: int, doing: str) -> None:
        if self._bar.wanted:
            self._bar.draw(done, self._total, doing)

    def _wrapped(self, text: str) -> None:
        for line in textwrap.wrap(text, columns_of_terminal() - 1, subsequent_indent="  "):
            self._say(line)

    def _say(self, text: str) -> None:
        self._bar.clear()
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        print(text.encode(encoding, errors="backslashreplace").decode(encoding), flush=True)  # a log in ASCII


class Bar:
    """A progress bar in the last line of a terminal; without a terminal there is none."""

    def __init__(self) -> None:
        self.wanted = False
        self._shown = False
        self._loggers: list[logging.Handler] = []

    @property
    def drawn(self) -> bool:
        """Whether there is one."""
        return self.wanted and sys.stdout.isatty()

    def begin(self, wanted: bool) -> None:
        """From here on it is drawn, if it is `wanted`, and goes before a line of a logger, which would leave its end."""
        self.wanted = wanted
        handlers = [handler for name in LOGGERS for handler in logging.getLogger(name).handlers]
        self._loggers = handlers if wanted and sys.stdout.isatty() else []
        for handler in self._loggers:
            handler.addFilter(self._give_way)

    def end(self) -> None:
        """Of all that."""
        self.wanted = False
        for handler in self._loggers:
            handler.removeFilter(self._give_way)

    def _give_way(self, record: logging.LogRecord) -> bool:
        self.clear()
        return True

    def draw(self, done: int, total: int, doing: str) -> None:
        """Show it. The cursor stays at its start, so that what others print is written over it."""
        if sys.stdout.isatty():
            self._shown = True
            sys.stdout.write(f"\r\x1b[2K{bar(done, total, doing, shutil.get_terminal_size((WIDTH, 24)).columns)}\r")
            sys.stdout.flush()

    def clear(self) -> None:
        """Take it away."""
        if self._shown:
            self._shown = False
            sys.stdout.write("\r\x1b[2K")


def bar(done: int, total: int, doing: str, columns: int) -> str:
    """The text of a bar, at most `columns` - 1 characters."""
    tail = f" {done}/{total} {doing}".rstrip()
    room = max(0, min(40, columns - 3 - len(tail)))
    full = round(room * done / total) if total else 0
    return f"[{'#' * full}{'.' * (room - full)}]{tail}"[: max(0, columns - 1)]


def layout(labels: Sequence[str], columns: int) -> tuple[int, int]:
    """Width of the column of branches, and how many numbers of a mixed step stand side by side.

    Where a line of them would not be shorter than `columns`, each branch of a step has a line of its own, and a name that
    is longer than the column goes on in the next line.
    """
    width, cells = max(map(len, ("branch", *labels))), max(label.count("+") for label in labels) + 1
    if len(head(width, cells)) < columns:
        return width, cells
    longest = max(len(name) for label in labels for name in _names(label))
    room = columns - 1 - len(head(0, 1)) + len("branch")
    return max(len("branch"), min(longest, room)), 1


def _names(label: str) -> list[str]:
    """Of a step's branches, with a + behind all but the last."""
    return re.findall(r"[^+]+\+?", label)


def head(width: int, cells: int) -> str:
    """The head of the lines; `width` of a branch, and `cells` numbers of a mixed step."""
    gap, kept = 6 * cells, 5 * cells
    return (
        f"{'step':>11} {'branch':<{width}} {'|gap|':>{gap}} {'kept':>{kept}} {'tokens/s':>9} {'s/step':>7} {'left':>8}"
    )


def line_of(
    number: str, metrics: Mapping[str, Any], tokens: int, seconds: float, left: float, width: int, cells: int
) -> str:
    """The line of a step: its number, its branch, mean |gap| in nats per token, the share of samples kept, tokens of
    prompts and completions per second, seconds of the step, and the time left. Several lines where `layout` says so."""
    label = str(metrics["branch"])
    branches = label.split("+")
    gaps = [_gap(metrics.get(f"gap/{branch}/abs_mean", math.nan)) for branch in branches]
    kept = [_share(metrics.get(f"selection/{branch}/kept_fraction", math.nan)) for branch in branches]
    rate = f"{tokens / seconds:,.0f}" if seconds > 0 else "-"
    pace = f"{seconds:.2f}" if seconds < 100 else f"{seconds:.0f}"
    rows = [(label, "/".join(gaps), "/".join(kept))]
    if len(branches) > cells or len(label) > width:
        rows = []
        for name, *numbers in zip(_names(label), gaps, kept, strict=True):
            first, *more = (name[start : start + width] for start in range(0, len(name), width))
            rows += [(first, numbers[0], numbers[1]), *((part, "", "") for part in more)]
    lines = [f"{'':>11} {name:<{width}} {gap:>{6 * cells}} {share:>{5 * cells}}" for name, gap, share in rows]
    lines[0] = f"{number:>11}{lines[0][11:]} {rate:>9} {pace:>7} {duration(left):>8}"
    return "\n".join(line.rstrip() for line in lines)


def _gap(value: float) -> str:
    return "-" if not math.isfinite(value) else f"{value:.3f}"


def _share(value: float) -> str:
    return "-" if not math.isfinite(value) else f"{value:.0%}"


def duration(seconds: float) -> str:
    """m:ss, or h:mm:ss."""
    whole = max(0, round(seconds))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def row_of(branch: str, now: Measured, first: Measured, width: int, columns: int) -> str:
    """A branch's row in the table of an evaluation, with the change since the first one.

    `width` is that of the longest branch. Where the row would not be shorter than `columns`, the numbers stand below it.
    """
    row = f"KL {interval(now.kl, now.half):<15}  |gap| {short(now.gap_abs)}  {counted(now.prompts, 'prompt')}"
    if first is not now:
        change = change_of(first, now)
        half = f" ± {short(change.half)}" if math.isfinite(change.half) else ""
        row += f"  change {signed(change.value)}{half}"
    if 2 + width + 2 + max(NUMBERS, len(row)) < columns:
        return f"  {branch:<{width}}  {row}"
    name = textwrap.wrap(branch, columns - 1, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join([*name, f"    {row}"])


def answer(
    found: Mapping[str, Sequence[Measured]], last_step: int | None, branches: Sequence[str], columns: int
) -> list[str]:
    """The last lines of a run: its verdict for each branch, from the evaluations in `found`."""
    width = columns - 1
    if not found:
        return textwrap.wrap(f"Did it recover? {NOT_MEASURED[0].upper()}{NOT_MEASURED[1:]}.", width)
    wanted = {branch: found.get(branch, []) for branch in branches}
    lines = textwrap.wrap("Did it recover? Held-out KL to the teacher, nats per token, 95 % intervals:", width)
    for verdict in verdicts_of(wanted, last_step):
        lines += textwrap.wrap(f"{verdict.words}.", width, initial_indent="  ", subsequent_indent="    ")
        if verdict.limits:
            lines += textwrap.wrap(verdict.limits, width, initial_indent="    ", subsequent_indent="    ")
    return lines


def replace_printers(trainer: Any) -> None:
    """Take transformers' own printer and progress bar out, and leave a user's, also where they are a kind of them."""
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback) in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
