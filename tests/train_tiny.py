"""Runs of three steps of a tiny student, as a user's script under `accelerate launch`: for test_distributed.py.

train_tiny.py RUNS.json    a list of runs, one after the other; each a list of words: --output_dir FOLDER/NAME and other
                           settings of CaMOPDConfig, --lora, --fsdp_on_cpu, --sharded
"""

import gc
import importlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from conftest import make_model, make_prompts, make_tokenizer
from peft import LoraConfig
from trl import TrlParser

from camopd import CaMOPDConfig, CaMOPDTrainer


@dataclass
class Options:
    lora: bool = False
    fsdp_on_cpu: bool = False
    sharded: bool = False


def main() -> None:
    gc.freeze()  # as conftest.py does
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # else a compiler takes minutes
    for words in json.loads(Path(sys.argv[1]).read_text()):
        bf16 = "--bf16 true" in " ".join(words)
        os.environ["ACCELERATE_MIXED_PRECISION"] = (
            "bf16" if bf16 else "no"
        )  # as --mixed_precision of the launcher does
        trainer = run(words)
    # Of which gloo's threads still let go as the process ends; see camopd/threads.py.
    torch.distributed.all_reduce_coalesced([torch.zeros(1) for _ in range(20_000)])
    trainer.accelerator.end_training()


def run(words: list[str]) -> CaMOPDTrainer:
    options, args = TrlParser([Options, CaMOPDConfig]).parse_args_and_config(words)
    if options.fsdp_on_cpu:
        fsdp_on_cpu()
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        os.environ["FSDP_STATE_DICT_TYPE"] = "SHARDED_STATE_DICT" if options.sharded else "FULL_STATE_DICT"
    folder = Path(args.output_dir).parent
    student, tokenizer = str(folder / "student"), make_tokenizer()
    trainer = CaMOPDTrainer(
        model=student,
        teachers={"general": make_model(2), "domain": "adapter_off" if options.lora else student},
        args=args,
        train_dataset={branch: make_prompts(branch) for branch in ("general", "domain")},
        eval_dataset={"general": make_prompts("general", count=4)},
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian")
        if options.lora
        else None,
    )
    plugin = trainer.accelerator.state.deepspeed_plugin
    if plugin is not None:  # which else keeps tensors of less than 100,000 numbers whole: here every one
        plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.evaluate()
    trainer.save_model(str(Path(args.output_dir) / "final"))
    if args.process_index == 0:
        facts = {
            "world_size": args.world_size,
            "type": str(trainer.accelerator.distributed_type.value),
            "zero_stage": getattr(plugin, "zero_stage", None),
            "sharded": sorted({type(value).__name__ for value in trainer.model.parameters()}),
        }
        (Path(args.output_dir) / "facts.json").write_text(json.dumps(facts))
    return trainer


def fsdp_on_cpu() -> None:
    """accelerate starts FSDP only where it finds GPUs, and plain data parallel elsewhere: tell it that it has some."""
    from accelerate.state import DistributedType, PartialState

    state = PartialState(cpu=True)
    assert state.distributed_type == DistributedType.MULTI_CPU
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


if __name__ == "__main__":
    main()
