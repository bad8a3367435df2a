"""URLs, folders and keys of teachers: which is which."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trainers import make_trainer

from camopd.method_rules import check_values
from camopd.run import PromptArguments, named_teachers, read_settings
from camopd.teachers.address import (
    has_adapter,
    is_loopback,
    is_server,
    key_variables,
    names_missing_folder,
    public_url,
    same_model,
    urls_and_model,
    without_secrets,
)
from camopd.teachers.vllm.plan import models_of


ONE, OTHER = "http://localhost:8001", "https://host/v1"


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        (ONE, True), (OTHER, True), ([ONE, OTHER], True), ((ONE,), True), ({"urls": ONE, "model": "m"}, True),
        ({"urls": [ONE, OTHER], "model": "m"}, True), ("localhost:8001", False), ("org/model", False), ([], False),
        ([ONE, "org/model"], False), ([[ONE]], False), ({"urls": ONE}, False), ({"urls": "m", "model": "m"}, False),
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
    f"http://host:8001#{SECRET}",
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
        lambda: models_of({"general": [url, 3]}, []),
        lambda: models_of({"general": url}, []),
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


@pytest.mark.parametrize("url", URLS)
def test_note_of_camopd_serve_shows_no_secrets(url):
    notes = []
    models_of({"general": url, "domain": "Qwen/Qwen3-8B"}, notes)
    assert "host" in notes[0] and SECRET not in notes[0]


def test_plain_url_is_taken_by_the_config(make_config):
    check_values(make_config(teachers={"general": "http://host:8001/v1", "domain": ["https://a", "https://b:1"]}))
