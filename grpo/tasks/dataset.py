"""Problems from a file or a Hugging Face dataset, judged by a verifier that is named: a task without code.

rows.py reads the data, verifiers.py judges the answers; this file makes examples of the rows and splits them.
Left out: transcripts for a warm start, tools, images, and data that do not fit in memory.
"""

from __future__ import annotations

import hashlib
import json
import random
import string
import time
from collections.abc import Sequence
from typing import Any

from grpo.tasks import SPLITS, Example, TaskError, Verdict, check_split, register, verifiers, warn
from grpo.tasks.function_calling.data import Skipped
from grpo.tasks.rows import Malformed, Row, read_splits, require, text_of, value_of

Message = dict[str, str]
ROLES = ("system", "user", "assistant")
PROBE_SECONDS = 10.0  # for judging answers before a run


@register("dataset")
class Dataset:
    """Rows of a table as examples.

    Args:
        path: a file (JSON lines, JSON, CSV, Parquet), a folder with a file for each split, a Hugging Face id,
            or a folder saved by `datasets`.
        prompt: column with the question: text, or chat messages of which the last is the user's.
        answer: column with the right answer; default: `answer`. Functions can do without.
        verifier: see grpo/tasks/verifiers.py; several functions as a list, or joined by "+".
        template: text with columns in braces, such as "{question} Give a number."; instead of `prompt`.
        system: system message, if the row has none of its own.
        train, validation, heldout: the file of the split, or the split of the Hugging Face dataset.
        subset: of a Hugging Face dataset, such as `main`.
        validation_share, heldout_share: of the train rows, for splits that the data do not have.
        drop_duplicates: a prompt in several splits is dropped from all but the last, instead of refused.
        weights: of the functions, as a list or joined by "+"; default: 1 each.
        timeout: seconds for one verdict of regex, math (default 10) and functions (default 60).
        keep_thoughts: functions also get what precedes the last </think>.
        reflection_instruction: asks for the reflection.
        seed: order of the examples; does not change which split a row is in.
    """

    name = "dataset"

    def __init__(
        self,
        path: str | None = None,
        prompt: str = "prompt",
        answer: str | None = None,
        verifier: str | list[str] = "exact",
        template: str | None = None,
        system: str | None = None,
        train: str | None = None,
        validation: str | None = None,
        heldout: str | None = None,
        subset: str | None = None,
        validation_share: float = 0.1,
        heldout_share: float = 0.2,
        drop_duplicates: bool = False,
        weights: str | float | list[float] | None = None,
        timeout: float | None = None,
        keep_thoughts: bool = False,
        reflection_instruction: str = "Your answer was wrong. Reflect on what went wrong and write a short "
        "explanation that will help you do better next time.",
        seed: int = 0,
    ) -> None:
        if not 0 < heldout_share < 1 or not 0 < validation_share < 1 - heldout_share:
            raise ValueError(
                "heldout_share and validation_share must be above 0, and below 1 together, got "
                f"{heldout_share} and {validation_share}"
            )
        if timeout is not None and not 0 < timeout < 1e6:
            raise ValueError(f"timeout must be above 0 seconds, got {timeout}")
        self.system, self.reflection_instruction = system, reflection_instruction
        named = {"train": train, "validation": validation, "heldout": heldout}
        skipped = Skipped()
        rows = read_splits(path, subset, {split: file for split, file in named.items() if file}, skipped)
        every = [row for part in rows.values() for row in part]
        if not every:
            raise ValueError(f"the data have no usable row: {skipped}")
        names = _names(verifier)
        self._functions = all(each.startswith("function:") for each in names)
        self._prompt = _Prompt(every, prompt, template)
        self._answer = _answer_column(every, answer, self._functions)
        self._columns = list(dict.fromkeys(column for row in every for column in row.values))
        self._verifier = verifiers.verifier(
            names,
            weights=_weights(weights),
            seconds=timeout,
            keep_thoughts=keep_thoughts,
            columns=self._columns,
        )
        self.format_reasons = self._verifier.format_reasons
        usable = {split: self._usable(part, skipped) for split, part in rows.items()}
        _report(skipped, sum(map(len, usable.values())))
        _refuse_duplicates(usable, drop_duplicates)
        self._splits = _split(usable, validation_share, heldout_share)
        for split, part in self._splits.items():
            random.Random(f"dataset order {seed} {split}").shuffle(part)

    def examples(self, split: str, count: int, offset: int = 0) -> list[Example]:
        check_split(split)
        if count < 0 or offset < 0:
            raise ValueError(f"count and offset must be at least 0, got {count} and {offset}")
        part = self._splits[split]
        if offset + count > len(part):
            sizes = ", ".join(f"{name} {len(rows)}" for name, rows in self._splits.items())
            raise ValueError(
                f"split {split!r} has {len(part)} examples (all: {sizes}), but offset {offset} plus count "
                f"{count} were asked for"
            )
        return part[offset : offset + count]

    def opening(self, example: Example, with_tools: bool) -> tuple[list[Message], None]:
        """The messages of the row, or system message and prompt."""
        messages = example.data.get("messages") or [{"role": "user", "content": example.prompt}]
        if self.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        return messages, None

    def verify(self, example: Example, text: str) -> Verdict:
        return self._verifier.verify(self._judged(example), text)

    def leaks(self, example: Example, reflection: str) -> bool:
        return self._verifier.states(self._judged(example), reflection)

    def check(self, examples: Sequence[Example]) -> None:
        """Judges answers to the examples before a run, as many as a few seconds allow.

        Raises:
            ValueError: an answer cannot be judged, or no right answer is accepted.
        """
        end = time.monotonic() + PROBE_SECONDS
        accepted, refused = 0, Skipped()
        for example in examples:
            right = self._verifier.right_answer(example.data["gold"])
            try:
                verdict = self.verify(example, right or "")
                self.leaks(example, right or "")
            except TaskError as error:
                raise ValueError(str(error)) from None
            if right is not None and not self._functions and not verdict.ok:
                refused.add(example.data["where"], f"{right!r} is {verdict.reason}")
            else:
                accepted += 1
            if time.monotonic() > end:
                break
        if refused.count and not accepted:
            raise ValueError(f"the verifier must accept the right answers, but accepts none: {refused}")
        if refused.count:
            warn(f"{refused.count} right answers are not accepted: {refused}")

    def _judged(self, example: Example) -> dict[str, Any]:
        return {**example.data, "prompt": example.data.get("messages") or example.prompt}

    def _usable(self, rows: Sequence[Row], skipped: Skipped) -> list[Example]:
        """The examples of the rows that can be used; each prompt once."""
        examples: list[Example] = []
        seen: dict[str, str] = {}
        for row in rows:
            try:
                example = self._example(row)
                if example.id in seen:
                    raise Malformed(f"has the prompt of {seen[example.id]}")
            except Malformed as error:
                skipped.add(row.where, str(error))
                continue
            seen[example.id] = row.where
            examples.append(example)
        return examples

    def _example(self, row: Row) -> Example:
        messages, chat = self._prompt.messages(row)
        gold = None if self._answer is None else value_of(row, self._answer)
        if (problem := self._verifier.problem(gold)) is not None:
            raise Malformed(f"{self._answer} {problem}")
        data: dict[str, Any] = {"where": row.where, "gold": gold}
        if chat:
            data["messages"] = messages
        if self._functions:
            data["columns"] = {column: row.values.get(column) for column in self._columns}
        try:
            text = json.dumps([messages, data], ensure_ascii=False)
            digest = hashlib.sha256(json.dumps(messages, ensure_ascii=False).encode()).hexdigest()
            text.encode()
        except UnicodeEncodeError:
            raise Malformed("contains half of a surrogate pair") from None
        return Example(f"dataset:{digest[:24]}", messages[-1]["content"], data)


class _Prompt:
    """Makes the messages of a row, from the column `prompt` or from the template."""

    def __init__(self, rows: list[Row], column: str, template: str | None) -> None:
        self.column = column
        self.parts = None if template is None else _parts(template)
        if self.parts is None:
            require(column, rows, "prompt")
        for _, name in self.parts or ():
            if name is not None:
                require(name, rows, "a name in braces in template")

    def messages(self, row: Row) -> tuple[list[Message], bool]:
        """The messages, and whether the row has them as such. Raises Malformed."""
        if self.parts is not None:
            text = "".join(
                f"{literal}{'' if name is None else text_of(value_of(row, name))}"
                for literal, name in self.parts
            )
            return [_message("user", text)], False
        value = value_of(row, self.column)
        if isinstance(value, str):
            return [_message("user", value)], False
        if not isinstance(value, list):
            raise Malformed(f"{self.column} must be text or messages, got {type(value).__name__}")
        messages = [self._of_entry(entry) for entry in value]
        if not messages or messages[-1]["role"] != "user":
            raise Malformed(f"{self.column} must end in a message of the user")
        return messages, True

    def _of_entry(self, entry: Any) -> Message:
        if not isinstance(entry, dict) or entry.get("role") not in ROLES:
            raise Malformed(f"{self.column} must be messages with a role ({', '.join(ROLES)}) and a content")
        content = entry.get("content")
        if isinstance(content, list):  # parts, as in multimodal templates
            texts = [part.get("text") for part in content if isinstance(part, dict)]
            if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
                raise Malformed(f"{self.column} must contain text only")
            content = "".join(map(str, texts))
        if not isinstance(content, str):
            raise Malformed(f"{self.column} must be messages with text as content")
        return _message(entry["role"], content)


def _message(role: str, content: str) -> Message:
    if not content.strip():
        raise Malformed(f"has an empty {role} message")
    return {"role": role, "content": content}


def _parts(template: str) -> list[tuple[str, str | None]]:
    """Literal text and the column after it. Not `str.format`, which would also look up attributes."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"template must have columns in braces, got {template!r}: {error}") from None
    if any(name == "" or spec or conversion for _, name, spec, conversion in parts):
        raise ValueError(f"template must have plain column names in braces, got {template!r}")
    if all(name is None for _, name, *_ in parts):
        raise ValueError(f"template must have at least one column in braces, got {template!r}")
    return [(literal, name) for literal, name, *_ in parts]


def _answer_column(rows: list[Row], answer: str | None, functions: bool) -> str | None:
    column = "answer" if answer is None else answer
    if answer is None and functions and not any(column in row.values for row in rows):
        return None
    require(column, rows, "answer")
    return column


def _names(names: str | list[str]) -> list[str]:
    names = names.split("+") if isinstance(names, str) else names
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"verifier must be a name, or a list of functions, got {names!r}")
    return names


def _weights(weights: str | float | list[float] | None) -> list[float] | None:
    parts: Any = weights.split("+") if isinstance(weights, str) else weights
    try:
        return (
            None if parts is None else [float(part) for part in (parts if type(parts) is list else [parts])]
        )
    except (TypeError, ValueError):
        raise ValueError(f"weights must be numbers, got {weights!r}") from None


# --- splits -------------------------------------------------------------------------------------------------


def _report(skipped: Skipped, usable: int) -> None:
    if not usable:
        raise ValueError(f"the data have no usable row: {skipped}")
    if skipped.count:
        warn(f"skipped {skipped.count} of {skipped.count + usable} rows: {skipped}")


def _refuse_duplicates(splits: dict[str, list[Example]], drop: bool) -> None:
    """A prompt may be in one split only. With `drop` it stays in the last of train, validation, heldout."""
    seen: dict[str, tuple[str, Example]] = {}
    twice: list[str] = []
    for split in reversed(SPLITS):
        kept = []
        for example in splits.get(split, []):
            other, first = seen.setdefault(example.id, (split, example))
            if other == split:
                kept.append(example)
            else:
                twice.append(f"{example.data['where']} ({split}) and {first.data['where']} ({other})")
        if split in splits:
            splits[split] = kept
    if twice and not drop:
        raise ValueError(
            f"a prompt must be in one split only, but {len(twice)} are in two: {'; '.join(twice[:3])}; "
            "remove them, or set drop_duplicates=true"
        )
    if twice:
        warn(f"dropped {len(twice)} prompts that are in two splits: {twice[0]}")


def _split(
    splits: dict[str, list[Example]], validation_share: float, heldout_share: float
) -> dict[str, list[Example]]:
    """Takes from train, by a hash of the prompt, the splits that the data do not have."""
    result: dict[str, list[Example]] = {split: list(splits.get(split, [])) for split in SPLITS}
    result["train"] = []
    for example in splits["train"]:
        place = int(example.id.rpartition(":")[2][:12], 16) / 2.0**48
        if place < heldout_share:
            split = "heldout"
        else:
            split = "validation" if place < heldout_share + validation_share else "train"
        result["train" if split in splits else split].append(example)
    return result
