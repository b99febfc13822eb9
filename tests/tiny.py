"""Small real models and data for the tests, built from configuration classes: nothing is downloaded.

`tiny_llava(folder)` saves a `LlavaForConditionalGeneration` of about 60,000 parameters with its processor (CLIP image
processor, byte-level BPE tokenizer, chat template), loadable with plain `from_pretrained`. Images are 30 x 30 pixels,
patches 10 x 10: nine image tokens an image. Import it with `from tiny import tiny_llava`: pytest puts this folder on
the path.
"""

import json
import random
from pathlib import Path
from typing import Any

import aspo  # isort: skip  # noqa: F401  (first: it makes torchvision importable on a CPU torch)
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

IMAGE_SIZE, PATCH_SIZE, IMAGE_TOKENS = 30, 10, 9
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 80, 220), "yellow": (230, 210, 50)}
SHAPES = ("circle", "square", "star", "cube")
SENTENCES = (
    "The {shape} is {colour}.",
    "It is a small {shape}.",
    "The background is black.",
    "There is one {shape} only.",
)
PROMPT = "Describe the image."

# Content may be a string or a list of parts, an image part becomes the placeholder, an answer ends with EOS.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}ASSISTANT: {% else %}{{ message['role'] | upper }}: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ eos_token if message['role'] == 'assistant' else '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)


SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<image>")


def tiny_tokenizer(
    vocab_size: int = 384, special_tokens: tuple[str, ...] = SPECIAL_TOKENS, layout: str = "<bos> $A"
) -> PreTrainedTokenizerFast:
    """Byte-level BPE (every text can be encoded); special tokens get the first ids, `layout` says where they stand."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [s.format(shape=shape, colour=colour) for s in SENTENCES for shape in SHAPES for colour in COLOURS]
    backend.train_from_iterator([*corpus, "USER: " + PROMPT + "\nASSISTANT: "], trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=layout, special_tokens=[(token, special_tokens.index(token)) for token in ("<bos>", "<eos>")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        extra_special_tokens=["<image>"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_processor() -> LlavaProcessor:
    """The processor alone (image processor + tokenizer), for tests that need no model."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False),
        tokenizer=tiny_tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def tiny_llava(folder: str | Path, seed: int = 0, tie_word_embeddings: bool = False) -> Path:
    """Save a tiny LLaVA (hidden size 32, 2 layers, random fp32 weights from `seed`) and its processor in `folder`."""
    processor = tiny_processor()
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            projection_dim=16,
        ),
        text_config=LlamaConfig(
            vocab_size=len(processor.tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=tie_word_embeddings,
        ),
        image_token_index=3,
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=tie_word_embeddings,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    model.generation_config.update(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    folder = Path(folder)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


CLIP_CONTEXT = 16  # tokens, BOS and EOS included


def tiny_clip_tokenizer() -> PreTrainedTokenizerFast:
    """BOS and EOS around the text. EOS is not id 2: transformers' CLIP reads a 2 as "pool at the highest id"."""
    return tiny_tokenizer(special_tokens=("<pad>", "<bos>", "<image>", "<eos>"), layout="<bos> $A <eos>")


def tiny_clip(folder: str | Path, seed: int = 0) -> Path:
    """Save a tiny transformers `CLIPModel` (16 text tokens, 30 x 30 images) and its processor in `folder`."""
    tokenizer = tiny_clip_tokenizer()
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": CLIP_CONTEXT, "eos_token_id": 3, "bos_token_id": 1}
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**text, **small, "pad_token_id": 0},
        vision_config={"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, **small},
        projection_dim=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        CLIPModel(config).save_pretrained(folder)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False)
    CLIPProcessor(image_processor, tokenizer).save_pretrained(folder)
    return Path(folder)


def tiny_open_clip(folder: str | Path, seed: int = 0, own_tokenizer: bool = True) -> Path:
    """Save a tiny open_clip model as a `local-dir:` folder, with our tokenizer or with open_clip's own (49,408 ids)."""
    tokenizer = tiny_clip_tokenizer()
    text = {"context_length": CLIP_CONTEXT, "width": 16, "heads": 2, "layers": 2}
    if own_tokenizer:
        text |= {"vocab_size": len(tokenizer), "pool_type": "eos", "eos_id": 3, "hf_tokenizer_name": "local"}
    vision = {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "width": 16, "layers": 2, "head_width": 8}
    model_cfg = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"model_cfg": model_cfg, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = open_clip.model.CLIP(**model_cfg)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    if own_tokenizer:
        tokenizer.save_pretrained(folder)
    return folder


def tiny_image(colour: str = "red", box: tuple[int, int, int, int] = (8, 8, 22, 22)) -> Image.Image:
    """A black 30 x 30 RGB image with one filled rectangle."""
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE))
    image.paste(COLOURS[colour], box)
    return image


def tiny_rows(n: int = 4, seed: int = 0) -> list[dict[str, Any]]:
    """`n` preference rows with one image each; chosen answers have 2 to 4 sentences and a similarity for each.

    Answers and sentence counts differ from row to row; `chosen` and `rejected` never are the same text.
    """
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        shape, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
        wrong = rng.choice([c for c in COLOURS if c != colour])
        sentences = [s.format(shape=shape, colour=colour) for s in SENTENCES[: rng.randint(2, 4)]]
        starts = [len(" ".join(sentences[:k])) + (k > 0) for k in range(len(sentences))]
        chosen = " ".join(sentences)
        rows.append(
            {
                "id": f"row-{i}",
                "prompt": PROMPT,
                "images": [tiny_image(colour, (5, 5, 12 + i % 12, 25))],
                "chosen": chosen,
                "rejected": SENTENCES[0].format(shape=shape, colour=wrong) + " " + SENTENCES[2],
                "chosen_sentences": [[a, b] for a, b in zip(starts, [*starts[1:], len(chosen)], strict=True)],
                "chosen_similarity": [round(rng.uniform(0.1, 0.4), 4) for _ in sentences],
            }
        )
    return rows
