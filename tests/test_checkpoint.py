"""Checkpoints: exact round trips, damage, kills and full disks (real ones, in subprocesses)."""

import os
import random
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch

from mtedit_fast.training.checkpoint import latest, load_checkpoint, save_checkpoint

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def save(directory, step, value=0.0, **options):
    return save_checkpoint(directory, step, {"w": torch.full((5,), value)}, {"step": step}, "tiny", **options)


def test_every_bit_comes_back(tmp_path):
    weights = {str(dtype): (torch.randn(3, 7) * 9).to(dtype) for dtype in DTYPES}
    weights |= {"scalar": torch.tensor(0.1), "empty": torch.empty(0, 4), "transposed": torch.randn(4, 6).T}
    weights["nan"] = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45])
    weights["view"] = weights["nan"][1:]
    python = random.getstate()
    state = {
        "rng": {
            "torch": torch.get_rng_state(),
            "python": python,
            "numpy": np.random.default_rng(3).bit_generator.state,
        },
        "history": [0.1, 1e-300, float("inf"), None, True, "ü", ()],
        "a.b": torch.ones(1),
        "a": {"b": torch.zeros(1)},
    }
    path = save_checkpoint(tmp_path, 12, weights, state, "tiny")
    tensors, restored = load_checkpoint(path, "tiny")
    assert set(tensors) == set(weights)
    for name, tensor in weights.items():
        assert tensors[name].dtype == tensor.dtype
        assert tensors[name].shape == tensor.shape
        assert bits(tensors[name]).equal(bits(tensor)), name
    assert restored["rng"]["torch"].equal(state["rng"]["torch"])
    assert restored["rng"]["python"] == python
    assert restored["rng"]["numpy"] == state["rng"]["numpy"]
    assert restored["history"] == state["history"]
    assert (restored["a.b"].item(), restored["a"]["b"].item()) == (1, 0)


def test_optimizer_continues_bit_for_bit(tmp_path):
    def setup():
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(5, 9), torch.nn.Tanh(), torch.nn.Linear(9, 1))
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.8, 0.95))

    def train(model, optimizer, n):
        for _ in range(n):
            optimizer.zero_grad()
            model(torch.randn(4, 5)).square().mean().backward()
            optimizer.step()

    model, optimizer = setup()
    train(model, optimizer, 3)
    state = {"optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
    path = save_checkpoint(tmp_path, 3, model.state_dict(), state, "tiny")
    train(model, optimizer, 4)

    resumed, resumed_optimizer = setup()
    tensors, state = load_checkpoint(path, "tiny")
    resumed.load_state_dict(tensors)
    resumed_optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    train(resumed, resumed_optimizer, 4)
    assert all(a.equal(b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


def test_newest_are_kept(tmp_path):
    assert latest(tmp_path / "nothing") is None
    assert latest(tmp_path) is None
    for step in (1, 2, 10, 100):
        save(tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010.safetensors", "step-00000100.safetensors"]
    assert latest(tmp_path) == tmp_path / "step-00000100.safetensors"
    save(tmp_path, 20, keep=1)  # resumed from an earlier step: a later checkpoint is not this run's to delete
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000020.safetensors", "step-00000100.safetensors"]
    save(tmp_path, 100, value=7.0, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000100.safetensors"]
    assert load_checkpoint(latest(tmp_path), "tiny").tensors["w"].eq(7).all()
    with pytest.raises(ValueError, match="keep: expected at least 1, got 0"):
        save(tmp_path, 1, keep=0)


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_cut_short(tmp_path, length):
    good = save(tmp_path, 1, value=4.0)
    cut = save(tmp_path, 2)
    os.truncate(cut, length if length >= 0 else cut.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"step-00000002\.safetensors: cut short or damaged"):
        load_checkpoint(cut, "tiny")
    with pytest.warns(UserWarning, match=r"step-00000002.*cut short.*falling back to the one before"):
        assert latest(tmp_path) == good
    assert load_checkpoint(good, "tiny").tensors["w"].eq(4).all()


def test_one_flipped_bit_is_seen(tmp_path):
    path = save(tmp_path, 1)
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged \(its SHA-256 differs"):
        load_checkpoint(path, "tiny")
    with pytest.warns(UserWarning, match="SHA-256"):
        assert latest(tmp_path) is None


def test_wrong_checkpoints(tmp_path):
    path = save(tmp_path, 1)
    with pytest.raises(ValueError, match="another model: expected fingerprint big, got tiny; resume with its own"):
        load_checkpoint(path, "big")
    with pytest.raises(ValueError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "step-00000009.safetensors", "tiny")
    foreign = tmp_path / "adapter.safetensors"
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(2)}, foreign)
    with pytest.raises(ValueError, match="not a training checkpoint"):
        load_checkpoint(foreign, "tiny")
    with pytest.raises(TypeError, match=r"state\.a\.1: expected tensors, numbers, .* got object"):
        save_checkpoint(tmp_path, 2, {}, {"a": [0, object()]}, "tiny")


RUN = """
import sys, torch
from mtedit_fast.training.checkpoint import latest, load_checkpoint, save_checkpoint
folder = sys.argv[1]
"""


def test_full_disk_keeps_the_last_good_checkpoint(tmp_path):
    good = save(tmp_path, 1, value=3.0)
    script = RUN + (
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "try:\n"
        "    save_checkpoint(folder, 2, {'w': torch.zeros(100000)}, {}, 'tiny')\n"
        "except OSError as error:\n"
        "    print(error)\n"
    )
    out = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True).stdout
    assert "checkpoint not saved (File too large); step-00000001.safetensors is kept" in out
    assert list(tmp_path.iterdir()) == [good]
    assert load_checkpoint(latest(tmp_path), "tiny").tensors["w"].eq(3).all()


def test_unwritable_directory_says_so(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OSError, match=r"checkpoint not saved \(File exists\); there is no earlier one"):
        save(file, 1)


def test_killed_while_saving(tmp_path):
    script = RUN + (
        "path = latest(folder)\n"
        "step = load_checkpoint(path, 'tiny').state['step'] if path else 0\n"
        "while True:\n"
        "    step += 1\n"
        "    w = {str(i): torch.full((1000,), float(step)) for i in range(50)}\n"
        "    save_checkpoint(folder, step, w, {'step': step}, 'tiny')\n"
        "    print(step, flush=True)\n"
    )
    reached = 0
    for wait in (0.05, 0.113, 0.171):
        process = subprocess.Popen([sys.executable, "-W", "error", "-c", script, tmp_path], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == f"{reached + 1}\n".encode()
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            path = latest(tmp_path)
        assert path is not None
        tensors, state = load_checkpoint(path, "tiny")
        step = state["step"]
        assert path.name == f"step-{step:08d}.safetensors"
        assert step > reached
        assert all(tensor.eq(step).all() for tensor in tensors.values())
        assert len(tensors) == 50
        reached = step
    save(tmp_path, reached + 1)
    assert not list(tmp_path.glob(".*"))
