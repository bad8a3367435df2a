"""Two (or more) prompt streams, dealt optimizer step by optimizer step as the schedule says.

`StepDataset` is the trainer's training set: item `t` holds this rank's rows of optimizer step `t`, all of them, each
with its branch in the column `branch`. What a step gets is a pure function of the step, so a resumed run sees the
prompts that an undisturbed one would have seen.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader, SequentialSampler
from torch.utils.data import Dataset as TorchDataset

from .files import with_prompts
from .messages import (
    COLUMNS,
    MOST_BYTES,
    check_text,
    ending,
    read_prompt,
    read_row,
    render,
    tokenize,
    without_answer,
)
from .schedule import Schedule
from .special_tokens import SpecialTokens
from .tokens import check_known


logger = logging.getLogger(__name__)

SHUFFLE_BUFFER = 1000  # rows an IterableDataset is shuffled within


class PromptStream:
    """One branch's endless row of prompts: epoch after epoch, each in its own order.

    A map-style `Dataset` is permuted whole in every epoch; an `IterableDataset` within a buffer of 1000 rows. A step
    that reaches the end of an epoch goes on in the next one, so it always gets as many rows as it asks for.
    """

    def __init__(
        self, dataset: Dataset | IterableDataset, branch: str, seed: int, shuffle: bool = True, prefill: bool = False
    ):
        dataset = prompts_of(dataset, branch)
        check_prompts(dataset, branch, prefill)
        self.dataset, self._prefill = dataset, prefill
        self.branch = branch
        # Its own seed: the same dataset in two branches must not come in the same order.
        self.seed = seed + int.from_bytes(hashlib.sha256(branch.encode()).digest()[:4], "big")
        self.shuffle = shuffle
        self._order: tuple[int, torch.Tensor] | None = None  # (epoch, permutation) in use
        self._rows: Iterator[dict[str, Any]] | None = None  # reader of an IterableDataset...
        self._next = 0  # ... and the draw it stands at

    def draw(self, draws: range) -> Iterator[dict[str, Any]]:
        """The rows of the given draws, counted from the start of training. An IterableDataset skips forward to them."""
        if isinstance(self.dataset, Dataset):
            for draw in draws:
                index = self._index(draw)
                yield self._row(self.dataset[index], index)
            return
        if self._rows is None or draws.start < self._next:
            self._rows, self._next = self._read(), 0
        while self._next < draws.stop:
            row = next(self._rows)
            self._next += 1
            if self._next - 1 in draws:
                yield self._row(row)

    def some(self, count: int) -> Iterator[dict[str, Any]]:
        """Evenly spaced rows of a `Dataset`, the first ones of an `IterableDataset`, at most `count`. Raises as `draw`."""
        if isinstance(self.dataset, Dataset):
            for index in range(0, len(self.dataset), -(-len(self.dataset) // count)):
                yield self._row(self.dataset[index], index)
            return
        empty = True
        for row in self.dataset.take(count):
            empty = False
            yield self._row(row)
        if empty:
            raise ValueError(_no_rows(self.branch))

    def _index(self, draw: int) -> int:
        epoch, place = divmod(draw, len(self.dataset))
        if not self.shuffle:
            return place
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._order = (epoch, torch.randperm(len(self.dataset), generator=generator))
        return int(self._order[1][place])

    def _read(self) -> Iterator[dict[str, Any]]:
        dataset = self.dataset.shuffle(seed=self.seed, buffer_size=SHUFFLE_BUFFER) if self.shuffle else self.dataset
        epoch = 0
        while True:
            if self.shuffle:  # without, set_epoch would still permute the shards
                dataset.set_epoch(epoch)
            empty = True
            for row in dataset:
                empty = False
                yield row
            if empty:
                raise ValueError(_no_rows(self.branch))
            epoch += 1

    def _row(self, row: dict[str, Any], index: int | None = None) -> dict[str, Any]:
        name = row_name(self.branch, index, self.dataset)
        if index is None:  # a stream may not know its columns beforehand
            if row.get("image") is not None or row.get("images"):
                raise ValueError(f"{name} brings an image: {_NO_IMAGES}")
            name += f" with columns {sorted(row)}"
        return {**named(partial(read_prompt, prefill=self._prefill), {**row, "row": name}), "branch": self.branch}


class StepDataset(TorchDataset):
    """This rank's rows of every optimizer step.

    The step's global batch is the same list for every number of ranks: the branches' rows one after the other. Rank `r`
    of `world_size` takes places `r`, `r + world_size`, ..., so that a mixed step gives every rank a mixed share. The
    place travels in the column `position`; selection breaks ties by it.

    `transformers.Trainer` asks for one item per micro-step. Item `t * micro_steps` holds all rows of optimizer step `t`,
    because rollouts are made and ranked for the whole step at once; the items between are empty lists.
    """

    def __init__(
        self,
        streams: dict[str, PromptStream],
        schedule: Schedule,
        rows_per_step: int,
        num_steps: int,
        micro_steps: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.streams, self.schedule, self.rank, self.world_size = streams, schedule, rank, world_size
        self.rows_per_step, self.num_steps, self.micro_steps = rows_per_step, num_steps, micro_steps
        self._latest: tuple[int, list[dict[str, Any]]] = (-1, [])  # a step and its rows

    def __len__(self) -> int:
        return self.num_steps * self.micro_steps

    def __getitem__(self, item: int) -> list[dict[str, Any]]:
        if not 0 <= item < len(self):
            raise IndexError(item)
        step, micro_step = divmod(item, self.micro_steps)
        return self.rows_of(step) if micro_step == 0 else []

    def rows_of(self, step: int) -> list[dict[str, Any]]:
        """This rank's rows of optimizer step `step`, in the order of their places in the global batch."""
        if step == self._latest[0]:  # asked for twice with a lag, and a stream would be read from its start
            return [{**row} for row in self._latest[1]]
        drawn = self.schedule.rows_before(step, self.rows_per_step)
        rows: list[dict[str, Any]] = []
        position = 0  # of the branch's first row in the global batch
        for branch, count in self.schedule.rows(step, self.rows_per_step).items():
            first = (self.rank - position) % self.world_size  # this rank's first row within the branch
            draws = range(drawn[branch] + first, drawn[branch] + count, self.world_size)
            for place, row in enumerate(self.streams[branch].draw(draws)):
                rows.append({**row, "position": position + first + place * self.world_size})
            position += count
        self._latest = step, rows
        return [{**row} for row in rows]


def one_item_per_micro_step(dataset: StepDataset, args: Any) -> DataLoader:
    """A loader whose items are this rank's own already: nothing in them is left for accelerate to shard or move."""
    return DataLoader(
        dataset, batch_size=1, sampler=SequentialSampler(dataset), collate_fn=_only_item,
        num_workers=args.dataloader_num_workers, prefetch_factor=args.dataloader_prefetch_factor,
        persistent_workers=args.dataloader_persistent_workers,
        multiprocessing_context=args.dataloader_multiprocessing_context,
    )  # fmt: skip


def _only_item(items: list[Any]) -> Any:
    return items[0]


class HeldOut(dict[str, Dataset | list[dict[str, Any]]]):
    """Held-out prompts by branch: a `Dataset`, or the rows of a stream. Each row has its branch and its position.

    TRL's callbacks (`LogCompletionsCallback`, `WeaveCallback`) take an `eval_dataset` for a single table: `["prompt"]` has
    the prompts of all branches in turns, and `select(range(8))` the first eight of them.
    """

    def __missing__(self, key: str) -> list[Any]:
        if key != "prompt":
            raise KeyError(key)
        return list(self._prompts())

    def select(self, indices: Iterable[int]) -> dict[str, list[Any]]:
        """Some of the prompts of all branches, under the key `prompt`."""
        wanted = list(indices)
        prompts = list(itertools.islice(self._prompts(), max(wanted, default=-1) + 1))
        return {"prompt": [prompts[index] for index in wanted]}

    def _prompts(self) -> Iterator[Any]:
        for rows in itertools.zip_longest(*self.values()):
            yield from (row["prompt"] for row in rows if row is not None)


def held_out(datasets: Any, schedule: Schedule, argument: str, prefill: bool = False) -> HeldOut:
    """Held-out prompts in any of the forms a user may pass, by branch. A stream is read to its end.

    Args:
        datasets: a mapping from branches to `Dataset` or `IterableDataset`, a `Dataset` with a column `branch`, or, where
            the schedule has one branch, that branch's prompts.
        argument: its name, for messages.
        prefill: as the config has it.

    Raises `TypeError` or `ValueError` for prompts without a branch, of a branch that is not in the schedule, or that
    `check_prompts` refuses.
    """
    if isinstance(datasets, Dataset) and "branch" in datasets.column_names:
        datasets = datasets if datasets.format["type"] == "custom" else datasets.with_format(None)
        places: dict[str, list[int]] = {}
        for place, branch in enumerate(datasets["branch"]):
            places.setdefault(branch, []).append(place)
        datasets = {branch: datasets.select(rows) for branch, rows in places.items()}
    elif isinstance(datasets, (Dataset, IterableDataset)) and len(schedule.branches) == 1:
        datasets = {schedule.branches[0]: datasets}
    if not isinstance(datasets, dict):
        raise TypeError(
            f"{argument} must map branches to held-out prompts, got {type(datasets).__name__}. The teacher that scores a "
            f"prompt is that of its branch. Pass {{{schedule.branches[0]!r}: dataset}}, or a Dataset with a column "
            "'branch'."
        )
    marked = HeldOut()
    for branch, dataset in datasets.items():
        if branch not in schedule.branches:
            raise ValueError(
                f"{argument} has branch {branch!r}, which is not in schedule {str(schedule)!r}; its branches are "
                f"{list(schedule.branches)}."
            )
        dataset = prompts_of(dataset, branch)
        check_prompts(dataset, branch, prefill)
        if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":  # it knows no new columns
            dataset = Dataset.from_list(list(dataset))
        marked[branch] = mark(dataset, branch, prefill)
    return marked


def prompts_of(dataset: Any, branch: str) -> Any:
    """The dataset, its column `messages` as `prompt` where it has no other: what stands before the answer, as in YAML."""
    if isinstance(dataset, Dataset) and dataset.format["type"] not in (None, "custom"):
        dataset = dataset.with_format(None)  # tensors, arrays and tables, which are no texts
    columns = dataset.column_names if isinstance(dataset, (Dataset, IterableDataset)) else None
    if columns is None or "prompt" in columns or "messages" not in columns:
        return dataset
    if isinstance(dataset, Dataset):
        return with_prompts(dataset, "messages", None, f"the prompts of branch {branch!r}").remove_columns("messages")
    return dataset.map(without_answer, remove_columns="messages")


def check_prompts(dataset: Any, branch: str, prefill: bool = False) -> None:
    """Raise `TypeError` or `ValueError` unless `dataset` can feed a branch. Reads nothing of an IterableDataset."""
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise TypeError(
            f"the prompts of branch {branch!r} must be a datasets.Dataset or datasets.IterableDataset, got "
            f"{type(dataset).__name__}. "
            + (
                f"Choose one of its splits: dataset[{next(iter(dataset), 'train')!r}]."
                if isinstance(dataset, dict)  # a DatasetDict, too
                else "A list of rows becomes one with datasets.Dataset.from_list(rows)."
            )
        )
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(_no_rows(branch))
    split = getattr(dataset, "_distributed", None)
    if split is not None and split.world_size > 1:
        raise ValueError(
            f"the prompts of branch {branch!r} are rank {split.rank}'s part of {split.world_size} (split_dataset_by_node). "
            "Pass the whole stream on every rank: the trainer deals it out itself, and would leave rows out of a part."
        )
    if dataset.column_names is not None:
        if "prompt" not in dataset.column_names:
            way = "Rename the column that holds the prompt: dataset.rename_column(..., 'prompt')."
            raise ValueError(
                f"the prompts of branch {branch!r} have no column 'prompt', only {sorted(dataset.column_names)}. {way}"
            )
        if isinstance(dataset, Dataset):
            for row in rows_to_check(branch, dataset):
                named(partial(read_prompt, prefill=prefill), row)
        for column in ("image", "images"):
            if column in dataset.column_names:
                raise ValueError(f"the prompts of branch {branch!r} have a column {column!r}: {_NO_IMAGES}")


def what_the_model_sees(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """The dataset with the columns alone that say what the model is to see, and all that a transform may ask for."""
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        return dataset
    return dataset.select_columns([name for name in COLUMNS if name in dataset.column_names])


def rows_to_check(branch: str, dataset: Dataset) -> Iterator[dict[str, Any]]:
    """What the model sees of each row, and what an error calls the row. New columns (`mark`) would copy a dataset that was
    shuffled or selected."""
    for index, row in enumerate(what_the_model_sees(dataset)):
        yield {**row, "row": row_name(branch, index, dataset)}


def mark(dataset: Dataset | IterableDataset, branch: str, prefill: bool = False) -> Dataset | list[dict[str, Any]]:
    """Held-out rows with what the model sees, their branch, category if any, what an error calls them, and their
    position among each other.

    A stream is read to its end. Left to accelerate, each process would read shards of its own where there are enough: other
    numbers of rows, so that one waits for the other, and no position that all agree on.
    """
    if isinstance(dataset, IterableDataset):
        rows: list[dict[str, Any]] = []
        for row in dataset:
            name = row_name(branch, None, dataset)
            if row.get("image") is not None or row.get("images"):
                raise ValueError(f"{name} brings an image: {_NO_IMAGES}")
            row = without_answer(row)
            named(partial(read_prompt, prefill=prefill), {**row, "row": name})
            columns = {column: row[column] for column in (*COLUMNS, "category") if column in row}
            rows.append({**columns, "branch": branch, "row": name, "position": len(rows)})
        if not rows:
            raise ValueError(_no_rows(branch))
        return rows
    names = [row_name(branch, index, dataset) for index in range(len(dataset))]
    seen = what_the_model_sees(dataset).add_column("branch", [branch] * len(dataset))
    if "category" in dataset.column_names:
        seen = seen.add_column("category", dataset["category"][:])
    return seen.add_column("row", names).add_column("position", list(range(len(dataset))))


def row_name(branch: str, index: int | None, dataset: Any = None) -> str:
    """What an error calls a row of prompts; a place in a shuffled stream would say nothing."""
    path = str(getattr(getattr(dataset, "info", None), "homepage", "") or "")  # where `camopd.files` notes it
    return f"{'a row' if index is None else f'row {index}'} of branch {branch!r}{path and f' ({path})'}"


def named(read: Callable[[dict[str, Any]], Any], row: dict[str, Any]) -> Any:
    """What `read` makes of a row; its `ValueError`, which says what the row has, gets the name in the column `row`."""
    try:
        return read(row)
    except ValueError as error:
        raise ValueError(f"{row.get('row', 'a row')} {error}") from error.__cause__


class PromptReader:
    """The prompts of rows as the model sees them."""

    def __init__(
        self,
        processing_class: Any,
        tokenizer: Any,
        known_tokens: int,
        tools: Any,
        chat_template: Any,
        template_kwargs: Any,
        split_special_tokens: bool = False,
        most_bytes: int = MOST_BYTES,
    ):
        """
        Args:
            known_tokens: rows of the model's embedding.
            split_special_tokens: whether special tokens in the text of a prompt are encoded as text.
            most_bytes: of a prompt in UTF-8; longer ones are refused before the tokenizer gets them.

        The rest is as the trainer has it.
        """
        self._tokenizer, self._known_tokens = tokenizer, known_tokens
        self._how = (processing_class, tools, chat_template, template_kwargs)
        self._special, self._split, self._most = SpecialTokens(tokenizer), split_special_tokens, most_bytes
        self._counted: set[Any] = set()  # branches whose special tokens have been told of

    def ids(self, rows: Iterable[dict[str, Any]]) -> list[list[int]]:
        """Token ids of rows that were read, not cut. Raises `ValueError` for one that cannot be used, with its name."""

        def read(row: dict[str, Any]) -> list[int]:
            self._check_size(row)
            found = self._special.first(row)
            if found and row.get("branch") not in self._counted:  # of a stream, which `check` does not read
                self._counted.add(row.get("branch"))
                self._tell(f"{row.get('row', 'a prompt')} has a special token in its text, {found!r}", row)
            if self._split and found:
                self._seen(row)
                ids = self._special.encode_as_text(row, self._render)
            else:
                ids = tokenize(row, *self._how, self._most)
            check_known(ids, self._tokenizer, self._known_tokens)
            return ids

        return [named(read, row) for row in rows]

    def check(self, datasets: Mapping[str, Iterable[Any]]) -> None:
        """Raise `ValueError` for prompts of branches, with their names, that are too long or that the chat template cannot
        take, and warn of those that have special tokens in their text."""
        for branch, rows in datasets.items():
            count, special, first, example = 0, 0, "", {}
            self._counted.add(branch)
            for unread in rows:
                count += 1
                row = named(read_row, unread)
                named(self._seen, row)
                found = self._special.first(row)
                special += found is not None
                if found and not first:
                    first, example = f"{found!r} in {row.get('row', 'a row')}", row
            if special:
                text = f"{special} of {count} prompts of branch {branch!r} have special tokens in their text (the first is"
                self._tell(f"{text} {first})", example)

    def _tell(self, what: str, row: Mapping[str, Any]) -> None:
        """Of special tokens in texts, and what becomes of them; `row` is the first that has one."""
        become = "encoded as text"
        if not self._split:
            own = ", unless you have applied the template yourself" if isinstance(row["prompt"], str) else ""
            become = f"taken as the chat template's own: set split_special_tokens=True to encode it as text{own}"
        logger.log(logging.INFO if self._split else logging.WARNING, "%s. Such is %s", what, become)

    def _seen(self, row: dict[str, Any]) -> None:
        """Check a prompt as the tokenizer will get it."""
        self._check_size(row)
        check_text(row["prompt"] if isinstance(row["prompt"], str) else self._render(row), self._most)

    def _check_size(self, row: dict[str, Any]) -> None:
        """Before a template is filled with a text that it would multiply."""
        for message in [] if isinstance(row["prompt"], str) else row["prompt"]:
            check_text(message["content"], self._most)

    def text_and_ending(self, row: Mapping[str, Any]) -> tuple[str, str]:
        """A row that was read, as the tokenizer gets it, and its `messages.ending`. Raises `ValueError` as `ids`."""
        text = row["prompt"] if isinstance(row["prompt"], str) else self._render(row)
        return text, ending(row, text, *self._how)

    def _render(self, row: Mapping[str, Any]) -> str:
        return render(row, *self._how)


_NO_IMAGES = "images are not supported, because no teacher can score them yet. Remove them from the data."


def _no_rows(branch: str) -> str:
    return f"the prompts of branch {branch!r} are empty. Check the path, the split and any filter."
