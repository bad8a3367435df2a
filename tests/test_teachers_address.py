"""URLs, folders and keys of teachers: which is which."""

import pytest

from camopd.teachers.address import (
    has_adapter,
    is_loopback,
    is_server,
    key_variables,
    names_missing_folder,
    same_model,
    urls_and_model,
)


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
