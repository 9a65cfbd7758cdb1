"""Flow Priors against closed forms: a Gaussian's MAP, exact traces, an EDM denoiser's flow; independence, errors."""

import warnings

import pytest
import torch
from tiny import SIZE, tiny_editor
from torch import Tensor, nn

from mtedit_fast.inference_time import flow_priors, problems
from mtedit_fast.inference_time.flow_priors import (
    FlowPriorSettings,
    flow_of_denoiser,
    flow_of_editor,
    ictm,
    jacobian_trace,
)
from mtedit_fast.onestep import EDMDenoiser, Inpainting, MultiCoilMRI, Operator, SuperResolution, new_unet
from mtedit_fast.onestep.operators import PartialFourier
from mtedit_fast.ops import seeded_noise

MEAN, SPREAD = torch.tensor([1.0, -0.5, 2.0]).double(), torch.tensor([0.8, 1.2, 0.5]).double()
MATRIX = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, -1.0]]).double()
SEEDS = torch.tensor([5, 2**40 + 1, -3, 77])
FEW = FlowPriorSettings(steps=3, step_size=0.05, probes=2, noise=0.3)


def gaussian_flow(x: Tensor, t: Tensor) -> Tensor:
    """E[x₀ − ε | x_t = x] of x₀ ~ N(MEAN, diag(SPREAD²))."""
    variance = (t * SPREAD).square() + (1 - t).square()
    return MEAN + (t * SPREAD.square() - (1 - t)) / variance * (x - t * MEAN)


def measure(x: Tensor) -> Tensor:
    return x @ MATRIX.T


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tiny_denoiser(attention: int = 4) -> EDMDenoiser:
    network = new_unet(8, 1, masked=False, widths=(8, 16), layers=1, attention=attention, seed=0)
    return EDMDenoiser(network.requires_grad_(False).double().eval())


@pytest.mark.parametrize("sigma_y", [0.3, 0.7])
def test_a_gaussians_map_is_found(sigma_y):
    """Converged inner problems leave the error of the flow's Euler steps, of second order in their length."""
    y, start = noise(4, 2), noise(4, 3, seed=1)
    prior, likelihood = torch.diag(SPREAD**-2), MATRIX.T @ MATRIX / sigma_y**2
    wanted = torch.linalg.solve(prior + likelihood, (MEAN / SPREAD**2 + y @ MATRIX / sigma_y**2).T).T
    errors = []
    for steps in (5, 20):
        settings = FlowPriorSettings.map(sigma_y, steps=steps, inner_steps=80, step_size=4e-3, probes=0, first_time=0.9)
        warm = start * 0.1 + 0.9 * wanted
        result = ictm(gaussian_flow, measure, y, start=warm, settings=settings)
        assert result.stopped.tolist() == [-1] * 4
        errors.append((result.images - wanted).abs().max().item())
    assert errors[1] < 2e-4  # of values around 1
    assert errors[1] < 0.15 * errors[0]


def test_the_trace_moves_where_the_density_falls():
    """v = c·sin(x): the objective at t = 0 by hand, its gradient through Adam's first step, which is its sign."""
    x, y = noise(2, 5), noise(2, 5, seed=1)
    settings = FlowPriorSettings(
        steps=4, step_size=0.01, data_weight=0.7, trace_weight=30.0, probes=1, noise=0.0, first_time=0.0
    )

    def flow(x, t):
        return 2 * torch.sin(x)

    leaf = x.clone().requires_grad_()
    dt, target = 0.25, 0.25 * y + 0.75 * x
    losses = 0.7 * (leaf + dt * flow(leaf, 0) - target).square().sum(1)
    losses = losses + 30 * dt * 2 * torch.cos(leaf).sum(1) + 0.5 * leaf.square().sum(1)
    losses.sum().backward()
    seen = []
    one = FlowPriorSettings(**(vars(settings) | {"steps": 4}))
    ictm(flow, lambda z: z, y, start=x, settings=one, seeds=SEEDS[:2], progress=lambda i, loss: seen.append((i, loss)))
    assert [i for i, _ in seen] == [0, 1, 2, 3]
    torch.testing.assert_close(seen[0][1], losses.detach(), rtol=1e-12, atol=0)
    zeros, dt = torch.zeros_like(x), torch.tensor(0.25).double()
    probes = torch.ones(1, 2, 5).double()
    now = torch.tensor(0.0).double()
    ahead, *_ = flow_priors._inner_step(
        flow,
        lambda z: z,
        one,
        x.clone().requires_grad_(),
        zeros,
        zeros,
        torch.ones(()).double(),
        now,
        dt,
        target,
        probes,
        True,
    )
    torch.testing.assert_close(ahead, x - 0.01 * leaf.grad.sign(), rtol=0, atol=1e-8)


def test_trace_estimates():
    matrix = noise(2, 6, 6)
    x = noise(2, 6, seed=1).requires_grad_()
    exact = torch.diagonal(matrix, dim1=1, dim2=2).sum(1)
    full = torch.einsum("bij,bj->bi", matrix, x)
    every = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 6)[:, None].expand(-1, 2, -1)
    torch.testing.assert_close(jacobian_trace(full, x, every), exact)  # the mean over all there are: unbiased
    diagonal = x.square() * 3
    torch.testing.assert_close(jacobian_trace(diagonal, x, every[:1]), 6 * x.sum(1))  # exact with any
    single = torch.stack([jacobian_trace(full, x, probe[None])[0] for probe in every])
    off = matrix[0] + matrix[0].T
    variance = 0.5 * (off.square().sum() - off.diagonal().square().sum())
    torch.testing.assert_close(single.var(correction=0), variance)


def test_second_derivatives_go_through_attention():
    """Of a network with attention in each block: the trace of the Jacobian that autograd forms entry by entry."""
    flow, t = flow_of_denoiser(tiny_denoiser(8)), torch.tensor(0.6).double()
    x = noise(1, 1, 8, 8)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        exact = torch.autograd.functional.jacobian(lambda z: flow(z, t), x).view(64, 64).trace()
        leaf = x.requires_grad_()
        basis = torch.eye(64).double().view(64, 1, 1, 8, 8) * 8  # √64 e_i: mean 0 up to sign, covariance 1
        trace = jacobian_trace(flow(leaf, t), leaf, basis)
    torch.testing.assert_close(trace[0], exact)
    result = ictm(flow, Inpainting(torch.ones(1, 1, 8, 8)), x.detach(), start=x.detach(), settings=FEW, seeds=SEEDS[:1])
    assert bool(result.images.isfinite().all())


@pytest.mark.parametrize("t", [0.0, 0.02, 0.3, 0.999, 1.0])
def test_a_denoisers_flow(t):
    denoiser, x = tiny_denoiser(), noise(2, 1, 8, 8)
    with torch.no_grad():
        velocity = flow_of_denoiser(denoiser)(x, torch.tensor(t).double())
        assert bool(velocity.isfinite().all())
        assert velocity.abs().max() < 20
        if 0 < t < 0.99:  # where σ is one that EDM knows, and neither division loses digits
            clean = denoiser(x / t, torch.tensor((1 - t) / t).double())
            torch.testing.assert_close(velocity, (clean - x) / (1 - t), rtol=0, atol=1e-5)  # the label is fp32
        each = torch.tensor([t, 0.5]).double()
        torch.testing.assert_close(flow_of_denoiser(denoiser)(x, each)[:1], velocity[:1])


def test_an_editors_flow():
    editor = tiny_editor()
    image = torch.rand(1, 3, SIZE, SIZE)
    references = editor.encode_image(image)
    options = {"height": SIZE, "width": SIZE, "guidance_scale": 2.5}
    condition = editor.condition(references, editor.encode_text(["Remove red circle"]), **options)
    x = torch.randn(references.shape)
    with torch.no_grad():
        velocity = flow_of_editor(editor, condition)(x, torch.tensor(0.25))
        assert velocity.equal(-editor.velocity(x, torch.tensor(750.0), condition))
    kept = torch.zeros(1, 16, 1)
    kept[:, :8] = 1
    few = FlowPriorSettings(steps=2, step_size=0.01, probes=0, noise=0.0)
    result = ictm(flow_of_editor(editor, condition), lambda z: z * kept, references * kept, start=x, settings=few)
    assert result.images.shape == references.shape
    assert result.stopped.tolist() == [-1]


OPERATORS = {
    "inpainting": lambda: Inpainting((noise(4, 1, 8, 8) > 0).double()),
    "super-resolution": lambda: SuperResolution(2),
    "compressed sensing": lambda: PartialFourier((torch.arange(8) % 2 == 0).double().view(1, 1, 1, 8)),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_a_batch_of_four_is_four_batches_of_one(name):
    operator, flow = OPERATORS[name](), flow_of_denoiser(tiny_denoiser())
    start = seeded_noise(SEEDS, (1, 8, 8), 0, dtype=torch.float64)
    y = operator(noise(4, 1, 8, 8, seed=1))

    def solve(rows: slice) -> Tensor:
        part = operator
        if name == "inpainting":
            part = Inpainting(operator.mask[rows])
        return ictm(flow, part, y[rows], start=start[rows], settings=FEW, seeds=SEEDS[rows]).images

    together = solve(slice(None))
    apart = torch.cat([solve(slice(i, i + 1)) for i in range(4)])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-9)
    assert (ictm(flow, operator, y, start=start, settings=FEW, seeds=SEEDS + 1).images - together).abs().max() > 0.01


def test_mri_of_complex_images():
    operator = MultiCoilMRI(torch.ones(1, 1, 1, 8), torch.ones(1, 8, 8, dtype=torch.complex128))
    clean = noise(1, 2, 8, 8)

    def flow(x, t):  # of one image: the straight way to it
        return (clean - x) / (1 - t)

    settings = FlowPriorSettings(steps=4, step_size=0.1, noise=0.0, probes=0, prior_weight=0.0)
    result = ictm(flow, operator, operator(clean), start=noise(1, 2, 8, 8, seed=1), settings=settings)
    torch.testing.assert_close(result.images, clean)


@pytest.mark.parametrize("probes", [0, 2])
def test_compiled_is_eager(probes):
    """In one graph, its second derivatives, too."""
    layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)).double().requires_grad_(False)
    start = seeded_noise(SEEDS[:2], (6,), 0, dtype=torch.float64)
    settings = FlowPriorSettings(steps=2, step_size=0.05, probes=probes, noise=0.1)
    options = {"y": start.flip(0)[:, :3], "start": start, "settings": settings, "seeds": SEEDS[:2]}
    flow, operator = (lambda x, t: layers(x) * t), (lambda x: x[:, :3])
    eager = ictm(flow, operator, **options)
    compiled = ictm(flow, operator, **options, compile={"backend": "aot_eager", "fullgraph": True})
    torch.testing.assert_close(compiled.images, eager.images, rtol=0, atol=1e-12)


def test_without_inner_steps_it_is_the_flow():
    settings = FlowPriorSettings(steps=5, inner_steps=0)
    start = noise(2, 3)
    x, times = start, settings.times()
    for i in range(5):
        x = x + (times[i + 1] - times[i]) * gaussian_flow(x, torch.tensor(times[i]).double())
    result = ictm(gaussian_flow, measure, noise(2, 2), start=start, settings=settings)
    torch.testing.assert_close(result.images, x)
    assert times[0] == 1e-3
    assert times[-1] == 1


def test_an_image_that_breaks_loses_itself_alone():
    calls = []

    def flow(x, t):
        calls.append(float(t))
        bad = torch.zeros(4, 1).double()
        bad[2] = torch.nan if t > 0.4 else 0
        return gaussian_flow(x, t) + bad

    y, start = noise(4, 2), noise(4, 3, seed=1)
    settings = FlowPriorSettings(steps=4, step_size=0.01, probes=0, noise=0.0)
    with pytest.warns(UserWarning, match="image 2: no longer finite at step 2 of 4"):
        result = ictm(flow, measure, y, start=start, settings=settings)
    assert result.stopped.tolist() == [-1, -1, 2, -1]
    others = [0, 1, 3]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sound = ictm(gaussian_flow, measure, y, start=start, settings=settings)
    assert result.images[others].equal(sound.images[others])
    assert bool(result.images[2].isfinite().all())
    y[0] = torch.nan
    with pytest.warns(UserWarning, match="image 0: no longer finite at step 0"):
        broken = ictm(gaussian_flow, measure, y, start=start, settings=settings)
    assert broken.images[0].equal(start[0])
    assert broken.images[1:].equal(sound.images[1:])


def test_published_and_map_settings():
    plain, enlarging = FlowPriorSettings.published(), FlowPriorSettings.published("super_resolution", steps=10)
    assert (plain.steps, plain.step_size, plain.data_weight, plain.noise) == (100, 1.0, 100.0, 1.0)
    assert (enlarging.steps, enlarging.step_size, enlarging.data_weight) == (10, 1e-2, 1e4)
    posterior = FlowPriorSettings.map(0.1)
    assert (posterior.noise, posterior.prior_weight) == (0, 1)
    assert posterior.data_weight == pytest.approx(50)


# ---- what is around it


def test_plain_reconstructions_and_psnr():
    clean = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
    mask = torch.ones(1, 1, 8, 8)
    mask[..., 3, 3] = 0
    operator = Inpainting(mask)
    filled = problems.plain_reconstruction(operator, operator(clean))
    assert filled[mask > 0].equal(clean[mask > 0])
    assert (filled - clean).abs().max() < 0.05
    for keep_size in (False, True):
        small = SuperResolution(2, keep_size=keep_size)
        assert (problems.plain_reconstruction(small, small(clean)) - clean).abs().max() < 0.35
    fourier = PartialFourier(torch.ones(1, 1, 1, 8))
    for function in (problems.plain_reconstruction, problems.as_picture):
        torch.testing.assert_close(function(fourier, fourier(clean)), clean, rtol=0, atol=1e-6)
    assert problems.as_picture(operator, clean) is clean
    assert problems.plain_reconstruction(Operator(), clean) is clean
    torch.testing.assert_close(problems.psnr(clean + 0.02, clean), torch.tensor([40.0]), rtol=0.01, atol=0)
    both = torch.cat((clean, clean), 1)
    torch.testing.assert_close(problems.psnr(both * 0.9 + 0.1 * both + 0.1, both), torch.tensor([16.9897]))


class OneWay(Operator):
    def __call__(self, x: Tensor) -> Tensor:
        return x.detach().round()[..., None]


X = torch.zeros(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FlowPriorSettings(step_size=-1.0), "step_size: expected a finite number ≥ 0, got -1.0"),
        (lambda: FlowPriorSettings(step_size=0.0), "step_size: expected > 0"),
        (lambda: FlowPriorSettings(noise=float("nan")), "noise: expected a finite"),
        (lambda: FlowPriorSettings(data_weight=float("inf")), "data_weight: expected a finite"),
        (lambda: FlowPriorSettings(steps=0), "steps: expected ≥ 1, got 0"),
        (lambda: FlowPriorSettings(probes=-1), "probes: expected ≥ 0"),
        (lambda: FlowPriorSettings(first_time=1.0), "first_time: expected 0 <= first_time < 1"),
        (lambda: FlowPriorSettings.map(0.0), "sigma_y: expected a standard deviation > 0"),
        (lambda: ictm(gaussian_flow, OneWay(), X[..., None], start=X), "operator: its result has no gradient"),
        (lambda: problems.plain_reconstruction(OneWay(), X[..., None]), "operator: OneWay has no adjoint"),
        (
            lambda: ictm(gaussian_flow, Inpainting(torch.ones(1, 1, 4, 8)), X, start=X),
            r"x: \[2, 3, 8, 8\] does not fit the operator's mask \[1, 1, 4, 8\]",
        ),
        (lambda: ictm(gaussian_flow, SuperResolution(2), X, start=X, seeds=SEEDS[:2]), r"y: expected \[2, 3, 4, 4\]"),
        (lambda: ictm(gaussian_flow, Operator(), X, start=X[:1]), "start: expected one for each of 2"),
        (lambda: ictm(gaussian_flow, Operator(), X, start=X), r"seeds: expected int64 \[2\].*got none"),
        (lambda: ictm(gaussian_flow, Operator(), X, start=X, seeds=SEEDS), r"seeds: .*got \[4\]"),
        (lambda: problems.psnr(X, X[:1]), "images: expected the clean images'"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
