"""Does the binary reward agree with the truth? Precision and recall on answers whose label is knoptions.

Labels never come from the verifier. There are three sources of answers:

- Countdown: all expressions with their exact values are right or wrong by construction. They are also written
  in other ways, and spoiled in one way each.
- Function calling: the answers in the Berkeley files, and changes that are wrong under any convention.
- A model's own first tries and retries on held-out Countdown problems, looked up among all expressions. With
  --run they are those of the run's evaluation.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import random
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cache
from typing import Any

from grpo.evaluate.comparison import ModelResult
from grpo.evaluate.measure import RECORD
from grpo.evaluate.statistics import wilson_interval
from grpo.experiments.answers import changed_answers, right_answers
from grpo.experiments.outcome import Column, Outcome, Row, percent
from grpo.experiments.study import Study, evaluate
from grpo.run import files
from grpo.tasks import Example, after_thought, get_task
from grpo.tasks.function_calling import FunctionCalling
from grpo.tasks.function_calling import verify as verify_calls
from grpo.tasks.function_calling.berkeley import INSTALL

QUESTION = "Does the binary reward agree with the truth?"
DEFAULTS = {"num_eval": 256}
COLUMNS = {
    "kind": Column("answers"),
    "count": Column("number", digits=0),
    "right": Column("of them right", digits=0),
    "precision": percent("precision"),
    "recall": percent("recall"),
    "wrong": Column("misjudged", digits=0),
}
# Changes of grpo/experiments/answers.py that are wrong under any convention about case, types or defaults
SURELY_WRONG = {
    "another function's name",
    "a missing call",
    "a repeated call",
    "an unknown argument",
    "a required argument left out",
    "string with one letter added",
    "number plus 1",
    "true and false swapped",
    "list with its last item repeated",
    "list without its last item",
}
Judged = tuple[str, bool, bool]  # kind of answer, whether it is right, whether the verifier calls it right


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--problems",
        type=int,
        default=300,
        metavar="N",
        help="Countdown problems with labelled answers (default: %(default)s)",
    )
    parser.add_argument(
        "--no_model", action="store_true", help="leave out a model's answers, and so the warm start"
    )


def run(study: Study, options: argparse.Namespace) -> Outcome:
    if study.config.task != "countdown":
        raise ValueError(
            f"task must be countdown, whose expressions are enumerated, got {study.config.task!r}"
        )
    task = get_task("countdown", study.config.task_options)
    examples = task.examples("heldout", options.problems)
    judged: list[Judged] = []
    for example in examples:
        rng = random.Random(f"labelled answers {example.id}")
        judged += [
            (f"Countdown, {kind}", right, task.verify(example, text).ok)
            for kind, text, right in countdown_answers(example, task.operators, rng)  # type: ignore[attr-defined]
        ]
    notes = []
    if importlib.util.find_spec("bfcl_eval") is not None:
        calls = FunctionCalling(categories="simple_python+multiple+parallel+parallel_multiple")
        judged += [(f"calls, {kind}", right, ok) for kind, right, ok in function_calling_answers(calls)]
    else:
        notes.append(f"Function calling is left out: its data are not installed ({INSTALL}).")
    if not options.no_model:
        for result in _models(study, options.seeds):
            heldout = task.examples("heldout", len(result.records))
            judged += model_answers(result, heldout, task.operators)  # type: ignore[attr-defined]
    kinds = dict.fromkeys(kind for kind, _, _ in judged)
    rows = [row(kind, [answer for answer in judged if answer[0] == kind]) for kind in kinds]
    rows.append(row("all", judged))
    return Outcome(QUESTION, COLUMNS, rows, ("precision", "recall"), notes)


def _models(study: Study, seeds: Sequence[int]) -> Iterator[ModelResult]:
    """What models wrote: those of the run's evaluation, or without a run the model before RL, sampled now."""
    if study.run is not None:
        for file in sorted(study.run.glob("evaluation-*.jsonl")):
            yield ModelResult(list(files.records(file, RECORD)))
        return
    for seed in seeds:
        settings = ["--num_eval", str(study.config.num_eval), "--controls"]
        yield from evaluate(
            [study.start(seed) / "start"], study.folder / f"answers-seed{seed}.json", settings
        )


def row(kind: str, judged: Sequence[Judged]) -> Row:
    """Precision: share of right answers among those called right. Recall: share called right of the right."""
    both = sum(right and ok for _, right, ok in judged)
    called, right = sum(ok for *_, ok in judged), sum(right for _, right, _ in judged)
    return {
        "kind": kind,
        "count": len(judged),
        "right": right,
        "precision": wilson_interval(both, called)._asdict() if called else None,
        "recall": wilson_interval(both, right)._asdict() if right else None,
        "wrong": sum(right != ok for _, right, ok in judged),
    }


# --- Countdown ----------------------------------------------------------------------------------------------


@cache
def expressions(numbers: tuple[int, ...], operators: str) -> dict[str, Fraction]:
    """The value of every expression over the numbers, written without spaces or needless parentheses."""
    return {
        text: value
        for order in set(itertools.permutations(numbers))
        for text, value, _ in _combined(order, operators)
    }


def _combined(numbers: tuple[int, ...], operators: str) -> Iterator[tuple[str, Fraction, int]]:
    """(text, value, precedence of its last operation) of every expression over the numbers in this order."""
    if len(numbers) == 1:
        yield str(numbers[0]), Fraction(numbers[0]), 3
        return
    for cut in range(1, len(numbers)):
        for left, right in itertools.product(
            _combined(numbers[:cut], operators), _combined(numbers[cut:], operators)
        ):
            for operator in operators:
                if operator == "/" and right[1] == 0:
                    continue
                level = 1 if operator in "+-" else 2
                a = left[0] if left[2] >= level else f"({left[0]})"
                # right of - and / an equal precedence needs parentheses too: 7 - (2 - 1)
                b = (
                    right[0]
                    if right[2] > level or (right[2] == level and operator in "+*")
                    else f"({right[0]})"
                )
                yield a + operator + b, _applied(left[1], operator, right[1]), level


def _applied(a: Fraction, operator: str, b: Fraction) -> Fraction:
    return {"+": a + b, "-": a - b, "*": a * b}[operator] if operator != "/" else a / b


def countdown_answers(
    example: Example, operators: str, rng: random.Random
) -> Iterator[tuple[str, str, bool]]:
    """(kind, answer, whether it is right): plain expressions, then one written in other ways and spoiled."""
    numbers, target = example.data["numbers"], example.data["target"]
    values = expressions(tuple(numbers), operators)
    right = sorted(text for text, value in values.items() if value == target)
    wrong = sorted(text for text, value in values.items() if value != target)
    for text in right:
        yield "right expressions", tagged(text), True
    for text in rng.sample(wrong, min(len(wrong), len(right))):
        yield "expressions of other values", tagged(text), False
    text = rng.choice(right)
    yield "blanks around every sign", tagged(re.sub(r"([-+*/()])", r" \1 ", text)), True
    yield "parentheses around it", tagged(f"(({text}))"), True
    yield "words before it", f"I think it is this. {tagged(text)}", True
    yield "a wrong answer before it", tagged(str(target)) + "\n" + tagged(text), True
    yield "the target itself", tagged(str(target)), False
    yield "a number added and taken away", tagged(f"{text}+{numbers[0]}-{numbers[0]}"), False
    yield "a number not given", tagged(re.sub(r"\d+", lambda m: str(int(m[0]) + 1), text, count=1)), False
    yield "no tags", text, False
    yield "an equation", tagged(f"{text}={target}"), False


def tagged(text: str) -> str:
    return f"<answer>{text}</answer>"


def model_answers(result: ModelResult, examples: Sequence[Example], operators: str) -> Iterator[Judged]:
    """What the model wrote and its verdicts, compared with all expressions.

    An answer is right if it is one of these and has the target's value. One with needless parentheses is not.
    """
    for record, example in zip(result.records, examples, strict=True):
        values = expressions(tuple(example.data["numbers"]), operators)
        for turn in ("first", "retry"):
            if (tried := record[turn]) is not None:
                inside = re.findall(r"<answer>([^<]*)</answer>", after_thought(tried["text"]))
                text = re.sub(r"\s", "", inside[-1]) if inside else ""
                yield (
                    f"a model's answers, {turn}",
                    values.get(text) == example.data["target"],
                    tried["reason"] == "ok",
                )


# --- function calling ---------------------------------------------------------------------------------------


def function_calling_answers(task: FunctionCalling) -> Iterator[tuple[str, bool, bool]]:
    """(kind, whether right, whether judged right) of answers to held-out examples and of sure mistakes."""
    for example in task.examples("heldout", task.size("heldout")):
        gold = example.data["gold"]
        truth = [{call["name"]: call["arguments"]} for call in gold]
        for kind, calls in right_answers(truth):
            yield kind, True, _judged(calls, gold)
        for kind, calls in changed_answers(truth):
            if kind in SURELY_WRONG and not _accepted(calls, truth):
                yield kind, False, _judged(calls, gold)


def _judged(calls: Any, gold: list[dict[str, Any]]) -> bool:
    text = json.dumps([{"name": name, "arguments": args} for name, args in calls], ensure_ascii=False)
    return verify_calls(text, gold, accepted=True).ok


def _accepted(calls: Any, truth: Any) -> bool:
    """Whether the change gives another accepted answer, such as 6 where both 5 and 6 are accepted."""
    return any(calls == other for _, other in right_answers(truth))
