"""Content consistency against a per-image loop in fp64, written from EdiVal's definition."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import Dinov2Config, Dinov2Model, DINOv3ViTConfig, DINOv3ViTModel

from mtedit_fast.edival import ContentConsistency
from mtedit_fast.edival.consistency import IMAGENET_MEAN, IMAGENET_STD, pixel_box

B, K, H, W = 3, 2, 45, 61
NAN = math.nan


def dinov2() -> Dinov2Model:
    torch.manual_seed(0)
    return Dinov2Model(
        Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=40, patch_size=8)
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


def truth(model, references, edits, unchanged, found_references, found_edits, changed, owner, image_size, crop_size):
    """One chain, one turn, one box at a time."""
    model = copy.deepcopy(model).double()
    registers = getattr(model.config, "num_register_tokens", 0)
    mean = torch.tensor(IMAGENET_MEAN, dtype=torch.float64)[:, None, None]
    std = torch.tensor(IMAGENET_STD, dtype=torch.float64)[:, None, None]

    def tokens(image, size):
        image = F.interpolate(image.double()[None], (size, size), mode="bicubic", antialias=True)[0]
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
            n = image_size // 8
            _, patch0 = tokens(source, image_size)
            _, patch1 = tokens(edited, image_size)
            sums, total = [torch.zeros(32).double(), torch.zeros(32).double()], 0.0
            for row in range(n):
                for column in range(n):
                    y0, y1 = row * H // n, -(-(row + 1) * H // n)
                    x0, x1 = column * W // n, -(-(column + 1) * W // n)
                    weight = keep[y0:y1, x0:x1].mean().item()
                    if weight >= 0.5:
                        total += weight
                        for i, patch in enumerate((patch0, patch1)):
                            token = patch[row * n + column]
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


@pytest.mark.parametrize("build", [dinov2, dinov3])
@pytest.mark.parametrize(("image_size", "crop_size", "batch_size"), [(None, None, 256), (48, 24, 3)])
def test_matches_the_plain_loop(build, image_size, crop_size, batch_size):
    model = build()
    *inputs, changed, owner = scene()
    metric = ContentConsistency(model, image_size=image_size, crop_size=crop_size, batch_size=batch_size)
    result = metric(*inputs, background_changed=changed, owner=owner)
    expected = truth(model, *inputs, changed, owner, image_size or 40, crop_size or 40)
    for ours, exact in zip(result, expected, strict=True):
        assert ours.shape == (B, K)
        assert ours.dtype == torch.float32
        assert torch.equal(ours.isnan(), exact.isnan())
        assert torch.allclose(ours.double(), exact, rtol=0, atol=1e-5, equal_nan=True)
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


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((0.5, 0.5, 1.0, 1.0), (0, H, 0, W)),
        ((0.0, 0.0, 0.5, 0.5), (0, 11, 0, 15)),
        ((1.0, 1.0, 0.001, 0.001), (H - 1, H, W - 1, W)),
        ((-3.0, 0.5, 0.1, 2.0), (0, H, 0, 1)),
    ],
)
def test_boxes_are_clipped_and_never_empty(box, expected):
    assert pixel_box(box, H, W) == expected


def test_bad_input_is_named():
    references, edits, unchanged, found_references, found_edits, changed, owner = scene()
    metric = ContentConsistency(dinov2())
    with pytest.raises(ValueError, match="crop_size must be a multiple of the model's patch size 8, got 20"):
        ContentConsistency(dinov2(), crop_size=20)
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
