"""`mtedit-fast evaluate` and `mtedit-fast edival …`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mtedit_fast.cli_models import existing, load_consistency, load_instructor, load_models, load_quality, vlm_errors

if TYPE_CHECKING:
    from mtedit_fast.edival.objects import SceneObject

edival_app = typer.Typer(
    no_args_is_help=True,
    help="EdiVal: objects, instructions and evaluation of multi-turn edits. Start with `mtedit-fast edival demo`.",
)

DETECTOR, DINO = "IDEA-Research/grounding-dino-tiny", "facebook/dinov3-vitb16-pretrain-lvd1689m"
DetectorOption = Annotated[
    str, typer.Option(help="Grounding DINO or MM-Grounding-DINO: hub name or folder", metavar="HUB_OR_PATH")
]
DinoOption = Annotated[str, typer.Option(help="DINOv3 or DINOv2; 'none' leaves CC and O out", metavar="HUB_OR_PATH")]
VLMOption = Annotated[
    str | None,
    typer.Option(help="OpenAI-compatible server up to its version, e.g. http://localhost:8000/v1", metavar="URL"),
]
VLMModelOption = Annotated[str, typer.Option(help="the model's name on that server")]
KeyOption = Annotated[str | None, typer.Option(envvar="MTEDIT_VLM_API_KEY", help="sent as a bearer token")]
DeviceOption = Annotated[str, typer.Option(help="for detector and DINO: cpu, cuda, cuda:1 …; auto takes a GPU")]
PlaygroundOption = Annotated[bool, typer.Option("--playground", help="the tiny world's exact oracle for all models")]

QWEN = "Qwen/Qwen2-VL-7B-Instruct"


def evaluate(
    images: Annotated[Path, typer.Option(help="folder of {image_index}_{turn}.png, turn 0 being the start")],
    bench: Annotated[Path, typer.Option(help="CSV of EdiVal-Bench's format, e.g. from `mtedit-fast edival instruct`")],
    output: Annotated[Path, typer.Option(help="folder for report.html, report.json and verdicts.jsonl")],
    detector: DetectorOption = DETECTOR,
    vlm: VLMOption = None,
    vlm_model: VLMModelOption = QWEN,
    vlm_api_key: KeyOption = None,
    dino: Annotated[
        str, typer.Option(help="DINOv3 or DINOv2; 'none' leaves CC and O out", metavar="HUB_OR_PATH")
    ] = DINO,
    quality: Annotated[
        str | None,
        typer.Option(help="module:factory of a scorer with score(images, instructions) -> [B], for VQ, e.g. HPSv3"),
    ] = None,
    playground: PlaygroundOption = False,
    size: Annotated[int, typer.Option(help="side in pixels that images are resized to; 0 leaves them")] = 512,
    replace: Annotated[str, typer.Option(help="replacements by the public 'code' or by the 'paper'")] = "code",
    attributes: Annotated[str, typer.Option(help="colour and material on 'crops' or 'whole' images")] = "crops",
    registers: Annotated[str, typer.Option(help="'drop', or 'edival_compat' for the public code's numbers")] = "drop",
    device: DeviceOption = "auto",
) -> None:
    """Evaluate multi-turn edits by EdiVal: instruction following, content consistency, and O = √(IF · CC).

    Images of a chain are {image_index}_0.png (the start), {image_index}_1.png … (after each turn), or the public
    benchmark's {image_index}_input_raw.png and {image_index}_input_raw_turn_1.png …; .jpg and .webp, too. What is
    missing or broken is skipped and named in the report. Stopped and called again, an evaluation goes on.

    Nothing to download: mtedit-fast edival demo, then mtedit-fast evaluate --playground --images runs/edival/images
    --bench runs/edival/bench.csv --output runs/again. On your own images: serve a VLM (vllm serve
    Qwen/Qwen2-VL-7B-Instruct) and pass --vlm http://localhost:8000/v1.
    """
    from mtedit_fast.edival.benchmark import read_benchmark
    from mtedit_fast.edival.checks import CheckConfig
    from mtedit_fast.edival.evaluate import EvaluationConfig
    from mtedit_fast.edival.evaluate import evaluate as run
    from mtedit_fast.edival.images import ImageFolder

    console = Console()
    config = EvaluationConfig(checks=CheckConfig(replace=replace, attributes=attributes))  # type: ignore[arg-type]
    rows, errors = read_benchmark(existing(bench, "bench"))
    folder = ImageFolder(images, size=None if playground or size == 0 else size)
    found, asked = load_models(playground, detector, vlm, vlm_model, vlm_api_key, device)
    with vlm_errors():
        report = run(
            rows,
            folder,
            detector=found,
            vlm=asked,
            consistency=None if dino == "none" else load_consistency(playground, dino, registers, device),
            quality=None if quality is None else load_quality(quality),
            config=config,
            output=output,
            errors=errors,
            console=console,
        )
    print_report(console, report, output)


@edival_app.command("decompose")
def decompose_command(
    images: Annotated[Path, typer.Argument(help="folder of images; of edited chains only the starts")],
    output: Annotated[Path, typer.Option(help="JSONL, a line of objects per image")],
    detector: DetectorOption = DETECTOR,
    vlm: VLMOption = None,
    vlm_model: VLMModelOption = QWEN,
    vlm_api_key: KeyOption = None,
    playground: PlaygroundOption = False,
    size: Annotated[int, typer.Option(help="side in pixels that images are resized to; 0 leaves them")] = 512,
    device: DeviceOption = "auto",
) -> None:
    """List the objects of images: a VLM names them, a detector must find each.

    A line: {"image_index": "17", "image": "17_0.png", "objects": [{"key": "wood brown chair", "boxes": …}]}. Images
    that are in OUTPUT already are left out, so that a stopped run goes on. Answers that cannot be read are counted.
    """
    from mtedit_fast.edival.decompose import decompose
    from mtedit_fast.edival.images import UnreadableImage, load_image, start_images

    console = Console()
    files = start_images(images)
    found, asked = load_models(playground, detector, vlm, vlm_model, vlm_api_key, device)
    done = {line["image_index"] for line in _read_lines(output)} if output.is_file() else set()
    waiting = [index for index in files if index not in done]
    output.parent.mkdir(parents=True, exist_ok=True)
    skipped: dict[str, str] = {}
    with output.open("a", encoding="utf-8") as file:
        for start in range(0, len(waiting), 16):
            loaded = {}
            for index in waiting[start : start + 16]:
                try:
                    loaded[index] = load_image(files[index], None if playground or size == 0 else size)
                except UnreadableImage as error:
                    skipped[index] = str(error)
            with vlm_errors():
                scenes, failures, _ = decompose(list(loaded.values()), asked, found)
            skipped |= {list(loaded)[i]: reason for i, reason in failures}
            for index, scene in zip(loaded, scenes, strict=True):
                if index not in skipped:
                    image = os.path.relpath(files[index], output.parent)
                    line = {"image_index": index, "image": image, "objects": [asdict(o) for o in scene.values()]}
                    file.write(json.dumps(line) + "\n")
            file.flush()
            console.print(f"{min(start + 16, len(waiting))}/{len(waiting)} images")
    for index, reason in skipped.items():
        console.print(f"skipped {index}: {reason}", markup=False)
    console.print(f"{len(done) + len(waiting) - len(skipped)} images in {output}, {len(skipped)} skipped")


@edival_app.command("instruct")
def instruct_command(
    objects: Annotated[Path, typer.Argument(help="JSONL from `mtedit-fast edival decompose`")],
    output: Annotated[
        Path, typer.Option(help="a .csv in EdiVal-Bench's format, or a .jsonl that `mtedit-fast train` reads")
    ],
    turns: Annotated[int, typer.Option(help="instructions per image")] = 3,
    seed: Annotated[int, typer.Option(help="of the drawn chains")] = 0,
    values: Annotated[
        Path | None,
        typer.Option(help="JSON of lists: objects, materials, texts, backgrounds, colors, counts; default: built in"),
    ] = None,
    vlm: VLMOption = None,
    vlm_model: VLMModelOption = QWEN,
    vlm_api_key: KeyOption = None,
    playground: PlaygroundOption = False,
) -> None:
    """Draw chains of EdiVal's nine instruction types for decomposed images.

    Every turn draws a type not yet used; what cannot be done becomes an addition. New objects, colours, materials,
    texts and backgrounds come from lists, or with --vlm from a model that sees the image, and from the lists where its
    answer does not serve. An image without objects is left out. A .jsonl is the data of a training: its lines also say
    what every turn is to keep, which the reward mtedit_fast.training.consistency_reward:content_consistency reads.
    """
    from mtedit_fast.edival.benchmark import BenchmarkRow, write_benchmark, write_chains

    if output.suffix not in (".csv", ".jsonl"):
        raise ValueError(f"output: expected a name ending in .csv or .jsonl, got {output}")

    console = Console()
    chain_of = load_instructor(playground, values, vlm, vlm_model, vlm_api_key)
    rows, skipped, files = [], [], {}
    with vlm_errors():
        for line in _read_lines(objects):
            files[line["image_index"]] = file = objects.parent / line["image"]
            scene = {o.key: o for o in map(_scene_object, line["objects"])}
            rng = Random(f"{seed}/{line['image_index']}")
            try:
                if not scene:
                    raise ValueError("no objects")
                chain = chain_of(file, scene, turns, rng)
                rows.append(BenchmarkRow.of(line["image_index"], chain))
            except ValueError as error:
                skipped.append(f"skipped {line['image_index']}: {error}")
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix == ".csv":
        write_benchmark(output, rows)
    else:
        write_chains(output, rows, files)
    for note in skipped:
        console.print(note, markup=False)
    console.print(f"{len(rows)} images with {turns} turns each in {output}, {len(skipped)} skipped")


@edival_app.command("demo")
def demo_command(
    output: Annotated[Path, typer.Option(help="folder for images, bench.csv, report.json and report.html")] = Path(
        "runs/edival"
    ),
    chains: Annotated[int, typer.Option(help="how many scenes")] = 200,
    turns: Annotated[int, typer.Option(help="edits of each")] = 3,
    seed: Annotated[int, typer.Option(help="of scenes, instructions and noise")] = 0,
) -> None:
    """Decompose, instruct, edit and evaluate in the playground: a minute on two CPU cores, nothing to download."""
    from mtedit_fast.training.playground.edival_demo import run_edival

    console = Console()
    print_report(console, run_edival(output, chains=chains, turns=turns, seed=seed, console=console), output)


@edival_app.command("leaderboard")
def leaderboard_command(
    runs: Annotated[list[Path], typer.Argument(help="output folders of `mtedit-fast evaluate`")],
    output: Annotated[Path, typer.Option(help="HTML page")] = Path("leaderboard.html"),
    turn: Annotated[int, typer.Option(help="the turn that is compared; published rows are of turn 3")] = 3,
) -> None:
    """Compare evaluated folders by O, IF, CC and VQ, with Pareto plots.

    Published figures stand beside runs on EdiVal-Bench at turn 3.
    """
    from mtedit_fast.edival.report import leaderboard, write_leaderboard

    console, table = Console(), Table("editor", "O", "IF", "CC", "VQ")
    for row in leaderboard(runs, turn=turn):
        name = f"{row['name']} (published)" if row["published"] else f"[bold]{row['name']}[/]"
        table.add_row(name, *(f"{row[m]:.2f}" if m in row else "" for m in ("O", "IF", "CC", "VQ")))
    console.print(table)
    console.print(f"leaderboard: {write_leaderboard(runs, output, turn=turn)}")


def print_report(console: Console, report: Mapping[str, Any], output: Path) -> None:
    """The figures of a report as a table, and where the rest is."""
    from mtedit_fast.edival.report import METRICS

    table = Table("per cent", *(f"turn {line['turn']}" for line in report["per_turn"]))
    for key, label in METRICS.items():
        values = [line[key] for line in report["per_turn"]]
        if any(values):
            scale = 1 if key == "quality" else 100
            table.add_row(label, *(f"{scale * value['mean']:.1f}" if value else "–" for value in values))
    if strict := report.get("oracle"):
        table.add_row("nothing else touched (oracle)", *(f"{100 * value:.1f}" for value in strict))
    console.print(table)
    undefined = report["undefined"]["verdicts"]
    console.print(f"{report['chains']} chains, {len(report['skipped'])} skipped, {undefined} verdicts undefined")
    console.print(f"report: {output / 'report.html'}")


def _scene_object(fields: dict[str, Any]) -> SceneObject:
    from mtedit_fast.edival.objects import SceneObject

    boxes = tuple((cx, cy, w, h) for cx, cy, w, h in fields["boxes"])
    return SceneObject(**{**fields, "boxes": boxes, "scores": tuple(fields["scores"])})


def _read_lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for number, text in enumerate(existing(path, "objects").read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
            for one in line["objects"]:
                _scene_object(one)
            lines.append({key: line[key] for key in ("image_index", "image", "objects")})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: not a line of `mtedit-fast edival decompose`: {error!r}") from None
    return lines
