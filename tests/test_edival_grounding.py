"""Grounding DINO as a detector: against transformers' own processor, and one image at a time."""

import numpy as np
import pytest
import torch
from tiny_detector import tiny_detector, tiny_tokenizer
from transformers import BertConfig, GroundingDinoImageProcessorPil
from transformers.models.grounding_dino.processing_grounding_dino import GroundingDinoProcessor

from mtedit_fast.edival.grounding import GroundingDetector


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module", params=["grounding-dino", "mm-grounding-dino"])
def model(request):
    return tiny_detector(request.param)


QUERIES = ["red metal circle", "Blue square. a sign", "circles"]


def images(n=3, height=45, width=61):
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_shapes_and_order(model, tokenizer):
    found = GroundingDetector(model, tokenizer, shortest_edge=48).detect(images(), QUERIES, box_threshold=0.0)
    assert len(found) == 3
    for detection in found:
        n = len(detection.phrases)
        assert n == 9
        assert detection.boxes.shape == (n, 4)
        assert detection.boxes.dtype == detection.scores.dtype == torch.float32
        assert ((detection.boxes >= 0) & (detection.boxes <= 1)).all()
        assert (detection.scores.diff() <= 0).all()


@pytest.mark.parametrize(("box_threshold", "text_threshold"), [(0.0, None), (0.45, None), (0.4, 0.55), (1.0, 0.5)])
def test_thresholds_are_those_of_transformers(model, tokenizer, box_threshold, text_threshold):
    detector = GroundingDetector(model, tokenizer, shortest_edge=48, batch_size=2)
    processor = GroundingDinoProcessor(GroundingDinoImageProcessorPil(), tokenizer)
    found = detector.detect(images(), QUERIES, box_threshold=box_threshold, text_threshold=text_threshold)
    counts = []
    for i, query in enumerate(QUERIES):
        text = tokenizer(query.lower() + ".", return_tensors="pt", return_token_type_ids=True)
        with torch.no_grad():
            output = model(pixel_values=detector._pixels(images())[i : i + 1], **text)
        truth = processor.post_process_grounded_object_detection(
            output,
            text["input_ids"],
            threshold=box_threshold,
            text_threshold=box_threshold if text_threshold is None else text_threshold,
        )[0]
        order = truth["scores"].argsort(descending=True, stable=True)
        x0, y0, x1, y1 = truth["boxes"][order].unbind(-1)
        boxes = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], -1)
        labels = [truth["text_labels"][j] for j in order.tolist()]
        torch.testing.assert_close(found[i].scores, truth["scores"][order])
        torch.testing.assert_close(found[i].boxes, boxes)
        assert found[i].phrases == [" ".join(s.replace(".", " ").replace("[SEP]", " ").split()) for s in labels]
        counts.append(len(order))
    assert sum(counts) == {0.0: 27, 1.0: 0}.get(box_threshold, sum(counts))
    assert 0 <= sum(counts) <= 27


def test_a_middle_threshold_keeps_some_boxes(model, tokenizer):
    detector = GroundingDetector(model, tokenizer, shortest_edge=48)
    every = detector.detect(images(), QUERIES, box_threshold=0.0)[0].scores
    middle = float((every[3] + every[4]) / 2)
    kept = detector.detect(images(), QUERIES, box_threshold=middle)[0]
    torch.testing.assert_close(kept.scores, every[:4], rtol=0, atol=0)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_batch_equals_one_by_one(model, tokenizer, batch_size):
    detector = GroundingDetector(model, tokenizer, shortest_edge=48, batch_size=batch_size)
    together = detector.detect(images(), QUERIES, box_threshold=0.0)
    for i, query in enumerate(QUERIES):
        alone = detector.detect(images()[i : i + 1], [query], box_threshold=0.0)[0]
        torch.testing.assert_close(together[i].scores, alone.scores, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together[i].boxes, alone.boxes, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(45, 61), (61, 45), (20, 90), (48, 48)])
def test_images_are_prepared_as_transformers_prepares_them(tokenizer, height, width):
    levels = (images(1, height, width) * 255).round()
    ours = GroundingDetector(tiny_detector("grounding-dino"), tokenizer, shortest_edge=48, longest_edge=80)._pixels(
        levels / 255
    )
    processor = GroundingDinoImageProcessorPil(size={"shortest_edge": 48, "longest_edge": 80})
    picture = levels[0].permute(1, 2, 0).to(torch.uint8).numpy()
    truth = torch.from_numpy(np.asarray(processor(picture)["pixel_values"][0]))
    assert ours.shape[1:] == truth.shape
    assert (ours[0] - truth).abs().max() < 1.01 / 255 / 0.224  # PIL rounds to a level after each of two passes


def test_bfloat16_and_a_text_of_dots(model, tokenizer):
    detector = GroundingDetector(model, tokenizer, shortest_edge=48)
    plain, dotted = (detector.detect(images(1), [q], box_threshold=0.0)[0] for q in ("red sign", " RED sign. "))
    torch.testing.assert_close(plain.scores, dotted.scores, rtol=0, atol=0)
    half = GroundingDetector(tiny_detector(model.config.model_type).bfloat16(), tokenizer, shortest_edge=48)
    found = half.detect(images(1).bfloat16(), ["red sign"], box_threshold=0.0)[0]
    assert found.boxes.dtype == found.scores.dtype == torch.float32


def test_a_checkpoint_is_loaded(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = GroundingDetector.from_pretrained(str(tmp_path), dtype=torch.float32, shortest_edge=48)
    truth = GroundingDetector(model, tokenizer, shortest_edge=48).detect(images(), QUERIES, box_threshold=0.0)
    for a, b in zip(loaded.detect(images(), QUERIES, box_threshold=0.0), truth, strict=True):
        torch.testing.assert_close(a.boxes, b.boxes)
        assert a.phrases == b.phrases


def test_bad_input(model, tokenizer):
    detector = GroundingDetector(model, tokenizer, shortest_edge=48)
    with pytest.raises(ValueError, match=r"images must be \[B, 3, H, W\] float"):
        detector.detect(torch.zeros(1, 4, 8, 8), ["sign"])
    with pytest.raises(ValueError, match=r"images must be .*uint8"):
        detector.detect(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["sign"])
    with pytest.raises(ValueError, match="queries must have one entry for each of 3 images, got 1"):
        detector.detect(images(), ["sign"])
    with pytest.raises(ValueError, match=r"queries must each name an object, got ' \. '"):
        detector.detect(images(1), [" . "])
    with pytest.raises(ValueError, match="at most 24 tokens, got 25"):
        detector.detect(images(1), ["red " * 22])
    assert detector.detect(images()[:0], []) == []
    with pytest.raises(ValueError, match="model must be one of grounding-dino, mm-grounding-dino, got bert"):
        GroundingDetector(type("Model", (), {"config": BertConfig()})(), tokenizer)
    with pytest.raises(ValueError, match=r"shortest_edge must be in 1\.\.longest_edge"):
        GroundingDetector(model, tokenizer, shortest_edge=2000)
