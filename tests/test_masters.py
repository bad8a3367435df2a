"""16-bit weights: who may step them, what rounding does to them, and how many a step changes."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from conftest import make_model
from peft import LoraConfig, get_peft_model
from trainers import ROUNDED, half, lines, make_args, make_trainer
from transformers.training_args import OptimizerNames

from camopd import masters
from camopd.masters import ChangedShare, check_masters, quantised_adapters, restore_adapters, round_alike


pytestmark = pytest.mark.usefixtures("without_compiler")


def launcher(mixed_precision="bf16", **plugins):
    return SimpleNamespace(mixed_precision=mixed_precision, state=SimpleNamespace(**plugins))


# ------------------------------------------------------------------------------------------------------ who may step


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_without_masters_are_refused_with_the_ways_out(dtype, tmp_path, tokenizer):
    with pytest.raises(ValueError) as error:
        make_trainer(tmp_path, tokenizer, model=make_model(1).to(dtype), learning_rate=2e-6)
    text = str(error.value)
    weights = sum(param.numel() for param in make_model(1).parameters())
    for part in (
        f"{weights / 1e6:.3g} million", str(dtype), "adamw_torch", "2e-06", "dtype: float32", "bf16: true", "LoRA",
        "ZeRO-2", "FSDP2", "adamw_torch_8bit", "bf16_stochastic_round=True",
    ):  # fmt: skip
        assert part in text


def test_modules_beside_an_adapter_are_refused_with_the_ways_out_of_an_adapter(tmp_path):
    """peft makes LoRA weights of a bfloat16 model float32, and leaves `modules_to_save` as they are."""
    student = get_peft_model(half(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match=r"(?s)lm_head\.modules_to_save.*leave .*modules_to_save out") as error:
        check_masters(student, make_args(tmp_path), launcher())
    assert "train a LoRA adapter" not in str(error.value)


def test_dtype_in_model_init_kwargs_is_refused_too(tmp_path, tokenizer):
    make_model(1).save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    with pytest.raises(ValueError, match=r"are torch\.bfloat16"):
        make_trainer(
            tmp_path, tokenizer, model=str(tmp_path / "student"), model_init_kwargs={"dtype": "bfloat16"}, bf16=True
        )


@pytest.mark.parametrize("autocast", [True, False])
def test_masters_are_asked_of_trained_weights_only(autocast, tmp_path):
    """A LoRA on a bfloat16 model: peft makes its weights float32 unless it is told not to."""
    student = get_peft_model(half(), LoraConfig(), autocast_adapter_dtype=autocast)
    if autocast:
        check_masters(student, make_args(tmp_path), launcher())
    else:
        with pytest.raises(ValueError, match=r"lora_A.*bfloat16"):
            check_masters(student, make_args(tmp_path), launcher())


DEEPSPEED = {"bf16": {"enabled": True}, "train_micro_batch_size_per_gpu": 1}


@pytest.mark.parametrize(
    ("accelerator", "kept"),
    [
        (launcher(), False),
        (launcher("no"), False),
        *((launcher(deepspeed_plugin=DeepSpeedPlugin(zero_stage=stage)), True) for stage in range(4)),
        (launcher("no", deepspeed_plugin=DeepSpeedPlugin(zero_stage=2)), True),
        (launcher("no", deepspeed_plugin=DeepSpeedPlugin(zero_stage=0)), False),
        (
            launcher(
                deepspeed_plugin=DeepSpeedPlugin(
                    {
                        "train_micro_batch_size_per_gpu": 1,
                        "bf16": {"enabled": True, "bf16_master_weights_and_grads": True},
                        "zero_optimization": {"stage": 2},
                    }
                )
            ),
            False,
        ),
        (launcher(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2)), True),
        (launcher("no", fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2)), False),
    ],
)
def test_masters_are_kept_by_these_launchers(accelerator, kept, tmp_path):
    if kept:
        check_masters(half(), make_args(tmp_path), accelerator)
    else:
        with pytest.raises(ValueError, match="without float32 copies"):
            check_masters(half(), make_args(tmp_path), accelerator)


@pytest.mark.parametrize("name", [item.value for item in OptimizerNames])
def test_optimizers_of_transformers_pass_only_where_they_lose_nothing(name, tmp_path):
    if name in ("lomo", "adalomo") or name.endswith("_layerwise"):  # an update per micro-batch
        with pytest.raises(
            ValueError, match=f"optim='{name}' changes the weights in the backward of every micro-batch"
        ):
            make_args(tmp_path, optim=name)
        return
    args = make_args(tmp_path, optim=name)
    if name == "stable_adamw":  # Kahan summation by itself
        return check_masters(half(), args, launcher())
    with pytest.raises(ValueError, match=f"and {name} would step them"):
        check_masters(half(), args, launcher())
    if (
        option := {
            **dict.fromkeys(masters.TORCHAO, "bf16_stochastic_round"),
            "adamw_anyprecision": "use_kahan_summation",
        }.get(name)
    ) is not None:
        args.optim_args = f"{option}=True, eps=1e-8"
        check_masters(half(), args, launcher())
        args.optim_args = f"{option}=False"
        with pytest.raises(ValueError, match=f"and {name} would step them"):
            check_masters(half(), args, launcher())


def test_moments_per_branch_have_no_masters(tmp_path):
    with pytest.raises(ValueError, match="optimizer_moments='per_branch' would step them"):
        check_masters(half(), make_args(tmp_path, optimizer_moments="per_branch"), launcher())


def test_float16_weights_are_not_rounded_at_random(tmp_path, caplog):
    """torchao does so with bfloat16 alone."""
    with pytest.raises(ValueError, match=r"are torch\.float16, and adamw_torch_8bit would"):
        check_masters(make_model(1).half(), make_args(tmp_path, **ROUNDED), launcher())
    check_masters(make_model(1), make_args(tmp_path, **ROUNDED), launcher())
    assert "bf16_stochastic_round=True does nothing for weights that are not bfloat16" in caplog.text


def test_optimizer_that_was_passed_is_judged_by_what_it_steps(tmp_path, caplog):
    from torchao.optim import _AdamW

    args, student = make_args(tmp_path), half()
    with pytest.raises(ValueError, match="and SGD would step them"):
        check_masters(student, args, launcher(), torch.optim.SGD(student.parameters(), lr=1.0))
    masters = [param.detach().float() for param in student.parameters()]
    check_masters(student, args, launcher(), torch.optim.SGD(masters, lr=1.0))  # it steps copies
    check_masters(student, args, launcher(), _AdamW(student.parameters(), bf16_stochastic_round=True))
    assert not caplog.records

    class Renamed(torch.optim.SGD):
        pass

    with pytest.raises(ValueError, match="and Renamed would step them"):
        check_masters(student, args, launcher(), Renamed(student.parameters(), lr=1.0))

    class Unknown(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    check_masters(student, args, launcher(), Unknown(student.parameters(), lr=1.0))
    assert "If Unknown keeps no float32 copy" in caplog.text and "update/changed_share" in caplog.text


def test_adapters_of_a_quantised_model_stay_in_float32():
    """TRL casts them to bfloat16, which a learning rate of 2e-6 does not move."""
    student = get_peft_model(make_model(1), LoraConfig())
    student.base_model.model.is_loaded_in_4bit = True
    before = {name: param.detach().clone() for name, param in student.named_parameters()}
    kept = quantised_adapters(student)
    for param in student.parameters():
        if param.requires_grad:
            param.data = param.data.to(torch.bfloat16)
    restore_adapters(student, kept, launcher())
    for name, param in student.named_parameters():
        assert param.dtype == torch.float32 and torch.equal(param, before[name])


# ----------------------------------------------------------------------------------------------- how many are changed


@pytest.mark.parametrize("sizes", [[(3, 4), (), (5,)], [(700,), (1,), (0,), (299, 1)]])
def test_changed_share_is_that_of_a_loop(sizes):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in sizes]
    optimizer = torch.optim.SGD(params, lr=1.0)
    share = ChangedShare(optimizer, total=sum(param.numel() for param in params))
    expected = 0
    for param in params:
        param.grad = (torch.rand(param.shape, generator=generator) < 0.3).float()
        expected += sum(value != 0 for value in param.grad.reshape(-1).tolist())
    optimizer.step()
    assert (share.changed, share.compared) == (expected, sum(param.numel() for param in params))
    share.start()
    assert (share.changed, share.compared) == (0, 0)


def test_changed_share_of_large_models_is_sampled_in_proportion(monkeypatch):
    monkeypatch.setattr(masters, "SAMPLED_WEIGHTS", 10_000)
    params = [torch.nn.Parameter(torch.zeros(size)) for size in [(300, 1000), (7,), (100, 1000), *[(3,)] * 1000]]
    optimizer = torch.optim.SGD(params, lr=1.0)
    total = sum(param.numel() for param in params)
    share = ChangedShare(optimizer, total)
    for param, value in zip(params, [1.0, 0.0] + [0.0] * 1001, strict=True):
        param.grad = torch.full_like(param, value)
    params[2].grad[:, ::4] = 1.0
    optimizer.step()
    true = (300_000 + 25_000) / total
    assert total // 41 <= share.compared <= 10_000
    # p (1 - p) / n, and five standard deviations
    assert share.changed / share.compared == pytest.approx(true, abs=5 * (true * (1 - true) / share.compared) ** 0.5)


# ------------------------------------------------------------------------------------------------ stochastic rounding


def steps_of(params, optimizer, number):
    for step in range(number):
        for param in params:
            generator = torch.Generator().manual_seed(1000 + step)
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype) + 1
        optimizer.step()


def test_weights_rounded_at_random_go_where_float32_ones_go():
    """On average over many weights: 50 steps of 2e-6 from 1.0, where bfloat16's next number is 0.0039 away."""
    from torchao.optim import AdamW8bit

    ends = {}
    for name, dtype, rounds in (
        ("float32", torch.float32, False),
        ("random", torch.bfloat16, True),
        ("nearest", torch.bfloat16, False),
    ):
        torch.manual_seed(0)
        param = torch.nn.Parameter(torch.ones(256, 256, dtype=dtype))
        optimizer = AdamW8bit([param], lr=2e-6, weight_decay=0.0, bf16_stochastic_round=rounds)
        steps_of([param], optimizer, 50)
        ends[name] = param.detach().double()
    assert (ends["nearest"] == 1).all()
    way = 1 - ends["float32"].mean().item()
    # A weight is one spacing s below with probability way / s, so that its variance is at most way * s.
    deviation = (way * 2**-8 / 256**2) ** 0.5
    assert 1 - ends["random"].mean().item() == pytest.approx(way, abs=5 * deviation)
    assert way > 10 * deviation


def test_rounding_follows_from_the_seed_alone_and_leaves_the_random_numbers_of_training(tmp_path):
    from torchao.optim import AdamW8bit

    ends = []
    for other in (1, 2):  # as on two ranks, which draw different rollouts
        param = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        optimizer = AdamW8bit([param], lr=1e-3, bf16_stochastic_round=True)
        round_alike(optimizer, torch.device("cpu"), lambda: 5)
        param.grad = torch.ones_like(param)
        torch.manual_seed(other)
        expected = torch.rand(3)
        torch.manual_seed(other)
        optimizer.step()
        assert torch.equal(torch.rand(3), expected)
        ends.append(param.detach().clone())
    assert torch.equal(*ends) and len(ends[0].unique()) == 2


def test_run_with_rounding_goes_on_exactly(tmp_path, tokenizer):
    """With gradient clipping, a schedule of the learning rate, and 8-bit states (of weights from 4096 numbers on)."""
    kwargs = {
        "teachers": {"general": make_model(2, 128), "domain": make_model(1, 128)}, **ROUNDED, "max_grad_norm": 0.1,
        "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3, "lr_scheduler_type": "cosine",
    }  # fmt: skip
    ends = []
    for folder in ("whole", "parted"):
        trainer = make_trainer(tmp_path / folder, tokenizer, model=half(vocab_size=128), **kwargs)
        if folder == "parted":
            shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / folder / "checkpoint-2")
            shutil.copy(tmp_path / "whole" / "metrics.jsonl", tmp_path / folder)
        trainer.train(resume_from_checkpoint=folder == "parted")
        ends.append([param.detach().clone() for param in trainer.model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))
    whole, parted = lines(tmp_path / "whole"), lines(tmp_path / "parted")
    for key in ("loss", "grad_norm", "learning_rate", "update/changed_share", "update/cosine"):
        assert [line[key] for line in whole] == [line[key] for line in parted], key
    assert whole[-1]["update/cosine"] is None  # 8-bit moments are not read
    assert whole[2]["learning_rate"] == pytest.approx(1e-3 / 2, rel=1e-6)  # half-way, float32 in torchao


def test_arguments_of_an_optimizer_that_takes_none_are_refused(tmp_path):
    for settings in ({}, {"optim": "adafactor"}, {**ROUNDED, "optimizer_moments": "per_branch"}):
        with pytest.raises(ValueError, match="optim_args='bf16_stochastic_round=True' would be ignored"):
            make_args(tmp_path, **{**settings, "optim_args": "bf16_stochastic_round=True"})
    with pytest.raises(ValueError, match="per_branch' is an AdamW of its own and cannot be optim='adamw_torch_8bit'"):
        make_args(tmp_path, optim="adamw_torch_8bit", optimizer_moments="per_branch")


@pytest.mark.parametrize("seed", [0, 20261129, 2**62, -1])
def test_numbers_of_rounding_follow_from_every_seed(seed, monkeypatch):
    """torch.manual_seed takes numbers of 64 bits."""
    given = []
    monkeypatch.setattr(masters, "rounds_stochastically", lambda *_: True)
    monkeypatch.setattr(masters, "round_alike", lambda optimizer, device, number: given.append(number))
    for rank in (0, 3):
        masters.round_by_step(
            SimpleNamespace(seed=seed, process_index=rank, device=None), None, lambda: 5, sharded=True
        )
    for number in given:
        torch.manual_seed(number())
    assert len({number() for number in given}) == 2
