"""How much device memory a training run takes: of one forward as autograd keeps it, and of the whole before it runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Column, Table
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mtedit_fast.editors import KleinKVEditor
from mtedit_fast.training.config import RunConfig, TrainConfig
from mtedit_fast.training.meta_model import MetaModel, model_path
from mtedit_fast.training.public_models import describe
from mtedit_fast.training.update import Chunk, Objective, UpdateBatch, UpdateStats

MARGIN = 0.1
"""Share of the estimate added to it: the allocator's fragmentation, workspaces, the device's context."""
BYTES = {"fp32": 4, "bf16": 2}


def graph_bytes(forward: Callable[[], Any]) -> int:
    """Bytes that the graph of `forward()` keeps for its backward, parameters aside, each storage counted once.

    Holds on any device, "meta" included: it counts what autograd saves, not what an allocator reserves. With
    activation checkpointing that is the inputs of the blocks; the block being recomputed comes on top.
    """
    storages: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        owner = tensor._base if tensor._base is not None else tensor  # a linear layer saves its weight's transpose
        if not isinstance(owner, nn.Parameter):
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage.nbytes()  # the address would be 0 for every meta tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        output = forward()
    del output
    return sum(storages.values())


def rows_within(gib: float, objective: Objective, batch: UpdateBatch) -> int:
    """How many samples of `batch` may go into one forward, so that its graph keeps at most `gib` GiB; at least 1."""
    device = batch.keep.device
    if len(batch.keep) == 0:
        return 1
    sizes = []
    for count in (1, 2):
        rows = torch.zeros(count, dtype=torch.int64, device=device)
        chunk = Chunk(rows, 0, rows)
        sizes.append(graph_bytes(partial(objective.loss, batch, chunk, UpdateStats())))
    per_row = max(sizes[1] - sizes[0], 1)
    return max(1, int((gib * 2**30 - (sizes[0] - per_row)) // per_row))


class _Live(TorchDispatchMode):
    """Bytes of the storages made under it that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in known and storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self._freed, storage._cdata)
                    self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        return result

    def _freed(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


def peak_bytes(forward: Callable[[], Any], *, grad: bool = False) -> int:
    """The most bytes of tensors made by `forward()` that were alive at once, on any device; with `grad` it may call
    backward."""
    with torch.set_grad_enabled(grad), _Live() as live:
        forward()
    return live.peak


class _Fused(torch.autograd.Function):
    """Attention that keeps what a fused kernel keeps: its inputs, its output and a number per query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class FusedAttention(TorchFunctionMode):
    """Shapes of fused attention on the meta device, where torch would write the matrix of probabilities out."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query, key, value = [*args, *(kwargs or {}).values()][:3]
            return _Fused.apply(query, key, value)
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on each GPU by what they are for: held throughout, or at one time in the rollout or in the update."""

    held: dict[str, int]
    rollout: dict[str, int]
    update: dict[str, int]

    @property
    def total(self) -> int:
        """The larger phase with what is held and the margin."""
        phases = max(sum(self.rollout.values()), sum(self.update.values()))
        return round((sum(self.held.values()) + phases) * (1 + MARGIN))

    def table(self) -> Table:
        """Every part in GiB."""
        table = Table("GiB on each GPU, estimated", "", Column("", justify="right"))
        for phase in ("held", "rollout", "update"):
            for row, (part, size) in enumerate(getattr(self, phase).items()):
                table.add_row("" if row else phase, part, f"{size / 2**30:.2f}")
        table.add_section()
        table.add_row("total", f"held and the larger phase, and {MARGIN:.0%}", f"{self.total / 2**30:.1f}")
        return table

    def header(self) -> str:
        """One line, as the configurations state it: total, held, rollout, update in GiB."""
        parts = [f"{name} {sum(getattr(self, name).values()) / 2**30:.1f}" for name in ("held", "rollout", "update")]
        return f"{self.total / 2**30:.1f} GiB ({', '.join(parts)}, margin {MARGIN:.0%}) without reward models"


@dataclass(frozen=True)
class _Measured:
    """Bytes of one model under one configuration, wherever its weights lie."""

    weights: int
    root: int  # of them outside the blocks
    blocks: int
    block: int  # largest block's weights
    adapter: int  # elements of one LoRA adapter
    vae: int
    text: int  # of one prompt's conditioning
    graph: int  # kept by a forward with gradient
    work: int  # of the largest block's activations in its backward
    others: int  # a forward of the old policy's and the reference's rows
    sample: int  # the rollout's forward
    decode: int
    tokens: int
    channels: int
    reference_tokens: int
    text_sees_image: bool
    references: int  # budget of the cache of their keys and values


def estimate(config: TrainConfig, gpus: int = 1) -> MemoryEstimate:
    """What `config` takes on each of `gpus` GPUs, with nothing loaded and nothing allocated.

    An open micro-batch counts as one group.

    The transformer and the VAE of `model.path` run on the meta device in the shapes of the run. Reward models are not
    in it, nor is mixed precision (`run.precision`), which keeps some activations in fp32.

    Raises:
        ValueError: gpus < 1, or `model.path` is neither a folder nor a known hub name.
    """
    if gpus < 1:
        raise ValueError(f"gpus: expected at least 1, got {gpus}")
    groups = config.rollout.model_copy(update={"groups_per_iteration": 1})
    measured = _measure(config.model_copy(update={"rollout": groups, "run": RunConfig()}).model_dump_json())
    weights, gathered = measured.weights, {}
    if config.run.sharding == "fsdp2" and gpus > 1:
        weights = -(-weights // gpus)
        gathered = {"gathered weights": measured.root + 2 * measured.block}
    # θ, its gradient, two moments and the average, and the old policy; fp32.
    copies = 6 if config.objective.likelihood_free else 5
    size = BYTES[config.model.dtype]
    held = {
        "transformer": weights,
        "text encoders": describe(model_path(config)).text_parameters * size,
        "VAE": measured.vae,
        "LoRA and optimizer": copies * 4 * measured.adapter,
        "trajectories": _trajectories(config, measured, gpus),
    }
    if config.captures_steps(measured.text_sees_image):
        # What a captured forward computes with and reads is its own, and cached references of the first turn, one for
        # all, are laid out otherwise than those of later ones.
        layouts = 2 if measured.references and config.rollout.turns > 1 else 1
        held["captured forwards"] = layouts * (measured.sample + measured.references)
    if measured.references:
        held["keys and values of references"] = measured.references
    if config.rollout.precision == "fp8":
        held["fp8 copy of the blocks"] = measured.blocks // size
    rollout = gathered | {"largest of forward and decode": max(measured.sample, measured.decode)}
    update = gathered | {"graph": measured.graph, "largest block or forward": max(measured.work, measured.others)}
    return MemoryEstimate(held, rollout, update)


def _trajectories(config: TrainConfig, measured: _Measured, gpus: int) -> int:
    """Bytes of `Trajectories` on one of the GPUs, of the copy that compaction makes, and of what rewards see."""
    rollout, (height, width) = config.rollout, config.data.size
    groups = -(-rollout.groups_per_iteration // gpus)
    state = measured.tokens * measured.channels
    reference = measured.reference_tokens * measured.channels * BYTES[config.model.dtype]
    steps = 0
    if rollout.variant not in ("ode", "dpm2m"):
        steps = rollout.num_steps - 1 if rollout.window is None else rollout.window.size
    states, size = steps + 1 if steps else 0, BYTES[rollout.state_dtype]
    learned = state * (states + 1) * size + reference + 4 * steps  # states and clean
    if config.objective.name == "grpo_guard" and config.exact_replay:
        learned += 4 * steps * state
    kept = learned * (1 if config.exact_replay else 2)
    if config.advantage.credit == "dense_ode":
        kept += states * state * size
    image = 3 * height * width * 4
    rows = groups * rollout.group_size
    texts = rows if measured.text_sees_image else groups
    return rows * (rollout.turns * (kept + image) + image) + texts * rollout.turns * measured.text


@cache
def _measure(dumped: str) -> _Measured:
    config = TrainConfig.model_validate_json(dumped)
    model = MetaModel(config)
    velocity, editor, blocks = model.velocity, model.editor, model.blocks
    weights, in_blocks = _bytes(model.transformer), [_bytes(block) for block in blocks]
    optimizer, objective = config.optimizer, config.objective
    with FusedAttention():
        micro_batch = config.rollout.micro_batch or config.rollout.group_size
        rows = optimizer.forward_rows or micro_batch
        if optimizer.memory_gib is not None:
            rows = max(1, int(optimizer.memory_gib * 2**30 // graph_bytes(partial(velocity, 1))))
        last: dict[type, Callable[[], Any]] = {}  # of each kind of block, as it was called
        hooks = [
            block.register_forward_pre_hook(
                lambda block, args, kwargs: last.update({type(block): partial(block.forward, *args, **kwargs)}),
                with_kwargs=True,
            )
            for block in blocks
        ]
        graph = graph_bytes(partial(velocity, rows))
        for hook in hooks:
            hook.remove()
        work = max(graph_bytes(run) for run in last.values())
        last.clear()
        old = objective.likelihood_free and (objective.old_decay != "on_policy" or optimizer.updates_per_iteration > 1)
        copies = old + (objective.kl_weight > 0)
        others = peak_bytes(partial(velocity, copies * rows)) if copies else 0
        sample = peak_bytes(partial(velocity, micro_batch))
        decode = peak_bytes(partial(model.decode, micro_batch))
    return _Measured(
        weights=weights,
        root=weights - sum(in_blocks),
        blocks=sum(in_blocks),
        block=max(in_blocks),
        adapter=sum(parameter.numel() for parameter in model.adapters.parameters),
        vae=_bytes(model.vae.requires_grad_(False)),
        text=sum(value.nbytes for value in model.text(1).values()),
        graph=graph,
        work=work,
        others=others,
        sample=sample,
        decode=decode,
        tokens=model.tokens,
        channels=model.channels,
        reference_tokens=model.reference_tokens,
        text_sees_image=editor.text_sees_image,
        references=editor.references.budget if isinstance(editor, KleinKVEditor) else 0,
    )


def _bytes(module: nn.Module) -> int:
    """Without the adapter, which alone is trained."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()) if not tensor.requires_grad)
