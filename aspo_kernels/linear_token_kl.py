"""The KL divergence of the policy from the reference at every token, over the whole vocabulary, without logits.

With p and p_ref the two softmax distributions over the vocabulary at a token,

    kl = KL(p_ref || p) = sum_v p_ref (log p_ref - log p)        d kl / d z = p - p_ref        d logp / d z = 1[y] - p

What one pass over both heads sums, with a shift c and c_ref for each (the target's logit, or the largest one so far),
u = z - c, E = exp(u), R = exp(u_ref), and the target left out of S, S_ref and M, t = u_y:

    M  = sum_{v != y} R_v (u_ref - u)        Z  = S + e^t
    dS = sum_{v != y} (R_v - E_v)            dZ = Z_ref - Z = dS + e^{t_ref} - e^t
    kl = (M + e^{t_ref} (t_ref - t)) / Z_ref - log(Z_ref / Z),        log(Z_ref / Z) = log1p(dZ / Z)

All of it is exactly 0 where both agree, and vanishes as both become certain of the target. dS is summed, since the
rounding of two logarithms of size 10 would be that of a token's whole divergence early in a training; what remains is
the rounding of R and E, which is 1e-7 over many tokens of the vocabulary. Shifts raised by a = c' - c and a_ref turn,
with r = e^{-a} and r_ref = e^{-a_ref},

    M into r_ref (M + (a - a_ref) S_ref)        dS into r_ref dS + (r_ref - r) S

With a frozen head the forward also forms, from A = sum E d W and B = sum (R - E) d W (d the soft-cap's derivative, the
policy's, and W the policy's),

    G = d logp / d x = -slope A / Z        D = d kl / d x = -slope (B - A dZ / Z) / Z_ref

with the target's rows, -S d_y W[y] in A and -dS d_y W[y] in B; the backward is g_logp G + g_kl D. B goes through raised
shifts as dS does. R - E is rounded after the subtraction, so that D keeps its digits where the policy has hardly left
the reference.

Passes over the head (2 N H V FLOP, the reference's counted as the policy's): 2u without gradients; frozen head 4u, the
backward without the head; trainable head 2u, and in the backward both z again and dX and dW, 4u. Axes: as in `tiles`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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
from aspo_kernels.head import head_ops
from aspo_kernels.recompute import gradient_outputs, log_total, pull_back, stats_ops, whole_head
from aspo_kernels.tiles import (
    Chunk,
    Epilogue,
    Head,
    cast_for_autocast,
    gradient_operand_dtype,
    op_context,
    statistics_dtype,
    tile_size,
    token_chunks,
    vocabulary_slices,
    widen,
)
from aspo_kernels.vocabulary import gather_if_frozen


class TokenKL(NamedTuple):
    """One fp32 number a token, (N,) each."""

    kl: Tensor  # nats
    logps: Tensor
    ref_logps: Tensor  # carries no gradient


def linear_token_kl(
    hidden: Tensor,
    ref_hidden: Tensor,
    head: Tensor,
    ref_head: Tensor | None,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
    validate: bool = False,
) -> TokenKL:
    """`kl = (p_ref * (log p_ref - log p)).sum(-1)` of two softmax distributions over the vocabulary, without logits.

    TDPO (arXiv 2404.11999) sums it over a response, once with gradient (rejected) and once without (chosen):
    `segment_sum(out.kl, ...)`, and `.detach()` of it where it is to carry none. Under torch.no_grad(), or where nothing
    requires a gradient, none is prepared.

    Args:
        hidden, ref_hidden: (N, H) and (N, H_ref) fp32, bf16 or fp16 (fp64 stays fp64): policy and reference at the same
            counted tokens. N = 0 is fine. No gradient reaches the reference.
        head, ref_head: (V, H) and (V, H_ref), each of its hidden states' dtype and device; None = head and bias as they
            are, without gradient. Under autocast all are cast to autocast's dtype.
        targets: (N,) int64 in [0, V).
        bias, ref_bias, logit_scale, softcap, temperature: z = cap(logit_scale * (x W^T + bias)) / temperature with
            cap(z) = softcap * tanh(z / softcap); each head has its own bias (V,), -inf for a token that is masked. A
            token that the policy masks and the reference does not makes the divergence inf.
        backend: "auto" | "torch" | "triton" | "reference" (full logits, for comparison).
        validate: check targets' contents on an accelerator too (waits for the device).

    Returns:
        TokenKL, kl and logps differentiable once in hidden, head and bias. kl is 0 where policy and reference agree;
        where they nearly do, rounding may make it negative, by less than 1e-7.

    Raises:
        ValueError: wrong shapes, dtypes, devices or options; on the CPU also a target outside [0, V) or a
            log-probability that is not finite.
    """
    if ref_head is None and ref_bias is not None:
        raise ValueError("ref_bias is the bias of ref_head: give both, or neither for the policy's own")
    hidden, ref_hidden, head, ref_head, bias, ref_bias = cast_for_autocast(  # type: ignore[assignment]
        hidden.device.type, hidden, ref_hidden, head, ref_head, bias, ref_bias
    )
    head, bias = gather_if_frozen("head", head), gather_if_frozen("bias", bias)
    check_head(hidden, head, bias)
    if ref_head is None:
        ref_head, ref_bias = head, bias
    ref_head = gather_if_frozen("ref_head", ref_head.detach())
    ref_bias = gather_if_frozen("ref_bias", ref_bias if ref_bias is None else ref_bias.detach())
    check_head(ref_hidden, ref_head, ref_bias, "ref_hidden")
    _check_pair(hidden, ref_hidden, head, ref_head)
    check_targets(targets, hidden.shape[0], head.shape[0], hidden.device, validate)
    epilogue = Epilogue(logit_scale, softcap, temperature)
    backend = check_backend(backend, hidden)
    ref_hidden, ref_head = ref_hidden.detach(), ref_head.detach()
    ref_bias = ref_bias if ref_bias is None else ref_bias.detach()
    with torch.autocast(hidden.device.type, enabled=False):
        operands = (hidden, ref_hidden, head, ref_head, targets, bias, ref_bias)
        if backend == "reference":
            dtype = statistics_dtype(hidden.dtype)
            wide = (t if t is None or t is targets else t.to(dtype) for t in operands)
            outputs = reference.linear_token_kl(*wide, **epilogue.options)  # type: ignore[arg-type]
        else:
            trainable = head.requires_grad or (bias is not None and bias.requires_grad)
            row_grads = torch.is_grad_enabled() and hidden.requires_grad and not trainable
            outputs = _linear_token_kl(
                *operands, epilogue.logit_scale, epilogue.softcap, epilogue.temperature, backend, row_grads
            )[:3]
    check_finite_logps(outputs[1], targets)
    check_finite_logps(outputs[2], targets)
    return TokenKL(*outputs)


def _check_pair(hidden: Tensor, ref_hidden: Tensor, head: Tensor, ref_head: Tensor) -> None:
    """That policy and reference have the same tokens, vocabulary and device."""
    if hidden.shape[0] != ref_hidden.shape[0] or head.shape[0] != ref_head.shape[0]:
        raise ValueError(
            f"policy and reference must have the same tokens and vocabulary, got {hidden.shape[0]} and "
            f"{ref_hidden.shape[0]} hidden states, heads of {head.shape[0]} and {ref_head.shape[0]} rows"
        )
    if hidden.device != ref_hidden.device:
        raise ValueError(f"hidden is on {hidden.device} but ref_hidden on {ref_hidden.device}")


@torch.library.custom_op("aspo_kernels::linear_token_kl", mutates_args=())
def _linear_token_kl(
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
    head, ref_head = whole_head(weight, bias, epilogue), whole_head(ref_weight, ref_bias, epilogue)
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
    a.addcmul_(rows, -chunk.total[:n, None])
    b.addcmul_(rows, -rival_difference[:, None])
    g = a.mul_((-head.epilogue.slope / z)[:, None])
    logp_grad.copy_(g)
    kl_grad.copy_(b.mul_((-head.epilogue.slope / ref_z)[:, None]).addcmul_(g, -(difference / ref_z)[:, None]))


def _outputs(hidden: Tensor, row_grads: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype, tokens = statistics_dtype(hidden.dtype), hidden.shape[0]
    kl, logps, ref_logps = (hidden.new_empty(tokens, dtype=dtype) for _ in range(3))
    # fp16 cannot hold their small rows before the upstream gradient, with its loss scale, has multiplied them
    shape, narrow = hidden.shape if row_grads else (0,), gradient_operand_dtype(hidden.dtype)
    logp_grad, kl_grad = (hidden.new_empty(shape, dtype=narrow) for _ in range(2))
    return kl, logps, ref_logps, logp_grad, kl_grad, hidden.new_empty(6, tokens, dtype=dtype)


@_linear_token_kl.register_fake
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


_linear_token_kl.register_autograd(_backward, setup_context=_save)


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
    head, ref_head = whole_head(weight, bias, epilogue), whole_head(ref_weight, ref_bias, epilogue)
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
