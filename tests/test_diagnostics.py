"""Coherence and conflict of a step against plain autograd, and that looking at gradients changes nothing."""

import copy
import math
import shutil

import pytest
import torch
from conftest import make_model, make_prompts, rounding
from peft import LoraConfig
from steps import FakeSampler, use_sampler
from trainers import lines, make_trainer
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from camopd.gradients import CONTROL_DRAWS
from camopd.step import StepCallback


COHERENCE = ("coh_full", "coh_selected", "gcg", "gcg_control", "gcg_excess")


def by_hand(trainer, samples, model) -> dict[str, dict[int, torch.Tensor]]:
    """Gradient of each sample's own term of Eq. 9 (without 1/|S|), branch -> position -> vector, one backward each."""
    layers = [m for m in model.model.layers[-1].modules() if isinstance(m, torch.nn.Linear) and m.weight.requires_grad]
    gradients: dict[str, dict[int, torch.Tensor]] = {}
    for sample in samples:
        ids, start, branch = sample.token_ids, sample.prompt_len, sample.branch
        length = len(ids) - start
        if not length:
            continue
        logits = model(torch.tensor([ids])).logits[0, start - 1 : -1]
        logps = logits.log_softmax(dim=-1)[range(length), ids[start:]]
        loss = 0
        for t in range(length):
            weight = math.exp(logps[t].item() - sample.rollout_logps[t].item())
            weight = weight if 0.5 <= weight <= 2 else 0.0
            gap = sample.teacher_logps[t] - sample.student_logps[t]
            loss = loss - weight * trainer.branches[branch].scale * gap * logps[t] / length
        found = torch.autograd.grad(loss, [layer.weight for layer in layers])
        gradients.setdefault(branch, {})[sample.position] = torch.cat([g.flatten() for g in found]).double()
    return gradients


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": "general:1,domain:1"},
        {"schedule": "general:1,domain:1", "padding_free": True, "per_device_train_batch_size": 4},
        {"schedule": "domain:1+general:3"},
        {"schedule": "general:1,domain:1", "selection": False},
        {"schedule": "general:1,domain:1", "peft_config": LoraConfig(r=3, init_lora_weights="gaussian")},
    ],
    ids=["alternating", "padding_free", "mixed", "without_selection", "lora"],
)
def test_step_writes_the_coherence_and_conflict_of_a_loop_over_its_samples(settings, tmp_path, tokenizer):
    trainer = make_trainer(
        tmp_path, tokenizer, max_steps=1, prompts_per_step=12, max_completion_length=9, mass_target=0.6, optim="sgd",
        teachers={"general": make_model(2), "domain": make_model(3)}, **settings,
    )  # fmt: skip
    use_sampler(trainer, FakeSampler())
    expected = {}

    class Beside(StepCallback):
        def on_step_ready(self, step):
            student = copy.deepcopy(trainer.model)
            expected.update(by_hand(trainer, step.samples, getattr(student, "base_model", student).model
                                    if settings.get("peft_config") else student))  # fmt: skip
            expected["kept"] = set(step.kept)

    trainer.add_callback(Beside())
    trainer.train()
    (line,) = lines(tmp_path)
    kept = expected.pop("kept")
    assert len(expected) == line["branch"].count("+") + 1
    for branch, gradients in expected.items():

        def coh(positions, gradients=gradients):
            chosen = [gradients[position] for position in positions]
            return (sum(chosen).norm() / sum(gradient.norm() for gradient in chosen)).item()

        full, selected = coh(gradients), coh(kept & set(gradients))
        assert line[f"coherence/{branch}/coh_full"] == pytest.approx(full, rel=rounding(4))
        assert line[f"coherence/{branch}/coh_selected"] == pytest.approx(selected, rel=rounding(4))
        if settings.get("selection") is False:
            assert line[f"coherence/{branch}/gcg"] is None
            continue
        assert len(kept & set(gradients)) < len(gradients)
        gcg = 100 * (selected / full - 1)
        assert line[f"coherence/{branch}/gcg"] == pytest.approx(gcg, abs=0.05)
        # The control, by drawing sets of our own
        draws, places = torch.Generator().manual_seed(9), sorted(gradients)
        random = []
        for _ in range(2000):
            order = torch.randperm(len(places), generator=draws)[: len(kept & set(gradients))]
            random.append(100 * (coh([places[place] for place in order]) / full - 1))
        random = torch.tensor(random)
        random = random[~random.isnan()]  # a sample whose weights all lie outside the band has no gradient
        spread = random.std().item() / math.sqrt(CONTROL_DRAWS)
        control = random.mean().item()
        assert line[f"coherence/{branch}/gcg_control"] == pytest.approx(control, abs=4 * spread + 0.1)
    if "+" in line["branch"]:
        one, other = (sum(g for p, g in gradients.items() if p in kept) / len(kept) for gradients in expected.values())
        assert line["conflict/stale"] == 0
        largest = (one.norm() * other.norm()).item()
        assert line["conflict/dot"] == pytest.approx((one @ other).item(), abs=rounding(4 * largest))
        assert line["conflict/cosine"] == pytest.approx((one @ other).item() / largest, abs=rounding(4))
        for branch, gradient in zip(expected, (one, other), strict=True):
            assert line[f"conflict/{branch}_norm"] == pytest.approx(gradient.norm().item(), rel=rounding(4))
    else:
        assert "conflict/cosine" not in line  # no other branch has had a step


class Gradients(TrainerCallback):
    """Keeps the gradient of each step as the optimizer gets it: clipped."""

    def __init__(self):
        self.found = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found.append(torch.cat([p.grad.flatten().double() for p in model.parameters()]))


@pytest.mark.parametrize("max_grad_norm", [0.5, 1e6])
@pytest.mark.parametrize("optimizer_moments", ["shared", "per_branch"])
def test_stale_conflict_is_that_of_the_gradients_that_autograd_gave(
    max_grad_norm, optimizer_moments, tmp_path, tokenizer
):
    gradients = Gradients()
    trainer = make_trainer(
        tmp_path, tokenizer, schedule="general:2,domain:1", max_steps=5, callbacks=[gradients],
        teachers={"general": make_model(2), "domain": make_model(3)}, max_grad_norm=max_grad_norm,
        optimizer_moments=optimizer_moments,
    )  # fmt: skip
    trainer.train()
    written = lines(tmp_path)
    assert [line["branch"] for line in written] == ["general", "general", "domain", "general", "general"]
    assert all("conflict/cosine" not in line for line in written[:2])
    norms = [line["grad_norm"] for line in written]
    for step, other in ((2, 1), (3, 2), (4, 2)):  # the latest step of the other branch
        line, u, v = written[step], gradients.found[step], gradients.found[other]
        cosine = (u @ v / u.norm() / v.norm()).item()
        assert line["conflict/stale"] == 1
        assert line["conflict/cosine"] == pytest.approx(cosine, abs=rounding(4))
        largest = norms[step] * norms[other]  # before clipping
        assert line["conflict/dot"] == pytest.approx(cosine * largest, abs=rounding(4 * largest))
        assert line[f"conflict/{line['branch']}_norm"] == norms[step]
        assert line[f"conflict/{written[other]['branch']}_norm"] == norms[other]


@pytest.mark.parametrize("stopped_after", [2, 3, 4])
def test_conflict_of_a_resumed_run_is_that_of_one_that_was_not_stopped(stopped_after, tmp_path, tokenizer):
    """After step 3 the next one is the domain's, whose gradient is held against that of step 3."""

    def train(folder, resume=None):
        make_trainer(
            folder, tokenizer, max_steps=5, save_strategy="steps", save_steps=1,
            teachers={"general": make_model(2), "domain": make_model(3)},
        ).train(resume_from_checkpoint=resume)  # fmt: skip
        kinds = ("conflict/", "coherence/")
        return [{name: line[name] for name in line if name.startswith(kinds)} for line in lines(folder)]

    expected = train(tmp_path / "one")
    assert ["conflict/cosine" in line for line in expected] == [False, False, False, True, True]
    name = f"checkpoint-{stopped_after}"
    shutil.copytree(tmp_path / "one" / name, tmp_path / "two" / name)
    shutil.copy(tmp_path / "one" / "metrics.jsonl", tmp_path / "two")
    assert train(tmp_path / "two", str(tmp_path / "two" / name)) == expected


def test_schedule_of_three_branches_is_held_against_the_one_before(tmp_path, tokenizer):
    branches = ("general", "domain", "code")
    make_trainer(
        tmp_path, tokenizer, schedule="general:1,domain:1,code:1", max_steps=4, mass_target=0.8, scale=1.0,
        score="absolute", selection=True, teachers={branch: make_model(2 + place) for place, branch in enumerate(branches)},
        train_dataset={branch: make_prompts(branch) for branch in branches},
    ).train()  # fmt: skip
    pairs = [{name for name in line if name.startswith("conflict/") and "_norm" in name} for line in lines(tmp_path)]
    assert pairs == [
        set(),
        {"conflict/general_norm", "conflict/domain_norm"},
        {"conflict/domain_norm", "conflict/code_norm"},
        {"conflict/code_norm", "conflict/general_norm"},
    ]


def test_branches_are_each_measured_once_in_every_interval(tmp_path, tokenizer):
    make_trainer(
        tmp_path, tokenizer, schedule="general:3,domain:1", max_steps=9, diagnostics_steps=4,
        teachers={"general": make_model(2), "domain": make_model(3)},
    ).train()  # fmt: skip
    measured = [line["step"] for line in lines(tmp_path) if any(name.startswith("coherence/") for name in line)]
    assert measured == [1, 4, 5, 8, 9]
    assert all(line["time/diagnostics"] > 0 for line in lines(tmp_path))


@pytest.mark.parametrize("schedule", ["general:1,domain:1", "general:1+domain:1"])
def test_training_is_the_same_with_and_without(schedule, tmp_path, tokenizer):
    """Parameters, optimizer state, every random number drawn, and every metric that both write, to the last bit."""
    ends = []
    for every in (0, 1):
        torch.manual_seed(0)
        trainer = make_trainer(
            tmp_path / str(every), tokenizer, schedule=schedule, max_steps=4, prompts_per_step=8,
            diagnostics_steps=every, disable_dropout=False, teachers={"general": make_model(2), "domain": make_model(3)},
        )  # fmt: skip
        trainer.model.config.attention_dropout = 0.2
        for layer in trainer.model.model.layers:
            layer.self_attn.attention_dropout = 0.2  # random numbers of the forward, too
        trainer.train()
        state = trainer.optimizer.state_dict()["state"]
        moments = [value for of_param in state.values() for value in of_param.values()]
        ends.append((list(trainer.model.parameters()), moments, torch.get_rng_state(), lines(tmp_path / str(every))))
    (*without, plain), (*with_them, measured) = ends
    for one, other in zip(without, with_them, strict=True):
        assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(one, other, strict=True))
    assert sum("coherence/general/gcg" in line for line in measured) >= 2
    assert not any(name.startswith(("coherence/", "conflict/", "time/diag")) for line in plain for name in line)
    for one, other in zip(plain, measured, strict=True):
        for name, value in one.items():
            if not name.startswith("time/"):
                assert other[name] == value, name


def test_model_whose_layers_cannot_be_watched_is_trained_without_coherence(tmp_path, tokenizer, caplog):
    size = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128, "vocab_size": len(tokenizer)}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    student, teacher = (GPT2LMHeadModel(GPT2Config(**size, **ends)) for _ in range(2))
    trainer = make_trainer(
        tmp_path, tokenizer, model=student, teachers={"general": teacher, "domain": teacher}, max_steps=2,
        schedule="general:1,domain:1",
    )  # fmt: skip
    assert "coherence/* is left out: no transformer block of GPT2LMHeadModel" in caplog.text
    trainer.train()
    assert "conflict/cosine" in lines(tmp_path)[1]


def test_lora_on_bare_parameters_leaves_coherence_out_with_a_warning(tmp_path, tokenizer, caplog):
    """Its matrices are linear layers that are never called: there is nothing to hang on to, and training goes on."""
    trainer = make_trainer(
        tmp_path, tokenizer, max_steps=2, diagnostics_steps=1, schedule="general:1,domain:1",
        teachers={"general": make_model(2), "domain": "adapter_off"},
        peft_config=LoraConfig(r=3, target_modules=[], target_parameters=["q_proj.weight"]),
    )  # fmt: skip
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    assert sum("coherence/* is left out" in record.getMessage() for record in caplog.records) == 1
    assert any(not torch.equal(before[name], weight) for name, weight in trainer.model.named_parameters())
    written = lines(tmp_path)
    assert not any(name.startswith("coherence/") for line in written for name in line)
    assert "conflict/cosine" in written[1]  # of the optimizer's gradients, which are there
