"""How much of the gain does an adapter of a small rank give, next to training all weights?

The arms train all weights, and adapters of several ranks on all linear layers. All begin with the same
weights and failures. An adapter wants a larger learning rate than full training; LoRA Without Regret
(https://thinkingmachines.ai/blog/lora/) recommends ten times as much, whatever the rank.
"""

from __future__ import annotations

import argparse

from grpo.experiments.outcome import ARM_COLUMNS, Outcome, arm_row
from grpo.experiments.study import Arm, Study

QUESTION = "How much of the gain does a LoRA adapter give, next to training all weights?"
DEFAULTS = {"max_steps": 8, "num_eval": 128}


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--ranks", type=int, nargs="+", default=[1, 8, 32], metavar="R", help="ranks (lora_r)")
    add(
        "--times",
        type=float,
        default=10.0,
        metavar="X",
        help="an adapter's learning rate over that of full training (default: %(default)g)",
    )


def run(study: Study, options: argparse.Namespace) -> Outcome:
    arms: dict[str, list[Arm]] = {}
    for seed in options.seeds:
        arms.setdefault("all weights", []).append(study.arm("full", seed, lora_r=0))
        for rank in options.ranks:
            arm = study.arm(
                f"rank{rank}", seed, lora_r=rank, learning_rate=study.config.learning_rate * options.times
            )
            arms.setdefault(f"rank {rank}", []).append(arm)
    rows = [arm_row(label, by_seed, arms["all weights"]) for label, by_seed in arms.items()]
    return Outcome(QUESTION, ARM_COLUMNS, rows, ("second_try", "gain"))
