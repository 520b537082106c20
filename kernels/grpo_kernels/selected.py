"""Log-probability and entropy of selected tokens from given logits, in Triton.

The formulas are those of grpo/logprob.py. Forward, one program per row reads the row once. Backward, there is
one program per row and block of columns. The launchers are custom operators, so torch.compile does not look
inside them. Left out: second derivatives.

M rows, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo.logprob import check_range
from grpo_kernels import checks
from grpo_kernels.config import INTERPRETED, sum_type
from grpo_kernels.operators import operator
from grpo_kernels.softmax import (
    empty_sums,
    gradient_of,
    load_row,
    online,
    outputs,
    refuse_second_derivative,
    scales,
    store_row,
    transformed,
    upstream,
)

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
    """`grpo.logprob.selected_logprob` in Triton. `validate`: see `grpo_kernels.linear.linear_logprob`."""
    checks.selected(logits, ids, mask, temperature, softcap)
    if validate:
        check_range(ids if mask is None else ids[mask], logits.shape[1])
    logprob, entropies, _ = selected_forward(logits, ids, mask, temperature, softcap, entropy)
    return logprob, entropies if entropy else None


def _keep(mask: Tensor | None, x: Tensor) -> Tensor:
    """(M,) uint8, 1 in the rows to compute."""
    if mask is None:
        return torch.ones(len(x), dtype=torch.uint8, device=x.device)
    return mask.to(torch.uint8)


@triton.jit(do_not_specialize=["V"])
def selected_forward_kernel(
    logits, ids, keep, logprob, entropy, stats, M, V, stride_m, stride_v,
    SCALE: tl.constexpr, CAP: tl.constexpr, BLOCK_N: tl.constexpr, ENTROPY: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Log-prob, entropy and statistics of one row of logits, which may hold -inf."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(keep + row) == 0:
        tl.store(logprob + row, tl.zeros((), ACC))
        if ENTROPY:
            tl.store(entropy + row, tl.zeros((), ACC))
        return
    label = tl.load(ids + row)
    m, s, sc, selected = empty_sums(1, ACC)
    for start in range(0, V, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        x = tl.load(logits + row * stride_m + column.to(tl.int64) * stride_v, mask=column < V, other=0.0)
        z = transformed(x.to(ACC), SCALE, CAP)
        selected += tl.sum(tl.where(column == label, z, 0.0), 0)
        z = tl.where(column < V, z, float("-inf"))[None, :]
        m, s, sc = online(m, s, sc, z, ENTROPY)
    rows = row + tl.zeros((1,), tl.int64)  # (1,): the shared functions take a block of rows
    store_row(ids, logprob, entropy, stats, rows, rows >= 0, m, s, sc, selected, M, V, ENTROPY)


@operator("selected_forward")
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


@triton.jit(do_not_specialize=["V"])
def selected_backward_kernel(
    logits, ids, keep, stats, up, up_entropy, gradient, M, V, stride_m, stride_v,
    SCALE: tl.constexpr, CAP: tl.constexpr, BLOCK_N: tl.constexpr, ENTROPY: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """d(loss) / d(logits) for one row and BLOCK_N columns; 0 where keep is 0."""
    parts = tl.cdiv(V, BLOCK_N)
    row, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    column = part * BLOCK_N + tl.arange(0, BLOCK_N)
    out = gradient + row * V + column
    if tl.load(keep + row) == 0:
        tl.store(out, tl.zeros((BLOCK_N,), gradient.dtype.element_ty), mask=column < V)
        return
    x = tl.load(logits + row * stride_m + column.to(tl.int64) * stride_v, mask=column < V, other=0.0).to(ACC)
    z = transformed(x, SCALE, CAP)[None, :]
    rows = row + tl.zeros((1,), tl.int64)  # (1,): the shared functions take a block of rows
    m, s, c, u, u_entropy = load_row(stats, up, up_entropy, rows, rows >= 0, M, ENTROPY, ACC)
    hit = column[None, :] == tl.load(ids + rows)[:, None]
    g = gradient_of(z, m, s, c, u, u_entropy, hit, CAP, SCALE, ENTROPY)
    tl.store(out, tl.sum(g, 0).to(gradient.dtype.element_ty), mask=column < V)


@operator("selected_backward")
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
