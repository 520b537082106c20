"""Arithmetic expressions over + - * / and parentheses: reading them, and finding those that numbers allow.

The reader (`parse`, `evaluate`) judges model output, so it is an operator-precedence parser with its own
stack: no `eval`, no recursion that depends on the text, exact fractions. The finder (`reachable`) makes
problems and worked solutions; it stays within the natural numbers, the arithmetic that a small model can
follow.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

MAX_DEPTH = 40  # nested parentheses
_TOKEN = re.compile(r"[0-9]+|[-+*/()]")
_PIECE = re.compile(r"[0-9]+(?:\.[0-9]+)?|\S")  # of running text: a number, or any other character
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2, "negate": 3, "(": 0}


def parse(text: str) -> list[int | str] | None:
    """Reads an expression into postfix order, or gives None where the text is none.

    `2 * (3 - -1)` becomes `[2, 3, 1, "negate", "-", "*"]`. Unary signs may be repeated. Not accepted: `**`,
    `//`, products without a sign, leading zeros, two numbers side by side, parentheses deeper than
    MAX_DEPTH.

    Args:
        text: holds only ASCII digits, `+-*/()` and white space.
    """
    output: list[int | str] = []
    stack: list[str] = []  # operators and open parentheses that still wait for their right side
    depth = 0
    wants_operand = True
    for token in _TOKEN.findall(text):
        if wants_operand:
            if token[0].isdigit():
                if token[0] == "0" and len(token) > 1:
                    return None
                output.append(int(token))
                wants_operand = False
            elif token == "(":
                stack.append(token)
                depth += 1
                if depth > MAX_DEPTH:
                    return None
            elif token == "-":
                stack.append("negate")
            elif token != "+":
                return None
        elif token == ")":
            if depth == 0:
                return None
            while stack[-1] != "(":
                output.append(stack.pop())
            stack.pop()
            depth -= 1
        elif token in "+-*/":
            while stack and _PRECEDENCE[stack[-1]] >= _PRECEDENCE[token]:
                output.append(stack.pop())
            stack.append(token)
            wants_operand = True
        else:  # a number or "(" right after an operand
            return None
    if wants_operand or depth:
        return None
    return output + stack[::-1]


def literals(postfix: list[int | str]) -> list[int]:
    """The number literals, in the order of the text."""
    return [token for token in postfix if isinstance(token, int)]


def evaluate(postfix: list[int | str]) -> Fraction | None:
    """The exact value, or None where something is divided by zero."""
    stack: list[Fraction] = []
    for token in postfix:
        if isinstance(token, int):
            stack.append(Fraction(token))
        elif token == "negate":
            stack[-1] = -stack[-1]
        else:
            right = stack.pop()
            left = stack.pop()
            if token == "+":
                stack.append(left + right)
            elif token == "-":
                stack.append(left - right)
            elif token == "*":
                stack.append(left * right)
            elif right == 0:
                return None
            else:
                stack.append(left / right)
    return stack[0]


def contains(text: str, numbers: list[int], target: int) -> bool:
    """Whether some stretch of running text is an expression of exactly `numbers` that equals `target`.

    Looks at each run of len(numbers) literals with nothing but signs between them, and at the parentheses
    and signs around it. Work is linear in the text: runs much longer than an expression of so many numbers
    needs are passed over.
    """
    wanted = sorted(map(str, numbers))  # as text: no literal is too long to compare, and 03 is not 3
    pieces = _PIECE.findall(text)
    places = [i for i, piece in enumerate(pieces) if piece[0] in "0123456789"]
    count = len(wanted)
    for first in range(len(places) - count + 1):
        window = places[first : first + count]
        start, end = window[0], window[-1] + 1
        if end - start > 8 * count or sorted(pieces[i] for i in window) != wanted:
            continue
        if not all(piece in "+-*/()" for i, piece in enumerate(pieces[start:end], start) if i not in window):
            continue
        for begin in range(start, max(start - 2 * count, -1), -1):
            if begin < start and pieces[begin] not in "(+-":
                break
            stretch = pieces[begin:end]
            # Close what the stretch leaves open, as far as the text does so itself.
            missing = stretch.count("(") - stretch.count(")")
            closing = pieces[end : end + max(missing, 0)]
            postfix = parse(" ".join(stretch + closing)) if set(closing) <= {")"} else None
            if postfix is not None and evaluate(postfix) == target:
                return True
    return False


class Term(NamedTuple):
    """An expression as text, and the precedence of its outermost operator (3 for a number).

    Written with spaces, as in the text that models are pre-trained on: untrained, SmolLM2-135M gets half of
    the sums of two numbers right with spaces and a third without (docs/LOG.md), which outweighs the tokens
    they cost.
    """

    text: str
    precedence: int


@lru_cache(maxsize=1 << 12)  # with * one entry can hold a thousand values
def reachable(numbers: tuple[int, ...], operators: str) -> dict[int, Term]:
    """Every value that all the numbers, each used once, can make, with one expression for each. Read only.

    Every intermediate value is a natural number: no negative ones, and divisions come out even. With + and
    - alone this loses no positive value (add first, then subtract). Expressions keep to the order of
    `numbers` and avoid parentheses where they can: a later split does not replace the term of an earlier
    one.
    """
    if len(numbers) == 1:
        return {numbers[0]: Term(str(numbers[0]), 3)}
    terms: dict[int, Term] = {}
    for left, right in _splits(numbers):
        for x, left_term in reachable(left, operators).items():
            for y, right_term in reachable(right, operators).items():
                for operator in operators:
                    value = _natural(x, operator, y)
                    if value is not None and value not in terms:
                        terms[value] = _join(left_term, operator, right_term)
    return terms


def worked(text: str) -> str:
    """An expression and its value, one operation at a time: "10 - 5 + 2" -> "10 - 5 + 2 = 5 + 2 = 7".

    Innermost parentheses first, then * and /, then from left to right. For expressions of `reachable`: every
    intermediate value must be a natural number.
    """
    steps = [text]
    while not text.isdigit():
        inner = re.search(r"\([^()]*\)", text)
        start, end = inner.span() if inner else (0, len(text))
        part = text[start:end]
        step = re.search(r"([0-9]+) ([*/]) ([0-9]+)", part) or re.search(r"([0-9]+) ([-+]) ([0-9]+)", part)
        assert step is not None, text
        value = _natural(int(step[1]), step[2], int(step[3]))
        assert value is not None, text
        part = f"{part[: step.start()]}{value}{part[step.end() :]}"
        text = text[:start] + re.sub(r"^\(([0-9]+)\)$", r"\1", part) + text[end:]
        steps.append(text)
    return " = ".join(steps)


def _splits(numbers: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """All ways to deal the numbers to two sides, beginning with the last number alone on the right."""
    positions = range(len(numbers))
    for size in range(1, len(numbers)):
        for chosen in itertools.combinations(reversed(positions), size):
            left = tuple(numbers[i] for i in positions if i not in chosen)
            yield left, tuple(numbers[i] for i in positions if i in chosen)


def _natural(x: int, operator: str, y: int) -> int | None:
    if operator == "+":
        return x + y
    if operator == "-":
        return x - y if x >= y else None
    if operator == "*":
        return x * y
    return x // y if y and x % y == 0 else None


def _join(left: Term, operator: str, right: Term) -> Term:
    precedence = _PRECEDENCE[operator]
    left_text = f"({left.text})" if left.precedence < precedence else left.text
    # a + (b - c) needs no parentheses, a - (b - c) does.
    needed = right.precedence < precedence or (right.precedence == precedence and operator in "-/")
    return Term(f"{left_text} {operator} {f'({right.text})' if needed else right.text}", precedence)
