"""A file that is replaced is whole or as it was before."""

import os

import pytest

from camopd import atomic


def test_file_is_replaced_and_nothing_lies_beside_it(tmp_path):
    path = tmp_path / "table.md"
    for content, expected in (("a\r\nä\n", "a\r\nä\n".encode()), (b"\x00\xff", b"\x00\xff"), ("", b"")):
        atomic.write(path, content)
        assert path.read_bytes() == expected
    assert os.listdir(tmp_path) == ["table.md"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_file_that_cannot_be_replaced_is_as_it_was(call, tmp_path, monkeypatch):
    path = tmp_path / "table.md"
    path.write_text("before")

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left"):
        atomic.write(path, "after")
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["table.md"]


def test_hub_gets_nothing_of_what_is_written_beside_a_file(tmp_path, monkeypatch):
    """transformers leaves out what begins with an underscore."""
    names = []
    monkeypatch.setattr(os, "replace", lambda source, target: names.append(source.name) or os.rename(source, target))
    atomic.write(tmp_path / "README.md", "text")
    assert names[0].startswith("_README.md")
