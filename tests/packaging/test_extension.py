"""The compiled extension runs with every PyTorch that is allowed: it knows only the stable ABI."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from softprompt_fast import _C

torch_abi_audit = pytest.importorskip("torch_abi_audit", reason="it needs Python 3.11")


def test_the_extension_keeps_to_the_stable_abi():
    """No symbol of PyTorch's C++, and none that the oldest allowed PyTorch lacks."""
    found = torch_abi_audit.inspect_extension(Path(_C.__file__)).torch
    requirements = map(Requirement, importlib.metadata.requires("softprompt_fast"))
    allowed = next(r.specifier for r in requirements if r.name == "torch")
    assert found.uses_torch
    assert not found.unstable_symbols
    assert found.min_torch_version in allowed
    assert not found.unknown_shim_symbols
