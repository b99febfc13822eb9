"""SeVa's pairs (arXiv 2404.10501), which ASPO uses: the image against the image under diffusion noise.

The chosen response is the model's answer to the image, the rejected one its answer to the same image under diffusion
noise; pairs of the same text are dropped.
"""

from collections.abc import Sequence
from typing import Any

import torch

from aspo.folder import image_entries
from aspo.generation import Answer, generate_answers
from aspo.pairs import MADE, Load, Made, Make, Options, Row, kept_columns
from aspo.pairs.noise import add_noise, copies_of_a_still, image_seeds
from aspo.validate import IMAGE_PLACEHOLDER

OPTIONS = {
    "model": None,
    "noise_step": 500,
    "max_new_tokens": 256,
    "temperature": 0.0,
    "seed": 0,
    "batch_size": 16,
    "dtype": "float32",
    "device": None,
}
NOUNS = ("pairs", "prompts")
DROPPED = {
    "identical": "both answers are the same",
    "empty": "an answer is empty",
    "image mark": f"an answer says {IMAGE_PLACEHOLDER}, which would stand for one more image",
    "unfinished": "an answer did not end within --max-new-tokens",
    "no image": "the prompt has no image",
}
NOISED_SEED = 1_000_003  # the noised images' answers are sampled with other random numbers than the clean ones'


def check(rows: Sequence[Row], options: Options) -> None:
    """Prompts of any kind are fine: those without an image are dropped."""


def answer_pairs(
    model: torch.nn.Module,
    processor: Any,
    rows: Sequence[Row],
    *,
    noise_step: int = 500,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    start: int = 0,
) -> list[tuple[Answer, Answer]]:
    """(answer on the clean images, answer on the noised ones) of each row, all rows in one batch.

    `start` is the place of the first row in the data set: batches at different places sample different numbers.
    """
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "batch_size": len(rows)}
    clean = generate_answers(model, processor, rows, seed=seed + start, **options)
    noised = noised_answers(model, processor, rows, noise_step, seed, start, **options)
    return list(zip(clean, noised, strict=True))


def noised_answers(
    model: torch.nn.Module,
    processor: Any,
    rows: Sequence[Row],
    noise_step: int,
    seed: int,
    start: int,
    **options: Any,
) -> list[Answer]:
    """The answers to the rows' images under noise, all rows in one batch."""
    seeds = [s for row in rows for s in image_seeds(row, seed)]
    copies = copies_of_a_still(processor)
    return generate_answers(
        model,
        processor,
        rows,
        seed=seed + start + NOISED_SEED,
        pixel_transform=lambda pixels: add_noise(pixels, noise_step, seeds, copies),
        **options,
    )


def judge(clean: Answer, noised: Answer) -> str:
    """ "made", or why the pair is dropped (a key of DROPPED)."""
    if not clean.text.strip() or not noised.text.strip():
        return "empty"
    if clean.text.strip() == noised.text.strip():
        return "identical"
    if any(answer.num_tokens and IMAGE_PLACEHOLDER in answer.text for answer in (clean, noised)):
        return "image mark"  # an answer of no tokens is a row's own: it may show images
    return MADE if clean.finished and noised.finished else "unfinished"


def maker(options: Options, load: Load) -> Make:
    """See `aspo.pairs`."""
    model, processor = load()
    settings = {name: options[name] for name in ("noise_step", "max_new_tokens", "temperature", "seed")}

    def make(rows: Sequence[Row], start: int) -> list[Made]:
        asked = [row for row in rows if image_entries(row)]
        answers = answer_pairs(model, processor, asked, start=start, **settings) if asked else []
        outcome = dict(zip((row["id"] for row in asked), answers, strict=True))
        return [_pair(row, *outcome[row["id"]]) if row["id"] in outcome else Made("no image") for row in rows]

    return make


def _pair(row: Row, clean: Answer, noised: Answer) -> Made:
    status = judge(clean, noised)
    pair = {**kept_columns(row), "chosen": clean.text.strip(), "rejected": noised.text.strip()}
    return Made(status, [pair] if status == MADE else [])
