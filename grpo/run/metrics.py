"""Where the figures of a run go: JSON lines, one console line per step, TensorBoard if asked for; warnings.

metrics.jsonl holds what the seed determines, timings.jsonl what the machine does, so that the first is byte
for byte the same in a rerun. Warnings (grpo/run/diagnostics.py) are given once and kept in metrics.jsonl. A
continued run reads that file, so nothing else has to be saved.

Left out: averaging over steps (it hides the steps that went wrong, and a reader can do it) and remote
trackers.
"""

import json
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from grpo.run.diagnostics import FORMAT_REASONS, Record, Warnings

# Label and number format of what the console shows of a step.
_CONSOLE = {
    "reward": ("reward", "{:.3f}"),
    "completions/mean_length": ("length", "{:.1f}"),
    "frac_reward_zero_std": ("signal", "{:.2f}"),  # shown as 1 - x: the share of groups with a signal
    "kl": ("kl", "{:.4f}"),
    "entropy": ("entropy", "{:.3f}"),
    "grad_norm": ("grad_norm", "{:.3f}"),
    "completions/clipped_ratio": ("truncated", "{:.2f}"),
}


class Metrics:
    """Writes the metrics of one run.

    Args:
        run_dir: the run's directory; must exist. Lines already there are history for the warnings.
        tensorboard: also write TensorBoard files to `run_dir/tensorboard`.
        dtype: compute dtype, which decides how far sampler and learner may differ.
        max_steps: shown on the console, if given.
        console: where the console lines go.
    Raises:
        ValueError: TensorBoard is asked for and not installed.
    """

    def __init__(
        self,
        run_dir: str | Path,
        tensorboard: bool = False,
        *,
        dtype: str = "bfloat16",
        max_steps: int | None = None,
        console: TextIO | None = None,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.max_steps = max_steps
        self.console = console or sys.stdout
        self.writer = _summary_writer(self.run_dir / "tensorboard") if tensorboard else None
        self.warnings = Warnings(read_jsonl(self.run_dir / "metrics.jsonl"), dtype=dtype)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line in metrics.jsonl and one on the console. NaN and infinity become null."""
        record: Record = {"step": step} | {name: _number(metrics[name]) for name in sorted(metrics)}
        _append(self.run_dir / "metrics.jsonl", record)
        self._say(console_line(record, self.max_steps))
        self._scalars(record)
        for name, advice in self.warnings.update(record).items():
            _append(self.run_dir / "metrics.jsonl", {"step": step, "warning": name, "advice": advice})
            self._say(f"warning: {advice}")

    def timings(self, step: int, seconds: Mapping[str, float]) -> None:
        """One line in timings.jsonl: seconds, token rates, whatever differs from run to run."""
        record: Record = {"step": step} | {name: _number(seconds[name]) for name in sorted(seconds)}
        _append(self.run_dir / "timings.jsonl", record)
        self._scalars(record, prefix="timings/")

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()

    def _say(self, line: str) -> None:
        print(line, file=self.console, flush=True)

    def _scalars(self, record: Record, prefix: str = "") -> None:
        if self.writer is not None:
            for name, value in record.items():
                if name != "step" and value is not None:
                    self.writer.add_scalar(prefix + name, value, record["step"])


def console_line(record: Record, max_steps: int | None = None) -> str:
    """`step 3/16  reward 0.412  length 57.3 ...`; a record without a reward (validation) shows all it has."""
    parts = [f"step {record['step']}" + (f"/{max_steps}" if max_steps else "")]
    if "reward" in record:
        for name, (label, form) in _CONSOLE.items():
            value = record.get(name)
            if value is not None:
                parts.append(f"{label} {form.format(1 - value if label == 'signal' else value)}")
    else:
        shown = [(name, value) for name, value in record.items() if name != "step" and value is not None]
        parts += [f"{name} {value:.4g}" for name, value in shown]
    return "  ".join(parts)


def verdict_metrics(reasons: Iterable[str]) -> dict[str, float]:
    """Shares of right answers and of answers that could not be read, from the verdicts' reasons."""
    reasons = list(reasons)
    count = max(len(reasons), 1)
    return {
        "verdicts/ok": sum(reason == "ok" for reason in reasons) / count,
        "verdicts/format": sum(reason in FORMAT_REASONS for reason in reasons) / count,
    }


def read_jsonl(path: Path) -> list[Record]:
    """The records of a .jsonl file; none where there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _append(path: Path, record: Record) -> None:
    # opened anew for each line: a step takes seconds, and a killed run then has lost no line that it printed
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")


def _number(value: Any) -> float | int | None:
    if isinstance(value, int):
        return value
    return float(value) if math.isfinite(value) else None  # JSON has no NaN


def _summary_writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("tensorboard needs its extra: pip install 'reflect-grpo[tensorboard]'") from None
    return SummaryWriter(str(folder))
