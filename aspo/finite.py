"""Losses that are no number: seen before anything is logged or saved, with the rows that they came from.

Nothing waits for the device at a step: losses are kept as they are, and looked at together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn

NAMED_ROWS = 16  # of a batch, in the message


class FiniteLosses:
    """Keeps the losses since the last check, each with its step and rows."""

    def __init__(self) -> None:
        self._kept: list[tuple[int, Sequence[str], Tensor]] = []

    def note(self, step: int, ids: Sequence[str], loss: Tensor) -> None:
        """loss: () of one micro-batch. ids: its rows'."""
        self._kept.append((step, ids, loss.detach()))

    def check(self, parameters: Iterable[nn.Parameter] = ()) -> None:
        """Raise ValueError in all processes where a loss, or one of `parameters`, is not finite in one of them.

        A collective call: as often in every process.
        """
        found = self._first_bad() or _bad_weights(parameters)
        self._kept.clear()
        everywhere = gather_object([found]) if PartialState().num_processes > 1 else [found]
        if messages := [message for message in everywhere if message]:
            raise ValueError(
                f"{min(messages)}. Nothing was saved since: the last checkpoint is good. Look at those rows, lower "
                "learning_rate, or train in bfloat16 instead of float16"
            )

    def _first_bad(self) -> str | None:
        if not self._kept:
            return None
        finite = torch.stack([loss.float() for _, _, loss in self._kept]).isfinite().tolist()
        for good, (step, ids, loss) in zip(finite, self._kept, strict=True):
            if not good:
                rows = ", ".join(ids[:NAMED_ROWS]) + (f" and {len(ids) - NAMED_ROWS} more" * (len(ids) > NAMED_ROWS))
                return f"the loss is {float(loss)} at step {step}, in a batch of the rows {rows}"
        return None


def _bad_weights(parameters: Iterable[nn.Parameter]) -> str | None:
    # This process's part, where FSDP or ZeRO-3 has them in shards.
    own = [getattr(p.data, "_local_tensor", getattr(p, "ds_tensor", p.data)) for p in parameters]
    own = [p for p in own if p.numel()]
    if own and not bool(torch.stack([p.isfinite().all() for p in own]).all()):
        return "trained weights are no longer finite, though the losses were: a gradient overflowed"
    return None
