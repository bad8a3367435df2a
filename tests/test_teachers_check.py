"""What is found wrong with a teacher, in words with a way out.

The servers are those of fake_vllm.py.
"""

import copy
import json
import math
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from conftest import CHAT_TEMPLATE, LOGP, VOCAB, make_model, make_tokenizer
from fake_vllm import other_tokenizer, reference_logps, with_noise, without_weights
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from camopd.errors import TeacherError
from camopd.teachers.base import TokenScores
from camopd.teachers.check import (
    PROBE_CONVERSATIONS,
    PROBE_TEXTS,
    Finding,
    Probe,
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


# --- what a server says of itself --------------------------------------------------------------------------------


def server_findings(teacher, tokenizer, max_tokens=128):
    """The findings by subject, all of branch "general"."""
    findings = list(check_server("general", teacher, tokenizer, max_tokens))
    assert {finding.branch for finding in findings} == {"general"}
    assert len({finding.subject for finding in findings}) == len(findings)
    return {finding.subject: finding for finding in findings}


def test_server_that_fits_is_ok_in_every_line(server, connect, tokenizer):
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
def test_key_is_in_the_open_over_http_to_another_machine(url, is_open):
    teacher = SimpleNamespace(
        name="t", urls=[url], has_key=True, transports={url: "json"}, max_model_len=9, check_context=lambda tokens: None
    )  # fmt: skip
    found = [finding.subject for finding in islice(check_server("general", teacher, None, 8), 2)]
    assert found == ["reachable", "key" if is_open else "context"]


def test_key_that_travels_in_the_open_is_a_warning_with_the_urls(server, connect, tokenizer, monkeypatch):
    monkeypatch.setenv("CAMOPD_TEACHER_API_KEY", "secret")
    url = server.url.replace("127.0.0.1", "0.0.0.0")  # reaches this machine, and is not a loopback address
    found = server_findings(connect(server, url), tokenizer)["key"]
    assert found.level == "warning"
    assert found.text == (f"the API key travels unencrypted to {url}; use https unless that network is yours alone")
    assert "secret" not in found.text


def test_key_is_not_mentioned_without_one_or_on_this_machine(server, connect, tokenizer, monkeypatch):
    url = server.url.replace("127.0.0.1", "0.0.0.0")
    assert "key" not in server_findings(connect(url), tokenizer)
    monkeypatch.setenv("CAMOPD_TEACHER_API_KEY", "secret")
    assert "key" not in server_findings(connect(server), tokenizer)


def test_context_that_is_just_long_enough_is_ok(start_server, connect, tokenizer):
    found = server_findings(connect(start_server(max_model_len=129)), tokenizer)["context"]
    assert (found.level, found.text) == ("ok", "129 tokens, 129 needed")


def test_context_one_token_short_is_an_error_with_the_flag(start_server, connect, tokenizer):
    short = start_server(max_model_len=128)
    found = server_findings(connect(start_server(), short), tokenizer)["context"]
    assert found.level == "error"
    assert short.url in found.text
    assert "takes sequences of 128 tokens" in found.text
    assert "--max-model-len 129" in found.text
    assert "max_completion_length" in found.text


def test_tokenizer_that_gives_the_same_ids_is_ok_with_their_number(server, connect, tokenizer):
    found = server_findings(connect(server), tokenizer)["tokenizer"]
    assert found.level == "ok"
    compared = int(found.text.removeprefix("the same ids for ").removesuffix(" tokens of probe texts"))
    assert compared > sum(len(text) for text in PROBE_TEXTS)


def test_tokenizer_of_the_same_size_with_other_ids_is_an_error_with_the_ids_of_both(start_server, connect, tokenizer):
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
def test_added_token_the_teacher_does_not_know_is_an_error_with_it(start_server, connect, special, monkeypatch):
    monkeypatch.setattr("camopd.teachers.check.VOCABULARY_PROBES", 2)  # found as an added token, not by its number
    student = make_tokenizer()
    student.add_tokens(["<think>"], special_tokens=special)
    found = server_findings(connect(start_server()), student)["tokenizer"]
    assert found.level == "error"
    assert "<think>" in found.text
    assert str(len(VOCAB)) in found.text.partition(" there and ")[2]  # its id


def test_tokenizer_with_other_ids_of_tokens_in_none_of_the_texts_is_an_error(start_server, connect, tokenizer):
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    ids = backend["model"]["vocab"]
    assert "6" not in "".join(PROBE_TEXTS) and "7" not in "".join(PROBE_TEXTS)
    ids["6"], ids["7"] = ids["7"], ids["6"]
    teacher = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)))
    found = server_findings(connect(start_server(tokenizer=teacher)), tokenizer)["tokenizer"]
    assert found.level == "error"
    assert f"{ids['6']}, " in found.text


def test_added_token_with_another_id_is_an_error(start_server, connect):
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
def test_answer_without_ids_is_an_error(start_server, connect, tokenizer, answer):
    server = start_server()
    teacher = connect(server)
    server.always = (200, answer)
    found = server_findings(teacher, tokenizer)
    assert found["tokenizer"].level == "error"
    assert "the ids are [] there" in found["tokenizer"].text
    assert found["chat template"].level == "warning"


def test_server_that_does_not_tokenize_is_an_error_with_its_words(server, connect, tokenizer):
    teacher = connect(server)
    server.always = (404, "no such path here")
    found = server_findings(teacher, tokenizer)["tokenizer"]
    assert found.level == "error"
    assert f"teacher 'general' at {server.url} answered 404: no such path here" in found.text


def test_chat_template_of_another_kind_is_a_warning_with_both_texts(start_server, connect, tokenizer):
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


def test_server_without_a_chat_template_is_a_warning_with_its_words(start_server, connect, tokenizer):
    teacher = make_tokenizer()
    teacher.chat_template = None
    found = server_findings(connect(start_server(tokenizer=teacher)), tokenizer)["chat template"]
    assert found.level == "warning"
    assert "no chat template" in found.text
    assert "--chat-template" in found.text


def test_student_without_a_chat_template_has_none_to_compare(server, connect):
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


def test_students_own_weights_are_ok_with_the_gap_between_the_engines(start_server, connect, score_findings):
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


def test_weights_of_another_model_under_the_students_name_are_an_error_with_the_gap(
    start_server, connect, score_findings
):
    found = score_findings(connect(start_server(model=make_model(1))), same_weights=True)["self-gap"]
    assert found.level == "error"
    assert float(found.text.partition(" nats")[0].split()[-1]) > 0.5
    assert "where 0 is right: other weights stand behind 'tiny-teacher'" in found.text
    assert "from the student's own path, with its --dtype and without --quantization" in found.text


def test_teacher_with_weights_of_its_own_has_no_self_gap(start_server, connect, score_findings):
    assert "self-gap" not in score_findings(connect(start_server(model=make_model(1))))


def test_teacher_that_ends_its_answers_is_ok(start_server, connect, teacher_model, score_findings):
    found = score_findings(connect(start_server(model=with_eos_bias(teacher_model, 20.0))))["end of sequence"]
    assert found.level == "ok"
    assert found.text == "'</s>' is among its five likeliest tokens after 4 of 4 complete answers"


def test_teacher_that_does_not_end_its_answers_is_a_warning(start_server, connect, teacher_model, score_findings):
    found = score_findings(connect(start_server(model=with_eos_bias(teacher_model, -20.0))))["end of sequence"]
    assert found.level == "warning"
    assert "'</s>' is among its five likeliest tokens after 0 of 4 complete answers" in found.text
    assert "Is it a base model, or made with another end token?" in found.text


@pytest.mark.parametrize(("ended", "level"), [(0, "warning"), (1, "warning"), (2, "ok"), (4, "ok")])
def test_answers_need_to_end_in_half_of_the_cases(tokenizer, ended, level):
    ends, goes_on = torch.tensor([[7, 8], [9, 2]]), torch.tensor([[7, 2], [9, 8]])  # only the last position counts
    tops = [TokenScores(torch.zeros(2), ends if row < ended else goes_on, torch.zeros(2, 2)) for row in range(4)]
    probe = SimpleNamespace(token_ids=[[4, 5, 6]] * 4, prompt_lens=[1] * 4, ends=[2])
    teacher = SimpleNamespace(name="t", score=lambda token_ids, prompt_lens, top_k=0: tops)
    student = [torch.zeros(2)] * 4
    (*_, found) = check_scores("general", teacher, tokenizer, len(VOCAB), probe, student, False, likeliest=True)
    assert (found.subject, found.level) == ("end of sequence", level)
    assert f"after {ended} of 4" in found.text


def chat_tokenizer(turn_end="<end_of_turn>"):
    """As Gemma's and Phi's: a turn ends with one token, a sequence with another."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [turn_end]})
    tokenizer.chat_template = CHAT_TEMPLATE.replace("'.' }}{% endfor %}", f"'{turn_end}\\n' }}}}{{% endfor %}}")
    return tokenizer


def test_turn_may_end_with_another_token_than_a_sequence(start_server, connect):
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


def test_server_with_fewer_tokens_than_the_students_head_is_an_error_with_the_way_out(
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


def test_teacher_in_the_process_is_not_asked_for_its_likeliest_tokens(teacher_model, score_findings):
    assert list(score_findings(LocalTeacher(teacher_model, "local", "cpu", batch_size=4))) == ["log-probs"]


@pytest.mark.parametrize(
    ("kl", "level"), [(-1e-8, "ok"), (-0.01, "ok"), (0.1, "ok"), (0.101, "warning"), (0.19, "warning")]
)
def test_initial_kl_is_named_and_above_a_tenth_of_a_nat_a_warning(kl, level):
    found = initial_kl("domain", kl, 321)
    assert (found.branch, found.subject, found.level) == ("domain", "initial KL", level)
    shown = "0.000" if abs(kl) < 1e-6 else f"{kl:.3f}"  # and not -0.000
    assert found.text.startswith(f"{shown} nats per token over 321 tokens of the student's own")
    assert (", above 0.1." in found.text) is ("watch gap/*/mean" in found.text) is (level == "warning")


def test_students_start_is_known_by_name(teacher_model):
    teacher = LocalTeacher(teacher_model, "org/student", "cpu", batch_size=1)
    assert is_student_start(teacher, "org/student")
    assert not is_student_start(teacher, "org/teacher")
    assert not is_student_start(teacher, "student")


def test_students_start_is_known_by_the_path_behind_a_served_name(start_server, connect, tmp_path, monkeypatch):
    (tmp_path / "student").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "student")
    monkeypatch.chdir(tmp_path)
    teacher = connect(start_server(name="domain", root=str(tmp_path / "student")))
    for path in ("student", "./student/", "link", str(tmp_path / "student")):
        assert is_student_start(teacher, path)
    assert is_student_start(teacher, "domain")
    assert not is_student_start(teacher, str(tmp_path))


def test_raise_errors_raises_the_first_and_hands_the_warnings_before_it_over():
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


def test_raise_errors_raises_an_error_that_names_its_teacher_as_it_is():
    with pytest.raises(TeacherError, match=r"^teacher 'a' at http://x is short$"):
        raise_errors([Finding("a", "context", "error", "teacher 'a' at http://x is short")], pytest.fail)


def test_raise_errors_raises_nothing_without_an_error():
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


def test_probe_is_every_conversation_in_the_template_with_an_end(tokenizer):
    assert texts(tokenizer, Probe.of(tokenizer, 512)) == [
        (in_vocabulary(f"u {question}.a "), in_vocabulary(answer) + "</s>") for question, answer in PROBE_CONVERSATIONS
    ]


def test_probe_without_a_chat_template_is_plain_text():
    plain = make_tokenizer()
    plain.chat_template = None
    assert texts(plain, Probe.of(plain, 512)) == [
        (in_vocabulary(f"{question}\n"), in_vocabulary(answer) + "</s>") for question, answer in PROBE_CONVERSATIONS
    ]


def test_probe_keeps_the_conversations_that_fit(tokenizer):
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
def test_probe_is_the_end_of_the_first_conversation_where_none_fits(tokenizer, max_tokens):
    ((prompt, completion),) = texts(tokenizer, Probe.of(tokenizer, max_tokens))
    whole_prompt, whole_completion = texts(tokenizer, Probe.of(tokenizer, 512))[0]
    probe = Probe.of(tokenizer, max_tokens)
    assert len(probe.token_ids[0]) == max_tokens
    assert prompt  # the first scored token needs a predecessor
    assert completion
    assert (whole_prompt + whole_completion).endswith(prompt + completion)
    if max_tokens > 32:  # the answer is no longer: the cut is in the prompt
        assert completion == whole_completion
