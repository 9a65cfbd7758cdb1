"""Aligned edits and images: each member as if alone, the plain edit at scale 0, and no image lost."""

import json
import math

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, EulerAncestralDiscreteScheduler, StableDiffusionPipeline
from PIL import Image
from test_attention_maps import tiny_unet
from test_phrases import clip_like
from tiny import tiny_editor
from tiny_families import tiny_klein, tiny_klein_kv, tiny_qwen
from transformers import CLIPTextConfig, CLIPTextModel

from mtedit_fast.editors import KleinEditor, KleinKVEditor, KontextEditor, QwenEditor
from mtedit_fast.editors.graphs import GraphedEditor
from mtedit_fast.editors.speed import StepCachedEditor
from mtedit_fast.inference_time.align import align_edit, align_generate, phrase_targets
from mtedit_fast.inference_time.attention_maps import AttentionMaps
from mtedit_fast.inference_time.ebama import ebama_loss
from mtedit_fast.inference_time.phrases import Phrase, editor_tokens, find_phrases, prompt_tokens
from mtedit_fast.ops import seeded_noise
from mtedit_fast.rollout import RolloutConfig, rollout, sample_seeds
from mtedit_fast.training.playground.align_study import align_study, held_out_edits, object_phrases
from mtedit_fast.training.playground.models import MAX_TOKENS, load_pipeline

SIZE = 32
PROMPTS = [
    "Remove red circle",
    "Add blue square above red circle",
    "Change the color of red circle to blue",
    "Remove blue square",
]
PHRASES = [
    [Phrase("circle", ("red",))],
    [Phrase("square", ("blue",)), Phrase("circle", ("red",))],
    [Phrase("circle", ("red", "blue"))],
    [Phrase("square")],
]
GUIDANCE = 2.5


def editor_of(family):
    if family == "kontext":
        return tiny_editor()
    if family == "klein":
        pipeline = tiny_klein(is_distilled=False)
        return KleinEditor(pipeline, max_sequence_length=32, negative_prompt="")
    if family == "klein_kv":
        return KleinKVEditor(tiny_klein_kv(), max_sequence_length=32)
    return QwenEditor(tiny_qwen(), max_sequence_length=96, negative_prompt=" ", condition_area=64**2)


def images_of(count=4, size=SIZE):
    return (torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 255).round() / 255


def align(editor, rows=slice(4), *, size=SIZE, **options):
    settings = {"num_steps": 4, "guidance_scale": GUIDANCE, "seeds": torch.arange(4)[rows] + 7} | options
    phrases = settings.pop("phrases", PHRASES[rows])
    return align_edit(editor, images_of(size=size)[rows], PROMPTS[rows], phrases, **settings)


@pytest.fixture(params=["kontext", "klein", "klein_kv", "qwen"])
def family(request):
    return request.param


def test_scale_0_is_the_plain_edit_bit_for_bit(family):
    editor = editor_of(family)
    seeds = sample_seeds(3, 0, 4)
    config = RolloutConfig(group_size=1, num_steps=4, variant="ode", micro_batch=4, guidance_scale=GUIDANCE)
    plain = rollout(editor, images_of(), [[prompt] for prompt in PROMPTS], config, seeds).images[:, 0]
    assert torch.equal(align(editor, seeds=seeds, scale=0), plain)
    assert torch.equal(align(editor, seeds=seeds, scale=0.0, phrases=None), plain)  # nothing to find
    assert torch.equal(align(editor, seeds=seeds, aligned_share=0.0), plain)
    assert not torch.equal(align(editor, seeds=seeds, scale=200.0), plain)


def test_a_batch_of_four_is_four_of_one(family):
    """Other numbers of tokens, phrases and modifiers in every row. In the latents, before rounding to 8 bits."""
    editor = editor_of(family)
    if family.startswith("klein"):  # whose random weights magnify the batch's rounding by gradients of size 3
        editor.pipeline.to(torch.float64)
    latents = []
    decode = editor.decode
    editor.decode = lambda states, *size: latents.append(states) or decode(states, *size)
    align(editor, scale=20.0)
    for row in range(4):
        align(editor, slice(row, row + 1), scale=20.0)
    together, *alone = latents
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_the_latents_take_the_gradients_step(family):
    """One step of one, by hand from the maps; then the editor's own Euler step."""
    editor, prompts, scale = editor_of(family), PROMPTS[1:3], 5.0
    images, seeds = images_of()[1:3], torch.tensor([11, 12])
    tokens, channels = editor.latent_shape(SIZE, SIZE)
    seen = images if editor.text_sees_image else None
    text, references = editor.encode_text(prompts, seen), editor.encode_image(images)
    options = {"height": SIZE, "width": SIZE}
    guided, alone = (editor.condition(references, text, guidance_scale=g, **options) for g in (GUIDANCE, 1.0))
    if family == "kontext":
        alone = guided  # guidance is an input of the one branch
    schedule = editor.schedule(1, SIZE, SIZE)
    z = seeded_noise(seeds, (tokens, channels), 0).requires_grad_()
    targets = phrase_targets(prompts, PHRASES[1:3], editor_tokens(editor, prompts, seen))
    side = math.isqrt(tokens)
    with AttentionMaps(editor.transformer, targets.columns, (side, side), layers=[1]) as maps:
        editor.velocity(z, schedule.timesteps[0], alone)
    loss = ebama_loss(maps.mean(), targets, distance="total_variation", intensity=0.25)
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    assert gradient.abs().max() > 0
    with torch.no_grad():
        moved = z - scale * gradient
        final = moved - schedule.sigmas[0] * editor.velocity(moved, schedule.timesteps[0], guided)
        expected = (editor.decode(final, SIZE, SIZE) * 255).round() / 255
    found = align_edit(
        editor,
        images,
        prompts,
        PHRASES[1:3],
        num_steps=1,
        guidance_scale=GUIDANCE,
        seeds=seeds,
        scale=scale,
        aligned_share=1.0,
        distance="total_variation",
        intensity=0.25,
        layers=[1],
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1.01 / 255)
    assert (found - expected).abs().mean() < 0.02 / 255


@pytest.mark.parametrize(("share", "steps"), [(0.0, 0), (0.25, 1), (0.5, 2), (1.0, 4)])
def test_the_share_of_the_steps_that_are_aligned(share, steps):
    editor, calls = tiny_editor(), []
    velocity = editor.velocity
    editor.velocity = lambda z, *rest: calls.append(z.requires_grad) or velocity(z, *rest)
    align(editor, aligned_share=share)
    assert calls == [True, False] * steps + [False] * (4 - steps)


def test_the_loss_falls_on_the_playground():
    """A small enough step down the gradient lowers the loss it is of."""
    editor, edits = KontextEditor(load_pipeline(), max_sequence_length=MAX_TOKENS), held_out_edits(4)
    targets = phrase_targets(edits.instructions, edits.phrases, editor_tokens(editor, edits.instructions))
    text, references = editor.encode_text(edits.instructions), editor.encode_image(edits.images)
    condition = editor.condition(references, text, height=64, width=64, guidance_scale=GUIDANCE)

    def loss_at(z):
        with AttentionMaps(editor.transformer, targets.columns, (4, 4)) as maps:
            editor.velocity(z, torch.tensor(800.0), condition)
        return ebama_loss(maps.mean(), targets)

    z = seeded_noise(torch.arange(4), (16, 64), 0).requires_grad_()
    before = loss_at(z)
    (gradient,) = torch.autograd.grad(before.sum(), z)
    with torch.no_grad():
        after = loss_at(z - 0.1 * gradient)
    assert (after < before).all()
    drop = 0.1 * gradient.flatten(1).square().sum(1)  # to first order
    torch.testing.assert_close(before - after, drop, rtol=0.2, atol=1e-5)


def test_an_image_whose_gradient_is_not_finite_goes_on_without_guidance():
    editor = tiny_editor()
    expected = align(editor, scale=50.0)
    plain = align(editor, scale=0)
    velocity = editor.velocity

    def poisoned(z, *rest):
        if z.requires_grad:
            z.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([1, 3]), math.nan))
        return velocity(z, *rest)

    editor.velocity = poisoned
    with pytest.warns(UserWarning, match=r"gradient not finite, went on without guidance: image 1, 3 of the batch"):
        found = align(editor, scale=50.0)
    assert torch.equal(found[::2], expected[::2])
    assert torch.equal(found[1::2], plain[1::2])
    assert not torch.equal(expected, plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": -1.0}, r"scale: expected a step size >= 0, got -1.0; 0 is the plain edit"),
        ({"scale": math.nan}, r"scale: expected a step size >= 0, got nan"),
        ({"scale": math.inf}, r"scale: expected a step size >= 0, got inf"),
        ({"aligned_share": 1.5}, r"aligned_share: expected a share of the steps in \[0, 1\], got 1.5"),
        ({"intensity": -0.5}, r"intensity: expected a weight >= 0, got -0.5"),
        ({"distance": "l2"}, r"distance: expected one of cosine, symmetric_kl, total_variation, got 'l2'"),
        ({"phrases": PHRASES[:3]}, r"phrases: expected one per image \(4\), got 3"),
        ({"phrases": [[], *PHRASES[1:]]}, r"phrases: expected at least one noun of 'Remove red circle', got none"),
        ({"phrases": [[Phrase("dog")], *PHRASES[1:]]}, r"'dog' is not in 'Remove red circle'; use its own words"),
        ({"seeds": torch.arange(3)}, r"seeds: expected int64 \[4\], one per image, got torch.int64 \[3\]"),
        ({"seeds": torch.zeros(4)}, r"seeds: expected int64 \[4\], one per image, got torch.float32 \[4\]"),
        ({"layers": [99]}, r"layers: expected some of 0 … 5, got \[99\]"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        align(tiny_editor(), **options)


def test_bad_images_and_instructions():
    options = {"num_steps": 1, "guidance_scale": 1.0, "seeds": torch.arange(2)}
    with pytest.raises(ValueError, match=r"images: expected \[B, 3, H, W\], got \[3, 32, 32\]"):
        align_edit(tiny_editor(), images_of()[0], PROMPTS[:2], PHRASES[:2], **options)
    with pytest.raises(ValueError, match=r"instructions: expected one per image \(2\), got 'Remove red circle'"):
        align_edit(tiny_editor(), images_of()[:2], PROMPTS[0], PHRASES[:2], **options)


def test_wrapped_editors_are_refused():
    for wrapped in (GraphedEditor(tiny_editor()), StepCachedEditor(tiny_editor())):
        with pytest.raises(TypeError, match=r"editor: expected one that runs eagerly with gradient, got \w+Editor"):
            align(wrapped)


def test_without_phrases_and_parser():
    with pytest.raises(ImportError, match=r'on the command line as --align "circle:red"'):
        find_phrases(PROMPTS, "no_such_model")


def stable_diffusion(scheduler=None):
    torch.manual_seed(0)
    tokenizer = clip_like()
    tokenizer.model_max_length = 16
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=12,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        eos_token_id=1,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=tiny_unet(),
        scheduler=scheduler or DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


SCENES = ["a red car", "a turquoise car, and a red one", "car and red car", "a car"]
SCENE_PHRASES = [
    [Phrase("car", ("red",))],
    [Phrase("car", ("turquoise",)), Phrase("one", ("red",))],
    [Phrase("car"), Phrase("car", ("red",))],
    [Phrase("car")],
]


def generate(pipeline, rows=slice(4), **options):
    settings = {"seeds": torch.arange(4)[rows] + 3, "num_steps": 3, "resolution": 8, "guidance_scale": 3.0} | options
    return align_generate(pipeline, SCENES[rows], SCENE_PHRASES[rows], **settings)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("size", [None, (32, 16)])
def test_scale_0_is_the_stock_pipeline(guidance, size):
    pipeline = stable_diffusion()
    found = generate(pipeline, scale=0, guidance_scale=guidance, size=size, negative_prompt="a red")
    height, width = size or (32, 32)
    stock = pipeline(
        SCENES,
        height=height,
        width=width,
        num_inference_steps=3,
        guidance_scale=guidance,
        negative_prompt=["a red"] * 4,
        latents=seeded_noise(torch.arange(4) + 3, (4, height // 2, width // 2), 0),
        output_type="pt",
    )
    torch.testing.assert_close(found, stock.images, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scheduler", [None, EulerAncestralDiscreteScheduler(steps_offset=1)])
def test_every_member_is_kept(scheduler):
    """A batch of four is four of one, under a scheduler that draws noise, too; in fp64, as its first step from a
    state all but noise magnifies the batch's rounding."""
    pipeline = stable_diffusion(scheduler).to(torch.float64)
    together = generate(pipeline, scale=20.0)
    alone = torch.cat([generate(pipeline, slice(row, row + 1), scale=20.0) for row in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    moved = (together - generate(pipeline, scale=0)).flatten(1).abs().amax(1)
    assert (moved > 1e-6).all()


def test_one_step_of_stable_diffusion_by_hand():
    pipeline, scale = stable_diffusion(), 30.0
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(1)
    (timestep,) = scheduler.timesteps
    text, negative = pipeline.encode_prompt(SCENES, "cpu", 1, True, [""] * 4)
    tokens = [prompt_tokens(pipeline.tokenizer, prompt, max_length=16) for prompt in SCENES]
    targets = phrase_targets(SCENES, SCENE_PHRASES, tokens, competing=range(1, 15))
    assert sorted(targets.columns[0].tolist()) == list(range(1, 15))  # all tokens but the first and the last
    z = seeded_noise(torch.arange(4) + 3, (4, 16, 16), 0).requires_grad_()
    with AttentionMaps(pipeline.unet, targets.columns, (8, 8)) as maps:
        pipeline.unet(z, timestep, text)
    loss = ebama_loss(maps.mean(), targets, distance="symmetric_kl")
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    with torch.no_grad():
        z = z - scale * gradient
        first, second = pipeline.unet(torch.cat([z, z]), timestep, torch.cat([negative, text])).sample.chunk(2)
        z = scheduler.step(first + 3.0 * (second - first), timestep, z).prev_sample
        image = pipeline.vae.decode(z / pipeline.vae.config.scaling_factor).sample
    found = generate(pipeline, num_steps=1, scale=scale, aligned_share=1.0, distance="symmetric_kl")
    torch.testing.assert_close(found, (image / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


def test_bad_arguments_of_stable_diffusion():
    pipeline = stable_diffusion()
    with pytest.raises(TypeError, match=r"pipeline: expected a StableDiffusionPipeline \(1.x or 2.x\), got Flux"):
        generate(tiny_editor().pipeline)
    with pytest.raises(ValueError, match=r"scale: expected a step size >= 0, got -20"):
        generate(pipeline, scale=-20.0)
    with pytest.raises(ValueError, match=r"size: expected positive multiples of 8, got 12×32"):
        generate(pipeline, size=(12, 32))
    with pytest.raises(ValueError, match=r"the layers have \[64, 256\] queries; choose another grid or resolution"):
        generate(pipeline, resolution=5)
    with pytest.raises(ValueError, match=r"layers: expected some of 0 … \d+, got \[40\]"):
        generate(pipeline, layers=[40])


def test_the_study_names_objects_compares_and_goes_on(tmp_path):
    assert object_phrases("Change the color of wood red circle to blue") == [Phrase("circle", ("wood", "red"))]
    assert object_phrases("Add blue sign A left of metal green square") == [
        Phrase("sign", ("blue", "A")),
        Phrase("square", ("metal", "green")),
    ]
    assert object_phrases("Change the background to ocean") == []
    for instruction, kept in [
        ("Remove wood red circle", []),
        ("Replace wood red circle with blue sign A", [Phrase("sign", ("blue", "A"))]),
        ("Change the color of wood red circle to blue", [Phrase("circle", ("wood", "blue"))]),
        ("Change the material of wood red circle to metal", [Phrase("circle", ("metal", "red"))]),
        ("Change the color of red sign A to blue", [Phrase("sign", ("blue", "A"))]),
        ("Change the text of red sign A to X", [Phrase("sign", ("red", "X"))]),
        ("Change the count of wood red circle to 3", [Phrase("circle", ("wood", "red"))]),
    ]:
        assert object_phrases(instruction, kept=True) == kept
    align_study(tmp_path, scales=[0.0], count=4, batch=4)
    path = tmp_path / "summary.json"
    stored = json.loads(path.read_text())
    stored["runs"]["0.0"]["success"] = [0, 0, 0, 0]  # would come back if it were run again
    path.write_text(json.dumps(stored))
    summary = align_study(tmp_path, scales=[0.0, 300.0], count=4, batch=2)
    assert summary == json.loads(path.read_text())
    plain, aligned = summary["table"]
    assert (plain["success"], plain["difference"]["success"]["mean"]) == (0, 0)
    assert aligned["success"] == sum(summary["runs"]["300.0"]["success"]) / 4
    energies = [torch.tensor(summary["runs"][scale]["energy"]) for scale in ("0.0", "300.0")]
    change = aligned["difference"]["energy"]["mean"]
    assert change == pytest.approx((energies[1] - energies[0]).mean().item(), abs=1e-6)
    assert Image.open(tmp_path / "maps.png").size[0] > 600
    with pytest.raises(ValueError, match=r"scales: expected 0, the plain edit, among them, got \[3.0\]"):
        align_study(tmp_path, scales=[3.0])
