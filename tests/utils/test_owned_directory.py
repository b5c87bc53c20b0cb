"""What holds of every directory that a command fills: of runs, syntheses, sweeps and caches."""

from __future__ import annotations

import json
import multiprocessing
import signal

import pytest

from softprompt_fast.sweep.directory import SweepDirectory
from softprompt_fast.synthesis.directory import SynthesisDirectory
from softprompt_fast.teacher.cache import TeacherCache
from softprompt_fast.training.run_directory import RunDirectory
from softprompt_fast.utils.sealed import DamagedFile

FORK = multiprocessing.get_context("fork")
KINDS = {
    "run": lambda path: RunDirectory(path, {}, inputs={}, overwrite=False),
    "synthesis": lambda path: SynthesisDirectory(path, {}),
    "sweep": SweepDirectory,
    "cache": TeacherCache,
}


@pytest.fixture(params=KINDS)
def make(request):
    return KINDS[request.param]


def names(path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


def test_a_directory_is_made_and_left_without_a_trace(make, tmp_path):
    with make(tmp_path / "a/b").owned() as directory:
        assert names(directory.path) == [directory.lock_file]
    assert names(directory.path) == []


def test_one_process_owns_it_until_it_is_done_or_dies(make, tmp_path):
    def own():
        with make(tmp_path).owned():
            ready.set()
            signal.pause()

    ready = FORK.Event()
    owner = FORK.Process(target=own, daemon=True)
    owner.start()
    assert ready.wait(60)
    directory = make(tmp_path)
    message = rf"^{directory.option} {tmp_path} is in use: another process {directory.use} there$"
    with pytest.raises(ValueError, match=message), directory.owned():
        pass
    owner.kill()
    owner.join()
    assert names(tmp_path) == [directory.lock_file]
    with make(tmp_path).owned():
        pass
    assert names(tmp_path) == []


def test_what_is_something_else_is_refused_and_untouched(make, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=f"{tmp_path} is occupied: it holds 'thesis.tex' and no "):
        make(tmp_path)
    assert names(tmp_path) == ["thesis.tex"]


def test_with_its_state_a_directory_may_hold_anything(make, tmp_path):
    directory = make(tmp_path)
    directory.write_state({"options": {}})
    (tmp_path / "thesis.tex").touch()
    with make(tmp_path).owned() as again:
        assert again.read_state()["options"] == {}


def test_a_file_and_a_missing_right_are_said(make, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=f"cannot write to .* {tmp_path}/file/x: Not a directory"):
        make(tmp_path / "file/x")


def test_a_lock_that_is_a_link_is_refused_and_not_followed(make, tmp_path):
    directory = make(tmp_path / "directory")
    (tmp_path / "thesis.tex").write_text("precious")
    lock = directory.path / directory.lock_file
    lock.symlink_to(tmp_path / "thesis.tex")
    with pytest.raises(OSError, match=f"symbolic links: '{lock}'"), directory.owned():
        pass
    assert (tmp_path / "thesis.tex").read_text() == "precious"
    assert lock.is_symlink()


def test_first_writes_that_were_killed_are_not_in_the_way_and_go(make, tmp_path):
    directory = make(tmp_path)
    left = tmp_path / f".{directory.state_file}.123.tmp"
    left.write_text('{"format')
    with make(tmp_path).owned() as again:
        again.remove_leftovers()
        assert names(tmp_path) == [directory.lock_file]


def test_a_state_is_replaced_as_a_whole(make, tmp_path, monkeypatch):
    directory = make(tmp_path)
    directory.write_state({"options": {"a": 1}})
    before = (tmp_path / directory.state_file).read_bytes()
    assert json.loads(before)["options"] == {"a": 1}

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/"):
        directory.write_state({"options": {"a": 2}})
    assert (tmp_path / directory.state_file).read_bytes() == before
    assert names(tmp_path) == [directory.state_file]


def test_a_sealed_state_shows_every_damage(tmp_path):
    cache = TeacherCache(tmp_path)
    cache.write_state({"facts": {"a": 1}})
    file = tmp_path / cache.state_file
    file.write_bytes(file.read_bytes().replace(b'"a": 1', b'"a": 2'))
    with pytest.raises(DamagedFile, match=f"^{file} is damaged: its bytes, 0 to "):
        cache.read_state()


def test_all_fields_that_differ_are_named_and_digests_cut(make, tmp_path):
    directory = make(tmp_path)
    there = {"same": 1, "seed": 0, "sha256": "a" * 64}
    now = {"same": 1, "seed": 3, "sha256": "b" * 64, "new": 5}
    differing = (
        f"new: {directory.absent!r} there, 5 now; seed: 0 there, 3 now; "
        f"sha256: '{'a' * 12}' there, '{'b' * 12}' now"
    )
    message = (
        f"^{directory.option} {tmp_path} is stale: {differing}. "
        f"Choose another directory, or {directory.remedy}.$"
    )
    with pytest.raises(ValueError, match=message):
        directory.check_same(there, now, "is stale:")
    directory.check_same(now, now, "")


def test_other_processes_of_a_run_touch_nothing(tmp_path):
    path = tmp_path / "run"
    other = RunDirectory(path, {}, inputs={}, overwrite=True, is_owner=False)
    with other.owned():
        other.start()
        other.finish()
    assert not path.exists()
