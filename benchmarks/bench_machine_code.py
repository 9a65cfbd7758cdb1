"""What our kernels ask of a GPU, counted in their machine code; it takes no GPU, and is no measurement.

mtedit-fast bench machine_code                 sm_80 and sm_90: A100, and H100 or H200
mtedit-fast bench machine_code --arch 90

A program's instructions are counted per element of its tensors, or per logit, beside the bytes or products that nobody
can avoid. `issue_percent` is the time that a multiprocessor takes to issue them over the time of those bytes at copy
bandwidth, or of those products: beyond 100 the kernel is bound by its instructions, whatever the memory does. That is a
lower bound of what it takes: latencies, and instructions that take their unit longer, come on top.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import command
import record
import torch
from machine_code import SPECIAL, MachineCode

from mtedit_fast.kernels import (
    attention_columns,
    attention_columns_backward,
    crd_loss,
    linear_logsumexp,
    nft_loss,
    sde_step,
    seeded_noise,
    token_similarity,
)
from mtedit_fast.kernels.ahead_of_time import compile_for

WARP = 32


@dataclass(frozen=True)
class Machine:
    """flops: of halves on the tensor cores, per clock and multiprocessor. clock: at which they are the data sheet's.
    copy: bytes per second, read and written. shared: bytes per multiprocessor."""

    name: str
    multiprocessors: int
    clock: float
    flops: int
    copy: float
    shared: int


MACHINES = {
    80: Machine("A100", 108, 1.41e9, 2048, 2.04e12, 164 << 10),  # copy: the data sheet's bandwidth
    90: Machine("H200", 132, 1.83e9, 4096, 4.3e12, 228 << 10),  # copy: what one is known to reach
}


@dataclass(frozen=True)
class Case:
    """A kernel at its production size.

    units: elements or logits of what is counted, by all warps of a program. loop: count the inner loop, not what a
    program runs once. operands: tensors of the dtype, read and written per unit. flops: of products, per unit.
    """

    op: str
    variant: str
    kernel: Any
    signature: Mapping[str, Any]
    warps: int
    units: int
    operands: int = 0
    flops: int = 0
    loop: bool = False
    dtype: str = "bf16"
    stages: int = 3
    divisible: Sequence[str] = ("numel",)


@dataclass(frozen=True)
class Row(record.Line):
    """One line of a results file; all but the resources are per unit."""

    machine: str
    unit: str
    instructions: float
    special: float
    bytes: int
    flops: int
    issue_percent: float
    special_percent: float
    registers: int
    stack_bytes: int
    shared_bytes: int
    warps: int
    """That fit a multiprocessor."""


def rows_cases(dtype: str) -> Iterator[Case]:
    """The kernels that go over the elements of rows, a tile each."""
    size, tile = f"*{dtype}", seeded_noise.BLOCK
    common = dict.fromkeys(("host_step", "num_steps", "numel", "tiles"), "i32") | {"BLOCK": tile}
    sums = ("table", "log_prob", "partial", "grad_log_prob", "t", "r", "weight", "loss", "rows", "coefficients", "grad")
    common |= {f"{name}_ptr": "*fp32" for name in sums} | {"arrived_ptr": "*i32", "groups_ptr": "*i64"}
    common |= {"residual_ptr": "*fp32", "centre_ptr": "*fp32"}
    common |= dict.fromkeys(("beta", "scale", "kl_weight", "kl_floor"), "fp32") | {"ADAPTIVE": True, "out_ptr": size}
    step = common | {"sample_ptr": size, "velocity_ptr": size, "STEP": 0, "MODE": 2, "ROUND_BEFORE": True}
    step |= dict.fromkeys(("step_ptr", "noise_ptr", "seed_ptr", "replayed_ptr", "mean_ptr", "grad_prev_ptr"))
    step |= {"grad_mean_ptr": None, "grad_sample_ptr": None, "grad_velocity_ptr": size}
    step["ROUNDED"] = sde_step._TRITON_DTYPES[{"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]]
    replay = {"replayed_ptr": size, "out_ptr": None}
    case = partial(Case, units=tile, dtype=dtype, warps=seeded_noise.NUM_WARPS)
    forward, backward = sde_step._forward_kernel, sde_step._backward_kernel
    yield case("sde_step", "sample", forward, step | {"noise_ptr": size}, operands=4)
    drawing = seeded_noise.DRAWING_WARPS
    yield case("sde_step", "seed", forward, step | {"seed_ptr": "*i64"}, operands=3, warps=drawing)
    yield case("sde_step", "replay", forward, step | replay, operands=3)
    yield case("sde_step", "backward", backward, step | replay, operands=4)
    loss = common | {f"v_{name}_ptr": size for name in ("theta", "old", "target", "ref")}
    for variant, absent in (("nft_kl", ()), ("nft", ("v_ref_ptr",)), ("nft_on_policy", ("v_ref_ptr", "v_old_ptr"))):
        signature = loss | dict.fromkeys(absent)
        yield case("nft_loss", variant, nft_loss._forward_kernel, signature, operands=4 - len(absent))
        yield case("nft_loss", f"{variant} backward", nft_loss._backward_kernel, signature, operands=5 - len(absent))
    yield case("crd_loss", "crd", crd_loss._forward_kernel, loss | {"v_ref_ptr": None}, operands=3)


def attention_cases(width: int = 128) -> Iterator[Case]:
    """Per logit of the tiles over keys or queries; with a mask, as encoders have one."""
    ints = "heads groups queries keys count query_head_stride key_head_stride"
    strides = "query_batch_stride query_stride key_batch_stride key_stride"
    signature: dict[str, Any] = dict.fromkeys((*ints.split(), *strides.split()), "i32") | {"scale": "fp32"}
    signature |= {f"{name}_ptr": "*bf16" for name in ("query", "key", "out")}
    signature |= {f"{name}_ptr": "*fp32" for name in ("lse", "slopes", "delta")}
    signature |= {"mask_ptr": "*i32", "others_ptr": "*i32", "columns_ptr": "*i64"}
    divisible = (*strides.split(), "query_head_stride", "key_head_stride")
    for name, kernel, products in (
        ("lse", attention_columns._lse_kernel, 1),
        ("grad_query", attention_columns_backward._grad_query_kernel, 2),
        ("grad_key", attention_columns_backward._grad_key_kernel, 2),
    ):
        tile = attention_columns.blocks(name, torch.bfloat16, width)
        warps, units = tile.pop("num_warps"), tile["BLOCK_M"] * tile["BLOCK_N"]
        options = {"flops": 2 * width * products, "loop": True, "divisible": divisible}
        options["stages"] = attention_columns.STAGES
        yield Case("attention_columns", name, kernel, signature | tile, warps, units, **options)


def judge_cases(width: int = 768) -> Iterator[Case]:
    """The product with an lm_head, per logit and slice of the hidden width; pooled tokens, per element."""
    tile = linear_logsumexp.TILES["half"]
    signature = dict.fromkeys(("count", "vocab_size", "width", "weight_stride", "tiles"), "i32") | tile
    signature |= {"hidden_ptr": "*bf16", "weight_ptr": "*bf16", "partial_ptr": "*fp32", "scale": "fp32", "EVEN": True}
    signature |= dict.fromkeys(("bias_ptr", "target_ptr", "picked_ptr")) | {
        "ENTROPY": False,
        "GROUP": linear_logsumexp.GROUP,
    }
    units, kernel = tile["BLOCK_N"] * tile["BLOCK_V"], linear_logsumexp._partial_kernel
    options: dict[str, Any] = {"loop": True, "flops": 2 * tile["BLOCK_H"], "stages": linear_logsumexp.STAGES}
    options["divisible"] = ("width", "weight_stride")
    yield Case("digit_score", "vocab, 64 of the width", kernel, signature, linear_logsumexp.NUM_WARPS, units, **options)

    names = "rows tokens row_stride token_stride"
    sided = [f"{side}_{name}" for side in "ab" for name in (*names.split(), "tiles")]
    blocks = token_similarity.blocks("pool", width)
    signature = dict.fromkeys((*sided, "width", "tiles"), "i32") | blocks | {"NORMALIZE": True}
    signature |= {"a_ptr": "*bf16", "b_ptr": "*bf16", "partial_ptr": "*fp32"}
    signature |= {f"index_{s}_ptr": "*i64" for s in "ab"} | {f"weights_{s}_ptr": "*fp32" for s in "ab"}
    strides = [name for name in sided if name.endswith("stride")]
    options = {"loop": True, "operands": 1, "divisible": (*strides, "width")}
    pool, warps = token_similarity._pool_kernel, token_similarity.NUM_WARPS
    yield Case("token_similarity", "pool", pool, signature, warps, blocks["BLOCK_N"] * width, **options)


def cases() -> list[Case]:
    return [*rows_cases("bf16"), *rows_cases("fp32"), *attention_cases(), *judge_cases()]


def resident_warps(code: MachineCode, warps: int, machine: Machine) -> int:
    """By registers, 64 Ki of them given out by eights, and by shared memory, of which every block takes a KiB more."""
    registers = -(-code.registers // 8) * 8 * WARP * warps
    return min((64 << 10) // registers, machine.shared // (code.shared + 1024), 64 // warps) * warps


def row(case: Case, arch: int) -> Row:
    machine = MACHINES[arch]
    options: dict[str, Any] = {"num_warps": case.warps, "num_stages": case.stages, "divisible": case.divisible}
    code = MachineCode.of(compile_for(arch, case.kernel, dict(case.signature), **options))
    counted = code.loop() if case.loop else code.once()
    per_unit = case.warps * WARP / case.units
    instructions = len(counted) * per_unit
    special = sum(each.name in SPECIAL for each in counted) * per_unit
    moved = case.operands * {"bf16": 2, "fp32": 4}[case.dtype]
    # In clocks of a multiprocessor.
    least = max(moved * machine.multiprocessors * machine.clock / machine.copy, case.flops / machine.flops)
    return Row(
        **columns(case, arch),
        machine=machine.name,
        unit="logit" if case.flops else "element",
        instructions=round(instructions, 1),
        special=round(special, 2),
        bytes=moved,
        flops=case.flops,
        issue_percent=round(100 * instructions / (4 * WARP) / least, 1),
        special_percent=round(100 * special / 16 / least, 1),
        registers=code.registers,
        stack_bytes=code.stack,
        shared_bytes=code.shared,
        warps=resident_warps(code, case.warps, machine),
    )


def columns(case: Case, arch: int) -> dict[str, Any]:
    return record.environment(torch.device("cpu")) | {
        "device": f"sm_{arch}, not run",
        "threads": 1,
        "op": case.op,
        "variant": case.variant,
        "shape": f"{case.units} by {case.warps} warps",
        "dtype": case.dtype,
        "backend": "triton",
        "timing": "none",
    }


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", type=int, choices=MACHINES, nargs="+", default=[90, 80])


def jobs(args: argparse.Namespace) -> Iterator[command.Job]:
    if seeded_noise.INTERPRETED:
        raise ValueError("TRITON_INTERPRET: expected it unset, where kernels are compiled; unset it")
    for arch in args.arch:
        for case in cases():
            yield command.Job(columns(case, arch), partial(row, case, arch))


def describe(row: Row) -> str:
    return (
        f"{row.device} {row.op} {row.variant} {row.dtype}: {row.instructions} instructions per {row.unit}, "
        f"{row.issue_percent:.0f} % of an {row.machine}'s least time; {row.registers} registers, {row.warps} warps"
    )


main: Callable[..., None] = partial(command.run, __doc__, "machine_code", options, jobs, describe)

if __name__ == "__main__":
    main()
