"""attention_columns against attention with its matrix formed, as it is written and under torch.compile.

mtedit-fast bench attention_columns                      appends to benchmarks/results/attention_columns.csv
pytest benchmarks/bench_attention_columns.py --benchmark-only     the same calls under pytest-benchmark (make bench)

A shape is batch x heads x length x D x columns; queries and keys are one sequence, the columns its first tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import op_bench
import record
import torch
from torch import Tensor

from mtedit_fast.ops import attention_columns
from mtedit_fast.ops._backend import choose_backend

VARIANTS = ("heads", "none", "backward")
SHAPES = {
    "cpu": ((1, 4, 1024, 64, 8), (1, 4, 4096, 64, 8)),
    "cuda": ((1, 24, 1536, 128, 8), (1, 24, 4608, 128, 8), (1, 24, 4608, 128, 64)),
}


class Inputs(NamedTuple):
    query: Tensor  # [B, H, L, D]
    key: Tensor  # [B, H, L, D]
    columns: Tensor  # [C]


class Result(NamedTuple):
    probabilities: Tensor
    grads: tuple[Tensor, ...]  # of Σ p², to query and key


@dataclass(frozen=True)
class Case:
    """heads: averaged over heads. none: of each. backward: averaged, and the gradients."""

    variant: str
    shape: tuple[int, int, int, int, int]
    dtype: torch.dtype
    device: torch.device

    @property
    def backward(self) -> bool:
        return self.variant == "backward"

    @property
    def reduce(self) -> str:
        return "none" if self.variant == "none" else "heads"

    @property
    def bytes(self) -> int:
        """Memory traffic that no implementation can avoid: query and key, and the probabilities in fp32; backward,
        those again and the gradients."""
        batch, heads, length, width, count = self.shape
        rows = 2 * batch * heads * length * width * self.dtype.itemsize
        found = 4 * batch * (heads if self.variant == "none" else 1) * length * count
        return 3 * rows + 2 * found if self.backward else rows + found

    @property
    def flops(self) -> int:
        """query·keyᵀ; backward, two more products (remade logits are not counted)."""
        batch, heads, length, width, _ = self.shape
        return (3 if self.backward else 1) * 2 * batch * heads * length**2 * width

    @property
    def matrix_bytes(self) -> int:
        """The matrix of probabilities in fp32, which peers have at least once."""
        batch, heads, length, _, _ = self.shape
        return 4 * batch * heads * length**2

    def inputs(self, generator: torch.Generator) -> Inputs:
        batch, heads, length, width, count = self.shape
        query, key = (
            torch.randn(batch, heads, length, width, generator=generator, device=self.device).to(self.dtype)
            for _ in range(2)
        )
        columns = torch.arange(count, device=self.device)
        return Inputs(query.requires_grad_(self.backward), key.requires_grad_(self.backward), columns)


@dataclass(frozen=True)
class Row(record.Row):
    """One line of attention_columns.csv."""

    extra_bytes: int
    """Most memory in use during a call beyond what was there before it, ours; a CPU's is the resident set's."""
    eager_extra_bytes: int
    compile_extra_bytes: int | None
    matrix_bytes: int
    """Of the matrix of all probabilities, by formula."""


def result(case: Case, probabilities: Tensor, x: Inputs) -> Result:
    grads = torch.autograd.grad(probabilities.square().sum(), x[:2]) if case.backward else ()
    return Result(probabilities, grads)


def ours(case: Case) -> Callable[[Inputs], Result]:
    return lambda x: result(case, attention_columns(*x, reduce=case.reduce), x)


def whole(case: Case, query: Tensor, key: Tensor, columns: Tensor) -> Tensor:
    """As attention processors that keep maps write it: logits of the model's dtype, their softmax in fp32 (fp64)."""
    logits = query @ key.mT * query.shape[3] ** -0.5
    probabilities = logits.softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32))[..., columns]
    return probabilities.mean(1) if case.reduce == "heads" else probabilities


def eager(case: Case) -> Callable[[Inputs], Result]:
    return lambda x: result(case, whole(case, *x), x)


def compiled(case: Case) -> Callable[[Inputs], Result]:
    torch._dynamo.reset()
    function = torch.compile(partial(whole, case), fullgraph=True, dynamic=False)
    return lambda x: result(case, function(*x), x)


IMPLEMENTATIONS = {"ours": ours, "eager": eager, "compile": compiled}


def error(case: Case, name: str, found: Result, x: Inputs) -> float:
    """Largest error against fp64 as a fraction of what is allowed: 1e-4 of the largest probability, and of the largest
    gradient also four units in the last place; for peers, that round the logits to their dtype, 32 units of either."""
    exact = [tensor.detach().double().requires_grad_(case.backward) for tensor in x[:2]]
    truth = eager(case)(Inputs(*exact, x.columns))
    eps = torch.finfo(case.dtype).eps
    worst = 0.0
    for i, (mine, true) in enumerate(zip((found[0], *found.grads), (truth[0], *truth.grads), strict=True)):
        allowed = 1e-4 + eps * (4 * (i > 0) if name == "ours" else 32)
        difference = (mine.detach().double() - true.detach()).abs().max() / true.detach().abs().max()
        worst = max(worst, float((difference / allowed).nan_to_num(torch.inf)))
    return worst


def checker(case: Case, x: Inputs) -> op_bench.Checker:
    return lambda name, result: error(case, name, result, x)


BENCH = op_bench.OpBench(
    __doc__,
    "attention_columns",
    Case,
    IMPLEMENTATIONS,
    checker,
    VARIANTS,
    SHAPES,
    small=(1, 4, 1024, 64, 8),
    backend=lambda case: choose_backend("auto", case.device, (case.dtype,), offered=("reference", "triton")),
    captured=lambda variant: variant != "backward",  # autograd's own launches are not
    row=Row,
    more=lambda case: {"matrix_bytes": case.matrix_bytes},
)

bench, main, test_attention_columns = BENCH.bench, BENCH.main, BENCH.speed_test()

if __name__ == "__main__":
    main()
