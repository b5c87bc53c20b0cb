"""nvcc takes the kernels without a warning, and what they need fits the devices."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from cuda_on_cpu.emulator import KERNELS

TARGETS = ("sm_80", "sm_90", "sm_100")
# of a multiprocessor, of a block that asks for no more, and how many blocks share the first
REGISTERS, SHARED_BYTES, BLOCKS = 65536, 49152, 2
REPORT = re.compile(
    r"Compiling entry function '(\S+)' for '(\w+)'.*?(\d+) bytes stack frame, "
    r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers.*?(\d+) bytes smem",
    re.DOTALL,
)


@pytest.mark.slow
@pytest.mark.emulated
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
def test_every_kernel_fits_without_spilling(tmp_path):
    command = ["nvcc", "-std=c++17", "-O3", "-fmad=false", "--threads=0", "-Xptxas=-v"]
    command += ["-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror"]
    command += [f"-gencode=arch=compute_{target[3:]},code={target}" for target in TARGETS]
    command += ["-c", str(KERNELS / "rows.cu"), "-o", str(tmp_path / "rows.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = REPORT.findall(done.stderr)
    assert len({found[:2] for found in report}) == 3 * 5 * 3, "targets, objectives, dtypes"
    for name, target, *numbers in report:
        stack, stores, loads, registers, shared = map(int, numbers)
        assert stack == stores == loads == 0, f"{name} for {target}"
        threads = 1024 if "OneTarget" in name else 512
        assert threads * registers <= REGISTERS, f"{name} for {target}"
        assert shared <= SHARED_BYTES, f"{name} for {target}"
