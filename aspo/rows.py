"""Preference rows and prompt rows: reading every form they come in, checking them, and the folder they are kept in.

A row is a dict with TRL's columns: `prompt`, `chosen`, `rejected` (text or message lists), `images` (or `image`); and,
all optional, `id`, `chosen_sentences`/`rejected_sentences` ([start, end] characters), `chosen_similarity` (cosines),
`sample_weight`, `scene` (a JSON object). After `load_rows` images are {"bytes", "path"} dicts with absolute paths, not
yet decoded, responses are texts, and every row has an `id`. docs/data.md has the whole format.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa

from aspo.conversations import asked, has_messages, implicit_prompt, is_answered
from aspo.folder import IMAGE_COLUMNS, ROWS_FILE
from aspo.images import check_within, image_bytes, image_entries, image_path, in_memory, is_file, short_path
from aspo.validate import KINDS, bad_row, named_column, response_text, short_repr, validate_rows

ENCODED = datasets.List(datasets.Image(decode=False))
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
            `image`) are prompts: their first question; beside `chosen` or `completion`, as LLaMA-Factory has them, all
            turns are the prompt. RLAIF-V's `question` is a prompt too.
        kind: "preference", "unpaired" (prompt, completion, label) or "prompt".
        limit: only the first `limit` rows.
        image_root: where relative image paths start, and a folder in which images may lie; by default the folder that
            holds the file. Rows read from a file may name no images outside of these two, rows from Python may.

    Raises:
        ValueError: unknown kind or form; a row that cannot be read, or names an image where it may not, named with its
            column.
        FileNotFoundError: no such file or folder.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {list(KINDS)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1, or None for all rows")
    places = Places(Path(image_root or ""))
    rows: datasets.Dataset | list[Any]
    if isinstance(source, str) and source.startswith("world:"):
        rows = _world_rows(source.removeprefix("world:"), limit)
    elif isinstance(source, datasets.Dataset):
        rows = source
    elif isinstance(source, str | Path):
        path = Path(source)
        rows = _read(path)
        places = Places.of_file(path if path.is_dir() else path.parent, image_root)
    else:
        rows = list(source)
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows)))) if isinstance(rows, datasets.Dataset) else rows[:limit]
    if len(rows) == 0:
        raise ValueError(f"{source if isinstance(source, str | Path) else 'the source'} holds no rows")
    return _to_dataset(rows, kind, places)


class Places(NamedTuple):
    """Where images lie: relative paths start at `root`; of a file's rows all images lie in the folders `within`."""

    root: Path
    within: tuple[Path, ...] = ()

    @classmethod
    def of_file(cls, folder: Path, image_root: str | Path | None) -> Places:
        """Those of rows in a file of `folder`: images lie there, or in image_root."""
        folders = [folder] if image_root is None else [Path(image_root), folder]
        return cls(folders[0], tuple(dict.fromkeys(place.resolve() for place in folders)))

    def find(self, entry: Any) -> Path:
        """The absolute path of an image entry. Raises ValueError where it leads out of `within`."""
        path = image_path(entry, self.root).absolute()
        if not self.within:
            return path
        places: tuple[Path, ...] = (path,)
        if not is_file(path):  # image_root allows more folders without having to be where all paths start
            places = tuple(dict.fromkeys(image_path(entry, place) for place in self.within))
            path = next(filter(is_file, places), path)
        check_within(path, self.within)
        if len(places) > 1 and not is_file(path):
            raise ValueError(f"no image file {' nor '.join(map(short_path, places))}: check the path, or image_root")
        return path


def _read(path: Path) -> datasets.Dataset | list[Any]:
    if not path.exists():
        raise FileNotFoundError(
            f"no file or folder {path}; save a hub's data set first: datasets.load_dataset(...).save_to_disk(folder)"
        )
    if path.is_dir():
        if (path / ROWS_FILE).exists():
            return _read_jsonl(path / ROWS_FILE)
        if (path / "state.json").exists():
            return _read_saved(path)
        if (path / "dataset_dict.json").exists():
            splits = sorted(p.parent.name for p in path.glob("*/state.json"))
            raise ValueError(f"{path} holds the splits {splits}: name one, as {path / (splits or ['train'])[0]}")
        if parquet := sorted(str(p) for p in path.glob("*.parquet")):
            return _arrow(path, datasets.Dataset.from_parquet, parquet)
        raise ValueError(f"{path} has no {ROWS_FILE}, no save_to_disk files and no .parquet files")
    if path.suffix == ".parquet":
        return _arrow(path, datasets.Dataset.from_parquet, str(path))
    if path.suffix == ".jsonl":
        return _read_jsonl(path)
    if path.suffix == ".json":
        rows = parse_json(path.read_bytes(), str(path), "; one object a line goes into a .jsonl file")
        if not isinstance(rows, list):
            raise ValueError(f"{path} holds a {type(rows).__name__}; it must be a list of rows")
        return rows
    raise ValueError(f"{path}: unknown form {path.suffix!r}; .jsonl, .json, .parquet or a folder can be read")


def _read_jsonl(path: Path) -> list[Any]:
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                whole = line.endswith(b"\n")
                cut = "" if whole else "; the last line is unfinished: run again the command that wrote it"
                rows.append(parse_json(line, f"{path}, line {number}", cut))
    return rows


def parse_json(content: bytes, where: str, hint: str = "") -> Any:
    """UTF-8 JSON. Raises ValueError, which begins with `where`, for anything else."""
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{where} is no JSON: {what}{hint}") from error


def _read_saved(path: Path) -> datasets.Dataset:
    """A folder of `save_to_disk`, whose state.json may name files of the folder only."""
    state = parse_json((path / "state.json").read_bytes(), str(path / "state.json"))
    files = state.get("_data_files") if isinstance(state, Mapping) else None
    names = [file.get("filename") if isinstance(file, Mapping) else None for file in files or ()]
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ValueError(f"{path / 'state.json'} names data files {short_repr(names)}; they must lie in the folder")
    return _arrow(path, datasets.load_from_disk, str(path))


def _arrow(path: Path, read: Callable[[Any], Any], source: Any) -> datasets.Dataset:
    """Rows in Arrow's files; whatever the libraries raise over broken ones becomes a ValueError."""
    try:
        return read(source)
    except Exception as error:  # of pyarrow, datasets, and Python's own
        cause = error.__cause__ or error  # datasets says no more than that there was one
        text = " ".join(str(cause).split())[:300]
        raise ValueError(f"{path} cannot be read: {type(cause).__name__}: {text}") from error


def _world_rows(split: str, limit: int | None) -> list[dict[str, Any]]:
    from aspo.world.data import rows  # the embedded world is optional to everything else here

    return rows(split, n=limit)


def _to_dataset(rows: datasets.Dataset | list[Any], kind: str, places: Places) -> datasets.Dataset:
    """Every row in one form; images stay encoded, message lists and JSON objects keep their exact contents."""
    if isinstance(rows, datasets.Dataset):
        return _from_dataset(rows, kind, places)
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(f"row {index} is a {type(row).__name__}; a row is a JSON object")
    as_messages = any(map(has_messages, rows))
    made = [_normalise(row, index, kind, places, as_messages) for index, row in enumerate(rows)]
    columns = {c: [row.get(c) for row in made] for c in dict.fromkeys(c for row in made for c in row)}
    features = datasets.Features({c: _feature(c, values) for c, values in columns.items() if c not in IMAGE_COLUMNS})
    for column, feature in features.items():
        if isinstance(feature, datasets.Json):  # as text: its own encoder rounds floats to ten digits
            columns[column] = [None if value is None else json.dumps(value) for value in columns[column]]
    features.update({c: ENCODED for c in IMAGE_COLUMNS if c in columns})
    return datasets.Dataset.from_dict(columns, features=features)


def _from_dataset(rows: datasets.Dataset, kind: str, places: Places) -> datasets.Dataset:
    for name, feature in rows.features.items():
        if name in ("image", *IMAGE_COLUMNS):
            several = isinstance(feature, datasets.List | datasets.LargeList)
            encoded = ENCODED if several else ENCODED.feature
        else:
            encoded = _encoded(feature)
        if encoded != feature:
            rows = _arrow(Path(f"column {name!r}"), partial(rows.cast_column, name), encoded)
    as_messages = "prompt" in rows.column_names and not isinstance(rows.features["prompt"], datasets.Value)
    if not as_messages and "conversations" in rows.column_names:
        needed = {"conversations", "prompt", "chosen", "completion"}.intersection(rows.column_names)
        as_messages = any(map(has_messages, rows.select_columns(sorted(needed))))
    first = _normalise(rows[0], 0, kind, places, as_messages)
    as_messages = as_messages or isinstance(first.get("prompt"), list)  # TRL's implicit prompts
    features = datasets.Features({**rows.features, **dict.fromkeys(IMAGE_COLUMNS, ENCODED)})
    texts = {"id", "prompt", "chosen", "rejected", "completion"}.intersection(first)
    features.update({c: datasets.Value("string") for c in texts})
    if as_messages:
        features["prompt"] = datasets.Json()
    return rows.map(
        lambda row, index, code: _normalise(row, index, kind, places, as_messages),
        fn_kwargs={"code": _own_code()},  # of rows from files, what a map made is kept, and found by the hash of these
        load_from_cache_file=None if len(places.within) < 2 else False,  # of two folders, it matters what lies where
        with_indices=True,
        remove_columns=[c for c in rows.column_names if c not in first],
        features=datasets.Features({c: features[c] for c in first}),
    )


@functools.cache
def _own_code() -> str:
    """A hash of the code that makes rows: datasets takes a package's functions by their names for its own hashes."""
    names = ("rows.py", "conversations.py", "images.py", "validate.py")
    code = [Path(__file__).with_name(name).read_bytes() for name in names]
    return hashlib.sha256(b"".join(code)).hexdigest()


def _encoded(feature: Any) -> Any:
    """A feature whose images, sounds and films stay as they are kept: decoding would open what their rows name."""
    if isinstance(feature, dict):
        return {name: _encoded(inner) for name, inner in feature.items()}
    if isinstance(feature, datasets.List | datasets.LargeList):
        return type(feature)(_encoded(feature.feature))
    if getattr(feature, "decode", False) and not isinstance(feature, datasets.Json):
        feature = copy.copy(feature)
        feature.decode = False
    return feature


def _feature(column: str, values: list[Any]) -> Any:
    if any(_holds_object(value) for value in values):
        return datasets.Json()
    try:
        return datasets.Features.from_arrow_schema(pa.schema({column: pa.array(values).type}))[column]
    except (pa.ArrowException, OverflowError) as error:
        kinds = sorted({type(value).__name__ for value in values})
        raise ValueError(f"column {column!r} mixes kinds of values ({', '.join(kinds)}): {error}") from error


def _holds_object(value: Any) -> bool:
    return isinstance(value, Mapping) or (isinstance(value, list) and any(_holds_object(item) for item in value))


def _normalise(row: Row, index: int, kind: str, places: Places, as_messages: bool) -> dict[str, Any]:
    made = {key: value for key, value in row.items() if key not in ("image", *IMAGE_COLUMNS, "conversations")}
    made["id"] = str(index) if row.get("id") is None else str(row["id"])
    if row.get("conversations") is not None and row.get("prompt") is None:
        made["prompt"] = named_column("conversations", index, row, asked, row["conversations"], is_answered(row))
        if kind == "preference" and row.get("chosen") is None:
            raise bad_row(
                index, row, "chosen", "missing; LLaVA's rows hold one answer: make pairs with `aspo pairs` first"
            )
    if made.get("prompt") is None and isinstance(row.get("question"), str):
        made["prompt"] = row["question"]
    if made.get("prompt") is None and isinstance(row.get("chosen"), list) and isinstance(row.get("rejected"), list):
        made["prompt"], made["chosen"], made["rejected"] = implicit_prompt(row["chosen"], row["rejected"])
    if as_messages and isinstance(made.get("prompt"), str):
        made["prompt"] = [{"role": "user", "content": made["prompt"]}]
    for column in ("chosen", "rejected", "completion"):
        if made.get(column) is not None:
            made[column] = named_column(column, index, row, response_text, made[column])
    for column, value in made.items():
        named_column(column, index, row, _check_text, column)
        named_column(column, index, row, _check_text, value)
    for column in IMAGE_COLUMNS:
        if column == "images" or column in row:
            entries = named_column(column, index, row, image_entries, row, column)
            made[column] = [named_column(column, index, row, _image_entry, entry, places) for entry in entries]
    return made


def _check_text(value: Any) -> None:
    """ValueError where a text cannot be written down: JSON's escapes can make halves of characters."""
    try:
        if not isinstance(value, str):
            json.dumps(value, ensure_ascii=False, default=str).encode()
        elif not value.isascii():
            value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"it holds half a character (a surrogate, {error.object[error.start]!r}): remove it"
        ) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _image_entry(entry: Any, places: Places) -> dict[str, Any]:
    if in_memory(entry):
        return {"bytes": image_bytes(entry), "path": None}
    return {"bytes": None, "path": str(places.find(entry))}


__all__ = ["load_rows", "response_text", "validate_rows"]
