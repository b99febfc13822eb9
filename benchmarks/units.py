"""What a pair costs before a GPU sees it, and what is kept of it: seconds on one core, and bytes. For docs/scaling.md.

python -m benchmarks.units            writes benchmarks/results/units.csv
python -m benchmarks.units --smoke    once each, writes nothing
"""

from __future__ import annotations

import aspo  # isort: skip  # noqa: F401  (first: it makes torchvision importable on a CPU torch)
import argparse
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoProcessor

from aspo.data import Collator
from aspo.reference.fill import fill
from aspo.reference.logp_cache import ReferenceCache
from aspo.world import assets_dir
from benchmarks import results
from benchmarks.cases import machine

RESULTS = results.FOLDER / "units.csv"
SIZE, SIDE, TOKENS, ROUNDS, ROWS = (640, 480), 336, 256, 40, 256


def picture(rng: np.random.Generator) -> bytes:
    """A JPEG (quality 90) of smooth shapes with a little noise."""
    small = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8))
    large = np.asarray(small.resize(SIZE, Image.Resampling.BICUBIC), dtype=np.int16)
    noisy = (large + rng.normal(0, 6, large.shape)).clip(0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(noisy).save(out, "JPEG", quality=90)
    return out.getvalue()


def row(processor: Any, n: int) -> dict[str, Any]:
    """A scored pair of the embedded world's language, two answers of about TOKENS tokens, six sentences."""
    sentence = "There is a red circle at the top left. "
    tokens = len(processor.tokenizer(sentence, add_special_tokens=False)["input_ids"])
    parts = [sentence * max(TOKENS // tokens // 6, 1)] * 6
    ends = np.cumsum([len(part) for part in parts]).tolist()
    text = "".join(parts)
    return {
        "id": str(n), "prompt": f"Describe image {n}.", "chosen": text, "rejected": text.replace("red", "blue"),
        "chosen_sentences": [[a, b] for a, b in zip([0, *ends[:-1]], ends, strict=True)],
        "chosen_similarity": [0.25] * 6,
    }  # fmt: skip


def seconds(function: Callable[[], object], rounds: int) -> float:
    """The median of single calls, in this process's own time: others on the machine do not count."""
    function()
    times = []
    for _ in range(rounds):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return statistics.median(times)


def large_processor() -> Any:
    """The embedded world's, for pictures of SIDE pixels."""
    processor = AutoProcessor.from_pretrained(assets_dir() / "vlm")
    size = {"height": SIDE, "width": SIDE}
    processor.image_processor.size = processor.image_processor.crop_size = size
    return processor


def saved_bytes(folder: Path) -> int:
    """Of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure(rounds: int, rows: int) -> dict[str, float]:
    """Every unit by name; see `aspo.scaling.units.MEASURED`."""
    torch.set_num_threads(1)
    processor, rng = large_processor(), np.random.default_rng(0)
    jpegs = [picture(rng) for _ in range(8)]
    texts = [row(processor, n) for n in range(rows)]
    pairs = [{**texts[n % rows], "images": [{"bytes": jpegs[n % 8], "path": None}]} for n in range(8)]
    collator, turn = Collator(processor, None), iter(range(10**9))
    out = {
        "pair_seconds": seconds(lambda: collator([pairs[next(turn) % 8]]), rounds),
        "length_seconds": seconds(lambda: collator.reading_lengths(pairs[next(turn) % 8]), rounds),
        "jpeg_bytes": statistics.mean(map(len, jpegs)),
    }
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        Dataset.from_list(texts).save_to_disk(where / "rows")
        out["row_bytes"] = saved_bytes(where / "rows") / rows
        out |= _cache_bytes(where, texts)
        model = torch.nn.Linear(2048, 2048)
        optimiser = torch.optim.AdamW(model.parameters())
        model(torch.ones(1, 2048)).sum().backward()
        optimiser.step()
        (where / "saved").mkdir()
        save_file(model.state_dict(), where / "saved" / "model.safetensors")
        torch.save(optimiser.state_dict(), where / "saved" / "optimizer.pt")
        out["saved_number_bytes"] = saved_bytes(where / "saved") / sum(p.numel() for p in model.parameters())
    return out


def _cache_bytes(where: Path, texts: list[dict[str, Any]]) -> dict[str, float]:
    """Of a row and a token in the cache of reference log-probabilities, from caches of short and of long answers."""
    sizes = []
    for tokens in (1, TOKENS):
        cache = ReferenceCache.create(where / f"reference-{tokens}", {"responses": ["chosen", "rejected"]})
        values = [torch.full((tokens,), -1.0)] * 2
        fill(cache, texts, partial(_the_same, values))
        sizes.append(saved_bytes(where / f"reference-{tokens}") / len(texts))
    token = (sizes[1] - sizes[0]) / (2 * (TOKENS - 1))
    return {"reference_row_bytes": sizes[0] - 2 * token, "reference_token_bytes": token}


def _the_same(values: list[torch.Tensor], rows: Sequence[object]) -> Iterator[list[torch.Tensor]]:
    """One pair's log-probabilities for every row."""
    return (values for _ in rows)


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    found = measure(1, 8) if args.smoke else measure(ROUNDS, ROWS)
    rows = [{"unit": name, "value": f"{value:.4g}"} for name, value in found.items()]
    for line in rows:
        print(f"{line['unit']:24}{line['value']:>12}")
    if not args.smoke:
        results.write(RESULTS, machine(), rows, ("unit", "value"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
