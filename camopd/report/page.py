"""The page: signs and figures of one run or several, as Markdown and as one HTML file.

A page is a list of blocks of Markdown. One that starts with > is a text of others, and is shown as it is.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

from .. import atomic
from ..errors import CaMOPDError
from ..measured import of_metrics
from ..output_dir import METRICS
from ..results import benchmarks_of, table, tasks_of
from ..verdict import NOT_MEASURED, Measured, rows_of, verdicts_of
from .charts import SMOOTH_FROM, draw_all, png
from .evidence import NOT_TRIED, in_short, worth
from .read import read_run
from .signs import Sign, hurting, signs_of


HELD_OUT = (
    "Sampled reverse KL of the student to the branch's teacher on held-out prompts, nats per token, mean over prompts "
    "± 95 % interval. A recovered share is that of the gap before; the smallest change is what so many prompts find four "
    "times in five."
)
TRAINING = (
    "From the training gaps: those of the run's own prompts, others in each step. They show how training went, and not "
    "whether the model recovered."
)
BENCHMARKS = (
    "Scores are percent ± 95 % interval over items. A change has its paired interval; an item came back where its score is "
    "higher after than before, and broke where it is lower. eval.html beside eval.json shows them."
)
IN_TRAINING = (
    "Scores as each task's own metric has them, ± 95 % interval over its rows. The best of several evaluations is partly "
    "the luckiest. A row broke whose last score is lower than its first."
)
HeldOut = tuple[Mapping[str, Sequence[Measured]], int | None]  # evaluations by branch, and steps of the model in hand
CAUSES = (
    "A sign that is seen beside a gap that rises is a candidate for its cause, not a proof. The paper blames "
    "counteraction and weak samples; others find that branches of unequal weight are enough. Runs with another schedule "
    "or without selection tell them apart: `camopd sweep`."
)
HTML = """<!DOCTYPE html>
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
th {{ background: #f3f3f3; white-space: nowrap; }}
code {{ background: #f3f3f3; padding: 0 0.2em; overflow-wrap: anywhere; }}
blockquote {{ border-left: 3px solid #ccc; margin-left: 0; padding-left: 1em; white-space: pre-wrap; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def write_report(
    paths: Mapping[str, Path],
    out: Path,
    title: str = "camopd report",
    before: Sequence[str] = (),
    after: Sequence[str] = (),
) -> list[str]:
    """Write report.html, report.md and the figures of some runs, by name, into `out`; blocks of others may go around it.

    Returns the answer in short, as lines of text: of each run whether it recovered, and then what its training gaps say.
    Raises `CaMOPDError` when `out` is a file, and what `read_run` raises.
    """
    if out.exists() and not out.is_dir():
        raise CaMOPDError(f"{str(out)!r}, where the report is to go, is a file, not a folder. Give another --out.")
    read = {name: read_run(path) for name, path in paths.items()}
    runs = {name: frame for name, (frame, _) in read.items()}
    signs = {name: signs_of(frame) for name, frame in runs.items()}
    held_out: dict[str, HeldOut] = {name: of_metrics(path) for name, path in paths.items()}
    figures = draw_all(runs, {name: found for name, (found, _) in held_out.items()})
    out.mkdir(parents=True, exist_ok=True)
    images = {f"{chart.name}.png": png(figure) for chart, figure in figures if figure is not None}
    for name, image in images.items():
        atomic.write(out / name, image)

    blocks = [f"# {title}", "## Did it recover?", *_recovery(held_out)]
    scores, lines, problems = _scores(paths, held_out)
    blocks += [*scores, *before]
    verdicts = {name: verdicts_of(*each) for name, each in held_out.items()}
    hurts = {name: hurting(found) for name, found in verdicts.items()}
    blocks += ["## Which of my branches is hurting?", *_answers(signs, hurts)]
    blocks += [f"**Note.** `{name}`: {note}" for name, (_, note) in read.items() if note]
    if any(len(frame) >= SMOOTH_FROM for frame in runs.values()):
        blocks.append(f"Lines of {SMOOTH_FROM} steps or more are drawn thin, and their running mean over them.")
    left_out = []
    for chart, figure in figures:
        if figure is not None:
            blocks += [f"## {chart.title}", f"![{chart.title}]({chart.name}.png)", chart.caption]
        else:
            left_out.append(f"- {chart.title}: {chart.way}.")
    if left_out:
        blocks += ["## Not measured", "\n".join(left_out)]
    if len(runs) > 1:
        blocks.append("## The runs one by one")
        for name, found in signs.items():
            blocks += [f"### `{name}`", found[0].text, *_numbers(found)]
    rows = [[f"`{name}`", str(len(frame)), f"`{paths[name]}`"] for name, frame in runs.items()]
    blocks += ["## Runs", table([["run", "optimizer steps", "metrics"], *rows]), *after]
    atomic.write(out / "report.md", "\n\n".join(blocks) + "\n")
    atomic.write(out / "report.html", to_html(title, blocks, images))
    said = []
    for name, found in signs.items():
        lead = "" if len(runs) == 1 else f"{name}: "
        said += [f"{lead}{text}" for text in _verdicts(*held_out[name])]
        said += [f"{lead}{line}" for line in lines[name]]
        said += [_plain(f"{lead}Which branch hurts: {hurts[name]}")] if hurts[name] else []
        said.append(_plain(f"{lead}Training gaps: {found[0].text}"))
        left = ", ".join(sign.name.lower() for sign in found if not sign.settled)
        said[-1] += f" Not settled: {left}." if left else ""
    return [*said, *problems]


def _verdicts(found: Mapping[str, Sequence[Measured]], last_step: int | None) -> list[str]:
    """Whether a run recovered, a sentence or two for each branch."""
    return [verdict.text for verdict in verdicts_of(found, last_step)] or [
        f"{NOT_MEASURED[0].upper()}{NOT_MEASURED[1:]}."
    ]


def _plain(text: str) -> str:
    return text.replace("**", "").replace("`", "")


def _recovery(held_out: Mapping[str, HeldOut]) -> list[str]:
    """The section at the top: the verdict on each branch of each run, and the numbers."""
    blocks = []
    for name, (found, last_step) in held_out.items():
        lead = "" if len(held_out) == 1 else f"`{name}`: "
        blocks.append("\n".join(f"- {lead}{text}" for text in _verdicts(found, last_step)))
        if found:
            blocks.append(table(rows_of(verdicts_of(found, last_step))))
    return [*blocks, HELD_OUT] if any(found for found, _ in held_out.values()) else blocks


def _scores(
    paths: Mapping[str, Path], held_out: Mapping[str, HeldOut]
) -> tuple[list[str], dict[str, list[str]], list[str]]:
    """The section of benchmarks, nothing where no run has any; of each run what `camopd eval` has found, in lines; and what
    is wrong with files that are not shown."""
    evaluated, trained, problems = [], [], []
    lines: dict[str, list[str]] = {name: [] for name in paths}
    for name, path in paths.items():
        lead = "" if len(paths) == 1 else f"`{name}`, "
        for found in benchmarks_of(path.parent) if path.name == METRICS else ():
            problems += [found.problem] if found.problem else []
            evaluated += [f"{lead}`{found.path}`. {found.about}".rstrip(), table(found.rows)] if found.rows else []
            evaluated += ["\n".join(f"- {task}: {text}." for task, text in found.lost.items())] if found.lost else []
            lines[name] += found.lines
        try:
            rows = tasks_of(path, held_out[name][1])
        except ValueError as error:
            problems.append(f"Scores of eval_tasks are not shown: {error}")
            rows = []
        trained += [f"{lead}`eval_tasks`, in training:", table(rows)] if rows else []
    blocks = [*evaluated, *([BENCHMARKS] if evaluated else []), *trained, *([IN_TRAINING] if trained else [])]
    blocks += [f"**Note.** {problem}" for problem in problems]
    return (["## Benchmarks", *blocks] if blocks else []), lines, [_plain(problem) for problem in problems]


def _answers(signs: Mapping[str, Sequence[Sign]], hurts: Mapping[str, str]) -> list[str]:
    """The section of the branches: what held-out prompts say of them, then the training gaps and the signs in them."""
    several = len(signs) > 1
    held_out = [f"- `{name}`: {text}" if several else text for name, text in hurts.items() if text]
    trained = [f"- `{name}`: {found[0].text}" if several else found[0].text for name, found in signs.items()]
    blocks = ["\n".join(held_out)] if held_out else []
    blocks += [TRAINING, "\n".join(trained)]
    blocks += (
        _side_by_side({name: found[1:-1] for name, found in signs.items()}) if several else _numbers(*signs.values())
    )
    if several:
        blocks.append("The numbers behind the words are at the end of the page, run by run.")
    tried = [sign for found in signs.values() for sign in found if sign.settled and worth(sign.name) != NOT_TRIED]
    blocks += [in_short({sign.name for sign in tried})] if tried else []
    return blocks + ([CAUSES] if any(sign.state == "seen" for sign in tried) else [])


def _side_by_side(signs: Mapping[str, Sequence[Sign]]) -> list[str]:
    """A table of the runs and signs in which something is settled, and one line for what is not."""
    settled = {name: {sign.name: sign.state for sign in found if sign.settled} for name, found in signs.items()}
    columns = [
        sign.name for sign in next(iter(signs.values())) if any(sign.name in found for found in settled.values())
    ]
    rows = [[f"`{name}`", *(found.get(sign, "") for sign in columns)] for name, found in settled.items() if found]
    open_in: dict[str, list[str]] = {}  # signs -> runs
    for name, found in signs.items():
        left = ", ".join(sign.name.lower() for sign in found if not sign.settled)
        open_in.setdefault(left, []).append(f"`{name}`")
    others = [
        left if len(runs) == len(signs) else f"{left} ({', '.join(runs)})" for left, runs in open_in.items() if left
    ]
    return [
        *([table([["run", *columns], *rows])] if rows else []),
        *([f"Not settled: {'; '.join(others)}."] if others else []),
    ]


def _numbers(signs: Sequence[Sign]) -> list[str]:
    """A table of the signs that a run settles, and one line for the others."""
    settled = [sign for sign in signs[1:] if sign.settled]
    unclear = [sign.name.lower() for sign in signs[1:] if sign.state == "unclear"]
    others = [f"{', '.join(unclear)} (too few measured steps, or neither one nor the other)"] if unclear else []
    others += [f"{sign.name.lower()} ({sign.text.rstrip('.')})" for sign in signs[1:] if sign.state == "not measured"]
    rows = [["sign", "in this run", "numbers", "on small models"]]
    rows += [[f"**{sign.name}**", sign.state, sign.text, worth(sign.name)] for sign in settled]
    if all(row[-1] == NOT_TRIED for row in rows[1:]):
        rows = [row[:-1] for row in rows]
    blocks = [table(rows)] if settled else []
    return blocks + ([f"Not settled by this run: {'; '.join(others)}."] if others else [])


def quote(text: str) -> str:
    """A block of a text of others."""
    return "\n".join(f"> {line}" for line in text.splitlines()) or ">"


def to_html(title: str, blocks: Sequence[str], images: Mapping[str, bytes]) -> str:
    """The page as one HTML file with its figures in it. `images` has the PNG of each figure, by the name of its file."""
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")

    def image(renderer: Any, tokens: Sequence[Any], place: int, options: Any, env: Any) -> str:
        data = base64.b64encode(images[str(tokens[place].attrs["src"])]).decode()
        return f'<img alt="{html.escape(tokens[place].content)}" src="data:image/png;base64,{data}">'

    markdown.add_render_rule("image", image)
    parts = []
    for block in blocks:
        if block.startswith(">"):
            text = "\n".join(line[2:] for line in block.splitlines())
            parts.append(f"<blockquote>{html.escape(text)}</blockquote>\n")
        else:
            parts.append(markdown.render(block))
    return HTML.format(title=html.escape(title), body="".join(parts))
