"""`camopd check`, which shows as a table what is found wrong with a run and its teachers, the cheapest first.

The servers are those of fake_vllm.py.
"""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import CHAT_TEMPLATE, VOCAB, make_model, make_prompts, make_tokenizer
from fake_vllm import other_tokenizer, reference_logps, with_noise, without_weights
from trainers import SETTINGS
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LlamaConfig
from trl import ModelConfig

from camopd import CaMOPDConfig, cli
from camopd.commands.check import check_adapter, check_unloaded
from camopd.commands.check_run import check_room
from camopd.run import SERVED_TEACHERS
from camopd.teachers.check import PROBE_CONVERSATIONS, Finding, Probe


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """The folder of a student that ends the probes' answers as it should."""
    folder, model, tokenizer = tmp_path_factory.mktemp("models") / "student", make_model(0), make_tokenizer()
    with torch.no_grad():
        rows = Probe.of(tokenizer, 512).token_ids
        ends = [model.model(torch.tensor([ids[:-1]])).last_hidden_state[0, -1] for ids in rows]
        model.lm_head.weight[2] = torch.linalg.pinv(torch.stack(ends)) @ torch.full((len(ends),), 10.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def student_model(student):
    return AutoModelForCausalLM.from_pretrained(student).eval()


def test_local_teacher_of_the_same_family_is_ok(student, tokenizer):
    found = check_unloaded("domain", str(student), tokenizer, 512, {}, 0)
    assert found == Finding(
        "domain", "in the process", "ok", f"{student}, not on a server: the same tokens as the student, context fits"
    )


def test_local_teacher_with_fewer_tokens_than_the_student_can_write_is_an_error(student, tokenizer):
    found = check_unloaded("domain", str(student), tokenizer, 512, {}, len(VOCAB))
    assert found.level == "ok"
    found = check_unloaded("domain", str(student), tokenizer, 512, {}, 64)
    assert found.level == "error"
    assert "the student can write 64 tokens, the rows of its head, and the teacher knows 43" in found.text
    assert "model.resize_token_embeddings(43)" in found.text


@pytest.mark.parametrize("template", [CHAT_TEMPLATE.replace("'a '", "'a? '"), None])
def test_local_teacher_with_another_chat_template_is_a_warning(tokenizer, tmp_path, template):
    make_model(1).save_pretrained(tmp_path)
    theirs = make_tokenizer()
    theirs.chat_template = template
    theirs.save_pretrained(tmp_path)
    found = check_unloaded("domain", str(tmp_path), tokenizer, 128, {}, 0)
    assert (found.subject, found.level) == ("chat template", "warning")
    assert str(tmp_path) in found.text and "chat_template.jinja" in found.text
    assert ("writes a conversation as" in found.text) is (template is not None)
    plain = make_tokenizer()
    plain.chat_template = None
    assert check_unloaded("domain", str(tmp_path), plain, 128, {}, 0).level == "ok"


def test_local_teacher_with_a_short_context_is_an_error_with_both_numbers(student, tokenizer):
    found = check_unloaded("domain", str(student), tokenizer, 513, {}, 0)
    assert found.level == "error"
    assert (
        "branch 'domain' takes sequences of 512 tokens, but max_prompt_length + max_completion_length is 513"
        in found.text
    )
    assert "Lower max_completion_length" in found.text


def test_local_teacher_with_other_tokens_is_an_error_with_an_example(student, tokenizer, tmp_path):
    make_model(1).save_pretrained(tmp_path)
    other_tokenizer().save_pretrained(tmp_path)
    found = check_unloaded("domain", str(tmp_path), tokenizer, 128, {}, 0)
    assert found.level == "error"
    assert (
        "the teacher of branch 'domain' has another tokenizer than the student: 26 of 43 tokens differ" in found.text
    )


@pytest.mark.parametrize(
    ("spec", "guess"),
    [
        ("/no/such/folder", "(there is no such folder with a model)"),
        ("localhost:8001", "(did you mean 'http://localhost:8001'?)"),
        ("adapter-off", "(did you mean 'adapter_off'?)"),
    ],
)
def test_local_teacher_that_is_not_there_is_an_error_with_what_was_meant(tokenizer, spec, guess):
    found = check_unloaded("domain", spec, tokenizer, 128, {}, 0)
    assert found.level == "error"
    assert f"{spec!r} cannot be loaded {guess}: " in found.text
    assert "Give a folder with a model, a model id of the Hub, the URL of a vLLM server" in found.text


def test_local_teacher_without_a_tokenizer_is_an_error(tokenizer, tmp_path):
    make_model(1).save_pretrained(tmp_path)
    found = check_unloaded("domain", str(tmp_path), tokenizer, 128, {}, 0)
    assert found.level == "error"
    assert f"{str(tmp_path)!r} cannot be loaded" in found.text


@pytest.mark.parametrize("spec", [5, ["http://localhost:8001", "a/model"], {"path": "a/model"}], ids=repr)
def test_teacher_of_no_known_form_is_an_error_that_shows_it(tokenizer, spec):
    found = check_unloaded("domain", spec, tokenizer, 128, {}, 0)
    assert found.level == "error"
    assert f"the teacher is {spec!r} ({type(spec).__name__})" in found.text
    assert "or 'adapter_off'; several URLs are a list" in found.text


def test_adapter_start_needs_a_saved_adapter():
    found = check_adapter("domain", "adapter_start", use_peft=False, is_adapter=True)
    assert (found.level, found.text) == ("ok", "the student with its adapter as it was before training")
    found = check_adapter("domain", "adapter_start", use_peft=True, is_adapter=True)
    assert found.level == "error"
    assert "the student must be a saved adapter, without use_peft" in found.text


def test_adapter_off_needs_an_adapter():
    found = check_adapter("domain", "adapter_off", use_peft=True, is_adapter=False)
    assert (found.level, found.text) == ("ok", "the student without its adapter")
    found = check_adapter("domain", "adapter_off", use_peft=False, is_adapter=False)
    assert (found.level, found.text) == ("error", "the student has no adapter. Set use_peft, or name a model")


@pytest.fixture
def config(student, tmp_path):
    """Write the YAML file of a run and return its path."""

    def config(**changes):
        settings = {
            **SETTINGS, "model_name_or_path": str(student), "output_dir": str(tmp_path / "out"), "prompts_per_step": 4,
            **changes,
        }  # fmt: skip
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(settings, sort_keys=False))
        return str(path)

    return config


@pytest.fixture
def check(config, capsys, monkeypatch):
    """Run `camopd check` and return its exit code and its table: (teacher, subject) -> (level, text)."""
    monkeypatch.setenv("COLUMNS", "1000")

    def check(*overrides, **changes):
        try:
            cli.main(["check", config(**changes), *overrides])
            code = 0
        except SystemExit as stopped:
            code = stopped.code
        return code, read(capsys.readouterr().out)

    return check


def read(output):
    header, *lines = output.splitlines()
    starts = [header.index(word) for word in ("branch", "what", "found")]
    rows = {}
    for line in lines:
        teacher = line[: starts[1]].strip()
        subject, _, level = line[starts[1] : starts[2]].strip().rpartition(" ")
        if teacher:
            rows[teacher, subject.strip()] = level, line[starts[2] :].strip()
        else:  # the text goes on
            last = next(reversed(rows))
            rows[last] = rows[last][0], f"{rows[last][1]} {line.strip()}"
    return rows


@pytest.fixture
def start_domain(start_server, student, student_model):
    """A server with the student's own start, as `camopd serve` would start it."""
    return lambda **changes: start_server(
        **{"model": student_model, "name": "domain", "root": str(student), **changes}
    )


def test_teachers_that_are_well_are_ok_in_every_line_and_exit_0(start_server, start_domain, check, student_model):
    general = start_server(model=with_noise(student_model, 0.01), name="the-general")
    domain = start_domain(compact=True)
    code, table = check(teachers={"general": general.url, "domain": [domain.url]})
    assert code == 0
    assert {level for level, _ in table.values()} == {"ok"}
    subjects = ["reachable", "context", "tokenizer", "chat template"]
    assert list(table) == [
        *(("general", subject) for subject in (*subjects, "log-probs", "end of sequence", "initial KL")),
        *(("domain", subject) for subject in (*subjects, "log-probs", "self-gap", "end of sequence", "initial KL")),
        *(("run", subject) for subject in ("output_dir", "memory", "disk")),
        *(("student", subject) for subject in ("context", "end of sequence")),
    ]
    assert table["general", "reachable"][1] == f"the-general at {general.url} (JSON)"
    assert table["domain", "context"][1] == "256 tokens, 129 needed"
    assert table["domain", "initial KL"][1].startswith("0.000 nats per token over ")
    assert float(table["general", "initial KL"][1].split()[0]) > 0.0


@pytest.mark.parametrize("settings", [{"divergence": "full"}, {"baseline": "kl"}], ids=str)
@pytest.mark.parametrize("with_prompts", [True, False])
def test_servers_where_whole_distributions_are_needed_are_an_error(
    start_server, start_domain, check, student_model, tmp_path, settings, with_prompts
):
    if with_prompts:
        for branch in ("general", "domain"):
            make_prompts(branch, 9).to_json(tmp_path / f"{branch}.jsonl")
        settings = {
            **settings,
            "prompts": {branch: str(tmp_path / f"{branch}.jsonl") for branch in ("general", "domain")},
        }
    teachers = {"general": start_server(model=student_model).url, "domain": start_domain().url}
    code, table = check(teachers=teachers, **settings)
    assert code == 2 and table["run", "settings"][0] == "error"
    assert "of branch 'general'" in table["run", "settings"][1] and "divergence='top_k'" in table["run", "settings"][1]


def test_server_that_gives_fewer_likeliest_tokens_than_the_run_asks_for_is_an_error(start_server, start_domain, check):
    server = start_server()
    server.most_logprobs = 8
    teachers = {"general": server.url, "domain": start_domain().url}
    code, table = check(teachers=teachers, divergence="top_k", divergence_top_k=9)
    assert code == 2 and table["general", "log-probs"][0] == "error" and "9" in table["general", "log-probs"][1]
    assert check(teachers=teachers, divergence="top_k", divergence_top_k=8)[0] == 0


def test_more_likeliest_tokens_than_a_teacher_has_are_an_error(check, student, start_domain):
    teachers = {"general": str(student), "domain": start_domain().url}
    code, table = check(teachers=teachers, divergence="top_k", divergence_top_k=len(VOCAB) + 1)
    assert code == 2 and f"has: {len(VOCAB)}. Set at most {len(VOCAB)}" in table["general", "in the process"][1]


def test_initial_kl_is_measured_on_the_students_own_tokens(start_server, start_domain, check):
    """It estimates a KL, so that it is positive for another model; log-probs of the probe's texts would not be."""
    code, table = check(teachers={"general": start_server(model=make_model(1)).url, "domain": start_domain().url})
    assert code == 0
    level, text = table["general", "initial KL"]
    assert level == "warning"
    assert float(text.split()[0]) > 0.5
    assert 4 <= int(text.split()[5]) <= 4 * 48


def test_students_own_tokens_are_samples_whatever_its_generation_config_says(
    start_domain, check, student, student_model, tmp_path
):
    bent = shutil.copytree(student, tmp_path / "bent")
    GenerationConfig(
        do_sample=True,
        temperature=0.01,
        top_k=1,
        top_p=0.1,
        repetition_penalty=9.0,
        min_p=0.9,
        suppress_tokens=[5, 6],
        num_beams=2,
        num_return_sequences=2,
        no_repeat_ngram_size=1,
        eos_token_id=2,
        pad_token_id=0,
    ).save_pretrained(bent)
    written = []
    for folder in (student, bent):
        domain = start_domain()
        assert check(teachers={"general": str(student), "domain": domain.url}, model_name_or_path=str(folder))[0] == 0
        probe = Probe.of(make_tokenizer(), 128)
        written.append(sorted(ids for ids in domain.sequences if ids not in probe.token_ids))
    assert written[0] == written[1]
    likeliest = [reference_logps(student_model, ids)[1].argmax(dim=-1)[-1] == ids[-1] for ids in written[0]]
    assert not all(likeliest)


def test_teacher_in_the_process_beside_a_server_is_asked_too(start_domain, check, student):
    code, table = check(teachers={"general": str(student), "domain": start_domain().url})
    assert code == 0
    assert [subject for branch, subject in table if branch == "general"] == [
        "in the process", "log-probs", "self-gap", "end of sequence", "initial KL"
    ]  # fmt: skip
    assert len([subject for branch, subject in table if branch == "domain"]) == 8


def test_check_finds_that_nothing_listens_before_it_looks_for_the_model(start_server, check):
    server = start_server()
    server.close()
    code, table = check(teachers={"general": server.url, "domain": "a"}, model_name_or_path="no/such")
    assert code == 2
    assert list(table) == [("general", "reachable")]
    level, text = table["general", "reachable"]
    assert level == "error"
    assert f"teacher 'general' at {server.url} does not answer" in text
    assert "Is `vllm serve` up on that host and port" in text


def test_servers_that_are_not_reached_have_a_line_each(start_server, check):
    servers = {branch: start_server() for branch in ("general", "domain")}
    for server in servers.values():
        server.close()
    code, table = check(teachers={branch: server.url for branch, server in servers.items()})
    assert code == 2
    for branch, server in servers.items():
        assert server.url in table[branch, "reachable"][1]


def test_server_with_other_weights_behind_the_students_name_is_an_error(start_server, start_domain, check):
    domain = start_domain(model=make_model(1))
    code, table = check(teachers={"general": start_server().url, "domain": domain.url})
    assert code == 2
    level, text = table["domain", "self-gap"]
    assert level == "error"
    assert "other weights stand behind 'domain'" in text
    assert table["general", "log-probs"][0] == "ok"  # the rest of the table is there


def test_replicas_with_different_models_are_an_error_with_who_serves_what(start_server, start_domain, check):
    one, other = start_server(), start_server(name="another")
    code, table = check(teachers={"general": [one.url, other.url], "domain": start_domain().url})
    assert code == 2
    level, text = table["general", "reachable"]
    assert level == "error"
    assert f"{one.url} serves 'tiny-teacher', {other.url} serves 'another'" in text


def test_short_context_is_an_error_before_the_student_is_loaded(start_server, start_domain, check):
    general = start_server(max_model_len=100)
    code, table = check(teachers={"general": general.url, "domain": start_domain().url})
    assert code == 2
    level, text = table["general", "context"]
    assert level == "error"
    assert "sequences of 100 tokens" in text
    assert "--max-model-len 129" in text
    assert table["domain", "context"] == ("ok", "256 tokens, 129 needed")
    assert general.scored == []


def test_tokenizer_of_another_kind_is_an_error(start_server, start_domain, check):
    general = start_server(tokenizer=other_tokenizer())
    code, table = check(teachers={"general": general.url, "domain": start_domain().url})
    assert code == 2
    level, text = table["general", "tokenizer"]
    assert level == "error"
    assert "there and [3, 11, 8, 40] here" in text  # brackets are not markup


def test_missing_key_is_an_error_with_its_variable(start_server, start_domain, check):
    general = start_server()
    general.always = (401, '{"error": "Unauthorized"}')
    code, table = check(teachers={"general": general.url, "domain": start_domain().url})
    assert code == 2
    level, text = table["general", "reachable"]
    assert level == "error"
    assert 'answered 401: {"error": "Unauthorized"}' in text
    assert "Set CAMOPD_TEACHER_API_KEY_GENERAL or CAMOPD_TEACHER_API_KEY to the server's --api-key" in text


def test_http_where_https_is_wanted_is_an_error_with_the_right_url(start_server, start_domain, check):
    general = start_server()
    general.always = (400, "The plain HTTP request was sent to HTTPS port")
    code, table = check(teachers={"general": general.url, "domain": start_domain().url})
    assert code == 2
    assert table["general", "reachable"][0] == "error"
    assert f"Write {general.url.replace('http', 'https')}." in table["general", "reachable"][1]


def test_server_that_lost_its_weights_is_an_error(start_server, start_domain, check):
    general = start_server(model=without_weights(make_model(1)))
    code, table = check(teachers={"general": general.url, "domain": start_domain().url})
    assert code == 2
    assert table["general", "log-probs"][0] == "error"
    assert "lost its weights" in table["general", "log-probs"][1]


def test_run_whose_teachers_are_all_the_student_is_warned_of(start_domain, check):
    code, table = check(teachers={"general": start_domain().url, "domain": start_domain().url})
    level, text = table["student", "teachers"]
    assert code == 0 and level == "warning"
    assert "'general', 'domain'" in text and "from before the fine-tuning" in text


def test_server_with_nan_does_not_hide_what_the_others_are(start_server, start_domain, check):
    general = start_server(compact=True)
    general.edit_logps = lambda logps, body: logps * math.nan
    code, table = check(teachers={"general": general.url, "domain": start_domain().url})
    assert code == 2
    assert table["general", "log-probs"][0] == "error"
    assert "non-finite log-probs" in table["general", "log-probs"][1]
    assert ("general", "initial KL") not in table  # said once
    assert table["domain", "self-gap"][0] == "ok"


def test_server_that_fails_on_the_students_own_tokens_is_an_error(start_server, start_domain, check, tokenizer):
    general = start_server(compact=True)
    probe = Probe.of(tokenizer, 128)

    def fail_on_others(logps, body):
        known = body["token_ids"] in probe.token_ids or len(body["token_ids"]) == 2  # the last token of the vocabulary
        return logps if known else logps * math.nan

    general.edit_logps = fail_on_others
    code, table = check(teachers={"general": general.url, "domain": start_domain().url})
    assert code == 2
    assert table["general", "log-probs"][0] == "ok"
    assert table["general", "initial KL"][0] == "error"
    assert table["domain", "initial KL"][0] == "ok"


@pytest.mark.parametrize("path", ["/no/such/folder", "{tmp}/models", "tests/no-model"])
def test_local_teacher_that_does_not_exist_is_an_error_at_once(config, capsys, student, tmp_path, path):
    path = path.format(tmp=tmp_path)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["check", config(teachers={"general": path, "domain": str(student)})])
    assert stopped.value.code == 2
    assert (
        f"the teacher of branch 'general' is named as {path!r}, but there is no such path" in capsys.readouterr().err
    )


def test_branch_without_prompts_is_an_error_with_the_key_to_set(config, capsys, student):
    settings = {"teachers": {"general": str(student), "domain": str(student)}, "prompts": {"general": "general.jsonl"}}
    with pytest.raises(SystemExit) as stopped:
        cli.main(["check", config(**settings)])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "visits branch 'domain', but prompts has only ['general']. Add prompts.domain" in said


def test_mistyped_key_of_a_teacher_is_an_error_with_the_keys_there_are(config, capsys, student):
    teachers = {"general": {"urls": "http://localhost:1", "modle": "a"}, "domain": str(student)}
    with pytest.raises(SystemExit) as stopped:
        cli.main(["check", config(teachers=teachers)])
    assert stopped.value.code == 2
    assert (
        "A mapping must have `urls`, the URL of a vLLM server or a list of them, and `model`"
        in capsys.readouterr().err
    )


def test_servers_are_shown_beside_one_that_is_gone(check, start_server):
    gone, there = start_server(), start_server()
    gone.close()
    code, table = check(teachers={"general": gone.url, "domain": there.url})
    assert code == 2
    assert table["general", "reachable"][0] == "error"
    assert table["domain", "reachable"] == ("ok", f"tiny-teacher at {there.url} (JSON)")


def test_adapter_off_without_an_adapter_is_an_error_and_with_one_is_ok(check, student):
    teachers = {"general": str(student), "domain": "adapter_off"}
    code, table = check(teachers=teachers)
    assert code == 2
    assert table["domain", "adapter_off"] == ("error", "the student has no adapter. Set use_peft, or name a model")
    code, table = check("--use_peft", teachers=teachers)
    assert code == 0
    assert table["domain", "adapter_off"][0] == "ok"


def test_branch_without_a_teacher_is_an_error(check, student):
    for teachers in ({"general": str(student)}, {"general": str(student), "domain": None}):
        code, table = check(teachers=teachers)
        assert code == 2
        level, text = table["domain", "teacher"]
        assert level == "error"
        assert "schedule 'general:3,domain:1' visits branch 'domain', but teachers has only" in text
        assert "Add teachers.domain or take the branch out of the schedule" in text


def test_teacher_of_a_branch_that_is_never_visited_is_an_error(check, student):
    code, table = check("--schedule", "domain:1", teachers={"general": str(student), "domain": str(student)})
    assert code == 2
    assert table["general", "teacher"][0] == "error"
    assert "teachers has 'general', which schedule 'domain:1' never visits" in table["general", "teacher"][1]


def test_revision_of_the_student_is_not_asked_of_the_teachers(check, student, tmp_path, monkeypatch):
    teacher = str(shutil.copytree(student, tmp_path / "teacher"))
    asked = []
    load = AutoConfig.from_pretrained.__func__

    def note(cls, name, **kwargs):
        asked.append((name, kwargs.get("revision")))
        return load(cls, name, **kwargs)

    monkeypatch.setattr(AutoConfig, "from_pretrained", classmethod(note))
    teachers = {"general": teacher, "domain": teacher}
    assert check(teachers=teachers, model_revision="v2")[0] == 0
    assert (str(student), "v2") in asked
    assert (teacher, "v2") not in asked
    assert check(teachers=teachers, teacher_model_init_kwargs={"revision": "v3"})[0] == 0
    assert (teacher, "v3") in asked


def test_served_teachers_are_checked(start_server, start_domain, check, student, tmp_path):
    general = start_server(name="served", root="Qwen/Qwen3-8B")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / SERVED_TEACHERS).write_text(json.dumps({"general": [general.url]}))
    code, table = check(teachers={"general": "Qwen/Qwen3-8B", "domain": str(student)})
    assert code == 0
    assert table["general", "reachable"][1] == f"served at {general.url} (JSON)"
    code, table = check(teachers={"general": "Qwen/Qwen3-4B", "domain": str(student)})
    assert code == 2
    assert "serves 'served', and the config wants 'Qwen/Qwen3-4B'" in table["general", "reachable"][1]


def test_overrides_are_checked_in_place_of_the_file(check, student):
    code, table = check("--teachers", f'{{"general": "{student}", "domain": "no-such"}}', teachers={"general": "x"})
    assert code == 2
    assert table["general", "in the process"][0] == "ok"
    assert table["domain", "in the process"][0] == "error"


def test_unknown_setting_is_an_error_with_its_name(config, capsys, student):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["check", config(teachers={"general": str(student), "domain": str(student)}, lerning_rate=1.0)])
    assert stopped.value.code == 2
    assert "is not a setting of a run. Did you mean 'learning_rate'?" in capsys.readouterr().err


def test_student_that_does_not_exist_is_an_error_with_its_name(config, capsys, student):
    teachers = {"general": str(student), "domain": str(student)}
    with pytest.raises(SystemExit) as stopped:
        cli.main(["check", config(teachers=teachers, model_name_or_path="/no/such/student")])
    assert stopped.value.code == 2
    assert "camopd: the student '/no/such/student' cannot be loaded" in capsys.readouterr().err


@pytest.mark.parametrize("columns", ["60", "80"])
def test_narrow_terminal_cuts_nothing_out_of_a_url(start_server, check, config, capsys, monkeypatch, columns):
    server = start_server()
    server.close()
    url = f"{server.url}/{'path' * 20}"
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit):
        cli.main(["check", config(teachers={"general": url, "domain": "a"})])
    assert url in "".join(capsys.readouterr().out.split())


def run(path):
    return subprocess.run(
        [sys.executable, "-m", "camopd.cli", "check", path], capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
def test_command_says_that_nothing_listens(start_server, config):
    server = start_server()
    server.close()
    found = run(config(teachers={"general": server.url, "domain": "a"}))
    assert found.returncode == 2
    assert "Traceback" not in found.stderr
    assert re.search(rf"general +reachable +error +teacher 'general' at {server.url}", found.stdout)


@pytest.mark.slow
def test_command_exits_with_2_when_the_tokenizer_is_another(start_server, config, student):
    general = start_server(tokenizer=other_tokenizer())
    found = run(config(teachers={"general": general.url, "domain": str(student)}))
    assert found.returncode == 2
    assert "Traceback" not in found.stderr
    assert "has another tokenizer than the student" in " ".join(found.stdout.split())


def test_rollout_servers_are_reached_before_the_student_is_loaded(start_server, start_domain, check):
    rollouts = start_server(name="the-student", max_model_len=300)
    urls = {branch: start_domain().url for branch in ("general", "domain")}
    code, table = check(teachers=urls, rollout_servers=[rollouts.url], max_prompt_length=64, max_completion_length=64)
    assert table["rollouts", "servers"] == ("ok", f"{rollouts.url} serve 'the-student', 300 tokens")
    rollouts.max_model_len = 100
    code, table = check(teachers=urls, rollout_servers=[rollouts.url], max_prompt_length=64, max_completion_length=64)
    assert code == 2 and table["rollouts", "servers"][0] == "error"
    assert "takes sequences of 100 tokens" in table["rollouts", "servers"][1]


# ------------------------------------------------------------------------------------------------------- the run itself


@pytest.fixture
def prompts(tmp_path):
    """Files of prompts: a conversation of 8 tokens, one of 108, and texts."""

    def talk(text):
        return (
            json.dumps({"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "no"}]})
            + "\n"
        )

    for name, text in (
        ("talks", talk("hi") + talk("a" * 100)),
        ("long", talk("b" * 100)),
        ("texts", '{"prompt": "abc"}\n'),
    ):
        (tmp_path / f"{name}.jsonl").write_text(text)
    return {name: str(tmp_path / f"{name}.jsonl") for name in ("talks", "long", "texts")}


def test_prompts_are_shown_as_the_model_sees_them(config, capsys, student, prompts, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    settings = {
        "teachers": {"general": str(student), "domain": str(student)}, "max_prompt_length": 64, "max_completion_length": 64,
        "prompts": {"general": prompts["talks"], "domain": prompts["texts"]}, "eval_prompts": {"general": prompts["long"]},
    }  # fmt: skip
    cli.main(["check", config(**settings)])
    table, _, shown = capsys.readouterr().out.partition("\n\n")
    table = read(table)
    level, text = table["general", "prompts"]
    assert level == "warning"
    assert text.startswith(
        "2 rows; of the 2 looked at, 7 to 105 tokens, 56 in the middle; max_prompt_length 64: 1 lose their"
    )
    assert table["domain", "prompts"] == (
        "ok", "1 row; of the 1 looked at, 3 to 3 tokens, 3 in the middle; max_prompt_length 64"
    )  # fmt: skip
    assert table["general", "held-out prompts"][0] == "warning"
    assert f"general, row 0 ({prompts['talks']}), as the model sees it (7 tokens):\nu   h i . a" in shown
    assert f"domain, row 0 ({prompts['texts']}), as the model sees it (3 tokens):\na b c" in shown
    assert "no" not in shown.replace(" ", "").split("tokens):")[1].split("domain")[0]  # the answer


def test_prompt_of_a_teacher_is_shown_after_the_students(config, capsys, student, prompts, tmp_path):
    """As a template makes it, and as a row brings it."""
    (tmp_path / "hints.jsonl").write_text('{"prompt": "abc", "teacher_prompt": "no abc"}\n')
    settings = {
        "teachers": {"general": str(student), "domain": "self"}, "max_prompt_length": 128,
        "teacher_prompt": {"general": "it is 7. {prompt}"},
        "prompts": {"general": prompts["talks"], "domain": str(tmp_path / "hints.jsonl")},
    }  # fmt: skip
    cli.main(["check", config(**settings)])
    _, _, shown = capsys.readouterr().out.partition("\n\n")
    texts = [part.replace(" ", "") for part in shown.strip().split("\n\n")]
    talks, hints = (f"row0({path})" for path in (prompts["talks"], tmp_path / "hints.jsonl"))
    assert texts == [
        f"general,{talks},asthemodelseesit(7tokens):\nuhi.a",
        f"general,{talks},astheteacherseesit(16tokens):\nuitis7.hi.a",
        f"domain,{hints},asthemodelseesit(3tokens):\nabc",
        f"domain,{hints},astheteacherseesit(6tokens):\nnoabc",
    ]


@pytest.mark.parametrize(
    ("teacher_prompt", "message"),
    [
        ("u no hi.a", r"the teacher_prompt of row 1 .* ends with '\.a', and the prompt of the student with 'a '"),
        (f"u {'b' * 64}.a ", "the teacher_prompt of row 1 .* has 69 tokens, and max_prompt_length is 64"),
        (None, "row 1 .* has the 'teacher_prompt' 'None', where others have a text or messages"),
    ],
    ids=["ends otherwise", "too long", "none"],
)
def test_prompt_of_a_teacher_that_train_would_refuse_is_an_error(
    check, student, prompts, tmp_path, teacher_prompt, message
):
    rows = [
        {"prompt": [{"role": "user", "content": "hi"}], "teacher_prompt": text}
        for text in ("u no hi.a ", teacher_prompt)
    ]
    (tmp_path / "hints.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, table = check(
        teachers={"general": str(student), "domain": "self"}, max_prompt_length=64,
        prompts={"general": prompts["talks"], "domain": str(tmp_path / "hints.jsonl")},
    )  # fmt: skip
    assert code == 2 and table["run", "settings"][0] == "error"
    assert re.search(message, table["run", "settings"][1])


def test_prompts_that_all_lose_their_beginning_are_an_error(check, student, prompts):
    same = {branch: str(student) for branch in ("general", "domain")}
    code, table = check(
        teachers=same, prompts={"general": prompts["long"], "domain": prompts["texts"]}, max_prompt_length=64
    )
    assert code == 2
    assert table["general", "prompts"][0] == "error"


def test_teachers_in_the_process_are_asked(check, student, tmp_path):
    other = tmp_path / "other"
    make_model(1).save_pretrained(other)
    make_tokenizer().save_pretrained(other)
    code, table = check(teachers={"general": str(other), "domain": str(student)})
    assert code == 0
    assert table["domain", "self-gap"][0] == "ok"
    assert float(table["domain", "self-gap"][1].split()[11]) < 1e-5
    assert table["domain", "end of sequence"][0] == "ok"
    assert table["general", "end of sequence"][0] == "warning"
    assert table["domain", "initial KL"][1].startswith("0.000 nats per token over ")
    assert table["general", "initial KL"][0] == "warning"
    assert ("general", "self-gap") not in table


def test_what_takes_a_while_is_said_before_it_and_beside_the_table(
    config, student, capsys, monkeypatch, start_domain, tmp_path
):
    monkeypatch.setenv("COLUMNS", "1000")
    other = tmp_path / "other"
    make_model(1).save_pretrained(other)
    make_tokenizer().save_pretrained(other)
    cli.main(["check", config(teachers={"general": str(other), "domain": start_domain().url})])
    out, err = capsys.readouterr()
    pace = "" if torch.cuda.is_available() else ": a minute or more on a CPU"
    assert [line for line in err.splitlines() if line.endswith(" ...")] == [
        f"loading the student, {student}, which writes {len(PROBE_CONVERSATIONS)} short answers{pace} ...",
        f"loading teacher 'general', {other}, which is asked about them{pace} ...",
    ]  # a server is asked in a moment
    assert out.startswith("branch") and "loading" not in out


def test_memory_and_disk_are_compared_with_what_is_there(check, student, monkeypatch):
    same = {branch: str(student) for branch in ("general", "domain")}
    every = {"save_strategy": "steps", "save_steps": 2, "max_steps": 9}
    code, table = check(teachers=same, **every)
    assert code == 0 and table["run", "memory"][0] == table["run", "disk"][0] == "ok"
    assert table["run", "disk"][1].startswith("5 checkpoints of ")  # of steps 2, 4, 6, 8 and the last one
    assert check("--save_total_limit", "1", teachers=same, **every)[1]["run", "disk"][1].startswith(
        "2 checkpoints of "
    )
    assert check("--save_strategy", "no", teachers=same)[1]["run", "disk"][1].startswith("0 checkpoints of ")
    read_text = Path.read_text
    monkeypatch.setattr(
        Path, "read_text",
        lambda path, *args, **more: "MemTotal: 9999999999 kB\nMemAvailable: 1 kB\n" if str(path) == "/proc/meminfo"
        else read_text(path, *args, **more),
    )  # fmt: skip
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    code, table = check(teachers=same, **every)
    assert code == 2
    assert table["run", "memory"][0] == "warning" and "set max_tokens_per_micro_batch" in table["run", "memory"][1]
    assert table["run", "disk"][0] == "error" and "Set save_total_limit" in table["run", "disk"][1]


def test_memory_of_the_optimizer_is_that_of_its_kind(tmp_path):
    """16 bytes a weight with Adam in float32, 10 with moments of 8 bits."""
    config = LlamaConfig(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, vocab_size=128_000)

    def static(optim):
        args = CaMOPDConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, optim=optim)
        memory, _ = check_room(args, ModelConfig(dtype="float32"), config, {}, {})
        return float(re.search(r"sizes: ([\d.]+) GiB for weights", memory.text)[1])

    assert static("adamw_bnb_8bit") / static("adamw_torch") == pytest.approx(10 / 16, abs=0.01)


def test_memory_of_a_step_is_that_of_its_gradient(tmp_path):
    """Tiles of whole distributions are wider than those of the sampled gap."""
    config = LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, vocab_size=200_000)

    def moving(**settings):
        args = CaMOPDConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **settings)
        memory, _ = check_room(args, ModelConfig(dtype="float32"), config, {}, {})
        return float(re.search(r"([\d.]+) GiB for micro-batches", memory.text)[1])

    sampled, top_k = moving(), moving(divergence="top_k")
    assert sampled < top_k < moving(divergence="full") == moving(baseline="kl")


def test_end_of_a_turn_may_be_that_of_the_tokenizer_alone(check, student, tmp_path):
    """And the student's short answers end there, as in a run."""
    folder = shutil.copytree(student, tmp_path / "student")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("'.' }}", "'.</s>' }}")
    tokenizer.save_pretrained(folder)
    found = []
    for ends in ([9], [9, tokenizer.eos_token_id]):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        _, table = check(model_name_or_path=str(folder), teachers=dict.fromkeys(("general", "domain"), str(folder)))
        assert table["student", "end of sequence"][0] == "ok"
        found.append(table["domain", "initial KL"][1])
    assert found[0] == found[1]


def test_what_train_would_refuse_is_an_error(check, student, tmp_path, prompts):
    same = {branch: str(student) for branch in ("general", "domain")}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").write_text('{"step": 3}\n')
    code, table = check(teachers=same)
    assert code == 2
    assert table["run", "output_dir"][0] == "error" and "has the files of another run" in table["run", "output_dir"][1]
    assert check("--resume", "auto", teachers=same)[0] == 0
    (tmp_path / "answers.jsonl").write_text('{"prompt": [{"role": "assistant", "content": "no"}]}\n')
    given = {"general": prompts["texts"], "domain": str(tmp_path / "answers.jsonl")}
    code, table = check("--overwrite_output_dir", teachers=same, prompts=given)
    assert code == 2 and "ends with an assistant turn" in table["run", "settings"][1]
    code, table = check("--overwrite_output_dir", "--push_to_hub", teachers=same)
    assert code == 2 and "HF_HUB_OFFLINE is set" in table["run", "push_to_hub"][1]
