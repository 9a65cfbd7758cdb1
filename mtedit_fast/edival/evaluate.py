"""EdiVal's evaluation of edited chains: instruction following, content consistency and quality, turn by turn."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from mtedit_fast.progress import progress_bar

from .backends import VLM, Detector, Quality
from .benchmark import BenchmarkRow, RowError
from .checks import CheckConfig, Turn, check_turns
from .consistency import ContentConsistency
from .finding import Finder, find_chains
from .images import UnreadableImage
from .statistics import ChainScores, summarize

VERDICTS = "verdicts.jsonl"


@dataclass(frozen=True)
class EvaluationConfig:
    """How chains are evaluated.

    Attributes:
        checks: thresholds and switches of the instruction-following checks.
        object_threshold: lowest score of the boxes that content consistency crops and cuts out.
        chains_per_step: chains in memory at once; their queries and questions go out together.
        detector_batch: images per detector call.
    """

    checks: CheckConfig = field(default_factory=CheckConfig)
    object_threshold: float = 0.35
    chains_per_step: int = 8
    detector_batch: int = 32

    def __post_init__(self) -> None:
        if self.chains_per_step < 1 or self.detector_batch < 1:
            raise ValueError(
                f"chains_per_step and detector_batch must be >= 1, got {self.chains_per_step}, {self.detector_batch}"
            )


def evaluate(
    rows: Sequence[BenchmarkRow],
    images: Mapping[str, Tensor],
    *,
    detector: Detector,
    vlm: VLM,
    consistency: ContentConsistency | None = None,
    quality: Quality | None = None,
    config: EvaluationConfig | None = None,
    output: str | Path | None = None,
    errors: Sequence[RowError] = (),
    name: str | None = None,
    extra: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Evaluate edited chains; returns what report.json holds.

    Args:
        rows: benchmark rows, each naming its chain.
        images: {image_index: [K + 1, 3, H, W] in [0, 1]}, the first image and that after every turn, such as an
            `ImageFolder`; chains of more images than turns are cut. Missing or unreadable ones are skipped and named
            in the report.
        consistency, quality: None leaves CC and O, or VQ, out.
        output: folder for verdicts.jsonl, report.json and report.html; None writes nothing. Every chain is appended
            to verdicts.jsonl as it is done: an evaluation that was stopped and is called again goes on.
        errors: of `read_benchmark`, for the report. name: of the edited chains, default the output folder's. extra:
            more entries of the report.

    Raises:
        ValueError: duplicate image_index, or an output folder whose verdicts were made with other settings or rows.
    """
    config, console = config or EvaluationConfig(), console or Console(quiet=True)
    settings: dict[str, Any] = {
        **asdict(config),
        "detector": _name(detector),
        "vlm": _name(vlm),
        "consistency": consistency and [_name(consistency.model), "edival_compat" if consistency.compat else "drop"],
        "quality": quality and _name(quality),
    }
    for performance in ("chains_per_step", "detector_batch"):
        del settings[performance]
    indices = [row.image_index for row in rows]
    if repeated := sorted({i for i in indices if indices.count(i) > 1}):
        raise ValueError(f"rows: expected one per image_index, got several of {', '.join(repeated)}")
    path = Path(output) / VERDICTS if output is not None else None
    done = _resume(path, {"settings": settings, "benchmark": _digest(rows)}) if path else {}
    skipped: list[dict[str, Any]] = [{"row": e.row_number, "reason": e.reason} for e in errors]
    waiting = [row for row in rows if row.image_index not in done]
    if done:
        console.print(f"{len(done)} of {len(rows)} chains are done already in {path}")
    with progress_bar(console) as progress:
        task = progress.add_task("evaluate", total=len(rows), completed=len(done), shown="")
        for start in range(0, len(waiting), config.chains_per_step):
            step = waiting[start : start + config.chains_per_step]
            chains = []
            for row in step:
                try:
                    chains.append((row, _chain(row, images)))
                except UnreadableImage as error:
                    skipped.append({"image_index": row.image_index, "reason": str(error)})
            for scores in score_chains(chains, detector, vlm, consistency, quality, config):
                done[scores.image_index] = scores
                if path:
                    with path.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(asdict(scores)) + "\n")
            progress.advance(task, len(step))
    ordered = [done[index] for index in indices if index in done]
    name = name or (Path(output).resolve().name if output is not None else "chains")
    report = {"name": name, **summarize(ordered), "skipped": skipped, "settings": settings, **(extra or {})}
    if output is not None:
        from .report import write_report

        (Path(output) / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        write_report(output, images)
    return report


@torch.no_grad()
def score_chains(
    chains: Sequence[tuple[BenchmarkRow, Tensor]],
    detector: Detector,
    vlm: VLM,
    consistency: ContentConsistency | None = None,
    quality: Quality | None = None,
    config: EvaluationConfig | None = None,
) -> list[ChainScores]:
    """Scores of chains [K + 1, 3, H, W], all in one round of detector calls, one `ask`, and a few ViT batches."""
    config = config or EvaluationConfig()
    images = [image for _, chain in chains for image in chain]
    first = [sum(len(chain) for _, chain in chains[:i]) for i in range(len(chains))]
    floor = min(config.checks.lowest_threshold, config.object_threshold)
    finder = Finder(detector, images, floor=floor, batch_size=config.detector_batch)
    turns = [
        Turn(at + t, at + t + 1, instruction)
        for at, (row, _) in zip(first, chains, strict=True)
        for t, instruction in enumerate(row.instructions)
    ]
    verdicts = iter(check_turns(images, turns, finder, vlm, config.checks))
    parts = _consistency(chains, first, finder, consistency, config)
    scored = []
    for (row, chain), part in zip(chains, parts, strict=True):
        k = len(row.instructions)
        own = [next(verdicts) for _ in range(k)]
        vq = _nothing(row) if quality is None else _listed(quality.score(chain[1 : k + 1], row.raw_instructions))
        scored.append(
            ChainScores(
                image_index=row.image_index,
                types=[instruction.type for instruction in row.instructions],
                instructions=list(row.raw_instructions),
                verdicts=[verdict.value for verdict in own],
                reasons=[verdict.reason for verdict in own],
                consistency=part[0],
                object=part[1],
                background=part[2],
                quality=vq,
            )
        )
    return scored


Parts = tuple[list[float | None], list[float | None], list[float | None]]


def _consistency(
    chains: Sequence[tuple[BenchmarkRow, Tensor]],
    first: Sequence[int],
    finder: Finder,
    consistency: ContentConsistency | None,
    config: EvaluationConfig,
) -> list[Parts]:
    """Score, object and background part of every chain, turn by turn."""
    if consistency is None:
        return [(_nothing(row), _nothing(row), _nothing(row)) for row, _ in chains]
    boxes = find_chains(
        finder,
        [range(at, at + len(row.instructions) + 1) for at, (row, _) in zip(first, chains, strict=True)],
        [row.unchanged for row, _ in chains],
        [row.all_objects for row, _ in chains],
        threshold=config.object_threshold,
    )
    alike: dict[tuple[int, ...], list[int]] = {}
    for i, (row, chain) in enumerate(chains):
        alike.setdefault((len(row.instructions), *chain.shape[1:]), []).append(i)
    results: dict[int, Parts] = {}
    device = consistency.model.device
    for same in alike.values():
        turns = len(chains[same[0]][0].instructions)
        stacked = torch.stack([chains[i][1][: turns + 1] for i in same]).to(device)
        parts = consistency(
            stacked[:, 0],
            stacked[:, 1:],
            [boxes.unchanged[i] for i in same],
            # what is cut out of the background differs from turn to turn in the first image, too
            [torch.zeros(0, 4)] * len(same),
            [boxes.covered[i] for i in same],
            background_changed=~torch.tensor([chains[i][0].background_consistent for i in same]),
        )
        for i, score, of_objects, of_background in zip(same, *parts, strict=True):
            results[i] = _listed(score), _listed(of_objects), _listed(of_background)
    return [results[i] for i in range(len(chains))]


def _chain(row: BenchmarkRow, images: Mapping[str, Tensor]) -> Tensor:
    if row.image_index not in images:
        raise UnreadableImage("no images of this image_index")
    chain, turns = images[row.image_index], len(row.instructions)
    if len(chain) < turns + 1:
        raise UnreadableImage(f"turn {len(chain)} of {turns} has no image")
    return chain[: turns + 1]


def _nothing(row: BenchmarkRow) -> list[float | None]:
    return [None] * len(row.instructions)


def _listed(values: Tensor) -> list[float | None]:
    return [value if value == value else None for value in values.float().tolist()]


def _name(model: Any) -> str:
    """What a report calls a model: its name, its checkpoint's, or its class."""
    inner = getattr(model, "model", model)  # a wrapper's model, or the name of a server's
    if isinstance(inner, str):
        return inner
    path = getattr(getattr(inner, "config", None), "_name_or_path", None)
    return str(getattr(model, "name", None) or path or type(model).__name__)


def _digest(rows: Sequence[BenchmarkRow]) -> str:
    return hashlib.sha256(json.dumps([asdict(row) for row in rows]).encode()).hexdigest()[:16]


def _resume(path: Path, head: dict[str, Any]) -> dict[str, ChainScores]:
    """Chains scored already; the file is begun, or cut after its last whole line."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    if not lines:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(head) + "\n"]
    elif (before := json.loads(lines[0])) != json.loads(json.dumps(head)):
        changed = [key for key in head if before.get(key) != json.loads(json.dumps(head[key]))]
        raise ValueError(
            f"{path} was made with other {' and '.join(changed)}; give another output folder, or remove that file"
        )
    path.write_text("".join(lines), encoding="utf-8")
    scores = [ChainScores(**json.loads(line)) for line in lines[1:]]
    return {one.image_index: one for one in scores}
