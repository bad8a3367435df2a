"""Requests for completions, and that no answer but its own is taken for one (camopd/vllm/sampler.py)."""

import copy
import json
import math
import threading
import time

import pytest
from conftest import VOCAB, make_model
from fake_rollouts import FakeRollouts
from hypothesis import given
from hypothesis import strategies as st

from camopd.errors import RolloutError
from camopd.rollout_weights import FOLDER
from camopd.vllm.http import Fault
from camopd.vllm.sampler import Sampler, Sampling, Version, read_completion


SAMPLING = Sampling(8, frozenset({2, 5}), len(VOCAB))
PROMPT = [1, 7, 8]


@pytest.fixture
def start(tokenizer, start_server, monkeypatch):
    """Start servers that hold what they start with for that of the student."""
    monkeypatch.delenv("CAMOPD_ROLLOUT_API_KEY", raising=False)
    servers = []

    def start(**changes):
        servers.append(FakeRollouts(make_model(1), tokenizer, **changes))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def connect():
    samplers = []

    def connect(*servers, patience=20.0):
        samplers.append(Sampler([server.url for server in servers], patience))
        return samplers[-1]

    yield connect
    for sampler in samplers:
        sampler.close()


def answer_of(ids, logps=None, **changes):
    choice = {
        "finish_reason": "stop" if ids[-1:] and ids[-1] in SAMPLING.ends else "length", "token_ids": list(ids),
        "logprobs": {"token_logprobs": [-0.5] * len(ids) if logps is None else logps}, "prompt_token_ids": list(PROMPT),
    }  # fmt: skip
    return {"model": "m", "choices": [{**choice, **changes}]}


inner = st.integers(6, len(VOCAB) - 1)
whole = st.one_of(
    st.lists(inner, min_size=8, max_size=8),
    st.tuples(st.lists(inner, max_size=7), st.sampled_from([2, 5])).map(lambda found: [*found[0], found[1]]),
)
logprob = st.one_of(st.none(), st.floats(-100, 0))


@given(whole, st.data())
def test_answer_is_read_as_it_is(ids, data):
    logps = data.draw(st.lists(logprob, min_size=len(ids), max_size=len(ids)))
    found = read_completion(answer_of(ids, logps), "m", PROMPT, SAMPLING)
    assert found.token_ids == ids and len(found.logps) == len(ids)
    assert all(
        (math.isnan(one) and other is None) or one == other for one, other in zip(found.logps, logps, strict=True)
    )


BAD = {
    "other model": lambda a: a.update(model="x"),
    "two choices": lambda a: a["choices"].append(a["choices"][0]),
    "no token ids": lambda a: a["choices"][0].update(token_ids=None),
    "no log-probs": lambda a: a["choices"][0].update(logprobs=None),
    "one log-prob too few": lambda a: a["choices"][0]["logprobs"]["token_logprobs"].pop(),
    "a log-prob that is text": lambda a: a["choices"][0]["logprobs"]["token_logprobs"].__setitem__(0, "-1"),
    "a log-prob that is true": lambda a: a["choices"][0]["logprobs"]["token_logprobs"].__setitem__(0, True),
    "infinite": lambda a: a["choices"][0]["logprobs"]["token_logprobs"].__setitem__(0, -math.inf),
    "another prompt": lambda a: a["choices"][0].update(prompt_token_ids=[1, 7]),
    "unknown token": lambda a: a["choices"][0]["token_ids"].__setitem__(0, len(VOCAB)),
    "negative token": lambda a: a["choices"][0]["token_ids"].__setitem__(0, -1),
    "token that is true": lambda a: a["choices"][0]["token_ids"].__setitem__(0, True),
}


@given(whole, st.sampled_from(sorted(BAD)))
def test_answer_that_is_not_the_one_to_the_request_is_refused(ids, which):
    answer = copy.deepcopy(answer_of(ids))
    BAD[which](answer)
    with pytest.raises(ValueError, match=r"\w"):
        read_completion(answer, "m", PROMPT, SAMPLING)


@given(st.lists(inner, max_size=20), st.sampled_from([None, 2, 5]), st.lists(inner, max_size=3))
def test_completion_ends_where_it_was_asked_to(before, end, behind):
    """Each list of tokens is right or wrong by the plain rule: at the first end, or at the limit."""
    ids = [*before, *([] if end is None else [end, *behind])]
    first = next((place for place, token in enumerate(ids) if token in SAMPLING.ends), None)
    right = len(ids) == (8 if first is None else first + 1) and len(ids) <= 8
    answer = answer_of(ids)
    if right:
        assert read_completion(answer, "m", PROMPT, SAMPLING).token_ids == ids
    else:
        with pytest.raises(ValueError, match=r"wrote|ended"):
            read_completion(answer, "m", PROMPT, SAMPLING)


def test_completion_that_the_server_gave_up_is_a_fault():
    with pytest.raises(Fault, match="abort"):
        read_completion(answer_of([6], finish_reason="abort"), "m", PROMPT, SAMPLING)


def test_end_of_the_servers_own_names_the_flag(start, connect):
    server = start()

    def end_early(answer):
        choice = answer["choices"][0]
        choice["token_ids"], choice["finish_reason"] = [6], "stop"
        choice["logprobs"]["token_logprobs"] = [-1.0]
        return answer

    server.edit_answer = end_early
    sampler = connect(server)
    with pytest.raises(
        RolloutError, match=rf"at {server.url} ended a completion after 1 of 8 .*--generation-config vllm and a larger"
    ):
        sampler.submit(PROMPT, 1, SAMPLING).result()


@pytest.mark.parametrize("answer", [(500, "oops"), (429, "slow down"), None, "cut", (200, '{"choi')])
def test_fault_is_tried_on_another_server_with_the_same_seed(start, connect, answer):
    one, two = start(), start()
    sampler = connect(one, two)
    undisturbed = sampler.submit(PROMPT, 5, SAMPLING).result()
    assert undisturbed.url in (one.url, two.url)
    for server in (one, two):
        server.requests.clear()
        server.answers.append(answer)
    assert sampler.submit(PROMPT, 5, SAMPLING).result()[:2] == undisturbed[:2]  # but for which server it was
    assert {body["seed"] for body in one.written + two.written} == {5} and len(one.written + two.written) == 3


@pytest.mark.parametrize(
    "answer", ["[]", "{}", '{"choices": []}', '{"choices": [null]}', '{"choices": [{}]}', '"x"', "null", "<html>"]
)
def test_answer_of_a_stranger_is_told_as_one(start, connect, monkeypatch, answer):
    monkeypatch.setattr("camopd.vllm.limits.ATTEMPTS", 1)
    server = start()
    sampler = connect(server)
    server.answers.append((200, answer))
    with pytest.raises(RolloutError, match=rf"rollout server .*{server.url}"):
        sampler.submit(PROMPT, 1, SAMPLING).result()


def test_server_that_refuses_a_request_is_named_with_its_words(start, connect):
    server = start()
    sampler = connect(server)
    server.answers.append((400, "logprobs are off"))
    with pytest.raises(RolloutError, match=rf"the rollout server at {server.url} answered 400: logprobs are off"):
        sampler.submit(PROMPT, 1, SAMPLING).result()


def test_key_is_sent_and_never_shown(start, connect, monkeypatch):
    monkeypatch.setenv("CAMOPD_ROLLOUT_API_KEY", "sk-secret")
    monkeypatch.setenv("CAMOPD_TEACHER_API_KEY", "sk-other")
    server = start()
    sampler = connect(server)
    sampler.submit(PROMPT, 1, SAMPLING).result()
    assert {headers["Authorization"] for _, headers, _ in server.requests} == {"Bearer sk-secret"}
    server.answers.append((401, "not sk-secret"))
    with pytest.raises(RolloutError, match=r"401: not \*\*\* Set CAMOPD_ROLLOUT_API_KEY to") as raised:
        sampler.submit(PROMPT, 1, SAMPLING).result()
    assert "sk-" not in str(raised.value)


def test_weights_are_kept_from_a_server_that_comes_back_while_new_ones_are_given(start, connect, tmp_path):
    """Those of before would otherwise arrive behind the new ones."""
    from safetensors.torch import save_file

    def version(name):
        folder = tmp_path / FOLDER / name
        folder.mkdir(parents=True)
        save_file({k: v.clone() for k, v in make_model(1).state_dict().items()}, folder / "model.safetensors")
        return Version(name, folder, is_adapter=False)

    server = start()
    sampler = connect(server)
    old, new = version("old"), version("new")
    sampler.hold()
    sampler.adopt(old, sampler.give(old).result())
    sampler.begin().result()  # it has them
    assert server.loads == [old.folder]
    server.instance = "another"  # it was started again
    sampler.hold()
    back = sampler.begin()
    holders = sampler.give(new).result()
    assert not back.done()
    sampler.adopt(new, holders)
    back.result()
    assert server.loads == [old.folder, new.folder]
    assert holders == {server.url: "another"}


@pytest.mark.parametrize("slow", [False, True])
def test_server_that_was_replaced_while_it_was_idle_gets_the_weights_before_it_writes(
    slow, start, connect, tmp_path, monkeypatch
):
    """In the middle of a batch, when another one's requests come to it; and a server that hangs is left in seconds."""
    from safetensors.torch import save_file

    save_file({k: v.clone() for k, v in make_model(1).state_dict().items()}, tmp_path / "model.safetensors")
    server = start()
    sampler = connect(server)
    version = Version("one", tmp_path, is_adapter=False)
    sampler.hold()
    sampler.adopt(version, sampler.give(version).result())
    sampler.begin().result()
    expected = sampler.submit(PROMPT, 3, SAMPLING).result()
    server.instance, server.model = "another", make_model(9)
    answer, hangs, written, left = server.answer, [slow], threading.Event(), []

    def hang(path, body):
        if path.startswith("/server_info") and any(hangs):
            hangs.clear()
            left.append(written.wait(60))
        return answer(path, body)

    monkeypatch.setattr("camopd.vllm.limits.STATE_SECONDS", 1.0)
    monkeypatch.setattr(server, "answer", hang)
    assert sampler.submit(PROMPT, 3, SAMPLING).result() == expected
    assert len(server.loads) == 2
    written.set()
    server.close()
    assert all(left)  # nobody has waited for it


@pytest.mark.parametrize(("device", "tied"), [("cpu", True), ("cpu", False), ("cuda", True)])
def test_head_that_is_the_embeddings_is_not_given_to_vllm_on_a_cpu(device, tied, start, connect, tmp_path):
    """Which would go on with the old one: tests/test_vllm_rollouts.py has it from a real server."""
    from safetensors.torch import save_file

    save_file({k: v.clone() for k, v in make_model(1).state_dict().items()}, tmp_path / "model.safetensors")
    server = start()
    server.device = device
    sampler = connect(server)
    sampler.hold()
    version = Version("one", tmp_path, is_adapter=False, ties_head=tied)
    if device == "cpu" and tied:
        with pytest.raises(RolloutError, match=rf"{server.url}.*tie_word_embeddings.*use_peft"):
            sampler.give(version).result()
        sampler.release()
        assert not server.loads
    else:
        sampler.adopt(version, sampler.give(version).result())
        assert server.loads == [tmp_path]


def test_prefix_cache_that_is_not_reset_keeps_the_server_out(start, connect, tmp_path, monkeypatch):
    server = start()
    sampler = connect(server)
    answer = server.answer
    monkeypatch.setattr(server, "reload", lambda folder: (200, "{}"))
    refused = (200, json.dumps({"success": False}))
    monkeypatch.setattr(
        server, "answer", lambda path, body: refused if path.startswith("/reset_prefix_cache") else answer(path, body)
    )
    sampler.hold()
    with pytest.raises(RolloutError, match="did not reset its prefix cache"):
        sampler.give(Version("one", tmp_path, is_adapter=False)).result()
    sampler.release()


def test_server_that_writes_for_another_rank_takes_the_weights_again(start, connect, tmp_path):
    """It was started again, each rank gives it the weights that it lacks, and the first has it write by then."""
    from safetensors.torch import save_file

    save_file({k: v.clone() for k, v in make_model(1).state_dict().items()}, tmp_path / "model.safetensors")
    server, version = start(), Version("one", tmp_path, is_adapter=False)
    first, second = connect(server), connect(server, patience=2.0)
    for sampler in (first, second):
        sampler.hold()
        sampler.adopt(version, sampler.give(version).result())
    server.instance = "another"
    first.begin().result()
    free, held = threading.Event(), [True]
    server.before = lambda: held and held.pop() and free.wait(60)
    written = first.submit(PROMPT, 3, SAMPLING)
    while not server.writing:
        time.sleep(0.01)
    second.begin().result()
    found = second.submit(PROMPT, 3, SAMPLING).result()
    assert not written.done() and len(server.loads) == 4
    free.set()
    assert found == written.result()


def test_new_weights_are_not_given_to_a_server_that_writes_for_somebody_else(start, connect, tmp_path):
    """Who else it is would go on by them unseen."""
    from safetensors.torch import save_file

    save_file({k: v.clone() for k, v in make_model(1).state_dict().items()}, tmp_path / "model.safetensors")
    server = start()
    sampler = connect(server)
    server.writing.append(1)
    sampler.hold()
    with pytest.raises(RolloutError, match="did not reset its prefix cache"):
        sampler.give(Version("one", tmp_path, is_adapter=False)).result()
    sampler.release()


def test_old_adapter_serves_what_was_asked_for_with_it(start, connect, tmp_path):
    """One version behind, while the next is given: completions under way are those of their own weights."""
    import torch
    from peft import LoraConfig, get_peft_model

    def version(name, seed):
        config, model = (
            LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj"], init_lora_weights=False),
            make_model(1),
        )
        torch.manual_seed(seed)
        get_peft_model(model, config).save_pretrained(tmp_path / name)
        return Version(name, tmp_path / name, is_adapter=True)

    def give(version):
        sampler.hold()
        sampler.adopt(version, sampler.give(version).result())

    server = start()
    sampler = connect(server)
    give(version("one", 1))
    wanted = sampler.submit(PROMPT, 5, SAMPLING).result()
    gate = threading.Event()
    server.before = gate.wait
    waiting = sampler.submit(PROMPT, 5, SAMPLING)
    give(version("two", 2))
    gate.set()
    assert waiting.result() == wanted != sampler.submit(PROMPT, 5, SAMPLING).result()
    server.adapters.clear()  # it was started again
    assert sampler.submit(PROMPT, 5, SAMPLING).result() is not None
    assert [body["model"] for body in server.written] == ["one", "one", "two", "two", "two"]
