"""The bench of `nft_loss` and `crd_loss`: its peers compute the same, it counts right, and it refuses wrong results."""

import csv
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench_nft_loss as bench

CPU = torch.device("cpu")


def case(variant: str, dtype: torch.dtype = torch.float32) -> bench.Case:
    return bench.Case(variant, (6, 7, 65), dtype, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", bench.VARIANTS)
@pytest.mark.parametrize("name", ["ours", "eager"])
def test_implementations_agree_with_fp64(name: str, variant: str, dtype: torch.dtype) -> None:
    x = case(variant, dtype).inputs(torch.Generator().manual_seed(1))
    result = bench.IMPLEMENTATIONS[name](case(variant, dtype))(x)
    assert bench.error(case(variant, dtype), result, x, roundings=bench.ROUNDINGS[name]) <= 1


@pytest.mark.parametrize("variant", ["nft_kl", "crd"])
def test_the_compiled_peer_agrees_with_fp64(variant: str) -> None:
    x = case(variant).inputs(torch.Generator().manual_seed(1))
    assert bench.error(case(variant), bench.compiled(case(variant))(x), x) <= 1


@pytest.mark.parametrize("field", bench.Result._fields)
@pytest.mark.parametrize("value", [1.001, math.nan])
def test_wrong_results_are_refused(field: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench.ours(case("nft"))

    def wrong(x: bench.Inputs) -> bench.Result:
        result = right(x)
        return result._replace(**{field: getattr(result, field) * value})

    monkeypatch.setitem(bench.IMPLEMENTATIONS, "ours", lambda _: wrong)
    with pytest.raises(RuntimeError, match=r"^ours .* times the error that is allowed: no row"):
        bench.bench(case("nft"), 1.0, graph=False, compile=False, min_seconds=0.0)


def test_bytes_and_flops_are_counted_by_hand() -> None:
    elements = 6 * 7 * 65
    assert [case(variant).bytes // elements for variant in bench.VARIANTS] == [28, 36, 20, 24]
    assert case("nft", torch.bfloat16).bytes == 14 * elements
    assert [case(variant).flops // elements for variant in bench.VARIANTS] == [16, 22, 6, 10]


def test_the_command_measures_each_row_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.csv"
    options = "--device cpu --shape 4x33x5 --dtype bf16 --variant nft --variant crd --min-seconds 0 --no-compile"
    bench.main([*options.split(), "--out", str(out)])
    with out.open(newline="") as file:
        found = [(row["op"], row["variant"], row["backend"]) for row in csv.DictReader(file)]
    assert found == [("nft_loss", "nft", "cpp"), ("crd_loss", "crd", "cpp")]
    bench.main([*options.split(), "--out", str(out)])
    assert "holds all 2 rows of this commit already" in capsys.readouterr().out
