"""What the ops on samples [B, ...] share: a row's sum, whatever the others, and which rows are not finite."""

import torch
from torch import Tensor
from torch.nn.functional import pad


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
