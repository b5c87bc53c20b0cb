"""Triton's interpreter where there is no GPU: the same arithmetic. And a full teacher cache."""

from __future__ import annotations

import os
import shutil
import time

import pytest
import torch

# Another number of threads may round another way, and several processes are compared with one.
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined


@pytest.fixture(autouse=True, scope="session")
def _repaired_interpreter():
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from interpreter import repaired

    with repaired():
        yield


@pytest.fixture(scope="session")
def toy():
    """A teacher with all that its cache may hold."""
    from toy_cache import CachedToy

    return CachedToy()


@pytest.fixture(scope="session")
def filled(toy, tmp_path_factory):
    """The directory of a full cache; not to be changed."""
    directory = tmp_path_factory.mktemp("filled") / "cache"
    toy.answers(directory)
    return directory


@pytest.fixture
def directory(filled, tmp_path):
    """Of a full cache of its own, to be damaged."""
    return shutil.copytree(filled, tmp_path / "cache")


@pytest.fixture
def computed(monkeypatch, tmp_path_factory):
    """How many shards were computed since, by whichever process."""
    from softprompt_fast.teacher.teacher import Teacher

    log = tmp_path_factory.mktemp("log") / "shards"
    log.touch()
    answer = Teacher.answer

    def logged(self, *args, **options):
        with log.open("a") as file:
            file.write(".")
        time.sleep(0.05)  # the time to get into each other's way
        return answer(self, *args, **options)

    monkeypatch.setattr(Teacher, "answer", logged)
    return lambda: log.stat().st_size


@pytest.fixture(scope="session")
def real_model(tmp_path_factory):
    """The directory of SmolLM2-135M-Instruct, converted once for all workers; not to be changed."""
    from softprompt_fast.base_model.smollm2 import smollm2
    from softprompt_fast.utils.owned_directory import locked

    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # of the whole run; each worker has one below it
    (shared / "models").mkdir(exist_ok=True)
    with locked(shared / "models.lock"):
        return smollm2(shared / "models" / "smollm2")
