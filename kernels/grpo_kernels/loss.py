"""The GRPO loss in Triton; formulas and arguments are those of grpo/loss.py.

One pass over the tokens yields the loss, the metrics and the gradient, so that the backward pass is one
product. At sequence level two more passes add up what the tokens of a completion share. Sums are made in a
fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from grpo.loss import check_options, check_tensors
from grpo_kernels import checks
from grpo_kernels.config import sum_type
from grpo_kernels.launch import sum_dtype
from grpo_kernels.loss_kernels import loss_kernel, segment_sum_kernel, spread_kernel

METRICS = ("ratio/mean", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "kl")
BLOCK = 1024


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


@torch.library.custom_op("grpo_kernels::loss_forward", mutates_args=())
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
    """() loss, (5,) metrics, (M,) gradient of the loss by the log-probs."""
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
        # Tokens by completion; bounds[b] to bounds[b + 1] are those of completion b, the masked ones last.
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
    new: dict[str, Any] = {
        "dtype": sum_dtype(logprobs),
        "device": logprobs.device,
    }
    return torch.empty((), **new), torch.empty(5, **new), torch.empty(len(logprobs), **new)


@torch.library.custom_op("grpo_kernels::loss_backward", mutates_args=())
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
