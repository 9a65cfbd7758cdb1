"""The bench of `attention_columns`: its peers compute the same, it counts right, and it refuses wrong results."""

import csv
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench_attention_columns as bench

CPU = torch.device("cpu")


def case(variant: str = "backward", dtype: torch.dtype = torch.float32) -> bench.Case:
    return bench.Case(variant, (2, 3, 40, 16, 5), dtype, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", bench.VARIANTS)
def test_implementations_agree_with_fp64(variant: str, dtype: torch.dtype) -> None:
    one = case(variant, dtype)
    x = one.inputs(torch.Generator().manual_seed(1))
    for name in ("ours", "eager"):
        assert bench.error(one, name, bench.IMPLEMENTATIONS[name](one)(x), x) <= 1


def test_the_compiled_peer_agrees_with_fp64() -> None:
    x = case().inputs(torch.Generator().manual_seed(1))
    assert bench.error(case(), "compile", bench.compiled(case())(x), x) <= 1


@pytest.mark.parametrize("part", ["probabilities", "grads"])
@pytest.mark.parametrize("value", [1.01, math.nan])
def test_wrong_results_are_refused(part: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench.ours(case())

    def wrong(x: bench.Inputs) -> bench.Result:
        result = right(x)
        if part == "grads":
            return result._replace(grads=tuple(grad * value for grad in result.grads))
        return result._replace(probabilities=result.probabilities * value)

    monkeypatch.setitem(bench.IMPLEMENTATIONS, "ours", lambda _: wrong)
    with pytest.raises(RuntimeError, match=r"^ours .* times the error that is allowed: no row"):
        bench.bench(case(), 1.0, graph=False, compile=False, min_seconds=0.0)


def test_bytes_and_flops_are_counted_by_hand() -> None:
    rows, found = 2 * 2 * 3 * 40 * 16 * 4, 2 * 40 * 5 * 4
    assert [case(variant).bytes for variant in bench.VARIANTS] == [rows + found, rows + 3 * found, 3 * rows + 2 * found]
    assert case("heads", torch.bfloat16).bytes == rows // 2 + found
    product = 2 * 2 * 3 * 40 * 40 * 16
    assert [case(variant).flops for variant in bench.VARIANTS] == [product, product, 3 * product]
    assert case().matrix_bytes == 2 * 3 * 40 * 40 * 4


def test_the_command_measures_each_row_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.csv"
    options = "--device cpu --shape 1x2x512x8x3 --dtype bf16 --variant none --variant backward --min-seconds 0"
    bench.main([*options.split(), "--no-compile", "--out", str(out)])
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["op"], row["variant"], row["backend"]) for row in rows] == [
        ("attention_columns", "none", "reference"),
        ("attention_columns", "backward", "reference"),
    ]
    for row in rows:
        assert int(row["matrix_bytes"]) == 4 * 2 * 512**2
        assert int(row["eager_extra_bytes"]) >= 0
        assert row["compile_us"] == row["compile_extra_bytes"] == ""
    bench.main([*options.split(), "--no-compile", "--out", str(out)])
    assert "holds all 2 rows of this commit already" in capsys.readouterr().out
