"""What a task is, and where tasks are found by name.

A task gives examples, judges answers and, for models that need a warm start, writes worked conversations. It
knows nothing about tokens, models or training, so a new task fits in one file (docs/tasks.md).

The reward of the paper (arXiv 2505.24726) is 1 or 0. A verdict may also have another score; the settings
`reward` and `success_threshold` decide what becomes of it. Left out: reward models.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import math
import os
import pkgutil
import random
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, get_args, get_type_hints, runtime_checkable

SPLITS = ("train", "validation", "heldout")
METHODS = ("examples", "verify", "leaks")
MEMBERS = ("name", "system", "reflection_instruction", *METHODS)  # of every task
RIGHT_ATTEMPTS = 0.2  # share of transcripts whose first attempt is right
THINK, END_THINK = "<think>", "</think>"  # around the thoughts of thinking models


class TaskError(RuntimeError):
    """A task cannot go on, because of something that its user wrote, such as a reward function that raises.

    The message is one line for the user. The commands end with it, after the finished steps are saved.
    """


def user_path(name: str) -> Path:
    """A path as a user writes it: `~` at its beginning is the home directory."""
    return Path(os.path.expanduser(name))


def looked_in(path: Path) -> str:
    """` in FOLDER`, for the message that a file is missing: where a relative path was looked for."""
    return "" if path.is_absolute() else f" in {os.getcwd()}"


@functools.cache  # once, although a command may build the task again for each model
def warn(message: str) -> None:
    """Prints a line about data that a task leaves out or doubts."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


@dataclass(frozen=True, init=False)
class Verdict:
    """What a verifier found.

    Attributes:
        reason: "ok" or a short code for the first check that failed.
        score: how good the answer is; without it 1 for "ok" and 0 for any other reason. The setting
            `success_threshold`, not the reason, decides whether it is right. As that is above 0, an answer
            that is "ok" must have a score above 0.
    """

    reason: str
    score: float

    def __init__(self, reason: str, score: float | None = None) -> None:
        if not isinstance(reason, str) or not reason:
            raise ValueError(f"a Verdict's reason must be 'ok' or a short code, got {reason!r}")
        if score is not None and not (isinstance(score, int | float) and math.isfinite(score)):
            raise ValueError(f"a Verdict's score must be a finite number, got {score!r}")
        if reason == "ok" and score is not None and score <= 0:
            raise ValueError(f"a Verdict's score must be above 0 if its reason is 'ok', got {score!r}")
        object.__setattr__(self, "reason", reason)  # the way to set a field of a frozen dataclass
        object.__setattr__(self, "score", float(self.ok if score is None else score))

    @property
    def ok(self) -> bool:
        return self.reason == "ok"

    def to_json(self) -> dict[str, Any]:
        """{"reason"}, and "score" where the reason does not imply it. `Verdict(**...)` reads it."""
        return {"reason": self.reason} | ({} if self.score == float(self.ok) else {"score": self.score})


@dataclass(frozen=True)
class Example:
    """One instance of a task.

    Attributes:
        id: unique within the task and the same in every run and split order.
        prompt: the user message.
        data: what the verifier needs; survives JSON unchanged.
    """

    id: str
    prompt: str
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> int:
        """63 bits of sha256(id): names the example in the key of the sampling noise."""
        return int.from_bytes(hashlib.sha256(self.id.encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class Transcript:
    """A worked conversation for the warm start; no `reflection` and `retry` where the attempt is right."""

    attempt: str
    reflection: str | None = None
    retry: str | None = None


def after_thought(text: str) -> str:
    """What a verifier judges: the text after the last `</think>`, or "" where a thought never ends.

    `</think>` counts wherever it is, in a string too: chat templates cut answers there in the same way. It
    needs no `<think>` before it, because a prompt may have opened the thought. A `<think>` after it opens
    another thought. Tags are exact: `</THINK>` is text.
    """
    rest = text.rpartition(END_THINK)[2]
    return "" if THINK in rest else rest


class Task(Protocol):
    """What the trainer asks of a task. `system` is None if there is no system message.

    A task may also have `format_reasons: frozenset[str]`: the reason codes which mean that an answer could
    not be read.
    """

    name: str
    system: str | None
    reflection_instruction: str

    def examples(self, split: str, count: int, offset: int = 0) -> list[Example]:
        """Examples `offset` to `offset + count` of a split, always in the same order; splits are disjoint.

        Raises:
            ValueError: no such split, or fewer examples exist.
        """
        ...

    def verify(self, example: Example, text: str) -> Verdict:
        """Judges an answer. Never raises, and its work is linear in the length of `text`.

        `text` includes the thoughts of a thinking model; see `after_thought`.
        """
        ...

    def leaks(self, example: Example, reflection: str) -> bool:
        """Whether the reflection, thoughts included, already contains an accepted answer."""
        ...


@runtime_checkable
class WarmStartTask(Task, Protocol):
    """A task that can also show how its conversations go.

    With `attempt`, the wrong one of an earlier transcript of the same example, another reflection and retry
    after it.
    """

    def transcript(self, example: Example, rng: random.Random, attempt: str | None = None) -> Transcript: ...


@runtime_checkable
class TolerantTask(Task, Protocol):
    """A task with a second, more lenient verdict, which evaluation reports alongside the reward's."""

    def tolerant(self, example: Example, text: str) -> Verdict: ...


@runtime_checkable
class OpeningTask(Task, Protocol):
    """A task that writes more than a system message before its prompt: tools, or earlier turns.

    `opening` gives the messages up to `example.prompt`, which is the last of them, and with `with_tools` (the
    chat template takes tools) the JSON schemas of the tools, else None and all of it as text.
    """

    def opening(
        self, example: Example, with_tools: bool
    ) -> tuple[list[dict[str, str]], list[dict[str, Any]] | None]: ...


@runtime_checkable
class CheckedTask(Task, Protocol):
    """A task that can look at examples before a run: whether each of them can be judged."""

    def check(self, examples: Sequence[Example]) -> None:
        """Raises ValueError with one line for the user."""
        ...


@runtime_checkable
class TypedTask(Task, Protocol):
    """A task that can judge problems of a user (grpo/interact.py), not only its own examples."""

    def typed(self, text: str) -> Example | None:
        """The problem that the text states, in the form of the task's prompts; None if it states none."""
        ...


class TakesTools(Protocol):
    """Of a chat (grpo/chat.py): whether its template writes out tools."""

    @property
    def takes_tools(self) -> bool: ...


def opening(task: Task, example: Example, chat: TakesTools) -> dict[str, Any]:
    """What a conversation begins with, as keyword arguments of `Chat.prompt`: messages and, if any, tools."""
    if isinstance(task, OpeningTask):
        messages, tools = task.opening(example, chat.takes_tools)
        return {"messages": messages} if tools is None else {"messages": messages, "tools": tools}
    system = [{"role": "system", "content": task.system}] if task.system else []
    return {"messages": [*system, {"role": "user", "content": example.prompt}]}


_REGISTRY: dict[str, Callable[..., Any]] = {}


def register(name: str) -> Callable[[Any], Any]:
    """Class decorator: makes the task known as `--task name`."""

    def add(factory: Any) -> Any:
        if _REGISTRY.get(name, factory) is not factory:
            raise ValueError(f"task name {name!r} is already taken by {_REGISTRY[name]!r}")
        _REGISTRY[name] = factory
        return factory

    return add


def task_names() -> list[str]:
    """Registered names, sorted; every module of this package is imported first."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return sorted(_REGISTRY)


def get_task(spec: str, options: dict[str, Any] | None = None) -> Task:
    """Builds a task from `--task` and `--task_options`.

    Args:
        spec: a registered name; `package.module:Name`, on the import path or in the current directory, or
            `path/to/file.py:Name`, for a class, or a function annotated to return a Task.
        options: keyword arguments of that class or function.
    Raises:
        ValueError: unknown task or option (the message gives the nearest known one), an option of another
            type than its annotation says, or what it builds is no task.
    """
    options = options or {}
    factory = load_object(spec, "task") if ":" in spec else _registered_factory(spec)
    _check_makes_tasks(spec, factory)
    _check_options(spec, factory, options)
    try:
        task = factory(**options)
    except (Exception, SystemExit) as error:
        raise ValueError(raised(error, f"task {spec!r}: {factory.__name__}")) from error
    if missing := [name for name in MEMBERS if not hasattr(task, name)]:
        raise ValueError(f"task {spec!r} must have {', '.join(MEMBERS)}; it lacks {', '.join(missing)}")
    return task


def raised(error: BaseException, where: str) -> str:
    """One line about an exception in a task's code: `where`, the exception, and the file and line.

    A TaskError, or a ValueError of the tasks of this package, is written for users: of it, the message alone.
    """
    if isinstance(error, TaskError):
        return str(error)
    package = Path(__file__).parent
    callers = ("<frozen importlib", importlib.__file__, __file__, str(package / "contract.py"))
    trace = traceback.extract_tb(error.__traceback__)
    places = [(frame.filename, frame.lineno) for frame in trace if not frame.filename.startswith(callers)]
    if isinstance(error, ValueError) and places and all(package in Path(file).parents for file, _ in places):
        return str(error)
    line = " ".join(f"{where} raised {type(error).__name__}: {error}".split())
    # The last line in the file that was called: what it calls in turn may be a library.
    numbers = [number for file, number in places if file == places[0][0]]
    return f"{line} ({places[0][0]}, line {numbers[-1]})" if places else line


def format_reasons(task: Task) -> frozenset[str]:
    """The task's reason codes for answers that could not be read; none if it does not declare them."""
    return frozenset(getattr(task, "format_reasons", ()))


def check_split(split: str) -> None:
    """Raises ValueError unless `split` is one of SPLITS."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")


def _registered_factory(name: str) -> Callable[..., Any]:
    known = task_names()
    if name not in _REGISTRY:
        raise ValueError(
            f"task must be one of {', '.join(known)}, or package.module:Name or FILE.py:Name, "
            f"got {name!r}{nearest(name, known)}"
        )
    return _REGISTRY[name]


def load_object(spec: str, what: str) -> Any:
    """The object that `package.module:Name` or `path/to/file.py:Name` names.

    The current directory is on the import path, also for an installed command.

    Args:
        what: what the object is for, such as "task"; begins the messages.
    Raises:
        ValueError: no such file, module or name. What the user's module itself raises, with its own
            traceback, is the user's to see.
    """
    module_name, _, attribute = spec.rpartition(":")
    if not module_name or not attribute:
        raise ValueError(f"{what} must be given as package.module:Name or FILE.py:Name, got {spec!r}")
    path = user_path(module_name) if module_name.endswith(".py") else None
    if path is not None and not path.is_file():
        near = nearest(path.name, [file.name for file in path.parent.glob("*.py")])
        raise ValueError(f"{what} {spec!r}: there is no file {str(path)!r}{looked_in(path)}{near}")
    _add_to_path(os.getcwd() if path is None else str(path.resolve().parent))
    _print_files(f"{what} {spec}", module_name if path is None else str(path))
    try:
        module = importlib.import_module(module_name) if path is None else _module_of_file(path)
    except ModuleNotFoundError as error:
        # An import that fails inside the user's module is the user's to see, with its own traceback.
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise
        raise ValueError(
            f"{what} {spec!r}: no module {error.name!r} on the import path or in {os.getcwd()}"
        ) from error
    except (
        ValueError,
        OSError,
        SystemExit,
    ) as error:  # without its place it would read like a wrong argument
        raise ValueError(raised(error, f"{what} {spec!r}: import")) from error
    if not hasattr(module, attribute):
        names = [name for name in dir(module) if not name.startswith("_")]
        raise ValueError(f"{what} {spec!r}: {module_name} has no {attribute!r}{nearest(attribute, names)}")
    return getattr(module, attribute)


def _print_files(what: str, module_name: str) -> None:
    """Says which files an import is about to execute: a config.yaml, perhaps another person's, names them."""
    if module_name.endswith(".py"):
        path = Path(module_name).resolve()
        files = [path] if path.is_file() and str(path) not in sys.modules else []
    elif module_name in sys.modules or module_name.partition(".")[0] == "grpo":
        files = []
    else:
        files = files_of_module(module_name)
    if files:
        print(f"{what} runs code from {', '.join(map(str, files))}", flush=True)


def files_of_module(name: str) -> list[Path]:
    """The files that an import of `name` executes: of its packages, outermost first, then its own.

    Nothing is executed: `importlib.util.find_spec` would import the packages. Files that these import in turn
    are not listed, nor those of a package that changes its own path. Empty if there is no such module.
    """
    files, path = [], None
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        part = ".".join(parts[:depth])
        finders = (getattr(finder, "find_spec", None) for finder in sys.meta_path)
        specs = (find_spec(part, path) for find_spec in finders if find_spec)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None:
            return []
        if spec.has_location and spec.origin:
            files.append(Path(spec.origin))
        path = spec.submodule_search_locations
    return files


def _module_of_file(path: Path) -> Any:
    """The module in a file. It is loaded once."""
    name = str(path.resolve())  # no name of an import statement, so it shadows none
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, name)
        assert spec is not None and spec.loader is not None  # there is a loader for .py
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _add_to_path(folder: str) -> None:
    """Last, so that a folder of the user, such as `datasets`, hides no installed package."""
    if folder not in sys.path:
        sys.path.append(folder)


def _check_makes_tasks(spec: str, factory: Any) -> None:
    """Called before `factory` is: `--task os:system`, in a file with settings, must not run a command."""
    product = factory
    if not inspect.isclass(factory):
        try:
            product = get_type_hints(factory).get("return")
        except (TypeError, NameError):
            product = None
    if missing := [name for name in METHODS if not callable(getattr(product, name, None))]:
        raise ValueError(
            f"task {spec!r} must be a class with the methods {', '.join(METHODS)}, or a function with the "
            f"return annotation Task; it lacks {', '.join(missing)}"
        )


def _check_options(spec: str, factory: Callable[..., Any], options: dict[str, Any]) -> None:
    signature = inspect.signature(factory)
    names = signature.parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in names.values())
    for option in options if not takes_any else ():
        if option not in names:
            known = ", ".join(names) or "none"
            hint = nearest(str(option), names)
            raise ValueError(f"task_options of {spec!r} must be among: {known}; got {option!r}{hint}")
    try:
        signature.bind(**options)
    except TypeError as error:
        raise ValueError(f"task_options of {spec!r} do not fit: {error}") from error
    try:
        hints = get_type_hints(factory.__init__ if inspect.isclass(factory) else factory)
    except (TypeError, NameError):  # a callable without annotations, or with some that cannot be looked up
        hints = {}
    for option, value in options.items():
        kinds = get_args(hints.get(option)) or (hints.get(option),)
        # Only what every option on a command line can be; a task checks richer types itself.
        if all(kind in _SIMPLE for kind in kinds) and not any(_fits(value, kind) for kind in kinds):
            expected = " or ".join(_SIMPLE[kind] for kind in kinds)
            raise ValueError(f"task_options {option} must be {expected}, got {value!r}")


_SIMPLE = {int: "an integer", float: "a number", str: "a string", bool: "true or false", type(None): "null"}


def _fits(value: Any, kind: type) -> bool:
    return type(value) is kind or (kind is float and type(value) is int)


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """`; did you mean X?` with the known name nearest to `name`, or nothing if none is near.

    Ends the message about an unknown name; the settings use it too. `prefix` is put before X.
    """
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {prefix}{matches[0]}?" if matches else ""
