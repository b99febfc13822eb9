"""Write the tables and plots of README.md and docs/performance.md from the committed results, between their markers.

python -m benchmarks.readme            rewrite the tables, draw the plots
python -m benchmarks.readme --check    fail if they do not say what the results say
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path

from aspo.compare.plan import START
from aspo.compare.statistics import Interval
from aspo.compare.table import show
from aspo.evaluation.metrics import BY_NAME
from benchmarks import model, plots, results

ROOT = Path(__file__).parent.parent
HEAD = results.FOLDER / "head.csv"
GPU = results.FOLDER / "gpu.csv"
STEP = results.FOLDER / "step.csv"
DEMO = results.FOLDER / "demo.md"  # the demo's table.md
DEMO_ROWS = ("figure", "---", "hallucinated sentences", "false claims per item", "coverage", "claim F1",
             "false claims, unusual", "false claims, held-out", "minimal-pair", "yes/no accuracy", "CHAIR_i",
             "unparseable", "tokens")  # fmt: skip
EVIDENCE = results.FOLDER / "compare" / "table.json"  # the comparison's
EVIDENCE_FIGURES = ("minimal_pair_accuracy", "hallucinated_sentences", "coverage")
STEP_RATIOS = ("trl_over_this", "trl_over_this_with_data", "off_over_this", "trl_mib_over_this")


def head_table(path: Path = HEAD) -> str:
    """Median times, ratios to eager, memory and errors of the loss head, random logits."""
    machine, rows = results.read(path)
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


def head_section() -> str:
    """The README's plots of the loss head and its table; a GPU's first where there are results of one."""
    drawn = [p.name for p, source in reversed(plots.PLOTS.items()) if source.exists() and p.name.startswith("head")]
    shown = [f"![Time and memory of the loss head](docs/{name})" for name in drawn]
    tables = ([gpu_table()] if GPU.exists() else []) + [head_table()]
    return "\n\n".join([*shown, *tables])


def gpu_table(path: Path = GPU) -> str:
    """For each case the bare products, the best of ours, eager and the fastest peer: ms, ratios, memory."""
    machine, rows = results.read(path)
    out = [
        f"Forward + backward on one {machine['device']} ({machine['bf16_tflops']} TFLOP/s in bf16, {machine['tb_s']} "
        f"TB/s); torch {machine['torch']}, driver {machine['driver']}, commit {machine['commit']}.",
        "",
        "| head | N | work | bare products, ms | ours, ms (over bare, over predicted) | eager | fastest peer "
        "| extra MiB: ours, eager |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    cases: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        if row["over_floor"]:
            key = tuple(row[name] for name in ("model", "tokens", "dtype", "head", "work"))
            cases.setdefault(key, []).append(row)
    for (name, tokens, dtype, head, work), members in cases.items():
        ours = [r for r in members if r["contender"].startswith("aspo_kernels")]
        peers = [r for r in members if r not in ours and r["contender"] != "eager PyTorch"]
        if not ours:
            continue
        best = min(ours, key=lambda r: float(r["median_ms"]))
        fastest = min(peers, key=lambda r: float(r["median_ms"]), default=None)
        eager = next((r for r in members if r["contender"] == "eager PyTorch"), {"median_ms": "out of memory"})
        peer = f"{fastest['median_ms']} ({fastest['contender'].split(',')[0]})" if fastest else "none ran"
        cells = [name, f"{int(tokens):,}", f"{head}, {dtype}, {work}", best["floor_ms"],
                 f"{best['median_ms']} ({best['over_floor']}x, {best['over_predicted']}x)", eager["median_ms"], peer,
                 f"{best['extra_mib']}, {eager.get('extra_mib', '')}"]  # fmt: skip
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out)


def step_section(path: Path = STEP) -> str:
    """Whole training steps against TRL's DPOTrainer, and the plot of what a shared prefix saves by lengths."""
    machine, rows = results.read(path)
    error, steps = max(float(row["loss_error"]) for row in rows), len(rows[0]["losses"].split())
    out = [
        f"One run on {machine['threads']} threads of {machine['cpu']}, fp32, medians; torch {machine['torch']}, "
        f"transformers {machine['transformers']}, TRL {machine['trl']}, commit {machine['commit']}. The losses "
        f"of the first {steps} steps differ by at most {error:.0e}.",
        "",
        "| | step, ms | batch, ms | against TRL | with the batch's making | shared against not | a step's memory, MiB "
        "| TRL's over this |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        ratios = [f"{row[name]}x" if row[name] else "" for name in STEP_RATIOS]
        cells = [row["contender"], f"{float(row['step_ms']):,.0f}", f"{float(row['data_ms']):.0f}", *ratios]
        cells.insert(-1, f"{float(row['step_mib']):,.0f}")
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join([*out, "", "![Time of a step with and without a shared prefix](docs/step-cpu.svg)"])


def model_section() -> str:
    """The model's predictions for both GPUs."""
    return "\n\n".join(model.table(device) for device in model.DEVICES.values())


def demo_table(path: Path = DEMO) -> str:
    """The demo's table, its headline rows; and below it what length and coverage say about the comparison."""
    lines = path.read_text().splitlines()
    rows = [line for line in lines if line.startswith("|") and line.strip("| ").startswith(DEMO_ROWS)]
    missing = [name for name in DEMO_ROWS if not any(row.strip("| ").startswith(name) for row in rows)]
    if missing:
        sys.exit(f"{path} has no row {missing[0]!r}")
    rest = [line for line in lines if line and not line.startswith("|")]
    return "\n".join([*(" ".join(row.split()) for row in rows), "", *rest])


def evidence_table(path: Path = EVIDENCE, declared_only: bool = True) -> str:
    """Systems side by side on the test scenes: the figures that speak for each, and what was expected of it.

    declared_only: those of the comparisons that were declared beforehand, and the start model.
    """
    record = json.loads(path.read_text())
    baseline = next(name for name in record["systems"] if name not in record["differences"])
    verdicts = {(v["comparison"]["system"], v["comparison"]["against"]): v for v in record["verdicts"]}
    named = {START, *itertools.chain(*verdicts)} if declared_only else record["systems"]

    def shown(figure: str, estimate: dict[str, float], signed: bool = False) -> str:
        return show(Interval(**estimate), BY_NAME[figure], signed)

    primary, *others = EVIDENCE_FIGURES
    head = ["system", f"{BY_NAME[primary].label} (%)", f"\N{MINUS SIGN} {baseline}", "expected", ""]
    head += [f"{BY_NAME[name].label} (%)" for name in others]
    head += ["KL to start, nats", "form kept, seeds"]
    out = ["| " + " | ".join(head) + " |", "|---|---:|---:|---|---|" + "---:|" * (len(EVIDENCE_FIGURES) + 1)]
    for name in sorted(named, key=lambda name: -record["systems"][name][primary]["value"]):
        by, other, told = record["systems"][name], record["differences"].get(name), verdicts.get((name, baseline))
        cells = [
            shown(primary, by[primary]),
            shown(primary, other[primary], signed=True) if other else "",
            told["comparison"]["direction"] if told else "",
            told["verdict"] if told else "",
            *(shown(figure, by[figure]) for figure in others),
            f"{record['extra'][name]['kl']['value']:.2f}",
            f"{record['form_kept'][name]} of {record['seeds']}",
        ]
        out.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(out)


def evidence_page(path: Path = EVIDENCE) -> str:
    """What was declared beforehand, from the table.md that `aspo compare` wrote, and all systems."""
    head, declared = path.with_suffix(".md").read_text().split("\n## All systems\n")[0].split("\n## ", 1)
    return f"{head}\n### {declared}\n### All systems\n\n{evidence_table(path, declared_only=False)}"


SECTIONS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"head": head_section, "step": step_section, "demo": demo_table, "evidence": evidence_table},
    "docs/evidence.md": {"table": evidence_page},
    "docs/performance.md": {"model": model_section},
}


def filled(text: str, sections: dict[str, Callable[[], str]], name: str) -> str:
    """The text with each section's content between its markers."""
    for section, content in sections.items():
        start, end = f"<!-- {section}: begin -->", f"<!-- {section}: end -->"
        if start not in text or end not in text:
            sys.exit(f"{name} has no {start} ... {end}")
        text = f"{text[: text.index(start)]}{start}\n{content()}\n{text[text.index(end) :]}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if something is out of date")
    check = parser.parse_args().check
    complaints = []
    for name, sections in SECTIONS.items():
        path = ROOT / name
        before = path.read_text()
        after = filled(before, sections, name)
        if not check:
            path.write_text(after)
        elif after != before:
            complaints.append(f"{name}'s tables are not those of benchmarks/results")
    if check:
        complaints += plots.stale()
        sys.exit("\n".join([*complaints, "run python -m benchmarks.readme"]) if complaints else None)
    for target, source in plots.PLOTS.items():
        if plots.is_stale(target, source):
            plots.draw(source, target)


if __name__ == "__main__":
    main()
