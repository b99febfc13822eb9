"""The benchmark of whole steps: equal work on both sides, its figures by hand, its table and plot."""

import copy
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
