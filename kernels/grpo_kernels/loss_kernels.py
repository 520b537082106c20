"""The Triton code of the GRPO loss and of group advantages; loss.py and advantage.py beside it launch it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _k3(x, TERMS: tl.constexpr):
    """exp(x) - x - 1. Where |x| < 1 by its series, because subtraction would leave rounding only."""
    series = x * 0 + 1
    for i in tl.static_range(TERMS):
        series = 1 + series * x / (TERMS + 2 - i)
    return tl.where(tl.abs(x) < 1, x * x / 2 * series, tl.exp(x) - x - 1)


@triton.jit
def segment_sum_kernel(
    values, old, order, bounds, out, BLOCK: tl.constexpr, DIFFERENCE: tl.constexpr, ACC: tl.constexpr
):
    """out[b] = sum over the tokens of completion b of values, or of values - old, in a fixed order."""
    b = tl.program_id(0)
    first, stop = tl.load(bounds + b), tl.load(bounds + b + 1)
    total = tl.zeros((BLOCK,), dtype=ACC)
    for start in range(first, stop, BLOCK):
        place = start + tl.arange(0, BLOCK)
        token = tl.load(order + place, mask=place < stop, other=0)
        x = tl.load(values + token, mask=place < stop, other=0.0).to(ACC)
        if DIFFERENCE:
            x -= tl.load(old + token, mask=place < stop, other=0.0).to(ACC)
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
    """BLOCK tokens: their loss and metrics, summed, to partial (6, blocks); and the gradient of the loss.

    At token level `direct` is the whole gradient. At sequence level the part that goes through the ratio,
    which all tokens of a completion share, is d(loss) / d(ratio) * ratio, in `through_ratio`, still to be
    added up.
    """
    block = tl.program_id(0)
    place = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = place < M
    if MASKED:
        live = live & (tl.load(mask + place, mask=live, other=0) != 0)
    sequence = tl.load(sequence_ids + place, mask=live, other=0)
    A = tl.load(advantages + sequence, mask=live, other=0.0).to(ACC)
    logp = tl.load(logprobs + place, mask=live, other=0.0).to(ACC)
    log_ratio = logp - tl.load(old + place, mask=live, other=0.0).to(ACC)
    length = tl.load(lengths + sequence, mask=live, other=1).to(ACC)
    if SEQUENCE:
        log_ratio = tl.load(sequence_log_ratio + sequence, mask=live, other=0.0) / length
    r = tl.exp(log_ratio)

    # As tensors: a number that stands alone would become float32.
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
        x = tl.load(ref + place, mask=live, other=0.0).to(ACC) - logp
        k3 = _k3(x, TERMS)
        kl = k3
        d_kl = -(k3 + x)
        if BIAS_CORRECTION:
            kl, d_kl, d_r = k3 * r, d_kl * r, d_r + BETA * k3
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
    one = tl.where(live, 1.0, 0.0).to(ACC)
    tl.store(out, tl.sum(tl.where(live, weight * value, 0.0), 0))
    tl.store(out + blocks, tl.sum(tl.where(live, r, 0.0), 0))
    tl.store(out + 2 * blocks, tl.sum(tl.where(low, one, 0.0), 0))
    tl.store(out + 3 * blocks, tl.sum(tl.where(high, one, 0.0), 0))
    tl.store(out + 4 * blocks, tl.sum(tl.where(low | high, one, 0.0), 0))
    tl.store(out + 5 * blocks, tl.sum(tl.where(live, kl, 0.0), 0))


@triton.jit
def spread_kernel(
    direct, through_ratio, sequence_ids, mask, lengths, M,
    MASKED: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """direct += the completion's sum of d(loss) / d(log ratio), divided by its length: the ratio's mean."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = place < M
    if MASKED:
        live = live & (tl.load(mask + place, mask=live, other=0) != 0)
    sequence = tl.load(sequence_ids + place, mask=live, other=0)
    total = tl.load(through_ratio + sequence, mask=live, other=0.0)
    length = tl.load(lengths + sequence, mask=live, other=1).to(ACC)
    own = tl.load(direct + place, mask=live, other=0.0)
    tl.store(direct + place, own + total / length, mask=live)


@triton.jit
def advantage_kernel(
    rewards, group_ids, out, B,
    SCALE: tl.constexpr, DDOF: tl.constexpr, EPS: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Advantages of BLOCK_I completions, each compared with all B: no sorting, no groups to look up."""
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    r = tl.load(rewards + i, mask=i < B, other=0.0).to(ACC)
    group = tl.load(group_ids + i, mask=i < B, other=0)
    size = tl.zeros((BLOCK_I,), dtype=ACC)
    total = tl.zeros((BLOCK_I,), dtype=ACC)
    differs = tl.zeros((BLOCK_I,), dtype=ACC)
    everything = tl.zeros((BLOCK_J,), dtype=ACC)
    for start in range(0, B, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        other = tl.load(rewards + j, mask=j < B, other=0.0).to(ACC)
        same = (group[:, None] == tl.load(group_ids + j, mask=j < B, other=0)[None, :]) & (j < B)[None, :]
        size += tl.sum(tl.where(same, 1.0, 0.0).to(ACC), 1)
        total += tl.sum(tl.where(same, other[None, :], 0.0), 1)
        differs += tl.sum(tl.where(same & (other[None, :] != r[:, None]), 1.0, 0.0).to(ACC), 1)
        everything += other
    mean = total / tl.maximum(size, 1.0)
    centred = tl.where(differs > 0, r - mean, 0.0)  # exactly 0 where all rewards of the group are equal
    if SCALE != "none":
        of_all = tl.sum(everything, 0) / B
        squares = tl.zeros((BLOCK_I,), dtype=ACC)
        for start in range(0, B, BLOCK_J):
            j = start + tl.arange(0, BLOCK_J)
            other = tl.load(rewards + j, mask=j < B, other=0.0).to(ACC)
            if SCALE == "group":
                here = group[:, None] == tl.load(group_ids + j, mask=j < B, other=0)[None, :]
                distance = tl.where(here, other[None, :] - mean[:, None], 0.0)
            else:
                distance = (other - of_all)[None, :] + tl.zeros((BLOCK_I, 1), ACC)
            distance = tl.where((j < B)[None, :], distance, 0.0)
            squares += tl.sum(distance * distance, 1)
        count = size
        if SCALE == "batch":
            count = size * 0 + B
        deviation = tl.sqrt(squares / tl.maximum(count - DDOF, 1.0)) + EPS
        centred = tl.where(centred == 0, 0.0, centred / deviation)
    tl.store(out + i, centred, mask=i < B)
