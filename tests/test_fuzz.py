"""Fuzzing in small: the inputs that once failed, and a short run of each target (`python -m tests.fuzz`: long ones)."""

import importlib
import json

import hypothesis
import pytest
from fuzz import guard
from hypothesis import given, settings
from hypothesis import strategies as st

EXAMPLES = {"splitter": 60, "rows": 40, "layout": 60, "config": 25}
KEPT = [(target, path) for target in EXAMPLES for path in guard.kept(target)]


@pytest.mark.parametrize(("target", "path"), KEPT, ids=[f"{target}-{path.stem}" for target, path in KEPT])
def test_what_failed_once_holds_now(target, path):
    found = guard.run(importlib.import_module(f"fuzz.{target}").check, guard.read(path))
    assert found is None, found.trace


@pytest.mark.parametrize("target", EXAMPLES)
def test_a_short_run_finds_nothing(target):
    module = importlib.import_module(f"fuzz.{target}")

    @settings(max_examples=EXAMPLES[target], suppress_health_check=list(hypothesis.HealthCheck))
    @given(module.INPUTS)
    def feed(value):
        found = guard.run(module.check, value)
        assert found is None, found.trace

    feed()


def _blow_up(value):
    raise {"value": ValueError("row 1: no"), "mute": ValueError(" "), "other": KeyError("x")}[value]


@pytest.mark.parametrize(("value", "signature"), [("value", None), ("mute", "AssertionError"), ("other", "KeyError")])
def test_the_guard_lets_pass_what_names_its_row_and_nothing_else(value, signature):
    def check(value):
        with guard.refusal("row"):
            _blow_up(value)

    found = guard.run(check, value)
    assert (found and found.signature.split()[0]) == signature


def test_the_guard_stops_what_hangs(monkeypatch):
    monkeypatch.setattr(guard, "HANG_S", 0.2)

    def check(_):
        while True:
            pass

    assert guard.run(check, None).signature.startswith("Hang")


@given(st.text(st.characters(exclude_categories=())) | st.floats())
def test_the_corpus_keeps_any_input(value):
    assert repr(json.loads(guard.as_text(value))) == repr(value)
