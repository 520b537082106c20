"""What a task must keep to: probed before the first token is sampled, and checked at every verdict.

A task is often somebody's own file. Without these checks a mistake in it shows after an hour of sampling, as
an error deep in the trainer, or never: a key that JSON changes gives verdicts on altered data. Each message
names the task, the method, what was expected, what came, and the example.

Left out: whether verdicts are right, whether the splits overlap under other ids, and the time of `verify`.
"""

from __future__ import annotations

import copy
import json
import random
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from grpo.tasks import (
    CheckedTask,
    Example,
    TakesTools,
    Task,
    TolerantTask,
    Transcript,
    Verdict,
    opening,
    raised,
)

# An empty answer, and one with what parsers stumble over.
PROBES = ("", 'probe <answer>1 +</answer> {"a": [1, \x00 \u4e2d\U0001f600')


# --- at every call ------------------------------------------------------------------------------------------


def verdict(task: Task, example: Example, text: str) -> Verdict:
    """`task.verify(example, text)`. Raises ValueError if that is no Verdict."""
    return _as_verdict(task, "verify", example, task.verify(example, text))


def tolerant_verdict(task: TolerantTask, example: Example, text: str) -> Verdict:
    """`task.tolerant(example, text)`. Raises ValueError if that is no Verdict."""
    return _as_verdict(task, "tolerant", example, task.tolerant(example, text))


def leaks(task: Task, example: Example, reflection: str) -> bool:
    """`task.leaks(example, reflection)`. Raises ValueError if that is neither True nor False."""
    return _as_bool(task, example, task.leaks(example, reflection))


def _as_verdict(task: Task, method: str, example: Example, value: Any) -> Verdict:
    if not isinstance(value, Verdict):
        raise _fault(task, method, "must return a Verdict, such as Verdict('ok')", value, example)
    return value


def _as_bool(task: Task, example: Example, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _fault(task, "leaks", "must return True or False", value, example)
    return value


# --- before a run -------------------------------------------------------------------------------------------


def check_task(
    task: Task, needs: Mapping[str, Mapping[str, int]], chat: TakesTools, *, transcripts: bool = False
) -> list[Example]:
    """Checks all that a run will ask of a task; returns all the examples that it will ask for.

    Args:
        needs: per split, how many examples each setting asks for. They follow each other in the split.
        chat: decides what `opening` is asked for.
        transcripts: there is a warm start.
    Raises:
        ValueError: one line about the first fault.
    """
    _check_attributes(task)
    examples: list[Example] = []
    split_of: dict[str, str] = {}
    for split, need in needs.items():
        if not need:
            continue
        part = _asked(task, split, sum(need.values()), 0, need)
        _check_examples(task, split, part, sum(need.values()))
        for example in part:
            if example.id in split_of:
                splits = " and ".join(dict.fromkeys([split_of[example.id], split]))
                got = f"one twice in {splits}"
                raise _fault(
                    task, "examples", "must give each example an id of its own", example=example, got=got
                )
            split_of[example.id] = split
            _check_opening(task, example, chat)
        _check_repeatable(task, split, part, need)
        for example in (part[0], part[-1]):
            _check_methods(task, example, transcripts)
        examples += part
    if isinstance(task, CheckedTask):
        with _calling(task, "check"):
            task.check(examples)
    return examples


def _asked(task: Task, split: str, count: int, offset: int, need: Mapping[str, int]) -> Any:
    try:
        return task.examples(split, count, offset)
    except (Exception, SystemExit) as error:
        reason = raised(error, f"task {task.name}: examples")
        if isinstance(error, ValueError):  # as a task says that it has fewer
            settings = " and ".join(f"{name}={number}" for name, number in need.items())
            reason = f"{settings} must not ask for more than the task has: {reason}"
        raise ValueError(reason) from error


def _check_attributes(task: Task) -> None:
    for name in ("name", "system", "reflection_instruction"):
        value = getattr(task, name)
        if not (_is_text(value) or (name == "system" and value is None)):
            raise _fault(task, name, f"must be {TEXT}", value)
    reasons: Any = getattr(task, "format_reasons", frozenset())
    if not isinstance(reasons, set | frozenset | list | tuple) or not all(map(_is_text, reasons)):
        raise _fault(task, "format_reasons", "must be a set of strings", reasons)


def _check_examples(task: Task, split: str, examples: Any, count: int) -> None:
    if not isinstance(examples, list | tuple):
        raise _fault(task, "examples", "must return a list of Example", examples)
    if len(examples) != count:
        expected = f"must return the {count} examples of {split} that it is asked for, or raise ValueError"
        raise _fault(task, "examples", expected, len(examples))
    for example in examples:
        if not isinstance(example, Example):
            raise _fault(task, "examples", "must return a list of Example", example)
        for name in ("id", "prompt"):
            if not _is_text(value := getattr(example, name)):
                raise _fault(task, "examples", f"must give an example's {name} as {TEXT}", value, example)
        if not isinstance(example.data, dict):
            raise _fault(task, "examples", "must give an example's data as a dict", example.data, example)
        if change := json_change(example.data, "data"):
            raise _fault(task, "examples", "must give data that JSON keeps", example=example, got=change)


def _check_repeatable(task: Task, split: str, examples: Sequence[Example], need: Mapping[str, int]) -> None:
    """Asks again as the stages will: each for its own examples, after those of the stages before it."""
    offset = 0
    for count in need.values():
        again = _asked(task, split, count, offset, need)
        part = list(examples[offset : offset + count])
        if not isinstance(again, list | tuple) or list(again) != part:
            pairs = zip(again, part, strict=False) if isinstance(again, list | tuple) else ()
            other = next((pair for pair in pairs if pair[0] != pair[1]), (again, part[0]))
            expected = f"must return the same examples whenever {split} is asked for, from offset {offset}"
            raise _fault(task, "examples", expected, other[0], other[1])
        offset += count


def _check_opening(task: Task, example: Example, chat: TakesTools) -> None:
    with _calling(task, "opening", example):
        begin = opening(task, example, chat)
    messages, tools = begin["messages"], begin.get("tools")
    form = f"must return messages, each a dict with role and content as {TEXT}, the last one by the user"
    if not isinstance(messages, list) or not messages:
        raise _fault(task, "opening", form, messages, example)
    for message in messages:
        if not (
            isinstance(message, dict) and _is_text(message.get("role")) and _is_text(message.get("content"))
        ):
            raise _fault(task, "opening", form, message, example)
    if messages[-1]["role"] != "user":
        raise _fault(task, "opening", form, messages[-1], example)
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise _fault(task, "opening", "must return tools as a list of dicts, or None", tools, example)
    if tools is not None and not chat.takes_tools:
        raise _fault(task, "opening", "must return no tools if with_tools is False", tools, example)


def _check_methods(task: Task, example: Example, transcripts: bool) -> None:
    """Calls the methods on the probes and looks at what they return."""
    before = copy.deepcopy(example)
    for text in PROBES:
        with _calling(task, "verify", example):
            judged = task.verify(example, text)
        _as_verdict(task, "verify", example, judged)
        with _calling(task, "leaks", example):
            leak = task.leaks(example, text)
        _as_bool(task, example, leak)
        if isinstance(task, TolerantTask):
            with _calling(task, "tolerant", example):
                judged = task.tolerant(example, text)
            _as_verdict(task, "tolerant", example, judged)
    if transcripts:
        _check_transcripts(task, example)
    if example != before:
        raise _fault(task, "verify", "and the other methods must not change the example", example, before)


def _check_transcripts(task: Any, example: Example) -> None:
    """One transcript and, after a wrong attempt, another reflection on it."""
    rng = random.Random(0)
    attempt = None
    for _ in range(2):
        with _calling(task, "transcript", example):
            transcript = task.transcript(example, rng, *([] if attempt is None else [attempt]))
        if not isinstance(transcript, Transcript):
            raise _fault(task, "transcript", "must return a Transcript", transcript, example)
        for name in ("attempt", "reflection", "retry"):
            part = getattr(transcript, name)
            if not (_is_text(part) or (part is None and name != "attempt")):
                raise _fault(task, "transcript", f"must give its {name} as {TEXT}", part, example)
        if transcript.reflection is None:
            break
        attempt = transcript.attempt


# --- what JSON keeps ----------------------------------------------------------------------------------------


def json_change(value: Any, name: str) -> str | None:
    """What JSON would change in a value, in words that begin with `name`; None if it keeps all of it."""
    try:
        stored = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        return f"{name} = {_short(value)} ({error})"
    return _difference(value, stored, name)


def _difference(value: Any, stored: Any, name: str) -> str | None:
    if type(value) is not type(stored):  # True == 1 == 1.0
        return f"{name} = {_short(value)}, of type {type(value).__name__}"
    if isinstance(value, str) and value != stored:
        return f"{name} = {_short(value)}, a pair of lone surrogates"
    if isinstance(value, dict):
        for key, item in value.items():
            if type(key) is not str or key not in stored:
                return f"{name} with the key {_short(key)}, of type {type(key).__name__}"
            if change := _difference(item, stored[key], f"{name}[{_short(key)}]"):
                return change
    if isinstance(value, list):
        for index, pair in enumerate(zip(value, stored, strict=True)):
            if change := _difference(*pair, f"{name}[{index}]"):
                return change
    return None


# --- messages -----------------------------------------------------------------------------------------------

TEXT = "a string without lone surrogates"


def _is_text(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # no tokenizer can take it
        return False
    return True


@contextmanager
def _calling(task: Task, method: str, example: Example | None = None) -> Iterator[None]:
    """Turns what a method raises into one line with the place in the task's file."""
    try:
        yield
    except (Exception, SystemExit) as error:
        reason = raised(error, f"task {task.name}: {method}")
        raise ValueError(f"{reason}{_of(example)}") from error


def _fault(
    task: Task, method: str, expected: str, value: Any = None, example: Example | None = None, got: str = ""
) -> ValueError:
    return ValueError(f"task {task.name}: {method} {expected}, got {got or _short(value)}{_of(example)}")


def _of(example: Example | None) -> str:
    return "" if example is None else f" for example {_short(example.id)}"


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 60


def _short(value: Any) -> str:
    try:
        return _REPR.repr(value)
    except Exception:  # a class of the task may have a broken __repr__
        return f"an object of type {type(value).__name__}"
