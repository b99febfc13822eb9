"""From rows to batches: prompts as text, responses as token ids, and the padded batch with its SentenceLayout.

Rows, their files and their checks are in `aspo.rows` (re-exported here). Axes: B rows, R = 2B responses (chosen rows
0..B-1, then rejected rows), T padded length, S sentences.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from aspo.folder import append_row, load_images, row_name, write_rows
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
from aspo_kernels.layout import IGNORE_INDEX, SentenceLayout

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]


class Collator:
    """Rows -> one padded batch. Each image is decoded and processed once for all responses of its row.

    Args:
        processor: a processor, or a fast tokenizer for text-only models; EOS becomes its pad token where it has none.
        max_length: tokens of prompt + response; a longer response is cut (its lost sentences and their similarities
            with it), the prompt and its image tokens never are. None = no limit.
        splitter: cuts responses that come without sentence spans.
        responses: the columns that make the batch's rows, in order; the first one is role 0 (chosen).

    Returns (from a call on a list of rows) a dict:
        model_inputs: dict of tensors with R rows: input_ids and attention_mask (R, T), right-padded, and everything
            else the processor made (pixel_values, image_grid_thw, ...), chosen rows' images, then the same again.
        layout: SentenceLayout on the CPU; labels are shifted, so hidden[r, t] predicts its target at [r, t].
        similarity: (S_chosen,) float32, or None where the rows have none.
        sample_weight: (B,) float32, or None.
        ids: list of str.
    """

    def __init__(
        self,
        processor: Any,
        max_length: int | None = None,
        splitter: Splitter = split_sentences,
        responses: Sequence[str] = ("chosen", "rejected"),
    ) -> None:
        tokenizer = tokenizer_of(processor)
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"{type(tokenizer).__name__} is no fast tokenizer: sentences need character offsets")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length is {max_length}; it must be at least 1, or None for no limit")
        self.processor, self.max_length, self.splitter = processor, max_length, splitter
        self.responses = tuple(responses)
        self._warned = False

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        images = [named(row, load_images, row) for row in rows]
        prompts = [
            named(row, encode_prompt, self.processor, row["prompt"], pictures)
            for row, pictures in zip(rows, images, strict=True)
        ]
        prompt_inputs = run_processor(self.processor, prompts, images, padding_side="right")
        lengths = prompt_inputs["attention_mask"].sum(dim=1).tolist()
        answers, similarities = [], []
        for column in self.responses:
            for row, prompt, length in zip(rows, prompts, lengths, strict=True):
                ids, sentences, similarity = named(row, self._answer, row, prompt, int(length), column)
                answers.append((ids, sentences))
                if column == self.responses[0]:
                    similarities.append(similarity)
        model_inputs, labels, sentence_ids = self._assemble(prompt_inputs, lengths, answers)
        group = torch.arange(len(rows)).repeat(len(self.responses))
        role = torch.arange(len(self.responses)).repeat_interleave(len(rows))
        return {
            "model_inputs": model_inputs,
            "layout": SentenceLayout.from_labels(
                labels, sentence_ids, end_of_turn(self.processor, prompts[0])[-1], group=group, role=role
            ),
            "similarity": _all_or_none(rows, similarities),
            "sample_weight": _sample_weights(rows),
            "ids": [str(row.get("id", "")) for row in rows],
        }

    def _answer(
        self, row: Row, prompt: Prompt, prompt_length: int, column: str
    ) -> tuple[list[int], list[int], list[float] | None]:
        """Ids of one response, the sentence of each, and the similarity of each sentence (chosen only)."""
        text = response_text(row[column])
        given = row.get(f"{column}_sentences")
        similarity = row.get(f"{column}_similarity") if column == self.responses[0] else None
        spans = check_spans(text, given if given is not None else self.splitter(text))
        ids, offsets = encode_response(self.processor, prompt, text)
        if not spans:
            raise ValueError(f"column {column!r}: the response is empty: drop the row")
        if similarity is not None and len(similarity) != len(spans):
            raise ValueError(
                f"column '{column}_similarity': {len(similarity)} values for {len(spans)} sentences: score again"
            )
        sentences = token_sentences(offsets, spans, text)
        missing = sentences_without_tokens(sentences, len(spans))
        if missing and similarity is not None:
            words = text[slice(*spans[missing[0]])]
            raise ValueError(
                f"column '{column}_sentences': sentence {missing[0]} ({words!r}) has no token "
                "of its own in this tokenizer: join it to the sentence before and score the row again, or drop the row"
            )
        rank = {s: n for n, s in enumerate(sorted(set(sentences)))}
        sentences = [rank[s] for s in sentences]
        if self.max_length is not None and prompt_length + len(ids) > self.max_length:
            room = self.max_length - prompt_length
            if room < 1:
                raise ValueError(
                    f"its prompt alone takes {prompt_length} tokens (image tokens included) of max_length "
                    f"{self.max_length}; raise max_length or drop the row: prompts and images are never cut"
                )
            if not self._warned:
                self._warned = True
                logger.warning(
                    "%s: its %s response is cut from %d to %d tokens by max_length %d (said once)",
                    row_name(row), column, len(ids), room, self.max_length,
                )  # fmt: skip
            ids, sentences = ids[:room], sentences[:room]
            similarity = similarity[: sentences[-1] + 1] if similarity is not None else None
        return ids, sentences, similarity

    def _assemble(
        self, prompt_inputs: dict[str, Tensor], lengths: Sequence[int], answers: Sequence[tuple[list[int], list[int]]]
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Prompts and answers in one right-padded batch: model inputs, labels (R, T), sentence ids (R, T)."""
        copies = len(self.responses)
        lengths = list(lengths) * copies
        width = max(length + len(ids) for length, (ids, _) in zip(lengths, answers, strict=True))
        shape = (len(answers), width)
        input_ids = torch.full(shape, tokenizer_of(self.processor).pad_token_id)
        attention_mask, sentence_ids = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORE_INDEX)
        token_aligned, other = _token_aligned(prompt_inputs)
        extended = {name: torch.zeros(shape, dtype=value.dtype) for name, value in token_aligned.items()}
        for r, (length, (ids, sentences)) in enumerate(zip(lengths, answers, strict=True)):
            source = r % (len(answers) // copies)
            end = length + len(ids)
            input_ids[r, :length] = prompt_inputs["input_ids"][source, :length]
            input_ids[r, length:end] = torch.tensor(ids)
            attention_mask[r, :end] = 1
            labels[r, length - 1 : end - 1] = torch.tensor(ids)
            sentence_ids[r, length - 1 : end - 1] = torch.tensor(sentences)
            for name, value in token_aligned.items():  # 0 = text in every model that has such ids
                extended[name][r, :length] = value[source, :length]
        repeated = {name: torch.cat([value] * copies) for name, value in other.items()}
        return {"input_ids": input_ids, "attention_mask": attention_mask, **extended, **repeated}, labels, sentence_ids


def _token_aligned(inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a processor's tensors into those with one entry a token (ids and mask apart) and those of the images."""
    shape = inputs["input_ids"].shape
    aligned, other = {}, {}
    for name, value in inputs.items():
        if name in ("input_ids", "attention_mask"):
            continue
        if name.endswith("token_type_ids"):
            aligned[name] = value
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
    "load_images",
    "load_rows",
    "response_text",
    "row_name",
    "tokenizer_of",
    "validate_rows",
    "write_rows",
]
