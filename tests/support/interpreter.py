"""Repairs of Triton's interpreter, so that it computes what a GPU computes in bf16, and in time.

The interpreter (as of Triton 3.9) cuts digits off where a GPU rounds fp32 to the nearest bf16,
multiplies the bit patterns of bf16 matrices, leaves other products to a BLAS whose sums depend on a
row's place in the matrix, and prepares the language anew at every function call inside a kernel,
which takes most of its time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import pytest
import torch


@contextlib.contextmanager
def repaired() -> Iterator[None]:
    import triton.language as tl
    from triton.runtime import interpreter

    convert, prepare = interpreter._convert_float, interpreter._patch_lang

    def rounded(values, source, target, rounding):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, rounding)
        nearest = torch.from_numpy(np.ascontiguousarray(values)).view(torch.float32).bfloat16()
        return nearest.view(torch.uint16).numpy()

    def numbers(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle.data.astype(np.float64)
        return (handle.data.astype(np.uint32) << 16).view(np.float32).astype(np.float64)

    def dot(self, a, b, accumulator, *_options):
        product = np.matmul(numbers(a), numbers(b)).astype(np.float32)
        return interpreter.TensorHandle(product + accumulator.data, tl.float32)

    class Prepared:
        """What a launch has prepared, for functions that know the language by the same names."""

        scopes: ClassVar[dict] = {}

        @classmethod
        def once(cls, function):
            names = frozenset(
                name
                for name, value in function.__globals__.items()
                if value is tl or value is tl.core
            )
            if names not in cls.scopes:
                cls.scopes[names] = prepare(function)
            return cls

        @classmethod
        def restore(cls):
            for scope in reversed(cls.scopes.values()):
                scope.restore()
            cls.scopes.clear()

    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        patch.setattr(interpreter, "_convert_float", rounded)
        patch.setattr(interpreter, "_patch_lang", Prepared.once)
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
        yield
