"""Qwen-Image-Edit and Klein in the trainer and from the configuration."""

import pytest
import torch
from op_backends import GPU
from tiny import SIZE
from tiny_families import tiny_klein, tiny_qwen
from tiny_train import tiny_config

from mtedit_fast.editors import EDITORS, KleinEditor, QwenEditor
from mtedit_fast.training.data import EditChains
from mtedit_fast.training.memory import estimate
from mtedit_fast.training.playground.data import write_dataset
from mtedit_fast.training.public_models import describe
from mtedit_fast.training.run import load_editor
from mtedit_fast.training.trainer import Trainer

GUIDED = ["rollout.guidance_scale=2.0", "rollout.max_sequence_length=96"]


def editor_of(family):
    if family == "flux2_klein":
        return KleinEditor(tiny_klein(is_distilled=False).to(GPU), max_sequence_length=96, negative_prompt="")
    return QwenEditor(tiny_qwen().to(GPU), max_sequence_length=96, negative_prompt=" ")


def trainer_of(folder, family, *overrides):
    editor = editor_of(family)
    editor.pipeline.save_pretrained(folder / "model")  # whose sizes are estimated on a GPU
    own = [f"model.family={family}", f"model.path={folder / 'model'}", "run.iterations=1"]
    config = tiny_config(folder, [*own, *GUIDED, *overrides])
    write_dataset(folder / "data", 4, turns=2)
    return Trainer(editor, EditChains(config.data.path, turns=2, resolution=SIZE), config)


@pytest.mark.parametrize("family", ["flux2_klein", "qwen_image_edit"])
def test_a_training_iteration_with_guidance(tmp_path, family):
    options = ["optimizer.forward_rows=4", "objective.kl_weight=0.1", "objective.old_decay=crd"]
    trainer = trainer_of(tmp_path, family, "objective.name=nft", *options)
    before = [parameter.detach().clone() for parameter in trainer.adapters.parameters]
    (metrics,) = trainer.fit()
    assert metrics["update/steps"] == 1
    assert metrics["loss"] > 0
    unused = (
        ("to_add_out", "txt_mlp", "add_q_proj") if family == "qwen_image_edit" else ()
    )  # its only block's text half
    for name, old, new in zip(trainer.adapters.names, before, trainer.adapters.parameters, strict=True):
        if "lora_B" in name and not any(part in name for part in unused):
            assert not torch.equal(old, new), name


@pytest.mark.parametrize("family", ["flux2_klein", "qwen_image_edit"])
def test_old_and_reference_rows_in_one_guided_forward(tmp_path, family):
    trainer = trainer_of(tmp_path, family, "objective.name=nft")
    adapters, editor = trainer.adapters, trainer.editor
    with torch.no_grad():
        for parameter in adapters.parameters:
            parameter.normal_(std=0.2)
    adapters.update_old(0.0)
    text, (tokens, channels) = editor.encode_text(["add a circle"] * 4), editor.latent_shape(SIZE, SIZE)
    latents, references = torch.randn(2, 4, tokens, channels).to(GPU)
    latents[2:], references[2:] = latents[:2], references[:2]

    def velocity(rows):
        own = {name: value[rows] for name, value in text.items()}
        condition = editor.condition(references[rows], own, height=SIZE, width=SIZE, guidance_scale=3.0)
        return editor.velocity(latents[rows], torch.tensor(600.0, device=GPU), condition)

    with adapters.rows(old=2, reference=2):
        together = velocity(slice(0, 4))
    with torch.no_grad(), adapters.old():
        torch.testing.assert_close(together[:2], velocity(slice(0, 2)), rtol=1e-5, atol=1e-5)
    with torch.no_grad(), adapters.reference():
        torch.testing.assert_close(together[2:], velocity(slice(0, 2)), rtol=1e-5, atol=1e-5)
    assert (together[:2] - together[2:]).abs().max() > 1e-3


def test_a_folder_in_the_public_layout(tmp_path):
    source = tiny_klein(is_distilled=False)
    source.save_pretrained(tmp_path / "klein")
    overrides = ["model.family=flux2_klein", f"model.path={tmp_path / 'klein'}", *GUIDED]
    for sharding in ("none", "fsdp2"):
        config = tiny_config(tmp_path, [*overrides, f"run.sharding={sharding}"])
        editor = load_editor(config)
        assert (type(editor), editor.negative_prompt) == (EDITORS["flux2_klein"], "")
        weights = source.transformer.state_dict()
        assert all(torch.equal(weights[name], value) for name, value in editor.transformer.state_dict().items())
    assert describe(tmp_path / "klein").text_parameters == sum(p.numel() for p in source.text_encoder.parameters())
    size = sum(tensor.nbytes for tensor in source.transformer.state_dict().values())
    guided, plain = estimate(config), estimate(tiny_config(tmp_path, [*overrides, "rollout.guidance_scale=1.0"]))
    assert guided.held["transformer"] == size
    assert guided.update["graph"] > 1.8 * plain.update["graph"]  # both branches
    with pytest.raises(TypeError, match=r"pipeline: expected QwenImageEditPipeline or .*, got Flux2KleinPipeline"):
        load_editor(tiny_config(tmp_path, ["model.family=qwen_image_edit", *overrides[1:]]))
    with pytest.raises(ValueError, match=r"model.path: expected a pipeline folder or hub id of family flux2_klein"):
        load_editor(tiny_config(tmp_path, ["model.family=flux2_klein"]))
