"""The Triton code of linear_logprob: what runs on the device. linear.py launches it and has the overview.

Block sizes and the type of the sums are constants. UPCAST is for Triton's interpreter, which multiplies the
raw bits of bfloat16.
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
def _logits(
    hidden, row, live, stride_hm, stride_hk, weight, column, stride_wv, stride_wk, V, H,
    SCALE: tl.constexpr, CAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) logits of rows and columns given by index; what lies outside is undefined."""
    k = tl.arange(0, BLOCK_K)
    h = hidden + row[:, None] * stride_hm + k[None, :] * stride_hk
    w = weight + column.to(tl.int64)[None, :] * stride_wv + k[:, None] * stride_wk
    z = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for start in range(0, H, BLOCK_K):
        inside = k < H - start
        a = tl.load(h, mask=live[:, None] & inside[None, :], other=0.0)
        b = tl.load(w, mask=(column < V)[None, :] & inside[:, None], other=0.0)
        if UPCAST:
            a, b = a.to(ACC), b.to(ACC)
        z = tl.dot(a, b, z, input_precision=PRECISION, out_dtype=ACC)
        h += BLOCK_K * stride_hk
        w += BLOCK_K * stride_wk
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
    hidden, weight, ids, order, count, partial, size, M, V, H, stride_hm, stride_hk, stride_wv, stride_wk,
    SCALE: tl.constexpr, CAP: tl.constexpr, STRIP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, HALVES: tl.constexpr,
    ENTROPY: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One strip of STRIP columns for BLOCK_M rows: writes partial (4, strips, M): m, s, sc, selected logit.

    size: strips * M.
    """
    program, row_blocks = tl.program_id(0), tl.cdiv(M, BLOCK_M)
    # Neighbours share a strip of W, which stays in the L2 cache.
    block, strip = program % row_blocks, program // row_blocks
    live_rows = tl.load(count)
    if block * BLOCK_M >= live_rows:
        return
    place = block * BLOCK_M + tl.arange(0, BLOCK_M)
    live = place < live_rows
    row = tl.load(order + place, mask=live, other=0)
    label = tl.load(ids + row, mask=live, other=-1)
    m, s, sc, selected = empty_sums(BLOCK_M, ACC)
    for start in range(strip * STRIP, min(strip * STRIP + STRIP, V), BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        z = _logits(
            hidden, row, live, stride_hm, stride_hk, weight, column, stride_wv, stride_wk, V, H,
            SCALE, CAP, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, ACC, UPCAST,
        )  # fmt: skip
        if HALVES:
            half = start + tl.arange(0, BLOCK_N // 2)
            left, right = _halves(z, BLOCK_M, BLOCK_N)
            m, s, sc, selected = _absorb(m, s, sc, selected, left, half, label, V, ENTROPY)
            half += BLOCK_N // 2
            m, s, sc, selected = _absorb(m, s, sc, selected, right, half, label, V, ENTROPY)
        else:
            m, s, sc, selected = _absorb(m, s, sc, selected, z, column, label, V, ENTROPY)
    out = partial + strip.to(tl.int64) * M + place
    tl.store(out, m, mask=live)
    tl.store(out + size, s, mask=live)
    tl.store(out + 2 * size, sc, mask=live)
    tl.store(out + 3 * size, selected, mask=live)


@triton.jit(do_not_specialize=["M", "V", "strips", "size"])
def combine_kernel(
    partial, size, ids, order, count, logprob, entropy, stats, M, V, strips,
    ENTROPY: tl.constexpr, BLOCK_M: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Adds up the strips, always in the same order. Writes stats (3, M): m, s and c, and the results."""
    live_rows = tl.load(count)
    if tl.program_id(0) * BLOCK_M >= live_rows:
        return
    place = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = place < live_rows
    m, s, sc, selected = empty_sums(BLOCK_M, ACC)
    here = partial + place
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
    row = tl.load(order + place, mask=live, other=0)
    store_row(ids, logprob, entropy, stats, row, live, m, s, sc, selected, M, V, ENTROPY)


@triton.jit
def _store_gradient(
    out, z, sums, local, first, stop, label, live,
    CAP: tl.constexpr, SCALE: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of the products whose logits are z, in the chunk's columns `local`."""
    m, s, c, up, up_entropy = sums
    column = first + local
    g = gradient_of(z, m, s, c, up, up_entropy, column[None, :] == label[:, None], CAP, SCALE, ENTROPY)
    inside = live[:, None] & (column < stop)[None, :]
    tl.store(out + local[None, :], g.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M", "V", "first", "stop"])
def gradient_kernel(
    hidden, weight, ids, order, count, stats, up, up_entropy, gradient, M, V, H, first, stop,
    stride_hm, stride_hk, stride_wv, stride_wk, SCALE: tl.constexpr, CAP: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, HALVES: tl.constexpr,
    ENTROPY: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """d(loss) / d(products) for the columns first to stop, compacted: gradient (M, CHUNK), like W."""
    row_blocks = tl.cdiv(M, BLOCK_M)
    block, part = tl.program_id(0) % row_blocks, tl.program_id(0) // row_blocks
    live_rows = tl.load(count)
    if block * BLOCK_M >= live_rows:
        return
    place = block * BLOCK_M + tl.arange(0, BLOCK_M)
    live = place < live_rows
    row = tl.load(order + place, mask=live, other=0)
    label = tl.load(ids + row, mask=live, other=-1)
    local = part * BLOCK_N + tl.arange(0, BLOCK_N)
    column = first + local
    z = _logits(
        hidden, row, live, stride_hm, stride_hk, weight, column, stride_wv, stride_wk, stop, H,
        SCALE, CAP, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, ACC, UPCAST,
    )  # fmt: skip
    sums = load_row(stats, up, up_entropy, row, live, M, ENTROPY, ACC)
    out = gradient + place.to(tl.int64)[:, None] * CHUNK
    if HALVES:
        half = part * BLOCK_N + tl.arange(0, BLOCK_N // 2)
        left, right = _halves(z, BLOCK_M, BLOCK_N)
        _store_gradient(out, left, sums, half, first, stop, label, live, CAP, SCALE, ENTROPY)
        half += BLOCK_N // 2
        _store_gradient(out, right, sums, half, first, stop, label, live, CAP, SCALE, ENTROPY)
    else:
        _store_gradient(out, z, sums, local, first, stop, label, live, CAP, SCALE, ENTROPY)


@triton.jit(do_not_specialize=["M", "width"])
def hidden_kernel(
    gradient, weight, total, count, M, H, width, stride_wv, stride_wk, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """total (M, H) += gradient (M, width) @ weight (width, H), for the compacted rows."""
    row_blocks = tl.cdiv(M, BLOCK_M)
    block, part = tl.program_id(0) % row_blocks, tl.program_id(0) // row_blocks
    live_rows = tl.load(count)
    if block * BLOCK_M >= live_rows:
        return
    place = (block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    live = place < live_rows
    feature = part * BLOCK_N + tl.arange(0, BLOCK_N)
    n = tl.arange(0, BLOCK_K)
    g = gradient + place[:, None] * CHUNK + n[None, :]
    w = weight + n.to(tl.int64)[:, None] * stride_wv + feature[None, :] * stride_wk
    out = total + place[:, None] * H + feature[None, :]
    inside = live[:, None] & (feature < H)[None, :]
    acc = tl.load(out, mask=inside, other=0.0)
    for start in range(0, width, BLOCK_K):
        left = n < width - start
        a = tl.load(g, mask=live[:, None] & left[None, :], other=0.0)
        b = tl.load(w, mask=left[:, None] & (feature < H)[None, :], other=0.0)
        if UPCAST:
            a, b = a.to(ACC), b.to(ACC)
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)
        g += BLOCK_K
        w += BLOCK_K * stride_wv
    tl.store(out, acc, mask=inside)


@triton.jit(do_not_specialize=["width"])
def weight_kernel(
    gradient, hidden, order, count, out, H, width, stride_hm, stride_hk, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out (width, H) = gradient (rows, width)^T @ hidden (rows, H): all rows in one sum, rounded once."""
    blocks = tl.cdiv(width, BLOCK_M)
    block, part = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    live_rows = tl.load(count)
    column = block * BLOCK_M + tl.arange(0, BLOCK_M)
    feature = part * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for start in range(0, live_rows, BLOCK_K):
        place = start + r
        live = place < live_rows
        row = tl.load(order + place, mask=live, other=0)
        g = gradient + place.to(tl.int64)[None, :] * CHUNK + column[:, None]
        h = hidden + row[:, None] * stride_hm + feature[None, :] * stride_hk
        a = tl.load(g, mask=live[None, :] & (column < width)[:, None], other=0.0)
        b = tl.load(h, mask=live[:, None] & (feature < H)[None, :], other=0.0)
        if UPCAST:
            a, b = a.to(ACC), b.to(ACC)
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)
    place = out + column.to(tl.int64)[:, None] * H + feature[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=(column < width)[:, None] & (feature < H)[None, :])
