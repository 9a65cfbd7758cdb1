"""bench_crop_resize: that peers do the same work, what it counts, and what it refuses."""

import csv
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench_crop_resize as bench

CPU = torch.device("cpu")


def case(variant: str = "bicubic", dtype: torch.dtype = torch.uint8) -> bench.Case:
    return bench.Case(variant, (5, 40, 24), dtype, CPU)


@pytest.mark.parametrize("dtype", bench.DTYPES.values())
@pytest.mark.parametrize("variant", bench.VARIANTS)
def test_implementations_agree_with_fp64(variant, dtype):
    x = case(variant, dtype).inputs(torch.Generator().manual_seed(1))
    truth = bench.true_crops(case(variant, dtype), x)
    names = bench.implementations(case(variant, dtype))
    assert set(names) >= {"ours", "pil", "interpolate"}
    assert ("interpolate_u8" in names) == (dtype == torch.uint8)
    for name in names:
        assert bench.error(name, bench.IMPLEMENTATIONS[name](case(variant, dtype))(x), truth) <= 1


@pytest.mark.parametrize("change", [1.0001, math.nan])
def test_wrong_results_are_refused(change, monkeypatch):
    right = bench.ours(case())
    monkeypatch.setitem(bench.IMPLEMENTATIONS, "ours", lambda _: lambda x: right(x) * change)
    with pytest.raises(RuntimeError, match=r"^ours .* times the error that is allowed: no row"):
        bench.bench(case(), 1.0, min_seconds=0.0)


def test_bytes_and_flops_are_counted_by_hand():
    x = case().inputs(torch.Generator().manual_seed(1))._replace(crops=[(0, [2, 3, 32, 15])])
    moved, flops = case().work(x)
    assert moved == 3 * (30 * 12 + 24 * 24 * 4)
    # rows: 24 x 30 values of 4 taps; columns: 24 x 24 values of 4 taps stretched by 30 / 24
    assert flops == 3 * 2 * (24 * 30 * 4 + 24 * 24 * 5)
    assert case(dtype=torch.float32).work(x)[0] - moved == 3 * 30 * 12 * 3


def test_the_command_measures_each_row_once(tmp_path, capsys):
    out = tmp_path / "rows.csv"
    options = ["--device", "cpu", "--shape", "2x40x24", "--dtype", "u8", "--min-seconds", "0", "--out", str(out)]
    bench.main(options)
    assert "best " in capsys.readouterr().out
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["variant"], row["shape"], row["dtype"]) for row in rows] == [
        ("bicubic", "2x40x24", "u8"),
        ("bilinear", "2x40x24", "u8"),
    ]
    for row in rows:
        peers = [
            float(row[f"{name}_us"]) for name in ("pil", "interpolate", "interpolate_u8", "kornia") if row[f"{name}_us"]
        ]
        assert float(row["speedup_best"]) == pytest.approx(min(peers) / float(row["median_us"]), abs=0.01)
    bench.main(options)
    assert "holds all 2 rows of this commit already" in capsys.readouterr().out
