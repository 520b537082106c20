"""What a task returns is checked: each message names task, method, expectation, value and example."""

import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny

from grpo.tasks import Example, Transcript, Verdict, get_task
from grpo.tasks.contract import check_task, json_change, leaks, tolerant_verdict, verdict

NEEDS = {"train": {"num_examples": 4, "warm_start_examples": 2}, "validation": {}, "heldout": {"num_eval": 3}}
CHAT = SimpleNamespace(takes_tools=False)
EXAMPLE = Example("train-0", "Problem 0?", {"i": 0})


def task(**members: Any) -> Any:
    """The toy task with other members."""
    return type("Changed", (tiny.Toy,), members)()


def fault(chat: Any = CHAT, transcripts: bool = True, **members: Any) -> str:
    with pytest.raises(ValueError) as error:
        check_task(task(**members), NEEDS, chat, transcripts=transcripts)
    assert "\n" not in str(error.value)
    return str(error.value)


def given(*change: Any, **changes: Any) -> Any:
    """A method `examples` whose third example differs."""

    def examples(self: Any, split: str, count: int, offset: int = 0) -> list[Any]:
        whole = tiny.Toy.examples(self, split, offset + count)
        whole[2:3] = change or [replace(whole[2], **changes)]
        return whole[offset:]

    return examples


def test_a_good_task_passes_and_gives_all_its_examples() -> None:
    for good in (tiny.Toy(), get_task("countdown")):
        examples = check_task(good, NEEDS, CHAT, transcripts=True)
        assert examples == good.examples("train", 6) + good.examples("heldout", 3)
    assert check_task(task(transcript=None), NEEDS, CHAT) == examples[:0] + tiny.Toy().examples(
        "train", 6
    ) + (tiny.Toy().examples("heldout", 3))


@pytest.mark.parametrize("value", [True, 0.5, None, "ok", SimpleNamespace(ok=True, reason="ok")])
def test_a_verdict_of_another_type(value: Any) -> None:
    changed = task(verify=lambda *_: value, tolerant=lambda *_: value)
    for checked, method in ((verdict, "verify"), (tolerant_verdict, "tolerant")):
        with pytest.raises(
            ValueError, match=rf"task toy: {method} must return a Verdict, .*example 'train-0'"
        ):
            checked(changed, EXAMPLE, "7")
    message = fault(verify=lambda *_: value)
    assert "task toy: verify must return a Verdict, such as Verdict('ok'), got" in message
    assert "tolerant must return" in fault(tolerant=lambda *_: value)


@pytest.mark.parametrize("reason", [0.5, True, None, "", ["ok"]])
def test_a_verdict_needs_a_reason(reason: Any) -> None:
    with pytest.raises(ValueError, match="reason must be 'ok' or a short code, got"):
        Verdict(reason)


@pytest.mark.parametrize("value", [0, 1.0, None, "no"])
def test_leaks_of_another_type(value: Any) -> None:
    with pytest.raises(ValueError, match="task toy: leaks must return True or False, got .* 'train-0'"):
        leaks(task(leaks=lambda *_: value), EXAMPLE, "7")
    assert "leaks must return True or False" in fault(leaks=lambda *_: value)


@pytest.mark.parametrize(
    ("data", "change"),
    [
        ({"pair": (1, 2)}, "data['pair'] = (1, 2), of type tuple"),
        ({"a": [{"b": (1,)}]}, "data['a'][0]['b'] = (1,), of type tuple"),
        ({1: "a"}, "data with the key 1, of type int"),
        ({"a": {None: 1}}, "data['a'] with the key None, of type NoneType"),
        ({"x": float("nan")}, "Out of range float"),
        ({"x": {1, 2}}, "not JSON serializable"),
        ({"x": 10**5000}, "digits"),
        ([1], "data as a dict, got [1]"),
    ],
)
def test_data_that_json_changes(data: Any, change: str) -> None:
    message = fault(examples=given(data=data))
    assert (
        change in message and "for example 'train-2'" in message and "task toy: examples must give" in message
    )


def test_json_keeps_what_it_can_write() -> None:
    kept = {"a": [1, 1.0, True, None, "\ud800", {"b": -0.0}], "": 2**70}
    assert json_change(kept, "data") is None
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    assert "data" in (json_change({"deep": deep}, "data") or "")


EXAMPLES = {
    "the same id twice": (
        given(id="train-1"),
        "an id of its own, got one twice in train for example 'train-1'",
    ),
    "the same id in two splits": (
        lambda self, split, count, offset=0: [Example(str(offset + i), "?") for i in range(count)],
        "an id of its own, got one twice in train and heldout for example '0'",
    ),
    "fewer": (
        lambda self, split, count, offset=0: tiny.Toy().examples(split, count - 1),
        "6 examples of train",
    ),
    "more": (lambda self, split, count, offset=0: tiny.Toy().examples(split, count + 1), "got 7"),
    "no list": (
        lambda self, split, count, offset=0: (i for i in range(count)),
        "must return a list of Example",
    ),
    "a dict": (given({"id": "a", "prompt": "b"}), "must return a list of Example, got {'id': 'a'"),
    "an id that is a number": (given(id=7), "id as a string without lone surrogates, got 7"),
    "a prompt that is none": (given(prompt=None), "prompt as a string without lone surrogates, got None"),
    "a lone surrogate": (given(prompt="\ud800"), r"got '\ud800' for example 'train-2'"),
    "another order each time": (
        lambda self, split, count, offset=0: [Example(str(random.random()), "?") for _ in range(count)],
        "must return the same examples whenever train is asked for, from offset 0",
    ),
    "the offset is ignored": (
        lambda self, split, count, offset=0: tiny.Toy().examples(split, count),
        "must return the same examples whenever train is asked for, from offset 4",
    ),
}


@pytest.mark.parametrize(("examples", "message"), EXAMPLES.values(), ids=EXAMPLES)
def test_examples_that_do_not_fit(examples: Any, message: str) -> None:
    assert message in fault(examples=examples)


def opens(*messages: Any, tools: Any = None) -> Any:
    return lambda *_: (list(messages), tools)


USER = {"role": "user", "content": "?"}
MEMBERS: dict[str, tuple[dict[str, Any], str]] = {
    "name": ({"name": 5}, "name must be a string"),
    "instruction": ({"reflection_instruction": None}, "reflection_instruction must be a string"),
    "one format reason": (
        {"format_reasons": "empty"},
        "format_reasons must be a set of strings, got 'empty'",
    ),
    "no message": ({"opening": opens()}, "opening must return messages"),
    "a string": ({"opening": opens("hello")}, "got 'hello' for example 'train-0'"),
    "no content": ({"opening": opens({"role": "user"})}, "opening must return messages"),
    "not the user's": (
        {"opening": opens(USER, {"role": "assistant", "content": "?"})},
        "the last one by the user",
    ),
    "messages alone": ({"opening": lambda *_: [USER]}, "opening raised ValueError: not enough values"),
    "tools": (
        {"opening": opens(USER, tools=["f"])},
        "must return tools as a list of dicts, or None, got ['f']",
    ),
    "tools unasked": ({"opening": opens(USER, tools=[{}])}, "no tools if with_tools is False"),
    "no transcript": ({"transcript": lambda *_: "7"}, "transcript must return a Transcript, got '7'"),
    "half a transcript": ({"transcript": lambda *_: Transcript(None)}, "must give its attempt as a string"),  # type: ignore[arg-type]
    "a dozen": ({"transcript": lambda *_: Transcript("a", 12)}, "must give its reflection as a string"),  # type: ignore[arg-type]
    "no argument": (
        {"transcript": lambda self, example, rng: Transcript("a", "b")},
        "transcript raised TypeError",
    ),
    "changed data": (
        {"verify": lambda self, example, text: example.data.clear() or Verdict("wrong")},
        "must not change the example",
    ),
}


@pytest.mark.parametrize(("members", "message"), MEMBERS.values(), ids=MEMBERS)
def test_members_that_do_not_fit(members: dict[str, Any], message: str) -> None:
    assert message in fault(**members)


@pytest.mark.parametrize("method", ["examples", "opening", "verify", "leaks", "tolerant", "transcript"])
@pytest.mark.parametrize("error", [ValueError, KeyError, SystemExit])
def test_what_a_method_raises_is_named_with_its_place(method: str, error: Any) -> None:
    def fail(*_: Any) -> Any:
        raise error("no\nsuch column")

    message = fault(**{method: fail})
    line = fail.__code__.co_firstlineno + 1
    assert f"task toy: {method} raised {error.__name__}: " in message and "such column" in message
    assert f"({__file__}, line {line})" in message


class Missing(tiny.Toy):
    def __init__(self, path: str = "/none", leave: bool = False) -> None:
        if leave:
            raise SystemExit(0)
        Path(path).read_text()


def test_what_a_constructor_or_an_import_raises_is_named_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ValueError, match=r"Missing raised FileNotFoundError: .*\(.*test_contract.py, line \d+\)"
    ):
        get_task("test_contract:Missing")
    with pytest.raises(ValueError, match="Missing raised SystemExit: 0"):
        get_task("test_contract:Missing", {"leave": True})
    (tmp_path / "task_that_raises.py").write_text("limit = 5\nint('five')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"import raised ValueError: .*task_that_raises.py, line 2\)"):
        get_task("task_that_raises:Task")
