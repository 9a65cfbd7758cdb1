"""Statistics inside groups of any ids and sizes, exact where they must be: a constant group has deviation 0."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GroupMoments:
    """Of P groups and M columns, over the defined (not NaN) members.

    index int64 [B]: the group's row for each member; count [P, M]; lowest [P, M]: the smallest value (inf for none);
    offset [P, M]: mean − lowest; std [P, M], 0 where fewer than two members are defined.
    """

    index: Tensor
    count: Tensor
    lowest: Tensor
    offset: Tensor
    std: Tensor

    @property
    def mean(self) -> Tensor:
        """[P, M], NaN where no member is defined."""
        return (self.lowest + self.offset).masked_fill(self.count == 0, torch.nan)


def group_moments(values: Tensor, groups: Tensor, *, unbiased: bool = False) -> GroupMoments:
    """Moments of `values` [B, ...] (columns flattened to M) in groups int64 [B] of any ids, in fp64.

    `unbiased` divides the variance by n − 1. TypeError for ids that are not integers, ValueError for wrong shapes.
    """
    if groups.is_floating_point():
        raise TypeError(f"groups: expected integer ids, got {groups.dtype}, in which large ids merge; use int64")
    if groups.ndim != 1 or values.ndim < 1 or values.shape[:1] != groups.shape:
        raise ValueError(
            f"values: expected [B, ...] with groups [B], got {list(values.shape)} and {list(groups.shape)}"
        )
    ids, index = groups.unique(return_inverse=True)
    u = values.double().reshape(len(groups), -1)
    defined = ~u.isnan()

    def group_sum(x: Tensor) -> Tensor:  # [B, M] -> [P, M]
        return x.new_zeros(len(ids), x.shape[1]).index_add(0, index, x.masked_fill(~defined, 0.0))

    # Distances from the group's minimum instead of raw values: a constant group is then exactly zero.
    lowest = u.new_full((len(ids), u.shape[1]), torch.inf).scatter_reduce(
        0, index[:, None].expand_as(u), u.masked_fill(~defined, torch.inf), "amin"
    )
    distance = u - lowest[index]
    count = group_sum(defined.double())
    offset = group_sum(distance) / count.clamp_min(1)
    std = (group_sum((distance - offset[index]).square()) / (count - int(unbiased)).clamp_min(1)).sqrt()
    return GroupMoments(index, count, lowest, offset, std)


def group_zscore(
    values: Tensor,
    groups: Tensor,
    *,
    std: str = "group",
    unbiased: bool = False,
    eps: float = 1e-4,
    min_std: float = 0.0,
) -> Tensor:
    """(u − mean_group) / (std + eps) for `values` [B, ...] (each column alone), `groups` int64 [B] of any ids.

    `std="group"` takes the standard deviation of each group, "global" that of the whole batch (flow_grpo's default);
    `unbiased` divides by n − 1 (Dance-GRPO, MixGRPO, there with eps 1e-8). NaN members leave the statistics and get 0,
    and so does a whole group whose own deviation is below `min_std`. A constant group is exactly 0.
    TypeError for ids that are not integers; ValueError for wrong shapes and for a group of one, whose z-score is
    undefined. Computed in fp64, returned so.
    """
    if std not in ("group", "global"):
        raise ValueError(f"std: expected 'group' or 'global', got {std!r}")
    moments = group_moments(values, groups, unbiased=unbiased)
    sizes = moments.index.bincount()
    if (sizes == 1).any():
        lone = groups[sizes[moments.index] == 1][0].item()
        raise ValueError(f"groups: a z-score needs at least 2 members per group, group {lone} has 1; raise group_size")
    u = values.double().reshape(len(groups), -1)
    defined = ~u.isnan()
    centred = u - moments.lowest[moments.index] - moments.offset[moments.index]
    group_std = moments.std[moments.index]
    scale = group_std
    if std == "global":
        total = defined.sum(dim=0).double()
        scale = ((u - u.nanmean(dim=0)).square().nansum(dim=0) / (total - int(unbiased)).clamp_min(1)).sqrt()
    z = (centred / (scale + eps)).masked_fill(~defined | (group_std < min_std), 0.0)
    # eps may be 0: a constant group is 0/0 there, and 0 by definition.
    return z.masked_fill(centred == 0, 0.0).reshape(values.shape)
