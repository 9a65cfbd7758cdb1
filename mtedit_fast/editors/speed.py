"""Speed modes of an editor's transformer: compilation, attention back ends, and a lossy step cache for deployment."""

from __future__ import annotations

from typing import Any, Literal

import torch
from diffusers import FirstBlockCacheConfig
from torch import Tensor

from mtedit_fast.editors.base import Condition, Editor, TextConditioning
from mtedit_fast.editors.klein_kv import KleinKVEditor

ATTENTION = {
    "native": "native",
    "cudnn": "_native_cudnn",
    "flash": "flash",
    "flash3": "_flash_3",
    "flash3_hub": "_flash_3_hub",
    "xformers": "xformers",
}
"""Names of attention back ends, and diffusers' own for them. native is torch's choice; flash3 serves Hopper GPUs."""


def compile_transformer(editor: Editor, mode: Literal["blocks", "whole"], *, vae: bool = False, **options: Any) -> None:
    """Compile the transformer in place, with its first call.

    "blocks": each kind of block once (regional: seconds to a minute); "whole": all of it in one graph without breaks
    (minutes, and again for new shapes, but nothing between blocks is left to Python). Compiled code rounds otherwise
    than eager code, and code with gradient otherwise than without: a replay then agrees with its rollout to rounding,
    no longer bit for bit.

    Args:
        vae: the decoder and the encoder, too.
        options: of `torch.compile`, such as mode="max-autotune-no-cudagraphs".
    """
    module: Any = editor.transformer
    # Blocks compile anew for every plan of adapters and gradient mode; past the limit torch runs them eagerly.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    if mode == "blocks":
        module.compile_repeated_blocks(fullgraph=True, **options)
    else:
        module.compile(fullgraph=True, **options)
    if vae:
        for part in (editor.vae.encoder, editor.vae.decoder):  # type: ignore[attr-defined]
            part.compile(**options)


def set_attention(editor: Editor, name: str) -> None:
    """Every attention of the transformer through one of `ATTENTION`.

    Raises:
        ValueError: an unknown name, or one whose library is not installed.
    """
    if name not in ATTENTION:
        raise ValueError(f"attention: expected one of {', '.join(ATTENTION)}, got {name!r}")
    transformer: Any = editor.transformer
    try:
        transformer.set_attention_backend(ATTENTION[name])
    except (RuntimeError, ImportError) as error:
        raise ValueError(f"attention: {name} cannot be used here: {error}; or leave it at native") from error


class StepCachedEditor:
    """An editor that skips all but the first block where that block's output has hardly changed since the last step.

    **Lossy**: it changes what the model computes, by a host decision per step, so it is for deployment alone and
    refuses to run with gradient. First Block Cache, through diffusers.

    Args:
        threshold: relative change of the first block's residual below which the other blocks are skipped.
    """

    def __init__(self, editor: Editor, threshold: float = 0.05):
        if not threshold > 0:
            raise ValueError(f"threshold: expected > 0, got {threshold}; use the editor itself for exact steps")
        if isinstance(editor, KleinKVEditor):
            raise TypeError("editor: expected one that does not cache references' keys and values, got KleinKVEditor")
        self.editor, self.model = editor, editor.transformer
        self.model.enable_cache(FirstBlockCacheConfig(threshold=threshold))  # type: ignore[operator]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.editor, name)

    def condition(self, references: Tensor, text: TextConditioning, **options: Any) -> Condition:
        """The editor's own; what was remembered of another turn is forgotten."""
        model: Any = self.model
        model._reset_stateful_cache()
        return self.editor.condition(references, text, **options)

    def velocity(self, latents: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """As the editor's, or what is left of it."""
        if torch.is_grad_enabled():
            raise RuntimeError("step cache: lossy, for deployment alone; train and evaluate with the editor itself")
        model: Any = self.model
        with model.cache_context("step"):
            return self.editor.velocity(latents, timestep, condition)
