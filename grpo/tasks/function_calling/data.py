"""Function-calling records, their tools as JSON schemas, and splits that share no tool.

A held-out example must offer only tools that training has never seen. So records that share a tool name,
directly or through other records, form a component, and a hash of its first name decides the split of the
whole component. A component too large to be held out goes to train, if the others leave enough to hold out.
If they do not, it is cut: each of its tools gets a split, and records with tools of several splits are left
out. None of this depends on the options. Left out: detecting that two names mean the same tool.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

from grpo.tasks import SPLITS, warn
from grpo.tasks.function_calling.json_calls import Call

# Shares of the components. Small sources hold out more, because telling 40% from 48% takes 500 examples.
HELDOUT_SHARE, SMALL_HELDOUT_SHARE, VALIDATION_SHARE = 0.2, 0.4, 0.1
SMALL = 10_000  # records
MAX_COMPONENT = 0.2  # of the records; a larger component goes to train, or is cut
WANTED_HELDOUT = 512  # records; with fewer, large components are cut

# Type names of the Berkeley files (JSON Schema by way of Python) and of the xLAM files (Python's own).
_TYPES = {
    "dict": "object",
    "float": "number",
    "tuple": "array",
    "str": "string",
    "int": "integer",
    "bool": "boolean",
    "list": "array",
    "set": "array",
}


@dataclass(frozen=True)
class Record:
    """One example as its source gives it.

    Attributes:
        messages: role and content each; the last one is the user's.
        tools: JSON schemas, as chat templates take them.
        gold: the right calls; none where no tool fits.
    """

    id: str
    messages: list[dict[str, str]]
    tools: list[dict[str, Any]]
    gold: list[Call]


class Source(Protocol):
    """Where records come from. `accepted`: gold arguments are lists of accepted values."""

    accepted: bool

    def scan(self, skipped: Skipped) -> Iterator[tuple[int, Record]]:
        """Every usable record, with the number by which `read` finds it again; others go to `skipped`."""
        ...

    def read(self, number: int) -> Record: ...


class Skipped:
    """Counts records that cannot be used, and remembers where the first ones are and why."""

    SHOWN = 5

    def __init__(self) -> None:
        self.count = 0
        self.first: list[str] = []

    def add(self, where: str, why: str) -> None:
        self.count += 1
        if len(self.first) < self.SHOWN:
            self.first.append(f"{where}: {why}")

    def __str__(self) -> str:
        more = self.count - len(self.first)
        if not self.count:
            return "none at all"
        return "; ".join(self.first) + (f"; and {more} more" if more else "")


class Splits:
    """Which records of a source are in which split, in which order.

    One pass over the source. What stays in memory is some bytes per record, and the tools' names.

    Args:
        keep: whether to use a record. One that is not used still ties its tools together.
        seed: order within each split.
    Raises:
        ValueError: the source has no usable record.
    """

    def __init__(self, source: Source, keep: Callable[[Record], bool], seed: int) -> None:
        self.source, self.skipped = source, Skipped()
        tools, rows, kept = _Tools(), _Rows(), array("B")
        numbers = array("Q")
        for number, record in source.scan(self.skipped):
            # Without any tool a record is a component of its own. The prefix keeps its id from being a name.
            names = [tool["function"]["name"] for tool in record.tools] or [f"\0{record.id}"]
            rows.append(tools.join(names), [tools.places[tools.numbers[name]] for name in names])
            numbers.append(number)
            kept.append(keep(record))
        if not numbers:
            raise ValueError(f"{source} has no usable record: {self.skipped}")
        if self.skipped.count:
            seen = self.skipped.count + len(numbers)
            warn(f"{source}: skipped {self.skipped.count} of {seen} records: {self.skipped}")
        splits = _assign(tools, rows)
        self.left_out = splits.count(_LEFT_OUT)
        if self.left_out:
            warn(
                f"{source}: left out {self.left_out} of {len(numbers)} records, which offer tools of several "
                "splits: too many tools hang together to hold some of them out otherwise"
            )
        self._numbers: dict[str, array[int]] = {split: array("Q") for split in SPLITS}
        for number, split, used in zip(numbers, splits, kept, strict=True):
            if used and split != _LEFT_OUT:
                self._numbers[SPLITS[split]].append(number)
        for name, part in self._numbers.items():
            Random(f"function calling order {seed} {name}").shuffle(part)

    def size(self, split: str) -> int:
        return len(self._numbers[split])

    def records(self, split: str, start: int, stop: int) -> list[Record]:
        """Raises ValueError if there are fewer."""
        if stop > self.size(split):
            raise ValueError(
                f"split {split!r} has {self.size(split)} examples, but offset {start} plus count "
                f"{stop - start} were asked for; add categories or data, or raise max_tools or max_characters"
            )
        return [self.source.read(number) for number in self._numbers[split][start:stop]]


_TRAIN, _VALIDATION, _HELDOUT = (SPLITS.index(split) for split in ("train", "validation", "heldout"))
_LEFT_OUT = len(SPLITS)


class _Tools:
    """Tool names: their components (union-find), and the place of each in [0, 1)."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self.places = array("d")
        self._parents = array("L")

    def root(self, tool: int) -> int:
        while self._parents[tool] != tool:
            self._parents[tool] = tool = self._parents[self._parents[tool]]
        return tool

    def join(self, names: list[str]) -> int:
        """Puts the names into one component and gives the first name's number."""
        for name in names:
            if name not in self.numbers:
                self._parents.append(len(self.numbers))
                self.numbers[name] = len(self.numbers)
                self.places.append(hashed_place(name))
            self._parents[self.root(self.numbers[name])] = self.root(self.numbers[names[0]])
        return self.numbers[names[0]]


class _Rows:
    """Of each record its first tool, and the span of its tools' places."""

    def __init__(self) -> None:
        self.first, self.low, self.high = array("L"), array("d"), array("d")

    def append(self, first: int, places: list[float]) -> None:
        self.first.append(first)
        self.low.append(min(places))
        self.high.append(max(places))


def _assign(tools: _Tools, rows: _Rows) -> array[int]:
    """The split of each record, as an index into SPLITS or _LEFT_OUT."""
    sizes = Counter(tools.root(tool) for tool in rows.first)
    share = SMALL_HELDOUT_SHARE if len(rows.first) < SMALL else HELDOUT_SHARE

    def split(place: float) -> int:
        if place < share:
            return _HELDOUT
        return _VALIDATION if place < share + VALIDATION_SHARE else _TRAIN

    split_of_component: dict[int, int] = {}  # the split of a component, by its root
    for name in sorted(tools.numbers):
        split_of_component.setdefault(
            tools.root(tools.numbers[name]), split(tools.places[tools.numbers[name]])
        )
    large = {root for root, size in sizes.items() if size > MAX_COMPONENT * len(rows.first)}
    roots = [tools.root(tool) for tool in rows.first]
    whole = array("B", (_TRAIN if root in large else split_of_component[root] for root in roots))
    if not large or whole.count(_HELDOUT) >= WANTED_HELDOUT:
        return whole
    # The splits are intervals, so tools are in one split if the lowest and the highest place are.
    ends = ((split(low), split(high)) for low, high in zip(rows.low, rows.high, strict=True))
    cut = array(
        "B",
        (
            split_of_component[root] if root not in large else low if low == high else _LEFT_OUT
            for root, (low, high) in zip(roots, ends, strict=True)
        ),
    )
    # If one tool is in every record, a cut leaves nothing to train on, or nothing to hold out.
    better = whole.count(_HELDOUT) < cut.count(_HELDOUT) <= cut.count(_TRAIN)
    return cut if better else whole


def hashed_place(name: str) -> float:
    """Where a tool lies in [0, 1): its own, whatever the source."""
    digest = hashlib.sha256(f"function_calling:{name}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big") / 2.0**48


# --- tools --------------------------------------------------------------------------------------------------


def tool(name: str, description: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """A function in the form that chat templates take: {"type": "function", "function": {...}}.

    `parameters` is JSON Schema with Python's type names here and there, as in the Berkeley files, or bare
    {argument: {"type", "description", "default"}}, as in the xLAM files.
    """
    if not is_schema(parameters):
        required = [key for key, entry in parameters.items() if not _is_optional(entry)]
        parameters = {"type": "object", "properties": parameters, "required": required}
    function = {"name": name, "description": description, "parameters": _schema(parameters)}
    return {"type": "function", "function": function}


def is_schema(parameters: dict[str, Any]) -> bool:
    """Whether it is a schema, and not the bare arguments, one of which may be called "properties"."""
    return isinstance(parameters.get("properties"), dict) and isinstance(parameters.get("type"), str)


def defaults_of(tools: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Default values by function and argument."""
    defaults = {}
    for schema in tools:
        properties = schema["function"]["parameters"].get("properties", {})
        defaults[schema["function"]["name"]] = {
            key: entry["default"]
            for key, entry in properties.items()
            if isinstance(entry, dict) and "default" in entry
        }
    return defaults


def _is_optional(entry: dict[str, Any]) -> bool:
    """Of a bare argument: a default, a mark, or a type such as "str, optional" or "int, default: 5"."""
    kind = str(entry.get("type", "")).lower()
    marked = "default" in entry or entry.get("optional") is True
    return marked or "optional" in kind or "default" in kind


def _schema(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with JSON Schema's type names, and with a list of the required properties.

    A type that JSON lacks ("any") is dropped. `"required": false` or true at a property, which JSON Schema
    does not have, goes to the list.
    """
    result = dict(schema)
    if isinstance(result.get("type"), str):
        result["type"] = _type(result["type"])
        if result["type"].lower() == "any":
            del result["type"]
    if isinstance(result.get("required"), bool):
        del result["required"]
    properties = result.get("properties")
    if isinstance(properties, dict):
        entries = {key: entry for key, entry in properties.items() if isinstance(entry, dict)}
        result["properties"] = {**properties, **{key: _schema(entry) for key, entry in entries.items()}}
        flags = {
            key: entry["required"]
            for key, entry in entries.items()
            if isinstance(entry.get("required"), bool)
        }
        if flags:
            listed = result["required"] if isinstance(result.get("required"), list) else []
            kept = [name for name in listed if isinstance(name, str) and flags.get(name, True)]
            result["required"] = list(dict.fromkeys([*kept, *(key for key in flags if flags[key])]))
    if isinstance(result.get("items"), dict):
        result["items"] = _schema(result["items"])
    return result


def _type(kind: str) -> str:
    """A type without what follows it ("List[int], optional" -> "array"), in JSON Schema's name if it has one.

    What JSON Schema has no name for stays as it is: "Union[str, int]", "Callable[[float], float]".
    """
    base = _first_type(kind)
    if base.lower().startswith("optional[") and base.endswith("]"):
        base = _first_type(base[len("optional[") : -1]) or base
    return _TYPES.get(base.partition("[")[0].lower(), base)


def _first_type(kind: str) -> str:
    """What precedes the first comma, parenthesis, "=" or ":" outside brackets; all of it if that is blank."""
    depth = 0
    for end, character in enumerate(kind):
        depth += (character in "[{") - (character in "]}")
        if depth == 0 and character in ",(=:":
            return kind[:end].strip() or kind
    return kind.strip()
