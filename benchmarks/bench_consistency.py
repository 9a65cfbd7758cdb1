"""ContentConsistency end to end against an EdiVal-style loop: PIL, image by image, references embedded again.

mtedit-fast bench consistency           the playground's DINO; appends to benchmarks/results/consistency.csv
mtedit-fast bench consistency --full    a DINOv3 ViT-B/16 with random weights at 224 pixels, for a GPU
pytest benchmarks/bench_consistency.py --benchmark-only

Both get the edits as the decoder leaves them, floats on the device, here multiples of 1/255, so that PIL sees the same
images. `difference` is the largest distance between the two scores: PIL rounds to 8 bits between and after its passes.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import command
import harness
import record
import torch
import torch.nn.functional as F
from flops import matmul_flop_per_s
from peers.consistency_loop import ConsistencyLoop
from peers.judge_loop import to_pil
from torch import Tensor
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from mtedit_fast.edival import ContentConsistency
from mtedit_fast.edival.background import pixel_boxes
from mtedit_fast.training.playground.models import load_dino
from mtedit_fast.training.playground.world import CELLS, GRID, random_scenes, render

ALLOWED = 0.02  # difference between the two scores


@dataclass(frozen=True)
class Row(record.Line):
    """One line of a results file. Times are microseconds of a whole call."""

    images: int
    """Images through the ViT: whole ones and crops, each reference once."""
    loop_images: int
    median_us: float
    p20_us: float
    p80_us: float
    images_per_s: float
    flops: int
    gflop_per_s: float
    matmul_gflop_per_s: float
    percent_of_matmul: float
    """Share of the ViT's roofline: of the rate at which this device multiplies large matrices in this dtype."""
    vit_us: float
    percent_of_vit: float
    """Share of the time that the ViT alone takes for the same images, already cut and in one batch."""
    loop_us: float
    speedup_loop: float
    difference: float


@dataclass(frozen=True)
class Case:
    """A rollout of `group` members and `turns` turns from one reference, with `boxes` unchanged objects."""

    full: bool
    device: torch.device
    group: int = 16
    turns: int = 3
    boxes: int = 4

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.full and self.device.type == "cuda" else torch.float32

    @property
    def shape(self) -> str:
        return f"{self.group}x{self.turns}x{self.boxes}x{self.images[1].shape[-1]}"

    @cached_property
    def model(self) -> Any:
        if not self.full:
            return load_dino().to(self.device)
        torch.manual_seed(0)
        sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
        config = DINOv3ViTConfig(**sizes, patch_size=16, image_size=224, num_register_tokens=4)
        return DINOv3ViTModel(config).to(self.device, self.dtype).eval()

    @cached_property
    def images(self) -> tuple[Tensor, Tensor]:
        """A reference [1, 3, H, W] and edits [B, K, 3, H, W]: playground scenes, noisy, of 8 bits."""
        generator = torch.Generator().manual_seed(0)
        cells, background = random_scenes(1, generator)
        reference = render(cells, background)
        if self.full:
            reference = F.interpolate(reference, 512, mode="nearest")
        noise = torch.randn(self.group, self.turns, *reference.shape[1:], generator=generator)
        edits = (reference[:, None] + 0.1 * noise).clamp(0, 1)
        reference, edits = (((255 * x).round() / 255).to(self.device) for x in (reference, edits))
        return reference, edits

    @property
    def objects(self) -> list[list[float]]:
        """The first cells, as boxes."""
        assert self.boxes <= CELLS
        return [[(i % GRID + 0.5) / GRID, (i // GRID + 0.5) / GRID, 1 / GRID, 1 / GRID] for i in range(self.boxes)]

    @property
    def vit_images(self) -> int:
        return (1 + self.group * self.turns) * (1 + self.boxes)

    @property
    def flops(self) -> int:
        """Of the ViT for all images. With T tokens, P patches of p pixels, width D and MLP width M, an image takes
        2·P·3p²·D for its patches and, per layer, 2·T·(4·D² + 2·D·M) for projections and 4·T²·D for attention."""
        c = self.model.config
        patches = (c.image_size // c.patch_size) ** 2
        tokens = 1 + getattr(c, "num_register_tokens", 0) + patches
        width = c.hidden_size
        mlp = getattr(c, "intermediate_size", None) or c.mlp_ratio * width
        layer = 2 * tokens * (4 * width**2 + 2 * width * mlp) + 4 * tokens**2 * width
        return self.vit_images * (2 * patches * 3 * c.patch_size**2 * width + c.num_hidden_layers * layer)


def ours(case: Case) -> Callable[[], Tensor]:
    metric = ContentConsistency(case.model)
    reference, edits = case.images
    unchanged = [[case.objects] * case.turns] * case.group

    def run() -> Tensor:
        return metric(reference, edits, unchanged, [case.objects], unchanged, owner=[0] * case.group).score.cpu()

    return run


def loop(case: Case) -> Callable[[], Tensor]:
    """One turn after the other (peers/consistency_loop.py)."""
    metric = ConsistencyLoop(case.model)
    reference, edits = case.images

    @torch.no_grad()
    def run() -> Tensor:
        boxes = pixel_boxes([case.objects], *reference.shape[2:])[0].tolist()
        return torch.tensor(
            [[metric(to_pil(reference[0]), to_pil(edit), boxes, boxes) for edit in chain] for chain in edits]
        )

    return run


def vit(case: Case) -> Callable[[], Tensor]:
    """The ViT alone, on as many images in one batch."""
    size = case.model.config.image_size
    pixels = torch.randn(case.vit_images, 3, size, size, device=case.device).to(case.dtype)

    @torch.no_grad()
    def run() -> Tensor:
        return case.model(pixel_values=pixels).last_hidden_state[0, 0].cpu()

    return run


IMPLEMENTATIONS = {"ours": ours, "loop": loop, "vit": vit}


def bench(case: Case, min_seconds: float) -> Row:
    """Raises RuntimeError where ours and the loop do not score alike, so that times mean nothing."""
    calls = {name: make(case) for name, make in IMPLEMENTATIONS.items()}
    difference = (calls["ours"]() - calls["loop"]()).abs().max().item()
    if not difference <= ALLOWED:
        raise RuntimeError(f"{case}: scores differ by {difference:.3g}, {ALLOWED} is allowed: no row")
    # each call ends on the host, so that a GPU is timed like a CPU
    peers = {name: [call] for name, call in calls.items()}
    samples = harness.host_samples(case.device)
    times = harness.measure(peers, torch.device("cpu"), min_seconds=min_seconds, samples=samples)
    own = times["ours"]
    gflop_per_s, peak = (
        case.flops / own.median / 1e3,
        matmul_flop_per_s(case.device, case.dtype, min_seconds=min_seconds) / 1e9,
    )
    return Row(
        **columns(case),
        images=case.vit_images,
        loop_images=2 * case.group * case.turns * (1 + case.boxes),
        median_us=own.median,
        p20_us=own.p20,
        p80_us=own.p80,
        images_per_s=round(1e6 * case.vit_images / own.median, 1),
        flops=case.flops,
        gflop_per_s=round(gflop_per_s, 1),
        matmul_gflop_per_s=round(peak, 1),
        percent_of_matmul=round(100 * gflop_per_s / peak, 1),
        vit_us=times["vit"].median,
        percent_of_vit=round(100 * times["vit"].median / own.median, 1),
        loop_us=times["loop"].median,
        speedup_loop=round(times["loop"].median / own.median, 2),
        difference=round(difference, 6),
    )


def columns(case: Case) -> dict:
    return record.environment(case.device) | {
        "op": "content_consistency",
        "variant": "dinov3-vit-b16" if case.full else "playground",
        "shape": case.shape,
        "dtype": {torch.float32: "fp32", torch.bfloat16: "bf16"}[case.dtype],
        "backend": "auto",
        "timing": "call",
    }


def options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(min_seconds=1.0)
    parser.add_argument("--full", action="store_true", help="ViT-B/16 at 224 pixels, images of 512")
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--turns", type=int, default=3)


def jobs(args: argparse.Namespace) -> Iterator[command.Job]:
    case = Case(args.full, args.device, args.group, args.turns)
    yield command.Job(columns(case), partial(bench, case, args.min_seconds))


def describe(row: Row) -> str:
    return (
        f"{row.variant} {row.shape} {row.dtype}: {row.median_us / 1e3:.1f} ms, {row.images_per_s} images/s, "
        f"{row.percent_of_matmul} % of matmul, {row.percent_of_vit} % of the ViT alone; loop {row.speedup_loop}x, "
        f"scores differ by {row.difference}"
    )


def prepare(implementation: str) -> tuple[str, harness.Call]:
    case = Case(False, command.default_device(), group=4)
    assert (ours(case)() - loop(case)()).abs().max() <= ALLOWED
    return "content consistency, 4 x 3 turns", IMPLEMENTATIONS[implementation](case)


main = partial(command.run, __doc__, "consistency", options, jobs, describe)
test_content_consistency = command.speed_test(prepare, [(name,) for name in IMPLEMENTATIONS])

if __name__ == "__main__":
    main()
