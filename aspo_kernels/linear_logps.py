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
Derivations: docs/math.md. Axes: N tokens, V vocabulary, H hidden; n, m, v a tile's part of them (`tiles`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from aspo_kernels import reference
from aspo_kernels.checks import check_backend, check_finite_logps, check_head, check_lora, check_targets
from aspo_kernels.head import head_logps
from aspo_kernels.tiles import Epilogue, cast_for_autocast, gradient_operand_dtype, statistics_dtype
from aspo_kernels.vocabulary import VocabularyShard, gather_if_frozen

Lora = tuple[Tensor, Tensor, float]  # A (r, H), B (V, r), scaling


def linear_logps(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    lora: Lora | None = None,
    vocabulary: VocabularyShard | None = None,
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
        lora: (A, B, scaling) of a LoRA on the head, A (r, H) and B (V, r): z = x (W + scaling B A)^T + ..., exactly,
            without its dropout; A, B and W get the gradients that they require.
        vocabulary: which rows of the whole head `head` (with bias and B) holds, for a head that is spread over
            processes; every process gives the same hidden and targets and gets the same result.
        backend: "auto" | "torch" | "triton" | "reference" (full logits, for comparison).
        memory_budget: bytes that a trainable head may hold from forward to backward to spare a recompute; None =
            4 V H, the size of an fp32 gradient of the head. (Under torch.compile N's crossing of it is one recompile.)
        validate: check targets' contents on an accelerator too (waits for the device). Without it a negative
            target such as -100 gives NaN there, in its token's numbers and in every gradient that they reach; one of
            V or more stops at torch's device assertion.

    Returns:
        (N,) fp32 log-probabilities, differentiable once in hidden, head, bias, A and B.

    Raises:
        ValueError: wrong shapes, dtypes, devices or options; on the CPU also a target outside [0, V) or a result
            that is not finite.
    """
    return policy_and_reference_logps(
        hidden, None, head, targets, bias, Epilogue(logit_scale, softcap, temperature), lora, vocabulary, backend,
        memory_budget, validate,
    )[0]  # fmt: skip


def linear_logps_pair(
    hidden: Tensor,
    ref_hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    vocabulary: VocabularyShard | None = None,
    backend: str = "auto",
    memory_budget: int | None = None,
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    """`linear_logps(hidden, head, targets), linear_logps(ref_hidden.detach(), head.detach(), targets)` in one pass.

    For a policy and a reference with one output head, as where adapters sit on the trunk alone: each slice of the head
    is read once for both. Where the reference's head is another one (the policy's has a LoRA, or has been trained away
    from it) call `linear_logps` twice.

    Args:
        hidden, ref_hidden: (N, H), policy and reference at the same counted tokens, of one dtype and device. N = 0 is
            fine.
        The others: as in `linear_logps`.

    Returns:
        (N,) fp32 log-probabilities of the policy, differentiable once in hidden, head and bias; and (N,) fp32 of the
        reference, which carry no gradient.

    Raises:
        ValueError: as `linear_logps`, and where ref_hidden is not shaped like hidden.
    """
    logps, ref_logps = policy_and_reference_logps(
        hidden, ref_hidden, head, targets, bias, Epilogue(logit_scale, softcap, temperature), None, vocabulary,
        backend, memory_budget, validate,
    )  # fmt: skip
    assert ref_logps is not None
    return logps, ref_logps


def policy_and_reference_logps(
    hidden: Tensor,
    ref_hidden: Tensor | None,
    head: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    epilogue: Epilogue,
    lora: Lora | None,
    vocabulary: VocabularyShard | None,
    backend: str,
    memory_budget: int | None,
    validate: bool,
) -> tuple[Tensor, Tensor | None]:
    """`linear_logps` of the policy's hidden states, and of the reference's through the same head in the same pass.

    ref_hidden: (N, H) or None; no gradient reaches it. Its rows are stacked on the policy's, chunk by chunk, so that
    each slice of the head is read once for both. Returns (N,) and (N,) or None.
    """
    if lora is not None and len(lora) != 3:
        raise ValueError(f"lora must be (A, B, scaling), got {len(lora)} entries; scaling is lora_alpha / r")
    lora_a, lora_b, scaling = (None, None, 0.0) if lora is None else lora
    hidden, head, bias, ref_hidden, lora_a, lora_b = cast_for_autocast(  # type: ignore[assignment]
        hidden.device.type, hidden, head, bias, ref_hidden, lora_a, lora_b
    )
    if vocabulary is not None:
        vocabulary.check(head, validate)
    head, bias = gather_if_frozen("head", head), gather_if_frozen("bias", bias)
    lora_a, lora_b = gather_if_frozen("lora's A", lora_a), gather_if_frozen("lora's B", lora_b)
    check_head(hidden, head, bias)
    if ref_hidden is not None:
        check_head(ref_hidden, head, bias, "ref_hidden")
        if ref_hidden.shape != hidden.shape:
            raise ValueError(
                f"hidden is {tuple(hidden.shape)} but ref_hidden {tuple(ref_hidden.shape)}: give the policy's and the "
                "reference's hidden states at the same tokens"
            )
    check_lora(hidden, head, lora_a, lora_b, scaling)
    check_targets(targets, hidden.shape[0], vocabulary.size if vocabulary else head.shape[0], hidden.device, validate)
    if memory_budget is not None and memory_budget < 0:
        raise ValueError(f"memory_budget is {memory_budget} bytes; it must not be negative")
    backend = check_backend(backend, hidden)
    if vocabulary is not None:  # a process sees by the sign alone that nobody has such a target
        targets = targets.masked_fill(targets >= vocabulary.size, -1)
    with torch.autocast(hidden.device.type, enabled=False):
        if lora_a is not None:
            hidden = torch.cat([hidden, scaling * (hidden @ lora_a.T)], 1)
            if ref_hidden is not None:
                ref_hidden = torch.cat([ref_hidden, scaling * (ref_hidden @ lora_a.T)], 1)
        ref_hidden = ref_hidden if ref_hidden is None else ref_hidden.detach()
        if backend == "reference":
            logps, ref_logps = _from_full_logits(hidden, ref_hidden, head, lora_b, targets, bias, epilogue, vocabulary)
        else:
            trainable = [t for t in (head, bias, lora_b) if t is not None and t.requires_grad]
            grad = torch.is_grad_enabled()
            budget = 4 * head.numel() if memory_budget is None else memory_budget
            entry_bytes = gradient_operand_dtype(hidden.dtype).itemsize
            fits = hidden.shape[0] * head.shape[0] * entry_bytes <= budget if grad and trainable else False
            keep = "nothing" if not grad or not trainable else "exps" if fits else "inputs"
            logps, ref_logps, *_ = head_logps(
                hidden, ref_hidden, head, bias, lora_b, targets,
                epilogue.logit_scale, epilogue.softcap, epilogue.temperature, backend,
                grad and hidden.requires_grad, keep,
                vocabulary.start if vocabulary else 0, vocabulary.group_name if vocabulary else None,
            )  # fmt: skip
    check_finite_logps(logps, targets)
    check_finite_logps(ref_logps, targets)
    return logps, None if ref_hidden is None else ref_logps


def _from_full_logits(
    hidden: Tensor,
    ref_hidden: Tensor | None,
    head: Tensor,
    lora_b: Tensor | None,
    targets: Tensor,
    bias: Tensor | None,
    epilogue: Epilogue,
    vocabulary: VocabularyShard | None,
) -> tuple[Tensor, Tensor]:
    """The same by `reference`, in fp32 (fp64 for fp64)."""
    if vocabulary is not None:
        raise ValueError("backend='reference' takes a whole head; gather it, or use backend='torch'")
    dtype = statistics_dtype(hidden.dtype)
    wide = (head if lora_b is None else torch.cat([head, lora_b], 1)).to(dtype)
    bias = bias if bias is None else bias.to(dtype)
    logps, ref_logps = (
        hidden.new_empty(0, dtype=dtype)
        if x is None
        else reference.linear_logps(x.to(dtype), wide, targets, bias, **epilogue.options)
        for x in (hidden, ref_hidden)
    )
    return logps, ref_logps.detach()
