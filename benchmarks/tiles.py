"""Which tile should grpo/logprob.py use? Time and memory of forward plus backward for several tile sizes.

    python benchmarks/tiles.py
    python benchmarks/tiles.py --size 8192x576x49152 --dtypes bfloat16 --rounds 5

Times are ratios to the present tile, medians over rounds; memory is that beyond inputs and gradients.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # benchmarks/ is no package

import torch  # noqa: E402
from lib.candidates import Problem, backward  # noqa: E402
from lib.measure import command_line, machine, peak_bytes, ratio, seconds  # noqa: E402
from lib.sizes import size_of  # noqa: E402

from grpo import logprob  # noqa: E402

ROWS = (256, 2048, 8192)
ELEMENTS = (1 << 18, 1 << 20, 1 << 22)


def with_tile(problem: Problem, rows: int, elements: int) -> Callable[[], tuple[torch.Tensor, ...]]:
    def call() -> tuple[torch.Tensor, ...]:
        before = logprob.TILE_ROWS, logprob.TILE_ELEMENTS
        logprob.TILE_ROWS, logprob.TILE_ELEMENTS = rows, elements
        try:
            return backward(logprob.linear_logprob(problem.hidden, problem.weight, problem.ids)[0], problem)
        finally:
            logprob.TILE_ROWS, logprob.TILE_ELEMENTS = before

    return call


def main(argv: list[str] | None = None) -> int:
    parser = command_line(__file__, __doc__)
    parser.add_argument(
        "--size", type=size_of, default=(4096, 576, 49152), help="MxHxV (default: 4096x576x49152)"
    )
    parser.add_argument(
        "--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"]
    )
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {arguments.rounds}")
    print(", ".join(f"{key}: {value}" for key, value in machine("cpu").items()))
    now = f"{logprob.TILE_ROWS} rows, {logprob.TILE_ELEMENTS} elements"
    for dtype in arguments.dtypes:
        problem = Problem.make(*arguments.size, getattr(torch, dtype), "cpu")
        calls = {f"{r} rows, {e} elements": with_tile(problem, r, e) for r in ROWS for e in ELEMENTS}
        times = seconds(calls, "cpu", rounds=arguments.rounds)
        gradients = problem.hidden.nbytes + problem.weight.nbytes
        print(
            "\n{}x{}x{}, {}\n\n| tile | times the present one | extra MB |\n|---|---|---|".format(
                *arguments.size, dtype
            )
        )
        for name, call in calls.items():
            extra = (peak_bytes(call, "cpu") - gradients) / 1e6
            label = f"{name} (present)" if name == now else name
            print(f"| {label} | {ratio(times[name], times[now]):.2f} | {extra:.0f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
