"""The methods of `aspo pairs`, a file each.

A method's module has

    OPTIONS     the options that it reads -> their defaults; any other option that is given is refused
    DROPPED     status of a row of --data that gave nothing -> how the summary calls it
    NOUNS       what it makes, of what: as the summary calls them
    check(rows, options)            raises ValueError before anything is loaded
    maker(options, load) -> Make    loads what it needs (`load()`: model and processor) and makes rows of rows

but for `negative_images`, which runs `aspo negatives`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Row = Mapping[str, Any]
Options = Mapping[str, Any]
Load = Callable[[], tuple[Any, Any]]

MADE = "made"
METHODS = {  # name -> (module, what it makes)
    "seva": ("seva", "chosen: the answer to the image, rejected: to the image under diffusion noise (the default)"),
    "povid": ("povid", "pairs, and beside each chosen token what the model says in its place under noise"),
    "csr": ("csr", "the best and the worst answer of a tree of sampled sentences, by CLIP and own log-probability"),
    "sentinel": ("sentinel", "a faithful and a hallucinated next sentence behind the same beginning of an answer"),
    **{
        name: ("negative_images", f"negative images for pairs, or for SeVa's pairs of prompts: {what}")
        for name, what in (
            ("crop", "parts of the image (mDPO)"),
            ("noise", "the image under diffusion noise"),
            ("random", "other images, at random"),
            ("hard", "the nearest other images"),
            ("misp", "MISP-DPO's choice"),
        )
    },
    "unpaired": ("unpaired", "no new answers: each pair becomes two rows of prompt, completion and label, for KTO"),
}


@dataclass(frozen=True)
class Made:
    """What became of one row of --data.

    status: MADE, or why it gave nothing (a key of the method's DROPPED).
    rows: the rows made of it.
    counts: what else the summary adds up, by the words that it says it with.
    """

    status: str
    rows: Sequence[Row] = ()
    counts: Mapping[str, int] = field(default_factory=dict)


Make = Callable[[Sequence[Row], int], list[Made]]
"""(rows of one batch, place of the first one in the data) -> one Made for each."""


def kept_columns(row: Row) -> dict[str, Any]:
    """What a new pair keeps of its prompt's row."""
    return {key: row[key] for key in ("id", "prompt", "images", "scene") if row.get(key) is not None}
