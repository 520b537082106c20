"""Block sizes of the kernels, by input type. Fixed: one chosen by M would make a row depend on the others.

docs/kernels.md says how they follow from the roofline, `python -m grpo_kernels.compile_report` what they cost
in registers and shared memory. None has been timed on a GPU.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# name of the product -> BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages
_HALF = {
    "forward": (128, 256, 64, 8, 3),
    "gradient": (128, 256, 64, 8, 3),
    "hidden": (128, 256, 64, 8, 3),
    "weight": (128, 256, 64, 8, 3),
}
_SINGLE = {name: (64, 64, 32, 8, 3) for name in _HALF}
_DOUBLE = {name: (32, 32, 16, 4, 2) for name in _HALF}
_INTERPRETED = {name: (16, 32, 16, 4, 1) for name in _HALF}  # small, so that small shapes have several blocks


def blocks(dtype: torch.dtype, name: str) -> dict[str, Any]:
    """Constants of the kernel `name` for inputs of type `dtype`."""
    table = _SINGLE if dtype == torch.float32 else _DOUBLE if dtype == torch.float64 else _HALF
    if INTERPRETED:
        table = _INTERPRETED
    m, n, k, warps, stages = table[name]
    return {
        "BLOCK_M": m,
        "BLOCK_N": n,
        "BLOCK_K": k,
        "PRECISION": "ieee",  # TF32 would be wrong in the fourth digit
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "num_warps": warps,
        "num_stages": stages,
    }
