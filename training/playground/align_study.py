"""Attention-map alignment on the playground: instruction success of held-out edits against the step's scale."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mtedit_fast.editors import KontextEditor
from mtedit_fast.edival.statistics import paired_bootstrap, wilson_interval
from mtedit_fast.figures import INK, mark, paste, wrap_text
from mtedit_fast.inference_time.align import align_edit, phrase_targets
from mtedit_fast.inference_time.attention_maps import AttentionMaps
from mtedit_fast.inference_time.ebama import Targets, ebama_loss
from mtedit_fast.inference_time.phrases import Phrase, editor_tokens
from mtedit_fast.ops import seeded_noise
from mtedit_fast.rollout import sample_seeds

from . import oracle
from .data import split_chains
from .models import GUIDANCE, MAX_TOKENS, load_pipeline
from .world import CELLS, GRID, SHAPES, SIZE, render

SCALES = (0.0, 1.0, 3.0, 10.0, 30.0)
STEPS = 6
SHOWN = 4
"""Edits in the picture."""


class Edits(NamedTuple):
    images: Tensor  # [N, 3, 64, 64]
    instructions: list[str]
    phrases: list[list[Phrase]]


def object_phrases(instruction: str, *, kept: bool = False) -> list[Phrase]:
    """The objects an instruction of the playground names: "metal red circle", "blue sign A"; none of a background's.

    kept: only those that the edited image is to show, with the attributes they are to have.
    """
    words = instruction.split()
    found = []
    for place, word in enumerate(words):
        if word in SHAPES:
            found.append(Phrase(word, (words[place - 2], words[place - 1])))
        elif word == "sign":
            found.append(Phrase(word, (words[place - 1], words[place + 1])))
    match words if kept else []:
        case ["Remove", *_]:
            return []
        case ["Replace", *_]:
            return found[1:]
        case ["Change", "the", ("color" | "material" | "text") as attribute, *_, value]:
            noun, (first, second) = found[0].noun, found[0].modifiers
            leads = attribute == ("color" if noun == "sign" else "material")
            return [Phrase(noun, (value, second) if leads else (first, value))]
    return found


def held_out_edits(count: int, seed: int = 0, *, kept: bool = True) -> Edits:
    """First turns of held-out chains whose instruction names an object, one to be `kept` if so."""
    chains = split_chains(2 * count, seed, "heldout")
    named = [object_phrases(texts[0], kept=kept) for texts in chains.instructions]
    rows = [row for row, phrases in enumerate(named) if phrases][:count]
    start = chains.scenes[rows, 0]
    images = (render(start[:, :CELLS], start[:, CELLS]) * 255).round() / 255
    return Edits(images, [chains.instructions[row][0] for row in rows], [named[row] for row in rows])


def align_study(
    output: Path,
    *,
    scales: Sequence[float] = SCALES,
    count: int = 200,
    seed: int = 0,
    batch: int = 50,
    distance: str = "cosine",
    kept: bool = True,
    console: Console | None = None,
) -> dict[str, Any]:
    """Edit `count` held-out images at every scale from the same noise; returns what output/summary.json holds.

    Scales already in it under the same settings are not run again.

    Args:
        kept: align the objects that an edit keeps or makes; False: those it removes or replaces, too.

    Raises:
        ValueError: no scale 0, with which the others are compared.
    """
    console = console or Console()
    if 0 not in scales:
        raise ValueError(f"scales: expected 0, the plain edit, among them, got {list(scales)}")
    settings = {"count": count, "seed": seed, "steps": STEPS, "guidance": GUIDANCE, "distance": distance, "kept": kept}
    summary = _read(output, settings)
    editor = KontextEditor(load_pipeline(), max_sequence_length=MAX_TOKENS)
    edits, seeds = held_out_edits(count, seed, kept=kept), sample_seeds(seed, 0, count)
    for scale in sorted(scales):
        if str(float(scale)) not in summary["runs"]:
            images = _edited(editor, edits, seeds, scale, batch, distance)
            result = oracle.evaluate(edits.images, images[:, None], [[text] for text in edits.instructions])
            summary["runs"][str(float(scale))] = {
                "success": result.marginal[:, 0].int().tolist(),
                "cell_accuracy": result.cell_accuracy[:, 0].tolist(),
                "energy": ebama_loss(*text_maps(editor, edits, images, seeds), distance=distance).tolist(),
            }
            _write(output, summary)
    summary["table"] = _rows(summary["runs"], sorted(scales))
    _write(output, summary)
    best = max((row for row in summary["table"] if row["scale"]), key=lambda row: row["success"], default=None)
    if best:
        picture(editor, edits, seeds, best["scale"], distance).save(output / "maps.png")
    console.print(table(summary["table"]))
    console.print(f"maps.png and summary.json → {output}", markup=False)
    return summary


def _edited(
    editor: KontextEditor, edits: Edits, seeds: Tensor, scale: float, batch: int, distance: str = "cosine"
) -> Tensor:
    parts = []
    for start in range(0, len(edits.images), batch):
        rows = slice(start, start + batch)
        parts.append(
            align_edit(
                editor,
                edits.images[rows],
                edits.instructions[rows],
                edits.phrases[rows],
                num_steps=STEPS,
                guidance_scale=GUIDANCE,
                seeds=seeds[rows],
                scale=scale,
                distance=distance,
            )
        )
    return torch.cat(parts)


def _rows(runs: dict[str, Any], scales: Sequence[float]) -> list[dict[str, Any]]:
    plain = runs["0.0"]
    rows = []
    names = ("success", "cell_accuracy", "energy")
    for scale in scales:
        run = runs[str(float(scale))]
        success = run["success"]
        rows.append(
            {
                "scale": float(scale),
                "success": sum(success) / len(success),
                "interval": list(wilson_interval(sum(success), len(success))),
                "difference": {name: paired_bootstrap(plain[name], run[name])._asdict() for name in names},
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Success, and paired differences to scale 0, with 95 % intervals."""
    out = Table(title="held-out edits: instruction success, and differences to scale 0")
    for name in ("scale", "success, %", "Δ success, points", "Δ cell accuracy, points", "Δ energy"):
        out.add_column(name, justify="right")
    for row in rows:
        cells = [f"{row['scale']:g}", _spread([row["success"], *row["interval"]], 100)]
        if row["scale"]:
            for name, factor in (("success", 100), ("cell_accuracy", 100), ("energy", 1)):
                cells.append(_spread(list(row["difference"][name].values()), factor, sign="+"))
        out.add_row(*cells)
    return out


def _spread(values: Sequence[float], factor: float, sign: str = "") -> str:
    """Of a mean and its interval."""
    digits = 1 if factor == 100 else 3
    shown = [f"{factor * value:{sign}.{digits}f}" for value in values]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]"


@torch.no_grad()
def text_maps(
    editor: KontextEditor, edits: Edits, results: Tensor, seeds: Tensor, sigma: float = 0.7
) -> tuple[Tensor, Targets]:
    """Attention maps [N, T, 4, 4] of the instructions' words, and which is whose.

    At noise level `sigma` of the straight path from each edit's noise to its result [N, 3, 64, 64].
    """
    clean = editor.encode_image(results)
    latents = torch.lerp(clean, seeded_noise(seeds, tuple(clean.shape[1:]), 0), sigma)
    targets = phrase_targets(edits.instructions, edits.phrases, editor_tokens(editor, edits.instructions))
    text, references = editor.encode_text(edits.instructions), editor.encode_image(edits.images)
    condition = editor.condition(references, text, height=SIZE, width=SIZE, guidance_scale=GUIDANCE)
    with AttentionMaps(editor.transformer, targets.columns, (GRID, GRID)) as maps:
        editor.velocity(latents, torch.tensor(1000 * sigma), condition)
    return maps.mean(), targets


def picture(editor: KontextEditor, edits: Edits, seeds: Tensor, scale: float, distance: str = "cosine") -> Image.Image:
    """A row per edit: the image, two words' maps over the plain edit, the plain edit and the aligned one."""
    rows = slice(SHOWN)
    shown, seeds = Edits(edits.images[rows], edits.instructions[rows], edits.phrases[rows]), seeds[rows]
    plain, aligned = (_edited(editor, shown, seeds, each, SHOWN, distance) for each in (0.0, scale))
    maps, targets = text_maps(editor, shown, plain, seeds)
    words = torch.stack([targets.nouns[:, 0], targets.modifiers[:, 0, 0]], dim=1)
    heat = torch.einsum("bkt,bthw->bkhw", words, maps)
    cell, gap, top = 128, 14, 34
    canvas = Image.new("RGB", (5 * (cell + gap) + gap, SHOWN * (cell + gap + top)), "white")
    draw: Any = ImageDraw.Draw(canvas)
    font = draw.getfont()
    for row, (text, phrases) in enumerate(zip(shown.instructions, shown.phrases, strict=True)):
        y = row * (cell + gap + top) + top
        names = [wrap_text(text, font, cell, 2), phrases[0].noun, phrases[0].modifiers[0], "plain", f"scale {scale:g}"]
        overlays = [_overlay(plain[row], heat[row, word]) for word in range(2)]
        pictures = [shown.images[row], *overlays, plain[row], aligned[row]]
        for column, (name, image) in enumerate(zip(names, pictures, strict=True)):
            x = gap + column * (cell + gap)
            draw.text((x, y - top + 4), name, fill=INK, font=font)
            paste(canvas, image, (x, y), cell)
            if column > 2:
                right = oracle.evaluate(shown.images[row : row + 1], image[None, None], [[text]]).marginal[0, 0]
                mark(draw, x, y, cell, bool(right))
    return canvas


def _overlay(image: Tensor, heat: Tensor) -> Tensor:
    """The image, dark where the map is low."""
    heat = F.interpolate((heat / heat.max())[None, None], image.shape[-2:], mode="bilinear")[0]
    return image * (0.15 + 0.85 * heat)


def _read(output: Path, settings: dict[str, Any]) -> dict[str, Any]:
    path = output / "summary.json"
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return known if known.get("settings") == settings else {"settings": settings, "runs": {}}


def _write(output: Path, summary: dict[str, Any]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    (output / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")


if __name__ == "__main__":
    align_study(Path("runs/ebama"))
