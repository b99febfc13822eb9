"""Where two responses differ, word by word: the corrected segments of RLHF-V's DDPO (arXiv 2312.00849) and of CHiP.

People who correct an answer leave most of it alone; between two sampled answers nearly everything may differ, and then
every word is marked alike, which weighs nothing.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from aspo.validate import response_text

LEAST_MATCH = 3  # words; a shorter common run between two changes is part of the change
_WORD = re.compile(r"\w+|[^\w\s]")

Spans = list[tuple[int, int, float]]  # [start, end, 1.0] over characters


def changed_spans(chosen: str, rejected: str, least_match: int = LEAST_MATCH) -> tuple[Spans, Spans]:
    """The parts of each text that are not in the other, in the same order; a common run of fewer words counts not."""
    words = [list(_WORD.finditer(text)) for text in (chosen, rejected)]
    texts = [[match.group() for match in side] for side in words]
    matcher = difflib.SequenceMatcher(None, texts[0], texts[1], autojunk=False)
    same: list[set[int]] = [set(), set()]
    for block in matcher.get_matching_blocks():
        if block.size >= least_match:
            for k, start in enumerate((block.a, block.b)):
                same[k].update(range(start, start + block.size))
    return _spans(words[0], same[0]), _spans(words[1], same[1])


def _spans(words: Sequence[re.Match[str]], same: set[int]) -> Spans:
    """Runs of words that are not in `same`, each as one span with the space inside it."""
    spans: Spans = []
    for n, word in enumerate(words):
        if n in same:
            continue
        if spans and n - 1 not in same:
            spans[-1] = (spans[-1][0], word.end(), 1.0)
        else:
            spans.append((word.start(), word.end(), 1.0))
    return spans


def score_changes(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Spans]]:
    """The spans of each row's responses by column, as `aspo rewards` writes them."""
    found = []
    for row in rows:
        chosen, rejected = changed_spans(response_text(row["chosen"]), response_text(row["rejected"]))
        found.append({"chosen": chosen, "rejected": rejected})
    return found
