"""The report's page, the pictures, the Pareto front and the leaderboard."""

import json
import random

import numpy as np
import pytest
import torch

from mtedit_fast.edival.plots import chain_grid, pareto, pareto_front, share_bars, turn_lines
from mtedit_fast.edival.report import PUBLISHED, leaderboard, read_scores, write_leaderboard, write_report
from mtedit_fast.edival.statistics import ChainScores, overall, summarize
from mtedit_fast.figures import BAD, GOOD, LIGHT


def chain(index, verdicts, consistency, quality=None):
    k = len(verdicts)
    return ChainScores(
        index,
        ["subject_add", "color_alter", "count_change"][:k],
        [f"Add <b>{t}</b>" for t in range(k)],
        verdicts,
        ["found & seen"] * k,
        consistency,
        consistency,
        consistency,
        quality or [None] * k,
    )


def evaluated(folder, chains, name="mine", **extra):
    folder.mkdir(parents=True, exist_ok=True)
    report = {"name": name, **summarize(chains), "skipped": [], "settings": {"detector": "x"}, **extra}
    (folder / "report.json").write_text(json.dumps(report))
    lines = ["{}", *(json.dumps(vars(one)) for one in chains)]
    (folder / "verdicts.jsonl").write_text("\n".join(lines) + "\n")
    return report


CHAINS = [
    chain("a", [True, True, True], [0.9, 0.8, 0.7], [9.0, 8.0, 7.0]),
    chain("b", [True, False, True], [0.9, 0.8, None], [9.0, 8.0, 5.0]),
    chain("c", [None, True, False], [0.9, None, None], [9.0, 8.0, 6.0]),
]


def test_page(tmp_path):
    evaluated(tmp_path, CHAINS, name="a <name>", oracle=[0.5, 0.25, 0.125], skipped=[{"row": 3, "reason": "x < y"}])
    images = {one.image_index: torch.rand(4, 3, 16, 24) for one in CHAINS[:2]}  # c's are gone
    page = write_report(tmp_path, images).read_text()
    assert "EdiVal · a &lt;name&gt;" in page
    assert page.count("<section>") == 5
    assert "Add &lt;b&gt;0&lt;/b&gt;" in page
    assert "<b>0</b>" not in page
    assert "found &amp; seen" in page
    assert "row 3 skipped<td>x &lt; y" in page
    assert "12.5" in page
    assert "7.000" in page or "6.000" in page  # VQ is no percentage
    without = write_report(tmp_path).read_text()
    assert without.count("<section>") == 4
    assert "http" not in without.replace("http-equiv", "")  # nothing is loaded from elsewhere


def test_page_of_nothing(tmp_path):
    evaluated(tmp_path, [])
    assert "No chain could be evaluated" in write_report(tmp_path, {}).read_text()
    evaluated(tmp_path, [chain("a", [None], [None])])
    assert "–" in write_report(tmp_path).read_text()
    with pytest.raises(ValueError, match=r"report\.json: missing; expected the output folder of"):
        write_report(tmp_path / "nowhere")


def test_scores_are_read_back(tmp_path):
    evaluated(tmp_path, CHAINS)
    with (tmp_path / "verdicts.jsonl").open("a") as file:
        file.write('{"image_index": "d"')
    assert read_scores(tmp_path / "verdicts.jsonl") == CHAINS


def test_pareto_front_against_brute_force():
    generator = random.Random(0)
    for d in (1, 2, 3):
        points = [[generator.randrange(6) for _ in range(d)] for _ in range(40)]  # with ties
        expected = [
            not any(
                all(a >= b for a, b in zip(q, p, strict=True)) and any(a > b for a, b in zip(q, p, strict=True))
                for q in points
            )
            for p in points
        ]
        assert pareto_front(points) == expected
    assert pareto_front([]) == []


def test_pareto_plot_draws_what_is_known():
    systems = {
        "a": {"IF": 50.0, "CC": 60.0},
        "b": {"IF": 40.0, "CC": 50.0},
        "c": {"IF": 10.0, "CC": 90.0},
        "d": {"IF": 1.0},
    }
    figure = pareto(LIGHT, systems, [("IF", "CC")], ["c"])
    (axis,) = figure.axes[:1]
    assert [text.get_text() for text in axis.texts] == ["a", "b", "c"]
    (front,) = axis.lines
    assert np.array(front.get_data()).T.tolist() == [[10, 90], [50, 60]]


def test_turn_lines_and_bars_show_the_figures():
    report = summarize(CHAINS)
    (axis,) = turn_lines(LIGHT, report["per_turn"], {"consistency": "CC", "overall": "O"}).axes
    np.testing.assert_allclose(axis.lines[0].get_ydata(), [90, 80, 70])
    means = [100 * line["overall"]["mean"] for line in report["per_turn"]]
    np.testing.assert_allclose(axis.lines[1].get_ydata(), means)
    (axis,) = share_bars(LIGHT, report["per_type"]).axes
    np.testing.assert_allclose([bar.get_height() for bar in axis.patches], [200 / 3, 200 / 3, 100], atol=1e-9)


def test_bars_of_full_success_at_any_count():
    chains = [chain(str(i), [True], [1.0]) for i in range(60)]
    shares = {str(n): summarize(chains[:n], resamples=1)["per_turn"][0]["marginal"] for n in range(1, 61)}
    assert any(share["high"] < share["mean"] for share in shares.values())  # by rounding
    assert len(share_bars(LIGHT, shares).axes) == 1


def test_chain_grid_marks_verdicts():
    def colour(hexadecimal):
        return tuple(int(hexadecimal[i : i + 2], 16) for i in (1, 3, 5))

    chains = [torch.zeros(3, 3, 10, 10), torch.zeros(3, 3, 20, 10)]
    grid = np.array(chain_grid(chains, [["one", "two"]] * 2, [[True, False], [None, True]], ["a", "b"], cell=60))
    frames = {}
    for name, hexadecimal in (("good", GOOD), ("bad", BAD)):
        shown = (grid == colour(hexadecimal)).all(-1)
        frames[name] = [bool(half.any()) for half in np.array_split(shown, 2)]
    assert frames == {"good": [True, True], "bad": [True, False]}


def test_leaderboard(tmp_path):
    full = [chain(str(i), [True, True, i % 4 > 0], [0.95, 0.9, 0.85]) for i in range(40)]
    evaluated(tmp_path / "one", full, name="one")
    evaluated(tmp_path / "two", CHAINS, name="<two>")
    rows = leaderboard([tmp_path / "one", tmp_path / "two"])
    assert [row["O"] for row in rows] == sorted((row["O"] for row in rows), reverse=True)
    assert len(rows) == 2 + len(PUBLISHED)
    one = next(row for row in rows if row["name"] == "one")
    assert one["O"] == pytest.approx(100 * overall(0.75, 0.85))
    assert (one["IF"], one["CC"]) == (pytest.approx(75), pytest.approx(85))
    assert "VQ" not in one
    assert next(row for row in rows if row["name"] == "<two>")["VQ"] == pytest.approx(6.0)
    assert rows[0]["name"] == "one"
    assert rows[1] == {"name": "Seedream 4.0", "published": True, "O": 59.76}
    first = leaderboard([tmp_path / "one"], turn=1)
    assert [(row["name"], row["IF"]) for row in first] == [("one", 100.0)]
    page = write_leaderboard([tmp_path / "one", tmp_path / "two"], tmp_path / "pages/board.html").read_text()
    assert "&lt;two&gt;" in page
    assert "Seedream 4.0 (published)" in page
    assert "<img" in page
    evaluated(tmp_path / "toy", full, settings={"detector": "playground oracle"})
    assert len(leaderboard([tmp_path / "one", tmp_path / "toy"])) == 2  # the tiny world is no match for photographs
    with pytest.raises(ValueError, match=r"turn must be in 1\.\.3 for .*one, got 4"):
        leaderboard([tmp_path / "one"], turn=4)


def test_published_figures_agree_with_the_definition():
    for values in PUBLISHED.values():
        if "IF" in values:
            assert values["O"] == pytest.approx(100 * overall(values["IF"] / 100, values["CC"] / 100), abs=0.01)


def test_leaderboard_without_consistency(tmp_path):
    evaluated(tmp_path, [chain("a", [True, True, True], [None] * 3)], name="only IF")
    rows = leaderboard([tmp_path])
    assert rows[-1] == {"name": "only IF", "published": False, "IF": 100.0}
    assert "only IF" in write_leaderboard([tmp_path], tmp_path / "board.html").read_text()
