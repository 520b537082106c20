"""The softmax that linear.py and selected.py share: running sums, gradient of a tile, outputs and constants.

The formulas are those of grpo/logprob.py. m, s and c are the statistics of a row there; sc is s times c.

ACC, the type of all sums, is float32, or float64 for float64 inputs. SCALE and CAP are constants: a float
argument would be float32, too coarse to check float64 gradients.

M rows, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo_kernels.config import sum_dtype

NEGLIGIBLE = tl.constexpr(-1e4)  # its exp is 0 in every type; unlike -inf, 0 times it is 0


@triton.jit
def transformed(z, SCALE: tl.constexpr, CAP: tl.constexpr):
    """The logits of the products h W^T. SCALE and CAP come from `scales`."""
    z = z * SCALE
    if CAP is not None:
        # tanh(|z|), from an exponential that cannot overflow
        decay = tl.exp(-2 * tl.abs(z))
        size = (1 - decay) / (1 + decay)
        z = tl.where(z < 0, -size, size) * CAP
    return z


@triton.jit
def online(m, s, sc, z, ENTROPY: tl.constexpr):
    """Adds the columns of z to the running maximum m, sum s and weighted sum sc of each row."""
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
    """d(loss) / d(product) for a tile of logits z. Computes p - 1 in ACC, before the result is rounded."""
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
    """m, s, sc and the selected logit before the first column."""
    m = tl.full((ROWS,), -3.4e38, dtype=ACC)  # finite, and below every float32 logit
    zero = tl.zeros((ROWS,), dtype=ACC)
    return m, zero, zero, zero


@triton.jit
def store_row(ids, logprob, entropy, stats, row, live, m, s, sc, selected, M, V, ENTROPY: tl.constexpr):
    """Writes the log-prob and entropy of each row and, for the backward pass, m, s and c to stats (3, M)."""
    label = tl.load(ids + row, mask=live, other=0)
    log_s, c = tl.log(s), sc / s
    value = selected - m - log_s
    # No column matched an id outside the vocabulary: give NaN, not a number that looks right.
    value = tl.where((label >= 0) & (label < V), value, float("nan"))
    tl.store(logprob + row, value, mask=live)
    if ENTROPY:
        tl.store(entropy + row, log_s - c, mask=live)
    tl.store(stats + row, m, mask=live)
    tl.store(stats + M + row, s, mask=live)
    tl.store(stats + M + M + row, c, mask=live)


@triton.jit
def load_row(stats, up, up_entropy, row, live, M, ENTROPY: tl.constexpr, ACC: tl.constexpr):
    """m, s and c of each row, and the upstream gradients of its log-prob and entropy."""
    m = tl.load(stats + row, mask=live, other=0.0)
    s = tl.load(stats + M + row, mask=live, other=1.0)
    c = tl.load(stats + M + M + row, mask=live, other=0.0)
    of_logprob = tl.load(up + row, mask=live, other=0.0).to(ACC)
    of_entropy = of_logprob * 0
    if ENTROPY:
        of_entropy = tl.load(up_entropy + row, mask=live, other=0.0).to(ACC)
    return m, s, c, of_logprob, of_entropy


def outputs(x: Tensor, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros for the log-probs (M,), the entropies (M,), empty without `entropy`, and m, s and c (3, M)."""
    new: dict[str, Any] = {"dtype": sum_dtype(x), "device": x.device}
    return (
        torch.zeros(len(x), **new),
        torch.zeros(len(x) if entropy else 0, **new),
        torch.zeros(3, len(x), **new),
    )


def scales(temperature: float, softcap: float | None) -> dict[str, float | None]:
    """The constants of `transformed`: the logits are x SCALE, or with a softcap tanh(x SCALE) CAP."""
    if softcap is None:
        return {"SCALE": 1 / temperature, "CAP": None}
    return {"SCALE": 1 / softcap, "CAP": softcap / temperature}


def upstream(grads: list[Tensor | None], mask: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of log-prob and entropy, 0 for None, and (M,) whether the row has a gradient at all."""
    up, up_entropy = (torch.zeros_like(like) if g is None else g.contiguous() for g in grads)
    live = (up != 0) | (up_entropy != 0)
    return up, up_entropy, live if mask is None else live & mask


def refuse_second_derivative(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError("the log-prob kernels are differentiable once, not twice")
