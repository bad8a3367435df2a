# /// script
# dependencies = ["camopd[peft]"]
# ///
"""
Your pair of models and your prompts, with all that matters in this file.

```bash
accelerate launch examples/train_custom.py \\
    --student my-org/my-legal-model --general Qwen/Qwen3-4B --general_prompts general.jsonl --domain_prompts legal.jsonl \\
    --model_init_kwargs '{"dtype": "bfloat16"}'
```

A prompt file is JSONL, Parquet or CSV with a column `prompt` (a text, or messages) or `messages`. `--name value` also takes
every field of `CaMOPDConfig`.
"""

from dataclasses import dataclass, field

from peft import LoraConfig
from trl import TrlParser

from camopd import CaMOPDConfig, CaMOPDTrainer
from camopd.files import load_prompts


@dataclass
class ScriptArguments:
    student: str = field(metadata={"help": "The specialised model."})
    general: str = field(metadata={"help": "The model it was made from, or the URL of a vLLM server with it."})
    general_prompts: str = field(metadata={"help": "JSONL file with prompts of what was lost."})
    domain_prompts: str = field(metadata={"help": "JSONL file with prompts of what is to stay."})
    # A third branch, say of the language that your users write in, is a teacher and prompts of its own:
    # german: str = field(metadata={"help": "A teacher for German."})
    # german_prompts: str = field(metadata={"help": "JSONL file with German prompts."})


def main() -> None:
    script_args, training_args = TrlParser([ScriptArguments, CaMOPDConfig]).parse_args_and_config()

    trainer = CaMOPDTrainer(
        model=script_args.student,
        teachers={
            "general": script_args.general,
            "domain": "adapter_off",  # the student without its LoRA weights: the specialised model itself, at no memory
            # "german": script_args.german,
        },
        args=training_args,  # three branches: --schedule general:3,german:1,domain:1; a line says what else german gets
        train_dataset={
            "general": load_prompts(script_args.general_prompts, "general"),
            "domain": load_prompts(script_args.domain_prompts, "domain"),
            # "german": load_prompts(script_args.german_prompts, "german"),
        },
        peft_config=LoraConfig(r=32, lora_alpha=64, target_modules="all-linear"),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)

    trainer.save_model(training_args.output_dir)
    trainer.save_state()
    trainer.create_model_card()
    if training_args.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
