"""Teachers that are wrong in silence: a check of servers before the first rollout, and of the first gaps of each branch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ..errors import TeacherError, on_all_ranks
from ..forward import evaluating
from ..schedule import Schedule
from ..scoring import Scorer
from ..step import Step, StepCallback
from ..teachers.check import Probe, check_scores, initial_kl, is_student_start, raise_errors
from ..teachers.vllm.teacher import ServerTeacher
from ..watchdog import phase


logger = logging.getLogger(__name__)


class TeacherWatch(StepCallback):
    """Compares a few log-probs with the student's own. A teacher that is wrong in silence costs the whole run."""

    def __init__(
        self,
        scorer: Scorer,
        schedule: Schedule,
        tokenizer: Any,
        max_tokens: int,
        ends: Any,
        vocab_size: int,
        student_name: str,
        gather: Callable[[list[Any]], list[Any]],
        contexts: Collection[str] = (),
    ):
        """
        Args:
            scorer: the trainer's, with student and teachers.
            schedule: that of the run.
            tokenizer: the student's.
            max_tokens: of a prompt and its completion.
            ends: token ids that end a completion.
            vocab_size: of the student's head.
            student_name: whose weights the student has at the start; empty for a model object.
            gather: of a list over all ranks.
            contexts: branches whose teachers see another prompt, and may well be far from the student at first.
        """
        self._scorer, self._schedule, self._gather, self._contexts = scorer, schedule, gather, contexts
        self._tokenizer, self._max_tokens, self._ends = tokenizer, max_tokens, ends
        self._vocab_size, self._student_name = vocab_size, student_name
        self._met: set[str] = set()
        self._stepped = False  # since when the student is not what it started as, also in another `train`

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Score a few conversations. Raises `TeacherError` on every rank."""
        teachers: Mapping[str, Any] = self._scorer.teachers
        servers = {branch: teacher for branch, teacher in teachers.items() if isinstance(teacher, ServerTeacher)}
        if not servers:
            return
        student = self._scorer.student
        student.probe()
        probe = Probe.of(self._tokenizer, self._max_tokens, self._ends)
        with evaluating(student.model):
            own = student.rows(probe.token_ids, probe.prompt_lens)
        failure = None
        for branch, teacher in servers.items():
            findings = check_scores(
                branch,
                teacher,
                self._tokenizer,
                vocab_size=self._vocab_size,
                probe=probe,
                student_logps=[logps for logps, _ in own],
                same_weights=state.global_step == 0
                and not self._stepped
                and is_student_start(teacher, self._student_name),
                likeliest=args.divergence_top_k if args.divergence == "top_k" else 0,
            )
            try:
                with phase(f"first look at teacher {branch!r} ({', '.join(teacher.urls)})"):  # asked as they are read
                    raise_errors(findings, logger.warning)
            except TeacherError as error:
                failure = failure or error
        with on_all_ranks(self._gather):
            if failure is not None:
                raise failure

    def on_step_started(self, step: Step) -> None:
        """From here on the student's weights are its own."""
        self._stepped = True

    def on_step_ready(self, step: Step) -> None:
        """Look at the student's very first completions of a branch."""
        new = [branch for branch in step.branches if branch not in self._met and branch not in self._contexts]
        self._met.update(new)
        for branch in new if step.number < self._schedule.period else ():
            tokens = sum(summary.num_tokens for summary in step.summaries if summary.branch == branch)
            raise_errors([initial_kl(branch, -step.metrics[f"gap/{branch}/mean"], tokens)], logger.warning)
