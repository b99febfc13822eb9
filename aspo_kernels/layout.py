"""SentenceLayout: which tokens count, and how they group into sentences, responses and preference items.

Axes: N counted tokens, S sentences, R responses, B items (pairs), T padded length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from aspo_kernels.layout_capacity import padded_fields, tensors_to_copy
from aspo_kernels.layout_checks import (
    check_groups,
    check_integer,
    check_offsets,
    check_sentence_steps,
    check_shapes,
)

IGNORE_INDEX = -100


@dataclass(frozen=True)
class SentenceLayout:
    """Packed tokens of all responses of a batch, cut into sentences.

    Made on the CPU, in the collator: the contents are checked there, so that nothing later has to wait for a device.
    A layout made from tensors that are already on an accelerator is checked for shapes and dtypes only; call
    `validate()` to check its contents too (that waits for the device).

    Fixed capacity, for CUDA graphs: `padded_to(tokens=..., sentences=..., chosen_sentences=...)` has the same responses
    in tensors of a fixed size, whose tail belongs to no response: no loss reads it, its tokens get gradient 0. Capture
    with one such layout on the device, then `static.copy_(next_batch.padded_to(...))` and replay. N, S and S_chosen of
    everything that goes with it (logps, similarity, sentence_weights) are then the capacities.

    Args:
        targets: (N,) int64, the counted tokens, response after response.
        hidden_index: (N,) int64, the row of the flattened hidden states that predicts target n. Duplicates are
            allowed: with a shared prefix the prompt's last token predicts the first token of two responses.
        sentence_offsets: (S+1,) int64 over tokens; sentence s holds tokens `offsets[s]:offsets[s+1]`, at least one.
        response_offsets: (R+1,) int64 over sentences; response r holds sentences `offsets[r]:offsets[r+1]`.
        group: (R,) int64, the item of each response, 0..B-1.
        role: (R,) int64, 0 = chosen, 1.. = the others (rejected, further negatives).
        perplexity_mask: (N,) bool or None, tokens that a sentence's perplexity averages over. EOS belongs to the
            last sentence's log-ratio but not to its perplexity. None = all of them.
        padded_shape: (R, T) of the hidden states that hidden_index was made for, so that hidden states of another
            shape are refused and not read at the wrong rows; None = unknown.
    """

    targets: Tensor
    hidden_index: Tensor
    sentence_offsets: Tensor
    response_offsets: Tensor
    group: Tensor
    role: Tensor
    perplexity_mask: Tensor | None = None
    padded_shape: tuple[int, int] | None = None

    # Derived once, on the layout's device: index tensors that the losses use.
    num_items: int = field(init=False, default=-1)
    hidden_rows: int = field(init=False, default=0)  # max(hidden_index) + 1
    empty_responses: tuple[tuple[int, int], ...] = field(init=False, default=())  # (item, role) of each empty one
    role_responses: tuple[Tensor | None, ...] = field(init=False, repr=False, default=())  # see with_role
    chosen_sentences: Tensor = field(init=False, repr=False)  # (S_chosen,) in packed order
    chosen_starts: Tensor = field(init=False, repr=False)  # (B,) where each item's part of chosen_sentences begins
    padded: bool = field(init=False, default=False)  # made by padded_to: there may be a tail

    def __post_init__(self) -> None:
        check_shapes(self)
        if self.targets.device.type == "cpu":
            self.validate()
        # One look at the contents here, on the host, so that no loss has to look again on a device.
        device, role, group = self.targets.device, self.role.cpu(), self.group.cpu()
        lengths = self.response_offsets.cpu().diff()
        num_items = int(group.max()) + 1 if group.numel() else 0
        rows_of = [torch.nonzero(role == k).flatten() for k in range(int(role.max()) + 1 if role.numel() else 0)]
        in_item_order = [rows[torch.argsort(group[rows])] for rows in rows_of]
        one_per_item = [torch.equal(group[rows], torch.arange(num_items)) for rows in in_item_order]
        empty = torch.nonzero(lengths == 0).flatten().tolist()
        chosen_before = torch.where(role == 0, lengths, 0).cumsum(0) - lengths  # at a chosen response
        chosen_rows = in_item_order[0] if one_per_item and one_per_item[0] else role.new_empty(0)
        derived = {
            "num_items": num_items,
            "hidden_rows": int(self.hidden_index.max()) + 1 if self.num_tokens else 0,
            "empty_responses": tuple((int(group[r]), int(role[r])) for r in empty),
            "role_responses": tuple(
                rows.to(device) if one else None for rows, one in zip(in_item_order, one_per_item, strict=True)
            ),
            "chosen_sentences": torch.nonzero(torch.repeat_interleave(role == 0, lengths)).flatten().to(device),
            "chosen_starts": chosen_before[chosen_rows].to(device),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    @property
    def num_tokens(self) -> int:
        """N, counted tokens (padded: the capacity)."""
        return self.targets.numel()

    @property
    def num_sentences(self) -> int:
        """S, sentences of all responses (padded: the capacity)."""
        return self.sentence_offsets.numel() - 1

    @property
    def num_responses(self) -> int:
        """R, responses of all items."""
        return self.response_offsets.numel() - 1

    @property
    def response_token_offsets(self) -> Tensor:
        """(R+1,) offsets of responses over tokens."""
        return self.sentence_offsets[self.response_offsets]

    def used_sizes(self) -> tuple[int, int, int]:
        """How many tokens, sentences and chosen sentences belong to a response (waits for the device)."""
        sentences = self.response_offsets[-1]
        chosen = (self.chosen_sentences < sentences).sum()
        return int(self.sentence_offsets[sentences]), int(sentences), int(chosen)

    def with_role(self, role: int) -> Tensor:
        """(B,) the response of each item that has `role`; every item must have exactly one."""
        rows = self.role_responses[role] if role < len(self.role_responses) else None
        if rows is None and self.num_items:
            raise ValueError(f"not every item has exactly one response of role {role}, which this objective needs")
        return self.targets.new_empty(0) if rows is None else rows

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SentenceLayout:
        """The same layout on another device; nothing is checked or derived again."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> SentenceLayout:
        """The same layout in pinned host memory (a DataLoader calls this)."""
        return self._map(Tensor.pin_memory)

    def _map(self, move: Callable[[Tensor], Tensor]) -> SentenceLayout:
        moved = object.__new__(SentenceLayout)
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                value = move(value)
            elif f.name == "role_responses":
                value = tuple(rows if rows is None else move(rows) for rows in value)
            object.__setattr__(moved, f.name, value)
        return moved

    def padded_to(self, *, tokens: int, sentences: int, chosen_sentences: int) -> SentenceLayout:
        """The same responses in tensors of fixed sizes: N, S and S_chosen become these capacities (see the class).

        The tail's sentences are empty; its tokens have target 0 and rows that exist, spread out because the backward
        of a gather adds up the tokens of one row one after the other. The tail of chosen_sentences names the last,
        empty sentence.

        Raises:
            ValueError: a capacity is too small; or no sentence is left over for the tail of chosen_sentences.
        """
        changed = padded_fields(self, tokens, sentences, chosen_sentences)
        padded = self._map(Tensor.clone)  # nothing shared: copy_ will write into it
        for name, value in changed.items():
            object.__setattr__(padded, name, value)
        return padded

    def copy_(self, other: SentenceLayout, non_blocking: bool = False) -> SentenceLayout:
        """Overwrite this layout's tensors, in place, with another's of the same shapes: before a graph's replay.

        Raises:
            ValueError: a shape, padded_shape or the items' roles differ; `other` has an empty response, or rows of
                hidden states beyond those of an unknown padded_shape. A replay would not notice.
        """
        other.require_nonempty()
        for mine, its in tensors_to_copy(self, other):
            mine.copy_(its, non_blocking=non_blocking)
        return self

    def require_nonempty(self) -> None:
        """Raise ValueError naming the first pair with an empty response."""
        if self.empty_responses:
            item, role = self.empty_responses[0]
            name = "chosen" if role == 0 else "rejected" if role == 1 else f"role-{role}"
            raise ValueError(
                f"pair {item}: its {name} response has no counted token; drop the pair, or check that truncation "
                f"left some of the response ({len(self.empty_responses)} empty responses in this batch)"
            )

    def validate(self) -> None:
        """Check the contents (waits for the device if the layout is on one)."""
        num_tokens, num_sentences = self.num_tokens, self.num_sentences
        if self.padded:
            used = self.used_sizes()
            num_tokens, num_sentences = min(num_tokens, used[0]), used[1]
        check_offsets("sentence_offsets", self.sentence_offsets, num_tokens)
        check_offsets("response_offsets", self.response_offsets, num_sentences)
        empty = torch.nonzero(self.sentence_offsets[: num_sentences + 1].diff() == 0).flatten()
        if empty.numel():
            raise ValueError(f"sentence {int(empty[0])} has no token; every sentence needs at least one")
        if self.perplexity_mask is not None:
            counted = torch.segment_reduce(self.perplexity_mask.double(), "sum", offsets=self.sentence_offsets)
            counted = counted[:num_sentences]
            if counted.numel() and float(counted.min()) == 0:
                raise ValueError(f"perplexity_mask leaves no token of sentence {int(counted.argmin())}")
        for name in ("targets", "hidden_index", "group", "role"):
            value = getattr(self, name)
            if value.numel() and int(value.min()) < 0:
                at = int(value.argmin())
                raise ValueError(f"{name}[{at}] is {int(value[at])}; it must not be negative")
        check_groups(self.group, self.role)

    @classmethod
    def from_labels(
        cls,
        labels: Tensor,
        sentence_ids: Tensor,
        eos_token_id: int | None = None,
        *,
        group: Tensor | None = None,
        role: Tensor | None = None,
    ) -> SentenceLayout:
        """Layout of a padded batch: chosen rows 0..B-1, then rejected rows B..2B-1.

        Args:
            labels: (R, T) integers. `labels[r, t]` is the token that `hidden[r, t]` predicts (labels are already
                shifted), -100 = not counted.
            sentence_ids: (R, T) integers, read only where the label counts; within a row they count 0, 1, 2.. without
                gaps and never go backwards.
            eos_token_id: where given, a counted EOS at the end of a response is left out of its sentence's
                perplexity (unless it is all the sentence has).
            group, role: (R,) for other arrangements, e.g. several rejected responses to one prompt.

        Packed order is row-major over counted positions.
        """
        if labels.dim() != 2 or sentence_ids.shape != labels.shape:
            raise ValueError(
                f"labels and sentence_ids must be (R, T) and alike, got {tuple(labels.shape)} and "
                f"{tuple(sentence_ids.shape)}"
            )
        check_integer(labels=labels, sentence_ids=sentence_ids)
        rows, length = labels.shape
        if (group is None) != (role is None):
            raise ValueError("group and role go together: pass both or neither")
        if group is None or role is None:
            if rows % 2:
                raise ValueError(f"labels has {rows} rows: chosen and rejected rows must be equally many")
            pairs = torch.arange(rows, device=labels.device)
            group, role = pairs % (rows // 2 or 1), pairs // (rows // 2 or 1)

        counted = labels != IGNORE_INDEX
        row, column = torch.nonzero(counted, as_tuple=True)
        ids = sentence_ids[row, column].long()
        first_of_row = torch.ones_like(row, dtype=torch.bool)
        first_of_row[1:] = row[1:] != row[:-1]
        step = torch.where(first_of_row, ids, ids.diff(prepend=ids[:1]))
        check_sentence_steps(step, first_of_row, row, column, ids)

        starts = torch.nonzero(first_of_row | (step == 1)).flatten()
        num_tokens = row.numel()
        sentence_offsets = torch.cat([starts, starts.new_tensor([num_tokens])])
        sentences_per_row = torch.bincount(row[starts], minlength=rows)
        response_offsets = torch.cat([starts.new_zeros(1), sentences_per_row.cumsum(0)])
        targets = labels[row, column].long()
        return cls(
            targets=targets,
            hidden_index=row * length + column,
            sentence_offsets=sentence_offsets,
            response_offsets=response_offsets,
            group=group.long(),
            role=role.long(),
            perplexity_mask=without_final_eos(targets, sentence_offsets, response_offsets, eos_token_id),
            padded_shape=(rows, length),
        )


def without_final_eos(
    targets: Tensor, sentence_offsets: Tensor, response_offsets: Tensor, eos_token_id: int | None
) -> Tensor | None:
    if eos_token_id is None:
        return None
    mask = torch.ones_like(targets, dtype=torch.bool)
    ends = response_offsets[1:][response_offsets.diff() > 0]  # one past each response's last sentence
    last_token = sentence_offsets[ends] - 1
    longer_than_one = sentence_offsets[ends] - sentence_offsets[ends - 1] > 1
    mask[last_token[(targets[last_token] == eos_token_id) & longer_than_one]] = False
    return mask


__all__ = ["IGNORE_INDEX", "SentenceLayout"]
