"""Triton kernels for the log-probability and entropy of selected tokens; the formulas are those of
grpo/logprob.py.

Forward: a program takes BLOCK_M rows through one strip of the vocabulary and keeps, per row, the maximum m,
the sum s of exp(z - m), the sum of (z - m) exp(z - m) and the selected logit; a second kernel adds up the
strips. Backward, per chunk of the vocabulary: the logits again, turned into their gradient in registers; then
two products, with W for d(hidden) and with hidden for dW, both summed in float32.

Rows are compacted first: those whose mask is False, and in the backward pass those whose upstream gradient is
0, come last in an index, and programs beyond the count return. The count stays on the device: nothing here
waits for it. No atomics, no autotuning, and no block size depends on M: repeated runs are bit-equal, and a
row's log-prob does not depend on the other rows.

The launchers are custom operators, so that torch.compile takes them whole. M rows, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from grpo.logprob import check_range
from grpo_kernels import checks
from grpo_kernels.config import INTERPRETED, blocks
from grpo_kernels.launch import outputs, refuse_second_derivative, scales, upstream
from grpo_kernels.linear_kernels import (
    combine_kernel,
    forward_kernel,
    gradient_kernel,
    hidden_kernel,
    weight_kernel,
)

STRIP = 4096  # columns per program of the forward pass: 32 programs per block of rows at V 131,072
CHUNK = 4096  # columns whose gradient is in memory at once: 64 MiB at M 8,192 in bfloat16


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    validate: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`grpo.logprob.linear_logprob` in Triton: same arguments, results and errors, with two differences.

    Ids of counted rows are checked only with `validate`, because the check waits for the device; without it
    an id outside [0, V) gives NaN. And the gradient of `weight` is a single product per column, rounded once.
    """
    checks.linear(hidden, weight, ids, mask, temperature, softcap)
    if validate:
        check_range(ids if mask is None else ids[mask], weight.shape[0])
    logprob, entropies, _ = linear_forward(hidden, weight, ids, mask, temperature, softcap, entropy)
    return logprob, entropies if entropy else None


def _live_first(live: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """(M,) row indices, the live ones first and in order; and (1,) how many those are, on the device."""
    if live is None:
        count = torch.full((1,), len(x), dtype=torch.int32, device=x.device)
        return torch.arange(len(x), device=x.device), count
    order = torch.argsort(live.logical_not().to(torch.uint8), stable=True)
    return order, live.sum(dtype=torch.int32).view(1)


@torch.library.custom_op("grpo_kernels::linear_forward", mutates_args=())
def linear_forward(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    temperature: float,
    softcap: float | None,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    logprob, entropies, stats = outputs(hidden, entropy)
    (M, H), V = hidden.shape, weight.shape[0]
    if M == 0:
        return logprob, entropies, stats
    order, count = _live_first(mask, hidden)
    strips = triton.cdiv(V, STRIP)
    partial = torch.empty(4, strips, M, dtype=logprob.dtype, device=hidden.device)
    options = blocks(hidden.dtype, "forward")
    forward_kernel[(triton.cdiv(M, options["BLOCK_M"]) * strips,)](
        hidden,
        weight,
        ids,
        order,
        count,
        partial,
        strips * M,
        M,
        V,
        H,
        *hidden.stride(),
        *weight.stride(),
        STRIP=STRIP,
        ENTROPY=entropy,
        UPCAST=INTERPRETED,
        **scales(temperature, softcap),
        **options,
    )
    size = 256
    combine_kernel[(triton.cdiv(M, size),)](
        partial,
        strips * M,
        ids,
        order,
        count,
        logprob,
        entropies,
        stats,
        M,
        V,
        strips,
        ENTROPY=entropy,
        BLOCK_M=size,
        ACC=options["ACC"],
    )
    return logprob, entropies, stats


@linear_forward.register_fake
def _(
    hidden: Tensor, weight: Tensor, ids: Tensor, mask: Any, temperature: float, softcap: Any, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return outputs(hidden, entropy)


@torch.library.custom_op("grpo_kernels::linear_backward", mutates_args=())
def linear_backward(
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    stats: Tensor,
    temperature: float,
    softcap: float | None,
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor]:
    (M, H), V = hidden.shape, weight.shape[0]
    grad_hidden = hidden.new_zeros(hidden.shape if wants_hidden else 0)
    grad_weight = weight.new_zeros(weight.shape if wants_weight else 0)
    if M == 0 or not (wants_hidden or wants_weight):
        return grad_hidden, grad_weight
    up, up_entropy, live = upstream([grad_logprob, grad_entropy], mask, stats[0])
    order, count = _live_first(live, hidden)
    total = stats.new_zeros(M, H) if wants_hidden else None
    gradient = weight.new_empty(M, CHUNK)
    tile, of_hidden, of_weight = (blocks(hidden.dtype, name) for name in ("gradient", "hidden", "weight"))
    for first in range(0, V, CHUNK):
        stop = min(first + CHUNK, V)
        width = stop - first
        gradient_kernel[(triton.cdiv(M, tile["BLOCK_M"]) * triton.cdiv(width, tile["BLOCK_N"]),)](
            hidden,
            weight,
            ids,
            order,
            count,
            stats,
            up,
            up_entropy,
            gradient,
            M,
            V,
            H,
            first,
            stop,
            *hidden.stride(),
            *weight.stride(),
            CHUNK=CHUNK,
            ENTROPY=grad_entropy is not None,
            UPCAST=INTERPRETED,
            **scales(temperature, softcap),
            **tile,
        )
        if total is not None:
            grid = triton.cdiv(M, of_hidden["BLOCK_M"]) * triton.cdiv(H, of_hidden["BLOCK_N"])
            hidden_kernel[(grid,)](
                gradient,
                weight[first:],
                total,
                count,
                M,
                H,
                width,
                *weight.stride(),
                CHUNK=CHUNK,
                UPCAST=INTERPRETED,
                **of_hidden,
            )
        if wants_weight:
            grid = triton.cdiv(width, of_weight["BLOCK_M"]) * triton.cdiv(H, of_weight["BLOCK_N"])
            weight_kernel[(grid,)](
                gradient,
                hidden,
                order,
                count,
                grad_weight[first:],
                H,
                width,
                *hidden.stride(),
                CHUNK=CHUNK,
                UPCAST=INTERPRETED,
                **of_weight,
            )
    if total is not None:
        grad_hidden[order] = total.to(hidden.dtype)  # beyond the count the total is 0
    return grad_hidden, grad_weight


@linear_backward.register_fake
def _(
    grad_logprob: Any,
    grad_entropy: Any,
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    mask: Any,
    stats: Tensor,
    temperature: float,
    softcap: Any,
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape if wants_hidden else 0), weight.new_empty(
        weight.shape if wants_weight else 0
    )


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, ids, mask, *ctx.options, ctx.entropy = inputs
    ctx.save_for_backward(hidden, weight, ids, mask, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _linear_gradients(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None, _: Any) -> Any:
    hidden, weight, ids, mask, stats = ctx.saved_tensors
    wants = list(ctx.needs_input_grad[:2])
    grad_entropy = grad_entropy if ctx.entropy else None  # without, that output had no elements
    grads = linear_backward(
        grad_logprob, grad_entropy, hidden, weight, ids, mask, stats, *ctx.options, *wants
    )
    return *(grad if wanted else None for grad, wanted in zip(grads, wants, strict=True)), *[None] * 5


linear_forward.register_autograd(_linear_gradients, setup_context=_save_linear)
linear_backward.register_autograd(refuse_second_derivative)
