"""A net and a transformer with adapters that are random and different, and the same with merged weights."""

import torch
from diffusers.loaders.peft import PeftAdapterMixin
from peft import LoraConfig
from torch import nn

from mtedit_fast.training.adapters import Adapters

RANK, ALPHA = 3, 4.5
FLUX_TARGETS = r"(transformer_blocks|single_transformer_blocks)\.\d+\.(attn\.(to_[qkv]|add_q_proj)|proj_(mlp|out))"


class Net(nn.Module, PeftAdapterMixin):
    """A layer with and one without bias; takes [B, 6] and [B, N, 6]."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 10)
        self.second = nn.Linear(10, 5, bias=False)
        self.token = nn.Embedding(4, 6)

    def forward(self, x):
        return self.second(torch.nn.functional.silu(self.first(x)))


def net(dtype=torch.float32):
    torch.manual_seed(5)
    return Net().requires_grad_(False).to(dtype)


def adapters(model=None, *, targets=("first", "second"), rank=RANK, old=True, spread=0.5):
    """θ and old random and different, instead of the zeros that they start from."""
    result = Adapters(model or net(), rank=rank, alpha=ALPHA, target_modules=targets, seed=0, old=old)
    generator = torch.Generator().manual_seed(1)
    values = result.parameters + (list(weights(result, "old")) if old else [])
    with torch.no_grad():
        for parameter in values:
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    result.stepped()
    return result


def weights(own, name):
    return [p for n, p in own.model.named_parameters() if n.endswith(f".{name}.weight") and ".lora_" in n]


def merge(model, own, name):
    """Adds one adapter to the weights of a model without adapters, by the formula, in fp64."""
    model = model.double()
    values = dict(zip(own.names, weights(own, name), strict=True))
    with torch.no_grad():
        for layer in {key.rsplit(".", 2)[0] for key in own.names}:
            a, b = (values[f"{layer}.lora_{factor}.weight"].double() for factor in "AB")
            model.get_submodule(layer).weight += ALPHA / own.rank * b @ a
    return model


def stock(own, fresh):
    """The same adapters in peft's own layers."""
    for name in ("default", "old"):
        fresh.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["first", "second"]), name)
        for target, value in zip(weights(AttributeView(fresh), name), weights(own, name), strict=True):
            target.data = value.detach().clone()
    return fresh


class AttributeView:
    def __init__(self, model):
        self.model = model


def flux_inputs(rows, dtype):
    generator = torch.Generator().manual_seed(2)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    per_row = {
        "hidden_states": random(rows, 15, 64),
        "timestep": torch.linspace(0.1, 0.9, rows).to(dtype),
        "guidance": torch.full((rows,), 2.5, dtype=dtype),
        "pooled_projections": random(rows, 96),
        "encoder_hidden_states": random(rows, 7, 96),
    }
    shared = {"txt_ids": torch.zeros(7, 3), "img_ids": torch.arange(45).view(15, 3) % 4.0, "return_dict": False}
    return per_row, shared


def run_flux(model, rows, part=slice(None), dtype=torch.float64):
    per_row, shared = flux_inputs(rows, dtype)
    return model(**{key: value[part] for key, value in per_row.items()}, **shared)[0]


def gradients(own, x):
    own.model.zero_grad()
    own.model(x).square().sum().backward()
    return [p.grad.clone() for p in own.parameters]


def fresh(**options):
    options = {"rank": RANK, "alpha": ALPHA, "target_modules": ["first", "second"], "seed": 3, "old": True} | options
    return Adapters(net(), **options)
