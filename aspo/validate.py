"""Checks of rows before long work: the first bad row is named with its column and what to do about it."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from aspo.folder import IMAGE_COLUMNS
from aspo.images import check_image, image_entries
from aspo.sentences import check_spans

IMAGE_PLACEHOLDER = "<image>"
KINDS = {
    "preference": ("prompt", "chosen", "rejected"),
    "unpaired": ("prompt", "completion", "label"),
    "prompt": ("prompt",),
}
Row = Mapping[str, Any]


def validate_rows(dataset: Iterable[Row], kind: str = "preference") -> None:
    """Check every row; ValueError names the first bad one, its column and what to do. Images are not decoded."""
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {list(KINDS)}")
    scored: tuple[int, bool] | None = None
    for index, row in enumerate(dataset):
        for column in KINDS[kind]:
            if row.get(column) is None:
                own = ", ".join(short_repr(name) for name, value in row.items() if value is not None)
                needs = ", ".join(KINDS[kind])
                raise bad_row(index, row, column, f"missing; a {kind} row has {needs}, and this one has {own}")
        named_column("prompt", index, row, _check_prompt, row)
        for column in IMAGE_COLUMNS:
            named_column(column, index, row, _check_images, row, column)
        if kind == "unpaired" and not isinstance(row["label"], bool):
            raise bad_row(
                index, row, "label", f"it is {short_repr(row['label'])}; it must be true (desirable) or false"
            )
        if kind == "unpaired" and not named_column("completion", index, row, response_text, row["completion"]).strip():
            raise bad_row(index, row, "completion", "it is empty: drop the row")
        if kind == "unpaired" and IMAGE_PLACEHOLDER in response_text(row["completion"]):
            raise bad_row(
                index, row, "completion", f"it holds {IMAGE_PLACEHOLDER!r}: images in unpaired rows are the prompt's"
            )
        if kind == "preference":
            _check_responses(index, row)
            named_column("negative_log_q", index, row, _check_numbers, row.get("negative_log_q"), None)
            alternatives = named_column("chosen_alternative_ids", index, row, _items, row.get("chosen_alternative_ids"))
            if row.get("negative_log_q") is not None and len(row["negative_log_q"]) != len(
                image_entries(row, "negative_images")
            ):
                raise bad_row(
                    index,
                    row,
                    "negative_log_q",
                    f"{len(row['negative_log_q'])} values for the row's "
                    f"{len(image_entries(row, 'negative_images'))} negative_images: draw them again (`aspo negatives`)",
                )
            if any(type(token) is not int or token < 0 for token in alternatives):
                raise bad_row(index, row, "chosen_alternative_ids", "token ids are integers, 0 or more")
            if row.get("unfinished") not in (None, True, False):
                raise bad_row(
                    index, row, "unfinished", f"it is {short_repr(row['unfinished'])}; it must be true or false"
                )
            if row.get("chosen_alternative_ids") is not None and row.get("negative_images"):
                raise bad_row(index, row, "chosen_alternative_ids", "it has negative_images too: drop one of them")
            has = row.get("chosen_similarity") is not None
            if scored is not None and scored[1] != has:
                raise bad_row(
                    index, row, "chosen_similarity", f"row {scored[0]} and this one differ in having it; score all"
                )
            scored = (index, has) if scored is None else scored
        weight = row.get("sample_weight")
        if weight is not None and not (_is_number(weight) and weight >= 0):
            raise bad_row(
                index, row, "sample_weight", f"it is {short_repr(weight)}; it must be a finite number, 0 or more"
            )


def response_text(value: Any) -> str:
    """The text of a response: a string, a message, or a list of one; the assistant's. An image becomes "<image>"."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        role = value.get("role", value.get("from"))
        if role not in ("assistant", "gpt"):
            raise ValueError(f"a response message of role {short_repr(role)}; only the assistant's are responses")
        content = value.get("content", value.get("value"))
        if isinstance(content, str):
            return content
        if isinstance(content, Sequence) and all(map(_is_part, content)):
            return "".join(part["text"] if part["type"] == "text" else IMAGE_PLACEHOLDER for part in content)
        raise ValueError("a response message must hold text and images only")
    if isinstance(value, Sequence) and len(value) == 1 and isinstance(value[0], str | Mapping):
        return response_text(value[0])
    raise ValueError(f"a response must be a text or one assistant message, got {short_repr(value)}")


def _is_part(part: Any) -> bool:
    """Whether a message part is a text or an image."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    return kind == "image" or (kind == "text" and isinstance(part.get("text"), str))


def image_marks(prompt: Any) -> int:
    """How many images a prompt marks: "<image>" in a text, or an image part of a message."""
    messages = [{"content": prompt}] if isinstance(prompt, str) else prompt
    contents = [message["content"] for message in messages]
    parts = [part for content in contents for part in ([content] if isinstance(content, str) else content)]
    texts = [part if isinstance(part, str) else part.get("text") or "" for part in parts]
    in_parts = sum(isinstance(part, Mapping) and part.get("type") == "image" for part in parts)
    return in_parts + sum(text.count(IMAGE_PLACEHOLDER) for text in texts)


def _check_prompt(row: Row) -> None:
    prompt = row["prompt"]
    if isinstance(prompt, str):
        texts = [prompt]
    elif isinstance(prompt, Sequence) and prompt and all(map(_is_message, prompt)):
        if prompt[-1]["role"] == "assistant":
            raise ValueError("it ends with an assistant message; move its text into the responses")
        parts = [p for m in prompt for p in ([m["content"]] if isinstance(m["content"], str) else m["content"])]
        for part in (p for p in parts if isinstance(p, Mapping)):
            if part.get("type") not in ("text", "image"):
                kind = short_repr(part.get("type"))
                raise ValueError(f"a message part of type {kind}: only 'text' and 'image' are supported")
            if not isinstance(part.get("text") or "", str):
                raise ValueError(f"a message part's text is {short_repr(part['text'])}; it must be a text")
        texts = [p if isinstance(p, str) else p.get("text") or "" for p in parts]
    else:
        raise ValueError(f"it must be a text or a list of messages with role and content, got {short_repr(prompt)}")
    images, marks = len(image_entries(row)), image_marks(prompt)
    answers = [row[column] for column in ("chosen", "rejected") if isinstance(row.get(column), str)]
    illustrated = any(IMAGE_PLACEHOLDER in answer for answer in answers)  # counted in _check_responses
    if not illustrated and marks not in (0, images):
        raise ValueError(f"it marks {marks} images, but the row has {images}: make them equal, or mark none")
    if not images and not any(text.strip() for text in texts):
        raise ValueError("it is empty")


def _is_message(value: Any) -> bool:
    if not isinstance(value, Mapping) or not isinstance(value.get("role"), str):
        return False
    content = value.get("content")
    return isinstance(content, str) or (isinstance(content, list) and all(isinstance(p, Mapping) for p in content))


def _check_images(row: Row, column: str = "images") -> None:
    for entry in image_entries(row, column):
        check_image(entry)


def _check_responses(index: int, row: Row) -> None:
    texts = {column: named_column(column, index, row, response_text, row[column]) for column in ("chosen", "rejected")}
    marks, images = image_marks(row["prompt"]), len(image_entries(row))
    inside = sum(text.count(IMAGE_PLACEHOLDER) for text in texts.values())
    for column, text in texts.items():
        if not text.strip():
            raise bad_row(index, row, column, "it is empty: drop the row")
        if IMAGE_PLACEHOLDER in text and (not marks or marks + inside != images):
            what = f"the prompt marks {marks} and the responses {inside} of the row's {images} images"
            raise bad_row(
                index,
                row,
                column,
                f"it holds {IMAGE_PLACEHOLDER!r}: remove it, or mark every image, the prompt's too ({what})",
            )
        spans = row.get(f"{column}_sentences")
        if spans is not None:
            named_column(f"{column}_sentences", index, row, check_spans, text, spans)
        similarity = row.get(f"{column}_similarity")
        if similarity is not None:
            named_column(f"{column}_similarity", index, row, _check_similarity, similarity, spans)
        weights = row.get(f"{column}_sentence_weights")
        if weights is not None:
            named_column(f"{column}_sentence_weights", index, row, _check_similarity, weights, spans)
            named_column(f"{column}_sentence_weights", index, row, _check_numbers, weights, 0.0)
        scores = row.get(f"{column}_token_scores")
        named_column(f"{column}_token_scores", index, row, _check_scores, scores, text)
    if texts["chosen"].strip() == texts["rejected"].strip():
        raise bad_row(index, row, "rejected", "it is the same text as 'chosen': drop the row")


def _check_similarity(values: Any, spans: Any) -> None:
    if spans is None:
        raise ValueError("it needs the sentences that it belongs to (`aspo score` writes similarities with theirs)")
    if len(_items(values)) != len(spans):
        raise ValueError(f"{len(values)} values for {len(spans)} sentences; make them again")
    _check_numbers(values, None)


def _items(values: Any) -> Sequence[Any]:
    """A list of a row; none is an empty one."""
    if values is None:
        return ()
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise ValueError(f"it is {short_repr(values)}; it must be a list")
    return values


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def _check_numbers(values: Any, least: float | None) -> None:
    for n, value in enumerate(_items(values)):
        if not _is_number(value):
            raise ValueError(f"value {n} is {short_repr(value)}; it must be a finite number")
        if least is not None and value < least:
            raise ValueError(f"value {n} is {value}; it must be at least {least:g}")


def _check_scores(spans: Any, text: str) -> None:
    """[start, end, value] in order, apart, and within the text."""
    before = 0
    for n, span in enumerate(_items(spans)):
        if isinstance(span, str) or not isinstance(span, Sequence) or len(span) != 3:
            raise ValueError(f"entry {n} is {short_repr(span)}; it must be [start, end, score]")
        _check_numbers(span, None)
        if not before <= span[0] < span[1] <= len(text):
            raise ValueError(
                f"entry {n} covers characters {span[0]:g} to {span[1]:g} of a text of {len(text)}; entries must be in "
                "order, apart, and not empty"
            )
        before = span[1]


def named_column(column: str, index: int, row: Row, function: Callable[..., Any], *args: Any) -> Any:
    """Call, with row and column put in front of a ValueError's message."""
    try:
        return function(*args)
    except ValueError as error:
        raise bad_row(index, row, column, str(error)) from error


def bad_row(index: int, row: Row, column: str, what: str) -> ValueError:
    """The error that names a row and a column."""
    name = f" (id {short_repr(row['id'])})" if row.get("id") is not None else ""
    return ValueError(f"row {index}{name}, column {column!r}: {what}")


def short_repr(value: Any) -> str:
    """A value's repr, cut to what fits into an error line."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
