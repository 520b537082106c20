"""Worked conversations about function calls: a wrong answer, what is wrong with it, a better one.

The wrong answer is a right one with one or two mistakes put in, or the model's own. The right calls are
known, so everything that the reflection says is true. It checks the arguments one by one, as Countdown's
reflections check combinations. Some stop early, so RL starts with both behaviours, stopping and continuing.
The retry corrects exactly the mistakes that the reflection found. Left out: why a value is right, which takes
understanding.
"""

from __future__ import annotations

import copy
import itertools
import json
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

from grpo.tasks import END_THINK
from grpo.tasks.function_calling.json_calls import Call
from grpo.tasks.function_calling.matching import compare, equal

NO_CALL = "None of the functions can answer this."
PATIENCE = 20  # mistakes tried until one makes the answer wrong


def right_calls(gold: list[Call], accepted: bool) -> list[Call]:
    """An accepted answer: the first accepted value of each argument, optional ones left out."""
    if not accepted:
        return [{"name": call["name"], "arguments": dict(call["arguments"])} for call in gold]
    return [
        {
            "name": call["name"],
            "arguments": {
                key: concrete(values[0]) for key, values in call["arguments"].items() if "" not in values
            },
        }
        for call in gold
    ]


def concrete(accepted: Any) -> Any:
    """An accepted value as it would be written. Inside objects, values are lists of accepted values again."""
    if isinstance(accepted, dict):
        chosen = {key: alternatives(values) for key, values in accepted.items()}
        return {key: concrete(values[0]) for key, values in chosen.items() if values}
    if isinstance(accepted, list):
        return [concrete(item) for item in accepted]
    return accepted


def alternatives(values: Any) -> list[Any]:
    """The accepted values without "", which means that the argument may be left out."""
    return [value for value in values if value != ""] if isinstance(values, list) else [values]


def text_of(calls: list[Call]) -> str:
    """The calls in the form that the prompt asks for: a JSON list, or prose if there is nothing to call.

    A `</think>` in a string is escaped, because it would end a thought.
    """
    return json.dumps(calls, ensure_ascii=False).replace(END_THINK, r"<\/think>") if calls else NO_CALL


# --- making a mistake ---------------------------------------------------------------------------------------


def mistaken(
    gold: list[Call], accepted: bool, tools: list[dict[str, Any]], question: str, rng: random.Random
) -> list[Call]:
    """A right answer with one or two mistakes in it, which is wrong by `compare`."""
    right = right_calls(gold, accepted)
    schemas = {tool["function"]["name"]: _properties(tool["function"]) for tool in tools}
    if not right:
        name = rng.choice(sorted(schemas))
        return [{"name": name, "arguments": {key: _example(schemas[name][key]) for key in schemas[name]}}]
    for _ in range(PATIENCE):
        calls = copy.deepcopy(right)
        for _ in range(1 if rng.random() < 0.7 else 2):
            _spoil(rng.choice(calls), schemas, question, rng)
        if compare(calls, gold, accepted) != "ok":
            return calls
    return right[:-1] or [*right, *right]


def _spoil(call: Call, schemas: dict[str, dict[str, Any]], question: str, rng: random.Random) -> None:
    """One mistake, in place."""
    args, properties = call["arguments"], schemas.get(call["name"], {})
    others = sorted(set(schemas) - {call["name"]})
    more = sorted(set(properties) - set(args))
    kinds: list[Callable[[], None]] = []
    if args:
        key = rng.choice(sorted(args))
        value = _other(args[key], properties.get(key, {}), question, rng)
        # a wrong value is by far the most common mistake, so it has three chances
        kinds += 3 * [lambda: args.update({key: value})] + [lambda: args.pop(key)]
    if more:
        extra = rng.choice(more)
        kinds.append(lambda: args.update({extra: _example(properties[extra])}))
    if others:
        kinds.append(lambda: call.update(name=rng.choice(others)))
    if kinds:
        rng.choice(kinds)()


def _other(value: Any, schema: dict[str, Any], question: str, rng: random.Random) -> Any:
    """A plausible wrong value."""
    choices = [choice for choice in _enum(schema) if not equal(choice, value)]
    if choices:
        return rng.choice(choices)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        numbers = [int(text) for text in re.findall(r"\d{1,9}", question) if int(text) != value]
        return rng.choice([*numbers, value + 1, str(value)])
    if isinstance(value, str):
        words = [word.strip("?!.,;:'\"()") for word in question.split()]
        return rng.choice([word for word in words if word and word.lower() != value.lower()] or [value + "s"])
    if isinstance(value, list) and value:
        return value[:-1] if rng.random() < 0.5 else [*value, value[0]]
    return _example(schema)


def _properties(function: dict[str, Any]) -> dict[str, Any]:
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    return (
        {key: schema for key, schema in properties.items() if isinstance(schema, dict)}
        if isinstance(properties, dict)
        else {}
    )


def _enum(schema: dict[str, Any]) -> list[Any]:
    return schema["enum"] if isinstance(schema.get("enum"), list) else []


def _example(schema: dict[str, Any]) -> Any:
    """A neutral value of the schema's type."""
    if "default" in schema:
        return schema["default"]
    if _enum(schema):
        return _enum(schema)[0]
    return {"integer": 1, "number": 1.0, "boolean": True, "array": [], "object": {}}.get(
        str(schema.get("type")), "any"
    )


# --- saying what is wrong -----------------------------------------------------------------------------------


def reflection(
    calls: list[Call], gold: list[Call], accepted: bool, checks: int | None
) -> tuple[str, list[Call]]:
    """The findings of a reader of the answer, and the answer with these mistakes corrected.

    Args:
        calls: the wrong answer; none if it has no calls.
        checks: after how many to stop; None to go on to the end.
    """
    if not gold:
        name = calls[0]["name"] if calls else "A call"
        return f"{name} does not answer this, and no other function does.", []
    mended = _paired(copy.deepcopy(calls), gold, accepted)
    said = list(itertools.islice(_findings(mended, gold, accepted), checks))
    return " ".join(said), [call for call in mended if call is not None]


def _paired(calls: list[Call], gold: list[Call], accepted: bool) -> list[Call | None]:
    """The calls in the order of `gold`, None for a missing one; those that are too many come last.

    A call goes to the right call that it equals, else to one of its name, else to any that is left; among
    equals, to the one at its own place.
    """
    left = list(range(len(calls)))
    pairs: list[Call | None] = [None] * len(gold)
    resemble: tuple[Callable[[Call, Call], bool], ...] = (
        lambda call, right: compare([call], [right], accepted) == "ok",
        lambda call, right: call["name"] == right["name"],
        lambda call, right: True,
    )
    for like, own_place in itertools.product(resemble, (True, False)):
        for place, right in enumerate(gold):
            candidates = [n for n in left if (n == place or not own_place) and like(calls[n], right)]
            if pairs[place] is None and candidates:
                pairs[place] = calls[candidates[0]]
                left.remove(candidates[0])
    return [*pairs, *(calls[n] for n in left)]


def _findings(calls: list[Call | None], gold: list[Call], accepted: bool) -> Iterator[str]:
    """One sentence for each part, in order. A wrong part is corrected in place first."""
    for place, wanted in enumerate(right_calls(gold, accepted)):
        call = calls[place]
        if call is None:
            calls[place] = copy.deepcopy(wanted)
            yield f"A call of {wanted['name']} is missing: {_json(wanted['arguments'])}."
            continue
        args = call["arguments"]
        if (name := call["name"]) == wanted["name"]:
            yield f"{name} is the right function."
        else:
            call["name"] = wanted["name"]
            yield f"{name} is the wrong function, {wanted['name']} is right."
        for key in [*wanted["arguments"], *(key for key in args if key not in wanted["arguments"])]:
            if key in args and _fits(key, args[key], gold[place], accepted):
                yield f"{key} {_json(args[key])} fits."
            elif key not in wanted["arguments"]:
                del args[key]
                yield f"{key} is not asked for."
            else:
                value = _json(wanted["arguments"][key])
                correction = (
                    f"must be {value}, not {_json(args[key])}" if key in args else f"is missing: {value}"
                )
                args[key] = wanted["arguments"][key]
                yield f"{key} {correction}."
    if len(calls) > len(gold):
        del calls[len(gold) :]
        yield "There is a call too many."


def _fits(key: str, value: Any, gold: Call, accepted: bool) -> bool:
    """Whether the verifier takes this value, which may be another than the first accepted one."""
    if key not in gold["arguments"]:
        return False
    given, accepted_call = (
        {"name": "", "arguments": {key: held}} for held in (value, gold["arguments"][key])
    )
    return compare([given], [accepted_call], accepted) == "ok"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
