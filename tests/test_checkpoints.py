"""Which checkpoint a run goes on from, and what a save does when the disk, the numbers or a file fail it."""

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from conftest import make_prompts
from peft import LoraConfig
from torchao.optim import AdamW8bit
from trainers import lines, make_trainer
from transformers import TrainerCallback

from camopd.checkpoints import check_finite
from camopd.errors import CaMOPDError, ResumeError
from camopd.manifest import move_in


STEPS = 4


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tokenizer):
    """A run of four steps with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("finished")
    make_trainer(folder, tokenizer, max_steps=STEPS, save_strategy="steps", save_steps=1).train()
    return folder


def copy_of(finished, tmp_path, *steps):
    for step in steps:
        shutil.copytree(finished / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    shutil.copy(finished / "metrics.jsonl", tmp_path / "metrics.jsonl")
    return tmp_path


def find(tmp_path, tokenizer, given=True, **kwargs):
    return make_trainer(tmp_path, tokenizer, max_steps=STEPS, **kwargs).checkpoints.find(given, False)


def weights_of(folder):
    return safetensors.torch.load_file(folder / "model.safetensors")


FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "camopd.json")


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("damage", ["gone", "cut", "changed"])
def test_checkpoints_that_are_damaged_are_named_and_the_one_before_is_taken(
    name, damage, finished, tmp_path, tokenizer, caplog
):
    path = copy_of(finished, tmp_path, 2, 3) / "checkpoint-3" / name
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-5])
    else:
        content = path.read_bytes()
        path.write_bytes(content[:30] + bytes([content[30] ^ 1]) + content[31:])
    with caplog.at_level("INFO", "camopd"):
        assert find(tmp_path, tokenizer) == str(tmp_path / "checkpoint-2")
    (line,) = [line for line in caplog.messages if "going on from" in line]
    assert "checkpoint-3 is left out" in line
    assert name in line or name == "manifest.json"  # which may then list a file by a name that none has
    with pytest.raises(ResumeError, match=r"cannot go on from '.*checkpoint-3': .*"):
        find(tmp_path, tokenizer, str(tmp_path / "checkpoint-3"))


def test_checkpoints_of_which_none_is_whole_stop_with_each_reason(finished, tmp_path, tokenizer):
    copy_of(finished, tmp_path, 2, 3)
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
    (tmp_path / "checkpoint-3" / "manifest.json").unlink()
    for given in (True, "auto"):
        with pytest.raises(
            ResumeError, match=r"checkpoint-3 is left out.*checkpoint-2 is left out: optimizer.pt is miss"
        ):
            find(tmp_path, tokenizer, given)


def test_checkpoints_of_weights_alone_are_not_gone_on_from(tmp_path, tokenizer):
    kwargs = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    make_trainer(tmp_path, tokenizer, **kwargs).train()
    with pytest.raises(ResumeError, match="save_only_model=True and has the weights alone"):
        find(tmp_path, tokenizer, str(tmp_path / "checkpoint-1"))


def test_checkpoints_newer_than_the_one_that_is_given_do_not_matter(finished, tmp_path, tokenizer):
    copy_of(finished, tmp_path, 1, 3)
    assert find(tmp_path, tokenizer, str(tmp_path / "checkpoint-1")) == str(tmp_path / "checkpoint-1")


def test_checkpoints_of_another_number_of_processes_are_told_of(finished, tmp_path, tokenizer, caplog):
    path = copy_of(finished, tmp_path, 3) / "checkpoint-3" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "processes": 2}))
    assert find(tmp_path, tokenizer) == str(tmp_path / "checkpoint-3")
    assert any("written by 2 processes and the run goes on with 1" in line for line in caplog.messages)


def test_auto_starts_where_there_is_no_checkpoint(tmp_path, tokenizer):
    assert find(tmp_path, tokenizer, "auto") is None


def full_disk(monkeypatch, after):
    """The disk is full after so many files of a save."""
    left = [after]

    def limited(function):
        def save(content, path, *args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                with open(path, "wb") as file:
                    file.write(b"half")
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            return function(content, path, *args, **kwargs)

        return save

    monkeypatch.setattr(torch, "save", limited(torch.save))
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", limited(safetensors.torch.save_file))


@pytest.mark.parametrize("after", range(5))
def test_save_on_a_full_disk_leaves_the_checkpoint_before_it(after, finished, tmp_path, tokenizer, monkeypatch):
    class FullFromStepThree(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                full_disk(patch, after)

    kwargs = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    with monkeypatch.context() as patch:
        trainer = make_trainer(tmp_path, tokenizer, callbacks=[FullFromStepThree()], **kwargs)
        with pytest.raises(
            CaMOPDError, match=r"step 3 cannot be written to .*free.*No space.*checkpoint-2.* is whole"
        ):
            trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]  # by the limit of one
    again = make_trainer(tmp_path, tokenizer, **kwargs)
    again.train(resume_from_checkpoint="auto")
    assert [line["loss"] for line in lines(tmp_path)] == [line["loss"] for line in lines(finished)]
    found, expected = weights_of(tmp_path / "checkpoint-4"), weights_of(finished / "checkpoint-4")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("what", ["weight", "moment"])
def test_save_of_numbers_that_are_not_finite_writes_nothing(what, tmp_path, tokenizer):
    class Ruin(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                weight = next(trainer.model.parameters())
                ruined = weight.data if what == "weight" else trainer.optimizer.state[weight]["exp_avg"]
                ruined.view(-1)[3] = float("nan")

    kwargs = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    trainer = make_trainer(tmp_path, tokenizer, callbacks=[Ruin()], optim="adamw_torch", **kwargs)
    with pytest.raises(CaMOPDError, match=r"^1 of \d+ (weights|moments).* after step 2 are not finite.*checkpoint-1'"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    assert all(value.isfinite().all() for value in weights_of(tmp_path / "checkpoint-1").values())


def test_finished_model_is_not_saved_with_numbers_that_are_not_finite(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer)
    next(trainer.model.parameters()).data.view(-1)[3] = float("inf")
    with pytest.raises(CaMOPDError, match=r"1 of .* weights of the finished model are not finite"):
        trainer.save_model(str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("after", range(2))
def test_finished_model_that_cannot_be_written_leaves_the_one_before(after, tmp_path, tokenizer, monkeypatch):
    model = tmp_path / "model"
    trainer = make_trainer(tmp_path / "run", tokenizer)
    trainer.save_model(str(model))
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(before)
    next(trainer.model.parameters()).data += 1.0
    with monkeypatch.context() as patch:
        full_disk(patch, after)
        with pytest.raises(
            CaMOPDError, match=r"finished model cannot be written to .*model.*free.*No space(.|\n)*auto"
        ):
            trainer.save_model(str(model))
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    trainer.save_model(str(model))
    changed = {path.name for path in model.iterdir() if path.read_bytes() != before[path.name]}
    assert changed == {"model.safetensors"}


def test_finished_adapter_leaves_the_card(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "CaMOPD" in card
    trainer.save_model()
    assert "CaMOPD" in (tmp_path / "README.md").read_text() and (tmp_path / "adapter_model.safetensors").is_file()


def test_finished_model_leaves_no_shard_of_an_older_one(tmp_path, tokenizer):
    model = tmp_path / "model"
    model.mkdir()
    for name in (
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ):
        (model / name).write_text("old")
    (model / "my-model.safetensors").write_text("of the user")
    make_trainer(tmp_path / "run", tokenizer).save_model(str(model))
    assert {path.name for path in model.glob("*model*")} == {"model.safetensors", "my-model.safetensors"}


def test_older_model_is_there_until_all_of_the_new_one_is(tmp_path, monkeypatch):
    new, final = tmp_path / "_saving" / "model-0", tmp_path
    shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json")
    replace = Path.replace

    def write(folder, *names):
        folder.mkdir(parents=True, exist_ok=True)
        for name in (*names, "config.json"):
            (folder / name).write_text(folder.name)

    def fail(path, to):
        if path.name == shards[1]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(path, to)

    write(final, "model.safetensors")
    write(new, *shards)
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(Path, "replace", fail)
        move_in(new, final)
    assert (final / "model.safetensors").read_text() == (final / "config.json").read_text() == final.name
    write(new, *shards)
    move_in(new, final)
    assert {path.name for path in final.iterdir()} == {*shards, "config.json"}


def test_finished_model_is_put_in_place_by_its_config_last(tmp_path, tokenizer, monkeypatch):
    """A process that is killed meanwhile leaves no folder that is taken for a model."""
    named = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda path, to: named.append(path.name) or replace(path, to))
    make_trainer(tmp_path / "run", tokenizer).save_model(str(tmp_path / "model"))
    assert named[0] == "model.safetensors" and named[-1] == "config.json"
    assert set(named) == {path.name for path in (tmp_path / "model").iterdir()}


def test_best_checkpoint_is_known_by_its_own_folder(tmp_path, tokenizer):
    """And not by the one that it was made in."""
    trainer = make_trainer(
        tmp_path, tokenizer, max_steps=STEPS, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
        metric_for_best_model="eval_general_kl", load_best_model_at_end=True, save_total_limit=2,
        eval_dataset={"general": make_prompts("general", 4)},
    )  # fmt: skip
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best == str(tmp_path / f"checkpoint-{trainer.state.best_global_step}")
    for folder in tmp_path.glob("checkpoint-*"):
        state = json.loads((folder / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] is None or "_saving" not in state["best_model_checkpoint"]
    found = weights_of(tmp_path / f"checkpoint-{trainer.state.best_global_step}")
    assert all(torch.equal(found[name], value) for name, value in trainer.model.state_dict().items() if name in found)
    assert not (tmp_path / "_saving").exists()


def test_checkpoint_of_another_folder_is_unpickled_only_when_it_is_trusted(finished, tmp_path, tokenizer):
    """As DeepSpeed and FSDP do."""
    other = str(finished / "checkpoint-2")
    for trusted in (False, True):
        trainer = make_trainer(tmp_path / str(trusted), tokenizer, max_steps=STEPS, trust_checkpoint=trusted)
        assert trainer.checkpoints.find(other, unpickles=False) == other
        if trusted:
            assert trainer.checkpoints.find(other, unpickles=True) == other
        else:
            with pytest.raises(ResumeError, match="set trust_checkpoint=True"):
                trainer.checkpoints.find(other, unpickles=True)
    own = copy_of(finished, tmp_path / "own", 2)
    assert find(own, tokenizer, True, resume_from_checkpoint=True) == str(own / "checkpoint-2")


def test_check_looks_into_moments_of_8_bits(without_compiler):
    """They say that they are float32, and know no `isfinite`."""
    model = torch.nn.Linear(64, 64, bias=False)
    optimizer = AdamW8bit(model.parameters())
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    check_finite(model, optimizer, "after step 1", None)
    optimizer.state[model.weight]["exp_avg"].scale[3] = float("nan")
    with pytest.raises(CaMOPDError, match=r"^1 of \d+ moments of the optimizer after step 1 are not finite"):
        check_finite(model, optimizer, "after step 1", None)


def test_zero_does_not_go_on_with_another_number_of_processes(tmp_path, tokenizer):
    """DeepSpeed itself ends in a traceback, behind a promise that the run goes on."""
    trainer = make_trainer(tmp_path, tokenizer, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    path = tmp_path / "checkpoint-1" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "processes": 2}))
    for stage in (None, 0, 2, 3):
        trainer.args.deepspeed_plugin = (
            None if stage is None else SimpleNamespace(zero_stage=stage, deepspeed_config={})
        )
        if not stage:
            assert trainer.checkpoints.find(True, False) == str(path.parent)
            continue
        with pytest.raises(ResumeError, match=r"by 2 processes .* has 1: ZeRO.* Launch 2"):
            trainer.checkpoints.find(True, False)
