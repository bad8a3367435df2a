# /// script
# dependencies = ["camopd[vllm,deepspeed,peft]"]
# ///
"""
Bring general abilities back to a medical model: II-Medical-8B, with Qwen3-8B as the general teacher.

On one GPU with LoRA; the head of configs/medical.yaml has the lines for the paper's run on 4 x 8 GPUs:

```bash
camopd data general --out data/general
camopd data medical --out data/medical
accelerate launch --config_file configs/accelerate/single_gpu.yaml \\
    examples/train_medical.py --config configs/medical_1gpu.yaml
```

Domain prompts may also be rows with `question` and `options`, as the raw datasets have them: the script puts them into the
paper's template. Every setting can follow as `--name value`:

```bash
accelerate launch --config_file configs/accelerate/ddp.yaml --num_processes 2 --mixed_precision no \\
    examples/train_medical.py --config configs/smoke.yaml \\
    --prompts '{"general": "general.jsonl", "domain": "medmcqa.jsonl"}'
```
"""

from trl import get_peft_config, get_quantization_config

from camopd import CaMOPDTrainer
from camopd.data.medical import to_prompt
from camopd.files import load_all
from camopd.run import find_teachers, parse_script


def main() -> None:
    prompts, model_args, training_args = parse_script()

    trainer = CaMOPDTrainer(
        model=model_args.model_name_or_path,
        teachers=find_teachers(training_args),
        args=training_args,
        train_dataset=load_all(prompts.prompts, {"domain": to_prompt}),
        eval_dataset=load_all(prompts.eval_prompts, {"domain": to_prompt}) if prompts.eval_prompts else None,
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
