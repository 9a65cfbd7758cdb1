"""Judges against true scores: the expected score and sampled ones, over held-out examples."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from mtedit_fast.judge.prompts import parse_answer
from mtedit_fast.judge.scores import Judge
from mtedit_fast.training.judge.agreement import agreement
from mtedit_fast.training.judge.answers import Branch
from mtedit_fast.training.judge.batch import Packer, Row
from mtedit_fast.training.judge.data import JudgeData, JudgeExample
from mtedit_fast.training.judge.sampling import generator_for, sample

Progress = Callable[[int], None]
KINDS = ("expected", "sampled", "expected_one", "sampled_one")


class Scored(NamedTuple):
    """What a judge said about one example of K turns, n times."""

    example: JudgeExample
    expected: np.ndarray
    """[m, K] expected scores, one after each thought (m = n), or m = 1 without; NaN where an answer has no score."""
    sampled: np.ndarray
    """[n, K] written scores, NaN where they cannot be read."""
    mass: np.ndarray
    """[m, K] probability of the score tokens."""
    answers: list[str]
    """n texts; empty without thinking."""

    def line(self) -> dict[str, Any]:
        """For predictions.jsonl: means over the n answers and the first alone, None where none is valid."""
        return {
            "id": self.example.id,
            "truth": list(self.example.scores),
            "expected": _none(_mean(self.expected)),
            "sampled": _none(_mean(self.sampled)),
            "expected_one": _none(self.expected[0]),
            "sampled_one": _none(self.sampled[0]),
            "mass": _none(_mean(self.mass)),
            "answers": self.answers,
        }


@torch.no_grad()
def predict(
    packer: Packer,
    examples: Sequence[JudgeExample],
    *,
    samples: int = 4,
    temperature: float = 1.0,
    top_p: float = 0.9,
    max_new_tokens: int = 1024,
    batch: int = 32,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Scored]:
    """Scores by a model in this process.

    With thinking, `samples` answers are written, and each gives a sampled score and the expected score in its place,
    after what it wrote before, earlier turns' scores included.
    Without, the expected score takes one forward, and `samples` scores are drawn from the softmax over the score
    tokens. The expectation is over the full vocabulary, as in training.
    """
    packer.model.eval()
    generator = generator_for(seed, 0, device=packer.device)
    if not packer.prompt.thinking:
        return _without_thoughts(packer, examples, samples, batch, generator, progress)
    answers = sample(
        packer,
        examples,
        n=samples,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        batch=batch,
        generator=generator,
        progress=progress,
    )
    results, rows, owners = [], [], []
    for index, (example, own) in enumerate(zip(examples, answers, strict=True)):
        turns = len(example.edits)
        read = [packer.parse(ids, turns) or [math.nan] * turns for ids in own]
        blank = np.full((samples, turns), np.nan)
        texts = ["".join(map(packer.text, ids)) for ids in own]
        results.append(Scored(example, blank, np.array(read), blank.copy(), texts))
        found = [(number, ids, packer.slots(ids, turns)) for number, ids in enumerate(own)]
        branches = {number: Branch(tuple(ids[: slots[-1][0]]), slots) for number, ids, slots in found if slots}
        if branches:
            rows.append(Row(example, list(branches.values())))
            owners.append((index, list(branches)))
    for start in range(0, len(rows), batch):
        part = packer.pack(rows[start : start + batch])
        prediction = packer.predict(part)
        places = [(index, number) for index, numbers in owners[start : start + batch] for number in numbers]
        _fill(results, places, part.slot_branch, part.slot_turn, prediction.score, prediction.mass)
    return results


def _without_thoughts(
    packer: Packer,
    examples: Sequence[JudgeExample],
    samples: int,
    batch: int,
    generator: torch.Generator,
    progress: Progress | None,
) -> list[Scored]:
    results: list[Scored] = []
    values = np.array(packer.scale.values)
    for start in range(0, len(examples), batch):
        chosen = examples[start : start + batch]
        part = packer.pack([Row(example, packer.slot_branches(example)) for example in chosen])
        prediction = packer.predict(part)
        drawn = torch.multinomial(prediction.among, samples, replacement=True, generator=generator).cpu().numpy()
        scores, mass = prediction.score.cpu().double().numpy(), prediction.mass.cpu().double().numpy()
        at = 0
        for example in chosen:  # slots come in the order of examples and turns
            own = slice(at, at + len(example.edits))
            results.append(Scored(example, scores[None, own], values[drawn[own].T], mass[None, own], []))
            at = own.stop
        if progress is not None:
            progress(len(chosen))
    return results


def _fill(results: list[Scored], places: list[tuple[int, int]], branch: Any, turn: Any, score: Any, mass: Any) -> None:
    columns = (tensor.tolist() for tensor in (branch, turn, score, mass))
    for own, k, value, part in zip(*columns, strict=True):
        index, number = places[own]
        results[index].expected[number, k] = value
        results[index].mass[number, k] = part


def predict_with(
    judge: Judge,
    data: JudgeData,
    examples: Sequence[JudgeExample],
    *,
    thinking: bool,
    batch: int = 32,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> list[Scored]:
    """Scores by any `Judge`, such as a served one: its score is the expected one; with `thinking` its answers are the
    sampled ones, and there is no expectation."""
    results: dict[str, Scored] = {}
    for turns in sorted({len(example.edits) for example in examples}):
        same = [example for example in examples if len(example.edits) == turns]
        for start in range(0, len(same), batch):
            part = same[start : start + batch]
            references = [data.image(example.image).to(device) for example in part]
            edits = [torch.stack([data.image(file) for file in _one_size(data, e)]).to(device) for e in part]
            scores = judge.score(references, edits, [list(example.instructions) for example in part])
            for row, example in enumerate(part):
                answers = [] if scores.answers is None else scores.answers[row]
                own = scores.score[row].double().cpu().numpy()[None]
                mass = scores.mass[row].double().cpu().numpy()[None]
                nothing = np.full((1, turns), np.nan)
                if thinking:
                    read = [parse_answer(answer, turns, data.scale) or [math.nan] * turns for answer in answers]
                    results[example.id] = Scored(example, nothing, np.array(read or nothing), nothing, answers)
                else:
                    results[example.id] = Scored(example, own, nothing, mass, answers)
            if progress is not None:
                progress(len(part))
    return [results[example.id] for example in examples]


def _one_size(data: JudgeData, example: JudgeExample) -> tuple[Path, ...]:
    sizes = {tuple(data.image(file).shape[-2:]) for file in example.edits}
    if len(sizes) > 1:
        raise ValueError(f"{example.where}: edits: this judge takes a trajectory of one size, got {sorted(sizes)}")
    return example.edits


def summarize(scored: Sequence[Scored], *, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Agreement with the true scores over all known turns.

    `expected` and `sampled` average the n answers about an edit; `expected_one` and `sampled_one` take the first alone.
    `invalid`: how many of how many scores could not be read. Intervals resample original images.
    """
    truth = np.array([math.nan if y is None else y for s in scored for y in s.example.scores])
    groups = [str(s.example.image) for s in scored for _ in s.example.scores]
    columns = {
        "expected": [_mean(s.expected) for s in scored],
        "sampled": [_mean(s.sampled) for s in scored],
        "expected_one": [s.expected[0] for s in scored],
        "sampled_one": [s.sampled[0] for s in scored],
    }
    figures = {name: np.concatenate(parts) for name, parts in columns.items()}
    summary: dict[str, Any] = {
        "examples": len(scored),
        "scores": int((~np.isnan(truth)).sum()),
        "originals": len(set(groups)),
        "mass": _share(np.concatenate([s.mass.ravel() for s in scored])),
        "invalid": {},
    }
    for kind in ("expected", "sampled"):
        values = np.concatenate([getattr(s, kind).ravel() for s in scored])
        if np.isnan(values).all():
            figures = {name: column for name, column in figures.items() if not name.startswith(kind)}
        else:
            summary["invalid"][kind] = {"count": int(np.isnan(values).sum()), "of": len(values)}
    one = max(len(s.expected) for s in scored) == 1
    for name, column in figures.items():
        if not (name == "expected_one" and one):  # the same as expected
            summary[name] = agreement(column, truth, groups, resamples=resamples, seed=seed)
    return summary


def write_predictions(path: str | Path, scored: Sequence[Scored]) -> Path:
    """A line per example: id, truth, expected, sampled, mass, answers."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(s.line(), ensure_ascii=False) + "\n" for s in scored)
    path.write_text(text, encoding="utf-8")
    return path


def _mean(values: np.ndarray) -> np.ndarray:
    """[K] means over the valid ones of [n, K]."""
    valid = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(valid, values, 0).sum(0) / valid.sum(0)


def _share(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return known.mean().item() if len(known) else None


def _none(values: np.ndarray) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]
