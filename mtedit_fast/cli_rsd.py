"""`mtedit-fast rsd …`: one-step generators of clean images from corrupted ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

rsd_app = typer.Typer(no_args_is_help=True, help="One-step generators of clean images, from corrupted ones alone.")

ConfigArgument = Annotated[
    Path, typer.Argument(help="YAML; every key is documented in training/configs/rsd_ffhq64.yaml")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="key=value overrides, e.g. distill.alpha=1.0 run.output_dir=runs/mine", show_default=False),
]


@rsd_app.command()
def teacher(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Train a diffusion model of clean images on corrupted ones, into OUTPUT_DIR/teacher.

    A run that was stopped goes on where it was. TensorBoard: tensorboard --logdir OUTPUT_DIR. Several
    GPUs: torchrun --nproc-per-node 8 -m mtedit_fast rsd teacher CONFIG.
    """
    from mtedit_fast.training.onestep.config import load_onestep_config

    loaded, console = load_onestep_config(config, overrides or []), Console()
    from mtedit_fast.training.onestep.run import train_teacher

    console.print(f"teacher: {train_teacher(loaded, console)}", markup=False)


@rsd_app.command()
def distill(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Distil OUTPUT_DIR/teacher into a one-step generator, OUTPUT_DIR/student: SiD, or the baselines DMD and SDS."""
    from mtedit_fast.training.onestep.config import load_onestep_config

    loaded, console = load_onestep_config(config, overrides or []), Console()
    from mtedit_fast.training.onestep.run import distill as run

    console.print(f"student: {run(loaded, console)}", markup=False)


@rsd_app.command()
def sample(
    model: Annotated[Path, typer.Argument(help="folder of a student (one step) or teacher (EDM's sampler)")],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder, .zip or .npz")],
    count: Annotated[int, typer.Option(min=1, help="images")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="image i of a seed is the same in any batch")] = 0,
    batch: Annotated[int, typer.Option(min=1)] = 64,
    steps: Annotated[int | None, typer.Option(min=2, help="a teacher's; default 18 (35 evaluations)")] = None,
    churn: Annotated[float, typer.Option(min=0, help="a teacher's; above 0 its sampler is stochastic")] = 0.0,
    dtype: Annotated[str, typer.Option(help="of the network: fp32, bf16 or fp16")] = "fp32",
    compile: Annotated[bool, typer.Option("--compile", help="one graph around the network; minutes at first")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …; auto takes a GPU")] = "auto",
) -> None:
    """Draw images from a generator or a teacher, on every process of torchrun its share."""
    import torch
    from accelerate import PartialState

    from mtedit_fast.onestep import EDMSampling, load_denoiser
    from mtedit_fast.training.onestep.run import load_source, write_images

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if dtype not in dtypes:
        raise ValueError(f"dtype: expected one of {', '.join(dtypes)}, got {dtype!r}")
    state = PartialState(cpu=not torch.cuda.is_available())
    place = (state.device if torch.cuda.is_available() else "cpu") if device == "auto" else device
    sampling = None
    if steps is not None or churn:
        low = max(EDMSampling.sigma_min, load_denoiser(model).corruption.sigma)
        sampling = EDMSampling(steps=steps or EDMSampling.steps, sigma_min=low, churn=churn)
    source = load_source(model, device=place, dtype=dtypes[dtype], compile=compile, sampling=sampling)
    errors = write_images(
        source, output, count, seed=seed, batch=batch, console=Console(quiet=not state.is_main_process)
    )
    if errors:
        name, reason = next(iter(errors.items()))
        raise OSError(f"{len(errors)} of {count} images could not be written to {output}, the first {name}: {reason}")


@rsd_app.command()
def fid(
    images: Annotated[Path, typer.Argument(help="folder of images, or .npz of mu and sigma")],
    reference: Annotated[Path, typer.Argument(help="the same of what they are compared with")],
    features: Annotated[
        str, typer.Option(help="file of Inception weights (TorchScript), or module:function")
    ] = "mtedit_fast.training.playground.rsd:dino_features",
    save: Annotated[Path | None, typer.Option(help="keep the statistics of IMAGES as .npz")] = None,
    device: Annotated[str, typer.Option(help="of Inception")] = "cpu",
) -> None:
    """The Fréchet distance of two sets of images. By default the features are the playground's own, for its images."""
    from mtedit_fast.onestep import frechet_distance, load_features
    from mtedit_fast.training.onestep.run import statistics_of

    extract = load_features(features, device)
    mine, other = statistics_of(images, extract), statistics_of(reference, extract)
    if save is not None:
        mine.save(save)
    Console().print(f"{frechet_distance(mine, other):.4f}")


OutputOption = Annotated[Path, typer.Option(help="folder of runs, grids and summary.json; finished runs are kept")]
OnlyOption = Annotated[
    list[str] | None, typer.Option(help="denoising, inpainting, deblurring, super_resolution, mri; repeat for several")
]


@rsd_app.command()
def demo(
    overrides: Overrides = None,
    output: OutputOption = Path("runs/rsd_demo"),
    only: OnlyOption = None,
    samples: Annotated[int, typer.Option(min=200, help="images per Fréchet distance")] = 500,
) -> None:
    """Corrupted, teacher's, student's and clean images of the tiny world: grids and a table.

    Takes the repository's weights where it has some. Else it trains for a few minutes per corruption on two CPU cores,
    which shows that everything runs, not how good it gets: that is `mtedit-fast rsd study`.
    """
    from mtedit_fast.training.playground.rsd_compare import CORRUPTIONS, compare

    compare(output, corruptions=only or CORRUPTIONS, samples=samples, overrides=overrides or [], short=True)


@rsd_app.command()
def study(
    overrides: Overrides = None,
    output: OutputOption = Path("runs/rsd"),
    only: OnlyOption = None,
    seeds: Annotated[int, typer.Option(min=1, help="seeds 0 … n − 1; finished runs of further ones count as well")] = 3,
    samples: Annotated[int, typer.Option(min=200, help="images per Fréchet distance")] = 5000,
    keep: Annotated[Path | None, typer.Option(help="folder for seed 0's networks in bf16")] = None,
    page: Annotated[Path | None, typer.Option(help="also write table and grids into this page")] = None,
) -> None:
    """Train the committed configurations to their ends, several seeds each; hours, and a stopped study goes on."""
    from mtedit_fast.training.playground.rsd_compare import CORRUPTIONS, compare, write_page

    summary = compare(
        output, corruptions=only or CORRUPTIONS, seeds=seeds, samples=samples, overrides=overrides or [], keep=keep
    )
    if page is not None:
        write_page(summary, output, page)
        Console().print(f"page: {page}", markup=False)
