"""Rollouts: exact replay, noise that ignores the batch split, windows, shared conditioning, NaN flags."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from tiny import SIZE, tiny_editor
from torch.utils._pytree import tree_leaves

from mtedit_fast.ops import sde_step, seeded_noise
from mtedit_fast.rollout import RolloutConfig, replay, rollout, sample_seeds
from mtedit_fast.sampling.multistep import dpm2m_coefficients, dpm2m_step
from mtedit_fast.timing import PhaseTimer

PROMPTS = [["Remove the red circle", "Add a blue square", "Change the background to sky"], ["a b c", "d e", "f"]]
CONFIG = RolloutConfig(group_size=4, num_steps=4, micro_batch=4, guidance_scale=2.5)


@pytest.fixture(scope="module")
def editor():
    editor = tiny_editor()
    editor.transformer.add_adapter(LoraConfig(r=4, target_modules=editor.lora_targets, init_lora_weights=False))
    return editor


@pytest.fixture(scope="module")
def references():
    return torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def trajectories(editor, references):
    return rollout(editor, references, PROMPTS, replace(CONFIG, keep_means=True), sample_seeds(0, 0, 8))


def test_replay_is_exact_in_the_rollouts_shape(editor, trajectories):
    for rows in trajectories.micro_batches():
        for turn in range(3):
            for position in range(3):
                out = replay(editor, trajectories, rows, turn, position)
                assert torch.equal(out.log_prob.detach(), trajectories.log_probs[rows, turn, position])
                assert torch.equal(out.mean.detach(), trajectories.means[rows, turn, position])
                assert out.log_prob.requires_grad


def test_several_steps_in_one_forward_agree_up_to_batch_noise(editor, trajectories):
    rows, positions = torch.arange(4, 8).repeat(3), torch.arange(3).repeat_interleave(4)
    out = replay(editor, trajectories, rows, 1, positions, return_mean=False)
    stored = trajectories.log_probs[rows, 1, positions]
    assert (out.log_prob.detach() - stored).abs().max() <= 1e-5
    assert out.mean.numel() == 0
    dt, _, std = trajectories.step_constants(positions)
    sigmas = trajectories.sigmas
    assert torch.equal(dt.view(3, 4)[:, 0], sigmas[1:4] - sigmas[:3])
    assert torch.equal(std.view(3, 4)[:, 2], trajectories.coefficients.table[:3, 3])


def test_log_probs_are_those_of_the_stored_states(editor, trajectories):
    """An independent fp64 Gaussian density of the stored transition, from sigma and the velocity alone."""
    rows, turn, step = slice(0, 4), 0, 1
    before, after = trajectories.latents[rows, turn, 1].double(), trajectories.latents[rows, turn, 2].double()
    sigma, sigma_next = (trajectories.sigmas[i].item() for i in (step, step + 1))
    with torch.no_grad():
        condition = editor.condition(
            trajectories.references[rows, turn],
            trajectories.text_rows(rows, turn),
            height=SIZE,
            width=SIZE,
            guidance_scale=2.5,
        )
        velocity = editor.velocity(before.float(), trajectories.timesteps[step], condition).double()
    dt, s2 = sigma_next - sigma, CONFIG.eta**2 * sigma / (1 - sigma)
    mean = before * (1 + s2 * dt / (2 * sigma)) + velocity * (1 + s2 * (1 - sigma) / (2 * sigma)) * dt
    expected = torch.distributions.Normal(mean, (s2 * -dt) ** 0.5).log_prob(after).flatten(1).mean(1)
    assert (trajectories.log_probs[rows, turn, step] - expected).abs().max() < 1e-5


def test_noise_and_steps_ignore_the_batch_split(editor, references, trajectories):
    """1×16 against 4×4: noise bit-identical, and the step too when the velocity is; images within batch noise."""
    config = replace(CONFIG, group_size=8, micro_batch=16)
    seeds = sample_seeds(1, 0, 16)
    whole = rollout(editor, references, PROMPTS, config, seeds)
    split = rollout(editor, references, PROMPTS, replace(config, micro_batch=4), seeds)
    assert torch.equal(whole.latents[:, 0, 0], split.latents[:, 0, 0])
    assert torch.equal(whole.latents[:, 2, 0], split.latents[:, 2, 0])
    assert (whole.latents[:, 0] - split.latents[:, 0]).abs().max() < 1e-4
    velocity = torch.randn(16, 16, 64)
    step = sde_step(whole.latents[:, 0, 0], velocity, whole.coefficients, 0, seed=seeds)
    for start in range(0, 16, 4):
        rows = slice(start, start + 4)
        part = sde_step(whole.latents[rows, 0, 0], velocity[rows], whole.coefficients, 0, seed=seeds[rows])
        assert torch.equal(part.prev_sample, step.prev_sample[rows])
        assert torch.equal(part.log_prob, step.log_prob[rows])


@pytest.mark.parametrize(("variant", "eta"), [("sde", 0.7), ("dance", 0.3), ("cps", 0.6), ("wan", 1.0)])
def test_constants_of_stored_steps(editor, references, variant, eta):
    """The scale of the noise is what scatters the states around their means; flow_grpo's std_dev_t differs for sde."""
    config = replace(CONFIG, variant=variant, eta=eta, window=(1, 3), keep_means=True)
    result = rollout(editor, references, PROMPTS, config, sample_seeds(0, 0, 8))
    dt, scale, std = result.step_constants(torch.arange(2))
    sigmas = result.sigmas.double()
    assert torch.equal(dt, result.sigmas[2:4] - result.sigmas[1:3])
    found = (result.latents[:, :, 1:] - result.means).double().square().mean((0, 1, 3, 4)).sqrt()
    torch.testing.assert_close(scale.double(), found, rtol=0.02, atol=0)
    if variant == "sde":
        torch.testing.assert_close(std.double(), eta * (sigmas[1:3] / (1 - sigmas[1:3])).sqrt(), rtol=1e-5, atol=0)
    else:
        assert torch.equal(std, scale)


def test_window_stores_only_its_steps(editor, references):
    config = replace(CONFIG, window=(1, 2))
    result = rollout(editor, references, PROMPTS, config, sample_seeds(0, 0, 8))
    assert result.latents.shape == (8, 3, 2, 16, 64)
    assert result.log_probs.shape == (8, 3, 1)
    out = replay(editor, result, slice(0, 4), 2, 0)
    assert torch.equal(out.log_prob.detach(), result.log_probs[:4, 2, 0])
    # outside the window the ODE: the state before the window is an Euler step from the seeded noise
    noise = seeded_noise(sample_seeds(0, 0, 8)[:4], (16, 64), 0)
    with torch.no_grad():
        condition = editor.condition(
            result.references[:4, 0],
            result.text_rows(slice(0, 4), 0),
            height=SIZE,
            width=SIZE,
            guidance_scale=2.5,
        )
        velocity = editor.velocity(noise, result.timesteps[0], condition)
    expected = noise.double() + (result.sigmas[1] - result.sigmas[0]).double() * velocity.double()
    assert (result.latents[:4, 0, 0] - expected).abs().max() < 1e-6


def test_ode_has_no_stored_steps_and_images_are_8_bit(editor, references):
    result = rollout(editor, references, PROMPTS, replace(CONFIG, variant="ode"), sample_seeds(0, 0, 8))
    assert result.log_probs.shape == (8, 3, 0)
    levels = result.images * 255
    assert torch.equal(levels.round() / 255, result.images)
    assert result.images.min() >= 0
    assert result.images.max() <= 1


def test_latent_chain_hands_latents_on(editor, references):
    config = replace(CONFIG, latent_chain=True, window=(0, 4))
    result = rollout(editor, references, PROMPTS, config, sample_seeds(0, 0, 8))
    assert torch.equal(result.references[:, 1], result.latents[:, 0, -1])
    plain = rollout(editor, references, PROMPTS, replace(config, latent_chain=False), sample_seeds(0, 0, 8))
    assert torch.equal(plain.latents[:, 0], result.latents[:, 0])
    assert not torch.equal(plain.latents[:, 1], result.latents[:, 1])


def test_bf16_state_replays_exactly(references):
    editor = tiny_editor(torch.bfloat16)
    config = replace(CONFIG, state_dtype=torch.bfloat16)
    result = rollout(editor, references, PROMPTS, config, sample_seeds(0, 0, 8))
    assert result.latents.dtype == torch.bfloat16
    out = replay(editor, result, slice(4, 8), 1, 2)
    assert torch.equal(out.log_prob, result.log_probs[4:, 1, 2])


def test_timer_and_progress(editor, references):
    timer, done = PhaseTimer(), []
    rollout(
        editor,
        references,
        PROMPTS,
        replace(CONFIG, variant="ode"),
        sample_seeds(0, 0, 8),
        timer=timer,
        progress=done.append,
    )
    assert sum(done) == 8 * 3
    seconds = timer.seconds()
    assert set(seconds) == {"encode", "denoise", "decode"}
    assert all(value > 0 for value in seconds.values())
    assert timer.seconds() == {}


@pytest.mark.parametrize("reference_size", [(32, 32), (96, 64)])
def test_references_at_their_own_resolution(editor, references, reference_size):
    config = replace(CONFIG, reference_size=reference_size)
    result = rollout(editor, references, PROMPTS, config, sample_seeds(0, 0, 8))
    tokens = reference_size[0] * reference_size[1] // 256
    assert result.references.shape == (8, 3, tokens, 64)
    small = F.interpolate(references, reference_size, mode="bicubic", antialias=True).clamp(0, 1)
    assert torch.equal(result.references[::4, 0], editor.encode_image(small))
    small = F.interpolate(result.images[:, 0], reference_size, mode="bicubic", antialias=True).clamp(0, 1)
    assert torch.equal(result.references[:4, 1], editor.encode_image(small[:4]))
    out = replay(editor, result, slice(0, 4), 2, 1)
    assert torch.equal(out.log_prob.detach(), result.log_probs[:4, 2, 1])


def test_seeds_are_a_pure_function():
    assert torch.equal(sample_seeds(3, 4, 8)[:5], sample_seeds(3, 4, 5))
    everything = torch.cat([sample_seeds(s, i, 100) for s in range(3) for i in range(3)])
    assert len(everything.unique()) == 900


def test_nan_is_flagged_per_step_and_raised_after_the_loop(references):
    editor = tiny_editor()
    embed = editor.transformer.x_embedder
    calls = []

    def poison(module, inputs, output):
        calls.append(1)
        if len(calls) == 6:  # micro-batch 0, turn 1, step 1
            output = output.clone()
            output[2] = float("nan")
        return output

    embed.register_forward_hook(poison)
    result = rollout(editor, references, PROMPTS, CONFIG, sample_seeds(0, 0, 8))
    assert not result.finite[2, 1, 1]
    assert result.finite[2, 0].all()
    assert result.finite[[0, 1, 3, 4, 5, 6, 7]].all()
    with pytest.raises(ValueError, match=r"velocity: expected finite.*\(sample, turn, step\) \[\[2, 1, 1\]"):
        result.raise_if_not_finite()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"references": torch.rand(2, 1, SIZE, SIZE)}, r"references: expected \[P, 3, H, W\]"),
        ({"references": torch.rand(2, 3, 60, SIZE)}, "height, width: expected positive multiples of 16"),
        ({"instructions": PROMPTS[:1]}, r"instructions: expected one list per reference \(2\), got 1"),
        ({"instructions": [["a"], ["a", "b"]]}, "instructions: expected equally many turns"),
        ({"seeds": sample_seeds(0, 0, 7)}, r"seeds: expected int64 \[8\]"),
        ({"seeds": torch.zeros(8)}, r"seeds: expected int64 \[8\]"),
        ({"config": replace(CONFIG, window=(2, 5))}, "window: expected 0 <= start < stop <= 4 of 4 sde steps"),
        ({"config": replace(CONFIG, window=(2, 4), variant="cps", eta=0.5)}, "window: .* <= 3 of 4 cps steps"),
        ({"config": replace(CONFIG, eta=-0.1)}, "eta"),
        ({"config": replace(CONFIG, micro_batch=0)}, "group_size, micro_batch: expected >= 1"),
        (
            {"config": replace(CONFIG, latent_chain=True, reference_size=(32, 32))},
            r"reference_size: expected None or the edit's \(64, 64\) with latent_chain",
        ),
    ],
)
def test_bad_input_names_the_argument(editor, references, change, message):
    arguments = {"references": references, "instructions": PROMPTS, "config": CONFIG, "seeds": sample_seeds(0, 0, 8)}
    with pytest.raises(ValueError, match=message):
        rollout(editor, **(arguments | change))


def test_references_of_different_sizes_are_refused(editor):
    images = [torch.rand(3, SIZE, SIZE), torch.rand(3, 32, SIZE)]
    with pytest.raises(TypeError, match=r"references: expected one tensor.*sizes 32×64, 64×64; resize them"):
        rollout(editor, images, PROMPTS, CONFIG, sample_seeds(0, 0, 8))
    with pytest.raises(ValueError, match=r"references: expected latents \[n, R·16, 64\] of images of 64×64.*one size"):
        editor.condition(torch.rand(2, 9, 64), {}, height=SIZE, width=SIZE)
    with pytest.raises(ValueError, match="KontextEditor takes 1 to 1 references per edit, got 2"):
        editor.encode_image(torch.rand(2, 2, 3, SIZE, SIZE))
    with pytest.raises(ValueError, match="references: KontextEditor takes 1 to 1 per edit, got 2"):
        editor.condition(torch.rand(2, 32, 64), {}, height=SIZE, width=SIZE)


def test_trajectories_move_whole(editor, references):
    trajectories = rollout(editor, references, PROMPTS, CONFIG, sample_seeds(0, 0, 8))
    moved = trajectories.to("meta")
    tensors = [leaf for leaf in tree_leaves(vars(moved)) if isinstance(leaf, torch.Tensor)]
    assert tensors
    assert all(tensor.is_meta for tensor in tensors)
    assert (moved.config, moved.steps, len(moved)) == (trajectories.config, trajectories.steps, 8)


def test_dpm2m_rollout_is_the_solver_on_the_editors_velocity(editor, references):
    config = replace(CONFIG, variant="dpm2m", num_steps=5)
    result = rollout(editor, references, PROMPTS, config, sample_seeds(0, 0, 8))
    assert result.latents.shape == (8, 3, 0, 16, 64)
    latents, previous = seeded_noise(sample_seeds(0, 0, 8)[:4], (16, 64), 0), None
    sigmas = result.sigmas.tolist()
    for step, coefficients in enumerate(dpm2m_coefficients(sigmas)):
        with torch.no_grad():
            velocity = result.velocity(editor, latents, result.timesteps[step], slice(0, 4), 0)
        estimate = latents - sigmas[step] * velocity
        latents, previous = dpm2m_step(latents, velocity, previous, coefficients), estimate
    assert torch.equal(result.clean[:4, 0], latents)
    euler = rollout(editor, references, PROMPTS, replace(config, variant="ode"), sample_seeds(0, 0, 8))
    assert not torch.equal(euler.clean, result.clean)


def test_estimates_are_the_clean_images_the_states_point_to(editor, references):
    config = replace(CONFIG, keep_estimates=True, window=(1, 3))
    result = rollout(editor, references, PROMPTS, config, sample_seeds(0, 0, 8))
    for position in range(3):
        step = 1 + position
        with torch.no_grad():
            state = result.latents[:4, 1, position]
            velocity = result.velocity(editor, state, result.timesteps[step], slice(0, 4), 1)
        assert torch.equal(result.estimates[:4, 1, position], state - result.sigmas[step] * velocity)
    to_the_end = replace(config, window=(2, 4))
    result = rollout(editor, references, PROMPTS, to_the_end, sample_seeds(0, 0, 8))
    assert torch.equal(result.estimates[:, :, -1], result.clean)
    deterministic = rollout(editor, references, PROMPTS, replace(config, variant="ode"), sample_seeds(0, 0, 8))
    assert deterministic.estimates.shape[2] == deterministic.latents.shape[2] == 0


def test_groups_are_handed_over_while_sampling_goes_on(editor, references):
    seen = []

    def finished(rows, images):
        assert images.shape[1] == 3
        seen.append((rows, images.clone()))

    config = replace(CONFIG, micro_batch=3, variant="ode")  # 0-3, 3-6: group 0 is complete; 6-8: group 1
    result = rollout(editor, references, PROMPTS, config, sample_seeds(0, 0, 8), on_finished=finished)
    assert [rows for rows, _ in seen] == [slice(0, 4), slice(4, 8)]
    assert all(torch.equal(images, result.images[rows]) for rows, images in seen)
    seen.clear()
    rollout(editor, references, PROMPTS, replace(config, micro_batch=8), sample_seeds(0, 0, 8), on_finished=finished)
    assert [rows for rows, _ in seen] == [slice(0, 8)]
