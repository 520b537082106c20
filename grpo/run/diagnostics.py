"""The warnings of a run: rules on its metrics so far, one for each way in which such runs fail.

They are the failure signatures of "Reflect, Retry, Reward" (arXiv 2505.24726) and of GRPO in general.
Each rule is a pure function of the history. It returns advice or None.

Left out: rules about single steps. One step has too few groups to judge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Record = dict[str, Any]  # one line of metrics.jsonl: "step" and the metrics logged then
Rule = Callable[[Sequence[Record]], str | None]  # advice, if the metrics so far give cause for it

WINDOW = 5  # steps over which a rule averages


class Warnings:
    """Applies the rules to the metrics so far. Each rule warns once per run.

    Args:
        records: earlier lines of metrics.jsonl, including warnings; for a continued run.
        dtype: compute dtype of the run.
    """

    def __init__(self, records: Iterable[Record] = (), *, dtype: str = "bfloat16") -> None:
        records = list(records)
        self.history = [record for record in records if "warning" not in record]
        self.given = {record["warning"] for record in records if "warning" in record}
        self.rules: dict[str, Rule] = {**RULES, "sampling_difference": sampling_difference(dtype)}

    def update(self, record: Record) -> dict[str, str]:
        """Adds the newest metrics. Returns the warnings that are new: name -> advice."""
        self.history.append(record)
        advices = {name: rule(self.history) for name, rule in self.rules.items() if name not in self.given}
        new = {name: advice for name, advice in advices.items() if advice is not None}
        self.given.update(new)
        return new


def _values(history: Sequence[Record], name: str) -> list[float]:
    return [record[name] for record in history if record.get(name) is not None]


def _recent(history: Sequence[Record], name: str) -> float | None:
    """Mean of the last WINDOW values, or None while there are fewer."""
    values = _values(history, name)[-WINDOW:]
    return sum(values) / WINDOW if len(values) == WINDOW else None


def _growth(history: Sequence[Record], name: str) -> float | None:
    """Mean of the last WINDOW values divided by the mean of the first; None while the windows overlap."""
    values = _values(history, name)
    first = sum(values[:WINDOW])
    return sum(values[-WINDOW:]) / first if len(values) >= 2 * WINDOW and first > 0 else None


def few_signals(history: Sequence[Record]) -> str | None:
    """Fewer than 5% of the groups have rewards that differ, so there is little to learn from."""
    without = _recent(history, "frac_reward_zero_std")
    if without is None or without <= 0.95:
        return None
    return (
        f"only {1 - without:.0%} of the groups have a signal (rewards that differ): the task is too hard for "
        "the model, or too easy. Too hard: try an easier task, a warm start (warm_start_steps), or more "
        "retries_per_reflection."
    )


def no_success(history: Sequence[Record]) -> str | None:
    """No retry of the starting policy was right. If that does not change, all rewards are 0."""
    if _values(history, "validation/retry") != [0]:
        return None
    return (
        "no retry of the starting model was right: until one is, there is nothing to learn from. Try "
        "an easier task, a warm start (warm_start_steps), or a larger model."
    )


def nothing_right(history: Sequence[Record], *, episodes_per_step: int, limit: int) -> str | None:
    """No answer in the first `limit` episodes was right: all rewards are equal, and will likely stay equal.

    Args:
        episodes_per_step: groups_per_step times num_generations; a step counts as a whole.
        limit: max_wrong_episodes; 0: no limit.
    """
    steps = math.ceil(limit / episodes_per_step)
    shares = _values(history, "verdicts/ok")[:steps]
    if not limit or len(shares) < steps or any(shares):
        return None
    return (
        f"not one of the first {steps * episodes_per_step} answers was right ({steps} steps): the task is "
        "too hard for this model, and without a right answer there is nothing to learn from. Try an easier "
        "task (task_options), a warm start (warm_start_steps), or a larger model; max_wrong_episodes 0 "
        "continues"
    )


def growing_length(history: Sequence[Record]) -> str | None:
    """30% of the completions hit their limit, or 10% do and the mean length has grown by half."""
    truncated = _recent(history, "completions/clipped_ratio")
    if truncated is None or truncated < 0.1:
        return None
    growth = _growth(history, "completions/mean_length")
    if truncated < 0.3 and (growth is None or growth < 1.5):
        return None
    return (
        f"{truncated:.0%} of the completions hit their length limit and may be repeating themselves. Read "
        "some in episodes.jsonl.gz; try overlong_buffer, a higher limit, or a lower learning_rate."
    )


def entropy_collapse(history: Sequence[Record]) -> str | None:
    """Entropy is below a quarter of its first value: completions of a group become copies of each other."""
    growth = _growth(history, "entropy")
    if growth is None or growth >= 0.25:
        return None
    return (
        f"entropy fell to {growth:.0%} of its first value: completions of a group become alike and leave "
        "nothing to compare. Try a lower learning_rate, a higher beta, or a higher epsilon_high."
    )


def idle_reflection(history: Sequence[Record]) -> str | None:
    """Retries after a reflection improved no more than blind ones, so the reflection does nothing."""
    retry, blind = _values(history, "validation/retry"), _values(history, "validation/retry_blind")
    if len(retry) < 2 or len(blind) < 2:
        return None
    gain, blind_gain = retry[-1] - retry[0], blind[-1] - blind[0]
    if gain < 0.05 or blind_gain < gain:
        return None
    return (
        f"retries gained {gain:.1%} with a reflection and {blind_gain:.1%} without one: the model learned "
        "the task, not to reflect. Compare the controls that the evaluation prints."
    )


def answer_leakage(history: Sequence[Record]) -> str | None:
    """More than half of the reflections state an accepted answer, which the retry only has to copy."""
    share = _recent(history, "leaks")
    if share is None or share <= 0.5:
        return None
    return (
        f"{share:.0%} of the reflections state an accepted answer: the retry only copies it. This is "
        "expected if reflections should find the answer; otherwise change the task's reflection_instruction."
    )


def large_kl(history: Sequence[Record]) -> str | None:
    """The policy is more than half a nat per token from the reference."""
    kl = _recent(history, "kl")
    if kl is None or kl <= 0.5:
        return None
    return (
        f"kl is {kl:.2f} nats per token: the policy has moved far from where it started. Check beta and "
        "learning_rate (the paper: 0.001 and 5e-7)."
    )


def format_errors(history: Sequence[Record]) -> str | None:
    """More than half of the answers could not be read."""
    share = _recent(history, "verdicts/format")
    if share is None or share <= 0.5:
        return None
    return (
        f"{share:.0%} of the answers could not be read by the verifier: the model learns the format first. "
        "Try a warm start, or a max_completion_length that leaves room for the answer."
    )


def sampling_difference(dtype: str) -> Rule:
    """The rule for `dtype`. Rounding gives about 0.04 nats in bfloat16 on a CPU, below 1e-5 in float32."""
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
