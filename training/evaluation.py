"""Held-out chains edited with the deterministic sampler: what training is judged by.

The noise depends on (evaluation seed, chain, turn) alone, so runs before and after training are paired.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mtedit_fast.editors import Editor
from mtedit_fast.rollout import RolloutConfig, rollout, sample_seeds
from mtedit_fast.training import distributed
from mtedit_fast.training.config import EvaluationConfig, RewardConfig
from mtedit_fast.training.data import EditChains
from mtedit_fast.training.rewards import RewardBatch, score


@dataclass(frozen=True)
class Evaluation:
    """N held-out chains of K turns.

    Attributes:
        references: uint8 [N, 3, H, W].  images: uint8 [N, K, 3, H, W]. Of several processes the first has them, the
            others none.
        success: bool [N, K], did turn k do what it was asked; None without a success function.
        rewards: {name: fp32 [N, K]}, NaN where undefined.
        edit_types: [N][K] from the data's `types` key, or None.
    """

    references: Tensor
    images: Tensor
    instructions: list[list[str]]
    success: Tensor | None
    rewards: dict[str, Tensor]
    edit_types: list[list[str]] | None

    def metrics(self) -> dict[str, float]:
        """`eval/…` figures for the log: image success per turn and mean rewards."""
        values = {f"eval/{name}": value.nanmean().item() for name, value in self.rewards.items()}
        if self.success is not None:
            image = self.success.cumprod(1).float().mean(0)
            values |= {f"eval/image_success_t{turn + 1}": rate.item() for turn, rate in enumerate(image)}
        return values


def evaluate(
    editor: Editor,
    chains: EditChains,
    sampler: RolloutConfig,
    config: EvaluationConfig,
    rewards: list[RewardConfig],
    *,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Edit the first `config.chains` chains with the ODE and score them.

    Args:
        sampler: the rollout's settings; variant, window, group size and what is kept for an update are replaced.
        progress: called with the number of edits made, N·K in all.

    Raises:
        ValueError: the success function returns something other than [N, K].
    """
    count = min(config.chains, len(chains))
    # Each process edits its share; all have equally long ones, so that none waits for another's forwards.
    rank, world = distributed.process()
    mine = distributed.share(-(-count // world) * world, rank, world)
    records = [chains[min(index, count - 1)] for index in mine]
    settings = replace(
        sampler,
        variant="ode",
        window=None,
        group_size=1,
        num_steps=config.num_steps or sampler.num_steps,
        keep_means=False,  # what an update needs
        keep_estimates=False,
    )
    seeds = sample_seeds(config.seed, 0, mine.stop)[mine.start :]
    parts: list[dict[str, Tensor]] = []
    pictures: list[dict[str, Tensor]] = []
    size = 8 * settings.micro_batch  # bounds the trajectories held at once
    for start in range(0, len(records), size):
        part = records[start : start + size]
        references = torch.stack([record.image for record in part])
        instructions = [record.instructions for record in part]
        edits = rollout(
            editor,
            references.to(editor.device),
            instructions,
            settings,
            seeds[start : start + size],
            progress=progress,
        )
        edits.raise_if_not_finite()
        batch = RewardBatch(
            references=references.to(editor.device),
            edits=edits.images,
            instructions=instructions,
            records=[record.fields() for record in part],
        )
        values = {f"rewards/{name}": value.cpu() for name, value in score(rewards, batch).items()}
        if config.success:
            judge = [RewardConfig(name="evaluation.success", path=config.success)]
            values["success"] = score(judge, batch)["evaluation.success"].cpu() > 0.5
        parts.append(values)
        pixels = {"references": (references * 255).round().byte(), "images": (edits.images * 255).round().byte().cpu()}
        pictures.append(pixels)
    whole = distributed.gather_rows(_joined(parts)) | distributed.gather_rows(_joined(pictures), everywhere=False)
    whole = {name: value[:count] for name, value in whole.items()}
    texts = distributed.gather_objects([(record.instructions, record.extra.get("types")) for record in records])
    everything = [pair for part in texts for pair in part][:count]
    types = [kinds for _, kinds in everything]
    return Evaluation(
        references=whole.get("references", pictures[0]["references"][:0]),
        images=whole.get("images", pictures[0]["images"][:0]),
        instructions=[instructions for instructions, _ in everything],
        success=whole.get("success"),
        rewards={name.partition("/")[2]: value for name, value in whole.items() if name.startswith("rewards/")},
        edit_types=[list(kinds) for kinds in types if kinds] if all(types) else None,
    )


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
