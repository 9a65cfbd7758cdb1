"""Speed modes: the same numbers where they are exact, fewer blocks where they say so."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from tiny import SIZE, tiny_editor
from tiny_families import tiny_klein_kv
from torch._dynamo.testing import CompileCounterWithBackend

from mtedit_fast.cuda_graphs import StaticInputs, layout
from mtedit_fast.editors import KleinKVEditor
from mtedit_fast.editors.graphs import GraphedEditor
from mtedit_fast.editors.speed import ATTENTION, StepCachedEditor, compile_transformer, set_attention
from mtedit_fast.rollout import RolloutConfig, replay, rollout, sample_seeds

CONFIG = RolloutConfig(group_size=2, num_steps=4, micro_batch=2, eta=0.5)
PROMPTS = [["remove it", "add a circle"]] * 2


def sampled(editor, config=CONFIG, device="cpu"):
    torch.manual_seed(0)
    references = torch.rand(2, 3, SIZE, SIZE).to(device)
    return rollout(editor, references, PROMPTS, config, sample_seeds(0, 0, 4, device=device))


@pytest.mark.parametrize("mode", ["blocks", "whole"])
def test_compiled_rollouts_agree_and_have_no_graph_breaks(mode):
    editor, plain = tiny_editor(), sampled(tiny_editor())
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compile_transformer(editor, mode, vae=mode == "whole", backend=graphs)  # fullgraph: a break is an error
    result = sampled(editor)
    torch.testing.assert_close(result.clean, plain.clean, rtol=1e-4, atol=1e-4)
    # The first block of a kind and its successors, or the transformer and the VAE, whose inputs differ in strides the
    # first time: a second turn and micro-batch need no more.
    assert graphs.frame_count == {"blocks": 3, "whole": 4}[mode]


@pytest.mark.parametrize("name", ["native", "xformers", "flash3"])
def test_attention_back_ends(name):
    editor = tiny_editor()
    if name == "native":
        set_attention(editor, name)
        torch.testing.assert_close(sampled(editor).clean, sampled(tiny_editor()).clean)
    elif find_spec({"flash3": "flash_attn_interface"}.get(name, name)) is None:
        with pytest.raises(ValueError, match=f"attention: {name} cannot be used here: .*install|build"):
            set_attention(editor, name)
    with pytest.raises(ValueError, match=f"attention: expected one of {', '.join(ATTENTION)}, got 'fast'"):
        set_attention(editor, "fast")


def counted(editor):
    calls = []
    for block in editor.transformer.single_transformer_blocks:
        block.attn.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_step_cache_skips_blocks_only_where_the_threshold_allows_it():
    editor, plain = tiny_editor(), sampled(tiny_editor())
    calls = counted(editor)
    exact = StepCachedEditor(editor, threshold=1e-9)
    assert torch.equal(sampled(exact).clean, plain.clean)
    every = len(calls)
    assert every == 2 * 2 * CONFIG.num_steps * len(editor.transformer.single_transformer_blocks)
    other = tiny_editor()
    calls = counted(other)
    lossy = sampled(StepCachedEditor(other, threshold=1e9))
    assert len(calls) == every // CONFIG.num_steps  # the first step of every turn
    assert not torch.equal(lossy.clean, plain.clean)
    with pytest.raises(RuntimeError, match="step cache: lossy, for deployment alone"):
        replay(exact, plain, slice(0, 2), 0, 0)
    with pytest.raises(ValueError, match="threshold: expected > 0, got 0"):
        StepCachedEditor(other, threshold=0)
    with pytest.raises(TypeError, match="not cache references' keys and values, got Klein"):
        StepCachedEditor(KleinKVEditor(tiny_klein_kv()))


def test_static_inputs_keep_addresses_and_broadcasts():
    wide = torch.randn(1, 3).expand(4, 3)
    tree = {"a": torch.randn(4, 2).t(), "b": [wide, None, 2.5], "c": torch.arange(3)}
    inputs = StaticInputs(tree)
    assert inputs.tree["b"][0].stride(0) == 0
    assert inputs.tree["a"].data_ptr() != tree["a"].data_ptr()
    assert inputs.tree["a"].stride() == tree["a"].stride()
    addresses = [inputs.tree["a"].data_ptr(), inputs.tree["b"][0].data_ptr(), inputs.tree["c"].data_ptr()]
    other = {"a": torch.randn(4, 2).t(), "b": [torch.randn(1, 3).expand(4, 3), None, 2.5], "c": torch.tensor([5, 6, 7])}
    inputs.load(other)
    for mine, theirs in zip(
        [inputs.tree["a"], *inputs.tree["b"][:1], inputs.tree["c"]],
        [other["a"], other["b"][0], other["c"]],
        strict=True,
    ):
        assert torch.equal(mine, theirs)
    assert addresses == [inputs.tree["a"].data_ptr(), inputs.tree["b"][0].data_ptr(), inputs.tree["c"].data_ptr()]
    for change in ({"a": torch.randn(2, 5)}, {"b": [torch.randn(4, 3), None, 2.5]}, {"b": [wide, None, 3.0]}):
        with pytest.raises(ValueError, match="layout these inputs were made for"):
            inputs.load(other | change)
    assert layout(tree) == layout(other)


def test_without_a_gpu_a_graphed_editor_is_the_editor():
    editor = GraphedEditor(tiny_editor())
    result, plain = sampled(editor), sampled(tiny_editor())
    assert torch.equal(result.clean, plain.clean)
    assert editor.captures == 0
    with pytest.raises(ValueError, match="keep: expected at least 1 graph, got 0"):
        GraphedEditor(tiny_editor(), keep=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are captured on a GPU")
def test_graphed_rollouts_are_the_eager_ones_bit_for_bit():
    editor = tiny_editor()
    editor.pipeline.to("cuda")
    plain = sampled(editor, device="cuda")
    graphed = GraphedEditor(editor)
    for _ in range(2):
        result = sampled(graphed, device="cuda")
        assert torch.equal(result.clean, plain.clean)
        assert torch.equal(result.log_probs, plain.log_probs)
    assert graphed.captures == 1  # every turn and micro-batch has the same layout
    out = replay(graphed, result, slice(0, 2), 1, 1)
    assert torch.equal(out.log_prob, result.log_probs[:2, 1, 1])
    next(editor.transformer.parameters()).data.mul_(1.5)  # in place: no new graph
    assert not torch.equal(sampled(graphed, device="cuda").clean, plain.clean)
    assert graphed.captures == 1
    sampled(graphed, replace(CONFIG, micro_batch=4), device="cuda")
    assert graphed.captures == 2
