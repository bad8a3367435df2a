"""What camopd does on a GPU, in ten minutes: tests, speed, a step beside TRL's, memory. Started by benchmarks/gpu.sh.

    benchmarks/gpu.sh [--report FILE] [--only PART ...] [--dry-run]

Six parts, each in a process of its own:

    machine      what is there, and what camopd wants
    tests        those marked `gpu`, held to the CPU's numbers
    step         an optimizer step on log-normal lengths up to 8,192 tokens, beside TRL's DistillationTrainer
    throughput   tokens a second of scoring and training, and their share of the matrix rate measured beside them
    memory       peaks, held to the formula of memory_formula.py
    flex         tests and throughput of flex attention without padding, which a compiler makes first; last, for it is slow

All in bfloat16 but what compares with the CPU; models have random weights, nothing is downloaded. What a part finds is
added to the report at once. A part that fails, or that has used up its seconds, does not stop the others; seconds that one
does not need are the next one's. Ends with 1 if any has failed. `--dry-run` goes through all of it on the CPU with tiny
sizes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import memory_formula
import step
from measuring import KEEP_PAGES, RESULTS, in_fresh_process, make_tokenizer, peak, reset_peak
from memory_formula import Shape


ROOT = Path(__file__).parent.parent
# 570 in all. A process takes 15 to 20 s to import and to start CUDA, TRL's step 100 s, flex attention minutes to compile.
SECONDS = {"machine": 30, "tests": 100, "step": 180, "throughput": 40, "memory": 80, "flex": 140}
DRY = "CAMOPD_GPU_DRY_RUN"  # "1" in the environment of a dry run
QWEN3_06B = Shape(28, 1024, 3072, 16, 8, 128, 151936, True)
TINY = Shape(2, 32, 64, 2, 1, 16, 64, True)
CONTENDERS = ("camopd", "TRL", "camopd, engine gaps")
Lines = Iterator[str]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--only", nargs="+", choices=SECONDS, default=list(SECONDS))
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(argv)
    if options.dry_run:
        os.environ[DRY] = "1"
    report = options.report or (Path(tempfile.mkdtemp()) if is_dry() else RESULTS) / "gpu.md"
    say = appender(report)
    say("# On a GPU")
    say("")
    if is_dry():
        say("**A dry run on a CPU with tiny sizes: no number here is of a GPU.**")
        say("")
    slower = 4 if is_dry() else 1
    started, limit, failed = time.monotonic(), 0.0, []
    for name in options.only:
        limit += SECONDS[name] * slower
        say(f"## {name}")
        say("")
        seconds = started + limit - time.monotonic()
        command = [sys.executable, __file__, "--part", name, str(seconds)]
        if problem := run_part(command, seconds, say):
            failed.append(name)
            say("")
            say(f"**{name} has failed: {problem}**")
        say("")
    took = time.monotonic() - started
    say(f"{len(options.only) - len(failed)} of {len(options.only)} parts in {took:.0f} s. Again: `benchmarks/gpu.sh`")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; see {report}")


def is_dry() -> bool:
    return os.environ.get(DRY) == "1"


def appender(path: Path) -> Callable[[str], None]:
    """A function that adds a line to a new file, where it is at once, and to the screen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("", encoding="utf-8")

    def say(line: str) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(line.rstrip() + "\n")
        print(line, flush=True)

    return say


def run_part(command: list[str], seconds: float, say: Callable[[str], None]) -> str:
    """Hand each line of a command's output to `say` as it comes; returns what went wrong, or "".

    The command and what it has started are killed after `seconds`.
    """
    late = threading.Event()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8", errors="replace",
            start_new_session=True,
        )  # fmt: skip

        def kill() -> None:
            late.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(max(0.0, seconds), kill)
        timer.start()
        try:
            for line in process.stdout or ():
                say(line.rstrip("\n"))
            code = process.wait()
        finally:
            timer.cancel()
        if not code and not late.is_set():
            return ""
        errors.seek(0)
        tail = errors.read().splitlines()[-25:]
    if tail:
        for line in ("", "```", *tail, "```"):
            say(line)
    return f"it had no more than {seconds:.0f} s" if late.is_set() else f"exit status {code}"


def run_this_part(name: str, seconds: float) -> None:
    """In the process of a part: what it finds goes to the standard output, and all that libraries print to the errors."""
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in PARTS[name](time.monotonic() + seconds):
        print(line, file=output, flush=True)


class Failures:
    """What fails inside a part, so that the rest of it goes on."""

    def __init__(self) -> None:
        self.count = 0

    def of(self, error: BaseException) -> str:
        """A line on an error, whose traceback goes to the standard error."""
        traceback.print_exception(error)
        self.count += 1
        return f"failed: {(str(error).strip() or type(error).__name__).splitlines()[-1][:300]}"

    def end(self) -> None:
        """Fail if anything has."""
        if self.count:
            sys.exit(f"{self.count} failed")


# ------------------------------------------------------------------------------------------------------------- machine


def machine(deadline: float) -> Lines:
    """What is there. Fails where something is missing that camopd wants; another version of it is only named."""
    import tomllib

    import torch
    from packaging.requirements import Requirement

    if not is_dry() and not torch.cuda.is_available():
        sys.exit("torch finds no GPU here; --dry-run goes through all parts on the CPU")
    yield f"{gpu_name()}, {len(os.sched_getaffinity(0))} CPU cores, Python {sys.version.split()[0]}."
    yield ""
    yield "| package | there | wanted | |"
    yield "|---|---|---|---|"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    missing = []
    extras = [text for name in ("peft", "torchao") for text in project["optional-dependencies"][name]]
    for wanted in map(Requirement, [*project["dependencies"], *extras]):
        try:
            found = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(wanted.name)
            yield f"| {wanted.name} | **missing** | {wanted.specifier} | see benchmarks/gpu_wheels.sh |"
            continue
        fits = wanted.specifier.contains(found, prereleases=True)
        yield f"| {wanted.name} | {found} | {wanted.specifier} | {'' if fits else '**not in the range**'} |"
    if missing:
        sys.exit(f"missing: {', '.join(missing)}")
    import camopd.trainer  # noqa: F401 - if this fails, so will the other parts


def gpu_name() -> str:
    import torch

    if not torch.cuda.is_available():
        return "no GPU"
    size = torch.cuda.get_device_properties(0).total_memory / 2**30
    return f"{torch.cuda.get_device_name()} with {size:.0f} GiB, CUDA {torch.version.cuda}"


# --------------------------------------------------------------------------------------------------------------- tests


def tests(deadline: float, which: str = "not flex_attention") -> Lines:
    """A line for each test that has ended, and how pytest ended."""
    command = [sys.executable, "-m", "pytest", "tests/test_gpu.py", "-o", "addopts=", "-m", "gpu", "-v", "--tb=short"]
    command += ["-k", which]
    command += ["--strict-markers", "-p", "no:cacheprovider"]
    if not is_dry() and importlib.util.find_spec("xdist"):
        command += ["-n", "4", "--dist", "worksteal"]  # most of the time goes into compilers
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    # It says at its end what has failed and why: not when it is killed.
    timer = threading.Timer(deadline - 15 - time.monotonic(), process.send_signal, [signal.SIGINT])
    timer.daemon = True
    timer.start()
    yield "| test | |"
    yield "|---|---|"
    summary = ""
    for line in process.stdout or ():
        print(line, end="", file=sys.stderr)
        found = re.search(r"\b(PASSED|FAILED|ERROR)\b", line)
        name = re.search(r"::(test_[^\n]*?)(?: (?:PASSED|FAILED|ERROR)| *$)", line)
        if found and name and "%]" in line:
            yield f"| {name[1].strip()} | {found[1].lower()} |"
        elif re.search(r"\d+ (passed|failed|error)", line):
            summary = line.strip("= \n")
    yield ""
    yield f"{summary or 'No test has run'}."
    timer.cancel()
    if process.wait() or "passed" not in summary:
        sys.exit("some have failed")


# ---------------------------------------------------------------------------------------------------------- throughput


def throughput(deadline: float, attention: str = "sdpa", packed: bool = False) -> Lines:
    """Scoring and training of one student without a trainer: rows of one length, 16,384 tokens in a forward."""
    import torch

    device = torch.device("cpu" if is_dry() else "cuda")
    side, shape, lengths, tokens = (
        (64, TINY, (16, 32), 64) if is_dry() else (8192, QWEN3_06B, (1024, 4096, 8192), 16384)
    )
    rate = matrix_rate(side, device)
    yield f"Product of two {side} x {side} bfloat16 matrices of random numbers: **{rate / 1e12:.3g} TFLOP/s**, the ceiling."
    yield f"A copy in memory: {copy_rate(side, device) / 1e12:.3g} TB/s, read and written."
    yield ""
    yield f"A Llama of {shape.weights / 1e9:.2g} billion random weights in bfloat16, {tokens:,} tokens a forward, an eighth"
    yield "of each row prompt. Operations are those that run: training goes through the model four times (checkpointing)."
    yield "Medians of 3, after one to warm up, whose seconds are `first`."
    yield ""
    yield "| attention | row (tokens) | score (tokens/s) | of ceiling | train (tokens/s) | of ceiling | peak MiB | first |"
    yield "|---|---|---|---|---|---|---|---|"
    torch.manual_seed(0)
    with device:
        model = memory_formula.make_llama(shape).to(torch.bfloat16)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    failures = Failures()
    model.set_attn_implementation(attention)
    for length in lengths:
        name = f"{attention}{', padding-free' if packed else ''} | {length}"
        try:
            found = speed(model, shape, length, tokens, packed)
        except Exception as error:  # out of memory, or a compiler's
            yield f"| {name} | {failures.of(error)} | | | | | |"
            continue
        cells = (f"{tokens / found[kind]:,.0f} | {found[f'{kind} operations'] / found[kind] / rate:.1%}" for kind in
                 ("score", "train"))  # fmt: skip
        yield f"| {name} | {' | '.join(cells)} | {found['peak']:.0f} | {found['first']:.0f} |"
    failures.end()


def flex(deadline: float) -> Lines:
    """Flex attention without padding: its throughput, then its tests."""
    kind = "sdpa" if is_dry() else "flex_attention"  # of flex attention there is no backward on a CPU
    yield from throughput(deadline, kind, packed=True)
    yield ""
    yield from tests(deadline, "flex_attention")


def speed(model: Any, shape: Shape, length: int, tokens: int, packed: bool) -> dict[str, float]:
    """Seconds and operations of a forward that scores, and of forward and backward, on rows of one length."""
    import torch

    from camopd.logprobs import completion_logps

    count, prompt = tokens // length, length // 8
    rows = torch.randint(3, shape.vocabulary, (count, length), generator=torch.Generator().manual_seed(0)).tolist()
    arguments = (model, rows, [prompt] * count, 0, True, packed)

    def score() -> None:
        model.eval()
        with torch.no_grad():
            completion_logps(*arguments)

    def train() -> None:
        model.train()  # checkpointing is for training
        model.zero_grad(set_to_none=True)
        completion_logps(*arguments)[0].sum().backward()

    reset_peak()
    once = forward_operations(shape, [length] * count, prompt)
    found = {"score operations": once, "train operations": 4 * once}
    for kind, function in (("score", score), ("train", train)):
        first, found[kind] = seconds_of(function)
        found["first"] = found.get("first", 0.0) + first
    return {**found, "peak": peak()}


def forward_operations(shape: Shape, lengths: list[int], prompt: int) -> float:
    """Multiplications and additions of a forward: layers on all tokens, attention on those before, head on completions."""
    layers = shape.weights - (1 if shape.tied else 2) * shape.vocabulary * shape.hidden
    attention = sum(4 * shape.layers * shape.heads * shape.head_dim * length * (length + 1) / 2 for length in lengths)
    head = 2 * shape.vocabulary * shape.hidden * sum(length - prompt for length in lengths)
    return 2 * layers * sum(lengths) + attention + head


def seconds_of(function: Callable[[], Any], times: int = 3) -> tuple[float, float]:
    """Of one call to warm up, and the median of those after it, until the GPU is done."""
    found = []
    for _ in range(1 + times):
        started = time.perf_counter()
        function()
        step.wait_for_gpu()
        found.append(time.perf_counter() - started)
    return found[0], statistics.median(found[1:])


def matrix_rate(side: int, device: Any) -> float:
    """Operations a second of a bfloat16 product; random numbers, since zeros go faster."""
    import torch

    one, other = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 * 10 / seconds_of(lambda: [one @ other for _ in range(10)])[1]


def copy_rate(side: int, device: Any) -> float:
    """Bytes a second that a copy reads and writes, of more than the caches hold."""
    import torch

    source = torch.randn(8, side, side, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / seconds_of(lambda: target.copy_(source))[1]


# ---------------------------------------------------------------------------------------------------------------- step


def step_beside_trl(deadline: float) -> Lines:
    """`step.py`'s workload of log-normal lengths, as many alternating rounds as there is time for, at most three."""
    sizes = (
        {"prompts": 4, "batch": 2, "median": 6, "cap": 12}
        if is_dry()
        else {**step.ON_GPU, "prompts": 32, "median": 1200}
    )
    found: dict[str, list[dict]] = {name: [] for name in CONTENDERS}
    failures, started, rounds = Failures(), time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        save_model(TINY if is_dry() else QWEN3_06B, folder)
        while rounds < (1 if is_dry() else 3):
            for name in [name for name in CONTENDERS if not rounds or found[name]]:
                job = {
                    "model": folder, "steps": 1, "server": None, "sizes": sizes, "workload": "lengths", "bf16": True,
                    "settings": step.CONTENDERS["lengths"][name],
                }  # fmt: skip
                begun = time.monotonic()
                try:
                    found[name].append(in_fresh_process(step.__file__, job, KEEP_PAGES))
                except SystemExit as error:
                    yield f"{name}: {failures.of(error)}"
                    yield ""
                else:
                    seconds = time.monotonic() - begun
                    yield f"Round {rounds + 1}, {name}, in {seconds:.0f} s: `{json.dumps(found[name][-1])}`"
                    yield ""
            rounds += 1
            if time.monotonic() + 1.2 * (time.monotonic() - started) / rounds > deadline:
                break
    there = {"lengths": {name: rows for name, rows in found.items() if rows}}
    yield from step.table("lengths", there["lengths"])
    yield from step.ratios(there)
    yield f"Medians of {rounds} rounds, each process fresh, after a step to warm up; {sizes['prompts']} prompts,"
    yield f"completions of log-normal length (median {sizes['median']}, at most {sizes['cap']}), {sizes['batch']} rows a"
    yield "micro-batch, float32 weights under bfloat16 autocast."
    failures.end()


def save_model(shape: Shape, folder: str) -> None:
    """A model of random weights and the tests' tokenizer, whose vocabulary is smaller than the model's."""
    import torch

    torch.manual_seed(0)
    with torch.device("cpu" if is_dry() else "cuda"):
        model = memory_formula.make_llama(shape)
    model.to("cpu").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


# -------------------------------------------------------------------------------------------------------------- memory


def memory_of_steps(deadline: float) -> Lines:
    """Peaks of a whole step with float32 weights under bfloat16 autocast, and what the formula says of them."""
    shapes = [(TINY, 8, 24)] if is_dry() else [(QWEN3_06B, 512, 7680), (QWEN3_06B, 512, 1536), memory_formula.SMALL[3]]
    yield "| weights (M) | tokens | predicted (MiB) | measured (MiB) | predicted / measured |"
    yield "|---|---|---|---|---|"
    failures = Failures()
    for shape, prompt, completion in shapes:
        job = {"shape": asdict(shape), "prompt": prompt, "completion": completion, "bf16": True}
        try:
            found = in_fresh_process(memory_formula.__file__, job)
            predicted = memory_formula.on_gpu(shape, prompt, completion)
            yield memory_formula.row(shape, prompt, completion, predicted, found)
        except SystemExit as error:
            yield f"| {shape.weights / 1e6:.0f} | {prompt} + {completion} | {failures.of(error)} | | |"
    yield ""
    yield "Of the second of two updates, in a fresh process. The formula is that of memory_formula.py and docs/scale.md."
    failures.end()


PARTS = {
    "machine": machine, "tests": tests, "step": step_beside_trl, "throughput": throughput, "memory": memory_of_steps,
    "flex": flex,
}  # fmt: skip


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if sys.argv[1:2] == ["--part"]:
        run_this_part(sys.argv[2], float(sys.argv[3]))
    else:
        main(sys.argv[1:])
