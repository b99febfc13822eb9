"""Disks that are full or cannot be written to: a line that says so, nothing lost, and no half files left behind."""

import aspo  # isort: skip  # noqa: F401  (first: it makes torchvision importable on a CPU torch)

import pytest
from faults import SAVE_EVERY, Command, Place, fault, kept, run, said
from injected import AtStep, Fill, fill_disk, read_only, small_disk

CHANGES = ("rewards", "--method", "changes", "--batch-size", 2, "--shard-rows", 2)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("disk"))


@pytest.fixture
def disk(tmp_path):
    """A file system of 8 MiB."""
    with small_disk(tmp_path / "disk", 8) as folder:
        yield folder


def stops(place, disk, tmp_path, request, step, leave_kib, size=1):
    """A run that finds the disk full at a step; what the first process says. Then room is made."""
    argv = place.training(disk / "out", size=size)
    fault = AtStep(step, (0,), Fill(disk, leave_kib))
    statuses, texts = Command(argv, tmp_path / "printed", size, fault).wait()
    assert statuses == [2] * size, texts
    said(request.function, texts[0])
    for text in texts[1:]:
        assert "one of them has died or hangs" in text and "Traceback" not in text
    (disk / "full").unlink()
    return argv


@pytest.mark.parametrize(("leave_kib", "size"), [(60, 1), (240, 1), (240, 2)])
@fault(
    "the disk is full when a checkpoint is written",
    sees="aspo train: <output_dir>/checkpoint-8 could not be written (<why>; <n> MiB are free there): "
    "<output_dir>/checkpoint-4 is kept. Make room and run the same command again",
    kept="the checkpoint before; the half one is deleted, so that there is room for other things",
    goes_on="the same command, when there is room: the same weights, bit for bit",
)
def test_checkpoint(place, disk, tmp_path, request, leave_kib, size):
    argv = stops(place, disk, tmp_path, request, 2 * SAVE_EVERY, leave_kib, size)
    assert kept(disk / "out") == ["checkpoint-4"] and not (disk / "out" / "checkpoint-8").exists()
    place.goes_on(argv, size)


@fault(
    "the disk is full when the final model is written",
    sees="aspo train: <output_dir> could not be written (<why>; <n> MiB are free there): <output_dir>/checkpoint-8 is "
    "kept. Make room and run the same command again",
    kept="the last step's checkpoint",
    goes_on="the same command, when there is room, without a further step: the same weights, bit for bit",
)
def test_final_model(place, disk, tmp_path, request):
    argv = stops(place, disk, tmp_path, request, 2 * SAVE_EVERY, 400)
    place.goes_on(argv)


@fault(
    "the disk is full when the log is written",
    sees="aspo train: [Errno 28] No space left on device: '<output_dir>/log_history.json'",
    kept="the last checkpoint, and the log as it was",
    goes_on="the same command, when there is room: the same weights, bit for bit",
)
def test_log(place, disk, tmp_path, request):
    argv = stops(place, disk, tmp_path, request, 6, 0)
    assert kept(disk / "out") == ["checkpoint-4"] and not list((disk / "out").glob("*.part"))
    place.goes_on(argv)


@fault(
    "the disk is too full for one checkpoint before the first step",
    sees="aspo train: <output_dir> has <n> MiB free, and one checkpoint takes at least <n> MiB: make room, or choose "
    "another --output_dir",
    kept="all; no step is taken",
    goes_on="the same command, when there is room",
)
def test_before_the_first_step(place, disk, tmp_path, request):
    fill_disk(disk, 150)
    for size in (1, 2):
        statuses, texts = Command(place.training(disk / "out", size=size), tmp_path / "printed", size).wait()
        assert statuses == [2] * size, texts
        for text in texts:
            said(request.function, text)
    (disk / "full").unlink()
    place.goes_on(place.training(disk / "out"))


@fault(
    "the output folder cannot be written to",
    sees="aspo train: [Errno 30] Read-only file system: '<output_dir><file>'",
    kept="all; neither model nor step is begun",
    goes_on="the same command, when it can; a finished run in such a folder is still seen as finished",
)
def test_read_only(place, disk, tmp_path, request):
    argv = place.training(disk / "out", size=2)
    with read_only(disk):
        statuses, texts = Command(argv, tmp_path / "printed", 2).wait()
        assert statuses == [2, 2], texts
        for text in texts:
            said(request.function, text)
            assert "Loading weights" not in text
    place.goes_on(argv, 2)
    with read_only(disk):
        assert "is finished" in place.ends(argv, 2)


@fault(
    "the disk is full when a shard of `aspo score`, `pairs`, `negatives` or `rewards` is written",
    sees="aspo <command>: [Errno 28] No space left on device: '<out>/<file>'",
    kept="the shards that are whole; of the others nothing is left behind",
    goes_on="the same command, when there is room, makes the missing shards: the same bytes",
)
def test_shard(place, disk, tmp_path, request):
    argv = [*CHANGES, "--data", place.rows, "--out"]
    fill_disk(disk, 64)
    status, text = run([*argv, disk / "out"], tmp_path / "printed")
    assert status == 2
    said(request.function, text)
    made = {path: path.stat().st_mtime_ns for path in (disk / "out" / "shards" / "rewards").iterdir()}
    assert 0 < len(made) < 8 and not [path for path in made if path.suffix != ".jsonl"]
    (disk / "full").unlink()
    place.ends([*argv, disk / "out"])
    assert {path: path.stat().st_mtime_ns for path in made} == made
    place.ends([*argv, tmp_path / "whole"])
    assert (disk / "out" / "rows.jsonl").read_bytes() == (tmp_path / "whole" / "rows.jsonl").read_bytes()


@fault(
    "the disk is full when a reference cache is written",
    sees="aspo reference: [Errno 28] No space left on device: '<out>/<file>'",
    kept="the cache's shards that are whole; of the others nothing is left behind",
    goes_on="the same command, when there is room, computes what is missing",
)
def test_reference(place, disk, tmp_path, request):
    argv = ["reference", "--model", place.model, "--data", place.rows, "--out", disk / "cache"]
    fill_disk(disk, 4)
    status, text = run(argv, tmp_path / "printed")
    assert status == 2
    said(request.function, text)
    assert [path.name for path in (disk / "cache").iterdir()] == ["meta.json"]
    (disk / "full").unlink()
    place.ends(argv)
    assert len(list((disk / "cache").glob("shard-*"))) == 1
