"""The corrupted images that one-step restoration is trained on: measured once, read from files, or refused."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from mtedit_fast.onestep import Corruption
from mtedit_fast.training.onestep.config import load_onestep_config
from mtedit_fast.training.onestep.data import CorruptedImages, Part, load_data, part_seed
from mtedit_fast.training.playground.rsd import shapes


def test_measurements_are_made_once_and_for_all():
    data = CorruptedImages(shapes(24, 0)[:, :, ::4, ::4], Corruption([], 0.2))
    one, other = data[torch.arange(6)][0], data[torch.tensor([5, 0])][0]
    assert other.equal(one[[5, 0]])
    noise = one - data.clean(torch.arange(6))
    assert 0.18 < noise.std().item() < 0.22
    assert not CorruptedImages(data.images, data.corruption, seed=1)[torch.arange(6)][0].equal(one)


def test_every_image_is_used_once_per_epoch():
    data = CorruptedImages(torch.zeros(10, 1, 4, 4), Corruption())
    order = torch.cat([data.order(start, 4, seed=3) for start in range(0, 40, 4)])
    assert order.equal(data.order(0, 40, seed=3))
    for epoch in order.split(10):
        assert epoch.sort().values.tolist() == list(range(10))
    assert not order[:10].equal(order[10:20])
    assert not data.order(0, 10, seed=4).equal(order[:10])


def test_parts_never_share_seeds():
    seeds = {part_seed(seed, part) for seed in range(20) for part in Part}
    assert len(seeds) == 20 * len(Part)


def write(folder, name, size=(8, 8)):
    folder.mkdir(exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), 200, np.uint8)).save(folder / name)


def folder_config(path, **more):
    return {"data": {"path": str(path), **more}}


def read(path, **more):
    settings = load_onestep_config(folder_config(path, **more))
    return load_data(settings.data, settings.corruption.build())


def test_a_folder(tmp_path):
    for name in ("b.png", "a.png", "c.jpg"):
        write(tmp_path / "images", name)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "images" / "0.png")  # grey
    (tmp_path / "images" / "notes.txt").write_text("no image")
    data = read(tmp_path / "images")
    assert (len(data), data.shape) == (4, (3, 8, 8))
    assert data.clean(torch.arange(2))[:, 0, 0, 0].tolist() == [-1.0, pytest.approx(200 / 127.5 - 1)]
    assert len(read(tmp_path / "images", count=2)) == 2


def test_unreadable_files_are_counted_and_named(tmp_path):
    write(tmp_path / "images", "good.png")
    (tmp_path / "images" / "bad.png").write_bytes(b"\x89PNG")
    (tmp_path / "images" / "empty.jpg").write_bytes(b"")
    write(tmp_path / "images", "cut.png", (64, 64))
    cut = tmp_path / "images" / "cut.png"
    cut.write_bytes(cut.read_bytes()[:60])
    with pytest.warns(UserWarning, match=r"3 of 4 images unreadable, left out: bad.png \(.*cut.png .*empty.jpg"):
        assert len(read(tmp_path / "images")) == 1


def test_folders_that_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no readable images"):
        read(tmp_path / "empty")
    write(tmp_path / "mixed", "a.png")
    write(tmp_path / "mixed", "b.png", (8, 6))
    with pytest.raises(ValueError, match=r"one size, got 8×8 \(a.png\) and 8×6 \(b.png\)"):
        read(tmp_path / "mixed")
    with pytest.raises(ValueError, match=r"data.path: expected a folder, .npy, .npz or module:function"):
        read(tmp_path / "none")
    with pytest.raises(ValueError, match="cannot be imported"):
        read("no_such_module:images", count=3)
    with pytest.raises(ValueError, match=r"data.count: expected how many"):
        read("mtedit_fast.training.playground.rsd:shapes")


def test_arrays(tmp_path):
    pixels = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    np.savez(tmp_path / "a.npz", pixels)
    assert read(tmp_path / "a.npz").clean(torch.arange(2)).shape == (2, 3, 4, 4)
    floats = np.zeros((3, 2, 4, 4), np.float32)
    np.save(tmp_path / "b.npy", floats)
    assert read(tmp_path / "b.npy").shape == (2, 4, 4)
    np.save(tmp_path / "c.npy", np.zeros((3, 4), np.float32))
    with pytest.raises(ValueError, match="expected uint8"):
        read(tmp_path / "c.npy")
    (tmp_path / "d.npz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"d.npz: cannot be read"):
        read(tmp_path / "d.npz")


@pytest.mark.parametrize(("stated", "warned"), [(0.2, False), (0.05, True), (0.5, True)])
def test_noise_that_contradicts_the_configuration_is_warned_about(stated, warned):
    smooth = torch.linspace(-1, 1, 32).view(1, 1, 32, 1).expand(4, 3, 32, 32)
    noisy = smooth + 0.2 * torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = CorruptedImages(noisy, Corruption([], stated), measured=True)
    assert [
        f"corruption.sigma: {stated:g}, but the images' noise is estimated at 0.2" in str(w.message) for w in caught
    ] == ([True] if warned else [])
    assert data[torch.arange(2)][0].equal(noisy[:2])  # not corrupted again
