"""A YAML file of settings, of which nothing is lost without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from .teachers.address import without_secrets


STRATEGIES = ("eval_strategy", "logging_strategy", "save_strategy")  # "no" is one of their values, and false in YAML


def read_config(config: str) -> dict[str, Any]:
    """Settings by name. Raises `ValueError` for a file that cannot be read or is no mapping, and for what it would lose."""
    try:
        text = Path(config).read_text(encoding="utf-8")
        _refuse_doubles(yaml.compose(text, Loader=yaml.SafeLoader), set())
        settings = yaml.safe_load(text)
    except OSError as error:
        raise ValueError(
            f"the config {config!r} cannot be read: {error.strerror}. Give the path of a YAML file."
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"the config {config!r} is not UTF-8: {error}. Save it as UTF-8.") from None
    except yaml.YAMLError as error:
        tab = "\nIndent with spaces, not with tabs." if "\\t" in str(error) else ""
        text = str(error).replace("<unicode string>", config)
        raise ValueError(f"the config {config!r} is not valid YAML: {text}{tab}") from None
    if not isinstance(settings, dict):
        raise ValueError(
            f"the config {config!r} must be a mapping from settings to values, got {without_secrets(repr(settings))}."
        )
    return settings | {name: "no" for name in STRATEGIES if settings.get(name) is False}


def _refuse_doubles(node: Any, seen: set[int]) -> None:
    """Raise `YAMLError` for a key that comes twice in a mapping, of which YAML takes the last one. `seen`: ids of nodes
    that were looked at, which may contain each other."""
    if id(node) in seen or not isinstance(node, yaml.CollectionNode):
        return
    seen.add(id(node))
    pairs = node.value if isinstance(node, yaml.MappingNode) else [(None, each) for each in node.value]
    keys = set()
    for key, value in pairs:
        if isinstance(key, yaml.ScalarNode):
            if (key.tag, key.value) in keys:
                raise yaml.YAMLError(
                    f"{key.value!r} comes twice, in line {key.start_mark.line + 1} again: leave one out"
                )
            keys.add((key.tag, key.value))
        _refuse_doubles(value, seen)
