"""CHAIR on COCO: which objects a description names that are not in the image (Rohrbach et al., EMNLP 2018)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from aspo.evaluation.metrics import ObjectVocabulary, chair_counts
from aspo.suite.benchmark import Benchmark, Item, Row, Source, need, read_json

PROMPT = "Please describe this image in detail."
ANIMALS = "bird|cat|dog|horse|sheep|cow|elephant|bear|zebra|giraffe|animal|cub"
# The original's rules beside its synonyms, where they change anything: "baby bird" and "passenger jet" name no person,
# "train track" no train, and where a toilet is named a seat is no chair.
QUALIFIED = re.compile(
    rf"\b(?:(?:baby|adult)\s+(?=(?:{ANIMALS})s?\b)|passenger\s+(?=(?:jet|train)s?\b)|train\s+(?=tracks?\b))"
)


class CocoObjects:
    """The original's object words: a synonyms file (`name, synonym, ...` a line) and its rules for pairs of words."""

    def __init__(self, lines: Iterable[str]):
        owner: dict[str, str] = {}
        for line in lines:
            names = [" ".join(part.split()).casefold() for part in line.split(",") if part.strip()]
            owner |= dict.fromkeys(names, names[0] if names else "")  # listed twice: the later line's, as the original
        groups: dict[str, list[str]] = {}
        for name, canonical in owner.items():
            groups.setdefault(canonical, []).append(name)
        self.vocabulary = ObjectVocabulary([", ".join([c, *(n for n in g if n != c)]) for c, g in groups.items()])

    def plain(self, text: str) -> str:
        """The text with the original's rules applied, in lower case, ready for `vocabulary`."""
        text = QUALIFIED.sub("", " ".join(text.split()).casefold())
        return re.sub(r"\bseats?\b", "", text) if re.search(r"\btoilets?\b", text) else text

    def named(self, text: str) -> list[str]:
        """Canonical names of the objects that a text names, in order, repeats kept."""
        return self.vocabulary.mentions(self.plain(text))


def load(source: Source) -> list[Row]:
    """A row per image of the instances file, in an order that is random but always the same.

    True objects are those of the instances and those that the reference captions name, as in the original.
    """
    words = CocoObjects(source.file("synonyms.txt", "data/synonyms.txt").read_text(encoding="utf-8").splitlines())
    instances_file = source.file(*_names("instances"))
    captions_file = source.file(*_names("captions"))
    instances, captions = _coco(instances_file, "images", "categories"), _coco(captions_file)
    names = {category["id"]: category["name"] for category in instances["categories"]}
    objects: dict[int, set[str]] = {image["id"]: set() for image in instances["images"]}
    for annotation in instances["annotations"]:
        if annotation["image_id"] in objects:
            objects[annotation["image_id"]].add(_canonical(words, names[annotation["category_id"]], instances_file))
    for annotation in captions["annotations"]:
        if annotation["image_id"] in objects:
            objects[annotation["image_id"]].update(words.named(annotation["caption"]))
    rows = [
        {
            "id": str(image["id"]),
            "prompt": PROMPT,
            "images": [source.image(image["file_name"], "val2014", "images", "")],
            "max_new_tokens": 512,
            "objects": sorted(objects[image["id"]]),
            "words": words,
        }
        for image in instances["images"]
    ]
    return sorted(rows, key=lambda row: hashlib.sha256(row["id"].encode()).digest())


def _names(kind: str) -> list[str]:
    return [f"{folder}{kind}_{part}.json" for part in ("val2014", "*") for folder in ("annotations/", "")]


def _coco(path: Path, *parts: str) -> Any:
    content = read_json(path)
    need(content, str(path), "annotations", *parts)
    return content


def _canonical(words: CocoObjects, name: str, path: Path) -> str:
    canonical = words.vocabulary.canonical.get(name.casefold())
    if canonical is None:
        raise ValueError(f"{path} has the category {name!r}, which synonyms.txt lacks: is it COCO's?")
    return canonical


def score(row: Row, text: str, replies: Sequence[str] | None) -> Item:
    """Objects named and absent; every mention counts."""
    words: CocoObjects = row["words"]
    named = words.named(text)
    return {
        "named": named,
        "absent": [name for name in named if name not in row["objects"]],
        "counts": chair_counts(words.plain(text), row["objects"], words.vocabulary),
    }


def answers(rows: Sequence[Row], items: Sequence[Item]) -> Any:
    """[{"image_id", "caption"}], as COCO's caption results and the ports of CHAIR read them."""
    return [{"image_id": int(row["id"]), "caption": item["text"]} for row, item in zip(rows, items, strict=True)]


CHAIR = Benchmark("chair", "CHAIR (COCO)", "https://github.com/LisaAnne/Hallucination", load, score, answers)
