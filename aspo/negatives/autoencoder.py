"""The autoencoder of a folder of `aspo negatives`: trained once, then read by every process."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aspo.negatives.pictures import plot_latents
from aspo.negatives.pool import Pool
from aspo.negatives.report import SAE_FILE
from aspo.negatives.sae import Deviations, SaeConfig, latent_examples, load_sae, save_sae, train_sae
from aspo.negatives.sources import Options
from aspo.progress import progress_bar
from aspo.resume import write_json


def train_autoencoder(
    out: Path,
    options: Options,
    data: Deviations,
    scorer: str,
    rows: Sequence[tuple[str, str, str]],
    own: Sequence[Any],
    pool: Pool,
    begun: bool,
) -> None:
    """The autoencoder in `out`, unless it is there, with its latents listed and pictured.

    rows, own: id, image key and prompt of the rows that `data` is made of, and their images. begun: whether rows have
    negatives of what is there; then ValueError where it was trained on other rows.
    """
    path = out / SAE_FILE
    config = SaeConfig(data.right.shape[1], data.text.shape[1], options.latents)
    origin = {"scorer": scorer, "pool": pool.digest, "steps": options.sae_steps, "seed": options.seed}
    ids, *content = zip(*rows, strict=True)
    origin["rows"], origin["content"] = _digest([ids]), _digest(content)
    if path.exists():
        sae, about = load_sae(path, data.pool.device)
        about.setdefault("content", origin["content"])  # an older version's file says ids only
        if sae.config == config and about.items() >= origin.items():
            return
        if begun:
            raise ValueError(
                f"the rows in {out} have negatives of an autoencoder that was trained on other rows (another --limit, "
                "or other data) or with another scorer; use the same, or another --out"
            )
    with progress_bar() as bar:
        task = bar.add_task("training the autoencoder", total=options.sae_steps)
        sae, figures = train_sae(
            data, config, steps=options.sae_steps, seed=options.seed, progress=lambda n: bar.advance(task, n)
        )
    latents = latent_examples(sae, data, seed=options.seed)
    plot_latents(latents, own, pool.entries, out / "latents.png")
    for example in (example for latent in latents for example in latent["top"]):
        example |= {"row": ids[example["row"]], "image": pool.keys[example["image"]]}
    write_json(out / "latents.json", latents)
    save_sae(sae, path, {**origin, "figures": figures})


def _digest(columns: Sequence[Sequence[str]]) -> str:
    return hashlib.sha256("\n".join(value for column in columns for value in column).encode()).hexdigest()[:16]
