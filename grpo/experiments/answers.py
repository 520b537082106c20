"""Answers to function-calling problems that are known to be right or wrong without a verifier.

The Berkeley files list the accepted values of each argument. An answer made of these is right; changed in one
place it is mostly wrong. `benchmarks/verifier_agreement.py` shows all of them to two verifiers. The
experiment `verifier` uses those that are right or wrong under any convention.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from grpo.tasks.function_calling.mistakes import alternatives, concrete

Args = dict[str, Any]
Calls = list[tuple[str, Args]]
Truth = list[dict[str, dict[str, list[Any]]]]


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
    """What the files accept: first values, each alternative, optional arguments left out, another order."""
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


# name: (whether the change applies to a value, the changed value)
CHANGES: dict[str, tuple[Callable[[Any], bool], Callable[[Any], Any]]] = {
    "text in another case": (lambda v: isinstance(v, str) and v.swapcase() != v, lambda v: v.swapcase()),
    "text without its blanks": (lambda v: isinstance(v, str) and " " in v, lambda v: v.replace(" ", "")),
    "text with a full stop": (lambda v: isinstance(v, str), lambda v: v + "."),
    "text with a blank at the end": (lambda v: isinstance(v, str), lambda v: v + " "),
    "string with one letter added": (lambda v: isinstance(v, str), lambda v: v + "x"),
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
    "list with its last item repeated": (lambda v: isinstance(v, list) and bool(v), lambda v: [*v, v[-1]]),
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
    """The first answer with one change: each change once per example, at the first place it applies to."""
    base = first_answer(truth)
    accepted = [args for call in truth for args in call.values()]
    name, args = base[0]
    yield "another function's name", [(name + "_2", args), *base[1:]]
    yield "a missing call", base[1:]
    yield "a repeated call", [*base, base[0]]
    yield "an unknown argument", changed(base, 0, "unknown_argument", 1)
    places = [(place, key) for place, (_, args) in enumerate(base) for key in args]
    for place, key in places:
        if "" not in accepted[place][key]:
            yield "a required argument left out", without(base, place, key)
            break
    for title, (applies, change) in CHANGES.items():
        for place, key in places:
            value = base[place][1][key]
            if applies(value):
                optional = " (optional)" if title.startswith("empty") and "" in accepted[place][key] else ""
                yield title + optional, changed(base, place, key, change(value))
                break
