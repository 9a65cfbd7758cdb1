"""`mtedit-fast edival demo`: decompose, instruct, edit and evaluate on the playground, offline, in a minute."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import torch
from rich.console import Console

from mtedit_fast.editors import KontextEditor
from mtedit_fast.edival.benchmark import BenchmarkRow, read_benchmark, write_benchmark
from mtedit_fast.edival.consistency import ContentConsistency
from mtedit_fast.edival.decompose import decompose
from mtedit_fast.edival.evaluate import VERDICTS, EvaluationConfig, evaluate
from mtedit_fast.edival.images import ImageFolder, save_image
from mtedit_fast.rollout import RolloutConfig, rollout, sample_seeds

from . import oracle
from .data import split_chains
from .edival import PlaygroundOracle, instruct_scene, signs_differ
from .instructions import phrase
from .models import GUIDANCE, MAX_TOKENS, load_dino, load_pipeline
from .world import CELLS, render


def run_edival(
    output: str | Path,
    *,
    chains: int = 200,
    turns: int = 3,
    steps: int = 6,
    seed: int = 0,
    console: Console | None = None,
) -> dict[str, Any]:
    """Decompose, instruct, edit and evaluate held-out scenes with the playground's editor; returns the report.

    Writes into `output`: bench.csv, images/{image_index}_{turn}.png, and what `evaluate` writes. The report has one
    more entry, `oracle`: image success of the same edits by `oracle.evaluate`, which also wants nothing else touched.
    """
    output, console = Path(output), console or Console(quiet=True)
    judge = PlaygroundOracle()
    candidates = split_chains(2 * chains, seed, "heldout").scenes[:, 0].tolist()
    scenes = [scene for scene in candidates if signs_differ(scene)][:chains]
    states = torch.tensor(scenes)
    references = (render(states[:, :CELLS], states[:, CELLS]) * 255).round() / 255
    rows, texts = [], []
    for i, (scene, objects) in enumerate(zip(scenes, decompose(references, judge, judge).scenes, strict=True)):
        chain, edits = instruct_scene(scene, objects, turns=turns, seed=Random(f"{seed}/{i}"))
        rows.append(BenchmarkRow.of(str(i), chain))
        texts.append([phrase(edit) for edit in edits])
    (output / "images").mkdir(parents=True, exist_ok=True)
    write_benchmark(output / "bench.csv", rows)
    console.print(f"{len(rows)} scenes decomposed, {turns} instructions each: {output / 'bench.csv'}")
    editor = KontextEditor(load_pipeline(), max_sequence_length=MAX_TOKENS)
    sampler = RolloutConfig(group_size=1, num_steps=steps, variant="ode", micro_batch=50, guidance_scale=GUIDANCE)
    edited = rollout(editor, references, texts, sampler, sample_seeds(seed, 0, len(rows))).images
    for i, chain_images in enumerate(torch.cat([references[:, None], edited], 1)):
        for turn, image in enumerate(chain_images):
            save_image(image, output / "images" / f"{i}_{turn}.png")
    console.print(f"edited with {steps} steps a turn: {output / 'images'}")
    strict = oracle.evaluate(references, edited, texts).image.float().mean(0).tolist()
    rows, errors = read_benchmark(output / "bench.csv")
    (output / VERDICTS).unlink(missing_ok=True)  # of an earlier demo
    return evaluate(
        rows,
        ImageFolder(output / "images", size=None),
        detector=judge,
        vlm=judge,
        consistency=ContentConsistency(load_dino()),
        config=EvaluationConfig(chains_per_step=50, detector_batch=256),
        output=output,
        errors=errors,
        extra={"oracle": strict},
        console=console,
    )
