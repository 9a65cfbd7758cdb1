"""`mtedit-fast edit`: one or several turns with a pipeline, plainly or with one of the inference-time methods."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mtedit_fast.editors import Editor


def edit(
    model: Annotated[str, typer.Argument(help="pipeline's folder or hub name, or 'playground'")],
    image: Annotated[Path, typer.Argument(help="the image to edit")],
    instruction: Annotated[list[str], typer.Argument(help="one turn each; every turn edits what the one before made")],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder for turn-1.png … and strip.png")] = Path(
        "edits"
    ),
    steps: Annotated[
        int | None, typer.Option(min=1, help="denoising steps per turn; default: 28, playground 6", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="of the noise")] = 0,
    guidance: Annotated[
        float | None, typer.Option(help="guidance scale; default: 3.5, playground 2.5", show_default=False)
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="HEIGHTxWIDTH to edit at; default: the image's, rounded", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …; auto takes a GPU")] = "auto",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16; auto is bf16 on a GPU, fp32 elsewhere")] = "auto",
    lora: Annotated[
        Path | None, typer.Option(help="adapter to merge: a folder or safetensors file", show_default=False)
    ] = None,
    keep_mask: Annotated[
        list[Path] | None,
        typer.Option(
            help="PNG as large as IMAGE: white pixels stay as the turn finds them; one for all turns, or one per turn",
            show_default=False,
        ),
    ] = None,
    align: Annotated[
        list[str] | None,
        typer.Option(
            help="NOUN:MODIFIER,MODIFIER of an object as the instructions name it, any number of times; 'auto' asks "
            "spaCy",
            show_default=False,
        ),
    ] = None,
    align_scale: Annotated[
        float, typer.Option(help="step size of --align; 0 is the plain edit, 20 the paper's for Stable Diffusion")
    ] = 3.0,
    beam: Annotated[
        int | None, typer.Option(min=1, help="keep this many chains of the highest reward", show_default=False)
    ] = None,
    branching: Annotated[
        int, typer.Option(min=1, help="--beam: draws that each chain is continued by; 1 is best of WIDTH")
    ] = 2,
    lookahead: Annotated[int, typer.Option(min=0, help="--beam: steps from a candidate to the image judged")] = 0,
    reward: Annotated[
        str | None,
        typer.Option(
            help="--beam: MODULE:FUNCTION as training takes it, or a judge's folder or hub name; default: the "
            "playground's judge",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Edit an image over one or several turns; write each turn and a strip of all.

    Without changing the weights, one of these can be asked for: --keep-mask leaves what the mask shows as it was;
    --align ties objects to the words that describe them; --beam searches the noise for edits of a higher reward, at
    about WIDTH times the cost of a plain edit and more with --branching and --lookahead.

    Examples:

    mtedit-fast edit black-forest-labs/FLUX.1-Kontext-dev cat.png "Remove the cup" "Make it dusk"

    mtedit-fast edit playground scene.png "Change the background to ocean" --beam 2 -o runs/edit
    """
    from mtedit_fast.cli_pipelines import load_editor
    from mtedit_fast.edival.images import load_image, save_image
    from mtedit_fast.inference_time.edit import check_words, fit, parse_size, strip
    from mtedit_fast.rollout import sample_seeds

    asked = [name for name, value in (("keep-mask", keep_mask), ("align", align), ("beam", beam)) if value]
    if len(asked) > 1:
        raise ValueError(f"expected at most one of --keep-mask, --align and --beam, got --{' and --'.join(asked)}")
    if reward is not None and beam is None:
        raise ValueError("reward: expected --beam with it, which is what it chooses by; add --beam WIDTH")
    console, wanted = Console(), parse_size(size) if size else None
    picture = load_image(image)
    masks = _masks(keep_mask, picture, len(instruction)) if keep_mask else []
    editor, defaults = load_editor(model, lora=lora, dtype=dtype, device=device)
    check_words(editor, instruction)
    start = fit(editor, picture, wanted or defaults["size"])
    if start.shape != picture.shape:
        console.print(f"resized {_size(picture)} → {_size(start)}", highlight=False)
    options = {
        "num_steps": defaults["num_steps"] if steps is None else steps,
        "guidance_scale": defaults["guidance_scale"] if guidance is None else guidance,
    }
    seeds = sample_seeds(seed, 0, 1, editor.device)
    images = start[None].to(editor.device)
    output.mkdir(parents=True, exist_ok=True)
    with console.status(f"{len(instruction)} turns of {options['num_steps']} steps"):
        if beam is not None:
            score = _reward(reward, model, editor.device)
            edits, said = _searched(editor, images, instruction, seeds, score, (beam, branching, lookahead), **options)
            console.print(said, highlight=False)
        else:
            edits = _edits(editor, images, instruction, seeds, masks, align, align_scale, options)
    for turn, (text, made) in enumerate(zip(instruction, edits, strict=True), 1):
        save_image(made, output / f"turn-{turn}.png")
        console.print(f"{text} → {output / f'turn-{turn}.png'}", markup=False, highlight=False)
    strip([start, *edits], ["original", *instruction]).save(output / "strip.png")
    console.print(f"strip → {output / 'strip.png'}", markup=False, highlight=False)


def _size(image: Tensor) -> str:
    return f"{image.shape[1]}×{image.shape[2]}"


def _edits(
    editor: Editor,
    images: Tensor,
    instructions: list[str],
    seeds: Tensor,
    masks: list[Tensor],
    align: list[str] | None,
    scale: float,
    options: dict[str, Any],
) -> Tensor:
    """[K, 3, H, W]: plain, with masks or aligned."""
    from mtedit_fast.inference_time.edit import edit_turns, plain_edits

    if masks:
        from mtedit_fast.inference_time.keep_mask import keep_mask_edit

        fitted = [_fit_mask(mask, images) for mask in masks]
        return edit_turns(
            images,
            instructions,
            seeds,
            lambda found, text, turn, keys: keep_mask_edit(
                editor, found, [text], fitted[turn % len(fitted)], seeds=keys, **options
            ),
        )[0]
    if align:
        from mtedit_fast.inference_time.align import align_edit

        phrases = _phrases(align, instructions)

        def aligned(found: Tensor, text: str, turn: int, keys: Tensor) -> Tensor:
            if not phrases[turn]:
                return plain_edits(editor, found, [[text]], keys, **options)[:, 0]
            return align_edit(editor, found, [text], [phrases[turn]], seeds=keys, scale=scale, **options)

        return edit_turns(images, instructions, seeds, aligned)[0]
    return plain_edits(editor, images, [instructions], seeds, **options)[0]


def _searched(
    editor: Editor,
    images: Tensor,
    instructions: list[str],
    seeds: Tensor,
    reward: Callable[[Any], Any],
    widths: tuple[int, int, int],
    **options: Any,
) -> tuple[Tensor, str]:
    """[K, 3, H, W] of the best chain, and what the search found."""
    from mtedit_fast.inference_time.beam_search import beam_search, default_branches

    width, branching, lookahead = widths
    sampler: dict[str, Any] = {"variant": "ode", "branch_at": (0,)}  # whole chains, each from noise of its own
    if options["num_steps"] > 1 and branching > 1:
        numbers = default_branches(options["num_steps"])
        sampler = {"branch_at": numbers, "window": (numbers[0] - 1, numbers[-1])}  # elsewhere the plain edit's ODE
    found = beam_search(
        editor,
        images,
        [instructions],
        reward,
        width=width,
        branching=branching,
        lookahead=lookahead,
        seeds=seeds,
        **sampler,
        **options,
    )
    scores = ", ".join(f"{value:.3g}" for value in found.scores[0].mean(1).tolist())
    plain = options["num_steps"] * len(instructions)
    said = f"rewards of {width} chains: {scores}; {found.cost.rows} transformer rows in {found.cost.calls} calls "
    return found.best[0], said + f"(a plain edit: {plain} calls), {found.cost.scored} images scored"


def _masks(files: list[Path], picture: Tensor, turns: int) -> list[Tensor]:
    """[H, W] bool of every file."""
    from mtedit_fast.edival.images import load_image

    if len(files) not in (1, turns):
        raise ValueError(f"keep_mask: expected 1 file, or {turns}, one per turn, got {len(files)}")
    masks = []
    for file in files:
        mask = load_image(file)
        if mask.shape != picture.shape:
            raise ValueError(
                f"keep_mask: expected a mask as large as the image, {_size(picture)}, got {_size(mask)} in {file}"
            )
        masks.append(mask.mean(0) >= 0.5)
    return masks


def _fit_mask(mask: Tensor, images: Tensor) -> Tensor:
    """[1, 1, H, W] bool at the size of `images`: kept where every pixel beneath is."""
    import torch.nn.functional as F

    changed = (~mask)[None, None].float().to(images.device)
    return F.interpolate(changed, images.shape[-2:], mode="area") == 0


def _phrases(texts: list[str], instructions: list[str]) -> list[list[Any]]:
    """The phrases of every instruction, each in those that hold its words."""
    from mtedit_fast.inference_time.phrases import Phrase, find_phrases, locate

    if texts == ["auto"]:
        return find_phrases(instructions)
    found: list[list[Any]] = [[] for _ in instructions]
    for text in texts:
        phrase, reasons = Phrase.parse(text), []
        for phrases, instruction in zip(found, instructions, strict=True):
            try:
                locate(instruction, [phrase])
            except ValueError as error:
                reasons.append(str(error))
            else:
                phrases.append(phrase)
        if len(reasons) == len(instructions):
            raise ValueError(f"align: {text!r} fits none of the instructions: {reasons[0]}")
    return found


def _reward(path: str | None, model: str, device: torch.device) -> Callable[[Any], Any]:
    """A reward by its import path, or a judge."""
    from mtedit_fast.training.rewards import load_reward

    if path is None:
        if model != "playground":
            raise ValueError(
                "reward: expected MODULE:FUNCTION or a judge's folder or hub name for --beam, got none; only the "
                "playground has one of its own"
            )
        path = "mtedit_fast.training.playground.rewards:judge_score"
    if ":" in path and not Path(path).exists():
        return load_reward(path)
    if path.startswith((".", "/", "~")) and not Path(path).expanduser().is_dir():
        raise ValueError(f"reward: no judge's folder at {path}; pass one, a hub name, or MODULE:FUNCTION")
    from mtedit_fast.judge import HuggingFaceJudge, JudgePrompt
    from mtedit_fast.training.judge.parts import load_prompt

    judge = HuggingFaceJudge.from_pretrained(
        str(Path(path).expanduser()) if path.startswith("~") else path,
        prompt=load_prompt(str(Path(path).expanduser())) or JudgePrompt(),
        dtype="float32" if device.type == "cpu" else "auto",
        device=device,
    )
    return lambda candidates: judge.score(candidates.references, candidates.edits, candidates.instructions).score
