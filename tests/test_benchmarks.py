"""Each benchmark from its arguments to its report, with a tiny model; its fresh processes are this one."""

import contextlib
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
import torch
import yaml
from conftest import make_model, make_tokenizer
from fake_rollouts import FakeRollouts
from fake_vllm import FakeVLLM

from camopd.generation import neutral_generation


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import ahead  # noqa: E402
import bf16_weights  # noqa: E402
import coser_stream  # noqa: E402
import diagnostics  # noqa: E402
import gpu  # noqa: E402
import lag  # noqa: E402
import measuring  # noqa: E402
import memory  # noqa: E402
import memory_formula  # noqa: E402
import padding  # noqa: E402
import real_gradients  # noqa: E402
import real_steps  # noqa: E402
import real_weights  # noqa: E402
import recorded_answers  # noqa: E402
import scaling  # noqa: E402
import scoring_batches  # noqa: E402
import startup  # noqa: E402
import step  # noqa: E402
import step_model  # noqa: E402
import teacher_scoring  # noqa: E402


@pytest.fixture
def tiny(tmp_path):
    """The folder of a tiny model."""
    make_model(1).save_pretrained(tmp_path / "tiny")
    make_tokenizer().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def demo_folder(tmp_path):
    """What `camopd demo` leaves behind, of tiny models."""
    from camopd.demo_data import write_prompts

    for seed, name in enumerate(("general", "seed-0/specialised")):
        make_model(seed).save_pretrained(tmp_path / "demo" / name)
        make_tokenizer().save_pretrained(tmp_path / "demo" / name)
    write_prompts(tmp_path / "demo" / "prompts")
    return tmp_path / "demo"


def run_here(monkeypatch, benchmark):
    """Let a benchmark measure in this process, with what JSON leaves of its jobs and answers."""

    def measure(script, job, *_, **__):
        assert script == benchmark.__file__
        return json.loads(json.dumps(benchmark.measure(json.loads(json.dumps(job)))))

    monkeypatch.setattr(benchmark, "in_fresh_process", measure)


def cells(report, row):
    """The cells behind the first one of a row of a report's table, as numbers where they are some."""
    (line,) = [line for line in report.read_text().splitlines() if line.startswith(f"| {row} |")]
    return [float(cell) if re.fullmatch(r"-?[\d.]+", cell) else cell for cell in map(str.strip, line.split("|")[2:-1])]


def script_peaks(monkeypatch, *modules):
    """Memory that is 100 MiB before a step, and 107 at its peak: tiny models need less than a process has at hand."""
    for module in modules:
        monkeypatch.setattr(module, "reset_peak", lambda: 100.0)
        monkeypatch.setattr(module, "peak", lambda: 107.0, raising=False)


def test_memory_of_an_update_is_measured_for_each_contender(tiny, tmp_path, monkeypatch):
    run_here(monkeypatch, memory)
    script_peaks(monkeypatch, memory)
    report = tmp_path / "report.md"
    memory.main(["--tokens", "200", "--rows", "2", "--rounds", "1", "--model", str(tiny), "--report", str(report)])
    for name in memory.CONTENDERS:
        assert cells(report, name) == [7, 1]
    assert "2 rows of 200 completion tokens, vocabulary of 43" in report.read_text()


def test_memory_formula_is_held_to_a_measured_peak(tmp_path, monkeypatch):
    run_here(monkeypatch, memory_formula)
    script_peaks(monkeypatch, memory, memory_formula)
    shape = memory_formula.Shape(2, 32, 64, 4, 2, 8, 64, True)
    monkeypatch.setattr(memory_formula, "SMALL", ((shape, 8, 24),))
    memory_formula.main(["--report", str(tmp_path / "report.md")])
    tokens, predicted, measured, _ = cells(tmp_path / "report.md", "0")
    assert tokens == "8 + 24" and predicted < 100 and measured == 7
    assert cells(tmp_path / "report.md", "Qwen3-8B | LoRA, bf16 weights")


@pytest.mark.parametrize(
    ("workload", "contenders"),
    [
        (name, list(contenders)[-2:]) for name, contenders in step.CONTENDERS.items()
    ],  # the others are settings of these
)
def test_step_times_each_contender_on_the_same_work(workload, contenders, tiny, tmp_path, monkeypatch):
    run_here(monkeypatch, step)
    monkeypatch.setitem(step.CONTENDERS, workload, {name: step.CONTENDERS[workload][name] for name in contenders})
    sizes = {"prompts": 4, "batch": 2, "median": 6, "cap": 12, "equal": 6, "generation_prompts": 4, "new_tokens": 5}
    report, arguments = tmp_path / "report.md", ["--rounds", "1", "--only", workload, "--model", str(tiny)]
    step.main([*arguments, "--sizes", json.dumps(sizes), "--report", str(report)])
    for name in contenders:
        seconds, cpu, rollout, rest, *_ = cells(report, name)
        assert seconds > 0 and cpu > 0 and rest <= seconds
        assert (rollout > 0) == (workload == "generation")
    assert "## Ratios of medians" in report.read_text()


def test_step_counts_the_tokens_of_the_rows(tiny):
    """What each sample has, and what of it goes through the student: prompts and completions, all kept, no padding."""
    job = {"model": str(tiny), "steps": 1, "server": None, "workload": "equal", "settings": {"selection": False}}
    found = step.measure({**job, "sizes": {"prompts": 4, "batch": 2, "equal": 6}})
    assert found["completion tokens"] == 4 * 6
    assert found["tokens forward and backward"] == 4 * (step.PROMPT + 6)
    assert found["tokens forward only, student"] == found["tokens forward only, teacher"] == 4 * (step.PROMPT + 6)


def test_padding_times_both_ways_and_says_which_one_the_trainer_takes(tiny, tmp_path, monkeypatch):
    run_here(monkeypatch, padding)
    report = tmp_path / "report.md"
    padding.main(["--rounds", "1", "--longest", "80", "--model", str(tiny), "--report", str(report)])
    rows = [line for line in report.read_text().splitlines() if re.match(r"\| \d", line)]
    assert len(rows) == 4 * len(padding.SHARES)
    forward, train, predicted, packs = cells(report, "10, 10, 10, 10")
    assert forward > 0 and train > 0 and predicted > 1 and packs == "no"
    *_, predicted, packs = cells(report, "10, 5, 5, 5")
    assert predicted < 1 and packs == "yes"


def test_scoring_batches_times_every_way_to_cut_the_rows(tiny, tmp_path, monkeypatch):
    run_here(monkeypatch, scoring_batches)
    report = tmp_path / "report.md"
    sizes = ["--rows", "9", "--median", "6", "--cap", "12", "--rounds", "1"]
    scoring_batches.main([*sizes, "--model", str(tiny), "--report", str(report)])
    forwards, tokens, seconds, cpu = cells(report, "1")
    assert forwards == 9 and seconds > 0 and cpu > 0
    assert cells(report, "9")[0] == 1 and cells(report, "twice the root")[0] == 6
    assert tokens <= cells(report, "chosen")[1] <= cells(report, "9")[1]  # padding
    assert "a forward costs as much as" in report.read_text()


def test_scaling_prices_the_papers_step(tmp_path, monkeypatch):
    run_here(monkeypatch, scaling)
    monkeypatch.setattr(scaling, "SETUPS", [{"prompts": 4, "median": 6, "processes": 1}])
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    monkeypatch.setattr(scaling, "MODEL", {**scaling.MODEL, **small})
    monkeypatch.setattr(scaling, "CAP", 12)
    steps, read = [], scaling.metrics_of
    monkeypatch.setattr(scaling, "metrics_of", lambda folder: steps.extend(read(folder)) or list(steps))
    scaling.main(["--report", str(tmp_path / "report.md")])
    median, processes, score, train, tokens, *_ = cells(tmp_path / "report.md", "4")
    assert (median, processes) == (6, 1) and 0 < tokens <= 4 * (12 + scaling.PROMPT)
    for seconds, name in ((score, "time/score"), (train, "time/train")):  # of three steps after one
        assert len(steps) == 4 and seconds == round(statistics.median(step[name] for step in steps[1:]), 2)
    assert "## The paper's step, priced" in (tmp_path / "report.md").read_text()
    priced = scaling.price_servers()
    step_of = {line.split(" | ")[0].strip("| "): [int(cell) for cell in line.strip("| ").split(" | ")[1:]][3::4]
               for line in priced if re.match(r"\| [a-z]", line)}  # fmt: skip
    waiting, ahead = step_of["one after the other"], step_of["one step ahead"]
    assert all(one < other for one, other in zip(ahead, waiting, strict=True))
    assert any("No rate of this table has been measured on a GPU" in line for line in priced)


def test_scaling_prices_a_step_without_servers_that_wait_as_by_hand():
    """512 completions of 6,000 tokens on 8 GPUs at 2,500 a second, 16 that train 0.7 of all tokens at 0.4 of the peak."""
    rollout, train = 512 * 6000 / (8 * 2500), 8 * 8.19e9 * 0.7 * 512 * 6500 / (16 * 0.4 * 989e12)
    teacher = 2 * 8.19e9 * 512 * 6500 / (8 * 0.5 * 989e12)
    (line,) = [line for line in scaling.price_servers() if line.startswith("| one after the other |")]
    found = [int(cell) for cell in line.strip("| ").split(" | ")[1:5]]
    assert found == [round(each) for each in (rollout, teacher, train, rollout + teacher + train + scaling.SYNC)]
    assert scaling.seconds_a_step is step_model.seconds_a_step


def test_step_ahead_is_timed_with_known_latencies(tmp_path, monkeypatch):
    monkeypatch.setattr(ahead, "WRITE", 0.001)
    monkeypatch.setattr(ahead, "PROMPTS", 4)
    report = tmp_path / "report.md"
    ahead.main(["--rounds", "1", "--steps", "3", "--tokens", "4", "--train", "0.05", "--report", str(report)])
    for name in ahead.SETTINGS:
        step, _, own, bound, hidden, ratio = cells(report, name)
        assert (
            bound >= own >= 0.05
            and 0 <= float(hidden.rstrip("%")) <= 100
            and ratio == pytest.approx(step / bound, abs=0.3)
        )


def test_step_ahead_is_timed_on_servers_that_are_named(demo_folder, capsys, monkeypatch):
    monkeypatch.setattr(ahead, "PROMPTS", 4)
    with (
        contextlib.closing(FakeRollouts(make_model(1), make_tokenizer(), max_model_len=512)) as rollouts,
        contextlib.closing(FakeVLLM(make_model(0), make_tokenizer())) as teacher,
    ):
        servers = ["--rollout-server", rollouts.url, "--teacher-server", teacher.url]
        few = ["--rounds", "1", "--steps", "3", "--tokens", "3"]
        ahead.main(["--model", str(demo_folder / "seed-0" / "specialised"), *servers, *few])
        assert rollouts.requests and teacher.requests
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[1:]] == [*ahead.SETTINGS]
    assert all(float(row[1]) > 0 and float(row[4]) > 0 for row in rows[1:])


@pytest.mark.parametrize("named", [True, False])
def test_cost_of_a_lag_is_measured_over_seeds(named, demo_folder, tmp_path, monkeypatch):
    run_here(monkeypatch, lag)
    report = tmp_path / "lag.md"
    few = ["--seeds", "2", "--steps", "3", "--prompts", "4", "--tokens", "4", "--heldout", "2", "--rate", "0.01"]
    few += ["--runs", str(tmp_path / "runs")]
    with contextlib.closing(FakeRollouts(make_model(1), make_tokenizer(), max_model_len=512)) as server:
        few += ["--rollout-server", server.url] if named else []
        lag.main(["--demo", str(demo_folder), *few, "--report", str(report)])
    rows = [line.strip("| ").split(" | ") for line in report.read_text().splitlines() if re.match(r"\| \d", line)]
    assert [row[:2] for row in rows] == [["0", "0"], ["0", "1"], ["1", "0"], ["1", "1"]]
    for plain, behind in (rows[:2], rows[2:]):
        assert plain[2:4] == behind[2:4] and plain[4:6] != behind[4:6]  # before, and after
    assert rows[0][4:6] != rows[2][4:6]
    done, before = [], report.read_text()
    names = next(line for line in before.splitlines() if line.startswith("| seed")).strip("| ").split(" | ")[2:]
    monkeypatch.setattr(lag, "in_fresh_process", lambda file, job: done.append(job) or dict.fromkeys(names, 9.0))
    lag.main(["--demo", str(demo_folder), *few, "--report", str(report)])
    assert not done and report.read_text() == before
    lag.main(["--demo", str(demo_folder), *few, "--rate", "0.02", "--report", str(report)])  # other runs than those
    assert len(done) == 4 and "9.0000" in report.read_text()


def test_prompts_of_real_weights_are_apart_and_all_there(tmp_path, monkeypatch):
    """Of each domain: what is fine-tuned on, trained on and held out has every row once."""
    monkeypatch.chdir(tmp_path)
    said = [[{"speaker": "User 1", "text": f"q{n}"}, {"speaker": "User 2", "text": f"a{n}"}] for n in range(200)]
    people = [{"persona_2": ["I sail."], "turns": turns} for turns in said]
    talk = [{"persona_2": [], "turns": [{"speaker": "User 1", "text": "twice"}] * 2}]  # by one speaker: left out
    for name, rows in {
        "medquad/medquad_short": [{"question": f"q{n} ", "answer": f" a{n}"} for n in range(200)],
        "synthetic_persona_chat/valid": people + talk,
        "merged/general_prompts_train": [
            {"messages": [{"role": "user", "content": f"g{n}"}], "category": "chat"} for n in range(100)
        ],
    }.items():
        path = tmp_path / "data" / f"{name}.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    real_weights.main([str(tmp_path / "data"), "--stop-after", "prepare"])
    for domain in real_weights.DOMAINS:
        folder, found = tmp_path / "runs" / "real" / domain, {}
        for path in folder.glob("*.jsonl"):
            found[path.stem] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        asked = [row["messages"][-2]["content"] for row in found["sft"]]
        asked += [row["prompt"][-1]["content"] for name in ("domain", "domain_heldout") for row in found[name]]
        assert sorted(asked) == sorted(f"q{n}" for n in range(200))
        assert all(row["messages"][-1]["content"].startswith("a") for row in found["sft"])
        general = [row["prompt"][0]["content"] for name in ("general", "general_heldout") for row in found[name]]
        assert sorted(general) == sorted(f"g{n}" for n in range(100))
        held_out = real_weights.ON_CPU["held_out"]
        assert len(found["domain_heldout"]) == len(found["general_heldout"]) == held_out


def test_model_specialised_with_other_sizes_is_not_taken_for_one_with_these(tmp_path, monkeypatch):
    """As one of the CPU's sizes on a machine with a GPU."""
    target = tmp_path / "runs" / "real" / "medical" / "specialised"

    def fine_tune(*words):
        made.append(words[words.index("--max_steps") + 1])
        target.with_name("_specialised").mkdir()

    made = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(real_weights, "run_program", fine_tune)
    monkeypatch.setattr("camopd.commands.demo_stages.unpack_base_model", lambda folder: folder)
    target.parent.mkdir(parents=True)
    for _ in range(2):  # and is there the second time
        real_weights.specialise("medical", real_weights.ON_CPU)
    assert made == ["40"] and target.is_dir()
    with pytest.raises(SystemExit, match=r"other or unknown sizes, not .*300.*Move runs/real away"):
        real_weights.specialise("medical", real_weights.ON_GPU)
    assert made == ["40"]


def test_runs_of_real_weights_are_done_once_and_stand_in_the_table(tmp_path, monkeypatch):
    """In the place of `camopd sweep` and `camopd eval` stand programs that write what these do, and refuse as they do."""
    done, asked, lost = [], [], set()
    folder = tmp_path / "runs" / "real" / "medical"
    start = folder / "specialised" / "model.safetensors"

    def sweep(file, only):
        method, seed = only.split("/seed-")
        if (method, int(seed)) in lost:
            sys.exit("killed")
        run = Path(yaml.safe_load(Path(file).read_text())["output_dir"]) / only
        if run.is_dir():
            return  # done before
        run.mkdir(parents=True)
        kl = {"general": 0.1 * (1 + int(seed)) + (method == "vanilla_mopd"), "domain": 0.5}
        lines = [{"step": step, "branch": branch, "kl_by_prompt": [0.0 if step == 0 else kl[branch], None]}
                 for step in (0, 8) for branch in kl]  # fmt: skip
        (run / "held_out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (run / "model").write_text(f"{len(done)}")
        (run / "sweep.json").write_text("{}")
        (run / "checkpoint-8").mkdir()
        done.append((method, int(seed)))

    def evaluate(out, start_of, result):
        for name, model in (("start", start_of / "model.safetensors"), ("result", result / "model")):
            answers = out / name / "of"
            new = not answers.exists()
            assert new or answers.read_bytes() == model.read_bytes(), "answers of another model"
            asked.append(name) if new else None
            answers.parent.mkdir(parents=True, exist_ok=True)
            answers.write_bytes(model.read_bytes())
        means = {"start": 0.25, "general": 0.5, "result": 0.3 + 0.1 * ("vanilla" in str(out))}
        row = {"models": {name: {"mean": mean, "items": 64} for name, mean in means.items()},
               "change": {"value": 0.05, "low": 0.01, "high": 0.09}}  # fmt: skip
        (out / "eval.json").write_text(json.dumps({"tasks": [{"task": task, **row} for task in ("ifeval", "qasc")]}))

    def run(python, module, cli, command, *words):
        if command == "sweep":
            return sweep(words[0], words[2])
        models = dict(word.split("=") for word in words[words.index("--models") + 1 :])
        return evaluate(Path(words[words.index("--out") + 1]), Path(models["start"]), Path(models["result"]))

    def go(data=tmp_path, at_once=1, size=real_weights.ON_CPU):
        done.clear()
        asked.clear()
        real_weights.go_through(data, "medical", size, kept, at_once)
        return list(done)

    def table(method, before=""):
        text = (kept / "real_weights.md").read_text()
        return [line for line in text.splitlines() if line.startswith(f"| {method} |") and before in line]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(real_weights, "run_program", run)
    start.parent.mkdir(parents=True)
    start.write_bytes(b"start")
    for name in ("general", "general_heldout", "domain", "domain_heldout"):
        (folder / f"{name}.jsonl").write_text(name)
    kept = tmp_path / "kept" / "cpu"
    every = [(method, seed) for methods in (real_weights.METHODS, real_weights.ESTIMATORS)
             for seed in (0, 1, 2) for method in methods]  # fmt: skip
    lost.add(every[5])
    with pytest.raises(SystemExit):
        go()
    assert done == every[:5] and not asked
    (first,) = kept.glob(f"medical/*/{every[0][0]}-0.json")
    before = {**json.loads(first.read_text(encoding="utf-8")), "versions": "of another day"}
    first.write_text(json.dumps(before), encoding="utf-8")
    lost.clear()
    assert go() == every[5:] and asked == ["start", *["result"] * 3 * len(real_weights.METHODS)]
    assert go() == [] and not asked and not list(folder.rglob("checkpoint-*"))
    assert json.loads(first.read_text(encoding="utf-8"))["versions"] == "of another day"  # it was not made anew
    half = 0.1 * 4.302653 / math.sqrt(3)  # Student's t of two degrees of freedom
    assert (
        f"| camopd | 3 | 0.000 | 0.200 [{0.2 - half:.3f}, {0.2 + half:.3f}] |  | 0.000 | 0.500" in table("camopd")[0]
    )
    gaps, scores, *alone = table("vanilla_mopd")
    assert alone == [f"| vanilla_mopd | {seed} | +5.0 [+1.0, +9.0] | +5.0 [+1.0, +9.0] |" for seed in (0, 1, 2)]
    assert gaps.startswith("| vanilla_mopd | 3 | 0.000 | 1.200 ") and "| +1.000 |" in gaps
    assert scores.startswith("| vanilla_mopd | 3 | 50.0 | 25.0 | 40.0 | +10.0 |")
    assert "64 items of ifeval and 64 items of qasc" in (kept / "real_weights.md").read_text()
    # A file that is lost is a run that is done again only where its model is gone, and its answers are its own.
    (file,) = kept.glob("medical/*/camopd-1.json")
    file.unlink()
    assert go() == [] and not asked and file.is_file()
    file.unlink()
    shutil.rmtree(folder / file.parent.name / "sweep")
    assert go() == [("camopd", 1)] and asked == ["result"]
    # Another start, other prompts or other sizes: another table, and nothing of the first.
    start.write_bytes(b"another")
    assert sorted(go(None, 4)) == sorted(every) and not asked and len(table("camopd", "| 3 |")) == 3
    assert sorted(go()) == [] and asked == ["start", *["result"] * 3 * len(real_weights.METHODS)]
    (folder / "domain_heldout.jsonl").write_text("others")
    lost.add(every[1])
    with pytest.raises(SystemExit):
        go()
    assert done == every[:1] and sum("+5.0" not in line for line in table("camopd", "| camopd | 1 |")) == 1
    lost.clear()
    assert (
        go(None, 1, {**real_weights.ON_CPU, "run": {"max_steps": 16}}) == every and len(list(kept.glob("*/*/"))) == 4
    )


def test_diagnostics_are_priced_per_step(demo_folder, tmp_path, monkeypatch):
    run_here(monkeypatch, diagnostics)
    report = tmp_path / "report.md"
    sizes = ["--rounds", "1", "--steps", "4", "--prompts", "4", "--tokens", "5"]
    diagnostics.main([*sizes, "--demo", str(demo_folder), "--report", str(report)])
    for row in ("diagnostics of a step that measures coherence and conflict", "step without diagnostics"):
        assert cells(report, row)[0] > 0


def test_bf16_weights_move_in_every_arm_but_rounded_ones_hardly(demo_folder, tmp_path, monkeypatch):
    run_here(monkeypatch, bf16_weights)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # of torchao's step, which takes a while
    monkeypatch.setattr(bf16_weights, "RATES", (4e-5,))
    monkeypatch.setattr(bf16_weights, "HELDOUT", 2)
    monkeypatch.setattr(bf16_weights, "TOKENS", 4)
    report = tmp_path / "report.md"
    bf16_weights.main(["--steps", "1", "--demo", str(demo_folder), "--report", str(report)])
    lines = report.read_text().splitlines()
    changed = {
        arm: float(re.search(rf"\| {arm} \|.*to ([\d.]+)%", line)[1])
        for arm in bf16_weights.ARMS
        for line in lines
        if line.startswith(f"| {arm} |") and "%" in line
    }
    assert changed["float32"] > 50 > changed["bfloat16, rounded to nearest"]
    assert [line for line in lines if line.startswith("| float32 |")][1].split("|")[6].strip() == "16.00"


def test_run_without_scores_has_those_of_its_double_from_another_start_where_the_gaps_are_the_same(tmp_path, capsys):
    def write(start, method, after, score=None):
        gaps = {"before": 1.0, "after": after}
        change = {"value": 0.01, "low": 0.0, "high": 0.02}
        scores = {task: {"items": 64, "general": 9.0, "start": 1.0, "result": score, "change": change}
                  for task in real_weights.TASKS}  # fmt: skip
        found = {"method": method, "seed": 0, "general": gaps, "domain": gaps, "versions": "v",
                 "of": {"start": start, "size": real_weights.ON_CPU}, **({"scores": scores} if score else {})}  # fmt: skip
        folder = tmp_path / "medical" / start
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{method}-0.json").write_text(json.dumps(found))

    for method, after, score in (("camopd", 0.5, 3.0), ("relaxed_opd", 0.6, None), ("beta1_0", 0.7, None)):
        write("one", method, after, score)
    for method, after, score in (
        ("camopd", 0.5 + 2e-7, 3.5),
        ("relaxed_opd", 0.6 - 2e-7, 5.0),
        ("beta1_0", 0.71, 8.0),
    ):
        write("two", method, after, score)
    real_weights.report(tmp_path)
    one, two = (tmp_path / "real_weights.md").read_text().split("## medical, ")[1:]
    assert "| relaxed_opd | 1 | 9.0 | 1.0 | 5.0 |" in one and "| 8.0 |" not in one  # whose gaps are others
    assert "1 of these scores are of the run's double" in one and "differs by more than 0.5 points" in one
    assert "| beta1_0 | 1 | 9.0 | 1.0 | 8.0 |" in two and "of these scores" not in two
    assert "3 of these runs are there from another start as well; no gap of theirs differs by more than 1.0e-02" in two
    kept = json.loads((tmp_path / "medical" / "one" / "relaxed_opd-0.json").read_text())
    assert "scores" not in kept  # a file has what its own run has found


def test_gradients_of_real_weights_are_drawn_once_and_those_of_the_whole_kl_are_quieter(
    demo_folder, tmp_path, monkeypatch
):
    words = ["--demo", str(demo_folder), "--draws", "6", "--tokens", "4", "--out", str(tmp_path / "found")]
    real_gradients.main([*words, "--seeds", "2"])
    lines = (tmp_path / "found" / "real_gradients.md").read_text().splitlines()
    assert any("2 seeds of 6 steps of 8 general prompts, completions of up to 4 tokens" in line for line in lines)
    for seed in range(2):
        found = json.loads((tmp_path / "found" / f"{seed}.json").read_text())["rows"]
        ratio = {row["kind"]: row["ratio"] for row in found}
        assert ratio["`divergence: full`"] < min(1, ratio["`baseline: kl`"]) and ratio["sampled gap"] == 1
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith(("| `", "| s"))] == [*ratio]
    monkeypatch.setattr(real_gradients, "measure", lambda job: pytest.fail("it is there"))
    real_gradients.main([*words, "--seeds", "2"])
    with pytest.raises(SystemExit, match=r"0\.json is of .*'tokens': 4.*'tokens': 5"):  # none are mixed
        real_gradients.main([*words, "--tokens", "5"])


def test_steps_to_a_recovery_are_counted_from_runs_that_are_done_once(demo_folder, tmp_path, monkeypatch):
    assert [real_steps.steps_to(0.5, kls) for kls in ([4.0, 2.1, 2.0, 3.0], [4.0, 3.0], [0.0, 1.0])] == [2, 2, 0]
    curves = {
        "`divergence: full`": [4.0, 1.0, 1.0],
        "`divergence: top_k`": [4.0, 3.0, 2.0],
        "`baseline: kl`": [4.0] * 3,
    }
    asked = []

    def fresh(script, job):
        asked.append((job["seed"], job["gradient"]))
        if job["gradient"] in curves:
            return {"general": curves[job["gradient"]], "domain": [0.0] * 3}
        return real_steps.measure(job)

    monkeypatch.setattr(real_steps, "in_fresh_process", fresh)
    words = ["--demo", str(demo_folder), "--out", str(tmp_path / "found"), "--seeds", "1", "--steps", "2", "--prompts", "4",
             "--tokens", "4", "--heldout", "2"]  # fmt: skip
    real_steps.main(words)
    assert asked == [(0, name) for name in real_steps.GRADIENTS]
    text = (tmp_path / "found" / "real_steps.md").read_text()
    assert "1 seeds of 2 steps of 4 prompts, completions of up to 4 tokens" in text
    cells = {row.split(" | ")[0].removeprefix("| "): row.split(" | ")[1:] for row in text.splitlines() if " | " in row}
    steps = {name: (cells[name][0], cells[name][2]) for name in curves}
    assert steps == {"`divergence: full`": ("1.000", "1.000"), "`divergence: top_k`": ("2.000", "3.000"),
                     "`baseline: kl`": ("3.000", "3.000")}  # fmt: skip
    each = {row.split(" | ")[1]: row for row in text.split("Each seed;")[1].splitlines() if row.startswith("| 0 | ")}
    assert list(each) == list(real_steps.GRADIENTS)
    # The sampled gap ends below 1 here or above 4: so the curves are there in a step of their own, or never.
    aim = json.loads((tmp_path / "found" / "0-0.json").read_text())["kl"]["general"][-1]
    for name, curve in curves.items():
        there = next((str(step) for step, kl in enumerate(curve) if kl <= aim), "-")
        assert each[name].split(" | ")[4] == there
    asked.clear()
    real_steps.main(words)
    assert asked == []
    with pytest.raises(SystemExit, match=r"0-0\.json is of .*'tokens': 4.*'tokens': 5"):
        real_steps.main([*words, "--tokens", "5"])


def test_coser_stream_builds_from_a_synthetic_file(tmp_path, capsys):
    coser_stream.main(["--gigabytes", "0.0001", "--limit", "3", "--folder", str(tmp_path)])
    assert re.search(r"prompts.jsonl: [1-9]", capsys.readouterr().out)
    assert not any(tmp_path.iterdir())


class Vllm(FakeVLLM):
    """That answers what only a benchmark asks: with no log-probs, and for the form of a compact answer."""

    def answer(self, path, body):
        if body and path == "/v1/completions":
            body.setdefault("prompt_logprobs", 0)
        if body and path == "/inference/v1/generate" and body["sampling_params"].get("max_tokens") == 1:
            body["sampling_params"].setdefault("prompt_logprob_start", 0)
            body["sampling_params"].setdefault("prompt_logprob_token_ids", [[0]] * (len(body["token_ids"]) - 1))
        return super().answer(path, body)


@pytest.mark.slow  # seven processes that import torch
def test_teacher_scoring_on_both_transports_and_in_replay(tiny, tmp_path, monkeypatch, python):
    monkeypatch.setattr(sys, "executable", python)

    @contextlib.contextmanager
    def server(model, log):
        fake = Vllm(make_model(1), make_tokenizer(), name=teacher_scoring.MODEL_NAME, compact=True)
        yield fake.url
        fake.close()

    monkeypatch.setattr(teacher_scoring, "vllm_server", server)
    monkeypatch.setattr(teacher_scoring, "vllm_version", lambda: "0")
    report = tmp_path / "report.md"
    sizes = ["--real-sequences", "3", "--real-tokens", "20", "60", "--sequences", "2", "--tokens", "64"]
    teacher_scoring.main(["--rounds", "1", *sizes, "--model", str(tiny), "--report", str(report)])
    assert report.read_text().count("| camopd compact |") == 3


def test_startup_times_processes_that_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(startup, "LINES", ("--help",))
    startup.main(["--rounds", "2", "--report", str(tmp_path / "report.md")])
    for row in ("`python -c pass`", "`camopd --help`"):
        cpu, clock = cells(tmp_path / "report.md", row)
        assert 0 < cpu < 60 and 0 < clock < 60
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        startup.seconds(["-c", "1 / 0"], str(tmp_path))


def test_gpu_adds_what_a_part_finds_as_it_comes_and_goes_on_after_failures(tmp_path, monkeypatch):
    """Of three parts the first fails in the middle, the second hangs with a process of its own, and the third is well."""
    script = tmp_path / "part.py"
    script.write_text(
        "import subprocess, sys, time\n"
        "name = sys.argv[2]\n"
        "print('found by', name, flush=True)\n"
        "if name == 'machine': sys.exit('the reason')\n"
        "if name == 'tests': subprocess.run(['sleep', '60'])\n"
    )
    report = tmp_path / "new" / "gpu.md"
    monkeypatch.setattr(gpu, "__file__", str(script))
    monkeypatch.setattr(gpu, "SECONDS", {"machine": 0.5, "tests": 0.5, "memory": 60})
    monkeypatch.delenv(gpu.DRY, raising=False)
    started = time.monotonic()
    with pytest.raises(SystemExit, match=r"failed: machine, tests; see .*gpu\.md"):
        gpu.main(["--report", str(report)])
    assert time.monotonic() - started < 30
    text = report.read_text()
    for part in gpu.SECONDS:
        assert f"found by {part}" in text
    assert "the reason" in text and "**machine has failed: exit status 1**" in text
    assert re.search(r"\*\*tests has failed: it had no more than \d s\*\*", text)
    assert "memory has failed" not in text and "1 of 3 parts" in text


def test_gpu_counts_the_operations_of_a_forward():
    """By torch's own count, of a model whose heads are as wide as its hidden state, without the mask of the attention."""
    from torch.utils.flop_counter import FlopCounterMode

    shape = memory_formula.Shape(2, 32, 64, 4, 2, 8, 64, True)
    model = memory_formula.make_llama(shape)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(10)[None], use_cache=False)
    square = 4 * shape.layers * shape.heads * shape.head_dim * 10 * 10
    causal = 4 * shape.layers * shape.heads * shape.head_dim * 10 * 11 / 2
    norms = 2 * shape.layers * 2 * shape.hidden * 10  # which count as weights, and are no products of matrices
    rotation = counter.get_flop_counts()["Global"].get(torch.ops.aten.bmm, 0) - square
    assert counter.get_total_flops() - rotation == gpu.forward_operations(shape, [10], 0) - causal + square - norms


def test_gpu_budget_of_all_parts_is_within_ten_minutes():
    assert set(gpu.SECONDS) == set(gpu.PARTS) and sum(gpu.SECONDS.values()) < 600


def test_gpu_wheels_are_of_versions_that_are_tested():
    names = re.search(r'^names="(.*)"$', (BENCHMARKS / "gpu_wheels.sh").read_text(), re.M)[1].split()
    pins = dict(re.findall(r"^([\w-]+)==(.+)$", (BENCHMARKS.parent / "constraints.txt").read_text(), re.M))
    assert "trl" in names and not set(names) - set(pins)


@pytest.mark.slow  # all its parts, each in processes of their own
def test_gpu_goes_through_all_parts_on_a_cpu(tmp_path, python):
    report = tmp_path / "gpu.md"
    settings = {"PYTHON": python, "WHEELS": "", "OMP_NUM_THREADS": "1"}
    command = ["bash", str(BENCHMARKS / "gpu.sh"), "--dry-run", "--report", str(report)]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True)
    text = report.read_text()
    assert done.returncode == 0, text[-4000:] + done.stderr[-2000:]
    assert "A dry run on a CPU with tiny sizes: no number here is of a GPU" in text
    assert "6 of 6 parts" in text and "failed" not in text.lower()
    tests = len(re.findall(r"^\| test_.* \| passed \|$", text, re.M))
    assert sum(map(int, re.findall(r"^(\d+) passed", text, re.M))) == tests >= 17
    for name in gpu.CONTENDERS:
        assert cells(report, name)[0] > 0


@pytest.mark.slow
def test_benchmarks_measure_with_several_processes(monkeypatch, python):
    monkeypatch.setattr(sys, "executable", python)
    job = {"prompts": 8, "median": 6, "processes": 2, "model": {**scaling.MODEL, "hidden_size": 32}, "cap": 12}
    found = measuring.in_fresh_process(scaling.__file__, job, processes=2)
    assert found["train/tokens"] > 0 and found["time/step"] > 0


def ask(server, **body):
    url = f"http://127.0.0.1:{server.server_port}/v1/chat/completions"
    return httpx.post(url, json={**recorded_answers.GREEDY, "model": "mine", **body}, trust_env=False)


def test_recorded_answers_come_out_where_the_same_is_asked(tiny, tmp_path):
    """Noted from a server's requests, written by a model, and given by another server: each question its own answer."""
    words = ["a", "b b b", "", "a \u2028 b"]
    asked = [
        {"messages": [{"role": "user", "content": word}], "max_tokens": count} for word in words for count in (3, 5)
    ]
    path, out = tmp_path / "questions.jsonl", tmp_path / "answers"
    with serving(recorded_answers.server(0, path, None)) as server:
        for row in [*asked, asked[0]]:
            assert ask(server, **row).json()["choices"][0]["message"]["content"] == ""
    assert recorded_answers.read(path) == asked
    recorded_answers.main(
        ["write", f"mine={tiny}", "--questions", str(path), "--out", str(out), "--batch-tokens", "64"]
    )
    model, tokenizer = make_model(1).eval(), make_tokenizer()
    with serving(recorded_answers.server(0, None, out)) as server:
        for row in asked:
            ids = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, return_tensors="pt")[
                "input_ids"
            ]
            with torch.no_grad(), neutral_generation(model):
                alone = model.generate(input_ids=ids, max_new_tokens=row["max_tokens"], do_sample=False)[
                    0, ids.size(1) :
                ]
            choice = ask(server, **row).json()["choices"][0]
            assert choice["message"]["content"] == tokenizer.decode(alone, skip_special_tokens=True)
            assert choice["finish_reason"] == ("stop" if alone[-1] == tokenizer.eos_token_id else "length")
        for other in ({"temperature": 0.7}, {"max_tokens": 4}):
            assert ask(server, **{**asked[0], **other}).status_code == 400


@pytest.mark.parametrize("given", ["mine", "mine=nowhere"])
def test_recorded_answers_refuse_a_model_that_is_not_there_before_the_first_is_loaded(given, tiny, tmp_path):
    (tmp_path / "questions.jsonl").write_text("")
    words = ["--questions", str(tmp_path / "questions.jsonl"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="mine: not NAME=PATH"):
        recorded_answers.main(["write", f"tiny={tiny}", given, *words])
    assert not (tmp_path / "out").exists()


@contextlib.contextmanager
def serving(server):
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def test_benchmarks_measure_in_a_fresh_process_and_end_with_its_error(tmp_path):
    script = tmp_path / "script.py"
    lines = [f"import os, sys; sys.path.insert(0, {str(BENCHMARKS)!r})", "import measuring", "def measure(job):"]
    lines += ["    return [os.getpid(), os.environ.get('MALLOC_TOP_PAD_'), 1 / job]", "measuring.run(None, measure)"]
    script.write_text("\n".join(lines))
    pid, pad, half = measuring.in_fresh_process(str(script), 2, measuring.KEEP_PAGES)
    assert pid != os.getpid() and pad == measuring.KEEP_PAGES["MALLOC_TOP_PAD_"] and half == 0.5
    with pytest.raises(SystemExit, match=r"0 failed:\n(.|\n)*ZeroDivisionError"):
        measuring.in_fresh_process(str(script), 0)


@pytest.mark.parametrize("script", sorted(path.name for path in BENCHMARKS.glob("*.py") if path.stem != "measuring"))
def test_benchmarks_are_all_tried(script):
    assert (
        re.search(rf"^import {Path(script).stem}\b", Path(__file__).read_text(), re.M) or script == "architectures.py"
    )
