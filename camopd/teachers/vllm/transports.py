"""What is asked of a vLLM server for log-probs, and how its answer is read. Two transports give the same numbers:

- compact: `/inference/v1/generate` with the ids to score, answered by their float32 log-probs in base64 (vLLM >= 0.32
  with `--enable-scale-out`, on its V2 model runner); some 5 bytes per token. One sequence per request.
- JSON: `/v1/completions` with `prompt_logprobs`, which any vLLM has; 70 to 85 bytes per token. Also where the teacher's
  own top k are asked for, which the compact request cannot.

An answer may be that of any program that listens there: nothing is unpickled, and no number is taken for another's.
"""

from __future__ import annotations

import base64
import io
import math
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...vllm import limits
from ...vllm.http import no_garbage_collection
from ..base import TokenScores


# More than any answer needs (a token's text is spelt out in JSON); what is longer is not an answer.
BYTES_PER_LOGPROB = 1024
MINUS_INF = -9999.0  # how vLLM's JSON says -inf
# Sent with every request, so that a model's own generation_config.json never bends the distribution that is scored.
PLAIN_SAMPLING = {
    "max_tokens": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}


class UnusableAnswer(Exception):
    """An answer that is not the one to the request. The text goes on from "teacher ... at URL"."""


@dataclass(frozen=True)
class Row:
    """A sequence to score: the `index` of its scores in the batch, and prompt + completion."""

    index: int
    token_ids: Sequence[int]
    prompt_len: int


@dataclass(frozen=True)
class Request:
    """A scoring request. `read` turns the answer into the scores of its rows, or raises `UnusableAnswer`; what has quite
    another form may raise anything."""

    path: str
    body: dict[str, Any]
    max_bytes: int
    read: Callable[[dict[str, Any]], list[TokenScores]]


def group_rows(rows: Sequence[Row], replicas: int, one_each: bool) -> list[list[Row]]:
    """Rows for each request, longest first: a long one that starts last would keep everybody waiting.

    `one_each` is for the compact transport. Else a request has no more than `limits.TOKENS_PER_REQUEST`, or one row, and no
    more than gives every one of `replicas` its full number of requests.
    """
    rows = sorted(rows, key=lambda row: -len(row.token_ids))
    places = limits.REQUESTS_PER_REPLICA * replicas
    share = math.ceil(sum(len(row.token_ids) for row in rows) / places)
    budget = 0 if one_each else min(limits.TOKENS_PER_REQUEST, share)
    requests: list[list[Row]] = []
    size = 0
    for row in rows:
        if not requests or size + len(row.token_ids) > budget:
            requests.append([])
            size = 0
        requests[-1].append(row)
        size += len(row.token_ids)
    return requests


def compact_request(model: str, row: Row) -> Request:
    """Row i of `prompt_logprob_token_ids` is scored as prompt token `prompt_logprob_start` + i + 1."""
    scored = np.array(row.token_ids[row.prompt_len :], dtype=np.int64)
    request_id = uuid.uuid4().hex
    sampling = {
        **PLAIN_SAMPLING,
        "prompt_logprob_token_ids": scored[:, None],  # an array is written faster than 32768 small lists
        "prompt_logprob_start": row.prompt_len - 1,
    }

    def read(answer: dict[str, Any]) -> list[TokenScores]:
        if not str(answer.get("request_id")).endswith(request_id):
            raise UnusableAnswer(f"answered request {answer.get('request_id')!r} when asked {request_id!r}")
        logps = from_base64_npy(answer.get("prompt_token_id_logprobs"))
        if logps is None or len(logps) != len(scored):
            found = "no array of them" if logps is None else f"{len(logps)} log-probs"
            raise UnusableAnswer(f"scored {len(scored)} completion tokens with {found}")
        return [to_scores(logps[:, None])]

    body = {"model": model, "request_id": request_id, "token_ids": row.token_ids, "sampling_params": sampling}
    return Request("/inference/v1/generate", body, _max_bytes(len(scored)), read)


def json_request(model: str, rows: Sequence[Row], top_k: int) -> Request:
    """`prompt_logprobs` has one entry per token of a sequence: the token's own log-prob and those of the likeliest."""

    def read(answer: dict[str, Any]) -> list[TokenScores]:
        choices = sorted(answer.get("choices") or [], key=lambda choice: choice["index"])
        if [choice["index"] for choice in choices] != list(range(len(rows))):
            raise UnusableAnswer(f"answered {len(choices)} of {len(rows)} sequences")
        with no_garbage_collection():
            return [_read_choice(choice, row, top_k) for row, choice in zip(rows, choices, strict=True)]

    body = {"model": model, "prompt": [row.token_ids for row in rows], "prompt_logprobs": top_k, **PLAIN_SAMPLING}
    tokens = sum(len(row.token_ids) for row in rows)
    return Request("/v1/completions", body, _max_bytes(tokens * (1 + top_k)), read)


def _max_bytes(numbers: int) -> int:
    return 65536 + BYTES_PER_LOGPROB * numbers


def _read_choice(choice: dict[str, Any], row: Row, top_k: int) -> TokenScores:
    entries = choice.get("prompt_logprobs") or []
    if len(entries) != len(row.token_ids):
        raise UnusableAnswer(
            f"scored {len(entries)} of {len(row.token_ids)} tokens. Is this a vLLM server? Others ignore prompt_logprobs"
        )
    try:
        return from_entries(row, entries[row.prompt_len :], top_k)
    except (KeyError, TypeError, AttributeError) as error:
        raise UnusableAnswer(
            f"gave no log-prob for a token it was asked to score ({type(error).__name__}: {error}). Something between "
            "here and there mixes answers up, or it is not a vLLM server"
        ) from None


def from_base64_npy(text: Any) -> np.ndarray | None:
    """The float32 array of shape (T, 1) in an answer, as (T,); `None` if it is none. Nothing is unpickled, and no more
    memory is taken than the text has."""
    if not isinstance(text, str):
        return None
    try:
        data = base64.b64decode(text, validate=True)
        stream = io.BytesIO(data)
        np.lib.format.read_magic(stream)
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
        # Copied: the text's own bytes cannot be written.
        values = np.frombuffer(data, dtype="<f4", offset=stream.tell()).copy()
    except Exception:  # numpy hands the header to Python's parser, which has many ways to refuse it
        return None
    return values if dtype == np.dtype("<f4") and shape == (len(values), 1) else None


def from_entries(row: Row, entries: Sequence[Any], top_k: int) -> TokenScores:
    """Log-probs out of vLLM's JSON: per completion token of a row `{"<id>": {"logprob": float, "rank": int, ...}, ...}`.

    Raises `KeyError` where a token has no entry, as that is the answer to another question, and `UnusableAnswer` for what
    is not a log-prob. `null`, as which NaN comes, is NaN again.
    """
    token_ids = row.token_ids[row.prompt_len :]
    found: list[list[Any]] = []
    ids = []
    for token, entry in zip(token_ids, entries, strict=True):
        values = [entry[str(token)]["logprob"]]
        if top_k:
            best = sorted(entry.items(), key=lambda item: item[1]["rank"])[:top_k]
            if len(best) < top_k:
                raise UnusableAnswer(f"gave {len(best)} of the {top_k} likeliest tokens of {_place(row, len(found))}")
            values += [value["logprob"] for _, value in best]
            ids.append([int(candidate) for candidate, _ in best])
        found.append(values)
    for place, values in enumerate(found):
        for value in values:
            if type(value) not in _NUMBERS:  # a bool is an int, and numpy reads texts
                raise UnusableAnswer(f"gave {value!r} as a log-prob of {_place(row, place)}, which is not a number")
    logps = np.array(found, dtype=np.float32).reshape(len(found), 1 + top_k)
    return to_scores(logps, np.array(ids).reshape(len(found), top_k) if top_k else None)


_NUMBERS = (float, int, type(None))


def _place(row: Row, place: int) -> str:
    """A token of a completion, as errors name it."""
    return f"token {place} (id {row.token_ids[row.prompt_len + place]}) of the completion in row {row.index}"


def to_scores(logps: np.ndarray, top_ids: np.ndarray | None = None) -> TokenScores:
    """`logps` (T, 1 + k): first the token itself, then its rivals, whose ids are `top_ids` (T, k)."""
    values = torch.from_numpy(np.ascontiguousarray(logps, dtype=np.float32))
    if top_ids is None:
        return TokenScores(values[:, 0])
    return TokenScores(values[:, 0], torch.from_numpy(np.ascontiguousarray(top_ids, dtype=np.int64)), values[:, 1:])


def no_scores(top_k: int) -> TokenScores:
    """Those of an empty completion."""
    return to_scores(np.zeros((0, 1 + top_k)), np.zeros((0, top_k), int) if top_k else None)


def count_missing(scores: TokenScores) -> int:
    """Log-probs that are missing or not finite."""
    return sum(int(part.sum()) for part in _missing(scores))


def first_missing(scores: TokenScores) -> tuple[int, float]:
    """Place in the completion of the first token that has such, and its value."""
    place = min(int(part.nonzero()[0, 0]) for part in _missing(scores) if part.any())
    values = [part[place].flatten() for part in (scores.logps, scores.top_logps) if part is not None]
    return place, next(value for value in torch.cat(values).tolist() if not math.isfinite(value) or value == MINUS_INF)


def _missing(scores: TokenScores) -> list[torch.Tensor]:
    parts = [part for part in (scores.logps, scores.top_logps) if part is not None]
    return [~torch.isfinite(part) | (part == MINUS_INF) for part in parts]
