"""Typed fields for a dataclass of settings: bounds, help, and the way from a YAML value to a field's type.

grpo/config.py declares its fields with these. Left out: anything that knows a setting by name.
"""

import dataclasses
import difflib
import json
import math
import operator
import types
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

# Numbers with bounds for `check`; argparse and mypy see the plain int or float.
Count = Annotated[int, ("at least", 1)]
Natural = Annotated[int, ("at least", 0)]
Amount = Annotated[float, ("at least", 0)]
Positive = Annotated[float, ("above", 0)]
Share = Annotated[float, ("at least", 0), ("at most", 1)]
Decay = Annotated[float, ("at least", 0), ("below", 1)]
_HOLDS = {"at least": operator.ge, "at most": operator.le, "above": operator.gt, "below": operator.lt}
_EXPECTED = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}


class TaskOptions(dict):
    """Options of a task: a mapping in YAML, `numbers=3,high=10` or a JSON object on the command line."""

    def __init__(self, value: Any = ()) -> None:
        if isinstance(value, str):
            value = json.loads(value) if value.lstrip().startswith("{") else self._pairs(value)
        super().__init__(value)

    @staticmethod
    def _pairs(text: str) -> dict[str, Any]:
        options: dict[str, Any] = {}
        for pair in filter(None, text.split(",")):
            name, equals, value = pair.partition("=")
            if not equals:
                raise ValueError(f"expected name=value, got {pair!r}")
            try:
                options[name.strip()] = json.loads(value)
            except json.JSONDecodeError:  # a bare word, such as operators=+-
                options[name.strip()] = value
        return options


def field(default: Any, help: str, **argument: Any) -> Any:
    """A dataclass field with its help; `argument` goes to argparse's `add_argument` (e.g. nargs).

    A class as default, such as TaskOptions, is called for each instance.
    """
    metadata = {"help": help, **argument}
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """`; did you mean X?` with the known name nearest to `name`, or nothing where none is near."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {prefix}{matches[0]}?" if matches else ""


def coerce(name: str, value: Any, kind: Any) -> Any:
    """`value` from YAML (where 5e-7 is a string) as the type `kind`. Raises ValueError naming the field."""
    if get_origin(kind) in (Union, types.UnionType):  # X | None
        if value is None:
            return None
        kind = next(part for part in get_args(kind) if part is not type(None))
    if get_origin(kind) is Literal:
        return value  # `check` compares it with the choices
    try:
        if kind is TaskOptions and isinstance(value, str | Mapping | None):
            return TaskOptions(value or ())
        if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
            return float(value)
        if kind is int and isinstance(value, str):
            return int(value)
    except ValueError:
        pass  # said below, in the same words as for a value of another type
    else:
        if type(value) is kind:
            return value
    raise ValueError(f"{name} must be {_EXPECTED.get(kind, 'a mapping')}, got {value!r}")


def check(settings: Any) -> None:
    """Checks choices, bounds and finiteness of a dataclass of settings. Raises ValueError for the first."""
    for name, kind in get_type_hints(type(settings), include_extras=True).items():
        value = getattr(settings, name)
        if get_origin(kind) is Literal and value not in get_args(kind):
            hint = nearest(str(value), get_args(kind))
            raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, got {value!r}{hint}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
        for relation, bound in kind.__metadata__ if get_origin(kind) is Annotated else ():
            if not _HOLDS[relation](value, bound):
                raise ValueError(f"{name} must be {relation} {bound}, got {value}")
