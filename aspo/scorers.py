"""Image-text scorers: CLIP models of open_clip and of transformers behind one small interface.

    similarity(sentence, image) = text_features([sentence]) @ image_features([image]).T        fp32 cosine

A sentence longer than the text tower takes is cut into equal windows that do not overlap; its similarity is the mean of
the windows' cosines weighted by their tokens. Nothing is cut off.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple, Protocol

import open_clip
import torch
from open_clip.factory import parse_model_name
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoProcessor, CLIPModel

from aspo import trust
from aspo.lazy import Lazy
from aspo.model import resolve_device

TEXT_BATCH = 256  # windows in one pass of the text tower


class Scorer(Protocol):
    """What `aspo.scores` needs. Features are fp32 on the CPU; their product is a cosine."""

    @property
    def identity(self) -> str:
        """Names the weights and the preprocessing: scores of equal identity can be mixed."""

    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """(n, d), unit norm."""

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """(n, d), unit norm; of a text longer than the tower takes, the weighted mean of its windows' unit vectors."""


class LazyScorer:
    """The scorer that `load(name, device)` gives, loaded when it is first used, and anew in a process it is sent to."""

    def __init__(self, load: Callable[[str, Any], Scorer], name: str, device: Any = None) -> None:
        self._scorer = Lazy(load, name, device)

    def check(self) -> None:
        """Load it now: what cannot be loaded is said before anything is written."""
        self._scorer()

    @property
    def identity(self) -> str:
        """See `Scorer`."""
        return self._scorer().identity

    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """See `Scorer`."""
        return self._scorer().image_features(images)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """See `Scorer`."""
        return self._scorer().text_features(texts)


class TokenisedText(NamedTuple):
    """A text's own tokens between the special tokens that the tower wants around them."""

    prefix: list[int]
    content: list[int]
    suffix: list[int]


@dataclass(frozen=True)
class ClipScorer:
    """A Scorer made of a CLIP model's parts. context: the tokens that the text tower takes, special tokens included."""

    identity: str
    encode_images: Callable[[Sequence[Image.Image]], Tensor]
    encode_tokens: Callable[[Tensor, Tensor], Tensor]  # ids and mask (n, context) -> (n, d)
    tokenise: Callable[[str], TokenisedText]
    context: int
    pad_id: int

    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """(n, d) fp32, unit norm."""
        with torch.no_grad():
            return torch.nn.functional.normalize(self.encode_images(images).float(), dim=-1).cpu()

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """(n, d) fp32, unit norm; for a text of several windows their mean weighted by tokens."""
        windows: list[list[int]] = []
        owner: list[int] = []
        weight: list[float] = []
        for n, text in enumerate(texts):
            prefix, content, suffix = self.tokenise(text)
            pieces = equal_windows(content, self.context - len(prefix) - len(suffix))
            windows += [prefix + piece + suffix for piece in pieces]
            owner += [n] * len(pieces)
            weight += [len(piece) / len(content) if content else 1.0 for piece in pieces]
        features = torch.cat([self._encode(windows[i : i + TEXT_BATCH]) for i in range(0, len(windows), TEXT_BATCH)])
        pooled = features.new_zeros(len(texts), features.shape[1])
        return pooled.index_add_(0, torch.tensor(owner), features * torch.tensor(weight).unsqueeze(1))

    def _encode(self, windows: list[list[int]]) -> Tensor:
        ids = torch.full((len(windows), self.context), self.pad_id)
        mask = torch.zeros_like(ids)
        for row, window in enumerate(windows):
            ids[row, : len(window)] = torch.tensor(window)
            mask[row, : len(window)] = 1
        with torch.no_grad():
            return torch.nn.functional.normalize(self.encode_tokens(ids, mask).float(), dim=-1).cpu()


def equal_windows(tokens: list[int], size: int) -> list[list[int]]:
    """Cut into the fewest windows of at most `size` tokens, whose lengths differ by one at most."""
    count = max(1, math.ceil(len(tokens) / size))
    bounds = [len(tokens) * k // count for k in range(count + 1)]
    return [tokens[a:b] for a, b in pairwise(bounds)]


def load_scorer(name: str, device: str | torch.device | None = None) -> Scorer:
    """The scorer of a name.

    Args:
        name: "open_clip:ARCHITECTURE/PRETRAINED" (a tag or a weights file), "open_clip:FOLDER" (with
            open_clip_config.json), "transformers:FOLDER_OR_HUB_NAME" (a CLIPModel), or "world" (the embedded CLIP).
        device: None = the accelerator if there is one, else the CPU.

    Raises:
        ValueError: a name that is none of these, weights that are not given, a model that is no CLIP.
    """
    device = resolve_device(device)
    if name == "world":
        from aspo.world import load_clip

        return _open_clip_scorer(*load_clip(), device)
    library, _, identifier = name.partition(":")
    if library == "open_clip" and identifier:
        return _load_open_clip(identifier, device)
    if library == "transformers" and identifier:
        return _load_transformers(identifier, device)
    raise ValueError(
        f"scorer {name!r} is unknown; it is 'world', 'open_clip:ARCHITECTURE/PRETRAINED', 'open_clip:FOLDER' or "
        "'transformers:FOLDER_OR_HUB_NAME'"
    )


def _load_open_clip(identifier: str, device: torch.device) -> Scorer:
    if Path(identifier).is_dir():
        trust.refuse_pickles(identifier, "*.safetensors")
        identifier = f"local-dir:{identifier}"
    schema, _ = parse_model_name(identifier)
    architecture, pretrained = (identifier, "") if schema else identifier.partition("/")[::2]
    if schema is None and not pretrained:
        raise ValueError(
            f"open_clip:{identifier} names no folder and no weights; write open_clip:{architecture}/PRETRAINED, "
            f"e.g. one of {open_clip.list_pretrained_tags_by_model(architecture)[:4]} or a weights file"
        )
    if schema is None:
        _check_open_clip(architecture, pretrained)
    try:
        with trust.unasked():
            model, _, preprocess = open_clip.create_model_and_transforms(
                architecture, pretrained=pretrained or None, weights_only=True
            )
            tokenizer = open_clip.get_tokenizer(architecture)
    except (RuntimeError, UnpicklingError) as error:  # an unknown architecture or tag; a file of more than tensors
        raise ValueError(f"open_clip:{identifier}: {error}") from error
    return _open_clip_scorer(model, preprocess, tokenizer, device)


def _check_open_clip(architecture: str, pretrained: str) -> None:
    """ValueError with the nearest names for an architecture or weights that open_clip does not have."""
    for what, name, known in (
        ("architecture", architecture, open_clip.list_models()),
        ("weights", pretrained, open_clip.list_pretrained_tags_by_model(architecture)),
    ):
        if name not in known and not (what == "weights" and Path(name).is_file()):
            near = get_close_matches(name, known, n=4, cutoff=0.3) or known[:4]
            raise ValueError(
                f"open_clip:{architecture}/{pretrained}: open_clip has no {what} {name!r}"
                + (f" for {architecture}, and it is no file" if what == "weights" else "")
                + (f"; near it: {', '.join(near)}" if near else "")
            )


def _open_clip_scorer(model: Any, preprocess: Any, tokenizer: Any, device: torch.device) -> Scorer:
    model = model.float().to(device).eval()
    if isinstance(tokenizer, SimpleTokenizer) and tokenizer.reduction_fn is None:
        pad_id = 0

        def tokenise(text: str) -> TokenisedText:
            return TokenisedText([tokenizer.sot_token_id], tokenizer.encode(text), [tokenizer.eot_token_id])

    elif isinstance(tokenizer, HFTokenizer) and not tokenizer.strip_sep_token and not tokenizer.tokenizer_mode:
        pad_id = tokenizer.tokenizer.pad_token_id

        def tokenise(text: str) -> TokenisedText:
            return _split_special(tokenizer.tokenizer, tokenizer.clean_fn(text))

    else:
        raise ValueError(f"open_clip's {type(tokenizer).__name__} is not supported: use a model of another tokenizer")
    scorer = ClipScorer(
        identity=_identity(model, repr(preprocess), tokenizer.context_length),
        encode_images=lambda images: model.encode_image(torch.stack([preprocess(i) for i in images]).to(device)),
        encode_tokens=lambda ids, mask: model.encode_text(ids.to(device)),
        tokenise=tokenise,
        context=tokenizer.context_length,
        pad_id=pad_id,
    )
    probe = "A cat"
    prefix, content, suffix = tokenise(probe)
    row = prefix + content + suffix
    if tokenizer([probe])[0].tolist() != row + [pad_id] * (scorer.context - len(row)):
        raise ValueError(f"open_clip's {type(tokenizer).__name__} lays its tokens out in a way that is not supported")
    return scorer


def _load_transformers(identifier: str, device: torch.device) -> Scorer:
    config = trust.pretrained(AutoConfig, identifier)
    if config.model_type != "clip":
        raise ValueError(f"transformers:{identifier} is a {config.model_type!r} model, not CLIP; others: via open_clip")
    processor = trust.pretrained(AutoProcessor, identifier)
    model: Any = trust.model(CLIPModel, identifier, dtype=torch.float32, attn_implementation=None)
    return transformers_scorer(model.to(device).eval(), processor)


def transformers_scorer(model: Any, processor: Any) -> Scorer:
    """The scorer of a loaded `CLIPModel` and its processor, on the model's device."""
    tokenizer, image_processor, device = processor.tokenizer, processor.image_processor, model.device

    def encode_images(images: Sequence[Image.Image]) -> Tensor:
        pixels = image_processor(images=list(images), return_tensors="pt")["pixel_values"]
        return model.get_image_features(pixels.to(device)).pooler_output

    def encode_tokens(ids: Tensor, mask: Tensor) -> Tensor:
        return model.get_text_features(ids.to(device), attention_mask=mask.to(device)).pooler_output

    return ClipScorer(
        identity=_identity(model, json.dumps(image_processor.to_dict(), sort_keys=True, default=str)),
        encode_images=encode_images,
        encode_tokens=encode_tokens,
        tokenise=lambda text: _split_special(tokenizer, text),
        context=model.config.text_config.max_position_embeddings,
        pad_id=tokenizer.pad_token_id,
    )


def _split_special(tokenizer: Any, text: str) -> TokenisedText:
    encoded = tokenizer(text, return_special_tokens_mask=True, truncation=False, verbose=False)
    ids, special = encoded["input_ids"], encoded["special_tokens_mask"]
    start = next((n for n, s in enumerate(special) if not s), len(ids) - 1)
    end = len(ids) - next((n for n, s in enumerate(reversed(special)) if not s), 1)
    return TokenisedText(ids[:start], ids[start:end], ids[end:])


def _identity(model: torch.nn.Module, *settings: Any) -> str:
    """Class name and a hash of the weights and settings."""
    digest = hashlib.sha256(repr(settings).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return f"{type(model).__name__}-{digest.hexdigest()[:16]}"
