"""Block sizes of the kernels in linear.py and the types of sums, by input type.

Block sizes are fixed: a size chosen by M would make a row's result depend on the other rows.
`python -m grpo_kernels.compile_report` shows their cost in registers and shared memory. The sizes for tensor
descriptors (TMA) were timed on an H100 (docs/LOG.md); the others have only been compiled.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# kernel of linear.py -> BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages, GROUP
_KERNELS = ("forward", "gradient", "hidden", "weight")
# For descriptors: the fastest tiles on an H100 that spill no register.
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
# Small, so that small shapes have several blocks.
_INTERPRETED = dict.fromkeys(_KERNELS, (16, 32, 16, 4, 1, 2))
TMA_TARGETS = ("sm_90", "sm_100")


def sum_type(dtype: torch.dtype) -> tl.dtype:
    """The type of a kernel's sums for inputs of type `dtype`, as Triton spells it: the constant ACC."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def sum_dtype(x: Tensor) -> torch.dtype:
    """The type of sums over values of x, and of their results, as PyTorch spells it."""
    return torch.promote_types(x.dtype, torch.float32)


def blocks(dtype: torch.dtype, name: str, tma: bool, target: str | None = None) -> dict[str, Any]:
    """Constants of the kernel `name`.

    Args:
        dtype: type of the inputs.
        tma: whether the kernel gets its inputs as tensor descriptors.
        target: a key of compile_report's TARGETS; None: `current_target()`.
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
        # The code after the product of a 256-column tile works on halves, or registers spill. In the
        # interpreter float64 tests the branch without halves, all other types the branch with halves.
        options["HALVES"] = n == 256 or (INTERPRETED and dtype != torch.float64)
    return options


def current_target() -> str:
    """The newest target with block sizes that is not newer than the current device."""
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability()
    return "sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_80"


def has_tma(dtype: torch.dtype, target: str | None = None) -> bool:
    """Whether tiles of `dtype` can be copied by descriptor. target: None: `current_target()`."""
    if INTERPRETED:
        return True
    return dtype in (torch.float16, torch.bfloat16) and (target or current_target()) in TMA_TARGETS
