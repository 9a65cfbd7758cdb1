"""One iteration's policy update, forwards to optimizer step, against the loops that trainers run today.

mtedit-fast bench update                    the playground's Kontext; appends to benchmarks/results/update.csv
mtedit-fast bench update --full             FLUX.1-Kontext-dev at full size with random weights, for a GPU
mtedit-fast bench update --full --compile   and with compiled blocks; --fp8: and fp8 where there is no gradient
pytest benchmarks/bench_update.py --benchmark-only   the same calls under pytest-benchmark (make bench)

nft         ours where the old policy's and the reference's forwards are needed ("both"), the old one's ("old"), none
            ("neither"), against the published loop ("serial"): peft, three forwards of a batch one after the other with
            the adapter switched in between, the loss in x̂₀ form with its fp64 promotions
compaction  part of the trajectories filtered out, against a loop that multiplies their losses by zero ("masked")
grpo        batched replay of stored steps, against their exact replay step by step ("exact")
compile     nft, blocks compiled, ours and peft's, against the eager published loop
fp8         the same, and float8 rowwise products (torchao) for the frozen linear layers in rows without gradient

A row per implementation; its baseline was timed in turns with it. No row is written before an implementation's gradient
has been compared with its baseline's.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import command
import harness
import record
import torch
from peers.update_loop import Masked, Serial
from torch import Tensor
from update_setup import DTYPES, Case, LowPrecision, Setup, full, tiny

from mtedit_fast.training.config import ObjectiveConfig, OptimizerConfig
from mtedit_fast.training.grpo import GRPO
from mtedit_fast.training.memory import graph_bytes
from mtedit_fast.training.nft import NFT
from mtedit_fast.training.update import PolicyUpdate, UpdateBatch, UpdateStats

EAGER, COMPILED = ("nft", "compaction", "grpo"), ("compile", "fp8")
KL_WEIGHT = 1e-4
FILTERED = (0, 25, 50, 75)  # percent of the trajectories


@dataclass(frozen=True)
class Row(record.Line):
    """One line of a results file. Times are microseconds of a whole update."""

    forward_rows: int
    """Samples per forward with gradient, at most."""
    grad_rows: int
    """Through the transformer with gradient, in the whole update; and without."""
    no_grad_rows: int
    median_us: float
    p20_us: float
    p80_us: float
    peak_bytes: int
    """GPU: the most that was allocated, weights included. CPU: what the largest forward's graph keeps."""
    baseline: str
    baseline_us: float
    speedup: float
    baseline_peak_bytes: int
    error: float
    """Distance of the gradient from the baseline's, as a fraction of what roundings may change."""
    log_prob_drift: float | None
    """Largest |Δ log-prob| between rollout and replay."""


class Update:
    """One implementation: called, it runs a whole update.

    Args:
        baseline: the name of the one it is measured against; its own for a baseline.
        current: the old policy equals θ.
        eager: without compiled code, where the blocks are compiled.
        eps: instead of the dtype's machine epsilon, whose root the gradient's relative error may reach.
    """

    def __init__(
        self,
        setup: Setup,
        objective: Any,
        baseline: str,
        *,
        batch: UpdateBatch | None = None,
        current: bool = False,
        eager: bool = False,
        eps: float | None = None,
    ):
        self.setup, self.objective, self.baseline, self.current = setup, objective, baseline, current
        self.batch = batch or setup.batch
        self.eps = torch.finfo(setup.case.dtype).eps if eps is None else eps
        self.stance = partial(torch.compiler.set_stance, "force_eager") if eager else nullcontext
        self.optimizer = setup.optimizers["peft" if isinstance(objective, Serial) else "own"]
        parameters = self.optimizer.param_groups[0]["params"]
        self.update = PolicyUpdate(parameters, self.optimizer, objective, OptimizerConfig(max_grad_norm=1e9))

    def __call__(self) -> UpdateStats:
        self.setup.own.old_is_current = self.current
        with self.stance():
            stats = self.update(self.batch)
        if self.setup.case.device.type == "cuda":
            torch.cuda.synchronize()
        return stats

    def checked(self) -> "Checked":
        """One update with what is to know about it."""
        gradient: list[Tensor] = []
        parameters, editor = self.update.parameters, self.setup.editor
        hook = self.optimizer.register_step_pre_hook(
            lambda *_: gradient.extend(g.cpu() for p in parameters if (g := p.grad) is not None)
        )
        self.setup.set_old(current=self.current)
        editor.rows.clear()
        if cuda := self.setup.case.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        stats = self()
        peak = torch.cuda.max_memory_allocated() if cuda else None
        hook.remove()
        rows = editor.rows[True], editor.rows[False]
        return Checked(
            gradient, *rows, peak or self.graph_bytes(), stats.metrics().get("log_prob/max_drift_first_update")
        )

    def graph_bytes(self) -> int:
        """Of the largest forward."""
        (chunks,) = self.objective.shares(self.batch, 1)
        self.objective.prepare(self.batch, [chunks])
        largest = max(chunks, key=lambda chunk: len(chunk.rows))
        with self.stance():
            return graph_bytes(lambda: self.objective.loss(self.batch, largest, UpdateStats()))


class Checked(NamedTuple):
    gradient: list[Tensor]
    grad_rows: int
    no_grad_rows: int
    peak_bytes: int
    drift: float | None


def nft_updates(setup: Setup, *, compiled: bool = False) -> Iterator[tuple[str, Update]]:
    case, peft = setup.case, setup.models.peft
    for name, kl_weight, current in (("both", KL_WEIGHT, False), ("old", 0.0, False), ("neither", 0.0, True)):
        common = ObjectiveConfig(name="nft", kl_weight=kl_weight, draws=case.draws), case.forward_rows
        serial, baseline = Serial(setup.editor.of(peft), peft, *common), f"serial {name}"
        yield baseline, Update(setup, serial, baseline, current=current, eager=compiled)
        if compiled:
            yield f"compiled {baseline}", Update(setup, serial, baseline, current=current)
        own = NFT(setup.editor, setup.own, *common)
        yield f"{'compiled ' * compiled}{name}", Update(setup, own, baseline, current=current)


def fp8_updates(setup: Setup) -> Iterator[tuple[str, Update]]:
    case, peft = setup.case, setup.models.peft
    config = ObjectiveConfig(name="nft", kl_weight=KL_WEIGHT, draws=case.draws)
    common = config, case.forward_rows
    yield "serial both", Update(setup, Serial(setup.editor.of(peft), peft, *common), "serial both", eager=True)
    yield "compiled both", Update(setup, NFT(setup.editor, setup.own, *common), "serial both")
    coarse = LowPrecision(setup.editor, setup.own, *common, transformer=setup.low_precision)
    yield "fp8 both", Update(setup, coarse, "serial both", eps=1.0)


def compaction_updates(setup: Setup) -> Iterator[tuple[str, Update]]:
    case, config = setup.case, ObjectiveConfig(name="nft", draws=setup.case.draws)
    for percent in FILTERED:
        keep = torch.arange(len(setup.trajectories), device=case.device) % 4 >= percent // 25
        batch, baseline = replace(setup.batch, keep=keep), f"masked {percent} %"
        for name, kind in ((baseline, Masked), (f"compact {percent} %", NFT)):
            objective = kind(setup.editor, setup.own, config, case.forward_rows)
            yield name, Update(setup, objective, baseline, batch=batch, current=True)


def grpo_updates(setup: Setup) -> Iterator[tuple[str, Update]]:
    config = ObjectiveConfig(name="grpo", clip_range=0.1)  # wide enough for the drift
    for rows in (None, *setup.case.replay_rows):
        name = "exact" if rows is None else f"batched {rows}"
        yield name, Update(setup, GRPO(setup.editor, setup.own, config, rows), "exact")


GROUPS: dict[str, Callable[[Setup], Iterator[tuple[str, Update]]]] = {
    "nft": nft_updates,
    "compaction": compaction_updates,
    "grpo": grpo_updates,
    "compile": partial(nft_updates, compiled=True),
    "fp8": fp8_updates,
}


def error(update: Update, found: list[Tensor], baseline: list[Tensor]) -> float:
    """Distance of the whole gradient from the baseline's, relative to its norm, as a fraction of √eps: 3e-4 for fp32,
    9e-2 for bf16. With fp8 rows it is the distance itself, which the float8 error of the old velocities makes large."""
    distance = torch.stack([(a - b).norm() for a, b in zip(found, baseline, strict=True)]).norm()
    ratio = (distance / torch.stack([b.norm() for b in baseline]).norm()).item() / math.sqrt(update.eps)
    return math.inf if math.isnan(ratio) else ratio


def bench(setup: Setup, group: str, *, min_seconds: float) -> list[Row]:
    """One row per implementation, all timed in turns on the same batch.

    Raises:
        RuntimeError: an implementation's gradient is not its baseline's, so that its time means nothing.
    """
    checkpointing = group == "grpo" and setup.case.model == "kontext"  # many rows to a forward would not fit without
    if checkpointing:
        setup.own.model.enable_gradient_checkpointing()
    updates, checked, errors = dict(GROUPS[group](setup)), {}, {}
    for name, update in updates.items():
        checked[name] = update.checked()
        errors[name] = error(update, checked[name].gradient, checked[update.baseline].gradient)
        if not errors[name] <= 1:
            raise RuntimeError(
                f"{group}, {name}: gradient {errors[name]:.3g} times as far from that of {update.baseline} as is "
                "allowed: no row"
            )
        if name != update.baseline:
            checked[name] = checked[name]._replace(gradient=[])
    for name in updates:
        checked[name].gradient.clear()
    calls = {name: [update] for name, update in updates.items()}
    # the calls synchronise by themselves
    times = harness.measure(calls, torch.device("cpu"), min_seconds=min_seconds, samples=setup.case.samples)
    if checkpointing:
        setup.own.model.disable_gradient_checkpointing()
    return [
        Row(
            **columns(setup.case, group),
            backend=name,
            timing="call",
            forward_rows=update.objective.forward_rows or setup.case.micro_batch,
            grad_rows=checked[name].grad_rows,
            no_grad_rows=checked[name].no_grad_rows,
            median_us=times[name].median,
            p20_us=times[name].p20,
            p80_us=times[name].p80,
            peak_bytes=checked[name].peak_bytes,
            baseline=update.baseline,
            baseline_us=times[update.baseline].median,
            speedup=round(times[update.baseline].median / times[name].median, 3),
            baseline_peak_bytes=checked[update.baseline].peak_bytes,
            error=round(errors[name], 4),
            log_prob_drift=checked[name].drift,
        )
        for name, update in updates.items()
    ]


def columns(case: Case, group: str) -> dict:
    names = {dtype: name for name, dtype in DTYPES.items()}
    return record.environment(case.device) | {
        "op": "update",
        "variant": f"{case.model} {group}",
        "shape": case.shape,
        "dtype": names[case.dtype],
    }


def options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(min_seconds=1.0)
    parser.add_argument("--full", action="store_true", help="FLUX.1-Kontext-dev at 512 pixels, bf16, random weights")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the playground's model")
    parser.add_argument("--forward-rows", type=int, help="samples per forward of NFT, peers' too (default: 32, full 2)")
    parser.add_argument(
        "--only", action="append", choices=GROUPS, help="may be repeated (default: nft, compaction, grpo)"
    )
    parser.add_argument("--compile", action="store_true", help="as --only compile, beside the others")
    parser.add_argument("--fp8", action="store_true", help="as --only fp8, beside the others; GPU, needs torchao")


def jobs(args: argparse.Namespace) -> Iterator[command.Job]:
    case = full(args.device) if args.full else tiny(args.device, DTYPES[args.dtype])
    case = replace(case, forward_rows=args.forward_rows or case.forward_rows)
    groups = dict.fromkeys([*(args.only or EAGER), *["compile"] * args.compile, *["fp8"] * args.fp8])
    if "fp8" in groups and args.device.type != "cuda":
        raise ValueError(f"--fp8: expected a GPU, got --device {args.device}: float8 products are timed there alone")
    setup = lru_cache(maxsize=1)(lambda compiled: Setup(case, compiled=compiled))
    for group in sorted(groups, key=COMPILED.__contains__):  # two setups would not fit

        def measure(group: str = group) -> list[Row]:
            return bench(setup(group in COMPILED), group, min_seconds=args.min_seconds)

        yield command.Job(columns(case, group), measure)


def describe(row: Row) -> str:
    drift = "" if row.log_prob_drift is None else f"; |Δ log-prob| {row.log_prob_drift:.2g}"
    return (
        f"{row.variant:18}{row.backend:24}{row.median_us / 1e3:10.1f} ms {row.peak_bytes / 2**20:10.1f} MiB; "
        f"{row.grad_rows} + {row.no_grad_rows} rows; {row.speedup:.2f}x of {row.baseline} "
        f"({row.baseline_peak_bytes / 2**20:.1f} MiB){drift}"
    )


@lru_cache(maxsize=1)
def small_setup() -> Setup:
    return Setup(tiny(command.default_device()))


def prepare(group: str, name: str) -> tuple[str, harness.Call]:
    update = dict(GROUPS[group](small_setup()))[name]
    update.setup.set_old(current=update.current)
    return f"update {group}", update


main = partial(command.run, __doc__, "update", options, jobs, describe)
test_update = command.speed_test(
    prepare,
    [
        *(("nft", name) for name in ("both", "old", "neither", "serial both")),
        *(("compaction", name) for name in ("compact 50 %", "masked 50 %")),
        *(("grpo", name) for name in ("exact", "batched 128")),
    ],
)

if __name__ == "__main__":
    main()
