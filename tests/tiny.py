"""Tiny editors of the real classes with random weights, for tests that need no skill."""

import functools

import pytest
import torch
from diffusers import FluxKontextPipeline

from mtedit_fast.editors import KontextEditor
from mtedit_fast.editors.fp8 import fp8_unsupported
from mtedit_fast.training.playground.models import MAX_TOKENS, new_pipeline, new_vae

SIZE = 64
needs_fp8 = pytest.mark.skipif(fp8_unsupported("cpu") is not None, reason=str(fp8_unsupported("cpu")))


@functools.cache
def _state() -> dict[str, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    pipeline = new_pipeline(new_vae())
    for parameter in pipeline.transformer.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)  # the output layer starts at zero: give it something
    return {name: getattr(pipeline, name).state_dict() for name in ("transformer", "vae")}


def tiny_pipeline(dtype: torch.dtype = torch.float32) -> FluxKontextPipeline:
    """A fresh copy of one random tiny FluxKontextPipeline, 64×64 images."""
    torch.manual_seed(0)
    pipeline = new_pipeline(new_vae())
    for name, state in _state().items():
        getattr(pipeline, name).load_state_dict(state)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(dtype=dtype)


def tiny_editor(dtype: torch.dtype = torch.float32, device: str = "cpu") -> KontextEditor:
    return KontextEditor(tiny_pipeline(dtype).to(device), max_sequence_length=MAX_TOKENS)
