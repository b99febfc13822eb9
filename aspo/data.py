"""From rows to batches: prompts as text, responses as token ids, and the grid of tokens with its SentenceLayout.

Rows, their files and their checks are in `aspo.rows` (re-exported here); how tokens lie in a batch is `aspo.grid`.
Axes: B rows, R and T rows and columns of the grid, N counted tokens, S sentences.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor

from aspo.folder import append_row, load_images, row_name, write_rows
from aspo.grid import NOT_COUNTED, GridItem, Response, grid_inputs, place, tree_layout
from aspo.illustrated import illustrated_tokens, split_images, with_image_marks
from aspo.lengths import Length, PromptLength, image_sizes
from aspo.prompts import (
    Prompt,
    encode_prompt,
    encode_response,
    end_of_turn,
    generation_inputs,
    named,
    run_processor,
    tokenizer_of,
)
from aspo.rows import load_rows
from aspo.sentences import Splitter, check_spans, sentences_without_tokens, split_sentences, token_sentences
from aspo.validate import response_text, validate_rows

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]

# token_type_ids of a response's tokens, where they are not 0 (text). PaliGemma lets the tokens of type 0 see each other
# both ways, so that its responses must be of type 1: they would see their own future.
RESPONSE_TYPES = {"PaliGemmaProcessor": 1}


class ReferenceLogps(Protocol):
    """Where a collator finds cached log-probabilities (`aspo.logp_cache`)."""

    def get(self, row: Row) -> Sequence[Tensor]:
        """One (tokens,) fp32 tensor for each response of the row."""


class Reading(NamedTuple):
    """A row's prompt with some images, and the responses that are read behind it, as (role, column).

    text: what the processor gets: the prompt, and with it a response that holds images.
    """

    group: int
    row: Row
    images: list[Any]  # PIL images, or their sizes
    prompt: Prompt
    responses: tuple[tuple[int, str], ...]
    text: str


class Collator:
    """Rows -> one batch. Each image is decoded and processed once for all responses of its row.

    Args:
        processor: a processor, or a fast tokenizer for text-only models; EOS becomes its pad token where it has none.
        max_length: tokens of prompt + response; a longer response is cut (its lost sentences and their similarities
            with it), the prompt and its image tokens never are. None = no limit.
        splitter: cuts responses that come without sentence spans.
        responses: the columns that make the batch's responses, in order; the first one is role 0 (chosen).
        shared_prefix: responses that are read behind the same prompt and images share one copy of them (`aspo.tree`).
        padding_free: everything in one row, without padding.
        reference: cached log-probabilities of the reference; else the columns ref_chosen_logps, ref_rejected_logps.

    A row's `rejected_images` are what its rejected response is read with, instead of its images. Each of its
    `negative_images` adds a reading of the chosen response, with roles behind those of `responses`.

    Returns (from a call on a list of rows) a dict:
        model_inputs: dict of tensors: input_ids and attention_mask (R, T), 1 = token, and everything else the
            processor made: tensors with one entry a token (R, T), those of images in the order of the grid's items.
        tree: TokenTree, what lies where. Plain (neither shared nor padding-free): chosen rows, then rejected rows.
        layout: SentenceLayout on the CPU, responses by role and then by row; its hidden_index points into the grid.
        distinct: Distinct, or None where no two counted tokens are the same prediction.
        similarity: (S_chosen,) float32, or None where the rows have none.
        ref_logps: (N,) float32 in the layout's order, or None.
        sample_weight: (B,) float32, or None.
        image_keys: list of str, a hash of each image's pixels, in the order of the image tensors.
        ids: list of str.
    """

    def __init__(
        self,
        processor: Any,
        max_length: int | None = None,
        splitter: Splitter = split_sentences,
        responses: Sequence[str] = ("chosen", "rejected"),
        *,
        shared_prefix: bool = False,
        padding_free: bool = False,
        reference: ReferenceLogps | None = None,
    ) -> None:
        tokenizer = tokenizer_of(processor)
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"{type(tokenizer).__name__} is no fast tokenizer: sentences need character offsets")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length is {max_length}; it must be at least 1, or None for no limit")
        self.processor, self.max_length, self.splitter = processor, max_length, splitter
        self.responses = tuple(responses)
        self.shared_prefix, self.padding_free, self.reference = shared_prefix, padding_free, reference
        self._prompt_length = PromptLength(processor)
        self._warned = False

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        readings = [reading for group, row in enumerate(rows) for reading in named(row, self._readings, group, row)]
        copies = 1
        if not self.shared_prefix:
            if all(len(reading.responses) == len(self.responses) for reading in readings):
                copies = len(self.responses)  # the usual case: process each prompt once, and repeat what comes of it
            else:
                readings = [r._replace(responses=(answer,)) for r in readings for answer in r.responses]
                readings.sort(key=lambda reading: (reading.responses[0][0], reading.group))
        prompt_inputs = self._process(readings)
        items = [self._item(source, reading, prompt_inputs) for source, reading in enumerate(readings)]
        if not self.shared_prefix:
            items = [item._replace(responses=item.responses[k : k + 1]) for k in range(copies) for item in items]
        tree = place(items, self.padding_free)
        aligned, other = _token_aligned(self.processor, prompt_inputs)
        model_inputs = grid_inputs(tree, items, prompt_inputs, aligned, tokenizer_of(self.processor).pad_token_id)
        model_inputs |= {name: torch.cat([value] * copies) for name, value in other.items()}
        layout, distinct = tree_layout(tree, items, end_of_turn(self.processor, readings[0].prompt)[-1])
        chosen = sorted((r for item in items for r in item.responses if r.role == 0), key=lambda r: r.group)
        return {
            "model_inputs": model_inputs,
            "tree": tree,
            "layout": layout,
            "distinct": distinct,
            "similarity": _all_or_none(rows, [response.similarity for response in chosen]),
            "ref_logps": self._reference_logps(rows, items),
            "sample_weight": _sample_weights(rows),
            "image_keys": [image_key(image) for reading in readings for image in reading.images] * copies,
            "ids": [str(row.get("id", "")) for row in rows],
        }

    def reading_lengths(self, row: Row) -> tuple[Length, ...]:
        """(tokens of the prompt with its images, tokens of each response) of every reading of a row; usually one.

        As a batch would have them, from the images' sizes alone. Raises ValueError as a call does.
        """
        return tuple(named(row, self._length, reading) for reading in named(row, self._readings, 0, row, image_sizes))

    def _length(self, reading: Reading) -> Length:
        if reading.text == reading.prompt.text:
            prompt = self._prompt_length(reading.prompt, reading.images)
            answers = [self._answer(reading, [0] * prompt, *answer) for answer in reading.responses]
        else:  # what an image becomes within a response only the processor can say
            blank = reading._replace(images=[Image.new("RGB", (width, height)) for height, width in reading.images])
            item = self._item(0, blank, self._process([blank]))
            prompt, answers = item.prompt - item.responses[0].inside, list(item.responses)
        return prompt, tuple(len(answer.ids) for answer in answers)

    def _process(self, readings: Sequence[Reading]) -> dict[str, Tensor]:
        prompts = [reading.prompt._replace(text=reading.text) for reading in readings]
        return run_processor(self.processor, prompts, [r.images for r in readings], padding_side="right")

    def _item(self, source: int, reading: Reading, prompt_inputs: Mapping[str, Tensor]) -> GridItem:
        """The reading's item of the grid: row `source` of the processor's tensors with its responses."""
        length = int(prompt_inputs["attention_mask"][source].sum())
        ids = prompt_inputs["input_ids"][source, :length].tolist()
        answers = [named(reading.row, self._answer, reading, ids, *answer) for answer in reading.responses]
        return GridItem(source, length, tuple(answers))

    def _readings(self, group: int, row: Row, load: Callable[..., list[Any]] = load_images) -> list[Reading]:
        """The row's prompt with each set of images that a response is read with.

        load: of a row and an image column; `image_sizes` where sizes are enough.
        """
        answers = tuple(enumerate(self.responses))
        columns = ("negative_images", *(f"{column}_images" for column in self.responses))
        given = {column: load(row, column) for column in columns if row.get(column) is not None}
        own = [answer for answer in answers if given.get(f"{answer[1]}_images")]
        images, inside = split_images(row, self.responses, load(row))
        sets = [(images, tuple(answer for answer in answers if answer not in own and answer[1] not in inside))]
        sets += [(given[f"{answer[1]}_images"], (answer,)) for answer in own]
        sets += [(images, (answer,)) for answer in answers if answer[1] in inside and answer not in own]
        for n, image in enumerate(given.get("negative_images", ())):
            sets.append(([image], ((len(answers) + n, self.responses[0]),)))
        readings = []
        for of_prompt, read in sets:
            if read:
                prompt = encode_prompt(self.processor, row["prompt"], of_prompt)
                illustrations = inside.get(read[0][1], [])
                text = prompt.text
                if illustrations:
                    text = with_image_marks(self.processor, prompt, response_text(row[read[0][1]]))
                readings.append(Reading(group, row, [*of_prompt, *illustrations], prompt, read, text))
        return readings

    def _answer(self, reading: Reading, prompt_ids: Sequence[int], role: int, column: str) -> Response:
        """One response as tokens, cut to what max_length leaves."""
        row, text = reading.row, response_text(reading.row[column])
        given = row.get(f"{column}_sentences")
        similarity = row.get(f"{column}_similarity") if role == 0 else None
        spans = check_spans(text, given if given is not None else self.splitter(text))
        offsets: list[tuple[int, int] | None]
        if reading.text == reading.prompt.text:
            ids, in_text = encode_response(self.processor, reading.prompt, text)
            inside, offsets = 0, [*in_text]
        else:
            ids, offsets = illustrated_tokens(self.processor, reading.prompt, text, prompt_ids)
            inside, end = len(ids), end_of_turn(self.processor, reading.prompt)
            ids, offsets = ids + end, offsets + [(len(text), len(text))] * len(end)
        if not spans:
            raise ValueError(f"column {column!r}: the response is empty: drop the row")
        if similarity is not None and len(similarity) != len(spans):
            raise ValueError(
                f"column '{column}_similarity': {len(similarity)} values for {len(spans)} sentences: score again"
            )
        counted = iter(token_sentences([offset for offset in offsets if offset is not None], spans, text))
        sentences = [NOT_COUNTED if offset is None else next(counted) for offset in offsets]
        missing = sentences_without_tokens(sentences, len(spans))
        if missing and similarity is not None:
            words = text[slice(*spans[missing[0]])]
            raise ValueError(
                f"column '{column}_sentences': sentence {missing[0]} ({words!r}) has no token "
                "of its own in this tokenizer: join it to the sentence before and score the row again, or drop the row"
            )
        rank = {s: n for n, s in enumerate(sorted(set(sentences) - {NOT_COUNTED}))}
        sentences = [rank.get(s, NOT_COUNTED) for s in sentences]
        answer = Response(reading.group, role, ids, sentences, similarity, inside)
        length = len(prompt_ids) - inside
        return answer if self.max_length is None else self._cut(row, column, answer, length, self.max_length)

    def _cut(self, row: Row, column: str, answer: Response, prompt_length: int, max_length: int) -> Response:
        """The response cut to what max_length leaves behind its prompt."""
        room, length = max_length - prompt_length, len(answer.ids)
        if room < 1:
            raise ValueError(
                f"its prompt alone takes {prompt_length} tokens (image tokens included) of max_length "
                f"{max_length}; raise max_length or drop the row: prompts and images are never cut"
            )
        if length <= room:
            return answer
        if answer.inside:
            raise ValueError(
                f"its {column} response holds images and takes {length} tokens where max_length {max_length} leaves "
                f"{room}; raise max_length or drop the row: a response with images is not cut"
            )
        if not self._warned:
            self._warned = True
            logger.warning(
                "%s: its %s response is cut from %d to %d tokens by max_length %d (said once)",
                row_name(row), column, length, room, max_length,
            )  # fmt: skip
        sentences, similarity = answer.sentences[:room], answer.similarity
        similarity = similarity[: sentences[-1] + 1] if similarity is not None else None
        return answer._replace(ids=answer.ids[:room], sentences=sentences, similarity=similarity)

    def _reference_logps(self, rows: Sequence[Row], items: Sequence[GridItem]) -> Tensor | None:
        """(N,) the rows' cached reference log-probabilities in the layout's order, or None."""
        cached = [named(row, self._cached, row) for row in rows]
        if all(values is None for values in cached):
            return None
        answers = sorted((r for item in items for r in item.responses), key=lambda r: (r.role, r.group))
        parts = []
        for response in answers:
            row, values = rows[response.group], cached[response.group]
            if values is None or response.role >= len(values):
                raise ValueError(f"{row_name(row)}: no reference log-probabilities, but other rows have them")
            if len(values[response.role]) != len(response.ids):
                raise ValueError(
                    f"{row_name(row)}: {len(values[response.role])} reference log-probabilities for the "
                    f"{len(response.ids)} tokens of its response {response.role}: they were made with another "
                    "tokenizer, template or max_length; compute them again (`aspo reference`)"
                )
            parts.append(values[response.role])
        return torch.cat(parts)

    def _cached(self, row: Row) -> Sequence[Tensor] | None:
        if self.reference is not None:
            return self.reference.get(row)
        columns = [row.get(f"ref_{column}_logps") for column in self.responses]
        if any(values is None for values in columns):
            return None
        return [torch.tensor(values, dtype=torch.float32) for values in columns]


def image_key(image: Image.Image) -> str:
    """A hash of an image's size and pixels: equal pictures share their features."""
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()[:32]


def _token_aligned(
    processor: Any, inputs: Mapping[str, Tensor]
) -> tuple[dict[str, tuple[Tensor, int]], dict[str, Tensor]]:
    """Split a processor's tensors: those with one entry a token (with their value on a response), and the images'.

    Ids and mask are left out, and labels, which PaliGemma's processor makes of the prompt.
    """
    shape = inputs["input_ids"].shape
    of_response = RESPONSE_TYPES.get(type(processor).__name__, 0)
    aligned, other = {}, {}
    for name, value in inputs.items():
        if name in ("input_ids", "attention_mask", "labels"):
            continue
        if name.endswith("token_type_ids") and value.shape == shape:
            aligned[name] = value, of_response
        elif value.dim() > 2 and value.shape[:2] == shape and "pixel" not in name:
            raise ValueError(f"the processor's {name} has a row for every prompt token: this model is not supported")
        else:
            other[name] = value
    return aligned, other


def _all_or_none(rows: Sequence[Row], values: Sequence[list[float] | None]) -> Tensor | None:
    if all(value is None for value in values):
        return None
    for row, value in zip(rows, values, strict=True):
        if value is None:
            raise ValueError(f"{row_name(row)}: no chosen_similarity, but other rows have it: score every row")
    return torch.tensor([x for value in values for x in value or ()], dtype=torch.float32)


def _sample_weights(rows: Sequence[Row]) -> Tensor | None:
    weights = [row.get("sample_weight") for row in rows]
    if all(weight is None for weight in weights):
        return None
    return torch.tensor([1.0 if weight is None else weight for weight in weights], dtype=torch.float32)


__all__ = [
    "Collator",
    "Prompt",
    "append_row",
    "encode_prompt",
    "encode_response",
    "end_of_turn",
    "generation_inputs",
    "image_key",
    "load_images",
    "load_rows",
    "response_text",
    "row_name",
    "tokenizer_of",
    "validate_rows",
    "write_rows",
]
