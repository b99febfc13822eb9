"""What the Triton kernels become on each GPU, found out without one: registers, spills, memory, matrix instructions.

python -m benchmarks.machine_code                 compile, print, write benchmarks/results/machine_code.csv
python -m benchmarks.machine_code --check         compile and compare with that file, change nothing
python -m benchmarks.machine_code --only head     compile and print the cases and kernels whose names hold "head"

Exit 1, with a line for each fault: a spill, a 16-bit tl.dot without the target's matrix instructions, more shared or
tensor memory than a block can have, a kernel that does not compile or that no case launches, a table out of date.
The launches are those of `benchmarks.machine_cases`. Triton keeps what it compiled in its cache (TRITON_CACHE_DIR).
"""

from __future__ import annotations

import argparse
import csv
import functools
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.compile_only import TARGETS, compile_only  # isort: skip  turns the interpreter off: before triton

import triton
from triton import knobs
from triton.runtime.jit import JITFunction

TABLE = Path(__file__).parent / "results" / "machine_code.csv"
TENSOR_MEMORY_COLUMNS = 512  # of a Blackwell SM
MAX_LINES = 5  # about a table out of date: a changed kernel changes many rows
SASS_BYTES = {"8": 1, "16": 2, "64": 8, "128": 16}  # of LDL.64 and the like; 4 without a suffix
SPECIALISED = {"tt.divisibility": "D", "tt.pointer_range": "S"}  # Triton's own letters


@dataclass(frozen=True)
class Row:
    """One compiled kernel: what it was compiled for (the first KEY fields), and what came out."""

    kernel: str
    target: str
    case: str  # the first that launches it so
    arguments: str  # name=type, D: divisible by 16, S: less than 2 GiB
    constants: str
    num_warps: int
    num_stages: int
    registers: int
    stack_bytes: int
    spill_store_bytes: int  # each instruction once, however often it runs
    spill_load_bytes: int
    shared_bytes: int
    tensor_memory_columns: int
    matrix_instructions: int
    dots: str  # dtype MxNxK of each tl.dot

    def faults(self) -> Iterator[str]:
        """What is wrong with this kernel, a line each."""
        name = f"{self.kernel} on {self.target} (case {self.case}; {self.constants}; {self.num_warps} warps)"
        target = TARGETS[self.target]
        if self.spill_store_bytes or self.spill_load_bytes:
            yield f"{name} spills: {self.spill_store_bytes} bytes stored, {self.spill_load_bytes} loaded"
        if "f16" in self.dots and not self.matrix_instructions:
            yield f"{name} has a tl.dot of {self.dots} but no {target.matrix} in its machine code"
        if self.shared_bytes > target.shared_bytes:
            yield f"{name} wants {self.shared_bytes} bytes of shared memory; a block can have {target.shared_bytes}"
        if self.tensor_memory_columns > TENSOR_MEMORY_COLUMNS:
            yield f"{name} wants {self.tensor_memory_columns} columns of tensor memory of {TENSOR_MEMORY_COLUMNS}"


KEY = 7


def compile_cases(
    cases: Mapping[str, Callable[[], None]], targets: Iterable[str] = TARGETS
) -> tuple[list[Row], list[str], set[str]]:
    """Every kernel that the cases launch, once for each way it is compiled; faults; the names of those kernels."""
    rows: dict[tuple[str, ...], Row] = {}
    faults: list[str] = []
    names: set[str] = set()
    for target in targets:
        for case, launch in cases.items():
            with compile_only(target) as launched:
                try:
                    launch()
                except Exception as error:
                    error.add_note(f"in case {case} for {target}, on tensors without data")
                    raise
            if not launched:
                faults.append(f"case {case} launches no kernel on {target}")
            for kernel, compiled in launched:
                names.add(_name(kernel))
                if isinstance(compiled, Exception):
                    faults.append(f"{_name(kernel)} does not compile for {target} (case {case}): {compiled}")
                elif (_name(kernel), target, compiled.hash) not in rows:
                    rows[_name(kernel), target, compiled.hash] = _row(kernel, compiled, target, case)
    faults += [fault for row in rows.values() for fault in row.faults()]
    return list(rows.values()), faults, names


def uncovered(modules: Iterable[ModuleType], launched: set[str]) -> list[str]:
    """A line for each kernel of these modules that was neither launched nor called by one that was."""
    kernels = {_name(f): f for module in modules for f in vars(module).values() if isinstance(f, JITFunction)}
    todo, reached = [name for name in launched if name in kernels], set()
    while todo:
        kernel = kernels[todo.pop()]
        reached.add(_name(kernel))
        used = (kernel.fn.__globals__.get(word) for word in kernel.fn.__code__.co_names)
        todo += [_name(f) for f in used if isinstance(f, JITFunction) and _name(f) in kernels.keys() - reached]
    return [f"no case launches {name}: add one to benchmarks/machine_cases.py" for name in kernels.keys() - reached]


def _name(kernel: JITFunction) -> str:
    return f"{kernel.fn.__module__.removeprefix('aspo_kernels.')}.{kernel.fn.__name__}"


def _row(kernel: JITFunction, compiled: Any, target: str, case: str) -> Row:
    source, metadata = compiled.src, compiled.metadata
    arguments, constants = [], []
    for at, (name, kind) in enumerate(source.signature.items()):
        marks = "".join(SPECIALISED.get(attribute, "") for attribute, _ in source.attrs.get((at,), ()))
        if kind == "constexpr":
            constants.append(f"{name}={source.constants[(at,)]}")
        else:
            arguments.append(f"{name}={kind}:{marks}" if marks else f"{name}={kind}")
    if getattr(metadata, "maxnreg", None):
        constants.append(f"maxnreg={metadata.maxnreg}")
    dot = r"tt\.dot .*: tensor<(\d+)x(\d+)x(\w+)> \* tensor<\d+x(\d+)x"
    read = _read_cubin if "cubin" in compiled.asm else _read_amdgcn
    return Row(
        kernel=_name(kernel),
        target=target,
        case=case,
        arguments=" ".join(arguments),
        constants=" ".join(constants),
        num_warps=metadata.num_warps,
        num_stages=metadata.num_stages,
        shared_bytes=metadata.shared,
        tensor_memory_columns=getattr(metadata, "tmem_size", None) or 0,
        dots="; ".join(sorted({f"{t} {m}x{n}x{k}" for m, k, t, n in re.findall(dot, compiled.asm["ttir"])})),
        **read(compiled, TARGETS[target].matrix),
    )


def _read_cubin(compiled: Any, matrix: str) -> dict[str, int]:
    """Counts from NVIDIA machine code: its resource table, and the instructions that touch local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def dump(what: str) -> str:
            command = [knobs.nvidia.cuobjdump.path, what, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = dump("-res-usage")
        registers, stack = (max(map(int, re.findall(rf"\b{name}:(\d+)", usage))) for name in ("REG", "STACK"))
        # Disassembling takes as long as compiling. Without a stack frame nothing can be spilled.
        listing = dump("-sass") if stack or "mma" in compiled.asm["ptx"] else ""
    opcodes = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([\w.]+)", listing, flags=re.M)

    def local_bytes(name: str) -> int:
        suffixes = [opcode.split(".")[1:] for opcode in opcodes if opcode.split(".")[0] == name]
        return sum(max((SASS_BYTES.get(s.strip("US"), 0) for s in parts), default=0) or 4 for parts in suffixes)

    return {
        "registers": registers,
        "stack_bytes": stack,
        "spill_store_bytes": local_bytes("STL"),
        "spill_load_bytes": local_bytes("LDL"),
        "matrix_instructions": sum(re.match(matrix, opcode) is not None for opcode in opcodes),
    }


def _read_amdgcn(compiled: Any, matrix: str) -> dict[str, int]:
    """The same counts from AMD assembly: the kernel's metadata, and the comments that LLVM leaves at its spills."""
    text = compiled.asm["amdgcn"]
    usage = {name: int(value) for name, value in re.findall(r"^ +(?:- )?\.(\w+): +(\d+)$", text, flags=re.M)}

    def spilled(kind: str) -> int:
        return sum(map(int, re.findall(rf"(\d+)-byte Folded {kind}", text)))

    return {
        "registers": usage["vgpr_count"],  # of 512, with those of the matrix units
        "stack_bytes": usage["private_segment_fixed_size"],
        "spill_store_bytes": spilled("Spill"),
        "spill_load_bytes": spilled("Reload"),
        "matrix_instructions": len(re.findall(rf"^\s+{matrix}", text, flags=re.M)),
    }


@functools.cache
def compilers() -> dict[str, str]:
    """The versions that decide what the machine code looks like."""
    ptxas = {"ptxas": knobs.nvidia.ptxas.version, "ptxas for sm_100": knobs.nvidia.ptxas_blackwell.version}
    return {"triton": triton.__version__, **ptxas}


def write_table(rows: Iterable[Row], path: Path = TABLE) -> None:
    with path.open("w", newline="") as file:
        file.writelines(f"# {name}: {version}\n" for name, version in compilers().items())
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def differences(rows: Iterable[Row], path: Path = TABLE) -> list[str]:
    """A line for each row of the table in `path` that does not say what `rows` say, the first MAX_LINES of them.

    By the same compilers all must be the same; by others what they make of a kernel may differ, but not what the
    library asks them to compile.
    """
    lines = path.read_text().splitlines() if path.exists() else []
    versions = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# "))
    old = {tuple(r.values())[:KEY]: r for r in csv.DictReader(line for line in lines if not line.startswith("# "))}
    new = {tuple(r.values())[:KEY]: r for r in ({k: str(v) for k, v in asdict(row).items()} for row in rows)}
    out = [f"it has no row for {', '.join(key)}" for key in new.keys() - old.keys()]
    out += [f"nothing is launched like its row {', '.join(key)}" for key in old.keys() - new.keys()]
    if versions == compilers():
        for key in new.keys() & old.keys():
            changed = [f"{k} is {v}, not {old[key].get(k)}" for k, v in new[key].items() if old[key].get(k) != v]
            if changed:
                out.append(f"of {', '.join(key)}: {'; '.join(changed)}")
    if len(out) > MAX_LINES:
        out = [*sorted(out)[:MAX_LINES], f"{len(out) - MAX_LINES} more rows"]
    return [f"{path.name} is out of date (run python -m benchmarks.machine_code): {line}" for line in out]


def report(rows: Iterable[Row]) -> str:
    """A line for each row, for reading."""
    head = f"{'kernel':38} {'target':7} {'case':36} warps stages regs stack spilled  shared  tmem matrix  dots"
    lines = [
        f"{r.kernel:38} {r.target:7} {r.case:36} {r.num_warps:5} {r.num_stages:6} {r.registers:4} {r.stack_bytes:5} "
        f"{r.spill_store_bytes + r.spill_load_bytes:7} {r.shared_bytes:7} {r.tensor_memory_columns:5} "
        f"{r.matrix_instructions:6}  {r.dots}"
        for r in rows
    ]
    return "\n".join([head, *lines])


def main() -> None:
    from benchmarks.machine_cases import CASES, kernel_modules

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the committed table differs")
    parser.add_argument("--only", metavar="TEXT", help="print cases and kernels with TEXT in their names; no table")
    parser.add_argument("--target", choices=TARGETS, action="append", help="with --only: for this GPU (repeatable)")
    options = parser.parse_args()
    if options.target and not options.only:
        parser.error("--target goes with --only: the table holds every target")
    if options.only:
        cases = {name: launch for name, launch in CASES.items() if options.only in name} or CASES
        rows, faults, _ = compile_cases(cases, options.target or TARGETS)
        rows = [row for row in rows if options.only in row.case or options.only in row.kernel]
        faults = [fault for fault in faults if options.only in fault]
    else:
        rows, faults, launched = compile_cases(CASES)
        faults += uncovered(kernel_modules(), launched)
        if options.check:
            faults += differences(rows)
        else:
            write_table(rows)
    print(report(rows))
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
