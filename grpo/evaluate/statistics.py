"""Intervals for shares and for their differences: the percentile bootstrap (Efron 1979) and Wilson's interval
(1927).

Two models answer the *same* problems with the *same* sampling noise, so they are compared problem by problem.
Resampling whole problems keeps the answers to a problem together. The interval of a difference is then
narrower than two separate intervals suggest. Everything here reduces to one primitive, the sums of resampled
rows.

Left out: corrections of the percentile interval (BCa, studentised), which move its ends by less than a tenth
of its width at the few hundred problems of an evaluation; and tests of significance, because an interval says
more.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 10_000
_CHUNK = 1 << 21  # numbers held at a time, 16 MiB: memory stays bounded whatever the number of resamples


class Interval(NamedTuple):
    """An estimate and the ends of its confidence interval, in the unit of the values."""

    mean: float
    low: float
    high: float


def resampled_sums(columns: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0) -> NDArray[np.float64]:
    """Column sums of `resamples` draws of n rows with replacement. Rows are drawn whole: columns stay paired.

    Same as `stack([columns[rng.integers(n, size=n)].sum(0) for _ in range(resamples)])`, in chunks.

    Args:
        columns: (n, k) numbers, a row per problem.
        resamples: how many draws.
        seed: key of the Philox generator; equal seeds draw equal rows, whatever the columns hold.
    Returns:
        (resamples, k) float64.
    Raises:
        ValueError: no rows, not two-dimensional, or a value that is not finite.
    """
    values = np.asarray(columns, dtype=np.float64)
    if values.ndim != 2 or not len(values):
        raise ValueError(f"columns must have shape (n, k) with n at least 1, got {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("columns must be finite, got NaN or infinity")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    n, k = values.shape
    rng = np.random.Generator(np.random.Philox(key=seed))
    sums = np.empty((resamples, k))
    rows = max(1, _CHUNK // (n * k))
    for start in range(0, resamples, rows):
        drawn = rng.integers(n, size=(min(rows, resamples - start), n))
        sums[start : start + len(drawn)] = values[drawn].sum(axis=1)  # (rows, n, k) -> (rows, k)
    return sums


def bootstrap_interval(
    values: ArrayLike, *, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of the mean of `values` (n,): one value per problem."""
    column = np.asarray(values, dtype=np.float64).reshape(-1, 1)
    means = resampled_sums(column, resamples=resamples, seed=seed)[:, 0] / len(column)
    return Interval(float(column.mean()), *_ends(means, confidence))


def paired_difference(
    a: ArrayLike, b: ArrayLike, *, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Mean of `a - b` over problems and its percentile bootstrap interval.

    Args:
        a, b: (n,) results for the same problems in the same order, such as 0 and 1 for wrong and right.
        confidence: share of intervals that should cover the true difference.
    Raises:
        ValueError: the lengths differ, or there is nothing to compare.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"a and b must be paired, got shapes {first.shape} and {second.shape}")
    return bootstrap_interval(first - second, confidence=confidence, resamples=resamples, seed=seed)


def paired_rate_difference(
    a: Sequence[ArrayLike],
    b: Sequence[ArrayLike],
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval | None:
    """Difference of two rates whose denominators vary with the problems drawn, such as shares of right
    retries.

    Two models retry different problems, because each retries what it got wrong. Problems are drawn whole, and
    each draw gives `sum(a[0]) / sum(a[1]) - sum(b[0]) / sum(b[1])`.

    Args:
        a, b: two (n,) arrays each: numerator and denominator per problem.
    Returns:
        None if one of the denominators is 0 over all problems. Draws in which one is 0 are left out.
    """
    columns = np.stack([np.asarray(part, dtype=np.float64) for part in (*a, *b)], axis=1)  # (n, 4)
    total = columns.sum(axis=0)
    if total[1] == 0 or total[3] == 0:
        return None
    sums = resampled_sums(columns, resamples=resamples, seed=seed)
    sums = sums[(sums[:, 1] > 0) & (sums[:, 3] > 0)]
    if not len(sums):
        return None
    mean = total[0] / total[1] - total[2] / total[3]
    return Interval(float(mean), *_ends(sums[:, 0] / sums[:, 1] - sums[:, 2] / sums[:, 3], confidence))


def wilson_interval(successes: int, count: int, *, confidence: float = 0.95) -> Interval:
    """Share of successes with Wilson's score interval. It stays inside [0, 1] and has a width even at 0 or 1.

    Raises:
        ValueError: `count` is 0, or `successes` is not between 0 and `count`.
    """
    if count < 1 or not 0 <= successes <= count:
        raise ValueError(
            f"successes must be between 0 and count, and count at least 1, got {successes} of {count}"
        )
    z = NormalDist().inv_cdf(0.5 + _checked(confidence) / 2)
    share, spread = successes / count, z * z / count
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * (share * (1 - share) / count + spread / (4 * count)) ** 0.5
    # The ends at 0 and at count are exact; rounding would leave them 1e-17 outside.
    low = 0.0 if successes == 0 else centre - half
    return Interval(share, low, 1.0 if successes == count else centre + half)


def _ends(draws: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    tail = (1 - _checked(confidence)) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def _checked(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    return confidence
