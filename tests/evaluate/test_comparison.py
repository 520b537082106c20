"""Reports against small cases counted by hand, and their text for the terminal."""

import json

import pytest

from grpo.evaluate.comparison import ModelResult, read_report, report
from grpo.evaluate.table import table


def record(
    number, first, retry=None, *, controls=(), tokens=10, finish_reason="stop", leaks=False, text="hm"
):
    """`first`, `retry` and `controls` (blind, shuffled, blanked) are reasons."""
    made = {
        "id": f"p{number}",
        "prompt": f"Numbers: {number}.",
        "first": {"text": "<answer>1</answer>", "reason": first, "tokens": 3, "finish_reason": "stop"},
        "reflection": None,
        "retry": None,
        "controls": {},
    }
    if retry:
        made["reflection"] = {"text": text, "tokens": tokens, "finish_reason": finish_reason, "leaks": leaks}
        made["retry"] = {"text": "<answer>2</answer>", "reason": retry, "tokens": 3}
        names = ("blind", "shuffled", "blanked")
        made["controls"] = {n: r and {"text": "", "reason": r} for n, r in zip(names, controls, strict=False)}
    return made


BAD, OK = "wrong_value", "ok"


@pytest.fixture
def before_rl():
    return ModelResult(
        [
            record(0, OK),
            record(1, BAD, OK, controls=(BAD, None, BAD), tokens=20, leaks=True),
            record(2, BAD, "no_answer", controls=(BAD, BAD, OK), tokens=40, finish_reason="length"),
            record(3, "no_answer", BAD, controls=(OK, BAD, BAD), tokens=30),
            record(4, BAD, OK, controls=(OK, BAD, BAD), tokens=30),
        ],
        {"task": "countdown", "seed": 1, "controls": ["blind", "shuffled", "blanked"]},
    )


@pytest.fixture
def trained(before_rl):
    records = [
        record(0, OK),
        record(1, OK),
        record(2, BAD, OK, controls=(BAD, BAD, BAD)),
        record(3, OK),
        record(4, BAD, OK, controls=(BAD, BAD, BAD)),
    ]
    return ModelResult(records, before_rl.settings)


def test_figures_of_one_model(before_rl):
    figures = report({"model": before_rl})["models"]["model"]
    assert (figures["first_try"]["mean"], figures["first_try"]["count"], figures["first_try"]["of"]) == (
        0.2,
        1,
        5,
    )
    assert figures["second_try"]["mean"] == pytest.approx(3 / 5)
    assert figures["gain_of_second_try"]["mean"] == pytest.approx(2 / 5)
    assert figures["num_failures"] == 4
    assert figures["retry_success"]["mean"] == 2 / 4
    assert figures["answer_leakage"]["mean"] == 1 / 4
    assert figures["reflection_mean_length"] == 30 and figures["reflection_max_length"] == 40
    assert figures["reflection_truncated"] == 1 / 4
    assert figures["reasons_of_failure"] == {
        "first": {BAD: 3 / 4, "no_answer": 1 / 4},
        "retry": {"no_answer": 1 / 2, BAD: 1 / 2},
    }
    assert figures["controls"]["blind"]["success"]["mean"] == 2 / 4
    assert figures["controls"]["blind"]["retry_minus_control"]["mean"] == 0
    assert figures["controls"]["blanked"]["retry_minus_control"]["mean"] == pytest.approx(1 / 4)


def test_control_that_is_missing_somewhere_is_compared_where_it_is(before_rl):
    shuffled = report({"model": before_rl})["models"]["model"]["controls"]["shuffled"]
    assert shuffled["success"]["of"] == 3
    assert shuffled["retry_minus_control"]["mean"] == pytest.approx(1 / 3)


def test_training_is_compared_problem_by_problem(before_rl, trained):
    (comparison,) = report({"before_rl": before_rl, "trained": trained})["comparisons"]
    assert (comparison["before"], comparison["after"]) == ("before_rl", "trained")
    assert comparison["given_by"] == "training"
    assert comparison["first_try"]["mean"] == pytest.approx(2 / 5)
    assert comparison["second_try"]["mean"] == pytest.approx(2 / 5)
    assert comparison["retry_success"]["mean"] == pytest.approx(1 - 2 / 4)
    assert comparison["controls"]["blind"]["mean"] == pytest.approx(0 - 2 / 4)
    for name in ("first_try", "second_try", "retry_success"):
        assert comparison[name]["low"] <= comparison[name]["mean"] <= comparison[name]["high"]


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        (["before_rl", "trained"], ["before_rl-trained"]),
        (
            ["untouched", "before_rl", "trained"],
            ["untouched-before_rl", "before_rl-trained", "untouched-trained"],
        ),
        (["a", "b", "c"], ["a-b", "a-c"]),
        (["untouched", "before_rl", "other"], ["untouched-before_rl", "before_rl-other"]),
        (["a"], []),
    ],
)
def test_who_is_compared_with_whom(before_rl, names, pairs):
    comparisons = report(dict.fromkeys(names, before_rl))["comparisons"]
    assert [f"{one['before']}-{one['after']}" for one in comparisons] == pairs


def test_examples_are_those_that_both_failed_and_then_those_that_training_mended(before_rl, trained):
    examples = report({"untouched": before_rl, "before_rl": before_rl, "trained": trained})["examples"]
    assert [example["id"] for example in examples] == ["p1", "p2", "p3", "p4"]
    assert examples[0]["after"]["reflection"] is None and examples[1]["after"]["reflection"] is not None
    many = ModelResult([record(i, BAD, OK) if i > 3 else record(i, BAD, BAD) for i in range(9)])
    mended = ModelResult([record(i, BAD, OK) if i > 3 else record(i, OK) for i in range(9)])
    assert [e["id"] for e in report({"a": many, "b": mended})["examples"]] == ["p4", "p5", "p6", "p7", "p8"]


def test_models_without_a_common_ground_are_refused(before_rl, trained):
    with pytest.raises(ValueError, match="at least one model"):
        report({})
    with pytest.raises(ValueError, match="at least one problem, got none for a"):
        report({"a": ModelResult([])})
    with pytest.raises(ValueError, match="same problems in the same order, but those of b and a differ"):
        report({"a": before_rl, "b": ModelResult(trained.records[::-1], trained.settings)})
    with pytest.raises(ValueError, match=r"b and a differ in \['seed'\]"):
        report({"a": before_rl, "b": ModelResult(trained.records, {**trained.settings, "seed": 2})})


def test_a_model_measured_on_fewer_problems_is_compared_on_these(before_rl, trained):
    both = {"before_rl": before_rl, "trained": trained}
    figures = report({"untouched": before_rl.start(2), **both})
    assert figures["num_problems"] == 5 and figures["models"]["untouched"]["first_try"]["of"] == 2
    warm_start, training, whole = figures["comparisons"]
    assert training == report(both)["comparisons"][0]
    assert warm_start["first_try"]["mean"] == 0  # of the first two problems, each solves one at first
    assert whole == report({"untouched": before_rl.start(2), "trained": trained.start(2)})["comparisons"][
        0
    ] | {"given_by": "both together"}
    text = table(figures)
    assert text.count("(the first 2 problems only)") == 2 and "as it came, first 2 problems;" in text
    assert max(map(len, text.splitlines())) <= 100 and "first 5" not in text
    with pytest.raises(ValueError, match="those of b and a differ"):
        report({"a": before_rl, "b": ModelResult(trained.records[1:3], trained.settings)})
    with pytest.raises(ValueError, match="those of b and a differ"):
        report({"a": before_rl, "b": before_rl.start(0)})


def test_a_model_measured_without_controls_stands_beside_others(before_rl):
    bare = [{**one, "controls": {}} for one in before_rl.records]
    figures = report(
        {"untouched": ModelResult(bare, {**before_rl.settings, "controls": []}), "before_rl": before_rl}
    )
    assert figures["models"]["untouched"]["controls"] == {}
    assert figures["comparisons"][0]["controls"] == dict.fromkeys(("blind", "shuffled", "blanked"))
    assert "blind retry right" in table(figures)


def test_report_survives_json_and_the_table_is_the_same(before_rl, trained):
    figures = report({"untouched": before_rl, "before_rl": before_rl, "trained": trained})
    again = json.loads(json.dumps(figures, allow_nan=False))
    assert again == figures and table(again) == table(figures)


def test_a_report_of_version_0_1_is_read(before_rl, trained, tmp_path):
    figures = report({"untouched": before_rl, "before_rl": before_rl, "trained": trained})
    today, old = tmp_path / "today.json", tmp_path / "old.json"
    today.write_text(json.dumps(figures))
    old.write_text(today.read_text().replace("before_rl", "vanilla"))
    assert read_report(old) == read_report(today) == figures


def test_table_holds_the_papers_columns_and_every_part(before_rl, trained):
    text = table(report({"untouched": before_rl, "before_rl": before_rl, "trained": trained}))
    lines = text.splitlines()
    assert lines[0] == "countdown, 5 problems, right answers in percent"
    assert lines[1].split() == ["untouched", "before_rl", "trained"]
    assert lines[2].split() == ["1st", "try", "2nd", "try"] * 3
    assert lines[3].split() == ["20.0", "60.0", "20.0", "60.0", "60.0", "100.0"]
    for part in (
        "What the warm start gave (before_rl minus untouched",
        "What training gave (trained minus before_rl",
        "retry minus shuffled",
        "answer in the reflection",
        "why wrong, percent of wrong",
        "4 problems that before_rl got wrong at first",
        "reflection (cut at the limit):",
    ):
        assert part in text
    assert max(map(len, lines)) <= 100


def test_many_models_and_long_names_stay_within_the_width(before_rl):
    names = [f"a-rather-long-name-of-a-run-{i:03}/checkpoints/step-{i:06}" for i in range(7)]
    text = table(report(dict.fromkeys(names, before_rl)))
    tabular = [line for line in text.splitlines() if "minus a-rather" not in line and "got wrong" not in line]
    assert max(map(len, tabular)) <= 100
    assert text.count("first try right") == 3  # tables of three models at most


def test_what_a_model_writes_cannot_steer_the_terminal(before_rl):
    hostile = [
        record(0, BAD, BAD, text="\x1b[2Jred\x07 \u202eback\nnext " + "long " * 400),
        *before_rl.records[1:],
    ]
    text = table(report({"model": ModelResult(hostile)}))
    assert not set("\x1b\x07\u202e") & set(text)
    assert "\\x1b[2Jred\\x07" in text and "[...]" in text


def test_all_right_from_the_start_leaves_nothing_to_compare():
    figures = report({"model": ModelResult([record(0, OK), record(1, OK)])})
    model = figures["models"]["model"]
    assert (
        model["retry_success"] is None
        and model["reflection_mean_length"] is None
        and figures["examples"] == []
    )
    assert "retries right" in table(figures)


def test_scores_are_reported_and_a_threshold_decides_what_is_right(before_rl):
    records = [record(0, BAD), record(1, OK), record(2, BAD, BAD, controls=(BAD, None, None))]
    records[0]["first"] |= {"score": 0.75, "right": True}
    records[1]["first"] |= {"score": 0.25, "right": False}
    records[2]["first"] |= {"score": 0.25}
    records[2]["retry"] |= {"score": 0.5, "right": True}
    result = report({"model": ModelResult(records, {"task": "mine", "success_threshold": 0.5})})
    figures = result["models"]["model"]
    assert figures["first_try"]["count"] == 1 and figures["second_try"]["count"] == 2
    assert figures["mean_score"] == {"first_try": 1.25 / 3, "last_try": 1.5 / 3}
    text = table(result)
    assert "(right: a score of at least 0.5)" in text and "mean score, last try" in text and "0.417" in text
    assert "second try (right, score 0.5):" in text
    assert "mean score" not in table(report({"model": before_rl}))  # and a file without scores is as it was
