"""The Qwen-Image-Edit adapter gives the stock pipelines' numbers, one by one and batched."""

import pytest
import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from peft import LoraConfig
from PIL import Image
from tiny_families import tiny_qwen

from mtedit_fast.editors import QwenEditor
from mtedit_fast.ops import sde_coefficients, sde_step, seeded_noise

PROMPTS = ["remove the red circle", "add a blue square to the circle now please"]
SIZE, TOKENS, LENGTH = 64, 16, 96


def references(count=2):
    torch.manual_seed(1)
    return (torch.rand(count, 3, SIZE, SIZE) * 255).round() / 255


def edit(editor, images, prompts, latents, guidance_scale, steps=3):
    """Euler steps from `latents`, the text seeing the images as in the pipeline."""
    text, reference = editor.encode_text(prompts, images), editor.encode_image(images)
    schedule = editor.schedule(steps, SIZE, SIZE)
    coefficients = sde_coefficients(schedule.sigmas, variant="ode")
    with torch.no_grad():
        for step in range(steps):
            velocity = editor.velocity(
                latents, schedule.timesteps[step], reference, text,
                height=SIZE, width=SIZE, guidance_scale=guidance_scale,
            )  # fmt: skip
            latents = sde_step(latents, velocity, coefficients, step).prev_sample
    return editor.decode(latents, SIZE, SIZE)


@pytest.mark.parametrize("kind", [QwenImageEditPipeline, QwenImageEditPlusPipeline])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_batched_edits_equal_the_stock_pipeline_one_by_one(monkeypatch, kind, guidance_scale):
    # The stock pipelines bring every image to 1024² pixels (Plus also to 384²): here to the size it has.
    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: (SIZE, SIZE, None))
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "calculate_dimensions", lambda area, ratio: (SIZE, SIZE))
    negative = " " if guidance_scale > 1 else None
    editor = QwenEditor(tiny_qwen(kind), max_sequence_length=LENGTH, negative_prompt=negative)
    images, latents = references(), seeded_noise(torch.tensor([3, 5]), (TOKENS, 16), 0)
    result = edit(editor, images, PROMPTS, latents, guidance_scale)
    pipeline = tiny_qwen(kind)
    for row in range(2):
        expected = pipeline(
            image=Image.fromarray((images[row] * 255).round().byte().permute(1, 2, 0).numpy()),
            prompt=PROMPTS[row],
            negative_prompt=negative,
            true_cfg_scale=guidance_scale,
            num_inference_steps=3,
            height=SIZE,
            width=SIZE,
            latents=latents[row : row + 1],
            output_type="pt",
        ).images
        torch.testing.assert_close(result[row], expected[0], rtol=1e-4, atol=1e-5)


def test_velocity_of_a_row_does_not_depend_on_its_batch_nor_on_the_padding():
    editor = QwenEditor(tiny_qwen(zero_cond_t=True), max_sequence_length=LENGTH, negative_prompt=" ")
    text, reference = editor.encode_text(PROMPTS), editor.encode_image(references())
    assert text["embeds"].shape == (2, LENGTH, 16)
    assert text["mask"].sum(1).diff() == 5  # the second prompt has nine words, the first four
    assert torch.equal(*text["negative_embeds"])
    latents, timestep = torch.randn(2, TOKENS, 16), torch.tensor([900.0, 200.0])
    options = {"height": SIZE, "width": SIZE, "guidance_scale": 3.0}
    with torch.no_grad():
        together = editor.velocity(latents, timestep, reference, text, **options)
        for row in range(2):
            own = slice(row, row + 1)
            branches = {}
            for name in ("", "negative_"):
                length = int(text[name + "mask"][row].sum())
                branches[name] = editor.velocity(
                    latents[own], timestep[own], reference[own],
                    {"embeds": text[name + "embeds"][own, :length], "mask": text[name + "mask"][own, :length]},
                    height=SIZE, width=SIZE, guidance_scale=1.0,
                )  # fmt: skip
            guided = branches["negative_"] + 3 * (branches[""] - branches["negative_"])
            expected = guided * branches[""].norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
            torch.testing.assert_close(together[own], expected, rtol=1e-5, atol=1e-5)


def test_lora_targets_every_linear_layer_of_a_block_but_modulations_and_loads_in_the_stock_pipeline(tmp_path):
    editor = QwenEditor(tiny_qwen(), max_sequence_length=LENGTH)
    editor.transformer.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=editor.lora_targets))
    linear = [name for name, module in editor.transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    adapted = {name.removesuffix(".base_layer") for name in linear if name.endswith(".base_layer")}
    blocks = {name.removesuffix(".base_layer") for name in linear if "blocks." in name and "lora_" not in name}
    assert adapted == {name for name in blocks if "_mod." not in name}
    for name, parameter in editor.transformer.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    editor.save_lora(tmp_path)
    pipeline = tiny_qwen()
    pipeline.load_lora_weights(tmp_path)
    latents = torch.randn(2, TOKENS, 16)
    tuned, loaded, plain = (
        edit(each, references(), PROMPTS, latents, 1.0, steps=1)
        for each in (editor, QwenEditor(pipeline, max_sequence_length=LENGTH), QwenEditor(tiny_qwen()))
    )
    assert torch.equal(tuned, loaded)
    assert (tuned - plain).abs().max() > 1e-3


def test_bad_input_names_argument_and_remedy():
    editor = QwenEditor(tiny_qwen(), max_sequence_length=8)
    with pytest.raises(ValueError, match=r"images: expected one per prompt \(2\), got 1"):
        editor.encode_text(PROMPTS, references(1))
    with pytest.raises(ValueError, match=r"prompts: expected at most 8 tokens with their image, got \d+; raise"):
        editor.encode_text([PROMPTS[1] * 2])
    with pytest.raises(ValueError, match=r"height, width: expected positive multiples of 16.*60×64"):
        editor.latent_shape(60, 64)
    with pytest.raises(TypeError, match=r"expected QwenImageEditPipeline or QwenImageEditPlusPipeline, got int"):
        QwenEditor(3)
