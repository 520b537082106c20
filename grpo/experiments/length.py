"""How long should a reflection be? Success and tokens under several limits and costs of length.

Short reflections cost less to write and to read again; long ones leave room to find more. The arms differ in
the limit of a reflection, in training and evaluation, and in `length_cost`: the share of a success's reward
that a reflection at the limit loses. All arms begin with the same weights and failures.
"""

from __future__ import annotations

import argparse

from grpo.experiments.outcome import ARM_COLUMNS, Outcome, arm_row
from grpo.experiments.study import Arm, Study

QUESTION = "How long should a reflection be?"
DEFAULTS = {"max_steps": 8, "num_eval": 128}


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--limits", type=int, nargs="+", default=[48, 96, 144], metavar="N", help="limits, in tokens")
    add("--costs", type=float, nargs="+", default=[0.0, 0.5], metavar="C", help="values of length_cost")


def run(study: Study, options: argparse.Namespace) -> Outcome:
    arms: dict[str, list[Arm]] = {}
    for seed in options.seeds:
        for limit in options.limits:
            # the same share of the limit as in the study's settings
            overlong = study.config.overlong_buffer * limit // study.config.max_reflection_length
            for cost in options.costs:
                label = f"limit {limit}, cost {cost:g}"
                arm = study.arm(
                    f"limit{limit}-cost{cost:g}",
                    seed,
                    max_reflection_length=limit,
                    length_cost=cost,
                    overlong_buffer=overlong,
                )
                arms.setdefault(label, []).append(arm)
    reference = next(iter(arms.values()))
    rows = [arm_row(label, by_seed, reference) for label, by_seed in arms.items()]
    return Outcome(QUESTION, ARM_COLUMNS, rows, ("second_try", "length"))
