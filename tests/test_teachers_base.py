"""What any teacher must give."""

from concurrent.futures import Future

import pytest
import torch
from conftest import make_forward, make_model
from trainers import BrokenTeacher, make_trainer

from camopd.errors import TeacherError
from camopd.samples import Sample
from camopd.scoring import Scorer
from camopd.teachers.base import TokenScores, read_answers


@pytest.mark.parametrize("change", [-1, 1])
def test_teacher_that_returns_too_few_or_too_many_answers_stops_the_run(change, tmp_path, tokenizer):
    class Miscounts(BrokenTeacher):
        def score(self, token_ids, prompt_lens, top_k=0):
            return (super().score(token_ids, prompt_lens) * 2)[: len(token_ids) + change]

    trainer = make_trainer(tmp_path, tokenizer, teachers={"general": Miscounts(-1.0), "domain": make_model(1)})
    with pytest.raises(TeacherError, match=rf"teacher 'broken' returned {4 + change} answers for 4 sequences"):
        trainer.train()


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


ids = zeros(3, 2, dtype=torch.int64)
WRONG = {  # what a teacher has returned for two completions of 3 and 2 tokens -> what is said of it
    "nothing": (None, "returned None for 2 sequences"),
    "a number": (7, "returned int 7 for 2 sequences"),
    "a tensor": (zeros(2, 3), r"returned a tensor of shape \(2, 3\), float32, on cpu for 2 sequences"),
    "a generator": ((x for x in ()), "returned generator .* for 2 sequences"),
    "a dict": ({0: 1, 1: 2}, "returned dict .* for 2 sequences"),
    "a text": ("ab", "returned str 'ab' for 2 sequences"),
    "lists": ([[-1.0] * 3, [-1.0] * 2], r"returned list \[-1.0, -1.0, -1.0\] for sample 5"),
    "tensors": ([zeros(3), zeros(2)], r"returned a tensor of shape \(3,\), float32, on cpu for sample 5"),
    "lists in scores": ([TokenScores([-1.0] * 3)] * 2, r"returned list \[.*\] as `logps` of sample 5"),
    "ints": ([TokenScores(zeros(3, dtype=torch.int64))] * 2, r"shape \(3,\), int64, on cpu as `logps` of sample 5"),
    "bools": ([TokenScores(zeros(3, dtype=torch.bool))] * 2, r"shape \(3,\), bool, on cpu as `logps`"),
    "2-D": ([TokenScores(zeros(3, 1))] * 2, r"shape \(3, 1\), float32, on cpu as `logps`.*of shape \(3,\) on the CPU"),
    "0-D": ([TokenScores(zeros())] * 2, r"shape \(\), float32, on cpu as `logps`"),
    "elsewhere": ([TokenScores(torch.zeros(3, device="meta"))] * 2, "float32, on meta as `logps`"),
    "complex": ([TokenScores(zeros(3, dtype=torch.complex64))] * 2, "complex64, on cpu as `logps`"),
    "too few": ([TokenScores(zeros(3))], "returned 1 answers for 2 sequences"),
    "another length": ([TokenScores(zeros(3)), TokenScores(zeros(3))], "scored 3 of the 2 completion tokens of sample 9"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_answer_of_another_kind_is_a_teacher_error_that_says_what_it_is(case):
    answers, said = WRONG[case]
    with pytest.raises(TeacherError, match=rf"^teacher 'mine'.* {said}"):
        read_answers(answers, 2, [(5, 3), (9, 2)], 0, "mine", "general")


@pytest.mark.parametrize("top", [None, [[1, 2]] * 3, ids.float(), ids[:, :1], ids[:2], ids.bool()])
def test_likeliest_tokens_that_were_asked_for_and_are_wrong_are_a_teacher_error(top):
    with pytest.raises(TeacherError, match=r"'mine' gave top_ids of shape .* where sample 5 needs \(3, 2\), int64"):
        read_answers([TokenScores(zeros(3), top)], 1, [(5, 3)], 2, "mine", "general")


def test_answers_come_out_as_they_went_in_float32_and_without_gradient():
    weights = torch.arange(3.0, dtype=torch.float64, requires_grad=True)
    answers = (TokenScores(-weights, ids, ids.float()), TokenScores(zeros(0)), TokenScores(zeros(1)))
    first, second = read_answers(answers, 3, [(5, 3), (9, 0)], 0, "mine", "general")  # the third is to a dummy
    assert first.logps.tolist() == [0, -1, -2] and first.logps.dtype == torch.float32
    assert not first.logps.requires_grad and first.top_ids is ids and len(second.logps) == 0


class Own:
    """A teacher of the user's own, which returns what it is given, or raises it; with `submit` it is a remote one."""

    name = "mine"

    def __init__(self, answer):
        self.answer = answer

    def score(self, token_ids, prompt_lens, top_k=0):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class OwnRemote(Own):
    def submit(self, token_ids, prompt_lens, top_k=0):
        future = Future()
        if isinstance(self.answer, Exception):
            future.set_exception(self.answer)
        else:
            future.set_result(self.answer)
        return future


class Unsubmitted(Own):
    def submit(self, token_ids, prompt_lens, top_k=0):
        return self.score(token_ids, prompt_lens)  # no future


@pytest.mark.parametrize("kind", [Own, OwnRemote, Unsubmitted])
@pytest.mark.parametrize("answer", [[[-1.0, -2.0]], KeyError("weights"), None, MemoryError()])
def test_wrong_answer_or_an_error_of_an_own_teacher_is_raised_on_every_rank(kind, answer):
    """`gather` stands for two ranks: this one fails, and tells the other."""
    told = []

    def gather(mine):
        told.extend(mine)
        return mine

    sample = Sample("general", 0, [5, 6, 7, 8], 2, torch.ones(2, dtype=torch.bool), 2, False)
    scorer = Scorer(make_forward(make_model(1)), {"general": kind(answer)}, 2, gather)
    with pytest.raises(TeacherError, match="teacher 'mine'") as raised:
        scorer.score([sample], ["general"])
    assert (TeacherError, str(raised.value)) in told
    if isinstance(answer, Exception) and kind is not Unsubmitted:
        assert type(answer).__name__ in str(raised.value)


def test_error_of_another_rank_is_raised_here():
    def gather(mine):  # its failures come last
        return [*mine, (TeacherError, "teacher 'theirs' has failed")] if mine == [None] else mine

    answer = [TokenScores(torch.tensor([-1.0, -2.0]))]
    sample = Sample("general", 0, [5, 6, 7, 8], 2, torch.ones(2, dtype=torch.bool), 2, False)
    scorer = Scorer(make_forward(make_model(1)), {"general": Own(answer)}, 2, gather)
    with pytest.raises(TeacherError, match=r"^teacher 'theirs' has failed"):
        scorer.score([sample], ["general"])
