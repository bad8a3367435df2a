"""What is kept of an optimizer step that is refused (camopd/rejected.py), where, and that it can be read.

That each rank keeps its own is in test_guards.py, with two processes.
"""

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import make_model
from safetensors.torch import load_file
from trainers import BrokenTeacher, make_trainer

from camopd.errors import CaMOPDError, GuardError, TeacherError
from camopd.rejected import keeping
from camopd.rollouts import load_rollouts


NAN = math.nan


def test_rejected_batch_can_be_read_and_only_the_latest_are_kept(tmp_path, tokenizer):
    folder = tmp_path / "rejected"
    folder.mkdir()
    for step in range(101, 125):
        for suffix in ("safetensors", "json"):
            path = folder / f"step-{step}-rank-0.{suffix}"
            path.write_bytes(b"")
            os.utime(path, (step, step))
    (folder / "step-1-rank-1.safetensors").write_bytes(b"")  # of another rank
    teachers = {"general": BrokenTeacher(NAN), "domain": make_model(1)}
    trainer = make_trainer(tmp_path, tokenizer, teachers=teachers)
    with pytest.raises(
        CaMOPDError, match=r"step 1 \(general\): teacher 'general' .*non-finite[^\n]*\nThe batch is in"
    ) as caught:
        trainer.train()
    assert not isinstance(caught.value, GuardError)
    mine = sorted(path.name for path in folder.glob("*-rank-0.safetensors"))
    assert len(mine) == 20 and "step-1-rank-0.safetensors" in mine and "step-106-rank-0.safetensors" in mine
    assert {path.stem for path in folder.glob("*-rank-0.json")} == {Path(name).stem for name in mine}
    assert (folder / "step-1-rank-1.safetensors").exists()
    path = folder / "step-1-rank-0.safetensors"
    rows = [{"branch": sample.branch, "position": sample.position} for sample in trainer.step.samples]
    samples, _ = load_rollouts(path, rows)
    assert [sample.token_ids for sample in samples] == [sample.token_ids for sample in trainer.step.samples]
    assert load_file(path)["teacher_logps"].isnan().all()
    assert "gaps" not in load_file(path)  # not there yet
    record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert "non-finite" in record.pop("why")
    assert record == {"step": 1, "branch": "general", "rank": 0, "world_size": 1,
                      "positions": [row["position"] for row in rows]}  # fmt: skip


def test_rejected_batch_that_cannot_be_kept_hides_no_error(tmp_path, tokenizer):
    (tmp_path / "rejected").write_text("a file")
    teachers = {"general": BrokenTeacher(0.5), "domain": make_model(1)}
    with pytest.raises(GuardError, match=r"log-prob above 0[\s\S]*could not be kept"):
        make_trainer(tmp_path, tokenizer, teachers=teachers).train()


@pytest.mark.parametrize("error", [TeacherError("gone"), OSError("full")])
def test_batch_of_a_step_that_is_not_refused_itself_is_left_to_the_checkpoint(error, tmp_path, tokenizer):
    """As where a teacher is gone: nothing is wrong with what was rolled out."""
    trainer = make_trainer(tmp_path, tokenizer, max_steps=1)
    trainer.train()
    args = SimpleNamespace(output_dir=str(tmp_path), process_index=0, world_size=1)
    with pytest.raises(type(error), match=f"^{error}$"), keeping(trainer.step, args):
        raise error
    assert not (tmp_path / "rejected").exists()
    with pytest.raises(CaMOPDError, match=r"^step 1 \(general\): wrong\nThe batch is in"), keeping(trainer.step, args):
        raise CaMOPDError("wrong")
