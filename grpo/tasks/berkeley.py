"""The Berkeley Function-Calling Leaderboard's single-turn files, from the installed package `bfcl-eval`.

Nothing of the package is imported: its files are read where they lie. Its answers list the accepted values of
each argument. Left out: Java and JavaScript, several turns with tool results, and `live_relevance`, whose
right calls nobody has written down.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grpo.tasks.call_json import Call
from grpo.tasks.function_data import Record, Skipped, tool

CATEGORIES = (
    "simple_python multiple parallel parallel_multiple irrelevance "
    "live_simple live_multiple live_parallel live_parallel_multiple live_irrelevance"
).split()
INSTALL = "pip install --no-deps bfcl-eval"


class Berkeley:
    """All categories, whichever are chosen: so the splits do not depend on the choice.

    What cannot be used is reported for the chosen ones only.
    """

    accepted = True

    def __init__(self, chosen: set[str]) -> None:
        self.folder, self.chosen = _folder(), chosen
        self._lines: list[tuple[str, bytes, bytes]] = []  # category, question, answer

    def __str__(self) -> str:
        return f"the Berkeley files in {self.folder}"

    def scan(self, skipped: Skipped) -> Iterator[tuple[int, Record]]:
        self._lines = []
        for category in CATEGORIES:
            answers = (
                {}
                if "irrelevance" in category
                else _by_id(self._lines_of(f"possible_answer/{_file(category)}"))
            )
            for line in self._lines_of(_file(category)):
                identifier = json.loads(line)["id"]
                if "irrelevance" not in category and identifier not in answers:
                    self._skip(skipped, category, identifier, "has no answer")
                    continue
                self._lines.append((category, line, answers.get(identifier, b'{"ground_truth": []}')))
                record = self.read(len(self._lines) - 1)
                if missing := _without_accepted_value(record.gold):
                    why = f"no value is accepted for {missing}, so no answer is right"
                    self._skip(skipped, category, identifier, why)
                    continue
                yield len(self._lines) - 1, record

    def read(self, number: int) -> Record:
        category, question, answer = self._lines[number]
        entry, truth = json.loads(question), json.loads(answer)["ground_truth"]
        tools = [tool(one["name"], one["description"], one["parameters"]) for one in entry["function"]]
        gold = [{"name": name, "arguments": args} for call in truth for name, args in call.items()]
        return Record(f"{category}:{entry['id']}", _messages(entry["question"][0]), tools, gold)

    def _skip(self, skipped: Skipped, category: str, identifier: str, why: str) -> None:
        if category in self.chosen:
            skipped.add(identifier, why)

    def _lines_of(self, name: str) -> list[bytes]:
        try:
            return [line for line in (self.folder / name).read_bytes().splitlines() if line.strip()]
        except OSError as error:
            raise ValueError(
                f"{self.folder / name} cannot be read ({error.strerror}): this bfcl-eval lays its data out "
                f"differently; the tested version is in constraints.txt"
            ) from None


def category_of(record: Record) -> str:
    return record.id.partition(":")[0]


def _file(category: str) -> str:
    return f"BFCL_v4_{category}.json"


def _by_id(lines: list[bytes]) -> dict[str, bytes]:
    return {json.loads(line)["id"]: line for line in lines}


def _folder() -> Path:
    spec = importlib.util.find_spec("bfcl_eval")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(place) / "data").is_dir():
            return Path(place) / "data"
    raise ValueError(
        "function_calling needs the Berkeley files or a data_path; got neither, since the package bfcl-eval "
        f"is not installed: {INSTALL}, or task_options data_path=FILE (xLAM's JSON)"
    )


def _messages(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """Neighbours of one role as one message: many templates insist that roles take turns."""
    merged: list[dict[str, str]] = []
    for message in messages:
        if merged and merged[-1]["role"] == message["role"]:
            merged[-1]["content"] += f"\n\n{message['content']}"
        else:
            merged.append({"role": message["role"], "content": message["content"]})
    return merged


def _without_accepted_value(gold: list[Call]) -> str | None:
    pairs: Any = (pair for call in gold for pair in call["arguments"].items())
    return next((name for name, accepted in pairs if accepted == []), None)
