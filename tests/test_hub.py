"""What of a run's checkpoints gets to the Hub when uploads are slow, fail, or are overtaken."""

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import httpx
import pytest
import transformers.trainer
from conftest import make_model, make_prompts, make_tokenizer
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects
from peft import LoraConfig
from trainers import make_trainer
from transformers.utils import PushInProgress

from camopd import CaMOPDConfig, CaMOPDTrainer
from camopd.errors import ResumeError, TeacherError
from camopd.hub import check_trusted, explain_hub_error, need_weights, public_name
from camopd.output_dir import EVAL_TASKS
from camopd.teachers.local import LocalTeacher


class SlowHub:
    """Stands in for `HfApi`: no upload ends before somebody waits for it, and its folder must not go away; some fail."""

    def __init__(self, monkeypatch, fail=()):
        self.pool, self.gate, self.fail = ThreadPoolExecutor(1), Event(), fail
        self.received: list[tuple[str, int]] = []  # checkpoints: place in the repository, and the step it is of
        self.model = b""  # of the run itself
        self.count = 0
        wait = PushInProgress.wait_until_done

        def wait_until_done(progress):
            self.gate.set()
            wait(progress)
            self.gate.clear()

        monkeypatch.setattr(PushInProgress, "wait_until_done", wait_until_done)
        monkeypatch.setattr(transformers.trainer, "hf_api", lambda: self)

    def create_repo(self, repo_id, **_):
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, folder_path, run_as_future, path_in_repo="", **_):
        assert run_as_future
        return self.pool.submit(self._upload, Path(folder_path), path_in_repo)

    def _upload(self, folder, place):
        step = json.loads((folder / "trainer_state.json").read_text())["global_step"] if place else 0
        assert self.gate.wait(60)
        self.count += bool(place)
        if place and self.count in self.fail:
            raise OSError("no space for hf_secret")
        model = (folder / "model.safetensors").read_bytes()
        if place:
            self.received.append((place, step))
        else:
            self.model = model


@pytest.fixture
def hub(monkeypatch):
    return SlowHub(monkeypatch)


@pytest.fixture
def train(tmp_path):
    """A run of four steps with a checkpoint after each."""

    def train(teacher=None, **settings):
        values = {
            "output_dir": str(tmp_path / "run"), "use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 4,
            "disable_tqdm": True, "save_steps": 1, "prompts_per_step": 2, "per_device_train_batch_size": 2,
            "max_completion_length": 3, "max_prompt_length": 64, "gradient_checkpointing": False,
            "diagnostics_steps": 0, "push_to_hub": True, "hub_model_id": "me/tiny",
        }  # fmt: skip
        args = CaMOPDConfig(**{**values, **settings})
        trainer = CaMOPDTrainer(
            model=make_model(1),
            teachers={"general": teacher or make_model(2), "domain": make_model(3)},
            args=args,
            train_dataset={branch: make_prompts(branch) for branch in ("general", "domain")},
            processing_class=make_tokenizer(),
        )
        trainer.train()

    return train


ALL = [(f"checkpoint-{step}", step) for step in (1, 2, 3, 4)]
LAST = [("last-checkpoint", step) for step in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("strategy", "limit", "always", "received"),
    [
        ("every_save", None, False, []),
        ("checkpoint", None, False, [LAST[0], LAST[3]]),  # two are skipped, as the first is on its way
        ("checkpoint", 1, False, LAST),  # each would be deleted on its way
        ("checkpoint", 2, True, LAST),
        ("all_checkpoints", None, False, ALL),
        ("all_checkpoints", 1, False, ALL),
    ],
)
def test_push_of_the_last_checkpoint_gets_there_and_none_is_deleted_on_its_way(
    train, hub, tmp_path, caplog, strategy, limit, always, received
):
    train(hub_strategy=strategy, save_total_limit=limit, hub_always_push=always)
    assert hub.received == received
    assert hub.count == len(received)  # none was lost on its way
    assert hub.model == (tmp_path / "run" / "checkpoint-4" / "model.safetensors").read_bytes()
    assert "not on the Hub" not in caplog.text


def test_upload_that_fails_is_tried_again_and_said(train, hub, caplog):
    hub.fail = {2}
    with caplog.at_level(logging.WARNING, logger="camopd"):
        train(hub_strategy="checkpoint")
    assert hub.received == [LAST[0], LAST[3]]
    assert "checkpoint-4 is not on the Hub: " in caplog.text and "tried again now" in caplog.text
    hub.fail = {hub.count + 1, hub.count + 2, hub.count + 3}
    with caplog.at_level(logging.WARNING, logger="camopd"):
        train(hub_strategy="checkpoint", max_steps=1, overwrite_output_dir=True)
    assert "By hand: hf upload me/tiny" in caplog.text
    assert "hf_secret" not in caplog.text


def test_push_of_the_checkpoint_of_a_teacher_that_failed_has_its_rollouts(train, hub, tmp_path, monkeypatch):
    class Fails(LocalTeacher):
        calls = 0

        def score(self, *args, **kwargs):
            self.calls += 1
            if self.calls == 2:  # the one of step 3
                raise TeacherError("gone")
            return super().score(*args, **kwargs)

    kept = []
    upload = SlowHub._upload
    monkeypatch.setattr(SlowHub, "_upload", lambda *args: (kept.append(rollouts_in(tmp_path)), upload(*args)))
    with pytest.raises(TeacherError, match="Nothing is lost"):
        train(Fails(make_model(2), "fails", "cpu", 2), hub_strategy="checkpoint", schedule="general:1,domain:1")
    assert hub.received[-1] == LAST[1]
    assert kept[-1] == ["rollouts-0-of-1.safetensors"]


def rollouts_in(tmp_path):
    return [path.name for path in (tmp_path / "run" / "checkpoint-2").glob("rollouts-*")]


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("owner/model", "owner/model"),
        ("/home/me/model", "model"),
        ("/home/me/runs/general/checkpoint-120", "checkpoint-120 (general)"),
        ("/home/me/runs/medical/checkpoint-120/", "checkpoint-120 (medical)"),
        ("adapter_off:/home/me/runs/medical/checkpoint-9", "adapter_off:checkpoint-9 (medical)"),
        ("checkpoint-9", "checkpoint-9"),
    ],
)
def test_checkpoints_of_two_runs_have_two_names(name, public):
    """A run that goes on with the other one as its teacher would do so in silence."""
    assert public_name(name) == public


class ListingHub:
    """Stands in for `HfApi`: notes which files the Hub's own client would send of a folder."""

    def __init__(self, monkeypatch):
        self.sent: dict[str, set[str]] = {}  # by place in the repository
        monkeypatch.setattr(transformers.trainer, "hf_api", lambda: self)

    def create_repo(self, repo_id, **_):
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, folder_path, path_in_repo="", allow_patterns=None, ignore_patterns=(), **_):
        folder = Path(folder_path)
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        ignored = [*ignore_patterns, *DEFAULT_IGNORE_PATTERNS]
        sent = filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignored)
        self.sent.setdefault(path_in_repo, set()).update(sent)
        job = ThreadPoolExecutor(1).submit(str)
        job.result()
        return job


class PushingTracker(transformers.TrainerCallback):
    """Pushes at the end with transformers' own method, as that of W&B does with WANDB_LOG_MODEL."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_end(self, args, state, control, **kwargs):
        transformers.Trainer.push_to_hub(self.trainer)


STRAY = [
    ".env", "notes.txt", "secrets.json", "model.py", "general.jsonl", "config.json.bak", "old/model.safetensors",
    "secret-model.safetensors", "private/adapter_config.txt", "runs/notes.txt", "data_cards/notes.txt", "tokenizer.json~",
    "rejected/step-3.safetensors", "completions/completions_00001.parquet", "_lock", "id_rsa", "a[1].json",
]  # fmt: skip


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints", "end"])
@pytest.mark.parametrize("lora", [False, True])
def test_push_sends_what_the_run_has_written_and_nothing_beside_it(
    tmp_path, tokenizer, monkeypatch, caplog, strategy, lora
):
    hub = ListingHub(monkeypatch)
    trainer = make_trainer(
        tmp_path / "run", tokenizer, max_steps=2, save_strategy="steps", save_steps=1, log_completions=True,
        push_to_hub=True, hub_model_id="me/tiny", hub_strategy=strategy, diagnostics_steps=0,
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]) if lora else None,
    )  # fmt: skip
    trainer.add_callback(PushingTracker(trainer))
    for name in STRAY:
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text("sk-secret")
    trainer.train()
    for sent in hub.sent.values():
        assert not sent & set(STRAY)
    out = tmp_path / "run"
    measured = ("held_out.jsonl", EVAL_TASKS)  # of each held-out prompt, and of each row of eval_tasks
    for name in measured:
        (out / name).write_text("{}\n")
    trainer.save_state()
    trainer.push_to_hub()
    weights = ["adapter_model.safetensors", "adapter_config.json"] if lora else ["model.safetensors", "config.json"]
    wanted = {*weights, *measured, "README.md", "metrics.jsonl", "tokenizer.json", "tokenizer_config.json",
              "training_args.bin", "chat_template.jinja", "trainer_state.json"}  # fmt: skip
    assert hub.sent[""] >= wanted
    top = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    left_out = {name for name in top - hub.sent[""] if not name.startswith("checkpoint-")}
    own = {"_run.json", "completions/completions_00001.parquet", "completions/completions_00002.parquet"}
    assert left_out == {*STRAY, *own}
    warnings = [r.getMessage() for r in caplog.records if "are not sent to the Hub" in r.getMessage()]
    assert len(warnings) == 1 and "sk-secret" not in caplog.text
    folder = {"checkpoint": "last-checkpoint", "all_checkpoints": "checkpoint-2"}.get(strategy)
    assert folder is None or {*weights, "optimizer.pt", "camopd.json"} <= hub.sent[folder]


def test_hubs_client_is_as_it_was_after_a_push_that_fails(tmp_path, tokenizer, monkeypatch):
    hub = ListingHub(monkeypatch)
    before = transformers.trainer.hf_api
    trainer = make_trainer(tmp_path / "run", tokenizer, push_to_hub=True, hub_model_id="me/tiny", hub_strategy="end")
    monkeypatch.setattr(hub, "upload_folder", lambda **_: 1 / 0)
    trainer.state.global_step = 1
    with pytest.raises(ZeroDivisionError):
        trainer.push_to_hub()
    assert transformers.trainer.hf_api is before


@pytest.mark.parametrize(("repo", "revision"), [("me/tiny", "attempt-2"), ("me/other", None)])
def test_resume_from_the_hub_takes_the_revision_that_the_run_sends_to(
    tmp_path, tokenizer, monkeypatch, repo, revision
):
    ListingHub(monkeypatch)
    asked = {}
    monkeypatch.setattr(
        "camopd.checkpoints.snapshot_download", lambda repo, **more: asked.update(repo=repo, **more) or str(tmp_path)
    )
    sends = {"push_to_hub": True, "hub_model_id": "me/tiny", "hub_revision": "attempt-2"}
    with pytest.raises(ResumeError, match="has no folder 'last-checkpoint'"):
        make_trainer(tmp_path / "run", tokenizer, **sends).train(resume_from_checkpoint=repo)
    assert (asked["repo"], asked["revision"]) == (repo, revision)


def test_checkpoint_of_another_folder_is_not_unpickled_unless_it_is_trusted(tmp_path, caplog):
    out, other = tmp_path / "run", tmp_path / "other" / "checkpoint-3"
    for folder in (out / "checkpoint-3", other):
        folder.mkdir(parents=True)
    (out / "checkpoint-4").symlink_to(other)
    with caplog.at_level(logging.INFO, logger="camopd"):
        check_trusted(other, out, unpickles=False, trusted=False)
        assert caplog.text == ""
        check_trusted(out / "checkpoint-3", out, unpickles=True, trusted=False)
        check_trusted(str(other), str(out), unpickles=True, trusted=True)
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    assert caplog.text.count("is unpickled, as DeepSpeed and FSDP do: what is in it can run any code here") == 2
    for foreign in (other, out / "checkpoint-4", out, out / ".." / "other" / "checkpoint-3", tmp_path / "nowhere"):
        with pytest.raises(
            ResumeError, match=r"is not in this run's output_dir .*run any code.*set trust_checkpoint=True"
        ):
            check_trusted(foreign, out, unpickles=True, trusted=False)


def test_path_that_leads_nowhere_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "config.json").write_text("{}")
    for name in ("studnt", "./gone"):
        with pytest.raises(OSError, match="there is no such path on this machine"):
            need_weights(name)
    need_weights("org/model")
    with pytest.raises(OSError, match="its folder has no weights"):
        need_weights("student")


def test_certificate_that_is_not_trusted_is_not_a_missing_network():
    error = RuntimeError("the dataset could not be loaded")
    error.__cause__ = httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed")
    assert explain_hub_error(error, "org/data").startswith(
        "the Hub cannot be reached; set SSL_CERT_FILE to a PEM file"
    )
