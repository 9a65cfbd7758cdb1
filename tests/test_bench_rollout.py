"""The rollout bench: its peers compute what ours computes, its FLOPs are counted, and wrong results are refused."""

import csv
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import needs_fp8
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_rollout  # noqa: E402
import flops  # noqa: E402
import harness  # noqa: E402
import random_editors  # noqa: E402
import rollout_setup  # noqa: E402
from peers import rollout_loop  # noqa: E402
from peers.replay_loop import replay_loop  # noqa: E402
from random_editors import RECIPES, random_editor  # noqa: E402

from mtedit_fast.editors import KleinEditor, speed  # noqa: E402
from mtedit_fast.ops import sde_coefficients, sde_step, seeded_noise  # noqa: E402
from mtedit_fast.rollout import replay, rollout, turn_seeds  # noqa: E402
from mtedit_fast.training.memory import peak_bytes  # noqa: E402
from mtedit_fast.training.public_models import FAMILIES, PUBLIC  # noqa: E402

CPU = torch.device("cpu")
FAMILY_EDITORS = ["kontext", "qwen-2509", "qwen-2511", "klein-4b", "klein-kv-9b"]


def case(editor: str, **changes) -> rollout_setup.Case:
    """Three trajectories of two turns with three steps; the peer takes two repeats, then one."""
    side = RECIPES[editor].tiny_side
    return replace(rollout_setup.Case(editor, CPU, "fp32", True, side, side, 3, 2, 3, 3, 2), **changes)


def seeded(setup: rollout_setup.Setup) -> rollout_loop.Noise:
    return lambda rows, turn, draw, shape: seeded_noise(turn_seeds(setup.seeds[rows], turn), tuple(shape[1:]), draw)


def flattened(turns: list[list[rollout_loop.Turn]], field: str) -> torch.Tensor:
    """[B, K, ...]."""
    return torch.cat([torch.stack([getattr(turn, field) for turn in batch], dim=1) for batch in turns])


@pytest.mark.parametrize("editor", FAMILY_EDITORS)
def test_the_peer_samples_the_images_and_log_probs_of_ours(editor):
    setup = rollout_setup.Setup(case(editor))
    ours = setup.rollout()
    found = setup.loop(noise=seeded(setup), codec="PNG")(setup.references, setup.instructions)
    images = torch.stack(
        [
            torch.stack([rollout_loop.to_tensor(turn.images[row]) for turn in batch])
            for batch in found
            for row in range(len(batch[0].images))
        ]
    )
    assert (images - ours.images).abs().max() <= 1.01 / 255  # a level, where roundings meet its edge
    assert (images != ours.images).float().mean() < 1e-3
    latents, log_probs = flattened(found, "latents"), flattened(found, "log_probs")
    torch.testing.assert_close(latents[:, :, -1], ours.clean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(log_probs[:, :, :-1], ours.log_probs, rtol=1e-3, atol=1e-3)
    assert log_probs[:, :, -1].isnan().all()  # without noise
    assert setup.compared(ours)[0] < 1e-4
    assert (ours.images[0] - ours.images[1]).abs().max() > 0.1


def test_full_attention_samples_what_klein_does_on_the_same_weights():
    setup = rollout_setup.Setup(case("klein-kv-9b", turns=1))
    pipeline = setup.stock.pipeline
    stock = FAMILIES["flux2_klein"].pipeline(
        pipeline.scheduler, pipeline.vae, None, None, pipeline.transformer, is_distilled=True
    )

    class Klein(random_editors.RandomText, KleinEditor):
        family = "flux2_klein"

    klein = Klein(stock, max_sequence_length=random_editors.TINY_TEXT_TOKENS)
    ours = rollout(klein, setup.references, setup.instructions, setup.config, setup.seeds)
    loop = setup.loop(call=rollout_loop.full_attention, noise=seeded(setup))
    found = flattened(loop(setup.references, setup.instructions), "latents")
    torch.testing.assert_close(found[:, :, -1], ours.clean, rtol=1e-4, atol=1e-4)
    assert (found[:, :, -1] - setup.rollout().clean).abs().max() > 1e-3  # which sees less


@pytest.mark.parametrize("step", range(4))
def test_the_peers_step_is_ours_one_operation_at_a_time(step):
    sigmas, eta = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0]), 0.9 if step < 3 else 0.0
    generator = torch.Generator().manual_seed(step)
    x, v, noise = torch.randn(3, 2, 7, 5, generator=generator)
    table = sde_coefficients(sigmas, eta=eta)
    ours = sde_step(x, v, table, step, noise=noise)
    times = 1000 * sigmas[:-1]
    args = (sigmas, times, v, times[step].expand(2), x, eta)
    after, log_prob = rollout_loop.sde_step_with_logprob(*args, noise=noise)
    torch.testing.assert_close(after, ours.prev_sample, rtol=1e-5, atol=1e-5)
    if eta:
        torch.testing.assert_close(log_prob, ours.log_prob, rtol=1e-5, atol=1e-5)
        replayed = rollout_loop.sde_step_with_logprob(*args, prev_sample=after)[1]
        torch.testing.assert_close(replayed, log_prob, rtol=0, atol=1e-5)
    else:
        assert log_prob.isnan().all()
    unlike = rollout_loop.sde_step_with_logprob(*args)[0]
    assert torch.equal(unlike, after) == (eta == 0)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("editor", ["kontext", "klein-kv-9b"])
def test_the_peers_replay_drifts_where_it_rounds_and_ours_does_not(editor, dtype):
    setup = rollout_setup.Setup(case(editor, dtype=dtype))
    loop = setup.loop(noise=seeded(setup))
    images = [rollout_loop.to_pil(setup.references[0])] * 2
    found = loop.turn(images, "edit", slice(0, 2), 0)
    drift = (replay_loop(loop, images, "edit", found) - found.log_probs[:, :-1]).abs().max().item()
    assert drift == pytest.approx(0, abs=1e-6) if dtype == "fp32" else 1e-6 < drift < 1e-2
    ours = setup.rollout()
    assert setup.drift(ours) == 0
    ours.log_probs[1, 1, 0] += 1e-4
    assert setup.drift(ours) == pytest.approx(1e-4, rel=1e-2)


def test_images_travel_as_jpeg_unless_they_must_not_change():
    image = rollout_loop.to_pil(torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0)))
    same, lossy = (rollout_loop.to_tensor(rollout_loop.travelled(image, codec)) for codec in ("PNG", "JPEG"))
    assert torch.equal(same, rollout_loop.to_tensor(image))
    assert 0 < (lossy - same).abs().mean() < 0.3


@pytest.mark.parametrize("editor", FAMILY_EDITORS)
def test_flops_are_what_pytorch_counts(editor):
    setup = rollout_setup.Setup(case(editor, reference_size=RECIPES[editor].tiny_side // 2, micro_batch=2))
    stock = setup.stock
    # Without the VAE, which is not counted: other images and latents of the same shapes.
    stock.decode = lambda latents, height, width: torch.rand(len(latents), 3, height, width)
    stock.encode_image = lambda images: torch.randn(len(images), *stock.latent_shape(*images.shape[2:]))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        trajectories = setup.rollout()
    assert flops.rollout_flops(stock, trajectories) == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("keys", ["own", "extracted"])
def test_flops_of_both_klein_kv_peers_are_what_pytorch_counts(keys):
    setup = rollout_setup.Setup(case("klein-kv-9b"))
    loop = setup.loop(call=rollout_loop.full_attention if keys == "own" else rollout_loop.extracting)
    images = [rollout_loop.to_pil(setup.references[0])] * 2
    tokens, channels = setup.stock.latent_shape(*setup.references.shape[2:])
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        velocity = loop.call(loop.prepared(images, "edit"))
        with FlopCounterMode(display=False) as counter:
            velocity(torch.randn(2, tokens, channels), torch.tensor(1000.0))
    one = flops.Sequence(2, random_editors.TINY_TEXT_TOKENS, tokens, tokens, keys=keys)
    assert flops.flux2(setup.stock.config, one) == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize(
    ("model", "family", "formula", "text", "state", "keys", "tera"),
    [  # with a reference of the same size: 24d² per token (FLUX.2: 26d²) and 4d per pair of tokens in each block
        ("black-forest-labs/FLUX.1-Kontext-dev", "kontext", flops.flux, 512, 1024, "own", 37.7),
        ("black-forest-labs/FLUX.1-Kontext-dev", "kontext", flops.flux, 512, 4096, "own", 165.5),
        ("Qwen/Qwen-Image-Edit-2509", "qwen_image_edit", flops.qwen, 400, 4096, "own", 171.2),
        ("black-forest-labs/FLUX.2-klein-9B", "flux2_klein", flops.flux2, 512, 4096, "own", 161.2),
        ("black-forest-labs/FLUX.2-klein-9B", "flux2_klein", flops.flux2, 512, 4096, "cached", 85.3),
        ("black-forest-labs/FLUX.2-klein-4B", "flux2_klein", flops.flux2, 512, 4096, "own", 76.7),
    ],
)
def test_flops_of_public_sizes(model, family, formula, text, state, keys, tera):
    kind = FAMILIES[family].transformer
    with torch.device("meta"):
        config = kind.from_config(PUBLIC[model].transformer).config
    assert formula(config, flops.Sequence(1, text, state, state, keys=keys)) / 1e12 == pytest.approx(tera, rel=0.01)


@pytest.mark.parametrize("editor", RECIPES)
def test_random_editors_are_the_same_every_time_and_have_no_dead_outputs(editor):
    one, two = (random_editor(editor, CPU, torch.bfloat16, tiny=True) for _ in range(2))
    for a, b in zip(one.transformer.parameters(), two.transformer.parameters(), strict=True):
        assert a.dtype == torch.bfloat16
        assert not a.requires_grad
        assert torch.equal(a, b)
        assert a.any()
    text = [one.encode_text(prompts, torch.rand(2, 3, 32, 32)) for prompts in (["a", "b"], ["b", "a"])]
    assert (one.text_calls, one.text_prompts, two.text_calls) == (2, 4, 0)
    first = "prompt_embeds" if editor == "kontext" else "embeds"
    assert torch.equal(text[0][first], text[1][first].flip(0))
    assert not torch.equal(*text[0][first])
    assert text[0][first].shape[1] == random_editors.TINY_TEXT_TOKENS
    if editor.startswith("qwen"):
        assert text[0]["mask"].sum(1).tolist() == [8, 8]
        assert text[0]["negative_mask"].sum(1).tolist() == [4, 4]
        assert not text[0]["embeds"][:, 8:].any()


def test_full_sizes_are_those_of_the_checkpoints():
    sizes = {
        name: sum(p.numel() for p in random_editor(name, torch.device("meta"), torch.bfloat16).transformer.parameters())
        for name in ("kontext", "qwen-2511", "klein-4b", "klein-kv-9b")
    }
    billions = {name: round(size / 1e9, 1) for name, size in sizes.items()}
    assert billions == {"kontext": 11.9, "qwen-2511": 20.4, "klein-4b": 3.9, "klein-kv-9b": 9.1}
    text = random_editor("qwen-2511", torch.device("meta"), torch.bfloat16).encode_text(["a"])
    assert text["embeds"].shape == (1, 708, 3584)


@pytest.mark.parametrize("editor", ["kontext", "klein-kv-9b"])
def test_memory_is_predicted_from_shapes(editor):
    setup = rollout_setup.Setup(case(editor, turns=1, micro_batch=3, size=64, reference_size=64))
    weights = sum(p.nbytes for part in (setup.stock.transformer, setup.stock.vae) for p in part.parameters())
    measured = weights + peak_bytes(setup.rollout)
    predicted = rollout_setup.predicted_bytes(setup, setup.rollout())
    assert 0.9 * measured <= predicted <= 1.5 * measured


def test_a_row_follows_from_its_times():
    row = bench_rollout.bench(case("klein-kv-9b", dtype="bf16"), min_seconds=0.0, samples=2)
    assert (row.op, row.variant, row.shape, row.backend) == ("rollout", "tiny klein-kv-9b", "3x2x32 in 3", "eager")
    assert (row.images, row.text_calls, row.loop_text_calls) == (6, 2, 4)
    assert row.images_per_s == pytest.approx(6e6 / row.median_us, rel=1e-3)
    assert row.tflop_per_s == pytest.approx(row.flops / row.median_us / 1e6, abs=1e-4)
    assert row.percent_of_matmul <= row.percent_of_matmul_denoise
    assert row.speedup_loop == pytest.approx(row.loop_us / row.median_us, abs=1e-3)
    assert row.full_us is not None
    assert row.speedup_full == pytest.approx(row.full_us / row.median_us, abs=1e-3)
    assert row.log_prob_drift == 0 < row.loop_drift
    assert 0 < row.error <= 1
    assert row.peak_bytes is None
    assert row.predicted_bytes > 0


@pytest.mark.parametrize(
    ("options", "variant", "shape", "dtype"),
    [
        ("--editor kontext --turns 1 --reference-size 16", "tiny kontext", "2x1x32 from 16 in 2", "fp32"),
        pytest.param(
            "--editor qwen --dtype fp8 --turns 1 --loop-batch 2",
            "tiny qwen-2511",
            "2x1x64 in 2",
            "fp8",
            marks=needs_fp8,
        ),
        ("--editor klein --group 3 --micro-batch 2 --steps 3 --size 16", "tiny klein-4b", "3x2x16 in 3", "fp32"),
    ],
)
def test_the_command_measures_each_row_once(options, variant, shape, dtype, tmp_path, capsys):
    arguments = [
        *options.split(),
        *["--device", "cpu", "--tiny", "--min-seconds", "0", "--samples", "2", "--out"],
        str(tmp_path / "a"),
    ]
    bench_rollout.main(arguments)
    assert "images/s" in capsys.readouterr().out
    with (tmp_path / "a").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["variant"], row["shape"], row["dtype"]) == (variant, shape, dtype)
    assert float(row["log_prob_drift"]) == 0
    assert row["full_us"] == ""
    bench_rollout.main(arguments)
    assert "holds all 1 rows of this commit already" in capsys.readouterr().out


def test_modes_are_named_in_the_row():
    columns = case("klein-4b", compile="blocks", cuda_graphs=True, attention="cudnn").columns
    assert columns["backend"] == "compiled blocks, graphs, cudnn attention"


def test_without_a_gpu_graphs_change_nothing_and_attention_is_chosen_by_name():
    plain, moded = (
        rollout_setup.Setup(case("kontext", **modes)) for modes in ({}, {"cuda_graphs": True, "attention": "native"})
    )
    assert type(moded.editor).__name__ == "GraphedEditor"
    assert torch.equal(plain.rollout().clean, moded.rollout().clean)
    with pytest.raises(ValueError, match="attention: expected one of"):
        rollout_setup.Setup(case("kontext", attention="fastest"))


def test_rollouts_that_do_not_replay_are_refused(monkeypatch):
    right = random_editors.RandomKontext.velocity
    calls = []

    def another(self, *arguments):
        calls.append(1)
        return right(self, *arguments) * (1 + 1e-4 * len(calls))

    monkeypatch.setattr(random_editors.RandomKontext, "velocity", another)
    with pytest.raises(RuntimeError, match=r"^tiny kontext, .* of the replay is .*, expected 0: no row"):
        bench_rollout.bench(case("kontext"), min_seconds=0.0, samples=2)


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
@pytest.mark.parametrize("wrong", [1.01, math.nan])
def test_peers_with_other_velocities_are_refused(wrong, monkeypatch):
    right = rollout_loop.stock_call

    def stock_call(editor):
        return lambda call: lambda latents, t: right(editor)(call)(latents, t) * wrong

    monkeypatch.setattr(rollout_loop, "stock_call", stock_call)
    with pytest.raises(RuntimeError, match=r"^tiny klein-4b, .* from ours, 0.001 is allowed: no row"):
        bench_rollout.bench(case("klein-4b"), min_seconds=0.0, samples=2)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float8_e4m3fn, marks=needs_fp8)])
def test_the_rate_of_matrix_products_is_measured(dtype, monkeypatch):
    shapes, measure = [], harness.measure

    def watched(calls, *arguments, **options):
        shapes.append(calls["product"][0]().shape)
        return measure(calls, *arguments, **options)

    monkeypatch.setattr(harness, "measure", watched)
    assert 1e8 < flops.matmul_flop_per_s(CPU, dtype, min_seconds=0.0) < 1e16
    assert shapes[0][0] == shapes[0][1]


def test_replay_of_ours_is_what_the_peers_velocity_gives():
    """Step by step through the stock pipeline's call, on the states of our rollout."""
    setup = rollout_setup.Setup(case("qwen-2511", turns=1))
    ours = setup.rollout()
    turn = rollout_loop.Turn([], ours.latents[:, 0], ours.log_probs[:, 0])
    images = [rollout_loop.to_pil(setup.references[0])] * 3
    with torch.no_grad():
        found = replay_loop(setup.loop(), images, setup.instructions[0][0], turn)
        replays = [replay(setup.editor, ours, slice(0, 3), 0, position).log_prob for position in range(2)]
    stored = torch.stack([log_prob for log_prob in replays if log_prob is not None], dim=1)
    torch.testing.assert_close(found, stored, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["blocks", "whole"])
def test_shapes_are_compiled_one_by_one(mode, monkeypatch):
    seen = []
    monkeypatch.setattr(speed, "compile_transformer", lambda editor, mode, **options: seen.append((mode, options)))
    rollout_setup.Setup(case("klein-4b", compile=mode))
    assert seen == [(mode, {"dynamic": False})]
