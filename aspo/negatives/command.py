"""`aspo negatives`: wrong images for preference rows, which the chosen response is read with too (MISP-DPO, mDPO).

Writes the rows with `negative_images` and, where the choice has a density, `negative_log_q` (one float an image);
beside them selection.json (figures of the choice), pictures, and what a run that goes on needs: features of the images
under their content, the autoencoder, settings. docs/misp.md tells it all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from aspo import shards
from aspo.data import load_rows, row_name, validate_rows
from aspo.folder import ROWS_FILE, image_entries, load_images, row_line
from aspo.model import resolve_device
from aspo.negatives.autoencoder import train_autoencoder
from aspo.negatives.embeddings import Embeddings, image_key
from aspo.negatives.pool import Pool, chained, entries_of, read_pool
from aspo.negatives.report import PICKS_FILE, SAE_FILE, measure, summary
from aspo.negatives.sae import Deviations, load_sae
from aspo.negatives.sources import (
    MAKERS,
    METHODS,
    POOLED,
    Negatives,
    Options,
    pick_from_pool,
    rows_at_a_time,
)
from aspo.resume import check_settings, write_json
from aspo.scorers import LazyScorer, Scorer, load_scorer
from aspo.validate import IMAGE_PLACEHOLDER

SETTINGS_FILE = "settings.json"
JOB = "negatives"  # the name of its shards
READ_BY = {  # option -> the methods that read it; the others may always be given (pixel_mean tells of the model)
    "duplicate": POOLED,
    **dict.fromkeys(("candidates", "beta_div", "temperature", "latents", "sae_steps"), ("misp",)),
    "crop_scale": ("crop",),
    "noise_step": ("noise",),
}
Row = Mapping[str, Any]


def add_negatives(
    rows: Sequence[Row],
    out: str | Path,
    options: Options,
    *,
    scorer: Scorer | None = None,
    pool: Pool | None = None,
    device: torch.device | str = "cpu",
    engine: shards.Engine | None = None,
) -> dict[str, Any]:
    """The rows with their negatives in `out`; returns what selection.json holds.

    Args:
        rows: preference rows with distinct ids. Rows without an image, or with several, get no negatives.
        scorer: a CLIP; needed for "misp" and "hard", otherwise for the figures and to keep near duplicates out.
        pool: see `aspo.negatives.pool.read_pool`; for "misp", "random" and "hard". It may hold the rows' own images.
        device: where the autoencoder is trained and images are picked; the scorer has its own.
        engine: who encodes images and makes the shards; all processes call this together. None = these processes.

    Raises:
        ValueError: a row that has negatives already, a pool that is too small, an image that cannot be read, features
            that are not finite. Shards that were written before stay.
    """
    out, engine = Path(out), engine or shards.Engine(shards.Processes.current())
    if pool is not None and len(pool.keys) < options.count and options.method in POOLED:
        raise ValueError(
            f"{options.count} negatives a row were asked, but the pool has {len(pool.keys)} distinct images: use a "
            "larger --pool or a smaller --count"
        )
    for row in rows:
        if image_entries(row, "negative_images"):
            raise ValueError(f"{row_name(row)}: it has negative_images already; start from the rows without them")
    embeddings = None if scorer is None else Embeddings(out / "embeddings", scorer)
    if not shards.check_older(engine.processes, out, JOB, ROWS_FILE, [str(row["id"]) for row in rows]):
        decides = asdict(options) | {"scorer": None if scorer is None else scorer.identity}
        if options.method in POOLED:
            assert pool is not None
            job = _job_of_pool(rows, out, options, decides, embeddings, pool, device, engine)
        else:
            job = _job_of_own_images(rows, out, options, decides)
        shards.run_job(job, engine)
    return measure(out, options, embeddings, pool, engine)


def _job_of_own_images(rows: Sequence[Row], out: Path, options: Options, decides: Mapping[str, Any]) -> shards.Job:
    def make(batch: Sequence[Row], start: int) -> dict[str, list[str]]:
        (row,) = batch
        image = load_images(row) if len(image_entries(row)) == 1 else []
        return _lines(out, row, MAKERS[options.method](row, image[0], options) if image else None)

    return shards.Job(out, JOB, rows, decides, lambda: make, 1, title=f"making {options.method} negatives")


def _job_of_pool(
    rows: Sequence[Row],
    out: Path,
    options: Options,
    decides: dict[str, Any],
    embeddings: Embeddings | None,
    pool: Pool,
    device: torch.device | str,
    engine: shards.Engine,
) -> shards.Job:
    """Features are made first, by all processes; the autoencoder by one, while the others wait."""
    places = [n for n in range(len(rows)) if len(image_entries(rows[n])) == 1]
    own = entries_of(rows, [(n, 0) for n in places])
    keys = engine.processes.share(len(own), lambda k: image_key(own[k]))
    right = prompts = sae = None
    decides = decides | {"pool": pool.digest}
    if embeddings is not None:
        embeddings.fill_images(engine, keys + pool.keys, chained(own, pool.entries))
        right = embeddings.images(keys, own).to(device) if own else None
        found = embeddings.images(pool.keys, pool.entries).to(device)
        pool = Pool(pool.keys, pool.entries, pool.scenes, found)
        if options.method == "misp" and places:
            assert right is not None
            texts = [prompt_text(rows[n]["prompt"]) for n in places]
            embeddings.fill_texts(engine, texts)
            prompts = embeddings.texts(texts).to(device)
            data, ids = Deviations(right, prompts, found), [rows[n]["id"] for n in places]
            made_of = zip(ids, keys, texts, strict=True)
            about = (out, options, data, embeddings.scorer.identity, [*made_of], own, pool)
            engine.processes.once("it trains the autoencoder", lambda: train_autoencoder(*about, _begun(out)))
            sae = load_sae(out / SAE_FILE, data.pool.device)[0]
            weights = b"".join(value.cpu().numpy().tobytes() for _, value in sorted(sae.state_dict().items()))
            decides["autoencoder"] = hashlib.sha256(weights).hexdigest()
    position = {n: k for k, n in enumerate(places)}

    def make(batch: Sequence[Row], start: int) -> dict[str, list[str]]:
        at = [position[start + n] for n in range(len(batch)) if start + n in position]
        asked = [rows[places[k]] for k in at]
        features = None if right is None else right[at]
        words = None if prompts is None else prompts[at]
        picked = pick_from_pool(asked, [keys[k] for k in at], features, words, pool, options, sae)
        by_id = {row["id"]: negatives for row, negatives in zip(asked, picked, strict=True)}
        made: dict[str, list[str]] = {}
        for row in batch:
            for file, lines in _lines(out, row, by_id.get(row["id"])).items():
                made.setdefault(file, []).extend(lines)
        return made

    size = rows_at_a_time(options, 1 if pool.features is None else pool.features.shape[1], len(pool.keys))
    return shards.Job(out, JOB, rows, decides, lambda: make, size, title="picking negatives")


def _lines(out: Path, row: Row, negatives: Negatives | None) -> dict[str, list[str]]:
    """A row with its negatives, as lines of the folder's files."""
    made, lines = dict(row), {}
    if negatives is not None:
        made["negative_images"] = negatives.images
        made["negative_log_q"], made["negative_scenes"] = negatives.log_q, negatives.scenes
        if not math.isnan(negatives.diversity_range):
            line = {"id": row["id"], "diversity_range": negatives.diversity_range}
            lines[PICKS_FILE] = [json.dumps(line) + "\n"]
    return {**lines, ROWS_FILE: [row_line(out, made)]}


def _begun(out: Path) -> bool:
    """Whether rows were made."""
    return (out / ROWS_FILE).exists() or any((out / shards.SHARDS_FOLDER / JOB).glob("*.jsonl"))


def prompt_text(prompt: Any) -> str:
    """The words of a prompt, as CLIP reads them: image marks, roles and answers of earlier turns are left out."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    contents = [message["content"] for message in messages if message.get("role") == "user"]
    parts = [part for content in contents for part in ([content] if isinstance(content, str) else content)]
    texts = [part if isinstance(part, str) else part.get("text") or "" for part in parts]
    return " ".join(" ".join(texts).replace(IMAGE_PLACEHOLDER, " ").split())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `aspo negatives`."""
    default = Options()
    parser.description = (
        "Give preference rows negative images, which the chosen response is read with too: parts of the image (crop),\n"
        "the image under noise (noise), or images of a pool: at random, the nearest ones (hard), or MISP-DPO's choice\n"
        "by a sparse autoencoder (misp). Writes a folder for `aspo train --loss-type misp` or mdpo, with figures and\n"
        "pictures of the choice. Run the same command again to go on after a stop."
    )
    parser.epilog = (
        "examples:\n"
        "  aspo negatives --data pairs --method misp --count 3 --scorer open_clip:ViT-L-14-quickgelu/openai \\\n"
        "                 --out negatives\n"
        "  aspo negatives --data runs/pairs --method crop --count 1 --out runs/crops"
    )
    parser.add_argument("--data", required=True, help="preference rows: folder, .jsonl, .json or .parquet")
    parser.add_argument("--out", required=True, help="folder to write; another one than --data")
    parser.add_argument("--method", default=default.method, choices=METHODS, help="(default: misp)")
    parser.add_argument("--count", type=int, default=default.count, help="negatives of a row, 1 to 16 (default: 3)")
    parser.add_argument("--scorer", help="CLIP, as for `aspo score`; needed for misp and hard, else for the figures")
    parser.add_argument("--pool", help="rows or a folder of images to pick from (default: the images of --data)")
    parser.add_argument("--seed", type=int, default=default.seed, help="of all random choices (default: 0)")
    parser.add_argument("--limit", type=int, help="only the first rows (default: all)")
    parser.add_argument("--image-root", help="where relative image paths start (default: the folder of the rows)")
    parser.add_argument("--device", help="torch device (default: the accelerator if there is one, else cpu)")
    pooled = parser.add_argument_group("misp, random and hard")
    pooled.add_argument(
        "--duplicate",
        type=float,
        help="CLIP cosine from which an image counts as the right one's duplicate and is not picked (default: 0.98)",
    )
    misp = parser.add_argument_group("misp")
    misp.add_argument("--candidates", type=int, help="random images of the pool that a row is given (default: 1000)")
    misp.add_argument("--beta-div", type=float, help="weight of the diversity term (default: 1)")
    misp.add_argument("--temperature", type=float, help="of the density q = softmax(score / temperature) (default: 1)")
    misp.add_argument("--latents", type=int, help="of the autoencoder (default: 128)")
    misp.add_argument("--sae-steps", type=int, help="training steps of the autoencoder (default: 1500)")
    own = parser.add_argument_group("crop and noise")
    own.add_argument("--crop-scale", type=float, nargs=2, help="share of the image's area (default: 0.01 0.2)")
    own.add_argument("--noise-step", type=int, help="diffusion step, 0 to 999 (default: 500)")
    own.add_argument(
        "--pixel-mean", type=float, nargs=3, help="noise: of the model's image processor (default: CLIP's)"
    )
    own.add_argument("--pixel-std", type=float, nargs=3, help="noise: of the model's image processor (default: CLIP's)")
    shards.add_arguments(parser)


def read_options(args: argparse.Namespace) -> Options:
    """The options that a command line gives. Raises ValueError for one that its method does not read."""
    given: dict[str, Any] = {
        f.name: getattr(args, f.name) for f in fields(Options) if getattr(args, f.name, None) is not None
    }
    for name in given:
        if args.method not in READ_BY.get(name, METHODS):
            flag = "--" + name.replace("_", "-")
            raise ValueError(
                f"{flag} is not read by --method {args.method}, only by {', '.join(READ_BY[name])}: drop it"
            )
    given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    options = Options(**given)
    if args.scorer is None and options.method in ("misp", "hard"):
        raise ValueError(f"--method {options.method} compares images in CLIP space: give --scorer, as for `aspo score`")
    if args.scorer is None and "duplicate" in given:
        raise ValueError("--duplicate is a cosine of a CLIP: give --scorer, as for `aspo score`")
    if args.pool is not None and options.method not in POOLED:
        raise ValueError(
            f"--pool is not read by --method {options.method}, which makes negatives of the row's own image"
        )
    return options


def run(args: argparse.Namespace) -> int:
    """Run `aspo negatives`."""
    options = read_options(args)
    engine = shards.Engine.of(args)
    rows = load_rows(args.data, limit=args.limit, image_root=args.image_root)
    validate_rows(rows)
    twice = [name for name, count in Counter(rows["id"]).items() if count > 1]
    if twice:
        raise ValueError(f"{row_name({'id': twice[0]})} is there more than once; ids must differ to go on after a stop")
    pool = None
    if options.method in POOLED:
        images = rows.select_columns([c for c in ("images", "scene") if c in rows.column_names])
        pool = read_pool(images) if args.pool is None else read_pool(args.pool, args.image_root)
    out = Path(args.out)
    settings = {name: getattr(args, name) for name in ("data", "image_root", "scorer")} | asdict(options)
    settings |= {"pool": None if pool is None else pool.digest}
    if _begun(out):
        check_settings(out / SETTINGS_FILE, settings, "aspo negatives", "rows")
    engine.processes.once("", lambda: write_json(out / SETTINGS_FILE, settings))
    device = engine.processes.device_for(args.device)
    scorer = None if args.scorer is None else LazyScorer(load_scorer, args.scorer, device)
    made = add_negatives(rows, out, options, scorer=scorer, pool=pool, device=resolve_device(device), engine=engine)
    if engine.processes.main:
        print(summary(made, out))
    if not made["rows"]:
        raise ValueError(f"none of the {len(rows)} rows of {args.data} got a negative; the list above says why")
    return 0
