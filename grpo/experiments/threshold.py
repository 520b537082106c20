"""How good must the model be before RL for RL to help?

Warm starts of several lengths, from none to the preset's own, are each followed by RL. The table compares
what the model does before RL with what RL adds. Before RL: first tries right, retries right, and the share of
groups with a signal, that is, with different rewards. train.py stops if no retry is right in the first steps;
the row then has no gain. With --run the full warm start is that of the run.
"""

from __future__ import annotations

import argparse
import statistics

from grpo.evaluate.statistics import bootstrap_interval, wilson_interval
from grpo.experiments.outcome import Column, Outcome, Row, arm_row, percent
from grpo.experiments.study import Arm, Study
from grpo.failures import summary

QUESTION = "How good must the model be before RL for RL to help?"
DEFAULTS = {"max_steps": 8, "num_eval": 128}
COLUMNS = {
    "arm": Column("warm-start steps"),
    "first_before": percent("1st try before RL, train"),
    "retries": percent("retries right, first step"),
    "signal": percent("groups with a signal"),
    "second_try": percent("2nd try after RL"),
    "gain": percent("gain of the 2nd try"),
    "truncated": percent("cut"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--warm_starts",
        type=int,
        nargs="+",
        metavar="N",
        help="supervised steps before RL (default: 0, 1/6, 1/3 and all of warm_start_steps)",
    )


def run(study: Study, options: argparse.Namespace) -> Outcome:
    full = study.config.warm_start_steps
    counts = options.warm_starts or list(dict.fromkeys([0, full // 6, full // 3, full]))
    arms: dict[int, list[Arm]] = {count: [] for count in counts}
    for seed in options.seeds:
        for count in counts:
            start = study.start(seed, f"start{count}", warm_start_steps=count)
            arms[count].append(study.arm(f"warm{count}", seed, start=start, may_lack_signal=True))
    return Outcome(QUESTION, COLUMNS, [_row(*item) for item in arms.items()], ("signal", "gain"))


def _row(warm_start_steps: int, arms: list[Arm]) -> Row:
    counts = [summary(arm.folder / "failures.jsonl") for arm in arms]
    right, attempts = (sum(count[name] for count in counts) for name in ("right", "attempts"))
    steps = [step for arm in arms for step in arm.metrics()]
    label = str(warm_start_steps)
    finished = [arm for arm in arms if not arm.no_signal]
    return {
        **(arm_row(label, finished) if finished else {"arm": label}),
        "first_before": wilson_interval(right, attempts)._asdict(),
        "retries": statistics.fmean(arm.metrics()[0]["verdicts/ok"] for arm in arms),
        "signal": bootstrap_interval([1 - step["frac_reward_zero_std"] for step in steps])._asdict(),
        "stopped": len(arms) - len(finished),
    }
