"""aspo/sentences.py: any text, any spans, any token offsets."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from hypothesis import strategies as st

from aspo.sentences import check_spans, sentences_without_tokens, split_sentences, token_sentences

from .guard import refusal

PIECES = (
    *("Dr. ", "e.g. ", "U.S. ", "Fig. 3 ", "a.m. ", "J. R. ", "v1.2.3", "$3.50 ", "1. ", "- ", "1) ", "(a) "),
    *("http://x.y/z. ", ". ", "! ", "? ", "... ", "…", "。", "！", "؟ ", "।", ".", "?!", "; ", ": ", ", "),
    *('"', "'", "“", "”", "«", "»", "「", "」", "(", ")", "[", "]", "{", "}", "<", ">", "`", "**", "_", "~"),
    *(" ", "\n", "\r\n", "\t", "\v", "\f", "\x1c", "\x85", "\u2028", "\u2029", "\u00a0", "\u200b", "\ufeff"),
    *("\u202e", "\u200d", "a", "The cat sat", "B", "é", "e\u0301", "ß", "İ", "猫", "🐶", "👩\u200d💻", "\x00"),
    *("\ud800", "<image>", "x" * 50, "&", "∯", "ȸ", "☉"),
)  # fmt: skip
LANGUAGES = ("en", "en", "en", "de", "fr", "zh", "ja", "ar", "hi", "xx", "", "en_US", "../en", "\x00")
ANY = st.text(st.characters(exclude_categories=()), max_size=80)
REPEATED = st.tuples(st.sampled_from(PIECES) | ANY, st.sampled_from((1, 1, 1, 2, 3, 10, 200, 3000))).map(
    lambda pair: (pair[0] * pair[1])[:12_000]
)
TEXTS = (
    ANY
    | st.lists(st.sampled_from(PIECES) | ANY, max_size=40).map("".join)
    | st.lists(REPEATED, max_size=6).map("".join)
)
NUMBERS = st.integers(-3, 60) | st.sampled_from((2**31, 2**63, -(2**63), 1.5, float("nan"), True, None, "3"))
SPANS = st.lists(st.lists(NUMBERS, max_size=3) | NUMBERS, max_size=6) | NUMBERS
INPUTS = st.fixed_dictionaries(
    {
        "text": TEXTS,
        "language": st.sampled_from(LANGUAGES),
        "spans": SPANS,
        "token_lengths": st.lists(st.integers(0, 9), max_size=40),
    }
)


def check(value: Any) -> None:
    """Spans cover the text and hold words; tokens get sentences in order; foreign spans are taken whole or refused."""
    text = value["text"]
    spans = []
    with refusal("language"):
        spans = split_sentences(text, value["language"])
        assert check_spans(text, spans) == spans
        assert "".join(text[a:b] for a, b in spans) == text
        assert all(a < b for a, b in spans)
        if any(c.isalnum() for c in text):
            assert all(any(c.isalnum() for c in text[a:b]) for a, b in spans), "a sentence without a word"
        assert spans == split_sentences(text, value["language"])
    if spans:
        _check_tokens(text, spans, value["token_lengths"])
    with refusal("sentence"):
        assert "".join(text[a:b] for a, b in check_spans(text, value["spans"])) == text


def _check_tokens(text: str, spans: list[tuple[int, int]], lengths: list[int]) -> None:
    """Tokens of these lengths, again and again until the text is over, then one without characters at its end."""
    edges, n = [0], 0
    while edges[-1] < len(text) and sum(lengths):
        edges.append(min(len(text), edges[-1] + lengths[n % len(lengths)]))
        n += 1
    offsets = [*pairwise(edges), (len(text), len(text))]
    ids = token_sentences(offsets, spans, text)
    assert len(ids) == len(offsets)
    assert all(0 <= i < len(spans) for i in ids)
    assert all(a <= b for a, b in pairwise(ids)), "sentence ids go backwards"
    for (a, b), i in zip(offsets, ids, strict=True):
        word = next((k for k in range(a, b) if not text[k].isspace()), None)
        assert word is None or spans[i][0] <= word < spans[i][1], "a token in another sentence than its first character"
    left = sentences_without_tokens(ids, len(spans))
    assert sorted({*ids, *left}) == list(range(len(spans)))
