"""Which tokens should carry the gradient, and does it matter that only failures are trained on?

The paper trains the reflection only. The arms here train the reflection, the reflection and the retry, the
retry, and the first attempt without any reflection (plain GRPO), on failures and on all examples. Compute is
matched by sampled tokens: an attempt is shorter than a reflection with its retry, so arms of attempts get
more groups per step.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from grpo.experiments.outcome import ARM_COLUMNS, Outcome, arm_row
from grpo.experiments.study import Arm, Study
from grpo.run import files

QUESTION = "Which tokens should carry the gradient, at equal compute?"
DEFAULTS = {"max_steps": 8, "num_eval": 128}
MODES = ("reflection", "all", "retry", "attempt", "attempt, all examples")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=MODES,
        default=list(MODES),
        metavar="MODE",
        help="arms to run besides reflection, among: " + ", ".join(MODES),
    )


def run(study: Study, options: argparse.Namespace) -> Outcome:
    arms: dict[str, list[Arm]] = {mode: [] for mode in dict.fromkeys(["reflection", *options.modes])}
    for seed in options.seeds:
        start = study.start(seed)
        for mode in arms:
            if mode.startswith("attempt"):
                groups = matching_groups(arms["reflection"][-1], start)
                everything = mode != "attempt"
                arm = study.arm(
                    "attempt-all" if everything else "attempt",
                    seed,
                    share=() if everything else ("failures.jsonl",),
                    train_on="attempt",
                    only_failures=not everything,
                    groups_per_step=groups,
                )
            else:
                arm = study.arm(mode, seed, train_on=mode)
            arms[mode].append(arm)
    rows = [arm_row(mode, by_seed, arms["reflection"]) for mode, by_seed in arms.items()]
    return Outcome(QUESTION, ARM_COLUMNS, rows, ("first_gain", "gain"))


def matching_groups(reflection: Arm, start: Path) -> int:
    """Groups of attempts that sample as many tokens per step as `reflection` does with its retries."""
    per_step = reflection.sampled_tokens() / reflection.config.max_steps
    lengths = [
        len(line["attempt_ids"]) for line in files.records(start / "failures.jsonl", {"attempt_ids": [int]})
    ]
    return max(1, round(per_step / (statistics.fmean(lengths) * reflection.config.num_generations)))
