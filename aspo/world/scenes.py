"""Small scenes whose truth is known: sampling with a colour prior, content-hashed splits, rendering, JSON.

A scene holds 4 to 6 objects of distinct shapes (so that "the circle" names one object) in distinct cells of a 3 x 3
grid. Every shape has a *usual* colour. `prior` is the chance that an object wears it; base-training scenes use 0.85,
preference and evaluation scenes 0.15, so that a model that leans on the prior instead of the picture is caught.
"""

import hashlib
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "ring")
COLOURS = ("orange", "blue", "green", "yellow", "red", "purple", "brown", "pink")
SIZES = ("small", "large")
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")

USUAL = dict(zip(SHAPES, COLOURS, strict=True))
"""The colour that a shape wears in 85 % of the base-training scenes."""

HELD_OUT = frozenset((shape, COLOURS[(i + 3) % len(COLOURS)]) for i, shape in enumerate(SHAPES))
"""Shape-colour pairs that no base-training, preference or calibration scene holds: validation and test only."""

RGB = {
    "orange": (236, 128, 32),
    "blue": (52, 92, 212),
    "green": (56, 160, 72),
    "yellow": (232, 208, 48),
    "red": (212, 44, 44),
    "purple": (132, 64, 176),
    "brown": (128, 84, 48),
    "pink": (240, 140, 184),
}

CELL = 24
"""Pixels of a grid cell's side."""
IMAGE_SIZE = 3 * CELL
"""Pixels of a rendered image's side."""
IMAGE_TOKENS = len(PLACES)
"""Patches of an image, one per grid cell."""

_RADIUS = {"small": 6.0, "large": 8.5}  # pixels
_JITTER = 2  # an object's centre is up to so many pixels off its cell's centre, both ways
_SUPERSAMPLE = 8  # masks are drawn this much larger, then averaged down: antialiasing
_NOISE = 5.0  # standard deviation of the pixel noise, in 0..255

# Buckets of the content hash (0..99) that each split owns. CLIP's own training scenes come from the base buckets too.
SPLITS = {
    "base": range(0, 60),
    "train": range(60, 75),
    "validation": range(75, 82),
    "test": range(82, 94),
    "calibration": range(94, 100),
}
PRIORS = {"base": 0.85, "train": 0.15, "validation": 0.15, "test": 0.15, "calibration": 0.15}
"""The chance of the usual colour in the scenes of a split."""


@dataclass(frozen=True)
class Thing:
    """One object of a scene. `place` is one of PLACES, the grid cells in reading order."""

    shape: str
    colour: str
    size: str
    place: str

    def __post_init__(self) -> None:
        for field, allowed in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES), ("place", PLACES)):
            value = getattr(self, field)
            if value not in allowed:
                raise ValueError(f"object {field} {value!r} is not of this world; use one of {', '.join(allowed)}")


@dataclass(frozen=True)
class Scene:
    """Objects in reading order, and the seed of the rendering's jitter and noise (not part of the content)."""

    things: tuple[Thing, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        for field in ("shape", "place"):
            values = [getattr(thing, field) for thing in self.things]
            if len(set(values)) != len(values):
                raise ValueError(f"two objects of a scene share the {field}: {values}; each must differ")
        ordered = sorted(self.things, key=lambda thing: PLACES.index(thing.place))
        object.__setattr__(self, "things", tuple(ordered))

    @cached_property
    def by_shape(self) -> dict[str, Thing]:
        return {thing.shape: thing for thing in self.things}

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of what the scene shows (the seed left out), as hex digits."""
        content = [[thing.shape, thing.colour, thing.size, thing.place] for thing in self.things]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def split(self) -> str:
        """The one split that may hold this scene, by its content hash."""
        bucket = int(self.content_hash[:12], 16) % 100
        return next(name for name, buckets in SPLITS.items() if bucket in buckets)

    def to_json(self) -> dict[str, Any]:
        """A dict of plain lists, strings and integers; `Scene.from_json` is its inverse."""
        things = [{"shape": t.shape, "colour": t.colour, "size": t.size, "place": t.place} for t in self.things]
        return {"things": things, "seed": self.seed}

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Scene":
        """The scene of `to_json`'s dict. Raises ValueError where a field is missing or not of this world."""
        try:
            things = tuple(Thing(t["shape"], t["colour"], t["size"], t["place"]) for t in value["things"])
            return Scene(things, int(value.get("seed", 0)))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a scene: {value!r} ({error!r}); a scene is what Scene.to_json gives") from error


def sample_scene(rng: random.Random, prior: float | None, held_out: bool, counts: tuple[int, int] = (4, 6)) -> Scene:
    """One scene. `prior`: chance of each shape's usual colour, the others equally likely; None = all eight alike.
    `held_out`: whether HELD_OUT pairs may occur. `counts`: the fewest and most objects."""
    shapes = rng.sample(SHAPES, rng.randint(*counts))
    places = rng.sample(PLACES, len(shapes))
    things = []
    for shape, place in zip(shapes, places, strict=True):
        if prior is not None and rng.random() < prior:
            colour = USUAL[shape]
        else:
            banned = set() if prior is None else {USUAL[shape]}
            colour = rng.choice(
                [c for c in COLOURS if c not in banned and (held_out or (shape, c) not in HELD_OUT)],
            )
        things.append(Thing(shape, colour, rng.choice(SIZES), place))
    return Scene(tuple(things), rng.getrandbits(32))


def scenes(split: str, seed: int = 0, prior: float | Literal["split"] | None = "split") -> Iterator[Scene]:
    """An endless stream of distinct scenes of a split, the same for the same seed.

    `prior` as in `sample_scene`, by default the split's own. Uniform scenes (`prior=None`) may hold HELD_OUT
    pairs: they train CLIP, which is to know every pair.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not of this world; use one of {', '.join(SPLITS)}")
    chance = PRIORS[split] if prior == "split" else prior
    rng = random.Random(f"{split}:{seed}:{chance}")
    held_out = chance is None or split in ("validation", "test")
    seen: set[str] = set()
    while True:
        scene = sample_scene(rng, chance, held_out)
        if scene.split == split and scene.content_hash not in seen:
            seen.add(scene.content_hash)
            yield scene


def _polygon(points: list[tuple[float, float]], centre: float, radius: float) -> list[tuple[float, float]]:
    return [(centre + radius * x, centre + radius * y) for x, y in points]


def _star(points: int = 5, inner: float = 0.42) -> list[tuple[float, float]]:
    corners = []
    for i in range(2 * points):
        r = 1.1 if i % 2 == 0 else inner
        angle = math.pi * i / points - math.pi / 2
        corners.append((r * math.cos(angle), r * math.sin(angle)))
    return corners


_CORNERS: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0, -1), (1, 0.85), (-1, 0.85)],
    "star": _star(),
    "diamond": [(0, -1.1), (0.8, 0), (0, 1.1), (-0.8, 0)],
}


@cache
def _mask(shape: str, size: str) -> np.ndarray:
    """(CELL, CELL) float32 in 0..1: how much of each pixel the shape covers, the shape centred."""
    side = CELL * _SUPERSAMPLE
    picture = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(picture)
    c, r = (side - 1) / 2, _RADIUS[size] * _SUPERSAMPLE
    if shape in _CORNERS:
        draw.polygon(_polygon(_CORNERS[shape], c, r), fill=255)
    elif shape == "cross":
        draw.rectangle((c - r, c - 0.32 * r, c + r, c + 0.32 * r), fill=255)
        draw.rectangle((c - 0.32 * r, c - r, c + 0.32 * r, c + r), fill=255)
    elif shape == "heart":
        draw.ellipse((c - r, c - 0.9 * r, c + 0.06 * r, c + 0.16 * r), fill=255)
        draw.ellipse((c - 0.06 * r, c - 0.9 * r, c + r, c + 0.16 * r), fill=255)
        draw.polygon(_polygon([(-0.95, -0.15), (0.95, -0.15), (0, 1)], c, r), fill=255)
    else:
        draw.ellipse((c - r, c - r, c + r, c + r), fill=255)
        if shape == "ring":
            draw.ellipse((c - 0.55 * r, c - 0.55 * r, c + 0.55 * r, c + 0.55 * r), fill=0)
    large = np.asarray(picture, dtype=np.float32) / 255
    return large.reshape(CELL, _SUPERSAMPLE, CELL, _SUPERSAMPLE).mean(axis=(1, 3))


def render_array(scene: Scene) -> np.ndarray:
    """(IMAGE_SIZE, IMAGE_SIZE, 3) uint8 RGB of the scene; the same scene and seed give the same bytes."""
    rng = np.random.default_rng([scene.seed, int(scene.content_hash[:8], 16)])
    canvas = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float32)
    canvas[:] = rng.uniform(205, 240)
    for thing in scene.things:
        row, column = divmod(PLACES.index(thing.place), 3)
        dy, dx = rng.integers(-_JITTER, _JITTER + 1, size=2)
        colour = np.asarray(RGB[thing.colour], dtype=np.float32) * rng.uniform(0.9, 1.06) + rng.normal(0, 4, 3)
        cover = np.roll(_mask(thing.shape, thing.size), (dy, dx), axis=(0, 1))[..., None]
        cell = canvas[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
        cell += cover * (colour.astype(np.float32) - cell)
    canvas += rng.standard_normal(canvas.shape, dtype=np.float32) * _NOISE
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


def render(scene: Scene) -> Image.Image:
    """The scene as a small RGB image (IMAGE_SIZE x IMAGE_SIZE pixels)."""
    return Image.fromarray(render_array(scene), "RGB")
