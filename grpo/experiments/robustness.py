"""How far do a verifier's mistakes reach: into the rewards, the gradient, and what is learned?

During training right answers are called wrong (false negatives) or wrong answers right (false positives). The
evaluation uses the true verifier. The gradient is linear in the advantages, so the cosine between the
advantages of the judged and of the true rewards says how much of its direction is left.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from typing import Any

import torch

from grpo.advantage import group_advantage
from grpo.config import TaskOptions
from grpo.evaluate.statistics import bootstrap_interval
from grpo.experiments.outcome import Column, Outcome, arm_row, percent
from grpo.experiments.study import Arm, Study
from grpo.tasks import Example, get_task

QUESTION = "How far do a verifier's mistakes reach: reward, gradient, final success?"
DEFAULTS = {"max_steps": 6, "num_eval": 128}
# What is read of a stored episode
EPISODE = {"step": int, "example_id": str, "group_id": int, "reasons": [str], "texts": {"retry": str}}
COLUMNS = {
    "arm": Column("mistakes"),
    "wrong_rewards": percent("retries misjudged"),
    "cosine": Column("cosine of the advantages", digits=2),
    "second_try": percent("2nd try"),
    "gain": percent("gain of the 2nd try"),
    "against": percent("2nd try minus that without mistakes"),
    "truncated": percent("cut"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    kinds = ("false_positives", "false_negatives")
    add("--kinds", nargs="+", choices=kinds, default=list(kinds), metavar="KIND", help=" or ".join(kinds))
    add("--rates", type=float, nargs="+", default=[0.05, 0.2], metavar="R", help="shares, such as 0.01 0.05")


def run(study: Study, options: argparse.Namespace) -> Outcome:
    if study.config.retries_per_reflection != 1 or study.config.train_on == "attempt":
        raise ValueError("robustness needs retries_per_reflection 1 and a train_on with reflections")
    arms: dict[str, list[Arm]] = {}
    for seed in options.seeds:
        arms.setdefault("none", []).append(study.arm("none", seed))
        for kind in options.kinds:
            for rate in options.rates:
                task_options = TaskOptions(
                    {"task": study.config.task, kind: rate, **study.config.task_options}
                )
                arm = study.arm(
                    f"{kind}-{rate:g}",
                    seed,
                    share=(),  # its own failures: which attempts failed is a verdict too
                    task="grpo.experiments.noisy:Noisy",
                    task_options=task_options,
                )
                arms.setdefault(f"{kind.replace('_', ' ')} {rate:.0%}", []).append(arm)
    rows = [
        {**arm_row(label, by_seed, arms["none"]), **reach(study, by_seed)} for label, by_seed in arms.items()
    ]
    return Outcome(QUESTION, COLUMNS, rows, ("cosine", "gain"))


def reach(study: Study, arms: list[Arm]) -> dict[str, Any]:
    """Share of misjudged retries, and the cosine of judged and true advantages, a mean over steps.

    Rewards are verdicts here, without costs of length.
    """
    task = get_task(study.config.task, study.config.task_options)
    misjudged, cosines = [], []
    for arm in arms:
        # An episode stores only the id of its example.
        known = {example.id: example for example in task.examples("train", arm.config.num_examples)}
        by_step = defaultdict(list)
        for episode in arm.episodes(EPISODE):
            by_step[episode["step"]].append(episode)
        for episodes in by_step.values():
            true = [_true_reward(task, known[episode["example_id"]], episode) for episode in episodes]
            judged = [float(episode["reasons"][0] == "ok") for episode in episodes]
            misjudged += [float(a != b) for a, b in zip(true, judged, strict=True)]
            groups = torch.tensor([episode["group_id"] for episode in episodes])
            used, wanted = (
                group_advantage(torch.tensor(rewards), groups, scale=arm.config.scale_rewards)
                for rewards in (judged, true)
            )
            if used.any() and wanted.any():
                cosines.append(float(torch.nn.functional.cosine_similarity(used, wanted, dim=0)))
    return {
        "wrong_rewards": bootstrap_interval(misjudged)._asdict(),
        "cosine": bootstrap_interval(cosines)._asdict() if cosines else None,
    }


def _true_reward(task: Any, example: Example, episode: dict[str, Any]) -> float:
    return float(task.verify(example, episode["texts"]["retry"]).ok)
