"""Draw the committed results: the heads' time over the bare products and memory; what a shared prefix saves.

python -m benchmarks.plots            docs/head-cpu.svg from results/head.csv, docs/head-gpu.svg from results/gpu.csv,
                                      docs/step-cpu.svg from results/step_sweep.csv
python -m benchmarks.plots --check    fail if a plot was drawn from other figures than the committed ones
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import results

DOCS = Path(__file__).parent.parent / "docs"
PLOTS = {
    DOCS / "head-cpu.svg": results.FOLDER / "head.csv",
    DOCS / "head-gpu.svg": results.FOLDER / "gpu.csv",
    DOCS / "step-cpu.svg": results.FOLDER / "step_sweep.csv",
}
GPU_TOKENS = "8192"  # the sizes of a GPU that are drawn; the table has them all
STYLES = {  # the first whose key begins a contender's name
    "aspo_kernels, recompute": ("#0b3d91", "v"),
    "aspo_kernels, triton, fused": ("#0b3d91", "s"),
    "aspo_kernels, torch": ("#6fa8ff", "^"),
    "aspo_kernels": ("#1f6feb", "D"),
    "eager PyTorch": ("#222222", "o"),
    "torch.compile": ("#777777", "o"),
    "TRL": ("#d1242f", "o"),
    "torch linear_cross_entropy": ("#8250df", "o"),
    "Liger": ("#2da44e", "o"),
    "cut-cross-entropy": ("#bf8700", "o"),
    "quack": ("#00a3a3", "o"),
}
LINES = (("#0b3d91", "o"), ("#1f6feb", "s"), ("#bf8700", "^"), ("#d1242f", "v"))  # short responses first


class Point(NamedTuple):
    """One contender of one group: group and contender as printed, time over the bare products, extra memory in MiB."""

    group: str
    contender: str
    over_floor: float
    extra_mib: float | None


def points(rows: Sequence[dict[str, str]]) -> list[Point]:
    """What is drawn of a CPU's or a GPU's results: random logits, policy only."""
    found = []
    tokens = _tokens(rows)
    for row in rows:
        if row["logits"] != "random" or row["contender"].startswith("bare"):
            continue
        memory = float(row["extra_mib"]) if row["extra_mib"] else None
        if "gemm_over_this" in row:  # the CPU's suite
            found.append(
                Point(f"{row['head']}, {row['dtype']}", row["contender"], 1 / float(row["gemm_over_this"]), memory)
            )
        elif row["over_floor"] and row["work"] == "policy" and row["tokens"] == tokens and row["dtype"] == "bf16":
            found.append(Point(f"{row['head']}, {row['model']}", row["contender"], float(row["over_floor"]), memory))
    return found


def _tokens(rows: Sequence[dict[str, str]]) -> str:
    """The N that is drawn of a GPU's results: the usual one, or the longest where a run left that out."""
    lengths = {row["tokens"] for row in rows}
    return GPU_TOKENS if GPU_TOKENS in lengths else max(lengths, key=int, default=GPU_TOKENS)


def draw(source: Path, target: Path) -> None:
    """An SVG that carries the hash of the figures it was drawn from."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    header, rows = results.read(source)
    plt.rcParams.update({"svg.hashsalt": "aspo", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure = (_draw_lengths if "tokens_off_over_auto" in rows[0] else _draw_heads)(header, rows)
    target.parent.mkdir(exist_ok=True)
    figure.savefig(target, metadata={"Date": None, "Description": f"sha256 {_hash(source)}"})
    plt.close(figure)
    target.write_text(re.sub(r"[ \t]+$", "", target.read_text(), flags=re.M))


def _draw_heads(header: dict[str, str], rows: Sequence[dict[str, str]]) -> Any:
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FormatStrFormatter, NullFormatter

    drawn = points(rows)
    groups = list(dict.fromkeys(p.group for p in drawn))
    names = list(dict.fromkeys(p.contender for p in drawn))
    figure, axes = plt.subplots(1, 2, figsize=(10, 1.6 + 0.42 * len(groups)), sharey=True, layout="constrained")
    for name in names:
        mine = [p for p in drawn if p.contender == name]
        color, marker = next(style for key, style in STYLES.items() if name.startswith(key))
        for axis, field in zip(axes, ("over_floor", "extra_mib"), strict=True):
            xy = [(getattr(p, field), groups.index(p.group)) for p in mine if getattr(p, field) is not None]
            x, y = [value for value, _ in xy], [at for _, at in xy]
            on_top = 3 if name.startswith("aspo_kernels") else 2
            axis.plot(x, y, marker, color=color, label=name.split(" (")[0], markersize=7, alpha=0.85, zorder=on_top)
    for axis, label in zip(axes, ("time over the bare matrix products (log)", "extra memory, MiB (log)"), strict=True):
        axis.set_xscale("log")
        axis.set_xlabel(label)
        axis.grid(axis="x", which="both", color="#e5e5e5", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axis.xaxis.set_minor_formatter(NullFormatter())
    axes[0].axvline(1, color="#999999", linewidth=1, linestyle="--")
    axes[0].set_xticks([t for t in (0.5, 1, 2, 5, 10, 20, 50) if t <= 1.5 * max(p.over_floor for p in drawn)])
    axes[0].set_yticks(range(len(groups)), groups)
    axes[0].set_ylim(len(groups) - 0.5, -0.5)
    figure.suptitle(_title(header, rows), fontsize=9)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def _draw_lengths(header: dict[str, str], rows: Sequence[dict[str, str]]) -> Any:
    """A line for each length of the responses: the step's time without a shared prefix over that with one."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    prompts = sorted({int(row["prompt"]) for row in rows})
    for response, (color, marker) in zip(sorted({int(row["response"]) for row in rows}), LINES, strict=False):
        mine = sorted((row for row in rows if int(row["response"]) == response), key=lambda row: int(row["prompt"]))
        x = [int(row["prompt"]) for row in mine]
        times, tokens = ([float(row[name]) for row in mine] for name in ("off_over_auto", "tokens_off_over_auto"))
        axis.plot(x, times, marker=marker, color=color, label=f"{response:,} tokens a response")
        axis.plot(x, tokens, color=color, linewidth=0.8, linestyle=":")
    axis.plot([], [], color="#777777", linewidth=0.8, linestyle=":", label="tokens saved alone")
    axis.axhline(1, color="#999999", linewidth=1, linestyle="--")
    axis.set_xscale("log")
    axis.set_xticks(prompts, [f"{prompt:,}" for prompt in prompts])
    axis.set_xticks([], minor=True)
    axis.set_xlabel("tokens of image and prompt (log)")
    axis.set_ylabel("time: prefix twice / shared")
    axis.grid(axis="y", color="#e5e5e5", linewidth=0.6)
    axis.legend(frameon=False, fontsize=8)
    where = f"{header['threads']} threads of {header['cpu']}"
    axis.set_title(f"Whole step, 2 pairs, on {where};\ntorch {header['torch']}, commit {header['commit']}", fontsize=8)
    return figure


def _title(header: dict[str, str], rows: Sequence[dict[str, str]]) -> str:
    """What it was measured on."""
    first = rows[0]
    if header["device"] == "cpu":
        where = f"{header['threads']} threads of {header['cpu']}"
        size = f"N {int(first['tokens']):,}, H {int(first['hidden']):,}, V {int(first['vocabulary']):,}"
    else:
        where, size = f"one {header['device']}", f"N {int(_tokens(rows)):,}, bf16"
    return f"Forward + backward, {size}, on {where}; torch {header['torch']}, commit {header['commit']}"


def _hash(source: Path) -> str:
    return hashlib.sha256(source.read_bytes()).hexdigest()


def is_stale(target: Path, source: Path) -> bool:
    """Whether there are figures that a plot was not drawn from."""
    return source.exists() and (not target.exists() or f"sha256 {_hash(source)}" not in target.read_text())


def stale() -> list[str]:
    """The plots that were not drawn from the committed figures, as sentences."""
    return [
        f"{target.relative_to(DOCS.parent)} was not drawn from {source.name}"
        for target, source in PLOTS.items()
        if is_stale(target, source)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a plot is out of date")
    if parser.parse_args().check:
        sys.exit("\n".join(stale()) or None)
    for target, source in PLOTS.items():
        if source.exists():
            draw(source, target)
            print(f"drew {target} from {source}")


if __name__ == "__main__":
    main()
