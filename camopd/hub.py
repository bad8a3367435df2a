"""What to say when the Hub cannot be reached or refuses: which repository, which setting, and no token."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import ResumeError
from .manifest import CHECKPOINT
from .teachers.address import names_missing_model, without_secrets
from .watchdog import PUSH, phase


logger = logging.getLogger(__name__)

_TOKEN = re.compile(r"hf_\w+")
_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_hub_id(name: str) -> bool:
    """Whether a name is `owner/name` of the Hub, and nothing on this machine."""
    return _ID.fullmatch(name) is not None and not os.path.exists(name)


def need_weights(model: str) -> None:
    """Raise `OSError` for a path that leads nowhere, for which the Hub need not be asked, and for a folder without weights,
    which transformers does not name until it loads it."""
    if names_missing_model(model):
        raise OSError("there is no such path on this machine.")
    if os.path.isdir(model) and not any(
        file.suffix in (".safetensors", ".bin", ".gguf") for file in Path(model).rglob("*")
    ):
        raise OSError("its folder has no weights, no *.safetensors and no *.bin.")


def public_name(name: str) -> str:
    """What others may see of a model's name: all of an id of the Hub, the last part of a path.

    With the name of its run where that is a checkpoint: those of two runs are two models.
    """
    which, colon, of = name.rpartition(":")
    if is_hub_id(of):
        return name
    path = Path(of)
    run = path.parent.name if CHECKPOINT.fullmatch(path.name) else ""
    return f"{which}{colon}{path.name}{run and f' ({run})'}"


def explain_hub_error(error: BaseException, repo: str, kind: str = "dataset") -> str:
    """What stands between this machine and a repository of the Hub, and the setting to change. Prints no token.

    `kind` is "dataset" or "model".
    """
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import constants, get_token
    from huggingface_hub import errors as hub

    chain: list[BaseException] = []  # datasets wraps what the Hub's client raises
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__

    def among(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    token = "the token of this machine has no access" if get_token() else "this machine has no token"
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{repo}"
    login = "set HF_TOKEN or run `hf auth login`"
    unreachable = among(ConnectionError, hub.LocalEntryNotFoundError)
    if among(hub.OfflineModeIsEnabled) or (constants.HF_HUB_OFFLINE and unreachable):
        return "HF_HUB_OFFLINE is set; unset it where there is a network"
    if among(hub.GatedRepoError):
        return f"it is gated, and {token}; accept its terms at {page}, then {login}"
    if among(hub.LocalTokenNotFoundError):
        return f"it wants a token, and {token}; {login}"
    if among(hub.RepositoryNotFoundError, DatasetNotFoundError):
        return f"the Hub knows no such {kind}, or it is private, and {token}; check the name, or {login}"
    statuses = [link.response.status_code for link in chain if isinstance(link, hub.HfHubHTTPError)]
    if statuses and statuses[0] in (401, 403):
        return f"the Hub answers with status {statuses[0]}, and {token}; {login}"
    if statuses:
        return f"the Hub answers with status {statuses[0]}; try again later"
    if unreachable or among(*hub_errors()[1:]):  # without a status: no answer
        return f"the Hub cannot be reached; {way_to_hub(*chain)}"
    return f"{type(error).__name__}: {without_tokens(error)}"


def way_to_hub(*errors: BaseException) -> str:
    """What to change where these errors say that the Hub cannot be reached."""
    if any("CERTIFICATE" in str(error) for error in errors):
        return "set SSL_CERT_FILE to a PEM file of the authorities to trust, a proxy's own one among them"
    return "check network, proxy and HF_ENDPOINT (also HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and SSL_CERT_FILE)"


def reason_of(error: BaseException) -> str:
    """The kind of an error without a connection, and what it says. Prints no token and no password."""
    name = type(error).__name__
    if not isinstance(error, (*hub_errors(), ImportError)):  # of a URL, and parts of a password may be in it
        return name
    return f"{name}: {without_secrets(without_tokens(error))}"


def hub_errors() -> tuple[type[Exception], ...]:
    """What the Hub's client raises: OSErrors, and those of the HTTP library it has, httpx or httpx2 by version."""
    import httpx
    from huggingface_hub.errors import HTTPError

    return (OSError, httpx.HTTPError, HTTPError)


def without_tokens(error: BaseException) -> str:
    """The text of an error, with no token of the Hub in it."""
    return _TOKEN.sub("hf_...", str(error))[:500]


# What the saves of transformers, PEFT and TRL, and this package, write into output_dir
_MODEL = re.compile(
    r"(pytorch_model|model|adapter_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?|adapter_config\.json"
)
_FILES = re.compile(
    r"README\.md|(metrics|held_out|eval_tasks)\.jsonl|training_args\.bin|chat_template\.(jinja|json)|(added_tokens|special_tokens_map|tokenizer)\.json|"
    r"((generation_|tokenizer_|processor_|preprocessor_)?config|trainer_state|(all|train|eval|test)_results)\.json"
)
_FOLDERS = re.compile(
    r"data_cards/[^/]+\.md|additional_chat_templates/[^/]+\.jinja|runs/.+/events\.out\.tfevents\.[^/]+"
)
# Of this run, and never sent: they hold what the student has written, and what only concerns this machine.
_KEPT_HERE = re.compile(rf"({CHECKPOINT.pattern}|completions|rejected|_[^/]*)(/.*)?")


class OnlyOwnFiles:
    """Sends of a trainer's `output_dir` what the run has written there, and nothing that happens to lie beside it.

    transformers sends all of the folder but checkpoints: an `.env`, notes, other people's prompts.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._said = False

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Inside, what transformers' trainer uploads of `output_dir` is that."""
        import transformers.trainer as parent  # which takes seconds, and `camopd data` needs none of it

        inherited = parent.hf_api  # the one name by which it reaches the Hub
        parent.hf_api = lambda: _Uploads(inherited(), Path(self._trainer.args.output_dir), self._own)
        try:
            yield
        finally:
            parent.hf_api = inherited

    def _own(self) -> list[str]:
        """Paths in `output_dir` of this run's files. Names the others, once."""
        folder = Path(self._trainer.args.output_dir)
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        saved = {name.partition("/")[2] for name in files if CHECKPOINT.match(name)}  # what a save writes in this run
        tokenizer = getattr(self._trainer.processing_class, "vocab_files_names", None) or {}
        names = {*saved, *tokenizer.values()}
        own = [
            name
            for name in files
            if not _KEPT_HERE.fullmatch(name)
            and (
                name in names or _of_adapter(name) or any(kind.fullmatch(name) for kind in (_FILES, _MODEL, _FOLDERS))
            )
        ]
        others = [name for name in files if name not in own and not _KEPT_HERE.fullmatch(name)]
        if others and not self._said:
            self._said = True
            logger.warning(
                "%d files in %s are not sent to the Hub, as this run has not written them: %s. By hand: hf upload",
                len(others), folder, ", ".join(others[:5]),
            )  # fmt: skip
        return own


def _of_adapter(name: str) -> bool:
    """Whether a path is that of an adapter beside the first, which PEFT saves in a folder of its own."""
    folder, _, file = name.rpartition("/")
    return bool(folder) and "/" not in folder and file.startswith("adapter_") and _MODEL.fullmatch(file) is not None


class _Uploads:
    """The Hub's client, with another `upload_folder`."""

    def __init__(self, api: Any, folder: Path, own: Callable[[], list[str]]) -> None:
        self._api, self._folder, self._own = api, folder, own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._api, name)

    def upload_folder(self, *, folder_path: Any, **more: Any) -> Any:
        """As the client's; of the run's `output_dir`, its own files alone."""
        if Path(folder_path).resolve() == self._folder.resolve():
            more["allow_patterns"] = [glob.escape(name) for name in self._own()]
        return self._api.upload_folder(folder_path=folder_path, **more)


def check_trusted(checkpoint: str | Path, output_dir: str | Path, unpickles: bool, trusted: bool) -> None:
    """Raise `ResumeError` before a checkpoint is unpickled that no run in `output_dir` has written, unless it is `trusted`.

    `unpickles` says that loading it does so, as DeepSpeed and FSDP do: a pickle can run any code.
    """
    if not unpickles:
        return
    own = Path(output_dir).resolve() in Path(checkpoint).resolve().parents
    if not own and not trusted:
        raise ResumeError(
            f"{str(checkpoint)!r} is not in this run's output_dir ({str(output_dir)!r}), and DeepSpeed and FSDP unpickle "
            "what they load: whoever wrote it can run any code here. If you trust it, set trust_checkpoint=True."
        )
    logger.log(
        logging.INFO if own else logging.WARNING,
        "%s is unpickled, as DeepSpeed and FSDP do: what is in it can run any code here", checkpoint,
    )  # fmt: skip


class CheckpointPushes:
    """Sends a trainer's checkpoints to the Hub so that its last one gets there.

    transformers sends in the background, skips a checkpoint while another is on its way, may delete one that is, and says
    nothing when one fails. Here the last checkpoint of a run is never skipped, nor is any with
    hub_strategy="all_checkpoints"; none is deleted on its way; and a failure is a warning.

    `push(folder)` and `wait()` are the trainer's `_push_from_checkpoint` and `_finish_current_push` as it inherits them.
    """

    def __init__(self, trainer: Any, push: Callable[[str], None], wait: Callable[[], None]) -> None:
        self._trainer, self._push, self._wait = trainer, push, wait
        self.only_own = OnlyOwnFiles(trainer).sending
        self._missing: str | None = None  # the latest checkpoint, as long as it is not known to be on its way
        self._sent: str | None = None  # the latest one that was
        self._saves_since = 0  # checkpoints written since the oldest one that is on its way

    def add(self, folder: str, last: bool = False) -> None:
        """Send a checkpoint that has just been written, or leave it out where a later one will be sent.

        The `last` one is there when this returns; so is that of the step with which training stops.
        """
        trainer, args = self._trainer, self._trainer.args
        if not args.push_to_hub or args.hub_strategy == "end" or not trainer.is_world_process_zero():
            return
        last = last or trainer.control.should_training_stop
        progress = self._progress()
        under_way = progress is not None and not progress.is_done()
        self._saves_since = self._saves_since + 1 if under_way else 0
        if under_way and args.save_total_limit is not None and self._saves_since >= args.save_total_limit:
            self._wait()  # the trainer is about to delete what is being sent
        self._see_failures("It is tried again at the next save.")
        self._missing = folder
        self._start(skip=not last and args.hub_strategy != "all_checkpoints")
        if last:
            self.finish()

    @phase(PUSH)
    def finish(self) -> None:
        """Wait for what is on its way, and send the latest checkpoint if it is not on the Hub."""
        self._wait()
        self._see_failures("It is tried again now.")
        if self._missing is not None and Path(self._missing).is_dir():
            self._start()
            self._wait()
            self._see_failures(f"By hand: hf upload {self._trainer.hub_model_id} {self._trainer.args.output_dir}")

    def _start(self, skip: bool = False) -> None:
        """Send the latest checkpoint after what is on its way, or `skip` it where there is such."""
        args, before = self._trainer.args, self._progress()
        count = None if before is None else len(before.jobs)
        always, args.hub_always_push = args.hub_always_push, args.hub_always_push or not skip
        try:
            with self.only_own():
                self._push(str(self._missing))
        finally:
            args.hub_always_push = always
        after = self._progress()
        if after is not before or (after is not None and len(after.jobs) != count):
            self._sent, self._missing = self._missing, None

    def _progress(self) -> Any:
        return getattr(self._trainer, "push_in_progress", None)

    def _see_failures(self, then: str) -> None:
        progress = self._progress()
        done = [] if progress is None else [job for job in progress.jobs if job.done()]
        errors = [error for job in done if (error := job.exception()) is not None]
        for job in done:
            progress.jobs.remove(job)
        if errors:
            self._missing = self._missing or self._sent
            repo = self._trainer.hub_model_id
            logger.warning(
                "%s is not on the Hub: %s. %s", self._sent, explain_hub_error(errors[0], repo, "model"), then
            )
