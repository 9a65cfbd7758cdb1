"""Linear measurement operators A with their adjoints A^H, batched, differentiable, in any dtype and on any device.

Images are [B, C, H, W]; a complex one has two channels, real and imaginary part, and then ⟨·, ·⟩ is the real part of
the complex inner product. An operator with a batch of masks fits batches of that size only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy

import torch
import torch.nn.functional as F
from torch import Tensor


class Operator:
    """A linear map of batches of images; the base class is the identity, which is what pure denoising measures with."""

    mask: Tensor | None = None
    """What was measured, [B, 1, H or 1, W] of 0 and 1, where that is part of the operator."""
    hides_pixels = False
    """Whether the mask is of pixels: A^H A x = mask · x."""

    def __call__(self, x: Tensor) -> Tensor:
        """A x; ValueError for a shape that A is not defined on."""
        return x

    def adjoint(self, y: Tensor) -> Tensor:
        """A^H y, with ⟨A x, y⟩ = ⟨x, A^H y⟩."""
        return y

    def normal(self, x: Tensor) -> Tensor:
        """A^H A x."""
        return self.adjoint(self(x))

    def to(self, device: torch.device | str) -> Operator:
        """The operator with its data on `device`."""
        moved = copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(moved, name, value.to(device))
        return moved


class Inpainting(Operator):
    """A x = mask · x.

    mask: [B or 1, 1 or C, H, W] of 0 and 1, any dtype.

    Raises:
        ValueError: the mask has another shape, other values, or a sample of which nothing is measured.
    """

    hides_pixels = True

    def __init__(self, mask: Tensor) -> None:
        self.mask = checked_mask(mask)

    def __call__(self, x: Tensor) -> Tensor:
        assert self.mask is not None
        _fits(x, self.mask, "mask")
        return x * self.mask.to(x)

    def adjoint(self, y: Tensor) -> Tensor:
        return self(y)


class Blur(Operator):
    """Gaussian blur, separable; the border is mirrored without its edge (torch's "reflect", SciPy's "mirror").

    Args:
        taps: of the kernel, odd.
        std: of the Gaussian, in pixels; the taps sum to 1.
    """

    def __init__(self, taps: int = 9, std: float = 2.0) -> None:
        if taps < 1 or taps % 2 == 0:
            raise ValueError(f"taps: expected an odd number ≥ 1, got {taps}")
        if not std > 0:
            raise ValueError(f"std: expected > 0 pixels, got {std}")
        self.taps, self.std, self.pad = taps, std, taps // 2

    def __call__(self, x: Tensor) -> Tensor:
        self._check(x)
        for dim in (2, 3):
            x = F.pad(x, _sides(dim, self.pad, self.pad), mode="reflect")
            x = F.conv2d(x, self._kernel(x, dim), groups=x.shape[1])
        return x

    def adjoint(self, y: Tensor) -> Tensor:
        self._check(y)
        for dim in (3, 2):
            size, pad = y.shape[dim], self.pad
            # A transposed convolution, as the kernel is symmetric; cuDNN's, unlike this one, would round to TF32.
            wide = F.conv2d(F.pad(y, _sides(dim, 2 * pad, 2 * pad)), self._kernel(y, dim), groups=y.shape[1])
            y = wide.narrow(dim, pad, size)
            # What the mirrored pixels received goes back to those they mirror: 1 … pad, and the same from the end.
            y = y + F.pad(wide.narrow(dim, 0, pad).flip(dim), _sides(dim, 1, size - pad - 1))
            y = y + F.pad(wide.narrow(dim, pad + size, pad).flip(dim), _sides(dim, size - pad - 1, 1))
        return y

    def _kernel(self, x: Tensor, dim: int) -> Tensor:
        offset = torch.arange(-self.pad, self.pad + 1, dtype=torch.float64)
        kernel = torch.exp(-0.5 * (offset / self.std).square())
        kernel = (kernel / kernel.sum()).to(x)
        return kernel.view(1, 1, *((-1, 1) if dim == 2 else (1, -1))).expand(x.shape[1], -1, -1, -1)

    def _check(self, x: Tensor) -> None:
        _image(x)
        if min(x.shape[2:]) <= self.pad:
            raise ValueError(
                f"x: a blur of {self.taps} taps expects images larger than {self.pad} pixels, got {list(x.shape)}"
            )


class SuperResolution(Operator):
    """Means of factor × factor blocks.

    keep_size: repeat each mean over its block, so that measurements have the images' size (and one network serves
    both); A is then a projection. Noise, if any, is added after that.
    """

    def __init__(self, factor: int = 2, *, keep_size: bool = False) -> None:
        if factor < 1:
            raise ValueError(f"factor: expected ≥ 1, got {factor}")
        self.factor, self.keep_size = factor, keep_size

    def __call__(self, x: Tensor) -> Tensor:
        self._check(x)
        small = F.avg_pool2d(x, self.factor)
        return self._repeat(small) if self.keep_size else small

    def adjoint(self, y: Tensor) -> Tensor:
        if self.keep_size:
            return self(y)
        _image(y)
        return self._repeat(y) / self.factor**2

    def _repeat(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=float(self.factor), mode="nearest")

    def _check(self, x: Tensor) -> None:
        _image(x)
        if x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise ValueError(f"x: expected sides that are multiples of factor {self.factor}, got {list(x.shape)}")


class MultiCoilMRI(Operator):
    """A x = mask · FFT(maps · x), [B, 2, H, W] to k-space [B, coils, 2, H, W]; A^H y = Σ_coils conj(maps) · IFFT(y).

    The transform is orthonormal and centred: frequency 0 is at (H // 2, W // 2) of mask and k-space, position 0 at
    (H // 2, W // 2) of the image.

    Args:
        mask: [B or 1, 1, H or 1, W] of 0 and 1, any dtype.
        maps: [coils, H, W] or [B, coils, H, W] complex coil sensitivities; with Σ|maps|² = 1 a full mask has A^H A = 1.
    """

    def __init__(self, mask: Tensor, maps: Tensor) -> None:
        if not maps.is_complex() or maps.ndim not in (3, 4):
            raise ValueError(
                f"maps: expected complex [coils, H, W] or [B, coils, H, W], got {maps.dtype} {list(maps.shape)}"
            )
        self.mask, self.maps = checked_mask(mask), maps if maps.ndim == 4 else maps[None]
        if mask.shape[1] != 1 or mask.shape[3] != maps.shape[-1] or mask.shape[2] not in (1, maps.shape[-2]):
            raise ValueError(
                f"mask: expected [B or 1, 1, {maps.shape[-2]} or 1, {maps.shape[-1]}] for maps {list(maps.shape)}, got "
                f"{list(mask.shape)}"
            )

    def __call__(self, x: Tensor) -> Tensor:
        assert self.mask is not None
        _complex_image(x, "x", 4, self.maps)
        _fits(x, self.mask, "mask")
        coils = to_complex(x)[:, None] * self._maps(x)
        space = _centred(torch.fft.fft2, coils)
        return from_complex(space * self.mask.to(x), 2)

    def adjoint(self, y: Tensor) -> Tensor:
        assert self.mask is not None
        _complex_image(y, "y", 5, self.maps)
        coils = _centred(torch.fft.ifft2, to_complex(y, 2) * self.mask.to(y))
        return from_complex((coils * self._maps(y).conj()).sum(1), 1)

    def _maps(self, x: Tensor) -> Tensor:
        return self.maps.to(device=x.device, dtype=torch.complex128 if x.dtype == torch.float64 else torch.complex64)


class PartialFourier(Operator):
    """A x = mask · FFT(x) of every channel of real images, [B, C, H, W] to k-space [B, C, 2, H, W]: what one coil
    measures, as in compressed sensing; A^H y = Re IFFT(mask · y).

    The transform is orthonormal and centred, as `MultiCoilMRI`'s; a full mask has A^H A = 1.

    mask: [B or 1, 1, H or 1, W] of 0 and 1, any dtype.
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask = checked_mask(mask)
        if mask.shape[1] != 1:
            raise ValueError(f"mask: expected one channel, [B or 1, 1, H or 1, W], got {list(mask.shape)}")

    def __call__(self, x: Tensor) -> Tensor:
        assert self.mask is not None
        _fits(x, self.mask, "mask")
        return from_complex(_centred(torch.fft.fft2, x) * self.mask.to(x), 2)

    def adjoint(self, y: Tensor) -> Tensor:
        assert self.mask is not None
        if y.ndim != 5 or y.shape[2] != 2:
            raise ValueError(f"y: expected k-space [B, C, 2, H, W], got {list(y.shape)}")
        _fits(y[:, :, 0], self.mask, "mask")
        return _centred(torch.fft.ifft2, to_complex(y, 2) * self.mask.to(y)).real


class Composition(Operator):
    """The operators one after another: the first is applied to the image."""

    def __init__(self, operators: Sequence[Operator]) -> None:
        self.operators = tuple(operators)
        self.mask = next((operator.mask for operator in self.operators if operator.mask is not None), None)

    def __call__(self, x: Tensor) -> Tensor:
        for operator in self.operators:
            x = operator(x)
        return x

    def adjoint(self, y: Tensor) -> Tensor:
        for operator in reversed(self.operators):
            y = operator.adjoint(y)
        return y

    def to(self, device: torch.device | str) -> Composition:
        return Composition([operator.to(device) for operator in self.operators])


def to_complex(x: Tensor, dim: int = 1) -> Tensor:
    """Real and imaginary part along `dim`, as one complex tensor."""
    real, imaginary = x.unbind(dim)
    return torch.complex(real, imaginary)


def from_complex(x: Tensor, dim: int = 1) -> Tensor:
    """Inverse of `to_complex`."""
    return torch.stack((x.real, x.imag), dim)


def checked_mask(mask: Tensor) -> Tensor:
    """The mask, or a ValueError that says what is wrong with it."""
    if mask.ndim != 4:
        raise ValueError(f"mask: expected [B or 1, channels or 1, H, W], got {list(mask.shape)}")
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("mask: expected 0 (missing) and 1 (measured) only")
    empty = (~mask.flatten(1).any(1)).nonzero().flatten().tolist()
    if empty:
        shown = ", ".join(map(str, empty[:8]))
        raise ValueError(f"mask: sample {shown} is all zeros, so nothing of it is measured; leave it out of the batch")
    return mask


def _centred(transform: Callable[..., Tensor], x: Tensor) -> Tensor:
    shifted = torch.fft.ifftshift(x, dim=(-2, -1))
    return torch.fft.fftshift(transform(shifted, norm="ortho"), dim=(-2, -1))


def _sides(dim: int, before: int, after: int) -> tuple[int, int, int, int]:
    return (before, after, 0, 0) if dim == 3 else (0, 0, before, after)


def _image(x: Tensor) -> None:
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"x: expected floating-point images [B, C, H, W], got {x.dtype} {list(x.shape)}")


def _fits(x: Tensor, mask: Tensor, name: str) -> None:
    _image(x)
    wanted = [(x.shape[0], 1), (x.shape[1], 1), (x.shape[2], 1), (x.shape[3],)]
    if any(size not in allowed for size, allowed in zip(mask.shape, wanted, strict=True)):
        raise ValueError(f"x: {list(x.shape)} does not fit the operator's {name} {list(mask.shape)}")


def _complex_image(x: Tensor, name: str, ndim: int, maps: Tensor) -> None:
    channel = ndim - 3
    coils, height, width = maps.shape[1:]
    right = x.ndim == ndim and x.shape[channel] == 2 and x.shape[-2:] == (height, width)
    right = right and maps.shape[0] in (1, x.shape[0]) and (ndim == 4 or x.shape[1] == coils)
    if not right:
        wanted = ["B", *([coils] if ndim == 5 else []), 2, height, width]
        raise ValueError(
            f"{name}: expected [{', '.join(map(str, wanted))}] for maps {list(maps.shape)}, got {list(x.shape)}"
        )
