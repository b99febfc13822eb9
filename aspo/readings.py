"""What a row is read as: its prompt with each set of images, and the responses behind it as tokens and sentences."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from aspo.folder import load_images, row_name
from aspo.illustrated import illustrated_tokens, split_images, with_image_marks
from aspo.lengths import Length, PromptLength, image_sizes
from aspo.prompts import Prompt, encode_prompt, encode_response, end_of_turn, named, run_processor, tokenizer_of
from aspo.sentences import Splitter, check_spans, sentences_without_tokens, token_sentences
from aspo.shared_prefix.grid import NOT_COUNTED, GridItem, Response
from aspo.validate import response_text

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]


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


class Reader:
    """Reads rows for one processor; the arguments are those of `aspo.data.Collator`, which is one."""

    def __init__(self, processor: Any, max_length: int | None, splitter: Splitter, responses: Sequence[str]) -> None:
        tokenizer = tokenizer_of(processor)
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"{type(tokenizer).__name__} is no fast tokenizer: sentences need character offsets")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length is {max_length}; it must be at least 1, or None for no limit")
        self.processor, self.max_length, self.splitter = processor, max_length, splitter
        self.responses = tuple(responses)
        self._prompt_length = PromptLength(processor)
        self._warned = False

    def reading_lengths(self, row: Row) -> tuple[Length, ...]:
        """(tokens of the prompt with its images, tokens of each response) of every reading of a row; usually one.

        As a batch would have them, from the images' sizes alone. Raises ValueError as a call does.
        """
        return tuple(named(row, self._length, reading) for reading in named(row, self.readings, 0, row, image_sizes))

    def _length(self, reading: Reading) -> Length:
        if reading.text == reading.prompt.text:
            prompt = self._prompt_length(reading.prompt, reading.images)
            answers = [self._unsplit(reading, prompt, *answer) for answer in reading.responses]
        else:  # what an image becomes within a response only the processor can say
            blank = reading._replace(images=[Image.new("RGB", (width, height)) for height, width in reading.images])
            item = self.item(0, blank, self.process([blank]))
            prompt, answers = item.prompt - item.responses[0].inside, list(item.responses)
        return prompt, tuple(len(answer.ids) for answer in answers)

    def process(self, readings: Sequence[Reading]) -> dict[str, Tensor]:
        """The processor's tensors for the readings' texts and images, padded on the right."""
        prompts = [reading.prompt._replace(text=reading.text) for reading in readings]
        return run_processor(self.processor, prompts, [r.images for r in readings], padding_side="right")

    def item(self, source: int, reading: Reading, prompt_inputs: Mapping[str, Tensor]) -> GridItem:
        """The reading's item of the grid: row `source` of the processor's tensors with its responses."""
        length = int(prompt_inputs["attention_mask"][source].sum())
        ids = prompt_inputs["input_ids"][source, :length].tolist()
        answers = [named(reading.row, self._answer, reading, ids, *answer) for answer in reading.responses]
        return GridItem(source, length, tuple(answers))

    def readings(self, group: int, row: Row, load: Callable[..., list[Any]] = load_images) -> list[Reading]:
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
        similarity = row.get(f"{column}_similarity") if role < 2 else None  # of another image there is none
        weights = row.get(f"{column}_sentence_weights") if role < 2 else None
        spans = check_spans(text, given if given is not None else self.splitter(text))
        offsets: list[tuple[int, int] | None]
        if reading.text == reading.prompt.text:
            ids, in_text = encode_response(self.processor, reading.prompt, text, not row.get("unfinished"))
            inside, offsets = 0, [*in_text]
        else:
            ids, offsets = illustrated_tokens(self.processor, reading.prompt, text, prompt_ids)
            inside, end = len(ids), [] if row.get("unfinished") else end_of_turn(self.processor, reading.prompt)
            ids, offsets = ids + end, offsets + [(len(text), len(text))] * len(end)
        if not spans:
            raise ValueError(f"column {column!r}: the response is empty: drop the row")
        for name, values in (("similarity", similarity), ("sentence_weights", weights)):
            if values is not None and len(values) != len(spans):
                raise ValueError(f"column '{column}_{name}': {len(values)} values for {len(spans)} sentences")
        counted = iter(token_sentences([offset for offset in offsets if offset is not None], spans, text))
        sentences = [NOT_COUNTED if offset is None else next(counted) for offset in offsets]
        missing = sentences_without_tokens(sentences, len(spans))
        if missing and (similarity is not None or weights is not None):
            words = text[slice(*spans[missing[0]])]
            raise ValueError(
                f"column '{column}_sentences': sentence {missing[0]} ({words!r}) has no token "
                "of its own in this tokenizer: join it to the sentence before and score the row again, or drop the row"
            )
        rank = {s: n for n, s in enumerate(sorted(set(sentences) - {NOT_COUNTED}))}
        sentences = [rank.get(s, NOT_COUNTED) for s in sentences]
        scores = alternative = None
        if (spans_of_scores := row.get(f"{column}_token_scores")) is not None:
            scores = token_values(spans_of_scores, offsets)
        if role == 0 and row.get(f"{column}_alternative_ids") is not None:
            alternative = list(row[f"{column}_alternative_ids"])
            if len(alternative) != len(ids):
                raise ValueError(
                    f"column '{column}_alternative_ids': {len(alternative)} ids for a response of {len(ids)} tokens: "
                    "they were made with another tokenizer or template; make them again (`aspo pairs --method povid`)"
                )
        answer = Response(reading.group, role, ids, sentences, similarity, inside, weights, scores, alternative)
        return self._cut(row, column, answer, len(prompt_ids) - inside)

    def _unsplit(self, reading: Reading, prompt_length: int, role: int, column: str) -> Response:
        """`_answer` where only its length is wanted: not cut into sentences."""
        text, row = response_text(reading.row[column]), reading.row
        ids, _ = encode_response(self.processor, reading.prompt, text, not row.get("unfinished"))
        answer = Response(reading.group, role, ids, [0] * len(ids))
        return self._cut(reading.row, column, answer, prompt_length)

    def _cut(self, row: Row, column: str, answer: Response, prompt_length: int) -> Response:
        """The response cut to what max_length leaves behind its prompt."""
        if (max_length := self.max_length) is None:
            return answer
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
        sentences = answer.sentences[:room]
        ends = {"similarity": sentences[-1] + 1, "weights": sentences[-1] + 1, "scores": room, "alternative": room}
        cut: dict[str, Any] = {name: getattr(answer, name) for name in ends}
        cut = {name: None if values is None else values[: ends[name]] for name, values in cut.items()}
        return answer._replace(ids=answer.ids[:room], sentences=sentences, **cut)


def token_values(spans: Sequence[Sequence[Any]], offsets: Sequence[tuple[int, int] | None]) -> list[float]:
    """The value of the first [start, end, value] span that each token's characters overlap, else 0."""
    values = []
    for offset in offsets:
        start, end = offset or (0, 0)
        values.append(next((float(v) for a, b, v in spans if start < b and a < end), 0.0))
    return values
