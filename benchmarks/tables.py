"""Tables of the results, in Markdown.

mtedit-fast bench tables                         prints them all
mtedit-fast bench tables --write README.md       writes them between <!-- bench NAME --> and <!-- /bench -->
mtedit-fast bench tables --check README.md       exits 1 where those are not what the results say

A table has the newest row of each kind, by device, measured with as many threads as the newest of all. What was not
measured says so.
"""

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import record

MARKED = re.compile(r"(<!-- bench (\w+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
KEYS = ("variant", "shape", "dtype", "backend")
Figure = tuple[str, Callable[[float], str]]


def scaled(unit: str, factor: float, digits: str, value: float) -> str:
    return f"{value * factor:{digits}}{unit}"


ms, seconds = partial(scaled, " ms", 1e-3, ",.4g"), partial(scaled, " s", 1.0, ".2f")
times, percent = partial(scaled, "×", 1.0, ".2f"), partial(scaled, " %", 1.0, ".0f")
plain, mib = partial(scaled, "", 1.0, ",.4g"), partial(scaled, " MiB", 2.0**-20, ",.0f")
gigabytes = partial(scaled, " GB", 1e-9, ".2f")


@dataclass(frozen=True)
class Table:
    """figures: column and format by heading. labels: columns that tell rows apart. kind: those of which the newest row
    counts."""

    figures: Mapping[str, Figure]
    labels: Sequence[str] = KEYS
    kind: Sequence[str] = record.KIND


OP: dict[str, Figure] = {
    "ours": ("median_us", ms),
    "of copy bandwidth": ("percent_of_copy", percent),
    "over eager": ("speedup_eager", times),
    "over `torch.compile`": ("speedup_compile", times),
}
WHATEVER_RAN = tuple(name for name in record.KIND if name != "backend")
"""Of ops, which choose their back end: what another one took before is history."""
MEMORY: dict[str, Figure] = {"memory": ("extra_bytes", mib), "eager's": ("eager_extra_bytes", mib)}
TABLES = {
    "rollout": Table(
        {
            "images/s": ("images_per_s", plain),
            "over the stock loop": ("speedup_loop", times),
            "over full attention": ("speedup_full", times),
            "of a matrix product": ("percent_of_matmul", percent),
            "within the steps": ("percent_of_matmul_denoise", percent),
            "peak": ("peak_bytes", gigabytes),
            "largest Δ log-prob": ("log_prob_drift", plain),
        }
    ),
    "iteration": Table(
        {
            "ours": ("median_s", seconds),
            "the loop": ("loop_s", seconds),
            "faster": ("speedup", times),
            "rollout": ("speedup_rollout", times),
            "rewards": ("speedup_reward", times),
            "update": ("speedup_update", times),
            "largest Δ log-prob": ("log_prob_drift", plain),
        }
    ),
    "update": Table(
        {
            "time": ("median_us", ms),
            "over its baseline": ("speedup", times),
            "peak": ("peak_bytes", mib),
            "baseline's": ("baseline_peak_bytes", mib),
            "largest Δ log-prob": ("log_prob_drift", plain),
        }
    ),
    "plan": Table(
        {
            "predicted": ("predicted_s", seconds),
            "measured": ("measured_s", seconds),
            "apart": ("error_percent", partial(scaled, " %", 1.0, "+.1f")),
            "update's memory, predicted": ("predicted_update_bytes", mib),
            "found": ("update_bytes", mib),
            "apart by": ("error_bytes_percent", partial(scaled, " %", 1.0, "+.1f")),
        },
        ("variant",),
    ),
    "judge": Table(
        {
            "trajectories/s": ("trajectories_per_s", plain),
            "over one `generate` per score": ("speedup_one_by_one", times),
            "by the shared prefix": ("speedup_prefix", times),
            "head": ("percent_head", percent),
        }
    ),
    "consistency": Table(
        {
            "images/s": ("images_per_s", plain),
            "over the loop": ("speedup_loop", times),
            "ViT alone": ("percent_of_vit", percent),
            "of a matrix product": ("percent_of_matmul", percent),
        }
    ),
    "onestep": Table(
        {
            "images/s": ("images_per_s", plain),
            "over the teacher": ("speedup_teacher", times),
            "outside the network": ("percent_outside", percent),
            "fused preconditioning": ("speedup_preconditioning", times),
            "of a matrix product": ("percent_of_matmul", percent),
        }
    ),
    "export": Table(
        {
            "weights": ("weights_bytes", gigabytes),
            "time": ("seconds", partial(scaled, " s", 1.0, ",.0f")),
            "memory besides": ("peak_bytes", gigabytes),
            "files": ("files_bytes", gigabytes),
        },
        ("variant", "dtype", "backend"),
    ),
    "sde_step": Table(OP, kind=WHATEVER_RAN),
    "nft_loss": Table(OP, ("op", *KEYS), WHATEVER_RAN),
    "token_similarity": Table(OP, kind=WHATEVER_RAN),
    "attention_columns": Table(OP | MEMORY, kind=WHATEVER_RAN),
    "digit_score": Table(OP | MEMORY, ("op", *KEYS), WHATEVER_RAN),
    "crop_resize": Table(
        {
            "ours": ("median_us", ms),
            "over PIL": ("speedup_pil", times),
            "over `F.interpolate`": ("speedup_interpolate", times),
            "over the best": ("speedup_best", times),
        }
    ),
    "machine_code": Table(
        {
            "instructions": ("instructions", plain),
            "bytes": ("bytes", plain),
            "issued in, of the least time": ("issue_percent", percent),
            "special functions": ("special_percent", percent),
            "registers": ("registers", plain),
            "warps": ("warps", plain),
        },
        ("op", "variant", "dtype", "unit"),
    ),
    "adapters": Table({"time": ("median_us", ms), "over serial forwards": ("speedup_eager", times)}),
}


def newest(rows: Sequence[Mapping[str, str]], kind: Sequence[str] = record.KIND) -> list[Mapping[str, str]]:
    """Of each kind on each device, the row measured last."""
    found: dict[tuple[str, ...], Mapping[str, str]] = {}
    for row in sorted(rows, key=lambda row: row.get("date", "")):
        key = tuple(row.get(name, "") for name in kind)
        found.pop(key, None)
        found[key] = row
    return list(found.values())


def caption(rows: Sequence[Mapping[str, str]]) -> str:
    """Where, when and with what the rows were measured."""

    def all_of(name: str) -> str:
        return ", ".join(sorted({row.get(name, "") for row in rows} - {""}))

    days = sorted({row.get("date", "")[:10] for row in rows})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    commits = ", ".join(f"`{commit}`" for commit in sorted({row.get("commit", "unknown") for row in rows}))
    return f"{rows[0]['device']}, {all_of('threads')} threads, torch {all_of('torch')}, {when}, {commits}"


def markdown(name: str, results: Path) -> str:
    """The table NAME, one part per device; figures that no row has are left out."""
    table = TABLES[name]
    rows = newest(record.read_all(results, name), table.kind)
    if not rows:
        return f"Not measured yet: `mtedit-fast bench {name}`.\n"
    parts = []
    for _, group in groupby(sorted(rows, key=lambda row: row["device"]), key=lambda row: row["device"]):
        own = list(group)
        own = [row for row in own if row["threads"] == own[-1]["threads"]]
        labels = [label for label in table.labels if label == table.labels[0] or len({r.get(label) for r in own}) > 1]
        figures = {head: figure for head, figure in table.figures.items() if any(row.get(figure[0]) for row in own)}
        same = [own[0].get(label, "") for label in table.labels if label not in labels]
        lines = ["| " + " | ".join([*labels, *figures]) + " |", "|" + "---|" * (len(labels) + len(figures))]
        for row in own:
            cells = [row.get(label, "") for label in labels]
            cells += [shape(float(row[column])) if row.get(column) else "" for column, shape in figures.values()]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        about = "; ".join([*filter(None, same), caption(own), f"`mtedit-fast bench {name}`"])
        parts.append("\n".join([*lines, "", about, ""]))
    return "\n".join(parts)


def filled(text: str, results: Path) -> str:
    """The text with its marked tables as the results have them; ValueError names a table that there is not."""
    wanted = [match[2] for match in MARKED.finditer(text)]
    unknown = [name for name in wanted if name not in TABLES]
    if unknown or not wanted:
        raise ValueError(
            f"expected <!-- bench NAME --> … <!-- /bench --> with one of {', '.join(TABLES)}; got {unknown or 'none'}"
        )
    return MARKED.sub(lambda match: f"{match[1]}{markdown(match[2], results)}{match[3]}", text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "mtedit-fast bench tables", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="folder of the CSV files")
    parser.add_argument("--write", type=Path, action="append", default=[], help="file to fill; may be repeated")
    parser.add_argument("--check", type=Path, action="append", default=[], help="file to compare; may be repeated")
    args = parser.parse_args(arguments)
    stale = []
    for path in (*args.write, *args.check):
        before = path.read_text(encoding="utf-8")
        try:
            after = filled(before, args.results)
        except ValueError as error:
            parser.error(f"{path}: {error}")
        if path in args.write:
            path.write_text(after, encoding="utf-8")
        elif after != before:
            stale.append(path)
            print(f"{path}: tables are not what {args.results} says; mtedit-fast bench tables --write {path}")
    if not args.write and not args.check:
        print("\n".join(f"## {name}\n\n{markdown(name, args.results)}" for name in TABLES))
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main())
