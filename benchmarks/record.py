"""Rows of results files: what each says, where it was measured, and how it gets into a CSV and out again."""

import csv
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
IDENTITY = ("commit", "device", "threads", "torch", "op", "variant", "shape", "dtype", "backend", "timing")
KIND = ("device", "threads", "op", "variant", "shape", "dtype", "backend", "timing")
"""What was measured and where, of whatever version."""


@dataclass(frozen=True)
class Line:
    """How every line of a results file begins: where, and what, was measured."""

    date: str
    commit: str
    device: str
    threads: int
    python: str
    torch: str
    triton: str
    op: str
    variant: str
    shape: str
    dtype: str
    backend: str
    timing: str


@dataclass(frozen=True)
class Measured(Line):
    """How every line of an op's results file begins. Times are microseconds per call."""

    median_us: float
    p20_us: float
    p80_us: float
    bytes: int
    flops: int
    gb_per_s: float
    gflop_per_s: float
    copy_gb_per_s: float
    percent_of_copy: float


@dataclass(frozen=True)
class Row(Measured):
    """Beside the eager form and `torch.compile`; an empty peer was not measured."""

    eager_us: float | None
    compile_us: float | None
    speedup_eager: float | None
    speedup_compile: float | None
    error: float
    """Largest error against fp64, as a fraction of what the check allows."""


def made(kind: type, columns: Mapping[str, Any]) -> Any:
    """A row of `kind` from columns of which it may not have all; those that are not there are empty."""
    return kind(**{field.name: columns.get(field.name) for field in fields(kind)})


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return processor_name(lines) or platform.processor() or platform.machine()


def processor_name(cpuinfo: Iterable[str]) -> str | None:
    """With family and model where it has them: virtual machines name processors alike that differ by two times."""
    first: dict[str, str] = {}
    for key, _, value in (line.partition(":") for line in cpuinfo):
        first.setdefault(key.strip(), value.strip())
    name, family, model = (first.get(key) for key in ("model name", "cpu family", "model"))
    return f"{name} (family {family}, model {model})" if name and family and model else name


def commit() -> str:
    """The checkout's commit, marked where tracked files differ from it; `COMMIT` where there is no git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT", "unknown")


def environment(device: torch.device) -> dict[str, str | int]:
    """The columns that say where and when a row was measured."""
    try:
        import triton
    except ImportError:
        triton = None
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ"),
        "commit": commit(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__ if triton else "",
    }


def append(path: Path, row: Any) -> None:
    """Adds a row, any dataclass, and the header to a new file.

    A file with other columns is another version's: it is set aside as NAME.1.csv, which reports read, too.
    """
    names = [field.name for field in fields(row)]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size and header(path) != names:
        aside = next(p for n in range(1, 10_000) if not (p := path.with_suffix(f".{n}{path.suffix}")).exists())
        path.rename(aside)
        print(f"{path} has other columns than this version writes: it is {aside.name} now")
    fresh = not path.exists() or not path.stat().st_size
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(asdict(row))


def header(path: Path) -> list[str]:
    with path.open(newline="") as file:
        return next(csv.reader(file), [])


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a results file, all as text; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{name: value or "" for name, value in row.items() if name is not None} for row in csv.DictReader(file)]


def read_all(folder: Path, name: str = "*") -> list[dict[str, str]]:
    """The rows of NAME.csv and of what was set aside from it, or of every file; "file" says which it was.

    Files whose rows do not say what was measured where are left out.
    """
    paths = sorted({*folder.glob(f"{name}.csv"), *folder.glob(f"{name}.[0-9]*.csv")})
    found = [row | {"file": path.name} for path in paths for row in read(path)]
    return [row for row in found if {"op", "device", "variant"} <= row.keys()]


def holds(rows: Iterable[Mapping[str, str]], columns: Mapping[str, Any]) -> bool:
    """Whether there is a row with what `columns` has of `IDENTITY`."""
    wanted = {name: str(columns[name]) for name in IDENTITY if name in columns}
    return any(all(row.get(name) == value for name, value in wanted.items()) for row in rows)
