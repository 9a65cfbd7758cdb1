"""EDM preconditioning around a network of noisy images (Karras et al., "Elucidating the design space of
diffusion-based generative models", NeurIPS 2022)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from torch import Tensor, nn

from mtedit_fast.onestep.corruption import Corruption

SIGMA_DATA = 0.5
CARD = "onestep.json"


class Preconditioning(NamedTuple):
    """Of D(x, σ) = skip·x + out·F(in·x, noise); each has σ's shape."""

    skip: Tensor
    out: Tensor
    input: Tensor
    noise: Tensor


def preconditioning(sigma: Tensor, sigma_data: float = SIGMA_DATA) -> Preconditioning:
    """Table 1 of the paper, for σ > 0 of any shape and dtype."""
    total = sigma.square() + sigma_data**2
    return Preconditioning(sigma_data**2 / total, sigma * sigma_data * total.rsqrt(), total.rsqrt(), sigma.log() / 4)


def loss_weight(sigma: Tensor, sigma_data: float = SIGMA_DATA) -> Tensor:
    """w(σ) = 1/σ² + 1/σ_d² = 1 / out², which makes F's targets weigh the same at all σ; at σ = ∞, 1/σ_d²."""
    return sigma.square().reciprocal() + sigma_data**-2


class EDMDenoiser(nn.Module):
    """D(x, σ), an estimate of E[x₀ | x₀ + σ ε = x], from any network with diffusers' signature.

    Args:
        network: called as network(input, c_noise) with [B, C or C + 1, H, W] and [B]; returns [B, C, H, W], as a tensor
            or in `.sample`. `UNet2DModel`s have `config`, which `save_denoiser` needs.
        sigma_data: standard deviation of the data.
        autocast: dtype that torch.autocast computes the network in; None for the weights' own.
        patch: side of the squares of pixels that are the channels of one position of the network, as in "simple
            diffusion" (Hoogeboom et al., ICML 2023): a small network's first resolution costs most and knows least.
        hides_pixels: the masks are of pixels, and x is 0 where they are. There nothing is known, as at σ = ∞: `out` is
            σ_d whatever σ is. With EDM's own `out` a network would have to answer x₀ / σ for a pixel it does not see
            (at σ = 0.002: 500 x₀), and one that cannot draws grey there.
    """

    def __init__(
        self,
        network: nn.Module,
        sigma_data: float = SIGMA_DATA,
        autocast: torch.dtype | None = None,
        *,
        patch: int = 1,
        hides_pixels: bool = False,
    ) -> None:
        super().__init__()
        self.network, self.sigma_data, self.autocast = network, sigma_data, autocast
        self.patch, self.hides_pixels = patch, hides_pixels

    def forward(self, x: Tensor, sigma: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: [B, C, H, W]; sigma: [] or [B]; mask: [B or 1, 1, H or 1, W], for networks with one input channel more.

        Returns x's shape and dtype. The network computes in its own dtype.
        """
        if sigma.numel() not in (1, len(x)):
            raise ValueError(f"sigma: expected one number or one per image ({len(x)}), got {list(sigma.shape)}")
        sigma = sigma.to(x).reshape(-1, 1, 1, 1)
        c = preconditioning(sigma, self.sigma_data)
        output = self.network_output(c.input * x, c.noise.flatten().expand(len(x)), mask)
        return c.skip * x + self.out_scale(c.out, mask) * output

    def out_scale(self, out: Tensor | float, mask: Tensor | None) -> Tensor | float:
        """What each pixel of the network's output is multiplied by: `out`, or σ_d where the mask hides it."""
        if mask is None or not self.hides_pixels:
            return out
        return torch.where(mask > 0, out, self.sigma_data)

    def network_output(self, x: Tensor, noise: Tensor, mask: Tensor | None = None) -> Tensor:
        """F in x's dtype: x [B, C, H, W] already scaled, noise [B]."""
        dtype = next(self.network.parameters()).dtype
        seen = x if mask is None else torch.cat((x, mask.to(x).expand(len(x), 1, x.shape[2], x.shape[3])), 1)
        with torch.autocast(x.device.type, self.autocast, enabled=self.autocast is not None):
            output = self.network(F.pixel_unshuffle(seen.to(dtype), self.patch), noise.to(dtype))
        return F.pixel_shuffle(getattr(output, "sample", output), self.patch).to(x.dtype)


def new_unet(
    size: int, channels: int, *, masked: bool, widths: tuple[int, ...], layers: int, attention: int, seed: int,
    patch: int = 1,
) -> UNet2DModel:  # fmt: skip
    """A `UNet2DModel` with random weights.

    Args:
        size: of the square images; rectangular ones can be fed as well.
        channels: of the images; masked: one more channel in.
        widths: channels per resolution, multiples of 8.
        layers: residual blocks per resolution.
        attention: side below or at which blocks attend, with one head; 0 for none but the middle one's.
        patch: of the `EDMDenoiser` it is for, whose positions it counts.
    """
    attends = [size // patch >> level <= attention for level in range(len(widths))]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DModel(
            sample_size=size // patch,
            in_channels=(channels + masked) * patch**2,
            out_channels=channels * patch**2,
            block_out_channels=widths,
            layers_per_block=layers,
            norm_num_groups=8,
            attention_head_dim=None,
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        )


class OneStepModel(NamedTuple):
    """What a folder of `save_denoiser` holds."""

    denoiser: EDMDenoiser
    corruption: Corruption
    card: dict[str, Any]


def save_denoiser(
    folder: str | Path, denoiser: EDMDenoiser, corruption: Corruption, card: Mapping[str, Any] | None = None
) -> Path:
    """Write a `UNet2DModel` in `save_pretrained` layout with what it was trained for in onestep.json; `card`: more."""
    folder = Path(folder)
    network: Any = denoiser.network
    network.save_pretrained(str(folder))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)  # where it was read from, which is nobody else's
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    described = {
        "sigma_data": denoiser.sigma_data,
        "patch": denoiser.patch,
        "hides_pixels": denoiser.hides_pixels,
        "corruption": corruption.describe(),
        **(card or {}),
    }
    (folder / CARD).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    return folder


def load_denoiser(
    folder: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> OneStepModel:
    """Read what `save_denoiser` wrote, or any `UNet2DModel` in `save_pretrained` layout trained with EDM's
    preconditioning (σ_data 0.5, c_noise = ¼ ln σ as timestep), which then counts as trained on clean images.

    Raises:
        ValueError: no such folder, or another model in it.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        found = "is a file; NVIDIA's pickles are not read" if folder.is_file() else "has no config.json"
        raise ValueError(f"folder: expected a UNet2DModel as save_pretrained writes it; {folder} {found}")
    name = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name")
    if name != "UNet2DModel":
        raise ValueError(f"folder: expected a UNet2DModel in {folder}, got {name}")
    path = folder / CARD
    card = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    network = UNet2DModel.from_pretrained(str(folder), torch_dtype=dtype).to(device).eval()
    denoiser = EDMDenoiser(
        network,
        card.get("sigma_data", SIGMA_DATA),
        patch=card.get("patch", 1),
        hides_pixels=card.get("hides_pixels", False),
    )
    return OneStepModel(denoiser, Corruption(**card.get("corruption", {})), card)
