"""The Klein adapter gives the stock pipeline's numbers, one by one and batched."""

import pytest
import torch
from peft import LoraConfig
from PIL import Image
from tiny_families import tiny_klein

from mtedit_fast.editors import KleinEditor
from mtedit_fast.ops import seeded_noise
from mtedit_fast.rollout import RolloutConfig, rollout

PROMPTS = ["remove the red circle", "add a blue square to the circle now please"]
HEIGHT, WIDTH, LENGTH = 64, 72, 16
TOKENS = (HEIGHT // 4) * (WIDTH // 4)


def references(count=2):
    torch.manual_seed(1)
    return (torch.rand(count, 3, HEIGHT, WIDTH) * 255).round() / 255


def stock(pipeline, reference, prompt, latents, **options):
    picture = Image.fromarray((reference * 255).byte().permute(1, 2, 0).numpy())
    return pipeline(
        image=picture,
        prompt=prompt,
        num_inference_steps=3,
        max_sequence_length=LENGTH,
        latents=latents.transpose(1, 2).unflatten(2, (HEIGHT // 4, WIDTH // 4)),
        output_type="pt",
        **options,
    ).images


@pytest.mark.parametrize("is_distilled", [True, False])
def test_batched_edits_equal_the_stock_pipelines_one_by_one(is_distilled):
    editor = KleinEditor(tiny_klein(is_distilled=is_distilled), max_sequence_length=LENGTH, negative_prompt="")
    seeds = torch.tensor([3, 5])
    config = RolloutConfig(group_size=1, num_steps=3, variant="ode", micro_batch=2, guidance_scale=2.5)
    images = references()
    result = rollout(editor, images, [[prompt] for prompt in PROMPTS], config, seeds)
    latents = seeded_noise(seeds, (TOKENS, 16), 0)
    pipeline = tiny_klein(is_distilled=is_distilled)
    for row in range(2):
        options = {} if is_distilled else {"guidance_scale": 2.5}
        expected = stock(pipeline, images[row], PROMPTS[row], latents[row : row + 1], **options)
        torch.testing.assert_close(result.images[row], (expected * 255).round() / 255, rtol=0, atol=1 / 255)
        assert (result.images[row] - expected).abs().mean() < 0.3 / 255  # rounding to 8 bit alone is 0.25


def test_velocity_of_a_row_does_not_depend_on_its_batch():
    editor = KleinEditor(tiny_klein(is_distilled=False), max_sequence_length=LENGTH, negative_prompt="")
    text, reference = editor.encode_text(PROMPTS), editor.encode_image(references())
    latents, timestep = torch.randn(2, TOKENS, 16), torch.tensor([900.0, 200.0])
    options = {"height": HEIGHT, "width": WIDTH, "guidance_scale": 3.0}
    with torch.no_grad():
        together = editor.velocity(latents, timestep, reference, text, **options)
        for row in (slice(0, 1), slice(1, 2)):
            own = {name: value[row] for name, value in text.items()}
            alone = editor.velocity(latents[row], timestep[row], reference[row], own, **options)
            torch.testing.assert_close(together[row], alone, rtol=1e-5, atol=1e-5)


def test_latents_come_back_as_images():
    editor = KleinEditor(tiny_klein())
    latents = editor.encode_image(references())
    assert latents.shape == (2, *editor.latent_shape(HEIGHT, WIDTH))
    assert editor.decode(latents, HEIGHT, WIDTH).shape == (2, 3, HEIGHT, WIDTH)


def test_lora_targets_every_linear_layer_of_a_block_and_loads_in_the_stock_pipeline(tmp_path):
    editor = KleinEditor(tiny_klein(), max_sequence_length=LENGTH)
    editor.transformer.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=editor.lora_targets))
    linear = [name for name, module in editor.transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    adapted = {name.removesuffix(".base_layer") for name in linear if name.endswith(".base_layer")}
    blocks = {name for name in linear if "blocks." in name and "lora_" not in name}
    assert adapted == {name.removesuffix(".base_layer") for name in blocks}
    for name, parameter in editor.transformer.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    editor.save_lora(tmp_path)
    pipeline = tiny_klein()
    pipeline.load_lora_weights(tmp_path)
    text, reference, latents = (
        editor.encode_text(PROMPTS),
        editor.encode_image(references()),
        torch.randn(2, TOKENS, 16),
    )
    options = {"height": HEIGHT, "width": WIDTH}
    with torch.no_grad():
        tuned, loaded, plain = (
            each.velocity(latents, torch.tensor(500.0), reference, text, **options)
            for each in (editor, KleinEditor(pipeline), KleinEditor(tiny_klein()))
        )
    assert torch.equal(tuned, loaded)
    assert (tuned - plain).abs().max() > 1e-3


def test_bad_input_names_argument_and_remedy(tmp_path):
    base = KleinEditor(tiny_klein(is_distilled=False), max_sequence_length=LENGTH)
    with pytest.raises(ValueError, match=r"height, width: expected positive multiples of 4.*66×72.*resize"):
        base.latent_shape(66, 72)
    latents, text = torch.randn(1, TOKENS, 16), base.encode_text(PROMPTS[:1])
    with pytest.raises(ValueError, match=r"guidance_scale: expected 1 without a negative prompt, got 3.0; build"):
        base.velocity(latents, torch.tensor(1.0), latents, text, height=HEIGHT, width=WIDTH, guidance_scale=3.0)
    with pytest.raises(FileNotFoundError, match=r"nothing at.*hub name such as black-forest-labs/FLUX.2-klein-4B"):
        KleinEditor.from_pretrained(tmp_path / "missing")
    with pytest.raises(TypeError, match=r"pipeline: expected Flux2KleinPipeline, got str; choose the editor family"):
        KleinEditor("pipeline")
