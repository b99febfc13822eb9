"""Settings for every test: one thread, reproducible property tests, and a switch that poisons unwritten memory."""

import gc
import os
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: without a GPU its kernels are interpreted

import aspo  # noqa: F401  its torchvision hook, before a test imports transformers
from aspo_kernels import tiles

# Small tensors gain nothing from threads, and one thread adds in the same order on every machine.
torch.set_num_threads(1)

# A property test must say the same on every run; a slow machine is no failure.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, max_examples=60, print_blob=True)
hypothesis.settings.load_profile("tests")


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers in every run of a test, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def poison() -> Iterator[None]:
    """torch.empty is filled with NaN, so that an entry nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 16 tokens and slices of 64 vocabulary entries; two chunks at a time where the head is recomputed."""
    small = tiles.TileSize(tokens=16, bytes=1, width=64, gradient_tokens=32)
    monkeypatch.setattr(tiles, "CPU_TILE", small)
    monkeypatch.setattr(tiles, "GPU_TILES", ((0, small),))


@pytest.fixture
def device() -> str:
    """Where the Triton kernels run: compiled on a GPU where there is one, else interpreted on the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def frozen_modules() -> Iterator[None]:
    """Models are cyclic garbage, and Trainer collects it after a run: quickly without all imported modules in sight."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module", params=[2, 3], ids=["2 processes", "3 processes"])
def ranks(request: pytest.FixtureRequest) -> Iterator[Any]:
    """`ranks.Ranks` of 2 and of 3 processes; some modules have groups of their own."""
    from ranks import Ranks  # it needs psutil, which the kernels' tests do without

    processes = Ranks(request.param)
    yield processes
    processes.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, and say so, where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm device"))
