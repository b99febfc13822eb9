"""Settings for every test: one thread, reproducible property tests, and a switch that poisons unwritten memory."""

from collections.abc import Iterator

import hypothesis
import pytest
import torch

import aspo  # noqa: F401  its torchvision hook, before a test imports transformers

# Small tensors gain nothing from threads, and one thread adds in the same order on every machine.
torch.set_num_threads(1)

# A property test must say the same on every run; a slow machine is no failure.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, max_examples=60, print_blob=True)
hypothesis.settings.load_profile("tests")


@pytest.fixture
def poison() -> Iterator[None]:
    """torch.empty is filled with NaN, so that an entry nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
