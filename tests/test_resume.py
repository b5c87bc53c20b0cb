"""kill -9 during training, then the same command: as if nothing had happened."""

from __future__ import annotations

import json
import signal

from toy_run import start, train_flags, wait_for

STEPS = {"max_steps": 400, "save_steps": 20}
WEIGHTS = "adapter_model.safetensors"


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
