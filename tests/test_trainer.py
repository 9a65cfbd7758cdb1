"""The training loop: exact ratios, resume after SIGKILL, replay modes, objectives, controls, evaluation."""

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from op_backends import GPU
from tiny import needs_fp8, tiny_editor
from tiny_train import tiny_trainer

from mtedit_fast.training.advantages import AdvantageResult
from mtedit_fast.training.update import UpdateStats


def adapter(trainer):
    return {name: value.clone() for name, value in trainer.adapter().items()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_first_update_has_ratio_exactly_one(tmp_path):
    trainer = tiny_trainer(tmp_path, "run.iterations=2", "optimizer.updates_per_iteration=2", "optimizer.lr=0.01")
    start = adapter(trainer)
    history = list(trainer.fit())
    assert [line["ratio/max_error_first_update"] for line in history] == [0.0, 0.0]
    assert [line["log_prob/max_drift_first_update"] for line in history] == [0.0, 0.0]
    # the second optimizer step of an iteration is off-policy: were the ratio taken against itself it would be 1
    assert all(line["ratio/max_error"] > 0 for line in history)
    assert not equal(start, adapter(trainer))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines == history
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))


def test_killed_at_any_point_and_resumed_is_bit_identical(tmp_path):
    """SIGKILL after the first iteration, then while the second run is somewhere inside an iteration."""
    whole = tiny_trainer(tmp_path / "whole")
    torch.set_num_threads(1)
    list(whole.fit())
    command = [sys.executable, str(Path(__file__).with_name("tiny_train.py")), str(tmp_path / "killed")]
    for wait in (1, 2):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for _ in range(wait):
            assert process.stdout.readline().startswith("iteration")
        process.send_signal(signal.SIGKILL)
        process.wait()
    resumed = tiny_trainer(tmp_path / "killed")
    assert resumed.resume()
    assert 0 < resumed.iteration < 4
    list(resumed.fit())
    assert equal(adapter(whole), adapter(resumed))
    assert all(torch.equal(a, b) for a, b in zip(whole.adapters.averages, resumed.adapters.averages, strict=True))
    for name in ("exp_avg", "exp_avg_sq", "step"):
        states = [trainer.optimizer.state_dict()["state"] for trainer in (whole, resumed)]
        assert all(torch.equal(states[0][index][name], states[1][index][name]) for index in states[0])
    metrics = [json.loads(line) for line in (tmp_path / "killed/run/metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in metrics] == [0, 1, 2, 3]


def test_linear_schedule_falls_to_zero_and_survives_a_resume(tmp_path):
    options = ("optimizer.lr=0.02", "optimizer.lr_schedule=linear")
    first = tiny_trainer(tmp_path, *options)
    rates = []
    for metrics in first.fit():
        rates.append(metrics["learning_rate"])
        if len(rates) == 2:
            break
    first.save()
    rates += [metrics["learning_rate"] for metrics in tiny_trainer(tmp_path, *options).fit()]
    assert rates == pytest.approx([0.02, 0.015, 0.01, 0.005])
    (constant,) = tiny_trainer(tmp_path / "constant", "optimizer.lr=0.02", "run.iterations=1").fit()
    assert constant["learning_rate"] == 0.02


def test_several_steps_per_forward_report_the_drift(tmp_path):
    trainer = tiny_trainer(tmp_path, "optimizer.forward_rows=8", "run.iterations=1")
    (metrics,) = trainer.fit()
    assert metrics["ratio/max_error_first_update"] == 0.0  # old log-probs come from the same path
    assert 0 <= metrics["log_prob/max_drift_first_update"] < 1e-5  # against those stored at rollout
    exact = tiny_trainer(tmp_path / "exact", "run.iterations=1")
    list(exact.fit())
    for name, value in exact.adapter().items():  # one Adam step: the sign of the gradient, nearly everywhere
        assert (trainer.adapter()[name] - value).abs().mean() < 0.1 * 3e-4


def test_gradient_is_the_policy_gradient_of_the_whole_batch(tmp_path):
    """Accumulated over micro-batches, turns and steps, against autograd of the plain formula on everything."""
    trainer = tiny_trainer(tmp_path, "optimizer.max_grad_norm=1e9", "model.lora.rank=2")
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    trajectories = trainer.sample(trainer.chains.batch(0, 2), iteration=0)[0]
    advantage = torch.randn(8, 2, generator=torch.Generator().manual_seed(1)).to(GPU)
    keep = torch.tensor([1, 1, 0, 1, 1, 0, 0, 1], dtype=torch.bool, device=GPU)
    collected = []
    trainer.optimizer.step = lambda: collected.extend(p.grad.clone() for p in trainer.update.parameters)
    trainer.update(trainer.learning_batch(trajectories, AdvantageResult(advantage, keep, {})))

    total = torch.zeros((), device=GPU)
    for turn in range(2):
        for position in range(2):
            step = trajectories.steps[position]
            sigma, after = trajectories.sigmas[step].double(), trajectories.sigmas[step + 1].double()
            top = trajectories.sigmas[1].double()
            s2 = 0.7**2 * sigma / (1 - (top if sigma == 1 else sigma))
            x = trajectories.latents[:, turn, position]
            condition = trainer.editor.condition(
                trajectories.references[:, turn],
                trajectories.text_rows(slice(0, 8), turn),
                height=64,
                width=64,
                guidance_scale=trajectories.config.guidance_scale,
            )
            velocity = trainer.editor.velocity(x, trajectories.timesteps[step], condition).double()
            dt = after - sigma
            mean = x.double() * (1 + s2 * dt / (2 * sigma)) + velocity * (1 + s2 * (1 - sigma) / (2 * sigma)) * dt
            density = torch.distributions.Normal(mean, (s2 * -dt) ** 0.5)
            log_prob = density.log_prob(trajectories.latents[:, turn, position + 1].double()).flatten(1).mean(1)
            total = total - (advantage[:, turn].clamp(-5, 5) * log_prob)[keep].sum() / (keep.sum() * 4)
    expected = torch.autograd.grad(total, trainer.update.parameters)
    for got, want in zip(collected, expected, strict=True):
        assert (got - want).abs().max() <= 1e-4 * want.abs().max() + 1e-7


def test_kl_pulls_back_and_guard_runs(tmp_path):
    trainer = tiny_trainer(
        tmp_path,
        "objective.name=grpo_guard",
        "objective.clip_range=1e-5",
        "objective.kl_weight=0.1",
        "objective.kl_form=exact",
        "run.iterations=2",
    )
    history = list(trainer.fit())
    assert [line["ratio/max_error_first_update"] for line in history] == [0.0, 0.0]
    # with advantages zero only the KL acts, and it is zero at the reference
    trajectories = trainer.sample(trainer.chains.batch(0, 2), iteration=0)[0]
    zero = AdvantageResult(torch.zeros(8, 2), torch.ones(8, dtype=torch.bool), {})
    collected = []
    trainer.optimizer.step = lambda: collected.append(sum(p.grad.abs().sum() for p in trainer.update.parameters))
    trainer.update(trainer.learning_batch(trajectories, zero))
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    trainer.update(trainer.learning_batch(trainer.sample(trainer.chains.batch(0, 2), iteration=0)[0], zero))
    assert collected[0] > 0
    assert collected[1] == 0


def test_guard_in_compact_forwards_takes_old_means_by_the_same_path(tmp_path):
    """So that its ratio is 1 before the first step whatever the batch; for the second the old means are a forward's."""
    trainer = tiny_trainer(
        tmp_path,
        "objective.name=grpo_guard",
        "optimizer.forward_rows=3",
        "optimizer.updates_per_iteration=2",
        "optimizer.lr=0.01",
        "run.iterations=1",
    )
    assert trainer.sample(trainer.chains.batch(0, 2), iteration=0)[0].means is None
    (metrics,) = trainer.fit()
    assert metrics["update/steps"] == 2
    assert metrics["ratio/max_error_first_update"] == 0.0
    assert metrics["ratio/max_error"] > 0


def test_shuffle_control_changes_the_update_but_not_the_rewards(tmp_path):
    runs = [tiny_trainer(tmp_path / c, f"run.control={c}", "run.iterations=1") for c in ("none", "shuffle")]
    (plain,), (shuffled,) = (list(run.fit()) for run in runs)
    assert plain["reward/brightness"] == shuffled["reward/brightness"]
    assert not equal(adapter(runs[0]), adapter(runs[1]))


def test_evaluation_is_paired_and_reference_is_the_adapter_off(tmp_path):
    trainer = tiny_trainer(tmp_path, "optimizer.lr=0.05", "run.iterations=2", "evaluation.every=1")
    fresh = trainer.evaluate()
    history = list(trainer.fit())
    assert "eval/brightness" in history[0]
    assert torch.equal(trainer.evaluate(reference=True).images, fresh.images)
    assert not torch.equal(trainer.evaluate().images, fresh.images)
    assert torch.equal(trainer.evaluate(reference=True).images, fresh.images)


def test_an_evaluation_keeps_nothing_of_what_dense_credit_needs(tmp_path):
    (metrics,) = tiny_trainer(tmp_path, "advantage.credit=dense_ode", "run.iterations=1", "evaluation.every=1").fit()
    assert metrics["ratio/max_error_first_update"] == 0
    assert "eval/brightness" in metrics


def test_filtered_out_batches_cost_nothing_and_change_nothing(tmp_path):
    trainer = tiny_trainer(tmp_path)
    trajectories = trainer.sample(trainer.chains.batch(0, 2), iteration=0)[0]
    before = adapter(trainer)
    calls = []
    trainer.model.register_forward_hook(lambda *_: calls.append(1))
    nothing = AdvantageResult(torch.zeros(8, 2), torch.zeros(8, dtype=torch.bool), {})
    stats = trainer.update(trainer.learning_batch(trajectories, nothing))
    assert stats.metrics() == {"update/skipped": 0.0, "update/steps": 0.0}
    assert not calls
    assert equal(before, adapter(trainer))


def test_checkpoint_from_another_model_is_refused(tmp_path):
    list(tiny_trainer(tmp_path, "run.iterations=1").fit())
    other = tiny_trainer(tmp_path, "model.lora.rank=3")
    with pytest.raises(ValueError, match=r"rank 2.*rank 3|rank 3.*rank 2"):
        other.resume()


def test_nan_in_the_model_stops_before_the_update(tmp_path):
    trainer = tiny_trainer(tmp_path, "run.iterations=2")
    next(iter(trainer.fit()))
    before = adapter(trainer)
    trainer.model.proj_out.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="velocity: expected finite"):
        trainer.step()
    assert equal(before, adapter(trainer))


def test_lora_export_loads_in_the_stock_pipeline(tmp_path):
    trainer = tiny_trainer(tmp_path, "run.iterations=1", "optimizer.lr=0.01")
    list(trainer.fit())
    path = trainer.export()
    stock = tiny_editor(device=GPU)
    stock.pipeline.load_lora_weights(path)
    record = trainer.chains[0]
    references, text = stock.encode_image(record.image[None].to(GPU)), stock.encode_text(record.instructions[:1])
    latents, timestep = torch.randn(1, 16, 64).to(GPU), torch.tensor(700.0, device=GPU)

    def velocity(editor):
        condition = editor.condition(references, text, height=64, width=64, guidance_scale=1.0)
        return editor.velocity(latents, timestep, condition)

    with torch.no_grad():
        exported = velocity(stock)
        assert not torch.equal(exported, velocity(trainer.editor))
        with trainer.adapters.averaged():
            assert torch.equal(exported, velocity(trainer.editor))


def test_average_is_the_exponential_mean_of_the_iterates(tmp_path):
    trainer = tiny_trainer(tmp_path, "optimizer.ema_decay=0.3", "run.iterations=4")
    expected = [p.detach().double() for p in trainer.update.parameters]
    for metrics in trainer.fit():
        decay = min(0.3, (1 + metrics["iteration"]) / (10 + metrics["iteration"]))
        iterates = [p.detach().double() for p in trainer.update.parameters]
        expected = [decay * mean + (1 - decay) * p for mean, p in zip(expected, iterates, strict=True)]
    for mean, want in zip(trainer.adapters.averages, expected, strict=True):
        assert (mean - want).abs().max() <= 1e-6 * want.abs().max() + 1e-9
    assert any(not torch.equal(a, p) for a, p in zip(trainer.adapters.averages, trainer.update.parameters, strict=True))
    plain = tiny_trainer(tmp_path / "plain", "optimizer.ema_decay=0", "run.iterations=2")
    list(plain.fit())
    assert all(torch.equal(a, p) for a, p in zip(plain.adapters.averages, plain.update.parameters, strict=True))


@needs_fp8
@pytest.mark.parametrize("objective", ["grpo", "nft"])
def test_rollouts_in_fp8_are_learned_from_in_the_models_own_precision(tmp_path, objective):
    common = ("optimizer.forward_rows=4", "run.iterations=2", f"objective.name={objective}")
    plain = next(iter(tiny_trainer(tmp_path, *common, "run.output_dir=" + str(tmp_path / "plain")).fit()))
    capped = ("objective.importance_cap=1.0001",) if objective == "grpo" else ()
    trainer = tiny_trainer(tmp_path, *common, *capped, "rollout.precision=fp8")
    metrics = list(trainer.fit())
    assert trainer.fp8.layers > 0
    assert not trainer.fp8.on
    assert metrics[0]["loss"] != plain["loss"]
    if objective == "nft":
        return
    for each in metrics:
        drift = each["log_prob/max_drift_first_update"]
        assert drift > plain["log_prob/max_drift_first_update"]
        assert each["ratio/max_error_first_update"] == 0  # between policies alone, both in the trained precision
        assert math.exp(-drift) <= each["importance/mean"] <= 1.0001
        assert each["importance/max_weight"] <= 1.0001 * (1 + 1e-6)


def test_importance_weights_multiply_the_loss(tmp_path):
    """p trained / p sampled from the stored log-probs, moved by hand; truncated at the cap."""
    trainer = tiny_trainer(tmp_path, "optimizer.forward_rows=16", "objective.importance_cap=1.5")
    records = [trainer.chains[0]]
    trajectories, rewards = trainer.sample(records, iteration=0)
    batch = trainer.learning_batch(trajectories, trainer.advantages(trajectories, rewards, records))
    chunk = trainer.objective.shares(batch, 1)[0][0]
    shift = torch.linspace(-0.3, 0.9, len(chunk.rows), device=GPU)

    def loss(move):
        stored = batch.trajectories.log_probs.clone()
        batch.trajectories.log_probs[chunk.rows, chunk.turn, chunk.index] -= move
        total = trainer.objective.loss(batch, chunk, UpdateStats())
        batch.trajectories.log_probs = stored
        return total.item()

    advantage = batch.advantage(chunk).clamp(-5, 5)
    assert loss(0 * shift) == pytest.approx(-advantage.sum().item(), abs=1e-4)
    expected = -(advantage * shift.exp().clamp(max=1.5)).sum().item()
    assert loss(shift) == pytest.approx(expected, rel=1e-4)
    assert abs(expected + advantage.sum().item()) > 1e-2


def test_whole_compilation_and_attention_of_the_configuration_reach_the_model(tmp_path):
    trainer = tiny_trainer(tmp_path, "model.compile=whole", "model.attention=native", "rollout.cuda_graphs=false")
    assert trainer.model._compiled_call_impl is not None
    assert trainer.sample.editor is trainer.editor
    with pytest.raises(ValueError, match="attention: flash3 cannot be used here"):
        tiny_trainer(tmp_path, "model.attention=flash3")
