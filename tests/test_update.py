"""The update: what goes through the transformer and what does not, gradients that ignore how the batch is cut."""

import pytest
import torch
from op_backends import GPU
from tiny_train import tiny_trainer

from mtedit_fast.ops import advantage_to_reward, seeded_noise
from mtedit_fast.rollout import turn_seeds
from mtedit_fast.training import nft
from mtedit_fast.training.advantages import AdvantageResult
from mtedit_fast.training.memory import graph_bytes, rows_within
from mtedit_fast.training.update import Chunk, UpdateStats

KEEP = torch.tensor([1, 1, 0, 1, 1, 0, 0, 1], dtype=torch.bool, device=GPU)


def trained(folder, *overrides, old_decay=None):
    """A trainer whose policy, old policy and reference are three different models."""
    trainer = tiny_trainer(folder, "optimizer.max_grad_norm=1e9", *overrides)
    generator = torch.Generator().manual_seed(0)
    for parameter in trainer.adapters.parameters:
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator).to(GPU)
    if old_decay is not None:
        trainer.adapters.update_old(old_decay)
    trainer.adapters.stepped()
    return trainer


def chunk_of(rows, turn, index):
    return Chunk(torch.tensor(rows, device=GPU), turn, torch.tensor(index, device=GPU))


def batch_of(trainer, keep=KEEP):
    trajectories = trainer.sample(trainer.chains.batch(0, 2), iteration=0)[0]
    advantage = torch.randn(8, trajectories.turns, generator=torch.Generator().manual_seed(1)).to(GPU)
    return trainer.learning_batch(trajectories, AdvantageResult(advantage * keep[:, None], keep, {}))


def gradients(trainer, batch):
    """θ's gradient at the optimizer step, which is not taken, and the number of rows of every forward."""
    collected, rows = [], []

    def seen(module, arguments, keywords):
        rows.append((len(keywords["hidden_states"]), torch.is_grad_enabled()))

    trainer.optimizer.step = lambda: collected.extend(p.grad.clone() for p in trainer.update.parameters)
    hook = trainer.model.register_forward_pre_hook(seen, with_kwargs=True)
    trainer.update(batch)
    hook.remove()
    return collected, rows


def close(first, second, tolerance):
    return all((a - b).abs().max() <= tolerance * b.abs().max() + 1e-8 for a, b in zip(first, second, strict=True))


def three_forward_loop(trainer, batch):
    """DiffusionNFT as its public trainer runs it, x̂₀ form: three serial forwards of one sample after the other."""
    config, trajectories = trainer.config.objective, batch.trajectories
    total = torch.zeros((), dtype=torch.float64, device=GPU)
    samples = len(trajectories) * trajectories.turns * config.draws
    for turn in range(trajectories.turns):
        for row in range(len(trajectories)):
            for draw in range(config.draws):
                chunk = chunk_of([row], turn, [draw])
                clean = trajectories.clean[[row], turn]
                t = nft.times(trajectories, chunk, config.draws, spread=config.times, shared=False)
                seeds = turn_seeds(trajectories.seeds[[row]], turn) + draw * nft._SPREAD
                noise = seeded_noise(seeds, clean.shape[1:], nft._NOISE)
                x = (1 - t) * clean + t * noise
                velocity = trajectories.velocity(trainer.editor, x, 1000 * t, chunk.rows, turn).double()
                with torch.no_grad(), trainer.adapters.old():
                    old = trajectories.velocity(trainer.editor, x, 1000 * t, chunk.rows, turn).double()
                with torch.no_grad(), trainer.adapters.reference():
                    reference = trajectories.velocity(trainer.editor, x, 1000 * t, chunk.rows, turn).double()
                r = (batch.advantages[row, turn].clamp(-5, 5) / 10 + 0.5).double()
                beta = config.beta
                errors = []
                for v in (beta * velocity + (1 - beta) * old, (1 + beta) * old - beta * velocity):
                    estimate = x.double() - t * v
                    weight = (estimate - clean).abs().mean().detach().clamp_min(1e-5)
                    errors.append(((estimate - clean) ** 2 / weight).mean())
                policy = 5 / beta * (r * errors[0] + (1 - r) * errors[1])
                total = total + (policy + config.kl_weight * ((velocity - reference) ** 2).mean()) / samples
    return torch.autograd.grad(total, trainer.update.parameters)


@pytest.mark.parametrize("options", [(), ("objective.beta=0.5", "objective.times=uniform", "optimizer.forward_rows=3")])
def test_gradient_is_that_of_the_three_forward_loop(tmp_path, options):
    trainer = trained(
        tmp_path, "objective.name=nft", "objective.kl_weight=0.1", "rollout.turns=1", *options, old_decay=0.4
    )
    batch = batch_of(trainer)
    got, _ = gradients(trainer, batch)
    assert close(got, three_forward_loop(trainer, batch), 1e-3)


def test_no_row_of_old_or_reference_has_a_graph_and_skipped_passes_do_not_run(tmp_path):
    both = trained(
        tmp_path, "objective.name=nft", "objective.kl_weight=1e-4", "optimizer.forward_rows=4", old_decay=0.4
    )
    batch = batch_of(both)
    samples = 5 * 2 * 2  # kept rows × turns × draws
    _, rows = gradients(both, batch)
    assert sum(count for count, grad in rows if grad) == samples
    assert sum(count for count, grad in rows if not grad) == 2 * samples  # old and reference, in one forward
    assert len(rows) == 2 * sum(1 for _, grad in rows if grad)
    both.adapters.update_old(0.0)
    _, rows = gradients(both, batch)
    assert sum(count for count, grad in rows if not grad) == samples  # the reference alone
    neither = trained(tmp_path / "neither", "objective.name=nft", "optimizer.forward_rows=4")
    neither.adapters.update_old(0.0)
    _, rows = gradients(neither, batch_of(neither))
    assert sum(count for count, _ in rows) == samples


def test_activations_saved_do_not_grow_with_old_and_reference(tmp_path):
    trainer = trained(tmp_path, "objective.name=nft", "objective.kl_weight=1e-4", old_decay=0.4)
    batch = batch_of(trainer)
    chunk = chunk_of([0, 1, 2], 0, [0, 1, 0])

    def loss():
        return trainer.objective.loss(batch, chunk, UpdateStats())

    everything = graph_bytes(loss)
    trainer.adapters.update_old(0.0)
    trainer.config.objective.kl_weight = 0.0
    alone = graph_bytes(loss)
    inputs_of_the_loss = 4 * 3 * 16 * 64 * 4  # fp32 velocities of three rows
    assert everything - alone <= inputs_of_the_loss


@pytest.mark.parametrize("name", ["nft", "grpo", "crd"])
def test_the_cut_into_forwards_does_not_change_the_gradient(tmp_path, name):
    """Sums in another order: within 1e-4 of the largest element of each tensor."""
    results = []
    for rows in (4, 64):
        trainer = trained(tmp_path / str(rows), f"objective.name={name}", f"optimizer.forward_rows={rows}")
        results.append(gradients(trainer, batch_of(trainer))[0])
    assert close(*results, 1e-4)


def test_cost_falls_with_what_compaction_drops(tmp_path):
    for name, per_row in (("grpo", 2 * 2), ("nft", 2 * 2)):  # turns × stored steps, turns × draws
        for keep in (KEEP, torch.arange(8, device=GPU) < 2):
            folder = tmp_path / f"{name}{int(keep.sum())}"
            trainer = trained(folder, f"objective.name={name}", "optimizer.forward_rows=4")
            trainer.adapters.update_old(0.0) if name == "nft" else None
            _, rows = gradients(trainer, batch_of(trainer, keep))
            assert sum(count for count, _ in rows) == int(keep.sum()) * per_row


def test_compact_grpo_has_the_exact_gradient_and_reports_the_drift(tmp_path):
    exact = trained(tmp_path / "exact")
    compact = trained(tmp_path / "compact", "optimizer.forward_rows=5")
    assert close(gradients(compact, batch_of(compact))[0], gradients(exact, batch_of(exact))[0], 1e-4)


@pytest.mark.parametrize("forward_rows", ["null", "4"])
def test_blocks_that_run_again_in_a_backward_choose_attention_as_in_the_forward(tmp_path, forward_rows):
    """cuDNN's is left out of an exact replay, where other saved tensors than the forward's would be an error."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    trainer = trained(tmp_path, f"optimizer.forward_rows={forward_rows}", "model.activation_checkpointing=true")
    batch, seen = batch_of(trainer), {"sampling": [], "update": []}
    block, phase = trainer.model.transformer_blocks[0], "update"
    block.register_forward_pre_hook(lambda *_: seen[phase].append(torch.backends.cuda.cudnn_sdp_enabled()))
    _, rows = gradients(trainer, batch)
    phase = "sampling"
    batch_of(trainer)
    exact = forward_rows == "null"
    assert len(seen["update"]) == 2 * len(rows)  # once more in each backward
    assert set(seen["update"]) == set(seen["sampling"]) == {before and not exact}
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_second_step_of_compact_grpo_is_off_policy(tmp_path):
    trainer = tiny_trainer(
        tmp_path,
        "optimizer.forward_rows=6",
        "optimizer.updates_per_iteration=2",
        "optimizer.lr=0.01",
        "run.iterations=1",
    )
    (metrics,) = trainer.fit()
    assert metrics["update/steps"] == 2
    assert metrics["ratio/max_error_first_update"] == 0.0
    assert metrics["ratio/max_error"] > 0
    assert 0 <= metrics["log_prob/max_drift_first_update"] < 1e-5


def test_crd_takes_whole_groups(tmp_path):
    trainer = trained(tmp_path, "objective.name=crd", "optimizer.forward_rows=4")
    batch = batch_of(trainer)
    (share,) = trainer.objective.shares(batch, 1)
    assert [sorted(batch.trajectories.group[chunk.rows].tolist()) for chunk in share[:2]] == [[0, 0, 0], [1, 1]]
    for chunk in share:
        t = nft.times(batch.trajectories, chunk, 2, spread="schedule", shared=True)
        assert t.unique().numel() == 1  # members are compared at one noise level
    trainer.objective.forward_rows = 2
    with pytest.raises(
        ValueError, match=r"optimizer.forward_rows: objective crd .* at least the group's 3 rows, got 2"
    ):
        trainer.objective.shares(batch, 1)


@pytest.mark.parametrize("spread", ["schedule", "uniform"])
def test_noise_levels_are_spread_and_reproducible(tmp_path, spread):
    trainer = trained(tmp_path, "objective.name=nft", f"objective.times={spread}", "rollout.group_size=8")
    trajectories = trainer.sample(trainer.chains.batch(0, 2), iteration=0)[0]
    rows = torch.arange(16, device=GPU).repeat_interleave(2)
    chunk = Chunk(rows, 1, torch.tensor([0, 1] * 16, device=GPU))
    t = nft.times(trajectories, chunk, 2, spread=spread, shared=False).view(16, 2)
    again = nft.times(trajectories, Chunk(rows[6:8], 1, chunk.index[6:8]), 2, spread=spread, shared=False)
    assert torch.equal(again, t[3])
    if spread == "schedule":
        assert set(t.flatten().tolist()) == set(trajectories.sigmas[:-1].tolist())
        assert (t[:, 0] != t[:, 1]).all()
    else:
        assert ((t[:, 0] < 0.5) & (t[:, 1] > 0.5)).all()
        assert t[:, 0].std() > 0.05


def test_nan_gradient_is_skipped_counted_and_given_up(tmp_path):
    trainer = tiny_trainer(
        tmp_path, "objective.name=nft", "optimizer.max_skipped=2", "optimizer.updates_per_iteration=2"
    )
    before = {name: value.clone() for name, value in trainer.adapter().items()}
    batch = batch_of(trainer)
    batch.trajectories.clean[0, 0, 0, 0] = float("nan")  # group 0, which the first of the two steps learns from
    metrics = trainer.update(batch).metrics()
    assert metrics["update/skipped"] == 1
    assert metrics["update/steps"] == 1
    assert all(value.isfinite().all() for value in trainer.adapter().values())
    assert any(not torch.equal(before[name], value) for name, value in trainer.adapter().items())
    batch.trajectories.clean[:] = float("nan")
    kept = {name: value.clone() for name, value in trainer.adapter().items()}
    with pytest.raises(FloatingPointError, match=r"gradient: not finite in 2 optimizer steps in a row .*max_skipped"):
        trainer.update(batch)
    assert all(torch.equal(kept[name], value) for name, value in trainer.adapter().items())


@pytest.mark.parametrize("name", ["grpo", "nft", "crd"])
def test_a_batch_without_kept_rows_takes_no_step(tmp_path, name):
    trainer = tiny_trainer(tmp_path, f"objective.name={name}", "optimizer.forward_rows=4")
    before = {name: value.clone() for name, value in trainer.adapter().items()}
    got, rows = gradients(trainer, batch_of(trainer, torch.zeros(8, dtype=torch.bool, device=GPU)))
    assert (got, rows) == ([], [])
    assert all(torch.equal(before[name], value) for name, value in trainer.adapter().items())


def test_memory_budget_sets_the_rows(tmp_path):
    trainer = trained(tmp_path, "optimizer.memory_gib=0.03")
    batch = batch_of(trainer)
    rows = trainer.objective.forward_rows
    chunk = chunk_of([0] * rows, 0, [0] * rows)
    used = graph_bytes(lambda: trainer.objective.loss(batch, chunk, UpdateStats()))
    assert rows > 1
    assert used <= 0.03 * 2**30 < used * (rows + 2) / rows
    assert rows_within(1e-9, trainer.objective, batch) == 1


def test_reward_in_loss_follows_the_advantage_mode(tmp_path):
    trainer = trained(tmp_path, "objective.name=nft", "objective.advantage_mode=binary", "objective.advantage_clip=2.0")
    batch = batch_of(trainer)
    stats = trainer.update(batch)
    expected = advantage_to_reward(batch.advantages, mode="binary", clip=2.0).mean()
    assert stats.metrics()["reward_in_loss"] == pytest.approx(expected.item(), abs=1e-6)


def test_dense_credit_gives_each_step_its_own_advantage(tmp_path):
    trainer = tiny_trainer(tmp_path, "advantage.credit=dense_ode", "run.iterations=1")
    trajectories, rewards = trainer.sample(trainer.chains.batch(0, 2), iteration=0)
    assert rewards["brightness"].shape == (8, 2, 3)
    # the reward at a state is that of the image its clean estimate decodes to
    image = trainer.editor.decode(trajectories.estimates[:4, 1, 2], 64, 64)
    assert torch.allclose(rewards["brightness"][:4, 1, 2], ((image * 255).round() / 255).mean((1, 2, 3)), atol=1e-6)
    result = trainer.advantages(trajectories, rewards, trainer.chains.batch(0, 2))
    assert result.advantages.shape == (8, 2, 2)
    batch = trainer.learning_batch(trajectories, result)
    chunk = chunk_of([3, 5], 1, [1, 0])
    expected = torch.stack([result.advantages[3, 1, 1], result.advantages[5, 1, 0]])
    assert torch.equal(batch.advantage(chunk).cpu(), expected)
