"""The loss against float64 loops for every combination of settings, and the gradients that it promises."""

import itertools
import math

import pytest
import torch

from grpo.loss import BOUND, LEVELS, LOSS_TYPES, grpo_loss

SEQUENCES = [0, 0, 0, 1, 1, 2, 3, 3, 3, 3]  # completion 4 has no token; 2 is entirely masked below
ADVANTAGES = [1.3, -0.7, 0.4, -2.0, 0.9]
MASK = [True, True, False, True, True, False, True, True, True, False]


def tokens(seed=0, spread=0.4):
    """logprobs, old, ref: log-ratios wide enough to reach every clip, one KL in the range of the series."""
    generator = torch.Generator().manual_seed(seed)
    logprobs = -torch.rand(10, generator=generator, dtype=torch.float64) - 0.5
    old = logprobs + spread * torch.randn(10, generator=generator, dtype=torch.float64)
    ref = logprobs + spread * torch.randn(10, generator=generator, dtype=torch.float64)
    ref[3] = logprobs[3] + 0.01
    return logprobs, old, ref


def brute_force(
    logprobs, old, ref, *, loss_type, level, epsilon, epsilon_high, delta, beta, correction, max_length
):
    """The formulas of loss.py, one token at a time; also the weight of each token, for the metrics."""
    high = epsilon if epsilon_high is None else epsilon_high
    counted = [i for i, on in enumerate(MASK) if on]
    total = low = up = kl_sum = ratio_sum = 0.0
    for i in counted:
        sequence, A = SEQUENCES[i], ADVANTAGES[SEQUENCES[i]]
        members = [j for j in counted if SEQUENCES[j] == sequence]
        log_ratio = logprobs[i] - old[i]
        if level == "sequence":
            log_ratio = sum(logprobs[j] - old[j] for j in members) / len(members)
        r = math.exp(log_ratio)
        if loss_type == "cispo":
            value = -min(r, high) * A * logprobs[i]
            up += r > high
        else:
            value = -min((r if delta is None else min(r, delta)) * A, max(min(r, 1 + high), 1 - epsilon) * A)
            low += r < 1 - epsilon and A < 0
            up += r > 1 + high and A > 0
        x = ref[i] - logprobs[i]
        k = (math.exp(x) - x - 1) * (r if correction else 1)
        value += beta * k
        kl_sum, ratio_sum = kl_sum + k, ratio_sum + r
        weights = {"grpo": 1 / len(members) / len(ADVANTAGES), "dr_grpo": 1 / (len(ADVANTAGES) * max_length)}
        total += value * weights.get(loss_type, 1 / len(counted))
    n = len(counted)
    return total, {
        "kl": kl_sum / n,
        "ratio/mean": ratio_sum / n,
        "clip_ratio/low_mean": low / n,
        "clip_ratio/high_mean": up / n,
        "clip_ratio/region_mean": (low + up) / n,
    }


def combinations():
    for loss_type, level, high, delta, beta, correction in itertools.product(
        LOSS_TYPES, ("token", "sequence"), (None, 0.28, 5.0), (None, 1.3, 4.0), (0.0, 0.05), (False, True)
    ):
        if not (loss_type == "cispo" and delta is not None):
            yield loss_type, level, high, delta, beta, correction


def test_equals_loops_for_every_setting():
    logprobs, old, ref = tokens()
    for loss_type, level, high, delta, beta, correction in combinations():
        loss, metrics = grpo_loss(
            logprobs,
            old,
            ref,
            torch.tensor(ADVANTAGES, dtype=torch.float64),
            torch.tensor(SEQUENCES),
            mask=torch.tensor(MASK),
            epsilon_high=high,
            delta=delta,
            beta=beta,
            loss_type=loss_type,
            importance_sampling_level=level,
            use_bias_correction_kl=correction,
            max_completion_length=6,
        )
        expected, expected_metrics = brute_force(
            logprobs.tolist(),
            old.tolist(),
            ref.tolist(),
            loss_type=loss_type,
            level=level,
            epsilon=0.2,
            epsilon_high=high,
            delta=delta,
            beta=beta,
            correction=correction,
            max_length=6,
        )
        assert loss.item() == pytest.approx(expected, rel=1e-9), (loss_type, level, high, delta, beta)
        assert {k: v.item() for k, v in metrics.items()} == pytest.approx(expected_metrics, rel=1e-7)


def call(logprobs, old, ref, rows=None, **options):
    """grpo_loss on some of the ten tokens, all float64."""
    rows = torch.arange(10) if rows is None else torch.tensor(rows, dtype=torch.int64)
    return grpo_loss(
        logprobs[rows],
        None if old is None else old[rows],
        ref[rows],
        torch.tensor(ADVANTAGES, dtype=torch.float64),
        torch.tensor(SEQUENCES)[rows],
        **{"mask": torch.tensor(MASK)[rows], "max_completion_length": 6, "beta": 0.05} | options,
    )


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("correction", [False, True])
def test_gradients_are_those_of_finite_differences(loss_type, level, correction):
    logprobs, old, ref = tokens()
    if loss_type == "cispo":
        # Its ratio carries no gradient, unlike finite differences: keep it at its bound, and out of the KL.
        correction, options = False, {"epsilon_high": 0.2}
    else:
        options = {"delta": 1.5}
    options |= {
        "loss_type": loss_type,
        "importance_sampling_level": level,
        "use_bias_correction_kl": correction,
    }
    logprobs.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: call(x, old, ref, **options)[0], (logprobs,), eps=1e-7)


def test_cispo_gradient_is_the_bounded_ratio_times_the_advantage():
    logprobs, old, ref = tokens()
    logprobs.requires_grad_()
    call(logprobs, old, ref, loss_type="cispo", epsilon_high=1.2, beta=0.0)[0].backward()
    expected = -(logprobs.detach() - old).exp().clamp(max=1.2) * torch.tensor(ADVANTAGES)[SEQUENCES] / 7
    torch.testing.assert_close(logprobs.grad, torch.where(torch.tensor(MASK), expected, 0.0))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo"])
def test_on_policy_gradient_is_the_policy_gradient(loss_type, level):
    logprobs, _, ref = tokens()
    logprobs.requires_grad_()
    loss, metrics = call(logprobs, None, ref, loss_type=loss_type, beta=0.0, importance_sampling_level=level)
    loss.backward()
    advantage = torch.tensor(ADVANTAGES, dtype=torch.float64)[SEQUENCES]
    length = torch.tensor([2, 2, 1, 2, 2, 1, 3, 3, 3, 3], dtype=torch.float64)
    weight = 1 / (5 * length) if loss_type == "grpo" else torch.tensor(1 / 7, dtype=torch.float64)
    torch.testing.assert_close(logprobs.grad, torch.where(torch.tensor(MASK), -advantage * weight, 0.0))
    assert metrics["ratio/mean"].item() == pytest.approx(1.0)
    assert metrics["clip_ratio/region_mean"] == 0


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_micro_batches_add_up(loss_type, level):
    logprobs, old, ref = tokens()
    logprobs.requires_grad_()
    options = {"loss_type": loss_type, "importance_sampling_level": level}
    options |= {"num_loss_tokens": 7, "num_sequences": 5}
    loss, metrics = call(logprobs, old, ref, **options)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    # Sequences stay whole: 1 + 0, then 3, then the one that is masked, then nothing at all.
    parts = [call(logprobs, old, ref, rows, **options) for rows in ([3, 4, 0, 1, 2], [9, 8, 7, 6], [5], [])]
    torch.testing.assert_close(sum(part for part, _ in parts), loss, rtol=1e-12, atol=0)
    for name, value in metrics.items():
        torch.testing.assert_close(sum(m[name] for _, m in parts), value, rtol=1e-12, atol=0)
    (split,) = torch.autograd.grad(sum(part for part, _ in parts), logprobs)
    torch.testing.assert_close(split, gradient, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_masked_tokens_count_nowhere(loss_type, level):
    options = {"loss_type": loss_type, "importance_sampling_level": level}
    clean = tokens()
    clean[0].requires_grad_()
    loss, metrics = call(*clean, **options)
    (gradient,) = torch.autograd.grad(loss, clean[0])
    masked = ~torch.tensor(MASK)
    assert (gradient[masked] == 0).all() and (gradient[~masked] != 0).any()
    for poison in (math.nan, math.inf, -1e30):
        dirty = [x.detach().clone().masked_fill_(masked, poison) for x in clean]
        dirty[0].requires_grad_()
        poisoned, poisoned_metrics = call(*dirty, **options)
        assert torch.equal(poisoned, loss) and poisoned_metrics == metrics
        assert torch.equal(torch.autograd.grad(poisoned, dirty[0])[0], gradient)


@pytest.mark.parametrize("count", [0, 10])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_nothing_counted_gives_exactly_zero(loss_type, count):
    logprobs = torch.full((count,), math.nan, requires_grad=True)
    loss, metrics = grpo_loss(
        logprobs,
        None,
        torch.zeros(count),
        torch.ones(2),
        torch.zeros(count, dtype=torch.int64),
        mask=torch.zeros(count, dtype=torch.bool),
        loss_type=loss_type,
        max_completion_length=1,
    )
    loss.backward()
    assert loss == 0 and all(value == 0 for value in metrics.values())
    assert torch.equal(logprobs.grad, torch.zeros(count))


@pytest.mark.parametrize("x", [1e-6, 1e-4, 0.01, 0.0299, 0.0301, 0.1, 1.0, -1e-6, -0.0299, -0.0301, -3.0])
def test_k3_keeps_its_digits_in_float32(x):
    logprobs, ref = torch.zeros(1, requires_grad=True), torch.tensor([x])
    loss, metrics = grpo_loss(logprobs, None, ref, torch.zeros(1), torch.tensor([0]), beta=1.0)
    x = ref.double().item()
    # Up to 0.03 the series is exact to rounding; above it expm1(x) - x loses the digits that x is larger by.
    assert metrics["kl"].item() == pytest.approx(math.expm1(x) - x if abs(x) > 1e-3 else x * x / 2, rel=2e-5)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    # At r = 1 the correction adds k itself to the gradient -(exp(x) - 1).
    assert gradient.item() == pytest.approx(-math.expm1(x) + metrics["kl"].item(), rel=1e-4)


@pytest.mark.parametrize("correction", [False, True])
def test_expected_kl_gradient_by_enumeration(correction):
    """Over a vocabulary of five, every token with its probability: which KL's gradient does k3 give?"""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(5, generator=generator, dtype=torch.float64).log_softmax(0)
    logprobs = logits.log_softmax(0)
    # Probabilities cannot be token counts, so each token is its own call.
    expected = 0
    for token in range(5):
        loss, _ = grpo_loss(
            logprobs[token : token + 1],
            None,
            ref[token : token + 1],
            torch.zeros(1, dtype=torch.float64),
            torch.tensor([0]),
            beta=1.0,
            use_bias_correction_kl=correction,
        )
        expected = expected + logprobs[token].exp().detach() * loss
    (gradient,) = torch.autograd.grad(expected, logits, retain_graph=True)
    reverse = (logprobs.exp() * (logprobs - ref)).sum()  # KL(policy || ref)
    forward = (ref.exp() * (ref - logprobs)).sum()  # KL(ref || policy)
    right, wrong = (reverse, forward) if correction else (forward, reverse)
    torch.testing.assert_close(gradient, torch.autograd.grad(right, logits, retain_graph=True)[0])
    assert not torch.allclose(gradient, torch.autograd.grad(wrong, logits)[0], rtol=0.1)


EXTREMES = [0.0, -1.0, -101.0, -1e4, -math.inf]  # -inf: a token of probability 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", LEVELS)
def test_everything_is_finite_for_extreme_inputs(level, dtype):
    """All triples of extreme log-probs, in completions of five tokens with advantages from -1000 to 1000."""
    rows = list(itertools.product([0.0, 1.0, -1.0, 1e3, -1e3], EXTREMES, EXTREMES, EXTREMES))
    advantages, logprobs, old, ref = torch.tensor(rows, dtype=dtype).T.contiguous()
    logprobs.requires_grad_()
    for loss_type, at, high, delta, beta, correction in combinations():
        if at != level:
            continue
        loss, metrics = grpo_loss(
            logprobs,
            old,
            ref,
            advantages[::5],
            torch.arange(len(rows)) // 5,
            epsilon_high=high,
            delta=delta,
            beta=beta,
            loss_type=loss_type,
            importance_sampling_level=level,
            use_bias_correction_kl=correction,
            max_completion_length=6,
        )
        (gradient,) = torch.autograd.grad(loss, logprobs)
        assert loss.isfinite() and gradient.isfinite().all(), (loss_type, high, delta, beta, correction)
        assert all(value.isfinite() for value in metrics.values()), (loss_type, metrics)


@pytest.mark.parametrize("correction", [False, True])
def test_the_kl_pulls_back_from_any_distance(correction):
    """Its gradient has the sign of logprob - ref; a bound with gradient 0 would let a distant policy go."""
    near = [-BOUND + 0.5, -BOUND, -BOUND - 0.5, -88.0, -89.0]  # float32's exp overflows above 88.7
    rows = list(itertools.product(EXTREMES + near, repeat=3))
    logprobs, old, ref = torch.tensor(rows).T.contiguous()
    logprobs.requires_grad_()
    loss, metrics = grpo_loss(
        logprobs,
        old,
        ref,
        torch.zeros(len(rows)),
        torch.arange(len(rows)),
        beta=1.0,
        use_bias_correction_kl=correction,
    )
    (gradient,) = torch.autograd.grad(loss, logprobs)
    apart = logprobs.detach().clamp(min=-1e4) - ref.clamp(min=-1e4)
    assert torch.equal(gradient.sign(), apart.sign())
    assert loss == metrics["kl"] > 1


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_distant_token_keeps_the_gradient_at_the_bound(advantage):
    """A worse token that has become far likelier is still pushed down; clipping ends other gradients."""
    logprobs = torch.tensor([-1.0], requires_grad=True)
    arguments = (torch.tensor([-101.0]), None, torch.tensor([advantage]), torch.tensor([0]))
    loss, metrics = grpo_loss(logprobs, *arguments, beta=0)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    ratio = math.exp(BOUND)
    assert metrics["ratio/mean"].item() == pytest.approx(ratio)
    assert loss.item() == pytest.approx(-1.2 if advantage > 0 else ratio)
    assert gradient.item() == pytest.approx(0.0 if advantage > 0 else ratio)


def test_a_log_prob_that_is_nan_is_not_hidden():
    for column in range(3):
        logprobs, old, ref = torch.full((3, 2), -1.0).unbind()
        (logprobs, old, ref)[column][1] = math.nan
        loss, _ = grpo_loss(logprobs, old, ref, torch.ones(1), torch.zeros(2, dtype=torch.int64))
        assert loss.isnan()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "ppo"}, "loss_type must be one of grpo, dapo, bnpo, dr_grpo, cispo, got 'ppo'"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level must be one of token, sequence"),
        ({"loss_type": "cispo", "delta": 4.0}, "delta must be None with loss_type cispo"),
        ({"loss_type": "dr_grpo", "max_completion_length": None}, "max_completion_length must be at least 1"),
        ({"epsilon": 1.5}, r"epsilon must be in \[0, 1\), got 1.5"),
        ({"delta": 0.0}, "delta must be positive or None, got 0.0"),
        ({"mask": torch.ones(10)}, "mask must be bool, got torch.float32"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, r"mask must be \(10,\), as logprobs, got \(3,\)"),
    ],
)
def test_errors_name_the_argument(options, message):
    with pytest.raises(ValueError, match=message):
        call(*tokens(), **options)


def test_a_reference_is_required_with_beta():
    arguments = (torch.zeros(1), None, None, torch.zeros(1), torch.tensor([0]))
    with pytest.raises(ValueError, match="ref_logprobs must be given"):
        grpo_loss(*arguments)
    assert "kl" not in grpo_loss(*arguments, beta=0)[1]
