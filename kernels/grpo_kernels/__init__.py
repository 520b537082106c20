"""The expensive functions of GRPO for any trainer: log-probs, advantages, loss, and all three in one call.

The device of the first argument selects the backend: Triton on CUDA and ROCm, the PyTorch references of grpo/
on all other devices. `backend` selects one explicitly.

With `validate=True` an id outside the vocabulary raises ValueError on every backend. Without it Triton does
not check, because the check waits for the device, and the log-prob of such an id is NaN.
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
        name: auto, torch or triton. "auto" selects Triton where it runs. With TRITON_INTERPRET=1 Triton's
            interpreter serves CPU tensors too, but only if the name is "triton".
    Raises:
        ValueError: there is no such backend, or Triton does not run on the device.
    """
    if name not in ("auto", "torch", "triton"):
        raise ValueError(f"kernels must be auto, torch or triton, got {name!r}")
    on_gpu = torch.device(device).type == "cuda"  # ROCm devices have this type too
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
    """The loss () and metrics from hidden states and rewards, without (M, V) logits, forward or backward.

    Same as `group_advantage`, `linear_logprob` and `grpo_loss` in sequence. The forward pass sweeps the
    vocabulary once, the backward pass once more.

    Args:
        hidden: (M, H) final hidden states at the positions that predict `ids`.
        weight: (V, H) output embedding, same dtype.
        ids: (M,) int64, the tokens.
        rewards: (B,) one per completion.
        group_ids: (B,) the group of each completion.
        sequence_ids: (M,) int64, the index into `rewards` of each token's completion.
        options: `mask`, `old_logprobs` (None: on-policy), `ref_logprobs`, `temperature`, `softcap`; `scale`,
            `ddof` and `eps` of `group_advantage`; all keywords of `grpo_loss`; `validate`, see the module.
    Raises:
        ValueError: arguments do not fit together; the message names them.
    """
    module = backend(hidden.device)
    return module.fused_grpo(hidden, weight, ids, rewards, group_ids, sequence_ids, **options)
