"""What only a GPU shows, held to the CPU's numbers: Triton's head, flex attention, bfloat16, teachers that move,
rounding.

Run by `benchmarks/gpu.sh`. With CAMOPD_GPU_DRY_RUN=1 everything goes on the CPU, where it proves only that it runs.
"""

import copy
import os

import pytest
import torch
from conftest import LOGP, LOSS, make_model, make_prompts, rounding
from plain_logits import (
    SIZES,
    assert_rows_match,
    assert_same_gradients,
    gather,
    gradients,
    make_gemma2,
    make_phi,
    make_rows,
    pad,
    targets,
    weighted_sum,
)
from trainers import lines, make_trainer
from transformers import LlamaConfig, LlamaForCausalLM

from camopd import divergence, logprobs
from camopd.logprobs import check_logps, completion_logps, completion_top_k
from camopd.masters import round_alike
from camopd.packing import wants_packing
from camopd.teachers.local import LocalTeacher


pytestmark = pytest.mark.gpu
DRY = os.environ.get("CAMOPD_GPU_DRY_RUN") == "1"
BF16 = torch.finfo(torch.bfloat16).eps / 2  # rounding of a number of 1


@pytest.fixture
def device():
    if not DRY and not torch.cuda.is_available():
        pytest.fail("torch finds no GPU here; CAMOPD_GPU_DRY_RUN=1 runs these tests on the CPU")
    return torch.device("cpu" if DRY else "cuda")


@pytest.fixture
def compiler(monkeypatch):
    """Of a dry run: none, which takes minutes on a CPU."""
    if DRY:
        monkeypatch.setattr(torch, "compile", lambda function=None, **_: function or (lambda inner: inner))


def make_wide(implementation="sdpa"):
    """Heads of 64, which flex attention's Triton kernel takes, and a vocabulary of more than one of its blocks of 1024."""
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": 1500, "hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, head_dim=64)).eval()
    model.set_attn_implementation(implementation)
    return model


# As in conftest, of `make_wide`: in each of two layers norms of 128, projections of 128 and 64, heads of 64 and some
# 20 tokens; a norm, a head of 128 and a softmax of 1500.
WIDE_FORWARD = 2 * (2 * 128 + 4 * 128 + 64 + 64 + 20) + 128 + 128 + 1500
WIDE_LOGP = rounding(12, WIDE_FORWARD)


def scored(model, rows, **how):
    """Log-probs and entropies on the CPU, and the gradients of a loss of them."""
    logps, entropy = completion_logps(model, *rows, pad_token_id=0, with_entropy=True, **how)
    found = gradients(model, weighted_sum(logps))
    return logps.detach().cpu(), entropy.cpu(), {name: gradient.cpu() for name, gradient in found.items()}


def plain(model, token_ids, prompt_lens, dtype=torch.float32):
    """log_softmax in `dtype` of the logits that predict each row's completion: [(T_i, V)]."""
    device = model.get_input_embeddings().weight.device
    full = []
    for ids, start in zip(token_ids, prompt_lens, strict=True):
        logits = model(torch.tensor([ids], device=device)).logits[0]
        full.append(logits[start - 1 : len(ids) - 1].to(dtype).log_softmax(dim=-1))
    return full


def plain_logps(model, rows, dtype=torch.float32):
    full = plain(model, *rows, dtype)
    return gather(full, [ids.to(row.device) for ids, row in zip(targets(*rows), full, strict=True)])


def assert_gradients_as_exact_as(actual, expected, model, rows):
    """That one computation in float32 is as far from the exact gradients as another one, over all weights together.

    Of `make_wide` they are ill-conditioned: 52 at most, and a plain forward and backward errs by 0.005, a hundred times the
    rounding of the sums that make them. So they are held to float64, where a wrong number differs from both. Two draws of
    such an error, which few weights dominate, differ by less than four times.
    """
    exact_model = on_cpu_in_float64(model)
    exact = gradients(exact_model, weighted_sum(pad(plain_logps(exact_model, rows, torch.float64))))
    assert actual.keys() == expected.keys() == exact.keys()
    one, other = (
        sum(float((grads[name].double().cpu() - exact[name]).pow(2).sum()) for name in exact) ** 0.5
        for grads in (actual, expected)
    )
    assert one < 4 * other
    assert other < 0.5 * sum(float(gradient.pow(2).sum()) for gradient in exact.values()) ** 0.5  # not noise


def on_cpu_in_float64(model):
    exact = copy.deepcopy(model).cpu().double()
    exact.set_attn_implementation("sdpa")  # flex attention has no float64 on a CPU
    return exact


# --------------------------------------------------------------------------------------------------------- one forward


@pytest.mark.parametrize("make", [lambda: make_model(1), make_wide], ids=["tiny", "wide"])
def test_float32_log_probs_and_gradients_are_those_of_the_cpu(make, device):
    model = make()
    rows = make_rows(model.config.vocab_size)
    tolerance = max(LOGP, WIDE_LOGP)
    expected, here = scored(model, rows), scored(copy.deepcopy(model).to(device), rows)
    for one, other in zip(here[:2], expected[:2], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)
    if make is make_wide:
        assert_gradients_as_exact_as(here[2], expected[2], model, rows)
    else:
        assert_same_gradients(here[2], expected[2])


@pytest.mark.parametrize("make", [make_gemma2, make_phi, make_wide], ids=["soft cap", "bias", "llama"])
def test_chunked_head_equals_plain_logits(make, device, monkeypatch):
    """With tiles that end inside the vocabulary and inside the tokens."""
    from trl.kernels import chunked_logprob

    for name in ("VOCAB_CHUNK", "CPU_VOCAB_CHUNK"):
        monkeypatch.setattr(logprobs, name, 24)
    monkeypatch.setattr(chunked_logprob, "TOKEN_CHUNK_SIZE", 5)
    torch.manual_seed(0)
    model = make().eval().to(device)
    rows = make_rows(model.config.vocab_size)
    logps, entropy = completion_logps(model, *rows, pad_token_id=0, with_entropy=True)
    expected = plain_logps(model, rows)
    assert_rows_match(logps, expected, WIDE_LOGP)
    assert_rows_match(entropy, [-(row.exp() * row).sum(dim=-1).detach() for row in plain(model, *rows)], WIDE_LOGP)
    ours, theirs = gradients(model, weighted_sum(logps)), gradients(model, weighted_sum(pad(expected)))
    if make is make_wide:
        assert_gradients_as_exact_as(ours, theirs, model, rows)
    else:
        assert_same_gradients(ours, theirs)


def test_chunked_head_equals_plain_logits_beyond_a_tile_of_either_side(device):
    """More tokens than one tile has, and more vocabulary: the sizes at which a GPU's kernel loops."""
    tokens, vocab = (70, 300) if DRY else (5000, 40_000)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": vocab, "max_position_embeddings": tokens + 8}))
    model = model.eval().to(device)
    rows = make_rows(vocab, [(3, tokens), (2, 9)])
    with torch.no_grad():
        logps, _ = completion_logps(model, *rows, pad_token_id=0)
        assert_rows_match(logps, plain_logps(model, rows), rounding(15, 750 + tokens + vocab))


def bf16_bound(model):
    """How far log-probs in bfloat16 may lie from exact ones, on average, in nats.

    Each layer rounds to bfloat16 some 15 times on the way of the residual stream (two norms, seven projections, the
    rotation, weights and sum of the attention, the activation and its product, two residual sums), the rest twice (a
    norm, the logits). Independent errors of u add up to the root of their number, relative to the hidden state; they
    know nothing of the head, so that a logit errs by as much of a usual one (the root of the mean square). A log-prob
    carries its logit's error and that of the sum of all.
    """
    exact, vocab = on_cpu_in_float64(model), model.config.vocab_size
    with torch.no_grad():
        logits = torch.cat([exact(torch.tensor([ids])).logits[0] for ids in make_rows(vocab)[0]])
    return 2 * BF16 * (15 * model.config.num_hidden_layers + 2) ** 0.5 * float(logits.pow(2).mean().sqrt())


def test_bf16_log_probs_are_as_near_to_exact_ones_as_bf16_is(device):
    model = make_wide().to(torch.bfloat16)
    rows = make_rows(1500)
    bound, exact = bf16_bound(model), copy.deepcopy(model).double()
    with torch.no_grad():
        expected = torch.cat(plain_logps(exact, rows, torch.float64))
        model = model.to(device)
        logps, entropy = completion_logps(model, *rows, pad_token_id=0, with_entropy=True)
    found = torch.cat([row[: len(ids)] for row, ids in zip(logps, targets(*rows), strict=True)]).double().cpu()
    assert logps.dtype == entropy.dtype == torch.float32
    assert (found - expected).abs().mean() <= bound
    assert (found.roll(1) - expected).abs().mean() > bound  # it tells tokens apart


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_pass_the_check_that_a_run_makes_before_its_first_rollout(dtype, device):
    model = make_wide().to(device, dtype)
    difference = check_logps(
        "it", lambda ids, lens: completion_logps(model, ids, lens, pad_token_id=0)[0], model, model
    )
    # The largest of a dozen: of errors whose mean is within the bound, none is ten times as large.
    assert difference < (WIDE_LOGP if dtype == torch.float32 else 2 * 10 * bf16_bound(model))


def two_kls(student, teacher, rows, k):
    """KL at each token (B, T), and its gradients: of whole distributions, and of `k` tokens and all others."""
    token_ids, prompt_lens = rows
    views = divergence.outputs_of(teacher, token_ids, prompt_lens, 0, False)
    ids, logps = completion_top_k(teacher, token_ids, prompt_lens, 0, k)
    own = torch.tensor([len(row) - start for row, start in zip(token_ids, prompt_lens, strict=True)])
    own = (torch.arange(ids.shape[1]) < own[:, None]).to(ids.device)
    for view in (views, divergence.Likeliest(ids[own], logps[own])):
        _, kl = divergence.logps_and_kl(student, token_ids, prompt_lens, 0, False, [(range(len(token_ids)), view)])
        yield kl, gradients(student, weighted_sum(kl))


def lumped(logps, ids):
    """Probabilities of the tokens `ids` (T, K), and of all others as one more outcome, (T, K + 1)."""
    chosen = logps.exp().gather(-1, ids)
    others = logps.exp().scatter(-1, ids, 0.0).sum(dim=-1, keepdim=True)
    return torch.cat([chosen, others], dim=-1)


@pytest.mark.parametrize("make", [make_gemma2, make_phi, make_wide], ids=["soft cap", "bias", "llama"])
def test_divergences_equal_those_of_plain_logits(make, device, monkeypatch):
    """With tiles that end inside the vocabulary and inside the tokens."""
    from trl.kernels import chunked_divergence

    monkeypatch.setattr(chunked_divergence, "VOCAB_CHUNK_SIZE", 24)
    monkeypatch.setattr(chunked_divergence, "TOKEN_CHUNK_SIZE", 5)
    monkeypatch.setattr(divergence, "TOP_K_TOKENS", 5)
    torch.manual_seed(0)
    student, teacher = make().eval().to(device), make().eval().to(device)
    with torch.no_grad():
        for weight in teacher.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    rows = make_rows(student.config.vocab_size)
    full = list(zip(plain(student, *rows), plain(teacher, *rows), strict=True))
    few = [[lumped(logps, other.topk(20).indices) for logps in (own, other)] for own, other in full]
    # Log-probs err by WIDE_LOGP each, weighted by their probability. A tail is 1 minus a sum that errs by no more.
    log_ratio, ratio = (max(float((one / other).max()) for one, other in pairs if len(one)) for pairs in (
        [(((own - other).abs()).detach(), torch.ones_like(own)) for own, other in full],
        [(own[:, -1].detach(), other[:, -1].detach()) for own, other in few],
    ))  # fmt: skip
    assert min(float(tail[:, -1].detach().min()) for pair in few for tail in pair if len(tail)) > 1e-4
    for (kl, grads), expected, tolerance in zip(two_kls(student, teacher, rows, 20), (
        [(own.exp() * (own - other.detach())).sum(dim=-1) for own, other in full],
        [(own * (own / other.detach()).log()).sum(dim=-1) for own, other in few],
    ), ((3 + log_ratio) * WIDE_LOGP, (4 + log_ratio + ratio) * WIDE_LOGP), strict=True):  # fmt: skip
        assert max(float(row.detach().max()) for row in expected if len(row)) > 0.01
        assert_rows_match(kl, expected, tolerance)
        student.zero_grad()
        weighted_sum(pad(expected)).backward(retain_graph=True)  # both are of one forward
        for name, parameter in student.named_parameters():
            gradient = parameter.grad
            assert (grads[name] - gradient).norm() <= 0.01 * gradient.norm() + tolerance, name


def test_divergences_in_bf16_keep_the_products_of_the_head_in_float32(device):
    """Rounded, logits as large as these are off by some 0.1 nats, and the two by more than they agree here."""
    torch.manual_seed(0)
    student, teacher = (make_wide().to(device) for _ in range(2))
    with torch.no_grad():
        teacher.load_state_dict(student.state_dict())
        for model in (student, teacher):
            model.lm_head.weight.mul_(8)
        teacher.lm_head.weight.add_(0.003 * torch.randn_like(teacher.lm_head.weight))
    with torch.autocast(device.type, torch.bfloat16):
        (full, expected), (top, found) = two_kls(student, teacher, make_rows(1500), 1499)
        assert student(torch.tensor(make_rows(1500)[0][:1], device=device)).logits.abs().max() > 30
    assert 0 < full.mean() < 0.05
    torch.testing.assert_close(top, full, rtol=0, atol=1e-4)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 2**-6 * gradient.norm(), name


# -------------------------------------------------------------------------------------------------------- padding-free


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_free_flex_attention_equals_padded_rows(dtype, device, compiler):
    model = make_wide().to(device, dtype)
    rows = make_rows(1500)
    padded = completion_logps(model, *rows, pad_token_id=0)[0]
    expected = gradients(model, weighted_sum(padded))
    model.set_attn_implementation("flex_attention")
    assert wants_packing(model, None)
    with torch.no_grad():
        packed = completion_logps(model, *rows, pad_token_id=0, padding_free=True)[0]
    if DRY:  # on a CPU flex attention has no backward
        model.set_attn_implementation("sdpa")
    found = gradients(model, weighted_sum(completion_logps(model, *rows, pad_token_id=0, padding_free=True)[0]))
    if dtype == torch.float32:
        torch.testing.assert_close(packed, padded.detach(), rtol=0, atol=WIDE_LOGP)
    else:
        assert (packed - padded).abs().sum() / (padded != 0).sum() < 2 * bf16_bound(model)  # either is off by one
    assert_gradients_as_exact_as(found, expected, model, rows)


# ------------------------------------------------------------------------------------------------------------ teachers


def test_teacher_is_on_the_gpu_while_it_scores_only(device):
    teacher = make_model(2)
    rows = make_rows(len(teacher.get_input_embeddings().weight))
    expected = plain_logps(teacher, rows)
    on_gpu = device.type == "cuda"
    local = LocalTeacher(teacher, "teacher", device, batch_size=3)
    local.score(*rows)  # what libraries keep for themselves is there from now on
    resting = [weight.data_ptr() for weight in teacher.parameters()]
    before = torch.cuda.memory_allocated() if on_gpu else 0
    seen = []
    teacher.model.register_forward_pre_hook(lambda *_: seen.append(next(teacher.parameters()).device.type))
    scores = local.score(*rows)
    assert set(seen) == {device.type}
    assert next(teacher.parameters()).device.type == "cpu" and local.rests_on_cpu == on_gpu
    assert [weight.data_ptr() for weight in teacher.parameters()] == resting
    for score, logps in zip(scores, expected, strict=True):
        assert score.logps.device.type == "cpu"
        torch.testing.assert_close(score.logps, logps.detach(), rtol=0, atol=LOGP)
    assert not on_gpu or torch.cuda.memory_allocated() == before


# ------------------------------------------------------------------------------------------------------------ rounding


def test_weights_rounded_at_random_go_where_float32_ones_go(device, compiler):
    """As on the CPU in test_masters.py: on average over many weights, by steps far below bfloat16's spacing at 1."""
    from torchao.optim import AdamW8bit

    ends = {}
    for name, dtype in (("float32", torch.float32), ("random", torch.bfloat16)):
        torch.manual_seed(0)
        param = torch.nn.Parameter(torch.ones(256, 256, dtype=dtype, device=device))
        optimizer = AdamW8bit([param], lr=2e-6, weight_decay=0.0, bf16_stochastic_round=name == "random")
        for step in range(50):
            noise = torch.randn(param.shape, generator=torch.Generator().manual_seed(step))
            param.grad = (noise + 1).to(device, dtype)
            optimizer.step()
        ends[name] = param.detach().double().cpu()
    way = 1 - ends["float32"].mean().item()
    deviation = (way * 2**-8 / 256**2) ** 0.5  # a weight is one spacing below with probability way / spacing
    assert 1 - ends["random"].mean().item() == pytest.approx(way, abs=5 * deviation)
    assert way > 10 * deviation


def test_rounding_follows_from_the_seed_alone(device, compiler):
    from torchao.optim import AdamW8bit

    ends = []
    for other in (1, 2):  # as on two ranks, which draw different rollouts
        param = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16, device=device))
        optimizer = AdamW8bit([param], lr=1e-3, bf16_stochastic_round=True)
        round_alike(optimizer, device, lambda: 5)
        param.grad = torch.ones_like(param)
        torch.manual_seed(other)
        expected = torch.rand(3, device=device)
        torch.manual_seed(other)
        optimizer.step()
        assert torch.equal(torch.rand(3, device=device), expected)
        ends.append(param.detach().clone())
    assert torch.equal(*ends) and len(ends[0].unique()) == 2


# -------------------------------------------------------------------------------------------------------------- a run


class FromCpu:
    """A sampler that hands out the same completions on every device, in the place of TRL's `VLLMGeneration`."""

    logprobs = None

    def sync_weights(self):
        pass

    def generate(self, prompts, **_):
        generator = torch.Generator().manual_seed(len(prompts))
        rows = [torch.randint(4, 40, (6,), generator=generator).tolist() for _ in prompts]
        return prompts, rows, [[[-3.0]] * 6 for _ in rows], None


def run(folder, tokenizer, device, **settings):
    """Of a run with these completions: the lines of its metrics."""
    data = {branch: make_prompts(branch) for branch in ("general", "domain")}
    trainer = make_trainer(
        folder, tokenizer, train_dataset=data, use_cpu=device.type == "cpu", importance_sampling_mode="none",
        teachers={"general": make_model(2), "domain": make_model(3)}, **settings,
    )  # fmt: skip
    trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, FromCpu(), -1
    trainer.args.guards["log_ratio"] = None  # these log-probs are of no model
    trainer.train()
    return lines(folder)


def test_run_in_float32_has_the_losses_of_the_cpu(device, tmp_path, tokenizer):
    """Of both branches, from one start: with a learning rate of 1e-6 the weights of the second step are the first's."""
    here, there = (
        run(tmp_path / name, tokenizer, where, max_steps=2, learning_rate=1e-6, schedule="general:1,domain:1")
        for name, where in (("here", device), ("cpu", torch.device("cpu")))
    )
    assert {line["branch"] for line in here} == {"general", "domain"}
    for one, other in zip(here, there, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=10 * LOSS)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=10 * LOSS)
        branch = one["branch"]
        for name in (f"selection/{branch}/kept_fraction", "train/tokens"):
            assert one[name] == other[name]


def test_run_in_bf16_trains_and_rolls_out_by_itself(device, tmp_path, tokenizer):
    """With checkpointing, engine's log-probs from transformers' own generation, and teachers that move."""
    trainer = make_trainer(
        tmp_path, tokenizer, use_cpu=device.type == "cpu", bf16=True, gradient_checkpointing=True, max_steps=3,
        student_logps="engine", teachers={"general": make_model(2), "domain": make_model(3)},
    )  # fmt: skip
    trainer.train()
    steps = lines(tmp_path)
    assert len(steps) == 3 and all(line["train/tokens"] > 0 and line["grad_norm"] > 0 for line in steps)
    bound = 2 * bf16_bound(make_model(1))  # the sampler's log-probs are off by one, and the trainer's
    assert all(line["importance/log_ratio"] < bound for line in steps)


def test_run_that_stops_draws_on_the_same_numbers(device, tmp_path, tokenizer):
    """The state of the GPU's random numbers is part of a checkpoint: step 3 has the same completions."""
    drawn = []
    for folder in ("whole", "parted"):
        trainer = make_trainer(
            tmp_path / folder, tokenizer, use_cpu=device.type == "cpu", save_strategy="steps", save_steps=2,
            max_steps=3, learning_rate=1e-4,
        )  # fmt: skip
        resume = str(tmp_path / "whole" / "checkpoint-2") if folder == "parted" else None
        trainer.train(resume_from_checkpoint=resume)
        drawn.append([sample.token_ids for sample in trainer.step.samples])
    assert drawn[0] == drawn[1] and any(drawn[0])
