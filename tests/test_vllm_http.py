"""Requests to a server: keys, and whatever may answer (camopd/vllm/http.py)."""

import gzip
import json
import logging
import socket
import threading
import time
import tracemalloc
from contextlib import contextmanager, suppress
from pathlib import Path

import certifi
import httpx
import pytest
from fake_vllm import PROMPT_LENS, TOKEN_IDS, assert_same_scores

from camopd.errors import TeacherError
from camopd.vllm.http import Client, teacher_role


both_transports = pytest.mark.parametrize("compact", [True, False], ids=["compact", "JSON"])


def test_url_may_end_in_a_slash_or_v1(server, connect, local_scores):
    for end in ("/", "/v1", "/v1/"):
        assert_same_scores(connect(server.url + end).score(TOKEN_IDS, PROMPT_LENS), local_scores())


@both_transports
def test_400_fails_at_once_with_the_servers_own_words(start_server, connect, compact):
    server = start_server(compact=compact)
    teacher = connect(server)
    server.answers.append((400, '{"error": {"message": "prompt_logprobs is disabled here"}}'))
    with pytest.raises(
        TeacherError, match=rf"'general' at {server.url}.* answered 400: .*prompt_logprobs is disabled"
    ):
        teacher.score(TOKEN_IDS[:1], PROMPT_LENS[:1])
    assert len(server.scored) == 1


def test_url_where_nothing_listens_is_a_teacher_error_that_names_it(server, connect):
    server.close()  # now the port is free
    started = time.monotonic()
    with pytest.raises(
        TeacherError, match=rf"teacher 'domain' at {server.url} does not answer \(ConnectError.*vllm serve"
    ):
        connect(server, branch="domain")
    assert time.monotonic() - started < 5


def test_server_that_accepts_and_never_answers_is_an_error_after_five_seconds(server, connect):
    server.always = "hang"
    started = time.monotonic()
    with pytest.raises(TeacherError, match=rf"{server.url} did not answer /v1/models in 5 seconds"):
        connect(server)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    "url",
    ["http://", "http://host:port", "http://host:99999", "http://host:-1", "ftp://host", "http://[::1", "host:80"],
)
def test_url_of_no_server_is_refused(connect, url):
    with pytest.raises(TeacherError, match=r"that is not the URL of a server\. Write http://host:port"):
        connect(url)


def test_password_in_a_url_is_refused_and_not_shown(connect):
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


def test_answer_that_is_not_json_is_refused_with_its_beginning(server, connect, monkeypatch):
    teacher = connect(server)
    server.answers.extend([(200, "<html>Welcome to nginx</html>")] * 10)
    with pytest.raises(
        TeacherError,
        match=r"did not answer /v1/completions in JSON: '<html>Welcome to nginx.*Is the URL that of a vLLM",
    ):
        teacher.score(TOKEN_IDS[:1], PROMPT_LENS[:1])


def test_answer_in_json_that_is_no_list_of_models_is_refused(server, connect):
    server.always = (200, '{"status": "ok"}')
    with pytest.raises(TeacherError, match=f"teacher 'general' at {server.url} does not say which model it serves"):
        connect(server)


def test_answer_without_end_is_cut_off(server, connect, monkeypatch):
    monkeypatch.setattr("camopd.teachers.vllm.transports.BYTES_PER_LOGPROB", 1)
    teacher = connect(server)
    server.answers.append((200, " " * 1_000_000))
    with pytest.raises(
        TeacherError, match=r"answered more than 65542 bytes, which no answer to /v1/completions needs"
    ):
        teacher.score(TOKEN_IDS[:1], PROMPT_LENS[:1])


@pytest.mark.parametrize("status", [401, 403])
def test_refused_key_gets_the_hint_where_to_set_it(server, connect, status):
    server.always = (status, '{"error": "Unauthorized"}')
    with pytest.raises(
        TeacherError,
        match=rf"answered {status}: .*Unauthorized.* Set CAMOPD_TEACHER_API_KEY_GENERAL or CAMOPD_TEACHER_API_KEY to",
    ):
        connect(server)
    assert len(server.requests) == 1


def test_refusals_for_other_reasons_get_no_hint_about_the_key(server, connect):
    server.always = (404, "Not Found")
    with pytest.raises(TeacherError, match="answered 404: Not Found") as raised:
        connect(server)
    assert "API_KEY" not in str(raised.value)


@both_transports
def test_key_is_sent_as_a_bearer_token_with_every_request(start_server, connect, monkeypatch, compact):
    monkeypatch.setenv("CAMOPD_TEACHER_API_KEY", "sk-secret\n")
    server = start_server(compact=compact)
    teacher = connect(server)
    teacher.ask("/tokenize", {"prompt": "a"})
    teacher.score(TOKEN_IDS, PROMPT_LENS)
    assert {path for path, _, _ in server.requests} >= {"/v1/models", "/tokenize", "/inference/v1/generate"}
    assert {headers.get("Authorization") for _, headers, _ in server.requests} == {"Bearer sk-secret"}


def test_branch_may_have_a_key_of_its_own(server, connect, monkeypatch):
    monkeypatch.setenv("CAMOPD_TEACHER_API_KEY", "sk-common")
    monkeypatch.setenv("CAMOPD_TEACHER_API_KEY_ROLE_PLAY", "sk-own")
    connect(server, branch="role-play")
    assert {headers["Authorization"] for _, headers, _ in server.requests} == {"Bearer sk-own"}
    server.requests.clear()
    connect(server)
    assert {headers["Authorization"] for _, headers, _ in server.requests} == {"Bearer sk-common"}


def test_key_that_is_not_set_sends_no_authorization(server, connect):
    connect(server)
    assert "Authorization" not in server.requests[0][1]


@pytest.mark.parametrize(
    "fault", ["401", "500", "not JSON", "echo", "half", "nothing listening", "line break in the key"]
)
def test_key_never_appears_in_an_error_or_a_log(server, connect, monkeypatch, caplog, fault):
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


@contextmanager
def listening(*answers):
    """The URL of a server that sends bytes as they are, to one connection after another; the last again and again."""
    server = socket.create_server(("127.0.0.1", 0))
    sent = []

    def serve():
        left = list(answers)
        with suppress(OSError):
            while True:
                connection, _ = server.accept()
                with connection, suppress(OSError):
                    connection.recv(65536)
                    for part in left.pop(0) if len(left) > 1 else left[0]:
                        connection.sendall(part)
                        sent.append(len(part))

    threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}", sent
    server.close()


def peak_memory(call):
    """Most bytes that Python objects took while `call` ran, above what they took before."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        call()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def packed_twice(megabytes):
    """Some kilobytes, of which as many megabytes become."""
    inner = gzip.compress(bytes(megabytes << 20))
    return gzip.compress(inner)


@pytest.mark.parametrize("encoding", ["gzip, gzip", "gzip", "DEFLATE", "br", "identity, gzip", "no-such-thing"])
def test_answer_that_is_packed_is_refused_before_it_is_unpacked(connect, encoding):
    body = packed_twice(256)
    assert len(body) < 20_000
    head = f"HTTP/1.1 200 OK\r\nContent-Encoding: {encoding}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with listening([head, body]) as (url, _):

        def ask():
            with pytest.raises(
                TeacherError,
                match=rf"'general' at {url} answered /v1/models in Content-Encoding '{encoding.lower()}', asked for none",
            ):
                connect(url)

        assert peak_memory(ask) < 8 << 20  # of 256 MiB


def test_packed_refusal_is_told_by_its_status(connect):
    body = packed_twice(1)
    head = f"HTTP/1.1 403 Forbidden\r\nContent-Encoding: gzip\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with (
        listening([head, body]) as (url, _),
        pytest.raises(TeacherError, match=r"answered 403: in Content-Encoding 'gzip' Set CAMOPD_TEACHER_API_KEY"),
    ):
        connect(url)


def test_requests_ask_for_answers_that_are_not_packed(start_server, connect):
    server = start_server(compact=True)
    connect(server).score(TOKEN_IDS, PROMPT_LENS)
    assert {headers["Accept-Encoding"] for _, headers, _ in server.requests} == {"identity"}


def test_answer_that_goes_on_and_on_takes_no_more_memory_than_its_bound(connect):
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    with listening([head, *[chunk] * 1024]) as (url, sent):

        def ask():
            with pytest.raises(TeacherError, match=rf"at {url} answered more than 4194304 bytes, which no answer to"):
                connect(url)

        assert peak_memory(ask) < 16 << 20  # of 64 MiB: the bound, its copy while it grows, and what is on its way
    assert sum(sent) < 32 << 20


@pytest.mark.parametrize("length", ["2048", True, [1], 1.5, -1])
def test_context_that_is_no_number_is_refused(server, connect, length):
    model = {"id": "tiny-teacher", "max_model_len": length}
    server.always = (200, json.dumps({"data": [model]}))
    if length == -1:  # a number, of which nothing fits
        server.always = None
        server.max_model_len = length
        with pytest.raises(TeacherError, match="takes sequences of -1 tokens"):
            connect(server).check_context(1)
        return
    with pytest.raises(TeacherError, match=f"teacher 'general' at {server.url} does not say which model it serves"):
        connect(server)


SECRET_URLS = [
    "http://127.0.0.1:9/?api_key=sk-secret", "http://127.0.0.1:9?api_key=sk-secret", "http://127.0.0.1:9/v1#sk-secret",
    "http://sk-secret@127.0.0.1:9", "http://user:sk-secret@127.0.0.1:9/v1", "http://user:sk/sk-secret@127.0.0.1:9",
    "http://user:p?sk-secret@127.0.0.1:9", "http://user:p@sk-secret@127.0.0.1:9", "http://user:sk-secret@host:port",
    "http://127.0.0.1:9/v1?token=a@sk-secret", "https://127.0.0.1:9/?a=b&key=sk-secret#x",
]  # fmt: skip


@pytest.mark.parametrize("url", SECRET_URLS)
def test_url_with_more_than_host_and_path_is_refused_and_its_secret_not_shown(connect, url, caplog):
    with caplog.at_level(logging.DEBUG), pytest.raises(TeacherError) as raised:
        connect(url)
    assert "sk-secret" not in str(raised.value) + caplog.text
    assert raised.value.__cause__ is None


def test_certificates_are_read_once_and_anew_where_the_environment_names_others(tmp_path, monkeypatch):
    given, make = [], httpx.AsyncClient
    monkeypatch.setattr(httpx, "AsyncClient", lambda **settings: given.append(settings["verify"]) or make(**settings))
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)

    def trusted():
        Client(teacher_role("general"))
        return given[-1]

    assert trusted() is trusted() and len(given[0].get_ca_certs()) > 1
    end = "-----END CERTIFICATE-----\n"
    first, _, _ = Path(certifi.where()).read_text(encoding="utf-8").partition(end)
    (tmp_path / "own.pem").write_text(first + end, encoding="utf-8")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "own.pem"))
    assert len(trusted().get_ca_certs()) == 1
    monkeypatch.delenv("SSL_CERT_FILE")
    assert trusted() is given[0]
