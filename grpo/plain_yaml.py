"""Reads and writes YAML in which every value is what a person reads.

YAML 1.1, the dialect of PyYAML, has traps: 010 is 8, 12:30:00 is 45000, `no` is false, 5e-7 is a string, the
second of two equal keys wins, aliases can multiply a few lines to gigabytes, and tags name Python objects.
Here a value without quotes is null, true, false or a decimal number, as in YAML 1.2, and otherwise a string.
Equal keys, aliases, merge keys, tags and a second document are refused, with the line. Only PyYAML's parser
is used, none of its constructors.

Left out: everything that settings do not need, such as keys that are not strings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

MOST_BYTES = 2**18  # of a file; PyYAML reads some 100 KB per second
DEEPEST = 50  # levels of lists and mappings; PyYAML's time grows with their square
LONGEST_KEY = 100  # characters that a key may have without `?`; PyYAML's limit is 1024, escapes included
_WORDS: dict[str, Any] = dict.fromkeys(["", "~", "null", "Null", "NULL"])
_WORDS |= dict.fromkeys(["true", "True", "TRUE"], True) | dict.fromkeys(["false", "False", "FALSE"], False)
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,4000})")
_FLOAT = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")


def read(path: str | Path) -> tuple[Any, dict[str, int]]:
    """The content of a file and, if it is a mapping, the line of each of its keys.

    Raises:
        ValueError: the file cannot be read, is too large, is no UTF-8, or is not of this kind of YAML.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
        text = content.decode("utf-8-sig")  # some editors begin a file with a byte order mark
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be saved as UTF-8, got another encoding ({error.reason})") from None
    if len(content) > MOST_BYTES:
        raise ValueError(f"{path} must have at most {MOST_BYTES} bytes: is it a file with settings?")
    lines: dict[str, int] = {}
    try:
        return _document(yaml.parse(text, Loader=yaml.SafeLoader), lines), lines
    except yaml.MarkedYAMLError as error:
        where = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path}{where} is not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    except _Refused as error:
        raise ValueError(f"{path}, line {error}") from None


def scalar(text: str) -> Any:
    """What a value without quotes means."""
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def write(value: Any, levels: int = DEEPEST) -> str:
    """One line of YAML for a JSON value: JSON, except where YAML 1.1 or PyYAML would read that differently.

    Raises:
        ValueError: it has too many levels to be read again.
    """
    if levels == 0:
        raise ValueError(f"more than {DEEPEST} levels of lists and mappings are not allowed")
    if isinstance(value, dict):
        items = [f"{_key(key)}: {write(item, levels - 1)}" for key, item in value.items()]
        return "{" + ", ".join(items) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(write(item, levels - 1) for item in value) + "]"
    text = json.dumps(value).replace("\x7f", "\\u007f")  # which is refused as it is
    if isinstance(value, float) and "." not in text:
        return text.replace("e", ".0e")  # 5e-07 is a string in YAML 1.1
    # JSON escapes a character above U+FFFF as a pair, which YAML reads as two characters.
    return re.sub(r"\\ud[89ab]..\\ud[c-f]..", lambda pair: json.loads(f'"{pair[0]}"'), text)


def _key(key: str) -> str:
    return f"? {write(key)} " if len(key) > LONGEST_KEY else write(key)


def _joined(text: str) -> str:
    """JSON, which is YAML too, escapes a character above U+FFFF as a pair of surrogates."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


class _Refused(ValueError):
    """The message begins with the number of the line."""


def _document(events: Iterator[yaml.Event], lines: dict[str, int]) -> Any:
    value = None
    documents = 0
    for event in events:
        if isinstance(event, yaml.DocumentStartEvent):
            if documents:
                raise _Refused(f"{event.start_mark.line + 1}: a second document (---) is not allowed")
            documents += 1
            value = _value(next(events), events, 0, lines)
    return value


def _value(event: yaml.Event, events: Iterator[yaml.Event], depth: int, lines: dict[str, int]) -> Any:
    """The value that begins with `event`. `lines` receives the lines of the keys of a mapping."""
    line = event.start_mark.line + 1
    if isinstance(event, yaml.AliasEvent):
        raise _Refused(f"{line}: the alias *{event.anchor} is not allowed: write the value out")
    if event.tag is not None:
        raise _Refused(f"{line}: the tag {event.tag} is not allowed: only plain values are read")
    if isinstance(event, yaml.ScalarEvent):
        return scalar(event.value) if event.implicit[0] else _joined(event.value)
    if depth == DEEPEST:
        raise _Refused(f"{line}: more than {DEEPEST} levels of lists and mappings are not allowed")
    if isinstance(event, yaml.SequenceStartEvent):
        items = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            items.append(_value(event, events, depth + 1, {}))
        return items
    mapping: dict[str, Any] = {}
    while not isinstance(event := next(events), yaml.MappingEndEvent):
        line = event.start_mark.line + 1
        if not isinstance(event, yaml.ScalarEvent) or event.tag is not None:
            raise _Refused(f"{line}: a key must be a plain string")
        key = _joined(event.value)
        if key in mapping:
            raise _Refused(f"{line}: the key {key!r} is given twice, first in line {lines[key]}")
        if key == "<<" and event.implicit[0]:
            raise _Refused(f"{line}: the merge key << is not allowed: write the values out")
        lines[key] = line
        mapping[key] = _value(next(events), events, depth + 1, {})
    return mapping
