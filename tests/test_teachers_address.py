"""URLs, folders and keys of teachers: which is which."""

import json
import os
import re
import socket
from types import SimpleNamespace

import pytest
from fake_hub import FakeHub
from hypothesis import given
from hypothesis import strategies as st
from trainers import make_trainer

from camopd.method_rules import check_values
from camopd.run import PromptArguments, named_teachers, read_settings
from camopd.surroundings import check_hub
from camopd.teachers.address import (
    base_of,
    did_you_mean,
    has_adapter,
    is_loopback,
    is_server,
    key_variables,
    name_to_show,
    names_missing_folder,
    names_missing_model,
    near_model,
    public_url,
    refuse_secrets,
    same_model,
    student_revision,
    urls_and_model,
    was_fetched,
    without_secrets,
)
from camopd.teachers.local import load_teacher_model
from camopd.teachers.vllm.plan import models_of


ONE, OTHER = "http://localhost:8001", "https://host/v1"


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        (ONE, True), (OTHER, True), ([ONE, OTHER], True), ((ONE,), True), ({"urls": ONE, "model": "m"}, True),
        ({"urls": [ONE, OTHER], "model": "m"}, True), ("localhost:8001", False), ("org/model", False), ([], False),
        ([ONE, "org/model"], False), ([[ONE]], False), ({"urls": ONE}, False), ({"urls": "m", "model": "m"}, False),
        ("HTTP://h:8001", True), (["Https://h", ONE], True),
        ({"urls": ONE, "model": "m", "more": 1}, False), (None, False), (8001, False),
    ],
)  # fmt: skip
def test_server_is_known_by_its_urls(spec, found):
    assert is_server(spec) is found


@pytest.mark.parametrize(
    ("spec", "urls", "model"),
    [
        (ONE, [ONE], None),
        ([ONE, OTHER, ONE], [ONE, OTHER], None),
        ({"urls": ONE, "model": "m"}, [ONE], "m"),
        ({"urls": [OTHER, ONE], "model": "m"}, [OTHER, ONE], "m"),
    ],
)
def test_urls_are_each_named_once_in_their_order(spec, urls, model):
    assert urls_and_model(spec) == (urls, model)


def test_model_of_the_same_folder_is_the_same(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to("model")
    monkeypatch.chdir(tmp_path)
    assert same_model("org/model", "org/model")
    assert not same_model("org/model", "model")
    assert same_model("model", str(tmp_path / "model")) and same_model("link", "./model/")
    assert not same_model("model", "model/..")


def test_folder_that_is_missing_is_told_from_a_model_of_the_hub(tmp_path, monkeypatch):
    (tmp_path / "runs" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in ("./none", "../none", "/none/such", "~/none/such", "runs/none"):
        assert names_missing_folder(name), name
    for name in ("runs/model", "./runs/model", str(tmp_path), "org/model", "gpt2"):
        assert not names_missing_folder(name), name


def test_name_that_no_path_can_have_is_none(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("./" + "x" * 300, "runs/" + "x" * 300, "~nobody-of-that-name/x"):
        assert names_missing_folder(name) and names_missing_model(name), name
        assert base_of(name) == name and not has_adapter(name) and not same_model(name, "runs")
        with pytest.raises(ValueError, match="with a '\\?', '#' or '@'"):
            refuse_secrets("general", name + "?key=secret")
    for name in ("x" * 300, "x" * 300 + "/y", "x\0"):
        assert not names_missing_model(name), name


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A working directory with models, and with folders that have none."""
    for name in ("specialised", "models/general", "gpt2-mine", "Qwen-local/Qwen3-0.6B"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "~/specialised"}')
    (tmp_path / "prompts").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("specialized", "specialised"), ("./specialized", "specialised"), ("adaptr", "adapter"), ("specialised", None),
        ("models/genral", "models/general"), ("modles/general", "models/general"), ("modls/genral", "models/general"),
        ("prompt", None), ("promtps/x", None), ("gpt2", None), ("Qwen/Qwen3-0.6B", None), ("adapter_off", None),
        ("", None), ("/no/such/folder", None), ("..", None), ("../specialized", None), ("models", None),
        ("x" * 300, None), ("x" * 300 + "/y", None), ("specialised\0", "specialised"),
    ],
)  # fmt: skip
def test_near_model_is_a_folder_with_a_model_beside_the_name(folders, name, near):
    assert near_model(name) == near
    assert did_you_mean(name) == (f" Did you mean {near!r}?" if near else "")


def test_near_folder_that_only_others_may_read_is_no_model(folders):
    (folders / "listed" / "general").mkdir(parents=True)
    modes = {"specialised": 0, "models": 0, "listed": 0o744}
    for name, mode in modes.items():
        (folders / name).chmod(mode)
    is_root = os.geteuid() == 0  # who may read all
    if is_root:
        folders.chmod(0o755)
        os.seteuid(65534)
    try:
        for name in ("specialized", "models/genral", "modls/general", "listed/genral/model"):
            assert near_model(name) is None and did_you_mean(name) == "" and not names_missing_model("specialized"), (
                name
            )
    finally:
        if is_root:
            os.seteuid(0)
        for name in modes:
            (folders / name).chmod(0o755)


def test_near_model_is_found_by_an_absolute_path(folders):
    assert near_model(str(folders / "specialized")) == str(folders / "specialised")


def test_single_word_with_a_like_beside_it_is_a_path_and_a_model_of_the_hub_is_not(folders):
    assert names_missing_model("specialized") and names_missing_model("./x") and names_missing_model("models/x")
    for name in ("specialised", "gpt2", "Qwen/Qwen3-0.6B", "modles/general", "something"):
        assert not names_missing_model(name), name


@pytest.mark.parametrize(
    ("name", "folder"),
    [("gpt2-medium", "gpt2-medium-sft"), ("distilgpt2", "distilgpt2-ft"), ("gpt2-medium-v2", "gpt2-medium")],
)
def test_folder_that_is_named_after_a_model_is_no_sign_of_a_misspelt_name(tmp_path, monkeypatch, name, folder):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert near_model(name) == folder and not names_missing_model(name)
    assert names_missing_model(f"./{name}")


@pytest.mark.parametrize("file", ["config.json", "adapter_config.json"])
def test_model_of_any_revision_in_the_cache_is_there(folders, monkeypatch, tmp_path, file):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub [1]"))
    assert names_missing_model("specialized") and not was_fetched("specialized")
    for name in ("specialized", "org/x"):
        snapshot = tmp_path / "hub [1]" / f"models--{name.replace('/', '--')}" / "snapshots" / "a1b2"
        snapshot.mkdir(parents=True)
        assert not was_fetched(name)  # a folder without files
        (snapshot / file).write_text("{}")
        assert was_fetched(name)
    assert not names_missing_model("specialized")
    assert not was_fetched("x") and not was_fetched("*/*") and not was_fetched("x" * 300) and not was_fetched("x\0")


@pytest.fixture
def hub(monkeypatch):
    """A Hub with the model `specialized`, which a test may keep from answering."""
    served = FakeHub({})
    served.models["specialized"] = {"config.json": b"{}"}
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", served.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield served
    served.close()


def test_near_name_is_used_where_the_hub_knows_it(folders, hub, monkeypatch):
    assert not names_missing_model("specialized")
    assert hub.requests == ["GET /api/models/specialized"]
    assert names_missing_model("specialsed")  # 404
    assert not names_missing_model("something") and len(hub.requests) == 2  # nothing near
    for status, missing in ((401, True), (403, False), (429, False), (500, False)):
        hub.refuse["specialized"] = (status, "")
        assert names_missing_model("specialized") is missing, status
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    assert names_missing_model("specialized") and len(hub.requests) == asked


def test_near_name_is_refused_without_a_hub_and_not_for_a_slow_one(folders, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert names_missing_model("specialized")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection, and never answers
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr("camopd.teachers.address.PATIENCE", 0.2)
        assert not names_missing_model("specialized")


def test_near_name_is_left_to_a_client_that_can_ask_nobody(folders, hub, monkeypatch):
    """It names its proxy when it has to; that it cannot be asked is no sign of a misspelt name."""

    def refuse(*_, **more):
        raise ImportError("Using SOCKS proxy, but the 'socksio' package is not installed")

    monkeypatch.setattr("huggingface_hub.get_session", lambda: SimpleNamespace(get=refuse))
    assert not names_missing_model("specialized")


def test_base_of_an_adapter_is_the_model_under_it(folders, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert base_of("adapter") == "/home/me/specialised"
    assert base_of("specialised") == "specialised" and base_of("org/model") == "org/model"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"base_model_name_or_path": "a\nb"}', r"Invalid control character .* save the adapter again"),
        (b"", "Expecting value"), (b"\xff", "'utf-8' codec"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", r"a pointer of git-lfs.*`git lfs pull`"),
        (b"[]", "what model the adapter is for: its base_model_name_or_path is None"),
        (b"{}", r"is None\. Write there the folder or the id of that model"),
        (b'{"base_model_name_or_path": ""}', "is ''"), (b'{"base_model_name_or_path": ["x"]}', r"is \['x'\]"),
    ],
)  # fmt: skip
def test_adapter_whose_config_names_no_model_is_an_error_that_names_the_file(folders, monkeypatch, content, says):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    (folders / "adapter" / "adapter_config.json").write_bytes(content)
    for ask in (base_of, lambda model: check_hub({"model_name_or_path": model})):
        with pytest.raises(ValueError, match=f"^'adapter/adapter_config.json' (cannot|does) .*{says}"):
            ask("adapter")


def test_adapter_is_known_by_its_config(tmp_path):
    assert not has_adapter(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    assert has_adapter(str(tmp_path))
    assert not has_adapter("org/model")


@pytest.mark.parametrize(
    ("host", "found"),
    [
        ("localhost", True), ("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("0.0.0.0", False), ("::", False),
        ("10.0.0.1", False), ("localhost.example.org", False), ("127.0.0.1.example.org", False), ("", False),
    ],
)  # fmt: skip
def test_loopback_is_an_address_of_this_machine_only(host, found):
    assert is_loopback(host) is found


def test_key_of_a_branch_comes_before_the_common_one():
    assert key_variables("general") == ("CAMOPD_TEACHER_API_KEY_GENERAL", "CAMOPD_TEACHER_API_KEY")
    assert key_variables("my-branch.2")[0] == "CAMOPD_TEACHER_API_KEY_MY_BRANCH_2"


SECRET = "sk-secret"
URLS = [
    f"http://host:8001/v1?api_key={SECRET}", f"http://user:{SECRET}@host:8001", f"https://{SECRET}@host/v1",
    f"http://host:8001#{SECRET}", f"HTTP://user:{SECRET}@host",
]  # fmt: skip


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://host:8001", "http://host:8001"),
        ("https://[::1]:8001/v1", "https://[::1]:8001/v1"),
        ("http://user:password@host:8001/v1?key=x#y", "http://host:8001/v1"),
        ("http://host?key=x", "http://host"),
        ("http://user:pass?word@host", "http://..."),
        ("http://host/?key=a@b", "http://..."),
        ("http://h/p@v1", "http://..."),
        ("http://user:pass/word@host", "http://..."),
        ("HTTP://user:password@host", "HTTP://host"),
    ],
)
def test_public_url_is_scheme_host_port_and_path(url, shown):
    assert public_url(url) == shown
    assert without_secrets(f"teacher at {url} and {url}") == f"teacher at {shown} and {shown}"


secrets = st.text(st.characters(codec="ascii", exclude_characters="'\"", exclude_categories=["Cc", "Zs"]), min_size=1)


@given(
    secrets.map(lambda text: f"!{text}!"),
    st.sampled_from(["http://user:{}@host", "http://host/v1?key={}", "http://host#{}"]),
)
def test_public_url_has_no_part_of_a_password_or_key(secret, form):
    shown = public_url(form.format(secret))
    assert "!" not in shown
    assert "!" not in without_secrets(repr([form.format(secret), "a"]))


@pytest.mark.parametrize("url", URLS)
def test_errors_of_a_run_show_no_secret_of_a_url(url, make_config, tmp_path, tokenizer, capsys):
    """Whatever is wrong with the teachers of a config, a file, a trainer or of `camopd serve`."""
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps([url]))
    calls = [
        lambda: make_config(teachers={"general": url, "domain": "x"}),
        lambda: make_config(teachers={"general": [url], "domain": "x"}),
        lambda: make_config(teachers=url),
        lambda: make_config(teachers='{"general": "' + url),
        lambda: named_teachers({"teachers": url}),
        lambda: named_teachers({"teachers": {"general": {"urls": url}}}),
        lambda: PromptArguments(prompts=url),
        lambda: read_settings(str(file), []),
        lambda: models_of({"general": [url, 3]}, None, []),
        lambda: models_of({"general": url}, None, []),
        lambda: make_trainer(tmp_path, tokenizer, teachers=url),
        lambda: make_trainer(tmp_path, tokenizer, teachers={"general": url, "domain": "x"}),
        lambda: make_trainer(tmp_path, tokenizer, teachers={"general": [url, 3], "domain": "x"}),
    ]
    for number, call in enumerate(calls):
        with pytest.raises((ValueError, TypeError, RuntimeError)) as raised:
            call()
        error = raised.value
        while error is not None:
            assert SECRET not in str(error), number
            error = error.__cause__ or error.__context__


@pytest.mark.parametrize("name", [f"host:8001/?api_key={SECRET}", f"user:{SECRET}@host:8001", f"user:x/{SECRET}@host"])
def test_no_error_shows_the_secrets_of_a_url_without_its_scheme(name, make_config, tmp_path, tokenizer):
    teachers = {"general": name, "domain": "x"}
    calls = [
        lambda: make_config(teachers=teachers),
        lambda: named_teachers({"teachers": teachers}),
        lambda: make_trainer(tmp_path, tokenizer, teachers=teachers),
        lambda: load_teacher_model(name, {}, "general"),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="the teacher of branch 'general' is 'host") as raised:
            call()
        error = raised.value
        while error is not None:
            assert SECRET not in str(error)
            error = error.__cause__ or error.__context__


@pytest.mark.parametrize("url", URLS)
def test_note_of_camopd_serve_shows_no_secrets(url):
    notes = []
    models_of({"general": url, "domain": "Qwen/Qwen3-8B"}, None, notes)
    assert "host" in notes[0] and SECRET not in notes[0]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("org/model", "org/model"),
        ("localhost:8001/?api_key=x", "localhost:8001/"),
        ("user:pass@host:8001", "host:8001"),
        ("user:p/a@ss@host", "host"),
        ("user:p?a#ss@host", "..."),
        ("a@b/model", "a@b/model"),
    ],
)
def test_name_to_show_has_nothing_that_may_be_a_password_or_a_key(name, shown, tmp_path, monkeypatch):
    assert name_to_show(name) == shown
    if shown != name:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match=re.escape(f"the teacher of branch 'general' is {shown!r} with a")):
            refuse_secrets("general", name)
        (tmp_path / name).mkdir(parents=True)
    refuse_secrets("general", name)  # a folder may have any name


def test_plain_url_is_taken_by_the_config(make_config):
    check_values(make_config(teachers={"general": "http://host:8001/v1", "domain": ["https://a", "https://b:1"]}))


@pytest.mark.parametrize(
    ("settings", "revision"),
    [
        ({}, None),
        ({"model_revision": "main"}, None),
        ({"model_revision": "v1"}, "v1"),
        ({"model_init_kwargs": {"revision": "v2"}}, "v2"),
        ({"model_init_kwargs": '{"revision": "v2"}'}, "v2"),
        ({"model_revision": "main", "model_init_kwargs": {"revision": "v2"}}, "v2"),
        ({"model_init_kwargs": {"revision": "main"}}, None),
        ({"model_init_kwargs": "[no, mapping"}, None),
    ],
)
def test_revision_of_the_student_is_read_from_both_settings(settings, revision):
    assert student_revision(settings) == revision
