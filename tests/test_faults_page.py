"""docs/reliability.md says what the fault tests check, and the injected faults do what they say."""

import aspo  # isort: skip  # noqa: F401  (first: it makes torchvision importable on a CPU torch)

import importlib

import pytest
from faults import fault, said
from reliability import GROUPS, PAGE, page


def test_the_table_is_up_to_date():
    assert page(PAGE.read_text(encoding="utf-8")) == PAGE.read_text(encoding="utf-8"), "run python -m tests.reliability"


@pytest.mark.parametrize("name", GROUPS)
def test_what_is_seen_is_compared(name):
    """A line in the table that no test compares with what was printed would be a promise without ground."""
    module = importlib.import_module(name)
    source = (PAGE.parents[1] / "tests" / f"{name}.py").read_text(encoding="utf-8")
    for test in (test for test in vars(module).values() if hasattr(test, "story")):
        body = source.partition(f"def {test.__name__}(")[2].partition("\n\n\n")[0]
        compares = any(word in body for word in ("said(", "refused(", "stops(", "stopped("))
        assert compares == bool(test.story["sees"]), test.__name__


def test_said():
    @fault("a fault", sees="aspo train: <file> (line 3) is <what>", kept="all", goes_on="at once")
    def test():
        pass

    said(test, "loading\r50%\naspo train: a.json (line 3) is bad\n")
    for wrong in ("aspo train: a.json (line 4) is bad", "aspo train: a.json (line 3) is bad\nmore", ""):
        with pytest.raises(AssertionError):
            said(test, wrong)
    with pytest.raises(AssertionError):
        said(test, "Traceback (most recent call last)\naspo train: a.json (line 3) is bad")
