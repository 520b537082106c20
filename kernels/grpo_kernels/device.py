"""What the log-prob kernels share: from products to logits, sums that keep up with them, and their gradient.

ACC, the type of all sums, is float32, or float64 where the inputs are. SCALE and CAP are constants: as
arguments they would be float32, too coarse to check float64 gradients.
"""

from __future__ import annotations

import triton
import triton.language as tl

NEGLIGIBLE = tl.constexpr(-1e4)  # exp of it is 0 in every type, and unlike -inf it can be multiplied by 0


@triton.jit
def transformed(z, SCALE: tl.constexpr, CAP: tl.constexpr):
    """Products h W^T to logits. With a softcap SCALE is 1 / softcap and CAP is softcap / temperature."""
    z = z * SCALE
    if CAP is not None:
        # tanh of |x|, from an exponential that cannot overflow
        decay = tl.exp(-2 * tl.abs(z))
        size = (1 - decay) / (1 + decay)
        z = tl.where(z < 0, -size, size) * CAP
    return z


@triton.jit
def online(m, s, sc, z, ENTROPY: tl.constexpr):
    """The running maximum, sum and weighted sum of each row, after the columns of z."""
    risen = tl.maximum(m, tl.max(z, 1))
    shift = tl.maximum(m - risen, NEGLIGIBLE)
    faded = tl.exp(shift)
    d = z - risen[:, None]
    e = tl.exp(d)
    if ENTROPY:
        sc = (sc + shift * s) * faded + tl.sum(tl.maximum(d, NEGLIGIBLE) * e, 1)
    return risen, s * faded + tl.sum(e, 1), sc


@triton.jit
def gradient_of(
    z, m, s, c, up, up_entropy, hit, CAP: tl.constexpr, SCALE: tl.constexpr, ENTROPY: tl.constexpr
):
    """d(loss) / d(product) for a tile of logits z: p - 1 is formed before anything is rounded."""
    d = tl.maximum(z - m[:, None], NEGLIGIBLE)
    slope = -up_entropy / s
    intercept = -up / s - slope * c
    if ENTROPY:
        g = tl.exp(d) * (slope[:, None] * d + intercept[:, None])
    else:
        g = tl.exp(d) * intercept[:, None]
    g += tl.where(hit, up[:, None], 0.0)
    if CAP is not None:  # d softcap tanh(x / softcap) / T = (1 - tanh^2) / T, and CAP * SCALE = 1 / T
        tanh = z / CAP
        return g * (1 - tanh * tanh) * (CAP * SCALE)
    return g * SCALE


@triton.jit
def empty_sums(ROWS: tl.constexpr, ACC: tl.constexpr):
    """m, s, sc and the selected logit of rows that have seen no column."""
    m = tl.full((ROWS,), -3.4e38, dtype=ACC)  # finite, and below every float32 logit
    zero = tl.zeros((ROWS,), dtype=ACC)
    return m, zero, zero, zero


@triton.jit
def store_row(ids, logprob, entropy, stats, row, live, m, s, sc, selected, M, V, ENTROPY: tl.constexpr):
    """Writes log-prob and entropy of the rows and, for the backward pass, m, s and c to stats (3, M)."""
    label = tl.load(ids + row, mask=live, other=0)
    log_s, c = tl.log(s), sc / s
    value = selected - m - log_s
    # An id outside the vocabulary was selected nowhere: NaN, rather than a number that looks right.
    value = tl.where((label >= 0) & (label < V), value, float("nan"))
    tl.store(logprob + row, value, mask=live)
    if ENTROPY:
        tl.store(entropy + row, log_s - c, mask=live)
    tl.store(stats + row, m, mask=live)
    tl.store(stats + M + row, s, mask=live)
    tl.store(stats + M + M + row, c, mask=live)


@triton.jit
def load_row(stats, up, up_entropy, row, live, M, ENTROPY: tl.constexpr, ACC: tl.constexpr):
    """m, s and c of the rows, and the upstream gradients of their log-prob and entropy."""
    m = tl.load(stats + row, mask=live, other=0.0)
    s = tl.load(stats + M + row, mask=live, other=1.0)
    c = tl.load(stats + M + M + row, mask=live, other=0.0)
    of_logprob = tl.load(up + row, mask=live, other=0.0).to(ACC)
    of_entropy = of_logprob * 0
    if ENTROPY:
        of_entropy = tl.load(up_entropy + row, mask=live, other=0.0).to(ACC)
    return m, s, c, of_logprob, of_entropy
