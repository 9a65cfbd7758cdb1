"""`sde_step` as a registered operator: opcheck, torch.compile and gradcheck."""

import pytest
import torch
from op_backends import DEVICES
from test_sde_step import BF16, SIGMAS, inputs
from torch import Tensor

from mtedit_fast.ops import sde_coefficients, sde_step


def test_compiled_equals_eager(backend: str) -> None:
    device = DEVICES[backend]
    coefficients = sde_coefficients(SIGMAS, device=device)
    sample, velocity, _ = (t.to(device) for t in inputs(2, 3, 21))
    seed, steps = torch.tensor([7, 8], device=device), torch.tensor([1, 2], device=device)

    def loss(x: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        drawn = sde_step(x, v, coefficients, steps, seed=seed, out_dtype=BF16, backend=backend)
        replay = sde_step(x, 2 * v, coefficients, 1, prev_sample=drawn.prev_sample, backend=backend)
        value = (drawn.log_prob + replay.log_prob + drawn.mean.square().mean()).sum()
        return value, *drawn, *replay

    def gradients(function) -> tuple[Tensor, ...]:
        x, v = (t.clone().requires_grad_() for t in (sample, velocity))
        out = function(x, v)
        return *out, *torch.autograd.grad(out[0], (x, v))

    with torch.no_grad():
        plain = torch.compile(loss, fullgraph=True)(sample, velocity)
    for a, b in zip(plain[1:], loss(sample, velocity)[1:], strict=True):
        assert torch.equal(a, b)
    # Around the op the compiler may reorder sums.
    for a, b in zip(gradients(torch.compile(loss, fullgraph=True)), gradients(loss), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["seed", "noise", "replay", "ode"])
def test_opcheck(backend: str, mode: str) -> None:
    device = DEVICES[backend]
    sample, velocity, noise = (t.to(device) for t in inputs(2, 3, 5))
    seed = torch.tensor([1, 2], device=device)
    table = sde_coefficients(SIGMAS, eta=0.0 if mode == "ode" else 0.7, device=device).table
    log_prob_mode = 0 if mode == "ode" else 1
    args = (
        sample.requires_grad_(mode != "replay"),
        velocity.requires_grad_(),
        table,
        seed if mode == "seed" else None,
        1,
        noise if mode == "noise" else None,
        seed if mode == "seed" else None,
        noise if mode == "replay" else None,
        BF16,
        log_prob_mode,
        mode != "seed",
        mode != "replay",
        backend,
    )
    torch.library.opcheck(torch.ops.mtedit_fast.sde_step.default, args)


@pytest.mark.parametrize("name", ["sde_step", "nft_loss", "crd_loss", "digit_score", "digit_score_backward"])
def test_ops_that_keep_memory_stay_out_of_torchs_own_graphs(name):
    assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.mtedit_fast, name).default.tags
