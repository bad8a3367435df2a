"""`camopd sweep` with a small script in place of training: order, resuming, failures, Ctrl-C, and a table by hand."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

from camopd import cli
from camopd.commands.sweep import MARK, read_sweep, results, table
from camopd.errors import CaMOPDError
from camopd.exit_codes import REPEATS, REQUEUE


# A run: notes that it was started, then does what its config says.
SCRIPT = """
import json, pathlib, sys, time
import yaml
config, seed, out, rest = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3]), sys.argv[4:]
settings = yaml.safe_load(open(config))
with open("order", "a") as file:
    print(pathlib.Path(config).stem, seed, *rest, file=file)
if settings.get("fail") == seed and not pathlib.Path("fixed").exists():
    print("Traceback\\nValueError: the reason")
    sys.exit(3)
if settings.get("hang") and not rest:
    print("hanging", flush=True)
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        (out / "checkpoint-2").mkdir()
        sys.exit(130)
with open(out / "metrics.jsonl", "w") as file:
    for step, value in enumerate(settings["values"], start=1):
        record = {"step": step, "branch": "general", "gap/general/abs_mean": value, "other": None, "step_time": seed}
        print(json.dumps(record), file=file)
(out / "result.json").write_text(json.dumps({"share": settings["share"] + seed, "inner": {"x": seed}, "text": "t"}))
"""
COMMAND = f"{shlex.quote(sys.executable)} run.py {{config}} {{seed}} {{output_dir}}"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write configs and a sweep of them into a folder that is then the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.py").write_text(SCRIPT)

    def write(configs, /, **settings):
        for name, content in configs.items():
            Path(f"{name}.yaml").write_text(yaml.safe_dump(content))
        sweep = {
            "output_dir": "out",
            "configs": [f"{name}.yaml" for name in configs],
            "seeds": [0, 1],
            "command": COMMAND,
        }
        Path("sweep.yaml").write_text(yaml.safe_dump({**sweep, **settings}, sort_keys=False))
        return "sweep.yaml"

    return write


ONE = {"values": [9.0, 1.0, 3.0], "share": 0.5}
TWO = {"values": [9.0, 2.0, 4.0], "share": 0.25}


def order():
    return Path("order").read_text().splitlines()


def exit_code(*arguments):
    try:
        cli.main(["sweep", *arguments])
    except SystemExit as stopped:
        return stopped.code
    return 0


def test_held_out_gaps_of_the_last_evaluation_are_columns(write, capsys):
    state = {
        "log_history": [
            {"eval_general_kl": 1.0, "step": 0},
            {"loss": 2.0, "step": 1},
            {"eval_general_kl": 0.25, "step": 2},
            {"eval_domain_kl": 0.5, "step": 2},
        ]
    }
    ending = f"(out / 'trainer_state.json').write_text({json.dumps(json.dumps(state))})"
    write({"one": ONE}, seeds=[0])
    Path("run.py").write_text(f"{SCRIPT}{ending}\n")
    assert exit_code("sweep.yaml") == 0
    assert (
        "| config | seeds | gap/general/abs_mean@5 | eval_general_kl | eval_domain_kl | share |"
        in capsys.readouterr().out
    )
    row = pd.read_csv("out/runs.csv").iloc[0]
    assert (row["eval_general_kl"], row["eval_domain_kl"], row["share"]) == (0.25, 0.5, 0.5)


def test_held_out_gaps_are_those_of_the_best_model_where_that_was_loaded(write):
    history = [{"step": step, "eval_general_kl": kl} for step, kl in ((0, 1.0), (2, 0.2), (4, 0.7))]
    lines = [{"step": each["step"], "branch": "general", "kl": each["eval_general_kl"]} for each in history]
    lines.append({"step": 2, "loaded": True})
    texts = {
        "trainer_state.json": json.dumps({"global_step": 4, "log_history": history}),
        "held_out.jsonl": "".join(json.dumps(line) + "\n" for line in lines),
    }
    write({"one": ONE}, seeds=[0], columns=["eval_general_kl", "eval_general_kl@2", "eval_general_kl@9"])
    Path("run.py").write_text(
        SCRIPT + "".join(f"(out / {name!r}).write_text({text!r})\n" for name, text in texts.items())
    )
    assert exit_code("sweep.yaml") == 0
    # of those up to the best one; that before the first step is of the start
    assert pd.read_csv("out/runs.csv").iloc[0, 2:].tolist() == pytest.approx([0.2, 0.2, 0.2])


def test_held_out_gap_that_is_not_finite_at_the_end_is_no_earlier_one(write, capsys):
    lines = [{"step": step, "branch": "general", "kl": kl} for step, kl in ((0, 1.0), (2, 0.2), (4, None))]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write({"one": ONE}, seeds=[0], columns=["eval_general_kl", "eval_general_kl@2"])
    Path("run.py").write_text(f"{SCRIPT}(out / 'held_out.jsonl').write_text({text!r})\n")
    assert exit_code("sweep.yaml") == 0
    assert pd.read_csv("out/runs.csv").iloc[0, 2:].isna().all()
    said = capsys.readouterr().out
    assert "| one | 1 | - | - |" in said and "'eval_general_kl' is not finite in any run." in said
    assert "Did you mean" not in said


def test_metrics_of_a_run_below_its_folder_are_found_beside_those_in_its_checkpoints(write):
    write({"one": ONE}, seeds=[0])
    nested = "\n".join([
        "import shutil", "(out / 'run' / 'checkpoint-1').mkdir(parents=True)",
        "shutil.copy(out / 'metrics.jsonl', out / 'run' / 'checkpoint-1' / 'metrics.jsonl')",
        "(out / 'run' / 'checkpoint-1' / 'camopd.json').write_text('{}')",
        "(out / 'metrics.jsonl').rename(out / 'run' / 'metrics.jsonl')",
    ])  # fmt: skip
    Path("run.py").write_text(f"{SCRIPT}{nested}\n")
    assert exit_code("sweep.yaml") == 0
    assert "gap/general/abs_mean@5" in pd.read_csv("out/runs.csv")


def test_held_out_gaps_of_an_earlier_run_in_the_folder_are_not_columns(write):
    """A run without evaluations ends with another number of steps than the state there says."""
    state = json.dumps({"global_step": 40, "log_history": [{"step": 40, "eval_general_kl": 0.7}]})
    write({"one": ONE}, seeds=[0], columns=["eval_general_kl"])
    Path("run.py").write_text(f"{SCRIPT}(out / 'trainer_state.json').write_text({state!r})\n")
    assert exit_code("sweep.yaml") == 0
    assert pd.read_csv("out/runs.csv")["eval_general_kl"].isna().all()


# --- runs --------------------------------------------------------------------------------------------------------


def test_runs_are_done_one_after_the_other_and_only_once(write, capsys):
    write({"one": ONE, "two": TWO})
    assert exit_code("sweep.yaml") == 0
    assert order() == ["one 0", "one 1", "two 0", "two 1"]
    assert "[4/4] two/seed-1: done in" in capsys.readouterr().out
    assert exit_code("sweep.yaml") == 0
    assert len(order()) == 4
    assert capsys.readouterr().out.count(": done before") == 4


def test_failed_run_does_not_stop_the_rest_and_is_run_again(write, capsys):
    write({"one": {**ONE, "fail": 0}, "two": TWO})
    assert exit_code("sweep.yaml") == 1
    said = capsys.readouterr()
    assert order() == ["one 0", "one 1", "two 0", "two 1"]
    assert re.search(
        r"one/seed-0: FAILED with exit code 3 after \d+ s; the end of out/one/seed-0/sweep\.log:", said.out
    )
    assert "    ValueError: the reason\n" in said.out
    assert "| one | 1 of 2 |" in said.out  # the table is made from the others
    assert re.search(r"1 of 4 runs failed: one/seed-0\. .* the same command runs them again", said.err)
    Path("fixed").touch()
    assert exit_code("sweep.yaml") == 0
    assert order()[4:] == ["one 0"]
    assert "ValueError: the reason" in Path("out/one/seed-0/sweep.log").read_text()  # the log goes on


def test_missing_matplotlib_is_said_before_the_first_run(write):
    code = "import sys; sys.modules['matplotlib'] = None; from camopd.cli import main; main(sys.argv[1:])"
    words = [sys.executable, "-c", code, "sweep", write({"one": ONE})]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "figures need 'matplotlib" in done.stderr and "[report]" in done.stderr
    assert not Path("order").exists()
    assert subprocess.run([*words, "--only", "one/seed-0"], capture_output=True, check=False).returncode == 0
    assert order() == ["one 0"]  # which writes no table


def test_command_that_cannot_be_started_fails_like_a_run(write, capsys):
    write({"one": ONE}, command="no-such-program {output_dir} {seed}")
    assert exit_code("sweep.yaml") == 1
    said = capsys.readouterr()
    assert re.search(r"one/seed-0: cannot be started: .*no-such-program.* See `command`", said.out)
    assert "No run has ended well; there is no table." in said.out


def ignore_ctrl_c():
    """As a shell does for what a script starts in the background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.mark.parametrize(
    ("what", "before"),
    [(signal.SIGINT, None), (signal.SIGTERM, None), (signal.SIGTERM, ignore_ctrl_c), (signal.SIGUSR1, None)],
)
def test_signal_stops_the_run_and_the_same_command_goes_on_from_its_checkpoint(write, what, before):
    write({"one": {**ONE, "hang": True}}, seeds=[0], command=f"{COMMAND} {{resume}}")
    command = [sys.executable, "-m", "camopd.cli", "sweep", "sweep.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parent.parent)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, preexec_fn=before)
    log = Path("out/one/seed-0/sweep.log")
    deadline = time.monotonic() + 120
    while not (log.exists() and "hanging" in log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for _ in range(2):  # as a shell does whose terminal is closed
        process.send_signal(what)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == REQUEUE
    assert "it may save a checkpoint first. Ctrl-C again stops it at once." in said
    assert "The same command goes on" in said
    assert Path("out/one/seed-0/checkpoint-2").is_dir()  # the run had its time
    assert not Path("out/one/seed-0", MARK).exists()
    assert exit_code("sweep.yaml") == 0
    assert order() == ["one 0", "one 0 --resume_from_checkpoint true"]


def test_second_ctrl_c_kills_a_run_that_does_not_stop(write, tmp_path):
    Path("deaf.py").write_text(
        "import signal, time; signal.signal(signal.SIGINT, lambda *_: print('not now', flush=True))\n"
        "print('hanging', flush=True)\nwhile True: time.sleep(1)"
    )
    write({"one": ONE}, seeds=[0], command=f"{shlex.quote(sys.executable)} deaf.py {{output_dir}}")
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parent.parent)}
    process = subprocess.Popen([sys.executable, "-m", "camopd.cli", "sweep", "sweep.yaml"], env=environment)
    log = Path("out/one/seed-0/sweep.log")
    for word in ("hanging", "not now"):
        deadline = time.monotonic() + 120
        while not (log.exists() and word in log.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(REPEATS)
        process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 130


def test_run_that_a_signal_has_stopped_has_not_failed_and_no_other_is_started(write, capsys):
    write({"one": {**ONE, "fail": 0}, "two": TWO})
    Path("run.py").write_text(SCRIPT.replace("sys.exit(3)", f"sys.exit({REQUEUE})"))
    assert exit_code("sweep.yaml") == REQUEUE
    said = capsys.readouterr().out
    assert order() == ["one 0"] and "FAILED" not in said
    assert re.search(
        r"one/seed-0: stopped by a signal after \d+ s, log in .*\nStopped\. The same command goes on", said
    )
    Path("fixed").touch()
    assert exit_code("sweep.yaml") == 0
    assert order() == ["one 0", "one 0", "one 1", "two 0", "two 1"]


@pytest.mark.parametrize("change", ["config", "command"])
def test_finished_run_with_other_settings_is_not_taken_for_this_one(write, change, capsys):
    write({"one": ONE})
    assert exit_code("sweep.yaml") == 0
    write({"one": {**ONE, "share": 0.75}} if change == "config" else {"one": ONE},
          command=COMMAND + (" more" if change == "command" else ""))  # fmt: skip
    with pytest.raises(
        CaMOPDError, match=r"(?s)seed-0' holds a run with another .* then\n .* now\nGive the sweep another output_dir"
    ):
        cli.main(["--debug", "sweep", "sweep.yaml"])
    assert len(order()) == 2


def test_finished_run_of_another_file_in_the_command_is_not_taken_for_this_one(write):
    """As that of `camopd train run.yaml --method {config}`, which all runs share."""
    Path("base.yaml").write_text("steps: 1")
    write({"one": ONE}, command=f"{COMMAND} base.yaml")
    assert exit_code("sweep.yaml") == exit_code("sweep.yaml") == 0
    Path("base.yaml").write_text("steps: 2")
    with pytest.raises(CaMOPDError, match=r"seed-0' holds a run with another content of base\.yaml"):
        cli.main(["--debug", "sweep", "sweep.yaml"])


def test_mark_that_cannot_be_read_is_an_error_with_the_way_out(write):
    write({"one": ONE})
    Path("out/one/seed-0").mkdir(parents=True)
    Path("out/one/seed-0", MARK).write_text("{")
    with pytest.raises(CaMOPDError, match=r"sweep\.json' cannot be read\. Delete it, and the run is done again"):
        cli.main(["--debug", "sweep", "sweep.yaml"])


def test_print_gives_a_command_for_each_run_that_is_to_be_done(write, capsys, monkeypatch):
    write({"one": ONE, "two": {**TWO, "fail": 1}})
    exit_code("sweep.yaml")
    Path("fixed").touch()
    capsys.readouterr()
    assert exit_code("sweep.yaml", "--print") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("sweep sweep.yaml --only two/seed-1")
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parent.parent)}
    subprocess.run(line, shell=True, cwd="/", check=True, env=environment, capture_output=True)
    assert order()[4:] == ["two 1"]
    assert exit_code("sweep.yaml", "--print") == 0
    assert capsys.readouterr().out == ""


def test_option_only_names_a_run_of_the_sweep(write):
    write({"one": ONE})
    with pytest.raises(
        ValueError, match=r"--only 'one/seed-7' is not a run of 'sweep\.yaml'; there are \['one/seed-0', 'one/s"
    ):
        cli.main(["--debug", "sweep", "sweep.yaml", "--only", "one/seed-7"])


def test_run_that_was_stopped_before_its_first_checkpoint_starts_in_its_used_folder(write):
    write({"one": ONE}, seeds=[0], command=f"{COMMAND} {{resume}}")
    Path("out/one/seed-0").mkdir(parents=True)
    Path("out/one/seed-0/metrics.jsonl").write_text("")
    assert exit_code("sweep.yaml") == 0
    assert order() == ["one 0 --resume_from_checkpoint auto"]


# --- results -----------------------------------------------------------------------------------------------------


def test_table_has_means_and_spreads_over_seeds(write, capsys):
    columns = ["gap/general/abs_mean", "gap/general/abs_mean@2", "share", "inner.x", "step_time@3"]
    write({"one": ONE, "two": TWO}, columns=columns)
    assert exit_code("sweep.yaml") == 0
    runs = pd.read_csv("out/runs.csv")
    # last value; mean of the last two; share + seed; seed
    assert runs.to_dict("list") == {
        "config": ["one", "one", "two", "two"], "seed": [0, 1, 0, 1], "gap/general/abs_mean": [3, 3, 4, 4],
        "gap/general/abs_mean@2": [2, 2, 3, 3], "share": [0.5, 1.5, 0.25, 1.25], "inner.x": [0, 1, 0, 1],
        "step_time@3": [0, 1, 0, 1],
    }  # fmt: skip
    means = pd.read_csv("out/results.csv")
    assert list(means["share mean"]) == [1.0, 0.75]
    # 0.5 and 1.5: sqrt((0.25 + 0.25) / 1)
    assert list(means["share sd"]) == pytest.approx([0.5**0.5] * 2)
    row = "| one | 2 | 3 ± 0 | 2 ± 0 | 1 ± 0.71 | 0.5 ± 0.71 | 0.5 ± 0.71 |"
    assert row in Path("out/results.md").read_text()
    assert row in capsys.readouterr().out
    assert Path("out/results.png").read_bytes().startswith(b"\x89PNG")


def test_table_without_columns_shows_the_gaps_and_the_numbers_of_the_result(write):
    write({"one": ONE}, seeds=[4])
    assert exit_code("sweep.yaml") == 0
    frame = pd.read_csv("out/results.csv")
    assert list(frame.columns) == [
        "config", "seeds", *(f"gap/general/abs_mean@5 {what}" for what in ("mean", "sd", "n")),
        *(f"share {what}" for what in ("mean", "sd", "n")),
    ]  # fmt: skip
    assert frame["gap/general/abs_mean@5 mean"][0] == pytest.approx(13 / 3)  # all three there are
    assert frame["share sd"].isna().all()  # one seed has no spread
    assert "| one | 1 | 4.333 | 4.5 |" in Path("out/results.md").read_text()


def test_table_says_of_how_many_seeds_a_number_is(write, capsys):
    sweep = read_sweep(write({"one": ONE}, seeds=[0, 1, 2], columns=["share", "other"]))
    assert exit_code("sweep.yaml") == 0
    Path("out/one/seed-1/result.json").write_text('{"share": null}')
    capsys.readouterr()
    assert exit_code("sweep.yaml") == 0
    # 0.5 and 2.5
    assert "| one | 3 | 1.5 ± 1.4 (2 of 3) | - |" in capsys.readouterr().out
    means = table(sweep, results(sweep)[0])
    assert means[["seeds", "share n", "other n"]].to_numpy().tolist() == [[3, 2, 0]]


def test_column_with_the_last_values_of_a_single_number_is_named(write, capsys):
    write({"one": ONE}, columns=["share@3", "inner.x@2"])
    assert exit_code("sweep.yaml") == 0
    said = capsys.readouterr().out
    assert "no run has the column 'share@3'. 'share' is one number of result.json: leave @3 out." in said
    assert "no run has the column 'inner.x@2'. 'inner.x' is one number of result.json: leave @2 out." in said
    assert "| one | 2 | - | - |" in said


def test_column_that_no_run_has_is_named_with_what_may_be_meant(write, capsys):
    write({"one": ONE}, columns=["gap/genral/abs_mean@3", "share"])
    assert exit_code("sweep.yaml") == 0
    said = capsys.readouterr().out
    assert "no run has the column 'gap/genral/abs_mean@3'. Did you mean 'gap/general/abs_mean'?" in said
    assert "| one | 2 | - | 1 ± 0.71 |" in said


def test_metrics_that_cannot_be_read_leave_the_other_runs_in_the_table(write, capsys):
    write({"one": ONE})
    assert exit_code("sweep.yaml") == 0
    Path("out/one/seed-0/metrics.jsonl").write_text("")
    assert exit_code("sweep.yaml") == 0
    said = capsys.readouterr().out
    assert re.search(r"one/seed-0 is not in the table: .* has no steps", said)
    assert "| one | 1 of 2 |" in said


def test_metrics_below_the_folder_of_a_run_are_found_when_there_is_one_file(write):
    sweep = read_sweep(write({"one": ONE}, seeds=[0], columns=["gap/general/abs_mean"]))
    assert exit_code("sweep.yaml") == 0
    below = Path("out/one/seed-0/seed-0/recovered")  # where the demo puts it
    below.mkdir(parents=True)
    Path("out/one/seed-0/metrics.jsonl").rename(below / "metrics.jsonl")
    frame, notes = results(sweep)
    assert (list(frame["gap/general/abs_mean"]), notes) == ([3.0], [])
    assert list(table(sweep, frame)["gap/general/abs_mean mean"]) == [3.0]


def test_results_are_json_numbers_only(write):
    write({"one": ONE}, seeds=[0], columns=["text", "inner", "share"])
    assert exit_code("sweep.yaml") == 0
    frame = pd.read_csv("out/results.csv")
    assert frame["text mean"].isna().all() and frame["inner mean"].isna().all()
    assert json.loads(Path("out/one/seed-0", MARK).read_text())["seconds"] >= 0


def test_sweep_may_be_named_with_config(tmp_path, capsys):
    for words in (["no.yaml"], ["--config", "no.yaml"], ["--print", "--config=no.yaml"]):
        with pytest.raises(SystemExit):
            cli.main(["sweep", *words])
        assert "'no.yaml' cannot be read" in capsys.readouterr().err
