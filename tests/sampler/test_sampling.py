"""The sampler's noise and its choice of tokens, against the plain float64 definitions."""

import numpy as np
import pytest
import torch

from grpo.sampler.sampling import BLOCK, choose, uniforms


def reference(logits, noise, temperature=1.0, allowed=None):
    """Inverse of the whole running sum in float64: the first token above, and the log-softmax."""
    logits = logits.double() / temperature
    weights = logits.softmax(0)
    if allowed is not None:
        weights = weights * allowed
    running = weights.cumsum(0)
    tokens = (running <= noise * running[-1]).sum(0)
    return tokens, logits.log_softmax(0), running


# Below one block, exactly one, ragged tails of 1 and 44, several whole blocks.
@pytest.mark.parametrize("vocabulary", [5, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK + 44])
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_matches_the_full_running_sum(vocabulary, temperature):
    generator = torch.Generator().manual_seed(vocabulary)
    count = 2000
    logits = torch.randn(vocabulary, 1, generator=generator).mul(3).repeat(1, count)
    noise = torch.rand(count, generator=generator, dtype=torch.float64)
    expected, log_softmax, running = reference(logits, noise, temperature)
    tokens, logprobs = choose(logits.clone(), noise, temperature=temperature)
    torch.testing.assert_close(logprobs, log_softmax.gather(0, tokens[None])[0], atol=2e-6, rtol=0)
    # Where the token is another one, the uniform is within float32 rounding of a boundary of the sums.
    differs = tokens != expected
    assert differs.float().mean() < 0.002
    gap = (running / running[-1] - noise).abs().amin(0)
    assert (gap[differs] < 1e-6).all()
    assert tokens.min() >= 0 and tokens.max() < vocabulary


def test_an_even_grid_of_uniforms_gives_the_distribution():
    count = 200_000  # a grid: each token's share is its probability to within one or two grid points
    logits = torch.linspace(-4, 2, 300)[:, None]
    noise = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    shares = torch.zeros(300, dtype=torch.float64)
    for part in noise.split(5000):
        tokens, _ = choose(logits.repeat(1, len(part)), part)
        shares += torch.bincount(tokens, minlength=300) / count
    assert (shares - logits[:, 0].double().softmax(0)).abs().max() < 2 / count


def test_never_takes_a_token_of_probability_zero():
    logits = torch.full((3 * BLOCK + 10, 6), -float("inf"))
    logits[[BLOCK + 3, 2 * BLOCK + 7]] = 0.0
    edge = np.nextafter(1.0, 0.0)
    noise = torch.tensor([0.0, 1e-300, 0.25, 0.5, 0.75, edge], dtype=torch.float64)
    tokens, logprobs = choose(logits, noise)
    first, second = BLOCK + 3, 2 * BLOCK + 7
    assert tokens.tolist() == [first, first, first, second, second, second]
    torch.testing.assert_close(logprobs, torch.full((6,), -np.log(2)), check_dtype=False)


@pytest.mark.parametrize("noise", [0.0, 1 - 2**-53])
def test_underflowing_tails_are_never_taken(noise):
    logits = torch.full((2 * BLOCK + 3, 1), -200.0)  # exp(-200) is 0 in float32
    logits[BLOCK] = 10.0
    tokens, logprobs = choose(logits, torch.tensor([noise], dtype=torch.float64))
    assert tokens.item() == BLOCK and logprobs.item() == 0.0


@pytest.mark.parametrize("shift", [-1000.0, 1000.0])
def test_shifted_logits_change_nothing(shift):
    logits = torch.randn(700, 4).mul(4).round()  # whole numbers, so that the shift is exact
    noise = torch.rand(4, dtype=torch.float64)
    for plain, shifted in zip(choose(logits.clone(), noise), choose(logits + shift, noise), strict=True):
        assert torch.equal(plain, shifted)


def test_greedy_takes_the_largest_and_reports_its_probability_at_temperature():
    logits = torch.randn(513, 9)
    tokens, logprobs = choose(logits.clone(), None, temperature=0.5)
    assert torch.equal(tokens, logits.argmax(0))
    torch.testing.assert_close(logprobs, (logits.double() / 0.5).log_softmax(0).amax(0), atol=1e-6, rtol=0)


PROBABILITIES = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15])


@pytest.mark.parametrize(
    "options, allowed",
    [
        (dict(top_k=1), {1}),
        (dict(top_k=3), {1, 3, 4}),
        (dict(top_k=99), {0, 1, 2, 3, 4}),
        (dict(top_p=0.39), {1}),
        (dict(top_p=0.41), {1, 3}),  # the token that crosses top_p is in
        (dict(top_p=0.84), {1, 3, 4}),
        (dict(top_p=1.0), {0, 1, 2, 3, 4}),
        (dict(top_k=3, top_p=0.8), {1, 3}),  # top-p of what top-k left: 0.7 / 0.85 is above 0.8
        (dict(top_k=2, top_p=0.99), {1, 3}),
    ],
)
def test_top_p_and_top_k_leave_exactly_these(options, allowed):
    count = 1000
    noise = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    logits = PROBABILITIES.log()[:, None].repeat(1, count)
    tokens, logprobs = choose(logits.clone(), noise, **options)
    assert set(tokens.tolist()) == allowed
    kept = torch.tensor([i in allowed for i in range(5)])[:, None]
    expected, log_softmax, _ = reference(logits, noise, allowed=kept)
    assert (tokens != expected).sum() <= len(allowed)  # a grid point on a boundary may fall on either side
    # Log-probs are those of the whole distribution.
    torch.testing.assert_close(logprobs, log_softmax.gather(0, tokens[None])[0], atol=1e-6, rtol=0)


def test_top_k_breaks_ties_by_token_id():
    tokens, _ = choose(torch.zeros(6, 100), torch.rand(100, dtype=torch.float64), top_k=2)
    assert set(tokens.tolist()) == {0, 1}


def test_nan_logits_show():
    logits = torch.zeros(300, 2)
    logits[7, 1] = float("nan")
    _, logprobs = choose(logits, torch.tensor([0.5, 0.5], dtype=torch.float64))
    assert logprobs[0].isfinite() and logprobs[1].isnan()


def test_noise_is_a_function_of_its_key():
    key = (42, 1, 3, 2**62 + 5, 7, 0, 0)
    assert uniforms(key, 8) == uniforms(key, 8)
    assert uniforms(key, 8) == uniforms(key, 20)[:8]
    others = {uniforms((*key[:4], generation, turn, 0), 1)[0] for generation in range(8) for turn in range(3)}
    assert len(others) == 24
    assert all(0 <= u < 1 for u in uniforms(key, 1000))


@pytest.mark.parametrize(
    ("key", "other"),
    [
        ((1,), (1, 0)),
        ((2**32 + 5, 2), (5, 2**33 + 1)),
        ((1, 23), (12, 3)),
        ((0, 1), (1, 0)),
        ((2**200,), (0,)),
    ],
)
def test_different_keys_have_different_noise(key, other):
    assert uniforms(key, 4) != uniforms(other, 4)


def test_the_type_of_a_keys_integers_does_not_matter():
    assert uniforms((np.int64(3), True), 4) == uniforms((3, 1), 4)


def test_noise_keeps_its_values_over_versions():
    # Recorded runs are repeatable only as long as these stay.
    assert uniforms((42, 1, 0, 5, 0, 0, 0), 3) == [
        0.38493043898963486,
        0.42840435354802964,
        0.7313214785397051,
    ]
