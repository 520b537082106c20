"""Does the binary reward agree with the truth? Precision and recall on answers whose label is known.

Labels never come from the verifier. Countdown: expressions are enumerated with their exact values, so each is
right or wrong by construction; then they are written differently, or spoiled in one way. Function calling:
the Berkeley files' answers, and changes that no convention makes right. And what a model really writes:
first tries and retries on held-out problems (with --run those of its evaluation), set against the enumerated
expressions.
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
from grpo.evaluate.statistics import wilson_interval
from grpo.experiments.answers import changed_answers, right_answers
from grpo.experiments.outcome import Column, Outcome, Row, percent
from grpo.experiments.study import Study, evaluate
from grpo.run import files
from grpo.tasks import Example, get_task
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
# Changes of grpo/experiments/answers.py that are wrong whatever one thinks of case, types or defaults
SURELY_WRONG = {
    "another function's name",
    "a call less",
    "a call twice",
    "an unknown argument",
    "a needed argument left out",
    "text with another letter",
    "number plus 1",
    "true and false swapped",
    "list with its last item twice",
    "list without its last item",
}
Judged = tuple[str, bool, bool]  # kind of answer, whether it is right, whether the verifier says so


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--problems",
        type=int,
        default=300,
        metavar="N",
        help="Countdown problems with labelled answers (default: %(default)s)",
    )
    parser.add_argument("--no_model", action="store_true", help="leave out answers of a model: no warm start")


def run(study: Study, own: argparse.Namespace) -> Outcome:
    if study.config.task != "countdown":
        raise ValueError(
            f"task must be countdown, whose expressions are enumerated, got {study.config.task!r}"
        )
    task = get_task("countdown", study.config.task_options)
    examples = task.examples("heldout", own.problems)
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
        notes.append(f"Function calling is left out: its data ({INSTALL}) are not here.")
    if not own.no_model:
        for result in _models(study, own.seeds):
            heldout = task.examples("heldout", len(result.records))
            judged += model_answers(result, heldout, task.operators)  # type: ignore[attr-defined]
    rows = [
        row(kind, [one for one in judged if one[0] == kind]) for kind in dict.fromkeys(j[0] for j in judged)
    ]
    rows.append(row("all", judged))
    return Outcome(QUESTION, COLUMNS, rows, ("precision", "recall"), notes)


def _models(study: Study, seeds: Sequence[int]) -> Iterator[ModelResult]:
    """What models wrote: those of the run's evaluation where there is one, else the model before RL, now."""
    if study.run is not None:
        for file in sorted(study.run.glob("evaluation-*.jsonl")):
            yield ModelResult(list(files.records(file)))
        return
    for seed in seeds:
        options = ["--num_eval", str(study.config.num_eval), "--controls"]
        yield from evaluate([study.start(seed) / "start"], study.folder / f"answers-seed{seed}.json", options)


def row(kind: str, judged: Sequence[Judged]) -> Row:
    """Precision: right among those called right. Recall: called right among the right ones."""
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
    """Every way to combine the numbers, each once, by its text without blanks and needless parentheses."""
    return {
        text: value
        for order in set(itertools.permutations(numbers))
        for text, value, _ in _combined(order, operators)
    }


def _combined(numbers: tuple[int, ...], operators: str) -> Iterator[tuple[str, Fraction, int]]:
    """(text, value, precedence of its last operation) of all trees over the numbers in this order."""
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
                # to the right of - and / even an equal precedence needs them: 7 - (2 - 1)
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
    """(kind, answer, whether it is right): expressions as they are, then written differently and spoiled."""
    numbers, target = example.data["numbers"], example.data["target"]
    found = expressions(tuple(numbers), operators)
    right = sorted(text for text, value in found.items() if value == target)
    wrong = sorted(text for text, value in found.items() if value != target)
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
    """What the model wrote and the verdicts it got, against the enumerated expressions.

    An answer counts as right when it is one of them; what parentheses nobody needs could hide is not.
    """
    for record, example in zip(result.records, examples, strict=True):
        found = expressions(tuple(example.data["numbers"]), operators)
        for turn in ("first", "retry"):
            if (tried := record[turn]) is not None:
                inside = re.findall(r"<answer>([^<]*)</answer>", tried["text"])
                text = re.sub(r"\s", "", inside[-1]) if inside else ""
                yield (
                    f"a model's answers, {turn}",
                    found.get(text) == example.data["target"],
                    tried["reason"] == "ok",
                )


# --- function calling ---------------------------------------------------------------------------------------


def function_calling_answers(task: FunctionCalling) -> Iterator[tuple[str, bool, bool]]:
    """Answers to held-out examples and sure mistakes in them: kind, whether right, whether so judged."""
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
    """Whether the change happens to be another accepted answer, say the 6 beside the 5."""
    return any(calls == other for kind, other in right_answers(truth))
