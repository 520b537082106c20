"""Transcripts of function calling: mistakes are such, what reflections say is true, the retry follows."""

import json
import random
import re

import pytest

from grpo.tasks import WarmStartTask, get_task
from grpo.tasks.function_calling import FunctionCalling, verify
from grpo.tasks.function_calling.mistakes import NO_CALL, mistaken, reflection, right_calls, text_of

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {
                    "width": {"type": "integer"},
                    "unit": {"type": "string", "enum": ["m", "cm"]},
                    "tags": {"type": "array"},
                    "deep": {"type": "boolean", "default": True},
                },
                "required": ["width"],
            },
        },
    }
    for name in ("area", "volume")
]
GOLD = [{"name": "area", "arguments": {"width": 3, "unit": "m", "tags": ["a", "b"]}}]
ACCEPTED = [{"name": "area", "arguments": {"width": [3, 4], "unit": ["m", "cm", ""]}}]
QUESTION = "What is the area of 3 metres, in 7 steps?"


@pytest.mark.parametrize(
    ("gold", "accepted"), [(GOLD, False), (ACCEPTED, True), (GOLD * 2, False), ([], False)]
)
def test_every_mistake_is_one_and_a_whole_reflection_mends_it(gold, accepted):
    seen = set()
    for seed in range(300):
        calls = mistaken(gold, accepted, TOOLS, QUESTION, random.Random(seed))
        assert not verify(text_of(calls), gold, accepted=accepted).ok
        said, mended = reflection(calls, gold, accepted, None)
        assert verify(text_of(mended), gold, accepted=accepted).ok, (calls, said)
        assert said and mended is not calls
        seen.add(verify(text_of(calls), gold, accepted=accepted).reason)
    assert seen >= ({"wrong_value", "wrong_keys", "wrong_name"} if gold else {"wrong_count"})


def test_what_is_said_is_true():
    for seed in range(300):
        calls = mistaken(ACCEPTED, True, TOOLS, QUESTION, random.Random(seed))
        said, _ = reflection(calls, ACCEPTED, True, None)
        accepted, args = ACCEPTED[0]["arguments"], calls[0]["arguments"]
        for key, value in re.findall(r"(\w+) (\S+) fits\.", said):
            assert args[key] == json.loads(value) and json.loads(value) in accepted[key]
        for key, wanted, written in re.findall(r'(\w+) must be (\S+), not ("[^"]*"|\S+)\.(?: |$)', said):
            assert json.loads(wanted) in accepted[key]
            assert args[key] == json.loads(written) and json.loads(written) not in accepted[key]
        for key in re.findall(r"(\w+) is not asked for", said):
            assert key in args and key not in accepted


def test_a_reflection_that_stops_early_mends_what_it_has_found():
    calls = [{"name": "volume", "arguments": {"width": 7, "unit": "cm", "tags": ["a", "b"]}}]
    said, mended = reflection(calls, GOLD, False, 1)
    assert said == "volume is the wrong function, area is right."
    assert mended == [{"name": "area", "arguments": {"width": 7, "unit": "cm", "tags": ["a", "b"]}}]
    said, mended = reflection(calls, GOLD, False, 2)
    assert said.endswith("width must be 3, not 7.") and mended[0]["arguments"]["unit"] == "cm"
    assert calls[0]["name"] == "volume"  # the wrong answer stays as it was


def test_calls_left_out_or_too_many_are_said():
    right = right_calls(GOLD * 2, False)
    said, mended = reflection(right[:1], GOLD * 2, False, None)
    assert "A call of area is missing" in said and mended == right
    said, mended = reflection([*right, right[0]], GOLD * 2, False, None)
    assert said.endswith("There is a call too many.") and mended == right


def test_where_nothing_is_to_be_called():
    calls = mistaken([], False, TOOLS, QUESTION, random.Random(0))
    said, mended = reflection(calls, [], False, 1)
    assert said == f"{calls[0]['name']} does not answer this, and no other function does."
    assert mended == [] and text_of(mended) == NO_CALL and verify(NO_CALL, []).ok


def test_the_first_accepted_values_are_an_answer():
    nested = [{"name": "f", "arguments": {"o": [{"a": [1, 2], "b": ["", "x"], "c": [""]}], "p": ["", 1]}}]
    assert right_calls(nested, True) == [{"name": "f", "arguments": {"o": {"a": 1, "b": "x"}}}]
    assert verify(text_of(right_calls(nested, True)), nested, accepted=True).ok


def test_an_unreadable_schema_is_no_error():
    for parameters in (None, [], {"properties": [1]}, {"properties": {"x": 3}}):
        tools = [{"type": "function", "function": {"name": "area", "parameters": parameters}}]
        for seed in range(20):
            assert mistaken(GOLD, False, tools, "", random.Random(seed)) != GOLD


def test_reflection_stop_must_be_a_share():
    with pytest.raises(ValueError, match="reflection_stop must be between 0 and 1, got 2"):
        FunctionCalling(reflection_stop=2.0)


def test_transcripts_of_the_berkeley_files():
    pytest.importorskip("bfcl_eval")
    task = get_task("function_calling", {"categories": "all", "reflection_stop": 0.5})
    assert isinstance(task, WarmStartTask) and isinstance(task, FunctionCalling)
    stopped = whole = 0
    for number, example in enumerate(task.examples("train", 1200)):
        one = task.transcript(example, random.Random(number))
        assert task.verify(example, one.attempt).ok == (one.reflection is None)
        if one.reflection is not None and one.retry is not None:
            again = task.transcript(example, random.Random(-number), one.attempt)
            assert again.attempt == one.attempt
            stopped += not task.verify(example, one.retry).ok
            whole += task.verify(example, one.retry).ok
    assert stopped > 100 and whole > 100
    assert task.transcript(example, random.Random(3)) == task.transcript(example, random.Random(3))


@pytest.mark.parametrize(
    ("attempt", "begin"),
    [
        ("I would book a tent.", "The answer calls no function. A call of "),
        ("", "The answer calls no function. A call of "),
        ('[{"name": "book_tent", "argu', "The answer cannot be read as JSON calls. A call of "),
        ('[{"name": "\\ud800", "arguments": {}}]', "The answer cannot be read as JSON calls. A call of "),
        ("[]", "A call of "),
        ('[{"name": "book_moon", "arguments": {"x": [{"y": null}]}}]', "book_moon is the wrong function"),
        ('[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]', "f is the wrong function"),
    ],
)
def test_any_wrong_answer_can_be_reflected_on(attempt, begin):
    task = get_task("function_calling_generated", {"reflection_stop": 0.0})
    for example in task.examples("train", 3):
        transcript = task.transcript(example, random.Random(0), attempt)
        assert transcript.attempt == attempt and transcript.reflection.startswith(begin)
        transcript.reflection.encode()
        assert task.verify(example, transcript.retry).ok


def test_calls_in_another_order_are_compared_with_those_they_resemble():
    gold = [{"name": "f", "arguments": {"a": value}} for value in (1, 2, 3)]
    calls = [{"name": "f", "arguments": {"a": value}} for value in (3, 9, 1)]
    said, mended = reflection(calls, gold, False, None)
    assert re.findall("must be.*?[.]", said) == ["must be 2, not 9."] and mended == gold
    said, mended = reflection(calls[:1], gold, False, 1)  # the third alone; it stops after the first finding
    assert said == 'A call of f is missing: {"a": 1}.' and mended == [gold[0], gold[2]]
