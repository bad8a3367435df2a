"""`camopd report`: what metrics.jsonl says, as one HTML page, one Markdown page and figures, for one run or several."""

from __future__ import annotations

import argparse
from pathlib import Path


def report(argv: list[str]) -> None:
    """The command line. Raises what `metrics_file` and `write_report` raise."""
    parser = argparse.ArgumentParser(
        prog="camopd report", description="Figures of one run or several, and which of its branches is hurting."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output_dir of a run, or a metrics.jsonl")
    parser.add_argument("--out", help="folder for the pages and figures (default: report/ in the first RUN)")
    options = parser.parse_args(argv)

    from ..report.read import metrics_file, names_of

    paths = [metrics_file(run) for run in options.runs]
    from ..report.page import write_report  # a second, which a folder without a run need not wait for

    out = Path(options.out) if options.out else paths[0].parent / "report"
    for line in write_report(dict(zip(names_of(paths), paths, strict=True)), out):
        print(line)
    print(f"{out / 'report.html'}, and the same in report.md")
