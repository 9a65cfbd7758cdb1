"""What runs on a GPU beside the same on the CPU, and what waits for it; without one, see test_pretend_gpu."""

import copy
import math
import time
import weakref

import judge_truth
import pytest
import torch
from test_align import editor_of
from test_consistency import dinov2, scene
from test_flow_priors import noise, tiny_denoiser
from test_judge_huggingface import FAMILIES, PROMPT, TOKENIZER
from tiny import tiny_editor
from tiny_train import tiny_config

from mtedit_fast.attention import without_cudnn_attention
from mtedit_fast.editors.graphs import GraphedEditor
from mtedit_fast.edival import ContentConsistency
from mtedit_fast.inference_time.align import align_edit
from mtedit_fast.inference_time.beam_search import beam_search
from mtedit_fast.inference_time.flow_priors import FlowPriorSettings, flow_of_denoiser, ictm
from mtedit_fast.inference_time.phrases import Phrase
from mtedit_fast.judge import HuggingFaceJudge
from mtedit_fast.rollout import RolloutConfig, _denoise, replay, rollout, sample_seeds
from mtedit_fast.training.config import RewardConfig
from mtedit_fast.training.data import EditChains
from mtedit_fast.training.playground.data import write_dataset
from mtedit_fast.training.playground.judge_model import IMAGES
from mtedit_fast.training.trainer import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU, SIZE = torch.device("cuda", 0), 32
PROMPTS = [["Remove red circle", "Add blue square"], ["Add red square", "Remove blue circle"]]
CONFIG = RolloutConfig(group_size=2, num_steps=2, micro_batch=2, eta=0.5, guidance_scale=2.0)


@pytest.fixture(params=["kontext", "klein", "klein_kv", "qwen"])
def editors(request):
    """The same tiny editor on the CPU and on the GPU."""
    cpu, gpu = editor_of(request.param), editor_of(request.param)
    return cpu, gpu.to(GPU)


def images(count: int = 2) -> torch.Tensor:
    return (torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) * 255).round() / 255


def sampled(editor):
    return rollout(editor, images().to(editor.device), PROMPTS, CONFIG, sample_seeds(0, 0, 4, device=editor.device))


def close(found, expected, tolerance=1e-4):
    assert found.device == GPU
    torch.testing.assert_close(found.cpu(), expected, rtol=tolerance, atol=tolerance)


def test_rollouts_are_the_cpus_and_replay_exactly(editors):
    cpu, gpu = editors
    expected, found = sampled(cpu), sampled(gpu)
    close(found.clean[:, 0], expected.clean[:, 0])  # later turns begin with rounded pixels
    close(found.log_probs[:, 0], expected.log_probs[:, 0])
    with torch.no_grad():
        for rows in found.micro_batches():
            for turn in range(2):
                assert torch.equal(replay(gpu, found, rows, turn, 0).log_prob, found.log_probs[rows, turn, 0])


def test_graphs_give_what_eager_gives(editors):
    eager = sampled(editors[1])
    graphed, captures = GraphedEditor(editors[1]), 0
    for _ in range(2):
        found = sampled(graphed)
        assert torch.equal(found.clean, eager.clean)
        assert torch.equal(found.log_probs, eager.log_probs)
        captures = captures or graphed.captures
    assert graphed.captures == captures >= 1  # the second rollout needs no more


def test_step_loops_never_wait(editors):
    editor = editors[1]
    trajectories = sampled(editor)
    condition = trajectories.condition(editor, slice(0, 2), 1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        _denoise(editor, trajectories, slice(0, 2), 1, condition, trajectories.seeds[:2])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_replayed_gradients_are_the_cpus(editors):
    gradients = []
    for editor in editors:
        trajectories = sampled(editor)
        editor.transformer.requires_grad_(True)
        replay(editor, trajectories, slice(0, 2), 0, 0).log_prob.sum().backward()
        editor.backward_references()
        gradients.append([p.grad for p in editor.transformer.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for expected, found in zip(*gradients, strict=True):
        scale = expected.abs().max()
        close(found / (scale.to(GPU) + 1e-8), expected / (scale + 1e-8), 1e-3)


def test_aligned_edits_are_the_cpus(editors):
    phrases = [[Phrase("circle", ("red",))], [Phrase("square", ("red",))]]

    def aligned(editor):
        prompts, seeds = [turns[0] for turns in PROMPTS], torch.arange(2, device=editor.device)
        options = {"num_steps": 2, "guidance_scale": 2.5, "seeds": seeds, "scale": 20.0}
        return align_edit(editor, images().to(editor.device), prompts, phrases, **options)

    close(aligned(editors[1]), aligned(editors[0]), 1 / 255 + 1e-4)


def test_beams_are_the_cpus(editors):
    def searched(editor):
        start, options = images().to(editor.device), {"width": 2, "branching": 2, "lookahead": 1, "num_steps": 2}
        return beam_search(editor, start, PROMPTS, lambda batch: batch.edits[:, :, 0].mean((-1, -2)), **options)

    expected, found = (searched(editor) for editor in editors)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-2, atol=1e-2)  # later turns begin with 8 bits


def test_flow_priors_are_the_cpus():
    settings = FlowPriorSettings(steps=2, step_size=0.05, probes=2, noise=0.3)
    y, start, seeds = noise(2, 1, 8, 8), noise(2, 1, 8, 8, seed=1), torch.tensor([3, 5])

    def restored(device):
        flow = flow_of_denoiser(tiny_denoiser().to(device))
        mask = (noise(1, 1, 8, 8, seed=2) > 0).double().to(device)
        inputs = {"start": start.to(device), "seeds": seeds.to(device), "settings": settings}
        return ictm(flow, lambda x: x * mask, y.to(device), **inputs).images

    close(restored(GPU), restored("cpu"), 1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_judges_are_the_cpus(family):
    model = FAMILIES[family]()
    references, edits, instructions, owner = judge_truth.group_inputs(2, 2, 2)

    def scored(device):
        judge = HuggingFaceJudge(copy.deepcopy(model).to(device), TOKENIZER, IMAGES, PROMPT)
        return judge.score(references.to(device), edits.to(device), instructions, owner=owner).score

    close(scored(GPU), scored("cpu"), 1e-4)


def test_consistency_is_the_cpus():
    references, edits, *rest = scene()
    changed, owner = rest[3:]

    def scored(device):
        consistency = ContentConsistency(dinov2().to(device))
        inputs = references.to(device), edits.to(device), *rest[:3]
        return consistency(*inputs, background_changed=changed.to(device), owner=owner)

    for found, expected in zip(scored(GPU), scored("cpu"), strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_a_graphed_editor_keeps_no_turns_condition(editors):
    graphed = GraphedEditor(editors[1])
    found = sampled(graphed)
    condition = found.condition(graphed, slice(0, 2), 0)
    with torch.no_grad():
        first = graphed.velocity(found.latents[:2, 0, 0], found.timesteps[0], condition).clone()
        held = weakref.ref(condition)
        del condition
        assert held() is None
        again = found.condition(graphed, slice(0, 2), 0)
        assert torch.equal(graphed.velocity(found.latents[:2, 0, 0], found.timesteps[0], again), first)
        captures = graphed.captures
        graphed.forget()
        assert torch.equal(graphed.velocity(found.latents[:2, 0, 0], found.timesteps[0], again), first)
    assert graphed.captures == captures + 1


def test_an_editor_may_move(editors):
    cpu, gpu = editors
    expected = sampled(cpu)
    close(sampled(cpu.to(GPU)).clean[:, 0], expected.clean[:, 0])
    assert sampled(gpu.to("cpu")).clean.device == torch.device("cpu")


def test_nothing_is_captured_while_a_reward_waits_for_the_device(tmp_path):
    """Rewards of the first groups are still being scored when the last, smaller micro-batch is captured."""
    options = ["rollout.group_size=2", "rollout.micro_batch=3", "run.iterations=1", "rollout.turns=1"]
    rewards = [RewardConfig(name="waits", path="test_on_gpu:waits")]
    config = tiny_config(tmp_path, options).model_copy(update={"rewards": rewards})
    write_dataset(tmp_path / "data", 4, turns=1)
    editor = tiny_editor()  # on the CPU: the trainer moves it
    trainer = Trainer(editor, EditChains(config.data.path, turns=1, resolution=64), config)
    (metrics,) = trainer.fit()
    assert editor.vae.device == GPU
    assert math.isfinite(metrics["loss"])


def waits(batch):
    """A reward that does what no capture survives."""
    for _ in range(10):
        torch.cuda.synchronize()
        time.sleep(0.02)
    return batch.edits.mean((2, 3, 4))


@pytest.mark.parametrize("checkpointing", ["false", "true"])
@pytest.mark.parametrize("objective", ["grpo", "nft"])
def test_bf16_trains_and_grpo_replays_exactly(tmp_path, objective, checkpointing):
    write_dataset(tmp_path / "data", 6, turns=2)
    options = [f"objective.name={objective}", "run.iterations=1", f"model.activation_checkpointing={checkpointing}"]
    config = tiny_config(tmp_path, options)
    editor = tiny_editor(torch.bfloat16)
    trainer = Trainer(editor, EditChains(config.data.path, turns=2, resolution=64), config)
    trajectories, _ = trainer.sample(trainer.chains.batch(0, 2), iteration=0)
    if objective == "grpo":
        with without_cudnn_attention():
            with torch.no_grad():
                before = replay(editor, trajectories, slice(0, 4), 1, 0).log_prob
            after = replay(editor, trajectories, slice(0, 4), 1, 0).log_prob  # with gradient
        assert torch.equal(before, trajectories.log_probs[:4, 1, 0])
        assert torch.equal(after, before)
    (metrics,) = trainer.fit()
    assert math.isfinite(metrics["loss"])
