# /// script
# dependencies = ["camopd[deepspeed,peft]"]
# ///
"""
Specialise a model on a file of your own: TRL's `SFTTrainer`, with every field of `SFTConfig`.

```bash
accelerate launch examples/specialize.py --model_name_or_path Qwen/Qwen3-4B --dataset_name domain.jsonl \\
    --output_dir specialised --num_train_epochs 1 --learning_rate 1e-5 --per_device_train_batch_size 4
```

The file is JSONL, JSON, Parquet or CSV, or a dataset of the Hub, in one of TRL's forms: a column `messages`, columns
`prompt` and `completion` (texts or messages), or a column `text`. Settings can also stand in a YAML file, `--config FILE`.
With LoRA: `--use_peft --lora_r 32 --lora_alpha 64 --lora_target_modules all-linear --learning_rate 1e-4`.
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


FORMS = (("messages",), ("prompt", "completion"), ("text",))  # of TRL; the first one whose columns are there is taken


def columns_of(names: list[str]) -> list[str]:
    """The columns that are trained on. Raises `ValueError` where the dataset has none of TRL's forms."""
    found = [form for form in FORMS if set(form) <= set(names)]
    if not found:
        raise ValueError(f"the dataset has the columns {sorted(names)}. Rename them to one of the forms {FORMS}.")
    return [*found[0], *(name for name in ("tools", "chat_template_kwargs") if name in names)]


def rows_of(script: ScriptArguments):
    """What is trained on. Raises `ValueError` where there is none, and for what would be ignored."""
    name, split = script.dataset_name, script.dataset_train_split
    if name is None:
        raise ValueError("--dataset_name is missing: a JSONL, JSON, Parquet or CSV file, or a dataset of the Hub.")
    if script.dataset_streaming or script.dataset_test_split != "test" or script.ignore_bias_buffers:
        raise ValueError("Leave out --dataset_streaming, --dataset_test_split, --ignore_bias_buffers: no effect.")
    is_file = file_type(name) is not None
    for setting, value in (("config", script.dataset_config), ("train_split", split if split != "train" else None)):
        if is_file and value is not None:
            raise ValueError(f"--dataset_{setting} {value} would be ignored: {name!r} is a file. Leave it out.")
    rows = read_file(name) if is_file else load_dataset(name, script.dataset_config, split=split)
    return rows.select_columns(columns_of(rows.column_names))


def main() -> None:
    script, args, model = TrlParser([ScriptArguments, SFTConfig, ModelConfig]).parse_args_and_config()
    args.model_init_kwargs = settle_model(model, args.model_init_kwargs, written(sys.argv[1:]))
    trainer = SFTTrainer(
        model=model.model_name_or_path,
        args=args,
        train_dataset=rows_of(script),
        peft_config=get_peft_config(model),
        quantization_config=get_quantization_config(model),
    )
    given = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint={"true": True, "false": None}.get(str(given).lower(), given))
    trainer.save_model(args.output_dir)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=None if file_type(script.dataset_name) else script.dataset_name)
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
