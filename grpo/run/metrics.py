"""The metrics of a run: assembled per step, written as JSON lines, shown, sent to trackers; warnings.

metrics.jsonl contains what the seed determines, timings.jsonl what the machine determines, so on the same CPU
a rerun gives the same metrics.jsonl byte for byte. Each warning (grpo/run/diagnostics.py) is given once and
kept in metrics.jsonl. A continued run reads that file, so no other state has to be saved.

Left out: averages over steps, which hide the steps that went wrong. Trackers are in trackers.py.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from grpo.config import Config
from grpo.episode import Episode, episode_metrics
from grpo.rollout import Attempt
from grpo.run import files
from grpo.run.diagnostics import Record, Warnings
from grpo.run.trackers import Trackers, completion_rows
from grpo.tasks import Task, Verdict, format_reasons
from grpo.tasks.contract import leaks

# Label, unit and number format of what the console shows of a step: with the seconds, 78 columns in all.
_CONSOLE = {
    "reward": ("reward", "mean", "{:.3f}"),
    "completions/mean_length": ("length", "tokens", "{:.1f}"),
    "frac_reward_zero_std": ("signal", "share", "{:.2f}"),  # shown as 1 - x: groups with a signal
    "kl": ("kl", "nats", "{:.4f}"),
    "entropy": ("entropy", "nats", "{:.3f}"),
    "grad_norm": ("grad", "norm", "{:.3f}"),
    "completions/clipped_ratio": ("cut", "share", "{:.2f}"),
}
_TIME = ("time", "seconds", "{:.1f}")  # not of the record: a rerun gives the same metrics.jsonl
_WIDTH = 7  # of a column, in characters
_HEADER_EVERY = 20  # steps


def history(run_dir: Path) -> list[Record]:
    """The lines of metrics.jsonl; none if there is no such file. MismatchError: a line is damaged."""
    return list(files.read_jsonl(run_dir / "metrics.jsonl", _shape, missing_ok=True))


def _shape(line: Record) -> dict[Any, Any]:
    if "warning" in line:
        return {"step": int, "warning": str, "advice": str}
    return {"step": int, str: (None, float)}


class Metrics:
    """Writes the metrics of one run.

    Args:
        run_dir: the run's directory; must exist. The warnings use the lines already there as history.
        trackers: get the metrics too.
        dtype: compute dtype; decides how far sampler and learner may differ.
        max_steps: shown on the console, if given.
        console: file for the console lines; default: standard output, whatever it is then.
    """

    def __init__(
        self,
        run_dir: str | Path,
        trackers: Trackers | None = None,
        *,
        dtype: str = "bfloat16",
        max_steps: int | None = None,
        console: TextIO | None = None,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.max_steps = max_steps
        self.console = console
        self.steps_shown = 0
        before = history(self.run_dir)
        self.warnings = Warnings(before, dtype=dtype)
        self.trackers = trackers or Trackers(self.run_dir, Config())  # whose `report_to` is none

    def log(self, step: int, metrics: Mapping[str, float], seconds: float | None = None) -> None:
        """Writes one line to metrics.jsonl and one to the console, only the latter with the step's seconds.

        NaN and infinity become null.
        """
        record: Record = {"step": step} | {name: _number(metrics[name]) for name in sorted(metrics)}
        files.append_jsonl(self.run_dir / "metrics.jsonl", record)
        if "reward" in record:
            if self.steps_shown % _HEADER_EVERY == 0:
                self._say(header(self.max_steps))
            self.steps_shown += 1
        self._say(console_line(record, self.max_steps, seconds))
        self.trackers.log(step, _numbers(record))
        for name, advice in self.warnings.update(record).items():
            files.append_jsonl(
                self.run_dir / "metrics.jsonl", {"step": step, "warning": name, "advice": advice}
            )
            self._say(f"warning: {advice}")

    def timings(self, step: int, seconds: Mapping[str, float]) -> None:
        """Writes one line to timings.jsonl: seconds, token rates, and what else differs between reruns."""
        record: Record = {"step": step} | {name: _number(seconds[name]) for name in sorted(seconds)}
        files.append_jsonl(self.run_dir / "timings.jsonl", record)
        self.trackers.log(step, _numbers(record), prefix="timings/")

    def completions(self, step: int, episodes: Sequence[Episode], groups: Sequence[Attempt]) -> None:
        """Sends a few completions of the step to the trackers; the run keeps all in episodes.jsonl.gz."""
        if self.trackers.open:
            self.trackers.table(step, completion_rows(step, episodes, groups))

    def close(self) -> None:
        self.trackers.close()

    def _say(self, line: str) -> None:
        print(line, file=self.console or sys.stdout, flush=True)


def header(max_steps: int | None = None) -> str:
    """Two lines, with the names and the units of the columns of `console_line`."""
    names, units, _ = zip(*_CONSOLE.values(), _TIME, strict=True)
    return "\n".join(_aligned(first, cells, max_steps) for first, cells in (("step", names), ("", units)))


def console_line(record: Record, max_steps: int | None = None, seconds: float | None = None) -> str:
    """A step in the columns of `header`; "-" for what is missing. Validation is `step 8  NAME VALUE ...`."""
    step = f"{record['step']}" + (f"/{max_steps}" if max_steps else "")
    if "reward" not in record:
        shown = [(name, value) for name, value in record.items() if name != "step" and value is not None]
        return "  ".join([f"step {step}", *(f"{name} {value:.4g}" for name, value in shown)])
    cells = []
    for name, (label, _, form) in _CONSOLE.items():
        value = record.get(name)
        cells.append("-" if value is None else form.format(1 - value if label == "signal" else value))
    cells.append("-" if seconds is None else _TIME[2].format(seconds))
    return _aligned(step, cells, max_steps)


def _aligned(step: str, cells: Sequence[str], max_steps: int | None) -> str:
    first = 2 * len(str(max_steps)) + 1 if max_steps else 0
    return "  ".join([step.rjust(max(first, 6)), *(cell.rjust(_WIDTH) for cell in cells)])


def rollout_metrics(
    episodes: Sequence[Episode],
    *,
    train_on: str,
    task: Task,
    groups: Sequence[Attempt],
    success_threshold: float = 1.0,
) -> dict[str, float]:
    """All metrics of one step of RL that its episodes show; `Learner.step` returns those of the update.

    Calls the task, so it comes before the update: an exception of the task then loses no step.

    Args:
        episodes: the step's.
        train_on: the setting; "attempt" has no reflections, so no `leaks`.
        task: the verifier of the episodes.
        groups: the failed attempt of each group; `group_id` of an episode is an index into them.
        success_threshold: the setting.
    Returns:
        Rewards and lengths (`episode_metrics`), verdicts (`verdict_metrics`; `verdicts/score`, their mean
        score, if a verdict is graded), and `leaks`: the share of reflections that state an accepted answer.
    """
    reasons = [reason for episode in episodes for reason in episode.reasons]
    scores = [score for episode in episodes for score in episode.scores or map(_implied, episode.reasons)]
    right = [score >= success_threshold for score in scores]
    metrics = episode_metrics(episodes, train_on) | verdict_metrics(reasons, right, format_reasons(task))
    if any(episode.scores for episode in episodes):
        metrics["verdicts/score"] = sum(scores) / len(scores)
    if train_on != "attempt":
        leaking = [leaks(task, groups[e.group_id].example, e.texts["reflection"]) for e in episodes]
        metrics["leaks"] = sum(leaking) / len(leaking)
    return metrics


def verdict_metrics(
    reasons: Sequence[str], right: Sequence[bool], format_reasons: frozenset[str]
) -> dict[str, float]:
    """Shares of right answers, and of answers that could not be read.

    Args:
        reasons: one per verdict.
        right: whether its score reaches `success_threshold`, for each verdict.
        format_reasons: reasons that mean that the answer could not be read; see `grpo.tasks.Task`.
    """
    count = max(len(reasons), 1)
    return {
        "verdicts/ok": sum(right) / count,
        "verdicts/format": sum(reason in format_reasons for reason in reasons) / count,
    }


def _implied(reason: str) -> float:
    """The score of a verdict that has none of its own."""
    return Verdict(reason).score


def _number(value: Any) -> float | int | None:
    if isinstance(value, int):
        return value
    return float(value) if math.isfinite(value) else None  # JSON has no NaN


def _numbers(record: Record) -> Record:
    return {name: value for name, value in record.items() if name != "step"}
