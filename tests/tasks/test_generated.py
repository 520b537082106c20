"""Task function_calling_generated: right answers, mistakes, tools of one split each, lengths, options."""

import json
import random
from types import SimpleNamespace

import pytest

from grpo import config
from grpo.tasks import SPLITS, get_task
from grpo.tasks.contract import check_task
from grpo.tasks.function_calling import generated
from grpo.tasks.function_calling.generated import ACTIONS, PARAMETERS, THINGS
from grpo.tasks.function_calling.mistakes import text_of

NAME = "function_calling_generated"
COUNT = 30
OPTIONS = [
    {},
    {"num_tools": 1, "num_parameters": 1, "num_distractors": 0},
    {"num_tools": 10, "num_parameters": len(PARAMETERS), "num_distractors": 6, "seed": 3},
]
TYPES = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("takes_tools", [False, True])
def test_the_contract(options, takes_tools):
    needs = {split: {"count": 20} for split in SPLITS}
    check_task(get_task(NAME, options), needs, SimpleNamespace(takes_tools=takes_tools), transcripts=True)


@pytest.mark.parametrize("options", OPTIONS)
def test_right_calls_are_accepted_and_mistakes_are_not(options):
    task, rng = get_task(NAME, options), random.Random(1)
    for split in SPLITS:
        for example in task.examples(split, COUNT):
            assert task.verify(example, text_of(example.data["gold"])).ok
            transcript = task.transcript(example, rng)
            assert task.verify(example, transcript.attempt).ok == (transcript.reflection is None)
            if transcript.reflection:
                whole = task.transcript(example, SimpleNamespace(random=lambda: 1.0), transcript.attempt)
                assert task.verify(example, whole.retry).ok


@pytest.mark.parametrize("options", OPTIONS)
def test_calls_fit_their_schemas_and_questions_state_the_values(options):
    for example in get_task(NAME, options).examples("train", COUNT):
        ((name, arguments),) = [(call["name"], call["arguments"]) for call in example.data["gold"]]
        offered = [tool["function"] for tool in example.data["tools"]]
        assert len({tool["name"] for tool in offered}) == len(offered) == options.get("num_tools", 3)
        (schema,) = [tool["parameters"] for tool in offered if tool["name"] == name]
        assert len(schema["properties"]) == options.get("num_parameters", 3)
        assert set(schema["required"]) <= set(arguments) <= set(schema["properties"])
        for key, value in arguments.items():
            kind = schema["properties"][key]
            assert isinstance(value, TYPES[kind["type"]])
            assert isinstance(value, bool) == (kind["type"] == "boolean")
            assert value in kind.get("enum", [value])
            assert PARAMETERS[key].say(value) in example.prompt
        assert example.prompt.count(". ") == options.get("num_distractors", 1)


def test_no_tool_is_in_two_splits():
    task = get_task(NAME, {"num_tools": 5})
    tools = {}
    for split in SPLITS:
        functions = [t["function"] for e in task.examples(split, 200) for t in e.data["tools"]]
        tools[split] = [{function[key] for function in functions} for key in ("name", "description")]
    for field in (0, 1):
        sets = [tools[split][field] for split in SPLITS]
        assert sum(map(len, sets)) == len(set.union(*sets)) == len(ACTIONS) * len(THINGS)
        assert min(map(len, sets)) >= 5 * len(ACTIONS)


def test_a_function_of_the_options_that_does_not_repeat():
    one, other = get_task(NAME), get_task(NAME)
    assert other.examples("heldout", 5, offset=40)  # the order of requests does not matter
    examples = one.examples("train", 600)
    assert other.examples("train", 100, offset=500) == examples[500:]
    assert len({example.id for example in examples}) == 600
    seeded = get_task(NAME, {"seed": 1})
    assert seeded.examples("train", 50) != examples[:50]
    tools = {t["function"]["name"]: t for e in examples for t in e.data["tools"]}
    assert all(
        tools.get(t["function"]["name"], t) == t
        for e in seeded.examples("train", 50)
        for t in e.data["tools"]
    )


def test_the_preset_asks_for_prompts_and_answers_within_its_limits():
    c = config.parse(["--preset", NAME])
    task = get_task(c.task, c.task_options)
    examples = task.examples("train", c.num_examples + c.warm_start_examples)
    # A token of JSON has more than two characters: answers and reflections of transcripts have room.
    assert max(len(text_of(example.data["gold"])) for example in examples) < 2 * c.max_completion_length
    rng = random.Random(0)
    longest = max(len(task.transcript(example, rng).reflection or "") for example in examples)
    assert longest < 2 * c.max_reflection_length + 40
    assert max(len(json.dumps(example.data["tools"])) for example in examples) < 1200
    assert task.examples("heldout", c.num_eval)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tools": 0}, "num_tools must be between 1 and 10, got 0"),
        ({"num_parameters": 12}, "num_parameters must be between 1 and 11, got 12"),
        ({"num_distractors": -1}, "num_distractors must be between 0 and 6, got -1"),
        ({"reflection_stop": 2.0}, "reflection_stop must be between 0 and 1, got 2.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        get_task(NAME, options)


def test_more_problems_than_the_templates_make(monkeypatch):
    monkeypatch.setattr(generated, "PATIENCE", 2)  # draws without a new problem
    task = get_task(NAME, {"num_tools": 1, "num_parameters": 1, "num_distractors": 0})
    with pytest.raises(
        ValueError, match=r"split 'validation' has \d+ examples, but offset 0 plus count 99999 were"
    ):
        task.examples("validation", 99999)
