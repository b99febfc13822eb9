"""Rows: every form they come in gives the same data set; bad rows are named; the native folder survives a kill."""

import json
import math

import datasets
import pytest
from PIL import Image
from tiny import PROMPT, tiny_image, tiny_rows

from aspo.data import append_row, load_images, load_rows, response_text, validate_rows, write_rows
from aspo.folder import append_line, read_lines

TEXT_COLUMNS = ("id", "prompt", "chosen", "rejected", "chosen_sentences", "chosen_similarity")


def texts(rows):
    return [{c: row[c] for c in TEXT_COLUMNS} for row in rows]


def pixels(rows):
    return [[image.tobytes() for image in load_images(row)] for row in rows]


@pytest.fixture
def native(tmp_path):
    write_rows(tmp_path / "native", tiny_rows(5))
    return tmp_path / "native"


def as_native(native, tmp_path):
    return native


def as_jsonl(native, tmp_path):
    (native / "other.jsonl").write_text((native / "rows.jsonl").read_text())
    return native / "other.jsonl"


def as_json(native, tmp_path):
    rows = [json.loads(line) for line in (native / "rows.jsonl").read_text().splitlines()]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return {"source": tmp_path / "rows.json", "image_root": native}


def as_parquet(native, tmp_path):
    load_rows(tiny_rows(5)).to_parquet(tmp_path / "rows.parquet")
    return str(tmp_path / "rows.parquet")


def as_parquet_folder(native, tmp_path):
    (tmp_path / "shards").mkdir()
    for n in range(2):
        load_rows(tiny_rows(5)[3 * n : 3 * n + 3]).to_parquet(tmp_path / "shards" / f"{n}.parquet")
    return tmp_path / "shards"


def as_saved(native, tmp_path):
    load_rows(native).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def as_dataset_of_pil(native, tmp_path):
    rows = tiny_rows(5)
    columns = {c: [row[c] for row in rows] for c in rows[0] if c != "images"}
    dataset = datasets.Dataset.from_dict({**columns, "image": [row["images"][0] for row in rows]})
    return dataset.cast_column("image", datasets.Image())


@pytest.mark.parametrize(
    "form", [as_native, as_jsonl, as_json, as_parquet, as_parquet_folder, as_saved, as_dataset_of_pil, None]
)
def test_every_form_gives_the_same_rows(form, native, tmp_path):
    source = form(native, tmp_path) if form else tiny_rows(5)
    rows = load_rows(**source) if isinstance(source, dict) else load_rows(source)
    validate_rows(rows)
    assert texts(rows) == texts(tiny_rows(5))
    assert pixels(rows) == pixels(tiny_rows(5))


def test_limit_and_ids():
    rows = load_rows([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3, limit=2)
    assert rows["id"] == ["0", "1"]
    with pytest.raises(ValueError, match="limit is 0"):
        load_rows(tiny_rows(2), limit=0)


def test_message_lists_and_objects_keep_their_contents(tmp_path):
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    rows = [
        {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}], "scene": {"a": 1}},
        {"prompt": "And this?", "scene": {"b": [1, {"c": 0.1234567890123456}]}},
    ]
    rows = [
        {**r, "chosen": [{"role": "assistant", "content": "A."}], "rejected": "B.", "image": tiny_image()} for r in rows
    ]
    loaded = load_rows(rows)
    validate_rows(loaded)
    write_rows(tmp_path, loaded)
    for dataset in (loaded, load_rows(tmp_path)):
        assert dataset[0]["prompt"] == rows[0]["prompt"]
        assert dataset[1]["prompt"] == [{"role": "user", "content": "And this?"}]
        assert dataset["scene"] == [{"a": 1}, {"b": [1, {"c": pytest.approx(0.1234567890123456, abs=1e-12)}]}]
        assert dataset["chosen"] == ["A.", "A."]


def test_arrow_message_lists():
    prompt = [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]}]
    source = datasets.Dataset.from_list([{"prompt": prompt, "chosen": "A.", "rejected": "B."}])
    row = load_rows(source.add_column("image", ["x.png"]))[0]
    assert row["prompt"] == prompt
    assert row["images"][0]["path"].endswith("/x.png")


def test_implicit_prompt_as_in_trl():
    user = {"role": "user", "content": "Hi?"}
    row = {
        "chosen": [user, {"role": "assistant", "content": "A."}],
        "rejected": [user, {"role": "assistant", "content": "B."}],
    }
    for source in ([row], datasets.Dataset.from_list([row])):
        loaded = load_rows(source)[0]
        assert (loaded["prompt"], loaded["chosen"], loaded["rejected"]) == ([user], "A.", "B.")


@pytest.mark.parametrize("column", ["image", "images"])
@pytest.mark.parametrize("value", ["a.png", ["a.png"]])
@pytest.mark.parametrize("make", [list, datasets.Dataset.from_list])
def test_one_image_or_a_list_under_either_name(column, value, make):
    (entry,) = load_rows(make([{"prompt": "Hi?", column: value}]), kind="prompt", image_root="/there")[0]["images"]
    assert entry["path"] == "/there/a.png"


def test_llava_rows_are_prompts(tmp_path):
    tiny_image().save(tmp_path / "a.png")
    turns = [
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "A ball."},
        {"from": "human", "value": "?"},
    ]
    rows = [
        {"id": "7", "image": "a.png", "conversations": turns},
        {"id": 8, "conversations": [{"from": "human", "value": "Hi"}]},
    ]
    (tmp_path / "llava.json").write_text(json.dumps(rows))
    loaded = load_rows(tmp_path / "llava.json", kind="prompt")
    validate_rows(loaded, "prompt")
    assert loaded["prompt"] == ["<image>\nWhat?", "Hi"]
    assert loaded["id"] == ["7", "8"]
    assert load_images(loaded[0])[0].tobytes() == tiny_image().tobytes()
    with pytest.raises(ValueError, match=r"row 0 \(id '7'\), column 'chosen'.*aspo pairs"):
        load_rows(tmp_path / "llava.json")
    with pytest.raises(ValueError, match="row 0, column 'conversations': turn 1 must be"):
        load_rows([{"conversations": ["Hi"]}], kind="prompt")


def said(role, text):
    return {"from": role, "value": text}


@pytest.mark.parametrize("make", [list, datasets.Dataset.from_list])
def test_a_conversation_before_the_answers_is_the_prompt(make):
    answers = {"chosen": said("gpt", "A2."), "rejected": said("gpt", "B2.")}
    turns = [said("human", "Q1?"), said("gpt", "A1."), said("human", "Q2?")]
    user, assistant = {"role": "user", "content": "Q1?"}, {"role": "assistant", "content": "A1."}
    rows = [{"conversations": turns, **answers}, {"conversations": turns[:1], **answers}]
    loaded = load_rows(make(rows))
    validate_rows(loaded)
    assert loaded["prompt"] == [[user, assistant, {"role": "user", "content": "Q2?"}], [user]]
    assert (loaded["chosen"], loaded["rejected"]) == (["A2."] * 2, ["B2."] * 2)
    assert load_rows(make(rows[1:]))["prompt"] == ["Q1?"]  # one question stays a text
    unpaired = [{"conversations": turns, "completion": "A2.", "label": True}]
    assert load_rows(make(unpaired), kind="unpaired")["prompt"] == loaded["prompt"][:1]
    assert load_rows(make([{"prompt": "Mine?", **rows[0]}]))["prompt"] == ["Mine?"]
    for wrong, message in (
        (turns[:2], "the last turn must be .*'human'"),
        ([said("observation", "x"), turns[0]], "turn 1 must be"),
    ):
        with pytest.raises(ValueError, match=rf"row 0, column 'conversations': {message}.*, got \{{'from'"):
            load_rows(make([{"conversations": wrong, **answers}]))
    with pytest.raises(ValueError, match="the first turn must be"):
        load_rows(make([{"conversations": turns[1:]}]), kind="prompt")


@pytest.mark.parametrize("make", [list, datasets.Dataset.from_list])
def test_unpaired_rows_of_messages(make):
    rows = [
        {
            "prompt": [{"role": "user", "content": "Q?"}],
            "completion": [{"role": "assistant", "content": "A."}],
            "label": k,
        }
        for k in (True, False)
    ]
    loaded = load_rows(make(rows), kind="unpaired")
    validate_rows(loaded, "unpaired")
    assert (loaded["completion"], loaded["label"]) == (["A."] * 2, [True, False])
    assert loaded["prompt"] == [row["prompt"] for row in rows]


def test_rows_of_another_version_are_not_found_again(tmp_path, monkeypatch):
    load_rows(tiny_rows(2)).save_to_disk(tmp_path / "saved")
    monkeypatch.setattr("aspo.rows._own_code", lambda: "before")
    before = load_rows(tmp_path / "saved")
    assert load_rows(tmp_path / "saved").cache_files == before.cache_files != []  # made once
    monkeypatch.undo()
    assert load_rows(tmp_path / "saved").cache_files != before.cache_files


def test_an_image_that_was_moved_to_the_other_folder_is_found(tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "images").mkdir()
    tiny_image().save(tmp_path / "rows" / "a.png")
    rows = datasets.Dataset.from_list([{"prompt": "Hi?", "image": "a.png"}])
    rows.to_parquet(tmp_path / "rows" / "rows.parquet")
    for folder in ("rows", "images"):
        loaded = load_rows(tmp_path / "rows" / "rows.parquet", kind="prompt", image_root=tmp_path / "images")
        assert loaded[0]["images"][0]["path"] == str(tmp_path / folder / "a.png")
        if folder == "rows":
            (tmp_path / "rows" / "a.png").rename(tmp_path / "images" / "a.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": None}, "column 'chosen': missing"),
        (
            {"chosen": None, "choosen": "A star."},
            "column 'chosen': missing; a preference row has prompt, chosen, rejected, and this one has .*'choosen'",
        ),
        ({"chosen": " \n"}, "column 'chosen': it is empty"),
        ({"rejected": ""}, "column 'rejected': it is empty"),
        ({"chosen": 3}, "column 'chosen': a response must be"),
        ({"chosen": [{"role": "user", "content": "x"}]}, "column 'chosen': a response message of role 'user'"),
        ({"chosen": "An <image>."}, "column 'chosen': it holds '<image>'"),
        ({"rejected": "SAME"}, "column 'rejected': it is the same text as 'chosen'"),
        ({"prompt": None}, "column 'prompt': missing"),
        ({"prompt": 5}, "column 'prompt': it must be a text"),
        ({"prompt": [{"role": "user"}]}, "column 'prompt': it must be a text"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "video"}]}]},
            "column 'prompt': a message part of type 'video'",
        ),
        ({"prompt": []}, "column 'prompt': it must be a text"),
        ({"prompt": " ", "images": []}, "column 'prompt': it is empty"),
        ({"prompt": "<image> and <image>"}, "column 'prompt': it marks 2 images, but the row has 1"),
        ({"prompt": "<image>", "images": None}, "column 'prompt': it marks 1 images, but the row has 0"),
        ({"prompt": [{"role": "assistant", "content": "x"}]}, "column 'prompt': it ends with an assistant message"),
        ({"images": ["/no/such.png"]}, "column 'images': no image file /no/such.png"),
        ({"images": [3]}, "column 'images': an image must be"),
        ({"chosen_sentences": [[0, 5]]}, "column 'chosen_sentences': the sentences end at character 5"),
        ({"chosen_sentences": None}, "column 'chosen_similarity': it needs the sentences"),
        ({"chosen_similarity": [0.1]}, "column 'chosen_similarity': 1 values for"),
        ({"chosen_similarity": "NAN"}, "column 'chosen_similarity': value 0 is nan"),
        ({"chosen_similarity": None}, "column 'chosen_similarity': row 0 and this one differ"),
        ({"sample_weight": -1.0}, "column 'sample_weight': it is -1.0"),
        ({"sample_weight": math.nan}, "column 'sample_weight': it is nan"),
    ],
)
def test_validation_names_row_and_column(change, message):
    rows = tiny_rows(4)
    if change.get("rejected") == "SAME":
        change = {"rejected": rows[2]["chosen"] + " "}
    if change.get("chosen_similarity") == "NAN":
        change = {"chosen_similarity": [math.nan] * len(rows[2]["chosen_similarity"])}
    validate_rows(rows)
    rows[2].update(change)
    with pytest.raises(ValueError, match=r"row 2 \(id 'row-2'\), " + message):
        validate_rows(rows)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "nothing", "no file or folder"),
        (lambda p: p, "has no rows.jsonl"),
        (lambda p: write(p / "a.csv", "x"), "unknown form '.csv'"),
        (lambda p: write(p / "a.json", '{"a": 1}'), "holds a dict"),
        (lambda p: write(p / "a.json", '{"a": 1}\n{"a": 2}'), "no JSON.*jsonl"),
        (lambda p: write(p / "a.jsonl", '{"prompt": "x"}\n{"pro'), "line 2 is no JSON.*unfinished"),
        (lambda p: write(p / "a.jsonl", "[1]\n"), "row 0 is a list"),
        (lambda p: write(p / "a.jsonl", ""), "holds no rows"),
        (lambda p: write(p / "a.jsonl", '{"prompt": "x", "n": 1}\n{"prompt": "y", "n": "z"}\n'), "column 'n' mixes"),
    ],
)
def test_unreadable_sources(make, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_rows(make(tmp_path), kind="prompt")


def write(path, text):
    path.write_text(text)
    return path


def test_dataset_dict_asks_for_a_split(tmp_path):
    datasets.DatasetDict({"train": load_rows(tiny_rows(2))}).save_to_disk(tmp_path / "d")
    with pytest.raises(ValueError, match=r"holds the splits \['train'\]: name one"):
        load_rows(tmp_path / "d")
    assert len(load_rows(tmp_path / "d" / "train")) == 2


def test_unreadable_image_is_named(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    rows = [{**row, "images": [tmp_path / "bad.png"]} for row in tiny_rows(1)]
    for bad in (rows, load_rows(rows), [{**rows[0], "images": [{"bytes": b"no image", "path": None}]}]):
        with pytest.raises(ValueError, match=r"column 'images': image .* cannot be read: not an image"):
            validate_rows(bad)
    with pytest.raises(ValueError, match=r"bad\.png cannot be read: not an image of a kind that is read"):
        load_images({"images": ["bad.png"]}, root=tmp_path)


def test_images_become_rgb():
    grey = Image.new("L", (4, 4), 7)
    assert load_images({"image": grey})[0].getpixel((0, 0)) == (7, 7, 7)
    for mode in ("1", "P", "LA", "RGBA", "CMYK", "F"):  # PNG knows neither of the last two
        row = load_rows([{"prompt": "Hi?", "image": tiny_image().convert(mode)}], kind="prompt")[0]
        assert load_images(row)[0].tobytes() == tiny_image().convert(mode).convert("RGB").tobytes()


@pytest.mark.parametrize(
    "value", [{"from": "gpt", "value": "A."}, [{"role": "assistant", "content": [{"type": "text", "text": "A."}]}]]
)
def test_response_text(value):
    assert response_text(value) == "A."


def test_append_after_a_kill_cuts_the_torn_line(tmp_path):
    rows = tiny_rows(3)
    append_row(tmp_path, rows[0])
    append_row(tmp_path, rows[1])
    whole = (tmp_path / "rows.jsonl").read_bytes()
    for torn in (whole[:-1], whole[:-20], whole + b'{"id": "\xc3'):
        (tmp_path / "rows.jsonl").write_bytes(torn)
        kept = [row["id"] for row in read_lines(tmp_path / "rows.jsonl")]
        append_row(tmp_path, rows[2])
        assert load_rows(tmp_path)["id"] == [*kept, "row-2"]


def test_append_line_to_nothing_but_a_torn_line(tmp_path):
    (tmp_path / "f").write_bytes(b'{"a"')
    append_line(tmp_path / "f", '{"b": 1}\n')
    assert list(read_lines(tmp_path / "f")) == [{"b": 1}]


def test_equal_images_are_stored_once(tmp_path):
    rows = [{"prompt": PROMPT, "chosen": "A.", "rejected": "B.", "image": tiny_image()} for _ in range(3)]
    write_rows(tmp_path / "a", rows)
    write_rows(tmp_path / "b", load_rows(tmp_path / "a"))
    write_rows(tmp_path / "b", load_rows(tmp_path / "b"))  # in place
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert len(list((folder / "images").iterdir())) == 1
        assert len({json.loads(line)["images"][0] for line in (folder / "rows.jsonl").open()}) == 1
