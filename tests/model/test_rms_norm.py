"""RMSNorm against torch's own, forward and backward, in all types and for weights per head."""

import pytest
import torch
from torch.nn import functional as F

from grpo.model.decoder import rms_norm

EPS = 1e-5


def inputs(shape, weight_shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x, weight, dy = (
        torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
        for size in (shape, weight_shape, shape)
    )
    return x.requires_grad_(), weight.requires_grad_(), dy


def exact(x, weight):
    """By the definition, in float64."""
    x, weight = x.double(), weight.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


@pytest.mark.parametrize("shapes", [((2, 5, 24), (24,)), ((2, 5, 3, 24), (3, 24)), ((7, 2), (2,))], ids=str)
@pytest.mark.parametrize(
    "dtype, bound", [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2.0**-7)], ids=str
)
def test_value_and_gradients(shapes, dtype, bound):
    x, weight, dy = inputs(*shapes, dtype)
    y = rms_norm(x, weight, EPS)
    right = exact(x, weight)
    found = [y, *torch.autograd.grad(y, (x, weight), dy)]
    expected = [right, *torch.autograd.grad(right, (x, weight), dy.double())]
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        assert (a.double() - b).norm() <= bound * max(b.norm(), 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_and_without_a_graph_the_bits_are_equal(dtype):
    """Or the sampler's log-probs would differ from the learner's; and the input stays as it was."""
    x, weight, _ = inputs((3, 24), (24,), dtype)
    before = x.detach().clone()
    with torch.no_grad():
        plain = rms_norm(x, weight, EPS)
    assert torch.equal(plain, rms_norm(x, weight, EPS)) and torch.equal(x, before)


def test_bfloat16_rounds_as_transformers_does():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, weight, _ = inputs((50, 24), (24,), torch.bfloat16)
    theirs = LlamaRMSNorm(24, EPS)
    theirs.weight = torch.nn.Parameter(weight.detach())
    assert torch.equal(rms_norm(x, weight, EPS), theirs(x))


def test_torchs_fused_operation_agrees():
    """What runs on a GPU."""
    x, weight, _ = inputs((50, 24), (24,), torch.float32)
    torch.testing.assert_close(rms_norm(x, weight, EPS), F.rms_norm(x, (24,), weight, EPS))
