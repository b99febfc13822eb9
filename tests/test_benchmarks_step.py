"""The benchmark of whole steps: equal work on both sides, its figures by hand, its table and plot."""

import copy
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from aspo.data import Collator
from benchmarks import plots, readme, results, step_cases, step_sweep
from benchmarks.step_cases import Rows, fresh

pytest.importorskip("trl")
step, gpu_step = pytest.importorskip("benchmarks.step"), pytest.importorskip("benchmarks.gpu_step")
TINY = step_cases.toy(side=56, small=True)


def test_both_sides_read_the_same_tokens_and_pixels() -> None:
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    processor = step_cases.processor(TINY)
    rows = Rows(TINY, response=24).take(2)
    ours = Collator(processor)(rows)
    theirs = DataCollatorForVisionPreference(processor)(fresh(rows))
    assert torch.equal(ours["model_inputs"]["input_ids"], theirs["input_ids"])
    assert torch.equal(ours["model_inputs"]["pixel_values"], theirs["pixel_values"])
    assert theirs["completion_mask"].sum(dim=1).tolist() == [24] * 4
    assert ours["layout"].response_token_offsets.tolist() == [0, 24, 48, 72, 96]
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert (theirs["input_ids"] == image).sum(dim=1).tolist() == [TINY.patches] * 4 == [16] * 4


def test_the_sizes_that_are_named() -> None:
    toy = step_cases.toy()
    assert toy.patches == 576 and len(step_cases.tokenizer(toy)) == 32_000
    assert step_cases.LLAVA_7B.patches == 576
    assert step_cases.QWEN_7B.patches == 36 * 36  # 1008 pixels, patches of 14, four of them merged


def test_first_steps_are_trls() -> None:
    source = Rows(TINY, response=8)
    batches = [source.take(step.PAIRS) for _ in range(2)]
    rows = batches[0] + batches[1]
    model, processor = step_cases.model(TINY), step_cases.processor(TINY)
    shared = next(c for c in step.CONTENDERS if c.name == step.SHARED)
    stale = shared._replace(name="another beta", options={**shared.options, "beta": 0.3})

    def steppers(*contenders):
        return {c.name: step.stepper(c, copy.deepcopy(model), processor, rows, **step.ON_CPU) for c in contenders}

    by_default = steppers(step.CONTENDERS[0])[step.TRL].trainer.model
    assert all(layer.gradient_checkpointing for layer in by_default.get_base_model().model.language_model.layers)
    losses = step.check(steppers(step.CONTENDERS[0], shared), batches)
    assert losses[step.TRL][0] == pytest.approx(0.6931, abs=1e-4) and losses[step.TRL][1] != losses[step.TRL][0]
    with pytest.raises(ValueError, match="another beta: its losses"):
        step.check(steppers(step.CONTENDERS[0], stale), batches)


def test_figures_by_hand() -> None:
    contender = next(c for c in step.CONTENDERS if c.off is not None)
    times = {step.TRL: [90.0, 100.0, 300.0], step.TRL_FASTEST: [80.0], contender.name: [10.0], contender.off: [25.0]}
    times |= {f"{name}: data": [10.0] for name in times}
    mib = {step.TRL: (900.0, 0.0), step.TRL_FASTEST: (600.0, 0.0), contender.name: (100.4, 700.4)}
    row = step.figures(contender, times, mib)
    assert (row["trl_over_this"], row["trl_over_this_with_data"], row["off_over_this"]) == (8.0, 4.5, 2.5)
    assert (row["step_mib"], row["peak_mib"], row["trl_mib_over_this"]) == (100, 700, 5.98)
    assert step.figures(step.CONTENDERS[0], times, mib)["step_ms"] == 100.0
    assert "off_over_this" not in step.figures(step.CONTENDERS[0], times, mib)


def test_batches_take_turns() -> None:
    run = step.turns(lambda batch: batch, ["a", "b"])
    assert [run(), run(), run()] == ["a", "b", "a"]


def test_the_readmes_table_of_steps(tmp_path: Path) -> None:
    row = {"contender": "aspo", "step_ms": 1234.5, "data_ms": 24.4, "step_mib": 1200, "loss_error": "9.1e-06"}
    row |= {"trl_over_this": 7.5, "trl_over_this_with_data": 7.4, "trl_mib_over_this": 3.1, "losses": "0.7 0.6 0.5"}
    about = {"cpu": "a CPU", "threads": "2", "torch": "2", "transformers": "5", "trl": "1", "commit": "abc"}
    results.write(tmp_path / "step.csv", about, [row], step.FIELDS)
    lines = readme.step_section(tmp_path / "step.csv").splitlines()
    assert lines[0].endswith("commit abc. The losses of the first 3 steps differ by at most 9e-06.")
    assert "| aspo | 1,234 | 24 | 7.5x | 7.4x |  | 1,200 | 3.1x |" in lines


def test_the_plot_of_lengths(tmp_path: Path) -> None:
    rows = [{"prompt": p, "response": r, "off_over_auto": 1 + p / r, "tokens_off_over_auto": 1.5}
            for p in (84, 276) for r in (32, 128)]  # fmt: skip
    about = {"cpu": "a CPU", "threads": "2", "torch": "2", "commit": "abc"}
    results.write(tmp_path / "sweep.csv", about, rows, step_sweep.FIELDS)
    plots.draw(tmp_path / "sweep.csv", tmp_path / "step.svg")
    drawn = (tmp_path / "step.svg").read_text()
    assert "<svg" in drawn and drawn.count('id="line2d_') > 8


@pytest.mark.parametrize("limit", [1, 9, 100, 4096])
def test_the_longest_that_fits_is_found_to_an_eighth(limit: int) -> None:
    asked: list[int] = []
    length, how = gpu_step.search(lambda n: asked.append(n) or n < limit + 1, first=8, seconds=1e9)
    assert how == "the longest" and limit * 7 / 8 <= length <= limit and len(asked) < 20
    assert gpu_step.search(lambda n: True, first=8, seconds=-1) == (0, "at least")


def test_a_contender_that_fails_keeps_the_others_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the timing or in the search for the longest response; every figure is saved as soon as it is there."""
    failures = dict(zip((c.name for c in gpu_step.COMPARED), (ModuleNotFoundError("No module named 'trl'"), None,
                        ValueError("is not exact: the model cannot run it (OutOfMemoryError: CUDA out of memory)"),
                        None), strict=True))  # fmt: skip
    names = list(failures)
    assert names[:3] == [step.TRL, step.PLAIN, step.SHARED]

    def measure(contender, *_):
        if (error := failures[contender.name]) is not None:
            raise error
        return {"status": "ran", "step_s": 2.0}, [0.5, 0.25]

    def longest(contender, *_):
        raise RuntimeError("an illegal instruction")

    monkeypatch.setattr(gpu_step, "measure", measure)
    monkeypatch.setattr(gpu_step, "longest", longest)
    rows, saved = [{"model": "an earlier one"}], []
    save = lambda: saved.append([dict(row) for row in rows])  # noqa: E731
    gpu_step.compare(TINY, gpu_step.Bench("cpu"), 60, rows, save)
    assert [row["status"] for row in rows[1:]] == [
        "failed: ModuleNotFoundError: No module named 'trl'", "ran", "out of memory", "ran"
    ]  # fmt: skip
    assert [row.get("longest_is") for row in rows[1:3]] == [None, "failed: RuntimeError: an illegal instruction"]
    assert rows[2]["loss_error"] == "0.0e+00" and "trl_over_this" not in rows[2]
    assert [len(rows) for rows in saved[:5]] == [2, 3, 4, 5, 5] and saved[-1] == rows


class Limited:
    """Stands for a trainer whose device holds responses of 20 tokens."""

    def __init__(self, error: Exception) -> None:
        self.error, self.trainer = error, self
        self.model_wrapped = torch.nn.Identity()

    def collate(self, rows):
        return rows[0]["chosen"][0]["content"].split()

    def step(self, words) -> None:
        if len(words) >= 20:
            raise self.error


def test_a_length_that_does_not_fit_is_found_by_whatever_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer's making counts: a search without time for a step has found nothing."""
    bench = gpu_step.Bench("cpu", first=8)

    def found(error: Exception, seconds: float = 60.0):
        monkeypatch.setattr(gpu_step.Bench, "trainer", lambda *_: time.sleep(0.05) or Limited(error))
        return gpu_step.longest(gpu_step.COMPARED[1], TINY, bench, seconds)

    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("Triton Error [CUDA]: out of memory")):
        assert found(error) == {"longest_response": 20, "longest_is": "the longest"}
    assert found(RuntimeError(), 0.05) == {"longest_response": 0, "longest_is": "at least"}
    with pytest.raises(RuntimeError, match="illegal"):
        found(RuntimeError("an illegal instruction"))


def test_ours_can_be_measured_where_trl_is_not_installed() -> None:
    """Nor is open_clip, whose weights no step of ours reads."""
    absent = "import sys; sys.modules['trl'] = sys.modules['open_clip'] = None; import benchmarks.gpu_step"
    subprocess.run([sys.executable, "-c", absent], check=True)
