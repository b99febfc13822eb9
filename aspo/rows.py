"""Preference rows and prompt rows: reading every form they come in, checking them, and the folder they are kept in.

A row is a dict with TRL's columns: `prompt`, `chosen`, `rejected` (text or message lists), `images` (or `image`); and,
all optional, `id`, `chosen_sentences`/`rejected_sentences` ([start, end] characters), `chosen_similarity` (cosines),
`sample_weight`, `scene` (a JSON object). After `load_rows` images are {"bytes", "path"} dicts with absolute paths, not
yet decoded, responses are texts, and every row has an `id`. docs/data.md has the whole format.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from PIL import Image

from aspo.folder import IMAGE_COLUMNS, ROWS_FILE, image_bytes, image_entries, image_path
from aspo.validate import KINDS, bad_row, named_column, response_text, short_repr, validate_rows

Row = Mapping[str, Any]


def load_rows(
    source: str | Path | datasets.Dataset | Iterable[Row],
    *,
    kind: str = "preference",
    limit: int | None = None,
    image_root: str | Path | None = None,
) -> datasets.Dataset:
    """Rows from anywhere, in one form. Call `validate_rows` before long work.

    Args:
        source: a folder (ours with rows.jsonl, `save_to_disk`'s, or of parquet files), a .jsonl, .json or .parquet
            file, "world:<split>" (the embedded scenes), a `datasets.Dataset`, or rows. LLaVA's rows (`conversations`,
            `image`) are prompts: their first question. RLAIF-V's `question` is a prompt too.
        kind: "preference", "unpaired" (prompt, completion, label) or "prompt".
        limit: only the first `limit` rows.
        image_root: where relative image paths start; by default the folder that holds the file.

    Raises:
        ValueError: unknown kind or form; a row that cannot be read, named with its column.
        FileNotFoundError: no such file or folder.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {list(KINDS)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1, or None for all rows")
    root = Path(image_root) if image_root is not None else None
    rows: datasets.Dataset | list[Any]
    if isinstance(source, str) and source.startswith("world:"):
        rows = _world_rows(source.removeprefix("world:"), limit)
    elif isinstance(source, datasets.Dataset):
        rows = source
    elif isinstance(source, str | Path):
        path = Path(source)
        root = root or (path if path.is_dir() else path.parent)
        rows = _read(path)
    else:
        rows = list(source)
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows)))) if isinstance(rows, datasets.Dataset) else rows[:limit]
    if len(rows) == 0:
        raise ValueError(f"{source if isinstance(source, str | Path) else 'the source'} holds no rows")
    return _to_dataset(rows, kind, (root or Path()).absolute())


def _read(path: Path) -> datasets.Dataset | list[Any]:
    if not path.exists():
        raise FileNotFoundError(
            f"no file or folder {path}; save a hub's data set first: datasets.load_dataset(...).save_to_disk(folder)"
        )
    if path.is_dir():
        if (path / ROWS_FILE).exists():
            return _read_jsonl(path / ROWS_FILE)
        if (path / "state.json").exists():
            return datasets.load_from_disk(str(path))
        if (path / "dataset_dict.json").exists():
            splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
            raise ValueError(f"{path} holds the splits {splits}: name one, e.g. {path / splits[0]}")
        if parquet := sorted(str(p) for p in path.glob("*.parquet")):
            return datasets.Dataset.from_parquet(parquet)
        raise ValueError(f"{path} has no {ROWS_FILE}, no save_to_disk files and no .parquet files")
    if path.suffix == ".parquet":
        return datasets.Dataset.from_parquet(str(path))
    if path.suffix == ".jsonl":
        return _read_jsonl(path)
    if path.suffix == ".json":
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is no JSON: {error}; one object a line goes into a .jsonl file") from error
        if not isinstance(rows, list):
            raise ValueError(f"{path} holds a {type(rows).__name__}; it must be a list of rows")
        return rows
    raise ValueError(f"{path}: unknown form {path.suffix!r}; .jsonl, .json, .parquet or a folder can be read")


def _read_jsonl(path: Path) -> list[Any]:
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    cut = (
                        ""
                        if line.endswith("\n")
                        else "; the last line is unfinished: run again the command that wrote it"
                    )
                    raise ValueError(f"{path}, line {number} is no JSON: {error}{cut}") from error
    return rows


def _world_rows(split: str, limit: int | None) -> list[dict[str, Any]]:
    from aspo.world.data import rows  # the embedded world is optional to everything else here

    return rows(split, n=limit)


def _to_dataset(rows: datasets.Dataset | list[Any], kind: str, root: Path) -> datasets.Dataset:
    """Every row in one form; images stay encoded, message lists and JSON objects keep their exact contents."""
    images = datasets.List(datasets.Image(decode=False))
    if isinstance(rows, datasets.Dataset):
        for name in {"image", *IMAGE_COLUMNS}.intersection(rows.column_names):
            several = isinstance(rows.features[name], datasets.List)
            rows = rows.cast_column(name, images if several else datasets.Image(decode=False))
        as_messages = "prompt" in rows.column_names and not isinstance(rows.features["prompt"], datasets.Value)
        first = _normalise(rows[0], 0, kind, root, as_messages)
        as_messages = as_messages or isinstance(first.get("prompt"), list)  # TRL's implicit prompts
        features = datasets.Features({**rows.features, **dict.fromkeys(IMAGE_COLUMNS, images)})
        features.update({c: datasets.Value("string") for c in ("id", "prompt", "chosen", "rejected") if c in first})
        if as_messages:
            features["prompt"] = datasets.Json()
        return rows.map(
            lambda row, index: _normalise(row, index, kind, root, as_messages),
            with_indices=True,
            remove_columns=[c for c in rows.column_names if c not in first],
            features=datasets.Features({c: features[c] for c in first}),
        )
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(f"row {index} is a {type(row).__name__}; a row is a JSON object")
    as_messages = any(not isinstance(row.get("prompt", ""), str | None) for row in rows)
    made = [_normalise(row, index, kind, root, as_messages) for index, row in enumerate(rows)]
    columns = {c: [row.get(c) for row in made] for c in dict.fromkeys(c for row in made for c in row)}
    features = datasets.Features({c: _feature(c, values) for c, values in columns.items() if c not in IMAGE_COLUMNS})
    for column, feature in features.items():
        if isinstance(feature, datasets.Json):  # as text: its own encoder rounds floats to ten digits
            columns[column] = [None if value is None else json.dumps(value) for value in columns[column]]
    features.update({c: images for c in IMAGE_COLUMNS if c in columns})
    return datasets.Dataset.from_dict(columns, features=features)


def _feature(column: str, values: list[Any]) -> Any:
    if any(_holds_object(value) for value in values):
        return datasets.Json()
    try:
        return datasets.Features.from_arrow_schema(pa.schema({column: pa.array(values).type}))[column]
    except pa.ArrowException as error:
        kinds = sorted({type(value).__name__ for value in values})
        raise ValueError(f"column {column!r} mixes kinds of values ({', '.join(kinds)}): {error}") from error


def _holds_object(value: Any) -> bool:
    return isinstance(value, Mapping) or (isinstance(value, list) and any(_holds_object(item) for item in value))


def _normalise(row: Row, index: int, kind: str, root: Path, as_messages: bool) -> dict[str, Any]:
    made = {key: value for key, value in row.items() if key not in ("image", *IMAGE_COLUMNS, "conversations")}
    made["id"] = str(index) if row.get("id") is None else str(row["id"])
    if row.get("conversations") is not None:
        made["prompt"] = named_column("conversations", index, row, _first_question, row["conversations"])
        if kind == "preference" and row.get("chosen") is None:
            raise bad_row(
                index, row, "chosen", "missing; LLaVA's rows hold one answer: make pairs with `aspo pairs` first"
            )
    if made.get("prompt") is None and isinstance(row.get("question"), str):
        made["prompt"] = row["question"]
    if made.get("prompt") is None and isinstance(row.get("chosen"), list) and isinstance(row.get("rejected"), list):
        made["prompt"], made["chosen"], made["rejected"] = _implicit_prompt(row["chosen"], row["rejected"])
    if as_messages and isinstance(made.get("prompt"), str):
        made["prompt"] = [{"role": "user", "content": made["prompt"]}]
    for column in ("chosen", "rejected", "completion"):
        if made.get(column) is not None:
            made[column] = named_column(column, index, row, response_text, made[column])
    for column in IMAGE_COLUMNS:
        if column == "images" or column in row:
            entries = image_entries(row, column)
            made[column] = [named_column(column, index, row, _image_entry, entry, root) for entry in entries]
    return made


def _image_entry(entry: Any, root: Path) -> dict[str, Any]:
    if isinstance(entry, Image.Image) or (isinstance(entry, Mapping) and entry.get("bytes") is not None):
        return {"bytes": image_bytes(entry), "path": None}
    return {"bytes": None, "path": str(image_path(entry, root))}


def _first_question(conversation: Any) -> str:
    if not isinstance(conversation, list) or not conversation:
        raise ValueError("it must be a list of {'from', 'value'} turns")
    first = conversation[0]
    turn = first if isinstance(first, Mapping) else {}
    if turn.get("from") not in ("human", "user") or not isinstance(turn.get("value"), str):
        raise ValueError(f"the first turn must be {{'from': 'human', 'value': text}}, got {short_repr(first)}")
    return turn["value"]


def _implicit_prompt(chosen: list[Any], rejected: list[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """TRL's implicit prompt: the messages that both conversations begin with."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    return chosen[:shared] or None, chosen[shared:], rejected[shared:]  # type: ignore[return-value]


__all__ = ["load_rows", "response_text", "validate_rows"]
