"""What docs/security.md says of what can run code here, where no other test holds it."""

import importlib.util
import re
import shutil
from pathlib import Path

import pytest
import torch
from trainers import make_trainer
from transformers.utils.chat_template_utils import render_jinja_template

import camopd
from camopd import manifest
from camopd.run import read_settings


ROOT = Path(camopd.__file__).parent.parent
STEPS = 2


def source(package: str, path: str) -> str:
    """Text of a library's file, without importing it."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    return (Path(spec.origin).parent / path).read_text(encoding="utf-8")


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("finished")
    make_trainer(folder, tokenizer, max_steps=STEPS, save_strategy="steps", save_steps=1).train()
    return folder


def with_bomb(finished: Path, folder: Path, name: str) -> tuple[Path, Path]:
    """A checkpoint in which a file is a pickle that runs code, with a manifest to match, and what that code would make."""
    checkpoint, marker = folder / "checkpoint-1", folder / "it-ran"
    shutil.copytree(finished / "checkpoint-1", checkpoint)
    torch.save({"state": Bomb(marker)}, checkpoint / name)
    facts = {key: value for key, value in manifest.read(checkpoint).items() if key != "files"}
    manifest.write(checkpoint, manifest.entries(checkpoint, manifest.files_in(checkpoint)), **facts)
    return checkpoint, marker


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_pickle_in_a_plain_checkpoint_runs_no_code(name, finished, tmp_path, tokenizer):
    checkpoint, marker = with_bomb(finished, tmp_path, name)
    with pytest.raises(Exception, match="Weights only load failed"):
        make_trainer(tmp_path, tokenizer, max_steps=STEPS).train(resume_from_checkpoint=str(checkpoint))
    assert not marker.exists()
    torch.load(checkpoint / name, weights_only=False)
    assert marker.exists()  # it would have


def test_training_args_of_a_checkpoint_are_never_read(finished, tmp_path, tokenizer):
    checkpoint, marker = with_bomb(finished, tmp_path, "training_args.bin")
    make_trainer(tmp_path, tokenizer, max_steps=STEPS).train(resume_from_checkpoint=str(checkpoint))
    assert not marker.exists()


def test_checkpoints_of_deepspeed_and_fsdp_are_unpickled_as_the_table_says():
    """When this fails, a library has become safer: say so in docs/security.md."""
    assert "weights_only=False" in source("deepspeed", "runtime/checkpoint_engine/torch_checkpoint_engine.py")
    assert "pickle.load(" in source("torch", "distributed/checkpoint/filesystem.py")


def test_tag_in_a_run_file_makes_no_object(tmp_path):
    marker = tmp_path / "it-ran"
    path = tmp_path / "run.yaml"
    path.write_text(f"seed: !!python/object/apply:pathlib.Path.touch [{marker}]\n")
    for config, overrides in ((str(path), []), (None, ["--seed", f"!!python/object/apply:os.mkdir [{marker}]"])):
        try:
            read_settings(config, overrides)
        except ValueError as error:
            assert "not valid YAML" in str(error)
        assert not marker.exists()


@pytest.mark.parametrize(
    "template",
    ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}", "{% include '/etc/hostname' %}"],
)
def test_chat_template_stays_in_its_sandbox(template):
    with pytest.raises(Exception, match=r"unsafe|not safely|no loader"):
        render_jinja_template([[{"role": "user", "content": "x"}]], chat_template=template)


def test_files_that_the_text_names_are_there():
    text = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(tests/\w+\.py)`", text))
    assert len(named) > 10
    assert {name for name in named if not (ROOT / name).is_file()} == set()
    assert all(
        "docs/security.md" in (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md")
    )
