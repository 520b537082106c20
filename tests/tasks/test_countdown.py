"""Countdown: the verifier against its rules and against brute force, the problems, the transcripts."""

import itertools
import json
import random
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.tasks import SPLITS, Example, countdown, expression
from grpo.tasks.countdown import Countdown, verify
from grpo.tasks.expression import MAX_DEPTH, evaluate, parse, reachable

CASES = json.loads((Path(__file__).parents[1] / "cases" / "countdown.json").read_text(encoding="utf-8"))
REASONS = {
    "ok",
    "no_answer",
    "empty",
    "too_long",
    "illegal_char",
    "syntax",
    "wrong_numbers",
    "div_zero",
    "wrong_value",
}


def wrap(answer: str) -> str:
    return f"<answer>{answer}</answer>"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["text"][:30])
def test_cases(case: dict[str, Any]) -> None:
    assert verify(case["text"], case["numbers"], case["target"]).reason == case["verdict"]


@pytest.mark.parametrize(
    ("answer", "numbers", "target", "reason"),
    [
        (" \n\t", [1], 1, "empty"),
        ("9" * 201, [1], 1, "too_long"),
        ("x" * 201, [1], 1, "too_long"),  # length comes before characters
        ("9" * 200, [1], 1, "wrong_numbers"),
        ("1+2" + " " * 500, [1, 2], 3, "ok"),  # the limit holds for the stripped text
        ("١+2", [1, 2], 3, "illegal_char"),  # a digit, but not an ASCII one
        ("²", [2], 2, "illegal_char"),
        ("5 3", [5, 3], 8, "syntax"),
        ("()", [], 0, "syntax"),
        ("(1)(2)", [1, 2], 2, "syntax"),
        ("6//2", [6, 2], 3, "syntax"),
        ("6/*2", [6, 2], 3, "syntax"),
        ("* 6", [6], 6, "syntax"),
        ("00", [0], 0, "syntax"),
        ("0+3", [0, 3], 3, "ok"),
        (")1(", [1], 1, "syntax"),
        ("(1+2", [1, 2], 3, "syntax"),
        ("- -+-5", [5], -5, "ok"),
        ("2*-3", [2, 3], -6, "ok"),
        ("-2*-3", [2, 3], 6, "ok"),
        ("-(2-3)", [2, 3], 1, "ok"),
        ("8-3-2", [8, 3, 2], 3, "ok"),  # left to right
        ("8/4/2", [8, 4, 2], 1, "ok"),
        ("8-6/2", [8, 6, 2], 5, "ok"),
        ("1/0", [2, 0], 1, "wrong_numbers"),  # before the division by zero
        ("1/0", [1, 0], 1, "div_zero"),
        ("0*(1/(2-2))", [0, 1, 2, 2], 0, "div_zero"),
        ("1/3", [1, 3], 0, "wrong_value"),
        ("(" * MAX_DEPTH + "7" + ")" * MAX_DEPTH, [7], 7, "ok"),
        ("(" * (MAX_DEPTH + 1) + "7" + ")" * (MAX_DEPTH + 1), [7], 7, "syntax"),
        ("(1)+" * 41 + "1", [1] * 42, 42, "ok"),  # depth, not number, of parentheses
    ],
)
def test_rules(answer: str, numbers: list[int], target: int, reason: str) -> None:
    assert verify(wrap(answer), numbers, target).reason == reason


def test_last_closing_tag_and_nearest_opening_tag() -> None:
    assert verify("<answer>1+2</answer> </answer>", [1, 2], 3).reason == "illegal_char"
    assert verify("<answer>9<answer>1+2</answer>", [1, 2], 3).ok
    assert verify("<answer>1+2</answer><answer>", [1, 2], 3).ok
    assert verify("</answer><answer>1+2", [1, 2], 3).reason == "no_answer"
    assert verify("<answer</answer>", [1, 2], 3).reason == "no_answer"


HOSTILE = [
    "\ud800",
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    *"()+-*/×−",
    "0",
    "1",
    "2",
    "13",
    " ",
    "\x00",
    "é",
]
PIECES = st.one_of(st.sampled_from(HOSTILE), st.characters())


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=60).map("".join), st.booleans())
def test_never_raises(text: str, wrapped: bool) -> None:
    assert verify(wrap(text) if wrapped else text, [1, 2, 13], 16).reason in REASONS
    assert expression.contains(text, [1, 2, 13], 16) in (True, False)


@pytest.mark.parametrize(
    "unit",
    [
        "(",
        ")",
        "-",
        "9",
        "<answer>",
        "</answer>",
        "<answer>1",
        "<think>",
        "</think>",
        " ",
        "1+",
        "\ud800",
        "1+(2-",
    ],
)
def test_work_is_linear(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # What the parser gets to see is counted, and everything else is a fixed number of string searches.
    visited = 0

    def counting_parse(text: str) -> list[int | str] | None:
        nonlocal visited
        visited += len(text)
        return parse(text)

    monkeypatch.setattr(countdown, "parse", counting_parse)
    monkeypatch.setattr(expression, "parse", counting_parse)
    text = unit * (100_000 // len(unit))
    for hostile in (text, wrap(text), text + "</answer>", "<answer>" + text):
        verify(hostile, [1, 2], 3)
    assert visited <= 4 * countdown.MAX_ANSWER_CHARACTERS
    task = Countdown(numbers=2)
    example = task.examples("train", 1)[0]
    visited = 0
    task.leaks(example, text)
    assert visited <= 100 * len(text)


def trees(numbers: tuple[int, ...]) -> Iterator[tuple[str, Fraction | None]]:
    """Every expression over the numbers in this order, in parentheses, and its value (None: undefined)."""
    if len(numbers) == 1:
        yield str(numbers[0]), Fraction(numbers[0])
    for cut in range(1, len(numbers)):
        for (left, x), (right, y) in itertools.product(trees(numbers[:cut]), trees(numbers[cut:])):
            for sign in "+-*/":
                undefined = x is None or y is None or (sign == "/" and y == 0)
                yield f"({left}{sign}{right})", None if undefined else combine(x, sign, y)


def combine(x: Fraction | None, sign: str, y: Fraction | None) -> Fraction:
    assert x is not None and y is not None
    return {"+": x + y, "-": x - y, "*": x * y, "/": x / (y or 1)}[sign]


@pytest.mark.parametrize("numbers", [(3, 8, 1), (2, 2, 4), (0, 5, 5), (6, 4, 2)])
def test_agrees_with_brute_force(numbers: tuple[int, ...]) -> None:
    orders = sorted(set(itertools.permutations(numbers)))
    expressions = {text: value for order in orders for text, value in trees(order)}
    values = {value for value in expressions.values() if value is not None and value.denominator == 1}
    for text, value in expressions.items():
        # Its own value, where that is whole, and a few others that the same numbers can make.
        for target in {int(other) for other in [*sorted(values)[::9], value] if other in values}:
            expected = "div_zero" if value is None else "ok" if value == target else "wrong_value"
            assert verify(wrap(text), list(numbers), target).reason == expected, text


SIGNS = st.sampled_from(["+", "-", " * ", "/ "])
EXPRESSIONS = st.recursive(
    st.integers(0, 30).map(str),
    lambda inner: st.one_of(
        st.builds("{}{}{}".format, inner, SIGNS, inner),
        st.builds("( {})".format, inner),
        st.builds("{}{}".format, st.sampled_from("+-"), inner),
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(EXPRESSIONS, st.one_of(st.none(), st.tuples(st.integers(0, 40), st.sampled_from(["", *" +-*/()01"]))))
def test_parser_agrees_with_python(text: str, change: tuple[int, str] | None) -> None:
    if change is not None:  # a well-formed expression with one character lost or replaced
        place = change[0] % len(text)
        text = text[:place] + change[1] + text[place + 1 :]
    own = parse(text)
    # What is valid Python beyond the grammar: powers, whole division, calls, nothing in parentheses, 00.
    if re.search(r"\*\*|//|[0-9)]\s*\(|\(\s*\)|\b0[0-9]|\)\s*[0-9]", text):
        assert own is None
        return
    try:
        exact = re.sub(r"([0-9]+)", r"Fraction(\1)", text.strip())
        expected: Fraction | None = eval(exact, {"Fraction": Fraction})
    except SyntaxError:
        assert own is None
        return
    except ZeroDivisionError:
        expected = None
    assert own is not None and evaluate(own) == expected


@pytest.mark.parametrize("numbers", [(3, 8, 1), (5, 5, 9), (7, 2, 2, 9)])
@pytest.mark.parametrize("operators", ["+-", "+-*/", "*", "-"])
def test_reachable_is_complete_and_right(numbers: tuple[int, ...], operators: str) -> None:
    def natural(values: tuple[int, ...]) -> set[int]:
        if len(values) == 1:
            return {values[0]}
        found = set()
        for cut in range(1, len(values)):
            for x, y in itertools.product(natural(values[:cut]), natural(values[cut:])):
                found |= {x + y} if "+" in operators else set()
                found |= {x - y} if "-" in operators and x >= y else set()
                found |= {x * y} if "*" in operators else set()
                found |= {x // y} if "/" in operators and y and x % y == 0 else set()
        return found

    terms = reachable(numbers, operators)
    assert set(terms) == set().union(*(natural(order) for order in itertools.permutations(numbers)))
    for value, term in terms.items():
        assert verify(wrap(term.text), list(numbers), value).ok
        assert operators != "+-" or "(" not in term.text


def key(example: Any) -> tuple[tuple[int, ...], int]:
    return tuple(sorted(example.data["numbers"])), example.data["target"]


SETTINGS: list[dict[str, Any]] = [
    {},
    {"high": 20},
    {"numbers": "3-4", "high": 100, "operators": "+-*/", "max_target": 100},
]


@pytest.mark.parametrize("options", SETTINGS)
def test_problems(options: dict[str, Any]) -> None:
    task = Countdown(**options)
    parts = {"train": 150, "validation": 64, "heldout": 512}
    examples = {split: task.examples(split, count) for split, count in parts.items()}
    keys = {split: {key(example) for example in part} for split, part in examples.items()}
    assert {split: len(part) for split, part in keys.items()} == parts  # each problem once
    assert not (keys["train"] & keys["heldout"] or keys["train"] & keys["validation"])
    assert not keys["validation"] & keys["heldout"]
    for example in itertools.chain.from_iterable(examples.values()):
        numbers, target = example.data["numbers"], example.data["target"]
        assert 1 <= target <= options.get("max_target", 10**9)
        assert all(1 <= number <= options.get("high", 10) for number in numbers)
        assert verify(wrap(reachable(tuple(numbers), task.operators)[target].text), numbers, target).ok
        assert example.prompt == f"Numbers: {', '.join(map(str, numbers))}. Target: {target}."
    assert any(example.data["numbers"] != sorted(example.data["numbers"]) for example in examples["train"])


def test_order_depends_on_the_seed_alone() -> None:
    one, other = Countdown(seed=3), Countdown(seed=3)
    heldout = one.examples("heldout", 40)
    other.examples("train", 100)
    assert other.examples("heldout", 20, offset=20) == heldout[20:]
    assert Countdown(seed=4).examples("heldout", 40) != heldout
    # The split of a problem is its own, whatever the seed.
    whole = {key(example) for example in Countdown(seed=4).examples("heldout", 512)}
    assert {key(example) for example in heldout} <= whole


def test_demo_space() -> None:
    # 745 problems: 512 held out, 74 for validation, 159 for training (these in all orders of their numbers).
    task = Countdown()
    train = task.examples("train", 751)
    assert len({key(example) for example in train}) == 159 and len({example.id for example in train}) == 751
    heldout = {key(example) for example in task.examples("heldout", 512)}
    assert not heldout & {key(example) for example in train}
    for split, size in {"train": 751, "validation": 74, "heldout": 512}.items():
        with pytest.raises(ValueError, match=f"has {size} examples"):
            task.examples(split, size + 1)


def test_every_problem_of_a_tiny_space_and_then_an_error() -> None:
    task = Countdown(numbers=2, low=1, high=2, operators="+")
    assert sum(len(task.examples(split, 1)) for split in ("train", "heldout")) == 2
    with pytest.raises(ValueError, match="raise high"):
        task.examples("heldout", 100)


@pytest.mark.parametrize(
    "options",
    [
        {"numbers": 0},
        {"numbers": "4-3"},
        {"numbers": "many"},
        {"low": 5, "high": 4},
        {"low": -1},
        {"operators": ""},
        {"operators": "+^"},
        {"operators": "++"},
        {"reflection_stop": 1.5},
        {"max_tries": 0},
        {"max_target": 0},
    ],
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Countdown(**options)


def test_bad_requests() -> None:
    with pytest.raises(ValueError, match="split must be one of"):
        Countdown().examples("test", 1)
    with pytest.raises(ValueError, match="offset"):
        Countdown().examples("train", 1, offset=-1)


@pytest.mark.parametrize("options", [*SETTINGS, {"max_tries": 1}, {"max_tries": 2, "reflection_stop": 0.0}])
def test_transcripts(options: dict[str, Any]) -> None:
    task = Countdown(**options)
    rng = random.Random(0)
    right, found, tries = 0, 0, set()
    examples = task.examples("train", 100)
    for example in examples:
        numbers, target = example.data["numbers"], example.data["target"]
        transcript = task.transcript(example, rng)
        if transcript.reflection is None:
            assert task.verify(example, transcript.attempt).ok and transcript.retry is None
            right += 1
            continue
        assert transcript.retry is not None
        assert task.verify(example, transcript.attempt).reason == "wrong_value"
        found_checks = re.findall(r"([^,.]+?), (not \d+|that works)\.", transcript.reflection)
        found_checks = [(chain.strip(), end) for chain, end in found_checks]
        assert " ".join(f"{chain}, {end}." for chain, end in found_checks) == transcript.reflection
        checks = []
        for chain, end in found_checks:
            text, *steps, value = chain.split(" = ")
            postfixes = [parse(step) for step in (text, *steps)]
            assert all(postfix is not None and evaluate(postfix) == int(value) for postfix in postfixes)
            assert len(steps) == len(numbers) - 2  # one operation at a time
            checks.append((text, value, end))
        assert len({value for _, value, _ in checks}) == len(checks) <= task.max_tries
        for text, value, end in checks:
            assert verify(wrap(text), numbers, int(value)).ok  # the arithmetic is right
            assert end == ("that works" if int(value) == target else f"not {target}")
        success = checks[-1][2] == "that works"
        assert task.leaks(example, transcript.reflection) == success
        assert transcript.retry == wrap(checks[-1][0])
        assert task.verify(example, transcript.retry).ok == success
        found += success
        tries.add(len(checks))
    assert 5 <= right <= 40
    assert found >= 10
    assert len(tries) > 1 or task.max_tries == 1


def test_leaks() -> None:
    task = Countdown()
    example = Example(id="x", prompt="", data={"numbers": [3, 8, 1], "target": 10})
    for text in (
        "3+8-1",
        "I tried 3 + 8 - 1 = 10, fine.",
        "Is 8 − 1 + 3 better?",
        "2. -1+8+3",
        "(8 - 1) + 3 would do",
        "3 - (1 - 8), or",
        "-(1-8-3)",
        "12 3+8-1",
        "<think>3+8-1</think> I should try again.",  # the retry's context has the thought
        "<think>3+8-1",
    ):
        assert task.leaks(example, text), text
    for text in ("", "make 10", "13+8-1", "3+8-10", "3+8-1.5", "3 and 8-1", "3+8+1 = 12", "3 8 1", "03+8-1"):
        assert not task.leaks(example, text), text
    example = Example(id="x", prompt="", data={"numbers": [2, 3, 4], "target": 14})
    assert task.leaks(example, "maybe 2×(3+4) = 14?") and task.leaks(example, "maybe ((3+4)*2)")
    assert not task.leaks(example, "2*3+4 = 14") and not task.leaks(example, "2*(3+4 = 14")


def test_system_message_names_the_operators() -> None:
    rules = Countdown().system or ""
    assert rules.endswith("with + and - to reach the target. Answer as <answer>3 + 5 - 2</answer>.")
    assert "+, -, * and /" in (Countdown(operators="+-*/").system or "")
    assert "with + to" in (Countdown(operators="+").system or "")


# --- problems from a file -----------------------------------------------------------------------------------


def test_problems_of_a_file_are_in_the_split_of_the_drawn_ones(tmp_path: Path) -> None:
    drawn = Countdown("3-4", high=100, operators="+-*/", max_target=100)
    problems = {split: [e.data for e in drawn.examples(split, 20)] for split in SPLITS}
    rows = [
        {"nums": data["numbers"], "target": data["target"]} for part in problems.values() for data in part
    ]
    rows += [{"nums": rows[0]["nums"][::-1], "target": rows[0]["target"]}, {"nums": [1, 1], "target": 999}]
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = Countdown(path=str(path), operators="+-*/")
    for split, part in problems.items():
        found = task.examples(split, 20)
        assert {(*sorted(e.data["numbers"]), e.data["target"]) for e in found} == {
            (*sorted(data["numbers"]), data["target"]) for data in part
        }
        assert all(task.transcript(e, random.Random(0)).attempt for e in found)
        message = r"has 61 problems; 1 have no solution in whole numbers with operators '\+-\*/'"
        with pytest.raises(ValueError, match=message):
            task.examples(split, 21)


def test_a_csv_file_and_rows_that_cannot_be_used(
    tmp_path: Path, warned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tasks.csv"
    path.write_text('numbers,target\n"[1, 2, 3]",6\n"[1, ""a""]",6\n[],1\nx,1\n"[1, 2]",-3\n')
    with warned("skipped 4 of 5 rows: tasks.csv line 3: numbers and target must be"):
        task = Countdown(path=str(path))
    assert sum(len(task._splits[split]) for split in SPLITS) == 0  # nothing is solved before it is asked for
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Countdown(path="~/tasks.csv")
    path.write_text("nums,goal\n[1],1\n")
    with pytest.raises(ValueError, match="target must be a column of the data"):
        Countdown(path=str(path))
    path.write_text("nums,target\n[],1\n")
    with pytest.raises(ValueError, match="tasks.csv has no usable row"):
        Countdown(path=str(path))


@pytest.mark.parametrize(
    ("text", "numbers", "target"),
    [
        ("Numbers: 10, 4, 10. Target: 24.", [10, 4, 10], 24),
        ("numbers 3 4 5 target 12", [3, 4, 5], 12),
        ("  Numbers: 7;8 Target = 15 ", [7, 8], 15),
        ("Numbers: 1, 2. Target: x.", None, None),
        ("Numbers: 1, 2, 3, 4, 5, 6, 7. Target: 8.", None, None),
        ("Numbers: 1234567. Target: 8.", None, None),
        ("What is 3 + 4?", None, None),
        ("", None, None),
    ],
)
def test_a_problem_that_a_user_types(text: str, numbers: list[int] | None, target: int | None) -> None:
    example = Countdown().typed(text)
    if numbers is None:
        assert example is None
    else:
        assert example is not None and example.data == {"numbers": numbers, "target": target}
        assert Countdown().typed(example.prompt) == example


def test_a_problem_that_a_user_types_is_that_of_the_split() -> None:
    task = Countdown()
    assert all(task.typed(example.prompt) == example for example in task.examples("train", 50))
