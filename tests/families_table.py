"""The table of docs/models.md, from the outcomes of the model families' tests.

python tests/families_table.py --write    runs the tests and writes the table
python tests/families_table.py --check    runs them and fails where the table would change
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "models.md"
BEGIN, END = "<!-- table: python tests/families_table.py --write -->", "<!-- end of table -->"

# Column -> the start of the names of the tests that must pass.
COLUMNS = {
    "Log-probabilities": ("test_log_probabilities_are", "test_each_image", "test_no_token_sees", "test_head_and"),
    "Shared: mask": ("test_shared_and_packed_rows_are_exact[shared-mask-", "test_nothing_leaks[mask-"),
    "Shared: segments": ("test_shared_and_packed_rows_are_exact[shared-segments-", "test_nothing_leaks[segments-"),
    "Packed: mask": tuple(f"test_shared_and_packed_rows_are_exact[{mode}-mask-" for mode in ("packed", "both")),
    "Packed: segments": tuple(f"test_shared_and_packed_rows_are_exact[{mode}-segments-" for mode in ("packed", "both")),
    "eager": ("test_loading_with_an_attention[eager-",),
    "sdpa": ("test_loading_with_an_attention[sdpa-",),
    "Rows without an image": ("test_rows_without",),
    "Several images": ("test_rows_with_several",),
    "LoRA": ("test_the_right_modules", "test_lora_trains_the_same"),
    "DoRA": ("test_dora",),
    "Full": ("test_full_fine_tuning",),
    "Gradient checkpointing": ("test_gradient_checkpointing",),
}


class Outcomes:
    """A pytest plugin: (test with its parameters, family) -> "passed", "failed", or why it was skipped."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        names = "|".join(map(re.escape, sorted(FAMILIES, key=len, reverse=True)))
        match = re.search(rf"::(test_\w+(?:\[.*)?(?:\[|-))({names})\]$", report.nodeid)
        if match is None or (report.when != "call" and report.passed):
            return
        why = str(report.longrepr[2]).removeprefix("Skipped: ") if report.skipped else report.outcome
        self.found[match.groups()] = why  # type: ignore[index]

    def cell(self, tests: tuple[str, ...], family: str) -> str:
        """ "passed", or the first thing that came instead. Raises KeyError for a test that did not run."""
        found = []
        for start in tests:
            outcomes = [why for (test, name), why in self.found.items() if test.startswith(start) and name == family]
            if not outcomes:
                raise KeyError(f"{start}...{family}] did not run")
            found += outcomes
        return next((why for why in found if why != "passed"), "passed")


def table(outcomes: Outcomes) -> str:
    """The table and, below it, why a cell says no."""
    notes: list[str] = []
    lines = ["| Family | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for family in FAMILIES:
        cells = []
        for tests in COLUMNS.values():
            why = outcomes.cell(tests, family)
            if why not in ("passed", "failed") and why not in notes:
                notes.append(why)
            cells.append({"passed": "yes", "failed": "fails"}.get(why) or f"no ({notes.index(why) + 1})")
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"{n}. {why}" for n, why in enumerate(notes, 1))])


def written() -> str:
    """The table as it stands in the document."""
    return DOCUMENT.read_text().partition(BEGIN)[2].partition(END)[0].strip()


def main(argument: str) -> int:
    outcomes = Outcomes()
    files = [str(HERE / name) for name in ("test_families.py", "test_family_training.py")]
    options = ["-p", "no:cacheprovider", "-k", "not documented"]  # that test reads what is written here
    status = pytest.main([*files, *options], plugins=[outcomes])
    made = table(outcomes)
    if argument == "--write":
        before, _, rest = DOCUMENT.read_text().partition(BEGIN)
        DOCUMENT.write_text(f"{before}{BEGIN}\n{made}\n{END}{rest.partition(END)[2]}")
    elif made != written():
        print(f"{DOCUMENT} is not what the tests say; run with --write")
        return 1
    return int(status)


if __name__ == "__main__":
    if sys.argv[1:] not in (["--write"], ["--check"]):
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))
