"""The runner in evalscope's environment (camopd/eval/runner.py), and with `-m eval` the real evalscope."""

import ast
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_openai import Raw, serving

from camopd.eval import code, jobs, rows, runner, scores
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


class Prompt:
    """A sample whose message a server can count."""

    def __init__(self, text):
        self.input = [SimpleNamespace(role="user", content=text, text=text)]


def test_runner_leaves_the_names_of_libraries_to_libraries(tmp_path):
    """Here evalscope is a module that imports pdb, and that the names of this folder's files."""
    (tmp_path / "evalscope").mkdir()
    (tmp_path / "evalscope" / "__init__.py").write_text(
        "import pdb, code; raise SystemExit(f'{code.__file__} is Python\\'s')"
    )
    (tmp_path / "job.json").write_text(json.dumps({"work": str(tmp_path / "work")}))
    words = [sys.executable, runner.__file__, str(tmp_path / "job.json"), "x"]
    done = subprocess.run(
        words, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert "code.py is Python's" in done.stderr, done.stderr


def folder_of_evalscope(folder, count=4, value=1.0):
    message = {"choices": [{"message": {"content": [{"type": "text", "text": "A"}]}, "stop_reason": "stop"}]}
    save(folder, "predictions", [{"index": n, "model_output": message} for n in range(count)])
    score = {"score": {"value": {} if value is None else {"accuracy": value}}}
    save(folder, "reviews", [{"index": n, "sample_score": score} for n in range(count)])


JOB = {"benchmark": "general_mcq", "repeats": 2, "metric": "accuracy", "unscored_is_wrong": False}


def test_answers_are_those_of_all_samples_each_once(tmp_path):
    folder_of_evalscope(tmp_path)
    found = runner.answers(tmp_path, JOB, [Sample(n) for n in range(4)])
    assert [(row["item"], row["repeat"], row["prompt"]) for row in found] == [
        (0, 0, "prompt 0"), (0, 1, "prompt 0"), (1, 0, "prompt 1"), (1, 1, "prompt 1"),
    ]  # fmt: skip
    assert {row["text"] for row in found} == {"A"} and {row["scores"]["accuracy"] for row in found} == {1.0}


def test_answers_with_line_ends_of_unicode_are_as_many(tmp_path):
    """evalscope writes them as they are."""
    text = "a\u2028b\u2029c\x85d"
    folder_of_evalscope(tmp_path)
    for path in tmp_path.rglob("*.jsonl"):
        path.write_text(path.read_text(encoding="utf-8").replace('"A"', f'"{text}"'), encoding="utf-8")
    found = runner.answers(tmp_path, JOB, [Sample(n) for n in range(4)])
    assert [row["text"] for row in found] == [text] * 4
    path = tmp_path / jobs.ANSWERS
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found), encoding="utf-8")
    assert scores.read_answers(path) == found


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
    found = runner.answers(tmp_path, JOB | {"unscored_is_wrong": True}, [Sample(n) for n in range(4)])
    assert scores.score_of(TASKS["zebralogic"], found[0]) == (0.0, False)


@pytest.mark.parametrize("reply", [Raw(b"x" * 2000), Raw(b"x", headers={"Content-Encoding": "gzip"}),
                                   Raw(b"x" * 500, pause=0.02)])  # fmt: skip
def test_count_of_tokens_is_bounded_in_size_and_time_and_not_unpacked(monkeypatch, reply):
    monkeypatch.setattr(runner, "MOST", 1000)
    monkeypatch.setattr(runner, "SECONDS", 0.3)
    with serving(lambda body: "", listing=reply) as server, pytest.raises(ValueError, match="answers with more than"):
        runner.check_lengths([Prompt("a b")], {"url": server.url, "context": 9, "model": "m", "concurrency": 1})


def test_prompt_that_leaves_no_room_is_refused():
    job = {"context": 9, "model": "m", "concurrency": 1, "generation": {"max_tokens": 7}}
    with serving(lambda body: "", context=9) as server:
        runner.check_lengths([Prompt("a b")], job | {"url": server.url})
        with pytest.raises(ValueError, match=r"longest prompt has 3 tokens .* set --max-tokens to at most 6"):
            runner.check_lengths([Prompt("a b"), Prompt("a b c")], job | {"url": server.url})


# --- with the real evalscope ------------------------------------------------------------------------------------------


def make(folder, name, found, url, max_tokens=20, context=4096, repeats=None):
    task = TASKS[name]
    source = folder / "source.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    source.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    job = jobs.job_of(task, folder, "tiny", context, max_tokens, 2) | {"repeats": repeats or TASKS[name].repeats}
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


INSTRUCTIONS = {
    "change_case:capital_word_frequency": {"capital_relation": "at least", "capital_frequency": 2},
    "change_case:english_capital": {},
    "change_case:english_lowercase": {},
    "combination:repeat_prompt": {"prompt_to_repeat": "Say hello."},
    "combination:two_responses": {},
    "detectable_content:number_placeholders": {"num_placeholders": 2},
    "detectable_content:postscript": {"postscript_marker": "P.S."},
    "detectable_format:constrained_response": {},
    "detectable_format:json_format": {},
    "detectable_format:multiple_sections": {"section_spliter": "SECTION", "num_sections": 2},
    "detectable_format:number_bullet_lists": {"num_bullets": 2},
    "detectable_format:number_highlighted_sections": {"num_highlights": 2},
    "detectable_format:title": {},
    "keywords:existence": {"keywords": ["hello", "world"]},
    "keywords:forbidden_words": {"forbidden_words": ["world"]},
    "keywords:frequency": {"relation": "at least", "keyword": "hello", "frequency": 2},
    "keywords:letter_frequency": {"let_relation": "less than", "letter": "l", "let_frequency": 4},
    "language:response_language": {"language": "de"},
    "length_constraints:nth_paragraph_first_word": {"first_word": "then", "num_paragraphs": 2, "nth_paragraph": 2},
    "length_constraints:number_paragraphs": {"num_paragraphs": 2},
    "length_constraints:number_sentences": {"relation": "less than", "num_sentences": 3},
    "length_constraints:number_words": {"relation": "at least", "num_words": 6},
    "punctuation:no_comma": {},
    "startend:end_checker": {"end_phrase": "The end."},
    "startend:quotation": {},
}
GIVEN = [
    "Say hello. Hello, world! This is [name] at [place].",
    "HELLO WORLD, THIS IS ALL.",
    "das ist ein schöner tag und wir gehen in den wald. the end.",
    '"<<A title>>\n* one\n* two\n\n*first* and *second*\nP.S. The End."',
    "SECTION 1\nfirst\nSECTION 2\nhello hello\n***\nthen more",
    '{"answer": "My answer is yes."}',
    "Sure:\nMy answer is no.\n\nThen we go. One. Two. Three.",
    "***\nfirst one\n******\nsecond one",
    "first\u2028second\u2029third\x85fourth",
    "",
]
# The files of the task alone, as the package wants torch; its langdetect has no seed.
BY_LM_EVAL = """
import importlib.util, json, os, sys, types
root, nltk = (importlib.util.find_spec(name).submodule_search_locations[0] for name in ("lm_eval", "llama_index"))
os.environ["NLTK_DATA"] = nltk + "/core/_static/nltk_cache"
import langdetect
langdetect.DetectorFactory.seed = 0
for name, path in (("lm_eval", []), ("lm_eval.tasks", []), ("lm_eval.tasks.ifeval", [root + "/tasks/ifeval"])):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = path
from lm_eval.tasks.ifeval.utils import process_results
for line in sys.stdin:
    doc, text = json.loads(line)
    print(json.dumps(process_results(doc, [text])))
"""


@real
def test_ifeval_counts_the_same_by_evalscope_and_by_lm_eval(tmp_path):
    """Every kind of instruction on every text, alone and with the one before it."""
    kinds = list(INSTRUCTIONS.items())
    docs = []
    for number, (kind, kwargs) in enumerate(kinds):
        for text in range(len(GIVEN)):
            both = [kinds[number - 1], (kind, kwargs)] if text % 2 else [(kind, kwargs)]
            names, given = zip(*both, strict=True)
            doc = {"key": len(docs), "prompt": f"Row {len(docs)}. Say hello."}
            docs.append(doc | {"instruction_id_list": list(names), "kwargs": list(given)})

    def text_of(doc):
        return GIVEN[doc["key"] % len(GIVEN)]

    with serving(lambda body: text_of(docs[int(body["messages"][-1]["content"].split()[1].strip("."))])) as server:
        make(tmp_path, "ifeval", docs, server.url)
        done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    rows_ = scores.read_answers(tmp_path / jobs.ANSWERS)
    assert [row["text"] for row in rows_] == [text_of(doc) for doc in docs]
    given = "".join(json.dumps([doc, text_of(doc)]) + "\n" for doc in docs)
    command = [words(tmp_path)[0], "-c", BY_LM_EVAL]
    other = subprocess.run(
        command, input=given, capture_output=True, text=True, check=True, env=jobs.environment()
    ).stdout.splitlines()
    passed = 0
    for doc, row, line in zip(docs, rows_, other, strict=True):
        theirs, count = json.loads(line), len(doc["instruction_id_list"])
        for kind in ("strict", "loose"):
            assert row["scores"][f"prompt_level_{kind}"] == theirs[f"prompt_level_{kind}_acc"], doc
            ours = row["scores"][f"inst_level_{kind}"] * count
            assert round(ours, 6) == sum(theirs[f"inst_level_{kind}_acc"]), doc
        passed += theirs["prompt_level_strict_acc"]
    assert 30 < passed < len(docs) - 30  # both are found


GPQA_ROW = {"Question": "Which is right?", "Correct Answer": "the good", "Subdomain": "Physics",
            **{f"Incorrect Answer {n}": f"bad {n}" for n in (1, 2, 3)}}  # fmt: skip
HMMT_ROW = {"problem_idx": 1, "problem": "Compute $1/3$.", "answer": "\\frac{1}{3}", "problem_type": ["Algebra"]}


@real
def test_gpqa_and_hmmt_are_sampled_as_often_as_the_paper_and_left_to_the_judge(tmp_path):
    for name, row, repeats, sampling in (
        ("gpqa", GPQA_ROW, 4, {"temperature": 0.7}),
        ("hmmt25", HMMT_ROW, 16, {"temperature": 0.6}),
    ):
        with serving(lambda body: "It is 1/3. ANSWER: A") as server:
            make(tmp_path / name, name, [row], server.url)
            done = run(tmp_path / name)
            assert done.returncode == 0, done.stderr
        assert len(server.requests) == repeats
        sent = sampling | {"top_p": 0.95, "top_k": 20, "repetition_penalty": 1.05, "min_p": 0.0}
        assert all(sent.items() <= body.items() for body in server.requests)
        found = scores.read_answers(tmp_path / name / jobs.ANSWERS)
        assert [(row["item"], row["repeat"]) for row in found] == [(0, n) for n in range(repeats)]
        assert len({row["prompt"] for row in found}) == 1  # options in one order
        if name == "gpqa":
            assert f"{found[0]['gold']}) the good" in found[0]["prompt"]
        else:
            assert found[0]["gold"] == HMMT_ROW["answer"] and "Compute $1/3$." in found[0]["prompt"]


@real
def test_zebralogic_takes_the_whole_grid_and_any_form_of_answer(tmp_path):
    solution = {"header": ["House", "Name", "Age"], "rows": [["1", "Eric", "7"], ["2", "Ann", "8"]]}
    grid = {"House 1": {"Name": "Eric", "Age": "7"}, "House 2": {"Name": "ann", "Age": "8"}}
    number = {**grid, "House 2": {"Name": "Ann", "Age": 8}}  # evalscope's checker raises at it
    given = [
        json.dumps({"solution": grid}), json.dumps({"solution": {**grid, "House 2": {"Name": "Bob", "Age": "8"}}}),
        json.dumps({"reasoning": "", "solution": number}), "I cannot.",
    ]  # fmt: skip
    rows_ = [
        {"id": n, "puzzle": f"Puzzle {n}.", "solution": solution, "created_at": "2024"} for n in range(len(given))
    ]
    with serving(lambda body: next(text for n, text in enumerate(given) if f"Puzzle {n}." in str(body))) as server:
        task = make(tmp_path, "zebralogic", rows_, server.url)
        done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    assert [(item.score, item.unparsed) for item in items(task, tmp_path)] == [(1, 0), (0, 0), (0, 1), (0, 1)]


@real
@pytest.mark.parametrize(("name", "dates"), [("lcb_v5", ["2024-07-01", "2024-09-01"]), ("lcb_v6", ["2025-04-01"])])
def test_live_code_bench_is_asked_in_its_words_and_run_in_the_cage_alone(name, dates, tmp_path):
    marker = tmp_path / "ran"
    answer = f"```python\nopen({str(marker)!r}, 'w')\n```\nor\n```python\nprint(int(input()) + 1)\n```"
    tests = json.dumps([{"input": "1", "output": "2", "testtype": "stdin"}])
    found = [{"question_title": "t", "question_content": "Add one.", "platform": "atcoder", "question_id": date,
              "contest_date": f"{date}T00:00:00", "difficulty": "easy", "starter_code": "", "metadata": "{}",
              "public_test_cases": tests, "private_test_cases": tests} for date in dates]  # fmt: skip
    with serving(lambda body: answer) as server:
        task = make(tmp_path, name, found, server.url, max_tokens=60)
        done = run(tmp_path)
        assert done.returncode == 0, done.stderr
    (body,) = server.requests  # one of v5 is before its dates
    assert "Add one." in str(body["messages"][-1]) and body["temperature"] == 0
    rows_ = scores.read_answers(tmp_path / jobs.ANSWERS)
    (verdict,) = code.judge(tmp_path, rows_)
    assert verdict["passed"] and not marker.exists()
    (item,) = scores.items_of(task, [rows_[0] | {"verdict": verdict}])
    assert (item.score, item.unparsed) == (1, 0)


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
        kept = jobs.answered(tmp_path)
    with serving(answer) as another:  # a model that is served here gets another port each time
        jobs.set_url(tmp_path, another.url.removesuffix("/v1"))
        assert run(tmp_path).returncode == 0
        assert len(another.requests) == len(QUESTIONS) - kept
    assert [item.score for item in items(task, tmp_path)] == [1] * len(QUESTIONS)
