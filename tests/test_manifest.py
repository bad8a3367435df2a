"""Whether a folder is a whole checkpoint, and how one is put in its place."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from camopd import manifest


FILES = {"weights.bin": b"0123456789" * 50, "state.json": b"{}", "inner/shard.bin": b"", "rng_state.pth": b"abc"}


def make_checkpoint(folder: Path, files=FILES, **facts) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    manifest.write(folder, manifest.entries(folder, manifest.files_in(folder), flush=True), **facts)
    return folder


def test_manifest_lists_every_file_and_finds_nothing_wrong(tmp_path):
    folder = make_checkpoint(tmp_path / "checkpoint-1", step=1)
    found = manifest.read(folder)
    assert set(found["files"]) == set(FILES) and found["step"] == 1
    assert {name: entry["size"] for name, entry in found["files"].items()} == {n: len(c) for n, c in FILES.items()}
    assert manifest.fault(folder) is None


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_manifest_finds_any_change_of_any_file(tmp_path_factory, data):
    """A file that is cut, longer, changed in one bit, or gone: one of the processes that share the reading sees it."""
    folder = make_checkpoint(tmp_path_factory.mktemp("any") / "checkpoint-1")
    name = data.draw(st.sampled_from(sorted(FILES)))
    content = FILES[name]
    kinds = ["gone", "longer"] + (["cut", "flipped"] if content else [])
    kind = data.draw(st.sampled_from(kinds))
    if kind == "gone":
        (folder / name).unlink()
    elif kind == "longer":
        (folder / name).write_bytes(content + b"x")
    elif kind == "cut":
        (folder / name).write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    else:
        place, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
        (folder / name).write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
    parts = data.draw(st.integers(1, 5))
    faults = [manifest.fault(folder, part, parts) for part in range(parts)]
    assert any(faults) and all(Path(name).name in fault for fault in faults if fault)


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode) | st.sampled_from(
    [b"null", b"[]", b"{}", b'{"files": []}', b'{"files": {"a": null}}', b'{"files": {"a": {"size": "1"}}}',
     b'{"files": {"state.json": {"size": 2}}}', b"[" * 5000]))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_manifest_that_is_damaged_is_a_fault_and_no_crash(tmp_path_factory, content):
    folder = make_checkpoint(tmp_path_factory.mktemp("any") / "checkpoint-1")
    (folder / manifest.MANIFEST).write_bytes(content)
    found = manifest.fault(folder)
    assert found is None if content == b'{"files": {}}' else found or content == b"{}"


def test_manifest_of_others_reads_no_file_outside_of_its_folder(tmp_path):
    folder = make_checkpoint(tmp_path / "checkpoint-1")
    for name in ("/dev/zero", "../../secret", str(tmp_path / "other")):
        (folder / manifest.MANIFEST).write_text(json.dumps({"files": {name: {"size": 0, "sha256": ""}}}))
        assert "not in it" in manifest.fault(folder)


def test_manifest_takes_links_as_the_hub_has_them(tmp_path):
    folder = make_checkpoint(tmp_path / "checkpoint-1")
    (folder / "weights.bin").rename(tmp_path / "blob")
    (folder / "weights.bin").symlink_to(tmp_path / "blob")
    assert manifest.fault(folder) is None


def test_folder_without_a_manifest_was_not_finished(tmp_path):
    folder = make_checkpoint(tmp_path / "checkpoint-1")
    (folder / manifest.MANIFEST).unlink()
    assert "manifest.json" in manifest.fault(folder) and "written last" in manifest.fault(folder)


@pytest.mark.parametrize("there", [False, True])
def test_checkpoint_takes_its_place_whole_whatever_rename_is_the_last(there, tmp_path, monkeypatch):
    """Killed before, between or after the renames: `clean_up` leaves a whole checkpoint of the new or the old content."""

    class Killed(BaseException):
        pass

    for last in range(6):
        run = tmp_path / f"{there}-{last}"
        final = run / "checkpoint-3"
        if there:
            make_checkpoint(final, {"old": b"1"})
        folder = make_checkpoint(run / manifest.SAVING / "checkpoint-3", {"new": b"2"})
        left = [last]

        def counted(function, left=left):
            def call(*args, **kwargs):
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", counted(Path.rename))
            patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
            with contextlib.suppress(Killed):
                manifest.put_in_place(folder, final)
        manifest.clean_up(run)
        assert manifest.fault(final) is None and not (run / manifest.SAVING).exists()
        assert manifest.files_in(final) in (["new"], ["old"] if there else ["new"])


def test_clean_up_removes_what_was_not_finished(tmp_path):
    unfinished = make_checkpoint(tmp_path / manifest.SAVING / "checkpoint-5")
    (unfinished / "weights.bin").write_bytes(b"")
    manifest.clean_up(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, None, {1, 2, 3, 4}),
        (0, None, {1, 2, 3, 4}),
        (1, None, {4}),
        (2, None, {3, 4}),
        (2, 1, {1, 4}),
        (1, 1, {1, 4}),  # the best one and the newest one
        (9, None, {1, 2, 3, 4}),
    ],
)
def test_rotation_keeps_the_newest_and_the_best(limit, best, left, tmp_path):
    for step in (1, 2, 3, 4):
        make_checkpoint(tmp_path / f"checkpoint-{step}")
        os.utime(tmp_path / f"checkpoint-{step}", (step, step))
    (tmp_path / "checkpoint-of-mine").mkdir()  # not ours
    manifest.rotate(tmp_path / "checkpoint-4", limit, best and str(tmp_path / f"checkpoint-{best}"))
    found = {manifest.step_of(path) for path in tmp_path.glob("checkpoint-*")}
    assert found == {*left, -1}
    assert all(manifest.fault(tmp_path / f"checkpoint-{step}") is None for step in left)


def test_rotation_goes_by_time_as_a_run_may_count_its_steps_again(tmp_path):
    for step, time in ((8, 1), (12, 2), (4, 0), (6, 3)):
        make_checkpoint(tmp_path / f"checkpoint-{step}")
        os.utime(tmp_path / f"checkpoint-{step}", (time, time))
    manifest.rotate(tmp_path / "checkpoint-6", 2, None)
    assert {manifest.step_of(path) for path in tmp_path.glob("checkpoint-*")} == {12, 6}


def test_manifest_is_readable_json(tmp_path):
    folder = make_checkpoint(tmp_path / "checkpoint-1", processes=2)
    assert json.loads((folder / manifest.MANIFEST).read_text())["processes"] == 2
