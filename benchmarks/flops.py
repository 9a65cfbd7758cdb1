"""Floating-point operations of the editors' transformers, and the rate of matrix products that this device reaches.

A multiply-add is 2. Linear layers and attention are counted, padding included, elementwise arithmetic is not; nor is
the VAE. With width d, a token takes 24d² in a block of FLUX.1 and Qwen-Image (projections 8d², feed-forward 16d²) and
8d² + 6dm in one of FLUX.2 (gated feed-forward of width m); each query 4d for every key.
"""

from dataclasses import dataclass, replace
from typing import Any

import harness
import torch

from mtedit_fast.editors import Condition, Editor
from mtedit_fast.editors.fp8 import to_fp8
from mtedit_fast.rollout import Trajectories


@dataclass(frozen=True)
class Sequence:
    """What one call of a transformer takes: rows, and the tokens of each.

    attended: how many of the text's tokens attention sees, for each of equal parts of the rows; empty: all.
    keys: "own", every token sees every token; "cached", keys and values of the references are given; "extracted", the
    references come first and see only themselves.
    """

    rows: int
    text: int
    state: int
    references: int
    attended: tuple[int, ...] = ()
    keys: str = "own"


def flux(config: Any, x: Sequence) -> int:
    """FLUX.1: `FluxTransformer2DModel`."""
    d, image = config.num_attention_heads * config.attention_head_dim, x.state + x.references
    tokens = x.text + image
    blocks = (config.num_layers + config.num_single_layers) * (24 * d * d * tokens + 4 * d * tokens**2)
    ends = 2 * d * (config.joint_attention_dim * x.text + config.in_channels * image + _channels(config) * image)
    embedded = (1 + config.guidance_embeds) * (256 * d + d * d) + config.pooled_projection_dim * d + d * d
    modulations = config.num_layers * 12 * d * d + config.num_single_layers * 3 * d * d + 2 * d * d
    return x.rows * (blocks + ends + 2 * (embedded + modulations))


def flux2(config: Any, x: Sequence) -> int:
    """FLUX.2: `Flux2Transformer2DModel`, whose blocks share their modulations."""
    d = config.num_attention_heads * config.attention_head_dim
    hidden = int(d * config.mlp_ratio)
    others, layers = x.text + x.state, config.num_layers + config.num_single_layers
    tokens = others if x.keys == "cached" else others + x.references
    pairs = others * (others + x.references)
    if x.keys != "cached":
        pairs += x.references * (x.references if x.keys == "extracted" else tokens)
    blocks = layers * ((8 * d * d + 6 * d * hidden) * tokens + 4 * d * pairs)
    out = x.state + (x.references if x.keys == "own" else 0)
    ends = (
        2 * d * (config.joint_attention_dim * x.text + config.in_channels * (tokens - x.text) + out * _channels(config))
    )
    time = (1 + config.guidance_embeds) * (config.timestep_guidance_channels * d + d * d)
    image_modulations = (6 + 3) * d * d
    per_row = time + image_modulations + 6 * d * d + 2 * d * d
    if x.keys == "extracted":  # the references' own, of time 0
        per_row += time + image_modulations
    return x.rows * (blocks + ends + 2 * per_row)


def qwen(config: Any, x: Sequence) -> int:
    """Qwen-Image: `QwenImageTransformer2DModel`; with zero_cond_t (2511) images are modulated for two times."""
    d, image = config.num_attention_heads * config.attention_head_dim, x.state + x.references
    attended, times = x.attended or (x.text,), 1 + config.zero_cond_t
    pairs = sum((text + image) ** 2 for text in attended) / len(attended)
    blocks = config.num_layers * (24 * d * d * (x.text + image) + 4 * d * pairs)
    ends = 2 * d * (config.joint_attention_dim * x.text + config.in_channels * image + _channels(config) * image)
    per_row = times * (256 * d + d * d) + config.num_layers * (times + 1) * 6 * d * d + 2 * d * d
    return round(x.rows * (blocks + ends + 2 * per_row))


def _channels(config: Any) -> int:
    return config.patch_size**2 * (config.out_channels or config.in_channels)


FORMULAS = {"FluxTransformer2DModel": flux, "Flux2Transformer2DModel": flux2, "QwenImageTransformer2DModel": qwen}


def sequence(condition: Condition, rows: int, state: int) -> Sequence:
    """What `velocity` hands to the transformer for `rows` samples of `state` tokens."""
    inputs = condition.inputs
    text, rows = inputs["encoder_hidden_states"].shape[1], rows * condition.branches
    if condition.references is None:
        return Sequence(rows, text, state, inputs["kv_cache"].num_ref_tokens, keys="cached")
    references = condition.references.shape[1]
    tables = [inputs[name] for name in ("rotary_cos", "negative_rotary_cos") if name in inputs]  # Qwen's branches
    return Sequence(rows, text, state, references, tuple(len(table) - state - references for table in tables))


def rollout_flops(editor: Editor, trajectories: Trajectories) -> int:
    """Of every step of a rollout, and of the references' keys and values where they are shared: one extraction per
    group in the first turn, then one per trajectory."""
    transformer: Any = editor.transformer
    config, formula, total = transformer.config, FORMULAS[type(transformer).__name__], 0
    for rows in trajectories.micro_batches():
        for turn in range(trajectories.turns):
            one = sequence(
                trajectories.condition(editor, rows, turn), rows.stop - rows.start, trajectories.clean.shape[2]
            )
            total += trajectories.config.num_steps * formula(config, one)
    if one.keys == "cached":
        references = len(trajectories.group.unique()) + len(trajectories) * (trajectories.turns - 1)
        total += references * formula(config, replace(one, rows=1, text=1, state=1, keys="extracted"))
    return total


def matmul_flop_per_s(device: torch.device, dtype: torch.dtype, *, min_seconds: float = 0.5) -> float:
    """What a large square matrix product of random numbers reaches, the median; e4m3: with a scale per row."""
    fp8 = dtype == torch.float8_e4m3fn
    size = 8192 if device.type == "cuda" else 256 if fp8 else 1024
    a, b = torch.randn(2, size, size, device=device)
    if fp8:
        (a, scale_a), (b, scale_b) = to_fp8(a), to_fp8(b)
        options = {"out_dtype": torch.bfloat16, "use_fast_accum": device.type == "cuda"}

        def product() -> object:
            return torch._scaled_mm(a, b.t(), scale_a=scale_a, scale_b=scale_b.t(), **options)  # type: ignore[arg-type]
    else:
        a, b = a.to(dtype), b.to(dtype)

        def product() -> object:
            return a @ b

    return (
        2 * size**3 / harness.measure({"product": [product]}, device, min_seconds=min_seconds)["product"].median * 1e6
    )
