"""Pairs as unpaired rows, for KTO: each response with a label, true for the chosen one (TRL's columns)."""

from collections.abc import Sequence

from aspo.data import validate_rows
from aspo.pairs import MADE, Load, Made, Make, Options, Row, kept_columns

OPTIONS: dict[str, None] = {}
NOUNS = ("rows", "pairs")
DROPPED: dict[str, str] = {}


def check(rows: Sequence[Row], options: Options) -> None:
    """Raises ValueError for rows that are no pairs."""
    validate_rows(rows)


def maker(options: Options, load: Load) -> Make:
    """See `aspo.pairs`. Nothing is loaded."""

    def make(rows: Sequence[Row], start: int) -> list[Made]:
        return [Made(MADE, [_labelled(row, column) for column in ("chosen", "rejected")]) for row in rows]

    return make


def _labelled(row: Row, column: str) -> Row:
    of_both = {name: row[name] for name in ("unfinished", "sample_weight") if row.get(name) is not None}
    own = {"images": row[f"{column}_images"]} if row.get(f"{column}_images") else {}  # read with other images
    return {
        **kept_columns(row),
        **of_both,
        **own,
        "id": f"{row['id']}-{column}",
        "completion": row[column],
        "label": column == "chosen",
    }
