"""The head's custom operators: chunks of tokens through slices of the vocabulary, and the gradients of that.

One driver for all backends: what happens to a tile is in `torch_head` and `triton_head`, the products in `tiles`, what
processes tell each other in `vocabulary`. Custom operators, so that torch.compile takes each as one node.
Axes: N tokens, V vocabulary, H hidden, r rank of a LoRA on the head.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from aspo_kernels import torch_head
from aspo_kernels.checks import refuse_double_backward
from aspo_kernels.recompute import formed_again
from aspo_kernels.tiles import (
    Chunk,
    Epilogue,
    Head,
    add_product_,
    gradient_operand_dtype,
    op_context,
    statistics_dtype,
    tile_size,
    token_chunks,
    vocabulary_slices,
)
from aspo_kernels.vocabulary import merge_sums, share_targets, sum_weighted, vocabulary_group


@torch.library.custom_op("aspo_kernels::linear_logps", mutates_args=())
def head_logps(
    hidden: Tensor,  # (N, H + r)
    ref_hidden: Tensor | None,  # (N, H + r)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    lora: Tensor | None,  # (V, r)
    targets: Tensor,  # (N,)
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    backend: str,
    row_grads: bool,  # whether G is formed
    keep: str,  # for the gradient of the head: "nothing" | "exps" | "inputs"
    vocabulary_start: int,
    group: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logps, ref_logps (N,), G (N, H + r), row statistics (3, N), E (N, V); empty where not wanted."""
    head = Head(weight, bias, lora, Epilogue(logit_scale, softcap, temperature), sharded=group is not None)
    ops, shard = head_ops(backend), None if group is None else vocabulary_group(group)
    y = targets - vocabulary_start
    logps, ref_logps, row_grad, statistics, exps = _outputs(hidden, ref_hidden, weight, row_grads, keep)

    def finish(chunk: Chunk, part: slice, reduction: Any) -> None:
        if reduction is not None:
            reduction.wait()
        out = ops.finish(chunk, head, row_grad[part] if row_grads else None)
        size = part.stop - part.start
        logps[part], statistics[:, part] = out[0, :size], out[1:, :size]
        if ref_hidden is not None:
            ref_logps[part] = out[0, size:]

    with op_context(hidden):
        before, before_part = None, slice(0)  # the last chunk: its G is summed over the processes meanwhile
        # A full chunk of the policy's tokens, whether the reference's are stacked on them or not: E W is theirs alone.
        for part in token_chunks(hidden.shape[0], tile_size(hidden).tokens):
            chunk = _start_chunk(hidden[part], None if ref_hidden is None else ref_hidden[part], y[part], head, ops)
            if row_grads:
                chunk.weighted = chunk.z_y.new_zeros(part.stop - part.start, hidden.shape[1])
            chunk.exps = exps[part] if keep == "exps" else None
            if shard is not None:
                share_targets(chunk, vocabulary_start, shard)  # first, or it would wait behind the sum
            reduction = sum_weighted(before, shard)
            operand_dtype = ops.operand_dtype(hidden.dtype, keep == "exps") if row_grads or keep == "exps" else None
            for columns in vocabulary_slices(head.size, chunk.y.shape[0], tile_size(hidden)):
                operand = ops.exps_tile(chunk, head, columns, operand_dtype)
                if chunk.weighted is not None:
                    head.pull_back_(chunk.weighted, operand, columns)
            if shard is not None:
                merge_sums(chunk, head, ops.raise_to, shard)
            ops.add_target_rows_(chunk, head)
            if before is not None:
                finish(before, before_part, reduction)
            before, before_part = chunk, part
        if before is not None:
            finish(before, before_part, sum_weighted(before, shard))
    return logps, ref_logps, row_grad, statistics, exps


def _start_chunk(x: Tensor, ref_x: Tensor | None, y: Tensor, head: Head, ops: ModuleType) -> Chunk:
    if ref_x is not None:
        x, y = torch.cat([x, ref_x]), torch.cat([y, y])
    return ops.start(x, y, head)


def _outputs(
    hidden: Tensor, ref_hidden: Tensor | None, weight: Tensor, row_grads: bool, keep: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Room for what `head_logps` returns."""
    tokens, dtype = hidden.shape[0], statistics_dtype(hidden.dtype)
    # fp16 cannot hold the small rows of G before the upstream gradient, with its loss scale, has multiplied them.
    narrow = gradient_operand_dtype(hidden.dtype)
    return (
        hidden.new_empty(tokens, dtype=dtype),
        hidden.new_empty(0 if ref_hidden is None else tokens, dtype=dtype),
        hidden.new_empty(hidden.shape if row_grads else (0,), dtype=narrow),
        hidden.new_empty(3, tokens, dtype=dtype),
        hidden.new_empty((tokens, weight.shape[0]) if keep == "exps" else (0,), dtype=narrow),
    )


@head_logps.register_fake
def _(
    hidden: Tensor, ref_hidden: Tensor | None, weight: Tensor, bias: Tensor | None, lora: Tensor | None,
    targets: Tensor, logit_scale: float, softcap: float | None, temperature: float, backend: str,
    row_grads: bool, keep: str, vocabulary_start: int, group: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _outputs(hidden, ref_hidden, weight, row_grads, keep)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, _, weight, bias, lora, targets, *options = inputs
    ctx.epilogue, ctx.backend, (ctx.keep, ctx.start) = tuple(options[:3]), options[3], options[5:7]
    ctx.rank, ctx.dtype = 0 if lora is None else lora.shape[1], hidden.dtype
    _, ref_logps, row_grad, statistics, exps = output
    ctx.mark_non_differentiable(ref_logps, row_grad, statistics, exps)
    ctx.set_materialize_grads(False)
    if ctx.keep == "nothing":
        ctx.save_for_backward(row_grad)  # a frozen head is not needed again
    elif ctx.keep == "exps":
        ctx.save_for_backward(row_grad, hidden, statistics, exps)
    else:
        ctx.save_for_backward(row_grad, hidden, statistics, targets, weight, bias, lora)


def _backward(ctx: Any, grad_logps: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    refuse_double_backward("linear_logps")
    needs_hidden, _, *needs_head = ctx.needs_input_grad[:5]
    row_grad, *kept = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * 14
    if grad_logps is None:
        return tuple(grads)
    if needs_hidden:
        grads[0] = scaled_rows(row_grad, grad_logps, ctx.dtype)
    if any(needs_head):
        if ctx.keep == "exps":
            hidden, statistics, exps = kept
            rest = (exps, None, None, None, None)
        else:
            hidden, statistics, *inputs = kept
            rest = (None, *inputs)
        d_head = head_grads(
            grad_logps, hidden, statistics, *rest, ctx.rank, *needs_head, *ctx.epilogue, ctx.backend, ctx.start
        )
        grads[2:5] = (d if needed else None for d, needed in zip(d_head, needs_head, strict=True))
    return tuple(grads)


head_logps.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("aspo_kernels::scaled_rows", mutates_args=())
def scaled_rows(row_grad: Tensor, grad_logps: Tensor, dtype: torch.dtype) -> Tensor:
    """g * G in `dtype`.  (N, H), (N,) -> (N, H)."""
    out = torch.empty_like(row_grad, dtype=dtype)
    for part in token_chunks(row_grad.shape[0]):  # the fp32 product of a bf16 row and its g is a copy
        out[part] = row_grad[part] * grad_logps[part, None]
    return out


@scaled_rows.register_fake
def _(row_grad: Tensor, grad_logps: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(row_grad, dtype=dtype)


@torch.library.custom_op("aspo_kernels::head_grads", mutates_args=())
def head_grads(
    grad_logps: Tensor,  # (N,)
    hidden: Tensor,  # (N, H + r)
    statistics: Tensor,  # (3, N) shift, denominator, target_entry
    exps: Tensor | None,  # (N, V) E with the targets' entries; or, to form it again:
    targets: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    lora: Tensor | None,
    rank: int,  # r
    needs_weight: bool,
    needs_bias: bool,
    needs_lora: bool,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    backend: str,
    vocabulary_start: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of weight (V, H), bias (V,) and LoRA's B (V, r); empty where not needed."""
    epilogue = Epilogue(logit_scale, softcap, temperature)
    vocabulary = exps.shape[1] if exps is not None else weight.shape[0]  # type: ignore[union-attr]
    grads = _gradient_outputs(hidden, vocabulary, rank, needs_weight, needs_bias, needs_lora)
    # Divided by a power of two, so that tiny gradients do not flush to zero in a narrow operand.
    scale = _power_of_two_above(grad_logps)
    coefficient = -epilogue.slope * (grad_logps / scale) / statistics[1]
    narrow, width = gradient_operand_dtype(hidden.dtype), hidden.shape[1] - rank
    # Each gradient is E^T times its small operand, the coefficient times x, 1 or x A^T.
    factors: tuple[Tensor | int, ...] = (hidden[:, :width], 1, hidden[:, width:])
    small = [
        (grad, (coefficient[:, None] * factor).to(narrow))
        for grad, factor, needed in zip(grads, factors, (needs_weight, needs_bias, needs_lora), strict=True)
        if needed
    ]
    with op_context(hidden):
        if exps is not None:
            for grad, operand in small:
                room = grad.view(vocabulary, -1) if grad.dtype == narrow else None  # spares a second V x H
                product = torch.mm(exps.T, operand, out=room).mul_(scale)
                if room is None:
                    grad.copy_(product.view_as(grad))
        else:
            assert targets is not None and weight is not None
            head = Head(weight, bias, lora, epilogue)
            _recompute(grads=small, scale=scale, hidden=hidden, y=targets - vocabulary_start, statistics=statistics,
                       head=head, ops=head_ops(backend))  # fmt: skip
    return grads


def _gradient_outputs(
    hidden: Tensor, vocabulary: int, rank: int, needs_weight: bool, needs_bias: bool, needs_lora: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty((vocabulary, hidden.shape[1] - rank) if needs_weight else (0,)),
        hidden.new_empty(vocabulary if needs_bias else 0),
        hidden.new_empty((vocabulary, rank) if needs_lora else (0,)),
    )


@head_grads.register_fake
def _(
    grad_logps: Tensor, hidden: Tensor, statistics: Tensor, exps: Tensor | None, targets: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, lora: Tensor | None, rank: int, needs_weight: bool, needs_bias: bool,
    needs_lora: bool, logit_scale: float, softcap: float | None, temperature: float, backend: str,
    vocabulary_start: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    vocabulary = exps.shape[1] if exps is not None else weight.shape[0]  # type: ignore[union-attr]
    return _gradient_outputs(hidden, vocabulary, rank, needs_weight, needs_bias, needs_lora)


def _recompute(
    grads: list[tuple[Tensor, Tensor]],  # (V, k) or (V,) gradients, and their (N, k) small operands
    scale: Tensor,  # 0-d
    hidden: Tensor,  # (N, H + r)
    y: Tensor,  # (N,)
    statistics: Tensor,  # (3, N)
    head: Head,
    ops: ModuleType,
) -> None:
    """grad = scale * E^T operand with E formed again, slice by slice; chunks of tokens add up in fp32."""
    shift, _, target_entry = statistics

    def write_tile(tokens: slice, columns: slice, out: Tensor) -> None:
        ops.exps_again(hidden[tokens], y[tokens], head, columns, shift[tokens], target_entry[tokens], out)

    for columns, groups in formed_again(hidden, head.size, write_tile):
        totals = [shift.new_zeros(columns.stop - columns.start, operand.shape[1]) for _, operand in grads]
        for group, exps in groups:
            for total, (_, operand) in zip(totals, grads, strict=True):
                add_product_(total, exps.T, operand[group])
        for total, (grad, _) in zip(totals, grads, strict=True):
            grad[columns] = total.mul_(scale).view_as(grad[columns])


def head_ops(backend: str) -> ModuleType:
    """The module whose functions take a chunk of tokens through the head."""
    if backend == "torch":
        return torch_head
    from aspo_kernels import triton_head  # imports triton

    return triton_head


def _power_of_two_above(values: Tensor) -> Tensor:
    """The smallest power of two >= max|values|, 1 where all are 0; a 0-d tensor."""
    largest = values.abs().amax() if values.numel() else values.new_ones(())
    return torch.where(largest > 0, largest.log2().ceil().exp2(), 1.0)
