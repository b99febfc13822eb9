"""The Triton kernels of linear_logps, both candidates, against fp64: interpreted on a CPU, compiled on a GPU.

Sizes are odd and small, so that every mask matters and the interpreter stays quick: chunks of 16 tokens, slices of 64.
"""

from __future__ import annotations

import pytest
import torch
from problems import EPILOGUES, SCHEDULES, Problem, check

from aspo_kernels import tiles

pytest.importorskip("triton")
from aspo_kernels import triton_head

# The interpreter's bf16 products are wrong; a GPU's are not.
DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
]


@pytest.fixture(params=["tile", "fused"])
def candidate(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to make the exponentials of a tile, on small tiles."""
    small = tiles.TileSize(tokens=16, bytes=1, width=64, gradient_tokens=32)
    monkeypatch.setattr(tiles, "CPU_TILE", small)
    monkeypatch.setattr(tiles, "GPU_TILE", small)
    monkeypatch.setattr(triton_head, "CANDIDATE", request.param)
    if not torch.cuda.is_available():  # several blocks a tile, at a size that the interpreter can run
        monkeypatch.setattr(triton_head, "fused_blocks", lambda dtype: triton_head.Blocks(16, 32, 16, 1, 1))
    return request.param


@pytest.mark.usefixtures("candidate", "poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_matches_the_oracle(schedule, dtype, device):
    check(Problem(19, 150, 24, dtype), schedule, backend="triton", device=device)


@pytest.mark.usefixtures("candidate", "poison")
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("schedule", ["frozen", "stored", "recompute"])
def test_epilogues(schedule, epilogue, device):
    check(Problem(9, 70, 17, torch.float32), schedule, backend="triton", device=device, **EPILOGUES[epilogue])


@pytest.mark.usefixtures("candidate", "poison")
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 2, 3), (17, 65, 1), (33, 64, 31), (2, 129, 70)], ids=str)
@pytest.mark.parametrize("schedule", ["frozen", "stored", "recompute"])
def test_odd_sizes(schedule, sizes, device):
    check(Problem(*sizes, torch.float32, bias=False), schedule, backend="triton", device=device)
