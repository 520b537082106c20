"""Log-probability and entropy of selected tokens from given logits, in Triton; formulas: grpo/logprob.py.

One program per row reads it once forward; backward, one program per block of columns. A custom operator, so
that torch.compile takes it whole.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from grpo.logprob import check_range
from grpo_kernels import checks
from grpo_kernels.config import INTERPRETED, sum_type
from grpo_kernels.launch import outputs, refuse_second_derivative, scales, upstream
from grpo_kernels.selected_kernels import selected_backward_kernel, selected_forward_kernel

WIDTH = 64 if INTERPRETED else 4096  # columns per step


def selected_logprob(
    logits: Tensor,
    ids: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    validate: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`grpo.logprob.selected_logprob` in Triton; `validate` as in `linear_logprob`."""
    checks.selected(logits, ids, mask, temperature, softcap)
    if validate:
        check_range(ids if mask is None else ids[mask], logits.shape[1])
    logprob, entropies, _ = selected_forward(logits, ids, mask, temperature, softcap, entropy)
    return logprob, entropies if entropy else None


@torch.library.custom_op("grpo_kernels::selected_forward", mutates_args=())
def selected_forward(
    logits: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    temperature: float,
    softcap: float | None,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    logprob, entropies, stats = outputs(logits, entropy)
    M, V = logits.shape
    if M:
        selected_forward_kernel[(M,)](
            logits,
            ids,
            _keep(mask, logits),
            logprob,
            entropies,
            stats,
            M,
            V,
            *logits.stride(),
            ENTROPY=entropy,
            BLOCK_N=WIDTH,
            ACC=sum_type(logits.dtype),
            num_warps=8,
            **scales(temperature, softcap),
        )
    return logprob, entropies, stats


@selected_forward.register_fake
def _(
    logits: Tensor, ids: Tensor, mask: Any, temperature: float, softcap: Any, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return outputs(logits, entropy)


@torch.library.custom_op("grpo_kernels::selected_backward", mutates_args=())
def selected_backward(
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    stats: Tensor,
    temperature: float,
    softcap: float | None,
) -> Tensor:
    M, V = logits.shape
    gradient = torch.empty(M, V, dtype=logits.dtype, device=logits.device)
    if M == 0:
        return gradient
    up, up_entropy, live = upstream([grad_logprob, grad_entropy], mask, stats[0])
    selected_backward_kernel[(M * triton.cdiv(V, WIDTH),)](
        logits,
        ids,
        _keep(live, logits),
        stats,
        up,
        up_entropy,
        gradient,
        M,
        V,
        *logits.stride(),
        ENTROPY=grad_entropy is not None,
        BLOCK_N=WIDTH,
        ACC=sum_type(logits.dtype),
        num_warps=8,
        **scales(temperature, softcap),
    )
    return gradient


@selected_backward.register_fake
def _(
    grad_logprob: Any,
    grad_entropy: Any,
    logits: Tensor,
    ids: Tensor,
    mask: Any,
    stats: Tensor,
    temperature: float,
    softcap: Any,
) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _keep(mask: Tensor | None, x: Tensor) -> Tensor:
    if mask is None:
        return torch.ones(len(x), dtype=torch.uint8, device=x.device)
    return mask.to(torch.uint8)


def _save_selected(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, ids, mask, *ctx.options, ctx.entropy = inputs
    ctx.save_for_backward(logits, ids, mask, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _selected_gradients(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None, _: Any) -> Any:
    logits, ids, mask, stats = ctx.saved_tensors
    grad_entropy = grad_entropy if ctx.entropy else None
    return selected_backward(grad_logprob, grad_entropy, logits, ids, mask, stats, *ctx.options), *[None] * 5


selected_forward.register_autograd(_selected_gradients, setup_context=_save_selected)
selected_backward.register_autograd(refuse_second_derivative)
