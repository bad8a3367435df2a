# /// script
# dependencies = ["camopd[deepspeed,peft]"]
# ///
"""
Make the role-play model: fine-tune Qwen3-4B-Instruct-2507 on the CoSER conversations that are not kept as prompts.

```bash
camopd data roleplay --out data/roleplay
accelerate launch --config_file configs/accelerate/zero3.yaml examples/specialize_roleplay.py \\
    --model_name_or_path Qwen/Qwen3-4B-Instruct-2507 --dtype bfloat16 --dataset_name data/roleplay/sft.jsonl \\
    --output_dir runs/roleplay-sft --num_train_epochs 1 --learning_rate 1e-5 --lr_scheduler_type cosine \\
    --warmup_steps 100 --per_device_train_batch_size 2 --gradient_accumulation_steps 4 --max_length 4096
```

With LoRA on one GPU, add `--use_peft --lora_r 32 --lora_alpha 64 --lora_target_modules all-linear` and raise the learning
rate to 1e-4. Settings can also stand in a YAML file, `--config FILE`. It is TRL's `SFTTrainer`, and takes every field of
`SFTConfig`. The paper does not say how its role-play teacher was fine-tuned; these are common values.
"""

import sys

from datasets import load_dataset
from trl import (
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)

from camopd.files import file_type, read_file
from camopd.run import settle_model, written


def main() -> None:
    script_args, training_args, model_args = TrlParser(
        [ScriptArguments, SFTConfig, ModelConfig]
    ).parse_args_and_config()

    if script_args.dataset_name is None:
        raise ValueError(
            "--dataset_name is missing: the sft.jsonl that `camopd data roleplay` writes, or a dataset of the Hub."
        )
    is_file = file_type(script_args.dataset_name) is not None
    if is_file:
        dataset = read_file(script_args.dataset_name)
    else:
        dataset = load_dataset(
            script_args.dataset_name, script_args.dataset_config, split=script_args.dataset_train_split
        )

    training_args.model_init_kwargs = settle_model(model_args, training_args.model_init_kwargs, written(sys.argv[1:]))
    trainer = SFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=dataset.select_columns(["messages"]),
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
    )
    trainer.train(
        resume_from_checkpoint=training_args.resume_from_checkpoint == "true" or training_args.resume_from_checkpoint
    )

    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=None if is_file else script_args.dataset_name)
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
