"""Lengths of rows in tokens before training, which batches are packed by: no pixel is decoded, no tensor made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from PIL import Image
from torch.utils.data import DataLoader

from aspo.images import image_entries, image_size
from aspo.prompts import Prompt, encode_prompt, run_processor, tokenizer_of

Row = Mapping[str, Any]
Size = tuple[int, int]  # an image's height and width in pixels, in transformers' order
Length = tuple[int, tuple[int, ...]]  # tokens of a prompt with its images, and of each response read behind it
PROBE_SIZES: tuple[Size, ...] = ((336, 336), (200, 800), (1000, 300))


class Counter(Protocol):
    """What can tell a row's tokens: `aspo.data.Collator`."""

    def reading_lengths(self, row: Row) -> tuple[Length, ...]:
        """One Length for each prompt with images that responses of the row are read behind; usually one."""


def row_lengths(rows: Any, collator: Counter, num_workers: int = 0) -> list[tuple[Length, ...]]:
    """`collator.reading_lengths` of every row, in the rows' order.

    rows: a sequence of dicts. num_workers: processes that share the work (0 = this one). torch's global random state is
    left as it is. Raises ValueError for a stream, and for a collator that cannot tell lengths.
    """
    if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
        raise ValueError(
            f"{type(rows).__name__} is a stream, but batches by tokens need every row's length before training: "
            "load the rows (aspo.data.load_rows), or leave token_budget and group_by_length off"
        )
    if not hasattr(collator, "reading_lengths"):
        raise ValueError(
            f"{type(collator).__name__} has no method `reading_lengths`: use aspo.data.Collator, or leave token_budget "
            "and group_by_length off"
        )
    count: Any = collator.reading_lengths  # of one row, where DataLoader's type asks for a list of them
    return list(
        DataLoader(rows, batch_size=None, collate_fn=count, num_workers=num_workers, generator=torch.Generator())
    )


def image_sizes(row: Row, column: str = "images") -> list[Size]:
    """(height, width) of the images of one of the row's image columns, from their headers: nothing is decoded."""
    return [image_size(entry) for entry in image_entries(row, column)]


class PromptLength:
    """Tokens of a prompt as the processor makes it, from its text and the sizes of its images.

    A processor that can say how many tokens an image becomes (`_get_num_multimodal_tokens`) is asked. Its answer counts
    the marks around an image or not, family by family, and is wrong for some (LLaVA-OneVision with several images): it
    is held against real processing of blank images in three shapes, for each number of images, and used where
    the difference is the same for all three. Otherwise the processor runs on blank images of the row's sizes, once for
    each combination of sizes. Exact unless the tokenizer merges a prompt's text with that around an image.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self._offsets: dict[int, int | None] = {}  # number of images -> tokens beside the processor's own count
        self._known: dict[tuple[Size, ...], int] = {}

    def __call__(self, prompt: Prompt, sizes: Sequence[Size]) -> int:
        """Tokens of `prompt` with images of these sizes."""
        return self._text_tokens(prompt) + self.image_tokens(sizes)

    def image_tokens(self, sizes: Sequence[Size]) -> int:
        """Tokens that a prompt's images, and whatever else the processor writes, add to the prompt's plain text."""
        sizes = tuple(sizes)
        if sizes not in self._known:
            if len(sizes) not in self._offsets:
                self._offsets[len(sizes)] = self._offset(len(sizes))
            offset = self._offsets[len(sizes)]
            self._known[sizes] = self._measure(sizes) if offset is None else offset + (self._told(sizes) or 0)
        return self._known[sizes]

    def _text_tokens(self, prompt: Prompt) -> int:
        tokenizer = tokenizer_of(self.processor)
        return len(tokenizer(prompt.text, add_special_tokens=prompt.add_special_tokens)["input_ids"])

    def _offset(self, num_images: int) -> int | None:
        """What to add to the processor's own count; None where no number is right for all probes."""
        probes = [(size,) * num_images for size in PROBE_SIZES] if num_images else [()]
        differences = set()
        for probe in probes:
            told = self._told(probe)
            if told is None:
                return None
            differences.add(self._measure(probe) - told)
        return differences.pop() if len(differences) == 1 else None

    def _told(self, sizes: tuple[Size, ...]) -> int | None:
        """The processor's own count of the images' tokens, or None where it has none."""
        if not sizes:
            return 0
        try:
            return sum(self.processor._get_num_multimodal_tokens(image_sizes=list(sizes))["num_image_tokens"])
        except (AttributeError, KeyError, TypeError, NotImplementedError):  # not of every family, nor of every version
            return None

    def _measure(self, sizes: tuple[Size, ...]) -> int:
        """Tokens beyond the text's, by running the processor on blank images."""
        images = [Image.new("RGB", (width, height)) for height, width in sizes]
        prompt = encode_prompt(self.processor, "Describe it.", images)  # the same for all: lengths must not depend on
        inputs = run_processor(self.processor, [prompt], [images], padding_side="right")  # which row comes first
        return int(inputs["attention_mask"].sum()) - self._text_tokens(prompt)


def reading_widths(lengths: Sequence[Length], shared: bool) -> list[int]:
    """Tokens of each row of the grid that readings make: a row for each reading (shared), or for each response."""
    if shared:
        return [prompt + sum(responses) for prompt, responses in lengths]
    return [prompt + response for prompt, responses in lengths for response in responses]


def consecutive_parts(widths: Sequence[Sequence[int]], most: int, padding_free: bool) -> list[slice]:
    """Consecutive readings, given by the widths of their grid rows, in parts of at most `most` tokens, padding counted.

    A reading that alone has more is a part of its own.
    """
    cuts: list[int] = [0]
    rows: list[int] = []
    for n, own in enumerate(widths):
        grown = [*rows, *own]
        if rows and (sum(grown) if padding_free else len(grown) * max(grown)) > most:
            cuts.append(n)
            grown = [*own]
        rows = grown
    return [slice(a, b) for a, b in zip(cuts, [*cuts[1:], len(widths)], strict=True)]
