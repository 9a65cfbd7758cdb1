"""Klein-KV: the stock pipeline's numbers, batched, from keys and values that are extracted once."""

import pytest
import torch
from klein_truth import (
    HEIGHT,
    LENGTH,
    OPTIONS,
    PROMPTS,
    SMALL,
    SMALL_TOKENS,
    TOKENS,
    WIDTH,
    NoSync,
    adapters_of,
    edit,
    editor_of,
    forbid_reads,
    gradients,
    references,
    samples,
    stock,
    uncached,
    velocity,
)
from op_backends import GPU
from tiny_families import tiny_klein, tiny_klein_kv
from tiny_train import tiny_config
from torch.distributed.fsdp import FSDPModule

from mtedit_fast.cuda_graphs import StaticInputs, layout
from mtedit_fast.editors import Condition
from mtedit_fast.editors.klein_kv import KleinKVEditor
from mtedit_fast.ops import seeded_noise
from mtedit_fast.rollout import RolloutConfig, replay, rollout, sample_seeds
from mtedit_fast.training.data import EditChains
from mtedit_fast.training.playground.data import write_dataset
from mtedit_fast.training.trainer import Trainer

LARGE = (80, 64)


def test_batched_edits_equal_the_stock_pipeline_one_by_one():
    editor, pipeline = editor_of(), tiny_klein_kv()
    seeds = torch.tensor([3, 5])
    config = RolloutConfig(group_size=1, num_steps=3, variant="ode", micro_batch=2)
    images = references()
    result = rollout(editor, images, [[prompt] for prompt in PROMPTS], config, seeds)
    latents = seeded_noise(seeds, (TOKENS, 16), 0)
    for row in range(2):
        expected = stock(pipeline, images[row : row + 1], PROMPTS[row], latents[row : row + 1])
        torch.testing.assert_close(result.images[row], (expected * 255).round() / 255, rtol=0, atol=1 / 255)
        assert (result.images[row] - expected).abs().mean() < 0.3 / 255


@pytest.mark.parametrize("size", [None, LARGE])
def test_several_references_at_their_own_resolution_equal_the_stock_pipeline(size):
    editor, pipeline = editor_of(), tiny_klein_kv()
    images = references(6, size or (HEIGHT, WIDTH)).unflatten(0, (2, 3))
    latents = torch.randn(2, TOKENS, 16)
    result = edit(editor, images, latents, reference_size=size)
    for row in range(2):
        expected = stock(pipeline, images[row], PROMPTS[row], latents[row : row + 1])
        torch.testing.assert_close(result[row : row + 1], expected, rtol=0, atol=1e-4)
    swapped = edit(editor, images.flip(1), latents, reference_size=size)
    assert (swapped - result).abs().max() > 1e-3
    assert editor.references.extractions == 4  # the order is part of what they are


@torch.no_grad()
def test_one_token_of_noise_and_text_extracts_what_the_whole_sequence_does():
    editor = editor_of()
    latents, timestep, reference, text = samples(editor, [0, 1], count=2)
    _, cache = uncached(editor, latents, timestep, reference, text, count=2)
    layers = [*cache.double_block_caches, *cache.single_block_caches]
    expected = [tensor for layer in layers for tensor in layer.get()]
    for row in range(2):
        own = editor._extract(reference[row : row + 1], (2, SMALL))
        for ours, theirs in zip(own, expected, strict=True):
            torch.testing.assert_close(ours, theirs[row : row + 1], rtol=0, atol=1e-6 * theirs.abs().max().item())


@torch.no_grad()
@pytest.mark.parametrize("rows", [[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 2]])
def test_a_shared_cache_equals_an_extraction_per_sample_and_rows_alone(rows):
    editor = editor_of()
    latents, timestep, reference, text = samples(editor, rows)
    together = velocity(editor, latents, timestep, reference, text)
    assert editor.references.extractions == len(set(rows))
    per_sample = uncached(editor, latents, timestep, reference, text)[0]
    torch.testing.assert_close(together, per_sample, rtol=0, atol=1e-6 * per_sample.abs().max().item())
    for row in range(4):
        one = slice(row, row + 1)
        own = {name: value[one] for name, value in text.items()}
        alone = velocity(editor_of(), latents[one], timestep[one], reference[one], own)
        torch.testing.assert_close(together[one], alone, rtol=1e-5, atol=1e-5)
    other = velocity(editor, latents, timestep, reference.roll(1, 0) + 0.1, text)
    assert (other - together).abs().max() > 1e-2


@torch.no_grad()
def test_rows_of_one_reference_share_it_without_a_copy():
    editor = editor_of()
    _, _, reference, text = samples(editor, [0, 0, 0])
    layer = editor.condition(reference, text, **OPTIONS).inputs["kv_cache"].get_single(1)
    (entry,) = editor.references._entries.values()
    for shared, own in zip(layer.get(), entry.tensors[-2:], strict=True):
        assert shared.stride(0) == 0
        assert shared.data_ptr() == own.data_ptr()


@torch.no_grad()
@pytest.mark.parametrize("rows", [[0, 0, 0], [0, 0, 1]])
def test_a_condition_is_a_nest_of_tensors_that_can_be_copied(rows):
    """As a CUDA graph does, which reads its inputs where they were."""
    editor = editor_of()
    first, second = samples(editor, rows), samples(editor, rows, seed=6)
    conditions = [editor.condition(*each[2:], **OPTIONS) for each in (first, second)]
    assert layout(vars(conditions[0])) == layout(vars(conditions[1]))
    inputs = StaticInputs(vars(conditions[0]))
    static = Condition(**inputs.tree)
    inputs.load(vars(conditions[1]))
    assert torch.equal(editor.velocity(*second[:2], static), editor.velocity(*second[:2], conditions[1]))
    other = editor.condition(*samples(editor, [0, 1, 1])[2:], **OPTIONS)
    assert layout(vars(other)) != layout(vars(conditions[0]))


# ---- how often


class Counts:
    def __init__(self, editor):
        self.texts = self.images = 0
        editor.pipeline.text_encoder.model.embed_tokens.register_forward_hook(self._text)
        encode = editor.vae.encode

        def counted(pixels, *arguments, **options):
            self.images += len(pixels)
            return encode(pixels, *arguments, **options)

        editor.vae.encode = counted

    def _text(self, module, inputs, output):
        self.texts += len(output)


def sampled(editor, *, turns=3, groups=2, size=4, micro_batch=8, **options):
    config = RolloutConfig(group_size=size, num_steps=3, micro_batch=micro_batch, **options)
    words = ["red", "blue", "add", "remove", "circle", "square"]
    instructions = [[words[turns * group + turn] for turn in range(turns)] for group in range(groups)]
    return rollout(editor, references(groups, SMALL), instructions, config, sample_seeds(0, 0, groups * size))


def test_work_of_a_rollout_and_its_replay_is_counted():
    editor = editor_of()
    own, counts = adapters_of(editor, old=False), Counts(editor)
    trajectories = sampled(editor)
    distinct = 2 + 2 * 4 + 2 * 4  # the first turn's references are the groups', later ones the members'
    assert (counts.texts, counts.images) == (2 * 3, distinct)
    assert editor.references.extractions == distinct
    assert editor.references.hits == editor.references.evictions == 0

    def replayed():
        for turn in range(3):
            for position in range(2):
                out = replay(editor, trajectories, slice(0, 8), turn, position)
                out.log_prob.sum().backward()
                yield out.log_prob.detach(), trajectories.log_probs[:, turn, position]

    assert all(torch.equal(*pair) for pair in replayed())  # with gradient, bit for bit
    assert editor.references.extractions == distinct
    assert editor.references.hits == 2 * distinct
    editor.backward_references()
    assert editor.references.backwards == distinct
    torch.optim.SGD(own.parameters, lr=1e-2).step()
    own.stepped()
    assert not any(torch.equal(*pair) for pair in replayed())
    assert editor.references.extractions == 2 * distinct
    assert (counts.texts, counts.images) == (2 * 3, distinct)


@pytest.mark.parametrize("autocast", [False, True])
def test_replay_with_gradient_has_the_rollouts_bits_under_checkpointing(autocast):
    editor = editor_of()
    own = adapters_of(editor, old=False)
    editor.transformer.enable_gradient_checkpointing()
    if autocast:  # as accelerate wraps it
        editor.transformer.forward = torch.autocast("cpu", torch.bfloat16)(editor.transformer.forward)
    trajectories = sampled(editor, turns=2, groups=1, micro_batch=4)
    for turn in range(2):
        log_prob = replay(editor, trajectories, slice(0, 4), turn, 1).log_prob
        assert torch.equal(log_prob, trajectories.log_probs[:, turn, 1])
        log_prob.sum().backward()
    editor.backward_references()
    assert editor.references.backwards == 1 + 4
    assert all(gradient.isfinite().all() for gradient in gradients(own))


def test_a_step_is_taken_and_the_next_iteration_extracts_anew(tmp_path):
    editor = KleinKVEditor(tiny_klein_kv().to(GPU), max_sequence_length=LENGTH)
    editor.pipeline.save_pretrained(tmp_path / "model")  # whose sizes are estimated on a GPU
    own = ["model.family=flux2_klein_kv", f"model.path={tmp_path / 'model'}"]
    config = tiny_config(tmp_path, [*own, "run.iterations=2", "data.resolution=16"])
    write_dataset(tmp_path / "data", 4, turns=2)
    trainer = Trainer(editor, EditChains(config.data.path, turns=2, resolution=16), config)
    for iteration, metrics in enumerate(trainer.fit()):
        assert metrics["update/steps"] == 1
        assert metrics["ratio/max_error_first_update"] == 0.0
        assert editor.references.extractions == (2 + 8) * (iteration + 1)


# ---- compiled, without waiting


@pytest.mark.parametrize("rows", [[0, 0, 0], [0, 0, 1]])
def test_velocity_compiles_as_one_graph(rows):
    editor = KleinKVEditor(tiny_klein_kv(num_layers=1, num_single_layers=1), max_sequence_length=LENGTH)
    latents, timestep, reference, text = samples(editor, rows)
    torch._dynamo.reset()
    compiled = torch.compile(editor.velocity, fullgraph=True, backend="eager")
    with torch.no_grad():
        condition = editor.condition(reference, text, **OPTIONS)
        torch.testing.assert_close(
            compiled(latents, timestep, condition), editor.velocity(latents, timestep, condition)
        )


def test_a_step_waits_for_nothing_and_a_turn_reads_once(monkeypatch):
    editor = editor_of()
    latents, timestep, reference, text = samples(editor, [0, 1])
    reads, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(1) or tolist(self))
    with torch.no_grad(), NoSync():
        condition = editor.condition(reference, text, **OPTIONS)
        assert reads == [1]
        editor.velocity(latents, timestep, condition)
        forbid_reads(monkeypatch)
        editor.velocity(latents, timestep, condition)


def test_sizes_are_known_without_content():
    """On the meta device, where memory is estimated, every row is a reference of its own."""
    editor = editor_of()
    shapes = {"references": (3, SMALL_TOKENS, 16), "embeds": (3, LENGTH, 24)}
    editor.transformer.to("meta")
    reference, embeds = (torch.empty(shape, device="meta") for shape in shapes.values())
    condition = editor.condition(reference, {"embeds": embeds}, **OPTIONS)
    assert editor.references.extractions == 3
    assert editor.velocity(reference, torch.empty(3, device="meta"), condition).shape == (3, SMALL_TOKENS, 16)


# ---- LoRA, bad input


def test_lora_loads_in_the_stock_pipeline(tmp_path):
    editor = editor_of()
    own = adapters_of(editor)
    images, latents = references(), torch.randn(2, TOKENS, 16)
    linear = [name for name, module in editor.transformer.named_modules() if name.endswith("base_layer")]
    assert len(linear) == 2 * 12 + 2 * 2
    tuned = edit(editor, images, latents)
    editor.save_lora(tmp_path)
    pipeline = tiny_klein_kv()
    plain = stock(pipeline, images[:1], PROMPTS[0], latents[:1])
    pipeline.load_lora_weights(tmp_path)
    for row in range(2):
        one = slice(row, row + 1)
        torch.testing.assert_close(
            tuned[one], stock(pipeline, images[one], PROMPTS[row], latents[one]), rtol=0, atol=1e-4
        )
    assert (tuned[:1] - plain).abs().max() > 1e-2
    assert own.has_old


def test_a_folder_in_the_public_layout(tmp_path):
    tiny_klein_kv().save_pretrained(tmp_path / "kv")
    tiny_klein().save_pretrained(tmp_path / "klein")
    editor = KleinKVEditor.from_pretrained(
        tmp_path / "kv", dtype=torch.float32, max_sequence_length=LENGTH, negative_prompt="blurred"
    )
    inputs = samples(editor, [0, 1])
    assert set(inputs[3]) == {"embeds"}  # guidance is distilled
    with torch.no_grad():
        expected = velocity(editor_of(), *inputs)
        torch.testing.assert_close(velocity(editor, *inputs), expected, rtol=1e-5, atol=1e-5)  # weights lie elsewhere
    with pytest.raises(TypeError, match=r"pipeline: expected Flux2KleinKVPipeline, got Flux2KleinPipeline; choose"):
        KleinKVEditor.from_pretrained(tmp_path / "klein")


def test_bad_input_names_argument_and_remedy():
    editor = editor_of()
    text = editor.encode_text(PROMPTS[:1])
    with pytest.raises(ValueError, match=r"budget: expected bytes ≥ 0, got -1"):
        editor_of(cache_bytes=-1)
    with pytest.raises(ValueError, match=r"references: KleinKVEditor takes 1 to 4 per edit, got 5"):
        editor.condition(torch.randn(1, 5 * SMALL_TOKENS, 16), text, **OPTIONS)
    with pytest.raises(ValueError, match=r"references: expected latents \[n, R·24, 16\].*one size"):
        editor.condition(torch.randn(1, SMALL_TOKENS + 16, 16), text, **OPTIONS)
    with pytest.raises(ValueError, match=r"height, width: expected positive multiples of 4.*18×24"):
        editor.encode_image(torch.rand(1, 3, 18, 24))
    own = adapters_of(editor)
    with own.rows(2, 1), pytest.raises(ValueError, match=r"rows: expected a batch of 3 rows.*got 1"):
        editor.condition(torch.randn(1, SMALL_TOKENS, 16), text, **OPTIONS)
    editor.transformer.__class__ = type("Sharded", (FSDPModule, type(editor.transformer)), {})
    with pytest.raises(ValueError, match=r"transformer: expected one kept whole.*run.sharding to none"):
        editor.condition(torch.randn(1, SMALL_TOKENS, 16), text, **OPTIONS)
