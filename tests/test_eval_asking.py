"""Requests to servers of an evaluation (camopd/eval/asking.py)."""

import gzip
import threading
import time

import pytest
from fake_openai import Raw, serving

from camopd.eval.asking import Ended, Line, Unanswered, key_of


def sent(reply, key="a-secret", seconds=30.0, most=1000):
    with serving(lambda body: reply) as server:
        found = Line(key, seconds, most).send(f"{server.url}/chat/completions", {"model": "tiny"})
    assert server.encodings == ["identity"] and server.keys == [key and f"Bearer {key}"]
    return found


def test_line_gives_status_and_text_of_any_reply():
    assert sent(Raw("nö".encode(), 418)) == (418, "nö", "")
    assert sent(Raw(b"\xff"), key=None).text == "\ufffd"


def test_line_reads_nothing_that_is_packed():
    reply = sent(Raw(gzip.compress(b" " * 10**6), headers={"Content-Encoding": "gzip"}))
    assert reply.text == "" and "in Content-Encoding 'gzip', and asked for none" in reply.unread


@pytest.mark.parametrize(("size", "read"), [(1000, True), (1001, False)])
def test_line_stops_reading_where_an_answer_is_longer_than_any_can_be(size, read):
    reply = sent(Raw(b"x" * size))
    assert len(reply.text) == size * read and ("longer than 1000 bytes" in reply.unread) is not read


def test_line_has_one_deadline_for_a_reply_that_comes_byte_by_byte():
    started = time.monotonic()
    with pytest.raises(Unanswered, match="no answer in 0 seconds"):
        sent(Raw(b"x" * 1000, pause=0.05), seconds=0.4)
    assert time.monotonic() - started < 20  # 50 by the server's pace


@pytest.mark.parametrize("reply", [Raw(b"x" * 1000, pause=0.05), None])
def test_line_that_is_ended_waits_for_nothing_and_sends_nothing_more(reply):
    go_on = threading.Event()
    with serving(lambda body: reply or go_on.wait(60) or "late") as server:
        line, found = Line(None, 60), []

        def send():
            with pytest.raises(Ended) as raised:
                line.send(f"{server.url}/chat/completions", {"model": "tiny"})
            found.append(raised)

        threads = [threading.Thread(target=send) for _ in range(3)]
        started = time.monotonic()
        for thread in threads:
            thread.start()
        while len(server.requests) < 3:
            time.sleep(0.01)
        line.end()
        for thread in threads:
            thread.join(60)
        send()
        with pytest.raises(Ended):
            line.wait(60)
        go_on.set()
    assert len(found) == 4 and len(server.requests) == 3 and time.monotonic() - started < 30


def test_line_says_what_stood_in_the_way():
    with pytest.raises(Unanswered, match="ConnectError"):
        Line(None, 5).get("http://127.0.0.1:9/v1/models")
    with pytest.raises(Unanswered, match="InvalidURL"):
        Line(None, 5).get("http://h:port")


@pytest.mark.parametrize(
    ("listing", "said"),
    [
        (Raw(b"no {key}!", 401), r"HTTP 401: no Bearer \*\*\*!"),
        (Raw(b"<html> {key}"), r"not JSON: '<html> Bearer \*\*\*'"),
        (Raw(b"x" * 199 + b"{key}", 500), "x" * 199 + "B$"),
        (Raw(b"[" * 100_000), "not JSON"),
        (Raw(b"", headers={"Content-Encoding": "br"}), "HTTP 200: in Content-Encoding 'br'"),
    ],
)
def test_line_shows_what_came_in_place_of_json_without_the_key(listing, said):
    with serving(lambda body: "", listing=listing) as server, pytest.raises(Unanswered, match=said) as raised:
        Line("a-secret", 30).get(f"{server.url}/models")
    assert "secret" not in str(raised.value)


def test_key_is_cut_out_before_a_text_is_cut_short():
    assert Line("a-secret", 1).shown("x" * 195 + "a-secret") == "x" * 195 + "***"


@pytest.mark.parametrize(
    ("key", "shown"), [("secret", "***: HTTP 500"), ("500", "500: HTTP 500"), (None, "None: HTTP 500")]
)
def test_key_of_a_few_characters_is_a_word_and_no_secret(key, shown):
    assert Line(key, 1).shown(f"{key}: HTTP 500") == shown


def test_key_that_no_header_can_carry_is_refused_and_not_shown(monkeypatch):
    monkeypatch.setenv("KEY", "a-secret\n")
    assert key_of("KEY") == "a-secret"
    monkeypatch.setenv("KEY", " ")
    assert key_of("KEY") is None
    monkeypatch.setenv("KEY", "a-secr\net")
    with pytest.raises(ValueError, match="KEY holds characters that no HTTP header can carry") as raised:
        key_of("KEY")
    assert "secr" not in str(raised.value)
