"""Function-calling records, their tools as JSON schemas, and splits that share no tool.

A held-out example must offer only tools that training has never seen. So records that share a tool name, over
any number of steps, are one component, and a hash of its first name decides the split of all of it: which
split a tool is in never depends on the options. A component too large to be held out goes to train. Left
out: noticing that two names mean the same tool.
"""

from __future__ import annotations

import hashlib
import warnings
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

from grpo.tasks import SPLITS
from grpo.tasks.call_json import Call

# Shares of the components. Small sources hold out more: 500 examples are what tells 40% from 48%.
HELDOUT_SHARE, SMALL_HELDOUT_SHARE, VALIDATION_SHARE = 0.2, 0.4, 0.1
SMALL = 10_000  # records
MAX_COMPONENT = 0.2  # of the records; a larger component goes to train

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
        return "; ".join(self.first) + (f"; and {more} more" if more else "")


class Splits:
    """Which records of a source are in which split, in which order.

    One pass over the source. What stays in memory is some bytes per record, and the tools' names.

    Args:
        keep: whether to use a record. One that is not used still ties its tools together.
        seed: order within each split.
    Raises:
        ValueError: the source has no record, or `keep` leaves none.
    """

    def __init__(self, source: Source, keep: Callable[[Record], bool], seed: int) -> None:
        self.source, self.skipped = source, Skipped()
        groups = _Groups()
        numbers, first_tool = array("Q"), array("L")
        sizes: Counter[int] = Counter()  # records by their first tool
        for number, record in source.scan(self.skipped):
            # Without any tool a record is a component of its own. The prefix keeps its id from being a name.
            names = [tool["function"]["name"] for tool in record.tools] or [f"\0{record.id}"]
            group = groups.join(names)
            sizes[group] += 1
            if keep(record):
                numbers.append(number)
                first_tool.append(group)
        if not sizes:
            raise ValueError(
                f"{source} holds no usable record: {self.skipped if self.skipped.count else 'none at all'}"
            )
        if self.skipped.count:
            seen = self.skipped.count + sum(sizes.values())
            warnings.warn(
                f"{source}: skipped {self.skipped.count} of {seen} records: {self.skipped}", stacklevel=4
            )
        split_of = _assign(groups, sizes)
        self._numbers: dict[str, array[int]] = {split: array("Q") for split in SPLITS}
        for number, group in zip(numbers, first_tool, strict=True):
            self._numbers[split_of[groups.root(group)]].append(number)
        for split, part in self._numbers.items():
            Random(f"function calling order {seed} {split}").shuffle(part)

    def size(self, split: str) -> int:
        return len(self._numbers[split])

    def records(self, split: str, start: int, stop: int) -> list[Record]:
        return [self.source.read(number) for number in self._numbers[split][start:stop]]


class _Groups:
    """Union-find over tool names."""

    def __init__(self) -> None:
        self.names: dict[str, int] = {}
        self._parents = array("L")

    def root(self, node: int) -> int:
        while self._parents[node] != node:
            self._parents[node] = node = self._parents[self._parents[node]]
        return node

    def join(self, names: list[str]) -> int:
        """Puts the names into one component and gives the first name's number."""
        numbers = []
        for name in names:
            number = self.names.setdefault(name, len(self._parents))
            if number == len(self._parents):
                self._parents.append(number)
            numbers.append(number)
            self._parents[self.root(number)] = self.root(numbers[0])
        return numbers[0]


def _assign(groups: _Groups, sizes: Counter[int]) -> dict[int, str]:
    """The split of each component, by its root."""
    totals: Counter[int] = Counter()
    for number, size in sizes.items():
        totals[groups.root(number)] += size
    first: dict[int, str] = {}
    for name in sorted(groups.names):
        first.setdefault(groups.root(groups.names[name]), name)
    limit = MAX_COMPONENT * totals.total() if len(totals) > 1 else 0
    share = SMALL_HELDOUT_SHARE if totals.total() < SMALL else HELDOUT_SHARE
    return {root: "train" if totals[root] > limit else _split_of(name, share) for root, name in first.items()}


def _split_of(name: str, heldout_share: float) -> str:
    digest = hashlib.sha256(f"function_calling:{name}".encode("utf-8", "surrogatepass")).digest()
    place = int.from_bytes(digest[:6], "big") / 2.0**48
    if place < heldout_share:
        return "heldout"
    return "validation" if place < heldout_share + VALIDATION_SHARE else "train"


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
    found = {}
    for one in tools:
        properties = one["function"]["parameters"].get("properties", {})
        found[one["function"]["name"]] = {
            key: entry["default"]
            for key, entry in properties.items()
            if isinstance(entry, dict) and "default" in entry
        }
    return found


def _is_optional(entry: dict[str, Any]) -> bool:
    return "default" in entry or "optional" in str(entry.get("type", "")).lower()


def _schema(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with JSON Schema's type names. What is no type of JSON ("any") says nothing, and goes."""
    result = dict(schema)
    kind = result.get("type")
    if isinstance(kind, str):
        base = kind.split(",")[0].strip()
        result["type"] = _TYPES.get(base.split("[")[0].lower(), base)
        if base.lower() == "any":
            del result["type"]
    if isinstance(result.get("properties"), dict):
        result["properties"] = {
            key: _schema(entry) if isinstance(entry, dict) else entry
            for key, entry in result["properties"].items()
        }
    if isinstance(result.get("items"), dict):
        result["items"] = _schema(result["items"])
    return result
