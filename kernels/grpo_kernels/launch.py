"""What the launchers share: types, outputs and constants, and which rows have a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sum_dtype(x: Tensor) -> torch.dtype:
    """What sums over values like x are made and returned in."""
    return torch.promote_types(x.dtype, torch.float32)


def outputs(x: Tensor, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs (M,) and entropies (M,) of 0 and room for m, s and c of each row (3, M)."""
    new: dict[str, Any] = {"dtype": sum_dtype(x), "device": x.device}
    return (
        torch.zeros(len(x), **new),
        torch.zeros(len(x) if entropy else 0, **new),
        torch.zeros(3, len(x), **new),
    )


def scales(temperature: float, softcap: float | None) -> dict[str, float | None]:
    if softcap is None:
        return {"SCALE": 1 / temperature, "CAP": None}
    return {"SCALE": 1 / softcap, "CAP": softcap / temperature}


def upstream(grads: list[Tensor | None], mask: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of log-prob and entropy, None as 0, and the (M,) rows that they move."""
    up, up_entropy = (torch.zeros_like(like) if g is None else g.contiguous() for g in grads)
    live = (up != 0) | (up_entropy != 0)
    return up, up_entropy, live if mask is None else live & mask


def refuse_second_derivative(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError("the log-prob kernels are differentiable once, not twice")
