"""Finds the function calls in a model's answer, or the reason why none can be read.

Calls are in `<tool_call>` tags, in one code fence, or the whole answer. They are JSON (json_calls.py) or, on
request, Python's syntax (python_calls.py). Model output is parsed, never evaluated. The work is linear in the
text. Left out: calls in the middle of prose.
"""

from __future__ import annotations

import json
import re

from grpo.tasks.function_calling.json_calls import Call, Unreadable, json_calls
from grpo.tasks.function_calling.python_calls import python_calls

MAX_CHARACTERS = 8_000
PLACES = 100  # opening braces of running text that `scattered_calls` looks at, so that its work stays linear

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_FENCE = re.compile(r"`{3,}")
_FENCE_LINE = re.compile(r"^[ \t]*`{3,}([^`\n]*)$", re.MULTILINE)
_INFO = re.compile(r"[\w+.-]*[ \t]*\r?\n|(?:json|python)\s")  # what may follow the opening of a fence
_PYTHON_CALL = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*\(")  # how a bare Python call begins


def find_calls(text: str, python_syntax: bool = False) -> list[Call]:
    """The calls of an answer, in its order, each as {"name": ..., "arguments": {...}}.

    Raises:
        Unreadable: too_long, multi_block (two code fences), empty, no_call (prose), parse, dup_key,
            nonfinite, shape; of Python calls also positional and non_literal.
    """
    if len(text) > MAX_CHARACTERS:
        raise Unreadable("too_long")
    if OPEN in text:
        parts = _tagged(text)
    else:
        parts = _fenced(text)
        if len(parts) > 1:
            raise Unreadable("multi_block")
    marked = bool(parts)  # where tags or a fence announce calls, anything else between them is no JSON
    calls: list[Call] = []
    for part in parts or [text]:
        part = part.strip()
        if not part:
            raise Unreadable("empty")
        if not marked and not _begins_calls(part, python_syntax):
            raise Unreadable("no_call")
        calls += _read(part, python_syntax)
    return calls


def holds_prose_only(text: str, python_syntax: bool = False) -> bool:
    """Whether nothing in the text even begins like a call: no tag, and no such code fence or whole text.

    This is the right answer where there is nothing to call, and code fences in it that hold other things
    than calls do no harm.
    """
    parts = [part.strip() for part in _fenced(text, strict=False) or [text]]
    return OPEN not in text and not any(_begins_calls(part, python_syntax) for part in parts)


def _tagged(text: str) -> list[str]:
    """The text between the tags; a `<tool_call>` that is never closed is `parse`."""
    parts = []
    end = 0
    while (start := text.find(OPEN, end)) >= 0:
        start += len(OPEN)
        end = text.find(CLOSE, start)
        if end < 0:
            raise Unreadable("parse")
        parts.append(text[start:end])
        end += len(CLOSE)
    return parts


def _fenced(text: str, strict: bool = True) -> list[str]:
    """The text in the code fences, without a fence's info string such as `json`.

    Backticks count wherever they stand, since models close fences in mid-line. But where two lines open and
    close a fence, those inside belong to its strings; and so they do in a text that is a call itself, unless
    they begin a line, which a string in JSON cannot. A fence that is never closed is `parse`, or with
    `strict` off goes on to the end.
    """
    lines = list(_FENCE_LINE.finditer(text))
    if len(lines) == 2 and not lines[1][1].strip() or text.lstrip()[:1] in ("[", "{"):
        marks = [(line.start(), line.end() - len(line[1])) for line in lines]
    else:
        marks = [mark.span() for mark in _FENCE.finditer(text)]
    if len(marks) % 2:
        if strict and len(marks) == 1:
            raise Unreadable("parse")
        marks.append((len(text), len(text)))
    inside = [text[marks[i][1] : marks[i + 1][0]] for i in range(0, len(marks), 2)]
    return [part[info.end() :] if (info := _INFO.match(part)) else part for part in inside]


def _begins_calls(text: str, python_syntax: bool) -> bool:
    return text[:1] in ("[", "{") or (python_syntax and _PYTHON_CALL.match(text) is not None)


def _read(text: str, python_syntax: bool) -> list[Call]:
    try:
        return json_calls(text)
    except Unreadable as fault:
        if not python_syntax or fault.reason != "parse":  # a Python call is no JSON
            raise
    return python_calls(text)


def scattered_calls(text: str) -> list[Call]:
    """Calls in JSON anywhere in running text, at most PLACES of them looked at."""
    calls: list[Call] = []
    decoder = json.JSONDecoder()
    place = -1
    for _ in range(PLACES):
        place = text.find("{", max(place + 1, 0))
        if place < 0:
            break
        try:
            _, end = decoder.raw_decode(text, place)
            calls += json_calls(text[place:end])
        except (ValueError, RecursionError, Unreadable):
            continue
        place = end - 1
    return calls
