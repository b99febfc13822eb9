"""From rows to batches: prompts as text, responses as token ids, and the grid of tokens with its SentenceLayout.

Rows, their files and their checks are in `aspo.rows` (re-exported here); how tokens lie in a batch is
`aspo.shared_prefix.grid`.
Axes: B rows, R and T rows and columns of the grid, N counted tokens, S sentences.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from aspo.columns import KL_COLUMN, PAIRED, columns_of, with_others_responses
from aspo.even_batches import PLACEHOLDER
from aspo.folder import append_row, load_images, row_name, write_rows
from aspo.lengths import Length, consecutive_parts, reading_widths
from aspo.prompts import (
    Prompt,
    encode_prompt,
    encode_response,
    end_of_turn,
    generation_inputs,
    named,
    tokenizer_of,
)
from aspo.readings import Reader, Reading, Row
from aspo.reference.logp_cache import logp_columns
from aspo.rows import load_rows
from aspo.sentences import Splitter, split_sentences
from aspo.shared_prefix.grid import Grid, GridItem, Response, grid_inputs, in_layout_order, in_parts, place, tree_layout
from aspo.validate import response_text, validate_rows

# token_type_ids of a response's tokens, where they are not 0 (text). PaliGemma lets the tokens of type 0 see each other
# both ways, so that its responses must be of type 1: they would see their own future.
RESPONSE_TYPES = {"PaliGemmaProcessor": 1}


class ReferenceLogps(Protocol):
    """Where a collator finds cached log-probabilities (`aspo.reference.logp_cache`)."""

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
        shared_prefix: responses that are read behind the same prompt and images share one copy of them
            (`aspo.shared_prefix.tree`).
        min_saving: a batch that would have less than this many times the tokens without sharing is left plain: a short
            prompt before long responses saves little, and costs what sharing costs.
        padding_free: everything in one row, without padding.
        forward_tokens: at most so many tokens (padding counted) in one grid: a batch of more becomes several, which
            `PairForward` runs one after the other and again in the backward, holding the activations of one.
        reference: cached log-probabilities of the reference; else the columns ref_chosen_logps, ref_rejected_logps.

    A row's `rejected_images` are what its rejected response is read with, instead of its images. Each of its
    `negative_images` adds a reading of the chosen response, with roles behind those of `responses`.

    Returns (from a call on a list of rows) a dict:
        model_inputs: dict of tensors: input_ids and attention_mask (R, T), 1 = token, and everything else the
            processor made: tensors with one entry a token (R, T), those of images in the order of the grid's items.
        parts, part_order: only of a batch in several grids (`grid.in_parts`), whose first one has the other names.
        tree: TokenTree, what lies where. Plain (neither shared nor padding-free): chosen rows, then rejected rows.
        layout: SentenceLayout on the CPU, responses by role and then by row; its hidden_index points into the grid.
        distinct: Distinct, or None where no two counted tokens are the same prediction.
        similarity: (S_chosen,) float32, or None where the rows have none.
        rejected_similarity, sentence_weights, token_scores, negative_log_q, desirable: what else the rows bring for the
            objective, as `aspo_kernels.objectives.Inputs` has it, or None.
        ref_logps: (N,) float32 in the layout's order, or None.
        sample_weight: (B,) float32, or None.
        ids: list of str.
        placeholder: True = run it with the others, and let it count for nothing (`aspo.even_batches`).
    """

    def __init__(
        self,
        processor: Any,
        max_length: int | None = None,
        splitter: Splitter = split_sentences,
        responses: Sequence[str] = PAIRED,
        *,
        shared_prefix: bool = False,
        min_saving: float = 1.0,
        padding_free: bool = False,
        forward_tokens: int | None = None,
        reference: ReferenceLogps | None = None,
    ) -> None:
        super().__init__(processor, max_length, splitter, responses)
        self.shared_prefix, self.min_saving = shared_prefix, min_saving
        self.padding_free, self.forward_tokens, self.reference = padding_free, forward_tokens, reference

    def reading_lengths(self, row: Row) -> tuple[Length, ...]:
        """`Reader.reading_lengths`; another row's completion is taken to be as long as the row's own."""
        return super().reading_lengths({**row, KL_COLUMN: row["completion"]} if KL_COLUMN in self.responses else row)

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        if KL_COLUMN in self.responses:
            rows = with_others_responses(rows)
        readings = [reading for group, row in enumerate(rows) for reading in named(row, self.readings, group, row)]
        together = all(len(reading.responses) == len(self.responses) for reading in readings)
        together &= self.shared_prefix or self.forward_tokens is None
        if not (self.shared_prefix or together):  # each response with the images that it is read with
            readings = [r._replace(responses=(answer,)) for r in readings for answer in r.responses]
            readings.sort(key=lambda reading: (reading.responses[0][0], reading.group))
        grids = [self._grid(part, together) for part in self._parts(readings)]
        items = [item for grid in grids for item in grid.items]
        end = end_of_turn(self.processor, readings[0].prompt)[-1]
        layout, distinct = tree_layout([(grid.tree, grid.items) for grid in grids], end)
        whole: dict[str, Any] = {"model_inputs": grids[0].model_inputs, "tree": grids[0].tree}
        if len(grids) > 1:
            whole["parts"], whole["part_order"] = in_parts(grids, layout, distinct)
        answers = [response for response, _, _ in in_layout_order(items)]
        return {
            **whole,
            "layout": layout,
            "distinct": distinct,
            **columns_of(rows, answers, self.responses),
            "ref_logps": self._reference_logps(rows, answers),
            "ids": [str(row.get("id", "")) for row in rows],
            PLACEHOLDER: any(row.get(PLACEHOLDER) for row in rows),
        }

    def _parts(self, readings: Sequence[Reading]) -> list[Sequence[Reading]]:
        """The readings as consecutive parts of at most `forward_tokens` tokens, padding counted."""
        if self.forward_tokens is None:
            return [readings]
        shapes = []
        for reading in readings:
            sizes = [(image.height, image.width) for image in reading.images]
            widths = reading_widths([self._length(reading._replace(images=sizes))], self.shared_prefix)
            if sum(widths) > self.forward_tokens:
                raise ValueError(
                    f"{row_name(reading.row)}: its prompt and responses take {sum(widths)} tokens in one piece, above "
                    f"forward_tokens {self.forward_tokens}: raise it, or lower max_length"
                )
            shapes.append(widths)
        return [readings[cut] for cut in consecutive_parts(shapes, self.forward_tokens, self.padding_free)]

    def _grid(self, readings: Sequence[Reading], together: bool) -> Grid:
        """One grid of tokens; together: the responses of a prompt are read behind the same images."""
        prompt_inputs = self.process(readings)
        items = [self.item(source, reading, prompt_inputs) for source, reading in enumerate(readings)]
        copies = 1
        if together and not (self.shared_prefix and (self.forward_tokens is not None or self._saves(items))):
            copies = len(self.responses)  # of each prompt and its images, processed once
            items = [item._replace(responses=item.responses[k : k + 1]) for k in range(copies) for item in items]
        tree = place(items, self.padding_free)
        aligned, other = _token_aligned(self.processor, prompt_inputs)
        model_inputs = grid_inputs(tree, items, prompt_inputs, aligned, tokenizer_of(self.processor).pad_token_id)
        model_inputs |= {name: torch.cat([value] * copies) for name, value in other.items()}
        return Grid(items, tree, model_inputs)

    def _saves(self, items: Sequence[GridItem]) -> bool:
        tree = place(items, self.padding_free)
        return tree.num_unshared_tokens >= self.min_saving * tree.num_tokens

    @property
    def makes_trees(self) -> bool:
        """Whether its batches need more than a causal model's own mask and positions."""
        return self.shared_prefix or self.padding_free

    def _reference_logps(self, rows: Sequence[Row], answers: Sequence[Response]) -> Tensor | None:
        """(N,) the rows' cached reference log-probabilities in the layout's order, or None."""
        cached = [named(row, self._cached, row) for row in rows]
        if all(values is None for values in cached):
            return None
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
