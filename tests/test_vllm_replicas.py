"""Several servers of one teacher, which come and go (camopd/vllm/replicas.py). They are those of fake_vllm.py."""

import threading
import time

import pytest
from fake_vllm import PROMPT_LENS, TOKEN_IDS, assert_same_scores

from camopd.errors import TeacherError
from camopd.teachers.vllm.teacher import ServerTeacher


both_transports = pytest.mark.parametrize("compact", [True, False], ids=["compact", "JSON"])


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
    monkeypatch.setattr("camopd.vllm.limits.REQUESTS_PER_REPLICA", 2)
    monkeypatch.setattr("camopd.vllm.limits.TOKENS_PER_REQUEST", 1)
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


def test_replica_that_dies_is_left_out_and_the_others_do_its_work(start_server, connect, local_scores, caplog):
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


def test_replica_that_comes_back_works_again(start_server, connect, local_scores, caplog):
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


def test_replicas_that_are_all_gone_have_the_batch_wait_for_one(start_server, connect, local_scores, caplog):
    server = start_server()
    teacher = connect(server)
    server.before = server.close
    future = teacher.submit(TOKEN_IDS, PROMPT_LENS)
    time.sleep(0.5)
    assert not future.done()
    assert "no replica answers" in caplog.text
    start_server(port=server.port)
    assert_same_scores(future.result(timeout=60), local_scores())


def test_replicas_that_do_not_come_back_in_time_are_an_error_and_a_later_batch_is_scored(
    start_server, connect, local_scores
):
    server = start_server()
    teacher = connect(server, patience=0.3)
    server.before = server.close
    started = time.monotonic()
    for _ in range(2):  # the second finds it gone from the start
        with pytest.raises(
            TeacherError,
            match=rf"'general' has no replica left: {server.url} did not come back in teacher_timeout=0.3 seconds; "
            "the last fault: .*Start the server again, then resume",
        ):
            teacher.score(TOKEN_IDS, PROMPT_LENS)
    assert time.monotonic() - started < 5
    start_server(port=server.port)
    assert_same_scores(teacher.score(TOKEN_IDS, PROMPT_LENS), local_scores())


def test_replica_that_comes_back_with_another_model_stays_out(start_server, connect, local_scores, caplog):
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


def test_replica_that_comes_back_without_the_compact_request_gets_json(start_server, connect, local_scores):
    server = start_server(compact=True)
    teacher = connect(server)
    server.before = server.close
    future = teacher.submit(TOKEN_IDS, PROMPT_LENS)
    assert server.port_is_free.wait(60)
    time.sleep(0.5)  # requests on their way to the old server fail; no vLLM is up again before that
    start_server(port=server.port)
    assert_same_scores(future.result(timeout=60), local_scores())
    assert teacher.transports == {server.url: "JSON"}


@pytest.mark.parametrize("answer", [(500, "oops"), (429, "slow down"), None, "cut"])
def test_fault_is_tried_on_another_replica_first(start_server, connect, local_scores, answer):
    replicas = [start_server(), start_server()]
    teacher = connect(*replicas)
    for replica in replicas:
        replica.answers.append(answer)
    assert_same_scores(teacher.score([TOKEN_IDS[0]], [2]), local_scores()[:1])
    # Whoever was asked first failed, then the other, then the first again.
    assert sorted(len(replica.scored) for replica in replicas) == [1, 2]


@pytest.mark.parametrize("status", [500, 429])
def test_replica_that_always_fails_quickly_does_not_stop_another_that_works_slowly(
    start_server, connect, local_scores, monkeypatch, status
):
    monkeypatch.setattr("camopd.vllm.limits.REQUESTS_PER_REPLICA", 1)
    monkeypatch.setattr("camopd.vllm.limits.TOKENS_PER_REQUEST", 1)
    bad, good = start_server(), start_server()
    teacher = connect(bad, good)
    bad.answers.extend([(status, "oops")] * 1000)
    good.before = lambda: time.sleep(0.2)  # an idle replica that fails is always free, a good one hardly ever
    assert_same_scores(teacher.score(TOKEN_IDS * 3, PROMPT_LENS * 3), local_scores() * 3)


def test_server_with_another_model_than_the_config_names_is_refused(server):
    with pytest.raises(
        TeacherError, match=rf"'general' at {server.url} serves 'tiny-teacher', and the config wants 'Qwen/Qwen3-8B'\."
    ):
        ServerTeacher([server.url], "general", model="Qwen/Qwen3-8B")
    server.root = "Qwen/Qwen3-8B"  # under another name
    ServerTeacher([server.url], "general", model="Qwen/Qwen3-8B").close()


def test_model_that_is_named_is_found_among_several_of_a_server(server, caplog, local_scores):
    """As an adapter beside its base, or behind a gateway."""
    server.others = [{"id": "base", "root": "/models/base", "max_model_len": 99}]
    server.max_model_len = None  # as vLLM says nothing of an adapter's
    teacher = ServerTeacher([server.url], "general", model="tiny-teacher")
    assert_same_scores(teacher.score(TOKEN_IDS, PROMPT_LENS), local_scores())
    assert teacher.max_model_len == 99
    teacher.close()
    assert not caplog.records
    with pytest.raises(TeacherError, match=r"serves 'base', 'tiny-teacher', and the config wants 'other'"):
        ServerTeacher([server.url], "general", model="other")
    first = ServerTeacher([server.url], "general")
    assert first.name == "base" and "the first of several models there: tiny-teacher. Name the one" in caplog.text
    first.close()


def test_replicas_with_different_models_are_refused_with_who_serves_what(start_server, connect):
    first, second = start_server(), start_server(name="another-model")
    with pytest.raises(
        TeacherError,
        match=f"replicas of teacher 'general' serve different models: {first.url} serves 'tiny-teacher', "
        f"{second.url} serves 'another-model'",
    ):
        connect(first, second)
