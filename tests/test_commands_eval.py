"""`camopd eval` (camopd/commands/eval.py), with a script in evalscope's place; test_eval_runner.py has the real one."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fake_openai import serving
from trainers import refused

from camopd import cli
from camopd.eval import jobs
from camopd.teachers.vllm.plan import VLLM


# Asks the server of its job for each row, as the runner does, and fails as `fail` in the environment says.
ENGINE = """#!{python}
import json, os, sys, urllib.request
job_file, result = sys.argv[2:]
job = json.load(open(job_file, encoding="utf-8"))
predictions = os.path.join(job["work"], "predictions")
os.makedirs(predictions, exist_ok=True)
rows = [json.loads(line) for line in open(os.path.join(job["dataset_args"]["local_path"], "default_val.jsonl"))]
found = []
for item, row in enumerate(rows):
    if os.environ.get("FAIL") and item == 2:
        sys.exit("ValueError: the server is gone")
    body = json.dumps(dict(model=job["model"], messages=[dict(role="user", content=row["question"])])).encode()
    with urllib.request.urlopen(urllib.request.Request(job["url"] + "/chat/completions", body)) as reply:
        text = json.load(reply)["choices"][0]["message"]["content"]
    prompt = row["question"] + " is one of A,B"
    found.append(dict(item=item, repeat=0, prompt=prompt, gold=row["answer"], text=text, stop="stop", scores={{}}))
    with open(os.path.join(predictions, "p.jsonl"), "a") as file:
        file.write("{{}}\\n")
with open(result, "w") as file:
    file.writelines(json.dumps(row) + "\\n" for row in found)
"""


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder with rows of two tasks of letters, and the engine."""
    engine = tmp_path / "python"
    engine.write_text(ENGINE.format(python=sys.executable), encoding="utf-8")
    engine.chmod(0o755)
    monkeypatch.setenv("CAMOPD_EVAL_PYTHON", str(engine))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "eval-data"
    folder.mkdir()
    for name in ("qasc", "medqa"):
        rows = [{"question": f"{name} {n}", "options": {"A": "x", "B": "y"}, "answer": "AB"[n % 2]} for n in range(40)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def error_of(capsys, *words):
    return refused(capsys, "eval", *words)


def test_three_models_make_a_table_that_says_what_came_back_and_what_broke(data, tmp_path, capsys):
    always_a, right = (lambda body: "A"), (lambda body: "AB"[int(body["messages"][0]["content"].split()[1]) % 2])
    mostly = lambda body: "A" if body["messages"][0]["content"] == "qasc 1" else right(body)  # noqa: E731
    with serving(always_a) as start, serving(right) as general, serving(mostly) as result:
        models = [f"start={start.url}", f"general={general.url}", f"result={result.url}", "--paper", "medical"]
        cli.main(["eval", "--tasks", "qasc,medqa", "--models", *models])
        asked = len(start.requests)
        said = capsys.readouterr().out
        cli.main(["eval", "--tasks", "qasc,medqa", "--models", *models])  # finished: nothing is asked again
        assert asked == len(start.requests) == 80
    assert "- **qasc** (general): better. +47.5 [" in said and "19 of 40 items came back, 0 broke." in said
    assert "| qasc | 50.0 ± 16.2 | 100.0 (from 91.2) | 97.5 ± 5.1 | 40 of 926 | 0% / 0% / 0% | 0% / 0% / 0% |" in said
    assert "back 95 % [" in said
    assert "| MedQA USMLE | 79.03 | 86.17 | 86.02 | 85.78 | 100.00* | 50.00* | 100.00* |" in said
    assert capsys.readouterr().out.endswith(said[said.index("- **qasc**") :])
    kept = json.loads(Path("eval-output/eval.json").read_text(encoding="utf-8"))
    assert [row["task"] for row in kept["tasks"]] == ["qasc", "medqa"]
    assert Path("eval-output/start/qasc/answers.jsonl").is_file() and Path("eval-output/eval.html").is_file()


def test_failed_task_keeps_what_is_done_and_the_next_call_goes_on(data, capsys, monkeypatch):
    with serving(lambda body: "A") as server:
        words = ["--tasks", "qasc", "--models", f"m={server.url}", "--limit", "5"]
        monkeypatch.setenv("FAIL", "1")
        said = error_of(capsys, *words)
        assert "has 2 of 5 answers, and then failed: ValueError: the server is gone" in said
        assert "The same command goes on from there" in " ".join(said.split())
        monkeypatch.delenv("FAIL")
        cli.main(["eval", *words])
        assert "| qasc | " in capsys.readouterr().out


def test_other_model_behind_the_same_name_is_refused(data, capsys):
    with serving(lambda body: "A") as server:
        cli.main(["eval", "--tasks", "qasc", "--models", f"m={server.url}"])
    capsys.readouterr()
    with serving(lambda body: "B", model="other") as server:
        said = error_of(capsys, "--tasks", "qasc", "--models", f"m={server.url}")
        assert 'another model: model was "tiny" and is "other"' in said and not server.requests


def test_limit_of_the_server_that_an_error_names_can_be_followed(data, capsys, monkeypatch):
    """No answer was made with the first one."""
    with serving(lambda body: "A") as server:
        words = ["--tasks", "qasc", "--models", f"m={server.url}", "--limit", "5", "--max-tokens"]
        monkeypatch.setenv("CAMOPD_EVAL_PYTHON", "false")
        assert "has 0 of 5 answers, and then failed" in error_of(capsys, *words, "9000")
        monkeypatch.setenv("CAMOPD_EVAL_PYTHON", str(data.parent / "python"))
        cli.main(["eval", *words, "8000"])
        assert '"max_tokens": 8000' in Path("eval-output/eval.json").read_text(encoding="utf-8")
        assert "another generation" in error_of(capsys, *words, "7000")


def test_answers_of_weights_that_cannot_be_seen_are_taken_with_a_word(data, capsys):
    with serving(lambda body: "A") as server:
        words = ["eval", "--tasks", "qasc,medqa", "--limit", "5", "--models", f"m={server.url}"]
        cli.main(words)
        assert "earlier call" not in capsys.readouterr().out
        cli.main(words)
        said = (
            f"qasc, medqa: with answers of an earlier call. Whether {server.url.removesuffix('/v1')} still has those"
        )
        assert said in capsys.readouterr().out


def test_key_that_a_server_repeats_is_in_no_file_and_not_shown(data, capsys, monkeypatch):
    monkeypatch.setenv("CAMOPD_EVAL_API_KEY", "a-secret")
    engine = data.parent / "python"
    engine.write_text(f"#!{sys.executable}\nraise ValueError('401: no Bearer a-secret')\n", encoding="utf-8")
    with serving(lambda body: "A") as server:
        said = error_of(capsys, "--tasks", "qasc", "--models", f"m={server.url}")
    assert "ValueError: 401: no Bearer ***" in said and "secret" not in said
    for path in Path("eval-output").rglob("*"):
        assert path.is_dir() or b"secret" not in path.read_bytes(), path


def test_model_that_a_run_does_not_have_is_named_beside_it(data, capsys, tmp_path):
    with serving(lambda body: "A") as server:
        (tmp_path / "run.yaml").write_text(
            f"model_name_or_path: {server.url}\noutput_dir: nowhere\nteachers: {{general: adapter_off}}\n",
            encoding="utf-8",
        )
        words = ["run.yaml", "--tasks", "qasc", "--limit", "5"]
        assert "Name it with --models general=" in error_of(capsys, *words)
        words += ["--models", f"general={server.url}"]
        assert "Name it with --models result=" in error_of(capsys, *words)
        cli.main(["eval", *words, f"result={server.url}"])
    assert "| task | start | general | result |" in capsys.readouterr().out


def test_env_of_a_run_is_set_before_any_model_is_looked_for(data, capsys, tmp_path, monkeypatch):
    """The Hub's client, which is asked whether it has a model, reads HF_ENDPOINT and HF_HUB_OFFLINE at its import."""
    monkeypatch.setenv("SOME_VARIABLE", "before")
    found = []

    def missing(name):
        found.append((name, os.environ["SOME_VARIABLE"]))
        return True

    monkeypatch.setattr("camopd.eval.models.names_missing_model", missing)
    (tmp_path / "run.yaml").write_text("env: {SOME_VARIABLE: of the run}\n", encoding="utf-8")
    assert "there is no such path" in error_of(capsys, "run.yaml", "--tasks", "qasc", "--models", "m=word")
    assert found == [("word", "of the run")]


@pytest.mark.parametrize(
    ("words", "needs"),
    [
        ([], "36864 tokens, 32768 of an answer and 4096 of prompt"),
        (["--max-tokens", "4097"], "8193 tokens, 4097 of an answer and 4096 of prompt"),
        (["--context", "8193"], "8193 tokens, as --context says"),
    ],
)
def test_context_beyond_a_models_positions_is_refused_before_anything_starts(data, capsys, monkeypatch, words, needs):
    (data.parent / "m").mkdir()
    (data.parent / "m" / "config.json").write_text('{"max_position_embeddings": 8192}', encoding="utf-8")
    monkeypatch.setattr("camopd.commands.serve.find_vllm", lambda asked: pytest.fail("vLLM is looked for"))
    said = " ".join(error_of(capsys, "--tasks", "qasc", "--models", "small=./m", *words).split())
    assert f"the model 'small', ./m, needs a context of {needs}, and the model has 8192 positions" in said
    assert "here --max-tokens 4096 --context 8192 is the longest that fits" in said
    assert not Path("eval-output").exists()


def test_model_whose_answers_are_all_there_needs_no_server(data, capsys, monkeypatch):
    (data.parent / "m").mkdir()
    (data.parent / "m" / "config.json").write_text('{"max_position_embeddings": 4096}', encoding="utf-8")
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    contexts = []
    with serving(lambda body: "A") as server:

        @contextlib.contextmanager
        def served(model, context, *others):
            contexts.append(context)
            yield server.url.removesuffix("/v1")

        monkeypatch.setattr("camopd.commands.serve.find_vllm", lambda asked: VLLM("python", "0", cpu=True))
        monkeypatch.setattr("camopd.commands.eval_server.served", served)
        words = ["--models", "m=./m", "--limit", "5", "--context", "8192"]
        cli.main(["eval", "--tasks", "qasc", *words])
        cli.main(["eval", "--tasks", "qasc,medqa", *words])
        assert contexts == [8192, 8192] and len(server.requests) == 10
        monkeypatch.delenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN")
        monkeypatch.setattr("camopd.commands.serve.find_vllm", lambda asked: pytest.fail("vLLM is looked for"))
        cli.main(["eval", "--tasks", "qasc,medqa", *words])  # the same command, its --context included
        assert "needs a context of 8192" in error_of(
            capsys, "--tasks", "qasc,mmlu", "--data", "mmlu=eval-data/qasc.jsonl", *words
        )
    assert len(contexts) == 2


def test_judged_task_asks_its_own_judge_and_shows_what_it_could_not_say(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CAMOPD_JUDGE_API_KEY", "secret")
    engine = tmp_path / "python"
    engine.write_text(engine.read_text(encoding="utf-8").replace("default_val", "train").replace('"question"', '"problem"'),
                      encoding="utf-8")  # fmt: skip
    rows = "".join(json.dumps({"problem": f"hmmt {n}", "answer": str(n)}) + "\n" for n in range(6))
    (data / "hmmt25.jsonl").write_text(rows, encoding="utf-8")
    verdict = "<extracted_answer>{}</extracted_answer><decision>{}</decision>"

    def judge(body):
        number = int(body["messages"][0]["content"].partition("hmmt ")[2][0])
        return 400 if number == 5 else verdict.format(number, "yes" if number < 3 else "no")

    with serving(lambda body: "so it is") as model, serving(judge, model="judge") as judging:
        words = ["--tasks", "hmmt25", "--models", f"m={model.url}", "--judge", f"hmmt25={judging.url}#judge"]
        cli.main(["eval", *words])
        asked = len(judging.requests)
        cli.main(["eval", *words])  # only the one that failed is asked for again
        assert len(judging.requests) == asked + 1 == 7
    assert set(judging.keys) == {"Bearer secret"} and "Bearer secret" not in model.keys
    said = capsys.readouterr().out
    assert "| hmmt25 | 60.0 ± 68.0 | 5 of 30 | 0% | 0% | 17% |" in said
    kept = Path("eval-output/eval.json").read_text(encoding="utf-8")
    assert json.loads(kept)["about"]["judges"] == {"hmmt25": f"{judging.url.removesuffix('/v1')}#judge"}
    for path in Path("eval-output").rglob("*"):
        assert path.is_dir() or b"secret" not in path.read_bytes(), path


def test_ctrl_c_ends_judging_at_once_and_is_said_once(data, tmp_path, capsys):
    engine = tmp_path / "python"
    engine.write_text(engine.read_text(encoding="utf-8").replace("default_val", "train").replace('"question"', '"problem"'),
                      encoding="utf-8")  # fmt: skip
    rows = "".join(json.dumps({"problem": f"hmmt {n}", "answer": str(n)}) + "\n" for n in range(9))
    (data / "hmmt25.jsonl").write_text(rows, encoding="utf-8")
    go_on = threading.Event()

    def judge(body):
        if len(judging.requests) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        if len(judging.requests) > 1:
            go_on.wait(30)
        return "<extracted_answer>1</extracted_answer><decision>yes</decision>"

    with serving(lambda body: "so it is") as model, serving(judge, model="judge") as judging:
        words = ["--tasks", "hmmt25", "--models", f"m={model.url}", "--judge", judging.url, "--concurrency", "3"]
        started = time.monotonic()
        with pytest.raises(SystemExit) as stopped:
            cli.main(["eval", *words])
        assert stopped.value.code == 130 and len(judging.requests) == 4 and time.monotonic() - started < 25
        go_on.set()
    assert capsys.readouterr().out.count("Stopped.") == 1
    assert Path("eval-output/m/hmmt25/verdicts.jsonl").read_text(encoding="utf-8").count("\n") == 1  # that is finished


def test_second_command_on_a_folder_is_refused_before_it_changes_anything(data, tmp_path, capsys):
    go_on = threading.Event()

    def wait(body):
        go_on.wait(60)
        return "A"

    with serving(wait) as server:
        words = ["eval", "--tasks", "qasc", "--models", f"m={server.url}"]
        child = subprocess.Popen([sys.executable, "-m", "camopd.cli", *words], stdout=subprocess.DEVNULL)
        while not server.requests:
            time.sleep(0.05)
            assert child.poll() is None
        job, lock = (Path("eval-output/m/qasc") / name for name in (jobs.JOB, jobs.LOCK))
        before = job.read_bytes()
        with pytest.raises(SystemExit):
            cli.main([*words, "--limit", "1"])
        said = capsys.readouterr().err
        worker, host = lock.read_text().split()
        assert f"process {worker} on {host} is at work in 'eval-output/m/qasc'" in said and int(worker) != child.pid
        assert job.read_bytes() == before
        go_on.set()
        assert child.wait(60) == 0


def test_ctrl_c_keeps_finished_answers_and_is_exit_130(data, tmp_path):
    def slowly(body):
        time.sleep(0.1)
        return "A"

    with serving(slowly) as server:
        words = [sys.executable, "-m", "camopd.cli", "eval", "--tasks", "qasc", "--models", f"m={server.url}"]
        child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        while len(server.requests) < 5:
            time.sleep(0.05)
            assert child.poll() is None
        child.send_signal(signal.SIGINT)
        said, _ = child.communicate(timeout=60)
        asked = len(server.requests)
        time.sleep(0.5)
        assert len(server.requests) == asked < 40  # the engine is gone, too
    assert child.returncode == 130
    assert "Stopped. Finished answers are kept: run the same command again." in said and "Traceback" not in said
    assert not Path("eval-output/m/qasc/answers.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tasks", "medqs", "--models", "m=x"], "there is no task 'medqs'. Did you mean 'medqa'?"),
        (["--tasks", "medqa"], "there is no model to evaluate"),
        (["--tasks", "medqa", "--models", "m=http://127.0.0.1:9"], "'m' has the address http://127.0.0.1:9"),
        (["--tasks", "medqa", "--models", "m=./nowhere"], "there is no such path"),
        (["--tasks", "medqa", "--models", "m=recoverd"], "no such path. Did you mean 'recovered'?"),
        (["--tasks", "medqa", "--models", "m=x", "--data", "a", "b"], "--data takes one folder, got a, b"),
        (["--tasks", "medqa", "--models", "m=x", "--data", "medqs=a"], "no task 'medqs'"),
        (
            ["--tasks", "medqa", "--models", "m=http://127.0.0.1:9", "--data", "medqa=a"],
            "no file 'a' for the task medqa",
        ),
        (["--tasks", "medqa", "--models", "m=x", "--limit", "0"], "--limit must be at least 1, got 0"),
        (
            ["--tasks", "gpqa", "--models", "m=http://127.0.0.1:9"],
            "judged by a model, in the paper by Qwen2.5-14B-Instruct",
        ),
        (
            ["--tasks", "gpqa", "--models", "m=http://127.0.0.1:9", "--judge", "http://127.0.0.1:9"],
            "the model 'gpqa' has the address http://127.0.0.1:9",
        ),
        (
            ["--tasks", "gpqa", "--models", "m=http://127.0.0.1:9", "--judge", "gpqa=x"],
            "--judge takes the URL of a server",
        ),
        (
            ["--tasks", "medqa", "--models", "m=x", "--judge", "http://h:1"],
            "--judge http://h:1, as none of medqa is judged",
        ),
        (["--tasks", "medqa", "--models", "m=x", "m=y"], "--models names 'm' twice, as x and as y"),
        (["run.yaml", "--tasks", "medqa"], "the config 'run.yaml' cannot be read"),
    ],
)
def test_mistakes_are_named_before_anything_is_asked(data, words, said, capsys, monkeypatch):
    Path("recovered").mkdir()
    Path("recovered/config.json").write_text("{}")
    monkeypatch.setenv("CAMOPD_VLLM_PYTHON", sys.executable)
    monkeypatch.setattr("camopd.commands.serve.find_vllm", lambda asked: None)
    assert said in error_of(capsys, *words)


def test_missing_matplotlib_is_said_before_anything_is_asked(data):
    code = "import sys; sys.modules['matplotlib'] = None; from camopd.cli import main; main(sys.argv[1:])"
    with serving(lambda body: "A") as server:
        words = ["eval", "--tasks", "qasc", "--models", f"m={server.url}"]
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "figures need 'matplotlib" in done.stderr and "[report]" in done.stderr
    assert not server.requests


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from camopd.cli import main\n"
        "try: main(['eval', '--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'trl', 'datasets', 'matplotlib', 'evalscope'} & set(sys.modules)))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--concurrency" in said and said.splitlines()[-1] == "[]"


def test_answers_are_judged_by_one_command_at_a_time(data, tmp_path, capsys, monkeypatch):
    rows = json.dumps({"problem": "hmmt 1", "answer": "1"}) + "\n"
    (data / "hmmt25.jsonl").write_text(rows, encoding="utf-8")
    monkeypatch.setattr("camopd.commands.eval.jobs.finished", lambda folder: True)
    with serving(lambda body: "1") as model, serving(lambda body: "x", model="judge") as judging:
        words = ["--tasks", "hmmt25", "--models", f"m={model.url}", "--judge", judging.url]
        with jobs.alone(Path("eval-output/m/hmmt25")):
            assert "is at work in 'eval-output/m/hmmt25'" in error_of(capsys, *words)
    assert not judging.requests
