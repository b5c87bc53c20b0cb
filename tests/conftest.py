"""Triton's interpreter where there is no GPU: the same arithmetic. And what many tests read."""

from __future__ import annotations

import contextlib
import os
import shutil
import time

import pytest
import torch
from marking import mark_by_use, mark_outside_of_the_sample

# Another number of threads may round another way, and several processes are compared with one.
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    """Marks what the parameters and the fixtures of a test say; the others carry their marks."""
    mark_by_use(items)
    mark_outside_of_the_sample(items)


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
def once(tmp_path_factory):
    """A folder of all workers, as the one of them that is in it now; nothing there is changed."""
    from softprompt_fast.utils.owned_directory import locked

    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # of the whole run; each worker has one below it

    @contextlib.contextmanager
    def folder(name):
        (shared / name).mkdir(exist_ok=True)
        with locked(shared / f"{name}.lock"):
            yield shared / name

    return folder


@pytest.fixture(scope="session")
def real_model(once):
    """The directory of SmolLM2-135M-Instruct, converted once; not to be changed."""
    from softprompt_fast.base_model.smollm2 import smollm2

    with once("models") as folder:
        return smollm2(folder / "smollm2")


@pytest.fixture(scope="session")
def finished(once):
    """A folder with a toy model, its data and the finished run "run"; not to be changed."""
    from toy_run import train_flags

    from softprompt_fast.cli.main import main

    with once("finished") as folder:
        assert main(train_flags(folder)) == 0  # the same command again trains nothing
        return folder


@pytest.fixture
def finished_run(finished, tmp_path):
    """The directory of that run, a copy to be changed."""
    return shutil.copytree(finished / "run", tmp_path / "run")
