"""Models with random weights in the shape of known ones, their processors, and preference rows of an exact length.

A text is made of words that are one token each, so that a response has as many tokens as it is asked to. Nothing is
downloaded: the models are the real classes, built from configurations that are written out here.
"""

from __future__ import annotations

import aspo  # isort: skip  # noqa: F401  (first: it makes torchvision importable on a CPU torch)
import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

TURNS = ("<im_start>", "<im_end>")
LLAVA_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>", *TURNS, "<image>")
QWEN_TOKENS = (*LLAVA_TOKENS[:-1], "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
SENTENCE = 16  # tokens, the full stop included
TEMPLATE = (
    "{{{{ bos_token }}}}{{% for message in messages %}}<im_start>{{{{ message['role'] }}}} "
    "{{% for part in message['content'] %}}{{% if part['type'] == 'image' %}}{image} {{% else %}}{{{{ part['text'] }}}}"
    "{{% endif %}}{{% endfor %}}{{% if message['role'] == 'assistant' %}}{{{{ eos_token }}}}{{% else %}}<im_end>"
    "{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}<im_start>assistant {{% endif %}}"
)  # what is written around a response is the same for every one, as TRL wants it


@dataclass(frozen=True)
class Shape:
    """A vision-language model's sizes. side: pixels of the (square) image; text, vision: options of the configs."""

    name: str
    family: str  # "llava" or "qwen2.5-vl"
    text: dict[str, Any]
    vision: dict[str, Any]
    side: int
    words: int  # of the question

    @property
    def patches(self) -> int:
        """Image tokens of one image."""
        merged = self.vision.get("spatial_merge_size", 1)
        return (self.side // self.vision["patch_size"] // merged) ** 2


def toy(side: int = 336, small: bool = False) -> Shape:
    """LLaVA-1.5 made small: CLIP tower and LLaMA of 4 layers with H 256 and 4 heads each; V 32,000. small: smaller."""
    hidden, wide, layers, vocabulary = (32, 80, 2, 600) if small else (256, 688, 4, 32_000)
    same = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": 4}
    return Shape(
        name="LLaVA-shaped toy",
        family="llava",
        text={**same, "intermediate_size": wide, "vocab_size": vocabulary, "max_position_embeddings": 4096},
        vision={**same, "intermediate_size": 4 * hidden, "patch_size": 14, "image_size": side},
        side=side,
        words=14,
    )


LLAVA_7B = Shape(
    name="LLaVA-1.5-7B",
    family="llava",
    text={"hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32, "num_attention_heads": 32,
          "vocab_size": 32_064, "max_position_embeddings": 262_144},
    vision={"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
            "patch_size": 14, "image_size": 336},
    side=336,
    words=40,
)  # fmt: skip
QWEN_7B = Shape(
    name="Qwen2.5-VL-7B",
    family="qwen2.5-vl",
    text={"hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "num_attention_heads": 28,
          "num_key_value_heads": 4, "vocab_size": 152_064, "max_position_embeddings": 262_144,
          "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}},
    vision={"hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584, "depth": 32, "num_heads": 16,
            "patch_size": 14, "spatial_merge_size": 2, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]},
    side=1008,
    words=40,
)  # fmt: skip


def tiny(shape: Shape) -> Shape:
    """A model of the same family that runs anywhere."""
    if shape.family == "llava":
        return toy(side=56, small=True)
    rope = {**shape.text["rope_parameters"], "mrope_section": [2, 3, 3]}
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "vocab_size": 600, "rope_parameters": rope}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 32, "depth": 2, "num_heads": 2}
    vision = {**shape.vision, **vision, "fullatt_block_indexes": [1]}
    return dataclasses.replace(shape, name=f"{shape.name}, tiny", text=text, vision=vision, side=112, words=14)


def tokenizer(shape: Shape) -> Any:
    """A tokenizer with as many ids as the model: special tokens, the full stop, and words w0, w1, ..."""
    special = LLAVA_TOKENS if shape.family == "llava" else QWEN_TOKENS
    named = [*special, ".", "user", "assistant"]
    words = [*named, *(f"w{n}" for n in range(shape.text["vocab_size"] - len(named)))]
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        extra_special_tokens=list(special[4:]),
    )  # fmt: skip


def processor(shape: Shape) -> Any:
    """The family's real processor over `tokenizer`."""
    tokens = tokenizer(shape)
    patch = shape.vision["patch_size"]
    if shape.family == "llava":
        size = {"height": shape.side, "width": shape.side}
        images = hf.CLIPImageProcessor(size=size, crop_size=size)
        template = TEMPLATE.format(image="<image>")
        return hf.LlavaProcessor(images, tokens, patch, "default", template, num_additional_image_tokens=1)
    pixels = {"shortest_edge": shape.side**2, "longest_edge": shape.side**2}
    images = hf.Qwen2VLImageProcessor(patch_size=patch, merge_size=shape.vision["spatial_merge_size"], size=pixels)
    template = TEMPLATE.format(image="<|vision_start|><|image_pad|><|vision_end|>")
    return hf.Qwen2_5_VLProcessor(images, tokens, hf.Qwen2VLVideoProcessor(), chat_template=template)


def model(shape: Shape, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """The family's real model with random weights, made on the device."""
    tokens = tokenizer(shape)
    ends = {"pad_token_id": tokens.pad_token_id, "bos_token_id": tokens.bos_token_id}
    text = {**shape.text, **ends, "eos_token_id": tokens.eos_token_id}
    if shape.family == "llava":
        config: Any = hf.LlavaConfig(
            vision_config=hf.CLIPVisionConfig(**shape.vision), text_config=hf.LlamaConfig(**text),
            image_token_index=tokens.convert_tokens_to_ids("<image>"), image_seq_length=shape.patches,
        )  # fmt: skip
        kind: Any = hf.LlavaForConditionalGeneration
    else:
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        ids = {name: tokens.convert_tokens_to_ids(t) for name, t in zip(names, QWEN_TOKENS[-4:], strict=True)}
        config = hf.Qwen2_5_VLConfig(text_config=text, vision_config=shape.vision, **ids)
        kind = hf.Qwen2_5_VLForConditionalGeneration
    devices = [torch.cuda.current_device()] if device == "cuda" else []
    with torch.random.fork_rng(devices), torch.device(device):
        torch.manual_seed(seed)
        made = kind._from_config(config, dtype=dtype)
    made.generation_config.update(**ends, eos_token_id=tokens.eos_token_id)
    return made


@dataclass
class Rows:
    """Preference rows with one image each; texts, sentences and images differ from row to row.

    response: tokens of each response, the closing EOS included. images: False = text alone.
    """

    shape: Shape
    response: int
    seed: int = 0
    images: bool = True
    words: random.Random = field(init=False)
    pixels: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.words, self.pixels = random.Random(self.seed), np.random.default_rng(self.seed)

    def take(self, n: int) -> list[dict[str, Any]]:
        """The next n rows, with conversational prompts and responses as TRL and `aspo.data` read them."""
        return [self._row(index) for index in range(n)]

    def _row(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = {"id": f"row-{index}", "prompt": _turn("user", self._text(self.shape.words))}
        for column in ("chosen", "rejected"):
            row[column] = _turn("assistant", self._text(self.response - 1))
        size = (self.shape.side * 4 // 3, self.shape.side, 3)
        row["images"] = [Image.fromarray(self.pixels.integers(256, size=size, dtype=np.uint8))] if self.images else []
        return row

    def _text(self, tokens: int) -> str:
        words = self.shape.text["vocab_size"] - len(QWEN_TOKENS) - 3
        return " ".join("." if n % SENTENCE == SENTENCE - 1 or n == tokens - 1 else f"w{self.words.randrange(words)}"
                        for n in range(tokens))  # fmt: skip


def _turn(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def fresh(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Copies of rows that a collator may write into, as TRL's does."""
    return [{**row, **{c: [dict(m) for m in row[c]] for c in ("prompt", "chosen", "rejected")}} for row in rows]
