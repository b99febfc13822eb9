"""Responses that hold images: "<image>" in their text, whose pictures follow the prompt's in the row's images.

The image's tokens are read and never counted. A response with images is read apart from the others: its row of the grid
begins with prompt and response up to the last token that the processor made, so that the model sees every image in its
place, with its positions.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from aspo.prompts import PROBE, Prompt, rendered, template_of, tokenizer_of
from aspo.validate import IMAGE_PLACEHOLDER, image_marks, response_text

Span = tuple[int, int]


class Tokens(NamedTuple):
    """A response's tokens as the processor expands them: ids, their characters in its text, None = not counted."""

    ids: list[int]
    offsets: list[Span | None]


def split_images(
    row: Mapping[str, Any], responses: Sequence[str], images: Sequence[Any]
) -> tuple[list[Any], dict[str, list[Any]]]:
    """The row's images as the prompt's and each response's own, in the order prompt, first response, second, ...

    Raises:
        ValueError: responses mark images, but the prompt marks none of its own (the mark may as well be a slip of the
            model that wrote the response), or prompt and responses do not mark all images.
    """
    marks = {column: response_text(row[column]).count(IMAGE_PLACEHOLDER) for column in responses}
    if not any(marks.values()):
        return list(images), {}
    of_prompt = image_marks(row["prompt"])
    if not of_prompt or of_prompt + sum(marks.values()) != len(images):
        raise ValueError(
            f"the response holds the image token {IMAGE_PLACEHOLDER!r}: remove it from the text, or mark each of the "
            f"row's {len(images)} images, the prompt's own too (the prompt marks {of_prompt}, the responses "
            f"{sum(marks.values())})"
        )
    parts, at = {}, of_prompt
    for column, count in marks.items():
        parts[column] = list(images[at : at + count])
        at += count
    return list(images[:of_prompt]), {column: part for column, part in parts.items() if part}


def with_image_marks(processor: Any, prompt: Prompt, response: str) -> str:
    """Prompt and response as one text for the processor, each "<image>" as the chat template writes an image."""
    mark = _image_mark(processor)
    return prompt.text + prompt.lead + mark.join(response.split(IMAGE_PLACEHOLDER))


def illustrated_tokens(processor: Any, prompt: Prompt, response: str, expanded: Sequence[int]) -> Tokens:
    """The response's tokens within `expanded`, the processor's ids of `with_image_marks` (without padding).

    Raises:
        ValueError: the processor expands an image into more than a run of image tokens, or joins response and prompt.
    """
    tokenizer, image_id = tokenizer_of(processor), getattr(processor, "image_token_id", None)
    unsupported = ValueError(f"images inside responses are not supported for {type(processor).__name__}")
    mark, start = _image_mark(processor), len(prompt.text)
    encoded = tokenizer(
        with_image_marks(processor, prompt, response),
        add_special_tokens=prompt.add_special_tokens,
        return_offsets_mapping=True,
    )
    plain, spans = encoded["input_ids"], encoded["offset_mapping"]
    to_text = _positions(prompt.lead, mark, response)
    ids: list[int] = []
    offsets: list[Span | None] = []
    at = 0
    for n, (token, (a, b)) in enumerate(zip(plain, spans, strict=True)):
        run = 1
        if token == image_id and not (n + 1 < len(plain) and plain[n + 1] == image_id):
            while at + run < len(expanded) and expanded[at + run] == image_id:
                run += 1
        if at + run > len(expanded) or expanded[at] != token:
            raise unsupported
        if a >= start and b > a:
            first, last = to_text[a - start], to_text[b - start - 1]
            inside = None if first is None or last is None else (first, last + 1)
            ids += expanded[at : at + run]
            offsets += [inside] * run
        at += run
    if at != len(expanded) or image_id is None:
        raise unsupported
    return Tokens(ids, offsets)


def _positions(lead: str, mark: str, response: str) -> list[int | None]:
    """For each character behind the prompt, its place in the response's text; None in image marks."""
    places: list[int | None] = [0] * len(lead)
    at = 0
    for n, piece in enumerate(response.split(IMAGE_PLACEHOLDER)):
        if n:
            places += [None] * len(mark)
            at += len(IMAGE_PLACEHOLDER)
        places += range(at, at + len(piece))
        at += len(piece)
    return places


def _image_mark(processor: Any) -> str:
    """What stands for an image within an assistant's message."""
    if processor is tokenizer_of(processor):
        raise ValueError(f"a response holds images, but {type(processor).__name__} has no image processor")
    if template_of(processor) is None:
        return str(getattr(processor, "image_token", ""))  # InstructBLIP's is an AddedToken
    probe = {"type": "text", "text": PROBE}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "?"}]},
        {"role": "assistant", "content": [probe, {"type": "image"}, probe]},
    ]
    pieces = rendered(processor, messages).split(PROBE)
    if len(pieces) != 3 or not pieces[1].strip():
        raise ValueError("the chat template writes no image into an assistant's message: put images into the prompt")
    return pieces[1]
