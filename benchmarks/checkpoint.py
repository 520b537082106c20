"""What does saving a checkpoint cost? Seconds that the run waits, seconds until it is complete, host memory.

    python benchmarks/checkpoint.py                        a state of 2 GB
    python benchmarks/checkpoint.py --gb 21.6 --device cuda --folder /data/runs

The state is synthetic: bfloat16 weights, float32 masters and two moments. On a CPU each tensor is every
second element of a larger one, so it must be copied to be written, as from a GPU. Meanwhile the main thread
wakes up every millisecond, like a rollout that launches kernels. A long pause means that the writer kept it
from running.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # benchmarks/ is no package

import torch  # noqa: E402
from lib.measure import command_line, machine  # noqa: E402

from grpo.learner.optimizer import MOMENTS  # noqa: E402
from grpo.model.shards import ShardWriter  # noqa: E402
from grpo.run import build, checkpoint  # noqa: E402

SHAPE = 8960, 1536  # of Qwen2.5-1.5B's down_proj: 55 MB in float32
BYTES = 2 + 4 + 4 * len(MOMENTS)  # of a parameter


def state(gb: float, device: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(weights, trainer's tensors) of about `gb` in all."""
    count = max(1, round(gb * 1e9 / BYTES / (SHAPE[0] * SHAPE[1])))

    def ones(dtype: torch.dtype) -> torch.Tensor:
        if device == "cpu":
            return torch.ones(*SHAPE, 2, dtype=dtype)[..., 0]
        return torch.ones(SHAPE, dtype=dtype, device=device)

    weights = {f"{index}.weight": ones(torch.bfloat16) for index in range(count)}
    parts = ("master", *MOMENTS)
    return weights, {f"{part}.{name}": ones(torch.float32) for part in parts for name in weights}


def main(argv: list[str] | None = None) -> int:
    parser = command_line(__file__, __doc__)
    parser.add_argument("--gb", type=float, default=2.0, help="its size (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:0 (default: %(default)s)")
    parser.add_argument("--folder", help="where to write (default: the temporary directory)")
    arguments = parser.parse_args(argv)
    print(", ".join(f"{key}: {value}" for key, value in machine(arguments.device).items()))
    weights, tensors = state(arguments.gb, arguments.device)
    size = sum(tensor.nbytes for tensor in (*weights.values(), *tensors.values())) / 1e9

    def write_model(folder: Path, writer: ShardWriter) -> None:
        writer.write(weights, folder, "model")

    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder, checkpoint.Saver() as saver:
        before = build.peak_memory_gb("cpu")
        start = last = time.perf_counter()
        saver.save(Path(folder), 1, tensors=tensors, state={}, write_model=write_model)
        blocked, pause = time.perf_counter() - start, 0.0
        while not checkpoint.steps(folder):
            time.sleep(0.001)
            now = time.perf_counter()
            last, pause = now, max(pause, now - last)
        saver.wait()
        seconds = time.perf_counter() - start
        memory = build.peak_memory_gb("cpu") - before
    print(
        f"{size:.3g} GB: save returns after {blocked:.3f} s, it is complete after {seconds:.1f} s; "
        f"{memory:.2f} GB of host memory beyond the state; longest pause of the main thread {pause:.3f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
