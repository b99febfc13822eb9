"""AMBER: descriptions and yes/no questions about annotated images, without a judge (Wang et al., arXiv 2311.07397)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from aspo.evaluation.metrics import Counts, yes_no
from aspo.rewards.object_words import ES_BEHIND, IRREGULAR_PLURALS
from aspo.suite.benchmark import Benchmark, Item, Row, Source, need, read_json, read_rows

KINDS = {
    "discriminative-hallucination": "existence",
    **dict.fromkeys((f"discriminative-attribute-{part}" for part in ("state", "number", "action")), "attribute"),
    **dict.fromkeys(("discriminative-relation", "relation"), "relation"),
}
# Words of AMBER's list that a description uses as verb or adjective more often than as a noun ("can be seen"): the
# original tags parts of speech; we count these only behind a word that a noun follows, or in the plural.
SELDOM_NOUNS = {"can", "leave", "hot", "support", "watch", "sailing", "lock", "switch", "drink", "file", "bear", "rock"}
BEFORE_NOUNS = {"a", "an", "the", "one", "two", "three", "some", "several", "many", "few", "this", "that", "these"}
BEFORE_NOUNS |= {"those", "his", "her", "its", "their"}


class Associations:
    """AMBER's words: `relation.json` (a word and those that name it too) and `safe_words.txt`."""

    def __init__(self, relations: Mapping[str, Sequence[str]], safe: Iterable[str]):
        self.relations = {word: tuple(others) for word, others in relations.items()}
        self.safe = frozenset(word.strip() for word in safe if word.strip())
        self.words = frozenset(self.relations) | {other for others in self.relations.values() for other in others}

    def nouns(self, text: str) -> list[str]:
        """The words of the list that a text names, singular, in order, repeats kept."""
        found, before = [], ""
        for word in re.findall(r"[a-z]+(?:-[a-z]+)*", text.casefold()):
            noun = next((form for form in _singulars(word) if form in self.words), None)
            if noun is not None and (noun != word or noun not in SELDOM_NOUNS or before in BEFORE_NOUNS):
                found.append(noun)
            before = word
        return found

    def owner(self, noun: str, objects: Sequence[str]) -> int | None:
        """Which of `objects` a noun names, as the original looks it up: by association first, then by its own name."""
        named = (k for k, word in enumerate(objects) if noun in self.relations.get(word, ()))
        return next(named, objects.index(noun) if noun in objects else None)


def _singulars(word: str) -> list[str]:
    forms = [word, IRREGULAR_PLURALS.get(word, word)]
    if word.endswith("ies"):
        forms.append(word[:-3] + "y")
    if word.endswith("es") and word[:-2].endswith(ES_BEHIND):
        forms.append(word[:-2])
    return [*forms, word[:-1]] if word.endswith("s") and not word.endswith("ss") else forms


def load(source: Source, part: str = "all") -> list[Row]:
    """A row per query of `part`: all, generative, discriminative."""
    asked = source.file(f"data/query/query_{part}.json", f"query/query_{part}.json")
    queries = read_rows(asked, "id", "image", "query")
    annotated = read_rows(source.file("data/annotations.json", "annotations.json"), "id", "type", "truth")
    truths = {row["id"]: row for row in annotated}
    safe = source.file("data/safe_words.txt", "safe_words.txt").read_text(encoding="utf-8").splitlines()
    words = Associations(read_json(source.file("data/relation.json", "relation.json")), safe)
    rows: list[Row] = []
    for query in queries:
        if query["id"] not in truths:
            raise ValueError(f"query {query['id']} has no row in annotations.json: are both of one version of AMBER?")
        truth = truths[query["id"]]
        where = f"annotations.json, id {query['id']}"
        row = {
            "id": str(query["id"]),
            "prompt": query["query"],
            "images": [source.image(query["image"], "image", "images", "data/image", "")],
            "cluster": query["image"],
            "truth": truth["truth"],
        }
        if truth["type"] == "generative":
            need(truth, where, "hallu")
            rows.append(row | {"kind": "generative", "hallu": truth["hallu"], "words": words, "max_new_tokens": 512})
        elif truth["type"] in KINDS and truth["truth"] in ("yes", "no"):
            rows.append(row | {"kind": KINDS[truth["type"]], "max_new_tokens": 32})
        else:
            raise ValueError(
                f"{where}: type {truth['type']!r} with truth {truth['truth']!r}; known are generative and "
                f"{', '.join(KINDS)}, whose truth is yes or no"
            )
    return rows


def score(row: Row, text: str, replies: Sequence[str] | None) -> Item:
    """Counts of a description or of a question, after the original's script."""
    if row["kind"] == "generative":
        return _describe(row, text)
    said = yes_no(text)
    marks = {
        "asked": True,
        "right": said == row["truth"],
        "truth_no": row["truth"] == "no",
        "said_no": said == "no",
        "no_hit": said == row["truth"] == "no",
        "unanswered": said is None,
    }
    kinds = (row["kind"], "all")
    return {
        "said": said,
        "counts": {f"amber_{kind}_{mark}": int(holds) for kind in kinds for mark, holds in marks.items()},
    }


def _describe(row: Row, text: str) -> Item:
    words: Associations = row["words"]
    covered, expected, absent = set(), set(), []
    nouns = words.nouns(text)
    for noun in nouns:
        if noun in words.safe:
            continue
        if (true := words.owner(noun, row["truth"])) is not None:
            covered.add(true)
            continue
        if (lure := words.owner(noun, row["hallu"])) is not None:
            expected.add(lure)
        absent.append(noun)
    counts: Counts = {
        "amber_answers": 1,
        "amber_named": len(nouns),
        "amber_absent": len(absent),
        "amber_hallucinated": int(bool(absent)),
        "amber_true": len(row["truth"]),
        "amber_covered": len(covered),
        "amber_expected": len(row["hallu"]),
        "amber_expected_named": len(expected),
    }
    return {"named": nouns, "absent": absent, "counts": counts}


def answers(rows: Sequence[Row], items: Sequence[Item]) -> Any:
    """The original's inference file: {"id", "response"}, for questions "Yes" or "No" where that was said."""
    return [
        {"id": int(row["id"]), "response": (item.get("said") or "").capitalize() or item["text"]}
        for row, item in zip(rows, items, strict=True)
    ]


HOME = "https://github.com/junyangwang0410/AMBER"
AMBER = Benchmark("amber", "AMBER", HOME, load, score, answers)
AMBER_G = Benchmark("amber-g", "AMBER, generative", HOME, partial(load, part="generative"), score, answers)
AMBER_D = Benchmark("amber-d", "AMBER, discriminative", HOME, partial(load, part="discriminative"), score, answers)
