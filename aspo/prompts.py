"""Prompts and responses as text and token ids: the one place that knows chat templates and end-of-turn tokens."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jinja2
from PIL import Image
from torch import Tensor

from aspo.folder import load_images, row_name
from aspo.validate import IMAGE_PLACEHOLDER

Row = Mapping[str, Any]
PREPENDS_IMAGES = {"InstructBlipProcessor"}  # processors that put the image tokens in front of the text themselves
PROBE = "ASPOresponseASPO"  # stands for a response, to see what a chat template writes around one
# Fewest and most images of a prompt, where a processor does not say so itself: PaliGemma's writes BOS into the middle
# of a prompt without images, InstructBLIP's puts one image in front of each.
NUMBER_OF_IMAGES = {"InstructBlipProcessor": (1, 1), "PaliGemmaProcessor": (1, None)}


class Prompt(NamedTuple):
    """A prompt as text, before image placeholders are expanded, and what the chat template writes around a response."""

    text: str
    lead: str  # between the prompt and the response, e.g. " "
    end: str  # after the response, e.g. "<|im_end|>\n"
    add_special_tokens: bool  # False where the template already wrote BOS


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor; a tokenizer is its own (text-only models)."""
    return getattr(processor, "tokenizer", processor)


def encode_prompt(processor: Any, prompt: str | Sequence[Mapping[str, Any]], images: Sequence[Any] = ()) -> Prompt:
    """The text that asks the model: the one place that makes it, for training, generation and evaluation.

    A message list goes through the processor's chat template (`add_generation_prompt=True`). A plain string becomes
    one user message where there is a template, and stays as it is (image tokens in front) where there is none.
    "<image>" in a text marks an image's place; without any mark or image part the images come first.

    Raises:
        ValueError: marks and images differ in number; images for a text-only tokenizer; an empty prompt; a prompt that
            ends with an assistant message; a template that leaves out responses, or refuses the messages.
    """
    tokenizer = tokenizer_of(processor)
    if images and not hasattr(processor, "image_processor"):
        raise ValueError(
            f"{len(images)} images, but {type(processor).__name__} has no image processor: drop the images"
        )
    fewest, most = NUMBER_OF_IMAGES.get(type(processor).__name__, (0, None))
    if len(images) < fewest or (most is not None and len(images) > most):
        wanted = "exactly one image" if most == 1 else "at least one image"
        raise ValueError(f"{len(images)} images, but {type(processor).__name__} needs {wanted}: drop the row")
    messages = _messages(prompt, len(images))
    template = template_of(processor)
    if template is None:
        if not isinstance(prompt, str):
            raise ValueError(
                f"the prompt is a message list but {type(processor).__name__} has no chat template: "
                "set processor.chat_template, or write the prompt as a string"
            )
        prepends = type(processor).__name__ in PREPENDS_IMAGES
        mark = "" if prepends else getattr(processor, "image_token", "")
        text = "".join(mark if part["type"] == "image" else part["text"] for part in messages[0]["content"])
        lead = end = ""
    else:
        if processor is tokenizer:
            messages = [{**m, "content": "".join(part["text"] for part in m["content"])} for m in messages]
        answer = {"role": "assistant", "content": PROBE if processor is tokenizer else [_text_part(PROBE)]}
        text = rendered(processor, messages, add_generation_prompt=True)
        before, probe, end = rendered(processor, [*messages, answer]).partition(PROBE)
        if not probe:
            raise ValueError("the chat template leaves out the assistant's message; training needs a template with it")
        lead = before.removeprefix(text) if before.startswith(text) else ""
    # As transformers does: a tokenizer's template writes every special token itself, a processor's may leave BOS out.
    bos = tokenizer.bos_token
    writes_bos = bool(bos and text.startswith(bos)) or (processor is tokenizer and template is not None)
    return Prompt(text, lead, end, add_special_tokens=not writes_bos)


def template_of(processor: Any) -> Any:
    """The chat template: the processor's or its tokenizer's, a text or texts by name; None where there is none."""
    return getattr(processor, "chat_template", None) or getattr(tokenizer_of(processor), "chat_template", None)


def rendered(processor: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """What the chat template makes of the messages. Raises ValueError with its own words where it refuses them."""
    template = template_of(processor)
    given = template if isinstance(template, str) else None
    try:
        text: str = processor.apply_chat_template(messages, tokenize=False, chat_template=given, **options)
    except jinja2.TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"the chat template refuses messages of {roles}: {error}; change the prompt") from error
    return text


def encode_response(
    processor: Any, prompt: Prompt, response: str, finished: bool = True
) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a response with its end-of-turn token, and their character offsets in `response`.

    The tokens are those that the tokenizer makes of the response behind its prompt. Where the whole text does not begin
    with the prompt's own tokens (a token would straddle the boundary), the response is tokenised alone. The last id is
    the end-of-turn token: the first special token that the chat template writes after a response, otherwise EOS; its
    offsets are empty and lie at the end. A response that is not `finished` goes on: it gets no such token.
    """
    tokenizer = tokenizer_of(processor)
    before = tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
    for context, skip in ((prompt.text, len(before)), ("", 0)):
        encoded = tokenizer(context + prompt.lead + response, add_special_tokens=False, return_offsets_mapping=True)
        ids = encoded["input_ids"]
        if ids[:skip] == before[:skip]:
            break
    shift = len(context) + len(prompt.lead)
    offsets = [(max(a - shift, 0), max(b - shift, 0)) for a, b in encoded["offset_mapping"][skip:]]
    ids = ids[skip:]
    image_token_id = getattr(processor, "image_token_id", None)
    if image_token_id is not None and image_token_id in ids:
        raise ValueError(f"the response holds the image token {processor.image_token!r}: remove it from the text")
    tail = end_of_turn(processor, prompt)
    if finished and (not ids or ids[-1] != tail[-1]):
        ids = ids + tail
        offsets += [(len(response), len(response))] * len(tail)
    return ids, offsets


def end_of_turn(processor: Any, prompt: Prompt) -> list[int]:
    """The ids that close a response; the last one is the end-of-turn token."""
    tokenizer = tokenizer_of(processor)
    ids = tokenizer(prompt.end, add_special_tokens=False)["input_ids"] if prompt.end.strip() else []
    for n, token_id in enumerate(ids):
        if token_id in _special_ids(tokenizer, len(tokenizer)):
            return ids[: n + 1]
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{type(tokenizer).__name__} has no EOS token: set tokenizer.eos_token")
    return [tokenizer.eos_token_id]


@lru_cache(maxsize=8)
def _special_ids(tokenizer: Any, size: int) -> frozenset[int]:
    """All ids that stand for no text. `size` is the vocabulary's: tokens added later make a new entry."""
    added = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(tokenizer.all_special_ids) | added


def generation_inputs(processor: Any, rows: Sequence[Row]) -> dict[str, Tensor]:
    """Model inputs for `model.generate`: the rows' prompts and images, padded on the left."""
    images = [named(row, load_images, row) for row in rows]
    prompts = [
        named(row, encode_prompt, processor, row["prompt"], pictures)
        for row, pictures in zip(rows, images, strict=True)
    ]
    return run_processor(processor, prompts, images, padding_side="left")


def _text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _parts(content: Any) -> list[dict[str, str]]:
    """Message content as a list of {"type": "image"} and {"type": "text", "text": ...}; "<image>" marks are images."""
    if isinstance(content, str):
        texts = content.split(IMAGE_PLACEHOLDER)
        marked = [part for text in texts for part in ({"type": "image"}, _text_part(text))][1:]
        if len(texts) > 1:  # LLaVA's data puts a line break beside the mark; the template writes its own
            marked = [p if p["type"] == "image" else _text_part(p["text"].strip("\n")) for p in marked]
        return [part for part in marked if part["type"] == "image" or part["text"]]
    parts = []
    for part in content:
        kind = part.get("type")
        if kind == "image":
            parts.append({"type": "image"})
        elif kind == "text":
            parts += _parts(part.get("text") or "")
        else:
            raise ValueError(f"a message part of type {kind!r}: only 'text' and 'image' are supported")
    return parts


def _messages(prompt: str | Sequence[Mapping[str, Any]], num_images: int) -> list[dict[str, Any]]:
    """The prompt as messages whose content is a list of parts, with exactly `num_images` image parts."""
    source = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    messages: list[dict[str, Any]] = [{"role": m["role"], "content": _parts(m["content"])} for m in source]
    if not any(part.get("text", "").strip() for m in messages for part in m["content"]) and not num_images:
        raise ValueError("the prompt is empty")
    if messages[-1]["role"] == "assistant":
        raise ValueError("the prompt ends with an assistant message; move its text into the responses")
    marks = sum(part["type"] == "image" for m in messages for part in m["content"])
    if not marks and num_images:
        first = next((m for m in messages if m["role"] == "user"), None)
        if first is None:
            raise ValueError("the prompt has no user message to put its images into")
        first["content"] = [{"type": "image"}] * num_images + first["content"]
    elif marks != num_images:
        raise ValueError(f"the prompt marks {marks} images but the row has {num_images}: make them equal")
    for message in messages:
        message["content"] = message["content"] or [_text_part("")]  # Gemma-3's template reads the first part's text
    return messages


def run_processor(
    processor: Any, prompts: Sequence[Prompt], images: Sequence[Sequence[Image.Image]], padding_side: str
) -> dict[str, Tensor]:
    """The processor on a batch: input_ids and attention_mask padded on `padding_side`, and what it makes of images.

    A tokenizer without a pad token gets EOS as one.
    """
    tokenizer = tokenizer_of(processor)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    flags = {prompt.add_special_tokens for prompt in prompts}
    if len(flags) > 1:
        raise ValueError("some prompts of this batch begin with the BOS text and some do not: write them all alike")
    kwargs: dict[str, Any] = {"add_special_tokens": flags.pop(), "padding": True, "padding_side": padding_side}
    if any(images):
        # Nested, also where a row has none: LLaVA-OneVision, Gemma-3 and SmolVLM misread a flat list.
        kwargs["images"] = [list(row) for row in images]
    inputs = processor(text=[prompt.text for prompt in prompts], return_tensors="pt", **kwargs)
    wrong = [name for name, value in inputs.items() if not isinstance(value, Tensor)]
    if wrong:
        raise ValueError(f"{type(processor).__name__} gives no tensor for {wrong}: this processor is not supported")
    made = dict(inputs)
    if "qformer_attention_mask" in made:  # the Q-Former has absolute positions: its padding stays on the right
        order = made["qformer_attention_mask"].argsort(dim=1, descending=True, stable=True)
        for name in ("qformer_input_ids", "qformer_attention_mask"):
            made[name] = made[name].gather(1, order)
    return made


def named(row: Row, function: Any, *args: Any) -> Any:
    """Call, with the row's name in front of a ValueError's message."""
    try:
        return function(*args)
    except ValueError as error:
        raise ValueError(f"{row_name(row)}: {error}") from error
