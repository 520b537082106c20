"""The Triton code of selected_logprob, launched by selected.py beside it."""

from __future__ import annotations

import triton
import triton.language as tl

from grpo_kernels.device import empty_sums, gradient_of, load_row, online, store_row, transformed


@triton.jit(do_not_specialize=["V"])
def selected_forward_kernel(
    logits, ids, keep, logprob, entropy, stats, M, V, stride_m, stride_v,
    SCALE: tl.constexpr, CAP: tl.constexpr, BLOCK_N: tl.constexpr, ENTROPY: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One row of given logits, which may hold -inf."""
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
    one = row + tl.zeros((1,), tl.int64)
    store_row(ids, logprob, entropy, stats, one, one >= 0, m, s, sc, selected, M, V, ENTROPY)


@triton.jit(do_not_specialize=["V"])
def selected_backward_kernel(
    logits, ids, keep, stats, up, up_entropy, gradient, M, V, stride_m, stride_v,
    SCALE: tl.constexpr, CAP: tl.constexpr, BLOCK_N: tl.constexpr, ENTROPY: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """d(loss) / d(logits) for one row and BLOCK_N columns; zeros where the row is masked or not upstream."""
    parts = tl.cdiv(V, BLOCK_N)
    row, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    column = part * BLOCK_N + tl.arange(0, BLOCK_N)
    out = gradient + row * V + column
    if tl.load(keep + row) == 0:
        tl.store(out, tl.zeros((BLOCK_N,), gradient.dtype.element_ty), mask=column < V)
        return
    x = tl.load(logits + row * stride_m + column.to(tl.int64) * stride_v, mask=column < V, other=0.0).to(ACC)
    z = transformed(x, SCALE, CAP)[None, :]
    one = row + tl.zeros((1,), tl.int64)
    m, s, c, u, u_entropy = load_row(stats, up, up_entropy, one, one >= 0, M, ENTROPY, ACC)
    hit = column[None, :] == tl.load(ids + one)[:, None]
    g = gradient_of(z, m, s, c, u, u_entropy, hit, CAP, SCALE, ENTROPY)
    tl.store(out, tl.sum(g, 0).to(gradient.dtype.element_ty), mask=column < V)
