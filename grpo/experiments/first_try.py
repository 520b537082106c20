"""Why does the first try get better, when only reflections are trained?

The paper reports the gain, although a first try sees no reflection. If it came from practice on the train
problems, it would be larger on held-out problems that resemble them. So held-out problems are sorted by their
similarity to the nearest prompt in training (Jaccard index of character trigrams), and the gain of the first
try is computed in each quarter. Three arms sample equally many tokens: reflections (the paper's mode),
reflections whose right retries are distilled into the first try (`distill_retries`), and plain GRPO on first
attempts.

Left out: rejection sampling on first attempts (imitating the right ones without a policy loss).
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
    "similarity": Column("similarity to train problems", digits=2),
    "first_before": percent("1st try before RL"),
    "first_gain": percent("gain of the 1st try"),
    "gain": percent("gain of the 2nd try"),
    "problems": Column("problems", digits=0),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parts", type=int, default=4, metavar="N", help="groups by similarity (default: 4)")


def run(study: Study, options: argparse.Namespace) -> Outcome:
    if options.parts < 1:
        raise ValueError(f"parts must be at least 1, got {options.parts}")
    arms: dict[str, list[Arm]] = {"reflection": [], "distilled": [], "attempt": []}
    weight = study.config.distill_retries or 1.0
    for seed in options.seeds:
        start = study.start(seed)
        arms["reflection"].append(study.arm("reflection", seed, distill_retries=0.0))
        arms["distilled"].append(study.arm("distilled", seed, distill_retries=weight))
        groups = ablation.matching_groups(arms["reflection"][-1], start)
        attempt = study.arm("attempt", seed, train_on="attempt", groups_per_step=groups, distill_retries=0.0)
        arms["attempt"].append(attempt)
    rows = [row for mode, by_seed in arms.items() for row in _rows(mode, by_seed, options.parts)]
    return Outcome(QUESTION, COLUMNS, rows, ("first_gain",))


def _rows(mode: str, arms: list[Arm], parts: int) -> list[Row]:
    """All problems, then parts of them, beginning with those least like the train problems."""
    before, after = pooled(arms, "before_rl"), pooled(arms)
    nearest = [value for arm in arms for value in _similarity(arm)]
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
                "similarity": sum(nearest[place] for place in places) / len(places),
                "first_before": sum(old.first_try) / len(places),
                "first_gain": difference(new, old, "first_try"),
                "gain": difference(new, old),
                "problems": len(places),
            }
        )
    return rows


def _similarity(arm: Arm) -> list[float]:
    """Per held-out problem, its similarity to the most similar prompt in training."""
    episodes = arm.episodes({"texts": {"prompt": str}})
    trained = {trigrams(episode["texts"]["prompt"]) for episode in episodes}
    heldout = [trigrams(record["prompt"]) for record in arm.records()]
    return [max(jaccard(problem, prompt) for prompt in trained) for problem in heldout]


def trigrams(text: str) -> frozenset[str]:
    return frozenset(text[place : place + 3] for place in range(max(1, len(text) - 2)))


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / len(a | b)
