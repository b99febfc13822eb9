"""Data, models and texts from strangers: what they try, and what is said to it."""

import ast
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny import tiny_llava, tiny_rows

import aspo
from aspo import cli, trust
from aspo.images import FORMATS, UPRIGHT, image_size, load_images, set_max_pixels
from aspo.model import load_model
from aspo.rows import load_rows
from aspo.scorers import load_scorer
from aspo.validate import validate_rows

ROOT = Path(aspo.__file__).parent.parent
CODE = [path for folder in ("aspo", "aspo_kernels", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py")]


# ---- no pickle, no code ----


class Payload:
    """Makes a file where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (os.system, (f"touch {self.mark}",))


def calls(path):
    """(line, name as written, keyword names) of every call in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


FORBIDDEN = {
    *("pickle.load", "pickle.loads", "dill.load", "joblib.load", "torch.load", "torch.jit.load", "marshal.loads"),
    *("np.load", "numpy.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "shelve.open", "pd.read_pickle"),
    *("eval", "exec", "os.system", "os.popen", "load_dataset", "datasets.load_dataset"),
}
# What may be called where: the one place that checks, and loads of what this program has just written itself.
FROM_PRETRAINED = {
    "aspo/trust.py": "loader",
    "aspo/model.py": "Peft",
    "aspo/world": "Llava",
    "aspo/world/clip.py": "PreTrained",
}
IMAGE_OPEN = {"aspo/images.py"}


def test_the_code_calls_nothing_that_unpickles_or_evaluates():
    found = [
        f"{path.relative_to(ROOT)}:{line} {name}" for path in CODE for line, name, _ in calls(path) if name in FORBIDDEN
    ]
    assert not found


def test_models_and_images_are_opened_in_one_place():
    for path in CODE:
        place = path.relative_to(ROOT).as_posix()
        if not place.startswith("aspo/"):
            continue
        for line, name, given in calls(path):
            if name.endswith(".from_pretrained"):
                known = [start for where, start in FROM_PRETRAINED.items() if place.startswith(where)]
                assert any(name.startswith(start) for start in known), f"{place}:{line} {name}: use aspo.trust"
            assert name != "Image.open" or place in IMAGE_OPEN, f"{place}:{line}: use aspo.images"
            assert given.get("trust_remote_code") in (None, "trusts_code()"), f"{place}:{line}"
            assert given.get("shell") is None and given.get("allow_pickle") is None, f"{place}:{line}"


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return tiny_llava(tmp_path_factory.mktemp("model"))


@pytest.fixture
def copy(llava, tmp_path):
    shutil.copytree(llava, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_a_pickle_for_weights_is_refused_and_not_run(how, copy, tmp_path):
    mark = tmp_path / "ran"
    (copy / "model.safetensors").unlink()
    file = copy / "pytorch_model.bin"
    file.write_bytes(pickle.dumps(Payload(mark))) if how == "pickle" else torch.save(Payload(mark), file)
    with pytest.raises(ValueError, match=r"a pickle \(pytorch_model\.bin\) for its weights; only safetensors"):
        load_model(copy)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Payload(mark)))  # the payload works
    assert mark.exists()


def test_an_adapter_in_a_pickle_is_refused_and_not_run(llava, tmp_path):
    from peft import LoraConfig, get_peft_model

    adapter, mark = tmp_path / "adapter", tmp_path / "ran"
    model, _ = load_model(llava)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(ValueError, match=r"a pickle \(adapter_model\.bin\)"):
        load_model(adapter, base=str(llava))
    assert not mark.exists()


CUSTOM = """
from transformers import LlavaConfig, LlavaForConditionalGeneration, CLIPImageProcessor, PreTrainedTokenizerFast
open({mark!r}, "w").close()
class Config(LlavaConfig):
    model_type = "of_its_own"
class Model(LlavaForConditionalGeneration):
    config_class = Config
class Images(CLIPImageProcessor):
    pass
class Tokens(PreTrainedTokenizerFast):
    pass
"""
AUTO_MAP = {"AutoConfig": "own.Config", "AutoModelForImageTextToText": "own.Model", "AutoModelForCausalLM": "own.Model"}


def with_code(folder, mark, *, config=False, processor=False):
    """Python beside the model, named by its config or its processor's."""
    (folder / "own.py").write_text(CUSTOM.format(mark=str(mark)))
    if config:
        made = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**made, "model_type": "of_its_own", "auto_map": AUTO_MAP}))
    if processor:
        made = json.loads((folder / "tokenizer_config.json").read_text())
        made |= {"tokenizer_class": "Tokens", "auto_map": {"AutoTokenizer": ["own.Tokens", "own.Tokens"]}}
        (folder / "tokenizer_config.json").write_text(json.dumps(made))


def test_a_model_with_code_of_its_own_is_refused_naming_the_flag(copy, tmp_path, monkeypatch):
    mark = tmp_path / "ran"
    with_code(copy, mark, config=True)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))  # nobody is asked
    with pytest.raises(ValueError, match=r"Python code of its own, which is not run.*aspo --trust_remote_code"):
        load_model(copy)
    assert not mark.exists()
    monkeypatch.setenv(cli.TRUST_VARIABLE, "1")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    assert trust.pretrained(__import__("transformers").AutoConfig, copy).model_type == "of_its_own"
    assert mark.exists()


def test_a_processor_with_code_of_its_own_does_not_run_it(copy, tmp_path):
    mark = tmp_path / "ran"
    with_code(copy, mark, processor=True)
    try:
        load_model(copy)
    except ValueError as error:
        assert "trust_remote_code" in str(error)
    assert not mark.exists()


def test_a_config_cannot_choose_a_kernel_to_download(copy):
    made = json.loads((copy / "config.json").read_text())
    made["attn_implementation"] = made["text_config"]["attn_implementation"] = "stranger/kernel"
    (copy / "config.json").write_text(json.dumps(made))
    model, _ = load_model(copy)
    assert {model.config._attn_implementation, model.config.text_config._attn_implementation} <= {"sdpa", "eager"}


def test_the_flag_stands_before_the_command(monkeypatch, capsys):
    monkeypatch.delenv(cli.TRUST_VARIABLE, raising=False)
    assert cli.main(["train"]) == cli.USAGE
    assert not trust.trusts_code()
    monkeypatch.setenv(cli.TRUST_VARIABLE, "0")
    assert cli.main(["--trust_remote_code", "train"]) == cli.USAGE
    assert trust.trusts_code()


def test_open_clip_reads_no_pickled_objects(tmp_path):
    mark = tmp_path / "ran"
    torch.save(Payload(mark), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"open_clip:ViT-B-32/.*weights\.pt"):
        load_scorer(f"open_clip:ViT-B-32/{tmp_path / 'weights.pt'}")
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip/open_clip_config.json").write_text("{}")
    torch.save(Payload(mark), tmp_path / "clip/open_clip_pytorch_model.bin")
    with pytest.raises(ValueError, match="a pickle"):
        load_scorer(f"open_clip:{tmp_path / 'clip'}")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_of_more_than_numbers_is_not_gone_on_from(name, tmp_path):
    mark, folder = tmp_path / "ran", tmp_path / "checkpoint-3"
    folder.mkdir()
    torch.save({"numpy": np.random.get_state(), "step": torch.tensor(1)}, folder / "rng_state_0.pth")
    trust.refuse_code(folder, tmp_path / "other")  # what Trainer writes
    torch.save({"state": Payload(mark)}, folder / name)
    with pytest.raises(ValueError, match=rf"{name} holds (posix|nt)\.system, which is more than numbers"):
        trust.refuse_code(folder, tmp_path)
    assert not mark.exists()


def test_a_strangers_sharded_checkpoint_is_asked_about(tmp_path, monkeypatch):
    (tmp_path / "run/checkpoint-3/optimizer_0").mkdir(parents=True)
    (tmp_path / "run/checkpoint-3/optimizer_0/.metadata").write_bytes(b"")
    monkeypatch.delenv(cli.TRUST_VARIABLE, raising=False)
    trust.refuse_code(tmp_path / "run/checkpoint-3", tmp_path / "run")
    with pytest.raises(ValueError, match="is a sharded checkpoint"):
        trust.refuse_code(tmp_path / "run/checkpoint-3", tmp_path / "other")


# ---- images ----


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def row_of(folder, name, content):
    (folder / name).write_bytes(content)
    row = {"id": "17", "prompt": "What?", "chosen": "A cat.", "rejected": "A dog.", "images": [name]}
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    return load_rows(folder)


GRADIENT = Image.linear_gradient("L").resize((24, 16)).convert("RGB")
PNG = encoded(GRADIENT, "PNG")


def bomb():
    """A PNG of 400 million pixels in 50 kB."""
    return encoded(Image.new("1", (20_000, 20_000)), "PNG")


def claims(width, height):
    """A PNG whose header claims a size."""
    import struct
    import zlib

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    crc = struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return PNG[:16] + header + crc + PNG[33:]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bomb.png", bomb, r"it has more than 89,478,485 pixels: shrink it, or raise .*ASPO_MAX_IMAGE_PIXELS"),
        ("claims.png", lambda: claims(2**31 - 1, 2**31 - 1), "more than 89,478,485 pixels"),
        ("zero.png", lambda: claims(0, 9), ""),
        ("text.png", lambda: b"no image", r"not an image of a kind that is read \(JPEG, PNG, "),
        ("page.jpg", lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image of a kind"),
        ("eps.png", lambda: encoded(GRADIENT, "EPS"), "not an image of a kind"),
        ("pdf.jpg", lambda: encoded(GRADIENT, "PDF"), "not an image of a kind"),
        ("ico.png", lambda: encoded(GRADIENT, "ICO"), "not an image of a kind"),
        ("zip.png", lambda: b"PK\x03\x04" + bytes(60), "not an image of a kind"),
        ("empty.png", lambda: b"", "not an image of a kind"),
    ],
)
def test_a_bad_image_is_one_line_with_row_and_file(name, content, message, tmp_path):
    rows = row_of(tmp_path, name, content())
    with pytest.raises(
        ValueError, match=rf"^row 0 \(id '17'\), column 'images': image .*{name} cannot be read: .*{message}"
    ):
        validate_rows(rows)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_a_truncated_image_is_named(kind, tmp_path):
    content = encoded(GRADIENT.resize((240, 160)), kind)
    rows = row_of(tmp_path, "cut.img", content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"image .*cut\.img cannot be read: "):
        load_images(rows[0])


def test_every_format_is_read_and_no_other(tmp_path):
    for kind in FORMATS:
        if Image.init() is not None and kind in Image.SAVE:
            (image,) = load_images({"images": [{"bytes": encoded(GRADIENT, kind), "path": None}]})
            assert image.mode == "RGB" and image.size == GRADIENT.size
    assert not {"EPS", "WMF", "PSD", "ICO", "FITS", "HDF5", "MPEG", "PDF"} & set(FORMATS)


def test_no_pixel_is_decoded_to_refuse_a_bomb(tmp_path, monkeypatch):
    from PIL import ImageFile

    rows = row_of(tmp_path, "bomb.png", bomb())
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("decoded"))
    for read in (validate_rows, lambda rows: load_images(rows[0])):
        with pytest.raises(ValueError, match="more than 89,478,485 pixels"):
            read(rows)


def test_the_limit_can_be_raised_and_lowered(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    rows = row_of(tmp_path, "a.png", PNG)
    set_max_pixels("383")
    with pytest.raises(ValueError, match="more than 383 pixels"):
        validate_rows(rows)
    set_max_pixels("384")
    validate_rows(rows)
    set_max_pixels(None)
    assert Image.MAX_IMAGE_PIXELS == 384
    for bad in ("", "0", "-1", "1e9", "²", "many"):
        with pytest.raises(ValueError, match="ASPO_MAX_IMAGE_PIXELS"):
            set_max_pixels(bad)
    made = subprocess.run(
        [sys.executable, "-c", "import aspo.images, PIL.Image; print(PIL.Image.MAX_IMAGE_PIXELS)"],
        env={**os.environ, "ASPO_MAX_IMAGE_PIXELS": "500000000"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert made.stdout.strip() == "500000000"


def test_a_file_larger_than_any_image_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    rows = row_of(tmp_path, "large.png", PNG + bytes(8000))
    with pytest.raises(ValueError, match=r"a file of 8,\d+ bytes has more than 1,000 pixels"):
        validate_rows(rows)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_many_frames_the_first_is_read(kind):
    frames = [GRADIENT, *(Image.new("RGB", (24, 16), (n % 256, 9, 9)) for n in range(200))]
    content = encoded(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )
    (image,) = load_images({"images": [{"bytes": content, "path": None}]})
    difference = np.abs(np.asarray(image, int) - np.asarray(GRADIENT, int))
    assert difference.max() <= 2  # GIF's palette


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_photographs_stand_upright_and_their_size_is_known_ahead(kind, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    content = encoded(GRADIENT, kind, exif=exif.tobytes(), **({"lossless": True} if kind == "WEBP" else {}))
    entry = {"bytes": content, "path": None}
    (image,) = load_images({"images": [entry]})
    expected = datasets.Image().decode_example(entry).convert("RGB")  # what TRL would see
    assert image.size == expected.size and image.tobytes() == expected.tobytes()
    assert image_size(entry) == (image.height, image.width)
    assert (image.size != GRADIENT.size) == (turn >= 5)


@pytest.mark.parametrize(
    "exif", [b"", b"Exif\x00\x00", b"Exif\x00\x00MM\x00*\xff\xff\xff\xff", b"\xff" * 50, bytes(70)]
)
def test_broken_exif_is_no_orientation(exif):
    entry = {"bytes": encoded(GRADIENT, "PNG", exif=exif or None), "path": None}
    assert load_images({"images": [entry]})[0].tobytes() == GRADIENT.tobytes()
    assert set(UPRIGHT) == set(range(2, 9))


def test_sixteen_bits_become_eight_and_floats_are_refused():
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    for content in (
        encoded(Image.fromarray(ramp), "PNG"),
        encoded(Image.fromarray(ramp), "TIFF"),
        b"P5 16 16 65535\n" + ramp.astype(">u2").tobytes(),
    ):
        (image,) = load_images({"images": [{"bytes": content, "path": None}]})
        assert np.abs(np.asarray(image)[..., 0].flatten() - np.arange(256.0)).max() <= 1
    with pytest.raises(ValueError, match="floating-point"):
        load_images({"images": [{"bytes": encoded(Image.new("F", (4, 4)), "TIFF"), "path": None}]})
    (grey,) = load_images({"images": [{"bytes": encoded(GRADIENT.convert("CMYK"), "JPEG"), "path": None}]})
    assert grey.mode == "RGB"


# ---- places ----


@pytest.fixture
def place(tmp_path):
    """data/ with an image, and one outside of it that data/ links to."""
    (tmp_path / "data/images").mkdir(parents=True)
    GRADIENT.save(tmp_path / "data/images/in.png")
    GRADIENT.save(tmp_path / "out.png")
    (tmp_path / "data/link.png").symlink_to(tmp_path / "out.png")
    (tmp_path / "data/folder").symlink_to(tmp_path)
    (tmp_path / "data/inside.png").symlink_to("images/in.png")
    return tmp_path


def rows_naming(place, entry, form="jsonl", **options):
    row = {"prompt": "What?", "chosen": "A cat.", "rejected": "A dog.", "images": [entry]}
    path = place / "data" / f"rows.{form}"
    if form == "parquet":
        datasets.Dataset.from_list([{**row, "images": [{"bytes": None, "path": entry}]}]).to_parquet(path)
    else:
        path.write_text(json.dumps(row) + "\n")
    rows = load_rows(path, **options)
    validate_rows(rows)
    return load_images(rows[0])


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize("entry", ["../out.png", "link.png", "folder/out.png", "images/../../out.png", "ABSOLUTE"])
def test_rows_from_files_cannot_leave_their_folder(form, entry, place):
    entry = entry.replace("ABSOLUTE", str(place / "out.png"))
    with pytest.raises(ValueError, match=r"row 0.*'images': image .* lies outside of .*/data.*--image-root /"):
        rows_naming(place, entry, form)
    assert len(rows_naming(place, entry, form, image_root="/")) == 1
    assert len(rows_naming(place, entry, form, image_root=place)) == 1


def test_every_place_of_a_missing_image_is_named(place):
    with pytest.raises(
        ValueError, match=r"row 0.*'images': no image file .*/data/images/gone.png nor .*/data/gone.png"
    ):
        rows_naming(place, "gone.png", image_root=place / "data/images")
    with pytest.raises(ValueError, match=r"no image file .*/data/gone.png: check"):
        rows_naming(place, "gone.png")


@pytest.mark.parametrize(
    "entry", ["images/in.png", "inside.png", "./images/in.png", "images/../images/in.png", "ABSOLUTE"]
)
def test_what_lies_inside_is_read(entry, place):
    entry = entry.replace("ABSOLUTE", str(place / "data/images/in.png"))
    assert len(rows_naming(place, entry)) == len(rows_naming(place, entry, image_root=place / "data/images")) == 1


@pytest.mark.parametrize(
    "entry", ["http://127.0.0.1:9/x.png", "file:///etc/hostname", "data:image/png;base64,AA", "s3://a/b"]
)
def test_rows_name_files_and_no_addresses(entry, place, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a row opened a connection"))
    with pytest.raises(ValueError, match="is an address"):
        rows_naming(place, entry)
    with pytest.raises(ValueError, match="is an address"):
        load_rows([{"prompt": "a", "chosen": "b", "rejected": "c", "images": [entry]}])


def test_pipes_devices_and_impossible_names_are_no_files(place):
    os.mkfifo(place / "data/pipe")
    for entry in ("pipe", "images", "/dev/zero", "a\x00b", "x" * 5000, ""):
        with pytest.raises(
            ValueError, match=r"row 0.*column 'images': (no image file|image .* (lies outside|is no path))"
        ):
            rows_naming(place, entry)


def test_rows_from_python_may_name_any_file(place):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "images": [str(place / "out.png")]}]
    validate_rows(load_rows(rows))


def test_other_columns_of_a_data_set_are_not_decoded(place, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a row opened a connection"))
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *_: pytest.fail("decoded"))
    features = {name: datasets.Value("string") for name in ("prompt", "chosen", "rejected")}
    hidden = {"bytes": None, "path": "http://127.0.0.1:9/x.png"}
    rows = datasets.Dataset.from_list(
        [{"prompt": "a", "chosen": "b", "rejected": "c", "photo": hidden, "more": {"deep": [hidden]}}],
        features=datasets.Features(
            {**features, "photo": datasets.Image(), "more": {"deep": datasets.List(datasets.Image())}}
        ),
    )
    about = json.dumps({"info": {"features": rows.features.to_dict()}})  # to_parquet itself would fetch the image
    pq.write_table(rows.data.table.replace_schema_metadata({"huggingface": about}), place / "data/hidden.parquet")
    assert isinstance(
        datasets.Dataset.from_parquet(str(place / "data/hidden.parquet")).features["photo"], datasets.Image
    )
    assert load_rows(place / "data/hidden.parquet")[0]["photo"] == hidden


def test_a_saved_data_set_names_files_of_its_own_only(place):
    load_rows(tiny_rows(2)).save_to_disk(place / "saved")
    state = json.loads((place / "saved/state.json").read_text())
    state["_data_files"] = [{"filename": "../data/rows.arrow"}]
    (place / "saved/state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="must lie in the folder"):
        load_rows(place / "saved")


def test_a_terminal_obeys_no_error(capsys, place):
    (place / "data/rows.jsonl").write_text(
        json.dumps({"prompt": "a", "chosen": "b", "rejected": "c", "images": ["\x1b]0;owned\x07\u202ecat.png"]}) + "\n"
    )
    assert (
        cli.main(["score", "--data", str(place / "data"), "--out", str(place / "o"), "--scorer", "world"]) == cli.USAGE
    )
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(c.isprintable() for c in said[:-1]) and "\\x1b]0;owned" in said


def test_broken_files_are_one_line(place):
    data = place / "data"
    for name, content in {
        "a.jsonl": b'{"prompt": "a"}\n{"prompt": \n',
        "b.json": b"[" * 100_000,
        "c.jsonl": b'{"prompt": "\xff"}\n',
        "d.parquet": b"PAR1 and no more",
        "e.json": b"[" + b"9" * 5000 + b"]",
    }.items():
        (data / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            load_rows(data / name)
    assert not zipfile.is_zipfile(data / "d.parquet")


def test_a_benchmark_names_no_image_outside_of_its_folders(place):
    from aspo.suite.benchmark import Source

    data = Source(place / "data")
    assert data.image("in.png", "images").endswith("/data/images/in.png")
    for name in ("../out.png", str(place / "out.png"), "link.png", "folder/out.png"):
        with pytest.raises(ValueError, match=r"lies outside of .*--suite-images FOLDER"):
            data.image(name, "")
    assert Source(place / "data", place).image("out.png") == str(place / "out.png")


def test_every_command_that_reads_rows_can_be_told_where_images_lie():
    import argparse
    import importlib

    for command in ("pairs", "score", "negatives", "rewards", "reference", "train", "online", "eval", "report"):
        parser = argparse.ArgumentParser()
        importlib.import_module(cli.COMMANDS[command][0]).add_arguments(parser)
        assert {"--image-root", "--image_root"} & set(parser._option_string_actions), command


def test_a_few_lines_of_yaml_do_not_stand_for_billions(tmp_path):
    from aspo.yaml_files import read_yaml

    levels = [f"k{n}: &k{n} [{', '.join([f'*k{n - 1}'] * 10)}]\n" for n in range(1, 7)]
    (tmp_path / "a.yaml").write_text("k0: &k0 [x]\n" + "".join(levels[:3]))
    assert len(read_yaml(tmp_path / "a.yaml")["k3"]) == 10
    (tmp_path / "a.yaml").write_text("k0: &k0 [x]\n" + "".join(levels))
    with pytest.raises(ValueError, match=r"a\.yaml is no YAML: it stands for more than 100,000 values"):
        read_yaml(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("a: &a [*a]\n")
    with pytest.raises(ValueError, match=r"a\.yaml is no YAML: an alias stands for what it is part of"):
        read_yaml(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("a: !!python/object/apply:os.system [id]\n")
    with pytest.raises(ValueError, match=r"a\.yaml is no YAML: could not determine a constructor"):
        read_yaml(tmp_path / "a.yaml")
