"""Attention in bfloat16 on a CPU has a backward pass of its own: compared with float64 and with torch's.
Attention of many sequences in one call: what it asks of torch, and where it is refused.
"""

import plain_varlen
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from grpo.model import attention as attention_module
from grpo.model.attention import Spans, attention, check_varlen, varlen_attention


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


# --- varlen -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 2])
def test_torchs_varlen_attention_takes_the_call_and_its_gradients(window):
    """On tensors without content: shapes and arguments. tests/sampler/test_gpu.py compares the numbers."""
    if not plain_varlen.REAL_FITS:
        pytest.skip("needs PyTorch 2.12 or newer")
    shapes = (7, 6, 16), (9, 2, 16), (9, 2, 16)
    leaves = [torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True) for shape in shapes]
    spans = Spans.of([3, 4], [5, 4], torch.device("meta"))
    assert spans.cu_seq_q.dtype == spans.cu_seq_k.dtype == torch.int32
    assert (spans.max_q, spans.max_k) == (4, 5)
    out = varlen_attention(*leaves, spans, window)
    assert out.shape == shapes[0] and out.dtype == torch.bfloat16
    gradients = torch.autograd.grad(out, leaves, torch.empty_like(out))
    assert tuple(tuple(gradient.shape) for gradient in gradients) == shapes


def test_spans_are_running_sums():
    spans = Spans.of([3, 1, 4], [5, 9, 4], torch.device("cpu"))
    assert spans.cu_seq_q.tolist() == [0, 3, 4, 8] and spans.cu_seq_k.tolist() == [0, 5, 14, 18]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("cpu", torch.bfloat16, 64), "with device cpu: varlen needs CUDA"),
        (("mps", torch.bfloat16, 64), "with device mps: varlen needs CUDA"),
        (("cuda", torch.float32, 64), "with dtype float32: varlen needs bfloat16"),
        (("cuda:1", torch.bfloat16, 100), "with a head size of 100: varlen needs a multiple of 8 up to 256"),
        (("cuda", torch.bfloat16, 512), "with a head size of 512: varlen needs a multiple of 8 up to 256"),
    ],
)
def test_varlen_is_refused_where_it_cannot_run(arguments, message):
    with pytest.raises(ValueError, match=f"^attn_implementation must be auto or sdpa {message}$"):
        check_varlen(*arguments)


@pytest.mark.parametrize(
    "older", [None, lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False: query]
)
def test_varlen_is_refused_by_an_older_torch(older, monkeypatch):
    monkeypatch.setattr(attention_module, "torch_varlen_attn", lambda: older)
    with pytest.raises(ValueError, match=r"with PyTorch 2\.\S+: varlen needs 2\.12 or newer"):
        check_varlen("cuda", torch.bfloat16, 64)


def test_varlen_is_refused_by_an_older_gpu(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match=r"a GPU of compute capability 7\.5: varlen needs 8\.0 or higher"):
        check_varlen("cuda", torch.bfloat16, 64)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_varlen("cuda", torch.bfloat16, 64)
