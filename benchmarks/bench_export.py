"""A full-size transformer with random weights to ONNX: time, and how much memory the export takes besides the weights.

mtedit-fast bench export --editor kontext                FLUX.1-Kontext-dev in bf16: 24 GB of weights, 48 GB of disk
mtedit-fast bench export --editor klein-4b --folder /scratch
pytest benchmarks/bench_export.py --benchmark-only       a tiny one under pytest-benchmark (make bench)

Weights lie in a file that is mapped, as `from_pretrained` maps safetensors, so what the kernel may drop again is not
counted: `peak_bytes` is the largest growth of the process's anonymous memory during the export. A second copy of the
weights would be as large as they are.
"""

import argparse
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import command
import record
import torch
from random_editors import RECIPES
from torch import nn

from mtedit_fast.export import Exportable, Manifest, export_module, klein_transformer, kontext_transformer
from mtedit_fast.training.dtypes import default_dtype
from mtedit_fast.training.public_models import FAMILIES

EXPORTS = {"kontext": kontext_transformer, "flux2_klein": klein_transformer}


@dataclass(frozen=True)
class Row(record.Line):
    """One line of a results file."""

    weights_bytes: int
    seconds: float
    """Tracing, writing and hashing."""
    peak_bytes: int
    """Anonymous memory beyond what the process had before."""
    files_bytes: int
    opset: int


def mapped_transformer(name: str, path: Path, *, tiny: bool = False) -> Any:
    """The transformer of `RECIPES[name]` in bf16, random, its weights in a file at `path` that is mapped."""
    recipe = RECIPES[name]
    family, model = FAMILIES[recipe.editor.family], recipe.tiny if tiny else recipe.full
    with torch.device("meta"), default_dtype(torch.bfloat16):
        transformer = family.transformer.from_config(model.transformer).eval().requires_grad_(False)
    count = sum(parameter.numel() for parameter in transformer.parameters())
    weights = torch.from_file(str(path), shared=True, size=count, dtype=torch.bfloat16)
    block = 0.02 * torch.randn(min(count, 1 << 26), generator=torch.Generator().manual_seed(0)).bfloat16()
    for start in range(0, count, len(block)):
        part = weights[start : start + len(block)]
        part.copy_(block[: len(part)])
    at = 0
    for owner in transformer.modules():
        for key, parameter in owner.named_parameters(recurse=False):
            value = weights[at : at + parameter.numel()].view(parameter.shape)
            setattr(owner, key, nn.Parameter(value, requires_grad=False))
            at += parameter.numel()
    return transformer


class AnonymousMemory:
    """The largest anonymous memory of this process while it is entered, and what it was before, in bytes."""

    def __enter__(self) -> Self:
        self.before = self.peak = _anonymous()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            self.peak = max(self.peak, _anonymous())


def _anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("RssAnon: expected it in /proc/self/status; the memory of an export is measured on Linux")


def exportable(name: str, transformer: Any) -> Exportable:
    return EXPORTS[RECIPES[name].editor.family](transformer)


def bench(name: str, folder: Path, *, tiny: bool) -> Row:
    transformer = mapped_transformer(name, folder / "weights.bin", tiny=tiny)
    weights = sum(parameter.nbytes for parameter in transformer.parameters())
    start = time.perf_counter()
    with AnonymousMemory() as memory:
        export_module(folder / "export", "transformer", exportable(name, transformer))
    entry = Manifest.read(folder / "export").entry("transformer")
    return Row(
        **columns(name, tiny),
        weights_bytes=weights,
        seconds=round(time.perf_counter() - start, 1),
        peak_bytes=memory.peak - memory.before,
        files_bytes=sum(file.bytes for file in entry.files),
        opset=entry.opset,
    )


def columns(name: str, tiny: bool) -> dict[str, Any]:
    return record.environment(torch.device("cpu")) | {
        "op": "export",
        "variant": f"tiny {name}" if tiny else name,
        "shape": "transformer",
        "dtype": "bf16",
        "backend": "onnx",
        "timing": "call",
    }


def options(parser: argparse.ArgumentParser) -> None:
    names = [name for name, recipe in RECIPES.items() if recipe.editor.family in EXPORTS and "kv" not in name]
    parser.add_argument("--editor", choices=names, default="kontext")
    parser.add_argument("--tiny", action="store_true", help="the tiny model")
    parser.add_argument("--folder", type=Path, help="for the weights and the export, deleted afterwards")


def jobs(args: argparse.Namespace) -> Iterator[command.Job]:
    folder = args.folder or Path(tempfile.gettempdir())
    free, need = shutil.disk_usage(folder).free, 0 if args.tiny else 2 * _bytes(args.editor)
    if free < need:
        raise ValueError(f"--folder: expected {need / 1e9:.0f} GB free, got {free / 1e9:.0f} GB; choose another disk")

    def measure() -> Row:
        with tempfile.TemporaryDirectory(dir=folder) as made:
            return bench(args.editor, Path(made), tiny=args.tiny)

    yield command.Job(columns(args.editor, args.tiny), measure)


def describe(row: Row) -> str:
    return (
        f"{row.variant}: {row.weights_bytes / 1e9:.2f} GB of weights in {row.seconds:.0f} s, "
        f"{row.peak_bytes / 1e9:.2f} GB of memory besides; {row.files_bytes / 1e9:.2f} GB of files, opset {row.opset}"
    )


def _bytes(name: str) -> int:
    recipe = RECIPES[name]
    with torch.device("meta"), default_dtype(torch.bfloat16):
        model = FAMILIES[recipe.editor.family].transformer.from_config(recipe.full.transformer)
    return sum(parameter.nbytes for parameter in model.parameters())


def prepare(name: str) -> tuple[str, Callable[[], object]]:
    folder = tempfile.TemporaryDirectory()
    transformer = mapped_transformer(name, Path(folder.name) / "weights.bin", tiny=True)
    # the call keeps the folder, which is deleted with it
    return "ONNX export of a tiny transformer", lambda: export_module(
        Path(folder.name) / "export", "transformer", exportable(name, transformer)
    )


main = partial(command.run, __doc__, "export", options, jobs, describe)
test_export = command.speed_test(prepare, [("kontext",), ("klein-4b",)])

if __name__ == "__main__":
    main()
