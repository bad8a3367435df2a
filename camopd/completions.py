"""The table of completions (`log_completions=True`), with the branch of each: TRL's has none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from trl.trainer.utils import print_prompt_completions_sample


def log_completions(args: Any, columns: Mapping[str, Sequence[str]], step: int) -> None:
    """Print some completions, write all to `completions/completions_*.parquet`, and send them where metrics go, as TRL
    does. `columns` are `branch`, `prompt` and `completion`, in equal order. Called by the main process."""
    table = pd.DataFrame({"step": step, **{name: list(values) for name, values in columns.items()}})
    print_prompt_completions_sample(
        table["prompt"].tolist(), table["completion"].tolist(), {}, None, step, args.num_completions_to_print,
        extra={"branch": table["branch"].tolist()},
    )  # fmt: skip
    folder = Path(args.output_dir) / "completions"
    folder.mkdir(parents=True, exist_ok=True)
    table.to_parquet(folder / f"completions_{step:05d}.parquet")
    shown = table.drop_duplicates(subset=["branch", "prompt"]) if args.log_unique_prompts else table
    for name in ("wandb", "trackio"):
        if name in (args.report_to or ()):
            backend = __import__(name)
            if name == "trackio" or backend.run is not None:
                backend.log({"completions": backend.Table(dataframe=shown)})
