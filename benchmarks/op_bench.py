"""What the benches of single ops share: rows of ours beside the eager form, `torch.compile` and libraries."""

import argparse
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Protocol

import command
import harness
import pytest
import record
import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Checker = Callable[[str, Any], float]


class Case(Protocol):
    """One op on one kind of input."""

    variant: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes(self) -> int: ...

    @property
    def flops(self) -> int: ...

    def inputs(self, generator: torch.Generator) -> Any: ...


@dataclass(frozen=True)
class OpBench:
    """The bench of an op: its rows, its command and its test.

    Args:
        name: of the results file.
        implementations: each makes a call from a case. "ours" and, mostly, "eager" are among them; "compile" is left
            out by --no-compile, which saves most of the time.
        checker: of a case and inputs: the error of (implementation, result), as a fraction of what is allowed.
        shapes: by device type, the default.
        small: the shape under pytest-benchmark.
        backend: what "auto" takes for a case.
        op: of a case; the name, where there is only one.
        able: which implementations are installed and can do a case.
        captured: whether a variant can run inside a CUDA graph.
        row: `X_us`, `speedup_X` and `X_extra_bytes` are those of implementation X, `extra_bytes` ours.
        more: what else a row of a case has.
        dtypes: by name, the first two are the default; on a GPU the second comes first, being what models run in.
        asked: cases that are measured only where their dtype is asked for.
    """

    doc: str | None
    name: str
    case: Callable[[str, Any, torch.dtype, torch.device], Any]
    implementations: Mapping[str, Callable[[Any], Callable[[Any], Any]]]
    checker: Callable[[Any, Any], Checker]
    variants: Sequence[str]
    shapes: Mapping[str, Sequence[tuple[int, ...]]]
    small: tuple[int, ...]
    backend: Callable[[Any], str]
    op: Callable[[Any], str] | None = None
    able: Callable[[Any], Sequence[str]] | None = None
    captured: Callable[[str], bool] = lambda variant: True
    row: type = record.Row
    more: Callable[[Any], Mapping[str, Any]] = lambda case: {}
    dtypes: Mapping[str, torch.dtype] = field(default_factory=lambda: DTYPES)
    asked: Callable[[Any], bool] = lambda case: False

    @property
    def usual(self) -> list[str]:
        return list(self.dtypes)[:2]

    def columns(self, case: Any, graph: bool) -> dict[str, Any]:
        """What a row says before anything is measured."""
        names = {dtype: name for name, dtype in self.dtypes.items()}
        return record.environment(case.device) | {
            "op": self.op(case) if self.op else self.name,
            "variant": case.variant,
            "shape": "x".join(map(str, case.shape)),
            "dtype": names[case.dtype],
            "backend": self.backend(case),
            "timing": "graph" if graph else "stream" if case.device.type == "cuda" else "call",
        }

    def calls(self, case: Any, names: Sequence[str], limit: int = 1000) -> tuple[dict[str, list[harness.Call]], float]:
        """Of each implementation on the same sets of inputs, which rotate; and the error of ours.

        Raises:
            RuntimeError: an implementation's results are not those of fp64, so that its time means nothing.
        """
        generator = torch.Generator(case.device).manual_seed(0)
        sets = [case.inputs(generator) for _ in range(min(harness.rotations(case.bytes, case.device), limit))]
        check = self.checker(case, sets[0])
        calls: dict[str, list[harness.Call]] = {}
        errors: dict[str, float] = {}
        for name in names:
            run = self.implementations[name](case)
            errors[name] = check(name, run(sets[0]))
            if not errors[name] <= 1:
                raise RuntimeError(f"{name} {case}: {errors[name]:.3g} times the error that is allowed: no row")
            calls[name] = [partial(run, x) for x in sets]
        return calls, errors.get("ours", 0.0)

    def bench(
        self, case: Any, copy_gb_per_s: float, *, graph: bool = False, compile: bool = True, min_seconds: float
    ) -> Any:
        """Measures ours and its peers on the same inputs; raises what `calls` does."""
        able = self.able(case) if self.able else list(self.implementations)
        calls, error = self.calls(case, [name for name in able if compile or name != "compile"])
        memory = {}
        if "extra_bytes" in {each.name for each in fields(self.row)}:
            memory = {name: harness.extra_bytes(each[0], case.device) for name, each in calls.items()}
        times = harness.measure(calls, case.device, graph=graph, min_seconds=min_seconds)
        own = times["ours"]
        speedups = {name: round(time.median / own.median, 2) for name, time in times.items() if name != "ours"}
        gb_per_s = case.bytes / own.median / 1e3
        found = {
            **self.columns(case, graph),
            **{f"{name}_us": time.median for name, time in times.items()},
            **{f"speedup_{name}": speedup for name, speedup in speedups.items()},
            **{f"{name}_extra_bytes": most for name, most in memory.items()},
            "median_us": own.median,
            "p20_us": own.p20,
            "p80_us": own.p80,
            "bytes": case.bytes,
            "flops": case.flops,
            "gb_per_s": round(gb_per_s, 3),
            "gflop_per_s": round(case.flops / own.median / 1e3, 3),
            "copy_gb_per_s": round(copy_gb_per_s, 3),
            "percent_of_copy": round(100 * gb_per_s / copy_gb_per_s, 1),
            "speedup_best": min(speedups.values()),
            "extra_bytes": memory.get("ours"),
            "error": round(error, 4),
        }
        return record.made(self.row, found | dict(self.more(case)))

    def options(self, parser: argparse.ArgumentParser) -> None:
        example = "x".join(map(str, self.small))
        parser.add_argument("--shape", action="append", help=f"{example}; may be repeated (default: several)")
        parser.add_argument("--dtype", action="append", choices=self.dtypes, help=f"default: {', '.join(self.usual)}")
        parser.add_argument("--variant", action="append", choices=self.variants, help="default: all")
        parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")

    def jobs(self, args: argparse.Namespace) -> Iterator[command.Job]:
        shapes = [tuple(map(int, shape.split("x"))) for shape in args.shape or []] or self.shapes[args.device.type]
        cuda = args.device.type == "cuda"
        names = args.dtype or (self.usual[::-1] if cuda else self.usual)
        graphs = (True, False) if cuda else (False,)
        for name, shape, variant, graph in itertools.product(names, shapes, args.variant or self.variants, graphs):
            case = self.case(variant, shape, self.dtypes[name], args.device)
            if (not graph or self.captured(variant)) and (args.dtype or not self.asked(case)):
                yield command.Job(self.columns(case, graph), partial(self._row, args, case, graph))

    def _row(self, args: argparse.Namespace, case: Any, graph: bool) -> Any:
        copy = harness.copy_bandwidth(args.device, min_seconds=args.min_seconds)
        return self.bench(case, copy, graph=graph, compile=not args.no_compile, min_seconds=args.min_seconds)

    @staticmethod
    def describe(row: Any) -> str:
        names = [name for name in vars(row) if name.startswith("speedup_") and getattr(row, name) is not None]
        shown = ", ".join(f"{name.removeprefix('speedup_')} {getattr(row, name)}x" for name in names)
        return (
            f"{row.op:17} {row.variant:18} {row.shape:14} {row.dtype:5} {row.backend:9} {row.timing:6} "
            f"{row.median_us:10.1f} µs {row.gb_per_s:8.1f} GB/s, {row.percent_of_copy:5.1f} % of the "
            f"{row.copy_gb_per_s:.1f} GB/s of a copy; {shown}"
        )

    def main(self, arguments: Sequence[str] | None = None) -> None:
        command.run(self.doc, self.name, self.options, self.jobs, self.describe, arguments)

    def speed_test(self) -> Callable[..., None]:
        """Under pytest-benchmark: every variant in every dtype; compiled code, which takes long to make, in one."""

        def prepare(variant: str, dtype: str, implementation: str) -> tuple[str, harness.Call]:
            case = self.case(variant, self.small, self.dtypes[dtype], command.default_device())
            if self.able and implementation not in self.able(case):
                pytest.skip(f"{implementation} does not take this case, or is not installed")
            calls, _ = self.calls(case, [implementation], limit=8)
            return f"{self.columns(case, False)['op']} {variant} {dtype}", command.in_turns(calls[implementation])

        cases = itertools.product(self.variants, self.usual, self.implementations)
        return command.speed_test(prepare, [case for case in cases if case[1:] != (self.usual[1], "compile")])
