"""Verifiers by name, for data that bring their own answers (grpo/tasks/dataset.py).

    exact     the answer, white space aside
    number    the last number, as an exact fraction: 1,000 is 1000, and 0.5 is 1/2; 3,5 and 12:30 are none
    choice    the last letter that stands alone
    json      the value, in any layout and order of keys
    regex     the answer column has a regular expression, which the whole answer must match
    math      LaTeX, fractions, sets, intervals, equations: the package math-verify compares them
    function:package.module:name, function:path/to/file.py:name
              a reward function with TRL's signature: `completions, **columns -> list[float]`

The answer is what is inside the last <answer>...</answer>, else the last \\boxed{...}, else the whole text.
Only what follows the last </think> is judged. regex, math and functions run in a process of their own
(worker.py) with a time limit. Left out: units, percentages, spelling, and judging several answers at once.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any, Protocol

from grpo.tasks import TaskError, Verdict, after_thought, load_object, nearest
from grpo.tasks.function_calling.json_calls import Unreadable, read_json
from grpo.tasks.function_calling.matching import equal
from grpo.tasks.worker import Worker, WorkerError, described

JUDGED = 20_000  # last characters of an answer that are judged
SECONDS = 10.0  # limit for regex and math
FUNCTION_SECONDS = 60.0  # limit for functions
MEMORY_GB = 4.0  # of the process for regex and math: sympy expands 10**10**10 otherwise

Data = dict[str, Any]  # of an example: "gold", and for functions "columns", "prompt" and "where"


class Verifier(Protocol):
    """Judges answers to the examples of a data set."""

    format_reasons: frozenset[str]

    def problem(self, gold: Any) -> str | None:
        """Why this value of the answer column cannot be used; None if it can."""
        ...

    def right_answer(self, gold: Any) -> str | None:
        """A text that is right; None if it is not known."""
        ...

    def verify(self, data: Data, text: str) -> Verdict: ...

    def states(self, data: Data, text: str) -> bool:
        """Whether a reflection contains the answer."""
        ...


def verifier(
    name: str | Sequence[str],
    *,
    weights: Sequence[float] | None = None,
    seconds: float | None = None,
    keep_thoughts: bool = False,
    columns: Sequence[str] = (),
) -> Verifier:
    """The verifier of that name, or of those functions.

    Args:
        name: see the head of this file; several functions as a list.
        weights: of the functions; default: 1 each.
        seconds: limit of one verdict, for regex, math and functions.
        keep_thoughts: functions also get what precedes the last </think>.
        columns: of the data; functions get them.
    Raises:
        ValueError: an unknown name, an extra that is not installed, or a function that cannot be used.
    """
    names = [name] if isinstance(name, str) else list(name)
    functions = [each.removeprefix("function:") for each in names if each.startswith("function:")]
    if functions and len(functions) == len(names):
        return Functions(functions, weights, seconds or FUNCTION_SECONDS, keep_thoughts, columns)
    known = [*VERIFIERS, "function:package.module:name", "function:FILE.py:name"]
    if len(names) != 1 or names[0] not in VERIFIERS:
        wrong = next((each for each in names if each not in VERIFIERS), "+".join(names))
        raise ValueError(
            f"verifier must be one of {', '.join(known)}, got {wrong!r}{nearest(wrong, VERIFIERS)}"
            + ("; only functions can be combined" if len(names) > 1 else "")
        )
    if weights is not None or keep_thoughts:
        raise ValueError(f"weights and keep_thoughts belong to functions, got verifier {names[0]}")
    return VERIFIERS[names[0]](seconds or SECONDS)


def final_answer(text: str) -> str:
    """What is inside the last <answer>...</answer>, else inside the last \\boxed{...}, else all of it."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    if start >= 0:
        return text[start + len("<answer>") : end].strip()
    boxed = text.rfind("\\boxed{")
    return _braced(text, boxed + len("\\boxed{")) if boxed >= 0 else text.strip()


def _braced(text: str, start: int) -> str:
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end].strip()
    return text[start:].strip()


# --- verifiers with an answer column ------------------------------------------------------------------------


class Exact:
    """The base of all: compares what `read` makes of gold and answer. A list of golds accepts any of them."""

    format_reasons = frozenset({"no_answer", "empty"})

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def read(self, text: str) -> Any:
        """The value of an answer, or None if the text has none."""
        return " ".join(text.split())

    def read_gold(self, gold: Any) -> Any:
        return self.read(_text(gold))

    def same(self, gold: Any, value: Any) -> bool:
        return bool(gold == value)

    def problem(self, gold: Any) -> str | None:
        for each in _accepted(gold):
            if isinstance(each, dict) or self.read_gold(each) in (None, ""):
                return f"{self.wanted}, got {_short(each)}"
        return None if _accepted(gold) else "must not be empty"

    wanted = "must not be empty"

    def right_answer(self, gold: Any) -> str | None:
        return _text(_accepted(gold)[0])

    def verify(self, data: Data, text: str) -> Verdict:
        answer = final_answer(after_thought(text)[-JUDGED:])
        if not answer:
            return _nothing(text)
        return self.compare(_accepted(data["gold"]), answer)

    def compare(self, golds: list[Any], answer: str) -> Verdict:
        value = self.read(answer)
        if value is None:
            return Verdict("no_answer")
        right = any(self.same(self.read_gold(gold), value) for gold in golds)
        return Verdict("ok" if right else "wrong_value")

    def states(self, data: Data, text: str) -> bool:
        plain = " ".join(text.split())
        return any(self.read(_text(gold)) in plain for gold in _accepted(data["gold"]))


class Number(Exact):
    """The last number. If it is the end of something longer, such as 3,5 or 12:30, there is no number.

    3,5 may be a list, or 3.5 with a decimal comma: whichever is meant, 5 must not be right.
    """

    wanted = "must contain a number"

    def read(self, text: str) -> Fraction | None:
        last = _last(_NUMBER.finditer(text))
        return None if last is None or _is_end(text, last) else _fraction(last[0])

    def read_gold(self, gold: Any) -> Fraction | None:
        return self.read(_after_hashes(_text(gold)))

    def problem(self, gold: Any) -> str | None:
        for each in _accepted(gold):
            text = _after_hashes(_text(each))
            if (last := _last(_NUMBER.finditer(text))) is not None and _is_end(text, last):
                return f"must end in one number, got {_short(text)}, of which only {last[0]} would count"
        return super().problem(gold)

    def states(self, data: Data, text: str) -> bool:
        golds = [self.read_gold(gold) for gold in _accepted(data["gold"])]
        return any(_fraction(number) in golds for number in _NUMBER.findall(text))


class Choice(Exact):
    wanted = "must be a letter, or a number (not text): the index of a choice from 0"

    def read(self, text: str) -> str | None:
        letters = _LETTER.findall(text)
        return letters[-1] if letters else (text.upper() if re.fullmatch("[a-z]", text) else None)

    def read_gold(self, gold: Any) -> str | None:
        if isinstance(gold, int) and not isinstance(gold, bool):
            return chr(ord("A") + gold) if 0 <= gold < 26 else None
        match = re.fullmatch(r"\s*\(?([A-Za-z])[).]?\s*", _text(gold))
        return match[1].upper() if match else None

    def right_answer(self, gold: Any) -> str | None:
        return self.read_gold(_accepted(gold)[0])

    def states(self, data: Data, text: str) -> bool:
        return any(self.read_gold(gold) in _LETTER.findall(text) for gold in _accepted(data["gold"]))


class Json(Exact):
    """A list is one value here, not several accepted ones. So is a string that holds JSON."""

    wanted = "must be JSON"
    format_reasons = frozenset({"no_answer", "empty", "parse"})

    def problem(self, gold: Any) -> str | None:
        try:
            self.read_gold(gold)
        except Unreadable:
            return f"must be JSON, got {_short(gold)}"
        return None

    def read_gold(self, gold: Any) -> Any:
        return read_json(gold) if isinstance(gold, str) else gold

    def right_answer(self, gold: Any) -> str | None:
        return _text(gold)

    def verify(self, data: Data, text: str) -> Verdict:
        answer = final_answer(after_thought(text))
        fences = _FENCE.findall(answer)
        answer = fences[-1] if fences else answer
        if not answer.strip():
            return _nothing(text)
        try:
            value = read_json(answer)
        except Unreadable:
            return Verdict("parse")
        return Verdict("ok" if equal(self.read_gold(data["gold"]), value) else "wrong_value")

    def states(self, data: Data, text: str) -> bool:
        return self.verify(data, text).ok


class Regex(Exact):
    wanted = "must be a regular expression"
    format_reasons = frozenset({"no_answer", "empty", "time_limit", "crash"})

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self._worker = Worker(f"{__name__}:regex_judge", {}, seconds=seconds, memory=MEMORY_GB)

    def problem(self, gold: Any) -> str | None:
        for each in _accepted(gold):
            try:
                re.compile(each)
            except (re.error, TypeError, RecursionError, OverflowError) as error:
                return f"{self.wanted}, got {_short(each)} ({error})"
        return None if _accepted(gold) else "must not be empty"

    def right_answer(self, gold: Any) -> str | None:
        return None

    def compare(self, golds: list[Any], answer: str) -> Verdict:
        try:
            return Verdict(self._worker({"golds": [_text(gold) for gold in golds], "answer": answer}))
        except WorkerError as error:
            return Verdict("crash" if error.kind == "raised" else error.kind)

    def states(self, data: Data, text: str) -> bool:
        return self.verify(data, text).ok


class Math(Regex):
    """A verdict is `time_limit` or `crash` if the comparison takes too long, or too much memory."""

    wanted = "must be LaTeX or a number"

    def __init__(self, seconds: float) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError("verifier math needs its extra: pip install 'reflect-grpo[math]'")
        super().__init__(seconds)
        self._worker = Worker(f"{__name__}:math_judge", {}, seconds=seconds, memory=MEMORY_GB)

    def problem(self, gold: Any) -> str | None:
        return Exact.problem(self, gold)  # whether it can be read, math-verify says later: it is slow

    def read_gold(self, gold: Any) -> str:
        return _text(gold)

    def right_answer(self, gold: Any) -> str | None:
        return f"<answer>{_after_hashes(_text(_accepted(gold)[0])).strip()}</answer>"

    def verify(self, data: Data, text: str) -> Verdict:
        answer = after_thought(text)[-JUDGED:]
        if not answer.strip():
            return _nothing(text)
        return self.compare(_accepted(data["gold"]), answer)


VERIFIERS: dict[str, Callable[[float], Verifier]] = {
    "exact": Exact,
    "number": Number,
    "choice": Choice,
    "json": Json,
    "regex": Regex,
    "math": Math,
}

# Each is linear in the text. A comma is part of a number only between groups of three digits: not in 0,125.
_NUMBER = re.compile(
    r"(?<![\w.])[-−+]?(?:[1-9]\d{0,2}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,3}(?!\d)|\s?/\s?\d+(?!\d|\.\d))?"
    r"|(?<![\w.])[-−+]?\.\d+"
)
# Before the last number, these show that it is the end of something longer: 1,5 12:30 2024-01-05 10^3.
_JOINT = re.compile(r"\d[,:^*×–-]+\Z")
_GAP = re.compile(r"\d[ \u00a0\u202f'’]\Z")  # 1 000 and 1 1/2
# "A dog" and "I think" have words, not choices.
_LETTER = re.compile(r"(?<![A-Za-z0-9'])(?![AI] [a-z])([A-Z])(?![A-Za-z0-9'])")
_FENCE = re.compile(r"```[a-zA-Z]*\n(.*?)```", re.DOTALL)


def _last(matches: Iterable[re.Match[str]]) -> re.Match[str] | None:
    last = None
    for last in matches:  # noqa: B007
        pass
    return last


def _is_end(text: str, number: re.Match[str]) -> bool:
    """Whether the number is only the end of what is written: of 1,5 or 12:30, of 1 000 or 1 1/2."""
    before = text[max(0, number.start() - 20) : number.start()]
    gap = _GAP.search(before) and (re.fullmatch(r"\d{3}", number[0]) or "/" in number[0])
    return bool(gap or _JOINT.search(before))


def _fraction(number: str) -> Fraction | None:
    """Exact; None for a division by zero or for more digits than Python converts."""
    try:
        return Fraction(number.replace(",", "").replace("−", "-").replace(" ", ""))
    except (ValueError, ZeroDivisionError):
        return None


def _after_hashes(gold: str) -> str:
    """GSM8K ends its worked answers with #### and the number."""
    return gold.rpartition("####")[2]


def _nothing(text: str) -> Verdict:
    """Of a blank answer: the text is blank, or it is all thought."""
    return Verdict("no_answer" if text.strip() else "empty")


def _accepted(gold: Any) -> list[Any]:
    return gold if isinstance(gold, list) else [gold]


def _text(gold: Any) -> str:
    if gold is None:
        return ""
    return gold if isinstance(gold, str) else json.dumps(gold, ensure_ascii=False)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# --- in the worker process ----------------------------------------------------------------------------------


def regex_judge() -> Callable[[Any], str]:
    def judge(value: Any) -> str:
        right = any(re.fullmatch(gold, value["answer"], re.DOTALL) for gold in value["golds"])
        return "ok" if right else "wrong_value"

    return judge


def math_judge() -> Callable[[Any], str]:
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns that its own limits are off

    def read(text: str) -> Any:
        # LaTeX is found between dollars; without them "\frac{1}{2}" would be read as 1 or 2.
        if "$" not in text and "\\boxed" not in text:
            return parse(f"${text}$", parsing_timeout=None) or parse(text, parsing_timeout=None)
        return parse(text, parsing_timeout=None)

    def judge(value: Any) -> str:
        tagged = "</answer>" in value["answer"]
        answer = final_answer(value["answer"])
        parsed = read(answer) if tagged else parse(value["answer"], parsing_timeout=None)
        if not parsed:
            return "no_answer"
        golds = [read(_after_hashes(gold).strip()) for gold in value["golds"]]
        right = any(gold and verify(gold, parsed, timeout_seconds=None) for gold in golds)
        return "ok" if right else "wrong_value"

    return judge


# --- functions ----------------------------------------------------------------------------------------------
#
# TRL (1.16) calls a reward function with `prompts`, `completions`, `completion_ids`, `trainer_state`,
# `log_extra`, `log_metric` and every column but "prompt", "completion" and "completion_ids", each a list with
# one value per completion. Here the lists have one value, `log_extra` and `log_metric` do nothing, and there
# are no `completion_ids` and no `trainer_state`: a function that requires them is refused.

NOT_PASSED = ("prompt", "completion", "completion_ids")  # columns that TRL keeps for itself


class Functions:
    """The weighted sum of the users' functions. A score of 1 or more is `ok`, less is `wrong`."""

    format_reasons = frozenset({"no_answer"})

    def __init__(
        self,
        specs: Sequence[str],
        weights: Sequence[float] | None,
        seconds: float,
        keep_thoughts: bool,
        columns: Sequence[str],
    ) -> None:
        weights = [1.0] * len(specs) if weights is None else list(weights)
        if len(weights) != len(specs):
            raise ValueError(f"weights must be as many as functions, {len(specs)}, got {len(weights)}")
        self.specs, self.keep_thoughts, self.columns = list(specs), keep_thoughts, list(columns)
        settings = {"specs": self.specs, "weights": weights, "columns": self.columns}
        self._worker = Worker(f"{__name__}:function_judge", settings, seconds=seconds)
        try:
            self._worker.open()
        except WorkerError as error:
            raise ValueError(f"verifier cannot be loaded: {error}") from None

    def problem(self, gold: Any) -> str | None:
        return None

    def right_answer(self, gold: Any) -> str | None:
        return _text(gold)

    def verify(self, data: Data, text: str) -> Verdict:
        answer = text if self.keep_thoughts else after_thought(text)
        if text.strip() and not answer.strip():
            return Verdict("no_answer")  # not even a function that likes short answers may like this
        value = {"prompt": data["prompt"], "completion": answer, "columns": data["columns"]}
        try:
            score = self._worker(value)
        except WorkerError as error:
            which = "" if error.kind == "raised" else f"verifier {'+'.join(self.specs)} "
            raise TaskError(
                f"{which}{error}, for {data['where']} (columns {', '.join(self.columns)})"
            ) from None
        return Verdict("ok" if score >= 1 else "wrong", score)

    def states(self, data: Data, text: str) -> bool:
        """Only a guess: what a function accepts is not known."""
        gold = data["gold"]
        return gold is not None and _text(gold).strip() != "" and _text(gold).strip() in text


def function_judge(specs: list[str], weights: list[float], columns: list[str]) -> Callable[[Any], float]:
    """In the worker process."""
    functions = [_Function(spec, columns) for spec in specs]

    def judge(value: Any) -> float:
        scores = [(weight, function(value)) for weight, function in zip(weights, functions, strict=True)]
        given = [weight * score for weight, score in scores if score is not None]
        if not given:
            raise TaskError(f"{' and '.join(specs)} returned None, so the answer has no score")
        return math.fsum(given)

    return judge


class _Function:
    """One reward function, as TRL would call it."""

    def __init__(self, spec: str, columns: Sequence[str]) -> None:
        self.spec = spec
        self.function = load_object(spec, "function")
        if not callable(self.function):
            raise ValueError(f"{spec} must be a function, got {_short(self.function)}")
        offered = {"prompts", "completions", "log_extra", "log_metric", *columns} - set(NOT_PASSED)
        parameters = inspect.signature(self.function).parameters.values()
        self.all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        self.names = {parameter.name for parameter in parameters}
        for parameter in parameters:
            required = parameter.default is parameter.empty
            named = parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
            if named and required and parameter.name not in offered:
                raise ValueError(
                    f"{spec} takes {parameter.name!r}, but must take only completions, prompts and columns "
                    f"of the data, which are {', '.join(columns)}{nearest(parameter.name, columns)}"
                )

    def __call__(self, value: Any) -> float | None:
        prompt, completion = value["prompt"], value["completion"]
        if isinstance(prompt, list):  # messages, so the completion is one too
            completion = [{"role": "assistant", "content": completion}]
        columns = value["columns"].items()
        arguments: dict[str, Any] = {name: [item] for name, item in columns if name not in NOT_PASSED}
        arguments |= {
            "prompts": [prompt],
            "completions": [completion],
            "log_extra": lambda *_, **__: None,
            "log_metric": lambda *_, **__: None,
        }
        if not self.all:
            arguments = {name: value for name, value in arguments.items() if name in self.names}
        try:
            scores = self.function(**arguments)
            if inspect.isawaitable(scores):
                scores = asyncio.run(_awaited(scores))
        except Exception as error:
            raise TaskError(f"{self.spec} {described(error)}") from None
        return self._score(scores)

    def _score(self, scores: Any) -> float | None:
        try:
            values = list(scores)
        except TypeError:
            raise TaskError(f"{self.spec} must return a list of numbers, got {_short(scores)}") from None
        if len(values) != 1:
            raise TaskError(f"{self.spec} must return one number per completion, got {len(values)} for 1")
        if values[0] is None:
            return None
        try:
            score = float(values[0])
        except (TypeError, ValueError):
            raise TaskError(f"{self.spec} must return numbers, got {_short(values[0])}") from None
        if not math.isfinite(score):
            raise TaskError(f"{self.spec} must return finite numbers, got {score}")
        return score


async def _awaited(awaitable: Any) -> Any:
    return await awaitable
