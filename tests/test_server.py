"""A teacher on vLLM servers: the numbers of the same model in the process, or an error in words, whatever goes wrong.

The servers are those of fake_vllm.py; tests/test_vllm.py does the same with real ones.
"""

import base64
import io
import json
import logging
import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_vllm import PROMPT_LENS, TOKEN_IDS, assert_same_scores

from camopd.errors import CaMOPDError, TeacherError
from camopd.teachers.base import RemoteTeacher, Teacher
from camopd.teachers.local import LocalTeacher
from camopd.teachers.vllm.teacher import ServerTeacher


ASKED = [TOKEN_IDS[row] for row in (0, 1, 2, 4)]  # row 3 has no completion


@pytest.fixture
def local_scores(teacher_model):
    """What the servers must answer."""

    def scores(top_k=0):
        return LocalTeacher(teacher_model, "local", "cpu", batch_size=2).score(TOKEN_IDS, PROMPT_LENS, top_k)

    return scores


@pytest.fixture
def connect():
    """Make teachers of branch "general" and close them in the end."""
    teachers = []

    def connect(*servers, patience=20.0, branch="general"):
        urls = [server if isinstance(server, str) else server.url for server in servers]
        teachers.append(ServerTeacher(urls, branch, patience))
        return teachers[-1]

    yield connect
    for teacher in teachers:
        teacher.close()


both_transports = pytest.mark.parametrize("compact", [True, False], ids=["compact", "JSON"])


# --- the numbers -------------------------------------------------------------------------------------------------


@both_transports
def test_scores_equal_those_of_the_same_model_in_process(start_server, connect, local_scores, compact):
    teacher = connect(start_server(compact=compact))
    scores = teacher.score(TOKEN_IDS, PROMPT_LENS)
    assert_same_scores(scores, local_scores())
    assert [score.logps.dtype for score in scores] == [torch.float32] * 5
    assert isinstance(teacher, Teacher)
    assert isinstance(teacher, RemoteTeacher)
    assert teacher.name == "tiny-teacher"


def test_both_transports_give_the_same_float32_numbers(start_server, connect):
    compact, plain = (
        connect(start_server(compact=compact)).score(TOKEN_IDS, PROMPT_LENS) for compact in (True, False)
    )
    for one, other in zip(compact, plain, strict=True):
        assert torch.equal(one.logps, other.logps)


def test_an_answer_recorded_from_vllms_own_classes_is_read_to_the_last_bit(start_server, connect):
    recorded = json.loads((Path(__file__).parent / "recorded_generate.json").read_text())
    server = start_server(compact=True)
    teacher = connect(server)
    server.edit_answer = lambda answer: {**recorded["answer"], "request_id": answer["request_id"]}
    (score,) = teacher.score([recorded["request"]["token_ids"]], [3])
    assert torch.equal(score.logps, -torch.arange(1, 4, dtype=torch.float32) / 7)
    (asked,) = server.scored  # tests/test_vllm.py has vLLM's own classes validate the recorded request
    assert {**asked, "request_id": None} == {**recorded["request"], "request_id": None}


@both_transports
def test_top_k_equals_that_of_the_same_model_in_process(start_server, connect, local_scores, compact):
    server = start_server(compact=compact)
    scores = connect(server).score(TOKEN_IDS, PROMPT_LENS, top_k=3)
    assert_same_scores(scores, local_scores(top_k=3))
    assert scores[0].top_ids.shape == scores[0].top_logps.shape == (4, 3)
    assert all("prompt" in body for body in server.scored)  # the teacher's own top k come by JSON only


@both_transports
@pytest.mark.parametrize("top_k", [0, 3])
def test_an_empty_completion_is_answered_without_asking_the_server(start_server, connect, compact, top_k):
    server = start_server(compact=compact)
    (score,) = connect(server).score([[14, 15]], [2], top_k)
    assert score.logps.shape == (0,)
    assert score.logps.dtype == torch.float32
    if top_k:
        assert score.top_ids.shape == score.top_logps.shape == (0, top_k)
        assert score.top_ids.dtype == torch.long
    assert server.scored == []


def test_no_rows_are_no_scores(server, connect):
    assert connect(server).score([], []) == []


def test_submit_returns_before_the_server_has_answered(server, connect, local_scores):
    teacher = connect(server)
    answered = threading.Event()
    server.before = lambda: answered.wait(10)
    future = teacher.submit(TOKEN_IDS, PROMPT_LENS)
    assert not future.done()
    answered.set()
    assert_same_scores(future.result(timeout=60), local_scores())


# --- what is asked -----------------------------------------------------------------------------------------------


def test_the_json_request_asks_for_no_more_than_the_score_needs(server, connect):
    connect(server).score([TOKEN_IDS[0]], [2])
    (body,) = server.scored
    assert body == {
        "model": "tiny-teacher", "prompt": [TOKEN_IDS[0]], "prompt_logprobs": 0, "max_tokens": 1, "temperature": 1.0,
        "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
    }  # fmt: skip


def test_the_compact_request_scores_the_completion_only(start_server, connect):
    server = start_server(compact=True)
    connect(server).score([TOKEN_IDS[0]], [2])
    (body,) = server.scored
    assert body["token_ids"] == TOKEN_IDS[0]
    assert body["sampling_params"]["prompt_logprob_token_ids"] == [[12], [30], [7], [8]]
    assert body["sampling_params"]["prompt_logprob_start"] == 1
    assert body["sampling_params"]["temperature"] == 1.0
    assert "prompt_logprobs" not in body["sampling_params"]


def test_the_transport_of_each_server_is_logged(start_server, connect, caplog):
    compact, plain = start_server(compact=True), start_server()
    with caplog.at_level(logging.INFO, logger="camopd"):
        teacher = connect(compact, plain)
    assert teacher.transports == {compact.url: "compact", plain.url: "JSON"}
    assert f"{compact.url} serves 'tiny-teacher', transport compact" in caplog.text
    assert f"{plain.url} serves 'tiny-teacher', transport JSON" in caplog.text


@pytest.mark.parametrize("status", [400, 403, 404, 500])
def test_whoever_refuses_the_compact_request_gets_json(start_server, connect, local_scores, status):
    server = start_server(compact=True)
    plain = server.answer
    server.answer = lambda path, body: (status, "no") if path == "/inference/v1/generate" else plain(path, body)
    teacher = connect(server)
    assert teacher.transports == {server.url: "JSON"}
    assert_same_scores(teacher.score(TOKEN_IDS, PROMPT_LENS), local_scores())


def test_a_server_that_ignores_the_compact_fields_gets_json(start_server, connect):
    server = start_server(compact=True)
    server.edit_answer = lambda answer: {**answer, "prompt_token_id_logprobs": None}
    assert connect(server).transports == {server.url: "JSON"}


def test_a_url_may_end_in_a_slash_or_v1(server, connect, local_scores):
    for end in ("/", "/v1", "/v1/"):
        assert_same_scores(connect(server.url + end).score(TOKEN_IDS, PROMPT_LENS), local_scores())


def test_short_sequences_share_a_request_up_to_the_token_budget(server, connect, local_scores, monkeypatch):
    monkeypatch.setattr("camopd.teachers.limits.REQUESTS_PER_REPLICA", 1)
    monkeypatch.setattr("camopd.teachers.limits.TOKENS_PER_REQUEST", 9)
    assert_same_scores(connect(server).score(TOKEN_IDS, PROMPT_LENS), local_scores())
    # Longest first: 9 tokens fill a request; 6 + 3 another; 3 are left.
    assert [body["prompt"] for body in server.scored] == [[TOKEN_IDS[1]], [TOKEN_IDS[0], TOKEN_IDS[2]], [TOKEN_IDS[4]]]


def test_a_sequence_longer_than_the_budget_goes_alone(server, connect, local_scores, monkeypatch):
    monkeypatch.setattr("camopd.teachers.limits.TOKENS_PER_REQUEST", 2)
    assert_same_scores(connect(server).score(TOKEN_IDS, PROMPT_LENS), local_scores())
    assert sorted(body["prompt"] for body in server.scored) == sorted([ids] for ids in ASKED)


# --- replicas ----------------------------------------------------------------------------------------------------


@both_transports
def test_replicas_share_the_tokens_and_answers_keep_their_order(start_server, connect, local_scores, compact):
    replicas = [start_server(compact=compact), start_server(compact=compact)]
    together = threading.Barrier(4, timeout=60)  # so that none is given back before all are given out
    for replica in replicas:
        replica.before = together.wait
    assert_same_scores(connect(*replicas).score(TOKEN_IDS, PROMPT_LENS), local_scores())
    # 9 tokens to one of them; then 6, 3 and 3 to whichever has fewest in flight.
    loads = sorted(sum(len(ids) for ids in replica.sequences) for replica in replicas)
    assert loads == [9, 12]


def test_requests_are_asked_at_the_same_time_but_no_more_than_allowed(server, connect, local_scores, monkeypatch):
    monkeypatch.setattr("camopd.teachers.limits.REQUESTS_PER_REPLICA", 2)
    monkeypatch.setattr("camopd.teachers.limits.TOKENS_PER_REQUEST", 1)
    inside, most, lock = 0, 0, threading.Lock()
    two = threading.Barrier(2, timeout=60)  # a client that asks one by one never passes

    def count():
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        two.wait()
        time.sleep(0.05)
        with lock:
            inside -= 1

    server.before = count
    assert_same_scores(connect(server).score(TOKEN_IDS, PROMPT_LENS), local_scores())
    assert most == 2


def test_a_replica_that_dies_is_left_out_and_the_others_do_its_work(start_server, connect, local_scores, caplog):
    first, second = start_server(), start_server()
    teacher = connect(first, second)
    first.before = first.close  # dies over its first request
    started = time.monotonic()
    assert_same_scores(teacher.score(TOKEN_IDS, PROMPT_LENS), local_scores())
    assert_same_scores(teacher.score(TOKEN_IDS, PROMPT_LENS), local_scores())
    assert time.monotonic() - started < 5
    assert f"replica {first.url} is out" in caplog.text
    asked = len(first.requests)
    assert_same_scores(teacher.score(TOKEN_IDS, PROMPT_LENS), local_scores())
    assert not [path for path, *_ in first.requests[asked:] if path == "/v1/completions"]


def test_a_replica_that_comes_back_works_again(start_server, connect, local_scores, caplog):
    first, second = start_server(), start_server()
    teacher = connect(first, second)
    first.before = first.close
    assert_same_scores(teacher.score(TOKEN_IDS, PROMPT_LENS), local_scores())
    again = start_server(port=first.port)
    deadline = time.monotonic() + 60
    while "is back after" not in caplog.text:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    together = threading.Barrier(4, timeout=60)
    again.before = second.before = together.wait  # as long as both have work
    assert_same_scores(teacher.score(TOKEN_IDS, PROMPT_LENS), local_scores())
    assert again.scored


def test_when_every_replica_is_gone_the_batch_waits_for_one(start_server, connect, local_scores, caplog):
    server = start_server()
    teacher = connect(server)
    server.before = server.close
    future = teacher.submit(TOKEN_IDS, PROMPT_LENS)
    time.sleep(0.5)
    assert not future.done()
    assert "no replica answers" in caplog.text
    start_server(port=server.port)
    assert_same_scores(future.result(timeout=60), local_scores())


def test_when_none_comes_back_in_time_the_error_says_so_and_a_later_batch_is_scored(
    start_server, connect, local_scores
):
    server = start_server()
    teacher = connect(server, patience=0.3)
    server.before = server.close
    started = time.monotonic()
    for _ in range(2):  # the second finds it gone from the start
        with pytest.raises(
            TeacherError,
            match=rf"'general' has no replica left: {server.url} did not come back in teacher_patience=0.3 seconds; "
            "the last fault: .*Start the server again, then resume",
        ):
            teacher.score(TOKEN_IDS, PROMPT_LENS)
    assert time.monotonic() - started < 5
    start_server(port=server.port)
    assert_same_scores(teacher.score(TOKEN_IDS, PROMPT_LENS), local_scores())


def test_a_replica_that_comes_back_with_another_model_stays_out(start_server, connect, local_scores, caplog):
    first, second = start_server(), start_server()
    teacher = connect(first, second)
    first.before = first.close
    start_another = lambda: start_server(port=first.port, name="another-model")  # noqa: E731
    assert_same_scores(teacher.score(TOKEN_IDS, PROMPT_LENS), local_scores())
    other = start_another()
    time.sleep(0.5)
    assert_same_scores(teacher.score(TOKEN_IDS, PROMPT_LENS), local_scores())
    assert other.scored == []
    assert "is back" not in caplog.text


def test_a_replica_that_comes_back_without_the_compact_request_gets_json(start_server, connect, local_scores):
    server = start_server(compact=True)
    teacher = connect(server)
    server.before = server.close
    future = teacher.submit(TOKEN_IDS, PROMPT_LENS)
    assert server.port_is_free.wait(60)
    time.sleep(0.5)  # requests on their way to the old server fail; no vLLM is up again before that
    start_server(port=server.port)
    assert_same_scores(future.result(timeout=60), local_scores())
    assert teacher.transports == {server.url: "JSON"}


# --- faults that may pass: the same numbers --------------------------------------------------------------------------


@both_transports
@pytest.mark.parametrize(
    "answers",
    [[(500, "oops"), (500, "oops")], [(429, "slow down")], [(503, "loading")], [None], ["cut"], [(200, '{"choi')]],
    ids=["500 twice", "429", "503", "dropped connection", "half of the body", "half of the JSON"],
)
def test_a_fault_that_passes_changes_no_number(start_server, connect, local_scores, answers, compact):
    server = start_server(compact=compact)
    teacher = connect(server)
    server.answers.extend(answers)
    assert_same_scores(teacher.score(TOKEN_IDS, PROMPT_LENS), local_scores())
    assert len(server.sequences) >= 4 + len(answers)


@pytest.mark.parametrize("answer", [(500, "oops"), (429, "slow down"), None, "cut"])
def test_a_fault_is_tried_on_another_replica_first(start_server, connect, local_scores, answer):
    replicas = [start_server(), start_server()]
    teacher = connect(*replicas)
    for replica in replicas:
        replica.answers.append(answer)
    assert_same_scores(teacher.score([TOKEN_IDS[0]], [2]), local_scores()[:1])
    # Whoever was asked first failed, then the other, then the first again.
    assert sorted(len(replica.scored) for replica in replicas) == [1, 2]


@pytest.mark.parametrize("status", [500, 429])
def test_one_replica_that_always_fails_quickly_does_not_stop_another_that_works_slowly(
    start_server, connect, local_scores, monkeypatch, status
):
    monkeypatch.setattr("camopd.teachers.limits.REQUESTS_PER_REPLICA", 1)
    monkeypatch.setattr("camopd.teachers.limits.TOKENS_PER_REQUEST", 1)
    bad, good = start_server(), start_server()
    teacher = connect(bad, good)
    bad.answers.extend([(status, "oops")] * 1000)
    good.before = lambda: time.sleep(0.2)  # an idle replica that fails is always free, a good one hardly ever
    assert_same_scores(teacher.score(TOKEN_IDS * 3, PROMPT_LENS * 3), local_scores() * 3)


def test_a_busy_server_is_waited_for_as_long_as_patience_lasts(server, connect, local_scores, monkeypatch):
    monkeypatch.setattr("camopd.teachers.limits.SCORE_PAUSE", 0.02)
    teacher = connect(server, patience=3.0)
    server.answers.extend([(429, "slow down")] * 60)
    assert_same_scores(teacher.score(TOKEN_IDS, PROMPT_LENS), local_scores())
    server.answers.extend([(429, "slow down")] * 10000)
    started = time.monotonic()
    with pytest.raises(TeacherError, match="answered 429: slow down"):
        teacher.score(TOKEN_IDS, PROMPT_LENS)
    assert 3 < time.monotonic() - started < 8


@both_transports
def test_a_time_out_is_tried_again(start_server, connect, local_scores, monkeypatch, compact):
    monkeypatch.setattr("camopd.teachers.limits.SCORE_SECONDS", 0.5)
    server = start_server(compact=compact)
    teacher = connect(server)
    server.answers.append("hang")
    assert_same_scores(teacher.score(TOKEN_IDS[:1], PROMPT_LENS[:1]), local_scores()[:1])
    assert len(server.scored) == 2


def test_time_outs_grow_with_the_tokens_in_flight(server, connect, monkeypatch):
    monkeypatch.setattr("camopd.teachers.limits.SCORE_SECONDS", 0.0)
    monkeypatch.setattr("camopd.teachers.limits.SECONDS_PER_TOKEN", 0.02)
    monkeypatch.setattr("camopd.teachers.limits.ATTEMPTS", 1)
    teacher = connect(server)
    server.before = lambda: time.sleep(0.3)
    with pytest.raises(TeacherError, match=r"did not answer /v1/completions in 0 seconds"):
        teacher.score([[5, 9, 12]], [1])  # 0.06 s
    teacher.score([[5, 9, 12] * 10], [1])  # 0.6 s


# --- faults that stay: one clear error, in bounded time ------------------------------------------------------------


def test_a_fault_that_stays_is_a_teacher_error_with_the_servers_own_words(server, connect, monkeypatch):
    monkeypatch.setattr("camopd.teachers.limits.ATTEMPTS", 3)
    teacher = connect(server)
    server.answers.extend([(500, "CUDA out of memory")] * 3)
    with pytest.raises(
        TeacherError,
        match=rf"teacher 'general' could not score 1 sequences of 6 tokens in 3 attempts; the last: {server.url} answered "
        "500: CUDA out of memory",
    ):
        teacher.score(TOKEN_IDS[:1], PROMPT_LENS[:1])
    assert len(server.scored) == 3


def test_a_server_that_hangs_for_good_is_an_error_in_bounded_time(server, connect, monkeypatch):
    monkeypatch.setattr("camopd.teachers.limits.SCORE_SECONDS", 0.2)
    monkeypatch.setattr("camopd.teachers.limits.ATTEMPTS", 3)
    teacher = connect(server)
    server.answers.extend(["hang"] * 100)
    started = time.monotonic()
    with pytest.raises(
        TeacherError, match=rf"in 3 attempts; the last: {server.url} did not answer /v1/completions in"
    ):
        teacher.score(TOKEN_IDS, PROMPT_LENS)
    assert time.monotonic() - started < 5


@both_transports
def test_a_400_fails_at_once_with_the_servers_own_words(start_server, connect, compact):
    server = start_server(compact=compact)
    teacher = connect(server)
    server.answers.append((400, '{"error": {"message": "prompt_logprobs is disabled here"}}'))
    with pytest.raises(
        TeacherError, match=rf"'general' at {server.url}.* answered 400: .*prompt_logprobs is disabled"
    ):
        teacher.score(TOKEN_IDS[:1], PROMPT_LENS[:1])
    assert len(server.scored) == 1


def test_nothing_listening_is_a_teacher_error_that_names_the_url(server, connect):
    server.close()  # now the port is free
    started = time.monotonic()
    with pytest.raises(
        TeacherError, match=rf"teacher 'domain' at {server.url} does not answer \(ConnectError.*vllm serve"
    ):
        connect(server, branch="domain")
    assert time.monotonic() - started < 5


def test_a_server_that_accepts_and_never_answers_is_an_error_in_under_ten_seconds(server, connect):
    server.always = "hang"
    started = time.monotonic()
    with pytest.raises(TeacherError, match=rf"{server.url} did not answer /v1/models in 5 seconds"):
        connect(server)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    "url",
    ["http://", "http://host:port", "http://host:99999", "http://host:-1", "ftp://host", "http://[::1", "host:80"],
)
def test_a_url_that_is_none_is_refused(connect, url):
    with pytest.raises(TeacherError, match=r"that is no URL of a server\. Write http://host:port"):
        connect(url)


def test_a_password_in_a_url_is_refused_and_not_shown(connect):
    with pytest.raises(TeacherError, match=r"a URL shows its user and password .* Set CAMOPD_TEACHER_API") as e:
        connect("http://user:sk-secret@localhost:1")
    assert "sk-secret" not in str(e.value)


def test_https_where_only_http_is_spoken_is_an_error(server, connect):
    with pytest.raises(TeacherError, match="does not answer"):
        connect(server.url.replace("http:", "https:"))


def test_http_where_https_is_wanted_gets_the_hint(server, connect):
    server.always = (400, "The plain HTTP request was sent to HTTPS port")
    with pytest.raises(TeacherError, match=rf"answered 400: .*Write https://127.0.0.1:{server.port}\."):
        connect(server)


def test_an_answer_that_is_not_json_is_refused_with_its_beginning(server, connect, monkeypatch):
    teacher = connect(server)
    server.answers.extend([(200, "<html>Welcome to nginx</html>")] * 10)
    with pytest.raises(
        TeacherError,
        match=r"did not answer /v1/completions in JSON: '<html>Welcome to nginx.*Is the URL that of a vLLM",
    ):
        teacher.score(TOKEN_IDS[:1], PROMPT_LENS[:1])


def test_an_answer_in_json_that_is_no_list_of_models_is_refused(server, connect):
    server.always = (200, '{"status": "ok"}')
    with pytest.raises(TeacherError, match=f"teacher 'general' at {server.url} does not say which model it serves"):
        connect(server)


def test_an_answer_without_end_is_cut_off(server, connect, monkeypatch):
    monkeypatch.setattr("camopd.teachers.vllm.transports.BYTES_PER_LOGPROB", 1)
    teacher = connect(server)
    server.answers.append((200, " " * 1_000_000))
    with pytest.raises(
        TeacherError, match=r"answered more than 65542 bytes, which no answer to /v1/completions needs"
    ):
        teacher.score(TOKEN_IDS[:1], PROMPT_LENS[:1])


def test_one_log_prob_too_few_is_refused_with_both_counts(server, connect):
    teacher = connect(server)
    server.edit = lambda entries, ids: entries[:-1]
    with pytest.raises(TeacherError, match=rf"'general' at {server.url} scored 5 of 6 tokens. Is this a vLLM server"):
        teacher.score(TOKEN_IDS[:1], PROMPT_LENS[:1])


def test_one_compact_log_prob_too_few_is_refused_with_both_counts(start_server, connect):
    server = start_server(compact=True)
    teacher = connect(server)
    server.edit_logps = lambda logps, body: logps[:-1]
    with pytest.raises(TeacherError, match=rf"'general' at {server.url} scored 4 completion tokens with 3 log-probs"):
        teacher.score(TOKEN_IDS[:1], PROMPT_LENS[:1])


def npy(array, **kwargs):
    with io.BytesIO() as buffer:
        np.save(buffer, array, **kwargs)
        return base64.b64encode(buffer.getvalue()).decode()


def zipped():
    with io.BytesIO() as buffer:
        np.savez(buffer, np.zeros((4, 1), np.float32))
        return base64.b64encode(buffer.getvalue()).decode()


def promising_much():
    """A header for 10^15 numbers, and four of them."""
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000000, 1), }"
    data = b"\x93NUMPY\x01\x00" + (len(header) + 1).to_bytes(2, "little") + header + b"\n" + bytes(16)
    return base64.b64encode(data).decode()


@pytest.mark.parametrize(
    "text",
    [
        *(None, "not base64!", "AAAA", 7, zipped(), promising_much()),
        *(npy(np.array([["a"]] * 4)), npy(np.zeros((4, 1))), npy(np.zeros(4, np.float32))),
    ],
    ids=["nothing", "no base64", "short", "number", "zip", "too much", "text", "float64", "no second axis"],
)
def test_a_compact_answer_without_the_array_asked_for_is_refused(start_server, connect, text):
    server = start_server(compact=True)
    teacher = connect(server)
    server.edit_answer = lambda answer: {**answer, "prompt_token_id_logprobs": text}
    with pytest.raises(TeacherError, match="scored 4 completion tokens with no array of them"):
        teacher.score(TOKEN_IDS[:1], PROMPT_LENS[:1])


@pytest.mark.parametrize("text", [zipped(), promising_much()])
def test_a_strange_answer_to_the_probe_gets_json(start_server, connect, text):
    server = start_server(compact=True)
    server.edit_answer = lambda answer: {**answer, "prompt_token_id_logprobs": text}
    assert connect(server).transports == {server.url: "JSON"}


@pytest.mark.parametrize("value", ["abc", [1], {"a": 1}])
def test_log_probs_that_are_no_numbers_are_a_teacher_error(server, connect, value):
    teacher = connect(server)

    def edit(entries, ids):
        entries[3][str(ids[3])]["logprob"] = value
        return entries

    server.edit = edit
    with pytest.raises(TeacherError, match=rf"'general' at {server.url} "):
        teacher.score(TOKEN_IDS[:1], PROMPT_LENS[:1])


@pytest.mark.parametrize(
    "answer", [[], 7, {"choices": 7}, {"choices": [7]}, {"choices": [{"index": 0, "prompt_logprobs": 7}]}]
)
def test_json_of_another_shape_is_a_teacher_error(server, connect, answer):
    teacher = connect(server)
    server.answers.append((200, json.dumps(answer)))
    with pytest.raises(TeacherError, match=rf"'general' at {server.url} "):
        teacher.score(TOKEN_IDS[:1], PROMPT_LENS[:1])


def test_nothing_in_an_answer_is_unpickled(start_server, connect):
    pickled = npy(np.array([[print]], dtype=object), allow_pickle=True)
    server = start_server(compact=True)
    teacher = connect(server)
    server.edit_answer = lambda answer: {**answer, "prompt_token_id_logprobs": pickled}
    with pytest.raises(TeacherError, match="with no array"):
        teacher.score(TOKEN_IDS[:1], PROMPT_LENS[:1])


def test_a_server_that_ignores_prompt_logprobs_is_refused(server, connect):
    teacher = connect(server)
    server.edit = lambda entries, ids: None
    with pytest.raises(TeacherError, match=r"scored 0 of 6 tokens.*Others ignore prompt_logprobs"):
        teacher.score(TOKEN_IDS[:1], PROMPT_LENS[:1])


def test_answers_in_another_order_are_put_right_or_refused(server, connect, local_scores, monkeypatch):
    monkeypatch.setattr("camopd.teachers.limits.REQUESTS_PER_REPLICA", 1)  # all rows in one request
    teacher = connect(server)
    server.edit_answer = lambda answer: {**answer, "choices": answer["choices"][::-1]}  # with their numbers
    assert_same_scores(teacher.score(TOKEN_IDS, PROMPT_LENS), local_scores())

    def renumber(answer):
        choices = answer["choices"][::-1]
        return {**answer, "choices": [{**choice, "index": index} for index, choice in enumerate(choices)]}

    server.edit_answer = renumber
    with pytest.raises(TeacherError, match=r"scored 3 of 9 tokens|gave no log-prob for a token it was asked to score"):
        teacher.score(TOKEN_IDS, PROMPT_LENS)


def test_answers_for_other_tokens_are_refused(server, connect):
    teacher = connect(server)
    server.edit = lambda entries, ids: [*entries[:4], entries[5], entries[4]] if ids == TOKEN_IDS[0] else entries
    with pytest.raises(TeacherError, match=r"gave no log-prob for a token it was asked to score \(KeyError: '7'\)"):
        teacher.score([TOKEN_IDS[0]], [2])


def test_a_compact_answer_to_another_request_is_refused(start_server, connect):
    server = start_server(compact=True)
    teacher = connect(server)
    server.edit_answer = lambda answer: {**answer, "request_id": "generate-tokens-another"}
    with pytest.raises(TeacherError, match=r"answered request 'generate-tokens-another' when asked '[0-9a-f]{32}'"):
        teacher.score(TOKEN_IDS[:1], PROMPT_LENS[:1])


@both_transports
def test_an_answer_of_another_model_is_refused(start_server, connect, compact):
    server = start_server(compact=compact)
    teacher = connect(server)
    server.edit_answer = lambda answer: {**answer, "model": "another-model"}
    with pytest.raises(TeacherError, match=rf"at {server.url} answered as 'another-model' and not as 'tiny-teacher'"):
        teacher.score(TOKEN_IDS[:1], PROMPT_LENS[:1])


def lose_token(entries, ids):
    """The third token of the prompt + completion has no entry of its own."""
    del entries[2][str(ids[2])]


def make_null(entries, ids):
    """NaN, which JSON cannot say."""
    entries[2][str(ids[2])]["logprob"] = None


def make_minus_infinite(entries, ids):
    """As vLLM writes it."""
    entries[2][str(ids[2])]["logprob"] = -9999.0


@pytest.mark.parametrize("top_k", [0, 2])
@pytest.mark.parametrize("damage", [make_null, make_minus_infinite])
def test_null_and_infinite_log_probs_are_refused_with_rows_and_count(server, connect, damage, top_k):
    teacher = connect(server)

    def edit(entries, ids):
        if ids in (TOKEN_IDS[2], TOKEN_IDS[4]):
            damage(entries, ids)
        return entries

    server.edit = edit
    with pytest.raises(
        TeacherError,
        match=r"'general' \(tiny-teacher\) answered [0-9] missing or non-finite log-probs in rows \[2, 4\] of 5",
    ):
        teacher.score(TOKEN_IDS, PROMPT_LENS, top_k)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_compact_nan_and_infinity_are_refused_with_rows_and_count(start_server, connect, value):
    server = start_server(compact=True)
    teacher = connect(server)

    def edit(logps, body):
        if body["token_ids"] in (TOKEN_IDS[2], TOKEN_IDS[4]):
            logps[1, 0] = value
        return logps

    server.edit_logps = edit
    with pytest.raises(TeacherError, match=r"answered 2 missing or non-finite log-probs in rows \[2, 4\] of 5"):
        teacher.score(TOKEN_IDS, PROMPT_LENS)


@pytest.mark.parametrize("top_k", [0, 2])
def test_a_token_without_an_entry_is_refused(server, connect, top_k):
    teacher = connect(server)

    def edit(entries, ids):
        lose_token(entries, ids)
        return entries

    server.edit = edit
    with pytest.raises(TeacherError, match=r"gave no log-prob for a token it was asked to score \(KeyError"):
        teacher.score([TOKEN_IDS[2]], [1], top_k)


def test_a_null_log_prob_in_the_prompt_does_not_matter(server, connect, local_scores):
    teacher = connect(server)

    def edit(entries, ids):
        if ids == TOKEN_IDS[1]:  # 4 prompt tokens
            make_null(entries, ids)
        return entries

    server.edit = edit
    assert_same_scores(teacher.score(TOKEN_IDS, PROMPT_LENS), local_scores())


def test_one_row_that_fails_for_good_does_not_wait_for_the_others(server, connect):
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


def test_a_teacher_error_is_a_camopd_error():
    assert issubclass(TeacherError, CaMOPDError)


# --- start -------------------------------------------------------------------------------------------------------


def test_a_server_with_another_model_than_the_config_names_is_refused(server):
    with pytest.raises(
        TeacherError, match=rf"'general' at {server.url} serves 'tiny-teacher', and the config wants 'Qwen/Qwen3-8B'\."
    ):
        ServerTeacher([server.url], "general", model="Qwen/Qwen3-8B")
    server.root = "Qwen/Qwen3-8B"  # under another name
    ServerTeacher([server.url], "general", model="Qwen/Qwen3-8B").close()


def test_replicas_with_different_models_are_refused_with_who_serves_what(start_server, connect):
    first, second = start_server(), start_server(name="another-model")
    with pytest.raises(
        TeacherError,
        match=f"replicas of teacher 'general' serve different models: {first.url} serves 'tiny-teacher', "
        f"{second.url} serves 'another-model'",
    ):
        connect(first, second)


def test_a_context_without_room_for_the_token_vllm_generates_is_refused(start_server, connect):
    teacher = connect(start_server(max_model_len=101), start_server(max_model_len=200))
    teacher.check_context(100)  # the shortest replica counts: 100 + 1 fit into 101
    with pytest.raises(
        TeacherError,
        match=r"takes sequences of 101 tokens, but max_prompt_length \+ max_completion_length \+ 1 is 102\. Start it "
        r"with --max-model-len 102 \(`camopd serve` with the lengths of the run\), or lower max_completion_length",
    ):
        teacher.check_context(101)


def test_a_server_that_tells_no_context_is_taken(start_server, connect):
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


# --- keys --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_gets_the_hint_where_to_set_it(server, connect, status):
    server.always = (status, '{"error": "Unauthorized"}')
    with pytest.raises(
        TeacherError,
        match=rf"answered {status}: .*Unauthorized.* Set CAMOPD_TEACHER_API_KEY_GENERAL or CAMOPD_TEACHER_API_KEY to",
    ):
        connect(server)
    assert len(server.requests) == 1


def test_other_refusals_get_no_hint_about_the_key(server, connect):
    server.always = (404, "Not Found")
    with pytest.raises(TeacherError, match="answered 404: Not Found") as raised:
        connect(server)
    assert "API_KEY" not in str(raised.value)


@both_transports
def test_the_key_is_sent_as_a_bearer_token_with_every_request(start_server, connect, monkeypatch, compact):
    monkeypatch.setenv("CAMOPD_TEACHER_API_KEY", "sk-secret\n")
    server = start_server(compact=compact)
    teacher = connect(server)
    teacher.ask("/tokenize", {"prompt": "a"})
    teacher.score(TOKEN_IDS, PROMPT_LENS)
    assert {path for path, _, _ in server.requests} >= {"/v1/models", "/tokenize", "/inference/v1/generate"}
    assert {headers.get("Authorization") for _, headers, _ in server.requests} == {"Bearer sk-secret"}


def test_a_branch_may_have_a_key_of_its_own(server, connect, monkeypatch):
    monkeypatch.setenv("CAMOPD_TEACHER_API_KEY", "sk-common")
    monkeypatch.setenv("CAMOPD_TEACHER_API_KEY_ROLE_PLAY", "sk-own")
    connect(server, branch="role-play")
    assert {headers["Authorization"] for _, headers, _ in server.requests} == {"Bearer sk-own"}
    server.requests.clear()
    connect(server)
    assert {headers["Authorization"] for _, headers, _ in server.requests} == {"Bearer sk-common"}


def test_without_a_key_no_authorization_is_sent(server, connect):
    connect(server)
    assert "Authorization" not in server.requests[0][1]


@pytest.mark.parametrize(
    "fault", ["401", "500", "not JSON", "echo", "half", "nothing listening", "line break in the key"]
)
def test_the_key_never_appears_in_an_error_or_a_log(server, connect, monkeypatch, caplog, fault):
    monkeypatch.setenv("CAMOPD_TEACHER_API_KEY", "sk-sec\nret" if fault.startswith("line") else "sk-secret")
    if fault == "nothing listening":
        server.close()
    answers = {"echo": (200, '{"headers": "Bearer sk-secret"}'), "half": (400, "x" * 495 + "sk-secret")}
    refused = (int(fault), "refused sk-secret") if fault.isdigit() else (200, "<html> sk-secret")
    server.always = answers.get(fault, refused)
    with caplog.at_level(logging.DEBUG), pytest.raises((TeacherError, ValueError)) as raised:
        connect(server)
    error = raised.value
    while error is not None:  # a traceback prints the causes too
        assert "sk-sec" not in str(error)
        error = error.__cause__ or error.__context__
    assert "sk-sec" not in caplog.text
