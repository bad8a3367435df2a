"""How what the user wrote becomes teachers."""

import copy
from contextlib import nullcontext

import pytest
import torch
from conftest import VOCAB, make_forward
from fake_vllm import PROMPT_LENS, TOKEN_IDS, assert_same_scores, other_tokenizer, reference_logps
from peft import LoraConfig, get_peft_model

from camopd.errors import TeacherError
from camopd.teachers.adapters import AdapterTeacher
from camopd.teachers.base import TokenScores
from camopd.teachers.local import LocalTeacher
from camopd.teachers.resolve import resolve_teachers
from camopd.teachers.vllm.teacher import ServerTeacher, connect_servers


# --- resolve_teachers --------------------------------------------------------------------------------------------


@pytest.fixture
def resolve(model_factory, tokenizer):
    def resolve(teachers, student=None, max_tokens=64, **init_kwargs):
        student = student or model_factory(0)
        return resolve_teachers(
            connect_servers(teachers, max_tokens, patience=5.0),
            student=student,
            student_forward=make_forward(student),
            tokenizer=tokenizer,
            max_tokens=max_tokens,
            device=torch.device("cpu"),
            autocast=nullcontext,
            batch_size=2,
            padding_free=None,
            init_kwargs=init_kwargs,
        )

    return resolve


@pytest.fixture
def teacher_path(teacher_model, tokenizer, tmp_path):
    path = tmp_path / "teacher"
    teacher_model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


class CountingTeacher:
    """A teacher of the user's own: every token is as likely as it is long."""

    name = "counting"

    def score(self, token_ids, prompt_lens, top_k=0):
        lengths = [len(ids) - prompt_len for ids, prompt_len in zip(token_ids, prompt_lens, strict=True)]
        return [TokenScores(torch.full((length,), -float(length))) for length in lengths]


def test_path_is_loaded_and_named(resolve, teacher_path, local_scores):
    teacher = resolve({"general": teacher_path})["general"]
    assert teacher.name == teacher_path
    assert_same_scores(teacher.score(TOKEN_IDS, PROMPT_LENS), local_scores())


def test_teacher_in_another_type_than_the_student_computes_in_is_a_warning(
    resolve, teacher_path, model_factory, caplog
):
    resolve({"general": teacher_path, "domain": model_factory(1)})
    assert "gap is not 0" not in caplog.text
    resolve({"general": teacher_path}, dtype=torch.bfloat16)
    resolve({"domain": model_factory(1).to(torch.bfloat16)})
    for branch in ("general", "domain"):
        assert f"teacher {branch!r} has weights in bfloat16, the student computes in float32" in caplog.text


def test_branches_with_the_same_path_share_one_teacher(resolve, teacher_path):
    teachers = resolve({"general": teacher_path, "domain": teacher_path})
    assert teachers["general"] is teachers["domain"]


def test_branches_with_the_same_server_share_one_teacher(resolve, server):
    teachers = resolve({"general": server.url, "domain": server.url, "other": [server.url]})
    assert teachers["general"] is teachers["domain"]
    assert isinstance(teachers["other"], ServerTeacher)


def test_loaded_model_an_own_object_and_adapter_off_are_taken(resolve, lora_student, teacher_model, local_scores):
    own = CountingTeacher()
    teachers = resolve({"model": teacher_model, "own": own, "domain": "adapter_off"}, student=lora_student)
    assert list(teachers) == ["model", "own", "domain"]
    assert_same_scores(teachers["model"].score(TOKEN_IDS, PROMPT_LENS), local_scores())
    assert teachers["own"] is own
    assert isinstance(teachers["domain"], AdapterTeacher)


def test_order_of_the_branches_is_kept(resolve, server):
    assert list(resolve({"own": CountingTeacher(), "general": server.url})) == ["own", "general"]


def test_loaded_model_with_an_adapter_is_a_teacher(resolve, model_factory):
    def with_adapter():
        torch.manual_seed(0)
        return get_peft_model(model_factory(2), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))

    found = resolve({"general": with_adapter()})["general"].score(TOKEN_IDS, PROMPT_LENS)
    merged = LocalTeacher(with_adapter().merge_and_unload(), "merged", "cpu", batch_size=2)
    plain = LocalTeacher(model_factory(2), "plain", "cpu", batch_size=2).score(TOKEN_IDS, PROMPT_LENS)
    assert_same_scores(found, merged.score(TOKEN_IDS, PROMPT_LENS))
    assert (found[0].logps - plain[0].logps).abs().max() > 0.01


def test_teacher_in_the_process_forwards_rows_in_the_batches_of_the_student(resolve, model_factory, monkeypatch):
    """Whose weights are more by its adapter: a row in another batch has other rounding, and equal weights a gap."""
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    student = get_peft_model(model_factory(0), LoraConfig(r=64, target_modules="all-linear"))
    teacher = resolve({"general": model_factory(0)}, student)["general"]
    rows, starts = [[5] * length for length in range(2, 40)], [1] * 38
    torch.manual_seed(0)
    for _ in range(20):
        some = torch.randperm(38)[:6].tolist()
        token_ids, prompt_lens = [rows[row] for row in some], [starts[row] for row in some]
        own = make_forward(student).rows(token_ids, prompt_lens)
        for scores, (logps, _) in zip(teacher.score(token_ids, prompt_lens), own, strict=True):
            assert torch.equal(scores.logps, logps)


@pytest.mark.parametrize("spec", [None, 7, [], ["http://host:1", "model"], object(), {"url": "http://host:1"}])
def test_teacher_of_any_other_form_is_refused_with_the_forms_there_are(resolve, spec):
    with pytest.raises(
        TypeError, match=r"(?s)teacher of branch 'general' is .*It must be the URL of a vLLM server.*`score` method"
    ):
        resolve({"general": spec})


def test_object_without_a_score_method_is_refused(resolve):
    class Nameless:
        name = "half a teacher"

    with pytest.raises(TypeError, match=r"teacher of branch 'domain' is .*\(Nameless\)"):
        resolve({"domain": Nameless()})


@pytest.mark.parametrize("missing", ["{tmp}/nowhere", "nobody/no-model", "./nowhere"])
def test_path_that_is_not_there_is_refused_with_the_branch_and_the_forms(resolve, tmp_path, missing):
    path = missing.format(tmp=tmp_path)
    with pytest.raises(
        ValueError,
        match=rf"(?s)teacher of branch 'domain', '{path}', cannot be loaded.*: .*http://host:port.*'adapter_off'",
    ):
        resolve({"domain": path})


def test_folder_without_a_model_is_refused_with_the_branch(resolve, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"(?s)teacher of branch 'domain', '.*empty', cannot be loaded"):
        resolve({"domain": str(tmp_path / "empty")})


def test_folder_without_a_tokenizer_is_refused_with_the_branch(resolve, teacher_model, tmp_path):
    teacher_model.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"(?s)branch 'domain'.*tokenizer"):
        resolve({"domain": str(tmp_path / "bare")})


def test_tokenizer_of_the_same_size_on_disk_is_refused_with_a_token(resolve, teacher_model, tmp_path):
    teacher_model.save_pretrained(tmp_path / "other")
    other_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(
        ValueError,  # only the 26 letters are turned round
        match=r"teacher of branch 'domain' has another tokenizer than the student: 26 of 43 tokens differ, for "
        r"example '[a-z]' is id [0-9]+ for the student and [0-9]+ for the teacher",
    ):
        resolve({"domain": str(tmp_path / "other")})


def test_teacher_with_a_smaller_vocabulary_is_refused(resolve, model_factory, tokenizer, tmp_path):
    small = model_factory(1, vocab_size=len(VOCAB) - 1)
    small.save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    for spec in (str(tmp_path / "small"), small):
        with pytest.raises(
            ValueError,
            match=r"teacher of branch 'domain' .*can write 43 tokens, .*knows 42: .*resize_token_embeddings\(42\)",
        ):
            resolve({"domain": spec})


def test_misspelt_folder_of_a_teacher_is_named_and_not_asked_of_the_hub(resolve, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "general").mkdir()
    (tmp_path / "general" / "config.json").write_text("{}")
    said = r"'genral', cannot be loaded \(did you mean 'general'\?\): there is no such path on this machine"
    with pytest.raises(ValueError, match=said):
        resolve({"domain": "genral"})


def test_student_with_a_padded_vocabulary_needs_a_teacher_that_knows_it(resolve, model_factory, teacher_model):
    """It can draw the rows that no tokenizer uses, and a teacher without them would end in an IndexError."""
    padded = model_factory(0, vocab_size=64)
    with pytest.raises(ValueError, match=r"can write 64 tokens, the rows of its head, and the teacher knows 43"):
        resolve({"domain": teacher_model}, student=padded)
    teacher = resolve({"domain": model_factory(1, vocab_size=64)}, student=padded)["domain"]
    (score,) = teacher.score([[5, 63, 62, 6]], [1])
    torch.testing.assert_close(score.logps, reference_logps(teacher.model, [5, 63, 62, 6])[0], rtol=0, atol=1e-5)
    padded.resize_token_embeddings(len(VOCAB))  # the way out that the error names
    assert resolve({"domain": teacher_model}, student=padded)


def test_chat_template_of_a_loaded_teacher_that_differs_is_a_warning(
    resolve, teacher_model, tokenizer, tmp_path, caplog
):
    other = copy.deepcopy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace("'a '", "'b '")
    for name, theirs in (("same", tokenizer), ("other", other)):
        teacher_model.save_pretrained(tmp_path / name)
        theirs.save_pretrained(tmp_path / name)
        resolve({"domain": str(tmp_path / name)})
        found = [record.getMessage() for record in caplog.records if "chat template" in record.getMessage()]
        assert len(found) == (name == "other")
    assert "writes a conversation as" in found[0] and "teacher 'domain', chat template: " in found[0]


def test_teacher_with_a_padded_vocabulary_is_taken(resolve, model_factory):
    teacher = resolve({"domain": model_factory(1, vocab_size=64)})["domain"]
    assert len(teacher.score(TOKEN_IDS, PROMPT_LENS)) == 5


def test_servers_context_and_tokenizer_are_checked(resolve, start_server):
    with pytest.raises(TeacherError, match=r"takes sequences of 64 tokens, but .* is 65"):
        resolve({"general": start_server(max_model_len=64).url})
    with pytest.raises(TeacherError, match="has another tokenizer than the student"):
        resolve({"general": [start_server().url, start_server(tokenizer=other_tokenizer()).url]})


def test_servers_are_asked_before_models_are_loaded(resolve, server, tmp_path):
    server.always = (404, "Not Found")
    with pytest.raises(TeacherError, match="answered 404"):
        resolve({"domain": str(tmp_path / "nowhere"), "general": server.url})


@pytest.mark.parametrize(
    ("spec", "guess"),
    [
        ("localhost:8001", r"did you mean 'http://localhost:8001'\?"),
        ("adapter-off", r"did you mean 'adapter_off'\?"),
        ("./nowhere", "there is no such folder with a model"),
    ],
)
def test_mistyped_teacher_is_refused_with_a_guess_of_what_was_meant(resolve, spec, guess):
    with pytest.raises(ValueError, match=rf"teacher of branch 'domain', '{spec}', cannot be loaded \({guess}\)"):
        resolve({"domain": spec})
