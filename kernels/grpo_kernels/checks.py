"""Argument checks that need no look at the values, and so wait for no device."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def linear(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    temperature: float,
    softcap: float | None,
) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        shapes = f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"hidden must be (M, H) and weight (V, H), got {shapes}")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden and weight must have the same dtype, got {hidden.dtype} and {weight.dtype}")
    if weight.shape[0] == 0:
        raise ValueError("weight must have at least one row, got (0, H)")
    _common("hidden", hidden, ids, mask, temperature, softcap)
    same_device(hidden=hidden, weight=weight)


def selected(
    logits: Tensor, ids: Tensor, mask: Tensor | None, temperature: float, softcap: float | None
) -> None:
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must be (M, V) with V at least 1, got {tuple(logits.shape)}")
    _common("logits", logits, ids, mask, temperature, softcap)


def _common(
    name: str, x: Tensor, ids: Tensor, mask: Tensor | None, temperature: float, softcap: float | None
) -> None:
    m = x.shape[0]
    if x.dtype not in DTYPES:
        raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if ids.shape != (m,) or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"ids must be ({m},) int64 or int32, got {tuple(ids.shape)} {ids.dtype}")
    if mask is not None and (mask.shape != (m,) or mask.dtype != torch.bool):
        raise ValueError(f"mask must be ({m},) bool, got {tuple(mask.shape)} {mask.dtype}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")
    same_device(**{name: x, "ids": ids, "mask": mask})


def same_device(**tensors: Tensor | None) -> None:
    devices = {name: str(tensor.device) for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        came = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"all tensors must be on one device, got {came}")


def ids(ids: Tensor, mask: Tensor | None, size: int) -> None:
    """Waits for the device."""
    counted = ids if mask is None else ids[mask]
    if ((counted < 0) | (counted >= size)).any():
        came = f"{counted.min()} to {counted.max()}"
        raise ValueError(f"ids must be in [0, {size}) where mask is True, got {came}")
