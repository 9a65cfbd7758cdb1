"""Attention maps of text tokens over an image, collected while a denoiser runs and without forming attention."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Self

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mtedit_fast.ops import attention_columns

__all__ = ["AttentionMaps"]


class AttentionMaps:
    """What image tokens attend to a few text tokens in the forward inside the `with` block.

        with AttentionMaps(editor.transformer, columns, (height, width)) as maps:
            editor.velocity(latents, timestep, condition)
            loss = f(maps.mean())  # [B, C, height, width], with gradient where the forward has it

    The model runs unchanged, through whatever attention processors and back ends it has: forward hooks take queries and
    keys as they enter attention, and `attention_columns` computes the wanted columns of its softmax a second time. They
    come off with the block, whatever happens in it. In joint attention (FLUX.1, FLUX.2, Qwen-Image) the softmax is over
    text, image and references, and the queries are the edited image's; in Stable Diffusion 1.x and 2.x it is the
    cross-attention's, over the text. One conditional branch runs: guidance's other one would need columns of its own.

    With gradient checkpointing take the gradient inside the block, since the backward runs the layers again.

    Args:
        model: a `FluxTransformer2DModel`, `Flux2Transformer2DModel`, `QwenImageTransformer2DModel` or
            `UNet2DConditionModel`.
        columns: [C] or [B, C] int64, indices of text tokens.
        grid: (height, width) of the maps in tokens. A U-Net has several: its layers of this one are taken.
        layers: which attentions, counted through the model from 0 (double blocks, then single ones); None: all.

    Raises:
        TypeError: a model without such attentions.
        ValueError: a compiled model, columns or layers that are not there, or queries and keys fused into one matrix.
    """

    def __init__(self, model: Any, columns: Tensor, grid: tuple[int, int], *, layers: Collection[int] | None = None):
        _refuse_compiled(model)
        self.is_unet = isinstance(model, UNet2DConditionModel)
        attentions = _cross_attentions(model) if self.is_unet else _joint_attentions(model)
        if not attentions:
            raise TypeError(
                "model: expected a FLUX.1, FLUX.2 or Qwen-Image transformer or a UNet2DConditionModel with "
                f"cross-attention, got {type(model).__name__}"
            )
        chosen = range(len(attentions)) if layers is None else sorted(set(layers))
        if not chosen or chosen[0] < 0 or chosen[-1] >= len(attentions):
            raise ValueError(f"layers: expected some of 0 … {len(attentions) - 1}, got {list(chosen)}")
        self.model, self.columns, self.grid = model, columns, grid
        self._attentions = {layer: attentions[layer] for layer in chosen}
        self._handles: list[RemovableHandle] = []
        self._maps: dict[int, Tensor] = {}
        self._seen: set[int] = set()  # query counts of a U-Net's layers
        self._text = 0  # tokens of text in front of a joint sequence

    def __enter__(self) -> Self:
        self._maps.clear()
        self._seen.clear()
        try:
            if not self.is_unet:
                self._handles.append(self.model.register_forward_pre_hook(self._read_text, with_kwargs=True))
            for layer, attention in self._attentions.items():
                self._watch(layer, attention)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def layers(self) -> dict[int, Tensor]:
        """The maps [B, C, height, width] of every layer, averaged over its heads."""
        if not self._maps:
            sizes = f"; the layers have {sorted(self._seen)} queries" if self._seen else ""
            raise ValueError(
                f"maps: expected a forward of the model inside the with block, with layers of {self.grid[0]}×"
                f"{self.grid[1]} queries, got none{sizes}; choose another grid or resolution"
            )
        return {layer: maps.unflatten(1, self.grid).movedim(-1, 1) for layer, maps in sorted(self._maps.items())}

    def mean(self) -> Tensor:
        """[B, C, height, width] fp32, averaged over layers and heads."""
        return torch.stack(list(self.layers().values())).mean(0)

    def _watch(self, layer: int, attention: Any) -> None:
        held: dict[str, Any] = {}

        def keep(name: str) -> Any:
            return lambda module, inputs, output: held.__setitem__(name, output)

        def begin(module: nn.Module, inputs: Any, options: dict[str, Any]) -> None:
            held.clear()
            held.update(options)

        def finish(module: nn.Module, inputs: Any, output: Any) -> None:
            found = (self._cross if self.is_unet else self._joint)(attention, held)
            held.clear()
            if found is not None:
                # A checkpointed layer runs again in the backward: the first result is the one in the graph.
                self._maps.setdefault(layer, found)

        sources = ("to_q", "to_k") if self.is_unet else ("norm_q", "norm_k", "norm_added_k")
        self._handles.append(attention.register_forward_pre_hook(begin, with_kwargs=True))
        for name in sources:
            module = getattr(attention, name, None)
            if module is not None:
                self._handles.append(module.register_forward_hook(keep(name)))
        self._handles.append(attention.register_forward_hook(finish))

    def _read_text(self, model: nn.Module, inputs: Any, options: dict[str, Any]) -> None:
        text = options["encoder_hidden_states"] if "encoder_hidden_states" in options else inputs[1]
        self._text = text.shape[1]

    def _cross(self, attention: Any, held: dict[str, Any]) -> Tensor | None:
        query, key = (held[name].unflatten(-1, (attention.heads, -1)).transpose(1, 2) for name in ("to_q", "to_k"))
        self._seen.add(query.shape[2])
        if query.shape[2] != self.grid[0] * self.grid[1]:
            return None
        if held.get("attention_mask") is not None:
            raise ValueError("encoder_attention_mask: expected None, as Stable Diffusion's pipelines leave it")
        return attention_columns(query, key, self._columns(len(query), key.shape[2]))

    def _joint(self, attention: Any, held: dict[str, Any]) -> Tensor | None:
        if held.get("kv_cache_mode") == "extract":
            return None  # references on their own, before the steps
        query, key, text = held["norm_q"], held["norm_k"], held.get("norm_added_k")
        cos, sin = _real_tables(held["image_rotary_emb"], query.shape[-1])
        length = self._text if text is None else cos.shape[0] - query.shape[1]
        first = length if text is None else 0  # of the image among the queries
        count = self.grid[0] * self.grid[1]
        if text is not None:
            key = torch.cat([text[:, :length], key], dim=1)
        image = slice(length, length + count)
        if query.shape[1] < first + count:
            raise ValueError(f"grid: expected at most {query.shape[1] - first} image tokens, got {self.grid}")
        query = apply_rotary_emb(query[:, first : first + count], (cos[image], sin[image]), sequence_dim=1)
        key = apply_rotary_emb(key, (cos, sin), sequence_dim=1)
        if held.get("kv_cache_mode") == "cached":
            key = torch.cat([key, held["kv_cache"].get()[0]], dim=1)
        return attention_columns(
            query.transpose(1, 2),
            key.transpose(1, 2),
            self._columns(len(query), length),
            mask=_key_mask(held, key.shape[1]),
        )

    def _columns(self, batch: int, text: int) -> Tensor:
        if self.columns.ndim == 2 and len(self.columns) != batch:
            raise ValueError(
                f"columns: expected [C] or [B, C] for a forward of {batch} rows, got {list(self.columns.shape)}; run "
                "the conditional branch alone"
            )
        if not self.columns.is_cuda and self.columns.numel() and int(self.columns.max()) >= text:
            raise ValueError(f"columns: expected text tokens 0 … {text - 1}, got {int(self.columns.max())}")
        return self.columns


def _cross_attentions(model: nn.Module) -> list[Any]:
    found: list[Any] = [module for name, module in model.named_modules() if name.endswith("attn2")]
    if any(module.fused_projections for module in found):
        raise ValueError("model: expected separate projections; call unfuse_qkv_projections() first")
    return found


def _joint_attentions(model: Any) -> list[Any]:
    blocks = [*getattr(model, "transformer_blocks", ()), *getattr(model, "single_transformer_blocks", ())]
    return [block.attn for block in blocks if hasattr(getattr(block, "attn", None), "norm_q")]


def _refuse_compiled(model: Any) -> None:
    modules = model.modules() if isinstance(model, nn.Module) else ()
    if hasattr(model, "_orig_mod") or any(module._compiled_call_impl is not None for module in modules):
        raise ValueError(
            "model: expected one that runs eagerly, got a compiled one, whose layers hooks do not see; load it without "
            "compile_transformer"
        )


def _real_tables(rotary: tuple[Tensor, ...], width: int) -> tuple[Tensor, Tensor]:
    """(cos, sin) [L, width] of a joint sequence: FLUX's as they are, Qwen's from one entry per pair."""
    if len(rotary) > 2:
        raise ValueError("condition: expected the conditional branch alone, got two; make it with guidance_scale=1")
    cos, sin = rotary
    if cos.is_complex():  # Qwen's stock forward: image, text
        joint = torch.cat([sin, cos])
        cos, sin = joint.real, joint.imag
    pairs = width // cos.shape[-1]
    return cos.repeat_interleave(pairs, dim=-1), sin.repeat_interleave(pairs, dim=-1)


def _key_mask(held: dict[str, Any], keys: int) -> Tensor | None:
    """[B, Lk] of the keys that count."""
    mask, text = held.get("attention_mask"), held.get("encoder_hidden_states_mask")
    if mask is None:
        if text is None:
            return None
        mask = torch.cat([text, text.new_ones(len(text), keys - text.shape[1])], dim=1)
    mask = mask.bool() if mask.ndim == 2 else mask
    if mask.dtype != torch.bool or mask.shape[-1] != keys or mask.numel() != mask.shape[0] * keys:
        raise ValueError(f"attention_mask: expected bool [B, 1, 1, {keys}], got {mask.dtype} {list(mask.shape)}")
    return mask.reshape(-1, keys)
