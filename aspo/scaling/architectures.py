"""Models that can be planned by name without a hub: their configurations, written with transformers' own classes.

Figures from the models' published config.json; what is not named here is the class's default. Weights there are none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, Qwen2_5_VLConfig


def _llava(**text: Any) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14, projection_dim=768,
    )  # fmt: skip
    return LlavaConfig(vision_config=vision, text_config=LlamaConfig(vocab_size=32_064, **text))


def _llava_7b() -> LlavaConfig:
    return _llava()  # LlamaConfig's defaults are Llama-2-7B's sizes, which Vicuna-7B has


def _llava_13b() -> LlavaConfig:
    return _llava(hidden_size=5120, intermediate_size=13_824, num_hidden_layers=40, num_attention_heads=40,
                  num_key_value_heads=40)  # fmt: skip


def _qwen_72b() -> Qwen2_5_VLConfig:
    text = {
        "vocab_size": 152_064, "hidden_size": 8192, "intermediate_size": 29_568, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "tie_word_embeddings": False,
    }  # fmt: skip
    vision = {"hidden_size": 1280, "intermediate_size": 3456, "depth": 32, "num_heads": 16, "out_hidden_size": 8192}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)


# Name -> how its configuration is made, and the square image (pixels) that is IMAGE_TOKENS tokens.
ARCHITECTURES: dict[str, tuple[Callable[[], Any], int]] = {
    "llava-1.5-7b": (_llava_7b, 336),
    "llava-1.5-13b": (_llava_13b, 336),
    "qwen2.5-vl-72b": (_qwen_72b, 672),
}
IMAGE_TOKENS = 576
