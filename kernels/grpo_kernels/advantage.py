"""Group advantages in Triton; formulas and arguments are those of grpo/advantage.py."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from grpo.advantage import check_advantage
from grpo_kernels import checks
from grpo_kernels.config import sum_type
from grpo_kernels.launch import sum_dtype
from grpo_kernels.loss_kernels import advantage_kernel

BLOCK_I, BLOCK_J = 16, 128


def group_advantage(
    rewards: Tensor, group_ids: Tensor, *, scale: str = "group", ddof: int = 1, eps: float = 1e-4
) -> Tensor:
    """`grpo.advantage.group_advantage` in Triton: same arguments, results and errors.

    Every completion is compared with every other: B^2 comparisons, which for the some thousand completions of
    a step are cheaper than sorting them.
    """
    check_advantage(rewards, group_ids, scale, ddof, eps)
    checks.same_device(rewards=rewards, group_ids=group_ids)
    return _advantage(rewards.detach(), group_ids, scale, ddof, eps)


@torch.library.custom_op("grpo_kernels::advantage", mutates_args=())
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
