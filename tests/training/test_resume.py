"""kill -9 during training, then the same command: as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest
import torch
from damage import Evil
from toy_run import start, train_flags, wait_for

from softprompt_fast.cli.main import main
from softprompt_fast.training.checkpoints import (
    NEEDED_TO_RESUME,
    last_good_checkpoint,
    rotate_checkpoints,
    verify_checkpoint,
    write_manifest,
)

STEPS = {"max_steps": 400, "save_steps": 20}
WEIGHTS = "adapter_model.safetensors"


@pytest.mark.slow
@pytest.mark.processes
def test_a_killed_run_ends_with_the_same_prompt(tmp_path):
    flags = train_flags(tmp_path, "killed", **STEPS)
    undisturbed = start(train_flags(tmp_path, "undisturbed", **STEPS))
    killed = start(flags)
    wait_for(tmp_path / "killed/checkpoint-20/manifest.json", killed)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert json.loads((tmp_path / "killed/run.json").read_text())["status"] == "training"
    assert not (tmp_path / "killed" / WEIGHTS).exists()

    again = start(flags)
    _, errors = again.communicate()
    assert again.returncode == 0, errors
    assert "Going on from " in errors
    assert "checkpoint-" in errors
    _, errors = undisturbed.communicate()
    assert undisturbed.returncode == 0, errors
    assert "Going on" not in errors
    assert (tmp_path / "killed" / WEIGHTS).read_bytes() == (
        tmp_path / "undisturbed" / WEIGHTS
    ).read_bytes()


@pytest.fixture
def save(tmp_path):
    """Writes a checkpoint, later than those before it; a broken one is what kill -9 leaves."""
    clock = iter(range(1_000, 2_000))

    def save_checkpoint(step, *, broken=False):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        for name in NEEDED_TO_RESUME:
            torch.save({"a": torch.ones(2)}, checkpoint / name)
        if not broken:
            write_manifest(checkpoint)
            os.utime(checkpoint / "manifest.json", times=(now := next(clock), now))
        return checkpoint

    return save_checkpoint


def steps(directory) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in directory.glob("checkpoint-*"))


def test_broken_checkpoints_go_first_and_take_no_place(save, tmp_path):
    save(5, broken=True)
    save(13)
    save(21)
    save(50_000, broken=True)
    rotate_checkpoints(tmp_path, None, None)
    assert steps(tmp_path) == [5, 13, 21, 50_000]
    rotate_checkpoints(tmp_path, 2, None)
    assert steps(tmp_path) == [13, 21]


def test_what_a_killed_save_left_goes_with_the_next_one(save):
    checkpoint = save(7, broken=True)
    (checkpoint / ".adapter_config.json.123.tmp").touch()
    write_manifest(checkpoint)
    names = sorted(path.name for path in checkpoint.iterdir())
    assert names == sorted([*NEEDED_TO_RESUME, "manifest.json"])


def test_a_run_killed_after_its_last_step_has_no_step_left(tmp_path):
    """But what came after the step is done: here a rotation, and the prompt."""
    flags = train_flags(tmp_path, max_steps=2, save_steps=1, save_total_limit=1)
    run = tmp_path / "run"
    assert main(flags) == 0
    weights = (run / WEIGHTS).read_bytes()
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-1")
    (run / "checkpoint-1" / WEIGHTS).unlink()
    (run / WEIGHTS).unlink()
    assert main(flags) == 0
    assert steps(run) == [2]
    assert (run / WEIGHTS).read_bytes() == weights


def test_the_checkpoint_just_written_stays(save, tmp_path):
    save(21)
    save(30)
    save(13)  # by a run that was sent back to an earlier step
    rotate_checkpoints(tmp_path, 1, None)
    assert steps(tmp_path) == [13]


def test_rotation_keeps_the_best_and_never_deletes_all(save, tmp_path):
    best = save(1)
    for step in (2, 3, 4):
        save(step)
    rotate_checkpoints(tmp_path, 2, str(best))
    assert steps(tmp_path) == [1, 4]
    for step in (1, 4):
        (tmp_path / f"checkpoint-{step}/manifest.json").unlink()
    rotate_checkpoints(tmp_path, 1, None)
    assert steps(tmp_path) == [1, 4]


@pytest.mark.parametrize("content", [b"garbage", Evil()], ids=["garbage", "code"])
def test_a_pickle_is_refused_by_name_whatever_the_manifest_says(
    save, tmp_path, monkeypatch, content
):
    monkeypatch.chdir(tmp_path)
    checkpoint = save(1, broken=True)
    file = checkpoint / "optimizer.pt"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    write_manifest(checkpoint)
    with pytest.raises(ValueError, match=rf"{file} is refused: it is not the plain data"):
        verify_checkpoint(checkpoint)
    assert not (tmp_path / "evil").exists()
    with pytest.warns(UserWarning, match="optimizer.pt is refused"):
        assert last_good_checkpoint(tmp_path) is None
