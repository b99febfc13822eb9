"""Files that are cut short, spoilt or gone, and rows that are none: seen before they can do harm, and named."""

import aspo  # isort: skip  # noqa: F401  (first: it makes torchvision importable on a CPU torch)

import json
import os
import shutil
from zipfile import is_zipfile

import faults
import injected
import pytest
from faults import KILLED, Command, Place, assert_same, fault, kept, run, said
from injected import AtStep, AtWrite

from aspo.checkpoints import is_complete
from aspo.resume import write_json

# Of a checkpoint's files training reads these; of the others a resumed run takes what the start model has.
READ = {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
CHANGES = ("rewards", "--method", "changes", "--batch-size", 2, "--shard-rows", 2)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("damage"))


def unfinished(place, output, *more, size=1):
    """An undisturbed run's output as a kill after its last checkpoint leaves it."""
    shutil.copytree(place.whole(size, *more), output)
    for weights in output.glob("*.safetensors"):
        weights.unlink()
    write_json(output / "run.json", {**json.loads((output / "run.json").read_text()), "finished": None})
    return output


@fault(
    "a file of the last checkpoint is cut short or gone (any one of them)",
    sees="",
    kept="the checkpoint before",
    goes_on="the same command goes on from the last whole one: the same weights, bit for bit",
)
def test_a_truncated_checkpoint(place, tmp_path):
    output = unfinished(place, tmp_path / "out")
    last, before = output / "checkpoint-8", output / "checkpoint-4"
    for path in sorted(last.iterdir()):
        whole = path.read_bytes()
        for damaged in (whole[: len(whole) // 2], b"", None):
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            matters = path.name in READ or (path.suffix in (".json", ".bin") and damaged is not None)
            assert is_complete(last) != matters, (path.name, damaged and len(damaged))
        path.write_bytes(whole)
    assert is_complete(last)
    content = (last / "scheduler.pt").read_bytes()
    (last / "scheduler.pt").write_bytes(bytes(64) + content[64:])  # as a loss of power may leave it
    assert not is_complete(last)
    (last / "scheduler.pt").write_bytes(content)
    os.truncate(last / "optimizer.pt", 100_000)
    assert f"going on from {before}" in place.goes_on(place.training(output))


@fault(
    "config.json of the last checkpoint of a full fine-tuning is gone",
    sees="",
    kept="all: its weights are read with the model's own configuration",
    goes_on="the same command: the same weights, bit for bit",
)
def test_a_checkpoint_without_its_configuration(place, tmp_path):
    """transformers would build the class's default instead, of 7B parameters."""
    full = ("--no_use_lora",)
    output = unfinished(place, tmp_path / "out", *full)
    (output / "checkpoint-8" / "config.json").unlink()
    said = place.goes_on(place.training(output, *full), like=place.whole(1, *full))
    assert f"going on from {output / 'checkpoint-8'}" in said


@fault(
    "SIGKILL while a checkpoint that was cut short is written again",
    sees="",
    kept="the checkpoint before: old and new files in one folder never count as one",
    goes_on="the same command: the same weights, bit for bit",
)
def test_a_kill_over_a_truncated_checkpoint(place, tmp_path):
    output = unfinished(place, tmp_path / "out")
    os.truncate(output / "checkpoint-8" / "optimizer.pt", 100_000)
    status, _ = run(place.training(output), tmp_path / "p", fault=AtWrite("checkpoint-8", "scheduler.pt"))
    assert status == KILLED and is_zipfile(output / "checkpoint-8" / "optimizer.pt")  # it is whole again
    assert kept(output) == ["checkpoint-4"]
    place.goes_on(place.training(output))


@fault(
    "the random state of one of several processes is cut short or gone in the last checkpoint",
    sees="",
    kept="the checkpoint before",
    goes_on="the same command goes on from the last whole one: the same weights, bit for bit",
)
def test_a_truncated_random_state(place, tmp_path):
    output = unfinished(place, tmp_path / "out", size=2)
    (output / "checkpoint-8" / "rng_state_0.pth").unlink()
    assert f"going on from {output / 'checkpoint-4'}" in place.goes_on(place.training(output, size=2), 2)


@fault(
    "all checkpoints are cut short",
    sees="",
    kept="nothing that counts",
    goes_on="the same command begins anew: the same weights, bit for bit",
)
def test_all_checkpoints_are_truncated(place, tmp_path):
    output = unfinished(place, tmp_path / "out")
    for path in output.glob("checkpoint-*/adapter_model.safetensors"):
        os.truncate(path, 50_000)
    assert f"results in {output}" in place.goes_on(place.training(output))


@pytest.mark.parametrize(("name", "start"), [("optimizer.pt", 64), ("optimizer.pt", 1024), ("rng_state.pth", 64)])
@fault(
    "a checkpoint's file is spoilt inside, at its full length",
    sees="aspo train: <checkpoint> cannot be read (<why>): if it is damaged, delete it, and the same command goes on "
    "from the one before",
    kept="all",
    goes_on="when that checkpoint is deleted: the same weights, bit for bit",
)
def test_a_spoilt_checkpoint(place, tmp_path, request, name, start):
    output = place.folder / f"spoilt-{name}-{start}"
    assert run(place.training(output), tmp_path / "p", fault=AtStep(6, (0,), injected.die))[0] == KILLED
    shutil.copytree(output / "checkpoint-4", tmp_path / "good")
    spoilt = output / "checkpoint-4" / name
    content = spoilt.read_bytes()
    spoilt.write_bytes(content[:start] + bytes(1024) + content[start + 1024 :])
    status, text = run(place.training(output), tmp_path / "p")
    assert status == 2
    said(request.function, text)
    shutil.rmtree(output / "checkpoint-4")
    place.goes_on(place.training(output))


@fault(
    "run.json is cut short (it is replaced at once, so only the disk can do that)",
    sees="aspo train: <output_dir>/run.json is no record of `aspo train`: choose another --output_dir",
    kept="all",
    goes_on="with `--resume_from_checkpoint <checkpoint>` in a new --output_dir",
)
def test_a_truncated_record(place, tmp_path, request):
    output = unfinished(place, tmp_path / "out")
    os.truncate(output / "run.json", 700)
    status, text = run(place.training(output), tmp_path / "p")
    assert status == 2
    said(request.function, text)
    place.ends(place.training(tmp_path / "new", "--resume_from_checkpoint", output / "checkpoint-4"))
    assert_same(place.whole(), tmp_path / "new")


class FromTheFuture:
    """The clock was set back after the first checkpoint, so that it looks newer than those that follow."""

    def __init__(self, checkpoint):
        self.checkpoint = checkpoint

    def __call__(self, losses):
        os.utime(self.checkpoint, (2e9, 2e9))
        return losses


@fault(
    "the clock is set back during a run (`save_total_limit` 1)",
    sees="",
    kept="the checkpoint with the most steps: times of files are never read",
    goes_on="the run itself is undisturbed",
)
def test_the_clock_is_set_back(place, tmp_path):
    argv, output = place.training(tmp_path / "out", "--save_total_limit", 1), tmp_path / "out"
    clock = AtStep(6, (0,), FromTheFuture(output / "checkpoint-4"))
    assert run(argv, tmp_path / "p", fault=clock)[0] == 0
    assert kept(output) == ["checkpoint-8"]
    assert_same(place.whole(), output)


# ---- offline jobs and caches ----


@fault(
    "SIGKILL of one of several processes in a shard of `aspo score`, `pairs`, `negatives` or `rewards`",
    sees="aspo <command>: process <rank> of 2 waited for the others, and one of them has died or hangs (<why>). What "
    "is done is kept: run the same command again",
    kept="every whole shard: a kill costs each process the one that it was at",
    goes_on="the same command, on any number of processes: the same bytes (also tests/test_shards.py)",
)
def test_sigkill_during_a_shard(place, tmp_path, request):
    argv = [*CHANGES, "--data", place.rows, "--out"]
    statuses, texts = Command([*argv, tmp_path / "out"], tmp_path / "p", 2, injected.at_second_shard).wait()
    assert statuses == [2, KILLED]
    said(request.function, texts[0])
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "shards" / "rewards").glob("*.jsonl")}
    assert 4 < len(made) < 8
    place.ends([*argv, tmp_path / "out"], 3)
    assert {p: p.stat().st_mtime_ns for p in made} == made
    place.ends([*argv, tmp_path / "whole"])
    assert (tmp_path / "out" / "rows.jsonl").read_bytes() == (tmp_path / "whole" / "rows.jsonl").read_bytes()


@fault(
    "a shard of an offline job is cut short",
    sees="<shard> is damaged (its content is not what was written): its rows are made again",
    kept="every other shard",
    goes_on="by itself: the same bytes (also tests/test_shards.py)",
)
def test_a_truncated_shard(place, tmp_path, request):
    argv = [*CHANGES, "--data", place.rows, "--out", tmp_path / "out"]
    place.ends(argv)
    whole = (tmp_path / "out" / "rows.jsonl").read_bytes()
    (tmp_path / "out" / "rows.jsonl").unlink()
    shard = sorted((tmp_path / "out" / "shards" / "rewards").glob("*.jsonl"))[3]
    os.truncate(shard, shard.stat().st_size - 20)
    warned = [line for line in place.ends(argv).splitlines() if "damaged" in line]
    said(request.function, warned[0])
    assert (tmp_path / "out" / "rows.jsonl").read_bytes() == whole


@fault(
    "a shard of a reference cache is cut short",
    sees="<shard> is damaged (<why>): its rows count as missing",
    kept="every other shard",
    goes_on="by itself: the rows are computed again, and training ends with the same weights",
)
def test_a_truncated_reference(place, tmp_path, request):
    place.ends(["reference", "--model", place.model, "--data", place.rows, "--out", tmp_path / "cache"])
    (shard,) = (tmp_path / "cache").glob("shard-*")
    os.truncate(shard, shard.stat().st_size // 2)
    own = ["--precompute_ref_log_probs", "true", "--reference_cache", tmp_path / "cache"]
    text = place.ends(place.training(tmp_path / "out", *own))
    said(request.function, next(line for line in text.splitlines() if "damaged" in line))
    assert_same(place.whole(), tmp_path / "out", 1e-6)


# ---- rows ----


def spoilt_rows(place, folder, spoil):
    """The rows with the tenth one spoilt, as a new folder."""
    shutil.copytree(place.rows, folder)
    lines = (folder / "rows.jsonl").read_text().splitlines(keepends=True)
    row = json.loads(lines[9])
    changed = spoil(row, lines[9], folder)
    lines[9] = changed if isinstance(changed, str) else json.dumps(row) + "\n"
    (folder / "rows.jsonl").write_text("".join(lines))
    return folder


def stopped(place, tmp_path, request, spoil, *more, trained=False):
    """Training on such rows: one line, nothing trained; with the rows as they were, the same command goes on."""
    rows = spoilt_rows(place, tmp_path / "rows", spoil)
    for size in (1, 2):
        argv = place.training(tmp_path / f"out-{size}", *more, size=size)
        argv[argv.index("--train_data") + 1] = rows
        statuses, texts = Command(argv, tmp_path / f"p-{size}", size).wait()
        assert statuses == [2] * size, texts
        told = [text for text in texts if "died or hangs" not in text]
        assert told
        for text in told:
            said(request.function, text)
        if not trained:
            assert not (tmp_path / f"out-{size}" / "run.json").exists()
    shutil.rmtree(rows)
    shutil.copytree(place.rows, rows)
    place.goes_on(argv, 2)


@fault(
    "a line in the middle of a data set is no JSON",
    sees="aspo train: <rows.jsonl>, line 10 is no JSON: <why>",
    kept="all; no model is loaded",
    goes_on="when the line is mended or deleted",
)
def test_a_line_that_is_no_json(place, tmp_path, request):
    stopped(place, tmp_path, request, lambda row, line, folder: line[: len(line) // 2] + "\n")


@fault(
    "a row lacks a column",
    sees="aspo train: row 9 (id 'row-9'), column 'rejected': missing; a preference row has prompt, chosen, rejected, "
    "and this one has <columns>",
    kept="all; no model is loaded",
    goes_on="when the row is mended or deleted",
)
def test_a_row_that_lacks_a_column(place, tmp_path, request):
    stopped(place, tmp_path, request, lambda row, line, folder: row.pop("rejected") and None)


@fault(
    "a row's column is of another type",
    sees="aspo train: row 9 (id 'row-9'), column 'chosen': a response must be a text or one assistant "
    "message, got [1, 2]",
    kept="all; no model is loaded",
    goes_on="when the row is mended or deleted",
)
def test_a_row_of_another_type(place, tmp_path, request):
    stopped(place, tmp_path, request, lambda row, line, folder: row.update(chosen=[1, 2]))


@fault(
    "an image is not there",
    sees="aspo train: row 9 (id 'row-9'), column 'images': no image file <where it was looked for>",
    kept="all; no model is loaded",
    goes_on="when the image is back, or the row deleted",
)
def test_an_image_that_is_gone(place, tmp_path, request):
    stopped(place, tmp_path, request, lambda row, line, folder: (folder / row["images"][0]).unlink())


@pytest.mark.parametrize("workers", [0, 1])
@fault(
    "an image is cut short",
    sees="aspo train: row 'row-9': image <file> cannot be read: <why>",
    kept="the last checkpoint: images are decoded when their batch comes",
    goes_on="when the image is whole again, or the row deleted: that is another data set, for another --output_dir",
)
def test_a_truncated_image(place, tmp_path, request, workers):
    def cut(row, line, folder):
        os.truncate(folder / row["images"][0], 60)

    stopped(place, tmp_path, request, cut, "--dataloader_num_workers", workers, trained=True)


def test_rows_are_as_many_as_the_tests_think(place):
    assert len((place.rows / "rows.jsonl").read_text().splitlines()) == 16 and faults.PAIRS * 3 > 16
