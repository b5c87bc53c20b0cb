"""Products in bf16 hold the losses' contract on any CPU: their instruction is emulated.

Another build of the extension, found before the installed one, runs the tests of the losses.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


@pytest.mark.slow
@pytest.mark.emulated
def test_the_losses_hold_their_contract_with_emulated_products(tmp_path):
    library = tmp_path / "lib"
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    build = [sys.executable, "setup.py", "--quiet", "build"]
    subprocess.run(
        [*build, "--build-base", tmp_path, "--build-lib", library],
        cwd=ROOT,
        env={**environment, "CFLAGS": "-DSPF_EMULATED=1 -g0", "SOFTPROMPT_FAST_CUDA": "0"},
        check=True,
    )
    build_info = "import softprompt_fast as spf; print(spf.backends.build_info())"
    commands = [
        [sys.executable, "-c", build_info],
        [BIN / "pytest", "-q", "-m", "not slow", "-k", "cpp", ROOT / "tests/losses"],
    ]
    environment["PYTHONPATH"] = str(library)
    for command, expected in zip(commands, ("'avx512_bf16'", " passed"), strict=True):
        done = subprocess.run(
            command, cwd=ROOT / "tests", env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert expected in done.stdout
