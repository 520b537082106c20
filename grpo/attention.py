"""The attention of a forward pass without a cache: causal, with padding masks and sliding windows.

This is the plain one among the `attend` callables that model.py takes; the sampler's reads its caches, the
learner's a packed tree. Shapes as in model.py.

Left out: dropout, and attention sinks.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from grpo.sdpa import attention

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def causal_attend(
    windows: tuple[int | None, ...], position_ids: Tensor, attention_mask: Tensor | None = None
) -> Attend:
    """The attention of a forward pass without cache: causal, with padding and sliding windows."""
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
    """(R, T) or (R, 1, T, T) -> (R, 1, T, T): who sees whom before any window."""
    if attention_mask.ndim == 4:
        return attention_mask
    return attention_mask[:, None, None, :] & _causal(length, attention_mask.device)


def _causal(length: int, device: torch.device) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def _seen(mask: Tensor | None) -> Tensor | None:
    """Lets a query that sees nothing (padding) see everything: a softmax over nothing is NaN."""
    return None if mask is None else mask | ~mask.any(-1, keepdim=True)
