"""The reference cache: it keeps the live reference, a kill costs one shard, other settings are refused by name."""

import contextlib
import json
import multiprocessing
import os
import pickle
import signal
import sys
import time
from importlib.metadata import version

import pytest
import torch
from accelerate import PartialState
from forked import Port, launched
from peft import LoraConfig, get_peft_model
from tiny import CHAT_TEMPLATE, tiny_image, tiny_llava, tiny_processor, tiny_rows

from aspo import cli
from aspo.data import Collator, load_rows, write_rows
from aspo.model import load_model, response_logps
from aspo.reference.fill import check, fill, model_logps, tolerance
from aspo.reference.logp_cache import ReferenceCache, check_logps, logp_columns, split_by_row
from aspo.reference.settings import reference_settings, weights_hash

MAX_LENGTH = 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(folder)


@pytest.fixture
def settings(loaded):
    return reference_settings(*loaded, max_length=MAX_LENGTH)


def logps_of(loaded, **options):
    return model_logps(*loaded, max_length=MAX_LENGTH, **options)


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def rows_with_everything():
    """One and several images, none, messages, rejected_images, negative_images."""
    rows = tiny_rows(6)
    rows[1] |= {"images": [tiny_image("red"), tiny_image("blue")]}
    rows[2] |= {"images": []}
    rows[3] |= {"prompt": [{"role": "user", "content": "What is this?"}]}
    rows[4] |= {"rejected_images": [tiny_image("green")]}
    rows[5] |= {"negative_images": [tiny_image("green"), tiny_image("blue")]}
    return rows


# ---- what is kept ----


def test_what_is_kept_is_the_live_reference(loaded, settings, tmp_path):
    rows = rows_with_everything()
    cache = ReferenceCache.create(tmp_path, settings)
    assert cache.missing(rows) == [0, 1, 2, 3, 4, 5]
    done = fill(cache, rows, logps_of(loaded, batch_size=1), shard_rows=4)
    assert done == (6, 6, cache.num_tokens) and not cache.missing(rows) and len(cache) == 6
    assert len(list(tmp_path.glob("*"))) == 3  # two shards and meta.json: nothing half-written is left
    for reopened in (cache, ReferenceCache.open(tmp_path, settings)):
        for row in rows:
            (alone,) = response_logps(*loaded, [row], max_length=MAX_LENGTH)
            assert same(reopened.get(row), split_by_row(alone.logps, alone.layout)[0])  # bit for bit
    assert [len(cache.get(row)) for row in rows] == [2, 2, 2, 2, 2, 4]
    together = list(logps_of(loaded, batch_size=6)(rows))
    for row, live in zip(rows, together, strict=True):  # another batch: rounding
        torch.testing.assert_close(torch.cat(cache.get(row)), torch.cat(live), rtol=0, atol=1e-5)


def test_the_collator_finds_them_however_sentences_are_cut(loaded, settings, tmp_path):
    rows = rows_with_everything()
    cache = ReferenceCache.create(tmp_path, settings)
    fill(cache, rows, logps_of(loaded))
    whole = [{k: v for k, v in row.items() if not k.startswith("chosen_s")} for row in rows]
    whole = [{**row, "chosen_sentences": [[0, len(row["chosen"])]]} for row in whole]
    for cut in (rows, whole):
        for option in ({}, {"shared_prefix": True}):
            batch = Collator(loaded[1], MAX_LENGTH, reference=cache, **option)(cut)
            (live,) = response_logps(*loaded, cut, max_length=MAX_LENGTH)
            torch.testing.assert_close(batch["ref_logps"], live.logps, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"row-0.*max_length; compute them again"):
        Collator(loaded[1], 40, reference=cache)(rows[:1])


def test_a_loras_reference_is_its_base(loaded, folder, settings, tmp_path):
    model, processor = load_model(folder)
    adapted = get_peft_model(model, LoraConfig(target_modules=r".*language_model.*\.q_proj", r=2, use_dora=True))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(weight)
    assert reference_settings(adapted, processor, max_length=MAX_LENGTH) == settings
    rows = tiny_rows(3)
    cache = ReferenceCache.create(tmp_path, settings)
    fill(cache, rows, logps_of(loaded))
    assert check(cache, rows, model_logps(adapted, processor, max_length=MAX_LENGTH)).largest < 1e-5


def test_keys_are_content_only(loaded, settings, tmp_path):
    key = ReferenceCache.create(tmp_path / "cache", settings).key
    row = tiny_rows(1)[0]
    path = tmp_path / "image.png"
    row["images"][0].save(path)
    write_rows(tmp_path / "data", [row])
    (stored,) = load_rows(tmp_path / "data")
    same_content = [
        stored,
        {**row, "id": "other", "chosen_sentences": None, "chosen_similarity": None, "sample_weight": 2.0},
        {**row, "images": None, "image": path},
        {**row, "images": [{"bytes": path.read_bytes(), "path": None}], "rejected_images": []},
        {**row, "prompt": [{"role": "user", "content": row["prompt"], "name": None}]},
        {**row, "chosen": [{"role": "assistant", "content": row["chosen"]}]},
    ]
    assert [key(other) == key(row) for other in same_content] == [True] * 6
    pixel = row["images"][0].copy()
    pixel.putpixel((0, 0), (0, 0, 1))
    blue = tiny_image("blue")
    others = [
        row,
        {**row, "images": [pixel]},
        {**row, "images": []},
        {**row, "images": [pixel, blue]},
        {**row, "images": [blue, pixel]},
        {**row, "rejected_images": [blue]},
        {**row, "negative_images": [blue]},
        {**row, "prompt": row["prompt"] + " "},
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]},
        {**row, "rejected": row["rejected"] + "!"},
    ]
    assert len({key(other) for other in others}) == len(others)


def test_a_changed_pil_image_is_seen(settings, tmp_path):
    key = ReferenceCache.create(tmp_path, settings).key
    image = tiny_image().convert("P")
    row = {**tiny_rows(1)[0], "images": [image]}
    keys = [key(row), key(row)]
    image.putpalette([255 - value for value in image.getpalette()])
    keys.append(key(row))
    image.putpixel((3, 3), 1)
    keys.append(key(row))
    assert keys[0] == keys[1] and len(set(keys)) == 3


def test_a_row_that_is_not_there(loaded, settings, tmp_path):
    rows = tiny_rows(2)
    cache = ReferenceCache.create(tmp_path, settings)
    fill(cache, rows, logps_of(loaded))
    with pytest.raises(ValueError, match=r"row 'row-1': the reference cache .* does not have it .*aspo reference"):
        cache.get({**rows[1], "images": [tiny_image("yellow")]})


def test_a_row_that_is_there_twice_is_computed_once(loaded, settings, tmp_path):
    rows = tiny_rows(2)
    cache = ReferenceCache.create(tmp_path, settings)
    assert fill(cache, [*rows, *rows], logps_of(loaded)) == (4, 2, cache.num_tokens)
    assert len(cache) == 2


def test_a_pickled_cache_is_opened_again(loaded, settings, tmp_path):
    rows = tiny_rows(2)
    cache = ReferenceCache.create(tmp_path, settings)
    fill(cache, rows, logps_of(loaded))
    blob = pickle.dumps(cache)
    assert len(blob) < 4000 and same(pickle.loads(blob).get(rows[1]), cache.get(rows[1]))


# ---- other settings ----


def changed_processor(change):
    processor = tiny_processor()
    change(processor)
    return processor


CHANGES = {
    "max_length was 256, now it is 128": {"max_length": 128},
    "chat template changed": lambda p: setattr(p, "chat_template", CHAT_TEMPLATE.replace("ASSISTANT", "BOT")),
    "image processor changed": lambda p: setattr(p.image_processor, "image_mean", [0.5, 0.5, 0.5]),
    "processor changed": lambda p: setattr(p, "patch_size", 15),
    "tokenizer changed": lambda p: p.tokenizer.add_tokens(["squarish"]),
    "autocast was off, now it is bfloat16": {"autocast": torch.bfloat16},
    "route was one response a row, now it is shared prefix": {"route": "shared prefix"},
    r"responses was \['chosen', 'rejected'\], now it is \['chosen'\]": {"responses": ["chosen"]},
}


@pytest.mark.parametrize("message", CHANGES)
def test_other_settings_are_refused_by_name(loaded, settings, tmp_path, message):
    model, processor = loaded
    ReferenceCache.create(tmp_path, settings)
    change = CHANGES[message]
    options = {"max_length": MAX_LENGTH} | (change if isinstance(change, dict) else {})
    other = processor if isinstance(change, dict) else changed_processor(change)
    for make in (ReferenceCache.open, ReferenceCache.create):
        with pytest.raises(ValueError, match=rf"was made with other settings: {message}\. Name another folder"):
            make(tmp_path, reference_settings(model, other, **options))


def test_other_models_are_refused_by_name(folder, settings, tmp_path):
    ReferenceCache.create(tmp_path, settings)

    def refusal(model, processor):
        with pytest.raises(ValueError) as error:
            ReferenceCache.open(tmp_path, reference_settings(model, processor, max_length=MAX_LENGTH))
        return str(error.value).partition("settings: ")[2].partition(". Name")[0]

    model, processor = load_model(folder)
    with torch.no_grad():
        model.lm_head.weight[5, 7] = torch.nextafter(model.lm_head.weight[5, 7], torch.tensor(1e9))
    assert refusal(model, processor) == "model weights changed"
    model, _ = load_model(folder, attn_implementation="eager")
    assert refusal(model, processor) == "attention was sdpa, now it is eager"
    model, _ = load_model(folder, "bfloat16")
    assert refusal(model, processor) == "model weights changed; dtype was float32, now it is bfloat16"
    model, _ = load_model(folder)
    model.config.vision_feature_layer = -1
    assert refusal(model, processor) == "model configuration changed"


def test_use_changes_no_settings(folder, settings):
    model, processor = load_model(folder)
    assert reference_settings(model, processor, max_length=MAX_LENGTH) == settings
    list(model_logps(model, processor)(rows_with_everything()))
    processor.tokenizer(["a", "b c"], padding=True, truncation=True, max_length=3)  # it remembers these
    model.config.use_cache, model.config.pad_token_id = False, 2  # Trainer sets these
    assert reference_settings(model.train(), processor, max_length=MAX_LENGTH) == settings


def test_text_only_models_have_settings(loaded, settings):
    of_tokenizer = reference_settings(loaded[0], loaded[1].tokenizer, max_length=MAX_LENGTH)
    assert {name for name in settings if settings[name] != of_tokenizer[name]} == {"image processor", "processor"}


def test_the_weights_hash_sees_every_bit():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(400, 701), torch.nn.Linear(7, 3).bfloat16(), torch.nn.BatchNorm1d(3))
    weight, small = model[0].weight.data.view(torch.int32).view(-1), model[1].weight.data.view(torch.int16).view(-1)
    seen = {weights_hash(model)}
    for words, index, bit in [(weight, 0, 0), (weight, 262_143, 31), (weight, -1, 30), (small, -1, 15), (small, 0, 3)]:
        words[index] ^= torch.tensor(1 << bit, dtype=torch.int64).to(words.dtype)
        seen.add(weights_hash(model))
    words = weight.view(torch.int64)
    words[[0, 1]] = words[[1, 0]]  # a sum alone would not see these two
    seen.add(weights_hash(model))
    weight[[0, 262_144]] = weight[[262_144, 0]]
    seen.add(weights_hash(model))
    model[2].num_batches_tracked += 1
    seen.add(weights_hash(model))
    assert len(seen) == 9
    with pytest.raises(ValueError, match=r"0\.weight is not whole here"):
        weights_hash(model.to("meta"))


def test_a_folder_that_holds_no_cache(settings, tmp_path):
    with pytest.raises(FileNotFoundError, match="aspo reference"):
        ReferenceCache.open(tmp_path, settings)
    (tmp_path / "meta.json").write_text('{"settings": ')
    with pytest.raises(ValueError, match=r"meta\.json is not a reference cache's .*delete the folder"):
        ReferenceCache.create(tmp_path, settings)


def test_a_shard_of_other_settings_is_not_read(loaded, settings, tmp_path):
    rows = tiny_rows(1)
    shard = ReferenceCache.create(tmp_path / "a", settings).add({b"k" * 32: [torch.tensor([-1.0])]})
    other = ReferenceCache.create(tmp_path / "b", {**settings, "max_length": 64})
    fill(other, rows, logps_of(loaded))
    for path in (tmp_path / "b").glob("shard-*"):
        path.rename(shard.parent / path.name)
    assert ReferenceCache.open(tmp_path / "a", settings).missing(rows) == [0]


# ---- damage ----


def test_a_shard_appears_whole(settings, tmp_path, monkeypatch):
    cache = ReferenceCache.create(tmp_path, settings)

    def stopped(source, target):
        assert source.stat().st_size > 0
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        cache.add({b"k" * 32: [torch.tensor([-1.0])]})
    assert [path.name for path in tmp_path.iterdir()] == ["meta.json"]


@pytest.mark.parametrize("damage", ["cut", "bit", "empty"])
def test_a_damaged_shard_is_named_and_computed_again(loaded, settings, tmp_path, caplog, damage):
    rows = tiny_rows(4)
    cache = ReferenceCache.create(tmp_path, settings)
    fill(cache, rows, logps_of(loaded, batch_size=1), shard_rows=2)
    victim = sorted(tmp_path.glob("shard-*"))[0]
    content = bytearray(victim.read_bytes())
    content[-9] ^= 1
    victim.write_bytes({"cut": content[:-50], "bit": content, "empty": b""}[damage])
    again = ReferenceCache.open(tmp_path, settings)
    assert len(again) == 2 and f"{victim} is damaged" in caplog.text
    computed = []

    def logps_fn(rows):
        computed.extend(rows)
        return logps_of(loaded, batch_size=1)(rows)

    assert fill(again, rows, logps_fn).computed == 2 == len(computed)
    assert not victim.exists() and all(same(again.get(row), cache.get(row)) for row in rows)


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 0.5])
def test_bad_log_probabilities_are_refused(loaded, settings, tmp_path, value):
    def broken(rows):
        for n, values in enumerate(logps_of(loaded)(rows)):
            if n == 2:
                values[1][3] = value
            yield values

    rows = tiny_rows(4)
    rows = sorted(rows, key=lambda row: len(row["chosen"]) + len(row["rejected"]))  # as they are computed
    cache = ReferenceCache.create(tmp_path, settings)
    with pytest.raises(ValueError, match=rf"row '{rows[2]['id']}': response 1, token 3: .* is {value}, but must be"):
        fill(cache, rows, broken)
    assert len(cache) == 0 and not list(tmp_path.glob("shard-*"))
    assert check_logps([torch.tensor([5e-7])])  # rounding of a sure token
    for shapeless in (torch.zeros(0), torch.zeros(1, 3)):
        with pytest.raises(ValueError, match=r"response 1: log-probabilities of shape .*; one a token is needed"):
            check_logps([torch.zeros(2), shapeless])


# ---- the check ----


def test_the_check_finds_other_weights(folder, loaded, settings, tmp_path):
    rows = tiny_rows(9)
    cache = ReferenceCache.create(tmp_path, settings)
    assert check(cache, rows, logps_of(loaded)) == (0, 0.0)
    fill(cache, rows, logps_of(loaded))
    seen = []

    def logps_fn(rows):
        seen.extend(row["id"] for row in rows)
        return logps_of(loaded)(rows)

    checked = check(cache, rows, logps_fn)
    assert checked.rows == 4 and checked.largest < 1e-5
    assert seen == ["row-0", "row-5", "row-2", "row-7"]  # spread, and always the same
    other, processor = load_model(folder)
    with torch.no_grad():
        other.lm_head.weight *= 1.01
    with pytest.raises(ValueError) as error:
        check(cache, rows, model_logps(other, processor, max_length=MAX_LENGTH))
    message = str(error.value)
    kept, computed = (float(part.split()[0].rstrip(",")) for part in message.split(" is ")[1:3])
    token = int(message.partition("token ")[2].partition(":")[0])
    assert message.startswith("row 'row-0', response 0, token") and "delete the folder" in message
    assert str(tmp_path) in message and f"torch {version('torch')}" in message
    assert kept == pytest.approx(float(cache.get(rows[0])[0][token]), abs=1e-5) and abs(kept - computed) > 1e-3


def test_the_check_sees_many_small_differences_and_lengths(loaded, settings, tmp_path):
    rows = tiny_rows(2)
    cache = ReferenceCache.create(tmp_path, settings)
    live = list(logps_of(loaded)(rows))
    cache.add({cache.key(row): values for row, values in zip(rows, live, strict=True)})
    with pytest.raises(ValueError, match=r"row 'row-0', row 'row-1': .* differ by 0\.000500 on average"):
        check(cache, rows, lambda _: [[x - 5e-4 for x in values] for values in live])
    with pytest.raises(ValueError, match=r"row 'row-0', response 1: \d+ log-probabilities are kept, but it has 2 tok"):
        check(cache, rows, lambda _: [[values[0], values[1][:2]] for values in live])
    with pytest.raises(ValueError, match="row 'row-0': 2 responses are kept, but it has 1"):
        check(cache, rows, lambda _: [values[:1] for values in live])


def test_tolerance_is_that_of_the_lowest_precision():
    assert tolerance({"dtype": "float32", "autocast": "off"}) == (1e-3, 1e-4)
    assert tolerance({"dtype": "bfloat16 float32", "autocast": "off"}) == (0.5, 0.05)
    assert tolerance({"dtype": "float32", "autocast": "float16"}) == (0.1, 0.01)


# ---- a row's own columns ----


def test_columns_are_checked():
    row = {"ref_chosen_logps": [-1.0, -0.5], "ref_rejected_logps": [-2.0]}
    chosen, rejected = logp_columns(row)
    assert chosen.tolist() == [-1.0, -0.5] and rejected.tolist() == [-2.0]
    assert logp_columns({"ref_chosen_logps": None}) is None
    with pytest.raises(ValueError, match="has 'ref_chosen_logps', but no 'ref_rejected_logps'"):
        logp_columns({"ref_chosen_logps": [-1.0]})
    with pytest.raises(ValueError, match=r"'ref_rejected_logps': it is -12\.5, but must be a list"):
        logp_columns({**row, "ref_rejected_logps": -12.5})
    for bad in ([float("nan")], [1.0], [], [[-1.0]]):
        with pytest.raises(ValueError, match="response 1"):
            logp_columns({**row, "ref_rejected_logps": bad})


# ---- kills and several processes ----

FORK = multiprocessing.get_context("fork")  # what this process has imported need not be imported again


def fill_and_hang(loaded, settings, rows, out):
    """Fill two shards, and hang in the middle of the third."""
    cache = ReferenceCache.create(out, settings)

    def logps_fn(rows):
        for n, values in enumerate(logps_of(loaded, batch_size=2)(rows)):
            if len(cache) == 8 and n == 2:
                (out / "here").touch()
                time.sleep(60)
            yield values

    fill(cache, rows, logps_fn, shard_rows=4)


def test_a_killed_run_goes_on_and_gives_the_same(loaded, settings, tmp_path):
    rows, logps_fn = tiny_rows(14), logps_of(loaded, batch_size=2)
    whole, out = ReferenceCache.create(tmp_path / "whole", settings), tmp_path / "killed"
    fill(whole, rows, logps_fn, shard_rows=4)
    process = FORK.Process(target=fill_and_hang, args=(loaded, settings, rows, out))
    process.start()
    deadline = time.monotonic() + 50
    while not (out / "here").exists() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and (out / "here").exists()
    cache = ReferenceCache.open(out, settings)
    assert len(cache) == 8  # two whole shards; the third was being computed
    assert fill(cache, rows, logps_fn, shard_rows=4).computed == 6
    for row in rows:
        assert same(cache.get(row), whole.get(row))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupt_keeps_whole_shards(loaded, settings, tmp_path, error):
    rows = tiny_rows(6)
    cache = ReferenceCache.create(tmp_path, settings)

    def interrupted(rows):
        for n, values in enumerate(logps_of(loaded)(rows)):
            if len(cache) and n:
                raise error
            yield values

    with pytest.raises(error):
        fill(cache, rows, interrupted, shard_rows=4)
    assert len(ReferenceCache.open(tmp_path, settings)) == 4 and not list(tmp_path.glob("*.part"))


def test_processes_share_the_rows_and_another_number_goes_on(loaded, settings, tmp_path):
    rows, logps_fn = tiny_rows(7), logps_of(loaded, batch_size=1)
    caches = [ReferenceCache.create(tmp_path, settings) for _ in range(3)]
    done = [fill(caches[rank], rows, logps_fn, rank=rank, world=3) for rank in range(2)]  # the third never ran
    assert [d.rows for d in done] == [3, 2] and len(caches[0]) == 3
    caches[0].reload()
    assert caches[0].missing(rows) == [2, 5]
    done = [fill(ReferenceCache.open(tmp_path, settings), rows, logps_fn, rank=rank, world=2) for rank in range(2)]
    assert [d.computed for d in done] == [1, 1]
    assert not ReferenceCache.open(tmp_path, settings).missing(rows)


# ---- the command ----


@pytest.fixture
def data(tmp_path):
    write_rows(tmp_path / "data", tiny_rows(5))
    return tmp_path / "data"


def command(folder, data, out, *more):
    return ["reference", "--model", str(folder), "--data", str(data), "--out", str(out), *more]


def test_the_command(folder, data, loaded, settings, tmp_path, capsys):
    out = tmp_path / "cache"
    arguments = command(folder, data, out, "--max_length", str(MAX_LENGTH), "--batch_size", "2")
    assert cli.main([*arguments, "--limit", "3"]) == 0
    assert "3 rows: 3 computed, 0 were there" in capsys.readouterr().out
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    rows = load_rows(data)
    cache = ReferenceCache.open(out, reference_settings(*loaded, max_length=MAX_LENGTH))
    assert "5 rows: 2 computed, 3 were there: " in text and "tokens/s" in text
    assert f"5 rows, {cache.num_tokens} tokens" in text and "MiB on disk in 2 shards" in text
    assert "3 rows that were there, computed again, differ by at most" in text
    live = list(logps_of(loaded)([rows[n] for n in range(5)]))
    for n in range(5):
        torch.testing.assert_close(torch.cat(cache.get(rows[n])), torch.cat(live[n]), rtol=0, atol=1e-5)
    assert cli.main([*arguments, "--max_length", "128"]) == 2
    assert "max_length was 256, now it is 128" in capsys.readouterr().err
    assert cli.main([*arguments, "--attn_implementation", "eager"]) == 2
    assert "attention was sdpa, now it is eager" in capsys.readouterr().err
    assert cli.main(arguments) == 0
    assert "5 rows: 0 computed, 5 were there\n" in capsys.readouterr().out


def run_as(rank, port, arguments, printed):
    os.environ |= launched(rank, 2, port) | {"ACCELERATE_USE_CPU": "1"}
    PartialState._reset_state()  # what the parent may have made
    with printed.open("w") as file, contextlib.redirect_stdout(file):
        sys.exit(cli.main(arguments))


def test_two_processes_of_the_command(folder, data, loaded, tmp_path):
    arguments = command(folder, data, tmp_path / "cache", "--max_length", str(MAX_LENGTH))
    printed = [tmp_path / "0.txt", tmp_path / "1.txt"]
    with Port() as port:
        processes = [FORK.Process(target=run_as, args=(rank, port, arguments, printed[rank])) for rank in (0, 1)]
        for process in processes:
            process.start()
        end = time.monotonic() + 240  # for both, on a loaded machine
        for process in processes:
            process.join(max(0.1, end - time.monotonic()))
        for process in processes:
            process.kill()
            process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    text = printed[0].read_text()
    assert (
        "5 rows: 5 computed" in text
        and "cache: 5 rows," in text
        and "in 2 shards" in text
        and not printed[1].read_text()
    )
    cache = ReferenceCache.open(tmp_path / "cache", reference_settings(*loaded, max_length=MAX_LENGTH))
    assert not cache.missing(load_rows(data))


def test_the_command_refuses_an_adapter_and_bad_sizes(folder, data, tmp_path, capsys):
    model, _ = load_model(folder)
    get_peft_model(model, LoraConfig(target_modules=r".*language_model.*\.q_proj")).save_pretrained(tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    (tmp_path / "lora" / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(folder)})
    )
    assert cli.main(command(tmp_path / "lora", data, tmp_path / "cache")) == 2
    assert "is an adapter" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert cli.main(command(folder, data, tmp_path / "cache", "--load_in_4bit")) == 2
        assert "needs a CUDA device" in capsys.readouterr().err
    assert cli.main(command(folder, data, tmp_path / "cache", "--batch_size", "0")) == 2
    assert "must be at least 1" in capsys.readouterr().err
