"""torch's varlen_attn in plain tensor operations, for any device and dtype: a loop over the sequences.

The real one runs on CUDA only. With `install`, whatever calls it runs on a CPU up to the call itself, and the
arguments are checked as strictly as the CUDA kernels need them.
"""

import inspect
from itertools import pairwise

import torch

from grpo.model import attention

REAL = attention.torch_varlen_attn()
REAL_FITS = REAL is not None and "enable_gqa" in inspect.signature(REAL).parameters  # PyTorch 2.12 or newer


def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size, enable_gqa):
    """(queries, N, D), (keys, K, D) twice -> (queries, N, D), differentiable.

    The last query of a sequence is at its last key. Each sees window_size[0] keys before its own (-1: all).
    """
    assert enable_gqa and window_size[0] >= -1 and window_size[1] == 0
    counts = []
    for packed, starts, most in ((query, cu_seq_q, max_q), (key, cu_seq_k, max_k)):
        assert starts.dtype == torch.int32 and starts.is_contiguous() and starts.device == query.device
        bounds = starts.tolist()
        counts.append([end - start for start, end in pairwise(bounds)])
        assert bounds[0] == 0 and bounds[-1] == len(packed) and max(counts[-1]) == most
    assert all(1 <= queries <= keys for queries, keys in zip(*counts, strict=True))
    assert key.shape == value.shape and query.dtype == key.dtype == value.dtype
    assert all(x.stride(-1) == 1 for x in (query, key, value))
    out = []
    repeats = query.shape[1] // key.shape[1]
    exact = torch.promote_types(query.dtype, torch.float32)  # scores and sums, as in the CUDA kernel
    for q, k, v in zip(
        query.to(exact).split(counts[0]),
        key.to(exact).split(counts[1]),
        value.to(exact).split(counts[1]),
        strict=True,
    ):
        k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
        position = torch.arange(len(k), device=q.device)
        distance = position[len(k) - len(q) :, None] - position
        seen = (distance >= 0) & (distance <= (len(k) if window_size[0] < 0 else window_size[0]))
        scores = torch.einsum("qnd,knd->nqk", q, k) / q.shape[-1] ** 0.5
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        out.append(torch.einsum("nqk,knd->qnd", weights, v))
    return torch.cat(out).to(query.dtype)


def install(monkeypatch):
    """Puts `varlen_attn` in the place of torch's. Returns the list of calls: shape of the queries, window."""
    calls = []

    def checked(*args, **options):
        if REAL_FITS:
            inspect.signature(REAL).bind(*args, **options)
        calls.append((tuple(args[0].shape), options["window_size"]))
        return varlen_attn(*args, **options)

    monkeypatch.setattr(attention, "torch_varlen_attn", lambda: checked)
    return calls
