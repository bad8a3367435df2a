"""A YAML file of settings, of which nothing is lost without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from .teachers.address import without_secrets


STRATEGIES = ("eval_strategy", "logging_strategy", "save_strategy")  # "no" is one of their values, and false in YAML


class _Loader(yaml.SafeLoader):
    """A key that comes twice is an error; YAML's own loader takes the last one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if isinstance(key, (str, int, float)) and key in seen:
                raise yaml.YAMLError(f"{key!r} comes twice, in line {key_node.start_mark.line + 1} again")
            seen |= {key} if isinstance(key, (str, int, float)) else set()
        found: dict[Any, Any] = super().construct_mapping(node, deep)  # type: ignore[no-untyped-call]
        return found


def read_config(config: str) -> dict[str, Any]:
    """Settings by name. Raises `ValueError` for a file that cannot be read or is no mapping, and for what it would lose."""
    try:
        settings = yaml.load(Path(config).read_text(encoding="utf-8"), _Loader)
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
