"""The README's Python examples run, in order, in one namespace."""

import re
from pathlib import Path

import torch

from mtedit_fast.training.rewards import RewardBatch

README = Path(__file__).parents[1] / "README.md"


def test_every_python_example_runs():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) >= 5
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    log_probs = namespace["log_probs"]
    assert [None if p is None else tuple(p.shape) for p in log_probs] == [(2,)] * 5 + [None]
    edits = torch.rand(2, 3, 3, 8, 8)
    batch = RewardBatch(references=edits[:, 0], edits=edits, instructions=[["a", "b", "c"]] * 2)
    assert namespace["brightness"](batch).shape == (2, 3)


def test_files_it_names_are_there():
    for link in re.findall(r"\]\(([^)#]+)\)", README.read_text(encoding="utf-8")):
        assert (README.parent / link).exists(), link
