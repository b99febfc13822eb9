"""The custom operators of `linear_token_kl`: two heads side by side, slice by slice, and the gradients of that.

The equations, and the names in them, are `linear_token_kl`'s; what happens to a tile is in `torch_stats` and
`triton_stats`. Axes: N tokens, V vocabulary, H hidden of the policy, H_ref of the reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aspo_kernels.checks import refuse_double_backward
from aspo_kernels.head import head_ops
from aspo_kernels.recompute import gradient_outputs, log_total, pull_back, stats_ops
from aspo_kernels.tiles import (
    Chunk,
    Epilogue,
    Head,
    gradient_operand_dtype,
    op_context,
    statistics_dtype,
    tile_size,
    token_chunks,
    vocabulary_slices,
    widen,
)


@torch.library.custom_op("aspo_kernels::linear_token_kl", mutates_args=())
def head_token_kl(
    hidden: Tensor,  # (N, H)
    ref_hidden: Tensor,  # (N, H_ref)
    weight: Tensor,  # (V, H)
    ref_weight: Tensor,  # (V, H_ref)
    targets: Tensor,  # (N,)
    bias: Tensor | None,  # (V,)
    ref_bias: Tensor | None,  # (V,)
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    backend: str,
    row_grads: bool,  # whether G and D are formed
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """kl, logps, ref_logps (N,), G, D (N, H) or empty, and for the backward (6, N): `_row_statistics`."""
    epilogue = Epilogue(logit_scale, softcap, temperature)
    head, ref_head = Head(weight, bias, None, epilogue), Head(ref_weight, ref_bias, None, epilogue)
    kl, logps, ref_logps, logp_grad, kl_grad, statistics = outputs = _outputs(hidden, row_grads)
    y, size, ops = targets.contiguous(), tile_size(hidden), head_ops(backend)
    operand_dtype = ops.operand_dtype(hidden.dtype, False) if row_grads else None
    with op_context(hidden):
        for part in token_chunks(hidden.shape[0], max(1, size.tokens // 2)):
            x, ref_x = widen(hidden[part]), widen(ref_hidden[part])
            chunk = _start_pair(ops.start(x, y[part], head), ops.start(ref_x, y[part], ref_head))
            n = x.shape[0]
            extra = chunk.z_y.new_zeros(2, n)
            if row_grads:
                chunk.weighted = chunk.z_y.new_zeros(2 * n, hidden.shape[1])
            for columns in vocabulary_slices(head.size, 2 * n, size):
                # Two products of one shape each, so that what is equal in them comes out equal.
                z, ref_z = head.products(x, columns), ref_head.products(ref_x, columns)
                operand = stats_ops(backend).add_pair_(chunk, extra, z, ref_z, head, ref_head, columns, operand_dtype)
                if chunk.weighted is not None:
                    head.pull_back_(chunk.weighted, operand, columns)
            both, shift, denominator, _ = ops.finish(chunk, head, None)
            logps[part], ref_logps[part] = both[:n], both[n:]
            log_z = log_total(both, chunk.z_y, shift, denominator)
            kl[part], difference = _divergence(chunk.z_y - shift, extra, denominator, log_z)
            statistics[:, part] = torch.cat([shift.view(2, n), log_z.view(2, n), both.view(2, n)])
            if row_grads:
                _write_row_grads(chunk, head, denominator, extra[1], difference, logp_grad[part], kl_grad[part])
    return outputs


def _start_pair(policy: Chunk, ref: Chunk) -> Chunk:
    """The policy's n rows and the reference's n rows as one chunk of 2n; their hidden states stay apart."""
    y, z_y = torch.cat([policy.y, ref.y]), torch.cat([policy.z_y, ref.z_y])
    return Chunk(policy.x, y, z_y, torch.cat([policy.sums, ref.sums], 1))


def _divergence(t: Tensor, extra: Tensor, denominator: Tensor, log_z: Tensor) -> tuple[Tensor, Tensor]:
    """kl and dZ from t, Z and log Z of policy and reference.  (2n,), (2, n), (2n,), (2n,) -> (n,), (n,)."""
    (t, ref_t), (z, ref_z), (log_z, ref_log_z) = (x.view(2, -1) for x in (t, denominator, log_z))
    moment, difference = extra
    difference = difference + (ref_t.exp() - t.exp())
    # log1p loses digits towards -1, where the two are far apart and the plain difference has them
    log_ratio = torch.where(difference.abs() < z / 2, torch.log1p(difference / z), ref_log_z - log_z)
    return (moment + ref_t.exp() * (ref_t - t)) / ref_z - log_ratio, difference


def _write_row_grads(
    chunk: Chunk,
    head: Head,
    denominator: Tensor,  # (2n,)
    rival_difference: Tensor,  # (n,) dS
    difference: Tensor,  # (n,) dZ
    logp_grad: Tensor,  # (n, H)
    kl_grad: Tensor,  # (n, H)
) -> None:
    """G and D of a chunk whose sums are complete."""
    assert chunk.weighted is not None
    n = logp_grad.shape[0]
    a, b = chunk.weighted.view(2, n, -1)
    z, ref_z = denominator.view(2, n)
    derivative = head.epilogue.derivative(chunk.z_y[:n])
    rows = head.rows(chunk.y[:n]).to(a.dtype)
    rows = rows if derivative is None else rows * derivative[:, None]
    scale, slope = chunk.scale, head.epilogue.slope / chunk.scale
    a.addcmul_(rows, -scale * chunk.total[:n, None])
    b.addcmul_(rows, -scale * rival_difference[:, None])
    g = a.mul_((-slope / z)[:, None])
    logp_grad.copy_(g)
    kl_grad.copy_(b.mul_((-slope / ref_z)[:, None]).addcmul_(g, -(difference / ref_z)[:, None]))


def _outputs(hidden: Tensor, row_grads: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype, tokens = statistics_dtype(hidden.dtype), hidden.shape[0]
    kl, logps, ref_logps = (hidden.new_empty(tokens, dtype=dtype) for _ in range(3))
    # fp16 cannot hold their small rows before the upstream gradient, with its loss scale, has multiplied them
    shape, narrow = hidden.shape if row_grads else (0,), gradient_operand_dtype(hidden.dtype)
    logp_grad, kl_grad = (hidden.new_empty(shape, dtype=narrow) for _ in range(2))
    return kl, logps, ref_logps, logp_grad, kl_grad, hidden.new_empty(6, tokens, dtype=dtype)


@head_token_kl.register_fake
def _(
    hidden: Tensor, ref_hidden: Tensor, weight: Tensor, ref_weight: Tensor, targets: Tensor, bias: Tensor | None,
    ref_bias: Tensor | None, logit_scale: float, softcap: float | None, temperature: float, backend: str,
    row_grads: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _outputs(hidden, row_grads)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *operands, ctx.row_grads = inputs
    ctx.options = operands[7:]
    _, _, ref_logps, logp_grad, kl_grad, statistics = output
    ctx.mark_non_differentiable(ref_logps, logp_grad, kl_grad, statistics)
    ctx.set_materialize_grads(False)
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(*((logp_grad, kl_grad) if ctx.row_grads else (*operands[:7], statistics)))


def _backward(ctx: Any, grad_kl: Tensor | None, grad_logps: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    refuse_double_backward("linear_token_kl")
    grads: list[Tensor | None] = [None] * 12
    if grad_kl is None and grad_logps is None:
        return tuple(grads)
    if ctx.row_grads:
        grads[0] = _sum_of_rows(grad_kl, grad_logps, *ctx.saved_tensors, ctx.dtype)
        return tuple(grads)
    at = (0, 2, 5)  # hidden, weight, bias
    needs = [ctx.needs_input_grad[k] for k in at]
    for k, needed, grad in zip(
        at, needs, _token_kl_grads(grad_kl, grad_logps, *ctx.saved_tensors, *needs, *ctx.options), strict=True
    ):
        grads[k] = grad if needed else None
    return tuple(grads)


head_token_kl.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("aspo_kernels::token_kl_rows", mutates_args=())
def _sum_of_rows(
    grad_kl: Tensor | None, grad_logps: Tensor | None, logp_grad: Tensor, kl_grad: Tensor, dtype: torch.dtype
) -> Tensor:
    """g_logp G + g_kl D in `dtype`.  (N,), (N,), (N, H), (N, H) -> (N, H)."""
    out = torch.empty_like(logp_grad, dtype=dtype)
    given = [(g, rows) for g, rows in ((grad_logps, logp_grad), (grad_kl, kl_grad)) if g is not None]
    for part in token_chunks(out.shape[0]):  # the fp32 product of a bf16 row and its g is a copy
        out[part] = sum(rows[part] * g[part, None] for g, rows in given)
    return out


@_sum_of_rows.register_fake
def _(
    grad_kl: Tensor | None, grad_logps: Tensor | None, logp_grad: Tensor, kl_grad: Tensor, dtype: torch.dtype
) -> Tensor:
    return torch.empty_like(logp_grad, dtype=dtype)


@torch.library.custom_op("aspo_kernels::linear_token_kl_grads", mutates_args=())
def _token_kl_grads(
    grad_kl: Tensor | None,  # (N,)
    grad_logps: Tensor | None,  # (N,)
    hidden: Tensor,
    ref_hidden: Tensor,
    weight: Tensor,
    ref_weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    statistics: Tensor,  # (6, N) shifts, log Z and log-probabilities, of policy and reference each
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden (N, H), weight (V, H) and bias (V,); empty where not needed."""
    epilogue = Epilogue(logit_scale, softcap, temperature)
    head, ref_head = Head(weight, bias, None, epilogue), Head(ref_weight, ref_bias, None, epilogue)
    shift, ref_shift, log_z, ref_log_z, logps, ref_logps = statistics
    g_kl, g_logp = (torch.zeros_like(logps) if g is None else g for g in (grad_kl, grad_logps))
    # dz = g_kl (p - p_ref) + g_logp (1[y] - p); at the target from the log-probabilities, exact as both p_y near 1
    entry = g_kl * (logps.expm1() - ref_logps.expm1()) - g_logp * logps.expm1()
    coefficients = torch.stack(
        [shift, log_z, ref_shift, ref_log_z, *(epilogue.slope * r for r in (g_kl, g_logp, entry))]
    )
    y, write_pair_grad = targets.contiguous(), stats_ops(backend).write_pair_grad

    def write_tile(tokens: slice, columns: slice, out: Tensor) -> None:
        z, ref_z = (h.products(widen(x[tokens]), columns) for h, x in ((head, hidden), (ref_head, ref_hidden)))
        write_pair_grad(z, ref_z, y[tokens], head, ref_head, columns, coefficients[:, tokens], out)

    with op_context(hidden):
        return pull_back(hidden, head, (needs_hidden, needs_weight, needs_bias), write_tile)


@_token_kl_grads.register_fake
def _(
    grad_kl: Tensor | None, grad_logps: Tensor | None, hidden: Tensor, ref_hidden: Tensor, weight: Tensor,
    ref_weight: Tensor, targets: Tensor, bias: Tensor | None, ref_bias: Tensor | None, statistics: Tensor,
    needs_hidden: bool, needs_weight: bool, needs_bias: bool, logit_scale: float, softcap: float | None,
    temperature: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return gradient_outputs(hidden, weight, needs_hidden, needs_weight, needs_bias)
