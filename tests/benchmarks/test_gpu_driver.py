"""``make gpu`` is rehearsed on the CPU: its steps run, and what they measure is kept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

DRIVER = Path(__file__).parents[2] / "benchmarks" / "gpu" / "run.py"

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="make gpu itself runs where there is a GPU"
)


def rehearse(directory: Path, *arguments: str) -> tuple[int, dict, str]:
    """(exit code, results, what was printed)"""
    done = subprocess.run(
        [sys.executable, str(DRIVER), "--rehearse", "--output", str(directory), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
    )
    path = directory / "rehearsal.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    return done.returncode, results, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.emulated
def test_a_rehearsal_measures_every_backend_that_is_here(tmp_path):
    code, results, output = rehearse(tmp_path, "--only", "versions,ceilings,main,kernels")
    assert code == 0, output
    assert [step["outcome"] for step in results["steps"]] == ["ok"] * 4
    here = [name for name, why in results["machine"]["backends"].items() if why is None]
    assert "triton" in here
    assert {row["backend"] for row in results["rows"]} == {"triton", "cuda"} & set(here)
    for row in results["rows"]:
        assert 0 < row["gradient_error"] < 2**-7
        assert row["ratio"] == pytest.approx(row["milliseconds"] / row["bare_milliseconds"])
    assert {row["loss"] for row in results["row_kernels"]} == {"NLL", "KL", "reverse KL", "JSD"}
    page = (tmp_path / "rehearsal.md").read_text()
    assert "## Losses, forward and backward" in page
    assert page.count("| triton |") >= len(results["rows"]) / 2


def test_what_fails_is_kept_with_its_reason(tmp_path):
    tests = ("--tests", "tests/no_such_file.py")
    code, results, output = rehearse(tmp_path, "--only", "tests", *tests)
    assert code == 1, output
    (step,) = results["steps"]
    assert step["outcome"] == "failed"
    assert "no test ran; exit code 4" in step["detail"]


def test_steps_that_no_time_is_left_for_are_not_silently_absent(tmp_path):
    code, results, _ = rehearse(tmp_path, "--seconds", "1")
    assert code == 1
    assert {step["outcome"] for step in results["steps"]} == {"failed"}
    assert {step["detail"] for step in results["steps"]} == {"no time was left"}


def test_it_refuses_to_measure_without_a_gpu(tmp_path):
    done = subprocess.run(
        [sys.executable, str(DRIVER), "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        env={"PATH": ""},
        timeout=60,
    )
    assert done.returncode == 1
    assert "needs a GPU" in done.stdout
    assert not list(tmp_path.iterdir())
