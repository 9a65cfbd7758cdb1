"""Philox against Random123's vectors, Box–Muller against fp64, and the same bits from every back end."""

import math

import pytest
import torch
from op_backends import DEVICES
from torch import Tensor

from mtedit_fast.ops import seeded_noise
from mtedit_fast.ops.seeded_noise import box_muller, philox4x32

SEEDS = torch.tensor([0, 1, -1, 2**40 + 5, 2**63 - 1])
ONES = 0xFFFFFFFF


def draw(backend: str, seed: Tensor, shape: tuple[int, ...], step: int, **options) -> Tensor:
    return seeded_noise(seed.to(DEVICES[backend]), shape, step, backend=backend, **options).cpu()


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123, tests/kat_vectors, philox4x32 10
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]) -> None:
    words = philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(map(int, words)) == expected


def test_a_uniform_that_rounds_to_one_draws_a_zero(backend: str) -> None:
    """Its −2 ln u is −0. Seed 206 has the first such word, 0xFFFFFFB0, in Philox's counter 63873."""
    at = 4 * 63873 + 2
    words = philox4x32((torch.tensor(63873), *torch.zeros(3, dtype=torch.int64)), (torch.tensor(206), torch.tensor(0)))
    assert int(words[2]) == 0xFFFFFFB0
    normals = draw(backend, torch.tensor([206]), (at + 2,), 0)
    assert torch.equal(normals[0, at:], torch.zeros(2))
    assert torch.isfinite(normals).all()


def test_first_normals_come_from_the_known_answer(backend: str) -> None:
    """Seed 0, step 0, element 0…3 are Philox's counter 0 and key 0."""
    words = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    expected = []
    for radius_word, angle_word in (words[:2], words[2:]):
        radius = math.sqrt(-2 * math.log((radius_word + 0.5) * 2.0**-32))
        angle = 2 * math.pi * angle_word * 2.0**-32
        expected += [radius * math.cos(angle), radius * math.sin(angle)]
    torch.testing.assert_close(
        draw(backend, SEEDS[:1], (4,), 0)[0].double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6
    )


def test_box_muller_against_fp64() -> None:
    edges = torch.tensor([0, 1, 2, 0x7FFFFFFF, 0x80000000, ONES - 300, ONES - 1, ONES])
    turns = torch.cat([(torch.arange(16) << 28) + offset for offset in (0, 1, 2**27)])
    generator = torch.Generator().manual_seed(0)
    grid = torch.cartesian_prod(edges, turns)
    radius = torch.cat([grid[:, 0], torch.randint(0, 2**32, (200_000,), generator=generator)])
    angle = torch.cat([grid[:, 1], torch.randint(0, 2**32, (200_000,), generator=generator)])
    x, y = box_muller(radius, angle)
    u = (radius.float() * 2.0**-32 + 2.0**-33).double()  # the fp32 uniform is part of the definition
    length, turn = torch.sqrt(-2 * torch.log(u)), angle.double() * (2 * math.pi * 2.0**-32)
    assert (x - length * torch.cos(turn)).abs().max() <= 1e-6
    assert (y - length * torch.sin(turn)).abs().max() <= 1e-6
    assert max(x.abs().max(), y.abs().max()) < 6.77


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numel", [1, 63, 1000, 4097])
def test_back_ends_agree_bit_for_bit(backend: str, numel: int, dtype: torch.dtype) -> None:
    for step in (0, 1, 28, 2**32 - 1):
        noise = draw(backend, SEEDS, (numel,), step, dtype=dtype)
        assert torch.equal(noise, draw("reference", SEEDS, (numel,), step).to(dtype))


def test_moments(backend: str) -> None:
    """Within four standard errors of a standard normal's: mean 0, variance 1, skew 0, fourth moment 3."""
    noise = draw(backend, torch.arange(4), (64, 1024), 3).double()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((noise**power).mean() - moment) < 4 * math.sqrt(variance / noise.numel())
    lanes = noise.view(-1, 4).T
    assert (torch.corrcoef(torch.cat([lanes, lanes.roll(1, 1)])) - torch.eye(8)).abs().max() < 4 / 256


def test_a_sample_depends_on_its_seed_and_step_alone(backend: str) -> None:
    noise = draw(backend, SEEDS, (4, 9, 7), 5)
    assert noise.shape == (5, 4, 9, 7)
    for i in range(len(SEEDS)):
        assert torch.equal(draw(backend, SEEDS[i : i + 1], (4, 9, 7), 5)[0], noise[i])
    assert torch.equal(draw(backend, SEEDS, (500,), 5)[:, :252], noise.flatten(1))
    assert torch.equal(draw(backend, SEEDS.repeat_interleave(2)[::2], (4, 9, 7), 5), noise)
    assert noise.flatten(1).unique(dim=0).shape[0] == 5
    assert not torch.equal(draw(backend, SEEDS, (4, 9, 7), 6), noise)


def test_empty_and_fp64(backend: str) -> None:
    assert draw(backend, SEEDS[:0], (3,), 0).shape == (0, 3)
    assert draw(backend, SEEDS, (0, 3), 0).shape == (5, 0, 3)
    noise = seeded_noise(SEEDS, (5,), 1, dtype=torch.float64)
    assert torch.equal(noise, seeded_noise(SEEDS, (5,), 1).double())


def test_compiled_equals_eager(backend: str) -> None:
    seed = SEEDS.to(DEVICES[backend])

    def noise(seed: Tensor) -> Tensor:
        return seeded_noise(seed, (5, 3), 2, dtype=torch.bfloat16, backend=backend)

    assert torch.equal(torch.compile(noise, fullgraph=True)(seed), noise(seed))
    torch.library.opcheck(torch.ops.mtedit_fast.seeded_noise.default, (seed, 15, 2, torch.bfloat16, backend))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"seed": 3}, TypeError, r"seed must be an int64 tensor of shape \[B\], got int"),
        ({"seed": SEEDS.int()}, TypeError, "got torch.int32"),
        ({"seed": SEEDS[None]}, ValueError, r"seed must have shape \[B\], one per sample, got \[1, 5\]"),
        ({"dtype": torch.int64}, TypeError, "dtype must be a floating-point dtype, got torch.int64"),
        ({"step": -1}, ValueError, r"step must be in \[0, 2\*\*32\), got -1"),
        ({"step": 2**32}, ValueError, "step must be in"),
        ({"backend": "gpu"}, ValueError, "backend must be one of .* got 'gpu'"),
    ],
)
def test_bad_arguments(changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        seeded_noise(**{"seed": SEEDS, "shape": (3,), "step": 0, **changes})
