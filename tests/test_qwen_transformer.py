"""Qwen-Image-Edit's transformer called with tensors: the stock forward's numbers; compiled, checkpointed, sharded."""

import copy
import json

import pytest
import torch
import torch.distributed as dist
from diffusers import QwenImageEditPlusPipeline, QwenImageTransformer2DModel
from peft import LoraConfig
from tiny_families import tiny_qwen
from torch.distributed.fsdp import fully_shard

from mtedit_fast.editors import QwenEditor
from mtedit_fast.editors.qwen_transformer import JointAttention, SequenceTables, take_tensors

GRIDS = {1: ((1, 4, 6), (1, 4, 6)), 2: ((1, 4, 4), (1, 6, 2), (1, 3, 5))}  # of the edit and its references
TEXT, SIZE, TOKENS = 7, 64, 16


def transformers(**options):
    """The stock transformer, and the same one called with tensors."""
    stock, own = (tiny_qwen(QwenImageEditPlusPipeline, **options).transformer for _ in range(2))
    take_tensors(own)
    return stock, own


def inputs_of(transformer, grids, rows=2, text=TEXT):
    tables = SequenceTables(transformer)
    cos, sin = tables.rotary(grids, text)
    index = tables.modulate_index(grids)
    assert (index is None) == (not transformer.config.zero_cond_t)
    return {"rotary_cos": cos, "rotary_sin": sin} | ({} if index is None else {"modulate_index": index})


def states_of(grids, rows=2, text=TEXT):
    tokens = sum(frames * height * width for frames, height, width in grids)
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(rows, tokens, 16, generator=generator),
        "encoder_hidden_states": torch.randn(rows, text, 16, generator=generator),
        "timestep": torch.rand(rows, generator=generator),
    }


def theirs(transformer, grids, states, mask=None):
    return transformer(
        **states,
        encoder_hidden_states_mask=mask,
        img_shapes=[list(grids)] * len(states["timestep"]),
        return_dict=False,
    )[0]


@pytest.mark.parametrize("zero_cond_t", [False, True])
@pytest.mark.parametrize("references", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_forward_is_the_stock_one(zero_cond_t, references, masked):
    stock, own = transformers(zero_cond_t=zero_cond_t)
    grids = GRIDS[references]
    states, inputs = states_of(grids), inputs_of(own, grids)
    mask = torch.tensor([[True] * TEXT, [True] * 4 + [False] * 3]) if masked else None
    expected = theirs(stock, grids, states, mask)
    if mask is not None:
        image = mask.new_ones(2, states["hidden_states"].shape[1])
        inputs["attention_mask"] = torch.cat([mask, image], dim=1)[:, None, None]
    torch.testing.assert_close(own(**states, **inputs)[0], expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(theirs(own, grids, states, mask), expected, rtol=1e-6, atol=1e-6)  # the stock call


@pytest.mark.parametrize("zero_cond_t", [False, True])
@torch.no_grad()
def test_branches_of_two_lengths_are_two_forwards(zero_cond_t):
    stock, own = transformers(zero_cond_t=zero_cond_t)
    grids, states = GRIDS[1], states_of(GRIDS[1], rows=4)
    inputs = inputs_of(own, grids, text=5) | {
        "negative_" + name: value for name, value in inputs_of(own, grids).items() if name.startswith("rotary")
    }
    together = own(**states, **inputs)[0]
    for half, text in ((slice(0, 2), 5), (slice(2, 4), TEXT)):
        alone = {name: value[half] for name, value in states.items()}
        alone["encoder_hidden_states"] = alone["encoder_hidden_states"][:, :text]
        torch.testing.assert_close(together[half], theirs(stock, grids, alone), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_bf16_is_as_exact_as_the_stock_forward():
    stock, own = transformers()
    grids, states = GRIDS[2], states_of(GRIDS[2])
    exact = theirs(stock, grids, states)
    half = {name: value.bfloat16() for name, value in states.items()}
    stock.bfloat16(), own.bfloat16()
    error, their_error = (
        (out.float() - exact).abs().max()
        for out in (own(**half, **inputs_of(own, grids))[0], theirs(stock, grids, half))
    )
    assert error <= 1.2 * their_error


def test_module_stays_what_it_was(tmp_path):
    stock, own = transformers()
    processor = own.transformer_blocks[0].attn.processor
    forward = own.forward
    take_tensors(own)  # a second editor of the pipeline
    assert own.forward == forward
    assert own.transformer_blocks[0].attn.processor is processor
    assert type(own) is QwenImageTransformer2DModel
    assert own.state_dict().keys() == stock.state_dict().keys()
    own.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "QwenImageTransformer2DModel"
    twin = copy.deepcopy(own)
    for parameter in twin.parameters():
        parameter.data.zero_()
    states = states_of(GRIDS[1])
    assert not twin(**states, **inputs_of(twin, GRIDS[1]))[0].any()  # its own weights, not the first one's
    assert own(**states, **inputs_of(own, GRIDS[1]))[0].any()


def test_a_replaced_forward_is_refused():
    transformer = tiny_qwen().transformer
    transformer.forward = transformer.forward
    with pytest.raises(ValueError, match=r"transformer: expected its own forward, .*; build the editor before"):
        take_tensors(transformer)


def test_attention_backend_before_and_after():
    stock = tiny_qwen().transformer
    try:
        stock.set_attention_backend("_native_math")
        before = stock.transformer_blocks[0].attn.processor._attention_backend
        take_tensors(stock)
        processor = stock.transformer_blocks[1].attn.processor
        assert isinstance(processor, JointAttention)
        assert processor._attention_backend == before
        stock.set_attention_backend("native")
        assert processor._attention_backend != before
    finally:
        stock.reset_attention_backend()


def guided(**options):
    """(editor, [n, N, C] noise, its condition) with both branches, text of several lengths and two references."""
    pipeline = tiny_qwen(QwenImageEditPlusPipeline, **options)
    editor = QwenEditor(pipeline, max_sequence_length=96, negative_prompt="blue", condition_area=SIZE**2)
    torch.manual_seed(0)
    images = torch.rand(2, 2, 3, SIZE, SIZE)
    text = editor.encode_text(["remove the red circle", "add a square"], images)
    condition = editor.condition(editor.encode_image(images), text, height=SIZE, width=SIZE, guidance_scale=3.0)
    assert "attention_mask" in condition.inputs
    return editor, torch.randn(2, TOKENS, 16), condition


@torch.no_grad()
def test_velocity_compiles_into_one_graph_which_serves_other_lengths():
    editor, latents, condition = guided(zero_cond_t=True, num_layers=1)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(editor.velocity, fullgraph=True, backend=backend)  # so it waits for nothing, either
    conditions = [condition]
    for prompt in ("remove", "add the red circle now"):
        text = editor.encode_text([prompt] * 2)
        conditions.append(editor.condition(condition.references[:2], text, height=SIZE, width=SIZE, guidance_scale=3.0))
    for timestep, each in zip((900.0, 500.0, 200.0), conditions, strict=True):
        moment = torch.tensor(timestep)
        torch.testing.assert_close(
            compiled(latents, moment, each), editor.velocity(latents, moment, each), rtol=1e-5, atol=1e-5
        )
    assert len(graphs) == 2  # with a mask, and without one for any length
    torch._dynamo.reset()


@torch.no_grad()
def test_blocks_compile_once_for_all():
    editor, latents, condition = guided(zero_cond_t=True)
    expected = editor.velocity(latents, torch.tensor(300.0), condition)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    editor.transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
    actual = editor.velocity(latents, torch.tensor(300.0), condition)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1  # two blocks
    torch._dynamo.reset()


def test_gradients_of_adapters_with_and_without_checkpointing():
    editor, latents, condition = guided(zero_cond_t=True)
    transformer = editor.transformer
    transformer.add_adapter(LoraConfig(r=2, target_modules=editor.lora_targets, init_lora_weights=False))
    trained = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
    calls, gradients = [], []
    transformer.register_forward_pre_hook(lambda *call: calls.append(call[2]["hidden_states"].shape), with_kwargs=True)
    transformer.transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append("block"))
    for checkpointing in (False, True):
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        velocity = editor.velocity(latents, torch.tensor(700.0), condition)
        (velocity * torch.linspace(-1, 1, velocity.numel()).view_as(velocity)).sum().backward()
        gradients.append({name: p.grad for name, p in trained.items()})
        transformer.zero_grad(set_to_none=True)
    shape = torch.Size([4, 3 * TOKENS, 16])  # both branches, state and two references
    assert calls == [shape, "block", shape, "block", "block"]  # the last one recomputed
    for name, gradient in gradients[0].items():
        if "blocks.1." in name and any(part in name for part in ("to_add_out", "txt_mlp", "add_q_proj")):
            continue  # of the last block's text nothing is left
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_fsdp_wraps_the_same_module():
    editor, latents, condition = guided(zero_cond_t=True)
    expected = editor.velocity(latents, torch.tensor(700.0), condition)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        for module in (*editor.transformer.transformer_blocks, editor.transformer):
            fully_shard(module, mesh=mesh)
        actual = editor.velocity(latents, torch.tensor(700.0), condition)
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_exports_with_its_tables_as_inputs():
    _, own = transformers(zero_cond_t=True)
    states, inputs = states_of(GRIDS[2]), inputs_of(own, GRIDS[2])
    program = torch.export.export(own, (), states | inputs)
    other = {name: value.flip(0) for name, value in states.items()}
    torch.testing.assert_close(program.module()(**other, **inputs)[0], own(**other, **inputs)[0], rtol=1e-6, atol=1e-6)
    values = [node.meta.get("val") for node in program.graph.nodes]
    assert not any(value.is_complex() for value in values if isinstance(value, torch.Tensor))
    names = {spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"}
    assert {"rotary_cos", "rotary_sin", "modulate_index"} <= names
