"""The embedded world: scenes whose truth is known, a small CLIP and a small vision-language model trained on them.

`assets_dir()/vlm` is a plain transformers folder, `assets_dir()/clip` a plain open_clip folder (`local-dir:`), and
`assets_dir()/gates.json` the figures by which this world was chosen. docs/world.md tells how they were made.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPProcessor, LlavaForConditionalGeneration, LlavaProcessor


def assets_dir() -> Path:
    """The folder that holds the shipped models. Raises FileNotFoundError where they are not installed."""
    folder = Path(__file__).parent / "assets"
    if not (folder / "gates.json").is_file():
        raise FileNotFoundError(
            f"the world's models are not in {folder}; rebuild them with: python -m aspo.world.build"
        )
    return folder


def load_vlm() -> "tuple[LlavaForConditionalGeneration, LlavaProcessor]":
    """The small vision-language model in fp32 and evaluation mode, and its processor."""
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    folder = assets_dir() / "vlm"
    return LlavaForConditionalGeneration.from_pretrained(folder).eval(), LlavaProcessor.from_pretrained(folder)


def load_clip() -> tuple[Any, Any, Any]:
    """(open_clip model in fp32 and evaluation mode, image preprocessing, tokenizer)."""
    from aspo.world.clip import load_open_clip

    return load_open_clip(assets_dir() / "clip")


def load_clip_hf() -> "tuple[CLIPModel, CLIPProcessor]":
    """The same CLIP in transformers' form, converted from `load_clip`'s weights: both give the same cosines."""
    from aspo.world.clip import clip_processor, to_transformers

    model, _, _ = load_clip()
    return to_transformers(model), clip_processor(assets_dir() / "clip")
