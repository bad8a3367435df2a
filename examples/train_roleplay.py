# /// script
# dependencies = ["camopd[vllm,deepspeed,peft]"]
# ///
"""
Bring general abilities back to a role-play model: a Qwen3-4B-Instruct-2507 that `specialize_roleplay.py` has fine-tuned.

On one GPU with LoRA; the head of configs/roleplay.yaml has the lines for the paper's run on 4 x 8 GPUs:

```bash
camopd data general  --out data/general
camopd data roleplay --out data/roleplay
accelerate launch --config_file configs/accelerate/single_gpu.yaml \\
    examples/train_roleplay.py --config configs/roleplay_1gpu.yaml
```

Every setting can follow as `--name value`, `--push_to_hub true --hub_model_id ID` among them.
"""

from trl import get_peft_config, get_quantization_config

from camopd import CaMOPDTrainer
from camopd.files import load_all
from camopd.run import find_teachers, parse_script


def main() -> None:
    prompts, model_args, training_args = parse_script()

    trainer = CaMOPDTrainer(
        model=model_args.model_name_or_path,
        teachers=find_teachers(training_args),
        args=training_args,
        train_dataset=load_all(prompts.prompts),
        eval_dataset=load_all(prompts.eval_prompts) if prompts.eval_prompts else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
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
