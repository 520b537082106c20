"""Block sizes of the kernels, by input type. Fixed: one chosen by M would make a row depend on the others.

`python -m grpo_kernels.compile_report` says what they cost in registers and shared memory. None has been
timed on a GPU.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# kernel -> BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages; the kernels are those of linear_kernels.py
_KERNELS = ("forward", "gradient", "hidden", "weight")
# The widest tiles that spill no register, as the report says.
_HALF = dict.fromkeys(_KERNELS, (128, 256, 64, 8, 3)) | {"hidden": (128, 128, 64, 8, 3)}
_HALF_BY_TARGET = {
    "sm_80": dict.fromkeys(_KERNELS, (128, 128, 32, 8, 3)),
    "sm_90": _HALF,
    "sm_100": _HALF,
    "gfx942": dict.fromkeys(_KERNELS, (128, 128, 64, 8, 2)),
}
_SINGLE = dict.fromkeys(_KERNELS, (64, 64, 32, 8, 2)) | {"weight": (64, 64, 16, 8, 2)}
_DOUBLE = dict.fromkeys(_KERNELS, (32, 32, 16, 4, 2))
_INTERPRETED = dict.fromkeys(_KERNELS, (16, 32, 16, 4, 1))  # small, so that small shapes have several blocks


def sum_type(dtype: torch.dtype) -> tl.dtype:
    """The kernels' constant ACC for inputs of type `dtype`: what their sums are made in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def blocks(dtype: torch.dtype, name: str, target: str | None = None) -> dict[str, Any]:
    """Constants of the kernel `name` for inputs of type `dtype`; target: None is `current_target()`."""
    if INTERPRETED:
        table = _INTERPRETED
    elif dtype in (torch.float32, torch.float64):
        table = _SINGLE if dtype == torch.float32 else _DOUBLE
    else:
        table = _HALF_BY_TARGET[current_target() if target is None else target]
    m, n, k, warps, stages = table[name]
    options = {
        "BLOCK_M": m,
        "BLOCK_N": n,
        "BLOCK_K": k,
        "PRECISION": "ieee",  # TF32 would be wrong in the fourth digit
        "ACC": sum_type(dtype),
        "num_warps": warps,
        "num_stages": stages,
    }
    if name in ("forward", "gradient"):
        # Of a tile of 256 columns the log-sum-exp and the gradient are made in halves, or registers spill.
        # The interpreter does it with float32, and float64 takes the other way.
        options["HALVES"] = n == 256 or (INTERPRETED and dtype != torch.float64)
    return options


@cache
def current_target() -> str:
    """The nearest of the targets that have block sizes, at or below this GPU's."""
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability()
    return "sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_80"
