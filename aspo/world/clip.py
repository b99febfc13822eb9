"""The world's small CLIP: its open_clip configuration, its tokenizer, and the same weights in transformers' form."""

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import CLIP
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
)

from aspo.world.scenes import CELL, IMAGE_SIZE

PAD, BOS, IMAGE, EOS = "<pad>", "<s>", "<image>", "</s>"
SPECIAL_TOKENS = (PAD, BOS, IMAGE, EOS)
"""Ids 0 to 3. (</s> is not 2: transformers reads a CLIP eos_token_id of 2 as "pool at the highest id".)"""

MEAN, STD = (0.85, 0.85, 0.85), (0.2, 0.2, 0.2)
"""Normalisation of both image processors."""


def clip_config(vocab_size: int) -> dict[str, Any]:
    """open_clip's model_cfg: one patch per grid cell, few and narrow layers, so that it runs fast on a CPU."""
    return {
        "embed_dim": 64,
        "vision_cfg": {"image_size": IMAGE_SIZE, "patch_size": CELL, "width": 128, "layers": 4, "head_width": 32},
        "text_cfg": {
            "context_length": 40,
            "vocab_size": vocab_size,
            "width": 96,
            "heads": 3,
            "layers": 2,
            "pool_type": "eos",
            "eos_id": SPECIAL_TOKENS.index(EOS),
            "pad_id": SPECIAL_TOKENS.index(PAD),
            "hf_tokenizer_name": "local",
        },
    }


def save_open_clip(model: CLIP, config: dict[str, Any], tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write an open_clip `local-dir:` folder. Weights are stored as fp16; open_clip loads them into an fp32 model."""
    folder.mkdir(parents=True, exist_ok=True)
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}
    text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=2)
    (folder / "open_clip_config.json").write_text(text + "\n")
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    tokenizer.save_pretrained(folder)


def load_open_clip(folder: Path) -> tuple[CLIP, Any, Any]:
    """(model in fp32 and evaluation mode, image preprocessing, tokenizer) of a `local-dir:` folder."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    return model.eval(), preprocess, open_clip.get_tokenizer(f"local-dir:{folder}")


def image_processor() -> CLIPImageProcessor:
    """The image processor of the transformers form and of the vision-language model."""
    return CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=list(MEAN),
        image_std=list(STD),
    )


def clip_processor(folder: Path) -> CLIPProcessor:
    """The processor of the transformers form, with the tokenizer of an open_clip folder."""
    return CLIPProcessor(image_processor(), PreTrainedTokenizerFast.from_pretrained(folder))


def to_transformers(model: CLIP) -> CLIPModel:
    """The same CLIP as a transformers CLIPModel (fp32): same parameters under other names, same cosines.

    Covers ViT towers with class-token pooling and exact GELU, which is what `clip_config` describes.
    """
    state = model.state_dict()
    vision_width, text_width = state["visual.class_embedding"].shape[0], state["token_embedding.weight"].shape[1]
    config = CLIPConfig(
        projection_dim=state["text_projection"].shape[1],
        vision_config={
            **_tower(vision_width, model.visual.transformer),
            "image_size": model.visual.image_size[0],
            "patch_size": model.visual.patch_size[0],
        },
        text_config={
            **_tower(text_width, model.transformer),
            "vocab_size": state["token_embedding.weight"].shape[0],
            "max_position_embeddings": state["positional_embedding"].shape[0],
            "pad_token_id": SPECIAL_TOKENS.index(PAD),
            "bos_token_id": SPECIAL_TOKENS.index(BOS),
            "eos_token_id": SPECIAL_TOKENS.index(EOS),
        },
    )
    converted = CLIPModel(config)
    converted.load_state_dict(_rename(state))
    return converted.eval()


def _tower(width: int, transformer: Any) -> dict[str, Any]:
    blocks = transformer.resblocks
    return {
        "hidden_size": width,
        "intermediate_size": blocks[0].mlp.c_fc.out_features,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": blocks[0].attn.num_heads,
        "hidden_act": "gelu",
    }


_NAMES = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
}
_PREFIXES = {
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "transformer.resblocks.": "text_model.encoder.layers.",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    "ln_final.": "text_model.final_layer_norm.",
}
_PARTS = {
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
    ".attn.out_proj.": ".self_attn.out_proj.",
}


def _rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's state dict under transformers' names. A name it does not know fails in load_state_dict."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in ("visual.proj", "text_projection"):  # (width, embed) here, a Linear's (embed, width) there
            linear = "visual_projection" if name == "visual.proj" else "text_projection"
            renamed[f"{linear}.weight"] = value.T.contiguous()
            continue
        target = _NAMES.get(name, name)
        for old, new in _PREFIXES.items():
            if name.startswith(old):
                target = new + name.removeprefix(old)
        for old, new in _PARTS.items():
            target = target.replace(old, new)
        if ".attn.in_proj_" in target:
            layer, kind = target.split(".attn.in_proj_")
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                renamed[f"{layer}.self_attn.{part}_proj.{kind}"] = rows.contiguous()
        else:
            renamed[target] = value
    return renamed


def cosines(image_features: Tensor, text_features: Tensor) -> Tensor:
    """(images, texts) cosines of raw features."""
    return (
        torch.nn.functional.normalize(image_features, dim=-1) @ torch.nn.functional.normalize(text_features, dim=-1).T
    )
