"""Function-calling problems made from templates: small tools with typed arguments, and a question for one.

A tool is an action on a thing, such as `book_tent`. Its parameters are drawn once, from its name. A question
states all required arguments and some optional ones. It may add sentences that have nothing to do with it but
contain numbers, dates and names. The other tools of a problem are for the same thing or for another. Each
thing is in one split, so no name or description of a tool is in two.

Left out: several calls, nested arguments, and questions that no tool answers (the Berkeley files have these).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

from grpo.tasks import SPLITS
from grpo.tasks.function_calling.data import Record, hashed_place, tool
from grpo.tasks.function_calling.json_calls import Call

HELDOUT_SHARE, VALIDATION_SHARE = 0.25, 0.15  # of the things
OPTIONAL_SHARE = 0.4  # of a tool's parameters, without the first; the question states half of them
PATIENCE = 1_000  # draws without a new problem after which there are no more

THINGS = (
    "bicycle bookshelf boat camera car caravan desk drone fridge grill guitar heater kayak keyboard lamp "
    "laptop mattress microscope mirror piano printer projector radio scooter sled sofa surfboard telescope "
    "tent tractor trailer typewriter violin wardrobe windmill yacht"
).split()
ACTIONS = {  # in the tool's name: its description, and how questions ask for it
    "book": ("Books a {} for a customer.", ("Book a {}", "Reserve a {}", "I would like to book a {}")),
    "find": ("Searches the catalogue for a {}.", ("Find a {}", "Look for a {}", "Search for a {}")),
    "order": ("Orders a new {}.", ("Order a new {}", "I want to order a {}", "Buy a new {}")),
    "repair": (
        "Has a {} repaired.",
        ("Have my {} repaired", "My {} is broken: get it repaired", "Repair my {}"),
    ),
    "insure": (
        "Insures a {}.",
        ("Insure my {}", "I need insurance for my {}", "Take out insurance for a {}"),
    ),
    "sell": ("Offers a {} for sale.", ("Sell my {}", "Put my {} up for sale", "Offer my {} for sale")),
}
CITIES = "Accra Berlin Boston Cairo Dublin Hanoi Kyoto Lagos Lima Madrid Oslo Perth Quito Rome Tunis".split()
NAMES = "Ada Boris Clara Diego Emma Farid Greta Hugo Ines Jonas Kavya Liam Mona Nils Olga Pedro".split()
COLORS, SIZES = ["red", "green", "blue", "black"], ["small", "medium", "large"]
EXTRAS = ["bag", "cover", "lock", "manual", "stand"]


@dataclass(frozen=True)
class Parameter:
    """A parameter that tools may have.

    Attributes:
        schema: JSON Schema.
        draw: a value.
        say: how a question states it.
    """

    schema: dict[str, Any]
    draw: Callable[[Random], Any]
    say: Callable[[Any], str]


def _day(rng: Random) -> str:
    return f"2026-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"


def _parameter(
    kind: str, description: str, draw: Callable[[Random], Any], phrase: str, **more: Any
) -> Parameter:
    return Parameter({"type": kind, "description": description, **more}, draw, phrase.format)


PARAMETERS = {
    "city": _parameter("string", "city", lambda rng: rng.choice(CITIES), "in {}"),
    "customer": _parameter("string", "first name", lambda rng: rng.choice(NAMES), "for {}"),
    "date": _parameter("string", "day as YYYY-MM-DD", _day, "on {}"),
    "days": _parameter("integer", "duration in days", lambda rng: rng.randint(2, 30), "for {} days"),
    "people": _parameter("integer", "number of people", lambda rng: rng.randint(2, 12), "for {} people"),
    "max_price": _parameter(
        "number", "highest price in euros", lambda rng: rng.randint(20, 999) + rng.choice([0, 0.5]),
        "for at most {} euros",
    ),
    "weight": _parameter(
        "number", "weight in kg", lambda rng: rng.randint(1, 60) + rng.choice([0, 0.5]), "of {} kg"
    ),
    "color": _parameter("string", "color", lambda rng: rng.choice(COLORS), "in {}", enum=COLORS),
    "size": _parameter("string", "size", lambda rng: rng.choice(SIZES), "of {} size", enum=SIZES),
    "express": Parameter(
        {"type": "boolean", "description": "whether it is urgent"},
        lambda rng: rng.random() < 0.5,
        lambda urgent: "as an urgent matter" if urgent else "as a matter that is not urgent",
    ),
    "extras": Parameter(
        {"type": "array", "items": {"type": "string"}, "description": "accessories"},
        lambda rng: rng.sample(EXTRAS, rng.randint(1, 2)),
        lambda items: "with " + " and ".join(f"a {item}" for item in items),
    ),
}  # fmt: skip
DISTRACTORS: tuple[Callable[[Random], str], ...] = (
    lambda rng: f"My last request had the number {rng.randint(1000, 9999)}.",
    lambda rng: f"I first asked about this on {_day(rng)}.",
    lambda rng: f"My sister {rng.choice(NAMES)} lives in {rng.choice(CITIES)}.",
    lambda rng: f"A neighbour paid {rng.randint(20, 999)} euros for hers.",
    lambda rng: f"I have waited for {rng.randint(2, 30)} days.",
    lambda rng: f"There are {rng.randint(2, 12)} people in my household.",
)


class Problems:
    """Problems of each split, in an order that depends on the options alone.

    Args:
        num_tools: tools that a problem offers.
        num_parameters: parameters of each tool.
        num_distractors: sentences in the question that have nothing to do with it.
        seed: of the problems. The tools, and which split they are in, do not depend on it.
    """

    def __init__(self, num_tools: int, num_parameters: int, num_distractors: int, seed: int) -> None:
        self.num_tools, self.num_distractors = num_tools, num_distractors
        self._things = _things()
        self._tools = {
            (action, thing): _tool(action, thing, num_parameters) for action in ACTIONS for thing in THINGS
        }
        self._ready: dict[str, list[Record]] = {split: [] for split in SPLITS}
        self._sources = {
            split: self._drawn(split, Random(f"function_calling_generated {seed} {split}"))
            for split in SPLITS
        }

    def records(self, split: str, start: int, stop: int) -> list[Record]:
        """Raises ValueError where the templates make no more problems."""
        ready = self._ready[split]
        while len(ready) < stop:
            record = next(self._sources[split], None)
            if record is None:
                raise ValueError(
                    f"split {split!r} has {len(ready)} examples, but offset {start} plus count "
                    f"{stop - start} were asked for; raise num_tools, num_parameters or num_distractors"
                )
            ready.append(record)
        return ready[start:stop]

    def _drawn(self, split: str, rng: Random) -> Iterator[Record]:
        """Random problems, each once; ends when no new ones turn up."""
        seen: set[str] = set()
        misses = 0
        while misses < PATIENCE:
            record = self._record(split, rng)
            misses = misses + 1 if record.id in seen else 0
            if not misses:
                seen.add(record.id)
                yield record

    def _record(self, split: str, rng: Random) -> Record:
        action, thing = rng.choice([*ACTIONS]), rng.choice(self._things[split])
        chosen = self._tools[action, thing]
        offered = [chosen, *self._others(action, thing, split, rng)]
        rng.shuffle(offered)
        schema = chosen["function"]["parameters"]
        arguments = {
            key: PARAMETERS[key].draw(rng)
            for key in schema["properties"]
            if key in schema["required"] or rng.random() < 0.5
        }
        question = self._question(action, thing, arguments, rng)
        gold: list[Call] = [{"name": chosen["function"]["name"], "arguments": arguments}]
        digest = hashlib.sha256(json.dumps([question, offered]).encode()).hexdigest()
        return Record(f"generated:{digest[:16]}", [{"role": "user", "content": question}], offered, gold)

    def _others(self, action: str, thing: str, split: str, rng: Random) -> list[dict[str, Any]]:
        """Other tools of the split: half of them for the same thing, as far as there are enough."""
        near = [(other, thing) for other in ACTIONS if other != action]
        far = [(other, another) for other in ACTIONS for another in self._things[split] if another != thing]
        count = self.num_tools - 1
        close = min(sum(rng.random() < 0.5 for _ in range(count)), len(near))
        return [self._tools[key] for key in [*rng.sample(near, close), *rng.sample(far, count - close)]]

    def _question(self, action: str, thing: str, arguments: dict[str, Any], rng: Random) -> str:
        stated = [PARAMETERS[key].say(value) for key, value in arguments.items()]
        rng.shuffle(stated)
        request = " ".join([rng.choice(ACTIONS[action][1]).format(thing), *stated])
        sentences = [f"{request}.", *(make(rng) for make in rng.sample(DISTRACTORS, self.num_distractors))]
        rng.shuffle(sentences)
        return " ".join(sentences)


def _things() -> dict[str, list[str]]:
    """The things of each split."""
    ordered = sorted(THINGS, key=hashed_place)
    heldout = round(HELDOUT_SHARE * len(ordered))
    validation = heldout + round(VALIDATION_SHARE * len(ordered))
    return {
        "heldout": ordered[:heldout],
        "validation": ordered[heldout:validation],
        "train": ordered[validation:],
    }


def _tool(action: str, thing: str, num_parameters: int) -> dict[str, Any]:
    """A tool as chat templates take it; the same in every run."""
    name = f"{action}_{thing}"
    rng = Random(f"parameters of {name}")
    keys = rng.sample([*PARAMETERS], num_parameters)
    optional = {key for key in keys[1:] if rng.random() < OPTIONAL_SHARE}
    parameters = {
        "type": "object",
        "properties": {key: PARAMETERS[key].schema for key in keys},
        "required": [key for key in keys if key not in optional],
    }
    return tool(name, ACTIONS[action][0].format(thing), parameters)
