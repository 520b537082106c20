"""Compares the calls of an answer with the right ones: order free, by bipartite matching, never greedily.

Greedy pairing is wrong where calls have alternatives: with gold f(x in {1, 2}) and f(x in {1}), an answer
f(x=1), f(x=2) fails if the first gold call takes x=1. Left out: any notion of nearly right.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from grpo.tasks.function_calling.json_calls import Call

Defaults = dict[str, dict[str, Any]]  # default values by function name and argument name


def compare(
    calls: list[Call], gold: list[Call], accepted: bool = False, defaults: Defaults | None = None
) -> str:
    """ "ok", or the first that differs: wrong_count, wrong_name, wrong_keys, wrong_value.

    Args:
        calls: of the answer. gold: the right ones, in any order.
        accepted: each argument in `gold` is a list of accepted values, as in the Berkeley files: "" among
            them means that the argument may be left out, and objects hold such lists in their turn.
        defaults: where given, an argument that one side leaves out counts as given with its default.
    """
    if len(calls) != len(gold):
        return "wrong_count"
    if Counter(call["name"] for call in calls) != Counter(right["name"] for right in gold):
        return "wrong_name"
    for reason, values in (("wrong_keys", False), ("wrong_value", True)):
        edges = [
            [i for i, right in enumerate(gold) if _fits(call, right, accepted, defaults or {}, values)]
            for call in calls
        ]
        if not _all_paired(edges):
            return reason
    return "ok"


def includes(calls: list[Call], gold: list[Call], accepted: bool = False) -> bool:
    """Whether every right call is among `calls`, each paired with a different one."""
    edges = [[i for i, call in enumerate(calls) if _fits(call, right, accepted, {}, True)] for right in gold]
    return _all_paired(edges)


def equal(a: Any, b: Any) -> bool:
    """Equality of JSON values: 1 is 1.0, a bool is no number, lists have an order and objects none.

    It uses an explicit stack, because a value may be nested deeper than Python can recurse.
    """
    waiting = [(a, b)]
    while waiting:
        a, b = waiting.pop()
        kind = _kind(a)
        if kind is None or kind != _kind(b):
            return False
        if kind == "object":
            if a.keys() != b.keys():
                return False
            waiting += [(a[key], b[key]) for key in a]
        elif kind == "list":
            if len(a) != len(b):
                return False
            waiting += zip(a, b, strict=True)
        elif a != b:
            return False
    return True


def _kind(value: Any) -> str | None:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, str):
        return "string"
    if isinstance(value, list | tuple):
        return "list"
    if isinstance(value, dict):
        return "object"
    return "null" if value is None else None


def _fits(call: Call, right: Call, accepted: bool, defaults: Defaults, values: bool) -> bool:
    """Whether the call fits the gold call: name, argument names and, with `values`, values."""
    if call["name"] != right["name"]:
        return False
    given, wanted, known = call["arguments"], right["arguments"], defaults.get(call["name"], {})
    for key, value in given.items():
        if key in wanted:
            if values and not _argument_fits(value, wanted[key], accepted):
                return False
        elif key not in known or not equal(value, known[key]):
            return False
    return all(
        key in given
        or (accepted and _may_be_left_out(wanted[key]))
        or (key in known and _argument_fits(known[key], wanted[key], accepted))
        for key in wanted
    )


def _argument_fits(value: Any, wanted: Any, accepted: bool) -> bool:
    if not accepted:
        return equal(value, wanted)
    alternatives = wanted if isinstance(wanted, list) else [wanted]
    if value == "" and isinstance(value, str):
        # "" means "left out". As a value it is right only if strings are accepted.
        return "" in alternatives and all(other is None or isinstance(other, str) for other in alternatives)
    return any(_is_accepted(value, wanted_value) for wanted_value in alternatives)


def _is_accepted(value: Any, accepted: Any) -> bool:
    """Whether `value` is this accepted value. No deeper than the gold value is."""
    if isinstance(accepted, dict):
        return (
            isinstance(value, dict)
            and not value.keys() - accepted.keys()
            and all(
                _argument_fits(value[key], accepted[key], True)
                if key in value
                else _may_be_left_out(accepted[key])
                for key in accepted
            )
        )
    if isinstance(accepted, list):
        return (
            isinstance(value, list)
            and len(value) == len(accepted)
            and all(_is_accepted(*pair) for pair in zip(value, accepted, strict=True))
        )
    return equal(value, accepted)


def _may_be_left_out(wanted: Any) -> bool:
    return isinstance(wanted, list) and "" in wanted


def _all_paired(edges: list[list[int]]) -> bool:
    """Whether all left nodes can be paired with different right nodes; `edges[i]` fit left node i.

    Augmenting paths, breadth first: a left node whose right nodes are all taken makes their owners move.
    """
    owner: dict[int, int] = {}  # right -> left
    place: dict[int, int] = {}  # left -> right
    for start in range(len(edges)):
        came_from: dict[int, int] = {}
        queue = [start]
        free = None
        for left in queue:  # grows while it is walked through
            for right in edges[left]:
                if right in came_from:
                    continue
                came_from[right] = left
                if right not in owner:
                    free = right
                    break
                queue.append(owner[right])
            if free is not None:
                break
        if free is None:
            return False
        while free is not None:
            left = came_from[free]
            owner[free] = left
            place[left], free = free, place.get(left)  # the node that gives up its place takes the free one
    return True
