"""What is made of the rows of results files: a page, and tables in Markdown."""

import csv
import sys
from itertools import product
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import record  # noqa: E402
import report  # noqa: E402
import tables  # noqa: E402

from mtedit_fast.figures import LIGHT  # noqa: E402


def row(**changes: object) -> dict[str, str]:
    """Ours takes 10 µs, eager code 20, a compiled one 5."""
    columns = {
        "date": "2026-01-01T00:00Z", "commit": "aaaa1111", "device": "NVIDIA H200", "threads": 2, "python": "3.11",
        "torch": "2.13", "triton": "", "op": "sde_step", "variant": "sample", "shape": "8x4", "dtype": "fp32",
        "backend": "triton", "timing": "graph", "median_us": 10.0, "p20_us": 9.5, "p80_us": 10.5, "bytes": 1000,
        "flops": 500, "gb_per_s": 0.1, "gflop_per_s": 0.05, "copy_gb_per_s": 0.2, "percent_of_copy": 50.0,
        "eager_us": 20.0, "compile_us": 5.0, "speedup_eager": 2.0, "speedup_compile": 0.5, "error": 0.1,
    }  # fmt: skip
    return {name: str(value) for name, value in (columns | changes).items()}


def write(path: Path, *rows: dict[str, str]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_rows_that_do_not_repeat_are_flagged():
    one, two = row(), row(date="2026-01-02", median_us=12.0, p20_us=11.5, p80_us=12.0)
    assert report.repeats([two, one]) == [(one, two)]
    assert report.repeats([one, two | {"p80_us": "14"}]) == []  # within the spread of the second
    assert report.repeats([one, two | {"commit": "bbbb"}]) == []
    assert report.repeats([one, two | {"p20_us": ""}]) == []
    assert report.twice([two, one, two | {"commit": "bbbb"}]) == [(one, two)]
    assert report.ratios_apart([one, two]) == [pytest.approx(0.2)]  # 5 / 10 against 5 / 12
    assert report.ratios_apart([one, two | {"eager_us": "", "compile_us": ""}]) == []
    assert report.spread(one) == 1.0
    assert report.median({"median_s": "2.5"}) == report.median({"measured_s": "2.5"}) == 2.5e6
    assert report.median({"error": "1"}) is None
    assert report.spread({"p20_s": "2.25", "p80_s": "2.5"}) == 0.25e6
    assert report.speedups(one) == {"eager": 2.0, "torch.compile": 0.5}
    assert report.over_fastest_peer(one) == "0.50×"
    assert report.over_fastest_peer({"median_us": "1"}) == ""


def test_commits_and_devices_are_compared_row_by_row():
    rows = [
        row(),
        row(commit="bbbb2222", median_us=5.0, date="2026-01-02"),
        row(commit="bbbb2222", device="NVIDIA A100", median_us=30.0, date="2026-01-03"),
        row(commit="bbbb2222", variant="seed"),
    ]
    assert report.compared(rows, "aaaa", "bbbb") == [(rows[0], rows[1])]
    pairs = report.compared(rows, "a100", "H200")
    assert [(one["device"], two["median_us"]) for one, two in pairs] == [("NVIDIA A100", "5.0")]
    with pytest.raises(ValueError, match=r"^--compare: expected commits or devices out of NVIDIA A100, .*; got 'cccc'"):
        report.compared(rows, "aaaa", "cccc")


def test_files_of_other_versions_are_read_and_marked(tmp_path):
    older = {name: value for name, value in row(extra=1).items() if name != "error"}
    write(tmp_path / "sde_step.csv", row())
    write(tmp_path / "sde_step.1.csv", older)
    rows = record.read_all(tmp_path)
    assert report.other_versions(rows) == {"sde_step.1.csv": "lacks error; has besides extra"}
    assert report.other_versions(rows, lambda file: None) == {}
    assert report.columns_now("no_such_bench.csv") is None
    written = report.write_report(tmp_path, tmp_path / "page.html").read_text()
    assert "sde_step.1.csv" in written
    assert "lacks error; has besides extra" in written


def test_the_page_has_bars_rooflines_flags_and_a_comparison(tmp_path, capsys):
    again = row(date="2026-01-02T00:00Z", median_us=20.0)
    rollout = row(op="rollout", loop_us=30.0, percent_of_matmul=40.0, matmul_tflop_per_s=700.0, copy_gb_per_s="")
    write(tmp_path / "sde_step.csv", row(), again, row(commit="bbbb2222", median_us=5.0))
    write(tmp_path / "rollout.csv", rollout)
    out = tmp_path / "new" / "page.html"
    report.main(["--results", str(tmp_path), "--out", str(out), "--compare", "aaaa", "bbbb"])
    assert str(out) in capsys.readouterr().out
    text = out.read_text()
    for expected in (
        "Rows that do not repeat", "aaaa against bbbb", "4.00×", "faster", "Roofline of single ops · NVIDIA H200",
        "Model FLOP utilisation · NVIDIA H200", "sde_step · NVIDIA H200", "<td>0.50×</td><td>0.25×</td>",
        "Measured twice on one commit: 1. Further apart than the spread of either: 1.",
        "1 such rows are 100.0 % apart in the median, and 1 more",
    ):  # fmt: skip
        assert expected in text
    with pytest.raises(SystemExit):
        report.main(["--results", str(tmp_path / "new")])
    assert "--results: no rows in " in capsys.readouterr().err


def test_figures_show_what_the_rows_say():
    axis = report.bars(LIGHT, [row(), row(compile_us="")]).axes[0]
    assert [text.get_text().strip() for text in axis.texts] == ["2.00×", "2.00×", "0.50×"]
    axis = report.roofline(LIGHT, [row(), row(op="nft_loss")], {"fp32": 3.0}).axes[0]
    assert [list(points.get_offsets()[0]) for points in axis.collections] == [[0.5, 0.05]] * 2
    (low, high) = axis.lines[0].get_xydata()
    assert low[1] / low[0] == high[1] / high[0] == 0.2
    assert list(axis.lines[1].get_ydata()) == [3.0, 3.0]
    seconds = {
        f"{side}{phase}_s": i for i, (side, phase) in enumerate(product(("", "predicted_"), ("rollout", "update")))
    }
    axis = report.predictions(LIGHT, [row(**seconds, measured_s=4.0, predicted_s=5.0)]).axes[0]
    assert [list(points.get_offsets()[0]) for points in axis.collections] == [[0, 2], [1, 3], [4, 5]]
    assert [line.get_ydata()[1] / line.get_xdata()[1] for line in axis.lines] == [1, 0.85, 1.15]
    products = report.matrix_products([row(matmul_tflop_per_s=0.7), row(matmul_gflop_per_s=900), row()])
    assert products == {"fp32": 900.0}


TEXT = "# Speed\n\n<!-- bench sde_step -->\nold\n<!-- /bench -->\n\n<!-- bench onestep -->\n<!-- /bench -->\nend\n"


def test_tables_are_filled_in_and_checked(tmp_path, capsys):
    faster = row(date="2026-01-05T00:00Z", commit="bbbb2222", median_us=2500.0, compile_us="", speedup_compile="")
    write(
        tmp_path / "sde_step.csv", row(), row(threads=1, date="2025-01-01", variant="alone"), faster, row(dtype="bf16")
    )
    page = tmp_path / "page.md"
    page.write_text(TEXT)
    options = ["--results", str(tmp_path)]
    assert tables.main([*options, "--check", str(page)]) == 1
    assert "mtedit-fast bench tables --write" in capsys.readouterr().out
    assert tables.main([*options, "--write", str(page)]) == 0
    assert tables.main([*options, "--check", str(page)]) == 0
    assert page.read_text() == (
        "# Speed\n\n<!-- bench sde_step -->\n"
        "| variant | dtype | ours | of copy bandwidth | over eager | over `torch.compile` |\n"
        "|---|---|---|---|---|---|\n"
        "| sample | bf16 | 0.01 ms | 50 % | 2.00× | 0.50× |\n"
        "| sample | fp32 | 2.5 ms | 50 % | 2.00× |  |\n"
        "\n8x4; triton; NVIDIA H200, 2 threads, torch 2.13, 2026-01-01 to 2026-01-05, `aaaa1111`, `bbbb2222`; "
        "`mtedit-fast bench sde_step`\n<!-- /bench -->\n\n"
        "<!-- bench onestep -->\nNot measured yet: `mtedit-fast bench onestep`.\n<!-- /bench -->\nend\n"
    )
    write(tmp_path / "onestep.csv", row(op="onestep", images_per_s=12345.6, device="CPU, one | two", shape="a|b"))
    assert tables.main([*options, "--check", str(page)]) == 1
    tables.main(options)
    shown = capsys.readouterr().out
    assert "| sample | 1.235e+04 |" in shown
    assert "## rollout\n\nNot measured yet: `mtedit-fast bench rollout`." in shown


def test_an_op_is_shown_with_the_back_end_that_it_takes_now(tmp_path):
    for name in ("sde_step", "adapters"):
        older, newer = row(backend="reference"), row(date="2026-02-01T00:00Z", backend="cpp")
        write(tmp_path / f"{name}.csv", older, newer)
    assert "reference" not in tables.markdown("sde_step", tmp_path)
    assert "reference" in tables.markdown("adapters", tmp_path)  # where back ends are what is compared


@pytest.mark.parametrize("text", ["no table\n", "<!-- bench nothing -->\n<!-- /bench -->\n"])
def test_unknown_tables_are_named(text, tmp_path, capsys):
    (tmp_path / "page.md").write_text(text)
    with pytest.raises(SystemExit):
        tables.main(["--write", str(tmp_path / "page.md")])
    assert "expected <!-- bench NAME --> … <!-- /bench --> with one of rollout, " in capsys.readouterr().err
    assert (tmp_path / "page.md").read_text() == text


def test_tables_name_columns_that_benches_write():
    for name, table in tables.TABLES.items():
        columns = report.columns_now(f"{name}.csv")
        assert columns is not None
        missing = [column for column, _ in table.figures.values() if column not in columns]
        assert not missing, name
        assert set(table.labels) <= set(columns)


def test_the_docs_have_the_tables_of_the_results():
    assert tables.main(["--check", str(BENCHMARKS.parent / "docs" / "performance.md")]) == 0
