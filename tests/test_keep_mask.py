"""Edits through a keep-mask: the plain edit where nothing is kept, the reference where all is, the line between."""

import pytest
import torch
from tiny import SIZE, tiny_editor
from tiny_families import tiny_klein, tiny_klein_kv, tiny_qwen
from torch import Tensor

from mtedit_fast.editors import KleinEditor, QwenEditor
from mtedit_fast.editors.klein_kv import KleinKVEditor
from mtedit_fast.inference_time.keep_mask import KeepMaskSettings, keep_mask_edit, kept_tokens
from mtedit_fast.ops import seeded_noise
from mtedit_fast.rollout import RolloutConfig, rollout

EDITORS = {
    "kontext": (tiny_editor, 2.5),
    "klein": (
        lambda: KleinEditor(tiny_klein(is_distilled=False), max_sequence_length=96, negative_prompt=""),
        2.0,
    ),
    "klein_kv": (lambda: KleinKVEditor(tiny_klein_kv(), max_sequence_length=96), 1.0),
    "qwen": (lambda: QwenEditor(tiny_qwen(), max_sequence_length=96, negative_prompt=" "), 2.0),
}
INSTRUCTIONS = ["remove the red circle", "add a blue square", "remove the square", "add a circle to the circle"]
SEEDS = torch.tensor([3, 2**40, -5, 7])
STEPS = 3


def pictures(count: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(count, 3, SIZE, SIZE, generator=generator) * 255).round() / 255


def left_half(count: int = 1) -> Tensor:
    keep = torch.zeros(count, 1, SIZE, SIZE, dtype=torch.bool)
    keep[..., : SIZE // 2] = True
    return keep


def edit(editor, images: Tensor, keep: Tensor, rows: slice = slice(None), guidance: float = 2.5, **options) -> Tensor:
    return keep_mask_edit(
        editor,
        images[rows],
        INSTRUCTIONS[rows] if len(images) == 4 else INSTRUCTIONS[: len(images)],
        keep,
        num_steps=STEPS,
        guidance_scale=guidance,
        seeds=SEEDS[rows][: len(images[rows])],
        settings=KeepMaskSettings(**options),
    )


def record(editor, name: str) -> list[Tensor]:
    """The first argument of each call of one of the editor's methods."""
    seen, original = [], getattr(editor, name)

    def call(first, *others):
        seen.append(first.clone())
        return original(first, *others)

    setattr(editor, name, call)
    return seen


@pytest.mark.parametrize("family", EDITORS)
def test_with_nothing_kept_it_is_the_plain_edit(family):
    make, guidance = EDITORS[family]
    editor, images = make(), pictures(2)
    config = RolloutConfig(group_size=1, num_steps=STEPS, variant="ode", micro_batch=2, guidance_scale=guidance)
    plain = rollout(editor, images, [[text] for text in INSTRUCTIONS[:2]], config, SEEDS[:2]).images[:, 0]
    edited = edit(editor, images, torch.zeros(1, 1, SIZE, SIZE), guidance=guidance)
    assert edited.equal(plain)


@pytest.mark.parametrize("family", EDITORS)
def test_kept_tokens_go_straight_to_the_reference(family):
    make, guidance = EDITORS[family]
    editor, images, keep = make(), pictures(2), left_half()
    states, decoded = record(editor, "velocity"), record(editor, "decode")
    edited = edit(editor, images, keep, guidance=guidance, inner_steps=0)
    references = editor.encode_image(images).float()
    held = kept_tokens(keep, references.shape[1])[0]
    assert held.float().mean() == 0.5
    noise = seeded_noise(SEEDS[:2], references.shape[1:], 0)
    sigmas = editor.schedule(STEPS, SIZE, SIZE).sigmas
    assert len(states) == STEPS
    for state, sigma in zip(states, sigmas, strict=False):
        line = (1 - sigma) * references + sigma * noise
        torch.testing.assert_close(state[:, held], line[:, held], rtol=0, atol=2e-6)
    assert decoded[0][:, held].equal(references[:, held])
    assert edited[..., : SIZE // 2].equal(images[..., : SIZE // 2])
    assert not edited[..., SIZE // 2 :].equal(images[..., SIZE // 2 :])


def test_what_is_kept_changes_what_the_model_does_elsewhere():
    editor, images = tiny_editor(), pictures(2)
    plain, kept = edit(editor, images, torch.zeros(1, 1, SIZE, SIZE)), edit(editor, images, left_half())
    assert not plain[..., SIZE // 2 :].equal(kept[..., SIZE // 2 :])


@pytest.mark.parametrize("family", EDITORS)
def test_guidance_has_the_model_agree_with_the_line(family):
    make, guidance = EDITORS[family]
    editor, images = make(), pictures(2)
    references = editor.encode_image(images).float()
    held = kept_tokens(left_half(), references.shape[1])[0]
    straight = (seeded_noise(SEEDS[:2], references.shape[1:], 0) - references)[:, held]
    velocities, original = [], editor.velocity

    def velocity(*arguments):
        result = original(*arguments)
        velocities.append(result.detach().float()[:, held])
        return result

    editor.velocity = velocity
    edit(editor, images, left_half(), guidance=guidance, inner_steps=4, step_size=0.01, guided_share=0.34)
    assert len(velocities) == 4 + STEPS  # one step of three is guided
    losses = [(each - straight).square().sum().item() for each in velocities[:5]]
    assert losses == sorted(losses, reverse=True)
    assert losses[4] < losses[0]


def test_guidance_by_hand():
    """Adam's first step is the gradient's sign: the state of the second forward, free tokens alone."""
    editor, images = tiny_editor(), pictures(2)
    states = record(editor, "velocity")
    edit(editor, images, left_half(), step_size=0.02, guided_share=0.3)
    references = editor.encode_image(images)
    held = kept_tokens(left_half(), 16)[0]
    options = {"height": SIZE, "width": SIZE, "guidance_scale": 2.5}
    condition = editor.condition(references, editor.encode_text(INSTRUCTIONS[:2]), **options)
    noise = seeded_noise(SEEDS[:2], references.shape[1:], 0).requires_grad_()
    velocity = editor.velocity(noise, torch.tensor(1000.0), condition)
    (velocity - (noise.detach() - references))[:, held].square().sum().backward()
    moved = noise.detach() - 0.02 * noise.grad.sign() * ~held[:, None]
    assert states[0].equal(noise.detach())
    far = noise.grad.abs() > 1e-5  # of those at 0 the sign is rounding
    torch.testing.assert_close(states[1][far], moved[far], rtol=0, atol=1e-4)
    assert states[1][:, held].equal(noise.detach()[:, held])


def test_with_all_kept_it_is_the_reference():
    editor, images, keep = tiny_editor(), pictures(2), torch.ones(1, 1, SIZE, SIZE)
    assert edit(editor, images, keep).equal(images)
    through_vae = (editor.decode(editor.encode_image(images), SIZE, SIZE) * 255).round() / 255
    assert edit(editor, images, keep, paste=False).equal(through_vae)


def test_a_batch_of_four_is_four_batches_of_one():
    editor, images = tiny_editor(), pictures()
    keep = left_half(4)
    keep[1] = keep[1].flip(-1)
    keep[2] = False
    together = edit(editor, images, keep, paste=False)
    for i in range(4):
        alone = edit(editor, images, keep[i : i + 1], slice(i, i + 1), paste=False)
        assert (together[i] - alone[0]).abs().max() < 1.5 / 255  # a rounding apart at most
    by_two = edit(editor, images, keep, paste=False, micro_batch=2)
    assert (together - by_two).abs().max() < 1.5 / 255
    assert edit(editor, images, left_half().expand(4, -1, -1, -1).int()).equal(edit(editor, images, left_half()))


def test_tokens_are_kept_whole():
    keep = torch.ones(2, 1, 64, 96, dtype=torch.bool)
    keep[0, 0, 17, 95] = False
    keep[1, 0, :, 31:33] = False
    tokens = kept_tokens(keep, 24).view(2, 4, 6)  # 16 × 16 pixels each
    wanted = torch.ones(2, 4, 6, dtype=torch.bool)
    wanted[0, 1, 5] = False
    wanted[1, :, 1:3] = False
    assert tokens.equal(wanted)


def test_pixels_are_kept_even_in_tokens_that_are_not():
    editor, images = tiny_editor(), pictures(1)
    keep = torch.zeros(1, 1, SIZE, SIZE)
    keep[..., 5] = 1
    plain, kept = edit(editor, images, torch.zeros(1, 1, SIZE, SIZE)), edit(editor, images, keep)
    assert kept[..., 5].equal(images[..., 5])
    assert kept[..., 6:].equal(plain[..., 6:])
    assert edit(editor, images, keep, paste=False).equal(plain)


def test_an_image_that_breaks_loses_itself_alone():
    editor, images = tiny_editor(), pictures()
    sound = edit(editor, images, left_half())
    broken = images.clone()
    broken[2, :, 3, 4] = torch.nan
    with pytest.warns(UserWarning, match="image 2: its edit is not finite; returned as it came"):
        edited = edit(editor, broken, left_half())
    others = [0, 1, 3]
    assert edited[others].equal(sound[others])
    torch.testing.assert_close(edited[2], broken[2], equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": torch.zeros(1, 1, 32, 32)}, r"keep: expected \[2 or 1, 1, 64, 64\].*got \[1, 1, 32, 32\]; resize"),
        ({"keep": torch.zeros(3, 1, 64, 64)}, r"got \[3, 1, 64, 64\]"),
        ({"keep": torch.zeros(64, 64)}, r"got \[64, 64\]"),
        ({"keep": torch.full((1, 1, 64, 64), 0.5)}, "keep: expected True and False"),
        ({"images": torch.zeros(2, 64, 64)}, r"images: expected \[B, 3, H, W\]"),
        ({"instructions": ["one"]}, "instructions: expected one for each of 2 images, got 1"),
        ({"instructions": "Remove it"}, "instructions: .*got 'Remove it'"),
        ({"seeds": torch.tensor([1])}, r"seeds: expected int64 \[2\]"),
        ({"seeds": torch.tensor([1.0, 2.0])}, "seeds: .*float32"),
        ({"images": torch.zeros(2, 3, 60, 64), "keep": torch.zeros(1, 1, 60, 64)}, "multiples of 16"),
    ],
)
def test_bad_input(change, message):
    given = {
        "images": torch.zeros(2, 3, 64, 64),
        "instructions": ["Remove", "Add"],
        "keep": torch.zeros(1, 1, 64, 64),
        "seeds": SEEDS[:2],
    }
    with pytest.raises(ValueError, match=message):
        keep_mask_edit(tiny_editor(), **(given | change), num_steps=2, guidance_scale=2.5)


def test_an_editor_without_gradient():
    editor = tiny_editor()
    original = editor.velocity
    editor.velocity = lambda *arguments: original(*arguments).detach()
    with pytest.raises(ValueError, match=r"editor: its velocity has no gradient.*inner_steps=0"):
        edit(editor, pictures(2), left_half())
    assert edit(editor, pictures(2), left_half(), inner_steps=0).isfinite().all()


def test_bad_settings():
    for options, message in (
        ({"inner_steps": -1}, "inner_steps: expected ≥ 0"),
        ({"step_size": -0.1}, "step_size: expected a finite number > 0, got -0.1"),
        ({"guided_share": 1.5}, "guided_share: expected 0 … 1"),
    ):
        with pytest.raises(ValueError, match=message):
            KeepMaskSettings(**options)
    with pytest.raises(ValueError, match="micro_batch: expected ≥ 1"):
        KeepMaskSettings(micro_batch=0)
    with pytest.raises(ValueError, match="24 square tokens"):
        kept_tokens(torch.ones(1, 1, 64, 64, dtype=torch.bool), 24)
