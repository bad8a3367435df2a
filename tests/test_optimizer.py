"""Adam by hand, against torch's own, and against loops over numbers."""

import math

import pytest
import torch
from conftest import rounding
from torch.optim import SGD, AdamW
from trainers import make_args
from trl import DistillationTrainer

import camopd.optimizer
from camopd import CaMOPDTrainer
from camopd.optimizer import BranchAdamW, update_products


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in ((3, 4), (5,), ())]


def gradients(step):
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(size, generator=generator) for size in ((3, 4), (5,), ())]


def set_gradients(params, step):
    for param, grad in zip(params, gradients(step), strict=True):
        param.grad = grad.clone()


def test_branch_adamw_of_one_branch_is_torchs():
    ours, theirs = parameters(), parameters()
    settings = {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    optimizers = BranchAdamW(ours, branches=("general",), **settings), AdamW(theirs, **settings)
    for step in range(7):
        for params, optimizer in zip((ours, theirs), optimizers, strict=True):
            set_gradients(params, step)
            optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=rounding(2, sums=7), rtol=0)


def test_branch_adamw_has_a_first_moment_for_each_branch():
    params = parameters()
    optimizer = BranchAdamW(params, branches=("general", "domain"), lr=0.01, weight_decay=0.1)
    schedule = ["general", "general", "general", "domain"] * 2
    for step, branch in enumerate(schedule):
        optimizer.branch = branch
        set_gradients(params, step)
        optimizer.step()

    for index, start in enumerate(parameters()):  # number by number
        for place, value in enumerate(start.detach().reshape(-1).tolist()):
            moments, counts, square = {"general": 0.0, "domain": 0.0}, {"general": 0, "domain": 0}, 0.0
            for step, branch in enumerate(schedule):
                grad = gradients(step)[index].reshape(-1)[place].item()
                counts[branch] += 1
                moments[branch] = 0.9 * moments[branch] + 0.1 * grad
                square = 0.999 * square + 0.001 * grad**2
                first = moments[branch] / (1 - 0.9 ** counts[branch])
                second = square / (1 - 0.999 ** (step + 1))
                value = value * (1 - 0.01 * 0.1) - 0.01 * first / (math.sqrt(second) + 1e-8)
            assert params[index].detach().reshape(-1)[place].item() == pytest.approx(value, abs=rounding(2, sums=8))


def test_moment_that_is_shared_has_this_share_of_the_domain():
    """beta1 = 0.9, scale 2, three general steps to one domain step of equal norm: 17 % of it is the domain's gradient."""
    general, domain = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 1.0])
    param = torch.nn.Parameter(torch.zeros(2))
    shared, own = AdamW([param]), BranchAdamW([param], branches=("general", "domain"))
    for step in range(400):
        own.branch = "domain" if step % 4 == 3 else "general"
        param.grad = (domain if own.branch == "domain" else general).clone()
        shared.step()
        own.step()
    moment = shared.state[param]["exp_avg"]
    assert (moment[1] / moment.sum()).item() == pytest.approx(0.17, abs=0.005)
    assert own.state[param]["domain/exp_avg"].tolist() == pytest.approx([0.0, 1.0], abs=1e-4)


def test_checkpoint_goes_on_exactly():
    whole, parted = parameters(), parameters()
    optimizer, first = (BranchAdamW(params, branches=("general", "domain")) for params in (whole, parted))
    for step in range(6):
        if step == 3:
            saved = first.state_dict()
            first = BranchAdamW(parted, branches=("general", "domain"))
            first.load_state_dict(saved)
        for params, each in ((whole, optimizer), (parted, first)):
            each.branch = "domain" if step % 2 else "general"
            set_gradients(params, step)
            each.step()
    for one, other in zip(whole, parted, strict=True):
        assert torch.equal(one, other)


def test_names_of_branches_are_not_taken_for_another_state():
    params = parameters()
    optimizer = BranchAdamW(params, branches=("sq", "domain"))
    for step in range(3):
        optimizer.branch = ("sq", "domain")[step % 2]
        set_gradients(params, step)
        optimizer.step()
    state = optimizer.state[params[0]]
    assert (state["exp_avg_sq"] > 0).all() and not torch.equal(state["exp_avg_sq"], state["sq/exp_avg"])


def test_closure_is_refused():
    with pytest.raises(ValueError, match="takes no closure: a rollout serves one update"):
        BranchAdamW(parameters(), branches=("general",)).step(lambda: 0.0)


@pytest.mark.parametrize("make", [AdamW, lambda params, **kw: BranchAdamW(params, ("general", "domain"), **kw)])
def test_update_products_are_those_of_the_real_update(make):
    params = parameters()
    optimizer = make(params, lr=0.01, weight_decay=0.0)
    for step in range(5):
        before = [param.detach().clone() for param in params]
        set_gradients(params, step)
        optimizer.branch = "domain" if step % 2 else "general"
        optimizer.step()
    update = torch.cat([(old - new.detach()).reshape(-1) for old, new in zip(before, params, strict=True)])
    gradient = torch.cat([param.grad.reshape(-1) for param in params])
    both, own, other = update_products(optimizer).tolist()
    expected = torch.cosine_similarity(update, gradient, dim=0).item()
    assert both / math.sqrt(own * other) == pytest.approx(expected, abs=rounding(1 / 0.01, sums=1))
    assert other == pytest.approx(gradient.square().sum().item(), rel=rounding(1, sums=gradient.numel()))


def test_update_products_of_large_parameters_are_computed_in_pieces(monkeypatch):
    params = parameters()
    optimizer = AdamW(params)
    set_gradients(params, 0)
    optimizer.step()
    whole = update_products(optimizer)
    monkeypatch.setattr(camopd.optimizer, "CHUNK", 2)
    torch.testing.assert_close(update_products(optimizer), whole)


def test_optimizers_without_readable_adam_moments_have_no_products():
    params = parameters()
    set_gradients(params, 0)
    momentum, eight_bit = SGD(params, lr=0.1, momentum=0.9), AdamW(params)
    momentum.step()
    eight_bit.step()
    for param in params:
        for name in ("exp_avg", "exp_avg_sq"):
            eight_bit.state[param][name] = eight_bit.state[param][name].to(torch.uint8)
    assert update_products(momentum) is None
    low_rank = AdamW(params)
    low_rank.step()
    low_rank.state[params[0]]["exp_avg"] = low_rank.state[params[0]]["exp_avg"][:1]
    assert update_products(low_rank) is None
    assert update_products(eight_bit) is None


def test_8_bit_moments_that_say_they_are_floats_are_not_read(monkeypatch):
    from torchao.optim import AdamW8bit

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    param = torch.nn.Parameter(torch.zeros(64, 64, dtype=torch.bfloat16))
    param.grad = torch.ones_like(param)
    optimizer = AdamW8bit([param])
    optimizer.step()
    assert optimizer.state[param]["exp_avg"].is_floating_point()
    assert update_products(optimizer) is None


@pytest.mark.parametrize("optimizer_moments", ["shared", "per_branch"])
def test_optimizer_class_is_known_without_a_trainer_as_in_the_parent(optimizer_moments, tmp_path):
    args = make_args(
        tmp_path, optimizer_moments=optimizer_moments, schedule="general+domain,domain+general,general", adam_beta1=0.5
    )
    cls, kwargs = CaMOPDTrainer.get_optimizer_cls_and_kwargs(args, None)
    if optimizer_moments == "shared":
        assert (cls, kwargs) == DistillationTrainer.get_optimizer_cls_and_kwargs(args, None)
    else:
        assert (cls.__name__, kwargs["branches"], kwargs["betas"][0]) == (
            "BranchAdamW",
            ("domain+general", "general"),
            0.5,
        )
