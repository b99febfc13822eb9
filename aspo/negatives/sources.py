"""Where negative images come from: the row's own image cropped or noised, or other images of a pool.

    crop    a random part of the image, scaled back to its size, as mDPO has it (arXiv 2406.11839): area U(0.01, 0.2) of
            the image's, aspect ratio log-uniform in 3/4 to 4/3
    noise   the image under diffusion noise of a step, x_t = sqrt(abar_t) x + sqrt(1 - abar_t) eps
    random  images of the pool, uniformly, none twice
    hard    the images of the pool that are nearest to the right one in CLIP space
    misp    MISP-DPO's scored and diverse choice, see `aspo.negatives.selection`

Whatever is drawn depends on the run's seed and the row's id alone. Never picked from a pool: the row's own image, and
near duplicates, which are those whose CLIP cosine to it is --duplicate or more (ours).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from aspo.folder import row_name
from aspo.negatives.figures import scene_in_box
from aspo.negatives.pool import Pool
from aspo.negatives.sae import BilinearSae
from aspo.negatives.selection import select
from aspo.pairs.noise import NOISE_STEPS, add_noise

METHODS = ("misp", "random", "hard", "crop", "noise")
POOLED = ("misp", "random", "hard")
COUNTS = (1, 16)  # fewest and most negatives of a row
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SELECT_ELEMENTS = 2**25  # numbers that one batch of rows may hold while it is scored: 128 MiB
Row = Mapping[str, Any]
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Options:
    """What decides the negatives, besides rows, pool and scorer. docs/misp.md says which are the paper's."""

    method: str = "misp"
    count: int = 3
    seed: int = 0
    duplicate: float = 0.98
    candidates: int = 1000
    beta_div: float = 1.0
    temperature: float = 1.0
    latents: int = 128
    sae_steps: int = 1500
    crop_scale: tuple[float, float] = (0.01, 0.2)
    noise_step: int = 500
    pixel_mean: tuple[float, ...] = CLIP_MEAN
    pixel_std: tuple[float, ...] = CLIP_STD

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}; it must be one of {', '.join(METHODS)}")
        for name, least, greatest in (
            ("count", *COUNTS),
            ("duplicate", -1, 2),
            ("candidates", self.count, None),
            ("beta_div", 0, None),
            ("latents", 1, None),
            ("sae_steps", 1, None),
            ("noise_step", 0, NOISE_STEPS - 1),
        ):
            value = getattr(self, name)
            if not (math.isfinite(value) and least <= value and (greatest is None or value <= greatest)):
                allowed = f"at least {least}" if greatest is None else f"{least} to {greatest}"
                raise ValueError(f"{name.replace('_', '-')} is {value}; it must be {allowed}")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature is {self.temperature}; it must be above 0")
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(
                f"crop-scale is {low} to {high}; it must be shares of the image's area, 0 < low <= high <= 1"
            )
        if len(self.pixel_mean) != 3 or len(self.pixel_std) != 3 or min(self.pixel_std) <= 0:
            raise ValueError("pixel-mean and pixel-std are three numbers each, those of the deviation above 0")


@dataclass(frozen=True)
class Negatives:
    """A row's negatives: image entries, log of their sampling density, their truth; both where there are any."""

    images: list[Any]
    log_q: list[float] | None = None
    scenes: list[Any] | None = None
    diversity_range: float = math.nan


def generator_of(row: Row, seed: int, purpose: str) -> torch.Generator:
    """Random numbers of a row, whatever its neighbours are."""
    digest = hashlib.sha256(f"{purpose}/{seed}/{row['id']}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7]))


def pick_from_pool(
    rows: Sequence[Row],
    keys: Sequence[str],
    right: Tensor | None,
    prompts: Tensor | None,
    pool: Pool,
    options: Options,
    sae: BilinearSae | None = None,
) -> list[Negatives]:
    """Negatives of rows by "random", "hard" or "misp".

    Args:
        keys: of the rows' own images. right: (B, d) their features; needed but for "random", where it finds near
            duplicates. prompts: (B, d_t), for "misp".
        pool: with features wherever `right` is given.

    Raises:
        ValueError: a row for which fewer than `count` images are left; nothing is written for these rows.
    """
    if not rows:
        return []
    size = len(pool.keys)
    number = {key: n for n, key in enumerate(pool.keys)}
    allowed = torch.ones(len(rows), size, dtype=torch.bool)
    cosine = None if right is None or pool.features is None else right @ pool.features.T
    if cosine is not None:
        allowed &= (cosine < options.duplicate).cpu()
    for n, key in enumerate(keys):
        if key in number:
            allowed[n, number[key]] = False
    for row, left in zip(rows, allowed.sum(1).tolist(), strict=True):
        if left < options.count:
            raise ValueError(
                f"{row_name(row)}: {options.count} negatives were asked, but the pool has {left} images that are "
                f"neither its own nor near duplicates (of {size}): use a larger --pool or a smaller --count"
            )
    if options.method == "hard":
        assert cosine is not None
        order = cosine.cpu().masked_fill(~allowed, -torch.inf).sort(dim=1, descending=True, stable=True).indices
        return [_of_pool(pool, places) for places in order[:, : options.count].tolist()]
    shuffled = [_shuffled(row, options.seed, allow) for row, allow in zip(rows, allowed, strict=True)]
    if options.method == "random":
        log_q = [-math.log(len(places)) for places in shuffled]
        return [
            _of_pool(pool, p[: options.count].tolist(), [q] * options.count)
            for p, q in zip(shuffled, log_q, strict=True)
        ]
    assert right is not None and prompts is not None and pool.features is not None and sae is not None
    return _misp(right, prompts, shuffled, pool, options, sae)


def _shuffled(row: Row, seed: int, allowed: Tensor) -> Tensor:
    order = torch.randperm(len(allowed), generator=generator_of(row, seed, "pool"))
    return order[allowed[order]]


def _misp(
    right: Tensor, prompts: Tensor, shuffled: Sequence[Tensor], pool: Pool, options: Options, sae: BilinearSae
) -> list[Negatives]:
    """--candidates random images of each row are scored; rows with fewer are filled up with images not allowed."""
    assert pool.features is not None
    width = min(options.candidates, max(len(places) for places in shuffled))
    candidates = torch.zeros(len(shuffled), width, dtype=torch.int64)
    allowed = torch.zeros(len(shuffled), width, dtype=torch.bool)
    for n, places in enumerate(shuffled):
        kept = places[:width].sort().values  # in the pool's order, so that ties fall alike for all rows
        candidates[n, : len(kept)], allowed[n, : len(kept)] = kept, True
    chosen = select(
        sae,
        right.unsqueeze(1) - pool.features[candidates],
        prompts,
        allowed.to(right.device),
        options.count,
        beta_div=options.beta_div,
        temperature=options.temperature,
    )
    picks = candidates.gather(1, chosen.picks.cpu()).tolist()
    of_rows = zip(picks, chosen.log_q.tolist(), chosen.diversity_range.tolist(), strict=True)
    return [_of_pool(pool, picked, log_q, spread) for picked, log_q, spread in of_rows]


def _of_pool(
    pool: Pool, places: Sequence[int], log_q: list[float] | None = None, spread: float = math.nan
) -> Negatives:
    scenes = [pool.scenes[n] for n in places]
    known = None if any(scene is None for scene in scenes) else scenes
    return Negatives([pool.entries[n] for n in places], log_q, known, spread)


def rows_at_a_time(options: Options, dim: int, pool_size: int, rank: int = 4) -> int:
    """How many rows are picked for at once; it follows from the settings, so that a run that goes on has the same."""
    per_row = pool_size
    if options.method == "misp":
        per_row += min(options.candidates, pool_size) * (2 * dim + 3 * rank * (options.latents + 1))
    return max(1, min(256, SELECT_ELEMENTS // per_row))


def crop_box(size: tuple[int, int], scale: tuple[float, float], generator: torch.Generator) -> Box:
    """(left, top, right, bottom) in pixels of a random part; RandomResizedCrop's geometry.

    After ten boxes that do not fit, the largest box within the ratios around the centre.
    """
    width, height = size

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))

    for _ in range(10):
        area = width * height * uniform(*scale)
        ratio = math.exp(uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = max(1, round(math.sqrt(area * ratio))), max(1, round(math.sqrt(area / ratio)))
        if w <= width and h <= height:
            left = int(uniform(0, width - w + 1))
            top = int(uniform(0, height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, max(1, round(height * 4 / 3))), min(height, max(1, round(width * 4 / 3)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def crops(row: Row, image: Image.Image, options: Options) -> Negatives:
    """`count` random parts of the row's image, each scaled (bilinear) to the image's size."""
    generator = generator_of(row, options.seed, "crop")
    boxes = [crop_box(image.size, options.crop_scale, generator) for _ in range(options.count)]
    images = [image.crop(box).resize(image.size, Image.Resampling.BILINEAR) for box in boxes]
    scenes = None
    if row.get("scene") is not None:
        scenes = [scene_in_box(row["scene"], box) for box in boxes]
    return Negatives(images, scenes=scenes)


def noised(row: Row, image: Image.Image, options: Options) -> Negatives:
    """`count` times the row's image under fresh noise of the step.

    The noise is that of SeVa and CHiP, on pixels normalised by pixel_mean and pixel_std; then it is stored as 8-bit
    RGB, which cuts what lies outside black and white: ours, so that a negative is an image like any other.
    """
    mean, std = (torch.tensor(v, dtype=torch.float32).view(3, 1, 1) for v in (options.pixel_mean, options.pixel_std))
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32).copy()).permute(2, 0, 1) / 255
    seeds = torch.randint(2**53, (options.count,), generator=generator_of(row, options.seed, "noise")).tolist()
    normalised = ((pixels - mean) / std).expand(options.count, -1, -1, -1)
    made = add_noise(normalised, options.noise_step, seeds) * std + mean
    arrays = (made.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    scenes = None if row.get("scene") is None else [row["scene"]] * options.count
    return Negatives([Image.fromarray(array, "RGB") for array in arrays], scenes=scenes)


MAKERS: dict[str, Callable[[Row, Image.Image, Options], Negatives]] = {"crop": crops, "noise": noised}
