"""Sentences: exact character spans of a text, then the sentence of every token.

`split_sentences` cuts with sentencesplit (rules; abbreviations, decimals, ellipses, quotes, lists, CJK) and makes the
spans fit to be scored: they are contiguous, their concatenation is the text, whitespace belongs to the sentence before
it (leading whitespace to the first), and every sentence has a letter or a digit in it wherever the text has one.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import pairwise

from sentencesplit import Segmenter

Span = tuple[int, int]
Splitter = Callable[[str], list[Span]]

# sentencesplit is linear on prose (5 us a character) but quadratic on unbalanced quotes and brackets (15 s and more on
# 64,000 characters), so it sees one window of the text at a time. A sentence longer than a window is cut.
WINDOW = 4096
# Marks that close what came before; left at the head of a segment after Markdown emphasis ("**Bold.** Next one.").
_CLOSERS = "*_`~\"'”’)]}»」』）】》"


def split_sentences(text: str, language: str = "en") -> list[Span]:
    """Contiguous `(start, end)` character spans of the sentences of `text`.

    Args:
        text: any text; "" has no sentences, a text of whitespace alone has one.
        language: a language code of sentencesplit; "en" also cuts at CJK sentence ends.

    Returns:
        Non-empty spans with `"".join(text[a:b] for a, b in spans) == text`.

    Raises:
        ValueError: sentencesplit does not know the language.
    """
    starts: list[int] = []
    at = 0
    while at < len(text):
        window = text[at : at + WINDOW]
        cuts = _segment_starts(window, language)
        end = len(window)
        if at + len(window) < len(text):  # more text follows: what the window's last segment would be is not known yet
            if cuts[-1] > 0:
                end = cuts.pop()
            else:  # one sentence of the whole window: cut it at its last whitespace
                blank = next((i for i in range(len(window) - 1, WINDOW // 2, -1) if window[i].isspace()), None)
                end = len(window) if blank is None else blank + 1
        starts += [at + cut for cut in cuts]
        at += end
    return _merge_wordless(text, list(pairwise([*starts, len(text)])))


def check_spans(text: str, spans: Iterable[Sequence[int]]) -> list[Span]:
    """`spans` as tuples, if they are non-empty, contiguous and cover `text` exactly; otherwise ValueError."""
    checked: list[Span] = []
    at = 0
    if isinstance(spans, str) or not isinstance(spans, Iterable):
        raise ValueError(f"the sentences are {spans!r}; they are a list of [start, end]")
    for i, span in enumerate(spans):
        if (
            not isinstance(span, Sequence)
            or len(span) != 2
            or any(isinstance(x, bool) or not isinstance(x, int) for x in span)
        ):
            raise ValueError(f"sentence {i} is {span!r}; a sentence is [start, end], two integers")
        start, end = span
        if start != at:
            raise ValueError(f"sentence {i} starts at character {start}, but the one before it ends at {at}")
        if not start < end <= len(text):
            raise ValueError(f"sentence {i} is [{start}, {end}] in a text of {len(text)} characters")
        checked.append((start, end))
        at = end
    if at != len(text):
        raise ValueError(f"the sentences end at character {at}, the text has {len(text)}")
    return checked


def token_sentences(offsets: Sequence[Span], spans: Sequence[Span], text: str) -> list[int]:
    """The sentence of every token: the one that holds the token's first character that is not whitespace.

    Args:
        offsets: (start, end) characters of each token in `text`, as a fast tokenizer's `offset_mapping` gives them.
            Several tokens may share one character (byte-level BPE), offsets may be empty or hold whitespace only:
            these belong where they start; those at the end of the text (EOS) to the sentence of the token before.
        spans: contiguous sentences of `text`.

    Returns:
        One index into `spans` per token, never going backwards. A sentence may be left without a token, when a token
        that starts before it covers it: see `sentences_without_tokens`.
    """
    ids: list[int] = []
    current = 0
    for start, end in offsets:
        first = next((i for i in range(start, end) if not text[i].isspace()), start)
        while first < len(text) and first >= spans[current][1]:
            current += 1
        ids.append(current)
    return ids


def sentences_without_tokens(token_ids: Sequence[int], num_sentences: int) -> list[int]:
    """Sentences that `token_sentences` gave no token, in order."""
    return sorted(set(range(num_sentences)).difference(token_ids))


def _segment_starts(window: str, language: str) -> list[int]:
    """Where the segments of `window` start; the first is 0."""
    starts = [0]
    for segment in _segmenter(language).segment_spans(window)[1:]:
        start = segment.start
        rest = window[start:]
        closers = len(rest) - len(rest.lstrip(_CLOSERS))
        follows = rest[closers : closers + 1]
        if closers and not window[start - 1].isspace() and (not follows or follows.isspace()):
            start += closers + (len(rest) - closers - len(rest[closers:].lstrip()))
        if starts[-1] < start < len(window):
            starts.append(start)
    return starts


@cache
def _segmenter(language: str) -> Segmenter:
    try:
        return Segmenter(language)
    except Exception as error:  # sentencesplit raises its own classes for an unknown code
        raise ValueError(f"language {language!r}: {error}") from error


def _merge_wordless(text: str, spans: list[Span]) -> list[Span]:
    """Join a sentence without a letter or digit (a rule, a lone emoji) to the one before it, the first to the next."""
    merged: list[Span] = []
    for start, end in spans:
        has_word = any(c.isalnum() for c in text[start:end])
        previous_has_word = bool(merged) and any(c.isalnum() for c in text[slice(*merged[-1])])
        if merged and not (has_word and previous_has_word):
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return merged
