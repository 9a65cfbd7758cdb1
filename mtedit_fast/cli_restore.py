"""`mtedit-fast restore`: images from incomplete measurements, with a diffusion model as prior."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console

if TYPE_CHECKING:
    from torch import Tensor

    from mtedit_fast.onestep import EDMDenoiser, Operator

PROBLEMS = ("inpainting", "box", "blur", "super_resolution", "compressed_sensing", "mri")
SOLVER = "steps, inner_steps, step_size, data_weight, prior_weight, trace_weight, probes, noise"


def restore(
    model: Annotated[
        str, typer.Argument(help="folder of a denoiser of clean images (mtedit-fast rsd teacher), or playground")
    ],
    images: Annotated[
        list[Path] | None,
        typer.Argument(help="image files, or folders of them; .npy for k-space and complex images", show_default=False),
    ] = None,
    problem: Annotated[str, typer.Option(help=", ".join(PROBLEMS))] = "inpainting",
    option: Annotated[
        list[str] | None,
        typer.Option(
            help="KEY=VALUE of the problem, once for each: missing=0.6 (inpainting), share=0.5 (box), taps=9, std=2 "
            "(blur), factor=2 (super_resolution), acceleration=4, centre=0.08 (both k-space problems), coils=4, "
            "maps=FILE.npy (mri)",
        ),
    ] = None,
    corrupt: Annotated[
        bool, typer.Option("--corrupt", help="IMAGES are clean: measure them first, and report the PSNR")
    ] = False,
    sigma: Annotated[float, typer.Option(help="noise added by --corrupt; pixels are in [-1, 1]")] = 0.0,
    mask: Annotated[
        Path | None, typer.Option(help="what was measured, white in an image or 1 in .npy: one for all IMAGES")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="folder of NAME.png and grid.png")] = Path("restored"),
    solver: Annotated[list[str] | None, typer.Option(help=f"KEY=VALUE of the solver, once for each: {SOLVER}")] = None,
    published: Annotated[
        bool, typer.Option("--published", help="start from the authors' settings, not from those for few steps")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="of masks, noise and starts; an image's are its own")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="images at a time")] = 32,
    compile: Annotated[bool, typer.Option("--compile", help="one graph per step; minutes at first")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …; auto takes a GPU")] = "auto",
) -> None:
    """Restore images from measurements of a known kind: Flow Priors, with any EDM denoiser as prior.

    Two ways to use it. With --corrupt, IMAGES are clean: they are measured (masked, blurred …), restored, and compared.
    Without, they are the measurements: inpainting and box expect --mask, compressed_sensing and mri k-space as complex
    .npy ([channels, H, W] and [coils, H, W]) and --mask; blur and super_resolution only their options.

    OUTPUT gets each restored image and grid.png: measured, restored and, if known, clean ones. MODEL playground is the
    tiny world's 32×32 prior; without IMAGES it takes eight scenes that it has not seen.

    Examples: mtedit-fast restore playground --problem box --corrupt
    mtedit-fast restore runs/mine/teacher/model photos --problem super_resolution --option factor=4 --solver steps=50
    """
    import torch

    from mtedit_fast.cli_models import _device
    from mtedit_fast.inference_time.flow_priors import FlowPriorSettings, flow_of_denoiser, ictm
    from mtedit_fast.inference_time.problems import as_picture, psnr, recommended
    from mtedit_fast.onestep import Stream, image_seeds
    from mtedit_fast.ops import seeded_noise
    from mtedit_fast.progress import progress_bar

    console = Console()
    if problem not in PROBLEMS:
        raise ValueError(f"problem: expected one of {', '.join(PROBLEMS)}, got {problem!r}")
    chosen = _numbers(solver or [], "solver")
    unknown = set(chosen) - set(SOLVER.split(", "))
    if unknown:
        raise ValueError(f"solver: expected KEY=VALUE with a key of {SOLVER}, got {', '.join(sorted(unknown))}")
    settings = FlowPriorSettings.published(problem, **chosen) if published else recommended(**chosen)
    place = torch.device(_device(device))
    denoiser, channels, side = _prior(model, place)
    options = _numbers(option or [], "option")
    if corrupt:
        if mask is not None:
            raise ValueError("mask: expected none with --corrupt, which draws one for each image")
        given = _clean_images(images or [], model, channels, side)
        measured = _corrupted(given, problem, options, sigma, seed)
    else:
        measured = _measured(images or [], mask, problem, options, channels)
    restored, scores, pictures = [], [], []
    velocity = flow_of_denoiser(denoiser)
    output.mkdir(parents=True, exist_ok=True)
    with progress_bar(console) as bar:
        task = bar.add_task("restore", total=len(measured.names) * settings.steps, shown="")
        for first in range(0, len(measured.names), batch):
            rows = slice(first, first + batch)
            y = measured.y[rows].to(place)
            operator = measured.operator(rows).to(place)
            numbers = torch.arange(len(measured.names))[rows]
            seeds = image_seeds(seed, numbers).to(place)
            start = seeded_noise(seeds, measured.size, Stream.LATENT)
            done = ictm(
                velocity,
                operator,
                y,
                start=start,
                settings=settings,
                seeds=seeds,
                compile=compile,
                progress=lambda step, losses, n=len(y): bar.advance(task, n),  # type: ignore[misc]
            )
            restored.append(done.images.cpu())
            pictures.append(as_picture(operator, y).cpu())
            if measured.clean is not None:
                scores.append(psnr(done.images.cpu(), measured.clean[rows]))
    _write(output, measured, torch.cat(restored), torch.cat(pictures))
    if scores:
        score = torch.cat(scores)
        plain = torch.cat([_plain_psnr(measured, slice(i, i + batch)) for i in range(0, len(score), batch)])
        console.print(
            f"PSNR {score.mean():.2f} dB (a plain reconstruction: {plain.mean():.2f}), {len(score)} images, {problem}",
            highlight=False,
        )
    console.print(f"restored: {output / 'grid.png'}", highlight=False, markup=False)


class _Measured(NamedTuple):
    names: list[str]
    y: Tensor
    whole: Operator
    """Of all images, or of each."""
    clean: Tensor | None
    size: tuple[int, int, int]
    draw: Any = None
    """(rows) -> operator, where it is one of a batch."""

    def operator(self, rows: slice) -> Operator:
        return self.whole if self.draw is None else self.draw(rows)


def _prior(model: str, place: Any) -> tuple[EDMDenoiser, int, int]:
    """The denoiser, its images' channels and the side it was trained at."""
    from mtedit_fast.onestep import load_denoiser

    folder = Path(model)
    if model == "playground":
        from mtedit_fast.training.playground.models import WEIGHTS

        folder = WEIGHTS / "rsd" / "clean" / "teacher"
        if not folder.is_dir():
            raise ValueError(
                f"model: no playground prior at {folder}; train it with `mtedit-fast rsd teacher "
                "training/configs/rsd_clean.yaml` and pass its folder"
            )
    denoiser, corruption, _ = load_denoiser(folder, device=place)
    network: Any = denoiser.network.requires_grad_(False)
    inside, outside = network.config.in_channels, network.config.out_channels
    if corruption.random or inside != outside:
        raise ValueError(
            f"model: expected a denoiser of clean images, got one that sees masks ({corruption}); train a teacher with "
            "corruption.operators=[]"
        )
    return denoiser, outside // denoiser.patch**2, network.config.sample_size * denoiser.patch


def _numbers(texts: Sequence[str], name: str) -> dict[str, Any]:
    """KEY=VALUE as a dictionary, whole numbers and others as such, the rest as text."""
    values: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (key and equals and value):
            raise ValueError(f"{name}: expected KEY=VALUE, got {text!r}")
        for kind in (int, float, str):
            try:
                values[key] = kind(value)
                break
            except ValueError:
                continue
    return values


def _files(images: Sequence[Path]) -> list[Path]:
    from mtedit_fast.edival.images import SUFFIXES

    found: list[Path] = []
    for path in images:
        if path.is_dir():
            found += [file for file in sorted(path.iterdir()) if file.suffix.lower() in (*SUFFIXES, ".npy")]
        elif path.is_file():
            found.append(path)
        else:
            raise ValueError(f"images: nothing at {path}")
    if not found:
        raise ValueError(
            "images: expected files or folders of images, got none; only `playground --corrupt` has its own"
        )
    return found


def _read(path: Path, channels: int, side: int | None = None) -> Tensor:
    """An image [channels, H, W] in [-1, 1]; two channels are a complex one, of magnitudes up to 1."""
    import numpy as np
    import torch

    from mtedit_fast.edival.images import load_image

    if path.suffix.lower() == ".npy":
        array = torch.from_numpy(np.load(path, allow_pickle=False))
        if array.is_complex() and array.ndim == 2:
            array = torch.stack((array.real, array.imag))
        if array.ndim != 3 or len(array) != channels:
            raise ValueError(f"images: {path} holds {list(array.shape)}, expected [{channels}, H, W] in [-1, 1]")
        return array.float()
    image = load_image(path, side)
    if channels == 2:
        return torch.stack((image.mean(0), torch.zeros_like(image[0])))
    return (image if channels == 3 else image.mean(0, keepdim=True)) * 2 - 1


def _stack(files: Sequence[Path], images: list[Tensor]) -> Tensor:
    import torch

    sizes = {tuple(image.shape) for image in images}
    if len(sizes) > 1:
        raise ValueError(
            f"images: expected one size, got {', '.join(map(str, sorted(sizes)))}; restore each on its own"
        )
    return torch.stack(images)


def _clean_images(images: Sequence[Path], model: str, channels: int, side: int) -> tuple[list[str], Tensor]:
    if not images and model == "playground":
        from mtedit_fast.training.playground.rsd import shapes

        return [f"scene-{i}" for i in range(8)], shapes(8, 2**20)
    files = _files(images)
    return [file.stem for file in files], _stack(files, [_read(file, channels, side) for file in files])


def _corrupted(
    given: tuple[list[str], Tensor], problem: str, options: dict[str, Any], sigma: float, seed: int
) -> _Measured:
    import torch

    from mtedit_fast.onestep import Corruption, image_seeds

    names, clean = given
    # Small measurements, unless asked otherwise: networks that want the images' size are not at work here.
    small = {"keep_size": False} if problem == "super_resolution" else {}
    corruption = Corruption([{"name": problem} | small | options], sigma)
    seeds = image_seeds(seed, torch.arange(len(names)))
    size = (clean.shape[2], clean.shape[3])
    y, operator = corruption(clean, seeds)
    draw = lambda rows: corruption.operator(seeds[rows], size)  # noqa: E731
    return _Measured(names, y, operator, clean, (clean.shape[1], *size), draw)


def _measured(
    images: Sequence[Path], mask: Path | None, problem: str, options: dict[str, Any], channels: int
) -> _Measured:
    import numpy as np
    import torch

    from mtedit_fast.onestep import Corruption, Inpainting, MultiCoilMRI
    from mtedit_fast.onestep.operators import PartialFourier

    files = _files(images)
    masked = problem in ("inpainting", "box", "compressed_sensing", "mri")
    if masked != (mask is not None):
        expected = "the file of what was measured" if masked else "none"
        raise ValueError(f"mask: expected {expected} for {problem}, got {mask}; or --corrupt clean images")
    known = None if mask is None else _read_mask(mask)
    operator: Operator
    if problem in ("compressed_sensing", "mri"):
        spaces = []
        for file in files:
            space = np.load(file, allow_pickle=False) if file.suffix == ".npy" else np.zeros(0)
            if space.ndim != 3 or not np.iscomplexobj(space):
                raise ValueError(f"images: {file} is no complex [channels or coils, H, W] in .npy; k-space is")
            spaces.append(torch.view_as_real(torch.from_numpy(space.astype(np.complex64))).permute(0, 3, 1, 2))
        y = _stack(files, spaces)
        assert known is not None
        if problem == "mri":
            if "maps" not in options:
                raise ValueError("option: expected maps=FILE.npy, the coils' sensitivities, for measured mri")
            maps = Corruption([{"name": "mri", "maps": options["maps"]}]).families[0].maps  # type: ignore[attr-defined]
            operator = MultiCoilMRI(known, maps)
        else:
            operator = PartialFourier(known)
        size = (2 if problem == "mri" else y.shape[1], y.shape[3], y.shape[4])
    else:
        y = _stack(files, [_read(file, channels) for file in files])
        if masked:
            assert known is not None
            operator = Inpainting(known)
            y = operator(y)
        else:
            small = {"keep_size": False} if problem == "super_resolution" else {}
            operator = Corruption([{"name": problem} | small | options]).operator(
                torch.zeros(1, dtype=torch.int64), (1, 1)
            )
        factor = getattr(operator, "factor", 1) if not getattr(operator, "keep_size", False) else 1
        size = (y.shape[1], y.shape[2] * factor, y.shape[3] * factor)
    if size[0] != channels:
        raise ValueError(f"images: expected {channels} channels, as the model's, got {size[0]}")
    return _Measured([file.stem for file in files], y, operator, None, size)


def _read_mask(path: Path) -> Tensor:
    """[1, 1, H or 1, W] of 0 and 1."""
    import numpy as np
    import torch

    from mtedit_fast.edival.images import load_image

    if path.suffix.lower() == ".npy" and path.is_file():
        array = torch.from_numpy(np.load(path, allow_pickle=False)).float()
        return array.view(1, 1, *array.shape[-2:]) if array.ndim > 1 else array.view(1, 1, 1, -1)
    return (load_image(path).mean(0) > 0.5).float()[None, None]


def _plain_psnr(measured: _Measured, rows: slice) -> Tensor:
    from mtedit_fast.inference_time.problems import plain_reconstruction, psnr

    assert measured.clean is not None
    return psnr(plain_reconstruction(measured.operator(rows), measured.y[rows]), measured.clean[rows])


def _write(output: Path, measured: _Measured, restored: Tensor, pictures: Tensor, shown: int = 8) -> None:
    """Every restored image, and a grid of the first ones."""
    import numpy as np
    import torch
    from PIL import Image

    from mtedit_fast.onestep import to_uint8
    from mtedit_fast.training.playground.rsd_compare import grid

    for name, image, pixels in zip(measured.names, restored, to_uint8(restored).numpy(), strict=True):
        Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(output / f"{name}.png")
        if len(image) == 2:
            np.save(output / f"{name}.npy", torch.complex(image[0], image[1]).numpy())
    rows = {"measured": pictures, "restored": restored}
    if measured.clean is not None:
        rows["clean"] = measured.clean
    grid([to_uint8(row[:shown]) for row in rows.values()], list(rows)).save(output / "grid.png")
