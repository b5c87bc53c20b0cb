"""Full disks, kills, damage and other processes: only what is missing is done again."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import resource
import signal
import threading
import time

import pytest
import torch
from damage import cut, flip_bits
from killing import kill
from torture import build_cache
from toy_cache import NUM_SHARDS, contents, shards

from softprompt_fast.utils.owned_directory import locked

FORK = multiprocessing.get_context("fork")


def no_space(monkeypatch, size):
    def fsync(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    return lambda: None


def short_write(monkeypatch, size):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, limits[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("fail", [no_space, short_write])
def test_a_failed_write_names_the_file_and_its_bytes(toy, filled, directory, monkeypatch, fail):
    shard = shards(directory)[0]
    size = shard.stat().st_size
    shard.unlink()
    with monkeypatch.context() as patch:
        restore = fail(patch, size)
        try:
            with pytest.raises(OSError, match=f"cannot write {size} bytes: .*: '{shard}'"):
                toy.answers(directory)
        finally:
            restore()
    assert contents(directory).items() < contents(filled).items()
    toy.answers(directory)
    assert contents(directory) == contents(filled)


def in_another_process(job):
    def alone():
        torch.set_num_threads(1)  # the threads of this process's pool are not there
        job()

    process = FORK.Process(target=alone, daemon=True)
    process.start()
    return process


@pytest.mark.processes
def test_several_processes_compute_each_shard_once(toy, filled, tmp_path, computed):
    processes = [in_another_process(lambda: toy.answers(tmp_path)) for _ in range(3)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert computed() == NUM_SHARDS
    assert contents(tmp_path) == contents(filled)


@pytest.mark.processes
def test_a_dead_owners_shard_is_done_last_by_who_lives(toy, filled, tmp_path, computed):
    first = f"shard-{toy.digests[0][:32]}.safetensors"
    lock = tmp_path / f".{first}.lock"

    def own():
        with locked(lock):
            signal.pause()

    def end_the_owner():
        deadline = time.monotonic() + 20
        while len(shards(tmp_path)) < NUM_SHARDS - 1 and time.monotonic() < deadline:
            time.sleep(0.005)
        owner.kill()

    owner = in_another_process(own)
    while not lock.exists():
        time.sleep(0.005)
    threading.Thread(target=end_the_owner, daemon=True).start()
    toy.answers(tmp_path)
    owner.join()
    assert computed() == NUM_SHARDS
    assert max(shards(tmp_path), key=lambda path: path.stat().st_mtime_ns).name == first
    assert contents(tmp_path) == contents(filled)


# Torture; `make torture` does more of it


def silent(text):
    pass


@pytest.mark.processes
@pytest.mark.parametrize("kills", [4, pytest.param(16, marks=pytest.mark.slow)])
def test_kills_lose_nothing(toy, tmp_path, kills):
    killed = kill(build_cache(toy), tmp_path / "kills", kills, random.Random(0), silent)
    assert killed.kills == kills
    assert killed.problems == []


@pytest.mark.parametrize("flips", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_no_flipped_bit_is_unseen(toy, tmp_path, flips):
    assert flip_bits(toy, tmp_path, flips, random.Random(0), silent) == []


def test_no_cut_is_unseen(toy, tmp_path):
    lengths, problems = cut(toy, tmp_path)
    assert lengths == sum(map(len, contents(tmp_path).values()))
    assert problems == []
