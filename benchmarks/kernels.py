"""Time, memory and error of log-probs and GRPO loss from hidden states: ours, plain PyTorch, other libraries.

    python benchmarks/kernels.py                                  one size, both dtypes, installed packages
    python benchmarks/kernels.py --sizes 8192x2048x151936 --dtypes bfloat16 --rounds 5
    python benchmarks/kernels.py --device cuda --sizes 8192x4096x128256 --peers ours eager cce

A size is MxHxV: selected tokens, hidden size, vocabulary. There are two operations: `logprob`, the log-probs
of M tokens, and `grpo`, the on-policy loss from rewards. Measured for each implementation:

- median and quartiles of the forward pass, and of forward plus backward;
- useful TFLOP/s: 2 M H V forward, 6 M H V both, without what an implementation recomputes;
- peak memory beyond the inputs and the two gradients;
- relative error against float64 on the same rounded inputs, on the first rows.

Packages that are not installed are listed as absent; `pip install -e ".[bench]"` installs them.

Writes kernels.csv, kernels.json and kernels.png to --output.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # benchmarks/ is no package

import torch  # noqa: E402
from lib.candidates import ABOUT, BUILDERS, Forward, Problem, backward, build, eager_logprob, loss_of  # noqa: E402
from lib.measure import (  # noqa: E402
    DTYPES,
    command_line,
    machine,
    markdown,
    peak_bytes,
    ratio,
    seconds,
    summary,
    write_rows,
)
from lib.sizes import size_of  # noqa: E402

OPERATIONS = ("logprob", "grpo")
DEFAULT_SIZES = {"cpu": [(2048, 576, 49152)], "cuda": [(8192, 4096, 128256)]}
ERROR_ROWS = 256  # of the comparison with float64, which is slow
COLUMNS = [
    ("peer", "{}"),
    ("forward_ms", "{:.1f}"),
    ("both_ms", "{:.1f}"),
    ("both_low_ms", "{:.1f}"),
    ("both_high_ms", "{:.1f}"),
    ("times_eager", "{:.2f}"),
    ("tflops", "{:.3f}"),
    ("extra_mb", "{:.1f}"),
    ("value_error", "{:.1e}"),
    ("hidden_error", "{:.1e}"),
    ("weight_error", "{:.1e}"),
]


def errors(operation: str, forward: Forward, problem: Problem) -> dict[str, float]:
    """Relative error (2-norm) of value and gradients against float64 on the same rounded inputs."""
    part = problem.first(min(ERROR_ROWS, len(problem.ids)))
    exact = part.to(torch.float64)
    right = eager_logprob(exact.hidden, exact.weight, exact.ids)
    right = right if operation == "logprob" else loss_of(right, exact)
    ours = forward(part)
    pairs = zip((ours, *backward(ours, part)), (right, *backward(right, exact)), strict=True)
    relative = {}
    for name, (x, y) in zip(("value", "hidden", "weight"), pairs, strict=True):
        # On-policy the loss is 0 up to rounding, and so is the gradient if all rewards are equal. Then the
        # error is absolute.
        scale = y.detach().norm().item() if y.ndim else max(1.0, y.abs().item())
        scale = scale or 1.0
        relative[f"{name}_error"] = ((x.detach().double() - y.detach()).norm() / scale).item()
    return relative


def measure(
    operation: str, size: tuple[int, int, int], dtype: str, device: str, peers: list[str], rounds: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A row for each implementation that runs here, and why the others do not."""
    m, h, v = size
    torch.compiler.reset()  # one size at a time: its limit on recompilations is low
    problem = Problem.make(m, h, v, DTYPES[dtype], device)
    candidates, absent = build(peers, operation, device)
    rows = []
    for name, forward in list(candidates.items()):
        try:
            row = {"peer": name, **errors(operation, forward, problem)}
            row["extra_bytes"] = peak_bytes(lambda f=forward: backward(f(problem), problem), device)
        except Exception as error:  # another library's failure is a result
            if name == "ours":
                raise
            absent[name] = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            del candidates[name]
            continue
        gradients = problem.hidden.nbytes + problem.weight.nbytes
        rows.append({**row, "extra_bytes": row["extra_bytes"] - gradients})
    both = {name: (lambda f=forward: backward(f(problem), problem)) for name, forward in candidates.items()}
    ahead = {name: (lambda f=forward: f(problem)) for name, forward in candidates.items()}
    times = seconds(both, device, rounds=rounds)
    forward_times = seconds(ahead, device, rounds=rounds)
    for row in rows:
        name = row["peer"]
        all_of_it, first = summary(times[name]), summary(forward_times[name])
        row |= {"operation": operation, "m": m, "h": h, "v": v, "dtype": dtype}
        row |= {f"both_{key}": value for key, value in all_of_it.items()}
        row |= {f"forward_{key}": value for key, value in first.items()}
        row |= {"tflops": 6 * m * h * v / all_of_it["median"] / 1e12}
        row |= {"forward_tflops": 2 * m * h * v / first["median"] / 1e12}
        if "eager" in times:
            row["times_eager"] = ratio(times[name], times["eager"])
    return rows, absent


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    shown = [
        {
            **row,
            "forward_ms": 1e3 * row["forward_median"],
            "both_ms": 1e3 * row["both_median"],
            "both_low_ms": 1e3 * row["both_low"],
            "both_high_ms": 1e3 * row["both_high"],
            "extra_mb": row["extra_bytes"] / 1e6,
        }
        for row in rows
    ]
    return markdown(COLUMNS, shown)


def plot(folder: Path, rows: list[dict[str, Any]]) -> str:
    """Draws time and memory as bars, two panels for each size; returns the end of the line to print."""
    try:
        import matplotlib
    except ImportError:
        return " (no plot: matplotlib is not installed)"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = list(dict.fromkeys((r["operation"], r["m"], r["h"], r["v"], r["dtype"]) for r in rows))
    figure, axes = pyplot.subplots(len(cases), 2, figsize=(11, 2.6 * len(cases)), squeeze=False)
    for (time_axis, memory_axis), case in zip(axes, cases, strict=True):
        chosen = [r for r in rows if (r["operation"], r["m"], r["h"], r["v"], r["dtype"]) == case]
        names = [r["peer"] for r in chosen]
        middle = [1e3 * r["both_median"] for r in chosen]
        spread = [
            [1e3 * (r["both_median"] - r["both_low"]) for r in chosen],
            [1e3 * (r["both_high"] - r["both_median"]) for r in chosen],
        ]
        time_axis.barh(names, middle, xerr=spread)
        time_axis.set_title("{}, {}x{}x{}, {}".format(*case), fontsize=9)
        time_axis.set_xlabel("forward + backward, ms")
        memory_axis.barh(names, [max(1, r["extra_bytes"]) / 1e6 for r in chosen])
        memory_axis.set_xscale("log")
        memory_axis.set_xlim(left=1)  # the same scale for all, and room between the ticks
        memory_axis.set_xlabel("peak memory beyond inputs and gradients, MB")
        for axis in (time_axis, memory_axis):
            axis.invert_yaxis()
    figure.tight_layout()
    figure.savefig(folder / "kernels.png", dpi=110)
    pyplot.close(figure)
    return ", kernels.png"


def main(argv: list[str] | None = None) -> int:
    parser = command_line(__file__, __doc__)
    there = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=there, choices=["cpu", "cuda"], help="(default: %(default)s)")
    parser.add_argument("--sizes", nargs="+", type=size_of, help="MxHxV ... (default: depends on the device)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="(default: all)")
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--peers", nargs="+", choices=BUILDERS, default=list(BUILDERS), help="(default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's default")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="(default: %(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {arguments.rounds}")
    if arguments.device == "cuda" and there == "cpu":
        parser.error("--device cuda: this machine has no CUDA or ROCm device")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    where = machine(arguments.device)
    print(", ".join(f"{key}: {value}" for key, value in where.items()))
    rows: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    for size in arguments.sizes or DEFAULT_SIZES[arguments.device]:
        for dtype in arguments.dtypes:
            for operation in arguments.operations:
                new, why_not = measure(
                    operation, size, dtype, arguments.device, arguments.peers, arguments.rounds
                )
                print("\n{}, {}x{}x{}, {}\n\n{}".format(operation, *size, dtype, table(new)), flush=True)
                rows += new
                absent |= {f"{operation}/{name}": why for name, why in why_not.items()}
    print()
    for name, why in absent.items():
        print(f"absent: {name} ({ABOUT[name.partition('/')[2]]}): {why}")
    print(write_rows(arguments.output, "kernels", where, rows, absent) + plot(arguments.output, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
