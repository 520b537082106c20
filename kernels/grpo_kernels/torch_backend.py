"""The readable PyTorch references under the package's names: for CPUs, MPS, and to compare with."""

from functools import partial

from grpo.advantage import group_advantage
from grpo.logprob import linear_logprob, selected_logprob
from grpo.loss import grpo_loss
from grpo_kernels import fused

NAME = "torch"
fused_grpo = partial(fused.fused_grpo, group_advantage, linear_logprob, grpo_loss)

__all__ = ["NAME", "fused_grpo", "group_advantage", "grpo_loss", "linear_logprob", "selected_logprob"]
