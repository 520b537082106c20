"""Attention in bfloat16 on a CPU has a backward pass of its own: compared with float64 and with torch's."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from grpo.model.attention import attention


def inputs(sequences=2, heads=6, kv_heads=3, queries=9, keys=14, size=16, seed=0):
    """q, k, v and the gradient of the result, bfloat16; v is a transposed view, as the decoder's are."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).bfloat16()

    v = normal(sequences, keys, kv_heads, size).transpose(1, 2)
    q, dout = (normal(sequences, heads, queries, size) for _ in range(2))
    return q, normal(sequences, kv_heads, keys, size), v, dout


def gradients(function, q, k, v, dout, dtype):
    leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(dtype))]


def relative_errors(results, truth):
    return [((x.double() - t).norm() / t.norm()).item() for x, t in zip(results, truth, strict=True)]


def branch_mask(queries, keys):
    """Every query sees the shared keys, and causally its own."""
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


@pytest.mark.parametrize("kv_heads", [6, 3, 1])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_as_near_to_float64_as_torchs(kv_heads, causal):
    keys = 9 if causal else 14
    data = inputs(kv_heads=kv_heads, keys=keys)
    mask = None if causal else branch_mask(9, keys)

    def torchs(q, k, v):
        return scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True)

    truth = gradients(torchs, *data, torch.float64)
    ours = gradients(lambda q, k, v: attention(q, k, v, mask), *data, torch.bfloat16)
    assert [x.dtype for x in ours] == [torch.bfloat16] * 4
    theirs = relative_errors(gradients(torchs, *data, torch.bfloat16), truth)
    for error, other in zip(relative_errors(ours, truth), theirs, strict=True):
        assert error < 2.0**-6 and error < 4 * other, (error, other)


def test_what_a_query_does_not_see_gets_no_gradient():
    q, k, v, dout = inputs()
    mask = branch_mask(9, 14)
    mask[:, 3] = False
    _, dq, dk, dv = gradients(lambda q, k, v: attention(q, k, v, mask), q, k, v, dout, torch.bfloat16)
    assert not dk[:, :, 3].any() and not dv[:, :, 3].any()
    assert dq.isfinite().all() and dk[:, :, 2].any() and dv[:, :, 2].any()


def test_sequences_do_not_meet():
    """The gradient of one sequence is the same, bit by bit, whatever the other holds."""
    data = inputs()
    changed = [x.clone() for x in data]
    for x in changed:
        x[1] *= 2
    mask = branch_mask(9, 14)
    one, other = (
        gradients(lambda q, k, v: attention(q, k, v, mask), *tensors, torch.bfloat16)
        for tensors in (data, changed)
    )
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a[0], b[0]) and not torch.equal(a[1], b[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_types_are_torchs(dtype):
    data = inputs()
    mask = branch_mask(9, 14)
    ours = gradients(lambda q, k, v: attention(q, k, v, mask), *data, dtype)
    theirs = gradients(
        lambda q, k, v: scaled_dot_product_attention(q, k, v, mask, enable_gqa=True), *data, dtype
    )
    assert all(map(torch.equal, ours, theirs))
