# /// script
# dependencies = ["camopd[vllm,deepspeed,peft]"]
# ///
"""
Bring general abilities back to a role-play model: a Qwen3-4B-Instruct-2507 that `specialize.py` has fine-tuned.

On one GPU with LoRA; the head of configs/roleplay.yaml has the lines for the paper's run on 4 x 8 GPUs:

```bash
camopd data general  --out data/general
camopd data roleplay --out data/roleplay
accelerate launch --config_file configs/accelerate/single_gpu.yaml \\
    examples/train_roleplay.py --config configs/roleplay_1gpu.yaml
```

Every setting can follow as `--name value`, `--push_to_hub true --hub_model_id ID` among them. `camopd train RUN.yaml` does
the same; train_custom.py shows the trainer itself.
"""

import sys

from camopd.commands.train import train
from camopd.run import config_and_overrides


def main() -> None:
    train(*config_and_overrides(None, sys.argv[1:]))


if __name__ == "__main__":
    main()
