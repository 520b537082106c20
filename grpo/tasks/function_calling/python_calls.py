"""Calls in Python's syntax, `f(a=1)` or `[f(a=1), g(b="x")]`, read with `ast` and never evaluated.

Keyword arguments only, with literals as values: what JSON can say. Left out: everything else of the language.
(An expression of thousands of operators is `parse` or `non_literal`, as deep as this Python's parser goes.)
"""

from __future__ import annotations

import ast
import math
import warnings
from typing import Any

from grpo.tasks.function_calling.json_calls import MAX_DIGITS, Call, Unreadable

_MAX_BITS = int(MAX_DIGITS * math.log2(10))
_NO_JSON = object()  # a literal that JSON does not have (bytes, a set, ...): equal to no value


def python_calls(text: str) -> list[Call]:
    """The calls of a text that is one call or one list of calls.

    Raises:
        Unreadable: parse (also `**` and more than one statement), positional, dup_key, non_literal,
            nonfinite.
    """
    try:
        with warnings.catch_warnings():  # "\d" in a string is worth a warning in a program, not here
            warnings.simplefilter("ignore")
            node = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two: nested too deep
        raise Unreadable("parse") from None
    return [_call(item) for item in (node.elts if isinstance(node, ast.List) else [node])]


def _call(node: ast.expr) -> Call:
    if not isinstance(node, ast.Call) or any(keyword.arg is None for keyword in node.keywords):
        raise Unreadable("parse")
    name = _name(node.func)
    if node.args:
        raise Unreadable("positional")
    keys = [str(keyword.arg) for keyword in node.keywords]
    if len(set(keys)) < len(keys):
        raise Unreadable("dup_key")
    return {"name": name, "arguments": {str(keyword.arg): _value(keyword.value) for keyword in node.keywords}}


def _name(node: ast.expr) -> str:
    """`f`, or dotted: `module.f`."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        raise Unreadable("parse")
    return ".".join([node.id, *reversed(parts)])


def _value(node: ast.expr | None) -> Any:
    """A literal's value. Python itself allows no deeper brackets than this recursion can follow."""
    if isinstance(node, ast.Constant):
        return _constant(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        number = _value(node.operand) if isinstance(node.operand, ast.Constant) else None
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise Unreadable("non_literal")
        return -number
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.Set):
        for item in node.elts:
            _value(item)  # a set of literals is a literal
        return _NO_JSON
    if not isinstance(node, ast.Dict):
        raise Unreadable("non_literal")
    if None in node.keys:
        raise Unreadable("parse")  # {**other}
    keys, values = [_value(key) for key in node.keys], [_value(value) for value in node.values]
    if not all(isinstance(key, str) for key in keys):
        return _NO_JSON
    if len(set(keys)) < len(keys):
        raise Unreadable("dup_key")
    return dict(zip(keys, values, strict=True))


def _constant(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise Unreadable("nonfinite")
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:  # hexadecimal has no limit of digits
        raise Unreadable("parse")
    return value if value is None or isinstance(value, bool | int | float | str) else _NO_JSON
