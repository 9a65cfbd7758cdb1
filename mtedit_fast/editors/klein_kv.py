"""FLUX.2-Klein-KV behind the Editor interface: keys and values of references computed once for everyone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import Flux2KleinKVPipeline
from diffusers.models.transformers.transformer_flux2 import Flux2KVCache, Flux2KVLayerCache
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.utils._pytree import register_pytree_node

from mtedit_fast.editors.base import Condition, TextConditioning
from mtedit_fast.editors.klein import KleinEditor, reference_times
from mtedit_fast.editors.reference_cache import OneWeights, ReferenceCache, WeightPlan

__all__ = ["KleinKVEditor"]


class KleinKVEditor(KleinEditor):
    """Adapter for `Flux2KleinKVPipeline` (FLUX.2-klein-9b-kv): the same numbers as the stock pipeline.

    Its references see only themselves, at time 0. Their keys and values depend on nothing but the weights, so they are
    extracted once per ordered set of references and version of the weights, and shared by all members of a group, all
    steps, all prompts, the turns that keep the reference and the replay; the pipeline extracts them in the first
    step of every call, for every sample. With T tokens of text and state, M of references and width d, a block takes
    (multiply-add = 2; projections and gated feed-forward 26d² per token, attention 4d per pair of tokens)

        full(T, M) = 26d²(T + M) + 4d(T + M)²        references in the sequence of every step (Klein)
        cached(T, M) = 26d²T + 4dT(T + M)            a step on cached keys and values
        extraction(M) = 26d²M + 4dM²

    so that n steps of G members gain nG·full / (nG·cached + extraction) over Klein, and
    (nG·cached + G·extraction) / (nG·cached + extraction) over the pipeline.

    In training, gradients reach the weights through the references in `backward_references`, which must follow
    the last backward of an optimizer step (see `ReferenceCache`). Guidance is distilled, so its scale is ignored.

    Args:
        cache_bytes: budget of the reference cache, `references`. One of 4,096 tokens takes 2.1 GB of the 9B model in
            bf16, its waiting gradient (fp32) twice that. The default, 16 GiB, holds seven, or thirty of 1,024 tokens.
    """

    pipelines = (Flux2KleinKVPipeline,)
    example = "black-forest-labs/FLUX.2-klein-9b-kv"

    def __init__(
        self,
        pipeline: Any,
        *,
        max_sequence_length: int = 512,
        negative_prompt: str | None = None,
        cache_bytes: int = 16 * 2**30,
    ):
        super().__init__(pipeline, max_sequence_length=max_sequence_length, negative_prompt=negative_prompt)
        self._one_weights = OneWeights(pipeline.transformer)
        self.references = ReferenceCache(self._extract, self._plan, cache_bytes)

    def condition(
        self,
        references: Tensor,
        text: TextConditioning,
        *,
        height: int,
        width: int,
        guidance_scale: float = 1.0,
        reference_size: tuple[int, int] | None = None,
    ) -> Condition:
        """Extracts what is not in the cache; waits for the device once, to compare contents.

        Raises:
            ValueError: latents that are not those of whole references of `reference_size`, more of them than
                `max_references`, or a transformer whose weights are spread over processes.
            RuntimeError: the weights changed while gradients waited for `backward_references`.
        """
        size = reference_size or (height, width)
        count = self._reference_count(references, *size)
        transformer = self.pipeline.transformer
        if isinstance(transformer, FSDPModule):
            raise ValueError(
                "transformer: expected one kept whole on every device, got one sharded by FSDP, whose processes would "
                "have to run equally many extractions; set run.sharding to none (the 9B model is 18 GB in bf16)"
            )
        _keep_arguments(transformer)
        runs = self.references.runs(references.to(self.dtype), (count, size))
        inputs = self._inputs(text["embeds"], self._image_ids((0, (height, width))))
        inputs |= {
            "kv_cache": _RowReferences(
                runs,
                doubles=len(transformer.transformer_blocks),
                lazy=transformer.gradient_checkpointing and torch.is_grad_enabled(),
            ),
            "kv_cache_mode": "cached",
        }
        return Condition(None, inputs)

    def invalidate(self) -> None:
        """Forget all keys and values. Needed where neither torch nor `Adapters` sees the change: `parameter.data`."""
        self.references.clear()

    def backward_references(self) -> None:
        """Carry the gradients that arrived at keys and values on to the weights: one extraction per reference."""
        self.references.backward()

    def _plan(self) -> WeightPlan:
        return getattr(self.pipeline.transformer, "weight_plan", None) or self._one_weights

    def _extract(self, latents: Tensor, grid: tuple[int, tuple[int, int]]) -> list[Tensor]:
        """Keys and values [1, R·M, heads, d] of every block, double blocks first, of latents [1, R·M, C].

        References do not see text and state, of which one token each stands in.
        """
        zeros = latents.new_zeros(1, 1, latents.shape[2])
        embeds = latents.new_zeros(1, 1, self.config.joint_attention_dim)
        one_token = (self._multiple, self._multiple)
        # The forward itself: a compiled one cannot keep what blocks store in the cache under checkpointing.
        _, cache = self.transformer.forward(
            hidden_states=torch.cat([latents, zeros], dim=1),
            timestep=latents.new_zeros(1),
            return_dict=False,
            kv_cache_mode="extract",
            num_ref_tokens=latents.shape[1],
            **self._inputs(embeds, self._image_ids(*reference_times(*grid), (0, one_token))),
        )
        return [tensor for layer in (*cache.double_block_caches, *cache.single_block_caches) for tensor in layer.get()]


class _RowReferences(Flux2KVCache):
    """The keys and values of every row of a batch, brought together block by block.

    Args:
        runs: the tensors of the references, each with the number of rows next to each other that share them.
        doubles: number of double blocks.
        lazy: bring them together in the block, so that a checkpointed one does not keep them for its backward.
            Otherwise before it, which gives compiled blocks one tensor whatever the rows are.
    """

    def __init__(self, runs: list[tuple[list[Tensor], int]], doubles: int, lazy: bool):
        # Not the stock constructor, which makes a layer of each block.
        self.runs, self.doubles, self.lazy = runs, doubles, lazy
        self.num_ref_tokens = runs[0][0][0].shape[1]

    def get_double(self, layer_idx: int) -> Flux2KVLayerCache:
        layer = _Layer([(tensors[2 * layer_idx], tensors[2 * layer_idx + 1], count) for tensors, count in self.runs])
        return layer if self.lazy else layer.resolved()

    def get_single(self, layer_idx: int) -> Flux2KVLayerCache:
        return self.get_double(self.doubles + layer_idx)


# For whoever copies the tensors of a condition, or compares their layout.
register_pytree_node(
    _RowReferences,
    lambda cache: (
        [tensors for tensors, _ in cache.runs],
        ([count for _, count in cache.runs], cache.doubles, cache.lazy),
    ),
    lambda tensors, rest: _RowReferences(list(zip(tensors, rest[0], strict=True)), *rest[1:]),
)


class _Layer(Flux2KVLayerCache):
    """One block's, in runs of (keys, values, rows that share them)."""

    def __init__(self, runs: list[tuple[Tensor, Tensor, int]]):
        super().__init__()
        self.runs = runs

    def get(self) -> tuple[Tensor, Tensor]:
        keys = [key.expand(count, -1, -1, -1) for key, _, count in self.runs]
        values = [value.expand(count, -1, -1, -1) for _, value, count in self.runs]
        if len(self.runs) == 1:
            return keys[0], values[0]
        return torch.cat(keys), torch.cat(values)

    def resolved(self) -> Flux2KVLayerCache:
        layer = Flux2KVLayerCache()
        layer.store(*self.get())
        return layer


def _keep_arguments(transformer: Any) -> None:
    """Let checkpointed blocks keep their own copy of the dictionary that the transformer's forward hands to them.

    The forward writes each block's keys and values into the same one, so a block that is run again in the backward
    would read those of the last block.
    """
    checkpoint = transformer._gradient_checkpointing_func
    if not transformer.gradient_checkpointing or isinstance(checkpoint, _Checkpoint):
        return
    transformer._gradient_checkpointing_func = _Checkpoint(checkpoint)


class _Checkpoint:
    def __init__(self, checkpoint: Callable[..., Any]):
        self.checkpoint = checkpoint

    def __call__(self, block: Any, *arguments: Any) -> Any:
        return self.checkpoint(block, *(dict(each) if isinstance(each, dict) else each for each in arguments))
