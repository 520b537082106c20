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
