"""Lower bounds on the time of each kernel of grpo_kernels on several GPUs, computed from data sheets.

    python benchmarks/roofline.py                              M 8192, H 4096, V 128256, bfloat16
    python benchmarks/roofline.py --size 2048x2048x151936

A kernel takes at least its FLOPs divided by the peak rate of the matrix units, and at least its bytes divided
by the memory bandwidth, with each byte read or written once per launch. docs/kernels.md explains the formulas
and shows this output; a test compares them.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from math import ceil
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # benchmarks/ is no package

from grpo_kernels.linear import CHUNK, STRIP  # noqa: E402
from lib.sizes import size_of  # noqa: E402

ELEMENT, SUM = 2, 4  # bytes of a bfloat16 input and of a float32 sum


@dataclass(frozen=True)
class Gpu:
    """Peak of dense bfloat16 products, TFLOP/s, and memory bandwidth, TB/s, from the vendor's data sheet."""

    name: str
    peak: float
    bandwidth: float


GPUS = [
    Gpu("A100 SXM 80 GB", 312.0, 2.04),
    Gpu("H100 SXM", 989.4, 3.35),
    Gpu("H200 SXM", 989.4, 4.80),
    Gpu("B200", 2250.0, 8.00),
    Gpu("MI300X", 1307.4, 5.30),
]


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes of a call, over all its launches."""

    name: str
    flops: float
    bytes: float

    def seconds(self, gpu: Gpu) -> float:
        return max(self.flops / (gpu.peak * 1e12), self.bytes / (gpu.bandwidth * 1e12))

    def bound(self, gpu: Gpu) -> str:
        return "compute" if self.flops / gpu.peak > self.bytes / gpu.bandwidth else "memory"


def kernels(m: int, h: int, v: int) -> list[Work]:
    """For m tokens that all have a gradient, hidden size h and vocabulary v."""
    product = 2.0 * m * h * v
    strips, chunks = ceil(v / STRIP), ceil(v / CHUNK)
    hidden, weight, partial = m * h * ELEMENT, v * h * ELEMENT, 4 * m * strips * SUM
    gradient = m * v * ELEMENT  # of the products, chunk by chunk through memory
    return [
        Work("forward", product, hidden + weight + partial),
        Work("combine", 0.0, partial + 5 * m * SUM),
        Work("loss and advantage", 0.0, 12 * m * SUM),
        Work("gradient", product, chunks * hidden + weight + gradient),
        Work("hidden", product, gradient + weight + chunks * 2 * m * h * SUM),
        Work("weight", product, gradient + chunks * hidden + weight),
    ]


def total(works: list[Work], gpu: Gpu) -> float:
    """Seconds of all kernels, one after the other."""
    return sum(work.seconds(gpu) for work in works)


def extra_bytes(m: int, h: int, v: int) -> int:
    """Peak memory of fused_grpo besides inputs and gradients; it occurs in the backward pass."""
    rows = 2 * m * h * ELEMENT  # compacted hidden states, and their gradient before it is scattered
    return m * min(v, CHUNK) * ELEMENT + m * h * SUM + rows + 8 * m * SUM + 8 * m


def report(m: int, h: int, v: int) -> str:
    works = kernels(m, h, v)
    lines = [
        f"M {m:,}, H {h:,}, V {v:,}, bfloat16. "
        "Least time in milliseconds; c: bound by compute, m: by memory.",
        "",
        "| kernel | TFLOP | GB | " + " | ".join(gpu.name for gpu in GPUS) + " |",
        "|---|---|---|" + "---|" * len(GPUS),
    ]
    for work in works:
        cells = [f"{1e3 * work.seconds(gpu):.2f} {work.bound(gpu)[0]}" for gpu in GPUS]
        lines.append(
            f"| {work.name} | {work.flops / 1e12:.2f} | {work.bytes / 1e9:.2f} | {' | '.join(cells)} |"
        )
    useful = 6.0 * m * h * v
    forward = [total(works[:2], gpu) for gpu in GPUS]
    both = [total(works, gpu) for gpu in GPUS]
    lines.append("| **forward** | | | " + " | ".join(f"**{1e3 * s:.2f}**" for s in forward) + " |")
    lines.append("| **forward and backward** | | | " + " | ".join(f"**{1e3 * s:.2f}**" for s in both) + " |")
    rates = [f"{useful / s / 1e12:.0f}" for s in both]
    lines.append("| useful TFLOP/s at most (6 M H V) | | | " + " | ".join(rates) + " |")
    lines += ["", f"Extra memory besides inputs and gradients: {extra_bytes(m, h, v) / 1e6:.0f} MB."]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/roofline.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--size", type=size_of, default=(8192, 4096, 128256), help="MxHxV")
    arguments = parser.parse_args(argv)
    print(report(*arguments.size))
    return 0


if __name__ == "__main__":
    sys.exit(main())
