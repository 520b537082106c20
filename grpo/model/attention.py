"""Scaled dot-product attention, and the `attend` callable of a forward pass without a cache.

`attention` is softmax(q k^T / sqrt(D)) v (Vaswani et al. 2017, eq. 1), with grouped heads. `causal_attend` is
the simplest `attend` that decoder.py takes: causal, with padding masks and sliding windows. The sampler's
reads its caches (kv_cache.py), the learner's a packed tree (tree_attention.py).

Shapes of `attention`: G sequences, N query heads, K key/value heads (N a multiple of K), L queries, S keys, D
head size. Shapes of `causal_attend`: as in decoder.py.

Left out: dropout, and attention sinks.
"""

from collections.abc import Callable
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
