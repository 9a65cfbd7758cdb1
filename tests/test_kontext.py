"""The Kontext adapter gives the stock pipeline's numbers."""

import numpy as np
import pytest
import torch
from peft import LoraConfig
from tiny import SIZE, tiny_editor, tiny_pipeline

from mtedit_fast.editors import KontextEditor
from mtedit_fast.ops import seeded_noise
from mtedit_fast.rollout import RolloutConfig, rollout

PROMPTS = ["Remove the red circle", "Change the background to sky"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_edit_equals_the_stock_pipeline(dtype):
    editor, pipeline = tiny_editor(dtype), tiny_pipeline(dtype)
    pipeline.vae.to(memory_format=torch.channels_last)  # as the editor's: another layout rounds differently
    references = (torch.rand(2, 3, SIZE, SIZE) * 255).round() / 255
    config = RolloutConfig(
        group_size=1, num_steps=3, variant="ode", micro_batch=2, guidance_scale=2.5, state_dtype=dtype
    )
    seeds = torch.tensor([3, 5])
    result = rollout(editor, references, [[p] for p in PROMPTS], config, seeds)
    expected = pipeline(
        image=references,
        prompt=PROMPTS,
        height=SIZE,
        width=SIZE,
        max_area=SIZE * SIZE,
        _auto_resize=False,
        num_inference_steps=3,
        guidance_scale=2.5,
        max_sequence_length=16,
        latents=seeded_noise(seeds, (16, 64), 0).to(dtype),
        output_type="pt",
    ).images
    if dtype == torch.float32:
        assert torch.equal(result.images[:, 0], (expected * 255).round() / 255)
    else:  # the stock scheduler rounds dt·v to bf16, and the picture as well: equal up to that
        assert (result.images[:, 0] - expected.float()).abs().mean() < 2**-8


def test_schedule_is_the_pipelines():
    editor, pipeline = tiny_editor(), tiny_pipeline()
    schedule = editor.schedule(6, SIZE, SIZE)
    shift = 3.0  # of the playground's scheduler
    sigma = np.linspace(1, 1 / 6, 6)
    expected = np.append(shift * sigma / (1 + (shift - 1) * sigma), 0)
    np.testing.assert_allclose(schedule.sigmas.numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(schedule.timesteps.numpy(), 1000 * expected[:-1], rtol=1e-6)
    assert pipeline.scheduler.config.use_dynamic_shifting


def test_lora_loads_in_the_stock_pipeline(tmp_path):
    editor = tiny_editor()
    editor.transformer.add_adapter(LoraConfig(r=4, lora_alpha=16, target_modules=editor.lora_targets))
    for name, parameter in editor.transformer.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    editor.save_lora(tmp_path)
    pipeline = tiny_pipeline()
    pipeline.load_lora_weights(tmp_path)
    latents, reference = torch.randn(2, 16, 64), torch.randn(2, 16, 64)
    text = editor.encode_text(PROMPTS)
    options = {"height": SIZE, "width": SIZE, "guidance_scale": 2.5}
    timestep = torch.tensor(500.0)
    with torch.no_grad():
        tuned, loaded, plain = (
            each.velocity(latents, timestep, each.condition(reference, text, **options))
            for each in (editor, KontextEditor(pipeline), tiny_editor())
        )
    assert torch.equal(tuned, loaded)
    assert (tuned - plain).abs().max() > 1e-3


def test_bad_input_names_argument_and_remedy(tmp_path):
    editor = tiny_editor()
    with pytest.raises(ValueError, match=r"height, width: expected positive multiples of 16.*60×64.*resize"):
        editor.latent_shape(60, 64)
    with pytest.raises(FileNotFoundError, match=r"model path: expected a pipeline folder.*nothing at.*hub name"):
        KontextEditor.from_pretrained(str(tmp_path / "missing"))
