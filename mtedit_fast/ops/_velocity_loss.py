"""What the losses on velocities share: argument checks, per-row sums, and the elementwise pass of their gradient.

With o = v_old − v* and d = v_θ − v_old, every such gradient is, row by row, c₀·o + c₁·d + c₂·(v_θ − v_ref); where old
is θ itself, or does not enter, it is c₀·(v_θ − v*) + c₂·(v_θ − v_ref). The forward keeps c, 12 bytes a row, and the
backward reads the velocities again. A forward that wrote the gradient would move as many bytes, and more wherever the
incoming scalar is not 1 or no gradient is asked for.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from mtedit_fast.ops._operator import Operator
from mtedit_fast.ops._samples import check_samples, raise_if_not_finite, row_sum

SMALLEST_SIZE = 1e-5
"""Floor of the mean absolute error that a squared error is divided by, as in the public code of both losses."""


def check_velocities(v_theta: Tensor, **others: Tensor | None) -> None:
    """[B, ...] of one shape on one device; v_old and v_ref may be None. Raises as `check_samples`."""
    check_samples(("v_old", "v_ref"), v_theta=v_theta, **others)


def check_rows(v_theta: Tensor, **rows: Tensor | None) -> None:
    """One floating-point number per sample, [B], on v_theta's device; those that are None are skipped."""
    for name, tensor in rows.items():
        if tensor is None and name in ("weight", "centre"):
            continue
        if not isinstance(tensor, Tensor) or not tensor.dtype.is_floating_point:
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a floating-point tensor, got {got}")
        if tensor.shape != v_theta.shape[:1]:
            raise ValueError(f"{name} must have shape [B] = [{v_theta.shape[0]}], got {list(tensor.shape)}")
        if tensor.device != v_theta.device:
            raise ValueError(f"{name} must be on v_theta's device {v_theta.device}, got {tensor.device}")


def check_numbers(beta: float, scale: float, kl_weight: float, v_ref: Tensor | None) -> None:
    for name, value, minimum in (("beta", beta, "> 0"), ("scale", scale, ">= 0"), ("kl_weight", kl_weight, ">= 0")):
        if not math.isfinite(value) or value < 0 or (value == 0 and minimum == "> 0"):
            raise ValueError(f"{name} must be finite and {minimum}, got {value}")
    if kl_weight > 0 and v_ref is None:
        raise ValueError(f"kl_weight={kl_weight} needs v_ref=, the reference model's velocity; or pass kl_weight=0")


def check_values(check: bool, unit: dict[str, Tensor], finite: dict[str, Tensor | None]) -> None:
    """`unit` in [0, 1] where that costs no wait for a device; with `check` everywhere, and `finite` finite."""
    if torch.compiler.is_compiling():
        return
    for name, tensor in unit.items():
        if tensor.numel() and (check or tensor.device.type == "cpu"):
            low, high = float(tensor.min()), float(tensor.max())
            if not (low >= 0 and high <= 1):
                raise ValueError(f"{name} must be within [0, 1], got values from {low:.6g} to {high:.6g}")
    if check:
        raise_if_not_finite(**{name: tensor for name, tensor in finite.items() if tensor is not None})


def compute_dtype(*velocities: Tensor | None) -> torch.dtype:
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in velocities)
    return torch.float64 if wide else torch.float32


def velocity_moments(
    v_theta: Tensor, v_old: Tensor | None, v_target: Tensor, v_ref: Tensor | None, *, mixed: bool, beta: float = 0.0
) -> Tensor:
    """[5, B]: a sample's mean |p|, p², |m|, m² and (v_θ − v_ref)², 0 where absent. In PyTorch; `_cpp` has another.

    With o = v_old − v* and d = v_θ − v_old, p and m are o ± βd where `mixed`, else v_θ − v* and o. Without v_old p is
    v_θ − v*, and there is no m.
    """
    dtype = compute_dtype(v_theta, v_old, v_target, v_ref)
    theta, target = v_theta.flatten(1).to(dtype), v_target.flatten(1).to(dtype)
    absent = theta.new_zeros(len(theta))
    minus, change = (absent, absent), absent
    if v_old is None:
        plus = _moments(theta - target)
    else:
        old = v_old.flatten(1).to(dtype)
        offset = old - target
        if mixed:
            step = (theta - old).mul_(beta)
            plus, minus = _moments(offset + step), _moments(offset.sub_(step))
        else:
            plus, minus = _moments(theta - target), _moments(offset)
    if v_ref is not None:
        change = row_sum((theta - v_ref.flatten(1).to(dtype)).square_()) / theta.shape[1]
    return torch.stack((*plus, *minus, change))


def _moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """[B, D] -> mean |x| and mean x², each [B]. `values` is overwritten. In fixed tiles, as `row_sum`."""
    count = values.shape[1]
    if count % 1024:
        values = pad(values, (0, -count % 1024))
    tiles = values.unflatten(1, (-1, 1024)).abs_()
    size = row_sum(tiles.sum(2)) / count
    return size, row_sum(tiles.square_().sum(2)) / count


def reference_backward(
    v_theta: Tensor, v_old: Tensor | None, v_target: Tensor, v_ref: Tensor | None, coefficients: Tensor, grad: Tensor
) -> Tensor:
    """The gradient to v_theta, in its dtype. coefficients [3, B], grad []."""
    dtype = coefficients.dtype
    theta, target = v_theta.flatten(1).to(dtype), v_target.flatten(1).to(dtype)
    c0, c1, c2 = (coefficients * grad.to(dtype))[..., None]
    if v_old is None:
        result = (theta - target).mul_(c0)
    else:
        old = v_old.flatten(1).to(dtype)
        result = (old - target).mul_(c0).addcmul_(theta - old, c1)
    if v_ref is not None:
        result.addcmul_(theta - v_ref.flatten(1).to(dtype), c2)
    return result.view(v_theta.shape).to(v_theta.dtype)


def _backward(
    v_theta: Tensor,
    v_old: Tensor | None,
    v_target: Tensor,
    v_ref: Tensor | None,
    coefficients: Tensor,
    grad: Tensor,
    backend: str,
) -> Tensor:
    if backend == "triton":
        from mtedit_fast.kernels import nft_loss as triton

        return triton.velocity_loss_backward(v_theta, v_old, v_target, v_ref, coefficients, grad)
    if backend == "cpp":
        from mtedit_fast.ops import _cpp

        return _cpp.velocity_loss_backward(v_theta, v_old, v_target, v_ref, coefficients, grad)
    return reference_backward(v_theta, v_old, v_target, v_ref, coefficients, grad)


_backward_op = Operator("velocity_loss_backward", _backward, lambda v_theta, *_: torch.empty_like(v_theta))


def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None]:
    """The gradient to v_theta of an op whose `setup_context` kept velocities, coefficients and `ctx.backend`."""
    return (None if grad_loss is None else _backward_op(*ctx.saved_tensors, grad_loss, ctx.backend),)
