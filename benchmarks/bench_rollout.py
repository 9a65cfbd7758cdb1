"""A group's rollout end to end, references and instructions to images, against the loops that trainers run today.

mtedit-fast bench rollout --editor kontext                        tiny on a CPU; FLUX.1-Kontext-dev at 512 on a GPU
mtedit-fast bench rollout --editor klein-kv --size 1024 --group 8
mtedit-fast bench rollout --editor qwen --dtype fp8 --compile blocks
pytest benchmarks/bench_rollout.py --benchmark-only               the tiny ones under pytest-benchmark (make bench)

Editors have random weights (random_editors.py), and both sides run on the same ones, in turns. Text encoders are not
run: conditioning is random, and the calls that would have run one are counted. Peers are in peers/rollout_loop.py; they
run eagerly and in the model's own dtype whatever ours does, with the attention of ours. For Klein-KV there are two: its
stock pipeline, and references in the sequence of every step.

No row is written where a replay of the stored steps does not give the rollout's log-probs bit for bit, or where the
peer's images come from other velocities than ours.
"""

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import command
import flops
import harness
import record
import torch
from peers.rollout_loop import full_attention
from random_editors import ALIASES, RECIPES
from rollout_setup import DTYPES, Case, Setup, predicted_bytes

from mtedit_fast.rollout import Trajectories
from mtedit_fast.timing import PhaseTimer

ALLOWED = {"fp32": 1e-3, "bf16": 0.1, "fp8": 0.5}
"""Distance of the peer's final states from ours, relative to what the velocities have added to the noise."""


@dataclass(frozen=True)
class Row(record.Line):
    """One line of a results file. Times are microseconds of a whole rollout."""

    reference_side: int
    micro_batch: int
    images: int
    median_us: float
    p20_us: float
    p80_us: float
    images_per_s: float
    encode_us: float
    denoise_us: float
    """The steps, and what they share."""
    decode_us: float
    flops: int
    """Of the transformer."""
    tflop_per_s: float
    """Over the whole rollout."""
    matmul_tflop_per_s: float
    percent_of_matmul: float
    """Model FLOP utilisation: of what a large matrix product in this dtype reached in the same run."""
    percent_of_matmul_denoise: float
    """The same within the denoising phase."""
    peak_bytes: int | None
    """GPU: the most that was allocated, weights included."""
    predicted_bytes: int
    """The same from shapes alone, for eager code."""
    text_calls: int
    log_prob_drift: float
    """Largest |Δ log-prob| between rollout and replay."""
    loop_batch: int
    """Repeats to one call of the peer."""
    loop_us: float
    speedup_loop: float
    loop_text_calls: int
    loop_drift: float
    full_us: float | None
    """Klein-KV: full attention over [state, reference] at every step."""
    speedup_full: float | None
    error: float
    """Distance of the peer's states from ours, as a fraction of what the dtype allows."""


class Ours:
    """Called, it rolls out; `phases` has the seconds of every call by phase."""

    def __init__(self, setup: Setup):
        self.setup, self.phases = setup, list[dict[str, float]]()

    def __call__(self) -> Trajectories:
        timer = PhaseTimer(self.setup.case.device)
        out = self.setup.rollout(timer)
        self.phases.append(timer.seconds())
        return out


def bench(case: Case, *, min_seconds: float, samples: int) -> Row:
    """Ours and its peers, in turns.

    Raises:
        RuntimeError: a replay differs from its rollout, or the peer's velocities from ours, so that times mean nothing.
    """
    setup = Setup(case)
    cuda = case.device.type == "cuda"
    setup.rollout()  # compiles and captures
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    calls = setup.stock.text_calls
    trajectories = setup.rollout()
    calls = setup.stock.text_calls - calls
    peak = torch.cuda.max_memory_allocated() if cuda else None
    drift = setup.drift(trajectories)
    if drift != 0:
        raise RuntimeError(f"{describe_case(case)}: |Δ log-prob| of the replay is {drift:.3g}, expected 0: no row")
    distance, loop_drift = setup.compared(trajectories)
    error = distance / ALLOWED[case.dtype]
    if not error <= 1:
        raise RuntimeError(
            f"{describe_case(case)}: the peer's velocities are {distance:.3g} from ours, {ALLOWED[case.dtype]} is "
            "allowed: no row"
        )
    with torch.no_grad():
        work = flops.rollout_flops(setup.stock, trajectories)
    predicted = predicted_bytes(setup, trajectories)
    del trajectories
    ours, loop = Ours(setup), setup.loop()
    peers: dict[str, Sequence[harness.Call]] = {"ours": [ours], "loop": [partial(setup.run_loop, loop)]}
    if case.editor.startswith("klein-kv"):
        peers["full"] = [partial(setup.run_loop, setup.loop(call=full_attention))]
    # each call ends on the host, so that a GPU is timed like a CPU
    times = harness.measure(peers, torch.device("cpu"), min_seconds=min_seconds, samples=samples)
    phases = {
        name: round(1e6 * median(each.get(name, 0.0) for each in ours.phases[1:]), 3)
        for name in ("encode", "denoise", "decode")
    }
    ceiling = flops.matmul_flop_per_s(case.device, torch.float8_e4m3fn if case.dtype == "fp8" else DTYPES[case.dtype])
    own, images = times["ours"], case.group * case.turns
    rate = work / own.median * 1e6
    full = times.get("full")
    return Row(
        **case.columns,
        reference_side=case.reference_size,
        micro_batch=case.micro_batch,
        images=images,
        median_us=own.median,
        p20_us=own.p20,
        p80_us=own.p80,
        images_per_s=round(1e6 * images / own.median, 3),
        encode_us=phases["encode"],
        denoise_us=phases["denoise"],
        decode_us=phases["decode"],
        flops=work,
        tflop_per_s=round(rate / 1e12, 4),
        matmul_tflop_per_s=round(ceiling / 1e12, 4),
        percent_of_matmul=round(100 * rate / ceiling, 2),
        percent_of_matmul_denoise=round(100 * work / phases["denoise"] * 1e6 / ceiling, 2),
        peak_bytes=peak,
        predicted_bytes=predicted,
        text_calls=calls,
        log_prob_drift=drift,
        loop_batch=case.loop_batch,
        loop_us=times["loop"].median,
        speedup_loop=round(times["loop"].median / own.median, 3),
        loop_text_calls=case.turns * -(-case.group // case.loop_batch),
        loop_drift=loop_drift,
        full_us=full.median if full else None,
        speedup_full=round(full.median / own.median, 3) if full else None,
        error=round(error, 4),
    )


def describe_case(case: Case) -> str:
    columns = case.columns
    return ", ".join(columns[name] for name in ("variant", "shape", "dtype", "backend"))


def describe(row: Row) -> str:
    def share(time: float) -> str:
        return f"{time / 1e3:.1f} ms ({100 * time / row.median_us:.0f} %)"

    peak = "not measured on a CPU" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.1f} MiB"
    lines = [
        f"{row.variant}, {row.shape} steps, {row.dtype}, {row.backend}: {row.images_per_s} images/s, "
        f"{row.median_us / 1e3:.1f} ms",
        f"  model FLOP utilisation {row.percent_of_matmul} % of {row.matmul_tflop_per_s} TFLOP/s that a matrix product "
        f"reached; {row.percent_of_matmul_denoise} % within the steps",
        f"  encode {share(row.encode_us)}, condition and denoise {share(row.denoise_us)}, decode "
        f"{share(row.decode_us)}",
        f"  peak memory {peak}; from shapes {row.predicted_bytes / 2**20:,.1f} MiB",
        f"  |Δ log-prob| between rollout and replay {row.log_prob_drift:.2g}; the peer's {row.loop_drift:.2g}",
        f"  peer {row.loop_us / 1e3:.1f} ms: {row.speedup_loop}x; error {row.error} of what is allowed",
    ]
    if row.full_us is not None:
        lines.append(f"  full attention {row.full_us / 1e3:.1f} ms: {row.speedup_full}x")
    lines.append(
        f"  random text, no encoder run: ours would have called one {row.text_calls} times, the peer "
        f"{row.loop_text_calls} times"
    )
    return "\n".join(lines)


def case_of(args: argparse.Namespace) -> Case:
    """Defaults by device: tiny models on a CPU, full ones at 512 pixels on a GPU."""
    name = ALIASES.get(args.editor, args.editor)
    recipe, cuda = RECIPES[name], args.device.type == "cuda"
    tiny = args.tiny if args.tiny is not None else not cuda
    size = args.size or (recipe.tiny_side if tiny else 512)
    group = args.group or (16 if cuda else 2)
    # Stock Qwen-Image-Edit takes one sample at a time: its batches are broken.
    loop_batch = args.loop_batch or (1 if name.startswith("qwen") else min(group, 4))
    return Case(
        editor=name,
        device=args.device,
        dtype=args.dtype or ("bf16" if cuda else "fp32"),
        tiny=tiny,
        size=size,
        reference_size=args.reference_size or size,
        group=group,
        turns=args.turns or 2,
        steps=args.steps or (recipe.steps if cuda else 2),
        micro_batch=args.micro_batch or group,
        loop_batch=loop_batch,
        compile=args.compile,
        cuda_graphs=args.cuda_graphs,
        attention=args.attention,
    )


def options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(min_seconds=1.0)
    parser.add_argument("--editor", choices=[*ALIASES, *RECIPES], default="kontext")
    parser.add_argument("--tiny", action=argparse.BooleanOptionalAction, help="tiny models (default: on a CPU)")
    parser.add_argument("--size", type=int, help="pixels a side (default: 512; tiny 32, qwen 64)")
    parser.add_argument("--reference-size", type=int, help="of the images that edits are conditioned on")
    parser.add_argument("--group", type=int, help="trajectories (default: 16; on a CPU 2)")
    parser.add_argument("--turns", type=int, help="edits per trajectory (default: 2)")
    parser.add_argument("--steps", type=int, help="default: as the family is trained; on a CPU 2")
    parser.add_argument("--micro-batch", type=int, help="samples per forward (default: the group)")
    parser.add_argument("--loop-batch", type=int, help="repeats to a call of the peer (default: 4; qwen 1)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16; on a CPU fp32")
    parser.add_argument("--compile", choices=["none", "blocks", "whole"], default="none")
    parser.add_argument("--cuda-graphs", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--attention", help="back end of attention, the peer's too (mtedit_fast.editors.speed)")
    parser.add_argument("--samples", type=int, help="timed rollouts per implementation, at least (default: 3; tiny 15)")


def jobs(args: argparse.Namespace) -> Iterator[command.Job]:
    case = case_of(args)
    samples = args.samples or (15 if case.tiny else 3)  # tiny ones are short, and a shared machine's speed wanders
    yield command.Job(case.columns, partial(bench, case, min_seconds=args.min_seconds, samples=samples))


def prepare(editor: str, implementation: str) -> tuple[str, harness.Call]:
    side = RECIPES[editor].tiny_side
    setup = Setup(Case(editor, command.default_device(), "fp32", True, side, side, 4, 2, 2, 4, 1))
    assert setup.compared(setup.rollout())[0] <= ALLOWED["fp32"]
    call = setup.rollout if implementation == "ours" else partial(setup.run_loop, setup.loop())
    return f"rollout of a tiny {editor}", call


main = partial(command.run, __doc__, "rollout", options, jobs, describe)
test_rollout = command.speed_test(prepare, itertools.product(["kontext", *ALIASES.values()], ["ours", "loop"]))

if __name__ == "__main__":
    main()
