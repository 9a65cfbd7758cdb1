"""Builds csrc/ into mtedit_fast._C; see pyproject.toml for everything else.

No compiler: a warning, and a pure-Python install (Triton and the PyTorch reference remain). No nvcc: CPU code only.

    MTEDIT_NO_CPP=1    leave the extension out
    MTEDIT_NO_CUDA=1   leave its CUDA objects out, even where nvcc is found
    CXX, CUDA_HOME     which compiler, which toolkit
    MAX_JOBS           files compiled at a time (default: one per core)
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import setup

CPP_SOURCES = [
    "csrc/bindings.cpp",
    "csrc/crop_resize.cpp",
    "csrc/dtype.cpp",
    "csrc/elementwise.cpp",
    "csrc/row_sums.cpp",
]
CPP_SOURCES += ["csrc/sde_step.cpp", "csrc/seeded_noise.cpp", "csrc/token_similarity.cpp", "csrc/velocity_loss.cpp"]
CUDA_SOURCES = ["csrc/crop_resize.cu", "csrc/device_copy.cu"]
CUDA_ARCHS = ["80", "90", "100"]  # A100; H100 and H200; B200
# Contraction into fused multiply-adds is off: sampling, replay, every instruction set and PyTorch then round alike.
# Python's own flags may hold -fwrapv, which keeps loops from being vectorised (three times slower).
CXX_FLAGS = ["-O3", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=off"]
CXX_FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-fno-wrapv"]


def say(message: str) -> None:
    print(f"mtedit_fast: {message}", file=sys.stderr, flush=True)


def openmp_flags() -> list[str]:
    """``-fopenmp`` where the compiler takes and links it."""
    command = [*os.environ.get("CXX", "c++").split(), "-fopenmp", "-shared", "-fPIC", "-x", "c++", "-", "-o"]
    with tempfile.TemporaryDirectory() as folder:
        try:
            probe = subprocess.run([*command, f"{folder}/probe.so"], input=b"#include <omp.h>\n", capture_output=True)
        except OSError:
            return []
    if probe.returncode:
        say("the compiler has no OpenMP: CPU kernels will use one thread")
        return []
    return ["-fopenmp"]


def find_cuda() -> tuple[Path, Path] | None:
    """nvcc and the folder of its static runtime."""
    if os.environ.get("MTEDIT_NO_CUDA") == "1":
        say("MTEDIT_NO_CUDA=1: building CPU code only")
        return None
    found = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), found and Path(found).resolve().parent.parent, "/usr/local/cuda"]
    for home in [Path(home) for home in homes if home]:
        for folder in (home / "lib64", home / "targets" / "x86_64-linux" / "lib", home / "lib"):
            if (home / "bin" / "nvcc").exists() and (folder / "libcudart_static.a").exists():
                return home / "bin" / "nvcc", folder
    say("no nvcc with a static CUDA runtime found: building CPU code only")
    return None


def cuda_objects(nvcc: Path, folder: str) -> tuple[list[str], list[str]]:
    """Objects of CUDA_SOURCES, compiled in ``folder``, and the architectures they hold."""
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    archs = [arch for arch in CUDA_ARCHS if f"compute_{arch}" in known]
    gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    gencode.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")  # PTX for later ones
    Path(folder).mkdir(parents=True, exist_ok=True)
    objects = [str(Path(folder) / (Path(source).stem + ".cu.o")) for source in CUDA_SOURCES]
    for source, output in zip(CUDA_SOURCES, objects, strict=True):
        command = [
            nvcc,
            "-O3",
            "-std=c++17",
            "--threads=0",
            "-Xcompiler=-fPIC,-fvisibility=hidden",
            *gencode,
            "-c",
            source,
            "-o",
        ]
        say("nvcc " + " ".join(map(str, [*command[1:], output])))
        subprocess.run([*command, output], check=True)
    return objects, archs


def extension() -> dict:
    """The arguments of ``setup`` that build the extension; none where it is left out."""
    if os.environ.get("MTEDIT_NO_CPP") == "1":
        say("MTEDIT_NO_CPP=1: installing without the C++ extension")
        return {}
    from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
    from setuptools.command.build_ext import build_ext
    from setuptools.errors import BaseError, CCompilerError

    class BuildExtension(build_ext):
        def build_extension(self, ext) -> None:
            cuda = find_cuda()
            try:
                if cuda:
                    self.add_cuda(ext, *cuda)
                super().build_extension(ext)
            except (BaseError, CCompilerError, OSError) as error:
                say(f"WARNING: the C++ extension did not build ({error}).")
                say("WARNING: installing pure Python: CPU kernels fall back to PyTorch. Install g++ and reinstall.")
                raise CCompilerError(str(error)) from error  # the extension is optional: setuptools goes on without it

        def add_cuda(self, ext, nvcc: Path, library: Path) -> None:
            try:
                objects, archs = cuda_objects(nvcc, self.build_temp)
            except (OSError, subprocess.CalledProcessError, IndexError) as error:
                say(f"WARNING: nvcc failed ({error}): building CPU code only")
                return
            ext.extra_objects += objects
            ext.extra_link_args += [f"-L{library}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
            ext.define_macros.append(("MTEDIT_CUDA_ARCHS", '"' + " ".join(f"sm_{arch}" for arch in archs) + '"'))

    ParallelCompile("MAX_JOBS").install()
    openmp = openmp_flags()
    headers = [str(header) for header in sorted(Path("csrc").glob("*.h"))]
    module = Pybind11Extension(
        "mtedit_fast._C",
        CPP_SOURCES,
        depends=[*headers, *CUDA_SOURCES],
        extra_compile_args=[*CXX_FLAGS, *openmp],
        extra_link_args=openmp,
        optional=True,
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


setup(**extension())
