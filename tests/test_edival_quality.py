"""The HPSv3 adapter against a package of the same interface."""

import sys

import pytest
import torch

from mtedit_fast.edival.quality import HPSv3, hpsv3

PACKAGE = """
import numpy as np
from PIL import Image

class HPSv3RewardInferencer:
    calls = []

    def __init__(self, device):
        self.device = device

    def reward(self, image_paths, prompts):  # the mean pixel and the prompt's length; (mean, deviation)
        self.calls.append(len(image_paths))
        pixels = [np.asarray(Image.open(path)).mean() for path in image_paths]
        return [(pixel + len(prompt), 1.0) for pixel, prompt in zip(pixels, prompts, strict=True)]
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    (tmp_path / "hpsv3.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)


def test_images_and_instructions_reach_the_model_in_batches(package):
    levels = torch.tensor([0, 51, 255, 102, 204])
    images = (levels / 255)[:, None, None, None].expand(5, 3, 4, 6)
    scorer = HPSv3("cpu", batch_size=2)
    scores = scorer.score(images, ["", "a", "bb", "ccc", "dddd"])
    assert torch.equal(scores, levels.float() + torch.arange(5))
    assert scorer.inferencer.calls == [2, 2, 1]
    assert scorer.inferencer.device == "cpu"
    with pytest.raises(ValueError, match=r"instructions: expected one per image \(5\), got 1"):
        scorer.score(images, ["a"])


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "hpsv3", None)
    with pytest.raises(ImportError, match="pip install hpsv3"):
        hpsv3()
