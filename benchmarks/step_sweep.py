"""What the shared prefix saves, by the lengths of prompt and response: the toy's whole step, off and as `auto` has it.

python -m benchmarks.step_sweep                writes benchmarks/results/step_sweep.csv
python -m benchmarks.step_sweep --smoke        two tiny cases, writes nothing: for CI

The prompt's length is the image's: 8 x 8 to 32 x 32 patches, and a question of 20 tokens. The reference is live, and
the vision tower runs once an image in both cases.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from pathlib import Path

from benchmarks import results, step_cases
from benchmarks.step import ON_CPU, PAIRS, Contender, Row, check, header, quiet, stepper, turns
from benchmarks.step_cases import Rows, Shape
from benchmarks.timing import Clock, interleaved

RESULTS = results.FOLDER / "step_sweep.csv"
SIDES = (112, 224, 336, 448)  # pixels: 64, 256, 576, 1024 image tokens
RESPONSES = (32, 256, 1024)
MODES = tuple(Contender(mode, True, {"shared_prefix": mode, "vision_cache": "step"}) for mode in ("off", "auto"))
FIELDS = ("prompt", "response", "off_ms", "auto_ms", "off_over_auto", "tokens_off_over_auto")


def compare(shape: Shape, responses: tuple[int, ...], rounds: int) -> list[Row]:
    """A row for each length of the responses: medians of interleaved rounds, after a check that the losses agree."""
    model, processor = step_cases.model(shape), step_cases.processor(shape)
    sources = [Rows(shape, response) for response in responses]
    batches = [source.take(PAIRS) for source in sources]
    every_row = [row for batch in batches for row in batch]
    steppers = {mode.name: stepper(mode, copy.deepcopy(model), processor, every_row, **ON_CPU) for mode in MODES}
    rows: list[Row] = []
    for response, batch in zip(responses, batches, strict=True):
        check(steppers, [batch], expected="off")
        collated = {name: one.collate(batch) for name, one in steppers.items()}
        trees = {name: found["tree"] for name, found in collated.items()}
        runs = {name: turns(one.step, [collated[name]]) for name, one in steppers.items()}
        off, auto = (statistics.median(times) for times in interleaved(runs, Clock("cpu"), rounds, warm=True).values())
        rows.append({
            "prompt": trees["auto"].items[0].prefix,
            "response": response,
            "off_ms": round(off, 1),
            "auto_ms": round(auto, 1),
            "off_over_auto": round(off / auto, 2),
            "tokens_off_over_auto": round(trees["off"].num_tokens / trees["auto"].num_tokens, 2),
        })  # fmt: skip
        print("  " + ", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="two tiny cases, one round, no file")
    args = parser.parse_args()
    quiet()
    if args.smoke:
        compare(step_cases.toy(side=56, small=True), (4, 16), 1)
        return
    about = header()
    rows = [row for side in SIDES for row in compare(step_cases.toy(side), RESPONSES, args.rounds)]
    results.write(args.out, about, rows, FIELDS)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
