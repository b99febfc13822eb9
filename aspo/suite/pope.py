"""POPE: "Is there a ... in the image?", yes or no (Li et al., EMNLP 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aspo.evaluation.metrics import YES_NO_SPLITS, yes_no, yes_no_counts
from aspo.suite.benchmark import Benchmark, Item, Row, Source, read_rows

PLACES = ("", "output/coco/", "coco/")


def load(source: Source) -> list[Row]:
    """A row per question of the splits that are there; questions about one image form a cluster."""
    files = {split: [f"{place}*pope_{split}.json*" for place in PLACES] for split in YES_NO_SPLITS}
    found = [split for split, names in files.items() if any(list(source.root.glob(name)) for name in names)]
    rows: list[Row] = []
    for split in found or YES_NO_SPLITS[:1]:  # none is there: let the first say so
        path = source.file(*files[split])
        for number, row in enumerate(read_rows(path, "question_id", "image", "text", "label"), 1):
            label = str(row["label"]).strip().casefold()
            if label not in ("yes", "no"):
                raise ValueError(f'{path}, row {number}: label is {row["label"]!r}; it must be "yes" or "no"')
            rows.append(
                {
                    "id": f"{split}/{row['question_id']}",
                    "prompt": row["text"],
                    "images": [source.image(row["image"], "val2014", "images", "")],
                    "cluster": row["image"],
                    "max_new_tokens": 32,
                    "split": split,
                    "label": label,
                    "own": row,
                }
            )
    return rows


def score(row: Row, text: str, replies: Sequence[str] | None) -> Item:
    """Counts of one question in its split and in "all"."""
    return {"said": yes_no(text), "counts": yes_no_counts([(row["split"], row["label"], text)])}


def answers(rows: Sequence[Row], items: Sequence[Item]) -> Any:
    """POPE's answer file, by split: {"question", "answer"}."""
    files: dict[str, list[Item]] = {}
    for row, item in zip(rows, items, strict=True):
        files.setdefault(row["split"], []).append({"question": row["own"]["text"], "answer": item["text"]})
    return files


POPE = Benchmark("pope", "POPE", "https://github.com/RUCAIBox/POPE", load, score, answers)
