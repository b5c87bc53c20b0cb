"""Where there is no GPU, Triton's kernels run in its interpreter, as the same arithmetic."""

from __future__ import annotations

import os

import pytest
import torch

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
