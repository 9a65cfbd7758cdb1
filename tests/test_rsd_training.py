"""Teachers and students of one-step restoration: resumable bit for bit, data that is refused, checkpoints chosen."""

import json

import numpy as np
import pytest
import torch
from distributed_worker import run_ranks

from mtedit_fast.onestep import Corruption, OneStepGenerator, TeacherSampler, load_denoiser
from mtedit_fast.training.config_file import dump_config
from mtedit_fast.training.onestep.config import load_onestep_config
from mtedit_fast.training.onestep.data import CorruptedImages, Part, load_data
from mtedit_fast.training.onestep.distill import StudentLoop
from mtedit_fast.training.onestep.loop import new_denoiser
from mtedit_fast.training.onestep.proximal import ProximalFID
from mtedit_fast.training.onestep.run import distill, load_source, train_teacher
from mtedit_fast.training.onestep.teacher import TeacherLoop
from mtedit_fast.training.playground.rsd import shapes

SHAPES = "mtedit_fast.training.playground.rsd:shapes"
PIECES = f"{__name__}:pieces"
NOISE = {"operators": [], "sigma": 0.2}
INPAINTING = {"operators": [{"name": "inpainting", "missing": 0.5}]}


def pieces(count: int, seed: int) -> torch.Tensor:
    """The playground's shapes at a sixteenth of their area, for quick steps."""
    return shapes(count, seed)[:, :, ::4, ::4]


def colours(images: torch.Tensor) -> torch.Tensor:
    """Four numbers that tell images apart."""
    x = images.float() / 255
    return torch.cat((x.mean((1, 2)), x.std((1, 2, 3), keepdim=True)[:, :, 0, 0]), 1)


def make_colours():
    return colours


FEATURES = f"{__name__}:make_colours"


def config(folder, corruption=NOISE, *overrides: str):
    return load_onestep_config(
        {
            "corruption": corruption,
            "data": {"path": PIECES, "count": 24},
            "model": {"widths": [8, 16], "layers": 1, "attention": 0},
            "teacher": {"steps": 4, "batch": 2, "lr": 1e-3, "warmup": 2, "ema_kimg": 0.02},
            "distill": {"steps": 4, "batch": 2, "lr": 1e-4, "generator_lr": 1e-4, "ema_kimg": 0.02},
            "run": {"output_dir": str(folder), "checkpoint_every": 2, "micro_batch": 2},
        },
        overrides,
    )


def weights(folder) -> dict[str, torch.Tensor]:
    return load_denoiser(folder).denoiser.state_dict()


def differ(a, b) -> list[str]:
    return [name for name, value in weights(a).items() if not value.equal(weights(b)[name])]


# ---- both stages


@pytest.mark.parametrize(
    ("corruption", "method"),
    [
        (NOISE, "sid"),
        (
            {
                "operators": [{"name": "blur", "taps": 5}, {"name": "super_resolution", "keep_size": False}],
                "sigma": 0.1,
            },
            "dmd",
        ),
    ],
    ids=["noise sid", "small and noisy dmd"],
)
def test_a_killed_run_ends_as_an_uninterrupted_one(tmp_path, corruption, method):
    overrides = [f"distill.method={method}"]
    whole = config(tmp_path / "whole", corruption, *overrides)
    teacher, student = train_teacher(whole), distill(whole)
    parts = config(tmp_path / "parts", corruption, *overrides)
    data = load_data(parts.data, parts.corruption.build())
    for make, finish in (
        (lambda: TeacherLoop(parts, data), lambda: train_teacher(parts)),
        (lambda: StudentLoop(parts, data, tmp_path / "parts/teacher/model"), lambda: distill(parts)),
    ):
        steps = make().fit()
        for _ in range(3):  # the third is after the checkpoint, and is lost
            next(steps)
        finish()
    assert differ(teacher, tmp_path / "parts/teacher/model") == []
    assert differ(student, tmp_path / "parts/student/model") == []
    for stage in ("teacher", "student"):
        lines = [(tmp_path / run / stage / "metrics.jsonl").read_text().splitlines() for run in ("whole", "parts")]
        assert lines[0] == lines[1]
        assert [json.loads(line)["step"] for line in lines[0]] == [0, 1, 2, 3]
    assert differ(teacher, student)
    assert isinstance(load_source(teacher), TeacherSampler)
    generator = load_source(student)
    assert isinstance(generator, OneStepGenerator)
    assert generator.pixels(torch.arange(2)).shape == (2, 8, 8, 3)
    with pytest.raises(ValueError, match="is a one-step generator"):
        load_source(student, sampling=load_source(teacher).sampling)


def test_a_teacher_of_small_images_draws_small_ones(tmp_path):
    small = {"operators": [{"name": "super_resolution", "keep_size": False}]}
    settings = config(tmp_path, small, "teacher.steps=1", "distill.steps=1")
    assert load_source(train_teacher(settings)).shape == (3, 4, 4)
    assert load_source(distill(settings)).shape == (3, 8, 8)


def test_bf16_networks_with_fp32_weights(tmp_path):
    runs = [config(tmp_path / name, INPAINTING, "teacher.steps=1", "distill.steps=1", f"run.precision={name}")
            for name in ("fp32", "bf16")]  # fmt: skip
    losses = []
    for settings in runs:
        train_teacher(settings)
        path = distill(settings)
        assert all(value.dtype == torch.float32 for value in weights(path).values())
        line = (tmp_path / settings.run.precision / "teacher/metrics.jsonl").read_text()
        losses.append(json.loads(line)["teacher/loss"])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_mri_of_the_phantom(tmp_path):
    settings = config(
        tmp_path, {"operators": [{"name": "mri", "acceleration": 2, "coils": 2}]},
        "data.path=mtedit_fast.training.playground.rsd:phantom", "teacher.steps=2", "distill.steps=1",
        "teacher.loss_on=further", "teacher.further=4.0",
    )  # fmt: skip
    train_teacher(settings)
    assert load_source(distill(settings)).pixels(torch.arange(2)).shape == (2, 32, 32, 1)


def test_seeds_and_options_change_the_weights(tmp_path):
    seen = {}
    for name, override in {
        "as it is": "run.seed=0", "seed": "run.seed=1", "data": "data.seed=1", "levels": "teacher.p_mean=0.0",
        "spread": "teacher.p_std=0.5", "rate": "teacher.lr=1e-4", "average": "teacher.ema_kimg=0.0",
        "clipped": "run.max_grad_norm=0.01", "warm": "teacher.warmup=0",
        "cooling": "teacher.lr_schedule=linear",
    }.items():  # fmt: skip
        settings = config(tmp_path / name, NOISE, "teacher.steps=2", override)
        seen[name] = torch.cat([value.flatten() for value in weights(train_teacher(settings)).values()])
    names = list(seen)
    for i, a in enumerate(names):
        assert not any(seen[a].equal(seen[b]) for b in names[:i]), a


def test_options_of_distillation_change_the_student(tmp_path):
    settings = config(tmp_path / "teacher", INPAINTING)
    teacher = train_teacher(settings)
    seen = {}
    for name, overrides in {
        "as it is": (), "two steps with betas": (),
        "alpha": ("distill.alpha=0.5",), "sigma_init": ("distill.sigma_init=1.0",),
        "t_max": ("distill.t_max=100.0",), "dmd": ("distill.method=dmd",), "sds": ("distill.method=sds",),
        "generator_lr": ("distill.generator_lr=1e-3",),
        "betas": ("distill.generator_betas=[0.0, 0.9]",), "ramp": ("distill.ema_ramp=0.5",),
        "fake": ("distill.lr=1e-2",), "fake betas": ("distill.betas=[0.9, 0.9]",),
        "further": ("teacher.further=0.5",), "loss_on": ("teacher.loss_on=further",),
        "cooling, with betas": ("distill.lr_schedule=linear",),
    }.items():  # fmt: skip
        changed = config(tmp_path / name, INPAINTING, f"distill.steps={1 + ('betas' in name)}", *overrides)
        path = distill(changed, teacher=teacher)
        seen[name] = torch.cat([value.flatten() for value in weights(path).values()])
        assert json.loads((path / "onestep.json").read_text())["sigma_init"] == changed.distill.sigma_init
    names = list(seen)
    for i, a in enumerate(names):
        assert not any(seen[a].equal(seen[b]) for b in names[:i]), a


def test_learning_rates_by_step(tmp_path):
    """Warm-up of 2 steps and a linear fall over 4, of a teacher; the fall alone of a student's two optimizers."""
    settings = config(tmp_path, NOISE, "teacher.lr_schedule=linear", "distill.lr_schedule=linear")
    data = load_data(settings.data, settings.corruption.build())
    rates = [metrics["learning_rate"] for metrics in TeacherLoop(settings, data).fit()]
    assert rates == pytest.approx([1e-3 / 3, 2e-3 / 3 * 0.75, 1e-3 * 0.5, 1e-3 * 0.25])
    student, seen = StudentLoop(settings, data, train_teacher(settings, data=data)), []
    for _ in student.fit():
        seen += [group["lr"] for each in student.optimizers.values() for group in each.param_groups]
    assert seen == pytest.approx([1e-4 * left for left in (1.0, 0.75, 0.5, 0.25) for _ in range(2)])


def test_training_continues_a_given_network(tmp_path):
    first = train_teacher(config(tmp_path / "a"))
    second = config(tmp_path / "b", NOISE, f"model.path={first}", "teacher.steps=0")
    assert differ(first, train_teacher(second)) == []


def test_the_loss_falls(tmp_path):
    settings = config(tmp_path, NOISE, "teacher.steps=60", "teacher.batch=16", "run.micro_batch=16", "teacher.lr=5e-3")
    train_teacher(settings)
    lines = (tmp_path / "teacher/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["teacher/loss"] for line in lines]
    assert np.mean(losses[-15:]) < 0.8 * np.mean(losses[:10])


def test_losses_that_are_not_finite_are_left_out(tmp_path):
    settings = config(tmp_path, NOISE, "teacher.batch=6")
    loop = TeacherLoop(settings, load_data(settings.data, Corruption([], 0.2)))
    parameter = next(loop.denoiser.parameters())
    before = parameter.detach().clone()

    def loss(numbers):
        numbers = numbers.to(loop.device)
        ones = torch.ones(len(numbers), 3, 8, 8, device=loop.device)
        values = loop.denoiser(ones, ones[0, 0, 0, 0]).square().mean((1, 2, 3))
        return torch.where(numbers % 3 == 0, torch.nan, values)

    metrics = loop.update("teacher", loss, Part.TEACHER)
    assert metrics["teacher/dropped"] == 2
    assert np.isfinite(metrics["teacher/loss"])
    assert np.isfinite(metrics["teacher/grad_norm"])
    assert not parameter.equal(before)
    before = parameter.detach().clone()
    for step in range(loop.config.run.max_skipped):
        if step == loop.config.run.max_skipped - 1:
            with pytest.raises(FloatingPointError, match="not finite in 5 steps in a row"):
                loop.update("teacher", lambda n: loss(n) * torch.nan, Part.TEACHER)
        else:
            loop.update("teacher", lambda n: loss(n) * torch.nan, Part.TEACHER)
    assert parameter.equal(before)


def _train(rank: int, folder: str) -> list[torch.Tensor]:
    settings = config(folder, NOISE, "teacher.steps=2", "distill.steps=2")
    return [
        torch.cat([v.flatten() for v in weights(path).values()])
        for path in (train_teacher(settings), distill(settings))
    ]


def test_two_processes_train_what_one_does(tmp_path):
    first, second = run_ranks(2, _train, str(tmp_path / "two"))
    _train(0, str(tmp_path / "one"))
    for a, b in zip(first, second, strict=True):
        assert a.equal(b)
    for stage in ("teacher", "student"):
        two, one = (
            [json.loads(line) for line in (tmp_path / run / stage / "metrics.jsonl").read_text().splitlines()]
            for run in ("two", "one")
        )
        assert [metrics.keys() for metrics in two] == [metrics.keys() for metrics in one]
        # Adam's first step is the gradient's sign, which is rounding where the gradient is: later steps are but alike.
        for name, value in one[0].items():
            assert two[0][name] == pytest.approx(value, rel=1e-4 if stage == "teacher" else 0.05), name


@pytest.mark.parametrize("corruption", [NOISE, INPAINTING], ids=["noise", "inpainting"])
def test_scores_are_compared_where_both_have_learnt(tmp_path, corruption):
    settings = config(tmp_path, corruption)
    data = load_data(settings.data, settings.corruption.build())
    loop = StudentLoop(settings, data, train_teacher(settings, data=data))
    assert loop.teacher.hides_pixels == loop.trained["generator"].hides_pixels == (corruption is INPAINTING)
    levels = []
    loop.teacher.register_forward_pre_hook(lambda module, inputs: levels.append(inputs[1]))
    with torch.no_grad():
        loop._generator_losses(torch.arange(200))
    assert 20 < levels[0].max() <= 24.41
    lowest = levels[0].min()
    assert (0.2 <= lowest < 0.3) if corruption is NOISE else lowest < 0.01


# ---- proximal FID


def test_the_generator_of_the_lowest_proximal_fid_is_kept(tmp_path, monkeypatch):
    settings = config(
        tmp_path,
        NOISE,
        "distill.steps=3",
        "evaluation.every=1",
        "evaluation.samples=8",
        f"evaluation.features={FEATURES}",
    )
    train_teacher(settings)
    distances = iter((3.0, 1.0, 2.0))
    monkeypatch.setattr(ProximalFID, "__call__", lambda self, source: next(distances))
    path = distill(settings)
    card = json.loads((path / "onestep.json").read_text())
    assert (card["steps"], card["proximal_fid"]) == (2, 1.0)
    lines = [json.loads(line) for line in (tmp_path / "student/metrics.jsonl").read_text().splitlines()]
    assert [line["proximal_fid"] for line in lines] == [3.0, 1.0, 2.0]


class Memory:
    """A source that draws given images, by the number in their seeds."""

    def __init__(self, images):
        self.images, self.device = images, torch.device("cpu")

    def __call__(self, seeds):
        return self.images[(seeds & 0xFFFFFFFF) % len(self.images)]


@pytest.mark.parametrize("corruption", [NOISE, INPAINTING, {"operators": [{"name": "blur", "taps": 5}]}])
def test_proximal_fid_compares_what_is_corrupted_alike(tmp_path, corruption):
    settings = config(tmp_path, corruption, "data.count=300", "evaluation.samples=300", "evaluation.batch=100")
    data = load_data(settings.data, settings.corruption.build())
    proximal = ProximalFID(data, settings.evaluation, colours)
    clean = data.clean(torch.arange(300))
    right = proximal(Memory(clean))
    wrong = proximal(Memory(clean * 0.5))
    assert right < 1e-3
    assert wrong > 10 * right + 1e-3
    if corruption is not NOISE:  # corrupted twice is not what the data are
        assert proximal(Memory(data[torch.arange(300)][0])) > right


# ---- what is refused


def test_another_operators_checkpoint_is_refused(tmp_path):
    settings = config(tmp_path)
    train_teacher(settings)
    other = config(tmp_path, {"operators": [], "sigma": 0.4})
    with pytest.raises(ValueError, match=r"another model: expected .*sigma 0.4.* got .*sigma 0.2"):
        train_teacher(other)
    with pytest.raises(ValueError, match=r"corruption: the teacher .* was trained on .*0.2, expected .*0.4"):
        distill(other)
    distill(settings)
    with pytest.raises(ValueError, match="another model"):
        distill(config(tmp_path, NOISE, "distill.method=dmd"))


def test_distillation_needs_a_teacher(tmp_path):
    with pytest.raises(ValueError, match=r"teacher: no folder .*mtedit-fast rsd teacher CONFIG"):
        distill(config(tmp_path))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["corruption.operators=[{name: fog}]"], "expected a name of noise, inpainting"),
        (["corruption.operators=[{name: blur, taps: 4}]"], "taps: expected an odd number"),
        (["corruption.operators=[{name: inpainting}]"], "corruption.sigma: expected 0 with masks"),
        (["corruption.operators=[{name: inpainting}]", "corruption.sigma=0.0", "data.measured=true"], "data.measured"),
        (["evaluation.every=5"], "evaluation.features: expected what to measure"),
        (["distill.method=gan"], "distill.method"),
        (["run.seed=16777216"], "run.seed"),
        (["teacher.loss_on=all"], "teacher.loss_on"),
        (["distill.alfa=1"], "did you mean 'alpha'"),
    ],
)
def test_bad_configurations(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, NOISE, *overrides)


def test_networks_that_do_not_fit(tmp_path):
    deep = config(tmp_path, NOISE, "model.widths=[8, 8, 8]")
    with pytest.raises(
        ValueError, match=r"model.widths: 3 resolutions of patches of 1 expect sides that are multiples of 4"
    ):
        new_denoiser(deep, (3, 6, 6))
    path = train_teacher(config(tmp_path, NOISE, "teacher.steps=0"))
    masked = config(tmp_path, INPAINTING, f"model.path={path}")
    with pytest.raises(ValueError, match=r"expected a network of 4 channels in and 3 out .* with masks, got 3 and 3"):
        new_denoiser(masked, (3, 32, 32))


def test_data_that_the_operator_does_not_fit():
    with pytest.raises(ValueError, match="multiples of factor 2"):
        CorruptedImages(torch.zeros(2, 3, 7, 7), Corruption([{"name": "super_resolution"}]))
    with pytest.raises(ValueError, match=r"x: expected \[B, 2, 8, 8\]"):
        CorruptedImages(torch.zeros(2, 3, 8, 8), Corruption([{"name": "mri"}]))
    with pytest.raises(ValueError, match=r"images: expected \[N, C, H, W\] with N ≥ 1"):
        CorruptedImages(torch.zeros(0, 3, 8, 8), Corruption())


def test_configurations_read_back(tmp_path):
    settings = config(tmp_path, INPAINTING)
    (tmp_path / "c.yaml").write_text(dump_config(settings, comments=True))
    assert load_onestep_config(tmp_path / "c.yaml") == settings
