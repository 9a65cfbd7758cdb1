"""A no-grad forward of old and reference rows: per-row adapters against peft's mixed batch and two serial forwards.

mtedit-fast bench adapters                                appends to benchmarks/results/adapters.csv
pytest benchmarks/bench_adapters.py --benchmark-only     the same calls under pytest-benchmark (make bench)

A row per implementation; `eager_us` is the serial one of the same run. Every call is timed by itself, with the device
synchronised, and all run under the same autocast as trainers do. `bytes`: base weights and the old adapter read once.
`flops`: of one forward of all rows, counted by PyTorch.
"""

import argparse
import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import command
import harness
import record
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mtedit_fast.editors import KontextEditor
from mtedit_fast.training.adapters import Adapters
from mtedit_fast.training.playground.models import load_pipeline

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROWS = {"cpu": ((4, 4), (16, 16)), "cuda": ((1, 1), (4, 4))}
RANK = 32
BY_ROW = {"hidden_states", "timestep", "guidance", "pooled_projections", "encoder_hidden_states"}
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """model: "tiny", the playground's, or "kontext", FLUX.1-Kontext-dev at full size with random weights."""

    model: str
    old: int
    reference: int
    dtype: torch.dtype
    device: torch.device
    compiled: bool = False

    @property
    def tokens(self) -> tuple[int, int]:
        """(image with its reference, text); 64×64 and 512×512 pictures."""
        return (32, 16) if self.model == "tiny" else (2048, 512)

    def transformer(self) -> Any:
        if self.model == "tiny":
            return load_pipeline(dtype=self.dtype).transformer.requires_grad_(False).to(self.device)
        default = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                return FluxTransformer2DModel(guidance_embeds=True).requires_grad_(False).eval()
        finally:
            torch.set_default_dtype(default)

    def inputs(self, generator: torch.Generator, config: Any) -> Inputs:
        rows, (image, text) = self.old + self.reference, self.tokens

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=self.device).to(self.dtype)

        ids = torch.randint(0, 4, (image, 3), generator=generator, device=self.device)
        return {
            "hidden_states": random(rows, image, config.in_channels),
            "timestep": torch.rand(rows, generator=generator, device=self.device).to(self.dtype),
            "guidance": torch.full((rows,), 2.5, device=self.device),
            "pooled_projections": random(rows, config.pooled_projection_dim),
            "encoder_hidden_states": random(rows, text, config.joint_attention_dim),
            "txt_ids": torch.zeros(text, 3, device=self.device, dtype=self.dtype),
            "img_ids": ids.to(self.dtype),
            "return_dict": False,
        }

    def autocast(self) -> Any:
        mixed = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype) if mixed else nullcontext()


class Models:
    """Our adapters and peft's, of equal values, on the same base weights."""

    def __init__(self, case: Case):
        self.case = case
        base = case.transformer()
        self.config = base.config
        twin = copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})
        self.weight_bytes = sum(p.numel() * p.element_size() for p in base.parameters())
        targets = KontextEditor.lora_targets
        self.own = Adapters(base, rank=RANK, alpha=2 * RANK, target_modules=targets, seed=0, old=True)
        lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets)
        self.peft = get_peft_model(twin, lora)
        self.peft.add_adapter("old", lora)
        self.peft.eval()
        generator = torch.Generator(case.device).manual_seed(1)
        for adapter in ("default", "old"):
            values = [0.02 * torch.randn(p.shape, generator=generator, device=p.device) for p in self.own.parameters]
            self.load(adapter, values)
        self.adapter_bytes = sum(value.numel() * value.element_size() for value in values)
        if case.compiled:
            for model in (base, twin):
                model.compile_repeated_blocks(dynamic=False)  # a second batch size would get kernels of dynamic shapes

    def load(self, adapter: str, values: Sequence[Tensor]) -> None:
        """The same values, layer by layer as in `own.parameters`, into an adapter ("default" or "old") of both."""
        self.own.load(adapter, dict(zip(self.own.names, values, strict=True)))
        torch._foreach_copy_([parameter.data for parameter in self.theirs(adapter)], list(values))

    def theirs(self, adapter: str) -> list[torch.nn.Parameter]:
        """peft's parameters, in the order of `own.parameters`."""
        found = dict(self.peft.named_parameters())
        return [found[f"base_model.model.{name.removesuffix('.weight')}.{adapter}.weight"] for name in self.own.names]

    def rows(self, x: Inputs) -> Tensor:
        with self.own.rows(self.case.old, self.case.reference), self.case.autocast():
            return self.own.model(**x)[0]

    def mixed(self, x: Inputs) -> Tensor:
        """peft's own: a list with the name of every row's adapter."""
        names = ["old"] * self.case.old + ["__base__"] * self.case.reference
        with torch.no_grad(), self.case.autocast():
            return self.peft(**x, adapter_names=names)[0]

    def serial(self, x: Inputs) -> Tensor:
        """As trainers do today: set the old adapter, forward, switch adapters off, forward, set the policy again."""

        def part(rows: slice) -> Inputs:
            return {key: value[rows] if key in BY_ROW else value for key, value in x.items()}

        with torch.no_grad(), self.case.autocast():
            self.peft.set_adapter("old")
            old = self.peft(**part(slice(self.case.old)))[0]
            with self.peft.disable_adapter():
                reference = self.peft(**part(slice(self.case.old, None)))[0]
            self.peft.set_adapter("default")
        return torch.cat([old, reference])


IMPLEMENTATIONS: dict[str, Callable[[Models, Inputs], Tensor]] = {
    "rows": Models.rows,
    "mixed": Models.mixed,
    "serial": Models.serial,
}


def error(case: Case, found: Tensor, serial: Tensor) -> float:
    """Largest distance from the serial forwards as a fraction of what batch shapes and roundings may change: √eps/4 of
    the largest value, 9e-5 for fp32 and 2e-2 for bf16."""
    allowed = math.sqrt(torch.finfo(case.dtype).eps) / 4 * serial.abs().max()
    ratio = ((found.double() - serial.double()).abs().max() / allowed).item()
    return math.inf if math.isnan(ratio) else ratio


def synchronised(call: harness.Call, device: torch.device) -> None:
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()


def bench(case: Case, *, min_seconds: float) -> list[record.Row]:
    """One row per implementation, all timed in turns on the same inputs.

    Raises:
        RuntimeError: an implementation's values are not those of the serial forwards, so that its time means nothing.
    """
    models = Models(case)
    names = [name for name in IMPLEMENTATIONS if name != "mixed" or not case.compiled]  # its hooks break graphs
    x = case.inputs(torch.Generator(case.device).manual_seed(0), models.config)
    values = {name: IMPLEMENTATIONS[name](models, x) for name in names}
    errors = {name: error(case, value, values["serial"]) for name, value in values.items()}
    if not max(errors.values()) <= 1:
        raise RuntimeError(f"{case}: {errors} times the difference that is allowed: no row")
    with FlopCounterMode(display=False) as counter, torch.compiler.set_stance("force_eager"):
        models.rows(x)
    calls = {name: [partial(synchronised, partial(IMPLEMENTATIONS[name], models, x), case.device)] for name in names}
    times = harness.measure(calls, torch.device("cpu"), min_seconds=min_seconds)  # the calls synchronise by themselves
    copied, serial = harness.copy_bandwidth(case.device), times["serial"].median
    moved, work = models.weight_bytes + models.adapter_bytes, counter.get_total_flops()

    def row(name: str) -> record.Row:
        time = times[name]
        return record.made(
            record.Row,
            columns(case, name)
            | {f"{key}_us": getattr(time, key) for key in time._fields}
            | {
                "bytes": moved,
                "flops": work,
                "gb_per_s": round(moved / time.median / 1e3, 3),
                "gflop_per_s": round(work / time.median / 1e3, 3),
                "copy_gb_per_s": round(copied, 3),
                "percent_of_copy": round(100 * moved / time.median / 1e3 / copied, 1),
                "eager_us": serial,
                "speedup_eager": round(serial / time.median, 2),
                "error": round(errors[name], 4),
            },
        )

    return [row(name) for name in names]


def columns(case: Case, implementation: str) -> dict[str, Any]:
    names = {dtype: name for name, dtype in DTYPES.items()}
    return record.environment(case.device) | {
        "op": "adapters",
        "variant": f"{case.model} {'compiled' if case.compiled else 'eager'}",
        "shape": f"{case.old}+{case.reference}x{sum(case.tokens)}",
        "dtype": names[case.dtype],
        "backend": implementation,
        "timing": "call",
    }


def options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(min_seconds=2.0)
    parser.add_argument("--model", choices=("tiny", "kontext"), help="default: tiny on a CPU, kontext on a GPU")
    parser.add_argument("--rows", action="append", help="4+4, old and reference; may be repeated (default: two sizes)")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="default: fp32 and bf16; bf16 for kontext")
    parser.add_argument("--compile", action="store_true", help="regionally compiled rows too; mixed is left out there")


def jobs(args: argparse.Namespace) -> Iterator[command.Job]:
    model = args.model or ("kontext" if args.device.type == "cuda" else "tiny")
    counts = [tuple(map(int, text.split("+"))) for text in args.rows or []] or ROWS[args.device.type]
    dtypes = args.dtype or (["bf16"] if model == "kontext" else ["fp32", "bf16"])
    modes = (False, True) if args.compile else (False,)
    for compiled, dtype, (old, reference) in itertools.product(modes, dtypes, counts):
        case = Case(model, old, reference, DTYPES[dtype], args.device, compiled)
        yield command.Job(columns(case, "rows"), partial(bench, case, min_seconds=args.min_seconds))


def describe(row: record.Row) -> str:
    return (
        f"{row.variant:17}{row.shape:14}{row.dtype:6}{row.backend:8}{row.median_us / 1e3:10.2f} ms "
        f"{row.gflop_per_s:10.1f} GFLOP/s; {row.speedup_eager}x of serial"
    )


def prepare(dtype: str, implementation: str) -> tuple[str, harness.Call]:
    case = Case("tiny", 4, 4, DTYPES[dtype], command.default_device())
    models = Models(case)
    x = case.inputs(torch.Generator(case.device).manual_seed(0), models.config)
    call = partial(IMPLEMENTATIONS[implementation], models, x)
    assert error(case, call(), models.serial(x)) <= 1
    return f"adapters {dtype}", call


main = partial(command.run, __doc__, "adapters", options, jobs, describe)
test_adapters = command.speed_test(prepare, itertools.product(DTYPES, IMPLEMENTATIONS))

if __name__ == "__main__":
    main()
