"""The values of adapters: where they start, how the old policy and the average follow θ, saved, sharded, refused."""

import io

import pytest
import torch
from adapted_net import ALPHA, FLUX_TARGETS, RANK, AttributeView, adapters, fresh, gradients, net, weights
from distributed_worker import run_ranks
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file
from tiny import SIZE, tiny_editor, tiny_pipeline
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mtedit_fast.editors import KontextEditor
from mtedit_fast.training.adapters import OLD_DECAY, Adapters

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
