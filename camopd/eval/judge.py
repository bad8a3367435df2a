"""A model that judges answers, behind any OpenAI-compatible URL; what it cannot say of an answer is not a verdict.

The verifier of GPQA-Diamond and HMMT is the paper's (Appendix B): it is shown prompt, response and known answer, and names
the response's answer and a decision. Its words are ours, as the paper does not give them.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import CaMOPDError
from ..teachers.address import public_url
from .asking import Line, Reply, Unanswered
from .verdicts import Verdict, after_thinking


KEY = "CAMOPD_JUDGE_API_KEY"
ATTEMPTS = 3  # per verdict
GONE = 8  # verdicts in a row for which the server was not reached: it is gone
LONGEST = 16000  # tokens of a reply, as Arena-Hard sets for GPT-4.1
# Of each request, beside temperature and top_p: what is not sent, a vLLM takes from the model's generation_config.json.
NEUTRAL = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}
VERIFIER_TEMPERATURE = 0.2  # the paper's
VERIFY = """\
Check whether a response comes to the known answer of its prompt. Find the final answer of the response and compare that \
alone with the known one: both are the same if they mean the same, however they are written. Do not solve the problem, \
and do not grade the reasoning.

<prompt>
{prompt}
</prompt>

<response>
{response}
</response>

<ground_truth_answer>
{gold}
</ground_truth_answer>

Reply with these two lines and nothing else. Write `none` where the response has no final answer.
<extracted_answer>the final answer of the response</extracted_answer>
<decision>yes or no</decision>"""
_EXTRACTED = re.compile(r"<extracted_answer>(.*?)</extracted_answer>", re.DOTALL)
_NAMED = re.compile("|".join(NEUTRAL))
_REFUSED = (400, 422)  # the statuses of a request with something unknown in it
_DECISION = re.compile(r"<decision>\s*(yes|no)\s*</decision>", re.IGNORECASE)


class Unusable(Exception):
    """A reply that holds no verdict, or none at all. A judge that is asked again may give one."""


class Refused(Unusable):
    """The server will not answer this request, however often it is asked."""


class Unreached(Unusable):
    """The server was not there, or too busy."""


@dataclass
class Judge:
    """A judge on a server. `pause` is in seconds, before the second attempt; each later one waits twice as long."""

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    pause: float = 2.0
    timeout: float = 300.0  # of a request as a whole
    what: str = "judge"  # it is, in an error
    more: Mapping[str, Any] = field(default_factory=dict)  # of the body of a request
    _plain: bool = field(default=False, init=False)  # the server refuses some of `NEUTRAL`
    _unreached: int = field(default=0, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def __post_init__(self) -> None:
        self._line = Line(self.key, self.timeout)
        self.end = self._line.end

    def ask(
        self, messages: Sequence[Mapping[str, str]], temperature: float, read: Callable[[str], Verdict],
        again: float | None = None,
    ) -> Verdict:  # fmt: skip
        """What `read` makes of the reply's text, with the text as `said`; {"failed": why} after `ATTEMPTS`.

        `again` is the temperature of the later attempts. `read` raises `Unusable` for a reply without a verdict. Raises
        `CaMOPDError` where the server is gone, and `Ended` after `end`.
        """
        said: str | None = None
        why = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                self._line.wait(self.pause * 2 ** (attempt - 1))
            try:
                said = self._reply(messages, temperature if again is None or not attempt else again)
                return {**read(said), "said": said}
            except Refused as error:
                why = str(error)
                break
            except Unusable as error:
                why = str(error)
                unreached = isinstance(error, Unreached)
        else:
            self._count(unreached, why)
        return {"failed": why, "said": said}

    def _count(self, unreached: bool, why: str) -> None:
        with self._lock:
            self._unreached = self._unreached + 1 if unreached else 0
            gone = self._unreached >= GONE
        if gone:
            raise CaMOPDError(
                f"the {self.what} at {public_url(self.url)} has not answered for {GONE} answers in a row, {ATTEMPTS} times "
                f"each ({why}). Its verdicts so far are kept. Start it again, and run the same command."
            )

    def _reply(self, messages: Sequence[Mapping[str, str]], temperature: float) -> str:
        body = {
            "model": self.model,
            "messages": list(messages),
            "temperature": temperature,
            "top_p": 1.0,
            "max_tokens": LONGEST,
            **self.more,
        }
        plain = self._plain
        reply = self._send(body if plain else NEUTRAL | body)
        if not plain and reply.status in _REFUSED and _NAMED.search(reply.text):
            # OpenAI's own API refuses names that it does not know. It has no file of the model's to take them from, either.
            reply = self._send(body)
            if reply.status not in _REFUSED:  # else it is not about these names alone
                self._plain = True
        shown = reply.unread or self._line.shown(reply.text)
        if reply.status == 429 or reply.status >= 500:
            raise Unreached(f"HTTP {reply.status}")
        if reply.status != 200 or reply.unread:
            raise Refused(f"HTTP {reply.status}: {shown}")
        with self._lock:
            self._unreached = 0
        try:
            text = json.loads(reply.text)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            raise Unusable(f"not a chat completion: {shown!r}") from None
        if not isinstance(text, str):
            raise Unusable("a reply without text")
        return self._line.without_key(text)

    def _send(self, body: Mapping[str, Any]) -> Reply:
        try:
            return self._line.send(f"{self.url}/v1/chat/completions", dict(body))
        except Unanswered as error:
            raise Unreached(str(error)) from None


def verify(judge: Judge, row: Mapping[str, Any]) -> Verdict:
    """Whether an answer comes to the gold one. An answer without any text is not shown to the judge."""
    text = after_thinking(row["text"])
    if text is None or not text.strip():
        return {"passed": False, "extracted": "none", "said": None}
    content = VERIFY.format(prompt=row["prompt"], response=text.strip(), gold=row["gold"])
    return judge.ask([{"role": "user", "content": content}], VERIFIER_TEMPERATURE, decision_of)


def decision_of(reply: str) -> Verdict:
    """The verifier's decision and the answer it has found. Raises `Unusable` without one decision.

    >>> decision_of("<extracted_answer> C </extracted_answer><decision>Yes</decision>")
    {'passed': True, 'extracted': 'C'}
    """
    text = after_thinking(reply)
    decisions = {found.lower() for found in _DECISION.findall(text or "")}
    if len(decisions) != 1:
        raise Unusable(f"{len(decisions)} decisions in {reply[-200:]!r}")
    extracted = _EXTRACTED.findall(text or "")
    return {"passed": decisions == {"yes"}, "extracted": extracted[-1].strip() if extracted else ""}
