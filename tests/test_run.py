"""A YAML file is a run: what is read from it, its prompts, its errors in words, and `camopd train` with it."""

import json
import os

import pytest
import torch
import yaml
from datasets import Dataset
from trainers import SETTINGS
from trl import ModelConfig, get_peft_config, get_quantization_config

from camopd import CaMOPDConfig
from camopd import run as run_module
from camopd.data.medical import to_prompt
from camopd.errors import CaMOPDError
from camopd.files import load_prompts
from camopd.run import (
    SERVED_TEACHERS,
    PromptArguments,
    config_and_overrides,
    config_first,
    named_teachers,
    parse,
    read_settings,
    set_env,
    teachers_of,
    written,
)


# --- read_settings --------------------------------------------------------------------------------------------------------


def test_peek_reads_the_mapping_of_the_file(write):
    settings = {"teachers": {"general": "a", "domain": ["http://b", "http://c"]}, "max_steps": 3}
    assert read_settings(write(settings), []) == settings


def test_config_that_is_not_there_is_an_error_with_its_path():
    with pytest.raises(ValueError, match=r"'no/such\.yaml' cannot be read: No such file .* path of a YAML file"):
        read_settings("no/such.yaml", [])


def test_config_that_is_no_yaml_is_an_error_with_the_place(write):
    path = write("teachers: {general: a\nmax_steps: 3\n")
    with pytest.raises(ValueError, match=r"run\.yaml' is not valid YAML: (.|\n)*line 2") as error:
        read_settings(path, [])
    assert path in str(error.value)


@pytest.mark.parametrize(("text", "shown"), [("- a\n- b\n", r"\['a', 'b'\]"), ("", "None"), ("max_steps 3", "'max_")])
def test_config_that_is_no_mapping_is_an_error_that_shows_it(write, text, shown):
    with pytest.raises(ValueError, match=f"must be a mapping from settings to values, got {shown}"):
        read_settings(write(text), [])


@pytest.mark.parametrize(
    ("overrides", "changed"),
    [
        (["--max_steps", "7"], {"max_steps": 7}),
        (["--max_steps=7"], {"max_steps": 7}),
        (["--max-steps=7"], {"max_steps": 7}),
        (["--run_name=a=b"], {"run_name": "a=b"}),
        (["--teachers", '{"general": "x", "domain": ["http://y"]}'], {"teachers": {"general": "x", "domain": ["http://y"]}}),
        (["--learning_rate", "-1"], {"learning_rate": -1}),
        (["--use_peft"], {"use_peft": True}),
        (["--no_exchange"], {"exchange": False}),
        (["--no_rebalance"], {"rebalance": False}),
        (["--no-rebalance", "--use_peft"], {"rebalance": False, "use_peft": True}),
        (["--use_peft", "--output_dir", "there"], {"use_peft": True, "output_dir": "there"}),
        (["--run_name", "step: one: two"], {"run_name": "step: one: two"}),  # no YAML, but a name all the same
    ],
)  # fmt: skip
def test_overrides_win_over_the_file(write, overrides, changed):
    settings = {"teachers": {"general": "a"}, "max_steps": 3}
    assert read_settings(write(settings), overrides) == {**settings, **changed}


# --- parse -------------------------------------------------------------------------------------------------------


@pytest.fixture
def settings(tmp_path):
    return {
        "model_name_or_path": "student", "output_dir": str(tmp_path / "out"), "prompts_per_step": 4, **SETTINGS,
        "teachers": {"general": "a", "domain": "b"}, "prompts": {"general": "g.jsonl", "domain": {"path": "d.jsonl"}},
    }  # fmt: skip


def test_parse_reads_prompts_model_and_settings(write, settings):
    prompts, model, args = parse(write(settings), ["--max_steps", "7", "--lora_r=4", "--no_shuffle_dataset"])
    assert isinstance(prompts, PromptArguments)
    assert isinstance(model, ModelConfig)
    assert isinstance(args, CaMOPDConfig)
    assert prompts.prompts == settings["prompts"]
    assert prompts.eval_prompts is None
    assert (model.model_name_or_path, model.dtype, model.lora_r) == ("student", "float32", 4)
    assert (args.max_steps, args.teachers, args.max_completion_length) == (7, settings["teachers"], 64)
    assert args.shuffle_dataset is False


@pytest.mark.parametrize("place", ["file", "command line"])
def test_unknown_setting_is_an_error_with_its_name(write, settings, place):
    if place == "file":
        settings["lerning_rate"] = 1.0
    with pytest.raises(
        ValueError, match=r"'lerning_rate' in .* is not a setting of a run\. Did you mean 'learning_rate'\?"
    ):
        parse(write(settings), ["--lerning_rate", "1.0"] if place == "command line" else [])


def test_value_of_the_wrong_kind_is_an_error_without_the_list_of_all_settings(write, settings, capsys):
    with pytest.raises(CaMOPDError, match=r"run\.yaml' and the overrides"):
        parse(write(settings), ["--learning_rate", "high"])
    said = capsys.readouterr().err
    assert "--learning_rate" in said
    assert "invalid float value: 'high'" in said
    assert len(said.splitlines()) < 5


def test_run_without_a_student_is_refused(write, settings):
    del settings["model_name_or_path"]
    with pytest.raises(ValueError, match=r"run\.yaml' names no student\. Set model_name_or_path"):
        parse(write(settings), [])


def test_prompts_and_teachers_on_the_command_line_are_json(write, settings):
    text = '{"general": {"path": "x.csv", "limit": 3}, "domain": "y.parquet"}'
    prompts, _, args = parse(
        write(settings), ["--prompts", text, "--eval_prompts", text, "--teachers", '{"general": "c"}']
    )
    assert prompts.prompts == prompts.eval_prompts == json.loads(text)
    assert args.teachers == {"general": "c"}


@pytest.mark.parametrize("name", ["prompts", "eval_prompts"])
@pytest.mark.parametrize("text", ["general.jsonl", '{"general": "general.jsonl"', "{general: general.jsonl}"])
def test_prompts_that_are_no_json_are_an_error_that_shows_the_form(write, settings, name, text):
    with pytest.raises(ValueError, match=f"^{name} must map each branch to its prompts, got") as error:
        parse(write(settings), [f"--{name}", text])
    assert repr(text) in str(error.value)
    assert f'--{name} \'{{"general": "general.jsonl", ...}}\'' in str(error.value)


def test_held_out_prompts_that_are_a_list_are_not_ignored(write, settings):
    settings["eval_prompts"] = ["g.jsonl"]
    with pytest.raises(ValueError, match=r"eval_prompts must map each branch to its prompts, got \['g.jsonl'\]"):
        parse(write(settings), [])


def test_broken_json_of_another_setting_is_an_error_with_its_name(write, settings):
    with pytest.raises(ValueError, match=r'^teachers is not valid JSON: \{"general": "a" \('):
        parse(write(settings), ["--teachers", '{"general": "a"'])


@pytest.mark.parametrize("place", ["file", "command line"])
def test_resume_from_checkpoint_true_is_no_path(write, settings, place):
    if place == "file":
        settings["resume_from_checkpoint"] = True
    overrides = ["--resume_from_checkpoint", "true"] if place == "command line" else []
    assert parse(write(settings), overrides)[2].resume_from_checkpoint is True


@pytest.mark.parametrize("place", ["file", "command line", "short"])
def test_resume_from_checkpoint_auto_is_a_word(write, settings, place):
    if place == "file":
        settings["resume_from_checkpoint"] = "auto"
    words = {"file": [], "command line": ["--resume_from_checkpoint=Auto"], "short": ["--resume", "auto"]}[place]
    config, overrides = config_and_overrides("camopd train", [write(settings), *words])
    assert parse(config, overrides)[2].resume_from_checkpoint == "auto"


def test_resume_takes_a_checkpoint_and_wins_over_the_file(write, settings):
    settings["resume_from_checkpoint"] = True
    config, overrides = config_and_overrides(
        "camopd train", [write(settings), "--resume=out/checkpoint-3", "--seed", "1"]
    )
    assert parse(config, overrides)[2].resume_from_checkpoint == "out/checkpoint-3"
    assert read_settings(config, overrides)["resume_from_checkpoint"] == "out/checkpoint-3"


# --- teachers ----------------------------------------------------------------------------------------------------


def test_teachers_are_those_of_the_config_where_nothing_is_served(tmp_path):
    teachers = {"general": "a", "domain": ["http://b"]}
    assert teachers_of({"teachers": teachers, "output_dir": str(tmp_path)}) == teachers


def test_urls_of_camopd_serve_win_over_the_config(tmp_path):
    (tmp_path / SERVED_TEACHERS).write_text('{"general": ["http://localhost:8001"], "stranger": ["http://x"]}')
    settings = {"teachers": {"general": "a", "domain": "adapter_off"}, "output_dir": str(tmp_path)}
    served = {"urls": ["http://localhost:8001"], "model": "a"}
    assert teachers_of(settings) == {"general": served, "domain": "adapter_off"}
    assert settings["teachers"]["general"] == "a"


def test_url_in_the_config_wins_over_what_camopd_serve_has_left_behind(tmp_path):
    (tmp_path / SERVED_TEACHERS).write_text('{"general": ["http://localhost:8001"]}')
    for teacher in ("http://elsewhere:1", ["http://elsewhere:1"], "adapter_off"):
        assert teachers_of({"teachers": {"general": teacher}, "output_dir": str(tmp_path)}) == {"general": teacher}


def test_served_teachers_of_another_output_dir_do_not_matter(tmp_path):
    (tmp_path / SERVED_TEACHERS).write_text('{"general": ["http://localhost:8001"]}')
    settings = {"teachers": {"general": "a"}, "output_dir": str(tmp_path / "other")}
    assert teachers_of(settings) == {"general": "a"}


@pytest.mark.parametrize("text", ['{"general": ["http', "7"])
def test_broken_list_of_served_teachers_is_an_error_with_its_path(tmp_path, text):
    (tmp_path / SERVED_TEACHERS).write_text(text)
    with pytest.raises(ValueError, match=r"teachers\.json'.* cannot be read\. Start it again, or delete the file"):
        teachers_of({"teachers": {"general": "a"}, "output_dir": str(tmp_path)})


@pytest.mark.parametrize("teachers", [None, {}, "http://localhost:8001", ["a"]])
def test_teachers_that_map_no_branch_are_an_error_that_shows_the_form(teachers):
    with pytest.raises(
        ValueError, match=r"teachers must map each branch .*got (.|\n)*\nteachers:\n  general: "
    ) as error:
        teachers_of({"teachers": teachers})
    assert repr(teachers) in str(error.value)


# --- prompts -----------------------------------------------------------------------------------------------------

ROWS = [{"prompt": "one", "other": 1}, {"prompt": "two", "other": 2}, {"prompt": "three", "other": 3}]
TEXTS = ["one", "two", "three"]


@pytest.fixture
def save(tmp_path):
    """Save rows in the format that the name's ending says and return the path."""

    def save(name, rows=ROWS):
        path = tmp_path / name
        dataset = Dataset.from_list(rows)
        if path.suffix == ".parquet":
            dataset.to_parquet(path)
        elif path.suffix == ".csv":
            dataset.to_csv(path)
        else:
            dataset.to_json(path, lines=path.suffix == ".jsonl")
        return str(path)

    return save


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.parquet", "p.csv"])
def test_prompts_are_read_from_each_kind_of_file(save, name):
    dataset = load_prompts(save(name), "general")
    assert dataset.column_names == ["prompt"]
    assert dataset["prompt"][:] == TEXTS


def test_conversations_may_stand_in_a_column_messages(save):
    conversation = [{"role": "user", "content": "hello"}]
    dataset = load_prompts(save("p.jsonl", [{"messages": conversation, "id": 4}]), "general")
    assert dataset.column_names == ["prompt"]
    assert dataset[0]["prompt"] == conversation


def test_column_can_be_named_beside_one_called_prompt(save):
    path = save("p.jsonl", [{"prompt": "system", "question": "what?"}])
    assert load_prompts(path, "general")["prompt"][:] == ["system"]
    assert load_prompts({"path": path, "column": "question"}, "general")["prompt"][:] == ["what?"]


@pytest.mark.parametrize(("limit", "expected"), [(2, TEXTS[:2]), (3, TEXTS), (9, TEXTS), (None, TEXTS)])
def test_limit_takes_the_first_rows(save, limit, expected):
    assert load_prompts({"path": save("p.jsonl"), "limit": limit}, "general")["prompt"][:] == expected


@pytest.mark.parametrize("limit", [0, -1, "2", 1.5, True])
def test_limit_that_is_no_number_of_rows_is_refused(save, limit):
    with pytest.raises(ValueError, match=f"limit .*'domain' must be a whole number .*at least 1, got {limit!r}"):
        load_prompts({"path": save("p.jsonl"), "limit": limit}, "domain")


def test_split_may_be_a_slice(save):
    assert load_prompts({"path": save("p.jsonl"), "split": "train[1:]"}, "general")["prompt"][:] == TEXTS[1:]


def test_split_of_a_folder_is_found_by_its_name(save, tmp_path):
    save("train.jsonl")
    save("test.jsonl", ROWS[2:])
    assert load_prompts({"path": str(tmp_path), "split": "test"}, "general")["prompt"][:] == ["three"]


def test_split_that_is_not_there_is_an_error_with_those_that_are(save):
    with pytest.raises(ValueError, match=r"'general', .*\(split 'test'\), cannot be loaded: .*'train'"):
        load_prompts({"path": save("p.jsonl"), "split": "test"}, "general")


def test_file_that_is_not_there_is_an_error_with_branch_and_path():
    with pytest.raises(ValueError, match=r"'domain' are named as 'no/such\.jsonl', but there is no such file. Fix"):
        load_prompts("no/such.jsonl", "domain")


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', "JSON parse error: .* row 1"),
        ("p.csv", 'prompt\n"a,1\n', "EOF inside string"),
        ("p.parquet", "no parquet", "Parquet"),
    ],
)
def test_broken_file_is_an_error_that_says_what_is_wrong_with_it(tmp_path, name, text, reason):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"'general', .*{name}' \(split 'train'\), cannot be loaded: .*{reason}"):
        load_prompts(str(tmp_path / name), "general")


def test_missing_column_is_an_error_with_those_that_are_there(save):
    path = save("p.jsonl", [{"question": "what?", "answer": "that"}])
    with pytest.raises(
        ValueError, match=r"columns \['question', 'answer'\], none of them 'prompt' or 'messages'"
    ) as error:
        load_prompts(path, "general")
    assert f"{{path: {path}, column: ...}}" in str(error.value)
    with pytest.raises(ValueError, match=r"\['question', 'answer'\], none of them 'text'"):
        load_prompts({"path": path, "column": "text"}, "general")


@pytest.mark.parametrize(
    "source", [{"path": "p.jsonl", "colum": "x"}, {"column": "x"}, {"path": 3}, None, [], ["p.jsonl", 7], 7], ids=repr
)
def test_prompts_in_another_form_are_an_error_that_shows_the_form(source):
    with pytest.raises(
        ValueError, match=r"'general' are .* `path` and any of `name`, `split`, `column`, `limit`"
    ) as error:
        load_prompts(source, "general")
    assert repr(source) in str(error.value)


def test_hub_dataset_out_of_reach_is_an_error_in_words():  # HF_HUB_OFFLINE=1
    with pytest.raises(
        ValueError,
        match=r"'nobody/nothing' .*, cannot be loaded: HF_HUB_OFFLINE is set(.|\n)*hf download nobody/nothing ",
    ) as error:
        load_prompts("nobody/nothing", "general")
    assert ".jsonl, .json, .parquet, .csv file or the name of a dataset of the Hub" in str(error.value)


@pytest.mark.parametrize(
    ("given", "warned"),
    [({}, True), ({"eval_on_start": True}, False), ({"eval_strategy": "steps", "eval_steps": 2}, False)],
)
def test_held_out_prompts_that_nobody_measures_are_warned_of(write, settings, given, warned, caplog):
    prompts, _, args = parse(write({**settings, "eval_prompts": {"general": "g.jsonl"}, **given}), [])
    run_module.warn_of_unused(prompts, args)
    assert ("eval_prompts have no effect" in caplog.text) == warned


# --- conversations -----------------------------------------------------------------------------------------------


def conversation(*roles):
    return [{"role": role, "content": f"{role} {place}"} for place, role in enumerate(roles)]


@pytest.mark.parametrize(
    ("roles", "kept"),
    [
        (("user",), 1),
        (("system", "user", "assistant"), 2),  # the answer of a fine-tuning dataset
        (("user", "assistant", "user"), 3),
        (("user", "assistant", "user", "assistant"), 3),
        (("user", "assistant", "assistant"), 1),
    ],
)
@pytest.mark.parametrize("column", ["messages", "talk"])
def test_messages_lose_the_answer_at_their_end(tmp_path, roles, kept, column):
    path = tmp_path / "sft.jsonl"
    path.write_text(json.dumps({column: conversation(*roles), "category": "talk", "answer": "gold"}) + "\n")
    dataset = load_prompts({"path": str(path), "column": column}, "domain")
    assert dataset.column_names == ["prompt", "category"]
    assert dataset[0]["prompt"] == conversation(*roles)[:kept]


def test_conversation_without_a_turn_to_answer_is_an_error_with_its_row(tmp_path):
    path = tmp_path / "sft.jsonl"
    rows = [conversation("user", "assistant"), conversation("system", "assistant")]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    with pytest.raises(
        ValueError, match=r"row 1 of '.*sft\.jsonl', prompts of branch 'domain': the conversation .* has"
    ):
        load_prompts(str(path), "domain")


def test_row_that_cannot_be_put_into_a_template_is_an_error_with_its_row(tmp_path):
    path = tmp_path / "raw.jsonl"
    path.write_text('{"question": "Which?"}\n{"question": " "}\n')
    with pytest.raises(
        ValueError, match=r"row 1 of '.*raw\.jsonl', prompts of branch 'domain': a medical row has no text"
    ):
        load_prompts(str(path), "domain", to_prompt)


# --- the student's own settings ----------------------------------------------------------------------------------

MODEL_FIELDS = {  # of ModelConfig: what a run does with each
    "model_name_or_path": "the student", "model_revision": "in model_init_kwargs", "dtype": "in model_init_kwargs",
    "attn_implementation": "in model_init_kwargs", "use_peft": "peft_config", "lora_task_type": "refused but CAUSAL_LM",
    **dict.fromkeys(
        ["lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters", "lora_modules_to_save",
         "use_rslora", "use_dora"], "peft_config"
    ),
    **dict.fromkeys(
        ["load_in_8bit", "load_in_4bit", "bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"],
        "quantization_config",
    ),
}  # fmt: skip


def test_settings_of_the_model_are_all_known():
    assert set(ModelConfig.__dataclass_fields__) == set(MODEL_FIELDS)


INIT = {"dtype": "bfloat16", "attn_implementation": "eager", "revision": "mine"}
DEFAULT = {"dtype": "float32", "attn_implementation": None, "revision": "main"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, DEFAULT),
        ({"model_init_kwargs": INIT}, INIT),
        ({"model_init_kwargs": {"torch_dtype": "bfloat16"}}, {**DEFAULT, "dtype": "bfloat16"}),
        ({"dtype": "bfloat16", "model_init_kwargs": INIT}, INIT),
        ({"dtype": "float16", "model_revision": "v1"}, {**DEFAULT, "dtype": "float16", "revision": "v1"}),
        ({"attn_implementation": "sdpa"}, {**DEFAULT, "attn_implementation": "sdpa"}),
        ({"model_init_kwargs": {"device_map": "cpu"}, "dtype": "auto"}, {**DEFAULT, "device_map": "cpu", "dtype": "auto"}),
    ],
)  # fmt: skip
def test_settings_of_the_model_by_the_user_win_over_a_default(write, settings, given, expected):
    del settings["dtype"]
    _, model, args = parse(write({**settings, **given}), [])
    assert args.model_init_kwargs == expected
    assert model.dtype == expected["dtype"]  # which becomes the compute type of 4-bit weights


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"dtype": "float32", "model_init_kwargs": INIT}, r"dtype is 'float32', and model_init_kwargs has dtype='bf"),
        ({"model_revision": "main", "model_init_kwargs": INIT}, r"model_revision is 'main', .* has revision='mine'"),
        ({"attn_implementation": "sdpa", "model_init_kwargs": INIT}, r"'sdpa', .*attn_implementation='eager'"),
        ({"model_init_kwargs": {"dtype": "float16", "torch_dtype": "bfloat16"}}, r"dtype='float16' and torch_dtype='bf"),
        ({"load_in_4bit": True, "model_init_kwargs": {"quantization_config": {}}}, "load_in_4bit=True and model_init_kw"),
        ({"lora_task_type": "SEQ_CLS"}, "lora_task_type='SEQ_CLS' is not for"),
        ({"trust_remote_code": False, "model_init_kwargs": {"trust_remote_code": True}}, "trust_remote_code is False, and"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", ["file", "command line"])
def test_settings_that_contradict_each_other_are_refused_with_both(write, settings, given, said, place):
    del settings["dtype"]
    own = (
        {name: value for name, value in given.items() if name != "model_init_kwargs"}
        if place == "command line"
        else {}
    )
    path = write({**settings, **{name: value for name, value in given.items() if name not in own}})
    with pytest.raises(ValueError, match=said):
        parse(path, [word for name, value in own.items() for word in (f"--{name}", str(value))])


def test_settings_of_lora_and_4_bit_weights_reach_their_configs(write, settings):
    lora = {
        "lora_r": 3, "lora_alpha": 5, "lora_dropout": 0.25, "lora_target_modules": ["q_proj", "v_proj"],
        "lora_target_parameters": ["x.weight"], "lora_modules_to_save": ["lm_head"], "use_rslora": True, "use_dora": True,
    }  # fmt: skip
    bits = {
        "load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "use_bnb_nested_quant": True, "bnb_4bit_quant_storage": "uint8",
        "model_init_kwargs": {"dtype": "bfloat16"},
    }  # fmt: skip
    del settings["dtype"]
    _, model, _ = parse(write({**settings, "use_peft": True, **lora, **bits}), [])
    found = get_peft_config(model)
    for name, value in lora.items():
        attribute = {"lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}.get(
            name, name.removeprefix("lora_")
        )
        value = set(value) if name == "lora_target_modules" else value
        assert getattr(found, attribute) == value, name
    quantization = get_quantization_config(model)
    assert (quantization.load_in_4bit, quantization.bnb_4bit_quant_type) == (True, "fp4")
    assert (quantization.bnb_4bit_use_double_quant, quantization.bnb_4bit_quant_storage) == (True, torch.uint8)
    assert quantization.bnb_4bit_compute_dtype == torch.bfloat16


def test_settings_of_the_model_without_effect_are_warned_about(write, settings, caplog):
    parse(write({**settings, "lora_r": 4, "bnb_4bit_quant_type": "fp4"}), ["--use_dora", "true"])
    said = [record.getMessage() for record in caplog.records if record.name == "camopd.run"]
    assert said == [
        "lora_r, use_dora: no effect without use_peft=True",
        "bnb_4bit_quant_type: no effect without load_in_4bit=True",
    ]


# --- the command line --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [["run.yaml", "--seed", "3"], ["--config", "run.yaml", "--seed", "3"], ["--seed", "3", "--config=run.yaml"]],
)
def test_file_may_be_named_with_config(words):
    assert config_and_overrides("camopd train", words) == ("run.yaml", ["--seed", "3"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config"], "names no file"),
        (["--config", "--seed", "3"], "names no file"),
        (["a.yaml", "--config", "b.yaml"], r"twice, 'a\.yaml' and --config 'b\.yaml'"),
    ],
)
def test_config_without_a_file_or_with_two_is_refused(words, said):
    with pytest.raises(ValueError, match=said):
        config_first(words)


def test_command_line_of_a_script_is_read(write):
    assert written(["--dtype", "float32", "--use_peft"]) == {"dtype": "float32", "use_peft": True}
    path = write({"dtype": "bfloat16", "lora_r": 4})
    assert written(["--dtype", "auto", "--config", path]) == {"dtype": "auto", "lora_r": 4}


def test_config_in_latin_1_is_an_error_in_words(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes("run_name: caf\u00e9\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"run\.yaml' is not UTF-8.*Save it as UTF-8"):
        read_settings(str(path), [])


def test_command_line_behind_the_dashes_is_left_to_vllm():
    assert config_first(["run.yaml", "--", "--config", "x"]) == ["run.yaml", "--", "--config", "x"]


@pytest.mark.parametrize("text", ["run_name: é\n", "run_name: 'a: b'\nmax_steps: 3\n"])
def test_env_of_the_file_is_set(write, settings, text, monkeypatch):
    monkeypatch.setenv("SOME_VARIABLE", "before")
    parse(write({**settings, **yaml.safe_load(text), "env": {"SOME_VARIABLE": 7}}), [])
    assert os.environ["SOME_VARIABLE"] == "7"
    with pytest.raises(
        ValueError, match=r"env must map environment variables to their values, got a list\."
    ) as refused:
        parse(write({**settings, "env": ["HF_TOKEN=hf_secret"]}), [])
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("env", [[], "", 0, False], ids=repr)
def test_env_that_is_no_mapping_is_refused_empty_or_not(env):
    with pytest.raises(ValueError, match=f"got a {type(env).__name__}"):
        set_env({"env": env})


def test_file_under_a_file_is_refused(write, settings):
    """It would be read by nobody."""
    with pytest.raises(ValueError, match="has no other file under it: leave 'config' out"):
        parse(str(write({**settings, "config": "base.yaml"})), [])


def test_variable_without_a_value_is_refused():
    """It would be the text "None"."""
    with pytest.raises(ValueError, match="env has no value for HF_TOKEN"):
        set_env({"env": {"HF_TOKEN": None}})


def test_env_of_the_command_line_is_taken_in_place_of_the_files(write, settings, monkeypatch):
    for name in ("SOME_VARIABLE", "ANOTHER"):
        monkeypatch.setenv(name, "before")
    config = write({**settings, "env": {"SOME_VARIABLE": "file"}})
    _, _, args = parse(config, ["--env", '{"ANOTHER": "words"}', "--max_steps", "3"])
    assert (os.environ["SOME_VARIABLE"], os.environ["ANOTHER"], args.max_steps) == ("before", "words", 3)


def test_devices_in_env_are_those_of_the_process_that_trains(write, settings, monkeypatch):
    names = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ZE_AFFINITY_MASK",
             "ONEAPI_DEVICE_SELECTOR", "ASCEND_RT_VISIBLE_DEVICES", "TPU_VISIBLE_CHIPS",
             "CPU_VISIBLE_MEMORY_NODES")  # fmt: skip
    env = dict.fromkeys((*names, "CUDA_DEVICE_ORDER"), "0,1")
    for name in env:
        monkeypatch.setenv(name, "shell")
    assert set_env({"env": env}) == {"CUDA_DEVICE_ORDER": "0,1"}
    assert [os.environ[name] for name in names] == ["shell"] * len(names)
    parse(write({**settings, "env": env}), [])
    assert [os.environ[name] for name in env] == ["0,1"] * len(env)


@pytest.mark.parametrize(
    ("in_file", "words", "expected"),
    [
        ({"gap_student": "engine", "importance_sampling_mode": "none"}, ["--student_logps", "trainer"], "trainer"),
        ({"student_logps": "engine", "importance_sampling_mode": "none"}, ["--gap_student", "trainer"], "trainer"),
        ({"gap_student": "engine"}, ["--importance_sampling_mode", "none"], "engine"),
        ({"importance_sampling_mode": "none"}, ["--gap_student", "engine", "--student_logps", "trainer"], "trainer"),
        ({"importance_sampling_mode": "none"}, ["--student_logps=trainer", "--gap-student=engine"], "engine"),
    ],
)
def test_command_line_wins_whichever_of_two_names_a_setting_has(in_file, words, expected, write, settings):
    _, _, args = parse(write({**settings, **in_file}), words)
    assert (args.student_logps, args.gap_student) == (expected, None)
    assert read_settings(write({**settings, **in_file}), words).get("student_logps", expected) == expected


@pytest.mark.parametrize("word", ["--no_exchange", "--no-exchange", "--no_rebalance"])
def test_parse_takes_the_flag_that_switches_rebalancing_off_by_both_names(word, write, settings):
    _, _, args = parse(write(settings), [word])
    assert args.rebalance is False


def test_command_line_wins_over_a_method_file_whichever_name_a_setting_has(write, settings, tmp_path):
    method = tmp_path / "method.yaml"
    method.write_text("gap_student: engine\nimportance_sampling_mode: none\n")
    words = [write(settings), "--method", str(method)]
    _, _, args = parse(*config_and_overrides("camopd train", words))
    assert args.student_logps == "engine"
    _, _, args = parse(*config_and_overrides("camopd train", [*words, "--student_logps", "trainer"]))
    assert args.student_logps == "trainer"


def test_lists_and_nulls_of_a_method_file_are_what_they_are_in_the_run_s_own(write, settings, tmp_path):
    """The words of a command line cannot say them; a sweep's settings go the same way."""
    method = tmp_path / "method.yaml"
    given = {"report_to": [], "run_name": None, "eval_tasks": ["gsm8k", "ifeval"], "lora_target_modules": ["q", "v"]}
    method.write_text(yaml.safe_dump(given))
    words = [write({**settings, "run_name": "mine"}), "--method", str(method)]
    _, model, args = parse(*config_and_overrides("camopd train", words))
    _, own_model, own = parse(write({**settings, **given}), [])
    assert (args.report_to, args.run_name, args.eval_tasks) == (own.report_to, own.run_name, own.eval_tasks)
    assert args.eval_tasks == ["gsm8k", "ifeval"] and args.run_name is None
    assert model.lora_target_modules == own_model.lora_target_modules == ["q", "v"]
    _, _, args = parse(*config_and_overrides("camopd train", [*words, "--run_name", "[other]"]))  # the later word wins
    assert args.run_name == "[other]"  # which is a text, whatever it looks like
    _, model, _ = parse(*config_and_overrides("camopd train", [*words, "--lora_target_modules", "[a]", "b"]))
    assert model.lora_target_modules == ["[a]", "b"]
    with pytest.raises(CaMOPDError):
        parse(words[0], ["--seed", "null"])


def test_home_in_a_path_is_that_of_the_trainer(write, settings, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    given = {
        "output_dir": "~/runs/x",
        "model_name_or_path": "~/model",
        "resume_from_checkpoint": "~/runs/x/checkpoint-2",
    }
    path = write({**settings, **given})
    _, model, args = parse(path, [])
    assert read_settings(path, [])["model_name_or_path"] == model.model_name_or_path == str(tmp_path / "model")
    assert args.resume_from_checkpoint == str(tmp_path / "runs/x/checkpoint-2")
    assert read_settings(path, [])["output_dir"] == args.output_dir == str(tmp_path / "runs/x")
    assert read_settings(path, ["--output_dir=~/y"])["output_dir"] == str(tmp_path / "y")


def test_teacher_that_would_be_another_model_than_it_seems_is_refused(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"'domain', .*adapter', is a LoRA adapter.*Merge it.*'adapter_start'"):
        named_teachers({"teachers": {"domain": str(tmp_path / "adapter")}})
    settings = {"model_name_or_path": "org/med", "teachers": {"general": "org/base", "domain": "org/med"}}
    assert named_teachers({**settings, "model_revision": "main"}) == settings["teachers"]
    kwargs = {"teacher_model_init_kwargs": {"revision": "v2"}}
    assert named_teachers({**settings, "model_revision": "v2", **kwargs}) == settings["teachers"]
    with pytest.raises(
        ValueError, match=r"'domain' has the student's name, 'org/med'.*revision: main.*--revision v2 .*DIR for both"
    ):
        named_teachers({**settings, "model_revision": "v2"})
