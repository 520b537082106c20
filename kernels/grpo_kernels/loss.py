"""The GRPO loss in Triton. Formulas and arguments are those of grpo/loss.py.

One pass over the tokens computes the loss, the metrics and the gradient, so the backward pass is only one
multiplication. At sequence level two more kernels add up what the tokens of a completion share. All sums have
a fixed order. Left out: second derivatives.

M tokens, B completions.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo.loss import BOUND, LOWEST, check_options, check_tensors
from grpo_kernels import checks
from grpo_kernels.config import sum_dtype, sum_type
from grpo_kernels.operators import operator

METRICS = ("ratio/mean", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "kl")
BLOCK = 1024  # tokens per program
_BOUND, _LOWEST = tl.constexpr(BOUND), tl.constexpr(LOWEST)  # globals of kernels must be constexpr


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    sequence_ids: Tensor,
    *,
    mask: Tensor | None = None,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.001,
    loss_type: str = "dapo",
    importance_sampling_level: str = "token",
    use_bias_correction_kl: bool = True,
    num_loss_tokens: int | None = None,
    num_sequences: int | None = None,
    max_completion_length: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`grpo.loss.grpo_loss` in Triton: same arguments, results and errors."""
    check_tensors(logprobs, old_logprobs, ref_logprobs, sequence_ids, mask)
    check_options(
        loss_type, importance_sampling_level, epsilon, delta, max_completion_length, beta, ref_logprobs
    )
    checks.same_device(
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        advantages=advantages,
        sequence_ids=sequence_ids,
        mask=mask,
    )
    loss, metrics, _ = loss_forward(
        logprobs,
        old_logprobs,
        ref_logprobs,
        advantages,
        sequence_ids,
        mask,
        epsilon,
        epsilon if epsilon_high is None else epsilon_high,
        delta,
        beta,
        loss_type,
        importance_sampling_level == "sequence",
        use_bias_correction_kl,
        num_loss_tokens,
        num_sequences,
        max_completion_length,
    )
    names = METRICS if ref_logprobs is not None else METRICS[:-1]
    return loss, dict(zip(names, metrics, strict=False))


@triton.jit
def _k3(x, TERMS: tl.constexpr):
    """exp(x) - x - 1. Where |x| < 1 by its series: near 0 the subtraction would leave only rounding."""
    series = x * 0 + 1
    for i in tl.static_range(TERMS):
        series = 1 + series * x / (TERMS + 2 - i)
    return tl.where(tl.abs(x) < 1, x * x / 2 * series, tl.exp(x) - x - 1)


@triton.jit
def _floored(logprob):
    """At least LOWEST. NaN stays NaN, which a maximum could drop."""
    return tl.where(logprob < _LOWEST, _LOWEST, logprob)


@triton.jit
def segment_sum_kernel(
    values, old, order, bounds, out, BLOCK: tl.constexpr, DIFFERENCE: tl.constexpr, ACC: tl.constexpr
):
    """out[b] = sum of values, or of log-probs minus old ones, over the tokens of completion b.

    The order of the sum is fixed.
    """
    b = tl.program_id(0)
    first, stop = tl.load(bounds + b), tl.load(bounds + b + 1)
    total = tl.zeros((BLOCK,), dtype=ACC)
    for start in range(first, stop, BLOCK):
        place = start + tl.arange(0, BLOCK)
        token = tl.load(order + place, mask=place < stop, other=0)
        x = tl.load(values + token, mask=place < stop, other=0.0).to(ACC)
        if DIFFERENCE:
            x = _floored(x) - _floored(tl.load(old + token, mask=place < stop, other=0.0).to(ACC))
        total += x
    tl.store(out + b, tl.sum(total, 0))


@triton.jit
def loss_kernel(
    logprobs, old, ref, advantages, sequence_ids, mask, lengths, sequence_log_ratio, denominator,
    partial, direct, through_ratio, M, blocks,
    EPSILON: tl.constexpr, HIGH: tl.constexpr, DELTA: tl.constexpr, BETA: tl.constexpr,
    CISPO: tl.constexpr, SEQUENCE: tl.constexpr, BIAS_CORRECTION: tl.constexpr, MASKED: tl.constexpr,
    HAS_REF: tl.constexpr, PER_LENGTH: tl.constexpr, TERMS: tl.constexpr,
    BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Loss and metrics of BLOCK tokens, summed into partial (6, blocks), and the gradient of the loss.

    At token level `direct` is the whole gradient. At sequence level all tokens of a completion share one
    ratio. The gradient through it, d(loss) / d(ratio) * ratio, goes to `through_ratio`; two more kernels
    add it up per completion.
    """
    block = tl.program_id(0)
    place = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = place < M
    if MASKED:
        live = live & (tl.load(mask + place, mask=live, other=0) != 0)
    sequence = tl.load(sequence_ids + place, mask=live, other=0)
    A = tl.load(advantages + sequence, mask=live, other=0.0).to(ACC)
    logp = _floored(tl.load(logprobs + place, mask=live, other=0.0).to(ACC))
    log_ratio = logp - _floored(tl.load(old + place, mask=live, other=0.0).to(ACC))
    length = tl.load(lengths + sequence, mask=live, other=1).to(ACC)
    if SEQUENCE:
        log_ratio = tl.load(sequence_log_ratio + sequence, mask=live, other=0.0) / length
    # Values are bounded before exp; the derivatives below take the bounded r and x (see grpo/loss.py).
    log_ratio = tl.where(log_ratio > _BOUND, _BOUND, log_ratio)
    r = tl.exp(tl.where(log_ratio < -_BOUND, -_BOUND, log_ratio))

    # Tensors of type ACC: a Python number would become float32.
    floor = tl.full((BLOCK,), 0 if CISPO else 1 - EPSILON, ACC)
    ceiling = tl.full((BLOCK,), HIGH if CISPO else 1 + HIGH, ACC)
    if CISPO:
        bound = tl.minimum(r, ceiling)
        value, d_logp, d_r = -bound * A * logp, -bound * A, r * 0
        low, high = r < floor, r > ceiling
    else:
        free, clipped = r, tl.minimum(tl.maximum(r, floor), ceiling)
        d_free = A
        if DELTA is not None:
            most = tl.full((BLOCK,), DELTA, ACC)
            free, d_free = tl.minimum(r, most), tl.where(r <= most, A, 0.0)
        d_clipped = tl.where((r >= floor) & (r <= ceiling), A, 0.0)
        a, b = free * A, clipped * A
        value, d_logp = -tl.minimum(a, b), r * 0
        d_r = -tl.where(a < b, d_free, tl.where(b < a, d_clipped, (d_free + d_clipped) / 2))
        low, high = (r < floor) & (A < 0), (r > ceiling) & (A > 0)
    kl = r * 0
    if HAS_REF:
        x = _floored(tl.load(ref + place, mask=live, other=0.0).to(ACC)) - logp
        x = tl.where(x > _BOUND, _BOUND, x)
        k3 = _k3(x, TERMS)
        kl = k3
        d_kl = -(k3 + x)
        if BIAS_CORRECTION:
            kl, d_kl = k3 * r, d_kl * r
            if BETA != 0:
                d_r += BETA * k3
        if BETA != 0:  # else even a reference that is NaN changes only the metric
            value += BETA * kl
            d_logp += BETA * d_kl

    scale = 1 / tl.load(denominator)
    weight = tl.where(live, scale, 0.0)
    if PER_LENGTH:
        weight /= length
    if SEQUENCE:
        tl.store(through_ratio + place, weight * d_r * r, mask=place < M)
    else:
        d_logp += d_r * r
    tl.store(direct + place, tl.where(live, weight * d_logp, 0.0), mask=place < M)
    out = partial + block
    counted = tl.where(live, 1.0, 0.0).to(ACC)
    tl.store(out, tl.sum(tl.where(live, weight * value, 0.0), 0))
    tl.store(out + blocks, tl.sum(tl.where(live, r, 0.0), 0))
    tl.store(out + 2 * blocks, tl.sum(tl.where(low, counted, 0.0), 0))
    tl.store(out + 3 * blocks, tl.sum(tl.where(high, counted, 0.0), 0))
    tl.store(out + 4 * blocks, tl.sum(tl.where(low | high, counted, 0.0), 0))
    tl.store(out + 5 * blocks, tl.sum(tl.where(live, kl, 0.0), 0))


@triton.jit
def spread_kernel(
    direct, through_ratio, sequence_ids, mask, lengths, M,
    MASKED: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """direct += the completion's sum of d(loss) / d(log ratio) / its length: the log ratio is a mean."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = place < M
    if MASKED:
        live = live & (tl.load(mask + place, mask=live, other=0) != 0)
    sequence = tl.load(sequence_ids + place, mask=live, other=0)
    total = tl.load(through_ratio + sequence, mask=live, other=0.0)
    length = tl.load(lengths + sequence, mask=live, other=1).to(ACC)
    gradient = tl.load(direct + place, mask=live, other=0.0)
    tl.store(direct + place, gradient + total / length, mask=live)


@operator("loss_forward")
def loss_forward(
    logprobs: Tensor,
    old: Tensor | None,
    ref: Tensor | None,
    advantages: Tensor,
    sequence_ids: Tensor,
    mask: Tensor | None,
    epsilon: float,
    high: float,
    delta: float | None,
    beta: float,
    loss_type: str,
    sequence_level: bool,
    bias_correction: bool,
    num_loss_tokens: int | None,
    num_sequences: int | None,
    max_completion_length: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """() loss, (5,) metrics, (M,) gradient of the loss with respect to the log-probs."""
    M, B = len(logprobs), len(advantages)
    dtype = sum_dtype(logprobs)
    new: dict[str, Any] = {"dtype": dtype, "device": logprobs.device}
    if M == 0:
        return torch.zeros((), **new), torch.zeros(5, **new), torch.zeros(0, **new)
    logprobs, advantages, sequence_ids = (x.contiguous() for x in (logprobs, advantages, sequence_ids))
    old, ref, mask = (x if x is None else x.contiguous() for x in (old, ref, mask))
    constants = {"BLOCK": BLOCK, "ACC": sum_type(dtype)}
    masked = mask is not None
    live = torch.ones_like(sequence_ids, dtype=torch.bool) if mask is None else mask
    old = logprobs if old is None else old
    per_length = loss_type == "grpo"
    if sequence_level or per_length:
        # Sort tokens by completion, masked tokens last. Completion b has places bounds[b] : bounds[b + 1].
        key, order = torch.where(live, sequence_ids, B).sort(stable=True)
        bounds = torch.searchsorted(key, torch.arange(B + 1, device=key.device))
        lengths = bounds.diff()
    else:
        order = bounds = lengths = torch.zeros(B, dtype=torch.int64, device=logprobs.device)
    log_ratio = torch.zeros(B if sequence_level else 1, **new)
    if sequence_level and B:
        segment_sum_kernel[(B,)](logprobs, old, order, bounds, log_ratio, DIFFERENCE=True, **constants)

    tokens = live.sum().to(dtype) if num_loss_tokens is None else torch.full((), num_loss_tokens, **new)
    tokens = tokens.clamp_min(1)
    sequences = max(1, B if num_sequences is None else num_sequences)
    if per_length or loss_type == "dr_grpo":
        each = 1 if per_length else max_completion_length or 1
        denominator = torch.full((1,), sequences * each, **new)
    else:
        denominator = tokens.view(1)

    blocks = triton.cdiv(M, BLOCK)
    partial = torch.empty(6, blocks, **new)
    gradient = torch.empty(M, **new)
    through_ratio = torch.empty(M if sequence_level else 1, **new)
    loss_kernel[(blocks,)](
        logprobs,
        old,
        logprobs if ref is None else ref,
        advantages,
        sequence_ids,
        live,
        lengths,
        log_ratio,
        denominator,
        partial,
        gradient,
        through_ratio,
        M,
        blocks,
        EPSILON=epsilon,
        HIGH=high,
        DELTA=delta,
        BETA=beta,
        CISPO=loss_type == "cispo",
        SEQUENCE=sequence_level,
        BIAS_CORRECTION=bias_correction,
        MASKED=masked,
        HAS_REF=ref is not None,
        PER_LENGTH=per_length,
        TERMS=18 if dtype == torch.float64 else 11,
        **constants,
    )
    if sequence_level and B:
        shared = torch.zeros(B, **new)
        segment_sum_kernel[(B,)](
            through_ratio, through_ratio, order, bounds, shared, DIFFERENCE=False, **constants
        )
        spread_kernel[(blocks,)](gradient, shared, sequence_ids, live, lengths, M, MASKED=masked, **constants)
    sums = partial.sum(1)
    return sums[0].clone(), sums[1:] / tokens, gradient


@loss_forward.register_fake
def _(logprobs: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    new: dict[str, Any] = {"dtype": sum_dtype(logprobs), "device": logprobs.device}
    return torch.empty((), **new), torch.empty(5, **new), torch.empty(len(logprobs), **new)


@operator("loss_backward")
def loss_backward(grad: Tensor, gradient: Tensor, like: Tensor) -> Tensor:
    return (grad * gradient).to(like.dtype)


@loss_backward.register_fake
def _(grad: Tensor, gradient: Tensor, like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], output[2])
    ctx.mark_non_differentiable(output[1], output[2])


def _gradients(ctx: Any, grad_loss: Tensor, *_: Any) -> Any:
    logprobs, gradient = ctx.saved_tensors
    return loss_backward(grad_loss, gradient, logprobs), *[None] * 15


def _once(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError("grpo_loss is differentiable once, not twice")


loss_forward.register_autograd(_gradients, setup_context=_save)
loss_backward.register_autograd(_once)
