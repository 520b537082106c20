"""Group advantages: how much better a completion did than the others of its group.

    A_i = (r_i - mean of its group) / (std + eps)        (GRPO, arXiv 2402.03300, equation in section 4.1.2)

The mean is always the group's. `scale` chooses the standard deviation: the group's (`group`), that of all
rewards of the batch (`batch`), or no division at all (`none`, as Dr. GRPO, arXiv 2503.20783, recommends).
Left out: value functions, leave-one-out means.
"""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantage(
    rewards: Tensor, group_ids: Tensor, *, scale: str = "group", ddof: int = 1, eps: float = 1e-4
) -> Tensor:
    """Rewards centred in their group and scaled.

    Args:
        rewards: (B,) floating point, one per completion.
        group_ids: (B,) int64, which group a completion belongs to; any values in any order.
        scale: "group" divides by (group std + eps), "batch" by (std of all B rewards + eps), "none" by 1.
        ddof: 1 divides a sum of squares by n - 1, 0 by n.
    Returns:
        (B,) float32 (float64 for float64 rewards). Exactly 0 in a group of one or of equal rewards, and,
        with eps 0, of rewards so close that the squares of their differences underflow.
    Raises:
        ValueError: shapes, scale, ddof or eps do not fit.
    """
    check_advantage(rewards, group_ids, scale, ddof, eps)
    r = rewards.detach().to(torch.promote_types(rewards.dtype, torch.float32))
    _, group = group_ids.unique(return_inverse=True)  # (B,) 0 .. P-1
    num_groups = int(group.max()) + 1 if len(r) else 0
    size = r.new_zeros(num_groups).index_add_(0, group, torch.ones_like(r))

    def group_sum(values: Tensor) -> Tensor:  # (B,) -> (B,): the sum over each completion's group
        return r.new_zeros(num_groups).index_add_(0, group, values)[group]

    centred = r - group_sum(r) / size[group]
    # The mean of equal rewards can have a rounding error, which a tiny std would magnify: set exact zeros.
    lowest, highest = (
        r.new_zeros(num_groups).scatter_reduce_(0, group, r, reduce, include_self=False)
        for reduce in ("amin", "amax")
    )
    centred = torch.where((lowest == highest)[group], 0.0, centred)
    if scale == "none":
        return centred
    if scale == "batch":
        variance = (r - r.mean()).square().sum() / max(1, len(r) - ddof)
    else:
        variance = group_sum(centred.square()) / (size[group] - ddof).clamp_min(1)
    deviation = variance.sqrt() + eps
    return torch.where((centred == 0) | (deviation == 0), 0.0, centred / deviation)


def check_advantage(rewards: Tensor, group_ids: Tensor, scale: str, ddof: int, eps: float) -> None:
    """Raises the ValueErrors of `group_advantage`."""
    if rewards.ndim != 1 or group_ids.shape != rewards.shape:
        shapes = f"{tuple(rewards.shape)} and {tuple(group_ids.shape)}"
        raise ValueError(f"rewards and group_ids must both be (B,), got {shapes}")
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale must be group, batch or none, got {scale!r}")
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 or 1, got {ddof}")
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
