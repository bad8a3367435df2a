"""A teacher on vLLM servers: the numbers of the same model in the process, or an error in words, whatever goes wrong.

The servers are those of fake_vllm.py; tests/test_vllm.py does the same with real ones.
"""

import itertools
import threading
import time
from concurrent.futures import CancelledError
from types import SimpleNamespace

import pytest
import torch
from fake_vllm import PROMPT_LENS, TOKEN_IDS, assert_same_scores

from camopd.errors import CaMOPDError, TeacherError
from camopd.teachers.base import RemoteTeacher, Teacher
from camopd.teachers.vllm.teacher import ServerTeacher, connect_servers


both_transports = pytest.mark.parametrize("compact", [True, False], ids=["compact", "JSON"])


@both_transports
def test_scores_equal_those_of_the_same_model_in_process(start_server, connect, local_scores, compact):
    teacher = connect(start_server(compact=compact))
    scores = teacher.score(TOKEN_IDS, PROMPT_LENS)
    assert_same_scores(scores, local_scores())
    assert [score.logps.dtype for score in scores] == [torch.float32] * 5
    assert isinstance(teacher, Teacher)
    assert isinstance(teacher, RemoteTeacher)
    assert teacher.name == "tiny-teacher"


def test_transports_give_the_same_float32_numbers(start_server, connect):
    compact, plain = (
        connect(start_server(compact=compact)).score(TOKEN_IDS, PROMPT_LENS) for compact in (True, False)
    )
    for one, other in zip(compact, plain, strict=True):
        assert torch.equal(one.logps, other.logps)


@both_transports
def test_top_k_equals_that_of_the_same_model_in_process(start_server, connect, local_scores, compact):
    server = start_server(compact=compact)
    scores = connect(server).score(TOKEN_IDS, PROMPT_LENS, top_k=3)
    assert_same_scores(scores, local_scores(top_k=3))
    assert scores[0].top_ids.shape == scores[0].top_logps.shape == (4, 3)
    assert all("prompt" in body for body in server.scored)  # the teacher's own top k come by JSON only


@both_transports
@pytest.mark.parametrize("top_k", [0, 3])
def test_empty_completion_is_answered_without_asking_the_server(start_server, connect, compact, top_k):
    server = start_server(compact=compact)
    (score,) = connect(server).score([[14, 15]], [2], top_k)
    assert score.logps.shape == (0,)
    assert score.logps.dtype == torch.float32
    if top_k:
        assert score.top_ids.shape == score.top_logps.shape == (0, top_k)
        assert score.top_ids.dtype == torch.long
    assert server.scored == []


def test_rows_that_are_none_give_no_scores(server, connect):
    assert connect(server).score([], []) == []


def test_submit_returns_before_the_server_has_answered(server, connect, local_scores):
    teacher = connect(server)
    answered = threading.Event()
    server.before = lambda: answered.wait(10)
    future = teacher.submit(TOKEN_IDS, PROMPT_LENS)
    assert not future.done()
    answered.set()
    assert_same_scores(future.result(timeout=60), local_scores())


@both_transports
@pytest.mark.parametrize(
    "answers",
    [[(500, "oops"), (500, "oops")], [(429, "slow down")], [(503, "loading")], [None], ["cut"], [(200, '{"choi')]],
    ids=["500 twice", "429", "503", "dropped connection", "half of the body", "half of the JSON"],
)
def test_fault_that_passes_changes_no_number(start_server, connect, local_scores, answers, compact):
    server = start_server(compact=compact)
    teacher = connect(server)
    server.answers.extend(answers)
    assert_same_scores(teacher.score(TOKEN_IDS, PROMPT_LENS), local_scores())
    assert len(server.sequences) >= 4 + len(answers)


def test_busy_server_is_waited_for_as_long_as_patience_lasts(server, connect, local_scores, monkeypatch):
    """A second passes with each request, whatever the clock on the wall says."""
    seconds = itertools.count()
    monkeypatch.setattr("camopd.vllm.replicas.time", SimpleNamespace(monotonic=lambda: next(seconds)))
    teacher = connect(server, patience=200.0)
    server.answers.extend([(429, "slow down")] * 60)
    assert_same_scores(teacher.score(TOKEN_IDS, PROMPT_LENS), local_scores())
    server.answers.extend([(429, "slow down")] * 10000)
    before, started = len(server.requests), next(seconds)
    with pytest.raises(TeacherError, match="answered 429: slow down"):
        teacher.score(TOKEN_IDS, PROMPT_LENS)
    assert 200 < next(seconds) - started < 230
    assert 50 < len(server.requests) - before < 230  # it has been asked again and again, and then no more


@both_transports
def test_time_out_is_tried_again(start_server, connect, local_scores, monkeypatch, compact):
    monkeypatch.setattr("camopd.vllm.limits.SCORE_SECONDS", 0.5)
    server = start_server(compact=compact)
    teacher = connect(server)
    server.answers.append("hang")
    assert_same_scores(teacher.score(TOKEN_IDS[:1], PROMPT_LENS[:1]), local_scores()[:1])
    assert len(server.scored) == 2


def test_time_outs_grow_with_the_tokens_in_flight(server, connect, monkeypatch):
    monkeypatch.setattr("camopd.vllm.limits.SCORE_SECONDS", 0.0)
    monkeypatch.setattr("camopd.vllm.limits.SECONDS_PER_TOKEN", 0.02)
    monkeypatch.setattr("camopd.vllm.limits.ATTEMPTS", 1)
    teacher = connect(server)
    server.before = lambda: time.sleep(0.3)
    with pytest.raises(TeacherError, match=r"did not answer /v1/completions in 0 seconds"):
        teacher.score([[5, 9, 12]], [1])  # 0.06 s
    teacher.score([[5, 9, 12] * 10], [1])  # 0.6 s


def test_fault_that_stays_is_a_teacher_error_with_the_servers_own_words(server, connect, monkeypatch):
    monkeypatch.setattr("camopd.vllm.limits.ATTEMPTS", 3)
    teacher = connect(server)
    server.answers.extend([(500, "CUDA out of memory")] * 3)
    with pytest.raises(
        TeacherError,
        match=rf"teacher 'general' could not score 1 sequences of 6 tokens in 3 attempts; the last: {server.url} answered "
        "500: CUDA out of memory",
    ):
        teacher.score(TOKEN_IDS[:1], PROMPT_LENS[:1])
    assert len(server.scored) == 3


def test_server_that_hangs_for_good_is_an_error_in_bounded_time(server, connect, monkeypatch):
    monkeypatch.setattr("camopd.vllm.limits.SCORE_SECONDS", 0.2)
    monkeypatch.setattr("camopd.vllm.limits.ATTEMPTS", 3)
    teacher = connect(server)
    server.answers.extend(["hang"] * 100)
    started = time.monotonic()
    with pytest.raises(
        TeacherError, match=rf"in 3 attempts; the last: {server.url} did not answer /v1/completions in"
    ):
        teacher.score(TOKEN_IDS, PROMPT_LENS)
    assert time.monotonic() - started < 5


def test_row_that_fails_for_good_does_not_wait_for_the_others(server, connect):
    teacher = connect(server)
    refused = threading.Event()

    def answer_slowly():
        if refused.is_set():
            server.released.wait(10)
        refused.set()

    server.answers.append((400, "no"))
    server.before = answer_slowly
    started = time.monotonic()
    with pytest.raises(TeacherError, match="answered 400"):
        teacher.score(TOKEN_IDS, PROMPT_LENS)
    assert time.monotonic() - started < 5


def test_teacher_error_is_a_camopd_error():
    assert issubclass(TeacherError, CaMOPDError)


def test_context_without_room_for_the_token_vllm_generates_is_refused(start_server, connect):
    teacher = connect(start_server(max_model_len=101), start_server(max_model_len=200))
    teacher.check_context(100)  # the shortest replica counts: 100 + 1 fit into 101
    with pytest.raises(
        TeacherError,
        match=r"takes sequences of 101 tokens, but max_prompt_length \+ max_completion_length \+ 1 is 102\. Start it "
        r"with --max-model-len 102 \(`camopd serve` with the lengths of the run\), or lower max_completion_length",
    ):
        teacher.check_context(101)


def test_server_that_tells_no_context_is_taken(start_server, connect):
    connect(start_server(max_model_len=None)).check_context(10**6)


@pytest.mark.parametrize("gone", [True, False])
def test_closing_ends_what_is_being_scored(server, connect, gone):
    teacher = connect(server)
    server.answers.extend(["hang"] * 8)
    if gone:
        server.before = server.close
    future = teacher.submit(TOKEN_IDS, PROMPT_LENS)
    time.sleep(0.3)
    teacher.close()
    with pytest.raises((TeacherError, CancelledError)):
        future.result(timeout=60)


def test_closing_ends_the_thread(server):
    def names():
        return [thread.name for thread in threading.enumerate()]

    teacher = ServerTeacher([server.url], "closing")
    assert "teacher-closing" in names()
    teacher.close()
    teacher.close()
    assert "teacher-closing" not in names()


def test_connect_servers_shares_a_teacher_but_not_what_it_is_wanted_to_serve(server):
    right, wrong = ({"urls": server.url, "model": model} for model in ("tiny-teacher", "Qwen/Qwen3-8B"))
    connected = connect_servers({"general": right, "code": {**right, "urls": [server.url]}, "own": "adapter_off"})
    assert connected["general"] is connected["code"] and connected["own"] == "adapter_off"
    with pytest.raises(TeacherError, match=r"teacher 'domain' .* and the config wants 'Qwen/Qwen3-8B'"):
        connect_servers({"general": right, "domain": wrong})


def test_connect_servers_hands_over_what_fails_and_goes_on(server, start_server):
    gone, failed = start_server(), {}
    gone.close()
    connected = connect_servers({"general": gone.url, "domain": server.url}, failed=failed.__setitem__)
    assert connected["general"] == gone.url and connected["domain"].name == "tiny-teacher"
    assert list(failed) == ["general"] and isinstance(failed["general"], TeacherError)
