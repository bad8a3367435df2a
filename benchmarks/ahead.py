"""What streaming and `rollout_lag: 1` hide: rollouts and teacher on servers whose latencies are known, or on real ones.

    python benchmarks/ahead.py [--rounds 3] [--steps 8] [--train 1.0]
    python benchmarks/ahead.py --model FOLDER --rollout-server URL --teacher-server URL [--tokens 256]

The first form needs no vLLM: a server in this process writes with a tiny model, a token every 40 ms, all completions of a
step side by side; the teacher takes 2 ms a token; an update takes `--train` seconds more than it does. What a step
takes is known then. The second form trains the model with real servers (`camopd serve --student`, and a teacher's): all
its weights, which go through files in a temporary folder (TMPDIR), or an adapter where its output head is its embeddings,
since vLLM on a CPU cannot be given those.

Three settings in turn, in each round: the teacher asked when all completions are there, streaming, and a step ahead. Prints
a table, and with the first form writes benchmarks/results/ahead.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import RESULTS, make_tokenizer, metrics_of, write_report


WRITE, SCORE = 0.04, 0.002  # seconds per token of one completion
PROMPTS, TOKENS = 16, 48
SETTINGS = {"all together": (0, False), "streaming": (0, True), "a step ahead": (1, True)}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--train", type=float, default=1.0, help="seconds that each update takes longer")
    parser.add_argument("--model", help="student, with real servers")
    parser.add_argument("--rollout-server")
    parser.add_argument("--teacher-server")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="longest completion")
    parser.add_argument("--report", type=Path, default=RESULTS / "ahead.md")
    options = parser.parse_args(argv)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in SETTINGS}
    for _ in range(options.rounds):
        for name, (lag, streaming) in SETTINGS.items():
            with tempfile.TemporaryDirectory() as folder:
                found[name].append(measure(options, folder, lag, streaming))
                print(name, found[name][-1], flush=True)
    lines = table(found)
    if options.rollout_server:
        print("\n".join(lines))
    else:
        write_report(lines, options.report)


def measure(options: argparse.Namespace, folder: str, lag: int, streaming: bool) -> dict[str, float]:
    """Medians over the steps of a run, without the first one, which nothing can hide."""
    from transformers import TrainerCallback

    class Slow(TrainerCallback):
        """An update that takes its time, and when each step has ended."""

        ended: list[float] = []  # noqa: RUF012

        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            time.sleep(0.0 if options.rollout_server else options.train)

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.ended.append(time.perf_counter())

    Slow.ended = []
    trainer, close = real(options, folder, lag) if options.rollout_server else known(options, folder, lag)
    trainer.add_callback(Slow())
    if not streaming:
        trainer.scorer.ask = lambda *args: None
    try:
        trainer.train()
    finally:
        trainer.run.sampler.close()
        close()
    steps = metrics_of(folder)[1:-1] if lag else metrics_of(folder)[1:]  # the last one of a lag has nothing ahead
    walls = [after - before for before, after in zip(Slow.ended, Slow.ended[1:], strict=False)][: len(steps)]
    median = statistics.median
    extra = 0.0 if options.rollout_server else options.train
    own = [line["time/score"] + line["time/train"] + extra for line in steps]
    # Without streaming, what is scored is waited for; a step ahead may be bound by either side.
    return {
        "step": median(walls),
        "rollout": median(line["time/rollout/writing"] for line in steps),
        "score and train": median(own),
        "bound": median(max(line["time/rollout/writing"], mine) for line, mine in zip(steps, own, strict=True)),
        "scoring hidden": sum(line["time/general/teacher_hidden"] for line in steps)
        / sum(line["time/general/teacher"] for line in steps),
    }


def known(options: argparse.Namespace, folder: str, lag: int) -> tuple[Any, Any]:
    """A trainer of a tiny model, with servers in this process."""
    tokenizer = make_tokenizer()  # and the tests' folder on the path
    from conftest import make_model, make_prompts
    from fake_rollouts import FakeRollouts
    from fake_vllm import FakeVLLM
    from trainers import make_trainer

    class Rollouts(FakeRollouts):
        def write(self, body: dict[str, Any]) -> Any:
            started = time.perf_counter()
            answer = super().write(body)
            written = len(_tokens_of(answer))
            time.sleep(max(0.0, WRITE * written - (time.perf_counter() - started)))
            return answer

    class Teacher(FakeVLLM):
        def answer(self, path: str, body: Any) -> Any:
            tokens = sum(len(row) for row in body["prompt"]) if body and body.get("prompt_logprobs") is not None else 0
            time.sleep(SCORE * tokens)
            return super().answer(path, body)

    rollouts, teacher = Rollouts(make_model(9), tokenizer), Teacher(make_model(2), tokenizer)
    trainer = make_trainer(
        folder, tokenizer, rollout_servers=[rollouts.url], rollout_lag=lag, max_steps=options.steps, schedule="general",
        teachers={"general": teacher.url}, train_dataset={"general": make_prompts("general")}, diagnostics_steps=0,
        prompts_per_step=PROMPTS, max_completion_length=options.tokens, learning_rate=1e-4,
    )  # fmt: skip
    return trainer, lambda: (rollouts.close(), teacher.close())


def _tokens_of(answer: str) -> list[int]:
    tokens: list[int] = json.loads(answer)["choices"][0]["token_ids"]
    return tokens


def real(options: argparse.Namespace, folder: str, lag: int) -> tuple[Any, Any]:
    """A trainer of the given model, with the given servers."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoConfig

    from camopd import CaMOPDConfig, CaMOPDTrainer

    topics = ["rain", "bread", "the moon", "a river", "clocks", "iron", "bees", "salt"]
    prompts = Dataset.from_list([
        {"prompt": [{"role": "user", "content": f"Write {words} about {topic}."}]}
        for topic in topics for words in ("one sentence", "a short poem", "two facts", "a story", "three questions")
    ])  # fmt: skip
    tied = AutoConfig.from_pretrained(options.model).tie_word_embeddings
    trainer = CaMOPDTrainer(
        model=options.model, teachers={"general": options.teacher_server}, train_dataset={"general": prompts},
        args=CaMOPDConfig(
            output_dir=folder, use_cpu=True, bf16=False, model_init_kwargs={"dtype": "float32"}, report_to="none",
            disable_tqdm=True,
            save_strategy="no", schedule="general", max_steps=options.steps, prompts_per_step=PROMPTS,
            per_device_train_batch_size=4, max_prompt_length=64, max_completion_length=options.tokens, learning_rate=1e-6,
            rollout_servers=[options.rollout_server], rollout_lag=lag, diagnostics_steps=0,
        ),
        peft_config=LoraConfig(r=32, target_modules="all-linear") if tied else None,
    )  # fmt: skip
    return trainer, lambda: None


def table(found: dict[str, list[dict[str, float]]]) -> list[str]:
    """The report: medians over rounds."""
    names = ["step", "rollout", "score and train", "bound", "scoring hidden"]
    lines = [
        "# What streaming and a step ahead hide",
        "",
        f"Medians over steps, and over {len(next(iter(found.values())))} rounds in turn; seconds. `bound` is the larger of "
        "rollout and score + train.",
        "",
        "| | " + " | ".join(names) + " | step / bound |",
        "|---" * (len(names) + 2) + "|",
    ]
    for name, rounds in found.items():
        middle = {key: statistics.median(each[key] for each in rounds) for key in names}
        cells = [f"{middle[key]:.1%}" if key == "scoring hidden" else f"{middle[key]:.2f}" for key in names]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {middle['step'] / middle['bound']:.2f} |")
    return lines


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
