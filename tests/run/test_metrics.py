"""What a run writes down: the same bytes in a rerun; and each warning once, where its cause is."""

import io
import json
import math
import re
from functools import partial
from pathlib import Path

import pytest
import tiny

from grpo.run.diagnostics import RULES, WINDOW, Warnings, nothing_right, sampling_difference
from grpo.run.metrics import Metrics, console_line, header, rollout_metrics, verdict_metrics

STEP = {
    "reward": 0.4125, "completions/mean_length": 57.25, "frac_reward_zero_std": 0.25, "kl": 0.00123,
    "entropy": 1.5, "grad_norm": 0.75, "completions/clipped_ratio": 0.0625, "learning_rate": 1e-05,
}  # fmt: skip


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def repeat(count: int, **values: float) -> list[dict]:
    named = {name.replace("__", "/"): value for name, value in values.items()}
    return [{"step": step + 1, **named} for step in range(count)]


# --- files and console ------------------------------------------------------------------------------------


def test_the_same_metrics_give_the_same_bytes_in_any_order(tmp_path):
    for name, items in (("a", list(STEP.items())), ("b", list(reversed(STEP.items())))):
        (tmp_path / name).mkdir()
        run = Metrics(tmp_path / name, console=io.StringIO())
        run.log(1, dict(items))
        run.timings(1, {"step_time": 1.0 if name == "a" else 2.0})
    assert (tmp_path / "a/metrics.jsonl").read_bytes() == (tmp_path / "b/metrics.jsonl").read_bytes()
    assert (tmp_path / "a/timings.jsonl").read_bytes() != (tmp_path / "b/timings.jsonl").read_bytes()


def test_floats_survive_to_the_last_bit(tmp_path):
    values = {"a": 0.1 + 0.2, "b": 1e-300, "c": math.pi, "d": 5e-7, "count": 2**60}
    Metrics(tmp_path, console=io.StringIO()).log(3, values)
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 3, **values}]


def test_what_json_cannot_hold_becomes_null(tmp_path):
    Metrics(tmp_path, console=io.StringIO()).log(1, {"kl": math.nan, "loss": math.inf, "reward": 0.5})
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "kl": None, "loss": None, "reward": 0.5}]


def test_no_line_is_lost_or_repeated_by_a_second_writer(tmp_path):
    Metrics(tmp_path, console=io.StringIO()).log(1, STEP)
    Metrics(tmp_path, console=io.StringIO()).log(2, STEP)
    assert [record["step"] for record in lines(tmp_path / "metrics.jsonl")] == [1, 2]


def test_console_line_of_a_step():
    line = console_line({"step": 3, **STEP}, 16, seconds=41.26)
    assert line.split() == ["3/16", "0.412", "57.2", "0.75", "0.0012", "1.500", "0.750", "0.06", "41.3"]


@pytest.mark.parametrize("max_steps", [None, 16, 123456])
def test_the_lines_of_steps_are_aligned_with_their_header(max_steps):
    names, units = header(max_steps).splitlines()
    missing = console_line({"step": 12, "reward": 0.5, "kl": None}, max_steps)
    whole = console_line({"step": 3, **STEP}, max_steps, seconds=1234.5)
    ends = [[match.end() for match in re.finditer(r"\S+", line)] for line in (names, whole, missing)]
    assert ends[0] == ends[1] == ends[2] and len(names.split()) == len(units.split()) + 1
    assert missing.split()[1:] == ["0.500", *"-------"]
    assert max(map(len, (names, units, whole))) <= (78 if max_steps != 123456 else 85)


def test_the_header_comes_again_every_20_steps(tmp_path):
    console = io.StringIO()
    run = Metrics(tmp_path, console=console)
    for step in range(1, 42):
        run.log(step, STEP)
        run.log(step, {"validation/retry": 0.25})
    assert [index for index, line in enumerate(console.getvalue().splitlines()) if "entropy" in line] == [
        0, 42, 84,
    ]  # fmt: skip


def test_console_line_of_a_validation():
    assert console_line({"step": 8, "validation/retry": 0.25}) == "step 8  validation/retry 0.25"


def test_each_log_is_one_console_line(tmp_path):
    console = io.StringIO()
    run = Metrics(tmp_path, console=console, max_steps=2)
    run.log(1, STEP, 3.0)
    run.timings(1, {"step_time": 3.0})
    line = console_line({"step": 1, **STEP}, 2, 3.0)
    assert console.getvalue().splitlines() == [*header(2).splitlines(), line]
    assert lines(tmp_path / "metrics.jsonl") == [
        {"step": 1, **STEP}
    ]  # without seconds, which a rerun changes


def test_verdict_metrics_tell_wrong_from_unreadable():
    reasons, right = ["ok", "wrong_value", "no_answer", "parse"], [True, False, False, False]
    mixed = verdict_metrics(reasons, right, frozenset({"no_answer", "parse"}))
    assert mixed == {"verdicts/ok": 0.25, "verdicts/format": 0.5}
    assert verdict_metrics([], [], frozenset()) == {"verdicts/ok": 0.0, "verdicts/format": 0.0}


def test_graded_verdicts_have_a_mean_score():
    parts = tiny.build()
    pool = tiny.failures(parts, 1)
    episodes = tiny.episodes(parts, pool)
    options = {"train_on": "reflection", "task": parts.task, "groups": pool}
    assert "verdicts/score" not in rollout_metrics(episodes, **options)
    scores = [0.25, 0.5, 1.5]
    for episode, score in zip(episodes, scores, strict=False):
        episode.reasons, episode.scores = ["wrong"], [score]
    episodes[3].reasons = ["ok"]
    metrics = rollout_metrics(episodes, success_threshold=0.5, **options)
    assert metrics["verdicts/score"] == sum([*scores, 1.0]) / 4 and metrics["verdicts/ok"] == 3 / 4


class Declared(tiny.Toy):
    format_reasons = frozenset({"wrong"})


class Undeclared(tiny.Toy):
    """A user's task that does not say which of its reasons are format errors."""

    format_reasons = ()


@pytest.mark.parametrize(("task", "unreadable"), [(Declared(), {"wrong"}), (Undeclared(), set())])
def test_the_metrics_of_a_step_are_those_of_learner_episodes_and_task(task, unreadable):
    parts = tiny.build(task=task)
    pool = tiny.failures(parts, 3)
    episodes = tiny.episodes(parts, pool)
    metrics = rollout_metrics(episodes, train_on="reflection", task=task, groups=pool)
    reasons = [reason for episode in episodes for reason in episode.reasons]
    assert "wrong" in reasons
    assert metrics["reward"] == sum(episode.reward for episode in episodes) / len(episodes)
    assert metrics["verdicts/ok"] == reasons.count("ok") / len(reasons)
    assert metrics["verdicts/format"] == sum(reason in unreadable for reason in reasons) / len(reasons)
    leaks = [any(c.isdecimal() for c in episode.texts["reflection"]) for episode in episodes]
    assert metrics["leaks"] == sum(leaks) / len(leaks)


def test_steps_without_reflections_have_no_leaks():
    parts = tiny.build(train_on="attempt")
    pool = tiny.failures(parts, 3)
    episodes = tiny.episodes(parts, pool)
    metrics = rollout_metrics(episodes, train_on="attempt", task=parts.task, groups=pool)
    assert "leaks" not in metrics and metrics["completions/max_length"] <= 8


# --- warnings ---------------------------------------------------------------------------------------------

BAD = {
    "no_success": [{"step": 0, "validation/retry": 0.0, "validation/retry_blind": 0.0}],
    "few_signals": repeat(WINDOW, frac_reward_zero_std=0.96),
    "growing_length": repeat(WINDOW, completions__clipped_ratio=0.3),
    "entropy_collapse": repeat(WINDOW, entropy=2.0) + repeat(WINDOW, entropy=0.4),
    "idle_reflection": [
        {"step": 1, "validation/retry": 0.2, "validation/retry_blind": 0.1},
        {"step": 8, "validation/retry": 0.3, "validation/retry_blind": 0.25},
    ],
    "answer_leakage": repeat(WINDOW, leaks=0.6),
    "large_kl": repeat(WINDOW, kl=0.6),
    "format_errors": repeat(WINDOW, verdicts__format=0.6),
}
GOOD = {
    "no_success": [{"step": 0, "validation/retry": 0.1}, {"step": 8, "validation/retry": 0.0}],
    "few_signals": repeat(WINDOW, frac_reward_zero_std=0.94),
    # the demo's good run of 12 steps: length 42 -> 67, nothing truncated
    "growing_length": repeat(WINDOW, completions__clipped_ratio=0.0, completions__mean_length=42.0)
    + repeat(WINDOW, completions__clipped_ratio=0.05, completions__mean_length=67.0),
    "entropy_collapse": repeat(WINDOW, entropy=2.0) + repeat(WINDOW, entropy=0.6),
    "idle_reflection": [
        {"step": 1, "validation/retry": 0.2, "validation/retry_blind": 0.1},
        {"step": 8, "validation/retry": 0.5, "validation/retry_blind": 0.2},
    ],
    "answer_leakage": repeat(WINDOW, leaks=0.4),
    "large_kl": repeat(WINDOW, kl=0.1),
    "format_errors": repeat(WINDOW, verdicts__format=0.4),
}


def test_every_rule_has_a_case():
    assert set(BAD) == set(GOOD) == set(RULES)


@pytest.mark.parametrize("name", RULES)
def test_rule_speaks_where_its_cause_is_and_nowhere_else(name):
    assert isinstance(RULES[name](BAD[name]), str)
    assert RULES[name](GOOD[name]) is None
    assert all(rule(BAD[name]) is None for other, rule in RULES.items() if other != name)


@pytest.mark.parametrize("name", RULES)
def test_rule_waits_for_enough_steps_and_bears_missing_values(name):
    assert RULES[name]([]) is None
    if name != "no_success":  # says at once what an hour of training would say too
        assert RULES[name](BAD[name][:1]) is None
    assert RULES[name]([{"step": 1, "kl": None, "entropy": None, "frac_reward_zero_std": None}]) is None


def test_growing_length_speaks_early_when_length_grows_too():
    start = repeat(WINDOW, completions__clipped_ratio=0.01, completions__mean_length=46.0)
    end = repeat(WINDOW, completions__clipped_ratio=0.12, completions__mean_length=83.0)
    assert RULES["growing_length"](start + end) is not None
    assert RULES["growing_length"](start + start) is None


def test_the_bound_on_the_sampling_difference_follows_the_dtype():
    history = repeat(WINDOW, sampling__sampling_logp_difference__mean=0.04)  # bfloat16 rounding on a CPU
    assert sampling_difference("bfloat16")(history) is None
    assert "float32" in str(sampling_difference("float32")(history))
    stale = repeat(WINDOW, sampling__sampling_logp_difference__mean=0.3)
    assert sampling_difference("bfloat16")(stale) is not None


def test_a_warning_is_given_once_and_kept(tmp_path):
    console = io.StringIO()
    run = Metrics(tmp_path, console=console)
    for step in range(1, 3 * WINDOW):
        run.log(step, {"reward": 0.5, "kl": 0.9})
    kept = [record for record in lines(tmp_path / "metrics.jsonl") if "warning" in record]
    assert [(record["step"], record["warning"]) for record in kept] == [(WINDOW, "large_kl")]
    assert console.getvalue().count("warning: " + kept[0]["advice"]) == 1


@pytest.mark.parametrize("stop", [2, WINDOW, WINDOW + 2])
def test_a_continued_run_writes_the_bytes_of_an_uninterrupted_one(tmp_path, stop):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        run = Metrics(tmp_path / name, console=io.StringIO())
        for step in range(1, 2 * WINDOW):
            if name == "parts" and step == stop + 1:
                run = Metrics(tmp_path / name, console=io.StringIO())  # as --resume does
            run.log(step, {"reward": 0.1 * step, "kl": 0.9, "frac_reward_zero_std": 1.0})
    whole = (tmp_path / "whole/metrics.jsonl").read_bytes()
    assert whole == (tmp_path / "parts/metrics.jsonl").read_bytes() and whole.count(b'"warning"') == 2


def test_warnings_do_not_count_as_history():
    records = [{"step": 1, "kl": 0.9}, {"step": 1, "warning": "large_kl", "advice": "..."}]
    warnings = Warnings(records)
    assert warnings.history == records[:1] and warnings.given == {"large_kl"}


def test_nothing_right_is_a_matter_of_the_first_episodes():
    """Which are counted: small batches get more steps."""
    none, some = repeat(5, verdicts__ok=0.0), repeat(1, verdicts__ok=0.01)
    right = partial(nothing_right, episodes_per_step=8, limit=36)
    assert "not one of the first 40 answers was right (5 steps)" in right(none)
    assert "not one of" in right(none + some)  # a continued run stops again, and says why
    for history in ([], none[1:], some + none, none[:2] + some + none):
        assert right(history) is None
    assert right(none, limit=41) is None and right(none, episodes_per_step=4) is None
    assert right(none, limit=0) is None and right([], limit=0) is None
    assert "(1 steps)" in right(none[:1], episodes_per_step=36)
