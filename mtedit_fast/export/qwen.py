"""Qwen-Image-Edit's transformer as a graph, and in the editor's place of it.

The graph has one branch, whose text all counts: positions come in as real cosines and sines, text and image apart, and
there is no mask, so attention keeps its fast kernels. Rows with texts of different length are different calls.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope
from torch import Tensor, nn

from mtedit_fast.editors.qwen_transformer import take_tensors

from .modules import Exportable, Sizes, float_dtype
from .ports import Port, Range


def qwen_transformer(model: Any, *, text_tokens: int = 512, multiple: int = 16) -> Exportable:
    """`QwenImageTransformer2DModel` with tensors only, see `editors.qwen_transformer.take_tensors`, which it applies.

    text_tokens: most of one prompt (with its image, where the text encoder sees it), in profiles.
    multiple: pixels per token side, VAE factor × 2.
    """
    take_tensors(model)
    config, dtype = model.config, float_dtype(model)
    half = config.attention_head_dim // 2
    inputs = [
        Port("hidden_states", dtype, ("batch", "sequence", config.in_channels)),
        Port("encoder_hidden_states", dtype, ("batch", "text", config.joint_attention_dim)),
        Port("timestep", dtype, ("batch",)),
        *(
            Port(f"{part}_{wave}", "float32", (length, half))
            for part, length in (("text", "text"), ("image", "sequence"))
            for wave in ("cos", "sin")
        ),
    ]
    if model.zero_cond_t:
        inputs.append(Port("modulate_index", "int64", (1, "sequence")))
    channels = config.patch_size**2 * (config.out_channels or config.in_channels)
    return Exportable(
        module=model,
        call=lambda **tensors: _call(model, **tensors),
        inputs=tuple(inputs),
        outputs=(Port("velocity", dtype, ("batch", "sequence", channels)),),
        sizes=_sizes(text_tokens, multiple),
        example={"batch": 2, "sequence": 24, "text": 7},
        fused_attention=True,
    )


def _call(
    model: Any, text_cos: Tensor, text_sin: Tensor, image_cos: Tensor, image_sin: Tensor, **tensors: Tensor
) -> Tensor:
    for table, states in ((text_cos, "encoder_hidden_states"), (image_cos, "hidden_states")):
        torch._check(table.shape[0] == tensors[states].shape[1])  # one size to the tracer
    cos, sin = torch.cat([text_cos, image_cos]), torch.cat([text_sin, image_sin])
    return model(**tensors, rotary_cos=cos, rotary_sin=sin)[0]


def _sizes(text_tokens: int, multiple: int) -> Sizes:
    def sizes(height: int, width: int, references: int) -> dict[str, int | Range]:
        tokens = (height // multiple) * (width // multiple)
        return {"sequence": (1 + references) * tokens, "text": (1, max(1, text_tokens // 4), text_tokens)}

    return sizes


class QwenTransformer(nn.Module):
    """An exported Qwen transformer behind `editors.qwen_transformer.forward_tensors`' call.

    Branches of guidance, and rows whose texts differ in length, go through the graph one after another. Which rows
    those are is read from a mask once, and a mask stays for a turn.

    It has the table of positions that `QwenEditor` asks a transformer for.

    Args:
        module: of `qwen_transformer`, with the transformer's configuration.
    """

    def __init__(self, module: Any):
        super().__init__()
        self.module, self.config = module, module.config
        self.zero_cond_t = bool(self.config.get("zero_cond_t", False))
        self.pos_embed = QwenEmbedRope(theta=10000, axes_dim=list(self.config["axes_dims_rope"]), scale_rope=True)
        self._masks: list[tuple[Tensor, list[int]]] = []

    @property
    def device(self) -> torch.device:
        return self.module.device

    @property
    def dtype(self) -> torch.dtype:
        return self.module.dtype

    def set_lora(self, tensors: Any, scaling: float = 1.0) -> None:
        """See `ExportedModule.set_lora`."""
        self.module.set_lora(tensors, scaling)

    @torch.no_grad()
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        rotary_cos: Tensor,
        rotary_sin: Tensor,
        attention_mask: Tensor | None = None,
        negative_rotary_cos: Tensor | None = None,
        negative_rotary_sin: Tensor | None = None,
        negative_attention_mask: Tensor | None = None,
        modulate_index: Tensor | None = None,
    ) -> tuple[Tensor]:
        """The prediction [b, N + R·M, C]; arguments as in `forward_tensors`."""
        tables = [(rotary_cos, rotary_sin, attention_mask)]
        if negative_rotary_cos is not None and negative_rotary_sin is not None:
            tables.append((negative_rotary_cos, negative_rotary_sin, negative_attention_mask))
        sequence, rows = hidden_states.shape[1], len(hidden_states) // len(tables)
        found: list[Tensor] = []
        for branch, (cos, sin, mask) in enumerate(tables):
            texts = cos.shape[0] - sequence
            lengths = [texts] * rows if mask is None else self._lengths(mask, sequence)
            start = 0
            while start < rows:
                stop = start + 1
                while stop < rows and lengths[stop] == lengths[start]:
                    stop += 1
                part, text = slice(branch * rows + start, branch * rows + stop), lengths[start]
                inputs = {
                    "hidden_states": hidden_states[part],
                    "encoder_hidden_states": encoder_hidden_states[part, :text],
                    "timestep": timestep[part],
                    "text_cos": cos[:text],
                    "text_sin": sin[:text],
                    "image_cos": cos[texts:],
                    "image_sin": sin[texts:],
                    "modulate_index": modulate_index,
                }
                found.append(self.module(**inputs)[0])
                start = stop
        return (torch.cat(found),)

    def _lengths(self, mask: Tensor, sequence: int) -> list[int]:
        """Tokens of every row's text."""
        for known, lengths in self._masks:
            if known is mask:
                return lengths
        counts = mask[:, 0, 0, : mask.shape[-1] - sequence].sum(1).tolist()
        self._masks = [*self._masks[-1:], (mask, counts)]  # one per branch
        return counts
