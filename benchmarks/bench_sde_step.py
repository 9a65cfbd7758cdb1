"""sde_step against the eager formula as people write it, torch.compile of our reference, and copy bandwidth.

mtedit-fast bench sde_step                      appends to benchmarks/results/sde_step.csv
pytest benchmarks/bench_sde_step.py --benchmark-only     the same calls under pytest-benchmark (make bench)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import op_bench
import torch
from torch import Tensor

from mtedit_fast.ops import SDECoefficients, sde_coefficients, sde_step, seeded_noise
from mtedit_fast.ops._backend import choose_backend
from mtedit_fast.ops.sde_step import reference_forward

SIGMAS = (0.96, 0.91)  # a step of a shifted schedule
ETA = 0.9
VARIANTS = ("sample", "seed", "replay", "backward")
SHAPES = {"cpu": ((8, 1024, 64), (8, 4096, 64)), "cuda": ((1, 4096, 64), (8, 4096, 64), (32, 4096, 64), (64, 4096, 64))}


class Inputs(NamedTuple):
    sample: Tensor
    velocity: Tensor
    noise: Tensor
    seed: Tensor
    prev_sample: Tensor


class Result(NamedTuple):
    prev_sample: Tensor
    log_prob: Tensor
    grad: Tensor | None  # of log_prob.sum() with respect to velocity


@dataclass(frozen=True)
class Case:
    """sample: noise given. seed: the step draws it (peers: torch.randn). replay: log-prob of a stored sample.
    backward: a replay, and its gradient to the velocity."""

    variant: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes(self) -> int:
        """Memory traffic that no implementation can avoid; the mean is not written."""
        size = math.prod(self.shape) * self.dtype.itemsize
        arrays = {
            "sample": 4,  # sample, velocity, noise -> prev_sample
            "seed": 3,  # sample, velocity -> prev_sample
            "replay": 3,  # sample, velocity, prev_sample -> one number per sample
            "backward": 3 + 4,  # the replay; its three again -> gradient
        }
        return arrays[self.variant] * size

    @property
    def flops(self) -> int:
        """Per element: mean 3, prev_sample 2, squared difference 3, gradient 2 (the mean again: 3 + 1). Noise: none."""
        per_element = {"sample": 3 + 2 + 3, "seed": 3 + 2 + 3, "replay": 3 + 3, "backward": 3 + 3 + 3 + 1 + 2}
        return per_element[self.variant] * math.prod(self.shape)

    def inputs(self, generator: torch.Generator) -> Inputs:
        def random() -> Tensor:
            return torch.randn(self.shape, generator=generator, device=self.device).to(self.dtype)

        sample, velocity, noise, offset = random(), random(), random(), random()
        seed = torch.randint(2**62, (self.shape[0],), generator=generator, device=self.device)
        prev_sample = (sample + 0.1 * offset).to(self.dtype)
        return Inputs(sample, velocity.requires_grad_(self.variant == "backward"), noise, seed, prev_sample)


def coefficients(device: torch.device) -> SDECoefficients:
    return sde_coefficients(SIGMAS, variant="sde", eta=ETA, device=device)


def eager(case: Case) -> Callable[[Inputs], Result]:
    """The formula as trainers write it today (Flow-GRPO, arXiv 2505.05470): one full-tensor operation at a time."""
    sigma, after = (torch.tensor(value, device=case.device).view(1, *[1] * (len(case.shape) - 1)) for value in SIGMAS)
    dims = tuple(range(1, len(case.shape)))

    def run(x: Inputs) -> Result:
        velocity, sample = x.velocity.float(), x.sample.float()
        dt = after - sigma
        std = torch.sqrt(sigma / (1 - torch.where(sigma == 1, after, sigma))) * ETA
        drift = std**2 / (2 * sigma)
        mean = sample * (1 + drift * dt) + velocity * (1 + drift * (1 - sigma)) * dt
        scale = std * torch.sqrt(-dt)
        if case.variant in ("replay", "backward"):
            prev_sample, value = x.prev_sample, x.prev_sample.float()
        else:
            noise = torch.randn_like(mean) if case.variant == "seed" else x.noise.float()
            prev_sample = (mean + scale * noise).to(case.dtype)
            value = prev_sample.float()
        log_prob = (
            -((value.detach() - mean) ** 2) / (2 * scale**2)
            - torch.log(scale)
            - torch.log(torch.sqrt(2 * torch.as_tensor(math.pi)))
        ).mean(dims)
        return Result(prev_sample, log_prob, gradient(case, log_prob, x))

    return run


def gradient(case: Case, log_prob: Tensor, x: Inputs) -> Tensor | None:
    return torch.autograd.grad(log_prob.sum(), x.velocity)[0] if case.variant == "backward" else None


def source(case: Case, x: Inputs) -> dict[str, Any]:
    name = {"sample": "noise", "seed": "seed"}.get(case.variant, "prev_sample")
    return {key: getattr(x, key) if key == name else None for key in ("noise", "seed", "prev_sample")}


def ours(case: Case, backend: str = "auto") -> Callable[[Inputs], Result]:
    table = coefficients(case.device)

    def run(x: Inputs) -> Result:
        out = sde_step(x.sample, x.velocity, table, 0, **source(case, x), return_mean=False, backend=backend)
        assert out.log_prob is not None
        return Result(out.prev_sample, out.log_prob, gradient(case, out.log_prob, x))

    return run


def compiled(case: Case) -> Callable[[Inputs], Result]:
    """torch.compile of the reference, with torch.randn in place of our counter-based noise."""
    table = coefficients(case.device).table

    def step(sample: Tensor, velocity: Tensor, noise: Tensor | None, prev: Tensor | None) -> tuple[Tensor, Tensor]:
        if case.variant == "seed":
            noise = torch.randn(sample.shape, device=sample.device)
        out, log_prob, _ = reference_forward(
            sample, velocity, table, 0, noise, None, prev, case.dtype, 1, True, want_mean=False
        )
        assert log_prob is not None
        return out, log_prob

    torch._dynamo.reset()
    function = torch.compile(step, fullgraph=True, dynamic=False)

    def run(x: Inputs) -> Result:
        given = source(case, x)
        out, log_prob = function(x.sample, x.velocity, given["noise"], given["prev_sample"])
        return Result(out, log_prob, gradient(case, log_prob, x))

    return run


IMPLEMENTATIONS = {"ours": ours, "eager": eager, "compile": compiled}


def error(case: Case, result: Result, x: Inputs, *, own_noise: bool = False) -> float:
    """Largest error against fp64 as a fraction of what is allowed: for prev_sample a unit in the last place of its
    dtype, and 2e-6; for log-prob 1e-5; for the gradient, 1e-5 and a unit in the last place, of its largest value.
    `own_noise`: prev_sample was drawn from noise that we do not know, and is taken as given."""
    a, b, c = coefficients(case.device).table[0, :3].double().tolist()
    mean = a * x.sample.double() + b * x.velocity.detach().double()
    found = result.prev_sample.detach().double()
    ratios = []
    if case.variant in ("replay", "backward"):
        ratios.append(torch.tensor(0.0 if torch.equal(result.prev_sample, x.prev_sample) else math.inf))
    elif not own_noise:
        noise = x.noise
        if case.variant == "seed":
            noise = seeded_noise(x.seed, case.shape[1:], 1, backend="reference")
        expected = mean + c * noise.double()
        allowed = torch.finfo(case.dtype).eps * expected.abs() + 2e-6
        ratios.append(((found - expected).abs() / allowed).max())
    difference = (found - mean).flatten(1)
    log_prob = -(difference**2).mean(1) / (2 * c * c) - math.log(c) - math.log(2 * math.pi) / 2
    ratios.append(((result.log_prob.detach().double() - log_prob).abs() / (1e-5 * (1 + log_prob.abs()))).max())
    if case.variant == "backward":
        assert result.grad is not None
        exact = b / (c * c) * (found - mean) / difference.shape[1]
        allowed = (1e-5 + torch.finfo(case.dtype).eps) * exact.abs().max()
        ratios.append(((result.grad.double() - exact).abs() / allowed).max())
    return max(math.inf if math.isnan(ratio) else ratio for ratio in map(float, ratios))


def checker(case: Case, x: Inputs) -> op_bench.Checker:
    return lambda name, result: error(case, result, x, own_noise=name != "ours" and case.variant == "seed")


BENCH = op_bench.OpBench(
    __doc__,
    "sde_step",
    Case,
    IMPLEMENTATIONS,
    checker,
    VARIANTS,
    SHAPES,
    small=(8, 4096, 64),
    backend=lambda case: choose_backend("auto", case.device, (case.dtype,)),
)

bench, main, test_sde_step = BENCH.bench, BENCH.main, BENCH.speed_test()

if __name__ == "__main__":
    main()
