"""Where the figures of a run go: JSON lines, one console line per step, TensorBoard if asked for; warnings.

metrics.jsonl holds what the seed determines, timings.jsonl what the machine does, so that the first is byte
for byte the same in a rerun. The warnings are the failure signatures of "Reflect, Retry, Reward" (arXiv
2505.24726) and of GRPO trainers at large: each is a pure function of the metrics so far, is given once,
with advice, and is kept in metrics.jsonl. A continued run reads that file, so nothing else has to be saved.

Left out: averaging over steps (it hides the steps that went wrong, and a reader can do it) and remote
trackers.
"""

import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from grpo.run_dir import append_jsonl

Record = dict[str, Any]  # one line of metrics.jsonl: "step" and the metrics logged then
Rule = Callable[[Sequence[Record]], str | None]  # what the metrics so far give cause to say

# Verdicts that mean "the answer could not be read", as against "the answer was read and is wrong".
FORMAT_REASONS = frozenset(
    "no_answer empty too_long illegal_char syntax parse multi_block no_call dup_key nonfinite shape"
    " positional non_literal".split()
)
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
WINDOW = 5  # steps over which a rule averages: one step is 8 groups in the demo, too few to judge


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
        append_jsonl(self.run_dir / "metrics.jsonl", record)
        self._say(console_line(record, self.max_steps))
        self._scalars(record)
        for name, advice in self.warnings.update(record).items():
            append_jsonl(self.run_dir / "metrics.jsonl", {"step": step, "warning": name, "advice": advice})
            self._say(f"warning: {advice}")

    def timings(self, step: int, seconds: Mapping[str, float]) -> None:
        """One line in timings.jsonl: seconds, token rates, whatever differs from run to run."""
        record: Record = {"step": step} | {name: _number(seconds[name]) for name in sorted(seconds)}
        append_jsonl(self.run_dir / "timings.jsonl", record)
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


# --- warnings ---------------------------------------------------------------------------------------------


class Warnings:
    """Applies the rules to the metrics so far; a rule that has spoken stays silent for the rest of the run.

    Args:
        records: lines of metrics.jsonl, warnings among them: what a continued run has behind it.
        dtype: compute dtype of the run.
    """

    def __init__(self, records: Iterable[Record] = (), *, dtype: str = "bfloat16") -> None:
        records = list(records)
        self.history = [record for record in records if "warning" not in record]
        self.given = {record["warning"] for record in records if "warning" in record}
        self.rules: dict[str, Rule] = {**RULES, "sampling_difference": sampling_difference(dtype)}

    def update(self, record: Record) -> dict[str, str]:
        """Takes the newest metrics and returns what is to be said now for the first time: name -> advice."""
        self.history.append(record)
        found = {name: rule(self.history) for name, rule in self.rules.items() if name not in self.given}
        new = {name: advice for name, advice in found.items() if advice is not None}
        self.given.update(new)
        return new


def _values(history: Sequence[Record], name: str) -> list[float]:
    return [record[name] for record in history if record.get(name) is not None]


def _recent(history: Sequence[Record], name: str) -> float | None:
    """Mean of the last WINDOW values, or None while there are fewer."""
    values = _values(history, name)[-WINDOW:]
    return sum(values) / WINDOW if len(values) == WINDOW else None


def _growth(history: Sequence[Record], name: str) -> float | None:
    """Mean of the last WINDOW values over that of the first, once the two windows do not overlap."""
    values = _values(history, name)
    first = sum(values[:WINDOW])
    return sum(values[-WINDOW:]) / first if len(values) >= 2 * WINDOW and first > 0 else None


def few_signals(history: Sequence[Record]) -> str | None:
    """Fewer than 5% of the groups have rewards that differ: there is nothing to learn from."""
    without = _recent(history, "frac_reward_zero_std")
    if without is None or without <= 0.95:
        return None
    return (
        f"only {1 - without:.0%} of the groups have a signal (rewards that differ): the task is too hard for "
        "the model, or too easy. Too hard: try an easier task, a warm start (warm_start_steps), or more "
        "retries_per_reflection."
    )


def no_success(history: Sequence[Record]) -> str | None:
    """Not one retry of the starting policy was right: if that stays so, all rewards are 0."""
    if _values(history, "validation/retry") != [0]:
        return None
    return (
        "no retry of the starting model was right: as long as that is so there is nothing to learn from. Try "
        "an easier task, a warm start (warm_start_steps), or a larger model."
    )


def growing_length(history: Sequence[Record]) -> str | None:
    """Completions run into their limit: 30% of them, or 10% while they have become half as long again."""
    truncated = _recent(history, "completions/clipped_ratio")
    if truncated is None or truncated < 0.1:
        return None
    growth = _growth(history, "completions/mean_length")
    if truncated < 0.3 and (growth is None or growth < 1.5):
        return None
    return (
        f"{truncated:.0%} of the completions hit their length limit and may be repeating themselves. Read "
        "some in episodes.jsonl; try overlong_buffer, a higher limit, or a lower learning_rate."
    )


def entropy_collapse(history: Sequence[Record]) -> str | None:
    """Entropy below a quarter of what it was: the members of a group become copies of each other."""
    growth = _growth(history, "entropy")
    if growth is None or growth >= 0.25:
        return None
    return (
        f"entropy fell to {growth:.0%} of its first value: completions of a group become alike and leave "
        "nothing to compare. Try a lower learning_rate, a higher beta, or a higher epsilon_high."
    )


def idle_reflection(history: Sequence[Record]) -> str | None:
    """Retries after a reflection improved no more than retries without one: the reflection does nothing."""
    retry, blind = _values(history, "validation/retry"), _values(history, "validation/retry_blind")
    if len(retry) < 2 or len(blind) < 2:
        return None
    gain, blind_gain = retry[-1] - retry[0], blind[-1] - blind[0]
    if gain < 0.05 or blind_gain < gain:
        return None
    return (
        f"retries gained {gain:.1%} with a reflection and {blind_gain:.1%} without one: the model learned "
        "the task and not to reflect. That is a result too; compare the controls that the evaluation prints."
    )


def answer_leakage(history: Sequence[Record]) -> str | None:
    """More than half of the reflections state an accepted answer, which the retry only has to copy."""
    share = _recent(history, "leaks")
    if share is None or share <= 0.5:
        return None
    return (
        f"{share:.0%} of the reflections state an accepted answer: the retry only copies it. Where finding "
        "the answer is what a reflection is for, this is expected; else change reflection_instruction."
    )


def large_kl(history: Sequence[Record]) -> str | None:
    """The policy is more than half a nat per token away from the reference."""
    kl = _recent(history, "kl")
    if kl is None or kl <= 0.5:
        return None
    return (
        f"kl is {kl:.2f} nats per token: the policy has moved far from where it started. Check beta and "
        "learning_rate (the paper: 0.001 and 5e-7)."
    )


def format_errors(history: Sequence[Record]) -> str | None:
    """Most verdicts say that the answer could not be read."""
    share = _recent(history, "verdicts/format")
    if share is None or share <= 0.5:
        return None
    return (
        f"{share:.0%} of the answers could not be read by the verifier: the model learns the format first. "
        "Try a warm start, or a max_completion_length that leaves room for the answer."
    )


def sampling_difference(dtype: str) -> Rule:
    """The rule for `dtype`: rounding gives about 0.04 nats in bfloat16 on a CPU, below 1e-5 in float32."""
    bound = 1e-3 if dtype == "float32" else 0.12

    def rule(history: Sequence[Record]) -> str | None:
        difference = _recent(history, "sampling/sampling_logp_difference/mean")
        if difference is None or difference <= bound:
            return None
        return (
            f"log-probs of sampler and learner differ by {difference:.3g} nats on average, more than {dtype} "
            "explains: look for stale sampler weights, another temperature, or other attention masks."
        )

    return rule


RULES: dict[str, Rule] = {
    "no_success": no_success,
    "few_signals": few_signals,
    "growing_length": growing_length,
    "entropy_collapse": entropy_collapse,
    "idle_reflection": idle_reflection,
    "answer_leakage": answer_leakage,
    "large_kl": large_kl,
    "format_errors": format_errors,
}
