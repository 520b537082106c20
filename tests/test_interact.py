"""Talking to a model: what is asked, shown and judged, and how the conversation ends."""

import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import tiny_run

from grpo import interact
from grpo.tasks import Example, Verdict

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_run.finished(tmp_path_factory.mktemp("run"))


@pytest.fixture
def talk(run, monkeypatch, capsys):
    """Exit status, output and errors of a conversation in which the user types `lines`."""

    def talk(*lines, argv=(), model=run):
        stdin = io.TextIOWrapper(io.BytesIO(b"".join(line + b"\n" for line in map(as_bytes, lines))))
        monkeypatch.setattr(sys, "stdin", stdin)
        status = interact.main([str(model), *map(str, argv)])
        return status, *capsys.readouterr()

    return talk


def as_bytes(line):
    return line if isinstance(line, bytes) else line.encode()


def labels(out):
    """What was shown, in order, without verdicts: heldout, attempt, reflection, retry."""
    return re.findall(r"^.*?\b(heldout|attempt|reflection|retry)[^:\n]*:$", out, re.MULTILINE)


def test_the_tasks_own_problems_are_judged(talk, run):
    """The attempts are those of the run's evaluation, at its temperature and with its noise."""
    records = tiny_run.records(run, "evaluation-trained.jsonl")[:6]
    status, out, err = talk(*["next"] * 5, argv=["--index", "0", "--temperature", "0.9"])
    assert status == 0 and err == ""
    expected = []
    for record in records:
        expected += ["heldout", "attempt"] + ([] if record["retry"] is None else ["reflection", "retry"])
    assert labels(out) == expected and {"attempt", "retry"} <= set(expected)
    verdicts = [line.split("(")[1].rstrip("):") for line in out.splitlines() if "attempt (" in line]
    assert verdicts == ["right" if r["first"]["reason"] == "ok" else r["first"]["reason"] for r in records]


def test_about_another_problem_the_user_is_asked(talk):
    status, out, _ = talk("Problem X?", "what?", "n", "Problem Y?", "y", "reflect", "Problem Z?", "reflect")
    assert status == 0 and labels(out) == ["attempt", "reflection", "retry"] * 3
    assert out.count(interact.QUESTION) == 4  # "what?" is no answer
    assert out.count("problems look like this:\n  Problem 0?\n") == 1
    assert "unknown" not in out and "(wrong)" not in out


JUDGED = re.compile(r"attempt \((right|wrong|empty)")


def test_a_typed_problem_that_the_task_has_is_judged(talk):
    status, out, _ = talk("Problem  3?", "quit", "never read")
    assert status == 0 and interact.QUESTION not in out and JUDGED.search(out)


def test_a_split_with_fewer_problems_than_the_settings_ask_for_is_known_too(talk, monkeypatch):
    def examples(self, split, count, offset=0):
        if offset + count > 3:
            raise ValueError("there are 3")
        return [Example(f"{split}-{i}", f"A {split}\nproblem {i}?") for i in range(offset, offset + count)]

    monkeypatch.setattr(tiny.Toy, "examples", examples)
    status, out, _ = talk("A heldout problem 2?", "A train problem 0?")
    assert status == 0 and interact.QUESTION not in out and len(JUDGED.findall(out)) == 2


def test_a_task_may_read_a_problem_that_is_typed(talk, monkeypatch):
    def typed(self, text):
        return Example("typed", text.upper()) if "two" in text else None

    monkeypatch.setattr(tiny.Toy, "typed", typed, raising=False)
    status, out, _ = talk("One?", "y", "two?")
    assert status == 0 and out.count(interact.QUESTION) == len(JUDGED.findall(out)) == 1


def test_the_threshold_decides_what_is_right(talk, monkeypatch):
    monkeypatch.setattr(tiny.Toy, "verify", lambda *_: Verdict("partial", 0.5))
    _, out, _ = talk("Problem 3?", "Problem 4?", argv=["--success_threshold", "0.5"])
    assert out.count("attempt (right, score 0.5):") == 2 and labels(out) == ["attempt"] * 2
    _, out, _ = talk("Problem 3?")
    assert "attempt (partial, score 0.5):" in out and "retry (partial, score 0.5):" in out


def test_asking_again_samples_another_answer_unless_greedy(talk):
    def answers(*argv):
        _, out, _ = talk("Who?", "y", "Who?", "y", "Who?", "y", argv=argv)
        return len(set(re.findall(r"attempt.*?:\n(  .*)\n", out)))

    assert answers() == 1 and answers("--temperature", "1") > 1


def test_odd_input_gets_a_line(talk):
    status, out, err = talk(
        "reflect", "x" * 2000, "", b"\xff\xfe?", "y", "help", "next", argv=["--index", "10"]
    )
    assert status == 0 and err == ""
    assert "There is no attempt to reflect on yet" not in out  # --index 10 has made one
    assert (
        "error: a conversation of up to" in out and "must fit the model's max_position_embeddings, 512" in out
    )
    assert out.count(interact.HELP) == 2 and "heldout 11:" in out
    assert "There is no attempt to reflect on yet" in talk("reflect")[1]


def test_the_end_of_a_split_is_a_line(talk, monkeypatch):
    def examples(self, split, count, offset=0):
        raise ValueError("there are no more")

    monkeypatch.setattr(tiny.Toy, "examples", examples)
    status, out, _ = talk("next", "Problem 3?", "y")
    assert status == 0 and "error: there are no more" in out and labels(out) == ["attempt"]


def test_checkpoints_and_models_without_a_run(talk, run, tmp_path):
    for which in ("start", "best", "newest", "4"):
        assert talk(argv=["--checkpoint", which])[0] == 0
    for argv, message in [
        (["--checkpoint", "3000"], "must be one that .* has .start, 2?,? ?.*4., got 3000"),
        (["--checkpoint", "last"], "must be best, newest, start or the number of a step, got 'last'"),
        (["--index", "-1"], "index must be at least 0"),
        (["--tempo", "1"], "unknown option --tempo"),
    ]:
        status, _, err = talk(argv=argv)
        assert status == 2 and err.startswith("error: ") and re.search(message, err)
    # A folder inside the run has its settings; any other model those of the command line.
    assert "tiny:Toy" in talk(model=run / "start")[1]
    (model,) = run.parent.parent.glob("model")
    options = ["--task", "tiny:Toy", "--max_completion_length", "6", "--max_reflection_length", "8"]
    cpu = ["--device", "cpu", "--dtype", "float32"]
    status, out, _ = talk("next", model=model, argv=[*options, *cpu])
    assert status == 0 and "heldout 0:" in out and "preset model, for models other than" in out
    # Its limits are those of the preset for other models, not the demo's: too long for this one.
    status, out, _ = talk("next", model=model, argv=["--task", "tiny:Toy", *cpu])
    assert status == 0 and "error: a conversation of up to 1" in out and "(answers up to 512, refl" in out
    status, _, err = talk(model=model, argv=["--checkpoint", "best"])
    assert status == 2 and "unless RUN is a run directory" in err
    status, _, err = talk(model=run.parent)
    assert status == 2 and "did you mean" in err
    status, _, err = talk(model=tmp_path / "nothing")
    assert status == 2 and "RUN" in err and "does not exist" in err and "CHECKPOINT" not in err


def test_piped_input(run, tmp_path):
    done = tiny_run.command("grpo.interact", [str(run)], folder=tmp_path, typed="Problem X?\nreflect\n")
    assert done.status == 0 and labels(done.out) == ["attempt", "reflection", "retry"] and done.err == ""


def test_ctrl_c_ends_it(run):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")])
    talking = subprocess.Popen(
        [sys.executable, "-m", "grpo.interact", str(run)],
        env={**os.environ, "PYTHONPATH": paths},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert "toy" in talking.stdout.readline().lower()
    talking.send_signal(signal.SIGINT)
    _, err = talking.communicate(timeout=120)
    assert talking.returncode == 130 and err == ""
