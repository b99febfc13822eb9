"""aspo/rows.py, folder.py, validate.py and images.py: files of rows in every form, sound, bent and torn."""

from __future__ import annotations

import atexit
import base64
import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from hypothesis import strategies as st
from PIL import Image

from aspo.folder import load_images, write_rows
from aspo.images import image_entries
from aspo.rows import load_rows
from aspo.sentences import check_spans, split_sentences
from aspo.validate import KINDS, validate_rows

from .guard import refusal

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=12)
TEXT = st.sampled_from(("A cat. It sleeps.", "A dog.", "", " ", "<image>", "What?", "\ud800", "x" * 300)) | ANY_TEXT
FILES = (
    *("ok.png", "ok.jpg", "images/ok.png", "cut.png", "cut.jpg", "anim.gif", "bomb.png", "deep.png", "none.png"),
    *("x.eps", "text.png", "link.png", "linked/ok.png", "loop.png", "../outside.png", "../data/ok.png", "images", "."),
    *("/etc/hostname", "/dev/zero", "file:///etc/hostname", "http://localhost:1/x.png", "data:image/png;base64,AA=="),
    *("", "a\x00b", "\ud800.png", "x" * 5000, "~/x.png", "ok.png/../../outside.png"),
)  # fmt: skip
NUMBER = st.integers(-2, 20) | st.sampled_from((0.5, -1.5, float("nan"), float("inf"), 2**40, 2**70, 10**400, True))
LEAF = st.none() | st.booleans() | NUMBER | TEXT
JSON = st.recursive(
    LEAF, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6
)
PART = st.fixed_dictionaries(
    {}, optional={"type": st.sampled_from(("text", "image", "video")) | JSON, "text": TEXT | JSON}
)
MESSAGE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(("user", "assistant", "system")) | JSON,
        "content": TEXT | st.lists(PART, max_size=3) | JSON,
    }
)
MESSAGES = st.lists(MESSAGE, max_size=3)
ENTRY = (
    st.sampled_from(FILES) | st.fixed_dictionaries({"path": st.sampled_from(FILES), "bytes": st.none() | TEXT}) | JSON
)
IMAGES = st.sampled_from(FILES).map(lambda name: [name]) | st.lists(ENTRY, max_size=3) | ENTRY
SPANS = st.just([[0, 7], [7, 17]]) | st.lists(st.lists(NUMBER, max_size=3), max_size=3) | JSON
NUMBERS = st.just([0.25, 0.5]) | st.lists(NUMBER, max_size=3) | JSON
COLUMNS: dict[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys(("prompt", "chosen", "rejected", "completion"), TEXT | MESSAGES | MESSAGE | JSON),
    **dict.fromkeys(("image", "images", "chosen_images", "rejected_images", "negative_images"), IMAGES),
    **dict.fromkeys(("chosen_sentences", "rejected_sentences", "chosen_token_scores", "rejected_token_scores"), SPANS),
    **dict.fromkeys(
        ("chosen_similarity", "chosen_sentence_weights", "negative_log_q", "chosen_alternative_ids"), NUMBERS
    ),
    **dict.fromkeys(("id", "label", "unfinished", "sample_weight", "scene", "question", "other"), JSON),
    "conversations": st.lists(
        st.fixed_dictionaries({"from": st.just("human") | JSON, "value": TEXT | JSON}), max_size=2
    )
    | JSON,
}
SOUND = {"prompt": "What?", "chosen": "A cat. It sleeps.", "rejected": "A dog.", "completion": "A cat.", "label": True}
WITH_IMAGE = {**SOUND, "id": "a", "images": ["ok.png"], "chosen_sentences": [[0, 7], [7, 17]]}
BENT = st.tuples(st.sampled_from((SOUND, WITH_IMAGE)), st.fixed_dictionaries({}, optional=COLUMNS)).map(
    lambda p: p[0] | p[1]
)
ONE_BENT = st.sampled_from(sorted(COLUMNS)).flatmap(
    lambda name: COLUMNS[name].map(lambda value: {**WITH_IMAGE, name: value})
)
ROWS = st.lists(ONE_BENT | BENT | JSON, min_size=1, max_size=3) | st.lists(ONE_BENT, min_size=1, max_size=1)
PATCH = st.tuples(st.integers(0, 10_000), st.sampled_from((0, 1, 4)), st.binary(max_size=4)).map(
    lambda patch: [patch[0], patch[1], base64.b64encode(patch[2]).decode()]
)
FORMS = ("rows.jsonl",) * 6 + ("folder",) * 4 + ("rows.json",) * 3 + ("rows.parquet", "saved", "python")
RAW = st.binary(max_size=60).map(lambda raw: base64.b64encode(raw).decode())
INPUTS = st.fixed_dictionaries(
    {
        "form": st.sampled_from(FORMS),
        "kind": st.sampled_from(("preference", "preference", "unpaired", "prompt")),
        "rows": ROWS,
        "raw": st.none() | st.none() | st.none() | RAW,
        "patches": st.just([]) | st.just([]) | st.lists(PATCH, max_size=3),
        "image_root": st.sampled_from((None, None, None, "images", "/", "none")),
    }
)


def check(value: Any) -> None:
    """Rows in one form that can be read, cut, written and read again; or a ValueError that names one of them."""
    with tempfile.TemporaryDirectory() as folder, _quiet(Path(folder) / "cache"):
        data = Path(folder) / "data"
        shutil.copytree(_world(), data.parent, symlinks=True, dirs_exist_ok=True)
        source = _write(data, value)
        if source is None:
            return
        root = value["image_root"]
        root = data / root if root is not None and not root.startswith("/") else root
        root = data if root is None and source is value["rows"] else root
        with refusal("row", "column", str(data), "rows", "image"):
            rows = load_rows(source, kind=value["kind"], image_root=root)
            _check_form(rows, data, root if source is not value["rows"] else "/")
            validate_rows(rows, value["kind"])
            _check_valid(rows, value["kind"], data)


def _check_form(rows: datasets.Dataset, data: Path, root: Any) -> None:
    allowed = [data.resolve(), *([Path(root).resolve()] if root is not None else [])]
    for row in rows:
        assert isinstance(row["id"], str)
        for entry in image_entries(row):
            assert set(entry) == {"bytes", "path"}
            if entry["bytes"] is None:
                assert any(Path(entry["path"]).resolve().is_relative_to(place) for place in allowed), (
                    "an image elsewhere"
                )


def _check_valid(rows: datasets.Dataset, kind: str, data: Path) -> None:
    readable = True
    for row in rows:
        for column in KINDS[kind]:
            assert row[column] is not None
        for text in (row.get("chosen"), row.get("rejected"), row.get("completion")):
            if kind == "preference" and isinstance(text, str):
                check_spans(text, split_sentences(text))
        try:
            pictures = load_images(row) + load_images(row, "negative_images")
        except ValueError as error:
            readable = False
            assert "cannot be read" in str(error)
            continue
        assert all(picture.mode == "RGB" and min(picture.size) > 0 for picture in pictures)
    if not readable:
        return
    write_rows(data / "again", rows)
    again = load_rows(data / "again", kind=kind)
    validate_rows(again, kind)
    assert [row["id"] for row in again] == [row["id"] for row in rows]
    pixels = [[[p.tobytes() for p in load_images(row)] for row in some] for some in (rows, again)]
    assert pixels[0] == pixels[1]


def _write(data: Path, value: Any) -> Any:
    """The source that an input describes; None where its form cannot hold such rows."""
    form, rows = value["form"], value["rows"]
    if form == "python":
        return rows
    path = data / ("rows.jsonl" if form == "folder" else form)
    if form in ("rows.parquet", "saved"):
        try:
            table = datasets.Dataset(pa.Table.from_pylist([row for row in rows if isinstance(row, dict)]))
            table.to_parquet(path) if form == "rows.parquet" else table.save_to_disk(path)
        except Exception:  # what pyarrow cannot hold, nobody can give us
            return None
        torn = [path] if form == "rows.parquet" else sorted(path.iterdir())
    else:
        lines = json.dumps(rows) if form == "rows.json" else "".join(json.dumps(row) + "\n" for row in rows)
        path.write_bytes(lines.encode() if value["raw"] is None else base64.b64decode(value["raw"]))
        torn = [path]
    for at, cut, put in value["patches"]:
        file = torn[at % len(torn)]
        content = file.read_bytes()
        at %= len(content) + 1
        file.write_bytes(content[:at] + base64.b64decode(put) + content[at + cut :])
    return data if form == "folder" else path


@contextlib.contextmanager
def _quiet(cache: Path) -> Iterator[None]:
    """datasets' copies of parquet files go into a folder that is deleted, and no bar is drawn."""
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = cache
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.config.HF_DATASETS_CACHE = before


@cache
def _world() -> Path:
    """A folder with `data/` and the images that FILES names, made once."""
    base = Path(tempfile.mkdtemp(prefix="fuzz-rows-"))
    atexit.register(shutil.rmtree, base, ignore_errors=True)
    data = base / "data"
    (data / "images").mkdir(parents=True)
    picture = Image.linear_gradient("L").resize((24, 16)).convert("RGB")
    for path in (data / "ok.png", data / "ok.jpg", data / "images/ok.png", base / "outside.png"):
        picture.save(path)
    for name in ("ok.png", "ok.jpg"):
        (data / name.replace("ok", "cut")).write_bytes((data / name).read_bytes()[:-40])
    picture.save(data / "anim.gif", save_all=True, append_images=[Image.new("RGB", (24, 16), n) for n in range(50)])
    Image.new("1", (20_000, 20_000)).save(data / "bomb.png")
    Image.new("I;16", (4, 4), 40_000).save(data / "deep.png")
    picture.save(data / "x.eps")
    (data / "text.png").write_text("no image")
    (data / "link.png").symlink_to("../outside.png")
    (data / "linked").symlink_to(base)
    (data / "loop.png").symlink_to("loop.png")
    return base
