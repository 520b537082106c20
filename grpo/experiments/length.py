"""How long should a reflection be? Limits, and a price on length, against success and tokens.

Concise reflections cost less to write and to read again; longer ones leave room to find more. The arms differ
in the limit of a reflection (in training and evaluation alike) and in `length_cost`, the share of a success's
reward that a reflection as long as its limit loses. All begin with the same weights and failures.
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


def run(study: Study, own: argparse.Namespace) -> Outcome:
    arms: dict[str, list[Arm]] = {}
    for seed in own.seeds:
        for limit in own.limits:
            # the same share of the limit as in the settings that all arms share
            overlong = study.config.overlong_buffer * limit // study.config.max_reflection_length
            for cost in own.costs:
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
    rows = [arm_row(label, found, reference) for label, found in arms.items()]
    return Outcome(QUESTION, ARM_COLUMNS, rows, ("second_try", "length"))
