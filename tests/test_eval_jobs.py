"""Folders of jobs: what continues, and what is refused (camopd/eval/jobs.py)."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from camopd.errors import CaMOPDError
from camopd.eval import jobs
from camopd.eval.tasks import TASKS


MEDQA = TASKS["medqa"]
ROWS = [{"question": "1?", "A": "x", "B": "y", "answer": "A"}]


def make(folder, max_tokens=None, rows=ROWS, weights=None, served="m", concurrency=4):
    job = jobs.job_of(MEDQA, folder, served, 4096, max_tokens, concurrency)
    jobs.prepare(MEDQA, job, weights, rows, folder)
    return json.loads((folder / "job.json").read_text(encoding="utf-8"))


def answer(folder, name="work/predictions/model/general_mcq_default.jsonl"):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("{}\n", encoding="utf-8")


def test_job_leaves_nothing_to_a_default(tmp_path):
    job = make(tmp_path)
    assert job["dataset_args"]["few_shot_num"] == 0 and job["dataset_args"]["subset_list"] == ["default"]
    sampling = {
        "temperature",
        "top_p",
        "top_k",
        "repetition_penalty",
        "frequency_penalty",
        "presence_penalty",
        "max_tokens",
    }
    assert sampling < set(job["generation"]) and job["generation"]["extra_body"] == {"min_p": 0.0}
    assert make(tmp_path / "short", max_tokens=5)["generation"]["max_tokens"] == 5
    assert (tmp_path / "rows" / "default_val.jsonl").is_file()  # a copy of its own


def test_jobs_of_two_models_share_no_folder(tmp_path):
    folders = [make(tmp_path / name / "medqa")["work"] for name in ("start", "result")]
    assert len(set(folders)) == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"max_tokens": 5}, "another generation: generation was"),
        ({"rows": [*ROWS, *ROWS]}, "another rows"),
        ({"weights": "other"}, "another weights: weights was null and is"),
        ({"served": "other"}, 'another model: model was "m" and is "other"'),
    ],
)
def test_folder_with_answers_of_another_job_is_refused(tmp_path, change, said):
    make(tmp_path)
    answer(tmp_path)
    with pytest.raises(
        CaMOPDError, match=rf"has answers that were made with {said}.*Give another --out, or remove the folder"
    ):
        make(tmp_path, **change)


@pytest.mark.parametrize(
    "name", ["answers.jsonl", "work/verdicts.jsonl", "work/predictions/model/general_mcq_default.jsonl"]
)
def test_job_without_answers_may_change_and_one_with_any_may_not(tmp_path, name):
    """As the error asks for that a prompt leaves an answer no room."""
    make(tmp_path, max_tokens=9)
    answer(tmp_path, "work/configs/task_config.yaml")
    job = make(tmp_path, max_tokens=5)
    assert job["generation"]["max_tokens"] == job["told"]["generation"]["max_tokens"] == 5
    assert not (tmp_path / "work").exists()  # whose settings were those of 9
    answer(tmp_path, name)
    assert make(tmp_path, max_tokens=5) == job and (tmp_path / name).is_file()
    with pytest.raises(CaMOPDError, match="has answers that were made with another generation"):
        make(tmp_path, max_tokens=9)


def test_scenes_that_have_all_failed_are_no_answers(tmp_path):
    make(tmp_path, max_tokens=9)
    answer(tmp_path, "work/verdicts.jsonl")
    (tmp_path / "work" / "verdicts.jsonl").write_text('{"item": 1, "failed": "HTTP 400: context"}\n', encoding="utf-8")
    assert make(tmp_path, max_tokens=5)["generation"]["max_tokens"] == 5


def test_job_goes_on_elsewhere_and_faster(tmp_path):
    make(tmp_path)
    jobs.set_url(tmp_path, "http://localhost:1/")
    assert make(tmp_path, concurrency=64)["concurrency"] == 64
    jobs.set_url(tmp_path, "http://localhost:2/")
    assert json.loads((tmp_path / "job.json").read_text(encoding="utf-8"))["url"] == "http://localhost:2/v1"


def test_weights_are_told_apart_by_their_files(tmp_path):
    assert jobs.weights_of(tmp_path / "nowhere") is None
    (tmp_path / "model.safetensors").write_bytes(b"1")
    first = jobs.weights_of(tmp_path)
    assert jobs.weights_of(tmp_path) == first
    (tmp_path / "model.safetensors").write_bytes(b"12")
    assert jobs.weights_of(tmp_path) != first


def test_failure_names_what_is_done_and_the_error(tmp_path):
    predictions = tmp_path / "work" / "predictions" / "model"
    predictions.mkdir(parents=True)
    (predictions / "general_mcq_default.jsonl").write_text("{}\n{}\n{", encoding="utf-8")
    log = "Traceback\n  x\nValueError: the longest prompt has 9 tokens\n2026 - INFO: bye\n"
    (tmp_path / "log.txt").write_text(log, encoding="utf-8")
    assert jobs.answered(tmp_path) == 2
    error = str(jobs.failed(tmp_path, 5))
    assert "has 2 of 5 answers, and then failed: ValueError: the longest prompt has 9 tokens\n" in error
    (tmp_path / "log.txt").write_text("", encoding="utf-8")
    assert "it said nothing" in str(jobs.failed(tmp_path, 5))


def test_environment_of_a_job_holds_no_key_but_its_own(monkeypatch):
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "CAMOPD_TEACHER_API_KEY_GENERAL", "AWS_SECRET", jobs.KEY):
        monkeypatch.setenv(name, "secret")
    found = jobs.environment()
    assert [name for name, value in found.items() if value == "secret"] == [jobs.KEY]
    assert "PATH" in found
    kept = jobs.environment(*jobs.HUB_TOKENS)  # of a model that is loaded, which may be behind a gate
    assert {name for name, value in kept.items() if value == "secret"} == {jobs.KEY, "HF_TOKEN"}


def test_key_that_a_server_has_repeated_is_taken_out_of_what_a_job_has_said(tmp_path, monkeypatch):
    monkeypatch.setenv(jobs.KEY, "secret\n")
    logs = [tmp_path / "log.txt", tmp_path / "work" / "logs" / "eval_log.log"]
    logs[1].parent.mkdir(parents=True)
    for path in logs:
        path.write_bytes(b"a \xff\nError code: 401 - no 'Bearer secret'\n")
    jobs.hide_key(tmp_path)
    assert {path.read_bytes() for path in logs} == {b"a \xff\nError code: 401 - no 'Bearer ***'\n"}
    monkeypatch.delenv(jobs.KEY)
    jobs.hide_key(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "name", ["work/predictions/model/x_default.jsonl", "work/data/live_bench/c/t/model_answer/m.jsonl"]
)
def test_key_is_taken_out_of_the_errors_of_answers_and_of_nothing_that_a_model_has_written(
    tmp_path, monkeypatch, name
):
    key = 'turns"\\'  # a word of a file of answers, with characters that JSON writes in another way
    monkeypatch.setenv(jobs.KEY, key)
    told = {"error_msg": f"401: {key}", "api": {"Error": [{"headers": {"Authorization": f"Bearer {key}"}}, 401]}}
    answers = [
        {"turns": [f"my error: {key}"], "error": None},
        {"turns": ["$ERROR$"], "index": 1, "of": key, **told},
        {"turns": [f"\u2028 {key} error"], "tokens": 0.1},
    ]
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    kept = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
    path.write_text(kept + json.dumps(answers[1])[:-9], encoding="utf-8")  # and one that a kill has torn
    jobs.hide_key(tmp_path)
    lines = path.read_bytes().split(b"\n")
    hidden = {"error_msg": "401: ***", "api": {"Error": [{"headers": {"Authorization": "Bearer ***"}}, 401]}}
    assert json.loads(lines[1]) == answers[1] | hidden
    assert [lines[0], *lines[2:]] == [line for n, line in enumerate(kept.encode().split(b"\n")) if n != 1]
    jobs.hide_key(tmp_path)
    assert path.read_bytes().split(b"\n") == lines


@pytest.mark.parametrize("key", ["0", "EMPTY"])
def test_key_that_is_too_short_to_be_a_secret_changes_no_log_and_no_answer(tmp_path, monkeypatch, key):
    monkeypatch.setenv(jobs.KEY, key)
    answer(tmp_path)
    for path in (tmp_path / "log.txt", tmp_path / "work/predictions/model/general_mcq_default.jsonl"):
        path.write_text(json.dumps({"error": f"HTTP 500 after 10 seconds, {key}"}) + "\n", encoding="utf-8")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    jobs.hide_key(tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_disk_that_is_full_while_the_key_is_hidden_leaves_the_answers(tmp_path, monkeypatch):
    monkeypatch.setenv(jobs.KEY, "a-secret")
    answer(tmp_path)
    path = tmp_path / "work/predictions/model/general_mcq_default.jsonl"
    path.write_text(json.dumps({"error": "a-secret", "turns": ["x"]}) + "\n", encoding="utf-8")
    before = path.read_bytes()
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            jobs.hide_key(tmp_path)
    assert path.read_bytes() == before


def test_missing_environment_is_named_with_the_way_to_make_it(monkeypatch):
    monkeypatch.setenv("CAMOPD_EVAL_PYTHON", "/nowhere/python")
    with pytest.raises(
        CaMOPDError, match=r"no /nowhere/python, the environment that has evalscope\. `make \.venv-eval/installed`"
    ):
        jobs.python_of_evalscope()


def test_job_is_finished_by_all_of_its_answers_none_of_them_a_servers_failure(tmp_path):
    assert not jobs.finished(tmp_path)
    path = tmp_path / jobs.ANSWERS
    path.write_text(json.dumps({"text": 'says "text": null'}) + "\n", encoding="utf-8")
    assert jobs.finished(tmp_path)
    path.write_text(path.read_text(encoding="utf-8") + json.dumps({"text": None}) + "\n", encoding="utf-8")
    assert not jobs.finished(tmp_path)


def test_job_whose_process_outlives_its_command_cannot_be_begun_again(tmp_path):
    """The command holds the lock and its process inherits it; SIGKILL ends the first and not the second."""
    code = (
        "import os, subprocess, sys, time; from pathlib import Path; from camopd.eval import jobs\n"
        "with jobs.alone(Path(sys.argv[1])) as lock:\n"
        "    child = subprocess.Popen(['sleep', '60'], pass_fds=[lock], start_new_session=True)\n"
        "    jobs.note(lock, child.pid); print(child.pid, flush=True); time.sleep(60)"
    )
    command = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    worker = int(command.stdout.readline())
    command.kill()
    command.wait()
    said = rf"process {worker} on {socket.gethostname()} is at work in '{tmp_path}': .* \(`kill {worker}`\)"
    with pytest.raises(CaMOPDError, match=said), jobs.alone(tmp_path):
        pass
    os.kill(worker, signal.SIGTERM)
    deadline = time.monotonic() + 30
    while True:
        try:
            with jobs.alone(tmp_path):
                break
        except CaMOPDError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
