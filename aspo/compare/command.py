"""`aspo compare`: systems from one start on the same pairs and steps, over seeds, on test scenes that are opened once.

What is done is kept: a data step in OUT/cache, a system with a seed in OUT/runs, each in a folder named by a key of all
that decides its content and finished by one last file. A killed run goes on there; a changed recipe makes new folders.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import multiprocessing
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aspo.compare.files import write_all
from aspo.compare.grid import as_key, merged, run_grid, tries
from aspo.compare.notes import not_given, note_opening, unlike
from aspo.compare.outcome import analyse
from aspo.compare.plan import (
    START,
    Declared,
    Run,
    System,
    first_data,
    load_declared,
    make_run,
    systems_of,
)
from aspo.compare.table import markdown
from aspo.compare.work import (
    is_done,
    read_counts,
    read_result,
    single_thread_environment,
    start_worker,
    task_name,
    work,
)
from aspo.recipes.command import Planned
from aspo.recipes.recipe import require_known
from aspo.yaml_files import read_yaml

SEEDS = 8
QUICK = {"prompts": 48, "max_steps": 3, "systems": 2, "seeds": 2, "scenes": 32}

DESCRIPTION = """Train systems from one start on the same pairs and steps, over seeds, and compare them.

  aspo compare recipes/world/*.yaml --declared recipes/declared.yaml --grid --out runs/grid
  aspo compare recipes/world/*.yaml --declared recipes/declared.yaml --chosen runs/grid/chosen.yaml --out runs/compare

The first command chooses every system's learning rate and beta on validation scenes, and writes chosen.yaml. The second
one reads it (without --chosen, what is kept in chosen/ beside the declared file), opens the test scenes, and writes
table.md, table.json, figures.csv, seeds.csv and plots: paired differences to the baseline with intervals over seeds and
scenes, and the comparisons that the declared file announces, with Holm's correction. Run the same command again to go
on after a stop. docs/evidence.md explains all of it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `aspo compare`."""
    parser.description = DESCRIPTION
    add = parser.add_argument
    add("recipes", nargs="+", type=Path, help="recipes; each variant of a recipe with `vary` is a system")
    add("--declared", required=True, type=Path, help="comparisons, budget, scenes and grid, declared beforehand")
    add("--out", required=True, type=Path, help="folder for everything it makes")
    add("--seeds", type=int, help=f"trainings of each system, seeds 0, 1, ... (default: {SEEDS})")
    add("--jobs", type=int, default=1, help="processes, of one thread each (default: 1)")
    add(
        "--chosen", type=Path, help="settings of each system (default: chosen/NAME beside --declared, of the same name)"
    )
    add("--grid", action="store_true", help="choose the settings on validation scenes, and stop")
    add("--quick", action="store_true", help="a smoke run: two systems, two seeds, tiny sizes, validation scenes")
    add("--dry-run", action="store_true", help="check everything and say how much there is to do")


def run(args: argparse.Namespace) -> int:
    """`aspo compare`; returns 0, or 1 where a run failed."""
    for name, value in (("--seeds", args.seeds), ("--jobs", args.jobs)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if args.quick and args.seeds is not None:
        raise ValueError(f"--quick has {QUICK['seeds']} seeds: drop --seeds")
    if args.grid and (args.seeds is not None or args.chosen is not None):
        raise ValueError("--grid trains with the declared grid's seed and chooses settings: drop --seeds and --chosen")
    declared = load_declared(args.declared)
    if args.quick:
        declared = quick(declared)
    seeds = QUICK["seeds"] if args.quick else args.seeds or SEEDS
    args = argparse.Namespace(**{**vars(args), "seeds": seeds})
    systems = systems_of(args.recipes, declared)
    if args.quick:
        others = [s for s in systems if s.name != declared.baseline][: QUICK["systems"] - 1]
        systems = [*(s for s in systems if s.name == declared.baseline), *others]
    if absent := not_given(systems, declared):
        print(f"declared, but no given recipe has: {'; '.join(absent)}")
    args.out.mkdir(parents=True, exist_ok=True)
    with locked(args.out):
        return grid(args, declared, systems) if args.grid else compare(args, declared, systems)


def quick(declared: Declared) -> Declared:
    """Tiny sizes on validation scenes: a smoke run must not open the test scenes."""
    scenes = dataclasses.replace(declared.validation, scenes=QUICK["scenes"], skip=0, minimal_pairs=2)
    budget = {**declared.budget, "max_steps": QUICK["max_steps"]}
    return dataclasses.replace(
        declared, prompts=QUICK["prompts"], budget=budget, test=scenes, validation=scenes, matched=()
    )


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """One `aspo compare` at a time in a folder."""
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another `aspo compare` is at work in {out}: wait for it, or use another --out") from None
        yield


def grid(args: argparse.Namespace, declared: Declared, systems: Sequence[System]) -> int:
    """The grid on validation scenes."""
    if not {"learning_rate", "seed"} <= declared.grid.keys():
        raise ValueError(f"{declared.path}: grid needs learning_rate and seed")
    failed: list[str] = []

    def run_all(wanted: Sequence[System]) -> dict[tuple[str, str], Any]:
        def runs_of(system: System) -> list[Run]:  # the start model is the same with every seed
            own = declared.grid["seed"] if system.recipe is not None else declared.grid["seed"][:1]
            return [make_run(system, seed, declared.validation, declared, args.out) for seed in own]

        runs = [runs_of(system) for system in wanted]
        failed.extend(execute([run for of in runs for run in of], args))
        return {
            (of[0].system.name, as_key(of[0].system.settings)): merged([read_result(run) for run in of])
            for of in runs
            if all(is_done(run) for run in of)
        }

    if args.dry_run:
        run_all([System(START, None), *tries(systems, declared)])
        return 0
    path = run_grid(systems, declared, run_all, args.out)
    print((args.out / "grid.md").read_text())
    kept = declared.path.parent / "chosen" / declared.path.name
    print(f"settings: {path}; the comparison reads them from {kept}, or from --chosen")
    return report_failures(failed)


def compare(args: argparse.Namespace, declared: Declared, systems: Sequence[System]) -> int:
    """The comparison on test scenes."""
    chosen, path = {}, None
    if declared.grid and not args.quick:
        if taken := [seed for seed in declared.grid.get("seed", []) if seed < args.seeds]:
            raise ValueError(f"{declared.path}: the grid's seed, {taken[0]}, is one of --seeds {args.seeds}")
        path = args.chosen or args.declared.parent / "chosen" / args.declared.name
        chosen = read_chosen(path, systems)
    elif args.chosen is not None:
        raise ValueError(f"--chosen {args.chosen} would not be read: this run uses the recipes' own settings")
    systems = [dataclasses.replace(system, settings=chosen.get(system.name, {})) for system in systems]
    runs = {START: [make_run(System(START, None), 0, declared.test, declared, args.out)]}
    for system in systems:
        runs[system.name] = [make_run(system, s, declared.test, declared, args.out) for s in range(args.seeds)]
    by_seed = [runs[name][k] for k in range(args.seeds) for name in runs if k < len(runs[name])]
    notes = [] if args.quick or args.dry_run else note_opening(args.out, declared, path, runs)
    failed = execute(by_seed, args)
    if args.dry_run:
        return 0
    whole = {name: of for name, of in runs.items() if all(is_done(run) for run in of)}
    if declared.baseline not in whole:
        report_failures(failed)
        raise ValueError(f"the baseline {declared.baseline!r} is not complete: there is nothing to compare with")
    whole[START] = whole[START] * args.seeds if START in whole else []
    tables = {name: read_counts(of) for name, of in whole.items() if of}
    curves = {name: whole[name] for name in declared.curves if name in whole}
    present = {name: whole[name] for name in tables}
    notes += unlike(present, declared)
    outcome = analyse(tables, present, declared, failed, smoke=args.quick, notes=notes)
    write_all(outcome, args.out, curves)
    print(markdown(outcome))
    print(f"written to {args.out}: table.md, table.json, figures.csv, seeds.csv, differences.svg")
    return report_failures(failed)


def report_failures(failed: Sequence[str]) -> int:
    """1 and a line each on stderr, or 0."""
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if failed else 0


def read_chosen(path: Path, systems: Sequence[System]) -> dict[str, dict[str, Any]]:
    """Every system's settings. Raises ValueError where the file or a system is missing."""
    if not path.is_file():
        raise ValueError(f"there is no {path}: choose settings with --grid first, or name a file with --chosen")
    chosen = read_yaml(path) or {}
    if not isinstance(chosen, Mapping) or not all(isinstance(s, Mapping | None) for s in chosen.values()):
        raise ValueError(f"{path} must hold `system: {{setting: value}}` lines")
    for system in systems:
        require_known(system.name, chosen, f"{path}: no settings for")
    return {name: dict(settings or {}) for name, settings in chosen.items()}


def execute(runs: Sequence[Run], args: argparse.Namespace) -> list[str]:
    """Do what is not done, data steps first; returns a line for each that failed, runs behind a failed step too."""
    waiting = [run for run in runs if not is_done(run)]
    levels: list[dict[str, Planned]] = []
    for run in waiting:
        for depth, planned in enumerate(first_data(run)):
            if len(levels) == depth:
                levels.append({})
            if not planned.done:
                levels[depth][planned.key] = planned
    print(
        f"{len(runs)} runs, {len(runs) - len(waiting)} done before; {sum(map(len, levels))} data steps to do; "
        f"{args.jobs} processes",
        flush=True,
    )
    if args.dry_run:
        return []
    failed: list[str] = []
    for level in levels:
        failed += each(list(level.values()), args.jobs)
    for run in waiting:  # what a killed run left half done is done again
        shutil.rmtree(run.folder, ignore_errors=True)
    ready = [run for run in waiting if all(planned.done for planned in first_data(run))]
    left_out = [run for run in waiting if run not in ready]
    failed += [f"{run.system.name}, seed {run.seed}: one of its data steps failed" for run in left_out]
    return failed + each(ready, args.jobs)


def each(tasks: Sequence[Planned | Run], jobs: int) -> list[str]:
    """Work through tasks, a line each with the time that is left; returns a line for each that failed."""
    failed = []
    begun = time.perf_counter()
    for number, outcome in enumerate(results(tasks, jobs), start=1):
        left = (time.perf_counter() - begun) / number * (len(tasks) - number)
        print(
            f"[{number}/{len(tasks)}] {outcome['name']}: {outcome['seconds']:.0f} s"
            + (f", about {left / 60:.0f} min left" if number < len(tasks) else "")
            + (f"  FAILED: {outcome['error']}" if outcome["error"] else ""),
            flush=True,
        )
        if outcome["error"]:
            failed.append(f"{outcome['name']}: {outcome['error']}")
    return failed


def results(tasks: Sequence[Planned | Run], jobs: int) -> Iterator[dict[str, Any]]:
    """The outcomes of `work` as they come; in this process where one is enough. Leaving early ends the processes."""
    single_thread_environment()
    if jobs == 1 or len(tasks) < 2:
        start_worker()
        yield from map(work, tasks)
        return
    waiting = list(reversed(tasks))
    while waiting:
        yield from _in_processes(waiting, jobs)


def _in_processes(waiting: list[Planned | Run], jobs: int) -> Iterator[dict[str, Any]]:
    """Work through `waiting` from its end, no more than `jobs` at a time.

    Ends early, with an outcome for what was in hand, where a process was killed: the pool is of no use then.
    """
    context = multiprocessing.get_context("spawn")
    flying: dict[Future[dict[str, Any]], Planned | Run] = {}
    broken = False
    with ProcessPoolExecutor(min(jobs, len(waiting)), context, start_worker) as pool:
        try:
            while flying or (waiting and not broken):
                while waiting and not broken and len(flying) < jobs:
                    try:
                        flying[pool.submit(work, waiting[-1])] = waiting[-1]
                        waiting.pop()
                    except BrokenProcessPool:
                        broken = True
                for future in wait(flying, return_when=FIRST_COMPLETED).done if flying else ():
                    task = flying.pop(future)
                    try:
                        yield future.result()
                    except BrokenProcessPool:
                        broken = True
                        error = "a process was killed (out of memory?) while this was in hand: run the command again"
                        yield {"name": task_name(task), "seconds": 0.0, "error": error}
        except BaseException:
            for child in multiprocessing.active_children():
                child.terminate()
            raise
