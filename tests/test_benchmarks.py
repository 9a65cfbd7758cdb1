"""The bench harness: what it times, what it counts, and what it refuses."""

import csv
import math
import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_sde_step as bench  # noqa: E402
import harness  # noqa: E402

CPU = torch.device("cpu")


def case(variant: str = "sample", dtype: torch.dtype = torch.float32) -> bench.Case:
    return bench.Case(variant, (3, 7, 5), dtype, CPU)


def inputs(variant: str, dtype: torch.dtype) -> bench.Inputs:
    return case(variant, dtype).inputs(torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", bench.VARIANTS)
@pytest.mark.parametrize("name", ["ours", "eager"])
def test_implementations_agree_with_fp64(name, variant, dtype):
    x = inputs(variant, dtype)
    result = bench.IMPLEMENTATIONS[name](case(variant, dtype))(x)
    assert bench.error(case(variant, dtype), result, x, own_noise=name == "eager" and variant == "seed") <= 1


def test_the_compiled_peer_agrees_with_fp64():
    x = inputs("backward", torch.float32)
    result = bench.IMPLEMENTATIONS["compile"](case("backward"))(x)
    assert bench.error(case("backward"), result, x) <= 1


@pytest.mark.parametrize("field", ["prev_sample", "log_prob", "grad"])
@pytest.mark.parametrize("value", [1.001, math.nan])
def test_wrong_results_are_refused(field, value, monkeypatch):
    variant = "sample" if field == "prev_sample" else "backward"
    right = bench.ours(case(variant))

    def wrong(x: bench.Inputs) -> bench.Result:
        result = right(x)
        return result._replace(**{field: getattr(result, field) * value})

    monkeypatch.setitem(bench.IMPLEMENTATIONS, "ours", lambda _: wrong)
    with pytest.raises(RuntimeError, match=r"^ours .* times the error that is allowed: no row"):
        bench.bench(case(variant), 1.0, graph=False, compile=False, min_seconds=0.0)


def test_a_changed_replay_is_refused():
    x = inputs("replay", torch.float32)
    result = bench.ours(case("replay"))(x)
    assert bench.error(case("replay"), result._replace(prev_sample=x.sample), x) == math.inf


def test_bytes_and_flops_are_counted_by_hand():
    elements = 3 * 7 * 5
    assert case("sample").bytes == 4 * elements * 4
    assert case("sample", torch.bfloat16).bytes == 2 * elements * 4
    assert case("seed").bytes == case("replay").bytes == 4 * elements * 3
    assert case("backward").bytes == 4 * elements * 7
    assert [case(variant).flops // elements for variant in bench.VARIANTS] == [8, 8, 6, 12]


def test_a_row_follows_from_its_times():
    row = bench.bench(case(), 2.0, graph=False, compile=False, min_seconds=0.0)
    assert (row.op, row.variant, row.shape, row.dtype, row.timing) == ("sde_step", "sample", "3x7x5", "fp32", "call")
    assert row.p20_us <= row.median_us <= row.p80_us
    assert row.gb_per_s == pytest.approx(row.bytes / row.median_us / 1e3, abs=1e-3)
    assert row.percent_of_copy == pytest.approx(50 * row.bytes / row.median_us / 1e3, abs=0.1)
    assert row.speedup_eager == pytest.approx(row.eager_us / row.median_us, abs=0.01)
    assert row.compile_us is None
    assert row.speedup_compile is None
    assert row.error <= 1
    assert row.torch == torch.__version__


def test_times_are_microseconds_per_call_and_peers_take_turns():
    seen = []

    def call(name: str, i: int, seconds: float) -> None:
        seen.append((name, i))
        time.sleep(seconds)

    peers = {name: [partial(call, name, i, seconds) for i in range(3)] for name, seconds in (("a", 1e-3), ("b", 4e-3))}
    times = harness.measure(peers, CPU, min_seconds=0.0)
    assert seen[:6] == [(name, i) for name in "ab" for i in range(3)]
    assert seen[6:] == [(name, i % 3) for i in range(20) for name in "ab"]
    for name, least in (("a", 1000), ("b", 4000)):
        assert least <= times[name].p20 <= times[name].median <= times[name].p80


def test_inputs_rotate_past_the_cache():
    cache = harness.cache_bytes(CPU)
    assert harness.rotations(1 << 40, CPU) == 2
    assert harness.rotations(1, CPU) <= 1000
    size = 16 << 20
    assert harness.rotations(size, CPU) * size >= min(2 * cache, 1 << 30)


def test_rows_are_appended_under_one_header(tmp_path):
    row = bench.bench(case(), 1.0, graph=False, compile=False, min_seconds=0.0)
    path = tmp_path / "new" / "rows.csv"
    harness.append(path, row)
    harness.append(path, row)
    lines = path.read_text().splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("date,commit,device,threads,")
    assert set(harness.measured(path)) == {harness.identity(vars(row))}
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has other columns than this version writes: move it away"):
        harness.append(path, row)
    assert path.read_text() == "a,b\n1,2\n"


def test_the_command_measures_each_row_once(tmp_path, capsys):
    out = tmp_path / "rows.csv"
    options = "--device cpu --shape 2x33x5 --dtype bf16 --variant replay --variant seed --min-seconds 0 --no-compile"
    bench.main([*options.split(), "--out", str(out)])
    assert " GB/s read + written" in capsys.readouterr().out
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["variant"], row["shape"], row["dtype"], row["timing"]) for row in rows] == [
        ("replay", "2x33x5", "bf16", "call"),
        ("seed", "2x33x5", "bf16", "call"),
    ]
    for row in rows:
        assert row["compile_us"] == ""
        assert float(row["eager_us"]) > 0
        assert 0.1 < float(row["copy_gb_per_s"]) < 10_000
    bench.main([*options.split(), "--out", str(out)])
    assert "holds all 2 rows of this commit already" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_the_gpu_session_needs_a_gpu(tmp_path):
    out = tmp_path / "results"
    session = subprocess.run(
        [BENCHMARKS / "gpu_session.sh"],
        env=os.environ | {"PYTHON": sys.executable, "OUT": str(out)},
        capture_output=True,
        text=True,
    )
    assert session.returncode == 1
    assert "sees no CUDA GPU through torch: nothing was run" in session.stderr
    assert not out.exists()


def test_the_gpu_session_names_files_that_exist():
    script = (BENCHMARKS / "gpu_session.sh").read_text()
    named = set(re.findall(r"(?:tests|benchmarks)/\w+\.py", script))
    assert len(named) >= 5
    assert all((BENCHMARKS.parent / path).is_file() for path in named)
