"""What a scoring request asks for, and that no answer but its own is taken for it (camopd/teachers/vllm/transports.py)."""

import base64
import io
import json
import logging
import math
import re
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_forward, make_model
from fake_vllm import PROMPT_LENS, TOKEN_IDS, assert_same_scores
from hypothesis import given, settings
from hypothesis import strategies as st

from camopd.errors import GuardError, TeacherError
from camopd.guards import settle
from camopd.samples import Sample
from camopd.scoring import Scorer
from camopd.teachers.base import TokenScores
from camopd.teachers.vllm.transports import (
    Row,
    UnusableAnswer,
    compact_request,
    count_missing,
    from_base64_npy,
    group_rows,
    json_request,
    no_scores,
)
from camopd.vllm import limits


floats = st.floats(-100, 0, width=32)
# Few long rows, and many short ones that share requests.
lengths_of_rows = st.tuples(st.integers(0, 80), st.sampled_from([60, 3 * limits.TOKENS_PER_REQUEST])).flatmap(
    lambda case: st.lists(st.integers(1, case[1]), min_size=case[0], max_size=case[0])
)


def rows_of(lengths):
    return [Row(index, range(length), 1) for index, length in enumerate(lengths)]


@settings(deadline=None)
@given(lengths_of_rows, st.integers(1, 4), st.booleans())
def test_group_rows_puts_every_row_in_one_request_of_the_size_that_is_allowed(lengths, replicas, one_each):
    requests = group_rows(rows_of(lengths), replicas, one_each)
    assert sorted(row.index for request in requests for row in request) == list(range(len(lengths)))
    assert all(requests)
    for request in requests:
        assert len(request) == 1 or sum(len(row.token_ids) for row in request) <= limits.TOKENS_PER_REQUEST
        assert len(request) == 1 or not one_each
    in_order = [len(row.token_ids) for request in requests for row in request]
    assert in_order == sorted(lengths, reverse=True)


@settings(deadline=None)
@given(lengths_of_rows.filter(bool), st.integers(1, 4), st.booleans(), st.integers(0, 100))
def test_replicas_never_have_more_in_flight_than_the_limits_say(lengths, replicas, one_each, more):
    """All requests go to the first replica, whose place is taken by the next request when the shortest has its answer."""
    longest = max(lengths) + more
    most = limits.most_tokens_in_flight(len(lengths), longest)
    waiting = deque(
        sum(len(row.token_ids) for row in rows) for rows in group_rows(rows_of(lengths), replicas, one_each)
    )
    in_flight: list[int] = []
    while waiting:
        if len(in_flight) == limits.REQUESTS_PER_REPLICA:
            in_flight.remove(min(in_flight))
        in_flight.append(waiting.popleft())
        assert sum(in_flight) <= most


def encoded(array):
    with io.BytesIO() as buffer:
        np.save(buffer, array, allow_pickle=False)
        return base64.b64encode(buffer.getvalue()).decode()


@given(st.lists(st.floats(width=32), max_size=20))
def test_from_base64_npy_reads_what_numpy_writes_to_the_last_bit(values):
    array = np.array(values, dtype=np.float32)
    found = from_base64_npy(encoded(array[:, None]))
    assert found.tobytes() == array.tobytes()
    assert from_base64_npy(encoded(array)) is None or not values
    assert from_base64_npy(encoded(array[:, None].astype(np.float64))) is None


@settings(deadline=None)
@given(st.one_of(st.text(), st.binary().map(lambda data: base64.b64encode(data).decode()), st.integers(), st.none()))
def test_from_base64_npy_takes_nothing_else_for_an_array(text):
    assert from_base64_npy(text) is None


def with_header(text):
    return base64.b64encode(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()).decode()


@pytest.mark.parametrize("header", ["{", "{'descr': '<f4', (", "(" * 9000 + ")" * 9000, "1L" * 20, "'\\N{x}'", "\0"])
def test_from_base64_npy_takes_no_strange_header_for_that_of_an_array(header):
    assert from_base64_npy(with_header(header)) is None


@settings(deadline=None)
@given(st.data(), st.lists(floats, min_size=1, max_size=8))
def test_damaged_array_is_refused_or_is_as_long_as_it_says(data, values):
    raw = bytearray(base64.b64decode(encoded(np.array(values, dtype=np.float32)[:, None])))
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))]
    found = from_base64_npy(base64.b64encode(raw).decode())
    assert found is None or len(found) == len(values)


@st.composite
def rows_with_scores(draw):
    """Rows, the log-probs of their completions, and for each token of the whole rows `top_k` rivals with theirs."""
    top_k = draw(st.integers(0, 3))
    rows, logps, tops = [], [], []
    for index in range(draw(st.integers(1, 4))):
        ids = draw(st.lists(st.integers(0, 50), min_size=2, max_size=8))
        rows.append(Row(index, ids, draw(st.integers(1, len(ids) - 1))))
        logps.append([draw(floats) for _ in ids])
        tops.append([[(100 + rank, draw(floats)) for rank in range(top_k)] for _ in ids])
    return rows, logps, tops, top_k


def json_answer(rows, logps, tops):
    """As vLLM writes it: the token itself first, then the likeliest, with their ranks."""
    choices = []
    for row, values, rivals in zip(rows, logps, tops, strict=True):
        entries = [None]
        for token, value, others in list(zip(row.token_ids, values, rivals, strict=True))[1:]:
            entry = {str(token): {"logprob": value, "rank": 50}}
            entry |= {str(other): {"logprob": logp, "rank": rank} for rank, (other, logp) in enumerate(others, 1)}
            entries.append(entry)
        choices.append({"index": row.index, "prompt_logprobs": entries})
    return json.loads(json.dumps({"choices": choices}))


@settings(deadline=None)
@given(rows_with_scores(), st.randoms())
def test_json_answer_is_read_token_by_token_in_whatever_order_its_choices_come(case, dice):
    rows, logps, tops, top_k = case
    answer = json_answer(rows, logps, tops)
    dice.shuffle(answer["choices"])
    for row, scores, values, rivals in zip(
        rows, json_request("m", rows, top_k).read(answer), logps, tops, strict=True
    ):
        assert scores.logps.tolist() == values[row.prompt_len :]
        if top_k:
            expected = rivals[row.prompt_len :]
            assert scores.top_ids.tolist() == [[token for token, _ in others] for others in expected]
            assert scores.top_logps.tolist() == [[logp for _, logp in others] for others in expected]
        else:
            assert scores.top_ids is None


@settings(deadline=None)
@given(rows_with_scores(), st.data())
def test_json_answer_for_other_tokens_is_refused(case, data):
    rows, logps, tops, top_k = case
    answer = json_answer(rows, logps, tops)
    row = data.draw(st.sampled_from(rows))
    place = data.draw(st.integers(row.prompt_len, len(row.token_ids) - 1))
    entries = answer["choices"][row.index]["prompt_logprobs"]
    entries[place] = {"99": {"logprob": -1.0, "rank": 1}}
    with pytest.raises(UnusableAnswer, match="gave no log-prob for a token it was asked to score"):
        json_request("m", rows, top_k).read(answer)
    del entries[place]
    with pytest.raises(UnusableAnswer, match=rf"scored {len(row.token_ids) - 1} of {len(row.token_ids)} tokens"):
        json_request("m", rows, top_k).read(answer)
    del answer["choices"][row.index]
    with pytest.raises(UnusableAnswer, match=rf"answered {len(rows) - 1} of {len(rows)} sequences"):
        json_request("m", rows, top_k).read(answer)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["choices", "request_id", "prompt_token_id_logprobs"]), anything))
def test_json_of_another_form_is_not_an_answer(answer):
    row = Row(0, [1, 2, 3], 1)
    for request in (json_request("m", [row], 0), json_request("m", [row], 2), compact_request("m", row)):
        with pytest.raises((UnusableAnswer, LookupError, TypeError, AttributeError, ValueError)):
            request.read(answer)


@given(st.integers(0, 3))
def test_empty_completion_has_no_scores_and_none_is_missing(top_k):
    scores = no_scores(top_k)
    assert scores.logps.shape == (0,)
    assert (scores.top_logps.shape if top_k else scores.top_logps) == ((0, top_k) if top_k else None)
    assert count_missing(scores) == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -9999.0])
def test_missing_log_probs_are_counted_in_both_parts(value):
    ids = torch.zeros(2, 1, dtype=torch.long)
    assert count_missing(TokenScores(torch.tensor([value, -1.0]))) == 1
    assert count_missing(TokenScores(torch.tensor([-1.0, value]), ids, torch.tensor([[value], [-1.0]]))) == 2


# --- with a server of fake_vllm.py --------------------------------------------------------------------------------------


both_transports = pytest.mark.parametrize("compact", [True, False], ids=["compact", "JSON"])


def test_answer_recorded_from_vllms_own_classes_is_read_to_the_last_bit(start_server, connect):
    recorded = json.loads((Path(__file__).parent / "recorded_generate.json").read_text())
    server = start_server(compact=True)
    teacher = connect(server)
    server.edit_answer = lambda answer: {**recorded["answer"], "request_id": answer["request_id"]}
    (score,) = teacher.score([recorded["request"]["token_ids"]], [3])
    assert torch.equal(score.logps, -torch.arange(1, 4, dtype=torch.float32) / 7)
    (asked,) = server.scored  # tests/test_vllm.py has vLLM's own classes validate the recorded request
    assert {**asked, "request_id": None} == {**recorded["request"], "request_id": None}


def test_json_request_asks_for_no_more_than_the_score_needs(server, connect):
    connect(server).score([TOKEN_IDS[0]], [2])
    (body,) = server.scored
    assert body == {
        "model": "tiny-teacher", "prompt": [TOKEN_IDS[0]], "prompt_logprobs": 0, "max_tokens": 1, "temperature": 1.0,
        "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
    }  # fmt: skip


def test_compact_request_scores_the_completion_only(start_server, connect):
    server = start_server(compact=True)
    connect(server).score([TOKEN_IDS[0]], [2])
    (body,) = server.scored
    assert body["token_ids"] == TOKEN_IDS[0]
    assert body["sampling_params"]["prompt_logprob_token_ids"] == [[12], [30], [7], [8]]
    assert body["sampling_params"]["prompt_logprob_start"] == 1
    assert body["sampling_params"]["temperature"] == 1.0
    assert "prompt_logprobs" not in body["sampling_params"]


def test_transport_of_each_server_is_logged(start_server, connect, caplog):
    compact, plain = start_server(compact=True), start_server()
    with caplog.at_level(logging.INFO, logger="camopd"):
        teacher = connect(compact, plain)
    assert teacher.transports == {compact.url: "compact", plain.url: "JSON"}
    assert f"{compact.url} serves 'tiny-teacher', transport compact" in caplog.text
    assert f"{plain.url} serves 'tiny-teacher', transport JSON" in caplog.text


@pytest.mark.parametrize("status", [400, 403, 404, 500])
def test_servers_that_refuse_the_compact_request_get_json(start_server, connect, local_scores, status):
    server = start_server(compact=True)
    plain = server.answer
    server.answer = lambda path, body: (status, "no") if path == "/inference/v1/generate" else plain(path, body)
    teacher = connect(server)
    assert teacher.transports == {server.url: "JSON"}
    assert_same_scores(teacher.score(TOKEN_IDS, PROMPT_LENS), local_scores())


def test_server_that_ignores_the_compact_fields_gets_json(start_server, connect):
    server = start_server(compact=True)
    server.edit_answer = lambda answer: {**answer, "prompt_token_id_logprobs": None}
    assert connect(server).transports == {server.url: "JSON"}


def test_short_sequences_share_a_request_up_to_the_token_budget(server, connect, local_scores, monkeypatch):
    monkeypatch.setattr("camopd.vllm.limits.REQUESTS_PER_REPLICA", 1)
    monkeypatch.setattr("camopd.vllm.limits.TOKENS_PER_REQUEST", 9)
    assert_same_scores(connect(server).score(TOKEN_IDS, PROMPT_LENS), local_scores())
    # Longest first: 9 tokens fill a request; 6 + 3 another; 3 are left.
    assert [body["prompt"] for body in server.scored] == [[TOKEN_IDS[1]], [TOKEN_IDS[0], TOKEN_IDS[2]], [TOKEN_IDS[4]]]


def test_sequence_longer_than_the_budget_goes_alone(server, connect, local_scores, monkeypatch):
    monkeypatch.setattr("camopd.vllm.limits.TOKENS_PER_REQUEST", 2)
    assert_same_scores(connect(server).score(TOKEN_IDS, PROMPT_LENS), local_scores())
    asked = [TOKEN_IDS[row] for row in (0, 1, 2, 4)]  # row 3 has no completion
    assert sorted(body["prompt"] for body in server.scored) == sorted([ids] for ids in asked)


def test_log_probs_one_too_few_are_refused_with_both_counts(server, connect):
    teacher = connect(server)
    server.edit = lambda entries, ids: entries[:-1]
    with pytest.raises(TeacherError, match=rf"'general' at {server.url} scored 5 of 6 tokens. Is this a vLLM server"):
        teacher.score(TOKEN_IDS[:1], PROMPT_LENS[:1])


def test_compact_log_probs_one_too_few_are_refused_with_both_counts(start_server, connect):
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
def test_compact_answer_without_the_array_asked_for_is_refused(start_server, connect, text):
    server = start_server(compact=True)
    teacher = connect(server)
    server.edit_answer = lambda answer: {**answer, "prompt_token_id_logprobs": text}
    with pytest.raises(TeacherError, match="scored 4 completion tokens with no array of them"):
        teacher.score(TOKEN_IDS[:1], PROMPT_LENS[:1])


@pytest.mark.parametrize("text", [zipped(), promising_much()])
def test_strange_answer_to_the_probe_gets_json(start_server, connect, text):
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


def test_answers_are_never_unpickled(start_server, connect):
    pickled = npy(np.array([[print]], dtype=object), allow_pickle=True)
    server = start_server(compact=True)
    teacher = connect(server)
    server.edit_answer = lambda answer: {**answer, "prompt_token_id_logprobs": pickled}
    with pytest.raises(TeacherError, match="with no array"):
        teacher.score(TOKEN_IDS[:1], PROMPT_LENS[:1])


def test_server_that_ignores_prompt_logprobs_is_refused(server, connect):
    teacher = connect(server)
    server.edit = lambda entries, ids: None
    with pytest.raises(TeacherError, match=r"scored 0 of 6 tokens.*Others ignore prompt_logprobs"):
        teacher.score(TOKEN_IDS[:1], PROMPT_LENS[:1])


def test_answers_in_another_order_are_put_right_or_refused(server, connect, local_scores, monkeypatch):
    monkeypatch.setattr("camopd.vllm.limits.REQUESTS_PER_REPLICA", 1)  # all rows in one request
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


def test_compact_answer_to_another_request_is_refused(start_server, connect):
    server = start_server(compact=True)
    teacher = connect(server)
    server.edit_answer = lambda answer: {**answer, "request_id": "generate-tokens-another"}
    with pytest.raises(TeacherError, match=r"answered request 'generate-tokens-another' when asked '[0-9a-f]{32}'"):
        teacher.score(TOKEN_IDS[:1], PROMPT_LENS[:1])


@both_transports
def test_answer_of_another_model_is_refused(start_server, connect, compact):
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
def test_token_without_an_entry_is_refused(server, connect, top_k):
    teacher = connect(server)

    def edit(entries, ids):
        lose_token(entries, ids)
        return entries

    server.edit = edit
    with pytest.raises(TeacherError, match=r"gave no log-prob for a token it was asked to score \(KeyError"):
        teacher.score([TOKEN_IDS[2]], [1], top_k)


def test_null_log_prob_in_the_prompt_does_not_matter(server, connect, local_scores):
    teacher = connect(server)

    def edit(entries, ids):
        if ids == TOKEN_IDS[1]:  # 4 prompt tokens
            make_null(entries, ids)
        return entries

    server.edit = edit
    assert_same_scores(teacher.score(TOKEN_IDS, PROMPT_LENS), local_scores())


@both_transports
@pytest.mark.parametrize("value", [0.5, 1e30, 0.0101])
def test_log_prob_above_0_stops_the_run_as_the_guards_threshold_says(start_server, connect, compact, value):
    server = start_server(compact=compact)
    teacher = connect(server)
    server.edit = change(4, value)
    server.edit_logps = lambda logps, body: np.array([*logps[:2, 0], value, *logps[3:, 0]], "<f4")[:, None]
    completion = len(TOKEN_IDS[0]) - PROMPT_LENS[0]
    mask = torch.ones(completion, dtype=torch.bool)
    sample = Sample("general", 4, TOKEN_IDS[0], PROMPT_LENS[0], mask, completion, False)

    def score(**guards):
        scorer = Scorer(make_forward(make_model(1)), {"general": teacher}, 2, list, settle(guards))
        scorer.score([sample], ["general"])

    with pytest.raises(
        GuardError,
        match=rf"'general' \({server.url}\) gave 1 of {completion} tokens of sample 4 .* up to "
        rf"{re.escape(f'{np.float32(value):g}')}: .*--logprobs-mode raw_logprobs",
    ):
        score()
    score(log_prob=1e31)
    score(log_prob=None)
    assert sample.teacher_logps[2] == np.float32(value)


def change(place, value):
    """Another log-prob for a token of the first sequence."""

    def edit(entries, ids):
        if ids == TOKEN_IDS[0]:
            entries[place][str(ids[place])]["logprob"] = value
        return entries

    return edit


@both_transports
def test_log_prob_above_0_by_rounding_is_taken(start_server, connect, compact):
    server = start_server(compact=compact)
    server.edit = change(4, 0.007)
    server.edit_logps = lambda logps, body: np.full_like(logps, 0.007)
    (score,) = connect(server).score(TOKEN_IDS[:1], PROMPT_LENS[:1])
    assert score.logps[2] == np.float32(0.007)


@pytest.mark.parametrize("top_k", [0, 2])
@pytest.mark.parametrize("value", [True, False, "-0.5", [-0.5]])
def test_json_value_that_is_not_a_number_is_refused_with_server_token_and_value(server, connect, value, top_k):
    teacher = connect(server)
    server.edit = change(3, value)
    with pytest.raises(
        TeacherError,
        match=rf"'general' at {server.url} gave {re.escape(repr(value))} as a log-prob of token 1 \(id 30\) of the "
        "completion in row 0, which is not a number",
    ):
        teacher.score(TOKEN_IDS[:1], PROMPT_LENS[:1], top_k)


@both_transports
def test_missing_log_prob_is_named_with_its_server_token_and_value(start_server, connect, compact):
    server = start_server(compact=compact)
    teacher = connect(server)
    server.edit = change(3, None)
    server.edit_logps = lambda logps, body: np.array([logps[0, 0], math.nan, *logps[2:, 0]], "<f4")[:, None]
    with pytest.raises(
        TeacherError, match=rf"in rows \[0\] of 1, the first nan for token 1 .* in row 0 from {server.url}\. Look at"
    ):
        teacher.score(TOKEN_IDS[:1], PROMPT_LENS[:1])


@pytest.mark.parametrize("literal", ["NaN", "-Infinity", "Infinity", "1e999"])
def test_number_that_json_does_not_have_is_shown_in_the_error(server, connect, literal, monkeypatch):
    monkeypatch.setattr("camopd.vllm.limits.ATTEMPTS", 1)
    teacher = connect(server)
    server.answers.append((200, f'{{"choices": [{{"index": 0, "prompt_logprobs": [{literal}]}}]}}'))
    with pytest.raises(TeacherError, match=rf"at {server.url} .*|{server.url} did not answer .*{literal[-8:]}"):
        teacher.score(TOKEN_IDS[:1], PROMPT_LENS[:1])


def test_fewer_likeliest_tokens_than_asked_for_are_refused(server, connect):
    teacher = connect(server)
    server.edit = lambda entries, ids: [entry and dict(list(entry.items())[:1]) for entry in entries]
    with pytest.raises(TeacherError, match=rf"at {server.url} gave 1 of the 2 likeliest tokens of token 0 \(id 12\)"):
        teacher.score(TOKEN_IDS[:1], PROMPT_LENS[:1], top_k=2)
