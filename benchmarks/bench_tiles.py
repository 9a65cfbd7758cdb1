"""Tile sizes and warps of our kernels, one beside the other: which of them is to be checked in for a device.

mtedit-fast bench tiles                        on a GPU; appends to benchmarks/results/tiles.csv
mtedit-fast bench tiles --only grad_query      one choice

The kernels read these constants at every launch; here each candidate takes its turn at the op's production shape,
checked against fp64 like every row. What is checked in comes first, and `over_current` is its time over a candidate's.
"""

import argparse
import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any
from unittest import mock

import command
import harness
import record
import torch
from op_bench import OpBench

from mtedit_fast.kernels import attention_columns, linear_logsumexp, nft_loss, sde_step, token_similarity


@dataclass(frozen=True)
class Choice:
    """A constant of a kernel's module, or with `key` an entry of one, and what it may be.

    bench, variant, shape, implementation: the row of an op's bench that shows it.
    """

    name: str
    module: ModuleType
    attribute: str
    candidates: tuple[Any, ...]
    bench: str
    variant: str
    shape: tuple[int, ...]
    key: Any = None
    implementation: str = "ours"

    @property
    def current(self) -> Any:
        value = getattr(self.module, self.attribute)
        return value if self.key is None else value[self.key]

    def values(self) -> list[Any]:
        """The current one first."""
        return [self.current, *(value for value in self.candidates if value != self.current)]

    def set(self, value: Any) -> AbstractContextManager[Any]:
        if self.key is None:
            return mock.patch.object(self.module, self.attribute, value)
        return mock.patch.dict(getattr(self.module, self.attribute), {self.key: value})


def _columns(name: str, variant: str, *candidates: tuple[int, int, int]) -> Choice:
    shape, key = (1, 24, 4608, 128, 8), (name, True)
    return Choice(name, attention_columns, "TILES", candidates, "attention_columns", variant, shape, key)


def _head(name: str, attribute: str, *candidates: Any, key: Any = None) -> Choice:
    shape = (256, 4096, 151936)
    return Choice(name, linear_logsumexp, attribute, candidates, "digit_score", "vocab", shape, key, "fused")


def _product(*sizes: int) -> dict[str, int]:
    return dict(zip(("BLOCK_N", "BLOCK_V", "BLOCK_H"), sizes, strict=True))


ROWS = (32, 4096, 64)
TOKENS = (96, 1025, 768)
CHOICES = (
    Choice("warps of sample", sde_step, "NUM_WARPS", (2, 4, 8), "sde_step", "sample", ROWS),
    Choice("warps that draw", sde_step, "DRAWING_WARPS", (4, 8), "sde_step", "seed", ROWS),
    Choice("warps of replay", sde_step, "NUM_WARPS", (2, 4, 8), "sde_step", "backward", ROWS),
    Choice("warps of nft_loss", nft_loss, "NUM_WARPS", (2, 4, 8), "nft_loss", "nft", ROWS),
    _head("product", "TILES", _product(128, 256, 64), _product(64, 128, 64), _product(128, 128, 32), key="half"),
    _head("stages of product", "STAGES", 2, 3, 4),
    _head("warps of product", "NUM_WARPS", 4, 8),
    _columns("lse", "heads", (128, 64, 4), (128, 64, 8), (128, 128, 8), (64, 64, 4)),
    _columns("few", "heads", (32, 0, 4), (32, 0, 8), (64, 0, 4)),
    _columns("grad_query", "backward", (64, 64, 4), (64, 32, 4), (128, 64, 8), (128, 32, 4)),
    _columns("grad_key", "backward", (64, 32, 4), (64, 64, 4), (128, 32, 8), (128, 64, 8)),
    Choice("pool", token_similarity, "TILE", (4096, 8192, 16384), "token_similarity", "background", TOKENS),
    Choice("warps of pool", token_similarity, "NUM_WARPS", (4, 8), "token_similarity", "background", TOKENS),
)


@dataclass(frozen=True)
class Row(record.Line):
    """One line of tiles.csv."""

    median_us: float
    p20_us: float
    p80_us: float
    over_current: float


def columns(choice: Choice, case: Any, graph: bool) -> dict[str, Any]:
    return record.environment(case.device) | {
        "op": choice.bench,
        "variant": f"{choice.variant}: {choice.name}",
        "shape": "x".join(map(str, case.shape)),
        "dtype": "bf16",
        "backend": str(choice.current),
        "timing": "graph" if graph else "stream",
    }


def measured(choice: Choice, bench: OpBench, case: Any, graph: bool, min_seconds: float) -> list[Row]:
    """A row for every candidate that the device can run; RuntimeError where a result is not fp64's."""
    calls: dict[str, list[harness.Call]] = {}
    for value in choice.values():
        name = str(value)
        try:
            with choice.set(value):
                found = bench.calls(case, [choice.implementation])[0]
        except _does_not_fit() as error:
            if value == choice.current:
                raise
            print(f"{choice.name} {name}: {error}")
            continue
        calls[name] = [partial(_under, choice, value, call) for call in found[choice.implementation]]
    times = harness.measure(calls, case.device, graph=graph, min_seconds=min_seconds)
    current = times[str(choice.current)].median
    same = columns(choice, case, graph)
    return [
        Row(
            **same | {"backend": name},
            median_us=time.median,
            p20_us=time.p20,
            p80_us=time.p80,
            over_current=round(current / time.median, 3),
        )
        for name, time in times.items()
    ]


def _under(choice: Choice, value: Any, call: harness.Call) -> object:
    with choice.set(value):
        return call()


def _does_not_fit() -> type[Exception]:
    from triton.runtime.errors import OutOfResources

    return OutOfResources


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", action="append", choices=[choice.name for choice in CHOICES], help="default: all")


def jobs(args: argparse.Namespace) -> Iterator[command.Job]:
    if args.device.type != "cuda":
        raise ValueError("--device: expected a GPU, where alone the kernels run; on a CPU ops take another back end")
    for choice in CHOICES:
        if args.only and choice.name not in args.only:
            continue
        bench: OpBench = importlib.import_module(f"bench_{choice.bench}").BENCH
        case = bench.case(choice.variant, choice.shape, torch.bfloat16, args.device)
        graph = bench.captured(choice.variant)
        yield command.Job(columns(choice, case, graph), partial(measured, choice, bench, case, graph, args.min_seconds))


def describe(row: Row) -> str:
    return (
        f"{row.op:17} {row.variant:28} {row.shape:16} {row.backend:50} {row.median_us:10.1f} µs, "
        f"{row.over_current:.3f}x of what is checked in"
    )


main: Callable[..., None] = partial(command.run, __doc__, "tiles", options, jobs, describe)

if __name__ == "__main__":
    main()
