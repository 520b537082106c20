"""Did a run learn, by how much, with which interval: its first lines on the page.

The evaluation on held-out problems decides, if there is one; then the validations; then the reward.

Left out: a comparison of several seeds, which one run cannot give.
"""

from __future__ import annotations

from typing import Any

from grpo.report import curves
from grpo.report.data import DAMAGED, NAMES, Point, Run, number
from grpo.report.text import interval, percent, points


def result(run: Run) -> dict[str, Any]:
    """Did it learn, by how much, with which interval: {verdict, sentence, change, columns, rows, detail}."""
    try:
        if (measured := _measured(run)) is not None:
            return measured
    except DAMAGED as error:
        run.notes.append(f"evaluation.json is not as expected: {type(error).__name__}: {error}")
    return _so_far(run)


def _measured(run: Run) -> dict[str, Any] | None:
    """By the evaluation on held-out problems; None if it has no model before and after RL."""
    report = run.evaluation or {}
    wanted = {"before": "before_rl", "after": "trained"}
    comparison = next((c for c in report.get("comparisons", ()) if wanted.items() <= c.items()), None)
    if comparison is None:
        return None
    before, after = (report["models"][label] for label in wanted.values())
    change = comparison["second_try"]
    low, high = number(change["low"]), number(change["high"])
    if low is None or high is None:
        return None
    verdict = "up" if low > 0 else "down" if high < 0 else "unclear"
    words = {
        "up": "It learned: RL raised the second try by",
        "down": "It got worse: RL lowered the second try by",
        "unclear": "No clear change: RL moved the second try by",
    }
    labels = {
        "first_try": "First try",
        "second_try": "Second try",
        "retry_success": "Retry after a reflection",
    }
    rows = [(label, before[name], after[name], comparison[name]) for name, label in labels.items()]
    for name, difference in comparison["controls"].items():
        control = [model["controls"].get(name, {}).get("success") for model in (before, after)]
        if difference is not None or any(control):
            rows.append((f"{name.capitalize()} retry (control)", *control, difference))
    return {
        "verdict": verdict,
        "sentence": words[verdict],
        "change": f"{points(change)} points {interval(change)}",
        "detail": f"{report['num_problems']} held-out problems, before and after RL. Brackets are 95% "
        "intervals over the problems; other seeds vary too. A second try is right if the first try or the "
        "retry is.",
        "rows": [
            (label, *(_share(side) for side in sides), (points(diff), interval(diff)))
            for label, *sides, diff in rows[:NAMES]
        ],
        "columns": ("before RL", "after RL", "points"),
    }


def _share(share: Any) -> tuple[str, str]:
    return (percent(share["mean"]), interval(share)) if isinstance(share, dict) else ("-", "")


def _so_far(run: Run) -> dict[str, Any]:
    """By the validations, or by the reward, of a run that was not evaluated."""
    validated = [point for point in run.validations if "validation/second_try" in point]
    base = {"verdict": "none", "change": "", "rows": [], "detail": "", "columns": ()}
    if not validated:
        return {**base, "sentence": _by_reward(run)}
    first, last = validated[0], validated[-1]
    labels = {
        "first_try": "First try",
        "second_try": "Second try",
        "retry": "Retry after a reflection",
        "retry_blind": "Blind retry (control)",
    }
    ends = [first] if first is last else [first, last]
    rows = []
    for name, label in labels.items():
        if all(f"validation/{name}" in point for point in ends):
            row = [label, *(_validated(run, point, name) for point in ends)]
            if len(ends) == 2:
                change = last[f"validation/{name}"] - first[f"validation/{name}"]
                row.append((points({"mean": change}), ""))
            rows.append(row)
    old, new = (percent(point["validation/second_try"]) for point in (first, last))
    once, twice = (
        f"Validated once: second try {old}",
        f"In validation the second try went from {old} to {new}",
    )
    problems = f"{run.count('num_validation') or 'An unknown number of'} validation problems."
    return {
        **base,
        "sentence": f"Not evaluated yet. {once if len(ends) == 1 else twice}",
        "rows": rows,
        "columns": [f"step {int(point['step'])}" for point in ends] + ["points"] * (len(ends) - 1),
        "detail": f"{problems} Brackets are 95% intervals of the shares.",
    }


def _validated(run: Run, point: Point, name: str) -> tuple[str, str]:
    low, high = curves.validation_interval(run, point, name)
    shown_interval = interval({"low": low, "high": high}) if low != high else ""
    return percent(point[f"validation/{name}"]), shown_interval


def _by_reward(run: Run) -> str:
    if not run.steps:
        return "No RL step yet"
    first, last = (
        f"{point['reward']:.3f} at step {int(point['step'])}" for point in (run.steps[0], run.steps[-1])
    )
    return f"Not evaluated yet. Reward {first}, {last}"
