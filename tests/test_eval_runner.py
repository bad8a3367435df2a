"""The runner in evalscope's environment (camopd/eval/runner.py), and with `-m eval` the real evalscope."""

import ast
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from fake_openai import serving

from camopd.eval import jobs, rows, runner, scores
from camopd.eval.tasks import CODE_PROMPT, TASKS


real = pytest.mark.eval
QUESTIONS = [
    {"question": f"Which is {n}? " + "word " * n, "options": {"A": str(n), "B": "none", "C": "all"}, "answer": "A"}
    for n in range(24)
]
IFEVAL = [
    {"key": 1, "prompt": "Say hello twice. No commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    {"key": 2, "prompt": "Write one sentence.", "instruction_id_list": ["length_constraints:number_sentences"],
     "kwargs": [{"relation": "less than", "num_sentences": 2}]},
    {"key": 3, "prompt": "German!", "instruction_id_list": ["language:response_language"], "kwargs": [{"language": "de"}]},
]  # fmt: skip


def test_runner_imports_nothing_of_camopd_and_evalscope_only_when_it_runs():
    tree = ast.parse(Path(runner.__file__).read_text(encoding="utf-8"))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [getattr(node, "module", None) or node.names[0].name for node in found]
    assert not any(
        name.startswith("camopd") or getattr(node, "level", 0) for name, node in zip(names, found, strict=True)
    )
    at_top = [getattr(node, "module", None) or node.names[0].name for node in tree.body if node in found]
    assert not any(name.startswith("evalscope") for name in at_top) and any(
        name.startswith("evalscope") for name in names
    )


@pytest.mark.parametrize(
    ("before", "after"),
    [(b'{"a": 1}\n{"b"', b'{"a": 1}\n'), (b'{"a": 1}\n', b'{"a": 1}\n'), (b'{"a"', b""), (b"", b"")],
)
def test_line_that_a_kill_has_torn_is_taken_off(tmp_path, before, after):
    path = tmp_path / "p.jsonl"
    path.write_bytes(before)
    runner.cut_torn_line(path)
    assert path.read_bytes() == after


def save(folder, kind, found, subset="default"):
    path = folder / kind / "model" / f"general_mcq_{subset}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")


class Sample:
    """As evalscope has it."""

    def __init__(self, number):
        self.id, self.input, self.target, self.metadata = number, f"prompt {number // 2}", "A", {}


def folder_of_evalscope(folder, count=4, value=1.0):
    message = {"choices": [{"message": {"content": [{"type": "text", "text": "A"}]}, "stop_reason": "stop"}]}
    save(folder, "predictions", [{"index": n, "model_output": message} for n in range(count)])
    score = {"score": {"value": {} if value is None else {"accuracy": value}}}
    save(folder, "reviews", [{"index": n, "sample_score": score} for n in range(count)])


JOB = {"benchmark": "general_mcq", "repeats": 2, "metric": "accuracy"}


def test_answers_are_those_of_all_samples_each_once(tmp_path):
    folder_of_evalscope(tmp_path)
    found = runner.answers(tmp_path, JOB, [Sample(n) for n in range(4)])
    assert [(row["item"], row["repeat"], row["prompt"]) for row in found] == [
        (0, 0, "prompt 0"), (0, 1, "prompt 0"), (1, 0, "prompt 1"), (1, 1, "prompt 1"),
    ]  # fmt: skip
    assert {row["text"] for row in found} == {"A"} and {row["scores"]["accuracy"] for row in found} == {1.0}


@pytest.mark.parametrize(
    ("count", "said"), [(3, "answer 3 of 4 .* is missing"), (5, "has 5 answers .* and it has 4 rows")]
)
def test_answers_that_are_missing_or_too_many_are_refused(tmp_path, count, said):
    folder_of_evalscope(tmp_path, count)
    with pytest.raises(ValueError, match=said):
        runner.answers(tmp_path, JOB, [Sample(n) for n in range(4)])


def test_answer_whose_checker_failed_is_no_zero(tmp_path):
    folder_of_evalscope(tmp_path, value=None)
    with pytest.raises(
        ValueError, match=r"the checker of general_mcq gave answer 0 no accuracy: see .*llama-index-core"
    ):
        runner.answers(tmp_path, JOB, [Sample(n) for n in range(4)])


# --- with the real evalscope ------------------------------------------------------------------------------------------


def make(folder, name, found, url, max_tokens=20, context=4096, repeats=1):
    task = TASKS[name]
    source = folder / "source.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    source.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    job = jobs.job_of(task, folder, "tiny", context, max_tokens, 2) | {"repeats": repeats}
    job["generation"] |= {"retries": 1, "retry_interval": 0}
    jobs.prepare(task, job, None, rows.read(task, source, None), folder)
    jobs.set_url(folder, url.removesuffix("/v1"))
    return task


def words(folder):
    return jobs.words(os.path.abspath(os.environ.get("CAMOPD_EVAL_PYTHON", jobs.PYTHON)), folder)


def run(folder):
    return subprocess.run(
        words(folder), env=jobs.environment(), capture_output=True, text=True, timeout=300, check=False
    )


def items(task, folder):
    return scores.items_of(task, scores.read_answers(folder / jobs.ANSWERS))


@real
def test_letters_are_asked_without_examples_in_english_and_scored(tmp_path, monkeypatch):
    monkeypatch.setenv(jobs.KEY, "secret")
    with serving(
        lambda body: ("Final answer: A", "stop") if "Which is 3" in str(body) else ("Hm A", "length")
    ) as server:
        task = make(tmp_path, "medqa", QUESTIONS[:4], server.url, repeats=2)
        done = run(tmp_path)
        assert done.returncode == 0, done.stderr
        found = items(task, tmp_path)
        assert [(item.score, item.unparsed, item.truncated, item.repeats) for item in found] == [(0, 1, 1, 2)] * 3 + [
            (1, 0, 0, 2)
        ]
        body = server.requests[0]
    assert len(server.requests) == 8 and len(body["messages"]) == 1
    assert body["messages"][0]["content"].isascii() and "Here are some examples" not in body["messages"][0]["content"]
    sent = {"temperature": 0.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "max_tokens": 20}
    assert sent.items() <= body.items()
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"secret" not in path.read_bytes(), path


@real
def test_ifeval_has_its_checkers_without_a_download(tmp_path):
    with serving(lambda body: "Hallo Welt das ist ein schöner Tag. Hallo Welt.") as server:
        task = make(tmp_path, "ifeval", IFEVAL, server.url)
        done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    assert [item.score for item in items(task, tmp_path)] == [1, 0, 1]  # no comma; two sentences; German


@real
def test_code_is_asked_for_and_not_run_by_evalscope(tmp_path):
    marker = tmp_path / "ran"
    code = f"```python\nopen({str(marker)!r}, 'w')\n```"
    row = {"task_id": "HumanEval/0", "prompt": "def f():\n", "canonical_solution": "", "entry_point": "f",
           "test": "def check(f):\n    assert f() == 1\n"}  # fmt: skip
    with serving(lambda body: code) as server:
        make(tmp_path, "humaneval", [row], server.url)
        done = run(tmp_path)
        assert done.returncode == 0, done.stderr
        assert server.requests[0]["messages"] == [{"role": "user", "content": f"{CODE_PROMPT}\n\ndef f():\n"}]
    (found,) = scores.read_answers(tmp_path / jobs.ANSWERS)
    assert found["text"] == code and json.loads(found["gold"])["entry_point"] == "f" and not marker.exists()


@real
def test_prompt_too_long_is_refused_before_anything_is_generated(tmp_path):
    with serving(lambda body: "A", context=60) as server:
        make(tmp_path, "medqa", QUESTIONS, server.url, max_tokens=20, context=60)
        done = run(tmp_path)
        assert not server.requests
    assert done.returncode and "ValueError: the longest prompt has" in done.stderr
    assert "the server's context is 60. Serve the model with --max-model-len" in done.stderr


@real
def test_error_of_the_server_is_no_answer_and_finished_ones_are_kept(tmp_path):
    refused = [True]
    with serving(lambda body: 400 if refused[0] and "Which is 9?" in str(body) else "A") as server:
        task = make(tmp_path, "medqa", QUESTIONS, server.url, context=None)  # without the look at lengths
        done = run(tmp_path)
        assert done.returncode and not (tmp_path / jobs.ANSWERS).exists()
        assert "maximum context length" in done.stderr
        kept = jobs.answered(tmp_path)
        assert 1 <= kept < len(QUESTIONS)
        refused[0] = False
        before = len(server.requests)
        assert run(tmp_path).returncode == 0
        assert len(server.requests) - before == len(QUESTIONS) - kept
        assert [item.score for item in items(task, tmp_path)] == [1] * len(QUESTIONS)


@real
def test_killed_evaluation_goes_on_where_it_stopped(tmp_path):
    def answer(body):
        time.sleep(0.2)
        return "A"

    with serving(answer) as server:
        task = make(tmp_path, "medqa", QUESTIONS, server.url)
        child = subprocess.Popen(words(tmp_path), env=jobs.environment(), start_new_session=True,
                                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        while jobs.answered(tmp_path) < 5:
            time.sleep(0.05)
            assert child.poll() is None
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        (torn,) = (tmp_path / "work" / "predictions").rglob("*.jsonl")
        with open(torn, "ab") as file:
            file.write(b'{"index": 23, "mod')
        kept, before = jobs.answered(tmp_path), len(server.requests)
        assert run(tmp_path).returncode == 0
        assert len(server.requests) - before == len(QUESTIONS) - kept
    assert [item.score for item in items(task, tmp_path)] == [1] * len(QUESTIONS)
