"""GRPO's heavy functions under the names that Triton kernels will take over.

For now each name is the PyTorch reference of grpo/, so that train.py and the benchmarks can be written
against this package; the Triton versions come later, with the same signatures.
"""

from grpo.advantage import group_advantage
from grpo.logprob import linear_logprob, selected_logprob
from grpo.loss import grpo_loss

__all__ = ["group_advantage", "grpo_loss", "linear_logprob", "selected_logprob"]
