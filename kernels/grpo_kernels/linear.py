"""Log-probability and entropy of selected tokens from hidden states, in Triton, without the (M, V) logits.

The formulas are those of grpo/logprob.py.

Forward: one program takes BLOCK_M rows through one strip of the vocabulary. Per row it keeps the maximum m,
the sum s of exp(z - m), the sum sc of (z - m) exp(z - m) and the selected logit. A second kernel adds up the
strips.

Backward, one chunk of the vocabulary at a time: `gradient_kernel` computes the logits again and turns them
into their gradient in registers. `hidden_kernel` multiplies this gradient by W and adds to d(hidden),
`weight_kernel` multiplies it by hidden for dW. Both sums have type ACC.

Live rows are those whose mask is True and, in the backward pass, whose upstream gradient is not 0. They come
first in a compacted copy; hidden states of dead rows are 0 there. Programs that have only dead rows return.
The count of live rows stays on the device, so the host never waits for it.

With TMA, kernels get hidden, weight and gradient as tensor descriptors. The copy engine of Hopper and
Blackwell then loads their tiles and fills them with zeros beyond the edge. Without TMA they are pointers.
UPCAST is for Triton's interpreter, which would multiply the raw bits of bfloat16. ACC, the type of sums, is
float32, or float64 for float64 inputs.

There are no atomics, there is no autotuning, and no block size depends on M. So repeated runs are bit-equal,
and a row's log-prob does not depend on the other rows. The launchers are custom operators, so torch.compile
does not look inside them. Left out: second derivatives, a vocabulary-parallel weight.

M rows, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from grpo.logprob import check_range
from grpo_kernels import checks
from grpo_kernels.config import blocks, has_tma
from grpo_kernels.operators import operator
from grpo_kernels.softmax import (
    NEGLIGIBLE,
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

STRIP = 4096  # columns per program of the forward pass: 32 programs per block of rows at V 131,072
CHUNK = 4096  # columns whose gradient is in memory at the same time: 64 MiB at M 8,192 in bfloat16
SHAPE = ("BLOCK_M", "BLOCK_N", "BLOCK_K")


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

    - Only `validate` checks the ids of unmasked rows, because the check waits for the device. Without it an
      id outside [0, V) gives NaN.
    - Each element of the gradient of `weight` is one sum over all rows, rounded once.
    """
    checks.linear(hidden, weight, ids, mask, temperature, softcap)
    if validate:
        check_range(ids if mask is None else ids[mask], weight.shape[0])
    logprob, entropies, _ = linear_forward(hidden, weight, ids, mask, temperature, softcap, entropy)
    return logprob, entropies if entropy else None


# --- rows and tiles -----------------------------------------------------------------------------------------


class _Rows:
    """A stable permutation of the rows that puts the live rows first.

    Args:
        live: (M,) bool; None: all rows are live.
        like: (M, ...), gives M and the device.
    Attributes:
        order: (M,) int64, the permutation; None: the identity.
        count: (1,) int32, the number of live rows. It stays on the device.
    """

    def __init__(self, live: Tensor | None, like: Tensor) -> None:
        if live is None:
            self.order, self.count = None, torch.full((1,), len(like), dtype=torch.int32, device=like.device)
        else:
            self.order = torch.argsort(live.logical_not().to(torch.uint8), stable=True)
            self.count = live.sum(dtype=torch.int32).view(1)

    def compact(self, x: Tensor) -> Tensor:
        """(..., M) x, permuted and contiguous: live rows first."""
        return (x if self.order is None else x.index_select(-1, self.order)).contiguous()

    def compact_hidden(self, hidden: Tensor) -> Tensor:
        """(M, H) hidden, permuted, with 0 in the dead rows: they may hold NaN, and whole tiles are read."""
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
    """A matrix argument of a kernel: the tensor, or with `tma` a descriptor of its (rows, columns) tiles."""
    return TensorDescriptor.from_tensor(x, [rows, columns]) if tma else x


def _tma(hidden: Tensor, weight: Tensor) -> bool:
    """Whether descriptors can address both matrices: each row must begin at a multiple of 16 bytes."""
    size = hidden.element_size()
    aligned = all(x.data_ptr() % 16 == 0 for x in (hidden, weight))
    rows = weight.stride(1) == 1 and weight.stride(0) * size % 16 == 0 and hidden.shape[1] * size % 16 == 0
    return has_tma(hidden.dtype) and aligned and rows


@triton.jit
def _grouped(row_blocks, parts, GROUP: tl.constexpr):
    """The row block and the part of this program.

    GROUP row blocks cover all parts before the next GROUP begins. Programs that run at the same time then
    share tiles of both operands in the L2 cache.
    """
    program, width = tl.program_id(0), GROUP * parts
    first = program // width * GROUP
    inner, size = program % width, min(row_blocks - first, GROUP)
    return first + inner % size, inner // size


@triton.jit
def _logits(
    hidden, weight, first_row, first_column, live_rows, V, H, stride_wv, stride_wk,
    SCALE: tl.constexpr, CAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) logits. In dead rows and from column V on, they are the logits of a product of 0."""
    z = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    row = first_row + tl.arange(0, BLOCK_M)
    column = first_column + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    if not TMA:
        h = hidden + row.to(tl.int64)[:, None] * H + k[None, :]
        w = weight + column.to(tl.int64)[None, :] * stride_wv + k[:, None] * stride_wk
    for start in range(0, H, BLOCK_K):
        if TMA:
            a = hidden.load([first_row, start])
            b = weight.load([first_column, start]).T
        else:
            inside = k < H - start
            a = tl.load(h, mask=(row < live_rows)[:, None] & inside[None, :], other=0.0)
            b = tl.load(w, mask=(column < V)[None, :] & inside[:, None], other=0.0)
            h += BLOCK_K
            w += BLOCK_K * stride_wk
        if UPCAST:
            a, b = a.to(ACC), b.to(ACC)
        z = tl.dot(a, b, z, input_precision=PRECISION, out_dtype=ACC)
    return transformed(z, SCALE, CAP)


@triton.jit
def _halves(z, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and right half of a tile.

    The matrix units need a wide tile. The code after the product keeps several values per element; on half a
    tile it takes half the registers.
    """
    return tl.split(tl.permute(tl.reshape(z, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


# --- forward ------------------------------------------------------------------------------------------------


@triton.jit
def _absorb(m, s, sc, selected, z, column, label, V, ENTROPY: tl.constexpr):
    """Adds the columns of z to the running sums of `online` and to the selected logit."""
    selected += tl.sum(tl.where(column[None, :] == label[:, None], z, 0.0), 1)
    z = tl.where((column < V)[None, :], z, float("-inf"))
    m, s, sc = online(m, s, sc, z, ENTROPY)
    return m, s, sc, selected


@triton.jit(do_not_specialize=["M", "V", "size"])
def forward_kernel(
    hidden, weight, ids, count, partial, size, M, V, H, stride_wv, stride_wk,
    SCALE: tl.constexpr, CAP: tl.constexpr, STRIP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    HALVES: tl.constexpr, ENTROPY: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One strip of STRIP columns for BLOCK_M rows. Writes m, s, sc, selected logit to partial (4, strips, M).

    size: strips * M.
    """
    tl.static_assert(STRIP % BLOCK_N == 0, "a tile must not reach into the next strip")
    block, strip = _grouped(tl.cdiv(M, BLOCK_M), tl.cdiv(V, STRIP), GROUP)
    live_rows = tl.load(count)
    if block * BLOCK_M >= live_rows:
        return
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < live_rows
    label = tl.load(ids + row, mask=live, other=-1)
    m, s, sc, selected = empty_sums(BLOCK_M, ACC)
    for start in range(strip * STRIP, min(strip * STRIP + STRIP, V), BLOCK_N):
        z = _logits(
            hidden, weight, block * BLOCK_M, start, live_rows, V, H, stride_wv, stride_wk,
            SCALE, CAP, BLOCK_M, BLOCK_N, BLOCK_K, TMA, PRECISION, ACC, UPCAST,
        )  # fmt: skip
        if HALVES:
            half = start + tl.arange(0, BLOCK_N // 2)
            left, right = _halves(z, BLOCK_M, BLOCK_N)
            m, s, sc, selected = _absorb(m, s, sc, selected, left, half, label, V, ENTROPY)
            half += BLOCK_N // 2
            m, s, sc, selected = _absorb(m, s, sc, selected, right, half, label, V, ENTROPY)
        else:
            column = start + tl.arange(0, BLOCK_N)
            m, s, sc, selected = _absorb(m, s, sc, selected, z, column, label, V, ENTROPY)
    out = partial + strip.to(tl.int64) * M + row
    tl.store(out, m, mask=live)
    tl.store(out + size, s, mask=live)
    tl.store(out + 2 * size, sc, mask=live)
    tl.store(out + 3 * size, selected, mask=live)


@triton.jit(do_not_specialize=["M", "V", "strips", "size"])
def combine_kernel(
    partial, size, ids, count, logprob, entropy, stats, M, V, strips,
    ENTROPY: tl.constexpr, BLOCK_M: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Adds up the strips in a fixed order. Writes the results, and m, s and c to stats (3, M)."""
    live_rows = tl.load(count)
    if tl.program_id(0) * BLOCK_M >= live_rows:
        return
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < live_rows
    m, s, sc, selected = empty_sums(BLOCK_M, ACC)
    here = partial + row
    for _ in range(0, strips):
        m2 = tl.load(here, mask=live, other=0.0)
        s2 = tl.load(here + size, mask=live, other=1.0)
        sc2 = tl.load(here + 2 * size, mask=live, other=0.0)
        selected += tl.load(here + 3 * size, mask=live, other=0.0)
        risen = tl.maximum(m, m2)
        shift, shift2 = tl.maximum(m - risen, NEGLIGIBLE), tl.maximum(m2 - risen, NEGLIGIBLE)
        faded, faded2 = tl.exp(shift), tl.exp(shift2)
        sc = (sc + shift * s) * faded + (sc2 + shift2 * s2) * faded2
        s = s * faded + s2 * faded2
        m = risen
        here += M
    store_row(ids, logprob, entropy, stats, row, live, m, s, sc, selected, M, V, ENTROPY)


@operator("linear_forward")
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


# --- backward -----------------------------------------------------------------------------------------------


@triton.jit
def _store_gradient(
    gradient, z, sums, first_row, local, first, stop, label, M,
    CAP: tl.constexpr, SCALE: tl.constexpr, ENTROPY: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Writes d(loss) / d(product) for the tile of logits z, which begins at column `local` of the chunk.

    The gradient is 0 in dead rows and from column `stop` on, because the next two kernels read whole tiles.
    """
    m, s, c, up, up_entropy = sums
    here = local + tl.arange(0, WIDTH)
    column = first + here
    g = gradient_of(z, m, s, c, up, up_entropy, column[None, :] == label[:, None], CAP, SCALE, ENTROPY)
    g = tl.where((column < stop)[None, :], g, 0.0)
    if TMA:
        gradient.store([first_row, local], g.to(gradient.dtype))
    else:
        row = first_row + tl.arange(0, BLOCK_M)
        out = gradient + row.to(tl.int64)[:, None] * CHUNK + here[None, :]
        tl.store(out, g.to(gradient.dtype.element_ty), mask=(row < M)[:, None])


@triton.jit(do_not_specialize=["M", "V", "first", "stop"])
def gradient_kernel(
    hidden, weight, ids, count, stats, up, up_entropy, gradient, M, V, H, first, stop, stride_wv, stride_wk,
    SCALE: tl.constexpr, CAP: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    HALVES: tl.constexpr, ENTROPY: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Writes d(loss) / d(product) of columns first to stop - 1 to gradient (M, CHUNK), in the dtype of W."""
    tl.static_assert(CHUNK % BLOCK_N == 0, "a tile must lie in one chunk")
    block, part = _grouped(tl.cdiv(M, BLOCK_M), tl.cdiv(stop - first, BLOCK_N), GROUP)
    live_rows = tl.load(count)
    if block * BLOCK_M >= live_rows:
        return
    first_row, local = block * BLOCK_M, part * BLOCK_N
    row = first_row + tl.arange(0, BLOCK_M)
    live = row < live_rows
    label = tl.load(ids + row, mask=live, other=-1)
    z = _logits(
        hidden, weight, first_row, first + local, live_rows, V, H, stride_wv, stride_wk,
        SCALE, CAP, BLOCK_M, BLOCK_N, BLOCK_K, TMA, PRECISION, ACC, UPCAST,
    )  # fmt: skip
    sums = load_row(stats, up, up_entropy, row, live, M, ENTROPY, ACC)
    if HALVES:
        left, right = _halves(z, BLOCK_M, BLOCK_N)
        _store_gradient(
            gradient, left, sums, first_row, local, first, stop, label, M,
            CAP, SCALE, ENTROPY, CHUNK, BLOCK_M, BLOCK_N // 2, TMA,
        )  # fmt: skip
        _store_gradient(
            gradient, right, sums, first_row, local + BLOCK_N // 2, first, stop, label, M,
            CAP, SCALE, ENTROPY, CHUNK, BLOCK_M, BLOCK_N // 2, TMA,
        )  # fmt: skip
    else:
        _store_gradient(
            gradient, z, sums, first_row, local, first, stop, label, M,
            CAP, SCALE, ENTROPY, CHUNK, BLOCK_M, BLOCK_N, TMA,
        )  # fmt: skip


@triton.jit
def _add(total, x, row, feature, live, H):
    """total (M, H) += x, in the live rows and the given features."""
    here = total + row.to(tl.int64)[:, None] * H + feature[None, :]
    inside = live[:, None] & (feature < H)[None, :]
    tl.store(here, tl.load(here, mask=inside, other=0.0) + x, mask=inside)


@triton.jit(do_not_specialize=["M", "first", "width"])
def hidden_kernel(
    gradient, weight, total, count, M, H, first, width, stride_wv, stride_wk, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    HALVES: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """total (M, H) += gradient (M, width) @ weight[first : first + width] (width, H), in the live rows."""
    block, part = _grouped(tl.cdiv(M, BLOCK_M), tl.cdiv(H, BLOCK_N), GROUP)
    live_rows = tl.load(count)
    if block * BLOCK_M >= live_rows:
        return
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < live_rows
    feature = part * BLOCK_N + tl.arange(0, BLOCK_N)
    n = tl.arange(0, BLOCK_K)
    if not TMA:
        g = gradient + row.to(tl.int64)[:, None] * CHUNK + n[None, :]
        w = weight + (first + n).to(tl.int64)[:, None] * stride_wv + feature[None, :] * stride_wk
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for start in range(0, width, BLOCK_K):
        if TMA:
            a = gradient.load([block * BLOCK_M, start])
            b = weight.load([first + start, part * BLOCK_N])
        else:
            left = n < width - start
            a = tl.load(g, mask=live[:, None] & left[None, :], other=0.0)
            b = tl.load(w, mask=left[:, None] & (feature < H)[None, :], other=0.0)
            g += BLOCK_K
            w += BLOCK_K * stride_wv
        if UPCAST:
            a, b = a.to(ACC), b.to(ACC)
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)
    if HALVES:
        half = part * BLOCK_N + tl.arange(0, BLOCK_N // 2)
        left_half, right_half = _halves(acc, BLOCK_M, BLOCK_N)
        _add(total, left_half, row, half, live, H)
        _add(total, right_half, row, half + BLOCK_N // 2, live, H)
    else:
        _add(total, acc, row, feature, live, H)


@triton.jit(do_not_specialize=["width"])
def weight_kernel(
    gradient, hidden, count, out, H, width, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out (width, H) = gradient (rows, width)^T @ hidden (rows, H): one sum over live rows, rounded once."""
    block, part = _grouped(tl.cdiv(width, BLOCK_M), tl.cdiv(H, BLOCK_N), GROUP)
    live_rows = tl.load(count)
    column = block * BLOCK_M + tl.arange(0, BLOCK_M)
    feature = part * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_K)
    if not TMA:
        g = gradient + r.to(tl.int64)[None, :] * CHUNK + column[:, None]
        h = hidden + r.to(tl.int64)[:, None] * H + feature[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for start in range(0, live_rows, BLOCK_K):
        if TMA:
            a = gradient.load([start, block * BLOCK_M]).T
            b = hidden.load([start, part * BLOCK_N])
        else:
            live = r < live_rows - start
            a = tl.load(g, mask=live[None, :] & (column < width)[:, None], other=0.0)
            b = tl.load(h, mask=live[:, None] & (feature < H)[None, :], other=0.0)
            g += BLOCK_K * CHUNK
            h += BLOCK_K * H
        if UPCAST:
            a, b = a.to(ACC), b.to(ACC)
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)
    place = out + column.to(tl.int64)[:, None] * H + feature[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=(column < width)[:, None] & (feature < H)[None, :])


@operator("linear_backward")
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
    # The tiled arguments are the same in every chunk, so they are built once.
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
        grad_hidden[rows.order] = total.to(hidden.dtype)  # in dead rows the total is 0
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


# --- autograd -----------------------------------------------------------------------------------------------


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, ids, mask, *ctx.options, ctx.entropy = inputs
    ctx.save_for_backward(hidden, weight, ids, mask, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _linear_gradients(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None, _: Any) -> Any:
    hidden, weight, ids, mask, stats = ctx.saved_tensors
    wants = list(ctx.needs_input_grad[:2])
    grad_entropy = grad_entropy if ctx.entropy else None  # without entropy that output is empty
    grads = linear_backward(
        grad_logprob, grad_entropy, hidden, weight, ids, mask, stats, *ctx.options, *wants
    )
    return *(grad if wanted else None for grad, wanted in zip(grads, wants, strict=True)), *[None] * 5


linear_forward.register_autograd(_linear_gradients, setup_context=_save_linear)
linear_backward.register_autograd(refuse_second_derivative)
