"""Write the README's tables from the committed results, between their markers.

python -m benchmarks.readme            rewrite the tables
python -m benchmarks.readme --check    fail if the README does not say what the results say
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
HEAD = ROOT / "benchmarks" / "results" / "head.csv"
DEMO = ROOT / "benchmarks" / "results" / "demo.md"  # the demo's table.md
DEMO_ROWS = ("figure", "---", "hallucinated sentences", "false claims per item", "coverage", "claim F1",
             "false claims, unusual", "false claims, held-out", "minimal-pair", "yes/no accuracy", "CHAIR_i",
             "unparseable", "tokens")  # fmt: skip


def head_table(path: Path = HEAD) -> str:
    """Median times, ratios to eager, memory and errors of the loss head, random logits."""
    lines = path.read_text().splitlines()
    machine = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# "))
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    first = rows[0]
    out = [
        f"N {int(first['tokens']):,}, H {int(first['hidden']):,}, V {int(first['vocabulary']):,}, forward + backward, "
        f"on {machine['threads']} threads of {machine['cpu']}; torch {machine['torch']}, commit {machine['commit']}.",
        "",
        "| head | dtype | | median ms | speed against eager | extra memory, MiB | margin error, nats |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        if row["logits"] == "random":
            memory = f"{float(row['extra_mib']):.0f}" if row["extra_mib"] else ""
            out.append(
                f"| {row['head']} | {row['dtype']} | {row['contender']} | {float(row['median_ms']):.0f} | "
                f"{float(row['eager_over_this']):.2f}x | {memory} | {row['margin_error_nats']} |"
            )
    return "\n".join(out)


def demo_table(path: Path = DEMO) -> str:
    """The demo's table, its headline rows; and below it what length and coverage say about the comparison."""
    lines = path.read_text().splitlines()
    rows = [line for line in lines if line.startswith("|") and line.strip("| ").startswith(DEMO_ROWS)]
    missing = [name for name in DEMO_ROWS if not any(row.strip("| ").startswith(name) for row in rows)]
    if missing:
        sys.exit(f"{path} has no row {missing[0]!r}")
    rest = [line for line in lines if line and not line.startswith("|")]
    return "\n".join([*(" ".join(row.split()) for row in rows), "", *rest])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the README is out of date")
    check = parser.parse_args().check
    readme = ROOT / "README.md"
    before = text = readme.read_text()
    for name, table in (("head", head_table()), ("demo", demo_table())):
        start, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if start not in text or end not in text:
            sys.exit(f"README.md has no {start} ... {end}")
        text = f"{text[: text.index(start)]}{start}\n{table}\n{text[text.index(end) :]}"
    if check and text != before:
        sys.exit("README.md's tables are not those of benchmarks/results: run python -m benchmarks.readme")
    if not check:
        readme.write_text(text)


if __name__ == "__main__":
    main()
