"""DiffusionNFT's loss on velocities in closed form, and the reward in [0, 1] that it takes."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtedit_fast.ops import _velocity_loss as shared
from mtedit_fast.ops._backend import choose_backend
from mtedit_fast.ops._operator import Operator

ADVANTAGE_MODES = ("all", "positive_only", "negative_only", "one_only", "binary")


class NFTLoss(NamedTuple):
    loss: Tensor
    """[] fp32, with gradient to v_theta."""
    policy: Tensor
    """[B] fp32, detached: each sample's loss without weight and reference term."""
    kl: Tensor | None
    """[B] fp32, detached: mean (v_theta − v_ref)² of each sample; None where v_ref was not used."""


def nft_loss(
    v_theta: Tensor,
    v_old: Tensor | None,
    v_target: Tensor,
    t: Tensor,
    r: Tensor,
    *,
    beta: float = 1.0,
    weight: Tensor | None = None,
    scale: float = 5.0,
    v_ref: Tensor | None = None,
    kl_weight: float = 0.0,
    check: bool = False,
    backend: str = "auto",
) -> NFTLoss:
    """Σ weight·(scale/β·[r·E⁺ + (1−r)·E⁻] + kl_weight·mean (v_θ−v_ref)²), the loss of DiffusionNFT (arXiv 2509.16117).

    With v⁺ = βv_θ + (1−β)v_old and v⁻ = (1+β)v_old − βv_θ, E± = t²·mean (v±−v*)² / w±, where the weight
    w± = max(t·mean |v±−v*|, 1e-5) counts as a constant. It is the public code's loss on x̂± = x_t − t·v±, because
    x̂± − x₀ = −t(v± − v*), but needs neither x_t nor x₀. Arithmetic is fp32 whatever the inputs (fp64 if a velocity
    is, on the reference). A sample's results do not depend on the rest of the batch, bit for bit. Gradient flows to
    v_theta only: scale·weight·(2t²/D)·[r(v⁺−v*)/w⁺ − (1−r)(v⁻−v*)/w⁻], and 2·kl_weight·weight·(v_θ−v_ref)/D.

    Args:
        v_theta: [B, ...] velocity with gradient, fp32, bf16, fp16 (or fp64).
        v_old: [B, ...], the sampling model's velocity. None where it is v_theta itself, as in the first update after a
            copy: nothing is read for it, and the gradient is proportional to (2r−1)(v_θ−v*).
        v_target: [B, ...], v* = ε − x₀.
        t: [B] in [0, 1], x_t = (1−t)·x₀ + t·ε.
        r: [B] in [0, 1], from `advantage_to_reward`.
        beta: > 0, how far v± go from v_old.
        weight: [B], instead of the 1/B of a mean: parts of a batch of M samples, each with weight 1/M, add up to the
            loss and gradient of the whole; 0 leaves out a sample of finite values (0·NaN is NaN). An empty batch has
            loss 0.
        scale: the public code's adv_clip_max.
        v_ref: [B, ...], the reference model's velocity. Not read where kl_weight is 0.
        kl_weight: >= 0; 1e-4 in the public code.
        check: wait for the device, and raise on t or r outside [0, 1] or a velocity that is not finite (not inside
            torch.compile). On the CPU t and r are always checked.
        backend: "auto", "reference", "cpp" or "triton". An explicit one never falls back.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not match, t or r outside [0, 1], beta not positive, kl_weight without
            v_ref, a backend that cannot run here, or (check=True) values that are not finite.
    """
    shared.check_numbers(beta, scale, kl_weight, v_ref)
    shared.check_velocities(v_theta, v_old=v_old, v_target=v_target, v_ref=v_ref)
    shared.check_rows(v_theta, t=t, r=r, weight=weight)
    if kl_weight == 0:
        v_ref = None
    velocities = {"v_theta": v_theta, "v_old": v_old, "v_target": v_target, "v_ref": v_ref}
    shared.check_values(check, {"t": t, "r": r}, velocities)
    dtypes = tuple(v.dtype for v in velocities.values() if v is not None)
    chosen = choose_backend(backend, v_theta.device, dtypes)
    dtype = shared.compute_dtype(*velocities.values())
    args: tuple[Any, ...] = (
        v_theta.contiguous(),
        *(v if v is None else v.detach().contiguous() for v in (v_old, v_target, v_ref)),
        *(row if row is None else row.detach().to(dtype).contiguous() for row in (t, r, weight)),
        float(beta),
        float(scale),
        float(kl_weight),
        chosen,
    )
    loss, rows, _ = _op(*args)
    policy, kl = rows.detach()
    return NFTLoss(loss, policy, None if v_ref is None else kl)


def advantage_to_reward(advantage: Tensor, *, mode: str = "all", clip: float = 5.0) -> Tensor:
    """r = clip(A, ±clip)/(2·clip) + ½, in [0, 1], as DiffusionNFT's public code has it.

    Args:
        advantage: of any shape and float dtype; NaN stays NaN.
        mode: what becomes of the clipped A first. "all": nothing. "positive_only": max(A, 0). "negative_only":
            min(A, 0). "one_only": 1 where A > 0, else 0. "binary": its sign. With the default clip, r is therefore
            0.6 or 0.5 under "one_only", and 0.6, 0.5 or 0.4 under "binary".
        clip: > 0.

    Raises:
        TypeError: advantage is not a floating-point tensor.
        ValueError: unknown mode, or clip not positive.
    """
    if not isinstance(advantage, Tensor) or not advantage.dtype.is_floating_point:
        got = advantage.dtype if isinstance(advantage, Tensor) else type(advantage).__name__
        raise TypeError(f"advantage must be a floating-point tensor, got {got}")
    if mode not in ADVANTAGE_MODES:
        raise ValueError(f"mode must be one of {ADVANTAGE_MODES}, got {mode!r}")
    if not 0 < clip < float("inf"):
        raise ValueError(f"clip must be finite and > 0, got {clip}")
    clipped = advantage.clamp(-clip, clip)
    if mode == "positive_only":
        clipped = clipped.clamp(min=0)
    elif mode == "negative_only":
        clipped = clipped.clamp(max=0)
    elif mode == "one_only":
        clipped = (clipped > 0).to(clipped.dtype)
    elif mode == "binary":
        clipped = clipped.sign()
    reward = (clipped / clip / 2 + 0.5).clamp(0, 1)
    return torch.where(advantage.isnan(), advantage, reward)


def reference_forward(
    v_theta: Tensor,
    v_old: Tensor | None,
    v_target: Tensor,
    v_ref: Tensor | None,
    t: Tensor,
    r: Tensor,
    weight: Tensor | None,
    beta: float,
    scale: float,
    kl_weight: float,
    moments: Callable[..., Tensor] = shared.velocity_moments,
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch; every back end has this signature, but for `moments`. Returns loss [], policy and kl [2, B], and
    [3, B]: what the gradient's o, d and v_θ − v_ref are multiplied by (`_velocity_loss`)."""
    plus, square_plus, minus, square_minus, kl = moments(v_theta, v_old, v_target, v_ref, mixed=True, beta=beta)
    if v_old is None:
        minus, square_minus = plus, square_plus
    if weight is None:
        weight = torch.full_like(t, 1 / max(len(t), 1))

    slope_plus = scale * r * t * t / (t * plus).clamp(min=shared.SMALLEST_SIZE)
    slope_minus = scale * (1 - r) * t * t / (t * minus).clamp(min=shared.SMALLEST_SIZE)
    policy = (slope_plus * square_plus + slope_minus * square_minus) / beta
    loss = (weight * (policy + kl_weight * kl)).sum()
    slopes = (slope_plus - slope_minus, beta * (slope_plus + slope_minus), torch.full_like(t, kl_weight))
    coefficients = torch.stack(slopes) * (2 * weight / math.prod(v_theta.shape[1:]))
    return loss, torch.stack((policy, kl)), coefficients


def _forward(
    v_theta: Tensor,
    v_old: Tensor | None,
    v_target: Tensor,
    v_ref: Tensor | None,
    t: Tensor,
    r: Tensor,
    weight: Tensor | None,
    beta: float,
    scale: float,
    kl_weight: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    run: Callable[..., tuple[Tensor, Tensor, Tensor]] = reference_forward
    if backend == "cpp":
        from mtedit_fast.ops import _cpp

        run = partial(reference_forward, moments=_cpp.velocity_moments)
    if backend == "triton":
        from mtedit_fast.kernels import nft_loss as triton

        run = triton.nft_loss_forward
    return run(v_theta, v_old, v_target, v_ref, t, r, weight, beta, scale, kl_weight)


def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    t = args[4]
    return t.new_empty(()), t.new_empty(2, t.shape[0]), t.new_empty(3, t.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4], output[2])
    ctx.backend = inputs[-1]


_op = Operator("nft_loss", _forward, _fake, keeps_memory=True)
_op.differentiate(shared.backward, _setup_context, inputs=1)
