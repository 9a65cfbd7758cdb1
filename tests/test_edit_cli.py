"""`mtedit-fast edit` and what it is made of."""

import re
import sys

import pytest
import torch
import typer
from peft import LoraConfig
from PIL import Image
from tiny import SIZE, tiny_editor, tiny_pipeline
from typer.testing import CliRunner

from mtedit_fast.cli_edit import edit
from mtedit_fast.cli_pipelines import load_editor
from mtedit_fast.editors import KontextEditor
from mtedit_fast.edival.images import load_image, save_image
from mtedit_fast.inference_time.beam_search import beam_search
from mtedit_fast.inference_time.edit import check_words, fit, parse_size, strip
from mtedit_fast.rollout import RolloutConfig, rollout, sample_seeds
from mtedit_fast.training.playground.models import GUIDANCE, MAX_TOKENS, WEIGHTS, load_pipeline
from mtedit_fast.training.playground.rewards import judge_score
from mtedit_fast.training.playground.world import CELLS, render

TEXTS = ["Change the background to ocean", "Remove rubber red circle"]
app = typer.Typer()
app.command()(edit)


@pytest.fixture(scope="module")
def scene():
    cells = torch.zeros(1, CELLS, dtype=torch.int64)
    cells[0, 5] = 1  # rubber red circle
    return (render(cells, torch.tensor([1])) * 255).round() / 255


@pytest.fixture
def picture(scene, tmp_path):
    save_image(scene[0], tmp_path / "scene.png")
    return tmp_path / "scene.png"


@pytest.fixture(scope="module")
def editor():
    return KontextEditor(load_pipeline(), max_sequence_length=MAX_TOKENS)


@pytest.fixture(scope="module")
def plain(editor, scene):
    config = RolloutConfig(group_size=1, num_steps=2, variant="ode", guidance_scale=GUIDANCE)
    return rollout(editor, scene, [TEXTS], config, sample_seeds(3, 0, 1)).images[0]


def invoke(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return re.sub(r"\s+", " ", result.output)


def on_playground(picture, *arguments):
    folder = picture.parent / "out"
    said = invoke("playground", picture, *TEXTS, "-o", folder, "--steps", 2, "--seed", 3, "--device", "cpu", *arguments)
    return torch.stack([load_image(folder / f"turn-{turn}.png") for turn in (1, 2)]), said


# ---- edits


def test_plain_turns_are_the_rollouts(picture, plain):
    made, said = on_playground(picture)
    assert torch.equal(made, plain)
    assert all(text in said for text in TEXTS)
    with Image.open(picture.parent / "out/strip.png") as strip_file:
        assert strip_file.width == 12 + 3 * (256 + 12)


def test_mask_for_all_turns_and_for_each(picture, scene, plain):
    left, none = torch.zeros(3, SIZE, SIZE), torch.zeros(3, SIZE, SIZE)
    left[:, :, : SIZE // 2] = 1
    save_image(left, picture.parent / "left.png")
    save_image(none, picture.parent / "none.png")
    made, _ = on_playground(picture, "--keep-mask", picture.parent / "left.png")
    assert torch.equal(made[..., : SIZE // 2], scene.expand(2, -1, -1, -1)[..., : SIZE // 2])
    assert not torch.equal(made[0], scene[0])
    masks = ["--keep-mask", picture.parent / "none.png", "--keep-mask", picture.parent / "left.png"]
    made, _ = on_playground(picture, *masks)
    assert torch.equal(made[0], plain[0])
    assert torch.equal(made[1, ..., : SIZE // 2], plain[0, ..., : SIZE // 2])


def test_phrases_act_on_the_turns_that_name_them(picture, plain):
    made, _ = on_playground(picture, "--align", "circle:red,rubber")
    assert torch.equal(made[0], plain[0])
    assert not torch.equal(made[1], plain[1])
    made, _ = on_playground(picture, "--align", "circle:red", "--align", "background:ocean", "--align-scale", 0)
    assert torch.equal(made, plain)


def test_beams_by_the_playgrounds_judge_and_by_a_function(picture, scene, editor, tmp_path, monkeypatch):
    options = {"num_steps": 2, "guidance_scale": GUIDANCE, "seeds": sample_seeds(3, 0, 1)}
    shape = {"width": 2, "branching": 2, "lookahead": 1}
    found = beam_search(editor, scene, [TEXTS], judge_score, **shape, **options)
    arguments = ["--beam", 2, "--branching", 2, "--lookahead", 1]
    made, said = on_playground(picture, *arguments)
    assert torch.equal(made, found.best[0])
    assert f"{found.cost.rows} transformer rows in {found.cost.calls} calls" in said
    assert f"rewards of 2 chains: {found.scores[0, 0].mean():.3g}, {found.scores[0, 1].mean():.3g}" in said
    best_of, said = on_playground(picture, "--beam", 2, "--branching", 1)
    chains = beam_search(
        editor, scene, [TEXTS], judge_score, variant="ode", branch_at=(0,), **(shape | {"branching": 1}), **options
    )
    assert torch.equal(best_of, chains.best[0])
    assert "8 transformer rows in 4 calls" in said
    judged, _ = on_playground(picture, *arguments, "--reward", WEIGHTS / "judge")
    assert torch.equal(judged, made)
    (tmp_path / "darkness.py").write_text("def dark(batch):\n    return -batch.edits.mean((2, 3, 4))\n")
    monkeypatch.chdir(tmp_path)
    dark, _ = on_playground(picture, *arguments, "--reward", "darkness:dark")
    expected = beam_search(editor, scene, [TEXTS], lambda b: -b.edits.mean((2, 3, 4)), **shape, **options)
    assert torch.equal(dark, expected.best[0])


def test_a_folder_with_an_adapter_at_another_size(picture, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    trained = tiny_editor()
    adapter = LoraConfig(r=2, lora_alpha=4, target_modules=trained.lora_targets, init_lora_weights=False)
    trained.transformer.add_adapter(adapter)
    trained.save_lora(tmp_path / "lora")
    common = [tmp_path / "model", picture, TEXTS[0], "--steps", 2, "--guidance", 1.5, "--device", "cpu"]
    said = invoke(*common, "--size", "32x48", "--lora", tmp_path / "lora", "-o", tmp_path / "a")
    assert "resized 64×64 → 32×48" in said
    made = load_image(tmp_path / "a/turn-1.png")
    loaded, _ = load_editor(str(tmp_path / "model"), device="cpu")
    start = fit(loaded, load_image(picture), (32, 48))[None]
    config = RolloutConfig(group_size=1, num_steps=2, variant="ode", guidance_scale=1.5)
    edits = [rollout(one, start, [TEXTS[:1]], config, sample_seeds(0, 0, 1)).images[0, 0] for one in (trained, loaded)]
    assert (made - edits[0]).abs().max() <= 1 / 255 + 1e-6
    assert (made - edits[1]).abs().max() > 2 / 255
    invoke(*common, "--dtype", "bf16", "-o", tmp_path / "b")
    assert load_image(tmp_path / "b/turn-1.png").shape == (3, SIZE, SIZE)


# ---- parts


def test_fit_rounds_to_what_the_latents_allow(editor):
    image = torch.rand(3, 50, 130)
    assert fit(editor, image).shape == (3, 48, 128)
    assert fit(editor, image, (32, 64)).shape == (3, 32, 64)
    whole = torch.rand(3, 64, 64)
    assert fit(editor, whole) is whole
    with pytest.raises(ValueError, match="height, width: expected positive multiples of 16"):
        fit(editor, image, (30, 64))


def test_sizes():
    assert parse_size("768x1024") == (768, 1024)
    assert parse_size("64") == (64, 64)
    for bad in ("", "a", "1x2x3", "-4"):
        with pytest.raises(ValueError, match="size: expected HEIGHTxWIDTH"):
            parse_size(bad)


def test_words_of_a_vocabulary_of_words(editor):
    check_words(editor, TEXTS)
    with pytest.raises(ValueError, match=r"'Remove the cup': this editor knows no 'cup'; all of its words: Add Remove"):
        check_words(editor, ["Remove the cup"])
    with pytest.raises(ValueError, match=r"knows no 'oceans'; did you mean ocean\?"):
        check_words(editor, [TEXTS[0], "Change the background to oceans"])
    with pytest.raises(ValueError, match="instruction '': this editor knows no empty one"):
        check_words(editor, [""])


def test_strip_wants_a_caption_for_each():
    images = [torch.rand(3, 8, 16), torch.rand(3, 16, 16)]
    assert strip(images, ["a", "b " * 99], cell=32).size == (12 + 2 * 44, 66 + 32 + 12)
    with pytest.raises(ValueError, match="captions: expected 2, one per image, got 1"):
        strip(images, ["a"])


# ---- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["playground", "{0}/none.png", "Remove x"], "none.png: no such file"),
        (["{0}/none", "{1}", "x"], "model: nothing at .*none; expected a pipeline's folder"),
        (["{0}", "{1}", "x"], r"model: no model_index.json in .*; expected a pipeline's folder, .* --lora"),
        (["playground", "{1}", "Make it dusk"], "this editor knows no 'Make' 'it' 'dusk'"),
        (["playground", "{1}", "x", "--size", "a"], "size: expected HEIGHTxWIDTH"),
        (["playground", "{1}", "x", "--dtype", "int8"], "dtype: expected auto, fp32, bf16, fp16, got 'int8'"),
        (["playground", "{1}", TEXTS[0], "--size", "60"], "height, width: expected positive multiples of 16"),
        (["playground", "{1}", TEXTS[0], "--lora", "{0}/none"], "lora: no file"),
        (["playground", "{1}", "x", "--beam", "2", "--align", "a"], "at most one of .*, got --align and --beam"),
        (["playground", "{1}", "x", "--reward", "a:b"], "reward: expected --beam with it"),
        (["playground", "{1}", TEXTS[0], "--beam", "1", "--reward", "no.such:f"], "cannot import no.such"),
        (
            ["playground", "{1}", TEXTS[0], "--beam", "1", "--reward", "/no/such"],
            "reward: no judge's folder at /no/such",
        ),
        (["playground", "{1}", "x", "--keep-mask", "{0}/small.png"], "as large as the image, 64×64, got 8×8 in"),
        (["playground", "{1}", "x", "y", "z", *["--keep-mask", "{1}"] * 2], "keep_mask: expected 1 file, or 3.*got 2"),
        (["playground", "{1}", TEXTS[0], "--align", "cup:red"], "align: 'cup:red' fits none of the instructions: "),
        (["playground", "{1}", TEXTS[0], "--align", ":red"], "phrase: expected"),
    ],
)
def test_bad_input(picture, arguments, message):
    save_image(torch.ones(3, 8, 8), picture.parent / "small.png")
    with pytest.raises((ValueError, OSError), match=message):
        invoke(*(a.format(picture.parent, picture) for a in arguments), "-o", picture.parent / "out")
    assert not list(picture.parent.glob("out/turn-*"))


def test_only_the_playground_has_a_reward_of_its_own(picture, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="reward: expected MODULE:FUNCTION or a judge's folder"):
        invoke(tmp_path / "model", picture, TEXTS[0], "--beam", 2, "-o", tmp_path / "out")


def test_nothing_heavy_is_imported_for_the_help():
    assert "torch" not in vars(sys.modules["mtedit_fast.cli_edit"])
    assert "--keep-mask" in CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
