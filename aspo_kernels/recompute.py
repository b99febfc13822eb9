"""What `linear_stats` and `linear_token_kl` share: the head's gradients from a dz that is formed again, tile by tile.

dz (N, V) is the gradient of the products x W^T + bias, epilogue included. It exists one slice of the vocabulary at a
time, so that each slice of dW is whole before the next begins and dX adds up in fp32. Axes: as in `tiles`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from aspo_kernels import torch_stats
from aspo_kernels.tiles import (
    Epilogue,
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


def whole_head(weight: Tensor, bias: Tensor | None, epilogue: Epilogue) -> Head:
    """A head without LoRA, all of it here; the kernels read a bias as adjacent numbers."""
    return Head(weight, bias if bias is None else bias.contiguous(), None, epilogue)


def log_total(logps: Tensor, z_y: Tensor, shift: Tensor, denominator: Tensor) -> Tensor:
    """log sum_v exp(z_v - shift), with all its digits where the shift is the target's logit and p_y is near 1.  (n,)"""
    return torch.where(z_y == shift, -logps, denominator.log())


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

    write_tile(tokens, columns, out): writes dz of some tokens (at most a tile's) and one slice of the vocabulary.
    """
    d_hidden, d_weight, d_bias = outputs = gradient_outputs(hidden, head.weight, *needs)
    needs_hidden, needs_weight, needs_bias = needs
    size, tokens = tile_size(hidden), hidden.shape[0]
    narrow, wide = gradient_operand_dtype(hidden.dtype), statistics_dtype(hidden.dtype)
    total = torch.zeros_like(d_hidden, dtype=wide)
    for columns in vocabulary_slices(head.size, min(tokens, size.tokens), size):
        width = columns.stop - columns.start
        weight_total = total.new_zeros((width, hidden.shape[1]) if needs_weight else 0)
        bias_total = total.new_zeros(width if needs_bias else 0)
        for group in token_chunks(tokens, size.gradient_tokens):
            dz = hidden.new_empty(group.stop - group.start, width, dtype=narrow)
            for part in token_chunks(dz.shape[0], size.tokens):
                write_tile(slice(group.start + part.start, group.start + part.stop), columns, dz[part])
            if needs_hidden:
                head.pull_back_(total[group], dz, columns)
            if needs_weight:
                add_product_(weight_total, dz.T, hidden[group].to(narrow))
            if needs_bias:
                bias_total += dz.sum(0, dtype=wide)
        if needs_weight:
            d_weight[columns] = weight_total
        if needs_bias:
            d_bias[columns] = bias_total
    d_hidden.copy_(total)
    return outputs
