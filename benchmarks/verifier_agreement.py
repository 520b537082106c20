"""Does the function-calling verifier agree with the Berkeley leaderboard's own checker, on its own data?

    python benchmarks/verifier_agreement.py                 the table, and an example of each disagreement
    python benchmarks/verifier_agreement.py --output DIR    the same, and all of them in DIR, as CSV and JSON

Every answer of the files is written out as calls, then changed in one way at a time (another case, a number
as a string, an argument less, ...), and judged by both. docs/verifiers.md says who is right where they
differ. Needs the package bfcl-eval, of whose requirements none is used: the checker asks one imported table
whether a model cannot write dots in names, and that table, whose import would load every provider's client,
is replaced by one that says no. It runs in seconds.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from grpo.tasks.berkeley import CATEGORIES, INSTALL
from grpo.tasks.function_calling import verify

Args = dict[str, Any]
Calls = list[tuple[str, Args]]
Truth = list[dict[str, dict[str, list[Any]]]]
Checker = Callable[[list[dict[str, Any]], Calls, Truth, str], bool | None]

COLUMNS = ("answers", "both accept", "both reject", "only bfcl accepts", "only ours accepts", "bfcl raises")


def load_checker() -> Checker:
    """bfcl-eval's checker: (functions, calls, truth, category) -> right or not, None where it raises."""

    class NoDotsReplaced(dict[str, Any]):
        def __missing__(self, model: str) -> Any:
            return types.SimpleNamespace(underscore_to_dot=False)

    table = types.ModuleType("bfcl_eval.constants.model_config")
    table.MODEL_CONFIG_MAPPING = NoDotsReplaced()  # type: ignore[attr-defined]
    sys.modules.setdefault(table.__name__, table)
    from bfcl_eval.constants.enums import Language
    from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker

    def check(functions: list[dict[str, Any]], calls: Calls, truth: Truth, category: str) -> bool | None:
        output = [{name: args} for name, args in calls]
        try:
            return bool(ast_checker(functions, output, truth, Language.PYTHON, category, "any")["valid"])
        except Exception:  # what it raises on is a finding, whatever the class
            return None

    return check


# --- answers ------------------------------------------------------------------------------------------------


def concrete(one: Any) -> Any:
    """An accepted value as it would be written: objects hold lists of accepted values in their turn."""
    if isinstance(one, dict):
        chosen = {key: alternatives(values) for key, values in one.items()}
        return {key: concrete(values[0]) for key, values in chosen.items() if values}
    if isinstance(one, list):
        return [concrete(item) for item in one]
    return one


def alternatives(values: Any) -> list[Any]:
    """The accepted values without "", which stands for leaving the argument out."""
    return [value for value in values if value != ""] if isinstance(values, list) else [values]


def first_answer(truth: Truth) -> Calls:
    return [
        (
            name,
            {key: concrete(alternatives(values)[0]) for key, values in args.items() if alternatives(values)},
        )
        for call in truth
        for name, args in call.items()
    ]


def right_answers(truth: Truth) -> Iterator[tuple[str, Calls]]:
    """What the files say is right: first values, each alternative, nothing optional, another order."""
    base = first_answer(truth)
    accepted = [args for call in truth for args in call.values()]
    yield "first accepted values", base
    for place, values in enumerate(accepted):
        for key, choices in values.items():
            for choice in alternatives(choices)[1:]:
                yield "another accepted value", changed(base, place, key, concrete(choice))
    fewer = [
        (name, {key: value for key, value in args.items() if "" not in accepted[place][key]})
        for place, (name, args) in enumerate(base)
    ]
    if fewer != base:
        yield "optional arguments left out", fewer
    if len(base) > 1:
        yield "calls in reverse order", base[::-1]


def changed(calls: Calls, place: int, key: str, value: Any) -> Calls:
    name, args = calls[place]
    return [*calls[:place], (name, {**args, key: value}), *calls[place + 1 :]]


def without(calls: Calls, place: int, key: str) -> Calls:
    name, args = calls[place]
    return [*calls[:place], (name, {k: v for k, v in args.items() if k != key}), *calls[place + 1 :]]


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# name: (whether a value can be changed so, the changed value)
CHANGES: dict[str, tuple[Callable[[Any], bool], Callable[[Any], Any]]] = {
    "text in another case": (lambda v: isinstance(v, str) and v.swapcase() != v, lambda v: v.swapcase()),
    "text without its blanks": (lambda v: isinstance(v, str) and " " in v, lambda v: v.replace(" ", "")),
    "text with a full stop": (lambda v: isinstance(v, str), lambda v: v + "."),
    "text with a blank at the end": (lambda v: isinstance(v, str), lambda v: v + " "),
    "text with another letter": (lambda v: isinstance(v, str), lambda v: v + "x"),
    "text in a list": (lambda v: isinstance(v, str), lambda v: [v]),
    "integer as a float (3.0)": (lambda v: type(v) is int, lambda v: float(v)),
    "whole float as an integer": (lambda v: type(v) is float and v == int(v), lambda v: int(v)),
    "number as text": (is_number, lambda v: str(v)),
    "number plus 1": (is_number, lambda v: v + 1),
    "float plus 1e-6": (lambda v: type(v) is float, lambda v: v + 1e-6),
    "1 or 0 as true or false": (lambda v: is_number(v) and v in (0, 1), lambda v: bool(v)),
    "true or false as 1 or 0": (lambda v: isinstance(v, bool), lambda v: int(v)),
    "true or false as text": (lambda v: isinstance(v, bool), lambda v: str(v).lower()),
    "true and false swapped": (lambda v: isinstance(v, bool), lambda v: not v),
    "null for a value": (lambda v: v is not None, lambda v: None),
    "empty text for a value": (lambda v: v != "", lambda v: ""),
    "list reversed": (lambda v: isinstance(v, list) and v != v[::-1], lambda v: v[::-1]),
    "list with its last item twice": (lambda v: isinstance(v, list) and bool(v), lambda v: [*v, v[-1]]),
    "list without its last item": (lambda v: isinstance(v, list) and bool(v), lambda v: v[:-1]),
    "list as its only item": (lambda v: isinstance(v, list) and len(v) == 1, lambda v: v[0]),
    "list items in another case": (
        lambda v: isinstance(v, list) and any(isinstance(x, str) and x.swapcase() != x for x in v),
        lambda v: [x.swapcase() if isinstance(x, str) else x for x in v],
    ),
    "object without its first key": (
        lambda v: isinstance(v, dict) and bool(v),
        lambda v: dict([*v.items()][1:]),
    ),
    "object with one key more": (lambda v: isinstance(v, dict), lambda v: {**v, "extra": 1}),
    "object as its JSON": (lambda v: isinstance(v, dict | list), lambda v: json.dumps(v)),
}


def changed_answers(truth: Truth) -> Iterator[tuple[str, Calls]]:
    """The first answer with one thing changed: each change once per example, where it first can be made."""
    base = first_answer(truth)
    accepted = [args for call in truth for args in call.values()]
    name, args = base[0]
    yield "another function's name", [(name + "_2", args), *base[1:]]
    yield "a call less", base[1:]
    yield "a call twice", [*base, base[0]]
    yield "an unknown argument", changed(base, 0, "unknown_argument", 1)
    places = [(place, key) for place, (_, args) in enumerate(base) for key in args]
    for place, key in places:
        if "" not in accepted[place][key]:
            yield "a needed argument left out", without(base, place, key)
            break
    for title, (applies, change) in CHANGES.items():
        for place, key in places:
            value = base[place][1][key]
            if applies(value):
                optional = " (optional)" if title.startswith("empty") and "" in accepted[place][key] else ""
                yield title + optional, changed(base, place, key, change(value))
                break


# --- the comparison -----------------------------------------------------------------------------------------


def entries(folder: Path) -> Iterator[tuple[str, dict[str, Any], Truth]]:
    """(category, entry, truth) of every example that has an answer."""
    for category in CATEGORIES:
        answers = folder / "possible_answer" / f"BFCL_v4_{category}.json"
        if answers.exists():
            truths = {line["id"]: line["ground_truth"] for line in _lines(answers)}
            for entry in _lines(folder / f"BFCL_v4_{category}.json"):
                yield category, entry, truths[entry["id"]]


def compare(check: Checker, folder: Path) -> tuple[dict[str, Counter[str]], dict[tuple[str, str], list[Any]]]:
    """Counts by kind of answer, and the disagreements by (kind, column)."""
    counts: dict[str, Counter[str]] = {}
    found: dict[tuple[str, str], list[Any]] = {}
    for category, entry, truth in entries(folder):
        gold = [{"name": name, "arguments": args} for call in truth for name, args in call.items()]
        for kinds in (right_answers(truth), changed_answers(truth)):
            for kind, calls in kinds:
                text = json.dumps(
                    [{"name": name, "arguments": args} for name, args in calls], ensure_ascii=False
                )
                reason = verify(text, gold, accepted=True).reason
                column = column_of(check(entry["function"], calls, truth, category), reason == "ok")
                row = counts.setdefault(kind, Counter())
                row.update(["answers", column])
                if not column.startswith("both"):
                    example = {"id": entry["id"], "answer": text, "ours": reason, "accepted": gold}
                    found.setdefault((kind, column), []).append(example)
    return counts, found


def column_of(theirs: bool | None, ours: bool) -> str:
    if theirs is None:
        return "bfcl raises"
    if theirs == ours:
        return "both accept" if ours else "both reject"
    return "only ours accepts" if ours else "only bfcl accepts"


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder for agreement.csv and agreement.json")
    parser.add_argument("--examples", type=int, default=1, help="examples printed of each disagreement")
    own = parser.parse_args(argv)
    try:
        check = load_checker()
    except ModuleNotFoundError as error:
        print(f"skipped: no module {error.name}; {INSTALL}", file=sys.stderr)
        return 0
    import bfcl_eval

    counts, found = compare(check, Path(bfcl_eval.__path__[0]) / "data")
    print(f"{'kind of answer':34}" + "".join(f"{column:>19}" for column in COLUMNS))
    for kind, row in counts.items():
        print(f"{kind:34}" + "".join(f"{row[column]:19}" for column in COLUMNS))
    for (kind, column), examples in found.items():
        for example in examples[: own.examples]:
            print(
                f"\n{column}: {kind}\n  {example['id']}, ours: {example['ours']}\n  {example['answer'][:300]}"
            )
    if own.output:
        own.output.mkdir(parents=True, exist_ok=True)
        with (own.output / "agreement.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["kind", *COLUMNS])
            writer.writerows([kind, *(row[column] for column in COLUMNS)] for kind, row in counts.items())
        listed = [
            {"kind": kind, "column": column, **one} for (kind, column), all in found.items() for one in all
        ]
        (own.output / "agreement.json").write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
