"""Products that are not rounded before they reach the softmax: the branch of CUDA, run on a CPU."""

import pytest
import torch
from test_engine import STOPS, make_model

from grpo.sampler import engine, kv_cache
from grpo.sampler.engine import Sampler
from grpo.sampler.kv_cache import CachedAttention, RowSpan, SlotCache

HEADS, KV_HEADS, SIZE = 6, 2, 64


@pytest.fixture
def cuda_products(monkeypatch):
    """`torch.mm` and `torch.bmm` with out_dtype, which PyTorch has on CUDA only: float32 sums and results."""

    def with_dtype(multiply):
        return lambda a, b, out_dtype: multiply(a.to(out_dtype), b.to(out_dtype))

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("mm.dtype", with_dtype(torch.mm), "CPU")
        library.impl("bmm.dtype", with_dtype(torch.bmm), "CPU")
        for module in (kv_cache, engine):
            monkeypatch.setattr(module, "unrounded", lambda _, dtype: dtype == torch.bfloat16)
        yield


def normal(*shape, seed, scale=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(torch.bfloat16)


def test_logits_are_not_rounded(cuda_products):
    """Log-probs of the tokens with logits from 16 to 32, against float64."""
    model = make_model(hidden_size=256).to(torch.bfloat16)
    weight, hidden = model.output_weight.detach(), normal(64, 256, seed=1, scale=1.5)
    truth = weight.double() @ hidden.double().T
    counted = (truth > 16) & (truth < 32)
    assert counted.sum() > 100

    def errors(logits):
        return (logits.double().log_softmax(0) - truth.log_softmax(0))[counted].abs()

    ours = Sampler(model, stop_token_ids=STOPS)._logits(hidden, None)
    assert ours.dtype == torch.float32
    assert errors(ours).max() <= errors(weight.float() @ hidden.float().T).max() < 1e-4
    assert errors(weight @ hidden.T).mean() > 0.02  # what the branch is for


def cached_attention(score):
    """A batch of three rows on two prompts, in bfloat16 caches, and queries of the given scores."""
    config = make_model(num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=SIZE).config
    caches = [SlotCache(config, dtype=torch.bfloat16, device=torch.device("cpu")) for _ in range(2)]
    for seed, (cache, slots, length) in enumerate(zip(caches, (2, 3), (20, 12), strict=True)):
        cache.allocate(slots, length)
        for part, view in enumerate(cache.layer(0)):
            view.copy_(normal(*view.shape, seed=2 * seed + part))
    rows = [RowSpan(0, 20, 8, 1), RowSpan(1, 15, 11, 1), RowSpan(0, 20, 3, 1)]
    attend = CachedAttention(*caches, rows, [])
    q = normal(1, HEADS, 3, SIZE, seed=9, scale=score)
    k, v = (normal(1, KV_HEADS, 3, SIZE, seed=seed) for seed in (10, 11))
    return attend, rows, q, k, v


def plain_attention(attend, rows, q, dtype):
    """The same for one row and head after the other; scores and sums in `dtype`, returned in float64."""
    out = torch.empty(q.shape, dtype=torch.float64)
    for slot, row in enumerate(rows):
        for head in range(HEADS):
            keys, values = (
                torch.cat(
                    [
                        prompt[row.prefix_slot, head * KV_HEADS // HEADS, : row.prefix_length],
                        private[slot, head * KV_HEADS // HEADS, : row.start + 1],
                    ]
                ).to(dtype)
                for prompt, private in zip(attend.prefixes.layer(0), attend.private.layer(0), strict=True)
            )
            weights = (keys @ q[0, head, slot].to(dtype) * SIZE**-0.5).softmax(0)
            out[0, head, slot] = (weights @ values).double()
    return out


def test_attention_scores_are_not_rounded(cuda_products, monkeypatch):
    attend, rows, q, k, v = cached_attention(score=8.0)  # times sqrt(64): before scaling, of 64 and more
    ours = attend(0, q, k, v)
    assert ours.dtype == torch.bfloat16
    truth = plain_attention(attend, rows, q, torch.float64)
    best = plain_attention(attend, rows, q, torch.float32).bfloat16() - truth  # rounded at the end only
    assert (ours - truth).norm() <= 2 * best.norm()
    monkeypatch.setattr(kv_cache, "unrounded", lambda *_: False)
    rounded = cached_attention(score=8.0)[0](0, q, k, v)
    assert (rounded - truth).norm() > 3 * best.norm()  # what the branch is for


def test_only_16_bit_products_on_cuda_can_return_float32():
    can = {
        (device, dtype): kv_cache.unrounded(torch.device(device), dtype)
        for device in ("cpu", "mps", "cuda:1")
        for dtype in (torch.float32, torch.bfloat16)
    }
    expected = torch.version.hip is None
    assert can == {key: expected and key == ("cuda:1", torch.bfloat16) for key in can}
