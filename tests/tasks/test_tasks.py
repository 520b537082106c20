"""The registry, the small data classes, and the example of docs/tasks.md, run as it stands there."""

import importlib.util
import json
import random
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from grpo import tasks
from grpo.tasks import Example, Task, Transcript, Verdict, format_reasons, get_task, register, task_names
from grpo.tasks.countdown import Countdown
from grpo.tasks.dataset import Dataset
from grpo.tasks.function_calling import FunctionCalling, FunctionCallingGenerated

DOC = Path(__file__).parents[2] / "docs" / "tasks.md"


class Needy(Countdown):
    """A task whose class needs an argument."""

    def __init__(self, length: int) -> None:
        super().__init__(high=length)


class Nameless:
    """The methods of a task without its attributes."""

    examples = verify = leaks = lambda self, *_: None


def make(high: int = 12) -> Task:
    """A function that makes a task."""
    return Countdown(high=high)


def test_verdict_and_example() -> None:
    assert Verdict("ok").ok and not Verdict("syntax").ok
    with pytest.raises(FrozenInstanceError):
        Verdict("ok").reason = "syntax"  # type: ignore[misc]
    assert (Verdict("ok").score, Verdict("syntax").score, Verdict("wrong", 0.25).score) == (1.0, 0.0, 0.25)
    assert Verdict("ok") == Verdict("ok", 1) and Verdict("wrong") != Verdict("wrong", 0.5)
    assert Verdict("ok").to_json() == {"reason": "ok"}
    assert Verdict("wrong", 0.5).to_json() == {"reason": "wrong", "score": 0.5}
    for score in (float("nan"), float("inf"), "1"):
        with pytest.raises(ValueError, match="score must be a finite number"):
            Verdict("ok", score)  # type: ignore[arg-type]
    # No success_threshold can make such an answer right; any other pair of reason and score may be.
    for score in (0, -0.5):
        with pytest.raises(ValueError, match="score must be above 0 if its reason is 'ok', got"):
            Verdict("ok", score)
    assert Verdict("ok", 0.4).ok and not Verdict("partial", 7.0).ok
    example = Example(id="a", prompt="?")
    # sha256("a") begins with ca978112ca1bbdca; the key is its first 63 bits.
    assert example.key == 0xCA978112CA1BBDCA >> 1 < 2**63
    assert Example(id="b", prompt="?").key != example.key
    assert Transcript("x").reflection is None


def test_get_task_by_name() -> None:
    task = get_task("countdown", {"high": 12})
    assert isinstance(task, Countdown) and task.high == 12
    assert "countdown" in task_names()
    assert json.loads(json.dumps(task.examples("train", 1)[0].data)) == task.examples("train", 1)[0].data


def test_get_task_by_path() -> None:
    assert isinstance(get_task("grpo.tasks.countdown:Countdown", {}), Countdown)
    assert get_task("test_tasks:make", {"high": 13}).high == 13  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("coutdown", {}, "did you mean countdown"),
        ("nothing like it", {}, "must be one of .*countdown.* or package.module:Name"),
        ("no_such_module:Task", {}, "no module 'no_such_module'"),
        ("grpo.no_such_module:Task", {}, "no module 'grpo.no_such_module'"),
        ("grpo.tasks.countdown:Countdow", {}, "did you mean Countdown"),
        ("countdown", {"hihg": 12}, "did you mean high"),
        ("countdown", {"high": 0}, "low and high"),
        ("countdown", {"high": "ten"}, "task_options high must be an integer, got 'ten'"),
        ("countdown", {"high": 10.5}, "task_options high must be an integer, got 10.5"),
        ("countdown", {"low": None}, "task_options low must be an integer, got None"),
        ("countdown", {"operators": 5}, "task_options operators must be a string, got 5"),
        ("countdown", {"max_target": "x"}, "task_options max_target must be an integer or null, got 'x'"),
        ("countdown", {"reflection_stop": True}, "task_options reflection_stop must be a number, got True"),
        ("countdown", {5: 1}, "must be among: .*; got 5"),
        ("test_tasks:Needy", {}, "do not fit: missing a required argument: 'length'"),
        ("test_tasks:Nameless", {}, "lacks name, system, reflection_instruction"),
        ("test_tasks:made", {}, "did you mean make"),
        (":Countdown", {}, "must be given as package.module:Name or FILE.py:Name, got ':Countdown'"),
        ("grpo.tasks:Verdict", {"reason": "ok"}, "methods .*; it lacks examples, verify, leaks"),
    ],
)
def test_errors_name_what_is_near(spec: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_task(spec, options)


def test_an_import_error_inside_the_users_module_is_shown_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "task_with_bad_import.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        get_task("task_with_bad_import:Task", {})


TASK_FILE = """
from neighbour import WORD
from grpo.tasks import Example, Verdict

class Words:
    name, system, reflection_instruction = "words", None, "Why?"

    def examples(self, split, count, offset=0):
        return [Example(f"{split} {i}", WORD) for i in range(offset, offset + count)]

    def verify(self, example, text):
        return Verdict("ok" if text == WORD else "wrong")

    def leaks(self, example, reflection):
        return WORD in reflection
"""


@pytest.mark.parametrize(
    "spec", ["{folder}/words.py:Words", "~/words.py:Words", "words.py:Words", "words:Words"]
)
def test_a_task_by_the_path_of_its_file_or_from_the_current_directory(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "words.py").write_text(TASK_FILE)
    (tmp_path / "neighbour.py").write_text("WORD = 'apple'\n")
    # As in an installed command, whose path has neither its directory nor the current one.
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path.parent if "/" in spec else tmp_path)
    spec = spec.format(folder=tmp_path)
    task = get_task(spec)
    assert task.verify(task.examples("train", 1)[0], "apple").ok
    assert capsys.readouterr().out == f"task {spec} runs code from {tmp_path / 'words.py'}\n"
    assert get_task(spec).__class__ is task.__class__ and capsys.readouterr().out == ""
    assert sys.path[-1] == str(tmp_path)  # last, so that it hides no installed package


def test_a_task_file_that_is_not_there_or_has_no_such_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "words.py").write_text("class Words: pass\n")
    (tmp_path / "raises.py").write_text("raise ValueError('bad')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for spec, message in [
        ("wordz.py:Words", f"there is no file 'wordz.py' in {tmp_path}; did you mean words.py"),
        ("/no/such/words.py:Words", "there is no file '/no/such/words.py'$"),
        ("words.py:Word", "has no 'Word'; did you mean Words"),
        ("words.py:Words", "it lacks examples, verify, leaks"),
        ("raises.py:Words", r"import raised ValueError: bad \(.*raises.py, line 1\)"),
        ("words.py", "must be one of .* or package.module:Name or FILE.py:Name"),
    ]:
        with pytest.raises(ValueError, match=message):
            get_task(spec)


@pytest.mark.parametrize("spec", ["os:system", "subprocess:Popen", "builtins:exec", "shutil:rmtree"])
def test_a_function_that_makes_no_task_is_not_called(spec: str, tmp_path: Path) -> None:
    """Settings come from files, and `os:system` with the option `command` would be a command."""
    for options in (
        {"command": f"touch {tmp_path}/x"},
        {"args": ["touch", f"{tmp_path}/x"]},
        {"path": tmp_path},
    ):
        with pytest.raises(ValueError, match="must be a class with the methods examples, verify, leaks"):
            get_task(spec, options)
    assert tmp_path.is_dir() and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("spec", ["lone_task:Spelling", "outer.inner.task_file:Spelling"])
def test_the_files_of_a_task_are_printed_before_they_run(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    *packages, name = spec.partition(":")[0].split(".")
    files = [tmp_path.joinpath(*packages[: i + 1], "__init__.py") for i in range(len(packages))]
    files.append(tmp_path.joinpath(*packages, f"{name}.py"))
    files[-1].parent.mkdir(parents=True, exist_ok=True)
    for file in files:
        file.write_text(f"print('running {file.stem}')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    assert tasks.files_of_module(spec.partition(":")[0]) == files and capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="has no 'Spelling'"):
        get_task(spec)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"task {spec} runs code from {', '.join(map(str, files))}"
    assert lines[1:] == [f"running {file.stem}" for file in files]
    with pytest.raises(ValueError, match="has no 'Spelling'"):
        get_task(spec)  # again: nothing is executed, so nothing is said
    assert capsys.readouterr().out == "" and tasks.files_of_module("no.such.module") == []


def test_tasks_declare_which_verdicts_are_format_errors() -> None:
    countdown, calls = get_task("countdown"), get_task("function_calling")
    assert format_reasons(countdown) == {"no_answer", "empty", "too_long", "illegal_char", "syntax"}
    assert "parse" in format_reasons(calls) and "wrong_value" not in format_reasons(calls)
    for text, unreadable in (("", True), ("<answer>1 +</answer>", True), ("<answer>1</answer>", False)):
        verdict = countdown.verify(countdown.examples("train", 1)[0], text)
        assert (verdict.reason in format_reasons(countdown)) == unreadable


def test_extras_are_imported_when_a_task_needs_them_and_not_when_tasks_are_listed() -> None:
    extras = {"datasets", "math_verify", "pyarrow", "reasoning_gym"}
    code = f"import sys, grpo.tasks; grpo.tasks.task_names(); sys.exit(len({extras} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=DOC.parents[1]).returncode == 0


@pytest.mark.parametrize(
    ("options", "extra"),
    [
        ({"path": "a.jsonl", "verifier": "math"}, "math"),
        ({"path": "a.parquet"}, "parquet"),
        ({"path": "owner/name"}, "datasets"),
        ({"name": "gcd"}, "reasoning_gym"),
    ],
)
def test_a_missing_extra_is_named(
    options: dict[str, Any], extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"prompt": "?", "answer": "1"}\n')
    (tmp_path / "a.parquet").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = rf"pip install 'reflect-grpo\[{extra}\]'"
    with pytest.raises(ValueError, match=message):
        get_task("reasoning_gym" if "name" in options else "dataset", options)


def test_register(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "_REGISTRY", dict(tasks._REGISTRY))

    class Small(Countdown):
        pass

    assert register("small")(Small) is Small
    assert isinstance(get_task("small", {}), Small)
    register("small")(Small)  # again is fine: a module may be reloaded under the same object
    with pytest.raises(ValueError, match="already taken"):
        register("small")(Countdown)


def test_the_example_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = DOC.read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    command = re.search(r"--task (\S+) --task_options '(.*?)'", text)
    assert code and command
    (tmp_path / "spelling.py").write_text(code[1], encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    task: Any = get_task(command[1], json.loads(command[2]))
    sys.modules.pop("spelling")
    splits = {split: task.examples(split, 40) for split in tasks.SPLITS}
    names = [example.id for part in splits.values() for example in part]
    assert len(set(names)) == len(names) == 120 and {len(name) for name in names} == {5}
    assert task.examples("train", 10, offset=30) == splits["train"][30:]
    rng = random.Random(0)
    for example in splits["train"]:
        transcript = task.transcript(example, rng)
        last = transcript.retry or transcript.attempt
        assert task.verify(example, last).ok and task.leaks(example, last)
        assert not task.leaks(example, transcript.reflection or "")
    assert task.verify(splits["train"][0], "").reason == "empty"


def test_the_options_in_the_docs_are_those_of_the_class() -> None:
    import inspect

    sections = {
        "Your data without code": Dataset,
        "Countdown": Countdown,
        "Function calling": FunctionCalling,
        "Function calling, generated": FunctionCallingGenerated,
    }
    for section, factory in sections.items():
        text = DOC.read_text(encoding="utf-8").partition(f"## {section}\n")[2].partition("\n## ")[0]
        options = re.findall(r"^(?:\||-) (`.*?) [|(]", text, re.MULTILINE)  # of a table or of a list
        names = re.findall(r"`(\w+)`", " ".join(options))
        assert names == list(inspect.signature(factory).parameters)
    setting = re.search(r"paper's setting is `(.*?)`", DOC.read_text(encoding="utf-8"))
    assert setting
    get_task("countdown", json.loads(setting[1]))
