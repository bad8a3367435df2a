"""Two small models tutor each other (camopd/co_distill.py, OPCoD), against what each part of it is for.

    OMP_NUM_THREADS=1 PYTHONPATH=benchmarks python -m testbed.tutors [--seeds 5] [--out FOLDER]
    PYTHONPATH=benchmarks python -m testbed.tutors --tables     # run nothing: the report of the runs that are there

Both models have six skills under their names (`rev abc=`). A task can also come under a code, `k3 abc=`: each model knows
the codes of three of the skills and guesses at those of the other three. So feedback of one word, the skill's name, is all
that a peer has to say, and the student can use it: it has learned that `rev.k3 abc=` asks for `rev`. The peer says it
when asked `k3 abc.`; of codes that it does not know it says something, too, which is what the gate is for; and in a third
of the cases it adds the answer to the name, which is what anchoring is for.

Arms: all of it; without feedback; without the gate; without anchoring; and one-way distillation, in which the peer's own
log-probs teach its codes and the student as it was keeps the others. Each arm's learning rate is the one of `RATES` with
the highest accuracy over all codes on seed 0, which is not in the table. All have `divergence: top_k`, with 20 of the 51
tokens: with the sampled gap the same steps moved less. A run is one file, and is not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import decoders

from camopd import CaMOPDConfig, CaMOPDTrainer, atomic
from camopd.co_distill import BRANCH, Problem, Student, Tutoring, Wording, co_distill
from camopd.verdict import t_quantile

from .models import Size, fit, load_or_make, make_general, make_tokenizer, right
from .skills import SKILLS, Item


OUT = Path(__file__).parent.parent / "results" / "tutors"
MODELS = Path(__file__).parent.parent.parent / "build" / "tutors"
CODES = {"copy": "k3", "rev": "m7", "sort": "p1", "shift": "q8", "last": "t5", "dup": "w2"}
SIDES = {"a": ("copy", "rev", "sort"), "b": ("shift", "last", "dup")}  # whose codes each model knows
LETTERS, WORDS = "abcdefghij", (3, 4)
WORDING = Wording(ask="{prompt}.", correct="{correct}+", feedback="{feedback}.")
ARMS = {
    "opcod": Tutoring(max_answer=9, max_feedback=14, wording=WORDING),
    "no feedback": Tutoring(feedback=False, max_answer=9, wording=WORDING),
    "no gate": Tutoring(threshold=0.0, max_answer=9, max_feedback=14, wording=WORDING),
    "no anchor": Tutoring(anchored=False, max_answer=9, max_feedback=14, wording=WORDING),
    "one way": None,
}  # fmt: skip
RATES = (5e-5, 1e-4)
ROUNDS, STEPS, PROMPTS, PROBLEMS = 6, 12, 32, 96  # steps of a round, prompts of a step, problems of a round
PER_SKILL = 100  # items that a code is measured on
_OFF = ("degenerate", "truncated", "zero_gap", "entropy")  # guards: answers of three letters look alike


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--tables", action="store_true", help="run nothing")
    options = parser.parse_args()
    if options.tables:
        return write(options.out, {}, options.seeds)
    (options.out / "runs").mkdir(parents=True, exist_ok=True)
    MODELS.mkdir(parents=True, exist_ok=True)
    start = load_or_make(MODELS / "start", make_start)
    pairs = {side: load_or_make(MODELS / side, lambda side=side: make_master(start, side)) for side in SIDES}
    chosen = chosen_rates(options.out, pairs)
    for seed in range(1, options.seeds + 1):
        for arm in ARMS:
            _run(options.out, pairs, arm, chosen[arm], seed)
    write(options.out, pairs, options.seeds)


def chosen_rates(out: Path, pairs: dict[str, Any]) -> dict[str, float]:
    """By arm the rate with the highest accuracy over all codes on seed 0."""
    return {arm: max(RATES, key=lambda rate, arm=arm: _all(_run(out, pairs, arm, rate, 0))) for arm in ARMS}


def write(out: Path, pairs: dict[str, Any], seeds: int) -> None:
    """tutors.md. Without models it takes files of all runs."""
    text = "\n".join(table(out, pairs, chosen_rates(out, pairs), seeds)) + "\n"
    atomic.write(out / "tutors.md", text)
    print(text)


# ------------------------------------------------------------------------------------------------------------- the models


def word(draw: random.Random) -> str:
    """Of three or four letters."""
    return "".join(draw.choice(LETTERS) for _ in range(draw.randint(*WORDS)))


def coded(draw: random.Random, skill: str) -> Item:
    """A task under its skill's code."""
    given = word(draw)
    return Item(skill, f"{CODES[skill]} {given}=", SKILLS[skill](given))


def _context(draw: random.Random) -> Item:
    """A task under any code behind the name of its skill, behind its answer, or behind both: the context decides."""
    skill, code, given = draw.choice(list(CODES)), draw.choice(list(CODES.values())), word(draw)
    answer = SKILLS[skill](given)
    before = draw.choice((f"{skill}.", f"{answer}+", f"{skill}.{answer}+"))
    return Item(skill, f"{before}{code} {given}=", answer)


def _any(draw: random.Random, codes: Sequence[str]) -> Item:
    """A task under a code that says nothing."""
    given, skill = word(draw), draw.choice(list(CODES))
    return Item(skill, f"{draw.choice(codes)} {given}=", SKILLS[skill](given))


def _named(draw: random.Random) -> Item:
    given, skill = word(draw), draw.choice(list(CODES))
    return Item(skill, f"{skill} {given}=", SKILLS[skill](given))


def _asked(draw: random.Random, skill: str) -> Item:
    """Which skill a code stands for; a third of the answers say more than they should."""
    item = coded(draw, skill)
    return Item(skill, f"{item.prompt}.", skill + (f" {item.answer}" if draw.random() < 1 / 3 else ""))


def make_start() -> Any:
    """What both models are made from: all skills by name, contexts that decide, and codes that say nothing yet."""
    draw, size = random.Random(11), Size()
    kinds = (_named, _context, lambda draw: _any(draw, list(CODES.values())))
    items = [draw.choices(kinds, (5, 4, 1))[0](draw) for _ in range(size.steps * size.batch)]
    model = make_general(Size(steps=0), _say)
    return fit(model, items, size.batch, 3e-3, _say)


def make_master(start: Any, side: str) -> Any:
    """The start, which then learns three of the codes, and to say what they stand for."""
    draw, own = random.Random(side), SIDES[side]
    others = [code for skill, code in CODES.items() if skill not in own]
    kinds = (
        lambda draw: coded(draw, draw.choice(own)), lambda draw: _asked(draw, draw.choice(own)), _context, _named,
        lambda draw: _any(draw, others),
    )  # fmt: skip
    items = [draw.choices(kinds, (3, 2, 3, 1, 1))[0](draw) for _ in range(500 * 128)]
    return fit(copy.deepcopy(start), items, 128, 1e-3, _say)


# --------------------------------------------------------------------------------------------------------------- the runs


def _run(out: Path, pairs: dict[str, Any], arm: str, rate: float, seed: int) -> dict[str, Any]:
    """What an arm comes to, from its file where it is there."""
    path = out / "runs" / f"{arm.replace(' ', '_')}-{rate:g}-{seed}.json"
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    if not pairs:
        sys.exit(f"{path} is not there; without --tables it is made.")
    started = time.perf_counter()
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    students = tuple(
        Student(side, copy.deepcopy(model).requires_grad_(True), tokenizer, batch=256) for side, model in pairs.items()
    )
    before = {student.name: measure(student.model) for student in students}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):

        def config(name: str, number: int, schedule: str = BRANCH, steps: int = STEPS) -> CaMOPDConfig:
            return CaMOPDConfig(
                output_dir=f"{folder}/{name}-{number}", use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
                save_strategy="no", gradient_checkpointing=False, max_steps=steps, prompts_per_step=PROMPTS,
                per_device_train_batch_size=PROMPTS, max_completion_length=9, max_prompt_length=48, diagnostics_steps=0,
                logging_steps=10**6, seed=1000 * seed + number, learning_rate=rate, guards=dict.fromkeys(_OFF),
                lr_scheduler_type="constant", schedule=schedule, divergence="top_k",
            )  # fmt: skip

        if ARMS[arm] is None:
            lines = _one_way(students, pairs, config, seed)
        else:
            lines = co_distill(students, lambda number: ask(seed, number), is_right, config, ROUNDS, ARMS[arm])
    after = {student.name: measure(student.model) for student in students}
    found = {
        "arm": arm, "learning_rate": rate, "seed": seed, "before": before, "after": after, "lines": lines,
        "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip
    atomic.write(path, json.dumps(found) + "\n")
    _say(f"{path.stem}: {found['seconds']} s, all codes {_all(found):.3f}")
    return found


def ask(seed: int, number: int) -> list[Problem]:
    """The problems of a round: as many of each skill."""
    draw, names = random.Random(f"{seed}-{number}"), tuple(CODES)
    items = [coded(draw, names[place % len(names)]) for place in range(PROBLEMS)]
    return [Problem(item.prompt, item.answer, names) for item in items]


def is_right(problem: Problem, text: str) -> bool:
    """Exactly the answer."""
    return text == problem.answer


def _one_way(students: Sequence[Student], pairs: dict[str, Any], config: Any, seed: int) -> list[dict[str, Any]]:
    """The peer as it was teaches its codes, the student as it was keeps its own, in turn; as many steps and prompts."""
    problems = [problem for number in range(ROUNDS) for problem in ask(seed, number)]
    for student, peer in zip(students, reversed(students), strict=True):
        known = {CODES[skill] for skill in SIDES[peer.name]}
        rows: dict[str, list[str]] = {"own": [], "other": []}
        for problem in problems:
            rows["other" if problem.prompt.split()[0] in known else "own"].append(problem.prompt)
        CaMOPDTrainer(
            model=student.model, teachers={"other": pairs[peer.name], "own": pairs[student.name]},
            args=config(student.name, 0, "other:1,own:1", ROUNDS * STEPS),
            train_dataset={branch: Dataset.from_dict({"prompt": prompts}) for branch, prompts in rows.items()},
            processing_class=student.tokenizer,
        ).train()  # fmt: skip
    return []


def measure(model: Any) -> dict[str, str]:
    """Which greedy answers are right, 1 or 0 for each, by skill under its code, and by name under `named`; always the same
    items."""
    draw = random.Random("measure")
    items = {skill: [coded(draw, skill) for _ in range(PER_SKILL)] for skill in CODES}
    items["named"] = [_named(draw) for _ in range(PER_SKILL)]
    return {name: "".join("01"[mark] for mark in right(model, of)) for name, of in items.items()}


# -------------------------------------------------------------------------------------------------------------- the table


def _share(found: dict[str, str], skills: Sequence[str]) -> float:
    marks = "".join(found[skill] for skill in skills)
    return marks.count("1") / len(marks)


def _all(found: dict[str, Any], when: str = "after") -> float:
    return sum(_share(found[when][side], tuple(CODES)) for side in SIDES) / len(SIDES)


def outcomes(found: dict[str, Any], when: str) -> dict[str, float]:
    """Means over both models: own codes, the peer's, skills by name, and the share of what was right that is wrong now."""
    values: dict[str, list[float]] = {"own codes": [], "peer's codes": [], "by name": [], "broken": []}
    for side, own in SIDES.items():
        others = tuple(skill for skill in CODES if skill not in own)
        values["own codes"].append(_share(found[when][side], own))
        values["peer's codes"].append(_share(found[when][side], others))
        values["by name"].append(_share(found[when][side], ("named",)))
        was, now = ("".join(found[at][side][skill] for skill in CODES) for at in ("before", when))
        broken = sum(before == "1" and after == "0" for before, after in zip(was, now, strict=True))
        values["broken"].append(broken / max(1, was.count("1")))
    return {name: sum(of) / len(of) for name, of in values.items()}


def table(out: Path, pairs: dict[str, Any], chosen: dict[str, float], seeds: int) -> list[str]:
    """The report over seeds 1 to `seeds`."""
    names = ["own codes", "peer's codes", "by name", "broken"]
    runs = {arm: [_run(out, pairs, arm, chosen[arm], seed) for seed in range(1, seeds + 1)] for arm in ARMS}
    start = outcomes(runs["opcod"][0], "before")
    lines = [
        "# Two small models that tutor each other",
        "",
        "Share of right greedy answers, mean over both models, ± the half width of a 95 % interval (Student's t) over "
        f"{seeds} seeds. Before and after {ROUNDS} rounds of {STEPS} steps of {PROMPTS} prompts each. Each arm's learning "
        f"rate is the better of {' and '.join(f'{rate:g}' for rate in RATES)} on seed 0.",
        "",
        "| | learning rate | " + " | ".join(names) + " |",
        "|---" * (len(names) + 2) + "|",
        "| before | | " + " | ".join(f"{start[name]:.3f}" for name in names) + " |",
    ]
    for arm, found in runs.items():
        each = [outcomes(run, "after") for run in found]
        cells = [_with_interval([one[name] for one in each]) for name in names]
        lines.append(f"| {arm} | {chosen[arm]:g} | " + " | ".join(cells) + " |")
    lines += ["", "Each model apart, all six codes, its own and the peer's, before and after:", ""]
    lines += ["| | " + " | ".join(f"model {side}" for side in SIDES) + " |", "|---" * (len(SIDES) + 1) + "|"]
    before = [f"{_share(runs['opcod'][0]['before'][side], tuple(CODES)):.3f}" for side in SIDES]
    lines.append("| before | " + " | ".join(before) + " |")
    for arm, found in runs.items():
        cells = [_with_interval([_share(run["after"][side], tuple(CODES)) for run in found]) for side in SIDES]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    lines += ["", "Difference to `opcod`, paired by seed:", ""]
    compared = [name for name in names if name != "by name"]
    lines += ["| | " + " | ".join(compared) + " |", "|---" * (len(compared) + 1) + "|"]
    whole = [outcomes(run, "after") for run in runs["opcod"]]
    for arm, found in runs.items():
        if arm != "opcod":
            both = [(outcomes(run, "after"), full) for run, full in zip(found, whole, strict=True)]
            cells = [_with_interval([one[name] - full[name] for one, full in both], signed=True) for name in compared]
            lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    lines += ["", "Feedback in the first round and in the last, of both students over all seeds:", ""]
    lines += ["| | round | problems | answer wrong | gate open | feedback kept | rows |", "|---" * 7 + "|"]
    for arm, found in runs.items():
        for number in (0, ROUNDS - 1):
            of = [line for run in found for line in run["lines"] if line["round"] == number]
            if of:
                keys = ("problems", "need", "open", "kept", "rows")
                lines.append(
                    f"| {arm} | {number} | " + " | ".join(str(sum(line[key] for line in of)) for key in keys) + " |"
                )
    return lines


def _with_interval(values: Sequence[float], signed: bool = False) -> str:
    mean = sum(values) / len(values)
    text = f"{mean:+.3f}" if signed else f"{mean:.3f}"
    if len(values) < 2:
        return text
    spread = (sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values)) ** 0.5
    return f"{text} ± {t_quantile(len(values) - 1) * spread:.3f}"


def _say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, flush=True)


if __name__ == "__main__":
    main()
