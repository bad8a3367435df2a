"""`camopd demo`: see demo_words.py."""

from __future__ import annotations

import hashlib
import json
import logging
import shlex
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl
from rich.table import Table
from transformers import set_seed

from .. import atomic
from ..demo_data import BRANCHES, write_prompts
from ..errors import CaMOPDError
from ..eval import page as eval_page
from ..output_dir import METRICS
from ..report import page
from ..verdict import Measured, interval
from ..words import command
from . import demo_stages as stages
from .demo_stages import MODELS, DemoSettings, console
from .demo_words import parse


def demo(argv: list[str]) -> None:
    """The command line of the demo. Raises `CaMOPDError` when the weights are not installed."""
    options = parse(argv)
    run_demo(
        Path(options.output_dir),
        [DemoSettings(seed=options.seed + number) for number in range(options.seeds)],
        options.fresh,
    )


def run_demo(output_dir: Path, runs: list[DemoSettings], fresh: bool = False) -> dict[str, Any]:
    """Run the demo once per settings (one per seed), print the result, and write it to `output_dir`.

    Writes `result.json` and the report, `report.html` and `report.md` with figures such as `gaps.png` and `selection.png`;
    returns what is in `result.json`.
    """
    _quiet()
    if output_dir.exists() and not output_dir.is_dir():
        raise CaMOPDError(f"--output-dir {output_dir} is a file, not a folder. Give another one.")
    if fresh:
        for settings in runs:
            _remove_own(output_dir / f"seed-{settings.seed}")
    write_prompts(output_dir / "prompts")
    try:
        results = [_run_seed(output_dir, settings) for settings in runs]
    except KeyboardInterrupt:
        console.print(
            "\n[bold]Stopped.[/] Run the same command again to go on: finished stages are kept, of fine-tuning what it had "
            f"after every {stages.SAVE_STEPS} steps; other stages start over."
        )
        raise SystemExit(130) from None
    result = results[0]
    if len(results) > 1:
        result = {**result, "seeds": results}
    atomic.write(output_dir / "result.json", json.dumps(result, indent=2) + "\n")
    _print_result(results)
    folders = {f"seed-{run.seed}": output_dir / f"seed-{run.seed}" / "recovered" for run in runs}
    for folder, each in zip(folders.values(), results, strict=True):
        stages.write_held_out(folder, each)
    paths = {name: folder / METRICS for name, folder in folders.items()}
    for line in page.write_report(paths, output_dir, "camopd demo", *_blocks(results)):
        console.print(line, markup=False)
    console.print(f"Report with figures: {output_dir / 'report.html'}, the same in report.md; numbers: result.json")
    console.print("Next: docs/guide.md, a model and a file of your own. A report of this run alone, or of any:")
    last = shlex.quote(str(output_dir / f"seed-{runs[-1].seed}" / "recovered"))
    console.print(f"  {command()} report {last}", markup=False, soft_wrap=True)
    return result


def _run_seed(output_dir: Path, settings: DemoSettings) -> dict[str, Any]:
    """All stages for one seed."""
    folder = output_dir / f"seed-{settings.seed}"
    key = _key(settings)
    if folder.exists() and (not (folder / "key").exists() or (folder / "key").read_text(encoding="utf-8") != key):
        _remove_own(folder)
        console.print(f"Settings, code or libraries changed since {folder} was made: starting over.")
    folder.mkdir(parents=True, exist_ok=True)
    atomic.write(folder / "key", key)
    set_seed(settings.seed)

    models = {
        "general": Path(settings.model or output_dir / "general"),
        "specialised": folder / "specialised",
        "recovered": folder / "recovered",
    }
    _stage(folder, "load", lambda: settings.model or stages.unpack_base_model(models["general"]), models["general"])
    _stage(folder, "specialise", lambda: stages.specialise(models, settings), models["specialised"])
    _stage(folder, "recover", lambda: stages.recover(models, folder / "recover-run", settings), models["recovered"])
    gaps = _stage(folder, "measure", lambda: stages.measure(models, folder / "measure-run", settings))
    checked = _stage(folder, "check", lambda: stages.check(models, settings))
    answers = _stage(folder, "answers", lambda: stages.answers_of(models, settings))
    lost, left = gaps["specialised"]["gap_to_general"]["mean"], gaps["recovered"]["gap_to_general"]["mean"]
    drift, distance = gaps["recovered"]["gap_to_domain"]["mean"], gaps["general"]["gap_to_domain"]["mean"]
    kept = json.loads((folder / "stages.json").read_text(encoding="utf-8"))
    return {
        **gaps,
        "recovered_share": (lost - left) / lost,
        "domain_drift": drift / distance,
        "seconds": {name: stage["seconds"] for name, stage in kept.items()},
        "checked": checked,
        "answers": answers,
        "settings": asdict(settings),
    }


def _stage(folder: Path, name: str, run: Callable[[], Any], made: Path | None = None) -> Any:
    """What a stage returns, from an earlier run where that is kept: in stages.json, and its model, if any, in `made`."""
    path = folder / "stages.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    done = name in kept and (made is None or made.exists())
    console.print(f"[bold]{name}[/]" + ("  (kept from an earlier run)" if done else ""))
    if not done:
        started = time.perf_counter()
        kept[name] = {"result": run(), "seconds": time.perf_counter() - started}
        atomic.write(path, json.dumps(kept, indent=2, ensure_ascii=False) + "\n")
    return kept[name]["result"]


# ------------------------------------------------------------------------------------------------------------ results


def _gap_rows(result: dict[str, Any]) -> list[list[str]]:
    rows = [["model", *(f"to the {branch} teacher, on {branch} prompts ± 95 %" for branch in BRANCHES)]]
    for name in MODELS:
        gaps = [result[name][f"gap_to_{branch}"] for branch in BRANCHES]
        measured = [Measured(0, gap["mean"], gap["standard_error"], gap["prompts"]) for gap in gaps]
        rows.append([name, *(interval(each.kl, each.half) for each in measured)])
    return rows


def _spread_rows(results: list[dict[str, Any]]) -> list[list[str]]:
    return [
        ["seed", "gap brought back", "domain drift"],
        *([str(row["settings"]["seed"]), f"{row['recovered_share']:.0%}", f"{row['domain_drift']:.1%}"] for row in results),
    ]  # fmt: skip


def _summary(result: dict[str, Any]) -> str:
    return (
        f"{result['recovered_share']:.0%} of the lost general gap came back; the domain moved by "
        f"{result['domain_drift']:.1%} of the specialisation distance."
    )


def _print_result(results: list[dict[str, Any]]) -> None:
    result = results[0]
    console.print()
    console.print(_as_table("Held-out sampled gaps, nats per token, ± 95 % interval over prompts", _gap_rows(result)))
    for line in eval_page.summary(result["checked"]):
        console.print(line, markup=False)
    for answer in result["answers"]:
        side_by_side = Table(title=f"{answer['branch']} prompt: {answer['prompt']}", show_lines=True)
        for name in MODELS:
            side_by_side.add_column(name, ratio=1)
        side_by_side.add_row(*(answer[name] for name in MODELS))
        console.print(side_by_side, markup=False)
    if len(results) > 1:
        console.print(_as_table("Spread over seeds", _spread_rows(results)))
    console.print(_summary(result))
    console.print("Seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in result["seconds"].items()))


def _as_table(title: str, rows: list[list[str]]) -> Table:
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in rows[1:]:
        table.add_row(*row)
    return table


def _blocks(results: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """What the demo's report has before and after what every run's has, in blocks of Markdown."""
    result = results[0]
    before = [
        _summary(result),
        "Held-out sampled gaps in nats per token, ± 95 % interval over prompts. A gap is the sampled reverse "
        "KL: how much likelier a model finds its own answers than the teacher does.",
        page.table(_gap_rows(result)),
        f"{stages.CHECKED} short instructions that an answer keeps or does not, as `camopd eval` compares models: start is "
        "the specialised model, result the recovered one; scores are percent ± 95 %.",
        *eval_page.summary(result["checked"]),
        page.table(eval_page.score_rows(result["checked"])),
        page.table(eval_page.change_rows(result["checked"])),
    ]
    after = []
    for answer in result["answers"]:
        after.append(f"## {answer['branch']} prompt: {answer['prompt']}")
        for name in MODELS:
            after += [f"**{name}**", page.quote(answer[name])]
    if len(results) > 1:
        after += ["## Spread over seeds", page.table(_spread_rows(results))]
    rows = [[name, f"{value:.0f}"] for name, value in result["seconds"].items()]
    after += ["## Seconds per stage of the demo", page.table([["stage", "seconds"], *rows])]
    after.append(f"Settings: `{json.dumps(result['settings'])}`")
    return before, after


# ------------------------------------------------------------------------------------------------------------ helpers


def _key(settings: DemoSettings) -> str:
    """Changes when the settings, the prompts, the code or the libraries that make the result change."""
    versions = [torch.__version__, transformers.__version__, trl.__version__]
    digest = hashlib.sha256(json.dumps([asdict(settings), versions], sort_keys=True).encode())
    package = Path(__file__).parent.parent
    for path in sorted([*package.rglob("*.py"), *package.rglob("*.jsonl")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _remove_own(folder: Path) -> None:
    """Remove a seed's folder, if it is one. Raises `CaMOPDError` for a folder that the demo did not make."""
    if not folder.exists():
        return
    if not (folder / "key").is_file():
        raise CaMOPDError(
            f"{folder} is in the way: the demo did not make it and leaves it alone. Give another --output-dir, or move it."
        )
    shutil.rmtree(folder)


def _quiet() -> None:
    """The demo prints what it does; the libraries' warnings about CPUs and deprecations are not about the user."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("trl").setLevel(logging.ERROR)
