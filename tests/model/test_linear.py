"""Packed weights: the same products, as long as they are entered, and nowhere else."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from grpo.model import decoder
from grpo.model.decoder import Linear, pack_weight, packed_product, packed_weights

WHY = "torch cannot pack this type on this machine"
packs = pytest.mark.skipif(pack_weight(torch.ones(8, 8)) is None, reason=WHY)
packs_bfloat16 = pytest.mark.skipif(pack_weight(torch.ones(8, 8).bfloat16()) is None, reason=WHY)


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=packs), pytest.param(torch.bfloat16, marks=packs_bfloat16)]
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 16, 64, 200])
def test_a_packed_product_is_the_product(dtype, bias, rows):
    torch.manual_seed(0)
    layer = Linear(48, 80, bias=bias).to(dtype)
    x = torch.randn(1, rows, 48).to(dtype)
    truth = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    with torch.inference_mode(), packed_weights(layer):
        assert layer.packed is not None
        packed = layer(x)
    assert packed.shape == truth.shape and packed.dtype == dtype
    # One rounding of the exact result to its type, as for torch's own.
    bound = {torch.float32: 1e-5, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(packed.double(), truth, rtol=bound, atol=1e-5)


@packs
def test_rows_that_lie_with_gaps_or_transposed():
    torch.manual_seed(0)
    weight, x = torch.randn(80, 48), torch.randn(2, 48, 9)
    for view in (x.transpose(1, 2), x.transpose(1, 2)[:, ::2]):
        torch.testing.assert_close(packed_product(view, pack_weight(weight)), F.linear(view, weight))


def test_weights_are_packed_inside_and_nowhere_else():
    model = nn.Sequential(Linear(8, 8), nn.Sequential(Linear(8, 4)))
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    with pytest.raises(KeyboardInterrupt), packed_weights(model):
        raise KeyboardInterrupt
    assert len(layers) == 2 and all(layer.packed is None for layer in layers)
    x = torch.randn(3, 8)
    with torch.inference_mode(), packed_weights(model):
        before = model(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    with torch.inference_mode(), packed_weights(model):
        after = model(x)
    torch.testing.assert_close(after, model(x))
    assert not torch.allclose(after, before)
    model(x).sum().backward()  # the learner's way through the same layers
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_where_nothing_can_be_packed_the_layer_is_torchs(monkeypatch):
    assert pack_weight(torch.ones(4, 4, dtype=torch.float64)) is None
    assert pack_weight(torch.ones(4, 4, device="meta")) is None

    def refuse(*_):
        raise RuntimeError("no such kernel")

    decoder._available.cache_clear()
    monkeypatch.setattr(decoder, "packed_product", refuse)
    try:
        layer, x = Linear(8, 4), torch.randn(3, 8)
        with packed_weights(layer):
            assert layer.packed is None
            torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    finally:
        decoder._available.cache_clear()
