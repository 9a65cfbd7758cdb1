"""Edits with the oracle's grades, on which the playground's judge is trained."""

from __future__ import annotations

import json
import math
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from . import oracle
from .evaluate import edit_chains
from .fit import progress_bar, save_atomic
from .instructions import DIRECTIONS, Chains, closest, neighbour, parse, sample_chains
from .models import load_pipeline
from .world import BACKGROUNDS, CELLS, CLASSES, SIZE, render

STAY_RIGHT, STAY_WRONG, CHANGE_RIGHT, CHANGE_WRONG = range(4)


class Graded(NamedTuple):
    """N chains of K edits, what the oracle reads in them and how it grades them."""

    images: Tensor  # [N, K + 1, 3, 64, 64] uint8: the original, then the image after every turn
    instructions: list[list[str]]  # [N][K]
    scenes: Tensor  # [N, K + 1, 17] int16: cell classes (-1: unreadable) and background
    status: Tensor  # [N, K, 17] int8: what became of every cell, and of the background
    grades: Tensor  # [N, K] int8 in 1..5


def cell_status(before: list[int], instruction: str, after: list[int]) -> list[int]:
    """What became of every cell and of the background: meant to stay or to change, and right or wrong, [17].

    Against an edit that cannot be carried out on `before`, every cell was meant to stay, and the last entry stands for
    what is missing.
    """
    target = closest(before, parse(instruction), after)
    status = []
    for b, t, a in zip(before, before if target is None else target, after, strict=True):
        wrong = a != t or a < 0
        status.append((CHANGE_WRONG if wrong else CHANGE_RIGHT) if b != t else (STAY_WRONG if wrong else STAY_RIGHT))
    return status if target is not None else [*status[:CELLS], CHANGE_WRONG]


def grade(status: list[int]) -> int:
    """1 to 5 by the judge's rubric: how much of what was asked is done, less what else has changed.

    Nothing of it done, or half the image destroyed, is 1; all done 5 with nothing else touched, 4, 3 or 2 with one, up
    to three, more cells wrong; partly done at most 3.
    """
    done, missing = status.count(CHANGE_RIGHT), status.count(CHANGE_WRONG)
    wrong = status.count(STAY_WRONG)
    if (missing and not done) or wrong > CELLS // 2:
        return 1
    if missing:
        return 3 if wrong <= 1 else 2
    return 5 - (wrong > 0) - (wrong > 1) - (wrong > 3)


def thought(status: list[int]) -> str:
    """What a judge could say before it grades, in words of the playground's tokenizer."""
    done, missing = status.count(CHANGE_RIGHT), status.count(CHANGE_WRONG)
    wanted = "done" if not missing else "partly done" if done else "missing"
    wrong = min(status.count(STAY_WRONG), 9)
    return f"wanted {wanted}, rest {f'changed {wrong}' if wrong else 'kept'}"


def grade_chains(images: Tensor, instructions: list[list[str]]) -> Graded:
    """Grades of chains [N, K + 1, 3, 64, 64] uint8; every turn is judged against the image before it."""
    n, states = images.shape[:2]
    scenes = torch.tensor(oracle.read_states(images.flatten(0, 1).float() / 255)).view(n, states, -1)
    status = [
        [cell_status(chain[k], text, chain[k + 1]) for k, text in enumerate(texts)]
        for chain, texts in zip(scenes.tolist(), instructions, strict=True)
    ]
    grades = torch.tensor([[grade(turn) for turn in turns] for turns in status], dtype=torch.int8)
    return Graded(images, instructions, scenes.short(), torch.tensor(status, dtype=torch.int8), grades)


def _to_bytes(images: Tensor) -> Tensor:
    return (images.clamp(0, 1) * 255).round().byte()


def draw_chains(chains: Chains) -> Tensor:
    """Originals [N, 3, 64, 64] fp32 of chains, on 8-bit levels."""
    start = chains.scenes[:, 0]
    return (render(start[:, :CELLS], start[:, CELLS]) * 255).round() / 255


def edited_by(pipeline: Any, chains: Chains, seed: int) -> Tensor:
    """What the playground's editor makes of chains, in three or in six steps, [N, K + 1, 3, 64, 64] uint8."""
    originals = draw_chains(chains)
    half = len(originals) // 2
    edits = [
        edit_chains(pipeline, originals[part], chains.instructions[part], steps=steps, seed=seed)
        for part, steps in ((slice(half), 3), (slice(half, None), 6))
        if len(originals[part])
    ]
    return _to_bytes(torch.cat([originals[:, None], torch.cat(edits)], 1))


def _misdone(scene: list[int], text: str, rng: Random) -> list[int]:
    """A scene after an edit that an editor may have got wrong, in the ways editors do."""
    edit = parse(text)
    after = closest(scene, edit, [*rng.sample(range(CLASSES), CELLS), 0]) if min(scene) >= 0 else None
    after = list(scene) if after is None else after
    changed = [i for i in range(CELLS + 1) if after[i] != scene[i]]
    placed = [i for i in changed if i < CELLS and after[i] > 0 and scene[i] == 0]
    fate = rng.random()
    if changed and fate < 0.2:  # ignored
        after = list(scene)
    elif placed and fate < 0.4:  # in another place than asked for, as a rule beside it
        i = rng.choice(placed)
        beside = [j for j in (neighbour(i, direction) for direction in DIRECTIONS) if j is not None and after[j] == 0]
        empty = beside if beside and rng.random() < 0.6 else [j for j in range(CELLS) if after[j] == 0 and j != i]
        if empty:
            after[rng.choice(empty)], after[i] = after[i], 0
    elif changed and fate < 0.5:  # one place is something else than asked for, or was left out
        i = rng.choice(changed)
        after[i] = rng.choice([scene[i], rng.randrange(len(BACKGROUNDS) if i == CELLS else CLASSES)])
    if rng.random() < 0.5:  # collateral damage
        for i in rng.sample(range(CELLS), min(CELLS, 1 + int(rng.expovariate(0.5)))):
            after[i] = rng.choice([0, 0, rng.randrange(CLASSES)])
    if rng.random() < 0.03:
        after[CELLS] = rng.randrange(len(BACKGROUNDS))
    return after


@torch.no_grad()
def misdone_chains(pipeline: Any, chains: Chains, seed: int) -> Tensor:
    """Chains with drawn mistakes, every image once through the VAE, [N, K + 1, 3, 64, 64] uint8."""
    rng = Random(f"misdone/{seed}")
    drawn = []
    for scene, texts in zip(chains.scenes[:, 0].tolist(), chains.instructions, strict=True):
        states = [scene]
        for text in texts:
            states.append(_misdone(states[-1], text, rng))
        drawn.append(states)
    scenes = torch.tensor(drawn)
    n, states_per_chain = scenes.shape[:2]
    flat = scenes.flatten(0, 1)
    pictures = torch.cat(
        [
            pipeline.vae.decode(pipeline.vae.encode(part * 2 - 1).latent_dist.mode()).sample / 2 + 0.5
            for part in render(flat[:, :CELLS], flat[:, CELLS]).split(32)
        ]
    ).view(n, states_per_chain, 3, SIZE, SIZE)
    pictures[:, 0] = draw_chains(chains)
    return _to_bytes(pictures)


def load_or_make(
    path: Path, seed: int, edited: int, misdone: int, *, editor: Path | None = None, resume: bool = True
) -> Graded:
    """Graded chains for the build, some by the editor and some with drawn mistakes, kept in a file.

    editor: folder of the pipeline; None takes the committed one.
    """
    if resume and path.is_file():
        return Graded(**torch.load(path, weights_only=True))
    pipeline = load_pipeline(editor)
    parts = []
    with progress_bar() as progress:
        task = progress.add_task("edits", total=edited + misdone, metrics="")
        for make, name, count in ((edited_by, "edited", edited), (misdone_chains, "misdone", misdone)):
            for start in range(0, count, 400):
                size = min(400, count - start)
                chains = sample_chains(Random(f"judge/{name}/{seed}/{start}"), size)
                parts.append(grade_chains(make(pipeline, chains, seed + start), chains.instructions))
                progress.update(task, advance=size)
    tensors = {n: torch.cat([getattr(part, n) for part in parts]) for n in Graded._fields if n != "instructions"}
    graded = Graded(instructions=[texts for part in parts for texts in part.instructions], **tensors)
    save_atomic(graded._asdict(), path)
    return graded


def rating(status: list[int], rng: Random, noise: float = 0.5) -> int:
    """What one rater of a crowd, another than the judge was taught by, gives an edit, 1 to 5.

    Around 1 + 4·d·e^(−w/3), with d the share of what was asked that is done and w the other cells that are wrong: a
    rater who minds collateral damage more and credits a partial edit in proportion, with normal noise.
    """
    done, missing = status.count(CHANGE_RIGHT), status.count(CHANGE_WRONG)
    share = done / (done + missing) if done + missing else 1.0
    mean = 1 + 4 * share * math.exp(-status.count(STAY_WRONG) / 3)
    return min(5, max(1, round(mean + rng.gauss(0, noise))))


def write_rated(folder: str | Path, n: int, seed: int = 0, split: str = "train", pipeline: Any = None) -> Path:
    """Writes n single edits with a rater's scores as judge training takes them; returns `folder/{split}.jsonl`.

    Half the edits are the playground editor's own, half have drawn mistakes. A line: {"id", "image": original, "edits":
    [one], "instructions": [one], "scores": [one], "thought": what can be said of it, "types": [EdiVal type]}.
    """
    folder = Path(folder)
    (folder / split).mkdir(parents=True, exist_ok=True)
    pipeline = pipeline or load_pipeline()
    rng = Random(f"rater/{split}/{seed}")
    path = folder / f"{split}.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for make, count in ((edited_by, n - n // 2), (misdone_chains, n // 2)):
            chains = sample_chains(Random(f"rated/{make.__name__}/{split}/{seed}"), count, turns=1)
            graded = grade_chains(make(pipeline, chains, seed), chains.instructions)
            for i, texts in enumerate(graded.instructions):
                name = f"{split}-{seed}-{make.__name__}-{i:05d}"
                files = [f"{split}/{name}-{part}.png" for part in ("original", "edit")]
                for pixels, target in zip(graded.images[i], files, strict=True):
                    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / target, compress_level=1)
                status = graded.status[i, 0].tolist()
                record = {
                    "id": name,
                    "image": files[0],
                    "edits": files[1:],
                    "instructions": texts,
                    "scores": [rating(status, rng)],
                    "thought": thought(status),
                    "types": chains.types[i],
                }
                file.write(json.dumps(record) + "\n")
    return path
