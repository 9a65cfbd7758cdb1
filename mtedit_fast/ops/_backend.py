"""Which implementation of an op runs: one pure predicate that can say why not."""

from typing import Literal

import torch

Backend = Literal["auto", "reference", "cpp", "triton", "cuda"]
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable_reason(backend: str, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why `backend` cannot serve tensors of these dtypes on `device`, or None if it can."""
    if backend == "reference":
        return None
    unsupported = [dtype for dtype in dtypes if dtype not in KERNEL_DTYPES]
    if unsupported:
        return f"it computes in fp32 and takes float32, bfloat16 or float16, not {unsupported[0]}"
    if backend == "cpp":
        if device.type != "cpu":
            return f"it runs on the CPU and the tensors are on {device}"
        try:
            from mtedit_fast.ops import _cpp
        except ImportError as error:
            return str(error)
        return _cpp.unavailable_reason()
    if backend == "cuda":
        if device.type != "cuda":
            return f"it runs on CUDA and the tensors are on {device}"
        from mtedit_fast.ops import _cpp

        return _cpp.cuda_unavailable_reason()
    try:
        from mtedit_fast.kernels.seeded_noise import INTERPRETED
    except ImportError as error:
        return str(error)
    if device.type != "cuda" and not INTERPRETED:
        return f"it runs on CUDA and the tensors are on {device} (TRITON_INTERPRET=1 runs it on the CPU, slowly)"
    return None


def choose_backend(
    requested: str,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    *,
    offered: tuple[str, str] = ("cpp", "triton"),
) -> str:
    """`requested` if it can run (ValueError with the reason if it cannot); for "auto", the fastest that can.

    `offered`: what the op has beside its reference, on the CPU and on a GPU.
    """
    backends = ("auto", "reference", *offered)
    if requested not in backends:
        raise ValueError(f"backend must be one of {backends}, got {requested!r}")
    if requested == "auto":
        on_cpu, on_gpu = offered  # not indexed by a bool, which torch.compile does not know before 2.13
        native = on_gpu if device.type == "cuda" else on_cpu
        return native if unavailable_reason(native, device, dtypes) is None else "reference"
    reason = unavailable_reason(requested, device, dtypes)
    if reason is not None:
        raise ValueError(f"backend={requested!r} is not available: {reason}; use backend='auto' or 'reference'")
    return requested
