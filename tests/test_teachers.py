"""Teachers: all of them must give the plain log-softmax of their model, or say in words why they cannot.

The server is a small one of our own on localhost that speaks vLLM's schema and scores with a real tiny model, so that
its numbers can be compared with those of an in-process teacher. It misbehaves on demand.
"""

import copy
import json
import threading
from collections import deque
from contextlib import nullcontext, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import VOCAB, make_model
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from camopd.errors import CaMOPDError, TeacherError
from camopd.logprobs import completion_logps
from camopd.teachers import (
    AdapterOffTeacher,
    LocalTeacher,
    ServerTeacher,
    Teacher,
    TokenScores,
    resolve_teachers,
)


# Prompt + completion of each row; lengths differ, row 3 has no completion, row 4 a prompt of one token.
TOKEN_IDS = [[5, 9, 12, 30, 7, 8], [6, 6, 20, 21, 22, 23, 24, 25, 2], [11, 4, 33], [14, 15], [17, 18, 19]]
PROMPT_LENS = [2, 4, 1, 2, 1]


def reference_logps(model, ids):
    """Log-probs of every token but the first, and of the whole vocabulary there: (L - 1,), (L - 1, V)."""
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(dim=-1)
    return logps.gather(1, torch.tensor(ids[1:])[:, None])[:, 0], logps


class FakeVLLM:
    """A vLLM server with a tiny model. What it is asked lies in `requests`; the other attributes make it misbehave."""

    def __init__(self, model, tokenizer, name="tiny-teacher", max_model_len=256):
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.max_model_len = max_model_len
        self.requests = []  # (path, headers, body)
        self.answers = deque()  # (status, text) for the next scoring requests instead of scores; None drops the line
        self.always = None  # (status, text) for every request
        self.edit = lambda entries, body: entries  # changes prompt_logprobs
        self.before = lambda: None  # runs before a scoring request is answered
        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"fake": self}))
        self.url = f"http://127.0.0.1:{self.httpd.server_port}"
        threading.Thread(target=self.httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self):
        self.httpd.shutdown()
        self.httpd.server_close()

    @property
    def scored(self):
        """Bodies of the scoring requests."""
        return [body for path, _, body in self.requests if path == "/v1/completions"]

    def answer(self, path, body):
        if self.always is not None:
            return self.always
        if path == "/v1/models":
            return 200, json.dumps({"data": [{"id": self.name, "max_model_len": self.max_model_len}]})
        if body is None or body["model"] != self.name:
            return 404, json.dumps({"error": {"message": f"The model `{body and body['model']}` does not exist."}})
        if path == "/tokenize":
            ids = self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
            ids = [1, *ids] if body.get("add_special_tokens", True) else ids
            return 200, json.dumps({"tokens": ids, "count": len(ids), "max_model_len": self.max_model_len})
        if path != "/v1/completions":
            return 404, json.dumps({"detail": "Not Found"})
        self.before()
        with suppress(IndexError):
            return self.answers.popleft()
        ids = body["prompt"]
        if len(ids) + body["max_tokens"] > self.max_model_len:
            return 400, json.dumps({"error": {"message": "the prompt is too long"}})
        entries = [None]  # the first token has no predecessor
        for token, logps in zip(ids[1:], reference_logps(self.model, ids)[1], strict=True):
            order = logps.argsort(descending=True)
            entry = {}
            for place in [int((order == token).nonzero()), *range(body["prompt_logprobs"])]:  # the token itself first
                candidate = int(order[place])
                entry[str(candidate)] = {
                    "logprob": float(logps[candidate]),
                    "rank": place + 1,
                    "decoded_token": VOCAB[candidate],
                }
            entries.append(entry)
        return 200, json.dumps({"choices": [{"text": "x", "prompt_logprobs": self.edit(entries, body)}]})


class _Handler(BaseHTTPRequestHandler):
    fake: FakeVLLM
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.reply(None)

    def do_POST(self):
        self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def reply(self, body):
        self.fake.requests.append((self.path, dict(self.headers), body))
        answer = self.fake.answer(self.path, body)
        if answer is None:  # drop the line
            self.close_connection = True
            return
        status, text = answer
        payload = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *args):
        pass


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.delenv("CAMOPD_TEACHER_API_KEY", raising=False)
    monkeypatch.setattr("camopd.teachers.server.wait_exponential_jitter", lambda *_: lambda _: 0.0)


@pytest.fixture
def teacher_model(model_factory):
    return model_factory(1)


@pytest.fixture
def start_server(teacher_model, tokenizer):
    servers = []

    def start(**changes):
        servers.append(FakeVLLM(**{"model": teacher_model, "tokenizer": tokenizer, **changes}))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def server(start_server):
    return start_server()


@pytest.fixture
def local_scores(teacher_model):
    """What the server must answer."""

    def scores(top_k=0):
        return LocalTeacher(teacher_model, "local", "cpu", batch_size=2).score(TOKEN_IDS, PROMPT_LENS, top_k)

    return scores


def assert_same_scores(ours, expected, atol=1e-5):
    assert len(ours) == len(expected)
    for score, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(score.logps, other.logps, rtol=0, atol=atol)
        assert (score.top_ids is None) == (other.top_ids is None)
        if other.top_ids is not None:
            torch.testing.assert_close(score.top_ids, other.top_ids)
            torch.testing.assert_close(score.top_logps, other.top_logps, rtol=0, atol=atol)


# --- ServerTeacher: the numbers ----------------------------------------------------------------------------------


def test_server_scores_equal_those_of_the_same_model_in_process(server, local_scores):
    teacher = ServerTeacher([server.url], "general")
    scores = teacher.score(TOKEN_IDS, PROMPT_LENS)
    assert_same_scores(scores, local_scores())
    assert [score.logps.dtype for score in scores] == [torch.float32] * 5
    assert isinstance(teacher, Teacher)
    assert teacher.name == "tiny-teacher"


def test_server_top_k_equals_that_of_the_same_model_in_process(server, local_scores):
    scores = ServerTeacher([server.url], "general").score(TOKEN_IDS, PROMPT_LENS, top_k=3)
    assert_same_scores(scores, local_scores(top_k=3))
    assert scores[0].top_ids.shape == scores[0].top_logps.shape == (4, 3)


@pytest.mark.parametrize("top_k", [0, 3])
def test_an_empty_completion_is_answered_without_asking_the_server(server, top_k):
    (score,) = ServerTeacher([server.url], "general").score([[14, 15]], [2], top_k)
    assert score.logps.shape == (0,)
    assert score.logps.dtype == torch.float32
    if top_k:
        assert score.top_ids.shape == score.top_logps.shape == (0, top_k)
        assert score.top_ids.dtype == torch.long
    assert server.scored == []


def test_no_rows_are_no_scores(server):
    assert ServerTeacher([server.url], "general").score([], []) == []


def test_the_request_asks_for_no_more_than_the_score_needs(server):
    ServerTeacher([server.url], "general").score([TOKEN_IDS[0]], [2])
    (body,) = server.scored
    assert body == {
        "model": "tiny-teacher",
        "prompt": TOKEN_IDS[0],
        "max_tokens": 1,
        "temperature": 1.0,
        "prompt_logprobs": 0,
    }


def test_a_url_may_end_in_a_slash_or_v1(server, local_scores):
    for end in ("/", "/v1", "/v1/"):
        assert_same_scores(ServerTeacher([server.url + end], "general").score(TOKEN_IDS, PROMPT_LENS), local_scores())


def test_replicas_share_the_rows_and_answer_in_their_order(start_server, local_scores):
    replicas = [start_server(), start_server()]
    teacher = ServerTeacher([replica.url for replica in replicas], "general")
    for _ in range(2):
        assert_same_scores(teacher.score(TOKEN_IDS, PROMPT_LENS), local_scores())
    # Rows 0, 2, 4 go to the first replica; row 1 to the second, and the empty row 3 nowhere.
    asked = [sorted(body["prompt"] for body in replica.scored) for replica in replicas]
    assert asked == [sorted([TOKEN_IDS[row] for row in (0, 2, 4)] * 2), [TOKEN_IDS[1]] * 2]


def test_rows_are_asked_for_at_the_same_time(server, local_scores):
    together = threading.Barrier(4, timeout=10)  # four rows have completions; a fifth request would wait in vain
    server.before = together.wait
    assert_same_scores(ServerTeacher([server.url], "general").score(TOKEN_IDS, PROMPT_LENS), local_scores())


# --- ServerTeacher: what may pass --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answers",
    [[(500, "oops"), (500, "oops")], [(429, "slow down")], [(503, "loading")], [None]],
    ids=["500 twice", "429", "503", "dropped connection"],
)
def test_a_fault_that_passes_changes_no_number(server, local_scores, answers):
    teacher = ServerTeacher([server.url], "general")
    server.answers.extend(answers)
    assert_same_scores(teacher.score(TOKEN_IDS, PROMPT_LENS), local_scores())
    assert len(server.scored) == 4 + len(answers)


def test_a_time_out_is_tried_again(server, local_scores, monkeypatch):
    monkeypatch.setattr("camopd.teachers.server.SCORE_SECONDS", 1.0)
    teacher = ServerTeacher([server.url], "general")
    answered = threading.Event()
    server.before = lambda: answered.wait(10) if len(server.scored) == 1 else None  # the first request hangs
    scores = teacher.score(TOKEN_IDS[:1], PROMPT_LENS[:1])
    answered.set()
    assert_same_scores(scores, local_scores()[:1])
    assert len(server.scored) == 2


def test_a_fault_that_stays_is_a_teacher_error_with_the_servers_own_words(server, monkeypatch):
    monkeypatch.setattr("camopd.teachers.server.ATTEMPTS", 3)
    teacher = ServerTeacher([server.url], "general")
    server.answers.extend([(500, "CUDA out of memory")] * 3)
    with pytest.raises(TeacherError, match=rf"teacher 'general' at {server.url}.* answered 500: CUDA out of memory"):
        teacher.score(TOKEN_IDS[:1], PROMPT_LENS[:1])
    assert len(server.scored) == 3


def test_nothing_listening_is_a_teacher_error_that_names_the_url(server, monkeypatch):
    monkeypatch.setattr("camopd.teachers.server.ATTEMPTS", 2)
    server.close()  # now the port is free
    with pytest.raises(
        TeacherError,
        match=rf"teacher 'domain' at {server.url}.* does not answer \(ConnectError.*after 2 attempts.*vllm",
    ):
        ServerTeacher([server.url], "domain")


def test_a_teacher_error_is_a_camopd_error():
    assert issubclass(TeacherError, CaMOPDError)


# --- ServerTeacher: what is final --------------------------------------------------------------------------------


def test_a_400_fails_at_once_with_the_servers_own_words(server):
    teacher = ServerTeacher([server.url], "general")
    server.answers.append((400, '{"error": {"message": "prompt_logprobs is disabled here"}}'))
    with pytest.raises(
        TeacherError, match=rf"'general' at {server.url}.* answered 400: .*prompt_logprobs is disabled"
    ):
        teacher.score(TOKEN_IDS[:1], PROMPT_LENS[:1])
    assert len(server.scored) == 1


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_gets_the_hint_where_to_set_it(server, status):
    server.always = (status, '{"error": "Unauthorized"}')
    with pytest.raises(TeacherError, match=rf"answered {status}: .*Unauthorized.* Set CAMOPD_TEACHER_API_KEY"):
        ServerTeacher([server.url], "general")
    assert len(server.requests) == 1


def test_other_refusals_get_no_hint_about_the_key(server):
    server.always = (404, "Not Found")
    with pytest.raises(TeacherError, match="answered 404: Not Found") as raised:
        ServerTeacher([server.url], "general")
    assert "API_KEY" not in str(raised.value)


def test_the_key_is_sent_as_a_bearer_token_with_every_request(server, tokenizer, monkeypatch):
    monkeypatch.setenv("CAMOPD_TEACHER_API_KEY", "sk-secret")
    teacher = ServerTeacher([server.url], "general")
    teacher.check_tokenizer(tokenizer)
    teacher.score(TOKEN_IDS, PROMPT_LENS)
    assert {path for path, _, _ in server.requests} == {"/v1/models", "/tokenize", "/v1/completions"}
    assert {headers.get("Authorization") for _, headers, _ in server.requests} == {"Bearer sk-secret"}


def test_without_a_key_no_authorization_is_sent(server):
    ServerTeacher([server.url], "general")
    assert "Authorization" not in server.requests[0][1]


@pytest.mark.parametrize("fault", ["401", "500", "not JSON", "nothing listening", "line break in the key"])
def test_the_key_never_appears_in_an_error(server, monkeypatch, fault):
    monkeypatch.setattr("camopd.teachers.server.ATTEMPTS", 2)
    monkeypatch.setenv("CAMOPD_TEACHER_API_KEY", "sk-secret\n" if fault.startswith("line") else "sk-secret")
    if fault == "nothing listening":
        server.close()
    server.always = (int(fault), "refused") if fault.isdigit() else (200, "<html>")
    with pytest.raises((TeacherError, ValueError)) as raised:
        ServerTeacher([server.url], "general")
    error = raised.value
    while error is not None:  # a traceback prints the causes too
        assert "sk-secret" not in str(error)
        error = error.__cause__ or error.__context__


def test_an_answer_that_is_not_json_is_refused_with_its_beginning(server):
    teacher = ServerTeacher([server.url], "general")
    server.answers.append((200, "<html>Welcome to nginx</html>"))
    with pytest.raises(
        TeacherError, match=r"did not answer in JSON: '<html>Welcome to nginx.*Is the URL that of a vLLM"
    ):
        teacher.score(TOKEN_IDS[:1], PROMPT_LENS[:1])
    assert len(server.scored) == 1


def test_an_answer_in_json_that_is_no_list_of_models_is_refused(server):
    server.always = (200, '{"status": "ok"}')
    with pytest.raises(TeacherError, match=f"teacher 'general' at {server.url}"):
        ServerTeacher([server.url], "general")


def test_one_log_prob_too_few_is_refused_with_both_counts(server):
    teacher = ServerTeacher([server.url], "general")
    server.edit = lambda entries, body: entries[:-1]
    with pytest.raises(TeacherError, match=rf"'general' at {server.url} scored 5 of 6 tokens. Is this a vLLM server"):
        teacher.score(TOKEN_IDS[:1], PROMPT_LENS[:1])


def test_a_server_that_ignores_prompt_logprobs_is_refused(server):
    teacher = ServerTeacher([server.url], "general")
    server.edit = lambda entries, body: None
    with pytest.raises(TeacherError, match=r"scored 0 of 6 tokens.*Others ignore prompt_logprobs"):
        teacher.score(TOKEN_IDS[:1], PROMPT_LENS[:1])


def lose_token(entries, ids):
    """The third token of the prompt + completion has no entry of its own."""
    del entries[2][str(ids[2])]


def make_null(entries, ids):
    """NaN, which JSON cannot say."""
    entries[2][str(ids[2])]["logprob"] = None


@pytest.mark.parametrize("top_k", [0, 2])
@pytest.mark.parametrize("damage", [lose_token, make_null])
def test_missing_and_null_log_probs_are_refused_with_rows_and_count(server, damage, top_k):
    teacher = ServerTeacher([server.url], "general")

    def edit(entries, body):
        if body["prompt"] in (TOKEN_IDS[2], TOKEN_IDS[4]):
            damage(entries, body["prompt"])
        return entries

    server.edit = edit
    with pytest.raises(
        TeacherError,
        match=r"'general' \(tiny-teacher\) answered 2 missing or non-finite log-probs in rows \[2, 4\] of 5",
    ):
        teacher.score(TOKEN_IDS, PROMPT_LENS, top_k)


def test_a_null_log_prob_among_the_top_k_is_refused_with_the_row(server):
    teacher = ServerTeacher([server.url], "general")

    def edit(entries, body):
        if body["prompt"] == TOKEN_IDS[2]:
            best = min(entries[2].values(), key=lambda value: value["rank"])
            best["logprob"] = None
        return entries

    server.edit = edit
    with pytest.raises(TeacherError, match=r"missing or non-finite log-probs in rows \[2\] of 5"):
        teacher.score(TOKEN_IDS, PROMPT_LENS, top_k=2)


def test_a_null_log_prob_in_the_prompt_does_not_matter(server, local_scores):
    teacher = ServerTeacher([server.url], "general")

    def edit(entries, body):
        if body["prompt"] == TOKEN_IDS[1]:  # 4 prompt tokens
            make_null(entries, body["prompt"])
        return entries

    server.edit = edit
    assert_same_scores(teacher.score(TOKEN_IDS, PROMPT_LENS), local_scores())


def test_replicas_with_different_models_are_refused_with_who_serves_what(start_server):
    first, second = start_server(), start_server(name="another-model")
    with pytest.raises(
        TeacherError,
        match=f"replicas of teacher 'general' serve different models: {first.url} serves 'tiny-teacher', "
        f"{second.url} serves 'another-model'",
    ):
        ServerTeacher([first.url, second.url], "general")


def test_a_context_without_room_for_the_token_vllm_generates_is_refused(start_server):
    teacher = ServerTeacher([start_server(max_model_len=101).url, start_server(max_model_len=200).url], "general")
    teacher.check_context(100)  # the shortest replica counts: 100 + 1 fit into 101
    with pytest.raises(
        TeacherError,
        match=r"takes sequences of 101 tokens, but max_prompt_length \+ max_completion_length \+ 1 is 102\. Start it "
        "with --max-model-len 102 or lower max_completion_length",
    ):
        teacher.check_context(101)


def test_a_server_that_tells_no_context_is_taken(start_server):
    ServerTeacher([start_server(max_model_len=None).url], "general").check_context(10**6)


def other_tokenizer():
    """The same tokens with other ids: the letters are turned round."""
    vocab = [*VOCAB[:4], *VOCAB[4:30][::-1], *VOCAB[30:]]
    backend = Tokenizer(models.WordLevel({token: index for index, token in enumerate(vocab)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(pattern="", behavior="isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def test_a_server_with_another_tokenizer_is_refused_with_text_and_ids(start_server, tokenizer):
    same, other = start_server(), start_server(tokenizer=other_tokenizer())
    ServerTeacher([same.url], "general").check_tokenizer(tokenizer)
    with pytest.raises(
        TeacherError,
        match=rf"'general' at {other.url} has another tokenizer than the student: '.+' is \[.*\] there and \[",
    ):
        ServerTeacher([same.url, other.url], "general").check_tokenizer(tokenizer)  # every replica is asked


# --- LocalTeacher ------------------------------------------------------------------------------------------------


def test_local_scores_equal_a_plain_log_softmax(teacher_model):
    scores = LocalTeacher(teacher_model, "local", "cpu", batch_size=8).score(TOKEN_IDS, PROMPT_LENS, top_k=3)
    for score, ids, prompt_len in zip(scores, TOKEN_IDS, PROMPT_LENS, strict=True):
        sampled, everything = (logps[prompt_len - 1 :] for logps in reference_logps(teacher_model, ids))
        torch.testing.assert_close(score.logps, sampled, rtol=0, atol=1e-5)
        top = everything.topk(3, dim=-1)
        torch.testing.assert_close(score.top_ids, top.indices)
        torch.testing.assert_close(score.top_logps, top.values, rtol=0, atol=1e-5)
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


# --- AdapterOffTeacher -------------------------------------------------------------------------------------------


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
    return lambda ids, lens: completion_logps(student, ids, lens, pad_token_id=0)


def adapter_off(student):
    return AdapterOffTeacher(student, student_forward(student), batch_size=2)


def test_adapter_off_scores_equal_those_of_the_base_model(lora_student, model_factory):
    base = LocalTeacher(model_factory(0), "base", "cpu", batch_size=2)
    expected = base.score(TOKEN_IDS, PROMPT_LENS, top_k=3)
    lora_student.train()  # dropout must not disturb the scores
    assert_same_scores(adapter_off(lora_student).score(TOKEN_IDS, PROMPT_LENS, top_k=3), expected, atol=1e-6)
    lora_student.eval()
    with torch.no_grad():
        with_adapter, _ = student_forward(lora_student)(TOKEN_IDS[:1], PROMPT_LENS[:1])
    assert (with_adapter[0] - expected[0].logps).abs().min() > 1e-3  # the adapter is no zero


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


def test_adapter_off_puts_everything_back_when_the_forward_fails(lora_student):
    def fails(ids, lens):
        raise torch.OutOfMemoryError("too long")

    lora_student.train()
    with pytest.raises(torch.OutOfMemoryError):
        AdapterOffTeacher(lora_student, fails, batch_size=2).score(TOKEN_IDS, PROMPT_LENS)
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
            teachers,
            student=student,
            student_forward=student_forward(student),
            tokenizer=tokenizer,
            max_tokens=max_tokens,
            device=torch.device("cpu"),
            autocast=nullcontext,
            batch_size=2,
            init_kwargs={"dtype": "float32", **init_kwargs},
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
    assert isinstance(teachers["domain"], AdapterOffTeacher)


def test_the_order_of_the_branches_is_kept(resolve, server):
    assert list(resolve({"own": CountingTeacher(), "general": server.url})) == ["own", "general"]


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
            ValueError, match="teacher of branch 'domain' knows 42 tokens and the student's tokenizer has 43"
        ):
            resolve({"domain": spec})


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
