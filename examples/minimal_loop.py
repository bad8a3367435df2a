# /// script
# dependencies = ["camopd"]
# ///
"""CaMOPD in plain torch and transformers: Algorithm 1 of the paper, top to bottom, without TRL.

    python examples/minimal_loop.py STUDENT GENERAL_TEACHER [--steps 8]

STUDENT is the specialised model (its frozen copy is the domain teacher), GENERAL_TEACHER the model it was made from; both
are folders or Hub ids. What `CaMOPDTrainer` adds to this: several GPUs, teachers on servers, vLLM rollouts and their
importance weights, chunked vocabulary projections, checkpoints. The loss and its gradient are the same; a test holds the
two together.
"""

import argparse
import copy
import random

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from camopd.generation import neutral_generation
from camopd.objective import distillation_loss, gap_scores, importance_weights, select_by_mass, token_gaps
from camopd.schedule import Schedule


# Appendix A.7 of the paper, at a size for one device: it has 512 prompts, 4096 + 32768 tokens, 120 steps, 2e-6.
SCHEDULE = Schedule.parse("general:3,domain:1")
MASS_TARGET = {"general": 0.8, "domain": 0.8}  # rho_b
SCALE = {"general": 2.0, "domain": 1.0}  # r_b
SCORE = {"general": "absolute", "domain": "positive"}  # Eq. 6, Eq. 7
PROMPTS_PER_STEP, PROMPT_TOKENS, COMPLETION_TOKENS, LEARNING_RATE = 8, 256, 40, 2e-5

PROMPTS = {
    "general": ["What is 17 times 23?", "Write a Python function that reverses a list.", "Why is the sky blue?",
                "Name three uses of a paper clip.", "What does a barometer measure?", "Explain recursion to a child."],
    "domain": ["Keeper, what do you do when the fog comes in?", "Who brings you your bread out here?",
               "What is the loneliest hour of the night?", "Which storm do you remember best?"],
}  # fmt: skip


def step_loss(
    student: torch.nn.Module,
    teacher: torch.nn.Module,
    branch: str,
    sequences: list[list[int]],
    prompt_lens: list[int],
    rollout_logps_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Lines 7-14 of Algorithm 1: gaps, scores, selection and the loss of Eq. 9. Returns the loss and the kept rows."""
    with torch.no_grad():
        teacher_logps_BT, mask_BT = completion_logps(teacher, sequences, prompt_lens)
        student_logps_BT, _ = completion_logps(student, sequences, prompt_lens)
    gaps_BT = token_gaps(teacher_logps_BT, student_logps_BT, mask_BT)  # Eq. 1
    scores_B = gap_scores(gaps_BT, mask_BT, SCORE[branch])  # Eq. 6 or 7
    kept, _ = select_by_mass(scores_B, MASS_TARGET[branch], valid_N=mask_BT.any(dim=1))  # Eq. 8

    # Only the kept rows are worth a forward with gradient.
    logps_KT, mask_KT = completion_logps(student, [sequences[i] for i in kept], [prompt_lens[i] for i in kept])
    width = mask_KT.size(1)
    rollout_KT = None if rollout_logps_BT is None else rollout_logps_BT[kept, :width]
    weights_KT = importance_weights(logps_KT, rollout_KT, mask_KT, low=0.5, high=2.0)  # w_t
    return distillation_loss(
        logps_KT, gaps_BT[kept, :width], weights_KT, mask_KT, SCALE[branch], len(kept)
    ), kept  # Eq. 9


def completion_logps(
    model: torch.nn.Module, sequences: list[list[int]], prompt_lens: list[int]
) -> tuple[Tensor, Tensor]:
    """log pi(y_t | h_t) of the completion tokens and the mask of real ones, each (B, T)."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    starts = torch.tensor(prompt_lens)
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(sequence) for sequence in sequences], batch_first=True)
    attention = torch.arange(ids.size(1)) < lengths[:, None]
    logits = model(ids.to(model.device), attention_mask=attention.to(model.device)).logits[:, :-1].float()
    logps = logits.log_softmax(dim=-1).gather(-1, ids[:, 1:, None].to(model.device)).squeeze(-1)
    mask_BT = torch.arange(max(1, int((lengths - starts).max()))) < (lengths - starts)[:, None]
    columns = (starts[:, None] - 1 + torch.arange(mask_BT.size(1))).clamp(
        max=logps.size(1) - 1
    )  # token t is predicted at t - 1
    return logps.gather(1, columns.to(logps.device)), mask_BT.to(logps.device)


@torch.no_grad()
def roll_out(model: torch.nn.Module, tokenizer, prompts: list[str]) -> tuple[list[list[int]], list[int]]:
    """One completion per prompt, drawn at temperature 1 from the whole vocabulary (line 6)."""
    sequences, prompt_lens = [], []
    for prompt in prompts:  # one by one: slow and plain
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"][:, -PROMPT_TOKENS:]
        with neutral_generation(model):  # or the defaults of its generation_config.json would bend the distribution
            output = model.generate(
                ids.to(model.device), attention_mask=torch.ones_like(ids).to(model.device),
                max_new_tokens=COMPLETION_TOKENS, do_sample=True, top_k=0,
            )  # fmt: skip
        sequences.append(output[0].tolist())
        prompt_lens.append(ids.size(1))
    return sequences, prompt_lens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("student")
    parser.add_argument("general_teacher")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-to", help="folder for the recovered model")
    options = parser.parse_args()
    random.seed(options.seed)
    torch.manual_seed(options.seed)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(options.student)
    student = (
        AutoModelForCausalLM.from_pretrained(options.student, dtype=torch.float32).to(device).eval()
    )  # no dropout
    teachers = {
        "general": AutoModelForCausalLM.from_pretrained(options.general_teacher, dtype=torch.float32)
        .to(device)
        .eval(),
        "domain": copy.deepcopy(student),
    }
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.999), weight_decay=0.0)

    for step in range(options.steps):
        (branch,) = SCHEDULE.shares(step)  # Eq. 5
        prompts = random.choices(PROMPTS[branch], k=PROMPTS_PER_STEP)
        sequences, prompt_lens = roll_out(student, tokenizer, prompts)
        loss, kept = step_loss(student, teachers[branch], branch, sequences, prompt_lens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1} {branch}: loss {loss.item():.4f}, kept {len(kept)} of {len(prompts)}", flush=True)
    if options.save_to:
        student.save_pretrained(options.save_to)
        tokenizer.save_pretrained(options.save_to)


if __name__ == "__main__":
    main()
