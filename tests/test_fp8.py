"""fp8 rollouts: against the rounded operands in fp64, and through the editor."""

import pytest
import torch
from tiny import SIZE, needs_fp8, tiny_editor
from torch import nn

from mtedit_fast.editors.fp8 import Float8Linear, Float8Switch, fp8_unsupported, to_fp8
from mtedit_fast.rollout import RolloutConfig, rollout, sample_seeds
from mtedit_fast.training.adapters import Adapters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_scaled_to_the_largest_fp8_value(dtype):
    x = (torch.randn(5, 32) * torch.logspace(-6, 6, 5)[:, None]).to(dtype)
    values, scale = to_fp8(x)
    assert (values.dtype, scale.dtype, scale.shape) == (torch.float8_e4m3fn, torch.float32, (5, 1))
    assert (values.float().abs().amax(1) == 448).all()
    # three bits of mantissa: half of 2⁻³ relative, and half a step of the smallest values
    assert ((values.double() * scale - x).abs() <= x.double().abs() / 16 + 2.0**-10 * scale).all()
    assert torch.equal(to_fp8(torch.zeros(2, 16))[0].float(), torch.zeros(2, 16))


class Stub:
    """The least of an editor: what the switch reads of one."""

    lora_targets = "[a-z]+"
    device = torch.device("cpu")

    def __init__(self, **layers):
        self.pipeline = nn.Module()
        self.pipeline.transformer = nn.ModuleDict(layers)
        self.invalidated = 0

    def invalidate(self):
        self.invalidated += 1


@needs_fp8
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_of_the_rounded_operands(bias, dtype):
    layer = nn.Linear(64, 48, bias=bias, dtype=dtype)
    stub, x = Stub(layer=layer, odd=nn.Linear(64, 40)), torch.randn(2, 7, 64, dtype=dtype)
    plain = layer(x)
    switch = Float8Switch(stub)
    assert torch.equal(layer(x), plain)  # off
    with torch.no_grad(), switch:
        out = layer(x)
    assert (switch.layers, stub.invalidated, out.shape, out.dtype) == (1, 2, (2, 7, 48), dtype)
    assert torch.equal(layer(x), plain)
    (values, scale), (weight, weight_scale) = to_fp8(x), to_fp8(layer.weight.detach())
    product = (values.double() * scale) @ (weight.double() * weight_scale).t()
    truth = product if layer.bias is None else product + layer.bias.double()
    assert ((out - truth).abs() <= 2.0**-8 * (product.abs() + truth.abs()) + 1e-5).all()  # each rounded to bf16
    assert (out.float() - plain.float()).norm() < 0.06 * plain.float().norm()
    assert set(layer.state_dict()) == set(nn.Linear(1, 1, bias=bias).state_dict())


@needs_fp8
def test_rollout_in_fp8_differs_a_little_and_leaves_the_editor_as_it_was():
    editor = tiny_editor()
    adapters = Adapters(editor.transformer, rank=2, alpha=4, target_modules=editor.lora_targets, seed=0)
    for parameter in adapters.parameters:
        parameter.data.normal_(std=0.05)
    references, seeds = torch.rand(1, 3, SIZE, SIZE), sample_seeds(0, 0, 2)
    config = RolloutConfig(group_size=2, num_steps=2, micro_batch=2, eta=0.5)
    before = rollout(editor, references, [["remove it"]], config, seeds)
    switch = Float8Switch(editor)
    assert switch.layers == sum(type(module) is Float8Linear for module in editor.transformer.modules()) > 0
    with torch.no_grad(), switch:
        low = rollout(editor, references, [["remove it"]], config, seeds)
    after = rollout(editor, references, [["remove it"]], config, seeds)
    assert torch.equal(after.clean, before.clean)
    difference = (low.clean - before.clean).norm() / before.clean.norm()
    assert 1e-4 < difference < 0.1


@needs_fp8
def test_bad_input():
    with pytest.raises(ValueError, match=r"multiples of 16 in the transformer's blocks, found none"):
        Float8Switch(Stub(layer=nn.Linear(24, 40)))
    switch = Float8Switch(Stub(layer=nn.Linear(16, 16)))
    with pytest.raises(RuntimeError, match=r"fp8 has no gradient; enter it under torch.no_grad"), switch:
        pass


def test_devices_without_fp8(monkeypatch):
    assert "got meta" in fp8_unsupported("meta")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    assert fp8_unsupported("cuda").endswith("got NVIDIA A100 with 8.0")
    stub = Stub(layer=nn.Linear(16, 16))
    stub.device = torch.device("cuda")
    with pytest.raises(ValueError, match=r"precision: fp8 needs compute capability 8.9.*own precision"):
        Float8Switch(stub)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert fp8_unsupported("cuda") is None
