"""The bench of `digit_score`: its peers compute the same, it counts right, and it refuses wrong results."""

import csv
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench_digit_score as bench
import harness

CPU = torch.device("cpu")


def case(variant: str, dtype: torch.dtype = torch.float32) -> bench.Case:
    return bench.Case(variant, (6, 16, 300), dtype, CPU)


def errors(one: bench.Case, names: list[str]) -> dict[str, float]:
    x = one.inputs(torch.Generator().manual_seed(1))
    exact = bench.truth(one, x)
    return {name: bench.error(name, one, bench.IMPLEMENTATIONS[name](one)(x), exact) for name in names}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", bench.VARIANTS)
def test_implementations_agree_with_fp64(variant: str, dtype: torch.dtype) -> None:
    one = case(variant, dtype)
    names = [name for name in bench.implementations(one) if name != "compile"]
    assert names[:2] == ["ours", "eager"]
    assert ("chunked" in names) == (variant.startswith("log_probs") and bench.chunked_cross_entropy is not None)
    assert all(found <= 1 for found in errors(one, names).values())


def test_the_compiled_peer_agrees_with_fp64() -> None:
    assert errors(case("vocab"), ["compile"])["compile"] <= 1


@pytest.mark.parametrize("part", ["values", "grads"])
@pytest.mark.parametrize("value", [1.01, math.nan])
def test_wrong_results_are_refused(part: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench.ours(case("vocab_backward"))

    def wrong(x: bench.Inputs) -> bench.Result:
        result = right(x)
        return result._replace(**{part: tuple(tensor * value for tensor in getattr(result, part))})

    monkeypatch.setitem(bench.IMPLEMENTATIONS, "ours", lambda _: wrong)
    with pytest.raises(RuntimeError, match=r"^ours .* times the error that is allowed: no row"):
        bench.bench(case("vocab_backward"), 1.0, graph=False, compile=False, min_seconds=0.0)


def test_bytes_and_flops_are_counted_by_hand() -> None:
    whole, few = 306 * 16 * 4, 16 * 16 * 4
    assert [case(variant).bytes for variant in bench.VARIANTS] == [few, whole, 3 * whole, whole, 3 * whole]
    assert case("vocab", torch.bfloat16).bytes == whole // 2
    product = 2 * 6 * 16 * 300
    assert [case(variant).flops for variant in bench.VARIANTS][1:] == [product, 3 * product, product, 3 * product]
    assert case("set").flops == 2 * 6 * 16 * 10


def test_extra_memory_is_what_a_call_takes() -> None:
    assert 60 << 20 < harness.extra_bytes(lambda: torch.ones(16 << 20).sum(), CPU) < 90 << 20


def test_the_command_measures_each_row_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.csv"
    options = "--device cpu --shape 4x8x50 --dtype bf16 --variant set --variant log_probs --min-seconds 0 --no-compile"
    bench.main([*options.split(), "--out", str(out)])
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["op"], row["variant"], row["backend"]) for row in rows] == [
        ("digit_score", "set", "reference"),
        ("token_log_probs", "log_probs", "reference"),
    ]
    assert [row["chunked_us"] != "" for row in rows] == [False, bench.chunked_cross_entropy is not None]
    assert all(row["liger_us"] == row["cut_us"] == row["fused_us"] == row["crossover"] == "" for row in rows)
    bench.main([*options.split(), "--out", str(out)])
    assert "holds all 2 rows of this commit already" in capsys.readouterr().out


class Made(TorchDispatchMode):
    """Tensors made of Python numbers: on a GPU each would be copied there, and waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.lift_fresh.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", bench.VARIANTS)
def test_the_eager_form_copies_nothing_to_the_device(variant: str) -> None:
    one = case(variant)
    x, run = one.inputs(torch.Generator().manual_seed(1)), bench.eager(one)
    with Made() as made:
        run(x)
    assert made.count == 0
    with made:
        x.weight[bench.IDS]
    assert made.count == 1
