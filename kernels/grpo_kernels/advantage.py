"""Group advantages in Triton. Formulas and arguments are those of grpo/advantage.py.

The kernel compares every completion with every other, B^2 comparisons. A step has a few thousand completions;
for them this is cheaper than sorting. Left out: gradients with respect to the rewards.

B completions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo.advantage import check_advantage
from grpo_kernels import checks
from grpo_kernels.config import sum_dtype, sum_type
from grpo_kernels.operators import operator

BLOCK_I, BLOCK_J = 16, 128  # completions per program, and per step of its loop


def group_advantage(
    rewards: Tensor, group_ids: Tensor, *, scale: str = "group", ddof: int = 1, eps: float = 1e-4
) -> Tensor:
    """`grpo.advantage.group_advantage` in Triton: same arguments, results and errors."""
    check_advantage(rewards, group_ids, scale, ddof, eps)
    checks.same_device(rewards=rewards, group_ids=group_ids)
    return _advantage(rewards.detach(), group_ids, scale, ddof, eps)


@triton.jit
def advantage_kernel(
    rewards, group_ids, out, B,
    SCALE: tl.constexpr, DDOF: tl.constexpr, EPS: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Advantages of BLOCK_I completions, each compared with all B, without sorting or a table of groups."""
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    r = tl.load(rewards + i, mask=i < B, other=0.0).to(ACC)
    group = tl.load(group_ids + i, mask=i < B, other=0)
    size = tl.zeros((BLOCK_I,), dtype=ACC)
    total = tl.zeros((BLOCK_I,), dtype=ACC)
    differs = tl.zeros((BLOCK_I,), dtype=ACC)
    everything = tl.zeros((BLOCK_J,), dtype=ACC)
    for start in range(0, B, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        other = tl.load(rewards + j, mask=j < B, other=0.0).to(ACC)
        same = (group[:, None] == tl.load(group_ids + j, mask=j < B, other=0)[None, :]) & (j < B)[None, :]
        size += tl.sum(tl.where(same, 1.0, 0.0).to(ACC), 1)
        total += tl.sum(tl.where(same, other[None, :], 0.0), 1)
        differs += tl.sum(tl.where(same & (other[None, :] != r[:, None]), 1.0, 0.0).to(ACC), 1)
        everything += other
    mean = total / tl.maximum(size, 1.0)
    centred = tl.where(differs > 0, r - mean, 0.0)  # exactly 0 where all rewards of the group are equal
    if SCALE != "none":
        of_all = tl.sum(everything, 0) / B
        squares = tl.zeros((BLOCK_I,), dtype=ACC)
        for start in range(0, B, BLOCK_J):
            j = start + tl.arange(0, BLOCK_J)
            other = tl.load(rewards + j, mask=j < B, other=0.0).to(ACC)
            if SCALE == "group":
                here = group[:, None] == tl.load(group_ids + j, mask=j < B, other=0)[None, :]
                distance = tl.where(here, other[None, :] - mean[:, None], 0.0)
            else:
                distance = (other - of_all)[None, :] + tl.zeros((BLOCK_I, 1), ACC)
            distance = tl.where((j < B)[None, :], distance, 0.0)
            squares += tl.sum(distance * distance, 1)
        count = size
        if SCALE == "batch":
            count = size * 0 + B
        deviation = tl.sqrt(squares / tl.maximum(count - DDOF, 1.0)) + EPS
        centred = tl.where((centred == 0) | (deviation == 0), 0.0, centred / deviation)
    tl.store(out + i, centred, mask=i < B)


@operator("advantage")
def _advantage(rewards: Tensor, group_ids: Tensor, scale: str, ddof: int, eps: float) -> Tensor:
    out = torch.empty(len(rewards), dtype=sum_dtype(rewards), device=rewards.device)
    if len(rewards):
        advantage_kernel[(triton.cdiv(len(rewards), BLOCK_I),)](
            rewards.contiguous(),
            group_ids.contiguous(),
            out,
            len(rewards),
            SCALE=scale,
            DDOF=ddof,
            EPS=eps,
            BLOCK_I=BLOCK_I,
            BLOCK_J=BLOCK_J,
            ACC=sum_type(out.dtype),
        )
    return out


@_advantage.register_fake
def _(rewards: Tensor, group_ids: Tensor, scale: str, ddof: int, eps: float) -> Tensor:
    return torch.empty(len(rewards), dtype=sum_dtype(rewards), device=rewards.device)
