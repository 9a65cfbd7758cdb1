"""Training of the playground's VAE, and the shift and scale of its latents."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from .fit import fit, generator_for, muon_and_adamw
from .world import random_scenes, render


def train_vae(
    vae: AutoencoderKL, *, steps: int, checkpoint: Path, seed: int, save_every: int = 50, resume: bool = True
) -> None:
    """MSE + 0.1·L1 + 1e-4·KL on random scenes, in bf16 autocast; learning rates fall with a cosine."""

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        generator = generator_for(seed, step)
        images = render(*random_scenes(32, generator)) * 2 - 1
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample(generator)).sample.float()
        difference = decoded - images
        mse = difference.square().mean()
        kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        return mse + 0.1 * difference.abs().mean() + 1e-4 * kl, {"psnr": -10 * math.log10(mse.item() / 4)}

    convolutions = [p for p in vae.parameters() if p.ndim == 4]
    rest = [p for p in vae.parameters() if p.ndim != 4]
    fit(
        "vae",
        vae,
        muon_and_adamw(convolutions, rest, 6e-3, 3e-3),
        loss,
        steps=steps,
        schedule=lambda step: min((step + 1) / 20, 0.5 + 0.5 * math.cos(math.pi * step / steps)),
        checkpoint=checkpoint,
        save_every=save_every,
        resume=resume,
    )


@torch.no_grad()
def measure_latents(vae: AutoencoderKL, seed: int, n: int = 512) -> None:
    """Sets shift_factor and scaling_factor so that (latents - shift)·scale has mean 0 and standard deviation 1."""
    images = render(*random_scenes(n, generator_for(seed, -1), share=0.3)) * 2 - 1
    latents = torch.cat([vae.encode(x).latent_dist.mode() for x in images.split(32)])
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
