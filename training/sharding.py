"""Frozen weights cut over ranks (FSDP2), for models that do not fit on one device beside their activations."""

from __future__ import annotations

import warnings

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mtedit_fast.training.distributed import process


def shard(model: nn.Module, device: torch.device | str, *, ranks: int | None = None) -> None:
    """Put `model` on `device` in place, its frozen weights cut over `ranks` ranks and gathered block by block in use.

    Between forwards a rank holds 1/`ranks` of the frozen weights; in a forward or backward, one or two blocks more.
    Adapters and other trainable parameters stay whole plain tensors on every rank (they are small): their
    gradients go through `sum_gradients`, and optimizer state, averages and checkpoints know nothing of the sharding.

    Load the model on the CPU, add every adapter, compile its blocks, then shard, then make the optimizer. All ranks of
    a shard must then run equally many forwards with and without gradient, in the same order: those with less to
    do run a forward of weight 0.

    Args:
        model: of diffusers or transformers, whose `_no_split_modules` or `_repeated_blocks` name the blocks.
        ranks: consecutive ranks that share one copy, a divisor of their number; None: all. With the GPUs of a node
            no weight crosses the network.

    Raises:
        ValueError: a model without known blocks or frozen weights, or `ranks` that does not divide the world.
    """
    _, world = process()
    ranks = world if ranks is None else ranks
    if ranks < 1 or world % ranks:
        raise ValueError(f"ranks: expected a divisor of the number of ranks ({world}), got {ranks}")
    names = set(getattr(model, "_no_split_modules", None) or getattr(model, "_repeated_blocks", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if not blocks:
        raise ValueError(
            f"model: expected blocks named by _no_split_modules or _repeated_blocks, got {type(model).__name__} "
            f"with {sorted(names) or 'neither'}"
        )
    whole = _adapters(model) | {parameter for parameter in model.parameters() if parameter.requires_grad}
    if all(parameter in whole for block in blocks for parameter in block.parameters()):
        raise ValueError("model: expected frozen weights to shard, got blocks that are trainable throughout")
    if ranks == 1:
        model.to(device)
        return
    # A warning for callers who change a block's output in place; the editors do not.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(torch.device(device).type, (world // ranks, ranks), mesh_dim_names=("copy", "shard"))
    for module in (*blocks, model):
        # The frozen weights have no gradient to reduce, so copies of a shard need not know of each other.
        fully_shard(module, mesh=mesh["shard"], ignored_params=whole, reshard_after_forward=True)
    for parameter in whole:
        parameter.data = parameter.data.to(device)


def _adapters(model: nn.Module) -> set[nn.Parameter]:
    """Parameters of every peft adapter, the frozen ones too."""
    return {
        parameter
        for module in model.modules()
        if isinstance(module, BaseTunerLayer)
        for name, parameter in module.named_parameters()
        if not name.startswith("base_layer.")
    }
