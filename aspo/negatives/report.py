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
from aspo.negatives.pool import Pool
from aspo.negatives.sae import load_sae
from aspo.negatives.selection import LOW_RANGE
from aspo.negatives.sources import POOLED, Options
from aspo.resume import write_json
from aspo.shards import Engine

FIGURES_FILE, PICKS_FILE, SAE_FILE = "selection.json", "picks.jsonl", "sae.safetensors"
WITHOUT = {0: "the row has no image", 2: "the row has several images, and a negative would replace them all"}
Row = Mapping[str, Any]


def measure(
    out: Path, options: Options, embeddings: Embeddings | None, pool: Pool | None, engine: Engine
) -> dict[str, Any]:
    """selection.json and the pictures, from what is written in `out`.

    All processes call this together: they share the images that have no features yet; the first one does the rest.
    """
    rows = list(read_lines(out / ROWS_FILE))
    chosen = [row for row in rows if row.get("negative_images")]
    flat = [entry for row in chosen for entry in row["negative_images"]]
    keys = engine.processes.share(len(flat), lambda n: image_key(flat[n], out))
    own = [row["images"][0] for row in chosen]
    own_keys = engine.processes.share(len(own), lambda n: image_key(own[n], out))
    features = None
    if embeddings is not None and chosen:
        embeddings.fill_images(engine, own_keys + keys, own + flat, out, title="measuring")
        of_negatives = embeddings.images(keys, flat, out).unflatten(0, (len(chosen), -1))
        features = embeddings.images(own_keys, own, out), of_negatives
    of_flat = iter(keys)
    by_row = [[next(of_flat) for _ in row["negative_images"]] for row in chosen]
    scorer = None if embeddings is None else embeddings.scorer.identity
    return engine.processes.once(
        "it measures the negatives", lambda: _report(out, options, rows, by_row, features, scorer, pool)
    )


def _report(
    out: Path,
    options: Options,
    rows: Sequence[Row],
    keys: Sequence[Sequence[str]],
    features: tuple[Tensor, Tensor] | None,
    scorer: str | None,
    pool: Pool | None,
) -> dict[str, Any]:
    """features: of the right images (n, d) and of the negatives (n, N, d) of the rows that have some."""
    chosen = [row for row in rows if row.get("negative_images")]
    without = Counter(WITHOUT[min(2, len(image_entries(row)))] for row in rows if not row.get("negative_images"))
    figures: dict[str, Any] = {name: mean._asdict() for name, mean in truth_figures(chosen).items()}
    if options.method in POOLED:
        figures |= reuse_figures(keys)
    if features is not None:
        figures |= {name: mean._asdict() for name, mean in similarity_figures(*features).items()}
        plot_projection(*features, out / "projection.png", f"{options.method} negatives")
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
        "scorer": scorer,
        "pool": None if pool is None else len(pool.keys),
        "rows": len(chosen),
        "without_negatives": dict(without),
        "figures": figures,
    }
    write_json(out / FIGURES_FILE, report)
    return report


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
