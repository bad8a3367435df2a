"""What a scoring request asks for, and that no answer but its own is taken for it (camopd/teachers/vllm/transports.py)."""

import base64
import io
import json
import math
from collections import deque

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from camopd.teachers import limits
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


floats = st.floats(-100, 0, width=32)
lengths_of_rows = st.lists(st.one_of(st.integers(1, 60), st.integers(1, 3 * limits.TOKENS_PER_REQUEST)), max_size=60)


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
def test_no_replica_ever_has_more_in_flight_than_the_limits_say(lengths, replicas, one_each, more):
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


@settings(deadline=None)
@given(st.data(), st.lists(floats, min_size=1, max_size=8))
def test_a_damaged_array_is_refused_or_is_as_long_as_it_says(data, values):
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
def test_a_json_answer_is_read_token_by_token_in_whatever_order_its_choices_come(case, dice):
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
def test_a_json_answer_for_other_tokens_is_refused(case, data):
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
def test_no_other_json_is_an_answer(answer):
    row = Row(0, [1, 2, 3], 1)
    for request in (json_request("m", [row], 0), json_request("m", [row], 2), compact_request("m", row)):
        with pytest.raises((UnusableAnswer, LookupError, TypeError, AttributeError, ValueError)):
            request.read(answer)


@given(st.integers(0, 3))
def test_an_empty_completion_has_no_scores_and_none_is_missing(top_k):
    scores = no_scores(top_k)
    assert scores.logps.shape == (0,)
    assert (scores.top_logps.shape if top_k else scores.top_logps) == ((0, top_k) if top_k else None)
    assert count_missing(scores) == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -9999.0])
def test_missing_log_probs_are_counted_in_both_parts(value):
    ids = torch.zeros(2, 1, dtype=torch.long)
    assert count_missing(TokenScores(torch.tensor([value, -1.0]))) == 1
    assert count_missing(TokenScores(torch.tensor([-1.0, value]), ids, torch.tensor([[value], [-1.0]]))) == 2
