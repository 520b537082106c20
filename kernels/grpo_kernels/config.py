"""Block sizes of the kernels, by input type. Fixed: one chosen by M would make a row depend on the others.

`python -m grpo_kernels.compile_report` says what they cost in registers and shared memory. Those by
descriptor were timed on an H100 (docs/LOG.md); the others only compile.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# kernel of linear_kernels.py -> BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages, GROUP
_KERNELS = ("forward", "gradient", "hidden", "weight")
# By descriptor: the fastest on an H100 of the tiles that spill no register.
_TMA = {
    "forward": (128, 256, 64, 8, 3, 16),
    "gradient": (128, 256, 64, 8, 4, 16),
    "hidden": (128, 256, 64, 8, 4, 8),
    "weight": (128, 256, 64, 8, 3, 16),
}
_HALF_BY_TARGET = {
    "sm_80": dict.fromkeys(_KERNELS, (128, 128, 32, 8, 3, 8)),
    "sm_90": dict.fromkeys(_KERNELS, (128, 128, 64, 8, 3, 8)),
    "sm_100": dict.fromkeys(_KERNELS, (128, 128, 64, 8, 3, 8)),
    "gfx942": dict.fromkeys(_KERNELS, (128, 128, 64, 8, 2, 8)),
}
_SINGLE = dict.fromkeys(_KERNELS, (64, 64, 32, 8, 2, 8)) | {"weight": (64, 64, 16, 8, 2, 8)}
_DOUBLE = dict.fromkeys(_KERNELS, (32, 32, 16, 4, 2, 8))
# small, so that small shapes have several blocks
_INTERPRETED = dict.fromkeys(_KERNELS, (16, 32, 16, 4, 1, 2))
TMA_TARGETS = ("sm_90", "sm_100")


def sum_type(dtype: torch.dtype) -> tl.dtype:
    """The kernels' constant ACC for inputs of type `dtype`: what their sums are made in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def blocks(dtype: torch.dtype, name: str, tma: bool, target: str | None = None) -> dict[str, Any]:
    """Constants of the kernel `name`.

    Args:
        dtype: of its inputs.
        tma: whether they come by tensor descriptor.
        target: None is `current_target()`.
    """
    if INTERPRETED:
        table = _INTERPRETED
    elif dtype in (torch.float32, torch.float64):
        table = _SINGLE if dtype == torch.float32 else _DOUBLE
    else:
        table = _TMA if tma else _HALF_BY_TARGET[target or current_target()]
    m, n, k, warps, stages, group = table[name]
    options = {
        "BLOCK_M": m,
        "BLOCK_N": n,
        "BLOCK_K": k,
        "GROUP": group,
        "PRECISION": "ieee",  # TF32 would be wrong in the fourth digit
        "ACC": sum_type(dtype),
        "TMA": tma,
        "UPCAST": INTERPRETED,
        "num_warps": warps,
        "num_stages": stages,
    }
    if name != "weight":
        # What follows the product of a tile of 256 columns is made in halves, or registers spill.
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


def has_tma(dtype: torch.dtype, target: str | None = None) -> bool:
    """Whether tiles of `dtype` are copied by descriptor; target: None is `current_target()`."""
    if INTERPRETED:
        return True
    return dtype in (torch.float16, torch.bfloat16) and (target or current_target()) in TMA_TARGETS
