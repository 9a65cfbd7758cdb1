"""The playground's committed weights, and the build that makes them."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxKontextPipeline
from safetensors.torch import load_file
from torch import nn

from mtedit_fast.onestep import load_denoiser
from mtedit_fast.training.playground import evaluate, models, oracle
from mtedit_fast.training.playground.build import Recipe, build
from mtedit_fast.training.playground.data import split_chains
from mtedit_fast.training.playground.editor import EditorLoss, encode_images, tokenize
from mtedit_fast.training.playground.fit import Muon, fit, generator_for, muon_and_adamw
from mtedit_fast.training.playground.world import CELLS, random_scenes, read, render

TINY = Recipe(
    vae_steps=3,
    chains=4,
    editor_steps=4,
    editor_batch=2,
    dino_steps=3,
    judge_steps=2,
    judge_batch=2,
    judge_chains=(2, 2),
    prior_steps=2,
    save_every=2,
    evaluate_chains=2,
)


@pytest.fixture(scope="module")
def pipeline() -> FluxKontextPipeline:
    return models.load_pipeline()


@pytest.fixture(scope="module")
def first_turns():
    chains = split_chains(64, seed=1, split="heldout")
    images = render(chains.scenes[:, 0, :CELLS], chains.scenes[:, 0, CELLS])
    return (images * 255).round() / 255, [texts[0] for texts in chains.instructions]


# --- committed weights


def test_committed_editor_edits_far_better_than_chance(pipeline, first_turns):
    references, texts = first_turns
    edits = evaluate.edit(pipeline, references, texts, seed=3)
    result = oracle.evaluate(references, edits[:, None], [[t] for t in texts])
    # a scene has at least 79^3 neighbours; an editor that does nothing has success 0
    assert result.marginal.float().mean() > 0.4
    assert result.cell_accuracy.mean() > 0.85
    assert torch.equal(edits, (edits * 255).round() / 255)


def test_measured_success_is_that_of_the_weights(pipeline):
    measured = evaluate.success(pipeline, 20, steps=4, seed=2)
    assert len(measured.image) == len(measured.marginal) == len(measured.cell_accuracy) == 3
    assert measured.image == sorted(measured.image, reverse=True)
    assert measured.image[0] == measured.marginal[0]
    assert all(0 <= v <= 1 for v in measured.types.values())
    assert measured.chains == 20


def test_vae_keeps_every_object(pipeline):
    scenes = random_scenes(32, generator_for(99, 0), share=0.3)
    with torch.no_grad():
        latents = pipeline.vae.encode(render(*scenes) * 2 - 1).latent_dist.mode()
        decoded = (pipeline.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    result = read((decoded * 255).round() / 255)
    assert (result.cells == scenes[0]).float().mean() > 0.99
    assert torch.equal(result.background, scenes[1])
    scaled = encode_images(pipeline.vae, render(*scenes))
    assert scaled.mean().abs() < 0.1
    assert abs(scaled.std() - 1) < 0.1


def test_text_goes_through_the_pipelines_own_path(pipeline, first_turns):
    texts = first_turns[1][:9]
    tokens = tokenize(pipeline, texts)
    with torch.no_grad():
        prompt, pooled, text_ids = pipeline.encode_prompt(texts, max_sequence_length=models.MAX_TOKENS)
        assert torch.equal(prompt, pipeline.text_encoder_2(tokens)[0])
        assert torch.equal(pooled, pipeline.text_encoder(tokens).pooler_output)
    assert torch.equal(text_ids, EditorLoss(pipeline).text_ids)
    words = "Change the color of rubber red circle to blue"
    swapped = "Change the color of rubber blue circle to red"
    one, other = (pipeline.encode_prompt([t], max_sequence_length=models.MAX_TOKENS)[0] for t in (words, swapped))
    assert not torch.allclose(one.mean(1), other.mean(1), atol=1e-2)  # order counts though Flux sees no positions


def test_training_velocity_is_the_pipelines(pipeline, first_turns):
    """One Euler step of the stock pipeline equals the step by the velocity that training fits."""
    references, texts = first_turns[0][:3], first_turns[1][:3]
    noise = torch.randn(3, CELLS, 64, generator=torch.Generator().manual_seed(0))
    arguments = dict(height=64, width=64, max_area=64**2, _auto_resize=False, max_sequence_length=models.MAX_TOKENS)
    stock = pipeline(
        image=references,
        prompt=texts,
        num_inference_steps=1,
        sigmas=[1.0],
        guidance_scale=models.GUIDANCE,
        latents=noise,
        output_type="latent",
        **arguments,
    ).images
    with torch.no_grad():
        velocity = EditorLoss(pipeline).velocity(
            noise, torch.ones(3), encode_images(pipeline.vae, references), tokenize(pipeline, texts)
        )
    assert torch.allclose(stock, noise - velocity, atol=1e-4)


def test_schedule_is_the_shift_of_training(pipeline):
    pipeline.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 6, 6), mu=np.log(models.SHIFT))
    plain = torch.linspace(1, 1 / 6, 6)
    expected = models.SHIFT * plain / (1 + (models.SHIFT - 1) * plain)
    assert torch.allclose(pipeline.scheduler.sigmas, torch.cat([expected, torch.zeros(1)]), atol=1e-6)
    shifts = [pipeline.scheduler.config[f"{end}_shift"] for end in ("base", "max")]
    assert shifts == pytest.approx([np.log(models.SHIFT)] * 2, rel=1e-12)


def test_stock_from_pretrained_runs_without_any_of_our_code(first_turns):
    """Without a dtype, every part opens in fp32."""
    stock = FluxKontextPipeline.from_pretrained(str(models.WEIGHTS / "pipeline"))
    stock.set_progress_bar_config(disable=True)
    assert {
        p.dtype
        for m in (stock.vae, stock.transformer, stock.text_encoder, stock.text_encoder_2)
        for p in m.parameters()
    } == {torch.float32}
    references, texts = first_turns
    ours = evaluate.edit(models.load_pipeline(), references[:4], texts[:4], steps=2)
    assert torch.equal(evaluate.edit(stock, references[:4], texts[:4], steps=2), ours)


def test_weights_are_small_and_name_no_machine():
    files = [p for p in models.WEIGHTS.rglob("*") if p.is_file()]
    sizes = {p.relative_to(models.WEIGHTS).as_posix(): p.stat().st_size for p in files}
    assert sum(sizes.values()) < 20 * 2**20
    one_step = {name: size for name, size in sizes.items() if name.startswith("rsd/") and "clean" not in name}
    assert 4e6 < sum(one_step.values()) <= 8e6
    assert not any("_name_or_path" in p.read_text() for p in files if p.suffix == ".json")


def test_dino_tells_objects_apart():
    dino = models.load_dino()
    assert not dino.training
    assert dino.config.patch_size == 8
    cells = torch.zeros(2, CELLS, dtype=torch.long)
    cells[:, 5] = torch.tensor([1, 60])
    images = render(cells, torch.zeros(2, dtype=torch.long))
    with torch.no_grad():
        tokens = dino(pixel_values=(images - 0.45) / 0.225).last_hidden_state[:, 1:].view(2, 8, 8, -1)
    similarity = torch.cosine_similarity(tokens[0], tokens[1], dim=-1)
    assert similarity[2:4, 2:4].max() < similarity[6:].min() - 0.1


@pytest.mark.parametrize("load", [models.load_pipeline, models.load_dino])
def test_missing_weights_say_where_and_what_to_do(load, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no playground weights at .*nowhere.*mtedit-fast playground build"):
        load(tmp_path / "nowhere")


# --- build


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{p.relative_to(folder)}:{k}": v for p in folder.rglob("*.safetensors") for k, v in load_file(p).items()}


CHILD = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from test_playground_build import TINY, build
build({out!r}, seed=5, work_dir={work!r}, recipe=TINY)
"""


def test_a_killed_build_resumes_to_the_same_weights(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        build(tmp_path / "whole", seed=5, work_dir=tmp_path / "work", recipe=TINY)
        out, work = tmp_path / "killed", tmp_path / "killed_work"
        code = CHILD.format(tests=str(Path(__file__).parent), out=str(out), work=str(work))
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (work / "editor.pt").exists() and child.poll() is None:
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert (work / "editor.pt").exists()
        build(out, seed=5, work_dir=work, recipe=TINY)
    finally:
        torch.set_num_threads(threads)
    whole, killed = tensors(tmp_path / "whole"), tensors(out)
    assert whole.keys() == killed.keys()
    assert len(whole) > 300
    assert all(torch.equal(whole[k], killed[k]) for k in whole)
    assert {v.dtype for k, v in whole.items() if "text_encoder" not in k} == {torch.bfloat16}
    assert not list(out.rglob("*.partial"))
    assert (out / "success.json").is_file()
    assert str(tmp_path) not in (out / "pipeline" / "model_index.json").read_text()


def test_a_prior_goes_on_and_is_saved_in_bf16(tmp_path):
    folder = build(tmp_path / "a", stages=("prior",), work_dir=tmp_path / "work", recipe=TINY) / "rsd/clean/teacher"
    once = load_denoiser(folder, dtype=torch.bfloat16)
    assert once.card["steps"] == 2
    assert not once.corruption.random
    again = build(tmp_path / "b", stages=("prior",), work_dir=tmp_path / "work", recipe=TINY) / "rsd/clean/teacher"
    anew = build(tmp_path / "c", 1, ("prior",), False, work_dir=tmp_path / "work", recipe=TINY) / "rsd/clean/teacher"
    for path, same in ((again, True), (anew, False)):
        other = load_denoiser(path, dtype=torch.bfloat16).denoiser.state_dict()
        assert all(value.equal(other[name]) for name, value in once.denoiser.state_dict().items()) == same
    made, committed = (
        json.loads((path / "config.json").read_text()) for path in (folder, models.WEIGHTS / "rsd/clean/teacher")
    )
    assert made.pop("_diffusers_version")
    assert made.items() <= committed.items()
    assert committed.keys() - made.keys() == {"_diffusers_version"}


def test_build_names_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="stages must be among vae, editor, dino, judge, prior, got 'paint'"):
        build(tmp_path, stages=("vae", "paint"), work_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match="run the vae stage first"):
        build(tmp_path, stages=("editor",), work_dir=tmp_path / "empty")


class Stopped(Exception):
    pass


def train(path: Path, stop_at: int = -1, resume: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(4, 3))

    def loss(step):
        if step == stop_at:
            raise Stopped
        x = torch.randn(5, 2, 3, 3, generator=generator_for(1, step))
        return model(x).square().mean(), {"step": step}

    matrices = [p for p in model.parameters() if p.ndim > 1]
    optimizers = muon_and_adamw(matrices, [p for p in model.parameters() if p.ndim == 1], 1e-2, 2e-2)
    seen = []
    fit(
        "toy",
        model,
        optimizers,
        loss,
        steps=7,
        schedule=lambda s: 1 / (1 + s),
        checkpoint=path,
        save_every=2,
        ema_decay=0.9,
        resume=resume,
        on_save=seen.append,
    )
    assert seen[-1] == 7
    return model


@pytest.mark.parametrize("stop_at", [0, 1, 2, 5, 6])
def test_fit_resumes_bit_for_bit_wherever_it_was_stopped(tmp_path, stop_at):
    whole = train(tmp_path / "whole.pt")
    with pytest.raises(Stopped):
        train(tmp_path / "part.pt", stop_at)
    resumed = train(tmp_path / "part.pt")
    again = train(tmp_path / "part.pt", resume=False)
    for a, b, c in zip(whole.parameters(), resumed.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_muon_treats_a_convolution_as_its_matrix():
    weight = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    gradient = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    kernel, matrix = nn.Parameter(weight.clone()), nn.Parameter(weight.flatten(1).clone())
    kernel.grad, matrix.grad = gradient.clone(), gradient.flatten(1).clone()
    Muon([kernel], lr=0.1).step()
    torch.optim.Muon([matrix], lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    assert torch.equal(kernel.flatten(1), matrix)
    assert not torch.equal(kernel, weight)
