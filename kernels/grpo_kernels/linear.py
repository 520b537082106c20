"""Triton kernels for the log-probability and entropy of selected tokens; the formulas are those of
grpo/logprob.py.

Forward: a program takes BLOCK_M rows through one strip of the vocabulary and keeps, per row, the maximum m,
the sum s of exp(z - m), the sum of (z - m) exp(z - m) and the selected logit; a second kernel adds up the
strips. Backward, per chunk of the vocabulary: the logits again, turned into their gradient in registers; then
two products, with W for d(hidden) and with hidden for dW, both summed in float32.

Rows are compacted first, into a copy: those whose mask is False, and in the backward pass those whose
upstream gradient is 0, come last, and programs beyond the count of the others return. The count stays on the
device: nothing here waits for it. No atomics, no autotuning, and no block size depends on M: repeated runs
are bit-equal, and a row's log-prob does not depend on the other rows.

The launchers are custom operators, so that torch.compile takes them whole. M rows, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from grpo.logprob import check_range
from grpo_kernels import checks
from grpo_kernels.config import blocks, has_tma
from grpo_kernels.launch import outputs, refuse_second_derivative, scales, upstream
from grpo_kernels.linear_kernels import (
    combine_kernel,
    forward_kernel,
    gradient_kernel,
    hidden_kernel,
    weight_kernel,
)

STRIP = 4096  # columns per program of the forward pass: 32 programs per block of rows at V 131,072
SHAPE = ("BLOCK_M", "BLOCK_N", "BLOCK_K")
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


class _Rows:
    """The rows of (M,) `live`, None: all, before the others; both in their order.

    Attributes:
        count: (1,) int32, how many are live, on the device.
    """

    def __init__(self, live: Tensor | None, like: Tensor) -> None:
        if live is None:
            self.order, self.count = None, torch.full((1,), len(like), dtype=torch.int32, device=like.device)
        else:
            self.order = torch.argsort(live.logical_not().to(torch.uint8), stable=True)
            self.count = live.sum(dtype=torch.int32).view(1)

    def compact(self, x: Tensor) -> Tensor:
        """(..., M) with the live rows first, contiguous."""
        return (x if self.order is None else x.index_select(-1, self.order)).contiguous()

    def compact_hidden(self, hidden: Tensor) -> Tensor:
        """(M, H), the same; 0 in the other rows, which may be NaN and are read where tiles are read whole."""
        if self.order is None:
            return hidden.contiguous()
        dead = torch.arange(len(hidden), device=hidden.device) >= self.count
        return hidden.index_select(0, self.order).masked_fill_(dead[:, None], 0.0)

    def spread(self, x: Tensor) -> Tensor:
        """The inverse of `compact`."""
        if self.order is None:
            return x
        out = torch.empty_like(x)
        out[..., self.order] = x
        return out


def _tiles(x: Tensor, rows: int, columns: int, tma: bool) -> Any:
    """A matrix for a kernel: as it is, or as the descriptor of tiles (rows, columns)."""
    return TensorDescriptor.from_tensor(x, [rows, columns]) if tma else x


def _tma(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the matrices can be had by descriptors, which want rows that begin at multiples of 16 bytes."""
    size = hidden.element_size()
    aligned = all(x.data_ptr() % 16 == 0 for x in (hidden, weight))
    rows = weight.stride(1) == 1 and weight.stride(0) * size % 16 == 0 and hidden.shape[1] * size % 16 == 0
    return has_tma(hidden.dtype) and aligned and rows


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
    rows = _Rows(mask, hidden)
    ids, hidden = rows.compact(ids), rows.compact_hidden(hidden)
    tma = _tma(hidden, weight)
    strips = triton.cdiv(V, STRIP)
    partial = torch.empty(4, strips, M, dtype=logprob.dtype, device=hidden.device)
    tile = blocks(hidden.dtype, "forward", tma)
    forward_kernel[(triton.cdiv(M, tile["BLOCK_M"]) * strips,)](
        _tiles(hidden, tile["BLOCK_M"], tile["BLOCK_K"], tma),
        _tiles(weight, tile["BLOCK_N"], tile["BLOCK_K"], tma),
        ids,
        rows.count,
        partial,
        strips * M,
        M,
        V,
        H,
        *weight.stride(),
        STRIP=STRIP,
        ENTROPY=entropy,
        **scales(temperature, softcap),
        **tile,
    )
    size = 256
    combine_kernel[(triton.cdiv(M, size),)](
        partial,
        strips * M,
        ids,
        rows.count,
        logprob,
        entropies,
        stats,
        M,
        V,
        strips,
        ENTROPY=entropy,
        BLOCK_M=size,
        ACC=tile["ACC"],
    )
    return rows.spread(logprob), rows.spread(entropies) if entropy else entropies, rows.spread(stats)


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
    rows = _Rows(live, hidden)
    ids, stats, up, up_entropy = (rows.compact(x) for x in (ids, stats, up, up_entropy))
    hidden = rows.compact_hidden(hidden)
    total = stats.new_zeros(M, H) if wants_hidden else None
    gradient = weight.new_empty(M, CHUNK)
    tma = _tma(hidden, weight)
    tile, of_hidden, of_weight = (
        blocks(hidden.dtype, name, tma) for name in ("gradient", "hidden", "weight")
    )
    # What each kernel reads and writes by tiles: the same in every chunk.
    m, n, k = (tile[name] for name in SHAPE)
    h, w = _tiles(hidden, m, k, tma), _tiles(weight, n, k, tma)
    g = _tiles(gradient, m, n // 2 if tile["HALVES"] else n, tma)
    hidden_m, hidden_n, hidden_k = (of_hidden[name] for name in SHAPE)
    hidden_g, hidden_w = _tiles(gradient, hidden_m, hidden_k, tma), _tiles(weight, hidden_k, hidden_n, tma)
    weight_m, weight_n, weight_k = (of_weight[name] for name in SHAPE)
    weight_g, weight_h = _tiles(gradient, weight_k, weight_m, tma), _tiles(hidden, weight_k, weight_n, tma)
    for first in range(0, V, CHUNK):
        stop = min(first + CHUNK, V)
        width = stop - first
        gradient_kernel[(triton.cdiv(M, m) * triton.cdiv(width, n),)](
            h,
            w,
            ids,
            rows.count,
            stats,
            up,
            up_entropy,
            g,
            M,
            V,
            H,
            first,
            stop,
            *weight.stride(),
            ENTROPY=grad_entropy is not None,
            CHUNK=CHUNK,
            **scales(temperature, softcap),
            **tile,
        )
        if total is not None:
            hidden_kernel[(triton.cdiv(M, hidden_m) * triton.cdiv(H, hidden_n),)](
                hidden_g,
                hidden_w,
                total,
                rows.count,
                M,
                H,
                first,
                width,
                *weight.stride(),
                CHUNK=CHUNK,
                **of_hidden,
            )
        if wants_weight:
            weight_kernel[(triton.cdiv(width, weight_m) * triton.cdiv(H, weight_n),)](
                weight_g,
                weight_h,
                rows.count,
                grad_weight[first:],
                H,
                width,
                CHUNK=CHUNK,
                **of_weight,
            )
    if total is not None:
        assert rows.order is not None
        grad_hidden[rows.order] = total.to(hidden.dtype)  # beyond the count the total is 0
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
