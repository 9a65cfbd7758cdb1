"""nft_loss and crd_loss, loss and gradient, against the eager form of the public code, torch.compile of our reference,
and copy bandwidth.

mtedit-fast bench nft_loss                      appends to benchmarks/results/nft_loss.csv
pytest benchmarks/bench_nft_loss.py --benchmark-only     the same calls under pytest-benchmark (make bench)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import op_bench
import torch
from torch import Tensor

from mtedit_fast.ops import crd_loss, nft_loss
from mtedit_fast.ops._backend import choose_backend
from mtedit_fast.ops._velocity_loss import reference_backward
from mtedit_fast.ops.crd_loss import reference_forward as crd_reference
from mtedit_fast.ops.nft_loss import reference_forward as nft_reference

BETA, SCALE, KL_WEIGHT, FLOOR = 0.5, 5.0, 1e-4, 1e-5
VARIANTS = ("nft", "nft_kl", "nft_on_policy", "crd")
SHAPES = {"cpu": ((8, 1024, 64), (8, 4096, 64)), "cuda": ((8, 1024, 64), (8, 4096, 64), (32, 4096, 64))}


class Inputs(NamedTuple):
    theta: Tensor
    old: Tensor
    target: Tensor
    ref: Tensor
    clean: Tensor  # x₀ and x_t, fp32: what the public code computes the error from
    noisy: Tensor
    t: Tensor
    r: Tensor
    groups: Tensor


class Result(NamedTuple):
    loss: Tensor
    grad: Tensor  # with respect to theta


@dataclass(frozen=True)
class Case:
    """nft: old velocities given. nft_kl: and a reference's. nft_on_policy: old is theta. crd: old given, no KL."""

    variant: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes(self) -> int:
        """Memory traffic: a sample's sums must be known before any element of its gradient, so all is read twice."""
        arrays = {
            "nft": 3 + 3 + 1,  # theta, old, target; again -> gradient
            "nft_kl": 4 + 4 + 1,  # and ref
            "nft_on_policy": 2 + 2 + 1,  # theta, target
            "crd": 3 + 2 + 1,  # theta, old, target; its gradient needs no old
        }
        return arrays[self.variant] * math.prod(self.shape) * self.dtype.itemsize

    @property
    def flops(self) -> int:
        """Per element. nft: o, d, βd, v⁺−v*, v⁻−v* 5, their |x| and x² summed 2·3; gradient: o, d, c₀o + c₁d 5. A
        reference adds 3 and 3. On policy: one difference and 3 sums, and 2. crd: two of those, and 2."""
        per_element = {"nft": 5 + 6 + 5, "nft_kl": 5 + 6 + 5 + 6, "nft_on_policy": 4 + 2, "crd": 2 * 4 + 2}
        return per_element[self.variant] * math.prod(self.shape)

    def inputs(self, generator: torch.Generator) -> Inputs:
        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=self.device)

        target = random(*self.shape).to(self.dtype)
        old = (target + 0.5 * random(*self.shape)).to(self.dtype)
        theta = old if self.variant == "nft_on_policy" else (old + 0.2 * random(*self.shape)).to(self.dtype)
        ref = (old + 0.3 * random(*self.shape)).to(self.dtype) if self.variant == "nft_kl" else old
        t, r = torch.rand(2, self.shape[0], generator=generator, device=self.device)
        t = 0.1 + 0.8 * t
        clean = random(*self.shape)
        noisy = clean + t.view(-1, *[1] * (len(self.shape) - 1)) * target  # (1−t)·x₀ + t·ε
        groups = torch.arange(self.shape[0], device=self.device) // 4
        return Inputs(theta.detach().requires_grad_(), old, target, ref, clean, noisy, t, r, groups)


def differentiated(loss: Tensor, x: Inputs) -> Result:
    return Result(loss, torch.autograd.grad(loss, x.theta)[0])


def ours(case: Case, backend: str = "auto") -> Callable[[Inputs], Result]:
    def run(x: Inputs) -> Result:
        if case.variant == "crd":
            out = crd_loss(x.theta, x.old, x.target, x.r, x.groups, beta=BETA, backend=backend)
            return differentiated(out.loss, x)
        options: dict[str, Any] = {"v_ref": x.ref, "kl_weight": KL_WEIGHT} if case.variant == "nft_kl" else {}
        old = None if case.variant == "nft_on_policy" else x.old
        return differentiated(nft_loss(x.theta, old, x.target, x.t, x.r, beta=BETA, backend=backend, **options).loss, x)

    return run


def adaptive_width(error: Tensor) -> Tensor:
    """The public codes take the mean absolute error in fp64, and what they divide by it is promoted to fp64."""
    with torch.no_grad():
        dims = tuple(range(1, error.ndim))
        return error.double().abs().mean(dims, keepdim=True).clip(min=FLOOR)


def published_nft(
    theta: Tensor,
    old: Tensor,
    ref: Tensor | None,
    noisy: Tensor,
    clean: Tensor,
    t: Tensor,
    r: Tensor,
    *,
    beta: float,
    kl_weight: float,
) -> Tensor:
    """The loss of every sample, [B], in the public code's x̂₀ form, one full-tensor operation at a time."""
    dims = tuple(range(1, theta.ndim))
    t = t.view(-1, *[1] * len(dims))
    terms = []
    for velocity in (beta * theta + (1 - beta) * old, (1 + beta) * old - beta * theta):
        estimate = noisy - t * velocity
        width = adaptive_width(estimate.double() - clean.double())
        terms.append(((estimate - clean) ** 2 / width).mean(dims))
    loss = SCALE * (r * terms[0] / beta + (1 - r) * terms[1] / beta)
    return loss if ref is None else loss + kl_weight * ((theta - ref) ** 2).mean(dims)


def eager(case: Case) -> Callable[[Inputs], Result]:
    """The losses as trainers write them today (DiffusionNFT, arXiv 2509.16117; CRD, arXiv 2603.14128): one full-tensor
    operation at a time, mixing velocities in their own dtype, fp64 where the adaptive width promotes to it."""
    dims = tuple(range(1, len(case.shape)))

    def nft(x: Inputs) -> Tensor:
        ref = x.ref if case.variant == "nft_kl" else None
        return published_nft(x.theta, x.old, ref, x.noisy, x.clean, x.t, x.r, beta=BETA, kl_weight=KL_WEIGHT).mean()

    def crd(x: Inputs) -> Tensor:
        width = adaptive_width(x.theta.double() - x.target.double())
        width_old = adaptive_width(x.old.double() - x.target.double())
        implicit = -((x.theta - x.target) ** 2 / width - (x.old - x.target) ** 2 / width_old).mean(dims)
        same = (x.groups[:, None] == x.groups).double()
        same = same / same.sum(1, keepdim=True)
        residual = BETA * (implicit - same @ implicit.detach()) - (x.r - same @ x.r.double())
        return SCALE / BETA * (residual**2).mean()

    return lambda x: differentiated(crd(x) if case.variant == "crd" else nft(x), x)


def compiled(case: Case) -> Callable[[Inputs], Result]:
    """torch.compile of the reference: the loss and its closed-form gradient in one graph."""

    def step(
        theta: Tensor, old: Tensor | None, target: Tensor, ref: Tensor | None, t: Tensor, r: Tensor, groups: Tensor
    ) -> Result:
        if case.variant == "crd":
            loss, _, slopes = crd_reference(theta, old, target, ref, r, groups, None, None, BETA, SCALE, True, 0.0, 0.0)
            old = None
        else:
            loss, _, slopes = nft_reference(
                theta, old, target, ref, t, r, None, BETA, SCALE, 0.0 if ref is None else KL_WEIGHT
            )
        return Result(loss, reference_backward(theta, old, target, ref, slopes, loss.new_ones(())))

    torch._dynamo.reset()
    function = torch.compile(step, fullgraph=True, dynamic=False)

    def run(x: Inputs) -> Result:
        old = None if case.variant == "nft_on_policy" else x.old
        ref = x.ref if case.variant == "nft_kl" else None
        with torch.no_grad():
            return function(x.theta.detach(), old, x.target, ref, x.t, x.r, x.groups)

    return run


IMPLEMENTATIONS = {"ours": ours, "eager": eager, "compile": compiled}


def truth(case: Case, x: Inputs) -> tuple[Tensor, Tensor]:
    """Loss and gradient in fp64, from the closed form of v± − v* and autograd."""
    theta, old, target, ref = (v.detach().double() for v in (x.theta, x.old, x.target, x.ref))
    theta.requires_grad_()
    dims = tuple(range(1, theta.ndim))
    t, r = x.t.double(), x.r.double()

    def squared(error: Tensor, factor: Tensor | float) -> Tensor:
        size = (factor * error.detach().abs().mean(dims)).clip(min=FLOOR)
        return factor**2 * (error**2).mean(dims) / size

    if case.variant == "crd":
        score = BETA * (squared(old - target, 1.0) - squared(theta - target, 1.0)) - r
        same = (x.groups[:, None] == x.groups).double()
        loss = SCALE / BETA * ((score - same @ score / same.sum(1)) ** 2).mean()
    else:
        positive, negative = old + BETA * (theta - old) - target, old - BETA * (theta - old) - target
        if case.variant == "nft_on_policy":  # old is theta, and a constant
            positive, negative = (old + sign * BETA * (theta - theta.detach()) - target for sign in (1, -1))
        loss = SCALE / BETA * (r * squared(positive, t) + (1 - r) * squared(negative, t)).mean()
        if case.variant == "nft_kl":
            loss = loss + KL_WEIGHT * ((theta - ref) ** 2).mean()
    return loss.detach(), torch.autograd.grad(loss, theta)[0]


def error(case: Case, found: Result, x: Inputs, *, roundings: int = 1) -> float:
    """Largest error against fp64 as a fraction of what is allowed: 1e-5 of the loss, and for the gradient 1e-5 and a
    unit in the last place of its dtype, of its largest value. `roundings`: how many such units more the public code
    is allowed, which mixes velocities in that dtype, in the loss too."""
    loss, grad = truth(case, x)
    unit = torch.finfo(case.dtype).eps
    ratios = (
        (found.loss.detach().double() - loss).abs() / ((1e-5 + (roundings - 1) * unit) * loss.abs()),
        (found.grad.double() - grad).abs().max() / ((1e-5 + roundings * unit) * grad.abs().max()),
    )
    return max(math.inf if math.isnan(ratio) else ratio for ratio in map(float, ratios))


ROUNDINGS = {"ours": 1, "eager": 8, "compile": 1}


def checker(case: Case, x: Inputs) -> op_bench.Checker:
    return lambda name, result: error(case, result, x, roundings=ROUNDINGS[name])


BENCH = op_bench.OpBench(
    __doc__,
    "nft_loss",
    Case,
    IMPLEMENTATIONS,
    checker,
    VARIANTS,
    SHAPES,
    small=(8, 4096, 64),
    backend=lambda case: choose_backend("auto", case.device, (case.dtype,)),
    op=lambda case: "crd_loss" if case.variant == "crd" else "nft_loss",
)

bench, main, test_nft_loss = BENCH.bench, BENCH.main, BENCH.speed_test()

if __name__ == "__main__":
    main()
