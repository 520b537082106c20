"""Function calls from untrusted JSON.

No text can raise anything but Unreadable. Nesting, integers, NaN and duplicate keys have limits here, so that
a verdict does not depend on the interpreter's limits. Left out: repairing broken JSON, which a program that
receives such a call could not run either.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

MAX_DEPTH = 500  # of nested JSON; Python's own parser gives up at about a thousand, by version
MAX_DIGITS = 4_300  # of an integer: where Python refuses by default to convert a longer one

BOUNDS = json.JSONDecoder(parse_int=len, parse_float=len)  # finds where a value ends; numbers do not matter
_BLANKS = re.compile(r"\s*")

Call = dict[str, Any]  # {"name": str, "arguments": dict}


class Unreadable(Exception):
    """No calls can be read; `reason` is the verdict's."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def json_calls(text: str) -> list[Call]:
    """The calls in a text, which is JSON of one call or of a list of calls.

    Raises:
        Unreadable: parse, dup_key, nonfinite, shape.
    """
    value = read_json(text)
    return [_call(item) for item in (value if isinstance(value, list) else [value])]


def read_json(text: str) -> Any:
    """`json.loads` for untrusted text.

    Raises:
        Unreadable: parse (no JSON, deeper than MAX_DEPTH, an integer over MAX_DIGITS), dup_key (a key twice
            in one object), nonfinite (NaN, infinity, a number that overflows to it).
    """
    faults: set[str] = set()  # noted instead of raised, because invalid JSON is `parse` first

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(items)
        if len(mapping) < len(items):
            faults.add("dup_key")
        return mapping

    def real(digits: str) -> float:
        number = float(digits)
        if not math.isfinite(number):
            faults.add("nonfinite")
        return number

    def integer(digits: str) -> int:
        if len(digits) > MAX_DIGITS + digits.startswith("-"):
            raise ValueError("too many digits")
        return int(digits)

    try:
        value = json.loads(
            text, object_pairs_hook=pairs, parse_float=real, parse_int=integer, parse_constant=real
        )
    except (ValueError, RecursionError):
        raise Unreadable("parse") from None
    if _depth_exceeds(value, MAX_DEPTH):
        raise Unreadable("parse")
    for reason in ("dup_key", "nonfinite"):
        if reason in faults:
            raise Unreadable(reason)
    return value


def end_of_json(text: str, start: int) -> int | None:
    """Where the JSON value ends that begins at `start`, blanks aside; None if there is none, or too deep."""
    begin = _BLANKS.match(text, start)
    assert begin is not None
    try:
        return BOUNDS.raw_decode(text, begin.end())[1]
    except (ValueError, RecursionError):
        return None


def _call(item: Any) -> Call:
    """One call from its JSON in any of the accepted shapes. Another shape or a further key is `shape`."""
    if isinstance(item, dict) and "function" in item:
        if item.get("type") != "function" or item.keys() - {"type", "function", "id"}:
            raise Unreadable("shape")
        item = item["function"]
    if not isinstance(item, dict):
        raise Unreadable("shape")
    key = "parameters" if "parameters" in item else "arguments"
    if item.keys() - {"id", "type"} != {"name", key} or not isinstance(item["name"], str):
        raise Unreadable("shape")
    arguments = item[key]
    if isinstance(arguments, str):  # JSON in a string, as the OpenAI interface writes it
        arguments = read_json(arguments)
    if not isinstance(arguments, dict):
        raise Unreadable("shape")
    return {"name": item["name"], "arguments": arguments}


def _depth_exceeds(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True
