"""Function calling: given tools and a question, write the calls that answer it.

The paper's first task ("Reflect, Retry, Reward", arXiv 2505.24726). On xLAM / APIGen data (a file of yours)
the calls must equal the given ones; on the Berkeley files (the package bfcl-eval) each argument must be one
of the accepted values. Where no tool fits, the right answer is no call. `function_calling_generated` is the
same task with small tools made from templates (generated.py). Left out: running the calls, and several turns
with results.
"""

from __future__ import annotations

import json
import random
import re
from typing import Any, Protocol

from grpo.tasks import END_THINK, RIGHT_ATTEMPTS, THINK, Example, Transcript, Verdict, check_split, register
from grpo.tasks.function_calling.berkeley import CATEGORIES, Berkeley, category_of
from grpo.tasks.function_calling.calls import find_calls, holds_prose_only, scattered_calls
from grpo.tasks.function_calling.data import Record, Source, Splits, defaults_of
from grpo.tasks.function_calling.generated import DISTRACTORS, PARAMETERS, Problems
from grpo.tasks.function_calling.json_calls import Call, Unreadable
from grpo.tasks.function_calling.matching import Defaults, compare, includes
from grpo.tasks.function_calling.mistakes import mistaken, reflection, right_calls, text_of
from grpo.tasks.function_calling.xlam import Xlam

DEFAULT_CATEGORIES = "simple_python+multiple+parallel+parallel_multiple+irrelevance"

# How a reflection on an answer without readable calls begins.
NOTHING_CALLED, UNREADABLE = "The answer calls no function. ", "The answer cannot be read as JSON calls. "

# For templates without tools. Short, since it is paid for at every turn.
PLAIN_PROMPT = (
    "You can call the functions below. Answer the question with a JSON list of the calls that it needs, each "
    'as {{"name": ..., "arguments": {{...}}}}, and nothing else. If no function fits, say so in words.\n\n'
    "{tools}"
)


def verify(text: str, gold: list[Call], python_syntax: bool = False, accepted: bool = False) -> Verdict:
    """Judges the calls in what follows the last `</think>`. The first check that fails names the verdict:

    too_long (over 8,000 characters), multi_block (two code fences), empty, no_call (prose), parse, dup_key,
    nonfinite, shape; with Python's syntax also positional and non_literal; then against the gold calls, in
    any order: wrong_count, wrong_name, wrong_keys, wrong_value. A thought that never ends is no_call. Never
    raises; linear in the text.

    Args:
        gold: calls as {"name", "arguments"}. Where it is empty the right answer is no call: prose, nothing,
            or `[]`.
        python_syntax: accept `[f(a=1)]` and `f(a=1)` too.
        accepted: each gold argument is a list of accepted values, as in the Berkeley files; "" among them
            means that it may be left out.
    """
    return _judge(text, gold, python_syntax, accepted, {})


def tolerant_verify(
    text: str,
    gold: list[Call],
    tools: list[dict[str, Any]],
    python_syntax: bool = False,
    accepted: bool = False,
) -> Verdict:
    """`verify`, but an argument left out counts as given with its schema's default. Never the reward.

    Args:
        tools: JSON schemas, {"type": "function", "function": {"name", "parameters", ...}} each.
    """
    return _judge(text, gold, python_syntax, accepted, defaults_of(tools))


def _judge(text: str, gold: list[Call], python_syntax: bool, accepted: bool, defaults: Defaults) -> Verdict:
    try:
        calls = find_calls(text, python_syntax)
    except Unreadable as fault:
        nothing_is_right = not gold and holds_prose_only(text, python_syntax)
        return Verdict("ok" if nothing_is_right else fault.reason)
    return Verdict(compare(calls, gold, accepted, defaults))


class Records(Protocol):
    """The records of each split, always in the same order."""

    def records(self, split: str, start: int, stop: int) -> list[Record]:
        """Records `start` to `stop` of a split. Raises ValueError if there are fewer."""
        ...


class Calls:
    """Prompts, verdicts and transcripts of function-calling records; the tasks below say where they are from.

    Args:
        records: in three splits that share no tool name.
        accepted: gold arguments are lists of accepted values.
        python_syntax: accept calls in Python's syntax as well as JSON.
        reflection_stop: in transcripts, share of reflections that stop after the first one or two checks.
    """

    format_reasons = frozenset(
        "too_long multi_block empty no_call parse dup_key nonfinite shape positional non_literal".split()
    )
    system: str | None = None  # the tools are in the first messages, see `opening`
    reflection_instruction = (
        "You tried performing the task, but failed in generating the correct tool call. Reflect on what went "
        "wrong and write a short explanation that will help you do better next time."
    )

    def __init__(
        self, records: Records, *, accepted: bool, python_syntax: bool, reflection_stop: float
    ) -> None:
        if not 0 <= reflection_stop <= 1:
            raise ValueError(f"reflection_stop must be between 0 and 1, got {reflection_stop}")
        self._records, self.accepted = records, accepted
        self.python_syntax, self.reflection_stop = python_syntax, reflection_stop

    def examples(self, split: str, count: int, offset: int = 0) -> list[Example]:
        """Examples `offset` to `offset + count` of train, validation or heldout; no tool is in two splits.

        Raises:
            ValueError: no such split, or fewer examples exist.
        """
        check_split(split)
        if count < 0 or offset < 0:
            raise ValueError(f"count and offset must be at least 0, got {count} and {offset}")
        return [self._example(record) for record in self._records.records(split, offset, offset + count)]

    def opening(self, example: Example, with_tools: bool) -> tuple[list[dict[str, str]], list[dict] | None]:
        """The messages before the first answer, and the tools for a template that takes them.

        Another template gets them as text in the system message.
        """
        messages = [*example.data["history"], {"role": "user", "content": example.prompt}]
        if with_tools:
            return messages, example.data["tools"]
        system = PLAIN_PROMPT.format(tools=json.dumps(_functions(example), ensure_ascii=False))
        if messages[0]["role"] == "system":
            system = f"{messages[0]['content']}\n\n{system}"
            messages = messages[1:]
        return [{"role": "system", "content": system}, *messages], None

    def verify(self, example: Example, text: str) -> Verdict:
        return verify(text, example.data["gold"], self.python_syntax, self.accepted)

    def tolerant(self, example: Example, text: str) -> Verdict:
        """`verify` with the schemas' defaults filled in: evaluation reports it alongside the reward."""
        gold, tools = example.data["gold"], example.data["tools"]
        return tolerant_verify(text, gold, tools, self.python_syntax, self.accepted)

    def leaks(self, example: Example, reflection: str) -> bool:
        """Whether the reflection contains all the right calls, anywhere in its text.

        Thoughts count: the retry's context has all sampled ids of the reflection. Where the right answer is
        no call there is nothing to look for: False.
        """
        gold = example.data["gold"]
        if not gold:
            return False
        if any(self.verify(example, part).ok for part in re.split(f"{THINK}|{END_THINK}", reflection)):
            return True
        return includes(scattered_calls(reflection), gold, self.accepted)

    def transcript(self, example: Example, rng: random.Random, attempt: str | None = None) -> Transcript:
        """A conversation whose reflection goes through a wrong answer part by part (mistakes.py).

        `attempt`: a wrong answer to start from. If it has no readable calls, the reflection says so first.
        """
        gold, tools = example.data["gold"], example.data["tools"]
        remark = ""
        if attempt is not None:
            calls, remark = self._read(attempt)
        elif not (gold or tools) or rng.random() < RIGHT_ATTEMPTS:
            return Transcript(text_of(right_calls(gold, self.accepted)))
        else:
            calls = mistaken(gold, self.accepted, tools, example.prompt, rng)
        checks = rng.randint(1, 2) if rng.random() < self.reflection_stop else None
        text, mended = reflection(calls, gold, self.accepted, checks)
        return Transcript(text_of(calls) if attempt is None else attempt, remark + text, text_of(mended))

    def _read(self, attempt: str) -> tuple[list[Call], str]:
        """The calls of a wrong answer, and what is to be said if there are none."""
        try:
            calls = find_calls(attempt, self.python_syntax)
            text_of(calls).encode()  # JSON can write lone surrogates, which no tokenizer takes
            return calls, ""
        except Unreadable as fault:
            return [], NOTHING_CALLED if fault.reason in ("no_call", "empty") else UNREADABLE
        except UnicodeEncodeError:
            return [], UNREADABLE

    def _example(self, record: Record) -> Example:
        *history, question = record.messages
        data = {"tools": record.tools, "gold": record.gold, "history": history}
        return Example(id=record.id, prompt=question["content"], data=data)


@register("function_calling")
class FunctionCalling(Calls):
    """Function-calling examples in three splits that share no tool name.

    Args:
        data_path: xLAM / APIGen file (JSON array or JSON lines); None for the Berkeley files.
        categories: of the Berkeley files, joined by "+", or a list; "live" and "all" name several.
        python_syntax: accept calls in Python's syntax as well as JSON.
        max_tools: leave out examples with more tools.
        max_characters: leave out examples whose messages and tools have more characters.
        seed: order of the examples within each split. Which split an example is in never depends on it.
        reflection_stop: in transcripts, share of reflections that stop after the first one or two checks.
    Raises:
        ValueError: no such file, no usable record in it, no package, or an unknown category.
    """

    name = "function_calling"

    def __init__(
        self,
        data_path: str | None = None,
        categories: str | list[str] | None = None,
        python_syntax: bool = False,
        max_tools: int | None = None,
        max_characters: int | None = None,
        seed: int = 0,
        reflection_stop: float = 0.5,
    ) -> None:
        for option, limit in (("max_tools", max_tools), ("max_characters", max_characters)):
            if limit is not None and limit < 1:
                raise ValueError(f"{option} must be at least 1 or None, got {limit}")
        if data_path is not None and categories is not None:
            raise ValueError(f"categories must be left out with data_path, got {categories!r}")
        chosen = _parse_categories(categories)
        source: Source = Berkeley(chosen) if data_path is None else Xlam(data_path)

        def keep(record: Record) -> bool:
            return (
                (data_path is not None or category_of(record) in chosen)
                and (max_tools is None or len(record.tools) <= max_tools)
                and (max_characters is None or _characters(record) <= max_characters)
            )

        self._splits = Splits(source, keep, seed)
        self.skipped = self._splits.skipped
        super().__init__(
            self._splits,
            accepted=source.accepted,
            python_syntax=python_syntax,
            reflection_stop=reflection_stop,
        )

    def size(self, split: str) -> int:
        """How many examples there are."""
        return self._splits.size(split)


@register("function_calling_generated")
class FunctionCallingGenerated(Calls):
    """Function calling with small tools and questions made from templates (generated.py).

    Args:
        num_tools: tools that a problem offers, of which one fits.
        num_parameters: parameters of each tool; some are optional.
        num_distractors: sentences in the question that have nothing to do with it.
        seed: of the problems. Which split a tool is in never depends on it.
        reflection_stop: in transcripts, share of reflections that stop after the first one or two checks.
    """

    name = "function_calling_generated"

    def __init__(
        self,
        num_tools: int = 3,
        num_parameters: int = 3,
        num_distractors: int = 1,
        seed: int = 0,
        reflection_stop: float = 0.5,
    ) -> None:
        limits = (
            ("num_tools", num_tools, 1, 10),
            ("num_parameters", num_parameters, 1, len(PARAMETERS)),
            ("num_distractors", num_distractors, 0, len(DISTRACTORS)),
        )
        for option, value, least, most in limits:
            if not least <= value <= most:
                raise ValueError(f"{option} must be between {least} and {most}, got {value}")
        problems = Problems(num_tools, num_parameters, num_distractors, seed)
        super().__init__(problems, accepted=False, python_syntax=False, reflection_stop=reflection_stop)


def _parse_categories(categories: str | list[str] | None) -> set[str]:
    names = DEFAULT_CATEGORIES if categories is None else categories
    parts = names.split("+") if isinstance(names, str) else list(names)
    groups = {
        "all": CATEGORIES,
        "live": [name for name in CATEGORIES if name.startswith("live_")],
        **{name: [name] for name in CATEGORIES},
    }
    if not parts or not all(isinstance(part, str) and part in groups for part in parts):
        raise ValueError(f'categories must be among {", ".join(groups)}, joined by "+", got {categories!r}')
    return {name for part in parts for name in groups[part]}


def _functions(example: Example) -> list[dict[str, Any]]:
    return [tool["function"] for tool in example.data["tools"]]


def _characters(record: Record) -> int:
    """What the prompt has to hold, template aside."""
    text = sum(len(message["content"]) for message in record.messages)
    return text + len(json.dumps(record.tools, ensure_ascii=False))
