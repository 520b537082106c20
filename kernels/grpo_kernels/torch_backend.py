"""The PyTorch references of grpo/ under the package's names: for CPU and MPS, and as a baseline on GPUs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from grpo import logprob
from grpo.advantage import group_advantage
from grpo.loss import grpo_loss
from grpo_kernels import fused

NAME = "torch"


def _always_validating(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with an ignored `validate`: the references always check ids, and callers need not know."""

    @wraps(function)
    def call(*tensors: Any, validate: bool = False, **options: Any) -> Any:
        return function(*tensors, **options)

    return call


linear_logprob = _always_validating(logprob.linear_logprob)
selected_logprob = _always_validating(logprob.selected_logprob)
fused_grpo = partial(fused.fused_grpo, group_advantage, linear_logprob, grpo_loss)

__all__ = ["NAME", "fused_grpo", "group_advantage", "grpo_loss", "linear_logprob", "selected_logprob"]
