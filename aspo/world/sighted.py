"""A start model without the prior: `python -m aspo.world.sighted --out runs/sighted` (minutes on one core).

The shipped model errs because it trusts what is usual; this one is that model trained further on true descriptions of
scenes whose colours are all equally likely, so that on a clear image it has little left to err from. Shown noised
images it errs for want of sight. The regimes of `aspo compare` use it (docs/evidence.md).
"""

from __future__ import annotations

import argparse
import time
from itertools import islice
from pathlib import Path

import torch
from torch import nn

from aspo.pairs.noise import NOISE_STEPS
from aspo.world import load_clip, load_vlm
from aspo.world.build import save_vlm
from aspo.world.gates import answer_figures, answers, diffusion_noise, sentence_similarities, tower_features
from aspo.world.gates import auc as pooled_auc
from aspo.world.language import DESCRIBE, Claim, describe, judge
from aspo.world.pixels import pixels
from aspo.world.scenes import scenes
from aspo.world.vlm import base_loss, encode

SCENES, STEPS, BATCH, LEARNING_RATE = 4000, 120, 64, 5e-4


def train_sighted(steps: int = STEPS, count: int = SCENES):  # type: ignore[no-untyped-def]
    """(model, processor): the shipped model after `steps` on true descriptions of `count` uniform base scenes.

    Raises ValueError for fewer than one of either.
    """
    for name, value in (("steps", steps), ("count", count)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    torch.manual_seed(0)
    model, processor = load_vlm()
    batch = list(islice(scenes("base", prior=None), count))
    features = torch.cat([tower_features(model, pixels(batch[i : i + 512])) for i in range(0, count, 512)])
    rows = [encode(processor, [(DESCRIBE, describe(scene))]) for scene in batch]
    model.train().model.vision_tower.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps + 1, cycle_momentum=False
    )
    generator = torch.Generator().manual_seed(0)
    start = time.time()
    for step in range(steps):
        index = torch.randint(count, (BATCH,), generator=generator).tolist()
        longest = max(len(rows[i][0]) for i in index)
        ids, labels = (torch.full((BATCH, longest), fill) for fill in (0, -100))
        for r, i in enumerate(index):
            ids[r, : len(rows[i][0])], labels[r, : len(rows[i][1])] = map(torch.tensor, rows[i])
        loss = base_loss(model, features[index], ids, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step} loss {loss.item():.3f} {time.time() - start:.0f} s", flush=True)
    return model.eval(), processor


def sight(model, processor, noise_step: int, count: int = 200) -> dict[str, float]:  # type: ignore[no-untyped-def]
    """Errors of answers sampled on validation images under noise, what share of them is the usual colour, and how well
    CLIP tells right from wrong sentences on the clear images."""
    batch = list(islice(scenes("validation"), count))
    clear = pixels(batch)
    shown = clear if noise_step == 0 else diffusion_noise(clear, noise_step, torch.Generator().manual_seed(4))
    claims = [judge(t, scene) for t, scene in zip(answers(model, processor, shown, 1.0, 1), batch, strict=True)]
    clip, _, tokenizer = load_clip()
    similarities = sentence_similarities(clip, tokenizer, clear, claims)
    found = answer_figures(claims, batch)
    return {
        "wrong": found["wrong_share"],
        "wrong is usual": found["wrong_is_prior_share"],
        "absent": found["absent_subject_share"],
        "unparseable": found["unparseable_share"],
        "auc": pooled_auc([_split(row, values) for row, values in zip(claims, similarities, strict=True)]),
    }


def _split(claims: list[Claim], values: list[float]) -> tuple[list[float], list[float]]:
    pairs = list(zip(claims, values, strict=True))
    return [v for c, v in pairs if c.verdict == "true"], [v for c, v in pairs if c.verdict == "false"]


def main() -> int:
    """Train, save, and print what the model gets wrong under noise of several steps."""
    parser = argparse.ArgumentParser(prog="python -m aspo.world.sighted", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--noise-steps", type=int, nargs="*", default=[0, 500, 600, 700], help="to look at (0 = clear)")
    args = parser.parse_args()
    for step in args.noise_steps:  # before minutes of training
        if not 0 <= step < NOISE_STEPS:
            parser.error(f"--noise-steps {step}: must be 0 to {NOISE_STEPS - 1}")
    if args.out.is_file():
        parser.error(f"--out {args.out} is a file; name a folder")
    torch.set_num_threads(1)
    if not (args.out / "config.json").is_file():
        model, processor = train_sighted()
        save_vlm(model, processor, args.out)
    from transformers import LlavaForConditionalGeneration

    _, processor = load_vlm()
    model = LlavaForConditionalGeneration.from_pretrained(args.out, dtype=torch.float32).eval()
    for step in args.noise_steps:
        print(f"noise step {step}: " + ", ".join(f"{k} {v:.3f}" for k, v in sight(model, processor, step).items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
