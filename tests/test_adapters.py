"""Adapters against models whose weights are merged by the formula W + α/r·B A, and against peft's own layers."""

import io
from contextlib import nullcontext

import pytest
import torch
from diffusers.loaders.peft import PeftAdapterMixin
from distributed_worker import run_ranks
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file
from tiny import SIZE, tiny_editor, tiny_pipeline
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mtedit_fast.editors import KontextEditor
from mtedit_fast.training.adapters import OLD_DECAY, Adapters

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


# ---- which rows see which adapter


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize("counts", [(2, 3), (4, 1), (5, 0), (0, 5)])
def test_rows_equal_separate_forwards_of_merged_models(dtype, tolerance, counts):
    own = adapters(net(dtype))
    assert {p.dtype for p in own.parameters} == {dtype}
    x = torch.randn(5, 7, 6, dtype=dtype)
    with torch.no_grad():
        expected = torch.cat(
            [merge(net(), own, "old")(x[: counts[0]].double()), net().double()(x[counts[0] :].double())]
        )
    with own.rows(*counts):
        mixed = own.model(x)
    assert mixed.dtype == dtype
    torch.testing.assert_close(mixed.double(), expected, rtol=0, atol=tolerance * expected.abs().max().item())


def test_each_context_is_one_policy_and_ends_with_its_block():
    own = adapters(net(torch.float64))
    x = torch.randn(5, 6, dtype=torch.float64)
    expected = {name: merge(net(), own, name)(x) for name in ("default", "old")} | {"base": net().double()(x)}
    with own.old():
        torch.testing.assert_close(own.model(x), expected["old"])
        with own.reference():
            torch.testing.assert_close(own.model(x), expected["base"])
        torch.testing.assert_close(own.model(x), expected["old"])
    with pytest.raises(KeyError), own.rows(2, 3):
        raise KeyError
    theta = own.model(x)
    assert theta.requires_grad
    torch.testing.assert_close(theta, expected["default"])
    own.model.disable_adapters()  # peft's switches keep their meaning
    torch.testing.assert_close(own.model(x), expected["base"])
    own.model.enable_adapters()
    own.model.set_adapter("old")
    torch.testing.assert_close(own.model(x), expected["old"])
    own.model.set_adapter("default")
    own.model.fuse_lora(adapter_names=["default"])
    torch.testing.assert_close(own.model(x), expected["default"])


def test_without_an_old_adapter_the_old_policy_is_the_base():
    own, x = adapters(old=False), torch.randn(3, 6)
    expected = net()(x)
    with own.old():
        assert torch.equal(own.model(x), expected)
    with own.rows(2, 1):
        assert torch.equal(own.model(x), expected)
    assert not own.old_is_current


def test_copies_of_the_batch_stacked_for_guidance():
    own, x = adapters(net(torch.float64)), torch.randn(3, 4, 6, dtype=torch.float64)
    y = torch.randn(3, 4, 6, dtype=torch.float64)
    with own.rows(2, 1):
        torch.testing.assert_close(own.model(torch.cat([x, y])), torch.cat([own.model(x), own.model(y)]))


@pytest.mark.parametrize("counts", [(3, 5), (1, 7)])
def test_rows_of_a_transformer(counts):
    own = adapters(tiny_pipeline(torch.float64).transformer, targets=FLUX_TARGETS, spread=0.1)
    with own.rows(*counts):
        mixed = run_flux(own.model, 8)
    with torch.no_grad():
        old = run_flux(merge(tiny_pipeline().transformer, own, "old"), 8, slice(0, counts[0]))
        base = run_flux(tiny_pipeline(torch.float64).transformer, 8, slice(counts[0], None))
        theta = run_flux(own.model, 8)
    torch.testing.assert_close(mixed, torch.cat([old, base]), rtol=0, atol=1e-12)
    assert (theta - mixed).abs().amax((1, 2)).min() > 1e-2


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_base_with_fp32_adapters_is_as_exact_as_peft_under_autocast(autocast):
    dtype = torch.float32 if autocast else torch.bfloat16
    own = adapters(net(dtype))
    assert {p.dtype for p in own.parameters + weights(own, "old")} == {torch.float32}
    peft, x = stock(own, net(dtype)), torch.randn(64, 33, 6, dtype=dtype)
    theirs = {}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for name in ("default", "old"):
            peft.set_adapter(name)
            theirs[name] = peft(x)
        peft.disable_adapters()
        theirs["mixed"] = torch.cat([theirs["old"][:40], peft(x[40:])])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = {"default": own.model(x)}
        with own.rows(40, 24):
            ours["mixed"] = own.model(x)
    truth = {name: merge(net(dtype), own, name)(x.double()) for name in ("default", "old")}
    truth["mixed"] = torch.cat([truth["old"][:40], net(dtype).double()(x[40:].double())])
    for name, value in ours.items():
        assert value.dtype == torch.bfloat16
        assert (value - truth[name]).square().mean() <= (theirs[name] - truth[name]).square().mean() + 1e-5


# ---- gradients


def gradients(own, x):
    own.model.zero_grad()
    own.model(x).square().sum().backward()
    return [p.grad.clone() for p in own.parameters]


def test_the_old_adapter_changes_no_gradient():
    x = torch.randn(5, 6)
    alone, own = adapters(old=False), adapters()
    expected, found = gradients(alone, x), gradients(own, x)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    own.model.disable_adapters()
    own.model.enable_adapters()  # peft switches requires_grad as it goes
    trainable = {name for name, p in own.model.named_parameters() if p.requires_grad}
    assert trainable == {name for name, p in own.model.named_parameters() if ".default." in name}
    assert all(p.grad is None for p in weights(own, "old"))


def test_gradients_equal_those_of_the_formula():
    own = adapters(net(torch.float64))
    x = torch.randn(5, 4, 6, dtype=torch.float64)
    values = [p.detach().clone().requires_grad_() for p in own.parameters]
    plain = net(torch.float64)
    (a1, b1, a2, b2), s = values, ALPHA / RANK
    hidden = torch.nn.functional.silu(plain.first(x) + s * x @ a1.T @ b1.T)
    (plain.second(hidden) + s * hidden @ a2.T @ b2.T).square().sum().backward()
    for found, value in zip(gradients(own, x), values, strict=True):
        torch.testing.assert_close(found, value.grad)


def test_rows_save_no_activation():
    own, saved = adapters(tiny_pipeline().transformer, targets=FLUX_TARGETS), []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with own.rows(1, 1):
            out = run_flux(own.model, 2, dtype=torch.float32)
        assert not out.requires_grad
        assert not saved
        run_flux(own.model, 2, dtype=torch.float32)
    assert saved  # θ's: the hook does see activations


def test_activation_checkpointing_gives_the_same_gradients():
    own = adapters(tiny_pipeline().transformer, targets=FLUX_TARGETS)
    grads = []
    for checkpointing in (False, True):
        own.model.train()
        if checkpointing:
            own.model.enable_gradient_checkpointing()
        out = run_flux(own.model, 3, dtype=torch.float32)
        with own.rows(1, 2):  # a forward between θ's forward and its backward
            run_flux(own.model, 3, dtype=torch.float32)
        own.model.zero_grad()
        out.square().mean().backward()
        grads.append([p.grad.clone() for p in own.parameters])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def policies(own):
    """A forward under every plan; batches of 2n rows."""
    return [nullcontext(), own.reference(), own.old(), *(own.rows(n, n) for n in (2, 3)), own.rows(1, 3), nullcontext()]


def test_a_compiled_model_follows_the_plan():
    own, x = adapters(), torch.randn(12, 3, 6)
    sizes = (4, 4, 4, 4, 6, 4, 4)
    eager, compiled = [], []
    for results in (eager, compiled):
        if results is compiled:
            torch._dynamo.reset()
            own.model.compile(fullgraph=True)
        for context, size in zip(policies(own), sizes, strict=True):
            with torch.no_grad(), context:
                results.append(own.model(x[:size]))
        results += gradients(own, x)
    for value, truth in zip(compiled, eager, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-5, atol=1e-5)


def test_compiled_blocks_serve_every_count_of_equal_shares():
    own = adapters(tiny_pipeline().transformer, targets=FLUX_TARGETS, spread=0.1)
    torch._dynamo.reset()
    own.model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")  # traced as for Inductor, in less time
    graphs = []
    for count in (2, 3, 4, 5):
        with own.rows(count, count):
            run_flux(own.model, 2 * count, dtype=torch.float32)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[2] == graphs[3]


# ---- values


def test_initial_values_are_pefts_and_the_global_random_state_stays():
    torch.manual_seed(7)
    state = torch.get_rng_state()
    own = Adapters(net_without_seed(), rank=RANK, alpha=ALPHA, target_modules=["first", "second"], seed=11, old=True)
    assert torch.equal(torch.get_rng_state(), state)
    peft = net_without_seed()
    torch.manual_seed(11)
    peft.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["first", "second"]))
    theirs = weights(AttributeView(peft), "default")
    assert all(map(torch.equal, own.parameters, theirs))
    assert all(map(torch.equal, weights(own, "old"), theirs))
    assert own.old_is_current


def net_without_seed():
    with torch.random.fork_rng():
        return net()


def test_schedules_of_the_old_policy():
    expected = {
        "on_policy": {0: 0, 1: 0, 10**6: 0},
        "ramp": {0: 0, 1: 0.001, 200: 0.2, 500: 0.5, 501: 0.5, 10**6: 0.5},
        "delayed": {0: 0, 74: 0, 75: 0, 76: 0.0075, 175: 0.75, 208: 0.9975, 209: 0.999, 10**6: 0.999},
        "crd": {0: 0.25, 1: 0.255, 100: 0.75, 149: 0.995, 150: 0.999, 10**6: 0.999},
    }
    assert OLD_DECAY.keys() == expected.keys()
    for name, values in expected.items():
        assert [OLD_DECAY[name](n) for n in values] == pytest.approx(list(values.values()), abs=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_old_and_average_move_towards_theta(decay):
    own = adapters()
    theta, old, average = (
        [v.detach().double() for v in values] for values in (own.parameters, weights(own, "old"), own.averages)
    )
    theta_bits = [p.detach().clone() for p in own.parameters]
    own.update_old(decay)
    own.update_average(decay)
    for found, before in ((weights(own, "old"), old), (own.averages, average)):
        for value, was, towards in zip(found, before, theta, strict=True):
            torch.testing.assert_close(value.double(), decay * was + (1 - decay) * towards, rtol=1e-6, atol=1e-7)
    assert all(map(torch.equal, own.parameters, theta_bits))


def test_decay_zero_copies_even_over_what_is_not_finite():
    own = adapters()
    weights(own, "old")[0].data.fill_(float("inf"))
    own.update_old(0)
    assert all(map(torch.equal, weights(own, "old"), own.parameters))


def test_old_is_current_only_while_it_is_known_to_equal_theta():
    own = Adapters(net(), rank=RANK, alpha=ALPHA, target_modules=["first"], seed=0, old=True)
    known = [own.old_is_current]
    own.stepped()
    known.append(own.old_is_current)
    own.update_old(0.5)
    known.append(own.old_is_current)
    own.update_old(0)
    known.append(own.old_is_current)
    own.update_old(0.5)  # between two equal values
    known.append(own.old_is_current)
    with own.averaged():
        known.append(own.old_is_current)
    known.append(own.old_is_current)
    assert known == [True, False, False, True, True, False, True]


def test_the_average_takes_thetas_place_and_gives_it_back():
    own = adapters()
    own.update_average(0.25)
    theta, x = [p.detach().clone() for p in own.parameters], torch.randn(2, 6)
    expected = own.model(x)
    with own.averaged():
        assert all(map(torch.equal, own.parameters, own.averages))
        assert not torch.equal(own.model(x), expected)
    with pytest.raises(KeyError), own.averaged():
        raise KeyError
    assert all(map(torch.equal, own.parameters, theta))
    assert torch.equal(own.model(x), expected)


# ---- state


def saved(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def fresh(**options):
    options = {"rank": RANK, "alpha": ALPHA, "target_modules": ["first", "second"], "seed": 3, "old": True} | options
    return Adapters(net(), **options)


@pytest.mark.parametrize("current", [False, True])
def test_state_comes_back_bit_for_bit(current):
    own = adapters()
    own.update_average(0.5)
    if current:
        own.update_old(0)
    state = saved(own.state_dict())
    assert list(state["old"]) == own.names
    assert own.names == list(peft_names(net()))
    other = fresh()
    other.load("default", dict(zip(own.names, own.parameters, strict=True)))
    assert not other.old_is_current
    other.load_state_dict(state)
    assert other.old_is_current == current
    for ours, theirs in ((own.parameters, other.parameters), (own.averages, other.averages)):
        assert all(map(torch.equal, ours, theirs))
    assert all(map(torch.equal, weights(own, "old"), weights(other, "old")))
    assert [p.requires_grad for p in other.parameters + weights(other, "old")] == [True] * 4 + [False] * 4
    own.stepped()
    assert "old" not in adapters(old=False).state_dict()


def peft_names(model):
    model.add_adapter(LoraConfig(r=RANK, target_modules=["first", "second"]))
    return get_peft_model_state_dict(model)


def test_an_exported_adapter_is_thetas_alone_and_loads_in_the_stock_pipeline(tmp_path):
    editor = tiny_editor(torch.float64)
    own = adapters(editor.transformer, targets=FLUX_TARGETS, spread=0.1)
    editor.save_lora(tmp_path)
    tensors = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert sorted(tensors) == sorted(f"transformer.{name}" for name in own.names)
    pipeline = tiny_pipeline(torch.float64)
    pipeline.load_lora_weights(tmp_path)
    text = editor.encode_text(["Remove the red circle"])
    latents, reference = torch.randn(2, 1, 16, 64, dtype=torch.float64)
    options = {"height": SIZE, "width": SIZE, "guidance_scale": 2.5}

    def velocity(each):
        return each.velocity(latents, torch.tensor(500.0), each.condition(reference, text, **options))

    with torch.no_grad():
        loaded = velocity(KontextEditor(pipeline))
        torch.testing.assert_close(velocity(editor), loaded, rtol=0, atol=1e-12)
        with own.old():
            assert (velocity(editor) - loaded).abs().max() > 1e-3


def whole(tensors):
    return [t.full_tensor() if isinstance(t, DTensor) else t for t in tensors]


def in_shards(rank, state, kept_whole):
    """Every method on a model cut over ranks beside its whole twin; three rows over two ranks, so unevenly."""
    torch.manual_seed(1)
    x = torch.randn(5, 4, 6)
    own, twin = adapters(), adapters()
    mesh = init_device_mesh("cpu", (2,))
    ignored = {*own.parameters, *weights(own, "old")} if kept_whole else None
    for module in (own.model.second, own.model):  # the first layer stays gathered after a forward, as a root's does
        fully_shard(module, mesh=mesh, ignored_params=ignored)

    def equal(ours, theirs):
        for value, truth in zip(whole(ours), theirs, strict=True):
            torch.testing.assert_close(value.detach(), truth.detach(), rtol=1e-6, atol=1e-6)

    assert {isinstance(p, DTensor) for p in own.parameters} == {not kept_whole}
    for adapted, rest in ((2, 3), (5, 0), (0, 5)):
        with own.rows(adapted, rest), twin.rows(adapted, rest):
            equal([own.model(x)], [twin.model(x)])
        for each in (own, twin):
            each.update_old(0.3)
            each.update_average(0.6)
        equal(weights(own, "old"), weights(twin, "old"))
        equal(own.averages, twin.averages)
    equal(gradients(own, x), gradients(twin, x))
    with own.averaged(), twin.averaged(), torch.no_grad():
        equal([own.model(x)], [twin.model(x)])
    equal(own.parameters, twin.parameters)
    old = own.state_dict()["old"]
    assert {isinstance(value, DTensor) for value in old.values()} == {not kept_whole}
    result = dict(zip(old, map(torch.clone, whole(old.values())), strict=True))
    own.load_state_dict(state)  # whole tensors
    assert own.old_is_current
    assert all(map(torch.equal, whole(weights(own, "old")), state["old"].values()))
    assert all(map(torch.equal, whole(own.averages), state["average"].values()))
    return result


@pytest.mark.parametrize("kept_whole", [False, True])
def test_a_sharded_model_behaves_as_a_whole_one_and_its_state_loads_anywhere(kept_whole):
    own = adapters()
    own.update_average(0.5)
    own.update_old(0)
    state = own.state_dict()
    first, second = run_ranks(2, in_shards, state, kept_whole)
    own.load_state_dict(state | {"old": first})
    assert all(map(torch.equal, weights(own, "old"), second.values()))


# ---- bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda own: own.update_old(-0.1), r"decay: expected a number in \[0, 1\], got -0.1; it is the share"),
        (lambda own: own.update_old(float("nan")), r"decay: expected a number in \[0, 1\], got nan"),
        (lambda own: own.update_average(1.5), r"decay: expected a number in \[0, 1\], got 1.5"),
        (lambda own: own.rows(-1, 2).__enter__(), r"old, reference: expected counts ≥ 0.*got -1, 2; skip the forward"),
        (lambda own: own.rows(0, 0).__enter__(), r"old, reference: expected counts.*got 0, 0"),
        (lambda own: adapters(own.model), r"model: expected a transformer without adapters, got \['default', 'old'\]"),
    ],
)
def test_bad_values_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(adapters())


@pytest.mark.parametrize("size", [0, 2, 4])
def test_a_batch_of_another_size_is_refused(size):
    own = adapters()
    with own.rows(2, 1), pytest.raises(ValueError, match=rf"rows: expected a batch of 3 rows.*got {size}; old \+ ref"):
        own.model(torch.randn(size, 6))


def test_a_layer_whose_first_dimension_is_not_the_batch_is_refused():
    own = adapters()
    own.model.forward = lambda x: own.model.first(x[0])
    with own.rows(2, 2), pytest.raises(ValueError, match=r"target_modules: expected layers whose first dim.*\[5, 6\]"):
        own.model(torch.randn(4, 5, 6))


def test_other_layers_than_linear_are_refused():
    with pytest.raises(TypeError, match=r"target_modules: expected linear layers, got token, Embedding; leave it out"):
        adapters(targets=("first", "token"))


def test_a_missing_old_adapter_is_named():
    alone, both = fresh(old=False), adapters()
    with pytest.raises(ValueError, match=r"update_old: expected an old adapter, got none; build.*old=True"):
        alone.update_old(0.5)
    with pytest.raises(ValueError, match=r"state: expected an old adapter, got none; build.*old=True"):
        alone.load_state_dict(both.state_dict())
    with pytest.raises(ValueError, match=r"state: expected the old adapter, got \['average'\].*update_old\(0\)"):
        both.load_state_dict(alone.state_dict())


def test_another_rank_or_model_is_named():
    own = adapters()
    message = r"old: adapters of different rank: expected 3, got 5 \(first.lora_A.weight\); build Adapters with rank=5"
    with pytest.raises(ValueError, match=message):
        own.load_state_dict(fresh(rank=5).state_dict())
    with pytest.raises(ValueError, match=r"old: expected the 4 tensors.*got 2; 2 differ, the first is second.lora_A"):
        own.load_state_dict(fresh(target_modules=["first"]).state_dict())
    state = own.state_dict()
    state["average"]["second.lora_A.weight"] = torch.zeros(RANK, 11)
    with pytest.raises(ValueError, match=r"average: expected second.lora_A.weight of shape \[3, 10\], got \[3, 11\]"):
        own.load_state_dict(state)


# ---- versions of the weights


def versions(own, rows=1):
    return [weights.version for weights in own.weights_of(rows)]


def test_rows_know_the_weights_they_see():
    own = adapters()
    (theta,) = versions(own)
    assert own.weights_of(2) == [(theta, True, ("default",))] * 2
    with own.old():
        (old,) = versions(own)
        assert not own.weights_of(1)[0].trainable
    with own.reference():
        (base,) = versions(own)
    assert len({theta, old, base}) == 3
    assert own.versions() == {theta, old, base}
    with own.rows(2, 1):
        assert versions(own, 3) == [old, old, base]
        assert versions(own, 6) == [old, old, base] * 2
        for count in (0, 4):
            with pytest.raises(ValueError, match=rf"rows: expected a batch of 3 rows, or whole copies.*got {count}"):
                own.weights_of(count)
    with own.rows(2, 0):
        assert versions(own, 5) == [old] * 5
    with own.rows(0, 2):
        assert versions(own, 2) == [base] * 2
    own.model.disable_adapters()
    assert versions(own) == [base]
    own.model.enable_adapters()
    alone = adapters(old=False)
    with alone.old():
        assert versions(alone) == [()]
    assert alone.model.weight_plan is alone


def test_a_version_ends_with_its_values():
    own = adapters()
    with own.reference():
        base = versions(own)

    def both():
        with own.old():
            return versions(own)[0], own.weights_of(1)[0].version, *old_and_theta()

    def old_and_theta():
        with own.old():
            old = versions(own)[0]
        with own._planned(("default",)):
            return old, versions(own)[0]

    seen = [old_and_theta()]

    def now(old, theta):
        """Whether old and θ are what they were at the last look."""
        seen.append(old_and_theta())
        return tuple(a == b for a, b in zip(seen[-1], seen[-2], strict=True)) == (old, theta)

    own.stepped()
    assert now(old=True, theta=False)
    own.update_old(0.5)
    assert now(old=False, theta=True)
    own.update_old(0.0)
    assert now(old=False, theta=True)
    assert seen[-1][0] == seen[-1][1]  # a copy
    own.update_old(0.5)  # of two equal values
    assert now(old=True, theta=True)
    with own.averaged():
        assert now(old=True, theta=False)
    assert now(old=True, theta=False)  # back
    assert seen[-1] == seen[-3]
    own.stepped()
    assert now(old=True, theta=False)  # still the copy
    own.load("default", dict(zip(own.names, own.parameters, strict=True)))
    assert now(old=True, theta=False)
    own.load("old", dict(zip(own.names, own.parameters, strict=True)))
    assert now(old=False, theta=True)
    own.load_state_dict(own.state_dict())
    assert now(old=False, theta=True)
    assert seen[-1][0] != seen[-1][1]
    with torch.no_grad():
        own.parameters[0].add_(1)  # without a word
    assert now(old=True, theta=False)
    assert len({old for old, _ in seen} | {theta for _, theta in seen}) == len(set(sum(seen, ())))
    with own.reference():
        assert versions(own) == base


def test_weights_can_be_seen_again_by_all_rows():
    own = adapters()
    x = torch.randn(1, 6)
    with own.rows(1, 1):
        old, base = own.weights_of(2)
        with own.seeing(old):
            seen_old = own.model(x)
        with own.seeing(base):
            seen_base = own.model(x)
        assert versions(own, 2) == [old.version, base.version]
    with torch.no_grad(), own.old():
        assert torch.equal(own.model(x), seen_old)
    with torch.no_grad(), own.reference():
        assert torch.equal(own.model(x), seen_base)
    (theta,) = own.weights_of(1)
    with own.reference(), own.seeing(theta):
        assert own.model(x).requires_grad
