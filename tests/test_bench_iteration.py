"""The iteration bench: the loop learns what ours learns from the same samples, and other results are refused."""

import csv
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_iteration  # noqa: E402
import command  # noqa: E402
import iteration_checks  # noqa: E402
import iteration_rewards  # noqa: E402
import iteration_setup  # noqa: E402
import random_editors  # noqa: E402
from peers import iteration_loop, rollout_loop  # noqa: E402

from mtedit_fast.ops import seeded_noise  # noqa: E402
from mtedit_fast.rollout import turn_seeds  # noqa: E402
from mtedit_fast.training.playground import rewards as playground  # noqa: E402
from mtedit_fast.training.rewards import RewardBatch  # noqa: E402

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
GRAPHS = ", graphs" if DEVICE.type == "cuda" else ""
NFT = iteration_setup.Case(False, DEVICE, "fp32", "nft", "both", 2, 3, 2, 64, 2, 2, 4, 2, 5, "zero_std")
GRPO = replace(NFT, objective="grpo", forward_rows=None)


@pytest.fixture(scope="module")
def nft(tmp_path_factory):
    return iteration_setup.Setup(NFT, tmp_path_factory.mktemp("nft"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    case = replace(NFT, needed="old", groups=1, turns=1)
    return iteration_setup.Setup(case, tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def grpo(tmp_path_factory):
    return iteration_setup.Setup(GRPO, tmp_path_factory.mktemp("grpo"))


def test_the_loop_samples_what_ours_samples_from_the_same_noise(nft, monkeypatch):
    """With the old policy, which is not θ here, in batches of two repeats and then one."""
    ours, _ = nft.trainer.sample(nft.records, iteration=0)
    monkeypatch.setattr(nft.loop.rollout, "codec", "PNG")
    monkeypatch.setattr(
        nft.loop.rollout,
        "noise",
        lambda rows, turn, draw, shape: seeded_noise(turn_seeds(ours.seeds[rows], turn), tuple(shape[1:]), draw),
    )
    found, expected = nft.loop.sampled(nft.records), iteration_loop.Samples.of(ours)
    images = [
        torch.stack([torch.stack([rollout_loop.to_tensor(image) for image in chain]) for chain in samples.images])
        for samples in (found, expected)
    ]
    assert (images[0] - images[1]).abs().max() <= 1.01 / 255
    assert (images[0] != images[1]).float().mean() < 1e-3
    assert torch.equal(found.group, expected.group)
    torch.testing.assert_close(found.latents[:, :, -1], expected.latents[:, :, -1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.references, expected.references, rtol=1e-3, atol=1e-2)
    for one, two in zip(found.text, expected.text, strict=True):
        assert one.keys() == two.keys()
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-4)
    nft.loop.sample_old = False
    other = nft.loop.sampled(nft.records).latents[:, :, -1]
    nft.loop.sample_old = True
    assert (other - found.latents[:, :, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("needed", ["both", "old"])
def test_the_loop_learns_what_ours_learns(needed, request):
    checks = iteration_checks.checked(request.getfixturevalue("nft" if needed == "both" else "small"))
    assert max(checks.states, checks.rewards, checks.loss, checks.gradient) <= 0.2
    assert checks.drift is checks.loop_drift is None


@pytest.mark.parametrize("forward_rows", [None, 5])
def test_grpo_replays_exactly_or_batched_and_the_loop_step_by_step(forward_rows, grpo, tmp_path):
    one = replace(GRPO, forward_rows=forward_rows, groups=1, turns=1)
    checks = iteration_checks.checked(iteration_setup.Setup(one, tmp_path) if forward_rows else grpo)
    assert max(checks.states, checks.rewards, checks.loss, checks.gradient) <= 0.2
    assert checks.drift == 0 if forward_rows is None else checks.drift < 1e-5
    assert checks.loop_drift < 1e-5


@pytest.mark.parametrize("name", ["nft", "grpo"])
def test_filtered_rows_are_run_by_the_loop_and_count_for_nothing(name, request):
    setup = request.getfixturevalue(name)
    ours, rewards = setup.trainer.sample(setup.records, iteration=0)
    result = setup.trainer.advantages(ours, rewards, setup.records)
    keep = torch.tensor([True, False, True, True, False, False], device=DEVICE)
    result = replace(result, keep=keep.cpu())
    with iteration_checks.gradient(setup.trainer.optimizer) as own:
        setup.trainer.update(setup.trainer.learning_batch(ours, result))
    setup.reset()
    samples, loop = iteration_loop.Samples.of(ours), setup.loop
    rows = []
    hook = setup.policy.base_model.model.register_forward_pre_hook(
        lambda _, args, inputs: rows.append((torch.is_grad_enabled(), len(inputs["hidden_states"]))), with_kwargs=True
    )
    loop.draws = iteration_checks.draws_of(setup, ours)
    with iteration_checks.gradient(loop.optimizer) as found:
        loop.update(samples, result.advantages.to(DEVICE), keep)
    hook.remove()
    loop.draws = None
    setup.reset()
    assert iteration_checks.relative(found, own) < 1e-4
    counts = [sum(size for grad, size in rows if grad is wanted) for wanted in (True, False)]
    assert counts == ([6 * 2 * 2, 2 * 6 * 2 * 2] if name == "nft" else [6 * 2 * 1, 0])


def test_without_draws_the_loop_takes_different_levels_of_the_schedule(nft):
    samples = iteration_loop.Samples.of(nft.trainer.sample(nft.records, iteration=0)[0])
    rows, shape = torch.arange(6, device=DEVICE), torch.Size((6, 16, 64))
    draws = nft.loop.random_draws(samples)
    levels, noise = zip(*(draws(rows, 1, torch.full_like(rows, index), shape) for index in range(2)), strict=True)
    sigmas = nft.editor.schedule(2, 64, 64).sigmas
    assert torch.equal(torch.stack(levels).sort(0, descending=True).values, sigmas[:2, None].expand(2, 6))
    assert abs(torch.stack(noise).std().item() - 1) < 0.05


def test_scores_of_the_loop_are_the_trainers_where_they_are_defined(nft):
    """On noisy scenes; in some the background was to change, where consistency has no score."""
    chains = [nft.trainer.chains[index] for index in range(len(nft.trainer.chains))]
    by_kind = [[r for r in chains if ("background_change" in r.extra["types"]) == changed] for changed in (True, False)]
    records = by_kind[0][:3] + by_kind[1][:3]
    generator = torch.Generator().manual_seed(0)
    references = torch.stack([record.image for record in records])
    edits = references[:, None] + 0.02 * torch.randn(len(records), 2, *references.shape[1:], generator=generator)
    edits = (255 * edits.clamp(0, 1)).round() / 255
    texts = [record.instructions for record in records]
    batch = RewardBatch(references.to(DEVICE), edits.to(DEVICE), texts)
    found = [
        nft.loop.scores(rollout_loop.to_pil(reference), [rollout_loop.to_pil(edit) for edit in chain], text)
        for reference, chain, text in zip(references, edits, texts, strict=True)
    ]
    judge, kept = (torch.tensor([each[name] for each in found]) for name in ("judge", "consistency"))
    assert iteration_checks.distance(judge, playground.judge_score(batch).cpu()) < 1e-4
    assert iteration_checks.distance(kept, playground.content_consistency(batch).cpu()) < 0.02
    assert 0 < kept.isnan().sum() < kept.numel()


def test_fixed_boxes_are_the_first_cells_and_edits_keep_them_all():
    image = Image.new("RGB", (64, 64))
    (first, second) = iteration_rewards.fixed_boxes(image, [image, image], ["a", "b"])
    assert first == second == ([[16 * i, 0, 16 * i + 16, 16] for i in range(4)],) * 2
    assert [iteration_rewards.clamp(value, 0.0) for value in (-0.5, 0.5, 1.5)] == [0.0, 0.5, 1.0]
    assert math.isnan(iteration_rewards.clamp(math.nan, 0.0))


def test_references_that_repeat_are_embedded_once_in_a_row():
    a, b, c = torch.rand(3, 3, 4, 4).unbind()
    images, owner = iteration_rewards.without_repeats(torch.stack([a, a, b, b, b, c, a]))
    assert torch.equal(images, torch.stack([a, b, c, a]))
    assert owner == [0, 0, 1, 1, 1, 2, 3]
    alone, owner = iteration_rewards.without_repeats(a[None])
    assert torch.equal(alone, a[None])
    assert owner == [0]


def test_both_begin_with_the_same_adapters_again(small):
    sides = zip(bench_iteration.sides(small), (small.trainer, small.loop), strict=True)
    before = [parameter.detach().clone() for parameter in small.adapters.parameters]
    for side, learner in sides:
        own = learner.optimizer.param_groups[0]["params"]
        assert all(torch.equal(a, b) for a, b in zip(own, before, strict=True))
        side()
        assert any(not torch.equal(a, b) for a, b in zip(own, before, strict=True))
        small.reset()
        assert all(torch.equal(a, b) for a, b in zip(own, before, strict=True))
    assert not small.adapters.old_is_current
    old = small.policy.get_parameter(next(n for n, _ in small.policy.named_parameters() if ".old." in n))
    assert not any(torch.equal(old, value) for value in before if value.shape == old.shape)


def test_a_row_follows_from_its_times(tmp_path):
    row = bench_iteration.bench(replace(NFT, needed="neither", groups=1), repetitions=1, folder=tmp_path)
    assert (row.op, row.variant, row.dtype) == ("iteration", "playground nft, zero_std", "fp32")
    assert row.backend == f"neither{GRAPHS}"
    assert row.shape == "1x3x2x64 in 2, 2 draws by 4|2|5"
    assert (row.trajectories, row.images, row.repetitions) == (3, 6, 1)
    assert row.p20_s == row.median_s == row.p80_s
    assert 0 < row.kept_rows <= 3
    assert row.speedup == pytest.approx(row.loop_s / row.median_s, rel=1e-2)
    assert row.images_per_s == pytest.approx(6 / row.median_s, rel=1e-2)
    sampling = row.rollout_s + row.reward_s, row.loop_rollout_s + row.loop_reward_s
    assert row.speedup_sampling == pytest.approx(sampling[1] / sampling[0], rel=1e-2)
    for prefix, total in (("", row.median_s), ("loop_", row.loop_s)):
        phases = [getattr(row, f"{prefix}{name}_s") for name in bench_iteration.PHASES]
        assert all(value >= 0 for value in phases)
        assert sum(phases) == pytest.approx(total, rel=1e-2)
    assert (row.peak_bytes is None) == (DEVICE.type == "cpu")
    assert max(row.state_error, row.reward_error, row.loss_error, row.gradient_error) <= 1


@pytest.mark.parametrize(
    ("target", "name", "change", "message"),
    [
        (iteration_loop, "published_nft", lambda right: lambda *a, **o: 1.01 * right(*a, **o), "loss"),
        (iteration_loop.IterationLoop, "rewards", lambda right: lambda *a: _moved(right(*a)), "rewards"),
        (rollout_loop, "stock_call", None, "states"),
    ],
)
def test_other_results_are_refused(target, name, change, message, small, monkeypatch):
    if message == "states":
        right = small.loop.rollout.call
        monkeypatch.setattr(small.loop.rollout, "call", lambda call: lambda x, t: 1.01 * right(call)(x, t))
    else:
        monkeypatch.setattr(target, name, change(getattr(target, name)))
    with pytest.raises(RuntimeError, match=rf"^playground nft, .*: {message} of the loop are .* times .*: no row"):
        iteration_checks.checked(small)
    monkeypatch.undo()
    small.loop.draws = None
    small.reset()


def _moved(rewards):
    return rewards | {"judge": rewards["judge"] + 0.01}


def test_a_replay_that_drifts_and_an_iteration_without_a_row_are_refused(grpo, monkeypatch):
    sample = grpo.trainer.sample

    def drifted(*arguments, **options):
        trajectories, rewards = sample(*arguments, **options)
        trajectories.log_probs += 1e-6
        return trajectories, rewards

    drifted.settings, drifted.editor = sample.settings, sample.editor
    monkeypatch.setattr(grpo.trainer, "sample", drifted)
    with pytest.raises(RuntimeError, match=r"\|Δ log-prob\| of the replay is .*, expected 0: no row"):
        iteration_checks.checked(grpo)
    monkeypatch.undo()
    assert iteration_checks.first_drift(grpo) == 0
    monkeypatch.setattr(iteration_checks, "first_drift", lambda setup: 1e-6)
    monkeypatch.setattr(grpo.trainer, "sample", None)  # refused before it samples
    with pytest.raises(RuntimeError, match=r"is 1e-06, expected 0: no row$"):
        iteration_checks.checked(grpo)
    monkeypatch.undo()
    right = grpo.trainer.advantages
    monkeypatch.setattr(grpo.trainer, "advantages", lambda *a: replace(right(*a), keep=torch.zeros(6).bool()))
    with pytest.raises(RuntimeError, match="filter zero_std leaves no trajectory: no row; try another"):
        iteration_checks.checked(grpo)


def test_undefined_rewards_must_be_undefined_in_both():
    a, b = torch.tensor([[1.0, math.nan]]), torch.tensor([[1.25, math.nan]])
    assert iteration_checks.distance(a, b) == 0.25
    assert iteration_checks.distance(a, b.nan_to_num(0.0)) == math.inf


@pytest.mark.parametrize("objective", ["nft", "grpo"])
def test_full_size_is_the_same_with_other_models(objective, tmp_path, monkeypatch):
    """Small ones in their places: a random editor, and the playground's judge and DINO."""
    monkeypatch.setattr(iteration_setup, "random_editor", lambda *a: random_editors.random_editor(*a, tiny=True))
    monkeypatch.setattr(iteration_rewards, "random_judge", playground._judge)
    monkeypatch.setattr(iteration_rewards, "random_metric", playground._consistency)
    case = replace(NFT if objective == "nft" else GRPO, full=True, groups=1, turns=1)
    setup = iteration_setup.Setup(case, tmp_path)
    checks = iteration_checks.checked(setup)
    assert max(checks.states, checks.rewards, checks.loss, checks.gradient) <= 0.5
    assert setup.editor.transformer.gradient_checkpointing == (objective == "grpo")
    assert case.columns["variant"].startswith("kontext ")


def test_the_command_measures_each_row_once(tmp_path, capsys):
    small = "--groups 1 --group 2 --turns 1 --steps 2 --repetitions 1 --needed old --draws 1 --filter none"
    arguments = [*small.split(), "--out", str(tmp_path / "a")]
    bench_iteration.main(arguments)
    assert "2.0 trajectories kept of 2" in capsys.readouterr().out
    with (tmp_path / "a").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["variant"], row["backend"], row["draws"]) == ("playground nft, none", f"old{GRAPHS}", "1")
    assert row["shape"] == "1x2x1x64 in 2, 1 draws by 2|2|2"
    bench_iteration.main(arguments)
    assert "holds all 1 rows of this commit already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", [("both", False, "fp32", 4, 8, 3, 3, 2, 8, 8, 8), ("neither", False, "fp32", 4, 8, 3, 3, 2, 8, 8, 8)]),
        ("--full --needed old", [("old", True, "bf16", 2, 8, 2, 6, 2, 4, 4, 2)]),
        ("--objective grpo --micro-batch 16", [("both", False, "fp32", 4, 8, 3, 3, 2, 16, 8, None)]),
        ("--objective grpo --forward-rows 7 --loop-batch 3", [("both", False, "fp32", 4, 8, 3, 3, 2, 8, 3, 7)]),
        ("--needed both --draws 5 --steps 4 --dtype bf16", [("both", False, "bf16", 4, 8, 3, 4, 4, 8, 8, 8)]),
    ],
)
def test_defaults(options, expected):
    names = [
        "needed",
        "full",
        "dtype",
        "groups",
        "group",
        "turns",
        "steps",
        "draws",
        "micro_batch",
        "loop_batch",
        "forward_rows",
    ]
    found = bench_iteration.cases(
        command.parser(None, "iteration", bench_iteration.options).parse_args(options.split())
    )
    assert [tuple(getattr(case, name) for name in names) for case in found] == expected
    assert {case.size for case in found} == {512 if "full" in options else 64}


def test_modes_are_named_in_the_row():
    case = replace(NFT, compile="blocks", attention="cudnn", device=torch.device("cpu"))
    assert case.columns["backend"] == "both, compiled blocks, cudnn attention"
    assert replace(GRPO, forward_rows=4, cuda_graphs=False).columns["backend"] == "batched"
    assert replace(GRPO, cuda_graphs=False).columns["backend"] == "exact"


@pytest.mark.parametrize("options", ["--repetitions 0", "--device cpu"])
def test_the_command_says_what_it_expected(options, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit):
        bench_iteration.main(["--device", "cuda", *options.split()])
    assert "expected " in capsys.readouterr().err
