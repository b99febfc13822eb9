"""SHR: the share of a description's sentences that a judge finds hallucinated (HA-DPO, arXiv 2311.16839)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from aspo.evaluation.metrics import Counts
from aspo.suite.benchmark import Benchmark, Item, Row, Source, read_rows

PROMPT = "Describe this image in detail."
VERDICT = re.compile(
    r"^\W*(?:sentence\s*)?(\d+)\W+(hallucination|correct|cannot judge)\b", flags=re.IGNORECASE | re.MULTILINE
)
RUBRIC = """\
A model described an image that you cannot see. Below is what people wrote down about that image: short descriptions \
of regions, each with its box [left, top, right, bottom] as shares of the image's width and height (boxes that overlap \
much may show the same thing), and further facts. Both are correct, but they do not cover everything.

Judge each numbered sentence of the model's description:
- hallucination: it states something that contradicts what is known about the image, or names things that are not in it;
- correct: what it states agrees with what is known;
- cannot judge: it is about mood, style or feeling, or nothing known speaks for or against it.

Answer with one line a sentence, in their order, and nothing else:
NUMBER: VERDICT - REASON IN A FEW WORDS

Regions:
{regions}

Facts:
{facts}

Sentences to judge:
{sentences}
"""


def load(source: Source) -> list[Row]:
    """A row per image of val_images_final.json, with Visual Genome's regions and SHR's facts about it."""
    shr, vg = ("shr/", "", "data/shr/"), ("VG/", "", "data/VG/")
    listed = read_rows(source.file(*(f"{place}val_images_final.json" for place in shr)), "image_id")
    facts: dict[str, list[str]] = {}
    for part in (1, 2):
        for row in read_rows(source.file(*(f"{place}shr_factual_part{part}.jsonl" for place in shr))):
            facts |= {str(image): list(texts) for image, texts in row.items()}
    data = source.file(*(f"{place}image_data.json" for place in vg))
    images = {row["image_id"]: row for row in read_rows(data, "image_id", "url", "width", "height")}
    described = source.file(*(f"{place}region_descriptions.json" for place in vg))
    regions = {row["regions"][0]["image_id"]: row["regions"] for row in read_rows(described) if row.get("regions")}
    rows: list[Row] = []
    for wanted in listed:
        image_id = int(wanted["image_id"])
        if image_id not in images or image_id not in regions:
            raise ValueError(f"image {image_id} of val_images_final.json is not in {data.name} and {described.name}")
        image = images[image_id]
        folder, name = PurePosixPath(image["url"]).parts[-2:]
        rows.append(
            {
                "id": str(image_id),
                "prompt": PROMPT,
                "images": [source.image(f"{folder}/{name}", *vg)],
                "max_new_tokens": 512,
                "regions": [_region(region, image) for region in regions[image_id] if region.get("phrase")],
                "facts": facts.get(str(image_id), []),
            }
        )
    return rows


def _region(region: Row, image: Row) -> str:
    left, top = region["x"] / image["width"], region["y"] / image["height"]
    right, bottom = left + region["width"] / image["width"], top + region["height"] / image["height"]
    return f"[{left:.2f}, {top:.2f}, {right:.2f}, {bottom:.2f}]: {region['phrase']}"


def sentences(text: str) -> list[str]:
    """The description cut at full stops, as the original does; one whose words an earlier one holds is left out."""
    kept: list[str] = []
    for sentence in (part.strip() for part in text.split(".")):
        if sentence and not any(sentence in earlier for earlier in kept):
            kept.append(sentence)
    return kept


def questions(row: Row, text: str) -> list[str]:
    """One prompt about all sentences; none for an empty answer."""
    cut = sentences(text)
    if not cut:
        return []
    numbered = "\n".join(f"{number}. {sentence}" for number, sentence in enumerate(cut, 1))
    known = {"regions": "\n".join(row["regions"]), "facts": "\n".join(row["facts"]) or "none"}
    return [RUBRIC.format(**known, sentences=numbered)]


def score(row: Row, text: str, replies: Sequence[str] | None) -> Item:
    """Counts of the sentences that were judged; sentences without a verdict that can be read are counted apart."""
    cut = sentences(text)
    said: dict[int, str] = {}
    for number, verdict in VERDICT.findall("\n".join(replies or ())):
        said.setdefault(int(number), verdict.casefold())
    verdicts = [said.get(number) for number in range(1, len(cut) + 1)]
    judged = [(sentence, verdict) for sentence, verdict in zip(cut, verdicts, strict=True) if verdict]
    false = [sentence for sentence, verdict in judged if verdict == "hallucination"]
    counts: Counts = {
        "shr_answers": 1,
        "shr_all_sentences": len(cut),
        "shr_judged_sentences": len(judged),
        "shr_judged_words": sum(len(sentence.split()) for sentence, _ in judged),
        "shr_false": len(false),
        "shr_false_words": sum(len(sentence.split()) for sentence in false),
        "shr_cannot": sum(verdict == "cannot judge" for _, verdict in judged),
        "judge_asked": len(cut),
        "judge_unread": len(cut) - len(judged),
    }
    return {"sentences": [{"text": s, "verdict": v} for s, v in zip(cut, verdicts, strict=True)], "counts": counts}


def answers(rows: Sequence[Row], items: Sequence[Item]) -> Any:
    """The original's response file: image id -> description."""
    return {row["id"]: item["text"] for row, item in zip(rows, items, strict=True)}


SHR = Benchmark(
    "shr", "SHR", "https://github.com/opendatalab/HA-DPO", load, score, answers, questions, judge_needed=True
)
