"""Does learning to reflect on one task help on another?

The models before and after RL on the study's task try variants of that task, with other operators, more
numbers or larger numbers, and another task, function calling. Nothing is trained on these.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from typing import Any

from grpo.evaluate.comparison import ModelResult, model_figures
from grpo.experiments.outcome import Column, Outcome, difference, percent
from grpo.experiments.study import Study, evaluate, joined
from grpo.tasks.function_calling.berkeley import INSTALL

QUESTION = "Does learning to reflect on one task help on another?"
DEFAULTS = {"max_steps": 8, "num_eval": 128}
COUNTDOWN: dict[str, dict[str, Any]] = {
    "as trained": {},
    "larger numbers": {"high": 30},
    "times as well": {"operators": "+-*"},
    "four numbers": {"numbers": 4},
}
CATEGORIES = "simple_python+live_simple"
# Short examples, because the demo's model has little room; a call has some 40 tokens.
FUNCTION_CALLING = [
    "--task",
    "function_calling",
    "--task_options",
    json.dumps({"categories": CATEGORIES, "max_tools": 3, "max_characters": 900}),
    "--max_completion_length",
    "64",
]
COLUMNS = {
    "variant": Column("evaluated on"),
    "first_before": percent("1st try before RL"),
    "second_before": percent("2nd try before RL"),
    "first_gain": percent("gain of the 1st try"),
    "gain": percent("gain of the 2nd try"),
    "problems": Column("problems", digits=0),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    names = [*COUNTDOWN, "function calling"]
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=names,
        default=names,
        metavar="NAME",
        help="what to evaluate on, among: " + ", ".join(names),
    )


def run(study: Study, options: argparse.Namespace) -> Outcome:
    if study.config.task != "countdown":
        raise ValueError(f"task must be countdown, whose variants are evaluated, got {study.config.task!r}")
    notes, variants = [], list(options.variants)
    if "function calling" in variants and importlib.util.find_spec("bfcl_eval") is None:
        variants.remove("function calling")
        notes.append(f"Function calling is left out: its data are not installed ({INSTALL}).")
    results: dict[str, list[list[ModelResult]]] = {name: [] for name in variants}
    for seed in options.seeds:
        arm = study.arm("trained", seed, keep=True)
        models = [arm.folder / "start", arm.checkpoint()]
        for name in variants:
            settings = FUNCTION_CALLING
            if name in COUNTDOWN:
                settings = ["--task_options", json.dumps({**study.config.task_options, **COUNTDOWN[name]})]
            settings = [*settings, "--num_eval", str(study.config.num_eval), "--controls"]
            file = study.folder / "evaluations" / f"{name.replace(' ', '-')}-seed{seed}.json"
            results[name].append(evaluate(models, file, settings))
    rows = [_row(name, by_seed) for name, by_seed in results.items()]
    return Outcome(QUESTION, COLUMNS, rows, ("first_gain", "gain"), notes)


def _row(variant: str, results: list[list[ModelResult]]) -> dict[str, Any]:
    """Over the seeds. Each has two results: before RL, and after it."""
    before, after = (joined(pair[place] for pair in results) for place in (0, 1))
    old, new = model_figures(before), model_figures(after)
    return {
        "variant": variant,
        "first_before": old["first_try"],
        "second_before": old["second_try"],
        "first_gain": difference(after, before, "first_try"),
        "gain": difference(after, before),
        "before": old,
        "after": new,
        "problems": len(before.records),
    }
