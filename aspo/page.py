"""The report's HTML: charts, tables of figures with intervals, and answers with their sentences coloured by weight.

Every text that came from data is escaped here; what these functions return is finished HTML.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template

from PIL import Image

from aspo.charts import Styles, interval_chart, legend, line_chart
from aspo.evaluation.metrics import BY_NAME, GROUPS, HEADLINE, Figure
from aspo.evaluation.statistics import Comparison, Estimate

CURVES = {  # key of the training log -> what the chart is called
    "loss": "loss",
    "rewards/margins": "reward margin (chosen − rejected)",
    "rewards/chosen": "reward of the chosen answer",
    "rewards/rejected": "reward of the rejected answer",
    "rewards/accuracies": "share of pairs ranked right",
}
FAIR_CHANGE = 0.02  # of the baseline's coverage and length
MAX_IMAGE_SIDE = 512  # pixels; larger images are scaled down for the page


@dataclass(frozen=True)
class Sentence:
    """One sentence of an answer as the page shows it. `weight`, `similarity`, `perplexity`: chosen answers only."""

    text: str
    weight: float | None = None
    similarity: float | None = None
    perplexity: float | None = None
    verdict: str | None = None  # "true", "false", "unparseable"; None where no truth is known
    note: str = ""  # what a false sentence should have said


@dataclass(frozen=True)
class Item:
    """One preference pair as the page shows it."""

    id: str
    prompt: str
    chosen: Sequence[Sentence]
    rejected: Sequence[Sentence]
    images: Sequence[Image.Image] = field(default_factory=list)


def curves_section(histories: Mapping[str, Sequence[Mapping[str, float]]], styles: Styles) -> str:
    """One small chart per logged quantity, one line per run; `styles` numbers the runs' colours."""
    figures = []
    for key, title in CURVES.items():
        series = {
            name: [(float(entry["step"]), float(entry[key])) for entry in history if key in entry and "step" in entry]
            for name, history in histories.items()
        }
        if any(series.values()):
            chart = line_chart(f"{title} by step: {', '.join(histories)}", series, styles)
            figures.append(f"<figure><h3>{escape(title)}</h3>{chart}</figure>")
    if not figures:
        return ""
    return f'<h2>Training</h2>{legend(list(histories), styles)}<div class="charts">{"".join(figures)}</div>'


def headline_section(comparison: Comparison, styles: Styles) -> str:
    """The few figures that matter most, hallucination against coverage, and whether the comparison is a fair one."""
    figures = [figure for figure in comparison.figures if figure.name in HEADLINE]
    chart = ""
    x, y = BY_NAME["coverage"], BY_NAME["hallucinated_sentences"]
    if x in figures and y in figures:
        points = {
            name: (_percent(values[x.name]), _percent(values[y.name])) for name, values in comparison.systems.items()
        }
        drawn = interval_chart(f"{y.label} against coverage", points, "coverage (%)", f"{y.label} (%)", styles)
        note = "Down: fewer false sentences. Right: more of the truth told. A fair gain goes down without going left."
        chart = f"<figure>{drawn}<figcaption>{note}</figcaption></figure>"
    notes = "".join(f"<li>{escape(line)}</li>" for line in fairness(comparison))
    table = _table("headline", comparison, {"": figures}) if figures else ""
    beside = f'<div class="beside">{chart}<ul>{notes}</ul></div>' if chart else ""
    return f"<h2>Before and after</h2>{table}{beside}"


def fairness(comparison: Comparison, baseline: str | None = None) -> list[str]:
    """One line per system: whether its coverage and length are within 2 % of the baseline's (the first system's).

    Outside of that, fewer false sentences may only mean that less was said.
    """
    baseline = baseline or next(iter(comparison.systems))
    if not {BY_NAME["coverage"], BY_NAME["tokens"]} <= set(comparison.figures):
        return []
    lines = []
    base = comparison.systems[baseline]
    for name, values in comparison.systems.items():
        if name == baseline:
            continue
        coverage, length = (_change(values[key].value, base[key].value) for key in ("coverage", "tokens"))
        fair = abs(coverage) <= FAIR_CHANGE and abs(length) <= FAIR_CHANGE
        verdict = "within 2 %, so the rates compare like with like" if fair else "read the rate beside coverage"
        shown = [f"{100 * change:+.1f} %".replace("-", "\N{MINUS SIGN}") for change in (coverage, length)]
        lines.append(f"{name}: coverage {shown[0]}, length {shown[1]} of {baseline}'s: {verdict}.")
    return lines


def _change(value: float, base: float) -> float:
    return value / base - 1 if base else float("nan")


def figures_section(comparison: Comparison) -> str:
    """Every figure, with intervals."""
    same = "" if comparison.items == comparison.clusters else f" in {comparison.clusters} clusters"
    text = (
        f"<p>{comparison.items} items{same}, the same for every system. In brackets: {comparison.level:.0%} paired "
        "bootstrap intervals. A difference is marked better or worse where its interval excludes 0.</p>"
    )
    groups = {title: [f for f in group if f in comparison.figures] for title, group in GROUPS.items()}
    return f"<h2>All figures</h2>{text}{_table('figures', comparison, groups)}"


def _table(table_id: str, comparison: Comparison, groups: Mapping[str, Sequence[Figure]]) -> str:
    systems, pairs = list(comparison.systems), list(comparison.differences)
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in systems)
    head += "".join(f'<th scope="col">{escape(a)} − {escape(b)}</th>' for a, b in pairs)
    rows = []
    for title, figures in groups.items():
        if title and figures:
            span = 1 + len(systems) + len(pairs)
            rows.append(f'<tr class="group"><th scope="rowgroup" colspan="{span}">{escape(title)}</th></tr>')
        for figure in figures:
            cells = [f"<td>{_estimate(comparison.systems[name][figure.name], figure)}</td>" for name in systems]
            cells += [f"<td>{_difference(comparison.differences[pair][figure.name], figure)}</td>" for pair in pairs]
            unit = " (%)" if figure.percent else ""
            rows.append(f'<tr><th scope="row">{escape(figure.label)}{unit}</th>{"".join(cells)}</tr>')
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{table_id}"><table id="{table_id}"><thead><tr>'
        f'<th scope="col">figure</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _percent(value: Estimate) -> Estimate:
    return Estimate(100 * value.value, 100 * value.low, 100 * value.high)


def _estimate(value: Estimate, figure: Figure) -> str:
    low, high = figure.show(value.low), figure.show(value.high)
    return f'{figure.show(value.value)} <span class="interval">[{low}, {high}]</span>'


def _difference(value: Estimate, figure: Figure) -> str:
    verdict = judge_difference(value, figure)
    mark = f' <span class="{verdict}">{verdict}</span>' if verdict else ""
    low, high = figure.show(value.low, signed=True), figure.show(value.high, signed=True)
    return f'{figure.show(value.value, signed=True)}{mark} <span class="interval">[{low}, {high}]</span>'


def judge_difference(value: Estimate, figure: Figure) -> str:
    """ "better" or "worse" where the interval of a difference excludes 0, else ""."""
    if not figure.better or not value.excludes_zero:
        return ""
    return "better" if (value.value > 0) == (figure.better == "higher") else "worse"


def items_section(items: Sequence[Item]) -> str:
    """The cards: image, chosen answer coloured by weight with its numbers, rejected answer."""
    if not items:
        return ""
    known = any(s.verdict for item in items for s in item.chosen)
    key = (
        '<p>Sentence weight: 0 <span class="ramp" role="img" aria-label="pale to strong blue"></span> 1; '
        "the small number after a sentence is its weight."
        + (" A sentence underlined with a wave is false in its image." if known else "")
        + "</p>"
    )
    return f"<h2>Which sentences were weighed how</h2>{key}{''.join(_card(item) for item in items)}"


def _card(item: Item) -> str:
    images = "".join(_image(image, f"image of {item.id}") for image in item.images)
    rows = "".join(
        f'<tr><th scope="row">{k}</th><td>{_cell(s.similarity)}</td><td>{_cell(s.perplexity)}</td>'
        f"<td>{_cell(s.weight, '{:.2f}')}</td>{_truth_cell(s)}</tr>"
        for k, s in enumerate(item.chosen, start=1)
    )
    truth = '<th scope="col" style="text-align:left">truth</th>' if any(s.verdict for s in item.chosen) else ""
    notes = (
        '<div class="scroll"><table class="notes"><thead><tr><th scope="col">#</th><th scope="col">similarity</th>'
        f'<th scope="col">perplexity</th><th scope="col">weight</th>{truth}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )
    return (
        f'<article class="item"><div class="item-grid"><div>{images}<p class="soft">{escape(item.prompt)}</p></div>'
        f'<div><h3>Chosen</h3><p class="answer chosen">{_sentences(item.chosen)}</p>{notes}</div>'
        f'<div><h3>Rejected</h3><p class="answer rejected">{_sentences(item.rejected)}</p></div></div></article>'
    )


def _sentences(sentences: Sequence[Sentence]) -> str:
    parts = []
    for s in sentences:
        false = " false" if s.verdict == "false" else ""
        title = f' title="{escape(s.note)}"' if s.note else ""
        body, tail = s.text.rstrip(), s.text[len(s.text.rstrip()) :]
        if s.weight is None:
            parts.append(f'<span class="sentence{false}"{title}>{escape(body)}</span>{escape(tail)}')
        else:
            parts.append(
                f'<mark class="sentence weighed{false}" style="--w:{s.weight:.3f}" data-weight="{s.weight:.3f}"{title}>'
                f'{escape(body)}<span class="number">{s.weight:.2f}</span></mark>{escape(tail)}'
            )
    return "".join(parts)


def _cell(value: float | None, form: str = "{:.3f}") -> str:
    return "–" if value is None else form.format(value).replace("-", "−")


def _truth_cell(s: Sentence) -> str:
    if s.verdict is None:
        return ""
    mark = {"true": "✓ true", "false": "✗ false"}.get(s.verdict, "? not parsed")
    style = {"true": "better", "false": "worse"}.get(s.verdict, "soft")
    note = f": {escape(s.note)}" if s.note else ""
    return f'<td class="truth"><span class="{style}">{mark}</span>{note}</td>'


def _image(image: Image.Image, label: str) -> str:
    small = max(image.size) <= 128
    image = image.convert("RGB")
    image.thumbnail((MAX_IMAGE_SIDE, MAX_IMAGE_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if small else "JPEG", **({} if small else {"quality": 85}))
    data = base64.b64encode(buffer.getvalue()).decode()
    kind = "png" if small else "jpeg"
    size = f'width="{image.width}" height="{image.height}"'
    return f'<img{" class=small" if small else ""} src="data:image/{kind};base64,{data}" alt="{escape(label)}" {size}>'


def render(title: str, subtitle: str, sections: Sequence[str]) -> str:
    """The whole page. `sections` are finished HTML; title and subtitle are text."""
    template = Template((Path(__file__).with_name("report.html")).read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(title), subtitle=escape(subtitle), sections="\n".join(filter(None, sections))
    )
