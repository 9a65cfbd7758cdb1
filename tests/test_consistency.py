"""Content consistency against a per-image loop in fp64, written from EdiVal's definition."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import Dinov2Config, Dinov2Model, DINOv3ViTConfig, DINOv3ViTModel

from mtedit_fast.edival import ContentConsistency
from mtedit_fast.edival.consistency import IMAGENET_MEAN, IMAGENET_STD
from mtedit_fast.ops import token_similarity

B, K, H, W = 3, 2, 45, 61
NAN = math.nan


def dinov2(layers: int = 2) -> Dinov2Model:
    torch.manual_seed(0)
    return Dinov2Model(
        Dinov2Config(hidden_size=32, num_hidden_layers=layers, num_attention_heads=2, image_size=40, patch_size=8)
    ).eval()


def dinov3() -> DINOv3ViTModel:
    torch.manual_seed(1)
    return DINOv3ViTModel(
        DINOv3ViTConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=40,
            patch_size=8,
            num_register_tokens=4,
        )
    ).eval()


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def truth(
    model,
    references,
    edits,
    unchanged,
    found_references,
    found_edits,
    changed,
    owner,
    image_size,
    crop_size,
    filter="bicubic",
    compat_grid=None,
):
    """One chain, one turn, one box at a time. compat_grid: the rows and columns of patches and registers together."""
    model = copy.deepcopy(model).double()
    registers = 0 if compat_grid else getattr(model.config, "num_register_tokens", 0)
    mean = torch.tensor(IMAGENET_MEAN, dtype=torch.float64)[:, None, None]
    std = torch.tensor(IMAGENET_STD, dtype=torch.float64)[:, None, None]

    def tokens(image, size):
        image = F.interpolate(image.double()[None], (size, size), mode=filter, antialias=True)[0]
        with torch.no_grad():
            hidden = model(pixel_values=((image - mean) / std)[None]).last_hidden_state[0]
        return hidden[0], hidden[1 + registers :]

    def cut(image, box):
        cx, cy, w, h = box
        x0, x1 = round((cx - w / 2) * W), round((cx + w / 2) * W)
        y0, y1 = round((cy - h / 2) * H), round((cy + h / 2) * H)
        return image[:, y0:y1, x0:x1]

    scores = torch.full((3, len(edits), K), NAN, dtype=torch.float64)
    for b in range(len(edits)):
        for k in range(K):
            if changed[b][k]:
                continue
            source, edited = references[owner[b]], edits[b, k]
            parts = []
            for box in unchanged[b][k]:
                (cls0, patch0), (cls1, patch1) = (
                    tokens(cut(source, box), crop_size),
                    tokens(cut(edited, box), crop_size),
                )
                parts.append(0.5 * cosine(cls0, cls1) + 0.5 * cosine(patch0.mean(0), patch1.mean(0)))
            scores[1, b, k] = sum(parts) / len(parts) if parts else NAN
            keep = torch.ones(H, W, dtype=torch.float64)
            for cx, cy, w, h in [*found_references[owner[b]], *found_edits[b][k]]:
                keep[
                    round((cy - h / 2) * H) : round((cy + h / 2) * H), round((cx - w / 2) * W) : round((cx + w / 2) * W)
                ] = 0
            rows, columns = compat_grid or (image_size // 8, image_size // 8)
            _, patch0 = tokens(source, image_size)
            _, patch1 = tokens(edited, image_size)
            sums, total = [torch.zeros(32).double(), torch.zeros(32).double()], 0.0
            for row in range(rows):
                for column in range(columns):
                    y0, y1 = row * H // rows, -(-(row + 1) * H // rows)
                    x0, x1 = column * W // columns, -(-(column + 1) * W // columns)
                    weight = keep[y0:y1, x0:x1].mean().item()
                    if weight >= 0.5:
                        total += weight
                        for i, patch in enumerate((patch0, patch1)):
                            token = patch[row * columns + column]
                            sums[i] += weight * token / token.norm()
            scores[2, b, k] = cosine(sums[0] / total, sums[1] / total) if total else NAN
            scores[0, b, k] = (scores[1, b, k] + scores[2, b, k]) / 2
    return scores


def scene():
    generator = torch.Generator().manual_seed(7)
    references = torch.rand(2, 3, H, W, generator=generator)
    owner = [1, 0, 1]
    edits = (references[owner][:, None] + 0.3 * torch.randn(B, K, 3, H, W, generator=generator)).clamp(0, 1)
    one, two, all_of_it = [0.3, 0.4, 0.25, 0.41], [0.71, 0.5, 0.3, 0.9], [0.5, 0.5, 1.0, 1.0]
    unchanged = [[[one, two], [one]], [[two], []], [[one], [one]]]
    found_references = [[two], [one, two]]
    found_edits = [[[one], []], [[], [one]], [[all_of_it], [two]]]
    changed = torch.tensor([[False, False], [False, False], [False, True]])
    return references, edits, unchanged, found_references, found_edits, changed, owner


def assert_equal(result, expected, tolerance=1e-5):
    for ours, exact in zip(result, expected, strict=True):
        assert ours.shape == (B, K)
        assert ours.dtype == torch.float32
        assert torch.equal(ours.isnan(), exact.isnan())
        assert torch.allclose(ours.double(), exact.double(), rtol=0, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("build", [dinov2, dinov3])
@pytest.mark.parametrize(
    ("image_size", "crop_size", "filter", "max_tokens"),
    [(None, None, "bicubic", None), (48, 24, "bicubic", 100), (32, 40, "bilinear", 1)],
)
def test_matches_the_plain_loop(build, image_size, crop_size, filter, max_tokens):
    model = build()
    *inputs, changed, owner = scene()
    metric = ContentConsistency(model, image_size=image_size, crop_size=crop_size, filter=filter, max_tokens=max_tokens)
    result = metric(*inputs, background_changed=changed, owner=owner)
    expected = truth(model, *inputs, changed, owner, image_size or 40, crop_size or 40, filter)
    assert_equal(result, expected)
    assert result.score.isnan().tolist() == [[False, False], [False, True], [True, True]]
    assert result.object.isnan().tolist() == [[False, False], [False, True], [False, True]]
    assert result.background.isnan().tolist() == [[False, False], [False, False], [True, True]]


def test_an_untouched_image_scores_one_and_defaults_hold():
    references, *_ = scene()
    edits = references[:, None].repeat(1, K, 1, 1, 1)
    boxes = [[[[0.5, 0.5, 0.4, 0.4]]] * K] * 2
    result = ContentConsistency(dinov2())(references, edits, boxes, [[]] * 2, [[torch.empty(0, 4)] * K] * 2)
    assert torch.allclose(result.score, torch.ones(2, K), atol=1e-5)


def test_no_object_anywhere():
    references, *_ = scene()
    empty = [[[]] * K] * 2
    result = ContentConsistency(dinov2())(references, references[:, None].repeat(1, K, 1, 1, 1), empty, [[]] * 2, empty)
    assert result.object.isnan().all()
    assert result.score.isnan().all()
    assert torch.allclose(result.background, torch.ones(2, K), atol=1e-5)


def test_own_normalisation_is_used():
    references, *rest, owner = scene()
    plain = ContentConsistency(dinov2())(references, *rest[:-1], owner=owner)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    old_mean, old_std, new_mean, new_std = (
        torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD, mean, std)
    )
    moved = [(x - old_mean) / old_std * new_std + new_mean for x in (references, rest[0])]
    own = ContentConsistency(dinov2(), mean=mean, std=std)(*moved, *rest[1:-1], owner=owner)
    assert torch.allclose(plain.score, own.score, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(("image_size", "grid"), [(32, (4, 5)), (40, (1, 29)), (48, (5, 8))])
def test_edival_compat_scrambles_registers_and_patches(image_size, grid):
    """16, 25 and 36 patches with four registers before them are laid out as 4 × 5, 1 × 29 and 5 × 8 tokens."""
    model = dinov3()
    *inputs, changed, owner = scene()
    metric = ContentConsistency(model, image_size=image_size, registers="edival_compat")
    result = metric(*inputs, background_changed=changed, owner=owner)
    expected = truth(model, *inputs, changed, owner, image_size, 40, compat_grid=grid)
    expected[1, 1, 1], expected[0, 1, 1] = 0.0, expected[2, 1, 1] / 2  # nothing unchanged was found
    assert_equal(result, expected)
    plain = ContentConsistency(model, image_size=image_size)(*inputs, background_changed=changed, owner=owner)
    assert (plain.background - result.background).abs().nan_to_num().max() > 1e-3


@pytest.mark.parametrize("registers", ["drop", "edival_compat"])
def test_nothing_unchanged_differs_from_nothing_found(registers):
    references, edits, unchanged, *found, _, owner = scene()
    for nothing in ([], torch.zeros(0, 4)):
        unchanged[0], unchanged[1] = [None, None], [nothing, None]
        metric = ContentConsistency(dinov3(), registers=registers)
        result = metric(references, edits, unchanged, *found, owner=owner)
        assert result.object[0].isnan().all()
        assert result.object[1, 1].isnan()
        assert torch.equal(result.score.isnan(), result.object.isnan() | result.background.isnan())
        if registers == "drop":
            assert result.object[1, 0].isnan()
        else:
            assert result.object[1, 0] == 0
            assert result.score[1, 0] == result.background[1, 0] / 2


def test_edival_compat_of_a_model_without_registers():
    references, edits, unchanged, *found, _, owner = scene()
    unchanged[1][1] = None
    plain, compat = (
        ContentConsistency(dinov2(), registers=r)(references, edits, unchanged, *found, owner=owner)
        for r in ("drop", "edival_compat")
    )
    for one, other in zip(plain, compat, strict=True):
        assert torch.equal(one.nan_to_num(-9), other.nan_to_num(-9))


def forwards(model) -> list[int]:
    """The number of images of every forward from now on."""
    seen = []
    model.register_forward_pre_hook(lambda _, args, given: seen.append(len(given["pixel_values"])), with_kwargs=True)
    return seen


def test_a_reference_is_embedded_once_for_a_group_of_16_by_3_turns():
    group, turns, model = 16, 3, dinov2()
    seen = forwards(model)
    references = torch.rand(2, 3, H, W)
    edits = torch.rand(2 * group, turns, 3, H, W)
    one, two, three = [0.3, 0.4, 0.2, 0.2], [0.6, 0.6, 0.3, 0.5], [0.8, 0.3, 0.2, 0.1]
    unchanged = [[[one, two, three], [one, two], [two]]] * group + [[[one], [one], []]] * group
    owner = [0] * group + [1] * group
    ContentConsistency(model)(references, edits, unchanged, [[one]] * 2, [[[two]] * turns] * 2 * group, owner=owner)
    images = 2 + 2 * group * turns
    crops = (3 + 1) + group * (3 + 2 + 1) + group * (1 + 1)
    assert seen == [images + crops]
    seen.clear()
    metric = ContentConsistency(model, crop_size=24, max_tokens=1000)
    metric(references, edits, unchanged, [[one]] * 2, [[[two]] * turns] * 2 * group, owner=owner)
    per_forward = (1000 // 26, 1000 // 10)  # of 1 + 25 and 1 + 9 tokens
    assert seen == [
        count
        for total, most in zip((images, crops), per_forward, strict=True)
        for count in [most] * (total // most) + [total % most]
    ]


def test_what_no_score_needs_is_not_embedded():
    model = dinov2()
    seen = forwards(model)
    references, edits, unchanged, *found, _, _ = scene()
    metric = ContentConsistency(model)
    changed = torch.tensor([[False, True], [True, True], [True, True]])
    metric(references, edits, unchanged, *found, background_changed=changed, owner=[1, 0, 0])
    assert seen == [1 + 1 + 2 + 2]  # reference 1 and an edit of it, two boxes in both
    seen.clear()
    result = metric(references, edits, unchanged, *found, background_changed=torch.ones(B, K).bool(), owner=[1, 0, 0])
    assert seen == []
    assert all(part.isnan().all() for part in result)
    nothing = metric(references, edits[:0], [], found[0], [], owner=[])
    assert [list(part.shape) for part in nothing] == [[0, K]] * 3


def test_uint8_images():
    references, edits, *rest, _, owner = scene()
    references, edits = ((255 * x).round().byte() for x in (references, edits))
    metric = ContentConsistency(dinov2())
    expected = metric(references / 255, edits / 255, *rest, owner=owner)
    assert_equal(metric(references, edits, *rest, owner=owner), expected)


def test_bf16_model():
    *inputs, owner = [x for i, x in enumerate(scene()) if i != 5]
    exact = ContentConsistency(dinov3())(*inputs, owner=owner)
    metric = ContentConsistency(dinov3().to(torch.bfloat16))
    assert_equal(metric(*inputs, owner=owner), exact, tolerance=0.02)


def test_compiled_model():
    *inputs, owner = [x for i, x in enumerate(scene()) if i != 5]
    metric = ContentConsistency(dinov2(layers=1), compile=True)
    assert_equal(metric(*inputs, owner=owner), ContentConsistency(dinov2(layers=1))(*inputs, owner=owner))


def test_a_dense_reward_reaches_the_edits():
    """The example of token_similarity's docstring, its gradient along a direction against a finite difference."""
    model = dinov2().double()
    references, edits, direction = torch.randn(3, 2, 3, 40, 40, dtype=torch.float64)
    owner, keep = torch.tensor([1, 1]), torch.rand(2, 25, dtype=torch.float64)
    pairs = torch.stack([owner, torch.arange(len(edits))], 1)
    before = model(pixel_values=references).last_hidden_state[:, 1:].detach()

    def reward(pixels):
        after = model(pixel_values=pixels).last_hidden_state[:, 1:]
        return token_similarity(before, after, pairs, weights=keep, normalize=True).sum()

    (gradient,) = torch.autograd.grad(reward(edits.requires_grad_()), edits)
    step = 1e-6 * direction
    with torch.no_grad():
        slope = (reward(edits + step) - reward(edits - step)) / 2e-6
    assert abs((gradient * direction).sum() - slope) < 1e-6 * max(1, abs(slope))
    assert abs(slope) > 1e-4


def test_bad_input_is_named():
    references, edits, unchanged, found_references, found_edits, changed, owner = scene()
    metric = ContentConsistency(dinov2())
    with pytest.raises(ValueError, match="crop_size must be a multiple of the model's patch size 8, got 20"):
        ContentConsistency(dinov2(), crop_size=20)
    for options, message in (
        ({"registers": "keep"}, "registers must be 'drop' or 'edival_compat', got 'keep'"),
        ({"filter": "nearest"}, "filter must be 'bicubic' or 'bilinear', got 'nearest'"),
        ({"max_tokens": 0}, "max_tokens must be >= 1, got 0"),
        ({"image_size": 41}, "image_size must be a multiple of the model's patch size 8, got 41"),
    ):
        with pytest.raises(ValueError, match=message):
            ContentConsistency(dinov2(), **options)
    with pytest.raises(TypeError, match=r"references must be float in \[0, 1\] or uint8, got torch.int64"):
        metric(references.long(), edits, unchanged, found_references, found_edits, owner=owner)
    with pytest.raises(ValueError, match="edits must be on the model's device cpu, got meta"):
        metric(references, edits.to("meta"), unchanged, found_references, found_edits, owner=owner)
    with pytest.raises(ValueError, match=r"references and edits must be \[R, 3, H, W\]"):
        metric(references[..., 1:], edits, unchanged, found_references, found_edits, owner=owner)
    with pytest.raises(ValueError, match="owner must give each of 3 chains one of 2 references"):
        metric(references, edits, unchanged, found_references, found_edits)
    with pytest.raises(ValueError, match="owner must give each of 3 chains"):
        metric(references, edits, unchanged, found_references, found_edits, owner=[0, 1, 2])
    with pytest.raises(ValueError, match=r"unchanged must be \[3\]\[2\] boxes"):
        metric(references, edits, unchanged[:2], found_references, found_edits, owner=owner)
    with pytest.raises(ValueError, match=r"found_edits must be \[3\]\[2\] boxes"):
        metric(references, edits, unchanged, found_references, [[[]], [[]], [[]]], owner=owner)
    with pytest.raises(ValueError, match="found_references must have 2 entries, got 1"):
        metric(references, edits, unchanged, found_references[:1], found_edits, owner=owner)
    with pytest.raises(ValueError, match=r"background_changed must be \[3, 2\]"):
        metric(references, edits, unchanged, found_references, found_edits, owner=owner, background_changed=changed[:1])


@pytest.mark.parametrize("name", ["unchanged", "found_references", "found_edits"])
@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([0.5, math.nan, 0.1, 0.1], r"must be finite, with w and h >= 0, got \[0.5, nan, 0.1, 0.1\]"),
        ([0.5, 0.5, -0.1, 0.1], r"must be finite, with w and h >= 0, got \[0.5, 0.5, -0.1, 0.1\]"),
        ([0.5, math.inf, 0.1, 0.1], r"must be finite"),
        ([0.5, 0.5, 0.1], r"must be lists of \(cx, cy, w, h\), got shape \[1, 3\] in list 0"),
    ],
)
def test_bad_boxes_are_named(name, box, message):
    references, edits, unchanged, found_references, found_edits, _, owner = scene()
    given = {"unchanged": unchanged, "found_references": found_references, "found_edits": found_edits}
    if name == "found_references":
        given[name][0] = [box]
    else:
        given[name][0][0] = [box]
    with pytest.raises(ValueError, match=f"^{name} {message}"):
        ContentConsistency(dinov2())(references, edits, **given, owner=owner)


def test_a_model_with_other_tokens_is_refused():
    model = dinov3()
    model.config.num_register_tokens = 2
    references, edits, *rest, _, owner = scene()
    with pytest.raises(ValueError, match="model must return 28 tokens, CLS, 2 registers and one per patch of 8 pixels"):
        ContentConsistency(model)(references, edits, *rest, owner=owner)
