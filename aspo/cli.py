"""The `aspo` command: one parser per sub-command, whose module is imported only when it runs."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import re
import sys
import traceback
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError
from typing import NoReturn

# Command -> (module with add_arguments(parser) and run(args) -> exit status, one line on what it does)
COMMANDS = {
    "pairs": ("aspo.pairs.command", "make preference pairs: SeVa's, POVID's, CSR's, SENTINEL's, with negative images"),
    "score": ("aspo.scores", "score each sentence's similarity to the image with CLIP"),
    "negatives": (
        "aspo.negatives.command",
        "add negative images: chosen by MISP's autoencoder, nearest, random, cropped, noised",
    ),
    "controls": (
        "aspo.world.controls",
        "change world rows on purpose: weights from the truth or shuffled, other boundaries",
    ),
    "rewards": (
        "aspo.rewards.command",
        "score tokens: FiSAO's verifier of object words, TLDR's reward head, changed segments",
    ),
    "reference": ("aspo.reference.command", "compute the reference's log-probabilities ahead, for training"),
    "plan": ("aspo.plan", "predict a training step's memory, and what fits, without loading weights"),
    "train": ("aspo.train", "train a model on preference pairs with ASPO, DPO and others"),
    "online": ("aspo.online.command", "train on token rewards of the model's own answers (FiSAO's on-policy loop)"),
    "eval": ("aspo.evaluate", "measure hallucination on images whose truth is known, or by the field's benchmarks"),
    "run": ("aspo.recipes.command", "run a recipe: the commands that make its data, and its training"),
    "compare": ("aspo.compare.command", "train recipes from one start on the same pairs, over seeds, and compare them"),
    "report": ("aspo.report", "write one HTML page about runs: curves, tables, weighted sentences"),
    "demo": ("aspo.demo", "all of the above on the embedded world, in minutes on a CPU"),
}
TRUST_VARIABLE = "ASPO_TRUST_REMOTE_CODE"  # read by aspo.trust, which is not imported for --help
SEVERAL = {"train", "score", "pairs", "negatives", "rewards", "reference"}  # what several processes may share
USAGE, INTERRUPTED = 2, 130  # exit codes: bad input; stopped with Ctrl-C
MISSING = "this command needs {name}, which is not installed: pip install {source}"
GLOBAL_FLAGS = ("--traceback", "--trust_remote_code")  # they stand before the command
# What other trainers and commands call an option -> our names of it
ALIASES = {
    "lr": ("learning_rate",),
    "epochs": ("num_train_epochs",),
    "batch_size": ("per_device_train_batch_size",),
    "model": ("model_name_or_path",),
    "data": ("train_data",),
    "out": ("output_dir",),
    "output": ("output_dir", "out"),
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that answers a mistake with one line, and an unknown flag with the nearest one it knows."""

    def __init__(self, **options: object) -> None:
        super().__init__(**{"allow_abbrev": False, **options})  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def parse_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def, override]
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].partition("=")[0]
            hint = f"put it before the command: aspo {flag} {self.prog.removeprefix('aspo ')} ..."
            self.error(
                f"unknown argument {unknown[0]!r}"
                + (f"; {hint}" if flag in GLOBAL_FLAGS else did_you_mean(flag, self._option_string_actions))
            )
        return known


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown option, with dashes in front or without: the known one that is meant."""
    by_plain: dict[str, str] = {}
    for other in known:  # of two spellings the first, which --help shows
        by_plain.setdefault(other.lstrip("-").replace("-", "_"), other)
    plain = name.lstrip("-").replace("-", "_")
    meant = [by_plain[other] for other in (plain, *ALIASES.get(plain, ())) if other in by_plain]
    meant = meant or difflib.get_close_matches(name, by_plain.values(), n=1)
    return f"; did you mean {meant[0]}?" if meant else ""


def overview() -> str:
    """The text of `aspo --help`."""
    lines = [f"  {name:11}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: aspo [--traceback] [--trust_remote_code] COMMAND [options]",
            "",
            "Sentence-level preference optimisation of vision-language models.",
            "",
            "commands (in the order of a project):",
            *lines,
            "",
            "`aspo COMMAND --help` tells all about one of them. Every command goes on where it was stopped when it",
            "is run again. With --traceback an error shows where it came from, not its message alone. With",
            "--trust_remote_code a model may bring Python code of its own, and it is run (docs/untrusted.md).",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status: 0, 2 on bad input, 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    given = set()
    while arguments and arguments[0] in GLOBAL_FLAGS:
        given.add(arguments.pop(0))
    show_traceback = "--traceback" in given
    if "--trust_remote_code" in given:
        os.environ[TRUST_VARIABLE] = "1"  # which the command's own processes inherit
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"aspo-kernels {version('aspo-kernels')}")
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; commands: {', '.join(COMMANDS)}"
        print(f"aspo: unknown command {name!r}{hint}", file=sys.stderr)
        return USAGE
    try:
        return _run(name, arguments[1:])
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command again to go on", file=sys.stderr)
        return INTERRUPTED
    except ModuleNotFoundError as error:
        if show_traceback or not error.name or error.name.split(".")[0] in ("aspo", "aspo_kernels"):
            raise
        print(f"aspo {name}: {_missing(error)}", file=sys.stderr)
        return USAGE
    except (ValueError, OSError, ImportError) as error:  # ImportError: an optional package, e.g. flash attention
        if show_traceback:
            traceback.print_exc()
        print(f"aspo {name}: {_one_line(error)}", file=sys.stderr)
        return USAGE
    except RuntimeError as error:  # torch's own, of which few are for users
        from aspo.processes import lost_peer

        message = lost_peer(error)
        if message is None or show_traceback:
            raise
        print(f"aspo {name}: {message}", file=sys.stderr)
        return USAGE


def _run(name: str, arguments: list[str]) -> int:
    processes = int(os.environ.get("WORLD_SIZE") or 1)
    if processes > 1 and name not in SEVERAL:
        raise ValueError(
            f"it runs as one process, and a launcher started {processes}, which would write over each other: start it "
            f"without one (several processes may share: {', '.join(sorted(SEVERAL))})"
        )
    module = importlib.import_module(COMMANDS[name][0])
    parser = Parser(prog=f"aspo {name}", formatter_class=argparse.RawDescriptionHelpFormatter)
    module.add_arguments(parser)
    return module.run(parser.parse_args(arguments))


def _missing(error: ModuleNotFoundError) -> str:
    """What to install. A distribution that is missing is named within a sentence by transformers' version checks."""
    if not isinstance(error, PackageNotFoundError):
        return MISSING.format(name=error.name, source='"aspo-kernels[train]"')
    quoted = re.match(r"The '([\w.-]+)", str(error.args[0]))
    package = quoted[1] if quoted else str(error.args[0])
    return MISSING.format(name=package, source=package)


def _one_line(error: Exception) -> str:
    """Without line breaks, and without what a terminal would obey: parts of it come from rows and file names."""
    text = str(error)
    if "in DataLoader worker process" in text:  # torch puts the whole traceback into the message
        text = text.strip().splitlines()[-1].partition(": ")[2]
    text = " ".join(text.split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text) or type(error).__name__
