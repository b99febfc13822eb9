"""A sparse autoencoder of semantic deviations between images, for choosing negatives (MISP-DPO, arXiv 2509.25717).

A deviation is what tells a wrong image from the right one under a prompt: e(m, x) = vec(h_v h_t^T) with CLIP's unit
features h_v of the image and h_t of the prompt, and

    d_i = e(m_p, x) - e(m_n^i, x) = vec(dv_i h_t^T),   dv_i = h_v(m_p) - h_v(m_n^i)

It is of rank one, so nothing of size d_v * d_t is ever formed. Ours, the paper prints no parametrisation: all matrices
are of low rank, W_j = sum_r u_jr v_jr^T and D_j = sum_r p_jr q_jr^T, and the decoder's bias is one more unit D_J whose
code is 1. With z_J = 1:

    z_j   = sigmoid(dv^T W_j h_t + b_j) = sigmoid(sum_r (u_jr . dv)(v_jr . h_t) + b_j)
    dhat  = sum_{j <= J} z_j vec(D_j)
    error = ||d - dhat||^2 = ||dv||^2 ||h_t||^2 - 2 sum_j z_j dv^T D_j h_t + z^T G z,
    G_jk  = <D_j, D_k>_F = sum_rs (p_jr . p_ks)(q_jr . q_ks)
    loss  = mean error + gamma * sum_{j < J} KL(rho || mean z_j)

Axes: ... any leading axes, d_v and d_t features, J latents, R rank.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

KL_FLOOR = 1e-6  # a mean activation is kept this far from 0 and 1, where KL is infinite


@dataclass(frozen=True)
class SaeConfig:
    """Shape and loss of the autoencoder. latents and gamma are the paper's; rank and rho are ours."""

    image_dim: int
    text_dim: int
    latents: int = 128
    rank: int = 4
    gamma: float = 1.0
    rho: float = 0.05

    def __post_init__(self) -> None:
        for name in ("image_dim", "text_dim", "latents", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.rho < 1:
            raise ValueError(f"rho is {self.rho}; it must lie between 0 and 1")
        if not (math.isfinite(self.gamma) and self.gamma >= 0):
            raise ValueError(f"gamma is {self.gamma}; it must be finite and not negative")


class BilinearSae(torch.nn.Module):
    """The autoencoder. `code_mean` (J,): the mean code of the deviations it was trained on, to centre codes by."""

    code_mean: Tensor

    def __init__(self, config: SaeConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        generator = torch.Generator().manual_seed(seed)

        def normal(units: int, dim: int, scale: float) -> torch.nn.Parameter:
            return torch.nn.Parameter(scale * torch.randn(units, config.rank, dim, generator=generator))

        # Unit features: u . dv and v . h_t are of order 1, so that codes differ from the start; they begin at rho.
        self.encoder_image = normal(config.latents, config.image_dim, 1.0)
        self.encoder_text = normal(config.latents, config.text_dim, 1.0)
        self.encoder_bias = torch.nn.Parameter(torch.full((config.latents,), math.log(config.rho / (1 - config.rho))))
        self.decoder_image = normal(config.latents + 1, config.image_dim, 0.3 * config.image_dim**-0.5)
        self.decoder_text = normal(config.latents + 1, config.text_dim, config.text_dim**-0.5)
        with torch.no_grad():
            self.decoder_image[-1] = 0  # the bias begins at 0
        self.register_buffer("code_mean", torch.zeros(config.latents))

    def codes(self, dv: Tensor, text: Tensor) -> Tensor:
        """z, (..., J) in (0, 1). dv: (..., d_v). text: (..., d_t), its leading axes may be 1 where dv's are more."""
        return torch.sigmoid(_bilinear(dv, text, self.encoder_image, self.encoder_text) + self.encoder_bias)

    def error(self, dv: Tensor, text: Tensor, codes: Tensor) -> Tensor:
        """||d - dhat||^2, (...): the formula at the top, without d or dhat. Rounding may make it a little below 0."""
        z = torch.cat([codes, torch.ones_like(codes[..., :1])], dim=-1)
        size = dv.square().sum(-1) * text.square().sum(-1)
        cross = (z * _bilinear(dv, text, self.decoder_image, self.decoder_text)).sum(-1)
        return size - 2 * cross + ((z @ self.gram()) * z).sum(-1)

    def gram(self) -> Tensor:
        """G, (J + 1, J + 1): Frobenius products of the decoder's matrices."""
        units, rank, _ = self.decoder_image.shape
        image, text = self.decoder_image.flatten(0, 1), self.decoder_text.flatten(0, 1)
        return ((image @ image.T) * (text @ text.T)).view(units, rank, units, rank).sum((1, 3))

    def sparsity(self, codes: Tensor) -> Tensor:
        """sum_j KL(rho || mean code j) over all leading axes of `codes`; a number."""
        rho, mean = self.config.rho, codes.flatten(0, -2).mean(0).clamp(KL_FLOOR, 1 - KL_FLOOR)
        return (rho * (rho / mean).log() + (1 - rho) * ((1 - rho) / (1 - mean)).log()).sum()

    def loss(self, dv: Tensor, text: Tensor) -> Tensor:
        """Mean error + gamma * sparsity of a batch of deviations; a number."""
        codes = self.codes(dv, text)
        return self.error(dv, text, codes).mean() + self.config.gamma * self.sparsity(codes)


def _bilinear(dv: Tensor, text: Tensor, image_factors: Tensor, text_factors: Tensor) -> Tensor:
    """dv^T (sum_r image_jr text_jr^T) h for every unit j: (..., units)."""
    units, rank, _ = image_factors.shape
    products = (dv @ image_factors.flatten(0, 1).T) * (text @ text_factors.flatten(0, 1).T)
    return products.unflatten(-1, (units, rank)).sum(-1)


class Deviations(NamedTuple):
    """What deviations are made of: every row's right image and prompt, and the images that negatives come from."""

    right: Tensor  # (n, d_v), unit norm
    text: Tensor  # (n, d_t), unit norm
    pool: Tensor  # (m, d_v), unit norm

    def to(self, device: torch.device | str) -> Deviations:
        """The same on a device."""
        return Deviations(*(features.to(device) for features in self))

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Random rows against random images: dv (count, d_v), text (count, d_t), and which rows and images."""
        rows = torch.randint(len(self.right), (count,), generator=generator)
        images = torch.randint(len(self.pool), (count,), generator=generator)
        return self.right[rows] - self.pool[images], self.text[rows], rows, images


def train_sae(
    data: Deviations,
    config: SaeConfig,
    *,
    steps: int = 2000,
    batch_size: int = 512,
    lr: float = 1e-2,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> tuple[BilinearSae, dict[str, float]]:
    """Train on random deviations with Adam (cosine to 0); the same seed gives the same weights on one machine.

    Returns:
        The autoencoder, and what it does on deviations drawn anew: "explained" (1 - error / ||d||^2 of the sample),
        "mean_code", "unused" (latents whose mean code is below rho / 10) and "sparsity" (the sum of KL).

    Raises:
        ValueError: features that are not finite, or too few images to deviate.
    """
    if len(data.pool) < 2:
        raise ValueError(f"the pool has {len(data.pool)} images; an autoencoder of deviations needs at least 2")
    for name, features in data._asdict().items():
        if not features.isfinite().all():
            raise ValueError(f"{name} holds features that are not finite")
    sae = BilinearSae(config, seed).to(data.pool.device)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(sae.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        dv, text, _, _ = data.sample(batch_size, generator)
        optimizer.zero_grad()
        sae.loss(dv, text).backward()
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(1)
    with torch.no_grad():
        dv, text, _, _ = data.sample(16 * batch_size, generator)
        codes = sae.codes(dv, text)
        mean = codes.mean(0)
        sae.code_mean.copy_(mean)
        figures = {
            "explained": 1
            - float(sae.error(dv, text, codes).sum() / (dv.square().sum(-1) * text.square().sum(-1)).sum()),
            "mean_code": float(mean.mean()),
            "unused": int((mean < config.rho / 10).sum()),
            "sparsity": float(sae.sparsity(codes)),
        }
    return sae.requires_grad_(False).eval(), figures


def save_sae(sae: BilinearSae, path: str | Path, about: Mapping[str, Any]) -> None:
    """Weights and config in one safetensors file; `about` (JSON) says what it was trained on and how well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    metadata = {"config": json.dumps(asdict(sae.config)), "about": json.dumps(dict(about))}
    save_file({name: value.detach().cpu().contiguous() for name, value in sae.state_dict().items()}, partial, metadata)
    partial.replace(path)


def load_sae(path: str | Path, device: torch.device | str = "cpu") -> tuple[BilinearSae, dict[str, Any]]:
    """The autoencoder of `save_sae` and its `about`. Raises ValueError where the file is not one."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        sae = BilinearSae(SaeConfig(**json.loads(metadata["config"])))
        sae.load_state_dict(state)
        about = json.loads(metadata["about"])
    except (SafetensorError, KeyError, TypeError, RuntimeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is no autoencoder of `aspo negatives`: {error}; delete it to train it again"
        ) from error
    return sae.to(device).requires_grad_(False).eval(), about


def latent_examples(
    sae: BilinearSae, data: Deviations, *, top: int = 6, sample: int = 20_000, seed: int = 0
) -> list[dict[str, Any]]:
    """Each latent with the deviations that activate it most, of `sample` random ones; most varied latents first.

    Returns:
        {"latent", "mean", "std" (of its code over the sample), "top": [{"row", "image", "code"}]}; `row` counts the
        rows and `image` the pool. One row and one image are shown once for a latent.
    """
    with torch.no_grad():
        dv, text, rows, images = data.sample(sample, torch.Generator().manual_seed(seed))
        codes = torch.cat([sae.codes(d, t) for d, t in zip(dv.split(4096), text.split(4096), strict=True)])
    listed = []
    for latent in codes.std(0).argsort(descending=True, stable=True).tolist():
        code, examples, seen_rows, seen_images = codes[:, latent], [], set(), set()
        for n in code.argsort(descending=True, stable=True)[: 50 * top].tolist():
            row, image = int(rows[n]), int(images[n])
            if row in seen_rows or image in seen_images:
                continue
            seen_rows.add(row)
            seen_images.add(image)
            examples.append({"row": row, "image": image, "code": round(float(code[n]), 4)})
            if len(examples) == top:
                break
        listed.append({"latent": latent, "mean": float(code.mean()), "std": float(code.std()), "top": examples})
    return listed
