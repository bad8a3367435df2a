"""A sweep as its YAML file says: configs x seeds, the command of each run, and what the table shows."""

from __future__ import annotations

import difflib
import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .run import as_words, methods, read_settings
from .teachers.address import SECRET, as_mapping


TRAIN = "{python} -m camopd.cli train {config} --seed {seed} --output_dir {output_dir} {set} {resume}"


@dataclass(frozen=True)
class Run:
    """One config with one seed."""

    name: str  # of the config: its file without the ending
    config: str
    seed: int
    folder: Path

    @property
    def key(self) -> str:
        """What `--only` takes."""
        return f"{self.name}/seed-{self.seed}"


@dataclass(frozen=True)
class Sweep:
    """A sweep as its YAML file says."""

    runs: tuple[Run, ...]
    settings: dict[str, Any]
    command: str
    columns: tuple[str, ...]
    output_dir: Path

    def words(self, run: Run, resume: bool | str) -> list[str]:
        """The command of a run, as the words that start it; `resume` is a value of `resume_from_checkpoint`."""
        several = {
            "{set}": as_words(self.settings),
            "{resume}": ["--resume_from_checkpoint", "true" if resume is True else resume] if resume else [],
        }
        single = {
            "{python}": sys.executable, "{config}": run.config, "{seed}": str(run.seed), "{output_dir}": str(run.folder),
        }  # fmt: skip
        words = []
        for word in shlex.split(self.command):  # first split, then filled in: a path may have spaces
            for name, value in single.items():
                word = word.replace(name, value)
            words += several.get(word, [word])
        return words


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is kind for item in value)


def _is_columns(value: Any) -> bool:
    return value == [] or (_is_list_of(str, value) and all(re.fullmatch("[^@]+(@0*[1-9][0-9]*)?", v) for v in value))


# What a sweep sets: its default, how to tell a right value, and what that is in words.
_SETTINGS: dict[str, tuple[Any, Any, str]] = {
    "configs": (None, lambda value: _is_list_of(str, value), "a list of YAML files"),
    "seeds": (None, lambda value: _is_list_of(int, value), "a list of whole numbers such as [0, 1]"),
    "set": ({}, lambda value: isinstance(value, dict), "a mapping from settings to values"),
    "command": (TRAIN, lambda value: isinstance(value, str), "one line of text"),
    "output_dir": (None, lambda value: isinstance(value, str) and value, "the folder for the runs and the table"),
    "columns": ([], _is_columns, "a list of metrics such as gap/general/abs_mean (its last value), gap/general/abs_mean@5 "
                "(mean of its last five), eval_general_kl or a key of result.json"),
}  # fmt: skip


def read_sweep(path: str) -> Sweep:
    """Read the YAML file of a sweep. Raises `ValueError` that names what is wrong in it."""
    given = {name: value for name, value in read_settings(path, []).items() if value is not None}
    for name in given:
        if name not in _SETTINGS:
            there = f" There are {', '.join(_SETTINGS)}; settings of runs go to `set`."
            raise ValueError(f"{name!r} in {path!r} is not a setting of a sweep.{meant(name, _SETTINGS) or there}")
    settings = {name: given.get(name, default) for name, (default, _, _) in _SETTINGS.items()}
    for name, (_, is_right, form) in _SETTINGS.items():
        if not is_right(settings[name]):
            raise ValueError(f"{name} in {path!r} must be {form}, got {settings[name]!r}.")
    configs, seeds = settings["configs"], settings["seeds"]
    names = [Path(config).stem for config in configs]
    for what, values, way in (("configs", names, ", or rename a file."), ("seeds", seeds, ".")):
        twice = sorted({str(value) for value in values if values.count(value) > 1})
        if twice:
            raise ValueError(
                f"{what} in {path!r} has {twice[0]!r} twice; its runs would share a folder. Take one out{way}"
            )
    for name in ("seed", "output_dir"):
        if name in settings["set"]:
            raise ValueError(f"set in {path!r} has {name!r}, which the sweep gives each run itself. Take it out.")
    secret = [name for name in _names(settings["set"]) if SECRET.search(name.upper())]
    if secret:
        raise ValueError(
            f"set in {path!r} has {secret[0]!r}, and what it sets is on command lines and in logs. Export a key or a token "
            "before the sweep (HF_TOKEN for the Hub): its runs have the environment it has."
        )
    _check_command(path, settings)
    folder = Path(settings["output_dir"]).expanduser()
    runs = [
        Run(name, config, seed, folder / name / f"seed-{seed}")
        for name, config in zip(names, configs, strict=True)
        for seed in seeds
    ]
    sweep = Sweep(tuple(runs), settings["set"], settings["command"], tuple(settings["columns"]), folder)
    _check_pushes(path, sweep)
    return sweep


def _names(settings: Mapping[str, Any]) -> list[str]:
    """Of settings that are tokens, and of all variables in `env`."""
    init = (as_mapping(settings.get(name)) for name in ("model_init_kwargs", "teacher_model_init_kwargs"))
    tokens = [name for given in (settings, *init) for name in ("hub_token", "token") if given.get(name)]
    return [*tokens, *map(str, as_mapping(settings.get("env")))]


def _check_command(path: str, settings: Mapping[str, Any]) -> None:
    command, configs, seeds = settings["command"], settings["configs"], settings["seeds"]
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ValueError(
            f"command in {path!r} cannot be split into words: {error}. Fix its quotes: {command!r}."
        ) from None
    for needed, place, why in (
        (True, "{output_dir}", "the table is made from what a run writes there"),
        (len(configs) > 1, "{config}", f"there are {len(configs)} configs"),
        (len(seeds) > 1, "{seed}", f"there are {len(seeds)} seeds"),
    ):
        if needed and not any(place in word for word in words):
            raise ValueError(f"command in {path!r} has no {place}, but {why}. Put it in: {command!r}.")
    if settings["set"] and "{set}" not in words:
        raise ValueError(
            f"command in {path!r} has no {{set}} as a word of its own, where `set` would go: {command!r}."
        )
    if command != TRAIN and "train" not in words:  # a command of another program may make its files itself
        return
    named = [("configs", config) for config in configs if command == TRAIN or config not in methods()]
    named += [("command", word) for word in words if word.endswith((".yaml", ".yml")) and "{" not in word]
    for name, file in named:
        if not Path(file).is_file():
            raise ValueError(
                f"{name} in {path!r} has {file!r}, but there is no such file. Paths start from the folder in which the "
                f"command is given.{meant(file, methods())}"
            )


def _check_pushes(path: str, sweep: Sweep) -> None:
    """Raise `ValueError` where two runs would send their models to one repository of the Hub, each over the other's."""
    sent: dict[str, Run] = {}
    for run in sweep.runs:
        words = sweep.words(run, False)
        if "train" not in words:
            return
        own: dict[str, Any] = {}
        for word in words:
            if word.endswith((".yaml", ".yml")) and Path(word).is_file():
                own |= read_settings(word, [])
        own |= read_settings(None, words)
        if str(own.get("push_to_hub") or False).lower() in ("false", "0", "no", "f", "n"):
            continue
        place = str(own.get("hub_model_id") or run.folder.name)  # the name that transformers takes
        place += f"@{own['hub_revision']}" if own.get("hub_revision") else ""
        if place in sent:
            raise ValueError(
                f"{sent[place].key} and {run.key} of {path!r} have push_to_hub and would send their models to one "
                f"repository of the Hub, {place!r}, each over the other's. Put push_to_hub: false into `set`, and send "
                f"the one you choose: hf upload ID FOLDER. Or give each a hub_model_id of its own."
            )
        sent[place] = run


def meant(name: Any, known: Iterable[str]) -> str:
    """The known name that is closest, as a question; "" where none is close."""
    close = difflib.get_close_matches(str(name), known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
