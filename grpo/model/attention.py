"""Scaled dot-product attention, and the `attend` callable of a forward pass without a cache.

`attention` is softmax(q k^T / sqrt(D)) v (Vaswani et al. 2017, eq. 1), with grouped heads.
`varlen_attention` is the same for sequences of different lengths, in one call, on CUDA. `causal_attend` is
the simplest `attend` that decoder.py takes: causal, with padding masks and sliding windows. The sampler's
reads its caches (kv_cache.py), the learner's a packed tree (tree_attention.py).

Shapes of `attention`: G sequences, N query heads, K key/value heads (N a multiple of K), L queries, S keys, D
head size. Shapes of `causal_attend`: as in decoder.py.

Left out: dropout, and attention sinks.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# --- scaled dot-product attention ------------------------------------------------------------------------
#
# This is torch's scaled_dot_product_attention, except in bfloat16 on a CPU, where torch's backward pass takes
# ten times as long as its forward. There the backward is five batched products instead, twice as fast
# (docs/LOG.md). As in FlashAttention (arXiv 2205.14135), nothing of size L x S is kept for it.


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """q (G, N, L, D), k and v (G, K, S, D) -> (G, N, L, D).

    Args:
        mask: bool, True = may be attended, (L, S) or broadcast to (G, N, L, S); every query must see a key.
            None: causal, with L = S.
    """
    if q.is_cuda and k.shape[1] != q.shape[1]:
        # On CUDA most fused kernels take no grouped heads, and the one that does keeps all (L, S) scores.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    two_dimensional = mask is None or mask.ndim == 2
    if torch.is_grad_enabled() and q.device.type == "cpu" and q.dtype == torch.bfloat16 and two_dimensional:
        return _ProductsBackward.apply(q, k, v, mask)
    return _fused(q, k, v, mask)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)


class _ProductsBackward(torch.autograd.Function):
    """`_fused`, with a backward that recomputes the weights p.

    With p = softmax(q k^T / sqrt(D)) and out = p v:

        dv = p^T dout;  ds = p (dout v^T - rowsum(dout out)) / sqrt(D);  dq = ds k;  dk = ds^T q

    Products and weights are rounded to bfloat16. Against float64, the errors of dq and dk are up to two or
    three times torch's; that of dv is smaller than torch's.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out = _fused(q, k, v, mask)
        ctx.save_for_backward(q, k, v, out, mask)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, mask = ctx.saved_tensors
        (sequences, _, queries, size), (kv_heads, keys) = q.shape, k.shape[1:3]
        if mask is None:
            mask = torch.ones(queries, keys, dtype=torch.bool).tril_()
        bias = torch.zeros(queries, keys, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
        scale = size**-0.5

        def rows(x: Tensor) -> Tensor:  # (G, heads, n, D) -> (G K, r n, D): heads that share keys, together
            return x.reshape(sequences * kv_heads, -1, size)

        q_rows, k_rows, v_rows, dout = rows(q), rows(k), rows(v), rows(gradients[0])
        repeats = q.shape[1] // kv_heads
        p = torch.baddbmm(bias.repeat(repeats, 1), q_rows, k_rows.mT, alpha=scale).softmax(dim=-1)
        dv = torch.bmm(p.mT, dout)
        inner = (dout * rows(out)).sum(dim=-1, keepdim=True)
        ds = torch.bmm(dout, v_rows.mT).sub_(inner).mul_(p)
        dq = torch.bmm(ds, k_rows).mul_(scale)
        dk = torch.bmm(ds.mT, q_rows).mul_(scale)
        return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape), None


# --- sequences of different lengths in one call ----------------------------------------------------------
#
# torch's varlen_attn is FlashAttention (arXiv 2205.14135) over sequences that are packed one after the other.
# One launch replaces those of a call per sequence or per length. There are no masks, no padding and no copies
# of key/value heads. It runs on CUDA only (`check_varlen`). Its backward pass adds up in a fixed order only
# under torch.use_deterministic_algorithms(True), without warn_only.


@dataclass(frozen=True)
class Spans:
    """Where G sequences begin among the packed queries and among the packed keys.

    A sequence has a key for each of its tokens, and a query for one or more of its last tokens.
    """

    cu_seq_q: Tensor  # (G + 1,) int32, on the device: the first query of each; then the number of queries
    cu_seq_k: Tensor  # (G + 1,) int32, on the device: the same for the keys
    max_q: int  # the most queries of a sequence
    max_k: int

    @staticmethod
    def of(queries: Sequence[int], keys: Sequence[int], device: torch.device) -> "Spans":
        """From the number of queries and the number of keys of each sequence."""
        starts = upload([[0, *accumulate(counts)] for counts in (queries, keys)], device, torch.int32)
        return Spans(starts[0], starts[1], max(queries), max(keys))


@functools.cache
def torch_varlen_attn() -> Any:
    """torch's varlen_attn; None before PyTorch 2.10. Imported only where it is used: that takes seconds."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, spans: Spans, window: int | None = None) -> Tensor:
    """Causal attention within each sequence: packed q (L, N, D), k and v (S, K, D) -> (L, N, D).

    Same as `attention` sequence by sequence, with the last rows of a lower triangle as the mask.

    Args:
        window: how many tokens a query sees, itself included; None: all up to itself.
    """
    return torch_varlen_attn()(
        q,
        k,
        v,
        spans.cu_seq_q,
        spans.cu_seq_k,
        spans.max_q,
        spans.max_k,
        window_size=(-1 if window is None else window - 1, 0),  # tokens seen before and after a query's own
        enable_gqa=True,
    )


def _varlen_parameters() -> set[str]:
    function = torch_varlen_attn()
    return set() if function is None else set(inspect.signature(function).parameters)


def check_varlen(device: str, dtype: torch.dtype, head_dim: int) -> None:
    """Raises ValueError if `varlen_attention` cannot run here: device, dtype, head size, PyTorch."""
    if not device.startswith("cuda"):
        here, needed = f"device {device}", "CUDA"
    elif dtype not in (torch.bfloat16, torch.float16):
        here, needed = f"dtype {str(dtype).removeprefix('torch.')}", "bfloat16"
    elif head_dim % 8 or head_dim > 256:
        here, needed = f"a head size of {head_dim}", "a multiple of 8 up to 256"
    elif not {"window_size", "enable_gqa"} <= _varlen_parameters():
        here, needed = f"PyTorch {torch.__version__}", "2.12 or newer"
    elif torch.version.cuda and torch.cuda.get_device_capability(device) < (8, 0):
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        here, needed = f"a GPU of compute capability {capability}", "8.0 or higher"
    else:
        return
    raise ValueError(f"attn_implementation must be auto or sdpa with {here}: varlen needs {needed}")


def upload(numbers: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers (nested lists) as a tensor on the device; from pinned memory, without waiting for the GPU."""
    host = torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


# --- attention without a cache ---------------------------------------------------------------------------

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # (layer, q, k, v) -> out, see Decoder.forward


def causal_attend(
    windows: tuple[int | None, ...], position_ids: Tensor, attention_mask: Tensor | None = None
) -> Attend:
    """The `attend` of one forward pass: causal, with padding and sliding windows."""
    length = position_ids.shape[-1]
    base = None if attention_mask is None else _base_mask(attention_mask, length)
    masks: dict[int | None, Tensor | None] = {None: _seen(base)}

    def mask_for(window: int | None) -> Tensor | None:
        if window is not None and window not in masks:
            back = position_ids[:, None, :, None] - position_ids[:, None, None, :]  # (R, 1, T, T)
            allowed = _causal(length, back.device) if base is None else base
            masks[window] = _seen(allowed & (back < window))
        return masks[window]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        window = windows[layer]
        mask = mask_for(None if window is None or window >= length else window)
        return attention(q, k, v, mask)

    return attend


def check_mask(attention_mask: Tensor, length: int) -> None:
    """Raises ValueError unless the mask is bool, (R, T) or (R, 1, T, T), with T = `length`."""
    if attention_mask.dtype != torch.bool:
        raise ValueError(f"attention_mask must be bool, True = may be attended, got {attention_mask.dtype}")
    shape = tuple(attention_mask.shape)
    if len(shape) not in (2, 4) or shape[1:] not in ((length,), (1, length, length)):
        raise ValueError(f"attention_mask must be (R, T) or (R, 1, T, T) with T = {length}, got {shape}")


def _base_mask(attention_mask: Tensor, length: int) -> Tensor:
    """(R, T) or (R, 1, T, T) -> (R, 1, T, T): which keys each query sees, before any window."""
    if attention_mask.ndim == 4:
        return attention_mask
    return attention_mask[:, None, None, :] & _causal(length, attention_mask.device)


def _causal(length: int, device: torch.device) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def _seen(mask: Tensor | None) -> Tensor | None:
    """Lets a query that sees no key (padding) see all of them: a softmax over no keys is NaN."""
    return None if mask is None else mask | ~mask.any(-1, keepdim=True)
