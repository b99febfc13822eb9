"""VLMEvalKit as a subprocess: `python -m vlmeval --config`, its score tables and records."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import sys
from pathlib import Path

from aspo.suite.benchmark import Item
from aspo.suite.judge import Judge

NAME = "model"  # what the model is called in VLMEvalKit's files
MODELS = {  # transformers' model type -> class of vlmeval.vlm
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), "Qwen2VLChat"),
    "qwen3_vl": "Qwen3VLChat",
    "llava_next": "LLaVA_Next",
    "llava_onevision": "LLaVA_OneVision_HF",
}
DATASETS = {  # dataset -> class of vlmeval.dataset
    "MMVet": "MMVet",
    "LLaVABench": "LLaVABench",
    **dict.fromkeys(("MMBench_DEV_EN", "ScienceQA_TEST", "SEEDBench_IMG", "MMStar"), "ImageMCQDataset"),
    **dict.fromkeys(("GQA_TestDev_Balanced", "TextVQA_VAL"), "ImageVQADataset"),
    "MMMU_DEV_VAL": "MMMUDataset",
    "MME": "ImageYORNDataset",
    "VizWiz": "VizWiz",
}
TABLES = ("acc", "score", "rating")
POINTS = ("hit", "score", "eval_score")  # columns of a record that hold an item's score


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
    """The command, with a configuration file written to `folder`, and its environment.

    Raises ValueError for a model that VLMEvalKit has no class for in transformers' form, and for options it lacks.
    """
    if kind not in MODELS:
        raise ValueError(
            f"VLMEvalKit loads no {kind} model as transformers saves it (it does: {', '.join(MODELS)}): use "
            "--harness lmms-eval"
        )
    for flag, value in (("--limit", limit), ("--dtype", dtype), ("--batch-size", batch_size)):
        if value is not None:
            raise ValueError(f"VLMEvalKit has no way to set {flag}: drop it, or use --harness lmms-eval")
    if task not in DATASETS:
        raise ValueError(f"vlmevalkit:{task} is none of {', '.join(DATASETS)}: use lmms-eval, or VLMEvalKit itself")
    config = folder / "vlmevalkit.json"
    model = {"class": MODELS[kind], "model_path": path}
    data = {"class": DATASETS[task], "dataset": task}
    config.write_text(json.dumps({"model": {NAME: model}, "data": {task: data}}, indent=1) + "\n", encoding="utf-8")
    made = [sys.executable, *_entry(), "--config", str(config), "--work-dir", str(folder), "--reuse"]
    environment = {**os.environ, "PRED_FORMAT": "json", "EVAL_FORMAT": "csv"}
    if judge is not None:
        made += ["--judge", judge.model]
        environment |= {"OPENAI_API_BASE": judge.url.rstrip("/") + "/chat/completions", "LOCAL_LLM": judge.model}
    return made, environment


def _entry() -> list[str]:
    """How it is started: as a module, or by run.py of a git checkout, which stands beside the package."""
    spec = importlib.util.find_spec("vlmeval")
    package = Path(next(iter(spec.submodule_search_locations or ()), "")) if spec is not None else Path()
    script = package.parent / "run.py"
    return [str(script)] if script.is_file() and not (package / "__main__.py").is_file() else ["-m", "vlmeval"]


def results(folder: Path, task: str) -> tuple[dict[str, float], list[Item]]:
    """The figures of the newest table that VLMEvalKit wrote below `folder`, and the items of the record beside it."""
    tables = [path for name in TABLES for path in folder.glob(f"{NAME}/*/{NAME}_{task}*_{name}.csv")]
    if not tables:
        raise ValueError(f"VLMEvalKit left no table of {task} below {folder}; its output above says why")
    table = max(tables, key=lambda path: path.stat().st_mtime)
    summary: dict[str, float] = {}
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        words = [value for value in row.values() if _number(value) is None and value]
        for column, value in row.items():
            if (number := _number(value)) is not None:
                summary["/".join([*(words if len(rows) > 1 else []), column or "value"])] = number
    return summary, _items(table.parent, task)


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


def _items(folder: Path, task: str) -> list[Item]:
    """Items of the newest record that has a score for each row; [] where there is none."""
    for path in sorted(folder.glob(f"{NAME}_{task}_*.json"), key=lambda path: path.stat().st_mtime, reverse=True):
        rows = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(rows, list) or not rows or not isinstance(rows[0], dict):
            continue
        column = next((name for name in POINTS if name in rows[0]), None)
        if column is not None:
            return [
                {
                    "id": str(row["index"]),
                    "text": str(row.get("prediction", "")),
                    "counts": {
                        "harness_points": float(row[column]),
                        "harness_items": float(row.get("gpt4_score", 1.0)),  # LLaVA-Bench: the reference's rating
                    },
                }
                for row in rows
            ]
    return []
