"""The Triton kernels under the package's names: for CUDA and ROCm."""

from functools import partial

from grpo_kernels import fused
from grpo_kernels.advantage import group_advantage
from grpo_kernels.linear import linear_logprob
from grpo_kernels.loss import grpo_loss
from grpo_kernels.selected import selected_logprob

NAME = "triton"
fused_grpo = partial(fused.fused_grpo, group_advantage, linear_logprob, grpo_loss)

__all__ = ["NAME", "fused_grpo", "group_advantage", "grpo_loss", "linear_logprob", "selected_logprob"]
