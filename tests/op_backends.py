"""The back ends an op's tests run on, and the device of each."""

import os

import pytest
import torch

from mtedit_fast.ops._backend import unavailable_reason

# Without a GPU, Triton's kernels run under its interpreter, which has to be chosen before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

COMPILED = os.environ.get("TRITON_INTERPRET") != "1"
"""Whether Triton's kernels are: with a GPU, or tests/ptx_machine."""
GPU = "cuda" if torch.cuda.is_available() else "cpu"
DEVICES = {"reference": "cpu", "cpp": "cpu", "triton": GPU}
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=f"{name} is not available here: {reason}"))
    for name, device in DEVICES.items()
    for reason in [unavailable_reason(name, torch.device(device), ())]
]


def exact_products(tensor: torch.Tensor) -> torch.Tensor:
    """Eighths: the sum of a few hundred products of two such numbers has one value, whatever its order.

    On a CPU, interpreted or not, products are a library's, which may round by a row's place in a tile or by strides.
    """
    return (tensor * 8).round() / 8
