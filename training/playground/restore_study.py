"""Flow Priors on the playground: PSNR of restored scenes, and edits with and without a keep-mask over three turns."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from torch import Tensor

from mtedit_fast.editors import KontextEditor
from mtedit_fast.edival.statistics import Estimate, paired_bootstrap
from mtedit_fast.inference_time.flow_priors import flow_of_denoiser, ictm
from mtedit_fast.inference_time.keep_mask import KeepMaskSettings, keep_mask_edit
from mtedit_fast.inference_time.problems import as_picture, plain_reconstruction, psnr, recommended
from mtedit_fast.onestep import Corruption, Operator, Stream, SuperResolution, image_seeds, load_denoiser, to_uint8
from mtedit_fast.ops import seeded_noise
from mtedit_fast.progress import progress_bar
from mtedit_fast.rollout import sample_seeds, turn_seeds
from mtedit_fast.training.rewards import RewardBatch

from . import oracle
from .data import split_chains
from .instructions import apply, parse
from .models import GUIDANCE, MAX_TOKENS, WEIGHTS, load_pipeline
from .rewards import content_consistency
from .rsd import SIDE, shapes
from .rsd_compare import HELD_OUT, grid
from .world import CELL, CELLS, GRID, render

PROBLEMS: dict[str, dict[str, Any]] = {
    "60 % of the pixels missing": {"name": "inpainting", "missing": 0.6},
    "a quarter missing, in one box": {"name": "box", "share": 0.5},
    "×2 super-resolution": {"name": "super_resolution", "factor": 2, "keep_size": False},
}
ARMS: dict[str, tuple[bool, bool, KeepMaskSettings]] = {
    # masked, its pixels pasted over a plain edit, settings
    "plain edit": (False, False, KeepMaskSettings(inner_steps=0, paste=False)),
    "plain edit, pasted": (False, True, KeepMaskSettings(inner_steps=0, paste=False)),
    "keep-mask, no gradient": (True, False, KeepMaskSettings(inner_steps=0)),
    "keep-mask": (True, False, KeepMaskSettings()),
    "keep-mask, not pasted": (True, False, KeepMaskSettings(paste=False)),
}
STEPS, TURNS, SHOWN = 6, 3, 8
PRIOR = WEIGHTS / "rsd" / "clean" / "teacher"
MARK = "<!-- results: written by restore_study -->"


class Edits(NamedTuple):
    success: Tensor  # [N, K] bool: turn k did what it was asked, and nothing else
    consistency: Tensor  # [N, K] fp32: with the first image, NaN where undefined
    outside: Tensor  # [N, K] fp32: PSNR of the cells to be kept against the image before the turn, NaN without any
    images: Tensor  # [N, K, 3, 64, 64]
    keep: Tensor  # [N, K, 1, 64, 64] bool


def run_study(
    output: Path,
    *,
    images: int = 200,
    chains: int = 200,
    seed: int = 1,
    prior: Path = PRIOR,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure what is not in output/summary.json yet; returns what it holds then. Pictures go beside it.

    The settings were chosen on chains of seed 0, which is not a seed to measure them with.

    Raises:
        ValueError: no prior at `prior`.
    """
    console = console or Console()
    output.mkdir(parents=True, exist_ok=True)
    path = output / "summary.json"
    wanted = {"images": images, "chains": chains, "seed": seed}
    summary = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if summary.get("settings") != wanted:
        summary = {"settings": wanted, "restoration": {}, "editing": {}}

    def keep(part: str, name: str, result: dict[str, Any]) -> None:
        summary[part][name] = result
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)

    for name in ARMS:
        if name not in summary["editing"]:
            edits = edit_chains(name, chains, seed, console)
            pictures = {"images": edits.images[:SHOWN], "keep": edits.keep[:SHOWN]}
            torch.save(pictures, output / f"{_file(name)}.pt")
            keep("editing", name, {key: _listed(getattr(edits, key)) for key in Edits._fields[:3]})
    for name, problem in PROBLEMS.items():
        chosen = {"solver": vars(recommended()), "problem": problem, "prior": str(prior)}
        if summary["restoration"].get(name, {}).get("chosen") != chosen:
            result = restore_scenes(name, images, seed, prior, output / f"{_file(name)}.png", console)
            keep("restoration", name, result | {"chosen": chosen})
    edits_picture(output, chains, seed).save(output / "keep_mask.png")
    console.print(tables(summary), markup=False, highlight=False)
    return summary


def restore_scenes(name: str, count: int, seed: int, prior: Path, picture: Path, console: Console) -> dict[str, Any]:
    """PSNR [count] of what was measured, a plain reconstruction, and Flow Priors, on scenes of no training set."""
    if not prior.is_dir():
        raise ValueError(f"prior: no folder {prior}; train it: mtedit-fast rsd teacher training/configs/rsd_clean.yaml")
    denoiser = load_denoiser(prior).denoiser
    denoiser.network.requires_grad_(False)
    corruption, settings = Corruption([PROBLEMS[name]]), recommended()
    clean, seeds = shapes(count, HELD_OUT), image_seeds(seed, torch.arange(count))
    rows: dict[str, list[Tensor]] = {"measured": [], "plain": [], "flow_priors": []}
    with progress_bar(console) as bar:
        task = bar.add_task(name, total=count * settings.steps, shown="")
        for part in torch.arange(count).split(50):
            y, operator = corruption(clean[part], seeds[part])
            start = seeded_noise(seeds[part], (3, SIDE, SIDE), Stream.LATENT)
            done = ictm(
                flow_of_denoiser(denoiser),
                operator,
                y,
                start=start,
                settings=settings,
                seeds=seeds[part],
                progress=lambda step, losses, n=len(part): bar.advance(task, n),  # type: ignore[misc]
            )
            rows["measured"].append(_full_size(operator, y))
            rows["plain"].append(plain_reconstruction(operator, y))
            rows["flow_priors"].append(done.images)
    found = {row: torch.cat(parts) for row, parts in rows.items()}
    shown = [to_uint8(row[:SHOWN]) for row in (*found.values(), clean)]
    grid(shown, ["measured", "plain", "flow priors", "clean"]).save(picture)
    return {row: psnr(pictures, clean).tolist() for row, pictures in found.items()}


def _full_size(operator: Operator, y: Tensor) -> Tensor:
    """Measurements in the images' size: small ones with their pixels repeated."""
    picture = as_picture(operator, y)
    if isinstance(operator, SuperResolution) and not operator.keep_size:
        return picture.repeat_interleave(operator.factor, 2).repeat_interleave(operator.factor, 3)
    return picture


def edit_chains(arm: str, count: int, seed: int, console: Console) -> Edits:
    """Held-out chains edited turn by turn, each arm going on from its own images; noise is the same for all arms."""
    masked, pasted, settings = ARMS[arm]
    editor = KontextEditor(load_pipeline(), max_sequence_length=MAX_TOKENS)
    chains = split_chains(count, seed, "heldout", TURNS)
    start = chains.scenes[:, 0]
    images = references = (render(start[:, :CELLS], start[:, CELLS]) * 255).round() / 255
    seeds, turns, kept, outside = sample_seeds(seed, 0, count), [], [], []
    with progress_bar(console) as bar:
        task = bar.add_task(arm, total=TURNS, shown="")
        for turn in range(TURNS):
            texts = [instructions[turn] for instructions in chains.instructions]
            keep = untouched(images, texts, turn)
            edited = keep_mask_edit(
                editor,
                images,
                texts,
                keep if masked else torch.zeros_like(keep),
                num_steps=STEPS,
                guidance_scale=GUIDANCE,
                seeds=turn_seeds(seeds, turn),
                settings=settings,
            )
            if pasted:
                edited = torch.where(keep, images, edited)
            error = ((edited - images).square() * keep).sum((1, 2, 3)) / (3 * keep.sum((1, 2, 3)))
            outside.append(-10 * error.clamp(min=1e-6).log10())  # at most 60 dB; 0 / 0: nothing to keep
            turns.append(edited)
            kept.append(keep)
            images = edited
            bar.advance(task)
    edits = torch.stack(turns, 1)
    judged = oracle.evaluate(references, edits, chains.instructions)
    consistency = content_consistency(RewardBatch(references, edits, chains.instructions))
    return Edits(judged.marginal, consistency, torch.stack(outside, 1), edits, torch.stack(kept, 1))


def untouched(images: Tensor, texts: list[str], turn: int) -> Tensor:
    """[N, 1, 64, 64] bool: cells that an instruction leaves as they are; none where it changes the background or cannot
    be carried out. Where it leaves a place open, an empty one is drawn."""
    masks = []
    for i, (state, text) in enumerate(zip(oracle.read_states(images), texts, strict=True)):
        after = apply(state, parse(text), Random(f"{i}/{turn}").sample(range(CELLS), CELLS))
        same = after is not None and after[CELLS] == state[CELLS]
        masks.append([same and after is not None and after[c] == state[c] for c in range(CELLS)])
    cells = torch.tensor(masks).view(-1, 1, GRID, GRID)
    return cells.repeat_interleave(CELL, 2).repeat_interleave(CELL, 3)


def edits_picture(output: Path, chains: int, seed: int) -> Any:
    """The first turn of the first chains with a mask: reference, mask, without it, pasted, and with it."""
    start = split_chains(chains, seed, "heldout", TURNS).scenes[:SHOWN, 0]
    references = render(start[:, :CELLS], start[:, CELLS])
    found = {name: torch.load(output / f"{_file(name)}.pt", weights_only=True) for name in ARMS}
    keep = found["plain edit"]["keep"][:, 0]
    rows = {"reference": references, "free cells": torch.where(keep, 0.85, references)}
    rows |= {name: found[name]["images"][:, 0] for name in ("plain edit", "plain edit, pasted", "keep-mask")}
    names = [name.replace("plain edit, pasted", "pasted") for name in rows]
    return grid([to_uint8(row * 2 - 1) for row in rows.values()], names)


def tables(summary: dict[str, Any]) -> str:
    """Markdown of both parts; differences are paired, with 95 % bootstrap intervals over images and chains."""
    count = summary["settings"]["images"]
    lines = [
        f"| {count} scenes of 32 × 32 | measured | plain reconstruction | Flow Priors | Flow Priors − plain [95 %] |",
        "|---|---|---|---|---|",
    ]
    for name, result in summary["restoration"].items():
        gain = paired_bootstrap(result["plain"], result["flow_priors"])
        means = " | ".join(f"{sum(result[row]) / count:.2f}" for row in ("measured", "plain", "flow_priors"))
        lines.append(f"| {name} | {means} | {_shown(gain, 1, 2)} dB |")
    plain = {key: _tensor(value) for key, value in summary["editing"]["plain edit"].items()}
    lines += [
        "",
        f"| {summary['settings']['chains']} chains | success, turns 1 / 2 / 3 | all three | against the plain edit "
        "[95 %] | content consistency, turn 3 | against the plain edit [95 %] | PSNR of kept cells |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, values in summary["editing"].items():
        own = {key: _tensor(value) for key, value in values.items()}
        rates = " / ".join(f"{100 * rate:.1f}" for rate in own["success"].mean(0).tolist())
        whole = own["success"].all(1).double()
        both = own["consistency"][:, -1].isfinite() & plain["consistency"][:, -1].isfinite()
        cells = [name, f"{rates} %", f"{100 * whole.mean():.1f} %"]
        if name == "plain edit":
            cells += ["", f"{own['consistency'][both, -1].mean():.3f}", ""]
        else:
            gain = paired_bootstrap(plain["success"].all(1).double(), whole)
            pair = plain["consistency"][both, -1], own["consistency"][both, -1]
            closer = paired_bootstrap(*pair) if bool(both.any()) else Estimate(*[torch.nan] * 3)
            cells += [_shown(gain, 100, 1), f"{own['consistency'][both, -1].mean():.3f}", _shown(closer, 1, 3)]
        lines.append("| " + " | ".join([*cells, f"{own['outside'].nanmean():.1f} dB"]) + " |")
    return "\n".join(lines)


def write_page(summary: dict[str, Any], output: Path, page: Path) -> Path:
    """Put tables and pictures under the mark in `page`; what stands above it stays."""
    head = page.read_text(encoding="utf-8").partition(MARK)[0] if page.is_file() else "# Flow Priors\n\n"
    parts = [head + MARK, tables(summary)]
    for source in (*(f"{_file(name)}.png" for name in PROBLEMS), "keep_mask.png"):
        target = page.with_name(f"{page.stem}_{source}")
        target.write_bytes((output / source).read_bytes())
        parts.append(f"![{source.removesuffix('.png').replace('_', ' ')}]({target.name})")
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page


def _listed(values: Tensor) -> list[list[float | None]]:
    """For JSON, which has no NaN."""
    return [[None if value != value else value for value in row] for row in values.tolist()]


def _tensor(rows: list[list[float | None]]) -> Tensor:
    return torch.tensor([[torch.nan if value is None else float(value) for value in row] for row in rows])


def _shown(value: Estimate, scale: float, digits: int) -> str:
    mean, low, high = (scale * number for number in value)
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def _file(name: str) -> str:
    if name in PROBLEMS:
        return str(PROBLEMS[name]["name"])
    return name.replace(",", "").replace(" ", "_").replace("-", "_")


def main(
    output: Path = Path("runs/flow_priors"),
    prior: Annotated[Path, typer.Option(help="folder of the clean prior")] = PRIOR,
    images: Annotated[int, typer.Option(min=2, help="scenes to restore")] = 200,
    chains: Annotated[int, typer.Option(min=2, help="of three edits")] = 200,
    page: Annotated[Path | None, typer.Option(help="also write tables and pictures into this page")] = None,
) -> None:
    """Restore scenes and edit chains of the playground, with tables; what is finished is kept."""
    summary = run_study(output, images=images, chains=chains, prior=prior)
    if page is not None:
        Console().print(f"page: {write_page(summary, output, page)}")


if __name__ == "__main__":
    typer.run(main)
