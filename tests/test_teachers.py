"""Teachers in the process, and how what the user wrote becomes teachers. Those on servers are in test_vllm_teacher.py."""

import copy
from contextlib import nullcontext

import pytest
import torch
from conftest import LOGP, VOCAB, make_forward, make_model
from fake_vllm import PROMPT_LENS, TOKEN_IDS, assert_same_scores, other_tokenizer, reference_logps
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import OPTConfig, OPTForCausalLM
from trl.trainer.utils import use_adapter

from camopd.errors import TeacherError
from camopd.forward import Forward
from camopd.teachers.adapters import AdapterTeacher, keep_start_adapter
from camopd.teachers.base import Teacher, TokenScores
from camopd.teachers.local import LocalTeacher
from camopd.teachers.resolve import resolve_teachers
from camopd.teachers.vllm.teacher import ServerTeacher, connect_servers


# --- LocalTeacher ------------------------------------------------------------------------------------------------


def test_local_scores_equal_a_plain_log_softmax(teacher_model):
    scores = LocalTeacher(teacher_model, "local", "cpu", batch_size=8).score(TOKEN_IDS, PROMPT_LENS, top_k=3)
    for score, ids, prompt_len in zip(scores, TOKEN_IDS, PROMPT_LENS, strict=True):
        sampled, everything = (logps[prompt_len - 1 :] for logps in reference_logps(teacher_model, ids))
        torch.testing.assert_close(score.logps, sampled, rtol=0, atol=LOGP)
        top = everything.topk(3, dim=-1)
        torch.testing.assert_close(score.top_ids, top.indices)
        torch.testing.assert_close(score.top_logps, top.values, rtol=0, atol=LOGP)
        assert score.logps.dtype == torch.float32


def test_local_scores_without_top_k_have_none(teacher_model):
    scores = LocalTeacher(teacher_model, "local", "cpu", batch_size=8).score(TOKEN_IDS, PROMPT_LENS)
    assert all(score.top_ids is None and score.top_logps is None for score in scores)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_local_batch_size_changes_no_score(teacher_model, batch_size):
    alone = LocalTeacher(teacher_model, "local", "cpu", batch_size).score(TOKEN_IDS, PROMPT_LENS, top_k=2)
    together = LocalTeacher(teacher_model, "local", "cpu", 8).score(TOKEN_IDS, PROMPT_LENS, top_k=2)
    assert_same_scores(alone, together)


@pytest.mark.parametrize("top_k", [0, 2])
def test_local_teacher_scores_a_batch_of_nothing_but_empty_completions(teacher_model, top_k):
    scores = LocalTeacher(teacher_model, "local", "cpu", 8).score([[4, 5], [6]], [2, 1], top_k)
    assert [score.logps.shape for score in scores] == [(0,), (0,)]
    if top_k:
        assert [score.top_ids.shape for score in scores] == [(0, 2), (0, 2)]


def test_local_teacher_is_frozen_and_stays_as_it_was(teacher_model):
    before = copy.deepcopy(teacher_model.state_dict())
    teacher_model.train()
    teacher = LocalTeacher(teacher_model, "local", "cpu", batch_size=2)
    assert not teacher_model.training
    scores = teacher.score(TOKEN_IDS, PROMPT_LENS)
    assert not any(parameter.requires_grad for parameter in teacher_model.parameters())
    assert not any(score.logps.requires_grad for score in scores)
    assert all(torch.equal(value, before[name]) for name, value in teacher_model.state_dict().items())
    assert isinstance(teacher, Teacher)


def test_local_teacher_scores_under_the_trainers_autocast_and_answers_in_float32(teacher_model):
    plain = LocalTeacher(teacher_model, "local", "cpu", batch_size=2).score(TOKEN_IDS, PROMPT_LENS)
    rounded = LocalTeacher(
        teacher_model, "local", "cpu", batch_size=2, autocast=lambda: torch.autocast("cpu", torch.bfloat16)
    ).score(TOKEN_IDS, PROMPT_LENS)
    assert rounded[1].logps.dtype == torch.float32
    difference = (rounded[1].logps - plain[1].logps).abs().max()
    assert 1e-5 < difference < 0.5


# --- AdapterTeacher -------------------------------------------------------------------------------------------


@pytest.fixture
def lora_student(model_factory):
    """A LoRA student whose adapter changes every log-prob."""
    torch.manual_seed(3)
    config = LoraConfig(
        r=4, lora_alpha=32, lora_dropout=0.5, target_modules=["q_proj", "v_proj"], init_lora_weights=False
    )
    base = model_factory(0)
    for layer in base.model.layers:
        layer.self_attn.attention_dropout = 0.5  # which goes on when the adapter is off
    return get_peft_model(base, config)


def student_forward(student):
    return lambda ids, lens: make_forward(student).logps(ids, lens)


def adapter_off(student, which="adapter_off"):
    return AdapterTeacher(student, which, make_forward(student))


def test_adapter_off_scores_equal_those_of_the_base_model(lora_student, model_factory):
    base = LocalTeacher(model_factory(0), "base", "cpu", batch_size=2)
    expected = base.score(TOKEN_IDS, PROMPT_LENS, top_k=3)
    lora_student.train()  # dropout must not disturb the scores
    assert_same_scores(adapter_off(lora_student).score(TOKEN_IDS, PROMPT_LENS, top_k=3), expected)
    lora_student.eval()
    with torch.no_grad():
        with_adapter, _ = student_forward(lora_student)(TOKEN_IDS[:1], PROMPT_LENS[:1])
    assert (with_adapter[0] - expected[0].logps).abs().min() > 1e-3  # the adapter is not zero


@pytest.mark.parametrize("training", [True, False])
def test_adapter_off_leaves_adapter_training_mode_and_gradients_as_they_were(lora_student, training):
    def state():
        lora_student.eval()
        with torch.no_grad():
            logps, _ = student_forward(lora_student)(TOKEN_IDS, PROMPT_LENS)
        trainable = [name for name, parameter in lora_student.named_parameters() if parameter.requires_grad]
        return logps, trainable

    logps, trainable = state()
    lora_student.train(training)
    modes = [module.training for module in lora_student.modules()]
    adapter_off(lora_student).score(TOKEN_IDS, PROMPT_LENS, top_k=2)
    assert [module.training for module in lora_student.modules()] == modes
    logps_after, trainable_after = state()
    torch.testing.assert_close(logps_after, logps, rtol=0, atol=0)
    assert trainable_after == trainable != []


def test_adapter_start_is_the_adapter_before_training(lora_student):
    lora_student.eval()
    with torch.no_grad():
        before, _ = student_forward(lora_student)(TOKEN_IDS, PROMPT_LENS)
    keep_start_adapter(lora_student)
    trainable = {name for name, parameter in lora_student.named_parameters() if parameter.requires_grad}
    assert trainable and all(".default." in name for name in trainable)
    with torch.no_grad():
        for name, parameter in lora_student.named_parameters():
            if name in trainable:
                parameter.add_(0.1)
        after, _ = student_forward(lora_student)(TOKEN_IDS, PROMPT_LENS)
    assert not torch.allclose(before, after)
    teacher = adapter_off(lora_student, "adapter_start")
    for row, score in enumerate(teacher.score(TOKEN_IDS, PROMPT_LENS)):
        torch.testing.assert_close(score.logps, before[row, : len(score.logps)], rtol=0, atol=LOGP)
    with torch.no_grad():
        torch.testing.assert_close(student_forward(lora_student)(TOKEN_IDS, PROMPT_LENS)[0], after, rtol=0, atol=0)
    assert trainable == {name for name, parameter in lora_student.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False),
        LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, init_lora_weights=False),
        LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"], init_lora_weights=False),
        LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[5, 6], init_lora_weights=False),
        IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[], init_ia3_weights=False),
    ],
    ids=["embedding", "dora", "modules_to_save", "tokens", "ia3"],
)
def test_adapter_start_is_a_copy_of_every_kind_of_adapter(config):
    student = get_peft_model(make_model(0), config)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        before = student(torch.tensor([[5, 6, 7, 8]])).logits
        keep_start_adapter(student)
        with use_adapter(student, "start"):
            torch.testing.assert_close(student(torch.tensor([[5, 6, 7, 8]])).logits, before, rtol=0, atol=LOGP)


def test_a_start_adapter_of_another_trainer_is_not_taken(lora_student):
    keep_start_adapter(lora_student)
    with pytest.raises(ValueError, match=r"has an adapter of that name, perhaps of a trainer made before"):
        keep_start_adapter(lora_student)


def test_adapter_start_needs_a_single_adapter(lora_student):
    lora_student.add_adapter("other", lora_student.peft_config["default"])
    with pytest.raises(ValueError, match=r"one adapter, called 'default', and this one has \['default', 'other'\]"):
        keep_start_adapter(lora_student)


def test_adapter_off_puts_everything_back_when_the_forward_fails(lora_student):
    def fails(ids, lens, with_entropy):
        raise torch.OutOfMemoryError("too long")

    lora_student.train()
    with pytest.raises(torch.OutOfMemoryError):
        forward = make_forward(lora_student)
        forward.logps = fails
        AdapterTeacher(lora_student, "adapter_off", forward).score(TOKEN_IDS, PROMPT_LENS)
    assert lora_student.training
    lora_student.eval()
    with torch.no_grad():
        with_adapter, _ = student_forward(lora_student)(TOKEN_IDS[:1], PROMPT_LENS[:1])
        with lora_student.disable_adapter():
            without, _ = student_forward(lora_student)(TOKEN_IDS[:1], PROMPT_LENS[:1])
    assert not torch.equal(with_adapter, without)


# --- resolve_teachers --------------------------------------------------------------------------------------------


@pytest.fixture
def resolve(model_factory, tokenizer):
    def resolve(teachers, student=None, max_tokens=64, **init_kwargs):
        student = student or model_factory(0)
        return resolve_teachers(
            connect_servers(teachers, max_tokens, patience=5.0),
            student=student,
            student_forward=student_forward(student),
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


def test_a_path_is_loaded_and_named(resolve, teacher_path, local_scores):
    teacher = resolve({"general": teacher_path})["general"]
    assert teacher.name == teacher_path
    assert_same_scores(teacher.score(TOKEN_IDS, PROMPT_LENS), local_scores())


def test_a_teacher_in_another_type_than_the_student_computes_in_is_a_warning(
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


def test_a_loaded_model_an_own_object_and_adapter_off_are_taken(resolve, lora_student, teacher_model, local_scores):
    own = CountingTeacher()
    teachers = resolve({"model": teacher_model, "own": own, "domain": "adapter_off"}, student=lora_student)
    assert list(teachers) == ["model", "own", "domain"]
    assert_same_scores(teachers["model"].score(TOKEN_IDS, PROMPT_LENS), local_scores())
    assert teachers["own"] is own
    assert isinstance(teachers["domain"], AdapterTeacher)


def test_the_order_of_the_branches_is_kept(resolve, server):
    assert list(resolve({"own": CountingTeacher(), "general": server.url})) == ["own", "general"]


def test_a_loaded_model_with_an_adapter_is_a_teacher(resolve, model_factory):
    def with_adapter():
        torch.manual_seed(0)
        return get_peft_model(model_factory(2), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))

    found = resolve({"general": with_adapter()})["general"].score(TOKEN_IDS, PROMPT_LENS)
    merged = LocalTeacher(with_adapter().merge_and_unload(), "merged", "cpu", batch_size=2)
    plain = LocalTeacher(model_factory(2), "plain", "cpu", batch_size=2).score(TOKEN_IDS, PROMPT_LENS)
    assert_same_scores(found, merged.score(TOKEN_IDS, PROMPT_LENS))
    assert (found[0].logps - plain[0].logps).abs().max() > 0.01


@pytest.mark.parametrize("spec", [None, 7, [], ["http://host:1", "model"], object(), {"url": "http://host:1"}])
def test_anything_else_is_refused_with_the_forms_there_are(resolve, spec):
    with pytest.raises(
        TypeError, match=r"(?s)teacher of branch 'general' is .*It must be the URL of a vLLM server.*`score` method"
    ):
        resolve({"general": spec})


def test_an_object_without_a_score_method_is_refused(resolve):
    class Nameless:
        name = "half a teacher"

    with pytest.raises(TypeError, match=r"teacher of branch 'domain' is .*\(Nameless\)"):
        resolve({"domain": Nameless()})


@pytest.mark.parametrize("missing", ["{tmp}/nowhere", "nobody/no-model", "./nowhere"])
def test_a_path_that_is_not_there_is_refused_with_the_branch_and_the_forms(resolve, tmp_path, missing):
    path = missing.format(tmp=tmp_path)
    with pytest.raises(
        ValueError,
        match=rf"(?s)teacher of branch 'domain', '{path}', cannot be loaded.*: .*http://host:port.*'adapter_off'",
    ):
        resolve({"domain": path})


def test_a_folder_without_a_model_is_refused_with_the_branch(resolve, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"(?s)teacher of branch 'domain', '.*empty', cannot be loaded"):
        resolve({"domain": str(tmp_path / "empty")})


def test_a_folder_without_a_tokenizer_is_refused_with_the_branch(resolve, teacher_model, tmp_path):
    teacher_model.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"(?s)branch 'domain'.*tokenizer"):
        resolve({"domain": str(tmp_path / "bare")})


def test_another_tokenizer_of_the_same_size_on_disk_is_refused_with_a_token(resolve, teacher_model, tmp_path):
    teacher_model.save_pretrained(tmp_path / "other")
    other_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(
        ValueError,  # only the 26 letters are turned round
        match=r"teacher of branch 'domain' has another tokenizer than the student: 26 of 43 tokens differ, for "
        r"example '[a-z]' is id [0-9]+ for the student and [0-9]+ for the teacher",
    ):
        resolve({"domain": str(tmp_path / "other")})


def test_a_teacher_with_a_smaller_vocabulary_is_refused(resolve, model_factory, tokenizer, tmp_path):
    small = model_factory(1, vocab_size=len(VOCAB) - 1)
    small.save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    for spec in (str(tmp_path / "small"), small):
        with pytest.raises(
            ValueError,
            match=r"teacher of branch 'domain' .*can write 43 tokens, .*knows 42: .*resize_token_embeddings\(42\)",
        ):
            resolve({"domain": spec})


def test_a_student_with_a_padded_vocabulary_needs_a_teacher_that_knows_it(resolve, model_factory, teacher_model):
    """It can draw the rows that no tokenizer uses, and a teacher without them would end in an IndexError."""
    padded = model_factory(0, vocab_size=64)
    with pytest.raises(ValueError, match=r"can write 64 tokens, the rows of its head, and the teacher knows 43"):
        resolve({"domain": teacher_model}, student=padded)
    teacher = resolve({"domain": model_factory(1, vocab_size=64)}, student=padded)["domain"]
    (score,) = teacher.score([[5, 63, 62, 6]], [1])
    torch.testing.assert_close(score.logps, reference_logps(teacher.model, [5, 63, 62, 6])[0], rtol=0, atol=1e-5)
    padded.resize_token_embeddings(len(VOCAB))  # the way out that the error names
    assert resolve({"domain": teacher_model}, student=padded)


def test_another_chat_template_of_a_loaded_teacher_is_a_warning(resolve, teacher_model, tokenizer, tmp_path, caplog):
    other = copy.deepcopy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace("'a '", "'b '")
    for name, theirs in (("same", tokenizer), ("other", other)):
        teacher_model.save_pretrained(tmp_path / name)
        theirs.save_pretrained(tmp_path / name)
        resolve({"domain": str(tmp_path / name)})
        found = [record.getMessage() for record in caplog.records if "chat template" in record.getMessage()]
        assert len(found) == (name == "other")
    assert "writes a conversation as" in found[0] and "teacher 'domain', chat template: " in found[0]


def test_a_teacher_with_a_padded_vocabulary_is_taken(resolve, model_factory):
    teacher = resolve({"domain": model_factory(1, vocab_size=64)})["domain"]
    assert len(teacher.score(TOKEN_IDS, PROMPT_LENS)) == 5


def test_a_servers_context_and_tokenizer_are_checked(resolve, start_server):
    with pytest.raises(TeacherError, match=r"takes sequences of 64 tokens, but .* is 65"):
        resolve({"general": start_server(max_model_len=64).url})
    with pytest.raises(TeacherError, match="has another tokenizer than the student"):
        resolve({"general": [start_server().url, start_server(tokenizer=other_tokenizer()).url]})


def test_servers_are_asked_before_models_are_loaded(resolve, server, tmp_path):
    server.always = (404, "Not Found")
    with pytest.raises(TeacherError, match="answered 404"):
        resolve({"domain": str(tmp_path / "nowhere"), "general": server.url})


def test_a_local_teacher_is_on_the_accelerator_only_while_it_scores(monkeypatch):
    teacher = LocalTeacher(make_model(1), "local", "cpu", 4)
    moves = []
    monkeypatch.setattr(teacher.model, "to", moves.append)
    teacher.score([[5, 6, 7]], [1])
    assert moves == []  # on the CPU there is nowhere to go
    teacher.rests_on_cpu = True
    teacher.score([[5, 6, 7]], [1])
    assert moves == [teacher.device, "cpu"]
    with pytest.raises(ValueError, match="at least one prompt token"):
        teacher.score([[5, 6, 7]], [0])
    assert moves[2:] == [teacher.device, "cpu"]  # a failed call does not leave it there


@pytest.mark.parametrize(
    ("spec", "guess"),
    [
        ("localhost:8001", r"did you mean 'http://localhost:8001'\?"),
        ("adapter-off", r"did you mean 'adapter_off'\?"),
        ("./nowhere", "there is no such folder with a model"),
    ],
)
def test_a_mistyped_teacher_is_refused_with_a_guess_of_what_was_meant(resolve, spec, guess):
    with pytest.raises(ValueError, match=rf"teacher of branch 'domain', '{spec}', cannot be loaded \({guess}\)"):
        resolve({"domain": spec})


def test_an_adapter_teacher_is_batched_as_the_student_whatever_its_probe_has_found(monkeypatch):
    """Equal weights give gaps of exactly 0, also where rows without padding would see each other (OPT)."""
    monkeypatch.setattr("camopd.packing.packing_pays", lambda model: True)
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=40, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, init_std=0.3,
    )  # fmt: skip
    student = get_peft_model(
        OPTForCausalLM(config), LoraConfig(target_modules=["q_proj"])
    ).eval()  # starts as its base
    forward = make_forward(student)
    teacher = AdapterTeacher(student, "adapter_off", forward)
    assert forward.packed
    forward.probe()
    assert not forward.packed
    own = forward.rows(TOKEN_IDS, PROMPT_LENS)
    for scores, (logps, _) in zip(teacher.score(TOKEN_IDS, PROMPT_LENS), own, strict=True):
        assert torch.equal(scores.logps, logps)


def test_an_adapter_teachers_top_k_goes_through_the_students_wrapper(lora_student):
    """There sharded weights are whole."""
    ran = []

    def run(function, *args):
        ran.append(function.__name__)
        return function(lora_student, *args)

    forward = Forward(lora_student, run, lora_student, nullcontext, 2, 0, None, "the student")
    AdapterTeacher(lora_student, "adapter_off", forward).score(TOKEN_IDS, PROMPT_LENS, top_k=3)
    assert set(ran) == {"completion_logps", "completion_top_k"}


def test_a_local_teacher_is_moved_once_per_score_and_not_for_a_probe_that_is_done(model_factory, monkeypatch):
    teacher = LocalTeacher(model_factory(0), "local", "cpu", batch_size=2)
    teacher.rests_on_cpu = True  # as on a GPU
    moves = []
    monkeypatch.setattr(teacher.model, "to", lambda device: moves.append(str(device)))
    teacher.probe()
    assert len(moves) == 2  # there and back
    for _ in range(2):
        teacher.probe()
        teacher.score(TOKEN_IDS, PROMPT_LENS)
    assert len(moves) == 6
