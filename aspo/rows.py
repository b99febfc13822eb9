"""Preference rows and prompt rows: reading every form they come in, checking them, and the folder they are kept in.

A row is a dict with TRL's columns: `prompt`, `chosen`, `rejected` (text or message lists), `images` (or `image`); and,
all optional, `id`, `chosen_sentences`/`rejected_sentences` ([start, end] characters), `chosen_similarity` (cosines),
`sample_weight`, `scene` (a JSON object). After `load_rows` images are {"bytes", "path"} dicts with absolute paths, not
yet decoded, responses are texts, and every row has an `id`. docs/data.md has the whole format.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from PIL import Image

from aspo.folder import ROWS_FILE, image_bytes, image_entries, image_path
from aspo.sentences import check_spans

IMAGE_PLACEHOLDER = "<image>"
KINDS = {"preference": ("prompt", "chosen", "rejected"), "prompt": ("prompt",)}
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
        kind: "preference" or "prompt".
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


def validate_rows(dataset: Iterable[Row], kind: str = "preference") -> None:
    """Check every row; ValueError names the first bad one, its column and what to do. Images are not decoded."""
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {list(KINDS)}")
    scored: tuple[int, bool] | None = None
    for index, row in enumerate(dataset):
        for column in KINDS[kind]:
            if row.get(column) is None:
                raise _bad(index, row, column, f"missing; a {kind} row has {', '.join(KINDS[kind])}")
        _check("prompt", index, row, _check_prompt, row)
        _check("images", index, row, _check_images, row)
        if kind == "preference":
            _check_responses(index, row)
            has = row.get("chosen_similarity") is not None
            if scored is not None and scored[1] != has:
                raise _bad(
                    index, row, "chosen_similarity", f"row {scored[0]} and this one differ in having it; score all"
                )
            scored = (index, has) if scored is None else scored
        weight = row.get("sample_weight")
        if weight is not None and not (isinstance(weight, int | float) and math.isfinite(weight) and weight >= 0):
            raise _bad(index, row, "sample_weight", f"it is {weight!r}; it must be a finite number, 0 or more")


def response_text(value: Any) -> str:
    """The text of a response: a string, a message, or a list of messages that are all the assistant's."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        role = value.get("role", value.get("from"))
        if role not in ("assistant", "gpt"):
            raise ValueError(f"a response message of role {role!r}; only the assistant's are responses")
        content = value.get("content", value.get("value"))
        if isinstance(content, str):
            return content
        if isinstance(content, Sequence) and all(part.get("type") == "text" for part in content):
            return "".join(part["text"] for part in content)
        raise ValueError("a response message must hold text only")
    if isinstance(value, Sequence) and len(value) == 1:
        return response_text(value[0])
    raise ValueError(f"a response must be a text or one assistant message, got {_short(value)}")


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
        for name in {"image", "images"}.intersection(rows.column_names):
            rows = rows.cast_column(name, datasets.Image(decode=False) if name == "image" else images)
        as_messages = "prompt" in rows.column_names and not isinstance(rows.features["prompt"], datasets.Value)
        first = _normalise(rows[0], 0, kind, root, as_messages)
        features = datasets.Features({**rows.features, "images": images})
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
    features = datasets.Features({c: _feature(c, values) for c, values in columns.items() if c != "images"})
    for column, feature in features.items():
        if isinstance(feature, datasets.Json):  # as text: its own encoder rounds floats to ten digits
            columns[column] = [None if value is None else json.dumps(value) for value in columns[column]]
    return datasets.Dataset.from_dict(columns, features=datasets.Features({**features, "images": images}))


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
    made = {key: value for key, value in row.items() if key not in ("image", "images", "conversations")}
    made["id"] = str(index) if row.get("id") is None else str(row["id"])
    if row.get("conversations") is not None:
        made["prompt"] = _check("conversations", index, row, _first_question, row["conversations"])
        if kind == "preference" and row.get("chosen") is None:
            raise _bad(
                index, row, "chosen", "missing; LLaVA's rows hold one answer: make pairs with `aspo pairs` first"
            )
    if made.get("prompt") is None and isinstance(row.get("question"), str):
        made["prompt"] = row["question"]
    if made.get("prompt") is None and isinstance(row.get("chosen"), list) and isinstance(row.get("rejected"), list):
        made["prompt"], made["chosen"], made["rejected"] = _implicit_prompt(row["chosen"], row["rejected"])
    if as_messages and isinstance(made.get("prompt"), str):
        made["prompt"] = [{"role": "user", "content": made["prompt"]}]
    for column in ("chosen", "rejected"):
        if made.get(column) is not None:
            made[column] = _check(column, index, row, response_text, made[column])
    made["images"] = [_check("images", index, row, _image_entry, entry, root) for entry in image_entries(row)]
    return made


def _image_entry(entry: Any, root: Path) -> dict[str, Any]:
    if isinstance(entry, Image.Image) or (isinstance(entry, Mapping) and entry.get("bytes") is not None):
        return {"bytes": image_bytes(entry), "path": None}
    return {"bytes": None, "path": str(image_path(entry, root))}


def _first_question(conversation: Any) -> str:
    if not isinstance(conversation, list) or not conversation:
        raise ValueError("it must be a list of {'from', 'value'} turns")
    first = conversation[0]
    if first.get("from") not in ("human", "user") or not isinstance(first.get("value"), str):
        raise ValueError(f"the first turn must be {{'from': 'human', 'value': text}}, got {_short(first)}")
    return first["value"]


def _implicit_prompt(chosen: list[Any], rejected: list[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """TRL's implicit prompt: the messages that both conversations begin with."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    return chosen[:shared] or None, chosen[shared:], rejected[shared:]  # type: ignore[return-value]


def _check_prompt(row: Row) -> None:
    prompt, marks = row["prompt"], 0
    if isinstance(prompt, str):
        texts = [prompt]
    elif isinstance(prompt, Sequence) and prompt and all(isinstance(m, Mapping) and "role" in m for m in prompt):
        if prompt[-1]["role"] == "assistant":
            raise ValueError("it ends with an assistant message; move its text into the responses")
        parts = [p for m in prompt for p in ([m["content"]] if isinstance(m["content"], str) else m["content"])]
        texts = [p if isinstance(p, str) else p.get("text") or "" for p in parts]
        marks = sum(isinstance(p, Mapping) and p.get("type") == "image" for p in parts)
    else:
        raise ValueError(f"it must be a text or a list of messages with role and content, got {_short(prompt)}")
    images = len(image_entries(row))
    marks += sum(text.count(IMAGE_PLACEHOLDER) for text in texts)
    if marks not in (0, images):
        raise ValueError(f"it marks {marks} images, but the row has {images}: make them equal, or mark none")
    if not images and not any(text.strip() for text in texts):
        raise ValueError("it is empty")


def _check_images(row: Row) -> None:
    for entry in image_entries(row):
        if isinstance(entry, Image.Image) or (isinstance(entry, Mapping) and entry.get("bytes") is not None):
            continue
        path = image_path(entry, None)
        if not path.is_file():
            raise ValueError(f"no image file {path}: check the path, or say where relative paths start (image_root)")


def _check_responses(index: int, row: Row) -> None:
    texts = {column: _check(column, index, row, response_text, row[column]) for column in ("chosen", "rejected")}
    for column, text in texts.items():
        if not text.strip():
            raise _bad(index, row, column, "it is empty: drop the row")
        if IMAGE_PLACEHOLDER in text:
            raise _bad(index, row, column, f"it holds {IMAGE_PLACEHOLDER!r}; images belong to the prompt")
        spans = row.get(f"{column}_sentences")
        if spans is not None:
            _check(f"{column}_sentences", index, row, check_spans, text, spans)
        similarity = row.get(f"{column}_similarity")
        if similarity is not None:
            _check(f"{column}_similarity", index, row, _check_similarity, similarity, spans)
    if texts["chosen"].strip() == texts["rejected"].strip():
        raise _bad(index, row, "rejected", "it is the same text as 'chosen': drop the row")


def _check_similarity(values: Any, spans: Any) -> None:
    if spans is None:
        raise ValueError("it needs the sentences that it belongs to; `aspo score` writes both")
    if len(values) != len(spans):
        raise ValueError(f"{len(values)} values for {len(spans)} sentences; score the rows again")
    for n, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"value {n} is {value!r}; it must be a finite number")


def _check(column: str, index: int, row: Row, function: Callable[..., Any], *args: Any) -> Any:
    """Call, with row and column put in front of a ValueError's message."""
    try:
        return function(*args)
    except ValueError as error:
        raise _bad(index, row, column, str(error)) from error


def _bad(index: int, row: Row, column: str, what: str) -> ValueError:
    name = f" (id {row['id']!r})" if row.get("id") is not None else ""
    return ValueError(f"row {index}{name}, column {column!r}: {what}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
