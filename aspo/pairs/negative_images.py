"""Negative images for pairs, made by `aspo negatives`; where the rows are prompts, SeVa's pairs are made first."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from aspo.data import load_rows, row_name
from aspo.pairs import Row
from aspo.shards import ARGUMENTS

OF_NEGATIVES = ("count", "scorer", "pool")
OF_PAIRS = ("max_new_tokens", "temperature", "batch_size", "dtype")
OPTIONS = dict.fromkeys((*OF_NEGATIVES, *OF_PAIRS, "noise_step", "device"))  # None: the other command's own default
PAIRS_FOLDER = "pairs"  # in --out, for the pairs of prompts


def run(args: argparse.Namespace) -> int:
    """`aspo pairs` with one of the methods of `aspo negatives`."""
    from aspo.negatives import command as negatives  # here: what the other methods do needs neither
    from aspo.pairs import command as pairs

    rows = load_rows(args.data, kind="prompt", limit=args.limit, image_root=args.image_root)
    prompts = not are_pairs(rows)
    if prompts and args.model is None:
        raise ValueError(f"the rows of {args.data} are prompts: SeVa's pairs are made of them first: give --model")
    for name in () if prompts else (*OF_PAIRS, *(() if args.method == "noise" else ("noise_step",))):
        if getattr(args, name) is not None:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} is not read here, the rows of {args.data} are pairs already: drop it")
    folder = str(Path(args.out) / PAIRS_FOLDER)
    source = {"data": args.data, "limit": args.limit, "image_root": args.image_root}
    options = {"data": folder} if prompts else source
    if args.pool is not None:
        options["image_root"] = args.image_root  # where the pool's images are looked for too
    of_both = ("method", "out", "seed", "device", *OF_NEGATIVES, *ARGUMENTS)
    options |= {name: getattr(args, name) for name in of_both}
    if args.method == "noise":
        options["noise_step"] = args.noise_step
    flags = [("--" + name.replace("_", "-"), str(value)) for name, value in options.items() if value is not None]
    parser = argparse.ArgumentParser()
    negatives.add_arguments(parser)
    of_negatives = parser.parse_args([part for flag in flags for part in flag])
    negatives.read_options(of_negatives)  # what does not fit is said before any pair is made
    if prompts:
        seva = dict.fromkeys(OF_NEGATIVES) | {"method": "seva", "out": folder}
        pairs.run(argparse.Namespace(**{**vars(args), **seva}))
    return negatives.run(of_negatives)


def are_pairs(rows: Sequence[Row]) -> bool:
    """Whether the rows have both responses. Raises ValueError where some have them and some do not."""
    paired = [row.get("chosen") is not None and row.get("rejected") is not None for row in rows]
    if any(paired) and not all(paired):
        raise ValueError(
            f"{row_name(rows[paired.index(False)])} lacks a chosen or a rejected response, which other rows have: make "
            "pairs of it first (`aspo pairs --method povid` leaves those that there are), or drop it"
        )
    return all(paired)
