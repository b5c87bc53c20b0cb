"""What can run here is said with its reason, and what was asked for is what runs."""

from __future__ import annotations

import pytest
import torch

import softprompt_fast as spf
from softprompt_fast import backends
from softprompt_fast.backends import registry

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_both_cpu_backends_are_usable():
    available = backends.available()
    assert available["torch"] is None
    assert available["cpp"] is None, "the compiled extension is part of what is tested"


def test_every_other_backend_says_why_not(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    available = backends.available()
    assert list(available) == ["torch", "cpp", "triton", "cuda", "streaming"]
    if not torch.cuda.is_available():
        assert available["triton"] == available["streaming"] == "no GPU was found"
        reason = available["cuda"]
        assert reason == "no GPU was found" or "built without CUDA kernels: " in reason


def test_interpreted_kernels_take_tensors_on_the_cpu_where_they_are_asked_for(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends.available()["triton"] is None
    assert backends.resolve("triton", CPU) == "triton"
    assert backends.resolve("streaming", CPU) == "streaming"
    assert backends.resolve("auto", CPU) == "cpp"


def test_without_triton_a_gpu_takes_the_cuda_kernels(monkeypatch):
    monkeypatch.setitem(registry._PROBLEMS, "triton", lambda: "Triton is not installed")
    monkeypatch.setitem(registry._PROBLEMS, "cuda", lambda: None)
    assert backends.resolve("auto", CUDA) == "cuda"
    reason = "the extension was built without CUDA kernels"
    monkeypatch.setitem(registry._PROBLEMS, "cuda", lambda: reason)
    assert backends.resolve("auto", CUDA) == "torch"


def test_build_info_describes_the_extension():
    info = backends.build_info()
    assert info
    assert all(isinstance(value, str) and value for value in info.values())


def test_auto_takes_the_fastest_for_the_device(monkeypatch):
    assert backends.resolve("auto", CPU) == "cpp"
    monkeypatch.setattr(registry, "_gpu_problem", lambda: None)
    assert backends.resolve("auto", CUDA) == "triton"
    assert backends.resolve("auto", torch.device("meta")) == "torch"


def test_a_loss_on_the_cpu_asks_for_no_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def refuse():
        raise AssertionError("the GPU was asked for")

    monkeypatch.setattr(registry, "_gpu_problem", refuse)
    assert backends.resolve("auto", CPU) == "cpp"
    assert backends.resolve("torch", CPU) == "torch"


def test_a_named_backend_is_that_backend():
    assert backends.resolve("torch", CPU) == "torch"
    assert backends.resolve("torch", CUDA) == "torch"
    assert backends.resolve("cpp", CPU) == "cpp"


def test_without_the_extension_auto_falls_back_and_a_named_cpp_does_not(monkeypatch):
    monkeypatch.setattr(registry, "_cpp_problem", "the compiled extension is missing (no compiler)")
    assert backends.resolve("auto", CPU) == "torch"
    with pytest.raises(RuntimeError, match=r"'cpp' cannot be used: .* missing \(no compiler\)"):
        backends.resolve("cpp", CPU)


def test_a_backend_that_cannot_run_is_refused_with_the_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(registry, "_gpu_problem", lambda: "no GPU was found")
    with pytest.raises(RuntimeError, match="'triton' cannot be used: no GPU was found"):
        backends.resolve("triton", CPU)
    monkeypatch.setattr(registry, "_gpu_problem", lambda: None)
    with pytest.raises(RuntimeError, match="'streaming' runs on a GPU only: the tensors are on c"):
        backends.resolve("streaming", CPU)
    with pytest.raises(RuntimeError, match="'cpp' runs on the CPU only: the tensors are on cuda"):
        backends.resolve("cpp", CUDA)


def test_an_unknown_backend_lists_the_valid_ones():
    with pytest.raises(ValueError, match="auto, torch, cpp, triton, cuda, streaming: got 'fast'"):
        backends.resolve("fast", CPU)
    hidden, weight = torch.zeros(2, 3), torch.zeros(5, 3)
    with pytest.raises(ValueError, match=r"backend must be auto, torch.*got 'fast'"):
        spf.linear_kl(hidden, weight, hidden, backend="fast")
