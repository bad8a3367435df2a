"""Fifty steps of the trainer against a plain training loop that shares no code with it.

The loop does what the method says, row by row: full logits, `log_softmax`, Python sums, gradients by autograd, SGD or Adam
written out. Of camopd it uses the order of the prompts alone (`PromptStream`). Completions and the log-probs of the rollout
engine are scripted: they follow from the prompt.

Trainer and loop are float32 and part by rounding, which fifty steps amplify. By how much is not guessed: the loop runs in
float64 as well, and the trainer has to be as near to that as the loop in float32 is, up to a factor for its other order of
summation. Who is kept, and which importance weights lie inside their band, is the same in all three: no sample and no token
is so near to a threshold that rounding could turn it, which is checked.
"""

import json
import math
import random
from functools import cache
from typing import NamedTuple

import pytest
import torch
from conftest import VOCAB, make_prompts, make_tokenizer
from steps import use_sampler
from transformers import GPT2Config, GPT2LMHeadModel

from camopd import CaMOPDConfig, CaMOPDTrainer
from camopd.prompts import PromptStream
from camopd.step import StepCallback


STEPS, ROWS = 50, 12
PROMPTS = 48  # of a branch: no step has one twice, which would be a tie
SEED = 0  # of the completions; with many another one, a sample or a weight comes too near to a threshold
LOW, HIGH = 0.6, 1.7  # band of the importance weights
MASS = {"general": 0.8, "domain": 0.6}
SCALE = {"general": 2.0, "domain": 1.0}
NORM = 1.0  # gradients are clipped to it
MARGIN = 3e-5  # from any threshold, relative; rounding stays far below (`Run.apart`)
FACTOR = 5  # rounding of another order of summation
SCHEDULES = {  # text -> rows of each branch in the steps of a period
    "general:3,domain:1": [{"general": 12}] * 3 + [{"domain": 12}],
    "general:2+domain:1,domain:1": [{"general": 8, "domain": 4}, {"domain": 12}],
    "general:1,domain:1": [{"general": 12}, {"domain": 12}],
}
OPTIMIZERS = {"sgd": 0.05, "adamw_torch": 2e-3}  # and their learning rates
EPSILON = 1e-4  # of Adam


@cache
def model(name: str, dtype: torch.dtype = torch.float32) -> GPT2LMHeadModel:
    """A small GPT-2: its norms and softmax compute in the dtype of its weights."""
    torch.manual_seed({"student": 1, "general": 2, "domain": 3}[name])
    config = GPT2Config(
        vocab_size=len(VOCAB), n_embd=16, n_layer=1, n_head=2, n_positions=64, initializer_range=0.3, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).to(dtype).eval()


def logps(network, prompt, completion) -> torch.Tensor:
    """log p of each completion token, from the logits of one unpadded row."""
    logits = network(torch.tensor([[*prompt, *completion]])).logits[0]
    return torch.stack(
        [torch.log_softmax(logits[len(prompt) - 1 + place], 0)[token] for place, token in enumerate(completion)]
    )


@cache
def script(prompt: tuple[int, ...]) -> tuple[list[int], list[float]]:
    """Completion of a prompt, of 0 to 9 tokens, and log-probs up to 0.8 nats off those of the start weights."""
    rng = random.Random(repr((SEED, prompt)))
    completion = [rng.randrange(4, len(VOCAB)) for _ in range(rng.choice([0, 1, 2, 3, 3, 5, 9]))]
    if not completion:
        return [], []
    with torch.no_grad():
        own = logps(model("student"), prompt, completion).tolist()
    return completion, torch.tensor([value + rng.uniform(-0.8, 0.8) for value in own]).tolist()  # as float32 has them


class Engine:
    """In the place of TRL's client of vLLM."""

    logprobs = None

    def sync_weights(self):
        pass

    def generate(self, prompts, images, num_generations, profiler):
        scripts = [script(tuple(prompt)) for prompt in prompts]
        return prompts, [tokens for tokens, _ in scripts], [[[value] for value in row] for _, row in scripts], None


class Run(NamedTuple):
    losses: list[float]
    kept: list[list[int]]  # positions, by step
    weights: dict[str, torch.Tensor]

    def apart(self, other: "Run") -> tuple[float, float]:
        """Largest difference of a loss, and of a weight."""
        weights = [(self.weights[name].double() - other.weights[name].double()).abs().max() for name in self.weights]
        losses = [abs(one - two) for one, two in zip(self.losses, other.losses, strict=True)]
        return max(losses), max(weights).item()


def far_from(value: float, *thresholds: float) -> None:
    assert all(abs(value - threshold) > MARGIN for threshold in thresholds), (value, thresholds)


def keep(samples: list[dict], branch: str) -> list[dict]:
    """The highest scores that hold the branch's share of their sum."""
    ranked = sorted((s for s in samples if s["branch"] == branch), key=lambda s: (-s["score"], s["position"]))
    total = sum(sample["score"] for sample in ranked)
    kept, mass = [], 0.0
    for sample in ranked:
        if mass > MASS[branch]:
            far_from(kept[-1]["score"], sample["score"])
            break
        kept.append(sample)
        mass += sample["score"] / total
        far_from(mass, MASS[branch])
    return kept


@cache
def plain(schedule: str, optimizer: str, dtype: torch.dtype) -> Run:
    """The loop."""
    tokenizer = make_tokenizer()
    streams = {
        branch: PromptStream(make_prompts(branch, PROMPTS), branch, seed=42) for branch in ("general", "domain")
    }
    drawn = {"general": 0, "domain": 0}
    student = model.__wrapped__("student", dtype)
    teacher_logps = {}
    averages = {name: (torch.zeros_like(value), torch.zeros_like(value)) for name, value in student.named_parameters()}
    losses, positions = [], []
    for step in range(STEPS):
        samples, position = [], 0
        for branch, count in SCHEDULES[schedule][step % len(SCHEDULES[schedule])].items():
            for row in streams[branch].draw(range(drawn[branch], drawn[branch] + count)):
                prompt = tuple(tokenizer(row["prompt"])["input_ids"])
                completion, rollout = script(prompt)
                if completion:
                    if (branch, prompt) not in teacher_logps:
                        with torch.no_grad():
                            teacher_logps[branch, prompt] = logps(model(branch, dtype), prompt, completion).tolist()
                    own = logps(student, prompt, completion)
                    gaps = [t - s for t, s in zip(teacher_logps[branch, prompt], own.tolist(), strict=True)]
                    demands = [abs(gap) if branch == "general" else max(gap, 0.0) for gap in gaps]
                    score = sum(demands) / len(demands)
                    samples.append(
                        {
                            "branch": branch, "position": position, "own": own, "gaps": gaps, "rollout": rollout,
                            "score": score,
                        }
                    )  # fmt: skip
                position += 1
            drawn[branch] += count
        kept = [sample for branch in ("general", "domain") for sample in keep(samples, branch)]
        loss = torch.zeros((), dtype=dtype)
        for sample in kept:
            terms = []
            for logp, gap, rollout in zip(sample["own"], sample["gaps"], sample["rollout"], strict=True):
                ratio = math.exp(logp.item() - rollout)
                far_from(ratio, LOW, HIGH)
                terms.append((ratio if LOW <= ratio <= HIGH else 0.0) * SCALE[sample["branch"]] * gap * logp)
            loss = loss - sum(terms) / len(terms) / len(kept)
        student.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(value.grad.double().square().sum().item() for value in student.parameters()))
        with torch.no_grad():
            for name, value in student.named_parameters():
                gradient = value.grad * min(1.0, NORM / (norm + 1e-6))
                if optimizer == "sgd":
                    value -= OPTIMIZERS["sgd"] * gradient
                    continue
                first, second = averages[name]
                first += 0.1 * (gradient - first)
                second += 0.001 * (gradient * gradient - second)
                update = (first / (1 - 0.9 ** (step + 1))) / ((second / (1 - 0.999 ** (step + 1))).sqrt() + EPSILON)
                value -= OPTIMIZERS["adamw_torch"] * update
        losses.append(loss.item())
        positions.append(sorted(sample["position"] for sample in kept))
    return Run(losses, positions, {name: value.detach() for name, value in student.named_parameters()})


def trained(schedule: str, optimizer: str, folder, batch_size: int, **settings) -> Run:
    """The same by `CaMOPDTrainer`."""
    kept = []

    class Watch(StepCallback):
        def on_step_ready(self, step):
            kept.append(sorted(step.kept))

    args = CaMOPDConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, save_strategy="no",
        gradient_checkpointing=False, max_steps=STEPS, prompts_per_step=ROWS, per_device_train_batch_size=batch_size,
        max_prompt_length=40, max_completion_length=9, schedule=schedule, mass_target=MASS, scale=SCALE, seed=42,
        importance_sampling_low=LOW, importance_sampling_high=HIGH, max_grad_norm=NORM, optim=optimizer,
        learning_rate=OPTIMIZERS[optimizer], adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=EPSILON, weight_decay=0.0,
        lr_scheduler_type="constant", diagnostics_steps=0, **settings,
    )  # fmt: skip
    trainer = CaMOPDTrainer(
        model=model.__wrapped__("student"), teachers={branch: model(branch) for branch in ("general", "domain")},
        args=args, train_dataset={branch: make_prompts(branch, PROMPTS) for branch in ("general", "domain")},
        processing_class=make_tokenizer(), callbacks=[Watch()],
    )  # fmt: skip
    assert args.gradient_accumulation_steps == ROWS // batch_size
    use_sampler(trainer, Engine())
    trainer.train()
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return Run(losses, kept, {name: value.detach() for name, value in trainer.model.named_parameters()})


@pytest.mark.parametrize(
    ("schedule", "optimizer", "batch_size", "settings"),
    [
        ("general:3,domain:1", "sgd", 1, {}),  # 12 micro-steps
        ("general:3,domain:1", "sgd", 12, {}),  # 1
        ("general:2+domain:1,domain:1", "sgd", 2, {"rebalance": False}),  # 6
        ("general:2+domain:1,domain:1", "sgd", 6, {"score_tokens": 3 * 49}),  # 2
        ("general:1,domain:1", "adamw_torch", 4, {}),  # 3
        ("general:1,domain:1", "adamw_torch", 1, {"max_tokens_per_micro_batch": 60}),  # 12, of which few hold work
    ],
    ids=str,
)
def test_plain_loop_gives_the_same_fifty_steps(schedule, optimizer, batch_size, settings, tmp_path):
    exact, rounded = (plain(schedule, optimizer, dtype) for dtype in (torch.float64, torch.float32))
    found = trained(schedule, optimizer, tmp_path, batch_size, **settings)
    assert found.kept == exact.kept == rounded.kept
    assert 0.2 < sum(map(len, found.kept)) / (STEPS * ROWS) < 0.8  # selection has dropped some
    assert (
        exact.apart(Run(exact.losses, [], dict(model("student").named_parameters())))[1] > 0.03
    )  # and weights have moved
    losses, weights = rounded.apart(exact)
    for name, apart in (("trainer", found.apart(exact)), ("loop in float32", (losses, weights))):  # seen with -s
        print(f"{name}: within {apart[0]:.1e} in the loss and {apart[1]:.1e} in the weights of the loop in float64")
    assert max(losses, weights) < MARGIN / 2  # rounding cannot turn a decision
    assert found.apart(exact)[0] <= FACTOR * losses
    assert found.apart(exact)[1] <= FACTOR * weights
