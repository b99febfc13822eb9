"""The gates: figures that decide whether this world is a fair stage for preference optimisation.

Chosen answers are the model's own on the clean picture, rejected ones its own under diffusion noise. All is
measured on validation scenes, before anything is trained on preferences.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from aspo.world.clip import cosines
from aspo.world.language import DESCRIBE, QUESTION_KINDS, Claim, judge, minimal_pairs, questions, stateable
from aspo.world.pixels import pixels
from aspo.world.scenes import COLOURS, IMAGE_TOKENS, PLACES, SHAPES, SIZES, Scene

TEMPERATURE, NOISE_STEP = 1.0, 500
"""The pair recipe's decoding temperature and diffusion step."""

SEEDS = {"chosen": 1, "noise": 2, "rejected": 3}

LIMITS: dict[str, tuple[float, float]] = {
    "chosen_wrong_share": (0.30, 0.45),
    "wrong_is_prior_share": (0.70, 1.0),
    "rejected_minus_chosen_points": (2.0, 10.0),
    "similarity_auc": (0.70, 0.90),
    "dropped_share": (0.0, 0.5),
    "probe_colour": (0.95, 1.0),
    "probe_shape": (0.95, 1.0),
    "probe_size": (0.95, 1.0),
}
"""Each gated figure's least and greatest value."""


def diffusion_noise(pixel_values: Tensor, step: int | Tensor, generator: torch.Generator) -> Tensor:
    """x_t = sqrt(abar_t) x + sqrt(1 - abar_t) eps on normalised tensors (B, 3, H, W), SeVa's schedule of 1000 steps.

    `step`: one for all, or (B,) one for each image.
    """
    betas = torch.sigmoid(torch.linspace(-6, 6, 1000)) * (5e-3 - 1e-5) + 1e-5
    abar = torch.cumprod(1 - betas, dim=0)[step].reshape(-1, 1, 1, 1)
    noise = torch.randn(pixel_values.shape, generator=generator)
    return abar.sqrt() * pixel_values + (1 - abar).sqrt() * noise


def prompt_ids(processor: LlavaProcessor, prompt: str) -> list[int]:
    """Token ids of a one-image user turn, ready for the answer."""
    message: dict[str, Any] = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    image = processor.image_token * IMAGE_TOKENS
    return processor.tokenizer(text.replace(processor.image_token, image)).input_ids


@torch.no_grad()
def answers(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    pixel_values: Tensor,
    temperature: float,
    seed: int = 0,
    prompt: str = DESCRIBE,
    batch_size: int = 128,
    max_new_tokens: int = 48,
) -> list[str]:
    """The model's answer to `prompt` on each image; temperature 0 is greedy."""
    torch.manual_seed(seed)
    ids = torch.tensor(prompt_ids(processor, prompt))
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    texts = []
    for images in pixel_values.split(batch_size):
        inputs = ids.expand(len(images), -1)
        out = model.generate(  # type: ignore[misc]
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            pixel_values=images,
            max_new_tokens=max_new_tokens,
            pad_token_id=processor.tokenizer.pad_token_id,
            **sampling,
        )
        texts += processor.tokenizer.batch_decode(out[:, inputs.shape[1] :], skip_special_tokens=True)
    return texts


@torch.no_grad()
def token_logps(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    pixel_values: Tensor,
    texts: list[str],
    prompt: str = DESCRIBE,
    batch_size: int = 128,
) -> list[list[float]]:
    """Teacher-forced log-probability of each answer's tokens (the end token left out)."""
    prefix = prompt_ids(processor, prompt)
    result = []
    for start in range(0, len(texts), batch_size):
        encoded = [processor.tokenizer(text).input_ids for text in texts[start : start + batch_size]]
        longest = max(map(len, encoded))
        rows = torch.tensor([prefix + ids + [0] * (longest - len(ids)) for ids in encoded])
        images = pixel_values[start : start + batch_size]
        logits = model(input_ids=rows, pixel_values=images, logits_to_keep=longest + 1).logits[:, :-1].float()
        logps = logits.log_softmax(-1).gather(-1, rows[:, -longest:, None])[..., 0]
        result += [logps[i, : len(ids)].tolist() for i, ids in enumerate(encoded)]
    return result


def auc(groups: list[tuple[list[float], list[float]]]) -> float:
    """Share of (right, wrong) pairs within a group where the right one scores higher, ties counting half; pooled."""
    wins = [(r > w) + 0.5 * (r == w) for right, wrong in groups for r in right for w in wrong]
    return sum(wins) / len(wins) if wins else float("nan")


def _by_truth(claims: list[list[Claim]], scores: list[list[float]]) -> list[tuple[list[float], list[float]]]:
    groups = []
    for row, values in zip(claims, scores, strict=True):
        pairs = list(zip(row, values, strict=True))
        groups.append(tuple([v for c, v in pairs if c.verdict == verdict] for verdict in ("true", "false")))
    return groups  # type: ignore[return-value]


def sentence_similarities(
    clip: Any, tokenizer: Any, pixel_values: Tensor, claims: list[list[Claim]]
) -> list[list[float]]:
    """Cosine of each sentence with its image, through the open_clip form."""
    texts = sorted({claim.text for row in claims for claim in row})
    with torch.no_grad():
        features = torch.cat([clip.encode_text(tokenizer(texts[i : i + 256])) for i in range(0, len(texts), 256)])
        images = torch.cat([clip.encode_image(batch) for batch in pixel_values.split(256)])
        table = cosines(images, features)
    column = {text: j for j, text in enumerate(texts)}
    return [[table[i, column[claim.text]].item() for claim in row] for i, row in enumerate(claims)]


def sentence_logps(
    processor: LlavaProcessor, claims: list[list[Claim]], texts: list[str], logps: list[list[float]]
) -> list[list[float]]:
    """Mean token log-probability of each sentence (minus its negative log-likelihood per token)."""
    result = []
    for row, text, values in zip(claims, texts, logps, strict=True):
        offsets = processor.tokenizer(text, return_offsets_mapping=True).offset_mapping
        means = []
        for claim in row:
            inside = [v for (_, end), v in zip(offsets, values, strict=True) if claim.start < end <= claim.end]
            means.append(sum(inside) / len(inside))
        result.append(means)
    return result


def answer_figures(claims: list[list[Claim]], batch: list[Scene]) -> dict[str, float]:
    """Shares over sentences (micro) of a set of answers, coverage of the stateable facts, sentences per answer."""
    flat = [claim for row in claims for claim in row]
    checkable = [claim for claim in flat if claim.checkable]
    wrong = [claim for claim in checkable if claim.verdict == "false"]
    strata = {s: [c for c in checkable if c.stratum == s] for s in ("usual", "unusual", "held_out")}
    stated = [{c.fact for c in row if c.verdict == "true"} for row in claims]
    facts = [stateable(scene) for scene in batch]
    return {
        "wrong_share": len(wrong) / max(1, len(checkable)),
        "wrong_is_prior_share": sum(c.states_prior for c in wrong) / max(1, len(wrong)),
        "absent_subject_share": sum(c.true is None for c in checkable) / max(1, len(checkable)),
        "unparseable_share": (len(flat) - len(checkable)) / max(1, len(flat)),
        "coverage": sum(len(s & f) for s, f in zip(stated, facts, strict=True)) / sum(map(len, facts)),
        "sentences": len(flat) / len(claims),
        **{f"wrong_share_{s}": sum(c.verdict == "false" for c in cs) / max(1, len(cs)) for s, cs in strata.items()},
    }


@torch.no_grad()
def tower_features(model: LlavaForConditionalGeneration, images: Tensor) -> Tensor:
    """(B, 9, W): the patch features that the projector reads, for normalised images (B, 3, IMAGE_SIZE, IMAGE_SIZE)."""
    tower = model.model.vision_tower
    return torch.cat([tower(x, output_hidden_states=True).hidden_states[-2][:, 1:] for x in images.split(256)])


def probe(features: Tensor, batch: list[Scene]) -> dict[str, float]:
    """Accuracy of a linear probe that reads an object's attribute off the tower's patch feature at its cell.

    features (B, 9, W): the layer that the vision-language model reads. Fitted on the first 70 % of the scenes.
    """
    things = [(i, thing) for i, scene in enumerate(batch) for thing in scene.things]
    x = torch.stack([features[i, PLACES.index(thing.place)] for i, thing in things])
    x = torch.cat([(x - x.mean(0)) / (x.std(0) + 1e-6), torch.ones(len(x), 1)], dim=1)
    cut = int(0.7 * len(x))
    result = {}
    for attribute, values in (("colour", COLOURS), ("shape", SHAPES), ("size", SIZES)):
        y = torch.tensor([values.index(getattr(thing, attribute)) for _, thing in things])
        w = torch.zeros(x.shape[1], len(values), requires_grad=True)
        optimizer = torch.optim.LBFGS([w], max_iter=80)

        def closure(w: Tensor = w, y: Tensor = y, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(x[:cut] @ w, y[:cut]) + 1e-3 * w.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
        result[f"probe_{attribute}"] = ((x[cut:] @ w).argmax(1) == y[cut:]).float().mean().item()
    return result


def yes_no_figures(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, pixel_values: Tensor, batch: list[Scene]
) -> dict[str, float]:
    """Accuracy and share of "yes" over the balanced questions of each kind, answered greedily."""
    result: dict[str, float] = {}
    for kind in QUESTION_KINDS:
        asked: dict[str, list[tuple[int, str]]] = {}
        for i, scene in enumerate(batch):
            for question, answer in questions(scene, kind):
                asked.setdefault(question, []).append((i, answer))
        right, yes, total = 0, 0, 0
        for question, items in asked.items():
            said = answers(
                model, processor, pixel_values[[i for i, _ in items]], 0.0, prompt=question, max_new_tokens=2
            )
            right += sum(text.lower().startswith(answer) for text, (_, answer) in zip(said, items, strict=True))
            yes += sum(text.lower().startswith("yes") for text in said)
            total += len(items)
        result |= {f"{kind}_accuracy": right / total, f"{kind}_yes_share": yes / total}
    return result


def minimal_pair_accuracy(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, pixel_values: Tensor, batch: list[Scene]
) -> float:
    """Share of minimal pairs whose true sentence gets the higher log-probability as the answer's first sentence."""
    pairs = [(i, pair) for i, scene in enumerate(batch) for pair in minimal_pairs(scene)]
    images = pixel_values[[i for i, _ in pairs]]
    right, wrong = (
        [sum(row) for row in token_logps(model, processor, images, [pair[side] for _, pair in pairs])]
        for side in (0, 1)
    )
    return sum(r > w for r, w in zip(right, wrong, strict=True)) / len(pairs)


def measure(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    clip: Any,
    tokenizer: Any,
    batch: list[Scene],
    temperature: float = TEMPERATURE,
    noise_step: int = NOISE_STEP,
) -> dict[str, float]:
    """Every figure of the gates and some beside them, on these scenes. `clip`, `tokenizer`: open_clip's form."""
    images = pixels(batch)
    chosen = answers(model, processor, images, temperature, SEEDS["chosen"])
    noised = diffusion_noise(images, noise_step, torch.Generator().manual_seed(SEEDS["noise"]))
    rejected = answers(model, processor, noised, temperature, SEEDS["rejected"])
    chosen_claims, rejected_claims, greedy_claims = (
        [judge(text, scene) for text, scene in zip(texts, batch, strict=True)]
        for texts in (chosen, rejected, answers(model, processor, images, 0.0))
    )
    figures = {
        side: answer_figures(claims, batch)
        for side, claims in (("chosen", chosen_claims), ("rejected", rejected_claims), ("greedy", greedy_claims))
    }
    similarity = sentence_similarities(clip, tokenizer, images, chosen_claims)
    likelihood = sentence_logps(processor, chosen_claims, chosen, token_logps(model, processor, images, chosen))
    return {
        "chosen_wrong_share": figures["chosen"]["wrong_share"],
        "wrong_is_prior_share": figures["chosen"]["wrong_is_prior_share"],
        "rejected_minus_chosen_points": 100 * (figures["rejected"]["wrong_share"] - figures["chosen"]["wrong_share"]),
        "similarity_auc": auc(_by_truth(chosen_claims, similarity)),
        "perplexity_auc": auc(_by_truth(chosen_claims, likelihood)),
        "dropped_share": sum(c == r for c, r in zip(chosen, rejected, strict=True)) / len(batch),
        **probe(tower_features(model, images), batch),
        "minimal_pair_accuracy": minimal_pair_accuracy(model, processor, images, batch),
        **yes_no_figures(model, processor, images, batch),
        **{f"{side}_{name}": value for side, values in figures.items() for name, value in values.items()},
    }


def failures(figures: dict[str, float]) -> list[str]:
    """One line per gate that these figures miss; empty where the world is fair."""
    return [
        f"{name} {figures[name]:.4f} is not within {low} .. {high}"
        for name, (low, high) in LIMITS.items()
        if not low <= figures[name] <= high
    ]
