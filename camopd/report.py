"""`camopd report`: what metrics.jsonl says, as one HTML page, one Markdown page and figures, for one run or several.

    read_run -> signs_of -> page of blocks -> report.html, report.md, *.png

The page begins with the question "which of my branches is hurting?" and answers from the run's own numbers. It takes no
side: the paper blames gradients that counteract each other, others blame branches of unequal weight; the page says which
signs are there, which are not, and which were not measured.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from . import figures
from .errors import CaMOPDError


NAME_LENGTH = 40  # characters of a run's name in a legend
FEWEST = 8  # measured steps of a branch below which nothing is called seen or not seen
FEWEST_FOR_TREND = 13  # steps, so that the last third has five
CLEAR = 3.0  # standard errors from which on a change is told from noise
SMALL = 0.02  # of the level: a smaller change is called none, however clear

_TURN_ON = f"`{figures.DIAGNOSTICS}: 10`"

Block = tuple[str, Any]  # ("h1" | "h2" | "h3" | "p" | "list" | "table" | "quote" | "figure", its content)


def main(argv: list[str]) -> None:
    """The command line. Raises what `read_run` and `write_report` raise."""
    parser = argparse.ArgumentParser(
        prog="camopd report", description="Figures of one run or several, and which of its branches is hurting."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output_dir of a run, or a metrics.jsonl")
    parser.add_argument("--out", help="folder for the pages and figures (default: report/ in the first RUN)")
    options = parser.parse_args(argv)
    paths = [metrics_file(run) for run in options.runs]
    out = Path(options.out) if options.out else paths[0].parent / "report"
    for line in write_report(dict(zip(names_of(paths), paths, strict=True)), out):
        print(line)
    print(f"{out / 'report.html'}, and the same in report.md")


def write_report(
    paths: Mapping[str, Path],
    out: Path,
    title: str = "camopd report",
    before: Sequence[Block] = (),
    after: Sequence[Block] = (),
) -> list[str]:
    """Write report.html, report.md and the figures of some runs, by name, into `out`; blocks of others may go around it.

    Returns the answer in short, as lines of text. Raises `CaMOPDError` when `out` is a file.
    """
    if out.exists() and not out.is_dir():
        raise CaMOPDError(f"{str(out)!r}, where the report is to go, is a file and no folder. Give another --out.")
    runs, notes = {}, []
    for name, path in paths.items():
        runs[name], note = read_run(path)
        notes += [f"`{name}`: {note}"] if note else []
    signs = {name: signs_of(frame) for name, frame in runs.items()}
    drawn, left_out = _draw_all(runs)
    out.mkdir(parents=True, exist_ok=True)
    images = {}
    for name, _, _, figure in drawn:
        images[name] = figures.png(figure)
        (out / f"{name}.png").write_bytes(images[name])

    blocks: list[Block] = [("h1", title), *before, ("h2", "Which of my branches is hurting?")]
    blocks += _answers(signs)
    blocks += [("p", f"**Note.** {note}") for note in notes]
    if any(len(frame) >= figures.SMOOTH_FROM for frame in runs.values()):
        blocks.append(
            ("p", f"In the figures, a line of {figures.SMOOTH_FROM} steps or more is thin, under its running mean.")
        )
    for name, heading, caption, _ in drawn:
        blocks += [("h2", heading), ("figure", (name, heading)), ("p", caption)]
    if left_out:
        blocks += [("h2", "Not measured"), ("list", left_out)]
    if len(runs) > 1:
        blocks.append(("h2", "The runs one by one"))
        for name, found in signs.items():
            blocks += [("h3", f"`{name}`"), ("p", found[0].text), ("table", _numbers(found[1:]))]
    blocks += [("h2", "Runs"), ("table", [["run", "optimizer steps", "metrics"]] + [
        [f"`{name}`", str(len(frame)), f"`{paths[name]}`"] for name, frame in runs.items()
    ])]  # fmt: skip
    blocks += after
    (out / "report.md").write_text(to_markdown(blocks), encoding="utf-8")
    (out / "report.html").write_text(to_html(title, blocks, images), encoding="utf-8")
    lead = {name: found[0].text.replace("**", "").replace("`", "") for name, found in signs.items()}
    return [text if len(runs) == 1 else f"{name}: {text}" for name, text in lead.items()]


# ------------------------------------------------------------------------------------------------------- reading a run


def metrics_file(run: str) -> Path:
    """The metrics.jsonl of an output_dir, or the file itself. Raises `ValueError` when there is none."""
    path = Path(run)
    if path.is_file():
        return path
    if not path.exists():
        raise ValueError(f"there is no run at {run!r}. Give the output_dir of a run, or its metrics.jsonl.")
    if (path / "metrics.jsonl").is_file():
        return path / "metrics.jsonl"
    below = sorted(
        {str(found.parent) for depth in ("*", "*/*", "*/*/*") for found in path.glob(f"{depth}/metrics.jsonl")}
    )
    there = f" Below it there are runs: {', '.join(below[:8])}." if below else ""
    raise ValueError(
        f"{run!r} is no folder of a run: it has no metrics.jsonl, which training writes into its output_dir.{there}"
    )


def read_run(path: Path) -> tuple[pd.DataFrame, str]:
    """A metrics.jsonl as a frame indexed by optimizer step, with NaN where a value does not exist, and a note or "".

    A last line that was cut short by a crash is left out, and the note says so. Raises `ValueError` for a file without
    steps, for any other broken line, and for lines that are no steps of a run.
    """
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    records, note = [], ""
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines) > 1:
                note = (
                    f"the last line of {path.name} is cut short and left out; the run was stopped while it wrote it."
                )
                break
            raise ValueError(
                f"line {number} of {str(path)!r} is no JSON: {line[:60]!r}. Delete the line, or give another file."
            ) from None
        if not isinstance(record, dict) or not {"step", "branch"} <= set(record):
            raise ValueError(
                f"line {number} of {str(path)!r} is no step of a run: it needs `step` and `branch`, got {line[:60]!r}. "
                "Give the metrics.jsonl that camopd has written."
            )
        records.append(record)
    if not records:
        raise ValueError(
            f"{str(path)!r} has no steps. Training writes a line after each optimizer step; wait for the first one."
        )
    frame = pd.DataFrame(records).set_index("step")
    values = frame.drop(columns="branch").apply(pd.to_numeric, errors="coerce").astype(float)
    for branch in figures.branches_of({"": frame}):
        for name, made in (
            ("length_ratio", _over(values, "length_kept", "length_dropped", branch)),
            ("jaccard_chance", _chance(values, branch)),
        ):
            if made is not None:
                values[f"selection/{branch}/{name}"] = made
    values.insert(0, "branch", frame["branch"])
    return values, note


def _over(values: pd.DataFrame, above: str, below: str, branch: str) -> pd.Series | None:
    pair = [values.get(f"selection/{branch}/{name}") for name in (above, below)]
    return None if pair[0] is None or pair[1] is None else pair[0] / pair[1].replace(0, math.nan)


def _chance(values: pd.DataFrame, branch: str) -> pd.Series | None:
    """Jaccard overlap of two independent sets that each keep a share p: p^2 / (2p - p^2), up to rounding of set sizes."""
    kept = values.get(f"selection/{branch}/kept_fraction")
    overlap = values.get(f"selection/{branch}/jaccard_length")
    return None if kept is None or overlap is None else (kept / (2 - kept)).where(overlap.notna())


def names_of(paths: Sequence[Path]) -> list[str]:
    """Names for runs that tell them apart: what differs in their folders, shortened in the middle."""
    folders = [path.resolve().parent.parts if path.name == "metrics.jsonl" else path.resolve().parts for path in paths]
    if len(folders) == 1:
        return [_shortened(folders[0][-1])]
    head = _in_common(folders)
    tail = _in_common([folder[head:][::-1] for folder in folders])
    names = [_shortened("/".join(folder[head : len(folder) - tail]) or folder[-1]) for folder in folders]
    return [name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names, start=1)]


def _in_common(folders: Sequence[Sequence[str]]) -> int:
    """How many first parts all folders share."""
    return sum(1 for _ in takewhile(lambda parts: len(set(parts)) == 1, zip(*folders, strict=False)))


def _shortened(name: str) -> str:
    half = (NAME_LENGTH - 1) // 2
    return name if len(name) <= NAME_LENGTH else f"{name[:half]}…{name[-half:]}"


# ------------------------------------------------------------------------------------- which of my branches is hurting


@dataclass(frozen=True)
class Sign:
    """One thing to look for in a run: whether it is there, and the numbers."""

    name: str
    state: str  # "seen", "not seen", "unclear", "not measured"
    text: str


@dataclass(frozen=True)
class Trend:
    """How a value moves: means of the first and last third of its steps, and a line fitted to the last third."""

    steps: int
    first: float
    last: float
    verdict: str  # over the last third: "rises", "falls", "is flat", "too few steps"
    start: float = math.nan  # of the fitted line
    end: float = math.nan
    higher: bool = False  # the last third is clearly above the first


def trend_of(values: pd.Series) -> Trend:
    """The trend of a value. A rise or fall is one of more than three standard errors and of more than 2 % of the level;
    of fewer than 13 steps none is told from noise."""
    third = math.ceil(len(values) / 3)
    first, last = values.iloc[:third], values.iloc[-third:]
    if len(values) < FEWEST_FOR_TREND:
        return Trend(len(values), first.mean(), last.mean(), "too few steps")
    x, y = last.index.to_numpy(float), last.to_numpy()
    slope, offset = np.polyfit(x - x[0], y, 1)
    rest = y - offset - slope * (x - x[0])
    error = math.sqrt((rest**2).sum() / (third - 2) / ((x - x.mean()) ** 2).sum()) * (x[-1] - x[0])
    change = slope * (x[-1] - x[0])
    clear = abs(change) > max(CLEAR * error, SMALL * abs(y.mean()))
    above = last.mean() - first.mean()
    noise = (values.diff() ** 2).mean() / 2  # variance from neighbours, which a trend does not raise
    spread = math.sqrt(2 * noise / third)
    return Trend(
        steps=len(values),
        first=first.mean(),
        last=last.mean(),
        verdict=("rises" if change > 0 else "falls") if clear else "is flat",
        start=offset,
        end=offset + change,
        higher=above > max(CLEAR * spread, SMALL * abs(first.mean())),
    )


def signs_of(frame: pd.DataFrame) -> list[Sign]:
    """What a run says about its branches, the answer in short first. `frame` is what `read_run` returns."""
    branches = figures.branches_of({"": frame})
    trends = {
        branch: trend_of(values) for branch in branches if len(values := _values(frame, f"gap/{branch}/abs_mean"))
    }
    others = [
        _counteraction(frame),
        _imbalance(frame, branches),
        _coherence(frame, branches),
        _length(frame, branches),
        _outliers(frame, branches),
        _momentum(frame),
    ]
    return [_answer(trends, others), _gaps(trends), *others, _cost(frame, branches)]


def _answer(trends: Mapping[str, Trend], others: Sequence[Sign]) -> Sign:
    rising = {branch: trend for branch, trend in trends.items() if trend.verdict == "rises"}
    drifted = {branch: trend for branch, trend in trends.items() if trend.higher and branch not in rising}
    short = [branch for branch, trend in trends.items() if trend.verdict == "too few steps"]
    parts = [
        f"**{branch}** gets worse: its gap rises {_by_share(trend)}over the last third of its "
        f"steps ({_num(trend.start)} → {_num(trend.end)} nats per token)."
        for branch, trend in rising.items()
    ] + [
        f"**{branch}** has moved away from its teacher ({_num(trend.first)} → {_num(trend.last)} nats per token, first to "
        f"last third of its steps), and {'falls again' if trend.verdict == 'falls' else 'stays there'} at the end."
        for branch, trend in drifted.items()
    ]
    if not trends:
        parts = ["Not measured: this run has no gaps."]
    elif len(short) == len(trends):
        moves = ", ".join(
            f"**{branch}** {_num(trend.first)} → {_num(trend.last)} ({trend.steps} steps)"
            for branch, trend in trends.items()
        )
        parts = [
            f"This run is too short to tell: a trend takes {FEWEST_FOR_TREND} steps of a branch. Its gaps, first to last "
            f"third, in nats per token: {moves}."
        ]
    else:
        told = ", ".join(branch for branch in trends if branch not in short)
        parts = parts or [f"None by its gap, which rises for no branch over the last third of its steps ({told})."]
        parts += [f"Too few steps of {branch} to tell ({trends[branch].steps})." for branch in short]
    for state, words in (("seen", "Signs seen"), ("unclear", "Unclear"), ("not measured", "Not measured")):
        names = [sign.name.lower() for sign in others if sign.state == state]
        if names:
            parts.append(f"{words}: {', '.join(names)}.")
    return Sign("Answer", "seen" if rising or drifted else "not seen", " ".join(parts))


def _gaps(trends: Mapping[str, Trend]) -> Sign:
    if not trends:
        return Sign("Gaps", "not measured", "no gap in these steps.")
    parts = []
    for branch, trend in trends.items():
        text = f"**{branch}** {_num(trend.first)} → {_num(trend.last)}"
        if trend.verdict == "too few steps":
            parts.append(f"{text} ({trend.steps} steps, too few for a trend)")
        else:
            end = f", {_num(trend.start)} → {_num(trend.end)}" if trend.verdict != "is flat" else ""
            parts.append(f"{text}, and {trend.verdict} over the last third{end}")
    state = "seen" if any(trend.verdict == "rises" for trend in trends.values()) else "not seen"
    if all(trend.verdict == "too few steps" for trend in trends.values()):
        state = "unclear"
    return Sign("A gap that rises", state, f"mean |gap| in nats per token, first → last third: {'; '.join(parts)}.")


def _counteraction(frame: pd.DataFrame) -> Sign:
    """The paper's first failure mode: gradients of two branches that point against each other (Figure 1)."""
    name = "Counteraction"
    cosine = _values(frame, "conflict/cosine")
    if not len(cosine):
        return Sign(name, "not measured", f"{_TURN_ON} measures the cosine of the branch gradients.")
    stale = frame.get("conflict/stale", pd.Series(0.0, frame.index)).reindex(cosine.index) == 1
    texts, fresh = [], cosine[~stale]
    for values, words in ((fresh, ""), (cosine[stale], " against the other branch's earlier, stale gradient")):
        if len(values):
            texts.append(
                f"the cosine of the branch gradients{words} is negative in {(values < 0).sum()} of {len(values)} measured "
                f"steps, mean {values.mean():+.3f}"
            )
    judged = fresh if len(fresh) else cosine
    negative = (judged < 0).mean()
    state = "seen" if negative >= 0.75 else "not seen" if negative <= 0.25 else "unclear"
    return _sign(name, state, texts, [judged])


def _imbalance(frame: pd.DataFrame, branches: Sequence[str]) -> Sign:
    """Branches of unequal weight: gradient norm and trained tokens of a step, per branch."""
    norms = {branch: _values(frame[frame["branch"] == branch], "grad_norm") for branch in branches}
    if not all(map(len, norms.values())):  # every step is a mix
        norms = {branch: _values(frame, f"conflict/{branch}_norm") for branch in branches}
    tokens = {}
    for branch in branches:
        kept, length = (_values(frame, f"selection/{branch}/{name}") for name in ("kept", "length_kept"))
        tokens[branch] = (kept * length).dropna()
    texts: list[str] = []
    ratios: list[float] = []
    counted: list[pd.Series] = []
    for values, words in ((norms, "the gradient norm"), (tokens, "the trained completion tokens")):
        if len(branches) < 2 or not all(map(len, values.values())):
            continue
        counted += values.values()
        means = {branch: of_branch.mean() for branch, of_branch in values.items()}
        high, low = max(means, key=lambda b: means[b]), min(means, key=lambda b: means[b])
        if means[low] > 0:
            ratios.append(means[high] / means[low])
            total = sum(of_branch.sum() for of_branch in values.values())
            share = values[high].sum() / total
            steps = len(values[high]) / sum(map(len, values.values()))
            texts.append(
                f"per step, {high} has {_num(ratios[-1])} times {words} of {low} ({share:.0%} of the sum, with {steps:.0%} "
                "of the steps)"
            )
    if not ratios:
        return Sign("Imbalance", "not measured", "no two branches with a gradient norm or kept tokens of their own.")
    return _sign("Imbalance", max(ratios) >= 2, texts, counted)


def _coherence(frame: pd.DataFrame, branches: Sequence[str]) -> Sign:
    """The paper's second failure mode: what selection gains in coherence beyond a random set of the same size."""
    name = "Weak samples"
    found = {branch: values for branch in branches if len(values := _values(frame, f"coherence/{branch}/gcg_excess"))}
    if not found:
        return Sign(name, "not measured", f"{_TURN_ON} measures the coherence of the gradients.")
    texts, gains = [], []
    for branch, values in found.items():
        gcg = _values(frame, f"coherence/{branch}/gcg")
        control = _values(frame, f"coherence/{branch}/gcg_control")
        texts.append(
            f"**{branch}** GCG {gcg.mean():+.1f}%, random control {control.mean():+.1f}%, difference "
            f"{values.mean():+.1f} points ({len(values)} measured steps)"
        )
        error = values.std() / math.sqrt(len(values)) if len(values) > 1 else math.inf
        gains.append(values.mean() > CLEAR * error)
    texts[0] = f"kept samples agree {'more' if any(gains) else 'no more'} than chance gives: {texts[0]}"
    return _sign(name, any(gains), texts, found.values())


def _length(frame: pd.DataFrame, branches: Sequence[str]) -> Sign:
    """Whether the score follows length."""
    branches = _selecting(frame, branches)
    if not branches:
        return Sign("Selection follows length", "not seen", _ALL_KEPT)
    texts, follows, counted = [], [], []
    for branch in branches:
        rho = _values(frame, f"score/{branch}/length_spearman")
        if not len(rho):
            continue
        text = f"**{branch}** rank correlation of score and length {rho.mean():+.2f}"
        ratio = _values(frame, f"selection/{branch}/length_ratio")
        if len(ratio):
            text += f", kept samples {_num(ratio.mean())} times as long as dropped ones"
        overlap = _values(frame, f"selection/{branch}/jaccard_length")
        if len(overlap):
            chance = _values(frame, f"selection/{branch}/jaccard_chance").mean()
            text += f", overlap with selecting by length {overlap.mean():.2f} (chance {chance:.2f})"
        texts.append(text)
        follows.append(abs(rho.mean()) >= 0.3)
        counted.append(rho)
    if not texts:
        return Sign("Selection follows length", "not measured", "no step has scores of samples of different lengths.")
    return _sign("Selection follows length", any(follows), texts, counted)


def _outliers(frame: pd.DataFrame, branches: Sequence[str]) -> Sign:
    """Whether few tokens carry the score, or text on which the teacher is lost."""
    branches = _selecting(frame, branches)
    if not branches:
        return Sign("Selection follows outliers", "not seen", _ALL_KEPT)
    texts, follows, counted = [], [], []
    for branch in branches:
        top = _values(frame, f"selection/{branch}/top1_share")
        rho = _values(frame, f"selection/{branch}/score_perplexity_spearman")
        parts = [f"{top.mean():.0%} of the score on the top 1% of tokens"] if len(top) else []
        parts += [f"rank correlation of score and teacher perplexity {rho.mean():+.2f}"] if len(rho) else []
        if parts:
            texts.append(f"**{branch}** {', '.join(parts)}")
            counted.append(top if len(top) else rho)
            follows.append((len(top) > 0 and top.mean() >= 0.5) or (len(rho) > 0 and abs(rho.mean()) >= 0.3))
    if not texts:
        return Sign("Selection follows outliers", "not measured", "no step says which tokens carry the score.")
    return _sign("Selection follows outliers", any(follows), texts, counted)


_ALL_KEPT = "every sample is kept, so nothing is selected."


def _selecting(frame: pd.DataFrame, branches: Sequence[str]) -> list[str]:
    """Branches in which some step drops a sample, or of which it is not known."""
    kept = {branch: _values(frame, f"selection/{branch}/kept_fraction") for branch in branches}
    return [branch for branch, values in kept.items() if not len(values) or values.min() < 1]


def _momentum(frame: pd.DataFrame) -> Sign:
    """Whether Adam's update goes where the step's own gradient wants it to."""
    name = "Steps mostly momentum"
    found = {
        kind: values
        for kind in figures.step_kinds({"": frame})
        if len(values := _values(frame[frame["branch"] == kind], "update/cosine"))
    }
    if not found:
        return Sign(name, "not measured", "the optimizer keeps no Adam moments that can be read.")
    texts = [f"**{kind}** {values.mean():+.2f} in {len(values)} measured steps" for kind, values in found.items()]
    texts[0] = f"mean cosine of Adam's update with the step's own gradient: {texts[0]}"
    return _sign(name, any(values.mean() < 0.1 for values in found.values()), texts, found.values())


def _cost(frame: pd.DataFrame, branches: Sequence[str]) -> Sign:
    step = _values(frame, "time/step")
    if not len(step):
        return Sign("Time and padding", "not measured", "no times in these steps.")
    parts = [
        f"{words} {_values(frame, metric).mean() / step.mean():.0%}"
        for words, metric in (("rollout", "time/rollout"), ("scoring", "time/score"), ("training", "time/train"))
        if len(_values(frame, metric))
    ]
    text = f"a step takes {_num(step.mean())} s: {', '.join(parts)}"
    waits = [
        f"{_num(seconds['waited for'])} s for that of {branch}"
        for branch in branches
        if (seconds := figures.teacher_seconds(frame, branch))
    ]
    if waits:
        text += f"; waiting for teachers: {', '.join(waits)}, where it is asked"
    padding = _values(frame, "train/padding")
    if len(padding):
        text += f"; padding {padding.mean():.0%} of what goes through forward and backward"
    return Sign("Time and padding", "", f"{text}.")


def _sign(name: str, seen: bool | str, texts: list[str], counted: Iterable[pd.Series]) -> Sign:
    """A sign that is seen or not (or a state given in words), unless a branch has too few measured steps to say so."""
    state = seen if isinstance(seen, str) else "seen" if seen else "not seen"
    if min(map(len, counted)) < FEWEST:
        state, texts = "unclear", [*texts, f"fewer than {FEWEST} measured steps of a branch say little"]
    return Sign(name, state, f"{'; '.join(texts)}.")


def _values(frame: pd.DataFrame, metric: str) -> pd.Series:
    return frame[metric].dropna() if metric in frame else pd.Series(dtype=float)


# ---------------------------------------------------------------------------------------------------- blocks of a page


def _answers(signs: Mapping[str, Sequence[Sign]]) -> list[Block]:
    """The section at the top: the answer and its numbers, or with several runs a line for each."""
    if len(signs) == 1:
        found = next(iter(signs.values()))
        return [("p", found[0].text), ("table", _numbers(found[1:])), ("p", _CAUSES)]
    others = next(iter(signs.values()))[1:-1]
    rows = [["run", *(sign.name for sign in others)]]
    rows += [[f"`{name}`", *(sign.state for sign in found[1:-1])] for name, found in signs.items()]
    return [
        ("list", [f"`{name}`: {found[0].text}" for name, found in signs.items()]),
        ("table", rows),
        ("p", f"The numbers behind the words are at the end of the page, run by run. {_CAUSES}"),
    ]


def _numbers(signs: Sequence[Sign]) -> list[list[str]]:
    return [["sign", "in this run", "numbers"], *([f"**{sign.name}**", sign.state, sign.text] for sign in signs)]


_CAUSES = (
    "A sign that is seen beside a gap that rises is a candidate for its cause, and no proof. The paper blames "
    "counteraction and weak samples; others find that branches of unequal weight are enough. Runs with another schedule "
    "or without selection tell them apart: `camopd sweep`."
)


def _draw_all(runs: Mapping[str, pd.DataFrame]) -> tuple[list[tuple[str, str, str, Any]], list[str]]:
    """Every figure there is data for, as (name, title, caption, figure), and a line for each that is left out."""
    drawn, left_out = [], []
    for chart in figures.CHARTS:
        figure = figures.draw(chart, runs)
        if figure is None:
            way = f"set `{chart.setting}` in the config" if chart.setting else "no run here has its metrics"
            left_out.append(f"{chart.title}: {way}.")
        else:
            drawn.append((chart.name, chart.title, chart.caption, figure))
    times = figures.draw_times(runs)
    if times is None:
        left_out.append("Time per stage: no run here has its metrics.")
    else:
        caption = (
            "Mean seconds of each stage of a step. A teacher is waited for, works hidden behind the student's own "
            "log-probs or another teacher, or is idle; only the first costs time. A teacher in the process is never hidden."
        )
        drawn.append(("time", "Time per stage", caption, times))
    return drawn, left_out


def to_markdown(blocks: Sequence[Block]) -> str:
    """The page as Markdown; figures are files next to it."""
    parts = []
    for kind, content in blocks:
        if kind in ("h1", "h2", "h3"):
            parts.append(f"{'#' * int(kind[1])} {content}")
        elif kind == "p":
            parts.append(content)
        elif kind == "list":
            parts.append("\n".join(f"- {item}" for item in content))
        elif kind == "quote":
            parts.append("\n".join(f"> {line}" for line in content.splitlines()) or ">")
        elif kind == "figure":
            parts.append(f"![{content[1]}]({content[0]}.png)")
        else:
            rows = [[cell.replace("|", "\\|") for cell in row] for row in content]
            rows.insert(1, ["---"] * len(rows[0]))
            parts.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
    return "\n\n".join(parts) + "\n"


def to_html(title: str, blocks: Sequence[Block], images: Mapping[str, bytes]) -> str:
    """The page as one HTML file with its figures in it. `images` has the PNG of each figure."""
    parts = []
    for kind, content in blocks:
        if kind in ("h1", "h2", "h3", "p"):
            parts.append(f"<{kind}>{_inline(content)}</{kind}>")
        elif kind == "list":
            parts.append(f"<ul>{''.join(f'<li>{_inline(item)}</li>' for item in content)}</ul>")
        elif kind == "quote":
            parts.append(f"<blockquote>{html.escape(content)}</blockquote>")
        elif kind == "figure":
            data = base64.b64encode(images[content[0]]).decode()
            parts.append(f'<img alt="{html.escape(content[1])}" src="data:image/png;base64,{data}">')
        else:
            rows = [
                "".join(f"<{tag}>{_inline(cell)}</{tag}>" for cell in row)
                for row, tag in zip(content, ["th"] + ["td"] * (len(content) - 1), strict=True)
            ]
            parts.append(f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>")
    return _HTML.format(title=html.escape(title), body="\n".join(parts))


def _inline(text: str) -> str:
    """**bold** and `code` of a text, in HTML."""
    text = re.sub(r"`(.+?)`", r"<code>\1</code>", html.escape(text, quote=False))
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text)


_HTML = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light; }}
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }}
img {{ width: 100%; }}
table {{ border-collapse: collapse; font-size: 0.9em; }}
th, td {{ border: 1px solid #ccc; padding: 0.3em 0.6em; text-align: left; vertical-align: top; }}
th {{ background: #f3f3f3; }}
code {{ background: #f3f3f3; padding: 0 0.2em; overflow-wrap: anywhere; }}
blockquote {{ border-left: 3px solid #ccc; margin-left: 0; padding-left: 1em; white-space: pre-wrap; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


# ------------------------------------------------------------------------------------------------------------- numbers


def _num(value: float) -> str:
    """Three digits that say something: 0.0123, 1.23, 1,234."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _by_share(trend: Trend) -> str:
    return f"by {trend.end / trend.start - 1:.0%} " if trend.start > 0 else ""
