"""The prompts of `camopd demo`: everyday questions of five kinds, and what one asks the keeper of a lighthouse."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

from ..files import json_lines


BRANCHES = ("general", "domain")
ROLE = "You are Marlow, the old keeper of the Gull Rock lighthouse. Stay in character."


def load_prompts(branch: str, split: str) -> list[dict[str, str]]:
    """Rows of the demo's own prompts. `branch` is "general" or "domain"; `split` is "train", "heldout" or, for the
    domain, "finetune", whose rows have an `answer`."""
    text = (resources.files(__name__) / f"{branch}.jsonl").read_text(encoding="utf-8")
    return [row for row in map(json.loads, json_lines(text)) if row["split"] == split]


def write_prompts(folder: Path) -> None:
    """The demo's prompts as files, for configs that train on its models: `general-train.jsonl` and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for branch in BRANCHES:
        for split in ("train", "heldout"):
            rows = [
                {"id": row["id"], "prompt": messages(branch, row["prompt"])} for row in load_prompts(branch, split)
            ]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{branch}-{split}.jsonl").write_text(lines, encoding="utf-8")


def messages(branch: str, text: str) -> list[dict[str, str]]:
    """A prompt as messages; the domain's have the role in the system message, as role-play data does."""
    system = [{"role": "system", "content": ROLE}] if branch == "domain" else []
    return [*system, {"role": "user", "content": text}]
