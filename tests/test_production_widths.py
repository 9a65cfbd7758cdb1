"""Kernels of tiles and tensor cores at the widths of real models, compiled, against the references in fp64.

What a compiler makes of a kernel depends on dtype and width; under the interpreter there is nothing to see.
"""

from collections.abc import Callable

import pytest
import torch
from op_backends import COMPILED, GPU
from torch import Tensor

from mtedit_fast.ops import attention_columns, digit_score, token_log_probs, token_similarity

pytestmark = pytest.mark.skipif(not COMPILED, reason="takes compiled kernels: a GPU, or tests/ptx_machine")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [BF16, FP16, FP32]
# Of a result's largest number: sums in fp32; a half-precision gradient is rounded, and with that of attention what it
# is the sum of.
VALUES, GRADIENTS = 4e-6, {BF16: 2.0**-7, FP16: 2.0**-10, FP32: 4e-6}
Function = Callable[..., Tensor]


def assert_close(found: Tensor, exact: Tensor, tolerance: float) -> None:
    error = (found.cpu().double() - exact).abs().max() / exact.abs().max()
    assert error <= tolerance, f"error {error:.3g} of the largest, at most {tolerance:.3g}"


def compare(function: Function, *leaves: Tensor, values: float = VALUES) -> None:
    """Values and gradients of function(tensors, move=…, backend=…)."""

    def run(tensors: list[Tensor], move: Callable[[Tensor], Tensor], backend: str) -> list[Tensor]:
        tensors = [tensor.detach().requires_grad_() for tensor in tensors]
        out = function(*tensors, move=move, backend=backend)
        upstream = torch.linspace(-1, 2, out.numel()).reshape(out.shape).sin().to(out)
        return [out.detach(), *torch.autograd.grad((out * upstream).sum(), tensors)]

    ours = run([leaf.to(GPU) for leaf in leaves], lambda tensor: tensor.to(GPU), "triton")
    exact = run([leaf.double() for leaf in leaves], lambda tensor: tensor, "reference")
    assert_close(ours[0], exact[0], values)
    for mine, true, leaf in zip(ours[1:], exact[1:], leaves, strict=True):
        assert mine.dtype == leaf.dtype
        assert_close(mine, true, GRADIENTS[leaf.dtype])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("width", [64, 72, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_columns(dtype: torch.dtype, width: int, masked: bool) -> None:
    """Widths of heads; several tiles and a part of one of queries and of keys, and two of columns."""
    query, key = torch.randn(1, 2, 150, width).to(dtype), torch.randn(1, 2, 203, width).to(dtype)
    columns = torch.cat((torch.tensor([202, 5, 5]), torch.randint(203, (15,))))
    mask = torch.rand(1, 203) > 0.2 if masked else None

    def function(q: Tensor, k: Tensor, *, move: Function, backend: str) -> Tensor:
        kept = mask if mask is None else move(mask)
        return attention_columns(q, k, move(columns), mask=kept, backend=backend)

    compare(function, query, key)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("width", [384, 768, 1024])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_token_similarity(dtype: torch.dtype, width: int, normalize: bool) -> None:
    """Widths of DINO's small, base and large models, a tile and a part of one of tokens."""
    a, b = torch.randn(2, 150, width).to(dtype), torch.randn(3, 150, width).to(dtype)
    pairs, weights = torch.tensor([[0, 2], [1, 0], [1, 2]]), torch.rand(3, 150)

    def function(x: Tensor, y: Tensor, *, move: Function, backend: str) -> Tensor:
        options = {"weights": move(weights), "normalize": normalize, "backend": backend}
        return token_similarity(x, y, move(pairs), **options)

    compare(function, a, b)


@pytest.mark.parametrize("width", [896, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_token_log_probs(dtype: torch.dtype, width: int) -> None:
    """Two tiles of rows, three of the vocabulary, widths of small and large language models."""
    hidden, weight = torch.randn(140, width).to(dtype) / width**0.5, torch.randn(300, width).to(dtype)
    targets = torch.randint(300, (140,))

    def function(h: Tensor, w: Tensor, *, move: Function, backend: str) -> Tensor:
        found = token_log_probs(h, w, move(targets), return_entropy=True, backend=backend)
        return torch.cat(found)

    compare(function, hidden, weight)


@pytest.mark.parametrize("normalize", ["set", "vocab"])
@pytest.mark.parametrize("width", [896, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_digit_score(dtype: torch.dtype, width: int, normalize: str) -> None:
    """Ten digits of a vocabulary of three tiles."""
    hidden, weight = torch.randn(20, width).to(dtype) / width**0.5, torch.randn(300, width).to(dtype)

    def function(h: Tensor, w: Tensor, *, move: Function, backend: str) -> Tensor:
        return digit_score(h, w, range(7, 17), range(10), normalize=normalize, backend=backend).score

    compare(function, hidden, weight)
