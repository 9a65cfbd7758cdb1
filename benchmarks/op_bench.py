"""What the benches of single ops share: a row of ours, the eager form and `torch.compile`, and the command line."""

import argparse
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import harness
import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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


def columns(case: Case, op: str, backend: str, graph: bool) -> dict[str, Any]:
    """What a row says before anything is measured."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    return harness.environment(case.device) | {
        "op": op,
        "variant": case.variant,
        "shape": "x".join(map(str, case.shape)),
        "dtype": names[case.dtype],
        "backend": backend,
        "timing": "graph" if graph else "stream" if case.device.type == "cuda" else "call",
    }


def measure(
    case: Case,
    columns: Mapping[str, Any],
    implementations: Mapping[str, Callable[[Any], Callable[[Any], Any]]],
    error: Callable[[str, Any, Any], float],
    copy_gb_per_s: float,
    *,
    graph: bool,
    compile: bool,
    min_seconds: float,
) -> harness.Row:
    """Measures ours and its peers on the same inputs.

    Args:
        implementations: "ours", "eager" and, left out unless `compile`, "compile": each makes a call from the case.
        error: of (implementation, its result, its inputs), as a fraction of what is allowed.

    Raises:
        RuntimeError: an implementation's results are not those of fp64, so that its time means nothing.
    """
    generator = torch.Generator(case.device).manual_seed(0)
    sets = [case.inputs(generator) for _ in range(harness.rotations(case.bytes, case.device))]
    calls: dict[str, list[harness.Call]] = {}
    errors: dict[str, float] = {}
    for name, make in implementations.items():
        if name == "compile" and not compile:
            continue
        run = make(case)
        errors[name] = error(name, run(sets[0]), sets[0])
        if not errors[name] <= 1:
            raise RuntimeError(f"{name} {case}: {errors[name]:.3g} times the error that is allowed: no row")
        calls[name] = [partial(run, x) for x in sets]
    return harness.compared(
        columns,
        harness.measure(calls, case.device, graph=graph, min_seconds=min_seconds),
        bytes=case.bytes,
        flops=case.flops,
        copy_gb_per_s=copy_gb_per_s,
        error=errors["ours"],
    )


def command(
    description: str | None,
    results: Path,
    case: Callable[[str, tuple[int, ...], torch.dtype, torch.device], Any],
    bench: Callable[..., harness.Row],
    columns: Callable[[Any, bool], Mapping[str, Any]],
    *,
    variants: Sequence[str],
    shapes: Mapping[str, Sequence[tuple[int, ...]]],
    arguments: Sequence[str] | None = None,
    captured: Callable[[str], bool] = lambda variant: True,
) -> None:
    """The command of a bench: measures the rows that `results` does not hold yet and appends them.

    Args:
        shapes: by device type, the default.
        captured: whether a variant can run inside a CUDA graph.
    """
    example = "x".join(map(str, next(iter(shapes.values()))[0]))
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=results)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", action="append", help=f"{example}; may be repeated (default: several)")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="default: fp32 and bf16")
    parser.add_argument("--variant", action="append", choices=variants, help="default: all")
    parser.add_argument("--min-seconds", type=float, default=0.5, help="per implementation and row")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes most of the time")
    args = parser.parse_args(arguments)
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device(args.device)
    chosen = [tuple(map(int, shape.split("x"))) for shape in args.shape or []] or shapes[device.type]
    dtypes = [DTYPES[name] for name in args.dtype or ["fp32", "bf16"]]
    graphs = (True, False) if device.type == "cuda" else (False,)
    rows = itertools.product(chosen, dtypes, args.variant or variants, graphs)
    cases = [(case(v, shape, dtype, device), graph) for shape, dtype, v, graph in rows if not graph or captured(v)]
    done = set(harness.measured(args.out))
    left = [(one, graph) for one, graph in cases if harness.identity(dict(columns(one, graph))) not in done]
    if not left:
        print(f"{args.out} holds all {len(cases)} rows of this commit already")
        return
    copy = harness.copy_bandwidth(device, min_seconds=args.min_seconds)
    print(f"{harness.device_name(device)}: copy {copy:.1f} GB/s read + written")
    for one, graph in left:
        row = bench(one, copy, graph=graph, compile=not args.no_compile, min_seconds=args.min_seconds)
        harness.append(args.out, row)
        print(
            f"{row.variant:14}{row.shape:12}{row.dtype:6}{row.backend:10}{row.timing:7}{row.median_us:10.1f} µs "
            f"{row.gb_per_s:8.1f} GB/s {row.percent_of_copy:6.1f} % of copy; eager {row.speedup_eager}x, "
            f"compile {row.speedup_compile}x",
            flush=True,
        )
