"""How much is asked of servers at once, and how long their answers may take."""

from __future__ import annotations


REQUESTS_PER_REPLICA = 16  # in flight at once from this process; vLLM batches what arrives together
TOKENS_PER_REQUEST = 8192  # short sequences share a JSON request up to this; a longer one goes alone
ATTEMPTS = 6  # for one request, over all replicas
CONNECT_SECONDS = 4.0
ANSWER_SECONDS = 5.0  # for the small questions: which model, is it well, tokenize this
STATE_SECONDS = 30.0  # for a rollout server, busy with others' completions, to say which process it is
QUESTION_SECONDS = 3.0  # after which a small question is not asked again
SCORE_SECONDS = 300.0
ROLLOUTS_PER_REPLICA = 256  # completions in flight at once from this process; vLLM itself decodes as many together
ROLLOUT_SECONDS, SECONDS_PER_NEW_TOKEN = 300.0, 0.2  # 5 tokens/s each: what a crowded GPU still gives
WEIGHTS_SECONDS = 900.0  # for a server to read new weights from a disk
SECONDS_PER_TOKEN = 1 / 500  # allows for thirty-two processes that ask one server of 16000 tokens/s
HEALTH_SECONDS = 1.0  # between two looks at a replica that is out
REMINDER_SECONDS = 60.0
QUESTION_PAUSE, SCORE_PAUSE = 1.0, 10.0  # seconds, the longest between two attempts


def request_seconds(tokens_in_flight: int) -> float:
    """How long a scoring request may take, of `tokens_in_flight` that this process waits for on the replica."""
    return SCORE_SECONDS + tokens_in_flight * SECONDS_PER_TOKEN


def most_tokens_in_flight(rows: int, longest: int) -> int:
    """The most that this process may wait for on a replica, when it scores `rows` of at most `longest` tokens together."""
    return min(rows * longest, REQUESTS_PER_REPLICA * max(TOKENS_PER_REQUEST, longest))


def completion_seconds(max_tokens: int) -> float:
    """How long a request for one completion of at most `max_tokens` may take."""
    return ROLLOUT_SECONDS + max_tokens * SECONDS_PER_NEW_TOKEN
