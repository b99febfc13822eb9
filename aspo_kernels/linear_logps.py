"""Per-token log-probabilities straight from hidden states: no N x V array of logits, any upstream gradient.

With z = x W^T (and the epilogue of `tiles.Epilogue`), a token's log-probability and its gradient are

    logp = z_y - log sum_v exp(z_v),      d logp / d x = W[y] - p W,      d logp / d W = (1[y] - p) x^T.

The target's own logit is the shift of the exponentials, E_v = exp(z_v - c) with c = z_y, so that no running maximum is
needed and logp = -log1p(S), S = sum_{v != y} E_v, keeps its digits as p -> 1. Rows with a very unlikely target raise c.

Schedules, in passes u of the head (2 N H V FLOP), chosen from what requires a gradient and from the memory budget:
    nothing             1u  S only
    hidden              2u  the forward also forms G = W[y] - p W (N x H); the backward is g * G, without the head
    head too, stored    3u  E is kept to the backward when N x V entries fit the budget
    head too, recompute 4u  E is formed again, one slice of the vocabulary at a time
Derivations: docs/math.md. Axes: N tokens, V vocabulary, H hidden; n, v a tile's part of N, V.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aspo_kernels import reference
from aspo_kernels.checks import (
    check_backend,
    check_finite_logps,
    check_head,
    check_targets,
    refuse_double_backward,
)
from aspo_kernels.tiles import (
    Epilogue,
    gradient_operand_dtype,
    matmul,
    products,
    statistics_dtype,
    token_chunks,
    vocabulary_slices,
    widen,
)

# exp(40): a row whose sum passes this raises its shift. Far inside fp32, and 1 / S stays far above its smallest normal
# number, so that the products of the dW pass do not flush to zero.
MAX_SUM = 2.3e17


def linear_logps(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
    memory_budget: int | None = None,
    validate: bool = False,
) -> Tensor:
    """`(hidden @ head.T).float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]` without the logits.

    Args:
        hidden: (N, H) fp32, bf16 or fp16 (fp64 stays fp64), one row per counted token. N = 0 is fine.
        head: (V, H), hidden's dtype and device. Under autocast both are cast to autocast's dtype.
        targets: (N,) int64 in [0, V).
        bias, logit_scale, softcap, temperature: z = cap(logit_scale * (x W^T + bias)) / temperature with
            cap(z) = softcap * tanh(z / softcap); bias is (V,).
        backend: "auto" | "torch" | "reference" (full logits, for comparison).
        memory_budget: bytes that a trainable head may hold from forward to backward to spare a recompute; None =
            4 V H, the size of an fp32 gradient of the head.
        validate: check targets' contents on an accelerator too (waits for the device).

    Returns:
        (N,) fp32 log-probabilities, differentiable once in hidden, head and bias.

    Raises:
        ValueError: wrong shapes, dtypes, devices or options; on the CPU also a target outside [0, V) or a result
            that is not finite.
    """
    epilogue = Epilogue(logit_scale, softcap, temperature)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, head, bias = hidden.to(dtype), head.to(dtype), bias if bias is None else bias.to(dtype)
    check_head(hidden, head, bias)
    check_targets(targets, hidden.shape[0], head.shape[0], hidden.device, validate)
    if memory_budget is not None and memory_budget < 0:
        raise ValueError(f"memory_budget is {memory_budget} bytes; it must not be negative")
    if not torch.is_grad_enabled():
        hidden, head, bias = hidden.detach(), head.detach(), bias if bias is None else bias.detach()
    with torch.autocast(hidden.device.type, enabled=False):
        if check_backend(backend, hidden) == "reference":
            dtype = statistics_dtype(hidden.dtype)
            bias = bias if bias is None else bias.to(dtype)
            logps = reference.linear_logps(hidden.to(dtype), head.to(dtype), targets, bias, **vars(epilogue))
        else:
            logps = _LinearLogps.apply(hidden, head, bias, targets, epilogue, memory_budget)
    check_finite_logps(logps, targets)
    return logps


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (N, H)
        head: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (N,)
        epilogue: Epilogue,
        memory_budget: int | None,
    ) -> Tensor:
        needs_hidden, needs_head, needs_bias = ctx.needs_input_grad[:3]
        trainable = needs_head or needs_bias
        exps = _room_for_exps(hidden, head, memory_budget) if trainable else None
        # fp16 cannot hold the small rows of G before the upstream gradient, with its loss scale, has multiplied them.
        row_dtype = gradient_operand_dtype(hidden.dtype)
        row_grad = torch.empty(hidden.shape, dtype=row_dtype, device=hidden.device) if needs_hidden else None

        dtype = statistics_dtype(hidden.dtype)
        logps, shift, denominator, target_entry = (
            torch.empty(hidden.shape[0], dtype=dtype, device=hidden.device) for _ in range(4)
        )
        for chunk in token_chunks(hidden.shape[0]):
            _forward_chunk(
                hidden[chunk],
                head,
                bias,
                targets[chunk],
                epilogue,
                out=(logps[chunk], shift[chunk], denominator[chunk], target_entry[chunk]),
                row_grad=None if row_grad is None else row_grad[chunk],
                exps=None if exps is None else exps[chunk],
            )
        ctx.epilogue, ctx.dtype = epilogue, hidden.dtype
        if not trainable:
            ctx.save_for_backward(row_grad)  # a frozen head is not needed again
        elif exps is not None:
            ctx.save_for_backward(row_grad, hidden, denominator, exps)
        else:
            ctx.save_for_backward(row_grad, hidden, denominator, targets, shift, target_entry, head, bias)
        return logps

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("linear_logps")
        with torch.autocast(grad_logps.device.type, enabled=False):  # a backward begun under autocast must not narrow E
            return *_gradients(ctx, grad_logps), None, None, None


def _gradients(ctx: Any, grad_logps: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of hidden, head and bias, those that are needed."""
    needs_hidden, needs_head, needs_bias = ctx.needs_input_grad[:3]
    row_grad, *kept = ctx.saved_tensors
    d_hidden = d_head = d_bias = None
    if needs_hidden:
        d_hidden = torch.empty_like(row_grad, dtype=ctx.dtype)
        for chunk in token_chunks(row_grad.shape[0]):  # the fp32 product of a bf16 row and its g is a copy
            d_hidden[chunk] = row_grad[chunk] * grad_logps[chunk, None]
    if needs_head or needs_bias:
        hidden, denominator, *how = kept
        # Divided by a power of two, so that tiny gradients do not flush to zero in a narrow operand.
        scale = _power_of_two_above(grad_logps)
        coefficient = -ctx.epilogue.slope * (grad_logps / scale) / denominator
        small = (coefficient[:, None] * hidden).to(gradient_operand_dtype(hidden.dtype)) if needs_head else None
        bias_coefficient = coefficient if needs_bias else None
        if len(how) == 1:
            scaled = _head_grads(how[0], small, bias_coefficient)
            d_head, d_bias = (d if d is None else d.mul_(scale).to(hidden.dtype) for d in scaled)
        else:
            targets, shift, target_entry, head, bias = how
            d_head, d_bias = _recomputed_head_grads(
                hidden, targets, shift, target_entry, head, bias, ctx.epilogue, small, bias_coefficient, scale
            )
    return d_hidden, d_head, d_bias


def _room_for_exps(hidden: Tensor, head: Tensor, memory_budget: int | None) -> Tensor | None:
    """An (N, V) buffer for E where it fits the budget, else None."""
    dtype = gradient_operand_dtype(hidden.dtype)
    budget = 4 * head.numel() if memory_budget is None else memory_budget
    if hidden.shape[0] * head.shape[0] * dtype.itemsize > budget:
        return None
    return torch.empty(hidden.shape[0], head.shape[0], dtype=dtype, device=hidden.device)


def _forward_chunk(
    x: Tensor,  # (n, H)
    head: Tensor,
    bias: Tensor | None,
    y: Tensor,  # (n,)
    epilogue: Epilogue,
    out: tuple[Tensor, Tensor, Tensor, Tensor],  # (n,) each: logps, shift, denominator, target_entry
    row_grad: Tensor | None,  # (n, H)
    exps: Tensor | None,  # (n, V)
) -> None:
    """One pass over the vocabulary for a chunk of tokens; writes its results into `out`, `row_grad` and `exps`."""
    logps, shift, denominator, target_entry = out
    target_rows, wide = head[y], widen(x)
    z_y, d_y = _target_logits(wide, target_rows, bias, y, epilogue)
    shift.copy_(z_y)
    total = torch.zeros_like(z_y)
    weighted = None if row_grad is None else torch.zeros(x.shape, dtype=z_y.dtype, device=x.device)
    for part in vocabulary_slices(head.shape[0], x.shape[0]):
        z, derivative = _tile_logits(wide, head, bias, epilogue, part)
        e = _shifted_exps(z, shift, y, part)
        sums = e.sum(1)
        too_large = torch.nonzero(~(sums < MAX_SUM)).flatten()  # ~(<) also catches NaN
        if too_large.numel():
            z = _tile_logits(wide[too_large], head, bias, epilogue, part)[0]
            rescale = _raise_shift(e, sums, shift, too_large, z, y, part)
            total[too_large] *= rescale
            if weighted is not None:
                weighted[too_large] *= rescale[:, None]
            if exps is not None:
                exps[too_large, : part.start] *= rescale[:, None].to(exps.dtype)
        total += sums
        if row_grad is None and exps is None:
            continue
        e = e if derivative is None else e.mul_(derivative)
        operand = e.to(gradient_operand_dtype(x.dtype))
        if weighted is not None:
            weighted += matmul(operand, head[part].to(operand.dtype))
        if exps is not None:
            exps[:, part] = operand

    # With t = z_y - c: logp = t - log(S + e^t), which for the usual t = 0 is -log1p(S).
    t = z_y - shift
    torch.add(total, t.exp(), out=denominator)
    torch.where(t == 0, -total.log1p(), t - denominator.log(), out=logps)
    torch.mul(total, -1.0 if d_y is None else -d_y, out=target_entry)
    if row_grad is not None and weighted is not None:
        # G = (S W[y] - sum_{v != y} E_v W[v]) / (S + e^t), with E and S times the soft-cap's derivative
        weighted.addcmul_(target_entry[:, None], target_rows.to(weighted.dtype))
        row_grad.copy_(weighted.mul_((-epilogue.slope / denominator)[:, None]))
    if exps is not None:
        # 1 - p_y = S / (S + e^t): with -S in the target's place, E / (S + e^t) is exactly p - 1[y].
        exps.scatter_(1, y[:, None], target_entry[:, None].to(exps.dtype))


def _target_logits(
    x: Tensor, target_rows: Tensor, bias: Tensor | None, y: Tensor, epilogue: Epilogue
) -> tuple[Tensor, Tensor | None]:
    """z_y and the soft-cap's derivative there.  (n,), (n,) or None."""
    dtype = statistics_dtype(x.dtype)
    z_y = (x.to(dtype) * target_rows.to(dtype)).sum(1)
    return z_y, epilogue.apply_(z_y, None if bias is None else bias[y].to(dtype))


def _put_at_targets(e: Tensor, y: Tensor, part: slice, values: Tensor) -> Tensor:
    """e[n, y[n]] = values[n] for the targets inside this slice, in place.  (n, v), (n,), (n,)."""
    here = torch.nonzero((y >= part.start) & (y < part.stop)).flatten()
    e[here, y[here] - part.start] = values[here]
    return e


def _shifted_exps(z: Tensor, shift: Tensor, y: Tensor, part: slice) -> Tensor:
    """exp(z - shift) in place, 0 at the targets.  (n, v)."""
    return _put_at_targets(z.sub_(shift[:, None]).exp_(), y, part, torch.zeros_like(shift))


def _tile_logits(
    x: Tensor, head: Tensor, bias: Tensor | None, epilogue: Epilogue, part: slice
) -> tuple[Tensor, Tensor | None]:
    """Logits of one slice of the vocabulary and the soft-cap's derivative.  (n, v)."""
    z = products(x, head[part])
    return z, epilogue.apply_(z, None if bias is None else bias[part].to(z.dtype))


def _raise_shift(
    e: Tensor,  # (n, v), its rows `rows` are formed again in place
    sums: Tensor,  # (n,), likewise
    shift: Tensor,  # (n,), likewise
    rows: Tensor,
    z: Tensor,  # (rows, v) logits
    y: Tensor,
    part: slice,
) -> Tensor:
    """Shift the exponentials of `rows` by this slice's largest logit; returns the factor for what they had before."""
    before, largest = shift[rows], z.amax(1)
    again = _shifted_exps(z, largest, y[rows], part)
    shift[rows], e[rows], sums[rows] = largest, again, again.sum(1)
    return (before - largest).exp()


def _head_grads(
    exps: Tensor,  # (N, V) E with the targets' entries
    small: Tensor | None,  # (N, H) coefficient * hidden, or None: head frozen
    coefficient: Tensor | None,  # (N,), or None: no bias gradient
) -> tuple[Tensor | None, Tensor | None]:
    """E^T (coefficient x) and E^T coefficient.  (V, H), (V,)."""
    d_head = None if small is None else torch.mm(exps.T, small)
    d_bias = None if coefficient is None else torch.mv(exps.T, coefficient.to(exps.dtype))
    return d_head, d_bias


def _recomputed_head_grads(
    hidden: Tensor,  # (N, H)
    targets: Tensor,  # (N,)
    shift: Tensor,  # (N,)
    target_entry: Tensor,  # (N,)
    head: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    epilogue: Epilogue,
    small: Tensor | None,
    coefficient: Tensor | None,
    scale: Tensor,  # 0-d
) -> tuple[Tensor | None, Tensor | None]:
    """scale * `_head_grads` with E formed again, slice by slice of the vocabulary; chunks of tokens add up in fp32."""
    d_head = None if small is None else torch.empty_like(head, memory_format=torch.contiguous_format)
    d_bias = None if coefficient is None else hidden.new_empty(head.shape[0])
    chunks = token_chunks(hidden.shape[0])
    for part in vocabulary_slices(head.shape[0], chunks[0].stop if chunks else 1):
        d_rows = torch.zeros(part.stop - part.start, head.shape[1], dtype=shift.dtype, device=head.device)
        d_part = torch.zeros(part.stop - part.start, dtype=shift.dtype, device=head.device)
        for chunk in chunks:
            z, derivative = _tile_logits(widen(hidden[chunk]), head, bias, epilogue, part)
            e = _shifted_exps(z, shift[chunk], targets[chunk], part)
            e = e if derivative is None else e.mul_(derivative)
            _put_at_targets(e, targets[chunk], part, target_entry[chunk])
            operand = e.to(gradient_operand_dtype(hidden.dtype))
            d_rows_chunk, d_part_chunk = _head_grads(
                operand,
                None if small is None else small[chunk],
                None if coefficient is None else coefficient[chunk],
            )
            if d_rows_chunk is not None:
                d_rows += d_rows_chunk
            if d_part_chunk is not None:
                d_part += d_part_chunk
        if d_head is not None:
            d_head[part] = d_rows.mul_(scale)
        if d_bias is not None:
            d_bias[part] = d_part.mul_(scale)
    return d_head, d_bias


def _power_of_two_above(values: Tensor) -> Tensor:
    """The smallest power of two >= max|values|, 1 where all are 0; a 0-d tensor."""
    largest = values.abs().amax() if values.numel() else values.new_ones(())
    return torch.where(largest > 0, largest.log2().ceil().exp2(), 1.0)
