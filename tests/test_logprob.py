"""Tiled log-probs and entropies against log_softmax: values, gradients, masks, -inf, rounding, memory."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo import logprob
from grpo.logprob import linear_logprob, selected_logprob


def truth(logits, ids, temperature=1.0, softcap=None):
    """(logprobs, entropy) by log_softmax, differentiable twice, in the dtype of the logits."""
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    full = torch.log_softmax(logits / temperature, -1)
    entropy = -torch.where(full == -math.inf, 0.0, full.exp() * full).sum(-1)
    return full.gather(-1, ids[:, None])[:, 0], entropy


def data(m, h, v, dtype=torch.float64, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(m, h, generator=generator, dtype=torch.float64)
    weight = scale * torch.randn(v, h, generator=generator, dtype=torch.float64)
    ids = torch.randint(v, (m,), generator=generator)
    upstream = torch.randn(2, m, generator=generator, dtype=torch.float64)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), ids, upstream


def gradients(outputs, upstream, inputs):
    pairs = [(o, u) for o, u in zip(outputs, upstream, strict=True) if o is not None]
    upstream = [u.to(o.dtype) for o, u in pairs]
    return torch.autograd.grad([o for o, _ in pairs], inputs, upstream, retain_graph=True)


# One row and column; sizes that no tile divides (252, 507, 123); tiles of one column, ragged, of everything.
@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from([(1, 1, 1), (252, 7, 123), (123, 16, 507), (507, 3, 252), (0, 4, 9)]),
    tile=st.sampled_from([(1, 1), (50, 1000), (2048, 1 << 20), (123, 997)]),
    temperature=st.sampled_from([1.0, 0.6]),
    softcap=st.sampled_from([None, 2.0]),
    entropy=st.booleans(),
)
def test_equals_log_softmax(shape, tile, temperature, softcap, entropy):
    if tile == (1, 1):  # one product per element: small shapes only
        shape = tuple(min(n, 9) for n in shape)
    hidden, weight, ids, upstream = data(*shape)
    options = {"temperature": temperature, "softcap": softcap}
    logits = hidden @ weight.T
    right = truth(logits, ids, **options)
    right = right if entropy else (right[0], None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprob, "TILE_ROWS", tile[0])
        patch.setattr(logprob, "TILE_ELEMENTS", tile[1])
        tiled = linear_logprob(hidden, weight, ids, **options, entropy=entropy)
        selected = selected_logprob(logits, ids, **options, entropy=entropy)
        for ours in (tiled, selected):
            for a, b in zip(ours, right, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
            expected = gradients(right, upstream, (hidden, weight))
            for a, b in zip(gradients(ours, upstream, (hidden, weight)), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradcheck(softcap, monkeypatch):
    monkeypatch.setattr(logprob, "TILE_ELEMENTS", 12)  # tiles of two columns, the last of one
    hidden, weight, ids, _ = data(6, 3, 7)
    mask = torch.tensor([True, False, True, True, True, True])
    options = {"mask": mask, "temperature": 0.7, "softcap": softcap, "entropy": True}
    assert torch.autograd.gradcheck(lambda h, w: linear_logprob(h, w, ids, **options), (hidden, weight))
    logits = (hidden @ weight.T).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: selected_logprob(x, ids, **options), (logits,))


@pytest.mark.parametrize("function", ["linear", "selected"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_masked_rows_are_never_read(function, poison):
    hidden, weight, ids, upstream = data(12, 5, 40, torch.float32)
    mask = torch.arange(12) % 3 != 1
    if function == "linear":
        inputs, call = (hidden, weight), lambda x, i, m: linear_logprob(x, weight, i, mask=m, entropy=True)
    else:
        inputs = ((hidden @ weight.T).detach().requires_grad_(),)
        call = lambda x, i, m: selected_logprob(x, i, mask=m, entropy=True)  # noqa: E731
    clean = call(inputs[0], ids, mask)
    expected = gradients(clean, upstream, inputs)
    dirty = inputs[0].detach().clone()
    dirty[~mask] = poison
    dirty.requires_grad_()
    outputs = call(dirty, ids.masked_fill(~mask, -1), mask)
    for ours, right in zip(outputs, clean, strict=True):
        assert torch.equal(ours, right) and (ours[~mask] == 0).all()
    # Upstream gradients of masked rows are not read either.
    upstream[:, ~mask] = poison
    found = gradients(outputs, upstream, (dirty, *inputs[1:]))
    for ours, right in zip(found, expected, strict=True):
        assert torch.equal(ours, right)
    assert (found[0][~mask] == 0).all()


def test_everything_masked_gives_zero():
    hidden, weight, _, upstream = data(4, 3, 5, torch.float32)
    outputs = linear_logprob(hidden, weight, torch.full((4,), -1), mask=torch.zeros(4, dtype=torch.bool))
    assert torch.equal(outputs[0], torch.zeros(4)) and outputs[1] is None
    for gradient in gradients(outputs, upstream, (hidden, weight)):
        assert (gradient == 0).all()


@pytest.mark.parametrize("elements", [1 << 20, 64])
def test_entropy_and_gradients_with_minus_infinity(elements, monkeypatch):
    monkeypatch.setattr(logprob, "TILE_ELEMENTS", elements)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 33, generator=generator, dtype=torch.float64)
    logits[0, 5:9] = -math.inf
    logits[1, :32] = -math.inf  # one column left: entropy 0
    logits[2, 16:] = -math.inf  # whole tiles
    logits.requires_grad_()
    ids = torch.tensor([0, 32, 3, 9])
    logprobs, entropy = selected_logprob(logits, ids, entropy=True)
    right, right_entropy = truth(logits, ids)
    assert entropy.isfinite().all() and entropy[1] == 0 and logprobs[1] == 0
    torch.testing.assert_close(logprobs, right)
    torch.testing.assert_close(entropy, right_entropy)
    (gradient,) = torch.autograd.grad(logprobs.sum() + entropy.sum(), logits)
    assert gradient.isfinite().all() and (gradient[logits == -math.inf] == 0).all()
    # The rows without -inf, against autograd; its own gradient of the others would be NaN.
    (right_gradient,) = torch.autograd.grad(right[3] + right_entropy[3], logits)
    torch.testing.assert_close(gradient[3], right_gradient[3])


def test_columns_of_minus_infinity_from_the_weight(monkeypatch):
    """Tiles in which every logit is -inf, first and in the middle: what a padded vocabulary looks like."""
    monkeypatch.setattr(logprob, "TILE_ELEMENTS", 8)
    hidden = torch.rand(4, 3, dtype=torch.float64) + 0.1
    weight = torch.randn(9, 3, dtype=torch.float64)
    weight[[0, 1, 4, 5]] = -math.inf
    ids = torch.tensor([2, 3, 6, 8])
    logprobs, entropy = linear_logprob(hidden, weight, ids, entropy=True)
    torch.testing.assert_close((logprobs, entropy), truth(hidden @ weight.T, ids))


@pytest.mark.parametrize("offset", [1000.0, -1000.0])
def test_logits_far_from_zero(offset):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(20, 507, generator=generator).mul_(8).round_().div_(8)  # exact after the shift
    ids = torch.randint(507, (20,), generator=generator)
    shifted = selected_logprob(logits + offset, ids, entropy=True)
    for ours, right in zip(shifted, selected_logprob(logits, ids, entropy=True), strict=True):
        assert torch.equal(ours, right)


def test_peaked_rows_never_exceed_zero():
    hidden, weight, _, _ = data(123, 16, 507, torch.float32, scale=20.0)
    ids = (hidden @ weight.T).argmax(1)
    logprobs, entropy = linear_logprob(hidden, weight, ids, entropy=True)
    assert (logprobs <= 0).all() and (logprobs == 0).any() and (entropy > -1e-6).all()


# The error budget: on the same rounded inputs, at most twice as far from float64 as PyTorch's own operations.
# 252 x 64 x 507 in tiles of 50 rows and 20 columns makes 26 chunks of a dhidden row, six of a dweight row.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_most_twice_pytorchs_error(dtype, monkeypatch):
    monkeypatch.setattr(logprob, "TILE_ROWS", 50)
    monkeypatch.setattr(logprob, "TILE_ELEMENTS", 1000)
    hidden, weight, ids, upstream = data(252, 64, 507, dtype, scale=0.3)
    exact_inputs = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact = truth(exact_inputs[0] @ exact_inputs[1].T, ids, 0.9)
    eager = truth((hidden @ weight.T).float(), ids, 0.9)
    ours = linear_logprob(hidden, weight, ids, temperature=0.9, entropy=True)
    assert ours[0].dtype == ours[1].dtype == torch.float32
    exact += gradients(exact, upstream, exact_inputs)
    eager += gradients(eager, upstream, (hidden, weight))
    ours += gradients(ours, upstream, (hidden, weight))
    for name, x, y, z in zip(("logprob", "entropy", "dhidden", "dweight"), ours, eager, exact, strict=True):
        for norm in (torch.Tensor.norm, lambda e: e.abs().max()):
            assert norm(x - z) <= 2 * norm(y - z), name


def test_weight_gradient_error_does_not_grow_with_chunks(monkeypatch):
    hidden, weight, ids, upstream = data(512, 32, 64, torch.bfloat16, scale=0.3)
    exact_inputs = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact = gradients(truth(exact_inputs[0] @ exact_inputs[1].T, ids)[:1], upstream[:1], exact_inputs)[1]
    errors = {}
    for rows in (512, 64, 4):
        monkeypatch.setattr(logprob, "TILE_ROWS", rows)
        outputs = linear_logprob(hidden, weight, ids)[:1]
        errors[rows] = (gradients(outputs, upstream[:1], (hidden, weight))[1] - exact).norm()
    assert errors[4] < 1.5 * errors[512] and errors[64] < 1.5 * errors[512]


def test_gradient_of_a_nearly_certain_token():
    logits = torch.tensor([[math.log(0.999 / 0.001), 0.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(selected_logprob(logits, torch.tensor([0]))[0], logits)
    torch.testing.assert_close(gradient, torch.tensor([[0.001, -0.001]]), rtol=2e-4, atol=0)


def test_rows_without_upstream_gradient_are_skipped():
    hidden, weight, ids, _ = data(6, 3, 7, torch.float32)
    logprobs, _ = linear_logprob(hidden, weight, ids)
    upstream = torch.tensor([0.0, 1.0, 0.0, -2.0, 0.0, 0.5])
    with_all = torch.autograd.grad(logprobs, (hidden, weight), upstream)
    kept = upstream != 0
    alone, _ = linear_logprob(hidden[kept], weight, ids[kept])
    for ours, right in zip(
        with_all, torch.autograd.grad(alone, (hidden, weight), upstream[kept]), strict=True
    ):
        assert torch.equal(ours, right)


def test_only_the_gradients_asked_for():
    hidden, weight, ids, _ = data(6, 3, 7)
    linear_logprob(hidden.detach(), weight, ids)[0].sum().backward()
    linear_logprob(hidden, weight.detach(), ids)[0].sum().backward()
    right = truth(hidden @ weight.T, ids)[0].sum()
    torch.testing.assert_close((hidden.grad, weight.grad), torch.autograd.grad(right, (hidden, weight)))


def test_second_derivatives_are_refused():
    hidden, weight, ids, _ = data(2, 3, 5)
    logprobs, _ = linear_logprob(hidden, weight, ids)
    with pytest.raises(RuntimeError, match="differentiable once, not twice"):
        torch.autograd.grad(logprobs.sum(), hidden, create_graph=True)


def test_the_largest_temporary_is_a_tile(monkeypatch):
    """No allocation between the (M, H) and (V, H) tensors and the (M, V) logits: a profile of both passes."""
    monkeypatch.setattr(logprob, "TILE_ELEMENTS", 4096)
    hidden, weight, ids, _ = data(256, 8, 1024, torch.float32)
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_logprob(hidden, weight, ids, entropy=True)[0].sum().backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest <= max(
        2 * 4096 * 4, weight.numel() * 4
    )  # two tiles in one buffer; the (M, V) logits take 1 MB


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(2, 4)}, r"hidden must be \(M, H\) and weight \(V, H\), got \(2, 4\) and"),
        ({"hidden": torch.zeros(2, 3).bfloat16()}, "same dtype, got torch.bfloat16 and torch.float32"),
        ({"ids": torch.zeros(3, dtype=torch.int64)}, r"ids must be \(2,\) int64, got \(3,\) torch.int64"),
        ({"ids": torch.zeros(2)}, r"ids must be \(2,\) int64, got \(2,\) torch.float32"),
        ({"ids": torch.tensor([0, 5])}, r"ids must be in \[0, 5\) where mask is True, got 0 to 5"),
        ({"mask": torch.ones(2)}, r"mask must be \(2,\) bool, got \(2,\) torch.float32"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"softcap": -1.0}, "softcap must be positive or None, got -1.0"),
    ],
)
def test_errors_name_the_argument(changes, message):
    arguments = {
        "hidden": torch.zeros(2, 3),
        "weight": torch.zeros(5, 3),
        "ids": torch.tensor([0, 4]),
    } | changes
    with pytest.raises(ValueError, match=message):
        linear_logprob(**arguments)
