"""The generators of the package reasoning-gym (Apache-2.0) as tasks: puzzles, algebra, logic, games. Offline.

`python -m grpo.tasks.reasoning_gym` lists them, and with a NAME shows its options and an example. Questions
and scores, from 0 to 1, are made in a process of their own (worker.py): a score has a time limit, and some
questions depend on the order of a set, which is the same only there.

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
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from grpo.tasks import SPLITS, Example, TaskError, Verdict, after_thought, check_split, nearest, register
from grpo.tasks.verifiers import MEMORY_GB
from grpo.tasks.worker import Worker, WorkerError

SEEDS = 2**24  # of a split; the ranges of two splits or seeds do not overlap
MAX_SEED = 2**32 // (len(SPLITS) * SEEDS)  # NumPy's generators take seeds of 32 bits
BLOCK = 256  # questions that one object of a generator makes, from as many seeds
BATCH = 8  # questions asked for together; divides BLOCK
PATIENCE = 500  # batches without a new question after which a generator counts as exhausted
SECONDS = 10.0  # limit of one score
MAKING = 600.0  # limit of a batch of questions, in seconds; some generators search for puzzles
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
        if unknown := [option for option in options if option not in defaults(name)]:
            raise ValueError(
                f"options of {name} must be among {', '.join(defaults(name))}, got {unknown[0]!r}"
                f"{nearest(unknown[0], defaults(name))}"
            )
        self.name, self.seed, self.generator, self.options = f"reasoning_gym {name}", seed, name, options
        self._asked(0, 0)  # options that do not fit are reported now
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
        end = answer.rfind("</answer>")
        start = answer.rfind("<answer>", 0, max(end, 0))
        if start < 0:
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
        try:
            score = _worker()(self._request("score", **question, answer=answer))
        except WorkerError as error:
            return Verdict("crash" if error.kind == "raised" else error.kind)
        return Verdict("ok" if score >= 1 else "wrong_value", score)

    def _request(self, what: str, **more: Any) -> dict[str, Any]:
        return {"what": what, "generator": self.generator, "options": self.options, **more}

    def _questions(self, place: int) -> Iterator[Example]:
        """The questions of a split, each once; ends when no new ones come."""
        first = (self.seed * len(SPLITS) + place) * SEEDS
        seen: set[str] = set()
        idle = 0
        for start in range(0, SEEDS, BATCH):
            before = len(seen)
            # A generator makes BLOCK questions, from as many seeds.
            seed, index = first + start // BLOCK * BLOCK, start % BLOCK
            for entry in self._asked(seed, index):
                digest = hashlib.sha256(entry["question"].encode()).hexdigest()
                if digest not in seen and int(digest[:12], 16) % len(SPLITS) == place:
                    seen.add(digest)
                    data = {"seed": seed, "index": entry["index"], "answer": entry["answer"]}
                    yield Example(f"{self.generator}:{digest[:24]}", entry["question"], data)
            idle = 0 if len(seen) > before else idle + 1
            if idle == PATIENCE:
                return

    def _asked(self, seed: int, index: int) -> list[dict[str, Any]]:
        try:
            return _worker()(self._request("questions", seed=seed, index=index), MAKING)
        except WorkerError as error:
            raise ValueError(f"{self.generator} with options {self.options} {error}") from None


def names() -> list[str]:
    """The generators, sorted. Raises ValueError if the extra is not installed."""
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ValueError("task reasoning_gym needs its extra: pip install 'reflect-grpo[reasoning_gym]'")
    return _worker()({"what": "names"})


def defaults(name: str) -> dict[str, str]:
    """The options of a generator, each with its default as Python writes it."""
    return _worker()({"what": "defaults", "generator": name})


@functools.cache
def _worker() -> Worker:
    """One for all tasks of this process: the package takes seconds to import."""
    # Not __name__, which is __main__ in the command.
    return Worker("grpo.tasks.reasoning_gym:answering", {}, seconds=SECONDS, memory=MEMORY_GB)


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


def answering() -> Callable[[Any], Any]:
    """Answers the requests of the functions above."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of a package that this one imports
        import reasoning_gym.factory
    known = reasoning_gym.factory.DATASETS
    for module in _EVALUATE_LITERALS:
        with contextlib.suppress(ImportError):
            loaded: Any = importlib.import_module(f"reasoning_gym.{module}")
            loaded.eval = ast.literal_eval  # hides the builtin from the module's functions

    @functools.lru_cache(maxsize=16)
    def dataset(generator: str, options: str, seed: int) -> Any:
        try:
            return reasoning_gym.create_dataset(generator, seed=seed, size=BLOCK, **json.loads(options))
        except Exception as error:  # assertions about the options, and what a wrong type leads to
            raise TaskError(f"cannot be built: {error or type(error).__name__}") from None

    def answer(request: Any) -> Any:
        what = request["what"]
        if what == "names":
            return sorted(set(known) - {"composite"})
        generator = request["generator"]
        if what == "defaults":
            fields = dataclasses.fields(known[generator][1])
            return {field.name: _default(field) for field in fields if field.name not in ("seed", "size")}
        if what == "score" and generator in _FORMULAS and not _FORMULA.fullmatch(request["answer"]):
            return 0.0
        made = dataset(generator, json.dumps(request["options"]), request["seed"])
        if what == "score":
            return float(made.score_answer(request["answer"], made[request["index"]]))
        indices = range(request["index"], request["index"] + BATCH)
        return [_entry(made[index], index) for index in indices]

    return answer


def _entry(entry: dict[str, Any], index: int) -> dict[str, Any]:
    answer = entry["answer"] if isinstance(entry["answer"], str) else None
    return {"question": entry["question"], "answer": answer, "index": index}


def _default(field: Any) -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    return "required" if field.default_factory is dataclasses.MISSING else repr(field.default_factory())


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
    except (ValueError, WorkerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"--task reasoning_gym --task_options name={arguments[0]}\n\noptions:")
    for option, default in defaults(arguments[0]).items():
        print(f"  {option} = {default}")
    (example,) = task.examples("train", 1)
    print(f"\nquestion:\n{example.prompt}\n\nanswer:\n{example.data['answer']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
