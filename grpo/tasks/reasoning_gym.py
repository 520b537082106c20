"""The generators of the package reasoning-gym (Apache-2.0) as tasks: puzzles, algebra, logic, games. Offline.

`python -m grpo.tasks.reasoning_gym` lists them, and with a NAME shows its options and an example. The
package's scorers judge the answers, from 0 to 1, in a process of their own (worker.py).

A split has its own range of seeds, and a hash of the question decides which of the split's questions are
used: small generators give the same question for many seeds. So no question is in two splits.

Some scorers run the answer as Python, which a verifier must never do. They get `ast.literal_eval` instead of
`eval`, or only answers that are plain formulas. Left out: `composite`, and curricula.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from grpo.tasks import SPLITS, Example, Verdict, check_split, nearest, register
from grpo.tasks.verifiers import MEMORY_GB, after_thought
from grpo.tasks.worker import Worker, WorkerError

SEEDS = 2**24  # of a split; the ranges of two splits or seeds do not overlap
MAX_SEED = 2**32 // (len(SPLITS) * SEEDS)  # NumPy's generators take seeds of 32 bits
BLOCK = 256  # questions that one generator makes, from as many seeds
PATIENCE = 20  # blocks without a new question after which a generator counts as exhausted
SECONDS = 10.0  # limit of one score
CHARACTERS = 10_000  # of an answer; a longer one is `too_long`


@register("reasoning_gym")
class ReasoningGym:
    """One generator of reasoning-gym.

    Args:
        name: of the generator.
        seed: which questions, from 0 to 84. Does not change which split a question is in.
        options: of the generator, such as min_terms=2.
    """

    system = "Give the final answer between <answer> and </answer>."
    reflection_instruction = (
        "Your answer was wrong. Reflect on what went wrong and write a short explanation that will help you "
        "do better next time."
    )
    format_reasons = frozenset({"no_answer", "empty", "too_long"})

    def __init__(self, name: str = "", seed: int = 0, **options: Any) -> None:
        known = names()
        if name not in known:
            raise ValueError(
                f"name must be a generator of reasoning-gym, got {name!r}{nearest(name, known)}; "
                "`python -m grpo.tasks.reasoning_gym` lists them"
            )
        if not 0 <= seed < MAX_SEED:
            raise ValueError(f"seed must be from 0 to {MAX_SEED - 1}, got {seed}")
        _check_options(name, options)
        self.name, self.seed, self.options = f"reasoning_gym {name}", seed, options
        self.generator = name
        self._sources = {split: self._questions(place) for place, split in enumerate(SPLITS)}
        self._ready: dict[str, list[Example]] = {split: [] for split in SPLITS}

    def examples(self, split: str, count: int, offset: int = 0) -> list[Example]:
        check_split(split)
        if count < 0 or offset < 0:
            raise ValueError(f"count and offset must be at least 0, got {count} and {offset}")
        ready = self._ready[split]
        while len(ready) < offset + count:
            example = next(self._sources[split], None)
            if example is None:
                raise ValueError(
                    f"split {split!r} has {len(ready)} examples, but offset {offset} plus count {count} were "
                    f"asked for: {self.generator} finds no more with these options"
                )
            ready.append(example)
        return ready[offset : offset + count]

    def verify(self, example: Example, text: str) -> Verdict:
        answer = after_thought(text)
        end = -1 if answer is None else answer.rfind("</answer>")
        start = -1 if answer is None else answer.rfind("<answer>", 0, max(end, 0))
        if answer is None or start < 0:
            return Verdict("no_answer")
        answer = answer[start + len("<answer>") : end].strip()
        if not answer:
            return Verdict("empty")
        if len(answer) > CHARACTERS:
            return Verdict("too_long")
        return self._judge(example, answer)

    def leaks(self, example: Example, reflection: str) -> bool:
        answer = example.data["answer"]
        return isinstance(answer, str) and bool(answer.strip()) and answer in reflection

    def _judge(self, example: Example, answer: str) -> Verdict:
        question = {name: example.data[name] for name in ("seed", "index")}
        value = {"generator": self.generator, "options": self.options, **question, "answer": answer}
        try:
            score = _worker()(value)
        except WorkerError as error:
            return Verdict("crash" if error.kind == "raised" else error.kind)
        return Verdict("ok" if score >= 1 else "wrong_value", score)

    def _questions(self, place: int) -> Iterator[Example]:
        """The questions of a split, each once; ends when no new ones come."""
        first = (self.seed * len(SPLITS) + place) * SEEDS
        seen: set[str] = set()
        idle = 0
        for block in range(SEEDS // BLOCK):
            before = len(seen)
            seed = first + block * BLOCK
            for index, entry in enumerate(_entries(self.generator, self.options, seed)):
                digest = hashlib.sha256(entry["question"].encode()).hexdigest()
                if digest in seen or int(digest[:12], 16) % len(SPLITS) != place:
                    continue
                seen.add(digest)
                answer = entry["answer"] if isinstance(entry["answer"], str) else None
                data = {"seed": seed, "index": index, "answer": answer}
                yield Example(f"{self.generator}:{digest[:24]}", entry["question"], data)
            idle = 0 if len(seen) > before else idle + 1
            if idle == PATIENCE:
                return


def names() -> list[str]:
    """The generators, sorted. Raises ValueError if the extra is not installed."""
    return sorted(set(_factory().DATASETS) - {"composite"})


def _factory() -> Any:
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ValueError("task reasoning_gym needs its extra: pip install 'reflect-grpo[reasoning_gym]'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of a package that it imports
        import reasoning_gym.factory

        return reasoning_gym.factory


def _config(name: str) -> Any:
    return _factory().DATASETS[name][1]


def _check_options(name: str, options: dict[str, Any]) -> None:
    known = {field.name for field in dataclasses.fields(_config(name))} - {"seed", "size"}
    for option in options:
        if option not in known:
            raise ValueError(
                f"options of {name} must be among {', '.join(sorted(known))}, got {option!r}"
                f"{nearest(option, known)}"
            )
    try:
        _dataset(name, options, 0)
    except Exception as error:  # assertions about the options, and what a wrong type leads to
        raise ValueError(f"{name} cannot be built with {options}: {error or type(error).__name__}") from None


def _dataset(name: str, options: dict[str, Any], seed: int) -> Any:
    return _factory().create_dataset(name, seed=seed, size=BLOCK, **options)


def _entries(name: str, options: dict[str, Any], seed: int) -> Iterator[dict[str, Any]]:
    dataset = _dataset(name, options, seed)
    for index in range(BLOCK):
        yield dataset[index]


# --- in the worker process ----------------------------------------------------------------------------------

# Modules that call `eval` on answers, for a list or a string.
_EVALUATE_LITERALS = (
    "algorithmic.string_insertion",
    "algorithmic.spiral_matrix",
    "algorithmic.binary_matrix",
    "games.n_queens",
)
# Generators whose answers go to sympy's parser, which runs them as Python. Of names it may see only these.
_FORMULAS = frozenset(
    "simple_integration intermediate_integration polynomial_multiplication puzzle24 countdown".split()
)
_FORMULA = re.compile(
    r"(?:[\s\d+\-*/^(),]|\.(?=\d)|(?<=\d)\.|(?:sqrt|exp|log|ln|sin|cos|tan|asin|acos|atan|pi|[A-Za-z])(?![A-Za-z_]))*"
)


@functools.cache
def _worker() -> Worker:
    """One for all tasks of this process: the package takes seconds to import."""
    return Worker(f"{__name__}:score_judge", {}, seconds=SECONDS, memory=MEMORY_GB)


def score_judge() -> Callable[[Any], float]:
    for module in _EVALUATE_LITERALS:
        with contextlib.suppress(ImportError):
            loaded: Any = importlib.import_module(f"reasoning_gym.{module}")
            loaded.eval = ast.literal_eval  # hides the builtin from the module's functions

    @functools.lru_cache(maxsize=16)
    def dataset(generator: str, options: str, seed: int) -> Any:
        return _dataset(generator, ast.literal_eval(options), seed)

    def judge(value: Any) -> float:
        generator, answer = value["generator"], value["answer"]
        if generator in _FORMULAS and not _FORMULA.fullmatch(answer):
            return 0.0
        made = dataset(generator, repr(value["options"]), value["seed"])
        return float(made.score_answer(answer, made[value["index"]]))

    return judge


# --- the command --------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Lists the generators; with a name, shows its options, a question and its answer."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        if not arguments or arguments[0].startswith("-"):
            print("usage: python -m grpo.tasks.reasoning_gym [NAME]\n")
            print("\n".join(names()))
            return 0
        task = ReasoningGym(arguments[0])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"--task reasoning_gym --task_options name={arguments[0]}\n\noptions:")
    for field in dataclasses.fields(_config(arguments[0])):
        if field.name not in ("seed", "size"):
            default = field.default if field.default is not dataclasses.MISSING else "(computed)"
            print(f"  {field.name} = {default!r}")
    (example,) = task.examples("train", 1)
    print(f"\nquestion:\n{example.prompt}\n\nanswer:\n{example.data['answer']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
