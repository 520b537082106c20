"""GRPO's heavy functions for any trainer: log-probs, advantages, loss, and all three in one call.

Each function takes its backend from the device of its first argument: Triton on CUDA and ROCm, the PyTorch
references of grpo/ elsewhere. `backend` names one explicitly. With `validate=True` ids outside the vocabulary
raise ValueError on every backend. Otherwise Triton does not look, since looking waits for the device, and
gives NaN for them.
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

__all__ = ["backend", "fused_grpo", "group_advantage", "grpo_loss", "linear_logprob", "selected_logprob"]


def backend(device: str | torch.device, name: str = "auto") -> ModuleType:
    """The module whose functions serve tensors on `device`; its NAME is `torch` or `triton`.

    Args:
        name: "auto" takes Triton where it runs. Triton's interpreter (TRITON_INTERPRET=1) serves CPU tensors
            too, but only on demand.
    Raises:
        ValueError: no such backend, or Triton was asked for where it does not run.
    """
    if name not in ("auto", "torch", "triton"):
        raise ValueError(f"kernels must be auto, torch or triton, got {name!r}")
    on_gpu = torch.device(device).type == "cuda"  # ROCm goes by that name too
    if name == "triton" and not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"kernels must be auto or torch on {device}, got 'triton', which needs CUDA or ROCm")
    if name == "triton" or (name == "auto" and on_gpu and _triton_installed()):
        return importlib.import_module("grpo_kernels.triton_backend")
    return importlib.import_module("grpo_kernels.torch_backend")


@cache
def _triton_installed() -> bool:
    return find_spec("triton") is not None


def linear_logprob(
    hidden: Tensor, weight: Tensor, ids: Tensor, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Log-probs (M,) of ids (M,) and entropies, from hidden (M, H) and weight (V, H): grpo/logprob.py."""
    return backend(hidden.device).linear_logprob(hidden, weight, ids, **options)


def selected_logprob(logits: Tensor, ids: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
    """Log-probs (M,) of ids (M,) and entropies, from logits (M, V): grpo/logprob.py."""
    return backend(logits.device).selected_logprob(logits, ids, **options)


def group_advantage(rewards: Tensor, group_ids: Tensor, **options: Any) -> Tensor:
    """Advantages (B,) of rewards (B,) within their groups: grpo/advantage.py."""
    return backend(rewards.device).group_advantage(rewards, group_ids, **options)


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    sequence_ids: Tensor,
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss () and metrics from log-probs (M,) and advantages (B,): grpo/loss.py."""
    module = backend(logprobs.device)
    return module.grpo_loss(logprobs, old_logprobs, ref_logprobs, advantages, sequence_ids, **options)


def fused_grpo(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    rewards: Tensor,
    group_ids: Tensor,
    sequence_ids: Tensor,
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The GRPO loss and metrics from hidden states and rewards, without (M, V) logits forward or backward.

    The three functions above in a row: rewards to advantages, hidden to log-probs in one sweep over the
    vocabulary, log-probs to the loss; the backward pass is one more sweep.

    Args:
        hidden: (M, H) at the positions that predict the tokens `ids` (M,); `weight` (V, H).
        rewards: (B,) one per completion, with `group_ids` (B,) its group.
        sequence_ids: (M,) int64, the completion of each token.
        options: `mask`, `old_logprobs` (None: on-policy), `ref_logprobs`, `temperature`, `softcap`; `scale`,
            `ddof` and `eps` of the advantages; all keywords of `grpo_loss`; `validate`, see the module.
    Raises:
        ValueError: arguments that do not fit together; the message names them.
    """
    module = backend(hidden.device)
    return module.fused_grpo(hidden, weight, ids, rewards, group_ids, sequence_ids, **options)
