"""The runs of a study: each in a process of its own, several at a time, with its log beside its results."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from mtedit_fast.progress import progress_bar


class Run(NamedTuple):
    folder: Path
    shown: str
    call: tuple[str, ...]
    """A module, whose `main` is called with the folder and the rest of these texts."""


def run_in_processes(name: str, runs: list[Run], *, finished: int, jobs: int, console: Console) -> None:
    """Carry out `runs`, `jobs` at a time, each with an equal share of the cores; `finished` others count as done.

    Raises:
        ChildProcessError: some failed; the others were finished.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs)
    total = finished + len(runs)
    failed = []
    with (
        progress_bar(console) as progress,
        ThreadPoolExecutor(jobs) as pool,
    ):
        task = progress.add_task(name, total=total, completed=finished, shown="")
        futures = {pool.submit(_in_process, run, threads): run for run in runs}
        for future in as_completed(futures):
            run = futures[future]
            if future.result():
                failed.append(run.folder.name)
            progress.update(task, advance=1, shown=run.shown)
            if not console.is_terminal:  # a log file has no live bar
                console.print(f"run {progress.tasks[task].completed:.0f}/{total}  {run.shown}")
    if failed:
        raise ChildProcessError(
            f"runs that failed: {', '.join(failed)}; see log.txt in their folders, then start again"
        )


def _in_process(run: Run, threads: int) -> int:
    run.folder.mkdir(parents=True, exist_ok=True)
    module, *arguments = run.call
    code = "import importlib, sys; importlib.import_module(sys.argv[1]).main(*sys.argv[2:])"
    command = [sys.executable, "-c", code, module, str(run.folder), *arguments]
    with (run.folder / "log.txt").open("a") as log:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False).returncode
