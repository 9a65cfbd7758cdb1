"""The steps of DiffusionNFT and MixGRPO against their formulas, written out in fp64."""

import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from test_dropins import SHAPES, another_policys, formula, make_inputs, make_scheduler, no_worse

from mtedit_fast.dropins import diffusion_nft, mixgrpo


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("variant", ["sde", "dance"])
def test_diffusion_nft_and_mixgrpo_steps(variant, dtypes, shape):
    sigmas = make_scheduler(7).sigmas
    x, v, _ = make_inputs(shape)
    v, x, dtype = v.to(dtypes[0]), x.to(dtypes[1]), torch.promote_types(*dtypes)
    for i in range(7):
        for stored in (None, another_policys(variant, x, v, sigmas, i, 0.8)):

            def generator(stored=stored):
                torch.manual_seed(11)
                return None if stored is not None else torch.Generator().manual_seed(11)

            if variant == "sde":
                noise = randn_tensor(shape, generator=torch.Generator().manual_seed(11), dtype=dtypes[0])
                nft = diffusion_nft.flow_grpo_step(v, x, 0.8, sigmas, i, stored, generator())
                mix = mixgrpo.flow_grpo_step(v, x, 0.8, sigmas, i, stored, generator=generator())
                assert (len(nft), len(mix)) == (3, 5)
            else:
                generator()
                noise = torch.randn(shape, dtype=dtype)
                generator()
                nft = diffusion_nft.dance_grpo_step(v, x, 0.8, sigmas, i, stored)
                generator()
                mix = mixgrpo.dance_grpo_step(v, x, 0.8, sigmas, i, stored, True, True)
                assert (len(nft), len(mix)) == (3, 3)
            assert all(torch.equal(a, b) for a, b in zip(nft, mix, strict=False))
            sample, original, log_prob = nft
            assert (sample.dtype, original.dtype, log_prob.dtype) == (dtype, dtype, torch.float32)
            truth, eager = (
                formula(variant, x.to(d), v.to(d), sigmas.to(d), i, 0.8, sample.to(d))
                for d in (torch.float64, torch.float32)
            )
            if stored is None:
                no_worse(sample, truth[0] + truth[1] * noise.double(), (eager[0] + eager[1] * noise.float()).to(dtype))
            else:
                assert torch.equal(sample, stored)
            no_worse(log_prob, truth[3], eager[3])
            x0 = x.double() - sigmas[i].double() * v.double()
            no_worse(original, x0, x0.to(dtype))
            if variant == "sde":
                no_worse(mix[3], truth[0], eager[0])
                no_worse(mix[4], truth[1], eager[1])


@pytest.mark.parametrize("stored", [False, True])
def test_mixgrpo_determistic(stored):
    """Euler's sample, judged under the SDE's density, even where a sample was given; the noise is drawn regardless."""
    sigmas = make_scheduler(7).sigmas
    x, v, prev = make_inputs((3, 63, 5))
    for i in (0, 3, 6):
        generator, other = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
        out = mixgrpo.flow_grpo_step(
            v, x, 0.8, sigmas, i, prev if stored else None, None if stored else generator, determistic=True
        )
        euler, euler32 = (x.to(d) + (sigmas[i + 1].to(d) - sigmas[i].to(d)) * v.to(d) for d in (torch.double, x.dtype))
        no_worse(out[0], euler, euler32)
        truth, eager = (
            formula("sde", x.to(d), v.to(d), sigmas.to(d), i, 0.8, out[0].to(d)) for d in (torch.double, x.dtype)
        )
        no_worse(out[2], truth[3], eager[3])
        no_worse(out[3], truth[0], eager[0])
        if not stored:
            randn_tensor(x.shape, generator=other)
            assert torch.equal(generator.get_state(), other.get_state())


def test_mixgrpo_dance_solvers():
    sigmas = make_scheduler(7).sigmas
    x, v, prev = make_inputs((3, 63, 5))
    for i in (0, 3, 6):
        for sde_solver in (False, True):
            eta = 0.8 if sde_solver else 0.0
            truth, eager = (
                formula("dance", x.to(d), v.to(d), sigmas.to(d), i, eta, prev.to(d)) for d in (torch.double, x.dtype)
            )
            mean, original = mixgrpo.dance_grpo_step(v, x, 0.8, sigmas, i, prev, False, sde_solver)
            no_worse(mean, truth[0], eager[0])
            no_worse(original, x.double() - sigmas[i].double() * v.double(), x - sigmas[i] * v)
        sample, _, log_prob = mixgrpo.dance_grpo_step(v, x, 0.8, sigmas, i, None, True, False)
        assert torch.equal(sample, mixgrpo.dance_grpo_step(v, x, 0.8, sigmas, i, None, False, False)[0])
        assert torch.equal(log_prob, torch.zeros(3))
        sample, _, log_prob = mixgrpo.dance_grpo_step(v, x, 0.8, sigmas, i, prev, True, False)
        assert torch.equal(sample, prev)
        truth, eager = (
            -((prev.to(d) - x.to(d) - (sigmas[i + 1] - sigmas[i]).to(d) * v.to(d)) ** 2).flatten(1).mean(1)
            / (2 * 0.64 * (sigmas[i] - sigmas[i + 1]).to(d))
            for d in (torch.double, x.dtype)
        )
        no_worse(log_prob, truth, eager)


@pytest.mark.parametrize("step", [diffusion_nft.flow_grpo_step, diffusion_nft.dance_grpo_step])
def test_nft_without_noise_is_euler(step):
    sigmas = make_scheduler(7).sigmas
    x, v, _ = make_inputs((3, 63, 5))
    sample, _, log_prob = step(v, x, 0.0, sigmas, 2, None)
    dt = (sigmas[3] - sigmas[2]).double()
    no_worse(sample, x.double() + dt * v.double(), x + dt.float() * v)
    assert torch.equal(log_prob, torch.zeros(3))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"eta": -1.0}, ValueError, "eta must be 0 or more, got -1.0"),
        ({"index": 5}, ValueError, "index must be between 0 and 4 for 6 sigmas, got 5"),
        ({"index": -1}, ValueError, "index must be between 0 and 4"),
        ({"index": torch.tensor(1.0)}, TypeError, "index must be an int"),
        ({"index": torch.tensor([1, 2])}, TypeError, "index must be an int"),
        ({"index": True}, TypeError, "index must be an int"),
        ({"index": torch.tensor(5)}, ValueError, "index must be between 0 and 4"),
        ({"sigmas": [1.0, 0.5, 0.0]}, TypeError, "sigmas must be a 1-D tensor"),
        ({"sigmas": torch.tensor([1.0, 0.5, 0.5, 0.0])}, ValueError, "sigmas must decrease strictly"),
        ({"latents": torch.zeros(3, 17, 5)}, ValueError, "model_output and latents must have one shape"),
        ({"prev_sample": torch.zeros(3, 17, 5)}, ValueError, "prev_sample must have sample's shape"),
    ],
)
@pytest.mark.parametrize(
    "step",
    [
        diffusion_nft.flow_grpo_step,
        diffusion_nft.dance_grpo_step,
        mixgrpo.flow_grpo_step,
        lambda **kwargs: mixgrpo.dance_grpo_step(**kwargs, grpo=True, sde_solver=False),
    ],
    ids=["nft_flow", "nft_dance", "mix_flow", "mix_dance"],
)
def test_nft_and_mixgrpo_errors(step, changes, error, message):
    x, v, prev = make_inputs((3, 17, 4))
    arguments = {
        "model_output": v,
        "latents": x,
        "eta": 0.7,
        "sigmas": make_scheduler(5).sigmas,
        "index": 1,
        "prev_sample": prev,
    }
    with pytest.raises(error, match=message):
        step(**(arguments | changes))


@pytest.mark.parametrize("step", [diffusion_nft.flow_grpo_step, mixgrpo.flow_grpo_step])
def test_generator_and_prev_sample(step):
    x, v, prev = make_inputs((3, 17, 4))
    with pytest.raises(ValueError, match="generator and prev_sample were both given"):
        step(v, x, 0.7, make_scheduler(5).sigmas, 1, prev, torch.Generator())
