"""Why does the first try get better, when only reflections are trained?

The paper reports it; a first try sees no reflection. Were it practice on these very problems, the gain would
be larger on held-out problems that resemble the train problems. So held-out problems are sorted by their
likeness to the nearest prompt trained on (shared character trigrams, Jaccard), and the gain of the first try
is taken in each quarter, for reflections and, at equal sampled tokens, for plain GRPO on first attempts.
"""

from __future__ import annotations

import argparse

from grpo.evaluate.comparison import ModelResult
from grpo.experiments import ablation
from grpo.experiments.outcome import Column, Outcome, Row, difference, percent
from grpo.experiments.study import Arm, Study, pooled

QUESTION = "Why does the first try get better, when only reflections are trained?"
DEFAULTS = {"max_steps": 8, "num_eval": 256}
COLUMNS = {
    "arm": Column("trained on, problems"),
    "likeness": Column("likeness to train problems", digits=2),
    "first_before": percent("1st try before RL"),
    "first_gain": percent("gain of the 1st try"),
    "gain": percent("gain of the 2nd try"),
    "problems": Column("problems", digits=0),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parts", type=int, default=4, metavar="N", help="groups by likeness (default: 4)")


def run(study: Study, own: argparse.Namespace) -> Outcome:
    if own.parts < 1:
        raise ValueError(f"parts must be at least 1, got {own.parts}")
    arms: dict[str, list[Arm]] = {"reflection": [], "attempt": []}
    for seed in own.seeds:
        start = study.start(seed)
        arms["reflection"].append(study.arm("reflection", seed))
        groups = ablation.matching_groups(arms["reflection"][-1], start)
        arms["attempt"].append(study.arm("attempt", seed, train_on="attempt", groups_per_step=groups))
    rows = [row for mode, found in arms.items() for row in _rows(mode, found, own.parts)]
    return Outcome(QUESTION, COLUMNS, rows, ("first_gain",))


def _rows(mode: str, arms: list[Arm], parts: int) -> list[Row]:
    """All problems, then groups of them, the least like the train problems first."""
    before, after = pooled(arms, "vanilla"), pooled(arms)
    nearest = [value for arm in arms for value in _likeness(arm)]
    order = sorted(range(len(nearest)), key=nearest.__getitem__)
    size = len(order)
    groups = {"all": order}
    for part in range(parts):
        chosen = order[part * size // parts : (part + 1) * size // parts]
        if chosen:
            groups[f"part {part + 1} of {parts}"] = chosen
    rows = []
    for name, places in groups.items():
        old, new = (ModelResult([result.records[place] for place in places]) for result in (before, after))
        rows.append(
            {
                "arm": f"{mode}, {name}",
                "likeness": sum(nearest[place] for place in places) / len(places),
                "first_before": sum(old.first_try) / len(places),
                "first_gain": difference(new, old, "first_try"),
                "gain": difference(new, old),
                "problems": len(places),
            }
        )
    return rows


def _likeness(arm: Arm) -> list[float]:
    """Per held-out problem, the likeness of the prompt trained on that is most like it."""
    trained = {trigrams(episode["texts"]["prompt"]) for episode in arm.episodes()}
    asked = [trigrams(record["prompt"]) for record in arm.records()]
    return [max(jaccard(one, other) for other in trained) for one in asked]


def trigrams(text: str) -> frozenset[str]:
    return frozenset(text[place : place + 3] for place in range(max(1, len(text) - 2)))


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / len(a | b)
