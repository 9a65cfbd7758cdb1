"""Image preparation against transformers' processor of PIL images."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPImageProcessorPil, Qwen2VLImageProcessorPil

from mtedit_fast.qwen_vl import ImageSpec, prepare_images

SIZES = [(64, 64), (50, 91), (300, 200), (20, 33), (16, 400), (97, 31)]
PROCESSORS = [
    {"patch_size": 8, "size": {"shortest_edge": 64**2, "longest_edge": 128**2}, "image_std": [0.5, 0.4, 0.25]},
    {"patch_size": 14, "temporal_patch_size": 1, "merge_size": 1},
    {"patch_size": 4, "merge_size": 3, "temporal_patch_size": 3, "size": {"shortest_edge": 100, "longest_edge": 4000}},
]


def smooth(height, width, seed=0):
    """[3, H, W] uint8 without the sharp edges at which PIL clips and rounds by more than a level."""
    coarse = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return (F.interpolate(coarse, (height, width), mode="bilinear")[0] * 200 + 20).round().to(torch.uint8)


def theirs(processor, images):
    out = processor([image.permute(1, 2, 0).numpy() for image in images], return_tensors="pt")
    return out["pixel_values"], out["image_grid_thw"]


def levels(difference, processor):
    """In 255ths of the image's range, whatever the standard deviation."""
    p, t = processor.patch_size, processor.temporal_patch_size
    std = torch.tensor(processor.image_std)[:, None, None, None]
    return (difference.view(-1, 3, t, p, p) * std * 255).abs().max().item()


@pytest.mark.parametrize("options", PROCESSORS)
@pytest.mark.parametrize("quantize", [False, True])
def test_patches_are_those_of_the_processor(options, quantize):
    processor = Qwen2VLImageProcessorPil(**options)
    images = [smooth(*size, seed) for seed, size in enumerate(SIZES)]
    expected, expected_grid = theirs(processor, images)
    patches, grid = prepare_images(images, ImageSpec.from_processor(processor), quantize=quantize)
    assert torch.equal(grid, expected_grid)
    assert patches.shape == expected.shape
    # PIL rounds between rows and columns, and after them: half a level each, the first weighted by bicubic lobes.
    assert levels(patches - expected, processor) <= (1.01 if quantize else 1.25)


@pytest.mark.parametrize("kind", ["uint8", "float", "bf16", "rounded"])
def test_images_that_need_no_resize_agree_exactly(kind):
    processor = Qwen2VLImageProcessorPil(patch_size=8, size={"shortest_edge": 32**2, "longest_edge": 128**2})
    image = torch.randint(0, 256, (3, 48, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected, _ = theirs(processor, [image])
    given = image if kind == "uint8" else image.float() / 255
    if kind == "rounded":  # what a PNG of it would hold
        given = given + 0.4 / 255 * (torch.rand(given.shape, generator=torch.Generator().manual_seed(1)) - 0.5)
    if kind == "bf16":
        given = given.bfloat16()
        expected, _ = theirs(processor, [(given.double() * 255).round().to(torch.uint8)])
    patches, _ = prepare_images([given], ImageSpec.from_processor(processor), quantize=kind in ("rounded", "bf16"))
    torch.testing.assert_close(patches, expected, rtol=0, atol=2e-6)


def test_an_image_depends_on_no_other_one():
    spec = ImageSpec(patch_size=8, min_pixels=32**2, max_pixels=64**2)
    images = [smooth(*size, seed) for seed, size in enumerate(SIZES)]
    together, grid = prepare_images(images, spec)
    alone = [prepare_images([image], spec) for image in images]
    assert torch.equal(together, torch.cat([patches for patches, _ in alone]))
    assert torch.equal(grid, torch.cat([own for _, own in alone]))
    same = torch.stack([smooth(40, 40, seed) for seed in range(3)])
    assert torch.equal(prepare_images(same, spec)[0], prepare_images(list(same), spec)[0])
    strided = same.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(prepare_images(strided, spec)[0], prepare_images(same, spec)[0])


@pytest.mark.parametrize("quantize", [False, True])
def test_dtype_and_gradients(quantize):
    spec = ImageSpec(patch_size=8, min_pixels=32**2, max_pixels=64**2)
    image = smooth(50, 50).float() / 255
    patches, _ = prepare_images([image], spec, quantize=quantize)
    half, _ = prepare_images([image.requires_grad_()], spec, quantize=quantize, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, patches.bfloat16())
    assert not half.requires_grad


@pytest.mark.parametrize("quantize", [False, True])
def test_nan_stays_nan(quantize):
    image = torch.full((3, 40, 40), torch.nan)
    assert prepare_images([image], ImageSpec(patch_size=8), quantize=quantize)[0].isnan().all()


def test_no_images():
    for none in (torch.empty(0, 3, 8, 8), []):
        patches, grid = prepare_images(none, ImageSpec())
        assert patches.shape == (0, 3 * 2 * 16 * 16)
        assert grid.shape == (0, 3)


@pytest.mark.parametrize("options", PROCESSORS)
def test_counts_of_patches_and_tokens(options):
    processor = Qwen2VLImageProcessorPil(**options)
    spec = ImageSpec.from_processor(processor)
    rng = np.random.default_rng(0)
    for height, width in rng.integers(1, 700, (200, 2)).tolist():
        if max(height, width) > 200 * min(height, width):
            continue
        patches = processor.get_number_of_image_patches(height, width)
        frames, rows, columns = spec.grid(height, width)
        assert (frames, rows * columns) == (1, patches)
        assert spec.tokens(height, width) * spec.merge_size**2 == patches
        assert spec.size(height, width) == (rows * spec.patch_size, columns * spec.patch_size)


def test_spec_of_a_folder(tmp_path):
    processor = Qwen2VLImageProcessorPil(**PROCESSORS[0])
    processor.save_pretrained(tmp_path)
    spec = ImageSpec.from_pretrained(str(tmp_path))
    assert spec == ImageSpec.from_processor(processor) == ImageSpec.from_processor(Holder(processor))
    assert spec == ImageSpec(8, 2, 2, 64**2, 128**2, tuple(processor.image_mean), (0.5, 0.4, 0.25))
    config = json.loads((tmp_path / "preprocessor_config.json").read_text())
    del config["size"]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**config, "min_pixels": 3136, "max_pixels": 12544}))
    older = ImageSpec.from_pretrained(str(tmp_path))
    assert (older.min_pixels, older.max_pixels) == (3136, 12544)


class Holder:
    def __init__(self, image_processor):
        self.image_processor = image_processor


def test_processors_of_other_families(tmp_path):
    CLIPImageProcessorPil().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected the image processor Qwen2VLImageProcessor, got 'CLIP"):
        ImageSpec.from_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="got CLIPImageProcessorPil without"):
        ImageSpec.from_processor(CLIPImageProcessorPil())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 0}, "patch_size must be positive"),
        ({"merge_size": -1}, "merge_size must be positive"),
        ({"temporal_patch_size": 0}, "temporal_patch_size must be positive"),
        ({"min_pixels": 0}, "min_pixels must be positive"),
        ({"max_pixels": 100}, "max_pixels must be at least"),
    ],
)
def test_bad_specs(options, message):
    with pytest.raises(ValueError, match=message):
        ImageSpec(**options)


def test_bad_images():
    spec = ImageSpec(patch_size=8)
    with pytest.raises(ValueError, match="ratio of at most 200, got 1 x 500"):
        prepare_images(torch.zeros(1, 3, 1, 500), spec)
    with pytest.raises(ValueError, match="ratio of at most 200, got 0 x 9"):
        spec.tokens(0, 9)
    with pytest.raises(TypeError, match="must be a uint8 or floating-point tensor"):
        prepare_images(torch.zeros(1, 3, 8, 8, dtype=torch.int32), spec)
