"""`mtedit-fast export`, `run` and `check`: ONNX and TensorRT engines of trained editors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from mtedit_fast.cli_pipelines import Source

DtypeOption = Annotated[str, typer.Option(help="of weights and arithmetic: fp32, bf16 or fp16")]
RankOption = Annotated[
    int | None, typer.Option(min=1, help="make adapters up to this rank inputs of the transformer, given at run time")
]
LengthOption = Annotated[
    int | None, typer.Option(min=1, help="text tokens per prompt; default: the configuration's, else 512")
]


def export(
    source: Annotated[
        str,
        typer.Argument(
            help="training configuration (.yaml), pipeline folder or hub name, DINO folder, or an export to build from"
        ),
    ],
    to: Annotated[
        str,
        typer.Option(help="onnx; tensorrt, on the GPU it is for; tensorrt_rtx, for any GPU but Hopper's, without one"),
    ] = "onnx",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="folder; default: exports/NAME")] = None,
    bucket: Annotated[
        list[str] | None,
        typer.Option(
            help="BATCHxHEIGHTxWIDTH of a profile, LOW-HIGH for a range, +N for N references: 1x1024x1024, "
            "1-4x512x768+2; once for each",
        ),
    ] = None,
    dtype: DtypeOption = "bf16",
    sm: Annotated[
        int | None, typer.Option(help="tensorrt_rtx: compute capability, e.g. 89; default: this GPU's")
    ] = None,
    lora: Annotated[
        str, typer.Option(help="adapter to merge: a path, none, or auto: what the configuration's run has trained")
    ] = "auto",
    lora_rank: RankOption = None,
    max_sequence_length: LengthOption = None,
    only: Annotated[list[str] | None, typer.Option(help="just this module, e.g. transformer; once for each")] = None,
    compatibility: Annotated[
        str, typer.Option(help="tensorrt: none; same_compute_capability (H100 and H200); ampere_plus (slower)")
    ] = "none",
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="tensorrt: plans that later minor versions run (slower)")
    ] = False,
) -> None:
    """Export an editor's transformer, VAE and text encoders, or a DINO, to ONNX and TensorRT engines.

    The folder holds NAME.onnx, NAME.plan and manifest.json with ports, profiles, hashes and versions; mtedit-fast run
    edits with it, mtedit-fast check measures it. An engine serves the shapes of its buckets, so there must be at least
    one; guidance with a negative prompt doubles the rows of a batch.

    A trained LoRA is merged (--lora) or, with --lora-rank, given anew for each run at about 2·rank/width more
    arithmetic: no rebuild, no refit. An engine that is there already is kept if weights, LoRA mode, profiles, versions
    and device are the same, and replaced if not: a folder holds one per module. Built from an export, it has that one's
    buckets.

    Examples: mtedit-fast export training/configs/kontext_lora.yaml --to tensorrt --bucket 1x1024x1024
    mtedit-fast export training/configs/demo.yaml --to onnx --dtype fp32 --bucket 1-4x64x64
    """
    from mtedit_fast.export.backends import BACKENDS, load_backend
    from mtedit_fast.export.editors import export_editor
    from mtedit_fast.export.engine import build_engine
    from mtedit_fast.export.manifest import MANIFEST, Manifest
    from mtedit_fast.export.onnx import require_onnx
    from mtedit_fast.export.ports import Bucket
    from mtedit_fast.export.write import export_module

    console = Console()
    if to not in ("onnx", *BACKENDS):
        raise ValueError(f"to: expected onnx, {' or '.join(BACKENDS)}, got {to!r}")
    buckets = [Bucket.parse(text) for text in bucket or []]
    built_from = (Path(source) / MANIFEST).is_file()
    if built_from:
        if to == "onnx":
            raise ValueError(f"to: {source} is an export already; expected {' or '.join(BACKENDS)}, got 'onnx'")
        given = {"output": output, "bucket": bucket, "lora_rank": lora_rank, "max_sequence_length": max_sequence_length}
        given |= {"dtype": dtype != "bf16", "lora": lora != "auto"}
        if fixed := [name for name, value in given.items() if value]:
            raise ValueError(
                f"{', '.join(fixed)}: expected none for {source}, which is an export with all of that in its manifest; "
                "export the model again to change it"
            )
    if to != "onnx":
        load_backend(to).target(sm)  # before the work, not after it
        if not buckets and not built_from:
            raise ValueError(f"bucket: expected at least one for --to {to}, got none; e.g. --bucket 1x1024x1024")
    if built_from:
        folder = Path(source)
    else:
        require_onnx()
        folder = output or Path("exports") / Path(source).name.removesuffix(".yaml").removesuffix(".yml")
        loaded = _load(source, dtype, lora, lora_rank, max_sequence_length, console)

        def announce(name: str) -> None:
            console.print(f"{name} → {folder / name}.onnx", highlight=False)

        if loaded.pipeline is None:
            for name, exported in loaded.modules.items():
                announce(name)
                export_module(folder, name, exported, buckets=buckets)
        else:
            export_editor(
                folder,
                loaded.pipeline,
                modules=loaded.modules,
                buckets=buckets,
                merged=loaded.merged is not None,
                only=only,
                on_module=announce,
                **loaded.options,
            )
    if to != "onnx":
        for name in only or Manifest.read(folder).modules:
            engine = build_engine(
                folder,
                name,
                backend=to,
                sm=sm,
                compatibility=compatibility,
                version_compatible=version_compatible,
                console=console,
            )
            console.print(f"{name} → {folder / engine.file.name}, SM{engine.sm}, {engine.file.bytes:,} bytes")
    console.print(f"export: {folder}", highlight=False)


def run(
    directory: Annotated[Path, typer.Argument(help="of mtedit-fast export")],
    image: Annotated[Path, typer.Option(help="the image to edit")],
    instruction: Annotated[list[str], typer.Option(help="one turn; several are carried out one after the other")],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder for turn_1.png, turn_2.png …")] = Path("edits"),
    steps: Annotated[int, typer.Option(min=1, help="denoising steps per turn")] = 28,
    guidance: Annotated[float, typer.Option(help="guidance scale")] = 3.5,
    seed: Annotated[int, typer.Option(help="of the noise")] = 0,
    lora: Annotated[
        Path | None, typer.Option(help="adapter for an export with --lora-rank: a folder or safetensors file")
    ] = None,
    runtime: Annotated[str, typer.Option(help="onnx (CPU), tensorrt (the engines), or auto")] = "auto",
    device: Annotated[str, typer.Option(help="of the engines: cuda, cuda:1 …")] = "cuda",
) -> None:
    """Edit an image over one or several turns with an exported editor.

    Each instruction edits what the one before it made. An image of a size that no profile covers is resized to the
    profile nearest in shape.

    Example: mtedit-fast run exports/kontext_lora --image a.png --instruction "Remove the cup"
    """
    from mtedit_fast.edival.images import load_image, save_image
    from mtedit_fast.export.lora import read_lora
    from mtedit_fast.export.pipeline import EnginePipeline
    from mtedit_fast.inference_time.edit import check_words

    console = Console()
    picture = load_image(image)
    pipeline = EnginePipeline(directory, runtime=runtime, device=device)  # type: ignore[arg-type]
    check_words(pipeline.editor, instruction)
    if lora is not None:
        pipeline.set_lora(*read_lora(lora))
    fitted = pipeline.fit(picture)
    if fitted.shape != picture.shape:
        console.print(f"resized {_size(picture)} → {_size(fitted)}", highlight=False)
    output.mkdir(parents=True, exist_ok=True)
    with console.status(f"{len(instruction)} turns of {steps} steps"):
        edits = pipeline(fitted, instruction, num_steps=steps, guidance_scale=guidance, seed=seed)
    for turn, edit in enumerate(edits, 1):
        save_image(edit, output / f"turn_{turn}.png")
        console.print(f"{instruction[turn - 1]} → {output / f'turn_{turn}.png'}", markup=False, highlight=False)


def _size(image: Any) -> str:
    return f"{image.shape[1]}×{image.shape[2]}"


def check(
    directory: Annotated[Path, typer.Argument(help="of mtedit-fast export")],
    source: Annotated[
        str | None, typer.Option(help="what was exported, to compare with torch: the SOURCE given to export")
    ] = None,
    dtype: DtypeOption = "bf16",
    lora: Annotated[str, typer.Option(help="as given to export")] = "auto",
    lora_rank: RankOption = None,
    max_sequence_length: LengthOption = None,
    repeats: Annotated[int, typer.Option(min=1, help="timed runs of each")] = 20,
    seed: Annotated[int, typer.Option(help="of the random inputs")] = 0,
    device: Annotated[str, typer.Option(help="of engines and torch, where there is a GPU")] = "cuda",
) -> None:
    """Compare an export's engines, its ONNX graphs and torch on the same inputs: largest error, latency percentiles.

    Errors are relative to the largest value of the first that could run: torch with --source, else onnxruntime. What
    cannot run here is listed with the reason.
    """
    from mtedit_fast.export.compare import compare, table

    console = Console()
    modules = None
    if source is not None:
        modules = _load(source, dtype, lora, lora_rank, max_sequence_length, console).modules
    console.print(table(compare(directory, modules, repeats=repeats, seed=seed, device=device)))


def _load(
    source: str, dtype: str, lora: str, lora_rank: int | None, max_sequence_length: int | None, console: Console
) -> Source:
    from mtedit_fast.cli_pipelines import load_source

    loaded = load_source(source, dtype=dtype, lora=lora, lora_rank=lora_rank, max_sequence_length=max_sequence_length)
    if loaded.merged is not None:
        console.print(f"merged {loaded.merged}", highlight=False)
    return loaded


def add_commands(app: typer.Typer) -> None:
    """Register `export`, `run` and `check`."""
    for command in (export, run, check):
        app.command()(command)


export_app = typer.Typer(no_args_is_help=True, help="ONNX and TensorRT engines of trained editors.")
add_commands(export_app)
