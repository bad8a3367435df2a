"""The model card of a run: what was trained from what, and how far it was from its teachers before and after.

TRL's card says that a model was trained; this one says what a reader needs to judge it, from the run's own record. Local
paths are shortened to their names, because the card is for others.
"""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from . import atomic
from .best import history_of_model
from .hub import is_hub_id, public_name
from .measured import HELD_OUT, lines_of, of_history, of_run
from .output_dir import METRICS
from .results import benchmarks_of, table, tasks_of
from .schedule import Schedule
from .teachers.address import OWN_TEACHERS, is_here, names_missing_folder
from .verdict import NOT_MEASURED, verdicts_of
from .version import __version__
from .words import counted


PAPER = {
    "title": "Counteraction-Aware Multi-Teacher On-Policy Distillation for General Capability Recovery with Domain "
    "Preservation",
    "id": "2605.27115",
    "citation": textwrap.dedent("""\
        @article{chen2026camopd,
            title   = {{Counteraction-Aware Multi-Teacher On-Policy Distillation for General Capability Recovery with Domain Preservation}},
            author  = {Tianlei Chen and Jiao Ou and Ziyuan Liu and Ruiming Tang and Jian Liang and Han Li},
            year    = 2026,
            eprint  = {arXiv:2605.27115},
        }"""),  # noqa: E501
}
DATA_CARDS = "data_cards"  # folder in output_dir with the cards of local prompts, a file per branch
_METRICS = "`metrics.jsonl` beside this card has every step; `camopd report` draws it."
_BENCHMARKS = "## Benchmarks"
_OF_EVAL = "Percent, 95 % intervals over items. An item came back or broke where its score is higher or lower after."
_HUB_DATASET = "https://huggingface.co/datasets/"
_LICENCE = re.compile(r"[a-z0-9.+-]+")  # as the Hub names them; it refuses a card with another
# Of `selection`: which samples a branch is trained on, in words.
_SAMPLES = {
    True: "the samples with the largest teacher-student gaps",
    False: "all samples",
    "random": "samples drawn at random",
    "smallest": "the samples with the smallest teacher-student gaps",
}
# What changes the method, and is shown where it is not as in the paper.
_METHOD = (
    "token_rule", "loss_normalization", "branch_weights", "divergence", "baseline", "rollout_lag",
    "importance_sampling_mode", "loss_prefix_tokens", "optimizer_moments",
)  # fmt: skip


@dataclass
class RunFacts:
    """What the card says of a run."""

    args: Any
    schedule: Schedule
    prompts: dict[str, Any]  # datasets by branch
    teachers: dict[str, str]  # names by branch
    student: str  # id or path of the model at the start
    base: str  # that of the model under an adapter, or the same
    is_peft: bool
    step: int
    loaded: int | None  # step of the best checkpoint, where that was loaded at the end
    history: list[dict[str, Any]]  # log entries that are of the model in hand
    hub_model_id: str | None

    @classmethod
    def of(cls, trainer: Any, best: tuple[int | None, int]) -> RunFacts:
        """Those of a trainer; `best` is the step of a checkpoint that was loaded at the end, and the log's length then."""
        from accelerate.utils import is_peft_model
        from trl.trainer.utils import get_config_model_id

        base = get_config_model_id(trainer.model.config) or ""
        return cls(
            args=trainer.args,
            schedule=trainer.schedule,
            prompts=trainer.run.prompts,
            teachers={branch: teacher.name for branch, teacher in trainer.teachers.items()},
            student=trainer.run.student_name or base,
            base=base,
            is_peft=is_peft_model(trainer.accelerator.unwrap_model(trainer.model)),
            step=trainer.state.global_step,
            loaded=best[0],
            history=history_of_model(trainer.state.log_history, *best),
            hub_model_id=trainer.hub_model_id,
        )


def write_model_card(facts: RunFacts, model_name: str, tags: set[str], dataset_name: str | None = None) -> Path:
    """Write `README.md` of `output_dir`, and the data cards it points to. Returns its path.

    `dataset_name` is a dataset beside those of the Hub that the prompts are known to come from.

    Raises `OSError` where the folder cannot be written.
    """
    from huggingface_hub import ModelCard, ModelCardData

    out = Path(facts.args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    sources = {branch: _source(dataset, branch, out) for branch, dataset in facts.prompts.items()}
    datasets = {source for source, _ in sources.values() if is_hub_id(source)}
    datasets |= {dataset_name} if dataset_name else set()
    data = ModelCardData(
        library_name="peft" if facts.is_peft else "transformers",
        model_name=model_name,
        datasets=sorted(datasets) or None,
        tags=sorted({"generated_from_trainer", *tags}),
        **_origin(facts),
    )
    body = [
        f"# {model_name}",
        "",
        f"The specialised model {_model(facts.student)}, trained {_method(facts)}",
        "",
        *_recovery(facts, out),
        *_training_gaps(facts.history, facts.schedule.branches),
        *_tasks(out),
        *_training(facts, sources),
        *_use(facts.hub_model_id or model_name, facts.is_peft, facts.base),
        *_versions(),
        *_citations(PAPER["citation"]),
    ]
    path = out / "README.md"
    atomic.write(path, str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(body))))
    return path


def write_merged_card(run: str | Path, folder: str | Path, name: str | None = None) -> Path:
    """Write `README.md` of a folder with the whole model that a run's adapter was merged into. Returns its path.

    It is the run's card with the name and the use of that model, `name` or that of the folder, without what says that an
    adapter is loaded or leads to files that stay with the run. It has what `camopd eval` has found; data cards are copied.

    Raises `OSError` where the run has no card, or the folder cannot be written.
    """
    from huggingface_hub import ModelCard

    run, folder = Path(run), Path(folder)
    name = name or folder.resolve().name
    title = name.rpartition("/")[2]
    card = ModelCard((run / "README.md").read_text(encoding="utf-8"))
    vars(card.data).update(library_name="transformers", model_name=title)
    before, _, behind = card.text.strip().replace(f"{_METRICS}\n\n", "").partition("## Use\n")
    before = re.sub(r"^# .*", lambda _: f"# {title}", before)
    before = re.sub(r"^(\| trained \| LoRA on .*) \|$", r"\1, merged into it |", before, flags=re.MULTILINE)
    use, versions = "\n".join(_use(name, is_peft=False)), "\n## Versions\n" + behind.partition("## Versions\n")[2]
    folder.mkdir(parents=True, exist_ok=True)
    if (run / DATA_CARDS).is_dir():
        shutil.copytree(run / DATA_CARDS, folder / DATA_CARDS, dirs_exist_ok=True)
    text = _with_benchmarks(f"{before}{use}{versions}", run)
    atomic.write(folder / "README.md", f"---\n{card.data.to_yaml()}\n---\n\n{text}\n")
    return folder / "README.md"


def add_benchmarks(run: str | Path) -> Path:
    """Put what `camopd eval` has found of a run into its card, which was written before that. Returns the card's path.

    Raises `OSError` where the run has no card, and `ValueError` where there are no results of its last model.
    """
    run = Path(run)
    if not any(found.rows for found in benchmarks_of(run)):
        why = " ".join(found.problem for found in benchmarks_of(run))
        raise ValueError(
            why or f"no folder of {str(run)!r} has the eval.json of `camopd eval`. Run it with --out {run / 'eval'}."
        )
    path = run / "README.md"
    atomic.write(path, _with_benchmarks(path.read_text(encoding="utf-8"), run))
    return path


def _origin(facts: RunFacts) -> dict[str, Any]:
    """Licence and base model for the metadata: of a student in a folder what the README there says, or that of its base."""
    from huggingface_hub import metadata_load

    found: dict[str, Any] = {"base_model": facts.base} if is_hub_id(facts.base) else {}
    for name in filter(None, (facts.student, facts.base)):
        try:
            said = metadata_load(Path(name) / "README.md") or {}
        except (OSError, ValueError, yaml.YAMLError, RecursionError):  # a model needs no such file
            continue
        bases, licence = said.get("base_model"), said.get("license")
        bases = [base for base in (bases if isinstance(bases, list) else [bases]) if is_hub_id(str(base))]
        if bases:  # and no path, which says nothing to others
            found.setdefault("base_model", bases[0] if len(bases) == 1 else bases)
        if "license" not in found and _LICENCE.fullmatch(str(licence)):
            found |= {key: said[key] for key in ("license", "license_name", "license_link") if said.get(key)}
    return found


# ------------------------------------------------------------------------------------------------------------- sections


def _method(facts: RunFacts) -> str:
    """How the model was trained, as the end of a sentence."""
    args, schedule = facts.args, facts.schedule
    by_branch: dict[Any, list[str]] = {}
    for branch, selection in args.per_branch("selection").items():
        by_branch.setdefault(selection, []).append(branch)
    samples = " and ".join(
        _SAMPLES[selection] + (f" ({', '.join(branches)})" if len(by_branch) > 1 else "")
        for selection, branches in by_branch.items()
    )
    if len(schedule.branches) == 1:
        toward = "toward its teacher"
    elif not any(len(shares) > 1 for shares in schedule.steps):
        toward = "toward the teacher of each branch in turn"
    elif all(len(shares) == len(schedule.branches) for shares in schedule.steps):
        toward = "toward the teachers of all branches in every step"
    else:
        toward = "toward the teachers of its branches, of several in one step"
    paper = f"[CaMOPD](https://arxiv.org/abs/{PAPER['id']})"
    as_published = toward.endswith("in turn") and list(by_branch) == [True] and not _other_method(args)
    how = f"with {paper}"
    if not as_published:
        how = f"by on-policy distillation with the code of {paper}, in another form than the paper's,"
    return (
        f"{how} to bring its general abilities back and keep its domain: it wrote its own answers, and moved {toward}, on "
        f"{samples}."
    )


def _other_method(args: Any) -> dict[str, str]:
    """The settings of the method that are not as in the paper, with their values."""
    fields = args.__dataclass_fields__
    found = {name: str(getattr(args, name)) for name in _METHOD if getattr(args, name) != fields[name].default}
    return {**found, **({"divergence_top_k": str(args.divergence_top_k)} if args.divergence == "top_k" else {})}


def _recovery(facts: RunFacts, out: Path) -> list[str]:
    """The answer, in words."""
    try:  # nothing may fail any more where the card is written, and the values of single prompts are extra
        lines = lines_of(out / HELD_OUT)
    except ValueError:
        lines = []
    known = of_history(facts.history, lines)
    found = {branch: known.get(branch, []) for branch in facts.schedule.branches} if known else {}
    in_hand = facts.step if facts.loaded is None else facts.loaded
    said = [f"- {verdict.text}" for verdict in verdicts_of(found, in_hand)] or [
        f"{NOT_MEASURED[0].upper()}{NOT_MEASURED[1:]}."
    ]
    note = ["", "Numbers are held-out gaps in nats per token, before → after training, with 95 % intervals."] * bool(
        found
    )
    return ["## Did it recover?", "", *said, *note, ""]


def _training_gaps(history: list[dict[str, Any]], branches: tuple[str, ...]) -> list[str]:
    """Of the first and the last step, where no held-out prompts say more."""
    if any(entry.get(f"eval_{branch}_kl") is not None for entry in history for branch in branches):
        return []
    lines = [
        "## Training gaps",
        "",
        "Mean of student's minus teacher's log-prob over the tokens of a training step, in nats; no held-out prompts "
        "(`eval_prompts`) were measured, so the two steps have different ones.",
        "",
        "| branch | first step | last step |",
        "|---|---|---|",
    ]
    for branch in branches:
        values = [(step["step"], -step[key]) for step in history if step.get(key := f"gap/{branch}/mean") is not None]
        cells = [f"{value:.3f} (step {number})" for number, value in (values[:1] + values[-1:])] or ["none", "none"]
        lines.append(f"| {branch} | {cells[0]} | {cells[-1]} |")
    return [*lines, ""]


def _tasks(out: Path) -> list[str]:
    """Scores of `eval_tasks`, where there are any."""
    try:
        rows = tasks_of(out / METRICS, of_run(out)[1])
    except (OSError, ValueError):  # as above
        rows = []
    note = "`eval_tasks` in training, with 95 % intervals over rows. A row broke whose last score is below its first."
    return ["## Tasks in training", "", table(rows), "", note, ""] if rows else []


def _with_benchmarks(text: str, run: Path) -> str:
    """A card's text with the results of `camopd eval` before its settings, in place of those that it has."""
    section = []
    for found in benchmarks_of(run):
        if found.rows:
            section += [table(found.rows), "", *([found.about, ""] if found.about else [])]
            section += [*(f"- {task}: {text}." for task, text in found.lost.items()), ""] if found.lost else []
    if not section:
        return text
    made = "\n".join([_BENCHMARKS, "", *section, _OF_EVAL, "", ""])
    # A section of that name that somebody has written stays, and so does all that stands behind one of ours.
    ours = re.compile(rf"^{_BENCHMARKS}\n(?:(?!^## ).)*?^{re.escape(_OF_EVAL)}\n+", re.MULTILINE | re.DOTALL)
    without = ours.sub("", text, count=1)
    before, training, behind = without.partition("## Training\n")
    return before + made + training + behind


def _training(facts: RunFacts, sources: Mapping[str, tuple[str, str]]) -> list[str]:
    args = facts.args
    loaded = "" if facts.loaded is None else f"; the weights are those of step {facts.loaded}, the best one"
    rows = {
        "specialised model (the student at the start)": _model(facts.student),
        **{f"{branch} teacher": _model(name) for branch, name in facts.teachers.items()},
        "schedule": f"`{facts.schedule}`",
        "steps": f"{facts.step} of {args.max_steps}, one answer to each of {counted(args.prompts_per_step, 'prompt')}"
        + loaded,
        "learning rate": f"{args.learning_rate:g}, {getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type)}",
        "tokens": f"prompts up to {args.max_prompt_length}, answers up to {args.max_completion_length}, T = 1",
        **{f"`{name}`": f"`{value}`" for name, value in _other_method(args).items()},
        "trained": f"LoRA on {_model(facts.base)}" if facts.is_peft else "all weights",
        "processes": str(args.world_size),
    }
    lines = [
        "## Training",
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
        "",
    ]
    lines += ["| branch | mass target | score | scale | selection | prompts |", "|---|---|---|---|---|---|"]
    settings = {name: args.per_branch(name) for name in ("mass_target", "score", "scale", "selection")}
    for branch in facts.schedule.branches:
        values = [settings[name][branch] for name in ("mass_target", "score", "scale")]
        values[:2] = values[:2] if settings["selection"][branch] else ["-", "-"]
        selection = {True: "on", False: "off"}.get(settings["selection"][branch], settings["selection"][branch])
        lines.append(f"| {branch} | {' | '.join(map(str, values))} | {selection} | {_prompts(*sources[branch])} |")
    return [*lines, "", _METRICS, ""]


def _use(model: str, is_peft: bool, base: str = "") -> list[str]:
    path = is_peft and (is_here(base) or names_missing_folder(base))
    way = "where it is another, load that and then the adapter, by `PeftModel.from_pretrained(base, adapter)` of peft."
    return [
        "## Use",
        "",
        "```python",
        "from transformers import pipeline",
        "",
        f'generator = pipeline("text-generation", model="{model}", device_map="auto")'
        + ("  # needs peft, for the adapter" if is_peft else ""),
        'messages = [{"role": "user", "content": "What does a lighthouse keeper do all day?"}]',
        'print(generator(messages, max_new_tokens=256, return_full_text=False)[0]["generated_text"])',
        "```",
        "",
        *([f"Its `adapter_config.json` names its base, {_model(base)}, by a path: {way}", ""] if path else ()),
    ]


def _versions() -> list[str]:
    import datasets
    import tokenizers
    import torch
    import transformers
    import trl

    modules = (trl, transformers, torch, datasets, tokenizers)
    versions = {"camopd": __version__, **{module.__name__: module.__version__ for module in modules}}
    return [
        "## Versions",
        "",
        ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
        "",
        *_trackers(),
    ]


def _trackers() -> list[str]:
    """Where the run can be watched, as in TRL's cards."""
    from transformers import is_wandb_available
    from trl.trainer.utils import get_comet_experiment_url, get_trackio_space_url

    urls = {"trackio": get_trackio_space_url(), "comet": get_comet_experiment_url()}
    if is_wandb_available():
        import wandb

        urls["W&B"] = wandb.run.url if wandb.run is not None else None
    return [f"[{name}]({url})" for name, url in urls.items() if url]


def _citations(paper: str) -> list[str]:
    trl = (
        "@software{vonwerra2020trl,\n"
        "    title   = {{TRL: Transformers Reinforcement Learning}},\n"
        "    author  = {von Werra, Leandro and Belkada, Younes and Tunstall, Lewis and Beeching, Edward and Thrush, "
        "Tristan and Lambert, Nathan and Huang, Shengyi and Rasul, Kashif and Gallouédec, Quentin},\n"
        "    license = {Apache-2.0},\n"
        "    url     = {https://github.com/huggingface/trl},\n"
        "    year    = {2020}\n"
        "}"
    )
    return ["## Citation", "", "```bibtex", paper, "", trl, "```", ""]


# ---------------------------------------------------------------------------------------------------------------- names


def _model(name: str) -> str:
    """A model as a link to the Hub, or by the last part of its path."""
    which, _, of = name.partition(":")
    if which in OWN_TEACHERS:
        return f"{_model(of)} (`{which}`)"
    return (
        f"[{name}](https://huggingface.co/{name})"
        if is_hub_id(name)
        else f"`{public_name(name) or 'a model in memory'}`"
    )


def _prompts(source: str, card: str) -> str:
    if is_hub_id(source):
        return f"[{source}]({_HUB_DATASET}{source})"
    return f"[{source}]({card})" if card else source


def _source(dataset: Any, branch: str, out: Path) -> tuple[str, str]:
    """Name of a branch's prompts, and where in `out` their data card is: copied, if `camopd data` wrote one beside them."""
    from huggingface_hub import DatasetCard

    count = counted(len(dataset), "prompt") if hasattr(dataset, "__len__") else "a stream of prompts"
    home = str(getattr(dataset.info, "homepage", "") or "")
    if home.startswith(_HUB_DATASET):
        return home.removeprefix(_HUB_DATASET), ""
    if not home or not Path(home).exists():
        return count, ""
    folder = Path(home) if Path(home).is_dir() else Path(home).parent
    name = f"{count} of {Path(home).name}"
    if not (folder / "README.md").is_file():
        return name, ""
    text = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    try:
        card = DatasetCard(text, ignore_metadata_errors=True) if text.startswith("---") else None
        made_here = card is not None and "camopd" in card.data.to_dict().get("tags", [])
    except (ValueError, TypeError, yaml.YAMLError):
        made_here = False
    if not made_here:  # the README of something else
        return name, ""
    (out / DATA_CARDS).mkdir(exist_ok=True)
    atomic.write(out / DATA_CARDS / f"{branch}.md", text)
    return name, f"{DATA_CARDS}/{branch}.md"
