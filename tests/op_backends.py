"""The back ends an op's tests run on, and the device of each."""

import os

import pytest
import torch
import triton

from mtedit_fast.ops._backend import unavailable_reason

# Without a GPU, Triton's kernels run under its interpreter, which has to be chosen before they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

TRITON_VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
GPU = "cuda" if torch.cuda.is_available() else "cpu"
DEVICES = {"reference": "cpu", "cpp": "cpu", "triton": GPU}
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=f"{name} is not available here: {reason}"))
    for name, device in DEVICES.items()
    for reason in [unavailable_reason(name, torch.device(device), ())]
]
