"""What rows bring for objectives besides their tokens, as tensors in the layout's order (`objectives.Inputs`).

Axes: B rows, R responses, S sentences, N counted tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from aspo.folder import row_name
from aspo.shared_prefix.grid import NOT_COUNTED, Response

PAIRED, KL_COLUMN = ("chosen", "rejected"), "kl_completion"
UNPAIRED = ("completion", KL_COLUMN)  # the responses of unpaired rows: the row's own, and another row's

Row = Mapping[str, Any]


def columns_of(rows: Sequence[Row], answers: Sequence[Response], columns: Sequence[str]) -> dict[str, Tensor | None]:
    """A batch's entries; None where the rows bring nothing.

    answers: every response in the layout's order. columns: those that hold responses of the rows' own images, by role.

    Raises ValueError, naming the row, where one lacks what the others have.
    """
    of_role = {role: [response for response in answers if response.role == role] for role in (0, 1)}
    return {
        "similarity": _all_or_none(rows, "similarity", [response.similarity for response in of_role[0]]),
        "rejected_similarity": _rejected_similarity(rows, answers, of_role[1]),
        "sentence_weights": _sentence_weights(rows, answers, of_role[0]),
        "token_scores": _token_scores(rows, answers, columns),
        "negative_log_q": _negative_log_q(rows, answers, len(columns)),
        "desirable": _labels(rows) if KL_COLUMN in columns else None,  # pairs may have a column of that name
        "sample_weight": _sample_weights(rows),
    }


def with_others_responses(rows: Sequence[Row]) -> list[Row]:
    """Each row with the completion of the row before it, from which KTO estimates the divergence.

    Rows that were made of one pair stand side by side: the nearest row before with another prompt or image is taken.
    """
    if len(rows) < 2:
        raise ValueError("kto compares each response with one to another prompt: it needs two rows in a forward pass")
    asked = [(row["prompt"], row.get("images")) for row in rows]
    back = [next((k for k in range(1, len(rows)) if asked[n - k] != asked[n]), 1) for n in range(len(rows))]
    return [{**row, KL_COLUMN: rows[n - back[n]]["completion"]} for n, row in enumerate(rows)]


def _all_or_none(rows: Sequence[Row], name: str, values: Sequence[list[float] | None]) -> Tensor | None:
    """The values of one response a row, joined; None where no row has any."""
    if all(value is None for value in values):
        return None
    for row, value in zip(rows, values, strict=True):
        if value is None:
            raise ValueError(f"{row_name(row)}: no chosen_{name}, but other rows have it: give it to every row")
    return torch.tensor([x for value in values for x in value or ()], dtype=torch.float32)


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
    rejected = [response for response in answers if response.role == 1]
    if any(response.weights is not None for response in rejected):
        for response in rejected:
            if response.weights is None:
                raise ValueError(
                    f"{row_name(rows[response.group])}: no rejected_sentence_weights, but other rows have it"
                )
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


def _sample_weights(rows: Sequence[Row]) -> Tensor | None:
    weights = [row.get("sample_weight") for row in rows]
    if all(weight is None for weight in weights):
        return None
    return torch.tensor([1.0 if weight is None else weight for weight in weights], dtype=torch.float32)
