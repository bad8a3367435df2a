"""One YAML file is one run: which model, prompts, teachers and settings. Behind `camopd train` and `camopd check`."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import itertools
import json
import logging
import os
import re
import textwrap
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .config_file import read_config
from .errors import CaMOPDError
from .schedule import Schedule, by_step, mapping_form
from .settings import OLD_NAMES, declared, list_of_settings, may_be_list_or_null
from .teachers.address import (
    OWN_TEACHERS,
    did_you_mean,
    is_server,
    names_missing_model,
    refuse_other_model,
    refuse_secrets,
    without_secrets,
)


if TYPE_CHECKING:
    from trl import ModelConfig

    from .config import CaMOPDConfig

logger = logging.getLogger(__name__)

# In output_dir: where `camopd serve` says which URLs it has started. transformers sends nothing to the Hub that begins so.
SERVED_TEACHERS = "_teachers.json"
# Variables that say on which devices a process computes: of NVIDIA, AMD, Ascend, TPU and Neuron; and of Intel, AMD's OpenCL
DEVICES = re.compile(r"\w+_VISIBLE_\w+|ZE_AFFINITY_MASK|ONEAPI_DEVICE_SELECTOR|GPU_DEVICE_ORDINAL")


@dataclass
class PromptArguments:
    """
    Where the prompts of a run come from.

    Args:
        prompts (`dict[str, str | dict]`, *optional*):
            Per branch, a JSONL, JSON, Parquet or CSV file, a folder of them or of `save_to_disk`, a dataset of the Hub, or
            a list of these, with a column `prompt` or `messages`. In place of the name, a mapping with `path` and any
            of `name`, `split` (default `"train"`), `column` and `limit` (first rows only).
        eval_prompts (`dict[str, str | dict]`, *optional*):
            Held-out prompts, in the same form.
    """

    prompts: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Prompts of each branch: file, folder or Hub dataset, a list of them, or {path, split, column, limit}."
        },
    )
    eval_prompts: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Held-out prompts of each branch, in the form of `prompts`."}
    )

    def __post_init__(self) -> None:
        for name in ("prompts", "eval_prompts"):
            value = getattr(self, name)
            if isinstance(value, str):  # on the command line
                with contextlib.suppress(json.JSONDecodeError):
                    value = json.loads(value)
                setattr(self, name, value)
            if value is not None and not isinstance(value, dict):
                raise ValueError(without_secrets(mapping_form(name, value)))


def read_settings(config: str | None, overrides: list[str]) -> dict[str, Any]:
    """The mapping in a YAML file, if any, with `--name value` overrides over it, read without any of the heavy libraries; a
    `~` in paths is the home, as to the trainer. Raises `ValueError` for a file that is not there or not a mapping."""
    settings = _over({} if config is None else read_config(config), _read_words(overrides))
    for name in {"output_dir", "model_name_or_path", "resume_from_checkpoint"} & settings.keys():
        settings[name] = os.path.expanduser(settings[name]) if isinstance(settings[name], str) else settings[name]
    return settings


def _over(settings: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """Settings with others over them, which win under whichever name, old or new, they are given."""
    hidden = {OLD_NAMES[name] for name in others if name in OLD_NAMES}
    hidden |= {old for old, new in OLD_NAMES.items() if new in others}
    return {name: value for name, value in settings.items() if name not in hidden} | others


def _read_words(overrides: list[str]) -> dict[str, Any]:
    """What `--name value` words say, as YAML would read the values. TRL's parser, which has the last word, takes seconds to
    import, and wants every setting of a run to be there."""
    settings: dict[str, Any] = {}
    for word, following in itertools.pairwise([*overrides, "--"]):
        if not word.startswith("--"):
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        text = value if equals else "true" if following.startswith("--") else following
        if name.startswith("no_"):  # as transformers' parser has it for what is on by default
            name, text = name[3:], "false"
        try:
            value = yaml.safe_load(text) if text else text
        except yaml.YAMLError:  # plain text, or broken JSON, of which the config says more
            value = text
        settings = _over(settings, {name: value})  # the later word wins
    return settings


def _words_of(overrides: list[str], names: Collection[str]) -> list[str]:
    """The words `--name value` of a command line whose names are among these."""
    kept, taken = [], True
    for word in overrides:
        if word.startswith("--"):
            name = word[2:].partition("=")[0].replace("-", "_")
            taken = name in names or name.removeprefix("no_") in names
        if taken:
            kept.append(word)
    return kept


def as_words(settings: Mapping[str, Any]) -> list[str]:
    """Settings as the words `--name value` that a command line would have for them."""
    words = []
    for name, value in settings.items():
        words += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return words


def config_first(argv: list[str]) -> list[str]:
    """A command line with its YAML file in front, which `--config FILE` may name as well.

    Raises `ValueError` when it names two.
    """
    for place, word in enumerate(argv):
        name, equals, config = word.partition("=")
        if word == "--":  # what follows is for vLLM
            break
        if name != "--config":
            continue
        rest = argv[:place] + argv[place + (1 if equals else 2) :]
        config = config if equals else "".join(argv[place + 1 : place + 2])
        if not config or config.startswith("--"):
            raise ValueError("--config names no file. Write --config RUN.yaml.")
        if rest and not rest[0].startswith("-"):
            raise ValueError(f"the run is named twice, {rest[0]!r} and --config {config!r}. Leave one out.")
        return [config, *rest]
    return argv


def written(argv: list[str]) -> dict[str, Any]:
    """What a command line says, with the file behind `--config` if there is one: the settings that the user has written."""
    words = config_first(argv)
    return read_settings(None, words) if words == argv else read_settings(words[0], words[1:])


def methods() -> dict[str, str]:
    """The files of the methods that come with camopd, by name."""
    return {path.stem: str(path) for path in sorted((Path(__file__).parent / "methods").glob("*.yaml"))}


def method_file(given: str) -> str:
    """The file of a method by its name; a path is one already. Raises `ValueError` for a name that there is not."""
    known = methods()
    if given in known:
        return known[given]
    if Path(given).is_file() or Path(given).suffix or len(Path(given).parts) > 1:
        return given
    close = difflib.get_close_matches(given, known, n=1)
    meant = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(
        f"--method {given!r} is neither a file nor a method of camopd.{meant} There are {', '.join(known)}."
    )


class _Method(argparse.Action):
    """Takes a name; "list" shows all of them, and ends."""

    def __call__(self, parser: Any, namespace: Any, value: Any, option: Any = None) -> None:
        if value == "list":
            width = max(map(len, methods()))
            for name, path in methods().items():
                text = Path(path).read_text(encoding="utf-8").partition("\n#\n")[0].partition(".\n")[0]
                said = " ".join(text.replace("#", "").split())
                print(textwrap.fill(f"{name:<{width}}  {said}", 100, subsequent_indent=" " * (width + 2)))
            parser.exit()
        setattr(namespace, self.dest, value)


def config_and_overrides(prog: str | None, argv: list[str]) -> tuple[str, list[str]]:
    """The file and the `--name value` words of a command line; those of `--method` come first, and so give way."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s RUN.yaml [--method NAME] [--name value ...]",
        description="RUN.yaml may also be given as --config RUN.yaml. Any setting may follow as --name value.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog=list_of_settings() if {"-h", "--help"} & set(argv) else None,
    )
    parser.add_argument("config", metavar="RUN.yaml", help="YAML file of the run")
    parser.add_argument(
        "--method",
        metavar="NAME",
        action=_Method,
        help="settings that win over the run's: vanilla_mopd or another name of `--method list`, or a YAML file",
    )
    parser.add_argument(
        "--resume",
        metavar="auto|CHECKPOINT",
        help="as --resume_from_checkpoint; `auto` goes on with the run in output_dir, or starts it",
    )
    options, overrides = parser.parse_known_args(config_first(argv))
    overrides += [] if options.resume is None else ["--resume_from_checkpoint", options.resume]
    if options.method is not None:
        overrides = as_words(read_config(method_file(options.method))) + overrides
    return options.config, overrides


def parse(config: str, overrides: list[str]) -> tuple[PromptArguments, ModelConfig, CaMOPDConfig]:
    """Read a run with TRL's parser: a YAML file, and `--name value` over it.

    Raises `ValueError` for unknown names, values out of range and a missing model.
    """
    from trl import ModelConfig, TrlParser

    from .config import CaMOPDConfig
    from .late_settings import note

    # TRL's own reads the file in the encoding of the machine.
    overrides = [re.sub(r"^--no[_-]exchange$", "--no_rebalance", word) for word in overrides]
    file = read_config(config)
    words = _read_words(overrides)
    given = _over(file, words)
    # Lists and nulls, which a method's file or a sweep may have: the parser would take them for texts.
    alone = (name for name in words if any(word[:2] == "--" for word in _words_of(overrides, [name])[-2:]))
    untold = {name: words[name] for name in alone if may_be_list_or_null(name, words[name])}
    overrides = _words_of(overrides, given.keys() - {"env"} - untold.keys())
    defaults = {name: value for name, value in file.items() if name in given} | untold
    check_names(config, given)
    # argparse would write out every setting there is before what is wrong
    parser = TrlParser([PromptArguments, ModelConfig, CaMOPDConfig], prog="camopd", usage="%(prog)s --name value ...")
    set_env(given, devices=True)
    defaults = {name: value for name, value in defaults.items() if name not in ("env", "config")}
    try:
        parser.set_defaults_with_config(**defaults)
        prompts, model, args = parser.parse_args_into_dataclasses(args=overrides)
    except SystemExit:  # argparse has said why
        raise CaMOPDError(f"the settings above are not those of a run; see {config!r} and the overrides.") from None
    model.model_name_or_path = os.path.expanduser(model.model_name_or_path or "")
    if not model.model_name_or_path:
        raise ValueError(f"{config!r} names no student. Set model_name_or_path to the specialised model.")
    args.model_init_kwargs = settle_model(model, args.model_init_kwargs, given)
    if args.disable_dropout and "lora_dropout" not in given:
        model.lora_dropout = 0.0  # of TRL's default, which disable_dropout would switch off with a warning
    remote = args.model_init_kwargs.get("trust_remote_code", args.trust_remote_code)
    if remote != args.trust_remote_code and "trust_remote_code" in given:
        text = f"trust_remote_code is {args.trust_remote_code}, and model_init_kwargs has trust_remote_code={remote}"
        raise ValueError(f"{text}. Leave one of them out.")
    args.trust_remote_code = remote  # of the tokenizer, too
    note(args)
    return prompts, model, args


def set_env(settings: Mapping[str, Any], devices: bool = False) -> dict[str, str]:
    """Put the `env` of a run's settings into the environment of this process, and return it. Without `devices`, for a
    process that computes beside the trainer, those are left out that say on which devices it does.

    Raises `ValueError` for an `env` that is none. Before a model is looked for: the Hub's client reads its variables once,
    at its import.
    """
    env = settings.get("env")
    env = {} if env is None else env
    if not isinstance(env, dict):  # its values may be keys
        raise ValueError(f"env must map environment variables to their values, got a {type(env).__name__}.")
    for name in (name for name, value in env.items() if value is None):
        raise ValueError(f"env has no value for {name}. Leave it out, or give it one; '' is an empty one.")
    taken = {str(name): str(value) for name, value in env.items() if devices or not DEVICES.fullmatch(str(name))}
    os.environ.update(taken)
    return taken


def settle_model(model: ModelConfig, init_kwargs: Mapping[str, Any] | None, given: Collection[str]) -> dict[str, Any]:
    """`model_init_kwargs` with what `ModelConfig` says of the same things, and `model` with what they say.

    Of `dtype`, `attn_implementation` and the revision, a default of `ModelConfig` gives way to `model_init_kwargs`.

    Args:
        given: Names of the settings that the user has written.

    Raises `ValueError` where both are written and differ, and for a setting that a run cannot have. Warns about settings
    that have no effect.
    """
    kwargs = dict(init_kwargs or {})
    for key, name in (
        ("revision", "model_revision"),
        ("attn_implementation", "attn_implementation"),
        ("dtype", "dtype"),
    ):
        value = getattr(model, name)
        if key in kwargs and name not in given:
            setattr(model, name, kwargs[key])  # the compute type of 4-bit weights follows it
        elif key in kwargs and str(kwargs[key]).removeprefix("torch.") != str(value):
            raise ValueError(
                f"{name} is {value!r}, and model_init_kwargs has {key}={kwargs[key]!r}. Leave one of them out."
            )
        else:
            kwargs[key] = value
    if "quantization_config" in kwargs and (model.load_in_4bit or model.load_in_8bit):
        name = "load_in_4bit" if model.load_in_4bit else "load_in_8bit"
        raise ValueError(f"{name}=True and model_init_kwargs has a quantization_config. Leave one of them out.")
    if model.lora_task_type != "CAUSAL_LM":
        raise ValueError(
            f"lora_task_type={model.lora_task_type!r} is not for a language model that generates. Leave it at 'CAUSAL_LM'."
        )
    lora = sorted(name for name in given if name.startswith("lora_") or name in ("use_rslora", "use_dora"))
    four_bit = sorted(name for name in given if name.startswith("bnb_4bit_") or name == "use_bnb_nested_quant")
    for names, needed in ((lora, "use_peft"), (four_bit, "load_in_4bit")):
        if names and not getattr(model, needed):
            logger.warning("%s: no effect without %s=True", ", ".join(names), needed)
    return kwargs


def served_teachers(output_dir: str) -> dict[str, list[str]]:
    """URLs of the teachers that `camopd serve` has started for this `output_dir`; empty if it runs none."""
    path = Path(output_dir) / SERVED_TEACHERS
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError):
        raise ValueError(
            f"{str(path)!r}, in which `camopd serve` names its servers, cannot be read. Start it again, or delete the file."
        ) from None


def named_teachers(settings: dict[str, Any]) -> dict[str, Any]:
    """Teachers of a run as its config says. Raises `ValueError` for what no teacher can be."""
    teachers = settings.get("teachers")
    if not isinstance(teachers, dict) or not teachers:
        raise ValueError(without_secrets(mapping_form("teachers", teachers)))
    for branch, teacher in teachers.items():
        if isinstance(teacher, dict) and not is_server(teacher):
            raise ValueError(
                f"the teacher of branch {branch!r} is {without_secrets(repr(teacher))}. A mapping must have "
                "`urls`, the URL of a vLLM server or a list of them, and `model`, what they serve."
            )
        if isinstance(teacher, str) and not is_server(teacher):
            refuse_secrets(branch, teacher)
            refuse_other_model(branch, teacher, settings)
        if isinstance(teacher, str) and teacher not in OWN_TEACHERS and names_missing_model(teacher):
            raise ValueError(
                f"the teacher of branch {branch!r} is named as {teacher!r}, but there is no such path on this machine."
                f"{did_you_mean(teacher)} Fix the path, or give a model id of the Hub, owner/name without ./ or ~ before "
                "it."
            )
    return teachers


def teachers_of(settings: dict[str, Any]) -> dict[str, Any]:
    """Teachers of a run: as its config says, and where `camopd serve` has started them, their URLs."""
    served = served_teachers(str(settings.get("output_dir") or "trainer_output"))
    return {
        # With the model: another `camopd serve` may listen on these ports by now.
        branch: {"urls": served[branch], "model": os.path.expanduser(teacher)}
        if branch in served and isinstance(teacher, str) and teacher not in OWN_TEACHERS and not is_server(teacher)
        else teacher
        for branch, teacher in named_teachers(settings).items()
    }


def check_names(config: str, settings: dict[str, Any]) -> None:
    """Raise `ValueError` for a setting that no run has, with the one that may have been meant."""
    known = {"env", *(name for _, name, _, _ in declared())}  # from sources: importing them takes seconds
    for name in settings:
        if name == "config":
            raise ValueError(
                f"{config!r} has no other file under it: leave 'config' out, or name a method by --method."
            )
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            meant = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{name!r} in {config!r} or on the command line is not a setting of a run.{meant}")


def longest_sequence(settings: dict[str, Any]) -> int:
    """Tokens of the longest prompt and the longest completion together; a length that the settings do not have counts 0."""
    names = ("max_prompt_length", "max_completion_length")
    if isinstance(settings.get("max_prompt_length"), dict):
        raise ValueError(
            f"max_prompt_length must be a whole number of at least 1, got {settings['max_prompt_length']!r}."
        )
    return sum(max(by_step(name, settings[name]).values()) for name in names if name in settings)


def need_prompts(prompts: PromptArguments, args: CaMOPDConfig) -> None:
    """Raise `ValueError` unless there are prompts for exactly the branches of the schedule."""
    if not isinstance(prompts.prompts, dict):
        raise ValueError(without_secrets(mapping_form("prompts", prompts.prompts)))
    for _, text in Schedule.parse(args.schedule).mismatches("prompts", prompts.prompts):
        raise ValueError(text)


def warn_of_unused(prompts: PromptArguments, args: CaMOPDConfig) -> None:
    """`camopd train` evaluates by these settings alone; a script may do so by hand."""
    if prompts.eval_prompts and args.eval_strategy == "no" and not args.eval_on_start:
        logger.warning(
            "%s no effect: nothing says when they are measured. Set eval_strategy: steps and eval_steps, or eval_on_start",
            "eval_prompts and eval_tasks have" if args.eval_tasks else "eval_prompts have",
        )
    elif prompts.eval_prompts and not args.eval_on_start and not args.resume_from_checkpoint:
        logger.warning(
            "eval_prompts are not measured before the first step, without which the run cannot say whether it recovered. "
            "Set eval_on_start: true"
        )
    if not args.push_to_hub and (args.hub_model_id or args.hub_revision):
        logger.warning("hub_model_id and hub_revision have no effect: push_to_hub is False, and nothing is sent")


def where_from(settings: dict[str, Any], branch: str, error: Exception) -> str:
    """For the error about a server that no config names: who named it, where that is the trouble."""
    if is_server(settings["teachers"][branch]) or not any(
        words in str(error) for words in ("does not answer", "did not answer", "the config wants")
    ):
        return ""
    path = Path(str(settings.get("output_dir") or "trainer_output")) / SERVED_TEACHERS
    if not path.is_file():
        return ""
    return f" The URL is from {str(path)!r}, which `camopd serve` has written; start it again, or delete the file."
