"""What stands in place of the sampled gap in Eq. 9: each by hand, and against each other on average over the samples."""

from contextlib import nullcontext

import pytest
import torch
from conftest import VOCAB, make_model, make_prompts, rounding
from peft import LoraConfig
from trainers import lines, make_args, make_trainer

from camopd.forward import Forward
from camopd.loss import Loss
from camopd.samples import LossTerms, MicroBatch, Sample
from camopd.teachers.local import LocalTeacher
from camopd.token_rules import rule_of


PROMPT = [5, 6, 7]
SEEDS = {"general": 2, "domain": 3}  # of the teachers
GRADIENT = rounding(10)


def make_loss(tmp_path, student, **settings):
    args = make_args(tmp_path, **settings)
    teachers = {branch: LocalTeacher(make_model(seed), branch, "cpu", 4) for branch, seed in SEEDS.items()}

    def run(function, *inputs, model=None):  # as the trainer's, which takes a model in its wrapper
        return function(student, *inputs)

    forward = Forward(student, run, student, nullcontext, 2, 0, None, "the model")
    return Loss(args, forward, teachers, rule_of(args))


def make_batch(student, rows, terms, columns=("gaps",)) -> MicroBatch:
    """Rows of (branch, completion) as scoring leaves them."""
    samples = []
    for place, (branch, completion) in enumerate(rows):
        mask = torch.ones(len(completion), dtype=torch.bool)
        sample = Sample(branch, place, PROMPT + completion, len(PROMPT), mask, len(completion), False)
        teacher = make_model(SEEDS[branch])
        own, other = (of_logits(model, completion) for model in (student, teacher))
        at = (range(len(completion)), completion)
        sample.gaps = (other[at] - own[at]).detach()
        samples.append(sample)
    return MicroBatch.of(samples, columns, terms)


def of_logits(model, completion) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([PROMPT + completion])).logits[0]
    return logits[len(PROMPT) - 1 : -1].log_softmax(dim=-1)


def gradient(model, loss) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


ROWS = [("general", [8, 9, 2]), ("domain", [10, 11]), ("general", [12])]
TERMS = LossTerms(5, None, {"general": 2.0, "domain": 1.0})


def test_full_divergence_is_eq_9_with_the_kl_in_place_of_its_sample(tmp_path):
    student = make_model(1)
    loss, _, _ = make_loss(tmp_path, student, divergence="full")(make_batch(student, ROWS, TERMS))
    found = gradient(student, loss)
    expected = torch.zeros(())
    for branch, completion in ROWS:
        own, other = (
            of_logits(student, completion),
            of_logits(make_model(SEEDS[branch]), completion),
        )
        kl = (own.exp() * (own - other.detach())).sum(dim=-1)
        expected = expected + TERMS.scale[branch] * kl.mean() / TERMS.num_kept
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(found, gradient(student, expected), atol=GRADIENT, rtol=1e-3)


def every_next_token(tmp_path, count=None, **settings) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of the loss for the first tokens, each as a completion of one, (count, P), and every token's probability."""
    student = make_model(1)
    loss = make_loss(tmp_path, student, **settings)
    probabilities = of_logits(student, [4])[0].exp().detach()
    terms = LossTerms(1, None, {"general": 1.0, "domain": 1.0})
    found = []
    for token in range(count or len(VOCAB)):
        value, _, _ = loss(make_batch(student, [("general", [token])], terms))
        found.append(gradient(student, value))
    return torch.stack(found).double(), probabilities.double()


def test_sampled_gap_has_the_gradient_of_the_kl_on_average_with_and_without_the_baseline(tmp_path):
    full = every_next_token(tmp_path, 1, divergence="full")[0][0]  # whichever token follows
    means, spreads = {}, {}
    for baseline in ("none", "kl"):
        gradients, probabilities = every_next_token(tmp_path, baseline=baseline)
        means[baseline] = probabilities @ gradients
        spreads[baseline] = float(probabilities @ (gradients - means[baseline]).square().sum(dim=1))
        torch.testing.assert_close(means[baseline], full, atol=GRADIENT, rtol=1e-3)
    assert 0 < spreads["kl"] < spreads["none"]


def test_top_k_of_all_tokens_but_one_is_the_full_divergence(tmp_path):
    student = make_model(1)
    batch = make_batch(student, ROWS, TERMS)
    for (branch, completion), seen in zip(ROWS, batch.seen, strict=True):
        top = of_logits(make_model(SEEDS[branch]), completion).detach().topk(len(VOCAB) - 1, dim=-1)
        seen["teacher_top_ids"], seen["teacher_top_logps"] = top.indices, top.values
    losses = [make_loss(tmp_path, student, divergence=kind)(batch)[0] for kind in ("full", "top_k")]
    first, second = (gradient(student, loss) for loss in losses)
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-4)
    torch.testing.assert_close(first, second, atol=100 * GRADIENT, rtol=1e-2)


def test_dummy_has_a_backward_of_zero(tmp_path):
    student = make_model(1)
    for settings in ({"divergence": "full"}, {"divergence": "top_k"}, {"baseline": "kl"}):
        loss, _, _ = make_loss(tmp_path, student, **settings)(MicroBatch.dummy(4, TERMS))
        assert not gradient(student, loss).any()


@pytest.mark.parametrize("settings", [{"divergence": "full"}, {"baseline": "kl"}, {"divergence": "top_k"}], ids=str)
def test_run_trains_with_any_of_them(settings, tmp_path, tokenizer):
    make_trainer(
        tmp_path, tokenizer, max_steps=2, schedule="general:1+domain:1", divergence_top_k=5, **settings
    ).train()
    first, second = lines(tmp_path)
    assert first["grad_norm"] > 0 and second["grad_norm"] > 0
    assert (first["loss"] > 0) or "baseline" in settings


def test_student_itself_gives_its_whole_distribution_after_its_own_prompt(tmp_path, tokenizer):
    trainer = make_trainer(
        tmp_path, tokenizer, schedule="general", teachers={"general": "self"}, teacher_prompt={"general": "ab {prompt}"},
        train_dataset={"general": make_prompts("general")}, divergence="full",
    )  # fmt: skip
    samples, _ = trainer.roll_out(trainer.train_dataset.rows_of(0), 4)
    trainer.scorer.score(samples, ["general"])
    loss, _, _ = trainer.loss_of(MicroBatch.of(samples, ("gaps",), LossTerms(len(samples), None, {"general": 1.0})))
    expected = 0.0
    for sample in samples:
        found = []
        for prompt in (sample.token_ids[: sample.prompt_len], sample.teacher_prompt):
            logits = trainer.model(torch.tensor([prompt + sample.token_ids[sample.prompt_len :]])).logits[0]
            found.append(logits[len(prompt) - 1 : -1].log_softmax(dim=-1))
        own, other = found
        expected += (own.exp() * (own - other)).sum(dim=-1).mean().item() / len(samples)
    assert expected > 0.01 and loss.item() == pytest.approx(expected, rel=1e-4)


def test_top_k_of_a_server_is_that_of_the_same_teacher_in_the_process(tmp_path, tokenizer, start_server):
    server = start_server(model=make_model(2), compact=True)
    losses = []
    for name, teacher in (("server", server.url), ("process", make_model(2))):
        make_trainer(
            tmp_path / name, tokenizer, teachers={"general": teacher, "domain": make_model(3)}, max_steps=1,
            schedule="general:1+domain:1", selection=False, divergence="top_k", divergence_top_k=5,
        ).train()  # fmt: skip
        losses.append(lines(tmp_path / name)[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("settings", [{"divergence": "full"}, {"baseline": "kl"}], ids=str)
def test_exact_kl_of_a_server_is_refused(settings, tmp_path, tokenizer, start_server):
    server = start_server(model=make_model(2))
    with pytest.raises(
        ValueError, match=r"needs the whole distribution of every teacher, and that of branch 'general'"
    ):
        make_trainer(tmp_path, tokenizer, teachers={"general": server.url, "domain": make_model(3)}, **settings)


def test_more_likeliest_tokens_than_a_teacher_has_are_refused_before_the_first_rollout(tmp_path, tokenizer):
    settings = {"divergence": "top_k", "divergence_top_k": len(VOCAB) + 1}
    with pytest.raises(
        ValueError, match=rf"divergence_top_k={len(VOCAB) + 1} .* branch 'general'.* has: {len(VOCAB)}\."
    ):
        make_trainer(tmp_path, tokenizer, teachers={"general": make_model(2), "domain": make_model(3)}, **settings)
    with pytest.raises(ValueError, match=rf"of branch 'general', 'adapter_off:.*, has: {len(VOCAB)}\."):
        make_trainer(
            tmp_path / "lora", tokenizer, teachers={"general": "adapter_off", "domain": "adapter_off"},
            peft_config=LoraConfig(target_modules="all-linear"), **settings,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"divergence": "full", "baseline": "kl"}, "does not sample it"),
        ({"divergence": "full", "token_rule": "relaxed_opd"}, "is about the sampled gap"),
        ({"baseline": "kl", "token_rule": "teacher_free"}, "is about the sampled gap"),
        (
            {"divergence": "top_k", "token_rule": "selectkd"},
            "would not be used: divergence='top_k' is a rule of its own",
        ),
        *(
            (
                {"branch_weights": "sigma", "schedule": "general:1+domain:1", **asked},
                "is about the spread of the sampled gaps",
            )
            for asked in ({"divergence": "full"}, {"divergence": "top_k"}, {"baseline": "kl"})
        ),
        ({"divergence": "half"}, "divergence must be one of"),
        ({"divergence": "top_k", "divergence_top_k": 0}, "divergence_top_k must be a whole number"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        make_args(tmp_path, **settings)
