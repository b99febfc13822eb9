"""Margins of minimal pairs: log p(true sentence) - log p(false sentence), all pairs of a row behind one prefix.

The sentences of a row's pairs are read behind the same prompt and image, which are computed once for all of them where
that is exact for the model (`aspo.shared_prefix.exact`), and once for each sentence otherwise.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from aspo.data import Collator
from aspo.model import base_model, inference, output_head, response_logps
from aspo.shared_prefix.attention import routes_to_try, set_text_attention, with_route
from aspo.shared_prefix.exact import check_tree
from aspo.shared_prefix.forward import PairForward, batch_to
from aspo_kernels import SentenceLayout
from aspo_kernels.segments import segment_sum

Pairs = Sequence[tuple[str, str]]
ROUTE = "segments"  # of attention: adds up in the order of a plain row's, which masks do not

_exact: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # whether a model takes shared prefixes


def margins(
    model: nn.Module, processor: Any, rows: Sequence[Mapping[str, Any]], pairs: Sequence[Pairs], batch_size: int
) -> list[list[float]]:
    """The margin of every pair of every row, teacher-forced as the start of an answer, in nats.

    rows: `prompt` and `images` are read. pairs: (true sentence, false sentence) for each row, which may have none.
    batch_size: rows at a time. The end-of-turn token is not counted.
    """
    by_count: dict[int, list[int]] = defaultdict(list)  # rows of as many pairs have the same response columns
    for index, of_row in enumerate(pairs):
        by_count[len(of_row)].append(index)
    found: list[list[float]] = [[] for _ in rows]
    for count, indices in by_count.items():
        if count:
            table = _margins(model, processor, [_row(rows[i], pairs[i]) for i in indices], count, batch_size)
            for index, values in zip(indices, table, strict=True):
                found[index] = values
    return found


def _row(row: Mapping[str, Any], pairs: Pairs) -> dict[str, Any]:
    """A row whose responses are the pairs' sentences; each is one sentence, and needs no splitter."""
    sentences = [sentence for pair in pairs for sentence in pair]
    columns = {f"side{k}": sentence for k, sentence in enumerate(sentences)}
    spans = {f"side{k}_sentences": [[0, len(sentence)]] for k, sentence in enumerate(sentences)}
    return {"prompt": row["prompt"], "images": row["images"], **columns, **spans}


def _margins(model: nn.Module, processor: Any, rows: list[dict[str, Any]], count: int, size: int) -> list[list[float]]:
    columns = [f"side{k}" for k in range(2 * count)]
    shared = Collator(processor, responses=columns, shared_prefix=True)
    found: list[list[float]] = []
    if not _can_share(model, shared, rows[:2]):
        plain = Collator(processor, responses=columns)
        for scored in response_logps(model, processor, rows, batch_size=max(1, size // count), collator=plain):
            found += _differences(scored.logps, scored.layout, count)
        return found
    forward = PairForward(model, None, ROUTE, False, "auto")
    own = with_route(model, ROUTE)
    try:
        for start in range(0, len(rows), size):
            batch = batch_to(shared(rows[start : start + size]), output_head(model).weight.device)
            with inference(model):
                logps, _ = forward.logps(batch, with_reference=False)
            found += _differences(logps.cpu(), batch["layout"].to("cpu"), count)
    finally:
        set_text_attention(model, own)
    return found


def _can_share(model: nn.Module, collator: Collator, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the model takes these rows with shared prefixes, tried once for each model."""
    key = base_model(model)
    if key not in _exact:
        _exact[key] = ROUTE in routes_to_try(model)
        if _exact[key]:
            own = with_route(model, ROUTE)
            try:
                _exact[key] = check_tree(model, collator, rows, ROUTE) is None
            finally:
                set_text_attention(model, own)
    return _exact[key]


def _differences(logps: Tensor, layout: SentenceLayout, count: int) -> list[list[float]]:
    """(rows, count) true minus false, from responses that are ordered by side and then by row."""
    mask = layout.perplexity_mask
    sums = segment_sum(logps if mask is None else logps * mask, layout.response_token_offsets)
    sides = sums.view(count, 2, -1)
    return (sides[:, 0] - sides[:, 1]).T.tolist()
