"""Centered reward distillation: the implicit rewards of a group are matched to its rewards, both centred."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtedit_fast.ops import _velocity_loss as shared
from mtedit_fast.ops._backend import choose_backend
from mtedit_fast.ops._operator import Operator


class CRDLoss(NamedTuple):
    loss: Tensor
    """[] fp32, with gradient to v_theta."""
    policy: Tensor
    """[B] fp32, detached: each sample's loss without weight and reference term."""
    implicit_reward: Tensor
    """[B] fp32, detached: r_θ."""
    kl: Tensor | None
    """[B] fp32, detached: mean (v_theta − v_ref)² of each sample; None where v_ref was not used."""


def crd_loss(
    v_theta: Tensor,
    v_old: Tensor | None,
    v_target: Tensor,
    r: Tensor,
    groups: Tensor | None = None,
    *,
    centre: Tensor | None = None,
    beta: float = 1.0,
    weight: Tensor | None = None,
    scale: float = 5.0,
    adaptive: bool = True,
    v_ref: Tensor | None = None,
    kl_weight: float = 0.0,
    kl_floor: float | None = None,
    check: bool = False,
    backend: str = "auto",
) -> CRDLoss:
    """Σ weight·(scale/β·(u − ū)² + kl·mean (v_θ−v_ref)²) with u = β·r_θ − r and ū its mean over the sample's group.

    Centered Reward Distillation (arXiv 2603.14128), as in its authors' trainer for Flow-Factory. The implicit reward is
    r_θ = −(mean (v_θ−v*)²/w_θ − mean (v_old−v*)²/w_old), in velocity space and so without t, with w = max(mean |v−v*|,
    1e-5) as a constant. Centring cancels the normaliser of the KL-regularised optimum, which depends on the prompt
    only. ū counts as a constant, as in the public code; where weights are equal within a group that is the whole
    gradient. Arithmetic is fp32 whatever the inputs (fp64 if a velocity is, on the reference), and a group's results do
    not depend on the rest of the batch, bit for bit. Gradient flows to v_theta only.

    Args:
        v_theta: [B, ...] velocity with gradient, fp32, bf16, fp16 (or fp64).
        v_old: [B, ...], the old model's velocity. None where it is v_theta itself: r_θ is 0, its gradient is not.
        v_target: [B, ...], v* = ε − x₀.
        r: [B], rewards on the scale that β·r_θ should have; the public code takes `advantage_to_reward(A)`.
        groups: [B] int64, equal for samples that are centred together, in any order. The public code centres over the
            whole gathered batch of a prompt and denoising step.
        centre: [B] instead of groups: ū of each sample, where a group is spread over calls. The mean of
            β·`implicit_reward` − r over the group; the means of such a first pass need no gradient.
        beta: > 0.
        weight: [B], instead of the 1/B of a mean: parts of a batch of M samples, each with weight 1/M, add up to the
            loss and gradient of the whole; 0 leaves out a sample's loss, if finite, but not its reward out of ū.
        scale: the public code's adv_clip_max.
        adaptive: False takes w = 1.
        v_ref: [B, ...], the reference model's velocity (the paper: the pretrained one's, with guidance). Not read where
            kl_weight is 0.
        kl_weight: >= 0; 0.1 in the public code.
        kl_floor: reward-adaptive KL: kl = kl_floor + r·(kl_weight − kl_floor), 1e-4 in the public code. Default: kl is
            kl_weight whatever r.
        check: wait for the device, and raise on r or a velocity that is not finite (not inside torch.compile).
        backend: "auto", "reference", "cpp" or "triton". An explicit one never falls back.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not match, beta not positive, not exactly one of groups and centre,
            kl_weight without v_ref, kl_floor outside [0, kl_weight], a backend that cannot run here, or (check=True)
            values that are not finite.
    """
    shared.check_numbers(beta, scale, kl_weight, v_ref)
    shared.check_velocities(v_theta, v_old=v_old, v_target=v_target, v_ref=v_ref)
    shared.check_rows(v_theta, r=r, weight=weight, centre=centre)
    _check_groups(v_theta, groups, centre)
    if kl_floor is None:
        kl_floor = kl_weight
    elif not 0 <= kl_floor <= kl_weight:
        raise ValueError(f"kl_floor must be within [0, kl_weight] = [0, {kl_weight}], got {kl_floor}")
    if kl_weight == 0:
        v_ref = None
    velocities = {"v_theta": v_theta, "v_old": v_old, "v_target": v_target, "v_ref": v_ref}
    shared.check_values(check, {}, velocities | {"r": r[:, None]})
    dtypes = tuple(v.dtype for v in velocities.values() if v is not None)
    chosen = choose_backend(backend, v_theta.device, dtypes)
    dtype = shared.compute_dtype(*velocities.values())
    args: tuple[Any, ...] = (
        v_theta.contiguous(),
        *(v if v is None else v.detach().contiguous() for v in (v_old, v_target, v_ref)),
        r.detach().to(dtype).contiguous(),
        groups if groups is None else groups.contiguous(),
        *(row if row is None else row.detach().to(dtype).contiguous() for row in (centre, weight)),
        float(beta),
        float(scale),
        adaptive,
        float(kl_weight),
        float(kl_floor),
        chosen,
    )
    loss, rows, _ = _op(*args)
    policy, implicit_reward, kl = rows.detach()
    return CRDLoss(loss, policy, implicit_reward, None if v_ref is None else kl)


def _check_groups(v_theta: Tensor, groups: Tensor | None, centre: Tensor | None) -> None:
    if (groups is None) == (centre is None):
        given = "neither" if groups is None else "both"
        raise ValueError(f"pass groups=, or centre= where groups are spread over calls; got {given}")
    if groups is None:
        return
    if not isinstance(groups, Tensor) or groups.dtype != torch.int64:
        got = groups.dtype if isinstance(groups, Tensor) else type(groups).__name__
        raise TypeError(f"groups must be an int64 tensor, got {got}")
    if groups.shape != v_theta.shape[:1]:
        raise ValueError(f"groups must have shape [B] = [{v_theta.shape[0]}], got {list(groups.shape)}")
    if groups.device != v_theta.device:
        raise ValueError(f"groups must be on v_theta's device {v_theta.device}, got {groups.device}")


def _group_mean(values: Tensor, groups: Tensor) -> Tensor:
    """[B]: the mean over each sample's group, added in the batch's order."""
    if not len(values):
        return values
    first = (groups[:, None] == groups).int().argmax(1)
    total = torch.zeros_like(values).index_add_(0, first, values)
    count = torch.zeros_like(values).index_add_(0, first, torch.ones_like(values))
    return (total / count)[first]


def reference_forward(
    v_theta: Tensor,
    v_old: Tensor | None,
    v_target: Tensor,
    v_ref: Tensor | None,
    r: Tensor,
    groups: Tensor | None,
    centre: Tensor | None,
    weight: Tensor | None,
    beta: float,
    scale: float,
    adaptive: bool,
    kl_weight: float,
    kl_floor: float,
    moments: Callable[..., Tensor] = shared.velocity_moments,
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch; every back end has this signature, but for `moments`.

    Returns loss [], policy, implicit reward and kl [3, B], and [3, B]: what the gradient's v_θ − v*, nothing and
    v_θ − v_ref are multiplied by (`_velocity_loss`).
    """
    size, square, size_old, square_old, kl = moments(v_theta, v_old, v_target, v_ref, mixed=False)
    width, error = _width_and_error(size, square, adaptive)
    implicit_reward = torch.zeros_like(r)
    if v_old is not None:
        implicit_reward = _width_and_error(size_old, square_old, adaptive)[1] - error
    if weight is None:
        weight = torch.full_like(r, 1 / max(len(r), 1))

    residual = beta * implicit_reward - r
    if groups is not None:
        centre = _group_mean(residual, groups)
    assert centre is not None
    residual = residual - centre
    policy = scale / beta * residual**2
    kl_weights = kl_floor + r * (kl_weight - kl_floor)
    loss = (weight * (policy + kl_weights * kl)).sum()
    slopes = (-2 * scale * residual / width, torch.zeros_like(r), kl_weights)
    coefficients = torch.stack(slopes) * (2 * weight / math.prod(v_theta.shape[1:]))
    return loss, torch.stack((policy, implicit_reward, kl)), coefficients


def _width_and_error(size: Tensor, square: Tensor, adaptive: bool) -> tuple[Tensor, Tensor]:
    """w and mean x²/w of each row, of its mean |x| and mean x²."""
    width = size.clamp(min=shared.SMALLEST_SIZE) if adaptive else torch.ones_like(size)
    return width, square / width


def _forward(
    v_theta: Tensor,
    v_old: Tensor | None,
    v_target: Tensor,
    v_ref: Tensor | None,
    r: Tensor,
    groups: Tensor | None,
    centre: Tensor | None,
    weight: Tensor | None,
    beta: float,
    scale: float,
    adaptive: bool,
    kl_weight: float,
    kl_floor: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    run: Callable[..., tuple[Tensor, Tensor, Tensor]] = reference_forward
    if backend == "cpp":
        from mtedit_fast.ops import _cpp

        run = partial(reference_forward, moments=_cpp.velocity_moments)
    if backend == "triton":
        from mtedit_fast.kernels import crd_loss as triton

        run = triton.crd_loss_forward
    return run(v_theta, v_old, v_target, v_ref, r, groups, centre, weight, beta, scale, adaptive, kl_weight, kl_floor)


def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    r = args[4]
    return r.new_empty(()), r.new_empty(3, r.shape[0]), r.new_empty(3, r.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    v_theta, _, v_target, v_ref, *others = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(v_theta, None, v_target, v_ref, output[2])
    ctx.backend = others[-1]


_op = Operator("crd_loss", _forward, _fake, keeps_memory=True)
_op.differentiate(shared.backward, _setup_context, inputs=1)
