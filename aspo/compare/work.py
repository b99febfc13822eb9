"""The work of `aspo compare`, done by its processes: a data step; a system trained with a seed and measured."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import nn

from aspo.compare.plan import BATCH, BLANK, MAX_NEW_TOKENS, TEST_SEED, Run, Scenes, first_data
from aspo.compare.statistics import Table
from aspo.data import Collator
from aspo.evaluate import evaluate
from aspo.evaluation.judges import Options
from aspo.evaluation.metrics import summarise
from aspo.generation import generate_answers
from aspo.model import inference, load_model, output_head, response_logps, trunk_hidden
from aspo.recipes.command import Planned, StepFailed, run_planned, run_recipe
from aspo.recipes.keys import code_key
from aspo.resume import write_json
from aspo.rows import load_rows
from aspo.world.controls import noised_image
from aspo.world.language import describe
from aspo.world.scenes import Scene, render
from aspo_kernels import gather_hidden, linear_token_kl
from aspo_kernels.segments import segment_sum

COUNTS = "counts.safetensors"


def start_worker() -> None:
    """One thread, and no advice or bars of libraries."""
    import transformers

    code_key()  # of the code that this process has read
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def work(task: Planned | Run) -> dict[str, Any]:
    """Do a data step or a run; returns {"name", "seconds", "error": None or a line}. What it prints goes to a log."""
    start = time.perf_counter()
    name = task_name(task)
    log = task.folder / "log.txt" if isinstance(task, Run) else task.folder.with_name(task.folder.name + ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    error = None
    with log.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            if isinstance(task, Run):
                do_run(task)
            else:
                run_planned(task)
        except (Exception, SystemExit) as raised:  # whatever it is, the other runs go on
            traceback.print_exc()
            what = "" if isinstance(raised, ValueError | OSError | StepFailed) else f"{type(raised).__name__}: "
            error = f"{what}{' '.join(str(raised).split())} (log: {log})"
    return {"name": name, "seconds": time.perf_counter() - start, "error": error}


def task_name(task: Planned | Run) -> str:
    return f"{task.system.name}, seed {task.seed}" if isinstance(task, Run) else task.folder.name


def is_done(run: Run) -> bool:
    """Whether a run's result is there and whole."""
    try:
        return json.loads(run.result.read_text(encoding="utf-8"))["key"] == run.key
    except (OSError, ValueError, KeyError):
        return False


def read_result(run: Run) -> dict[str, Any]:
    """A finished run's result.json; figures that its answers leave undefined (no sentence parses, say) are NaN."""
    result: dict[str, Any] = json.loads(run.result.read_text(encoding="utf-8"))
    result["summary"] = {name: math.nan if value is None else value for name, value in result["summary"].items()}
    return result


def do_run(run: Run) -> None:
    """Train, evaluate, and keep counts.safetensors and, last, result.json in the run's folder."""
    seconds: dict[str, float] = {}  # of this process's work: what else the machine does is not counted
    start = time.process_time()
    trained = None
    recipe = run.recipe
    if recipe is not None:
        trained = run_recipe(recipe, run.model, run.data, run.folder / "train", run.cache, run.seed)
        seconds["train"] = time.process_time() - start
    start = time.process_time()
    model, processor = load_model(run.model) if trained is None else load_model(str(trained), base=_base(run, trained))
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()  # type: ignore[operator]
    ids, names, counts = measure(model, processor, run.scenes)
    save_file({"counts": counts}, run.folder / COUNTS, metadata={"names": json.dumps(names), "ids": json.dumps(ids)})
    extra = extra_figures(model, run.model, processor, run.extra) | reward_figures(run)
    seconds["evaluate"] = time.process_time() - start
    summary = summarise([dict(zip(names, row, strict=True)) for row in counts.tolist()])
    write_json(
        run.result,
        {
            "key": run.key,
            "system": run.system.name,
            "seed": run.seed,
            "settings": run.system.settings,
            "code": sorted({code_key(), *(json.loads(p.marker.read_text())["code"] for p in first_data(run))}),
            "scenes": len(ids),
            "seconds": {name: round(value, 1) for name, value in seconds.items()},
            "extra": extra,
            "summary": summary,
        },
    )


def _base(run: Run, trained: Path) -> str | None:
    """What an adapter's base is, where the folder was moved: the last iteration's own start."""
    if not (trained / "adapter_config.json").is_file():
        return None
    before = trained.parent.glob("iteration-*/merged")
    return str(max(before, key=lambda path: int(path.parent.name.partition("-")[2]), default=run.model))


def measure(model: nn.Module, processor: Any, scenes: Scenes) -> tuple[list[str], list[str], np.ndarray]:
    """(ids, count names, (I, C) counts) of an evaluation without yes/no questions."""
    options = Options(
        max_new_tokens=MAX_NEW_TOKENS,
        seed=TEST_SEED,
        batch_size=BATCH,
        questions=0,
        minimal_pairs=scenes.minimal_pairs,
    )
    items = evaluate(model, processor, scene_rows(scenes), options)
    names = sorted({name for item in items for name in item["counts"]})
    counts = np.array([[item["counts"].get(name, 0.0) for name in names] for item in items], dtype=np.float64)
    return [item["id"] for item in items], names, counts


@functools.cache
def scene_rows(scenes: Scenes) -> list[dict[str, Any]]:
    """The rows to evaluate on; a process reads them once."""
    rows = list(load_rows(scenes.data, kind="prompt", limit=scenes.skip + scenes.scenes))[scenes.skip :]
    if len(rows) < scenes.scenes:
        raise ValueError(f"{scenes.data} has {len(rows)} rows behind the first {scenes.skip}, not {scenes.scenes}")
    if scenes.noise_step:
        rows = [{**row, "images": [noised_image(row, scenes.noise_step, TEST_SEED)]} for row in rows]
    return rows


def extra_figures(model: nn.Module, start: str, processor: Any, scenes: Scenes) -> dict[str, float]:
    """Figures that are no counts, each a mean over validation scenes.

    kl: KL(model || start model) of an answer, in nats: the sum over the tokens of an answer sampled from the model of
    the divergence over the whole vocabulary, its mean over the answers that are not empty. image_gap: log p(true
    description | its image) - log p(the same | a blank image), in nats: how much of what the model says it takes from
    the image.
    """
    rows = scene_rows(scenes)
    answers = generate_answers(
        model, processor, rows, max_new_tokens=MAX_NEW_TOKENS, temperature=1.0, seed=TEST_SEED, batch_size=BATCH
    )
    truths = [describe(Scene.from_json(row["scene"])) for row in rows]
    # An answer that was cut off has no end-of-turn token; an empty one is left out.
    said = [
        {**row, "chosen": answer.text, "unfinished": not answer.finished}
        for row, answer in zip(rows, answers, strict=True)
        if answer.text.strip()
    ]
    blank = Image.new("RGB", render(Scene.from_json(rows[0]["scene"])).size, BLANK)
    seen = [
        {**row, "chosen": truth, "rejected": truth, "rejected_images": [blank]}
        for row, truth in zip(rows, truths, strict=True)
    ]
    gaps: list[float] = []
    for batch in response_logps(model, processor, seen, batch_size=50):
        with_image, without = segment_sum(batch.logps, batch.layout.response_token_offsets).chunk(2)
        gaps += (with_image - without).tolist()
    return {"kl": answer_kl(model, start_model(start), processor, said), "image_gap": float(np.mean(gaps))}


def reward_history(run: Run) -> list[dict[str, float]]:
    """{"step", "rewards/chosen", "rewards/rejected", ...} of a run's training (its last iteration), in order.

    Empty where it logs none: an objective without them, the on-policy loop, the start model.
    """
    path = run.folder / "train" / "model" / "log_history.json"
    if not path.is_file():
        return []
    log = json.loads(path.read_text(encoding="utf-8"))
    return [entry for entry in log if {"step", "rewards/chosen", "rewards/rejected"} <= entry.keys()]


def reward_figures(run: Run) -> dict[str, float]:
    """Rewards (beta x log-ratio) as training logged them: at its end, and the chosen one's least. {} without any."""
    history = reward_history(run)
    if not history:
        return {}
    last = history[-1]
    found = {
        "chosen_reward_final": last["rewards/chosen"],
        "chosen_reward_min": min(entry["rewards/chosen"] for entry in history),
        "rejected_reward_final": last["rewards/rejected"],
    }
    if "rewards/accuracies" in last:
        found["margin_accuracy_final"] = last["rewards/accuracies"]
    return found


@functools.lru_cache(maxsize=2)
def start_model(name: str) -> nn.Module:
    """The start model of a name, kept by a process."""
    return load_model(name)[0]


def answer_kl(model: nn.Module, start: nn.Module, processor: Any, rows: Sequence[Mapping[str, Any]]) -> float:
    """Mean over rows of sum_t KL(model || start) at the tokens of `chosen`, in nats; NaN without rows."""
    if not rows:
        return math.nan
    collator = Collator(processor, responses=("chosen",))
    head, start_head = output_head(model), output_head(start)
    total = 0.0
    for first in range(0, len(rows), 50):
        batch = collator(rows[first : first + 50])
        layout = batch["layout"]
        with inference(model), inference(start):
            hidden, from_start = (gather_hidden(trunk_hidden(m, batch["model_inputs"]), layout) for m in (model, start))
            # The function has its reference first: KL(reference || policy).
            total += float(linear_token_kl(from_start, hidden, start_head.weight, head.weight, layout.targets).kl.sum())
    return total / len(rows)


def read_counts(runs: Sequence[Run]) -> Table:
    """The counts of a system's runs, one for each seed, in the given order. Raises ValueError where scenes differ."""
    parts: list[np.ndarray] = []
    names = ids = "[]"
    for run in runs:
        path = run.folder / COUNTS
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata()
        if parts and (metadata["names"], metadata["ids"]) != (names, ids):
            raise ValueError(f"{path}: other scenes or counts than the other seeds of {run.system.name!r}: delete it")
        names, ids = metadata["names"], metadata["ids"]
        parts.append(load_file(path)["counts"])
    return Table(np.stack(parts), tuple(json.loads(names)), tuple(json.loads(ids)))


def single_thread_environment() -> None:
    """For processes that are started from here on."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
