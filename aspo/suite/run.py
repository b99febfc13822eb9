"""Running a benchmark that is scored here: answers, the judge's replies, counts; every answer and reply is kept.

What a run has got is appended to a file of lines; a run that goes on computes only what is not there.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from aspo.evaluation.identity import model_identity
from aspo.evaluation.judges import image_hash
from aspo.evaluation.metrics import answer_counts
from aspo.generation import generate_answers
from aspo.suite.benchmark import Benchmark, Item, Row
from aspo.suite.judge import Judge

Kept = dict[str, dict[str, Any]]  # key -> {"text", "tokens", "finished"} of an answer, or {"reply"} of a judge


@dataclass(frozen=True)
class Options:
    """How answers are made. `append` stands behind every prompt; `max_new_tokens` None = each row's own."""

    batch_size: int = 16
    max_new_tokens: int | None = None
    temperature: float = 0.0
    seed: int = 0
    append: str = ""


def select(rows: Sequence[Row], limit: int | None) -> list[Row]:
    """The first rows, whole clusters only (pairs and figures stay whole): as many clusters as reach `limit` rows.

    Raises ValueError where an image of one of them is not there.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"--limit is {limit}; it must be at least 1")
    sizes: dict[str, int] = {}
    for row in rows:
        sizes[_cluster(row)] = sizes.get(_cluster(row), 0) + 1
    wanted, count = set(), 0
    for cluster, size in sizes.items():
        if limit is not None and count >= limit:
            break
        wanted.add(cluster)
        count += size
    chosen = [row for row in rows if _cluster(row) in wanted]
    missing = [path for path in dict.fromkeys(p for row in chosen for p in row["images"]) if not Path(path).is_file()]
    if missing:
        others = f" and {len(missing) - 1} others are" if missing[1:] else " is"
        raise ValueError(f"the image {missing[0]}{others} missing: --suite-images says in which folder they lie")
    return chosen


def _cluster(row: Row) -> str:
    return str(row.get("cluster") or row["id"])


def run_benchmark(
    benchmark: Benchmark,
    rows: Sequence[Row],
    model: torch.nn.Module,
    processor: Any,
    options: Options,
    judge: Judge | None = None,
    *,
    workers: int = 8,
    kept: Kept | None = None,
    save: Callable[[Mapping[str, Any]], None] = lambda line: None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> list[Item]:
    """An item a row: {"id", "key", "text", "tokens", "finished", "judge", "counts", ...}, as `aspo report` reads them.

    Args:
        kept: answers and replies of an earlier run by key.
        save: called with each new answer and reply, a dict with its `key`.
        progress: called with "answers" or "judged", how many are done, and how many there are.

    Raises ValueError where the benchmark needs a judge and there is none.
    """
    if benchmark.judge_needed and judge is None:
        raise ValueError(f"{benchmark.title} needs a judge: --judge http://host:port/v1 --judge-model NAME")
    kept = {} if kept is None else kept
    items: list[Item] = []
    for row, key, answer in _answers(rows, model, processor, options, kept, save):
        items.append({"id": row["id"], "key": key, **answer, "cluster": _cluster(row)})
        progress("answers", len(items), len(rows))
    if judge is not None and benchmark.questions is not None:
        asked = [benchmark.questions(row, item["text"]) for row, item in zip(rows, items, strict=True)]
        replies = _ask(judge, [prompt for prompts in asked for prompt in prompts], workers, kept, save, progress)
        for item, prompts in zip(items, asked, strict=True):
            item["judge"] = [{"key": _prompt_key(judge, p), "prompt": p, "reply": replies[p]} for p in prompts]
    for row, item in zip(rows, items, strict=True):
        said = [entry["reply"] for entry in item["judge"]] if "judge" in item else None
        scored = benchmark.score(row, item["text"], said)
        form = answer_counts(item["text"], item["tokens"], item["finished"])
        item |= {**scored, "counts": {**scored["counts"], **form}}
    if benchmark.group is not None:
        benchmark.group(rows, items)
    return items


def _answers(
    rows: Sequence[Row],
    model: torch.nn.Module,
    processor: Any,
    options: Options,
    kept: Kept,
    save: Callable[[Mapping[str, Any]], None],
) -> Iterator[tuple[Row, str, dict[str, Any]]]:
    """Each row with its answer's key and its answer; a batch of which one is missing is made again as a whole."""
    identity = model_identity(model, processor)
    hashed = lru_cache(maxsize=None)(lambda images: image_hash({"images": list(images)}))
    start = 0
    for tokens, batch in _batches(rows, options):
        asked = [{"prompt": row["prompt"] + options.append, "images": row["images"]} for row in batch]
        keys = [
            _hash([row["prompt"], hashed(tuple(row["images"])), identity, tokens, options.temperature, options.seed])
            for row in asked
        ]
        if not all(key in kept for key in keys):
            made = generate_answers(
                model,
                processor,
                asked,
                max_new_tokens=tokens,
                temperature=options.temperature,
                seed=options.seed + start,
                batch_size=options.batch_size,
            )
            for key, answer in zip(keys, made, strict=True):
                kept[key] = {"text": answer.text, "tokens": answer.num_tokens, "finished": answer.finished}
                save({"key": key, **kept[key]})
        yield from ((row, key, kept[key]) for row, key in zip(batch, keys, strict=True))
        start += len(batch)


def _batches(rows: Sequence[Row], options: Options) -> Iterator[tuple[int, list[Row]]]:
    """Consecutive rows that may answer equally long, at most a batch of them."""
    batch: list[Row] = []
    for row in rows:
        if batch and (len(batch) == options.batch_size or row["max_new_tokens"] != batch[0]["max_new_tokens"]):
            yield options.max_new_tokens or batch[0]["max_new_tokens"], batch
            batch = []
        batch.append(row)
    if batch:
        yield options.max_new_tokens or batch[0]["max_new_tokens"], batch


def _ask(
    judge: Judge,
    prompts: Iterable[str],
    workers: int,
    kept: Kept,
    save: Callable[[Mapping[str, Any]], None],
    progress: Callable[[str, int, int], None],
) -> dict[str, str]:
    """Prompt -> reply, `workers` requests at a time.

    A request that fails for good, or Ctrl-C, ends those that wait; replies on their way are still saved.
    """
    distinct = list(dict.fromkeys(prompts))
    replies = {p: kept[_prompt_key(judge, p)]["reply"] for p in distinct if _prompt_key(judge, p) in kept}
    stop = threading.Event()

    def keep(prompt: str, reply: str) -> None:
        replies[prompt] = reply
        save({"key": _prompt_key(judge, prompt), "reply": reply})
        progress("judged", len(replies), len(distinct))

    with ThreadPoolExecutor(max_workers=workers) as pool:
        waiting = {pool.submit(judge, prompt, stop): prompt for prompt in distinct if prompt not in replies}
        try:
            for future in as_completed(waiting):
                keep(waiting[future], future.result())
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            for future, prompt in waiting.items():
                if prompt not in replies and not future.cancelled() and future.exception() is None:
                    keep(prompt, future.result())
            raise
    return replies


def _prompt_key(judge: Judge, prompt: str) -> str:
    return _hash([prompt, judge.model])  # not its address: a server that moved is the same judge


def _hash(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
