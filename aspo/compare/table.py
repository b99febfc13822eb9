"""table.md of `aspo compare`: the declared comparisons, every system with its figures, the rewards, the settings."""

from __future__ import annotations

import math

from aspo.compare.outcome import EXTRA, REWARDS, Outcome
from aspo.compare.plan import Declared
from aspo.compare.statistics import Interval
from aspo.evaluation.figures import Figure
from aspo.evaluation.metrics import BY_NAME

MINUS = "\N{MINUS SIGN}"
SHOWN = (
    "hallucinated_sentences",
    "false_claims_violating",
    "coverage",
    "claim_f1",
    "chair_i",
    "chair_s",
    "tokens",
    "unparseable",
    "duplicate",
)


def show(estimate: Interval, figure: Figure, signed: bool = False) -> str:
    """ "+1.2 [+0.3, +2.1]" in per cent or plain, as the figure says; the interval left out where there is none."""
    value, low, high = (figure.show(v, signed=signed) for v in (estimate.value, estimate.low, estimate.high))
    return value if math.isnan(estimate.low) else f"{value} [{low}, {high}]"


def markdown(outcome: Outcome) -> str:
    """The table, and above it the declared comparisons."""
    declared = outcome.declared
    lines = ["**SMOKE RUN: too small to mean anything.**", ""] if outcome.smoke else []
    lines += [
        f"{len(outcome.systems)} systems, {outcome.seeds} seeds, {outcome.scenes} test scenes; "
        f"{declared.prompts} prompts and {_budget(declared)} for each. Below each other: 95 % intervals over seeds and "
        "scenes (docs/evidence.md).",
        "",
        *_verdicts(outcome),
        *_figures(outcome),
        *_rewards(outcome),
    ]
    lines += [line for note in outcome.notes for line in (note, "")]
    lines += ["Settings by system:", ""] if any(outcome.settings.values()) else []
    for name, settings in outcome.settings.items():
        if settings:
            told = ((key.rpartition(".")[2], f"{v:g}" if isinstance(v, float) else v) for key, v in settings.items())
            lines.append(f"- {name}: {', '.join(f'{key} {value}' for key, value in told)}")
    lines += ["", *(f"**Failed: {line}**" for line in outcome.failed)]
    if outcome.codes > 1:
        lines.append(f"**Made by {outcome.codes} states of the code** (`code` in each result.json tells which).")
        lines.append("")
    lines.append(
        f"{sum(outcome.seconds.values()) / 3600:.2f} hours of one thread for training and evaluation, "
        f"{outcome.data_seconds / 3600:.2f} for making data."
    )
    return "\n".join(lines) + "\n"


def _verdicts(outcome: Outcome) -> list[str]:
    """The declared comparisons."""
    primary = BY_NAME[outcome.declared.primary]
    lines = [
        f"## Declared beforehand ({outcome.declared.path.name}; primary figure: {primary.label}, points)",
        "",
        "| comparison | expected | by | difference | p (Holm) | |",
        "|---|---|---|---:|---:|---|",
    ]
    for v in outcome.verdicts:
        c = v.comparison
        number = MINUS if v.difference is None else show(v.difference, primary, signed=True)
        p = "" if math.isnan(v.p_holm) else f"{v.p_holm:.3f}" if v.p_holm >= 0.001 else "< 0.001"
        reported = f" ({c['reported']})" if c.get("reported") else ""
        lines.append(
            f"| {c['system']} {MINUS} {c['against']} | {c['direction']}{reported} | {c.get('expected_by', '')} | "
            f"{number} | {p} | {v.verdict} |"
        )
    return [*lines, ""]


def _figures(outcome: Outcome) -> list[str]:
    """Every system with its figures."""
    primary, baseline = BY_NAME[outcome.declared.primary], outcome.declared.baseline
    shown = [BY_NAME[name] for name in SHOWN if BY_NAME[name] in outcome.figures]
    head = ["system", primary.label, f"{MINUS} {baseline}", *(f.label for f in shown), *EXTRA.values()]
    lines = [
        "## All systems",
        "",
        f"Differences to {baseline} that were not declared beforehand describe; they test nothing.",
        "",
        "| " + " | ".join([*head, "within 2 %", "form kept"]) + " |",
        "|---|" + "---:|" * (len(head) - 1) + "---|---|",
    ]
    for name, by in outcome.systems.items():
        other = "" if name == baseline else show(outcome.differences[name][primary.name], primary, signed=True)
        extra = [f"{outcome.extra[name][e].value:.2f}" for e in EXTRA]
        cells = [show(by[primary.name], primary), other, *(show(by[f.name], f) for f in shown), *extra]
        kept = f"{outcome.form_kept[name]} of {outcome.seeds}" if outcome.form_kept else ""
        lines.append("| " + " | ".join([name, *cells, "yes" if outcome.fair[name] else "no", kept]) + " |")
    return [
        *lines,
        "",
        "Rates in per cent. *within 2 %*: coverage and length are both within 2 % of the baseline's; where they",
        "are not, read the rate of hallucinated sentences beside coverage. *form kept*: how many seeds' answers keep",
        "the form that the grid asks of a setting (sentences that parse, no repetition, length, coverage).",
        "",
    ]


def _rewards(outcome: Outcome) -> list[str]:
    """The rewards of the systems that log them: a chosen one below 0 is likelihood lost (displacement)."""
    rows = [
        f"| {name} | {' | '.join(_plain(by.get(e)) for e in REWARDS)} | "
        f"{_plain(outcome.extra_differences.get(name, {}).get('chosen_reward_final'))} |"
        for name, by in outcome.extra.items()
        if "chosen_reward_final" in by
    ]
    if not rows:
        return []
    return [
        "## Rewards in training",
        "",
        "Of training pairs, beta x log-ratio, by each objective's own beta; the end is the last logged mean. A chosen "
        "reward below 0 is likelihood that the chosen answers lost.",
        "",
        f"| system | {' | '.join(REWARDS.values())} | chosen, at the end, {MINUS} {outcome.declared.baseline} |",
        "|---|" + "---:|" * (len(REWARDS) + 1),
        *rows,
        "",
    ]


def _plain(estimate: Interval | None) -> str:
    if estimate is None:
        return ""
    if math.isnan(estimate.low):
        return f"{estimate.value:.3f}"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]".replace("-", MINUS)


def _budget(declared: Declared) -> str:
    steps, size = declared.budget.get("max_steps"), declared.budget.get("per_device_train_batch_size")
    return f"{steps} steps of {size} pairs" if steps and size else "the same training"
