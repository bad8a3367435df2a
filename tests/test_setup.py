"""What a trainer is given: read and refused, before anything expensive where that can be."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model, make_prompts, make_tokenizer
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trainers import TEMPLATE, make_args, make_trainer

from camopd import CaMOPDTrainer
from camopd.late_settings import note
from camopd.setup import check_gathered_weights, show_log


def test_messages_that_the_template_refuses_are_an_error_with_the_row_before_training(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE + "{% if messages[0].role == 'tool' %}{{ raise_exception('no') }}{% endif %}"
    fine, wrong = ([{"role": role, "content": "hi"}] for role in ("user", "tool"))
    datasets = {branch: Dataset.from_list([{"prompt": fine}] * 99) for branch in ("general", "domain")}
    held_out = {"domain": Dataset.from_list([{"prompt": fine}] * 70 + [{"prompt": wrong}])}
    with pytest.raises(ValueError, match=r"row 70 of branch 'domain' .* the chat template says: TemplateError: no"):
        make_trainer(tmp_path, tokenizer, train_dataset=datasets, eval_dataset=held_out)


@pytest.mark.parametrize("streaming", [False, True])
def test_prompts_that_are_all_longer_than_the_cap_are_an_error_with_the_lengths(tmp_path, tokenizer, streaming):
    prompts = {"domain": Dataset.from_list([{"prompt": "0123456789"}, {"prompt": "0123456"}])}
    if streaming:
        prompts["domain"] = prompts["domain"].to_iterable_dataset()
    prompts["general"] = Dataset.from_list([{"prompt": "0123456789"}, {"prompt": "01"}])  # one that fits is enough
    with pytest.raises(
        ValueError,
        match=r"2 prompts of branch 'domain' that were looked at are all longer than max_prompt_length=4 tokens; .* 7",
    ):
        make_trainer(tmp_path, tokenizer, train_dataset=prompts, max_prompt_length=4)


@pytest.mark.parametrize("name", ["teacher_model", "teacher"])
def test_single_teacher_is_refused_with_the_argument_that_takes_one_for_each_branch(name):
    with pytest.raises(TypeError, match=rf"no argument '{name}'\. Each branch has a teacher of its own: teachers=\{{"):
        CaMOPDTrainer(model="student", **{name: "teacher"})
    with pytest.raises(TypeError, match=r"no argument 'reward_funcs'\. See its docstring"):
        CaMOPDTrainer(model="student", reward_funcs=[])


def test_per_branch_moments_need_the_optimizer_to_be_ours(tmp_path, tokenizer):
    model = make_model(1)
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(ValueError, match=r"optimizer_moments='per_branch' is an AdamW of its own.*pass no optimizer"):
        CaMOPDTrainer(
            model=model, teachers={"general": make_model(2), "domain": make_model(3)},
            args=make_args(tmp_path, optimizer_moments="per_branch"), optimizers=(optimizer, None),
            train_dataset={branch: make_prompts(branch) for branch in ("general", "domain")}, processing_class=tokenizer,
        )  # fmt: skip
    with pytest.raises(
        ValueError, match=r"optimizer_moments='per_branch' is an AdamW of its own and cannot be optim='sgd'"
    ):
        make_args(tmp_path, optimizer_moments="per_branch", optim="sgd")


def test_zero3_that_cannot_gather_its_weights_to_generate_is_refused_with_the_arithmetic(monkeypatch):
    model = torch.nn.Linear(2**10, 2**10, bias=False, dtype=torch.bfloat16)
    check_gathered_weights(model, 2**21)
    message = (
        r"gathers all 0\.00 billion weights on every GPU: 0\.0 GiB, and this one has 0\.0 GiB\. Set use_vllm=True"
    )
    with pytest.raises(ValueError, match=message):
        check_gathered_weights(model, 2**21 - 1)
    model.weight.ds_numel = 8 * 2**30  # as ZeRO-3 says it of a weight in shards
    message = r"gathers all 8\.59 billion weights on every GPU: 16\.0 GiB, and this one has 15\.0 GiB"
    with pytest.raises(ValueError, match=message):
        check_gathered_weights(model, 15 * 2**30)


def test_zero3_in_shards_and_vllm_exclude_each_other(tmp_path, tokenizer):
    args = make_args(tmp_path, ds3_gather_for_generation=False)
    args.use_vllm, args.deepspeed_plugin = True, SimpleNamespace(zero_stage=3)
    note(args)
    with pytest.raises(ValueError, match=r"ds3_gather_for_generation=False leaves .* Leave it at True with use_vllm"):
        CaMOPDTrainer(
            model="never loaded", teachers={"general": make_model(2), "domain": make_model(3)}, args=args,
            train_dataset={branch: make_prompts(branch) for branch in ("general", "domain")}, processing_class=tokenizer,
        )  # fmt: skip


def test_adapter_that_changes_its_base_is_refused_before_the_model_is_loaded(tmp_path, tokenizer):
    from peft import LoraConfig

    with pytest.raises(
        ValueError, match="init_lora_weights='pissa' moves a part of the base weights into the adapter"
    ):
        make_trainer(
            tmp_path, tokenizer, model=str(tmp_path / "nowhere"), peft_config=LoraConfig(init_lora_weights="pissa"),
            teachers={"general": make_model(2), "domain": "adapter_off"},
        )  # fmt: skip


def test_tokenizer_without_an_end_is_refused_before_the_model_is_loaded(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has no end of sequence"):
        make_trainer(tmp_path, tokenizer, model=str(tmp_path / "nowhere"))
    make_model(1).save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    with pytest.raises(ValueError, match="has no end of sequence"):  # the parent loads the tokenizer
        make_trainer(tmp_path, None, model=str(tmp_path / "student"))


def test_tokens_that_the_student_cannot_read_or_that_end_nothing_are_found_at_the_start(tmp_path, caplog):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})  # the model has no row for it
    prompts = [*make_prompts("general").to_list(), {"prompt": "what is <end>"}]
    with pytest.raises(ValueError, match=r"token '<end>' \(id 43\), and the student knows 43 tokens"):
        make_trainer(
            tmp_path, tokenizer,
            train_dataset={"general": Dataset.from_list(prompts), "domain": make_prompts("domain")},
        )  # fmt: skip
    tokenizer.chat_template = tokenizer.chat_template.replace("'.' }}{% endfor %}", "'<end>' }}{% endfor %}")
    make_trainer(tmp_path, tokenizer)
    assert "the chat template ends a turn with '<end>' (id 43), which ends no completion" in caplog.text


@pytest.mark.parametrize("who", ["student", "teacher of branch 'general'"])
def test_context_shorter_than_prompt_and_completion_is_refused(who, tmp_path, tokenizer):
    short, long = make_model(1), make_model(2)
    short.config.max_position_embeddings = 100
    model, teacher = (short, long) if who == "student" else (long, short)
    with pytest.raises(
        ValueError, match=rf"the {who} takes sequences of 100 tokens.*128.*Lower max_completion_length"
    ):
        make_trainer(
            tmp_path, tokenizer, model=model, teachers={"general": teacher, "domain": make_model(3)},
            max_completion_length=64,
        )  # fmt: skip


def test_image_inside_a_message_is_refused(tmp_path, tokenizer):
    parts = [{"type": "text", "text": "what is this?"}, {"type": "image", "text": None}]
    prompts = Dataset.from_list([{"prompt": [{"role": "user", "content": parts}]}])
    with pytest.raises(
        ValueError, match=r"row 0 of branch 'domain' has a part of type 'image'.*images are not supported"
    ):
        make_trainer(tmp_path, tokenizer, train_dataset={"general": make_prompts("general"), "domain": prompts})


def test_vision_language_model_is_refused_with_the_way_out(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(CaMOPDTrainer, "_is_vlm", property(lambda self: True, lambda self, value: None), raising=False)
    with pytest.raises(ValueError, match=r"takes images, which no teacher can score yet. Pass its tokenizer"):
        make_trainer(tmp_path, tokenizer)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"teachers": {"general": None, "domain": "x"}}, ValueError, r"visits branch 'general', but teachers has"),
        ({"teachers": {"general": "x"}}, ValueError, r"visits branch 'domain', but teachers has"),
        ({"teachers": {"general": "x", "domain": "x", "code": "x"}}, ValueError, r"teachers has 'code', .* never visits"),
        ({"teachers": "http://localhost:1"}, TypeError, r"teachers must map each branch"),
        ({"teachers": None}, TypeError, r"teachers must map each branch"),
        (
            {"teachers": {"general": "x", "domain": "adapter_start"}},
            ValueError,
            r"'adapter_start'.*but the student comes without one, or gets a new one by peft_config",
        ),
        ({"teachers": {"general": "x", "domain": "adapter_off"}}, ValueError, r"'adapter_off'.*but the student has none"),
        ({"train_dataset": {"general": make_prompts("g")}}, ValueError, r"visits branch 'domain', but train_d"),
        ({"train_dataset": make_prompts("g")}, TypeError, r"train_dataset must map each branch"),
        ({"train_dataset": None}, TypeError, r"train_dataset must map each branch"),
        ({"eval_dataset": make_prompts("g")}, TypeError, r"eval_dataset must map branches.*\{'general': dataset\}"),
        (
            {"eval_dataset": make_prompts("g").add_column("branch", ["code"] * 11)},
            ValueError,
            r"eval_dataset has branch 'code', which is not in",
        ),
        ({"eval_dataset": {"code": make_prompts("g")}}, ValueError, r"eval_dataset has branch 'code', which is not in"),
        ({"schedule": "general:3,domain:1,code:1"}, ValueError, r"visits branch 'code', but train_dataset has only"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_any_model_is_loaded(kwargs, error, message, tmp_path, tokenizer):
    with pytest.raises(error, match=message):
        make_trainer(tmp_path, tokenizer, **kwargs)


@pytest.mark.parametrize("how", ["the object", "shallow copy", "under its adapter"])
def test_teacher_with_weights_of_the_student_is_refused(how, tmp_path, tokenizer):
    model = make_model(1)
    teacher = copy.copy(model) if how == "shallow copy" else model
    student = model
    if how == "under its adapter":  # PEFT puts the adapter into the very object
        student = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    message = r"teacher of branch 'domain' is the student object itself, or has weights of it.*'adapter_off'"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, tokenizer, model=student, teachers={"general": make_model(2), "domain": teacher})


def test_prompts_that_were_shuffled_or_selected_are_not_copied(tmp_path, tokenizer, monkeypatch):
    """On every process, and into a cache that may not be writable."""
    data = {branch: make_prompts(branch).shuffle(seed=1).select(range(4)) for branch in ("general", "domain")}
    monkeypatch.setattr("datasets.Dataset.flatten_indices", None)
    make_trainer(tmp_path, tokenizer, train_dataset=data)


def test_prompt_with_an_image_is_refused(tmp_path, tokenizer):
    prompts = make_prompts("general").add_column("image", [None] * 11)
    with pytest.raises(ValueError, match=r"column 'image': images are not supported"):
        make_trainer(tmp_path, tokenizer, train_dataset={"general": prompts, "domain": make_prompts("domain")})


def test_warnings_of_a_run_are_lines_like_its_others(tmp_path, monkeypatch, capsys):
    log = logging.getLogger("camopd")
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(log, "propagate", False)
    level = log.level
    show_log(make_args(tmp_path))
    logging.getLogger("camopd.callbacks.guards").warning("step 1: %s", "completions are cut " * 6)
    log.setLevel(level)
    first, *others = capsys.readouterr().err.splitlines()
    assert first.startswith("warning: step 1: completions") and others
    assert all(len(line) < 80 and line.startswith("  ") for line in others) and len(first) < 80
