"""The Berkeley Function-Calling Leaderboard's single-turn files, from the installed package `bfcl-eval`.

The package is not imported; only its data files are read. Their answers list the accepted values of each
argument. Left out: Java and JavaScript, several turns with tool results, and `live_relevance`, which has no
gold calls.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grpo.tasks.function_calling.data import Record, Skipped, tool
from grpo.tasks.function_calling.json_calls import Call, Unreadable, read_json

CATEGORIES = (
    "simple_python multiple parallel parallel_multiple irrelevance "
    "live_simple live_multiple live_parallel live_parallel_multiple live_irrelevance"
).split()
INSTALL = "pip install --no-deps bfcl-eval"
TESTED = "the version of bfcl-eval that this was tested with is in constraints.txt"


class Berkeley:
    """Records of all categories, chosen or not, so that the splits do not depend on the choice.

    What cannot be used is reported for the chosen ones only.
    """

    accepted = True

    def __init__(self, chosen: set[str]) -> None:
        self.folder, self.chosen = _folder(), chosen
        self._lines: list[tuple[bytes, bytes]] = []  # question, answer

    def __str__(self) -> str:
        return f"the Berkeley files in {self.folder}"

    def scan(self, skipped: Skipped) -> Iterator[tuple[int, Record]]:
        self._lines = []
        for category in CATEGORIES:
            for line, answer in self._pairs(category):
                number = len(self._lines)
                self._lines.append((line, answer))
                record = self.read(number)
                if (missing := _without_accepted_value(record.gold)) is not None:
                    if category in self.chosen:
                        skipped.add(record.id, f"no value is accepted for {missing!r}, so no answer is right")
                    continue
                yield number, record

    def read(self, number: int) -> Record:
        question, answer = self._lines[number]
        try:
            record = _record(read_json(question.decode()), read_json(answer.decode())["ground_truth"])
            if b"\\ud" in (question + answer).lower():  # half of a surrogate pair is no text
                json.dumps(vars(record), ensure_ascii=False).encode()
            return record
        except (Unreadable, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            line = question[:80].decode(errors="replace")
            raise ValueError(f"{self}: {line}... cannot be read ({error!r}); {TESTED}") from None

    def _pairs(self, category: str) -> Iterator[tuple[bytes, bytes]]:
        """Questions with their answers. If no tool fits, the files have no answer."""
        questions = self._by_id(_file(category))
        no_calls = dict.fromkeys(questions, b'{"ground_truth": []}')
        answers = no_calls if "irrelevance" in category else self._by_id(f"possible_answer/{_file(category)}")
        if missing := questions.keys() - answers.keys():
            raise ValueError(f"{self}: no answer to {min(map(str, missing))}; {TESTED}")
        for identifier, line in questions.items():
            yield line, answers[identifier]

    def _by_id(self, name: str) -> dict[str, bytes]:
        try:
            lines = (self.folder / name).read_bytes().splitlines()
            return {json.loads(line)["id"]: line for line in lines if line.strip()}
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{self.folder / name} cannot be read ({error}); {TESTED}") from None


def category_of(record: Record) -> str:
    return record.id.rpartition("_")[0]  # live_simple_112-68-0


def _record(entry: dict[str, Any], truth: list[dict[str, Any]]) -> Record:
    """Raises whatever it meets where the lines have another form than those of the tested version."""
    tools = [tool(given["name"], given["description"], given["parameters"]) for given in entry["function"]]
    gold = [{"name": name, "arguments": args} for call in truth for name, args in call.items()]
    messages = _messages(entry["question"][0])
    texts = [entry["id"], *(text for message in messages for text in message.values())]
    texts += [text for one in tools for text in (one["function"]["name"], one["function"]["description"])]
    lists = [accepted for call in gold for accepted in call["arguments"].values()]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("id, messages, names and descriptions must be strings")
    if not all(isinstance(accepted, list) for accepted in lists) or messages[-1]["role"] != "user":
        raise TypeError("accepted values must be lists, and the last message the user's")
    return Record(entry["id"], messages, tools, gold)


def _file(category: str) -> str:
    return f"BFCL_v4_{category}.json"


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
    """Joins neighbouring messages of one role: many templates require that roles alternate."""
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
