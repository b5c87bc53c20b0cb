"""Builds the compiled extension. Metadata is in pyproject.toml.

Without a C++ compiler the package still installs; ``softprompt_fast.backends.available()`` then
says why the "cpp" backend is missing.
"""

import os
import shutil
import sys
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

# fp-contract: csrc/cpu/simd.h says which products are fused with which sums
FLAGS = [
    "-O3",
    "-std=c++20",
    "-fopenmp",
    "-ffp-contract=off",
    "-Wall",
    "-Wno-psabi",
    "-Wno-unknown-pragmas",
]


def extensions() -> list:
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        print(
            "softprompt_fast: no C++ compiler found, installing without the cpp backend",
            file=sys.stderr,
        )
        return []
    return [
        CppExtension(
            "softprompt_fast._C",
            sorted(str(path) for path in Path("csrc").rglob("*.cpp")),
            define_macros=[("SPF_TORCH_VERSION", f'"{torch.__version__}"')],
            extra_compile_args=FLAGS,
            extra_link_args=["-fopenmp"],
        )
    ]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension},
    packages=["softprompt_fast", "softprompt_fast.kernels"],
    package_dir={"softprompt_fast.kernels": "kernels"},
)
