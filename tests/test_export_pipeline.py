"""A whole editor from an export folder, and the commands: the playground's Kontext, its adapter an input."""

import re

import pytest
import torch
from tiny_families import tiny_klein, tiny_qwen
from tiny_train import tiny_config
from typer.testing import CliRunner

pytest.importorskip("onnxruntime")

from mtedit_fast.cli_export import export_app
from mtedit_fast.cli_pipelines import load_source
from mtedit_fast.editors import EDITORS, KontextEditor
from mtedit_fast.edival.images import load_image, save_image
from mtedit_fast.export.compare import compare
from mtedit_fast.export.editors import editor_modules, export_editor
from mtedit_fast.export.manifest import Manifest
from mtedit_fast.export.pipeline import EnginePipeline
from mtedit_fast.export.ports import Bucket
from mtedit_fast.export.write import export_module
from mtedit_fast.rollout import RolloutConfig, rollout
from mtedit_fast.training.data import EditChains
from mtedit_fast.training.playground.data import write_dataset
from mtedit_fast.training.playground.models import MAX_TOKENS, load_pipeline
from mtedit_fast.training.trainer import Trainer

INSTRUCTIONS = ["Remove the red circle", "Change the background to ocean", "Add rubber blue square"]
CONFIG = "training/configs/demo.yaml"
STEPS, GUIDANCE, SEED = 4, 2.5, 3


def invoke(*arguments):
    result = CliRunner().invoke(export_app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kontext")
    text = ["--dtype", "fp32", "--bucket", "1-2x64x64", "--lora-rank", "4", "--max-sequence-length", MAX_TOKENS]
    output = invoke("export", CONFIG, *text, "-o", folder)
    names = ["transformer", "vae_encoder", "vae_decoder", "text_encoder", "text_encoder_2"]
    assert re.findall(r"(\w+) →", output) == names
    return folder


@pytest.fixture(scope="module")
def pipeline(folder):
    return EnginePipeline(folder)


def torch_edit(editor, image):
    config = RolloutConfig(group_size=1, num_steps=STEPS, variant="ode", micro_batch=1, guidance_scale=GUIDANCE)
    return rollout(editor, image[None], [INSTRUCTIONS], config, torch.tensor([SEED])).images[0]


def picture(seed):
    from mtedit_fast.training.playground.fit import generator_for
    from mtedit_fast.training.playground.world import random_scenes, render

    return (render(*random_scenes(1, generator_for(seed, 0)))[0] * 255).round() / 255


def test_a_multi_turn_edit_equals_torchs(pipeline):
    image = picture(0)
    found = pipeline(image, INSTRUCTIONS, num_steps=STEPS, guidance_scale=GUIDANCE, seed=SEED)
    expected = torch_edit(KontextEditor(load_pipeline(), max_sequence_length=MAX_TOKENS), image)
    assert found.shape == (3, 3, 64, 64)
    assert (found - expected).abs().max() <= 2.001 / 255
    assert (expected[-1] - image).abs().max() > 0.2
    assert torch.equal(found, pipeline(image, INSTRUCTIONS, num_steps=STEPS, guidance_scale=GUIDANCE, seed=SEED))
    assert not torch.equal(found, pipeline(image, INSTRUCTIONS, num_steps=STEPS, guidance_scale=GUIDANCE, seed=4))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """What a few iterations of training on the playground have made of its editor: in the stock pipeline, and saved."""
    run = tmp_path_factory.mktemp("run")
    write_dataset(run / "data", 6, turns=2)
    overrides = ["optimizer.lr=0.03", "run.iterations=2", "objective.name=nft", "rollout.guidance_scale=2.5"]
    config = tiny_config(run, overrides)
    chains = EditChains(config.data.path, turns=2, resolution=64, seed=0)
    trainer = Trainer(KontextEditor(load_pipeline(), max_sequence_length=MAX_TOKENS), chains, config)
    list(trainer.fit())
    path = trainer.export()
    pipeline = load_pipeline()
    pipeline.load_lora_weights(path)
    return KontextEditor(pipeline, max_sequence_length=MAX_TOKENS), path


def test_the_commands_edit_with_an_adapter_as_torch_does(folder, adapter, tmp_path):
    editor, path = adapter
    image = picture(1)
    save_image(image, tmp_path / "start.png")
    turns = [word for text in INSTRUCTIONS for word in ("--instruction", text)]
    options = ["--steps", STEPS, "--guidance", GUIDANCE, "--seed", SEED, "--image", tmp_path / "start.png"]
    invoke("run", folder, *options, *turns, "--lora", path, "-o", tmp_path / "tuned")
    invoke("run", folder, *options, *turns, "-o", tmp_path / "plain")
    tuned, plain = (
        torch.stack([load_image(tmp_path / name / f"turn_{turn}.png") for turn in (1, 2, 3)])
        for name in ("tuned", "plain")
    )
    assert (tuned - torch_edit(editor, image)).abs().max() <= 2.001 / 255
    assert (tuned - plain).abs().max() > 0.1


def test_an_exported_transformer_inside_the_torch_editor(pipeline):
    editor = KontextEditor(load_pipeline(), max_sequence_length=MAX_TOKENS)
    expected = torch_edit(editor, picture(2))
    editor.transformer = pipeline.transformer
    assert (torch_edit(editor, picture(2)) - expected).abs().max() <= 1.001 / 255


def test_images_are_fitted_to_the_profiles(pipeline):
    assert pipeline.fit(torch.rand(3, 64, 64)).shape == (3, 64, 64)
    wide = torch.rand(3, 100, 130)
    assert pipeline.fit(wide).shape == (3, 64, 64)
    assert torch.equal(pipeline.fit(wide) * 255, (pipeline.fit(wide) * 255).round())
    with pytest.raises(
        ValueError, match=r"shape: no profile covers batch 1, height 32, width 64; the nearest: 1-2x64x64"
    ):
        pipeline(torch.rand(3, 32, 64), INSTRUCTIONS)
    with pytest.raises(ValueError, match=r"image: expected \[3, H, W\], got \[1, 3, 64, 64\]"):
        pipeline(torch.rand(1, 3, 64, 64), INSTRUCTIONS)


def test_check_compares_and_says_what_was_not_run(folder):
    source = load_source(CONFIG, dtype="fp32", lora_rank=4, max_sequence_length=MAX_TOKENS)
    results = compare(folder, source.modules, repeats=2)
    assert [result.runtime for result in results] == ["torch", "onnx", "engine"] * 5
    for result in results:
        if result.runtime == "onnx":
            assert result.error < 1e-4
            assert 0 < result.milliseconds[0] <= result.milliseconds[1] <= result.milliseconds[2]
        if result.runtime == "engine":
            assert result.missing == "not built"
    shown = invoke("check", folder, "--repeats", 1)
    assert "vae_decoder" in shown
    assert "not run" in shown
    with torch.no_grad():
        source.pipeline.vae.decoder.conv_in.bias += 1
    with pytest.raises(ValueError, match="vae_encoder: the torch weights are not those that were exported"):
        compare(folder, source.modules, repeats=1)


def test_engines_are_built_from_an_export(folder):
    pytest.importorskip("tensorrt_rtx")
    output = invoke("export", folder, "--to", "tensorrt_rtx", "--sm", 80, "--only", "text_encoder")
    assert "SM80" in output
    entries = Manifest.read(folder).modules
    assert {name for name, entry in entries.items() if entry.engine} == {"text_encoder"}
    assert entries["transformer"].lora_mode == "inputs"
    if not torch.cuda.is_available():
        missing = [result.missing for result in compare(folder, repeats=1) if result.missing]
        assert any("expected a CUDA GPU" in reason for reason in missing)


def test_merging_an_adapter_changes_the_hash_and_the_mode(adapter, tmp_path):
    _, path = adapter
    plain, merged = (load_source(CONFIG, dtype="fp32", lora=lora) for lora in ("none", str(path)))
    weight = "transformer_blocks.0.attn.to_q.weight"
    states = [source.modules["transformer"].module.state_dict()[weight] for source in (plain, merged)]
    assert not torch.equal(*states)
    assert (plain.merged, merged.merged) == (None, path)
    entry = export_module(tmp_path, "text_encoder", merged.modules["text_encoder"], merged=True)
    assert entry.lora_mode == "merged"


@pytest.mark.parametrize("family", ["flux2_klein", "qwen_image_edit"])
def test_the_other_families_edit_with_guidance_from_a_folder(tmp_path, family):
    if family == "flux2_klein":
        source, again = tiny_klein(is_distilled=False), tiny_klein(is_distilled=False)
    else:
        source, again = tiny_qwen(), tiny_qwen()
    options = {"max_sequence_length": 96, "negative_prompt": " "}
    with pytest.raises(ValueError, match="only: expected names among transformer, vae_encoder, vae_decoder, got text"):
        export_editor(tmp_path, source, only=["text_encoder"])
    modules = editor_modules(source, max_sequence_length=96)
    if family == "qwen_image_edit":
        del modules["vae_encoder"], modules["vae_decoder"]  # stay torch modules
    buckets = [Bucket((1, 2, 2), 32, 32)]  # both branches in a batch
    export_editor(tmp_path, source, modules=modules, buckets=buckets, **options)
    exported, image = EnginePipeline(tmp_path, runtime="onnx"), torch.rand(3, 32, 32)
    if family == "qwen_image_edit":  # of the tiny template, which is not saved
        exported.editor.pipeline.prompt_template_encode_start_idx = again.prompt_template_encode_start_idx
    found = exported(image, INSTRUCTIONS[:2], num_steps=2, guidance_scale=3.0)
    config = RolloutConfig(group_size=1, num_steps=2, variant="ode", micro_batch=1, guidance_scale=3.0)
    editor = EDITORS[family](again, **options)
    expected = rollout(editor, image[None], [INSTRUCTIONS[:2]], config, torch.tensor([0])).images[0]
    assert (found - expected).abs().max() <= 2.001 / 255


def test_bad_sources_and_options(folder, tmp_path):
    picture = tmp_path / "picture.png"
    save_image(torch.rand(3, 64, 64), picture)
    for arguments, message in (
        (["export", tmp_path / "nothing"], r"source: nothing at .*; expected a training configuration"),
        (["export", tmp_path], r"source: no model_index.json in .*; expected .* a folder with a DINO"),
        (["export", CONFIG, "--to", "openvino"], r"to: expected onnx, tensorrt or tensorrt_rtx, got 'openvino'"),
        (["export", CONFIG, "--dtype", "fp8"], r"dtype: expected one of fp32, bf16, fp16, got 'fp8'"),
        (["export", CONFIG, "--lora", "x", "--lora-rank", "2"], r"lora, lora_rank: expected one of them"),
        (["export", CONFIG, "--lora", tmp_path / "x"], r"lora: no file"),
        (
            ["export", CONFIG, "--to", "tensorrt_rtx", "--sm", "80"],
            r"bucket: expected at least one for --to tensorrt_rtx",
        ),
        (["export", CONFIG, "--to", "tensorrt_rtx", "--sm", "90"], r"sm: tensorrt_rtx builds for .*got SM90"),
        (["run", tmp_path, "--image", "a.png", "--instruction", "x"], r"a.png: no such file"),
        (["export", folder], r"to: .* is an export already; expected tensorrt or tensorrt_rtx, got 'onnx'"),
        (
            ["export", folder, "--to", "tensorrt_rtx", "--sm", "80", "--bucket", "1x64x64", "--dtype", "fp32"],
            r"bucket, dtype: expected none for .*, which is an export",
        ),
        (
            ["run", folder, "--image", picture, "--instruction", "Remove the cup"],
            r"this editor knows no 'cup'; all of its words: ",
        ),
        (["check", tmp_path], r"directory: expected an export, with manifest.json"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            invoke(*arguments)
    with pytest.raises(ValueError, match="runtime: expected auto, onnx or tensorrt, got 'cuda'"):
        EnginePipeline(folder, runtime="cuda")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"source: expected a pipeline or a DINO .*got 'bert'"):
        load_source(str(tmp_path), dtype="fp32")
    with pytest.raises(ValueError, match=r"pipeline: expected one of kontext, .*flux2_klein.*, got object"):
        editor_modules(object())
    tiny_klein().save_pretrained(tmp_path / "klein")
    klein = load_source(str(tmp_path / "klein"), dtype="bf16", lora_rank=2, max_sequence_length=8)
    assert klein.options == {"max_sequence_length": 8, "negative_prompt": ""}
    assert klein.modules["transformer"].dtype == "bfloat16"
    assert klein.modules["transformer"].lora.rank == 2
    dino = load_source("training/playground/weights/dino", dtype="fp32").modules["dino"]
    assert dino.inputs[0].shape == ("batch", 3, 64, 64)
    export_module(tmp_path / "dino", "dino", dino)
    with pytest.raises(ValueError, match=r"directory: expected an editor's export, got single modules \(dino\)"):
        EnginePipeline(tmp_path / "dino")
