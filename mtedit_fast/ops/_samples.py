"""What the ops on samples [B, ...] share: checks, and a sample's sum, whatever the others."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad


def check_samples(optional: Sequence[str] = (), **tensors: Tensor | None) -> None:
    """[B, ...] floating-point tensors of one shape on one device, the first's; of `optional`, those that are None are
    skipped.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    first, pattern = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor is None and name in optional:
            continue
        if not isinstance(tensor, Tensor) or not tensor.dtype.is_floating_point:
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a floating-point tensor, got {got}")
        if name == first and (tensor.ndim < 2 or 0 in tensor.shape[1:]):
            raise ValueError(f"{name} must be [B, ...] with elements in every sample, got {list(tensor.shape)}")
        assert pattern is not None
        if tensor.shape != pattern.shape:
            raise ValueError(f"{name} must have {first}'s shape {list(pattern.shape)}, got {list(tensor.shape)}")
        if tensor.device != pattern.device:
            raise ValueError(f"{name} must be on {first}'s device {pattern.device}, got {tensor.device}")


def row_sum(values: Tensor) -> Tensor:
    """[B, D] -> [B]. In fixed tiles, so that a row's sum does not depend on the batch or on the thread count."""
    while values.shape[1] > 1:
        values = pad(values, (0, -values.shape[1] % 1024)).unflatten(1, (-1, 1024)).sum(2)
    return values[:, 0]


def raise_if_not_finite(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        bad = (~torch.isfinite(tensor)).flatten(1).any(1).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"{name} is not finite in samples {bad} of the batch; expected finite values")
