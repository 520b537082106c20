"""The decorator of the launchers: a custom operator that runs on the device of its tensors.

Triton launches kernels on the current device. PyTorch's own operators switch to that of their tensors; custom
operators do not, so with tensors on cuda:1 a kernel would read their addresses on cuda:0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """`torch.library.custom_op("grpo_kernels::NAME")` without mutated arguments; see the module."""

    def decorate(launch: Callable[..., Any]) -> Any:
        @wraps(launch)  # custom_op reads the schema from the signature
        def on_their_device(*arguments: Any) -> Any:
            with torch.cuda.device_of(next(x for x in arguments if isinstance(x, Tensor))):
                return launch(*arguments)

        return torch.library.custom_op(f"grpo_kernels::{name}", on_their_device, mutates_args=())

    return decorate
