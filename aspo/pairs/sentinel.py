"""SENTINEL's pairs (arXiv 2507.12455): two next sentences behind the same beginning, one faithful, one hallucinated.

The model writes an answer sentence by sentence. At each step --candidates next sentences are sampled and a verifier
says which are faithful and which are hallucinated. Where both kinds are there, one of each makes a row:

    chosen = beginning + faithful sentence,   rejected = beginning + hallucinated sentence,   unfinished = true

so that no end-of-turn token is taught and DPO of the row is DPO of the two sentences given what stands before them: the
beginning's log-ratio is the same on both sides and cancels. The faithful sentence goes on; where there is none the
answer is left.

Certain: sentence by sentence, sampled from the model itself, the faithful one goes on. SENTINEL's verifier are two
object detectors that must agree. Ours, by --judge: `similarity` (the sentence of the highest cosine is taken for
faithful, that of the lowest for hallucinated, if they are --margin apart or more), or `truth` (the embedded world's
scene). Ours too: of several faithful sentences the first one that was sampled is taken, and sentences that the
beginning already has are passed over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from aspo.data import row_name
from aspo.folder import image_entries
from aspo.pairs import MADE, Load, Made, Make, Options, Row, kept_columns
from aspo.pairs import next_sentences as steps
from aspo.scorers import load_scorer
from aspo.world.language import judge as judge_text
from aspo.world.scenes import Scene

OPTIONS = {**steps.OPTIONS, "judge": "similarity", "margin": None}
NOUNS = ("pairs", "prompts")
DROPPED = {
    "no contrast": "at no step was there both a faithful and a hallucinated sentence",
    "no image": "the prompt has no image",
}
JUDGES = ("similarity", "truth")
MARGIN = 0.02  # of --judge similarity, where --margin is not given

FAITHFUL, HALLUCINATED = True, False
Verdicts = dict[tuple[str, str], bool]  # (id of a row, sentence) -> FAITHFUL or HALLUCINATED; others are left out
Verifier = Callable[[dict[str, str], dict[str, list[str]]], Verdicts]  # (id -> beginning, id -> sentences)


def check(rows: Sequence[Row], options: Options) -> None:
    """Raises ValueError where the verifier lacks what it needs, or would ignore what it is given."""
    if options["judge"] not in JUDGES:
        raise ValueError(f"--judge is {options['judge']!r}; it must be one of {', '.join(JUDGES)}")
    if options["judge"] == "similarity" and options["scorer"] is None:
        raise ValueError("--judge similarity scores sentences against the image: give --scorer, as for `aspo score`")
    if options["judge"] == "truth":
        for name in ("scorer", "margin"):
            if options[name] is not None:
                raise ValueError(f"--{name} is not read by --judge truth: drop it")
        for row in rows:
            if row.get("scene") is None:
                raise ValueError(
                    f"{row_name(row)}: --judge truth needs its 'scene', as the rows of world:train have it"
                )
    steps.check(rows, options)


def maker(options: Options, load: Load) -> Make:
    """See `aspo.pairs`."""
    scorer = None if options["scorer"] is None else load_scorer(options["scorer"], options["device"])
    sampler = steps.load_sampler(options, load, with_logps=False)

    def make(rows: Sequence[Row], start: int) -> list[Made]:
        asked = [row for row in rows if image_entries(row)]
        if scorer is None:
            verifier = truth(asked)
        else:
            margin = MARGIN if options["margin"] is None else options["margin"]
            verifier = by_similarity(steps.Similarity(scorer, asked), margin)
        found = dict(zip((row["id"] for row in asked), walk(asked, sampler, verifier, options, start), strict=True))
        return [found.get(row["id"], Made("no image")) for row in rows]

    return make


def walk(rows: Sequence[Row], sampler: steps.Sampler, verifier: Verifier, options: Options, start: int) -> list[Made]:
    """The pairs of each row's answer, all rows a step at a time."""
    of = {row["id"]: row for row in rows}
    beginnings = dict.fromkeys(of, "")
    pairs: dict[str, list[dict[str, Any]]] = {name: [] for name in of}
    counts: dict[str, Counter[str]] = {name: Counter() for name in of}
    splitter = steps.splitter_of(options)
    for step in range(options["max_sentences"]):
        if not beginnings:
            break
        found = sampler.candidates(
            [of[name] for name in beginnings],
            [*beginnings.values()],
            options["candidates"],
            steps.step_seed(options["seed"], start, step),
        )
        sampled = dict(zip(beginnings, found, strict=True))
        said = {name: {text[a:b].strip() for a, b in splitter(text)} for name, text in beginnings.items()}
        fresh = {n: [c for c in sampled[n] if c.text and c.text.strip() not in said[n]] for n in beginnings}
        verdicts = verifier(beginnings, {name: [c.text.strip() for c in kept] for name, kept in fresh.items()})
        going_on = {}
        for name, beginning in beginnings.items():
            good, bad = (_first(name, fresh[name], verdicts, kind) for kind in (FAITHFUL, HALLUCINATED))
            counts[name][_outcome(fresh[name], good, bad)] += 1
            if good is not None and bad is not None:
                pairs[name].append(_row(of[name], len(pairs[name]), beginning, good, bad))
            if good is not None and not good.ends:
                going_on[name] = beginning + good.text
        beginnings = going_on
    return [Made(MADE if pairs[n] else "no contrast", pairs[n], counts[n]) for n in of]


def _first(name: str, candidates: Sequence[steps.Candidate], verdicts: Verdicts, kind: bool) -> steps.Candidate | None:
    return next((c for c in candidates if verdicts.get((name, c.text.strip())) is kind), None)


def _outcome(fresh: Sequence[steps.Candidate], good: steps.Candidate | None, bad: steps.Candidate | None) -> str:
    """A step in the summary's words."""
    if not fresh:
        return "steps without a new sentence"
    if good is None:
        return "steps without a faithful sentence"
    return "steps without a hallucinated sentence" if bad is None else "steps with both"


def _row(row: Row, number: int, beginning: str, good: steps.Candidate, bad: steps.Candidate) -> dict[str, Any]:
    kept = kept_columns(row)
    texts = {"chosen": beginning + good.text, "rejected": beginning + bad.text}
    return {**kept, "id": f"{row['id']}-s{number}", **texts, "unfinished": True}


def truth(rows: Sequence[Row]) -> Verifier:
    """The embedded world's judge: a sentence is faithful or hallucinated by the row's scene, or neither (no claim)."""
    scenes = {row["id"]: Scene.from_json(row["scene"]) for row in rows}

    def verify(beginnings: dict[str, str], sentences: dict[str, list[str]]) -> Verdicts:
        verdicts = {}
        for name, texts in sentences.items():
            for text in texts:
                claims = judge_text(f"{beginnings[name]} {text}", scenes[name])
                own = [claim for claim in claims if claim.start >= len(beginnings[name])]  # none: it has no words
                if own and own[-1].checkable:
                    verdicts[name, text] = own[-1].verdict == "true"
        return verdicts

    return verify


def by_similarity(similarity: steps.Similarity, margin: float) -> Verifier:
    """The sentence of the highest cosine is faithful, that of the lowest hallucinated if `margin` or more below it."""

    def verify(_: dict[str, str], sentences: dict[str, list[str]]) -> Verdicts:
        cosines = similarity(sentences)
        verdicts = {}
        for name, texts in sentences.items():
            order = sorted(dict.fromkeys(texts), key=lambda text: -cosines[name, text])
            if order:
                verdicts[name, order[0]] = FAITHFUL
            if len(order) > 1 and cosines[name, order[0]] - cosines[name, order[-1]] >= margin:
                verdicts[name, order[-1]] = HALLUCINATED
        return verdicts

    return verify
