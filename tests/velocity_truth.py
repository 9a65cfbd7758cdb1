"""DiffusionNFT's and CRD's losses with three velocities and x̂±, differentiated by autograd, in any dtype: in fp64 the
truth, in fp32 what PyTorch makes of it."""

from typing import NamedTuple

import torch
from op_backends import DEVICES
from torch import Tensor


class Velocities(NamedTuple):
    theta: Tensor
    old: Tensor
    target: Tensor
    ref: Tensor
    clean: Tensor
    noise: Tensor


def velocities(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Velocities:
    """v_theta a little off v_old and v_ref; v* = noise − clean, all in `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    clean, noise, error, change, drift = (torch.randn(shape, generator=generator) for _ in range(5))
    clean, noise = clean.to(dtype), noise.to(dtype)
    target = noise - clean
    old = target.float() + 0.5 * error
    theta = old + 0.2 * change
    return Velocities(theta.to(dtype), old.to(dtype), target, (old + 0.3 * drift).to(dtype), clean, noise)


def rows(batch: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """t, r and weight, each [B]."""
    generator = torch.Generator().manual_seed(seed)
    t, r, weight = torch.rand(3, batch, generator=generator)
    return t, r, weight


def gradient(function, v_theta: Tensor, backend: str, *others, **options):
    """The op's output and the gradient of its loss, computed on the back end's device, moved back."""
    device = DEVICES[backend]

    def moved(value):
        return value.to(device) if isinstance(value, Tensor) else value

    leaf = v_theta.detach().clone().to(device).requires_grad_()
    options = {key: moved(value) for key, value in options.items()}
    out = function(leaf, *map(moved, others), backend=backend, **options)
    (grad,) = torch.autograd.grad(out.loss, leaf)
    return type(out)(*(value if value is None else value.detach().cpu() for value in out)), grad.cpu()


def _mean(values: Tensor) -> Tensor:
    return values.mean(dim=tuple(range(1, values.ndim)), keepdim=True)


def textbook_nft(
    v: Velocities,
    t: Tensor,
    r: Tensor,
    dtype: torch.dtype,
    *,
    beta: float = 1.0,
    scale: float = 5.0,
    weight: Tensor | None = None,
    kl_weight: float = 0.0,
    old_is_theta: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss [], gradient to v_theta, policy [B] and kl [B] in `dtype`. x_t is built from clean and noise."""
    theta, old, _, ref, clean, noise = (tensor.to(dtype) for tensor in v)
    theta = theta.detach().requires_grad_()
    old = theta.detach() if old_is_theta else old
    t, r = t.to(dtype), r.to(dtype)
    column = t.view(-1, *[1] * (theta.ndim - 1))
    noisy = (1 - column) * clean + column * noise
    policy = torch.zeros_like(t)
    positive, negative = beta * theta + (1 - beta) * old, (1 + beta) * old - beta * theta
    for share, velocity in ((r, positive), (1 - r, negative)):
        error = noisy - column * velocity - clean
        width = _mean(error.detach().abs()).clamp(min=1e-5)
        policy = policy + share / beta * scale * _mean(error**2 / width).flatten()
    kl = _mean((theta - ref) ** 2).flatten()
    each = policy + kl_weight * kl
    loss = each.mean() if weight is None else (weight.to(dtype) * each).sum()
    (grad,) = torch.autograd.grad(loss, theta)
    return loss.detach(), grad, policy.detach(), kl.detach()


def textbook_crd(
    v: Velocities,
    r: Tensor,
    groups: Tensor,
    dtype: torch.dtype,
    *,
    beta: float = 1.0,
    scale: float = 5.0,
    weight: Tensor | None = None,
    adaptive: bool = True,
    kl_weight: float = 0.0,
    kl_floor: float | None = None,
    old_is_theta: bool = False,
    through_centre: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss [], gradient to v_theta, policy, implicit reward and kl [B], in `dtype`."""
    theta, old, target, ref, _, _ = (tensor.to(dtype) for tensor in v)
    theta = theta.detach().requires_grad_()
    old = theta.detach() if old_is_theta else old
    r = r.to(dtype)
    implicit = torch.zeros_like(r)
    for sign, velocity in ((-1, theta), (1, old)):
        error = velocity - target
        width = _mean(error.detach().abs()).clamp(min=1e-5) if adaptive else 1.0
        implicit = implicit + sign * _mean(error**2 / width).flatten()
    residual = torch.zeros_like(r)
    for group in groups.unique():
        inside = groups == group
        average = implicit[inside].mean()
        average = average if through_centre else average.detach()
        residual = torch.where(inside, beta * (implicit - average) - (r - r[inside].mean()), residual)
    policy = scale / beta * residual**2
    kl = _mean((theta - ref) ** 2).flatten()
    kl_floor = kl_weight if kl_floor is None else kl_floor
    each = policy + (kl_floor + r * (kl_weight - kl_floor)) * kl
    loss = each.mean() if weight is None else (weight.to(dtype) * each).sum()
    (grad,) = torch.autograd.grad(loss, theta)
    return loss.detach(), grad, policy.detach(), implicit.detach(), kl.detach()
