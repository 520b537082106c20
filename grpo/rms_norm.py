"""Root mean square normalisation, arXiv 1910.07467: y = x / sqrt(mean(x^2) + eps) * weight.

Torch has a fused kernel for it on GPUs. On a CPU it runs a dozen elementwise operations forward and twice as
many backward, each of them over memory; here it is about half of them (docs/LOG.md). The rounding is that of
transformers: normalised in float32 (float64 for float64), rounded to the type of x, then multiplied.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., H), weight (H,) or (heads, H) -> (..., H), in the type of x."""
    if x.device.type != "cpu":
        if weight.ndim == 1:
            return F.rms_norm(x, weight.shape, weight, eps)
        return F.rms_norm(x, weight.shape[-1:], None, eps) * weight
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _RMSNorm.apply(x, weight, eps)
    return _normalised(x, eps)[0] * weight


def _normalised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms (..., H) in the type of x, and 1 / rms (..., 1) in float32 or float64."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse = torch.linalg.vecdot(exact, exact).unsqueeze(-1).div_(x.shape[-1]).add_(eps).rsqrt_()
    return (exact * inverse).to(x.dtype), inverse


class _RMSNorm(torch.autograd.Function):
    """With n = x / rms and g = dy weight:  dx = (g - n mean(g n)) / rms,  dweight = sum(dy n)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normalised, inverse = _normalised(x, eps)
        ctx.save_for_backward(normalised, inverse, weight)
        return normalised * weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        normalised, inverse, weight = ctx.saved_tensors
        n, dy = normalised.to(inverse.dtype), gradients[0].to(inverse.dtype)
        dweight = (dy * n).flatten(0, -weight.ndim - 1).sum(0).to(weight.dtype)
        g = dy * weight.to(inverse.dtype)
        mean = torch.linalg.vecdot(g, n).unsqueeze(-1).div_(n.shape[-1])
        dx = g.addcmul_(n, mean, value=-1).mul_(inverse)
        return dx.to(normalised.dtype), dweight, None
