"""Images from seeds: a one-step generator, its diffusion teacher, and the stream of either's pixels to the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtedit_fast.cuda_graphs import CapturedCall
from mtedit_fast.onestep.corruption import Corruption, Stream, image_seeds
from mtedit_fast.onestep.edm_sampler import Denoise, EDMSampling, edm_sample
from mtedit_fast.onestep.operators import Operator
from mtedit_fast.onestep.precondition import EDMDenoiser, preconditioning
from mtedit_fast.ops import seeded_noise

SIGMA_INIT = 2.5


def to_uint8(images: Tensor) -> Tensor:
    """[B, 1 or 3, H, W] in [-1, 1], or complex as two channels, to uint8 [B, H, W, 1 or 3] on the same device.

    A complex image becomes its magnitude, 0 … 1 to 0 … 255. Values outside are clamped, NaN becomes 0.
    """
    if images.shape[1] == 2:
        images = images.square().sum(1, keepdim=True).sqrt() * 2 - 1
    return (images * 127.5 + 127.5).round().clamp(0, 255).nan_to_num(0).to(torch.uint8).permute(0, 2, 3, 1)


def seen_by(denoiser: EDMDenoiser, operator: Operator | None) -> Denoise:
    """The denoiser as a function of noisy images, of which it sees what the operator with a mask leaves, if one is
    given."""
    if operator is None:
        return lambda x, sigma: denoiser(x, sigma)
    return lambda x, sigma: denoiser(operator.normal(x), sigma, operator.mask)


class ImageSource:
    """What draws images from seeds; image i is a function of its own seed, up to the network's rounding.

    Args:
        denoiser: moved to channels-last memory in place, in eval mode.
        shape: [C, H, W] of an image.
        corruption: what the denoiser was trained on; one with masks gives each image a mask, which the network sees.
        compile: the network with what precedes and follows it, in one graph; options of `torch.compile`, or True.
    """

    def __init__(
        self,
        denoiser: EDMDenoiser,
        shape: tuple[int, int, int],
        corruption: Corruption | None = None,
        *,
        compile: bool | dict[str, Any] = False,
    ) -> None:
        self.denoiser = denoiser.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.shape, self.corruption = shape, corruption or Corruption()
        self._compile = {} if compile is True else compile

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    def operator(self, seed: Tensor) -> Operator | None:
        """The further-corrupted operator of each image, as seen in training; None where there are no masks."""
        if not self.corruption.random:
            return None
        operator = self.corruption.operator(seed, (self.shape[1], self.shape[2]))
        return self.corruption.further(operator, seed)

    def __call__(self, seed: Tensor) -> Tensor:
        """Images [B, C, H, W] fp32, not clamped, of seeds [B] int64 on the model's device."""
        raise NotImplementedError

    @torch.no_grad()
    def pixels(self, seed: Tensor) -> Tensor:
        """The images as uint8 [B, H, W, channels], on the model's device."""
        return to_uint8(self(seed))

    def stream(self, indices: Sequence[int], *, seed: int = 0, batch: int = 64) -> Iterator[tuple[list[int], Any]]:
        """Image `indices` of run `seed`: (indices, uint8 [n, H, W, channels] NumPy array) by batches, in order.

        On a GPU the next batch is being drawn while the last one is copied and used. The last batch is filled up, so
        that compiled code and graphs see one size.
        """
        if batch < 1:
            raise ValueError(f"batch: expected ≥ 1, got {batch}")
        waiting: _Copy | None = None
        for start in range(0, len(indices), batch):
            wanted = list(indices[start : start + batch])
            padded = wanted + wanted[-1:] * (min(batch, len(indices)) - len(wanted))
            copy = _Copy(wanted, self.pixels(image_seeds(seed, torch.tensor(padded)).to(self.device)))
            if waiting is not None:
                yield waiting.finish()
            waiting = copy
        if waiting is not None:
            yield waiting.finish()


class OneStepGenerator(ImageSource):
    """G(σ_init z, σ_init): a distilled denoiser, called once per image.

    Args:
        sigma_init: the noise level that the generator was distilled at.
        cuda_graph: on a GPU, capture one graph per batch size and replay it.
        Others as `ImageSource`'s.
    """

    def __init__(
        self,
        denoiser: EDMDenoiser,
        shape: tuple[int, int, int],
        corruption: Corruption | None = None,
        *,
        sigma_init: float = SIGMA_INIT,
        compile: bool | dict[str, Any] = False,
        cuda_graph: bool = True,
    ) -> None:
        super().__init__(denoiser, shape, corruption, compile=compile)
        if not sigma_init > 0:
            raise ValueError(f"sigma_init: expected > 0, got {sigma_init}")
        self.sigma_init, self.cuda_graph = sigma_init, cuda_graph
        c = preconditioning(torch.tensor(sigma_init, dtype=torch.float64), denoiser.sigma_data)
        # σ never changes, so that the preconditioning is three numbers: of z to the network, of z and F to the image.
        self._to_input, self._skip, self._out = float(c.input) * sigma_init, float(c.skip) * sigma_init, float(c.out)
        self._noise_label = float(c.noise)
        self._compiled = None if self._compile is False else torch.compile(self._forward, **self._compile)
        self._graphs: dict[tuple[int, ...], CapturedCall] = {}

    @torch.no_grad()
    def __call__(self, seed: Tensor) -> Tensor:
        return self._drawn(seed, self._run_float)

    @torch.no_grad()
    def pixels(self, seed: Tensor) -> Tensor:
        return self._drawn(seed, self._run_pixels)

    def latents(self, seed: Tensor) -> Tensor:
        """z [B, C, H, W] fp32: the same bits whatever the batch, the device and the number of processes."""
        return seeded_noise(seed, self.shape, Stream.LATENT)

    def _drawn(self, seed: Tensor, run: Callable[..., Tensor]) -> Tensor:
        latents, operator = self.latents(seed), self.operator(seed)
        mask = None
        if operator is not None:
            latents, mask = operator.normal(latents), operator.mask
        latents = latents.contiguous(memory_format=torch.channels_last)
        if not (self.cuda_graph and latents.is_cuda):
            return run(latents, mask)
        key = (len(latents), int(run == self._run_pixels))
        inputs = {"latents": latents, "mask": mask}
        if key not in self._graphs:
            self._graphs[key] = CapturedCall(lambda tree: run(**tree), inputs)
        self._graphs[key].inputs[0].load(inputs)
        return self._graphs[key]().clone()

    def _run_float(self, latents: Tensor, mask: Tensor | None) -> Tensor:
        return (self._compiled or self._forward)(latents, mask, False)

    def _run_pixels(self, latents: Tensor, mask: Tensor | None) -> Tensor:
        return (self._compiled or self._forward)(latents, mask, True)

    def _forward(self, latents: Tensor, mask: Tensor | None, pixels: bool) -> Tensor:
        label = latents.new_full((len(latents),), self._noise_label)
        out = self.denoiser.out_scale(self._out, mask)
        images = self._skip * latents + out * self.denoiser.network_output(latents * self._to_input, label, mask)
        return to_uint8(images) if pixels else images


class TeacherSampler(ImageSource):
    """The diffusion teacher with EDM's samplers; 2 · steps − 1 calls per image.

    sampling: its settings. None: the defaults, from σ_max down to the corruption's σ_n where that is larger than
    sigma_min, followed by one estimate of the clean image.
    """

    def __init__(
        self,
        denoiser: EDMDenoiser,
        shape: tuple[int, int, int],
        corruption: Corruption | None = None,
        *,
        sampling: EDMSampling | None = None,
        compile: bool | dict[str, Any] = False,
    ) -> None:
        super().__init__(denoiser, shape, corruption, compile=compile)
        self.sampling = sampling or EDMSampling(sigma_min=max(EDMSampling.sigma_min, self.corruption.sigma))
        self._denoise: Any = self.denoiser
        if self._compile is not False:
            self._denoise = torch.compile(self.denoiser, **self._compile)

    @torch.no_grad()
    def __call__(self, seed: Tensor) -> Tensor:
        return edm_sample(seen_by(self._denoise, self.operator(seed)), seed, self.shape, self.sampling)


class _Copy:
    """Pixels on their way to the host."""

    def __init__(self, indices: list[int], pixels: Tensor) -> None:
        self._indices, self._event = indices, None
        if not pixels.is_cuda:
            self._host = pixels
            return
        self._host = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=True)
        self._host.copy_(pixels, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def finish(self) -> tuple[list[int], np.ndarray]:
        if self._event is not None:
            self._event.synchronize()
        return self._indices, self._host[: len(self._indices)].contiguous().numpy()
