"""The head's gradients from an N x V array that is formed again, one slice of the vocabulary at a time.

So each slice of dW is whole before the next begins, and dX adds up in fp32. `linear_logps` forms E again,
`linear_stats` and `linear_token_kl` dz, the gradient of the products x W^T + bias, epilogue included; what else those
two share is here too. Axes: as in `tiles`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from torch import Tensor

from aspo_kernels import torch_stats
from aspo_kernels.tiles import (
    Head,
    add_product_,
    gradient_operand_dtype,
    statistics_dtype,
    tile_size,
    token_chunks,
    vocabulary_slices,
)


def stats_ops(backend: str) -> ModuleType:
    """The module whose functions take a tile of products to sums and to dz."""
    if backend == "torch":
        return torch_stats
    from aspo_kernels import triton_stats  # imports triton

    return triton_stats


def log_total(logps: Tensor, z_y: Tensor, shift: Tensor, denominator: Tensor) -> Tensor:
    """log sum_v exp(z_v - shift), with all its digits where the shift is the target's logit and p_y is near 1.  (n,)"""
    return torch.where(z_y == shift, -logps, denominator.log())


def formed_again(
    hidden: Tensor,  # (N, H)
    vocabulary: int,
    write_tile: Callable[[slice, slice, Tensor], None],
) -> Iterator[tuple[slice, Iterator[tuple[slice, Tensor]]]]:
    """Each slice of the vocabulary, and for it, group after group, some tokens and the array's (n, v) for them.

    write_tile(tokens, columns, out): writes a tile of it, at most a chunk's tokens and one slice of the vocabulary.
    """
    size, tokens = tile_size(hidden), hidden.shape[0]

    def groups(columns: slice) -> Iterator[tuple[slice, Tensor]]:
        for group in token_chunks(tokens, size.gradient_tokens):
            width, narrow = columns.stop - columns.start, gradient_operand_dtype(hidden.dtype)
            out = hidden.new_empty(group.stop - group.start, width, dtype=narrow)
            for part in token_chunks(out.shape[0], size.tokens):
                write_tile(slice(group.start + part.start, group.start + part.stop), columns, out[part])
            yield group, out

    for columns in vocabulary_slices(vocabulary, min(tokens, size.tokens), size):
        yield columns, groups(columns)


def gradient_outputs(
    hidden: Tensor, weight: Tensor, needs_hidden: bool, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the gradients of hidden (N, H), weight (V, H) and bias (V,); empty where not needed."""
    return (
        hidden.new_empty(hidden.shape if needs_hidden else (0,)),
        hidden.new_empty(weight.shape if needs_weight else (0,)),
        hidden.new_empty(weight.shape[0] if needs_bias else 0),
    )


def pull_back(
    hidden: Tensor,  # (N, H)
    head: Head,
    needs: tuple[bool, bool, bool],
    write_tile: Callable[[slice, slice, Tensor], None],
) -> tuple[Tensor, Tensor, Tensor]:
    """dX = dz W, dW = dz^T X, db = sum_n dz, as `gradient_outputs`. 1u each for dX and dW, and what write_tile costs.

    write_tile: writes dz, see `formed_again`.
    """
    d_hidden, d_weight, d_bias = outputs = gradient_outputs(hidden, head.weight, *needs)
    needs_hidden, needs_weight, needs_bias = needs
    wide = statistics_dtype(hidden.dtype)
    total = torch.zeros_like(d_hidden, dtype=wide)
    for columns, groups in formed_again(hidden, head.size, write_tile):
        width = columns.stop - columns.start
        weight_total = total.new_zeros((width, hidden.shape[1]) if needs_weight else 0)
        bias_total = total.new_zeros(width if needs_bias else 0)
        for group, dz in groups:
            if needs_hidden:
                head.pull_back_(total[group], dz, columns)
            if needs_weight:
                add_product_(weight_total, dz.T, hidden[group].to(dz.dtype))
            if needs_bias:
                bias_total += dz.sum(0, dtype=wide)
        if needs_weight:
            d_weight[columns] = weight_total
        if needs_bias:
            d_bias[columns] = bias_total
    d_hidden.copy_(total)
    return outputs
