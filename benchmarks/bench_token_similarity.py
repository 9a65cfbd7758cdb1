"""token_similarity against PyTorch and torch.compile of our reference.

mtedit-fast bench token_similarity                      appends to benchmarks/results/token_similarity.csv
pytest benchmarks/bench_token_similarity.py --benchmark-only     the same calls under pytest-benchmark (make bench)

The eager peer is, on a CPU, the loop over pairs that evaluation code runs; on a GPU, our reference: batched PyTorch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import op_bench
import torch
import torch.nn.functional as F
from torch import Tensor

from mtedit_fast.ops import token_similarity
from mtedit_fast.ops._backend import choose_backend
from mtedit_fast.ops.token_similarity import reference_forward

GROUP = 48  # pairs to a reference: 16 members, 3 turns
VARIANTS = ("cls", "mean", "background", "backward")
SHAPES = {"cpu": ((48, 64, 64), (48, 196, 768)), "cuda": ((48, 196, 768), (48, 1024, 768), (384, 196, 768))}


class Inputs(NamedTuple):
    references: Tensor  # [R, 1 + N, D]
    edits: Tensor  # [P, 1 + N, D]
    pairs: Tensor  # [P, 2]
    weights: Tensor  # [P, N]


class Result(NamedTuple):
    similarity: Tensor
    grad: Tensor | None  # of similarity.sum() with respect to the edits' tokens


@dataclass(frozen=True)
class Case:
    """cls: of CLS. mean: of mean patch tokens. background: normalised, weighted. backward: that, and its gradient."""

    variant: str
    shape: tuple[int, int, int]  # pairs, patches, D
    dtype: torch.dtype
    device: torch.device

    @property
    def references(self) -> int:
        return -(-self.shape[0] // GROUP)

    @property
    def bytes(self) -> int:
        """Memory traffic that no implementation can avoid: both banks, and weights in fp32."""
        pairs, tokens, width = self.shape
        row = (1 if self.variant == "cls" else tokens) * width * self.dtype.itemsize
        read = (pairs + self.references) * row
        weights = 4 * pairs * tokens if self.variant in ("background", "backward") else 0
        if self.variant == "backward":  # the edits and weights again -> gradient
            return read + weights + 2 * pairs * row + weights
        return read + weights

    @property
    def flops(self) -> int:
        """Per element of both sides of a pair: sum 1, norm 2, weighted sum 2; gradient 9, of one side; cosine 6 D."""
        pairs, tokens, width = self.shape
        elements = pairs * tokens * width
        per_pair = {"cls": 0, "mean": 2 * 1, "background": 2 * (2 + 2), "backward": 2 * (2 + 2) + 9}[self.variant]
        return per_pair * elements + 6 * pairs * width

    def inputs(self, generator: torch.Generator) -> Inputs:
        """For cls no patches: sets rotate by what is read of them, and a hundred times that would fill the memory."""
        pairs, tokens, width = self.shape
        tokens = 0 if self.variant == "cls" else tokens

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=self.device)

        references = random(self.references, 1 + tokens, width)
        owner = torch.arange(pairs, device=self.device) // GROUP
        edits = (references[owner] + 0.5 * random(pairs, 1 + tokens, width)).to(self.dtype)
        weights = torch.rand(pairs, tokens, generator=generator, device=self.device)
        rows = torch.stack([owner, torch.arange(pairs, device=self.device)], 1)
        edits.requires_grad_(self.variant == "backward")
        return Inputs(references.to(self.dtype), edits, rows, weights * (weights >= 0.5))

    def banks(self, x: Inputs) -> tuple[Tensor, Tensor]:
        part = slice(0, 1) if self.variant == "cls" else slice(1, None)
        return x.references[:, part], x.edits[:, part]

    @property
    def weighted(self) -> bool:
        return self.variant in ("background", "backward")


def result(case: Case, similarity: Tensor, x: Inputs) -> Result:
    grad = torch.autograd.grad(similarity.sum(), x.edits)[0] if case.variant == "backward" else None
    return Result(similarity, grad)


def ours(case: Case, backend: str = "auto") -> Callable[[Inputs], Result]:
    def run(x: Inputs) -> Result:
        weights = x.weights if case.weighted else None
        similarity = token_similarity(
            *case.banks(x), x.pairs, weights=weights, normalize=case.weighted, backend=backend
        )
        return result(case, similarity, x)

    return run


def loop(case: Case, dtype: torch.dtype = torch.float32) -> Callable[[Inputs], Result]:
    """One pair at a time, as evaluation code does it."""

    def run(x: Inputs) -> Result:
        references, edits = case.banks(x)
        scores = []
        for pair, (i, j) in enumerate(x.pairs.tolist()):
            tokens = [references[i].to(dtype), edits[j].to(dtype)]
            if case.weighted:
                weight = x.weights[pair].to(dtype)[:, None]
                means = [(F.normalize(t, dim=-1) * weight).sum(0) / weight.sum() for t in tokens]
            else:
                means = [t.mean(0) for t in tokens]
            scores.append(F.cosine_similarity(*means, dim=0))
        return result(case, torch.stack(scores), x)

    return run


def eager(case: Case) -> Callable[[Inputs], Result]:
    return loop(case) if case.device.type == "cpu" else ours(case, "reference")


def compiled(case: Case) -> Callable[[Inputs], Result]:
    """torch.compile of the reference, whose gradient is that of autograd."""

    def similarities(a: Tensor, b: Tensor, pairs: Tensor, weights: Tensor | None) -> Tensor:
        return reference_forward(a, b, pairs[:, 0], pairs[:, 1], weights, weights, case.weighted, False)[0]

    torch._dynamo.reset()
    function = torch.compile(similarities, fullgraph=True, dynamic=False)

    def run(x: Inputs) -> Result:
        return result(case, function(*case.banks(x), x.pairs, x.weights if case.weighted else None), x)

    return run


IMPLEMENTATIONS = {"ours": ours, "eager": eager, "compile": compiled}


def error(case: Case, found: Result, x: Inputs) -> float:
    """Largest error against fp64 as a fraction of what is allowed: 1e-5, and for the gradient 1e-5 and a unit in the
    last place, of its largest value."""
    exact = loop(case, torch.float64)(
        x._replace(edits=x.edits.detach().double().requires_grad_(found.grad is not None))
    )
    worst = ((found.similarity.detach().double() - exact.similarity.detach()).abs() / 1e-5).max()
    if found.grad is not None and exact.grad is not None:
        allowed = (1e-5 + torch.finfo(case.dtype).eps) * exact.grad.abs().max()
        worst = torch.maximum(worst, ((found.grad.double() - exact.grad).abs() / allowed).max())
    return float(worst.nan_to_num(torch.inf))


def checker(case: Case, x: Inputs) -> op_bench.Checker:
    return lambda name, result: error(case, result, x)


BENCH = op_bench.OpBench(
    __doc__,
    "token_similarity",
    Case,
    IMPLEMENTATIONS,
    checker,
    VARIANTS,
    SHAPES,
    small=(48, 196, 768),
    backend=lambda case: choose_backend("auto", case.device, (case.dtype,)),
    captured=lambda variant: variant != "backward",  # sorting pairs and autograd's own launches are not
)

bench, main, test_token_similarity = BENCH.bench, BENCH.main, BENCH.speed_test()

if __name__ == "__main__":
    main()
