"""`aspo controls`: rows of the embedded world changed on purpose, for the controls and regimes of `aspo compare`.

What a scene knows is put in the place of what a system would have to find out, or what a system reads is made worse by
a known amount. All of it is ours; none of it is part of a method.

    --weights truth       w = 1 for a sentence whose claims are all true, 0 for the others (chosen_sentence_weights)
    --weights inverse     1 - truth
    --weights similarity  w = min-max of chosen_similarity, as ASPO-S has it
    --weights shuffled    the same, shuffled among the sentences of each response
    --boundaries merge    every boundary between two chosen sentences is lost with chance --share
    --boundaries split    every chosen sentence is cut in two at a space with chance --share
    --similarity-auc A    noise added to chosen_similarity until it tells true from false sentences with AUC A
    --noise-step T        the rows' images under diffusion noise of step T; 0 renders the clear image again
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from aspo.data import load_rows, row_name, write_rows
from aspo.folder import load_images
from aspo.sentences import split_sentences
from aspo.world.clip import MEAN, STD
from aspo.world.gates import auc, diffusion_noise
from aspo.world.language import judge
from aspo.world.scenes import Scene, render

WEIGHTS = ("truth", "inverse", "similarity", "shuffled")
BOUNDARIES = ("merge", "split")
AUC_TOLERANCE = 0.002  # of the AUC that was asked for; on few rows, two of its steps
Row = dict[str, Any]


def sentence_truth(text: str, spans: Sequence[Sequence[int]], scene: Scene) -> list[bool | None]:
    """Of each sentence, whether all of its claims are true; None where nothing in it can be checked."""
    claims = judge(text, scene)
    found: list[bool | None] = []
    for start, end in spans:
        inside = [c.verdict == "true" for c in claims if c.checkable and start < c.end and c.start < end]
        found.append(all(inside) if inside else None)
    return found


def truth_of(row: Row) -> list[bool | None]:
    """`sentence_truth` of a row's chosen response. Raises ValueError for a row without scene or sentences."""
    if row.get("scene") is None:
        raise ValueError(f"{row_name(row)} has no scene: controls are for rows of the embedded world")
    if row.get("chosen_sentences") is None:
        raise ValueError(f"{row_name(row)} has no chosen_sentences: run `aspo score` on the rows first")
    return sentence_truth(row["chosen"], row["chosen_sentences"], Scene.from_json(row["scene"]))


def minmax(values: Sequence[float]) -> list[float]:
    """(x - min) / (max - min), all 0 where the range is at most 1e-5: ASPO's, see docs/math.md."""
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high - low > 1e-5 else 0.0 for value in values]


def control_weights(row: Row, kind: str, rng: random.Random) -> list[float]:
    """One weight in [0, 1] for each chosen sentence, of a kind of WEIGHTS."""
    if kind in ("truth", "inverse"):
        weights = [1.0 if true else 0.0 for true in truth_of(row)]
        return weights if kind == "truth" else [1.0 - weight for weight in weights]
    if row.get("chosen_similarity") is None:
        raise ValueError(f"{row_name(row)} has no chosen_similarity: run `aspo score` on the rows first")
    weights = minmax(row["chosen_similarity"])
    return weights if kind == "similarity" else rng.sample(weights, len(weights))


def corrupt_boundaries(text: str, kind: str, share: float, rng: random.Random) -> list[list[int]]:
    """The sentences of a text with a share of their boundaries lost ("merge") or of new ones put in ("split")."""
    spans = [list(span) for span in split_sentences(text)]
    made: list[list[int]] = []
    for start, end in spans:
        if kind == "merge" and made and rng.random() < share:
            made[-1][1] = end
            continue
        spaces = [n for n in range(start + 1, end) if text[n] == " " and text[start:n].strip() and text[n:end].strip()]
        if kind == "split" and spaces and rng.random() < share:
            cut = rng.choice(spaces) + 1
            made += [[start, cut], [cut, end]]
        else:
            made.append([start, end])
    return made


def similarity_auc(rows: Sequence[Row], similarities: Sequence[Sequence[float]]) -> float:
    """Share of (true, false) sentences of one response in which the true one has the higher similarity, pooled."""
    groups = []
    for row, values in zip(rows, similarities, strict=True):
        known = list(zip(truth_of(row), values, strict=True))
        groups.append(([v for t, v in known if t is True], [v for t, v in known if t is False]))
    return auc(groups)


def weakened(rows: Sequence[Row], target: float, seed: int) -> tuple[list[list[float]], float]:
    """(similarities, sd): the rows' similarities plus Gaussian noise of the sd that gives the AUC `target`.

    The noise of every sentence is drawn once and scaled, so that the AUC falls steadily. Raises ValueError where the
    similarities tell less than `target`, or nothing is left to tell apart.
    """
    own = [list(row["chosen_similarity"]) for row in rows]
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.randn(len(values), generator=generator).tolist() for values in own]

    def noisy(sd: float) -> list[list[float]]:
        return [[v + sd * e for v, e in zip(vs, es, strict=True)] for vs, es in zip(own, noise, strict=True)]

    truths = [truth_of(row) for row in rows]
    tolerance = max(AUC_TOLERANCE, 2 / max(sum(t.count(True) * t.count(False) for t in truths), 1))
    start = similarity_auc(rows, own)
    if not 0.5 < target <= start:
        raise ValueError(f"--similarity-auc is {target}; it must be above 0.5 and at most the rows' own, {start:.3f}")
    low, high = 0.0, 1.0
    while similarity_auc(rows, noisy(high)) > target and high < 1e4:
        high *= 2
    for _ in range(40):
        sd = (low + high) / 2
        reached = similarity_auc(rows, noisy(sd))
        if abs(reached - target) <= tolerance:
            return noisy(sd), sd
        low, high = (sd, high) if reached > target else (low, sd)
    raise ValueError(
        f"--similarity-auc {target} was not met within {tolerance:.3f} on {len(rows)} rows: give more rows"
    )


def noised_image(row: Row, step: int, seed: int) -> Image.Image:
    """The row's scene as an image under diffusion noise of a step (0: clear), the same for the same scene and seed.

    Noise is added to the normalised pixels as `aspo pairs` does, then clipped to 8 bits.
    """
    scene = Scene.from_json(row["scene"])
    clear = render(scene)
    if step == 0:
        return clear
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    pixels = torch.frombuffer(bytearray(clear.tobytes()), dtype=torch.uint8).view(1, clear.height, clear.width, 3)
    normal = (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std
    generator = torch.Generator().manual_seed((int(scene.content_hash[:12], 16) + seed) % 2**62)
    shown = (diffusion_noise(normal, step, generator) * std + mean).clamp(0, 1) * 255
    return Image.fromarray(shown.round().byte()[0].permute(1, 2, 0).contiguous().numpy(), "RGB")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `aspo controls`."""
    parser.description = (__doc__ or "").partition("\n\n")[2]
    add = parser.add_argument
    add("--data", required=True, help="rows of the world: a folder, or world:<split>")
    add("--out", required=True, type=Path, help="folder to write")
    what = parser.add_argument_group("one of")
    what.add_argument("--weights", choices=WEIGHTS, help="write chosen_sentence_weights")
    what.add_argument("--boundaries", choices=BOUNDARIES, help="cut the chosen responses into other sentences")
    what.add_argument("--similarity-auc", type=float, help="make chosen_similarity tell true from false this well")
    what.add_argument("--noise-step", type=int, help="other images: 0 to 999")
    add("--share", type=float, default=0.1, help="--boundaries: chance of each boundary or sentence (default: 0.1)")
    add("--limit", type=int, help="only the first rows (default: all)")
    add("--seed", type=int, default=0, help="of whatever is drawn (default: 0)")


def run(args: argparse.Namespace) -> int:
    """`aspo controls`; returns 0."""
    given = [name for name in CHANGES if getattr(args, name) is not None]
    if len(given) != 1:
        raise ValueError(
            f"{len(given)} changes given; give one of --weights, --boundaries, --similarity-auc, --noise-step"
        )
    if not 0 <= args.share <= 1 or not 0 <= (args.noise_step or 0) <= 999:
        raise ValueError(f"--share {args.share} must be 0 to 1 and --noise-step {args.noise_step} 0 to 999")
    prompts = given[0] == "noise_step"  # the only change that rows without responses take
    rows = [dict(row) for row in load_rows(args.data, kind="prompt" if prompts else "preference", limit=args.limit)]
    said = CHANGES[given[0]](rows, args)
    write_rows(args.out, rows)
    print(f"{len(rows)} rows: {said}, in {args.out}")
    return 0


def _change_weights(rows: list[Row], args: argparse.Namespace) -> str:
    total, count = 0.0, 0
    for row in rows:
        row["chosen_sentence_weights"] = control_weights(row, args.weights, random.Random(f"{args.seed}:{row['id']}"))
        total, count = total + sum(row["chosen_sentence_weights"]), count + len(row["chosen_sentence_weights"])
    return f"chosen_sentence_weights are {args.weights}, mean {total / max(count, 1):.3f}"


def _change_boundaries(rows: list[Row], args: argparse.Namespace) -> str:
    before = after = 0
    for row in rows:
        before += len(split_sentences(row["chosen"]))
        rng = random.Random(f"{args.seed}:{row['id']}")
        row["chosen_sentences"] = corrupt_boundaries(row["chosen"], args.boundaries, args.share, rng)
        row.pop("chosen_similarity", None)  # of other sentences
        after += len(row["chosen_sentences"])
    return f"{before} chosen sentences became {after} ({args.boundaries}, {args.share:g})"


def _change_similarity_auc(rows: list[Row], args: argparse.Namespace) -> str:
    for row in rows:
        if row.get("chosen_similarity") is None:
            raise ValueError(f"{row_name(row)} has no chosen_similarity: run `aspo score` on the rows first")
    before = similarity_auc(rows, [row["chosen_similarity"] for row in rows])
    values, sd = weakened(rows, args.similarity_auc, args.seed)
    for row, similarity in zip(rows, values, strict=True):
        row["chosen_similarity"] = similarity
    return f"similarity's AUC {before:.3f} became {similarity_auc(rows, values):.3f} with noise of sd {sd:.3f}"


def _change_noise_step(rows: list[Row], args: argparse.Namespace) -> str:
    for row in rows:
        if row.get("scene") is None or len(load_images(row)) != 1:
            raise ValueError(f"{row_name(row)} has no scene, or not one image: it is no row of the embedded world")
        row["images"] = [noised_image(row, args.noise_step, args.seed)]
    return f"images under noise of step {args.noise_step}" if args.noise_step else "clear images"


CHANGES: dict[str, Callable[[list[Row], argparse.Namespace], str]] = {
    "weights": _change_weights,
    "boundaries": _change_boundaries,
    "similarity_auc": _change_similarity_auc,
    "noise_step": _change_noise_step,
}
