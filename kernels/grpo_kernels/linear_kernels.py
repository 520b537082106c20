"""The Triton code of linear_logprob: what runs on the device. linear.py launches it and has the overview.

Rows are compact: the first `count` of hidden, ids, ... are live, and the hidden states of the others are 0.
With TMA, hidden, weight and the gradient of the products come as tensor descriptors, whose tiles Hopper's and
Blackwell's copy engine brings, and fills up with zeros beyond the edge; else as pointers. Block sizes and the
type of the sums are constants. UPCAST is for Triton's interpreter, which multiplies the raw bits of bfloat16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from grpo_kernels.device import (
    NEGLIGIBLE,
    empty_sums,
    gradient_of,
    load_row,
    online,
    store_row,
    transformed,
)


@triton.jit
def _grouped(row_blocks, parts, GROUP: tl.constexpr):
    """The row block and the part of this program. GROUP row blocks go over all parts before the next ones do:
    programs that run at the same time then share tiles of both operands in the L2 cache.
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
    """(BLOCK_M, BLOCK_N) logits of consecutive rows and columns; those of dead rows and beyond V are of 0."""
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
    """Left and right half of a tile, which is as wide as the matrix units want it: what follows the product
    keeps several values for each element, and in halves takes half of the registers.
    """
    return tl.split(tl.permute(tl.reshape(z, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def _absorb(m, s, sc, selected, z, column, label, V, ENTROPY: tl.constexpr):
    """The running sums of `online`, and the selected logit, after the columns of z."""
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
    """One strip of STRIP columns for BLOCK_M rows: writes partial (4, strips, M): m, s, sc, selected logit.

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
    """Adds up the strips, always in the same order. Writes stats (3, M): m, s and c, and the results."""
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


@triton.jit
def _store_gradient(
    gradient, z, sums, first_row, local, first, stop, label, M,
    CAP: tl.constexpr, SCALE: tl.constexpr, ENTROPY: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of the products whose logits are z, from column `local` of the chunk on.

    In dead rows and from column `stop` on it is 0: the products that follow read whole tiles.
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
    """d(loss) / d(products) for the columns first to stop: gradient (M, CHUNK), like W."""
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
    """total (M, H) += x at the live rows and the features."""
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
    """total (M, H) += gradient (M, width) @ weight[first : first + width] (width, H), for the live rows."""
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
    """out (width, H) = gradient (rows, width)^T @ hidden (rows, H): all rows in one sum, rounded once."""
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
