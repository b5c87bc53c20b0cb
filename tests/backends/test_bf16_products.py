"""Products in bf16 hold the losses' contract on any CPU: their instructions are emulated.

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


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The environment in which the emulating build is the one that is imported."""
    scratch = tmp_path_factory.mktemp("emulated")
    library = scratch / "lib"
    flags = f"-DSPF_EMULATED=1 -include {Path(__file__).with_name('emulated_tiles.h')} -g0"
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    build = [sys.executable, "setup.py", "--quiet", "build"]
    subprocess.run(
        [*build, "--build-base", scratch, "--build-lib", library],
        cwd=ROOT,
        env={**environment, "CFLAGS": flags, "SOFTPROMPT_FAST_CUDA": "0"},
        check=True,
    )
    return {**environment, "PYTHONPATH": str(library)}


@pytest.mark.slow
@pytest.mark.emulated
@pytest.mark.xdist_group("emulated products")
@pytest.mark.parametrize("engine", ["avx512_bf16", "amx_bf16"])
def test_the_losses_hold_their_contract_with_emulated_products(emulated, engine):
    build_info = "import softprompt_fast as spf; print(spf.backends.build_info())"
    commands = [
        [sys.executable, "-c", build_info],
        [BIN / "pytest", "-q", "-m", "not slow", "-k", "cpp", ROOT / "tests/losses"],
    ]
    for command, expected in zip(commands, (f"'{engine}'", " passed"), strict=True):
        done = subprocess.run(
            command,
            cwd=ROOT / "tests",
            env={**emulated, "SPF_EMULATED_ENGINE": engine},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert expected in done.stdout
