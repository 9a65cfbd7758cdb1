"""Run a module or a script as if this machine had a GPU: python tests/pretend_gpu pytest tests/test_on_gpu.py

Tensors on "cuda" hold CPU tensors, captured graphs are recorded calls, ops take their references or, after --kernels,
Triton's interpreter, which is slow. Numbers are a CPU's and times mean nothing. What it shows is what a first run on a
GPU would: tensors on two devices, waits where none are allowed, captures that a graph cannot hold. It takes a build of
torch without CUDA, whose own hooks would be in the way.
"""

import ctypes
import importlib.util
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent


def load_hooks() -> None:
    """hooks.cpp, compiled against the installed torch; before torch's, so that its getAccelerator is the one found."""
    torch = Path(importlib.util.find_spec("torch").submodule_search_locations[0])  # type: ignore[union-attr,index]
    options = ["-std=c++20", "-O1", "-fPIC", "-shared", f"-I{torch / 'include'}", f"-L{torch / 'lib'}"]
    links = ["-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch / 'lib'}"]
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/hooks.so"
        subprocess.run([os.environ.get("CXX", "g++"), *options, HERE / "hooks.cpp", *links, "-o", library], check=True)
        ctypes.CDLL(library, ctypes.RTLD_GLOBAL)


if __name__ == "__main__":
    assert "torch" not in sys.modules
    os.environ["TRITON_INTERPRET"] = "1"
    load_hooks()
    sys.path[0] = str(HERE.parent)
    from pretend_gpu.device import pretend

    kernels = sys.argv[1] == "--kernels"
    pretend(kernels)
    program, sys.argv = sys.argv[1 + kernels], sys.argv[1 + kernels :]
    if program.endswith(".py"):
        sys.path.insert(0, str(Path(program).parent))
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
