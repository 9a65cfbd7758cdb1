"""The two TensorRT libraries behind one name: what differs between them is here."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

BACKENDS = ("tensorrt", "tensorrt_rtx")
_OLDEST = (10, 12)  # of tensorrt: strongly typed networks with every layer


@dataclass(frozen=True)
class Backend:
    """A TensorRT library: `trt` is its Python module, the same API in both."""

    name: str
    trt: Any

    @property
    def version(self) -> str:
        return str(self.trt.__version__)

    def target(self, sm: int | None) -> int:
        """The compute capability to build for; None: the GPU that is here.

        Raises:
            ValueError: tensorrt builds for the GPU it runs on only, tensorrt_rtx for the ones it knows.
        """
        here = _device_sm()
        if self.name == "tensorrt":
            if here is None:
                raise ValueError(
                    "to: tensorrt builds on the GPU it builds for, and there is none here; use --to tensorrt_rtx, "
                    "which builds without one, or --to onnx and build on the target machine"
                )
            if sm not in (None, here):
                raise ValueError(f"sm: tensorrt builds for the GPU that is here, SM{here}, got {sm}; leave it out")
            return here
        known = sorted(int(name[2:]) for name in dir(self.trt.ComputeCapability) if name.startswith("SM"))
        sm = sm or here
        if sm is None:
            raise ValueError(f"sm: there is no GPU to take it from; pass one of {', '.join(map(str, known))}")
        if sm not in known:
            raise ValueError(
                f"sm: tensorrt_rtx builds for {', '.join(f'SM{one}' for one in known)}, got SM{sm}; use --to tensorrt "
                "on a machine with that GPU"
            )
        return sm

    def configure(self, config: Any, sm: int) -> None:
        """Point a builder configuration at its target."""
        if self.name == "tensorrt_rtx":
            config.num_compute_capabilities = 1
            config.set_compute_capability(getattr(self.trt.ComputeCapability, f"SM{sm}"), 0)

    @property
    def device(self) -> str:
        """Name of the GPU that plans are tuned on; "" for tensorrt_rtx, which tunes where a plan runs."""
        return torch.cuda.get_device_name() if self.name == "tensorrt" else ""


def _device_sm() -> int | None:
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def load_backend(name: str) -> Backend:
    """The library, imported.

    Raises:
        ValueError: an unknown name, or a version that is too old.
        ImportError: it is not installed.
    """
    if name not in BACKENDS:
        raise ValueError(f"to: expected onnx, {' or '.join(BACKENDS)}, got {name!r}")
    try:
        trt = import_module(name)
    except ImportError as error:
        package, other = ("tensorrt", "tensorrt_rtx") if name == "tensorrt" else ("mtedit-fast[export]", "onnx")
        raise ImportError(
            f"to: {name} cannot be imported ({error}); run pip install '{package}', or use --to {other}; ONNX export "
            "and mtedit-fast run through onnxruntime work without it"
        ) from None
    version = tuple(int(part) for part in str(trt.__version__).split(".")[:2])
    if name == "tensorrt" and version < _OLDEST:
        raise ValueError(
            f"to: expected tensorrt >= {'.'.join(map(str, _OLDEST))}, got {trt.__version__}; pip install -U tensorrt"
        )
    return Backend(name, trt)
