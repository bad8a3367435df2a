"""LiveBench's scripts, run (camopd/eval/livebench_scripts.py): small ones in their place, with their flags and files."""

import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
from fake_openai import serving
from small_livebench import (
    JUDGE,
    echo,
    error_of,
    for_nobody,
    items_of,
    notes,
    replace_cage,
    said_of,
    small_checkout,
    words_of,
)

from camopd import cli
from camopd.errors import DataError
from camopd.eval import cage, jobs
from camopd.eval import livebench_scripts as scripts


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    return small_checkout(tmp_path, monkeypatch)


@pytest.fixture
def no_cage(tmp_path, monkeypatch):
    replace_cage(monkeypatch, tmp_path)


def test_scripts_ask_and_judge_and_make_the_table(checkout, no_cage, capsys, monkeypatch):
    monkeypatch.setenv("CAMOPD_EVAL_API_KEY", "a-secret")
    before = sorted(path for path in checkout.rglob("*") if "__pycache__" not in str(path))
    with serving(lambda body: "no") as start, serving(echo) as result:
        models = [f"start={start.url}", f"result={result.url}"]
        said = said_of(capsys, words_of(checkout, *models, max_tokens="77", paper="medical"))
        said_of(capsys, words_of(checkout, *models, max_tokens="77"))
        assert len(start.requests) == len(result.requests) == 5  # the second call asks nothing again
    assert "| livebench | 0.0 (to 52.2) | 80.0 ± 55.5 | 5 | - / - | - / - |" in said
    assert "| LiveBench 1125 | 52.10 | 34.40 | 42.80 | 49.00 | - | 0.00 | 66.67 |" in said  # of three categories
    assert "2024-11-25 or that of 2025-11-25" in said and "livebench: /" not in said  # no warning
    assert f"livebench: with LiveBench {scripts.COMMIT[:12]}, release 2024-11-25." in notes()
    assert sorted(echo(body) for body in start.requests) == [f"ask {name}" for name in "abcde"]
    assert {(body["temperature"], body["max_tokens"], body["model"]) for body in start.requests} == {(0.0, 77, "tiny")}
    assert set(start.keys) == {"Bearer a-secret"}
    for path in Path("eval-output").rglob("*"):
        assert path.is_dir() or b"secret" not in path.read_bytes(), path
    assert before == sorted(path for path in checkout.rglob("*") if "__pycache__" not in str(path))


def test_answers_that_a_kill_has_torn_are_asked_again_and_no_others(checkout, no_cage, capsys):
    with serving(echo) as server:
        words = words_of(checkout, f"m={server.url}")
        said_of(capsys, words)
        folder = Path("eval-output/m/livebench")
        (folder / jobs.ANSWERS).unlink()
        (path,) = folder.glob("work/data/live_bench/math/aime/model_answer/*.jsonl")
        path.write_bytes(path.read_bytes()[:-20])
        said_of(capsys, words)
        assert [echo(body) for body in server.requests[5:]] == ["ask b"] and items_of()["items"] == 5


def test_failure_of_the_server_is_an_item_without_a_score_and_asked_again(checkout, no_cage, capsys):
    down = ["ask a"]
    with serving(lambda body: 500 if echo(body) in down else echo(body)) as server:
        words = words_of(checkout, f"m={server.url}")
        said_of(capsys, words)
        assert "livebench: 1 of 5 questions have no score of m, " in notes() and items_of()["items"] == 4
        assert items_of()["mean"] == 3 / 4  # e is wrong, a is nothing
        assert [echo(body) for body in server.requests[5:]] == ["ask a"]  # once more
        down.clear()
        said_of(capsys, words)
        assert "no score" not in notes() and items_of()["mean"] == 4 / 5
        assert [echo(body) for body in server.requests[6:]] == ["ask a"]


def test_answer_without_a_word_is_wrong_and_not_a_failure(checkout, no_cage, capsys):
    """LiveBench writes both down as the same, and would ask for it in every call."""
    with serving(lambda body: "" if echo(body) == "ask a" else echo(body)) as server:
        words = words_of(checkout, f"m={server.url}", max_tokens="77")
        said_of(capsys, words)
        assert "no score" not in notes() and (items_of()["items"], items_of()["mean"]) == (5, 3 / 5)
        asked = [body for body in server.requests if echo(body) == "ask a"]
        assert len(asked) == 2 and asked[0] == asked[1]
        said_of(capsys, words)
        assert len(server.requests) == 6


def test_answer_that_comes_when_it_is_asked_once_more_is_taken(checkout, no_cage, capsys, monkeypatch):
    monkeypatch.setenv("CAMOPD_EVAL_API_KEY", "a-secret")
    with serving(lambda body: 500 if len(server.requests) == 1 else f"{echo(body)}") as server:
        said_of(capsys, words_of(checkout, f"m={server.url}"))
        assert set(server.keys) == {"Bearer a-secret"} and len(server.requests) == 6
    assert "no score" not in notes() and items_of()["items"] == 5


def test_signal_ends_the_asking_of_failures(checkout, no_cage, capsys):
    def fail(body):
        if len(server.requests) == 6:  # of LiveBench's script are five; an answer once more is under way
            os.kill(os.getpid(), signal.SIGINT)
        return 500

    with serving(fail) as server:
        with pytest.raises(SystemExit) as stopped:
            cli.main(["eval", *words_of(checkout, f"m={server.url}"), "--concurrency", "1"])
        assert stopped.value.code == 130 and len(server.requests) == 6
    assert "Stopped. Finished answers are kept" in capsys.readouterr().out


def test_signal_ends_many_at_a_time_at_once_and_is_said_once(checkout, no_cage, capsys):
    """A request may take forty minutes."""
    go_on, once_more = threading.Event(), []

    def fail(body):
        if len(server.requests) > 5:  # those are of LiveBench's script
            once_more.append(body)
            if len(once_more) == 3:
                os.kill(os.getpid(), signal.SIGINT)
            if len(once_more) > 1:
                go_on.wait(30)
                return "late"
            return "in time"
        return 500

    with serving(fail) as server:
        started = time.monotonic()
        with pytest.raises(SystemExit) as stopped:
            cli.main(["eval", *words_of(checkout, f"m={server.url}"), "--concurrency", "2"])
        seconds = time.monotonic() - started
        go_on.set()
    assert stopped.value.code == 130 and len(once_more) == 3 and seconds < 25
    assert capsys.readouterr().out.count("Stopped.") == 1
    folder = Path("eval-output/m/livebench")
    assert [answer["text"] for answer in scripts.answers_of(folder).values() if answer["text"]] == ["in time"]


def test_prompt_that_is_too_long_is_an_error_that_says_so(checkout, no_cage, capsys):
    short = ["ask a"]
    with serving(lambda body: 400 if echo(body) in short else echo(body)) as server:
        words = words_of(checkout, f"m={server.url}", max_tokens="77")
        said = error_of(capsys, words)
        assert (
            "refuses the question a of LiveBench as too long: " in said
            and "This model's maximum context length" in said
        )
        assert "may have 77 tokens beside the prompt" in said and "(--context, or --max-model-len of a server" in said
        short.clear()
        said_of(capsys, words)
        assert [echo(body) for body in server.requests[6:]] == ["ask a"] and items_of()["mean"] == 4 / 5


@pytest.mark.parametrize("reply", [b"[]", b'{"choices": []}', b'{"choices": [{"message": null}]}', b"\xff", b"[" * 10**5,
                                   b'{"choices": [{"message": {"content": [1]}}], "usage": 3}'])  # fmt: skip
def test_reply_that_is_none_is_a_failure(checkout, no_cage, capsys, reply):
    replies = [500, reply]
    with serving(lambda body: replies.pop(0) if echo(body) == "ask a" else echo(body)) as server:
        said_of(capsys, words_of(checkout, f"m={server.url}"))
    assert "livebench: 1 of 5 questions have no score of m, " in notes()


def test_server_that_fails_at_all_is_an_error_with_its_words_and_not_its_key(checkout, no_cage, capsys, monkeypatch):
    monkeypatch.setenv("CAMOPD_EVAL_API_KEY", "a-secret")
    with serving(lambda body: 500) as server:
        said = error_of(capsys, words_of(checkout, f"m={server.url}"))
    assert "has answered none of 5 questions: HTTPError: HTTP Error 500" in said and "Bearer ***" in said
    for path in Path("eval-output").rglob("*"):
        assert path.is_dir() or b"secret" not in path.read_bytes(), path


@pytest.mark.parametrize("key", ["ask", "choices", "question_id"])
def test_key_that_is_a_word_of_an_answer_or_of_its_file_changes_no_score(checkout, no_cage, capsys, monkeypatch, key):
    monkeypatch.setenv("CAMOPD_EVAL_API_KEY", key)
    with serving(lambda body: f"{echo(body)} {key}" if echo(body) == "ask b" else echo(body)) as server:
        said_of(capsys, words_of(checkout, f"m={server.url}"))
    assert (items_of()["items"], items_of()["mean"]) == (5, 3 / 5)  # b and e are wrong
    kept = Path("eval-output/m/livebench/answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert sorted(json.loads(line)["text"] for line in kept) == ["ask a", f"ask b {key}", "ask c", "ask d", "ask e"]


def test_model_that_was_judged_before_is_read_and_another_commit_is_said(checkout, no_cage, capsys):
    rows = [("a", "math", "aime"), ("b", "math", "aime"), ("c", "math", "amps"), ("d", "language", "typos"),
            ("e", "coding", "LCB_generation")]  # fmt: skip
    have_judged(checkout, "start", *rows)
    with serving(lambda body: pytest.fail("asked")) as start, serving(echo) as result:
        said = said_of(capsys, words_of(checkout, f"start={start.url}", f"result={result.url}"))
    assert "+80.0 [" in said
    assert re.search(
        r"livebench was asked of start as it was judged in the checkout before, .*; result with LiveBench", notes()
    )
    # The judgments are made anew by another commit, and the answers are not.
    (checkout / "livebench" / scripts.JUDGE).write_text(
        JUDGE.replace("float(text ==", "float(text !="), encoding="utf-8"
    )
    assert items_of("result")["mean"] == 4 / 5
    with serving(lambda body: pytest.fail("asked")) as server:
        said = said_of(capsys, words_of(checkout, f"start={server.url}", f"result={server.url}"))
    assert re.search(r"with changed files, sha256 [0-9a-f]{12}, and what was tried here is LiveBench", said)
    assert items_of("result")["mean"] == 0
    (checkout / "livebench" / scripts.JUDGE).write_text(
        JUDGE.replace("float(text ==", "1 or (text =="), encoding="utf-8"
    )
    with serving(lambda body: pytest.fail("asked")) as server:
        said_of(capsys, words_of(checkout, f"start={server.url}", f"result={server.url}"))
    assert items_of("result")["mean"] == 4 / 5  # a second change is seen, too


def test_model_that_was_judged_before_needs_no_server(checkout, no_cage, capsys, tmp_path, monkeypatch):
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "config.json").write_text('{"max_position_embeddings": 2048}', encoding="utf-8")
    monkeypatch.setattr("camopd.commands.serve.find_vllm", lambda asked: pytest.fail("vLLM is looked for"))
    have_judged(checkout, "start", ("a", "math", "aime"), ("b", "math", "aime"), ("c", "math", "amps"),
                ("d", "language", "typos"), ("e", "coding", "LCB_generation"))  # fmt: skip
    with serving(echo) as server:
        words = words_of(checkout, "start=./small", f"result={server.url}")
        said = error_of(capsys, [*words, "--context", "4096", "--vllm-python", "x"])
        assert "--context, as no server is started here; --vllm-python, as no server is started here. Leave" in said
        assert "+80.0 [" in said_of(capsys, words)


def have_judged(checkout, model, *rows):
    for name, category, task in rows:
        path = checkout / "livebench" / "data" / "live_bench" / category / task / "model_judgment"
        path.mkdir(exist_ok=True, parents=True)
        judgment = {"question_id": name, "model": model, "score": 0, "category": category, "task": task}
        with open(path / "ground_truth_judgment.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(judgment) + "\n")


def test_judgments_of_other_questions_than_are_asked_are_refused_before_any_is(checkout, no_cage, capsys):
    have_judged(checkout, "start", ("a", "math", "aime"), ("c", "math", "amps"), ("new", "math", "amps"))
    with serving(echo) as server:
        said = error_of(capsys, words_of(checkout, f"start={server.url}", f"result={server.url}"))
        assert not server.requests
    assert "judgments of start for 2 of the 5 questions of the release 2024-11-25 and of 1 others" in said
    assert "Judge it there for the whole release, or give it another name in --models" in said


def test_judgments_of_a_part_are_said_where_nothing_is_asked(checkout, no_cage, capsys):
    have_judged(checkout, "m", ("a", "math", "aime"), ("c", "math", "amps"))
    said_of(capsys, words_of(checkout, "m=org/x"))
    assert "at a commit that is not known, for 2 of the 5 questions of the release 2024-11-25." in notes()
    for path in checkout.rglob("question.jsonl"):
        path.unlink()
    said_of(capsys, words_of(checkout, "m=org/x"))
    assert "a commit that is not known, and of how many questions is not known, as none are there." in notes()


def test_environment_that_would_read_keys_of_a_file_is_refused(checkout, no_cage, capsys, tmp_path):
    """An old python-dotenv does not know the variable that switches it off."""
    (tmp_path / "dotenv.py").write_text("def load_dotenv(stream):\n    import os\n    os.environ['READ'] = '1'\n")
    said = error_of(capsys, words_of(checkout, "m=http://127.0.0.1:9"))
    assert "AssertionError: its python-dotenv is older than 1.1.1, and would send keys of a .env: update it" in said


@pytest.mark.parametrize("served", ["known-model", "Org/Known"])
def test_name_that_livebench_has_settings_for_is_refused_before_it_asks(checkout, no_cage, capsys, served):
    with serving(echo, model=served) as server:
        said = error_of(capsys, words_of(checkout, f"m={server.url}"))
        assert f"served as '{served}', and for that name LiveBench has sampling" in said and not server.requests


def test_what_is_missing_is_said_with_the_lines_that_make_it(checkout, no_cage, capsys, monkeypatch):
    words = words_of(checkout, "m=http://127.0.0.1:9")
    for path in checkout.rglob("question.jsonl"):
        path.unlink()
    assert "no questions of the release 2024-11-25. In " in error_of(capsys, words)
    assert "../.venv/bin/python download_questions.py" in error_of(capsys, words)
    monkeypatch.setattr(cage, "into", lambda *words: (False, "execvp: Permission denied"))
    said = error_of(capsys, words)
    assert "cannot be used in the cage for code that models have written: execvp" in said and "nobody" in said
    (checkout / scripts.PYTHON).unlink()
    said = error_of(capsys, words)
    assert "python3 -m venv .venv && .venv/bin/pip install -e . matplotlib numpy scipy sortedcontainers" in said
    (checkout / "livebench" / scripts.JUDGE).unlink()
    assert "is no checkout of LiveBench: there is no livebench/gen_api_answer.py" in error_of(capsys, words)
    said = error_of(capsys, ["--tasks", "livebench", "--models", "m=http://127.0.0.1:9"])
    assert f"`git -C CHECKOUT checkout {scripts.COMMIT}`, and add --data livebench=CHECKOUT" in said


def test_without_bubblewrap_nothing_is_asked(checkout, capsys, monkeypatch):
    monkeypatch.setenv("CAMOPD_BWRAP", "/nowhere/bwrap")
    with serving(echo) as server:
        assert "install the package `bubblewrap`" in error_of(capsys, words_of(checkout, f"m={server.url}"))
        assert not server.requests


def test_commit_of_a_checkout_is_read_and_its_changes_seen(checkout, tmp_path):
    assert scripts.commit_of(checkout) == f"LiveBench {scripts.COMMIT[:12]}"
    (checkout / "livebench" / "__init__.py").write_text("1", encoding="utf-8")
    changed = scripts.commit_of(checkout)
    assert re.fullmatch(rf"LiveBench {scripts.COMMIT[:12]} with changed files, sha256 [0-9a-f]{{12}}", changed)
    (checkout / "livebench" / "__init__.py").write_text("2", encoding="utf-8")
    assert scripts.commit_of(checkout) != changed
    inside = checkout / "inside"
    (inside / "livebench" / "data").mkdir(parents=True)
    unknown = scripts.commit_of(inside)
    assert unknown.startswith("LiveBench of an unknown commit, its files sha256 ")  # not that of what it lies in
    (inside / "livebench" / "data" / "x").touch()
    assert scripts.commit_of(inside) == unknown
    (inside / "livebench" / "x").touch()
    assert scripts.commit_of(inside) != unknown


def test_question_that_is_none_is_named(checkout, no_cage):
    (path,) = checkout.rglob("aime/question.jsonl")
    path.write_text(path.read_text(encoding="utf-8") + '{"question_id": 1}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"line 4 of '.*aime/question.jsonl' is not a question of LiveBench"):
        scripts.questions(scripts.opened(checkout))


def test_judge_sees_neither_the_checkouts_data_nor_its_env_file(checkout, no_cage):
    (checkout / "livebench" / ".env").write_text("OPENAI_API_KEY=x", encoding="utf-8")
    room = scripts.room_of(scripts.opened(checkout), answers=10)
    shown = room.shown
    assert room.seconds - scripts.room_of(scripts.opened(checkout)).seconds == 600  # a minute for each answer
    assert not {"/checkout/livebench/data", "/checkout/livebench/.env", "/checkout/livebench"} & set(shown)
    assert f"/checkout/livebench/{scripts.JUDGE}" in shown


def test_user_without_a_home_is_no_obstacle(checkout, no_cage, monkeypatch):
    """A number that no passwd file knows, as many containers run by."""
    shown = scripts.room_of(scripts.opened(checkout)).shown
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])
    assert scripts.room_of(scripts.opened(checkout)).shown == shown


@pytest.mark.eval
def test_environment_without_what_answers_import_is_refused(checkout, capsys, monkeypatch, tmp_path):
    """Programs that import it would be wrong answers."""
    for_nobody(checkout)
    monkeypatch.setattr(scripts, "FOR_ANSWERS", ("json", "no_such_module"))
    said = error_of(capsys, words_of(checkout, "m=http://127.0.0.1:9"))
    assert "models have written: AssertionError: it has no no_such_module. In " in said
