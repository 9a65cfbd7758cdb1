"""The transformer of Qwen-Image-Edit, taking as tensors what the stock forward builds anew at every step.

Positions as real cosines and sines, the joint attention mask and 2511's modulation index depend on sizes alone, so a
turn computes them once. Weights, module names and blocks are the stock ones.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

__all__ = ["Grids", "JointAttention", "SequenceTables", "forward_tensors", "take_tensors"]

Grids = tuple[tuple[int, int, int], ...]
"""(frames, rows, columns) of tokens of the edit and of each reference, in the order of the sequence."""


def take_tensors(transformer: Any) -> None:
    """Let a `QwenImageTransformer2DModel` be called with tensors only, in place; stock calls give what they gave.

    `forward` is replaced on the instance, and the attention processors of its blocks. The module stays the same
    object of the same class, so hooks, adapters, FSDP, compiled blocks, `save_pretrained` and the stock pipeline see no
    difference; a wrapper around it would run under none of the module's own hooks.

    Raises:
        ValueError: something else has replaced the forward already.
    """
    blocks = getattr(transformer, "transformer_blocks", None)
    if blocks is None:
        return  # an exported graph, which takes nothing else
    if isinstance(blocks[0].attn.processor, JointAttention):
        return  # another editor of the same pipeline
    if "forward" in vars(transformer):
        raise ValueError(
            "transformer: expected its own forward, got one that something else has replaced; build the editor before "
            "accelerate prepares the model, and without offloading hooks"
        )
    for block in blocks:
        block.attn.set_processor(JointAttention(block.attn.processor))
    transformer.forward = MethodType(_forward, transformer)


def _forward(self: Any, *arguments: Any, **options: Any) -> Any:
    run = forward_tensors if "rotary_cos" in options else type(self).forward
    return run(self, *arguments, **options)


def forward_tensors(
    self: Any,
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
    """The transformer's prediction [b, N + R·M, C], of tensors alone; `transformer(...)` with these names runs it.

    A second pair of tables makes two branches of the batch's halves, each with a text length of its own: attention
    sees the first S' tokens of a branch's text, where its tables have S' + N + R·M rows. So branches that differ in
    length, but not within, need no mask.

    Args:
        hidden_states: [b, N + R·M, C], the state and its references.
        encoder_hidden_states: [b, S, D] of the text encoder, finite where padded.
        timestep: [b], σ.
        rotary_cos, rotary_sin: [S' + N + R·M, head_dim / 2] fp32, of text, state and references, S' ≤ S.
        attention_mask: [b, 1, 1, S' + N + R·M] bool, which keys count; None: all.
        negative_rotary_cos, negative_rotary_sin, negative_attention_mask: of the second half of the batch; then the
            mask above is of the first one, [b / 2, ...].
        modulate_index: [1, N + R·M] integer, 0 for tokens modulated at `timestep`, 1 for those at time 0; of
            checkpoints with zero_cond_t.
    """
    hidden_states = self.img_in(hidden_states)
    encoder_hidden_states = self.txt_in(self.txt_norm(encoder_hidden_states))
    time = timestep.to(hidden_states.dtype)
    if self.zero_cond_t:
        time = torch.cat([time, torch.zeros_like(time)])
    time_embeds = self.time_text_embed(time, hidden_states)
    rotary: tuple[Tensor, ...] = (rotary_cos, rotary_sin)
    if negative_rotary_cos is not None and negative_rotary_sin is not None:
        rotary += (negative_rotary_cos, negative_rotary_sin)
    masks = {"attention_mask": attention_mask, "negative_attention_mask": negative_attention_mask}
    checkpoint = torch.is_grad_enabled() and self.gradient_checkpointing
    for block in self.transformer_blocks:
        arguments = (hidden_states, encoder_hidden_states, None, time_embeds, rotary, masks, modulate_index)
        states = self._gradient_checkpointing_func(block, *arguments) if checkpoint else block(*arguments)
        encoder_hidden_states, hidden_states = states
    if self.zero_cond_t:
        time_embeds = time_embeds.chunk(2)[0]
    return (self.proj_out(self.norm_out(hidden_states, time_embeds)),)


class JointAttention:
    """Attention over [text, image] of one block, with real rotary tables, or the complex ones of the stock forward.

    Stands in for `QwenDoubleStreamAttnProcessor2_0`: same projections, norms and attention back ends.
    """

    _attention_backend: Any = None  # diffusers' set_attention_backend and enable_parallelism look for these names
    _parallel_config: Any = None

    def __init__(self, stock: Any = None):
        self._attention_backend = getattr(stock, "_attention_backend", None)
        self._parallel_config = getattr(stock, "_parallel_config", None)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        negative_attention_mask: Tensor | None = None,
        *,
        image_rotary_emb: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor]:
        """(image [b, N, d], text [b, S, d]) after attention and its output projections.

        Args:
            encoder_hidden_states_mask: [b, S] of the text's keys, in the stock forward.
            attention_mask, negative_attention_mask: of all keys, as in `forward_tensors`.
            image_rotary_emb: (cos, sin) of every branch, or the stock forward's complex (image, text).
        """
        length, size = encoder_hidden_states.shape[1], attn.inner_dim // attn.heads

        def heads(projection: nn.Module, x: Tensor, norm: nn.Module | None = None) -> Tensor:
            x = projection(x).unflatten(-1, (-1, size))
            return x if norm is None else norm(x)

        streams = (  # text and image of query, key and value
            (
                heads(attn.add_q_proj, encoder_hidden_states, attn.norm_added_q),
                heads(attn.to_q, hidden_states, attn.norm_q),
            ),
            (
                heads(attn.add_k_proj, encoder_hidden_states, attn.norm_added_k),
                heads(attn.to_k, hidden_states, attn.norm_k),
            ),
            (heads(attn.add_v_proj, encoder_hidden_states), heads(attn.to_v, hidden_states)),
        )
        tables = _tables(image_rotary_emb)
        if encoder_hidden_states_mask is not None:
            image = encoder_hidden_states_mask.new_ones(hidden_states.shape[:2])
            attention_mask = torch.cat([encoder_hidden_states_mask, image], dim=1).bool()[:, None, None]
        images, texts = [], []
        for branch, (cos, sin) in enumerate(tables):
            own = cos.shape[0] - hidden_states.shape[1]  # tokens of this branch's text
            query, key, value = (
                torch.cat([text.chunk(len(tables))[branch][:, :own], image.chunk(len(tables))[branch]], dim=1)
                for text, image in streams
            )
            out = dispatch_attention_fn(
                _rotate(query, cos, sin),
                _rotate(key, cos, sin),
                value,
                attn_mask=(attention_mask, negative_attention_mask)[branch],
                backend=self._attention_backend,
                parallel_config=self._parallel_config,
            )
            out = out.flatten(2, 3).to(query.dtype)
            texts.append(F.pad(out[:, :own], (0, 0, 0, length - own)))
            images.append(out[:, own:])
        updated = torch.cat(images)
        for layer in attn.to_out:  # the projection, and a dropout that is off
            updated = layer(updated)
        return updated, attn.to_add_out(torch.cat(texts))


def _tables(rotary: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
    """(cos, sin) of every branch."""
    if not rotary[0].is_complex():
        return list(zip(rotary[::2], rotary[1::2], strict=True))
    image, text = rotary
    joint = torch.cat([text, image])
    return [(joint.real, joint.imag)]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbouring pairs of x [b, L, heads, size] as complex numbers, times cos + i·sin [L, size / 2]."""
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1).flatten(3).type_as(x)


class SequenceTables:
    """What a forward's sequence needs besides its content, on the device, kept per grids.

    The angles are those of the transformer's own `pos_embed`; the text's begin where the largest image's end.
    """

    def __init__(self, transformer: Any):
        self._transformer = transformer
        self._kept: dict[tuple[Grids, torch.device], tuple[Tensor, Tensor, Tensor]] = {}

    def rotary(self, grids: Grids, text: int) -> tuple[Tensor, Tensor]:
        """(cos, sin) [text + tokens of the grids, head_dim / 2], as the forward takes them.

        Raises:
            ValueError: the transformer has no positions for as many tokens.
        """
        image, after, _ = self._of(grids)
        if text > len(after):
            raise ValueError(
                f"text: expected at most {len(after)} tokens beside images of {grids} tokens, got {text}; shorten the "
                "prompts, or let the text encoder see smaller images (condition_area)"
            )
        joint = torch.cat([after[:text], image])
        return joint.real.contiguous(), joint.imag.contiguous()

    def modulate_index(self, grids: Grids) -> Tensor | None:
        """[1, tokens of the grids] int32, 1 for those of references; None without zero_cond_t."""
        return self._of(grids)[2] if self._transformer.zero_cond_t else None

    def _of(self, grids: Grids) -> tuple[Tensor, Tensor, Tensor]:
        device = self._transformer.device
        if (grids, device) not in self._kept:
            image, after = self._transformer.pos_embed([list(grids)], max_txt_seq_len=_POSITIONS, device=device)
            edit, *references = (frames * rows * columns for frames, rows, columns in grids)
            index = torch.cat([torch.zeros(edit), torch.ones(sum(references))]).to(device, torch.int32)
            self._kept[grids, device] = image, after, index[None]
        return self._kept[grids, device]


_POSITIONS = 4096
"""Rows of the stock tables of angles."""
