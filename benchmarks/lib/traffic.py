"""What ranks send each other in an update: counted operation by operation, and by formula.

A step of the tests' tiny model (tests/tiny.py) on N ranks with gloo, one thread each. A collective of S bytes
counts as the S (N - 1) / N bytes that a rank must send at least.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))

import tiny  # noqa: E402
from ranks import together  # noqa: E402

from grpo import distributed  # noqa: E402
from grpo.learner import sharded  # noqa: E402

GATHERS = ("_allgather_base_", "all_gather_into_tensor")
SUMS = ("_reduce_scatter_base_",)


class Collectives(TorchDispatchMode):
    """Adds up the bytes of the larger side of each gather and each sum, and counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._overloadpacket._qualified_op_name.rpartition("::")[2]
        if name in (*GATHERS, *SUMS):
            tensors = [t for t in (result, *args) if isinstance(t, torch.Tensor)]
            self.bytes["gathered" if name in GATHERS else "summed"] += max(t.nbytes for t in tensors)
        return result


def measured(mode: str, dtype_name: str, max_tokens: int) -> dict[str, Any]:
    """On each rank: seconds of a rollout and an update; bytes gathered and summed, and by formula."""
    dtype = getattr(torch, dtype_name)
    sampled = tiny.build().model.to(dtype)
    parts = tiny.build(model=sampled, max_tokens_per_micro_batch=max_tokens)
    sharding = mode == "fsdp" and distributed.size() > 1
    model = sharded.shard(sampled, dtype=dtype) if sharding else sampled
    subject = tiny.learner(replace(parts, model=model))
    begun = time.perf_counter()
    episodes = tiny.episodes(parts)
    sampling = time.perf_counter() - begun
    passes, backward = 0, subject._backward

    def counted(loss: Any) -> Any:
        nonlocal passes
        passes += 1
        return backward(loss)

    subject._backward = counted  # type: ignore[method-assign]
    with Collectives() as collectives:
        begun = time.perf_counter()
        subject.step(episodes)
        subject.write_weights(sampled)
        updating = time.perf_counter() - begun
    total = sum(p.numel() for p in sampled.parameters())
    layers = sum(p.numel() for p in sampled.layers.parameters())
    sent = (distributed.size() - 1) / distributed.size()
    # fsdp: layers are gathered for the forward and the backward pass, the rest once; then the sampler's copy.
    gathers = passes * (total + layers) + total if mode == "fsdp" else total
    sums = 4 * total * (passes if mode == "fsdp" else 1)
    return {
        "passes": passes,
        "rollout": sampling,
        "update": updating,
        "gathered": collectives.bytes["gathered"] * sent,
        "gathered by formula": gathers * dtype.itemsize * sent,
        "summed": collectives.bytes["summed"] * sent,
        "summed by formula": sums * sent,
    }


def report(sizes: list[int]) -> str:
    names = ["passes", "rollout", "update", "gathered", "gathered by formula", "summed", "summed by formula"]
    units = ["", ", s", ", s", ", bytes", "", ", bytes", ""]
    heads = [name + unit for name, unit in zip(names, units, strict=True)]
    lines = [f"| ranks | mode | dtype | {' | '.join(heads)} |", "|" + "---|" * (3 + len(names))]
    for size in sizes:
        for mode in ("replicate", "fsdp") if size > 1 else ("replicate",):
            for dtype, tokens in (("float32", 2048), ("bfloat16", 60)):
                its = together(size, measured, mode, dtype, tokens)[0]
                cells = [f"{its[n]:.2f}" if n in ("rollout", "update") else f"{its[n]:,.0f}" for n in names]
                lines.append(f"| {size} | {mode} | {dtype} | {' | '.join(cells)} |")
    return "\n".join(lines)
