"""Linear layers in fp8 for rollouts: e4m3, one scale per row of the activations and per output of the weight.

For where the rollout may differ from what is trained: NFT and CRD learn from whatever images there are; GRPO must take
its old log-probs from the trained precision, and can weight samples by what the two precisions disagree on.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor, nn

FEW_ROWS = 256
_LARGEST = torch.finfo(torch.float8_e4m3fn).max


def fp8_unsupported(device: torch.device | str) -> str | None:
    """Why `device` has no fp8 matrix product with scales per row; None if it has one."""
    device = torch.device(device)
    if device.type == "cpu":  # slowly, for tests
        return None if _cpu_product() else f"torch {torch.__version__} multiplies rows with scales on a GPU only"
    if device.type != "cuda" or torch.version.hip:
        return f"fp8 needs an NVIDIA GPU of compute capability 8.9 or later (or the CPU, slowly), got {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        name, version = torch.cuda.get_device_name(device), ".".join(map(str, capability))
        return f"fp8 needs compute capability 8.9 or later (Ada, Hopper, Blackwell), got {name} with {version}"
    return None


@cache
def _cpu_product() -> bool:
    rows, scale = to_fp8(torch.ones(16, 16))
    try:
        torch._scaled_mm(rows, rows.t(), scale_a=scale, scale_b=scale.t().contiguous(), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """(values e4m3 [..., D], scales fp32 [..., 1]) with values · scales ≈ x [..., D], the largest of a row at ±448."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / _LARGEST
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


class Float8Linear(nn.Linear):
    """A linear layer with an fp8 copy of its frozen weight beside it, used while `switch` is on.

    On a GPU few rows, such as a text of one token, keep their precision: cuBLAS refuses some products of at most 256
    rows and long sums (pytorch/ao issue 4582), and they take next to none of a step's time.
    """

    switch: Float8Switch
    weight_fp8: Tensor  # [out, in]
    weight_scale: Tensor  # [1, out] fp32

    def forward(self, x: Tensor) -> Tensor:
        if not self.switch.on or (x.is_cuda and x.shape[:-1].numel() <= FEW_ROWS):
            return super().forward(x)
        rows, scale = to_fp8(x.flatten(0, -2))
        out = torch._scaled_mm(
            rows,
            self.weight_fp8.t(),
            scale_a=scale,
            scale_b=self.weight_scale,
            out_dtype=torch.bfloat16,
            use_fast_accum=x.is_cuda,
        ).to(x.dtype)
        return (out if self.bias is None else out + self.bias).unflatten(0, x.shape[:-1])


class Float8Switch:
    """`with Float8Switch(editor): ...` runs the linear layers of the transformer's blocks in fp8, without gradient.

    Build it before compiling and after adding adapters, which stay in their own precision on top. It costs an fp8 copy
    of the blocks' weights, half of what they take in bf16. In eager mode quantising the activations is a chain of
    kernels; compile the blocks to have it fused.

    Raises:
        ValueError: the device has no fp8, the weights are sharded, or no layer's sides are multiples of 16.
    """

    def __init__(self, editor: Any):
        if reason := fp8_unsupported(editor.device):
            raise ValueError(f"precision: {reason}; roll out in the model's own precision")
        self.editor, self.on = editor, False
        self.layers = 0
        pattern = re.compile(editor.lora_targets)
        for name, layer in editor.pipeline.transformer.named_modules():
            if type(layer) is nn.Linear and pattern.fullmatch(name.removesuffix(".base_layer")):
                self._convert(name, layer)
        if not self.layers:
            raise ValueError(
                "precision: expected linear layers with sides that are multiples of 16 in the transformer's blocks, "
                "found none; build one switch per editor, and use a larger model"
            )

    def _convert(self, name: str, layer: nn.Linear) -> None:
        if hasattr(layer.weight, "device_mesh"):
            raise ValueError(f"precision: fp8 needs whole weights, got {name} sharded; set run.sharding to none")
        if layer.in_features % 16 or layer.out_features % 16:  # the matrix product's alignment
            return
        layer.__class__ = Float8Linear
        assert isinstance(layer, Float8Linear)
        layer.switch = self
        values, scale = to_fp8(layer.weight.detach())
        layer.register_buffer("weight_fp8", values, persistent=False)
        layer.register_buffer("weight_scale", scale.t().contiguous(), persistent=False)
        self.layers += 1

    def __enter__(self) -> Self:
        self._set(True)
        return self

    def __exit__(self, *_: object) -> None:
        self._set(False)

    def _set(self, on: bool) -> None:
        if on and torch.is_grad_enabled():
            raise RuntimeError("precision: fp8 has no gradient; enter it under torch.no_grad()")
        self.on = on
        self.editor.invalidate()  # what was computed in the other precision
