"""Rebuild the world's models: `python -m aspo.world.build --out FOLDER`.

CLIP first, on scenes whose colours are uniform; then the vision-language model on CLIP's frozen vision tower, with scenes
and answers in which the prior holds 85 % of the time; then the gates (aspo.world.gates), by which the world was chosen.
"""

import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from open_clip.model import CLIP
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from aspo.world.clip import MEAN, STD, clip_config, cosines
from aspo.world.language import true_sentences
from aspo.world.scenes import Scene, render_array, sample_scene


def pixels(batch: list[Scene]) -> Tensor:
    """(B, 3, IMAGE_SIZE, IMAGE_SIZE) fp32, normalised as the processors do."""
    images = torch.from_numpy(np.stack([render_array(scene) for scene in batch])).permute(0, 3, 1, 2)
    return (images.float() / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def uniform_scenes(rng: random.Random, n: int, counts: tuple[int, int]) -> list[Scene]:
    batch: list[Scene] = []
    while len(batch) < n:
        scene = sample_scene(rng, None, True, counts)
        if scene.split == "base":
            batch.append(scene)
    return batch


def curriculum(steps: int) -> Iterator[tuple[int, int]]:
    """(fewest, most) objects of each step's scenes: one, then up to three, then the world's four to six."""
    for step in range(steps):
        yield (1, 1) if step < 0.3 * steps else (1, 3) if step < 0.5 * steps else (4, 6)


def caption_batches(
    batch_size: int, seed: int, counts: Iterator[tuple[int, int]]
) -> Iterator[tuple[list[Scene], list[list[str]], Tensor]]:
    """Endless (scenes, captions, holds): two distinct groups of true captions, single sentences (two per scene) and subsets
    of two or three (of every sixth scene); holds[i, j] = caption j of the groups' concatenation is true of scene i."""
    rng = random.Random(f"captions:{seed}")
    for fewest_most in counts:
        batch = uniform_scenes(rng, batch_size, fewest_most)
        truths = [true_sentences(scene) for scene in batch]
        singles = sorted({(s,) for truth in truths for s in rng.sample(truth, 2)})
        subsets = sorted({tuple(rng.sample(truth, 2)) for truth in truths[::6]})
        known = [frozenset(truth) for truth in truths]
        holds = torch.tensor([[truth.issuperset(caption) for caption in singles + subsets] for truth in known])
        yield batch, [[" ".join(caption) for caption in group] for group in (singles, subsets)], holds


def text_features(model: CLIP, ids: Tensor) -> Tensor:
    """`model.encode_text` on ids cut to the longest caption: the causal text tower never looks beyond the end token."""
    x = model.token_embedding(ids) + model.positional_embedding[: ids.shape[1]]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[: ids.shape[1], : ids.shape[1]]))
    ends = (ids == model.text_eos_id).int().argmax(dim=-1)
    return x[torch.arange(len(ids)), ends] @ model.text_projection


def clip_loss(model: CLIP, bias: Tensor, images: Tensor, ids: list[Tensor], holds: Tensor) -> Tensor:
    """SigLIP's loss with every true caption of an image as a positive: per image, the sum over captions of the binary
    cross-entropy of sigmoid(scale * cos + bias) against truth."""
    cosine = cosines(model.visual(images), torch.cat([text_features(model, group) for group in ids]))
    logits = model.logit_scale.exp() * cosine + bias
    return nn.functional.binary_cross_entropy_with_logits(logits, holds.float(), reduction="sum") / len(holds)


def schedule(optimizer: torch.optim.Optimizer, steps: int, warmup: int = 50) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warm-up, then cosine to zero."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min(1.0, (t + 1) / warmup) * 0.5 * (1 + np.cos(np.pi * min(1.0, t / steps)))
    )


def train_clip(
    tokenizer: PreTrainedTokenizerFast, steps: int = 2000, batch_size: int = 96, lr: float = 2e-3, log=print
) -> CLIP:
    torch.manual_seed(0)
    model = CLIP(**clip_config(len(tokenizer)))
    bias = nn.Parameter(torch.tensor(-3.0))
    optimizer = torch.optim.AdamW([*model.parameters(), bias], lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    scheduler = schedule(optimizer, steps)
    start = time.time()
    for step, (batch, captions, holds) in enumerate(caption_batches(batch_size, 0, curriculum(steps))):
        ids = [tokenizer(group, padding=True, return_tensors="pt").input_ids for group in captions]
        loss = clip_loss(model, bias, pixels(batch), ids, holds)
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0 or step == steps - 1:
            log(f"clip step {step} loss {loss.item():.3f} {time.time() - start:.0f} s")
    return model.eval()
