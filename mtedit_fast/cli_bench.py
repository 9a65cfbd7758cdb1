"""`mtedit-fast bench NAME …`: the speed measurements of the source tree, in suites or one by one, and their report."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SUITES = ("ops", "rollout", "judge", "consistency", "update", "iteration", "onestep", "export", "plan", "all")
SUITE_OPTIONS = {"--device", "--results", "--list", "--fresh", "--tests", "--time-limit"}
READERS = {"report": "report.py", "tables": "tables.py"}


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


def script(name: str, arguments: Sequence[str]) -> list[str]:
    """The file that NAME stands for, with its arguments: a suite where all options are a suite's, else the bench.

    Raises:
        ValueError: there is no such name.
    """
    benches, flags = names(), {text.partition("=")[0] for text in arguments if text.startswith("-")}
    if name in READERS:
        return [READERS[name], *arguments]
    if name in SUITES and (name not in benches or flags <= SUITE_OPTIONS):
        return ["suites.py", name, *arguments]
    if name not in benches:
        known = dict.fromkeys([*SUITES, *benches, *READERS])
        raise ValueError(f"bench: expected one of {', '.join(known)}, got {name!r}")
    return [f"bench_{name}.py", *arguments]


def run_bench(name: str, arguments: Sequence[str]) -> None:
    """Run what NAME stands for in this process, as `python benchmarks/FILE ARGUMENTS…` would.

    Raises:
        ValueError: there is no such name.
        ImportError: it needs what is not installed.
    """
    file, *rest = script(name, arguments)
    before = sys.argv, list(sys.path)
    sys.argv, sys.path[:0] = [str(BENCHMARKS / file), *rest], [str(BENCHMARKS)]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except ImportError as error:
        raise ImportError(f"bench {name}: {error}; pip install -e '.[dev]', and see benchmarks/README.md") from error
    finally:
        sys.argv, sys.path[:] = before


def bench(
    context: typer.Context,
    name: Annotated[
        str | None, typer.Argument(help="a suite, a bench, report or tables; without, their names", show_default=False)
    ] = None,
) -> None:
    """Measure speed: `bench all --list`, `bench rollout`, `bench rollout --editor klein-kv`, `bench report`.

    A suite takes --device, --results, --list, --fresh, --tests and --time-limit; with other options NAME is the bench,
    whose own `bench NAME --help` lists. Rows are appended to benchmarks/results, whose README says how to read them.
    `bench report` draws them as a page and compares two commits or devices; `bench tables` writes them into Markdown.
    """
    if name is None:
        typer.echo(f"suites: {' '.join(SUITES)}\nbenches: {' '.join(names())}\nresults: {' '.join(READERS)}")
        return
    run_bench(name, context.args)


def add_bench(app: typer.Typer) -> None:
    """Add the command to `app`. What follows NAME is the bench's own, its --help included."""
    app.command(context_settings={"allow_extra_args": True, "allow_interspersed_args": False})(bench)
