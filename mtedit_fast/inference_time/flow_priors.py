"""Flow Priors: linear inverse problems with a flow as prior, by iterative corrupted trajectory matching (Zhang et al.,
"Flow Priors for Linear Inverse Problems via Iterative Corrupted Trajectory Matching", NeurIPS 2024).

Time runs from noise at t = 0 to data at t = 1 along x_t = t x₀ + (1 − t) ε; a flow is the velocity E[x₀ − ε | x_t].
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mtedit_fast.editors.base import Condition, Editor
from mtedit_fast.onestep import EDMDenoiser
from mtedit_fast.ops import seeded_noise

Velocity = Callable[[Tensor, Tensor], Tensor]
"""v(x [B, ...], t []) -> [B, ...], with gradients to x."""

BETAS, ADAM_EPS = (0.9, 0.999), 1e-8
SIGMA_RANGE = (0.002, 80.0)  # of EDM's noise levels
_FIRST_COUNTER = 1 << 16
"""Of `seeded_noise`: those before it are of whoever draws masks, measurements and starts from the same seeds."""


@dataclass(frozen=True)
class FlowPriorSettings:
    """Settings of `ictm`; the defaults are the published ones, with noise as in the public run configuration.

    steps: N, of the flow; inner_steps: K, Adam's steps at each of them; step_size: η, Adam's.
    data_weight: λ of ‖A x − y‖², 1 / 2σ_y² for measurements with noise of standard deviation σ_y.
    trace_weight: ζ of tr ∂v/∂x, the change of the log-density along the flow; probes: of its estimate. Either at 0
        saves the second backward.
    prior_weight: ν of the log-density of the state.
    noise: β, standard deviation of the noise added after each of Adam's steps; 0: a maximum a posteriori estimate.
    """

    steps: int = 100
    inner_steps: int = 1
    step_size: float = 1.0
    data_weight: float = 100.0
    trace_weight: float = 1.0
    prior_weight: float = 1.0
    probes: int = 1
    noise: float = 1.0
    first_time: float = 1e-3

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("inner_steps", 0), ("probes", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected ≥ {least}, got {getattr(self, name)}")
        for field in fields(self):
            value = getattr(self, field.name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{field.name}: expected a finite number ≥ 0, got {value}")
        if self.step_size == 0 and self.inner_steps:
            raise ValueError("step_size: expected > 0, got 0; inner_steps=0 follows the flow alone")
        if self.first_time >= 1:
            raise ValueError(f"first_time: expected 0 <= first_time < 1, got {self.first_time}")

    @classmethod
    def map(cls, sigma_y: float, **others: Any) -> FlowPriorSettings:
        """The maximum a posteriori reading for measurements with noise of standard deviation σ_y > 0: λ = 1 / 2σ_y²,
        ν = 1 and no noise. It is reached where the inner problem converges: many `inner_steps` of a small `step_size`.
        """
        if not 0 < sigma_y < math.inf:
            raise ValueError(f"sigma_y: expected a standard deviation > 0, got {sigma_y}")
        return cls(**{"data_weight": 1 / (2 * sigma_y**2), "prior_weight": 1.0, "noise": 0.0} | others)

    @classmethod
    def published(cls, problem: str = "inpainting", **others: Any) -> FlowPriorSettings:
        """The authors' settings for a problem (`mtedit_fast.onestep.FAMILIES`); theirs differ for super-resolution."""
        special = {"step_size": 1e-2, "data_weight": 1e4} if problem == "super_resolution" else {}
        return cls(**special | others)

    def times(self) -> list[float]:
        """N + 1 times, from first_time to 1."""
        return [self.first_time + i / self.steps * (1 - self.first_time) for i in range(self.steps)] + [1.0]


class Restoration(NamedTuple):
    images: Tensor
    """[B, ...] as `start`, not clamped."""
    stopped: Tensor
    """[B] int64: the step at which an image would no longer have been finite, and was left as it was; -1 elsewhere."""


def ictm(
    velocity: Velocity,
    operator: Callable[[Tensor], Tensor],
    y: Tensor,
    *,
    start: Tensor,
    settings: FlowPriorSettings | None = None,
    seeds: Tensor | None = None,
    compile: bool | dict[str, Any] = False,
    progress: Callable[[int, Tensor], None] | None = None,
) -> Restoration:
    """Images that a flow finds likely and that measure as y.

    At each time t of N, K steps of a fresh Adam on x lower

        λ ‖A(x + v dt) − (t' y + (1 − t') A(start))‖² + ζ dt tr ∂v/∂x − ν log p_t(x),   t' = t + dt, v = v(x, t),

    with ∇ log p_t = (t v − x) / (1 − t), and for the first t −½‖x‖²; then x moves on by v dt. The trace is Hutchinson's
    estimate with Rademacher probes. Images are independent: each one's result is a function of its own start, y and
    seed, up to the network's rounding.

    Args:
        velocity: the flow; see `flow_of_denoiser`, `flow_of_editor`.
        operator: A, differentiable; those of `mtedit_fast.onestep` are. Called on [B, ...].
        y: [B, ...], the measurements.
        start: [B, ...] standard normals, x at t = 0: they give the images' shape.
        seeds: [B] int64, of noise and probes; needed where there are such.
        compile: the inner step as one graph; options of `torch.compile`, or True.
        progress: called after each step with its number and the images' losses [B], on their device.

    Returns:
        The images, and which of them were stopped; these are also named in a warning.

    Raises:
        ValueError: measurements of another shape than A gives, an A without gradient, or no seeds where needed.
    """
    settings = settings or FlowPriorSettings()
    traced = settings.trace_weight > 0 and settings.probes > 0 and settings.inner_steps > 0
    _check(operator, y, start, seeds, traced or (settings.noise > 0 and settings.inner_steps > 0))
    inner: Callable[..., tuple[Tensor, ...]] = partial(_inner_step, velocity, operator, settings)
    move: Callable[..., Tensor] = partial(_euler, velocity)
    if compile is not False:
        options = {} if compile is True else compile
        inner, move = torch.compile(inner, **options), torch.compile(move, **options)
    measured_start = operator(start)
    x, shape = start, start.shape[1:]
    stopped = torch.full((len(x),), -1, dtype=torch.int64, device=x.device)
    times, draws = settings.times(), 1 + settings.probes

    def on_device(numbers: Sequence[float]) -> Sequence[Tensor]:
        """In one copy, which the host waits for; each in memory of its own, aligned as a graph expects."""
        return [number.clone() for number in torch.tensor(numbers, dtype=x.dtype, device=x.device)]

    starts, spans = on_device(times[:-1]), on_device([later - time for time, later in pairwise(times)])
    counts = on_device(range(1, settings.inner_steps + 1))
    # Second derivatives exist for the plain form of attention alone.
    with sdpa_kernel(SDPBackend.MATH) if traced else nullcontext(), _autograd_in_graphs(compile is not False):
        for step in range(settings.steps):
            now, dt = starts[step], spans[step]
            target = torch.lerp(measured_start, y, times[step + 1])
            ahead, losses = x, x.new_zeros(len(x))
            first, second = torch.zeros_like(x), torch.zeros_like(x)
            for k in range(settings.inner_steps):
                counter = _FIRST_COUNTER + (step * settings.inner_steps + k) * draws
                probes = None
                if traced:
                    assert seeds is not None
                    drawn = [seeded_noise(seeds, shape, counter + 1 + j, dtype=x.dtype) for j in range(settings.probes)]
                    probes = torch.stack(drawn).sign()
                leaf = ahead.detach().requires_grad_()  # out here: before torch 2.13 no graph takes it
                ahead, first, second, losses = inner(leaf, first, second, counts[k], now, dt, target, probes, step == 0)
                if settings.noise > 0:
                    assert seeds is not None
                    ahead = ahead + settings.noise * seeded_noise(seeds, shape, counter, dtype=x.dtype)
            ahead = move(ahead, now, dt)
            # Without waiting for the device: an image that has once not been finite stays as it was before that.
            broken = ~ahead.flatten(1).isfinite().all(1) & (stopped < 0)
            stopped = torch.where(broken, step, stopped)
            x = torch.where((stopped < 0).view(-1, *(1,) * (x.ndim - 1)), ahead, x)
            if progress is not None:
                progress(step, losses)
    _warn(stopped, settings.steps)
    return Restoration(x, stopped)


def _inner_step(
    velocity: Velocity,
    operator: Callable[[Tensor], Tensor],
    settings: FlowPriorSettings,
    x: Tensor,
    first: Tensor,
    second: Tensor,
    count: Tensor,
    t: Tensor,
    dt: Tensor,
    target: Tensor,
    probes: Tensor | None,
    initial: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One step of Adam with moments `first` and `second`: x and its moments afterwards, and the losses [B] before.

    x: a leaf that requires a gradient.
    """
    with torch.enable_grad():
        v = velocity(x, t)
        losses = settings.data_weight * (operator(x + v * dt) - target).square().flatten(1).sum(1)
        if probes is not None:
            trace = jacobian_trace(v, x, probes)
            losses = losses + settings.trace_weight * dt * trace
        if initial:
            losses = losses + 0.5 * x.square().flatten(1).sum(1)
        (gradient,) = torch.autograd.grad(losses.sum(), x)
    x, v = x.detach(), v.detach()
    if not initial:
        gradient = gradient - settings.prior_weight / (1 - t) * (t * v - x)
    x, first, second = adam_step(x, gradient, first, second, count, settings.step_size)
    return x, first, second, losses.detach()


def adam_step(
    x: Tensor, gradient: Tensor, first: Tensor, second: Tensor, count: Tensor | int, step_size: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Adam's step number `count` ≥ 1 with its default betas: x and both moments afterwards, element by element."""
    first = torch.lerp(gradient, first, BETAS[0])
    second = torch.lerp(gradient.square(), second, BETAS[1])
    scale = (second / (1 - BETAS[1] ** count)).sqrt() + ADAM_EPS
    return x - step_size * first / (1 - BETAS[0] ** count) / scale, first, second


@torch.no_grad()
def _euler(velocity: Velocity, x: Tensor, t: Tensor, dt: Tensor) -> Tensor:
    return x + velocity(x, t) * dt


def jacobian_trace(v: Tensor, x: Tensor, probes: Tensor) -> Tensor:
    """Hutchinson's estimate [B] of each image's tr ∂v/∂x, differentiable; v [B, ...] was computed from x.

    probes: [n, B, ...] of mean 0 and covariance 1. Those of ±1 (Rademacher) are exact for a diagonal Jacobian.
    """
    total = v.new_zeros(len(v))
    for probe in probes:
        (product,) = torch.autograd.grad(v, x, probe, create_graph=True)
        total = total + (product * probe).flatten(1).sum(1)
    return total / len(probes)


def flow_of_denoiser(denoiser: EDMDenoiser) -> Velocity:
    """An EDM denoiser as a flow: x / t is a clean image with noise σ = (1 − t) / t, and v = (D(x/t, σ) − x) / (1 − t).

    With D's preconditioning put in, nothing is divided by t or 1 − t; its network is asked about σ in [0.002, 80].
    """
    data = denoiser.sigma_data

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        t = t.to(x).reshape(-1, *(1,) * (x.ndim - 1))
        variance = (1 - t).square() + (data * t).square()
        label = ((1 - t) / t).clamp(*SIGMA_RANGE).log() / 4
        output = denoiser.network_output(x * variance.rsqrt(), label.flatten().expand(len(x)))
        return (data**2 * t - (1 - t)) / variance * x + data * variance.rsqrt() * output

    return velocity


def flow_of_editor(editor: Editor, condition: Condition) -> Velocity:
    """One turn of an editor as a flow of its packed latents [B, N, C]: its σ is 1 − t, its velocity ours reversed."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return -editor.velocity(x, 1000 * (1 - t), condition).to(x.dtype)

    return velocity


def _check(operator: Callable[[Tensor], Tensor], y: Tensor, start: Tensor, seeds: Tensor | None, drawing: bool) -> None:
    if len(y) != len(start):
        raise ValueError(f"start: expected one for each of {len(y)} measurements, got {len(start)}")
    with torch.enable_grad():
        measured = operator(start.detach().requires_grad_())
    if measured.shape != y.shape:
        raise ValueError(
            f"y: expected {list(measured.shape)}, as the operator measures images {list(start.shape)}, got "
            f"{list(y.shape)}"
        )
    if not measured.requires_grad:
        raise ValueError(
            "operator: its result has no gradient, so that there is no adjoint to correct images by; write it in "
            "differentiable torch operations, or take one of mtedit_fast.onestep's"
        )
    if drawing and (seeds is None or seeds.shape != start.shape[:1]):
        got = "none" if seeds is None else list(seeds.shape)
        raise ValueError(f"seeds: expected int64 [{len(start)}] for noise and probes, got {got}")


def _autograd_in_graphs(compiled: bool) -> Any:
    """Has torch.compile take torch.autograd.grad into its graphs."""
    if not compiled:
        return nullcontext()
    import torch._dynamo

    return torch._dynamo.config.patch(trace_autograd_ops=True)


def _warn(stopped: Tensor, steps: int) -> None:
    for image, step in enumerate(stopped.tolist()):
        if step >= 0:
            warnings.warn(
                f"image {image}: no longer finite at step {step} of {steps}; returned as it was before", stacklevel=3
            )
