"""NFT samples on an exported editor, whose adapter is fed from the trainer before every rollout."""

import pytest
import torch
from tiny import tiny_pipeline
from tiny_train import tiny_trainer

from mtedit_fast.editors import KontextEditor
from mtedit_fast.export.editors import editor_modules, export_editor
from mtedit_fast.export.lora import lora_inputs

NFT = ("objective.name=nft", "optimizer.forward_rows=8", "optimizer.lr=0.02", "objective.draws=1")


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    pipeline = tiny_pipeline()
    modules = editor_modules(pipeline, max_sequence_length=16)
    modules["transformer"] = lora_inputs(modules["transformer"], rank=16, targets=KontextEditor.lora_targets)
    export_editor(folder, pipeline, modules=modules, max_sequence_length=16)
    return folder


@pytest.mark.parametrize("decay", ["on_policy", "crd"])
def test_samples_are_those_of_the_model_with_the_sampling_policys_adapter(engine, tmp_path, decay):
    options = (*NFT, "run.iterations=3", f"objective.old_decay={decay}", "rollout.variant=ode")
    trainer = tiny_trainer(tmp_path, *options, f"rollout.engine={engine}", f"run.output_dir={tmp_path / 'engine'}")
    plain = tiny_trainer(tmp_path, *options, f"run.output_dir={tmp_path / 'plain'}")
    assert trainer.sample.editor is not trainer.editor
    for metrics in trainer.fit():
        assert metrics["grad_norm"] > 0
    names = trainer.adapters.names
    plain.adapters.load("default", dict(zip(names, trainer.adapters.parameters, strict=True)))
    plain.adapters.load_state_dict(trainer.adapters.state_dict())
    records = [trainer.chains[0]]
    own, _ = trainer.sample(records, iteration=7)
    expected, _ = plain.sample(records, iteration=7)
    torch.testing.assert_close(own.clean[:, 0], expected.clean[:, 0], rtol=1e-4, atol=1e-4)
    trainer.sample.engine.set_lora({})
    before, _ = tiny_trainer(tmp_path, *options, f"run.output_dir={tmp_path / 'new'}").sample(records, iteration=7)
    assert (own.clean[:, 0] - before.clean[:, 0]).abs().max() > 1e-2  # training has moved the policy
