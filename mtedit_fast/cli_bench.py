"""`mtedit-fast bench NAME …`: the speed measurements of the source tree."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Annotated

import typer

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def names() -> list[str]:
    """Of the benches there are.

    Raises:
        FileNotFoundError: there are none, as where the package was installed without its sources.
    """
    found = sorted(path.stem.removeprefix("bench_") for path in BENCHMARKS.glob("bench_*.py"))
    if not found:
        raise FileNotFoundError(
            f"no benches at {BENCHMARKS}: they are not part of the installed package; run the command from a clone of "
            "the repository, installed with `pip install -e '.[dev]'`"
        )
    return found


def run_bench(name: str, arguments: list[str]) -> None:
    """Run bench NAME in this process, as `python benchmarks/bench_NAME.py ARGUMENTS…` would.

    Raises:
        ValueError: there is no such bench.
        ImportError: it needs what is not installed.
    """
    known = names()
    if name not in known:
        raise ValueError(f"bench: expected one of {', '.join(known)}, got {name!r}")
    file = BENCHMARKS / f"bench_{name}.py"
    before = sys.argv, list(sys.path)
    sys.argv, sys.path[:0] = [str(file), *arguments], [str(BENCHMARKS)]
    try:
        runpy.run_path(str(file), run_name="__main__")
    except ImportError as error:
        raise ImportError(f"bench {name}: {error}; pip install -e '.[dev]', and see benchmarks/README.md") from error
    finally:
        sys.argv, sys.path[:] = before


def bench(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="which one; without, their names", show_default=False)] = None,
) -> None:
    """Measure speed: `bench rollout --editor klein-kv --size 1024`; `bench NAME --help` lists what each takes.

    Rows are appended to benchmarks/results, or to --out. benchmarks/README.md says how to read them.
    """
    if name is None:
        typer.echo("\n".join(names()))
        return
    run_bench(name, context.args)


def add_bench(app: typer.Typer) -> None:
    """Add the command to `app`. What follows NAME is the bench's own, its --help included."""
    app.command(context_settings={"allow_extra_args": True, "allow_interspersed_args": False})(bench)
