"""Every Triton kernel compiles for every chip, fits its shared memory, and spills no register."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.emulated]

KIB = 1024
# Shared memory that one program may have.
CHIPS = {
    "cuda:80": 163 * KIB,
    "cuda:90": 227 * KIB,
    "cuda:100": 227 * KIB,
    "hip:gfx942": 64 * KIB,
}


@pytest.mark.parametrize("chip", CHIPS)
def test_every_kernel_fits_the_chip(chip, tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, Path(__file__).parents[1] / "support" / "compile_kernels.py", chip],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) > 20
    for row in rows:
        assert row["shared"] <= CHIPS[chip], row
        assert row["spilled"] == 0, row
