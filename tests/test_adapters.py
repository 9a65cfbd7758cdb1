"""Adapters against models whose weights are merged by the formula W + α/r·B A, and against peft's own layers."""

from contextlib import nullcontext

import pytest
import torch
from adapted_net import ALPHA, FLUX_TARGETS, RANK, adapters, gradients, merge, net, run_flux, stock, weights
from tiny import tiny_pipeline

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
