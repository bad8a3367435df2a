"""What is found wrong with a teacher, in words with a way out, and `camopd check`, which shows it as a table.

The servers are those of fake_vllm.py.
"""

import copy
import json
import math
import re
import resource
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import CHAT_TEMPLATE, LOGP, VOCAB, make_model, make_tokenizer
from fake_vllm import other_tokenizer, reference_logps
from test_run import SETTINGS
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from camopd import cli
from camopd.commands.check import check_adapter, check_unloaded
from camopd.errors import TeacherError
from camopd.run import SERVED_TEACHERS
from camopd.teachers.base import TokenScores
from camopd.teachers.check import (
    PROBE_CONVERSATIONS,
    PROBE_TEXTS,
    Finding,
    Probe,
    _check_end,
    _sends_key_in_the_open,
    check_scores,
    check_server,
    initial_kl,
    is_student_start,
    raise_errors,
)
from camopd.teachers.local import LocalTeacher


def with_eos_bias(model, bias):
    """The model with a constant on the logit of the end of sequence."""
    model = copy.deepcopy(model)
    head = torch.nn.Linear(32, len(VOCAB))
    head.weight, head.bias.data = model.lm_head.weight, torch.zeros(len(VOCAB))
    head.bias.data[2] = bias
    model.lm_head = head
    return model


def with_noise(model, size):
    """The model with weights that are off by a share of their own size, as after a coarse rounding."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data *= 1 + size * torch.randn(parameter.shape, generator=generator)
    return model


def without_weights(model):
    model = copy.deepcopy(model)
    model.lm_head.weight.data.zero_()
    return model


# --- what a server says of itself --------------------------------------------------------------------------------


def server_findings(teacher, tokenizer, max_tokens=128):
    """The findings by subject, all of branch "general"."""
    findings = list(check_server("general", teacher, tokenizer, max_tokens))
    assert {finding.branch for finding in findings} == {"general"}
    assert len({finding.subject for finding in findings}) == len(findings)
    return {finding.subject: finding for finding in findings}


def test_a_server_that_fits_is_ok_in_every_line(server, connect, tokenizer):
    found = server_findings(connect(server), tokenizer)
    assert list(found) == ["reachable", "context", "tokenizer", "chat template"]
    assert {finding.level for finding in found.values()} == {"ok"}


def test_reachable_names_the_model_and_the_transport_of_every_url(start_server, connect, tokenizer):
    compact, plain = start_server(compact=True), start_server()
    found = server_findings(connect(compact, plain), tokenizer)["reachable"]
    assert (found.level, found.text) == ("ok", f"tiny-teacher at {compact.url} (compact), {plain.url} (JSON)")


@pytest.mark.parametrize(
    ("url", "is_open"),
    [
        ("http://localhost:8000", False),
        ("http://127.0.0.1:8000", False),
        ("http://127.8.0.1:8000", False),
        ("http://[::1]:8000", False),
        ("https://gpu-3:8000", False),
        ("https://10.0.0.3:8000", False),
        ("http://gpu-3:8000", True),
        ("http://10.0.0.3:8000", True),
        ("http://0.0.0.0:8000", True),
        ("http://[fd00::3]:8000", True),
        ("http://127.example.org", True),
        ("http://localhost.example.org", True),
    ],
)
def test_a_key_is_in_the_open_over_http_to_another_machine(url, is_open):
    assert _sends_key_in_the_open(url) is is_open


def test_a_key_that_travels_in_the_open_is_a_warning_with_the_urls(server, connect, tokenizer, monkeypatch):
    monkeypatch.setenv("CAMOPD_TEACHER_API_KEY", "secret")
    url = server.url.replace("127.0.0.1", "0.0.0.0")  # reaches this machine, and is not a loopback address
    found = server_findings(connect(server, url), tokenizer)["key"]
    assert found.level == "warning"
    assert found.text == (f"the API key travels unencrypted to {url}; use https unless that network is yours alone")
    assert "secret" not in found.text


def test_there_is_no_word_about_keys_without_a_key_or_on_this_machine(server, connect, tokenizer, monkeypatch):
    url = server.url.replace("127.0.0.1", "0.0.0.0")
    assert "key" not in server_findings(connect(url), tokenizer)
    monkeypatch.setenv("CAMOPD_TEACHER_API_KEY", "secret")
    assert "key" not in server_findings(connect(server), tokenizer)


def test_a_context_that_is_just_long_enough_is_ok(start_server, connect, tokenizer):
    found = server_findings(connect(start_server(max_model_len=129)), tokenizer)["context"]
    assert (found.level, found.text) == ("ok", "129 tokens, 129 needed")


def test_a_context_one_token_short_is_an_error_with_the_flag(start_server, connect, tokenizer):
    short = start_server(max_model_len=128)
    found = server_findings(connect(start_server(), short), tokenizer)["context"]
    assert found.level == "error"
    assert short.url in found.text
    assert "takes sequences of 128 tokens" in found.text
    assert "--max-model-len 129" in found.text
    assert "max_completion_length" in found.text


def test_a_tokenizer_that_gives_the_same_ids_is_ok_with_their_number(server, connect, tokenizer):
    found = server_findings(connect(server), tokenizer)["tokenizer"]
    assert found.level == "ok"
    compared = int(found.text.removeprefix("the same ids for ").removesuffix(" tokens of probe texts"))
    assert compared > sum(len(text) for text in PROBE_TEXTS)


def test_another_tokenizer_of_the_same_size_is_an_error_with_the_ids_of_both(start_server, connect, tokenizer):
    well, other = start_server(), start_server(tokenizer=other_tokenizer())
    found = server_findings(connect(well, other), tokenizer)["tokenizer"]
    assert found.level == "error"
    here, there = (tokens(PROBE_TEXTS[0][:4])["input_ids"] for tokens in (tokenizer, other.tokenizer))  # T is unknown
    assert here != there
    assert f"teacher 'general' at {other.url} has another tokenizer than the student" in found.text
    assert f"the ids are {there} there and {here} here" in found.text
    assert "Use a teacher of the same family, or start it with --tokenizer" in found.text
    assert well.url not in found.text


@pytest.mark.parametrize("special", [True, False], ids=["special", "added"])
def test_an_added_token_the_teacher_does_not_know_is_an_error_with_it(start_server, connect, special, monkeypatch):
    monkeypatch.setattr("camopd.teachers.check.VOCABULARY_PROBES", 2)  # found as an added token, not by its number
    student = make_tokenizer()
    student.add_tokens(["<think>"], special_tokens=special)
    found = server_findings(connect(start_server()), student)["tokenizer"]
    assert found.level == "error"
    assert "<think>" in found.text
    assert str(len(VOCAB)) in found.text.partition(" there and ")[2]  # its id


def test_other_ids_of_tokens_in_none_of_the_texts_are_an_error(start_server, connect, tokenizer):
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    ids = backend["model"]["vocab"]
    assert "6" not in "".join(PROBE_TEXTS) and "7" not in "".join(PROBE_TEXTS)
    ids["6"], ids["7"] = ids["7"], ids["6"]
    teacher = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)))
    found = server_findings(connect(start_server(tokenizer=teacher)), tokenizer)["tokenizer"]
    assert found.level == "error"
    assert f"{ids['6']}, " in found.text


def test_an_added_token_with_another_id_is_an_error(start_server, connect):
    student, teacher = make_tokenizer(), make_tokenizer()
    student.add_tokens(["<one>", "<two>"])
    teacher.add_tokens(["<two>", "<one>"])
    found = server_findings(connect(start_server(tokenizer=teacher)), student)["tokenizer"]
    assert found.level == "error"
    assert f"{len(VOCAB)}," in found.text


def test_ids_that_end_too_early_are_an_error_at_their_end(start_server, connect, tokenizer):
    def cut(text, **_):
        return {"input_ids": tokenizer(text)["input_ids"][:-1]}

    server = start_server()
    server.tokenizer = cut
    cut.chat_template = None
    found = server_findings(connect(server), tokenizer)["tokenizer"]
    ids = tokenizer(PROBE_TEXTS[0])["input_ids"]
    assert found.level == "error"
    assert f"the ids are {ids[-3:-1]} there and {ids[-3:]} here" in found.text


@pytest.mark.parametrize("answer", ["[]", '{"count": 3}', '{"tokens": null}'])
def test_an_answer_without_ids_is_an_error(start_server, connect, tokenizer, answer):
    server = start_server()
    teacher = connect(server)
    server.always = (200, answer)
    found = server_findings(teacher, tokenizer)
    assert found["tokenizer"].level == "error"
    assert "the ids are [] there" in found["tokenizer"].text
    assert found["chat template"].level == "warning"


def test_a_server_that_does_not_tokenize_is_an_error_with_its_words(server, connect, tokenizer):
    teacher = connect(server)
    server.always = (404, "no such path here")
    found = server_findings(teacher, tokenizer)["tokenizer"]
    assert found.level == "error"
    assert f"teacher 'general' at {server.url} answered 404: no such path here" in found.text


def test_another_chat_template_is_a_warning_with_both_texts(start_server, connect, tokenizer):
    other = make_tokenizer()
    other.chat_template = CHAT_TEMPLATE.replace("'a '", "'a? '")
    server = start_server(tokenizer=other)
    found = server_findings(connect(start_server(), server), tokenizer)["chat template"]
    messages = [{"role": "user", "content": PROBE_CONVERSATIONS[0][0]}]
    ours, theirs = (
        tokenizer.decode(
            either.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        )
        for either in (tokenizer, other)
    )
    assert ours != theirs
    assert found.level == "warning"
    assert f"{server.url} writes a conversation as {theirs!r}, the student as {ours!r}" in found.text
    assert "(--chat-template)" in found.text


def test_a_server_without_a_chat_template_is_a_warning_with_its_words(start_server, connect, tokenizer):
    teacher = make_tokenizer()
    teacher.chat_template = None
    found = server_findings(connect(start_server(tokenizer=teacher)), tokenizer)["chat template"]
    assert found.level == "warning"
    assert "no chat template" in found.text
    assert "--chat-template" in found.text


def test_a_student_without_a_chat_template_has_none_to_compare(server, connect):
    student = make_tokenizer()
    student.chat_template = None
    assert "chat template" not in server_findings(connect(server), student)


# --- what a teacher answers --------------------------------------------------------------------------------------


@pytest.fixture
def score_findings(tokenizer, model_factory):
    """The findings of a teacher beside a student with the weights of `model_factory(0)`, by subject."""

    def findings(teacher, same_weights=False):
        probe, student = Probe.of(tokenizer, 128), model_factory(0)
        own = [
            reference_logps(student, ids)[0][start - 1 :]
            for ids, start in zip(probe.token_ids, probe.prompt_lens, strict=True)
        ]
        found = list(check_scores("general", teacher, tokenizer, len(VOCAB), probe, own, same_weights))
        assert {finding.branch for finding in found} == {"general"}
        return {finding.subject: finding for finding in found}

    return findings


@pytest.mark.parametrize("compact", [True, False], ids=["compact", "JSON"])
def test_plain_log_probs_are_ok_with_their_mean(
    start_server, connect, tokenizer, teacher_model, score_findings, compact
):
    found = score_findings(connect(start_server(compact=compact)))
    assert list(found) == ["log-probs", "end of sequence"]
    probe = Probe.of(tokenizer, 128)
    rows = zip(probe.token_ids, probe.prompt_lens, strict=True)
    mean = torch.cat([reference_logps(teacher_model, ids)[0][start - 1 :] for ids, start in rows]).mean()
    assert found["log-probs"].level == "ok"
    assert found["log-probs"].text == f"finite, normalised, asked for at T = 1; mean {mean:.2f} nats"


def test_nan_log_probs_are_an_error_with_the_rows_and_the_only_line(start_server, connect, score_findings):
    server = start_server(compact=True)
    server.edit_logps = lambda logps, body: logps * math.nan
    found = score_findings(connect(server), same_weights=True)
    assert list(found) == ["log-probs"]
    assert found["log-probs"].level == "error"
    assert "non-finite log-probs in rows [0, 1, 2, 3] of 4" in found["log-probs"].text
    assert "lost its weights" in found["log-probs"].text


def test_uniform_log_probs_are_an_error_with_their_value(start_server, connect, teacher_model, score_findings):
    found = score_findings(connect(start_server(model=without_weights(teacher_model))))["log-probs"]
    assert found.level == "error"
    assert (
        f"'tiny-teacher' gives every token the log-prob {-math.log(len(VOCAB)):.3f}, as -ln(vocabulary" in found.text
    )
    assert "lost its weights" in found.text
    assert "Start it again" in found.text


def raise_all(entries, ids):
    """Logits, say, in place of log-probs."""
    for entry in entries[1:]:
        for value in entry.values():
            value["logprob"] += 50.0
    return entries


def lower_all(entries, ids):
    """Logits of another model: all of them below 0."""
    for entry in entries[1:]:
        for value in entry.values():
            value["logprob"] -= 35.0
    return entries


def make_likely(entries, ids):
    """Below 0 each, but more than 1 as probabilities together."""
    for entry in entries[1:]:
        for value in entry.values():
            value["logprob"] = -0.7
    return entries


@pytest.mark.parametrize(
    ("edit", "shown"),
    [
        (raise_all, r"answers [34]\d\.\d\d to [34]\d\.\d\d as log-probs"),
        (lower_all, r"answers -[34]\d\.\d\d to -[34]\d\.\d\d as log-probs and .*e-1\d as the probability of the five"),
        (make_likely, "2.5 to 2.5 as the probability of the five"),
    ],
)
def test_log_probs_that_are_not_normalised_are_an_error_with_the_flag(server, connect, score_findings, edit, shown):
    server.edit = edit
    found = score_findings(connect(server))["log-probs"]
    assert found.level == "error"
    with pytest.raises(TeacherError, match=shown):
        raise TeacherError(found.text)
    assert "Start the server with --logprobs-mode raw_logprobs" in found.text


def test_the_students_own_weights_are_ok_with_the_gap_between_the_engines(start_server, connect, score_findings):
    found = score_findings(connect(start_server(model=make_model(0))), same_weights=True)["self-gap"]
    assert found.level == "ok"
    gap = float(found.text.split()[-4])
    assert found.text == f"it has the student's weights and differs from the trainer by {gap:.2g} nats per token"
    assert gap < LOGP


def test_weights_a_little_off_are_a_warning_with_the_flag(start_server, connect, score_findings):
    server = start_server(model=with_noise(make_model(0), 0.03))
    found = score_findings(connect(server), same_weights=True)["self-gap"]
    assert found.level == "warning"
    assert 0.05 < float(found.text.partition(" nats")[0].split()[-1]) < 0.5
    assert "Give the server the trainer's --dtype" in found.text


def test_other_weights_under_the_students_name_are_an_error_with_the_gap(start_server, connect, score_findings):
    found = score_findings(connect(start_server(model=make_model(1))), same_weights=True)["self-gap"]
    assert found.level == "error"
    assert float(found.text.partition(" nats")[0].split()[-1]) > 0.5
    assert "where 0 is right: other weights stand behind 'tiny-teacher'" in found.text
    assert "from the student's own path, with its --dtype and without --quantization" in found.text


def test_a_teacher_with_weights_of_its_own_has_no_self_gap(start_server, connect, score_findings):
    assert "self-gap" not in score_findings(connect(start_server(model=make_model(1))))


def test_a_teacher_that_ends_its_answers_is_ok(start_server, connect, teacher_model, score_findings):
    found = score_findings(connect(start_server(model=with_eos_bias(teacher_model, 20.0))))["end of sequence"]
    assert found.level == "ok"
    assert found.text == "'</s>' is among its five likeliest tokens after 4 of 4 complete answers"


def test_a_teacher_that_does_not_end_its_answers_is_a_warning(start_server, connect, teacher_model, score_findings):
    found = score_findings(connect(start_server(model=with_eos_bias(teacher_model, -20.0))))["end of sequence"]
    assert found.level == "warning"
    assert "'</s>' is among its five likeliest tokens after 0 of 4 complete answers" in found.text
    assert "Is it a base model, or made with another end token?" in found.text


@pytest.mark.parametrize(("ended", "level"), [(0, "warning"), (1, "warning"), (2, "ok"), (4, "ok")])
def test_half_of_the_answers_ended_is_enough(tokenizer, ended, level):
    ends, goes_on = torch.tensor([[7, 8], [9, 2]]), torch.tensor([[7, 2], [9, 8]])  # only the last position counts
    tops = [TokenScores(torch.zeros(2), ends if row < ended else goes_on, torch.zeros(2, 2)) for row in range(4)]
    found = _check_end("general", tokenizer, [2], tops)
    assert found.level == level
    assert f"after {ended} of 4" in found.text


def chat_tokenizer(turn_end="<end_of_turn>"):
    """As Gemma's and Phi's: a turn ends with one token, a sequence with another."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [turn_end]})
    tokenizer.chat_template = CHAT_TEMPLATE.replace("'.' }}{% endfor %}", f"'{turn_end}\\n' }}}}{{% endfor %}}")
    return tokenizer


def test_a_turn_may_end_with_another_token_than_a_sequence(start_server, connect):
    """The teacher ends its turns as its template does: no warning that it teaches the student not to end."""
    tokenizer = chat_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert end == len(VOCAB)
    probe = Probe.of(tokenizer, 512, [2, 5])
    assert probe.ends == [end, 2, 5]
    assert {ids[-1] for ids in probe.token_ids} == {end}
    model = make_model(0, vocab_size=end + 1)
    model.lm_head = torch.nn.Linear(32, end + 1)
    model.lm_head.bias.data[end] = 30.0
    teacher = connect(start_server(model=model, tokenizer=tokenizer))
    own = [torch.zeros(len(ids) - start) for ids, start in zip(probe.token_ids, probe.prompt_lens, strict=True)]
    found = {row.subject: row for row in check_scores("g", teacher, tokenizer, end + 1, probe, own, False)}
    assert found["end of sequence"].level == "ok"
    assert found["end of sequence"].text.startswith("'<end_of_turn>' or '</s>' or 'b' is among its five")
    model.lm_head.bias.data[end] = -30.0
    model.lm_head.bias.data[[2, 5]] = -30.0
    found = {row.subject: row for row in check_scores("g", teacher, tokenizer, end + 1, probe, own, False)}
    assert found["end of sequence"].level == "warning"


def test_a_server_with_fewer_tokens_than_the_students_head_is_an_error_with_the_way_out(
    start_server, connect, tokenizer, teacher_model
):
    """The student's head is padded; the first padding row that it draws could not be scored."""
    probe = Probe.of(tokenizer, 128)
    own = [torch.zeros(len(ids) - start) for ids, start in zip(probe.token_ids, probe.prompt_lens, strict=True)]

    def found(student_size, compact, teacher_size=43):
        teacher = connect(start_server(compact=compact, model=make_model(1, vocab_size=teacher_size)))
        findings = list(check_scores("general", teacher, tokenizer, student_size, probe, own, same_weights=False))
        return [finding for finding in findings if finding.subject == "vocabulary"]

    for compact in (True, False):
        assert (
            found(len(VOCAB), compact) == found(len(VOCAB), compact, teacher_size=64) == found(64, compact, 64) == []
        )
        (error,) = found(64, compact)
        assert error.level == "error"
        assert "does not score id 63" in error.text and "Token id 63 is out of vocabulary" in error.text
        assert "the student can write 64 tokens" in error.text and "model.resize_token_embeddings" in error.text


def test_a_teacher_in_the_process_is_not_asked_for_its_likeliest_tokens(teacher_model, score_findings):
    assert list(score_findings(LocalTeacher(teacher_model, "local", "cpu", batch_size=4))) == ["log-probs"]


@pytest.mark.parametrize(
    ("kl", "level"), [(-1e-8, "ok"), (-0.01, "ok"), (0.1, "ok"), (0.101, "warning"), (0.19, "warning")]
)
def test_the_initial_kl_is_named_and_above_a_tenth_of_a_nat_a_warning(kl, level):
    found = initial_kl("domain", kl, 321)
    assert (found.branch, found.subject, found.level) == ("domain", "initial KL", level)
    shown = "0.000" if abs(kl) < 1e-6 else f"{kl:.3f}"  # and not -0.000
    assert found.text.startswith(f"{shown} nats per token over 321 tokens of the student's own")
    assert (", above 0.1." in found.text) is ("watch gap/*/mean" in found.text) is (level == "warning")


def test_the_students_start_is_known_by_name(teacher_model):
    teacher = LocalTeacher(teacher_model, "org/student", "cpu", batch_size=1)
    assert is_student_start(teacher, "org/student")
    assert not is_student_start(teacher, "org/teacher")
    assert not is_student_start(teacher, "student")


def test_the_students_start_is_known_by_the_path_behind_a_served_name(start_server, connect, tmp_path, monkeypatch):
    (tmp_path / "student").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "student")
    monkeypatch.chdir(tmp_path)
    teacher = connect(start_server(name="domain", root=str(tmp_path / "student")))
    for path in ("student", "./student/", "link", str(tmp_path / "student")):
        assert is_student_start(teacher, path)
    assert is_student_start(teacher, "domain")
    assert not is_student_start(teacher, str(tmp_path))


def test_the_first_error_is_raised_and_the_warnings_before_it_are_handed_over():
    warned = []
    findings = iter([
        Finding("a", "reachable", "ok", "fine"),
        Finding("a", "key", "warning", "in the open"),
        Finding("b", "log-probs", "error", "'my-teacher' is uniform"),
        Finding("b", "initial KL", "warning", "high"),
    ])  # fmt: skip
    with pytest.raises(TeacherError, match=r"^teacher 'b': 'my-teacher' is uniform$"):
        raise_errors(findings, warned.append)
    assert warned == ["teacher 'a', key: in the open"]


def test_an_error_that_names_its_teacher_is_raised_as_it_is():
    with pytest.raises(TeacherError, match=r"^teacher 'a' at http://x is short$"):
        raise_errors([Finding("a", "context", "error", "teacher 'a' at http://x is short")], pytest.fail)


def test_without_an_error_nothing_is_raised():
    warned = []
    raise_errors([Finding("a", "key", "warning", "one"), Finding("b", "key", "warning", "two")], warned.append)
    assert warned == ["teacher 'a', key: one", "teacher 'b', key: two"]


# --- the conversations that are scored ---------------------------------------------------------------------------


def texts(tokenizer, probe):
    """Prompt and completion of each row, as the tokens' texts."""
    pieces = [tokenizer.convert_ids_to_tokens(ids) for ids in probe.token_ids]
    return [
        ("".join(tokens[:start]), "".join(tokens[start:]))
        for tokens, start in zip(pieces, probe.prompt_lens, strict=True)
    ]


def in_vocabulary(text):
    return "".join(letter if letter in VOCAB else "<unk>" for letter in text)


def test_a_probe_is_every_conversation_in_the_template_with_an_end(tokenizer):
    assert texts(tokenizer, Probe.of(tokenizer, 512)) == [
        (in_vocabulary(f"u {question}.a "), in_vocabulary(answer) + "</s>") for question, answer in PROBE_CONVERSATIONS
    ]


def test_a_probe_without_a_chat_template_is_plain_text():
    plain = make_tokenizer()
    plain.chat_template = None
    assert texts(plain, Probe.of(plain, 512)) == [
        (in_vocabulary(f"{question}\n"), in_vocabulary(answer) + "</s>") for question, answer in PROBE_CONVERSATIONS
    ]


def test_a_probe_keeps_the_conversations_that_fit(tokenizer):
    everything = Probe.of(tokenizer, 512)
    lengths = sorted(map(len, everything.token_ids))
    assert lengths[0] < lengths[1] < lengths[-1]
    for room in (lengths[0], lengths[1], lengths[-1] - 1):
        kept = [row for row, ids in enumerate(everything.token_ids) if len(ids) <= room]
        assert 0 < len(kept) < 4
        probe = Probe.of(tokenizer, room)
        assert probe.token_ids == [everything.token_ids[row] for row in kept]
        assert probe.prompt_lens == [everything.prompt_lens[row] for row in kept]


@pytest.mark.parametrize("max_tokens", [2, 5, 33, 39])
def test_where_none_fits_a_probe_is_the_end_of_the_first(tokenizer, max_tokens):
    ((prompt, completion),) = texts(tokenizer, Probe.of(tokenizer, max_tokens))
    whole_prompt, whole_completion = texts(tokenizer, Probe.of(tokenizer, 512))[0]
    probe = Probe.of(tokenizer, max_tokens)
    assert len(probe.token_ids[0]) == max_tokens
    assert prompt  # the first scored token needs a predecessor
    assert completion
    assert (whole_prompt + whole_completion).endswith(prompt + completion)
    if max_tokens > 32:  # the answer is no longer: the cut is in the prompt
        assert completion == whole_completion


# --- teachers in the process, before they are loaded -------------------------------------------------------------


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


def test_a_local_teacher_of_the_same_family_is_ok(student, tokenizer):
    found = check_unloaded("domain", str(student), tokenizer, 512, {}, 0)
    assert found == Finding(
        "domain", "in the process", "ok", f"{student}, not on a server: the same tokens as the student, context fits"
    )


def test_a_local_teacher_with_fewer_tokens_than_the_student_can_write_is_an_error(student, tokenizer):
    found = check_unloaded("domain", str(student), tokenizer, 512, {}, len(VOCAB))
    assert found.level == "ok"
    found = check_unloaded("domain", str(student), tokenizer, 512, {}, 64)
    assert found.level == "error"
    assert "the student can write 64 tokens, the rows of its head, and the teacher knows 43" in found.text
    assert "model.resize_token_embeddings(43)" in found.text


@pytest.mark.parametrize("template", [CHAT_TEMPLATE.replace("'a '", "'a? '"), None])
def test_a_local_teacher_with_another_chat_template_is_a_warning(tokenizer, tmp_path, template):
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


def test_a_local_teacher_with_a_short_context_is_an_error_with_both_numbers(student, tokenizer):
    found = check_unloaded("domain", str(student), tokenizer, 513, {}, 0)
    assert found.level == "error"
    assert (
        "branch 'domain' takes sequences of 512 tokens, but max_prompt_length + max_completion_length is 513"
        in found.text
    )
    assert "Lower max_completion_length" in found.text


def test_a_local_teacher_with_other_tokens_is_an_error_with_an_example(student, tokenizer, tmp_path):
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
def test_a_local_teacher_that_is_not_there_is_an_error_with_what_was_meant(tokenizer, spec, guess):
    found = check_unloaded("domain", spec, tokenizer, 128, {}, 0)
    assert found.level == "error"
    assert f"{spec!r} cannot be loaded {guess}: " in found.text
    assert "Give a folder with a model, a model id of the Hub, the URL of a vLLM server" in found.text


def test_a_local_teacher_without_a_tokenizer_is_an_error(tokenizer, tmp_path):
    make_model(1).save_pretrained(tmp_path)
    found = check_unloaded("domain", str(tmp_path), tokenizer, 128, {}, 0)
    assert found.level == "error"
    assert f"{str(tmp_path)!r} cannot be loaded" in found.text


@pytest.mark.parametrize("spec", [5, ["http://localhost:8001", "a/model"], {"path": "a/model"}], ids=repr)
def test_a_teacher_of_no_known_form_is_an_error_that_shows_it(tokenizer, spec):
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


# --- camopd check ------------------------------------------------------------------------------------------------


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
    starts = [header.index(word) for word in ("teacher", "what", "found")]
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
    ]
    assert table["general", "reachable"][1] == f"the-general at {general.url} (JSON)"
    assert table["domain", "context"][1] == "256 tokens, 129 needed"
    assert table["domain", "initial KL"][1].startswith("0.000 nats per token over ")
    assert float(table["general", "initial KL"][1].split()[0]) > 0.0


def test_the_initial_kl_is_measured_on_the_students_own_tokens(start_server, start_domain, check):
    """It estimates a KL, so that it is positive for another model; log-probs of the probe's texts would not be."""
    code, table = check(teachers={"general": start_server(model=make_model(1)).url, "domain": start_domain().url})
    assert code == 0
    level, text = table["general", "initial KL"]
    assert level == "warning"
    assert float(text.split()[0]) > 0.5
    assert 4 <= int(text.split()[5]) <= 4 * 48


def test_the_students_own_tokens_are_samples_whatever_its_generation_config_says(
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


def test_a_teacher_in_the_process_beside_a_server_has_one_line(start_domain, check, student):
    code, table = check(teachers={"general": str(student), "domain": start_domain().url})
    assert code == 0
    assert [subject for branch, subject in table if branch == "general"] == ["in the process"]
    assert len([subject for branch, subject in table if branch == "domain"]) == 8


def test_nothing_listening_is_an_error_before_the_model_is_looked_for(start_server, check):
    server = start_server()
    server.close()
    code, table = check(teachers={"general": server.url, "domain": "a"}, model_name_or_path="no/such")
    assert code == 2
    assert list(table) == [("general", "reachable")]
    level, text = table["general", "reachable"]
    assert level == "error"
    assert f"teacher 'general' at {server.url} does not answer" in text
    assert "Is `vllm serve` up on that host and port" in text


def test_every_server_that_is_not_reached_has_its_line(start_server, check):
    servers = {branch: start_server() for branch in ("general", "domain")}
    for server in servers.values():
        server.close()
    code, table = check(teachers={branch: server.url for branch, server in servers.items()})
    assert code == 2
    for branch, server in servers.items():
        assert server.url in table[branch, "reachable"][1]


def test_other_weights_behind_the_students_name_are_an_error(start_server, start_domain, check):
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


def test_a_short_context_is_an_error_before_the_student_is_loaded(start_server, start_domain, check):
    general = start_server(max_model_len=100)
    code, table = check(teachers={"general": general.url, "domain": start_domain().url})
    assert code == 2
    level, text = table["general", "context"]
    assert level == "error"
    assert "sequences of 100 tokens" in text
    assert "--max-model-len 129" in text
    assert table["domain", "context"] == ("ok", "256 tokens, 129 needed")
    assert general.scored == []


def test_another_tokenizer_is_an_error(start_server, start_domain, check):
    general = start_server(tokenizer=other_tokenizer())
    code, table = check(teachers={"general": general.url, "domain": start_domain().url})
    assert code == 2
    level, text = table["general", "tokenizer"]
    assert level == "error"
    assert "there and [3, 11, 8, 40] here" in text  # brackets are not markup


def test_a_missing_key_is_an_error_with_its_variable(start_server, start_domain, check):
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


def test_a_server_that_lost_its_weights_is_an_error(start_server, start_domain, check):
    general = start_server(model=without_weights(make_model(1)))
    code, table = check(teachers={"general": general.url, "domain": start_domain().url})
    assert code == 2
    assert table["general", "log-probs"][0] == "error"
    assert "lost its weights" in table["general", "log-probs"][1]


def test_a_server_with_nan_does_not_hide_what_the_others_are(start_server, start_domain, check):
    general = start_server(compact=True)
    general.edit_logps = lambda logps, body: logps * math.nan
    code, table = check(teachers={"general": general.url, "domain": start_domain().url})
    assert code == 2
    assert table["general", "log-probs"][0] == "error"
    assert "non-finite log-probs" in table["general", "log-probs"][1]
    assert ("general", "initial KL") not in table  # said once
    assert table["domain", "self-gap"][0] == "ok"


def test_a_server_that_fails_on_the_students_own_tokens_is_an_error(start_server, start_domain, check, tokenizer):
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
def test_a_local_teacher_that_does_not_exist_is_an_error_at_once(config, capsys, student, tmp_path, path):
    path = path.format(tmp=tmp_path)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["check", config(teachers={"general": path, "domain": str(student)})])
    assert stopped.value.code == 2
    assert (
        f"the teacher of branch 'general' is to be in {path!r}, but there is no such path" in capsys.readouterr().err
    )


def test_a_branch_without_prompts_is_an_error_with_the_key_to_set(config, capsys, student):
    settings = {"teachers": {"general": str(student), "domain": str(student)}, "prompts": {"general": "general.jsonl"}}
    with pytest.raises(SystemExit) as stopped:
        cli.main(["check", config(**settings)])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "visits branch 'domain', but prompts has only ['general']. Add prompts.domain" in said


def test_a_mistyped_key_of_a_teacher_is_an_error_with_the_keys_there_are(config, capsys, student):
    teachers = {"general": {"urls": "http://localhost:1", "modle": "a"}, "domain": str(student)}
    with pytest.raises(SystemExit) as stopped:
        cli.main(["check", config(teachers=teachers)])
    assert stopped.value.code == 2
    assert (
        "A mapping must have `urls`, the URL of a vLLM server or a list of them, and `model`"
        in capsys.readouterr().err
    )


def test_when_one_server_is_gone_the_other_is_shown_all_the_same(check, start_server):
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


def test_a_branch_without_a_teacher_is_an_error(check, student):
    for teachers in ({"general": str(student)}, {"general": str(student), "domain": None}):
        code, table = check(teachers=teachers)
        assert code == 2
        level, text = table["domain", "teacher"]
        assert level == "error"
        assert "schedule 'general:3,domain:1' visits branch 'domain', but teachers has only" in text
        assert "Add teachers.domain or take the branch out of the schedule" in text


def test_a_teacher_of_a_branch_that_is_never_visited_is_an_error(check, student):
    code, table = check("--schedule", "domain:1", teachers={"general": str(student), "domain": str(student)})
    assert code == 2
    assert table["general", "teacher"][0] == "error"
    assert "teachers has 'general', which schedule 'domain:1' never visits" in table["general", "teacher"][1]


def test_the_students_revision_is_not_asked_of_the_teachers(check, student, tmp_path, monkeypatch):
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


def test_the_teachers_that_camopd_serve_has_started_are_checked(start_server, start_domain, check, student, tmp_path):
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


def test_an_unknown_setting_is_an_error_with_its_name(config, capsys, student):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["check", config(teachers={"general": str(student), "domain": str(student)}, lerning_rate=1.0)])
    assert stopped.value.code == 2
    assert "is not a setting of a run. Did you mean 'learning_rate'?" in capsys.readouterr().err


def test_a_student_that_does_not_exist_is_an_error_with_its_name(config, capsys, student):
    teachers = {"general": str(student), "domain": str(student)}
    with pytest.raises(SystemExit) as stopped:
        cli.main(["check", config(teachers=teachers, model_name_or_path="/no/such/student")])
    assert stopped.value.code == 2
    assert "camopd: the student '/no/such/student' cannot be loaded" in capsys.readouterr().err


@pytest.mark.parametrize("columns", ["60", "80"])
def test_a_narrow_terminal_cuts_nothing_out_of_a_url(start_server, check, config, capsys, monkeypatch, columns):
    server = start_server()
    server.close()
    url = f"{server.url}/{'path' * 20}"
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit):
        cli.main(["check", config(teachers={"general": url, "domain": "a"})])
    assert url in "".join(capsys.readouterr().out.split())


# --- as a command, where the imports count -----------------------------------------------------------------------


def run(path):
    return subprocess.run(
        [sys.executable, "-m", "camopd.cli", "check", path], capture_output=True, text=True, timeout=300, check=False
    )


def test_the_command_says_that_nothing_listens(start_server, config):
    server = start_server()
    server.close()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = run(config(teachers={"general": server.url, "domain": "a"}))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # CPU seconds: what else the machine does must not fail a test
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10
    assert found.returncode == 2
    assert "Traceback" not in found.stderr
    assert re.search(rf"general +reachable +error +teacher 'general' at {server.url}", found.stdout)


def test_the_command_exits_with_2_when_the_tokenizer_is_another(start_server, config, student):
    general = start_server(tokenizer=other_tokenizer())
    found = run(config(teachers={"general": general.url, "domain": str(student)}))
    assert found.returncode == 2
    assert "Traceback" not in found.stderr
    assert "has another tokenizer than the student" in " ".join(found.stdout.split())
