"""The table of completions (`log_completions=True`), with the branch of each: TRL's has none."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from trl.trainer.utils import print_prompt_completions_sample

from .. import atomic
from ..errors import on_all_ranks
from ..run_folder import named_if_unwritten
from ..samples import Sample
from ..step import Step, StepCallback, of_training


class CompletionsTable(StepCallback):
    """Prints some of the latest completions, writes all to `completions/completions_*.parquet`, and sends them where
    metrics go, as TRL does; on the first process, whenever the trainer logs. Those of evaluations: `held_out_*`."""

    def __init__(
        self,
        args: Any,
        processing_class: Any,
        gather: Callable[[list[Any]], list[Any]],
        training: Callable[[], bool],
    ):
        """
        Args:
            args: of the run; as many completions are kept as an optimizer step has.
            processing_class: that decodes them.
            gather: of a list over all ranks.
            training: whether it is a step that rolls out, and not an evaluation.
        """
        self._decode, self._gather, self._training = processing_class.decode, gather, training
        self._rows: deque[tuple[str, str, str]] = deque(maxlen=args.prompts_per_step)
        self._new = False  # whether there are some that are not shown yet
        self._held_out: list[tuple[str, str, str]] = []  # since the latest step, of each branch's latest evaluation
        self._measured: dict[int, tuple[str, str, str]] = {}  # of the evaluation under way, by position

    def on_step_started(self, step: Step) -> None:
        """Held-out completions are those of the weights before it."""
        self._held_out, self._measured = [], {}

    def on_evaluation_started(self, name: str, prompts: int) -> None:
        """What is left of one that has ended in an error is of no use."""
        self._measured = {}

    def on_predict(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A prediction's completions are its caller's."""
        self._measured = {}

    def on_rolled_out(self, samples: list[Sample]) -> None:
        """Take in the samples of all ranks."""
        mine = [
            (
                sample.position,
                (
                    sample.branch,
                    self._text(sample.token_ids[: sample.prompt_len]),
                    self._text(sample.token_ids[sample.prompt_len :]),
                ),
            )
            for sample in samples
        ]
        found = self._gather(mine)
        if self._training():
            self._rows.extend(row for _, row in found)
            self._new = True
            return
        for position, row in found:
            # Data loaders fill up the last batches of the ranks with rows that were there before.
            self._measured.setdefault(position, row)

    def _text(self, ids: list[int]) -> str:
        return self._decode(ids, skip_special_tokens=True)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the table. Called by all ranks, which raise `CaMOPDError` where its file cannot be written."""
        training = of_training(kwargs["logs"])
        if not (self._new if training else self._measured):
            return
        if training:
            self._new = False
        else:
            rows = [row for _, row in sorted(self._measured.items())]
            branches = {branch for branch, _, _ in rows}
            self._held_out = [row for row in self._held_out if row[0] not in branches] + rows
            self._measured = {}
        name, rows = ("completions", list(self._rows)) if training else ("held_out", self._held_out)
        table = pd.DataFrame(rows, columns=["branch", "prompt", "completion"])
        table.insert(0, "step", state.global_step)
        path = Path(args.output_dir) / "completions" / f"{name}_{state.global_step:05d}.parquet"
        with on_all_ranks(self._gather):
            if state.is_world_process_zero:
                _write(table, path)
        if state.is_world_process_zero:
            self._show(args, state.global_step, name, table)

    def _show(self, args: Any, step: int, name: str, table: pd.DataFrame) -> None:
        print_prompt_completions_sample(
            table["prompt"].tolist(), table["completion"].tolist(), {}, None, step, args.num_completions_to_print,
            extra={"branch": table["branch"].tolist()},
        )  # fmt: skip
        shown = table.drop_duplicates(subset=["branch", "prompt"]) if args.log_unique_prompts else table
        for tracker in ("wandb", "trackio"):
            if tracker in (args.report_to or ()):
                backend = __import__(tracker)
                if tracker == "trackio" or backend.run is not None:
                    backend.log({name: backend.Table(dataframe=shown)})


def _write(table: pd.DataFrame, path: Path) -> None:
    content = io.BytesIO()
    table.to_parquet(content)
    with named_if_unwritten(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(path, content.getvalue())
