"""Two students tutor each other by on-policy co-distillation (OPCoD, arXiv 2606.14368; camopd/co_distill.py).

    python examples/co_distill.py MODEL_A MODEL_B problems.jsonl [--rounds 10] [--output-dir co-distilled]

Each line of the file has `prompt`, `answer` and `concepts`, the labels that feedback on it may name, and the file holds
problems of both domains:

    {"prompt": "Which gas ...?\\nA. ...\\nB. ...\\nEnd with 'Answer: X'.", "answer": "B", "concepts": ["ideal gas law"]}

An answer is right when its last line is `Answer: ` and the answer. Both models are in this process and saved at the end:
what is stopped before starts again, in another --output-dir. For more than one GPU write a loop of your own around
`lessons_of` and `CaMOPDTrainer`.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from camopd import CaMOPDConfig
from camopd.co_distill import BRANCH, Problem, Student, Tutoring, co_distill


PROBLEMS, STEPS, PROMPTS = 64, 4, 16  # problems of a round, optimizer steps of a round, prompts of a step


def is_right(problem: Problem, text: str) -> bool:
    """Whether the last line is `Answer: ` and the problem's answer."""
    lines = text.strip().splitlines()
    return bool(lines) and lines[-1].strip().rstrip(".").lower() == f"answer: {problem.answer}".lower()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs=2, help="folders or Hub ids")
    parser.add_argument("problems", type=Path)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument(
        "--threshold", type=float, default=0.5, help="least share of right answers of a peer that tutors"
    )
    parser.add_argument("--max-answer", type=int, default=1024, help="tokens of an answer")
    parser.add_argument("--learning-rate", type=float, default=2e-6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=Path("co-distilled"))
    options = parser.parse_args()
    with open(options.problems, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    for number, row in enumerate(rows, start=1):
        if missing := [name for name in ("prompt", "answer", "concepts") if name not in row]:
            parser.error(
                f"line {number} of {options.problems} has {sorted(row)}, and no {missing[0]!r}. Each line needs all three."
            )
    problems = [Problem(row["prompt"], row["answer"], tuple(row["concepts"])) for row in rows]
    set_seed(options.seed)  # both answer before any training sets one
    device = "cuda" if torch.cuda.is_available() else "cpu"
    students = tuple(
        Student(
            name,
            AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device),
            AutoTokenizer.from_pretrained(model),
        )
        for name, model in zip("ab", options.models, strict=True)
    )

    def config(name: str, number: int) -> CaMOPDConfig:
        return CaMOPDConfig(
            output_dir=str(options.output_dir / name / f"round-{number}"), max_steps=STEPS, prompts_per_step=PROMPTS,
            per_device_train_batch_size=1, max_completion_length=options.max_answer, max_prompt_length=4096,
            learning_rate=options.learning_rate, lr_scheduler_type="constant", save_strategy="no", report_to="none",
            schedule=BRANCH, seed=options.seed + number,
        )  # fmt: skip

    def of_round(number: int) -> list[Problem]:
        return random.Random(f"{options.seed}-{number}").sample(problems, min(PROBLEMS, len(problems)))

    tutoring = Tutoring(threshold=options.threshold, max_answer=options.max_answer)
    for line in co_distill(students, of_round, is_right, config, options.rounds, tutoring):
        print(json.dumps(line))
    for student in students:
        student.model.save_pretrained(options.output_dir / student.name)
        student.tokenizer.save_pretrained(options.output_dir / student.name)


if __name__ == "__main__":
    main()
