"""Shared fixtures."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from op_backends import BACKENDS, COMPILED

torch.backends.cudnn.allow_tf32 = False  # fp32 convolutions are held to fp32's rounding


def pytest_configure() -> None:
    try:
        import triton  # after op_backends has chosen its interpreter
    except ImportError:  # it is for Linux only
        return
    interpreter = tuple(map(int, triton.__version__.split(".")[:2]))
    if not COMPILED and interpreter < (3, 9) and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        raise pytest.UsageError(
            f"NumPy {np.__version__}: without a GPU kernels are run by the interpreter of Triton {triton.__version__}, "
            "which takes NumPy below 2.4; pip install 'numpy<2.4'"
        )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What fails fails again: numbers that a test draws do not depend on which tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Every back end that can run here."""
    return str(request.param)


@pytest.fixture(autouse=True)
def _imports_leave_no_trace() -> Iterator[None]:
    """A folder put on `sys.path` by one test must not answer the imports of the next one."""
    before = list(sys.path)
    yield
    added = {Path(entry).resolve() for entry in set(sys.path) - set(before)}
    sys.path[:] = before
    for name, module in list(sys.modules.items()):
        source = getattr(module, "__file__", None)
        if added and source and Path(source).resolve().parent in added:
            del sys.modules[name]
