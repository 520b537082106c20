"""Finds the function calls in a model's answer, or the reason why none can be read.

Calls are in `<tool_call>` tags, in one code fence, or the whole answer. They are JSON (json_calls.py) or, on
request, Python's syntax (python_calls.py). Model output is parsed, never evaluated. A block ends where its
value ends, so tags and fences inside strings are text. The work is linear in the text. Left out: calls in the
middle of prose.
"""

from __future__ import annotations

import re

from grpo.tasks import END_THINK, THINK
from grpo.tasks.function_calling.json_calls import Call, Unreadable, end_of_json, json_calls
from grpo.tasks.function_calling.python_calls import python_calls

MAX_CHARACTERS = 8_000
PLACES = 100  # opening braces of running text that `scattered_calls` looks at, so that its work stays linear

OPEN = "<tool_call>"
# What ends a block: a closing tag, backticks, or backticks that begin a line (group 1: what follows them).
_CLOSE, _FENCE, _FENCE_LINE = r"</tool_call>", r"`{3,}", r"^[ \t]*`{3,}(?=([^`\n]*)$)"
_INFO = re.compile(r"[\w+.-]*[ \t]*\r?\n|(?:json|python)\s")  # what may follow the opening of a fence
_PYTHON_CALL = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*\(")  # how a bare Python call begins
# Python's strings and comments, which are passed over, and what no Python call holds outside them.
_STRINGS = (
    r'"""(?:[^"\\]|\\.|"(?!""))*"""|'
    r"'''(?:[^'\\]|\\.|'(?!''))*'''|"
    r'(?!""")"(?:[^"\\\n]|\\.)*"|'
    r"(?!''')'(?:[^'\\\n]|\\.)*'|"
    r"#(?:(?!</?tool_call>|<think>|```)[^\n])*|"
    rf"(?P<fault>[\"']|{OPEN}|{THINK})"
)
_ENDS = {end: re.compile(end, re.MULTILINE) for end in (_CLOSE, _FENCE, _FENCE_LINE)}
_PYTHON_ENDS = {end: re.compile(f"(?P<end>{end})|{_STRINGS}", re.MULTILINE | re.DOTALL) for end in _ENDS}
_MARKS = {fence: re.compile(f"{OPEN}|{THINK}|{fence}", re.MULTILINE) for fence in (_FENCE, _FENCE_LINE)}


def find_calls(text: str, python_syntax: bool = False) -> list[Call]:
    """The calls of an answer, in its order, each as {"name": ..., "arguments": {...}}.

    Only what follows the last `</think>` is read. A `<think>` in it, outside the strings of calls that can be
    read, opens a thought without an end: `no_call`, whatever else there is.

    Raises:
        Unreadable: too_long, multi_block (two code fences), empty, no_call (prose), parse, dup_key,
            nonfinite, shape; of Python calls also positional and non_literal.
    """
    text = text.rpartition(END_THINK)[2]
    if len(text) > MAX_CHARACTERS:
        raise Unreadable("no_call" if THINK in text else "too_long")
    parts = [text] if _is_one_value(text, python_syntax) else _parts(text, python_syntax)
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
    """Whether nothing that is judged even begins like a call: no tag, and no such code fence or whole text.

    This is the right answer where there is nothing to call, and code fences in it that hold other things
    than calls do no harm. An open thought is no answer.
    """
    text = text.rpartition(END_THINK)[2]
    if len(text) > MAX_CHARACTERS:
        return False
    try:
        tagged, fenced, _ = _blocks(text, python_syntax)
    except Unreadable:
        return False
    if tagged:
        return not any(part.strip() for part in tagged)
    return not any(_begins_calls(part.strip(), python_syntax) for part in fenced or [text])


def scattered_calls(text: str) -> list[Call]:
    """Calls in JSON anywhere in running text, thoughts included, at most PLACES of them looked at."""
    calls: list[Call] = []
    place = -1
    for _ in range(PLACES):
        place = text.find("{", place + 1)
        if place < 0:
            break
        end = end_of_json(text, place)
        try:
            calls += json_calls(text[place:end]) if end else []
        except Unreadable:
            continue
        place = end - 1 if end else place
    return calls


# --- where calls are ----------------------------------------------------------------------------------------


def _parts(text: str, python_syntax: bool) -> list[str]:
    """The contents of the tags, or else of the only code fence; none where there is neither."""
    tagged, fenced, is_open = _blocks(text, python_syntax)
    if tagged:
        return tagged
    if len(fenced) > 1:
        raise Unreadable("multi_block")
    if is_open:
        raise Unreadable("parse")
    return fenced


def _blocks(text: str, python_syntax: bool) -> tuple[list[str], list[str], bool]:
    """The contents of the tags, those of the code fences, and whether the last fence is open.

    Backticks count wherever they are, since models close fences in mid-line. But they must begin a line
    where two lines open and close a fence, and in a text that begins like calls.

    Raises:
        Unreadable: parse (tags whose content is no value, or that are never closed), no_call (an open
            thought).
    """
    lines = list(_ENDS[_FENCE_LINE].finditer(text))
    two_lines = len(lines) == 2 and not lines[1][1].strip()
    fence = _FENCE_LINE if two_lines or text.lstrip()[:1] in ("[", "{") else _FENCE
    tagged: list[str] = []
    fenced: list[str] = []
    place, content = 0, -1  # `content`: where that of a fence begins whose end is the next fence
    strings = python_syntax  # a second look at a string without an end would make the work quadratic
    while mark := _MARKS[fence].search(text, place):
        place = mark.end()
        if mark[0] == THINK:
            raise Unreadable("no_call")
        if mark[0] == OPEN:
            end = _end(text, place, _CLOSE, python_syntax)
            if end is None:
                raise Unreadable("no_call" if THINK in text[place:] else "parse")
            tagged.append(text[place : end.start()])
            place = end.end()
        elif content >= 0:
            fenced.append(text[content : mark.start()])
            content = -1
        else:
            place = info.end() if (info := _INFO.match(text, place)) else place
            end = _end(text, place, fence, strings)
            if end is None:
                content, strings = place, False
            else:
                fenced.append(text[place : end.start()])
                place = end.end()
    if content >= 0:
        fenced.append(text[content:])
    return tagged, fenced, content >= 0


def _end(text: str, start: int, end: str, python_syntax: bool) -> re.Match[str] | None:
    """What ends the block that begins at `start`: the first `end` after a JSON value, or after nothing.

    In Python's syntax, the first one outside strings. None where the block holds something else.
    """
    after = end_of_json(text, start) or start
    if (mark := _ENDS[end].search(text, after)) and not text[after : mark.start()].strip():
        return mark
    for piece in _PYTHON_ENDS[end].finditer(text, start) if python_syntax else ():
        if piece["end"] is not None:
            return piece
        if piece["fault"]:
            break
    return None


def _is_one_value(text: str, python_syntax: bool) -> bool:
    """Whether the whole text is one JSON list or object or, in Python's syntax, calls."""
    text = text.strip()
    if not _begins_calls(text, python_syntax):
        return False
    if end_of_json(text, 0) == len(text):
        return True
    try:
        return python_syntax and bool(python_calls(text))
    except Unreadable as fault:
        return fault.reason != "parse"


def _begins_calls(text: str, python_syntax: bool) -> bool:
    return text[:1] in ("[", "{") or (python_syntax and _PYTHON_CALL.match(text) is not None)


def _read(text: str, python_syntax: bool) -> list[Call]:
    try:
        return json_calls(text)
    except Unreadable as fault:
        if not python_syntax or fault.reason != "parse":  # a Python call is no JSON
            raise
    return python_calls(text)
