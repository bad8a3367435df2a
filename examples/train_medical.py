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
paper's template, which is all that `camopd train RUN.yaml` does not do. Every setting can follow as `--name value`:

```bash
accelerate launch --config_file configs/accelerate/ddp.yaml --num_processes 2 --mixed_precision no \\
    examples/train_medical.py --config configs/smoke.yaml \\
    --prompts '{"general": "general.jsonl", "domain": "medmcqa.jsonl"}'
```
"""

import sys

from camopd.commands.train import train
from camopd.data.medical import to_prompt
from camopd.run import config_and_overrides


def main() -> None:
    train(*config_and_overrides(None, sys.argv[1:]), to_prompt={"domain": to_prompt})


if __name__ == "__main__":
    main()
