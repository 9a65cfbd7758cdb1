"""Qwen-Image-Edit's text, which sees the images, against the stock pipelines' prompt embeddings."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from PIL import Image
from tiny_families import positioned, tiny_qwen

from mtedit_fast.editors import QwenEditor, qwen_text
from mtedit_fast.editors.qwen_text import condition_size, distinct, resize_lanczos

PROMPTS = ["remove the red circle", "add a blue square to the circle now please", "remove the red circle"]
SIDE, LENGTH = 64, 96
FIRST, PLUS = QwenImageEditPipeline, QwenImageEditPlusPipeline


def editor_of(kind=FIRST, negative_prompt=None, **options):
    return QwenEditor(
        tiny_qwen(kind, **options), max_sequence_length=LENGTH, negative_prompt=negative_prompt, condition_area=SIDE**2
    )


def smooth(*shape, seed=0):
    """Images in 256 levels without the sharp edges at which PIL clips between rows and columns."""
    *batch, height, width = shape
    coarse = torch.rand(math.prod(batch), 1, 4, 5, generator=torch.Generator().manual_seed(seed))
    fine = F.interpolate(coarse, (height, width), mode="bilinear")
    return ((fine * 200 + 20).round() / 255).reshape(shape)


def picture(image):
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def expected(pipeline, prompt, images):
    """[S, D] of the stock pipeline for one prompt and its images, brought to the size it has them in."""
    size = condition_size(*images.shape[-2:], SIDE**2)[::-1]
    pictures = [pipeline.image_processor.resize(picture(image), *size[::-1]) for image in images]
    plus = isinstance(pipeline, PLUS)
    return pipeline.encode_prompt([prompt], pictures if plus else pictures[0])[0][0]


def rows_of(text, prefix=""):
    pairs = zip(text[prefix + "embeds"], text[prefix + "mask"], strict=True)
    for embeds, mask in pairs:
        assert not embeds[~mask].any()  # zero where padded, and padded on the right
        assert not mask.diff().gt(0).logical_and(~mask[:-1]).any()
        yield embeds[mask]


@pytest.mark.parametrize(("kind", "count"), [(FIRST, 1), (PLUS, 1), (PLUS, 2), (PLUS, 3)])
def test_a_batch_equals_the_stock_pipeline_one_by_one(kind, count):
    editor = editor_of(kind, negative_prompt="blue")
    images = smooth(3, count, 3, SIDE, SIDE)
    text = editor.encode_text(PROMPTS, images[:, 0] if count == 1 else images)
    stock = positioned(tiny_qwen(kind))
    assert text["embeds"].shape == (3, LENGTH + count * (SIDE // 32) ** 2, 16)
    for prefix, prompts in (("", PROMPTS), ("negative_", ["blue"] * 3)):
        for row, own in enumerate(rows_of(text, prefix)):
            wanted = expected(stock, prompts[row], images[row])
            torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [FIRST, PLUS])
@pytest.mark.parametrize("size", [(50, 70), (90, 40)])
def test_resized_images_differ_by_less_than_a_level_of_every_pixel_does(kind, size):
    # PIL rounds between rows and columns of each of two resizes: at most a level of 255 each, and less on the whole.
    editor, stock = editor_of(kind, patch_size=14), positioned(tiny_qwen(kind, patch_size=14))
    images = smooth(1, 3, *size)
    (own,) = rows_of(editor.encode_text(PROMPTS[:1], images))
    wanted = expected(stock, PROMPTS[0], images)
    noise = torch.randint(-1, 2, images.shape, generator=torch.Generator().manual_seed(1)) / 255
    level = (expected(stock, PROMPTS[0], images + noise) - wanted).norm()
    assert (own - wanted).norm() < 2 * level
    assert level < 0.1 * (expected(stock, PROMPTS[0], images.flip(-1)) - wanted).norm()


def test_without_images_the_instruction_alone():
    for kind in (FIRST, PLUS):
        editor = editor_of(kind, negative_prompt=" ")
        text, stock = editor.encode_text(PROMPTS), tiny_qwen(PLUS)  # whose template leaves the pictures to the prompt
        assert text["embeds"].shape == text["negative_embeds"].shape == (3, LENGTH, 16)
        for own, prompt in zip(rows_of(text), PROMPTS, strict=True):
            torch.testing.assert_close(own, stock.encode_prompt([prompt])[0][0], rtol=1e-5, atol=1e-5)
        for own in rows_of(text, "negative_"):
            torch.testing.assert_close(own, stock.encode_prompt([" "])[0][0], rtol=1e-5, atol=1e-5)


def test_every_image_is_seen_once_and_every_prompt_of_an_image_read_once():
    editor = editor_of(PLUS, negative_prompt=" ")
    encoder, seen, read = editor.pipeline.text_encoder.model, [], []
    encoder.visual.register_forward_pre_hook(lambda *call: seen.append(len(call[2]["grid_thw"])), with_kwargs=True)
    encoder.language_model.register_forward_pre_hook(
        lambda *call: read.append(len(call[2]["inputs_embeds"])), with_kwargs=True
    )
    images = smooth(2, 2, 3, SIDE, SIDE)[[0, 1, 0, 0]]
    prompts = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    text = editor.encode_text(prompts, images)
    assert seen == [4]  # two references each of two distinct images
    assert read == [5]  # of four rows three differ; the negative prompt once per image
    assert torch.equal(text["embeds"][0], text["embeds"][3])
    for name in ("embeds", "negative_embeds"):
        assert not torch.equal(text[name][0], text[name][1])
    editor.encode_text(PROMPTS)
    assert seen == [4]
    assert read == [5, 3]  # two prompts and the negative one


def test_large_batches_are_read_in_parts(monkeypatch):
    editor, read = editor_of(PLUS, negative_prompt=" "), []
    images = smooth(3, 2, 3, SIDE, SIDE)
    whole = editor.encode_text(PROMPTS, images)
    encoder = editor.pipeline.text_encoder.model
    for tower in (encoder.visual, encoder.language_model):
        tower.register_forward_pre_hook(lambda tower, *_: read.append(tower))
    monkeypatch.setattr(qwen_text, "MAX_TOKENS", 210)  # rows have some 90; an image has four
    parts = editor.encode_text(PROMPTS, images)
    assert read.count(encoder.language_model) == 3
    assert read.count(encoder.visual) == 1
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(qwen_text, "MAX_TOKENS", 8)
    parts = editor.encode_text(PROMPTS, images)
    assert read.count(encoder.language_model) == 3 + 6
    assert read.count(encoder.visual) == 1 + 3
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-5, atol=1e-5)


def test_rows_of_several_calls_stack():
    editor = editor_of(PLUS)
    images = smooth(3, 3, SIDE, SIDE)
    together = editor.encode_text(PROMPTS, images)
    for row in range(3):
        alone = editor.encode_text(PROMPTS[row : row + 1], images[row : row + 1])
        assert torch.equal(alone["mask"][0], together["mask"][row])
        torch.testing.assert_close(alone["embeds"][0], together["embeds"][row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 96), (32, 32), (50, 32), (37, 111), (50, 70)])
def test_lanczos_is_pils(size):
    images = smooth(2, 3, 50, 70)
    own = resize_lanczos(images, size) * 255
    for image, levels in zip(images, own, strict=True):
        pil = np.asarray(picture(image).resize(size[::-1], Image.Resampling.LANCZOS))
        difference = (levels - torch.tensor(pil).permute(2, 0, 1)).abs()
        assert difference.max() <= 1.001  # PIL rounds between rows and columns
        assert difference.mean() < 0.25
        if size in [(50, 32), (50, 70)]:  # one direction at most
            assert difference.mean() < 0.01


def test_condition_sizes_are_the_pipelines():
    rng = np.random.default_rng(0)
    for area in (384 * 384, 1024 * 1024):
        for height, width in rng.integers(100, 2000, (50, 2)).tolist():
            expected_size = pipeline_qwenimage_edit_plus.calculate_dimensions(area, width / height)
            assert condition_size(height, width, area) == expected_size[::-1]
    assert condition_size(10, 2000, 384 * 384) == (32, 5440)
    plus = QwenEditor(tiny_qwen(PLUS))
    assert plus.condition_area == pipeline_qwenimage_edit_plus.CONDITION_IMAGE_SIZE
    assert QwenEditor(tiny_qwen()).condition_area == 1024 * 1024
    assert QwenEditor(tiny_qwen(), condition_area=640 * 640).condition_area == 640 * 640


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 5, 7), (2, 3, 4, 4)])
def test_distinct_images(shape):
    images = torch.rand(4, *shape, generator=torch.Generator().manual_seed(0)).mul(255).round() / 255
    nearly = images[2].clone()
    nearly[0, ..., -1, -1] += 1 / 255 if nearly[0, ..., -1, -1].max() < 1 else -1 / 255
    swapped = images[3].flip(-1)
    rows, owner = distinct(torch.stack([images[2], images[0], images[2], nearly, images[3], swapped, images[0] + 1e-4]))
    assert rows == [0, 1, 3, 4, 5]
    assert owner == [0, 1, 0, 2, 3, 4, 1]


def test_bad_input_names_argument_and_remedy():
    editor, plus = editor_of(), editor_of(PLUS)
    images = smooth(3, 3, SIDE, SIDE)
    with pytest.raises(ValueError, match=r"images: expected one per prompt \(2\), got 3"):
        editor.encode_text(PROMPTS[:2], images)
    with pytest.raises(ValueError, match=r"images: expected \[P, 3, H, W\], or .*, got \[3, 1, 64, 64\]"):
        editor.encode_text(PROMPTS, images[:, :1])
    with pytest.raises(ValueError, match=r"images: expected 1 to 1 per prompt for QwenImageEditPipeline, got 2; leave"):
        editor.encode_text(PROMPTS, images[:, None].expand(-1, 2, -1, -1, -1))
    with pytest.raises(ValueError, match=r"images: expected 1 to 3 per prompt for QwenImageEditPlusPipeline, got 4"):
        plus.encode_text(PROMPTS, images[:, None].expand(-1, 4, -1, -1, -1))
    with pytest.raises(TypeError, match=r"images: expected one tensor, got a list of sizes 32×64, 64×64; bring all"):
        plus.encode_text(PROMPTS[:2], [images[0], images[0, :, :32]])
    with pytest.raises(ValueError, match=r"prompts: expected at most 96 tokens with their template, got 1\d\d; raise"):
        plus.encode_text([" ".join(["remove"] * 96)])
    with pytest.raises(ValueError, match=r"prompts: expected no image tokens within an instruction, got 'a <"):
        plus.encode_text(["a <|image_pad|>"], images[:1])
