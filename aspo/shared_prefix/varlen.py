"""Attention over a TokenTree by one call of a flash-attention kernel for sequences of different lengths; CUDA only.

What is a sequence: see `segments`. A prefix's keys are gathered once for every branch that goes on from it.
Axes: R rows, T columns, h query heads, k key heads, d width of a head, n_q queries and n_k keys of all sequences.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from aspo.shared_prefix.segments import autocast, repeat_heads
from aspo.shared_prefix.tree import TokenTree

# (queries (n_q, h, d), keys (n_k, k, d), values (n_k, k, d), cu_q, cu_k, max_q, max_k, scale) -> (n_q, h, d).
# Sequence s: queries cu_q[s] : cu_q[s + 1] against keys cu_k[s] : cu_k[s + 1], its last query at its last key.
VarlenKernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, float | None], Tensor]


@dataclass(frozen=True, eq=False)
class VarlenSegments:
    """A tree's attention as one call of a kernel for sequences of different lengths.

    tokens: (n_q,) int64, where the sequences' queries lie in the flattened grid; None = the whole grid, in order.
    keys: (n_k,) int64, the same for their keys, with a prefix once for every branch; None = as `tokens`.
    cu_q, cu_k: int32, where each sequence's queries and keys begin, and the end; max_q, max_k: the longest of them.
    """

    tree: TokenTree
    kernel: VarlenKernel
    tokens: Tensor | None
    keys: Tensor | None
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int

    @classmethod
    def make(cls, tree: TokenTree, device: torch.device | str, kernel: VarlenKernel | None = None) -> VarlenSegments:
        """A tree's segments on a device; `kernel` None = `varlen_kernel()`. Raises ValueError where there is none."""
        kernel = kernel or varlen_kernel()
        if kernel is None:
            raise ValueError("no varlen flash-attention kernel is here; install flash-attn, or use the route segments")
        grid = torch.arange(tree.shape[0] * tree.shape[1]).view(tree.shape)
        queries, keys = [], []
        for item in tree.items:
            prefix = grid[item.row, item.start : item.start + item.prefix]
            for k, length in enumerate(item.branches or (0,)):
                begin = item.branch_start(k)
                branch = grid[item.row, begin : begin + length]
                if k == 0 or length:
                    keys.append(torch.cat([prefix, branch]))
                    queries.append(branch if k else keys[-1])
        q_index, cu_q, max_q = _pack(queries)
        k_index, cu_k, max_k = _pack(keys)
        whole = torch.equal(q_index, grid.flatten())
        same = torch.equal(q_index, k_index)
        return cls(
            tree,
            kernel,
            None if whole else q_index.to(device),
            None if same else k_index.to(device),
            cu_q.to(device),
            cu_k.to(device),
            max_q,
            max_k,
        )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, dropout: float) -> Tensor:
        """(R, h, T, d), (R, k, T, d), (R, k, T, d) -> (R, T, h, d); 0 at padding. Raises ValueError for dropout."""
        if dropout:
            raise ValueError(f"attention dropout {dropout} is not supported by the route varlen; use segments")
        rows, _, columns, _ = query.shape
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in autocast(query, key, value))
        keys = self.tokens if self.keys is None else self.keys
        if keys is not None:  # [] and not index_select: its backward adds in a fixed order
            k, v = k[keys], v[keys]
        if self.tokens is not None:
            q = q[self.tokens]
        out = self.kernel(q, k, v, self.cu_q, self.cu_k, self.max_q, self.max_k, scale)
        if self.tokens is not None:
            grid = out.new_zeros(rows * columns, *out.shape[1:])
            grid[self.tokens] = out
            out = grid
        return out.unflatten(0, (rows, columns))


def _pack(sequences: list[Tensor]) -> tuple[Tensor, Tensor, int]:
    """All indices in one, where each sequence begins (and the end) in int32, and the longest's length."""
    sequences = [sequence for sequence in sequences if sequence.numel()] or [torch.empty(0, dtype=torch.long)]
    lengths = [len(sequence) for sequence in sequences]
    return torch.cat(sequences), torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), max(lengths)


@cache
def varlen_kernel() -> VarlenKernel | None:
    """flash-attn's kernel where it is installed, else torch's own; None where the device can run neither."""
    if not torch.cuda.is_available() or torch.version.hip or torch.cuda.get_device_capability() < (8, 0):
        return None
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:  # not installed, or built for another torch
        if not torch.backends.cuda.is_flash_attention_available():
            return None
        from torch.nn.attention.varlen import varlen_attn

        return partial(_torch_kernel, varlen_attn, "enable_gqa" in inspect.signature(varlen_attn).parameters)
    return partial(_flash_attn_kernel, flash_attn_varlen_func)


def _flash_attn_kernel(
    function: Any, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: Any
) -> Tensor:
    deterministic = torch.are_deterministic_algorithms_enabled()
    return function(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=scale, causal=True, deterministic=deterministic)


def _torch_kernel(
    function: Any, grouped: bool, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *rest: Any
) -> Tensor:
    """grouped: whether torch's function takes fewer key heads than query heads (2.11's does not)."""
    *longest, scale = rest
    k, v = (k, v) if grouped else repeat_heads(q, k, v)
    options = {"enable_gqa": True} if grouped else {}
    return function(q, k, v, cu_q, cu_k, *longest, scale=scale, window_size=(-1, 0), **options)
