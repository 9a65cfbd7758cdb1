"""Makes the playground's weights, `mtedit-fast playground build`: VAE, editor, DINO, judge, prior, each resumable."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from rich.console import Console

from mtedit_fast.onestep import load_denoiser, save_denoiser
from mtedit_fast.training.judge.parts import Parts, save_judge
from mtedit_fast.training.onestep.config import load_onestep_config
from mtedit_fast.training.onestep.run import train_teacher

from .dino import train_dino
from .editor import load_or_encode, train_editor
from .evaluate import success
from .judge import train_judge
from .judge_data import load_or_make
from .judge_model import IMAGES, PLAYGROUND_PROMPT, new_judge_model, new_judge_tokenizer
from .models import WEIGHTS, new_dino, new_pipeline, new_vae
from .vae import measure_latents, train_vae

STAGES = ("vae", "editor", "dino", "judge", "prior")
PRIOR = Path(__file__).resolve().parents[1] / "configs" / "rsd_clean.yaml"


@dataclass(frozen=True)
class Recipe:
    """Sizes of a build. `editor_steps` sets how good the base is: the committed one leaves room for RL."""

    vae_steps: int = 600
    chains: int = 12_000
    editor_steps: int = 1000
    editor_batch: int = 64
    dino_steps: int = 400
    judge_steps: int = 2400
    judge_batch: int = 48
    judge_chains: tuple[int, int] = (5000, 6000)  # edited by the editor, drawn with mistakes
    prior_steps: int = 2400
    save_every: int = 50
    evaluate_chains: int = 400


def build(
    out_dir: str | Path = WEIGHTS,
    seed: int = 0,
    stages: Sequence[str] = STAGES,
    resume: bool = True,
    *,
    work_dir: str | Path = "runs/playground",
    recipe: Recipe | None = None,
) -> Path:
    """Trains the playground's models and saves them in bf16 to out_dir/pipeline, out_dir/dino, out_dir/judge,
    out_dir/rsd/clean.

    stages: which of vae, editor, dino, judge, prior to run; the editor needs the VAE of an earlier call with the same
    work_dir, the judge the editor in out_dir.
    work_dir: checkpoints and encoded triples; a build that was killed goes on from there, with the results of an
    uninterrupted one, unless `resume` is off. Raises ValueError on an unknown stage, FileNotFoundError when the
    editor's VAE is missing.
    """
    recipe = recipe or Recipe()
    out_dir, work_dir = Path(out_dir), Path(work_dir)
    for stage in stages:
        if stage not in STAGES:
            raise ValueError(f"stages must be among {', '.join(STAGES)}, got {stage!r}")
    console = Console()
    if "vae" in stages:
        torch.manual_seed(seed)
        vae = new_vae()
        train_vae(
            vae,
            steps=recipe.vae_steps,
            checkpoint=work_dir / "vae.pt",
            seed=3 * seed,
            save_every=recipe.save_every,
            resume=resume,
        )
        # everything later sees the weights as they are stored
        vae.to(torch.bfloat16).to(torch.float32)
        measure_latents(vae, seed)
        vae.save_pretrained(work_dir / "vae")
    if "editor" in stages:
        if not (work_dir / "vae").is_dir():
            raise FileNotFoundError(f"no VAE at {work_dir / 'vae'}: run the vae stage first, with the same work_dir")
        torch.manual_seed(seed + 1)
        pipeline = new_pipeline(AutoencoderKL.from_pretrained(str(work_dir / "vae")).eval())
        pipeline.vae.requires_grad_(False)
        train_editor(
            pipeline,
            load_or_encode(pipeline, recipe.chains, seed, work_dir / "triples.pt", resume),
            steps=recipe.editor_steps,
            batch=recipe.editor_batch,
            checkpoint=work_dir / "editor.pt",
            seed=3 * seed + 1,
            save_every=recipe.save_every,
            resume=resume,
        )
        save_pipeline(pipeline, out_dir / "pipeline")
        if recipe.evaluate_chains:
            pipeline.set_progress_bar_config(disable=True)
            measured = success(pipeline, recipe.evaluate_chains)._asdict()
            console.print(measured)
            (out_dir / "success.json").write_text(json.dumps(measured, indent=1) + "\n")
    if "dino" in stages:
        torch.manual_seed(seed + 2)
        dino = new_dino()
        train_dino(
            dino,
            steps=recipe.dino_steps,
            checkpoint=work_dir / "dino.pt",
            seed=3 * seed + 2,
            save_every=recipe.save_every,
            resume=resume,
        )
        dino.to(torch.bfloat16).save_pretrained(out_dir / "dino")
    if "judge" in stages:
        tokenizer = new_judge_tokenizer()
        judge = new_judge_model(seed + 3, tokenizer)
        edited, misdone = recipe.judge_chains
        graded = load_or_make(
            work_dir / "judge_edits.pt", seed, edited, misdone, editor=out_dir / "pipeline", resume=resume
        )
        train_judge(
            judge,
            tokenizer,
            graded,
            steps=recipe.judge_steps,
            batch=recipe.judge_batch,
            checkpoint=work_dir / "judge.pt",
            seed=3 * seed + 3,
            save_every=recipe.save_every,
            resume=resume,
        )
        save_judge(out_dir / "judge", Parts(judge.to(torch.bfloat16), tokenizer, IMAGES), PLAYGROUND_PROMPT)
    if "prior" in stages:
        folder = work_dir / "prior"
        if not resume:
            shutil.rmtree(folder, ignore_errors=True)
        settings = [f"run.output_dir={folder}", f"run.seed={seed}", f"teacher.steps={recipe.prior_steps}"]
        trained = train_teacher(load_onestep_config(PRIOR, settings), console)
        save_denoiser(out_dir / "rsd" / "clean" / "teacher", *load_denoiser(trained, dtype=torch.bfloat16))
    return out_dir


def save_pipeline(pipeline: Any, folder: Path) -> None:
    """Rounds all weights to bf16, in place, and saves them; the pipeline itself stays fp32.

    The text encoders' files hold the rounded weights in fp32: without a dtype, `from_pretrained` opens diffusers'
    models in fp32 but transformers' in the dtype of their files, and the two must agree.
    """
    pipeline.to(torch.bfloat16).to(torch.float32)
    pipeline.transformer.to(torch.bfloat16)
    pipeline.vae.to(torch.bfloat16)
    pipeline.save_pretrained(folder)
    pipeline.to(torch.float32)
    for path in folder.rglob("*.json"):  # diffusers notes where a part was once loaded from
        content = json.loads(path.read_text())
        if content.pop("_name_or_path", None):
            path.write_text(json.dumps(content, indent=2) + "\n")
