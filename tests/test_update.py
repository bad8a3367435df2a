"""What an update is measured to do to the weights, in runs."""

import pytest
from conftest import make_model
from trainers import ROUNDED, half, lines, make_trainer

import camopd.setup


pytestmark = pytest.mark.usefixtures("without_compiler")


def changed_shares(tmp_path, tokenizer, model, **kwargs):
    make_trainer(tmp_path, tokenizer, model=model, learning_rate=2e-6, diagnostics_steps=0, **kwargs).train()
    return [line["update/changed_share"] for line in lines(tmp_path)]


def test_float32_weights_move_and_bfloat16_ones_do_not(tmp_path, tokenizer, monkeypatch):
    """Three kinds of weights, the same learning rate. `make_model`'s weights have a standard deviation of 0.3."""
    in_float32 = changed_shares(tmp_path / "float32", tokenizer, make_model(1))
    rounded = changed_shares(tmp_path / "rounded", tokenizer, half(), **ROUNDED)
    monkeypatch.setattr(camopd.setup, "check_masters", lambda *_: None)
    nearest = changed_shares(tmp_path / "nearest", tokenizer, half())
    assert min(in_float32[:3]) > 0.9  # the embeddings of characters that do not occur do not move
    assert max(nearest) < 0.02
    assert all(1.5 * low < high for low, high in zip(nearest, rounded, strict=True))
