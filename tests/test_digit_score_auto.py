"""Which implementation `auto` takes for the softmax over the vocabulary, why, and how it comes to know."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from op_backends import DEVICES
from test_digit_score import IDS, VALUES, inputs

from mtedit_fast.ops import _crossover, digit_score, measure_crossover, token_log_probs, vocab_backend
from mtedit_fast.ops._backend import unavailable_reason

GPU = torch.device("cuda", 0)
measuring = importlib.import_module("mtedit_fast.ops.measure_crossover")  # in the package, its name is the function's
TRITON_REASON = unavailable_reason("triton", torch.device(DEVICES["triton"]), ())
needs_triton = pytest.mark.skipif(TRITON_REASON is not None, reason=str(TRITON_REASON))
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(_crossover.CACHE_VARIABLE, str(tmp_path))
    return tmp_path


def measure(**options) -> _crossover.Crossover:
    return measure_crossover(8, 40, torch.float32, DEVICES["triton"], rows=(2, 1), repeats=1, **options)


def test_where_results_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert _crossover.cache_file() == tmp_path / "head_crossover.json"
    monkeypatch.delenv(_crossover.CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert _crossover.cache_file() == tmp_path / "xdg/mtedit_fast/head_crossover.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert _crossover.cache_file() == tmp_path / "home/.cache/mtedit_fast/head_crossover.json"


@needs_triton
def test_measured_once_and_remembered_by_other_processes(folder: Path) -> None:
    found = measure()
    assert list(found.library_us) == list(found.fused_us) == [1, 2]
    assert all(time > 0 for time in (*found.library_us.values(), *found.fused_us.values()))
    assert measure() is found
    stored = json.loads((folder / "head_crossover.json").read_text())
    assert len(stored) == 1
    _crossover.load.cache_clear()  # as in another process
    assert measure() == found
    assert measure(force=True).fused_us != found.fused_us
    measure_crossover(8, 41, torch.float32, DEVICES["triton"], rows=[1], repeats=1)
    assert len(json.loads((folder / "head_crossover.json").read_text())) == 2


@needs_triton
@pytest.mark.parametrize(
    ("library", "fused", "expected"),
    [
        ([9, 9, 9], [10, 5, 5], 16),
        ([9, 9, 9], [5, 5, 5], 1),
        ([9, 9, 9], [5, 5, 10], None),  # slower where it would matter
        ([9, 9, 9], [5, 10, 5], 64),
    ],
)
def test_the_crossover_follows_from_the_times(monkeypatch: pytest.MonkeyPatch, library, fused, expected) -> None:
    times = iter([float(time) for pair in zip(library, fused, strict=True) for time in pair])
    monkeypatch.setattr(measuring, "_microseconds", lambda *_: next(times))
    found = measure_crossover(8, 40, torch.float32, DEVICES["triton"], rows=(1, 16, 64))
    assert found.rows == expected


def known(rows: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU's measurement would have left behind."""
    monkeypatch.setattr(_crossover, "_where", lambda device: "some GPU")
    monkeypatch.setattr(_crossover, "unavailable_reason", lambda *_: None)
    key = _crossover.key_of(4096, 151_936, torch.bfloat16, GPU)
    _crossover.store(_crossover.cache_file(), key, _crossover.Crossover(rows, {1: 2.0}, {1: 1.0}))


def test_auto_is_a_threshold_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    known(256, monkeypatch)
    arguments = (4096, 151_936, torch.bfloat16, GPU)
    assert vocab_backend(255, *arguments)[0] == "reference"
    assert "only from 256 rows on, not at 255" in vocab_backend(255, *arguments)[1]
    assert vocab_backend(256, *arguments) == (
        "triton",
        "it was measured to be faster from 256 rows on, and there are 256",
    )
    unknown = vocab_backend(4096, 4096, 32_000, torch.bfloat16, GPU)
    assert unknown[0] == "reference"
    assert "no crossover is known" in unknown[1]


def test_auto_where_the_kernel_never_won(monkeypatch: pytest.MonkeyPatch) -> None:
    known(None, monkeypatch)
    chosen, why = vocab_backend(10**6, 4096, 151_936, torch.bfloat16, GPU)
    assert chosen == "reference"
    assert "at no number of rows" in why


def test_auto_is_the_reference_on_a_cpu() -> None:
    chosen, why = vocab_backend(4096, 8, 40, torch.float32, torch.device("cpu"))
    assert chosen == "reference"
    assert "CUDA" in why


@pytest.mark.parametrize("content", ["not json", "[]", '{"a": 1}', '{"a": {"rows": 3}}'])
def test_an_unreadable_file_is_ignored_and_replaced(folder: Path, content: str) -> None:
    path = folder / "head_crossover.json"
    path.write_text(content)
    with pytest.warns(UserWarning, match="is not readable and is ignored"):
        assert _crossover.load(path) == {}
    _crossover.store(path, "key", _crossover.Crossover(4, {4: 1.0}, {4: 0.5}))
    assert json.loads(path.read_text())["key"]["rows"] == 4
    assert list(folder.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_costs_a_warning(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "file").write_text("")
    with pytest.warns(UserWarning, match="could not be stored"):
        _crossover.store(folder / "file" / "head_crossover.json", "key", _crossover.Crossover(4, {}, {}))


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("device must be one that the fused kernel runs on", {"dtype": torch.float64}),
        ("rows and repeats must be positive", {"rows": ()}),
        ("rows and repeats must be positive", {"rows": (0,)}),
        ("rows and repeats must be positive", {"repeats": 0}),
    ],
)
@needs_triton
def test_bad_arguments_are_named(message: str, change: dict) -> None:
    arguments = {"dtype": torch.float32, "device": DEVICES["triton"]} | change
    with pytest.raises(ValueError, match=message):
        measure_crossover(8, 40, **arguments)


@needs_triton
def test_library_products_may_feed_the_kernel() -> None:
    """What "auto" does on a GPU below the crossover: lse from library products, the rest from the kernel."""
    from mtedit_fast.ops.digit_score import _forward

    hidden, weight, bias, target = (tensor.to(DEVICES["triton"]) for tensor in inputs(5, 9, 40))
    for vocab in (False, True):
        arguments = (hidden, weight, bias, target, IDS, VALUES, 1.5, 35, vocab)
        mixed = _forward(*arguments, "auto" if vocab else "triton")
        for one, other in zip(mixed, _forward(*arguments, "reference"), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, equal_nan=True)


@needs_gpu
def test_auto_changes_over_on_a_gpu() -> None:
    tensors = [tensor.cuda() for tensor in inputs(64, 64, 4000)]
    before = digit_score(*tensors[:2], IDS, VALUES, normalize="vocab")
    measure_crossover(64, 4000, torch.float32, rows=(64,), repeats=3)
    chosen, _ = vocab_backend(64, 64, 4000, torch.float32, GPU)
    after = digit_score(*tensors[:2], IDS, VALUES, normalize="vocab")
    torch.testing.assert_close(before.score, after.score)
    asked = token_log_probs(*tensors[:2], tensors[3].clamp(min=0), backend=chosen)
    assert torch.equal(token_log_probs(*tensors[:2], tensors[3].clamp(min=0)), asked)
