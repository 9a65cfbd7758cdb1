"""Beam search: the plain rollout at width 1, a search written out beam by beam, its cost, and rewards that fail."""

import pytest
import torch
from tiny import tiny_editor
from tiny_families import tiny_klein, tiny_klein_kv, tiny_qwen

from mtedit_fast.editors import KleinEditor, KleinKVEditor, QwenEditor
from mtedit_fast.inference_time.beam_search import beam_search, default_branches
from mtedit_fast.ops import sde_coefficients, sde_step, seeded_noise
from mtedit_fast.rewards import RewardBatch
from mtedit_fast.rollout import RolloutConfig, rollout, sample_seeds, turn_seeds

SIZE, STEPS, TURNS, GUIDANCE = 32, 4, 3, 2.5
PROMPTS = [
    ["Remove rubber red circle", "Add wood blue square", "Change the background to ocean"],
    ["Add metal green circle", "Remove metal green circle", "Add wood blue square"],
    ["Change the background to black", "Add blue sign A", "Remove blue sign A"],
    ["Add blue sign X", "Add blue sign T", "Add blue sign L"],
]
POWER = 0xD1342543DE82EF95


def redness(batch):
    """Something to rank by that every pixel has a part in."""
    return batch.edits[:, :, 0].mean((-1, -2))


@pytest.fixture(scope="module")
def editor():
    return tiny_editor()


def four_images():
    return (torch.rand(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 255).round() / 255


@pytest.fixture(scope="module")
def images():
    return four_images()


def search(editor, images, prompts=None, reward=redness, **options):
    defaults = {"width": 2, "branching": 2, "lookahead": 0, "num_steps": STEPS, "guidance_scale": GUIDANCE}
    prompts = PROMPTS[: len(images)] if prompts is None else prompts
    return beam_search(editor, images, prompts, reward, **(defaults | options))


class Overwriting:
    """An editor whose velocities live in memory that the next call of the same shape writes over, as a graph's do."""

    def __init__(self, editor):
        self.editor, self.memory = editor, {}

    def __getattr__(self, name):
        return getattr(self.editor, name)

    def velocity(self, latents, timestep, condition):
        velocity = self.editor.velocity(latents, timestep, condition)
        return self.memory.setdefault(velocity.shape, torch.empty_like(velocity)).copy_(velocity)


def test_velocities_may_be_written_over(editor, images):
    options = {"micro_batch": 2, "lookahead": 1}
    expected, found = search(editor, images, **options), search(Overwriting(editor), images, **options)
    assert torch.equal(found.images, expected.images)


# ---- the plain rollout


@pytest.mark.parametrize(
    "options",
    [
        {"variant": "ode"},
        {"variant": "dpm2m"},
        {"variant": "sde"},
        {"variant": "cps", "eta": 0.5, "window": (0, 2)},
        {"variant": "dance", "eta": 0.3, "window": (1, 4), "micro_batch": 3},
    ],
    ids=str,
)
def test_one_beam_is_the_plain_rollout_bit_for_bit(editor, images, options):
    seeds = sample_seeds(3, 1, 4)
    config = RolloutConfig(group_size=1, num_steps=STEPS, guidance_scale=GUIDANCE, **options)
    plain = rollout(editor, images, PROMPTS, config, seeds)
    found = search(editor, images, width=1, branching=1, lookahead=2, seeds=seeds, **options)
    assert found.images.shape == (4, 1, TURNS, 3, SIZE, SIZE)
    assert torch.equal(found.best, plain.images)
    assert torch.equal(found.scores[:, 0], redness(RewardBatch(images, plain.images, PROMPTS)))
    assert (found.cost.rows, found.cost.scored) == (4 * TURNS * STEPS, 4)


def test_reference_size_and_default_seeds_are_the_rollouts(editor, images):
    options = {"variant": "ode", "reference_size": (16, 48)}
    config = RolloutConfig(group_size=1, num_steps=STEPS, guidance_scale=GUIDANCE, **options)
    plain = rollout(editor, images, PROMPTS, config, sample_seeds(0, 0, 4))
    assert torch.equal(search(editor, images, width=1, branching=1, **options).best, plain.images)


def test_every_beam_without_a_choice_is_a_rollout_of_its_own(editor, images):
    """Best of n: the keys are those of the draws."""
    found = search(editor, images[:2], width=3, branching=1, variant="ode", branch_at=(0,), micro_batch=2)
    seeds = sample_seeds(0, 0, 2)
    first = [turn * (STEPS + 1) + 1 for turn in range(TURNS)]
    assert found.cost.rows == 2 * 3 * TURNS * STEPS
    config = RolloutConfig(group_size=1, num_steps=STEPS, guidance_scale=GUIDANCE, variant="ode")
    offset = torch.tensor((pow(POWER, first[0], 1 << 64) + (1 << 63)) % (1 << 64) - (1 << 63))
    members = [rollout(editor, images[:2], PROMPTS[:2], config, seeds + m * offset).images for m in range(3)]
    expected = torch.stack(members, 1)  # [2, 3, K, 3, H, W]
    order = expected[:, :, :, 0].mean((-1, -2, -3)).argsort(dim=1, descending=True)
    expected = torch.stack([chains[row] for chains, row in zip(expected, order, strict=True)])
    assert (found.images - expected).abs().max() <= 1 / 255 + 1e-6  # of another batch shape
    assert found.scores.mean(2).diff(dim=1).max() <= 0


# ---- a direct implementation


def direct(editor, image, prompts, *, width, branching, lookahead, branch_at, variant, window, eta=0.7):
    """One image, one beam at a time, nothing shared. Returns the chains, best first, and all candidates' images."""
    schedule = editor.schedule(STEPS, SIZE, SIZE)
    stochastic = () if variant == "ode" else range(*window)
    table = sde_coefficients(schedule.sigmas, variant=variant, eta=eta, sde_steps=stochastic)
    euler = sde_coefficients(schedule.sigmas, variant="ode")
    beams, judged = [(torch.empty(0, 3, SIZE, SIZE), sample_seeds(0, 0, 1))], []
    for turn, prompt in enumerate(prompts):
        states = []
        for chain, key in beams:
            edited = chain[-1:] if turn else image[None]
            condition = editor.condition(
                editor.encode_image(edited),
                editor.encode_text([prompt]),
                height=SIZE,
                width=SIZE,
                guidance_scale=GUIDANCE,
            )
            states.append((chain, key, condition, None))
        for number in range(STEPS + 1):
            fanned = []
            draws = width * branching // len(states) if number in branch_at else 1
            power = pow(POWER, turn * (STEPS + 1) + number + 1, 1 << 64)
            for chain, key, condition, x in states:
                for m in range(draws):
                    mixed = (int(key) + m * power) % (1 << 64)
                    child = torch.tensor([mixed - (1 << 64) if mixed >> 63 else mixed])
                    noise = turn_seeds(child, turn)
                    if number == 0:
                        y = seeded_noise(noise, editor.latent_shape(SIZE, SIZE), 0)
                    else:
                        v = editor.velocity(x, schedule.timesteps[number - 1], condition)
                        y = sde_step(x, v, table, number - 1, seed=noise).prev_sample
                    fanned.append((chain, child, condition, y))
            if number in branch_at and len(fanned) > width:
                scores = []
                for chain, _, condition, z in fanned:
                    for step in range(number, min(number + lookahead, STEPS)):
                        v = editor.velocity(z, schedule.timesteps[step], condition)
                        z = sde_step(z, v, euler, step).prev_sample
                    last = min(number + lookahead, STEPS)
                    if last < STEPS:
                        z = z - schedule.sigmas[last] * editor.velocity(z, schedule.timesteps[last], condition)
                    shown = (editor.decode(z, SIZE, SIZE) * 255).round() / 255
                    judged.append(shown[0])
                    scores.append(torch.cat([chain, shown])[:, 0].mean())
                best = sorted(range(len(fanned)), key=lambda i, s=scores: -s[i])[:width]
                fanned = [fanned[i] for i in best]
            states = fanned
        beams = [
            (torch.cat([chain, (editor.decode(x, SIZE, SIZE) * 255).round() / 255]), key) for chain, key, _, x in states
        ]
    chains = sorted((chain for chain, _ in beams), key=lambda chain: -chain[:, 0].mean())
    return torch.stack(chains), judged


@pytest.mark.parametrize(
    "options",
    [
        {"width": 2, "branching": 2, "lookahead": 0, "branch_at": (1, 3), "variant": "sde", "window": (0, 3)},
        {"width": 2, "branching": 3, "lookahead": 2, "branch_at": (0, 2), "variant": "sde", "window": (1, 2)},
        {"width": 1, "branching": 3, "lookahead": 9, "branch_at": (2, 4), "variant": "dance", "window": (1, 4)},
        {"width": 3, "branching": 2, "lookahead": 1, "branch_at": (0,), "variant": "ode", "window": None},
    ],
    ids=str,
)
@torch.no_grad()
def test_against_a_direct_implementation(editor, images, options):
    seen = []

    def reward(batch):
        seen.append(batch.edits[:, -1])
        return redness(batch)

    found = search(editor, images[:1], reward=reward, **options)
    chains, judged = direct(editor, images[0], PROMPTS[0], **options)
    # rounding to 8 bit turns the model's batch noise into a level here and there
    assert (torch.cat(seen[:-1]) - torch.stack(judged)).abs().max() <= 1 / 255 + 1e-6
    assert (found.images[0] - chains).abs().max() <= 1 / 255 + 1e-6
    assert (found.images[0] - chains).abs().mean() < 1e-5
    assert found.cost.scored == len(judged) + options["width"]


# ---- batches, noise and cost


def test_a_batch_of_four_is_four_batches_of_one(editor, images):
    options = {"width": 2, "branching": 2, "lookahead": 1, "branch_at": (0, 2)}
    seeds = sample_seeds(5, 0, 4)
    whole = search(editor, images, seeds=seeds, **options)
    for row in range(4):
        one = slice(row, row + 1)
        alone = search(editor, images[one], PROMPTS[one], seeds=seeds[one], **options)
        assert (whole.scores[one] - alone.scores).abs().max() < 1e-5
        assert (whole.images[one] - alone.images).abs().max() <= 1 / 255 + 1e-6
        assert (whole.images[one] - alone.images).abs().mean() < 1e-5


def test_candidates_of_a_narrow_search_are_a_wider_ones(editor, images):
    """Turn 1's first branching: all of them; and the first is what the plain rollout draws."""

    def candidates(width, branching):
        seen = []

        def reward(batch):
            seen.append(batch.edits)
            return redness(batch)

        search(editor, images[:1], reward=reward, width=width, branching=branching, branch_at=(1,), lookahead=STEPS)
        return seen[0]

    def held(image, among):
        return ((among - image).abs().amax((1, 2, 3, 4)) <= 1 / 255 + 1e-6).any()

    one, two, four = candidates(1, 2), candidates(2, 2), candidates(4, 2)
    assert [len(one), len(two), len(four)] == [2, 4, 8]
    assert all(held(image, two) for image in one)
    assert all(held(image, four) for image in two)
    config = RolloutConfig(group_size=1, num_steps=STEPS, guidance_scale=GUIDANCE, window=(0, 1))
    plain = rollout(editor, images[:1], [PROMPTS[0][:1]], config, sample_seeds(0, 0, 1)).images
    assert (four[:1] - plain).abs().max() <= 1 / 255 + 1e-6


def test_cost_is_what_the_transformer_and_the_encoders_saw(images, monkeypatch):
    editor = tiny_editor()
    batches, encoded, text = [], [], []
    hook = editor.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    for name, log in (("encode_image", encoded), ("encode_text", text)):
        call = getattr(editor, name)
        monkeypatch.setattr(editor, name, lambda x, *a, call=call, log=log: log.append(len(x)) or call(x, *a))
    found = search(editor, images, width=2, branching=3, lookahead=1, branch_at=(2, 3))
    hook.remove()
    assert found.cost.calls == len(batches)
    assert found.cost.rows == sum(batches)
    # two steps before the beams part, 6 candidates at step 2 and one ahead, 6 at step 3; what survives is known there
    first = [1, 1, 6, 6, 6]
    later = [2, 2, 6, 6, 6]
    assert batches == [4 * rows for rows in first + 2 * later]
    assert encoded == [4, 8, 8]  # images: each parent once, however many beams come of it
    assert text == [4, 4, 4]


def test_a_lookahead_along_the_ode_costs_its_survivors_nothing(editor, images):
    found = search(editor, images[:2], width=1, branching=3, lookahead=STEPS, variant="ode", branch_at=(0,))
    assert found.cost.rows == 2 * TURNS * 3 * STEPS
    greedy = search(editor, images[:2], width=1, branching=3, lookahead=0, variant="ode", branch_at=(0,))
    assert greedy.cost.rows == 2 * TURNS * (3 + STEPS - 1)


def test_defaults(editor, images):
    assert default_branches(6) == (1, 2)
    assert default_branches(28) == (4, 9)
    assert default_branches(2) == (1,)
    assert default_branches(28, range(6, 12)) == (9,)
    assert default_branches(28, range(20, 22)) == (22,)
    assert default_branches(6, range(0)) == (0,)
    explicit = search(editor, images[:2], branch_at=(1,))
    assert torch.equal(search(editor, images[:2]).images, explicit.images)


@pytest.mark.parametrize(
    "build",
    [
        lambda: QwenEditor(tiny_qwen(), negative_prompt=" "),
        lambda: KleinEditor(tiny_klein(is_distilled=False), max_sequence_length=24, negative_prompt=""),
        lambda: KleinKVEditor(tiny_klein_kv(), max_sequence_length=24),
    ],
    ids=["qwen", "klein", "klein_kv"],
)
def test_other_families(build):
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    editor, prompts = build(), [["add a red circle", "remove the circle"], ["now a blue square", "add a red circle"]]
    options = {"num_steps": 2, "guidance_scale": 2.0}
    config = RolloutConfig(group_size=1, **options)
    plain = rollout(editor, images, prompts, config, sample_seeds(0, 0, 2))
    one = search(editor, images, prompts, width=1, branching=1, **options)
    assert torch.equal(one.best, plain.images)
    found = search(editor, images, prompts, branch_at=(1,), **options)
    alone = search(editor, images[1:2], prompts[1:], branch_at=(1,), seeds=sample_seeds(0, 0, 2)[1:], **options)
    assert (found.scores[1:] - alone.scores).abs().max() < 1e-5
    branches = 1 if isinstance(editor, KleinKVEditor) else 2
    assert found.cost.rows == 2 * branches * (1 + 4 + 2 + 4)
