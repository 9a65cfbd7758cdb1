"""A plan against the formulas of the transformers, against torch's count of a real iteration, and against its own
parts."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from op_backends import GPU
from test_cli import run
from tiny_train import tiny_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import mtedit_fast.training.config as module
from mtedit_fast.training import plan as planner
from mtedit_fast.training.config_file import load_config
from mtedit_fast.training.data import EditChains
from mtedit_fast.training.memory import estimate
from mtedit_fast.training.playground.data import write_dataset
from mtedit_fast.training.probe import Probe, probe
from mtedit_fast.training.run import load_editor
from mtedit_fast.training.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import flops

CONFIGS = Path(module.__file__).parent / "configs"
RATES = planner.Rates(encode=4e9, denoise=2e9, decode=1e9, update=1e9, reward=0.0, beside=None, source="a test")


@pytest.fixture
def config(tmp_path):
    return tiny_config(tmp_path, ["rollout.groups_per_iteration=4"])


def test_a_forward_is_the_formula():
    """Of the full size, whose fields are public: text 512, 32 × 32 positions and as many of the reference."""
    work = planner.count(load_config(CONFIGS / "kontext_8gpu.yaml"))
    public = planner.describe("black-forest-labs/FLUX.1-Kontext-dev")
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        sizes = FluxTransformer2DModel.from_config(public.transformer).config
    assert work.forward == pytest.approx(flops.flux(sizes, flops.Sequence(1, 512, 1024, 1024)), rel=0.01)


@pytest.mark.parametrize("overrides", [[], ["objective.name=nft", "objective.kl_weight=1e-4", "objective.draws=2"]])
def test_an_iteration_is_what_torch_counts(tmp_path, overrides):
    """On the playground's editor, with real tensors, text encoders included."""
    write_dataset(tmp_path / "data", 2, turns=2)
    settings = ["advantage.filter=none", "rewards.0.path=tiny_train:brightness", *overrides]
    settings += ["data.resolution=64", "rollout.guidance_scale=1.0", "rollout.max_sequence_length=12"]
    settings += ["rollout.cuda_graphs=false"]  # whose captures call it more often
    config = tiny_config(tmp_path, settings)
    trainer = Trainer(load_editor(config, GPU), EditChains(config.data.path, turns=2, resolution=64), config)
    names = trainer.chains.draw(0, 2)
    records = [trainer.chains[name] for name in names]
    # The counter does not know the CPU's fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as sampled:
        trajectories, rewards = trainer.sample(records, iteration=0)
    result = trainer.advantages(trajectories, rewards, records)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as learned:
        trainer.update(trainer.learning_batch(trajectories, result))
    work = planner.count(config)
    assert work.phases["rollout"] == pytest.approx(sampled.get_total_flops(), rel=0.02)
    assert work.phases["update"] == pytest.approx(learned.get_total_flops(), rel=0.02)


def test_work_follows_the_configuration(config, tmp_path):
    whole = planner.count(config)
    half, last = planner.count(config, 2), planner.count(config, 3)
    assert half.phases == {phase: value / 2 for phase, value in whole.phases.items()}
    assert last.phases == half.phases  # the busiest has two of the four groups
    assert planner.count(config, kept=0.25).phases["update"] == whole.phases["update"] / 4
    longer = planner.count(tiny_config(tmp_path, ["rollout.groups_per_iteration=4", "rollout.num_steps=6"]))
    assert longer.rollout["denoise"] == 2 * whole.rollout["denoise"]
    assert longer.update["with gradient"] == 2.5 * whole.update["with gradient"]  # 5 stored steps, and 2
    window = ["rollout.groups_per_iteration=4", "rollout.window={size: 1, lo: 0, hi: 2}"]
    assert planner.count(tiny_config(tmp_path, window)).phases["update"] == whole.phases["update"] / 2
    checkpointed = ["rollout.groups_per_iteration=4", "model.activation_checkpointing=true"]
    again = planner.count(tiny_config(tmp_path, checkpointed)).phases["update"]
    assert 1.2 * whole.phases["update"] < again < 1.6 * whole.phases["update"]
    chain = planner.count(tiny_config(tmp_path, ["rollout.groups_per_iteration=4", "rollout.latent_chain=true"]))
    assert chain.rollout["encode"] < whole.rollout["encode"] / 3


def test_times_are_work_over_rates(config):
    result = planner.plan(config, 2, RATES)
    work = planner.count(config, 2)
    assert result.seconds["rollout"] == pytest.approx(
        work.rollout["encode"] / 4e9 + work.rollout["denoise"] / 2e9 + work.rollout["decode"] / 1e9
    )
    assert result.seconds["reward"] == 0
    assert result.seconds["update"] == work.phases["update"] / 1e9
    assert result.gpu_hours == pytest.approx(sum(result.seconds.values()) * config.run.iterations * 2 / 3600)
    assert result.memory.total == estimate(config, 2).total
    assert result.fits
    assert not planner.plan(config, 2, RATES, gpu=planner.Gpu("none", 1, None, 10)).fits


def test_rewards_are_waited_for_where_they_are_slower(config):
    rollout, images = planner.plan(config, 1, RATES).seconds["rollout"], 4 * 2

    def seconds(reward, beside):
        held_up = None if beside is None else beside * rollout / images
        rates = replace(RATES, reward=reward * rollout / images, beside=held_up)
        return planner.plan(config, 1, rates).seconds

    quick, slow, same, after = seconds(0.1, 0.0), seconds(1.0, 0.25), seconds(0.1, 0.1), seconds(0.1, None)
    assert quick["reward"] == pytest.approx(0.1 * rollout)  # the last group's
    assert quick["rollout"] == pytest.approx(rollout)
    assert slow["reward"] == pytest.approx((1 + 3 * (1 - 0.25 - 0.25)) * rollout)
    assert slow["rollout"] == pytest.approx(1.75 * rollout)
    assert same["rollout"] + same["reward"] == pytest.approx(1.4 * rollout)  # nothing is hidden
    assert after == same | {"rollout": pytest.approx(rollout), "reward": pytest.approx(0.4 * rollout)}


def test_assumed_rates(config, tmp_path):
    h100, a100 = planner.GPUS["h100"], planner.GPUS["a100"]
    rates = planner.assumed_rates(config, h100, utilisation=0.5, reward_seconds=0.25)
    assert {rates.encode, rates.denoise, rates.decode, rates.update} == {989e12 / 2}
    assert rates.reward == rates.beside == 0.25
    eight = config.model_copy(update={"rollout": config.rollout.model_copy(update={"precision": "fp8"})})
    assert planner.assumed_rates(eight, h100).denoise == 0.4 * 1979e12
    assert planner.assumed_rates(eight, h100).decode == 0.4 * 989e12
    with pytest.raises(ValueError, match=r"rollout.precision: A100 80 GB has no fp8"):
        planner.assumed_rates(eight, a100)
    for bad in ({"utilisation": 0.0}, {"utilisation": 1.5}, {"reward_seconds": -1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            planner.assumed_rates(config, h100, **bad)


def test_a_probe_predicts_itself(tmp_path):
    write_dataset(tmp_path / "data", 2, turns=1)
    small = ["rollout.turns=1", "rollout.max_sequence_length=12", "data.resolution=64", "rollout.guidance_scale=1.0"]
    config = tiny_config(tmp_path, small)
    rates = probe(config, repetitions=1)
    assert min(rates.encode, rates.denoise, rates.decode, rates.update) > 1e6
    assert rates.reward > 0
    assert (rates.beside is not None) == torch.cuda.is_available()  # where rewards are scored meanwhile
    one = planner.plan(config.model_copy(update={"rollout": config.rollout.model_copy(
        update={"groups_per_iteration": 1})}), 1, rates)  # fmt: skip
    assert one.seconds["reward"] == pytest.approx(rates.reward * 4)
    assert planner.plan(config, 1, rates).seconds["update"] == pytest.approx(2 * one.seconds["update"])
    assert not (tmp_path / "run").exists()
    once = Probe(config)
    once.round()
    with pytest.raises(ValueError, match="rounds: expected at least 2, the first to warm up; got 1"):
        once.rates()


@pytest.mark.parametrize("text", ["8xV100", "x", "0xH100", "-1xH100", "", "8"])
def test_unknown_gpus(text):
    with pytest.raises(ValueError, match="gpus: expected a number and one of A100, H100, H200, B200"):
        planner.parse_gpus(text)
    assert planner.parse_gpus("8xH100") == (8, planner.GPUS["h100"])
    assert planner.parse_gpus("a100") == (1, planner.GPUS["a100"])


@pytest.mark.parametrize(("arguments", "message"), [({"kept": 0.0}, "kept"), ({"gpus": 0}, "gpus")])
def test_bad_plans(config, arguments, message):
    with pytest.raises(ValueError, match=message):
        planner.plan(config, **({"gpus": 1, "rates": RATES} | arguments))


def test_the_command(monkeypatch, capsys):
    path = CONFIGS / "flux2_klein_8gpu.yaml"
    assert run(monkeypatch, "plan", path, "--gpus", "8xH200", "--kept", 0.5, "run.iterations=10") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "8 × H200 SXM, 40% of its data sheet's rate assumed, rewards left out" in out
    assert "prediction" in out
    assert "10 iterations" in out
    assert run(monkeypatch, "plan", "flux2_klein_8gpu", "--gpus", "8xH200", "--kept", 0.5, "run.iterations=10") == 0
    assert " ".join(capsys.readouterr().out.split()) == out
    assert run(monkeypatch, "plan", path, "--gpus", "8xV100") == 2
    assert "gpus: expected" in capsys.readouterr().err


@pytest.mark.parametrize(("editor", "gpus"), [("kontext", "8xH100"), ("qwen", "20xB200"), ("klein", "A100")])
def test_the_command_by_editor(monkeypatch, capsys, editor, gpus):
    options = ("--gpus", gpus, "--reward-seconds", 0.1, "--utilisation", 0.5, "rollout.group_size=8")
    assert run(monkeypatch, "plan", "--editor", editor, *options) == 0
    out = capsys.readouterr().out
    number, gpu = planner.parse_gpus(gpus)
    counts = {8: 8, 20: 16, 1: 1}
    path = CONFIGS / f"{planner.EDITORS[editor]}_{counts[number]}gpu.yaml"
    config = load_config(path, ["rollout.group_size=8"])
    rates = planner.assumed_rates(config, gpu, utilisation=0.5, reward_seconds=0.1)
    assert f"{planner.plan(config, number, rates).iteration:,.1f} s" in out


def test_the_command_says_what_it_lacks(monkeypatch, capsys):
    assert run(monkeypatch, "plan", "--gpus", "8xH100") == 2
    assert "config: expected a YAML file, or --editor; got neither" in " ".join(capsys.readouterr().err.split())
    assert run(monkeypatch, "plan", "--editor", "sdxl", "--gpus", "8xH100") == 2
    assert "editor: expected one of kontext, qwen, klein" in " ".join(capsys.readouterr().err.split())
    assert run(monkeypatch, "plan", CONFIGS / "demo.yaml", "--editor", "klein", "--gpus", "8xH100") == 2
    assert "expected key=value" in " ".join(capsys.readouterr().err.split())
