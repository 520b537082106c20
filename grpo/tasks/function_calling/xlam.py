"""xLAM / APIGen files: query, tools and answers, as published, read in a stream.

A file is a JSON array of records or JSON lines. It is read once as a whole, and then record by record as
examples are asked for. So a file of gigabytes takes only the memory of its longest record and about a hundred
bytes per record. Unusable records, and those without a right answer, are counted and named. Damage that makes
the rest of the file unreadable is an error. Left out: compressed files, Parquet, and checks of gold values
against types and enums, which many good answers break (the Berkeley files show it).
"""

from __future__ import annotations

import codecs
import json
from array import array
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

from grpo.tasks import looked_in, user_path
from grpo.tasks.function_calling.calls import find_calls
from grpo.tasks.function_calling.data import Record, Skipped, is_schema, tool
from grpo.tasks.function_calling.json_calls import BOUNDS, Call, Unreadable, read_json
from grpo.tasks.function_calling.mistakes import text_of

CHUNK = 1 << 20  # bytes read at a time
MAX_RECORD = 1 << 22  # characters; with a longer "record" the file has another format
_WHY = {
    "parse": "is no JSON",
    "dup_key": "has a key twice in one object",
    "nonfinite": "holds NaN or infinity",
}


class Malformed(ValueError):
    """A record that cannot be used."""


class Xlam:
    """The records of one file. Their answers are exact values."""

    accepted = False

    def __init__(self, path: str) -> None:
        self.path = user_path(path)
        if not self.path.is_file():
            raise ValueError(
                f"data_path must be an xLAM file (JSON array or JSON lines), got {path!r}, which is not there"
                f"{looked_in(self.path)}"
            )
        self._offsets, self._lengths = array("Q"), array("L")

    def __str__(self) -> str:
        return str(self.path)

    def scan(self, skipped: Skipped) -> Iterator[tuple[int, Record]]:
        seen: set[bytes] = set()  # digests: ids may be long
        self._offsets, self._lengths = array("Q"), array("L")
        with self.path.open("rb") as file:
            for where, offset, raw in _raw_records(file, self.path):
                number = len(self._offsets)
                self._offsets.append(offset)
                self._lengths.append(len(raw))
                try:
                    record = _record(raw, offset)
                    digest = blake2b(record.id.encode(), digest_size=8).digest()
                    if digest in seen:
                        raise Malformed(f"repeats the id {record.id.partition(':')[2]}")
                except Malformed as error:
                    skipped.add(where, str(error))
                    continue
                seen.add(digest)
                yield number, record

    def read(self, number: int) -> Record:
        offset = self._offsets[number]
        with self.path.open("rb") as file:
            file.seek(offset)
            raw = file.read(self._lengths[number])
        try:
            return _record(raw, offset)
        except Malformed as error:
            raise ValueError(f"{self.path} has changed since it was read first: {error}") from None


# --- one record ---------------------------------------------------------------------------------------------


def _record(raw: bytes, offset: int) -> Record:
    if len(raw) > MAX_RECORD:
        raise Malformed(f"is longer than {MAX_RECORD} bytes")
    entry = _read(_text(raw), "the record")
    if not isinstance(entry, dict):
        raise Malformed(f"must be an object, got {_kind(entry)}")
    if missing := [key for key in ("query", "tools", "answers") if key not in entry]:
        raise Malformed(f"lacks {', '.join(missing)}")
    query, identifier = entry["query"], entry.get("id")
    identifier = f"at {offset}" if identifier is None else identifier
    if not isinstance(query, str) or not query.strip():
        raise Malformed("query must be a text that is not blank")
    if not isinstance(identifier, int | str) or isinstance(identifier, bool):
        raise Malformed(f"id must be an integer or a text, got {_kind(identifier)}")
    try:
        tools, gold = _tools_and_gold(_list(entry["tools"], "tools"), _list(entry["answers"], "answers"))
    except RecursionError:
        raise Malformed("is nested too deep") from None
    record = Record(f"xlam:{identifier}", [{"role": "user", "content": query}], tools, gold)
    if b"\\u" in raw:  # half of a surrogate pair: valid JSON, but no tokenizer can read it
        try:
            json.dumps([record.id, query, tools, gold], ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise Malformed("holds half of a surrogate pair") from None
    return record


def _tools_and_gold(listed: list[Any], answers: list[Any]) -> tuple[list[dict[str, Any]], list[Call]]:
    """The tools and the right calls of a record.

    A file that was converted from columns gives each tool the parameters of all tools, and each answer all
    arguments: null where there is none. A null parameter shows this. Nulls are then dropped, because there
    they mean "absent". In other records null is a value.
    """
    if any(None in _described(entry).values() for entry in listed):
        listed, answers = _without_nulls(listed), _without_nulls(answers)
    tools = [_tool(entry) for entry in listed]
    gold = [_answer(entry) for entry in answers]
    known: dict[str, list[dict[str, Any]]] = {}
    for schema in tools:
        known.setdefault(schema["function"]["name"], []).append(schema["function"]["parameters"])
    for call in gold:
        _check_call(call, known)
    try:
        if gold:
            find_calls(text_of(gold))
    except Unreadable as fault:
        raise Malformed(f"has no right answer: the verifier finds its own answers {fault.reason}") from None
    return tools, gold


def _check_call(call: Call, known: dict[str, list[dict[str, Any]]]) -> None:
    """Refuses a gold call that no reader of the tools could write. `known`: parameters by tool name.

    One that leaves out a required argument passes. In xLAM files "required" only means that no default is
    given, and descriptions often name one.
    """
    name, arguments = call["name"], call["arguments"]
    if name not in known:
        raise Malformed(f"answers call {_short(name)}, which is not among the tools")
    unknown = {}
    for parameters in known[name]:
        unknown = arguments.keys() - parameters["properties"].keys()
        if not unknown or parameters.get("additionalProperties"):
            return
    raise Malformed(f"answers give {_short(name)} the unknown argument {_short(min(unknown))}")


def _tool(entry: Any) -> dict[str, Any]:
    function = _function(entry)
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise Malformed("tools must be a list of objects with a name")
    parameters = function.get("parameters") or {}
    described = _described(entry)
    if not isinstance(parameters, dict) or not all(isinstance(about, dict) for about in described.values()):
        raise Malformed(f"parameters of {_short(function['name'])} must be an object of objects")
    if parameters and not described:
        parameters = {**parameters, "properties": {}}
    return tool(function["name"], str(function.get("description") or ""), parameters)


def _function(entry: Any) -> dict[str, Any]:
    """A tool without the wrapper {"type": "function", "function": ...}, {} where there is none."""
    function = entry.get("function") or entry if isinstance(entry, dict) else None
    return function if isinstance(function, dict) else {}


def _described(entry: Any) -> dict[str, Any]:
    """The arguments of a tool, each with what is said about it."""
    parameters = _function(entry).get("parameters")
    if not isinstance(parameters, dict):
        return {}
    if parameters.get("type") == "object" and parameters.get("properties") is None:
        return {}  # a schema, and not bare arguments
    return parameters["properties"] if is_schema(parameters) else parameters


def _answer(entry: Any) -> Call:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise Malformed("answers must be a list of objects with name and arguments")
    if not isinstance(entry.get("arguments"), dict):
        raise Malformed(f"arguments of {_short(entry['name'])} must be an object")
    return {"name": entry["name"], "arguments": entry["arguments"]}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _list(value: Any, what: str) -> list[Any]:
    """A list, or the JSON of one in a string, as the published file has it."""
    value = _read(value, what) if isinstance(value, str) else value
    if not isinstance(value, list):
        raise Malformed(f"{what} must be a list, got {_kind(value)}")
    return value


def _read(text: str, what: str) -> Any:
    try:
        return read_json(text)
    except Unreadable as fault:
        raise Malformed(f"{what} {_WHY[fault.reason]}") from None


def _text(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise Malformed("is not UTF-8") from None


def _short(name: str) -> str:
    return repr(name if len(name) <= 80 else f"{name[:77]}...")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


# --- the file -----------------------------------------------------------------------------------------------


def _raw_records(file: BinaryIO, path: Path) -> Iterator[tuple[str, int, bytes]]:
    """(where, byte offset, bytes) of each record, whether it is one or not."""
    start = 3 if file.read(3) == codecs.BOM_UTF8 else 0
    file.seek(start)
    first = b""
    while not first.strip() and (chunk := file.read(CHUNK)):
        first = chunk
    if not first.strip():
        raise ValueError(f"data_path must hold records, got the empty file {path}")
    file.seek(start)
    yield from _array(file, start, path) if first.lstrip()[:1] == b"[" else _lines(file, start)


def _lines(file: BinaryIO, offset: int) -> Iterator[tuple[str, int, bytes]]:
    number = 0
    while raw := file.readline(MAX_RECORD + 1):
        number += 1
        length, last = len(raw), raw
        while len(raw) > MAX_RECORD and last[-1:] != b"\n" and (last := file.readline(CHUNK)):
            length += len(last)  # passed over in pieces: the line is too long to be used
        if raw.strip():
            yield f"line {number}", offset, raw
        offset += length


def _array(file: BinaryIO, offset: int, path: Path) -> Iterator[tuple[str, int, bytes]]:
    window = _Window(file, offset, path)
    window.expect("[")
    number = 0
    while True:
        number += 1
        if number == 1 and window.peek() == "]":
            break
        window.peek()  # white space is not part of the record
        where, begin = f"record {number} (line {window.line})", window.offset
        yield where, begin, window.value(where)
        if window.peek() == "]":
            break
        window.expect(",")
    window.expect("]")
    if window.peek():
        raise ValueError(f"{path}: more follows the end of the array, in line {window.line}")


class _Window:
    """A piece of a UTF-8 file that moves forward, with its place in bytes and lines."""

    def __init__(self, file: BinaryIO, offset: int, path: Path) -> None:
        self._file, self._path = file, path
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text, self._at = "", 0
        self.offset, self.line = offset, 1

    def peek(self) -> str:
        """The next character that is no white space, "" at the end of the file."""
        while True:
            rest = self._at
            while rest < len(self._text) and self._text[rest] in " \t\r\n":
                rest += 1
            self._move(rest)
            if rest < len(self._text):
                return self._text[rest]
            if not self._more(CHUNK):
                return ""

    def expect(self, mark: str) -> None:
        character = self.peek()
        if character != mark:
            got = repr(character) if character else "the end of the file: it is truncated"
            raise ValueError(f"{self._path} must go on with {mark!r} in line {self.line}, got {got}")
        self._move(self._at + 1)

    def value(self, where: str) -> bytes:
        """The bytes of the JSON value that begins here."""
        while True:
            try:
                _, end = BOUNDS.raw_decode(self._text, self._at)
                # A number at the end of the window may continue; any other value is complete.
                if end < len(self._text) or not self._more(CHUNK):
                    break
            except RecursionError:
                raise ValueError(f"{self._path}: {where} is nested too deep") from None
            except ValueError:
                # The window ends inside the value, or the value is no JSON: try twice as much text.
                size = len(self._text) - self._at
                if size > MAX_RECORD or not self._more(max(CHUNK, size)):
                    raise ValueError(
                        f"{self._path}: {where} is no JSON, is truncated or is longer than {MAX_RECORD} "
                        "characters; what follows it cannot be read"
                    ) from None
        raw = self._text[self._at : end].encode()
        self._move(end)
        return raw

    def _move(self, to: int) -> None:
        passed = self._text[self._at : to]
        self.offset += len(passed.encode())
        self.line += passed.count("\n")
        self._at = to

    def _more(self, size: int) -> bool:
        chunk = self._file.read(size)
        try:
            text = self._decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError:
            raise ValueError(f"{self._path} is not UTF-8, after line {self.line}") from None
        self._text, self._at = self._text[self._at :] + text, 0
        return bool(chunk)
