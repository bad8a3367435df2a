"""What any teacher must give."""

import pytest
from conftest import make_model
from trainers import BrokenTeacher, make_trainer

from camopd.errors import TeacherError


@pytest.mark.parametrize("change", [-1, 1])
def test_teacher_that_returns_too_few_or_too_many_answers_stops_the_run(change, tmp_path, tokenizer):
    class Miscounts(BrokenTeacher):
        def score(self, token_ids, prompt_lens, top_k=0):
            return (super().score(token_ids, prompt_lens) * 2)[: len(token_ids) + change]

    trainer = make_trainer(tmp_path, tokenizer, teachers={"general": Miscounts(-1.0), "domain": make_model(1)})
    with pytest.raises(TeacherError, match=rf"teacher 'broken' returned {4 + change} answers for 4 sequences"):
        trainer.train()
