"""The bench harness: what it times, what it counts, and what it refuses."""

import csv
import importlib
import math
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from mtedit_fast import cli_bench

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_sde_step as bench  # noqa: E402
import bench_update  # noqa: E402
import harness  # noqa: E402
import record  # noqa: E402
import update_setup  # noqa: E402
from peers import update_loop  # noqa: E402

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


def test_a_summary_is_median_and_percentiles():
    values = [3.0, 1.0, 4.0, 1.5, 9.0]
    assert harness.summary(values) == pytest.approx(np.quantile(values, [0.5, 0.2, 0.8]))
    assert harness.summary([2.0]) == (2.0, 2.0, 2.0)


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


@pytest.mark.parametrize(
    "op", ["sde_step", "nft_loss", "digit_score", "attention_columns", "token_similarity", "crop_resize"]
)
def test_input_sets_take_no_more_memory_than_their_number_allows_for(op):
    """There are as many as fill a cache by the bytes that a call reads: what it does not read would fill the memory."""
    ops = importlib.import_module(f"bench_{op}").BENCH
    for variant in ops.variants:
        one = ops.case(variant, ops.small, torch.float32, CPU)
        tensors = [x for x in one.inputs(torch.Generator().manual_seed(0)) if isinstance(x, torch.Tensor)]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
        assert sum(storages.values()) <= 8 * one.bytes, variant


def test_rows_are_appended_under_one_header(tmp_path):
    row = bench.bench(case(), 1.0, graph=False, compile=False, min_seconds=0.0)
    path = tmp_path / "new" / "rows.csv"
    record.append(path, row)
    record.append(path, row)
    lines = path.read_text().splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("date,commit,device,threads,")
    assert record.holds(record.read(path), vars(row))
    assert not record.holds(record.read(path), vars(row) | {"variant": "another"})
    assert record.holds(record.read(path), {"commit": row.commit, "op": "sde_step"})


def test_files_of_another_version_are_set_aside_and_read(tmp_path, capsys):
    row = bench.bench(case(), 1.0, graph=False, compile=False, min_seconds=0.0)
    path = tmp_path / "rows.csv"
    for n in (1, 2):
        path.write_text(f"op,device,variant\nolder,cpu,{n}\n")
        record.append(path, row)
        assert f"rows.csv has other columns than this version writes: it is rows.{n}.csv now" in capsys.readouterr().out
    found = [(row["file"], row["op"], row["variant"]) for row in record.read_all(tmp_path, "rows")]
    assert found == [("rows.1.csv", "older", "1"), ("rows.2.csv", "older", "2"), ("rows.csv", "sde_step", "sample")]
    (tmp_path / "study.csv").write_text("seed,gain\n1,2\n")
    assert {row["file"] for row in record.read_all(tmp_path)} == {"rows.1.csv", "rows.2.csv", "rows.csv"}


def test_the_command_measures_each_row_once(tmp_path, capsys):
    out = tmp_path / "rows.csv"
    options = "--device cpu --shape 2x33x5 --dtype bf16 --variant replay --variant seed --min-seconds 0 --no-compile"
    bench.main([*options.split(), "--out", str(out)])
    assert " GB/s of a copy" in capsys.readouterr().out
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


def small(device: torch.device, dtype: torch.dtype = torch.float32) -> update_setup.Case:
    """4 trajectories of one turn, 2 noise levels and 2 stored steps."""
    return update_setup.Case("tiny", dtype, device, 1, 4, 1, 3, 2, 2, 2, 3, (3, 8), 2)


@pytest.fixture(scope="module")
def setup() -> update_setup.Setup:
    return update_setup.Setup(small(CPU))


def update_rows(setup: update_setup.Setup, group: str) -> dict[str, bench_update.Row]:
    rows = {row.backend: row for row in bench_update.bench(setup, group, min_seconds=0.0)}
    assert all(row.error <= 1 for row in rows.values())
    for row in rows.values():
        assert row.baseline_us == rows[row.baseline].median_us
        assert row.speedup == pytest.approx(row.baseline_us / row.median_us, abs=1e-3)
        assert row.baseline_peak_bytes == rows[row.baseline].peak_bytes
    return rows


def test_nft_updates_agree_with_the_published_loop_and_skip_what_they_can(setup):
    rows = update_rows(setup, "nft")
    counts = {name: (row.grad_rows, row.no_grad_rows) for name, row in rows.items()}
    assert counts == {
        "serial both": (8, 16),
        "both": (8, 16),
        "serial old": (8, 16),
        "old": (8, 8),
        "serial neither": (8, 16),
        "neither": (8, 0),
    }
    velocity = 3 * 16 * 64 * 4  # the loss keeps its four; the published one keeps three of that size
    assert all(row.peak_bytes <= row.baseline_peak_bytes + 1.01 * velocity for row in rows.values())


def test_compacted_updates_agree_with_masked_ones_on_fewer_rows(setup):
    rows = update_rows(setup, "compaction")
    assert [rows[f"compact {percent} %"].grad_rows for percent in (0, 25, 50, 75)] == [8, 6, 4, 2]
    assert all(rows[f"masked {percent} %"].grad_rows == 8 for percent in (0, 25, 50, 75))


def test_batched_replay_agrees_with_the_exact_one_and_reports_its_drift(setup):
    rows = update_rows(setup, "grpo")
    assert [(name, row.forward_rows) for name, row in rows.items()] == [
        ("exact", 2),
        ("batched 3", 3),
        ("batched 8", 8),
    ]
    assert rows["exact"].log_prob_drift == 0
    assert all(0 <= row.log_prob_drift < 1e-5 for row in rows.values())


def test_an_update_with_another_gradient_is_refused(setup, monkeypatch):
    right = update_loop.published_nft
    monkeypatch.setattr(update_loop, "published_nft", lambda *args, **options: 1.01 * right(*args, **options))
    with pytest.raises(RuntimeError, match=r"^nft, both: gradient .* times as far from that of serial both .*: no row"):
        bench_update.bench(setup, "nft", min_seconds=0.0)


def test_fp8_names_what_it_needs(setup, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        bench_update.main(["--device", "cpu", "--fp8"])
    assert "--fp8: expected a GPU, got --device cpu" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ImportError, match=r"^--fp8 needs torchao: pip install 'mtedit-fast\[fp8\]'"):
        setup.low_precision  # noqa: B018


def test_the_update_command_measures_each_group_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_update, "tiny", small)
    options = "--device cpu --dtype bf16 --only grpo --forward-rows 5 --min-seconds 0"
    arguments = [*options.split(), "--out", str(tmp_path / "a")]
    bench_update.main(arguments)
    assert "x of exact (" in capsys.readouterr().out
    with (tmp_path / "a").open(newline="") as file:
        rows = [(row["variant"], row["shape"], row["dtype"], row["backend"]) for row in csv.DictReader(file)]
    assert rows == [("tiny grpo", "1x4x1x48 by 5", "bf16", name) for name in ("exact", "batched 3", "batched 8")]
    bench_update.main(arguments)
    assert "holds all 1 rows of this commit already" in capsys.readouterr().out


def test_the_full_size_is_a_512_pixel_edit_of_one_group():
    case = bench_update.full(CPU)
    assert (case.dtype, case.group_size, case.side) == (torch.bfloat16, 16, 512)
    assert case.shape == "1x16x1x2560 by 2"  # 512² and its reference, 2 · 32² tokens, and 512 of text


@pytest.fixture
def command() -> typer.Typer:
    app = typer.Typer()
    app.callback()(lambda: None)  # a command of its own name, as in `mtedit-fast bench`
    cli_bench.add_bench(app)
    return app


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """With one bench, which imports its neighbour and prints how it was called, and one that cannot be imported."""
    (tmp_path / "neighbour_of_bench.py").write_text("VALUE = 7\n")
    (tmp_path / "bench_one.py").write_text(
        "import sys\nimport neighbour_of_bench\n"
        "if __name__ == '__main__':\n    print(neighbour_of_bench.VALUE, sys.argv)\n"
    )
    (tmp_path / "bench_two.py").write_text("import no_such_module_anywhere\n")
    monkeypatch.setattr(cli_bench, "BENCHMARKS", tmp_path)
    return tmp_path


def test_the_command_lists_the_benches(command):
    lines = dict(line.split(": ") for line in CliRunner().invoke(command, ["bench"]).output.splitlines())
    assert lines["benches"].split() == sorted(path.stem[len("bench_") :] for path in BENCHMARKS.glob("bench_*.py"))
    assert "rollout" in lines["suites"].split()
    assert lines["results"] == "report tables"


@pytest.mark.parametrize("arguments", [[], ["--size", "1024", "value"], ["--help"], ["-x", "--", "y"]])
def test_the_command_hands_everything_after_the_name_to_the_bench(command, folder, arguments):
    before = sys.argv, list(sys.path)
    result = CliRunner().invoke(command, ["bench", "one", *arguments])
    assert result.exit_code == 0, result.exception
    assert result.output == f"7 {[str(folder / 'bench_one.py'), *arguments]}\n"
    assert (sys.argv, sys.path) == before
    sys.modules.pop("neighbour_of_bench")


def test_the_command_says_what_is_missing(command, folder, monkeypatch):
    with pytest.raises(ValueError, match=r"^bench: expected one of ops, .*, all, one, two, report, tables, got 'th"):
        CliRunner().invoke(command, ["bench", "three"], catch_exceptions=False)
    with pytest.raises(ImportError, match=r"^bench two: .*no_such_module_anywhere.*; pip install -e '\.\[dev\]'"):
        cli_bench.run_bench("two", [])
    monkeypatch.setattr(cli_bench, "BENCHMARKS", folder / "nowhere")
    for arguments in (["bench"], ["bench", "one"]):
        with pytest.raises(FileNotFoundError, match="nowhere: they are not part of the installed package"):
            CliRunner().invoke(command, arguments, catch_exceptions=False)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("all --list", "suites.py all --list"),
        ("rollout", "suites.py rollout"),
        ("rollout --device cuda --results=here --fresh", "suites.py rollout --device cuda --results=here --fresh"),
        ("rollout --editor klein --device cpu", "bench_rollout.py --editor klein --device cpu"),
        ("rollout --help", "bench_rollout.py --help"),
        ("ops --help", "suites.py ops --help"),
        ("sde_step --device cpu", "bench_sde_step.py --device cpu"),
        ("report --compare a b", "report.py --compare a b"),
        ("tables --check README.md", "tables.py --check README.md"),
    ],
)
def test_a_name_is_a_suite_where_all_options_are_a_suites(arguments, expected):
    name, *rest = arguments.split()
    assert " ".join(cli_bench.script(name, rest)) == expected


def test_the_commands_own_help_comes_before_the_name(command):
    assert "bench rollout" in CliRunner().invoke(command, ["bench", "--help"]).output
