"""From records, one per problem and model, to a report: shares, paired differences, controls, examples.

The report follows the paper's tables 1 and 2 (arXiv 2505.24726): first and second try, before and after
training. A second try counts as right if the first try or the retry after the reflection is right. Controls
retry the same failures with the same noise, but without the model's own reflection:

    blind     no reflection: the failed answer, then the task again
    shuffled  the reflection that the model wrote about another failed problem
    blanked   an empty reflection

A reflection helps only as far as its retry beats these. Every interval is at 95%: Wilson's for a share, the
paired bootstrap over problems for a difference.

A model may have been measured on only the first problems of another. The two are compared on these.

Left out: comparing models on different problems.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from grpo.evaluate.statistics import Interval, paired_difference, paired_rate_difference, wilson_interval
from grpo.run import files

ProblemRecord = dict[str, Any]  # what one model did with one problem; see `grpo.evaluate.measure.measure`
Figures = dict[str, Any]  # JSON-able

CONTROLS = ("blind", "shuffled", "blanked")
NUM_EXAMPLES = 5  # shown before and after
# The models of a run in order of time. A comparison is always of a later one with an earlier one.
STAGES = {"untouched": "the model as it came", "before_rl": "right before RL", "trained": "after RL"}
GIVEN_BY = {
    ("untouched", "before_rl"): "the warm start",
    ("before_rl", "trained"): "training",
    ("untouched", "trained"): "both together",
}
RETIRED_LABELS = {"vanilla": "before_rl"}  # of version 0.1


@dataclass(frozen=True)
class ModelResult:
    """What one model did with each problem.

    Args:
        records: one per problem.
        settings: what they depend on besides the weights: decoding, limits, seed, controls.
    """

    records: list[ProblemRecord]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def ids(self) -> list[str]:
        return [record["id"] for record in self.records]

    @property
    def first_try(self) -> list[bool]:
        return [_right(record["first"]) for record in self.records]

    @property
    def second_try(self) -> list[bool]:
        return [_right(record["first"]) or _right(record["retry"]) for record in self.records]

    @property
    def failures(self) -> list[ProblemRecord]:
        """Records of the problems whose first try was wrong: those with a reflection and a retry."""
        return [record for record in self.records if record["retry"] is not None]

    def start(self, count: int) -> ModelResult:
        """The first `count` problems."""
        return ModelResult(self.records[:count], self.settings)

    def validation_metrics(self) -> dict[str, float]:
        """For metrics.jsonl: means of the tries over all problems, and of the retries over the failures.

        Means over failures are NaN if nothing failed. The blind control must have been measured.
        """

        def mean(values: Sequence[float]) -> float:
            return sum(values) / len(values) if values else math.nan

        failed = self.failures
        return {
            "validation/first_try": mean(self.first_try),
            "validation/second_try": mean(self.second_try),
            "validation/retry": mean([_right(record["retry"]) for record in failed]),
            "validation/retry_blind": mean([_right(record["controls"]["blind"]) for record in failed]),
            "validation/reflection_length": mean([record["reflection"]["tokens"] for record in failed]),
        }


def report(results: Mapping[str, ModelResult]) -> Figures:
    """The whole report as one JSON-able dict (evaluation.json); `grpo.evaluate.table.table` renders it.

    Args:
        results: by label, the earliest model first. The labels untouched, before_rl and trained are compared
            in that order (what the warm start gave, what training gave), any other label with the first one.
    Raises:
        ValueError: no model, no problems, or models whose problems or settings differ.
    """
    _check_comparable(results)
    first = next(iter(results.values()))
    return {
        "num_problems": max(len(result.records) for result in results.values()),
        "confidence": 0.95,
        "settings": _shared_settings(first),
        "models": {name: model_figures(result) for name, result in results.items()},
        "comparisons": [_comparison(results, *pair) for pair in _pairs(list(results))],
        "examples": _examples(results),
    }


def save(comparison: Figures, file: Path) -> None:
    """Writes a report as JSON. Raises RunDirError if that fails; an older file is then still there."""
    with files.written_whole(file) as path:
        path.write_text(json.dumps(comparison, indent=2) + "\n", encoding="utf-8")


def read_report(path: Path) -> Figures:
    """The report in an evaluation.json, with today's labels for the models in one of version 0.1."""
    compared = {"before": str, "after": str}
    figures = files.read_json(path, {"models": {str: dict}, "comparisons": [compared]})

    def current(label: str) -> str:
        return RETIRED_LABELS.get(label, label)

    models = {current(label): model for label, model in figures["models"].items()}
    comparisons = [
        {**comparison, "before": current(comparison["before"]), "after": current(comparison["after"])}
        for comparison in figures["comparisons"]
    ]
    return {**figures, "models": models, "comparisons": comparisons}


def model_figures(result: ModelResult) -> Figures:
    """The part of the report about one model."""
    failures = result.failures
    reflections = [record["reflection"] for record in failures]
    lengths = [reflection["tokens"] for reflection in reflections]
    cut = sum(reflection["finish_reason"] == "length" for reflection in reflections)
    figures = {
        "first_try": _share(result.first_try),
        "second_try": _share(result.second_try),
        "gain_of_second_try": _interval(paired_difference(result.second_try, result.first_try)),
        "num_failures": len(failures),
        "retry_success": _share([_right(record["retry"]) for record in failures]),
        "controls": _controls(failures),
        "answer_leakage": _share([reflection["leaks"] for reflection in reflections]),
        "reflection_mean_length": sum(lengths) / len(lengths) if lengths else None,
        "reflection_max_length": max(lengths, default=None),
        "reflection_truncated": cut / len(reflections) if reflections else None,
        "reasons_of_failure": {
            "first": _reasons(record["first"] for record in result.records),
            "retry": _reasons(record["retry"] for record in failures),
        },
    }
    if all("tolerant" in record["first"] for record in result.records):
        figures["tolerant"] = _tolerant(result.records)
    if any("score" in turn for record in result.records for turn in (record["first"], record["retry"] or {})):
        figures["mean_score"] = _mean_score(result.records)
    return figures


def _mean_score(records: Sequence[ProblemRecord]) -> Figures:
    """Mean scores of the first tries, and of the last: the retry, if there is one."""

    def score(turn: Mapping[str, Any]) -> float:
        return turn.get("score", float(turn["reason"] == "ok"))

    first = [score(record["first"]) for record in records]
    last = [score(record["retry"] or record["first"]) for record in records]
    return {"first_try": sum(first) / len(first), "last_try": sum(last) / len(last)}


def _tolerant(records: Sequence[ProblemRecord]) -> Figures:
    """First and second try by the task's milder judgement. Retries follow failures of the strict one."""
    first = [record["first"]["tolerant"] == "ok" for record in records]
    retry = [record["retry"] is not None and record["retry"].get("tolerant") == "ok" for record in records]
    second = [first_right or retry_right for first_right, retry_right in zip(first, retry, strict=True)]
    return {"first_try": _share(first), "second_try": _share(second)}


def _controls(failures: Sequence[ProblemRecord]) -> dict[str, Figures]:
    """Each control's success, and by how much the real retry beats it, over the failures that have both."""
    figures = {}
    for name in CONTROLS:
        both = [record for record in failures if record["controls"].get(name)]
        if not both:
            continue
        retry = [_right(record["retry"]) for record in both]
        control = [_right(record["controls"][name]) for record in both]
        difference = _interval(paired_difference(_numbers(retry), _numbers(control)))
        figures[name] = {"success": _share(control), "retry_minus_control": difference}
    return figures


def _comparison(results: Mapping[str, ModelResult], before: str, after: str) -> Figures:
    """`after` minus `before`. A model retries only its own failures, so retries are compared as rates."""
    count = min(len(results[before].records), len(results[after].records))
    old, new = results[before].start(count), results[after].start(count)
    return {
        "before": before,
        "after": after,
        "given_by": GIVEN_BY.get((before, after)),
        "first_try": _interval(paired_difference(_numbers(new.first_try), _numbers(old.first_try))),
        "second_try": _interval(paired_difference(_numbers(new.second_try), _numbers(old.second_try))),
        "retry_success": _interval(paired_rate_difference(_retries(new, None), _retries(old, None))),
        "controls": {
            name: _interval(paired_rate_difference(_retries(new, name), _retries(old, name)))
            for name in CONTROLS
        },
    }


def _retries(result: ModelResult, control: str | None) -> tuple[list[float], list[float]]:
    """Per problem: retry right, and retry made, as 0.0 or 1.0; of the control if one is named."""
    retries = [record["controls"].get(control) if control else record["retry"] for record in result.records]
    return _numbers(_right(retry) for retry in retries), _numbers(retry is not None for retry in retries)


def _pairs(names: list[str]) -> list[tuple[str, str]]:
    """(earlier, later) for the models of a run, and (baseline, model) for every other model."""
    stages = [name for name in STAGES if name in names]
    baseline, _ = before_and_after(names)
    others = [name for name in names if name not in STAGES and name != baseline]
    whole_way = [(stages[0], stages[-1])] if len(stages) > 2 else []
    return [*pairwise(stages), *whole_way, *((baseline, name) for name in others)]


def _examples(results: Mapping[str, ModelResult]) -> list[Figures]:
    """Problems whose first try failed before training, beginning with those that failed after it too.

    Where both failed, both have a reflection to show. Otherwise the order of the problems decides.
    """
    before, after = before_and_after(list(results))
    old, new = results[before].records, results[after].records
    count = min(len(old), len(new))
    both_failed = [i for i in range(count) if old[i]["retry"] and new[i]["retry"]]
    only_before = [i for i in range(count) if old[i]["retry"] and not new[i]["retry"]]
    chosen = sorted([*both_failed, *only_before][:NUM_EXAMPLES])
    return [
        {"id": old[i]["id"], "prompt": old[i]["prompt"], "before": _shown(old[i]), "after": _shown(new[i])}
        for i in chosen
    ]


def before_and_after(names: Sequence[str]) -> tuple[str, str]:
    """The two models whose examples are shown: before_rl if it is there, else the first; and the last."""
    return ("before_rl" if "before_rl" in names else names[0]), names[-1]


def _shown(record: ProblemRecord) -> ProblemRecord:
    return {turn: record[turn] for turn in ("first", "reflection", "retry")}


def _check_comparable(results: Mapping[str, ModelResult]) -> None:
    if not results:
        raise ValueError("results must name at least one model, got none")
    name, first = next(iter(results.items()))
    if not first.records:
        raise ValueError(f"results must hold at least one problem, got none for {name}")
    for other, result in results.items():
        count = min(len(result.records), len(first.records))
        if not count or result.ids[:count] != first.ids[:count]:
            raise ValueError(
                "models must be measured on the same problems in the same order, but those of "
                f"{other} and {name} differ"
            )
        if _shared_settings(result) != _shared_settings(first):
            changed = [key for key in first.settings if result.settings.get(key) != first.settings[key]]
            raise ValueError(
                f"models must be measured with the same settings, but {other} and {name} differ in {changed}"
            )


def _shared_settings(result: ModelResult) -> dict[str, Any]:
    """What must be equal for all models. Some may have been measured without controls."""
    return {name: value for name, value in result.settings.items() if name != "controls"}


def _right(attempt: Mapping[str, Any] | None) -> bool:
    """Of a first try, a retry or a control; None: it was not made."""
    return attempt is not None and attempt.get("right", attempt["reason"] == "ok")


def _numbers(flags: Any) -> list[float]:
    return [float(flag) for flag in flags]


def _share(flags: Sequence[bool]) -> Figures | None:
    """A share with Wilson's interval; None for no flags."""
    if not flags:
        return None
    mean, low, high = wilson_interval(sum(flags), len(flags))
    return {"mean": mean, "low": low, "high": high, "count": sum(flags), "of": len(flags)}


def _interval(interval: Interval | None) -> dict[str, float] | None:
    return None if interval is None else interval._asdict()


def _reasons(tries: Any) -> dict[str, float]:
    """Shares of the wrong tries by reason, the most frequent first."""
    counts = Counter(attempt["reason"] for attempt in tries if not _right(attempt))
    return {reason: count / counts.total() for reason, count in counts.most_common()}
