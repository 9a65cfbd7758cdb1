"""The reference cache in Klein-KV: what it keeps, under which weights, and the exact gradients through it."""

import pytest
import torch
from klein_truth import (
    LENGTH,
    OPTIONS,
    PROMPTS,
    SMALL,
    SMALL_TOKENS,
    adapters_of,
    editor_of,
    exact_rotation,
    gradients,
    samples,
    uncached,
    velocity,
)
from op_backends import GPU
from peft import LoraConfig
from tiny_families import tiny_klein_kv
from tiny_train import tiny_config

from mtedit_fast.editors import Condition
from mtedit_fast.editors.content import content_keys
from mtedit_fast.editors.klein_kv import KleinKVEditor
from mtedit_fast.training.advantages import AdvantageResult
from mtedit_fast.training.data import EditChains
from mtedit_fast.training.playground.data import write_dataset
from mtedit_fast.training.trainer import Trainer

TRAINED = ["to_k", "to_v", "to_qkv_mlp_proj", "to_out"]  # a layer of each block
NFT = ["objective.name=nft", "objective.kl_weight=0.1", "optimizer.forward_rows=3", "objective.old_decay=crd"]


# ---- what is kept


def test_equal_references_meet_wherever_they_come_from():
    editor = editor_of()
    reference = samples(editor, [0, 1])[2]
    text = editor.encode_text(PROMPTS)
    editor.condition(reference, text, **OPTIONS)
    editor.condition(reference.flip(0).clone(), text, **OPTIONS)
    editor.condition(torch.stack([reference[1], reference[1]]), text, **OPTIONS)
    assert (editor.references.extractions, editor.references.hits) == (2, 3)
    changed = reference.clone()
    changed[0, -1, -1] = torch.nextafter(changed[0, -1, -1], torch.tensor(9.0))
    editor.condition(changed, text, **OPTIONS)
    assert editor.references.extractions == 3
    wide = {"height": SMALL[0], "width": SMALL[1], "reference_size": (SMALL[1], SMALL[0])}
    editor.condition(reference, text, **wide)  # the same numbers of an upright image
    assert editor.references.extractions == 5


@torch.no_grad()
def test_a_small_budget_evicts_and_gives_the_same_bits():
    plenty, little = editor_of(), editor_of(cache_bytes=0)
    latents, timestep, reference, text = samples(plenty, [0, 1, 2])

    def passes(editor):
        return [
            velocity(editor, latents[:1], timestep[:1], reference[row : row + 1], {"embeds": text["embeds"][:1]})
            for row in (0, 0, 1, 2, 0)
        ]

    assert all(map(torch.equal, passes(plenty), passes(little)))
    entry = plenty.references.bytes // 3
    assert (plenty.references.extractions, plenty.references.evictions) == (3, 0)
    assert (little.references.extractions, little.references.evictions) == (4, 3)
    assert little.references.bytes == entry  # of the last call
    little.references.budget = 2 * entry
    passes(little)
    assert little.references.bytes == 2 * entry
    # heads · head_dim · tokens · (keys and values) · blocks · fp32
    assert entry == 2 * 16 * SMALL_TOKENS * 2 * 4 * 4


def test_budget_and_grid_of_more_than_the_budget_in_one_batch():
    editor = editor_of(cache_bytes=1)
    latents, timestep, reference, text = samples(editor, [0, 1, 2, 1])
    with torch.no_grad():
        result = velocity(editor, latents, timestep, reference, text)
        torch.testing.assert_close(result, uncached(editor, latents, timestep, reference, text)[0], rtol=0, atol=1e-5)
    assert (editor.references.extractions, editor.references.evictions) == (3, 0)


# ---- gradients


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("cache_bytes", [2**30, 0])
def test_gradients_are_those_of_the_whole_computation(monkeypatch, checkpointing, cache_bytes):
    """Chunks that share references, two of two images each, members of one group among them."""
    monkeypatch.setattr("diffusers.models.transformers.transformer_flux2.apply_rotary_emb", exact_rotation)
    editor = editor_of(torch.float64, cache_bytes=cache_bytes)
    own = adapters_of(editor, old=False)
    if checkpointing:
        editor.transformer.enable_gradient_checkpointing()
    latents, timestep, reference, text = samples(editor, [0, 0, 0, 1, 1, 2], count=2)
    weight = torch.randn(6, SMALL_TOKENS, 16, dtype=torch.float64)
    chunks = [slice(0, 4), slice(1, 6), slice(5, 6), slice(0, 2)]

    def loss(of, scale):
        part = [latents[of], timestep[of], reference[of], {"embeds": text["embeds"][of]}]
        return part, lambda out: (scale * weight[of] * out + out.square()).sum()

    editor.transformer.disable_gradient_checkpointing()
    for number, of in enumerate(chunks):
        part, value = loss(of, number + 1)
        value(uncached(editor, *part, count=2)[0]).backward()
    expected = gradients(own)
    if checkpointing:
        editor.transformer.enable_gradient_checkpointing()
    for number, of in enumerate(chunks):
        part, value = loss(of, number + 1)
        value(velocity(editor, *part)).backward()
    before = gradients(own)
    editor.backward_references()
    if cache_bytes:
        assert (editor.references.extractions, editor.references.backwards) == (3, 3)
    else:
        assert editor.references.backwards > 3  # carried on when they were dropped
    after = gradients(own)
    for ours, rest, truth in zip(before, after, expected, strict=True):
        assert ((ours + rest) - truth).abs().max() <= 1e-10 * truth.abs().max()
    assert any(
        (ours - truth).abs().max() > 1e-2 * truth.abs().max() for ours, truth in zip(before, expected, strict=True)
    )
    assert editor.references.bytes == sum(entry.nbytes for entry in editor.references._entries.values())
    editor.backward_references()  # nothing is left
    assert all(parameter.grad is None for parameter in own.parameters)


def test_a_gradient_that_comes_after_its_reference_was_dropped_is_not_lost():
    editor = editor_of(torch.float64, cache_bytes=0)
    own = adapters_of(editor, old=False)
    latents, timestep, reference, text = samples(editor, [0, 1])
    halves = [
        (latents[i : i + 1], timestep[i : i + 1], reference[i : i + 1], {"embeds": text["embeds"][i : i + 1]})
        for i in (0, 1)
    ]
    sum(uncached(editor, *half)[0].square().sum() for half in halves).backward()
    expected = gradients(own)
    both = sum(velocity(editor, *half).square().sum() for half in halves)  # the second drops the first's reference
    both.backward()
    editor.backward_references()
    for ours, truth in zip(gradients(own), expected, strict=True):
        assert (ours - truth).abs().max() <= 1e-6 * truth.abs().max()


def test_bf16_gradients_of_many_members_are_summed_in_fp32():
    editor = editor_of(torch.bfloat16)
    adapters_of(editor, old=False)
    latents, timestep, reference, text = samples(editor, [0, 0])
    for _ in range(3):
        velocity(editor, latents, timestep, reference, text).float().square().sum().backward()
    (waiting,) = editor.references._waiting.values()
    assert {tensor.dtype for tensor in waiting.sums.values()} == {torch.float32}
    assert {leaf.dtype for leaf in editor.references._entries[next(iter(editor.references._entries))].leaves} == {
        torch.bfloat16
    }


def test_a_compiled_block_extracts_reads_and_carries_gradients():
    """One of them, to save time, checkpointed; weights trained in place, without adapters."""
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        editor = editor_of()
        blocks = [*editor.transformer.transformer_blocks, *editor.transformer.single_transformer_blocks]
        weights = [
            block.attn.get_submodule(name).weight.requires_grad_() for block, name in zip(blocks, TRAINED, strict=True)
        ]
        editor.transformer.enable_gradient_checkpointing()
        if compiled:
            blocks[2].compile(fullgraph=True, backend="eager")
        velocity(editor, *samples(editor, [0, 0, 1])).square().sum().backward()
        editor.backward_references()
        results.append([weight.grad for weight in weights])
    for ours, eager in zip(*results, strict=True):
        assert (ours - eager).abs().max() <= 1e-4 * eager.abs().max()


class Uncached(KleinKVEditor):
    """References in the sequence of every row, at every step, in the graph."""

    def condition(self, references, text, *, height, width, guidance_scale=1.0, reference_size=None):
        ids = self._image_ids((10, (height, width)), (0, (height, width)))
        inputs = self._inputs(text["embeds"], ids)
        inputs |= {"kv_cache_mode": "extract", "num_ref_tokens": references.shape[1]}
        return Condition(references, inputs)

    def velocity(self, latents, timestep, condition):
        return self.transformer(
            hidden_states=torch.cat([condition.references, latents.to(self.dtype)], 1),
            timestep=self._timestep(timestep, len(latents), 1),
            return_dict=False,
            **condition.inputs,
        )[0]


@pytest.mark.parametrize(("objective", "checkpointing"), [([], False), (NFT, True)])
def test_the_gradient_of_an_iteration_is_that_without_a_cache(monkeypatch, tmp_path, objective, checkpointing):
    """As Klein in the configuration, of the same transformer; budgets of plenty and of nothing."""
    monkeypatch.setattr("diffusers.models.transformers.transformer_flux2.apply_rotary_emb", exact_rotation)
    trajectories, results = None, []
    write_dataset(tmp_path / "data", 4, turns=2)
    for kind, options in ((Uncached, {}), (KleinKVEditor, {}), (KleinKVEditor, {"cache_bytes": 0})):
        config = tiny_config(
            tmp_path,
            [
                "model.family=flux2_klein",
                f"model.activation_checkpointing={checkpointing}",
                "data.resolution=16",
                "optimizer.max_grad_norm=1e9",
                *objective,
            ],
        )
        editor = kind(tiny_klein_kv().to(GPU, torch.float64), max_sequence_length=LENGTH, **options)
        trainer = Trainer(editor, EditChains(config.data.path, turns=2, resolution=16), config)
        with torch.no_grad():
            for parameter in trainer.adapters.parameters:
                parameter.add_(0.05)
        trainer.adapters.stepped()
        if trajectories is None:  # of one for all, as rounding to 8 bits may differ
            trajectories = trainer.sample(trainer.chains.batch(0, 2), iteration=0)[0]
        advantage = torch.randn(8, 2, generator=torch.Generator().manual_seed(1))
        batch = trainer.learning_batch(trajectories, AdvantageResult(advantage, torch.ones(8, dtype=torch.bool), {}))
        found = []
        trainer.optimizer.step = lambda found=found, trainer=trainer: found.extend(gradients(trainer.adapters))
        assert trainer.update(batch).metrics()["update/steps"] == 1
        results.append(found)
        if kind is KleinKVEditor:
            assert editor.references.backwards >= 2 + 8
    for cached in results[1:]:
        for ours, truth in zip(cached, results[0], strict=True):
            assert (ours - truth).abs().max() <= 1e-7 * truth.abs().max()


# ---- which weights


@pytest.mark.parametrize("parts", [(4, 4), (3, 1)])
def test_rows_of_a_mixed_plan_read_what_their_own_weights_made(parts):
    editor = editor_of()
    own = adapters_of(editor)
    count = sum(parts)
    latents, timestep, reference, text = samples(editor, [0] * count)
    old, rest = slice(0, parts[0]), slice(parts[0], count)

    def part(of):
        return latents[of], timestep[of], reference[of], {"embeds": text["embeds"][of]}

    with own.rows(*parts):
        mixed = velocity(editor, *part(slice(None)))
    assert editor.references.extractions == 2  # of the old policy and of the base
    with torch.no_grad(), own.old():
        torch.testing.assert_close(mixed[old], uncached(editor, *part(old))[0], rtol=1e-5, atol=3e-5)
        velocity(editor, *part(old))
    with torch.no_grad(), own.reference():
        torch.testing.assert_close(mixed[rest], uncached(editor, *part(rest))[0], rtol=1e-5, atol=3e-5)
        velocity(editor, *part(rest))
    assert (editor.references.extractions, editor.references.hits) == (2, 2)
    with torch.no_grad():
        theta = velocity(editor, *part(old))
    assert editor.references.extractions == 3
    assert (theta - mixed[old]).abs().max() > 1e-3
    own.stepped()
    own.update_old(0.5)
    with own.rows(*parts):
        velocity(editor, *part(slice(None)))
    assert editor.references.extractions == 4  # the base's are still good
    assert len(editor.references._entries) == 2  # and those of weights that are no more are gone


@torch.no_grad()
def test_a_policy_that_equals_another_shares_its_references():
    editor = editor_of()
    own = adapters_of(editor)
    own.update_old(0.0)
    inputs = samples(editor, [0])
    theta = velocity(editor, *inputs)
    with own.old():
        assert torch.equal(velocity(editor, *inputs), theta)
    for parameter in own.parameters:
        parameter.add_(0.1)
    own.stepped()
    with own.old():  # still those of the rollout
        assert torch.equal(velocity(editor, *inputs), theta)
    assert editor.references.extractions == 1
    with own.averaged():
        velocity(editor, *inputs)
    assert editor.references.extractions == 2


@torch.no_grad()
def test_changes_of_the_weights_are_seen_without_a_plan():
    editor = editor_of()
    inputs = samples(editor, [0])
    transformer = editor.transformer

    def extractions():
        velocity(editor, *inputs)
        velocity(editor, *inputs)
        return editor.references.extractions

    assert extractions() == 1
    transformer.add_adapter(LoraConfig(r=2, target_modules=editor.lora_targets, init_lora_weights=False), "one")
    assert extractions() == 2
    next(p for n, p in transformer.named_parameters() if "lora_A.one" in n).mul_(2)
    assert extractions() == 3
    transformer.disable_adapters()
    assert extractions() == 4
    transformer.enable_adapters()
    transformer.set_adapters(["one"], [0.5])
    assert extractions() == 5
    next(transformer.parameters()).data.mul_(1.01)  # not seen
    assert extractions() == 5
    editor.invalidate()
    assert editor.references.bytes == 0
    assert extractions() == 6


def test_weights_that_change_while_gradients_wait_are_an_error():
    editor = editor_of()
    own = adapters_of(editor, old=False)
    inputs = samples(editor, [0])
    velocity(editor, *inputs).sum().backward()
    own.stepped()
    for call in (editor.backward_references, lambda: velocity(editor, *inputs)):
        with pytest.raises(RuntimeError, match=r"gradients of 1 wait for weights that have changed.*before the optim"):
            call()
    editor.invalidate()
    velocity(editor, *inputs)


def test_rows_without_trainable_weights_have_no_graph():
    editor = editor_of()
    inputs = samples(editor, [0])
    assert not velocity(editor, *inputs).requires_grad
    own = adapters_of(editor)
    own.update_old(0.0)
    velocity(editor, *inputs).sum().backward()
    for context in (own.reference, own.old):
        with context():
            assert not velocity(editor, *inputs).requires_grad


# ---- keys


def splitmix(value):
    mask = (1 << 64) - 1
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & mask
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & mask
    return value ^ (value >> 31)


@pytest.mark.parametrize("shape", [(3, 5, 4), (2, 3, 1), (1, 1, 7)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_content_keys_are_the_published_mix_of_every_word(dtype, shape):
    latents = torch.randn(shape, dtype=torch.float64).to(dtype)
    for row, key in zip(latents, content_keys(latents), strict=True):
        data = row.contiguous().view(torch.uint8).numpy().tobytes()
        data += bytes(-len(data) % 8)
        words = [int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), 8)]
        golden = 0x9E3779B97F4A7C15
        mixed = [splitmix(w ^ splitmix((i + 1) * golden & (1 << 64) - 1)) for i, w in enumerate(words)]
        assert [part % 2**64 for part in key] == [sum(mixed) % 2**64, sum(map(splitmix, mixed)) % 2**64]


def test_content_keys_know_places_and_ignore_memory_layout():
    latents = torch.randn(4, 6, 8)
    keys = content_keys(latents)
    assert len(set(keys)) == 4
    assert content_keys(latents.flip(0)) == keys[::-1]
    assert content_keys(latents.transpose(1, 2).contiguous().transpose(1, 2)) == keys
    assert content_keys(latents[:1].expand(3, -1, -1)) == [keys[0]] * 3
    assert not set(content_keys(latents.flip(1))) & set(keys)
    assert not set(content_keys(latents.roll(1, 2))) & set(keys)
