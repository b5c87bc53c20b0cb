"""Builds the compiled extension. Metadata is in pyproject.toml.

Without a C++ compiler, or without nvcc, the package still installs;
``softprompt_fast.backends.available()`` then says why the "cpp" or the "cuda" backend is missing.
SOFTPROMPT_FAST_CUDA=0 leaves the CUDA kernels out; 1 builds them even for a PyTorch without CUDA.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import Extension, find_packages, setup
from torch.utils import cpp_extension
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension

# fp-contract: csrc/cpu/simd.h says which products are fused with which sums
FLAGS = [
    "-O3",
    "-std=c++20",
    "-ffp-contract=off",
    "-Wall",
    "-Wno-psabi",
    "-Wno-unknown-pragmas",
]
# By the stable ABI, what one PyTorch's headers build runs with all from the oldest allowed on.
OLDEST_TORCH = re.findall(r'"torch>=(\d+)\.(\d+)"', Path("pyproject.toml").read_text())[0]
TORCH_TARGET_VERSION = "0x{:02x}{:02x}{:012x}".format(*map(int, OLDEST_TORCH), 0)
# fmad: csrc/cuda/formulas.cuh. Devices later than the last run its PTX.
NVCC_FLAGS = ["-O3", "-std=c++17", "-fmad=false", "-Xcompiler=-fPIC", "--threads=0"]
CUDA_TARGETS = {"80": "sm_80", "90": "sm_90", "100": "sm_100,compute_100"}


class NoCuda(Exception):
    """Why the CUDA kernels are not built."""


def find_nvcc() -> str:
    wanted = os.environ.get("SOFTPROMPT_FAST_CUDA")
    if wanted == "0":
        raise NoCuda("SOFTPROMPT_FAST_CUDA=0")
    if torch.version.cuda is None and wanted != "1":
        raise NoCuda("this PyTorch was built without CUDA")
    nvcc = shutil.which("nvcc") or (CUDA_HOME and shutil.which("nvcc", path=f"{CUDA_HOME}/bin"))
    if not nvcc:
        raise NoCuda("nvcc was not found")
    return nvcc


def nvcc_says(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise NoCuda("nvcc failed: " + " ".join(done.stderr.split()))
    return done.stdout + done.stderr


class Build(BuildExtension):
    """Compiles csrc/cuda with plain nvcc: it includes no PyTorch header."""

    def build_extensions(self) -> None:
        for extension in self.extensions:
            try:
                self.add_cuda(extension)
            except NoCuda as reason:
                print(f"softprompt_fast: no CUDA kernels: {reason}", file=sys.stderr)
                text = str(reason)[:500].replace("\\", "/").replace('"', "'")
                extension.define_macros.append(("SPF_NO_CUDA", f'"{text}"'))
        super().build_extensions()

    def add_cuda(self, extension) -> None:
        nvcc = find_nvcc()
        version = re.search(r"release (\S+),", nvcc_says(nvcc, "--version"))[1]
        source = "csrc/cuda/rows.cu"
        kernels = Path(self.build_temp, "rows.o")
        kernels.parent.mkdir(parents=True, exist_ok=True)
        targets = [f"-gencode=arch=compute_{a},code=[{c}]" for a, c in CUDA_TARGETS.items()]
        command = [nvcc, *NVCC_FLAGS, *targets, "-c", source, "-o", str(kernels)]
        if not kernels.exists() or any(
            path.stat().st_mtime > kernels.stat().st_mtime for path in Path("csrc/cuda").iterdir()
        ):
            nvcc_says(*command)
        libraries = re.findall(r'"-L([^"]+)"', nvcc_says(*command, "--dryrun"))
        extension.extra_objects.append(str(kernels))
        extension.extra_link_args += [f"-L{path}" for path in libraries]
        # the runtime's names stay our own: PyTorch may bring another one
        extension.extra_link_args += ["-lcudart_static", "-Wl,--exclude-libs,libcudart_static.a"]
        extension.extra_link_args += ["-lrt", "-ldl", "-lpthread"]
        built = f"nvcc {version}: {' '.join(CUDA_TARGETS.values()).replace(',', ' ')}"
        extension.define_macros.append(("SPF_CUDA", f'"{built}"'))


def extensions() -> list:
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        print(
            "softprompt_fast: no C++ compiler found, installing without the cpp backend",
            file=sys.stderr,
        )
        return []
    return [
        Extension(
            "softprompt_fast._C",
            sorted(str(path) for path in Path("csrc").rglob("*.cpp")),
            include_dirs=cpp_extension.include_paths(),
            library_dirs=cpp_extension.library_paths(),
            libraries=["torch_cpu"],
            define_macros=[
                ("SPF_TORCH_TARGET_VERSION", TORCH_TARGET_VERSION),
                ("SPF_OLDEST_TORCH", '"{}.{}"'.format(*OLDEST_TORCH)),
            ],
            extra_compile_args=FLAGS,
        )
    ]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": Build},
    packages=[*find_packages(include=["softprompt_fast*"]), "softprompt_fast.kernels"],
    package_data={"": ["*.html", "*.pyi", "py.typed", "templates/*"]},
    package_dir={"softprompt_fast.kernels": "kernels"},
)
