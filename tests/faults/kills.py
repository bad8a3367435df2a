"""Kill runs in their saves and at random moments, and see that they go on as if nothing had happened.

    python tests/faults/kills.py [--share 1.0] [--seed 0] [--workers 2]

A run is a forked process of this one, or two of them that train together. It is killed (SIGKILL) at the n-th file operation
of a save that Python can see: opening, making, renaming, removing, flushing, and before, in the middle of and after each
file that torch and safetensors write. Or it is killed at a random moment. Then it is started again with
`resume_from_checkpoint="auto"`. `different` are runs that end with other weights, losses or branches than the run that was
not killed, to the bit; `stuck` are those that do not go on by themselves. Both must be 0. Some get SIGTERM in one of their
processes, and must end with the exit code for "requeue" in all of them.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple


sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: a fork has none of its threads
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import safetensors.torch
import torch
import transformers.modeling_utils
from conftest import make_model, make_prompts, make_tokenizer
from fake_rollouts import FakeRollouts
from fake_vllm import FakeVLLM
from peft import LoraConfig

from camopd import CaMOPDConfig, CaMOPDTrainer
from camopd.signals import REQUEUE, RunInterrupted


STEPS = 4
PATIENCE = 240  # seconds for a run that takes two or three
FILE_EVENTS = {
    "open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir", "os.utime", "os.truncate",
    "shutil.rmtree", "shutil.copyfile",
}  # fmt: skip


class Scenario(NamedTuple):
    """What is run, on how many processes, and whether the folder has another run's files."""

    kind: str  # "full", "lora", "server" (the general teacher on one), "ahead" (rollouts, too, and a step ahead)
    processes: int
    used: bool
    kills: int  # in saves
    moments: int  # at random
    stops: int = 0  # by SIGTERM to one process, at random


SCENARIOS = (
    Scenario("full", 1, False, 70, 24, 16),
    Scenario("full", 1, True, 40, 0),
    Scenario("lora", 1, False, 30, 0),
    Scenario("server", 1, False, 20, 10, 8),
    Scenario("ahead", 1, False, 20, 24, 8),
    Scenario("full", 2, False, 24, 8, 8),
    Scenario("ahead", 2, False, 6, 12, 4),
    Scenario("lora", 2, True, 8, 0),
)


# ------------------------------------------------------------------------------------------------ inside a run's process


class Ticks:
    """Counts file operations of saves; at the n-th one the process is killed, or from it on the disk is full."""

    def __init__(self, deadly: int | None, full: int | None = None, folder: str = ""):
        """`full`: the operation after which nothing more can be written in `folder`."""
        self.deadly, self.full, self.folder = deadly, full, folder
        self.count, self.saving = 0, False

    def tick(self) -> None:
        if self.saving:
            self.count += 1
            if self.count == self.deadly:
                os.kill(os.getpid(), signal.SIGKILL)

    def write(self, path: Any) -> None:
        """Something is about to be written to a path."""
        if self.full is not None and self.count >= self.full and str(path).startswith(self.folder):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def install(self) -> None:
        sys.addaudithook(self._heard)
        os.fsync = self._around(os.fsync)  # ty: ignore
        torch.save = self._written(torch.save)
        transformers.modeling_utils.safe_save_file = self._written(safetensors.torch.save_file)
        save = CaMOPDTrainer._save_checkpoint

        def save_checkpoint(trainer: Any, *args: Any, **kwargs: Any) -> None:
            self.saving = True
            save(trainer, *args, **kwargs)
            self.saving = False

        CaMOPDTrainer._save_checkpoint = save_checkpoint  # type: ignore[method-assign]

    def _heard(self, event: str, details: tuple[Any, ...]) -> None:
        if event not in FILE_EVENTS:
            return
        self.tick()
        if event == "os.mkdir" or (event == "open" and details[2] & (os.O_WRONLY | os.O_RDWR)):
            self.write(details[0])

    def _around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            return function(*args, **kwargs)

        return call

    def _written(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Of a function that writes a file: before, with half of it on the disk, and after."""

        def write(content: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
            self.tick()
            self.write(path)  # torch and safetensors open it where Python does not see it
            result = function(content, path, *args, **kwargs)
            if self.saving and self.deadly == self.count + 1:
                os.truncate(path, os.path.getsize(path) // 2)
            self.tick()
            return result

        return write


def train(job: dict[str, Any]) -> dict[str, Any]:
    """One run, or one process of it. What it comes to, for `same`."""
    torch.manual_seed(0)
    ticks = Ticks(job.get("deadly"), job.get("full"), job["folder"])
    ticks.install()
    lora = job["kind"] == "lora"
    general = job["url"] if job["kind"] in ("server", "ahead") else make_model(2)
    args = CaMOPDConfig(
        output_dir=job["folder"], use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, save_strategy="steps",
        save_steps=1, save_total_limit=2, gradient_checkpointing=False, learning_rate=1e-2, max_steps=STEPS,
        prompts_per_step=4, per_device_train_batch_size=1, max_completion_length=6, max_prompt_length=64,
        optim="adamw_torch", seed=job.get("seed", 1), log_level="error", diagnostics_steps=1,
        **({"overwrite_output_dir": True} if job["used"] else {}),
        **({"rollout_servers": [job["rollouts"]], "rollout_lag": 1} if job["kind"] == "ahead" else {}),
    )  # fmt: skip
    trainer = CaMOPDTrainer(
        model=make_model(1),
        teachers={"general": general, "domain": "adapter_off" if lora else make_model(1)},
        args=args,
        train_dataset={branch: make_prompts(branch) for branch in ("general", "domain")},
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(r=2, target_modules="all-linear") if lora else None,
    )
    trainer.train(resume_from_checkpoint=None if job["used"] else "auto")
    digest = hashlib.sha256()
    for name, weight in trainer.accelerator.unwrap_model(trainer.model).named_parameters():
        digest.update(name.encode() + weight.detach().numpy().tobytes())
    lines = (Path(job["folder"]) / "metrics.jsonl").read_text().splitlines()
    keys = ("step", "branch", "loss", "grad_norm")
    return {
        "weights": digest.hexdigest(),
        "lines": [[json.loads(line)[key] for key in keys] for line in lines],
        "ticks": ticks.count,
    }


# -------------------------------------------------------------------------------------------------------- starting them


def fork(job: dict[str, Any], rank: int, port: int, answer: Path) -> int:
    """Start one process of a run. Its answer, or its traceback, is in a file when it ends."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        processes = job["processes"]
        if processes > 1:
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_PORT": str(port),
                "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
            }  # fmt: skip
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        answer.write_text(
            json.dumps(train({**job, "deadly": job.get("deadly") if rank == job.get("of", 0) else None}))
        )
        code = 0
    except RunInterrupted as stopped:
        code = stopped.code
    except BaseException:
        answer.write_text(traceback.format_exc())
    finally:
        os._exit(code)


def run(job: dict[str, Any], folder: Path) -> tuple[list[int], list[str]]:
    """Start all processes of a run and wait for them; where one ends badly, the others are killed, as a launcher does.

    At the `moment` of a job, seconds after the start, all are killed, or one gets its `signal`. Exit codes (negative: the
    signal that has ended it) and answers by rank.
    """
    folder.mkdir(parents=True, exist_ok=True)
    answers = [folder / f"answer-{rank}" for rank in range(job["processes"])]
    for answer in answers:
        answer.unlink(missing_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = time.monotonic()
    alive = {fork(job, rank, port, answer): rank for rank, answer in enumerate(answers)}
    codes = [0] * job["processes"]
    moment, ended = job.get("moment"), None
    while alive:
        for process in list(alive):
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                codes[alive.pop(process)] = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - started
        ended = seconds if ended is None and any(codes) else ended
        victims: list[int] = []
        if seconds > PATIENCE or (ended is not None and seconds > ended + (30 if REQUEUE in codes else 0)):
            victims, deadly = list(alive), signal.SIGKILL
        elif moment is not None and seconds > moment:
            deadly, moment = job.get("signal", signal.SIGKILL), None
            victims = [process for process, rank in alive.items() if "signal" not in job or rank == job["of"]]
        for process in victims:
            with suppress(ProcessLookupError):
                os.kill(process, deadly)
        time.sleep(0.005)
    return codes, [answer.read_text() if answer.exists() else "" for answer in answers]


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two runs have ended alike, to the bit."""
    return all(one[key] == other[key] for key in ("weights", "lines"))


def trial(
    scenario: Scenario, job: dict[str, Any], reference: dict[str, Any], folder: Path, before: Path | None
) -> str:
    """Kill a run and go on: "same", "different", "stuck", or "not killed" where it had ended by then."""
    shutil.rmtree(folder, ignore_errors=True)
    output = folder / "run"
    if before is not None:
        shutil.copytree(before, output)
    job = {**job, "folder": str(output)}
    codes, answers = run(job, folder)
    ended = "not killed" if not any(codes) else ""
    # A signal that comes before the run listens ends it.
    allowed = [[-signal.SIGKILL, 0], [REQUEUE, -signal.SIGTERM, -signal.SIGKILL, 0]]["signal" in job]
    if scenario.processes > 1 and {-signal.SIGKILL, -signal.SIGTERM} & set(codes):
        allowed.append(1)  # the one that is left finds the other gone
    if any(code not in allowed for code in codes) or (REQUEUE in codes and set(codes) != {REQUEUE}):
        return f"stuck: exit {codes} where it was killed: {answers[0][-800:]}"
    job = {key: value for key, value in job.items() if key not in ("deadly", "moment", "signal")} | {"used": False}
    codes, answers = run(job, folder)
    if any(codes):
        return f"stuck: {answers[0][-1500:]}"
    if not all(same(json.loads(answer), reference) for answer in answers):
        return "different"
    return ended or "same"


def serve(made: Callable[[], FakeVLLM], told: Path) -> tuple[int, str]:
    """A server in a process of its own; its process and URL."""
    process = os.fork()
    if not process:
        server = made()
        told.with_suffix(".part").write_text(server.url)
        told.with_suffix(".part").rename(told)
        while True:
            signal.pause()
    while not told.exists():
        time.sleep(0.01)
    return process, told.read_text()


# ----------------------------------------------------------------------------------------------------------- all of them


def plan(
    scenario: Scenario, ticks: list[int], seconds: float, share: float, chance: random.Random
) -> list[dict[str, Any]]:
    """Where a scenario's runs are killed: spread over all operations of all saves of each process, and over the time."""
    jobs: list[dict[str, Any]] = []
    kills = max(1, round(scenario.kills * share))
    for number in range(kills):
        rank = number % scenario.processes
        width = ticks[rank] / kills
        jobs.append({"deadly": 1 + min(ticks[rank] - 1, int(number * width + chance.random() * width)), "of": rank})
    jobs += [{"moment": chance.random() * seconds} for _ in range(round(scenario.moments * share))]
    for number in range(round(scenario.stops * share)):
        which = {"signal": int(signal.SIGTERM), "of": number % scenario.processes}
        jobs.append({"moment": chance.random() * seconds, **which})
    return jobs


def work(scenario: Scenario, urls: dict[str, str], folder: Path, share: float, seed: int) -> Counter[str]:
    """All trials of a scenario."""
    chance = random.Random(f"{seed}{scenario}")
    job = {"kind": scenario.kind, "processes": scenario.processes, "used": scenario.used, **urls}
    before = None
    if scenario.used:  # of a finished run with another seed
        before = folder / "before"
        codes, answers = run({**job, "folder": str(before), "seed": 9, "used": False}, folder)
        assert not any(codes), answers
    seconds = float(PATIENCE)
    timed = scenario.moments + scenario.stops > 0
    for number in range(1 + timed):  # the faster one counts, and a moment of it comes before the end of any other
        output = folder / f"reference-{number}"
        if before:
            shutil.copytree(before, output)
        started = time.monotonic()
        codes, answers = run({**job, "folder": str(output)}, folder)
        seconds = min(seconds, time.monotonic() - started)
        assert not any(codes), answers
    reference = json.loads(answers[0])
    jobs = plan(scenario, [json.loads(answer)["ticks"] for answer in answers], seconds, share, chance)
    found: Counter[str] = Counter()
    for number, kill in enumerate(jobs):
        result = trial(scenario, {**job, **kill}, reference, folder / "trial", before)
        found[result.split(":")[0]] += 1
        if result.startswith(("stuck", "different")):
            print(f"{scenario} {kill}: {result}", flush=True)
            shutil.copytree(folder / "trial", folder / f"bad-{number}", dirs_exist_ok=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="of the kills of each scenario")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="scenarios whose text has this")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="camopd-kills-"))
    teacher, url = serve(lambda: FakeVLLM(model=make_model(2), tokenizer=make_tokenizer()), folder / "teacher")
    writer, rollouts = serve(lambda: FakeRollouts(make_model(1), make_tokenizer()), folder / "writer")
    urls = {"url": url, "rollouts": rollouts}
    total: Counter[str] = Counter()
    print(
        "| run | processes | folder | killed | ended before | same | different | stuck |\n|---|---|---|---|---|---|---|---|"
    )
    try:
        for number, scenario in enumerate(SCENARIOS):
            if options.only and options.only not in str(scenario):
                continue
            found = work(scenario, urls, folder / str(number), options.share, options.seed)
            total += found
            killed = sum(found.values()) - found["not killed"]
            print(
                f"| {scenario.kind} | {scenario.processes} | {'used' if scenario.used else 'fresh'} | {killed} "
                f"| {found['not killed']} | {found['same']} | {found['different']} | {found['stuck']} |",
                flush=True,
            )
    finally:
        for server in (teacher, writer):
            os.kill(server, signal.SIGKILL)
    bad = total["different"] + total["stuck"]
    print(f"{sum(total.values()) - total['not killed']} kills: {total['different']} different, {total['stuck']} stuck")
    if bad:
        sys.exit(f"what was left lies in {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
