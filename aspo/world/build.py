"""Rebuild the world's models: `python -m aspo.world.build --out FOLDER`. A folder's finished stages are kept.

CLIP first, on scenes whose colours are uniform; then the vision-language model on CLIP's frozen vision tower, with
scenes in which the prior holds 85 % of the time; then the gates (aspo.world.gates), by which the world was chosen.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch
from open_clip.model import CLIP
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

from aspo.world.clip import clip_config, cosines, load_open_clip, save_open_clip, to_transformers
from aspo.world.gates import LIMITS, NOISE_STEP, TEMPERATURE, failures, measure
from aspo.world.language import true_sentences
from aspo.world.pixels import pixels
from aspo.world.scenes import Scene, sample_scene, scenes
from aspo.world.tokenizer import clip_tokenizer, train_tokenizer
from aspo.world.vlm import BaseTraining, build_processor, train_vlm

CLIP_STEPS = 1500


def uniform_scenes(rng: random.Random, n: int, counts: tuple[int, int]) -> list[Scene]:
    """n scenes of the base split whose colours are all equally likely, with `counts` = (fewest, most) objects."""
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
    """(scenes, captions, holds) per step: two groups of true captions, single sentences (two per scene) and pairs of
    sentences (of every sixth scene); holds[i, j] = caption j of the groups' concatenation is true of scene i."""
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


def train_clip(
    tokenizer: PreTrainedTokenizerFast,
    steps: int,
    batch_size: int = 96,
    lr: float = 2e-3,
    log: Callable[[str], None] = print,
) -> CLIP:
    """Train on uniform scenes with a growing number of objects. `tokenizer` adds <s> and </s>."""
    torch.manual_seed(0)
    model = CLIP(**clip_config(len(tokenizer)))
    bias = nn.Parameter(torch.tensor(-3.0))
    optimizer = torch.optim.AdamW([*model.parameters(), bias], lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps + 1, pct_start=0.04, cycle_momentum=False
    )
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


def save_vlm(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """A plain transformers folder; weights stored as fp16, while the configuration says that they load as fp32."""
    model.save_pretrained(folder, state_dict={name: value.half() for name, value in model.state_dict().items()})
    processor.save_pretrained(folder)


def build(out: Path, scene_count: int = 500) -> dict[str, float]:
    """Train what `out` does not hold yet, measure the gates on the models as stored, write `gates.json`."""
    tokenizer = train_tokenizer()
    text_tokenizer = clip_tokenizer(tokenizer)
    processor = build_processor(tokenizer)
    if not (out / "clip").is_dir():
        config = clip_config(len(text_tokenizer))
        save_open_clip(train_clip(text_tokenizer, CLIP_STEPS), config, text_tokenizer, out / "clip")
    clip, _, clip_tokens = load_open_clip(out / "clip")
    if not (out / "vlm").is_dir():
        save_vlm(train_vlm(to_transformers(clip), processor, BaseTraining()), processor, out / "vlm")
    vlm = LlavaForConditionalGeneration.from_pretrained(out / "vlm").eval()
    figures = measure(vlm, processor, clip, clip_tokens, list(islice(scenes("validation"), scene_count)))
    gates = {
        "recipe": {"temperature": TEMPERATURE, "noise_step": NOISE_STEP, "split": "validation", "scenes": scene_count},
        "limits": LIMITS,
        "figures": {name: round(value, 4) for name, value in figures.items()},
    }
    (out / "gates.json").write_text(json.dumps(gates, indent=2) + "\n")
    return figures


def main() -> int:
    """Build and print the figures; exit status 1 where a gate is missed."""
    parser = argparse.ArgumentParser(prog="python -m aspo.world.build", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the models and gates.json")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    figures = build(args.out)
    for name, value in figures.items():
        print(f"{name:32} {value:.4f}")
    missed = failures(figures)
    for line in missed:
        print(f"gate missed: {line}")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
