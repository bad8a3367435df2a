"""Teachers that are wrong in silence are found before the first rollout, or at its first gaps."""

import pytest
import torch
from conftest import make_model
from peft import LoraConfig, get_peft_model
from trainers import lines, make_trainer
from transformers import LlamaForCausalLM

from camopd.errors import TeacherError
from camopd.step import StepCallback


@pytest.mark.parametrize("other_weights", [True, False])
def test_server_that_says_it_is_the_student_and_is_not_is_refused_before_the_first_rollout(
    other_weights, tmp_path, tokenizer, start_server
):
    student = make_model(1)
    student.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    server = start_server(model=make_model(5) if other_weights else student, root=str(tmp_path / "student"))
    trainer = make_trainer(
        tmp_path, tokenizer, max_steps=1, model=str(tmp_path / "student"), model_init_kwargs={"dtype": "float32"},
        teachers={"general": make_model(2), "domain": server.url},
    )  # fmt: skip
    if not other_weights:
        trainer.train()
        return
    trainer.roll_out = None
    with pytest.raises(TeacherError, match=r"'domain'.*differs from the trainer by .* other weights stand behind"):
        trainer.train()


def test_student_with_an_adapter_is_not_taken_for_the_base_it_is_named_after(tmp_path, tokenizer, start_server):
    make_model(1).save_pretrained(tmp_path / "base")
    student = get_peft_model(
        LlamaForCausalLM.from_pretrained(tmp_path / "base"),
        LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"]),
    )
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora" in name:
                parameter.normal_(0, 0.5)
    base = start_server(model=make_model(1), root=str(tmp_path / "base"))
    teachers = {"general": base.url, "domain": make_model(2)}
    make_trainer(tmp_path, tokenizer, model=student, max_steps=1, teachers=teachers).train()
    (line,) = lines(tmp_path)
    assert line["gap/general/abs_mean"] > 0.5


def test_server_that_has_lost_its_weights_is_refused_before_the_first_rollout(tmp_path, tokenizer, start_server):
    lost = make_model(2)
    with torch.no_grad():
        lost.lm_head.weight.zero_()
    trainer = make_trainer(
        tmp_path, tokenizer, max_steps=1, teachers={"general": start_server(model=lost).url, "domain": make_model(1)}
    )
    trainer.roll_out = None
    with pytest.raises(TeacherError, match=r"'general'.*as -ln\(vocabulary size\): it has lost its weights"):
        trainer.train()


def test_far_teacher_is_warned_of_once_and_a_near_one_not(tmp_path, tokenizer, caplog):
    make_trainer(tmp_path, tokenizer, max_steps=5, learning_rate=1e-9).train()
    warned = [record.getMessage() for record in caplog.records if "initial KL" in record.getMessage()]
    (text,) = warned  # five steps visit "general" four times; the domain's teacher is the student itself
    assert text.startswith("teacher 'general', initial KL: ")
    assert "above 0.1" in text


def test_check_of_teachers_is_no_part_of_the_first_rollouts_time(tmp_path, tokenizer, start_server):
    server = start_server()
    trainer = make_trainer(tmp_path, tokenizer, max_steps=1, teachers={"general": server.url, "domain": make_model(1)})
    checking = []

    class Before(StepCallback):
        def on_step_started(self, step):
            checking.append(len(server.scored))

    trainer.add_callback(Before())
    trainer.train()
    assert checking[0] > 0  # it was asked before the step, whose clock starts with it


def test_server_with_the_students_start_is_another_model_once_the_trainer_has_stepped(
    tmp_path, tokenizer, start_server
):
    student = make_model(1)
    student.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    server = start_server(model=student, root=str(tmp_path / "student"))
    trainer = make_trainer(
        tmp_path, tokenizer, max_steps=2, model=str(tmp_path / "student"), model_init_kwargs={"dtype": "float32"},
        teachers={"general": make_model(2), "domain": server.url}, learning_rate=0.5,
    )  # fmt: skip
    trainer.train()
    trainer.train()  # from step 0 again, with the weights that it has


def test_server_that_gives_fewer_likeliest_tokens_than_the_run_needs_is_refused_before_the_first_rollout(
    tmp_path, tokenizer, start_server
):
    server = start_server(model=make_model(2))
    server.most_logprobs = 5
    teachers = {"general": server.url, "domain": make_model(1)}

    def trainer(top_k):
        return make_trainer(
            tmp_path, tokenizer, max_steps=1, teachers=teachers, divergence="top_k", divergence_top_k=top_k
        )

    refused = trainer(6)
    refused.roll_out = None
    with pytest.raises(TeacherError, match=r"(?s)'general'.* 6, .*max allowed: 5"):
        refused.train()
    trainer(5).train()
    (line,) = lines(tmp_path)
    assert line["loss"] > 0
