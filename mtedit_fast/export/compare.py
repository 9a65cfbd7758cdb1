"""Engine, ONNX and torch side by side: how far they are apart and how long they take."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from .manifest import DamagedFile, Manifest, model_hash
from .modules import Exportable
from .ports import Profile, random_inputs
from .runtime import ExportedModule, OnnxModule
from .tensorrt import TensorRTModule

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Result:
    """One module in one profile by one runtime.

    error: max |a − b| / max |b| against the reference, None for the reference itself. milliseconds: the latency's
    `PERCENTILES`. missing: why there is neither, "" if there is.
    """

    module: str
    profile: str
    runtime: str
    error: float | None = None
    milliseconds: tuple[float, ...] = ()
    missing: str = ""


def compare(
    directory: str | Path,
    modules: Mapping[str, Exportable] | None = None,
    *,
    repeats: int = 20,
    seed: int = 0,
    device: torch.device | str = "cuda",
) -> list[Result]:
    """Run every module of an export on the same random inputs, at the best sizes of each of its profiles.

    The reference is torch, or without it onnxruntime. A runtime that cannot run here is in the results with its reason.

    Args:
        modules: the torch modules that were exported, by name; None: no torch.
        repeats: timed runs after a warm-up of three.
        device: of the engines and of torch, where there is a GPU.

    Raises:
        ValueError: a torch module's weights are not those that were exported, and what reading the export raises.
    """
    manifest = Manifest.read(directory)
    place = torch.device(device if torch.cuda.is_available() else "cpu")
    results = []
    for name, entry in manifest.modules.items():
        runs: dict[str, Callable[..., Any] | str] = {"torch": "not asked for: pass the source"}
        if modules is not None:
            runs["torch"] = _torch(name, modules, entry.model_hash, place)
        runs["onnx"] = _open(lambda name=name: OnnxModule(directory, name))  # type: ignore[misc]
        runs["engine"] = (
            "not built"
            if entry.engine is None
            else _open(
                lambda name=name: TensorRTModule(directory, name, device=device)  # type: ignore[misc]
            )
        )
        for profile in entry.profiles or (_example(entry.inputs),):
            sizes = {size: best for size, (_, best, _) in profile.sizes.items()}
            values = random_inputs(entry.inputs, sizes, seed=seed)
            reference: list[Tensor] | None = None
            for runtime, run in runs.items():
                if isinstance(run, str):
                    results.append(Result(name, profile.name, runtime, missing=run))
                    continue
                where = torch.device("cpu") if runtime == "onnx" else place
                inputs = {key: value.to(where) for key, value in values.items()}
                outputs = _outputs(run(**inputs))
                error = None if reference is None else _error(outputs, reference)
                reference = reference or outputs
                results.append(Result(name, profile.name, runtime, error, _latency(run, inputs, repeats, where)))
    return results


def _torch(
    name: str, modules: Mapping[str, Exportable], expected: str, device: torch.device
) -> Callable[..., Any] | str:
    if name not in modules:
        return "not in the source"
    exported = modules[name]
    if model_hash(exported) != expected:
        raise ValueError(
            f"{name}: the torch weights are not those that were exported; pass the same source, LoRA and dtype as to "
            "mtedit-fast export"
        )
    exported.module.to(device)
    return torch.no_grad()(exported.call)


def _open(load: Callable[[], ExportedModule]) -> ExportedModule | str:
    """The module, or in words why it cannot run on this machine; a damaged file stays an error."""
    try:
        return load()
    except DamagedFile:
        raise
    except (ImportError, ValueError) as error:
        return str(error)


def _example(ports: Any) -> Profile:
    """Any sizes will do for a graph without profiles: these are multiples of every VAE's factor."""
    names = {size for port in ports for size in port.shape if isinstance(size, str)}
    fitting = {"batch": 2, "text": 8, "sequence": 32}
    return Profile("any", {name: (fitting.get(name, 64),) * 3 for name in sorted(names)})


def _outputs(found: Any) -> list[Tensor]:
    return [found.float().cpu()] if isinstance(found, Tensor) else [tensor.float().cpu() for tensor in found]


def _error(outputs: list[Tensor], reference: list[Tensor]) -> float:
    pairs = zip(outputs, reference, strict=True)
    return max(((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item() for a, b in pairs)


def _latency(
    run: Callable[..., Any], inputs: dict[str, Tensor], repeats: int, device: torch.device
) -> tuple[float, ...]:
    def once() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run(**inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1000 * (time.perf_counter() - start)

    for _ in range(3):
        once()
    times = torch.tensor([once() for _ in range(repeats)])
    return tuple(times.quantile(percent / 100).item() for percent in PERCENTILES)


def table(results: list[Result]) -> Table:
    """The results for a console."""
    shown = Table(*("module", "profile", "runtime", "error"), *(f"p{percent} ms" for percent in PERCENTILES))
    for result in results:
        if result.missing:
            shown.add_row(result.module, result.profile, result.runtime, f"not run: {result.missing}")
            continue
        error = "reference" if result.error is None else f"{result.error:.1e}"
        shown.add_row(
            result.module, result.profile, result.runtime, error, *(f"{value:.2f}" for value in result.milliseconds)
        )
    return shown
