"""Tensors of more than 2³¹ elements, of which kernels must count in 64 bits: the last ones are right.

Whole on a GPU; tests/ptx_machine runs the blocks at a grid's ends, so that memory which nothing touches costs nothing.
"""

from collections.abc import Iterator

import pytest
import torch
from op_backends import COMPILED, GPU
from torch import Tensor

from mtedit_fast.ops import seeded_noise

pytestmark = pytest.mark.skipif(not COMPILED, reason="takes compiled kernels: a GPU, or tests/ptx_machine")
BF16 = torch.bfloat16
ROWS, NUMEL = 3, 716_000_003
COUNT = 10_000  # elements at the end that are looked at; all others are what memory holds
TABLE = torch.tensor([[0.9, -0.3, 0.25, 0.0]])  # a, b, c of prev_sample = a·sample + b·velocity + c·noise


@pytest.fixture(autouse=True)
def _some_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if GPU == "cuda":
        free = torch.cuda.mem_get_info()[0]
        if free < 32 << 30:
            pytest.skip(f"takes 32 GiB of GPU memory, {free >> 30} GiB are free")
    else:
        from ptx_machine import launch

        monkeypatch.setattr(launch, "ENDS", 4)
    yield
    torch.cuda.empty_cache()


def large() -> Tensor:
    """[ROWS, NUMEL], normal at its end."""
    try:
        tensor = torch.empty(ROWS, NUMEL, dtype=BF16, device=GPU)
    except RuntimeError as error:
        pytest.skip(f"takes 4 GiB to a tensor, in address space at least: {error}")
    assert tensor.numel() > 2**31
    tensor[-1, -COUNT:] = torch.randn(COUNT).to(BF16)
    return tensor


def end(tensor: Tensor) -> Tensor:
    return tensor[-1, -COUNT:].float().cpu()


def assert_rounded(found: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(end(found), exact, rtol=2.0**-7, atol=1e-5)


def test_noise_and_steps_forward_and_backward() -> None:
    from mtedit_fast.kernels import sde_step as kernels

    sample, velocity, seed = large(), large(), torch.arange(ROWS, device=GPU)
    table = TABLE.to(GPU)
    given = (sample, velocity, table, 0, None, seed, None, BF16, 0, False)
    stepped, _, _ = kernels.sde_step_forward(*given, False)
    noise = seeded_noise(seed, (NUMEL,), 1, dtype=BF16, backend="triton")
    quads = seeded_noise_of(int(seed[-1]), step=1)
    assert torch.equal(end(noise), quads.to(BF16).float())
    a, b, c, _ = TABLE[0].tolist()
    assert_rounded(stepped, a * end(sample) + b * end(velocity) + c * quads)
    grad_sample, grad_velocity = kernels.sde_step_backward(*given, stepped, None, None, True)
    assert grad_sample is not None
    assert_rounded(grad_sample, a * end(stepped))
    assert_rounded(grad_velocity, b * end(stepped))


def seeded_noise_of(seed: int, step: int) -> Tensor:
    """The last elements of a sample's noise, by the reference's parts: element 4i + j is number j of counter i."""
    from mtedit_fast.ops.seeded_noise import box_muller, philox4x32

    quad = torch.arange((NUMEL - COUNT) // 4, -(-NUMEL // 4))
    zero = torch.zeros_like(quad)
    words = philox4x32((quad, zero + step, zero, zero), (zero + (seed & 0xFFFFFFFF), zero + (seed >> 32)))
    normals = torch.stack((*box_muller(*words[:2]), *box_muller(*words[2:])), dim=1).flatten()
    first = NUMEL - COUNT - 4 * int(quad[0])
    return normals[first : first + COUNT]


def test_gradient_of_velocity_losses() -> None:
    """Along v_theta − v_target where the policy is its own old one; with a reference, along that, too."""
    from mtedit_fast.kernels.nft_loss import velocity_loss_backward

    theta, target, reference = large(), large(), large()
    coefficients = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0], [5.0, 6.0, 7.0]], device=GPU)
    upstream = torch.tensor(0.5, device=GPU)
    found = velocity_loss_backward(theta, None, target, reference, coefficients, upstream)
    assert_rounded(found, 1.5 * (end(theta) - end(target)) + 3.5 * (end(theta) - end(reference)))
