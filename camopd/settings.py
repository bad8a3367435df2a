"""The settings of a run as text, for `--help`. They are read from the sources of the classes that declare them, because
importing these takes seconds: torch comes with them."""

from __future__ import annotations

import ast
import importlib.util
import textwrap
from collections.abc import Iterator
from pathlib import Path


# Old name -> new one; both are fields of the config. The old ones are taken with a warning for one release.
OLD_NAMES = {
    "gap_student": "student_logps",
    "exchange": "rebalance",
    "teacher_patience": "teacher_timeout",
    "score_batch_size": "score_tokens",
}

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
                yield group, node.target.id, *_default_and_help(node.value, constants)


def list_of_settings() -> str:
    """Every setting with its default and what it does, by where it comes from."""
    lines, last = [], ""
    for group, name, default, text in declared():
        if group != last:
            lines += ["", f"{group}:"]
            last = group
        lines += textwrap.wrap(
            f"--{name} ({default})  {text}",
            118,
            initial_indent="  ",
            subsequent_indent="      ",
            break_long_words=False,
        )
    return "\n".join(lines).strip("\n")


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
