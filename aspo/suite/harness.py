"""Benchmarks that lmms-eval or VLMEvalKit score: their command is built and run, and its results become our items."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from transformers import AutoConfig

from aspo import trust
from aspo.model import resolve_model
from aspo.policy import merge_adapter
from aspo.recipes.keys import key_of, source_key
from aspo.suite import lmms_eval, vlmevalkit
from aspo.suite.benchmark import Item
from aspo.suite.judge import Judge

MERGED = "merged"  # folder of the model with the adapter merged in; neither harness takes an adapter


@dataclass(frozen=True)
class External:
    """What a benchmark is called in each harness; None where it has none."""

    title: str
    lmms_eval: str | None
    vlmevalkit: str | None
    judged: bool = False  # by a model, so that an endpoint is needed


EXTERNAL = {
    "mmvet": External("MM-Vet", "mmvet", "MMVet", judged=True),
    "llava-w": External("LLaVA-Bench in the wild", "llava_in_the_wild", "LLaVABench", judged=True),
    "mmbench": External("MMBench, English dev", "mmbench_en_dev", "MMBench_DEV_EN"),
    "sqa": External("ScienceQA with images", "scienceqa_img", "ScienceQA_TEST"),
    "seed": External("SEED-Bench, images", "seedbench", "SEEDBench_IMG"),
    "gqa": External("GQA, testdev balanced", "gqa", "GQA_TestDev_Balanced"),
    "mmstar": External("MMStar", "mmstar", "MMStar"),
    "mme": External("MME", "mme", "MME"),
    "mmmu": External("MMMU, validation", "mmmu_val", "MMMU_DEV_VAL"),
    "textvqa": External("TextVQA, validation", "textvqa_val", "TextVQA_VAL"),
    "vizwiz": External("VizWiz, validation", "vizwiz_vqa_val", "VizWiz"),
    "vqav2": External("VQAv2, validation", "vqav2_val", None),
}


@dataclass(frozen=True)
class Harness:
    """A harness: its module, how to get it, its command for a model and task, how its results are read, and whether it
    goes on from the files that an earlier run of it left."""

    module: str
    install: str
    command: Callable[..., tuple[list[str], dict[str, str]]]
    results: Callable[[Path, str], tuple[dict[str, float], list[Item]]]
    goes_on: bool


HARNESSES = {
    "lmms-eval": Harness("lmms_eval", "pip install lmms-eval", lmms_eval.command, lmms_eval.results, False),
    "vlmevalkit": Harness(
        "vlmeval",
        "pip install git+https://github.com/open-compass/VLMEvalKit",
        vlmevalkit.command,
        vlmevalkit.results,
        True,
    ),
}


@dataclass(frozen=True)
class Outcome:
    """`summary` holds the harness's own figures, under its names and on its scales; `items` may be empty."""

    harness: str
    command: Sequence[str]
    summary: Mapping[str, float]
    items: Sequence[Item]


def known(suite: str) -> bool:
    """Whether `suite` is one of EXTERNAL, or names a task of a harness outright: lmms-eval:TASK, vlmevalkit:DATASET."""
    return suite in EXTERNAL or (suite.partition(":")[0] in HARNESSES and bool(suite.partition(":")[2]))


def choose(suite: str, which: str | None = None) -> tuple[str, str]:
    """(harness, its name for the benchmark): `which`, or the first that is installed and has the benchmark.

    Raises ValueError that says what to install.
    """
    named, _, task = suite.partition(":")
    if task and which not in (None, named):
        raise ValueError(f"--suite {suite} names {named} and --harness {which}: drop one")
    tasks = {named: task} if task else {name: _task(EXTERNAL[suite], name) for name in HARNESSES}
    having = {name: task for name, task in tasks.items() if task is not None and which in (None, name)}
    if not having:
        raise ValueError(f"{which} does not have {suite}: leave --harness out")
    for name, found in having.items():
        if importlib.util.find_spec(HARNESSES[name].module) is not None:
            return name, found
    ways = "; or ".join(f"{name} has it as {found}: {HARNESSES[name].install}" for name, found in having.items())
    raise ValueError(f"{suite} runs through another harness, and none that has it is installed. {ways}")


def _task(external: External, harness: str) -> str | None:
    return external.lmms_eval if harness == "lmms-eval" else external.vlmevalkit


def run(
    suite: str,
    model: str,
    adapter: str | None,
    folder: Path,
    *,
    which: str | None = None,
    judge: Judge | None = None,
    batch_size: int | None = None,
    limit: int | None = None,
    dtype: str | None = None,
) -> Outcome:
    """Run a benchmark through a harness, in a folder of its own in `folder`, where the harness's files stay.

    Raises ValueError where no harness is installed, the benchmark needs a judge that is not given, the harness has no
    way to load the model, or it fails; its own output goes to this process's.
    """
    name, task = choose(suite, which)
    if suite in EXTERNAL and EXTERNAL[suite].judged and judge is None:
        raise ValueError(f"{EXTERNAL[suite].title} is scored by a judge: --judge URL --judge-model NAME")
    folder.mkdir(parents=True, exist_ok=True)
    path = resolve_model(model) if adapter is None else str(merge_adapter(model, adapter, folder / MERGED, dtype))
    config = trust.pretrained(AutoConfig, path)
    revision = getattr(config, "_commit_hash", None)  # of a hub's model
    asked = [task, source_key(model), revision, adapter and source_key(adapter), dtype, judge and judge.model]
    work = _work_folder(folder, key_of(*asked), HARNESSES[name].goes_on)
    command, environment = HARNESSES[name].command(
        path, config.model_type, task, work, judge=judge, batch_size=batch_size, limit=limit, dtype=dtype
    )
    print("$ " + " ".join(command), file=sys.stderr)
    status = subprocess.run(command, env=environment, check=False).returncode
    if status:
        raise ValueError(f"{name} failed with exit status {status}; its command was: {' '.join(command)}")
    summary, items = HARNESSES[name].results(work, task)
    return Outcome(name, command, summary, items)


def _work_folder(folder: Path, key: str, goes_on: bool) -> Path:
    """Where a harness works: no files of another model or judge are there to be taken for this one's.

    One that does not go on from earlier files finds none at all: both end with status 0 where a task fails, so that
    only what they write says that it did not.
    """
    work = folder / key if goes_on else next(p for n in count(1) if not (p := folder / f"run-{n}").exists())
    work.mkdir(exist_ok=True)
    return work
