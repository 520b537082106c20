"""What the benchmarks share: times in rounds, peak memory, FLOPs, tables, and a description of the machine.

Candidates are timed in turns, each once per round, so that a slow minute of the machine hits all of them.
Results are medians with quartiles. On a GPU the time is measured between two events, after overwriting the L2
cache.

Left out: confidence intervals; compare ratios within one run.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import math
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

FLUSHED_BYTES = 256 << 20  # more than the L2 cache of any GPU listed in docs/kernels.md
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WARM_UP = 1  # rounds that are not counted, in which candidates compile, allocate, and fill caches


def command_line(file: str, description: str | None) -> argparse.ArgumentParser:
    """A parser for the script `file`."""
    return argparse.ArgumentParser(
        prog=f"python benchmarks/{Path(file).name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def hide_benchmarks() -> None:
    """Takes benchmarks/ off sys.path: transformers would take its kernels.py for the package `kernels`."""
    benchmarks = Path(__file__).resolve().parents[1]
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != benchmarks]


def machine(device: str) -> dict[str, Any]:
    """What results depend on besides the code."""
    versions: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version()}
    if device.startswith("cuda"):
        return {**versions, "device": torch.cuda.get_device_name(device), **_clocks()}
    model, flags = platform.processor(), ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line.partition(":") for line in cpuinfo.read_text().splitlines()]
        fields = {key.strip(): value.strip() for key, _, value in lines}  # of the last core
        model, flags = fields.get("model name", model), fields.get("flags", "")
    vector = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags.split()]
    return {**versions, "device": f"{model} ({', '.join(vector)})", "threads": torch.get_num_threads()}


def _clocks() -> dict[str, str]:
    """What nvidia-smi says about the clocks: a throttled or locked GPU gives other results."""
    if shutil.which("nvidia-smi") is None:
        return {"clocks": "unknown (no nvidia-smi)"}
    query = "clocks.sm,clocks.mem,clocks.max.sm,power.limit,clocks_throttle_reasons.active"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    return {"clocks": f"{query}: {done.stdout.strip() or done.stderr.strip()}"}


def seconds(
    candidates: Mapping[str, Callable[[], Any]], device: str, *, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each candidate in each round. A candidate's result is freed before the next one runs."""
    clock = _gpu_seconds if device.startswith("cuda") else _cpu_seconds
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for index in range(WARM_UP + rounds):
        for name, call in candidates.items():
            gc.collect()
            taken = clock(call)
            if index >= WARM_UP:
                times[name].append(taken)
    return times


def _cpu_seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _gpu_seconds(call: Callable[[], Any]) -> float:
    torch.empty(FLUSHED_BYTES, dtype=torch.int8, device="cuda").zero_()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def summary(times: list[float]) -> dict[str, float]:
    """Median and quartiles; for a single time all are that time."""
    if len(times) == 1:
        return {"median": times[0], "low": times[0], "high": times[0]}
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return {"median": statistics.median(times), "low": low, "high": high}


def ratio(times: list[float], others: list[float]) -> float:
    """Median over rounds of the ratio within a round: what slowed a round down slowed both."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def peak_bytes(call: Callable[[], Any], device: str) -> int:
    """Most bytes allocated at once by `call`, its results included.

    Counted from PyTorch's allocations: exact, and the same in every run. Memory that other libraries allocate
    themselves is not included.
    """
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        result = call()
    del result
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted(
        (event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"
    )
    held = peak = 0
    for _, size in changes:
        held += size
        peak = max(peak, held)
    return peak


def _vocabulary_flops(products: int, *shapes: Any, **_: Any) -> int:
    """2 M H V per product; `hidden` and `weight` are the first two matrices among the arguments."""
    (m, h), (v, _) = [shape for shape in shapes if isinstance(shape, torch.Size) and len(shape) == 2][:2]
    return 2 * products * m * h * v


def flops(call: Callable[[], Any]) -> dict[str, int]:
    """FLOPs of matrix products by operation, including operations that torch does not count."""
    uncounted = {
        torch.ops.aten.addmm_: lambda total, a, b, **_: 2 * a[0] * a[1] * b[1],
    }
    if (packed := getattr(torch.ops.mkldnn, "_linear_pointwise", None)) is not None:  # not in every build
        uncounted[packed] = lambda x, weight, *_, **__: 2 * math.prod(x) * weight[0]
    for name, products in (("linear_forward", 1), ("linear_backward", 3)):  # Triton's; see docs/kernels.md
        if (kernel := getattr(torch.ops.grpo_kernels, name, None)) is not None:
            uncounted[kernel] = partial(_vocabulary_flops, products)
    with FlopCounterMode(display=False, custom_mapping=uncounted) as counter:
        call()
    return {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}


def markdown(columns: Sequence[tuple[str, str]], rows: Sequence[Mapping[str, Any]]) -> str:
    """A table with a column for each (key, format), and a dash where a row lacks the key."""
    lines = ["| " + " | ".join(name for name, _ in columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [form.format(row[name]) if name in row else "-" for name, form in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_rows(
    folder: Path, name: str, where: dict[str, Any], rows: list[dict[str, Any]], absent: dict[str, str]
) -> str:
    """Writes everything to NAME.json and the rows to NAME.csv; returns the line to print."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"machine": where, "absent": absent, "rows": rows}
    (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    keys = list(dict.fromkeys(key for row in rows for key in row))
    with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, keys)
        writer.writeheader()
        writer.writerows(rows)
    return f"written: {folder / name}.json, {name}.csv"
