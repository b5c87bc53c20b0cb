"""Builds the compiled extension. Metadata is in pyproject.toml.

Without a C++ compiler the package still installs; ``softprompt_fast.backends.available()`` then
says why the "cpp" backend is missing.
"""

import shutil
import sys
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

FLAGS = ["-O3", "-std=c++20", "-fopenmp", "-ffp-contract=off", "-Wall", "-Wno-psabi", "-Wno-unknown-pragmas"]


def extensions() -> list:
    if not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
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
