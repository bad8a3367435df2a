"""The student's weights as files for rollout servers (camopd/rollout_weights.py)."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import make_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from camopd.errors import CaMOPDError
from camopd.rollout_weights import FOLDER, WeightsFolder, check_adapter


LORA = {"r": 4, "lora_alpha": 64, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


def trainer_of(model):
    return SimpleNamespace(model=model, accelerator=Accelerator(cpu=True))


def files(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        part = load_file(path)
        assert not set(part) & set(found)
        found |= part
    return found


@pytest.mark.parametrize("most", [1, 20_000, 4 << 30])
def test_files_have_every_weight_once_whatever_a_file_holds(tmp_path, monkeypatch, most):
    monkeypatch.setattr("camopd.rollout_weights.FILE_BYTES", most)
    model = make_model(1)
    version = WeightsFolder(tmp_path, is_main=True).write(trainer_of(model))
    found, wanted = files(version.folder), dict(model.named_parameters())
    assert found.keys() == wanted.keys() and not version.is_adapter
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())
    assert version.folder.parent == tmp_path / FOLDER
    count = len(list(version.folder.iterdir()))
    assert count == len(wanted) if most == 1 else count == 1 or most < 4 << 30
    assert [path.name for path in version.folder.parent.iterdir()] == [version.name]  # nothing half-written


def test_weights_are_written_in_the_type_that_the_student_computes_in(tmp_path):
    model = make_model(1)
    trainer = trainer_of(model)
    trainer.accelerator = SimpleNamespace(
        mixed_precision="bf16", state=trainer.accelerator.state, unwrap_model=lambda model: model, is_fsdp2=False
    )
    found = files(WeightsFolder(tmp_path, is_main=True).write(trainer).folder)
    assert all(torch.equal(found[name], weight.bfloat16()) for name, weight in model.named_parameters())


@pytest.mark.parametrize("more", [[], ["embed_tokens"]])
def test_adapter_alone_is_written_as_peft_has_it(more, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(make_model(1), LoraConfig(**{**LORA, "target_modules": [*LORA["target_modules"], *more]}))
    ids = torch.tensor([[1, 7, 8, 9]])
    before = model(ids).logits
    version = WeightsFolder(tmp_path, is_main=True).write(trainer_of(model))
    assert version.is_adapter
    assert {path.name for path in version.folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert len(files(version.folder)) == sum(weight.requires_grad for weight in model.parameters())
    again = PeftModel.from_pretrained(make_model(1), version.folder)
    assert torch.equal(again(ids).logits, before) and torch.equal(model(ids).logits, before)
    assert (before - make_model(1)(ids).logits).abs().max() > 0.01


def test_only_the_trained_adapter_of_two_is_written(tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(make_model(1), LoraConfig(**LORA))
    model.add_adapter("start", LoraConfig(**LORA))
    folder = WeightsFolder(tmp_path, is_main=True).write(trainer_of(model)).folder
    again = PeftModel.from_pretrained(make_model(1), folder)
    ids = torch.tensor([[1, 7, 8, 9]])
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_versions_have_names_of_their_own_and_go_when_they_are_dropped(tmp_path):
    (tmp_path / FOLDER / "of-a-run-that-was-killed").mkdir(parents=True)
    folder = WeightsFolder(tmp_path, is_main=True)
    one, two = (folder.write(trainer_of(make_model(seed))) for seed in (1, 2))
    other = WeightsFolder(tmp_path / "other", is_main=True).write(trainer_of(make_model(1)))
    assert len({one.name, two.name, other.name}) == 3
    folder.drop(one)
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == [two.name]
    folder.remove()
    assert not (tmp_path / FOLDER).exists()


def test_rank_that_is_not_the_first_writes_nothing(tmp_path):
    WeightsFolder(tmp_path, is_main=False).write(trainer_of(make_model(1)))
    assert not (tmp_path / FOLDER).exists()


def test_disk_that_cannot_be_written_is_an_error_with_its_name(tmp_path):
    (tmp_path / FOLDER).write_text("a file", encoding="utf-8")
    with pytest.raises(CaMOPDError, match=rf"cannot be written to .*{FOLDER}.*Give another output_dir, or make room"):
        WeightsFolder(tmp_path, is_main=True).write(trainer_of(make_model(1)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which changes the base"),
        ({"init_lora_weights": True, "lora_bias": True}, "lora_bias=True"),
    ],
)
def test_adapter_that_vllm_cannot_apply_is_refused_with_what_it_has(settings, message):
    model = get_peft_model(make_model(1), LoraConfig(**{**LORA, **settings}))
    with pytest.raises(ValueError, match=rf"cannot apply one with .*{message}.*use_vllm=True, which merges"):
        check_adapter(model)


def test_weights_that_are_trained_beside_an_adapter_are_refused():
    model = get_peft_model(make_model(1), LoraConfig(**LORA))
    check_adapter(model)
    model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"1 weights are trained beside it, 'model.embed_tokens.weight'"):
        check_adapter(model)
    check_adapter(make_model(1))


def test_quantised_student_is_refused():
    model = get_peft_model(make_model(1), LoraConfig(**LORA))
    model.base_model.model.is_loaded_in_4bit = True  # as transformers marks it
    with pytest.raises(ValueError, match=r"quantised weights .* cannot be rolled out by vLLM.*Leave use_vllm"):
        check_adapter(model)
