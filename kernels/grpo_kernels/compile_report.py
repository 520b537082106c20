"""The resources that each compiled kernel needs, without a GPU: `python -m grpo_kernels.compile_report`.

Compiles every kernel ahead of time for sm_80, sm_90, sm_100 and gfx942, with the block sizes of
grpo_kernels/config.py. Prints, per kernel and input type: registers per thread, bytes spilled per thread,
bytes of shared memory per program, the matrix instructions, whether there is float64 arithmetic, and the
occupancy: the share of the multiprocessor's threads that can be resident at the same time. The occupancy is
computed from registers and shared memory, not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from grpo_kernels import advantage, linear, loss, selected
from grpo_kernels.config import INTERPRETED, blocks, has_tma

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Registers, bytes of shared memory, threads of a multiprocessor (NVIDIA's tuning guides, AMD's CDNA3 guide).
MULTIPROCESSOR = {
    "sm_80": (65536, 164 << 10, 2048),
    "sm_90": (65536, 228 << 10, 2048),
    "sm_100": (65536, 228 << 10, 2048),
    "gfx942": (4 * 512 * 64, 64 << 10, 2048),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MATRIX = {
    "wgmma": "wgmma.mma_async",
    "tcgen05": "tcgen05.mma",
    "mma.sync": "mma.sync",
    "mfma": "v_mfma",
}
INPUTS = {"hidden", "weight", "logits"}  # arguments of the input type; so are gradients of the products
INDEX = {
    "ids": "*i64",
    "order": "*i64",
    "bounds": "*i64",
    "sequence_ids": "*i64",
    "group_ids": "*i64",
    "lengths": "*i64",
}
INDEX |= {"count": "*i32", "keep": "*u8", "mask": "*i1"}
# The tiles (rows, columns) of tensor descriptors, as names of constants.
HIDDEN, WEIGHT = ("BLOCK_M", "BLOCK_K"), ("BLOCK_N", "BLOCK_K")
TILES = {
    linear.forward_kernel: {"hidden": HIDDEN, "weight": WEIGHT},
    linear.gradient_kernel: {"hidden": HIDDEN, "weight": WEIGHT, "gradient": ("BLOCK_M", "HALF")},
    linear.hidden_kernel: {"gradient": HIDDEN, "weight": ("BLOCK_K", "BLOCK_N")},
    linear.weight_kernel: {"gradient": ("BLOCK_K", "BLOCK_M"), "hidden": ("BLOCK_K", "BLOCK_N")},
}
SCALARS = {"M", "V", "H", "B", "size", "strips", "first", "stop", "width", "blocks"}


def signature(kernel: Any, constants: dict[str, Any], dtype: str) -> dict[str, str]:
    """The type of each argument of the kernel, as Triton spells it."""
    like_input = INPUTS | ({"gradient"} if "gradient" in kernel.arg_names else set())
    if kernel is linear.weight_kernel:
        like_input.add("out")
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif constants.get("TMA") and name in TILES[kernel]:
            width = constants["BLOCK_N"]
            sizes = constants | {"HALF": width // 2 if constants.get("HALVES") else width}
            rows, columns = (sizes[size] for size in TILES[kernel][name])
            types[name] = f"tensordesc<{dtype}[{rows},{columns}]>"
        elif name in INDEX:
            types[name] = INDEX[name]
        elif name in SCALARS or name.startswith("stride"):
            types[name] = "i32"
        else:
            types[name] = f"*{dtype if name in like_input else 'fp32'}"
    return types


def variants(target: str) -> Iterator[tuple[str, str, Any, dict[str, Any]]]:
    """(name, dtype, kernel, constants) of each kernel that the launchers start, with one set of options."""
    options = {"SCALE": 1.0, "CAP": None, "ENTROPY": True, "stride_wk": 1}
    products = {
        "forward": linear.forward_kernel,
        "gradient": linear.gradient_kernel,
        "hidden": linear.hidden_kernel,
        "weight": linear.weight_kernel,
    }
    for dtype in DTYPES:
        for name, kernel in products.items():
            for tma in (False, True) if has_tma(DTYPES[dtype], target) else (False,):
                sizes = blocks(DTYPES[dtype], name, tma, target)
                sizes |= {"STRIP": linear.STRIP, "CHUNK": linear.CHUNK}
                yield f"{name}, TMA" if tma else name, dtype, kernel, options | sizes
        row = options | {"stride_v": 1, "ACC": tl.float32, "BLOCK_N": selected.WIDTH, "num_warps": 8}
        yield "selected forward", dtype, selected.selected_forward_kernel, row
        yield "selected backward", dtype, selected.selected_backward_kernel, row
    sums = {"ACC": tl.float32, "num_warps": 4}
    yield "combine", "fp32", linear.combine_kernel, sums | {"ENTROPY": True, "BLOCK_M": 256}
    token = sums | {"BLOCK": loss.BLOCK, "TERMS": 11, "MASKED": True}
    token |= {"EPSILON": 0.2, "HIGH": 0.28, "DELTA": 4.0, "BETA": 0.001, "CISPO": False}
    token |= {"BIAS_CORRECTION": True, "HAS_REF": True, "PER_LENGTH": True, "DIFFERENCE": True}
    for level in (False, True):
        name = "loss, sequence level" if level else "loss, token level"
        yield name, "fp32", loss.loss_kernel, token | {"SEQUENCE": level}
    yield "segment sum", "fp32", loss.segment_sum_kernel, token
    yield "spread", "fp32", loss.spread_kernel, token
    group = sums | {"SCALE": "group", "DDOF": 1, "EPS": 1e-4}
    group |= {"BLOCK_I": advantage.BLOCK_I, "BLOCK_J": advantage.BLOCK_J}
    yield "advantage", "fp32", advantage.advantage_kernel, group


def compiled(kernel: Any, constants: dict[str, Any], dtype: str, target: GPUTarget) -> Any:
    """One kernel for one target. Pointers and row strides are multiples of 16, as they are in practice."""
    launch = {name: constants[name] for name in ("num_warps", "num_stages") if name in constants}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types = signature(kernel, constants, dtype)
    even = [name for name, kind in types.items() if kind[0] == "*" or name in ("stride_wv", "H")]
    names = list(types)
    source = ASTSource(
        kernel,
        signature=types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in even},
    )
    return triton.compile(source, target=target, options=launch)


def properties(built: Any, target: str) -> dict[str, Any]:
    """The columns of the report for one compiled kernel."""
    if target == "gfx942":
        text = built.asm["amdgcn"]
        counts = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", text, re.MULTILINE)}
        registers = counts["vgpr_count"] + counts.get("agpr_count", 0)
        spilled = counts["vgpr_spill_count"] + counts["sgpr_spill_count"]
        wide = bool(re.search(r"v_(add|mul|fma|div\w*)_f64", text))
    else:
        text = built.asm["ptx"]
        registers, spilled = resources(built.asm["cubin"])
        wide = ".f64" in text
    shared, threads = built.metadata.shared, built.metadata.num_warps * TARGETS[target].warp_size
    return {
        "registers": registers,
        "spilled": spilled,
        "shared": shared,
        "matrix": next((name for name, text_of in MATRIX.items() if text_of in text), "-"),
        "float64": wide,
        "occupancy": occupancy(target, registers, shared, threads),
    }


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, and bytes of stack per thread, which hold spilled registers."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return int(re.findall(r"REG:(\d+)", text)[0]), int(re.findall(r"STACK:(\d+)", text)[0])


def occupancy(target: str, registers: int, shared: int, threads: int) -> float:
    """The share of the multiprocessor's threads that fit at the same time."""
    all_registers, all_shared, all_threads = MULTIPROCESSOR[target]
    programs = min(all_registers // max(1, registers * threads), all_threads // threads)
    if shared:
        programs = min(programs, all_shared // shared)
    return programs * threads / all_threads


def report(target: str, dtypes: list[str], kernels: list[str]) -> Iterator[dict[str, Any]]:
    """A row for each kernel of these names and input types, as soon as it is compiled."""
    for name, dtype, kernel, constants in variants(target):
        if dtype in dtypes and name in kernels:
            built = compiled(kernel, constants, dtype, TARGETS[target])
            yield {"target": target, "kernel": name, "dtype": dtype, **properties(built, target)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m grpo_kernels.compile_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="(default: all)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="(default: all)")
    names = list(dict.fromkeys(name for name, *_ in variants("sm_90")))  # it has them all
    parser.add_argument("--kernels", nargs="+", choices=names, default=names, help="(default: all)")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args(argv)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET must not be set: the interpreter compiles nothing")
    line = "{:8}{:22}{:6}{:>10}{:>9}{:>9}  {:10}{:>4}{:>11}"
    print(
        line.format(
            "target", "kernel", "dtype", "registers", "spilled", "shared", "matrix", "f64", "occupancy"
        )
    )
    rows = []
    for target in arguments.targets:
        for row in report(target, arguments.dtypes, arguments.kernels):
            values = {
                **row,
                "float64": "yes" if row["float64"] else "no",
                "occupancy": f"{row['occupancy']:.0%}",
            }
            print(line.format(*map(str, values.values())), flush=True)
            rows.append(row)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
