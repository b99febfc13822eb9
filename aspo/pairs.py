"""`aspo pairs`: preference pairs from prompts alone, by the recipe of SeVa (arXiv 2404.10501).

The chosen response is the model's answer to the image, the rejected one its answer to the same image under diffusion
noise; pairs of the same text are dropped.

    x_t = sqrt(abar_t) x + sqrt(1 - abar_t) eps,   abar_t = prod_{s <= t} (1 - b_s),
    b = sigmoid(linspace(-6, 6, 1000)) * (5e-3 - 1e-5) + 1e-5,   x the normalised pixels, eps standard normal
"""

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aspo.data import append_row, load_rows, row_name, validate_rows
from aspo.folder import ROWS_FILE, append_line, image_entries, read_lines
from aspo.generation import Answer, generate_answers
from aspo.model import load_model
from aspo.resume import write_json
from aspo.scores import progress_bar

NOISE_STEPS = 1000
DONE_FILE, SETTINGS_FILE = "done.jsonl", "settings.json"
MADE = "made"
DROPPED = {  # status of a prompt -> how the summary calls it
    "identical": "both answers are the same",
    "empty": "an answer is empty",
    "unfinished": "an answer did not end within --max-new-tokens",
    "no image": "the prompt has no image",
}
_NOISED_SEED = 1_000_003  # the noised images' answers are sampled with other random numbers than the clean ones'
Row = Mapping[str, Any]


@cache
def noise_schedule() -> Tensor:
    """(1000,) fp64, abar_t for t = 0..999."""
    betas = torch.sigmoid(torch.linspace(-6, 6, NOISE_STEPS, dtype=torch.float64)) * (5e-3 - 1e-5) + 1e-5
    return torch.cumprod(1 - betas, dim=0)


def add_noise(pixel_values: Tensor, step: int, seeds: Sequence[int]) -> Tensor:
    """Diffusion noise of step 0..999 on normalised pixels, of the same shape and dtype.

    Args:
        pixel_values: (n, ...). With n = len(seeds), image i gets the noise of seeds[i] whatever its neighbours are;
            otherwise (processors that pack the patches of all images) the noise of the batch comes from seeds[0].
        step: the diffusion step.
        seeds: one for each image.
    """
    if not 0 <= step < NOISE_STEPS:
        raise ValueError(f"noise step is {step}; it must be 0 to {NOISE_STEPS - 1}")
    parts = list(pixel_values) if len(pixel_values) == len(seeds) else [pixel_values]
    noise = [
        torch.randn(part.shape, generator=torch.Generator().manual_seed(seed))
        for part, seed in zip(parts, seeds, strict=False)
    ]
    eps = torch.stack(noise) if len(parts) == len(seeds) else noise[0]
    abar = float(noise_schedule()[step])
    x = pixel_values.float()
    return (abar**0.5 * x + (1 - abar) ** 0.5 * eps.to(x.device).reshape(x.shape)).to(pixel_values.dtype)


def image_seeds(row: Row, seed: int) -> list[int]:
    """A seed for each image of a row, from the run's seed and the row's id alone."""
    return [
        int.from_bytes(hashlib.sha256(f"{seed}/{row['id']}/{n}".encode()).digest()[:7])
        for n in range(len(image_entries(row)))
    ]


def answer_pairs(
    model: torch.nn.Module,
    processor: Any,
    rows: Sequence[Row],
    *,
    noise_step: int = 500,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    start: int = 0,
) -> list[tuple[Answer, Answer]]:
    """(answer on the clean images, answer on the noised ones) of each row, all rows in one batch.

    `start` is the place of the first row in the data set: batches at different places sample different numbers.
    """
    seeds = [s for row in rows for s in image_seeds(row, seed)]
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "batch_size": len(rows),
    }
    clean = generate_answers(model, processor, rows, seed=seed + start, **options)
    noised = generate_answers(
        model,
        processor,
        rows,
        seed=seed + start + _NOISED_SEED,
        pixel_transform=lambda pixels: add_noise(pixels, noise_step, seeds),
        **options,
    )
    return list(zip(clean, noised, strict=True))


def judge(clean: Answer, noised: Answer) -> str:
    """ "made", or why the pair is dropped (a key of DROPPED)."""
    if not clean.text.strip() or not noised.text.strip():
        return "empty"
    if clean.text.strip() == noised.text.strip():
        return "identical"
    return MADE if clean.finished and noised.finished else "unfinished"


def make_pairs(
    model: torch.nn.Module,
    processor: Any,
    rows: Sequence[Row],
    out: Path,
    *,
    batch_size: int = 16,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> None:
    """Answer all rows that `out` has no record of, batch by batch; rows and records are appended as they are made.

    A batch is always the same rows (by their place), so that a run which goes on gives what an uninterrupted one gives.
    `options` go to `answer_pairs`.
    """
    status = recorded(out)
    written = {line["id"] for line in read_lines(out / ROWS_FILE)}
    for start in range(0, len(rows), batch_size):
        batch = [dict(rows[i]) for i in range(start, min(start + batch_size, len(rows)))]
        if any(row["id"] not in status for row in batch):
            asked = [row for row in batch if image_entries(row)]
            answers = answer_pairs(model, processor, asked, seed=seed, start=start, **options) if asked else []
            outcome = dict(zip((row["id"] for row in asked), answers, strict=True))
            for row in batch:
                if row["id"] in status:
                    continue
                pair = outcome.get(row["id"])
                verdict = judge(*pair) if pair else "no image"
                if pair and verdict == MADE and row["id"] not in written:
                    append_row(out, _pair_row(row, *pair))
                append_line(out / DONE_FILE, json.dumps({"id": row["id"], "status": verdict}) + "\n")
        if progress is not None:
            progress(len(batch))


def _pair_row(row: Row, clean: Answer, noised: Answer) -> dict[str, Any]:
    kept = {key: row[key] for key in ("id", "prompt", "images", "scene") if row.get(key) is not None}
    return {**kept, "chosen": clean.text.strip(), "rejected": noised.text.strip()}


def recorded(out: Path) -> dict[str, str]:
    """id -> status of the prompts that are done."""
    return {line["id"]: line["status"] for line in read_lines(out / DONE_FILE)}


def summary(status: Mapping[str, str], out: Path) -> str:
    """How many pairs were made, how many dropped and why."""
    counts = Counter(status.values())
    lines = [f"{counts[MADE]} pairs of {len(status)} prompts, in {out}"]
    lines += [f"  dropped {counts[key]}: {text}" for key, text in DROPPED.items() if counts[key]]
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `aspo pairs`."""
    parser.description = (
        "Make preference pairs from prompts with images: chosen = the model's answer, rejected = its answer when the\n"
        "image is covered with diffusion noise. Pairs of the same text, with an empty answer, or with an answer that\n"
        "did not end are dropped. Writes a folder for `aspo score` and `aspo train`.\n"
        "Run the same command again to go on after a stop."
    )
    parser.epilog = (
        "examples:\n"
        "  aspo pairs --model llava-hf/llava-1.5-7b-hf --data llava_instruct_150k.json --image-root coco/train2017 \\\n"
        "             --limit 20000 --dtype bfloat16 --out pairs\n"
        "  aspo pairs --model world --data world:train --limit 500 --out runs/pairs"
    )
    parser.add_argument("--model", required=True, help="folder or hub name of the model; world = the embedded one")
    parser.add_argument(
        "--data", required=True, help="prompts: folder, .jsonl, .json (LLaVA's rows too), .parquet or world:<split>"
    )
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--noise-step", type=int, default=500, help="diffusion step, 0 to 999 (default: 500)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="length of an answer at most (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = greedy, else sampling (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise and the sampling (default: 0)")
    parser.add_argument("--batch-size", type=int, default=16, help="prompts at a time (default: 16)")
    parser.add_argument("--limit", type=int, help="only the first prompts (default: all)")
    parser.add_argument("--image-root", help="where relative image paths start (default: the folder of --data)")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16, float16 or auto (default: float32)")
    parser.add_argument("--device", help="torch device (default: the accelerator if there is one, else cpu)")


def run(args: argparse.Namespace) -> int:
    """Run `aspo pairs`."""
    for name, value, low, high in (
        ("--noise-step", args.noise_step, 0, NOISE_STEPS - 1),
        ("--max-new-tokens", args.max_new_tokens, 1, None),
        ("--batch-size", args.batch_size, 1, None),
        ("--temperature", args.temperature, 0, None),
    ):
        if value < low or (high is not None and value > high):
            raise ValueError(f"{name} is {value}; it must be {f'{low} to {high}' if high else f'at least {low}'}")
    rows = load_rows(args.data, kind="prompt", limit=args.limit, image_root=args.image_root)
    validate_rows(rows, "prompt")
    _check_ids(rows)
    out = Path(args.out)
    settings = _check_settings(args, out)
    ids = set(rows["id"])
    if not ids <= recorded(out).keys():
        model, processor = load_model(args.model, args.dtype, device=args.device)
        write_json(out / SETTINGS_FILE, settings)
        with progress_bar() as bar:
            task = bar.add_task("answering", total=len(rows))
            make_pairs(
                model,
                processor,
                rows,
                out,
                batch_size=args.batch_size,
                seed=args.seed,
                progress=lambda n: bar.advance(task, n),
                noise_step=args.noise_step,
                max_new_tokens=args.max_new_tokens,
                temperature=args.temperature,
            )
    status = recorded(out)
    print(summary(status, out))
    if MADE not in status.values():
        raise ValueError(f"no pair was made of {len(status)} prompts; the list above says why")
    return 0


def _check_ids(rows: Any) -> None:
    twice = [name for name, count in Counter(rows["id"]).items() if count > 1]
    if twice:
        raise ValueError(f"{row_name({'id': twice[0]})} is there more than once; ids must differ to go on after a stop")


def _check_settings(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """The settings that make the pairs what they are; a run that goes on must have the same."""
    generation = ("noise_step", "max_new_tokens", "temperature", "seed", "batch_size", "dtype")
    settings = {name: getattr(args, name) for name in ("model", "data", "image_root", *generation)}
    path = out / SETTINGS_FILE
    if not (out / ROWS_FILE).exists() and not (out / DONE_FILE).exists():
        return settings
    if not path.exists():
        raise ValueError(f"{out} already holds rows that `aspo pairs` did not make; use another --out")
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}; use another --out") from error
    for name, value in settings.items():
        if before.get(name) != value:
            flag = "--" + name.replace("_", "-")
            raise ValueError(
                f"{out} was begun with {flag} {before.get(name)}, not {value}; use the same, or another --out"
            )
    return settings
