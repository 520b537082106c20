"""Intervals against exact enumeration, closed forms and their promised coverage."""

from itertools import product

import numpy as np
import pytest

from grpo.evaluate import statistics
from grpo.evaluate.statistics import (
    bootstrap_interval,
    paired_difference,
    paired_rate_difference,
    resampled_sums,
    wilson_interval,
)


def exact_quantiles(values, tails=(0.025, 0.975)):
    """Quantiles of the mean over all n**n equally likely resamples."""
    means = [sum(draw) / len(values) for draw in product(values, repeat=len(values))]
    return np.quantile(means, tails, method="inverted_cdf")


@pytest.mark.parametrize("values", [[0.0, 1.0, 1.0], [0.0, 0.5, 2.0, 7.0], [1.0, 0.0, 0.0, 1.0, 1.0]])
def test_bootstrap_of_a_few_values_equals_the_enumeration_of_all_resamples(values):
    interval = bootstrap_interval(values, resamples=40_000)
    assert interval.mean == pytest.approx(np.mean(values))
    assert [interval.low, interval.high] == pytest.approx(exact_quantiles(values), abs=1e-12)


def test_resampled_sums_have_the_mean_and_the_variance_of_the_bootstrap_distribution():
    values = np.random.default_rng(0).normal(size=(50, 1))
    sums = resampled_sums(values, resamples=40_000)[:, 0]
    error = values.std() * np.sqrt(50)  # standard deviation of a sum of 50 draws
    assert sums.mean() == pytest.approx(values.sum(), abs=5 * error / np.sqrt(40_000))
    assert sums.std() == pytest.approx(error, rel=0.02)


def test_columns_of_a_row_stay_together():
    column = np.arange(20.0)
    sums = resampled_sums(np.stack([column, 3 * column, np.ones(20)], axis=1), resamples=500)
    assert np.array_equal(sums[:, 1], 3 * sums[:, 0])
    assert np.array_equal(sums[:, 2], np.full(500, 20.0))


def test_draws_do_not_depend_on_the_chunks_that_bound_memory(monkeypatch):
    values = np.random.default_rng(1).integers(0, 2, size=(37, 2))
    whole = resampled_sums(values, resamples=501, seed=3)
    monkeypatch.setattr(statistics, "_CHUNK", 1000)  # 13 resamples at a time, and a ragged last chunk
    assert np.array_equal(resampled_sums(values, resamples=501, seed=3), whole)
    assert not np.array_equal(resampled_sums(values, resamples=501, seed=4), whole)


def test_interval_covers_the_true_difference_about_as_often_as_promised():
    rng, inside, rounds = np.random.default_rng(7), 0, 400
    for seed in range(rounds):
        before = rng.random(80) < 0.3
        after = np.where(
            before, rng.random(80) < 0.9, rng.random(80) < 0.4
        )  # correlated, as on equal problems
        interval = paired_difference(after, before, resamples=400, seed=seed)
        inside += interval.low <= (0.3 * 0.9 + 0.7 * 0.4) - 0.3 <= interval.high
    # 95% less what percentiles of 80 problems lose; 400 rounds have a standard error of 1.1 points.
    assert 0.91 <= inside / rounds <= 0.98


def test_pairing_narrows_the_interval_of_correlated_results():
    rng = np.random.default_rng(2)
    before = (rng.random(200) < 0.5).astype(float)
    after = before.copy()
    after[:10] = 1.0
    paired = paired_difference(after, before)
    unpaired = paired_difference(after, rng.permutation(before))
    assert paired.high - paired.low < 0.5 * (unpaired.high - unpaired.low)


def test_equal_results_differ_by_exactly_nothing():
    assert paired_difference([1, 0, 1], [1, 0, 1]) == (0.0, 0.0, 0.0)


def test_rate_difference_with_constant_denominators_is_the_paired_difference():
    rng = np.random.default_rng(3)
    a, b, ones = rng.integers(0, 2, 60), rng.integers(0, 2, 60), np.ones(60)
    assert paired_rate_difference((a, ones), (b, ones)) == pytest.approx(paired_difference(a, b), abs=1e-12)


def test_rate_difference_counts_only_where_something_was_tried():
    interval = paired_rate_difference(
        ([1, 0, 0, 0], [1, 1, 0, 0]), ([0, 0, 1, 1], [0, 1, 1, 1]), resamples=200
    )
    assert interval is not None and interval.mean == pytest.approx(1 / 2 - 2 / 3)
    assert interval.low <= interval.mean <= interval.high
    assert paired_rate_difference(([0, 0], [0, 0]), ([1, 0], [1, 1])) is None


def test_wilson_interval_equals_published_values():
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3.
    for successes, count, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
    ]:
        interval = wilson_interval(successes, count)
        assert interval.mean == successes / count
        assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(29, 29).high == 1.0
    assert wilson_interval(29, 29).low == pytest.approx(0.8830, abs=5e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_interval([]), "n at least 1"),
        (lambda: bootstrap_interval([1.0, float("nan")]), "finite"),
        (lambda: bootstrap_interval([1.0], resamples=0), "resamples must be at least 1, got 0"),
        (lambda: bootstrap_interval([1.0], confidence=95), "confidence must be between 0 and 1, got 95"),
        (lambda: paired_difference([1, 0], [1]), "must be paired"),
        (lambda: wilson_interval(1, 0), "got 1 of 0"),
        (lambda: wilson_interval(5, 4), "got 5 of 4"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
