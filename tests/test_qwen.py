"""The Qwen-Image-Edit adapter gives the stock pipelines' numbers, one by one and batched."""

import pytest
import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from peft import LoraConfig
from PIL import Image
from tiny_families import positioned, tiny_qwen

from mtedit_fast.editors import QwenEditor
from mtedit_fast.editors.qwen import guided_velocity
from mtedit_fast.ops import sde_coefficients, sde_step, seeded_noise
from mtedit_fast.rollout import RolloutConfig, replay, rollout, sample_seeds

FIRST, PLUS = QwenImageEditPipeline, QwenImageEditPlusPipeline
PROMPTS = ["remove the red circle", "add a blue square to the circle now please"]
SIZE, TOKENS, LENGTH = 64, 16, 96


def references(*shape, size=SIZE):
    torch.manual_seed(1)
    return (torch.rand(*shape or (2,), 3, size, size) * 255).round() / 255


def editor_of(kind=FIRST, *, negative_prompt=None, size=SIZE, **options):
    return QwenEditor(
        tiny_qwen(kind, **options), max_sequence_length=LENGTH, negative_prompt=negative_prompt, condition_area=size**2
    )


def condition_of(editor, text, latents, guidance_scale=1.0, **options):
    return editor.condition(latents, text, height=SIZE, width=SIZE, guidance_scale=guidance_scale, **options)


def edit(editor, images, prompts, latents, guidance_scale, steps=3):
    """Euler steps from `latents`."""
    schedule = editor.schedule(steps, SIZE, SIZE)
    coefficients = sde_coefficients(schedule.sigmas, variant="ode")
    text, side = editor.encode_text(prompts, images), images.shape[-1]
    condition = condition_of(editor, text, editor.encode_image(images), guidance_scale, reference_size=(side, side))
    with torch.no_grad():
        for step in range(steps):
            velocity = editor.velocity(latents, schedule.timesteps[step], condition)
            latents = sde_step(latents, velocity, coefficients, step).prev_sample
    return editor.decode(latents, SIZE, SIZE)


def picture(image):
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize(
    ("kind", "options", "shape", "size"),
    [
        (FIRST, {}, (2,), 64),
        (FIRST, {}, (2,), 96),
        (PLUS, {}, (2,), 64),
        (PLUS, {"zero_cond_t": True}, (2,), 64),  # 2511
        (PLUS, {}, (2, 2), 64),
        (PLUS, {"zero_cond_t": True}, (2, 2), 96),
    ],
)
def test_batched_edits_equal_the_stock_pipeline_one_by_one(monkeypatch, kind, options, shape, size, guidance_scale):
    # The stock pipelines bring every image to 1024² pixels (Plus also to 384²): here to the size it has.
    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: (size, size, None))
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "calculate_dimensions", lambda area, ratio: (size, size))
    negative = "blue" if guidance_scale > 1 else None
    editor = editor_of(kind, negative_prompt=negative, size=size, **options)
    images, latents = references(*shape, size=size), seeded_noise(torch.tensor([3, 5]), (TOKENS, 16), 0)
    result = edit(editor, images, PROMPTS, latents, guidance_scale)
    pipeline = positioned(tiny_qwen(kind, **options))
    for row in range(2):
        own = [picture(image) for image in images[row].reshape(-1, 3, size, size)]
        expected = pipeline(
            image=own if kind is PLUS else own[0],
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


def test_the_editors_pipeline_still_is_the_stock_one():
    plain, used = positioned(tiny_qwen(PLUS, zero_cond_t=True)), positioned(tiny_qwen(PLUS, zero_cond_t=True))
    QwenEditor(used)
    options = {
        "image": picture(references()[0]),
        "prompt": PROMPTS[0],
        "negative_prompt": " ",
        "num_inference_steps": 2,
        "height": SIZE,
        "width": SIZE,
        "prompt_embeds": torch.randn(1, 9, 16),
        "negative_prompt_embeds": torch.randn(1, 7, 16),
        "prompt_embeds_mask": torch.tensor([[1] * 6 + [0] * 3]),
        "latents": torch.randn(1, TOKENS, 16),
        "output_type": "latent",
    }
    del options["prompt"], options["negative_prompt"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", SIZE**2)
        ours, theirs = (pipeline(**options).images for pipeline in (used, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"zero_cond_t": True}])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_batch_with_a_mask_equals_stock_forwards_row_by_row(options, count, guidance_scale):
    """Rows, timesteps and text lengths differ; the stock transformer sees each row's own tokens alone."""
    editor = editor_of(PLUS, negative_prompt="blue", **options)
    stock = tiny_qwen(PLUS, **options).transformer
    text, size = editor.encode_text(PROMPTS), (32, 48)
    images = torch.rand(2, count, 3, *size)
    reference = editor.encode_image(images)
    assert reference.shape == (2, count * 6, 16)
    latents, timestep = torch.randn(2, TOKENS, 16), torch.tensor([900.0, 200.0])
    with torch.no_grad():
        condition = condition_of(editor, text, reference, guidance_scale, reference_size=size)
        together = editor.velocity(latents, timestep, condition)
        longest = int(text["mask"].sum(1).max())
        assert condition.inputs["encoder_hidden_states"].shape[1] == longest < LENGTH
        assert condition.inputs["attention_mask"].shape == (2, 1, 1, longest + TOKENS + count * 6)
        assert "negative_attention_mask" not in condition.inputs  # whose rows are of one length, another one
        for row in range(2):
            own = slice(row, row + 1)
            branches = {}
            for name in ("", "negative_"):
                valid = text[name + "mask"][row]
                branches[name] = stock(
                    hidden_states=torch.cat([latents[own], reference[own]], dim=1),
                    timestep=timestep[own] / 1000,
                    encoder_hidden_states=text[name + "embeds"][own, valid],
                    encoder_hidden_states_mask=None,
                    img_shapes=[[(1, 4, 4), *[(1, 2, 3)] * count]],
                    return_dict=False,
                )[0][:, :TOKENS]
            expected = branches[""]
            if guidance_scale > 1:
                expected = branches["negative_"] + 3 * (branches[""] - branches["negative_"])
                expected *= branches[""].norm(dim=-1, keepdim=True) / expected.norm(dim=-1, keepdim=True)
            torch.testing.assert_close(together[own], expected, rtol=1e-5, atol=1e-5)


def test_rows_of_one_length_need_no_mask_and_the_host_reads_the_lengths_once(monkeypatch):
    editor = editor_of(negative_prompt="blue")
    text, reference = editor.encode_text([PROMPTS[0]] * 3), editor.encode_image(references(3))
    reads, read = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: reads.append(tensor.shape) or read(tensor))
    for guidance_scale, rows in ((1.0, 3), (2.0, 6)):
        reads.clear()
        inputs = condition_of(editor, text, reference, guidance_scale).inputs
        assert reads == [(rows,)]
        assert not any("mask" in name for name in inputs)
        assert inputs["encoder_hidden_states"].shape[1] == text["mask"][0].sum()
        assert all(isinstance(value, torch.Tensor) for value in inputs.values())
    lengths = [len(inputs[name + "rotary_cos"]) - 2 * TOKENS for name in ("", "negative_")]
    assert lengths == [text[name + "mask"][0].sum() for name in ("", "negative_")]
    assert lengths[0] > lengths[1]


def test_guided_velocity():
    conditional, negative = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    guided = negative + 2.5 * (conditional - negative)
    expected = guided * conditional.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
    both = torch.cat([conditional, negative])
    torch.testing.assert_close(guided_velocity(both, 2.5), expected)
    torch.testing.assert_close(guided_velocity(both.float(), 2.5), expected.float())
    half = guided_velocity(both.bfloat16(), 2.5)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), expected, rtol=0.03, atol=0.03)
    assert not guided_velocity(torch.zeros(2, 3, 8), 2.5).any()  # as of a new model, whose last layer is zero


def test_references_are_encoded_in_their_order_and_images_decoded_as_alone():
    editor = editor_of(PLUS)
    images = references(2, 3)
    latents = editor.encode_image(images)
    assert latents.shape == (2, 3 * TOKENS, 16)
    for row in range(2):
        for place in range(3):
            alone = editor.encode_image(images[row, place][None])
            own = latents[row : row + 1, place * TOKENS : (place + 1) * TOKENS]
            torch.testing.assert_close(own, alone, rtol=1e-5, atol=1e-5)
    decoded = editor.decode(latents[:, :TOKENS], SIZE, SIZE)
    alone = torch.cat([editor.decode(latents[row : row + 1, :TOKENS], SIZE, SIZE) for row in range(2)])
    torch.testing.assert_close(decoded, alone, rtol=1e-5, atol=1e-5)
    text = editor.encode_text(PROMPTS, images)
    noise, timestep = torch.randn(2, TOKENS, 16), torch.tensor(500.0)
    with torch.no_grad():
        velocity = editor.velocity(noise, timestep, condition_of(editor, text, latents))
        turned = latents.unflatten(1, (3, -1)).flip(1).flatten(1, 2)
        assert (velocity - editor.velocity(noise, timestep, condition_of(editor, text, turned))).abs().max() > 1e-3


@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_a_rollout_reads_each_turns_image_and_replays_exactly(zero_cond_t):
    editor = editor_of(PLUS, negative_prompt=" ", zero_cond_t=zero_cond_t)
    config = RolloutConfig(
        group_size=2, num_steps=3, micro_batch=2, guidance_scale=3.0, reference_size=(32, 32), eta=0.5
    )
    instructions = [[PROMPTS[0], PROMPTS[1]], [PROMPTS[1], PROMPTS[0]]]
    result = rollout(editor, references(), instructions, config, sample_seeds(0, 0, 4))
    first, second = (turn["embeds"] for turn in result.text)
    assert torch.equal(first[0], first[1])
    assert not torch.equal(second[0], second[1])  # as their images differ
    alone = editor.encode_text([PROMPTS[0]] * 2, result.images[2:, 0])
    for name, value in alone.items():
        torch.testing.assert_close(result.text[1][name][2:], value, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for rows in result.micro_batches():
            for turn in range(2):
                for position in range(2):
                    replayed = replay(editor, result, rows, turn, position).log_prob
                    assert torch.equal(replayed, result.log_probs[rows, turn, position])


def test_lora_targets_every_linear_layer_of_a_block_but_modulations_and_loads_in_the_stock_pipeline(tmp_path):
    editor = editor_of()
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
        for each in (editor, QwenEditor(pipeline, max_sequence_length=LENGTH, condition_area=SIZE**2), editor_of())
    )
    assert torch.equal(tuned, loaded)
    assert (tuned - plain).abs().max() > 1e-3


def test_bad_input_names_argument_and_remedy():
    editor, plus = editor_of(), editor_of(PLUS)
    text = editor.encode_text(PROMPTS)
    with pytest.raises(ValueError, match=r"height, width: expected positive multiples of 16.*60×64"):
        editor.latent_shape(60, 64)
    with pytest.raises(ValueError, match=r"height, width: expected positive multiples of 16.*64×40"):
        editor.encode_image(torch.rand(1, 3, 64, 40))
    with pytest.raises(TypeError, match=r"expected QwenImageEditPipeline or QwenImageEditPlusPipeline, got int"):
        QwenEditor(3)
    with pytest.raises(TypeError, match=r"images: expected one tensor, got a tuple of sizes 32×32, 64×64; bring all"):
        plus.encode_image((references()[0], references(size=32)[0]))
    with pytest.raises(ValueError, match=r"images: .*takes 1 to 1 references per edit, got 2"):
        editor.encode_image(references(1, 2))
    with pytest.raises(ValueError, match=r"images: .*takes 1 to 3 references per edit, got 4"):
        plus.encode_image(references(1, 4))
    with pytest.raises(ValueError, match=r"references: .*takes 1 to 3 per edit, got 4"):
        condition_of(plus, text, torch.randn(2, 4 * TOKENS, 16))
    with pytest.raises(
        ValueError, match=r"references: expected latents \[n, R·16, 16\] .*64×64 pixels.*reference_size"
    ):
        condition_of(plus, text, torch.randn(2, 17, 16))
    with pytest.raises(ValueError, match=r"guidance_scale: expected 1 without a negative prompt, got 2.0; build"):
        condition_of(plus, text, torch.randn(2, TOKENS, 16), 2.0)
    long = {"embeds": torch.zeros(1, 4096, 16), "mask": torch.ones(1, 4096, dtype=torch.bool)}
    with pytest.raises(ValueError, match=r"text: expected at most 4094 tokens beside images.*got 4096; shorten"):
        condition_of(plus, long, torch.randn(1, TOKENS, 16))
