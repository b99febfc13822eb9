"""Objects named in a text: a vocabulary of names and synonyms, and where its words stand, plurals and misspellings too.

CHAIR (`aspo.evaluation.metrics`) reads which objects an answer names; token rewards (`verifier`) read where they are
named.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

FUZZY_CUTOFF = 0.88
"""difflib's ratio from which a word counts as a misspelled name. An added or lost letter passes from 5 letters on
(giraffe, girafe), a wrong letter from 9 on: below, one letter makes another word (horse, house; glasses, grasses)."""
FUZZY_LETTERS = 5
"""Words and names of fewer letters are never taken for one another."""

IRREGULAR_PLURALS = {
    **{"men": "man", "women": "woman", "children": "child", "policemen": "policeman", "gentlemen": "gentleman"},
    **{"knives": "knife", "shelves": "shelf", "scarves": "scarf", "calves": "calf", "wolves": "wolf"},
    **{"mice": "mouse", "geese": "goose", "oxen": "ox"},
}
"""Plurals that no ending makes, of words that name objects."""
ES_BEHIND = ("s", "x", "z", "ch", "sh", "o")
"""What -es makes a plural behind; behind other letters it makes another word (man and manes, ski and skies)."""

_WORD = re.compile(r"[^\W\d_]+")
Row = Mapping[str, Any]


class ObjectWord(NamedTuple):
    """An object word in a text: characters [start, end), the vocabulary's entry that it matches, its object's name."""

    start: int
    end: int
    entry: str
    name: str


class ObjectVocabulary:
    """Object names and their synonyms, found in text as CHAIR does: whole words, longest phrase first, plurals too.

    One object a line: `name, synonym, synonym`; empty lines and lines that start with # are skipped.
    """

    def __init__(self, lines: Iterable[str]):
        self.canonical: dict[str, str] = {}
        for number, line in enumerate(lines, start=1):
            names = [" ".join(part.split()).casefold() for part in line.split(",") if part.strip()]
            if not names or line.lstrip().startswith("#"):
                continue
            for name in names:
                if self.canonical.setdefault(name, names[0]) != names[0]:
                    raise ValueError(
                        f"object vocabulary, line {number}: {name!r} already belongs to {self.canonical[name]!r}; "
                        "list it once"
                    )
        if not self.canonical:
            raise ValueError("the object vocabulary is empty; write one object a line: name, synonym, synonym")
        self._entries = {name: name for name in self.canonical}
        for name, canonical in list(self.canonical.items()):
            for plural in _plurals(name):
                if self.canonical.setdefault(plural, canonical) == canonical:
                    self._entries.setdefault(plural, name)
        phrases = sorted(self.canonical, key=len, reverse=True)
        alternatives = "|".join(re.escape(phrase).replace(r"\ ", r"\s+") for phrase in phrases)
        self.pattern = re.compile(rf"\b({alternatives})\b")
        self._near = lru_cache(maxsize=65536)(self._nearest)

    @property
    def lines(self) -> list[str]:
        """The vocabulary as lines; `ObjectVocabulary(vocabulary.lines)` finds the same words."""
        own = sorted(self.entries, key=lambda entry: (self.canonical[entry], entry != self.canonical[entry], entry))
        return [", ".join(group) for _, group in groupby(own, key=self.canonical.__getitem__)]

    @property
    def entries(self) -> list[str]:
        """Every name and synonym as it was given, plurals left out."""
        return [name for name, entry in self._entries.items() if name == entry]

    def name(self, word: str) -> str:
        """The canonical name of a true object. Raises ValueError if the vocabulary lacks it."""
        word = " ".join(word.split()).casefold()
        if word not in self.canonical:
            raise ValueError(
                f"object {word!r} is not in the object vocabulary; add it or a line that lists it as a synonym"
            )
        return self.canonical[word]

    def mentions(self, text: str) -> list[str]:
        """Canonical names of the objects named in `text`, in order, repeats kept."""
        return [word.name for word in self.words(text)]

    def words(self, text: str, fuzzy: bool = False) -> list[ObjectWord]:
        """The object words of `text` in order; they do not overlap.

        fuzzy: words that are no name but nearly one count too (`FUZZY_CUTOFF`, `FUZZY_LETTERS`); the best name wins.
        """
        folded, place = _fold(text)
        found = []
        for match in self.pattern.finditer(folded):
            form = " ".join(match.group().split())
            found.append(self._word(place, match.span(), self._entries[form]))
        if fuzzy:
            taken = {i for word in found for i in range(word.start, word.end)}
            for match in _WORD.finditer(folded):
                entry = None if place[match.start()] in taken else self._near(match.group())
                if entry is not None:
                    found.append(self._word(place, match.span(), entry))
        return sorted(found)

    def _word(self, place: Sequence[int], span: tuple[int, int], entry: str) -> ObjectWord:
        return ObjectWord(place[span[0]], place[span[1] - 1] + 1, entry, self.canonical[entry])

    def _nearest(self, word: str) -> str | None:
        if len(word) < FUZZY_LETTERS:
            return None
        names = [name for name in self._entries if len(name) >= FUZZY_LETTERS]
        near = difflib.get_close_matches(word, names, n=1, cutoff=FUZZY_CUTOFF)
        return self._entries[near[0]] if near else None


def _plurals(name: str) -> list[str]:
    before, space, last = name.rpartition(" ")
    irregular = [before + space + plural for plural, singular in IRREGULAR_PLURALS.items() if singular == last]
    endings = [name + "s"] + ([name + "es"] if name.endswith(ES_BEHIND) else [])
    return [*irregular, *endings, *([name[:-1] + "ies"] if name.endswith("y") else [])]


def _fold(text: str) -> tuple[str, list[int]]:
    """The text casefolded, and which character of `text` each of its characters comes from ("ß" becomes two)."""
    folded = [character.casefold() for character in text]
    return "".join(folded), [i for i, characters in enumerate(folded) for _ in characters]


def load_vocabulary(source: str, rows: Iterable[Row] = ()) -> ObjectVocabulary:
    """The vocabulary that `--objects` names.

    Args:
        source: a file of lines `name, synonym, synonym`; "rows" = every name in the rows' `objects`; "world" = the
            embedded world's shapes and colours, "world:shapes" or "world:colours" = one of the two.
        rows: read for "rows".

    Raises ValueError where it would be empty, OSError where the file is not there.
    """
    if source.partition(":")[0] == "world":
        from aspo.world.scenes import COLOURS, SHAPES  # the embedded world is optional to everything else here

        parts = {"world": (*SHAPES, *COLOURS), "world:shapes": SHAPES, "world:colours": COLOURS}
        if source not in parts:
            raise ValueError(f"--objects {source}: the world has {', '.join(parts)}")
        return ObjectVocabulary(parts[source])
    if source == "rows":
        names = sorted({" ".join(name.split()).casefold() for row in rows for name in row.get("objects") or ()})
        if not names:
            raise ValueError(
                "--objects rows: the calibration rows name no objects (column 'objects'): the vocabulary would be "
                "empty; give a file of names"
            )
        return ObjectVocabulary(names)
    return ObjectVocabulary(Path(source).read_text(encoding="utf-8").splitlines())


def judge_words(text: str, words: Sequence[ObjectWord], row: Row, vocabulary: ObjectVocabulary) -> list[bool | None]:
    """Whether each object word of `text` is right by the row's truth; None where the truth does not say.

    `objects`: a word is right if its object is listed. `scene` (the embedded world): a shape is right if it is in the
    scene, a colour if the sentence that states it is true; other words are not judged.

    Raises ValueError for a row with neither, and for a listed object that the vocabulary lacks.
    """
    if row.get("objects") is not None:
        there = {vocabulary.name(name) for name in row["objects"]}
        return [word.name in there for word in words]
    if row.get("scene") is None:
        raise ValueError("no truth to judge object words by: it needs 'objects' (names) or 'scene'")
    from aspo.world.language import judge
    from aspo.world.scenes import SHAPES, Scene

    scene = Scene.from_json(row["scene"])
    claims = judge(text, scene)
    verdicts: list[bool | None] = []
    for word in words:
        if word.name in SHAPES:
            verdicts.append(word.name in scene.by_shape)
            continue
        of = next((claim for claim in claims if claim.start <= word.start < claim.end), None)
        states = of is not None and of.checkable and word.name in (of.stated, of.subject)
        verdicts.append(of.verdict == "true" if of is not None and states else None)
    return verdicts
