"""From rows to batches: prompts as text, responses as token ids, and the grid of tokens with its SentenceLayout.

Rows, their files and their checks are in `aspo.rows` (re-exported here); how tokens lie in a batch is `aspo.grid`.
Axes: B rows, R and T rows and columns of the grid, N counted tokens, S sentences.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from aspo.folder import append_row, load_images, row_name, write_rows
from aspo.grid import NOT_COUNTED, GridItem, Response, grid_inputs, in_layout_order, place, tree_layout
from aspo.logp_cache import logp_columns
from aspo.prompts import (
    Prompt,
    encode_prompt,
    encode_response,
    end_of_turn,
    generation_inputs,
    named,
    tokenizer_of,
)
from aspo.readings import Reader, Row
from aspo.rows import load_rows
from aspo.sentences import Splitter, split_sentences
from aspo.validate import response_text, validate_rows

# token_type_ids of a response's tokens, where they are not 0 (text). PaliGemma lets the tokens of type 0 see each other
# both ways, so that its responses must be of type 1: they would see their own future.
RESPONSE_TYPES = {"PaliGemmaProcessor": 1}


PAIRED, KL_COLUMN = ("chosen", "rejected"), "kl_completion"
UNPAIRED = ("completion", KL_COLUMN)  # the responses of unpaired rows: the row's own, and another row's


class ReferenceLogps(Protocol):
    """Where a collator finds cached log-probabilities (`aspo.logp_cache`)."""

    def get(self, row: Row) -> Sequence[Tensor]:
        """One (tokens,) fp32 tensor for each response of the row."""


class Collator(Reader):
    """Rows -> one batch. Each image is decoded and processed once for all responses of its row.

    Args:
        processor: a processor, or a fast tokenizer for text-only models; EOS becomes its pad token where it has none.
        max_length: tokens of prompt + response; a longer response is cut (its lost sentences and their similarities
            with it), the prompt and its image tokens never are. None = no limit.
        splitter: cuts responses that come without sentence spans.
        responses: the columns that make the batch's responses, in order; the first one is role 0 (chosen).
        shared_prefix: responses that are read behind the same prompt and images share one copy of them (`aspo.tree`).
        min_saving: a batch that would have less than this many times the tokens without sharing is left plain: a short
            prompt before long responses saves little, and costs what sharing costs.
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
        rejected_similarity, sentence_weights, token_scores, negative_log_q, desirable: what else the rows bring for the
            objective, as `aspo_kernels.objectives.Inputs` has it, or None.
        ref_logps: (N,) float32 in the layout's order, or None.
        sample_weight: (B,) float32, or None.
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
        min_saving: float = 1.0,
        padding_free: bool = False,
        reference: ReferenceLogps | None = None,
    ) -> None:
        super().__init__(processor, max_length, splitter, responses)
        self.shared_prefix, self.min_saving = shared_prefix, min_saving
        self.padding_free, self.reference = padding_free, reference

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        if KL_COLUMN in self.responses:
            rows = _with_others_responses(rows)
        readings = [reading for group, row in enumerate(rows) for reading in named(row, self.readings, group, row)]
        together = all(len(reading.responses) == len(self.responses) for reading in readings)
        if not (self.shared_prefix or together):  # each response with the images that it is read with
            readings = [r._replace(responses=(answer,)) for r in readings for answer in r.responses]
            readings.sort(key=lambda reading: (reading.responses[0][0], reading.group))
        prompt_inputs = self.process(readings)
        items = [self.item(source, reading, prompt_inputs) for source, reading in enumerate(readings)]
        copies = 1
        if together and not (self.shared_prefix and self._saves(items)):
            copies = len(self.responses)  # of each prompt and its images, processed once
            items = [item._replace(responses=item.responses[k : k + 1]) for k in range(copies) for item in items]
        tree = place(items, self.padding_free)
        aligned, other = _token_aligned(self.processor, prompt_inputs)
        model_inputs = grid_inputs(tree, items, prompt_inputs, aligned, tokenizer_of(self.processor).pad_token_id)
        model_inputs |= {name: torch.cat([value] * copies) for name, value in other.items()}
        layout, distinct = tree_layout(tree, items, end_of_turn(self.processor, readings[0].prompt)[-1])
        answers = [response for response, _, _ in in_layout_order(items)]
        of_role = {role: [r for r in answers if r.role == role] for role in (0, 1)}
        return {
            "model_inputs": model_inputs,
            "tree": tree,
            "layout": layout,
            "distinct": distinct,
            "similarity": _all_or_none(rows, "similarity", [r.similarity for r in of_role[0]]),
            "rejected_similarity": _rejected_similarity(rows, answers, of_role[1]),
            "sentence_weights": _sentence_weights(rows, answers, of_role[0]),
            "token_scores": _token_scores(rows, answers, self.responses),
            "negative_log_q": _negative_log_q(rows, answers, len(self.responses)),
            "desirable": _labels(rows),
            "ref_logps": self._reference_logps(rows, items),
            "sample_weight": _sample_weights(rows),
            "ids": [str(row.get("id", "")) for row in rows],
        }

    def _saves(self, items: Sequence[GridItem]) -> bool:
        tree = place(items, self.padding_free)
        return tree.num_unshared_tokens >= self.min_saving * tree.num_tokens

    @property
    def makes_trees(self) -> bool:
        """Whether its batches need more than a causal model's own mask and positions."""
        return self.shared_prefix or self.padding_free

    def _reference_logps(self, rows: Sequence[Row], items: Sequence[GridItem]) -> Tensor | None:
        """(N,) the rows' cached reference log-probabilities in the layout's order, or None."""
        cached = [named(row, self._cached, row) for row in rows]
        if all(values is None for values in cached):
            return None
        answers = [response for response, _, _ in in_layout_order(items)]
        parts = []
        for response in answers:
            row, values = rows[response.group], cached[response.group]
            if values is None:
                raise ValueError(f"{row_name(row)}: no reference log-probabilities, but other rows have them")
            if response.role >= len(values):
                raise ValueError(
                    f"{row_name(row)}: no reference log-probabilities are kept for its response of role "
                    f"{response.role} (negative_images or chosen_alternative_ids): drop what is kept, and let the "
                    "reference run"
                )
            if len(values[response.role]) != len(response.ids):
                raise ValueError(
                    f"{row_name(row)}: {len(values[response.role])} reference log-probabilities for the "
                    f"{len(response.ids)} tokens of its response {response.role}: they were made with another "
                    "tokenizer, template or max_length; compute them again (`aspo reference`)"
                )
            parts.append(values[response.role])
        return torch.cat(parts)

    def _cached(self, row: Row) -> Sequence[Tensor] | None:
        columns = logp_columns(row, self.responses)
        if self.reference is not None and columns is not None:
            raise ValueError(
                "it has reference log-probabilities of its own (ref_chosen_logps, ...) beside those of the cache: drop "
                "the columns, or turn precompute_ref_log_probs off"
            )
        return columns if self.reference is None else self.reference.get(row)


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


def _all_or_none(rows: Sequence[Row], name: str, values: Sequence[list[float] | None]) -> Tensor | None:
    """The values of one response a row, joined; None where no row has any."""
    if all(value is None for value in values):
        return None
    for row, value in zip(rows, values, strict=True):
        if value is None:
            raise ValueError(f"{row_name(row)}: no chosen_{name}, but other rows have it: give it to every row")
    return torch.tensor([x for value in values for x in value or ()], dtype=torch.float32)


# --- what the rows bring for some objectives; Response by Response in the layout's order ---


def _num_sentences(response: Response) -> int:
    return len(set(response.sentences) - {NOT_COUNTED})


def _rejected_similarity(
    rows: Sequence[Row], answers: Sequence[Response], rejected: Sequence[Response]
) -> Tensor | None:
    """(S,), 0 at sentences that are not of a rejected response."""
    if all(response.similarity is None for response in rejected):
        return None
    for response in rejected:
        if response.similarity is None:
            raise ValueError(f"{row_name(rows[response.group])}: no rejected_similarity, but other rows have it")
    values = [(r.similarity if r.role == 1 else None) or [0.0] * _num_sentences(r) for r in answers]
    return torch.tensor([x for value in values for x in value], dtype=torch.float32)


def _sentence_weights(rows: Sequence[Row], answers: Sequence[Response], chosen: Sequence[Response]) -> Tensor | None:
    """(S,), 0 at the sentences of responses that come without."""
    if _all_or_none(rows, "sentence_weights", [response.weights for response in chosen]) is None:
        return None
    return torch.tensor([x for r in answers for x in r.weights or [0.0] * _num_sentences(r)], dtype=torch.float32)


def _token_scores(rows: Sequence[Row], answers: Sequence[Response], columns: Sequence[str]) -> Tensor | None:
    """(N,), 0 at tokens without a score; None where no row has the columns."""
    if not any(f"{column}_token_scores" in row for row in rows for column in columns):
        return None
    values = []
    for response in answers:
        scores = response.scores or [0.0] * len(response.ids)
        values += [v for v, sentence in zip(scores, response.sentences, strict=True) if sentence != NOT_COUNTED]
    return torch.tensor(values, dtype=torch.float32)


def _negative_log_q(rows: Sequence[Row], answers: Sequence[Response], first_role: int) -> Tensor | None:
    """(R,), 0 at responses of the row's own images."""
    if all(row.get("negative_log_q") is None for row in rows):
        return None
    values = []
    for response in answers:
        given: Sequence[float] = rows[response.group].get("negative_log_q") or ()
        place = response.role - first_role
        if place >= len(given):
            raise ValueError(
                f"{row_name(rows[response.group])}: negative_log_q has no value for its negative image {place}: draw "
                "the negatives again (`aspo negatives`), or drop the column"
            )
        values.append(float(given[place]) if place >= 0 else 0.0)
    return torch.tensor(values, dtype=torch.float32)


def _labels(rows: Sequence[Row]) -> Tensor | None:
    """(B,) bool of unpaired rows."""
    labels = [row.get("label") for row in rows]
    return None if all(label is None for label in labels) else torch.tensor([bool(label) for label in labels])


def _with_others_responses(rows: Sequence[Row]) -> list[Row]:
    """Each row with the completion of the row before it, from which KTO estimates the divergence."""
    if len(rows) < 2:
        raise ValueError("kto compares each response with one to another prompt: it needs two rows in a forward pass")
    return [{**row, KL_COLUMN: rows[n - 1]["completion"]} for n, row in enumerate(rows)]


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
