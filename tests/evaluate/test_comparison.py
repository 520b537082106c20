"""Figures against small cases counted by hand, and their text for the terminal."""

import json

import pytest

from grpo.evaluate.comparison import ModelResult, report
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
def vanilla():
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
def trained(vanilla):
    records = [
        record(0, OK),
        record(1, OK),
        record(2, BAD, OK, controls=(BAD, BAD, BAD)),
        record(3, OK),
        record(4, BAD, OK, controls=(BAD, BAD, BAD)),
    ]
    return ModelResult(records, vanilla.settings)


def test_figures_of_one_model(vanilla):
    figures = report({"model": vanilla})["models"]["model"]
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


def test_control_that_is_missing_somewhere_is_compared_where_it_is(vanilla):
    shuffled = report({"model": vanilla})["models"]["model"]["controls"]["shuffled"]
    assert shuffled["success"]["of"] == 3
    assert shuffled["retry_minus_control"]["mean"] == pytest.approx(1 / 3)


def test_training_is_compared_problem_by_problem(vanilla, trained):
    (comparison,) = report({"vanilla": vanilla, "trained": trained})["comparisons"]
    assert (comparison["before"], comparison["after"]) == ("vanilla", "trained")
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
        (["vanilla", "trained"], ["vanilla-trained"]),
        (["untouched", "vanilla", "trained"], ["untouched-vanilla", "vanilla-trained", "untouched-trained"]),
        (["a", "b", "c"], ["a-b", "a-c"]),
        (["untouched", "vanilla", "other"], ["untouched-vanilla", "vanilla-other"]),
        (["a"], []),
    ],
)
def test_who_is_compared_with_whom(vanilla, names, pairs):
    comparisons = report(dict.fromkeys(names, vanilla))["comparisons"]
    assert [f"{one['before']}-{one['after']}" for one in comparisons] == pairs


def test_examples_are_those_that_both_failed_and_then_those_that_training_mended(vanilla, trained):
    examples = report({"untouched": vanilla, "vanilla": vanilla, "trained": trained})["examples"]
    assert [example["id"] for example in examples] == ["p1", "p2", "p3", "p4"]
    assert examples[0]["after"]["reflection"] is None and examples[1]["after"]["reflection"] is not None
    many = ModelResult([record(i, BAD, OK) if i > 3 else record(i, BAD, BAD) for i in range(9)])
    mended = ModelResult([record(i, BAD, OK) if i > 3 else record(i, OK) for i in range(9)])
    assert [e["id"] for e in report({"a": many, "b": mended})["examples"]] == ["p4", "p5", "p6", "p7", "p8"]


def test_models_without_a_common_ground_are_refused(vanilla, trained):
    with pytest.raises(ValueError, match="at least one model"):
        report({})
    with pytest.raises(ValueError, match="at least one problem, got none for a"):
        report({"a": ModelResult([])})
    with pytest.raises(ValueError, match="same problems in the same order, but those of b and a differ"):
        report({"a": vanilla, "b": ModelResult(trained.records[::-1], trained.settings)})
    with pytest.raises(ValueError, match=r"b and a differ in \['seed'\]"):
        report({"a": vanilla, "b": ModelResult(trained.records, {**trained.settings, "seed": 2})})


def test_a_model_measured_without_controls_stands_beside_others(vanilla):
    bare = [{**one, "controls": {}} for one in vanilla.records]
    figures = report(
        {"untouched": ModelResult(bare, {**vanilla.settings, "controls": []}), "vanilla": vanilla}
    )
    assert figures["models"]["untouched"]["controls"] == {}
    assert figures["comparisons"][0]["controls"] == dict.fromkeys(("blind", "shuffled", "blanked"))
    assert "blind retry right" in table(figures)


def test_report_survives_json_and_the_table_is_the_same(vanilla, trained):
    figures = report({"untouched": vanilla, "vanilla": vanilla, "trained": trained})
    again = json.loads(json.dumps(figures, allow_nan=False))
    assert again == figures and table(again) == table(figures)


def test_table_holds_the_papers_columns_and_every_part(vanilla, trained):
    text = table(report({"untouched": vanilla, "vanilla": vanilla, "trained": trained}))
    lines = text.splitlines()
    assert lines[0] == "countdown, 5 problems, right answers in percent"
    assert lines[1].split() == ["untouched", "vanilla", "trained"]
    assert lines[2].split() == ["1st", "try", "2nd", "try"] * 3
    assert lines[3].split() == ["20.0", "60.0", "20.0", "60.0", "60.0", "100.0"]
    for part in (
        "What the warm start gave (vanilla minus untouched",
        "What training gave (trained minus vanilla",
        "retry minus shuffled",
        "answer in the reflection",
        "why wrong, percent of wrong",
        "4 problems that vanilla got wrong at first",
        "reflection (cut at the limit):",
    ):
        assert part in text
    assert max(map(len, lines)) <= 100


def test_many_models_and_long_names_stay_within_the_width(vanilla):
    names = [f"a-rather-long-name-of-a-run-{i:03}/checkpoints/step-{i:06}" for i in range(7)]
    text = table(report(dict.fromkeys(names, vanilla)))
    tabular = [line for line in text.splitlines() if "minus a-rather" not in line and "got wrong" not in line]
    assert max(map(len, tabular)) <= 100
    assert text.count("first try right") == 3  # tables of three models at most


def test_what_a_model_writes_cannot_steer_the_terminal(vanilla):
    hostile = [
        record(0, BAD, BAD, text="\x1b[2Jred\x07 \u202eback\nnext " + "long " * 400),
        *vanilla.records[1:],
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
