"""Eq. 1: the teachers' and the student's log-probs of the sampled tokens, and the gaps between them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import CaMOPDError, TeacherError, on_all_ranks
from .forward import Forward, evaluating
from .guards import stop
from .objective import token_gaps
from .samples import Sample
from .signals import StopRequests
from .step import Clock, Work
from .teachers.adapters import OWN
from .teachers.base import RemoteTeacher, Teacher, TokenScores, read_answers
from .teachers.check import has_lost_its_weights
from .teachers.local import LocalTeacher
from .token_rules import TokenRule
from .watchdog import current, phase


logger = logging.getLogger(__name__)
CAMOPD = TokenRule(None)
POLL = 0.5  # seconds between two looks whether a signal ends the wait for a teacher


class Asked(NamedTuple):
    """Sequences that a teacher outside this process scores."""

    answers: Future[list[TokenScores]]
    work: Work


class Scorer:
    """Has teachers and student score the samples of a step, beside each other where the teacher works elsewhere."""

    def __init__(
        self,
        student: Forward,
        teachers: Mapping[str, Teacher],
        dummy: int,
        gather: Callable[[list[Any]], list[Any]],
        guards: Any = None,
        stops: StopRequests | None = None,
    ):
        """
        Args:
            student: of the trained weights.
            teachers: of each branch.
            dummy: a token of the vocabulary, of which rows without a sample are made.
            gather: of a list over all ranks.
            guards: thresholds by name, of which `log_prob` is read.
            stops: what ends a wait for a teacher.
        """
        self.student, self.teachers, self.dummy, self._gather = student, teachers, dummy, gather
        self._highest, self._stops = (guards or {}).get("log_prob"), stops

    def probe(self) -> None:
        """See once that the log-probs of the student and of teachers in the process are those of their own logits."""
        self.student.probe()
        for teacher in self.teachers.values():
            if isinstance(teacher, LocalTeacher):
                teacher.probe()

    def ask(self, sample: Sample, prefix: int | None, rule: TokenRule = CAMOPD) -> None:
        """Have a teacher outside this process score a sample at once, while others are still written. From any thread.

        Args:
            sample: finished, with all its tokens.
            prefix: tokens of its completion that will be scored, see `Sample.keep_prefix`.
            rule: of a baseline.
        """
        if isinstance(self.teachers[sample.branch], RemoteTeacher):
            scored = replace(sample)
            scored.keep_prefix(prefix)
            sample.asked = self._submit([scored], rule)

    def read_student(self, samples: Sequence[Sample], prefix: int | None) -> None:
        """The student's log-probs of finished samples, while others are still written; `score` leaves these samples out.

        They are batched as they come, so that the last bits depend on the order in which they were finished.
        """
        scored = [replace(sample) for sample in samples]
        for sample in scored:
            sample.keep_prefix(prefix)
        with evaluating(self.student.model):
            rows = [sample.token_ids for sample in scored], [sample.prompt_len for sample in scored]
            self._read_student(samples, *rows, forward=True)
        for sample in samples:
            sample.student_is_read = True

    def score(
        self, samples: Sequence[Sample], branches: Sequence[str], rule: TokenRule = CAMOPD, engine: bool = False
    ) -> dict[str, Clock]:
        """Fill in the teachers' and the student's log-probs, the gaps, and what a token rule asks for.

        Teachers outside this process score while the student does, if `ask` has not begun it before; those inside it score
        in the very batches of the student, branch by branch. Where a rank has fewer samples of a branch than another, it
        adds dummies, so that sharded models make the same number of forwards everywhere.

        Args:
            samples: of this rank, rolled out.
            branches: those of the step, the same on every rank.
            rule: of a baseline.
            engine: whether the student's log-probs are those of the rollout engine, and not of a forward.

        Returns how long the teacher of each branch worked. Raises on every rank what one of them has met: `CaMOPDError`
        when a log-prob is missing or not finite, `GuardError` when one is above the guards' threshold, and `TeacherError`
        when a teacher has failed.
        """
        self.probe()
        groups = {branch: [sample for sample in samples if sample.branch == branch] for branch in branches}
        clocks = {branch: Clock() for branch in branches}
        answers: dict[str, list[TokenScores]] = {}
        failures: list[CaMOPDError] = []
        pending = {branch: self._pending(group, rule) for branch, group in groups.items()
                   if isinstance(self.teachers[branch], RemoteTeacher)}  # fmt: skip
        with evaluating(self.student.model):
            for branch, group in groups.items():
                missing = max(self._gather([len(group)])) - len(group)
                if branch not in pending:
                    with clocks[branch].alone(), caught(failures, self.teachers[branch]), self._asking(branch):
                        rows = self._with_dummies(_for_teacher(group), missing)
                        found = self.teachers[branch].score(*rows, rule.teacher_top_k)
                        answers[branch] = self._read(branch, group, found, len(rows[0]), rule)
                group = [sample for sample in group if not sample.student_is_read]
                own = [sample.token_ids for sample in group], [sample.prompt_len for sample in group]
                token_ids, prompt_lens = self._with_dummies(own, missing)
                rule.read_student(self.student, group, token_ids, prompt_lens)
                self._read_student(group, token_ids, prompt_lens, forward=not engine or rule.needs_entropy)
        for branch, requests in pending.items():
            clocks[branch].waited_for()
            with caught(failures, self.teachers[branch]), self._asking(branch):
                answers[branch] = self._collect(branch, groups[branch], requests, rule)
            for _, asked in requests:  # those that were asked again are among them now
                clocks[branch].add(asked.work)
        with caught(failures):
            for branch, group in groups.items() if not failures else ():
                for place, sample in enumerate(group):
                    sample.teacher_logps = answers[branch][place].logps
                    rule.read_teacher(sample, answers[branch][place], self.teachers[branch].name)
            if not failures:
                self._close(samples, engine)
        with on_all_ranks(self._gather):
            if failures:
                raise failures[0]
        return clocks

    def _pending(self, group: Sequence[Sample], rule: TokenRule) -> list[tuple[list[Sample], Asked]]:
        """What the teacher of a branch has been asked, or is now, with the samples of each."""
        early = [([sample], sample.asked) for sample in group if sample.asked is not None]
        others = [sample for sample in group if sample.asked is None]
        return [*early, *([(others, self._submit(others, rule))] if others else [])]

    def _submit(self, samples: Sequence[Sample], rule: TokenRule) -> Asked:
        """Begin to have samples of one branch scored outside this process. What `submit` raises comes with the answers."""
        teacher: Any = self.teachers[samples[0].branch]
        work = Work()
        try:
            answers = teacher.submit(*_for_teacher(samples), rule.teacher_top_k)
            answers.add_done_callback(work.stop)
        except Exception as error:
            answers = Future()
            answers.set_exception(error)
            work.stop()
        return Asked(answers, work)

    def _collect(
        self, branch: str, group: Sequence[Sample], requests: list[tuple[list[Sample], Asked]], rule: TokenRule
    ) -> list[TokenScores]:
        """The answers for a branch's samples, in their order; the first that fails ends the wait for the others.

        What `ask` has begun, and a teacher was gone too long for while others were still written, is asked for again: only
        now is it waited for.
        """
        # Not by position: in an evaluation data loaders fill a rank's last batch up with rows that were there before.
        found: dict[int, TokenScores] = {}
        try:
            for samples, asked in requests:  # which grows
                try:
                    scores = self._wait(asked.answers)
                except TeacherError:
                    if samples[0].asked is None or (self._stops is not None and self._stops.heard):
                        raise
                    samples[0].asked = None
                    requests.append((samples, self._submit(samples, rule)))
                    continue
                answers = self._read(branch, samples, scores, len(samples), rule)
                asked.work.stop()  # where the future has not come to its callback yet
                found.update((id(sample), answer) for sample, answer in zip(samples, answers, strict=True))
        except BaseException:
            for _, asked in requests:
                asked.answers.cancel()
            raise
        return [found[id(sample)] for sample in group]

    def _wait(self, future: Future[list[TokenScores]]) -> list[TokenScores]:
        while not future.done() and not (self._stops is not None and self._stops.heard):
            wait([future], timeout=POLL)
        if not future.done():
            raise TeacherError("a signal has ended the wait for its answers")
        return future.result()

    def _asking(self, branch: str) -> AbstractContextManager[None]:
        """For the watchdog: this process waits for the teacher of a branch."""
        return phase(f"{current().what}: teacher {branch!r} ({self._where(branch)})")

    def _where(self, branch: str) -> str:
        teacher = self.teachers[branch]
        return ", ".join(getattr(teacher, "urls", ())) or teacher.name

    def _read_student(
        self, group: Sequence[Sample], token_ids: list[list[int]], prompt_lens: list[int], forward: bool
    ) -> None:
        """Log-probs and entropies of the student, where a `forward` is wanted. Dummies stand behind the group's rows."""
        if not forward:
            for sample in group:
                sample.entropy = torch.full(sample.mask.shape, math.nan)
            return
        own = self.student.rows(token_ids, prompt_lens, with_entropy=True)
        for sample, (logps, entropy) in zip(group, own[: len(group)], strict=True):
            assert entropy is not None
            sample.student_logps, sample.entropy = logps, entropy

    def _close(self, samples: Sequence[Sample], engine: bool) -> None:
        """Gaps of samples whose log-probs are there."""
        for sample in samples:
            teacher = f"teacher {sample.branch!r} ({self._where(sample.branch)})"
            check_scored(sample, sample.teacher_logps, teacher, self._highest)
            if sample.rollout_logps is not None and self._highest is not None:
                _check_highest(sample, sample.rollout_logps, "the rollout engine", self._highest)
        if engine:
            _take_engine_logps(samples)
        for sample in samples:
            check_scored(sample, sample.student_logps, "student", self._highest)
            sample.gaps = token_gaps(sample.teacher_logps, sample.student_logps, sample.mask)
        _check_not_uniform(samples, self.teachers)

    def _with_dummies(
        self, rows: tuple[list[list[int]], list[int]], missing: int
    ) -> tuple[list[list[int]], list[int]]:
        token_ids, prompt_lens = rows
        return token_ids + [[self.dummy] * 2] * missing, prompt_lens + [1] * missing

    def _read(
        self, branch: str, group: Sequence[Sample], answers: Any, asked: int, rule: TokenRule
    ) -> list[TokenScores]:
        samples = [(sample.position, len(sample.mask)) for sample in group]
        return read_answers(answers, asked, samples, rule.teacher_top_k, self.teachers[branch].name, branch)


@contextmanager
def caught(failures: list[CaMOPDError], teacher: Teacher | None = None) -> Iterator[None]:
    """Keep a `CaMOPDError` for all ranks to raise, or as one what a teacher of the user's own raises."""
    try:
        yield
    except CaMOPDError as error:
        failures.append(error)
    except Exception as error:
        if teacher is None or isinstance(teacher, (LocalTeacher, *OWN)):
            raise  # an error of PyTorch, whose own text says more
        failure = TeacherError(f"teacher {teacher.name!r} has failed ({type(error).__name__}: {str(error)[:500]}).")
        failure.__cause__ = error
        failures.append(failure)


def _for_teacher(samples: Sequence[Sample]) -> tuple[list[list[int]], list[int]]:
    rows = [sample.for_teacher for sample in samples]
    return [token_ids for token_ids, _ in rows], [prompt_len for _, prompt_len in rows]


def _take_engine_logps(samples: Sequence[Sample]) -> None:
    unknown = 0
    for sample in samples:
        assert sample.rollout_logps is not None
        missing = sample.rollout_logps.isnan()
        unknown += int((missing & sample.mask).sum())
        # Tokens that the engine did not sample, or gave no log-prob: no gap there. The loss has its own.
        sample.student_logps = torch.where(missing, sample.teacher_logps, sample.rollout_logps)
    if unknown:
        logger.warning(
            "the rollout engine gave no log-prob for %d tokens; their gap counts as 0 at selection", unknown
        )


def _check_highest(sample: Sample, logps: Tensor, name: str, limit: float) -> None:
    """Raise `GuardError` for a log-prob above the threshold; NaN is none."""
    above = (logps > limit) & sample.mask
    if above.any():
        raise stop(
            "log_prob", limit,
            f"{name} gave {int(above.sum())} of {int(sample.mask.sum())} tokens of sample {sample.position} (branch "
            f"{sample.branch!r}) a log-prob above 0, up to {float(logps[above].max()):g}: a probability above 1, which "
            "rounding does not reach. These are logits (a vLLM server needs --logprobs-mode raw_logprobs), scores with a "
            "penalty, or of a faulty server",
        )  # fmt: skip


def check_scored(sample: Sample, logps: Tensor, name: str, limit: float | None) -> None:
    """Raise `CaMOPDError` where a model's log-probs are not one finite number for each completion token of a sample, or
    `GuardError` where one is more than `limit` nats above 0."""
    mask = sample.mask
    if len(logps) != len(mask):
        raise CaMOPDError(
            f"{name} scored {len(logps)} of the {len(mask)} completion tokens of sample {sample.position}. A teacher must "
            "return one log-prob for each token after the prompt."
        )
    broken = int((~torch.isfinite(logps[mask])).sum())
    if broken:
        raise CaMOPDError(
            f"{name} gave {broken} non-finite log-probs out of {int(mask.sum())} for sample {sample.position}. Training on "
            "it would turn the weights into NaN; the last checkpoint is untouched. Check the model's weights and dtype "
            "(float16 overflows where bfloat16 does not)."
        )
    if limit is not None:
        _check_highest(sample, logps, name, limit)


def _check_not_uniform(samples: Sequence[Sample], teachers: Mapping[str, Teacher]) -> None:
    """A server that lost its weights (a wake-up after sleep, say) finds every token equally likely: -ln V."""
    for branch in dict.fromkeys(sample.branch for sample in samples):
        logps = torch.cat([sample.teacher_logps[sample.mask] for sample in samples if sample.branch == branch])
        if has_lost_its_weights(logps):
            raise CaMOPDError(
                f"teacher {branch!r} ({teachers[branch].name}) gives every one of {len(logps)} tokens the log-prob "
                f"{logps.mean():.3f}, as -ln(vocabulary size): it has lost its weights. Restart it; the last checkpoint is "
                "untouched."
            )
