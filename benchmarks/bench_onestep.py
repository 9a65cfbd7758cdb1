"""A one-step generator against its diffusion teacher's 18-step sampler, end to end to files.

mtedit-fast bench onestep                              the playground's network at 32², on a CPU
mtedit-fast bench onestep --corruption ffhq64          the network of 64² faces, random weights; the default on a GPU
pytest benchmarks/bench_onestep.py --benchmark-only    the same calls under pytest-benchmark (make bench)

Both draw the same number of images with the same random weights, through `training.onestep.run.write_images`, into
the same kind of file, in turns. The teacher's is EDM's deterministic sampler of 18 steps, 35 evaluations, counted here.
Beside them: the network alone on as many batches, which tells the share of time that all else takes; and one batch with
the preconditioning as three numbers against `EDMDenoiser`'s own, neither in a CUDA graph.

No row is written where images differ from EDM's formula in fp64 around the same network, or files from those images.
"""

import argparse
import itertools
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import command
import harness
import numpy as np
import record
import torch
from flops import matmul_flop_per_s
from PIL import Image
from rich.console import Console
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mtedit_fast.cuda_graphs import CapturedCall
from mtedit_fast.onestep import EDMDenoiser, ImageSource, OneStepGenerator, TeacherSampler, image_seeds, to_uint8
from mtedit_fast.training.onestep.config import OneStepConfig, load_onestep_config
from mtedit_fast.training.onestep.data import load_data
from mtedit_fast.training.onestep.loop import new_denoiser
from mtedit_fast.training.onestep.run import write_images
from mtedit_fast.training.playground.rsd_compare import CONFIGS, CORRUPTIONS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FULL, FULL_SHAPE = "ffhq64", (3, 64, 64)
FILES = ("png", "npz")
EVALUATIONS = 35


@dataclass(frozen=True)
class Row(record.Line):
    """One line of a results file. Times are microseconds of all images, from seeds to closed files."""

    images: int
    median_us: float
    p20_us: float
    p80_us: float
    images_per_s: float
    teacher_us: float
    teacher_images_per_s: float
    teacher_evaluations: float
    """Of the network, per image, counted."""
    speedup_teacher: float
    network_us: float
    """The network alone, once per image."""
    percent_outside: float
    """Share of the time that is not the network's."""
    batch_us: float
    """One batch of floats with fused pre- and postconditioning, without a CUDA graph."""
    batch_eager_us: float
    speedup_preconditioning: float
    flops: int
    """Of the network, once per image."""
    tflop_per_s: float
    matmul_tflop_per_s: float
    percent_of_matmul: float
    error: float
    """Distance of the images from EDM's formula in fp64, as a fraction of what the dtype allows."""


@dataclass(frozen=True)
class Case:
    """corruption: of the configuration whose network is taken. dtype: of the network's arithmetic; weights are fp32."""

    corruption: str
    files: str
    images: int
    batch: int
    dtype: str
    device: torch.device
    compile: bool = False

    @cached_property
    def config(self) -> OneStepConfig:
        return load_onestep_config(CONFIGS / f"rsd_{self.corruption}.yaml")

    @cached_property
    def image_shape(self) -> tuple[int, int, int]:
        if self.corruption == FULL:  # whose data is the user's
            return FULL_SHAPE
        return load_data(
            self.config.data.model_copy(update={"count": 1}), self.config.corruption.build()
        ).measured_shape

    @property
    def columns(self) -> dict[str, Any]:
        modes = ["compiled"] * self.compile + ["graphs"] * (self.device.type == "cuda")
        return record.environment(self.device) | {
            "op": "onestep",
            "variant": f"{self.corruption}, {self.files}",
            "shape": f"{self.images}x{'x'.join(map(str, self.image_shape))} by {self.batch}",
            "dtype": self.dtype,
            "backend": ", ".join(modes) or "eager",
            "timing": "call",
        }


class Preconditioned(NamedTuple):
    """What the network is fed with, and what its answer is added to."""

    state: Tensor
    scaled: Tensor
    label: Tensor
    mask: Tensor | None


class Setup:
    """The two sources on one network, and what each has to do."""

    def __init__(self, case: Case, folder: Path):
        self.case = case
        denoiser = new_denoiser(case.config, case.image_shape).to(case.device)
        denoiser.autocast = None if case.dtype == "fp32" else DTYPES[case.dtype]
        common: Any = (denoiser, case.image_shape, case.config.corruption.build())
        options: Any = {"sigma_init": case.config.distill.sigma_init, "compile": case.compile}
        self.denoiser: EDMDenoiser = denoiser
        self.generator = OneStepGenerator(*common, **options)
        self.uncaptured = OneStepGenerator(*common, **options, cuda_graph=False)
        self.teacher = TeacherSampler(*common, compile=case.compile)
        suffix = ".npz" if case.files == "npz" else ""
        self.paths = {name: folder / f"{name}{suffix}" for name in ("ours", "teacher")}
        self.seeds = image_seeds(0, torch.arange(case.batch)).to(case.device)

    def write(self, name: str) -> None:
        source: ImageSource = self.generator if name == "ours" else self.teacher
        quiet = Console(quiet=True)
        failed = write_images(source, self.paths[name], self.case.images, batch=self.case.batch, console=quiet)
        if failed:
            raise RuntimeError(f"{self.paths[name]}: {failed}")

    def preconditioned(self) -> Preconditioned:
        """Of the first batch, by Table 1 of EDM's paper, in fp64 until the network."""
        sigma, sigma_data = self.generator.sigma_init, self.denoiser.sigma_data
        latents, operator = self.generator.latents(self.seeds), self.generator.operator(self.seeds)
        state = sigma * (latents if operator is None else operator.normal(latents)).double()
        scaled = (state / math.sqrt(sigma**2 + sigma_data**2)).float().contiguous(memory_format=torch.channels_last)
        label = scaled.new_full((len(scaled),), math.log(sigma) / 4)
        return Preconditioned(state, scaled, label, None if operator is None else operator.mask)

    @torch.no_grad()
    def by_formula(self) -> Tensor:
        """The first batch, fp64."""
        sigma, sigma_data = self.generator.sigma_init, self.denoiser.sigma_data
        state, scaled, label, mask = self.preconditioned()
        answer = self.denoiser.network_output(scaled, label, mask).double()
        total = sigma**2 + sigma_data**2
        out = torch.full_like(state, sigma * sigma_data / math.sqrt(total))
        if self.denoiser.hides_pixels:
            out[(mask == 0).expand_as(out)] = sigma_data
        return sigma_data**2 / total * state + out * answer

    def network(self) -> Callable[[], None]:
        """The network alone, on as many batches as the images take; on a GPU captured, as ours is."""
        inputs = dict(zip(("x", "noise", "mask"), self.preconditioned()[1:], strict=True))
        run = torch.no_grad()(lambda tree: self.denoiser.network_output(**tree))
        call: Any = CapturedCall(run, inputs) if self.case.device.type == "cuda" else partial(run, inputs)

        def batches() -> None:
            for _ in range(-(-self.case.images // self.case.batch)):
                call()
            synchronise(self.case.device)

        return batches

    def batch(self, eager: bool) -> Callable[[], None]:
        sigma = torch.tensor(self.generator.sigma_init, device=self.case.device)

        @torch.no_grad()
        def run() -> None:
            if eager:
                operator, state = self.generator.operator(self.seeds), sigma * self.generator.latents(self.seeds)
                mask = None if operator is None else operator.mask
                self.denoiser(state if operator is None else operator.normal(state), sigma, mask)
            else:
                self.uncaptured(self.seeds)
            synchronise(self.case.device)

        return run

    def flops(self) -> int:
        _, scaled, label, mask = self.preconditioned()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.denoiser.network_output(scaled, label, mask)
        return counter.get_total_flops() // self.case.batch * self.case.images

    def evaluations(self) -> float:
        """Of the network by the teacher, per image of the first batch."""
        seen: list[int] = []
        hook = self.denoiser.network.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
        TeacherSampler(self.denoiser, self.case.image_shape, self.teacher.corruption)(self.seeds)
        hook.remove()
        return sum(seen) / self.case.batch

    def pixels(self, name: str) -> np.ndarray:
        """The first batch of what was written, [B, H, W, channels]."""
        if self.case.files == "npz":
            return np.load(self.paths[name])["arr_0"][: self.case.batch]
        files = sorted(self.paths[name].iterdir())[: self.case.batch]
        found = np.stack([np.asarray(Image.open(file)) for file in files])
        return found if found.ndim == 4 else found[..., None]

    def error(self) -> float:
        """Largest distance of the first batch from the formula, as a fraction of √ε/4 of the largest value, 9e-5 for
        fp32 and 2e-2 for bf16; or of its files from it, as one of those 8-bit levels."""
        exact = self.by_formula()
        allowed = math.sqrt(torch.finfo(DTYPES[self.case.dtype]).eps) / 4 * exact.abs().max()
        floats = ((self.generator(self.seeds).double() - exact).abs().max() / allowed).item()
        expected = to_uint8(self.generator(self.seeds)).cpu().numpy()
        levels = np.abs(self.pixels("ours").astype(int) - expected[: self.case.images].astype(int)).max()
        return math.inf if math.isnan(floats) else max(floats, float(levels))


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bench(case: Case, *, min_seconds: float, samples: int) -> Row:
    """Ours and the teacher in turns.

    Raises:
        RuntimeError: images are not those of the formula, or the teacher's evaluations not 35: times mean nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup(case, Path(folder))
        setup.write("ours")
        error, evaluations = setup.error(), setup.evaluations()
        if not error <= 1 or evaluations != EVALUATIONS:
            raise RuntimeError(
                f"{case}: images {error:.3g} times as far from the formula as is allowed, {evaluations:g} evaluations "
                f"of the teacher where {EVALUATIONS} are expected: no row"
            )
        cpu = torch.device("cpu")  # each call ends on the host, so that a GPU is timed like a CPU
        whole: dict[str, list[harness.Call]] = {name: [partial(setup.write, name)] for name in setup.paths}
        times = harness.measure(whole | {"network": [setup.network()]}, cpu, min_seconds=min_seconds, samples=samples)
        batches: dict[str, list[harness.Call]] = {
            name: [setup.batch(eager)] for name, eager in (("fused", False), ("eager", True))
        }
        times |= harness.measure(batches, cpu, min_seconds=min_seconds, samples=samples)
        work = setup.flops()
    own, teacher, network = (times[name].median for name in ("ours", "teacher", "network"))
    ceiling = matmul_flop_per_s(case.device, DTYPES[case.dtype], min_seconds=min_seconds) / 1e12
    return Row(
        **case.columns,
        images=case.images,
        median_us=own,
        p20_us=times["ours"].p20,
        p80_us=times["ours"].p80,
        images_per_s=round(1e6 * case.images / own, 1),
        teacher_us=teacher,
        teacher_images_per_s=round(1e6 * case.images / teacher, 1),
        teacher_evaluations=evaluations,
        speedup_teacher=round(teacher / own, 2),
        network_us=network,
        percent_outside=round(100 * (1 - network / own), 1),
        batch_us=times["fused"].median,
        batch_eager_us=times["eager"].median,
        speedup_preconditioning=round(times["eager"].median / times["fused"].median, 3),
        flops=work,
        tflop_per_s=round(work / own / 1e6, 4),
        matmul_tflop_per_s=round(ceiling, 4),
        percent_of_matmul=round(100 * work / own / 1e6 / ceiling, 2),
        error=round(error, 4),
    )


def options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(min_seconds=1.0)
    parser.add_argument("--corruption", choices=(*CORRUPTIONS, FULL), help="default: denoising; on a GPU ffhq64")
    parser.add_argument("--files", action="append", choices=FILES, help="may be repeated (default: both)")
    parser.add_argument("--images", type=int, help="default: 256; on a GPU 1024")
    parser.add_argument("--batch", type=int, help="default: 64; on a GPU 256")
    parser.add_argument("--dtype", choices=DTYPES, help="of the network's arithmetic (default: fp32; on a GPU bf16)")
    parser.add_argument("--compile", action="store_true", help="the networks of both")
    parser.add_argument("--samples", type=int, default=3, help="timed runs of each, at least")


def cases(args: argparse.Namespace) -> list[Case]:
    cuda = args.device.type == "cuda"
    images = args.images or (1024 if cuda else 256)  # the teacher takes 35 evaluations of each
    common = (images, min(args.batch or (256 if cuda else 64), images), args.dtype or ("bf16" if cuda else "fp32"))
    corruption = args.corruption or (FULL if cuda else CORRUPTIONS[0])
    return [Case(corruption, files, *common, args.device, args.compile) for files in args.files or FILES]


def jobs(args: argparse.Namespace) -> Iterator[command.Job]:
    for case in cases(args):
        yield command.Job(case.columns, partial(bench, case, min_seconds=args.min_seconds, samples=args.samples))


def describe(row: Row) -> str:
    return (
        f"{row.variant}, {row.shape}, {row.dtype}, {row.backend}: {row.images_per_s} images/s, {row.speedup_teacher}x "
        f"the teacher's {row.teacher_images_per_s} in {row.teacher_evaluations:g} evaluations; {row.percent_outside} % "
        f"of the time outside the network, {row.percent_of_matmul} % of {row.matmul_tflop_per_s} TFLOP/s; "
        f"preconditioning {row.speedup_preconditioning}x; error {row.error} of what is allowed"
    )


def prepare(files: str, implementation: str) -> tuple[str, harness.Call]:
    folder = tempfile.TemporaryDirectory()
    setup = Setup(Case(CORRUPTIONS[0], files, 16, 16, "fp32", command.default_device()), Path(folder.name))
    setup.write("ours")
    assert setup.error() <= 1
    setup.folder = folder  # type: ignore[attr-defined]  # lives as long as the call
    return f"16 images of one step and of 18 to {files}", partial(setup.write, implementation)


main = partial(command.run, __doc__, "onestep", options, jobs, describe)
test_onestep = command.speed_test(prepare, itertools.product(FILES, ["ours", "teacher"]))

if __name__ == "__main__":
    main()
