"""Small models of the real vision-language families with their real processors: `family(name) -> (model, processor)`.

Random fp32 weights, hidden size 32, 2 layers; weights are spread so widely that log-probabilities are far from uniform
and a wrong mask, position or image shows. Chat templates are short ones in the family's style.
"""

from __future__ import annotations

import aspo  # isort: skip  # noqa: F401  (first: it makes torchvision importable on a CPU torch)
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from tiny import COLOURS, PROMPT, tiny_image, tiny_rows, tiny_tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.models.smolvlm import processing_smolvlm

BASIC = ("<pad>", "<bos>", "<eos>")
PATCH, SIDE = 10, 40  # pixels of a patch and of a tile: 4 x 4 patches a tile
GRID = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SMALL, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 1024}
VISION = {**SMALL, "hidden_size": 16, "intermediate_size": 32, "image_size": SIDE, "patch_size": PATCH}


@dataclass(frozen=True)
class Family:
    """How to build a family's model and processor, and what its rows may be."""

    build: Callable[[], tuple[Any, Any]]
    text_rows: bool = True  # rows without an image
    several_images: bool = True  # rows with more than one


def tokenizer(tokens: tuple[str, ...], layout: str = "$A", **named: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE with these special tokens, ids in this order; `named` become attributes such as boi_token."""
    special = (*BASIC, *tokens)
    backend = tiny_tokenizer(384 + len(special), special, layout).backend_tokenizer
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", extra_special_tokens=named
    )


def chat(user: str, assistant: str, image: str, ends: tuple[str, str], start: str = "") -> str:
    """A chat template: what stands before a user's and an assistant's turn, an image's place, and the turns' ends."""
    return (
        f"{start}{{% for message in messages %}}{{% if message['role'] == 'assistant' %}}{assistant}{{% else %}}{user}"
        "{% endif %}{% for part in message['content'] %}"
        f"{{% if part['type'] == 'image' %}}{image}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}{{% endfor %}}"
        f"{{% if message['role'] == 'assistant' %}}{ends[1]}{{% else %}}{ends[0]}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{assistant}{{% endif %}}"
    )


CHATML = ("<|im_start|>", "<|im_end|>")


def chatml(image: str) -> str:
    """The template of Qwen and of those built on it."""
    turn = ("<|im_start|>user\n", "<|im_start|>assistant\n")
    return chat(*turn, image, ("<|im_end|>\n", "<|im_end|>\n"))


def ids(tok: PreTrainedTokenizerFast, **tokens: str) -> dict[str, int]:
    """Config options that name a token's id."""
    return {name: tok.convert_tokens_to_ids(token) for name, token in tokens.items()}


def text(tok: PreTrainedTokenizerFast, **options: Any) -> dict[str, Any]:
    """Options of the language model."""
    return {**TEXT, "vocab_size": len(tok), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **options}


def square(**options: Any) -> dict[str, Any]:
    """Options of an image processor that makes tiles of one size."""
    return {"size": {"height": SIDE, "width": SIDE}, **options}


def llava() -> tuple[Any, Any]:
    tok = tokenizer(("<image>",), "<bos> $A")
    images = hf.CLIPImageProcessor(**square(crop_size={"height": SIDE, "width": SIDE}, do_center_crop=False))
    template = chat("USER: ", "ASSISTANT: ", "<image>\n", (" ", "<eos>"))
    processor = hf.LlavaProcessor(images, tok, PATCH, "default", template, num_additional_image_tokens=1)
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION), text_config=hf.LlamaConfig(**text(tok)),
        **ids(tok, image_token_index="<image>"),
    )  # fmt: skip
    return hf.LlavaForConditionalGeneration(config), processor


def llava_next() -> tuple[Any, Any]:
    tok = tokenizer(("<image>",), "<bos> $A")
    images = hf.LlavaNextImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=GRID
    )
    template = chat("[INST] ", "", "<image>\n", (" [/INST]", "<eos>"))
    processor = hf.LlavaNextProcessor(images, tok, PATCH, "default", template, num_additional_image_tokens=1)
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**VISION), text_config=hf.MistralConfig(**text(tok)),
        image_grid_pinpoints=GRID, **ids(tok, image_token_index="<image>"),
    )  # fmt: skip
    return hf.LlavaNextForConditionalGeneration(config), processor


def llava_onevision() -> tuple[Any, Any]:
    tok = tokenizer((*CHATML, "<image>", "<video>"))
    images = hf.LlavaOnevisionImageProcessor(**square(image_grid_pinpoints=[[SIDE, SIDE], *GRID]))
    processor = hf.LlavaOnevisionProcessor(
        images, tok, hf.LlavaOnevisionVideoProcessor(), (SIDE // PATCH) ** 2, "full", chatml("<image>\n")
    )
    vision = hf.SiglipVisionConfig(**VISION, vision_use_head=False)
    config = hf.LlavaOnevisionConfig(
        vision_config=vision, text_config=hf.Qwen2Config(**text(tok)), image_grid_pinpoints=[[SIDE, SIDE], *GRID],
        **ids(tok, image_token_index="<image>", video_token_index="<video>"),
    )  # fmt: skip
    return hf.LlavaOnevisionForConditionalGeneration(config), processor


def instructblip() -> tuple[Any, Any]:
    tok = tokenizer(("<image>",), "<bos> $A")
    bert = tokenizer((), "<bos> $A <eos>")
    queries = 4
    processor = hf.InstructBlipProcessor(hf.BlipImageProcessor(**square()), tok, bert, queries)
    vision = hf.InstructBlipVisionConfig(**VISION)
    reader = hf.InstructBlipQFormerConfig(**SMALL, vocab_size=len(bert))
    config = hf.InstructBlipConfig(
        vision_config=vision, qformer_config=reader, text_config=hf.LlamaConfig(**text(tok)),
        num_query_tokens=queries, **ids(tok, image_token_index="<image>"),
    )  # fmt: skip
    return hf.InstructBlipForConditionalGeneration(config), processor


QWEN = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")


def qwen(version: str, video: Any, text_options: dict[str, Any], vision: dict[str, Any]) -> tuple[Any, Any]:
    tok = tokenizer((*CHATML, *QWEN))
    size = {"shortest_edge": 400, "longest_edge": 3600}  # pixels in all
    images = hf.Qwen2VLImageProcessor(patch_size=5, merge_size=2, size=size)
    template = chatml("<|vision_start|><|image_pad|><|vision_end|>")
    processor = getattr(hf, f"{version}Processor")(images, tok, video, chat_template=template)
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config = getattr(hf, f"{version}Config")(
        text_config=text(tok, **text_options), vision_config={"patch_size": 5, "depth": 2, "num_heads": 2, **vision},
        **ids(tok, **dict(zip(names, QWEN, strict=True))),
    )  # fmt: skip
    return getattr(hf, f"{version}ForConditionalGeneration")(config), processor


MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}


def qwen2_vl() -> tuple[Any, Any]:
    vision = {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
    return qwen("Qwen2VL", hf.Qwen2VLVideoProcessor(), {"rope_parameters": MROPE}, vision)


def qwen2_5_vl() -> tuple[Any, Any]:
    vision = {"hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 32, "window_size": 20}
    vision["fullatt_block_indexes"] = [1]
    return qwen("Qwen2_5_VL", hf.Qwen2VLVideoProcessor(), {"rope_parameters": MROPE}, vision)


def qwen3_vl() -> tuple[Any, Any]:
    vision = {"hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 32, "num_position_embeddings": 16}
    vision["deepstack_visual_indexes"] = [0]
    rope = {**MROPE, "mrope_interleaved": True}
    return qwen("Qwen3VL", hf.Qwen3VLVideoProcessor(), {"rope_parameters": rope}, vision)


def internvl() -> tuple[Any, Any]:
    named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tok = tokenizer((*CHATML, *named.values(), "<video>"), **named, video_token="<video>")
    images = hf.GotOcr2ImageProcessor(**square(crop_to_patches=True, max_patches=3))
    processor = hf.InternVLProcessor(images, tok, hf.InternVLVideoProcessor(), 4, chatml("<IMG_CONTEXT>\n"))
    config = hf.InternVLConfig(
        vision_config=hf.InternVLVisionConfig(**VISION), text_config=hf.Qwen2Config(**text(tok)), image_seq_length=4,
        **ids(tok, image_token_id="<IMG_CONTEXT>"),
    )  # fmt: skip
    return hf.InternVLForConditionalGeneration(config), processor


def gemma3() -> tuple[Any, Any]:
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tok = tokenizer((*named.values(), "<start_of_turn>", "<end_of_turn>"), "<bos> $A", **named)
    turns = ("<start_of_turn>user\n", "<start_of_turn>model\n")
    template = chat(*turns, "<start_of_image>", ("<end_of_turn>\n", "<end_of_turn>\n"), start="<bos>")
    processor = hf.Gemma3Processor(hf.Gemma3ImageProcessor(**square()), tok, template, image_seq_length=4)
    options = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}  # 16: shorter than a row
    config = hf.Gemma3Config(
        text_config=hf.Gemma3TextConfig(**text(tok, **options)), mm_tokens_per_image=4,
        vision_config=hf.SiglipVisionConfig(**VISION, vision_use_head=False),
        **ids(tok, boi_token_index="<start_of_image>", eoi_token_index="<end_of_image>",
              image_token_index="<image_soft_token>"),
    )  # fmt: skip
    return hf.Gemma3ForConditionalGeneration(config), processor


def idefics(images: Any, *others: Any, processor: Any, config: Any, vision: Any, model: Any) -> tuple[Any, Any]:
    rows = tuple(f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7))
    tok = tokenizer(("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *rows), "<bos> $A")
    template = chat("User:", "Assistant:", "<image>", ("<end_of_utterance>\n", "<end_of_utterance>\n"), start="<bos>")
    settings = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
    made = processor(images(**settings), tok, *others, image_seq_len=4, chat_template=template)
    tower = vision(**VISION)
    language = hf.LlamaConfig(**text(tok))
    settings = ids(tok, image_token_id="<image>")
    return model(config(vision_config=tower, text_config=language, scale_factor=2, **settings)), made


def idefics3() -> tuple[Any, Any]:
    return idefics(
        hf.Idefics3ImageProcessor, processor=hf.Idefics3Processor, config=hf.Idefics3Config,
        vision=hf.Idefics3VisionConfig, model=hf.Idefics3ForConditionalGeneration,
    )  # fmt: skip


def smolvlm() -> tuple[Any, Any]:
    processing_smolvlm.num2words = processing_smolvlm.num2words or str  # a package that only video prompts use
    return idefics(
        hf.SmolVLMImageProcessor, hf.SmolVLMVideoProcessor(), processor=hf.SmolVLMProcessor, config=hf.SmolVLMConfig,
        vision=hf.SmolVLMVisionConfig, model=hf.SmolVLMForConditionalGeneration,
    )  # fmt: skip


def paligemma(language: Callable[..., Any] = hf.GemmaConfig, **options: Any) -> tuple[Any, Any]:
    tok = tokenizer(("<image>",), image_token="<image>")  # no BOS in front: the processor writes it behind the image
    images = hf.SiglipImageProcessor(**square())
    images.image_seq_length = (SIDE // PATCH) ** 2
    processor = hf.PaliGemmaProcessor(images, tok)
    vision = hf.SiglipVisionConfig(**VISION, vision_use_head=False)
    config = hf.PaliGemmaConfig(
        vision_config=vision, text_config=language(**text(tok, **options)),
        projection_dim=32, hidden_size=32, **ids(tok, image_token_index="<image>"),
    )  # fmt: skip
    return hf.PaliGemmaForConditionalGeneration(config), processor


def paligemma2() -> tuple[Any, Any]:
    # The cap of the logits is left out: transformers' PaliGemma has forgotten it until lately (5.17 still does).
    options = {"query_pre_attn_scalar": 16, "sliding_window": 512, "final_logit_softcapping": None}
    model, processor = paligemma(hf.Gemma2Config, **options)
    model.get_decoder().set_attn_implementation("eager")  # SDPA has no soft-cap; 5.17 would take it nevertheless
    return model, processor


FAMILIES = {
    "LLaVA-1.5": Family(llava),
    "LLaVA-NeXT": Family(llava_next),
    "LLaVA-OneVision": Family(llava_onevision),
    "InstructBLIP": Family(instructblip, text_rows=False, several_images=False),
    "Qwen2-VL": Family(qwen2_vl),
    "Qwen2.5-VL": Family(qwen2_5_vl),
    "Qwen3-VL": Family(qwen3_vl),
    "InternVL": Family(internvl),
    "Gemma-3": Family(gemma3),
    "Idefics3": Family(idefics3),
    "SmolVLM": Family(smolvlm),
    "PaliGemma": Family(paligemma, text_rows=False),
    "PaliGemma-2": Family(paligemma2, text_rows=False),
}


def family(name: str, seed: int = 0) -> tuple[Any, Any]:
    """The model (evaluation mode) and the processor of a family."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, processor = FAMILIES[name].build()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.2)
    model.generation_config.update(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return model.eval(), processor


def unequal_rows(n: int = 3) -> list[dict[str, Any]]:
    """Rows whose prompts differ in length and whose images differ in size and content."""
    rows = tiny_rows(n)
    for i, (row, colour) in enumerate(zip(rows, list(COLOURS) * n, strict=False)):
        row["prompt"] = PROMPT + " And the shape?" * (i % 3)
        row["images"] = [tiny_image(colour).resize([(40, 40), (90, 40), (40, 70)][i % 3])]
    return rows


def rows_of(name: str) -> list[dict[str, Any]]:
    """All kinds of rows that a family can have, for one batch: images of several sizes, no image, two images."""
    rows = unequal_rows(4)
    if FAMILIES[name].text_rows:
        del rows[1]["images"]
    if FAMILIES[name].several_images:
        rows[3]["images"] = [tiny_image("blue"), tiny_image("green").resize((70, 40))]
    return rows
