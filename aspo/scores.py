"""`aspo score`: the similarity of each sentence to its image, kept in the data set.

The rows are scored in shards (`aspo.shards`), by any number of processes. `scores.jsonl` in the output folder keeps
every score under a hash of image, sentence and scorer: a data set that grew is scored only where it is new.
"""

import argparse
import hashlib
import json
import math
import statistics
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from aspo import shards
from aspo.data import load_images, load_rows, response_text, row_name, validate_rows
from aspo.folder import ROWS_FILE, append_line, image_bytes, image_entries, read_lines, row_line
from aspo.progress import progress_bar
from aspo.prompts import named
from aspo.scorers import LazyScorer, Scorer, load_scorer
from aspo.sentences import Splitter, check_spans, split_sentences

CACHE_FILE = "scores.jsonl"
Row = Mapping[str, Any]


def score_rows(
    rows: Sequence[Row],
    scorer: Scorer,
    *,
    cache: str | Path | None = None,
    known: MutableMapping[str, float] | None = None,
    splitter: Splitter = split_sentences,
    columns: Sequence[str] = ("chosen",),
    batch_size: int = 32,
    progress: Callable[[int], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """The rows with `<column>_sentences` and `<column>_similarity` (raw fp32 cosines) for each response column.

    Args:
        rows: preference rows, each scored response read with one image. Sentences that a row already has are kept.
        scorer: see `aspo.scorers.load_scorer`.
        cache: file of scores already made; grows as scores are made. None = none.
        known: scores already made, by their keys in such a file; gets the new ones.
        splitter: cuts responses that have no sentences yet.
        batch_size: rows at a time.
        progress: called with the number of rows after each batch.

    Raises:
        ValueError: a response that is not read with exactly one image, or has a score that is not finite.
    """
    known = {} if known is None else known
    if cache is not None:
        known.update(read_scores(Path(cache)))
    for start in range(0, len(rows), batch_size):
        batch = [dict(rows[i]) for i in range(start, min(start + batch_size, len(rows)))]
        keys = [_cut_and_name(row, scorer, splitter, columns) for row in batch]
        fresh = _missing_scores(batch, keys, known, scorer, columns)
        if fresh and cache is not None:
            append_line(Path(cache), "".join(_score_lines(fresh)))
        known.update(fresh)
        for row, of_column in zip(batch, keys, strict=True):
            for column in columns:
                row[f"{column}_similarity"] = [known[key] for key in of_column[column]]
            yield row
        if progress is not None:
            progress(len(batch))


def read_scores(cache: Path) -> dict[str, float]:
    """The scores of a cache file by their keys; none where it is not there."""
    return {line["key"]: line["similarity"] for line in read_lines(cache)}


def _score_lines(scores: Mapping[str, float]) -> list[str]:
    return [json.dumps({"key": key, "similarity": value}) + "\n" for key, value in scores.items()]


def images_column(row: Row, column: str) -> str:
    """The column of the images that a response is read with, as in training: its own, where there are any."""
    own = f"{column}_images"
    return own if image_entries(row, own) else "images"


def _sentences(row: Row, column: str) -> list[str]:
    text = response_text(row[column])
    return [text[a:b].strip() for a, b in row[f"{column}_sentences"]]


def _cut_and_name(row: dict[str, Any], scorer: Scorer, splitter: Splitter, columns: Sequence[str]) -> dict[str, list]:
    """Give the row its sentences; returns each sentence's key in the cache."""
    keys = {}
    for column in columns:
        entries = image_entries(row, source := images_column(row, column))
        if len(entries) != 1:
            raise ValueError(
                f"{row_name(row)}: it has {len(entries)} {source.replace('_', ' ')}; sentences are scored against "
                "exactly one"
            )
        image = hashlib.sha256(image_bytes(entries[0])).hexdigest()
        text = response_text(row[column])
        given = row.get(f"{column}_sentences")
        try:
            row[f"{column}_sentences"] = check_spans(text, splitter(text) if given is None else given)
        except ValueError as error:
            raise ValueError(f"{row_name(row)}, column '{column}_sentences': {error}") from error
        keys[column] = [
            hashlib.sha256("\0".join((scorer.identity, image, sentence)).encode()).hexdigest()[:32]
            for sentence in _sentences(row, column)
        ]
    return keys


def _missing_scores(
    batch: Sequence[Row],
    keys: Sequence[dict[str, list]],
    known: Mapping[str, float],
    scorer: Scorer,
    columns: Sequence[str],
) -> dict[str, float]:
    """key -> similarity for what `known` lacks; each image and each sentence is encoded once."""
    wanted: dict[str, tuple[tuple[int, str], str]] = {}  # key -> ((row, image column), sentence)
    for n, (row, of_column) in enumerate(zip(batch, keys, strict=True)):
        for column in columns:
            image = n, images_column(row, column)
            for key, sentence in zip(of_column[column], _sentences(row, column), strict=True):
                if key not in known:
                    wanted.setdefault(key, (image, sentence))
    if not wanted:
        return {}
    needed = sorted({image for image, _ in wanted.values()})
    images = scorer.image_features([named(batch[n], load_images, batch[n], column)[0] for n, column in needed])
    texts = list(dict.fromkeys(sentence for _, sentence in wanted.values()))
    features = scorer.text_features(texts)
    image_of, text_of = {image: i for i, image in enumerate(needed)}, {text: i for i, text in enumerate(texts)}
    scores = {}
    for key, (image, sentence) in wanted.items():
        value = float(images[image_of[image]] @ features[text_of[sentence]])
        if not math.isfinite(value):
            raise ValueError(f"{row_name(batch[image[0]])}: the similarity of {sentence!r} to its image is {value}")
        scores[key] = value
    return scores


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `aspo score`."""
    parser.description = (
        "Cut the chosen responses of preference rows into sentences and score the similarity of each to the row's\n"
        "image with a CLIP model. Writes a folder with the rows, chosen_sentences and chosen_similarity (cosines).\n"
        "Run the same command again to go on after a stop: scores that are there are not made again."
    )
    parser.epilog = (
        "examples:\n"
        "  aspo score --data pairs --out scored --scorer open_clip:ViT-B-32/laion2b_s34b_b79k\n"
        "  aspo score --data pairs --out scored --scorer transformers:openai/clip-vit-large-patch14\n"
        "  aspo score --data runs/pairs --out runs/scored --scorer world"
    )
    parser.add_argument("--data", required=True, help="preference rows: folder, .jsonl, .json or .parquet")
    parser.add_argument("--out", required=True, help="folder to write (may be the folder of --data)")
    parser.add_argument(
        "--scorer",
        required=True,
        help="open_clip:ARCHITECTURE/PRETRAINED, open_clip:FOLDER, transformers:FOLDER_OR_HUB_NAME, or world",
    )
    parser.add_argument("--rejected", action="store_true", help="score the rejected responses too")
    parser.add_argument("--language", default="en", help="language code of the sentence splitter (default: en)")
    parser.add_argument("--batch-size", type=int, default=32, help="rows at a time (default: 32)")
    parser.add_argument("--limit", type=int, help="only the first rows (default: all)")
    parser.add_argument("--image-root", help="where relative image paths start (default: the folder of --data)")
    parser.add_argument("--device", help="torch device (default: the accelerator if there is one, else cpu)")
    shards.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run `aspo score`."""
    if args.batch_size < 1:
        raise ValueError(f"--batch-size is {args.batch_size}; it must be at least 1")
    split_sentences(".", args.language)  # an unknown language stops here
    engine = shards.Engine.of(args)
    rows = load_rows(args.data, limit=args.limit, image_root=args.image_root)
    validate_rows(rows)
    columns = ("chosen", "rejected") if args.rejected else ("chosen",)
    out = Path(args.out)
    _check_replaced(out, rows)
    scorer = LazyScorer(load_scorer, args.scorer, engine.processes.device_for(args.device))
    job = shards.Job(
        out,
        "scores",
        rows,
        {"scorer": scorer.identity, "columns": columns, "language": args.language},
        lambda: _maker(scorer, out, args.language, columns),
        args.batch_size,
        title="scoring",
        added=(CACHE_FILE,),
        replaces=True,
    )
    shards.run_job(job, engine)
    if engine.processes.main:
        scored = [row["chosen_similarity"] for row in read_lines(out / ROWS_FILE)]
        print(summary(scored, scorer.identity, out))
    return 0


def _maker(scorer: Scorer, out: Path, language: str, columns: Sequence[str]) -> shards.Make:
    """Scores what scores.jsonl lacks; it does not grow before all shards are there, so that batches stay the same."""
    before = read_scores(out / CACHE_FILE)

    def make(batch: Sequence[Row], start: int) -> dict[str, list[str]]:
        fresh: dict[str, float] = {}
        scored = score_rows(
            batch,
            scorer,
            known=ChainMap(fresh, before),
            splitter=lambda text: split_sentences(text, language),
            columns=columns,
            batch_size=len(batch),
        )
        rows = [row_line(out, row) for row in scored]
        return {CACHE_FILE: _score_lines(fresh), ROWS_FILE: rows}

    return make


def _check_replaced(out: Path, rows: Any) -> None:
    """The rows that are in `out` already must all be among those that will replace them."""
    ids = set(rows["id"])
    there = (str(n if row.get("id") is None else row["id"]) for n, row in enumerate(read_lines(out / ROWS_FILE)))
    if lost := [name for name in there if name not in ids]:
        raise ValueError(
            f"{out / ROWS_FILE} holds {len(lost)} rows that would be lost, e.g. {row_name({'id': lost[0]})}: use "
            "another --out, or score them too (--data, --limit)"
        )


def summary(scored: Sequence[Sequence[float]], scorer: str, out: Path) -> str:
    """What was scored, and whether the scores tell the sentences of a response apart."""
    values = [value for row in scored for value in row]
    ranges = [max(row) - min(row) for row in scored if len(row) > 1]
    lines = [
        f"{len(values)} sentences of {len(scored)} chosen responses scored by {scorer}, in {out}",
        f"similarity: mean {statistics.fmean(values):.4f}, lowest {min(values):.4f}, highest {max(values):.4f}",
    ]
    if ranges:
        flat = sum(r <= 1e-5 for r in ranges)
        lines.append(
            f"range within a response: median {statistics.median(ranges):.4f}; no range in {flat} of {len(ranges)}"
        )
    single = len(scored) - len(ranges)
    if single:
        lines.append(f"{single} responses have one sentence: for them ASPO is DPO")
    return "\n".join(lines)


__all__ = ["CACHE_FILE", "add_arguments", "progress_bar", "run", "score_rows", "summary"]
