"""A whole RL iteration, rollout to optimizer step, phase by phase against the loop that trainers run today.

mtedit-fast bench iteration                     the playground's models, on a CPU; DiffusionNFT
mtedit-fast bench iteration --objective grpo    exact replay against replay step by step
mtedit-fast bench iteration --full              FLUX.1-Kontext-dev, Qwen3-VL-8B, DINOv3, random weights, for a GPU
pytest benchmarks/bench_iteration.py --benchmark-only

Ours is Trainer.step: shared conditioning, on a GPU rewards while sampling goes on, filtered rows left out of the
update, old and reference rows left out of it or in one forward. The loop is peers/iteration_loop.py: sampling around
the stock pipeline, then a `generate` call for every score and EdiVal's loop over pairs of PIL images, then three
forwards for every row. Both take turns in one process, on the same frozen weights, adapters, records, and batch sizes.

No row is written where the loop samples other states from the same noise, gives other rewards to the same images, or
has another loss or gradient for the same trajectories; nor where ours replays to a ratio other than 1.
"""

import argparse
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import command
import harness
import record
import torch
from iteration_checks import STATES, checked
from iteration_setup import NEEDED, Case, Setup

from mtedit_fast.training.filters import FILTERS

PHASES = ("rollout", "reward", "update", "rest")


@dataclass(frozen=True)
class Row(record.Line):
    """One line of a results file. Times are seconds of a whole iteration, medians over its repetitions."""

    trajectories: int
    images: int
    kept_rows: float
    """Trajectories that an update of ours learns from, the mean."""
    draws: int
    repetitions: int
    median_s: float
    p20_s: float
    p80_s: float
    rollout_s: float
    """On a GPU rewards are computed meanwhile."""
    reward_s: float
    """What is waited for: on a CPU all of them."""
    update_s: float
    rest_s: float
    images_per_s: float
    loop_s: float
    loop_rollout_s: float
    loop_reward_s: float
    loop_update_s: float
    loop_rest_s: float
    loop_images_per_s: float
    speedup: float
    speedup_rollout: float
    speedup_reward: float
    speedup_sampling: float
    """Of rollout and rewards together."""
    speedup_update: float
    peak_bytes: int | None
    """GPU: the most that was allocated, weights of both sides and of the reward models included."""
    loop_peak_bytes: int | None
    log_prob_drift: float | None
    """grpo: largest |Δ log-prob| between ours in the rollout and in the update."""
    loop_drift: float | None
    """The same of the loop's own samples, of its first batch."""
    state_error: float
    """Each as a fraction of what is allowed."""
    reward_error: float
    loss_error: float
    gradient_error: float


class Side:
    """Called, it runs an iteration of ours or of the loop from the weights of the setup.

    Args:
        iteration: returns the seconds of its phases, and how many rows it has kept.

    Attributes:
        calls: what each returned, with the "total" and the "rest".
        peak: bytes, on a GPU.
    """

    def __init__(self, setup: Setup, iteration: Callable[[], dict[str, float]]):
        self.setup, self.iteration, self.calls = setup, iteration, list[dict[str, float]]()
        self.peak: int | None = None

    def __call__(self) -> None:
        cuda = self.setup.case.device.type == "cuda"
        self.setup.reset()
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        found = self.iteration()
        if cuda:
            torch.cuda.synchronize()
            self.peak = max(self.peak or 0, torch.cuda.max_memory_allocated())
        total = time.perf_counter() - start
        rest = total - sum(found[name] for name in PHASES if name != "rest")
        self.calls.append(found | {"total": total, "rest": rest})

    def medians(self) -> dict[str, float]:
        """Without the first call, which warms up."""
        return {name: median(each[name] for each in self.calls[1:]) for name in (*PHASES, "total")}

    def spread(self) -> dict[str, float]:
        """p20 and p80 of the whole."""
        total = harness.summary([each["total"] for each in self.calls[1:]])
        return {"p20_s": round(total.p20, 4), "p80_s": round(total.p80, 4)}


def sides(setup: Setup) -> tuple[Side, Side]:
    def ours() -> dict[str, float]:
        metrics = setup.trainer.step()
        phases = {name: metrics[f"seconds/{name}"] for name in ("rollout", "reward", "update")}
        return phases | {"kept": metrics["advantage/kept"] * setup.case.groups * setup.case.group}

    def loop() -> dict[str, float]:
        with torch.compiler.set_stance("force_eager"):
            setup.loop(setup.records)
        return setup.timer.seconds() | {"kept": float(setup.loop.kept)}

    return Side(setup, ours), Side(setup, loop)


def bench(case: Case, *, repetitions: int, folder: Path) -> Row:
    """Both sides in turns, after the checks and a round to warm up; RuntimeError as `checked`."""
    setup = Setup(case, folder)
    checks = checked(setup)
    ours, loop = sides(setup)
    for iteration in range(repetitions + 1):  # each with its own chains and noise, the same chains for both
        setup.trainer.iteration = iteration
        ours()
        loop()
    own, peer = ours.medians(), loop.medians()
    images = case.groups * case.group * case.turns

    def speedup(*phases: str) -> float:
        return round(sum(peer[name] for name in phases) / max(sum(own[name] for name in phases), 1e-6), 3)

    times: dict[str, Any] = {f"{name}_s": round(own[name], 4) for name in PHASES}
    times |= {f"loop_{name}_s": round(peer[name], 4) for name in PHASES}
    return Row(
        **case.columns,
        trajectories=case.groups * case.group,
        images=images,
        kept_rows=round(fmean(each["kept"] for each in ours.calls[1:]), 2),
        draws=case.draws,
        repetitions=repetitions,
        median_s=round(own["total"], 4),
        **ours.spread(),
        loop_s=round(peer["total"], 4),
        **times,
        images_per_s=round(images / own["total"], 3),
        loop_images_per_s=round(images / peer["total"], 3),
        speedup=speedup("total"),
        speedup_rollout=speedup("rollout"),
        speedup_reward=speedup("reward"),
        speedup_sampling=speedup("rollout", "reward"),
        speedup_update=speedup("update"),
        peak_bytes=ours.peak,
        loop_peak_bytes=loop.peak,
        log_prob_drift=checks.drift,
        loop_drift=checks.loop_drift,
        state_error=round(checks.states, 4),
        reward_error=round(checks.rewards, 4),
        loss_error=round(checks.loss, 4),
        gradient_error=round(checks.gradient, 4),
    )


def describe(row: Row) -> str:
    lines = [
        f"{row.variant}; {row.shape}; {row.dtype}; {row.backend}: {row.speedup}x, {row.median_s:.2f} s against "
        f"{row.loop_s:.2f} s; {row.images_per_s} images/s against {row.loop_images_per_s}"
    ]
    for name in PHASES:
        own, peer = getattr(row, f"{name}_s"), getattr(row, f"loop_{name}_s")
        lines.append(f"  {name:8}{own:9.3f} s ({own / row.median_s:4.0%}){peer:9.3f} s ({peer / row.loop_s:4.0%})")
    if row.peak_bytes is not None and row.loop_peak_bytes is not None:
        lines.append(f"  peak memory {row.peak_bytes / 2**30:.1f} GiB against {row.loop_peak_bytes / 2**30:.1f} GiB")
    if row.log_prob_drift is not None:
        lines.append(f"  |Δ log-prob| of the replay {row.log_prob_drift:.2g}; the loop's {row.loop_drift:.2g}")
    lines.append(
        f"  {row.kept_rows} trajectories kept of {row.trajectories}; errors, of what is allowed: states "
        f"{row.state_error}, rewards {row.reward_error}, loss {row.loss_error}, gradient {row.gradient_error}"
    )
    return "\n".join(lines)


def cases(args: argparse.Namespace) -> list[Case]:
    """One per kind of update; defaults for a CPU, or for a GPU at full size."""
    full, nft_run = args.full, args.objective == "nft"
    group, steps = args.group, args.steps or (6 if full else 3)
    micro_batch = args.micro_batch or (4 if full else group)
    rows = args.forward_rows or ((2 if full else micro_batch) if nft_run else None)
    return [
        Case(
            full=full,
            device=args.device,
            dtype=args.dtype or ("bf16" if full else "fp32"),
            objective=args.objective,
            needed=needed,
            groups=args.groups or (2 if full else 4),
            group=group,
            turns=args.turns or (2 if full else 3),
            size=args.size if full else 64,
            steps=steps,
            draws=min(args.draws, steps),
            micro_batch=micro_batch,
            loop_batch=args.loop_batch or min(micro_batch, group),
            forward_rows=rows,
            filter=args.filter,
            compile=args.compile,
            cuda_graphs=args.cuda_graphs,
            attention=args.attention,
        )
        for needed in (dict.fromkeys(args.needed or ("both", "neither")) if nft_run else ("both",))
    ]


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--full", action="store_true", help="public sizes, bf16, random weights")
    parser.add_argument("--objective", choices=["nft", "grpo"], default="nft")
    parser.add_argument(
        "--needed",
        action="append",
        choices=NEEDED,
        help="what an NFT update has to compute: the old policy's and the reference's velocities, the old one's, or "
        "the policy's alone; may be repeated (default: both, neither)",
    )
    parser.add_argument("--groups", type=int, help="prompts (default: 4, full 2)")
    parser.add_argument("--group", type=int, default=8, help="trajectories of each")
    parser.add_argument("--turns", type=int, help="edits of each (default: 3, full 2)")
    parser.add_argument("--size", type=int, default=512, help="pixels a side at full size; the playground has 64")
    parser.add_argument("--steps", type=int, help="of sampling (default: 3, full 6)")
    parser.add_argument("--draws", type=int, default=2, help="noise levels per trajectory and turn, nft")
    parser.add_argument("--micro-batch", type=int, help="samples per forward of our rollout (default: a group, full 4)")
    parser.add_argument("--loop-batch", type=int, help="repeats to a pipeline call of the loop (default: as many)")
    parser.add_argument(
        "--forward-rows", type=int, help="samples per forward of both updates (default: the micro-batch, full 2)"
    )
    parser.add_argument("--filter", choices=FILTERS, default="zero_std", help="of trajectories to learn from")
    parser.add_argument("--dtype", choices=STATES, help="default: fp32, full bf16")
    parser.add_argument("--compile", choices=["none", "blocks", "whole"], default="none", help="ours")
    parser.add_argument("--cuda-graphs", action=argparse.BooleanOptionalAction, default=True, help="ours, on a GPU")
    parser.add_argument("--attention", default="native", help="ours (mtedit_fast.editors.speed)")
    parser.add_argument("--repetitions", type=int, default=5, help="iterations of each side, after one to warm up")


def jobs(args: argparse.Namespace) -> Iterator[command.Job]:
    if args.repetitions < 1:
        raise ValueError(f"--repetitions: expected at least 1, got {args.repetitions}")
    if args.device.type != "cuda" and torch.cuda.is_available():
        raise ValueError(f"--device: expected cuda, where the trainer goes if there is a GPU, got {args.device}")
    for case in cases(args):
        yield command.Job(case.columns, partial(_in_folder, case, args.repetitions))


def _in_folder(case: Case, repetitions: int) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        return bench(case, repetitions=repetitions, folder=Path(folder))


def prepare(implementation: str) -> tuple[str, harness.Call]:
    folder = tempfile.TemporaryDirectory()
    small = "--needed both --groups 1 --group 4 --turns 2"
    args = command.parser(__doc__, "iteration", options).parse_args(small.split())
    setup = Setup(cases(args)[0], Path(folder.name))
    checked(setup)
    weakref.finalize(setup, folder.cleanup)
    return "iteration, 4 x 2 turns", sides(setup)[implementation == "loop"]


main = partial(command.run, __doc__, "iteration", options, jobs, describe)
test_iteration = command.speed_test(prepare, [("ours",), ("loop",)])

if __name__ == "__main__":
    main()
