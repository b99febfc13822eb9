"""`python -m tests.reliability`: the table of docs/reliability.md out of the fault tests; --check only compares."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import aspo  # noqa: F401  first: it makes torchvision importable on a CPU torch

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "reliability.md"
BEGIN, END = "<!-- made by python -m tests.reliability -->", "<!-- until here -->"
GROUPS = {
    "test_faults_kills": "Processes that die, stop or hang, in training",
    "test_faults_resume": "Going on with something else than before",
    "test_faults_disk": "Disks",
    "test_faults_damage": "Damaged files, and rows that are none",
}


def table() -> str:
    """A Markdown table for each group: a line for each test that has a story."""
    if str(TESTS) not in sys.path:
        sys.path.insert(0, str(TESTS))
    parts = []
    for name, title in GROUPS.items():
        tests = [test for test in vars(importlib.import_module(name)).values() if hasattr(test, "story")]
        lines = [_line(test.story) for test in tests]
        head = ["| fault | what you see | what is kept | how it goes on |", "|---|---|---|---|"]
        parts.append("\n".join([f"### {title}", "", f"`tests/{name}.py`", "", *head, *lines]))
    return "\n\n".join(parts)


def _line(story: dict[str, str]) -> str:
    sees = f"`{story['sees']}`" if story["sees"] else "—"
    return f"| {story['fault']} | {sees} | {story['kept']} | {story['goes on']} |".replace("\n", " ")


def page(text: str) -> str:
    """The page with the table in its place."""
    before, _, rest = text.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"{PAGE} has no lines {BEGIN!r} and {END!r} for the table")
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def main() -> int:
    """Write the table into the page, or compare; 1 where it is not up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the page is not up to date")
    args = parser.parse_args()
    text = PAGE.read_text(encoding="utf-8")
    new = page(text)
    if args.check:
        return int(new != text)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
