"""Countdown: combine all the given numbers, each once, into an expression that equals the target.

The paper (arXiv 2505.24726) plays it with 3 or 4 numbers up to 100 and + - * /; the demo with 3 numbers up
to 12 and + and -, which a 135M model can learn in minutes. Problems are generated, so nothing is downloaded,
or read from a file such as Countdown-Tasks-3to4. Left out: partial credit for the right format, and problems
whose only solutions pass through negative numbers or fractions (the verifier accepts such answers all the
same).
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grpo.tasks import (
    RIGHT_ATTEMPTS,
    SPLITS,
    Example,
    Transcript,
    Verdict,
    after_thought,
    check_split,
    register,
    user_path,
    warn,
)
from grpo.tasks.expression import contains, evaluate, literals, parse, reachable, worked
from grpo.tasks.function_calling.data import Skipped
from grpo.tasks.function_calling.json_calls import Unreadable, read_json
from grpo.tasks.rows import Malformed, Row, read_file, require, value_of

MAX_ANSWER_CHARACTERS = 200
_SIGNS = str.maketrans({"×": "*", "÷": "/", "−": "-", "–": "-"})
_ALLOWED = frozenset("0123456789+-*/()")
_DIGITS = re.compile(r"[0-9]{1,6}")
_TYPED = re.compile(r"\W*numbers\W+((?:[0-9]{1,6}[\s,.;]+){1,6})target\W+([0-9]{1,6})\W*", re.IGNORECASE)

HELDOUT_SHARE, VALIDATION_SHARE = 0.2, 0.1
WANTED_HELDOUT, MAX_HELDOUT_SHARE = 512, 0.7  # a small space gives more of itself to held-out problems
ENUMERABLE = 2_000  # number sets; up to this many, all problems are listed, above it they are drawn
MAX_NUMBERS = 6
PATIENCE = 10_000  # draws without a new problem after which a space counts as exhausted

Problem = tuple[tuple[int, ...], int]  # sorted numbers, target


def verify(text: str, numbers: list[int], target: int) -> Verdict:
    """Judges the expression in the last <answer>...</answer> of a text, thoughts aside (`after_thought`).

    The checks run in this order, the first that fails names the verdict: no_answer, empty, too_long (over
    200 characters), illegal_char, syntax, wrong_numbers (not exactly `numbers`, each once), div_zero,
    wrong_value. Arithmetic is exact, fractions in between are allowed. Never raises; linear in the text.
    """
    text = after_thought(text)
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    if start < 0:
        return Verdict("no_answer")
    answer = text[start + len("<answer>") : end].strip()
    if not answer:
        return Verdict("empty")
    if len(answer) > MAX_ANSWER_CHARACTERS:
        return Verdict("too_long")
    answer = answer.translate(_SIGNS)
    if not all(character in _ALLOWED or character.isspace() for character in answer):
        return Verdict("illegal_char")
    postfix = parse(answer)
    if postfix is None:
        return Verdict("syntax")
    if sorted(literals(postfix)) != sorted(numbers):
        return Verdict("wrong_numbers")
    value = evaluate(postfix)
    if value is None:
        return Verdict("div_zero")
    return Verdict("ok" if value == target else "wrong_value")


@register("countdown")
class Countdown:
    """Generated Countdown problems in three disjoint splits.

    Args:
        numbers: how many numbers a problem has: 3, or a range "3-4".
        low: smallest number.
        high: largest number.
        operators: any of "+-*/".
        seed: order of the problems within each split. Which split a problem is in never depends on it.
        reflection_stop: in transcripts, share of reflections that give up after one combination that failed.
        max_tries: in transcripts, most combinations that a reflection tries.
        max_target: largest target; None for no limit. (With * four numbers up to 100 make eight digits.)
        path: file with the columns nums and target (grpo/tasks/rows.py), to take the problems from.
            Its problems must be solvable with `operators`; numbers, low and high are not used.
    """

    name = "countdown"
    format_reasons = frozenset({"no_answer", "empty", "too_long", "illegal_char", "syntax"})
    reflection_instruction = (
        "You tried solving the problem and got the wrong answer. Reflect on what went wrong and write a "
        "short explanation that will help you do better next time."
    )

    def __init__(
        self,
        numbers: int | str = 3,
        low: int = 1,
        high: int = 10,
        operators: str = "+-",
        seed: int = 0,
        reflection_stop: float = 0.5,
        max_tries: int = 6,
        max_target: int | None = None,
        path: str | None = None,
    ) -> None:
        self.counts = _parse_counts(numbers)
        if not 0 <= low <= high:
            raise ValueError(f"low and high must satisfy 0 <= low <= high, got {low} and {high}")
        if not operators or set(operators) - set("+-*/") or len(set(operators)) < len(operators):
            raise ValueError(f'operators must be different characters of "+-*/", got {operators!r}')
        if not 0.0 <= reflection_stop <= 1.0:
            raise ValueError(f"reflection_stop must be a probability, got {reflection_stop}")
        if max_tries < 1:
            raise ValueError(f"max_tries must be at least 1, got {max_tries}")
        if max_target is not None and max_target < 1:
            raise ValueError(f"max_target must be at least 1 or None, got {max_target}")
        self.system: str | None = _rules(operators)
        self.low, self.high, self.operators, self.seed = low, high, operators, seed
        self.reflection_stop, self.max_tries, self.max_target = reflection_stop, max_tries, max_target
        self._advice = "raise high or numbers, or add operators"
        self._splits: dict[str, list[Example]] = {split: [] for split in SPLITS}
        small = sum(math.comb(high - low + count, count) for count in self.counts) <= ENUMERABLE
        if path is None:
            self._source = self._listed() if small else self._drawn()
        else:
            self._source = self._from_file(user_path(path))

    def examples(self, split: str, count: int, offset: int = 0) -> list[Example]:
        """Examples `offset` to `offset + count` of train, validation or heldout.

        A problem is a target and numbers in any order. No problem is in two splits, and none comes twice,
        with one exception: in a small space, train continues with its problems in other orders of the
        numbers.

        Raises:
            ValueError: no such split, or fewer examples exist.
        """
        check_split(split)
        if count < 0 or offset < 0:
            raise ValueError(f"count and offset must be at least 0, got {count} and {offset}")
        ready = self._splits[split]
        while len(ready) < offset + count:
            # All splits fill from one stream, so their content does not depend on the order of the requests.
            produced = next(self._source, None)
            if produced is None:
                raise ValueError(
                    f"split {split!r} has {len(ready)} examples, but offset {offset} plus count {count} were "
                    f"asked for; {self._advice}"
                )
            self._splits[produced[0]].append(produced[1])
        return ready[offset : offset + count]

    def verify(self, example: Example, text: str) -> Verdict:
        return verify(text, example.data["numbers"], example.data["target"])

    def typed(self, text: str) -> Example | None:
        """`Numbers: 10, 4, 10. Target: 24.`, in any case, and with or without punctuation."""
        match = _TYPED.fullmatch(text)
        if match is None:
            return None
        return _shown(tuple(int(number) for number in _DIGITS.findall(match[1])), int(match[2]))

    def leaks(self, example: Example, reflection: str) -> bool:
        """Whether a part of the reflection is an expression of exactly the numbers that equals the target.

        Thoughts count: the retry's context has all sampled ids of the reflection.
        """
        return contains(reflection.translate(_SIGNS), example.data["numbers"], example.data["target"])

    def transcript(self, example: Example, rng: random.Random, attempt: str | None = None) -> Transcript:
        """A conversation whose reflection tries other combinations and checks each: "3 + 8 - 1 = 11 - 1 = 10,
        not 12."

        It computes one operation at a time, because a small model cannot add three numbers at once. A share
        of the reflections (reflection_stop) give up early. The others continue, without repetition, until a
        combination works or max_tries are made. So RL starts with both behaviours and can choose. The retry
        is the last combination tried, right or wrong. If it were a guess, luck would reward reflections that
        found nothing.

        `attempt`: the wrong answer to start from.
        """
        target: int = example.data["target"]
        terms = reachable(tuple(example.data["numbers"]), self.operators)
        # With * almost all values are far from the target; no one would try them.
        near = sorted((value for value in terms if value != target), key=lambda value: abs(value - target))
        near = near[: 4 * self.max_tries]
        if attempt is None and (not near or rng.random() < RIGHT_ATTEMPTS):
            return Transcript(attempt=_answer(terms[target].text))
        failed = rng.choice([value for value in near if attempt in (None, _answer(terms[value].text))])
        others = [value for value in near if value != failed]
        candidates = rng.sample(others, min(len(others), self.max_tries - 1)) + [target]
        rng.shuffle(candidates)
        tries = [failed] if self.max_tries > 1 and rng.random() < 0.5 else []
        gives_up = rng.random() < self.reflection_stop
        for value in candidates:
            tries.append(value)
            if value == target or len(tries) == self.max_tries or gives_up:
                break
        checks = [
            f"{worked(terms[value].text)}, {'that works' if value == target else f'not {target}'}."
            for value in tries
        ]
        return Transcript(_answer(terms[failed].text), " ".join(checks), _answer(terms[tries[-1]].text))

    def _targets(self, numbers: tuple[int, ...]) -> list[int]:
        limit = self.max_target or math.inf
        return sorted(value for value in reachable(numbers, self.operators) if 1 <= value <= limit)

    def _listed(self) -> Iterator[tuple[str, Example]]:
        """All problems of a small space; WANTED_HELDOUT are held out if that leaves some to train on."""
        span = range(self.low, self.high + 1)
        sets = (numbers for n in self.counts for numbers in itertools.combinations_with_replacement(span, n))
        problems: list[Problem] = [(numbers, target) for numbers in sets for target in self._targets(numbers)]
        problems.sort(key=_fraction)
        size = len(problems)
        heldout = round(max(HELDOUT_SHARE * size, min(WANTED_HELDOUT, MAX_HELDOUT_SHARE * size)))
        validation = heldout + round(VALIDATION_SHARE * size)
        parts = dict(
            heldout=problems[:heldout], validation=problems[heldout:validation], train=problems[validation:]
        )
        rng = random.Random(f"countdown order {self.seed}")
        for split, part in parts.items():
            rng.shuffle(part)
            yield from ((split, _example(problem)) for problem in part)
        for turn in range(1, math.factorial(max(self.counts))):
            for problem in parts["train"]:
                if turn < len(_orders(problem)):
                    yield "train", _example(problem, turn)

    def _drawn(self) -> Iterator[tuple[str, Example]]:
        """Random problems of a large space, each once; ends when no new ones turn up."""
        rng = random.Random(f"countdown draw {self.seed}")
        seen: set[Problem] = set()
        misses = 0
        while misses < PATIENCE:
            count = rng.choice(self.counts)
            numbers = tuple(sorted(rng.randint(self.low, self.high) for _ in range(count)))
            targets = self._targets(numbers)
            problem = (numbers, rng.choice(targets)) if targets else None
            if problem is None or problem in seen:
                misses += 1
                continue
            misses = 0
            seen.add(problem)
            yield _split(problem), _example(problem)

    def _from_file(self, path: Path) -> Iterator[tuple[str, Example]]:
        """The solvable problems of a file. A problem is in the split in which `_drawn` would have it."""
        skipped = Skipped()
        rows = read_file(path, skipped)
        nums = "numbers" if rows and "numbers" in rows[0].values else "nums"
        for column in (nums, "target") if rows else ():
            require(column, rows, column)
        problems: dict[Problem, None] = {}
        for row in rows:
            try:
                problems[_problem(row, nums)] = None
            except Malformed as error:
                skipped.add(row.where, str(error))
        if not problems:
            raise ValueError(f"{path} has no usable row: {skipped}")
        if skipped.count:
            seen = skipped.count + len(problems)
            warn(f"{path}: skipped {skipped.count} of {seen} rows: {skipped}")
        return self._solvable(path, list(problems))

    def _solvable(self, path: Path, problems: list[Problem]) -> Iterator[tuple[str, Example]]:
        """Looks for a solution as a problem is asked for: for all of them it would take an hour."""
        random.Random(f"countdown order {self.seed}").shuffle(problems)
        unsolvable = 0
        for numbers, target in problems:
            if target in reachable(numbers, self.operators) and target <= (self.max_target or math.inf):
                yield _split((numbers, target)), _example((numbers, target))
            else:
                unsolvable += 1
        self._advice = (
            f"{path} has {len(problems)} problems; {unsolvable} have no solution in whole numbers with "
            f"operators {self.operators!r}, or a target above max_target"
        )


def _rules(operators: str) -> str:
    """The system message. It is part of every prompt, so it is short."""
    signs = f"{', '.join(operators[:-1])} and {operators[-1]}" if len(operators) > 1 else operators
    sample = f"3 {operators[0]} 5 {operators[1 % len(operators)]} 2"
    return (
        f"Combine all the numbers, each once, with {signs} to reach the target. "
        f"Answer as <answer>{sample}</answer>."
    )


def _parse_counts(numbers: int | str) -> range:
    """3 or "3" -> range(3, 4); "3-4" -> range(3, 5)."""
    first, _, last = str(numbers).partition("-")
    last = last or first
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last) <= MAX_NUMBERS):
        raise ValueError(
            f'numbers must be a count from 1 to {MAX_NUMBERS} or a range such as "3-4", got {numbers!r}'
        )
    return range(int(first), int(last) + 1)


def _digest(problem: Problem) -> bytes:
    return hashlib.sha256(repr(problem).encode()).digest()


def _fraction(problem: Problem) -> float:
    """Where the problem lies in [0, 1): the same in every setting, so it decides the split."""
    return int.from_bytes(_digest(problem)[:6], "big") / 2.0**48


def _split(problem: Problem) -> str:
    place = _fraction(problem)
    if place < HELDOUT_SHARE:
        return "heldout"
    return "validation" if place < HELDOUT_SHARE + VALIDATION_SHARE else "train"


def _problem(row: Row, nums: str) -> Problem:
    """Raises Malformed."""
    numbers, target = (_read(value_of(row, name)) for name in (nums, "target"))
    if not isinstance(numbers, list) or not 1 <= len(numbers) <= MAX_NUMBERS:
        raise Malformed(f"{nums} must be 1 to {MAX_NUMBERS} numbers, got {numbers!r}")
    for number in [*numbers, target]:
        if type(number) is not int or not 0 <= number < 10**6:
            raise Malformed(f"{nums} and target must be whole numbers from 0, got {number!r}")
    return tuple(sorted(numbers)), target


def _read(value: Any) -> Any:
    """CSV has text: "[1, 2, 3]"."""
    if isinstance(value, str):
        try:
            return read_json(value)
        except Unreadable:
            raise Malformed(f"must have numbers, got {value!r}") from None
    return value


def _orders(problem: Problem) -> list[tuple[int, ...]]:
    """The different orders in which the numbers can be shown, in an order of the problem's own."""
    orders = sorted(set(itertools.permutations(problem[0])))
    random.Random(_digest(problem)).shuffle(orders)
    return orders


def _example(problem: Problem, turn: int = 0) -> Example:
    return _shown(_orders(problem)[turn], problem[1])


def _shown(numbers: tuple[int, ...], target: int) -> Example:
    """The example that shows the numbers in this order."""
    return Example(
        id=f"countdown:{','.join(map(str, numbers))}={target}",
        prompt=f"Numbers: {', '.join(map(str, numbers))}. Target: {target}.",
        data={"numbers": list(numbers), "target": target},
    )


def _answer(expression: str) -> str:
    return f"<answer>{expression}</answer>"
