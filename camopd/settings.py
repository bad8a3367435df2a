"""The settings of a run as text, for `--help` and docs/settings.md. They are read from the sources of the classes that
declare them, because importing these takes seconds: torch comes with them."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any


# Old name -> new one; both are fields of the config. The old ones are taken with a warning for one release.
OLD_NAMES = {
    "gap_student": "student_logps",
    "exchange": "rebalance",
    "teacher_patience": "teacher_timeout",
    "score_batch_size": "score_tokens",
}

# Of camopd's own numbers
UNITS = {
    "tokens": "max_completion_length max_prompt_length max_tokens_per_micro_batch loss_prefix_tokens score_tokens "
    "divergence_top_k",
    "rows of a task": "eval_tasks_items",
    "optimizer steps": "max_steps logging_steps save_steps diagnostics_steps relaxed_exploration_steps rollout_lag",
    "seconds": "teacher_timeout teacher_patience",
    "prompts": "prompts_per_step",
    "sequences": "per_device_train_batch_size score_batch_size",
    "share": "mass_target relaxed_entropy_share relaxed_mixture",
    "factor": "scale selectkd_reject_weight",
    "ratio of probabilities": "importance_sampling_low importance_sampling_high",
    "updates": "num_iterations",
    "micro-batches": "gradient_accumulation_steps",
}
PER_BRANCH = ("prompts", "eval_prompts", "teachers", "teacher_prompt", "mass_target", "scale", "score", "selection")
TABLE = "<!-- made by `python -m camopd.settings docs/settings.md` -->"  # before it there, and behind it

# Where the settings are declared, in the order in which they are shown; the first declaration of a name counts.
_DECLARED = (
    ("Prompts", "camopd", "run.py", "PromptArguments"),
    ("Student", "trl", "trainer/model_config.py", "ModelConfig"),
    ("CaMOPD", "camopd", "config.py", "CaMOPDConfig"),
    ("Rollouts and distillation, from TRL (some are refused, with the reason)", "trl", "trainer/distillation_config.py",
     "DistillationConfig"),
    ("", "trl", "trainer/base_config.py", "_BaseConfig"),
    ("Training, from transformers (some are refused, with the reason)", "transformers", "training_args.py",
     "TrainingArguments"),
)  # fmt: skip


def declared() -> Iterator[tuple[str, str, str, str]]:
    """Group, name, default and help of every setting of a run."""
    for group, name, node, constants in _nodes():
        yield group, name, *_default_and_help(node.value, constants)


def may_be_list_or_null(name: str, value: Any) -> bool:
    """Whether a value is a list or null, and one that the setting of that name may have."""
    kinds = (ast.unparse(node.annotation) for _, each, node, _ in _nodes() if each == name)
    return (value is None or isinstance(value, list)) and ("None" if value is None else "list") in next(kinds, "")


@cache
def _nodes() -> list[tuple[str, str, ast.AnnAssign, dict[str, str]]]:
    """Group, name and declaration of every setting, and the constants of the file it is in."""
    nodes = []
    seen: set[str] = set()
    group = ""
    for title, package, file, cls in _DECLARED:
        group = title or group
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.origin is not None
        tree = ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))
        constants = {
            node.targets[0].id: ast.unparse(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
        (body,) = (node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == cls)
        for node in body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id not in seen:
                if "ClassVar" in ast.unparse(node.annotation):
                    continue
                seen.add(node.target.id)
                nodes.append((group, node.target.id, node, constants))
    return nodes


def list_of_settings() -> str:
    """Every setting with its default and what it does, by where it comes from."""
    lines, last = [], ""
    for group, name, default, text in declared():
        if group != last:
            lines += ["", f"{group}:"]
            last = group
        facts = ", ".join(filter(None, facts_of(name, text)))
        lines += textwrap.wrap(
            f"--{name} ({default})  {facts and f'[{facts}] '}{text}",
            118,
            initial_indent="  ",
            subsequent_indent="      ",
            break_long_words=False,
        )
    return "\n".join(lines).strip("\n")


def facts_of(name: str, text: str) -> tuple[str, str, str]:
    """Unit, equations of the paper and "per branch" of a setting with that help, each "" where there is none."""
    unit = next((unit for unit, names in UNITS.items() if name in names.split()), "")
    found = re.findall(r"Eq\. ([\d, and-]+)", text + _docstring().get(name, ""))
    numbers = sorted({int(number) for each in found for number in re.findall(r"\d+", each)})
    equations = f"Eq. {', '.join(map(str, numbers))}" if numbers else ""
    return unit, equations, "per branch" if name in PER_BRANCH else ""


@cache
def _docstring() -> dict[str, str]:
    """What the docstring of `CaMOPDConfig` says of each setting."""
    text = (
        (Path(__file__).parent / "config.py")
        .read_text(encoding="utf-8")
        .partition("Parameters:\n")[2]
        .partition('"""')[0]
    )
    return dict(re.findall(r"^ {8}(\w+) \(.*\):\n((?: {12}.*\n)+)", text, re.MULTILINE))


def table_of_settings() -> str:
    """The settings that are camopd's own, as a table for docs/settings.md."""
    lines = ["| setting | default | unit | equation | per branch | |", "|---|---|---|---|---|---|"]
    for group, name, default, text in declared():
        if group in ("Prompts", "CaMOPD") and name not in OLD_NAMES:
            unit, equation, per_branch = facts_of(name, text)
            shown = default.replace("|", "\\|")
            lines.append(f"| **{name}** | `{shown}` | {unit} | {equation} | {per_branch and 'yes'} | {text} |")
    return "\n".join(lines)


def write_table(path: str) -> None:
    """Bring the table between the two marks of a file up to date."""
    before, _, behind = Path(path).read_text(encoding="utf-8").split(TABLE)
    Path(path).write_text(f"{before}{TABLE}\n\n{table_of_settings()}\n\n{TABLE}{behind}", encoding="utf-8")


@cache
def default_of(name: str) -> Any:
    """The default of a setting, where it is written as a value."""
    return next(ast.literal_eval(default) for _, each, default, _ in declared() if each == name)


@cache
def types() -> dict[str, frozenset[str]]:
    """The names of the types that each setting is declared with, `None` left out."""
    left_out = {"None", "Optional", "Union"}
    return {
        name: frozenset(re.findall(r"\w+", ast.unparse(node.annotation))) - left_out for _, name, node, _ in _nodes()
    }


def keys_of(package: str, file: str, table: str) -> tuple[str, ...]:
    """The keys of a table of texts, read from its source."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    tree = ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))
    (found,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == table and isinstance(node.value, ast.Dict)
    )
    return tuple(str(ast.literal_eval(key)) for key in found.keys if key is not None)


def values_of(package: str, file: str, enumeration: str) -> tuple[str, ...]:
    """The values of an enumeration of texts, read from its source."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    tree = ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))
    (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == enumeration)
    return tuple(str(ast.literal_eval(node.value)) for node in body if isinstance(node, ast.Assign))


def _default_and_help(value: ast.expr | None, constants: dict[str, str]) -> tuple[str, str]:
    if not (isinstance(value, ast.Call) and ast.unparse(value.func).endswith("field")):
        return ("required" if value is None else ast.unparse(value)), ""
    words = {word.arg: word.value for word in value.keywords}
    default = words.get("default", words.get("default_factory"))
    text = ""
    if isinstance(metadata := words.get("metadata"), ast.Dict):
        for key, item in zip(metadata.keys, metadata.values, strict=True):
            if key is not None and ast.unparse(key) == "'help'":
                try:
                    text = str(ast.literal_eval(item))
                except ValueError:  # put together as it runs
                    text = ast.unparse(item)
    shown = "required" if default is None else ast.unparse(default).removeprefix("lambda: ")
    shown = next((literal for name, literal in constants.items() if shown in (name, f"dict({name})")), shown)
    return shown, " ".join(text.split())


if __name__ == "__main__":
    write_table(sys.argv[1])
