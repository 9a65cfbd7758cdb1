"""The command line of every bench, and its calls under pytest-benchmark."""

import argparse
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import record
import torch
from harness import Call, settle_allocator


@dataclass(frozen=True)
class Job:
    """Rows that are measured together.

    columns: what a results file that holds them has in common with them, of `record.IDENTITY`.
    measure: returns it or a list of them; RuntimeError where a check fails, so that times mean nothing.
    """

    columns: Mapping[str, Any]
    measure: Callable[[], Any]


def as_device(name: str) -> torch.device:
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def default_device() -> torch.device:
    return as_device("cuda" if torch.cuda.is_available() else "cpu")


def parser(doc: str | None, name: str, options: Callable[[argparse.ArgumentParser], None]) -> argparse.ArgumentParser:
    """What every bench takes, and its own `options`."""
    made = argparse.ArgumentParser(
        f"mtedit-fast bench {name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--out", type=Path, default=record.RESULTS / f"{name}.csv")
    made.add_argument("--device", type=as_device, default=default_device())
    made.add_argument("--min-seconds", type=float, default=0.5, help="per implementation and row")
    made.add_argument("--fresh", action="store_true", help="measure again what the file holds already of this commit")
    options(made)
    return made


def run(
    doc: str | None,
    name: str,
    options: Callable[[argparse.ArgumentParser], None],
    jobs: Callable[[argparse.Namespace], Iterable[Job]],
    describe: Callable[[Any], str],
    arguments: Sequence[str] | None = None,
) -> None:
    """Measures the rows that --out does not hold yet, appends and prints them one by one.

    Args:
        jobs: of the parsed arguments; a ValueError is an error of the command line.
    """
    own = parser(doc, name, options)
    args = own.parse_args(arguments)
    try:
        wanted = list(jobs(args))
    except ValueError as error:
        own.error(str(error))
    held = [] if args.fresh else record.read(args.out)
    left = [job for job in wanted if not record.holds(held, job.columns)]
    if not left:
        print(f"{args.out} holds all {len(wanted)} rows of this commit already")
    for job in left:
        found = job.measure()
        for row in found if isinstance(found, list) else [found]:
            record.append(args.out, row)
            print(describe(row), flush=True)


def speed_test(prepare: Callable[..., tuple[str, Call]], cases: Iterable[tuple[Any, ...]]) -> Callable[..., None]:
    """A test for pytest-benchmark.

    Args:
        prepare: called with a case; checks its results and returns the group of its peers and a call. It may skip.
    """
    import pytest

    @pytest.mark.parametrize("case", [pytest.param(each, id="-".join(map(str, each))) for each in cases])
    def test(benchmark: Any, case: tuple[Any, ...]) -> None:
        settle_allocator()
        benchmark.group, call = prepare(*case)

        def synchronised() -> None:
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()

        benchmark(synchronised)

    return test


def in_turns(calls: Sequence[Call]) -> Call:
    """Each in its turn."""
    turn = itertools.cycle(calls)
    return lambda: next(turn)()
