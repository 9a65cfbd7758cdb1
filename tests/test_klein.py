"""The Klein adapter gives the stock pipeline's numbers, one by one and batched, and does no work twice."""

import pytest
import torch
from klein_truth import HEIGHT, LENGTH, PROMPTS, TOKENS, WIDTH, NoSync, edit, forbid_reads, references, stock
from peft import LoraConfig
from tiny_families import tiny_klein

from mtedit_fast.editors import KleinEditor
from mtedit_fast.ops import seeded_noise
from mtedit_fast.rollout import RolloutConfig, rollout

SMALL, LARGE = (32, 40), (80, 64)


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
        expected = stock(pipeline, images[row : row + 1], PROMPTS[row], latents[row : row + 1], **options)
        torch.testing.assert_close(result.images[row], (expected * 255).round() / 255, rtol=0, atol=1 / 255)
        assert (result.images[row] - expected).abs().mean() < 0.3 / 255  # rounding to 8 bit alone is 0.25


@pytest.mark.parametrize("size", [None, LARGE])
def test_several_references_at_their_own_resolution_equal_the_stock_pipeline(size):
    editor, pipeline = KleinEditor(tiny_klein(), max_sequence_length=LENGTH), tiny_klein()
    images = references(6, size or (HEIGHT, WIDTH)).unflatten(0, (2, 3))
    latents = torch.randn(2, TOKENS, 16)
    result = edit(editor, images, latents, reference_size=size)
    for row in range(2):
        expected = stock(pipeline, images[row], PROMPTS[row], latents[row : row + 1])
        torch.testing.assert_close(result[row : row + 1], expected, rtol=0, atol=1e-4)
    swapped = edit(editor, images.flip(1), latents, reference_size=size)
    assert (swapped - result).abs().max() > 1e-3  # their order counts


def test_velocity_of_a_row_does_not_depend_on_its_batch():
    editor = KleinEditor(tiny_klein(is_distilled=False), max_sequence_length=LENGTH, negative_prompt="")
    text, reference = editor.encode_text(PROMPTS), editor.encode_image(references())
    latents, timestep = torch.randn(2, TOKENS, 16), torch.tensor([900.0, 200.0])
    options = {"height": HEIGHT, "width": WIDTH, "guidance_scale": 3.0}
    with torch.no_grad():
        together = editor.velocity(latents, timestep, editor.condition(reference, text, **options))
        for row in (slice(0, 1), slice(1, 2)):
            own = {name: value[row] for name, value in text.items()}
            alone = editor.velocity(latents[row], timestep[row], editor.condition(reference[row], own, **options))
            torch.testing.assert_close(together[row], alone, rtol=1e-5, atol=1e-5)


def test_the_text_encoder_stops_at_its_last_used_layer_and_sees_each_prompt_once():
    pipeline = tiny_klein(is_distilled=False)
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    expected = pipeline.encode_prompt(prompts, max_sequence_length=LENGTH)[0]
    negative = pipeline.encode_prompt([""], max_sequence_length=LENGTH)[0]
    editor = KleinEditor(pipeline, max_sequence_length=LENGTH, negative_prompt="")
    rows, head = [], []
    model = pipeline.text_encoder.model
    for layer in model.layers:
        layer.register_forward_hook(lambda _, inputs, output: rows.append(len(output)))
    for module in (model.norm, pipeline.text_encoder.lm_head):
        module.register_forward_hook(lambda *_: head.append(1))
    text = editor.encode_text(prompts)
    assert len(model.layers) == 30
    assert rows == [2] * 27 + [1] * 27  # the distinct prompts together, then the negative one
    editor.encode_text(prompts)
    assert rows[54:] == [2] * 27  # the negative one is known
    assert head == []
    torch.testing.assert_close(text["embeds"], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(text["negative_embeds"], negative.expand(3, -1, -1), rtol=0, atol=1e-6)
    again = pipeline.encode_prompt(prompts, max_sequence_length=LENGTH)[0]  # the encoder itself is whole as before
    assert torch.equal(again, expected)
    assert head
    assert "negative_embeds" not in KleinEditor(tiny_klein(), negative_prompt="").encode_text(prompts[:1])


def test_a_turn_is_conditioned_once_and_its_steps_wait_for_nothing(monkeypatch):
    editor = KleinEditor(tiny_klein(is_distilled=False), max_sequence_length=LENGTH, negative_prompt="")
    text, reference = editor.encode_text(PROMPTS), editor.encode_image(references())
    options = {"height": HEIGHT, "width": WIDTH, "guidance_scale": 3.0}
    first, second = (editor.condition(reference, text, **options) for _ in range(2))
    assert all(first.inputs[name] is second.inputs[name] for name in ("txt_ids", "img_ids"))
    latents, timestep = torch.randn(2, TOKENS, 16), torch.tensor([900.0, 200.0])
    expected = editor.velocity(latents, timestep, first)
    forbid_reads(monkeypatch)
    with NoSync():
        steps = [editor.velocity(latents, timestep, first)]
        editor.velocity(latents, timestep[0], first)
    monkeypatch.undo()
    assert torch.equal(steps[0], expected)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_velocity_compiles_as_one_graph(scale):
    editor = KleinEditor(tiny_klein(is_distilled=False), max_sequence_length=LENGTH, negative_prompt="")
    images = references(4, SMALL).unflatten(0, (2, 2))
    condition = editor.condition(
        editor.encode_image(images),
        editor.encode_text(PROMPTS),
        height=HEIGHT,
        width=WIDTH,
        guidance_scale=scale,
        reference_size=SMALL,
    )
    torch._dynamo.reset()
    compiled = torch.compile(editor.velocity, fullgraph=True, backend="eager")
    arguments = torch.randn(2, TOKENS, 16), torch.tensor([900.0, 200.0]), condition
    with torch.no_grad():
        torch.testing.assert_close(compiled(*arguments), editor.velocity(*arguments))


def test_latents_come_back_as_images():
    editor = KleinEditor(tiny_klein())
    latents = editor.encode_image(references())
    tokens, channels = editor.latent_shape(HEIGHT, WIDTH)
    assert latents.shape == (2, tokens, channels)
    assert editor.decode(latents, HEIGHT, WIDTH).shape == (2, 3, HEIGHT, WIDTH)
    pair = editor.encode_image(references(4).unflatten(0, (2, 2)))
    assert pair.shape == (2, 2 * tokens, channels)
    torch.testing.assert_close(pair[0], latents.flatten(0, 1), rtol=1e-5, atol=1e-5)


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
    text, reference = editor.encode_text(PROMPTS), editor.encode_image(references())
    latents = torch.randn(2, TOKENS, 16)
    with torch.no_grad():
        tuned, loaded, plain = (
            each.velocity(latents, torch.tensor(500.0), each.condition(reference, text, height=HEIGHT, width=WIDTH))
            for each in (editor, KleinEditor(pipeline), KleinEditor(tiny_klein()))
        )
    assert torch.equal(tuned, loaded)
    assert (tuned - plain).abs().max() > 1e-3


def test_bad_input_names_argument_and_remedy(tmp_path):
    base = KleinEditor(tiny_klein(is_distilled=False), max_sequence_length=LENGTH)
    with pytest.raises(ValueError, match=r"height, width: expected positive multiples of 4.*66×72.*resize"):
        base.latent_shape(66, 72)
    with pytest.raises(ValueError, match=r"height, width: expected positive multiples of 4.*66×72"):
        base.encode_image(torch.rand(1, 3, 66, 72))
    with pytest.raises(ValueError, match=r"images: KleinEditor takes 1 to 4 references per edit, got 5"):
        base.encode_image(torch.rand(1, 5, 3, *SMALL))
    latents, text = torch.randn(1, TOKENS, 16), base.encode_text(PROMPTS[:1])
    options = {"height": HEIGHT, "width": WIDTH}
    with pytest.raises(ValueError, match=r"guidance_scale: expected 1 without a negative prompt, got 3.0; build"):
        base.condition(latents, text, guidance_scale=3.0, **options)
    with pytest.raises(ValueError, match=r"references: KleinEditor takes 1 to 4 per edit, got 5"):
        base.condition(latents.repeat(1, 5, 1), text, **options)
    with pytest.raises(ValueError, match=r"references: expected latents \[n, R·288, 16\] of images of 64×72.*one size"):
        base.condition(torch.cat([latents, torch.randn(1, 80, 16)], 1), text, **options)  # another size's
    with pytest.raises(ValueError, match=r"height, width: expected positive multiples of 4.*33×40"):
        base.condition(latents, text, reference_size=(33, 40), **options)
    with pytest.raises(FileNotFoundError, match=r"nothing at.*hub name such as black-forest-labs/FLUX.2-klein-4B"):
        KleinEditor.from_pretrained(tmp_path / "missing")
    with pytest.raises(TypeError, match=r"pipeline: expected Flux2KleinPipeline, got str; choose the editor family"):
        KleinEditor("pipeline")
