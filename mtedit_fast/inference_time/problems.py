"""What linear inverse problems need around their solver: measurements as pictures, plain reconstructions, PSNR."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mtedit_fast.inference_time.flow_priors import FlowPriorSettings
from mtedit_fast.onestep import Blur, Inpainting, MultiCoilMRI, Operator, SuperResolution
from mtedit_fast.onestep.operators import PartialFourier

NEAR = Blur(9, 1.0)
"""What counts as near a missing pixel."""


def recommended(**others: Any) -> FlowPriorSettings:
    """Settings for few steps without noise and trace, found on the playground; `others` as `FlowPriorSettings`' own.

    A fresh Adam's first step is η times the gradient's sign, so K η is about the length of the flow's step, 1 / N.
    """
    few: dict[str, Any] = {"steps": 30, "inner_steps": 4, "step_size": 0.01, "data_weight": 1e3}
    few |= {"trace_weight": 0.0, "probes": 0, "noise": 0.0}
    return FlowPriorSettings(**few | others)


def as_picture(operator: Operator, y: Tensor) -> Tensor:
    """Measurements [B, ...] as images [B, C, H, W]: k-space as what the adjoint makes of it, others as they are.

    Raises:
        ValueError: measurements that are no images, of an operator without an adjoint of its own.
    """
    return y if y.ndim == 4 else adjoint(operator, y)


def adjoint(operator: Operator, y: Tensor) -> Tensor:
    """A^H y; ValueError where the operator has none: the base class's belongs to the identity."""
    kind = type(operator)
    if kind.__call__ is not Operator.__call__ and kind.adjoint is Operator.adjoint:
        raise ValueError(f"operator: {kind.__name__} has no adjoint; define adjoint(y), with ⟨A x, y⟩ = ⟨x, A^H y⟩")
    return operator.adjoint(y)


def plain_reconstruction(operator: Operator, y: Tensor) -> Tensor:
    """Images [B, C, H, W] without a prior: bicubic enlargement, missing pixels from those near them, A^H y of k-space.

    A missing pixel is the Gaussian-weighted mean (1 pixel wide) of the measured ones around it; where there is none
    near, the mean of all that were measured. What is blurred stays so.
    """
    if isinstance(operator, SuperResolution):
        small = y[..., :: operator.factor, :: operator.factor] if operator.keep_size else y
        return F.interpolate(small, scale_factor=float(operator.factor), mode="bicubic").clamp(-1, 1)
    if isinstance(operator, Inpainting):
        assert operator.mask is not None
        mask = operator.mask.to(y).expand_as(y)
        weight = NEAR(mask)
        mean = y.sum((2, 3), keepdim=True) / mask.sum((2, 3), keepdim=True).clamp(min=1)
        near = torch.where(weight > 1e-4, NEAR(y) / weight.clamp(min=1e-4), mean)
        return torch.where(mask > 0, y, near)
    if isinstance(operator, MultiCoilMRI | PartialFourier):
        return operator.adjoint(y)
    return y if y.ndim == 4 else adjoint(operator, y)


def psnr(images: Tensor, clean: Tensor) -> Tensor:
    """[B] in dB, at most 60; images [B, C, H, W] clamped to [-1, 1]; two channels: complex, of magnitudes up to 1."""
    if images.shape != clean.shape:
        raise ValueError(f"images: expected the clean images' {list(clean.shape)}, got {list(images.shape)}")
    if images.shape[1] == 2:
        error = (images - clean).square().sum(1).flatten(1).mean(1)
    else:
        error = (images.clamp(-1, 1) - clean).square().flatten(1).mean(1) / 4
    return -10 * error.clamp(min=1e-6).log10()
