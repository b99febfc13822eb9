"""Diffusion noise on an image processor's pixels.

x_t = sqrt(abar_t) x + sqrt(1 - abar_t) eps,   abar_t = prod_{s <= t} (1 - b_s),
b = sigmoid(linspace(-6, 6, 1000)) * (5e-3 - 1e-5) + 1e-5,   x the normalised pixels, eps standard normal
"""

import hashlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from aspo.folder import image_entries
from aspo.pairs import Row

NOISE_STEPS = 1000


@cache
def noise_schedule() -> Tensor:
    """(1000,) fp64, abar_t for t = 0..999."""
    betas = torch.sigmoid(torch.linspace(-6, 6, NOISE_STEPS, dtype=torch.float64)) * (5e-3 - 1e-5) + 1e-5
    return torch.cumprod(1 - betas, dim=0)


def add_noise(pixel_values: Tensor, step: int, seeds: Sequence[int], copies: int = 1) -> Tensor:
    """Diffusion noise of step 0..999 on normalised pixels, of the same shape and dtype.

    Args:
        pixel_values: (n, ...). With n = len(seeds), image i gets the noise of seeds[i] whatever its neighbours are;
            otherwise (processors that pack the patches of all images) the noise of the batch comes from seeds[0].
        step: the diffusion step.
        seeds: one for each image.
        copies: how often each patch of packed ones, a row (colours, copies, pixels), has its image along time
            (`copies_of_a_still`). They all get the same noise: the model averages over them, and noise of each copy's
            own would partly cancel.

    Raises:
        ValueError: a step outside 0..999; packed patches that are not `copies` equal ones.
    """
    if not 0 <= step < NOISE_STEPS:
        raise ValueError(f"noise step is {step}; it must be 0 to {NOISE_STEPS - 1}")
    if copies > 1 and pixel_values.dim() == 2:
        stills = _stills(pixel_values, copies)
        noised = add_noise(stills[:, :, 0], step, seeds)
        return noised[:, :, None].expand_as(stills).reshape(pixel_values.shape)
    parts = list(pixel_values) if len(pixel_values) == len(seeds) else [pixel_values]
    noise = [
        torch.randn(part.shape, generator=torch.Generator().manual_seed(seed))
        for part, seed in zip(parts, seeds, strict=False)
    ]
    eps = torch.stack(noise) if len(parts) == len(seeds) else noise[0]
    abar = float(noise_schedule()[step])
    x = pixel_values.float()
    return (abar**0.5 * x + (1 - abar) ** 0.5 * eps.to(x.device).reshape(x.shape)).to(pixel_values.dtype)


def copies_of_a_still(processor: Any) -> int:
    """How often the processor repeats an image along time, for a model that reads images as short videos; else 1."""
    return int(getattr(getattr(processor, "image_processor", None), "temporal_patch_size", 1))


def _stills(patches: Tensor, copies: int) -> Tensor:
    """Packed patches (n, 3 * copies * pixels) as (n, 3, copies, pixels), if all copies are the same."""
    if patches.shape[1] % (3 * copies) == 0:
        stills = patches.view(len(patches), 3, copies, -1)
        if torch.equal(stills, stills[:, :, :1].expand_as(stills)):
            return stills
    raise ValueError(
        f"the processor's patches of {patches.shape[1]} values do not hold each of 3 colours {copies} times over, one "
        "copy behind the other, as Qwen2-VL's do: noise cannot be put on its images; take a model of another family"
    )


def image_seeds(row: Row, seed: int) -> list[int]:
    """A seed for each image of a row, from the run's seed and the row's id alone."""
    return [
        int.from_bytes(hashlib.sha256(f"{seed}/{row['id']}/{n}".encode()).digest()[:7])
        for n in range(len(image_entries(row)))
    ]
