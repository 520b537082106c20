"""Function calling: given tools and a question, write the calls that answer it.

The paper's first task ("Reflect, Retry, Reward", arXiv 2505.24726). On xLAM / APIGen data (a file of yours)
the calls must equal the given ones; on the Berkeley files (the package bfcl-eval) each argument must be one
of the accepted values. Where no tool fits, the right answer is no call. Left out: running the calls, and
several turns with results.
"""

from __future__ import annotations

import json
import random
import re
from typing import Any

from grpo.tasks import END_THINK, RIGHT_ATTEMPTS, THINK, Example, Transcript, Verdict, check_split, register
from grpo.tasks.function_calling.berkeley import CATEGORIES, Berkeley, category_of
from grpo.tasks.function_calling.calls import find_calls, holds_prose_only, scattered_calls
from grpo.tasks.function_calling.data import Record, Source, Splits, defaults_of
from grpo.tasks.function_calling.json_calls import Call, Unreadable, json_calls
from grpo.tasks.function_calling.matching import Defaults, compare, includes
from grpo.tasks.function_calling.mistakes import mistaken, reflection, right_calls, text_of
from grpo.tasks.function_calling.xlam import Xlam

DEFAULT_CATEGORIES = "simple_python+multiple+parallel+parallel_multiple+irrelevance"

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


@register("function_calling")
class FunctionCalling:
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
    format_reasons = frozenset(
        "too_long multi_block empty no_call parse dup_key nonfinite shape positional non_literal".split()
    )
    system: str | None = None  # the tools are in the first messages, see `opening`
    reflection_instruction = (
        "You tried performing the task, but failed in generating the correct tool call. Reflect on what went "
        "wrong and write a short explanation that will help you do better next time."
    )

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
        if not 0 <= reflection_stop <= 1:
            raise ValueError(f"reflection_stop must be between 0 and 1, got {reflection_stop}")
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

        self.python_syntax, self.accepted = python_syntax, source.accepted
        self.reflection_stop = reflection_stop
        self._splits = Splits(source, keep, seed)
        self.skipped = self._splits.skipped

    def examples(self, split: str, count: int, offset: int = 0) -> list[Example]:
        """Examples `offset` to `offset + count` of train, validation or heldout; no tool is in two splits.

        Raises:
            ValueError: no such split, or fewer examples exist.
        """
        check_split(split)
        if count < 0 or offset < 0:
            raise ValueError(f"count and offset must be at least 0, got {count} and {offset}")
        if offset + count > self.size(split):
            raise ValueError(
                f"split {split!r} has {self.size(split)} examples, but offset {offset} plus count "
                f"{count} were asked for; add categories or data, or raise max_tools or max_characters"
            )
        return [self._example(record) for record in self._splits.records(split, offset, offset + count)]

    def size(self, split: str) -> int:
        """How many examples there are."""
        return self._splits.size(split)

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

        `attempt`: the wrong one to start from, of an earlier transcript of the example.
        """
        gold, tools = example.data["gold"], example.data["tools"]
        if attempt is not None:
            calls = json_calls(attempt)
        elif not (gold or tools) or rng.random() < RIGHT_ATTEMPTS:
            return Transcript(text_of(right_calls(gold, self.accepted)))
        else:
            calls = mistaken(gold, self.accepted, tools, example.prompt, rng)
        checks = rng.randint(1, 2) if rng.random() < self.reflection_stop else None
        text, mended = reflection(calls, gold, self.accepted, checks)
        return Transcript(text_of(calls), text, text_of(mended))

    def _example(self, record: Record) -> Example:
        *history, question = record.messages
        data = {"tools": record.tools, "gold": record.gold, "history": history}
        return Example(id=record.id, prompt=question["content"], data=data)


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
