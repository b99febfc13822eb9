"""Pictures of negatives: where they lie (t-SNE), what is false of them, and what the autoencoder's latents look for."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from aspo.folder import load_images
from aspo.negatives.figures import Mark, judged
from aspo.validate import response_text

TRUE_COLOUR, FALSE_COLOUR, PLAIN = "#2a7f4f", "#b3261e", "#333333"
LATENTS_SHOWN = 8
LINES, WIDTH = 8, 34  # of the text below an image; what goes beyond is not shown
Row = Mapping[str, Any]


def tsne(x: Tensor, *, perplexity: float = 30.0, steps: int = 500, seed: int = 0) -> Tensor:
    """Exact t-SNE (van der Maaten and Hinton, 2008): (n, d) -> (n, 2) fp32, for a few hundred points: n^2 memory.

    Starts from the first two principal components; 100 steps of early exaggeration by 12, momentum 0.5, then 0.8.

    Raises:
        ValueError: fewer than 4 points, or values that are not finite.
    """
    n = len(x)
    if n < 4:
        raise ValueError(f"t-SNE of {n} points; it needs at least 4")
    if not x.isfinite().all():
        raise ValueError("t-SNE of values that are not finite")
    x = x.double()
    p = _affinities(torch.cdist(x, x).square(), min(perplexity, (n - 1) / 3))
    centred = x - x.mean(0)
    _, _, components = torch.linalg.svd(centred, full_matrices=False)
    y = centred @ components[:2].T
    y = 1e-4 * y / y.std().clamp_min(1e-12)
    y = y + 1e-6 * torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=y.dtype)  # equal points part
    velocity, gains, rate = torch.zeros_like(y), torch.ones_like(y), max(n / 12, 50.0)
    for step in range(steps):
        kernel = 1 / (1 + torch.cdist(y, y).square())
        kernel.fill_diagonal_(0)
        q = (kernel / kernel.sum()).clamp_min(1e-12)
        pull = ((12 if step < 100 else 1) * p - q) * kernel
        gradient = 4 * (pull.sum(1, keepdim=True) * y - pull @ y)
        gains = torch.where(gradient * velocity < 0, gains + 0.2, gains * 0.8).clamp_min(0.01)
        velocity = (0.5 if step < 100 else 0.8) * velocity - rate * gains * gradient
        y = y + velocity
        y = y - y.mean(0)
    return y.float()


def _affinities(distances: Tensor, perplexity: float) -> Tensor:
    """Symmetric p, (n, n), summing to 1: each row's bandwidth is found by bisection for its perplexity."""
    n = len(distances)
    low, high, beta = torch.zeros(n, 1).double(), torch.full((n, 1), torch.inf).double(), torch.ones(n, 1).double()
    target = torch.tensor(perplexity).log()
    off = distances.clone().fill_diagonal_(torch.inf)
    off = off - off.amin(1, keepdim=True)
    for _ in range(60):
        p = torch.softmax(-beta * off, 1)
        entropy = -(p * p.clamp_min(1e-300).log()).sum(1, keepdim=True)
        low, high = torch.where(entropy > target, beta, low), torch.where(entropy > target, high, beta)
        beta = torch.where(high.isinf(), 2 * beta, (low + high) / 2)
    return (p + p.T) / (2 * n)


def plot_projection(right: Tensor, negatives: Tensor, path: Path, title: str, rows: int = 8, seed: int = 0) -> None:
    """A t-SNE picture: a sample of all images in grey, and of `rows` rows the right image (star) and its negatives.

    right: (n, d). negatives: (n, N, d). Two rows or more are needed for a picture; otherwise none is written.
    """
    shown = torch.linspace(0, len(right) - 1, min(rows, len(right))).long().unique()
    order = torch.randperm(len(right), generator=torch.Generator().manual_seed(seed))[:200]
    background = torch.cat([right[order], negatives[order, 0]])
    own = torch.cat([right[shown].unsqueeze(1), negatives[shown]], 1)
    if len(background) + own.shape[0] * own.shape[1] < 4:
        return
    places = tsne(torch.cat([background, own.flatten(0, 1)]), seed=seed)
    behind, front = places[: len(background)], places[len(background) :].unflatten(0, own.shape[:2])
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.add_subplot()
    axes.scatter(behind[:, 0].numpy(), behind[:, 1].numpy(), s=6, color="#c8c8c8", linewidths=0)
    for n, points in enumerate(front.numpy()):
        colour = f"C{n % 10}"
        for x, y in points[1:]:
            axes.plot([points[0, 0], x], [points[0, 1], y], color=colour, linewidth=0.6, alpha=0.6)
        axes.scatter(points[1:, 0], points[1:, 1], s=28, color=colour)
        axes.scatter(points[:1, 0], points[:1, 1], s=160, color=colour, marker="*", edgecolors="black", linewidths=0.6)
    axes.set_title(f"{title}\nt-SNE of CLIP image features: star = right image, dots = its negatives", fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])
    figure.savefig(path, dpi=110)


def plot_grid(rows: Sequence[Row], root: Path, path: Path, title: str, limit: int = 6) -> None:
    """Rows of right image and negatives, below each the chosen response's sentences.

    Where an image's truth is known, a sentence that is false of it stands in red behind a cross, a true one in green.
    """
    rows = rows[:limit]
    columns = 1 + max(len(row["negative_images"]) for row in rows)
    figure = Figure(figsize=(2.1 * columns, 3.1 * len(rows)), layout="constrained")
    grid = figure.subplots(2 * len(rows), columns, squeeze=False, height_ratios=[2.1, 1] * len(rows))
    for axes in grid.flat:
        axes.axis("off")
    for above, below, row in zip(grid[::2], grid[1::2], rows, strict=True):
        images = load_images(row, root=root) + load_images(row, "negative_images", root)
        scenes = [row.get("scene"), *(row.get("negative_scenes") or [None] * len(images[1:]))]
        for n, (image, scene) in enumerate(zip(images, scenes, strict=True)):
            above[n].imshow(image)
            above[n].set_title("right image" if n == 0 else f"negative {n}", fontsize=7)
            _write_marks(below[n], marks(response_text(row["chosen"]), scene))
    figure.suptitle(f"{title}: sentences of the chosen response that are false of an image are red", fontsize=9)
    figure.savefig(path, dpi=110)


def marks(text: str, scene: Mapping[str, Any] | None) -> list[Mark]:
    """The sentences of a response with their truth in a scene; without one the whole text, not judged."""
    return [(" ".join(text.split()), None)] if scene is None else judged(text, scene)


def _write_marks(axes: Any, sentences: Sequence[Mark]) -> None:
    colours = {True: TRUE_COLOUR, False: FALSE_COLOUR, None: PLAIN}
    lines = [
        (part, colours[truth])
        for sentence, truth in sentences
        for part in textwrap.wrap(("✗ " if truth is False else "") + sentence, WIDTH)
    ]
    for n, (part, colour) in enumerate(lines[:LINES]):  # "$5 and $6" is no formula
        at = {"transform": axes.transAxes, "va": "top"}
        axes.text(0, 1 - n / LINES, part, **at, fontsize=5.5, color=colour, parse_math=False)


def plot_latents(
    latents: Sequence[Mapping[str, Any]],
    right: Sequence[Any],
    pool: Sequence[Any],
    path: Path,
    limit: int = LATENTS_SHOWN,
) -> None:
    """The most varied latents, a line each: the pairs (right image above, negative below) that activate it most.

    right, pool: image entries that `latent_examples`' "row" and "image" count.
    """
    latents = latents[:limit]
    width = max(len(latent["top"]) for latent in latents)
    figure = Figure(figsize=(1.1 * width + 1, 2.2 * len(latents)), layout="constrained")
    grid = figure.subplots(2 * len(latents), width, squeeze=False)
    for n, latent in enumerate(latents):
        for axes in grid[2 * n : 2 * n + 2].flat:
            axes.axis("off")
        for example, above, below in zip(latent["top"], grid[2 * n], grid[2 * n + 1], strict=False):
            above.imshow(_thumbnail(right[example["row"]]))
            below.imshow(_thumbnail(pool[example["image"]]))
            above.set_title(f"latent {latent['latent']}: {example['code']:.2f}", fontsize=6)
    figure.suptitle("right image above, negative below: the deviations that activate a latent most", fontsize=8)
    figure.savefig(path, dpi=90)


def _thumbnail(entry: Any) -> Image.Image:
    image = load_images({"images": [entry]})[0]
    image.thumbnail((128, 128))
    return image
