"""EDM preconditioning, masks and patches as channels, and denoisers on disk."""

import math

import pytest
import torch
from test_onestep_sampling import INPAINTING, denoiser, unet
from torch import nn

from mtedit_fast.onestep import (
    Corruption,
    EDMDenoiser,
    Stream,
    image_seeds,
    load_denoiser,
    loss_weight,
    new_unet,
    preconditioning,
    save_denoiser,
)
from mtedit_fast.ops import seeded_noise
from mtedit_fast.training.onestep.run import load_source


def test_preconditioning_is_table_1():
    for sigma in (0.002, 0.5, 80.0):
        c = preconditioning(torch.tensor(sigma, dtype=torch.float64))
        assert c.skip.item() == pytest.approx(0.25 / (sigma**2 + 0.25), rel=1e-14)
        assert c.out.item() == pytest.approx(sigma * 0.5 / math.sqrt(sigma**2 + 0.25), rel=1e-14)
        assert c.input.item() == pytest.approx(1 / math.sqrt(sigma**2 + 0.25), rel=1e-14)
        assert c.noise.item() == pytest.approx(math.log(sigma) / 4, rel=1e-14)
        assert (loss_weight(torch.tensor(sigma, dtype=torch.float64)) * c.out**2).item() == pytest.approx(1, rel=1e-14)
    other = preconditioning(torch.tensor(1.0), sigma_data=1.0)
    assert [round(v.item(), 6) for v in other] == [0.5, round(0.5**0.5, 6), round(0.5**0.5, 6), 0]


class Recorder(nn.Module):
    """Returns a constant, and what it was called with."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x, label):
        self.seen = x, label
        return torch.full((len(x), 3, *x.shape[2:]), 2.0, dtype=x.dtype)


@pytest.mark.parametrize("sigma", [torch.tensor(0.7), torch.tensor([0.7, 0.7]), torch.tensor([0.1, 30.0])])
def test_the_denoiser(sigma):
    network, x = Recorder(), torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    got = EDMDenoiser(network)(x, sigma)
    for i, s in enumerate(sigma.expand(2).tolist()):
        c = [v.item() for v in preconditioning(torch.tensor(s).double())]
        torch.testing.assert_close(got[i], c[0] * x[i] + c[1] * 2)
        torch.testing.assert_close(network.seen[0][i], c[2] * x[i])
        assert network.seen[1][i].item() == pytest.approx(c[3], rel=1e-6)


def test_the_mask_is_a_channel_of_its_own():
    network, x, mask = Recorder(), torch.ones(2, 3, 4, 4), torch.tensor([1.0, 0, 1, 1]).view(1, 1, 1, 4)
    EDMDenoiser(network)(x, torch.tensor(1.0), mask)
    assert network.seen[0].shape == (2, 4, 4, 4)
    assert network.seen[0][:, 3].equal(mask.expand(2, 1, 4, 4)[:, 0])


@pytest.mark.parametrize("sigma", [0.002, 2.5, 80.0])
def test_of_hidden_pixels_the_network_says_all(sigma):
    network, mask = Recorder(), torch.tensor([1.0, 0, 1, 0]).view(1, 1, 1, 4).expand(2, 1, 4, 4)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * mask
    got = EDMDenoiser(network, hides_pixels=True)(x, torch.tensor(sigma), mask)
    seen = EDMDenoiser(network)(x, torch.tensor(sigma), mask)
    torch.testing.assert_close(got, torch.where(mask > 0, seen, 2 * 0.5))  # σ_d


def test_who_hides_pixels():
    kinds = {name: Corruption([{"name": name}]) for name in ("noise", "inpainting", "box", "blur", "mri")}
    assert [name for name, corruption in kinds.items() if corruption.hides_pixels] == ["inpainting", "box"]
    for corruption in kinds.values():
        operator = corruption.operator(torch.arange(2), (16, 16))
        assert operator.hides_pixels == corruption.hides_pixels


def test_patches_are_channels():
    class Echo(Recorder):
        def forward(self, x, label):
            self.seen = x
            return x[:, :12]

    network, x = Echo(), torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    mask = torch.randint(0, 2, (2, 1, 4, 6), generator=torch.Generator().manual_seed(1)).float()
    sigma = torch.tensor([0.3, 2.0])
    got, c = EDMDenoiser(network, patch=2)(x, sigma, mask), preconditioning(sigma.view(-1, 1, 1, 1))
    torch.testing.assert_close(got, (c.skip + c.out * c.input) * x)  # every pixel is where it was
    assert network.seen.shape == (2, 16, 2, 3)
    assert network.seen[:, 12:].equal(mask.view(2, 2, 2, 3, 2).permute(0, 2, 4, 1, 3).flatten(1, 2))


def test_a_network_of_patches_is_saved_and_drawn_from(tmp_path):
    network = new_unet(16, 3, masked=False, widths=(8, 16), layers=1, attention=4, seed=0, patch=2)
    assert network.config.in_channels == network.config.out_channels == 12
    assert network.config.down_block_types == ("DownBlock2D", "AttnDownBlock2D")
    model = EDMDenoiser(network.eval(), patch=2)
    save_denoiser(tmp_path, model, Corruption(), {"sigma_init": 2.5, "shape": [3, 16, 16]})
    loaded, seed = load_denoiser(tmp_path), image_seeds(0, torch.arange(2))
    assert loaded.denoiser.patch == 2
    again = save_denoiser(tmp_path / "again", loaded.denoiser, loaded.corruption, loaded.card)
    for name in ("config.json", "onestep.json"):  # no trace of the folder it was read from
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes()
    latents = 2.5 * seeded_noise(seed, (3, 16, 16), Stream.LATENT)
    with torch.no_grad():
        wanted = model(latents, torch.tensor(2.5))
    torch.testing.assert_close(load_source(tmp_path)(seed), wanted, atol=1e-5, rtol=1e-5)


def test_the_network_has_a_precision_of_its_own():
    network = Recorder().to(torch.bfloat16)
    got = EDMDenoiser(network)(torch.ones(1, 3, 4, 4), torch.tensor(0.5))
    assert network.seen[0].dtype == network.seen[1].dtype == torch.bfloat16
    assert got.dtype == torch.float32


def test_wrong_levels_are_refused():
    with pytest.raises(ValueError, match=r"sigma: expected one number or one per image \(2\), got \[3\]"):
        denoiser()(torch.ones(2, 3, 16, 16), torch.ones(3))


@pytest.mark.parametrize("corruption", [Corruption([], 0.2), INPAINTING], ids=["noise", "inpainting"])
def test_saved_and_loaded(tmp_path, corruption):
    mine = denoiser(masked=corruption.random)
    mine.sigma_data, mine.hides_pixels = 0.4, corruption.hides_pixels
    save_denoiser(tmp_path / "model", mine, corruption, {"shape": [3, 16, 16]})
    loaded, known, card = load_denoiser(tmp_path / "model")
    assert known.describe() == corruption.describe()
    assert (loaded.sigma_data, loaded.hides_pixels, card["shape"]) == (0.4, corruption.hides_pixels, [3, 16, 16])
    for a, b in zip(mine.parameters(), loaded.parameters(), strict=True):
        assert a.equal(b)
    assert next(load_denoiser(tmp_path / "model", dtype=torch.bfloat16).denoiser.parameters()).dtype == torch.bfloat16


def test_any_unet_in_edms_convention_is_a_teacher_of_clean_images(tmp_path):
    unet().save_pretrained(str(tmp_path))
    loaded, corruption, card = load_denoiser(tmp_path)
    assert (loaded.sigma_data, corruption.sigma, card) == (0.5, 0.0, {})
    assert load_source(tmp_path).shape == (3, 16, 16)


def test_what_is_no_denoiser(tmp_path):
    with pytest.raises(ValueError, match=r"folder: expected a UNet2DModel .* has no config.json"):
        load_denoiser(tmp_path)
    (tmp_path / "edm.pkl").write_bytes(b"")
    with pytest.raises(ValueError, match="NVIDIA's pickles are not read"):
        load_denoiser(tmp_path / "edm.pkl")
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(ValueError, match="got AutoencoderKL"):
        load_denoiser(tmp_path)
