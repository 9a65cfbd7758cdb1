"""Flow matching of the playground's editor on pre-encoded (reference, instruction, target) triples."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, FluxKontextPipeline
from torch import Tensor, nn

from .fit import fit, generator_for, muon_and_adamw, progress_bar, save_atomic
from .instructions import Chains, sample_chains
from .models import GUIDANCE, MAX_TOKENS, SHIFT
from .world import CELLS, render


class Triples(NamedTuple):
    latents: Tensor  # [N, K + 1, 16, 64] fp16: packed, shifted and scaled, as the transformer sees them
    tokens: Tensor  # [N, K, 16] int64, one tokenizer serves both encoders
    changed: Tensor  # [N, K, 16] bool: cells that differ between reference and target; all, for a new background


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Packed latents [N, 16, 64] fp32 of images [N, 3, 64, 64] in [0, 1], as FluxKontextPipeline prepares them."""
    latents = torch.cat([vae.encode(x * 2 - 1).latent_dist.mode() for x in images.split(32)])
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    return FluxKontextPipeline._pack_latents(latents, *latents.shape)


def tokenize(pipeline: FluxKontextPipeline, instructions: list[str]) -> Tensor:
    """Token ids [N, 16], padded as the pipeline pads them."""
    ids = pipeline.tokenizer(instructions, padding="max_length", max_length=MAX_TOKENS, truncation=True)
    return torch.tensor(ids["input_ids"])


def encode_triples(pipeline: FluxKontextPipeline, chains: Chains) -> Triples:
    """Renders and encodes every scene of the chains."""
    n, states, _ = chains.scenes.shape
    latents = torch.empty(n, states, CELLS, 64, dtype=torch.float16)
    with progress_bar() as progress:
        task = progress.add_task("latents", total=n, metrics="")
        for start in range(0, n, 64):
            scenes = chains.scenes[start : start + 64].flatten(0, 1)
            packed = encode_images(pipeline.vae, render(scenes[:, :CELLS], scenes[:, CELLS]))
            latents[start : start + 64] = packed.view(-1, states, CELLS, 64)
            progress.update(task, completed=min(start + 64, n))
    tokens = tokenize(pipeline, [text for texts in chains.instructions for text in texts]).view(n, states - 1, -1)
    moved = chains.scenes[:, 1:] != chains.scenes[:, :-1]
    return Triples(latents, tokens, moved[..., :CELLS] | moved[..., CELLS:])


def load_or_encode(pipeline: FluxKontextPipeline, n: int, seed: int, path: Path, resume: bool = True) -> Triples:
    """`encode_triples` of n chains of the build's own seed namespace, kept in a file."""
    if resume and path.is_file():
        return Triples(**torch.load(path, weights_only=True))
    triples = encode_triples(pipeline, sample_chains(Random(f"build/{seed}"), n))
    save_atomic(triples._asdict(), path)
    return triples


class EditorLoss(nn.Module):
    """The trained modules, with the flow-matching loss of one step; text goes through the pipeline's encoders."""

    def __init__(self, pipeline: FluxKontextPipeline) -> None:
        super().__init__()
        self.transformer = pipeline.transformer
        self.clip = pipeline.text_encoder
        self.t5 = pipeline.text_encoder_2
        ids = pipeline._prepare_latent_image_ids(0, 4, 4, "cpu", torch.float32)
        reference_ids = ids.clone()
        reference_ids[:, 0] = 1
        self.register_buffer("image_ids", torch.cat([ids, reference_ids]), persistent=False)
        self.register_buffer("text_ids", torch.zeros(MAX_TOKENS, 3), persistent=False)

    def velocity(self, x: Tensor, sigma: Tensor, reference: Tensor, tokens: Tensor) -> Tensor:
        """Predicted velocity [B, 16, 64] at noised latents x, sigma [B], given reference latents and token ids."""
        output = self.transformer(
            hidden_states=torch.cat([x, reference], 1),
            timestep=sigma,
            guidance=torch.full_like(sigma, GUIDANCE),
            pooled_projections=self.clip(tokens).pooler_output,
            encoder_hidden_states=self.t5(tokens)[0],
            txt_ids=self.text_ids,
            img_ids=self.image_ids,
            return_dict=False,
        )[0]
        return output[:, : x.shape[1]]

    def forward(self, triples: Triples, batch: int, generator: torch.Generator) -> Tensor:
        n, turns = triples.tokens.shape[:2]
        row = torch.randint(n, (batch,), generator=generator)
        turn = torch.randint(turns, (batch,), generator=generator)
        reference, target = triples.latents[row, turn].float(), triples.latents[row, turn + 1].float()
        # later turns start from decoded, 8-bit images: their latents are a little off
        strength = 0.05 * torch.rand(batch, 1, 1, generator=generator)
        reference = reference + strength * torch.randn(reference.shape, generator=generator)
        uniform = torch.rand(batch, generator=generator)
        sigma = SHIFT * uniform / (1 + (SHIFT - 1) * uniform)
        noise = torch.randn(target.shape, generator=generator)
        s = sigma[:, None, None]
        predicted = self.velocity(torch.lerp(target, noise, s), sigma, reference, triples.tokens[row, turn])
        weight = (s**2 + 0.05) * (1 + 4 * triples.changed[row, turn][..., None])
        return (weight * (predicted.float() - (noise - target)) ** 2).mean()

    def split_parameters(self) -> tuple[list[Tensor], list[Tensor]]:
        """(matrices inside the blocks, for Muon; the rest)."""
        hidden: list[Tensor] = []
        rest: list[Tensor] = []
        for name, p in self.named_parameters():
            in_blocks = "blocks." in name or "layers." in name or ".block." in name
            is_matrix = p.ndim == 2 and "relative_attention_bias" not in name
            (hidden if in_blocks and is_matrix else rest).append(p)
        return hidden, rest


def train_editor(
    pipeline: FluxKontextPipeline,
    triples: Triples,
    *,
    steps: int,
    checkpoint: Path,
    seed: int,
    batch: int = 64,
    save_every: int = 50,
    resume: bool = True,
    on_save=None,
) -> None:
    """Trains transformer and both text encoders together; leaves the averaged weights in the pipeline."""
    module = EditorLoss(pipeline)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        return module(triples, batch, generator_for(seed, step)), {}

    fit(
        "editor",
        module,
        muon_and_adamw(*module.split_parameters(), 2e-3, 2e-3),
        loss,
        steps=steps,
        schedule=lambda step: min((step + 1) / 20, 1.0),
        checkpoint=checkpoint,
        save_every=save_every,
        ema_decay=0.998,
        resume=resume,
        on_save=on_save,
    )
