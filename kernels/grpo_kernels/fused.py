"""The GRPO loss from hidden states and rewards, without the (M, V) logits, forward or backward.

Both backends use this function; the first three arguments are a backend's operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from grpo_kernels import checks


def fused_grpo(
    group_advantage: Callable[..., Tensor],
    linear_logprob: Callable[..., tuple[Tensor, Tensor | None]],
    grpo_loss: Callable[..., tuple[Tensor, dict[str, Tensor]]],
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    rewards: Tensor,
    group_ids: Tensor,
    sequence_ids: Tensor,
    *,
    mask: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: str = "group",
    ddof: int = 1,
    eps: float = 1e-4,
    validate: bool = False,
    **loss_options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    checks.same_device(hidden=hidden, rewards=rewards, group_ids=group_ids, sequence_ids=sequence_ids)
    advantages = group_advantage(rewards, group_ids, scale=scale, ddof=ddof, eps=eps)
    logprobs, _ = linear_logprob(
        hidden, weight, ids, mask=mask, temperature=temperature, softcap=softcap, validate=validate
    )
    return grpo_loss(
        logprobs, old_logprobs, ref_logprobs, advantages, sequence_ids, mask=mask, **loss_options
    )
