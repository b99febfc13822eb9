"""CSR's pairs (arXiv 2405.14622): the best and the worst answer of a tree that grows by sentences.

    score(sentence) = (1 - a) * mean_t logp_t + a * cos(CLIP_text(sentence), CLIP_image),   a = --clip-weight, 0.9
    score(answer)   = mean over its sentences

Behind every beginning in the tree --candidates next sentences are sampled; of all the answers that a prompt then has
under way the --beams best and the --beams worst go on. An answer that ended is kept; the best one becomes chosen, the
worst one rejected.

Certain: sentences, the two scores and a = 0.9. Ours: the scores are combined as they are (the released code combines
their ranks among siblings), own log-probability is a mean per token without the end-of-turn token, an answer's score a
mean over sentences, plain sampling at temperature 1 (there: diverse beam search), and how many beams go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from aspo.folder import image_entries
from aspo.pairs import MADE, Load, Made, Make, Options, Row, kept_columns
from aspo.pairs import next_sentences as steps
from aspo.scorers import load_scorer

OPTIONS = {**steps.OPTIONS, "beams": 2, "clip_weight": 0.9}
NOUNS = ("pairs", "prompts")
DROPPED = {
    "unfinished": "no answer ended within --max-sentences of at most --max-new-tokens",
    "identical": "only one answer ended, or all that did are the same",
    "no contrast": "the best and the worst answer have the same score",
    "no image": "the prompt has no image",
}


@dataclass(frozen=True)
class Beam:
    """An answer under way: its text, its sentences' scores, whether it ended."""

    text: str = ""
    scores: tuple[float, ...] = ()
    ended: bool = False

    @property
    def score(self) -> float:
        """Mean over the sentences."""
        return fmean(self.scores)


def check(rows: Sequence[Row], options: Options) -> None:
    """Raises ValueError without --scorer, and for rows of several images."""
    if options["scorer"] is None:
        raise ValueError("--method csr scores sentences against the image: give --scorer, as for `aspo score`")
    steps.check(rows, options)


def maker(options: Options, load: Load) -> Make:
    """See `aspo.pairs`."""
    scorer = load_scorer(options["scorer"], options["device"])
    sampler = steps.load_sampler(options, load, with_logps=True)

    def make(rows: Sequence[Row], start: int) -> list[Made]:
        asked = [row for row in rows if image_entries(row)]
        similarity = steps.Similarity(scorer, asked)
        ended = grow(asked, sampler, similarity, options, start)
        return [pair(row, ended[row["id"]]) if row["id"] in ended else Made("no image") for row in rows]

    return make


def grow(
    rows: Sequence[Row], sampler: steps.Sampler, similarity: steps.Similarity, options: Options, start: int
) -> dict[str, list[Beam]]:
    """id -> the answers of its tree that ended, in the order in which they did; each text once."""
    of = {row["id"]: row for row in rows}
    alive: dict[str, list[Beam]] = {name: [Beam()] for name in of}
    ended: dict[str, dict[str, Beam]] = {name: {} for name in of}
    for step in range(options["max_sentences"]):
        asked = [(name, beam) for name, beams in alive.items() for beam in beams]
        if not asked:
            break
        found = sampler.candidates(
            [of[name] for name, _ in asked],
            [beam.text for _, beam in asked],
            options["candidates"],
            steps.step_seed(options["seed"], start, step),
        )
        sentences: dict[str, list[str]] = {}
        for (name, _), candidates in zip(asked, found, strict=True):
            sentences.setdefault(name, []).extend(c.text.strip() for c in candidates if c.text)
        cosine = similarity(sentences)
        children: dict[str, dict[str, Beam]] = {name: {} for name in of}
        for (name, beam), candidates in zip(asked, found, strict=True):
            for candidate in candidates:
                child = _child(beam, candidate, cosine.get((name, candidate.text.strip())), options["clip_weight"])
                if child.scores:  # an answer without a word is none
                    (ended if child.ended else children)[name].setdefault(child.text, child)
        alive = {name: best_and_worst([*kept.values()], options["beams"]) for name, kept in children.items()}
    return {name: [*beams.values()] for name, beams in ended.items()}


def _child(beam: Beam, candidate: steps.Candidate, cosine: float | None, weight: float) -> Beam:
    """The beam with one more sentence, or as it is where the candidate only ends it."""
    if cosine is None or candidate.logp is None:
        return Beam(beam.text, beam.scores, candidate.ends)
    score = (1 - weight) * candidate.logp + weight * cosine
    return Beam(beam.text + candidate.text, (*beam.scores, score), candidate.ends)


def best_and_worst(beams: Sequence[Beam], count: int) -> list[Beam]:
    """The `count` of the highest score and the `count` of the lowest, each once, best first."""
    order = sorted(beams, key=lambda beam: -beam.score)
    return order if len(order) <= 2 * count else order[:count] + order[-count:]


def pair(row: Row, ended: Sequence[Beam]) -> Made:
    """The best and the worst of the answers that ended."""
    if len(ended) < 2:
        return Made("unfinished" if not ended else "identical")
    order = best_and_worst(ended, len(ended))
    best, worst = order[0], order[-1]
    if best.score == worst.score:
        return Made("no contrast")
    made = {
        **kept_columns(row),
        "chosen": best.text,
        "rejected": worst.text,
        "chosen_score": best.score,
        "rejected_score": worst.score,
    }
    return Made(MADE, [made], {"answers that ended": len(ended)})
