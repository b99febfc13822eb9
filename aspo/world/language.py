"""The world's language: true descriptions, a judge for any answer, yes/no questions, minimal pairs, stateable facts.

One sentence makes one checkable claim:

    colour   The circle is red.              It is red.            ("It" is the last subject named)
    size     The circle is large.            It is large.
    place    The circle is at the top left.  It is at the top left.
    object   There is a circle.
    count    There are two red objects.      There are five objects.

What the judge cannot parse counts as unparseable, never as right.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from aspo.world.scenes import COLOURS, HELD_OUT, PLACES, SHAPES, SIZES, USUAL, Scene, Thing

DESCRIBE = "Describe the picture."
"""The prompt that asks for a description."""

KINDS = ("colour", "size", "place")
"""Kinds of claims about one object that `describe` can make."""

QUESTION_KINDS = ("random", "popular", "adversarial")

_NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
_SENTENCE = re.compile(r"[^.!?\n]*[^.!?\n\s][^.!?\n]*[.!?]*")
_SHAPE, _COLOUR, _SIZE = "|".join(SHAPES), "|".join(COLOURS), "|".join(SIZES)
_PLACE = "|".join(sorted(PLACES, key=len, reverse=True))
_ATTRIBUTE = re.compile(
    rf"(?:the (?P<subject>{_SHAPE})|it) is (?:(?P<colour>{_COLOUR})|(?P<size>{_SIZE})|at the (?P<place>{_PLACE}))"
)
_OBJECT = re.compile(rf"there is an? (?P<object>{_SHAPE})")
_COUNT = re.compile(rf"there (?:is|are) (?P<count>{'|'.join(_NUMBERS)}) (?:(?P<colour>{_COLOUR}) )?objects?")


@dataclass(frozen=True)
class Claim:
    """What one sentence of an answer claims, and whether the scene bears it out.

    `subject` is a shape, for counts a colour or "objects"; `stated` and `true` are values ("red", "two"); `true` is
    None where the subject is not in the scene; `prior` is the subject's usual colour (colour claims only).
    """

    start: int
    end: int
    text: str
    verdict: str  # "true" | "false" | "unparseable"
    kind: str | None = None  # "colour" | "size" | "place" | "object" | "count"
    subject: str | None = None
    stated: str | None = None
    true: str | None = None
    prior: str | None = None

    @property
    def span(self) -> tuple[int, int]:
        """Characters of the answer that hold the sentence."""
        return self.start, self.end

    @property
    def checkable(self) -> bool:
        return self.verdict != "unparseable"

    @property
    def fact(self) -> tuple[str, str, str] | None:
        """(kind, subject, stated value), comparable with `stateable`; None where nothing could be parsed."""
        if self.kind is None or self.subject is None or self.stated is None:
            return None
        return self.kind, self.subject, self.stated

    @property
    def states_prior(self) -> bool:
        """Whether the sentence gives the subject its usual colour, right or wrong."""
        return self.prior is not None and self.stated == self.prior

    @property
    def stratum(self) -> str | None:
        """Of a colour claim about an object that is there: "usual", "unusual" or "held_out" by its true colour."""
        if self.kind != "colour" or self.true is None:
            return None
        if (self.subject, self.true) in HELD_OUT:
            return "held_out"
        return "usual" if self.true == self.prior else "unusual"


def sentence(kind: str, subject: str, value: str, pronoun: bool = False) -> str:
    """The sentence that claims a fact: `sentence("colour", "circle", "red")` is "The circle is red."."""
    if kind == "object":
        return f"There is a {subject}."
    if kind == "count":
        noun = "objects" if subject == "objects" else f"{subject} objects"
        return f"There is one {noun[:-1]}." if value == "one" else f"There are {value} {noun}."
    if kind not in KINDS:
        raise ValueError(
            f"claim kind {kind!r} is not of this world; use one of {', '.join((*KINDS, 'object', 'count'))}"
        )
    name = "It" if pronoun else f"The {subject}"
    return f"{name} is at the {value}." if kind == "place" else f"{name} is {value}."


def describe(
    scene: Scene, rng: random.Random | None = None, kinds: Sequence[str] = ("colour",), pronouns: bool = False
) -> str:
    """A true description, one sentence per object (4 to 6).

    Objects come in reading order, or shuffled by `rng`; the kind of each claim is drawn from `kinds` by `rng` (without
    one: taken in turn). `pronouns` adds a second sentence about each object, which calls it "It" (two kinds or more).
    """
    if pronouns and len(kinds) < 2:
        raise ValueError(f"pronouns=True needs two kinds of claims or more, got {tuple(kinds)}")
    things = list(scene.things)
    if rng is not None:
        rng.shuffle(things)
    sentences = []
    for i, thing in enumerate(things):
        count = 2 if pronouns else 1
        chosen = rng.sample(list(kinds), count) if rng else [kinds[(i + j) % len(kinds)] for j in range(count)]
        for j, kind in enumerate(chosen):
            sentences.append(sentence(kind, thing.shape, getattr(thing, kind), pronoun=j > 0))
    return " ".join(sentences)


def _count(scene: Scene, subject: str) -> str:
    return _NUMBERS[sum(subject in ("objects", thing.colour) for thing in scene.things)]


def judge(text: str, scene: Scene) -> list[Claim]:
    """One Claim per sentence of `text`, in order, judged against the scene's truth."""
    claims = []
    last_subject = None
    for match in _SENTENCE.finditer(text):
        raw = match.group()
        start = match.start() + len(raw) - len(raw.lstrip())
        end = match.start() + len(raw.rstrip())
        claim = _parse(start, end, text[start:end], scene, last_subject)
        if claim.kind in ("colour", "size", "place", "object"):
            last_subject = claim.subject
        claims.append(claim)
    return claims


def _parse(start: int, end: int, text: str, scene: Scene, last_subject: str | None) -> Claim:
    words = " ".join(text.rstrip(".!?").lower().split())
    if match := _ATTRIBUTE.fullmatch(words):
        subject = match["subject"] or last_subject
        kind = next(kind for kind in KINDS if match[kind])
        if subject is not None:
            thing = scene.by_shape.get(subject)
            true = getattr(thing, kind) if thing else None
            prior = USUAL[subject] if kind == "colour" else None
            verdict = "true" if match[kind] == true else "false"
            return Claim(start, end, text, verdict, kind, subject, match[kind], true, prior)
    elif match := _OBJECT.fullmatch(words):
        there = match["object"] in scene.by_shape
        return Claim(
            start,
            end,
            text,
            "true" if there else "false",
            "object",
            match["object"],
            "present",
            "present" if there else None,
        )
    elif match := _COUNT.fullmatch(words):
        subject = match["colour"] or "objects"
        true = _count(scene, subject)
        return Claim(
            start, end, text, "true" if match["count"] == true else "false", "count", subject, match["count"], true
        )
    return Claim(start, end, text, "unparseable")


def stateable(scene: Scene, kinds: Sequence[str] = ("colour",)) -> set[tuple[str, str, str]]:
    """The true facts (kind, subject, value) that a description of these kinds can state; compare with `Claim.fact`."""
    return {(kind, thing.shape, getattr(thing, kind)) for thing in scene.things for kind in kinds}


def _question(colour: str, shape: str) -> str:
    return f"Is there {'an' if colour[0] == 'o' else 'a'} {colour} {shape}?"


def questions(scene: Scene, kind: str = "random", seed: int = 0) -> list[tuple[str, str]]:
    """Yes/no questions in POPE's manner, as many "yes" as "no". An object is a coloured shape; the absent ones are

    random       any coloured shape that is not there;
    popular      the commonest coloured shapes of base training (a shape in its usual colour) that are not there;
    adversarial  usual coloured shapes that are not there though the shape is, in another colour (then as popular).
    """
    if kind not in QUESTION_KINDS:
        raise ValueError(f"question kind {kind!r} is unknown; use one of {', '.join(QUESTION_KINDS)}")
    rng = random.Random(f"{scene.content_hash}:{kind}:{seed}")
    present = [(thing.colour, thing.shape) for thing in scene.things]
    pairs = [(c, s) for s in SHAPES for c in COLOURS] if kind == "random" else [(c, s) for s, c in USUAL.items()]
    absent = rng.sample(
        [pair for pair in pairs if pair not in present], k=len(pairs) - sum(p in present for p in pairs)
    )
    if kind == "adversarial":
        absent.sort(key=lambda pair: pair[1] not in scene.by_shape)  # stable: the shapes that are there come first
    count = min(3, len(absent))
    asked = [(_question(*pair), "yes") for pair in rng.sample(present, count)]
    asked += [(_question(*pair), "no") for pair in absent[:count]]
    rng.shuffle(asked)
    return asked


def _wrong_colour(thing: Thing, rng: random.Random) -> str:
    usual = USUAL[thing.shape]
    return usual if thing.colour != usual else rng.choice([c for c in COLOURS if c != usual])


def minimal_pairs(scene: Scene) -> list[tuple[str, str]]:
    """(true sentence, the same with the colour changed), one per object.

    The false colour is the shape's usual one where the truth is another, else drawn by the scene's hash.
    """
    rng = random.Random(scene.content_hash)
    return [
        (sentence("colour", thing.shape, thing.colour), sentence("colour", thing.shape, _wrong_colour(thing, rng)))
        for thing in scene.things
    ]


def true_sentences(scene: Scene) -> list[str]:
    """Every true sentence about single objects and about counts: CLIP's captions are drawn from these."""
    sentences = [sentence(kind, t.shape, getattr(t, kind)) for t in scene.things for kind in KINDS]
    subjects = ["objects", *dict.fromkeys(thing.colour for thing in scene.things)]
    return sentences + [sentence("count", subject, _count(scene, subject)) for subject in subjects]
