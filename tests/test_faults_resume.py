"""Going on with something else than before: other processes, data, models, templates, or beside another run."""

import aspo  # isort: skip  # noqa: F401  (first: it makes torchvision importable on a CPU torch)

import json
import os
import shutil
from pathlib import Path

import injected
import pytest
from faults import KILLED, STEPS, Command, Place, assert_same, fault, kept, losses, run, said
from injected import AtStep, AtWrite
from tiny import CHAT_TEMPLATE, tiny_llava

from aspo.reference.logp_cache import META_FILE

ROUNDING = 1e-4  # of weights that moved by 1e-3 a step: other numbers of processes add in another order
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("resume"))


@pytest.fixture
def killed(place, tmp_path):
    """killed(*options, size=1) -> the output of a run that was killed in its sixth step."""

    def get(*more, size=1, **environment):
        argv = place.training(tmp_path / "out", *more, size=size)
        statuses, texts = Command(
            argv, tmp_path / "printed", size, AtStep(6, tuple(range(size)), injected.die), **environment
        ).wait()
        assert statuses == [KILLED] * size, texts
        assert kept(tmp_path / "out") == ["checkpoint-4"]
        return tmp_path / "out"

    return get


@pytest.mark.parametrize(("before", "then"), [(2, 1), (1, 2), (2, 3)])
@fault(
    "going on with another number of processes, as many pairs an optimiser step",
    sees="",
    kept="the last checkpoint",
    goes_on="the same rows in each step: the same weights, within what other orders of adding round",
)
def test_another_number_of_processes(place, killed, before, then):
    output = killed(size=before)
    assert "going on from" in place.goes_on(place.training(output, size=then), then, place.whole(), ROUNDING)
    assert losses(output) == pytest.approx(losses(place.whole()), abs=2e-5)


def refused(place, request, output, argv, tmp_path, size=1):
    """A command that is refused in one line, everywhere, and changes nothing."""
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file() and path.name != ".lock"}
    statuses, texts = Command(argv, tmp_path / "printed", size).wait()
    assert statuses == [2] * size, texts
    for text in texts:
        said(request.function, text)
    after = {path: path.read_bytes() for path in output.rglob("*") if path.is_file() and path.name != ".lock"}
    assert after == before


@fault(
    "going on with other pairs an optimiser step, e.g. on twice the processes",
    sees="aspo train: <output_dir> holds a run of other settings (step: 6 pairs -> 12 pairs): choose another "
    "--output_dir, delete it, or name the checkpoint to start from with --resume_from_checkpoint. On another number "
    "of processes an optimiser step must take as much: per_device_train_batch_size x gradient_accumulation_steps x "
    "processes",
    kept="all",
    goes_on="with the size that the line asks for",
)
def test_other_pairs_a_step(place, killed, tmp_path, request):
    output = killed()
    refused(place, request, output, place.training(output, size=1), tmp_path, size=2)
    place.goes_on(place.training(output))


@fault(
    "the data set is another one than before",
    sees="aspo train: <output_dir> holds a run of other settings (pairs_sha256: <hash> -> <hash>): choose "
    "another --output_dir, <...>",
    kept="all",
    goes_on="with the old rows; or a new --output_dir",
)
def test_a_changed_data_set(place, killed, tmp_path, request):
    output, rows = killed(), shutil.copytree(place.rows, tmp_path / "rows")
    lines = (rows / "rows.jsonl").read_text().splitlines(keepends=True)
    (rows / "rows.jsonl").write_text(
        "".join([*lines[:9], lines[9].replace('"rejected": "', '"rejected": "No. '), *lines[10:]])
    )
    original = place.rows.rename(place.folder / "original")
    rows.rename(place.rows)  # under the same name
    try:
        refused(place, request, output, place.training(output), tmp_path)
    finally:
        place.rows.rename(rows)
        original.rename(place.rows)
    place.goes_on(place.training(output))


@pytest.mark.parametrize("what", ["chat template", "model weights", "tokenizer"])
@fault(
    "another chat template, tokenizer or model lies in the start model's folder",
    sees="aspo train: <output_dir> holds a run that began with another model or processor (<what> changed in <model>): "
    "put the old one back, or choose another --output_dir",
    kept="all",
    goes_on="with the old files",
)
def test_a_changed_start(place, killed, tmp_path, request, what):
    output = killed()
    original = place.model.rename(place.folder / "original")
    try:
        shutil.copytree(original, place.model)
        if what == "chat template":
            (place.model / "chat_template.jinja").write_text(CHAT_TEMPLATE.replace("ASSISTANT: ", "BOT: "))
        elif what == "model weights":
            tiny_llava(tmp_path / "other", seed=1)
            shutil.copy(tmp_path / "other" / "model.safetensors", place.model)
        else:
            tokenizer = json.loads((place.model / "tokenizer.json").read_text())
            tokenizer["post_processor"] = None
            (place.model / "tokenizer.json").write_text(json.dumps(tokenizer))
        refused(place, request, output, place.training(output), tmp_path)
        assert f"({what} changed" in next((tmp_path / "printed").glob("1-0.txt")).read_text()
    finally:
        shutil.rmtree(place.model)
        original.rename(place.model)
    place.goes_on(place.training(output))


@pytest.mark.parametrize("what", ["model weights", "chat template", "max_length"])
@fault(
    "the reference cache is of another model, chat template or length",
    sees="aspo train: the reference cache <folder> was made with other settings: <what>. Name another folder, or "
    "delete this one to compute it again",
    kept="the cache as it is; nothing is trained",
    goes_on="with another --reference_cache",
)
def test_a_reference_cache_of_another_model(place, tmp_path, request, what):
    model = shutil.copytree(place.model, tmp_path / "model")
    if what == "chat template":
        (model / "chat_template.jinja").write_text(CHAT_TEMPLATE.replace("ASSISTANT: ", "BOT: "))
    elif what == "model weights":
        tiny_llava(tmp_path / "model", seed=1)
    cache = ["reference", "--model", model, "--data", place.rows, "--out", tmp_path / "cache"]
    place.ends([*cache, *(["--max_length", 512] if what == "max_length" else [])])
    own = ["--precompute_ref_log_probs", "true", "--reference_cache"]
    (tmp_path / "out").mkdir()
    refused(place, request, tmp_path / "cache", place.training(tmp_path / "out", *own, tmp_path / "cache"), tmp_path)
    assert what in next((tmp_path / "printed").glob("0-0.txt")).read_text()
    assert not (tmp_path / "out" / "run.json").exists() and (tmp_path / "cache" / META_FILE).is_file()
    place.ends(place.training(tmp_path / "out", *own, tmp_path / "other"))
    assert_same(place.whole(), tmp_path / "out", 1e-6)


@fault(
    "a second run is started in a folder where one is at work",
    sees="aspo train: <output_dir> is in use by another run (process <id> on <machine>): wait for it, or choose "
    "another --output_dir",
    kept="all: the first run goes on undisturbed",
    goes_on="when the first one has ended, however: nothing needs to be cleaned up",
)
def test_two_runs_in_one_folder(place, tmp_path, request):
    argv, output = place.training(tmp_path / "out"), tmp_path / "out"
    first = Command(argv, tmp_path / "first", fault=AtStep(6, (0,), injected.stop))
    first.until(lambda: kept(output))
    statuses, texts = Command(place.training(output, size=2), tmp_path / "printed", 2).wait()
    assert statuses == [2, 2], texts
    for text in texts:
        said(request.function, text)
    first.kill()
    place.goes_on(argv)


@fault(
    "an earlier checkpoint is named, and the folder holds a later one",
    sees="aspo train: <output_dir> holds checkpoint-8, which is later than <checkpoint>: leave "
    "--resume_from_checkpoint out to go on from it, or choose another --output_dir",
    kept="all: two courses never mix in one folder",
    goes_on="from the named one in another --output_dir",
)
def test_an_earlier_checkpoint_is_named(place, tmp_path, request):
    whole = place.whole()
    named = ["--resume_from_checkpoint", whole / "checkpoint-4"]
    refused(place, request, whole, place.training(whole, *named), tmp_path)
    place.ends(place.training(tmp_path / "out", *named))
    assert_same(whole, tmp_path / "out")


class Elsewhere:
    """The second process runs in another folder: what has a relative path is not what the first one sees."""

    def __init__(self, folder: Path, other: Path) -> None:
        self.folders = folder, other

    def __call__(self, rank: int) -> None:
        from aspo.shards import processes

        os.chdir(self.folders[rank])
        processes.SAME_SECONDS = 1


DIFFERENT = (
    "aspo train: the processes see different things in <output_dir>: process 0 on <machine> sees <what>; process 1 on "
    "<machine> sees <what>. All machines must see one folder under this path: put it on a file system that they share"
)


@fault(
    "one of several processes sees other checkpoints, or another run.json, than the others",
    sees=DIFFERENT,
    kept="all; no model is loaded (exit status 2 everywhere)",
    goes_on="when all see one folder",
)
def test_processes_see_different_checkpoints(place, killed, tmp_path, request):
    output, other = killed(), tmp_path / "other" / "out"
    before = sorted(output.rglob("*"))
    for there in ("nothing", "an earlier one", "another one", "another run"):
        shutil.rmtree(other, ignore_errors=True)
        shutil.copytree(output, other)
        state, record = (
            json.loads((other / name).read_text()) for name in ("checkpoint-4/trainer_state.json", "run.json")
        )
        state |= {"an earlier one": {"global_step": 2}, "another one": {"epoch": 0.5}}.get(there, {})
        record |= {"another run": {"started": "2000-01-01"}}.get(there, {})
        (other / "checkpoint-4" / "trainer_state.json").write_text(json.dumps(state))
        (other / "run.json").write_text(json.dumps(record))
        if there == "an earlier one":
            (other / "checkpoint-4").rename(other / "checkpoint-2")
        if there == "nothing":
            shutil.rmtree(other)
        apart = Elsewhere(output.parent, other.parent)
        statuses, texts = Command(place.training("out", size=2), tmp_path / "printed", 2, apart).wait()
        assert statuses == [2, 2], texts
        for text in texts:
            said(request.function, text)
            assert "checkpoint-4 (whose" in text and "Loading weights" not in text
        assert ("no run.json, no checkpoint" in texts[0]) == (there == "nothing")
        assert sorted(output.rglob("*")) == before
    place.goes_on(place.training(output, size=2), 2, place.whole(), ROUNDING)


@fault(
    "one of several processes does not see the output folder that the first one has made",
    sees=DIFFERENT,
    kept="all; no model is loaded, so that no run ends with its checkpoints in pieces (exit status 2 everywhere)",
    goes_on="when all see one folder",
)
def test_processes_that_share_no_folder_do_not_begin(place, tmp_path, request):
    (tmp_path / "other").mkdir()
    apart = Elsewhere(tmp_path, tmp_path / "other")
    statuses, texts = Command(place.training("out", size=2), tmp_path / "printed", 2, apart).wait()
    assert statuses == [2, 2], texts
    for text in texts:
        said(request.function, text)
        assert "sees no .lock" in text and "Loading weights" not in text
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def fsdp(kind):
    plugin = Path(__file__).parent / "fsdp_on_cpu.py"  # accelerate itself asks for a GPU
    return ["--plugins", plugin], {**FSDP, "FSDP_STATE_DICT_TYPE": f"{kind}_STATE_DICT"}


@pytest.mark.parametrize(("kind", "then"), [("FULL", 2), ("SHARDED", 2), ("FULL", 3), ("SHARDED", 3)])
@fault(
    "SIGKILL of a run under FSDP2, with whole or sharded checkpoints; going on with as many or more processes",
    sees="",
    kept="the last checkpoint",
    goes_on="the same command: the same weights, within what other orders of adding round",
)
def test_fsdp(place, killed, kind, then):
    more, environment = fsdp(kind)
    output = killed(*more, size=2, **environment)
    checkpoint = output / "checkpoint-4"
    assert (checkpoint / "pytorch_model_fsdp_0" / ".metadata").is_file() == (kind == "SHARDED")
    text = place.ends(place.training(output, *more, size=then), then, **environment)
    assert f"going on from {checkpoint}" in text
    assert_same(place.whole(), output, ROUNDING)
    assert losses(output) == pytest.approx(losses(place.whole()), abs=2e-5)


@pytest.mark.parametrize("kind", ["FULL", "SHARDED"])
@fault(
    "SIGKILL while the final model is written under FSDP2",
    sees="",
    kept="the last step's checkpoint",
    goes_on="the same command writes the model, whole, without a further step: the same weights",
)
def test_fsdp_final_save(place, tmp_path, kind):
    more, environment = fsdp(kind)
    argv = place.training(tmp_path / "out", *more, size=2)
    fault = AtWrite("out", "adapter_model.safetensors", half=True)
    statuses, texts = Command(argv, tmp_path / "printed", 2, fault, **environment).wait()
    assert statuses[0] == KILLED and kept(tmp_path / "out") == ["checkpoint-4", "checkpoint-8"], texts
    place.ends(argv, 2, **environment)
    assert_same(place.whole(), tmp_path / "out", ROUNDING)
    assert len(losses(tmp_path / "out")) == STEPS


def test_what_is_refused_is_refused_before_a_model_is_loaded(place, killed, tmp_path):
    output = killed()
    status, text = run(place.training(output, "--beta", 0.7), tmp_path / "printed")
    assert status == 2 and "beta: 0.1 -> 0.7" in text and "Loading weights" not in text
