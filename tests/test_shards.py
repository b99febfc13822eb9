"""Shards: any number of processes, killed at any moment, end with the bytes of one that was not; what is damaged,
missing, foreign or changed is noticed."""

import contextlib
import dataclasses
import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from accelerate import PartialState
from forked import Port, ended, launched

import aspo  # noqa: F401  first: it makes torchvision importable on a CPU torch
from aspo import cli
from aspo.data import load_rows, write_rows
from aspo.folder import row_line
from aspo.negatives import autoencoder, embeddings, report, sources
from aspo.shards import Engine, Job, Processes, assembly, files, run_job
from aspo.shards import job as jobs
from aspo.shards import processes as shards_processes

FORK = multiprocessing.get_context("fork")  # importing takes seconds, a fork milliseconds
SECONDS = 240  # after which a process counts as hanging

WORLD = ("--data", "world:train", "--limit", 9, "--model", "world", "--max-new-tokens", 48, "--batch-size", 2)
COMMANDS = {
    "score": ("score", "--data", "PAIRS", "--scorer", "world", "--rejected", "--batch-size", 2),
    "seva": ("pairs", *WORLD, "--temperature", 1),
    "povid": ("pairs", *WORLD, "--method", "povid", "--temperature", 1),
    "csr": ("pairs", *WORLD, "--method", "csr", "--scorer", "world", "--candidates", 2, "--beams", 1,
            "--max-sentences", 5),
    "sentinel": ("pairs", *WORLD, "--method", "sentinel", "--judge", "truth", "--max-sentences", 2),
    "unpaired": ("pairs", "--method", "unpaired", "--data", "PAIRS"),
    "misp": ("negatives", "--data", "PAIRS", "--scorer", "world", "--sae-steps", 20, "--latents", 8),
    "hard": ("negatives", "--data", "PAIRS", "--method", "hard", "--scorer", "world", "--duplicate", 1.5),
    "crop": ("negatives", "--data", "PAIRS", "--method", "crop", "--scorer", "world", "--count", 1),
    "changes": ("rewards", "--method", "changes", "--data", "PAIRS", "--batch-size", 2),
    "fisao": ("rewards", "--method", "fisao", "--model", "world", "--scorer", "world", "--objects", "world", "--data",
              "PAIRS", "--calibrate", "world:calibration", "--calibrate-limit", 24, "--max-new-tokens", 32,
              "--batch-size", 4),
    "tldr": ("rewards", "--method", "tldr", "--model", "world", "--objects", "world", "--train", "world:calibration",
             "--train-limit", 12, "--epochs", 2, "--data", "PAIRS", "--max-new-tokens", 24, "--batch-size", 2),
}  # fmt: skip


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Nine pairs of the embedded world."""
    folder = tmp_path_factory.mktemp("pairs")
    texts = ["The circle is red. The star is blue.", "A star is green.", "There are two objects. It is small."]
    rows = load_rows("world:train", kind="prompt", limit=9)
    write_rows(folder, [{**row, "chosen": texts[n % 3], "rejected": texts[(n + 1) % 3]} for n, row in enumerate(rows)])
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few rows are several batches, and several blocks of features."""
    monkeypatch.setattr(sources, "SELECT_ELEMENTS", 20)
    monkeypatch.setattr(embeddings, "BLOCK", 4)
    monkeypatch.setattr(assembly, "PATIENCE_SECONDS", 0.5)
    for name in ("plot_grid", "plot_projection"):  # pictures take most of the time
        monkeypatch.setattr(report, name, lambda *_: None)
    monkeypatch.setattr(autoencoder, "plot_latents", lambda *_: None)


def arguments(name, pairs, out, *more):
    given = [str(pairs) if a == "PAIRS" else str(a) for a in COMMANDS[name]]
    device = [] if name in ("unpaired", "changes") else ["--device", "cpu"]
    return [*given, *device, "--out", str(out), "--shard-rows", "2", *map(str, more)]


def tree(folder):
    """Every file's bytes but the note of what was there before; safetensors does not order its header."""
    found = {}
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        if path.name != assembly.ASSEMBLED_FILE:
            content = path.read_bytes()
            if path.suffix == ".safetensors":
                size = 8 + int.from_bytes(content[:8], "little")
                content = json.dumps(json.loads(content[8:size]), sort_keys=True).encode() + content[size:]
            found[str(path.relative_to(folder))] = content
    return found


def _work(rank, size, port, argv, printed, prepare):
    """One process: what torchrun sets, then the command."""
    if size > 1:
        os.environ |= launched(rank, size, port)
    PartialState._reset_state()  # what the parent may have made
    torch.set_num_threads(1)
    with printed.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        prepare(rank)
        status = cli.main(argv)
        file.flush()
        os._exit(status)


def run(size, argv, folder, prepare=lambda rank: None):
    """The command in `size` processes; (exit status of each, what each printed)."""
    folder.mkdir(exist_ok=True, parents=True)
    printed = [folder / f"{rank}.txt" for rank in range(size)]
    with Port() as port:
        processes = [FORK.Process(target=_work, args=(r, size, port, argv, printed[r], prepare)) for r in range(size)]
        for process in processes:
            process.start()
        end = time.monotonic() + SECONDS
        for process in processes:
            process.join(max(0.1, end - time.monotonic()))
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        process.kill()
        process.join()
    texts = [path.read_text() for path in printed]
    assert not hanging, texts
    return [process.exitcode for process in processes], texts


# ---- the same bytes ----


LONGER = ("povid", "csr", "sentinel", "tldr")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in LONGER else ()) for n in COMMANDS])
def test_any_number_of_processes_gives_the_same_bytes(name, pairs, tmp_path):
    for size in (1, 2, 3):
        status, printed = run(size, arguments(name, pairs, tmp_path / str(size)), tmp_path / "printed")
        assert status == [0] * size, printed
    one = tree(tmp_path / "1")
    shards = [path for path in one if path.startswith("shards/")]
    assert len(shards) >= 4 and one["rows.jsonl"].count(b"\n") >= 3
    assert not [path for path in one if path.endswith((".part", ".partial"))]
    for size in (2, 3):
        other = tree(tmp_path / str(size))
        assert sorted(other) == sorted(one)
        assert not [path for path in one if one[path] != other[path]]


class Log:
    """Notes which shards were begun, by row, over all processes; kills its own process at a moment."""

    def __init__(self, path, moment=None, after=0, ranks=(0, 1)):
        self.path, self.moment, self.after, self.ranks = path, moment, after, ranks

    def __call__(self, rank):
        write, write_shard, replace = jobs.Job.write, jobs.write_shard, os.replace
        written = []

        def logged(job, start, *rest):
            with self.path.open("a") as file:  # one write of a short line: whole
                file.write(f"{job.name} {start} {rank}\n")
            write(job, start, *rest)

        def now(moment):
            if self.moment == moment and rank in self.ranks and len(written) >= self.after:
                os.kill(os.getpid(), signal.SIGKILL)

        def writing(*args):
            now("work")  # all of the shard is made, nothing is written
            write_shard(*args)
            written.append(args)
            now("shard")

        def replacing(source, target):
            if Path(target).parent.parent.name == "shards" and Path(target).suffix == ".jsonl":
                content = Path(source).read_bytes()
                Path(source).write_bytes(content[: len(content) // 2])
                now("torn")  # half of the file is written
                Path(source).write_bytes(content)
            if Path(target).name == "rows.jsonl":
                now("assembly")  # the other files are in place
            replace(source, target)

        jobs.Job.write, jobs.write_shard, os.replace = logged, writing, replacing

    def begun(self):
        return [line.split()[:2] for line in self.path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "moment", "after", "ranks", "sizes"),
    [
        ("seva", "shard", 1, (0, 1), (2, 3)),
        ("seva", "work", 1, (1,), (2, 1)),
        ("score", "torn", 0, (0, 1), (2, 3)),
        ("score", "torn", 1, (0, 1), (3, 2)),
        ("misp", "work", 0, (0,), (2, 1)),
        pytest.param("fisao", "shard", 2, (0, 1), (2, 3), marks=pytest.mark.slow),
        ("changes", "assembly", 0, (0,), (2, 1)),
        ("score", "assembly", 0, (0,), (1, 2)),
    ],
)
def test_a_kill_costs_a_process_one_shard_and_no_byte(name, moment, after, ranks, sizes, pairs, tmp_path):
    argv = arguments(name, pairs, tmp_path / "out")
    log = Log(tmp_path / "log", moment, after, ranks)
    before, then = sizes
    status, printed = run(before, argv, tmp_path / "killed", log)
    killed = [rank for rank in ranks if rank < before]
    assert all(status[rank] in (-signal.SIGKILL, cli.USAGE) for rank in killed), printed
    assert -signal.SIGKILL in status
    for rank, code in enumerate(status):
        assert code == -signal.SIGKILL or "one of them has died or hangs" in printed[rank]
    status, printed = run(then, argv, tmp_path / "again", Log(tmp_path / "log"))
    assert status == [0] * then, printed
    assert run(1, arguments(name, pairs, tmp_path / "whole"), tmp_path / "one")[0] == [0]
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    begun = log.begun()
    again = len(begun) - len({tuple(shard) for shard in begun})
    assert again <= status_killed(killed) and (moment != "shard" or again <= before - len(killed))


def status_killed(killed):
    return max(1, len(killed))


# ---- what is there already ----


def make_job(folder, rows, calls, **options):
    """A job of one line a row, which notes the batches that it makes."""

    def make(batch, start):
        calls.append([row["id"] for row in batch])
        return {"rows.jsonl": [row_line(folder, {**row, "made": True}) for row in batch]}

    return Job(folder, "test", rows, {"a": 1}, lambda: make, 2, **options)


def numbered(count, **columns):
    return [{"id": str(n), "text": f"text {n}", **columns} for n in range(count)]


def here(shard_rows=2):
    return Engine(Processes.current(), shard_rows=shard_rows)


def ids(folder):
    return [json.loads(line)["id"] for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_only_what_is_new_or_changed_is_made(tmp_path):
    calls, rows = [], numbered(7)
    assert run_job(make_job(tmp_path, rows[:5], calls), here()) == 3
    assert run_job(make_job(tmp_path, rows[:5], calls), here()) == 0
    del calls[:]
    assert run_job(make_job(tmp_path, rows, calls), here()) == 2  # the last shard was not full
    assert calls == [["4", "5"], ["6"]] and ids(tmp_path) == [str(n) for n in range(7)]
    del calls[:]
    rows[1] = {**rows[1], "text": "another"}
    assert run_job(make_job(tmp_path, rows, calls), here()) == 1 and calls == [["0", "1"]]
    assert json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[1])["text"] == "another"
    assert len(list((tmp_path / "shards" / "test").glob("*.jsonl"))) == 4  # stale ones are gone
    with pytest.raises(ValueError, match=r"holds 2 rows that would be lost, e\.g\. row '5'"):
        run_job(make_job(tmp_path, rows[:5], calls), here())
    del calls[:]
    assert run_job(make_job(tmp_path, rows, calls), here(shard_rows=4)) == 2  # cut otherwise: all is made again


def test_rows_settings_places_and_images_make_the_key(tmp_path):
    def key(rows, start=0, **settings):
        return files.shard_key(rows, start, settings, tmp_path)

    for name, content in (("a.png", b"1"), ("b.png", b"2"), ("c.png", b"1"), ("d.jpg", b"1")):
        (tmp_path / name).write_bytes(content)
    row = {"id": "x", "prompt": "p", "images": [str(tmp_path.parent / "elsewhere" / "a.png")]}
    (tmp_path.parent / "elsewhere").mkdir()
    (tmp_path.parent / "elsewhere" / "a.png").write_bytes(b"1")
    (tmp_path.parent / "elsewhere" / "z.png").write_bytes(b"1")
    same = {**row, "images": [{"bytes": None, "path": str(tmp_path.parent / "elsewhere" / "z.png")}], "chosen": None}
    assert key([row], a=1) == key([same], a=1)  # where images lie, and columns without a value, do not matter
    keys = [
        key([row], a=1),
        key([row], a=2),
        key([row], 2, a=1),
        key([{**row, "prompt": "q"}], a=1),
        key([row, row], a=1),
        key([{**row, "images": [str(tmp_path / "b.png")]}], a=1),
        key([{**row, "images": [str(tmp_path / "a.png")]}], a=1),  # in the folder: it keeps its name there
        key([{**row, "images": [str(tmp_path / "c.png")]}], a=1),
        key([{**row, "images": [{"bytes": b"1", "path": None}]}], a=1),
    ]
    (tmp_path.parent / "elsewhere" / "a.png").write_bytes(b"another image of the same name")
    assert len({*keys, key([row], a=1)}) == len(keys) + 1


@pytest.mark.parametrize("damage", ["cut", "byte", "empty", "head", "other"])
def test_a_damaged_shard_is_made_again_with_a_line_that_says_so(tmp_path, damage, caplog):
    calls, rows = [], numbered(6)
    run_job(make_job(tmp_path, rows, calls), here())
    whole = tree(tmp_path)
    shard = next(p for p in (tmp_path / "shards" / "test").glob("*.jsonl") if b'"id": "2"' in p.read_bytes())
    content = shard.read_bytes()
    others = [p for p in shard.parent.glob("*.jsonl") if p != shard]
    shard.write_bytes(
        {
            "cut": content[:-9],
            "byte": content.replace(b"text 2", b"text 9"),
            "empty": b"",
            "head": b"{}\n" + content,
            "other": others[0].read_bytes(),  # whole, but of other rows
        }[damage]
    )
    (tmp_path / "rows.jsonl").unlink()
    del calls[:]
    assert run_job(make_job(tmp_path, rows, calls), here()) == 1 and calls == [["2", "3"]]
    assert f"{shard} is damaged" in caplog.text and "its rows are made again" in caplog.text
    assert tree(tmp_path) == whole


def test_a_full_disk_keeps_the_shards_that_are_there(tmp_path, monkeypatch):
    calls, rows = [], numbered(6)

    def full(descriptor, real=os.fsync):
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"No space left on device: .*\.jsonl"):
        patch.setattr(os, "fsync", full)
        run_job(make_job(tmp_path, rows, calls), here())
    assert [path.suffix for path in (tmp_path / "shards" / "test").iterdir()] == [".jsonl"]
    assert run_job(make_job(tmp_path, rows, calls), here()) == 2 and ids(tmp_path) == [str(n) for n in range(6)]


def test_an_image_that_is_gone_or_cut_short_is_stored_again(tmp_path, caplog):
    calls = []
    rows = [{**row, "images": [{"bytes": bytes([n]) * 100, "path": None}]} for n, row in enumerate(numbered(4))]
    out = tmp_path / "out"
    run_job(make_job(out, rows, calls), here())
    whole, stored = tree(out), sorted((out / "images").iterdir())
    for damage in (lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:50])):
        damage(stored[0])
        (out / "rows.jsonl").unlink()
        caplog.clear()
        assert run_job(make_job(out, rows, calls), here()) == 1
        assert stored[0].name in caplog.text and tree(out) == whole


def test_images_that_the_rows_bring_are_left_alone(tmp_path):
    own = tmp_path / "images" / ("a" * 24 + ".png")  # named as ours are, but by another hash
    own.parent.mkdir()
    own.write_bytes(b"its own")
    rows = numbered(2, images=[str(own)])
    run_job(make_job(tmp_path, rows, []), here())
    (tmp_path / "rows.jsonl").unlink()
    assert run_job(make_job(tmp_path, rows, []), here()) == 0 and own.read_bytes() == b"its own"


def test_rows_that_another_command_changed_are_kept(tmp_path):
    rows, path = numbered(4), tmp_path / "rows.jsonl"
    run_job(make_job(tmp_path, rows, []), here())
    made = path.read_bytes()
    path.write_bytes(made.replace(b"text", b"words"))  # as `aspo score` in place does
    assert run_job(make_job(tmp_path, rows, []), here()) == 0 and b"words" in path.read_bytes()
    with pytest.raises(ValueError, match=r"rows\.jsonl was changed since it was made, which new rows would undo"):
        run_job(make_job(tmp_path, numbered(5), []), here())
    path.write_bytes(made[:-7])  # torn, which no command does
    assert run_job(make_job(tmp_path, rows, []), here()) == 0 and path.read_bytes() == made


def test_a_folder_that_an_older_version_began(pairs, tmp_path, capsys):
    for name, line in (("seva", b'{"id": "x", "status": "made"}\n'), ("changes", b""), ("crop", b"")):
        argv = arguments(name, pairs, tmp_path / name)
        assert cli.main(argv) == 0
        said = capsys.readouterr().out
        shutil.rmtree(tmp_path / name / "shards")
        whole = tree(tmp_path / name)
        assert cli.main(argv) == 0  # it was finished: nothing to do
        assert capsys.readouterr().out == said and tree(tmp_path / name) == whole
        record = tmp_path / name / ("done.jsonl" if line else "rows.jsonl")
        record.write_bytes(b"".join(record.read_bytes().splitlines(keepends=True)[:-1]))
        assert cli.main(argv) == cli.USAGE
        assert f"{record.name} was begun by an older version, which kept no shards" in capsys.readouterr().err


def test_scores_go_on_from_an_older_versions_cache(pairs, tmp_path):
    argv = arguments("score", pairs, tmp_path / "out")
    assert cli.main(argv) == 0
    whole, cache = tree(tmp_path / "out"), tmp_path / "out" / "scores.jsonl"
    shutil.rmtree(tmp_path / "out" / "shards")
    (tmp_path / "out" / "rows.jsonl").unlink()
    lines = cache.read_bytes().splitlines(keepends=True)
    known = {**json.loads(lines[0]), "similarity": 7.0}
    cache.write_bytes(json.dumps(known).encode() + b"\n" + lines[1] + lines[2][:20])  # and the third is torn
    assert cli.main(argv) == 0
    first = json.loads((tmp_path / "out" / "rows.jsonl").read_text().splitlines()[0])
    assert first["chosen_similarity"][0] == 7  # what is kept is taken, not made again
    assert len(tree(tmp_path / "out")) == len(whole)


def test_shards_that_are_missing_are_counted(tmp_path):
    job = make_job(tmp_path, numbered(4), [])
    with pytest.raises(ValueError, match=r"2 of 2 shards are not in .*test: every process must write into"):
        assembly.assemble(job, ["a", "b"])


# ---- the processes ----


def test_an_error_of_one_process_is_told_and_keeps_what_is_done(pairs, tmp_path):
    def fail(rank):
        write = jobs.Job.write

        def failing(job, start, *rest):
            if start == 2:  # the second process's first shard
                raise ValueError("row 'x': its similarity is nan")
            write(job, start, *rest)

        jobs.Job.write = failing

    argv = arguments("changes", pairs, tmp_path / "out")
    status, printed = run(2, argv, tmp_path / "printed", fail)
    assert status == [cli.USAGE] * 2
    assert "row 'x': its similarity is nan" in printed[1]
    assert "process 0 of 2 waited for the others, and one of them has died" in printed[0]
    assert len(list((tmp_path / "out" / "shards" / "rewards").glob("*.jsonl"))) == 3  # those of the first process
    assert run(1, argv, tmp_path / "printed")[0] == [0]


def blind(rank):
    """The second process's file system is late: it sees nothing of what is finished."""
    if rank == 1:
        assembly.noted_of = lambda job: None
        assembly._is_of_older = lambda *_: False
        Path.exists = lambda path, real=Path.exists: path.name != "calibration.json" and real(path)


@pytest.mark.parametrize(("name", "older"), [("changes", False), ("changes", True), ("crop", True), ("fisao", False)])
def test_whether_a_job_is_finished_is_decided_once(name, older, pairs, tmp_path):
    argv = arguments(name, pairs, tmp_path / "out")
    assert cli.main(argv) == 0
    if older:
        shutil.rmtree(tmp_path / "out" / "shards")
    whole = tree(tmp_path / "out")
    for size in (2, 1):
        status, printed = run(size, argv, tmp_path / "printed", blind)
        assert status == [0] * size, printed
        assert tree(tmp_path / "out") == whole


def apart(folder, other):
    """The second process runs in another folder: what has a relative path is not what the first one sees."""

    def prepare(rank):
        os.chdir((folder, other)[rank])
        shards_processes.SAME_SECONDS = 1

    return prepare


def test_processes_that_read_different_rows_are_refused(pairs, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(pairs, tmp_path / "data")
    shutil.copytree(pairs, other / "data")
    lines = (other / "data" / "rows.jsonl").read_text().splitlines(keepends=True)
    (other / "data" / "rows.jsonl").write_text("".join([*lines[:5], lines[5].replace("circle", "square"), *lines[6:]]))
    argv = arguments("changes", "data", tmp_path / "out")
    status, printed = run(2, argv, tmp_path / "printed", apart(tmp_path, other))
    assert status == [cli.USAGE] * 2
    assert all("process 1 has other rows or settings than process 0: every machine" in text for text in printed)
    assert not (tmp_path / "out" / "shards").exists()


def test_processes_that_write_into_different_folders_are_refused_before_the_work(pairs, tmp_path):
    (tmp_path / "other").mkdir()
    argv = arguments("changes", pairs, "out")
    status, printed = run(2, argv, tmp_path / "printed", apart(tmp_path, tmp_path / "other"))
    assert status == [cli.USAGE] * 2
    for text in printed:
        assert (
            "the processes see different things in out/shards/rewards: process 0 on" in text and "sees nothing" in text
        )
    assert not list(tmp_path.rglob("shards/*/*.jsonl"))


def test_rows_that_change_during_the_work_are_not_written_under_the_old_ones_key(tmp_path):
    calls, image = [], tmp_path / "image.png"
    image.write_bytes(b"1")
    job = make_job(tmp_path / "out", numbered(4, images=[str(image)]), calls)

    def load():
        def make(batch, start):
            if start == 2:
                image.write_bytes(b"2")
            return {"rows.jsonl": [json.dumps({"id": row["id"]}) + "\n" for row in batch]}

        return make

    with pytest.raises(
        ValueError, match="rows 2 to 3 of the data, their images or the settings are not what they were"
    ):
        run_job(dataclasses.replace(job, load=load), here())
    assert len(list((tmp_path / "out" / "shards" / "test").iterdir())) == 1
    assert run_job(job, here()) == 2  # with the image that is there now


@pytest.mark.slow
def test_a_process_that_hangs_is_not_waited_for_for_ever(pairs, tmp_path):
    def hang(rank):
        write = jobs.Job.write

        def hanging(job, start, *rest):
            if rank == 1 and start == 2:  # its first one
                time.sleep(15)
            write(job, start, *rest)

        jobs.Job.write = hanging

    argv = arguments("changes", pairs, tmp_path / "out", "--wait-minutes", 0.1)
    start = time.monotonic()
    status, printed = run(2, argv, tmp_path / "printed", hang)
    assert status[0] == cli.USAGE and "one of them has died or hangs" in printed[0]
    assert time.monotonic() - start < 100


def test_what_one_process_does_the_others_get_or_its_error(tmp_path):
    def work(rank, size, port, results):
        os.environ |= launched(rank, size, port)
        PartialState._reset_state()
        processes = Processes.current()
        got = [processes.once("", lambda: rank), processes.share(3, lambda i: (i, rank)), processes.gather(rank)]
        for error in (ValueError("bad"), FileNotFoundError(2, "gone", "x"), KeyError("k")):
            try:
                processes.once("it fails", lambda error=error: (_ for _ in ()).throw(error))
            except Exception as caught:
                got.append(type(caught).__name__)
        results.put((rank, got))

    results = FORK.Queue()
    with Port() as port:
        processes = [FORK.Process(target=work, args=(rank, 2, port, results), daemon=True) for rank in (0, 1)]
        for process in processes:
            process.start()
        by_rank = dict(results.get(timeout=SECONDS) for _ in processes)
        for process in processes:
            process.join(SECONDS)
    shared = [0, [(0, 0), (1, 1), (2, 0)], [0, 1], "ValueError", "FileNotFoundError"]
    assert by_rank == {0: [*shared, "KeyError"], 1: [*shared, "RuntimeError"]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--shard-rows", 0), "--shard-rows is 0; it must be at least 1"),
        (("--wait-minutes", 0), "--wait-minutes is 0.0; it must be above 0"),
        (("--ray-workers", 2), "--ray-workers is read with --ray alone"),
    ],
)
def test_bad_options(pairs, tmp_path, capsys, options, message):
    for name in ("score", "seva", "crop", "changes", "fisao", "tldr"):
        assert cli.main(arguments(name, pairs, tmp_path / "out", *options)) == cli.USAGE
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["score", "seva", "crop", "changes"])
def test_a_ray_cluster_gives_the_same_bytes(name, pairs, tmp_path, monkeypatch, capsys):
    pytest.importorskip("ray")
    monkeypatch.undo()  # actors are processes of their own, in which nothing is patched
    argv = arguments(name, pairs, tmp_path / "ray")
    assert cli.main([*argv, "--ray", "local", "--ray-workers", "2"]) == 0
    said = capsys.readouterr().out
    assert cli.main(arguments(name, pairs, tmp_path / "one")) == 0
    assert capsys.readouterr().out.replace("/one", "/ray") == said
    assert tree(tmp_path / "ray") == tree(tmp_path / "one")


@pytest.mark.slow
def test_ray_goes_on_and_tells_an_actors_error(pairs, tmp_path, capsys):
    pytest.importorskip("ray")
    argv = [*arguments("changes", pairs, tmp_path / "out"), "--ray", "local"]
    assert cli.main([*argv, "--ray-workers", "1000"]) == cli.USAGE
    assert "--ray-workers is 1000, but the cluster has" in capsys.readouterr().err
    assert cli.main(argv) == 0
    whole = tree(tmp_path / "out")
    for path in sorted((tmp_path / "out" / "shards" / "rewards").glob("*.jsonl"))[:2]:
        path.unlink()
    (tmp_path / "out" / "rows.jsonl").unlink()
    assert cli.main(argv) == 0 and tree(tmp_path / "out") == whole

    def load():
        def make(batch, start):
            raise ValueError(f"row {batch[0]['id']!r}: bad")

        return make

    job = Job(tmp_path / "bad", "test", load_rows(pairs), {}, load, 2)
    with pytest.raises(ValueError, match=r"row '.*': bad"):
        run_job(job, Engine(Processes.current(), shard_rows=2, ray="local", ray_workers=1))


@pytest.mark.slow
def test_real_commands_that_are_killed_from_outside(pairs, tmp_path):
    """`accelerate launch` with two processes, SIGKILL of all of them as soon as a shard is there; then torchrun."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    argv = arguments("seva", pairs, tmp_path / "out")
    config = Path(__file__).parent.parent / "configs" / "accelerate" / "cpu.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "-m", "aspo"]
    killed = subprocess.Popen([*launch, *argv], env=environment, stderr=subprocess.DEVNULL)
    with ended(killed):
        end = time.monotonic() + SECONDS
        while not list((tmp_path / "out").glob("shards/pairs/*.jsonl")):
            assert killed.poll() is None and time.monotonic() < end
            time.sleep(0.02)
        workers = psutil.Process(killed.pid).children(recursive=True)
        assert len(workers) >= 2
    psutil.wait_procs(workers, timeout=30)
    assert not (tmp_path / "out" / "rows.jsonl").exists()
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("shards/pairs/*.jsonl")}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3"]
    printed = tmp_path / "printed"
    with printed.open("w") as stderr:  # --standalone: torchrun finds a free port itself, which no other test can take
        done = subprocess.run([*torchrun, "-m", "aspo", *argv], env=environment, timeout=SECONDS, stderr=stderr)
    assert done.returncode == 0, printed.read_text()
    assert {p: p.stat().st_mtime_ns for p in kept} == kept  # nothing that was there is made again
    assert cli.main(arguments("seva", pairs, tmp_path / "whole")) == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
