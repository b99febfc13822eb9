"""The launches that `benchmarks.machine_code` compiles: the library's own functions, on tensors without data.

Shapes and dtypes are those of real models and batches (nothing is computed, so size is free): specialisations, block
sizes, warps and stages are then those of a real launch. A real batch has any number of tokens, odd or even.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import aspo_kernels
from aspo_kernels import (
    SentenceLayout,
    linear_logps,
    linear_stats,
    linear_token_kl,
    segments,
    sentence_dpo_loss_from_logits,
    token_logps,
)
from aspo_kernels.tiles import Epilogue, Head

TOKENS, ODD_TOKENS, SENTENCES = 2048, 975, 96
LLAVA = (4096, 32_064)  # H, V of LLaVA-1.5-7B
QWEN = (3584, 152_064)  # Qwen2.5-VL-7B


def kernel_modules() -> list[ModuleType]:
    """Every module of the library that holds Triton kernels."""
    names = sorted(path.stem for path in Path(aspo_kernels.__file__).parent.glob("triton_*.py"))
    return [importlib.import_module(f"aspo_kernels.{name}") for name in names]


def _empty(*shape: int, dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda").requires_grad_(requires_grad)


def _head(
    dtype: torch.dtype,
    shape: tuple[int, int] = LLAVA,
    tokens: int = TOKENS,
    *,
    candidate: str = "tile",
    hidden_grad: bool = True,
    head_grad: bool = False,
    bias: bool = False,
    rank: int | None = None,
    **options: Any,
) -> None:
    """linear_logps forward and, where something wants a gradient, backward."""
    (width, vocabulary), new = shape, partial(_empty, dtype=dtype)
    lora = None if rank is None else (new(rank, width), new(vocabulary, rank, requires_grad=True), 2.0)
    with mock.patch("aspo_kernels.triton_head.CANDIDATE", candidate):
        logps = linear_logps(
            new(tokens, width, requires_grad=hidden_grad),
            new(vocabulary, width, requires_grad=head_grad),
            _empty(tokens, dtype=torch.int64),
            bias=new(vocabulary, requires_grad=head_grad) if bias else None,
            lora=lora,
            **options,
        )
        if logps.requires_grad:
            logps.sum().backward()


def _stats(dtype: torch.dtype, head_grad: bool, **options: Any) -> None:
    width, vocabulary = LLAVA
    stats = linear_stats(
        _empty(TOKENS, width, dtype=dtype, requires_grad=True),
        _empty(vocabulary, width, dtype=dtype, requires_grad=head_grad),
        _empty(TOKENS, dtype=torch.int64),
        bias=_empty(vocabulary, dtype=dtype, requires_grad=True) if head_grad else None,
        **options,
    )
    assert stats.entropy is not None and stats.lse is not None
    (stats.logps + stats.entropy + stats.lse).sum().backward()


def _token_kl(dtype: torch.dtype, head_grad: bool, **options: Any) -> None:
    width, vocabulary = LLAVA
    hidden, ref_hidden = _empty(TOKENS, width, dtype=dtype, requires_grad=True), _empty(TOKENS, width, dtype=dtype)
    head = _empty(vocabulary, width, dtype=dtype, requires_grad=head_grad)
    targets = _empty(TOKENS, dtype=torch.int64)
    out = linear_token_kl(hidden, ref_hidden, head, None, targets, **options)
    (out.logps + out.kl).sum().backward()


def _shard() -> None:
    """What a process that holds a part of the head launches between the collectives."""
    from aspo_kernels import triton_head

    width, vocabulary = LLAVA
    head = Head(_empty(vocabulary, width, dtype=BF16), None, None, Epilogue(), sharded=True)
    chunk = triton_head.start(_empty(TOKENS, width, dtype=BF16), _empty(TOKENS, dtype=torch.int64), head)
    chunk.weighted = _empty(TOKENS, width)
    triton_head.exps_tile(chunk, head, slice(0, 4096), BF16)
    triton_head.raise_to(chunk, head, _empty(TOKENS))


def _token_logps(dtype: torch.dtype, tokens: int = TOKENS, vocabulary: int = QWEN[1]) -> None:
    logits = _empty(tokens, vocabulary, dtype=dtype, requires_grad=True)
    token_logps(logits, _empty(tokens, dtype=torch.int64), temperature=0.7).sum().backward()


def _aspo(similarity: bool, eos: int | None, **options: Any) -> None:
    """ASPO from padded logits (R, T + 1, V), of which a slice along T is used: 2 pairs, 4 sentences a response."""
    ids = torch.arange(512).expand(4, 512)
    layout = SentenceLayout.from_labels(ids, ids // 128, eos).to("cuda:0")
    sentence_dpo_loss_from_logits(
        _empty(4, 513, LLAVA[1], dtype=BF16, requires_grad=True)[:, :-1],
        layout,
        ref_logps=_empty(layout.num_tokens),
        similarity=_empty(8) if similarity else None,
        **options,
    ).loss.backward()


def _segments() -> None:
    values, offsets = _empty(TOKENS, requires_grad=True), _empty(SENTENCES + 1, dtype=torch.int64)
    segments.segment_sum(values, offsets).sum().backward()
    segments.segment_minmax(values, offsets)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KEEP, RECOMPUTE = 2**40, 0  # memory budgets
REWARD = {"normalizer": "reward", "perplexity": "reference", "perplexity_scale": "nll"}
CASES: dict[str, Callable[[], None]] = {
    "head bf16, no gradient": partial(_head, BF16, QWEN, hidden_grad=False),
    "head bf16, frozen": partial(_head, BF16, tokens=ODD_TOKENS),
    "head bf16, trainable": partial(_head, BF16, head_grad=True, bias=True, memory_budget=KEEP),
    "head bf16, recomputed": partial(_head, BF16, head_grad=True, bias=True, memory_budget=RECOMPUTE),
    "head bf16, soft-cap, LoRA": partial(_head, BF16, rank=8, softcap=30.0),
    "head fp16, frozen": partial(_head, FP16),
    "head fp16, trainable": partial(_head, FP16, head_grad=True, memory_budget=KEEP),
    "head fp32, recomputed": partial(_head, FP32, head_grad=True, memory_budget=RECOMPUTE),
    "statistics bf16": partial(_stats, BF16, False),
    "statistics fp16, trainable": partial(_stats, FP16, True, softcap=30.0),
    "KL bf16": partial(_token_kl, BF16, False),
    "KL bf16, trainable, soft-cap": partial(_token_kl, BF16, True, softcap=30.0),
    "KL fp16": partial(_token_kl, FP16, False),
    "shard of a head bf16": _shard,
    "fused bf16, no gradient": partial(_head, BF16, hidden_grad=False, candidate="fused"),
    "fused bf16, recomputed": partial(
        _head, BF16, tokens=ODD_TOKENS, head_grad=True, memory_budget=RECOMPUTE, candidate="fused"
    ),
    "fused bf16, bias, soft-cap": partial(
        _head, BF16, head_grad=True, bias=True, softcap=30.0, memory_budget=RECOMPUTE, candidate="fused"
    ),
    "fused fp16, frozen": partial(_head, FP16, candidate="fused"),
    "fused fp16, trainable": partial(_head, FP16, head_grad=True, memory_budget=KEEP, candidate="fused"),
    "fused fp32, recomputed": partial(_head, FP32, head_grad=True, memory_budget=RECOMPUTE, candidate="fused"),
    "logits bf16": partial(_token_logps, BF16),
    "logits fp16, odd": partial(_token_logps, FP16, ODD_TOKENS, 50_257),  # GPT-2's vocabulary
    "logits fp32": partial(_token_logps, FP32),
    "ASPO from bf16 logits": partial(_aspo, False, None),
    "ASPO from bf16 logits, all options": partial(_aspo, True, 511, **REWARD),
    "segments": _segments,
}
