"""Argument checks of the kernels, on top of those of the references.

No check reads the values of a tensor, so none waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo.logprob import check_product, check_rows

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def linear(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    temperature: float,
    softcap: float | None,
) -> None:
    check_product(hidden, weight)
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
    if x.dtype not in DTYPES:
        raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    check_rows(ids, mask, len(x), temperature, softcap, (torch.int64, torch.int32))
    same_device(**{name: x, "ids": ids, "mask": mask})


def same_device(**tensors: Tensor | None) -> None:
    devices = {name: str(tensor.device) for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        came = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"all tensors must be on one device, got {came}")
