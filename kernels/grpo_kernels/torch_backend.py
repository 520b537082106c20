"""The readable PyTorch references under the package's names: for CPUs, MPS, and to compare with."""

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
    """The references check ids anyway; they take `validate` so that callers need not know the backend."""

    @wraps(function)
    def call(*tensors: Any, validate: bool = False, **options: Any) -> Any:
        return function(*tensors, **options)

    return call


linear_logprob = _always_validating(logprob.linear_logprob)
selected_logprob = _always_validating(logprob.selected_logprob)
fused_grpo = partial(fused.fused_grpo, group_advantage, linear_logprob, grpo_loss)

__all__ = ["NAME", "fused_grpo", "group_advantage", "grpo_loss", "linear_logprob", "selected_logprob"]
