"""What `aspo negatives` made: figures of the choice in selection.json, pictures, and the command's summary."""

from __future__ import annotations

import statistics
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from aspo.folder import ROWS_FILE, image_entries, read_lines
from aspo.negatives.embeddings import Embeddings, image_key
from aspo.negatives.figures import reuse_figures, similarity_figures, truth_figures
from aspo.negatives.pictures import plot_grid, plot_projection
from aspo.negatives.sae import load_sae
from aspo.negatives.selection import LOW_RANGE
from aspo.negatives.sources import POOLED, Options, Pool
from aspo.resume import write_json
from aspo.scores import progress_bar

FIGURES_FILE, PICKS_FILE, SAE_FILE = "selection.json", "picks.jsonl", "sae.safetensors"
WITHOUT = {0: "the row has no image", 2: "the row has several images, and a negative would replace them all"}
Row = Mapping[str, Any]


def measure(out: Path, options: Options, embeddings: Embeddings | None, pool: Pool | None) -> dict[str, Any]:
    """selection.json and the pictures, from what is written in `out`."""
    rows = list(read_lines(out / ROWS_FILE))
    chosen = [row for row in rows if row.get("negative_images")]
    without = Counter(WITHOUT[min(2, len(image_entries(row)))] for row in rows if not row.get("negative_images"))
    keys = [[image_key(entry, out) for entry in row["negative_images"]] for row in chosen]
    figures: dict[str, Any] = {name: mean._asdict() for name, mean in truth_figures(chosen).items()}
    if options.method in POOLED:
        figures |= reuse_figures(keys)
    if embeddings is not None and chosen:
        right, negatives = _features(chosen, keys, out, embeddings)
        figures |= {name: mean._asdict() for name, mean in similarity_figures(right, negatives).items()}
        plot_projection(right, negatives, out / "projection.png", f"{options.method} negatives")
    if chosen:
        plot_grid(chosen, out, out / "grid.png", f"{options.method} negatives")
    if options.method == "misp" and chosen:
        spreads = {line["id"]: line["diversity_range"] for line in read_lines(out / PICKS_FILE)}
        figures["autoencoder"] = load_sae(out / SAE_FILE)[1]["figures"]
        if spreads:
            figures["diversity_range"] = statistics.median(spreads.values())
            if figures["diversity_range"] < LOW_RANGE:
                warnings.warn(
                    f"the diversity term hardly varies within a row (median range {figures['diversity_range']:.3f}, "
                    f"below {LOW_RANGE}): picks follow the score alone. Raise --beta-div, or train the autoencoder "
                    "longer (--sae-steps)",
                    stacklevel=3,
                )
    report = {
        "options": asdict(options),
        "scorer": None if embeddings is None else embeddings.scorer.identity,
        "pool": None if pool is None else len(pool.keys),
        "rows": len(chosen),
        "without_negatives": dict(without),
        "figures": figures,
    }
    write_json(out / FIGURES_FILE, report)
    return report


def _features(
    rows: Sequence[Row], keys: Sequence[Sequence[str]], out: Path, embeddings: Embeddings
) -> tuple[Tensor, Tensor]:
    """Features of the right images (n, d) and of the negatives (n, N, d)."""
    own = [row["images"][0] for row in rows]
    flat = [entry for row in rows for entry in row["negative_images"]]
    with progress_bar() as bar:
        task = bar.add_task("measuring", total=len(own) + len(flat))
        right = embeddings.images([image_key(e, out) for e in own], own, out, lambda n: bar.advance(task, n))
        every = [key for of_row in keys for key in of_row]
        negatives = embeddings.images(every, flat, out, lambda n: bar.advance(task, n))
    return right, negatives.unflatten(0, (len(rows), -1))


def summary(report: Mapping[str, Any], out: Path) -> str:
    """How many rows got negatives, which did not and why, and the figures."""
    options = report["options"]
    lines = [f"{report['rows']} rows with {options['count']} {options['method']} negatives each, in {out}"]
    lines += [f"  kept without negatives {n}: {why}" for why, n in report["without_negatives"].items()]
    for name, value in report["figures"].items():
        if name == "autoencoder":
            shown = f"{100 * value['explained']:.1f} % of a deviation explained, {value['unused']} latents unused"
        elif isinstance(value, Mapping):
            shown = f"{value['value']:.4f} (standard error {value['error']:.4f}, {value['rows']} rows)"
        else:
            shown = f"{value:.4f}"
        lines.append(f"  {name.replace('_', ' ')}: {shown}")
    return "\n".join(lines)
