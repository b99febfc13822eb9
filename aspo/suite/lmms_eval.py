"""lmms-eval as a subprocess: `python -m lmms_eval`, its results.json and its samples (written for 0.7)."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aspo.suite.benchmark import Item
from aspo.suite.judge import Judge

MODELS = {  # transformers' model type -> lmms-eval's model
    **dict.fromkeys(("llava", "llava_next", "llava_onevision"), "llava_hf"),
    **{name: name for name in ("instructblip", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3")},
    "internvl": "internvl_hf",
}
TAKE_DTYPE = ("llava_hf", "instructblip")


def command(
    path: str,
    kind: str,
    task: str,
    folder: Path,
    *,
    judge: Judge | None,
    batch_size: int | None,
    limit: int | None,
    dtype: str | None,
) -> tuple[list[str], dict[str, str]]:
    """The command and its environment; `batch_size` None = 16, as elsewhere in `aspo eval`.

    A model type that lmms-eval has no class for goes through its `huggingface`.
    """
    if set(",=") & set(path):
        raise ValueError(f"lmms-eval cannot take the model path {path}: it holds a comma or an equals sign")
    model = MODELS.get(kind, "huggingface")
    arguments = f"pretrained={path}"
    if dtype is not None:
        if model not in TAKE_DTYPE:
            raise ValueError(f"lmms-eval's {model} has no dtype of its own to set: drop --dtype")
        arguments += f",dtype={dtype}"
    made = [sys.executable, "-m", "lmms_eval", "--model", model, "--model_args", arguments, "--tasks", task]
    made += [
        "--batch_size",
        str(16 if batch_size is None else batch_size),
        "--log_samples",
        "--output_path",
        str(folder),
    ]
    made += [] if limit is None else ["--limit", str(limit)]
    environment = dict(os.environ)
    if judge is not None:  # its tasks read the endpoint with and without the last part of the path
        whole = task.startswith(("mmbench", "hallusion"))
        environment |= {"API_TYPE": "openai", "MODEL_VERSION": judge.model}
        environment["OPENAI_API_URL"] = judge.url.rstrip("/") + ("/chat/completions" if whole else "")
    return made, environment


def results(folder: Path, task: str) -> tuple[dict[str, float], list[Item]]:
    """The task's figures and items in the newest results that lmms-eval wrote below `folder`."""
    files = sorted(folder.glob("**/*_results.json"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise ValueError(f"lmms-eval left no *_results.json below {folder}; its output above says why")
    figures = json.loads(files[-1].read_text(encoding="utf-8"))["results"].get(task, {})
    summary = {
        name.removesuffix(",none"): float(value)
        for name, value in figures.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and "stderr" not in name
    }
    samples = files[-1].with_name(files[-1].name.replace("_results.json", f"_samples_{task}.jsonl"))
    items: list[Item] = []
    if samples.is_file():
        for line in samples.read_text(encoding="utf-8").splitlines():
            sample = json.loads(line)
            points = points_of(sample)
            if points is None:
                return summary, []
            text = sample.get("filtered_resps", sample.get("resps"))
            text = text[0] if isinstance(text, list) and len(text) == 1 else text
            items.append(
                {
                    "id": str(sample["doc_id"]),
                    "text": text if isinstance(text, str) else json.dumps(text),
                    "counts": {"harness_points": points[0], "harness_items": points[1]},
                }
            )
    return summary, items


def points_of(sample: Mapping[str, Any]) -> tuple[float, float] | None:
    """(points, of how many) of a sample, None where its metric is only taken over all of them (MMBench).

    LLaVA-Bench compares with a reference answer: (the model's rating, the reference's). A judge that failed there
    gives -1, which counts as (0, 0).
    """
    for value in sample.values():
        if isinstance(value, Mapping) and isinstance(ratings := value.get("scores"), list) and -999 not in ratings:
            return (float(ratings[1]), float(ratings[0])) if min(ratings) >= 0 else (0.0, 0.0)
    for value in sample.values():
        if isinstance(value, Mapping) and isinstance(value.get("score"), int | float):
            return float(value["score"]), 1.0
        if isinstance(value, Mapping) and {"pred", "answer"} <= set(value):
            return float(str(value["pred"]).strip().casefold() == str(value["answer"]).strip().casefold()), 1.0
    for name in ("exact_match", "accuracy", "acc"):
        if isinstance(sample.get(name), int | float):
            return float(sample[name]), 1.0
    return None
